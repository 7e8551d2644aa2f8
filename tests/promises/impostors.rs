//! Wrong certificates and wrong bytes on port 15008, from either side: refused, named, and survived.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::Result;
use mtls_tests::{Credentials, Forger, Lab, MARKER, Mesh, Pod, PodSpec, Running};
use serde_json::Value;

use crate::{Scene, assert_echoed, assert_refused, needs};

#[test]
fn callers_without_a_right_certificate_are_refused() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let intruder = scene.lab.outsider("node-a", "intruder")?;
    let echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let dir = scene.lab.dir().to_owned();
    let authority = Forger::with_authority(scene.mesh.ca_dir())?;
    let right = authority.sign(&dir, "right", "spiffe://cluster.local/ns/shop/sa/far")?;
    let attempts = [
        ("no_certificate", None),
        (
            "unknown_ca",
            Some(Forger::unknown()?.sign(&dir, "self-made", "spiffe://cluster.local/ns/shop/sa/far")?),
        ),
        ("expired", Some(authority.sign_expired(&dir, "expired", "spiffe://cluster.local/ns/shop/sa/far")?)),
        ("wrong_trust_domain", Some(authority.sign(&dir, "foreign", "spiffe://evil.local/ns/shop/sa/far")?)),
        ("wrong_identity", Some(authority.sign(&dir, "nobody", "spiffe://cluster.local/nonsense")?)),
    ];
    // The forger's tools work: with the right certificate the same bytes reach the application.
    let answer = call(&intruder, &scene.server, Some(&right), intruder.ip())?;
    assert!(answer["received"].as_u64() > Some(0), "{answer}");
    assert_eq!(answer["server"], format!("spiffe://{}", scene.server.principal()), "{answer}");
    assert_eq!((&answer["alpn"], &answer["tls"]), (&"mtls/1".into(), &"Some(TLSv1_3)".into()), "{answer}");
    echo.json_after("accepted", 0)?;
    for (reason, credentials) in attempts {
        let failures = |scene: &mut Scene| -> Result<f64> {
            Ok(scene
                .mesh
                .agent("node-b")
                .metrics()?
                .sum("mtls_handshake_failures_total", &[("reason", reason)]))
        };
        let before = failures(&mut scene)?;
        let answer = call(&intruder, &scene.server, credentials.as_ref(), intruder.ip())?;
        assert!(answer["received"].as_u64().unwrap_or(0) == 0, "{reason}: {answer}");
        // The caller may have its alert before the agent has counted it.
        let counted = mtls_tests::eventually(Duration::from_secs(5), || {
            (failures(&mut scene).ok()? == before + 1.0).then_some(())
        });
        assert!(counted.is_some(), "{reason}: {answer}");
    }
    only_member_served(&scene, &echo, 1)
}

/// Asserts that the application has accepted nobody beyond so many earlier ones: the next it sees is a member.
fn only_member_served(scene: &Scene, echo: &Running, earlier: usize) -> Result<()> {
    let answer = scene.far.app(&["dial", "echo", &scene.server.addr(7000).to_string()])?;
    assert_echoed(&answer);
    let accepted = echo.json_after("accepted", earlier)?;
    assert_eq!(
        crate::address(&accepted["accepted"])?,
        crate::address(&answer["local"])?,
        "somebody else came in"
    );
    Ok(())
}

#[test]
fn a_caller_speaks_only_from_his_own_address() -> Result<()> {
    needs!();
    let scene = Scene::new()?;
    let intruder = scene.lab.outsider("node-a", "intruder")?;
    let echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let authority = Forger::with_authority(scene.mesh.ca_dir())?;
    let stolen = authority.sign(scene.lab.dir(), "stolen", "spiffe://cluster.local/ns/shop/sa/far")?;
    let answer = call(&intruder, &scene.server, Some(&stolen), scene.near.ip())?;
    assert_eq!(answer["handshake"], true, "{answer}");
    only_member_served(&scene, &echo, 0)?;
    // And asks only for addresses of the pod he has reached.
    let other = scene.near.serve(&["echo", "--listen", "[::]:7000"])?;
    let open = open_frame(scene.near.addr(7000), SocketAddr::new(intruder.ip(), 40000));
    let rest = ["--hex", &open, "--hex", "0268656c6c6f", "--limit-ms", "2000"];
    let answer = dial(&intruder, &scene.server, Some(&stolen), &rest)?;
    assert!(other.all_json_with("accepted").is_empty(), "{answer}");
    Ok(())
}

#[test]
fn servers_without_the_destinations_certificate_get_nothing() -> Result<()> {
    needs!();
    // No agent runs on node-c: an impostor may take its pod's port 15008.
    let lab = Lab::with_nodes(&["node-a", "node-b", "node-c"])?;
    let client = lab.pod("node-a", "client")?;
    let genuine = lab.pod("node-b", "genuine")?;
    let victim = lab.add(PodSpec::new("node-c", "victim").port("main", 7000))?;
    let mut mesh = Mesh::start(&lab)?;
    mesh.agent("node-c").terminate()?;
    mesh.agent("node-c").await_end(std::time::Duration::from_secs(10))?;
    std::fs::remove_dir_all(lab.dir().join("bpf/node-c"))?;
    let _echo = genuine.serve(&["echo", "--listen", "[::]:7000"])?;
    let authority = Forger::with_authority(mesh.ca_dir())?;
    let dir = lab.dir();
    let his = format!("spiffe://{}", victim.principal());
    let forged = [
        Forger::unknown()?.sign(dir, "self-made", &his)?,
        authority.sign_expired(dir, "expired", &his)?,
        authority.sign(dir, "other", &format!("spiffe://{}", genuine.principal()))?,
        authority.sign(dir, "foreign", "spiffe://evil.local/ns/shop/sa/victim")?,
    ];
    let right = authority.sign(dir, "right", &his)?;
    let wire = lab.watch_wire()?;
    for credentials in forged {
        let impostor = impersonate(&victim, &credentials)?;
        let answer = client.app(&["dial", "echo", &victim.addr(7000).to_string(), "--message", MARKER])?;
        assert_refused(&answer);
        let heard: u64 =
            impostor.all_json_with("handshake").iter().filter_map(|line| line["received"].as_u64()).sum();
        assert_eq!(heard, 0, "{:?}", impostor.all_json_with("handshake"));
    }
    // With the right one it does get the connection, so it was the certificate that mattered.
    let holder = impersonate(&victim, &right)?;
    let stream = client.start_app(&["dial", "wait", &victim.addr(7000).to_string(), "--limit-ms", "1500"])?;
    stream.json_with("ended")?;
    let heard = holder.json_with("received")?;
    assert!(heard["received"].as_u64() > Some(0), "{heard}");
    assert_eq!(heard["client"], format!("spiffe://{}", client.principal()), "{heard}");
    assert_eq!(wire.finish()?.markers(), 0);
    Ok(())
}

#[test]
fn nothing_older_than_tls_1_3_is_spoken() -> Result<()> {
    needs!(["openssl"]);
    let scene = Scene::new()?;
    let intruder = scene.lab.outsider("node-a", "intruder")?;
    let to = scene.server.addr(15008).to_string();
    for (version, spoken) in [("-tls1_3", true), ("-tls1_2", false)] {
        let hello = ["s_client", "-connect", &to, version, "-alpn", "mtls/1"];
        let said = intruder.run("openssl", &hello)?;
        assert_eq!(said.stdout.contains("BEGIN CERTIFICATE"), spoken, "{version}: {said:?}");
    }
    // The agent's port is nobody's application: a workload is not delivered to it.
    for client in scene.clients() {
        assert_refused(&client.app(&["dial", "echo", &to])?);
    }
    Ok(())
}

#[test]
fn nonsense_on_the_tunnel_port_is_survived() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let intruder = scene.lab.outsider("node-a", "intruder")?;
    let echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let authority = Forger::with_authority(scene.mesh.ca_dir())?;
    let insider = authority.sign(scene.lab.dir(), "insider", "spiffe://cluster.local/ns/shop/sa/far")?;
    let open = open_frame(scene.server.addr(7000), SocketAddr::new(intruder.ip(), 40000));
    let cut = &open[..open.len() - 6];
    let pid = scene.mesh.agent("node-b").pid();
    let memory = scene.mesh.agent("node-b").resident_bytes()?;
    let outside: [&[&str]; 5] = [
        &["--raw", "--noise", "100000"],
        &["--raw", "--hex", "16030100ff01"],
        // A record longer than TLS allows.
        &["--raw", "--hex", "160301ffff", "--noise", "70000"],
        &["--raw", "--hex", "474554202f20485454502f312e310d0a0d0a"],
        &["--raw", "--hex", "16", "--cut"],
    ];
    let inside: [&[&str]; 9] = [
        &["--noise", "100000"],
        &["--hex", cut],
        &["--hex", cut, "--cut"],
        &["--hex", "ff"],
        &["--hex", "02414243"],
        &["--hex", "03"],
        &["--hex", &open, "--hex", &open],
        &["--hex", &open, "--hex", "02414243", "--cut"],
        &["--hex", &open, "--hex", "0400"],
    ];
    let agent = scene.mesh.agent("node-b");
    let counted = |agent: &mtls_tests::Agent, name: &str| -> Result<f64> {
        Ok(agent.metrics()?.sum(name, &[("direction", "inbound"), ("reason", "protocol")]))
    };
    assert_eq!(counted(agent, "mtls_handshake_failures_total")?, 0.0);
    assert_eq!(counted(agent, "mtls_connections_refused_total")?, 0.0);
    for args in outside {
        let answer = dial(&intruder, &scene.server, None, &[args, &["--limit-ms", "15000"]].concat())?;
        assert_ne!(answer["ended"], "timeout", "{args:?}: {answer}");
    }
    for args in inside {
        let answer = dial(&intruder, &scene.server, Some(&insider), args)?;
        assert_eq!(answer["handshake"], true, "{args:?}: {answer}");
        assert_ne!(answer["ended"], "timeout", "{args:?}: {answer}");
    }
    let agent = scene.mesh.agent("node-b");
    // The others never finish, or end before they say anything wrong.
    assert_eq!(counted(agent, "mtls_handshake_failures_total")?, 3.0, "{:?}", agent.get("/metrics"));
    assert!(counted(agent, "mtls_connections_refused_total")? >= 4.0, "{:?}", agent.get("/metrics"));
    // Somebody who only opens connections and says nothing.
    let mut silent = intruder.start_app(&[
        "dial",
        "hold",
        &format!("{}:15008", scene.server.ip()),
        "--limit-ms",
        "300",
    ])?;
    let _ = silent.line_within("anything", std::time::Duration::from_millis(500), |_| Some(()));
    let _ = silent.alive();
    let mut agent = scene.mesh.agent("node-b");
    assert!(agent.alive() && agent.pid() == pid, "the agent did not survive");
    assert!(agent.resident_bytes()? < memory + (32 << 20));
    agent = scene.mesh.agent("node-a");
    assert!(agent.alive());
    for client in scene.clients() {
        assert_echoed(&client.app(&["dial", "echo", &scene.server.addr(7000).to_string()])?);
    }
    // Whoever broke the protocol ended as a failure in the application's eyes, too.
    for ended in echo.all_json_with("ended").iter().filter(|end| end["bytes"] == 3) {
        assert_eq!(ended["ended"], "reset", "{ended}");
    }
    Ok(())
}

/// A proper call, as an agent makes it: OPEN, some data, and a wait for what comes back.
fn call(from: &Pod, to: &Pod, credentials: Option<&Credentials>, source: IpAddr) -> Result<Value> {
    let open = open_frame(to.addr(7000), SocketAddr::new(source, 40000));
    dial(
        from,
        to,
        credentials,
        &["--hex", &open, "--hex", "0268656c6c6f", "--hex", "03", "--limit-ms", "2000"],
    )
}

fn dial(from: &Pod, to: &Pod, credentials: Option<&Credentials>, more: &[&str]) -> Result<Value> {
    let to = to.addr(15008).to_string();
    let mut args = vec!["tls-dial", &to];
    let files = credentials.map(|files| [files.chain.to_string_lossy(), files.key.to_string_lossy()]);
    if let Some([chain, key]) = &files {
        args.extend(["--chain", chain, "--key", key]);
    }
    from.app(&[&args, more].concat())
}

fn impersonate(pod: &Pod, credentials: &Credentials) -> Result<Running> {
    let (chain, key) = (credentials.chain.to_string_lossy(), credentials.key.to_string_lossy());
    let server =
        pod.start_app(&["tls-serve", "--listen", "0.0.0.0:15008", "--chain", &chain, "--key", &key])?;
    server.json_with("listening")?;
    Ok(server)
}

/// OPEN of `mtls/1` in hexadecimal: type, version, destination, source, no trace.
fn open_frame(destination: SocketAddr, source: SocketAddr) -> String {
    let address = |address: SocketAddr| match address.ip() {
        IpAddr::V4(ip) => format!("04{:08x}{:04x}", u32::from(ip), address.port()),
        IpAddr::V6(ip) => format!("06{:032x}{:04x}", u128::from(ip), address.port()),
    };
    format!("0101{}{}00", address(destination), address(source))
}
