//! What an agent has while its place is its own: the admin API's port and socket, the door, the plugin. Given up to a
//! succeeding agent, and taken up again when that one is gone before it was done.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::sync::watch;

use crate::cni::Installation;
use crate::config::Config;
use crate::door::Door;
use crate::observe::{self, Admin, Observer, Readiness, SocketFile};
use crate::succession::{Part, Phase, Reign};

/// Between attempts to have again what another agent has not yet let go of.
const AGAIN: Duration = Duration::from_millis(200);

/// What an agent has from its first moment: a port that says how far it is.
#[derive(Clone)]
pub struct Front {
    pub config: Arc<Config>,
    pub reign: Arc<Reign>,
    pub observer: Observer,
    pub readiness: Readiness,
    pub stopping: watch::Receiver<bool>,
}

/// What the agent's sockets lead to.
#[derive(Clone)]
pub struct Tenure {
    pub front: Front,
    pub door: Door,
}

/// The sockets' listeners, bound but not yet answering.
pub struct Sockets {
    admin: Admin,
    callers: UnixListener,
    _file: SocketFile,
}

impl Sockets {
    /// Takes the paths, so that what is taken already is known before anything else starts.
    pub async fn bind(config: &Config) -> Result<Self, observe::Error> {
        let admin = Admin::bind(None, Some(&config.admin_socket)).await?;
        let (callers, file) = observe::bind_socket(&config.agent_socket)?;
        Ok(Self { admin, callers, _file: file })
    }
}

impl Front {
    /// Answers on the admin API's port while no other agent is starting.
    pub async fn keep_port(self, first: Admin) {
        let mut next = Some(first);
        loop {
            let admin = match next.take() {
                Some(admin) => admin,
                None => match Admin::bind(Some(self.config.admin), None).await {
                    Ok(admin) => admin,
                    Err(_) if self.stops_within(AGAIN).await => return,
                    Err(_) => continue,
                },
            };
            let hold = self.reign.hold(Part::Port);
            let end = self.until(|phase| *phase != Phase::Alone);
            if let Err(error) = admin.serve(self.observer.clone(), self.readiness.clone(), end).await {
                tracing::error!(%error, "the admin API's port answers no more");
            }
            drop(hold);
            self.until(|phase| *phase == Phase::Alone).await;
            if *self.stopping.borrow() {
                return;
            }
        }
    }

    /// The admin socket of an agent whose place was taken.
    fn retired_socket(&self) -> PathBuf {
        let path = &self.config.admin_socket;
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or("admin");
        path.with_file_name(format!("{stem}.{}.sock", std::process::id()))
    }

    /// Resolves when the phase is as wanted, or the agent ends.
    fn until<W: FnMut(&Phase) -> bool>(&self, wanted: W) -> impl Future<Output = ()> + use<W> {
        let (reign, mut stopping) = (self.reign.clone(), self.stopping.clone());
        async move {
            tokio::select! {
                () = reign.reaches(wanted) => {}
                _ = stopping.wait_for(|stop| *stop) => {}
            }
        }
    }

    async fn stops_within(&self, time: Duration) -> bool {
        let mut stopping = self.stopping.clone();
        tokio::time::timeout(time, stopping.wait_for(|stop| *stop)).await.is_ok()
    }
}

impl Tenure {
    /// Answers on the sockets, and keeps the CNI plugin installed, until another agent takes over; then under a name of
    /// its own, so that what is still open here can be looked at.
    pub async fn keep_sockets(self, first: Sockets) {
        let Self { front, door } = self;
        let mut next = Some(first);
        loop {
            let sockets = match next.take() {
                Some(sockets) => sockets,
                None => match Sockets::bind(&front.config).await {
                    Ok(sockets) => sockets,
                    Err(_) if front.stops_within(AGAIN).await => return,
                    Err(_) => continue,
                },
            };
            let hold = front.reign.hold(Part::Control);
            let installation = front.config.cni.clone().map(Installation::begin).transpose();
            if let Err(error) = &installation {
                tracing::error!(%error, "the CNI plugin is not installed: pods are enrolled when they are found");
            }
            let Sockets { admin, callers, _file } = sockets;
            let end = front.until(|phase| *phase >= Phase::Frozen);
            tokio::select! {
                _ = admin.serve(front.observer.clone(), front.readiness.clone(), end) => {}
                () = door.clone().serve(callers) => {}
            }
            drop((installation, _file, hold));
            if *front.stopping.borrow() {
                return;
            }
            if let Ok(admin) = Admin::bind(None, Some(&front.retired_socket())).await {
                let end = front.until(|phase| *phase < Phase::Frozen);
                let _ = admin.serve(front.observer.clone(), front.readiness.clone(), end).await;
            }
            front.until(|phase| *phase < Phase::Frozen).await;
            if *front.stopping.borrow() {
                return;
            }
        }
    }
}
