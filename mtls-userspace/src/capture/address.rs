//! Addresses as the kernel half keeps them, from and to std's.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use aya::maps::lpm_trie::Key;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use mtls_common::Endpoint;

pub(super) fn words(ip: IpAddr) -> [u32; 4] {
    let v6 = match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    let mut words = [0; 4];
    for (word, octets) in words.iter_mut().zip(v6.octets().chunks_exact(4)) {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(octets);
        *word = u32::from_ne_bytes(bytes);
    }
    words
}

fn ip(addr_be: [u32; 4]) -> IpAddr {
    IpAddr::V6(v6(addr_be)).to_canonical()
}

fn v6(addr_be: [u32; 4]) -> Ipv6Addr {
    let mut octets = [0; 16];
    for (octets, word) in octets.chunks_exact_mut(4).zip(addr_be) {
        octets.copy_from_slice(&word.to_ne_bytes());
    }
    Ipv6Addr::from(octets)
}

pub(super) fn endpoint(addr: SocketAddr) -> Endpoint {
    Endpoint { addr_be: words(addr.ip()), port: addr.port(), pad: 0 }
}

pub(super) fn socket_addr(endpoint: Endpoint) -> SocketAddr {
    SocketAddr::new(ip(endpoint.addr_be), endpoint.port)
}

/// A prefix without host bits; a v4-mapped one is the IPv4 prefix it stands for.
pub(super) fn normal(net: IpNet) -> IpNet {
    const MAPPED_BITS: u8 = 96;
    let net = net.trunc();
    match (net, net.addr().to_canonical()) {
        (IpNet::V6(v6), IpAddr::V4(v4)) => {
            let len = v6.prefix_len().checked_sub(MAPPED_BITS);
            len.and_then(|len| Ipv4Net::new(v4, len).ok()).map_or(net, IpNet::V4)
        }
        _ => net,
    }
}

pub(super) fn key4(net: Ipv4Net) -> Key<u32> {
    Key::new(net.prefix_len().into(), u32::from_ne_bytes(net.network().octets()))
}

pub(super) fn key6(net: Ipv6Net) -> Key<[u32; 4]> {
    Key::new(net.prefix_len().into(), words(net.network().into()))
}

pub(super) fn net4(key: &Key<u32>) -> Option<IpNet> {
    let addr = Ipv4Addr::from(key.data().to_ne_bytes());
    Ipv4Net::new(addr, key.prefix_len().try_into().ok()?).ok().map(IpNet::V4)
}

pub(super) fn net6(key: &Key<[u32; 4]>) -> Option<IpNet> {
    Ipv6Net::new(v6(key.data()), key.prefix_len().try_into().ok()?).ok().map(IpNet::V6)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_address_survives_the_round_trip(addr: IpAddr, port: u16) {
            let addr = SocketAddr::new(addr.to_canonical(), port);
            prop_assert_eq!(socket_addr(endpoint(addr)), addr);
        }

        #[test]
        fn words_are_in_network_order(addr: Ipv6Addr) {
            let bytes: Vec<u8> = words(IpAddr::V6(addr)).iter().flat_map(|word| word.to_ne_bytes()).collect();
            prop_assert_eq!(bytes, addr.octets());
        }
    }

    #[test]
    fn a_mapped_prefix_is_the_v4_prefix() {
        for (given, wanted) in [
            ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
            ("10.1.2.3/8", "10.0.0.0/8"),
            ("::/0", "::/0"),
            ("fd00::1/64", "fd00::/64"),
        ] {
            assert_eq!(normal(given.parse().unwrap()), wanted.parse().unwrap());
        }
    }

    proptest! {
        #[test]
        fn a_prefix_survives_the_round_trip(addr: IpAddr, len in 0u8..=128) {
            let len = if addr.is_ipv4() { len.min(32) } else { len };
            let net = normal(IpNet::new(addr, len).unwrap());
            let back = match net {
                IpNet::V4(v4) => net4(&key4(v4)),
                IpNet::V6(v6) => net6(&key6(v6)),
            };
            prop_assert_eq!(back, Some(net));
        }
    }
}
