//! What a peer may send after the handshake, and what it may not: records made by hand under a real session's keys.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};
use rustls_pki_types::PrivatePkcs8KeyDer;
use tokio::net::{TcpListener, TcpStream};

use crate::addr::OriginalSrc;
use crate::identity::{Identity, Svid, TrustBundle};
use crate::tunnel::{FrameError, TlsConfigs, handshake};

use super::*;
use crate::tunnel::buffer::{Buffer, Size};

const TICKET: [u8; 22] = [4, 0, 0, 18, 0, 0, 1, 0, 0, 0, 0, 1, 1, 0, 0, 4, 1, 2, 3, 4, 0, 0];

/// Both ends of a fresh tunnel; the client's stream is open and the server has read its OPEN.
async fn ends() -> (Codec, Codec) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let identity = |version, id: &str| {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
        let key = KeyPair::generate().unwrap();
        let svid = Svid {
            id: id.parse().unwrap(),
            chain: vec![params.signed_by(&key, &ca).unwrap().der().clone()],
            key: PrivatePkcs8KeyDer::from(key.serialize_der()),
            serial: String::new(),
            not_before: SystemTime::UNIX_EPOCH,
            not_after: SystemTime::now() + Duration::from_secs(60),
        };
        let bundle = Arc::new(TrustBundle::new(vec![ca.der().clone()]));
        Arc::new(Identity { version, svid: Arc::new(svid), bundle })
    };
    let client = identity(1, "spiffe://cluster.local/ns/a/sa/client");
    let server = identity(2, "spiffe://cluster.local/ns/a/sa/server");
    let configs = TlsConfigs::default();
    let (for_client, for_server) = (configs.of(&client).unwrap(), configs.of(&server).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (far, _) = listener.accept().await.unwrap();
    let config = Config::default();
    let (client, server) = tokio::join!(
        handshake::client(&near, &client, &for_client, &config),
        handshake::server(&far, &server, &for_server, &config),
    );
    let (mut client, mut server) = (client.unwrap().codec, server.unwrap().codec);
    // The server's real ticket.
    client.incoming.fill(&near).await.unwrap();
    assert_eq!(client.pull().unwrap(), Pulled::Data);
    client.incoming.release_if_empty();
    client.begin(Open::new(([10, 0, 0, 1], 80).into(), OriginalSrc::new(([10, 0, 0, 2], 4000).into())));
    let mut head = [0; HEADROOM];
    let start = client.seal_head(&mut head).unwrap();
    feed(&mut server, &head[start..]);
    assert!(matches!(server.pull().unwrap(), Pulled::Open(_)));
    (client, server)
}

fn feed(codec: &mut Codec, bytes: &[u8]) {
    codec.incoming.release_if_empty();
    let end = codec.incoming.end;
    let buffer = codec.incoming.buffer.get_or_insert_with(|| Buffer::take(Size::Small));
    buffer[end..end + bytes.len()].copy_from_slice(bytes);
    codec.incoming.end += bytes.len();
}

fn record(from: &mut Codec, content: ContentType, bytes: &[u8]) -> Vec<u8> {
    let mut record = vec![0; HEADER + bytes.len() + TRAILER];
    record[HEADER..HEADER + bytes.len()].copy_from_slice(bytes);
    let n = from.sealer.seal(&mut record, bytes.len(), content).unwrap();
    record.truncate(n);
    record
}

/// What the receiver makes of records with these contents.
fn say(from: &mut Codec, to: &mut Codec, contents: &[(ContentType, &[u8])]) -> Result<Pulled, Error> {
    for (content, bytes) in contents {
        let bytes = record(from, *content, bytes);
        feed(to, &bytes);
    }
    to.pull()
}

fn violation(result: Result<Pulled, Error>) -> Violation {
    match result {
        Err(Error::Protocol(violation)) => violation,
        other => panic!("no violation but {other:?}"),
    }
}

use ContentType::{Alert, ApplicationData, Handshake};

#[tokio::test]
async fn a_ticket_may_span_records_but_nothing_may_come_between() {
    let (mut client, mut server) = ends().await;
    let pieces = [(Handshake, &TICKET[..1]), (Handshake, &TICKET[1..9]), (Handshake, &TICKET[9..])];
    assert_eq!(say(&mut server, &mut client, &pieces).unwrap(), Pulled::Data);
    assert!(client.handshake.is_empty());
    let two = [TICKET, TICKET].concat();
    assert_eq!(say(&mut server, &mut client, &[(Handshake, &two)]).unwrap(), Pulled::Data);
    let between = [(Handshake, &TICKET[..9]), (ApplicationData, &[DATA, 1][..])];
    assert_eq!(violation(say(&mut server, &mut client, &between)), Violation::Interleaved);
}

#[tokio::test]
async fn only_a_server_gives_tickets() {
    let (mut client, mut server) = ends().await;
    let given = say(&mut client, &mut server, &[(Handshake, &TICKET)]);
    assert_eq!(violation(given), Violation::Handshake(4));
}

#[tokio::test]
async fn no_other_handshake_message_is_taken() {
    for kind in [0, 1, 2, 11, 13, 20, 254] {
        let (mut client, mut server) = ends().await;
        let said = say(&mut client, &mut server, &[(Handshake, &[kind, 0, 0, 0])]);
        assert_eq!(violation(said), Violation::Handshake(kind));
    }
    let (mut client, mut server) = ends().await;
    let endless = say(&mut server, &mut client, &[(Handshake, &[4, 1, 0, 1])]);
    assert_eq!(violation(endless), Violation::Handshake(4));
}

#[tokio::test]
async fn a_key_update_changes_the_key_and_stands_alone() {
    let (mut client, mut server) = ends().await;
    let asking = [KEY_UPDATE, 0, 0, 1, 1];
    assert_eq!(say(&mut client, &mut server, &[(Handshake, &asking)]).unwrap(), Pulled::Data);
    client.sealer = client.schedule.next_sealer().unwrap();
    assert_eq!(say(&mut client, &mut server, &[(ApplicationData, &[DATA, 7])]).unwrap(), Pulled::Data);
    assert!(server.incoming.has_plaintext());
    // The server owes one, ahead of its next data.
    let mut buffer = vec![0; HEADROOM + 64];
    buffer[HEADROOM + SLOT_DATA] = 8;
    let start = server.seal_head(&mut buffer[..HEADROOM]).unwrap();
    assert_eq!(HEADROOM - start, HEADER + 5 + TRAILER);
    let n = server.seal_data(&mut buffer[HEADROOM..], 1).unwrap();
    feed(&mut client, &buffer[start..HEADROOM + n]);
    assert_eq!(client.pull().unwrap(), Pulled::Data);
    assert!(client.incoming.has_plaintext());

    for bad in [&[KEY_UPDATE, 0, 0, 1, 2][..], &[KEY_UPDATE, 0, 0, 0], &[KEY_UPDATE, 0, 0, 1, 0, 4]] {
        let (mut client, mut server) = ends().await;
        let said = say(&mut client, &mut server, &[(Handshake, bad)]);
        assert_eq!(violation(said), Violation::Handshake(KEY_UPDATE));
    }
}

#[tokio::test]
async fn key_updates_without_data_come_to_an_end() {
    let (mut client, mut server) = ends().await;
    let mut update = || {
        let said = say(&mut client, &mut server, &[(Handshake, &[KEY_UPDATE, 0, 0, 1, 0])]);
        client.sealer = client.schedule.next_sealer().unwrap();
        said
    };
    for _ in 0..MAX_KEY_UPDATES {
        update().unwrap();
    }
    assert_eq!(violation(update()), Violation::KeyUpdates);
}

#[tokio::test]
async fn alerts_mean_what_they_say() {
    let (mut client, mut server) = ends().await;
    assert_eq!(say(&mut client, &mut server, &[(Alert, &[1, USER_CANCELED])]).unwrap(), Pulled::Data);
    assert_eq!(say(&mut client, &mut server, &[(Alert, &[1, CLOSE_NOTIFY])]).unwrap(), Pulled::Closed);
    let refused = say(&mut server, &mut client, &[(Alert, &[2, 48])]);
    assert!(matches!(refused, Err(Error::Refused { alert: AlertDescription::UnknownCA })));
    let (mut client, mut server) = ends().await;
    assert_eq!(violation(say(&mut client, &mut server, &[(Alert, &[1])])), Violation::Alert);
}

#[tokio::test]
async fn a_record_without_a_frame_is_refused() {
    let (mut client, mut server) = ends().await;
    let said = say(&mut client, &mut server, &[(ApplicationData, &[])]);
    assert_eq!(violation(said), Violation::Frame(FrameError::Empty));
}

#[tokio::test]
async fn a_write_is_gathered_up_to_its_limit_and_ends_at_fin() {
    let (mut client, mut server) = ends().await;
    for _ in 0..MAX_RANGES + 6 {
        let bytes = record(&mut client, ApplicationData, &[DATA, b'x']);
        feed(&mut server, &bytes);
    }
    let fin = record(&mut client, ApplicationData, &[FIN]);
    feed(&mut server, &fin);
    assert_eq!(server.pull().unwrap(), Pulled::Data);
    assert_eq!(server.incoming.discard(), MAX_RANGES);
    assert_eq!(server.pull().unwrap(), Pulled::Fin);
    assert_eq!(server.incoming.discard(), 6);
    assert!(server.order.inbound_ended());
}
