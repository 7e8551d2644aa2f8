//! The application cannot tell: both ends see each other's real addresses, whatever kind of socket they use.

use anyhow::{Result, ensure};
use mtls_tests::{Lab, MARKER, Pod, Running};

use crate::{Scene, address, needs};

/// Every way to open a connection, by the flags of `lab-app dial`.
const CLIENTS: [&[&str]; 8] = [
    &[],
    &["--nonblocking"],
    &["--mapped"],
    &["--mptcp"],
    &["--fast-open"],
    &["--io-uring"],
    &["--mark", "4242"],
    &["--device", "eth0"],
];

#[test]
fn every_kind_of_client_is_captured_and_sees_the_address_it_dialled() -> Result<()> {
    needs!();
    let scene = Scene::new()?;
    let echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let wire = scene.lab.watch_wire()?;
    for client in scene.clients() {
        for kind in CLIENTS {
            converse(&scene.lab, client, &scene.server, &echo, 7000, kind)?;
        }
        let bound = format!("{}:0", client.ip());
        converse(&scene.lab, client, &scene.server, &echo, 7000, &["--bind", &bound])?;
        let answer = converse(
            &scene.lab,
            client,
            &scene.server,
            &echo,
            7000,
            &["--bind", &format!("{}:40123", client.ip())],
        )?;
        assert_eq!(address(&answer["local"])?, client.addr(40123));
    }
    wire.finish()?.encrypted(&scene.far, &scene.server)?;
    Ok(())
}

#[test]
fn every_kind_of_listener_sees_its_real_client() -> Result<()> {
    needs!();
    let scene = Scene::new()?;
    let listeners: [(u16, &[&str]); 6] = [
        (7100, &["echo", "--listen", "0.0.0.0:7100"]),
        (7101, &["echo", "--listen", "[::]:7101"]),
        (7102, &["echo", "--listen", "0.0.0.0:7102", "--mptcp"]),
        (7103, &["echo", "--listen", "[::]:7103", "--fast-open"]),
        (7104, &["echo", "--listen", "0.0.0.0:7104", "--io-uring"]),
        (7105, &["echo", "--listen", "[::]:7105", "--v6only"]),
    ];
    let wire = scene.lab.watch_wire()?;
    for (port, args) in listeners {
        let listener = scene.server.serve(args)?;
        for client in scene.clients() {
            if args.contains(&"--v6only") {
                continue;
            }
            converse(&scene.lab, client, &scene.server, &listener, port, &[])?;
        }
        if args.concat().contains("[::]") {
            for client in scene.clients() {
                let before = listener.all_json_with("accepted").len();
                let to = scene.server.addr6(port);
                let answer = client.app(&["dial", "echo", &to.to_string(), "--message", MARKER])?;
                ensure!(answer["ended"] == "eof", "{args:?}: {answer}");
                let accepted = listener.json_after("accepted", before)?;
                assert_eq!(address(&accepted["accepted"])?.ip(), client.ip6(), "{args:?}");
                assert_eq!(address(&accepted["local"])?, to, "{args:?}");
                assert_eq!(address(&answer["peer"])?, to, "{args:?}");
                assert_eq!(address(&answer["local"])?, address(&accepted["peer"])?, "{args:?}");
            }
        }
    }
    wire.finish()?.encrypted(&scene.far, &scene.server)?;
    Ok(())
}

#[test]
fn a_pod_cannot_leave_by_changing_cgroups_it_owns() -> Result<()> {
    needs!();
    let scene = Scene::new()?;
    let echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let wire = scene.lab.watch_wire()?;
    for client in scene.clients() {
        let inner = client.cgroup().join("inner/deeper");
        std::fs::create_dir_all(&inner)?;
        let inner = inner.to_string_lossy();
        converse(&scene.lab, client, &scene.server, &echo, 7000, &["--cgroup", &inner, "--mark", "1"])?;
    }
    wire.finish()?.encrypted(&scene.far, &scene.server)?;
    Ok(())
}

#[test]
fn a_pod_that_dials_itself_stays_with_itself() -> Result<()> {
    needs!();
    let scene = Scene::new()?;
    let echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    for to in ["127.0.0.1:7000".to_owned(), "[::1]:7000".to_owned(), scene.server.addr(7000).to_string()] {
        let before = echo.all_json_with("accepted").len();
        let answer = scene.server.app(&["dial", "echo", &to])?;
        assert_eq!(answer["ended"], "eof", "{to}: {answer}");
        assert_eq!(address(&answer["peer"])?, to.parse()?, "{answer}");
        let accepted = echo.json_after("accepted", before)?;
        assert_eq!(address(&accepted["accepted"])?, address(&answer["local"])?, "{to}");
    }
    Ok(())
}

/// One conversation over IPv4 in which both ends must see the truth.
fn converse(
    lab: &Lab,
    client: &Pod,
    server: &Pod,
    listener: &Running,
    port: u16,
    kind: &[&str],
) -> Result<serde_json::Value> {
    let what = format!("{} from {} {kind:?}", lab.id(), client.name());
    let to = server.addr(port);
    let before = listener.all_json_with("accepted").len();
    let answer = client.app(&[&["dial", "echo", &to.to_string(), "--message", MARKER], kind].concat())?;
    ensure!(answer["echoed"] == MARKER.len(), "{what}: {answer}");
    let accepted = listener.json_after("accepted", before)?;
    assert_eq!(address(&answer["peer"])?, to, "{what}: the client's getpeername: {answer}");
    assert_eq!(address(&answer["local"])?.ip(), client.ip(), "{what}: the client's getsockname: {answer}");
    assert_eq!(address(&accepted["accepted"])?, address(&answer["local"])?, "{what}: accept: {accepted}");
    assert_eq!(address(&accepted["peer"])?, address(&answer["local"])?, "{what}: getpeername: {accepted}");
    assert_eq!(address(&accepted["local"])?, to, "{what}: getsockname: {accepted}");
    Ok(answer)
}
