//! The status page in a real browser, at real agents.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use serde_yaml_ng::Value as Yaml;

use crate::browser::{self, Browser};
use crate::needs;
use crate::scene::Scene;

const ADDRESS: &str = "http://127.0.0.1:15020/";

/// Every edge of the graph, as [source, destination, protection, the line's color].
const EDGES: &str = "return [...document.querySelectorAll('#graph .edge')].map((edge) => \
     [...JSON.parse(edge.dataset.edge), getComputedStyle(edge).stroke])";

fn is_shown(edges: &Value, source: &str, destination: &str, protection: &str) -> bool {
    let wanted = [source, destination, protection];
    let edges = edges.as_array().into_iter().flatten();
    edges.filter_map(Value::as_array).any(|edge| edge.iter().zip(wanted).all(|(have, want)| have == want))
}

/// Waits for an edge, and gives its color.
fn edge(browser: &Browser, source: &str, destination: &str, protection: &str) -> Result<String> {
    let key = serde_json::to_string(&[source, destination, protection])?;
    let script = format!(
        "return ({}).find((edge) => JSON.stringify(edge.slice(0, 3)) === {key:?})?.[3]",
        EDGES.trim_start_matches("return ")
    );
    let color = browser.wait(&format!("the edge {key}"), &script)?;
    Ok(color.as_str().context("no color")?.to_owned())
}

/// Asserts that the page has asked nobody but its agent, and that nothing went wrong in it.
#[track_caller]
fn assert_quiet(browser: &Browser) -> Result<()> {
    let console = browser.console()?;
    assert!(console.is_empty(), "{console:?}");
    let requests = browser.requests()?;
    let foreign = requests.iter().find(|url| !url.starts_with(ADDRESS) && !url.starts_with("data:"));
    assert_eq!(foreign, None);
    let asked = |path: &str| requests.iter().any(|url| *url == format!("{ADDRESS}{path}"));
    assert!(asked("") && asked("overview"), "{requests:?}");
    Ok(())
}

#[test]
fn it_shows_who_speaks_to_whom_and_how_it_is_protected() -> Result<()> {
    needs!("ip", browser::NEEDS[0], browser::NEEDS[1]);
    let scene = Scene::new()?;
    let browser = Browser::start(&scene.lab, "node-b")?;
    browser.prefer("light")?;
    browser.open(ADDRESS)?;
    browser.wait("that nothing happened yet", "return document.querySelector('#graph .empty') !== null")?;
    assert_eq!(browser.run("return document.title")?, "node-b · mtls");

    browser.wait(
        "that nobody is known to need plaintext",
        "return document.getElementById('strict').innerText.includes('Nobody seen so far')",
    )?;

    // One that stays open, one inside the node, one that is not enrolled, and one that STRICT turns away.
    let stream = scene.far.start_app(&["dial", "wait", &scene.open()])?;
    stream.json_with("established")?;
    assert_eq!(scene.dial(&scene.near, &scene.open())?["ended"], "eof");
    let encrypted = edge(&browser, "shop/far", "shop/server", "encrypted")?;
    let near = edge(&browser, "shop/near", "shop/server", "same_node")?;
    assert_eq!(browser.run("return document.getElementById('verdict').dataset.level")?, "good");
    assert!(
        !is_shown(&browser.run(EDGES)?, "outside/intruder", "shop/server", "plaintext"),
        "plaintext before there was any"
    );
    assert_eq!(scene.dial(&scene.intruder, &scene.open())?["ended"], "eof");
    assert_eq!(scene.dial(&scene.intruder, &scene.strict())?["ended"], "refused");
    let plaintext = edge(&browser, "outside/intruder", "shop/server", "plaintext")?;
    // A node's own processes are no workload.
    assert_eq!(scene.lab.node("node-a")?.app(&["dial", "echo", &scene.open()])?["ended"], "eof");
    assert_eq!(edge(&browser, "/from", "shop/server", "plaintext")?, plaintext);
    let colors = [encrypted.as_str(), &near, &plaintext];
    assert_eq!(colors, ["rgb(22, 128, 60)", "rgb(37, 99, 235)", "rgb(212, 37, 44)"], "green, blue, red");
    browser.wait("a warning", "return document.getElementById('verdict').dataset.level === 'bad'")?;

    let text = |id: &str| -> Result<String> {
        let text = browser.run(&format!("return document.getElementById('{id}').innerText"))?;
        Ok(text.as_str().unwrap_or_default().to_owned())
    };
    assert_eq!((text("ready")?.as_str(), text("open")?.as_str()), ("ready", "1"));
    let certificates = text("certificates")?;
    let identity = format!("spiffe://{}", scene.server.principal());
    assert!(certificates.contains(&identity) && certificates.contains("23 h 59 min"), "{certificates}");
    assert!(!certificates.contains("shop/far"), "an identity of another node: {certificates}");
    for condition in ["pods", "identities"] {
        assert!(text("conditions")?.contains(&format!("✓\n{condition}")), "{}", text("conditions")?);
    }
    let strict = text("strict")?;
    assert!(strict.contains("shop/server port 7000: 2 peers would be cut off"), "{strict}");
    assert!(strict.contains("outside/intruder, 1 unnamed address"), "{strict}");
    let pods = text("pods")?;
    assert!(pods.contains("server") && pods.contains("enrolled") && pods.contains("7001 STRICT"), "{pods}");
    assert_eq!(text("refused")?, "1");

    // Who points at a workload, by mouse or keyboard, reads about it.
    let focus = "[...document.querySelectorAll('#graph .node')].find((node) => node.dataset.node === 'shop/far').focus()";
    browser.run(focus)?;
    let told = text("inspector")?;
    assert!(
        told.contains("shop/far") && told.contains("1 mutual TLS") && !told.contains("plaintext"),
        "{told}"
    );
    browser.run("document.activeElement.blur()")?;

    let pictures = Path::new(env!("CARGO_TARGET_TMPDIR"));
    browser.screenshot(&pictures.join("status-light.png"))?;
    browser.prefer("dark")?;
    assert_ne!(edge(&browser, "shop/far", "shop/server", "encrypted")?, encrypted, "dark is like light");
    browser.screenshot(&pictures.join("status-dark.png"))?;
    assert_quiet(&browser)
}

#[test]
fn names_from_manifests_are_text() -> Result<()> {
    needs!("ip", browser::NEEDS[0], browser::NEEDS[1]);
    const NAME: &str =
        "<img src=x onerror=\"document.title='taken'\"></title><script>document.title='taken'</script>";
    let scene = Scene::new()?;
    // Kubernetes would not take it as a label; a directory of files is written by anybody.
    let file = format!("pod-shop-{}.yaml", scene.far.name());
    let manifest = std::fs::read_to_string(scene.lab.dir().join("manifests").join(&file))?;
    let mut manifest: Yaml = serde_yaml_ng::from_str(&manifest)?;
    manifest["metadata"]["labels"]["job-name"] = NAME.into();
    scene.lab.write_text(&file, &serde_yaml_ng::to_string(&manifest)?)?;
    let browser = Browser::start(&scene.lab, "node-b")?;
    browser.open(ADDRESS)?;
    // Agents take a moment to read it.
    let source = format!("shop/{NAME}");
    mtls_tests::eventually(std::time::Duration::from_secs(20), || {
        scene.dial(&scene.far, &scene.open()).ok()?;
        is_shown(&browser.run(EDGES).ok()?, &source, "shop/server", "encrypted").then_some(())
    })
    .context("the workload does not appear under its name")?;
    let shown = browser
        .wait("the name", "return [...document.querySelectorAll('#edges td')].map((td) => td.textContent)")?;
    let shown = shown.as_array().into_iter().flatten().filter_map(Value::as_str);
    assert!(
        shown.clone().any(|text| text.contains(&format!("{NAME} → server"))),
        "{:?}",
        shown.collect::<Vec<_>>()
    );
    assert_eq!(browser.run("return document.querySelectorAll('img, #main script').length")?, 0);
    assert_eq!(browser.run("return document.title")?, "node-b · mtls");
    assert_quiet(&browser)?;
    // Even a mistake in the page could not turn a string into markup or run one.
    let tried = browser.run(
        "try { document.body.innerHTML = '<b>x</b>'; return 'markup' } catch (error) { return error.name }",
    )?;
    assert_eq!(tried, "TypeError");
    let script = "const s = document.createElement('img'); s.src = 'http://10.30.1.10/'; document.body.append(s); \
                  return new Promise((done) => { s.onerror = () => done('blocked'); s.onload = () => done('loaded') })";
    assert_eq!(browser.run(script)?, "blocked");
    assert!(
        browser.console()?.iter().any(|line| line.contains("Content Security Policy")),
        "nothing forbade it"
    );
    Ok(())
}

#[test]
fn an_agent_that_is_away_is_said_to_be() -> Result<()> {
    needs!("ip", browser::NEEDS[0], browser::NEEDS[1]);
    let mut scene = Scene::new()?;
    let browser = Browser::start(&scene.lab, "node-b")?;
    browser.open(ADDRESS)?;
    let trouble = "return !document.getElementById('trouble').hidden";
    browser.wait("the agent", "return document.getElementById('ready').textContent === 'ready'")?;
    assert_eq!(browser.run(trouble)?, json!(false));
    scene.mesh.agent("node-b").kill();
    browser.wait("that the agent is away", trouble)?;
    let (ready, body) =
        ("return document.getElementById('ready').textContent", "return document.body.className");
    assert_eq!((browser.run(ready)?, browser.run(body)?), (json!("no answer"), json!("away")));
    // What was known stays to be read.
    let certificates = browser.run("return document.getElementById('certificates').innerText")?;
    assert!(certificates.as_str().is_some_and(|text| text.contains("shop/server")), "{certificates}");
    scene.mesh.agent("node-b").start()?;
    browser.wait("that it is back", "return document.getElementById('trouble').hidden && document.getElementById('ready').textContent === 'ready'")?;
    assert_eq!(browser.run(body)?, json!(""));
    Ok(())
}
