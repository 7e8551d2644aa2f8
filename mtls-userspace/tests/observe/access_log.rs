//! The access log: one line per connection that ended or was refused.

use std::io::Write;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use mtls::addr::OriginalSrc;
use mtls::observe::{AccessLog, Direction, Ending, Flow, Observer, Refusal, Settings};
use mtls::policy::Reason;
use serde_json::{Value, json};

use crate::agent::{Agent, Lines};
use crate::flows::{CIPHER, denied, stranger_to_db, strict, web_to_db};

fn only(lines: &[String]) -> &str {
    assert_eq!(lines.len(), 1, "{lines:#?}");
    &lines[0]
}

/// Takes out what the clock decides, having checked that it is plausible.
fn untimed(line: &str) -> Value {
    let mut line: Value = serde_json::from_str(line).unwrap();
    let time = line["time"].take();
    let time = time.as_str().unwrap();
    let at: Timestamp = time.parse().unwrap();
    assert!((Timestamp::now().as_second() - at.as_second()).abs() < 60, "{time}");
    assert!(time.ends_with('Z') && time.len() == "2026-01-01T00:00:00.000Z".len(), "{time}");
    assert!(line["duration_ms"].take().as_u64().unwrap() < 60_000);
    line
}

#[test]
fn a_json_line_says_who_spoke_to_whom_and_how_it_ended() {
    let agent = Agent::logging(AccessLog::Json);
    let connection = agent.observer.open(web_to_db(Direction::Outbound));
    connection.progress().add_sent(1000);
    connection.progress().add_received(7);
    assert_eq!(agent.lines(), [""; 0], "an open connection has no line yet");
    connection.close(Ending::Clean);
    let expected = json!({
        "time": null,
        "direction": "outbound",
        "path": "tunnel",
        "source_address": "10.0.1.2:41000",
        "source_workload": "shop/web-7d9f6c5b8-x2x9z",
        "source_identity": "spiffe://cluster.local/ns/shop/sa/web",
        "destination_address": "10.0.2.3:5432",
        "original_destination": "10.96.0.9:5432",
        "destination_workload": "data/db-0",
        "destination_identity": "spiffe://cluster.local/ns/data/sa/db",
        "service": "data/postgres",
        "cipher": CIPHER,
        "records": "userspace",
        "bytes_sent": 1000,
        "bytes_received": 7,
        "duration_ms": null,
        "ending": "clean",
        "reason": null,
    });
    assert_eq!(untimed(only(&agent.lines())), expected);
}

#[test]
fn a_text_line_has_the_same_fields_and_a_dash_for_what_is_not_known() {
    let agent = Agent::logging(AccessLog::Text);
    agent.observer.refused(stranger_to_db(), strict());
    let lines = agent.lines();
    let (time, line) = only(&lines).split_once(' ').unwrap();
    time.strip_prefix("time=").unwrap().parse::<Timestamp>().unwrap();
    assert_eq!(
        line,
        "direction=inbound path=plaintext source_address=192.0.2.7:5000 source_workload=- source_identity=- \
         destination_address=10.0.2.3:5432 original_destination=- destination_workload=data/db-0 \
         destination_identity=- service=- cipher=- records=- bytes_sent=0 bytes_received=0 duration_ms=0 \
         ending=refused reason=\"plaintext to a STRICT port\""
    );
}

#[test]
fn every_ending_has_its_word_and_its_reason() {
    let by_peer = || Refusal::DeniedByPeer { detail: "denied by data/only-shop".into() };
    let table = [
        (Ending::Clean, "clean", Value::Null),
        (Ending::ResetBySource, "reset_by_source", Value::Null),
        (Ending::ResetByDestination, "reset_by_destination", Value::Null),
        (Ending::Rejected(by_peer()), "rejected", json!("the destination's agent: denied by data/only-shop")),
        (
            Ending::Rejected(denied(Reason::NoAllowMatched, None)),
            "rejected",
            json!("no ALLOW policy matched"),
        ),
        (Ending::Revoked("data/strict".into()), "revoked", json!("data/strict")),
        (Ending::Truncated, "truncated", Value::Null),
        (Ending::Error("no route".into()), "error", json!("no route")),
    ];
    let agent = Agent::logging(AccessLog::Json);
    for (ending, _, _) in &table {
        agent.observer.open(web_to_db(Direction::Inbound)).close(ending.clone());
    }
    let lines = agent.lines();
    assert_eq!(lines.len(), table.len());
    for (line, (_, word, reason)) in lines.iter().zip(table) {
        let line = untimed(line);
        assert_eq!((&line["ending"], &line["reason"]), (&json!(word), &reason));
    }
}

#[test]
fn a_task_that_dies_leaves_an_aborted_line() {
    let agent = Agent::logging(AccessLog::Json);
    drop(agent.observer.open(web_to_db(Direction::Inbound)));
    assert_eq!(untimed(only(&agent.lines()))["ending"], "aborted");
    assert_eq!(agent.observer.open_connections(), 0);
}

#[test]
fn a_reason_cannot_forge_a_line_or_drive_a_terminal() {
    let reason = "x\" ending=clean\n{\"ending\":\"clean\"}\u{1b}[2J\u{9b}31m\u{7f}";
    for access_log in [AccessLog::Json, AccessLog::Text] {
        let agent = Agent::logging(access_log);
        agent.observer.open(web_to_db(Direction::Inbound)).close(Ending::Error(reason.into()));
        let lines = agent.lines();
        let line = only(&lines);
        assert!(!line.contains(char::is_control), "{line:?}");
        if access_log == AccessLog::Json {
            assert_eq!(untimed(line)["reason"], reason);
        } else {
            assert!(line.contains(" ending=error reason=\"x\\\" ending=clean\\n{"), "{line}");
        }
    }
}

#[test]
fn an_access_log_that_is_off_writes_nothing() {
    let agent = Agent::start();
    agent.observer.open(web_to_db(Direction::Inbound)).close(Ending::Clean);
    agent.observer.refused(stranger_to_db(), strict());
    assert_eq!(agent.lines(), [""; 0]);
}

/// An output that takes nothing until it is let go.
struct Stuck {
    writing: Sender<()>,
    go: Receiver<()>,
    out: Lines,
}

impl Write for Stuck {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let _ = self.writing.send(());
        let _ = self.go.recv();
        self.out.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_stuck_output_holds_up_no_connection_and_lost_lines_are_said() {
    const CONNECTIONS: u64 = 20_000;
    let ((writing, written), (go, wait)) = (channel(), channel());
    let out = Lines::default();
    let stuck = Stuck { writing, go: wait, out: out.clone() };
    let settings = Settings { access_log: AccessLog::Json, ..Settings::new("node-a") };
    let observer = Observer::with_log(settings, Box::new(stuck));
    observer.refused(stranger_to_db(), strict());
    written.recv_timeout(Duration::from_secs(10)).unwrap();
    let start = Instant::now();
    for port in 0..CONNECTIONS {
        let from = OriginalSrc::new(([10, 0, 1, 2], port as u16).into());
        observer.open(Flow { original_src: from, ..web_to_db(Direction::Inbound) }).close(Ending::Clean);
    }
    assert!(start.elapsed() < Duration::from_secs(30), "connections waited for the log");
    assert!(!observer.flush_access_log(Duration::from_millis(50)), "the output is stuck");
    drop(go);
    assert!(observer.flush_access_log(Duration::from_secs(30)));
    let lines = out.all();
    let lost: u64 = lines
        .iter()
        .filter_map(|line| serde_json::from_str::<Value>(line).unwrap()["access_log_lines_lost"].as_u64())
        .sum();
    let kept = lines.iter().filter(|line| line.contains("\"ending\":\"clean\"")).count() as u64;
    assert!(lost > 0 && kept > 0, "{lost} lost, {kept} kept");
    assert_eq!(lost + kept, CONNECTIONS);
}
