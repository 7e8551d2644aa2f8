//! The plugin on the node: two directories in, the binary in one and an entry in the other's configuration out.
//!
//! Every change is a rename, so that a runtime reads either the old or the new. The configuration is watched: whoever
//! rewrites it gets the entry put back. An agent that ends leaves both in place; [`uninstall`] takes them away.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use notify::{RecursiveMode, Watcher};
use serde_json::{Value, json};

use super::spec::WhenAway;
use super::{NAME, chain};

/// A single plugin's file that became a list is kept under its name with this behind it, for [`uninstall`].
const ASIDE: &str = "mtls-aside";
/// The safety net for changes that no event told of.
const RESCAN: Duration = Duration::from_secs(5);
/// Others write in several steps; the entry goes in when they rest.
const QUIET: Duration = Duration::from_millis(50);

/// What the plugin's entry says.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where the runtime's plugins are, as this process sees it.
    pub bin_dir: PathBuf,
    /// Where its configuration is.
    pub conf_dir: PathBuf,
    /// As the node sees it.
    pub agent_socket: PathBuf,
    pub wait: Duration,
    pub when_agent_is_away: WhenAway,
    pub exclude_namespaces: Vec<String>,
}

impl Settings {
    fn entry(&self) -> Value {
        json!({
            "type": NAME,
            "agentSocket": self.agent_socket,
            "waitSeconds": self.wait.as_secs(),
            "whenAgentIsAway": self.when_agent_is_away,
            "excludeNamespaces": self.exclude_namespaces,
        })
    }
}

/// Keeps the plugin in the configuration until dropped; what is there by then stays.
pub struct Installation {
    stop: Arc<AtomicBool>,
    wake: Sender<()>,
    thread: Option<JoinHandle<()>>,
}

impl Installation {
    /// Installs the plugin, and keeps it in the configuration. A node without a network configuration gets the entry
    /// when it has one.
    ///
    /// # Errors
    ///
    /// When the binary cannot be put into its directory, or the configuration's directory cannot be read.
    pub fn begin(settings: Settings) -> Result<Self, Error> {
        install_binary(&settings.bin_dir)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let (changed, changes) = mpsc::channel();
        let wake = changed.clone();
        let settings = Arc::new(settings);
        let watched = settings.conf_dir.clone();
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Reading, as we do ourselves, makes events too.
            if event.is_ok_and(|event| !event.kind.is_access()) {
                let _ = changed.send(());
            }
        })
        .map_err(|source| Error::Watch { path: watched.clone(), source })?;
        watcher
            .watch(&watched, RecursiveMode::NonRecursive)
            .map_err(|source| Error::Watch { path: watched, source })?;
        let mut said = String::new();
        report(&settings, &mut said);
        let keep = move || {
            let _watcher = watcher;
            loop {
                let _ = changes.recv_timeout(RESCAN);
                while !stopped.load(Ordering::Relaxed) && changes.recv_timeout(QUIET).is_ok() {}
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                report(&settings, &mut said);
            }
        };
        let thread = std::thread::Builder::new().name("mtls-cni".into()).spawn(keep);
        Ok(Self { stop, wake, thread: Some(thread.map_err(Error::Thread)?) })
    }
}

impl Drop for Installation {
    fn drop(&mut self) {
        // Waited for: what it may just be writing must not come after an uninstallation.
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.wake.send(());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Puts the entry in, and says what came of it if that is news.
fn report(settings: &Settings, said: &mut String) {
    let outcome = install_entry(&settings.conf_dir, &settings.entry());
    let (news, is_error) = match &outcome {
        Ok(Chained::Already(_)) => return,
        Ok(Chained::Now(path)) => (format!("{NAME} is now the last plugin of {}", path.display()), false),
        Ok(Chained::NoConfiguration) => {
            let directory = settings.conf_dir.display();
            (
                format!("no network configuration in {directory} yet: pods are enrolled when they are found"),
                false,
            )
        }
        Err(error) => (error.to_string(), true),
    };
    if is_error && news != *said {
        tracing::error!("{news}; pods are enrolled when they are found, and may run unprotected until then");
    } else if news != *said || matches!(outcome, Ok(Chained::Now(_))) {
        tracing::info!("{news}");
    }
    *said = news;
}

#[derive(PartialEq, Eq, Debug)]
enum Chained {
    Now(PathBuf),
    Already(PathBuf),
    NoConfiguration,
}

/// Puts the entry into the configuration that the runtime uses: the first by name.
fn install_entry(directory: &Path, entry: &Value) -> Result<Chained, Error> {
    let Some(path) = configurations(directory)?.into_iter().next() else {
        return Ok(Chained::NoConfiguration);
    };
    let text = read(&path)?;
    let chained = chain::with(&text, entry);
    let chained =
        chained.map_err(|problem| Error::Unusable { path: path.clone(), problem: problem.to_string() })?;
    let Some(chained) = chained else { return Ok(Chained::Already(path)) };
    let is_list = path.extension().is_some_and(|extension| extension == "conflist");
    let target = if is_list { path.clone() } else { path.with_extension("conflist") };
    write(&target, chained.as_bytes(), mode(&path)?)?;
    if !is_list {
        // The list's name comes after the single file's, which the runtime would go on using.
        let aside = aside(&path);
        fs::rename(&path, &aside).map_err(|source| Error::File { attempt: "rename", path, source })?;
    }
    Ok(Chained::Now(target))
}

/// Takes the plugin off the node: its entry out of every configuration, then its binary.
///
/// # Errors
///
/// The first file that cannot be changed.
pub fn uninstall(bin_dir: &Path, conf_dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut changed = Vec::new();
    for path in configurations(conf_dir)? {
        let text = read(&path)?;
        let Ok(Some(without)) = chain::without(&text) else { continue };
        let single = path.with_extension("conf");
        if aside(&single).exists() && !single.exists() {
            fs::rename(aside(&single), &single).map_err(|source| Error::File {
                attempt: "rename",
                path: aside(&single),
                source,
            })?;
            remove(&path)?;
        } else {
            write(&path, without.as_bytes(), mode(&path)?)?;
        }
        changed.push(path);
    }
    let binary = bin_dir.join(NAME);
    if binary.exists() {
        remove(&binary)?;
        changed.push(binary);
    }
    Ok(changed)
}

fn aside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(ASIDE);
    name.into()
}

/// Files that a runtime takes for configurations, in the order in which it looks at them.
fn configurations(directory: &Path) -> Result<Vec<PathBuf>, Error> {
    let failed = |source| Error::File { attempt: "list", path: directory.into(), source };
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let extension = path.extension().and_then(|extension| extension.to_str());
        if matches!(extension, Some("conf" | "conflist" | "json")) && path.is_file() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// This very binary, which is the plugin when it is called by the plugin's name.
fn install_binary(directory: &Path) -> Result<(), Error> {
    let path = directory.join(NAME);
    let own = Path::new("/proc/self/exe");
    let failed = |attempt: &'static str, path: &Path| {
        let path = path.to_owned();
        move |source| Error::File { attempt, path, source }
    };
    let binary = fs::read(own).map_err(failed("read", own))?;
    if fs::read(&path).is_ok_and(|installed| installed == binary) {
        return Ok(());
    }
    fs::create_dir_all(directory).map_err(failed("make", directory))?;
    write(&path, &binary, 0o755)?;
    tracing::info!(path = %path.display(), "CNI plugin installed");
    Ok(())
}

fn read(path: &Path) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|source| Error::File { attempt: "read", path: path.into(), source })
}

fn mode(path: &Path) -> Result<u32, Error> {
    let metadata = fs::metadata(path);
    let metadata = metadata.map_err(|source| Error::File { attempt: "read", path: path.into(), source })?;
    Ok(metadata.permissions().mode() & 0o777)
}

fn remove(path: &Path) -> Result<(), Error> {
    fs::remove_file(path).map_err(|source| Error::File { attempt: "remove", path: path.into(), source })
}

/// Replaces a file in one step. The new one's name meanwhile has an extension that no runtime looks at.
fn write(path: &Path, content: &[u8], mode: u32) -> Result<(), Error> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let new = PathBuf::from(name);
    let written = fs::write(&new, content)
        .and_then(|()| fs::set_permissions(&new, fs::Permissions::from_mode(mode)))
        .and_then(|()| fs::File::open(&new)?.sync_all())
        .and_then(|()| fs::rename(&new, path));
    written.map_err(|source| {
        let _ = fs::remove_file(&new);
        Error::File { attempt: "write", path: path.into(), source }
    })
}

/// Why the plugin is not on the node.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot {attempt} {path}: {source}; mount the node's directory there, or name it with --cni-bin-dir and --cni-conf-dir", path = path.display())]
    File { attempt: &'static str, path: PathBuf, source: io::Error },
    #[error("network configuration {path} cannot have another plugin: {problem}", path = path.display())]
    Unusable { path: PathBuf, problem: String },
    #[error("cannot watch {path}: {source}", path = path.display())]
    Watch { path: PathBuf, source: notify::Error },
    #[error("cannot start the thread that watches the network configuration: {0}")]
    Thread(io::Error),
}
