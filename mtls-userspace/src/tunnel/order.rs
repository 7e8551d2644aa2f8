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
    /// A raw direction that has ended, after which the tunnel carries nothing; or a lane's that was aborted.
    Closed,
    /// The client's ADOPT waits for its answer.
    Asked,
    /// After SHARE: lane frames, whose order is kept for each lane.
    Shared,
}

/// What both ends agreed on by ALPN, or what this is the order of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// One stream after the other.
    Plain,
    /// RAW may be said.
    Raw,
    /// And so may SHARE and ADOPT.
    Shared,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scope {
    Tunnel(Version),
    Lane,
}

/// What may come next in each direction of a tunnel, as one end sees it.
#[derive(Debug, Clone)]
pub struct Order {
    role: Role,
    inbound: Direction,
    outbound: Direction,
    scope: Scope,
    /// The server wants no stream to begin here any more.
    retired: bool,
}

impl Order {
    pub fn new(role: Role) -> Self {
        Self::of_version(role, Version::Plain)
    }

    pub fn of_version(role: Role, version: Version) -> Self {
        let idle = Direction::Idle;
        Self { role, inbound: idle, outbound: idle, scope: Scope::Tunnel(version), retired: false }
    }

    /// The order of one stream on a shared tunnel.
    pub fn of_lane(role: Role) -> Self {
        Self { scope: Scope::Lane, ..Self::new(role) }
    }

    fn agreed(&self, version: Version) -> bool {
        matches!(self.scope, Scope::Tunnel(agreed) if agreed >= version)
    }

    /// Whether both ends know shared tunnels.
    pub fn may_share(&self) -> bool {
        self.agreed(Version::Shared)
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
        let lane = self.scope == Scope::Lane;
        self.inbound = match (sender, frame, self.inbound) {
            (Role::Client, Frame::Open(_), Idle) => {
                self.outbound = Begun;
                Begun
            }
            (Role::Client, Frame::Adopt(_), Idle) if self.may_share() => {
                self.outbound = Begun;
                Begun
            }
            (Role::Client, Frame::Share(_), Idle) if self.may_share() => {
                self.outbound = Shared;
                Shared
            }
            (Role::Server, Frame::Adopted, Asked) => Flowing,
            (Role::Server, Frame::Reject(_), Asked) => Ended,
            (_, Frame::Leave, Begun | Flowing) if lane => Ended,
            (_, Frame::Reset, Begun | Flowing | Ended) if lane => Closed,
            (_, Frame::Grant(_), any) if lane && any != Idle => any,
            (_, Frame::Data(_), Begun | Flowing) => Flowing,
            (_, Frame::Fin, Begun | Flowing) => Ended,
            (Role::Server, Frame::Reject(_), Begun) => Ended,
            (_, Frame::Raw, Begun | Flowing) if self.agreed(Version::Raw) => Raw,
            // Said while nothing was open there. An OPEN may be under way, and the end before it be met later.
            (Role::Server, Frame::Retire, any @ (Idle | Begun | Asked | Ended)) if self.may_share() => {
                self.retired = true;
                any
            }
            _ => return Err(FrameError::OutOfOrder(frame.name())),
        };
        Ok(())
    }

    /// A client begins a stream.
    pub fn opened(&mut self) {
        (self.inbound, self.outbound) = (Direction::Begun, Direction::Begun);
    }

    /// A client asks for a stream of a shared tunnel.
    pub fn asked_to_adopt(&mut self) {
        (self.inbound, self.outbound) = (Direction::Asked, Direction::Begun);
    }

    /// A client makes the tunnel a shared one.
    pub fn sent_share(&mut self) {
        (self.inbound, self.outbound) = (Direction::Shared, Direction::Shared);
    }

    /// Whether the server has asked for no more streams.
    pub fn retired(&self) -> bool {
        self.retired
    }

    pub fn is_shared(&self) -> bool {
        self.inbound == Direction::Shared
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

    /// We have aborted a lane's stream.
    pub fn sent_reset(&mut self) {
        self.outbound = Direction::Closed;
    }

    /// Whether our direction may become raw now.
    pub fn may_go_raw(&self) -> bool {
        self.agreed(Version::Raw) && matches!(self.outbound, Direction::Begun | Direction::Flowing)
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
        raw && self.is_over()
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

    /// Whether both directions have ended.
    pub fn is_over(&self) -> bool {
        self.inbound_ended() && self.outbound_ended()
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
    use crate::tunnel::frame::{Open, Place, RejectReason, Rejection};

    proptest! {
        /// Whatever a peer sends, a direction ends once and nothing follows its end.
        #[test]
        fn a_direction_ends_exactly_once(kinds in prop::collection::vec(0..10u8, 0..30), server: bool, scope in 0..4u8) {
            let role = if server { Role::Server } else { Role::Client };
            let mut order = match scope {
                0 => Order::new(role),
                1 => Order::of_version(role, Version::Raw),
                2 => Order::of_version(role, Version::Shared),
                _ => Order::of_lane(role),
            };
            let (raw, lane) = (matches!(scope, 1 | 2), scope == 3);
            if !server {
                order.opened();
            }
            let (mut ended, mut aborted) = (false, false);
            for kind in kinds {
                let frame = match kind {
                    0 => Frame::Open(Open::new(([10, 0, 0, 1], 80).into(), OriginalSrc::new(([10, 0, 0, 2], 9).into()))),
                    1 => Frame::Data(b"x"),
                    2 => Frame::Fin,
                    3 => Frame::Reject(Rejection::new(RejectReason::Denied, "")),
                    4 => Frame::Raw,
                    5 => Frame::Reset,
                    6 => Frame::Leave,
                    7 => Frame::Adopted,
                    8 => Frame::Retire,
                    _ => {
                        ended |= order.received_close();
                        prop_assert_eq!(order.inbound_ended(), ended);
                        continue;
                    }
                };
                let was_raw = order.inbound_raw();
                let accepted = order.received(&frame).is_ok();
                let abort = lane && frame == Frame::Reset;
                let retired = accepted && frame == Frame::Retire;
                prop_assert!(!retired || (order.retired() && !server && scope == 2));
                let late = (abort && !aborted) || retired;
                prop_assert!(!(ended && accepted) || late, "{} after the end", frame.name());
                aborted |= abort && accepted;
                prop_assert!(!(was_raw && accepted), "{} after RAW", frame.name());
                prop_assert!(raw || !order.inbound_raw());
                prop_assert!(lane || !accepted || !matches!(frame, Frame::Reset | Frame::Leave));
                prop_assert!(!accepted || frame != Frame::Adopted, "nobody asked for it");
                if accepted && matches!(frame, Frame::Fin | Frame::Reject(_) | Frame::Reset | Frame::Leave) {
                    ended = true;
                }
                prop_assert_eq!(order.inbound_ended(), ended);
            }
        }
    }

    #[test]
    fn a_tunnel_that_was_raw_in_either_direction_is_never_idle_again() {
        let mut order = Order::of_version(Role::Client, Version::Raw);
        order.opened();
        order.received(&Frame::Raw).unwrap();
        order.sent_end();
        assert!(order.received_close() && order.closed() && !order.settle());
        let mut order = Order::of_version(Role::Client, Version::Raw);
        order.opened();
        order.sent_raw();
        order.sent_data();
        order.received(&Frame::Fin).unwrap();
        assert!(!order.closed());
        order.sent_end();
        assert!(order.closed() && !order.settle() && !order.received_close());
    }

    #[test]
    fn only_who_agreed_shares_and_a_shared_tunnel_is_never_idle_again() {
        let place = Place { tunnel: [7; 16], lane: 1 };
        for version in [Version::Plain, Version::Raw] {
            let mut order = Order::of_version(Role::Server, version);
            assert!(order.received(&Frame::Share([7; 16])).is_err());
            assert!(order.received(&Frame::Adopt(place)).is_err());
        }
        let mut order = Order::of_version(Role::Server, Version::Shared);
        order.received(&Frame::Share([7; 16])).unwrap();
        assert!(order.is_shared() && !order.settle() && !order.outbound_ended());
        assert!(order.received(&Frame::Share([7; 16])).is_err());

        let mut client = Order::of_version(Role::Client, Version::Shared);
        client.asked_to_adopt();
        assert!(client.received(&Frame::Data(b"x")).is_err());
        client.received(&Frame::Adopted).unwrap();
        assert!(client.received(&Frame::Adopted).is_err());
        client.received(&Frame::Data(b"x")).unwrap();
    }

    /// It may cross an OPEN on its way, and nothing else.
    #[test]
    fn a_server_retires_a_tunnel_only_before_it_answers() {
        let mut client = Order::of_version(Role::Client, Version::Shared);
        client.received(&Frame::Retire).unwrap();
        assert!(client.retired() && client.idle());
        let mut client = Order::of_version(Role::Client, Version::Shared);
        client.opened();
        client.received(&Frame::Retire).unwrap();
        client.received(&Frame::Data(b"x")).unwrap();
        assert!(client.received(&Frame::Retire).is_err());
        assert!(Order::of_version(Role::Client, Version::Raw).received(&Frame::Retire).is_err());
        assert!(Order::of_version(Role::Server, Version::Shared).received(&Frame::Retire).is_err());
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
