//! Node certificates: a client certificate of the TLS handshake in, the node that it names out.
//!
//! The subject is what every kubelet's has: `O=system:nodes, CN=system:node:<node name>`. So a cluster's own
//! certificates serve as they are, and outside a cluster any authority that the operator trusts can make them.

use std::fmt;
use std::path::Path;

use rustls_pki_types::{CertificateDer, TrustAnchor, UnixTime};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::followed::Followed;
use super::{Caller, Callers, Proof, Unidentified};
use crate::ca::Error;
use crate::identity::{InvalidCertificate, pem_certificates};

const ORGANIZATION: &str = "system:nodes";
const NAME: &str = "system:node:";

/// Nodes known by certificates that lead to one of the authorities in a PEM file, which is followed.
pub struct NodeCertificates(Followed<NodeCa>);

struct NodeCa {
    anchors: Vec<TrustAnchor<'static>>,
}

impl NodeCertificates {
    pub fn open(path: &Path) -> Result<Self, Error> {
        Followed::open(path, read).map(Self)
    }
}

#[tonic::async_trait]
impl Callers for NodeCertificates {
    async fn identify(&self, proof: &Proof<'_>) -> Result<Caller, Unidentified> {
        let (leaf, intermediates) = proof.certificates.split_first().ok_or(Unidentified::Absent)?;
        self.0.current().prove(leaf, intermediates).map_err(|error| Unidentified::Refused {
            reason: format!("the node certificate is not accepted: {error}"),
        })?;
        let node = node(leaf).ok_or_else(|| Unidentified::Refused {
            reason: format!(
                "the node certificate names no node: its subject must be O={ORGANIZATION}, CN={NAME}<node name>"
            ),
        })?;
        Ok(Caller { node: node.into() })
    }
}

impl NodeCa {
    fn prove(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
    ) -> Result<(), webpki::Error> {
        webpki::EndEntityCert::try_from(leaf)?.verify_for_usage(
            webpki::ALL_VERIFICATION_ALGS,
            &self.anchors,
            intermediates,
            UnixTime::now(),
            webpki::KeyUsage::client_auth(),
            None,
            None,
        )?;
        Ok(())
    }
}

/// The node that a certificate's subject names, if it names one and nothing else.
fn node(leaf: &CertificateDer<'_>) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(leaf).ok()?;
    let subject = certificate.subject();
    let mut names = subject.iter_common_name();
    let name = names.next()?.as_str().ok()?.strip_prefix(NAME)?;
    let a_node = subject.iter_organization().any(|o| o.as_str().is_ok_and(|o| o == ORGANIZATION));
    (a_node && names.next().is_none() && !name.is_empty()).then(|| name.into())
}

/// What is wrong with a file of node authorities.
#[derive(Debug)]
pub enum InvalidNodeCa {
    Certificates(InvalidCertificate),
    Anchor { position: usize, source: webpki::Error },
}

impl fmt::Display for InvalidNodeCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Certificates(error) => error.fmt(f),
            Self::Anchor { position, source } => {
                write!(f, "certificate {position} of it can prove nobody: {source}")
            }
        }
    }
}

fn read(path: &Path) -> Result<NodeCa, Error> {
    let content =
        std::fs::read(path).map_err(|source| Error::File { attempt: "read", path: path.into(), source })?;
    parse(&content).map_err(|fault| Error::NodeCa { path: path.into(), fault })
}

fn parse(pem: &[u8]) -> Result<NodeCa, InvalidNodeCa> {
    let certificates = pem_certificates(pem).map_err(InvalidNodeCa::Certificates)?;
    let anchor = |(position, certificate)| {
        webpki::anchor_from_trusted_cert(certificate)
            .map(|anchor| anchor.to_owned())
            .map_err(|source| InvalidNodeCa::Anchor { position: position + 1, source })
    };
    Ok(NodeCa { anchors: certificates.iter().enumerate().map(anchor).collect::<Result<_, _>>()? })
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    };
    use time::{Duration, OffsetDateTime};

    use super::*;

    struct Authority(Issuer<'static, KeyPair>, String);

    fn authority(name: &str) -> Authority {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root = params.self_signed(&key).unwrap().pem();
        Authority(Issuer::new(params, key), root)
    }

    fn certificate(
        authority: &Authority,
        organization: &str,
        names: &[&str],
        change: impl FnOnce(&mut CertificateParams),
    ) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, organization);
        for name in names {
            params.distinguished_name.push(DnType::CommonName, *name);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        params.signed_by(&KeyPair::generate().unwrap(), &authority.0).unwrap().der().clone()
    }

    #[tokio::test]
    async fn a_certificate_of_the_nodes_authority_speaks_for_the_node_that_it_names() {
        let (ours, foreign) = (authority("nodes"), authority("foreign"));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node-ca.pem");
        std::fs::write(&path, &ours.1).unwrap();
        let nodes = NodeCertificates::open(&path).unwrap();
        let ask = async |certificate: &CertificateDer<'static>| {
            let proof = Proof { token: None, certificates: std::slice::from_ref(certificate) };
            nodes.identify(&proof).await.map(|caller| caller.node.to_string()).map_err(|why| why.to_string())
        };
        let good = certificate(&ours, "system:nodes", &["system:node:node-a"], |_| {});
        assert_eq!(ask(&good).await, Ok("node-a".into()));
        assert_eq!(nodes.identify(&Proof::default()).await, Err(Unidentified::Absent));

        let named = ["system:node:node-a"];
        let yesterday = OffsetDateTime::now_utc() - Duration::days(1);
        for (refused, expected) in [
            (certificate(&foreign, "system:nodes", &named, |_| {}), "UnknownIssuer"),
            (certificate(&ours, "system:nodes", &named, |p| p.not_after = yesterday), "CertExpired"),
            (certificate(&ours, "system:masters", &named, |_| {}), "names no node"),
            (certificate(&ours, "system:nodes", &["node-a"], |_| {}), "names no node"),
            (certificate(&ours, "system:nodes", &["system:node:"], |_| {}), "names no node"),
            (certificate(&ours, "system:nodes", &[], |_| {}), "names no node"),
            (
                certificate(&ours, "system:nodes", &named, |p| {
                    p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
                }),
                "RequiredEku",
            ),
            (CertificateDer::from(vec![1, 2, 3]), "not accepted"),
        ] {
            let why = ask(&refused).await.unwrap_err();
            assert!(why.contains(expected), "{expected}: {why}");
        }

        std::fs::write(&path, "half written").unwrap();
        assert_eq!(ask(&good).await, Ok("node-a".into()), "the last good file counts");
        std::fs::write(&path, &foreign.1).unwrap();
        assert!(ask(&good).await.unwrap_err().contains("UnknownIssuer"), "the file is followed");
        assert!(NodeCertificates::open(&dir.path().join("none")).is_err());
    }
}
