//! Enrolment: modes, then the fence, then listeners, then capture; release in the opposite order.
//!
//! Each step alone is safe to stop after: a pod is never captured without listeners, and never reachable without modes.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::Arc;

use ipnet::IpNet;
use mtls_common::{ListenerKey, Local, ModeKey, Pod, claim, listener, map};

use super::address::words;
use super::error::Error;
use super::kernel::Control;
use super::modes::{KernelModes, Step};
use super::netns::Netns;
use super::node::{Capture, captured, gone, on};
use super::pin::Pins;
use super::pod::LocalPod;
use super::{Enrolled, Enrolment, Listeners, listen, preflight};
use crate::policy::PortModes;

/// What the kernel holds, and a memory of it that spares reading it back.
pub(super) struct State {
    pub control: Control,
    pub captured: HashSet<IpNet>,
    modes: HashMap<u64, KernelModes>,
    /// Cgroups of enrolled pods, by netns cookie.
    cgroups: HashMap<u64, u64>,
    /// Cgroups the node's other pods have.
    untrusted: HashSet<u64>,
}

impl Capture {
    /// Fences a pod, opens its listeners and captures its connects. May be repeated, to change addresses or to get new
    /// listeners. After an error the pod stays as fenced as its modes say.
    pub fn enrol(&self, pod: &Enrolment<'_>) -> Result<Enrolled, Error> {
        let failed =
            |what| move |source| Error::Netns { pod: pod.name.into(), path: pod.netns.into(), what, source };
        let netns = Netns::open(pod.netns).map_err(failed("opening"))?;
        if netns.cookie() == self.host_netns {
            return Err(Error::HostNetwork { pod: pod.name.into() });
        }
        let cgroup = pod.cgroup.map(|path| self.visible_cgroup(pod.name, path)).transpose()?;
        let found = netns.addresses().map_err(failed("reading its addresses"))?;
        let sources =
            sources(pod.addresses, &found).ok_or_else(|| Error::NoAddress { pod: pod.name.into() })?;

        let mut state = self.state();
        state.set_cgroup(netns.cookie(), cgroup)?;
        state.set_modes(netns.cookie(), &KernelModes::from(pod.modes))?;
        state.claim(netns.cookie(), pod.addresses, &found)?;
        self.pins.lookup_link(pod.name, &netns, state.control.lookup.as_fd())?;
        let listeners = listen::listeners(pod.name, &netns, self.workers)?;
        state.steer(netns.cookie(), &listeners)?;
        let row = Pod { workers: self.workers as u32, ..sources };
        state.control.pods.insert(netns.cookie(), row, 0).map_err(on(map::PODS, "writing"))?;
        let pod = LocalPod { name: pod.name.into(), netns, flows: self.flows.clone(), destroy: self.destroy };
        Ok(Enrolled { pod: Arc::new(pod), listeners })
    }

    fn visible_cgroup(&self, pod: &str, path: &Path) -> Result<u64, Error> {
        let id = preflight::cgroup_id(path)?;
        let real = path.canonicalize().map_err(|source| Error::Cgroup { path: path.into(), source })?;
        if real.starts_with(&self.cgroup_root) {
            Ok(id)
        } else {
            Err(Error::OutOfSight { pod: pod.into(), path: path.into(), root: self.cgroup_root.clone() })
        }
    }

    /// Changes a pod's modes. No port is laxer in between than before and after.
    pub fn set_modes(&self, pod: &LocalPod, modes: &PortModes) -> Result<(), Error> {
        self.state().set_modes(pod.netns_cookie(), &KernelModes::from(modes))
    }

    /// Un-enrols a pod: its connections are plain TCP again, in both directions.
    pub fn release(&self, pod: &LocalPod) -> Result<(), Error> {
        self.state().release(pod.netns_cookie(), &self.pins)
    }
}

impl State {
    /// Takes up what earlier agents left.
    pub fn adopt(control: Control) -> Result<Self, Error> {
        let mut modes: HashMap<u64, KernelModes> = HashMap::new();
        for entry in control.modes.iter() {
            let (key, mode) = entry.map_err(on(map::MODES, "reading"))?;
            let step = if key.port == 0 { Step::Default(mode) } else { Step::Set(key.port, mode) };
            modes.entry(key.netns).or_default().apply(step);
        }
        // Until the pods' owner says otherwise, cgroups known to the earlier agent stay untrusted.
        let untrusted =
            control.pod_cgroups.keys().collect::<Result<_, _>>().map_err(on(map::POD_CGROUPS, "reading"))?;
        Ok(Self { captured: captured(&control), control, modes, cgroups: HashMap::new(), untrusted })
    }

    /// Netns cookies of every pod that has left a trace.
    pub fn pods(&self) -> Result<HashSet<u64>, Error> {
        let mut cookies: HashSet<u64> = self.modes.keys().copied().collect();
        for cookie in self.control.pods.keys() {
            cookies.insert(cookie.map_err(on(map::PODS, "reading"))?);
        }
        for entry in self.control.local.iter() {
            let (_, local) = entry.map_err(on(map::LOCAL, "reading"))?;
            cookies.extend((local.claim != claim::SHARED).then_some(local.netns));
        }
        Ok(cookies)
    }

    pub fn set_untrusted(&mut self, ids: HashSet<u64>) -> Result<(), Error> {
        self.untrusted = ids;
        self.write_cgroups()
    }

    fn set_cgroup(&mut self, cookie: u64, cgroup: Option<u64>) -> Result<(), Error> {
        match cgroup {
            Some(id) => self.cgroups.insert(cookie, id),
            None => self.cgroups.remove(&cookie),
        };
        self.write_cgroups()
    }

    fn write_cgroups(&mut self) -> Result<(), Error> {
        let wanted: HashSet<u64> = self.untrusted.iter().chain(self.cgroups.values()).copied().collect();
        let map = &mut self.control.pod_cgroups;
        let held: HashSet<u64> =
            map.keys().collect::<Result<_, _>>().map_err(on(map::POD_CGROUPS, "reading"))?;
        for id in wanted.difference(&held) {
            map.insert(id, 1, 0).map_err(on(map::POD_CGROUPS, "writing"))?;
        }
        for id in held.difference(&wanted) {
            gone(map.remove(id)).map_err(on(map::POD_CGROUPS, "writing"))?;
        }
        Ok(())
    }

    fn set_modes(&mut self, cookie: u64, target: &KernelModes) -> Result<(), Error> {
        let map = &mut self.control.modes;
        let key = |port| ModeKey { netns: cookie, port, pad: [0; 3] };
        let held = self.modes.entry(cookie).or_default();
        // A pod without a default is strict already; the entry says that somebody meant it.
        if map.get(&key(0), 0).is_err() {
            map.insert(key(0), held.default, 0).map_err(on(map::MODES, "writing"))?;
        }
        for step in held.steps_to(target) {
            let outcome = match step {
                Step::Default(mode) => map.insert(key(0), mode, 0),
                Step::Set(port, mode) => map.insert(key(port), mode, 0),
                Step::Unset(port) => gone(map.remove(&key(port))),
            };
            outcome.map_err(on(map::MODES, "writing"))?;
            held.apply(step);
        }
        Ok(())
    }

    /// Registers a pod's addresses. A manifest's claim wins over any other's; an address that was only found, and in
    /// several pods, identifies none of them, so that nothing from outside can come in by it.
    fn claim(&mut self, cookie: u64, manifest: &[IpAddr], found: &[IpAddr]) -> Result<(), Error> {
        let map = &mut self.control.local;
        let mut held = HashSet::new();
        for ip in manifest {
            let local = Local { netns: cookie, claim: claim::MANIFEST, pad: 0 };
            map.insert(words(*ip), local, 0).map_err(on(map::LOCAL, "writing"))?;
            held.insert(words(*ip));
        }
        for ip in found.iter().filter(|ip| !manifest.contains(ip)) {
            let local = match map.get(&words(*ip), 0) {
                Ok(other) if other.netns != cookie && other.claim != claim::FOUND => continue,
                Ok(other) if other.netns != cookie => Local { netns: 0, claim: claim::SHARED, pad: 0 },
                _ => Local { netns: cookie, claim: claim::FOUND, pad: 0 },
            };
            map.insert(words(*ip), local, 0).map_err(on(map::LOCAL, "writing"))?;
            held.insert(words(*ip));
        }
        self.disclaim(cookie, &held)
    }

    /// Drops a pod's addresses but those to keep.
    fn disclaim(&mut self, cookie: u64, keep: &HashSet<[u32; 4]>) -> Result<(), Error> {
        let map = &mut self.control.local;
        let rows = map.iter().collect::<Result<Vec<_>, _>>().map_err(on(map::LOCAL, "reading"))?;
        for (addr, _) in rows.iter().filter(|(addr, local)| local.netns == cookie && !keep.contains(addr)) {
            gone(map.remove(addr)).map_err(on(map::LOCAL, "writing"))?;
        }
        Ok(())
    }

    fn steer(&mut self, cookie: u64, listeners: &[Listeners]) -> Result<(), Error> {
        let map = &mut self.control.listeners;
        for (worker, listeners) in (0u16..).zip(listeners) {
            for (kind, listener) in [
                (listener::OUTBOUND, &listeners.outbound),
                (listener::TUNNEL, &listeners.inbound),
                (listener::PLAINTEXT, &listeners.plaintext),
            ] {
                let key = ListenerKey { netns: cookie, kind, worker, pad: 0 };
                map.insert(key, listener.as_raw_fd(), 0).map_err(on(map::LISTENERS, "writing"))?;
            }
        }
        Ok(())
    }

    pub fn release(&mut self, cookie: u64, pins: &Pins) -> Result<(), Error> {
        gone(self.control.pods.remove(&cookie)).map_err(on(map::PODS, "writing"))?;
        pins.drop_lookup(cookie)?;
        self.disclaim(cookie, &HashSet::new())?;
        let modes = &mut self.control.modes;
        let keys = modes.keys().collect::<Result<Vec<_>, _>>().map_err(on(map::MODES, "reading"))?;
        for key in keys.iter().filter(|key| key.netns == cookie) {
            gone(modes.remove(key)).map_err(on(map::MODES, "writing"))?;
        }
        self.modes.remove(&cookie);
        let listeners = &mut self.control.listeners;
        let keys = listeners.keys().collect::<Result<Vec<_>, _>>().map_err(on(map::LISTENERS, "reading"))?;
        for key in keys.iter().filter(|key| key.netns == cookie) {
            gone(listeners.remove(key)).map_err(on(map::LISTENERS, "writing"))?;
        }
        self.set_cgroup(cookie, None)
    }
}

/// The addresses that captured connections come from: the first of each family, the manifest's before those found.
fn sources(manifest: &[IpAddr], found: &[IpAddr]) -> Option<Pod> {
    let first = |is_wanted: fn(&IpAddr) -> bool| manifest.iter().chain(found).copied().find(is_wanted);
    let (v4, v6) = (first(IpAddr::is_ipv4), first(IpAddr::is_ipv6));
    v4.or(v6)?;
    Some(Pod {
        addr4_be: v4.map(words).unwrap_or_default(),
        addr6_be: v6.map(words).unwrap_or_default(),
        ..Pod::default()
    })
}
