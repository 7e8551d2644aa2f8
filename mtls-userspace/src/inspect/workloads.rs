//! Pods of the mesh's view, as rows.

use std::sync::Arc;

use super::Inspection;
use crate::mesh::{Mesh, Workload};
use crate::observe::{Filter, Listing, ModesRow, WorkloadRow, controller};
use crate::policy::{Mode, PortModes};

pub(super) fn list(inspection: &Inspection, mesh: &Mesh, filter: &Filter) -> Listing<WorkloadRow> {
    let wanted = |workload: &&Arc<Workload>| filter.wants(&workload.namespace, &workload.name);
    let mut found: Vec<_> = mesh.workloads.iter().filter(wanted).collect();
    found.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    filter.page(found, |workload| row(inspection, mesh, workload))
}

fn row(inspection: &Inspection, mesh: &Mesh, workload: &Workload) -> WorkloadRow {
    let local = inspection.is_local(workload);
    let modes = workload.enrolled.then(|| mesh.policies.modes(workload));
    let speaks = modes.as_ref().is_some_and(|modes| {
        modes.default != Mode::Disable || modes.ports.values().any(|mode| *mode != Mode::Disable)
    });
    WorkloadRow {
        namespace: workload.namespace.to_string(),
        name: workload.name.to_string(),
        controller: controller(workload).to_owned(),
        service_account: workload.service_account.to_string(),
        node: workload.node.as_deref().map(str::to_owned),
        local,
        addresses: workload.addresses.iter().map(ToString::to_string).collect(),
        enrolled: workload.enrolled,
        identity: workload.enrolled.then(|| workload.identity.to_string()),
        protocol: if speaks { "mtls" } else { "none" }.to_owned(),
        modes: modes.map(|modes| modes_row(modes, mesh.policies.dry_run_modes(workload))),
        enrolment: if local && workload.enrolled { inspection.enrolment(workload) } else { None },
    }
}

fn modes_row(modes: PortModes, dry_run: Option<PortModes>) -> ModesRow {
    ModesRow {
        default: modes.default.to_string(),
        ports: modes.ports.into_iter().map(|(port, mode)| (port, mode.to_string())).collect(),
        authorization: modes.judged,
        dry_run: dry_run.map(|modes| PortModes { judged: false, ..modes }.to_string()),
    }
}
