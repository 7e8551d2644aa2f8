//! `PeerAuthentication`: policies of three levels in, the effective mode of a workload's port out.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use k8s_openapi::jiff::Timestamp;

use super::schema::{PeerAuthentication, is_dry_run};
use super::selector::{BySelector, Selectable, Selector};
use super::warning::{Problem, Warning};
use super::{Mode, PortModes, name_of};
use crate::mesh::Workload;

/// The winning policy of each level.
#[derive(Debug, Default)]
pub(super) struct Levels {
    mesh: Option<Arc<Level>>,
    namespaces: HashMap<String, Arc<Level>>,
    workloads: HashMap<String, BySelector<Arc<Level>>>,
}

#[derive(Debug)]
struct Level {
    name: Arc<str>,
    /// Place among all policies, the oldest first.
    rank: usize,
    mode: Option<Mode>,
    ports: BTreeMap<u16, Option<Mode>>,
}

/// What applies to one workload.
pub(super) struct Effective<'a> {
    mode: Mode,
    decided_by: Option<&'a Arc<str>>,
    workload: Option<&'a Level>,
}

impl Levels {
    /// `policies` are those to be combined; `warnings` gets what each of them does not do.
    pub(super) fn new<'a>(
        policies: impl Iterator<Item = &'a PeerAuthentication>,
        root_namespace: &str,
        warnings: &mut Vec<Warning>,
    ) -> Self {
        let mut oldest_first: Vec<_> = policies.map(|p| (age(p), name_of(&p.metadata), p)).collect();
        oldest_first.sort_by(|a, b| (&a.0, &a.1).cmp(&(&b.0, &b.1)));

        let mut levels = Self::default();
        let mut selected: HashMap<&str, HashMap<Selector, Arc<Level>>> = HashMap::new();
        for (rank, (_, name, policy)) in oldest_first.into_iter().enumerate() {
            let namespace = policy.metadata.namespace.as_deref().unwrap_or_default();
            let level = Arc::new(Level {
                name: name.clone(),
                rank,
                mode: policy.spec.mode,
                ports: policy.spec.ports.clone(),
            });
            let winner = match &policy.spec.selector {
                Some(_) if namespace == root_namespace => {
                    warnings.push(Warning::peer_authentication(&name, Problem::SelectorInRootNamespace));
                    continue;
                }
                Some(selector) => {
                    let same = selected.entry(namespace).or_default();
                    same.entry(selector.clone()).or_insert_with(|| level.clone())
                }
                None if namespace == root_namespace => levels.mesh.get_or_insert_with(|| level.clone()),
                None => levels.namespaces.entry(namespace.to_owned()).or_insert_with(|| level.clone()),
            };
            if winner.rank != rank {
                let by = winner.name.clone();
                warnings.push(Warning::peer_authentication(&name, Problem::Shadowed { by }));
            }
        }
        levels.workloads =
            selected.into_iter().map(|(ns, levels)| (ns.to_owned(), BySelector::new(levels))).collect();
        levels
    }

    pub(super) fn effective(&self, workload: &Workload) -> Effective<'_> {
        let selected = self.workloads.get(&*workload.namespace).and_then(|levels| {
            levels.selecting(&workload.labels).min_by_key(|level| level.rank).map(Arc::as_ref)
        });
        let namespace = self.namespaces.get(&*workload.namespace).map(Arc::as_ref);
        let mesh = self.mesh.as_deref();
        let decided = [selected, namespace, mesh]
            .into_iter()
            .flatten()
            .find_map(|level| level.mode.map(|mode| (mode, &level.name)));
        Effective {
            mode: decided.map_or(Mode::Permissive, |(mode, _)| mode),
            decided_by: decided.map(|(_, name)| name),
            workload: selected,
        }
    }
}

impl<'a> Effective<'a> {
    /// The mode of a port of the pod, and the policy that set it.
    pub(super) fn of(&self, port: u16) -> (Mode, Option<&'a Arc<str>>) {
        match self.workload.and_then(|level| Some((level.ports.get(&port).copied()??, &level.name))) {
            Some((mode, name)) => (mode, Some(name)),
            None => (self.mode, self.decided_by),
        }
    }

    pub(super) fn modes(&self) -> PortModes {
        let ports = self.workload.map(|level| &level.ports).into_iter().flatten();
        PortModes {
            default: self.mode,
            ports: ports.filter_map(|(port, mode)| Some((*port, (*mode)?))).collect(),
            judged: false,
        }
    }
}

/// Says which policies concern nobody, and which ports nobody listens on.
pub(super) fn check_selection<'a>(
    policies: impl Iterator<Item = &'a PeerAuthentication>,
    workloads: &Selectable<'_>,
    root_namespace: &str,
    warnings: &mut Vec<Warning>,
) {
    for policy in policies {
        let namespace = policy.metadata.namespace.as_deref().unwrap_or_default();
        if namespace == root_namespace {
            continue;
        }
        let name = name_of(&policy.metadata);
        let selected: Vec<&Workload> =
            workloads.selected(Some(namespace), policy.spec.selector.as_ref()).collect();
        if selected.is_empty() {
            warnings.push(Warning::peer_authentication(&name, Problem::SelectsNobody));
            continue;
        }
        for port in policy.spec.ports.keys() {
            if !selected.iter().any(|w| w.ports.iter().any(|(_, declared)| declared == port)) {
                let problem = Problem::UndeclaredPort { port: *port };
                warnings.push(Warning::peer_authentication(&name, problem));
            }
        }
    }
}

/// A policy without a timestamp counts as older than any with one: so does Go's zero time, which Istio compares.
fn age(policy: &PeerAuthentication) -> Option<Timestamp> {
    policy.metadata.creation_timestamp.as_ref().map(|time| time.0)
}

pub(super) fn enforced(policy: &&PeerAuthentication) -> bool {
    !is_dry_run(&policy.metadata)
}
