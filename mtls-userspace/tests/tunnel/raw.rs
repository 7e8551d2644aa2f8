//! Raw streams between our own agents: with records in userspace, in the kernel, or one of each, an application sees no
//! difference.

use std::sync::LazyLock;
use std::time::Duration;

use mtls::addr::OriginalSrc;
use mtls::features::{Choice, Chosen};
use mtls::relay::{End, Progress, Records, Report, tunnelled};
use mtls::tunnel::{Config, Connector, Open};
use rustls::CipherSuite;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::resets::{must_be_reset, reset};
use crate::transfers::{noise, read_random, write_random, write_random_both_ways};
use crate::world::{Agents, CLIENT, Ca, DENIED_PORT, SERVER, alone, listen, open_stream, soon};

/// Bytes after which whoever wants a raw stream asks for one.
const AFTER: u64 = 100_000;

/// Who asks for raw streams, and whose records go to the kernel.
#[derive(Debug, Clone, Copy)]
pub struct Way {
    asks: [bool; 2],
    kernel: [bool; 2],
}

impl Way {
    fn config(self, end: usize) -> Config {
        Config {
            raw_after: self.asks[end].then_some(AFTER),
            kernel: suites(self.kernel[end]),
            kernel_rekey: rekeys(),
            ..alone()
        }
    }

    pub async fn agents(self) -> Agents {
        self.agents_that_share(false).await
    }

    /// With `share`, streams begin on a lane and get a tunnel of their own when they turn out to be fast.
    async fn agents_that_share(self, share: bool) -> Agents {
        let ca = Ca::new();
        let client_config = Config { share, ..self.config(0) };
        Agents::start_with(ca.identity(CLIENT), ca.identity(SERVER), client_config, self.config(1)).await
    }

    /// What an end that moved bytes both ways must report.
    fn records(self, end: usize) -> Records {
        if self.kernel[end] && kernel() { Records::Kernel } else { Records::Userspace }
    }
}

/// Whether this kernel carries records. Where it must (`MTLS_KERNEL_TLS=required`), lacking is failing.
pub fn kernel() -> bool {
    static WORKS: LazyLock<bool> = LazyLock::new(|| {
        let chosen = Chosen::at_start(&[]).unwrap();
        let works = chosen.uses(Choice::KtlsAes128Gcm) && chosen.uses(Choice::KtlsChacha20Poly1305);
        let required = std::env::var_os("MTLS_KERNEL_TLS").is_some_and(|value| value == "required");
        assert!(works || !required, "this kernel: {chosen}");
        if !works {
            println!("records in the kernel skipped; this kernel: {chosen}");
        }
        works
    });
    *WORKS
}

/// Whether this kernel takes a direction's second key.
pub fn rekeys() -> bool {
    static WORKS: LazyLock<bool> = LazyLock::new(|| Chosen::at_start(&[]).unwrap().uses(Choice::KtlsRekey));
    *WORKS
}

/// What goes to the kernel: everything or nothing.
pub fn suites(in_kernel: bool) -> Vec<CipherSuite> {
    use CipherSuite::*;
    let every = [TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256];
    every.into_iter().filter(|_| in_kernel).collect()
}

/// Every combination. Without kernel TLS those that ask for it stay: they must fall back.
fn ways() -> Vec<Way> {
    let mut ways = Vec::new();
    for asks in [[true, false], [false, true], [true, true]] {
        let kernels = [[false, false], [true, false], [false, true], [true, true]];
        ways.extend(kernels.map(|kernel| Way { asks, kernel }));
    }
    ways
}

pub const BOTH_ASK: Way = Way { asks: [true, true], kernel: [true, true] };

pub async fn ends(agents: &mut Agents) -> [Report; 2] {
    let client = soon(agents.client_reports.recv()).await.unwrap();
    [client, soon(agents.server_reports.recv()).await.unwrap()]
}

/// Both directions are raw when this is over.
pub async fn converse(near: &mut TcpStream, far: &mut TcpStream) {
    let block = noise(5);
    for _ in 0..4 {
        let (said, heard) = (&block[..1 << 17], &mut vec![0; 1 << 17]);
        let (sent, received) = tokio::join!(near.write_all(said), soon(far.read_exact(heard)));
        sent.unwrap();
        received.unwrap();
        assert!(heard == said);
        let (sent, received) = tokio::join!(far.write_all(said), soon(near.read_exact(heard)));
        sent.unwrap();
        received.unwrap();
        assert!(heard == said);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_writes_arrive_unchanged_both_ways() {
    const TOTAL: usize = 8 << 20;
    for way in ways() {
        let mut agents = way.agents().await;
        let (near, far) = soon(agents.connect()).await;
        write_random_both_ways(near, far, TOTAL).await;
        for (end, report) in ends(&mut agents).await.into_iter().enumerate() {
            assert!(matches!(report.end, End::Clean), "{way:?}: {:?}", report.end);
            assert_eq!((report.sent, report.received), (TOTAL as u64, TOTAL as u64), "{way:?}");
            assert_eq!(report.records, way.records(end), "{way:?}");
        }
        // The tunnel is spent; the next connection has one of its own.
        assert_eq!(agents.connector.idle(), 0, "{way:?}");
        let (mut near, mut far) = soon(agents.connect()).await;
        converse(&mut near, &mut far).await;
        assert_eq!(agents.handshakes(), 2);
    }
}

/// Streams that are taken from one event loop to another while they carry bytes, before they become raw; with a tunnel of
/// their own from the start, and with one that they got when they left their lane.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_moves_on_loses_nothing_and_may_still_become_raw() {
    // More than may be under way when one end hears that the other goes raw.
    const TOTAL: usize = 8 << 20;
    let never = Way { asks: [false, false], kernel: [false, false] };
    // Once the kernel carries a direction, nothing leaves any more; that may come before the first departure.
    let mut before_the_kernel = [0; 2];
    for (way, shares) in ways().into_iter().chain([never]).flat_map(|way| [(way, false), (way, true)]) {
        let mut agents = way.agents_that_share(shares).await;
        agents.wander();
        let (near, far) = soon(agents.connect()).await;
        write_random_both_ways(near, far, TOTAL).await;
        let departures = agents.departures();
        for (end, report) in ends(&mut agents).await.into_iter().enumerate() {
            let case = format!("{way:?}, shares: {shares}, end {end}");
            assert!(matches!(report.end, End::Clean), "{case}: {:?}", report.end);
            assert_eq!((report.sent, report.received), (TOTAL as u64, TOTAL as u64), "{case}");
            let records = if way.asks == never.asks { Records::Userspace } else { way.records(end) };
            assert_eq!(report.records, records, "{case}");
            match records {
                Records::Userspace => assert!(departures[end] > 0, "{case}"),
                _ => before_the_kernel[end] += departures[end],
            }
        }
        if way.asks == never.asks {
            agents.idle(1).await;
        }
    }
    assert!(!kernel() || before_the_kernel.iter().all(|count| *count > 0), "{before_the_kernel:?}");
}

/// Bytes in one direction alone: the other end has nothing to say but must agree.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transfer_one_way_ends_when_its_writer_does() {
    const TOTAL: usize = 3_000_001;
    for way in ways() {
        for up in [true, false] {
            let mut agents = way.agents().await;
            let (near, far) = soon(agents.connect()).await;
            let (from, to) = if up { (near, far) } else { (far, near) };
            let (mut answer, from) = from.into_split();
            let (to, mut back) = to.into_split();
            let writing = tokio::spawn(write_random(from, 7, TOTAL));
            soon(read_random(to, 7, TOTAL)).await;
            soon(writing).await.unwrap();
            // Long after that end.
            tokio::time::sleep(Duration::from_millis(50)).await;
            back.write_all(b"got it").await.unwrap();
            let mut heard = [0; 6];
            soon(answer.read_exact(&mut heard)).await.unwrap();
            back.shutdown().await.unwrap();
            assert_eq!(soon(answer.read(&mut [0; 8])).await.unwrap(), 0, "{way:?}");
            for report in ends(&mut agents).await {
                assert!(matches!(report.end, End::Clean), "{way:?}: {:?}", report.end);
            }
        }
    }
}

#[tokio::test]
async fn a_reset_arrives_as_a_reset_in_both_directions() {
    for way in ways() {
        for near_resets in [true, false] {
            let mut agents = way.agents().await;
            let (mut near, mut far) = soon(agents.connect()).await;
            converse(&mut near, &mut far).await;
            let (goes, mut stays) = if near_resets { (near, far) } else { (far, near) };
            reset(goes);
            must_be_reset(&mut stays).await;
            let [client, server] = ends(&mut agents).await.map(|report| report.end);
            let (hit, told) = if near_resets { (client, server) } else { (server, client) };
            assert!(matches!(hit, End::AppReset), "{way:?}: {hit:?}");
            assert!(matches!(told, End::PeerReset), "{way:?}: {told:?}");
        }
    }
}

/// As when a server answers early and closes with the request unread.
#[tokio::test]
async fn an_answer_before_the_reset_is_still_delivered() {
    for way in ways() {
        let agents = way.agents().await;
        let (mut near, mut far) = soon(agents.connect()).await;
        converse(&mut near, &mut far).await;
        near.write_all(&[7; 1000]).await.unwrap();
        soon(far.read_exact(&mut [0; 10])).await.unwrap();
        far.write_all(b"413 too large").await.unwrap();
        drop(far);
        let mut answer = [0; 13];
        soon(near.read_exact(&mut answer)).await.unwrap();
        assert_eq!(&answer, b"413 too large", "{way:?}");
        must_be_reset(&mut near).await;
    }
}

#[tokio::test]
async fn a_revoked_stream_is_reset_at_both_ends() {
    for way in ways() {
        let agents = way.agents().await;
        let (mut near, mut far) = soon(agents.connect()).await;
        converse(&mut near, &mut far).await;
        agents.revoke.notify_waiters();
        must_be_reset(&mut near).await;
        must_be_reset(&mut far).await;
    }
}

#[tokio::test]
async fn a_reset_is_noticed_while_the_other_side_reads_nothing() {
    let mut agents = BOTH_ASK.agents().await;
    let (mut near, mut far) = soon(agents.connect()).await;
    converse(&mut near, &mut far).await;
    let block = vec![1; 1 << 20];
    while tokio::time::timeout(Duration::from_millis(300), near.write(&block)).await.is_ok() {}
    reset(near);
    let report = tokio::time::timeout(Duration::from_secs(2), agents.server_reports.recv()).await;
    let end = report.unwrap().unwrap().end;
    assert!(matches!(end, End::PeerReset), "{end:?}");
    must_be_reset(&mut far).await;
}

#[tokio::test]
async fn a_slow_reader_slows_its_writer_and_loses_nothing() {
    let agents = BOTH_ASK.agents().await;
    let (mut near, mut far) = soon(agents.connect()).await;
    converse(&mut near, &mut far).await;
    let block = noise(3);
    let mut written = 0;
    let write = async |near: &mut TcpStream, written: usize| {
        let write = near.write(&block[written % block.len()..]);
        tokio::time::timeout(Duration::from_millis(300), write).await
    };
    while let Ok(n) = write(&mut near, written).await {
        written += n.unwrap();
        assert!(written < 16 << 20, "the tunnel lets a writer run {written} bytes ahead");
    }
    near.shutdown().await.unwrap();
    let mut got = 0;
    let mut buffer = vec![0; 1 << 16];
    loop {
        let n = soon(far.read(&mut buffer)).await.unwrap();
        if n == 0 {
            break;
        }
        let wrong = (0..n).find(|i| buffer[*i] != block[(got + i) % block.len()]);
        assert_eq!(wrong, None, "after {got} bytes");
        got += n;
    }
    assert_eq!(got, written);
}

/// Keys change in userspace, and in kernels that take a second one. Where the receiver's does not, nothing may look
/// complete.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_own_key_updates_are_followed_or_end_in_a_reset() {
    const TOTAL: usize = 8 << 20;
    // In the kernel or not, and whether that takes further keys.
    let ends: &[_] = if rekeys() {
        &[(false, false), (true, false), (true, true)]
    } else {
        &[(false, false), (true, false)]
    };
    for (sender, receiver) in
        ends.iter().flat_map(|sender| ends.iter().map(move |receiver| (*sender, *receiver)))
    {
        let ((kernel_sends, sender_rekeys), (kernel_receives, receiver_rekeys)) = (sender, receiver);
        let way = format!("sender {sender:?}, receiver {receiver:?}");
        let ca = Ca::new();
        let sends = Config {
            raw_after: Some(0),
            rekey_after: 40,
            kernel: suites(kernel_sends),
            kernel_rekey: sender_rekeys,
            ..alone()
        };
        let receives =
            Config { kernel: suites(kernel_receives), kernel_rekey: receiver_rekeys, ..Config::default() };
        let changes = !(kernel_sends && kernel()) || sends.kernel_rekey;
        let follows = !(kernel_receives && kernel()) || receives.kernel_rekey;
        let mut agents = Agents::start_with(ca.identity(CLIENT), ca.identity(SERVER), sends, receives).await;
        let (mut near, mut far) = soon(agents.connect()).await;
        let block = noise(1);
        let writing = tokio::spawn(async move {
            for _ in 0..TOTAL / block.len() {
                if near.write_all(&block).await.is_err() {
                    return;
                }
            }
            let _ = near.shutdown().await;
            let _ = near.read(&mut [0; 1]).await;
        });
        if changes && !follows {
            let got = must_be_reset(&mut far).await;
            assert!(got < TOTAL, "{way}: {got}");
            let end = soon(agents.server_reports.recv()).await.unwrap().end;
            assert!(matches!(end, End::Tunnel(mtls::tunnel::Error::KeyInKernel)), "{way}: {end:?}");
        } else {
            soon(read_random(&mut far, 1, TOTAL)).await;
        }
        drop(far);
        soon(writing).await.unwrap();
    }
}

/// The client had said RAW when the refusal came: it still learns the reason, and the next stream has a new tunnel.
#[tokio::test]
async fn a_refusal_is_heard_on_a_stream_that_was_raw_at_once() {
    let ca = Ca::new();
    let client = ca.identity(CLIENT);
    let raw = Config { raw_after: Some(0), kernel: suites(true), ..Config::default() };
    let agents =
        Agents::start_with(client.clone(), ca.identity(SERVER), Config::default(), Config::default()).await;
    let connector = Connector::new(std::sync::Arc::new(raw));
    for port in [DENIED_PORT, agents.destination().port()] {
        let (listener, address) = listen().await;
        let mut app = TcpStream::connect(address).await.unwrap();
        let (captured, source) = listener.accept().await.unwrap();
        let open = Open::new(([127, 0, 0, 1], port).into(), OriginalSrc::new(source));
        let mut stream = open_stream(&connector, &client, agents.inbound, open).await.unwrap();
        assert!(!stream.reused());
        app.write_all(b"hello").await.unwrap();
        let relay = tokio::spawn(async move {
            let progress = Progress::default();
            tunnelled(&captured, &mut stream, &progress, std::future::pending()).await.end
        });
        if port == DENIED_PORT {
            let end = soon(relay).await.unwrap();
            assert!(matches!(&end, End::Rejected(why) if &*why.detail == "shop/only-front"), "{end:?}");
            must_be_reset(&mut app).await;
        } else {
            let (mut far, _) = soon(agents.application.accept()).await.unwrap();
            soon(far.read_exact(&mut [0; 5])).await.unwrap();
        }
        assert_eq!(connector.idle(), 0);
    }
}

#[tokio::test]
async fn short_streams_stay_as_they_were_and_keep_their_tunnel() {
    let agents = BOTH_ASK.agents().await;
    for _ in 0..3 {
        let (mut near, mut far) = soon(agents.connect()).await;
        near.write_all(&[1; 1000]).await.unwrap();
        soon(far.read_exact(&mut [0; 1000])).await.unwrap();
        drop(far);
        assert_eq!(soon(near.read(&mut [0; 8])).await.unwrap(), 0);
        drop(near);
        agents.idle(1).await;
    }
    assert_eq!(agents.handshakes(), 1);
}
