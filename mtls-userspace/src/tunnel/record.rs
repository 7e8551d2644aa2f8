//! TLS 1.3 records after the handshake: plaintext in, sealed in place; ciphertext in, opened in place.
//!
//! Takes over the traffic secrets that rustls negotiated and speaks RFC 8446 section 5 for application data, alerts
//! and post-handshake messages. It owns no buffer, never touches a socket, and never copies a payload. What a TLS 1.3
//! receiver must refuse is refused here; every refusal is final for the connection.

use std::ops::Range;

use aws_lc_rs::aead::Aad;
use rustls::ConnectionTrafficSecrets;

use super::key::Key;

/// Type, version, length.
pub const HEADER: usize = 5;
/// Content type at the end of the inner plaintext, and the authentication tag.
pub const TRAILER: usize = 1 + 16;
/// Largest content of one record (RFC 8446, 5.1).
pub const MAX_CONTENT: usize = 1 << 14;
/// Largest record on the wire: 2^14 + 256 and the header (RFC 8446, 5.2).
pub const MAX_RECORD: usize = HEADER + MAX_CONTENT + 256;

const OUTER_TYPE: u8 = 23;
const VERSION: [u8; 2] = [3, 3];

/// The content types that may follow a handshake.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ContentType {
    Alert = 21,
    Handshake = 22,
    ApplicationData = 23,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    #[error("record of outer type {0}: only application data may follow the handshake")]
    OuterType(u8),
    #[error("record of version {0:#06x}, not 0x0303")]
    Version(u16),
    #[error("record of {0} bytes: TLS 1.3 allows 17 to 16640")]
    Length(usize),
    #[error("record that does not authenticate under the negotiated key")]
    Forged,
    #[error("record of padding alone")]
    NoContentType,
    #[error("record of inner content type {0}")]
    InnerType(u8),
    #[error("empty alert or handshake record")]
    Empty,
    #[error("record content of {0} bytes: TLS 1.3 allows 16384")]
    ContentLength(usize),
    #[error("more records under one key than its cipher allows")]
    KeyExhausted,
    #[error("negotiated keys that the record layer cannot use")]
    UnusableKey,
}

/// Seals outgoing records.
pub struct Sealer {
    key: Key,
}

impl Sealer {
    pub fn new(sequence: u64, secrets: &ConnectionTrafficSecrets) -> Result<Self, RecordError> {
        Ok(Self { key: Key::new(sequence, secrets)? })
    }

    pub(super) fn key(&self) -> &Key {
        &self.key
    }

    /// Records sealed under the current key.
    pub fn sequence(&self) -> u64 {
        self.key.sequence
    }

    /// Seals the `length` bytes that stand at `record[HEADER..]`; returns the whole record's length.
    ///
    /// `record` must have room for [`HEADER`] before and [`TRAILER`] after them.
    pub fn seal(
        &mut self,
        record: &mut [u8],
        length: usize,
        content: ContentType,
    ) -> Result<usize, RecordError> {
        if length > MAX_CONTENT {
            return Err(RecordError::ContentLength(length));
        }
        let sealed = length + TRAILER;
        let total = HEADER + sealed;
        let room = record.len();
        let record = record.get_mut(..total).ok_or(RecordError::Length(room))?;
        let [high, low] = (sealed as u16).to_be_bytes();
        let header = [OUTER_TYPE, VERSION[0], VERSION[1], high, low];
        let (head, body) = record.split_at_mut(HEADER);
        head.copy_from_slice(&header);
        let (inner, tag) = body.split_at_mut(length + 1);
        inner[length] = content as u8;
        let computed = self
            .key
            .next(|key, nonce| key.seal_in_place_separate_tag(nonce, Aad::from(header), inner))?
            .map_err(|_| RecordError::UnusableKey)?;
        tag.copy_from_slice(computed.as_ref());
        Ok(total)
    }
}

/// Opens incoming records.
pub struct Opener {
    key: Key,
}

impl Opener {
    pub fn new(sequence: u64, secrets: &ConnectionTrafficSecrets) -> Result<Self, RecordError> {
        Ok(Self { key: Key::new(sequence, secrets)? })
    }

    pub(super) fn key(&self) -> &Key {
        &self.key
    }

    /// Authenticates and decrypts one whole record (as [`whole_record`] measured it) in place; returns what it
    /// carries and where in `record` that stands.
    pub fn open(&mut self, record: &mut [u8]) -> Result<(ContentType, Range<usize>), RecordError> {
        let size = record.len();
        if whole_record(record)? != Some(size) {
            return Err(RecordError::Length(size));
        }
        let (head, body) = record.split_at_mut(HEADER);
        let header: [u8; HEADER] = head.try_into().map_err(|_| RecordError::Length(size))?;
        self.key
            .next(|key, nonce| key.open_in_place(nonce, Aad::from(header), body).map(|_| ()))?
            .map_err(|_| RecordError::Forged)?;
        let inner = &body[..body.len() - (TRAILER - 1)];
        let length = inner.iter().rposition(|&byte| byte != 0).ok_or(RecordError::NoContentType)?;
        let content = match inner[length] {
            21 => ContentType::Alert,
            22 => ContentType::Handshake,
            23 => ContentType::ApplicationData,
            other => return Err(RecordError::InnerType(other)),
        };
        if length > MAX_CONTENT {
            return Err(RecordError::ContentLength(length));
        }
        if length == 0 && content != ContentType::ApplicationData {
            return Err(RecordError::Empty);
        }
        Ok((content, HEADER..HEADER + length))
    }
}

/// The length of the record at the head of `bytes`, or `None` while it is not all there.
///
/// A header that no post-handshake record can have is refused before its body arrives.
pub fn whole_record(bytes: &[u8]) -> Result<Option<usize>, RecordError> {
    if let Some(&outer) = bytes.first()
        && outer != OUTER_TYPE
    {
        return Err(RecordError::OuterType(outer));
    }
    let Some(&[_, major, minor, high, low]) = bytes.first_chunk::<HEADER>() else { return Ok(None) };
    if [major, minor] != VERSION {
        return Err(RecordError::Version(u16::from_be_bytes([major, minor])));
    }
    let length = usize::from(u16::from_be_bytes([high, low]));
    if !(TRAILER..=MAX_CONTENT + 256).contains(&length) {
        return Err(RecordError::Length(length));
    }
    Ok((bytes.len() >= HEADER + length).then_some(HEADER + length))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rustls::crypto::cipher::{AeadKey, Iv};

    fn secrets(cipher: u8) -> ConnectionTrafficSecrets {
        let (key, iv) = (AeadKey::from([7; 32]), Iv::from([9; 12]));
        match cipher % 3 {
            0 => ConnectionTrafficSecrets::Aes128Gcm { key, iv },
            1 => ConnectionTrafficSecrets::Aes256Gcm { key, iv },
            _ => ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv },
        }
    }

    fn pair(cipher: u8) -> (Sealer, Opener) {
        (Sealer::new(0, &secrets(cipher)).unwrap(), Opener::new(0, &secrets(cipher)).unwrap())
    }

    /// A record whose inner plaintext is exactly `inner`, content type and padding included.
    fn raw(sealer: &mut Sealer, inner: &[u8]) -> Vec<u8> {
        let sealed = (inner.len() + 16) as u16;
        let [high, low] = sealed.to_be_bytes();
        let header = [OUTER_TYPE, 3, 3, high, low];
        let mut record = header.to_vec();
        record.extend_from_slice(inner);
        sealer
            .key
            .next(|key, nonce| {
                key.seal_in_place_append_tag(nonce, Aad::from(header), &mut Tail(&mut record)).unwrap();
            })
            .unwrap();
        record
    }

    struct Tail<'a>(&'a mut Vec<u8>);
    impl AsMut<[u8]> for Tail<'_> {
        fn as_mut(&mut self) -> &mut [u8] {
            &mut self.0[HEADER..]
        }
    }
    impl<'a> Extend<&'a u8> for Tail<'_> {
        fn extend<T: IntoIterator<Item = &'a u8>>(&mut self, iter: T) {
            self.0.extend(iter);
        }
    }

    proptest! {
        #[test]
        fn what_is_sealed_opens(cipher: u8, messages in prop::collection::vec(
            prop::collection::vec(any::<u8>(), 1..2000), 1..8))
        {
            let (mut sealer, mut opener) = pair(cipher);
            for message in messages {
                let mut record = vec![0; HEADER + message.len() + TRAILER];
                record[HEADER..HEADER + message.len()].copy_from_slice(&message);
                let n = sealer.seal(&mut record, message.len(), ContentType::ApplicationData).unwrap();
                prop_assert_eq!(n, record.len());
                prop_assert_eq!(whole_record(&record).unwrap(), Some(n));
                prop_assert_eq!(whole_record(&record[..n - 1]).unwrap(), None);
                let (content, range) = opener.open(&mut record).unwrap();
                prop_assert_eq!(content, ContentType::ApplicationData);
                prop_assert_eq!(&record[range], &message[..]);
            }
        }

        #[test]
        fn a_changed_bit_never_opens(cipher: u8, message in prop::collection::vec(any::<u8>(), 1..300),
            byte: prop::sample::Index, bit in 0..8u8)
        {
            let (mut sealer, mut opener) = pair(cipher);
            let mut record = vec![0; HEADER + message.len() + TRAILER];
            record[HEADER..HEADER + message.len()].copy_from_slice(&message);
            sealer.seal(&mut record, message.len(), ContentType::ApplicationData).unwrap();
            let at = byte.index(record.len());
            record[at] ^= 1 << bit;
            prop_assert!(opener.open(&mut record).is_err());
        }

        #[test]
        fn no_bytes_make_the_header_check_panic(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let _ = whole_record(&bytes);
        }
    }

    #[test]
    fn padding_is_stripped() {
        let (mut sealer, mut opener) = pair(0);
        let mut record = raw(&mut sealer, &[b'h', b'i', 23, 0, 0, 0, 0]);
        let (content, range) = opener.open(&mut record).unwrap();
        assert_eq!((content, &record[range]), (ContentType::ApplicationData, &b"hi"[..]));
    }

    #[test]
    fn a_record_of_padding_alone_is_refused() {
        let (mut sealer, mut opener) = pair(0);
        let mut record = raw(&mut sealer, &[0; 9]);
        assert_eq!(opener.open(&mut record), Err(RecordError::NoContentType));
    }

    #[test]
    fn only_application_data_may_be_empty() {
        let (mut sealer, mut opener) = pair(1);
        let mut record = raw(&mut sealer, &[22, 0]);
        assert_eq!(opener.open(&mut record), Err(RecordError::Empty));
        let mut record = raw(&mut sealer, &[21]);
        assert_eq!(opener.open(&mut record), Err(RecordError::Empty));
        let mut record = raw(&mut sealer, &[23]);
        assert_eq!(opener.open(&mut record), Ok((ContentType::ApplicationData, 5..5)));
    }

    #[test]
    fn an_inner_change_cipher_spec_is_refused() {
        let (mut sealer, mut opener) = pair(2);
        let mut record = raw(&mut sealer, &[1, 20]);
        assert_eq!(opener.open(&mut record), Err(RecordError::InnerType(20)));
    }

    #[test]
    fn content_beyond_two_to_fourteen_is_refused_and_exactly_that_is_not() {
        let (mut sealer, mut opener) = pair(0);
        let mut inner = vec![1; MAX_CONTENT];
        inner.push(23);
        let mut record = raw(&mut sealer, &inner);
        assert_eq!(opener.open(&mut record).unwrap().1.len(), MAX_CONTENT);
        let mut inner = vec![1; MAX_CONTENT + 1];
        inner.push(23);
        let mut record = raw(&mut sealer, &inner);
        assert_eq!(opener.open(&mut record), Err(RecordError::ContentLength(MAX_CONTENT + 1)));
    }

    #[test]
    fn headers_that_no_record_can_have_are_refused() {
        assert_eq!(whole_record(&[20, 3, 3, 0, 1, 1]), Err(RecordError::OuterType(20)));
        assert_eq!(whole_record(&[21]), Err(RecordError::OuterType(21)));
        assert_eq!(whole_record(&[23, 3, 1, 0, 20]), Err(RecordError::Version(0x0301)));
        assert_eq!(whole_record(&[23, 3, 3, 0, 16]), Err(RecordError::Length(16)));
        assert_eq!(whole_record(&[23, 3, 3, 0x41, 0x01]), Err(RecordError::Length(16641)));
        assert_eq!(whole_record(&[23, 3, 3, 0x41, 0x00]), Ok(None));
    }

    #[test]
    fn records_out_of_order_do_not_open() {
        let (mut sealer, mut opener) = pair(0);
        let _first = raw(&mut sealer, &[1, 23]);
        let mut second = raw(&mut sealer, &[2, 23]);
        assert_eq!(opener.open(&mut second), Err(RecordError::Forged));
    }

    #[test]
    fn a_key_at_its_limit_is_used_no_more() {
        let mut sealer = Sealer::new((1 << 24) - 1, &secrets(0)).unwrap();
        let mut record = [0; 64];
        assert!(sealer.seal(&mut record, 1, ContentType::ApplicationData).is_ok());
        assert_eq!(sealer.seal(&mut record, 1, ContentType::ApplicationData), Err(RecordError::KeyExhausted));
        let mut opener = Opener::new(1 << 24, &secrets(0)).unwrap();
        assert_eq!(opener.open(&mut record[..23]), Err(RecordError::KeyExhausted));
    }
}
