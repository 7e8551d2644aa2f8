//! The agent of this node as a subcommand asks it: a resource of the admin socket in, the answer out.
//!
//! It only reads; an agent that does not answer is an error that names the socket and the remedy.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::{Output, printable};
use crate::observe::Listing;

pub const PATIENCE: Duration = Duration::from_secs(5);
const MAX_ANSWER: usize = 64 << 20;

/// Whom to ask, and in what form to print the answer.
#[derive(clap::Args, Clone, Debug)]
pub struct Ask {
    /// The agent's admin socket.
    #[arg(long, value_name = "PATH", default_value = "/run/mtls/admin.sock")]
    pub admin_socket: PathBuf,

    /// Tables for people, or JSON for programs.
    #[arg(long, short, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

/// Which rows to ask for.
#[derive(clap::Args, Clone, Debug)]
pub struct Which {
    /// Only what has this name; NAMESPACE/NAME says both.
    #[arg(value_name = "NAME")]
    pub name: Option<String>,

    /// Only what is in this namespace.
    #[arg(long, short, value_name = "NAMESPACE")]
    pub namespace: Option<String>,
}

/// How much of a long list to ask for.
#[derive(clap::Args, Clone, Debug)]
pub struct Page {
    /// Rows to show, at most 10000.
    #[arg(long, value_name = "ROWS", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub limit: u64,

    /// Rows to skip before the first.
    #[arg(long, value_name = "ROWS", default_value_t = 0)]
    pub offset: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "no agent answers on {path}: {source}; start `mtls node` on this node, or give the socket it was started \
         with as --admin-socket", path = path.display())]
    NoAgent { path: PathBuf, source: io::Error },

    #[error("not allowed to ask the agent on {path}; run this as the user the agent runs as, usually root",
        path = path.display())]
    NotAllowed { path: PathBuf },

    #[error("the agent on {path} did not answer within {} s; its log may say why", PATIENCE.as_secs(),
        path = path.display())]
    Silent { path: PathBuf },

    #[error("what listens on {path} does not speak HTTP as an agent does: {source}", path = path.display())]
    Http { path: PathBuf, source: Box<dyn std::error::Error + Send + Sync> },

    #[error("the agent on {path} answered {status} instead of what it was asked for", path = path.display())]
    Refused { path: PathBuf, status: hyper::StatusCode },

    /// In the agent's own words.
    #[error("{words}")]
    Told { words: String },

    #[error("the agent on {path} answered something this version of mtls cannot read: {source}; use the same version",
        path = path.display())]
    Answer { path: PathBuf, source: serde_json::Error },

    #[error("the agent knows no {what} {name}")]
    Unknown { what: &'static str, name: String },

    #[error("cannot print the answer: {0}")]
    Print(#[from] io::Error),
}

impl Ask {
    /// The answer, read. As JSON it is also passed on as it came: a newer agent may say more than this version knows.
    ///
    /// # Errors
    ///
    /// When no agent answers, or not as an agent does, or the output is closed.
    pub async fn get<T: DeserializeOwned>(
        &self,
        resource: &str,
        out: &mut (dyn Write + Send),
    ) -> Result<T, Error> {
        let path = &self.admin_socket;
        let answer = timeout(PATIENCE, get(path, resource));
        let answer = answer.await.map_err(|_| Error::Silent { path: path.clone() })??;
        let unreadable = |source| Error::Answer { path: path.clone(), source };
        let value = serde_json::from_slice(&answer).map_err(unreadable)?;
        if self.output == Output::Json {
            let passed_on: serde_json::Value = serde_json::from_slice(&answer).map_err(unreadable)?;
            writeln!(out, "{passed_on:#}")?;
        }
        Ok(value)
    }

    pub fn is_for_people(&self) -> bool {
        self.output == Output::Table
    }
}

impl Which {
    /// The filter as the query of a resource, begun with `?`.
    pub fn query(&self) -> Query {
        let (namespace, name) = self.parts();
        Query::default().with("namespace", namespace).with("name", name)
    }

    fn parts(&self) -> (Option<&str>, Option<&str>) {
        match self.name.as_deref().and_then(|name| name.split_once('/')) {
            Some((namespace, name)) => (Some(namespace), Some(name)),
            None => (self.namespace.as_deref(), self.name.as_deref()),
        }
    }

    /// An empty list is an answer; one of something that was named is an error.
    pub fn found<T>(&self, what: &'static str, listing: &Listing<T>) -> Result<(), Error> {
        match &self.name {
            Some(name) if listing.total == 0 => {
                let namespace = self.namespace.as_ref().filter(|_| !name.contains('/'));
                let namespace = namespace.map(|namespace| format!("{namespace}/")).unwrap_or_default();
                Err(Error::Unknown { what, name: format!("{namespace}{name}") })
            }
            _ => Ok(()),
        }
    }
}

impl Page {
    pub fn add_to(&self, query: Query) -> Query {
        query.with("limit", Some(&self.limit.to_string())).with("offset", Some(&self.offset.to_string()))
    }
}

/// Says what a listing leaves out.
pub fn write_cut<T>(out: &mut dyn Write, listing: &Listing<T>) -> io::Result<()> {
    if listing.items.len() < listing.total {
        let (shown, total) = (listing.items.len(), listing.total);
        writeln!(out, "  {shown} of {total}; narrow with -n or a name, or use --limit and --offset")?;
    }
    Ok(())
}

/// The query part of a resource.
#[derive(Default, Debug)]
pub struct Query(String);

impl Query {
    pub fn with(mut self, key: &str, value: Option<&str>) -> Self {
        if let Some(value) = value {
            self.0.push(if self.0.is_empty() { '?' } else { '&' });
            self.0.push_str(key);
            self.0.push('=');
            for byte in value.bytes() {
                match byte {
                    b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' => self.0.push(byte.into()),
                    _ => self.0.push_str(&format!("%{byte:02X}")),
                }
            }
        }
        self
    }

    pub fn of(&self, resource: &str) -> String {
        format!("{resource}{}", self.0)
    }
}

/// Runs what asks the agent, on a runtime of its own.
pub fn block_on<T>(asking: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(asking)
}

/// The bytes that the agent on a socket answers.
///
/// # Errors
///
/// When no agent answers, or not as an agent does. It waits for as long as the agent takes.
pub async fn get(path: &Path, resource: &str) -> Result<Bytes, Error> {
    let stream = UnixStream::connect(path).await.map_err(|source| match source.kind() {
        io::ErrorKind::PermissionDenied => Error::NotAllowed { path: path.to_owned() },
        _ => Error::NoAgent { path: path.to_owned(), source },
    })?;
    fn http<E: Into<Box<dyn std::error::Error + Send + Sync>>>(path: &Path) -> impl Fn(E) -> Error {
        move |source| Error::Http { path: path.to_owned(), source: source.into() }
    }
    let (mut requests, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(http(path))?;
    let request =
        hyper::Request::get(resource).header(hyper::header::HOST, "agent").body(Empty::<Bytes>::new());
    let request = request.map_err(http(path))?;
    let exchange = async {
        let response = requests.send_request(request).await.map_err(http(path))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(http(path))?;
        let body = body.to_bytes();
        match std::str::from_utf8(&body) {
            _ if status.is_success() => Ok(body),
            Ok(words) if !words.is_empty() => Err(Error::Told { words: printable(words) }),
            _ => Err(Error::Refused { path: path.to_owned(), status }),
        }
    };
    let mut exchange = std::pin::pin!(exchange);
    tokio::select! {
        answer = &mut exchange => answer,
        // The answer may be complete when the agent closes. If not, what broke the connection says why.
        ended = connection => match (exchange.await, ended) {
            (Err(Error::Http { .. }), Err(broken)) => Err(http(path)(broken)),
            (answer, _) => answer,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_carries_any_name_whole() {
        let which = |name: &str, namespace: Option<&str>| {
            let which = Which { name: Some(name.to_owned()), namespace: namespace.map(str::to_owned) };
            which.query().of("/workloads")
        };
        assert_eq!(which("web-1", None), "/workloads?name=web-1");
        assert_eq!(which("web-1", Some("shop")), "/workloads?namespace=shop&name=web-1");
        assert_eq!(which("shop/web-1", Some("other")), "/workloads?namespace=shop&name=web-1");
        assert_eq!(which("a&b=c d", None), "/workloads?name=a%26b%3Dc%20d");
        assert_eq!(Which { name: None, namespace: None }.query().of("/services"), "/services");
    }
}
