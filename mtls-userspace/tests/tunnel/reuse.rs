//! Tunnels are used again when they may be, and never when they may not; sessions resume within one identity version.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use mtls::addr::OriginalSrc;
use mtls::identity::Identity;
use mtls::relay::{End, Progress, tunnelled};
use mtls::tunnel::{Acceptor, Config, Connector, Open, RejectReason};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::world::{Agents, CLIENT, Ca, DENIED_PORT, SERVER, alone, eventually, listen, open_stream, soon};

/// One whole exchange, both directions ended.
async fn exchange(agents: &Agents) {
    let (mut near, mut far) = soon(agents.connect()).await;
    near.write_all(b"ping").await.unwrap();
    near.shutdown().await.unwrap();
    let mut heard = Vec::new();
    soon(far.read_to_end(&mut heard)).await.unwrap();
    far.write_all(b"pong").await.unwrap();
    drop(far);
    let mut answer = Vec::new();
    soon(near.read_to_end(&mut answer)).await.unwrap();
    assert_eq!((&heard[..], &answer[..]), (&b"ping"[..], &b"pong"[..]));
}

#[tokio::test]
async fn connections_one_after_the_other_share_a_tunnel() {
    let ca = Ca::new();
    let agents = Agents::start(ca.identity(CLIENT), ca.identity(SERVER)).await;
    for _ in 0..20 {
        exchange(&agents).await;
        agents.idle(1).await;
    }
    assert_eq!(agents.handshakes(), 1);
}

/// Every connection's task holds these while it waits.
#[tokio::test]
async fn waiting_for_a_stream_costs_little() {
    let ca = Ca::new();
    let (client, server) = (ca.identity(CLIENT), ca.identity(SERVER));
    let config = std::sync::Arc::new(Config::default());
    let connector = Connector::new(config.clone());
    let (listener, address) = listen().await;
    let open = Open::new(address, OriginalSrc::new(address));
    let opening = open_stream(&connector, &client, address, open);
    assert!(size_of_val(&opening) <= 1000, "{}", size_of_val(&opening));
    let accepting = async {
        let (tcp, _) = listener.accept().await.unwrap();
        Acceptor::new(config).accept(tcp, &server).await.unwrap()
    };
    let (stream, mut tunnel) = tokio::join!(opening, accepting);
    stream.unwrap();
    let next = tunnel.ask();
    assert!(size_of_val(&next) <= 560, "{}", size_of_val(&next));
}

#[tokio::test]
async fn a_tunnel_in_use_is_not_shared() {
    let ca = Ca::new();
    let agents = Agents::start(ca.identity(CLIENT), ca.identity(SERVER)).await;
    let _open = soon(agents.connect()).await;
    exchange(&agents).await;
    assert_eq!(agents.handshakes(), 2);
}

#[tokio::test]
async fn an_aborted_stream_takes_its_tunnel_with_it() {
    let ca = Ca::new();
    let mut agents = Agents::start(ca.identity(CLIENT), ca.identity(SERVER)).await;
    let (near, _far) = soon(agents.connect()).await;
    near.set_zero_linger().unwrap();
    drop(near);
    soon(agents.client_reports.recv()).await.unwrap();
    exchange(&agents).await;
    assert_eq!(agents.handshakes(), 2);
}

#[tokio::test]
async fn a_tunnel_the_server_closed_is_not_taken() {
    let ca = Ca::new();
    let agents = Agents::start(ca.identity(CLIENT), ca.identity(SERVER)).await;
    exchange(&agents).await;
    agents.idle(1).await;
    agents.drain.notify_waiters();
    tokio::time::sleep(Duration::from_millis(50)).await;
    exchange(&agents).await;
    assert_eq!(agents.handshakes(), 2);
}

/// The server's word and the client's next stream cross on their way.
#[tokio::test]
async fn no_stream_is_lost_on_a_tunnel_that_is_just_being_closed() {
    let ca = Ca::new();
    let agents = Agents::start(ca.identity(CLIENT), ca.identity(SERVER)).await;
    for round in 0..100 {
        exchange(&agents).await;
        agents.idle(1).await;
        let drain = async {
            for _ in 0..round % 20 {
                tokio::task::yield_now().await;
            }
            agents.drain.notify_waiters();
        };
        tokio::join!(exchange(&agents), drain);
    }
    let made = agents.handshakes();
    assert!((50..=201).contains(&made), "{made}");
}

#[tokio::test]
async fn idle_tunnels_end_after_their_time_at_either_side() {
    let ca = Ca::new();
    let short = || Config { idle_client: Duration::from_millis(100), ..alone() };
    let agents =
        Agents::start_with(ca.identity(CLIENT), ca.identity(SERVER), short(), Config::default()).await;
    exchange(&agents).await;
    agents.idle(1).await;
    agents.idle(0).await;

    let short = || Config { idle_server: Duration::from_millis(100), ..Config::default() };
    let agents = Agents::start_with(ca.identity(CLIENT), ca.identity(SERVER), alone(), short()).await;
    exchange(&agents).await;
    agents.idle(1).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    exchange(&agents).await;
    assert_eq!(agents.handshakes(), 2);
}

/// A stream to `port` that ends as soon as the far side says so.
async fn ask(agents: &Agents, client: &Arc<Identity>, port: u16) -> (End, bool) {
    let (listener, address) = listen().await;
    let mut app = TcpStream::connect(address).await.unwrap();
    let (captured, source) = listener.accept().await.unwrap();
    app.write_all(b"hello").await.unwrap();
    let open = Open::new(([127, 0, 0, 1], port).into(), OriginalSrc::new(source));
    let mut stream = open_stream(&agents.connector, client, agents.inbound, open).await.unwrap();
    let reused = stream.reused();
    let progress = Progress::default();
    let report = soon(tunnelled(&captured, &mut stream, &progress, std::future::pending())).await;
    drop((captured, stream));
    let error = soon(app.read(&mut [0; 8])).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    (report.end, reused)
}

#[tokio::test]
async fn a_rejected_stream_says_why_and_leaves_the_tunnel_usable() {
    let ca = Ca::new();
    let client = ca.identity(CLIENT);
    let agents = Agents::start(client.clone(), ca.identity(SERVER)).await;
    for round in 0..3 {
        let (end, reused) = ask(&agents, &client, DENIED_PORT).await;
        let End::Rejected(rejection) = end else { panic!("{end:?}") };
        assert_eq!(rejection.reason, RejectReason::Denied);
        assert_eq!(&*rejection.detail, "shop/only-front");
        assert_eq!(reused, round > 0);
    }
    exchange(&agents).await;
    assert_eq!(agents.handshakes(), 1);
}

#[tokio::test]
async fn a_closed_port_is_reported_and_resets_the_application() {
    let ca = Ca::new();
    let client = ca.identity(CLIENT);
    let agents = Agents::start(client.clone(), ca.identity(SERVER)).await;
    let (closed, address) = listen().await;
    drop(closed);
    let (end, _) = ask(&agents, &client, address.port()).await;
    let End::Rejected(rejection) = end else { panic!("{end:?}") };
    assert_eq!(rejection.reason, RejectReason::ConnectionRefused);
}

/// A stream to the echo of one byte, so that a ticket has surely been read.
async fn visit(agents: &Agents, client: &Arc<Identity>) -> bool {
    let (listener, address) = listen().await;
    let mut app = TcpStream::connect(address).await.unwrap();
    let (captured, source) = listener.accept().await.unwrap();
    let open = Open::new(agents.destination(), OriginalSrc::new(source));
    let mut stream = open_stream(&agents.connector, client, agents.inbound, open).await.unwrap();
    let resumed = stream.resumed();
    let relay = tokio::spawn(async move {
        let _ = tunnelled(&captured, &mut stream, &Progress::default(), std::future::pending()).await;
    });
    let (mut far, _) = soon(agents.application.accept()).await.unwrap();
    far.write_all(b"x").await.unwrap();
    soon(app.read_exact(&mut [0])).await.unwrap();
    drop((app, far));
    soon(relay).await.unwrap();
    resumed
}

#[tokio::test]
async fn sessions_resume_until_either_identity_version_ends() {
    let ca = Ca::new();
    let client = ca.identity(CLIENT);
    let none = || Config { idle_total: 0, ..alone() };
    let agents = Agents::start_with(client.clone(), ca.identity(SERVER), none(), Config::default()).await;
    assert!(!visit(&agents, &client).await);
    assert!(visit(&agents, &client).await);
    assert!(visit(&agents, &client).await);
    eventually(|| agents.resumptions.load(Ordering::Relaxed) == 2).await;
    let renewed = ca.identity(CLIENT);
    assert!(!visit(&agents, &renewed).await);
    assert!(visit(&agents, &renewed).await);
}

#[tokio::test]
async fn a_superseded_identity_keeps_its_streams_but_its_tunnels_are_not_reused() {
    let ca = Ca::new();
    let client = ca.identity(CLIENT);
    let agents = Agents::start(client.clone(), ca.identity(SERVER)).await;
    let (mut near, mut far) = soon(agents.connect()).await;
    visit(&agents, &client).await;
    agents.idle(1).await;
    let renewed = ca.identity(CLIENT);
    visit(&agents, &renewed).await;
    assert_eq!(agents.handshakes(), 3);
    // The old version's idle tunnel is gone, the new one's is there.
    agents.idle(1).await;
    near.write_all(b"on").await.unwrap();
    soon(far.read_exact(&mut [0; 2])).await.unwrap();
    drop((near, far));
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(agents.connector.idle(), 1);
}
