//! Why a policy is refused.

/// A value that no policy can have. The fault is always the manifest's; who reads the manifest adds file, object
/// and field.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Invalid {
    #[error("empty text; write a value, or `*` for any")]
    EmptyValue,
    #[error("`*` stands only first or last in a value, or alone; {text:?} could never match")]
    Wildcard { text: String },
    #[error(
        "principals are written without `spiffe://`, as in cluster.local/ns/shop/sa/web; this is {text:?}"
    )]
    PrincipalScheme { text: String },
    #[error(
        "{text:?} is no service account; write `account` (in the policy's namespace), `namespace/account`, \
         `namespace/*` or `*/account`"
    )]
    ServiceAccount { text: String },
    #[error("{text:?} is neither an IP address nor a CIDR block such as 10.0.0.0/8")]
    IpBlock { text: String },
    #[error("{text:?} is no port; write a number from 1 to 65535")]
    Port { text: String },
    #[error("`{label}`: a selector compares labels exactly; `*` isn't allowed")]
    LabelWildcard { label: String },
    #[error(
        "portLevelMtls needs a selector: ports belong to pods; add selector.matchLabels, or use mtls.mode for the \
         whole namespace"
    )]
    PortLevelWithoutSelector,
    #[error("action {action} isn't supported; this mesh enforces ALLOW and DENY")]
    UnsupportedAction { action: String },
    #[error("unknown action {action:?}; write ALLOW or DENY")]
    UnknownAction { action: String },
    #[error("`{field}` is an empty list; remove it to match everything, or add an entry")]
    EmptyList { field: &'static str },
    #[error("`{field}` has no fields and would match everything; remove it, or say what it must match")]
    EmptyTerm { field: &'static str },
    #[error("the condition on {key} has neither values nor notValues; add one of them")]
    EmptyCondition { key: String },
    #[error(
        "unknown condition key {key:?}; at L4 there are source.ip, source.namespace, source.principal, \
         source.serviceAccount, destination.ip and destination.port"
    )]
    UnknownKey { key: String },
    #[error("annotation istio.io/dry-run is {value:?}; write \"true\" or \"false\"")]
    DryRun { value: String },
}
