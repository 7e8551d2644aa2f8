//! `mtls ca` as the command line starts it.

use std::collections::HashSet;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use mtls::cli::ca::Ca;
use mtls::identity::{Credential, Identities, RemoteAuthority};

use crate::bench::*;

#[derive(Parser, Debug)]
struct Line {
    #[command(flatten)]
    ca: Ca,
}

#[tokio::test]
async fn it_serves_what_flags_and_manifests_say_and_ends_at_sigterm() {
    let dir = tempfile::tempdir().unwrap();
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("tokens.yaml"), format!("node-a: {TOKEN_A}\n")).unwrap();
    std::fs::write(path("token"), TOKEN_A).unwrap();
    std::fs::create_dir(path("manifests")).unwrap();
    std::fs::write(path("manifests/cart.yaml"), pod("cart", "node-a", "ambient")).unwrap();
    std::fs::write(path("manifests/db.yaml"), pod("db", "node-b", "ambient")).unwrap();
    let line = parse(&[
        "--listen",
        &address,
        "--tokens",
        &path("tokens.yaml"),
        "--manifests",
        &path("manifests"),
        "--ca-dir",
        &path("ca"),
        "--root-out",
        &path("root.pem"),
        "--leaf-lifetime",
        "1m30s",
    ]);
    let running = tokio::spawn(line.unwrap().ca.run());

    let remote = RemoteAuthority::new(
        &format!("https://{address}"),
        path("root.pem").into(),
        Credential::Token(path("token").into()),
    );
    let identities = Identities::new(Arc::new(remote.unwrap()), quick());
    identities.want(HashSet::from([cart(), db()]));
    let _task = tokio::spawn(identities.clone().run(std::future::pending()));
    let identity = identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
    let life = left(identity.svid.not_after).as_secs();
    assert!((80..=91).contains(&life), "{life}");
    assert_eq!(std::fs::read(path("root.pem")).unwrap(), std::fs::read(path("ca/root-cert.pem")).unwrap());

    let refused = identities.ready(&db(), Duration::from_secs(1)).await.unwrap_err().to_string();
    assert!(refused.contains("no enrolled pod on node node-a"), "{refused}");
    std::fs::write(path("manifests/db.yaml"), pod("db", "node-a", "none")).unwrap();
    let refused = identities.ready(&db(), Duration::from_secs(2)).await.unwrap_err().to_string();
    assert!(refused.contains("no enrolled pod on node node-a"), "{refused}");
    std::fs::write(path("manifests/db.yaml"), pod("db", "node-a", "ambient")).unwrap();
    identities.ready(&db(), Duration::from_secs(10)).await.expect("the pod runs here now");

    assert!(!running.is_finished());
    nix::sys::signal::raise(nix::sys::signal::Signal::SIGTERM).unwrap();
    tokio::time::timeout(Duration::from_secs(7), running).await.expect("ends").unwrap().unwrap();
    assert!(TcpListener::bind(&address).is_ok(), "the port is free again");
}

#[tokio::test]
async fn a_port_taken_or_a_file_missing_is_a_clear_error() {
    let dir = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let elsewhere = tempfile::tempdir().unwrap();
    let tokens = elsewhere.path().join("tokens.yaml").to_str().unwrap().to_owned();
    let manifests = dir.path().to_str().unwrap();
    let run = async || {
        let line = parse(&["--listen", &address, "--tokens", &tokens, "--manifests", manifests]).unwrap();
        let error = line.ca.run().await.unwrap_err();
        format!("{error:#}")
    };
    let missing = run().await;
    assert!(missing.contains("tokens.yaml") && missing.contains("No such file"), "{missing}");
    std::fs::write(&tokens, "node-a: short").unwrap();
    let short = run().await;
    assert!(short.contains("tokens.yaml") && short.contains("node-a"), "{short}");
    std::fs::write(&tokens, format!("node-a: {TOKEN_A}")).unwrap();
    let in_use = run().await;
    assert!(in_use.contains(&address) && in_use.contains("in use"), "{in_use}");
    std::fs::write(
        dir.path().join("broken.yaml"),
        "kind: Pod\napiVersion: v1\nmetadata: {name: x}\nspec: 7\n",
    )
    .unwrap();
    let broken = run().await;
    assert!(broken.contains("broken.yaml") && broken.contains("spec"), "{broken}");
}

#[test]
fn flags_are_checked() {
    let with = |more: &[&str]| parse(&[&["--tokens", "t", "--manifests", "m"], more].concat());
    assert!(with(&[]).is_ok());
    assert!(with(&["--advertise", "ca.mesh", "--advertise", "10.0.0.1"]).is_ok());
    for bad in [
        &["--leaf-lifetime", "0s"][..],
        &["--leaf-lifetime", "-1h"],
        &["--leaf-lifetime", "soon"],
        &["--trust-domain", "Cluster.Local"],
        &["--listen", "15012"],
        &["--unknown"],
    ] {
        assert!(with(bad).is_err(), "{bad:?}");
    }
    assert!(parse(&["--manifests", "m"]).is_err(), "some proof of who calls is needed");
    assert!(parse(&["--manifests", "m", "--node-ca", "c"]).is_ok());
    assert!(parse(&["--tokens", "t"]).is_err(), "manifests are needed");
}

fn pod(account: &str, node: &str, mode: &str) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata:
  name: {account}
  namespace: shop
  labels: {{istio.io/dataplane-mode: {mode}}}
spec:
  nodeName: {node}
  serviceAccountName: {account}
  containers: [{{name: app}}]
status:
  podIP: 10.0.0.{}
",
        account.len()
    )
}

fn parse(flags: &[&str]) -> Result<Line, clap::Error> {
    Line::try_parse_from(std::iter::once(&"ca").chain(flags))
}
