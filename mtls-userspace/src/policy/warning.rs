//! What a policy does not do although its author may think so.

use std::fmt;
use std::sync::Arc;

/// A remark on one policy that is in force nonetheless.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Warning {
    /// `PeerAuthentication` or `AuthorizationPolicy`.
    pub kind: &'static str,
    /// `namespace/name`.
    pub policy: Arc<str>,
    pub problem: Problem,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum Problem {
    #[error(
        "has a selector in the root namespace and is ignored; move it to the namespace of the pods it means, or \
         remove the selector to make it the mesh's default"
    )]
    SelectorInRootNamespace,
    #[error("is without effect: {by} has the same scope and is older (or comes first by name); remove one")]
    Shadowed { by: Arc<str> },
    #[error("selects no enrolled pod; compare its selector and namespace with the pods' labels")]
    SelectsNobody,
    #[error(
        "sets a mode for port {port}, which no container of the selected pods declares; ports here are the pod's, \
         not the Service's"
    )]
    UndeclaredPort { port: u16 },
    #[error(
        "rule {rule} never allows anything: {fields} can only be judged at L7, and this mesh works at L4"
    )]
    AllowRuleNeedsL7 { rule: usize, fields: String },
    #[error(
        "rule {rule} denies more than it says: {fields} can only be judged at L7, so the rule is enforced without \
         that part"
    )]
    DenyRuleWithoutL7 { rule: usize, fields: String },
    #[error(
        "rule {rule} denies nothing: it consists only of {fields}, which can only be judged at L7; deny by \
         principals, namespaces, ipBlocks or ports instead"
    )]
    DenyRuleOnlyL7 { rule: usize, fields: String },
    #[error("denies nothing: it has no rules; `rules: [{{}}]` denies everything")]
    DenyWithoutRules,
    #[error(
        "has targetRefs and is not enforced: this mesh has no gateways or waypoints; use a selector to protect pods"
    )]
    TargetRefs,
}

impl Problem {
    /// The field of the policy that the remark is about.
    pub fn field(&self) -> String {
        match self {
            Self::SelectorInRootNamespace | Self::SelectsNobody => "spec.selector".to_owned(),
            Self::Shadowed { .. } => "spec".to_owned(),
            Self::UndeclaredPort { port } => format!("spec.portLevelMtls.{port}"),
            Self::AllowRuleNeedsL7 { rule, .. }
            | Self::DenyRuleWithoutL7 { rule, .. }
            | Self::DenyRuleOnlyL7 { rule, .. } => format!("spec.rules[{}]", rule.saturating_sub(1)),
            Self::DenyWithoutRules => "spec.rules".to_owned(),
            Self::TargetRefs => "spec.targetRefs".to_owned(),
        }
    }

    /// Whether the policy does nothing at all.
    pub fn ignores_policy(&self) -> bool {
        matches!(self, Self::SelectorInRootNamespace | Self::Shadowed { .. } | Self::TargetRefs)
    }

    /// Whether it would be wrong if a pod or namespace were missing from the view.
    pub fn depends_on_pods(&self) -> bool {
        matches!(self, Self::SelectsNobody | Self::UndeclaredPort { .. })
    }
}

impl Warning {
    pub(super) fn peer_authentication(policy: &Arc<str>, problem: Problem) -> Self {
        Self { kind: "PeerAuthentication", policy: policy.clone(), problem }
    }

    pub(super) fn authorization(policy: &Arc<str>, problem: Problem) -> Self {
        Self { kind: "AuthorizationPolicy", policy: policy.clone(), problem }
    }

    /// Whether the policy protects less than it says.
    pub fn is_error(&self) -> bool {
        matches!(self.problem, Problem::DenyRuleOnlyL7 { .. } | Problem::TargetRefs)
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.kind, self.policy, self.problem)
    }
}
