//! The lab without the product: applications work, and the capture sees everything they say.
//!
//! These are the controls for every other module: each assertion made there fails here.

use anyhow::Result;
use mtls_tests::apps::{Files, Grpc, MariaDb, Nginx, Postgres, Redis};
use mtls_tests::{Lab, MARKER, PodSpec, skip};

#[test]
fn without_agents_the_capture_sees_the_marker() -> Result<()> {
    if skip(&Lab::NEEDS) {
        return Ok(());
    }
    let lab = Lab::two_nodes()?;
    let (client, server) = (lab.pod("node-a", "client")?, lab.pod("node-b", "server")?);
    let _echo = server.serve(&["echo", "--listen", "[::]:7000"])?;
    let wire = lab.watch_wire()?;
    for address in [server.addr(7000), server.addr6(7000)] {
        let answer = client.app(&["dial", "echo", &address.to_string(), "--message", MARKER])?;
        assert_eq!((&answer["echoed"], &answer["ended"]), (&MARKER.len().into(), &"eof".into()), "{answer}");
    }
    let seen = wire.finish()?;
    assert_eq!(seen.markers(), 4, "there and back over IPv4 and IPv6: {seen:?}");
    assert!(seen.encrypted(&client, &server).is_err());
    assert_eq!(seen.between(&client, &server).count(), 2);
    Ok(())
}

#[test]
fn a_marker_cut_by_segments_is_seen() -> Result<()> {
    if skip(&Lab::NEEDS) {
        return Ok(());
    }
    let lab = Lab::two_nodes()?;
    let (client, server) = (lab.pod("node-a", "client")?, lab.pod("node-b", "server")?);
    let _echo = server.serve(&["echo", "--listen", "0.0.0.0:7000"])?;
    let (first, second) = MARKER.split_at(9);
    let wire = lab.watch_wire()?;
    let address = server.addr(7000).to_string();
    // Each message is a segment of its own, because the client waits for its echo.
    client.app(&["dial", "echo", &address, "--message", first])?;
    assert_eq!(wire.finish()?.markers(), 0);
    let wire = lab.watch_wire()?;
    let whole = format!("{second}{first}");
    client.app(&["dial", "echo", &address, "--message", &whole, "--times", "2"])?;
    assert_eq!(wire.finish()?.markers(), 2, "once each way, across the seam of two messages");
    Ok(())
}

#[test]
fn real_applications_run_and_know_their_clients() -> Result<()> {
    let needs = [&Nginx::NEEDS[..], &Postgres::NEEDS, &Redis::NEEDS, &MariaDb::NEEDS].concat();
    if skip(&needs) {
        return Ok(());
    }
    let lab = Lab::two_nodes()?;
    let server = lab.add(PodSpec::new("node-b", "server").port("http", Nginx::PORT))?;
    let far = lab.pod("node-a", "far")?;
    let near = lab.pod("node-b", "near")?;
    let nginx = Nginx::start(&lab, &server)?;
    let postgres = Postgres::start(&lab, &server)?;
    let redis = Redis::start(&lab, &server)?;
    let mariadb = MariaDb::start(&lab, &server)?;
    let grpc = Grpc::start(&server)?;
    let files = Files::start(&server)?;
    for client in [&far, &near] {
        let sessions = [
            nginx.keep_alive(client)?,
            nginx.short_connections(client)?,
            nginx.large_file(client, 32)?,
            postgres.transactions(client)?,
            redis.benchmark(client)?,
            mariadb.queries(client)?,
            grpc.talk(client)?,
            files.send(client, 200_000_000)?,
        ];
        for session in sessions {
            println!("{}: {session:?}", client.name());
            assert_eq!(session.client_seen, client.ip(), "{session:?}");
        }
    }
    Ok(())
}

#[test]
fn every_kind_of_socket_and_ending_works_on_plain_tcp() -> Result<()> {
    if skip(&Lab::NEEDS) {
        return Ok(());
    }
    let lab = Lab::two_nodes()?;
    let (client, server) = (lab.pod("node-a", "client")?, lab.pod("node-b", "server")?);
    let _echo = server.serve(&["greet", "--listen", "[::]:7000", "--mptcp", "--fast-open"])?;
    let _reset = server.serve(&["reset", "--listen", "[::]:7001"])?;
    let _close = server.serve(&["close-first", "--listen", "[::]:7002"])?;
    let _ring = server.serve(&["echo", "--listen", "0.0.0.0:7003", "--io-uring"])?;
    let to = server.addr(7000).to_string();
    let bound = format!("{}:40123", client.ip());
    for kind in [
        &["--mptcp"][..],
        &["--mapped"],
        &["--fast-open"],
        &["--nonblocking"],
        &["--mark", "4242"],
        &["--device", "eth0"],
        &["--bind", &bound],
    ] {
        let answer = client.app(&[&["dial", "echo", &to, "--greeted"], kind].concat())?;
        assert_eq!((&answer["echoed"], &answer["ended"]), (&5.into(), &"eof".into()), "{kind:?}: {answer}");
    }
    let answer = client.app(&["dial", "echo", &server.addr(7003).to_string(), "--io-uring"])?;
    assert_eq!(answer["echoed"], 5, "{answer}");
    let answer = client.app(&["dial", "wait", &server.addr(7001).to_string()])?;
    assert_eq!(answer["ended"], "reset", "{answer}");
    let answer = client.app(&["dial", "send-last", &server.addr(7002).to_string()])?;
    assert_eq!((&answer["before"], &answer["ended"]), (&8.into(), &"eof".into()), "{answer}");
    let answer = client.app(&["dial", "echo", &server.addr(7999).to_string()])?;
    assert_eq!(answer["ended"], "refused", "{answer}");
    Ok(())
}
