//! Where identities come from: flags in, exactly one place out.

use std::path::PathBuf;

use super::{Mistakes, Options};
use crate::identity::Credential;

/// Where workloads' identities come from.
#[derive(Debug, PartialEq, Eq)]
pub enum IdentitySource {
    /// An authority that signs for keys made here.
    Authority { address: String, root: PathBuf, credential: Credential },
    /// Whoever signs the Kubernetes API's signing requests that carry this name.
    Signer { name: String, root: PathBuf, kubeconfig: Option<PathBuf> },
    /// A SPIFFE Workload API that hands out keys and certificates.
    WorkloadApi { socket: String },
}

impl Options {
    /// From exactly one place, with all that this place needs and nothing of the other.
    pub(super) fn identities(&self, mistakes: &mut Mistakes) -> Option<IdentitySource> {
        let Some(socket) = &self.spiffe_socket else { return self.authority(mistakes) };
        let before = mistakes.0.len();
        for (flag, given) in [
            ("ca-address", self.ca_address.is_some()),
            ("ca-signer", self.ca_signer.is_some()),
            ("ca-root", self.ca_root.is_some()),
            ("ca-token-file", self.ca_token_file.is_some()),
            ("ca-node-cert", self.ca_node_cert.is_some()),
            ("ca-node-key", self.ca_node_key.is_some()),
            ("certificate-lifetime", self.certificate_lifetime.is_some()),
        ] {
            if given {
                mistakes.0.push(format!(
                    "--{flag} is for a certificate authority, and --spiffe-socket takes identities from elsewhere: \
                     leave one of them out"
                ));
            }
        }
        (mistakes.0.len() == before).then(|| IdentitySource::WorkloadApi { socket: socket.clone() })
    }

    fn authority(&self, mistakes: &mut Mistakes) -> Option<IdentitySource> {
        if let Some(name) = &self.ca_signer {
            return self.signer(name, mistakes);
        }
        let address = self.ca_address.clone();
        if address.is_none() {
            mistakes.0.push("--ca-address is missing, or --spiffe-socket instead".into());
        }
        let root = mistakes.required("ca-root", self.ca_root.clone());
        if address.as_ref().is_some_and(|address| !address.starts_with("https://")) {
            mistakes.0.push(
                "--ca-address must start with https://: certificates are never asked for in the clear".into(),
            );
        }
        let credential = match (&self.ca_token_file, &self.ca_node_cert) {
            (Some(token), None) => Some(Credential::Token(token.clone())),
            (None, Some(certificate)) => {
                let key = self.ca_node_key.as_ref().unwrap_or(certificate).clone();
                Some(Credential::Certificate { certificate: certificate.clone(), key })
            }
            (token, _) => {
                let are = if token.is_some() { "both given" } else { "both missing" };
                mistakes.0.push(format!(
                    "--ca-token-file and --ca-node-cert are {are}: one of them proves this node to the authority"
                ));
                None
            }
        };
        if self.ca_node_key.is_some() && !matches!(credential, Some(Credential::Certificate { .. })) {
            mistakes.0.push("--ca-node-key is of no use without --ca-node-cert".into());
        }
        Some(IdentitySource::Authority { address: address?, root: root?, credential: credential? })
    }

    fn signer(&self, name: &str, mistakes: &mut Mistakes) -> Option<IdentitySource> {
        for (flag, given) in [
            ("ca-address", self.ca_address.is_some()),
            ("ca-token-file", self.ca_token_file.is_some()),
            ("ca-node-cert", self.ca_node_cert.is_some()),
        ] {
            if given {
                mistakes.0.push(format!(
                    "--{flag} is for a certificate authority, and --ca-signer asks the Kubernetes API: leave one of them out"
                ));
            }
        }
        let root = mistakes.required("ca-root", self.ca_root.clone())?;
        Some(IdentitySource::Signer { name: name.into(), root, kubeconfig: self.kubeconfig.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::complete;
    use super::*;

    #[test]
    fn a_node_proves_itself_in_exactly_one_way() {
        let certificate = || Some(PathBuf::from("/node.pem"));
        let with = |options: Options| {
            options.validate().map(|config| match config.identities {
                IdentitySource::Authority { credential, .. } => credential,
                other => panic!("{other:?}"),
            })
        };
        let alone = || Options { ca_token_file: None, ca_node_cert: certificate(), ..complete() };
        let expected =
            |key: &str| Credential::Certificate { certificate: "/node.pem".into(), key: key.into() };
        assert_eq!(with(alone()).unwrap(), expected("/node.pem"));
        assert_eq!(with(Options { ca_node_key: Some("/k".into()), ..alone() }).unwrap(), expected("/k"));
        assert_eq!(with(complete()).unwrap(), Credential::Token("/t".into()));
        for (wrong, expected) in [
            (Options { ca_node_cert: certificate(), ..complete() }, "both given"),
            (Options { ca_token_file: None, ..complete() }, "both missing"),
            (Options { ca_node_key: certificate(), ..complete() }, "--ca-node-key"),
        ] {
            let error = with(wrong).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn identities_come_from_exactly_one_place() {
        let socket = || Some("unix:///run/spire/agent.sock".to_owned());
        let alone = || Options {
            node: Some("a".into()),
            manifests: Some("/m".into()),
            spiffe_socket: socket(),
            ..Options::default()
        };
        let config = alone().validate().unwrap();
        assert_eq!(config.identities, IdentitySource::WorkloadApi { socket: socket().unwrap() });
        let both = Options { spiffe_socket: socket(), certificate_lifetime: Some(1), ..complete() };
        let error = both.validate().unwrap_err().to_string();
        for flag in ["--ca-address", "--ca-root", "--ca-token-file", "--certificate-lifetime"] {
            assert!(error.contains(&format!("{flag} is for a certificate authority")), "{error}");
        }
        let neither = Options { spiffe_socket: None, ..alone() }.validate().unwrap_err().to_string();
        assert!(neither.contains("--ca-address is missing, or --spiffe-socket"), "{neither}");
    }

    #[test]
    fn a_signer_needs_no_address_and_no_token() {
        let alone = || Options {
            ca_signer: Some("example.org/mesh".into()),
            ca_address: None,
            ca_token_file: None,
            ..complete()
        };
        let expected =
            IdentitySource::Signer { name: "example.org/mesh".into(), root: "/r".into(), kubeconfig: None };
        assert_eq!(alone().validate().unwrap().identities, expected);
        let error = Options { ca_token_file: Some("/t".into()), ..alone() }.validate().unwrap_err();
        assert!(error.to_string().contains("--ca-signer asks the Kubernetes API"), "{error}");
    }
}
