//! Frames: bytes from a packet socket in, TCP segments out; and what a TLS 1.3 hello says in the clear.
//!
//! Pure. Anything that isn't TCP over Ethernet and IP yields nothing.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// One TCP segment.
#[derive(Debug)]
pub struct Segment<'a> {
    pub src: SocketAddr,
    pub dst: SocketAddr,
    pub seq: u32,
    pub syn: bool,
    pub ack: bool,
    pub payload: &'a [u8],
}

impl<'a> Segment<'a> {
    /// Reads an Ethernet frame.
    pub fn parse(frame: &'a [u8]) -> Option<Self> {
        let packet = frame.get(14..)?;
        let (src, dst, tcp) = match frame.get(12..14)? {
            [0x08, 0x00] => {
                let header = usize::from(packet.first()? & 0x0f) * 4;
                let total = usize::from(u16::from_be_bytes(array(packet, 2)?));
                // A segment larger than 64 KiB (segmentation offload) has no length here.
                let end = if total == 0 { packet.len() } else { total.min(packet.len()) };
                if *packet.get(9)? != 6 {
                    return None;
                }
                let src = Ipv4Addr::from(array::<4>(packet, 12)?);
                let dst = Ipv4Addr::from(array::<4>(packet, 16)?);
                (IpAddr::from(src), IpAddr::from(dst), packet.get(header..end)?)
            }
            [0x86, 0xdd] => {
                let length = usize::from(u16::from_be_bytes(array(packet, 4)?));
                let end = if length == 0 { packet.len() } else { (40 + length).min(packet.len()) };
                if *packet.get(6)? != 6 {
                    return None;
                }
                let src = Ipv6Addr::from(array::<16>(packet, 8)?);
                let dst = Ipv6Addr::from(array::<16>(packet, 24)?);
                (IpAddr::from(src), IpAddr::from(dst), packet.get(40..end)?)
            }
            _ => return None,
        };
        let flags = *tcp.get(13)?;
        Some(Self {
            src: SocketAddr::new(src, u16::from_be_bytes(array(tcp, 0)?)),
            dst: SocketAddr::new(dst, u16::from_be_bytes(array(tcp, 2)?)),
            seq: u32::from_be_bytes(array(tcp, 4)?),
            syn: flags & 0x02 != 0,
            ack: flags & 0x10 != 0,
            payload: tcp.get(usize::from(tcp.get(12)? >> 4) * 4..)?,
        })
    }
}

/// What the two hellos of a TLS handshake say: they are the only part of it that is not encrypted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hello {
    /// From `supported_versions`; 0x0304 is TLS 1.3.
    pub version: Option<u16>,
    pub cipher: u16,
    pub group: Option<u16>,
    pub server_name: bool,
}

impl Hello {
    pub fn cipher_name(&self) -> &'static str {
        match self.cipher {
            0x1301 => "AES-128-GCM",
            0x1302 => "AES-256-GCM",
            0x1303 => "ChaCha20-Poly1305",
            _ => "unknown",
        }
    }

    pub fn group_name(&self) -> &'static str {
        match self.group {
            Some(0x11ec) => "X25519MLKEM768",
            Some(0x001d) => "X25519",
            Some(0x0017) => "P-256",
            _ => "unknown",
        }
    }
}

/// Reads the first bytes of both directions of a connection.
pub fn hello(client: &[u8], server: &[u8]) -> Option<Hello> {
    let mut hello = Hello::default();
    // Record header, handshake header, legacy version, random.
    let fixed = 5 + 4 + 2 + 32;
    if client.get(..2)? != [22, 3]
        || *client.get(5)? != 1
        || server.get(..2)? != [22, 3]
        || *server.get(5)? != 2
    {
        return None;
    }
    let session = usize::from(*client.get(fixed)?);
    let ciphers = fixed + 1 + session;
    let compressions = ciphers + 2 + usize::from(u16::from_be_bytes(array(client, ciphers)?));
    let extensions = compressions + 1 + usize::from(*client.get(compressions)?);
    for (kind, _) in extensions_from(client, extensions) {
        hello.server_name |= kind == 0;
    }
    let session = usize::from(*server.get(fixed)?);
    let cipher = fixed + 1 + session;
    hello.cipher = u16::from_be_bytes(array(server, cipher)?);
    for (kind, body) in extensions_from(server, cipher + 3) {
        match kind {
            43 => hello.version = array(body, 0).map(u16::from_be_bytes),
            51 => hello.group = array(body, 0).map(u16::from_be_bytes),
            _ => {}
        }
    }
    Some(hello)
}

fn extensions_from(hello: &[u8], at: usize) -> Vec<(u16, &[u8])> {
    let mut found = Vec::new();
    let mut rest = hello.get(at + 2..).unwrap_or_default();
    let total = array(hello, at).map_or(0, |length| usize::from(u16::from_be_bytes(length)));
    rest = rest.get(..total).unwrap_or(rest);
    while let (Some(kind), Some(length)) = (array(rest, 0), array(rest, 2)) {
        let end = 4 + usize::from(u16::from_be_bytes(length));
        let Some(body) = rest.get(4..end) else { break };
        found.push((u16::from_be_bytes(kind), body));
        rest = &rest[end..];
    }
    found
}

/// Follows the TLS records of one direction and tells where it stops being TLS.
#[derive(Debug, Default)]
pub struct Records {
    header: Vec<u8>,
    left: usize,
    pub count: u64,
    pub broken: bool,
}

impl Records {
    pub fn feed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && !self.broken {
            if self.left > 0 {
                let n = self.left.min(bytes.len());
                self.left -= n;
                bytes = &bytes[n..];
                continue;
            }
            let n = (5 - self.header.len()).min(bytes.len());
            self.header.extend_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
            if let [kind, major, minor, high, low] = self.header[..] {
                self.left = usize::from(u16::from_be_bytes([high, low]));
                // RFC 8446, 5.1 and 5.2: four record types, a frozen version, at most 2^14 + 256 bytes.
                self.broken =
                    !(20..=23).contains(&kind) || major != 3 || minor > 3 || self.left > 16384 + 256;
                self.count += 1;
                self.header.clear();
            }
        }
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_cut_anywhere_are_records() {
        let mut stream = vec![22, 3, 1, 0, 2, 9, 9];
        stream.extend([23, 3, 3, 0, 1, 7]);
        for cut in 0..stream.len() {
            let mut records = Records::default();
            records.feed(&stream[..cut]);
            records.feed(&stream[cut..]);
            assert!(!records.broken && records.count == 2, "cut at {cut}");
        }
    }

    #[test]
    fn plain_http_is_no_record() {
        let mut records = Records::default();
        records.feed(b"GET / HTTP/1.1\r\n");
        assert!(records.broken);
    }

    #[test]
    fn a_frame_cut_short_is_no_segment() {
        let mut frame = vec![0; 14 + 20 + 20];
        frame[12..14].copy_from_slice(&[8, 0]);
        frame[14] = 0x45;
        frame[16..18].copy_from_slice(&40u16.to_be_bytes());
        frame[23] = 6;
        frame[14 + 20 + 12] = 0x50;
        assert!(Segment::parse(&frame).is_some());
        for end in 0..frame.len() {
            assert!(Segment::parse(&frame[..end]).is_none(), "{end} bytes");
        }
    }
}
