//! Taking it off a node: with no capability at all everything goes that agents left there, and nothing while an agent runs.

use anyhow::Result;
use mtls_tests::{Lab, Level, Mesh, Mode, PodSpec, skip};

use crate::container::NEEDS;
use crate::privileges::in_containers;
use crate::run;

#[test]
fn what_agents_leave_goes_when_they_are_gone_and_not_before() -> Result<()> {
    if skip(&NEEDS) {
        return Ok(());
    }
    let lab = Lab::two_nodes()?;
    let server = lab.add(PodSpec::new("node-b", "server").port("main", 7000))?;
    let intruder = lab.outsider("node-a", "intruder")?;
    let mut mesh = Mesh::start(&lab)?;
    lab.peer_authentication(Level::Mesh, Mode::Strict)?;
    let containers = in_containers(&lab, &mut mesh)?;
    let agent = &containers[1];
    let _echo = server.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = server.addr(7000).to_string();
    let intruded = || -> Result<_> { Ok(intruder.app(&["dial", "echo", &to])?["ended"].clone()) };
    let network = agent.on_node("cni-conf").join("10-lab.conflist");
    let is_chained = || Ok::<_, anyhow::Error>(std::fs::read_to_string(&network)?.contains("mtls-cni"));
    let plugin = agent.on_node("cni-bin").join("mtls-cni");

    let tried = agent.uninstall(&lab, "node-b")?.run_by(|program, args| run(program, args))?;
    assert_eq!(tried.status.code(), Some(1), "{}", tried.stdout);
    assert!(tried.stderr.contains("an agent answers on /run/mtls/agent.sock"), "{}", tried.stderr);
    assert!(is_chained()? && plugin.exists());
    assert_eq!(intruded()?, "refused");

    mesh.agent("node-b").kill();
    let pinned = agent.on_node("bpffs").join("node-b");
    std::fs::create_dir(pinned.join("mtls-probe-0"))?;
    assert_eq!(intruded()?, "refused", "STRICT ended with its agent");
    let done = agent.uninstall(&lab, "node-b")?.run_by(|program, args| run(program, args))?.success()?;
    assert!(done.stdout.trim_end().ends_with("pods released: 1"), "{}", done.stdout);
    assert!(!is_chained()? && !plugin.exists() && !pinned.exists());
    assert_eq!(intruded()?, "eof");

    let again = agent.uninstall(&lab, "node-b")?.run_by(|program, args| run(program, args))?.success()?;
    assert!(again.stdout.contains("mtls-cni was not installed"), "{}", again.stdout);
    Ok(())
}
