//! The predecessor's side: how much of its place an agent still has, and its answers to a successor.

use std::time::Duration;

use tokio::sync::watch;

use super::{Reply, Step};
use crate::agent_socket::{Conversation, Error};

/// Between two words on how many connections are open.
const TOLD_EVERY: Duration = Duration::from_millis(500);
/// How long the parts of the agent get to let go.
const LETTING_GO: Duration = Duration::from_secs(10);

/// How far a succession is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Phase {
    Alone,
    /// Another agent is starting.
    Challenged,
    /// Another agent has taken over, and enrols the pods.
    Frozen,
    /// Another agent has every pod.
    Retired,
    /// It had, and is gone.
    Orphaned,
}

/// What must be let go of before a successor can have it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// The admin API's TCP port.
    Port,
    /// The sockets' paths, the kernel's maps, the CNI plugin.
    Control,
}

/// An agent's place on its node.
pub struct Reign {
    phase: watch::Sender<Phase>,
    held: watch::Sender<[usize; 2]>,
}

/// A part in use; dropped when it is let go of.
pub struct Hold {
    part: Part,
    held: watch::Sender<[usize; 2]>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.held.send_modify(|held| {
            if let Some(count) = held.get_mut(self.part as usize) {
                *count = count.saturating_sub(1);
            }
        });
    }
}

impl Default for Reign {
    fn default() -> Self {
        Self { phase: watch::Sender::new(Phase::Alone), held: watch::Sender::default() }
    }
}

impl Reign {
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    pub fn subscribe(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// Resolves once `wanted` accepts the phase.
    pub async fn reaches(&self, wanted: impl FnMut(&Phase) -> bool) {
        // The sender is ours, and lives.
        let _ = self.subscribe().wait_for(wanted).await;
    }

    /// Uses a part, until the hold is dropped.
    pub fn hold(&self, part: Part) -> Hold {
        self.held.send_modify(|held| {
            if let Some(count) = held.get_mut(part as usize) {
                *count += 1;
            }
        });
        Hold { part, held: self.held.clone() }
    }

    async fn let_go(&self, part: Part) {
        let mut held = self.held.subscribe();
        let all = held.wait_for(|held| held.get(part as usize).is_none_or(|count| *count == 0));
        if tokio::time::timeout(LETTING_GO, all).await.is_err() {
            tracing::error!(?part, "not let go of in time for the succeeding agent");
        }
    }

    /// Leads a successor through its steps, until it goes away.
    ///
    /// # Errors
    ///
    /// When it says something that cannot be understood.
    pub async fn receive(
        &self,
        successor: &mut Conversation,
        pid: u32,
        identities: Vec<String>,
        open: impl Fn() -> u64,
    ) -> Result<(), Error> {
        let first = self.phase.send_if_modified(|phase| {
            let is_alone = *phase == Phase::Alone;
            if is_alone {
                *phase = Phase::Challenged;
            }
            is_alone
        });
        if !first {
            return successor.say(&Reply::Taken).await;
        }
        tracing::info!(pid, "another agent is starting to take this one's place");
        let outcome = self.lead(successor, identities, open).await;
        self.phase.send_modify(|phase| {
            *phase = match *phase {
                Phase::Retired => Phase::Orphaned,
                _ => Phase::Alone,
            }
        });
        tracing::warn!(pid, phase = ?self.phase(), "the agent that was taking this one's place has gone");
        outcome
    }

    async fn lead(
        &self,
        successor: &mut Conversation,
        identities: Vec<String>,
        open: impl Fn() -> u64,
    ) -> Result<(), Error> {
        self.let_go(Part::Port).await;
        let (own, version) = (std::process::id(), env!("CARGO_PKG_VERSION").to_owned());
        successor.say(&Reply::Welcome { pid: own, version, identities }).await?;
        loop {
            let heard = tokio::select! {
                heard = successor.next::<Step>() => heard?,
                () = tokio::time::sleep(TOLD_EVERY), if self.phase() == Phase::Retired => {
                    successor.say(&Reply::Draining { open: open() }).await?;
                    continue;
                }
            };
            match heard {
                None => return Ok(()),
                Some(Step::TakeOver) => {
                    self.phase.send_replace(Phase::Frozen);
                    self.let_go(Part::Control).await;
                    successor.say(&Reply::Yours).await?;
                }
                Some(Step::Drain) => {
                    tracing::info!(open = open(), "another agent has every pod: this one keeps what is open");
                    self.phase.send_replace(Phase::Retired);
                    successor.say(&Reply::Draining { open: open() }).await?;
                }
            }
        }
    }
}
