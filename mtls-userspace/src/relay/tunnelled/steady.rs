//! Fewer wake-ups for a fast stream: while records come in faster than [`FAST`], the kernel wakes us for a batch of
//! them, not for each segment.
//!
//! A sender that paces (BBR) puts segments on the wire one at a time, and each would wake this thread, and after it the
//! application, for 64 KiB. So a stream that was fast for a while gets a low-water mark (`SO_RCVLOWAT`), which follows its
//! rate. It is taken away when nothing was received for twice the time that should have taken; so late are the last bytes
//! before a pause at most.

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
/// What comes in such a time the kernel gathers before it wakes us, in whole steps.
const GATHER: Duration = Duration::from_millis(2);
const STEP: usize = 128 * 1024;
/// The least that tokio's clock can tell.
const SHORTEST_PAUSE: Duration = Duration::from_millis(1);

/// How steadily a direction's bytes come. Owns nothing while it carries little.
#[derive(Default)]
pub(super) struct Steady(Option<Box<Pace>>);

struct Pace {
    /// Bytes since the last look at the rate.
    bytes: usize,
    looked: Instant,
    mark: Option<Mark>,
}

struct Mark {
    batch: Batch,
    /// When something was received last.
    heard: Instant,
    /// The time to the next look for a pause.
    look: Pin<Box<Sleep>>,
}

impl Steady {
    /// To be told of what was received, if it was much, and of the most that can be received at once.
    ///
    /// Where the kernel refuses a mark, which it does only of a socket that is gone, there is nothing to be late.
    pub fn received(&mut self, tunnel: &TcpStream, n: usize, most: usize) {
        let now = Instant::now();
        let pace = self.0.get_or_insert_with(|| Box::new(Pace { bytes: 0, looked: now, mark: None }));
        if let Some(mark) = &mut pace.mark {
            mark.heard = now;
        }
        pace.bytes += n;
        if pace.bytes < FAST {
            return;
        }
        let (came, took) = (pace.bytes, now - pace.looked);
        (pace.bytes, pace.looked) = (0, now);
        if took >= SHORT {
            return;
        }
        let batch = Batch::of_rate(came, took, most);
        if pace.mark.as_ref().is_none_or(|mark| mark.batch.bytes != batch.bytes) {
            let _ = low_water(tunnel, batch.bytes);
        }
        match &mut pace.mark {
            Some(mark) => mark.batch = batch,
            None => {
                let look = Box::pin(tokio::time::sleep(batch.pause));
                pace.mark = Some(Mark { batch, heard: now, look });
            }
        }
    }

    /// To be asked whenever there is nothing to receive: takes the mark away after a pause, whereupon the kernel tells
    /// of what it has kept back.
    pub fn poll_pause(&mut self, tunnel: &TcpStream, cx: &mut Context<'_>) {
        while let Some(Pace { mark: Some(mark), .. }) = self.0.as_deref_mut() {
            if mark.look.as_mut().poll(cx).is_pending() {
                return;
            }
            let over = mark.heard + mark.batch.pause;
            if over > Instant::now() {
                mark.look.as_mut().reset(over);
            } else {
                self.end(tunnel);
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

/// What the kernel gathers, and the silence after which there is no more to be expected.
#[derive(Debug, PartialEq)]
struct Batch {
    bytes: usize,
    pause: Duration,
}

impl Batch {
    /// For a stream that brought so many bytes in such a time.
    fn of_rate(came: usize, took: Duration, most: usize) -> Self {
        let rate = came as f64 / took.as_secs_f64();
        let gathered = (rate * GATHER.as_secs_f64()) as usize;
        let bytes = (gathered / STEP * STEP).clamp(STEP, most.max(STEP));
        let pause = Duration::from_secs_f64(2.0 * bytes as f64 / rate);
        Self { bytes, pause: pause.max(SHORTEST_PAUSE) }
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

    const MOST: usize = 8 * STEP;

    #[tokio::test]
    async fn a_fast_stream_wakes_us_for_batches_and_loses_nothing_in_a_pause() {
        let (mut near, far) = pair().await;
        let mut steady = Steady::default();
        steady.received(&far, FAST, MOST);
        assert_eq!(mark_of(&far), MOST as libc::c_int);
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
        steady.received(&far, FAST / 2, MOST);
        tokio::time::sleep(SHORT * 2).await;
        steady.received(&far, FAST / 2, MOST);
        assert_eq!(mark_of(&far), 1);
        steady.received(&far, FAST, MOST);
        assert_eq!(mark_of(&far), MOST as libc::c_int);
        steady.end(&far);
        assert_eq!(mark_of(&far), 1);
        poll_fn(|cx| {
            steady.poll_pause(&far, cx);
            Poll::Ready(())
        })
        .await;
    }

    #[test]
    fn the_mark_follows_the_rate() {
        let batch = |took| Batch::of_rate(FAST, took, MOST);
        let of = |bytes, pause| Batch { bytes, pause };
        assert_eq!(batch(SHORT), of(4 * STEP, 2 * GATHER));
        assert_eq!(batch(SHORT / 2), of(MOST, 2 * GATHER));
        assert_eq!(batch(SHORT / 4), of(MOST, GATHER));
        assert_eq!(batch(SHORT / 32), of(MOST, SHORTEST_PAUSE));
        assert_eq!(batch(Duration::ZERO), of(MOST, SHORTEST_PAUSE));
        assert_eq!(Batch::of_rate(FAST, SHORT, STEP / 2).bytes, STEP);
    }
}
