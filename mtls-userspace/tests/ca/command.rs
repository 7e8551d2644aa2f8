//! `mtls ca` as the command line starts it.

use std::collections::HashSet;
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use mtls::cli::ca::Ca;
use mtls::identity::{Identities, RemoteAuthority, SpiffeId};

use crate::bench::*;

#[derive(Parser, Debug)]
struct Line {
    #[command(flatten)]
    ca: Ca,
}

#[tokio::test]
async fn it_serves_what_its_flags_say_and_ends_at_sigterm() {
    let dir = tempfile::tempdir().unwrap();
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("tokens.yaml"), format!("node-a: {TOKEN_A}\n")).unwrap();
    std::fs::write(path("token"), TOKEN_A).unwrap();
    let (tokens, ca_dir, root) = (path("tokens.yaml"), path("ca"), path("root.pem"));
    let line = parse(&[
        "--listen",
        &address,
        "--tokens",
        &tokens,
        "--manifests",
        &path(""),
        "--ca-dir",
        &ca_dir,
        "--root-out",
        &root,
        "--leaf-lifetime",
        "1m30s",
    ]);
    let running = tokio::spawn(
        line.unwrap().ca.run(Arc::new(|node: &str, id: &SpiffeId| node == "node-a" && *id == cart())),
    );

    let remote =
        RemoteAuthority::new(&format!("https://{address}"), root.clone().into(), path("token").into());
    let identities = Identities::new(Arc::new(remote.unwrap()), quick());
    identities.want(HashSet::from([cart()]));
    let _task = tokio::spawn(identities.clone().run(std::future::pending()));
    let identity = identities.ready(&cart(), Duration::from_secs(10)).await.unwrap();
    let life = left(identity.svid.not_after).as_secs();
    assert!((80..=91).contains(&life), "{life}");
    let kept = Path::new(&ca_dir).join("root-cert.pem");
    assert_eq!(std::fs::read(&root).unwrap(), std::fs::read(kept).unwrap());

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
    let tokens = dir.path().join("tokens.yaml").to_str().unwrap().to_owned();
    let manifests = dir.path().to_str().unwrap();
    let run = async || {
        let line = parse(&["--listen", &address, "--tokens", &tokens, "--manifests", manifests]).unwrap();
        let error = line.ca.run(Arc::new(|_: &str, _: &SpiffeId| false)).await.unwrap_err();
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
    assert!(parse(&["--manifests", "m"]).is_err(), "tokens are needed");
    assert!(parse(&["--tokens", "t"]).is_err(), "manifests are needed");
}

fn parse(flags: &[&str]) -> Result<Line, clap::Error> {
    Line::try_parse_from(std::iter::once(&"ca").chain(flags))
}
