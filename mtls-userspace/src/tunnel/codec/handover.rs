//! A raw direction's records handed to the kernel: keys and counters go there, and stay there until the tunnel ends.
//!
//! What the kernel then can't do itself comes back here: alerts, post-handshake messages, the end of our direction.
//! Each direction is handed over alone; one whose handover fails goes on in userspace.

use std::io;

use tokio::net::TcpStream;

use super::{CLOSE, Codec, Pulled, alert, gather};
use crate::tunnel::record::{ContentType, HEADER, RecordError, whole_record};
use crate::tunnel::{Error, Violation, kernel};

/// A control record's content; a session ticket with a client's chain inside spans several.
const CONTROL: usize = 1 << 14;

impl Codec {
    /// Whether our direction's next record can be the kernel's: all that was sealed here must have been sent.
    pub fn may_hand_over_sending(&self) -> bool {
        self.kernel && self.order.outbound_raw() && !self.key_update_owed
    }

    pub fn hand_over_sending(&self, tunnel: &TcpStream) -> io::Result<()> {
        kernel::send_in_kernel(tunnel, self.sealer.key())
    }

    /// Whether the peer's direction is to be handed over as soon as nothing of it is left here.
    pub fn wants_kernel_to_receive(&self) -> bool {
        self.kernel && self.order.inbound_raw() && !self.incoming.has_plaintext() && self.handshake.is_empty()
    }

    /// How many bytes are missing from the record received in part, as far as is known; 0 if there is none.
    pub fn missing(&self) -> Result<usize, Error> {
        let unread = self.incoming.unread();
        if unread.is_empty() || whole_record(unread)?.is_some() {
            return Ok(0);
        }
        let Some(&[.., high, low]) = unread.first_chunk::<HEADER>() else { return Ok(HEADER - unread.len()) };
        Ok(HEADER + usize::from(u16::from_be_bytes([high, low])) - unread.len())
    }

    pub fn hand_over_receiving(&self, tunnel: &TcpStream) -> io::Result<()> {
        kernel::receive_in_kernel(tunnel, self.opener.key())
    }

    /// Fails once the kernel has used a key as often as its cipher allows, or the peer asks for a new one: kernels before
    /// Linux 6.14 take none.
    pub fn judge_kernel_key(&self, tunnel: &TcpStream) -> Result<(), Error> {
        if self.key_update_owed {
            return Err(Error::KeyInKernel);
        }
        match kernel::records_sent(tunnel, self.sealer.key())? {
            sent if sent >= self.sealer.key().limit - kernel::RECORDS_BETWEEN_LOOKS => {
                Err(RecordError::KeyExhausted.into())
            }
            _ => Ok(()),
        }
    }

    /// Whether the peer asked for a key that the kernel can't take.
    pub fn key_update_owed(&self) -> bool {
        self.key_update_owed
    }

    /// Ends our direction, which the kernel seals.
    pub fn end_in_kernel(&mut self, tunnel: &TcpStream) -> io::Result<()> {
        kernel::send_control(tunnel, ContentType::Alert as u8, &CLOSE)?;
        self.order.sent_end();
        Ok(())
    }

    /// Takes the record that the kernel would not splice, and judges it as [`Codec::pull`] would.
    pub fn control_from_kernel(&mut self, tunnel: &TcpStream) -> Result<Pulled, Error> {
        let mut content = vec![0; CONTROL];
        let (kind, n) = kernel::receive_control(tunnel, &mut content)?;
        let content = content.get(..n).unwrap_or_default();
        match kind {
            kind if kind == ContentType::Alert as u8 => alert(content, &mut self.order),
            kind if kind == ContentType::Handshake as u8 => {
                match gather(content, &mut self.schedule, &mut self.handshake)? {
                    None => Ok(Pulled::Data),
                    Some(_) => Err(Error::KeyInKernel),
                }
            }
            other => Err(Violation::Record(RecordError::InnerType(other)).into()),
        }
    }
}
