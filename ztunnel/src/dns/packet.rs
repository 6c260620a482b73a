//! UDP answers as whole IP packets.
//!
//! An answer must come from the server that was asked, port 53. A socket bound to that port, on any address, would
//! keep the pod's application from having it on all of them (a DNS server in the pod), so the answer goes out by a raw
//! socket and the queries come in on a port of no importance.

use std::net::{IpAddr, SocketAddr};

const UDP: u8 = 17;
const UDP_HEADER: usize = 8;
const V4_HEADER: usize = 20;
const TTL: u8 = 64;

/// The packet that carries `payload`; `None` when it does not fit into one, or the families differ.
#[must_use]
pub fn udp(from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Option<Vec<u8>> {
    let length = u16::try_from(UDP_HEADER + payload.len()).ok()?;
    let mut segment = Vec::with_capacity(usize::from(length));
    segment.extend(from.port().to_be_bytes());
    segment.extend(to.port().to_be_bytes());
    segment.extend(length.to_be_bytes());
    segment.extend([0, 0]);
    segment.extend(payload);

    let mut packet = Vec::with_capacity(40 + segment.len());
    let mut sum = Sum::default();
    match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let total = u16::try_from(V4_HEADER + segment.len()).ok()?;
            packet.extend([0x45, 0]);
            packet.extend(total.to_be_bytes());
            // The kernel fills in the identification and the header's checksum.
            packet.extend([0, 0, 0, 0, TTL, UDP, 0, 0]);
            packet.extend(from.octets());
            packet.extend(to.octets());
            sum.add(&from.octets());
            sum.add(&to.octets());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            packet.extend([0x60, 0, 0, 0]);
            packet.extend(length.to_be_bytes());
            packet.extend([UDP, TTL]);
            packet.extend(from.octets());
            packet.extend(to.octets());
            sum.add(&from.octets());
            sum.add(&to.octets());
        }
        _ => return None,
    }
    sum.add(&[0, UDP]);
    sum.add(&length.to_be_bytes());
    sum.add(&segment);
    segment[6..8].copy_from_slice(&sum.checksum().to_be_bytes());
    packet.extend(segment);
    Some(packet)
}

/// The Internet checksum (RFC 1071). Parts other than the last are of even length.
#[derive(Default)]
struct Sum(u32);

impl Sum {
    fn add(&mut self, bytes: &[u8]) {
        for pair in bytes.chunks(2) {
            let word = u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]);
            self.0 += u32::from(word);
            self.0 = (self.0 & 0xffff) + (self.0 >> 16);
        }
    }

    /// Zero would say that there is none.
    fn checksum(&self) -> u16 {
        match !u16::try_from(self.0).unwrap_or(u16::MAX) {
            0 => u16::MAX,
            sum => sum,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Header and payload as a receiver verifies them: everything summed up is all ones.
    fn verified(pseudo: &[u8], segment: &[u8]) -> bool {
        let mut sum = Sum::default();
        sum.add(pseudo);
        sum.add(&[0, UDP]);
        sum.add(&segment[4..6]);
        sum.add(segment);
        sum.0 == 0xffff
    }

    #[test]
    fn checksums_hold_for_even_and_odd_payloads_of_both_families() {
        for payload in [&b""[..], b"x", b"even", b"odd.."] {
            let v4 = udp("10.96.0.10:53".parse().unwrap(), "10.0.0.1:40000".parse().unwrap(), payload).unwrap();
            assert_eq!(v4.len(), 28 + payload.len());
            assert_eq!(usize::from(u16::from_be_bytes([v4[2], v4[3]])), v4.len());
            assert!(verified(&v4[12..20], &v4[20..]));
            let v6 = udp("[fd00::a]:53".parse().unwrap(), "[fd00::1]:40000".parse().unwrap(), payload).unwrap();
            assert_eq!(usize::from(u16::from_be_bytes([v6[4], v6[5]])), 8 + payload.len());
            assert!(verified(&v6[8..40], &v6[40..]));
        }
    }

    #[test]
    fn refuses_what_is_no_packet() {
        let (v4, v6) = ("10.96.0.10:53".parse().unwrap(), "[fd00::1]:40000".parse().unwrap());
        assert_eq!(udp(v4, v6, b""), None);
        assert_eq!(udp(v4, v4, &[0; 65_508]), None);
        assert_eq!(udp(v4, v4, &[0; 65_507]).map(|p| p.len()), Some(65_535));
    }
}
