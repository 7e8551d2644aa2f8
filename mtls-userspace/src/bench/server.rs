//! The load server: does with a connection what its header says.

use std::io;
use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::{CHUNK, Header, Purpose};

/// Serves until the task is dropped.
pub async fn serve(listen: SocketAddr) -> io::Result<()> {
    let listener = TcpListener::bind(listen).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(async move {
            // A client that goes away ends its connection and nothing else.
            let _ = connection(stream).await;
        });
    }
}

async fn connection(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut header = [0; Header::LEN];
    stream.read_exact(&mut header).await?;
    let Some(header) = Header::decode(header) else { return Err(io::ErrorKind::InvalidData.into()) };
    match header.purpose {
        Purpose::Sink => {
            let mut chunk = vec![0; CHUNK];
            let mut total = 0u64;
            loop {
                match stream.read(&mut chunk).await? {
                    0 => return stream.write_all(&total.to_be_bytes()).await,
                    n => total += n as u64,
                }
            }
        }
        Purpose::Source => {
            let chunk = vec![0x5a; CHUNK];
            loop {
                stream.write_all(&chunk).await?;
            }
        }
        Purpose::Echo => {
            let mut request = vec![0; header.size as usize];
            while stream.read_exact(&mut request).await.is_ok() {
                stream.write_all(&request).await?;
            }
            Ok(())
        }
    }
}
