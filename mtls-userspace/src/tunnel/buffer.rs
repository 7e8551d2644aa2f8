//! Buffers shared by every connection of a thread: taken when a socket is readable, given back as soon as nothing is
//! pending in them, so that an idle connection owns none.
//!
//! Two sizes. A small one holds a record; a large one holds sixteen and is for those that filled a small one. Large
//! ones are bounded for the whole process, so that thousands of slow readers can't hold gigabytes: who gets none
//! carries on with a small one. Contents are never cleared; every reader goes by the ranges it wrote.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::frame::{MAX_DATA, MAX_OPEN};
use super::record::{HEADER, MAX_RECORD, TRAILER};

/// Room before the first slot for the control records that may have to go ahead of data: OPEN, RAW and KeyUpdate.
pub(crate) const HEADROOM: usize = 256;
/// Where in a slot the application's bytes stand: after the record header and the frame type.
pub(crate) const SLOT_DATA: usize = HEADER + 1;
/// One full DATA record.
pub(crate) const SLOT: usize = SLOT_DATA + MAX_DATA + TRAILER;
/// Slots in a large buffer.
pub(crate) const SLOTS: usize = 16;

/// A slot for sending with a FIN record behind it, or the largest legal record and the head of the next one.
const SMALL: usize = HEADROOM + SLOT + 64;
const LARGE: usize = HEADROOM + SLOTS * SLOT + 64;

const _: () = assert!(SMALL >= MAX_RECORD + HEADER);
const _: () =
    assert!(HEADROOM >= (MAX_OPEN + HEADER + TRAILER) + (5 + HEADER + TRAILER) + (1 + HEADER + TRAILER));

/// Large buffers in use or kept, in the whole process: 64 MiB.
const LARGE_LIMIT: usize = 256;
/// Kept per thread for the next taker.
const KEEP_SMALL: usize = 64;
const KEEP_LARGE: usize = 8;

static LARGE_COUNT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static SPARE: RefCell<Spare> = const { RefCell::new(Spare { small: Vec::new(), large: Vec::new() }) };
}

struct Spare {
    small: Vec<Parts>,
    large: Vec<Parts>,
}

impl Drop for Spare {
    fn drop(&mut self) {
        LARGE_COUNT.fetch_sub(self.large.len(), Ordering::Relaxed);
    }
}

struct Parts {
    bytes: Box<[u8]>,
    ranges: Vec<(u32, u32)>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Size {
    Small,
    Large,
}

/// A buffer on loan; dropping it gives it back.
pub(crate) struct Buffer {
    bytes: Box<[u8]>,
    /// Plaintext found in `bytes` that has not been delivered yet: (offset, length).
    pub ranges: Vec<(u32, u32)>,
}

impl Buffer {
    /// A buffer of the wanted size, or a small one when large ones have run out.
    pub fn take(size: Size) -> Self {
        let large = size == Size::Large;
        let spare = SPARE.try_with(|spare| {
            let mut spare = spare.borrow_mut();
            if large { spare.large.pop() } else { spare.small.pop() }
        });
        if let Ok(Some(Parts { bytes, ranges })) = spare {
            return Self { bytes, ranges };
        }
        if large {
            let counted = LARGE_COUNT
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < LARGE_LIMIT).then_some(n + 1));
            if counted.is_err() {
                return Self::take(Size::Small);
            }
        }
        let length = if large { LARGE } else { SMALL };
        Self { bytes: vec![0; length].into_boxed_slice(), ranges: Vec::new() }
    }

    pub fn size(&self) -> Size {
        if self.bytes.len() == LARGE { Size::Large } else { Size::Small }
    }

    /// The slots for sending, `HEADROOM` bytes into the buffer.
    pub fn slots(&self) -> usize {
        (self.bytes.len() - HEADROOM) / SLOT
    }

    /// The bytes, and the ranges to note what was found in them.
    pub fn parts(&mut self) -> (&mut [u8], &mut Vec<(u32, u32)>) {
        (&mut self.bytes, &mut self.ranges)
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let large = self.size() == Size::Large;
        self.ranges.clear();
        let parts =
            Parts { bytes: std::mem::take(&mut self.bytes), ranges: std::mem::take(&mut self.ranges) };
        let kept = SPARE.try_with(|spare| {
            let mut spare = spare.borrow_mut();
            let (list, keep) =
                if large { (&mut spare.large, KEEP_LARGE) } else { (&mut spare.small, KEEP_SMALL) };
            let room = list.len() < keep;
            if room {
                list.push(parts);
            }
            room
        });
        if large && kept != Ok(true) {
            LARGE_COUNT.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_returned_buffer_is_the_next_one_taken() {
        let buffer = Buffer::take(Size::Small);
        let address = buffer.as_ptr();
        drop(buffer);
        assert_eq!(Buffer::take(Size::Small).as_ptr(), address);
    }

    #[test]
    fn large_buffers_are_bounded_and_small_ones_take_their_place() {
        let taken: Vec<_> = (0..LARGE_LIMIT + 20).map(|_| Buffer::take(Size::Large)).collect();
        let large = taken.iter().filter(|buffer| buffer.size() == Size::Large).count();
        assert!(large <= LARGE_LIMIT);
        assert_eq!(taken.last().map(Buffer::size), Some(Size::Small));
        drop(taken);
        assert_eq!(Buffer::take(Size::Large).size(), Size::Large);
    }

    #[test]
    fn a_small_buffer_has_one_slot_and_a_large_one_sixteen() {
        assert_eq!(Buffer::take(Size::Small).slots(), 1);
        assert_eq!(Buffer::take(Size::Large).slots(), SLOTS);
    }
}
