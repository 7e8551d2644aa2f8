//! Trust that ends while tunnels are open: a certificate is revoked, a root is removed, a certificate runs out.

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use mtls::addr::OriginalSrc;
use mtls::identity::{Identity, Revocations};
use mtls::relay::End;
use mtls::tunnel::{Acceptor, Config, Connector, HandshakeFailure, Open};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::world::{Agents, CLIENT, Ca, Leaf, SERVER, eventually, judging, listen, open_stream, soon};

type Pair = (TcpStream, TcpStream);

async fn speaks((near, far): &mut Pair) {
    near.write_all(b"ping").await.unwrap();
    let mut heard = [0; 4];
    soon(far.read_exact(&mut heard)).await.unwrap();
    assert_eq!(&heard, b"ping");
}

/// A clean exchange, after which the tunnel is idle.
async fn come_and_go(agents: &Agents) {
    let (mut near, mut far) = soon(agents.connect()).await;
    near.write_all(b"ping").await.unwrap();
    near.shutdown().await.unwrap();
    soon(far.read_to_end(&mut Vec::new())).await.unwrap();
    drop(far);
    soon(near.read_to_end(&mut Vec::new())).await.unwrap();
    eventually(|| agents.connector.idle() > 0).await;
}

async fn is_reset((near, far): &mut Pair) {
    for end in [near, far] {
        let error = soon(end.read(&mut [0; 8])).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
}

async fn is_refused(agents: &Agents) {
    let mut app = TcpStream::connect(agents.outbound).await.unwrap();
    let _ = app.write_all(b"ping").await;
    let error = soon(app.read(&mut [0; 8])).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

/// One connection that is open, and one idle tunnel.
async fn busy_and_idle(agents: &Agents) -> Pair {
    let mut open = soon(agents.connect()).await;
    speaks(&mut open).await;
    come_and_go(agents).await;
    assert_eq!((agents.handshakes(), agents.connector.idle()), (2, 1));
    open
}

#[tokio::test]
async fn tunnels_to_a_revoked_server_are_reset_at_once_idle_or_in_use() {
    let ca = Ca::new();
    let (client, server, other) = (ca.identity(CLIENT), ca.identity(SERVER), ca.identity(SERVER));
    let mut agents = Agents::start(client.clone(), server.clone()).await;
    let mut open = busy_and_idle(&agents).await;

    // A list without this server changes nothing.
    agents.client_config.trust(&judging(&client, &[&ca], ca.revoking(&[&other]))).unwrap();
    speaks(&mut open).await;
    assert_eq!(agents.connector.idle(), 1);

    agents.client_config.trust(&judging(&client, &[&ca], ca.revoking(&[&server]))).unwrap();
    assert_eq!(agents.connector.idle(), 0);
    is_reset(&mut open).await;
    let report = soon(agents.client_reports.recv()).await.unwrap();
    assert!(matches!(report.end, End::Clean), "the one that came and went: {report:?}");
    let report = soon(agents.client_reports.recv()).await.unwrap();
    assert!(matches!(report.end, End::Revoked), "{report:?}");
}

#[tokio::test]
async fn tunnels_of_a_revoked_client_are_reset_at_once_idle_or_in_use() {
    let ca = Ca::new();
    let (client, server) = (ca.identity(CLIENT), ca.identity(SERVER));
    let agents = Agents::start(client.clone(), server.clone()).await;
    let mut open = busy_and_idle(&agents).await;
    agents.server_config.trust(&judging(&server, &[&ca], ca.revoking(&[&client]))).unwrap();
    is_reset(&mut open).await;
    // The idle tunnel is dead, and no other is to be had.
    is_refused(&agents).await;
    assert_eq!((agents.handshakes(), agents.connector.idle()), (2, 0));
}

#[tokio::test]
async fn a_removed_root_ends_tunnels_to_peers_that_only_it_vouched_for() {
    let (old, new) = (Ca::new(), Ca::new());
    let both = [&old, &new];
    for (signer, lives) in [(&old, false), (&new, true)] {
        let client = new.identity_with(CLIENT, Leaf::default(), &both);
        let server = signer.identity_with(SERVER, Leaf::default(), &both);
        let agents = Agents::start(client.clone(), server).await;
        let mut open = busy_and_idle(&agents).await;
        agents.client_config.trust(&judging(&client, &[&new], Revocations::default())).unwrap();
        if lives {
            speaks(&mut open).await;
        } else {
            is_reset(&mut open).await;
        }
        assert_eq!(agents.connector.idle(), usize::from(lives));
    }
}

#[tokio::test]
async fn an_expired_peer_keeps_the_stream_it_has_and_gets_no_other() {
    let ca = Ca::new();
    let short = Leaf { seconds: 3, ..Leaf::default() };
    for brief in [CLIENT, SERVER] {
        let identity = |id| ca.identity_with(id, if id == brief { short } else { Leaf::default() }, &[&ca]);
        let (client, server) = (identity(CLIENT), identity(SERVER));
        let mut agents = Agents::start(client, server).await;
        let mut open = busy_and_idle(&agents).await;
        assert!(matches!(soon(agents.client_reports.recv()).await.unwrap().end, End::Clean));
        tokio::time::sleep(Duration::from_millis(4500)).await;
        speaks(&mut open).await;
        is_refused(&agents).await;
        assert_eq!(agents.connector.idle(), 0);
        speaks(&mut open).await;
    }
}

/// The certificate is revoked between the moment that a handshake's configuration is chosen and its end.
#[tokio::test]
async fn a_handshake_under_way_when_its_peer_is_revoked_fails() {
    let ca = Ca::new();
    let (client, server) = (ca.identity(CLIENT), ca.identity(SERVER));
    let config = Arc::new(Config::default());
    let accept = async |identity: Arc<Identity>| {
        let (listener, address) = listen().await;
        let connector = Connector::new(Arc::default());
        let open = Open::new(address, OriginalSrc::new(address));
        let accepting = async {
            let (tcp, _) = listener.accept().await.unwrap();
            Acceptor::new(config.clone()).accept(tcp, &identity).await.err()
        };
        let (_, refused) = tokio::join!(open_stream(&connector, &client, address, open), accepting);
        refused.map(|error| error.handshake_failure())
    };
    assert_eq!(accept(server.clone()).await, None);
    config.trust(&judging(&server, &[&ca], ca.revoking(&[&client]))).unwrap();
    assert_eq!(accept(server.clone()).await, Some(Some(HandshakeFailure::Revoked)));
    // Released again, as after a hold.
    let released = judging(&server, &[&ca], ca.revoking(&[]));
    config.trust(&released).unwrap();
    assert_eq!(accept(released).await, None);
}
