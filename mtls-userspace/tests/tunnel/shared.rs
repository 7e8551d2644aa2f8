//! Several streams on one tunnel: none is in another's way, and none can do to a tunnel what it may not.

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mtls::addr::OriginalSrc;
use mtls::identity::Revocations;
use mtls::relay::End;
use mtls::tunnel::{Config, Connector, Error, Open, Target, WINDOW};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::client::TlsStream;

use crate::foreign::{self, Manners, open_frame};
use crate::resets::{must_be_reset, reset};
use crate::transfers::{noise, read_random, write_random};
use crate::world::{
    Agents, CLIENT, Ca, DENIED_PORT, Leaf, SERVER, alone, dial, eventually, judging, listen, soon,
};

type Pair = (TcpStream, TcpStream);

/// A question and its answer.
async fn talk((near, far): &mut Pair) {
    say(near, far).await;
    say(far, near).await;
}

async fn say(from: &mut TcpStream, to: &mut TcpStream) {
    from.write_all(b"few").await.unwrap();
    let mut few = [0; 3];
    soon(to.read_exact(&mut few)).await.unwrap();
    assert_eq!(&few, b"few");
}

async fn pairs(agents: &Agents, count: usize) -> Vec<Pair> {
    let mut pairs = Vec::new();
    for _ in 0..count {
        let mut pair = soon(agents.connect()).await;
        talk(&mut pair).await;
        pairs.push(pair);
    }
    pairs
}

async fn end((near, mut far): Pair) {
    drop(near);
    soon(far.read_to_end(&mut Vec::new())).await.unwrap();
}

#[tokio::test]
async fn streams_that_exchange_little_share_a_tunnel() {
    let agents = Agents::with(Config::default()).await;
    let mut pairs = pairs(&agents, 30).await;
    assert_eq!(agents.handshakes(), 1);
    for pair in &mut pairs {
        talk(pair).await;
    }
}

/// A peer that takes connections and says nothing: nobody waits for all who came before.
#[tokio::test]
async fn a_crowd_to_a_peer_that_is_silent_learns_it_together() {
    const LIMIT: Duration = Duration::from_millis(300);
    let ca = Ca::new();
    let client = ca.identity(CLIENT);
    let connector = Connector::new(Arc::new(Config { handshake_timeout: LIMIT, ..Config::default() }));
    let (_silent, address) = listen().await;
    let begun = Instant::now();
    let mut crowd = JoinSet::new();
    for _ in 0..20 {
        let (connector, client) = (connector.clone(), client.clone());
        crowd.spawn(async move {
            let open = Open::new(address, OriginalSrc::new(address));
            let expected = SERVER.parse().unwrap();
            let target = Target { identity: &client, expected: &expected, netns: 0, address };
            connector.carry(target, open, dial).await.map(drop)
        });
    }
    for outcome in soon(crowd.join_all()).await {
        assert!(matches!(outcome, Err(Error::HandshakeTimedOut { .. })), "{outcome:?}");
    }
    let took = begun.elapsed();
    assert!(took < LIMIT * 6, "{took:?} for what takes twice {LIMIT:?}");
}

/// Asked not to, each has its own, and the next stream takes the first's.
#[tokio::test]
async fn streams_that_may_not_share_have_a_tunnel_each() {
    let agents = Agents::with(alone()).await;
    let mut pairs = pairs(&agents, 3).await;
    assert_eq!(agents.handshakes(), 3);
    end(pairs.remove(0)).await;
    agents.idle(1).await;
    let mut next = soon(agents.connect()).await;
    talk(&mut next).await;
    assert_eq!((agents.handshakes(), agents.connector.idle()), (3, 0));
}

#[tokio::test]
async fn lanes_are_used_again_and_again_and_more_than_there_are_take_another_tunnel() {
    let agents = Agents::with(Config::default()).await;
    for _ in 0..300 {
        let pair = pairs(&agents, 1).await.remove(0);
        end(pair).await;
    }
    assert_eq!(agents.handshakes(), 1);
    let mut many = pairs(&agents, mtls::tunnel::MAX_LANES + 1).await;
    assert_eq!(agents.handshakes(), 2);
    for pair in &mut many {
        talk(pair).await;
    }
}

/// It goes on in a tunnel of its own, which another may have afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fast_stream_leaves_and_the_others_stay() {
    let mut agents = Agents::with(Config::default()).await;
    let mut others = pairs(&agents, 5).await;
    for up in [true, false] {
        let (near, far) = soon(agents.connect()).await;
        let (from, to) = if up { (near, far) } else { (far, near) };
        let (read, keep) = to.into_split();
        let moving = tokio::spawn(write_random(from, 5, 64 << 20));
        soon(read_random(read, 5, 64 << 20)).await;
        soon(moving).await.unwrap();
        drop(keep);
        assert!(matches!(soon(agents.client_reports.recv()).await.unwrap().end, End::Clean));
        assert!(matches!(soon(agents.server_reports.recv()).await.unwrap().end, End::Clean));
        agents.idle(1).await;
        for pair in &mut others {
            talk(pair).await;
        }
    }
    assert_eq!(agents.handshakes(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_may_leave_after_one_of_its_ends_is_done() {
    let mut agents = Agents::with(Config::default()).await;
    let (mut near, mut far) = soon(agents.connect()).await;
    near.write_all(b"send it all").await.unwrap();
    near.shutdown().await.unwrap();
    let mut asked = Vec::new();
    soon(far.read_to_end(&mut asked)).await.unwrap();
    assert_eq!(asked, b"send it all");
    let sending = tokio::spawn(write_random(far, 8, 32 << 20));
    soon(read_random(near, 8, 32 << 20)).await;
    soon(sending).await.unwrap();
    let report = soon(agents.client_reports.recv()).await.unwrap();
    assert!(matches!(report.end, End::Clean), "{report:?}");
    assert_eq!((report.sent, report.received, agents.handshakes()), (11, 32 << 20, 2));
}

/// Also where it cannot have a tunnel of its own, it gets through, and whoever reads nothing stops only its writer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_sleeps_is_in_nobodys_way() {
    let agents = Agents::with(Config::default()).await;
    let mut others = pairs(&agents, 3).await;
    agents.refuse_tunnels();
    let (mut near, far) = soon(agents.connect()).await;
    let block = noise(3);
    let mut written = 0;
    while let Ok(n) =
        tokio::time::timeout(Duration::from_millis(300), near.write(&block[written % block.len()..])).await
    {
        written += n.unwrap();
        assert!(written < 8 << 20, "a lane lets a writer run {written} bytes ahead");
    }
    for pair in &mut others {
        talk(pair).await;
    }
    near.shutdown().await.unwrap();
    let reading = async {
        let mut far = far;
        let mut got = Vec::new();
        far.read_to_end(&mut got).await.unwrap();
        got
    };
    let got = soon(reading).await;
    assert_eq!(got.len(), written);
    assert!(got.chunks(block.len()).all(|piece| piece == &block[..piece.len()]));
    assert_eq!(agents.handshakes(), 1);
}

#[tokio::test]
async fn an_abort_ends_one_stream_and_not_its_tunnel() {
    let mut agents = Agents::with(Config::default()).await;
    let mut others = pairs(&agents, 3).await;
    for by_client in [true, false] {
        let (near, far) = pairs(&agents, 1).await.remove(0);
        let (aborting, mut left) = if by_client { (near, far) } else { (far, near) };
        reset(aborting);
        must_be_reset(&mut left).await;
        soon(agents.client_reports.recv()).await.unwrap();
        for pair in &mut others {
            talk(pair).await;
        }
    }
    assert_eq!(agents.handshakes(), 1);
}

#[tokio::test]
async fn a_refused_stream_is_told_why_and_the_others_go_on() {
    let mut agents = Agents::with(Config::default()).await;
    let mut others = pairs(&agents, 2).await;
    for _ in 0..3 {
        let mut app = agents.ask_for(DENIED_PORT).await;
        let _ = app.write_all(b"hello").await;
        let error = soon(app.read(&mut [0; 8])).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        match soon(agents.client_reports.recv()).await.unwrap().end {
            End::Rejected(rejection) => assert_eq!(&*rejection.detail, "shop/only-front"),
            other => panic!("{other:?}"),
        }
    }
    for pair in &mut others {
        talk(pair).await;
    }
    assert_eq!(agents.handshakes(), 1);
}

#[tokio::test]
async fn a_server_that_drains_keeps_what_is_open_and_gets_nothing_new() {
    let agents = Agents::with(Config::default()).await;
    let mut old = pairs(&agents, 3).await;
    agents.drain.notify_one();
    // Until the client has heard of it, what it asks for is served.
    let mut new = Vec::new();
    for _ in 0..20 {
        new.extend(pairs(&agents, 1).await);
        if agents.handshakes() == 2 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(agents.handshakes(), 2);
    for pair in old.iter_mut().chain(&mut new) {
        talk(pair).await;
    }
}

#[tokio::test]
async fn a_shared_tunnel_ends_when_it_was_idle_for_its_time() {
    let ca = Ca::new();
    let short = Config { idle_client: Duration::from_millis(100), ..Config::default() };
    let agents = Agents::start_with(ca.identity(CLIENT), ca.identity(SERVER), short, Config::default()).await;
    for round in 1..=2 {
        let mut pair = pairs(&agents, 1).await.remove(0);
        tokio::time::sleep(Duration::from_millis(300)).await;
        // One that is open keeps it.
        talk(&mut pair).await;
        assert_eq!(agents.handshakes(), round);
        end(pair).await;
        tokio::time::sleep(Duration::from_millis(400)).await;
    }
}

/// A tunnel ends with the pod it was dialled from.
#[tokio::test]
async fn pods_of_one_identity_have_tunnels_of_their_own() {
    let ca = Ca::new();
    let client = ca.identity(CLIENT);
    let expected = SERVER.parse().unwrap();
    let agents =
        Agents::start_with(client.clone(), ca.identity(SERVER), Config::default(), Config::default()).await;
    let mut kept = Vec::new();
    for (netns, handshakes) in [(1, 1), (1, 1), (2, 2), (1, 2), (2, 2)] {
        let target = Target { identity: &client, expected: &expected, netns, address: agents.inbound };
        let open = Open::new(agents.destination(), OriginalSrc::new(agents.outbound));
        kept.push(soon(agents.connector.carry(target, open, dial)).await.unwrap());
        eventually(|| agents.handshakes() == handshakes).await;
    }
}

#[tokio::test]
async fn keys_are_changed_under_many_streams() {
    let ca = Ca::new();
    let eager = || Config { rekey_after: 3, ..Config::default() };
    let agents = Agents::start_with(ca.identity(CLIENT), ca.identity(SERVER), eager(), eager()).await;
    let mut pairs = pairs(&agents, 4).await;
    for _ in 0..40 {
        for pair in &mut pairs {
            talk(pair).await;
        }
    }
    assert_eq!(agents.handshakes(), 1);
}

#[tokio::test]
async fn streams_end_when_their_peer_is_no_longer_trusted() {
    let ca = Ca::new();
    let (client, server) = (ca.identity(CLIENT), ca.identity(SERVER));
    for at_client in [true, false] {
        let mut agents =
            Agents::start_with(client.clone(), server.clone(), Config::default(), Config::default()).await;
        let mut open = pairs(&agents, 3).await;
        agents.client_config.trust(&judging(&client, &[&ca], Revocations::default())).unwrap();
        for pair in &mut open {
            talk(pair).await;
        }
        if at_client {
            agents.client_config.trust(&judging(&client, &[&ca], ca.revoking(&[&server]))).unwrap();
        } else {
            agents.server_config.trust(&judging(&server, &[&ca], ca.revoking(&[&client]))).unwrap();
        }
        for (near, far) in &mut open {
            must_be_reset(near).await;
            must_be_reset(far).await;
        }
        let reports = if at_client { &mut agents.client_reports } else { &mut agents.server_reports };
        let report = soon(reports.recv()).await.unwrap();
        assert!(matches!(report.end, End::Revoked), "{report:?}");
        let mut app = TcpStream::connect(agents.outbound).await.unwrap();
        let _ = app.write_all(b"ping").await;
        assert_eq!(soon(app.read(&mut [0; 8])).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
}

#[tokio::test]
async fn an_expired_peer_keeps_its_streams_and_gets_no_other() {
    let ca = Ca::new();
    let brief = ca.identity_with(CLIENT, Leaf { seconds: 3, ..Leaf::default() }, &[&ca]);
    let agents = Agents::start_with(brief, ca.identity(SERVER), Config::default(), Config::default()).await;
    let mut open = pairs(&agents, 2).await;
    tokio::time::sleep(Duration::from_millis(4500)).await;
    for pair in &mut open {
        talk(pair).await;
    }
    let mut app = TcpStream::connect(agents.outbound).await.unwrap();
    let _ = app.write_all(b"ping").await;
    assert_eq!(soon(app.read(&mut [0; 8])).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    for pair in &mut open {
        talk(pair).await;
    }
}

fn lane(number: u32, frame: &[u8]) -> Vec<u8> {
    [&number.to_be_bytes()[..], &(frame.len() as u16).to_be_bytes(), frame].concat()
}

/// A foreign client's shared tunnel with one stream on lane 0.
struct Mistreated {
    ca: Ca,
    agents: Agents,
    tls: TlsStream<TcpStream>,
    far: TcpStream,
}

async fn mistreated() -> Mistreated {
    let ca = Ca::new();
    let client = ca.identity(CLIENT);
    let agents = Agents::start(client.clone(), ca.identity(SERVER)).await;
    let manners = Manners { shares: true, ..Manners::default() };
    let mut tls = foreign::client(agents.inbound, &client, manners).await.unwrap();
    tls.write_all(&[&[6][..], &[1; 16]].concat()).await.unwrap();
    let both = [lane(0, &open_frame(agents.destination())), lane(0, b"\x02half a")].concat();
    tls.write_all(&both).await.unwrap();
    let (mut far, _) = soon(agents.application.accept()).await.unwrap();
    let mut heard = [0; 6];
    soon(far.read_exact(&mut heard)).await.unwrap();
    assert_eq!(&heard, b"half a");
    Mistreated { ca, agents, tls, far }
}

#[tokio::test]
async fn lane_frames_that_are_not_allowed_reset_the_tunnel() {
    let open = open_frame(([127, 0, 0, 1], DENIED_PORT).into());
    let over: Vec<u8> = [&[2][..], &vec![0; 16_000]].concat();
    let window = (0..=WINDOW / 16_000).flat_map(|_| lane(0, &over));
    let cases: [(&str, Vec<u8>); 12] = [
        ("data on a lane that was never opened", lane(7, b"\x02x")),
        ("an end of one", lane(7, &[3])),
        ("a second OPEN on a lane", lane(0, &open)),
        ("an OPEN on a slot that is taken", lane(256, &open)),
        ("a frame that is cut", lane(0, b"\x02xy")[..8].to_vec()),
        ("a frame of no known type", lane(0, &[77])),
        ("a REJECT from a client", lane(0, &[4, 1, 0])),
        ("a RAW on a lane", lane(0, &[5])),
        ("a SHARE on a shared tunnel", lane(0, &[&[6][..], &[2; 16]].concat())),
        ("a RETIRE from a client", lane(u32::MAX, &[12])),
        ("a grant beyond the window", lane(0, &[10, 0, 1, 0, 0])),
        ("data after its end", [lane(0, &[3]), lane(0, b"\x02x")].concat()),
    ];
    for (name, frames) in cases.into_iter().chain([("more than the window", window.collect())]) {
        let Mistreated { mut agents, mut tls, mut far, .. } = mistreated().await;
        for record in frames.chunks(16_300) {
            let _ = tls.write_all(record).await;
        }
        let end = soon(agents.server_reports.recv()).await.unwrap().end;
        assert!(matches!(end, End::Tunnel(Error::Protocol(_))), "{name}: {end:?}");
        let error = soon(far.read_to_end(&mut Vec::new())).await.map(|_| ());
        assert!(
            error.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset) || error.is_ok()
        );
        // An end that was said before the violation is an end.
        assert!(error.is_err() || name == "data after its end", "{name}");
    }
}

#[tokio::test]
async fn what_is_allowed_is_not_refused() {
    let Mistreated { agents: _agents, mut tls, mut far, .. } = mistreated().await;
    // An abort that comes when its stream is over already, and several frames in a record.
    tls.write_all(&lane(0, &[9])).await.unwrap();
    must_be_reset(&mut far).await;
    tls.write_all(&lane(0, &[9])).await.map_err(|error| panic!("{error}")).unwrap();
    let nowhere = open_frame(([127, 0, 0, 1], DENIED_PORT).into());
    let frames = [lane(256, &nowhere), lane(256, b"\x02x"), lane(256, &[3]), lane(1, &nowhere)].concat();
    tls.write_all(&frames).await.unwrap();
    // RESET on lane 0, then two refusals.
    let mut heard = Vec::new();
    while heard.windows(15).filter(|window| window == b"shop/only-front").count() < 2 {
        let mut piece = [0; 256];
        let n = soon(tls.read(&mut piece)).await.unwrap();
        assert!(n > 0);
        heard.extend_from_slice(&piece[..n]);
    }
}

/// Only who speaks for the same workload may go on with its streams.
#[tokio::test]
async fn a_stream_is_not_given_to_somebody_else() {
    let Mistreated { ca, agents, tls: _tls, mut far } = mistreated().await;
    let adopt = [&[7][..], &[1; 16], &[0; 4]].concat();
    let other = ca.identity("spiffe://cluster.local/ns/shop/sa/other");
    let manners = Manners { shares: true, ..Manners::default() };
    let mut tls = foreign::client(agents.inbound, &other, manners).await.unwrap();
    tls.write_all(&adopt).await.unwrap();
    let mut answer = [0; 3];
    soon(tls.read_exact(&mut answer)).await.unwrap();
    assert_eq!(answer[..2], [4, 5], "a REJECT: unavailable");

    // Its owner may.
    let owner = ca.identity(CLIENT);
    let mut tls = foreign::client(agents.inbound, &owner, manners).await.unwrap();
    tls.write_all(&adopt).await.unwrap();
    let mut answer = [0; 1];
    soon(tls.read_exact(&mut answer)).await.unwrap();
    assert_eq!(answer, [8], "ADOPTED");
    let _ = far.write_all(b"x").await;
}

#[tokio::test]
async fn without_the_newer_protocol_nothing_is_shared() {
    for frame in [[&[6][..], &[1; 16]].concat(), [&[7][..], &[1; 16], &[0; 4]].concat()] {
        let ca = Ca::new();
        let client = ca.identity(CLIENT);
        let agents = Agents::start(client.clone(), ca.identity(SERVER)).await;
        let mut tls = foreign::client(agents.inbound, &client, Manners::default()).await.unwrap();
        tls.write_all(&frame).await.unwrap();
        let error = soon(tls.read(&mut [0; 8])).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        eventually(|| agents.handshakes() == 1).await;
    }
}
