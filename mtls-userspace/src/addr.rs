//! Address newtypes: what an address *means* is part of its type.
//!
//! All addresses here are canonical: a v4-mapped IPv6 address is turned into the IPv4 address it stands for.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

/// What the application dialled: a pod's address or a Service's.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct OriginalDst(SocketAddr);

/// The dialling application's own address, as the serving application will see it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct OriginalSrc(SocketAddr);

macro_rules! address {
    ($($name:ident),*) => {$(
        impl $name {
            pub fn new(addr: SocketAddr) -> Self {
                Self(canonical(addr))
            }

            pub fn addr(self) -> SocketAddr {
                self.0
            }

            pub fn ip(self) -> IpAddr {
                self.0.ip()
            }

            pub fn port(self) -> u16 {
                self.0.port()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    )*};
}

address!(OriginalDst, OriginalSrc);

/// The IPv4 address behind a v4-mapped IPv6 one; every other address unchanged.
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

/// Where to listen: `10.0.0.1:15020`, `[fd00::1]:15020`. Or without brackets, as a manifest can't but write it:
/// `$(HOST_IP):15020`, on a node that has an IPv6 address.
///
/// # Errors
///
/// When it is neither.
pub fn listening(text: &str) -> Result<SocketAddr, String> {
    let bare = || {
        let (address, port) = text.rsplit_once(':')?;
        Some(SocketAddr::new(address.parse().ok()?, port.parse().ok()?))
    };
    let address = text.parse().ok().or_else(bare);
    address.ok_or_else(|| "an address with a port, as in 10.0.0.1:15020 or [fd00::1]:15020".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_v4_mapped_address_is_the_v4_address() {
        let mapped: SocketAddr = "[::ffff:10.0.0.1]:80".parse().unwrap();
        assert_eq!(OriginalDst::new(mapped), OriginalDst::new("10.0.0.1:80".parse().unwrap()));
    }

    #[test]
    fn a_real_v6_address_stays() {
        let v6: SocketAddr = "[fd00::1]:80".parse().unwrap();
        assert_eq!(OriginalSrc::new(v6).addr(), v6);
    }

    #[test]
    fn a_nodes_address_of_either_kind_is_one_to_listen_at() {
        for (text, expected) in [
            ("10.0.0.1:15020", "10.0.0.1:15020"),
            ("[fd00::1]:15020", "[fd00::1]:15020"),
            ("fd00::1:15020", "[fd00::1]:15020"),
            ("1:2:3:4:5:6:7:8:9", "[1:2:3:4:5:6:7:8]:9"),
        ] {
            assert_eq!(listening(text).map(|address| address.to_string()), Ok(expected.into()), "{text}");
        }
        for text in ["10.0.0.1", "fd00::a", ":15020", "fd00::1:99999", "node-a:15020"] {
            assert!(listening(text).is_err(), "{text}");
        }
    }
}
