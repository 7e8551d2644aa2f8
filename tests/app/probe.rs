//! Probes as kubelet makes them, and a server that answers all three kinds on one port each.
//!
//! HTTP: a GET that is answered 200. TCP: a connection. gRPC: `grpc.health.v1.Health/Check` that says SERVING.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde_json::json;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Endpoint, Server};
use tonic::{Request, Response, Status};

use crate::report;

mod wire {
    tonic::include_proto!("grpc.health.v1");
}

use wire::health_check_response::ServingStatus;
use wire::health_client::HealthClient;
use wire::health_server::{Health, HealthServer};
use wire::{HealthCheckRequest, HealthCheckResponse};

/// kubelet's default is a second; a loaded machine is not what is tested.
const LIMIT: Duration = Duration::from_secs(5);

#[derive(clap::Args)]
pub struct ProbeServe {
    #[arg(long)]
    http: SocketAddr,
    #[arg(long)]
    grpc: SocketAddr,
}

#[derive(clap::Args)]
pub struct Probe {
    kind: Kind,
    to: SocketAddr,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Kind {
    Http,
    Tcp,
    Grpc,
}

struct Healthy;

#[tonic::async_trait]
impl Health for Healthy {
    async fn check(&self, _: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        Ok(Response::new(HealthCheckResponse { status: ServingStatus::Serving.into() }))
    }
}

impl ProbeServe {
    pub fn run(self) -> Result<()> {
        let http = TcpListener::bind(self.http).with_context(|| format!("listen on {}", self.http))?;
        std::thread::spawn(move || http.incoming().flatten().for_each(|stream| drop(answer(stream))));
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
            let grpc = tokio::net::TcpListener::bind(self.grpc).await;
            let grpc = grpc.with_context(|| format!("listen on {}", self.grpc))?;
            report(&json!({ "listening": grpc.local_addr()? }));
            let incoming = TcpListenerStream::new(grpc);
            Server::builder().add_service(HealthServer::new(Healthy)).serve_with_incoming(incoming).await?;
            Ok(())
        })
    }
}

fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_read_timeout(Some(LIMIT))?;
    // What was not read when the connection is closed would turn the answer into a reset.
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        let mut buffer = [0; 4096];
        match stream.read(&mut buffer)? {
            0 => break,
            read => request.extend(buffer.iter().take(read)),
        }
    }
    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
}

impl Probe {
    /// Reports whether the probe succeeds, and if not why.
    pub fn run(self) -> Result<()> {
        let outcome = match self.kind {
            Kind::Tcp => TcpStream::connect_timeout(&self.to, LIMIT).map(drop).map_err(Into::into),
            Kind::Http => self.http(),
            Kind::Grpc => self.grpc(),
        };
        let why = outcome.as_ref().err().map(|error| format!("{error:#}"));
        report(&json!({ "healthy": outcome.is_ok(), "why": why }));
        Ok(())
    }

    fn http(&self) -> Result<()> {
        let mut stream = TcpStream::connect_timeout(&self.to, LIMIT)?;
        stream.set_read_timeout(Some(LIMIT))?;
        write!(stream, "GET /healthz HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", self.to)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        anyhow::ensure!(answer.starts_with("HTTP/1.1 200"), "{answer:?}");
        Ok(())
    }

    fn grpc(&self) -> Result<()> {
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
            let endpoint =
                Endpoint::from_shared(format!("http://{}", self.to))?.connect_timeout(LIMIT).timeout(LIMIT);
            let mut client = HealthClient::new(endpoint.connect().await?);
            let answer = client.check(HealthCheckRequest::default()).await?.into_inner();
            anyhow::ensure!(answer.status() == ServingStatus::Serving, "{answer:?}");
            Ok(())
        })
    }
}
