//! Why a change to the mesh was not accepted. The last good snapshot then stays in force.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use crate::identity::InvalidSpiffeId;

/// Where an object was read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Place {
    /// A file's path, or what else objects come from.
    pub source: Arc<str>,
    /// Which of the file's documents, from 1.
    pub document: Option<u32>,
    /// Which item of a `List`, from 0.
    pub item: Option<u32>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.source)?;
        if let Some(document) = self.document {
            write!(f, ", document {document}")?;
        }
        if let Some(item) = self.item {
            write!(f, ", items[{item}]")?;
        }
        Ok(())
    }
}

/// Every variant but the last two is the manifests' fault; correcting the named place is picked up by itself.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    #[error("{place}: not valid YAML or JSON: {problem}; correct the syntax")]
    Syntax { place: Place, problem: String },
    #[error("{place}: {problem}")]
    NoObject { place: Place, problem: NoObject },
    #[error("{place}: {kind} of apiVersion {api_version:?} isn't understood; write apiVersion: {expected}")]
    ApiVersion { place: Place, kind: String, api_version: String, expected: &'static str },
    #[error("{place}: {object}: field {field}: {problem}")]
    Field { place: Place, object: String, field: String, problem: String },
    #[error("{place}: {object}: field {field}: {problem}")]
    Address { place: Place, object: String, field: &'static str, problem: InvalidAddress },
    #[error("{place}: {object} has no valid identity: {problem}")]
    Identity { place: Place, object: String, problem: InvalidSpiffeId },
    #[error("{place}: {object}: annotation {annotation} is {value:?}; write an absolute path")]
    PathAnnotation { place: Place, object: String, annotation: &'static str, value: String },
    #[error("{object} is defined twice: {first}; and {second}; remove one of them")]
    Duplicate { object: String, first: Place, second: Place },
    #[error(
        "{address} is claimed by Pod {first} ({first_place}) and by Pod {second} ({second_place}), and neither is \
         newer by metadata.creationTimestamp; remove one, or give one another status.podIP"
    )]
    ClaimedAddress {
        address: IpAddr,
        first: Box<str>,
        first_place: Place,
        second: Box<str>,
        second_place: Place,
    },
    #[error(
        "{address} is the clusterIP of Service {first} ({first_place}) and of Service {second} ({second_place}); \
         give one another clusterIP"
    )]
    ClaimedVip { address: IpAddr, first: Box<str>, first_place: Place, second: Box<str>, second_place: Place },
    #[error(
        "{directory} has no manifest (*.yaml, *.yml or *.json) any more; to empty the mesh on purpose, leave a file \
         with only a comment",
        directory = directory.display()
    )]
    Emptied { directory: PathBuf },
    #[error("{path} is nested too deeply or links to itself; keep manifests within {limit} levels", path = path.display())]
    TooDeep { path: PathBuf, limit: usize },
    #[error("cannot read manifests from {path}: {source}; the path must exist and be readable", path = path.display())]
    Read { path: PathBuf, source: Arc<std::io::Error> },
    #[error("cannot start the thread that watches {directory}: {source}", directory = directory.display())]
    Thread { directory: PathBuf, source: Arc<std::io::Error> },
}

impl Error {
    /// Where the object at fault was read: of two that contradict each other, the second.
    pub(super) fn place(&self) -> Option<&Place> {
        match self {
            Self::Syntax { place, .. }
            | Self::NoObject { place, .. }
            | Self::ApiVersion { place, .. }
            | Self::Field { place, .. }
            | Self::Address { place, .. }
            | Self::Identity { place, .. }
            | Self::PathAnnotation { place, .. } => Some(place),
            Self::Duplicate { second, .. } => Some(second),
            Self::ClaimedAddress { second_place, .. } | Self::ClaimedVip { second_place, .. } => {
                Some(second_place)
            }
            Self::Emptied { .. } | Self::TooDeep { .. } | Self::Read { .. } | Self::Thread { .. } => None,
        }
    }

    /// `Kind namespace/name` of the object at fault, as far as it was understood.
    pub(super) fn object(&self) -> Option<String> {
        match self {
            Self::Field { object, .. }
            | Self::Address { object, .. }
            | Self::Identity { object, .. }
            | Self::PathAnnotation { object, .. }
            | Self::Duplicate { object, .. } => Some(object.clone()),
            Self::ApiVersion { kind, .. } => Some(kind.clone()),
            Self::ClaimedAddress { second, .. } => Some(format!("Pod {second}")),
            Self::ClaimedVip { second, .. } => Some(format!("Service {second}")),
            _ => None,
        }
    }

    /// The field at fault.
    pub(super) fn field(&self) -> Option<String> {
        match self {
            Self::Field { field, .. } => Some(field.clone()),
            Self::Address { field, .. } => Some((*field).to_owned()),
            Self::PathAnnotation { annotation, .. } => Some(format!("metadata.annotations.{annotation}")),
            Self::ApiVersion { .. } => Some("apiVersion".to_owned()),
            Self::Identity { .. } => Some("spec.serviceAccountName".to_owned()),
            Self::Duplicate { .. } => Some("metadata.name".to_owned()),
            Self::ClaimedAddress { .. } => Some("status.podIP".to_owned()),
            Self::ClaimedVip { .. } => Some("spec.clusterIP".to_owned()),
            Self::NoObject { problem: NoObject::NoKind, .. } => Some("kind".to_owned()),
            Self::NoObject { problem: NoObject::NoApiVersion, .. } => Some("apiVersion".to_owned()),
            Self::NoObject { problem: NoObject::NoItems | NoObject::NestedList, .. } => {
                Some("items".to_owned())
            }
            _ => None,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NoObject {
    #[error("a manifest is a mapping with apiVersion, kind and metadata; this document is something else")]
    NotAMapping,
    #[error("field kind is missing; every manifest has apiVersion and kind")]
    NoKind,
    #[error("field apiVersion is missing; every manifest has apiVersion and kind")]
    NoApiVersion,
    #[error("field items: a List has a sequence of objects")]
    NoItems,
    #[error("a List inside a List; write its items one level up")]
    NestedList,
}

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum InvalidAddress {
    #[error("{text:?} is not an IP address")]
    NotAnAddress { text: String },
    #[error("{port} is not a port; write a number from 1 to 65535")]
    NotAPort { port: i64 },
}
