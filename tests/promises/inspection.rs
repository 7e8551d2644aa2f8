//! `mtls workloads`, `certs`, `connections`, `services` and `policy list`: what they say of a lab whose facts are known.

use std::time::Duration;

use anyhow::{Context, Result};
use mtls_tests::{Agent, Level, Mode, eventually};
use serde_json::{Value, json};

use crate::{Scene, needs};

/// What a subcommand prints for programs.
fn json_of(agent: &Agent, args: &[&str]) -> Result<Value> {
    let said = agent.ask(&[args, &["-o", "json"]].concat())?.success()?;
    serde_json::from_str(&said.stdout).with_context(|| said.stdout.clone())
}

/// The row of a listing with that name.
fn row<'a>(listing: &'a Value, name: &str) -> Result<&'a Value> {
    let items = listing["items"].as_array().context("no items")?;
    items.iter().find(|row| row["name"] == name).with_context(|| format!("no {name} in {listing}"))
}

#[test]
fn workloads_are_listed_with_place_identity_and_mode() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    scene.lab.outsider("node-a", "stranger")?;
    scene.lab.peer_authentication(Level::Ports(&scene.server, &[(7001, Mode::Permissive)]), Mode::Strict)?;
    let agent = scene.mesh.agent("node-b");
    let known = eventually(Duration::from_secs(5), || {
        let listing = json_of(agent, &["workloads"]).ok()?;
        (listing["total"] == 4 && row(&listing, "server").ok()?["modes"]["default"] == "STRICT")
            .then_some(listing)
    });
    let listing = known.with_context(|| format!("{:?}", json_of(agent, &["workloads"])))?;
    let server = row(&listing, "server")?;
    let modes = json!({ "default": "STRICT", "ports": { "7001": "PERMISSIVE" }, "authorization": false, "dry_run": null });
    assert_eq!(server["modes"], modes);
    assert_eq!((&server["local"], &server["protocol"]), (&json!(true), &json!("mtls")), "{server}");
    assert_eq!(server["identity"], format!("spiffe://{}", scene.server.principal()));
    assert_eq!(server["enrolment"], json!({ "state": "enrolled" }));
    assert_eq!(server["addresses"][0], scene.server.ip().to_string());
    let far = row(&listing, "far")?;
    assert_eq!((&far["local"], &far["node"]), (&json!(false), &json!("node-a")), "{far}");
    let stranger = row(&listing, "stranger")?;
    assert_eq!((&stranger["protocol"], &stranger["identity"]), (&json!("none"), &Value::Null), "{stranger}");

    let table = agent.ask(&["workloads"])?.success()?.stdout;
    let line =
        |name: &str| table.lines().find(|line| line.contains(&format!(" {name} "))).unwrap_or("").to_owned();
    for (name, parts) in [
        ("server", &["mTLS", "STRICT, 7001 PERMISSIVE", "ns/shop/sa/server", "local, enrolled"][..]),
        ("far", &["node-a", "mTLS", "PERMISSIVE", "remote"]),
        ("stranger", &["outside", "none", "remote, not enrolled"]),
    ] {
        assert!(parts.iter().all(|part| line(name).contains(part)), "{name}: {parts:?} in\n{table}");
    }

    // Filters and pages: what is left out is said.
    assert_eq!(json_of(agent, &["workloads", "-n", "outside"])?["total"], 1);
    assert_eq!(json_of(agent, &["workloads", "shop/near"])?["items"][0]["name"], "near");
    let page = json_of(agent, &["workloads", "--limit", "1", "--offset", "1"])?;
    assert_eq!((&page["total"], page["items"].as_array().map(Vec::len)), (&json!(4), Some(1)), "{page}");
    let cut = agent.ask(&["workloads", "--limit", "1"])?.success()?.stdout;
    assert!(cut.contains("1 of 4"), "{cut}");
    let unknown = agent.ask(&["workloads", "nobody"])?;
    assert_eq!(unknown.status.code(), Some(1));
    assert!(unknown.stderr.contains("nobody"), "{unknown:?}");
    Ok(())
}

#[test]
fn certificates_verify_and_say_how_long() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let agent = scene.mesh.agent("node-b");
    let listing = json_of(agent, &["certs", "server"])?;
    let certificate = &listing["items"][0];
    let id = format!("spiffe://{}", scene.server.principal());
    assert_eq!((&listing["total"], &certificate["identity"]), (&json!(1), &json!(id)), "{listing}");
    assert_eq!(
        (&certificate["verifies"], &certificate["workloads"]),
        (&json!(true), &json!(["shop/server"]))
    );
    assert_eq!(certificate["chain"][0]["uris"], json!([id]), "{certificate}");
    assert_eq!(certificate["chain"][0]["serial"], certificate["serial"]);
    assert_eq!(certificate["roots"].as_array().map(Vec::len), Some(1), "{certificate}");
    let left = certificate["seconds_left"].as_u64().context("no seconds_left")?;
    assert!((23 * 3600..=24 * 3600).contains(&left), "{left}");
    assert!(certificate["next_renewal"].as_str() < certificate["not_after"].as_str(), "{certificate}");

    let table = agent.ask(&["certs"])?.success()?.stdout;
    for expected in [&id, "yes", "ISSUERS", "root"] {
        assert!(table.contains(expected), "no {expected} in\n{table}");
    }
    assert_eq!(agent.ask(&["certs", "nobody"])?.status.code(), Some(2));
    Ok(())
}

#[test]
fn certificates_that_ran_out_do_not_verify() -> Result<()> {
    needs!();
    let options = mtls_tests::Options { leaf_lifetime: "4s", ..Default::default() };
    let mut scene = Scene::with(&options)?;
    assert_eq!(scene.mesh.agent("node-b").ask(&["certs"])?.status.code(), Some(0));
    scene.mesh.stop_ca();
    let agent = scene.mesh.agent("node-b");
    let said = eventually(Duration::from_secs(20), || {
        agent.ask(&["certs"]).ok().filter(|said| said.status.code() == Some(1))
    });
    let said = said.context("a certificate without an authority verifies for ever")?;
    assert!(said.stdout.contains("NO CERTIFICATE") && said.stdout.contains("DOES NOT VERIFY"), "{said:?}");
    Ok(())
}

#[test]
fn connections_are_listed_with_both_identities_and_what_lets_them_in() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    scene.lab.authorization_policy(
        &scene.server,
        "members",
        &json!({ "action": "ALLOW", "rules": [{ "from": [{ "source": { "namespaces": ["shop"] } }] }] }),
    )?;
    let to = scene.server.addr(7000).to_string();
    let agent = scene.mesh.agent("node-b");
    let in_force = eventually(Duration::from_secs(5), || {
        (json_of(agent, &["policy"]).ok()?["total"] == 1).then_some(())
    });
    assert!(in_force.is_some());
    let streams =
        [scene.far.start_app(&["dial", "wait", &to])?, scene.near.start_app(&["dial", "wait", &to])?];
    for stream in &streams {
        stream.json_with("established")?;
    }
    let open = eventually(Duration::from_secs(5), || {
        json_of(agent, &["connections"]).ok().filter(|open| open["matching"] == 2)
    });
    let open = open.with_context(|| format!("{:?}", json_of(agent, &["connections"])))?;
    let rows = open["newest"].as_array().context("no rows")?;
    for (path, client, tls) in
        [("tunnel", &scene.far, json!("TLSv1.3")), ("same_node", &scene.near, Value::Null)]
    {
        let row =
            rows.iter().find(|row| row["path"] == path).with_context(|| format!("no {path}: {open}"))?;
        assert_eq!(row["source"]["identity"], format!("spiffe://{}", client.principal()), "{row}");
        assert_eq!(row["destination"]["identity"], format!("spiffe://{}", scene.server.principal()), "{row}");
        assert_eq!((&row["tls"], &row["mode"]), (&tls, &json!("PERMISSIVE")), "{row}");
        assert_eq!(row["policy"], "shop/members", "{row}");
        assert_eq!(row["cipher"].is_string(), tls.is_string(), "{row}");
    }
    assert_eq!(json_of(agent, &["connections", "far"])?["matching"], 1);
    assert_eq!(json_of(agent, &["connections", "-n", "outside"])?["matching"], 0);
    let table = agent.ask(&["connections"])?.success()?.stdout;
    for expected in ["inbound tunnel", "same_node", "TLSv1.3", "TLS13_", "shop/members", "ns/shop/sa/far"] {
        assert!(table.contains(expected), "no {expected} in\n{table}");
    }

    drop(streams);
    let ended = eventually(Duration::from_secs(5), || {
        json_of(agent, &["connections", "--ended"]).ok().filter(|ended| ended["total"] == 2)
    });
    let ended = ended.with_context(|| format!("{:?}", json_of(agent, &["connections", "--ended"])))?;
    assert!(ended["items"][0]["at"].as_str() >= ended["items"][1]["at"].as_str(), "newest first: {ended}");
    assert_eq!(json_of(agent, &["connections"])?["matching"], 0);
    Ok(())
}

#[test]
fn services_are_listed_with_their_endpoints() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let outside = scene.lab.outsider("node-a", "legacy")?;
    let all = scene.lab.service("all", &[&scene.server], 80, &json!(7000))?;
    scene.lab.service("some", &[&scene.far, &outside], 81, &json!(7000))?;
    scene.lab.service("empty", &[], 82, &json!(7000))?;
    let agent = scene.mesh.agent("node-b");
    let listing = eventually(Duration::from_secs(5), || {
        json_of(agent, &["services"]).ok().filter(|listing| listing["total"] == 3)
    });
    let listing = listing.with_context(|| format!("{:?}", json_of(agent, &["services"])))?;
    let row_of = row(&listing, "all")?;
    assert_eq!((&row_of["address"], &row_of["port"]), (&json!(all.ip()), &json!(80)), "{row_of}");
    assert_eq!(
        (&row_of["mesh"], &row_of["ready"], &row_of["in_use_local"]),
        (&json!("all"), &json!(1), &json!(1))
    );
    assert_eq!(row_of["endpoints"][0]["workload"], "shop/server", "{row_of}");
    let some = row(&listing, "some")?;
    assert_eq!(
        (&some["mesh"], &some["in_use_mesh"], &some["in_use_local"]),
        (&json!("some"), &json!(1), &json!(0))
    );
    assert_eq!(row(&listing, "empty")?["mesh"], "no_endpoints");
    let table = agent.ask(&["services"])?.success()?.stdout;
    assert!(table.contains("NO ENDPOINTS") && table.contains("1 of 2"), "{table}");
    assert_eq!(agent.ask(&["services", "nobody"])?.status.code(), Some(1));
    Ok(())
}

#[test]
fn policies_are_listed_with_scope_and_effect() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let agent = scene.mesh.agent("node-b");
    let none = agent.ask(&["policy"])?.success()?.stdout;
    assert!(none.contains("no policy"), "{none}");
    scene.lab.peer_authentication(Level::Mesh, Mode::Strict)?;
    scene.lab.peer_authentication(Level::Ports(&scene.server, &[(9999, Mode::Disable)]), Mode::Permissive)?;
    scene.lab.authorization_policy(&scene.server, "nobody", &json!({ "action": "DENY", "rules": [{}] }))?;
    let listing = eventually(Duration::from_secs(5), || {
        json_of(agent, &["policy", "list"]).ok().filter(|listing| listing["total"] == 3)
    });
    let listing = listing.with_context(|| format!("{:?}", json_of(agent, &["policy", "list"])))?;
    let mesh = row(&listing, "mesh")?;
    assert_eq!(
        (&mesh["scope"], &mesh["mode"], &mesh["state"]),
        (&json!("mesh"), &json!("STRICT"), &json!("enforced"))
    );
    assert_eq!((&mesh["selects"], &mesh["selects_local"]), (&json!(3), &json!(2)), "{mesh}");
    let server = row(&listing, "server")?;
    assert_eq!(
        (&server["port_modes"], &server["selects"]),
        (&json!({ "9999": "DISABLE" }), &json!(1)),
        "{server}"
    );
    let warnings = server["warnings"].as_array().map(Vec::len);
    assert_eq!(warnings, Some(1), "no container declares 9999: {server}");
    let deny = row(&listing, "nobody")?;
    assert_eq!((&deny["action"], &deny["rules"]), (&json!("DENY"), &json!(1)), "{deny}");
    let table = agent.ask(&["policy"])?.success()?.stdout;
    for expected in ["DENY, 1 rule", "PERMISSIVE, 9999 DISABLE", "STRICT", "warning: ", "enforced"] {
        assert!(table.contains(expected), "no {expected} in\n{table}");
    }
    Ok(())
}

#[test]
fn without_an_agent_every_question_is_an_error_that_names_the_socket() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let agent = scene.mesh.agent("node-b");
    agent.kill();
    let verify = ["verify", "--from", "shop/far", "--to", "shop/server:7000"];
    for (args, code) in [
        (&["workloads"][..], 1),
        (&["connections"], 1),
        (&["services"], 1),
        (&["policy"], 1),
        (&["certs"], 2),
        (&verify, 2),
    ] {
        let said = agent.ask(args)?;
        assert_eq!(said.status.code(), Some(code), "{args:?}: {said:?}");
        assert!(said.stderr.contains("node-b.sock") && said.stdout.is_empty(), "{args:?}: {said:?}");
    }
    Ok(())
}
