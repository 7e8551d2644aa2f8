//! The successor's side: an agent that is there already, asked for its place step by step.

use std::collections::HashSet;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::{PredecessorRow, Reply, Step};
use crate::agent_socket::{self, Conversation, Request};

/// How long a predecessor may take for an answer: it lets answers under way finish.
const PATIENCE: Duration = Duration::from_secs(15);

/// The agent whose place this one takes.
pub struct Predecessor {
    conversation: Conversation,
    identities: HashSet<String>,
    row: Arc<Mutex<Option<PredecessorRow>>>,
}

impl Predecessor {
    /// Asks for the place of the agent on a socket. `None` if there is no agent.
    ///
    /// # Errors
    ///
    /// When there is one that does not give way.
    pub async fn greet(socket: &Path) -> Result<Option<Self>, Error> {
        let Ok(mut conversation) = Conversation::call(socket).await else { return Ok(None) };
        let version = env!("CARGO_PKG_VERSION").to_owned();
        conversation.say(&Request::Succeed { version, pid: std::process::id() }).await?;
        match answer(&mut conversation).await? {
            Reply::Welcome { pid, version, identities } => {
                tracing::info!(pid, version, "taking the place of the agent that runs here");
                let row = Arc::new(Mutex::new(Some(PredecessorRow { pid, version, open: 0 })));
                Ok(Some(Self { conversation, identities: identities.into_iter().collect(), row }))
            }
            Reply::Taken => Err(Error::Taken),
            other => Err(Error::Unexpected(other.name())),
        }
    }

    /// Whether the predecessor can prove itself with an identity.
    pub fn has(&self, identity: &str) -> bool {
        self.identities.contains(identity)
    }

    /// What is known of it, while it lives.
    pub fn row(&self) -> Arc<Mutex<Option<PredecessorRow>>> {
        self.row.clone()
    }

    /// Resolves when the predecessor has ended.
    pub async fn gone(&mut self) {
        while let Ok(Some(_)) = self.conversation.next::<Reply>().await {}
    }

    /// Asks for kernel and sockets.
    ///
    /// # Errors
    ///
    /// When the predecessor goes away, which leaves its place free as well.
    pub async fn take_over(&mut self) -> Result<(), Error> {
        self.conversation.say(&Step::TakeOver).await?;
        match answer(&mut self.conversation).await? {
            Reply::Yours => Ok(()),
            other => Err(Error::Unexpected(other.name())),
        }
    }

    /// Lets the predecessor drain, and follows it to its end.
    pub async fn drain(mut self) {
        let mut outcome = self.conversation.say(&Step::Drain).await;
        while outcome.is_ok() {
            match self.conversation.next::<Reply>().await {
                Ok(Some(Reply::Draining { open })) => {
                    if let Some(row) = self.row.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
                        row.open = open;
                    }
                }
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(error) => outcome = Err(error),
            }
        }
    }
}

impl Drop for Predecessor {
    fn drop(&mut self) {
        let row = self.row.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(PredecessorRow { pid, open, .. }) = row {
            tracing::info!(pid, open, "the agent whose place this one took has ended");
        }
    }
}

async fn answer(conversation: &mut Conversation) -> Result<Reply, Error> {
    let answer = tokio::time::timeout(PATIENCE, conversation.next()).await;
    answer.map_err(|_| agent_socket::Error::Silent)??.ok_or(Error::Gone)
}

impl Reply {
    fn name(&self) -> &'static str {
        match self {
            Self::Welcome { .. } => "welcome",
            Self::Taken => "taken",
            Self::Yours => "yours",
            Self::Draining { .. } => "draining",
        }
    }
}

/// Why an agent's place cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("another agent is taking this place already; stop one of them")]
    Taken,
    #[error("the agent that runs here went away")]
    Gone,
    #[error("the agent that runs here answers {0:?}, which this version does not expect")]
    Unexpected(&'static str),
    #[error(transparent)]
    Socket(#[from] agent_socket::Error),
}
