//! Real applications, unmodified, across nodes and on one node; and what their own records say of their clients.

use anyhow::Result;
use mtls_tests::apps::{Files, Grpc, MariaDb, Nginx, Postgres, Redis, Session};
use mtls_tests::{Pod, Seen};

use crate::{Scene, needs};

#[test]
fn nginx_serves_kept_alive_and_short_connections() -> Result<()> {
    needs!(Nginx::NEEDS);
    let scene = Scene::new()?;
    let nginx = Nginx::start(&scene.lab, &scene.server)?;
    each(&scene, |client| {
        Ok(vec![nginx.keep_alive(client)?, nginx.short_connections(client)?, nginx.large_file(client, 64)?])
    })
}

#[test]
fn postgres_runs_transactions() -> Result<()> {
    needs!(Postgres::NEEDS);
    let scene = Scene::new()?;
    let postgres = Postgres::start(&scene.lab, &scene.server)?;
    each(&scene, |client| Ok(vec![postgres.transactions(client)?]))
}

#[test]
fn redis_answers_commands() -> Result<()> {
    needs!(Redis::NEEDS);
    let scene = Scene::new()?;
    let redis = Redis::start(&scene.lab, &scene.server)?;
    each(&scene, |client| Ok(vec![redis.benchmark(client)?]))
}

#[test]
fn mariadb_greets_and_answers_queries() -> Result<()> {
    needs!(MariaDb::NEEDS);
    let scene = Scene::new()?;
    let mariadb = MariaDb::start(&scene.lab, &scene.server)?;
    each(&scene, |client| Ok(vec![mariadb.queries(client)?]))
}

#[test]
fn grpc_streams_both_ways_at_once() -> Result<()> {
    needs!();
    let scene = Scene::new()?;
    let grpc = Grpc::start(&scene.server)?;
    each(&scene, |client| Ok(vec![grpc.talk(client)?]))
}

#[test]
fn a_large_transfer_arrives_with_its_checksum() -> Result<()> {
    needs!();
    let scene = Scene::new()?;
    let files = Files::start(&scene.server)?;
    each(&scene, |client| Ok(vec![files.send(client, 400_000_000)?]))
}

/// Runs sessions from both clients under a capture, and checks what the server believed and what the wire saw.
fn each(scene: &Scene, sessions: impl Fn(&Pod) -> Result<Vec<Session>>) -> Result<()> {
    for client in scene.clients() {
        let (wire, port) = (scene.lab.watch_wire()?, scene.lab.watch_pod(&scene.server)?);
        for session in sessions(client)? {
            println!("{}: {session:?}", client.name());
            assert_eq!(session.client_seen, client.ip(), "{session:?}");
        }
        let (wire, port) = (wire.finish()?, port.finish()?);
        if client.node().name() == "node-a" {
            wire.encrypted(client, &scene.server)?;
            port.encrypted(client, &scene.server)?;
        } else {
            assert_eq!(flows(&wire, client, scene) + flows(&port, client, scene), 0, "{port:?}");
        }
        assert_eq!(wire.markers() + port.markers(), 0);
    }
    Ok(())
}

fn flows(seen: &Seen, client: &Pod, scene: &Scene) -> usize {
    seen.between(client, &scene.server).count()
}
