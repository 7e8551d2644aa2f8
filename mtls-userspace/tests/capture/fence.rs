//! What plaintext a pod lets in: by mode, by who dials, with and without an agent.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::time::Duration;

use mtls::capture::{Error, EventKind};
use mtls::policy::{Mode, PortModes};

use crate::lab::{Agent, lab};
use crate::{Pair, all, at, counter, prefixes};

#[test]
fn strict_refuses_plaintext_at_once_and_permissive_takes_it() {
    let Some(lab) = lab() else { return };
    let pair = Pair::new(&lab);
    let stranger = lab.pod("stranger");
    let _server = pair.server.serve(&["v4:8080", "dual:8081", "v4:8090"]);
    let mut events = pair.capture.events().expect("the first to ask");
    assert!(pair.capture.events().is_none());

    for to in [at(pair.server.v4, 8080), at(pair.server.v4, 8081), at(pair.server.v6, 8081)] {
        let refused = stranger.dial("plain", to);
        assert_eq!(refused.error(), "ECONNREFUSED", "{to}");
        assert!(refused.seconds() < 0.5, "{refused:?}");
    }
    assert_eq!(pair.counter("strict_refused"), 3);

    pair.capture.set_modes(&pair.local, &all(Mode::Permissive)).unwrap();
    for (to, own) in [(at(pair.server.v4, 8080), stranger.v4), (at(pair.server.v6, 8081), stranger.v6)] {
        stranger.dial("plain", to).is_transparent(own, to);
    }
    assert_eq!(pair.counter("plaintext_accepted"), 2);

    let one =
        PortModes { default: Mode::Disable, ports: BTreeMap::from([(8090, Mode::Strict)]), judged: false };
    pair.capture.set_modes(&pair.local, &one).unwrap();
    assert!(stranger.dial("plain", at(pair.server.v4, 8080)).is_ok());
    assert_eq!(stranger.dial("plain", at(pair.server.v4, 8090)).error(), "ECONNREFUSED");
    // What is captured comes in, whatever the mode.
    assert!(pair.client.dial("plain", at(pair.server.v4, 8090)).is_ok());

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let seen: Vec<_> = runtime.block_on(async {
        let mut seen = Vec::new();
        for _ in 0..7 {
            let event = tokio::time::timeout(Duration::from_secs(5), events.next()).await.unwrap().unwrap();
            assert!(event.at.elapsed().unwrap() < Duration::from_secs(60));
            seen.push((event.kind, event.local, event.remote.ip()));
        }
        seen
    });
    assert_eq!(seen[0], (EventKind::PlaintextRefused, at(pair.server.v4, 8080), stranger.v4));
    assert_eq!(seen[2], (EventKind::PlaintextRefused, at(pair.server.v6, 8081), stranger.v6));
    assert_eq!(seen[3], (EventKind::PlaintextAccepted, at(pair.server.v4, 8080), stranger.v4));
    assert_eq!(seen[6], (EventKind::PlaintextRefused, at(pair.server.v4, 8090), stranger.v4));
}

#[test]
fn the_nodes_own_probe_reaches_a_strict_pod_and_nobody_elses_does() {
    let Some(lab) = lab() else { return };
    let pair = Pair::new(&lab);
    let (kubelet, guest, stranger) = (lab.host("kubelet"), lab.host("guest"), lab.pod("stranger"));
    let _server = pair.server.serve(&["v4:8080", "dual:8081"]);
    pair.capture.set_untrusted_cgroups(std::slice::from_ref(&guest.cgroup)).unwrap();

    for (to, own) in [(at(pair.server.v4, 8080), kubelet.v4), (at(pair.server.v6, 8081), kubelet.v6)] {
        kubelet.dial("plain", to).is_transparent(own, to);
        kubelet.dial("nonblocking", to).is_transparent(own, to);
        // A pod on the host network shares the namespace and the address, not the trust.
        assert_eq!(guest.dial("plain", to).error(), "ECONNREFUSED");
        assert_eq!(stranger.dial("plain", to).error(), "ECONNREFUSED");
    }
    assert_eq!(pair.counter("trusted_accepted"), 4);

    // Below a pod's cgroup is in it; and what is untrusted no longer is trusted again.
    let nested = guest.cgroup.join("nested");
    std::fs::create_dir(&nested).unwrap();
    let nested = crate::Pod { cgroup: nested, ..crate::lab::clone(&guest) };
    assert_eq!(nested.dial("plain", at(pair.server.v4, 8080)).error(), "ECONNREFUSED");
    pair.capture.set_untrusted_cgroups(&[]).unwrap();
    assert!(nested.dial("plain", at(pair.server.v4, 8080)).is_ok());
    // An enrolled pod's cgroup is never trusted, listed or not.
    let escaped = crate::Pod { cgroup: pair.client.cgroup.clone(), ..crate::lab::clone(&guest) };
    assert_eq!(escaped.dial("plain", at(pair.server.v4, 8080)).error(), "ECONNREFUSED");
    std::thread::sleep(Duration::from_millis(50));
    let _ = std::fs::remove_dir(&nested.cgroup);

    let missing = PathBuf::from("/sys/fs/cgroup/none-such");
    let error = pair.capture.set_untrusted_cgroups(&[missing, guest.cgroup.clone()]).unwrap_err();
    assert!(error.to_string().contains("none-such"), "{error}");
    assert_eq!(guest.dial("plain", at(pair.server.v4, 8080)).error(), "ECONNREFUSED");
}

#[test]
fn ports_of_the_agent_are_for_those_they_are_meant_for() {
    let Some(lab) = lab() else { return };
    let (server, stranger) = (lab.pod("server"), lab.pod("stranger"));
    let capture = lab.start().unwrap();
    let enrolled = server.enrol(&capture, &all(Mode::Permissive));
    for port in [15001, 15006] {
        assert_eq!(stranger.dial("plain", at(server.v4, port)).error(), "ECONNREFUSED", "{port}");
    }
    assert_eq!(counter(&capture, "reserved_port"), 2);
    let mut tunnel = stranger.client("hold", at(server.v4, 15008), "");
    let accepted = loop {
        match enrolled.listeners.iter().find_map(|listeners| listeners.inbound.accept().ok()) {
            Some((stream, _)) => break stream,
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    assert_eq!(accepted.local_addr().unwrap().port(), 15008);
    drop(accepted);
    assert_eq!(tunnel.seen().end(), "");
    // Without listeners there is nobody, and no fallback to whoever might listen there.
    drop(enrolled);
    assert_eq!(stranger.dial("plain", at(server.v4, 15008)).error(), "ECONNREFUSED");
    assert_eq!(counter(&capture, "no_listener"), 1);
}

#[test]
fn without_its_listener_a_captured_connection_is_refused() {
    let Some(lab) = lab() else { return };
    let (client, server) = (lab.pod("client"), lab.pod("server"));
    let capture = lab.start().unwrap();
    capture.set_captured(&prefixes()).unwrap();
    let _app = server.serve(&["v4:8080", "dual:8081"]);
    drop(client.enrol(&capture, &all(Mode::Permissive)));
    for (how, to, detail) in [
        ("plain", at(server.v4, 8080), ""),
        ("plain", at(server.v6, 8081), ""),
        ("device", at(server.v4, 8080), "eth0"),
    ] {
        assert_eq!(client.dial_with(how, to, detail).error(), "ECONNREFUSED", "{how} {to}");
    }
}

#[test]
fn nothing_opens_while_no_agent_runs_and_the_next_one_takes_over() {
    let Some(lab) = lab() else { return };
    let pair = Pair::new(&lab);
    let stranger = lab.pod("stranger");
    let _app = pair.server.serve(&["v4:8080"]);
    let to = at(pair.server.v4, 8080);
    pair.client.dial("plain", to).is_transparent(pair.client.v4, to);
    let captured = pair.counter("captured");

    let Pair { capture, agent, client, server, local, client_local } = pair;
    drop((capture, agent, local, client_local));
    assert_eq!(stranger.dial("plain", to).error(), "ECONNREFUSED", "plaintext");
    assert_eq!(client.dial("plain", to).error(), "ECONNREFUSED", "captured");

    let capture = lab.start().unwrap();
    assert_eq!(stranger.dial("plain", to).error(), "ECONNREFUSED", "adopted, not enrolled yet");
    assert_eq!(counter(&capture, "captured"), captured + 1, "counters live on");
    let enrolled = server.enrol(&capture, &all(Mode::Strict));
    let agent = Agent::run(client.enrol(&capture, &all(Mode::Strict)), &[(&server, &enrolled.pod)]);
    client.dial("plain", to).is_transparent(client.v4, to);
    assert_eq!(agent.delivered(), 1);
    assert_eq!(stranger.dial("plain", to).error(), "ECONNREFUSED");
}

#[test]
fn a_new_agent_takes_over_while_the_old_one_still_runs() {
    let Some(lab) = lab() else { return };
    let pair = Pair::new(&lab);
    let _app = pair.server.serve(&["v4:8080", "hold:8090"]);
    let to = at(pair.server.v4, 8080);
    let mut open = pair.client.client("hold", at(pair.server.v4, 8090), "");
    assert!(open.seen().is_ok());
    let next = lab.start().unwrap();
    let enrolled = pair.server.enrol(&next, &all(Mode::Strict));
    let agent = Agent::run(pair.client.enrol(&next, &all(Mode::Strict)), &[(&pair.server, &enrolled.pod)]);
    for _ in 0..8 {
        pair.client.dial("plain", to).is_transparent(pair.client.v4, to);
    }
    assert_eq!((pair.agent.delivered(), agent.delivered()), (1, 8));
}

#[test]
fn a_released_pod_is_an_ordinary_one() {
    let Some(lab) = lab() else { return };
    let pair = Pair::new(&lab);
    let stranger = lab.pod("stranger");
    let _app = pair.server.serve(&["v4:8080"]);
    let to = at(pair.server.v4, 8080);
    assert_eq!(stranger.dial("plain", to).error(), "ECONNREFUSED");
    pair.capture.release(&pair.local).unwrap();
    stranger.dial("plain", to).is_transparent(stranger.v4, to);
    pair.capture.release(&pair.client_local).unwrap();
    pair.client.dial("plain", to).is_transparent(pair.client.v4, to);
    assert_eq!(pair.agent.delivered(), 0);
}

#[test]
fn only_the_pods_that_are_wanted_stay() {
    let Some(lab) = lab() else { return };
    let pair = Pair::new(&lab);
    let stranger = lab.pod("stranger");
    let (_app, _other) = (pair.server.serve(&["v4:8080"]), pair.client.serve(&["v4:8080"]));
    let wanted = HashSet::from([pair.local.netns_cookie()]);
    drop(pair.capture);
    let capture = lab.start().unwrap();
    assert_eq!(capture.retain(&wanted).unwrap(), 1);
    assert_eq!(stranger.dial("plain", at(pair.server.v4, 8080)).error(), "ECONNREFUSED", "wanted");
    assert!(stranger.dial("plain", at(pair.client.v4, 8080)).is_ok(), "not wanted");
    assert_eq!(capture.retain(&wanted).unwrap(), 0);
}

#[test]
fn a_change_to_strict_ends_open_plaintext_and_nothing_else() {
    let Some(lab) = lab() else { return };
    let pair = Pair::new(&lab);
    let (stranger, kubelet) = (lab.pod("stranger"), lab.host("kubelet"));
    let _app = pair.server.serve(&["hold:8080", "hold:8090"]);
    let _far = stranger.serve(&["hold:8070"]);
    pair.capture.set_modes(&pair.local, &all(Mode::Permissive)).unwrap();
    pair.capture.set_captured(&["10.77.0.3/32".parse().unwrap()]).unwrap();
    let to = at(pair.server.v4, 8080);
    let mut plain = stranger.client("hold", to, "");
    let mut spared = stranger.client("hold", at(pair.server.v4, 8090), "");
    let mut probe = kubelet.client("hold", to, "");
    let mut captured = pair.client.client("hold", to, "");
    let mut own = pair.server.client("hold", to, "");
    let mut outgoing = pair.server.client("hold", at(stranger.v4, 8070), "");
    for client in [&mut plain, &mut spared, &mut probe, &mut captured, &mut own, &mut outgoing] {
        assert!(client.seen().is_ok());
    }
    assert_eq!(pair.agent.delivered(), 1);
    let strict =
        PortModes { default: Mode::Permissive, ports: BTreeMap::from([(8080, Mode::Strict)]), judged: false };
    pair.capture.set_modes(&pair.local, &strict).unwrap();
    assert_eq!(pair.local.reset_plaintext(&|port| strict.of(port) == Mode::Strict).unwrap(), 1);
    assert_eq!(plain.seen().end(), "ECONNRESET");
    for (name, client) in [
        ("another port", &mut spared),
        ("probe", &mut probe),
        ("captured", &mut captured),
        ("own", &mut own),
        ("outgoing", &mut outgoing),
    ] {
        assert_eq!(client.seen().end(), "open", "{name}");
    }
}

#[test]
fn what_cannot_be_enrolled_says_why() {
    let Some(lab) = lab() else { return };
    let pod = lab.pod("server");
    let capture = lab.start().unwrap();
    let modes = all(Mode::Strict);
    let addresses = [pod.v4];

    let mut wrong = pod.enrolment(&addresses, &modes);
    wrong.netns = "/run/netns/none-such".as_ref();
    assert!(matches!(capture.enrol(&wrong), Err(Error::Netns { path, .. }) if path.ends_with("none-such")));
    wrong.netns = &pod.netns;
    wrong.cgroup = Some("/sys/fs/cgroup/none-such".as_ref());
    assert!(matches!(capture.enrol(&wrong), Err(Error::Cgroup { path, .. }) if path.ends_with("none-such")));
    let unseen = cgroup_outside(&pod.cgroup);
    wrong.cgroup = Some(&unseen.0);
    assert!(matches!(capture.enrol(&wrong), Err(Error::OutOfSight { .. })));
    let host = lab.host("host");
    wrong.netns = &host.netns;
    wrong.cgroup = None;
    assert!(matches!(capture.enrol(&wrong), Err(Error::HostNetwork { pod }) if pod == "lab/server"));

    let taken = pod.serve(&["dual:15008"]);
    let error = capture.enrol(&pod.enrolment(&addresses, &modes)).err().expect("the port is taken");
    assert!(matches!(error, Error::PortTaken { port: 15008, .. }), "{error}");
    assert!(error.to_string().contains("lab/server"), "{error}");
    // Fenced all the same.
    let stranger = lab.pod("stranger");
    let _app = pod.serve(&["v4:8080"]);
    assert_eq!(stranger.dial("plain", at(pod.v4, 8080)).error(), "ECONNREFUSED");
    drop(taken);
    assert_eq!(pod.enrol(&capture, &modes).listeners.len(), 2);
}

struct Outside(PathBuf);

fn cgroup_outside(cgroup: &std::path::Path) -> Outside {
    let lab = cgroup.parent().unwrap();
    let path = lab.with_file_name(format!("{}-outside", lab.file_name().unwrap().to_str().unwrap()));
    std::fs::create_dir(&path).unwrap();
    Outside(path)
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[test]
fn a_machine_that_lacks_something_is_told_what() {
    let Some(lab) = lab() else { return };
    let error = |change: &dyn Fn(&mut mtls::capture::Config)| {
        let mut config = lab.config();
        change(&mut config);
        lab.on_node(move || mtls::capture::Capture::start(config)).err().expect("it lacks something")
    };
    let no_bpffs = error(&|config| config.bpffs = "/tmp/none-such".into());
    assert!(
        matches!(no_bpffs, Error::NotBpffs { .. }) && no_bpffs.to_string().contains("mount -t bpf"),
        "{no_bpffs}"
    );
    let no_cgroup = error(&|config| config.cgroup_root = Some("/tmp".into()));
    assert!(matches!(no_cgroup, Error::NotCgroup { .. }), "{no_cgroup}");
    let unknown = error(&|config| config.congestion = Some("none-such".into()));
    assert!(matches!(unknown, Error::UnknownCongestion { .. }), "{unknown}");
    let elsewhere = lab.host("elsewhere");
    let not_seen = error(&|config| config.cgroup_root = Some(elsewhere.cgroup.clone()));
    assert!(matches!(not_seen, Error::NotSeen { .. }), "{not_seen}");
}
