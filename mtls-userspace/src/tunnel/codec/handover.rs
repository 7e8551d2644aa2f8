//! A raw direction's records handed to the kernel: keys and counters go there, and stay there until the tunnel ends.
//!
//! What the kernel then can't do itself comes back here: alerts, post-handshake messages, the end of our direction.
//! Each direction is handed over alone; one whose handover fails goes on in userspace.

use std::io;

use tokio::net::TcpStream;

use super::{CLOSE, Codec, OUR_KEY_UPDATE, Pulled, alert, gather, next_opener};
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

    /// How many calls that move data may follow before the kernel's record counter is looked at again. Makes a change of
    /// the key due when its cipher's limit is near.
    ///
    /// # Errors
    ///
    /// When the limit is near and the kernel takes no other key, as those before Linux 6.14.
    pub fn judge_kernel_key(&mut self, tunnel: &TcpStream) -> Result<u64, Error> {
        let key = self.sealer.key();
        let limit = match key.limit {
            // ChaCha20-Poly1305 needs no other.
            u64::MAX => u64::MAX,
            limit if self.kernel_rekey => limit.min(self.rekey_after.saturating_mul(4)),
            limit => limit,
        };
        let left = limit.saturating_sub(kernel::records_sent(tunnel, key)?);
        if left < kernel::RECORDS_PER_CALL {
            if !self.kernel_rekey {
                return Err(RecordError::KeyExhausted.into());
            }
            self.key_update_owed = true;
        }
        Ok(left / kernel::RECORDS_PER_CALL)
    }

    /// Whether our next record must be a KeyUpdate: the peer asked for it, or our key is used up.
    pub fn key_update_owed(&self) -> bool {
        self.key_update_owed && !self.order.outbound_ended()
    }

    /// Sends a KeyUpdate and gives the kernel the key that is in force after it. `WouldBlock` where there is no room for
    /// it yet.
    ///
    /// # Errors
    ///
    /// When the kernel takes no other key; nothing may be sent after that.
    pub fn change_key_in_kernel(&mut self, tunnel: &TcpStream) -> Result<io::Result<()>, Error> {
        if !self.kernel_rekey {
            return Err(Error::KeyInKernel);
        }
        if let Err(error) = kernel::send_control(tunnel, ContentType::Handshake as u8, &OUR_KEY_UPDATE) {
            return Ok(Err(error));
        }
        self.sealer = self.schedule.next_sealer()?;
        kernel::send_in_kernel(tunnel, self.sealer.key()).map_err(|_| Error::KeyInKernel)?;
        self.key_update_owed = false;
        Ok(Ok(()))
    }

    /// Data came that the kernel opened.
    pub fn opened_in_kernel(&mut self) {
        self.key_updates = 0;
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
                let Some(requested) = gather(content, &mut self.schedule, &mut self.handshake)? else {
                    return Ok(Pulled::Data);
                };
                if !self.kernel_rekey {
                    return Err(Error::KeyInKernel);
                }
                // The kernel opens nothing more until it has the next key.
                self.opener = next_opener(&mut self.key_updates, &mut self.schedule)?;
                kernel::receive_in_kernel(tunnel, self.opener.key()).map_err(|_| Error::KeyInKernel)?;
                self.key_update_owed |= requested;
                Ok(Pulled::Data)
            }
            other => Err(Violation::Record(RecordError::InnerType(other)).into()),
        }
    }
}
