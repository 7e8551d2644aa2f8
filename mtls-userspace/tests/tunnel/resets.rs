//! An abort is an abort at the other end, at once, whatever else is going on.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use mtls::relay::{End, Progress, Unwritten, plain};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::world::{Agents, listen, soon};

both_ways! {
    a_reset_arrives_as_a_reset_in_both_directions,
    what_was_written_before_a_reset_is_not_held_back,
    an_answer_before_the_reset_is_still_delivered,
    a_reset_after_a_half_close_is_noticed_while_nothing_flows,
    a_reset_is_noticed_while_the_other_side_reads_nothing,
    an_orderly_close_under_fire_ends_with_a_reset_for_the_writer,
    a_revoked_connection_is_reset_at_both_ends,
}

pub fn reset(socket: TcpStream) {
    socket.set_zero_linger().unwrap();
    drop(socket);
}

/// Reads to the end; the end must be a reset.
pub async fn must_be_reset(socket: &mut TcpStream) -> usize {
    let mut got = 0;
    let mut buffer = vec![0; 1 << 16];
    loop {
        match soon(socket.read(&mut buffer)).await {
            Ok(0) => panic!("a clean end after {got} bytes, where a reset was due"),
            Ok(n) => got += n,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::ConnectionReset);
                return got;
            }
        }
    }
}

async fn a_reset_arrives_as_a_reset_in_both_directions(mut agents: Agents) {
    let (near, mut far) = soon(agents.connect()).await;
    reset(near);
    must_be_reset(&mut far).await;
    let end = soon(agents.client_reports.recv()).await.unwrap().end;
    assert!(matches!(end, End::AppReset), "{end:?}");
    let end = soon(agents.server_reports.recv()).await.unwrap().end;
    assert!(matches!(end, End::PeerReset), "{end:?}");

    let (mut near, mut far) = soon(agents.connect()).await;
    near.write_all(b"x").await.unwrap();
    soon(far.read_exact(&mut [0])).await.unwrap();
    reset(far);
    must_be_reset(&mut near).await;
    let end = soon(agents.client_reports.recv()).await.unwrap().end;
    assert!(matches!(end, End::PeerReset), "{end:?}");
    let end = soon(agents.server_reports.recv()).await.unwrap().end;
    assert!(matches!(end, End::AppReset), "{end:?}");
}

async fn what_was_written_before_a_reset_is_not_held_back(agents: Agents) {
    let (near, mut far) = soon(agents.connect()).await;
    let mut near = near;
    near.write_all(b"last words").await.unwrap();
    let mut heard = [0; 10];
    soon(far.read_exact(&mut heard)).await.unwrap();
    reset(near);
    assert_eq!(must_be_reset(&mut far).await, 0);
}

/// As when a server answers early and closes with the request unread: the answer arrives, then the reset.
async fn an_answer_before_the_reset_is_still_delivered(agents: Agents) {
    let (mut near, mut far) = soon(agents.connect()).await;
    near.write_all(&[7; 1000]).await.unwrap();
    soon(far.read_exact(&mut [0; 10])).await.unwrap();
    far.write_all(b"413 too large").await.unwrap();
    // On a busy machine the kernel itself may let the reset overtake them: each goes through the queue of its processor.
    tokio::time::sleep(Duration::from_millis(20)).await;
    drop(far);
    let mut answer = [0; 13];
    soon(near.read_exact(&mut answer)).await.unwrap();
    assert_eq!(&answer, b"413 too large");
    must_be_reset(&mut near).await;
}

async fn a_reset_after_a_half_close_is_noticed_while_nothing_flows(agents: Agents) {
    let (mut near, mut far) = soon(agents.connect()).await;
    near.shutdown().await.unwrap();
    assert_eq!(soon(far.read(&mut [0; 8])).await.unwrap(), 0);
    reset(near);
    // The far side has read its end; a write must soon fail.
    let began = Instant::now();
    loop {
        tokio::time::sleep(Duration::from_millis(5)).await;
        if let Err(error) = far.write_all(b"x").await {
            assert!(matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset));
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(5), "the reset never arrived");
    }

    let (mut near, mut far) = soon(agents.connect()).await;
    far.shutdown().await.unwrap();
    assert_eq!(soon(near.read(&mut [0; 8])).await.unwrap(), 0);
    reset(far);
    let began = Instant::now();
    while near.write_all(b"x").await.is_ok() {
        tokio::time::sleep(Duration::from_millis(5)).await;
        assert!(began.elapsed() < Duration::from_secs(5), "the reset never arrived");
    }
}

async fn a_reset_is_noticed_while_the_other_side_reads_nothing(mut agents: Agents) {
    let (mut near, far) = soon(agents.connect()).await;
    let block = vec![1; 1 << 20];
    while tokio::time::timeout(Duration::from_millis(300), near.write(&block)).await.is_ok() {}
    reset(near);
    let report = tokio::time::timeout(Duration::from_secs(2), agents.server_reports.recv()).await;
    assert!(matches!(report.unwrap().unwrap().end, End::PeerReset));
    let mut far = far;
    must_be_reset(&mut far).await;
}

async fn an_orderly_close_under_fire_ends_with_a_reset_for_the_writer(agents: Agents) {
    let (mut near, far) = soon(agents.connect()).await;
    drop(far);
    assert_eq!(soon(near.read(&mut [0; 8])).await.unwrap(), 0);
    let began = Instant::now();
    while near.write_all(&[0; 1000]).await.is_ok() {
        tokio::time::sleep(Duration::from_millis(5)).await;
        assert!(began.elapsed() < Duration::from_secs(5), "writes into the void succeed");
    }
}

async fn a_revoked_connection_is_reset_at_both_ends(mut agents: Agents) {
    let (mut near, mut far) = soon(agents.connect()).await;
    near.write_all(b"x").await.unwrap();
    soon(far.read_exact(&mut [0])).await.unwrap();
    agents.revoke.notify_waiters();
    must_be_reset(&mut near).await;
    must_be_reset(&mut far).await;
    let end = soon(agents.server_reports.recv()).await.unwrap().end;
    assert!(matches!(end, End::Revoked), "{end:?}");
    let end = soon(agents.client_reports.recv()).await.unwrap().end;
    assert!(matches!(end, End::PeerReset), "{end:?}");
}

/// An application's sockets on both sides of a plain relay, and the relay's report.
async fn through_plain() -> (TcpStream, TcpStream, tokio::task::JoinHandle<End>) {
    let (left, left_address) = listen().await;
    let (right, right_address) = listen().await;
    let near = TcpStream::connect(left_address).await.unwrap();
    let (a, _) = left.accept().await.unwrap();
    let b = TcpStream::connect(right_address).await.unwrap();
    let (far, _) = right.accept().await.unwrap();
    let relay = tokio::spawn(async move {
        plain(&a, &b, Unwritten::default(), &Progress::default(), std::future::pending()).await.end
    });
    (near, far, relay)
}

#[tokio::test]
async fn a_plain_relay_keeps_ends_and_resets_apart() {
    let (mut near, mut far, relay) = through_plain().await;
    near.write_all(&vec![3; 3 << 20][..1 << 16]).await.unwrap();
    near.shutdown().await.unwrap();
    let mut heard = Vec::new();
    soon(far.read_to_end(&mut heard)).await.unwrap();
    assert_eq!(heard.len(), 1 << 16);
    far.write_all(b"answer").await.unwrap();
    drop(far);
    let mut answer = Vec::new();
    soon(near.read_to_end(&mut answer)).await.unwrap();
    assert_eq!(answer, b"answer");
    assert!(matches!(soon(relay).await.unwrap(), End::Clean));

    let (near, mut far, relay) = through_plain().await;
    reset(near);
    must_be_reset(&mut far).await;
    assert!(matches!(soon(relay).await.unwrap(), End::AppReset));

    let (mut near, far, relay) = through_plain().await;
    reset(far);
    must_be_reset(&mut near).await;
    assert!(matches!(soon(relay).await.unwrap(), End::PeerReset));
}

#[tokio::test]
async fn a_plain_relay_delivers_an_answer_before_its_reset() {
    let (mut near, mut far, _relay) = through_plain().await;
    near.write_all(&[7; 1000]).await.unwrap();
    soon(far.read_exact(&mut [0; 10])).await.unwrap();
    far.write_all(b"413 too large").await.unwrap();
    drop(far);
    let mut answer = [0; 13];
    soon(near.read_exact(&mut answer)).await.unwrap();
    must_be_reset(&mut near).await;
}
