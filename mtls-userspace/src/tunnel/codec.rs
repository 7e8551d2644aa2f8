//! One end of a tunnel without its socket: frames in, sealed records out, and the reverse.
//!
//! Joins the record layer, the frames and the part of TLS that goes on after the handshake: KeyUpdate in both
//! directions, session tickets, alerts. The caller says when to receive and what to send.

use rustls::{AlertDescription, ExtractedSecrets, SupportedCipherSuite};

use super::buffer::{HEADROOM, SLOT_DATA};
use super::frame::{
    DATA, FIN, Frame, FrameError, MAX_ADOPT, MAX_OPEN, MAX_REJECT, Open, Place, RAW, Rejection, SharedId,
};
use super::incoming::Incoming;
use super::order::{Order, Version};
use super::record::{ContentType, HEADER, Opener, Sealer, TRAILER, whole_record};
use super::schedule::Schedule;
use super::unsent::Unsent;
use super::{Config, Error, Violation};

mod handover;

/// The content of a close_notify alert, and of every other of the level that TLS 1.3 ignores.
const CLOSE: [u8; 2] = [WARNING, CLOSE_NOTIFY];
const WARNING: u8 = 1;
const CLOSE_NOTIFY: u8 = 0;
const USER_CANCELED: u8 = 90;
pub(super) const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;
/// Asks for none in return.
pub(crate) const OUR_KEY_UPDATE: [u8; 5] = [KEY_UPDATE, 0, 0, 1, 0];
/// A handshake message that spans records; a ticket with a client's chain inside has a few KiB.
const MAX_HANDSHAKE: usize = 64 * 1024;
/// KeyUpdates a peer may send without a byte of data between them.
const MAX_KEY_UPDATES: u32 = 32;
/// A record of a frame that stands alone.
pub(crate) const SHORT_RECORD: usize = HEADER + MAX_ADOPT + TRAILER;
/// Plaintext ranges gathered for one write.
pub(crate) const MAX_RANGES: usize = 64;

/// What a batch of records ended with.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Pulled {
    /// More bytes must come from the peer first, or the ranges found must be delivered first.
    Data,
    Open(Open),
    Fin,
    Reject(Rejection),
    /// The peer's direction is raw from here on; ours is owed the same.
    Raw,
    /// The tunnel is a shared one from here on: what is found in its records are lane frames.
    Share(SharedId),
    Adopt(Place),
    Adopted,
    /// The peer's close_notify where it ends no direction.
    Closed,
}

pub(crate) struct Codec {
    sealer: Sealer,
    opener: Opener,
    schedule: Schedule,
    pub order: Order,
    pub incoming: Incoming,
    /// There while the stream goes from one relay to another.
    pub unsent: Option<Box<Unsent>>,
    /// The client's OPEN while it waits for the first bytes to travel with.
    open: Option<Box<Open>>,
    /// Our direction becomes raw ahead of our next data.
    raw_owed: bool,
    /// Bytes after which this end asks for a raw stream; `u64::MAX` for never.
    raw_after: u64,
    /// Whether raw directions are to be handed to the kernel, and whether that takes further keys.
    kernel: bool,
    kernel_rekey: bool,
    /// The peer asked for our KeyUpdate before our next data.
    key_update_owed: bool,
    key_updates: u32,
    /// Records under one key before we change it.
    rekey_after: u64,
    handshake: Vec<u8>,
}

impl Codec {
    pub fn new(
        secrets: ExtractedSecrets,
        schedule: Schedule,
        incoming: Incoming,
        version: Version,
        config: &Config,
    ) -> Result<Self, Error> {
        let role = schedule.role();
        let kernel = config.kernel.contains(&schedule.suite().suite());
        Ok(Self {
            sealer: Sealer::new(secrets.tx.0, &secrets.tx.1)?,
            opener: Opener::new(secrets.rx.0, &secrets.rx.1)?,
            schedule,
            order: Order::of_version(role, version),
            incoming,
            unsent: None,
            open: None,
            raw_owed: false,
            raw_after: config.raw_after.unwrap_or(u64::MAX),
            kernel,
            kernel_rekey: config.kernel_rekey,
            key_update_owed: false,
            key_updates: 0,
            rekey_after: config.rekey_after,
            handshake: Vec::new(),
        })
    }

    pub fn suite(&self) -> SupportedCipherSuite {
        self.schedule.suite()
    }

    /// A client begins a stream; its OPEN leaves with the next [`Codec::seal_head`].
    pub fn begin(&mut self, open: Open) {
        self.order.opened();
        self.open = Some(Box::new(open));
    }

    /// Whether something waits that must be sent though there may be no data to travel with.
    pub fn head_unsent(&self) -> bool {
        self.open.is_some() || self.raw_owed
    }

    /// Makes our direction raw if the stream has moved so many bytes that it is worth it.
    pub fn moved(&mut self, bytes: u64) {
        self.raw_owed |= bytes >= self.raw_after && self.order.may_go_raw();
    }

    /// A RAW waits to be sent.
    pub fn raw_owed(&self) -> bool {
        self.raw_owed
    }

    /// Where in a slot the next data stand: a raw record has no frame type.
    pub fn data_at(&self) -> usize {
        if self.raw_owed || self.order.outbound_raw() { HEADER } else { SLOT_DATA }
    }

    /// Records under one key before a KeyUpdate. A raw direction may be the peer's kernel's to open, which takes no
    /// second key before Linux 6.14, so there it waits longer: twice the default is half of what AES-GCM allows.
    fn rekey_after(&self) -> u64 {
        if self.order.outbound_raw() { self.rekey_after.saturating_mul(2) } else { self.rekey_after }
    }

    /// Seals what must go ahead of data (an OPEN, a RAW, a KeyUpdate) so that it ends where `headroom` ends; returns
    /// where it starts. Usually that is the end: nothing.
    pub fn seal_head(&mut self, headroom: &mut [u8]) -> Result<usize, Error> {
        let end = headroom.len();
        let rekey = self.key_update_owed || self.sealer.sequence() >= self.rekey_after();
        if !self.head_unsent() && !rekey {
            return Ok(end);
        }
        let mut scratch = [0; HEADROOM];
        let mut at = 0;
        if rekey {
            scratch[HEADER..HEADER + OUR_KEY_UPDATE.len()].copy_from_slice(&OUR_KEY_UPDATE);
            at += self.sealer.seal(&mut scratch, OUR_KEY_UPDATE.len(), ContentType::Handshake)?;
            self.sealer = self.schedule.next_sealer()?;
            self.key_update_owed = false;
        }
        if let Some(open) = self.open.take() {
            let mut frame = [0; MAX_OPEN];
            let n = open.encode(&mut frame);
            let record = &mut scratch[at..];
            record[HEADER..HEADER + n].copy_from_slice(&frame[..n]);
            at += self.sealer.seal(record, n, ContentType::ApplicationData)?;
        }
        if std::mem::take(&mut self.raw_owed) {
            let record = &mut scratch[at..];
            record[HEADER] = RAW;
            at += self.sealer.seal(record, 1, ContentType::ApplicationData)?;
            self.order.sent_raw();
        }
        let start = end.checked_sub(at).ok_or(Violation::Headroom)?;
        headroom[start..].copy_from_slice(&scratch[..at]);
        Ok(start)
    }

    /// Seals the `length` application bytes that stand at `slot[data_at()..]`; returns the record's length.
    pub fn seal_data(&mut self, slot: &mut [u8], length: usize) -> Result<usize, Error> {
        if self.order.outbound_raw() {
            return Ok(self.sealer.seal(slot, length, ContentType::ApplicationData)?);
        }
        if let Some(kind) = slot.get_mut(SLOT_DATA - 1) {
            *kind = DATA;
        }
        self.order.sent_data();
        Ok(self.sealer.seal(slot, length + 1, ContentType::ApplicationData)?)
    }

    /// Seals the end of our direction at the head of `slot`, a FIN or, where it is raw, a close_notify; returns the
    /// record's length.
    pub fn seal_end(&mut self, slot: &mut [u8]) -> Result<usize, Error> {
        let (content, kind): (&[u8], _) = if self.order.outbound_raw() {
            (&CLOSE, ContentType::Alert)
        } else {
            (&[FIN], ContentType::ApplicationData)
        };
        if let Some(room) = slot.get_mut(HEADER..HEADER + content.len()) {
            room.copy_from_slice(content);
        }
        self.order.sent_end();
        Ok(self.sealer.seal(slot, content.len(), kind)?)
    }

    /// Seals a REJECT in place of an answer.
    pub fn seal_reject(&mut self, slot: &mut [u8], rejection: &Rejection) -> Result<usize, Error> {
        let mut frame = [0; MAX_REJECT];
        let n = rejection.encode(&mut frame);
        if let Some(room) = slot.get_mut(HEADER..HEADER + n) {
            room.copy_from_slice(&frame[..n]);
        }
        self.order.sent_end();
        Ok(self.sealer.seal(slot, n, ContentType::ApplicationData)?)
    }

    /// Seals the `length` bytes of lane frames that stand behind the room for a record's header; returns the record's
    /// length.
    pub fn seal_lanes(&mut self, slot: &mut [u8], length: usize) -> Result<usize, Error> {
        Ok(self.sealer.seal(slot, length, ContentType::ApplicationData)?)
    }

    /// Seals a short frame in a record of its own.
    pub fn seal_frame(&mut self, content: &[u8]) -> Result<([u8; SHORT_RECORD], usize), Error> {
        let mut record = [0; SHORT_RECORD];
        if let Some(room) = record.get_mut(HEADER..HEADER + content.len()) {
            room.copy_from_slice(content);
        }
        let n = self.sealer.seal(&mut record, content.len(), ContentType::ApplicationData)?;
        Ok((record, n))
    }

    pub fn seal_alert(&mut self, description: u8) -> Result<([u8; HEADER + 2 + TRAILER], usize), Error> {
        const FATAL: u8 = 2;
        let mut record = [0; HEADER + 2 + TRAILER];
        record[HEADER] = if description == CLOSE_NOTIFY { WARNING } else { FATAL };
        record[HEADER + 1] = description;
        let n = self.sealer.seal(&mut record, 2, ContentType::Alert)?;
        Ok((record, n))
    }

    pub fn seal_close_notify(&mut self) -> Result<([u8; HEADER + 2 + TRAILER], usize), Error> {
        self.seal_alert(CLOSE_NOTIFY)
    }

    /// Opens the whole records received, in place, and notes where DATA stands in the buffer's ranges. Stops at the
    /// first frame that is not DATA, or when a write's worth is gathered.
    pub fn pull(&mut self) -> Result<Pulled, Error> {
        let Self { incoming: Incoming { buffer: Some(buffer), start, end }, .. } = self else {
            return Ok(Pulled::Data);
        };
        let (bytes, ranges) = buffer.parts();
        while ranges.len() < MAX_RANGES {
            let unread = bytes.get_mut(*start..*end).unwrap_or_default();
            let Some(length) = whole_record(unread)? else { break };
            let (record, _) = unread.split_at_mut(length);
            let (content, range) = self.opener.open(record)?;
            let at = *start;
            *start += length;
            let plain = record.get(range.clone()).unwrap_or_default();
            match content {
                ContentType::ApplicationData if !self.handshake.is_empty() => {
                    return Err(Violation::Interleaved.into());
                }
                ContentType::ApplicationData if self.order.inbound_raw() || self.order.is_shared() => {
                    // The kernel's records are never empty, and a peer's that are would cost time and move nothing.
                    if plain.is_empty() {
                        return Err(FrameError::Empty.into());
                    }
                    self.key_updates = 0;
                    ranges.push(((at + range.start) as u32, plain.len() as u32));
                }
                ContentType::ApplicationData => {
                    let frame = Frame::decode(plain).map_err(Violation::Frame)?;
                    self.order.received(&frame).map_err(Violation::Frame)?;
                    self.key_updates = 0;
                    match frame {
                        Frame::Data(data) => {
                            ranges.push(((at + range.start + 1) as u32, data.len() as u32));
                        }
                        Frame::Open(open) => return Ok(Pulled::Open(open)),
                        Frame::Fin => return Ok(Pulled::Fin),
                        Frame::Reject(rejection) => return Ok(Pulled::Reject(rejection)),
                        Frame::Raw => {
                            self.raw_owed |= self.order.may_go_raw();
                            return Ok(Pulled::Raw);
                        }
                        Frame::Share(id) => return Ok(Pulled::Share(id)),
                        Frame::Adopt(place) => return Ok(Pulled::Adopt(place)),
                        Frame::Adopted => return Ok(Pulled::Adopted),
                        // Whoever uses the tunnel next asks for it.
                        Frame::Retire => {}
                        Frame::Reset | Frame::Grant(_) | Frame::Leave => {
                            return Err(FrameError::OutOfOrder(frame.name()).into());
                        }
                    }
                }
                ContentType::Alert => match alert(plain, &mut self.order)? {
                    Pulled::Data => {}
                    end => return Ok(end),
                },
                ContentType::Handshake => {
                    if let Some(requested) = gather(plain, &mut self.schedule, &mut self.handshake)? {
                        self.opener = next_opener(&mut self.key_updates, &mut self.schedule)?;
                        self.key_update_owed |= requested;
                    }
                }
            }
        }
        Ok(Pulled::Data)
    }
}

/// The key after a peer's KeyUpdate, of which there may not be any number.
fn next_opener(key_updates: &mut u32, schedule: &mut Schedule) -> Result<Opener, Error> {
    *key_updates += 1;
    if *key_updates > MAX_KEY_UPDATES {
        return Err(Violation::KeyUpdates.into());
    }
    Ok(schedule.next_opener()?)
}

/// What a peer's alert means.
fn alert(content: &[u8], order: &mut Order) -> Result<Pulled, Error> {
    match *content {
        [_, CLOSE_NOTIFY] => Ok(if order.received_close() { Pulled::Fin } else { Pulled::Closed }),
        [_, USER_CANCELED] => Ok(Pulled::Data),
        [_, description] => Err(Error::Refused { alert: AlertDescription::from(description) }),
        _ => Err(Violation::Alert.into()),
    }
}

/// Handles what a handshake record holds together with what an earlier one left in `rest`.
fn gather(plain: &[u8], schedule: &mut Schedule, rest: &mut Vec<u8>) -> Result<Option<bool>, Error> {
    if rest.is_empty() {
        return post_handshake(plain, schedule, rest);
    }
    let mut gathered = std::mem::take(rest);
    gathered.extend_from_slice(plain);
    post_handshake(&gathered, schedule, rest)
}

/// Handles the post-handshake messages in `bytes`; keeps an unfinished one in `rest`. Returns whether a KeyUpdate
/// came, and if so whether ours was requested.
fn post_handshake(
    mut bytes: &[u8],
    schedule: &mut Schedule,
    rest: &mut Vec<u8>,
) -> Result<Option<bool>, Error> {
    let mut key_update = None;
    while let Some((&[kind, a, b, c], tail)) = bytes.split_first_chunk::<4>() {
        // The key changes right after a KeyUpdate, so nothing may share its record (RFC 8446, 5.1).
        if key_update.is_some() {
            return Err(Violation::Handshake(kind).into());
        }
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        if length > MAX_HANDSHAKE {
            return Err(Violation::Handshake(kind).into());
        }
        let Some((message, tail)) = tail.split_at_checked(length) else { break };
        match (kind, message) {
            (NEW_SESSION_TICKET, payload) => schedule.ticket(payload)?,
            (KEY_UPDATE, [0]) => key_update = Some(false),
            (KEY_UPDATE, [1]) => key_update = Some(true),
            _ => return Err(Violation::Handshake(kind).into()),
        }
        bytes = tail;
    }
    if key_update.is_some() && !bytes.is_empty() {
        return Err(Violation::Handshake(KEY_UPDATE).into());
    }
    rest.extend_from_slice(bytes);
    Ok(key_update)
}

#[cfg(test)]
#[path = "codec_tests.rs"]
mod tests;
