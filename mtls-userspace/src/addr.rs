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
}
