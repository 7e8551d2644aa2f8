//! Objects that make the API server dial Services: webhook configurations, definitions of custom resources and
//! aggregated APIs in, the Services' ports out. Rules, schemas, certificates and everything else in them is skipped by
//! the parser.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::ApiResource;
use kube::core::{DynamicResourceScope, GroupVersionKind};
use serde::Deserialize;

use super::kept::{Kept, Uid};
use super::lean::Metadata;
use crate::mesh::interner::Interner;
use crate::mesh::objects::Key;
use crate::mesh::server_calls::{ServerCall, ServerCalls};

/// Where a webhook is called that names no port; an aggregated API, too.
const USUAL_PORT: u16 = 443;

/// A kind of such objects.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Caller {
    ValidatingWebhooks,
    MutatingWebhooks,
    AggregatedApis,
    /// Their definitions name webhooks that convert between versions.
    CustomResources,
}

impl Caller {
    pub(super) const ALL: [Self; 4] =
        [Self::ValidatingWebhooks, Self::MutatingWebhooks, Self::AggregatedApis, Self::CustomResources];

    pub(super) fn kind(self) -> &'static str {
        match self {
            Self::ValidatingWebhooks => "ValidatingWebhookConfiguration",
            Self::MutatingWebhooks => "MutatingWebhookConfiguration",
            Self::AggregatedApis => "APIService",
            Self::CustomResources => "CustomResourceDefinition",
        }
    }

    /// In the plural, with its group: as roles grant it.
    pub(super) fn plural(self) -> &'static str {
        match self {
            Self::ValidatingWebhooks => "validatingwebhookconfigurations.admissionregistration.k8s.io",
            Self::MutatingWebhooks => "mutatingwebhookconfigurations.admissionregistration.k8s.io",
            Self::AggregatedApis => "apiservices.apiregistration.k8s.io",
            Self::CustomResources => "customresourcedefinitions.apiextensions.k8s.io",
        }
    }

    pub(super) fn resource(self) -> ApiResource {
        let (plural, group) = self.plural().split_once('.').unwrap_or_default();
        ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, "v1", self.kind()), plural)
    }
}

/// One object, as far as it matters here.
#[derive(Clone, Debug, Deserialize)]
#[serde(from = "CallingJson")]
pub(super) struct Calling {
    pub metadata: ObjectMeta,
    services: Vec<ServiceJson>,
}

/// The fields of all kinds.
#[derive(Deserialize)]
struct CallingJson {
    metadata: Metadata,
    webhooks: Option<Vec<WebhookJson>>,
    spec: Option<SpecJson>,
}

/// Of an aggregated API, or of a custom resource's definition.
#[derive(Deserialize)]
struct SpecJson {
    service: Option<ServiceJson>,
    conversion: Option<ConversionJson>,
}

#[derive(Deserialize)]
struct ConversionJson {
    webhook: Option<WebhookJson>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct WebhookJson {
    client_config: Option<ClientJson>,
}

#[derive(Deserialize)]
struct ClientJson {
    /// Without it the API server calls a URL, or an API is its own.
    service: Option<ServiceJson>,
}

/// Of an aggregated API all of it is optional.
#[derive(Clone, Debug, Deserialize)]
struct ServiceJson {
    namespace: Option<String>,
    name: Option<String>,
    port: Option<i32>,
}

impl From<CallingJson> for Calling {
    fn from(CallingJson { metadata, webhooks, spec }: CallingJson) -> Self {
        let (api, conversion) = spec.map_or((None, None), |spec| (spec.service, spec.conversion));
        let hooks = webhooks.into_iter().flatten().chain(conversion.and_then(|it| it.webhook));
        let called = hooks.filter_map(|webhook| webhook.client_config?.service);
        Self { metadata: metadata.into(), services: called.chain(api).collect() }
    }
}

impl Calling {
    /// The ports of Services that are dialled, each once.
    fn ports(&self, interner: &mut Interner) -> Box<[Port]> {
        let ports = self.services.iter().filter_map(|ServiceJson { namespace, name, port }| {
            let service = format!("{}/{}", namespace.as_deref()?, name.as_deref()?);
            let number = port.map_or(Ok(USUAL_PORT), u16::try_from).ok()?;
            Some(Port { service: interner.text(&service), number })
        });
        ports.collect::<BTreeSet<_>>().into_iter().collect()
    }
}

impl kube::Resource for Calling {
    type DynamicType = ApiResource;
    type Scope = DynamicResourceScope;

    fn kind(resource: &ApiResource) -> Cow<'_, str> {
        resource.kind.as_str().into()
    }

    fn group(resource: &ApiResource) -> Cow<'_, str> {
        resource.group.as_str().into()
    }

    fn version(resource: &ApiResource) -> Cow<'_, str> {
        resource.version.as_str().into()
    }

    fn plural(resource: &ApiResource) -> Cow<'_, str> {
        resource.plural.as_str().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// A Service's port.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Port {
    service: Arc<str>,
    number: u16,
}

/// What is kept of each kind.
#[derive(Debug, Default)]
pub(super) struct Callers {
    validating: Kept<Box<[Port]>>,
    mutating: Kept<Box<[Port]>>,
    aggregated: Kept<Box<[Port]>>,
    converted: Kept<Box<[Port]>>,
}

impl Callers {
    pub(super) fn of(&self, caller: Caller) -> &Kept<Box<[Port]>> {
        match caller {
            Caller::ValidatingWebhooks => &self.validating,
            Caller::MutatingWebhooks => &self.mutating,
            Caller::AggregatedApis => &self.aggregated,
            Caller::CustomResources => &self.converted,
        }
    }

    pub(super) fn of_mut(&mut self, caller: Caller) -> &mut Kept<Box<[Port]>> {
        match caller {
            Caller::ValidatingWebhooks => &mut self.validating,
            Caller::MutatingWebhooks => &mut self.mutating,
            Caller::AggregatedApis => &mut self.aggregated,
            Caller::CustomResources => &mut self.converted,
        }
    }

    /// Returns whether that changes anything.
    pub(super) fn put(&mut self, caller: Caller, calling: &Calling, interner: &mut Interner) -> bool {
        let (key, uid) = (Key::of(&calling.metadata, interner), Uid::of(&calling.metadata));
        let ports = calling.ports(interner);
        let kept = self.of_mut(caller);
        kept.seen(&key, uid);
        let is_new = kept.get(&key) != Some(&ports);
        kept.put(key, uid, ports);
        is_new
    }

    /// For a snapshot.
    pub(super) fn calls(&self) -> ServerCalls {
        let mut all = ServerCalls::default();
        for caller in Caller::ALL {
            let kept = self.of(caller);
            if !kept.complete {
                all.unread.push(caller.plural());
            }
            for (key, ports) in kept.iter() {
                let by: Arc<str> = format!("{} {}", caller.kind(), key.name).into();
                all.calls.extend(ports.iter().map(|Port { service, number }| ServerCall {
                    by: by.clone(),
                    service: service.clone(),
                    port: *number,
                }));
            }
        }
        all.calls.sort();
        all
    }
}
