//! The public roots as objects of the cluster: an authority in, a ConfigMap and a ClusterTrustBundle that say the same
//! out.
//!
//! Agents mount the ConfigMap. A ClusterTrustBundle is for whoever else trusts the mesh, and an API server that doesn't
//! have the kind, or doesn't let us write it, is no error.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, ApiResource, DynamicObject, ObjectMeta, PostParams};
use kube::core::GroupVersionKind;
use serde_json::json;

use super::ask;
use crate::ca::Error;
use crate::kubernetes::Cluster;

/// The ConfigMap's only key, as Istio calls it too.
const KEY: &str = "root-cert.pem";

/// Where the roots are published.
pub struct Published {
    config_map: Api<ConfigMap>,
    /// By version, the newest first.
    trust_bundles: [Api<DynamicObject>; 3],
    namespace: String,
    name: String,
    /// Why there is no ClusterTrustBundle, as was last said.
    without: Option<String>,
}

/// Publishes as objects of this name.
pub fn published_in(cluster: &Cluster, namespace: &str, name: &str) -> Published {
    let trust_bundles = ["v1", "v1beta1", "v1alpha1"].map(|version| {
        let kind = GroupVersionKind::gvk("certificates.k8s.io", version, "ClusterTrustBundle");
        Api::all_with(cluster.client.clone(), &ApiResource::from_gvk(&kind))
    });
    Published {
        config_map: Api::namespaced(cluster.client.clone(), namespace),
        trust_bundles,
        namespace: namespace.into(),
        name: name.into(),
        without: None,
    }
}

impl Published {
    /// Makes both say `bundle` (PEM), if they don't.
    pub async fn publish(&mut self, bundle: &str) -> Result<(), Error> {
        self.publish_config_map(bundle).await?;
        match self.publish_trust_bundle(bundle).await {
            Ok(()) => self.without = None,
            Err(error) => {
                let reason = error.to_string();
                if self.without.as_ref() != Some(&reason) {
                    tracing::info!(
                        reason,
                        "the roots are in the ConfigMap only, which is all that agents need"
                    );
                    self.without = Some(reason);
                }
            }
        }
        Ok(())
    }

    async fn publish_config_map(&self, bundle: &str) -> Result<(), Error> {
        let what = format!("ConfigMap {}/{}", self.namespace, self.name);
        let (api, params) = (&self.config_map, PostParams::default());
        let data = BTreeMap::from([(KEY.to_owned(), bundle.to_owned())]);
        match ask("read", &what, api.get_opt(&self.name)).await? {
            Some(now) if now.data.as_ref() == Some(&data) => Ok(()),
            Some(now) => {
                // With its resource version: what another replica wrote meanwhile is looked at first.
                let next = ConfigMap { data: Some(data), ..now };
                let request = api.replace(&self.name, &params, &next);
                ask("update", &what, request).await.map(|_| tracing::info!(what, "the roots are published"))
            }
            None => {
                let metadata = ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() };
                let next = ConfigMap { metadata, data: Some(data), ..ConfigMap::default() };
                let request = api.create(&params, &next);
                ask("make", &what, request).await.map(|_| tracing::info!(what, "the roots are published"))
            }
        }
    }

    async fn publish_trust_bundle(&self, bundle: &str) -> Result<(), Error> {
        let what = format!("ClusterTrustBundle {}", self.name);
        let spec = json!({ "spec": { "trustBundle": bundle } });
        let mut last = None;
        for (api, version) in self.trust_bundles.iter().zip(["v1", "v1beta1", "v1alpha1"]) {
            let now = match ask("read", &what, api.get_opt(&self.name)).await {
                Ok(now) => now,
                Err(error) => {
                    last = Some(error);
                    continue;
                }
            };
            let outcome = match now {
                Some(now) if now.data.pointer("/spec/trustBundle") == spec.pointer("/spec/trustBundle") => {
                    return Ok(());
                }
                Some(now) => {
                    let next = DynamicObject { data: spec.clone(), ..now };
                    ask("update", &what, api.replace(&self.name, &PostParams::default(), &next)).await
                }
                None => {
                    let kind = GroupVersionKind::gvk("certificates.k8s.io", version, "ClusterTrustBundle");
                    let next =
                        DynamicObject::new(&self.name, &ApiResource::from_gvk(&kind)).data(spec.clone());
                    ask("make", &what, api.create(&PostParams::default(), &next)).await
                }
            };
            match outcome {
                Ok(_) => {
                    tracing::info!(what, version, "the roots are published");
                    return Ok(());
                }
                // The object is not there, nor is the kind: the API server answers both alike.
                Err(error) => last = Some(error),
            }
        }
        last.map_or(Ok(()), Err)
    }
}
