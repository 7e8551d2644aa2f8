//! The door: serves the agent's own socket. A caller's first line in, whoever it concerns asked, the answer out.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::sync::Semaphore;

use crate::agent_socket::{Answer, Conversation, Error, Request};
use crate::cni::Admissions;
use crate::identity::Identities;
use crate::mesh;
use crate::observe::Observer;
use crate::succession::{Phase, Reign};

/// Callers at once: a node that starts a hundred pods together has as many plugins waiting.
const CALLERS: usize = 512;
/// A caller that says nothing for so long is sent away.
const FIRST_LINE: Duration = Duration::from_secs(10);

/// Whom callers are passed on to.
#[derive(Clone)]
pub struct Door {
    pub admissions: Arc<Admissions>,
    pub mesh: mesh::Source,
    pub identities: Arc<Identities>,
    pub observer: Observer,
    pub reign: Arc<Reign>,
}

impl Door {
    /// Answers callers for as long as the returned future is polled.
    pub async fn serve(self, listener: UnixListener) {
        let room = Arc::new(Semaphore::new(CALLERS));
        loop {
            let caller = match listener.accept().await {
                Ok((stream, _)) => Conversation::new(stream),
                Err(error) => {
                    tracing::warn!(%error, "a caller at the agent's socket is lost");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    continue;
                }
            };
            let Ok(place) = room.clone().acquire_owned().await else { return };
            let door = self.clone();
            tokio::spawn(async move {
                if let Err(error) = door.receive(caller).await {
                    tracing::warn!(%error, "a caller at the agent's socket");
                }
                drop(place);
            });
        }
    }

    async fn receive(&self, mut caller: Conversation) -> Result<(), Error> {
        let request = tokio::time::timeout(FIRST_LINE, caller.next()).await.map_err(|_| Error::Silent)??;
        let answer = match request {
            None => return Ok(()),
            Some(Request::Add(attachment)) => {
                let pod = format!("{}/{}", attachment.namespace, attachment.name);
                let netns = caller.file();
                let adding = self.admissions.add(&self.mesh, attachment, netns);
                let answer = tokio::select! {
                    answer = adding => answer,
                    // The plugin hears nothing, and asks the agent that takes over.
                    () = self.reign.reaches(|phase| *phase >= Phase::Frozen) => return Ok(()),
                };
                match &answer {
                    Answer::Failed { reason } => tracing::warn!(pod, reason, "pod is not let start"),
                    answer => tracing::info!(pod, ?answer, "pod may start"),
                }
                answer
            }
            Some(Request::Check(attachment)) => self.admissions.check(&self.mesh, &attachment).await,
            Some(Request::Del { container }) => {
                self.admissions.del(&container);
                Answer::Done
            }
            Some(Request::Gc { containers }) => {
                self.admissions.gc(&containers);
                Answer::Done
            }
            Some(Request::Status) => Answer::Done,
            Some(Request::Succeed { pid, .. }) => {
                let held = self.identities.status().into_iter().map(|status| status.id);
                let held = held.filter(|id| self.identities.current(id).is_some()).map(|id| id.to_string());
                let open = || self.observer.open_connections();
                return self.reign.receive(&mut caller, pid, held.collect(), open).await;
            }
        };
        caller.say(&answer).await
    }
}
