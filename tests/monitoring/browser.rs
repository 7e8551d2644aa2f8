//! A real browser, headless, told what to do by WebDriver: a node to run on in, what it shows and asks for out.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use base64::prelude::{BASE64_STANDARD, Engine};
use mtls_tests::{Lab, Node, PATIENCE, Request, Running, eventually};
use serde_json::{Value, json};

pub const NEEDS: [&str; 2] = ["chromium", "chromedriver"];

/// Chromium on a node. Ends with the value.
pub struct Browser {
    node: Arc<Node>,
    session: String,
    _driver: Running,
}

/// chromedriver's own; the node's namespace keeps others away from it.
const PORT: u16 = 9515;

impl Browser {
    pub fn start(lab: &Lab, node: &str) -> Result<Self> {
        let node = lab.node(node)?;
        let home = lab.dir().join("browser");
        std::fs::create_dir_all(&home)?;
        let mut command = node.command("chromedriver");
        // Nothing of it may stay behind in a home directory.
        command.env("HOME", &home).env_remove("XDG_CONFIG_HOME").env_remove("XDG_CACHE_HOME");
        command.arg(format!("--port={PORT}"));
        let driver = Running::start(command)?;
        let mut browser = Self { node, session: String::new(), _driver: driver };
        eventually(Duration::from_secs(20), || browser.call("GET", "/status", &json!(null)).ok())
            .context("chromedriver does not answer")?;
        let arguments = [
            "--headless",
            // As root there is no other way; the pages are our own.
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
            "--window-size=1280,1000",
        ];
        let arguments = arguments.iter().map(|argument| (*argument).to_owned());
        let profile = format!("--user-data-dir={}", home.join("profile").display());
        let capabilities = json!({
            "goog:chromeOptions": { "args": arguments.chain([profile]).collect::<Vec<_>>() },
            "goog:loggingPrefs": { "browser": "ALL", "performance": "ALL" },
        });
        let wanted = json!({ "capabilities": { "alwaysMatch": capabilities } });
        let session = browser.call("POST", "/session", &wanted)?;
        browser.session = session["sessionId"].as_str().context("no session")?.to_owned();
        // What Chromium asks itself for its first tab is no page's doing.
        browser.open("about:blank")?;
        browser.requests()?;
        Ok(browser)
    }

    pub fn open(&self, url: &str) -> Result<()> {
        self.ask("/url", &json!({ "url": url })).map(drop)
    }

    /// Runs a function's body in the page, and gives what it returns.
    pub fn run(&self, script: &str) -> Result<Value> {
        self.ask("/execute/sync", &json!({ "script": script, "args": [] }))
    }

    /// Waits until a function's body returns something that is not null or false.
    pub fn wait(&self, what: &str, script: &str) -> Result<Value> {
        let found = eventually(Duration::from_secs(20), || {
            self.run(script).ok().filter(|value| !value.is_null() && *value != json!(false))
        });
        found.with_context(|| {
            let shown = self.run("return document.body.innerText").unwrap_or_default();
            format!("the page does not show {what}, but:\n{}", shown.as_str().unwrap_or_default())
        })
    }

    /// `light` or `dark`, as the reader's system asks for.
    pub fn prefer(&self, scheme: &str) -> Result<()> {
        let features = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
        let params = json!({ "features": features });
        self.ask("/goog/cdp/execute", &json!({ "cmd": "Emulation.setEmulatedMedia", "params": params }))
            .map(drop)
    }

    /// Makes a PNG of the window.
    pub fn screenshot(&self, file: &Path) -> Result<()> {
        let picture = self.call("GET", &format!("/session/{}/screenshot", self.session), &json!(null))?;
        let png = BASE64_STANDARD.decode(picture.as_str().context("no screenshot")?)?;
        ensure!(png.starts_with(b"\x89PNG"), "a screenshot that is no PNG");
        std::fs::write(file, png).with_context(|| format!("write {}", file.display()))
    }

    /// What was written to the console since the last call: scripts' errors, and what the page's policy forbade.
    pub fn console(&self) -> Result<Vec<String>> {
        let lines = self.ask("/se/log", &json!({ "type": "browser" }))?;
        Ok(lines.as_array().context("no log")?.iter().map(|line| line["message"].to_string()).collect())
    }

    /// The address of everything the page asked for since the last call.
    pub fn requests(&self) -> Result<Vec<String>> {
        let lines = self.ask("/se/log", &json!({ "type": "performance" }))?;
        let mut requests = Vec::new();
        for line in lines.as_array().context("no log")? {
            let event: Value = serde_json::from_str(line["message"].as_str().context("no message")?)?;
            let event = &event["message"];
            if event["method"] == "Network.requestWillBeSent" {
                requests.push(event["params"]["request"]["url"].as_str().context("no URL")?.to_owned());
            }
        }
        Ok(requests)
    }

    fn ask(&self, path: &str, body: &Value) -> Result<Value> {
        self.call("POST", &format!("/session/{}{path}", self.session), body)
    }

    fn call(&self, method: &str, path: &str, body: &Value) -> Result<Value> {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let request = Request { method, path, body: &body, limit: PATIENCE };
        let answer = request.send(self.node.netns(), SocketAddr::from(([127, 0, 0, 1], PORT)))?;
        let mut value: Value = serde_json::from_str(&answer.body).with_context(|| answer.body.clone())?;
        ensure!(answer.status == 200, "{method} {path}: {}", value["value"]["message"]);
        Ok(value["value"].take())
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Ends Chromium, which is not our child.
        if !self.session.is_empty() {
            let _ = self.call("DELETE", &format!("/session/{}", self.session), &json!(null));
        }
    }
}
