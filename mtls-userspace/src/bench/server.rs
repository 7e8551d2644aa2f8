//! The load server: does with a connection what its first byte says.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;

use socket2::{Domain, Protocol, Socket, Type};

use super::poll::{Interest, Poll, Ready, not_ready};
use super::{CHUNK, Purpose};

/// As many as the kernel allows: a burst of new connections is the client's choice, not ours to refuse.
const BACKLOG: i32 = 8192;

/// A server that listens.
pub struct Server {
    listener: TcpListener,
    poll: Poll,
    /// By the number of their descriptor.
    connections: Vec<Option<Connection>>,
    chunk: Vec<u8>,
}

struct Connection {
    stream: TcpStream,
    state: State,
}

enum State {
    New,
    Sink {
        total: u64,
    },
    Source,
    /// What could not be sent back yet.
    Echo {
        pending: Vec<u8>,
    },
}

/// Whether a connection goes on.
type Step = io::Result<bool>;

/// Serves for as long as the process lives.
pub fn serve(listen: SocketAddr) -> io::Result<()> {
    Server::bind(listen)?.run()
}

impl Server {
    pub fn bind(listen: SocketAddr) -> io::Result<Self> {
        let socket =
            Socket::new(Domain::for_address(listen), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.bind(&listen.into())?;
        socket.listen(BACKLOG)?;
        let poll = Poll::new()?;
        poll.add(&socket, socket.as_raw_fd() as usize, Interest::Read)?;
        Ok(Self { listener: socket.into(), poll, connections: Vec::new(), chunk: vec![0x5a; CHUNK] })
    }

    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    pub fn run(mut self) -> io::Result<()> {
        let mut ready = Ready::new();
        let listener = self.listener.as_raw_fd() as usize;
        loop {
            self.poll.wait(&mut ready, None)?;
            for key in ready.keys() {
                if key == listener {
                    self.accept()?;
                    continue;
                }
                let Some(Some(connection)) = self.connections.get_mut(key) else { continue };
                // A client that goes away ends its connection and nothing else.
                if !connection.step(&self.poll, key, &mut self.chunk).unwrap_or(false) {
                    self.connections[key] = None;
                }
            }
        }
    }

    fn accept(&mut self) -> io::Result<()> {
        loop {
            let (stream, _) = match self.listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if not_ready(&error) => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::ECONNABORTED) => continue,
                Err(error) => return Err(error),
            };
            stream.set_nonblocking(true)?;
            stream.set_nodelay(true)?;
            let key = stream.as_raw_fd() as usize;
            self.poll.add(&stream, key, Interest::Read)?;
            if self.connections.len() <= key {
                self.connections.resize_with(key + 1, || None);
            }
            self.connections[key] = Some(Connection { stream, state: State::New });
        }
    }
}

impl Connection {
    fn step(&mut self, poll: &Poll, key: usize, chunk: &mut [u8]) -> Step {
        let result = match &mut self.state {
            State::New => self.begin(poll, key, chunk),
            State::Sink { .. } => self.sink(chunk),
            State::Source => self.stream.write(chunk).map(|_| true),
            State::Echo { pending } if pending.is_empty() => self.echo(poll, key, chunk),
            State::Echo { pending } => flush(&mut self.stream, pending, poll, key),
        };
        match result {
            Err(error) if not_ready(&error) => Ok(true),
            other => other,
        }
    }

    fn begin(&mut self, poll: &Poll, key: usize, chunk: &mut [u8]) -> Step {
        let mut purpose = [0];
        if self.stream.read(&mut purpose)? == 0 {
            return Ok(false);
        }
        match Purpose::decode(purpose[0]) {
            Some(Purpose::Sink) => self.state = State::Sink { total: 0 },
            Some(Purpose::Source) => {
                self.state = State::Source;
                poll.change(&self.stream, key, Interest::Write)?;
            }
            Some(Purpose::Echo) => {
                self.state = State::Echo { pending: Vec::new() };
                // The first request often came along.
                return self.echo(poll, key, chunk);
            }
            None => return Ok(false),
        }
        Ok(true)
    }

    fn sink(&mut self, chunk: &mut [u8]) -> Step {
        let State::Sink { total } = &mut self.state else { return Ok(false) };
        let n = self.stream.read(chunk)?;
        *total += n as u64;
        if n == 0 {
            self.stream.write_all(&total.to_be_bytes())?;
        }
        Ok(n > 0)
    }

    fn echo(&mut self, poll: &Poll, key: usize, chunk: &mut [u8]) -> Step {
        let n = self.stream.read(chunk)?;
        let sent = match self.stream.write(&chunk[..n]) {
            Err(error) if not_ready(&error) => 0,
            other => other?,
        };
        if sent < n {
            self.state = State::Echo { pending: chunk[sent..n].to_vec() };
            poll.change(&self.stream, key, Interest::Write)?;
        }
        Ok(n > 0)
    }
}

/// Sends what is left of an echo, and reads again once it is gone.
fn flush(stream: &mut TcpStream, pending: &mut Vec<u8>, poll: &Poll, key: usize) -> Step {
    let sent = stream.write(pending)?;
    pending.drain(..sent);
    if pending.is_empty() {
        poll.change(stream, key, Interest::Read)?;
    }
    Ok(true)
}
