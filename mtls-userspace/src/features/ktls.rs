//! Kernel TLS: a cipher in; whether the kernel seals a record with it, and opens it again, out.

use std::io::{self, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;

use super::path::{RECORD, expect, pair, set};
use crate::capture::probe::{Obstacle, Outcome};
use crate::tunnel::{ContentType, OUR_KEY_UPDATE, receive_record, send_record};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Cipher {
    Aes128Gcm,
    Aes256Gcm,
    Chacha20Poly1305,
}

impl Cipher {
    /// Its number in linux/tls.h, and the lengths of IV, key, salt.
    fn shape(self) -> (u16, usize, usize, usize) {
        match self {
            Self::Aes128Gcm => (libc::TLS_CIPHER_AES_GCM_128, 8, 16, 4),
            Self::Aes256Gcm => (libc::TLS_CIPHER_AES_GCM_256, 8, 32, 4),
            Self::Chacha20Poly1305 => (libc::TLS_CIPHER_CHACHA20_POLY1305, 12, 32, 0),
        }
    }

    /// `struct tls12_crypto_info_*`, with a key that never protects anything.
    fn info(self, key: u8) -> Vec<u8> {
        let (cipher, iv, secret, salt) = self.shape();
        let mut info = [libc::TLS_1_3_VERSION.to_ne_bytes(), cipher.to_ne_bytes()].concat();
        info.extend([vec![1; iv], vec![key; secret], vec![2; salt], vec![0; 8]].concat());
        info
    }
}

/// Both directions, there and back.
pub(super) fn attempt(cipher: Cipher) -> Outcome {
    let (mut near, mut far) = kernel_pair()?;
    hand_over(&near, libc::TLS_TX, cipher, 1).map_err(during("sending"))?;
    hand_over(&far, libc::TLS_RX, cipher, 1).map_err(during("receiving"))?;
    hand_over(&far, libc::TLS_TX, cipher, 2).map_err(during("sending"))?;
    hand_over(&near, libc::TLS_RX, cipher, 2).map_err(during("receiving"))?;
    exchange(&mut near, &mut far).map_err(during("a record"))?;
    exchange(&mut far, &mut near).map_err(during("a record back"))?;
    Ok("a record each way".into())
}

/// A second key for both ends of a direction, with the KeyUpdate between that TLS wants there.
pub(super) fn rekey() -> Outcome {
    let (mut near, mut far) = kernel_pair()?;
    let cipher = Cipher::Aes128Gcm;
    hand_over(&near, libc::TLS_TX, cipher, 1).map_err(during("the first key"))?;
    hand_over(&far, libc::TLS_RX, cipher, 1).map_err(during("the first key"))?;
    exchange(&mut near, &mut far).map_err(during("a record"))?;
    let kind = ContentType::Handshake as u8;
    send_record(near.as_fd(), kind, &OUR_KEY_UPDATE).map_err(during("a KeyUpdate"))?;
    let mut heard = [0; OUR_KEY_UPDATE.len()];
    let received = receive_record(far.as_fd(), &mut heard).map_err(during("a KeyUpdate"))?;
    if (received, heard) != ((kind, heard.len()), OUR_KEY_UPDATE) {
        return Err(during("a KeyUpdate")(io::ErrorKind::InvalidData.into()));
    }
    hand_over(&near, libc::TLS_TX, cipher, 3).map_err(during("the second key, sending"))?;
    hand_over(&far, libc::TLS_RX, cipher, 3).map_err(during("the second key, receiving"))?;
    exchange(&mut near, &mut far).map_err(during("a record under the second key"))?;
    Ok("a second key for each end".into())
}

fn kernel_pair() -> Result<(TcpStream, TcpStream), Obstacle> {
    let (near, far) = pair()?;
    for socket in [&near, &far] {
        set(socket, libc::IPPROTO_TCP, libc::TCP_ULP, b"tls")
            .map_err(during("the kernel has no TLS (CONFIG_TLS; `modprobe tls`)"))?;
    }
    Ok((near, far))
}

fn hand_over(socket: &TcpStream, direction: libc::c_int, cipher: Cipher, key: u8) -> io::Result<()> {
    set(socket, libc::SOL_TLS, direction, &cipher.info(key))
}

fn exchange(from: &mut TcpStream, to: &mut TcpStream) -> io::Result<()> {
    from.write_all(RECORD)?;
    expect(to, RECORD)
}

fn during(what: &'static str) -> impl Fn(io::Error) -> Obstacle {
    move |error| Obstacle::of(error).during(what)
}
