//! What Istio calls a workload, from what the mesh knows of a pod. Pure.

use crate::mesh::Workload;

/// The name of what made the pod (Deployment, StatefulSet, DaemonSet, Job), as `*_workload` labels have it: read
/// from the labels that the controllers themselves put on their pods. A pod nobody made goes by its own name.
pub(super) fn controller(workload: &Workload) -> &str {
    let name = &*workload.name;
    let label = |key: &str| workload.labels.get(key).map(String::as_str).filter(|value| !value.is_empty());
    if let Some(hash) = label("pod-template-hash") {
        // <deployment>-<hash>-<random>
        if let Some((replica_set, _)) = name.rsplit_once('-') {
            if let Some(deployment) = replica_set.strip_suffix(hash).and_then(|rest| rest.strip_suffix('-')) {
                return non_empty(deployment, name);
            }
        }
    }
    if label("statefulset.kubernetes.io/pod-name").is_some() {
        return match name.rsplit_once('-') {
            Some((set, ordinal)) if ordinal.bytes().all(|b| b.is_ascii_digit()) => non_empty(set, name),
            _ => name,
        };
    }
    if let Some(job) = label("batch.kubernetes.io/job-name").or_else(|| label("job-name")) {
        return job;
    }
    if label("controller-revision-hash").is_some() {
        // <daemon set>-<random>
        return name.rsplit_once('-').map_or(name, |(set, _)| non_empty(set, name));
    }
    name
}

fn non_empty<'a>(value: &'a str, or: &'a str) -> &'a str {
    if value.is_empty() { or } else { value }
}

/// `*_canonical_service`, by Istio's order of precedence.
pub(super) fn canonical_name(workload: &Workload) -> &str {
    first(workload, &["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"])
        .unwrap_or_else(|| controller(workload))
}

/// `*_canonical_revision` and `*_version`, by Istio's order of precedence.
pub(super) fn canonical_revision(workload: &Workload) -> &str {
    first(workload, &["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"])
        .unwrap_or("latest")
}

fn first<'a>(workload: &'a Workload, keys: &[&str]) -> Option<&'a str> {
    let mut values = keys.iter().filter_map(|key| workload.labels.get(*key));
    values.find(|value| !value.is_empty()).map(String::as_str)
}
