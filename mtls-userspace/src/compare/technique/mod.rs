//! Ways to carry bytes between two relays. To add one: a file here, and its name in the list below.
//!
//! Both relays are threads of one process: the near one in the client's network namespace, the far one in the server's.

use std::fs::File;
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};
use tokio::net::{TcpListener, TcpStream};

use crate::relay::End;

mod credentials;

use credentials::Credentials;

/// One connection carried to its end.
pub(super) type Carried = Pin<Box<dyn Future<Output = Result<()>>>>;
/// What a relay does with each socket that it accepts.
pub(super) type OnAccept = Box<dyn Fn(TcpStream) -> Carried>;

/// A way to carry bytes between two relays.
pub(super) trait Technique: Sync {
    /// As on the command line and in the results; one that leaves the bytes readable begins with `plaintext`.
    fn name(&self) -> &'static str;

    /// One line for people.
    fn about(&self) -> &'static str;

    /// Why this machine can't carry it.
    fn obstacle(&self) -> Option<String> {
        None
    }

    /// Whether the kernel moves the bytes by itself, so that the relays' processes show little of their cost.
    fn in_kernel(&self) -> bool {
        false
    }

    /// The relay beside the client; its sockets come from the client and it dials `ends.tunnel`. Called once, on the
    /// thread and in the runtime where the connections will be carried.
    fn near(&self, ends: Arc<Ends>) -> OnAccept;

    /// The relay beside the server; its sockets come from the near relay and it dials `ends.server`.
    fn far(&self, ends: Arc<Ends>) -> OnAccept;
}

macro_rules! techniques {
    ($($name:ident),*) => {
        $(mod $name;)*

        /// Every technique there is.
        pub(super) static ALL: &[&dyn Technique] = &[$(&$name::TECHNIQUE),*];
    };
}

techniques!(copy, splice, sockmap, library, userspace, kernel);

/// Where the relays stand, and who they are.
pub(super) struct Ends {
    /// The far relay, as the near one dials it.
    pub tunnel: SocketAddr,
    /// The load server, as the far relay dials it.
    pub server: SocketAddr,
    pub credentials: Credentials,
}

/// Where two relays are to stand.
#[derive(Debug)]
pub struct Relays {
    /// Network namespaces.
    pub near: PathBuf,
    pub far: PathBuf,
    /// Where the near relay listens.
    pub listen: SocketAddr,
    /// Where the far relay listens, and the near one dials it.
    pub tunnel: SocketAddr,
    pub server: SocketAddr,
}

/// Runs a technique's two relays for as long as the process lives.
pub fn carry(name: &str, relays: &Relays) -> Result<()> {
    let technique = ALL.iter().find(|technique| technique.name() == name);
    let technique = *technique.with_context(|| format!("no technique is called {name:?}"))?;
    let Relays { near, far, listen, tunnel, server } = relays;
    let ends = Arc::new(Ends { tunnel: *tunnel, server: *server, credentials: Credentials::make()? });
    std::thread::scope(|scope| {
        let far = scope.spawn(|| serve(far, *tunnel, || technique.far(ends.clone())));
        let near = scope.spawn(|| serve(near, *listen, || technique.near(ends.clone())));
        let join = |thread: std::thread::ScopedJoinHandle<'_, Result<()>>| {
            thread.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a relay panicked")))
        };
        join(near).and(join(far))
    })
}

fn serve(netns: &PathBuf, listen: SocketAddr, begin: impl FnOnce() -> OnAccept) -> Result<()> {
    let file = File::open(netns).with_context(|| format!("open {}", netns.display()))?;
    setns(&file, CloneFlags::CLONE_NEWNET).context("enter a network namespace")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async move {
        let listener = TcpListener::bind(listen).await.with_context(|| format!("listen on {listen}"))?;
        let on_accept = begin();
        loop {
            let Ok((socket, _)) = listener.accept().await else {
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            };
            let carried = on_accept(socket);
            tokio::task::spawn_local(async move {
                // Connections end when the load is over, in whatever way.
                if let Err(error) = carried.await {
                    tracing::debug!(%error, "a connection ended");
                }
            });
        }
    })
}

/// For a relay that needs nothing but both sockets: dials the next hop and lets `carry` move the bytes.
pub(super) fn onward<F>(to: SocketAddr, carry: fn(TcpStream, TcpStream) -> F) -> OnAccept
where
    F: Future<Output = Result<()>> + 'static,
{
    Box::new(move |from: TcpStream| -> Carried {
        Box::pin(async move {
            from.set_nodelay(true)?;
            carry(from, dial(to).await?).await
        })
    })
}

/// Dials the next hop.
pub(super) async fn dial(to: SocketAddr) -> Result<TcpStream> {
    let socket = TcpStream::connect(to).await?;
    socket.set_nodelay(true)?;
    Ok(socket)
}

/// What a relay's end means here.
pub(super) fn ended(end: End) -> Result<()> {
    match end {
        End::Clean => Ok(()),
        other => Err(anyhow::anyhow!("{other:?}")),
    }
}
