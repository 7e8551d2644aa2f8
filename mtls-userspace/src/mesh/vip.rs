//! One port of a Service: endpoints with their readiness in, one of them for each connection out, at flat cost.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use rand::Rng;

/// Endpoints by readiness, whether connections go to them or not.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Health {
    pub ready: usize,
    /// Shutting down but still answering: used where nobody is ready.
    pub draining: usize,
    pub not_ready: usize,
}

/// One (VIP, port).
#[derive(Debug)]
pub(super) struct Vip {
    endpoints: Vec<Endpoint>,
    locality: Locality,
    /// Places in `endpoints` by node and by zone, where locality asks for them.
    by_node: HashMap<Arc<str>, Vec<u32>>,
    by_zone: HashMap<Arc<str>, Vec<u32>>,
    health: Health,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Endpoint {
    pub address: SocketAddr,
    /// Its slice says that this is a pod: until the mesh knows that pod too, nobody can say whether it is enrolled.
    pub is_pod: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Locality {
    Anywhere,
    /// `trafficDistribution: PreferSameZone` (or its older name `PreferClose`), and hints that every endpoint has.
    SameZoneFirst,
    /// `trafficDistribution: PreferSameNode`.
    SameNodeFirst,
    /// `internalTrafficPolicy: Local`.
    SameNodeOnly,
}

/// Where a client is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Vantage<'a> {
    pub node: &'a str,
    pub zone: Option<&'a str>,
}

/// An endpoint while its readiness is judged.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    pub endpoint: Endpoint,
    pub node: Option<Arc<str>>,
    pub zone: Option<Arc<str>>,
    /// The zones whose clients it is meant for.
    pub hints: Box<[Arc<str>]>,
    pub readiness: Readiness,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Readiness {
    Ready,
    /// Shutting down but still answering: used when nobody is ready, as kube-proxy does.
    Draining,
    NotReady,
}

impl Vip {
    pub(super) fn new(locality: Locality, candidates: Vec<Candidate>) -> Self {
        let count =
            |readiness| candidates.iter().filter(|candidate| candidate.readiness == readiness).count();
        let health = Health {
            ready: count(Readiness::Ready),
            draining: count(Readiness::Draining),
            not_ready: count(Readiness::NotReady),
        };
        let used = if health.ready > 0 { Readiness::Ready } else { Readiness::Draining };
        let used: Vec<Candidate> = candidates.into_iter().filter(|it| it.readiness == used).collect();
        // Hints that only some have would leave the others without clients.
        let is_hinted = !used.is_empty() && used.iter().all(|it| !it.hints.is_empty());
        let locality = match locality {
            Locality::Anywhere if is_hinted => Locality::SameZoneFirst,
            asked => asked,
        };
        let endpoints = used.iter().map(|candidate| candidate.endpoint).collect();
        let mut vip = Self { endpoints, locality, by_node: HashMap::new(), by_zone: HashMap::new(), health };
        if locality == Locality::Anywhere {
            return vip;
        }
        for (at, candidate) in (0..).zip(used) {
            if let Some(node) = candidate.node {
                vip.by_node.entry(node).or_default().push(at);
            }
            let zones = if is_hinted { Vec::from(candidate.hints) } else { Vec::from_iter(candidate.zone) };
            for zone in zones {
                vip.by_zone.entry(zone).or_default().push(at);
            }
        }
        vip
    }

    pub(super) fn endpoints(&self) -> &[Endpoint] {
        &self.endpoints
    }

    pub(super) fn health(&self) -> Health {
        self.health
    }

    /// One of the endpoints that a client there may use and that are `usable`, each as likely as the others.
    pub(super) fn choose(&self, from: Vantage<'_>, usable: impl Fn(&Endpoint) -> bool) -> Option<&Endpoint> {
        let node = || self.among(self.by_node.get(from.node)?, &usable);
        let zone = || self.among(self.by_zone.get(from.zone?)?, &usable);
        let any = || pick(self.endpoints.len(), |at| self.endpoints.get(at).filter(|it| usable(it)));
        match self.locality {
            Locality::Anywhere => any(),
            Locality::SameZoneFirst => zone().or_else(any),
            Locality::SameNodeFirst => node().or_else(zone).or_else(any),
            Locality::SameNodeOnly => node(),
        }
    }

    /// Every endpoint that [`Self::choose`] may choose; of more than `most`, so many and one.
    pub(super) fn eligible(
        &self,
        from: Vantage<'_>,
        most: usize,
        usable: impl Fn(&Endpoint) -> bool,
    ) -> Vec<Endpoint> {
        let of = |places: &mut dyn Iterator<Item = &Endpoint>| {
            let found: Vec<Endpoint> = places.filter(|it| usable(it)).take(most + 1).copied().collect();
            (!found.is_empty()).then_some(found)
        };
        let at = |places: &Vec<u32>| of(&mut places.iter().filter_map(|at| self.endpoints.get(*at as usize)));
        let node = || self.by_node.get(from.node).and_then(at);
        let zone = || self.by_zone.get(from.zone?).and_then(at);
        let any = || of(&mut self.endpoints.iter());
        let found = match self.locality {
            Locality::Anywhere => any(),
            Locality::SameZoneFirst => zone().or_else(any),
            Locality::SameNodeFirst => node().or_else(zone).or_else(any),
            Locality::SameNodeOnly => node(),
        };
        found.unwrap_or_default()
    }

    fn among(&self, places: &[u32], usable: impl Fn(&Endpoint) -> bool) -> Option<&Endpoint> {
        pick(places.len(), |at| self.endpoints.get(*places.get(at)? as usize).filter(|it| usable(it)))
    }
}

/// A random one of those that are there.
fn pick<T>(count: usize, at: impl Fn(usize) -> Option<T>) -> Option<T> {
    let first = match count {
        0 => return None,
        1 => 0,
        several => rand::rng().random_range(0..several),
    };
    (first..count).chain(0..first).find_map(at)
}
