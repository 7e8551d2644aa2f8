//! Buffers shared by every connection of a thread: taken when a socket is readable, given back as soon as nothing is
//! pending in them, so that an idle connection owns none.
//!
//! Three sizes. A small one holds a record, a large one sixteen, a huge one sixty-four: the next size up is for those
//! that filled the last. All but small ones are bounded for the whole process, so that thousands of slow readers can't
//! hold gigabytes: who gets none carries on with the next smaller one. Contents are never cleared; every reader goes by
//! the ranges it wrote.

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
/// Slots in a huge buffer, the most there are.
pub(crate) const SLOTS: usize = Size::Huge.slots();
/// Behind the last slot: a FIN record, or the head of the record after the largest legal one.
const TAIL: usize = 64;

const _: () = assert!(Size::Small.bytes() >= MAX_RECORD + HEADER);
const _: () =
    assert!(HEADROOM >= (MAX_OPEN + HEADER + TRAILER) + (5 + HEADER + TRAILER) + (1 + HEADER + TRAILER));

/// In use or kept, in the whole process.
static COUNT: [AtomicUsize; 3] = [const { AtomicUsize::new(0) }; 3];

thread_local! {
    static SPARE: RefCell<Spare> = const { RefCell::new(Spare([const { Vec::new() }; 3])) };
}

/// Kept for the next taker, by size.
#[derive(Default)]
struct Spare([Vec<Parts>; 3]);

impl Drop for Spare {
    fn drop(&mut self) {
        for (count, kept) in COUNT.iter().zip(&self.0) {
            count.fetch_sub(kept.len(), Ordering::Relaxed);
        }
    }
}

struct Parts {
    bytes: Box<[u8]>,
    ranges: Vec<(u32, u32)>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub(crate) enum Size {
    #[default]
    Small,
    Large,
    Huge,
}

impl Size {
    /// The size that suits who received so many bytes at once.
    pub fn after(received: usize) -> Self {
        match received {
            n if n < Self::Small.content() => Self::Small,
            n if n < Self::Large.content() => Self::Large,
            _ => Self::Huge,
        }
    }

    /// Bytes of an application's that it takes for sending.
    pub const fn content(self) -> usize {
        self.slots() * MAX_DATA
    }

    const fn slots(self) -> usize {
        match self {
            Self::Small => 1,
            Self::Large => 16,
            Self::Huge => 64,
        }
    }

    const fn bytes(self) -> usize {
        HEADROOM + self.slots() * SLOT + TAIL
    }

    /// In the whole process: 32 MiB of large ones and as much of huge ones.
    const fn limit(self) -> usize {
        match self {
            Self::Small => usize::MAX,
            Self::Large => 128,
            Self::Huge => 32,
        }
    }

    /// Kept per thread.
    const fn kept(self) -> usize {
        match self {
            Self::Small => 64,
            Self::Large | Self::Huge => 8,
        }
    }

    pub const fn larger(self) -> Self {
        match self {
            Self::Small => Self::Large,
            _ => Self::Huge,
        }
    }

    const fn smaller(self) -> Self {
        match self {
            Self::Huge => Self::Large,
            _ => Self::Small,
        }
    }
}

/// A buffer on loan; dropping it gives it back.
pub(crate) struct Buffer {
    bytes: Box<[u8]>,
    /// Plaintext found in `bytes` that has not been delivered yet: (offset, length).
    pub ranges: Vec<(u32, u32)>,
}

impl Buffer {
    /// A buffer of the wanted size, or a smaller one when those have run out.
    pub fn take(size: Size) -> Self {
        if let Ok(Some(Parts { bytes, ranges })) =
            SPARE.try_with(|spare| spare.borrow_mut().0[size as usize].pop())
        {
            return Self { bytes, ranges };
        }
        let counted = COUNT[size as usize]
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < size.limit()).then_some(n + 1));
        if counted.is_err() {
            return Self::take(size.smaller());
        }
        Self { bytes: vec![0; size.bytes()].into_boxed_slice(), ranges: Vec::new() }
    }

    pub fn size(&self) -> Size {
        // By the length, since a field would make every idle connection larger.
        let is = |size: &Size| self.bytes.len() == size.bytes();
        [Size::Huge, Size::Large].into_iter().find(is).unwrap_or_default()
    }

    /// The slots for sending, `HEADROOM` bytes into the buffer.
    pub fn slots(&self) -> usize {
        self.size().slots()
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
        let size = self.size();
        self.ranges.clear();
        let parts =
            Parts { bytes: std::mem::take(&mut self.bytes), ranges: std::mem::take(&mut self.ranges) };
        let kept = SPARE.try_with(|spare| {
            let list = &mut spare.borrow_mut().0[size as usize];
            let room = list.len() < size.kept();
            if room {
                list.push(parts);
            }
            room
        });
        if kept != Ok(true) {
            COUNT[size as usize].fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Frees what this thread keeps for the next taker.
pub fn release_spare_buffers() {
    let _ = SPARE.try_with(|spare| drop(spare.take()));
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
    fn larger_buffers_are_bounded_and_smaller_ones_take_their_place() {
        let most = Size::Huge.limit() + Size::Large.limit();
        let taken: Vec<_> = (0..most + 20).map(|_| Buffer::take(Size::Huge)).collect();
        let of = |size| taken.iter().filter(|buffer| buffer.size() == size).count();
        assert!(of(Size::Huge) <= Size::Huge.limit());
        assert!(of(Size::Large) <= Size::Large.limit());
        assert_eq!(taken.last().map(Buffer::size), Some(Size::Small));
        drop(taken);
        assert_eq!(Buffer::take(Size::Huge).size(), Size::Huge);
        assert_eq!(Buffer::take(Size::Large).size(), Size::Large);
    }

    #[test]
    fn what_is_kept_can_be_freed() {
        drop(Buffer::take(Size::Huge));
        let kept = |size: Size| SPARE.with(|spare| spare.borrow().0[size as usize].len());
        assert_eq!(kept(Size::Huge), 1);
        release_spare_buffers();
        assert_eq!(kept(Size::Huge), 0);
    }

    #[test]
    fn who_fills_a_buffer_gets_the_next_larger_one_and_who_no_longer_does_a_smaller_one() {
        for size in [Size::Small, Size::Large, Size::Huge] {
            let buffer = Buffer::take(size);
            assert_eq!(buffer.len(), HEADROOM + buffer.slots() * SLOT + TAIL);
            let filled = buffer.slots() * MAX_DATA;
            assert!(Size::after(filled) > size || size == Size::Huge);
            assert!(Size::after(filled - 1) == size);
        }
        assert_eq!(Size::after(1), Size::Small);
        assert_eq!(Size::after(MAX_DATA), Size::Large);
    }
}
