//! Certificates of this node's identities: what they say, and whether a peer would believe it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use jiff::Timestamp;
use rustls_pki_types::CertificateDer;

use super::Inspection;
use crate::identity::{Certificate, Identity, IdentityStatus, SpiffeId};
use crate::mesh::Mesh;
use crate::observe::{CertificateRow, ChainRow, Filter, Listing, RevocationRow};

/// The name that a filter means is a pod's or a service account's.
pub(super) fn list(inspection: &Inspection, mesh: &Mesh, filter: &Filter) -> Listing<CertificateRow> {
    let mut users: HashMap<SpiffeId, Vec<String>> = HashMap::new();
    for workload in mesh.enrolled_on(&inspection.node) {
        users.entry(workload.identity.clone()).or_default().push(workload.key());
    }
    let mut found = inspection.identities.status();
    found.retain(|status| {
        let (namespace, account) = (status.id.namespace(), status.id.service_account());
        let pods = users.get(&status.id).into_iter().flatten();
        let mut pods = pods.filter_map(|key| key.split_once('/'));
        filter.wants(namespace, account) || pods.any(|(namespace, name)| filter.wants(namespace, name))
    });
    filter.page(found, |status| {
        let current = inspection.identities.current(&status.id);
        row(&status, current, users.remove(&status.id).unwrap_or_default())
    })
}

fn row(status: &IdentityStatus, current: Option<Arc<Identity>>, workloads: Vec<String>) -> CertificateRow {
    let (verifies, verdict) = verdict(current.as_deref(), status.last_error.as_deref());
    let now = SystemTime::now();
    let left = status.not_after.map(|end| end.duration_since(now).unwrap_or_default().as_secs());
    let rows = |certificates: &[CertificateDer<'_>]| certificates.iter().filter_map(chain_row).collect();
    CertificateRow {
        identity: status.id.to_string(),
        workloads,
        serial: status.serial.clone(),
        not_before: status.not_before.and_then(at),
        not_after: status.not_after.and_then(at),
        seconds_left: left,
        next_renewal: status.next_renewal.and_then(at),
        renewals: status.renewals,
        failures: status.failures,
        last_error: status.last_error.clone(),
        chain: current.as_ref().map(|identity| rows(&identity.svid.chain)).unwrap_or_default(),
        roots: current.as_ref().map(|identity| rows(&identity.bundle.roots)).unwrap_or_default(),
        revocation_lists: current.as_deref().map(RevocationRow::of).unwrap_or_default(),
        verifies,
        verdict,
    }
}

/// Whether the identity can prove itself now, and the words for it.
pub(super) fn verdict(current: Option<&Identity>, last_error: Option<&str>) -> (bool, String) {
    let Some(identity) = current else {
        let why = last_error.unwrap_or("the authority has not answered yet");
        return (false, format!("no certificate: {why}"));
    };
    match identity.verify() {
        Ok(()) => {
            let roots = identity.bundle.roots.len();
            let roots = if roots == 1 { "the root".to_owned() } else { format!("one of {roots} roots") };
            (true, format!("in its time, for its identity, and its chain leads to {roots} in force"))
        }
        Err(fault) => (false, fault.to_string()),
    }
}

fn chain_row(der: &CertificateDer<'_>) -> Option<ChainRow> {
    let parsed = Certificate::parse(der).ok()?;
    let (_, x509) = x509_parser::parse_x509_certificate(der).ok()?;
    Some(ChainRow {
        subject: x509.subject().to_string(),
        issuer: x509.issuer().to_string(),
        serial: parsed.serial,
        uris: parsed.uris,
        not_before: at(parsed.not_before)?,
        not_after: at(parsed.not_after)?,
    })
}

fn at(time: SystemTime) -> Option<Timestamp> {
    Timestamp::try_from(time).ok()
}
