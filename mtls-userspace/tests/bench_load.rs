//! The load client and server: every workload does what it says, and a connection that is lost is an error.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::io::Read;
use std::net::{SocketAddr, TcpListener};
use std::thread;
use std::time::Duration;

use mtls::bench::{Load, Report, Server, Workload, run};

fn server() -> SocketAddr {
    let server = Server::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = server.address().unwrap();
    thread::spawn(|| server.run());
    address
}

fn load(workload: Workload, connections: usize) -> Load {
    Load { workload, connections, size: 1024, rate: 500.0, duration: Duration::from_millis(100) }
}

fn measure(workload: Workload, connections: usize) -> Report {
    run(server(), load(workload, connections)).unwrap()
}

#[test]
fn bulk_goes_both_ways_on_several_connections() {
    for workload in [Workload::Upload, Workload::Download] {
        let report = measure(workload, 8);
        assert!(report.bytes > 1_000_000 && report.seconds >= 0.1, "{workload:?}: {report:?}");
    }
}

#[test]
fn requests_are_answered_on_every_connection() {
    for connections in [1, 64] {
        let report = measure(Workload::Request, connections);
        assert!(report.exchanges > 100 && report.all_exchanges > report.exchanges, "{report:?}");
        assert_eq!(report.bytes, report.exchanges * 1024);
    }
}

#[test]
fn a_paced_load_sends_as_many_requests_as_were_due() {
    let report = measure(Workload::Paced, 16);
    assert_eq!((report.exchanges, report.all_exchanges), (50, 66), "{report:?}");
}

#[test]
fn connections_are_made_one_after_another() {
    let report = measure(Workload::Connect, 4);
    assert!(report.exchanges > 20, "{report:?}");
    let report = measure(Workload::First, 1);
    assert_eq!(report.exchanges, 1, "{report:?}");
}

#[test]
fn a_lost_connection_is_an_error_and_no_measurement() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        // Reads a little and goes.
        for mut stream in listener.incoming().flatten() {
            let _ = stream.read(&mut [0; 16]);
        }
    });
    for workload in [Workload::Request, Workload::Paced, Workload::Connect, Workload::First, Workload::Upload]
    {
        assert!(run(address, load(workload, 2)).is_err(), "{workload:?}");
    }
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    assert!(run(nobody, load(Workload::Connect, 2)).is_err());
}
