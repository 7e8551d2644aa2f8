//! Identities from a SPIFFE Workload API, which the lab serves on a unix socket.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mtls::identity::{Identities, Identity, SpiffeId, WorkloadApi};
use mtls_tests::{Said, Spire, SpireAuthority, Svid};
use rcgen::KeyPair;

use crate::bench::*;

/// A SPIRE agent, and this node's agent, which wants `shop/cart`.
struct Node {
    spire: Spire,
    _dir: tempfile::TempDir,
}

impl Node {
    fn told(said: Said) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { spire: Spire::start(dir.path().join("agent.sock"), said).unwrap(), _dir: dir }
    }

    fn agent(&self) -> Arc<Identities> {
        let api = WorkloadApi::new(&format!("unix://{}", self.spire.socket().display())).unwrap();
        let identities = Identities::from_workload_api(api, quick());
        identities.want(HashSet::from([cart()]));
        tokio::spawn(identities.clone().run(std::future::pending()));
        identities
    }
}

fn authority(name: &str) -> SpireAuthority {
    SpireAuthority::new(name).unwrap()
}

fn svid(by: &SpireAuthority, id: &SpiffeId, life: Duration, roots: &[&SpireAuthority]) -> Svid {
    by.svid(id.uri(), life, roots).unwrap()
}

async fn until(what: &str, mut reached: impl FnMut() -> bool) {
    let started = Instant::now();
    while !reached() {
        assert!(started.elapsed() < Duration::from_secs(20), "never came: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn serial(identity: &Identity) -> &str {
    &identity.svid.serial
}

#[tokio::test]
async fn of_several_identities_the_nodes_own_are_taken_and_followed() {
    let (old, new) = (authority("old"), authority("new"));
    let node = Node::told(Some(vec![svid(&old, &db(), DAY, &[&old]), svid(&old, &cart(), DAY, &[&old])]));
    let identities = node.agent();
    let first = identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
    assert!(first.verify().is_ok() && first.bundle.roots.len() == 1);
    assert!(identities.current(&db()).is_none(), "nobody here is the other identity");

    // The same again is no change; a new certificate is one, and so is a root beside the old.
    let now = node.spire.said();
    node.spire.say(now);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(identities.current(&cart()).unwrap().version, first.version);
    node.spire.say(Some(vec![svid(&old, &cart(), DAY, &[&old, &new])]));
    let current = || identities.current(&cart()).expect("an identity at every moment");
    until("the renewed certificate", || serial(&current()) != serial(&first)).await;
    assert_eq!(current().bundle.roots.len(), 2);
    let renewed = current();
    let mut same = node.spire.said().unwrap();
    same[0].bundle = old.root();
    node.spire.say(Some(same));
    until("the root's removal", || current().bundle.roots.len() == 1).await;
    assert_eq!(serial(&current()), serial(&renewed));
    assert!(current().version > renewed.version, "whoever judged by the old bundle judges again");
}

#[tokio::test]
async fn a_certificate_is_used_to_its_end_while_the_api_is_away_and_the_return_is_noticed() {
    let authority = authority("authority");
    let brief = || Some(vec![svid(&authority, &cart(), Duration::from_secs(4), &[&authority])]);
    let mut node = Node::told(brief());
    let identities = node.agent();
    let first = identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
    node.spire.stop();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(identities.current(&cart()).unwrap().version, first.version);
    until("its end", || identities.current(&cart()).is_none()).await;
    assert!(left(first.svid.not_after).is_zero());

    node.spire.say(Some(vec![svid(&authority, &cart(), DAY, &[&authority])]));
    node.spire.restart().unwrap();
    let second = identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
    assert!(second.version > first.version);
}

#[tokio::test]
async fn an_identity_that_is_not_given_is_not_served_and_one_taken_away_ends_at_once() {
    let authority = authority("authority");
    let node = Node::told(Some(vec![svid(&authority, &db(), DAY, &[&authority])]));
    let identities = node.agent();
    let refused = identities.ready(&cart(), Duration::from_millis(700)).await.unwrap_err().to_string();
    for part in
        ["agent.sock", "gives this agent no spiffe://cluster.local/ns/shop/sa/cart", "sa/db", "register"]
    {
        assert!(refused.contains(part), "{part}: {refused}");
    }
    node.spire.say(Some(vec![svid(&authority, &cart(), DAY, &[&authority])]));
    identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
    node.spire.say(Some(vec![svid(&authority, &db(), DAY, &[&authority])]));
    until("the withdrawal", || identities.current(&cart()).is_none()).await;

    node.spire.say(Some(vec![svid(&authority, &cart(), DAY, &[&authority])]));
    identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
    node.spire.say(None);
    until("the refusal of all", || identities.current(&cart()).is_none()).await;
    let refused = identities.ready(&cart(), Duration::from_millis(100)).await.unwrap_err().to_string();
    assert!(refused.contains("no identity at all"), "{refused}");
}

#[tokio::test]
async fn what_cannot_be_used_is_refused_in_words() {
    let (authority, stranger) = (authority("authority"), authority("stranger"));
    let good = || svid(&authority, &cart(), DAY, &[&authority]);
    let other_key = Svid { x509_svid_key: KeyPair::generate().unwrap().serialize_der(), ..good() };
    for (given, expected) in [
        (other_key, "another key"),
        (svid(&authority, &cart(), DAY, &[&stranger]), "leads to no root"),
        (svid(&authority, &cart(), Duration::ZERO, &[&authority]), "compare the clocks"),
        (Svid { x509_svid: vec![1, 2, 3], ..good() }, "failed to parse X.509 SVID"),
    ] {
        let node = Node::told(Some(vec![given]));
        let identities = node.agent();
        let refused = identities.ready(&cart(), Duration::from_millis(700)).await.unwrap_err().to_string();
        assert!(refused.contains(expected), "{expected}: {refused}");
        node.spire.say(Some(vec![good()]));
        identities.ready(&cart(), Duration::from_secs(10)).await.expect("what is good is taken");
    }
    let nobody = Path::new("/nonexistent/agent.sock");
    let api = WorkloadApi::new(nobody.to_str().unwrap()).unwrap();
    let identities = Identities::from_workload_api(api, quick());
    identities.want(HashSet::from([cart()]));
    tokio::spawn(identities.clone().run(std::future::pending()));
    let away = identities.ready(&cart(), Duration::from_millis(700)).await.unwrap_err().to_string();
    assert!(away.contains("/nonexistent/agent.sock") && away.contains("No such file"), "{away}");
    for wrong in ["agent.sock", "tcp://127.0.0.1:1", "http://x", ""] {
        assert!(WorkloadApi::new(wrong).is_err(), "{wrong:?}");
    }
}
