//! Peers that must be refused, each for its own reason, which both ends learn.

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use mtls::addr::OriginalSrc;
use mtls::identity::Identity;
use mtls::relay::{End, Progress, tunnelled};
use mtls::tunnel::{Acceptor, Config, Connector, Error, HandshakeFailure, Open};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::foreign::{self, FIN, Manners, data, open_frame};
use crate::world::{Agents, CLIENT, Ca, Leaf, SERVER, judging, listen, open_stream, soon};

const ELSEWHERE: &str = "spiffe://other.example/ns/shop/sa/db";

/// A server that handshakes once and waits for a request.
async fn serve_once(server: Arc<Identity>) -> (std::net::SocketAddr, JoinHandle<Option<Error>>) {
    let (listener, address) = listen().await;
    let serving = tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        match Acceptor::new(Arc::new(Config::default())).accept(tcp, &server).await {
            Err(error) => Some(error),
            Ok(mut tunnel) => tunnel.next().await.err(),
        }
    });
    (address, serving)
}

/// What both ends say went wrong.
async fn meet(client: Arc<Identity>, server: Arc<Identity>) -> [Option<HandshakeFailure>; 2] {
    let (address, serving) = serve_once(server).await;
    let (listener, app_address) = listen().await;
    let mut app = TcpStream::connect(app_address).await.unwrap();
    app.write_all(b"secret").await.unwrap();
    let (captured, source) = listener.accept().await.unwrap();
    let connector = Connector::new(Arc::new(Config::default()));
    let open = Open::new(([127, 0, 0, 1], 80).into(), OriginalSrc::new(source));
    let near = match soon(open_stream(&connector, &client, address, open)).await {
        Err(error) => error.handshake_failure(),
        Ok(mut stream) => {
            let progress = Progress::default();
            let relay = tunnelled(&captured, &mut stream, &progress, std::future::pending());
            match soon(relay).await.end {
                End::Tunnel(error) => error.handshake_failure(),
                other => panic!("the client's relay ended with {other:?}"),
            }
        }
    };
    assert_eq!(connector.idle(), 0);
    [near, soon(serving).await.unwrap().and_then(|error| error.handshake_failure())]
}

#[tokio::test]
async fn each_end_refuses_the_wrong_peer_and_both_know_why() {
    use HandshakeFailure::*;
    let (ca, stranger) = (Ca::new(), Ca::new());
    let client = || ca.identity(CLIENT);
    let server = || ca.identity(SERVER);
    let odd = |id, leaf| ca.identity_with(id, leaf, &[&ca]);
    let expired = Leaf { expired: true, ..Leaf::default() };
    let two = Leaf { second_uri: true, ..Leaf::default() };
    let usage = Leaf { wrong_usage: true, ..Leaf::default() };
    // Trusts us, but is signed by somebody we don't know.
    let unknown = |id| stranger.identity_with(id, Leaf::default(), &[&ca]);
    let (revoked, revoked_server) = (client(), server());
    let knowing = |identity: &Identity| judging(identity, &[&ca], ca.revoking(&[&revoked, &revoked_server]));
    let cases = [
        ("client of another trust domain", ca.identity(ELSEWHERE), server(), WrongTrustDomain),
        ("server of another trust domain", client(), ca.identity(ELSEWHERE), WrongTrustDomain),
        ("client of an unknown authority", unknown(CLIENT), server(), UnknownCa),
        ("server of an unknown authority", client(), unknown(SERVER), UnknownCa),
        ("expired client", odd(CLIENT, expired), server(), Expired),
        ("expired server", client(), odd(SERVER, expired), Expired),
        ("client with two SPIFFE IDs", odd(CLIENT, two), server(), WrongIdentity),
        ("server with two SPIFFE IDs", client(), odd(SERVER, two), WrongIdentity),
        ("client certificate for signing code", odd(CLIENT, usage), server(), WrongIdentity),
        ("server certificate for signing code", client(), odd(SERVER, usage), WrongIdentity),
        ("revoked client", revoked.clone(), knowing(&server()), Revoked),
        ("revoked server", knowing(&client()), revoked_server.clone(), Revoked),
        ("another workload than dialled", client(), ca.identity(CLIENT), WrongIdentity),
    ];
    for (name, client, server, failure) in cases {
        assert_eq!(meet(client, server).await, [Some(failure); 2], "{name}");
    }
}

#[tokio::test]
async fn the_right_peers_are_not_refused() {
    // Both roots are trusted during a rotation.
    let (old, new) = (Ca::new(), Ca::new());
    let both = [&old, &new];
    let client = old.identity_with(CLIENT, Leaf::default(), &both);
    let server = new.identity_with(SERVER, Leaf::default(), &both);
    let agents = Agents::start(client, server).await;
    let (mut near, mut far) = soon(agents.connect()).await;
    near.write_all(b"hi").await.unwrap();
    soon(far.read_exact(&mut [0; 2])).await.unwrap();
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let ca = Ca::new();
    let (address, serving) = serve_once(ca.identity(SERVER)).await;
    let manners = Manners { anonymous: true, ..Manners::default() };
    let mut tls = foreign::client(address, &ca.identity(CLIENT), manners).await.unwrap();
    let error = soon(tls.read(&mut [0; 8])).await.unwrap_err();
    assert!(error.to_string().contains("CertificateRequired"), "{error}");
    let error = soon(serving).await.unwrap().unwrap();
    assert_eq!(error.handshake_failure(), Some(HandshakeFailure::NoCertificate), "{error}");
}

#[tokio::test]
async fn a_peer_that_does_not_ask_for_our_protocol_is_refused() {
    let ca = Ca::new();
    let (address, serving) = serve_once(ca.identity(SERVER)).await;
    let manners = Manners { no_alpn: true, ..Manners::default() };
    let mut tls = foreign::client(address, &ca.identity(CLIENT), manners).await.unwrap();
    assert!(soon(tls.read(&mut [0; 8])).await.is_err());
    let error = soon(serving).await.unwrap().unwrap();
    assert_eq!(error.handshake_failure(), Some(HandshakeFailure::Protocol), "{error}");
}

#[tokio::test]
async fn garbage_instead_of_a_handshake_is_refused() {
    let ca = Ca::new();
    for garbage in [
        &b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..],
        &[22, 3, 1, 0xff, 0xff],
        &[0; 64],
        &[22, 3, 1, 0, 4, 1, 0, 0, 0],
    ] {
        let (address, serving) = serve_once(ca.identity(SERVER)).await;
        let mut tcp = TcpStream::connect(address).await.unwrap();
        tcp.write_all(garbage).await.unwrap();
        tcp.shutdown().await.unwrap();
        let error = soon(serving).await.unwrap().expect("garbage was accepted");
        assert!(matches!(error, Error::Handshake { .. } | Error::HandshakeCut), "{error}");
    }
}

#[tokio::test]
async fn a_peer_that_stalls_in_the_handshake_is_dropped() {
    let ca = Ca::new();
    let (listener, address) = listen().await;
    let tcp = TcpStream::connect(address).await.unwrap();
    let (accepted, _) = listener.accept().await.unwrap();
    let config = Config { handshake_timeout: Duration::from_millis(100), ..Config::default() };
    let accepting = Acceptor::new(Arc::new(config));
    let error = soon(accepting.accept(accepted, &ca.identity(SERVER))).await.err().unwrap();
    assert!(matches!(error, Error::HandshakeTimedOut { .. }), "{error}");
    drop(tcp);
}

/// Frames that an honest agent never sends end the tunnel by reset.
#[tokio::test]
async fn frames_out_of_order_reset_the_tunnel() {
    let ca = Ca::new();
    let client = ca.identity(CLIENT);
    let nowhere = open_frame(([127, 0, 0, 1], 9).into());
    let cases: [(&str, Vec<Vec<u8>>); 7] = [
        ("data before OPEN", vec![data(b"x")]),
        ("FIN before OPEN", vec![vec![FIN]]),
        ("a frame of no known type", vec![vec![77]]),
        ("a reserved frame", vec![vec![5]]),
        ("a cut OPEN", vec![nowhere[..9].to_vec()]),
        ("an OPEN with bytes left over", vec![[&nowhere[..], b"!"].concat()]),
        ("a REJECT from a client", vec![vec![4, 1, 0]]),
    ];
    for (name, frames) in cases {
        let (address, serving) = serve_once(ca.identity(SERVER)).await;
        let mut tls = foreign::client(address, &client, Manners::default()).await.unwrap();
        for frame in frames {
            tls.write_all(&frame).await.unwrap();
        }
        let error = soon(serving).await.unwrap().unwrap_or_else(|| panic!("{name} was accepted"));
        assert!(matches!(error, Error::Protocol(_)), "{name}: {error}");
        let (tcp, _) = tls.into_inner();
        let mut tcp = tcp;
        let error = soon(tcp.read_to_end(&mut Vec::new())).await.expect_err(name);
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{name}");
    }
}

/// An open stream through our server from a foreign client, to be mistreated.
async fn mistreated() -> (Agents, tokio_rustls::client::TlsStream<TcpStream>, TcpStream) {
    let ca = Ca::new();
    let client = ca.identity(CLIENT);
    let agents = Agents::start(client.clone(), ca.identity(SERVER)).await;
    let mut tls = foreign::client(agents.inbound, &client, Manners::default()).await.unwrap();
    tls.write_all(&open_frame(agents.destination())).await.unwrap();
    let (mut far, _) = soon(agents.application.accept()).await.unwrap();
    tls.write_all(&data(b"half a")).await.unwrap();
    let mut heard = [0; 6];
    soon(far.read_exact(&mut heard)).await.unwrap();
    assert_eq!(&heard, b"half a");
    (agents, tls, far)
}

async fn must_be_reset(mut far: TcpStream) {
    match soon(far.read(&mut [0; 64])).await {
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
        Ok(n) => panic!("the application got {n} bytes or an end, not a reset"),
    }
}

#[tokio::test]
async fn a_truncated_stream_is_a_reset_and_never_an_end() {
    // The TCP connection ends without a word.
    let (mut agents, tls, far) = mistreated().await;
    let (tcp, _) = tls.into_inner();
    drop(tcp);
    must_be_reset(far).await;
    let end = soon(agents.server_reports.recv()).await.unwrap().end;
    assert!(matches!(end, End::Truncated | End::PeerReset), "{end:?}");

    // With a proper close_notify, but without the stream's FIN.
    let (mut agents, mut tls, far) = mistreated().await;
    tls.shutdown().await.unwrap();
    must_be_reset(far).await;
    let end = soon(agents.server_reports.recv()).await.unwrap().end;
    assert!(matches!(end, End::Truncated), "{end:?}");
}

#[tokio::test]
async fn records_that_tls_does_not_allow_reset_the_stream() {
    let records: [(&str, &[u8]); 6] = [
        ("change_cipher_spec", &[20, 3, 3, 0, 1, 1]),
        ("a plaintext alert", &[21, 3, 3, 0, 2, 1, 0]),
        ("an oversized record", &[23, 3, 3, 0x41, 0x01]),
        ("a record too short for its tag", &[23, 3, 3, 0, 3, 1, 2, 3]),
        ("an unknown version", &[23, 2, 0, 0, 20]),
        (
            "a forged record",
            &[23, 3, 3, 0, 20, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20],
        ),
    ];
    for (name, record) in records {
        let (mut agents, tls, far) = mistreated().await;
        let (mut tcp, _) = tls.into_inner();
        tcp.write_all(record).await.unwrap();
        must_be_reset(far).await;
        let end = soon(agents.server_reports.recv()).await.unwrap().end;
        assert!(matches!(end, End::Tunnel(Error::Protocol(_))), "{name}: {end:?}");
    }
}

#[tokio::test]
async fn frames_after_the_end_reset_the_stream() {
    for late in [data(b"more"), vec![FIN], open_frame(([127, 0, 0, 1], 9).into())] {
        let (mut agents, mut tls, mut far) = mistreated().await;
        tls.write_all(&[FIN]).await.unwrap();
        assert_eq!(soon(far.read(&mut [0; 8])).await.unwrap(), 0);
        tls.write_all(&late).await.unwrap();
        let end = soon(agents.server_reports.recv()).await.unwrap().end;
        assert!(matches!(end, End::Tunnel(Error::Protocol(_))), "{end:?}");
    }
}
