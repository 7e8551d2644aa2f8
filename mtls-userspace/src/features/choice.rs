//! What the agent has a choice about: what it was told and what the kernel can do in, what it uses out.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::mpsc;
use std::time::Duration;

use serde::Deserialize;

use super::path;
use crate::capture::probe::{Obstacle, Outcome};

/// A path that connections may take or not.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Choice {
    KtlsAes128Gcm,
    KtlsAes256Gcm,
    KtlsChacha20Poly1305,
    KtlsRekey,
    Splice,
    TcpRtoMax,
    SocketDestroy,
}

impl Choice {
    pub const ALL: [Self; 7] = [
        Self::KtlsAes128Gcm,
        Self::KtlsAes256Gcm,
        Self::KtlsChacha20Poly1305,
        Self::KtlsRekey,
        Self::Splice,
        Self::TcpRtoMax,
        Self::SocketDestroy,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::KtlsAes128Gcm => "ktls-aes-128-gcm",
            Self::KtlsAes256Gcm => "ktls-aes-256-gcm",
            Self::KtlsChacha20Poly1305 => "ktls-chacha20-poly1305",
            Self::KtlsRekey => "ktls-rekey",
            Self::Splice => "splice",
            Self::TcpRtoMax => "tcp-rto-max",
            Self::SocketDestroy => "socket-destroy",
        }
    }
}

/// An operator's word on a choice: `NAME=on` must work, `NAME=off` is not used even if it would.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(try_from = "String")]
pub struct Forced {
    pub choice: Choice,
    pub on: bool,
}

#[derive(PartialEq, Eq, Debug, thiserror::Error)]
pub enum Error {
    #[error("{0:?} is not NAME=on or NAME=off with a NAME of {names}", names = names())]
    NotAChoice(String),
    #[error(
        "feature {name} is forced on, but does not work here: {reason}; `mtls lab features` says more, and without the \
         setting the agent does without it", name = .choice.name()
    )]
    DoesNotWork { choice: Choice, reason: String },
}

fn names() -> String {
    Choice::ALL.map(Choice::name).join(", ")
}

impl FromStr for Forced {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = || Error::NotAChoice(text.to_owned());
        let (name, word) = text.split_once('=').ok_or_else(wrong)?;
        let choice = Choice::ALL.into_iter().find(|choice| choice.name() == name).ok_or_else(wrong)?;
        match word {
            "on" => Ok(Self { choice, on: true }),
            "off" => Ok(Self { choice, on: false }),
            _ => Err(wrong()),
        }
    }
}

impl TryFrom<String> for Forced {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

/// What the agent uses, and why it doesn't use the rest.
#[derive(Clone, Default, Debug)]
pub struct Chosen(BTreeMap<Choice, Result<(), Box<str>>>);

/// How long the agent's start waits for all of it. What has not answered by then counts as not working.
const PATIENCE: Duration = Duration::from_secs(10);

impl Chosen {
    /// Tries each path once and decides.
    ///
    /// # Errors
    ///
    /// When a path is forced on that does not work.
    pub fn at_start(forced: &[Forced]) -> Result<Self, Error> {
        let (send, outcomes) = mpsc::channel();
        let is_off = |choice| forced.iter().any(|forced| forced.choice == choice && !forced.on);
        let wanted: Vec<_> = Choice::ALL.into_iter().filter(|choice| !is_off(*choice)).collect();
        let count = wanted.len();
        // A thread of its own, which a kernel that never answers keeps.
        std::thread::spawn(move || {
            wanted.into_iter().try_for_each(|choice| send.send((choice, path::attempt(choice))))
        });
        let deadline = std::time::Instant::now() + PATIENCE;
        let mut found = Vec::new();
        while found.len() < count
            && let Ok(outcome) =
                outcomes.recv_timeout(deadline.saturating_duration_since(std::time::Instant::now()))
        {
            found.push(outcome);
        }
        Self::decide(found, forced)
    }

    fn decide(found: Vec<(Choice, Outcome)>, forced: &[Forced]) -> Result<Self, Error> {
        let mut found: BTreeMap<Choice, Outcome> = found.into_iter().collect();
        let decide = |choice| {
            let word = forced.iter().rfind(|forced| forced.choice == choice).map(|forced| forced.on);
            let outcome = match (word, found.remove(&choice)) {
                (Some(false), _) => Err("switched off".into()),
                (_, Some(outcome)) => outcome.map(drop).map_err(|Obstacle { reason, .. }| reason.into()),
                (_, None) => Err("the kernel did not answer in time".into()),
            };
            match outcome {
                Err(reason) if word == Some(true) => {
                    Err(Error::DoesNotWork { choice, reason: String::from(reason) })
                }
                outcome => Ok((choice, outcome)),
            }
        };
        Ok(Self(Choice::ALL.into_iter().map(decide).collect::<Result<_, _>>()?))
    }

    pub fn uses(&self, choice: Choice) -> bool {
        self.0.get(&choice).is_some_and(Result::is_ok)
    }

    /// Each choice, and whether it is used.
    pub fn rows(&self) -> Vec<(&'static str, bool)> {
        self.0.iter().map(|(choice, outcome)| (choice.name(), outcome.is_ok())).collect()
    }
}

/// For a log line: what is used; what is not, and why.
impl fmt::Display for Chosen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut used = Vec::new();
        let mut unused: Vec<(&str, Vec<&str>)> = Vec::new();
        for (choice, outcome) in &self.0 {
            match outcome {
                Ok(()) => used.push(choice.name()),
                Err(reason) => match unused.iter_mut().find(|(known, _)| **known == **reason) {
                    Some((_, names)) => names.push(choice.name()),
                    None => unused.push((reason, vec![choice.name()])),
                },
            }
        }
        write!(f, "uses {}", if used.is_empty() { "none".into() } else { used.join(", ") })?;
        unused
            .iter()
            .try_for_each(|(reason, names)| write!(f, "; does without {}: {reason}", names.join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(reason: &str) -> Outcome {
        Err(Obstacle { reason: reason.into(), errno: None, tried: true })
    }

    #[test]
    fn what_works_is_used_unless_it_is_switched_off() {
        let found = || vec![(Choice::Splice, Ok(String::new())), (Choice::TcpRtoMax, failed("ENOPROTOOPT"))];
        let chosen = Chosen::decide(found(), &[]).unwrap();
        assert!(chosen.uses(Choice::Splice) && !chosen.uses(Choice::TcpRtoMax));
        assert!(!chosen.uses(Choice::KtlsAes128Gcm), "nobody answered");
        assert!(chosen.to_string().contains("does without tcp-rto-max: ENOPROTOOPT"), "{chosen}");
        let off = "splice=off".parse().unwrap();
        let chosen = Chosen::decide(found(), &[off]).unwrap();
        assert!(!chosen.uses(Choice::Splice));
        assert!(chosen.to_string().contains("does without splice: switched off"), "{chosen}");
    }

    #[test]
    fn what_is_forced_and_cannot_work_is_an_error_that_names_it() {
        let found = vec![(Choice::TcpRtoMax, failed("ENOPROTOOPT"))];
        let error = Chosen::decide(found, &["tcp-rto-max=on".parse().unwrap()]).unwrap_err().to_string();
        assert!(error.contains("tcp-rto-max") && error.contains("ENOPROTOOPT"), "{error}");
        let error =
            Chosen::decide(Vec::new(), &["ktls-aes-128-gcm=on".parse().unwrap()]).unwrap_err().to_string();
        assert!(error.contains("ktls-aes-128-gcm") && error.contains("did not answer"), "{error}");
    }

    #[test]
    fn a_word_that_is_no_choice_is_named_with_those_there_are() {
        for text in ["ktls=on", "splice", "splice=maybe", "=on", ""] {
            let error = text.parse::<Forced>().unwrap_err().to_string();
            assert!(error.contains(&format!("{text:?}")) && error.contains("tcp-rto-max"), "{error}");
        }
        for choice in Choice::ALL {
            assert_eq!(format!("{}=on", choice.name()).parse(), Ok(Forced { choice, on: true }));
        }
    }
}
