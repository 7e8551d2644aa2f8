//! The Secret that the authority is kept in: made once by whoever comes first, read again for as long as we run.
//!
//! Its keys are the names of the four files of an authority's directory, so that an operator's own intermediate is put
//! there as Istio's `cacerts` is made. Never replaced and never completed by us.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret as Object;
use kube::api::{Api, ObjectMeta, PostParams};

use super::ask;
use crate::ca::directory::Contents;
use crate::ca::{CertificateAuthority, Error, InForce};
use crate::identity::TrustDomain;
use crate::kubernetes::Cluster;

/// While the API server can't be asked at the start.
const AGAIN: Duration = Duration::from_secs(2);

/// Where the authority is kept.
pub struct Secret {
    api: Api<Object>,
    name: String,
    /// For logs and errors.
    place: PathBuf,
    trust_domain: TrustDomain,
    leaf_lifetime: Duration,
}

impl Secret {
    pub fn new(
        cluster: &Cluster,
        namespace: &str,
        name: &str,
        trust_domain: TrustDomain,
        leaf_lifetime: Duration,
    ) -> Self {
        Self {
            api: Api::namespaced(cluster.client.clone(), namespace),
            name: name.into(),
            place: format!("Secret {namespace}/{name}").into(),
            trust_domain,
            leaf_lifetime,
        }
    }

    /// The authority in the Secret, which is made with a new root if it isn't there. Waits for an API server that
    /// can't be asked, saying so.
    ///
    /// # Errors
    ///
    /// A Secret that is there and is no authority's, named with the key at fault.
    pub async fn open(&self) -> Result<Arc<InForce>, Error> {
        loop {
            match self.read_or_make().await {
                Err(error @ Error::Api { .. }) => {
                    tracing::error!(%error, "no authority yet");
                    tokio::time::sleep(AGAIN).await;
                }
                outcome => return outcome.map(InForce::fixed),
            }
        }
    }

    /// Takes over what the Secret has become. What is no authority, or is gone, leaves the last one in force.
    pub async fn refresh(&self, in_force: &InForce) -> Result<(), Error> {
        match self.read().await? {
            Some(authority) => in_force.replace(authority, &self.place.display()),
            None => return Err(Error::Emptied { dir: self.place.clone() }),
        }
        Ok(())
    }

    async fn read_or_make(&self) -> Result<CertificateAuthority, Error> {
        loop {
            if let Some(authority) = self.read().await? {
                return Ok(authority);
            }
            let contents = CertificateAuthority::new_root(&self.trust_domain)?;
            let data = contents.named().map(|(name, content)| (name.to_owned(), ByteString(content.into())));
            let object = Object {
                metadata: ObjectMeta {
                    name: Some(self.name.clone()),
                    labels: Some(BTreeMap::from([("app.kubernetes.io/name".into(), "mtls".into())])),
                    ..ObjectMeta::default()
                },
                data: Some(data.into()),
                type_: Some("Opaque".into()),
                ..Object::default()
            };
            match self.api.create(&PostParams::default(), &object).await {
                Ok(_) => {
                    tracing::info!(secret = %self.place.display(), "made a root, because there was none");
                    return self.authority(&contents);
                }
                // Another replica was faster: its root is the one.
                Err(kube::Error::Api(status)) if status.code == 409 => {}
                Err(error) => {
                    return ask("make", &self.place.to_string_lossy(), async { Err(error) }).await;
                }
            }
        }
    }

    /// `None`: there is no such Secret.
    async fn read(&self) -> Result<Option<CertificateAuthority>, Error> {
        let request = self.api.get_opt(&self.name);
        let Some(object) = ask("read", &self.place.to_string_lossy(), request).await? else {
            return Ok(None);
        };
        let mut data = object.data.unwrap_or_default();
        let contents = Contents::of(&self.place, |name| Ok(data.remove(name).map(|content| content.0)))?;
        // An empty Secret is not for us to fill: whoever made it means to.
        let contents = contents.ok_or_else(|| Error::Emptied { dir: self.place.clone() })?;
        self.authority(&contents).map(Some)
    }

    fn authority(&self, contents: &Contents) -> Result<CertificateAuthority, Error> {
        let stored = contents.understood(&self.place)?;
        CertificateAuthority::proven(&self.place, self.trust_domain.clone(), self.leaf_lifetime, stored)
    }
}
