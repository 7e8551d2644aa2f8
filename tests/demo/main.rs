//! The demo: nothing in, a running mesh with real applications for a minute and a table of what happened out.
//!
//! Every line of the table is checked; a claim that does not hold is named and makes the exit status non-zero.

mod scene;
mod table;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mtls_tests::apps::Session;
use mtls_tests::{Level, MARKER, Mesh, Mode, Pod, Seen, eventually};

use scene::Scene;
use table::{Flow, Table};

fn main() -> ExitCode {
    match show() {
        Ok(problems) if problems.is_empty() => {
            println!("\nEvery claim above was checked and holds. Everything the demo made is gone again.");
            ExitCode::SUCCESS
        }
        Ok(problems) => {
            println!("\nThese claims do not hold:");
            problems.iter().for_each(|problem| println!("  ✗ {problem}"));
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("\nThe demo could not run: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn show() -> Result<Vec<String>> {
    if let Some(reason) = mtls_tests::missing(&scene::NEEDS) {
        anyhow::bail!(reason);
    }
    println!(
        "Two nodes made of network namespaces. Pods on them run ordinary programs that know nothing of TLS.\n\
         An agent on each node redirects their connections by eBPF and carries them in mutual TLS 1.3.\n"
    );
    let mut scene = Scene::set()?;
    let mut table = Table::default();
    let applications = scene.applications()?;
    for application in &applications {
        for client in [&scene.far, &scene.near] {
            let flow = observe(&scene.lab, &mut scene.mesh, client, &application.server, || {
                (application.session)(client)
            })
            .with_context(|| format!("{} from {}", application.name, client.name()))?;
            progress(&format!("{}: {}", flow.path(), flow.summary()));
            table.flows.push(flow);
        }
    }
    intrude(&mut scene, &mut table)?;
    println!("\n{table}");
    Ok(table.problems())
}

/// Runs a session while the wire is watched, and asks everybody afterwards what it was.
fn observe(
    lab: &mtls_tests::Lab,
    mesh: &mut Mesh,
    client: &Pod,
    server: &Pod,
    session: impl FnOnce() -> Result<Session>,
) -> Result<Flow> {
    let same_node = client.node().name() == server.node().name();
    let earlier = mesh.agent("node-b").access_log().len();
    let (wire, port) = (lab.watch_wire()?, lab.watch_pod(server)?);
    let session = session()?;
    let (wire, port) = (wire.finish()?, port.finish()?);
    let lines = settled_log(mesh, earlier);
    let of_this = |line: &&serde_json::Value| {
        line["destination_workload"] == format!("{}/{}", server.namespace(), server.name())
    };
    let lines: Vec<_> = lines.iter().filter(of_this).collect();
    let text = |key: &str| lines.iter().find_map(|line| line[key].as_str()).unwrap_or("none").to_owned();
    let count = |key: &str| lines.iter().filter_map(|line| line[key].as_u64()).sum::<u64>();
    Ok(Flow {
        same_node,
        identities: [text("source_identity"), text("destination_identity")],
        expected_identities: [client, server].map(|pod| format!("spiffe://{}", pod.principal())),
        cipher: text("cipher"),
        bytes: count("bytes_sent") + count("bytes_received"),
        connections: lines.len(),
        wire: on_the_wire(&wire, &port, client, server, same_node),
        expected_client: client.ip(),
        session,
    })
}

/// What the captures say, in a newcomer's words, or what is wrong.
fn on_the_wire(
    wire: &Seen,
    port: &Seen,
    client: &Pod,
    server: &Pod,
    same_node: bool,
) -> Result<String, String> {
    if same_node {
        let flows = wire.between(client, server).count() + port.between(client, server).count();
        return match (flows, wire.markers() + port.markers()) {
            (0, 0) => Ok("nothing: it never left the two pods' loopbacks".into()),
            (flows, markers) => Err(format!("{flows} connections, and the marker {markers} times")),
        };
    }
    let encrypted = wire.encrypted(client, server).map_err(|error| format!("{error:#}"))?;
    let tunnels = match encrypted.connections {
        1 => "1 tunnel".into(),
        many => format!("{many} tunnels"),
    };
    // A tunnel that an earlier session left for this one shook hands before this capture began.
    let handshake = if encrypted.group.is_empty() { "handshake earlier" } else { encrypted.group };
    Ok(format!("TLS 1.3 on 15008 only ({handshake}), {tunnels}, marker 0 times"))
}

/// The access log's new lines, once no more come.
fn settled_log(mesh: &mut Mesh, earlier: usize) -> Vec<serde_json::Value> {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut length = 0;
    loop {
        std::thread::sleep(Duration::from_millis(300));
        let lines = mesh.agent("node-b").access_log();
        if (lines.len() == length && length > earlier) || Instant::now() > deadline {
            return lines.into_iter().skip(earlier).collect();
        }
        length = lines.len();
    }
}

/// A pod without an identity asks the web server for a page: mode STRICT, then PERMISSIVE.
fn intrude(scene: &mut Scene, table: &mut Table) -> Result<()> {
    progress("an intruder, not enrolled, tries the web server: mode STRICT");
    let to = scene.web.addr(8080);
    let attempt =
        scene.intruder.app(&["dial", "wait", &to.to_string(), "--message", MARKER, "--limit-ms", "1500"])?;
    let page = |intruder: &Pod| {
        let page = intruder.run("curl", &["-sS", "--max-time", "2", &format!("http://{to}/")]).ok()?;
        page.stdout.contains(MARKER).then_some(())
    };
    let ms = attempt["ms"].as_f64().unwrap_or(f64::INFINITY);
    let outcome = match attempt["ended"].as_str() {
        Some("refused") if ms < 100.0 && page(&scene.intruder).is_none() => {
            Ok(format!("refused by RST after {ms:.1} ms"))
        }
        how => Err(format!("{} after {ms:.0} ms", how.unwrap_or("nothing"))),
    };
    table.intruder.push(("STRICT", outcome));
    progress("the same with mode PERMISSIVE");
    let web = scene.web.name();
    let counted = |mesh: &mut Mesh| {
        let labels = [("destination_workload", web), ("outcome", "accepted")];
        Some(mesh.agent("node-b").metrics().ok()?.sum("mtls_plaintext_connections_total", &labels))
    };
    let earlier = counted(&mut scene.mesh).unwrap_or(0.0);
    scene.lab.peer_authentication(Level::Mesh, Mode::Permissive)?;
    let served = eventually(Duration::from_secs(5), || page(&scene.intruder)).is_some();
    let counted =
        eventually(Duration::from_secs(5), || counted(&mut scene.mesh).filter(|count| *count > earlier));
    let outcome = match (served, counted) {
        (true, Some(count)) => {
            Ok(format!("served, and counted as plaintext ({} connection)", count - earlier))
        }
        (served, counted) => Err(format!("served: {served}, counted: {counted:?}")),
    };
    table.intruder.push(("PERMISSIVE", outcome));
    ensure!(
        scene.mesh.agent("node-a").alive() && scene.mesh.agent("node-b").alive(),
        "an agent died on the way"
    );
    Ok(())
}

fn progress(what: &str) {
    println!("• {what}");
}
