//! Policies of an API server: what somebody wrote in, the policy to enforce out.
//!
//! The schema of their definitions lets mistakes through that a directory's reader refuses. In a cluster such a policy
//! cannot stop the rest, so until it is corrected something stricter stands in for one that never was in good order: it
//! may deny what its author allows, and never allow what he denies.

use kube::api::DynamicObject;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::mesh::{Error, Place};
use crate::policy::{AuthorizationPolicy, PeerAuthentication};

/// A policy that can't be enforced as it is written.
pub(super) struct Refused<P> {
    pub error: Error,
    /// What to enforce instead, where no earlier version is there. `None`: it would enforce nothing anyway.
    pub instead: Option<P>,
}

pub(super) fn peer_authentication(
    object: &DynamicObject,
    place: &Place,
) -> Result<PeerAuthentication, Box<Refused<PeerAuthentication>>> {
    let strict = |selector: Option<&Value>| json!({ "selector": selector, "mtls": { "mode": "STRICT" } });
    checked("PeerAuthentication", object, place, |_| Some(&strict))
}

pub(super) fn authorization_policy(
    object: &DynamicObject,
    place: &Place,
) -> Result<AuthorizationPolicy, Box<Refused<AuthorizationPolicy>>> {
    let deny = |selector: Option<&Value>| json!({ "selector": selector, "action": "DENY", "rules": [{}] });
    checked("AuthorizationPolicy", object, place, |spec| {
        let filled = |field| spec.get(field).is_some_and(|value| !value.is_null() && *value != json!([]));
        // AUDIT lets everything through, and what is attached to a gateway is not about pods.
        let is_harmless =
            spec.get("action") == Some(&json!("AUDIT")) || filled("targetRef") || filled("targetRefs");
        (!is_harmless).then_some(&deny as &dyn Fn(Option<&Value>) -> Value)
    })
}

fn checked<'s, P: DeserializeOwned>(
    kind: &'static str,
    object: &DynamicObject,
    place: &Place,
    stricter: impl Fn(&Value) -> Option<&'s dyn Fn(Option<&Value>) -> Value>,
) -> Result<P, Box<Refused<P>>> {
    let spec = object.data.get("spec").unwrap_or(&Value::Null);
    let error = match serde_path_to_error::deserialize(written(kind, object, spec, true)) {
        Ok(policy) => return Ok(policy),
        Err(error) => error,
    };
    let field = error.path().to_string();
    let error = Error::Field {
        place: place.clone(),
        object: crate::mesh::objects::called(kind, &object.metadata),
        field: if field == "." { "(top level)".to_owned() } else { field },
        problem: error.into_inner().to_string(),
    };
    let instead = stricter(spec).and_then(|stricter| {
        // As much of what is written as can be understood: whom it is for, and that it is a trial.
        [(spec.get("selector"), true), (spec.get("selector"), false), (None, true), (None, false)]
            .into_iter()
            .map(|(selector, annotated)| written(kind, object, &stricter(selector), annotated))
            .find_map(|value| serde_json::from_value(value).ok())
    });
    Err(Box::new(Refused { error, instead }))
}

fn written(kind: &str, object: &DynamicObject, spec: &Value, annotated: bool) -> Value {
    let metadata = &object.metadata;
    let annotations = metadata.annotations.as_ref().filter(|_| annotated);
    json!({
        "apiVersion": "security.istio.io/v1",
        "kind": kind,
        "metadata": {
            "name": metadata.name,
            "namespace": metadata.namespace,
            "creationTimestamp": metadata.creation_timestamp,
            "annotations": annotations.and_then(|all| all.get_key_value(DRY_RUN)).map(|(key, value)| json!({ key: value })),
        },
        "spec": spec,
    })
}

/// Of a policy's annotations the only one that matters.
const DRY_RUN: &str = "istio.io/dry-run";

#[cfg(test)]
mod tests {
    use super::*;

    fn object(spec: Value) -> DynamicObject {
        serde_json::from_value(json!({
            "apiVersion": "security.istio.io/v1", "kind": "any",
            "metadata": { "name": "p", "namespace": "shop" }, "spec": spec,
        }))
        .unwrap()
    }

    fn place() -> Place {
        Place { source: "the Kubernetes API".into(), document: None, item: None }
    }

    #[test]
    fn an_unknown_mode_is_strict_for_whom_it_is_meant() {
        let selector = json!({ "matchLabels": { "app": "db" } });
        let written = object(json!({ "selector": selector, "mtls": { "mode": "STRIKT" } }));
        let refused = peer_authentication(&written, &place()).err().unwrap();
        let error = refused.error.to_string();
        assert!(
            error.starts_with("the Kubernetes API: PeerAuthentication shop/p: field spec.mtls.mode: "),
            "{error}"
        );
        let instead = refused.instead.unwrap();
        assert_eq!(instead.spec.mode, Some(crate::policy::Mode::Strict));
        assert_eq!(instead.spec.selector.unwrap().labels().collect::<Vec<_>>(), [("app", "db")]);

        let written = object(json!({ "selector": { "matchLabels": { "app": "d*" } }, "mtls": {} }));
        let instead = peer_authentication(&written, &place()).err().unwrap().instead.unwrap();
        assert!(instead.spec.selector.is_none(), "whom it is meant for can't be told: the whole namespace");
    }

    #[test]
    fn a_policy_that_might_deny_denies_and_one_that_never_does_does_not() {
        let instead = |spec| authorization_policy(&object(spec), &place()).err().unwrap().instead;
        let custom =
            instead(json!({ "action": "CUSTOM", "provider": { "name": "p" }, "rules": [{}] })).unwrap();
        assert_eq!((custom.spec.action, custom.spec.rules.len()), (crate::policy::Action::Deny, 1));
        assert!(instead(json!({ "action": "AUDIT", "rules": [{}] })).is_none());
        assert!(instead(json!({ "targetRefs": [{}], "rules": [{ "form": [] }] })).is_none());
        assert!(authorization_policy(&object(json!({ "rules": [{}] })), &place()).is_ok());
    }

    #[test]
    fn a_trial_stays_a_trial() {
        let mut written = object(json!({ "mtls": { "mode": "STRIKT" } }));
        written.metadata.annotations = Some([(DRY_RUN.to_owned(), "true".to_owned())].into());
        let instead = peer_authentication(&written, &place()).err().unwrap().instead.unwrap();
        assert!(instead.metadata.annotations.is_some());
        // A misspelt value could mean either: then it is enforced.
        written.metadata.annotations = Some([(DRY_RUN.to_owned(), "ture".to_owned())].into());
        let instead = peer_authentication(&written, &place()).err().unwrap().instead.unwrap();
        assert!(instead.metadata.annotations.is_none());
    }
}
