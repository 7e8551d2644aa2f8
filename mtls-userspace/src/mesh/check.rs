//! Manifests looked over before they are used: a directory in, everything worth knowing about it out.
//!
//! Where loading stops at the first thing it can't understand, this goes on and lists them all. It never changes
//! anything and needs no agent.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use serde::Serialize;

use super::error::{Error, Place};
use super::files::Files;
use super::objects::{Concerned, Objects, Spot, duplicates};
use super::parts::Parts;
use super::{Mesh, Settings, Warning};

/// One remark on the manifests.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Finding {
    pub severity: Severity,
    /// Absent only for what concerns the directory as a whole.
    pub file: Option<String>,
    /// Which of the file's documents, from 1.
    pub document: Option<u32>,
    /// Which item of a `List`, from 0.
    pub item: Option<u32>,
    /// `Kind namespace/name`, as far as it was understood.
    pub object: Option<String>,
    pub field: Option<String>,
    /// A sentence that is complete without the rest, with the remedy.
    pub message: String,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The manifests are refused, or a policy protects less than it says.
    Error,
    /// In force, but perhaps not what its author meant.
    Warning,
}

/// Looks over every manifest of a directory. Errors come first, each group in the order of files and documents.
///
/// # Errors
///
/// When the directory can't be read at all.
pub fn check(directory: &Path, settings: &Settings) -> Result<Vec<Finding>, Error> {
    let mut files = Files::default();
    files.refresh(directory, settings)?;
    let (mut objects, mut errors) = files.understood();
    let duplicates = duplicates(objects.iter(), Concerned::ALL);
    for place in duplicates.iter().filter_map(Error::place) {
        let file = objects.iter_mut().find(|file| file.source == place.source);
        file.into_iter().for_each(|file| file.remove(Spot { document: place.document, item: place.item }));
    }
    errors.extend(duplicates);
    let mut findings: Vec<Finding> = errors.iter().map(Finding::error).collect();
    let complete = findings.is_empty();
    let mut all: Vec<&mut Objects> = objects.iter_mut().collect();
    match Parts::default().anew(&mut all, Concerned::ALL, settings) {
        Ok(parts) => findings.extend(warnings(&parts.mesh(0), &objects, complete)),
        Err(error) => findings.push(Finding::error(&error)),
    }
    findings.sort_by(|a, b| {
        let place = |f: &Finding| (f.severity, f.file.clone(), f.document, f.item);
        place(a).cmp(&place(b))
    });
    Ok(findings)
}

fn warnings(mesh: &Mesh, objects: &[Objects], complete: bool) -> Vec<Finding> {
    let places = places(objects);
    let policies = mesh.policies.warnings().iter();
    // A pod that could not be read may be the one that a policy selects.
    let policies = policies.filter(|warning| complete || !warning.problem.depends_on_pods()).map(|warning| {
        let object = format!("{} {}", warning.kind, warning.policy);
        let severity = if warning.is_error() { Severity::Error } else { Severity::Warning };
        Finding::remark(severity, &places, object, warning.problem.field(), &warning.problem)
    });
    let others = mesh.warnings().iter().map(|warning| {
        let (object, field) = match warning {
            Warning::ClaimedAddress { newer, .. } => (format!("Pod {newer}"), "status.podIP"),
            Warning::SessionAffinity { service } => (format!("Service {service}"), "spec.sessionAffinity"),
        };
        Finding::remark(Severity::Warning, &places, object, field.to_owned(), warning)
    });
    policies.chain(others).collect()
}

/// Where each object that a warning can name was read.
fn places(objects: &[Objects]) -> HashMap<String, Place> {
    let of = |file: &Objects| {
        file.placed().map(|(kind, key, place)| (key.called(kind), place)).collect::<Vec<_>>()
    };
    objects.iter().flat_map(of).collect()
}

impl Finding {
    fn error(error: &Error) -> Self {
        let place = error.place();
        Self {
            severity: Severity::Error,
            file: place.map(|place| place.source.to_string()),
            document: place.and_then(|place| place.document),
            item: place.and_then(|place| place.item),
            object: error.object(),
            field: error.field(),
            message: error.to_string(),
        }
    }

    fn remark(
        severity: Severity,
        places: &HashMap<String, Place>,
        object: String,
        field: String,
        problem: &dyn fmt::Display,
    ) -> Self {
        let place = places.get(&object);
        let at = place.map(|place| format!("{place}: ")).unwrap_or_default();
        Self {
            severity,
            file: place.map(|place| place.source.to_string()),
            document: place.and_then(|place| place.document),
            item: place.and_then(|place| place.item),
            message: format!("{at}{object}: field {field}: {problem}"),
            object: Some(object),
            field: Some(field),
        }
    }
}
