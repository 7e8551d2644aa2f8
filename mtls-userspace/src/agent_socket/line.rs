//! Lines over a unix socket, with open files beside them: the agent's end and its callers'.

use std::io::{self, BufRead, BufReader, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream as Blocking;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::Interest;
use tokio::net::UnixStream;

/// Of a line; a CNI runtime's list of containers is the longest.
const MAX_LINE: usize = 1 << 20;

/// One caller, as either end sees it.
pub struct Conversation {
    stream: UnixStream,
    read: Vec<u8>,
    files: Vec<OwnedFd>,
}

impl Conversation {
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, read: Vec::new(), files: Vec::new() }
    }

    /// Calls the agent on a socket.
    ///
    /// # Errors
    ///
    /// When none answers.
    pub async fn call(path: &Path) -> Result<Self, Error> {
        let stream = UnixStream::connect(path).await;
        Ok(Self::new(stream.map_err(|source| Error::NoAgent { path: path.into(), source })?))
    }

    /// The next line; `None` when the caller has gone.
    ///
    /// # Errors
    ///
    /// A line that is too long or not what is expected, or a broken connection.
    pub async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Error> {
        loop {
            if let Some(end) = self.read.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.read.drain(..=end).collect();
                return serde_json::from_slice(&line).map(Some).map_err(Error::Line);
            }
            if self.read.len() > MAX_LINE {
                return Err(Error::TooLong);
            }
            self.stream.readable().await?;
            match self.stream.try_io(Interest::READABLE, || receive(self.stream.as_raw_fd())) {
                Ok((bytes, _)) if bytes.is_empty() => return Ok(None),
                Ok((bytes, files)) => {
                    self.read.extend(bytes);
                    self.files.extend(files);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// An open file that came along with the lines so far.
    pub fn file(&mut self) -> Option<OwnedFd> {
        self.files.pop()
    }

    pub async fn say(&mut self, line: &impl Serialize) -> Result<(), Error> {
        let bytes = written(line)?;
        let mut left = bytes.as_slice();
        while !left.is_empty() {
            self.stream.writable().await?;
            match self.stream.try_write(left) {
                Ok(sent) => left = left.get(sent..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// A caller without a runtime, that asks once.
pub struct Ask(BufReader<Blocking>);

impl Ask {
    /// Calls the agent on a socket; it has this long to answer.
    ///
    /// # Errors
    ///
    /// When none answers.
    pub fn call(path: &Path, patience: Duration) -> Result<Self, Error> {
        let failed = |source| Error::NoAgent { path: path.into(), source };
        let stream = Blocking::connect(path).map_err(failed)?;
        stream.set_read_timeout(Some(patience)).map_err(failed)?;
        stream.set_write_timeout(Some(patience)).map_err(failed)?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Sends a line, with an open file beside it, and reads the answer.
    ///
    /// # Errors
    ///
    /// When the agent goes away, is silent, or answers something else.
    pub fn ask<T: DeserializeOwned>(
        &mut self,
        line: &impl Serialize,
        file: Option<&impl AsRawFd>,
    ) -> Result<T, Error> {
        let bytes = written(line)?;
        let descriptors: Vec<RawFd> = file.iter().map(|file| file.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&descriptors)];
        let rights = if descriptors.is_empty() { &[][..] } else { &rights[..] };
        let socket = self.0.get_ref();
        let sent = sendmsg::<UnixAddr>(
            socket.as_raw_fd(),
            &[IoSlice::new(&bytes)],
            rights,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .map_err(io::Error::from)?;
        io::Write::write_all(&mut self.0.get_ref(), bytes.get(sent..).unwrap_or_default())?;
        let mut answer = String::new();
        match self.0.read_line(&mut answer) {
            Ok(0) => Err(Error::Gone),
            Ok(_) => serde_json::from_str(&answer).map_err(Error::Line),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(Error::Silent),
            Err(error) => Err(error.into()),
        }
    }
}

fn written(line: &impl Serialize) -> Result<Vec<u8>, Error> {
    let mut bytes = serde_json::to_vec(line).map_err(Error::Line)?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// What has arrived, and the files that came with it.
fn receive(socket: RawFd) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = vec![0; 4096];
    let mut space = nix::cmsg_space!([RawFd; 4]);
    let mut files = Vec::new();
    let read = {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let message = recvmsg::<UnixAddr>(socket, &mut parts, Some(&mut space), flags)?;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(descriptors) = control {
                // SAFETY: the kernel has just given us these descriptors, and nobody else knows them.
                files.extend(descriptors.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        message.bytes
    };
    bytes.truncate(read);
    Ok((bytes, files))
}

/// Why a conversation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no agent answers on {path}: {source}", path = path.display())]
    NoAgent { path: PathBuf, source: io::Error },
    #[error("the agent does not answer in time")]
    Silent,
    #[error("the agent went away before it answered")]
    Gone,
    #[error("a line over the agent's socket is longer than {MAX_LINE} bytes")]
    TooLong,
    #[error("a line over the agent's socket cannot be understood: {0}")]
    Line(serde_json::Error),
    #[error("the agent's socket: {0}")]
    Socket(#[from] io::Error),
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::MetadataExt;

    use super::super::{Answer, Request};
    use super::*;

    #[tokio::test]
    async fn a_line_arrives_whole_with_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let long = vec!["c".repeat(64); 1000];
        let request = Request::Gc { containers: long };
        let (sent, socket) = (request.clone(), path.clone());
        let caller = std::thread::spawn(move || {
            let file = File::open("/proc/self/ns/net").unwrap();
            Ask::call(&socket, Duration::from_secs(5)).unwrap().ask::<Answer>(&sent, Some(&file)).unwrap()
        });
        let mut conversation = Conversation::new(listener.accept().await.unwrap().0);
        assert_eq!(conversation.next::<Request>().await.unwrap(), Some(request));
        let file = File::from(conversation.file().unwrap());
        let here = std::fs::metadata("/proc/self/ns/net").unwrap();
        assert_eq!(file.metadata().unwrap().ino(), here.ino());
        assert!(conversation.file().is_none());
        conversation.say(&Answer::Protected).await.unwrap();
        assert_eq!(caller.join().unwrap(), Answer::Protected);
        assert_eq!(conversation.next::<Request>().await.unwrap(), None);
    }

    #[test]
    fn a_silent_agent_and_an_absent_one_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        assert!(matches!(Ask::call(&path, Duration::from_secs(1)), Err(Error::NoAgent { .. })));
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let mut ask = Ask::call(&path, Duration::from_millis(50)).unwrap();
        let answer = ask.ask::<Answer>(&Request::Status, None::<&File>);
        assert!(matches!(answer, Err(Error::Silent)), "{answer:?}");
    }
}
