//! Envoy's TCP proxy.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::Path;
use std::thread::available_parallelism;

use anyhow::Result;
use serde_json::{Value, json};

use super::{Leg, Proxy};

pub const PROXY: Proxy = Proxy { name: "envoy", command };

const TYPES: &str = "type.googleapis.com/envoy.extensions";

fn command(program: &Path, leg: &Leg) -> Result<Vec<OsString>> {
    let mut chain = json!({ "filters": [{
        "name": "envoy.filters.network.tcp_proxy",
        "typed_config": {
            "@type": format!("{TYPES}.filters.network.tcp_proxy.v3.TcpProxy"),
            "stat_prefix": "way", "cluster": "other", "idle_timeout": "3600s",
        },
    }] });
    let limits = json!({ "max_connections": 100_000, "max_pending_requests": 100_000 });
    let mut cluster = json!({
        "name": "other", "type": "STATIC", "connect_timeout": "5s",
        "circuit_breakers": { "thresholds": [limits] },
        "load_assignment": { "cluster_name": "other", "endpoints": [{ "lb_endpoints": [
            { "endpoint": { "address": address(leg.connect) } }
        ] }] },
    });
    match leg.dials_tls() {
        true => cluster["transport_socket"] = tls(leg, "UpstreamTlsContext"),
        false => chain["transport_socket"] = tls(leg, "DownstreamTlsContext"),
    }
    let bootstrap = json!({ "static_resources": {
        "listeners": [{ "address": address(leg.accept), "filter_chains": [chain] }],
        "clusters": [cluster],
    } });
    let file = leg.write("envoy.json", &bootstrap.to_string())?;
    let threads = available_parallelism()?.to_string();
    let flags = ["--concurrency", &threads, "--log-level", "error", "--disable-hot-restart", "-c"];
    let mut command = vec![OsString::from(program)];
    command.extend(flags.map(OsString::from));
    command.push(file.into());
    Ok(command)
}

fn address(address: SocketAddr) -> Value {
    json!({ "socket_address": { "address": address.ip(), "port_value": address.port() } })
}

fn tls(leg: &Leg, context: &str) -> Value {
    let mut config = json!({
        "@type": format!("{TYPES}.transport_sockets.tls.v3.{context}"),
        "common_tls_context": {
            "tls_params": { "tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3" },
            "tls_certificates": [{
                "certificate_chain": { "filename": leg.credentials.chain },
                "private_key": { "filename": leg.credentials.key },
            }],
            "validation_context": { "trusted_ca": { "filename": leg.root } },
        },
    });
    if !leg.dials_tls() {
        config["require_client_certificate"] = true.into();
    }
    json!({ "name": "envoy.transport_sockets.tls", "typed_config": config })
}
