//! Identities from a SPIFFE Workload API instead of an authority of our own: the same promises hold.

use std::time::Duration;

use anyhow::Result;
use mtls_tests::{Spire, SpireAuthority, Svid, eventually};

use crate::{Scene, assert_echoed, assert_refused, needs};

const DAY: Duration = Duration::from_secs(24 * 3600);

#[test]
fn agents_live_on_what_a_workload_api_gives() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let authority = SpireAuthority::new("spire")?;
    let ids = |pods: &[&mtls_tests::Pod]| -> Result<Vec<Svid>> {
        pods.iter()
            .map(|pod| authority.svid(&format!("spiffe://{}", pod.principal()), DAY, &[&authority]))
            .collect()
    };
    let dir = scene.lab.dir().to_owned();
    let a = Spire::start(dir.join("spire-a.sock"), Some(ids(&[&scene.far])?))?;
    let b = Spire::start(dir.join("spire-b.sock"), Some(ids(&[&scene.near, &scene.server])?))?;
    for (node, spire) in [("node-a", &a), ("node-b", &b)] {
        let agent = scene.mesh.agent(node);
        agent.terminate()?;
        agent.await_end(Duration::from_secs(10))?;
        let args = agent.args();
        while let Some(at) = args.iter().position(|arg| arg.starts_with("--ca-")) {
            args.drain(at..at + 2);
        }
        args.extend(["--spiffe-socket".to_owned(), format!("unix://{}", spire.socket().display())]);
        agent.start()?;
    }
    // Nobody asks it any more.
    scene.mesh.stop_ca();
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = scene.server.addr(7000).to_string();
    for client in scene.clients() {
        assert_echoed(&client.app(&["dial", "echo", &to])?);
    }
    let mut stream = scene.far.start_app(&["dial", "stream", &to, "--pause-ms", "20"])?;
    stream.json_with("established")?;
    let certs = scene.mesh.agent("node-a").ask(&["certs"])?.success()?.stdout;
    assert!(certs.contains("CN=spire"), "{certs}");
    let line = scene.mesh.agent("node-b").access_log_line("tunnel", |line| line["path"] == "tunnel")?;
    assert_eq!(line["source_identity"], format!("spiffe://{}", scene.far.principal()), "{line}");

    // Renewed by the API: the stream goes on, and so does everything else.
    a.say(Some(ids(&[&scene.far])?));
    b.say(Some(ids(&[&scene.near, &scene.server])?));
    let renewed = eventually(Duration::from_secs(10), || {
        let metrics = scene.mesh.agent("node-a").metrics().ok()?;
        (metrics.sum("mtls_certificate_renewals_total", &[]) >= 2.0).then_some(())
    });
    assert!(renewed.is_some(), "the renewed certificate is not taken");
    assert_echoed(&scene.far.app(&["dial", "echo", &to])?);
    stream.say("stop")?;
    assert_eq!(stream.finish()?.success()?.json()?["ended"], "eof");

    // An identity that is taken away is not served any more, and no other pod's is used for it.
    a.say(Some(ids(&[&scene.near])?));
    let said = eventually(Duration::from_secs(10), || {
        let certs = scene.mesh.agent("node-a").ask(&["certs"]).ok()?;
        (certs.status.code() == Some(1)).then_some(certs.stdout)
    });
    let said = said.unwrap_or_default();
    assert!(said.contains("gives this agent no") && said.contains("/sa/near"), "{said}");
    assert_refused(&scene.far.app(&["dial", "echo", &to])?);
    Ok(())
}
