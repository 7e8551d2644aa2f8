//! Services' ports and who is behind them, as rows.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::mesh::{Mesh, ServedPort, Workload};
use crate::observe::{EndpointRow, Filter, Listing, ServiceRow};

/// Endpoints that one row names.
const NAMED: usize = 100;

pub(super) fn list(mesh: &Mesh, node: &str, filter: &Filter) -> Listing<ServiceRow> {
    let mut found = mesh.service_ports();
    found.retain(|(service, _)| {
        let (namespace, name) = split(service);
        filter.wants(namespace, name)
    });
    let rows = filter.page(found, |(_, address)| mesh.served(address).map(|served| row(&served, node)));
    Listing { total: rows.total, items: rows.items.into_iter().flatten().collect() }
}

fn split(service: &str) -> (&str, &str) {
    service.split_once('/').unwrap_or(("", service))
}

fn row(served: &ServedPort, node: &str) -> ServiceRow {
    let ServedPort { service, address, endpoints, health } = served;
    let (namespace, name) = split(service);
    let rows = || endpoints.iter().map(|(address, workload)| endpoint(*address, workload.as_ref(), node));
    let in_use_mesh = rows().filter(|endpoint| endpoint.enrolled).count();
    let mesh = match (endpoints.len(), in_use_mesh) {
        (0, _) => "no_endpoints",
        (_, 0) => "none",
        (all, enrolled) if all == enrolled => "all",
        _ => "some",
    };
    ServiceRow {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        address: address.ip().to_string(),
        port: address.port(),
        mesh: mesh.to_owned(),
        in_use: endpoints.len(),
        in_use_local: rows().filter(|endpoint| endpoint.local).count(),
        in_use_mesh,
        ready: health.ready,
        draining: health.draining,
        not_ready: health.not_ready,
        endpoints: rows().take(NAMED).collect(),
    }
}

fn endpoint(address: SocketAddr, workload: Option<&Arc<Workload>>, node: &str) -> EndpointRow {
    let on = workload.and_then(|workload| workload.node.as_deref());
    EndpointRow {
        address: address.to_string(),
        workload: workload.map(|workload| workload.key()),
        node: on.map(str::to_owned),
        local: on == Some(node),
        enrolled: workload.is_some_and(|workload| workload.enrolled),
    }
}
