//! What Istio calls a workload, from what the mesh knows of a pod. Pure.

use crate::mesh::Workload;

/// The name of what made the pod (Deployment, StatefulSet, DaemonSet, Job), as `*_workload` labels have it: read
/// from the labels that the controllers themselves put on their pods. A pod nobody made goes by its own name.
pub fn controller(workload: &Workload) -> &str {
    let name = &*workload.name;
    let label = |key: &str| workload.labels.get(key).map(String::as_str).filter(|value| !value.is_empty());
    if let Some(hash) = label("pod-template-hash") {
        // <deployment>-<hash>-<random>
        let replica_set = name.rsplit_once('-').map(|(replica_set, _)| replica_set);
        let deployment = replica_set.and_then(|name| name.strip_suffix(hash)?.strip_suffix('-'));
        if let Some(deployment) = deployment {
            return non_empty(deployment, name);
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;

    fn pod(name: &str, labels: &[(&str, &str)]) -> Workload {
        Workload {
            namespace: "shop".into(),
            name: name.into(),
            uid: None,
            service_account: "default".into(),
            app: Arc::from(name),
            node: None,
            addresses: Vec::new(),
            labels: labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
            enrolled: true,
            identity: "spiffe://cluster.local/ns/shop/sa/default".parse().unwrap(),
            ports: Vec::new(),
            netns: None,
            cgroup: None,
        }
    }

    #[test]
    fn a_pod_goes_by_what_made_it() {
        type Row<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a str);
        let table: &[Row<'_>] = &[
            ("web-7d9f6c5b8-x2x9z", &[("pod-template-hash", "7d9f6c5b8")], "web"),
            ("web-7d9f6c5b8-x2x9z", &[("pod-template-hash", "other")], "web-7d9f6c5b8-x2x9z"),
            ("web-7d9f6c5b8-x2x9z", &[], "web-7d9f6c5b8-x2x9z"),
            ("db-0", &[("statefulset.kubernetes.io/pod-name", "db-0")], "db"),
            ("db-0", &[], "db-0"),
            (
                "db-12",
                &[("statefulset.kubernetes.io/pod-name", "db-12"), ("controller-revision-hash", "db-5f")],
                "db",
            ),
            ("agent-kx9zq", &[("controller-revision-hash", "5f6d8")], "agent"),
            ("backup-28-abcde", &[("batch.kubernetes.io/job-name", "backup-28")], "backup-28"),
            ("backup-28-abcde", &[("job-name", "backup-28")], "backup-28"),
        ];
        for (name, labels, expected) in table {
            assert_eq!(controller(&pod(name, labels)), *expected, "{name} {labels:?}");
        }
    }

    #[test]
    fn canonical_names_follow_istios_order() {
        let all = [("app", "c"), ("app.kubernetes.io/name", "b"), ("service.istio.io/canonical-name", "a")];
        for skipped in 0..3 {
            let expected = all[2 - skipped].1;
            assert_eq!(canonical_name(&pod("x", &all[..3 - skipped])), expected);
        }
        assert_eq!(canonical_name(&pod("x", &[("app", "")])), "x");
        assert_eq!(canonical_revision(&pod("x", &[("version", "v2")])), "v2");
        assert_eq!(canonical_revision(&pod("x", &[])), "latest");
    }

    proptest! {
        #[test]
        fn a_deployments_pods_all_go_by_its_name(
            deployment in "[a-z][a-z0-9-]{0,20}",
            hash in "[a-z0-9]{8,10}",
            random in "[a-z0-9]{5}",
        ) {
            let name = format!("{deployment}-{hash}-{random}");
            let pod = pod(&name, &[("pod-template-hash", &hash)]);
            prop_assert_eq!(controller(&pod), deployment);
        }

        #[test]
        fn whatever_the_labels_a_pod_has_a_name(name in "[a-z0-9-]{1,12}", value in "[a-z0-9-]{1,3}", which in 0..3usize) {
            let key = ["pod-template-hash", "statefulset.kubernetes.io/pod-name", "controller-revision-hash"][which];
            let pod = pod(&name, &[(key, &value)]);
            let found = controller(&pod);
            prop_assert!(!found.is_empty() && name.starts_with(found));
        }
    }
}
