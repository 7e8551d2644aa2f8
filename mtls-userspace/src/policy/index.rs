//! A set of rules, found by what a connection has: the cost of a decision depends on the rules that could match,
//! not on how many there are.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::pattern::Pattern;
use super::schema::{Clause, Field, Term, Values};

/// What policies can ask about a connection.
#[derive(Debug)]
pub(super) struct Connection<'a> {
    /// Without `spiffe://`. `None` for plaintext, as are the next two.
    pub principal: Option<&'a str>,
    pub namespace: Option<&'a str>,
    /// `namespace/account`.
    pub service_account: Option<&'a str>,
    pub source_ip: IpAddr,
    pub destination_ip: IpAddr,
    pub port: u16,
}

#[derive(Debug)]
pub(super) struct CompiledRule {
    /// Place of the rule's policy in the order of all policies.
    pub policy: u32,
    pub clauses: Vec<Clause>,
}

impl CompiledRule {
    fn matches(&self, connection: &Connection<'_>) -> bool {
        self.clauses.iter().all(|Clause(terms)| {
            terms.iter().any(|term| term.fields.iter().all(|field| field.matches(connection)))
        })
    }
}

impl Field {
    fn matches(&self, connection: &Connection<'_>) -> bool {
        match self {
            Self::Principal(values) => values.hold(|p| p.matches(connection.principal)),
            Self::Namespace(values) => values.hold(|p| p.matches(connection.namespace)),
            Self::ServiceAccount(values) => values.hold(|p| p.matches(connection.service_account)),
            Self::SourceIp(values) => values.hold(|block| block.contains(&connection.source_ip)),
            Self::DestinationIp(values) => values.hold(|block| block.contains(&connection.destination_ip)),
            Self::Port(values) => values.hold(|port| *port == connection.port),
        }
    }
}

impl<T> Values<T> {
    fn hold(&self, matches: impl Fn(&T) -> bool) -> bool {
        (self.any.is_empty() || self.any.iter().any(&matches)) && !self.none.iter().any(matches)
    }
}

/// Below this, asking every rule is as quick as an index and takes no memory.
const WORTH_AN_INDEX: usize = 16;

/// Rules of one scope and action, in the order of their policies.
#[derive(Debug, Default)]
pub(super) struct RuleSet {
    rules: Vec<CompiledRule>,
    index: Option<Box<Index>>,
}

impl RuleSet {
    pub(super) fn new(rules: Vec<CompiledRule>) -> Self {
        let index = (rules.len() > WORTH_AN_INDEX).then(|| Box::new(Index::new(&rules)));
        Self { rules, index }
    }

    /// The first policy with a matching rule.
    pub(super) fn first_match(&self, connection: &Connection<'_>) -> Option<u32> {
        let Some(index) = &self.index else {
            return self.rules.iter().find(|rule| rule.matches(connection)).map(|rule| rule.policy);
        };
        let mut first: Option<u32> = None;
        index.candidates(connection, |candidates| {
            for rule in candidates.iter().filter_map(|at| self.rules.get(*at as usize)) {
                if first.is_some_and(|policy| policy <= rule.policy) {
                    break;
                }
                if rule.matches(connection) {
                    first = Some(rule.policy);
                    break;
                }
            }
        });
        first
    }
}

/// Each rule is filed under every value of one of its clauses, the one that fewest other rules share; a rule that
/// has no such clause is a candidate for every connection.
#[derive(Debug, Default)]
struct Index {
    always: Vec<u32>,
    principals: Texts,
    namespaces: Texts,
    service_accounts: Texts,
    sources: Blocks,
    destinations: Blocks,
    ports: HashMap<u16, Vec<u32>>,
}

impl Index {
    fn new(rules: &[CompiledRule]) -> Self {
        let mut uses: HashMap<Value, usize> = HashMap::new();
        let all_terms = rules.iter().flat_map(|rule| &rule.clauses).flat_map(|Clause(terms)| terms);
        for value in all_terms.flat_map(|term| &term.fields).filter_map(Field::required).flatten() {
            *uses.entry(value).or_default() += 1;
        }
        let mut index = Self::default();
        for (at, rule) in (0..).zip(rules) {
            let cheapest = rule
                .clauses
                .iter()
                .filter_map(|Clause(terms)| {
                    let fields: Vec<_> = terms.iter().map(|t| rarest(t, &uses)).collect::<Option<_>>()?;
                    Some((fields.iter().map(|(cost, _)| cost).sum::<usize>(), fields))
                })
                .min_by_key(|(cost, _)| *cost);
            match cheapest {
                None => index.always.push(at),
                Some((_, fields)) => {
                    fields.into_iter().flat_map(|(_, values)| values).for_each(|v| index.file(v, at));
                }
            }
        }
        index
    }

    fn file(&mut self, value: Value, rule: u32) {
        let filed = match value {
            Value::Principal(pattern) => self.principals.entry(pattern),
            Value::Namespace(pattern) => self.namespaces.entry(pattern),
            Value::ServiceAccount(pattern) => self.service_accounts.entry(pattern),
            Value::Source(block) => self.sources.entry(block),
            Value::Destination(block) => self.destinations.entry(block),
            Value::Port(port) => self.ports.entry(port).or_default(),
        };
        if filed.last() != Some(&rule) {
            filed.push(rule);
        }
    }

    fn candidates(&self, connection: &Connection<'_>, mut look_at: impl FnMut(&[u32])) {
        look_at(&self.always);
        self.principals.candidates(connection.principal, &mut look_at);
        self.namespaces.candidates(connection.namespace, &mut look_at);
        self.service_accounts.candidates(connection.service_account, &mut look_at);
        self.sources.candidates(connection.source_ip, &mut look_at);
        self.destinations.candidates(connection.destination_ip, &mut look_at);
        look_at(self.ports.get(&connection.port).map_or(&[], Vec::as_slice));
    }
}

/// The field of a term whose values fewest rules share.
fn rarest(term: &Term, uses: &HashMap<Value, usize>) -> Option<(usize, Vec<Value>)> {
    term.fields
        .iter()
        .filter_map(Field::required)
        .map(|values| (values.iter().filter_map(|v| uses.get(v)).sum(), values))
        .min_by_key(|(cost, _)| *cost)
}

#[derive(PartialEq, Eq, Hash)]
enum Value {
    Principal(Pattern),
    Namespace(Pattern),
    ServiceAccount(Pattern),
    Source(IpNet),
    Destination(IpNet),
    Port(u16),
}

impl Field {
    /// The values one of which a connection must have for this field to hold. `None` if it can hold otherwise.
    fn required(&self) -> Option<Vec<Value>> {
        let required: Vec<Value> = match self {
            Self::Principal(values) => values.any.iter().cloned().map(Value::Principal).collect(),
            Self::Namespace(values) => values.any.iter().cloned().map(Value::Namespace).collect(),
            Self::ServiceAccount(values) => values.any.iter().cloned().map(Value::ServiceAccount).collect(),
            Self::SourceIp(values) => values.any.iter().copied().map(Value::Source).collect(),
            Self::DestinationIp(values) => values.any.iter().copied().map(Value::Destination).collect(),
            Self::Port(values) => values.any.iter().copied().map(Value::Port).collect(),
        };
        (!required.is_empty()).then_some(required)
    }
}

#[derive(Debug, Default)]
struct Texts {
    exact: HashMap<Arc<str>, Vec<u32>>,
    prefixes: Affixes,
    suffixes: Affixes,
}

impl Texts {
    fn entry(&mut self, pattern: Pattern) -> &mut Vec<u32> {
        match pattern {
            Pattern::Exact(text) => self.exact.entry(text).or_default(),
            Pattern::Prefix(text) => self.prefixes.entry(&text),
            Pattern::Suffix(text) => self.suffixes.entry(&text),
            // The empty prefix: any text has it.
            Pattern::Present => self.prefixes.entry(""),
        }
    }

    fn candidates(&self, value: Option<&str>, look_at: &mut impl FnMut(&[u32])) {
        let Some(value) = value else { return };
        if let Some(rules) = self.exact.get(value) {
            look_at(rules);
        }
        let bytes = value.as_bytes();
        self.prefixes.candidates(|length| bytes.get(..length), look_at);
        self.suffixes.candidates(|length| bytes.get(bytes.len().checked_sub(length)?..), look_at);
    }
}

/// Prefixes or suffixes: one look-up per length in use.
#[derive(Debug, Default)]
struct Affixes {
    lengths: Vec<usize>,
    rules: HashMap<Box<[u8]>, Vec<u32>>,
}

impl Affixes {
    fn entry(&mut self, text: &str) -> &mut Vec<u32> {
        note(&mut self.lengths, text.len());
        self.rules.entry(text.as_bytes().into()).or_default()
    }

    fn candidates<'v>(&self, cut: impl Fn(usize) -> Option<&'v [u8]>, look_at: &mut impl FnMut(&[u32])) {
        let found = self.lengths.iter().filter_map(|length| self.rules.get(cut(*length)?));
        found.for_each(|rules| look_at(rules));
    }
}

/// Address blocks: one look-up per prefix length in use.
#[derive(Debug, Default)]
struct Blocks {
    lengths: Vec<u8>,
    rules: HashMap<IpNet, Vec<u32>>,
}

impl Blocks {
    fn entry(&mut self, block: IpNet) -> &mut Vec<u32> {
        note(&mut self.lengths, block.prefix_len());
        self.rules.entry(block).or_default()
    }

    fn candidates(&self, address: IpAddr, look_at: &mut impl FnMut(&[u32])) {
        let blocks = self.lengths.iter().filter_map(|length| IpNet::new(address, *length).ok());
        blocks.filter_map(|block| self.rules.get(&block.trunc())).for_each(|rules| look_at(rules));
    }
}

fn note<T: PartialEq>(lengths: &mut Vec<T>, length: T) {
    if !lengths.contains(&length) {
        lengths.push(length);
    }
}
