//! Certificates: short-lived, renewed unnoticed, for identities a node really has, with keys that stay in memory.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use mtls_tests::{Options, eventually};

use crate::{Scene, assert_echoed, needs};

#[test]
fn renewal_is_unnoticed_by_open_connections() -> Result<()> {
    needs!();
    let mut scene = Scene::with(&Options { leaf_lifetime: "8s", ..Options::default() })?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = scene.server.addr(7000).to_string();
    let renewals = |scene: &mut Scene, node: &str| -> Result<f64> {
        Ok(scene.mesh.agent(node).metrics()?.sum("mtls_certificate_renewals_total", &[]))
    };
    let before = [renewals(&mut scene, "node-a")?, renewals(&mut scene, "node-b")?];
    let mut streams = Vec::new();
    for client in scene.clients() {
        let stream = client.start_app(&["dial", "stream", &to, "--pause-ms", "20"])?;
        stream.json_with("established")?;
        streams.push(stream);
    }
    // Longer than any first certificate lives.
    std::thread::sleep(Duration::from_secs(10));
    for stream in &mut streams {
        stream.say("stop")?;
    }
    for stream in streams {
        let answer = stream.finish()?.success()?.json()?;
        assert!(answer["ended"] == "eof" && answer["turns"].as_u64() > Some(100), "{answer}");
    }
    for (node, before) in ["node-a", "node-b"].into_iter().zip(before) {
        let after = renewals(&mut scene, node)?;
        assert!(after >= before + 2.0, "the certificates of {node} were renewed {before} and {after} times");
    }
    for client in scene.clients() {
        assert_echoed(&client.app(&["dial", "echo", &to])?);
    }
    Ok(())
}

#[test]
fn certificates_work_to_their_end_without_the_authority_and_not_beyond() -> Result<()> {
    needs!();
    let options = Options { leaf_lifetime: "10s", ..Options::default() };
    let mut scene = Scene::with(&options)?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    let to = scene.server.addr(7000).to_string();
    scene.mesh.stop_ca();
    assert_echoed(&scene.far.app(&["dial", "echo", &to])?);
    let over = eventually(Duration::from_secs(20), || {
        let answer = scene.far.app(&["dial", "echo", &to, "--limit-ms", "2000"]).ok()?;
        answer["echoed"].is_null().then_some(answer)
    });
    let over = over.expect("certificates outlive their end");
    assert_ne!(over["ended"], "eof", "{over}");
    scene.mesh.restart_ca(&scene.lab, &options)?;
    let back = eventually(Duration::from_secs(30), || {
        let answer = scene.far.app(&["dial", "echo", &to, "--limit-ms", "2000"]).ok()?;
        (answer["ended"] == "eof").then_some(())
    });
    assert!(back.is_some(), "the agents do not find back to their authority");
    Ok(())
}

#[test]
fn keys_of_workloads_touch_no_disk() -> Result<()> {
    needs!();
    let mut scene = Scene::new()?;
    let _echo = scene.server.serve(&["echo", "--listen", "[::]:7000"])?;
    assert_echoed(&scene.far.app(&["dial", "echo", &scene.server.addr(7000).to_string()])?);
    let keys = keys_below(scene.lab.dir())?;
    // The authority's own, in the directory it was given, is the only one: so the search does find keys.
    assert_eq!(keys, [scene.mesh.ca_dir().join("ca-key.pem")]);
    for node in ["node-a", "node-b"] {
        let pid = scene.mesh.agent(node).pid().expect("the agent runs");
        for file in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
            let Ok(target) = fs::read_link(file.path()) else { continue };
            let is_file = fs::metadata(file.path()).is_ok_and(|data| data.is_file());
            // Its logs; the pods' namespaces; what is pinned on its bpffs. None of them is a place for a key.
            let known = target.extension().is_some_and(|extension| extension == "log")
                || target.starts_with("/run/netns")
                || target.to_string_lossy().starts_with("net:[")
                || target.starts_with(scene.lab.dir().join("bpf"));
            assert!(!is_file || known, "the agent of {node} keeps {} open", target.display());
        }
    }
    Ok(())
}

/// Files with a private key in PEM, or the start of one in DER.
fn keys_below(dir: &Path) -> Result<Vec<std::path::PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)?.flatten() {
        let kind = entry.file_type()?;
        if kind.is_dir() && entry.file_name() != "bpf" {
            found.extend(keys_below(&entry.path())?);
        } else if kind.is_file() {
            let bytes = fs::read(entry.path())?;
            // PKCS #8 of P-256: version 0, then id-ecPublicKey.
            let der = [0x02, 0x01, 0x00, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d];
            let has = |needle: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
            if has(b"PRIVATE KEY") || has(&der) {
                found.push(entry.path());
            }
        }
    }
    Ok(found)
}
