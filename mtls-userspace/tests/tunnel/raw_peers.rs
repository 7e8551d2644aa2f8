//! Raw streams with peers that are not ours: what they may do is understood, what they may not ends in a reset, and
//! nothing cut short looks complete. Each with records in userspace and, where the kernel has TLS, in the kernel.

use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use mtls::identity::Identity;
use mtls::relay::{End, Records};
use mtls::tunnel::{Config, ContentType};
use rustls::crypto::aws_lc_rs::cipher_suite::{
    TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use crate::foreign::{self, ByHand, Manners, RAW, data, open_frame};
use crate::raw::{kernel, rekeys, suites};
use crate::resets::must_be_reset;
use crate::world::{Agents, CLIENT, Ca, SERVER, eventually, soon};

const CLOSE_NOTIFY: [u8; 2] = [1, 0];
const KEY_UPDATE: [u8; 5] = [24, 0, 0, 1, 0];

/// Server agents whose records are in userspace and, if there, in the kernel.
async fn servers() -> Vec<(Agents, Arc<Identity>, bool)> {
    let mut servers = Vec::new();
    for in_kernel in [false, true] {
        if in_kernel && !kernel() {
            continue;
        }
        let (agents, client) = server(in_kernel, rekeys()).await;
        servers.push((agents, client, in_kernel));
    }
    servers
}

async fn server(in_kernel: bool, kernel_rekey: bool) -> (Agents, Arc<Identity>) {
    let ca = Ca::new();
    let client = ca.identity(CLIENT);
    let config = Config { kernel: suites(in_kernel), kernel_rekey, ..Config::default() };
    let agents = Agents::start_with(client.clone(), ca.identity(SERVER), Config::default(), config).await;
    (agents, client)
}

const SPEAKS_RAW: Manners =
    Manners { anonymous: false, no_alpn: false, suite: None, raw: true, shares: false };

/// A peer's stream that has become raw, and the application behind it.
async fn raw_stream(agents: &Agents, client: &Arc<Identity>, manners: Manners) -> (ByHand, TcpStream) {
    let mut peer = ByHand::client(agents.inbound, client, manners).await;
    peer.say_data(&open_frame(agents.destination())).await;
    let (far, _) = soon(agents.application.accept()).await.unwrap();
    peer.say_data(&data(b"framed")).await;
    peer.say_data(&[RAW]).await;
    (peer, far)
}

/// A rustls client's stream after RAW from both ends, and the application behind it.
async fn answered_raw(agents: &Agents, client: &Arc<Identity>) -> (TlsStream<TcpStream>, TcpStream) {
    let mut tls = foreign::client(agents.inbound, client, SPEAKS_RAW).await.unwrap();
    tls.write_all(&open_frame(agents.destination())).await.unwrap();
    let (far, _) = soon(agents.application.accept()).await.unwrap();
    tls.write_all(&[RAW]).await.unwrap();
    soon(tls.read_exact(&mut [0; 1])).await.unwrap();
    (tls, far)
}

/// The server's agent reports a clean end, and that its records were where they should be.
async fn ended_cleanly(agents: &mut Agents, in_kernel: bool) {
    let report = soon(agents.server_reports.recv()).await.unwrap();
    assert!(matches!(report.end, End::Clean), "{:?}", report.end);
    let expected = if in_kernel { Records::Kernel } else { Records::Userspace };
    assert_eq!(report.records, expected);
}

async fn hears(far: &mut TcpStream, expected: &[u8]) {
    let mut heard = vec![0; expected.len()];
    soon(far.read_exact(&mut heard)).await.unwrap();
    assert!(heard == expected);
}

#[tokio::test]
async fn a_rustls_client_is_understood_and_answered_raw() {
    for suite in [TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256] {
        for (mut agents, client, in_kernel) in servers().await {
            let manners = Manners { suite: Some(suite), ..SPEAKS_RAW };
            let mut tls = foreign::client(agents.inbound, &client, manners).await.unwrap();
            tls.write_all(&open_frame(agents.destination())).await.unwrap();
            let (mut far, _) = soon(agents.application.accept()).await.unwrap();
            tls.write_all(&data(b"framed")).await.unwrap();
            tls.write_all(&[RAW]).await.unwrap();
            let long: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
            tls.write_all(&long).await.unwrap();
            hears(&mut far, &[b"framed", &long[..]].concat()).await;
            far.write_all(&long).await.unwrap();
            let mut answer = vec![0; 1 + long.len()];
            soon(tls.read_exact(&mut answer)).await.unwrap();
            assert!(answer[0] == RAW && answer[1..] == long);
            // rustls closes with close_notify.
            tls.shutdown().await.unwrap();
            assert_eq!(soon(far.read(&mut [0; 8])).await.unwrap(), 0);
            far.write_all(b"last").await.unwrap();
            drop(far);
            let mut rest = Vec::new();
            soon(tls.read_to_end(&mut rest)).await.unwrap();
            assert_eq!(rest, b"last");
            ended_cleanly(&mut agents, in_kernel).await;
        }
    }
}

#[tokio::test]
async fn a_connection_that_ends_without_close_notify_is_a_reset_to_the_application() {
    for (mut agents, client, _) in servers().await {
        let (mut peer, mut far) = raw_stream(&agents, &client, SPEAKS_RAW).await;
        peer.say_data(b"and then").await;
        hears(&mut far, b"framedand then").await;
        peer.tcp.shutdown().await.unwrap();
        must_be_reset(&mut far).await;
        let end = soon(agents.server_reports.recv()).await.unwrap().end;
        assert!(matches!(end, End::Truncated), "{end:?}");
    }
}

#[tokio::test]
async fn a_connection_that_ends_within_a_record_is_a_reset_to_the_application() {
    for (agents, client, _) in servers().await {
        let (mut peer, mut far) = raw_stream(&agents, &client, SPEAKS_RAW).await;
        hears(&mut far, b"framed").await;
        let record = peer.record(ContentType::ApplicationData, &[9; 5000]);
        peer.tcp.write_all(&record[..3000]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        peer.tcp.shutdown().await.unwrap();
        assert_eq!(must_be_reset(&mut far).await, 0);
    }
}

/// The switch falls anywhere within the bytes of a record, and all of it arrives.
#[tokio::test]
async fn a_record_in_pieces_around_the_switch_is_put_together() {
    for cut in [1, 4, 5, 6, 700, 1021, 1022] {
        for (mut agents, client, in_kernel) in servers().await {
            let mut peer = ByHand::client(agents.inbound, &client, SPEAKS_RAW).await;
            let mut sent = peer.record(ContentType::ApplicationData, &open_frame(agents.destination()));
            sent.extend(peer.record(ContentType::ApplicationData, &[RAW]));
            let first = peer.record(ContentType::ApplicationData, &[1; 1000]);
            sent.extend(&first[..cut]);
            peer.tcp.write_all(&sent).await.unwrap();
            let (mut far, _) = soon(agents.application.accept()).await.unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
            // The rest of the first, all of a second, and the head of a third.
            let mut sent = first[cut..].to_vec();
            sent.extend(peer.record(ContentType::ApplicationData, &[2; 16384]));
            let third = peer.record(ContentType::ApplicationData, &[3; 10]);
            sent.extend(&third[..cut.min(20)]);
            peer.tcp.write_all(&sent).await.unwrap();
            hears(&mut far, &[1; 1000]).await;
            hears(&mut far, &[2; 16384]).await;
            peer.tcp.write_all(&third[cut.min(20)..]).await.unwrap();
            peer.say(ContentType::Alert, &CLOSE_NOTIFY).await;
            hears(&mut far, &[3; 10]).await;
            assert_eq!(soon(far.read(&mut [0; 8])).await.unwrap(), 0);
            drop(far);
            let report = soon(agents.server_reports.recv()).await.unwrap();
            assert!(matches!(report.end, End::Clean), "{cut}: {:?}", report.end);
            let expected = if in_kernel { Records::Kernel } else { Records::Userspace };
            assert_eq!(report.records, expected, "{cut}");
        }
    }
}

#[tokio::test]
async fn an_alert_ends_in_a_reset_and_so_does_a_changed_byte() {
    for (mut agents, client, _) in servers().await {
        let (mut peer, mut far) = raw_stream(&agents, &client, SPEAKS_RAW).await;
        peer.say_data(b"!").await;
        hears(&mut far, b"framed!").await;
        peer.say(ContentType::Alert, &[2, 80]).await;
        must_be_reset(&mut far).await;
        let end = soon(agents.server_reports.recv()).await.unwrap().end;
        assert!(matches!(end, End::Tunnel(mtls::tunnel::Error::Refused { .. })), "{end:?}");

        let (mut peer, mut far) = raw_stream(&agents, &client, SPEAKS_RAW).await;
        peer.say_data(b"!").await;
        hears(&mut far, b"framed!").await;
        let mut record = peer.record(ContentType::ApplicationData, b"never to be seen");
        record[9] ^= 1;
        peer.tcp.write_all(&record).await.unwrap();
        assert_eq!(must_be_reset(&mut far).await, 0);
        let end = soon(agents.server_reports.recv()).await.unwrap().end;
        assert!(matches!(end, End::Tunnel(mtls::tunnel::Error::Protocol(_))), "{end:?}");
    }
}

/// A warning and a session ticket mean nothing here and are passed over; the bytes around them arrive.
#[tokio::test]
async fn what_is_no_data_is_taken_out_of_the_stream() {
    for (agents, client, _) in servers().await {
        let (mut peer, mut far) = raw_stream(&agents, &client, SPEAKS_RAW).await;
        for round in 0..5u8 {
            peer.say_data(&[round; 40_000][..16_000]).await;
            peer.say(ContentType::Alert, &[1, 90]).await;
            peer.say_data(&[round; 100]).await;
        }
        hears(&mut far, b"framed").await;
        for round in 0..5u8 {
            hears(&mut far, &vec![round; 16_100]).await;
        }
        peer.say(ContentType::Alert, &CLOSE_NOTIFY).await;
        assert_eq!(soon(far.read(&mut [0; 8])).await.unwrap(), 0);
    }
}

/// A kernel that takes no second key can't go on, and what was sent before it is all that arrives.
#[tokio::test]
async fn a_key_update_to_a_kernel_that_can_not_follow_ends_in_a_reset() {
    if !kernel() {
        return;
    }
    let (mut agents, client) = server(true, false).await;
    let (mut peer, mut far) = raw_stream(&agents, &client, SPEAKS_RAW).await;
    peer.say_data(b"old key").await;
    hears(&mut far, b"framedold key").await;
    peer.say(ContentType::Handshake, &KEY_UPDATE).await;
    assert_eq!(must_be_reset(&mut far).await, 0);
    let end = soon(agents.server_reports.recv()).await.unwrap().end;
    assert!(matches!(end, End::Tunnel(mtls::tunnel::Error::KeyInKernel)), "{end:?}");
}

/// In userspace, and in a kernel that can, a peer's new key is used and answered by one of ours.
#[tokio::test]
async fn a_key_update_is_followed_and_answered() {
    for (mut agents, client, in_kernel) in servers().await {
        if in_kernel && !rekeys() {
            continue;
        }
        let (mut tls, mut far) = answered_raw(&agents, &client).await;
        for round in 0..4u8 {
            // rustls asks for ours in return.
            tls.get_mut().1.refresh_traffic_keys().unwrap();
            tls.write_all(&[round; 3000]).await.unwrap();
            hears(&mut far, &[round; 3000]).await;
            far.write_all(&[round; 100]).await.unwrap();
            let mut answer = [0; 100];
            soon(tls.read_exact(&mut answer)).await.unwrap();
            assert_eq!(answer, [round; 100]);
        }
        tls.shutdown().await.unwrap();
        assert_eq!(soon(far.read(&mut [0; 8])).await.unwrap(), 0);
        drop(far);
        ended_cleanly(&mut agents, in_kernel).await;
    }
}

/// Keys without end cost us something each and move nothing.
#[tokio::test]
async fn key_updates_without_end_are_refused() {
    for (mut agents, client, in_kernel) in servers().await {
        if in_kernel && !rekeys() {
            continue;
        }
        let (mut tls, mut far) = answered_raw(&agents, &client).await;
        for _ in 0..40 {
            if tls.get_mut().1.refresh_traffic_keys().is_err() || tls.flush().await.is_err() {
                break;
            }
        }
        must_be_reset(&mut far).await;
        let end = soon(agents.server_reports.recv()).await.unwrap().end;
        assert!(matches!(end, End::Tunnel(mtls::tunnel::Error::Protocol(_))), "{end:?}");
    }
}

#[tokio::test]
async fn frames_after_raw_are_bytes_and_raw_without_agreement_is_refused() {
    for (mut agents, client, _) in servers().await {
        let (mut peer, mut far) = raw_stream(&agents, &client, SPEAKS_RAW).await;
        peer.say_data(&[RAW]).await;
        peer.say_data(&data(b"x")).await;
        hears(&mut far, &[b"framed", &[RAW][..], &data(b"x")].concat()).await;
        drop((peer, far));
        let _ = soon(agents.server_reports.recv()).await.unwrap();

        let (_peer, mut far) = raw_stream(&agents, &client, Manners::default()).await;
        must_be_reset(&mut far).await;
        let end = soon(agents.server_reports.recv()).await.unwrap().end;
        assert!(matches!(end, End::Tunnel(mtls::tunnel::Error::Protocol(_))), "{end:?}");
    }
}

/// A peer of the older protocol is never told RAW, however much we want it.
#[tokio::test]
async fn a_peer_that_does_not_know_raw_never_hears_it() {
    let ca = Ca::new();
    let client = ca.identity(CLIENT);
    let config = Config { raw_after: Some(0), kernel: suites(true), ..Config::default() };
    let agents = Agents::start_with(client.clone(), ca.identity(SERVER), Config::default(), config).await;
    let mut tls = foreign::client(agents.inbound, &client, Manners::default()).await.unwrap();
    tls.write_all(&open_frame(agents.destination())).await.unwrap();
    let (mut far, _) = soon(agents.application.accept()).await.unwrap();
    far.write_all(b"answer").await.unwrap();
    let mut answer = [0; 7];
    soon(tls.read_exact(&mut answer)).await.unwrap();
    assert_eq!(answer[..], data(b"answer")[..]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn openssl_with_padded_records_is_understood() {
    for (agents, client, _) in servers().await {
        let dir = tempfile::tempdir().unwrap();
        let (cert, key) = (dir.path().join("cert.der"), dir.path().join("key.der"));
        std::fs::write(&cert, &client.svid.chain[0]).unwrap();
        std::fs::write(&key, client.svid.key.secret_pkcs8_der()).unwrap();
        let mut child = Command::new("openssl")
            .args(["s_client", "-connect", &agents.inbound.to_string(), "-alpn", "mtls/1.1", "-quiet"])
            .args(["-record_padding", "1000", "-certform", "DER", "-keyform", "DER", "-cert"])
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
        stdin.write_all(&[RAW]).unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let mut raw = [0];
        std::io::Read::read_exact(&mut stdout, &mut raw).unwrap();
        assert_eq!(raw, [RAW]);
        stdin.write_all(b"from openssl").unwrap();
        hears(&mut far, b"from openssl").await;
        far.write_all(b"to openssl").await.unwrap();
        let mut answer = [0; 10];
        std::io::Read::read_exact(&mut stdout, &mut answer).unwrap();
        assert_eq!(&answer, b"to openssl");
        child.kill().unwrap();
        child.wait().unwrap();
        let mut reports = agents.server_reports;
        eventually(|| reports.try_recv().is_ok_and(|report| !matches!(report.end, End::Clean))).await;
    }
}
