//! Mistakes of the operator: each is named with its place and its remedy, and none of them opens anything.

use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use mtls_tests::{Agent, Finished, Level, Mode, Running, eventually};

use crate::{Scene, assert_echoed, assert_refused, needs};

#[test]
fn a_broken_manifest_is_named_and_changes_nothing() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let intruder = scene.lab.outsider("node-a", "intruder")?;
    scene.lab.peer_authentication(Level::Mesh, Mode::Strict)?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = scene.server.addr(7000).to_string();
    eventually(Duration::from_secs(5), || {
        let answer = intruder.app(&["dial", "echo", &to]).ok()?;
        (answer["ended"] == "refused").then_some(())
    });
    let valid = |scene: &mut Scene| {
        Ok::<_, anyhow::Error>(scene.mesh.agent("node-b").metrics()?.sum("mtls_config_valid", &[]))
    };
    assert_eq!(valid(&mut scene)?, 1.0);
    for (file, text, named) in [
        ("broken.yaml", "apiVersion: v1\nkind: Pod\nmetadata: [\n", "broken.yaml"),
        (
            "wrong.yaml",
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: x, namespace: shop}\n\
             spec: {mtls: {mode: SOMETIMES}}\n",
            "mode",
        ),
    ] {
        let earlier = scene.mesh.agent("node-b").log().len();
        scene.lab.write_text(file, text)?;
        let noticed = eventually(Duration::from_secs(5), || {
            let log = scene.mesh.agent("node-b").log();
            let news = log.get(earlier..).unwrap_or_default();
            (news.contains(file) && news.contains(named)).then_some(())
        });
        assert!(noticed.is_some(), "{file} is not named:\n{}", scene.mesh.agent("node-b").log());
        assert_eq!(valid(&mut scene)?, 0.0);
        assert_refused(&intruder.app(&["dial", "echo", &to])?);
        for client in scene.clients() {
            assert_echoed(&client.app(&["dial", "echo", &to])?);
        }
        scene.lab.remove_file(file)?;
        let mended = eventually(Duration::from_secs(5), || (valid(&mut scene).ok()? == 1.0).then_some(()));
        assert!(mended.is_some(), "the mended directory is not taken");
    }
    Ok(())
}

#[test]
fn what_the_command_line_gets_wrong_is_named() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let agent = scene.mesh.agent("node-a");
    let config = scene.lab.dir().join("wrong.yaml");
    std::fs::write(&config, "drian: 5\n")?;
    let config = config.to_string_lossy().into_owned();
    let nowhere = "/sys/fs/cgroup/no/such/group";
    let cases: [(&[&str], &str); 6] = [
        (&["--no-such-flag"], "--no-such-flag"),
        (&["--config", &config], "drian"),
        (&["--cgroup-root", nowhere], nowhere),
        (&["--manifests", "/no/such/manifests"], "/no/such/manifests"),
        (&["--trust-domain", "Not A Domain"], "Not A Domain"),
        (&["--tunnel-congestion", "pigeon"], "--tunnel-congestion pigeon"),
    ];
    for (flags, named) in cases {
        let finished = start_another(agent, flags)?;
        assert!(!finished.status.success(), "{flags:?} was accepted");
        assert!(finished.stderr.contains(named), "{flags:?} is not named:\n{}", finished.stderr);
    }
    assert!(agent.alive());
    Ok(())
}

#[test]
fn a_port_that_is_taken_is_named() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let agent = scene.mesh.agent("node-a");
    // The running agent has it.
    let finished = start_another(agent, &["--admin", "127.0.0.1:15020"])?;
    assert!(!finished.status.success());
    assert!(finished.stderr.contains("127.0.0.1:15020"), "{}", finished.stderr);
    // And the running agent is none the worse.
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    assert_echoed(&scene.far.app(&["dial", "echo", &scene.server.addr(7000).to_string()])?);
    Ok(())
}

#[test]
fn a_kernel_that_refuses_is_named_with_the_remedy() -> Result<()> {
    needs!(["setpriv"]);
    let mut scene = Scene::new()?;
    scene.mesh.agent("node-a").kill();
    let args = scene.mesh.agent("node-a").args().clone();
    let product = scene.mesh.agent("node-a").command()?;
    let node = scene.lab.node("node-a")?;
    let mut command = node.command_in("agent", "setpriv");
    command
        .args(["--bounding-set", "-bpf,-sys_admin", "--inh-caps", "-bpf,-sys_admin"])
        .arg(product.get_program());
    command.args(&args);
    let finished = Running::start(command)?.finish_within(Duration::from_secs(20))?;
    assert!(!finished.status.success(), "it claims to run without CAP_BPF");
    assert!(finished.stderr.contains("capability CAP_"), "{}", finished.stderr);
    // A directory that is no bpffs cannot hold what must outlive the agent.
    let plain = scene.lab.dir().join("plain");
    std::fs::create_dir_all(&plain)?;
    let plain = plain.to_string_lossy().into_owned();
    let finished = start_another(scene.mesh.agent("node-a"), &["--bpffs", &plain])?;
    assert!(!finished.status.success());
    assert!(finished.stderr.contains(&plain) && finished.stderr.contains("bpf"), "{}", finished.stderr);
    Ok(())
}

#[test]
fn a_pod_with_wrong_paths_is_reported_and_harms_no_other() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    for (name, netns, cgroup) in [
        ("lost-netns", "/run/netns/no-such-namespace".to_owned(), scene.far.cgroup().display().to_string()),
        ("lost-cgroup", scene.far.netns().path().display().to_string(), "/no/such/cgroup".to_owned()),
    ] {
        scene.lab.write_text(
            &format!("pod-shop-{name}.yaml"),
            &format!(
                "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: shop\n  annotations:\n    \
                 mtls.dev/netns: {netns}\n    mtls.dev/cgroup: {cgroup}\n\
                 spec: {{nodeName: node-a, serviceAccountName: {name}}}\n\
                 status: {{phase: Running, podIP: 10.30.1.{}}}\n",
                if name == "lost-netns" { 200 } else { 201 }
            ),
        )?;
    }
    let told = eventually(Duration::from_secs(10), || {
        let status = scene.mesh.agent("node-a").status(&[]).ok()?;
        (status.contains("no-such-namespace") && status.contains("/no/such/cgroup")).then_some(())
    });
    let status = scene.mesh.agent("node-a").status(&[])?;
    assert!(told.is_some(), "{status}\n{}", scene.mesh.agent("node-a").log());
    assert_echoed(&scene.far.app(&["dial", "echo", &scene.server.addr(7000).to_string()])?);
    Ok(())
}

/// Starts a second agent with the flags of a running one, but other sockets, and these flags last.
fn start_another(agent: &mut Agent, flags: &[&str]) -> Result<Finished> {
    let mut args = agent.args().clone();
    // In the lab's own directory: tests run side by side.
    let socket = args.iter().skip_while(|arg| *arg != "--admin-socket").nth(1).cloned().unwrap_or_default();
    for (flag, value) in [("--admin", "127.0.0.1:15999"), ("--admin-socket", &format!("{socket}.another"))] {
        set(&mut args, flag, value);
    }
    for pair in flags.chunks(2) {
        match pair {
            [flag, value] => set(&mut args, flag, value),
            lone => args.extend(lone.iter().map(ToString::to_string)),
        }
    }
    let mut command: Command = agent.command()?;
    command.args(args);
    Running::start(command)?.finish_within(Duration::from_secs(20))
}

fn set(args: &mut Vec<String>, flag: &str, value: &str) {
    match args.iter().position(|arg| arg == flag).and_then(|at| args.get_mut(at + 1)) {
        Some(slot) => *slot = value.to_owned(),
        None => args.extend([flag.to_owned(), value.to_owned()]),
    }
}
