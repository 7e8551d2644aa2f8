//! Pods: manifests in, [`Workload`]s out. Decides who is enrolled and which pod owns an address.

use std::cmp::Ordering;
use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Container, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};

use super::error::{Error, InvalidAddress};
use super::interner::Interner;
use super::objects::{Key, Objects, Placed, Stripped, called, namespace};
use super::vip::Readiness;
use super::{Settings, Warning, Workload};

/// Namespace and pod label that enrols: `ambient`. On a pod, `none` opts out.
const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";
/// Of the API's image of a static pod: the UID that kubelet gave the pod itself.
const STATIC_UID: &str = "kubernetes.io/config.hash";
const STATIC: &str = "kubernetes.io/config.mirror";
const NETNS: &str = "mtls.dev/netns";
const CGROUP: &str = "mtls.dev/cgroup";

/// What the pods of all files are together.
#[derive(Default)]
pub(super) struct Pods {
    pub workloads: Vec<Arc<Workload>>,
    /// Bound to a node, and without an address yet.
    pub starting: Vec<Arc<Workload>>,
    pub by_address: HashMap<IpAddr, Arc<Workload>>,
    /// Of `workloads`, in their order.
    pub readiness: Vec<Readiness>,
    /// Addresses that more than one pod has.
    pub claims: Vec<Warning>,
}

impl Pods {
    /// Decides who is enrolled and whose an address is.
    ///
    /// # Errors
    ///
    /// When two pods have the same address and neither is newer.
    pub(super) fn settle(files: &mut [&mut Objects]) -> Result<Self, Error> {
        let enrolling: HashSet<Arc<str>> = files
            .iter()
            .flat_map(|file| file.namespaces.iter().filter(|it| it.object).map(|it| it.key.name.clone()))
            .collect();
        for pod in files.iter_mut().flat_map(|file| &mut file.pods) {
            if let Some(written) = &mut pod.object {
                written.single.live_in(enrolling.contains(&pod.key.namespace));
            }
        }
        let mut pods = Self::default();
        let mut candidates = Vec::new();
        for file in files.iter().map(|file| &**file) {
            for pod in &file.pods {
                match &pod.object {
                    // A pod gets its address after it is scheduled; until then nobody can reach it.
                    Some(written) if written.single.workload.addresses.is_empty() => {
                        pods.starting.push(written.single.workload.clone());
                    }
                    Some(written) => candidates.push(Candidate { file, pod, written }),
                    None => {}
                }
            }
        }
        let mut lost = pods.lost(&candidates)?;
        pods.by_address.reserve(candidates.len());
        for (at, Candidate { written, .. }) in candidates.iter().enumerate() {
            let mut workload = written.single.workload.clone();
            if let Some(lost) = lost.remove(&at) {
                Arc::make_mut(&mut workload).addresses.retain(|address| !lost.contains(address));
            }
            if workload.addresses.is_empty() {
                continue;
            }
            if !written.single.host_network {
                let owned = workload.addresses.iter().map(|address| (*address, workload.clone()));
                pods.by_address.extend(owned);
            }
            pods.readiness.push(written.readiness);
            pods.workloads.push(workload);
        }
        Ok(pods)
    }

    /// Gives each address to one pod, the newest that claims it, and says which pods lost which. A wrong owner would be
    /// a wrong identity, so without a way to tell the claim is an error.
    fn lost(&mut self, candidates: &[Candidate<'_>]) -> Result<Lost, Error> {
        let mut owners: HashMap<IpAddr, usize> = HashMap::with_capacity(candidates.len());
        let mut lost = Lost::new();
        for (at, candidate) in candidates.iter().enumerate() {
            if candidate.written.single.host_network {
                continue;
            }
            for address in &candidate.written.single.workload.addresses {
                let mut owner = match owners.entry(*address) {
                    Entry::Vacant(vacant) => {
                        vacant.insert(at);
                        continue;
                    }
                    Entry::Occupied(owner) => owner,
                };
                let Some(other) = candidates.get(*owner.get()) else { continue };
                let loser = match candidate.created().cmp(&other.created()) {
                    Ordering::Greater => owner.insert(at),
                    Ordering::Less => at,
                    Ordering::Equal => {
                        return Err(Error::ClaimedAddress {
                            address: *address,
                            first: other.pod.key.to_string().into(),
                            first_place: other.file.place(other.pod.spot),
                            second: candidate.pod.key.to_string().into(),
                            second_place: candidate.file.place(candidate.pod.spot),
                        });
                    }
                };
                let (newer, older) = if loser == at { (other, candidate) } else { (candidate, other) };
                self.claims.push(Warning::ClaimedAddress {
                    address: *address,
                    newer: newer.pod.key.to_string(),
                    older: older.pod.key.to_string(),
                });
                lost.entry(loser).or_default().push(*address);
            }
        }
        Ok(lost)
    }
}

/// By a candidate's place, the addresses that it lost.
type Lost = HashMap<usize, Vec<IpAddr>>;

/// A pod that claims addresses.
struct Candidate<'o> {
    file: &'o Objects,
    pod: &'o Stripped<Option<WrittenPod>>,
    written: &'o WrittenPod,
}

impl Candidate<'_> {
    fn created(&self) -> Moment {
        self.written.single.age.created
    }
}

/// A namespace's label that enrols its pods.
pub(super) fn enrols(namespace: &ObjectMeta) -> bool {
    namespace.labels.as_ref().and_then(|labels| labels.get(DATAPLANE_MODE)).is_some_and(|it| it == "ambient")
}

/// Whether a pod is enrolled, in a namespace that enrols or not.
fn takes_part(pod: &Pod, enrolled_namespace: bool) -> bool {
    let mode = pod.metadata.labels.as_ref().and_then(|labels| labels.get(DATAPLANE_MODE));
    !host_network(pod)
        && match mode.map(String::as_str) {
            Some("none") => false,
            Some("ambient") => true,
            _ => enrolled_namespace,
        }
}

/// One pod by itself, without regard to others.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Single {
    pub workload: Arc<Workload>,
    /// Whether it is enrolled in a namespace that enrols, and in one that does not.
    there: bool,
    elsewhere: bool,
    pub host_network: bool,
    /// The newer of two pods that have the same address is the one that has it.
    pub age: Age,
}

/// A pod of a manifest: where no slice says whether it is ready, it says so itself.
#[derive(Debug)]
pub(super) struct WrittenPod {
    pub single: Single,
    pub readiness: Readiness,
}

impl WrittenPod {
    /// As [`Single::read`].
    pub(super) fn read(
        placed: &Placed<Pod>,
        settings: &Settings,
        interner: &mut Interner,
    ) -> Result<Option<Self>, Error> {
        let single = Single::read(placed, settings, interner)?;
        Ok(single.map(|single| Self { single, readiness: readiness(&placed.object) }))
    }

    pub(super) fn key(&self) -> Key {
        let Workload { namespace, name, .. } = &*self.single.workload;
        Key { namespace: namespace.clone(), name: name.clone() }
    }
}

/// A pod manifest without conditions counts as ready: outside Kubernetes nobody probes it.
fn readiness(pod: &Pod) -> Readiness {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    let ready = match conditions.filter(|conditions| !conditions.is_empty()) {
        None => true,
        Some(conditions) => conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True"),
    };
    match (ready, pod.metadata.deletion_timestamp.is_some()) {
        (true, false) => Readiness::Ready,
        (true, true) => Readiness::Draining,
        (false, _) => Readiness::NotReady,
    }
}

/// Ordered from the one that has lost its address to the one that has it now.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Age {
    stays: bool,
    created: Moment,
    started: Moment,
}

/// In microseconds since 1970; one that is not known is before all others.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Moment(i64);

impl Moment {
    fn of(time: Option<&Time>) -> Self {
        Self(time.map_or(i64::MIN, |time| time.0.as_microsecond()))
    }
}

impl Single {
    /// `None` for a pod that has neither address nor node, or has them no longer.
    pub(super) fn read(
        placed: &Placed<Pod>,
        settings: &Settings,
        interner: &mut Interner,
    ) -> Result<Option<Self>, Error> {
        let pod = &placed.object;
        if is_finished(pod) {
            return Ok(None);
        }
        let workload = workload(placed, addresses(placed)?, settings, interner)?;
        if workload.addresses.is_empty() && workload.node.is_none() {
            return Ok(None);
        }
        let metadata = &pod.metadata;
        let started = pod.status.as_ref().and_then(|status| status.start_time.as_ref());
        Ok(Some(Self {
            workload: Arc::new(workload),
            there: takes_part(pod, true),
            elsewhere: takes_part(pod, false),
            host_network: host_network(pod),
            age: Age {
                stays: metadata.deletion_timestamp.is_none(),
                created: Moment::of(metadata.creation_timestamp.as_ref()),
                started: Moment::of(started),
            },
        }))
    }

    /// Follows its namespace's label. Returns whether that changes anything.
    pub(super) fn live_in(&mut self, enrolling: bool) -> bool {
        let enrolled = if enrolling { self.there } else { self.elsewhere };
        let changes = self.workload.enrolled != enrolled;
        if changes {
            Arc::make_mut(&mut self.workload).enrolled = enrolled;
        }
        changes
    }
}

/// Kubernetes may give the address of a finished pod to another one.
fn is_finished(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

fn host_network(pod: &Pod) -> bool {
    pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or(false)
}

fn addresses(placed: &Placed<Pod>) -> Result<Vec<IpAddr>, Error> {
    let Some(status) = &placed.object.status else { return Ok(Vec::new()) };
    let listed = status.pod_ips.iter().flatten().map(|pod_ip| ("status.podIPs", &pod_ip.ip));
    let mut addresses = Vec::new();
    for (field, text) in status.pod_ip.iter().map(|ip| ("status.podIP", ip)).chain(listed) {
        let address = parse_address(text).map_err(|problem| Error::Address {
            place: placed.place.clone(),
            object: called("Pod", &placed.object.metadata),
            field,
            problem,
        })?;
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    addresses.shrink_to_fit();
    Ok(addresses)
}

pub(super) fn parse_address(text: &str) -> Result<IpAddr, InvalidAddress> {
    let address: Result<IpAddr, _> = text.parse();
    address.map(|a| a.to_canonical()).map_err(|_| InvalidAddress::NotAnAddress { text: text.to_owned() })
}

/// Not enrolled; that is for the caller to say.
fn workload(
    placed: &Placed<Pod>,
    addresses: Vec<IpAddr>,
    settings: &Settings,
    interner: &mut Interner,
) -> Result<Workload, Error> {
    let metadata = &placed.object.metadata;
    let spec = placed.object.spec.as_ref();
    let service_account = named(spec.and_then(|s| s.service_account_name.as_ref()))
        .or_else(|| named(spec.and_then(|s| s.service_account.as_ref())))
        .unwrap_or("default");
    let identity = interner.identity(&settings.trust_domain, namespace(metadata), service_account).map_err(
        |problem| Error::Identity { place: placed.place.clone(), object: called("Pod", metadata), problem },
    )?;
    let labels = interner.labels(metadata.labels.clone().unwrap_or_default());
    let name: Arc<str> = named(metadata.name.as_ref()).unwrap_or_default().into();
    let app = labels.get("app").or_else(|| labels.get("app.kubernetes.io/name"));
    Ok(Workload {
        namespace: identity.namespace().clone(),
        service_account: identity.service_account().clone(),
        app: app.map_or_else(|| name.clone(), |app| interner.text(app)),
        name,
        uid: uid(metadata).map(Arc::from),
        node: named(spec.and_then(|s| s.node_name.as_ref())).map(|node| interner.text(node)),
        addresses,
        labels,
        enrolled: false,
        identity,
        ports: ports(placed, interner)?,
        netns: path(placed, NETNS)?,
        cgroup: path(placed, CGROUP)?,
    })
}

fn uid(metadata: &ObjectMeta) -> Option<&str> {
    let annotation = |name| metadata.annotations.as_ref().and_then(|annotations| annotations.get(name));
    // A digest without dashes, so that nobody can annotate a pod with the UID of another one.
    let is_digest = |text: &&str| text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let of_static_pod = annotation(STATIC).and_then(|_| named(annotation(STATIC_UID))).filter(is_digest);
    of_static_pod.or_else(|| named(metadata.uid.as_ref()))
}

/// Takes away what a pod says of where it lives: whoever may make a pod may annotate it, and must not lead us into
/// another pod's network namespace.
pub(super) fn forget_annotated_place(metadata: &mut ObjectMeta) {
    if let Some(annotations) = &mut metadata.annotations {
        annotations.retain(|name, _| name != NETNS && name != CGROUP);
    }
}

fn named(name: Option<&String>) -> Option<&str> {
    name.filter(|name| !name.is_empty()).map(String::as_str)
}

type NamedPort = (Option<Arc<str>>, u16);

fn ports(placed: &Placed<Pod>, interner: &mut Interner) -> Result<Vec<NamedPort>, Error> {
    let spec = placed.object.spec.as_ref();
    // Of the init containers only sidecars serve while the pod runs.
    let sidecar = |c: &&Container| c.restart_policy.as_deref() == Some("Always");
    let sidecars = spec.and_then(|s| s.init_containers.as_ref()).into_iter().flatten().filter(sidecar);
    let ports: Result<Vec<NamedPort>, Error> = spec
        .iter()
        .flat_map(|s| &s.containers)
        .chain(sidecars)
        .flat_map(|container| container.ports.iter().flatten())
        .filter(|port| port.protocol.as_deref().unwrap_or("TCP") == "TCP")
        .map(|port| {
            let number = parse_port(port.container_port.into()).map_err(|problem| Error::Address {
                place: placed.place.clone(),
                object: called("Pod", &placed.object.metadata),
                field: "spec.containers.ports.containerPort",
                problem,
            })?;
            Ok((port.name.as_deref().map(|name| interner.text(name)), number))
        })
        .collect();
    ports.map(|mut ports| {
        ports.shrink_to_fit();
        ports
    })
}

pub(super) fn parse_port(port: i64) -> Result<u16, InvalidAddress> {
    u16::try_from(port).ok().filter(|port| *port > 0).ok_or(InvalidAddress::NotAPort { port })
}

fn path(placed: &Placed<Pod>, annotation: &'static str) -> Result<Option<Box<Path>>, Error> {
    let annotations = placed.object.metadata.annotations.as_ref();
    let Some(value) = annotations.and_then(|annotations| annotations.get(annotation)) else {
        return Ok(None);
    };
    if !value.starts_with('/') {
        return Err(Error::PathAnnotation {
            place: placed.place.clone(),
            object: called("Pod", &placed.object.metadata),
            annotation,
            value: value.clone(),
        });
    }
    Ok(Some(Path::new(value).into()))
}
