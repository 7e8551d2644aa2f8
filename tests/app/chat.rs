//! gRPC: one bidirectional stream, by the library most Rust services use.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::{Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

use crate::report;

mod wire {
    tonic::include_proto!("lab");
}

use wire::chat_client::ChatClient;
use wire::chat_server::{Chat, ChatServer};
use wire::{Answer, Line};

#[derive(clap::Args)]
pub struct ChatServe {
    #[arg(long)]
    listen: SocketAddr,
}

#[derive(clap::Args)]
pub struct ChatDial {
    to: SocketAddr,
    #[arg(long, default_value_t = 100)]
    lines: u32,
    #[arg(long, default_value = "hello")]
    message: String,
}

struct Room;

#[tonic::async_trait]
impl Chat for Room {
    type TalkStream = ReceiverStream<Result<Answer, Status>>;

    async fn talk(&self, request: Request<Streaming<Line>>) -> Result<Response<Self::TalkStream>, Status> {
        let caller = request.remote_addr().map(|addr| addr.to_string()).unwrap_or_default();
        report(&json!({ "accepted": caller }));
        let mut lines = request.into_inner();
        let (answers, stream) = mpsc::channel(16);
        tokio::spawn(async move {
            let mut earlier = 0;
            while let Some(Ok(line)) = lines.next().await {
                let answer = Answer { text: line.text, caller: caller.clone(), earlier };
                if answers.send(Ok(answer)).await.is_err() {
                    break;
                }
                earlier += 1;
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

impl ChatServe {
    pub fn run(self) -> Result<()> {
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
            let listener =
                TcpListener::bind(self.listen).await.with_context(|| format!("listen on {}", self.listen))?;
            report(&json!({ "listening": listener.local_addr()? }));
            let incoming = TcpListenerStream::new(listener);
            Server::builder().add_service(ChatServer::new(Room)).serve_with_incoming(incoming).await?;
            Ok(())
        })
    }
}

impl ChatDial {
    pub fn run(self) -> Result<()> {
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
            let endpoint = Endpoint::from_shared(format!("http://{}", self.to))?
                .connect_timeout(Duration::from_secs(20));
            let mut client = ChatClient::new(endpoint.connect().await?);
            let (lines, stream) = mpsc::channel(1);
            lines.send(Line { text: self.message.clone() }).await?;
            let mut answers = client.talk(ReceiverStream::new(stream)).await?.into_inner();
            let mut caller = String::new();
            // Each line waits for the answer to the one before: the stream is alive in both directions at once.
            for turn in 0..u64::from(self.lines) {
                let answer = answers.next().await.context("the stream ended early")??;
                ensure!(answer.text == self.message && answer.earlier == turn, "turn {turn}: {answer:?}");
                caller = answer.caller;
                if turn + 1 < u64::from(self.lines) {
                    lines.send(Line { text: self.message.clone() }).await?;
                }
            }
            drop(lines);
            ensure!(answers.next().await.is_none(), "an answer too many");
            report(&json!({ "connected": true, "turns": self.lines, "caller": caller, "ended": "eof" }));
            Ok(())
        })
    }
}
