//! Bytes arrive, all of them and no others, in both directions and in any rhythm.

use mtls::relay::End;
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::world::{Agents, alone, soon};

both_ways! {
    a_question_and_its_answer,
    a_gibibyte_of_random_writes_arrives_unchanged_both_ways,
    a_server_may_speak_first,
    either_side_may_end_its_direction_and_still_receive,
    few_bytes_behind_many_are_not_kept_back,
    a_slow_reader_slows_its_writer_and_loses_nothing,
    many_connections_at_once,
}

async fn a_question_and_its_answer(mut agents: Agents) {
    let (mut near, mut far) = soon(agents.connect()).await;
    near.write_all(b"question").await.unwrap();
    let mut question = [0; 8];
    soon(far.read_exact(&mut question)).await.unwrap();
    far.write_all(b"answer").await.unwrap();
    drop(far);
    let mut answer = Vec::new();
    soon(near.read_to_end(&mut answer)).await.unwrap();
    drop(near);
    assert_eq!((&question[..], &answer[..]), (&b"question"[..], &b"answer"[..]));
    let report = soon(agents.client_reports.recv()).await.unwrap();
    assert!(matches!(report.end, End::Clean), "{:?}", report.end);
    assert_eq!((report.sent, report.received), (8, 6));
    let report = soon(agents.server_reports.recv()).await.unwrap();
    assert!(matches!(report.end, End::Clean), "{:?}", report.end);
    // From the source's point of view at either end.
    assert_eq!((report.sent, report.received), (8, 6));
}

async fn a_server_may_speak_first(agents: Agents) {
    let (mut near, mut far) = soon(agents.connect()).await;
    far.write_all(b"220 ready").await.unwrap();
    let mut greeting = [0; 9];
    soon(near.read_exact(&mut greeting)).await.unwrap();
    assert_eq!(&greeting, b"220 ready");
}

async fn either_side_may_end_its_direction_and_still_receive(mut agents: Agents) {
    for client_first in [true, false] {
        let (near, far) = soon(agents.connect()).await;
        let (mut first, mut second) = if client_first { (near, far) } else { (far, near) };
        first.write_all(b"done").await.unwrap();
        first.shutdown().await.unwrap();
        let mut heard = Vec::new();
        soon(second.read_to_end(&mut heard)).await.unwrap();
        assert_eq!(heard, b"done");
        // Long after the end of the other direction.
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        for _ in 0..3 {
            second.write_all(b"still here").await.unwrap();
            let mut still = [0; 10];
            soon(first.read_exact(&mut still)).await.unwrap();
        }
        second.shutdown().await.unwrap();
        let mut rest = Vec::new();
        soon(first.read_to_end(&mut rest)).await.unwrap();
        assert!(rest.is_empty());
        let report = soon(agents.client_reports.recv()).await.unwrap();
        assert!(matches!(report.end, End::Clean), "{:?}", report.end);
    }
    assert_eq!(agents.handshakes(), 1);
}

/// Whoever gathers a fast stream's bytes must hand out those before a pause, and find none of it on the next stream.
async fn few_bytes_behind_many_are_not_kept_back(mut agents: Agents) {
    for _ in 0..2 {
        let (mut near, mut far) = soon(agents.connect()).await;
        for _ in 0..3 {
            let sent = vec![7; 32 << 20];
            let mut received = vec![0; sent.len()];
            let (written, read) = tokio::join!(near.write_all(&sent), far.read_exact(&mut received));
            written.unwrap();
            read.unwrap();
            assert!(received == sent);
            for turn in 0..40 {
                let (from, to) = if turn % 2 == 0 { (&mut near, &mut far) } else { (&mut far, &mut near) };
                from.write_all(b"few").await.unwrap();
                let mut few = [0; 3];
                soon(to.read_exact(&mut few)).await.unwrap();
            }
        }
        drop((near, far));
        soon(agents.client_reports.recv()).await.unwrap();
    }
}

/// A gibibyte each way at once, in writes of random size.
async fn a_gibibyte_of_random_writes_arrives_unchanged_both_ways(agents: Agents) {
    const TOTAL: usize = 1 << 30;
    let (near, far) = soon(agents.connect()).await;
    write_random_both_ways(near, far, TOTAL).await;
}

/// Until both ends have read all that was meant for them, and its end.
pub async fn write_random_both_ways(near: TcpStream, far: TcpStream, total: usize) {
    let (near_read, near_write) = near.into_split();
    let (far_read, far_write) = far.into_split();
    let tasks = [
        tokio::spawn(write_random(near_write, 1, total)),
        tokio::spawn(write_random(far_write, 2, total)),
        tokio::spawn(read_random(far_read, 1, total)),
        tokio::spawn(read_random(near_read, 2, total)),
    ];
    for task in tasks {
        tokio::time::timeout(std::time::Duration::from_secs(240), task).await.expect("stalled").unwrap();
    }
}

/// The bytes both ends know: a block of noise, read in a circle from a random start.
pub fn noise(seed: u64) -> Vec<u8> {
    let mut block = vec![0; 1 << 20];
    SmallRng::seed_from_u64(seed).fill_bytes(&mut block);
    block
}

pub async fn write_random(mut to: impl tokio::io::AsyncWrite + Unpin, seed: u64, total: usize) {
    let block = noise(seed);
    let mut sizes = SmallRng::seed_from_u64(seed ^ 99);
    let mut sent = 0;
    while sent < total {
        let largest = if sizes.random_bool(0.1) { 1 << 20 } else { 40_000 };
        let at = sent % block.len();
        let n = sizes.random_range(1..=largest).min(block.len() - at).min(total - sent);
        to.write_all(&block[at..at + n]).await.unwrap();
        sent += n;
    }
    to.shutdown().await.unwrap();
}

pub async fn read_random(mut from: impl tokio::io::AsyncRead + Unpin, seed: u64, total: usize) {
    let block = noise(seed);
    let mut buffer = vec![0; 1 << 18];
    let mut got = 0;
    loop {
        let n = from.read(&mut buffer).await.unwrap();
        if n == 0 {
            break;
        }
        let mut checked = 0;
        while checked < n {
            let at = (got + checked) % block.len();
            let piece = (n - checked).min(block.len() - at);
            assert!(buffer[checked..checked + piece] == block[at..at + piece], "bytes differ near {got}");
            checked += piece;
        }
        got += n;
    }
    assert_eq!(got, total);
}

async fn a_slow_reader_slows_its_writer_and_loses_nothing(agents: Agents) {
    let (mut near, mut far) = soon(agents.connect()).await;
    let block = noise(3);
    let mut written = 0;
    // Nobody reads: the writer must come to a halt.
    while let Ok(n) = tokio::time::timeout(
        std::time::Duration::from_millis(300),
        near.write(&block[written % block.len()..]),
    )
    .await
    {
        written += n.unwrap();
        // The applications' own buffers hold a good part of these.
        assert!(written < 12 << 20, "the tunnel lets a writer run {written} bytes ahead");
    }
    near.shutdown().await.unwrap();
    let mut got = 0;
    let mut buffer = vec![0; 1 << 16];
    loop {
        let n = soon(far.read(&mut buffer)).await.unwrap();
        if n == 0 {
            break;
        }
        for (i, byte) in buffer[..n].iter().enumerate() {
            assert_eq!(*byte, block[(got + i) % block.len()]);
        }
        got += n;
    }
    assert_eq!(got, written);
}

/// Most of the time a stream that moves much holds what it can't write yet: it must leave all the same, and take that along.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_moves_on_while_its_reader_is_slower_than_its_writer() {
    const TOTAL: usize = 24 << 20;
    const PIECE: usize = 1 << 16;
    for up in [true, false] {
        let mut agents = Agents::with(alone()).await;
        agents.wander();
        let (near, far) = soon(agents.connect()).await;
        let (mut from, mut to) = if up { (near, far) } else { (far, near) };
        let writer = tokio::spawn(async move {
            write_random(&mut from, 5, TOTAL).await;
            from
        });
        // Until the writer waits.
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        let before = agents.departures();
        let block = noise(5);
        let mut buffer = vec![0; PIECE];
        for got in (0..TOTAL).step_by(PIECE) {
            if got == TOTAL / 2 {
                let after = agents.departures();
                for end in [0, 1] {
                    assert!(after[end] >= before[end] + 4, "up: {up}, end {end}: {before:?}, then {after:?}");
                }
            }
            soon(to.read_exact(&mut buffer)).await.unwrap();
            assert!(buffer == block[got % block.len()..][..PIECE], "bytes differ behind {got}");
            if got < TOTAL / 2 && got % (1 << 20) == 0 {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        }
        drop(soon(writer).await.unwrap());
        drop(to);
        for reports in [&mut agents.client_reports, &mut agents.server_reports] {
            let report = soon(reports.recv()).await.unwrap();
            assert_eq!(report.sent.max(report.received), TOTAL as u64);
        }
    }
}

async fn many_connections_at_once(agents: Agents) {
    let listener = agents.application;
    tokio::spawn(async move {
        loop {
            let (mut far, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let (mut read, mut write) = far.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    let outbound = agents.outbound;
    let tasks: Vec<_> = (0..200u32)
        .map(|i| {
            tokio::spawn(async move {
                let mut near = TcpStream::connect(outbound).await.unwrap();
                let said = i.to_be_bytes().repeat(500);
                near.write_all(&said).await.unwrap();
                near.shutdown().await.unwrap();
                let mut heard = Vec::new();
                near.read_to_end(&mut heard).await.unwrap();
                assert!(heard == said);
            })
        })
        .collect();
    for task in tasks {
        soon(task).await.unwrap();
    }
}
