//! Where the mesh is described: flags in, exactly one place out.

use std::path::PathBuf;

use super::{Mistakes, Options};

/// Where the mesh is described.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MeshSource {
    Directory(PathBuf),
    /// Without a kubeconfig: the API server that Kubernetes names to every pod.
    Kubernetes {
        kubeconfig: Option<PathBuf>,
        annotations: bool,
    },
}

impl Options {
    /// From a directory or from the Kubernetes API, never from both.
    pub(super) fn mesh(&self, in_a_pod: bool, mistakes: &mut Mistakes) -> Option<MeshSource> {
        let asks_for_api = self.kubernetes || self.kubeconfig.is_some();
        match &self.manifests {
            Some(_) if asks_for_api => {
                mistakes.0.push(
                    "--manifests and the Kubernetes API (--kubernetes, --kubeconfig) are both given: one \
                     describes the mesh"
                        .into(),
                );
                None
            }
            Some(_) if self.trust_pod_annotations => {
                mistakes.0.push(
                    "--trust-pod-annotations is for the Kubernetes API; those of --manifests always count"
                        .into(),
                );
                None
            }
            Some(directory) => Some(MeshSource::Directory(directory.clone())),
            None if asks_for_api || in_a_pod => Some(MeshSource::Kubernetes {
                kubeconfig: self.kubeconfig.clone(),
                annotations: self.trust_pod_annotations,
            }),
            None => {
                mistakes.0.push(
                    "--manifests is missing, and this is no pod of a cluster: give a directory, or the \
                     --kubeconfig of a cluster"
                        .into(),
                );
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::complete;
    use super::*;

    #[test]
    fn the_mesh_is_described_in_exactly_one_place() {
        let of = |options: Options, in_a_pod| {
            let mut mistakes = Mistakes::default();
            options.mesh(in_a_pod, &mut mistakes).ok_or_else(|| mistakes.to_string())
        };
        let none = || Options::default();
        let api = |kubeconfig: Option<&str>| MeshSource::Kubernetes {
            kubeconfig: kubeconfig.map(PathBuf::from),
            annotations: false,
        };
        assert_eq!(of(complete(), true), Ok(MeshSource::Directory("/m".into())));
        assert_eq!(of(none(), true), Ok(api(None)));
        assert_eq!(of(Options { kubernetes: true, ..none() }, false), Ok(api(None)));
        assert_eq!(of(Options { kubeconfig: Some("/k".into()), ..none() }, false), Ok(api(Some("/k"))));
        for (options, expected) in [
            (none(), "--manifests is missing, and this is no pod"),
            (Options { kubernetes: true, ..complete() }, "both given"),
            (Options { trust_pod_annotations: true, ..complete() }, "--trust-pod-annotations"),
        ] {
            let error = of(options, false).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
