//! Join tokens: a YAML map that the operator wrote in, the node that a token was given to out.

use std::collections::HashSet;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest::{SHA256, digest};
use serde_yaml_ng::{Mapping, Value};
use zeroize::Zeroizing;

use super::followed::Followed;
use super::{Caller, Callers, Proof, Unidentified};
use crate::ca::Error;

/// Tokens that the operator gave out, each bound to one node: a YAML map from node name to token.
///
/// The file is read again when it changes; while it is broken the last good content counts.
pub struct JoinTokens(Followed<Tokens>);

/// Only digests are kept: of equal length, whatever the tokens', and useless to whoever reads this memory.
struct Tokens(Vec<(Arc<str>, [u8; 32])>);

impl JoinTokens {
    pub fn open(path: &Path) -> Result<Self, Error> {
        Followed::open(path, read).map(Self)
    }

    /// Names of the nodes that have a token.
    pub fn nodes(&self) -> Vec<Arc<str>> {
        self.0.current().0.iter().map(|(node, _)| node.clone()).collect()
    }
}

#[tonic::async_trait]
impl Callers for JoinTokens {
    async fn identify(&self, proof: &Proof<'_>) -> Result<Caller, Unidentified> {
        let token = proof.token.ok_or(Unidentified::Absent)?;
        let presented = digest(&SHA256, token.as_bytes());
        let tokens = self.0.current();
        let mut caller = None;
        // Every entry is compared, and each in constant time: the time taken tells nothing about the tokens.
        for (node, known) in &tokens.0 {
            if verify_slices_are_equal(presented.as_ref(), known).is_ok() {
                caller = Some(Caller { node: node.clone() });
            }
        }
        caller.ok_or(Unidentified::Unknown)
    }
}

/// What is wrong with a token file. Never shows a token.
#[derive(Debug)]
pub enum InvalidTokens {
    Yaml { line: Option<usize> },
    NotAMap,
    Empty,
    Entry { node: String },
    Short { node: String },
    Shared { node: String },
}

/// Long enough that nobody guesses one over the network; `openssl rand -hex 16` gives 32.
const MIN_TOKEN: usize = 16;

impl fmt::Display for InvalidTokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Yaml { line: Some(line) } => write!(f, "malformed YAML, or a node twice, at line {line}"),
            Self::Yaml { line: None } => f.write_str("malformed YAML, or a node twice"),
            Self::NotAMap => f.write_str("it is no map"),
            Self::Empty => f.write_str("it names no node, so nobody could call"),
            Self::Entry { node } => write!(f, "the entry {node:?} is not a node name with a token as text"),
            Self::Short { node } => write!(
                f,
                "the token of {node:?} is shorter than {MIN_TOKEN} characters; make one with `openssl rand -hex 16`"
            ),
            Self::Shared { node } => write!(f, "the token of {node:?} is another node's as well"),
        }
    }
}

fn read(path: &Path) -> Result<Tokens, Error> {
    let content = std::fs::read(path).map(Zeroizing::new).map_err(|source| Error::File {
        attempt: "read",
        path: path.into(),
        source,
    })?;
    parse(&content).map_err(|fault| Error::Tokens { path: path.into(), fault })
}

fn parse(yaml: &[u8]) -> Result<Tokens, InvalidTokens> {
    let value: Value = serde_yaml_ng::from_slice(yaml)
        .map_err(|error| InvalidTokens::Yaml { line: error.location().map(|at| at.line()) })?;
    let Value::Mapping(entries) = value else {
        return Err(if value.is_null() { InvalidTokens::Empty } else { InvalidTokens::NotAMap });
    };
    entries_of(&entries)
}

fn entries_of(entries: &Mapping) -> Result<Tokens, InvalidTokens> {
    let mut tokens = Vec::new();
    let mut seen = HashSet::new();
    for (node, token) in entries {
        let name = node.as_str().filter(|name| !name.is_empty());
        let (Some(node), Some(token)) = (name, token.as_str()) else {
            let node = node.as_str().map_or_else(|| format!("{node:?}"), Into::into);
            return Err(InvalidTokens::Entry { node });
        };
        let token = token.trim();
        if token.len() < MIN_TOKEN {
            return Err(InvalidTokens::Short { node: node.into() });
        }
        let digest = digest(&SHA256, token.as_bytes());
        let mut known = [0; 32];
        known.copy_from_slice(digest.as_ref());
        if !seen.insert(known) {
            return Err(InvalidTokens::Shared { node: node.into() });
        }
        tokens.push((node.into(), known));
    }
    if tokens.is_empty() {
        return Err(InvalidTokens::Empty);
    }
    Ok(Tokens(tokens))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_fault_of_a_token_file_is_named_and_no_token_shown() {
        type Expected = fn(&InvalidTokens) -> bool;
        let cases: [(&str, Expected); 8] = [
            ("", |e| matches!(e, InvalidTokens::Empty)),
            ("{}", |e| matches!(e, InvalidTokens::Empty)),
            ("- node-a", |e| matches!(e, InvalidTokens::NotAMap)),
            ("node-a: [secret-secret-secret", |e| matches!(e, InvalidTokens::Yaml { .. })),
            (
                "node-a: 12345678901234567890",
                |e| matches!(e, InvalidTokens::Entry { node } if node == "node-a"),
            ),
            ("node-a: secret", |e| matches!(e, InvalidTokens::Short { node } if node == "node-a")),
            (
                "a: secret-secret-secret\nb: secret-secret-secret",
                |e| matches!(e, InvalidTokens::Shared { node } if node == "b"),
            ),
            ("a: secret-secret-secret\na: secret-secret-other", |e| matches!(e, InvalidTokens::Yaml { .. })),
        ];
        for (yaml, expected) in cases {
            let Err(fault) = parse(yaml.as_bytes()) else { panic!("accepted {yaml:?}") };
            assert!(expected(&fault), "{yaml:?}: {fault:?}");
            assert!(!fault.to_string().contains("secret"), "{fault}");
            assert!(!fault.to_string().contains("1234567890"), "{fault}");
        }
    }

    #[tokio::test]
    async fn a_token_speaks_for_its_node_alone_and_the_file_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens.yaml");
        std::fs::write(&path, "node-a: aaaaaaaaaaaaaaaaaaaa\nnode-b: bbbbbbbbbbbbbbbbbbbb\n").unwrap();
        let tokens = JoinTokens::open(&path).unwrap();
        let node = async |token| {
            let proof = Proof { token: Some(token), certificates: &[] };
            tokens.identify(&proof).await.map(|caller| caller.node.to_string())
        };
        assert_eq!(node("aaaaaaaaaaaaaaaaaaaa").await, Ok("node-a".into()));
        assert_eq!(node("bbbbbbbbbbbbbbbbbbbb").await, Ok("node-b".into()));
        for wrong in ["", "a", "aaaaaaaaaaaaaaaaaaa", "aaaaaaaaaaaaaaaaaaaaa", "AAAAAAAAAAAAAAAAAAAA"] {
            assert_eq!(node(wrong).await, Err(Unidentified::Unknown), "{wrong:?}");
        }

        std::fs::write(&path, "node-c: cccccccccccccccccccc\n").unwrap();
        assert_eq!(node("cccccccccccccccccccc").await, Ok("node-c".into()));
        assert_eq!(node("aaaaaaaaaaaaaaaaaaaa").await, Err(Unidentified::Unknown));

        std::fs::write(&path, "node-d: short\n").unwrap();
        assert_eq!(node("cccccccccccccccccccc").await, Ok("node-c".into()));
    }
}
