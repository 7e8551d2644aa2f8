//! Our record layer against others': rustls and OpenSSL at the other end of the wire.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

use mtls::addr::OriginalSrc;
use mtls::relay::{End, Progress, tunnelled};
use mtls::tunnel::{Config, Connector, Open};
use rustls::crypto::aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::foreign::{self, FIN, Manners, data, open_frame};
use crate::world::{Agents, CLIENT, Ca, SERVER, alone, listen, open_stream, soon};

#[tokio::test]
async fn a_rustls_client_is_understood_across_key_updates() {
    for suite in [None, Some(TLS13_CHACHA20_POLY1305_SHA256)] {
        let ca = Ca::new();
        let client = ca.identity(CLIENT);
        let mut agents = Agents::start(client.clone(), ca.identity(SERVER)).await;
        let manners = Manners { suite, ..Manners::default() };
        let mut tls = foreign::client(agents.inbound, &client, manners).await.unwrap();
        tls.write_all(&open_frame(agents.destination())).await.unwrap();
        let (mut far, _) = soon(agents.application.accept()).await.unwrap();
        for round in 0..5u8 {
            // rustls asks for ours in return.
            tls.get_mut().1.refresh_traffic_keys().unwrap();
            tls.write_all(&data(&[round; 3000])).await.unwrap();
            let mut heard = [0; 3000];
            soon(far.read_exact(&mut heard)).await.unwrap();
            assert_eq!(heard, [round; 3000]);
            far.write_all(&[round; 100]).await.unwrap();
            let mut answer = [0; 101];
            soon(tls.read_exact(&mut answer)).await.unwrap();
            assert_eq!(answer[..], data(&[round; 100])[..]);
        }
        tls.write_all(&[FIN]).await.unwrap();
        assert_eq!(soon(far.read(&mut [0; 8])).await.unwrap(), 0);
        drop(far);
        let mut fin = [0; 1];
        soon(tls.read_exact(&mut fin)).await.unwrap();
        assert_eq!(fin, [FIN]);
        let report = soon(agents.server_reports.recv()).await.unwrap();
        assert!(matches!(report.end, End::Clean), "{:?}", report.end);
        assert_eq!((report.sent, report.received), (15_000, 500));
    }
}

#[tokio::test]
async fn a_rustls_server_understands_us_across_our_key_updates() {
    let ca = Ca::new();
    let (client, server) = (ca.identity(CLIENT), ca.identity(SERVER));
    let (listener, address) = listen().await;
    // A key for every two records or so.
    let connector = Connector::new(std::sync::Arc::new(Config { rekey_after: 2, ..Config::default() }));
    let (captured_at, captured_address) = listen().await;
    let mut app = TcpStream::connect(captured_address).await.unwrap();
    let (captured, source) = captured_at.accept().await.unwrap();
    let open = Open::new(([127, 0, 0, 1], 80).into(), OriginalSrc::new(source));
    let serving = tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        foreign::server(tcp, &server).await.unwrap()
    });
    let mut stream = open_stream(&connector, &client, address, open).await.unwrap();
    let relay = tokio::spawn(async move {
        let progress = Progress::default();
        tunnelled(&captured, &mut stream, &progress, std::future::pending()).await.end
    });
    let mut tls = soon(serving).await.unwrap();
    let mut open = [0; 17];
    soon(tls.read_exact(&mut open)).await.unwrap();
    assert_eq!(open[..9], [1, 1, 4, 127, 0, 0, 1, 0, 80]);
    for round in 0..20u8 {
        app.write_all(&[round; 500]).await.unwrap();
        let mut heard = [0; 501];
        soon(tls.read_exact(&mut heard)).await.unwrap();
        assert_eq!(heard[..], data(&[round; 500])[..]);
        if round % 3 == 0 {
            tls.get_mut().1.refresh_traffic_keys().unwrap();
        }
        tls.write_all(&data(&[round; 7])).await.unwrap();
        let mut answer = [0; 7];
        soon(app.read_exact(&mut answer)).await.unwrap();
        assert_eq!(answer, [round; 7]);
    }
    tls.write_all(&[FIN]).await.unwrap();
    drop(app);
    let mut fin = [0; 1];
    soon(tls.read_exact(&mut fin)).await.unwrap();
    assert_eq!(fin, [FIN]);
    assert!(matches!(soon(relay).await.unwrap(), End::Clean));
}

#[tokio::test]
async fn keys_change_under_way_between_our_own() {
    let ca = Ca::new();
    let often = || Config { rekey_after: 40, ..alone() };
    let agents = Agents::start_with(ca.identity(CLIENT), ca.identity(SERVER), often(), often()).await;
    let (near, far) = soon(agents.connect()).await;
    let block: Vec<u8> = (0..20_000_000u32).map(|i| (i % 251) as u8).collect();
    for (mut from, mut to) in [(near, far)] {
        let sent = block.clone();
        let writing = tokio::spawn(async move {
            from.write_all(&sent).await.unwrap();
            from.shutdown().await.unwrap();
            let mut back = Vec::new();
            from.read_to_end(&mut back).await.unwrap();
            back
        });
        let mut heard = Vec::new();
        soon(to.read_to_end(&mut heard)).await.unwrap();
        assert!(heard == block);
        to.write_all(&heard).await.unwrap();
        drop(to);
        assert!(soon(writing).await.unwrap() == block);
    }
}

fn openssl(agents: &Agents, more: &[&str]) -> Command {
    let mut command = Command::new("openssl");
    command.args(["s_client", "-connect", &agents.inbound.to_string(), "-alpn", "mtls/1"]).args(more);
    command
}

/// OpenSSL pads its records and sends frames that we take apart.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn openssl_with_padded_records_is_understood() {
    let ca = Ca::new();
    let client = ca.identity(CLIENT);
    let agents = Agents::start(client.clone(), ca.identity(SERVER)).await;
    let dir = tempfile::tempdir().unwrap();
    let (cert, key) = (dir.path().join("cert.der"), dir.path().join("key.der"));
    std::fs::write(&cert, &client.svid.chain[0]).unwrap();
    std::fs::write(&key, client.svid.key.secret_pkcs8_der()).unwrap();
    let mut child =
        openssl(&agents, &["-quiet", "-record_padding", "1000", "-certform", "DER", "-keyform", "DER"])
            .arg("-cert")
            .arg(&cert)
            .arg("-key")
            .arg(&key)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(&open_frame(agents.destination())).unwrap();
    let (mut far, _) = soon(agents.application.accept()).await.unwrap();
    stdin.write_all(&data(b"from openssl")).unwrap();
    let mut heard = [0; 12];
    soon(far.read_exact(&mut heard)).await.unwrap();
    assert_eq!(&heard, b"from openssl");
    far.write_all(b"to openssl").await.unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let answer = tokio::task::spawn_blocking(move || {
        let mut answer = [0; 11];
        std::io::Read::read_exact(&mut stdout, &mut answer).unwrap();
        answer
    });
    assert_eq!(soon(answer).await.unwrap()[..], data(b"to openssl")[..]);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn openssl_sees_tls_1_3_and_is_refused_without_a_certificate() {
    let ca = Ca::new();
    let agents = Agents::start(ca.identity(CLIENT), ca.identity(SERVER)).await;
    let run = |more: &'static [&'static str]| {
        let mut command = openssl(&agents, more);
        tokio::task::spawn_blocking(move || {
            let child =
                command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
            // Its input stays open, so that only the server can end it.
            let input = child.stdin.as_ref().map(|_| ());
            let output = child.wait_with_output().unwrap();
            let _ = input;
            [output.stdout, output.stderr].concat()
        })
    };
    let said = String::from_utf8_lossy(&soon(run(&["-ign_eof"])).await.unwrap()).into_owned();
    assert!(said.contains("TLSv1.3"), "{said}");
    assert!(said.contains("certificate required"), "{said}");
    let said = String::from_utf8_lossy(&soon(run(&["-tls1_2"])).await.unwrap()).into_owned();
    assert!(said.contains("protocol version") || said.contains("handshake failure"), "{said}");
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(agents.handshakes(), 0);
}
