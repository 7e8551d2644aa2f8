//! Who may do what: bearer tokens and RBAC rules in, users and decisions out; and the server's own certificate.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::Result;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};
use rustls::pki_types::PrivateKeyDer;
use serde_json::{Value, json};
use tokio_rustls::TlsAcceptor;

/// Somebody with a token.
#[derive(Clone, Debug, Default)]
pub struct User {
    /// As in `system:serviceaccount:mtls-system:agent`.
    pub name: String,
    pub token: String,
    pub rules: Vec<Rule>,
    /// For whom the token is; empty means the API server itself.
    pub audiences: Vec<String>,
    /// What the token says besides, as `authentication.kubernetes.io/pod-name`.
    pub extra: Vec<(String, String)>,
}

/// One permission. `*` stands for all.
#[derive(Clone, Debug)]
pub struct Rule {
    pub verbs: &'static [&'static str],
    /// With its group, and its subresource if it is for that: `pods`, `certificatesigningrequests.certificates.k8s.io/approval`.
    pub resource: &'static str,
    /// `None`: everywhere.
    pub namespace: Option<&'static str>,
}

impl Rule {
    pub fn new(verbs: &'static [&'static str], resource: &'static str) -> Self {
        Self { verbs, resource, namespace: None }
    }

    pub fn within(self, namespace: &'static str) -> Self {
        Self { namespace: Some(namespace), ..self }
    }

    /// Everything.
    pub fn all() -> Vec<Self> {
        vec![Self::new(&["*"], "*")]
    }
}

#[derive(Debug, Default)]
pub(super) struct Access {
    /// By token.
    users: HashMap<String, User>,
}

/// A request, as RBAC sees it.
#[derive(Debug)]
pub(super) struct Attempt<'a> {
    pub verb: &'a str,
    pub resource: &'a str,
    pub namespace: &'a str,
}

impl Access {
    pub(super) fn add(&mut self, mut user: User) -> String {
        if user.token.is_empty() {
            user.token = format!("token-{}-{}", self.users.len(), user.name.replace(':', "-"));
        }
        let token = user.token.clone();
        self.users.insert(token.clone(), user);
        token
    }

    pub(super) fn rules(&mut self, name: &str, rules: Vec<Rule>) {
        for user in self.users.values_mut().filter(|user| user.name == name) {
            user.rules = rules.clone();
        }
    }

    pub(super) fn revoke(&mut self, token: &str) {
        self.users.remove(token);
    }

    /// Whoever may call the API server with this token.
    pub(super) fn caller(&self, token: &str) -> Option<&User> {
        self.users.get(token).filter(|user| user.audiences.is_empty())
    }

    /// The status of a TokenReview: a token counts if it is for one of the audiences asked about.
    pub(super) fn review(&self, spec: &Value) -> Value {
        let asked: Vec<&str> =
            spec["audiences"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let default = || vec!["https://kubernetes.default.svc".to_owned()];
        let asked: Vec<String> =
            if asked.is_empty() { default() } else { asked.into_iter().map(str::to_owned).collect() };
        let Some(user) = self.users.get(spec["token"].as_str().unwrap_or_default()) else {
            return json!({ "authenticated": false, "error": "[invalid bearer token]", "user": {} });
        };
        let of_token = if user.audiences.is_empty() { default() } else { user.audiences.clone() };
        let common: Vec<_> = of_token.into_iter().filter(|audience| asked.contains(audience)).collect();
        if common.is_empty() {
            let error =
                format!("token audiences {:?} is invalid for the target audiences {asked:?}", user.audiences);
            return json!({ "authenticated": false, "error": error, "user": {} });
        }
        let extra: serde_json::Map<String, Value> =
            user.extra.iter().map(|(key, value)| (key.clone(), json!([value]))).collect();
        json!({
            "authenticated": true, "audiences": common,
            "user": {
                "username": user.name, "uid": format!("uid-of-{}", user.name),
                "groups": ["system:serviceaccounts", "system:authenticated"], "extra": extra,
            },
        })
    }
}

impl User {
    pub(super) fn may(&self, attempt: &Attempt<'_>) -> bool {
        let has = |list: &[&str], wanted: &str| list.contains(&"*") || list.contains(&wanted);
        self.rules.iter().any(|rule| {
            has(rule.verbs, attempt.verb)
                && (rule.resource == "*" || rule.resource == attempt.resource)
                && rule.namespace.is_none_or(|namespace| namespace == attempt.namespace)
        })
    }
}

/// A certificate for an address from an authority of its own, and that authority.
pub(super) fn tls(address: IpAddr) -> Result<(TlsAcceptor, String)> {
    let mut authority = CertificateParams::default();
    authority.distinguished_name.push(DnType::CommonName, "the test cluster's authority");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority_key = KeyPair::generate()?;
    let ca = authority.self_signed(&authority_key)?.pem();
    let issuer = Issuer::new(authority, authority_key);
    let mut leaf = CertificateParams::default();
    leaf.subject_alt_names = vec![SanType::IpAddress(address)];
    let key = KeyPair::generate()?;
    let certificate = leaf.signed_by(&key, &issuer)?;
    let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok((TlsAcceptor::from(Arc::new(config)), ca))
}
