//! The PROXY protocol, version 2, as a waypoint behind ztunnel reads it: who called, what was called, and the identity
//! that TLS proved (<https://www.haproxy.org/download/2.9/doc/proxy-protocol.txt>).

use std::net::{IpAddr, SocketAddr};

use mesh::identity::Identity;

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, command PROXY.
const VERSION_COMMAND: u8 = 0x21;
const TCP_OVER_IPV4: u8 = 0x11;
const TCP_OVER_IPV6: u8 = 0x21;
/// Of the range for own uses; Istio's for the SPIFFE ID of the client.
const TLV_IDENTITY: u8 = 0xd0;

/// As long as the SPIFFE specification lets an ID be.
const MAX_IDENTITY: usize = 2048;

/// What goes before the first byte of a connection from `source` to `destination` whose client proved to be `identity`.
pub fn header(source: SocketAddr, destination: SocketAddr, identity: &Identity) -> Vec<u8> {
    let identity = identity.to_string();
    let mut addresses = Vec::with_capacity(36);
    let family = match (source.ip(), destination.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            addresses.extend(from.octets());
            addresses.extend(to.octets());
            TCP_OVER_IPV4
        }
        // There is one family for both.
        (from, to) => {
            addresses.extend(mapped(from));
            addresses.extend(mapped(to));
            TCP_OVER_IPV6
        }
    };
    addresses.extend(source.port().to_be_bytes());
    addresses.extend(destination.port().to_be_bytes());
    // What a certificate has room for is far shorter; one that were not would be left out and not cut short.
    let mut rest = Vec::new();
    if identity.len() <= MAX_IDENTITY {
        rest.push(TLV_IDENTITY);
        rest.extend(length(identity.len()));
        rest.extend(identity.as_bytes());
    }
    let mut header = Vec::from(SIGNATURE);
    header.extend([VERSION_COMMAND, family]);
    header.extend(length(addresses.len() + rest.len()));
    header.extend(addresses);
    header.extend(rest);
    header
}

fn length(bytes: usize) -> [u8; 2] {
    u16::try_from(bytes).expect("at most MAX_IDENTITY and a few").to_be_bytes()
}

fn mapped(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(source: &str, destination: &str) -> Vec<u8> {
        let identity = Identity::new("td", "ns", "a").unwrap();
        header(source.parse().unwrap(), destination.parse().unwrap(), &identity)
    }

    #[test]
    fn two_ipv4_addresses_and_the_identity() {
        let identity = b"spiffe://td/ns/ns/sa/a";
        let expected = [
            &b"\x0d\x0a\x0d\x0a\x00\x0d\x0a\x51\x55\x49\x54\x0a\x21\x11"[..],
            &[0, 12 + 3 + 22],
            &[10, 0, 0, 1, 10, 96, 0, 9, 0x80, 0x01, 0, 80],
            &[0xd0, 0, 22],
            identity,
        ]
        .concat();
        assert_eq!(made("10.0.0.1:32769", "10.96.0.9:80"), expected);
    }

    #[test]
    fn addresses_of_two_families_are_both_written_as_ipv6() {
        let header = made("10.0.0.1:1", "[fd00::2]:2");
        assert_eq!(header[13], 0x21);
        assert_eq!(header[14..16], u16::to_be_bytes(36 + 3 + 22));
        assert_eq!(header[16..32], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 1]);
        assert_eq!(header[32..48], [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
        assert_eq!(header[48..52], [0, 1, 0, 2]);
        assert_eq!(header.len(), 16 + 36 + 3 + 22);
    }
}
