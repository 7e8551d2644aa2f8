//! An observer behind a real admin API, and the clients that ask it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use mtls::observe::{AccessLog, Admin, Error, Observer, Readiness, Settings};
use tokio::sync::oneshot;

use crate::exposition::Samples;

pub struct Agent {
    pub observer: Observer,
    pub readiness: Readiness,
    pub tcp: SocketAddr,
    pub socket: PathBuf,
    pub log: Lines,
    stop: Option<oneshot::Sender<()>>,
    serving: Option<JoinHandle<Result<(), Error>>>,
    _directory: tempfile::TempDir,
}

impl Agent {
    pub fn start() -> Self {
        Self::with(Settings::new("node-a"))
    }

    pub fn logging(access_log: AccessLog) -> Self {
        Self::with(Settings { access_log, ..Settings::new("node-a") })
    }

    pub fn with(settings: Settings) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("run/admin.sock");
        let log = Lines::default();
        let observer = Observer::with_log(settings, Box::new(log.clone()));
        let readiness = Readiness::default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let any = "127.0.0.1:0".parse().unwrap();
        let admin = runtime.block_on(Admin::bind(Some(any), Some(&socket))).unwrap();
        let tcp = admin.address().unwrap();
        let (stop, stopped) = oneshot::channel();
        let serve = admin.serve(observer.clone(), readiness.clone(), async {
            let _ = stopped.await;
        });
        let serving = std::thread::spawn(move || runtime.block_on(serve));
        Self {
            observer,
            readiness,
            tcp,
            socket,
            log,
            stop: Some(stop),
            serving: Some(serving),
            _directory: directory,
        }
    }

    pub fn get(&self, path: &str) -> Answer {
        ask(TcpStream::connect(self.tcp).unwrap(), path, "")
    }

    pub fn local(&self, path: &str) -> Answer {
        ask(UnixStream::connect(&self.socket).unwrap(), path, "")
    }

    pub fn scrape(&self) -> Samples {
        let open_metrics = ask(
            TcpStream::connect(self.tcp).unwrap(),
            "/metrics",
            "Accept: application/openmetrics-text\r\n",
        );
        assert_eq!(open_metrics.status, 200);
        Samples::parse_open_metrics(&open_metrics.body)
    }

    /// The access log's lines once everything reported so far is written.
    pub fn lines(&self) -> Vec<String> {
        assert!(self.observer.flush_access_log(Duration::from_secs(10)), "the access log is stuck");
        self.log.all()
    }

    pub fn stop(&mut self) {
        if let (Some(stop), Some(serving)) = (self.stop.take(), self.serving.take()) {
            stop.send(()).unwrap();
            serving.join().unwrap().unwrap();
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.stop();
        }
    }
}

pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> serde_json::Value {
        assert_eq!(self.status, 200, "{}", self.body);
        serde_json::from_str(&self.body).unwrap()
    }
}

pub fn ask(mut stream: impl Read + Write, path: &str, headers: &str) -> Answer {
    write!(stream, "GET {path} HTTP/1.1\r\nHost: agent\r\n{headers}Connection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { status, head: head.to_ascii_lowercase(), body: body.to_owned() }
}

/// An output that remembers what was written.
#[derive(Clone, Default)]
pub struct Lines(Arc<Mutex<Vec<u8>>>);

impl Lines {
    pub fn all(&self) -> Vec<String> {
        let written = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        String::from_utf8(written).unwrap().lines().map(str::to_owned).collect()
    }
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

pub fn mode(path: &Path) -> u32 {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}
