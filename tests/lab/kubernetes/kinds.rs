//! The kinds the server knows: where they stand in the API, and whether they live in namespaces.

/// A kind. The versions of a group serve the same objects.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) struct Kind {
    pub group: &'static str,
    pub versions: &'static [&'static str],
    pub plural: &'static str,
    pub kind: &'static str,
    pub namespaced: bool,
    /// Whether `status` is written by itself, as controllers do.
    pub has_status: bool,
}

const fn kind(
    group: &'static str,
    versions: &'static [&'static str],
    plural: &'static str,
    kind: &'static str,
    namespaced: bool,
    has_status: bool,
) -> Kind {
    Kind { group, versions, plural, kind, namespaced, has_status }
}

pub(super) const KINDS: &[Kind] = &[
    kind("", &["v1"], "namespaces", "Namespace", false, true),
    kind("", &["v1"], "nodes", "Node", false, true),
    kind("", &["v1"], "pods", "Pod", true, true),
    kind("", &["v1"], "services", "Service", true, true),
    kind("", &["v1"], "secrets", "Secret", true, false),
    kind("", &["v1"], "configmaps", "ConfigMap", true, false),
    kind("discovery.k8s.io", &["v1"], "endpointslices", "EndpointSlice", true, false),
    kind("security.istio.io", &["v1", "v1beta1"], "peerauthentications", "PeerAuthentication", true, true),
    kind("security.istio.io", &["v1", "v1beta1"], "authorizationpolicies", "AuthorizationPolicy", true, true),
    kind(
        "certificates.k8s.io",
        &["v1"],
        "certificatesigningrequests",
        "CertificateSigningRequest",
        false,
        true,
    ),
    kind(
        "certificates.k8s.io",
        &["v1beta1", "v1alpha1"],
        "clustertrustbundles",
        "ClusterTrustBundle",
        false,
        false,
    ),
    kind("authentication.k8s.io", &["v1"], "tokenreviews", "TokenReview", false, false),
    kind(
        "admissionregistration.k8s.io",
        &["v1"],
        "validatingwebhookconfigurations",
        "ValidatingWebhookConfiguration",
        false,
        false,
    ),
    kind(
        "admissionregistration.k8s.io",
        &["v1"],
        "mutatingwebhookconfigurations",
        "MutatingWebhookConfiguration",
        false,
        false,
    ),
    kind(
        "apiextensions.k8s.io",
        &["v1"],
        "customresourcedefinitions",
        "CustomResourceDefinition",
        false,
        true,
    ),
    kind("apiregistration.k8s.io", &["v1"], "apiservices", "APIService", false, true),
];

impl Kind {
    pub(super) fn by_name(api_version: &str, name: &str) -> Option<&'static Self> {
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        KINDS.iter().find(|it| it.group == group && it.kind == name && it.versions.contains(&version))
    }

    pub(super) fn at(group: &str, version: &str, plural: &str) -> Option<&'static Self> {
        KINDS.iter().find(|it| it.group == group && it.plural == plural && it.versions.contains(&version))
    }

    /// `pods`, `endpointslices.discovery.k8s.io`.
    pub(super) fn full_name(&self) -> String {
        if self.group.is_empty() { self.plural.into() } else { format!("{}.{}", self.plural, self.group) }
    }

    /// `v1`, `discovery.k8s.io/v1`: in what version objects are kept.
    pub(super) fn api_version(&self) -> String {
        self.in_version(self.versions.first().copied().unwrap_or_default())
    }

    pub(super) fn in_version(&self, version: &str) -> String {
        if self.group.is_empty() { version.into() } else { format!("{}/{version}", self.group) }
    }
}
