//! Fewer wake-ups for a fast stream: while records come in faster than [`FAST`], the kernel wakes us for a batch of
//! them, not for each segment.
//!
//! A sender that paces (BBR) puts segments on the wire one at a time, and each would wake this thread, and after it the
//! application, for 64 KiB. So a stream that was fast for a while gets a low-water mark (`SO_RCVLOWAT`); it is taken away
//! when nothing was received for [`PAUSE`], so that the last bytes before a pause are late by no more than two of those.

use std::future::Future;
use std::pin::Pin;
use std::task::Context;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};

use crate::tunnel::low_water;

/// Received this much in [`SHORT`]: fast, some 2 Gbit/s.
const FAST: usize = 4 << 20;
const SHORT: Duration = Duration::from_millis(16);
/// What the kernel gathers before it wakes us.
const BATCH: usize = 256 * 1024;
const PAUSE: Duration = Duration::from_millis(1);

/// How steadily a direction's bytes come. Owns nothing while it carries little.
#[derive(Default)]
pub(super) struct Steady(Option<Box<Pace>>);

struct Pace {
    /// Bytes since the last look.
    seen: usize,
    looked: Instant,
    /// There while the mark is set: the time to the next look.
    mark: Option<Pin<Box<Sleep>>>,
}

impl Steady {
    /// To be told of what was received, if it was much.
    pub fn received(&mut self, tunnel: &TcpStream, n: usize) {
        let pace =
            self.0.get_or_insert_with(|| Box::new(Pace { seen: 0, looked: Instant::now(), mark: None }));
        pace.seen += n;
        if pace.mark.is_some() || pace.seen < FAST {
            return;
        }
        let now = Instant::now();
        let fast = now - pace.looked < SHORT;
        (pace.seen, pace.looked) = (0, now);
        if fast && low_water(tunnel, BATCH).is_ok() {
            pace.mark = Some(Box::pin(tokio::time::sleep(PAUSE)));
        }
    }

    /// To be asked whenever there is nothing to receive: takes the mark away after a pause, whereupon the kernel tells
    /// of what it has kept back.
    pub fn poll_pause(&mut self, tunnel: &TcpStream, cx: &mut Context<'_>) {
        while let Some(Pace { seen, mark: Some(mark), .. }) = self.0.as_deref_mut() {
            if mark.as_mut().poll(cx).is_pending() {
                return;
            }
            if std::mem::take(seen) == 0 {
                self.end(tunnel);
            } else {
                mark.as_mut().reset(Instant::now() + PAUSE);
            }
        }
    }

    /// Takes the mark away.
    pub fn end(&mut self, tunnel: &TcpStream) {
        if self.0.take().is_some_and(|pace| pace.mark.is_some()) {
            // Fails only on a socket that is gone.
            let _ = low_water(tunnel, 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use std::os::fd::AsRawFd;
    use std::task::Poll;
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let dialled = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (dialled, listener.accept().await.unwrap().0)
    }

    fn mark_of(socket: &TcpStream) -> libc::c_int {
        let (mut mark, mut size) = (0, size_of::<libc::c_int>() as libc::socklen_t);
        // SAFETY: the pointers describe one c_int and its size.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVLOWAT,
                (&raw mut mark).cast(),
                &raw mut size,
            )
        };
        assert_eq!(result, 0);
        mark
    }

    #[tokio::test]
    async fn a_fast_stream_wakes_us_for_batches_and_loses_nothing_in_a_pause() {
        let (mut near, far) = pair().await;
        let mut steady = Steady::default();
        steady.received(&far, FAST);
        assert_eq!(mark_of(&far), BATCH as libc::c_int);
        let mut bytes = [0; 32];
        assert!(far.try_read(&mut bytes).is_err(), "there is nothing yet");
        near.write_all(b"the last bytes").await.unwrap();
        // As the relay does: what is not readable yet becomes so when the pause is noticed.
        let reading = poll_fn(|cx| {
            while far.poll_read_ready(cx).is_ready() {
                if let Ok(n) = far.try_read(&mut bytes) {
                    return Poll::Ready(n);
                }
            }
            steady.poll_pause(&far, cx);
            Poll::Pending
        });
        assert_eq!(tokio::time::timeout(Duration::from_secs(5), reading).await, Ok(14));
        assert_eq!(mark_of(&far), 1);
    }

    #[tokio::test]
    async fn a_slow_stream_gets_no_mark_and_an_ended_one_keeps_none() {
        let (_near, far) = pair().await;
        let mut steady = Steady::default();
        steady.received(&far, FAST / 2);
        tokio::time::sleep(SHORT * 2).await;
        steady.received(&far, FAST / 2);
        assert_eq!(mark_of(&far), 1);
        steady.received(&far, FAST);
        assert_eq!(mark_of(&far), BATCH as libc::c_int);
        steady.end(&far);
        assert_eq!(mark_of(&far), 1);
        poll_fn(|cx| {
            steady.poll_pause(&far, cx);
            Poll::Ready(())
        })
        .await;
    }
}
