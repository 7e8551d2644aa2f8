//! A shared tunnel's streams against a peer that says anything.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;

use super::outgoing::Outgoing;
use super::*;
use crate::addr::OriginalSrc;
use crate::tunnel::frame::Frame;
use crate::tunnel::frame::WINDOW;

/// An application that takes so many bytes and no more.
struct Sipping {
    room: usize,
    taken: AtomicUsize,
}

impl Sink for Sipping {
    fn take(&self, bytes: &[u8]) -> io::Result<usize> {
        let taken = self.taken.load(Ordering::Relaxed);
        let n = bytes.len().min(self.room - taken);
        if n == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.taken.store(taken + n, Ordering::Relaxed);
        Ok(n)
    }
}

#[derive(Debug, Clone)]
enum Said {
    Open,
    Data(u16),
    Fin,
    Reset,
    Leave,
    Grant(u32),
    /// The stream's own end here lets go of it.
    LetGo,
}

fn said() -> impl Strategy<Value = Said> {
    prop_oneof![
        3 => Just(Said::Open),
        6 => (1..16_000u16).prop_map(Said::Data),
        1 => Just(Said::Fin),
        1 => Just(Said::Reset),
        1 => Just(Said::Leave),
        1 => (0..2 * WINDOW).prop_map(Said::Grant),
        2 => Just(Said::LetGo),
    ]
}

proptest! {
    /// Whatever comes, in whatever order: nobody's queue outgrows the window, every byte an application gets was sent,
    /// and a slot is taken exactly as long as one of its ends is open.
    #[test]
    fn a_peer_that_says_anything_is_bounded(
        script in prop::collection::vec((0..6u32, said()), 0..200),
        room in 0..200_000usize,
    ) {
        let mut core = Core::new(None);
        let bytes = vec![7; 16_000];
        let mut sent: HashMap<u32, usize> = HashMap::new();
        let mut sinks: HashMap<u32, Arc<Sipping>> = HashMap::new();
        for (number, said) in script {
            // Two slots, and three streams one after the other in each.
            let lane = number % 2 + ((number / 2) << 8);
            let open = Open::new(([10, 0, 0, 1], 80).into(), OriginalSrc::new(([10, 0, 0, 2], 9).into()));
            let frame = match said {
                Said::Open => Frame::Open(open),
                Said::Data(length) => Frame::Data(&bytes[..usize::from(length)]),
                Said::Fin => Frame::Fin,
                Said::Reset => Frame::Reset,
                Said::Leave => Frame::Leave,
                Said::Grant(more) => Frame::Grant(more),
                Said::LetGo => {
                    if let Some(seat) = core.seat(lane) {
                        if !seat.order.outbound_ended() {
                            seat.order.sent_reset();
                        }
                        seat.abandoned = true;
                        core.vacate(lane);
                    }
                    continue;
                }
            };
            let length = if let Frame::Data(data) = &frame { data.len() } else { 0 };
            let opens = matches!(frame, Frame::Open(_));
            if core.receive(lane, frame, Role::Server).is_err() {
                // The tunnel would end here.
                break;
            }
            *sent.entry(lane).or_default() += length;
            if opens {
                let sink = Arc::new(Sipping { room, taken: AtomicUsize::new(0) });
                core.seat(lane).expect("just opened").sink = Some(sink.clone());
                sinks.insert(lane, sink);
                prop_assert_eq!(core.opened.pop_front().map(|(opened, _)| opened), Some(lane));
            }
            for seat in core.slots.iter().flat_map(|slot| slot.seat.iter().chain(&slot.over)) {
                prop_assert!(seat.queue.len() <= WINDOW as usize);
                prop_assert!(seat.credit <= WINDOW);
                prop_assert!(!seat.is_over());
            }
            let seats = core.slots.iter().map(|slot| slot.over.len() + usize::from(slot.seat.is_some()));
            prop_assert_eq!(core.taken, seats.sum::<usize>());
        }
        for (lane, sink) in sinks {
            prop_assert!(sink.taken.load(Ordering::Relaxed) <= sent.get(&lane).copied().unwrap_or(0));
        }
    }

    /// What a record holds is taken apart without a panic, and only whole frames are.
    #[test]
    fn any_record_is_frames_or_refused(content in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut core = Core::new(None);
        let _ = core.hand_out(&content, Role::Server);
        let _ = Core::new(None).hand_out(&content, Role::Client);
    }

    /// What is pushed is what comes out at the other end, in its order, however it was cut into records.
    #[test]
    fn frames_leave_as_they_came(lengths in prop::collection::vec((0..300u32, 1..300usize), 1..200)) {
        let mut out = Outgoing::default();
        let mut expected = Vec::new();
        for (lane, length) in lengths {
            let content = vec![lane as u8; length];
            out.push(lane, &content);
            expected.extend_from_slice(&lane.to_be_bytes());
            expected.extend_from_slice(&(length as u16).to_be_bytes());
            expected.extend_from_slice(&content);
        }
        prop_assert_eq!(out.gathered(), expected);
    }
}

/// The client's handle goes first, and it may take the slot at once; ours goes when its task has run.
#[test]
fn a_slot_is_free_for_the_next_stream_before_the_last_ones_handle_is_gone() {
    let open =
        || Frame::Open(Open::new(([10, 0, 0, 1], 80).into(), OriginalSrc::new(([10, 0, 0, 2], 9).into())));
    let mut core = Core::new(None);
    for round in 0..3 {
        core.receive(round << 8, open(), Role::Server).unwrap();
        // While one of its directions is open it is not.
        assert!(core.receive((round + 1) << 8, open(), Role::Server).is_err());
        core.receive(round << 8, Frame::Fin, Role::Server).unwrap();
        assert!(core.receive((round + 1) << 8, open(), Role::Server).is_err());
        core.seat(round << 8).unwrap().order.sent_end();
    }
    core.receive(3 << 8, open(), Role::Server).unwrap();
    assert_eq!(core.taken, 4);
    for round in 0..3 {
        let seat = core.lift(round << 8).unwrap();
        core.put_back(seat);
        core.seat(round << 8).unwrap().abandoned = true;
        core.vacate(round << 8);
    }
    assert_eq!(core.taken, 1);
    assert!(core.seat(3 << 8).is_some());
}
