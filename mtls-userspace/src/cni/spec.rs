//! What a CNI runtime says and wants to hear: environment and standard input in, a validated [`Call`] out; a [`Failure`]
//! as the specification has it.
//!
//! CNI specification 1.1: sections 2 (environment) and 4 (plugin execution), and its table of error codes.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Those in which results can be handed from one plugin of a chain to the next.
pub const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// What the plugin is called with.
#[derive(Debug)]
pub struct Call {
    pub command: Command,
    pub container: String,
    pub netns: Option<PathBuf>,
    pub pod: Option<Pod>,
    pub config: NetConf,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    Add,
    Check,
    Del,
    Gc,
    Status,
    Version,
}

/// From `CNI_ARGS`, as container runtimes that speak CRI set them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pod {
    pub namespace: String,
    pub name: String,
    pub uid: Option<String>,
}

/// The plugin's entry in the network configuration.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NetConf {
    #[serde(default)]
    pub cni_version: String,
    #[serde(default = "default_socket")]
    pub agent_socket: PathBuf,
    /// How long the agent may take for a pod.
    #[serde(default = "default_wait")]
    pub wait_seconds: u64,
    #[serde(default)]
    pub when_agent_is_away: WhenAway,
    /// Pods of these namespaces start whether the agent is there or not: what it needs itself to start.
    #[serde(default)]
    pub exclude_namespaces: Vec<String>,
    pub prev_result: Option<Value>,
    #[serde(default, rename = "cni.dev/valid-attachments")]
    pub valid_attachments: Vec<ValidAttachment>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum WhenAway {
    /// No pod starts that the agent has not seen
    #[default]
    Refuse,
    /// Pods start, and are enrolled once the agent is there
    Allow,
}

#[derive(Debug, Deserialize)]
pub struct ValidAttachment {
    #[serde(rename = "containerID")]
    pub container: String,
}

fn default_socket() -> PathBuf {
    "/run/mtls/agent.sock".into()
}

fn default_wait() -> u64 {
    20
}

impl Call {
    /// Reads what the runtime says.
    ///
    /// # Errors
    ///
    /// What is missing or not understood, as the runtime wants to hear it.
    pub fn read(environment: &HashMap<String, String>, input: &str) -> Result<Self, Failure> {
        let variable = |name: &str| environment.get(name).filter(|value| !value.is_empty()).cloned();
        let required = |name: &str| {
            variable(name).ok_or_else(|| Failure::new(Code::Environment, format!("{name} is not set")))
        };
        let command = match required("CNI_COMMAND")?.as_str() {
            "ADD" => Command::Add,
            "CHECK" => Command::Check,
            "DEL" => Command::Del,
            "GC" => Command::Gc,
            "STATUS" => Command::Status,
            "VERSION" => Command::Version,
            other => return Err(Failure::new(Code::Environment, format!("unknown CNI_COMMAND {other:?}"))),
        };
        let config: NetConf = serde_json::from_str(input)
            .map_err(|error| Failure::new(Code::Decode, format!("the network configuration: {error}")))?;
        let is_known = VERSIONS.contains(&config.cni_version.as_str());
        // It asks for versions; which one it speaks itself makes no difference.
        if !is_known && command != Command::Version {
            let failure =
                Failure::new(Code::Version, format!("cniVersion {:?} is not supported", config.cni_version));
            return Err(failure.because(format!("supported: {}", VERSIONS.join(", "))));
        }
        let has_container = matches!(command, Command::Add | Command::Check | Command::Del);
        let container = if has_container { required("CNI_CONTAINERID")? } else { String::new() };
        let needs_netns = matches!(command, Command::Add | Command::Check);
        let netns = if needs_netns { Some(required("CNI_NETNS")?) } else { variable("CNI_NETNS") };
        let pod = variable("CNI_ARGS").and_then(|arguments| pod(&arguments));
        Ok(Self { command, container, netns: netns.map(PathBuf::from), pod, config })
    }
}

fn pod(arguments: &str) -> Option<Pod> {
    let arguments: HashMap<&str, &str> =
        arguments.split(';').filter_map(|argument| argument.split_once('=')).collect();
    let value = |name| arguments.get(name).filter(|value| !value.is_empty()).map(|value| (*value).to_owned());
    Some(Pod {
        namespace: value("K8S_POD_NAMESPACE")?,
        name: value("K8S_POD_NAME")?,
        uid: value("K8S_POD_UID"),
    })
}

impl NetConf {
    pub fn patience(&self) -> Duration {
        Duration::from_secs(self.wait_seconds.clamp(1, 120))
    }

    /// What the plugins before this one made, in this configuration's version.
    ///
    /// # Errors
    ///
    /// When there is none: this plugin makes no network of its own.
    pub fn previous(&self) -> Result<Value, Failure> {
        let Some(Value::Object(result)) = &self.prev_result else {
            let failure = Failure::new(Code::Configuration, "there is no prevResult");
            return Err(failure.because("mtls-cni makes no network: it goes after the plugin that does"));
        };
        let mut result = result.clone();
        result.insert("cniVersion".into(), json!(self.cni_version));
        Ok(Value::Object(result))
    }

    /// Addresses that the plugins before this one gave to the container.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let result = self.prev_result.as_ref();
        let list = |name: &str| result.and_then(|result| result.get(name)).and_then(Value::as_array);
        let is_inside = |address: &Value| match address.get("interface").and_then(Value::as_u64) {
            None => true,
            Some(index) => {
                let interface = list("interfaces").and_then(|list| list.get(usize::try_from(index).ok()?));
                interface
                    .is_none_or(|it| it.get("sandbox").and_then(Value::as_str).is_some_and(|s| !s.is_empty()))
            }
        };
        let inside = list("ips").into_iter().flatten().filter(|address| is_inside(address));
        let addresses = inside.filter_map(|address| address.get("address")?.as_str()?.parse::<IpNet>().ok());
        addresses.map(|net| net.addr().to_canonical()).collect()
    }
}

/// Codes of the specification.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Code {
    Version = 1,
    Environment = 4,
    Input = 5,
    Decode = 6,
    Configuration = 7,
    TryAgain = 11,
    NotAvailable = 50,
}

/// What went wrong, for the runtime, which shows it as an event of the pod.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    pub code: Code,
    pub message: String,
    pub details: String,
}

impl Failure {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), details: String::new() }
    }

    pub fn because(mut self, details: impl Into<String>) -> Self {
        self.details = details.into();
        self
    }

    pub fn json(&self, version: &str) -> Value {
        let version = if VERSIONS.contains(&version) { version } else { "1.0.0" };
        json!({ "cniVersion": version, "code": self.code as u32, "msg": format!("mtls: {}", self.message), "details": self.details })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.message)?;
        if self.details.is_empty() { Ok(()) } else { write!(f, "; {}", self.details) }
    }
}
