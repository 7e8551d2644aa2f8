//! Two agents' data paths on one machine, beside plain TCP and a relay without TLS: a yardstick for work on the
//! record layer and the relay. Nothing is captured and nothing decided.
//!
//! ```sh
//! cargo run --example loopback -- [direct|plain|tunnel]... [seconds=2] [cc=cubic] [only=bulk|request|connect|idle]
//! ```

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use mtls::addr::OriginalSrc;
use mtls::identity::{Identity, SpiffeId, Svid, TrustBundle};
use mtls::relay::{End, Progress, Unwritten, plain, tunnelled};
use mtls::tunnel::{Acceptor, Config, Connector, Open, Target};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};
use rustls_pki_types::PrivatePkcs8KeyDer;

type Result<T> = anyhow::Result<T>;

#[derive(Clone, Copy, PartialEq, Debug)]
enum Path {
    Direct,
    Plain,
    Tunnel,
}

#[derive(Clone)]
struct Options {
    seconds: f64,
    congestion: Option<String>,
    only: Option<String>,
}

fn main() -> Result<()> {
    let mut paths = Vec::new();
    let mut options = Options { seconds: 2.0, congestion: None, only: None };
    for argument in std::env::args().skip(1) {
        match argument.split_once('=') {
            None if argument == "direct" => paths.push(Path::Direct),
            None if argument == "plain" => paths.push(Path::Plain),
            None if argument == "tunnel" => paths.push(Path::Tunnel),
            Some(("seconds", value)) => options.seconds = value.parse()?,
            Some(("cc", value)) => options.congestion = Some(value.into()),
            Some(("only", value)) => options.only = Some(value.into()),
            _ => anyhow::bail!("unknown argument {argument:?}"),
        }
    }
    if paths.is_empty() {
        paths = vec![Path::Direct, Path::Plain, Path::Tunnel];
    }
    for path in paths {
        measure(path, &options)?;
    }
    Ok(())
}

fn measure(path: Path, options: &Options) -> Result<()> {
    let agents = Agents::start(path, options)?;
    let wanted = |name: &str| options.only.as_deref().is_none_or(|only| only == name);
    if wanted("bulk") {
        for streams in [1, 8] {
            let before = agents.cpu();
            let bytes = bulk(agents.entry, streams, options)?;
            let used = agents.cpu() - before;
            println!(
                "{path:?} bulk {streams}: {:.2} Gbit/s, {:.2} CPU s/GB",
                bytes as f64 * 8e-9 / options.seconds,
                used.as_secs_f64() / (bytes as f64 / 1e9)
            );
        }
    }
    if wanted("request") {
        for connections in [1, 64] {
            let before = agents.cpu();
            let mut latencies = requests(agents.entry, connections, options)?;
            let used = agents.cpu() - before;
            latencies.sort_unstable();
            let at = |q: f64| latencies[((latencies.len() - 1) as f64 * q) as usize] as f64 / 1e3;
            println!(
                "{path:?} request {connections}: {:.0}/s, p50 {:.0} µs, p99 {:.0} µs, {:.2} CPU s/10k",
                latencies.len() as f64 / options.seconds,
                at(0.5),
                at(0.99),
                used.as_secs_f64() / (latencies.len() as f64 / 1e4)
            );
        }
    }
    if wanted("connect") {
        for parallel in [1, 16] {
            let done = connects(agents.entry, parallel, options)?;
            println!("{path:?} connect {parallel}: {:.0}/s", done as f64 / options.seconds);
        }
    }
    if wanted("idle") {
        let resident = || -> Result<i64> {
            let statm = std::fs::read_to_string("/proc/self/statm")?;
            Ok(statm.split(' ').nth(1).unwrap_or("0").parse::<i64>()? * 4096)
        };
        let before = resident()?;
        let connections: Vec<_> = (0..2000)
            .map(|_| {
                let mut connection = TcpStream::connect(agents.entry)?;
                connection.write_all(&[b'r'; 64])?;
                connection.read_exact(&mut [0; 64])?;
                Ok(connection)
            })
            .collect::<Result<_>>()?;
        // The echoing thread's stack pages are a few KiB of this.
        println!("{path:?} idle: {} B a connection, both agents and the echo", (resident()? - before) / 2000);
        drop(connections);
    }
    Ok(())
}

// ---- load

/// Reads and discards, or echoes 64 bytes at a time, by the connection's first byte.
fn serve(listener: TcpListener) {
    for connection in listener.incoming() {
        let Ok(mut connection) = connection else { continue };
        let _ = connection.set_nodelay(true);
        let _ = std::thread::Builder::new().stack_size(32 << 10).spawn(move || {
            let mut small = [0; 64];
            if connection.read_exact(&mut small).is_err() {
                return;
            }
            if small[0] == b'b' {
                let mut buffer = vec![0; 128 << 10];
                while let Ok(1..) = connection.read(&mut buffer) {}
                return;
            }
            while connection.write_all(&small).is_ok() && connection.read_exact(&mut small).is_ok() {}
        });
    }
}

fn connect(to: SocketAddr, options: &Options) -> Result<TcpStream> {
    let connection = TcpStream::connect(to)?;
    connection.set_nodelay(true)?;
    if let Some(name) = &options.congestion {
        socket2::SockRef::from(&connection).set_tcp_congestion(name.as_bytes())?;
    }
    Ok(connection)
}

fn in_parallel<T: Send>(count: usize, work: impl Fn() -> Result<T> + Sync) -> Result<Vec<T>> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..count).map(|_| scope.spawn(&work)).collect();
        threads.into_iter().map(|thread| thread.join().expect("load thread")).collect()
    })
}

fn bulk(to: SocketAddr, streams: usize, options: &Options) -> Result<u64> {
    let counts = in_parallel(streams, || {
        let mut connection = connect(to, options)?;
        let block = vec![b'b'; 128 << 10];
        let deadline = Instant::now() + Duration::from_secs_f64(options.seconds);
        let mut sent = 0;
        while Instant::now() < deadline {
            sent += connection.write(&block)? as u64;
        }
        Ok(sent)
    })?;
    Ok(counts.iter().sum())
}

fn requests(to: SocketAddr, connections: usize, options: &Options) -> Result<Vec<u64>> {
    let latencies = in_parallel(connections, || {
        let mut connection = connect(to, options)?;
        let (ask, mut answer) = ([b'r'; 64], [0; 64]);
        let deadline = Instant::now() + Duration::from_secs_f64(options.seconds);
        let mut latencies = Vec::new();
        while Instant::now() < deadline {
            let began = Instant::now();
            connection.write_all(&ask)?;
            connection.read_exact(&mut answer)?;
            latencies.push(began.elapsed().as_nanos() as u64);
        }
        Ok(latencies)
    })?;
    Ok(latencies.concat())
}

fn connects(to: SocketAddr, parallel: usize, options: &Options) -> Result<usize> {
    let counts = in_parallel(parallel, || {
        let deadline = Instant::now() + Duration::from_secs_f64(options.seconds);
        let mut done = 0;
        while Instant::now() < deadline {
            let mut connection = connect(to, options)?;
            connection.write_all(&[b'r'; 64])?;
            connection.read_exact(&mut [0; 64])?;
            connection.shutdown(Shutdown::Write)?;
            done += 1;
        }
        Ok(done)
    })?;
    Ok(counts.iter().sum())
}

// ---- agents

struct Agents {
    entry: SocketAddr,
    cpu: Arc<[AtomicU64; 4]>,
}

impl Agents {
    fn start(path: Path, options: &Options) -> Result<Self> {
        let listener = listen(options)?;
        let mut entry = listener.local_addr()?;
        std::thread::spawn(move || serve(listener));
        let cpu = Arc::<[AtomicU64; 4]>::default();
        if path == Path::Plain {
            for worker in [0, 2] {
                let listener = listen(options)?;
                let to = entry;
                entry = listener.local_addr()?;
                start_worker(&cpu, worker, forward(listener, to, options.clone()));
            }
        }
        if path == Path::Tunnel {
            let (client, server) = identities()?;
            let inbound = listen(options)?;
            let tunnel_port = inbound.local_addr()?;
            let config = Arc::new(Config::default());
            let (app, options2) = (entry, options.clone());
            start_worker(&cpu, 0, inbound_agent(inbound, server.clone(), config.clone(), options2));
            let outbound = listen(options)?;
            entry = outbound.local_addr()?;
            let expected = server.svid.id.clone();
            let agent = outbound_agent(outbound, client, expected, tunnel_port, app, config, options.clone());
            start_worker(&cpu, 2, agent);
        }
        Ok(Self { entry, cpu })
    }

    /// CPU time of the agents' threads.
    fn cpu(&self) -> Duration {
        std::thread::sleep(Duration::from_millis(30));
        Duration::from_nanos(self.cpu.iter().map(|n| n.load(Ordering::Relaxed)).sum())
    }
}

fn listen(options: &Options) -> Result<TcpListener> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let socket = socket2::SockRef::from(&listener);
    socket.listen(4096)?;
    mtls::relay::prepare(&socket)?;
    if let Some(name) = &options.congestion {
        socket.set_tcp_congestion(name.as_bytes())?;
    }
    Ok(listener)
}

fn socket(options: &Options) -> std::io::Result<socket2::Socket> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    mtls::relay::prepare(&socket)?;
    if let Some(name) = &options.congestion {
        socket.set_tcp_congestion(name.as_bytes())?;
    }
    Ok(socket)
}

async fn dial(to: SocketAddr, options: &Options) -> std::io::Result<tokio::net::TcpStream> {
    tokio::net::TcpSocket::from_std_stream(socket(options)?.into()).connect(to).await
}

fn start_worker(
    cpu: &Arc<[AtomicU64; 4]>,
    slot: usize,
    agent: impl Future<Output = Result<()>> + Send + 'static,
) {
    let cpu = cpu.clone();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.spawn(async move {
            loop {
                let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
                // SAFETY: the pointer is to a timespec that outlives the call.
                unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
                cpu[slot].store(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        runtime.block_on(agent)
    });
}

fn accepting(listener: TcpListener) -> Result<tokio::net::TcpListener> {
    listener.set_nonblocking(true)?;
    Ok(tokio::net::TcpListener::from_std(listener)?)
}

async fn forward(listener: TcpListener, to: SocketAddr, options: Options) -> Result<()> {
    let listener = accepting(listener)?;
    loop {
        let (a, _) = listener.accept().await?;
        let options = options.clone();
        tokio::spawn(async move {
            a.set_nodelay(true)?;
            let b = dial(to, &options).await?;
            plain(&a, &b, Unwritten::default(), &Progress::default(), std::future::pending()).await;
            Result::Ok(())
        });
    }
}

async fn inbound_agent(
    listener: TcpListener,
    identity: Arc<Identity>,
    config: Arc<Config>,
    options: Options,
) -> Result<()> {
    let (listener, acceptor) = (accepting(listener)?, Acceptor::new(config));
    loop {
        let (tcp, _) = listener.accept().await?;
        let (acceptor, identity, options) = (acceptor.clone(), identity.clone(), options.clone());
        tokio::spawn(async move {
            let mut tunnel = acceptor.accept(tcp, &identity).await?;
            while let Some(request) = tunnel.next().await? {
                let (open, stream) = request.accept();
                let app = dial(open.destination, &options).await?;
                let report = tunnelled(&app, stream, &Progress::default(), std::future::pending()).await;
                if !matches!(report.end, End::Clean) {
                    break;
                }
            }
            Result::Ok(())
        });
    }
}

async fn outbound_agent(
    listener: TcpListener,
    identity: Arc<Identity>,
    expected: SpiffeId,
    tunnel_port: SocketAddr,
    app: SocketAddr,
    config: Arc<Config>,
    options: Options,
) -> Result<()> {
    let (listener, connector) = (accepting(listener)?, Connector::new(config));
    loop {
        let (captured, source) = listener.accept().await?;
        let (connector, identity, expected, options) =
            (connector.clone(), identity.clone(), expected.clone(), options.clone());
        tokio::spawn(async move {
            captured.set_nodelay(true)?;
            let open = Open::new(app, OriginalSrc::new(source));
            let target = Target { identity: &identity, expected: &expected, netns: 0, address: tunnel_port };
            let mut stream = connector.open(target, open, || socket(&options)).await?;
            tunnelled(&captured, &mut stream, &Progress::default(), std::future::pending()).await;
            Result::Ok(())
        });
    }
}

fn identities() -> Result<(Arc<Identity>, Arc<Identity>)> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    let mut by_id = HashMap::new();
    for (version, id) in
        (1..).zip(["spiffe://cluster.local/ns/a/sa/client", "spiffe://cluster.local/ns/a/sa/server"])
    {
        let mut params = CertificateParams::new(Vec::new())?;
        params.subject_alt_names = vec![SanType::URI(id.try_into()?)];
        let key = KeyPair::generate()?;
        let cert = params.signed_by(&key, &ca)?;
        let svid = Svid {
            id: id.parse()?,
            chain: vec![cert.der().clone()],
            key: PrivatePkcs8KeyDer::from(key.serialize_der()),
            serial: String::new(),
            not_before: SystemTime::UNIX_EPOCH,
            not_after: SystemTime::now() + Duration::from_secs(3600),
        };
        let bundle = Arc::new(TrustBundle::new(vec![ca.der().clone()]));
        by_id.insert(version, Arc::new(Identity { version, svid: Arc::new(svid), bundle }));
    }
    let take = |version| by_id.get(&version).cloned().ok_or_else(|| anyhow::anyhow!("no identity"));
    Ok((take(1)?, take(2)?))
}
