//! The load client and server: every workload does what it says, and a connection that is lost is an error.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
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

/// Through a proxy that changes one byte far into the second connection, or none.
#[test]
fn a_byte_that_changed_on_its_way_is_noticed() {
    for changed in [None, Some(300_000)] {
        let (to, listener) = (server(), TcpListener::bind("127.0.0.1:0").unwrap());
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for (number, from) in listener.incoming().enumerate() {
                let (mut from, mut to) = (from.unwrap(), TcpStream::connect(to).unwrap());
                let (mut back, mut answer) = (to.try_clone().unwrap(), from.try_clone().unwrap());
                thread::spawn(move || std::io::copy(&mut back, &mut answer));
                let (mut passed, mut buffer) = (0, vec![0; 10_000]);
                while let Ok(n @ 1..) = from.read(&mut buffer) {
                    if let Some(at) = changed.filter(|at| number == 1 && (passed..passed + n).contains(at)) {
                        buffer[at - passed] ^= 1;
                    }
                    passed += n;
                    to.write_all(&buffer[..n]).unwrap();
                }
            }
        });
        let outcome = run(address, load(Workload::Verify, 2));
        match changed {
            None => assert_eq!(outcome.unwrap().bytes, 2 * 64 * 65_536),
            Some(_) => assert!(outcome.unwrap_err().to_string().contains("came back as another")),
        }
    }
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
