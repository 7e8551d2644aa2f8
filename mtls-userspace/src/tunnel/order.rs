//! The order of frames: what may come next in each direction of a tunnel, as one end sees it. Sans-IO.

use super::frame::{Frame, FrameError};

/// Which end of the tunnel this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Client,
    Server,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    /// No stream is open.
    Idle,
    /// Open, nothing sent yet: the only time for a REJECT.
    Begun,
    Flowing,
    Ended,
    /// After RAW: no frames, only bytes.
    Raw,
    /// A raw direction that has ended; the tunnel carries nothing after it.
    Closed,
}

/// What may come next in each direction of a tunnel, as one end sees it.
#[derive(Debug, Clone)]
pub struct Order {
    role: Role,
    inbound: Direction,
    outbound: Direction,
    /// Both ends agreed that RAW may be said.
    raw: bool,
}

impl Order {
    pub fn new(role: Role) -> Self {
        Self { role, inbound: Direction::Idle, outbound: Direction::Idle, raw: false }
    }

    /// The order of a tunnel on which RAW was agreed.
    pub fn with_raw(role: Role) -> Self {
        Self { raw: true, ..Self::new(role) }
    }

    /// Whether this end is the one that opens streams.
    pub fn is_client(&self) -> bool {
        self.role == Role::Client
    }

    /// Judges a frame from the peer.
    pub fn received(&mut self, frame: &Frame<'_>) -> Result<(), FrameError> {
        use Direction::*;
        let sender = match self.role {
            Role::Client => Role::Server,
            Role::Server => Role::Client,
        };
        self.inbound = match (sender, frame, self.inbound) {
            (Role::Client, Frame::Open(_), Idle) => {
                self.outbound = Begun;
                Begun
            }
            (_, Frame::Data(_), Begun | Flowing) => Flowing,
            (_, Frame::Fin, Begun | Flowing) => Ended,
            (Role::Server, Frame::Reject(_), Begun) => Ended,
            (_, Frame::Raw, Begun | Flowing) if self.raw => Raw,
            _ => return Err(FrameError::OutOfOrder(frame.name())),
        };
        Ok(())
    }

    /// A client begins a stream.
    pub fn opened(&mut self) {
        (self.inbound, self.outbound) = (Direction::Begun, Direction::Begun);
    }

    pub fn sent_data(&mut self) {
        if self.outbound != Direction::Raw {
            self.outbound = Direction::Flowing;
        }
    }

    /// Our direction has ended, by FIN or REJECT, or by close_notify where it is raw.
    pub fn sent_end(&mut self) {
        self.outbound = if self.outbound == Direction::Raw { Direction::Closed } else { Direction::Ended };
    }

    /// Whether our direction may become raw now.
    pub fn may_go_raw(&self) -> bool {
        self.raw && matches!(self.outbound, Direction::Begun | Direction::Flowing)
    }

    pub fn sent_raw(&mut self) {
        self.outbound = Direction::Raw;
    }

    pub fn outbound_raw(&self) -> bool {
        self.outbound == Direction::Raw
    }

    pub fn inbound_raw(&self) -> bool {
        self.inbound == Direction::Raw
    }

    /// The peer's close_notify ends its direction only where that is raw; says whether it did.
    pub fn received_close(&mut self) -> bool {
        let raw = self.inbound_raw();
        if raw {
            self.inbound = Direction::Closed;
        }
        raw
    }

    /// Whether the peer's direction was raw and has ended: its connection may end too, while ours goes on.
    pub fn inbound_closed(&self) -> bool {
        self.inbound == Direction::Closed
    }

    /// Whether both directions have ended and the tunnel with them, because one was raw.
    pub fn closed(&self) -> bool {
        let raw = [self.inbound, self.outbound].contains(&Direction::Closed);
        raw && self.inbound_ended() && self.outbound_ended()
    }

    /// Whether nothing of ours has been sent on this stream yet.
    pub fn may_reject(&self) -> bool {
        self.role == Role::Server && self.outbound == Direction::Begun
    }

    pub fn outbound_ended(&self) -> bool {
        matches!(self.outbound, Direction::Ended | Direction::Closed)
    }

    pub fn inbound_ended(&self) -> bool {
        matches!(self.inbound, Direction::Ended | Direction::Closed)
    }

    pub fn idle(&self) -> bool {
        self.inbound == Direction::Idle && self.outbound == Direction::Idle
    }

    /// Makes the tunnel idle again if both directions have ended; says whether it is idle.
    pub fn settle(&mut self) -> bool {
        if self.inbound == Direction::Ended && self.outbound == Direction::Ended {
            (self.inbound, self.outbound) = (Direction::Idle, Direction::Idle);
        }
        self.idle()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::addr::OriginalSrc;
    use crate::tunnel::frame::{Open, RejectReason, Rejection};

    proptest! {
        /// Whatever a peer sends, a direction ends once and nothing follows its end.
        #[test]
        fn a_direction_ends_exactly_once(kinds in prop::collection::vec(0..6u8, 0..30), server: bool, raw: bool) {
            let role = if server { Role::Server } else { Role::Client };
            let mut order = if raw { Order::with_raw(role) } else { Order::new(role) };
            if !server {
                order.opened();
            }
            let mut ended = false;
            for kind in kinds {
                let frame = match kind {
                    0 => Frame::Open(Open::new(([10, 0, 0, 1], 80).into(), OriginalSrc::new(([10, 0, 0, 2], 9).into()))),
                    1 => Frame::Data(b"x"),
                    2 => Frame::Fin,
                    3 => Frame::Reject(Rejection::new(RejectReason::Denied, "")),
                    4 => Frame::Raw,
                    _ => {
                        ended |= order.received_close();
                        prop_assert_eq!(order.inbound_ended(), ended);
                        continue;
                    }
                };
                let was_raw = order.inbound_raw();
                let accepted = order.received(&frame).is_ok();
                prop_assert!(!(ended && accepted), "{} after the end", frame.name());
                prop_assert!(!(was_raw && accepted), "{} after RAW", frame.name());
                prop_assert!(raw || !order.inbound_raw());
                if accepted && matches!(frame, Frame::Fin | Frame::Reject(_)) {
                    ended = true;
                }
                prop_assert_eq!(order.inbound_ended(), ended);
            }
        }
    }

    #[test]
    fn a_tunnel_that_was_raw_in_either_direction_is_never_idle_again() {
        let mut order = Order::with_raw(Role::Client);
        order.opened();
        order.received(&Frame::Raw).unwrap();
        order.sent_end();
        assert!(order.received_close() && order.closed() && !order.settle());
        let mut order = Order::with_raw(Role::Client);
        order.opened();
        order.sent_raw();
        order.sent_data();
        order.received(&Frame::Fin).unwrap();
        assert!(!order.closed());
        order.sent_end();
        assert!(order.closed() && !order.settle() && !order.received_close());
    }

    #[test]
    fn a_rejection_may_only_stand_in_place_of_an_answer() {
        let rejection = Frame::Reject(Rejection::new(RejectReason::Denied, "p"));
        let mut order = Order::new(Role::Client);
        assert!(order.received(&rejection).is_err());
        order.opened();
        order.received(&Frame::Data(b"x")).unwrap();
        assert!(order.received(&rejection).is_err());
        let mut order = Order::new(Role::Client);
        order.opened();
        order.received(&rejection).unwrap();
        assert!(!order.settle());
        order.sent_end();
        assert!(order.settle());
    }
}
