//! The agent's own tunnel: records sealed and opened in place in this process, tunnels used again.

use std::sync::Arc;

use anyhow::bail;
use tokio::net::TcpStream;

use super::{Carried, Ends, OnAccept, Technique, dial, ended};
use crate::addr::OriginalSrc;
use crate::relay::{End, Progress, tunnelled};
use crate::tunnel::{Acceptor, Config, Connector, Open, Target};

pub(super) static TECHNIQUE: Userspace = Userspace;

pub(super) struct Userspace;

impl Technique for Userspace {
    fn name(&self) -> &'static str {
        "TLS, ours"
    }

    fn about(&self) -> &'static str {
        "two relays with the agent's tunnels: records in place, in userspace"
    }

    fn near(&self, ends: Arc<Ends>) -> OnAccept {
        near(ends, Config::default())
    }

    fn far(&self, ends: Arc<Ends>) -> OnAccept {
        far(ends, Config::default())
    }
}

pub(super) fn near(ends: Arc<Ends>, config: Config) -> OnAccept {
    let connector = Connector::new(Arc::new(config));
    Box::new(move |app: TcpStream| -> Carried {
        let (connector, ends) = (connector.clone(), ends.clone());
        Box::pin(async move {
            app.set_nodelay(true)?;
            let target = Target {
                identity: &ends.credentials.near,
                expected: &ends.credentials.far.svid.id,
                netns: 0,
                address: ends.tunnel,
            };
            let open = Open::new(ends.server, OriginalSrc::new(app.peer_addr()?));
            let dial = || {
                let domain = socket2::Domain::for_address(ends.tunnel);
                let socket = socket2::Socket::new(domain, socket2::Type::STREAM.nonblocking(), None)?;
                Ok(socket)
            };
            let mut stream = connector.open(target, open, dial).await?;
            let progress = Progress::default();
            let report = tunnelled(&app, &mut stream, &progress, std::future::pending()).await;
            drop((app, stream));
            ended(report.end)
        })
    })
}

pub(super) fn far(ends: Arc<Ends>, config: Config) -> OnAccept {
    let acceptor = Acceptor::new(Arc::new(config));
    Box::new(move |peer: TcpStream| -> Carried {
        let (acceptor, ends) = (acceptor.clone(), ends.clone());
        Box::pin(async move {
            let mut tunnel = acceptor.accept(peer, &ends.credentials.far).await?;
            while let Some(request) = tunnel.next().await? {
                let app = dial(request.open().destination).await?;
                let (_, stream) = request.accept();
                let report = tunnelled(&app, stream, &Progress::default(), std::future::pending()).await;
                if !matches!(report.end, End::Clean) {
                    bail!("{:?}", report.end);
                }
            }
            Ok(())
        })
    })
}
