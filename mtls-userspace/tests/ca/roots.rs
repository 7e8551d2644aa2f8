//! Root rotation while traffic flows, and directories that change into something wrong.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mtls::ca::{CertificateAuthority, InForce, write_root_bundle};
use mtls::identity::{Config, Identity};
use mtls::tunnel::HandshakeFailure;

use crate::bench::*;
use crate::traffic::{Ends, Traffic};

const FILES: [&str; 4] = ["ca-cert.pem", "ca-key.pem", "cert-chain.pem", "root-cert.pem"];
const SIGNING: [&str; 3] = ["ca-cert.pem", "ca-key.pem", "cert-chain.pem"];

/// A CA directory with a root of its own.
fn made() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    CertificateAuthority::at(dir.path(), trust_domain(), DAY).unwrap();
    dir
}

fn copy(from: &Path, to: &Path, names: &[&str]) {
    for name in names {
        std::fs::copy(from.join(name), to.join(name)).unwrap();
    }
}

fn roots_of(dirs: &[&Path]) -> String {
    dirs.iter().map(|dir| std::fs::read_to_string(dir.join("root-cert.pem")).unwrap()).collect()
}

fn signed_by(identity: &Identity, dir: &Path) -> bool {
    let pem = std::fs::read(dir.join("root-cert.pem")).unwrap();
    let (_, root) = x509_parser::pem::parse_x509_pem(&pem).unwrap();
    let root = root.parse_x509().unwrap();
    let (_, leaf) = x509_parser::parse_x509_certificate(&identity.svid.chain[0]).unwrap();
    leaf.verify_signature(Some(root.public_key())).is_ok()
}

async fn until(what: &str, mut reached: impl FnMut() -> bool) {
    let started = Instant::now();
    while !reached() {
        assert!(started.elapsed() < Duration::from_secs(30), "never came: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_root_is_added_signs_and_the_old_one_goes_while_traffic_flows() {
    let (old, new) = (made(), made());
    let dir = tempfile::tempdir().unwrap();
    copy(old.path(), dir.path(), &FILES);
    let in_force = InForce::directory(dir.path(), trust_domain(), DAY).unwrap();
    let bench = Bench::of(in_force.clone()).await;
    // As `mtls ca` does it: follow the directory, and write the roots anew for the agents.
    let (following, publishing) = (in_force.clone(), in_force.clone());
    let root_out = bench.path("root.pem");
    tokio::spawn(async move { following.follow().await });
    tokio::spawn(async move {
        let mut changes = publishing.subscribe();
        while changes.changed().await.is_ok() {
            write_root_bundle(&root_out, &publishing.current()).unwrap();
        }
    });

    let short = Duration::from_secs(4);
    let ends = Arc::new(Ends::start(&bench, Config { lifetime: short, ..quick() }).await);
    let (lasting, task) = bench.agent(quick());
    let left_behind = lasting.ready(&cart(), Duration::from_secs(10)).await.unwrap();
    task.abort();
    let mut traffic = Traffic::start(ends.clone()).await;
    let both = |check: &dyn Fn(&Identity) -> bool| {
        check(&ends.cart.current(&cart()).unwrap()) && check(&ends.db.current(&db()).unwrap())
    };
    traffic.unharmed().await;

    std::fs::write(dir.path().join("root-cert.pem"), roots_of(&[old.path(), new.path()])).unwrap();
    until("both roots in both agents", || both(&|identity| identity.bundle.roots.len() == 2)).await;
    traffic.unharmed().await;

    copy(new.path(), dir.path(), &SIGNING);
    until("leaves of the new root", || both(&|identity| signed_by(identity, new.path()))).await;
    traffic.unharmed().await;

    copy(new.path(), dir.path(), &["root-cert.pem"]);
    until("the old root gone", || both(&|identity| identity.bundle.roots.len() == 1)).await;
    traffic.unharmed().await;
    assert!(traffic.count() > 50, "{} connections are not much of a traffic", traffic.count());
    drop(traffic);

    // The negative: a certificate that is valid for a day yet, of the old root. Its agent refuses the new root; one
    // that was told of the new root is refused itself.
    let refused = || {
        let refused = ends.refused.lock().unwrap();
        refused.iter().filter_map(|error| error.handshake_failure()).collect::<Vec<_>>()
    };
    let refuses = ends.open_as(&left_behind).await.err().and_then(|error| error.handshake_failure());
    assert_eq!(refuses, Some(HandshakeFailure::UnknownCa));
    until("the server to learn of it", || refused().len() == 1).await;
    let bundle = ends.db.current(&db()).unwrap().bundle.clone();
    let told = Arc::new(Identity { version: left_behind.version, svid: left_behind.svid.clone(), bundle });
    let _ = ends.open_as(&told).await;
    until("the server's refusal", || refused().len() == 2).await;
    assert_eq!(refused(), [HandshakeFailure::UnknownCa; 2]);
}

#[tokio::test]
async fn a_directory_changed_for_the_worse_leaves_the_last_good_state_in_force() {
    let (first, other) = (made(), made());
    let dir = tempfile::tempdir().unwrap();
    copy(first.path(), dir.path(), &FILES);
    let in_force = InForce::directory(dir.path(), trust_domain(), DAY).unwrap();
    let following = in_force.clone();
    let task = tokio::spawn(async move { following.follow().await });
    let roots = in_force.current().roots().to_vec();
    let changes = in_force.subscribe();
    let noticed = Duration::from_millis(1600);

    for broken in ["missing", "another key", "another root", "no PEM", "nothing at all"] {
        match broken {
            "missing" => std::fs::remove_file(dir.path().join("cert-chain.pem")).unwrap(),
            "another key" => copy(other.path(), dir.path(), &["ca-key.pem"]),
            "another root" => copy(other.path(), dir.path(), &["root-cert.pem"]),
            "no PEM" => std::fs::write(dir.path().join("ca-cert.pem"), "-----BEGIN").unwrap(),
            _ => FILES.iter().for_each(|name| std::fs::remove_file(dir.path().join(name)).unwrap()),
        }
        tokio::time::sleep(noticed).await;
        assert_eq!(in_force.current().roots(), roots, "{broken}");
        assert!(!changes.has_changed().unwrap(), "{broken}");
        let there = dir.path().join("ca-cert.pem").exists();
        assert_eq!(there, broken != "nothing at all", "{broken}: nothing is made in its place");
        copy(first.path(), dir.path(), &FILES);
        tokio::time::sleep(noticed).await;
    }
    assert!(!changes.has_changed().unwrap(), "what is as it was is no change");

    copy(other.path(), dir.path(), &FILES);
    until("the other authority", || in_force.current().roots() != roots).await;
    assert!(changes.has_changed().unwrap());
    assert!(!task.is_finished());
}
