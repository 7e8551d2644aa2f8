//! TLS as the library has it: tokio-rustls, its buffers, a handshake per connection, copied both ways.

use std::sync::Arc;

use rustls_pki_types::ServerName;
use tokio::io::copy_bidirectional;
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::{Carried, Ends, OnAccept, Technique, dial};
use crate::tunnel::TlsConfigs;

pub(super) static TECHNIQUE: Library = Library;

pub(super) struct Library;

impl Technique for Library {
    fn name(&self) -> &'static str {
        "TLS, library"
    }

    fn about(&self) -> &'static str {
        "two relays with tokio-rustls: its buffered records, a handshake per connection"
    }

    fn near(&self, ends: Arc<Ends>) -> OnAccept {
        let configs = TlsConfigs::default();
        Box::new(move |mut app: TcpStream| -> Carried {
            let configs = configs.of(&ends.credentials.near);
            let tunnel = ends.tunnel;
            Box::pin(async move {
                app.set_nodelay(true)?;
                let name = ServerName::IpAddress(tunnel.ip().into());
                let connector = TlsConnector::from(configs?.client.clone());
                let mut tls = connector.connect(name, dial(tunnel).await?).await?;
                copy_bidirectional(&mut app, &mut tls).await?;
                Ok(())
            })
        })
    }

    fn far(&self, ends: Arc<Ends>) -> OnAccept {
        let configs = TlsConfigs::default();
        Box::new(move |peer: TcpStream| -> Carried {
            let configs = configs.of(&ends.credentials.far);
            let server = ends.server;
            Box::pin(async move {
                peer.set_nodelay(true)?;
                let mut tls = TlsAcceptor::from(configs?.server.clone()).accept(peer).await?;
                let mut server = dial(server).await?;
                copy_bidirectional(&mut tls, &mut server).await?;
                Ok(())
            })
        })
    }
}
