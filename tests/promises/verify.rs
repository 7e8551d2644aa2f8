//! `mtls verify`: an auditor's question about one pair, answered from the kernel's own state.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mtls_tests::{Agent, Finished, Level, Mode, eventually};
use serde_json::{Value, json};

use crate::{Scene, assert_echoed, needs};

fn verify(agent: &Agent, from: &str, to: &str) -> Result<(Option<i32>, Value)> {
    let said = agent.ask(&["verify", "--from", from, "--to", to, "-o", "json"])?;
    let answer = serde_json::from_str(&said.stdout).with_context(|| format!("{said:?}"))?;
    Ok((said.status.code(), answer))
}

fn check<'a>(answer: &'a Value, end: &str, name: &str) -> Result<&'a Value> {
    let checks = answer["checks"].as_array().context("no checks")?;
    let found = checks.iter().find(|check| check["end"] == end && check["name"] == name);
    found.with_context(|| format!("no check {name} of the {end} in {answer:#}"))
}

#[test]
fn a_pair_across_nodes_is_proven_from_either_end() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    assert_echoed(&scene.far.app(&["dial", "echo", &scene.server.addr(7000).to_string()])?);

    // The client's agent sees that its pod cannot but use TLS.
    let (code, answer) = verify(scene.mesh.agent("node-a"), "shop/far", "shop/server:7000")?;
    assert_eq!((code, &answer["verdict"]), (Some(0), &json!("encrypted")), "{answer:#}");
    for name in
        ["namespace", "connect_hooks", "capture_entry", "listeners", "destination_captured", "certificate"]
    {
        assert_eq!(check(&answer, "source", name)?["passed"], true, "{answer:#}");
    }
    // Both families, not only the one that is explained.
    let covered = check(&answer, "source", "destination_captured")?["found"].to_string();
    let addresses = [scene.server.ip().to_string(), scene.server.ip6().to_string()];
    assert!(addresses.iter().all(|address| covered.contains(address)), "{covered}");
    assert!(answer["unseen"][0].as_str().is_some_and(|text| text.contains("node-b")), "{answer:#}");
    let wire = answer["expected"]["wire"].as_str().unwrap_or_default();
    assert!(wire.contains("TLS 1.3") && wire.contains(":15008"), "{wire}");
    let last = &answer["ended"][0];
    assert_eq!(
        (&last["path"], &last["ending"], &last["bytes_sent"]),
        (&json!("tunnel"), &json!("clean"), &json!(5))
    );
    assert_eq!(last["destination"]["identity"], format!("spiffe://{}", scene.server.principal()), "{last}");

    // The server's agent cannot know, as long as the port takes plaintext too.
    let server = scene.mesh.agent("node-b");
    let (code, answer) = verify(server, "shop/far", "shop/server:7000")?;
    assert_eq!((code, &answer["verdict"]), (Some(1), &json!("unproven")), "{answer:#}");
    assert!(answer["reasons"][0].as_str().is_some_and(|why| why.contains("node-a")), "{answer:#}");
    scene.lab.peer_authentication(Level::Mesh, Mode::Strict)?;
    let server = scene.mesh.agent("node-b");
    let proven = eventually(Duration::from_secs(5), || {
        verify(server, "shop/far", "shop/server:7000").ok().filter(|(code, _)| *code == Some(0))
    });
    let (_, answer) =
        proven.with_context(|| format!("{:?}", verify(server, "shop/far", "shop/server:7000")))?;
    let mode = check(&answer, "destination", "mode")?;
    assert!(mode["found"].as_str().is_some_and(|found| found.contains("STRICT")), "{mode}");
    assert_eq!(check(&answer, "destination", "fence")?["passed"], true, "{answer:#}");
    assert_eq!(answer["expected"]["mode"]["policy"], "istio-system/mesh", "{answer:#}");
    Ok(())
}

#[test]
fn a_pair_of_one_node_is_authenticated_and_on_no_wire() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = scene.server.addr(7000).to_string();
    let stream = scene.near.start_app(&["dial", "wait", &to])?;
    stream.json_with("established")?;
    let agent = scene.mesh.agent("node-b");
    let open = eventually(Duration::from_secs(5), || {
        let (code, answer) = verify(agent, "shop/near", "shop/server:7000").ok()?;
        (code == Some(0) && answer["open"][0]["path"] == "same_node").then_some(answer)
    });
    let answer = open.with_context(|| format!("{:?}", verify(agent, "shop/near", "shop/server:7000")))?;
    assert_eq!((&answer["verdict"], &answer["unseen"]), (&json!("same_node"), &json!([])), "{answer:#}");
    let said = agent.ask(&["verify", "--from", "shop/near", "--to", "shop/server:7000"])?.success()?;
    for expected in ["PROVEN: within the node", "connect hooks", "fence", "OPEN CONNECTIONS OF THE PAIR (1)"]
    {
        assert!(said.stdout.contains(expected), "no {expected} in\n{}", said.stdout);
    }
    Ok(())
}

#[test]
fn plaintext_is_called_plaintext_and_a_refusal_no_proof() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    scene.lab.outsider("node-b", "stranger")?;
    let agent = scene.mesh.agent("node-b");
    let known =
        eventually(Duration::from_secs(5), || verify(agent, "outside/stranger", "shop/server:7000").ok());
    let (code, answer) = known.context("the stranger does not become known")?;
    assert_eq!((code, &answer["verdict"]), (Some(1), &json!("plaintext")), "{answer:#}");
    assert!(answer["reasons"][0].as_str().is_some_and(|why| why.contains("not enrolled")), "{answer:#}");

    scene.lab.peer_authentication(Level::Mesh, Mode::Strict)?;
    let becomes = |agent: &Agent, from: &str, verdict: &str| -> Result<Value> {
        let found = eventually(Duration::from_secs(5), || {
            let (code, answer) = verify(agent, from, "shop/server:7000").ok()?;
            (code == Some(1) && answer["verdict"] == verdict).then_some(answer)
        });
        found.with_context(|| format!("{from}: {:?}", verify(agent, from, "shop/server:7000")))
    };
    let agent = scene.mesh.agent("node-b");
    let answer = becomes(agent, "outside/stranger", "refused")?;
    assert!(answer["reasons"][0].as_str().is_some_and(|why| why.contains("istio-system/mesh")), "{answer:#}");

    scene.lab.peer_authentication(Level::Workload(&scene.server), Mode::Disable)?;
    let answer = becomes(agent, "shop/near", "plaintext")?;
    assert!(answer["reasons"][0].as_str().is_some_and(|why| why.contains("DISABLE")), "{answer:#}");
    Ok(())
}

#[test]
fn what_the_kernel_lost_is_noticed() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let agent = scene.mesh.agent("node-b");
    assert_eq!(verify(agent, "shop/near", "shop/server:7000")?.0, Some(0));
    let links = scene.lab.dir().join("bpf/node-b/mtls-v2/links");
    // Behind the agent's back: the fence of every pod, then the hook that captures.
    for (what, end, name) in [("lookup-", "destination", "fence"), ("connect4", "source", "connect_hooks")] {
        let mut removed = 0;
        for entry in std::fs::read_dir(&links)? {
            let path = entry?.path();
            if path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(what)) {
                std::fs::remove_file(path)?;
                removed += 1;
            }
        }
        ensure!(removed > 0, "no {what} in {}", links.display());
        let (code, answer) = verify(agent, "shop/near", "shop/server:7000")?;
        assert_eq!((code, &answer["verdict"]), (Some(1), &json!("unproven")), "{answer:#}");
        assert_eq!(check(&answer, end, name)?["passed"], false, "{answer:#}");
    }
    Ok(())
}

#[test]
fn a_connection_from_before_enrolment_is_found() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    scene.lab.namespace("late", false)?;
    let late = scene.lab.add(mtls_tests::PodSpec::new("node-b", "late").namespace("late"))?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let stream = late.start_app(&["dial", "wait", &scene.server.addr(7000).to_string()])?;
    stream.json_with("established")?;
    scene.lab.namespace("late", true)?;
    let agent = scene.mesh.agent("node-b");
    let found = eventually(Duration::from_secs(10), || {
        let (_, answer) = verify(agent, "late/late", "shop/server:7000").ok()?;
        // A pod may have its certificate before it is enrolled.
        check(&answer, "source", "direct_connections").ok()?;
        (check(&answer, "source", "certificate").ok()?["passed"] == true).then_some(answer)
    });
    let answer = found.with_context(|| format!("{:?}", verify(agent, "late/late", "shop/server:7000")))?;
    assert_eq!(answer["verdict"], "plaintext", "{answer:#}");
    assert_eq!(check(&answer, "source", "direct_connections")?["passed"], false, "{answer:#}");
    drop(stream);
    let proven = eventually(Duration::from_secs(5), || {
        verify(agent, "late/late", "shop/server:7000").ok().filter(|(code, _)| *code == Some(0))
    });
    assert!(proven.is_some(), "{:?}", verify(agent, "late/late", "shop/server:7000"));
    Ok(())
}

#[test]
fn questions_that_cannot_be_answered_are_errors() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let asked = |agent: &Agent, from: &str, to: &str| -> Result<Finished> {
        agent.ask(&["verify", "--from", from, "--to", to])
    };
    let agent = scene.mesh.agent("node-b");
    for (from, to, expected) in [
        ("shop/nobody", "shop/server:7000", "shop/nobody"),
        ("shop/far", "shop/ghost:7000", "shop/ghost"),
        ("far", "shop/server:7000", "NAMESPACE/NAME"),
        ("shop/far", "shop/server", "NAMESPACE/NAME:PORT"),
        ("shop/far", "shop/server:0", "NAMESPACE/NAME:PORT"),
    ] {
        let said = asked(agent, from, to)?;
        assert_eq!(said.status.code(), Some(2), "{from} {to}: {said:?}");
        assert!(said.stderr.contains(expected) && said.stdout.is_empty(), "{from} {to}: {said:?}");
    }
    // Neither end is here.
    let said = asked(scene.mesh.agent("node-a"), "shop/near", "shop/server:7000")?;
    assert_eq!(said.status.code(), Some(2), "{said:?}");
    assert!(said.stderr.contains("ask the agent of node-b"), "{said:?}");
    Ok(())
}
