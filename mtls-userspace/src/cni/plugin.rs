//! The plugin: one call of a container runtime in, its answer on standard output and an exit code out.
//!
//! It makes no network. ADD hands the result of the plugins before it on once the agent says that the pod is protected,
//! or takes no part; whatever else happens, the sandbox fails, and kubelet tries again.

use std::collections::HashMap;
use std::fs::File;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::spec::{Call, Code, Command, Failure, NetConf, VERSIONS, WhenAway};
use crate::agent_socket::{Answer, Ask, Attachment, Error, Request};

/// How long the agent may take for what needs no waiting.
const PROMPTLY: Duration = Duration::from_secs(5);
/// For so long a pod waits for an agent that is not there.
const CHANGE_OF_AGENTS: Duration = Duration::from_secs(2);
/// What an answer takes on top of the agent's own waiting.
const MARGIN: Duration = Duration::from_secs(5);

/// Answers a runtime's call: what goes to standard output, and whether it is a success.
pub fn run(environment: &HashMap<String, String>, input: &str) -> (Value, bool) {
    let answer = Call::read(environment, input).and_then(|call| answer(&call));
    match answer {
        Ok(value) => (value, true),
        Err(failure) => {
            let version: Option<Value> = serde_json::from_str(input).ok();
            let version =
                version.as_ref().and_then(|config| config.get("cniVersion")).and_then(Value::as_str);
            (failure.json(version.unwrap_or_default()), false)
        }
    }
}

/// The result; null where none is expected.
fn answer(call: &Call) -> Result<Value, Failure> {
    match call.command {
        Command::Version => {
            let version = if call.config.cni_version.is_empty() { "1.0.0" } else { &call.config.cni_version };
            Ok(json!({ "cniVersion": version, "supportedVersions": VERSIONS }))
        }
        Command::Add => {
            let result = call.config.previous()?;
            attach(call, Request::Add)?;
            Ok(result)
        }
        Command::Check => {
            call.config.previous()?;
            attach(call, Request::Check).map(|()| Value::Null)
        }
        // What is gone needs no agent: it notices by itself.
        Command::Del => {
            let _ = ask(&call.config, &Request::Del { container: call.container.clone() }, None, PROMPTLY);
            Ok(Value::Null)
        }
        Command::Gc => {
            let containers = call.config.valid_attachments.iter().map(|it| it.container.clone()).collect();
            let _ = ask(&call.config, &Request::Gc { containers }, None, PROMPTLY);
            Ok(Value::Null)
        }
        Command::Status => match ask(&call.config, &Request::Status, None, PROMPTLY) {
            Err(error) if call.config.when_agent_is_away == WhenAway::Refuse => {
                Err(Failure::new(Code::NotAvailable, format!("no pod can start here: {error}")))
            }
            _ => Ok(Value::Null),
        },
    }
}

/// Asks the agent about a pod until it is protected, or takes no part.
fn attach(call: &Call, request: fn(Attachment) -> Request) -> Result<(), Failure> {
    // Something else than kubelet's runtime made this container.
    let Some(pod) = &call.pod else { return Ok(()) };
    if call.config.exclude_namespaces.contains(&pod.namespace) {
        return Ok(());
    }
    let (namespace, name) = (&pod.namespace, &pod.name);
    let path = call.netns.as_deref().unwrap_or_else(|| std::path::Path::new(""));
    let netns = File::open(path).map_err(|error| {
        Failure::new(
            Code::Input,
            format!("network namespace {} of pod {namespace}/{name}: {error}", path.display()),
        )
    })?;
    let patience = call.config.patience();
    let attachment = Attachment {
        container: call.container.clone(),
        namespace: namespace.clone(),
        name: name.clone(),
        uid: pod.uid.clone(),
        addresses: call.config.addresses(),
        patience_ms: patience.as_millis() as u64,
    };
    let again = |reason: String| {
        Failure::new(Code::TryAgain, format!("pod {namespace}/{name} is not started unprotected: {reason}"))
    };
    match ask(&call.config, &request(attachment), Some(&netns), patience + MARGIN) {
        Ok(Answer::Failed { reason }) => Err(again(reason)),
        Ok(_) => Ok(()),
        // An agent that does not answer is as good as none.
        Err(_) if call.config.when_agent_is_away == WhenAway::Allow => Ok(()),
        Err(error) => {
            let remedy = "it starts once the mtls agent of this node runs (DaemonSet mtls-node)";
            Err(again(error.to_string()).because(remedy))
        }
    }
}

fn ask(
    config: &NetConf,
    request: &Request,
    netns: Option<&File>,
    patience: Duration,
) -> Result<Answer, Error> {
    let mut since = Instant::now();
    let begun = since;
    loop {
        let left = patience.saturating_sub(begun.elapsed()).max(Duration::from_millis(1));
        let asked = Ask::call(&config.agent_socket, left).and_then(|mut agent| agent.ask(request, netns));
        match &asked {
            // Between an agent and the next there is a moment without a socket.
            Err(Error::NoAgent { .. }) if since.elapsed() < CHANGE_OF_AGENTS && patience > PROMPTLY => {}
            // It was the last one's caller that got no answer.
            Err(Error::Gone) if begun.elapsed() < patience => since = Instant::now(),
            _ => return asked,
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
