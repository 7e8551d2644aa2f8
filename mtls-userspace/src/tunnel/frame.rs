//! The `mtls/1` frames: one frame is the content of one TLS record, its first byte the frame's type. Sans-IO.
//!
//! ```text
//! OPEN    01  version(1)=1  destination  source  trace length(1)  trace      client, first of a stream
//! DATA    02  bytes (1 to 16383)                                             both
//! FIN     03                                                                 both, ends a direction
//! REJECT  04  code(1)  detail length(1)  detail (UTF-8)                      server, instead of any DATA or FIN
//! RAW     05  from the next record on, application data is the application's bytes alone   both, from `mtls/1.1` on
//! SHARE   06  tunnel id(16)                  client, from `mtls/1.2` on: several streams from here on
//! ADOPT   07  tunnel id(16)  lane(4)         client, in place of an OPEN: goes on with a stream of a shared tunnel
//! ADOPTED 08                                 server, instead of a REJECT
//! address     4 or 6 (1)  4 or 16 bytes  port(2, big-endian)
//! ```
//!
//! There is no "accepted" frame: a server that takes the stream just begins its DATA or FIN. Nobody would wait for
//! the acknowledgement (the application's `connect` succeeded long before), and it would cost one send and one
//! wake-up per connection. Each direction ends exactly once; when both have ended the tunnel is idle and the next
//! OPEN may come. There is no frame for a reset either: an aborted stream takes its TCP connection with it.
//!
//! RAW leaves nothing in a record but the application's bytes, so that a record layer in the kernel can carry a long
//! stream: which of the two carries it is each end's own choice and does not show on the wire. Whoever wants it says RAW
//! in its own direction, and who hears it answers with RAW unless its direction has ended. A raw direction ends with
//! the TLS alert close_notify, never by the connection's end alone; a tunnel that carried one is used no more. Agents
//! agree on it by ALPN: under `mtls/1` there is no RAW.
//!
//! After SHARE a record holds any number of lane frames, each one frame of a stream:
//!
//! ```text
//! lane(4)  length(2)  a frame of so many bytes: OPEN, DATA, FIN, REJECT as above, or
//! RESET   09                                 both, aborts the stream; also behind FIN
//! GRANT   0a  bytes(4)                       both, so many bytes more may be sent on this lane
//! LEAVE   0b                                 both, ends a direction here: it goes on where the stream was adopted
//! RETIRE  0c                                 server, lane ffffffff: no stream any more, please
//! ```
//!
//! Where both know shared tunnels a server says RETIRE also in a record of its own, on a tunnel that carries nothing: an
//! OPEN that crosses it on its way is answered yet.
//!
//! A lane's last byte is its slot, which is free again when both directions have ended; the rest counts the streams the
//! slot has had, so that a late RESET hits nobody else. Of each direction [`WINDOW`] bytes may be under way that were not
//! granted again.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::addr::{OriginalSrc, canonical};

use super::record::MAX_CONTENT;

/// Application bytes that fit one DATA frame.
pub const MAX_DATA: usize = MAX_CONTENT - 1;
/// Longest trace context carried; a W3C `traceparent` has 55 bytes.
pub const MAX_TRACE: usize = 128;
/// Longest detail of a rejection, in bytes.
pub const MAX_DETAIL: usize = 255;
/// Longest encoded OPEN.
pub const MAX_OPEN: usize = 2 + 2 * 19 + 1 + MAX_TRACE;
/// Bytes that may be under way in each direction of a lane.
pub const WINDOW: u32 = 64 * 1024;
/// What tells the shared tunnels of one peer apart: chosen by the client, at random.
pub type SharedId = [u8; 16];
/// Length of an ADOPT, the longest of the frames that stand alone in a record.
pub(crate) const MAX_ADOPT: usize = 21;
/// Longest encoded REJECT.
pub const MAX_REJECT: usize = 3 + MAX_DETAIL;

pub(crate) const OPEN: u8 = 1;
pub(crate) const DATA: u8 = 2;
pub(crate) const FIN: u8 = 3;
pub(crate) const REJECT: u8 = 4;
pub(crate) const RAW: u8 = 5;
const SHARE: u8 = 6;
const ADOPT: u8 = 7;
pub(crate) const ADOPTED: u8 = 8;
pub(crate) const RESET: u8 = 9;
const GRANT: u8 = 10;
pub(crate) const LEAVE: u8 = 11;
pub(crate) const RETIRE: u8 = 12;
const VERSION: u8 = 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("frame without a type")]
    Empty,
    #[error("frame of unknown type {0}")]
    UnknownType(u8),
    #[error("OPEN of version {0}, this agent speaks version 1")]
    UnknownVersion(u8),
    #[error("{0} frame cut short or with bytes left over")]
    Malformed(&'static str),
    #[error("{0} frame where the protocol does not allow one")]
    OutOfOrder(&'static str),
    #[error("more bytes on a lane than were granted, or more granted than the window")]
    Window,
}

/// Asks the server to deliver a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Open {
    /// The pod's own address and port: a Service's address is already resolved.
    pub destination: SocketAddr,
    pub source: OriginalSrc,
    /// W3C trace context, opaque here; at most [`MAX_TRACE`] bytes are sent.
    pub trace: Vec<u8>,
}

impl Open {
    pub fn new(destination: SocketAddr, source: OriginalSrc) -> Self {
        Self { destination: canonical(destination), source, trace: Vec::new() }
    }

    /// Writes the frame into `out`, which must have room for [`MAX_OPEN`]; returns its length.
    pub fn encode(&self, out: &mut [u8; MAX_OPEN]) -> usize {
        let mut cursor = Writer { out, at: 0 };
        cursor.put(&[OPEN, VERSION]);
        cursor.address(self.destination);
        cursor.address(self.source.addr());
        let trace = self.trace.get(..MAX_TRACE).unwrap_or(&self.trace);
        cursor.put(&[trace.len() as u8]);
        cursor.put(trace);
        cursor.at
    }

    fn decode(body: &[u8]) -> Result<Self, FrameError> {
        let (&version, rest) = body.split_first().ok_or(FrameError::Malformed("OPEN"))?;
        if version != VERSION {
            return Err(FrameError::UnknownVersion(version));
        }
        let parse = || {
            let (destination, rest) = address(rest)?;
            let (source, rest) = address(rest)?;
            let (&length, trace) = rest.split_first()?;
            (usize::from(length) == trace.len() && trace.len() <= MAX_TRACE).then(|| Self {
                destination,
                source: OriginalSrc::new(source),
                trace: trace.to_vec(),
            })
        };
        parse().ok_or(FrameError::Malformed("OPEN"))
    }
}

/// Why a server refused a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RejectReason {
    /// Authorization said no; the detail names the policy.
    Denied,
    /// The application's port is closed.
    ConnectionRefused,
    /// The pod is not here, or its application could not be reached.
    Unreachable,
    /// The application did not answer in time.
    TimedOut,
    /// The agent is draining or out of resources; another attempt may succeed.
    Unavailable,
    /// A code this agent does not know.
    Other(u8),
}

impl RejectReason {
    fn code(self) -> u8 {
        match self {
            Self::Denied => 1,
            Self::ConnectionRefused => 2,
            Self::Unreachable => 3,
            Self::TimedOut => 4,
            Self::Unavailable => 5,
            Self::Other(code) => code,
        }
    }

    fn from_code(code: u8) -> Self {
        match code {
            1 => Self::Denied,
            2 => Self::ConnectionRefused,
            3 => Self::Unreachable,
            4 => Self::TimedOut,
            5 => Self::Unavailable,
            other => Self::Other(other),
        }
    }
}

/// A refusal as it travels to the client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    pub reason: RejectReason,
    /// For people: a policy's name, an address. Cut at [`MAX_DETAIL`] bytes.
    pub detail: Box<str>,
}

impl Rejection {
    pub fn new(reason: RejectReason, detail: &str) -> Self {
        let mut end = detail.len().min(MAX_DETAIL);
        while !detail.is_char_boundary(end) {
            end -= 1;
        }
        Self { reason, detail: detail[..end].into() }
    }

    pub fn encode(&self, out: &mut [u8; MAX_REJECT]) -> usize {
        let detail = self.detail.as_bytes();
        let detail = detail.get(..MAX_DETAIL).unwrap_or(detail);
        let mut cursor = Writer { out, at: 0 };
        cursor.put(&[REJECT, self.reason.code(), detail.len() as u8]);
        cursor.put(detail);
        cursor.at
    }

    fn decode(body: &[u8]) -> Result<Self, FrameError> {
        let parse = || {
            let (&code, rest) = body.split_first()?;
            let (&length, detail) = rest.split_first()?;
            let detail = std::str::from_utf8(detail).ok()?;
            (usize::from(length) == detail.len())
                .then(|| Self { reason: RejectReason::from_code(code), detail: detail.into() })
        };
        parse().ok_or(FrameError::Malformed("REJECT"))
    }
}

/// One decoded frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame<'a> {
    Open(Open),
    Data(&'a [u8]),
    Fin,
    Reject(Rejection),
    Raw,
    Share(SharedId),
    Adopt(Place),
    Adopted,
    Reset,
    Grant(u32),
    Leave,
    Retire,
}

/// Where on a peer's shared tunnels a stream is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub tunnel: SharedId,
    pub lane: u32,
}

impl Place {
    pub(crate) fn encode_adopt(&self) -> [u8; MAX_ADOPT] {
        let mut out = [ADOPT; MAX_ADOPT];
        out[1..17].copy_from_slice(&self.tunnel);
        out[17..].copy_from_slice(&self.lane.to_be_bytes());
        out
    }
}

pub(crate) fn encode_share(id: &SharedId) -> [u8; 17] {
    let mut out = [SHARE; 17];
    out[1..].copy_from_slice(id);
    out
}

pub(crate) fn encode_grant(bytes: u32) -> [u8; 5] {
    let mut out = [GRANT; 5];
    out[1..].copy_from_slice(&bytes.to_be_bytes());
    out
}

impl<'a> Frame<'a> {
    /// Decodes a record's content.
    pub fn decode(content: &'a [u8]) -> Result<Self, FrameError> {
        let (&kind, body) = content.split_first().ok_or(FrameError::Empty)?;
        match kind {
            DATA if body.is_empty() => Err(FrameError::Malformed("DATA")),
            DATA => Ok(Self::Data(body)),
            FIN => bare(body, "FIN", Self::Fin),
            RAW => bare(body, "RAW", Self::Raw),
            ADOPTED => bare(body, "ADOPTED", Self::Adopted),
            RESET => bare(body, "RESET", Self::Reset),
            LEAVE => bare(body, "LEAVE", Self::Leave),
            RETIRE => bare(body, "RETIRE", Self::Retire),
            SHARE => body.try_into().map(Self::Share).map_err(|_| FrameError::Malformed("SHARE")),
            ADOPT => match body.split_first_chunk::<16>() {
                Some((&tunnel, &[a, b, c, slot])) => {
                    Ok(Self::Adopt(Place { tunnel, lane: u32::from_be_bytes([a, b, c, slot]) }))
                }
                _ => Err(FrameError::Malformed("ADOPT")),
            },
            GRANT => {
                let bytes = body.try_into().map_err(|_| FrameError::Malformed("GRANT"))?;
                Ok(Self::Grant(u32::from_be_bytes(bytes)))
            }
            OPEN => Open::decode(body).map(Self::Open),
            REJECT => Rejection::decode(body).map(Self::Reject),
            other => Err(FrameError::UnknownType(other)),
        }
    }

    pub fn name(&self) -> &'static str {
        match self {
            Self::Open(_) => "OPEN",
            Self::Data(_) => "DATA",
            Self::Fin => "FIN",
            Self::Reject(_) => "REJECT",
            Self::Raw => "RAW",
            Self::Share(_) => "SHARE",
            Self::Adopt(_) => "ADOPT",
            Self::Adopted => "ADOPTED",
            Self::Reset => "RESET",
            Self::Grant(_) => "GRANT",
            Self::Leave => "LEAVE",
            Self::Retire => "RETIRE",
        }
    }
}

/// A frame that has no body.
fn bare<'a>(body: &[u8], name: &'static str, frame: Frame<'a>) -> Result<Frame<'a>, FrameError> {
    if body.is_empty() { Ok(frame) } else { Err(FrameError::Malformed(name)) }
}

struct Writer<'a> {
    out: &'a mut [u8],
    at: usize,
}

impl Writer<'_> {
    fn put(&mut self, bytes: &[u8]) {
        self.out[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
    }

    fn address(&mut self, address: SocketAddr) {
        match address.ip() {
            IpAddr::V4(ip) => {
                self.put(&[4]);
                self.put(&ip.octets());
            }
            IpAddr::V6(ip) => {
                self.put(&[6]);
                self.put(&ip.octets());
            }
        }
        self.put(&address.port().to_be_bytes());
    }
}

fn address(bytes: &[u8]) -> Option<(SocketAddr, &[u8])> {
    let (family, rest) = bytes.split_first()?;
    let (ip, rest) = match family {
        4 => {
            let (octets, rest) = rest.split_first_chunk::<4>()?;
            (IpAddr::V4(Ipv4Addr::from(*octets)), rest)
        }
        6 => {
            let (octets, rest) = rest.split_first_chunk::<16>()?;
            (IpAddr::V6(Ipv6Addr::from(*octets)), rest)
        }
        _ => return None,
    };
    let (port, rest) = rest.split_first_chunk::<2>()?;
    Some((canonical(SocketAddr::new(ip, u16::from_be_bytes(*port))), rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_open() -> impl Strategy<Value = Open> {
        (any::<SocketAddr>(), any::<SocketAddr>(), prop::collection::vec(any::<u8>(), 0..=MAX_TRACE))
            .prop_map(|(destination, source, trace)| Open {
                // Flow label and scope don't travel.
                destination: canonical(destination),
                source: OriginalSrc::new(source),
                trace,
            })
    }

    proptest! {
        #[test]
        fn an_open_survives_the_wire(open in any_open()) {
            let mut out = [0; MAX_OPEN];
            let n = open.encode(&mut out);
            prop_assert_eq!(Frame::decode(&out[..n]), Ok(Frame::Open(open)));
            for cut in 2..n {
                prop_assert_eq!(Frame::decode(&out[..cut]), Err(FrameError::Malformed("OPEN")));
            }
        }

        #[test]
        fn a_rejection_survives_the_wire(code: u8, detail in ".{0,400}") {
            let rejection = Rejection::new(RejectReason::from_code(code), &detail);
            prop_assert!(detail.starts_with(&*rejection.detail));
            let mut out = [0; MAX_REJECT];
            let n = rejection.encode(&mut out);
            prop_assert_eq!(Frame::decode(&out[..n]), Ok(Frame::Reject(rejection)));
            prop_assert!(Frame::decode(&out[..n - 1]).is_err());
        }

        #[test]
        fn whatever_decodes_encodes_to_the_same_bytes(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            match Frame::decode(&bytes) {
                Ok(Frame::Reject(rejection)) => {
                    let mut out = [0; MAX_REJECT];
                    let n = rejection.encode(&mut out);
                    prop_assert_eq!(&out[..n], &bytes[..]);
                }
                Ok(Frame::Data(data)) => prop_assert_eq!(data, &bytes[1..]),
                Ok(Frame::Share(id)) => prop_assert_eq!(&encode_share(&id)[..], &bytes[..]),
                Ok(Frame::Adopt(place)) => prop_assert_eq!(&place.encode_adopt()[..], &bytes[..]),
                Ok(Frame::Grant(more)) => prop_assert_eq!(&encode_grant(more)[..], &bytes[..]),
                _ => {}
            }
        }
    }

    #[test]
    fn frames_that_mean_nothing_are_refused() {
        assert_eq!(Frame::decode(&[]), Err(FrameError::Empty));
        assert_eq!(Frame::decode(&[0]), Err(FrameError::UnknownType(0)));
        assert_eq!(Frame::decode(&[13, 1]), Err(FrameError::UnknownType(13)));
        assert_eq!(Frame::decode(&[SHARE, 1]), Err(FrameError::Malformed("SHARE")));
        assert_eq!(Frame::decode(&[ADOPT; 20]), Err(FrameError::Malformed("ADOPT")));
        assert_eq!(Frame::decode(&[GRANT, 0, 0, 1]), Err(FrameError::Malformed("GRANT")));
        for bare in [ADOPTED, RESET, LEAVE, RETIRE] {
            assert!(Frame::decode(&[bare]).is_ok() && Frame::decode(&[bare, 0]).is_err());
        }
        assert_eq!(Frame::decode(&[RAW, 1]), Err(FrameError::Malformed("RAW")));
        assert_eq!(Frame::decode(&[DATA]), Err(FrameError::Malformed("DATA")));
        assert_eq!(Frame::decode(&[FIN, 0]), Err(FrameError::Malformed("FIN")));
        assert_eq!(Frame::decode(&[OPEN, 2]), Err(FrameError::UnknownVersion(2)));
        assert_eq!(Frame::decode(&[REJECT, 1, 1, 0xff]), Err(FrameError::Malformed("REJECT")));
    }
}
