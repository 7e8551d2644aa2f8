//! `AuthorizationPolicy` at L4: policies in, a decision about one connection out.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::index::{CompiledRule, Connection, RuleSet};
use super::name_of;
use super::pattern::Pattern;
use super::schema::{Action, AuthorizationPolicy, Clause, Field, Rule, Term, Values, is_dry_run};
use super::selector::{BySelector, Selectable, Selector};
use super::warning::{Problem, Warning};
use crate::mesh::Workload;

/// Every policy, compiled once per scope. A workload's policies are those of the mesh, of its namespace and of the
/// selectors that select it: all pooled, none outranks another.
#[derive(Debug, Default)]
pub(super) struct Scopes {
    mesh: Option<Scope>,
    namespaces: HashMap<String, Scope>,
    /// Selectors of root namespace policies: they select in every namespace.
    selected_anywhere: BySelector<Scope>,
    selected: HashMap<String, BySelector<Scope>>,
    /// By the policy's place in the order of all policies.
    names: Vec<Arc<str>>,
}

/// The policies of one scope.
#[derive(Debug)]
struct Scope {
    enforced: Rules,
    dry_run: Option<Rules>,
}

#[derive(Debug)]
struct Rules {
    deny: RuleSet,
    /// `None`: no ALLOW policy at all, which is not the same as one that allows nothing.
    allow: Option<RuleSet>,
}

/// What the policies say; with the policy that says so, if one does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Decision {
    Allow(Option<Arc<str>>),
    Deny(Arc<str>),
    NoAllowMatched,
}

/// The scopes that apply to one workload.
pub(super) struct Applicable<'a> {
    scopes: Vec<&'a Scope>,
    names: &'a [Arc<str>],
}

impl Scopes {
    pub(super) fn new<'a>(
        policies: impl Iterator<Item = &'a AuthorizationPolicy>,
        workloads: &Selectable<'_>,
        root_namespace: &str,
        warnings: &mut Vec<Warning>,
    ) -> Self {
        let mut by_name: Vec<_> = policies.map(|policy| (name_of(&policy.metadata), policy)).collect();
        by_name.sort_by(|a, b| a.0.cmp(&b.0));

        let mut scopes = Self::default();
        let mut drafts: BTreeMap<(Option<&str>, Option<Selector>), Draft> = BTreeMap::new();
        for (at, (name, policy)) in (0..).zip(&by_name) {
            scopes.names.push(name.clone());
            if policy.spec.target_refs {
                warnings.push(Warning::authorization(name, Problem::TargetRefs));
                continue;
            }
            let namespace = policy.metadata.namespace.as_deref().unwrap_or_default();
            let scope = Some(namespace).filter(|namespace| *namespace != root_namespace);
            let selector = policy.spec.selector.clone();
            let selects_somebody = workloads.selected(scope, selector.as_ref()).next().is_some();
            if !selects_somebody && (scope.is_some() || selector.is_some()) {
                warnings.push(Warning::authorization(name, Problem::SelectsNobody));
            }
            drafts.entry((scope, selector)).or_default().add(at, policy, name, warnings);
        }

        let mut selected_anywhere = HashMap::new();
        let mut selected: HashMap<&str, HashMap<Selector, Scope>> = HashMap::new();
        for ((namespace, selector), draft) in drafts {
            let scope = draft.compiled();
            match (namespace, selector) {
                (None, None) => scopes.mesh = Some(scope),
                (Some(namespace), None) => drop(scopes.namespaces.insert(namespace.to_owned(), scope)),
                (None, Some(selector)) => drop(selected_anywhere.insert(selector, scope)),
                (Some(namespace), Some(selector)) => {
                    selected.entry(namespace).or_default().insert(selector, scope);
                }
            }
        }
        scopes.selected_anywhere = BySelector::new(selected_anywhere);
        scopes.selected = selected.into_iter().map(|(n, s)| (n.to_owned(), BySelector::new(s))).collect();
        scopes
    }

    pub(super) fn applicable(&self, workload: &Workload) -> Applicable<'_> {
        let labels = &workload.labels;
        let here = self.selected.get(&*workload.namespace);
        let scopes = (self.mesh.iter())
            .chain(self.namespaces.get(&*workload.namespace))
            .chain(self.selected_anywhere.selecting(labels))
            .chain(here.into_iter().flat_map(|selected| selected.selecting(labels)))
            .collect();
        Applicable { scopes, names: &self.names }
    }
}

impl Applicable<'_> {
    pub(super) fn is_empty(&self) -> bool {
        self.scopes.is_empty()
    }

    pub(super) fn decide(&self, connection: &Connection<'_>) -> Decision {
        self.decision(connection, self.scopes.iter().map(|scope| &scope.enforced))
    }

    pub(super) fn has_dry_run(&self) -> bool {
        self.scopes.iter().any(|scope| scope.dry_run.is_some())
    }

    /// The decision if every dry-run policy were enforced.
    pub(super) fn decide_with_dry_run(&self, connection: &Connection<'_>) -> Decision {
        let all = self.scopes.iter().flat_map(|scope| [Some(&scope.enforced), scope.dry_run.as_ref()]);
        self.decision(connection, all.flatten())
    }

    fn decision<'r>(
        &self,
        connection: &Connection<'_>,
        rules: impl Iterator<Item = &'r Rules> + Clone,
    ) -> Decision {
        let denied = rules.clone().filter_map(|rules| rules.deny.first_match(connection)).min();
        if let Some(name) = denied.and_then(|policy| self.names.get(policy as usize)) {
            return Decision::Deny(name.clone());
        }
        let mut allows = rules.filter_map(|rules| rules.allow.as_ref()).peekable();
        if allows.peek().is_none() {
            return Decision::Allow(None);
        }
        match allows.filter_map(|allow| allow.first_match(connection)).min() {
            Some(policy) => Decision::Allow(self.names.get(policy as usize).cloned()),
            None => Decision::NoAllowMatched,
        }
    }
}

/// A scope while its policies are collected.
#[derive(Default)]
struct Draft {
    enforced: DraftRules,
    dry_run: Option<DraftRules>,
}

#[derive(Default)]
struct DraftRules {
    deny: Vec<CompiledRule>,
    allow: Option<Vec<CompiledRule>>,
}

impl Draft {
    fn add(&mut self, at: u32, policy: &AuthorizationPolicy, name: &Arc<str>, warnings: &mut Vec<Warning>) {
        let draft = match is_dry_run(&policy.metadata) {
            true => self.dry_run.get_or_insert_default(),
            false => &mut self.enforced,
        };
        let action = policy.spec.action;
        let rules = match action {
            Action::Deny => &mut draft.deny,
            Action::Allow => draft.allow.get_or_insert_default(),
        };
        if action == Action::Deny && policy.spec.rules.is_empty() {
            warnings.push(Warning::authorization(name, Problem::DenyWithoutRules));
        }
        let namespace = policy.metadata.namespace.as_deref().unwrap_or_default();
        for (number, rule) in (1..).zip(&policy.spec.rules) {
            let (clauses, problem) = at_l4(action, rule, number);
            warnings.extend(problem.map(|problem| Warning::authorization(name, problem)));
            let clauses = clauses.map(|clauses| absolute(clauses, namespace));
            rules.extend(clauses.map(|clauses| CompiledRule { policy: at, clauses }));
        }
    }

    fn compiled(self) -> Scope {
        Scope { enforced: self.enforced.compiled(), dry_run: self.dry_run.map(DraftRules::compiled) }
    }
}

impl DraftRules {
    fn compiled(self) -> Rules {
        Rules { deny: RuleSet::new(self.deny), allow: self.allow.map(RuleSet::new) }
    }
}

/// What of a rule can be enforced at L4 (`None`: nothing), and what its author should know.
fn at_l4(action: Action, rule: &Rule, number: usize) -> (Option<Vec<Clause>>, Option<Problem>) {
    let terms = || rule.clauses.iter().flat_map(|Clause(terms)| terms);
    let mut fields: Vec<&str> = terms().flat_map(|term| &term.l7).map(String::as_str).collect();
    if fields.is_empty() {
        return (Some(rule.clauses.clone()), None);
    }
    fields.dedup();
    let (rule_number, fields) = (number, fields.join(", "));
    if action == Action::Allow {
        return (None, Some(Problem::AllowRuleNeedsL7 { rule: rule_number, fields }));
    }
    if terms().all(|term| term.fields.is_empty()) {
        return (None, Some(Problem::DenyRuleOnlyL7 { rule: rule_number, fields }));
    }
    // A term that loses all its fields matches everything, and so does its whole clause.
    let judged = |Clause(terms): &&Clause| terms.iter().all(|term| !term.fields.is_empty());
    let clauses = rule.clauses.iter().filter(judged).cloned().collect();
    (Some(clauses), Some(Problem::DenyRuleWithoutL7 { rule: rule_number, fields }))
}

/// The clauses with service accounts written in full.
fn absolute(clauses: Vec<Clause>, namespace: &str) -> Vec<Clause> {
    let in_full = |patterns: Vec<Pattern>| patterns.iter().map(|p| p.in_namespace(namespace)).collect();
    let field = |field| match field {
        Field::ServiceAccount(values) => {
            Field::ServiceAccount(Values { any: in_full(values.any), none: in_full(values.none) })
        }
        other => other,
    };
    let term = |term: Term| Term { fields: term.fields.into_iter().map(field).collect(), l7: Vec::new() };
    clauses.into_iter().map(|Clause(terms)| Clause(terms.into_iter().map(term).collect())).collect()
}
