//! Traffic from `shop/cart` on node-a to `shop/db` on node-b, through tunnels with the identities that the two agents
//! hold at each moment: short connections one after the other, and long ones that stay open all the time.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mtls::addr::OriginalSrc;
use mtls::identity::{Config, Identities, Identity, SpiffeId};
use mtls::relay::{Progress, tunnelled};
use mtls::tunnel::{self, Acceptor, Connector, Open, Target};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::bench::*;

/// The two agents, each with its own authority's view, and the echo server behind the second.
pub struct Ends {
    pub cart: Arc<Identities>,
    pub db: Arc<Identities>,
    pub connector: Connector,
    tunnels: SocketAddr,
    echo: SocketAddr,
    /// What the server's end could not accept.
    pub refused: Arc<Mutex<Vec<tunnel::Error>>>,
}

impl Ends {
    pub async fn start(bench: &Bench, config: Config) -> Self {
        let keep = |token: &str, id: SpiffeId| {
            let identities = Identities::new(Arc::new(bench.remote(token)), config.clone());
            identities.want(HashSet::from([id]));
            tokio::spawn(identities.clone().run(std::future::pending()));
            identities
        };
        let (cart_end, db_end) = (keep(TOKEN_A, cart()), keep(TOKEN_B, db()));
        let long = Duration::from_secs(20);
        cart_end.ready(&cart(), long).await.unwrap();
        db_end.ready(&db(), long).await.unwrap();

        let echo = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let tunnels = TcpListener::bind("127.0.0.1:0").await.unwrap();
        // No idle tunnels: every connection is a handshake, of which some resume a session.
        let connector = Connector::new(Arc::new(tunnel::Config { idle_total: 0, ..Default::default() }));
        let ends = Self {
            cart: cart_end,
            db: db_end.clone(),
            connector,
            tunnels: tunnels.local_addr().unwrap(),
            echo: echo.local_addr().unwrap(),
            refused: Arc::default(),
        };
        tokio::spawn(serve_echo(echo));
        tokio::spawn(accept(tunnels, db_end, ends.refused.clone()));
        ends
    }

    /// The application's end of a new connection, as the agent opens it for the identity it holds now.
    pub async fn open(&self) -> Result<TcpStream, tunnel::Error> {
        let identity = self.cart.current(&cart()).expect("an identity at every moment");
        self.open_as(&identity).await
    }

    pub async fn open_as(&self, identity: &Arc<Identity>) -> Result<TcpStream, tunnel::Error> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let app = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (captured, source) = listener.accept().await.unwrap();
        let open = Open::new(self.echo, OriginalSrc::new(source));
        let target = Target { identity, expected: &db(), netns: 0, address: self.tunnels };
        let mut stream = self.connector.open(target, open, dial).await?;
        tokio::spawn(async move {
            tunnelled(&captured, &mut stream, &Progress::default(), std::future::pending()).await;
        });
        Ok(app)
    }
}

async fn accept(tunnels: TcpListener, db_end: Arc<Identities>, refused: Arc<Mutex<Vec<tunnel::Error>>>) {
    let acceptor = Acceptor::new(Arc::new(tunnel::Config::default()));
    loop {
        let (tcp, _) = tunnels.accept().await.unwrap();
        let identity = db_end.current(&db()).expect("an identity at every moment");
        let (acceptor, refused) = (acceptor.clone(), refused.clone());
        tokio::spawn(async move {
            match acceptor.accept(tcp, &identity).await {
                Ok(mut tunnel) => {
                    while let Ok(Some(request)) = tunnel.next().await {
                        let app = TcpStream::connect(request.open().destination).await.unwrap();
                        let (_, stream) = request.accept();
                        tunnelled(&app, stream, &Progress::default(), std::future::pending()).await;
                    }
                }
                Err(error) => refused.lock().unwrap().push(error),
            }
        });
    }
}

async fn serve_echo(listener: TcpListener) {
    loop {
        let (mut app, _) = listener.accept().await.unwrap();
        tokio::spawn(async move {
            let (mut read, mut write) = app.split();
            let _ = tokio::io::copy(&mut read, &mut write).await;
        });
    }
}

fn dial() -> std::io::Result<socket2::Socket> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Traffic that is never to be interrupted.
pub struct Traffic {
    ends: Arc<Ends>,
    counted: Arc<AtomicU64>,
    flowing: tokio::task::JoinHandle<()>,
    long: Vec<TcpStream>,
}

impl Traffic {
    pub async fn start(ends: Arc<Ends>) -> Self {
        let mut long = Vec::new();
        for _ in 0..3 {
            long.push(ends.open().await.unwrap());
        }
        let counted = Arc::new(AtomicU64::new(0));
        let (counting, through) = (counted.clone(), ends.clone());
        let flowing = tokio::spawn(async move {
            loop {
                let mut app = through.open().await.unwrap_or_else(|error| panic!("refused: {error}"));
                exchange(&mut app).await;
                app.shutdown().await.unwrap();
                assert_eq!(app.read(&mut [0; 1]).await.unwrap(), 0, "a clean end");
                counting.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        Self { ends, counted, flowing, long }
    }

    /// Short connections that began and ended well.
    pub fn count(&self) -> u64 {
        self.counted.load(Ordering::Relaxed)
    }

    /// Fails if any connection was dropped or refused until now.
    pub async fn unharmed(&mut self) {
        let before = self.count();
        for app in &mut self.long {
            exchange(app).await;
        }
        // Whatever has gone wrong shows before two more have come through.
        while self.count() < before + 2 {
            if self.flowing.is_finished() {
                (&mut self.flowing).await.unwrap();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let refused = self.ends.refused.lock().unwrap();
        assert!(refused.is_empty(), "{refused:?}");
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.flowing.abort();
    }
}

pub async fn exchange(app: &mut TcpStream) {
    app.write_all(b"ping").await.unwrap();
    let mut answer = [0; 4];
    let reading = tokio::time::timeout(Duration::from_secs(20), app.read_exact(&mut answer));
    reading.await.expect("an answer").unwrap();
    assert_eq!(&answer, b"ping");
}
