//! Cgroup paths as kubelet and container runtimes form them: a path in, the pods named in it out. Pure.
//!
//! | driver | a container's cgroup |
//! |---|---|
//! | systemd | `kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid, - as _>.slice/cri-containerd-<id>.scope` |
//! | cgroupfs | `kubepods/burstable/pod<uid>/<id>` |
//! | kubelet means systemd, the runtime cgroupfs | `kubepods-burstable-pod<uid, - as _>.slice:cri-containerd:<id>` |
//!
//! CRI-O says `crio-<id>`, and keeps a monitor of its own, outside the pod's namespace, in `crio-conmon-<id>`. Guaranteed
//! pods have no directory for their class. kind and kubelet's `--cgroup-root` put more in front.

/// A pod that a cgroup path leads into.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct InPod<'a> {
    /// With dashes, as the API has it.
    pub uid: String,
    /// The path up to the directory that is the pod's, or where it has none its container's.
    pub directory: &'a str,
    /// How many directories the path has below that one.
    pub below: usize,
    /// The runtime's own process, which does not live in the pod's namespaces.
    pub is_monitor: bool,
}

/// The pod that the path leads into, the outermost: what lies below a pod's directory was named by the pod itself.
pub(super) fn pod_in(path: &str) -> Option<InPod<'_>> {
    let mut below_kubepods = false;
    let mut end = 0;
    for segment in path.split('/') {
        end += segment.len();
        if let Some(uid) = uid(segment, below_kubepods) {
            let (directory, rest) = path.split_at_checked(end)?;
            let inner: Vec<&str> = rest.split('/').filter(|segment| !segment.is_empty()).collect();
            let is_monitor = inner.first().is_some_and(|name| name.starts_with("crio-conmon-"));
            return Some(InPod { uid, directory, below: inner.len(), is_monitor });
        }
        below_kubepods |= is_kubepods(segment);
        end += 1;
    }
    None
}

/// Whether a directory is the one that kubelet puts all of a node's pods in.
pub(super) fn is_kubepods(segment: &str) -> bool {
    segment == "kubepods" || segment == "kubepods.slice" || segment.ends_with("-kubepods.slice")
}

/// The UID of the pod whose directory has this name.
pub(super) fn uid(segment: &str, below_kubepods: bool) -> Option<String> {
    let slice = segment.split(':').next().unwrap_or_default();
    let uid = match slice.strip_suffix(".slice") {
        Some(slice) if slice.contains("kubepods") => slice.rsplit_once("-pod")?.1.replace('_', "-"),
        Some(_) => return None,
        None if below_kubepods => segment.strip_prefix("pod")?.to_owned(),
        None => return None,
    };
    is_uid(&uid).then_some(uid)
}

/// A UUID, or for a pod from kubelet's own manifests a digest of 32 hexadecimal digits.
fn is_uid(text: &str) -> bool {
    let is_hex = |part: &str| part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let lengths: Vec<usize> = text.split('-').map(str::len).collect();
    text.split('-').all(is_hex) && (lengths == [8, 4, 4, 4, 12] || lengths == [32])
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "3c1ba4c1-9a35-4b47-b3d4-1f0e54f7a6d0";
    const ID: &str = "5ad1d0fb4ef3e1f3f62f6c7a2a9f5a1e0a8b9a0c9c7f34e8bf8d5b5f61c8a0de";

    #[test]
    fn every_form_of_a_containers_path_leads_to_its_pod() {
        let systemd = UID.replace('-', "_");
        let digest = "0f5b7aa5d4a5a0d1ac0b0d3e4f6a7b8c";
        // Path, UID, the pod's directory, directories below it.
        let table = [
            // containerd, systemd driver: guaranteed, burstable, best effort.
            (format!("/kubepods.slice/kubepods-pod{systemd}.slice/cri-containerd-{ID}.scope"), UID, 1),
            (
                format!(
                    "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{systemd}.slice/cri-containerd-{ID}.scope"
                ),
                UID,
                1,
            ),
            (
                format!(
                    "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{systemd}.slice/cri-containerd-{ID}.scope"
                ),
                UID,
                1,
            ),
            // containerd, cgroupfs driver.
            (format!("/kubepods/pod{UID}/{ID}"), UID, 1),
            (format!("/kubepods/burstable/pod{UID}/{ID}"), UID, 1),
            (format!("/kubepods/besteffort/pod{UID}/{ID}"), UID, 1),
            // CRI-O, both drivers, and with a cgroup of the container's own below its scope.
            (
                format!(
                    "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{systemd}.slice/crio-{ID}.scope"
                ),
                UID,
                1,
            ),
            (format!("/kubepods.slice/kubepods-pod{systemd}.slice/crio-{ID}.scope/container"), UID, 2),
            (format!("/kubepods/burstable/pod{UID}/crio-{ID}"), UID, 1),
            // Docker by cri-dockerd.
            (format!("/kubepods.slice/kubepods-pod{systemd}.slice/docker-{ID}.scope"), UID, 1),
            // A process that made cgroups of its own, as systemd and engines in pods do.
            (format!("/kubepods/besteffort/pod{UID}/{ID}/system.slice/docker-{ID}.scope"), UID, 3),
            // kubelet believes in systemd, the runtime does not: no directory of the pod's own.
            (
                format!(
                    "/system.slice/containerd.service/kubepods-burstable-pod{systemd}.slice:cri-containerd:{ID}"
                ),
                UID,
                0,
            ),
            // kind: seen from within the node, and from the machine around it.
            (
                format!(
                    "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{systemd}.slice/cri-containerd-{ID}.scope"
                ),
                UID,
                1,
            ),
            (
                format!(
                    "/system.slice/docker-{ID}.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{systemd}.slice/cri-containerd-{ID}.scope"
                ),
                UID,
                1,
            ),
            (format!("/docker/{ID}/kubelet/kubepods/burstable/pod{UID}/{ID}"), UID, 1),
            // From a cgroup namespace that does not have it.
            (format!("/../../kubepods/burstable/pod{UID}/{ID}"), UID, 1),
            (
                format!(
                    "/../../kubepods-burstable.slice/kubepods-burstable-pod{systemd}.slice/cri-containerd-{ID}.scope"
                ),
                UID,
                1,
            ),
            // A static pod.
            (
                format!(
                    "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{digest}.slice/cri-containerd-{ID}.scope"
                ),
                digest,
                1,
            ),
            (format!("/kubepods/burstable/pod{digest}/{ID}"), digest, 1),
        ];
        for (path, uid, below) in &table {
            let pod = pod_in(path).unwrap_or_else(|| panic!("{path}"));
            assert_eq!((pod.uid.as_str(), pod.below, pod.is_monitor), (*uid, *below, false), "{path}");
            let last = pod.directory.rsplit('/').next().unwrap();
            assert!(last.contains("pod") && path.starts_with(pod.directory), "{path}: {}", pod.directory);
        }
    }

    #[test]
    fn what_is_no_pods_leads_nowhere() {
        let systemd = UID.replace('-', "_");
        for path in [
            "/".to_owned(),
            "/system.slice/kubelet.service".to_owned(),
            "/kubepods.slice".to_owned(),
            "/kubepods/burstable".to_owned(),
            format!("/user.slice/pod{UID}/{ID}"),
            format!("/machine.slice/libpod-{ID}.scope"),
            format!("/app.slice/app-pod{systemd}.slice"),
            "/kubepods/burstable/podinfo".to_owned(),
            format!("/kubepods/burstable/pod{}/{ID}", &UID[1..]),
            format!("/kubepods/burstable/pod{}/{ID}", UID.to_uppercase()),
        ] {
            assert_eq!(pod_in(&path), None, "{path}");
        }
    }

    #[test]
    fn crios_monitor_is_told_from_the_pods_own_processes() {
        let systemd = UID.replace('-', "_");
        for path in [
            format!("/kubepods.slice/kubepods-pod{systemd}.slice/crio-conmon-{ID}.scope"),
            format!("/kubepods/burstable/pod{UID}/crio-conmon-{ID}"),
        ] {
            assert!(pod_in(&path).unwrap().is_monitor, "{path}");
        }
    }

    #[test]
    fn a_pod_cannot_pass_for_another_by_the_names_below_its_directory() {
        let other = "11111111-2222-3333-4444-555555555555";
        let path = format!("/kubepods/burstable/pod{UID}/{ID}/kubepods/besteffort/pod{other}/{ID}");
        assert_eq!(pod_in(&path).unwrap().uid, UID);
    }
}
