//! What is captured of one pod, in the caller's words and in the kernel's.

use std::{
    collections::HashSet,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use ebpf_abi::{Enrolled, ExcludedKey, PortKey};

use crate::NetnsCookie;

/// What becomes of a pod's new connections while no ztunnel listens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FailureMode {
    /// Refused.
    #[default]
    Closed,
    /// They go direct, in plain text.
    Open,
}

/// What becomes of plaintext connections to the pod. HBONE on 15008 is answered either way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Inbound {
    #[default]
    Capture,
    Bypass,
}

/// What becomes of UDP to port 53. Capture also needs [`crate::Capture::capture_dns`] and the routing rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dns {
    #[default]
    Direct,
    Capture,
}

/// How far the enrolment of a pod has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// 15008 is answered and nothing else is touched: before peers know, and after they were told to stop.
    HboneOnly,
    /// As [`PodCapture`] says.
    Captured,
}

/// What is captured of one pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodCapture {
    /// The pod's addresses. Without one that the application is reached at, ztunnel's connection to it is taken for
    /// captured traffic.
    pub addresses: Vec<IpAddr>,
    pub failure: FailureMode,
    pub inbound: Inbound,
    pub dns: Dns,
    /// Ports that the node's own connections reach directly: those of the pod's probes and lifecycle hooks. See
    /// [`crate::Capture::set_host`].
    pub probe_ports: Vec<u16>,
    /// Destinations this pod reaches directly, beside [`crate::Capture::set_global_exclusions`].
    pub excluded: Vec<Prefix>,
    /// TCP ports of destinations that this pod reaches directly.
    pub excluded_ports_to: Vec<u16>,
    /// TCP ports of the pod at which plaintext reaches the application directly. HBONE's own cannot be one.
    pub excluded_ports_at: Vec<u16>,
}

impl PodCapture {
    pub(crate) fn enrolled(&self, phase: Phase) -> Enrolled {
        let mut flags = 0;
        if self.failure == FailureMode::Open {
            flags |= Enrolled::FAIL_OPEN;
        }
        if phase == Phase::Captured {
            flags |= Enrolled::OUTBOUND;
            if !self.excluded_ports_to.is_empty() {
                flags |= Enrolled::PORTS_TO;
            }
            if !self.excluded_ports_at.is_empty() {
                flags |= Enrolled::PORTS_AT;
            }
            if self.inbound == Inbound::Capture {
                flags |= Enrolled::INBOUND;
            }
            if self.dns == Dns::Capture {
                flags |= Enrolled::DNS;
            }
        }
        Enrolled { flags }
    }

    pub(crate) fn port_keys(&self, cookie: NetnsCookie) -> HashSet<PortKey> {
        let to = self.excluded_ports_to.iter().map(|port| PortKey::new(cookie.0, PortKey::TO, *port));
        let at = self.excluded_ports_at.iter().map(|port| PortKey::new(cookie.0, PortKey::AT, *port));
        to.chain(at).collect()
    }
}

/// The flags of a pod that leaves: only what has no part in capturing stays.
pub(crate) fn leaving(enrolled: Enrolled) -> Enrolled {
    Enrolled { flags: enrolled.flags & Enrolled::FAIL_OPEN }
}

/// An address as the maps hold it: IPv4 as IPv4-mapped IPv6.
pub(crate) fn mapped(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// An IP prefix whose host bits are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Prefix {
    address: IpAddr,
    length: u8,
}

impl Prefix {
    /// Host bits are cleared and IPv4-mapped prefixes become IPv4; `None` when the length exceeds the address.
    pub fn new(address: IpAddr, length: u8) -> Option<Prefix> {
        match address {
            IpAddr::V4(v4) if length <= 32 => {
                let mask = u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0);
                Some(Prefix { address: Ipv4Addr::from(u32::from(v4) & mask).into(), length })
            }
            IpAddr::V6(v6) if length <= 128 => match v6.to_ipv4_mapped() {
                Some(v4) if length >= 96 => Prefix::new(v4.into(), length - 96),
                _ => {
                    let mask = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0);
                    Some(Prefix { address: Ipv6Addr::from(u128::from(v6) & mask).into(), length })
                }
            },
            _ => None,
        }
    }

    /// The network address.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// In bits.
    pub fn length(&self) -> u8 {
        self.length
    }

    /// Prefix length and data as the longest-prefix map holds them.
    pub(crate) fn key(&self, cookie: NetnsCookie) -> (u32, ExcludedKey) {
        let mut octets = [0; 16];
        let family = match self.address {
            IpAddr::V4(v4) => {
                octets[..4].copy_from_slice(&v4.octets());
                4
            }
            IpAddr::V6(v6) => {
                octets = v6.octets();
                6
            }
        };
        let data = ExcludedKey { cookie: cookie.0.to_ne_bytes(), family: [family, 0, 0, 0], address: octets };
        (ExcludedKey::HEADER_BITS + u32::from(self.length), data)
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

/// The text is neither an address nor `address/length`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an IP prefix such as 10.0.0.0/8")]
pub struct InvalidPrefix(String);

impl FromStr for Prefix {
    type Err = InvalidPrefix;

    /// Reads `10.0.0.0/8` or a single address.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidPrefix(text.to_owned());
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length.parse().map_err(|_| invalid())?)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| invalid())?;
        let whole = if address.is_ipv4() { 32 } else { 128 };
        Prefix::new(address, length.unwrap_or(whole)).ok_or_else(invalid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(text: &str) -> Prefix {
        text.parse().expect("a prefix")
    }

    #[test]
    fn prefix_clears_host_bits_and_unmaps_ipv4() {
        assert_eq!(prefix("10.1.2.3/8").to_string(), "10.0.0.0/8");
        assert_eq!(prefix("169.254.169.254").to_string(), "169.254.169.254/32");
        assert_eq!(prefix("::ffff:10.1.2.3/104").to_string(), "10.0.0.0/8");
        assert_eq!(prefix("fd00::1/64").to_string(), "fd00::/64");
        assert_eq!(prefix("0.0.0.0/0").to_string(), "0.0.0.0/0");
        assert_eq!(prefix("::1/0").to_string(), "::/0");
    }

    #[test]
    fn prefix_refuses_what_is_none() {
        for text in ["", "10.0.0.0/33", "::/129", "10.0.0/8", "10.0.0.0/-1", "10.0.0.0/"] {
            assert!(text.parse::<Prefix>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn all_of_ipv6_does_not_contain_ipv4() {
        let cookie = NetnsCookie(7);
        let (bits, all6) = prefix("::/0").key(cookie);
        let (_, one4) = prefix("10.0.0.1").key(cookie);
        assert_eq!(bits, ExcludedKey::HEADER_BITS);
        assert_ne!(all6.family, one4.family);
    }

    #[test]
    fn flags_follow_phase_and_options() {
        let pod = PodCapture { failure: FailureMode::Open, dns: Dns::Capture, ..PodCapture::default() };
        let captured = pod.enrolled(Phase::Captured);
        assert_eq!(captured.flags, Enrolled::FAIL_OPEN | Enrolled::OUTBOUND | Enrolled::INBOUND | Enrolled::DNS);
        assert_eq!(pod.enrolled(Phase::HboneOnly).flags, Enrolled::FAIL_OPEN);
        assert_eq!(leaving(captured), pod.enrolled(Phase::HboneOnly));
        let bypass = PodCapture { inbound: Inbound::Bypass, ..PodCapture::default() };
        assert_eq!(bypass.enrolled(Phase::Captured).flags, Enrolled::OUTBOUND);
    }
}
