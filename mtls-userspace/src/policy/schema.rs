//! `PeerAuthentication` and `AuthorizationPolicy` of `security.istio.io` as people write them: YAML or JSON in, a
//! checked policy out. What cannot be meant is refused here, with the field's name; nothing is decided here.

use std::collections::BTreeMap;

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::pattern::{self, Pattern};
use super::selector::{Selector, WrittenSelector};
use super::{Invalid, Mode};

/// Annotation that makes a policy be evaluated and reported, never enforced.
const DRY_RUN: &str = "istio.io/dry-run";

#[derive(Clone, Debug, Deserialize)]
#[serde(from = "Written<PeerAuthenticationSpec>")]
pub struct PeerAuthentication {
    pub metadata: ObjectMeta,
    pub spec: PeerAuthenticationSpec,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(try_from = "WrittenPeerAuthenticationSpec")]
pub struct PeerAuthenticationSpec {
    pub selector: Option<Selector>,
    /// `None` is UNSET: inherit.
    pub mode: Option<Mode>,
    /// By the pod's port. `None` inherits the workload's mode.
    pub ports: BTreeMap<u16, Option<Mode>>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(from = "Written<AuthorizationPolicySpec>")]
pub struct AuthorizationPolicy {
    pub metadata: ObjectMeta,
    pub spec: AuthorizationPolicySpec,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(try_from = "WrittenAuthorizationPolicySpec")]
pub struct AuthorizationPolicySpec {
    pub selector: Option<Selector>,
    /// Attached to a gateway, waypoint or Service instead of workloads: nothing for L4 to enforce.
    pub target_refs: bool,
    pub action: Action,
    pub rules: Vec<Rule>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Action {
    #[default]
    Allow,
    Deny,
}

/// A rule matches if every clause does. Without clauses it matches everything.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "WrittenRule")]
pub struct Rule {
    pub clauses: Vec<Clause>,
}

/// A whole `from`, a whole `to`, or one `when`: matches if any term does. Never empty.
#[derive(Clone, Debug)]
pub struct Clause(pub Vec<Term>);

/// One `source`, one `operation` or one condition: matches if all fields do.
#[derive(Clone, Debug, Default)]
pub struct Term {
    pub fields: Vec<Field>,
    /// Fields that only an HTTP proxy could judge.
    pub l7: Vec<String>,
}

#[derive(Clone, Debug)]
pub enum Field {
    Principal(Values<Pattern>),
    Namespace(Values<Pattern>),
    /// Over `namespace/account`; still relative to the policy's namespace.
    ServiceAccount(Values<Pattern>),
    SourceIp(Values<IpNet>),
    DestinationIp(Values<IpNet>),
    Port(Values<u16>),
}

/// Holds if any of `any` matches (or `any` is empty) and none of `none` does.
#[derive(Clone, Debug)]
pub struct Values<T> {
    pub any: Vec<T>,
    pub none: Vec<T>,
}

pub(super) fn is_dry_run(metadata: &ObjectMeta) -> bool {
    metadata.annotations.as_ref().and_then(|a| a.get(DRY_RUN)).is_some_and(|value| value == "true")
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", bound(deserialize = "S: Deserialize<'de>"))]
struct Written<S> {
    #[serde(rename = "apiVersion")]
    _api_version: IgnoredAny,
    #[serde(rename = "kind")]
    _kind: IgnoredAny,
    #[serde(deserialize_with = "metadata")]
    metadata: ObjectMeta,
    spec: Option<S>,
    #[serde(rename = "status")]
    _status: Option<IgnoredAny>,
}

impl From<Written<PeerAuthenticationSpec>> for PeerAuthentication {
    fn from(written: Written<PeerAuthenticationSpec>) -> Self {
        Self { metadata: written.metadata, spec: written.spec.unwrap_or_default() }
    }
}

impl From<Written<AuthorizationPolicySpec>> for AuthorizationPolicy {
    fn from(written: Written<AuthorizationPolicySpec>) -> Self {
        Self { metadata: written.metadata, spec: written.spec.unwrap_or_default() }
    }
}

/// Only as much of it as is ever asked for. A misspelt value must not turn a trial into enforcement, nor an enforced
/// policy into a trial.
fn metadata<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<ObjectMeta, D::Error> {
    let ObjectMeta { name, namespace, creation_timestamp, annotations, .. } =
        ObjectMeta::deserialize(deserializer)?;
    let dry_run = annotations.and_then(|mut annotations| annotations.remove_entry(DRY_RUN));
    match dry_run.as_ref().map(|(_, value)| value.as_str()) {
        None | Some("true" | "false") => {}
        Some(value) => return Err(serde::de::Error::custom(Invalid::DryRun { value: value.into() })),
    }
    let annotations = dry_run.map(|entry| BTreeMap::from([entry]));
    Ok(ObjectMeta { name, namespace, creation_timestamp, annotations, ..ObjectMeta::default() })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct WrittenPeerAuthenticationSpec {
    selector: Option<WrittenSelector>,
    mtls: Option<WrittenMtls>,
    port_level_mtls: Option<BTreeMap<WrittenPort, WrittenMtls>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenMtls {
    mode: Option<WrittenMode>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum WrittenMode {
    Unset,
    Disable,
    Permissive,
    Strict,
}

impl WrittenMtls {
    fn mode(&self) -> Option<Mode> {
        match self.mode? {
            WrittenMode::Unset => None,
            WrittenMode::Disable => Some(Mode::Disable),
            WrittenMode::Permissive => Some(Mode::Permissive),
            WrittenMode::Strict => Some(Mode::Strict),
        }
    }
}

/// YAML writes a port as a map key either as a number or as text.
#[derive(PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "NumberOrText")]
struct WrittenPort(u16);

#[derive(Deserialize)]
#[serde(untagged)]
enum NumberOrText {
    Number(u64),
    Text(String),
}

impl TryFrom<NumberOrText> for WrittenPort {
    type Error = Invalid;

    fn try_from(written: NumberOrText) -> Result<Self, Invalid> {
        match written {
            NumberOrText::Number(number) => pattern::port(&number.to_string()).map(Self),
            NumberOrText::Text(text) => pattern::port(&text).map(Self),
        }
    }
}

impl TryFrom<WrittenPeerAuthenticationSpec> for PeerAuthenticationSpec {
    type Error = Invalid;

    fn try_from(written: WrittenPeerAuthenticationSpec) -> Result<Self, Invalid> {
        let selector = written.selector.map(WrittenSelector::checked).transpose()?.flatten();
        let ports: BTreeMap<u16, Option<Mode>> = written
            .port_level_mtls
            .unwrap_or_default()
            .into_iter()
            .map(|(port, mtls)| (port.0, mtls.mode()))
            .collect();
        if selector.is_none() && !ports.is_empty() {
            return Err(Invalid::PortLevelWithoutSelector);
        }
        Ok(Self { selector, mode: written.mtls.and_then(|m| m.mode()), ports })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct WrittenAuthorizationPolicySpec {
    selector: Option<WrittenSelector>,
    target_ref: Option<IgnoredAny>,
    target_refs: Option<Vec<IgnoredAny>>,
    action: Option<String>,
    #[serde(rename = "provider")]
    _provider: Option<IgnoredAny>,
    rules: Option<Vec<Rule>>,
}

impl TryFrom<WrittenAuthorizationPolicySpec> for AuthorizationPolicySpec {
    type Error = Invalid;

    fn try_from(written: WrittenAuthorizationPolicySpec) -> Result<Self, Invalid> {
        let action = match written.action.as_deref() {
            None | Some("ALLOW") => Action::Allow,
            Some("DENY") => Action::Deny,
            Some(action @ ("AUDIT" | "CUSTOM")) => {
                return Err(Invalid::UnsupportedAction { action: action.into() });
            }
            Some(action) => return Err(Invalid::UnknownAction { action: action.into() }),
        };
        Ok(Self {
            selector: written.selector.map(WrittenSelector::checked).transpose()?.flatten(),
            target_refs: written.target_ref.is_some()
                || written.target_refs.is_some_and(|refs| !refs.is_empty()),
            action,
            rules: written.rules.unwrap_or_default(),
        })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenRule {
    from: Option<Vec<WrittenFrom>>,
    to: Option<Vec<WrittenTo>>,
    when: Option<Vec<Term>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenFrom {
    #[serde(deserialize_with = "source")]
    source: Term,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenTo {
    #[serde(deserialize_with = "operation")]
    operation: Term,
}

impl TryFrom<WrittenRule> for Rule {
    type Error = Invalid;

    fn try_from(written: WrittenRule) -> Result<Self, Invalid> {
        let from = written.from.map(|from| from.into_iter().map(|f| f.source).collect::<Vec<_>>());
        let to = written.to.map(|to| to.into_iter().map(|t| t.operation).collect::<Vec<_>>());
        let mut clauses = Vec::new();
        for (field, terms) in [("from", from), ("to", to)] {
            match terms {
                None => {}
                Some(terms) if terms.is_empty() => return Err(Invalid::EmptyList { field }),
                Some(terms) => clauses.push(Clause(terms)),
            }
        }
        clauses.extend(written.when.unwrap_or_default().into_iter().map(|term| Clause(vec![term])));
        clauses.shrink_to_fit();
        Ok(Self { clauses })
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct WrittenSource {
    principals: Option<Vec<Principal>>,
    not_principals: Option<Vec<Principal>>,
    namespaces: Option<Vec<Pattern>>,
    not_namespaces: Option<Vec<Pattern>>,
    service_accounts: Option<Vec<ServiceAccount>>,
    not_service_accounts: Option<Vec<ServiceAccount>>,
    ip_blocks: Option<Vec<IpBlock>>,
    not_ip_blocks: Option<Vec<IpBlock>>,
    request_principals: Option<Vec<String>>,
    not_request_principals: Option<Vec<String>>,
    remote_ip_blocks: Option<Vec<String>>,
    not_remote_ip_blocks: Option<Vec<String>>,
}

fn source<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Term, D::Error> {
    let written = WrittenSource::deserialize(deserializer)?;
    let mut term = Term::default();
    term.field(Field::Principal, written.principals, written.not_principals);
    term.field(Field::Namespace, written.namespaces, written.not_namespaces);
    term.field(Field::ServiceAccount, written.service_accounts, written.not_service_accounts);
    term.field(Field::SourceIp, written.ip_blocks, written.not_ip_blocks);
    term.l7("requestPrincipals", written.request_principals);
    term.l7("notRequestPrincipals", written.not_request_principals);
    term.l7("remoteIpBlocks", written.remote_ip_blocks);
    term.l7("notRemoteIpBlocks", written.not_remote_ip_blocks);
    term.not_empty("source").map_err(serde::de::Error::custom)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct WrittenOperation {
    ports: Option<Vec<Port>>,
    not_ports: Option<Vec<Port>>,
    hosts: Option<Vec<String>>,
    not_hosts: Option<Vec<String>>,
    methods: Option<Vec<String>>,
    not_methods: Option<Vec<String>>,
    paths: Option<Vec<String>>,
    not_paths: Option<Vec<String>>,
}

fn operation<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Term, D::Error> {
    let written = WrittenOperation::deserialize(deserializer)?;
    let mut term = Term::default();
    term.field(Field::Port, written.ports, written.not_ports);
    term.l7("hosts", written.hosts);
    term.l7("notHosts", written.not_hosts);
    term.l7("methods", written.methods);
    term.l7("notMethods", written.not_methods);
    term.l7("paths", written.paths);
    term.l7("notPaths", written.not_paths);
    term.not_empty("operation").map_err(serde::de::Error::custom)
}

impl Term {
    fn field<W: Into<T>, T>(
        &mut self,
        field: fn(Values<T>) -> Field,
        any: Option<Vec<W>>,
        none: Option<Vec<W>>,
    ) {
        let plain =
            |written: Option<Vec<W>>| written.unwrap_or_default().into_iter().map(Into::into).collect();
        let values = Values { any: plain(any), none: plain(none) };
        if !values.any.is_empty() || !values.none.is_empty() {
            self.fields.push(field(values));
        }
    }

    fn l7(&mut self, name: &str, values: Option<Vec<String>>) {
        if values.is_some_and(|v| !v.is_empty()) {
            self.l7.push(name.to_owned());
        }
    }

    /// An empty source would match everybody; nobody writes that and means it.
    fn not_empty(mut self, field: &'static str) -> Result<Self, Invalid> {
        self.fields.shrink_to_fit();
        if self.fields.is_empty() && self.l7.is_empty() {
            Err(Invalid::EmptyTerm { field })
        } else {
            Ok(self)
        }
    }
}

macro_rules! checked {
    ($($name:ident($inner:ty) = $check:path),* $(,)?) => {$(
        #[derive(Deserialize)]
        #[serde(try_from = "String")]
        struct $name($inner);

        impl TryFrom<String> for $name {
            type Error = Invalid;

            fn try_from(text: String) -> Result<Self, Invalid> {
                $check(&text).map(Self)
            }
        }

        impl From<$name> for $inner {
            fn from(checked: $name) -> $inner {
                checked.0
            }
        }
    )*};
}

checked! {
    Principal(Pattern) = pattern::principal,
    ServiceAccount(Pattern) = pattern::service_account,
    IpBlock(IpNet) = pattern::ip_block,
    Port(u16) = pattern::port,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct WrittenCondition {
    key: String,
    values: Option<Vec<String>>,
    not_values: Option<Vec<String>>,
}

impl<'de> Deserialize<'de> for Term {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        WrittenCondition::deserialize(deserializer)?.checked().map_err(serde::de::Error::custom)
    }
}

impl WrittenCondition {
    fn checked(self) -> Result<Term, Invalid> {
        let (any, none) = (self.values.unwrap_or_default(), self.not_values.unwrap_or_default());
        if any.is_empty() && none.is_empty() {
            return Err(Invalid::EmptyCondition { key: self.key });
        }
        fn all<T>(
            check: fn(&str) -> Result<T, Invalid>,
            (any, none): (Vec<String>, Vec<String>),
        ) -> Result<Values<T>, Invalid> {
            let checked = |texts: Vec<String>| texts.iter().map(|t| check(t)).collect::<Result<_, _>>();
            Ok(Values { any: checked(any)?, none: checked(none)? })
        }
        let values = (any, none);
        let field = match self.key.as_str() {
            "source.ip" => Field::SourceIp(all(pattern::ip_block, values)?),
            "source.namespace" => Field::Namespace(all(str::parse, values)?),
            "source.principal" => Field::Principal(all(pattern::principal, values)?),
            "source.serviceAccount" => Field::ServiceAccount(all(pattern::service_account, values)?),
            "destination.ip" => Field::DestinationIp(all(pattern::ip_block, values)?),
            "destination.port" => Field::Port(all(pattern::port, values)?),
            key if is_l7_key(key) => return Ok(Term { fields: Vec::new(), l7: vec![self.key] }),
            _ => return Err(Invalid::UnknownKey { key: self.key }),
        };
        Ok(Term { fields: vec![field], l7: Vec::new() })
    }
}

/// The keys of Istio's conditions that only an HTTP proxy can judge. `connection.sni` is among them: connections in
/// this mesh carry none.
fn is_l7_key(key: &str) -> bool {
    ["request.headers[", "request.auth.", "experimental."].iter().any(|prefix| key.starts_with(prefix))
        || ["remote.ip", "connection.sni"].contains(&key)
}
