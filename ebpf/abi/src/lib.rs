//! What the kernel programs and user space must agree on: map keys and values, marks, slots, counters.
//!
//! Everything here crosses the kernel boundary, so each type is `repr(C)` without implicit padding and its layout is
//! pinned by a test. A change of any of them is a change of [`VERSION`].
#![cfg_attr(not(test), no_std)]
// `user` implements aya's marker trait for plain data, which is unsafe by declaration; nothing else here is.
#![cfg_attr(not(feature = "user"), forbid(unsafe_code))]

/// Names the directory of pinned maps, so that a ztunnel with another layout never reads its predecessor's bytes.
///
/// Two things never change, whatever the version, because two layouts can be alive at once: the marks, table and rule
/// preferences below, and that the map `ENROLLED` is keyed by netns cookie.
pub const VERSION: u32 = 2;

/// On ztunnel's own sockets towards the network and on nothing else: never captured.
pub const MARK_BYPASS: u32 = 0x539;
/// On the application's captured sockets: policy routing sends them to `lo`, where `sk_lookup` takes them.
pub const MARK_CAPTURE: u32 = 0x53a;
/// On ztunnel's sockets towards the application: routed over `lo` as well, so that a foreign source address works.
pub const MARK_LEG: u32 = 0x53b;
/// `fwmark MARK_CAPTURE/MARK_MASK` matches both [`MARK_CAPTURE`] and [`MARK_LEG`], which differ in the lowest bit.
pub const MARK_MASK: u32 = 0xffff_fffe;

/// Routing table of the pod netns with the one route `local default dev lo`.
pub const ROUTE_TABLE: u32 = 15_000;
/// Preference of the rule for marked TCP. It must stay behind the `local` table (preference 0).
pub const RULE_PREF_TCP: u32 = 100;
/// Preference of the rule for marked UDP to port 53; only where DNS is captured.
pub const RULE_PREF_DNS: u32 = 101;

/// Where peers reach a pod's HBONE listener.
pub const HBONE_PORT: u16 = 15_008;
/// The only UDP port that can be captured.
pub const DNS_PORT: u16 = 53;

/// Most network namespaces one node can have enrolled.
pub const MAX_NETNS: u32 = 4096;
/// Where the kubelet's probes come from once the connect hook has seen them: link-local, the node's own and nobody
/// else's, so that what the node forwards (a NodePort, with the node's address as its source) is not taken for one.
pub const PROBE_SOURCE4: [u8; 4] = [169, 254, 7, 127];
/// As [`PROBE_SOURCE4`].
pub const PROBE_SOURCE6: [u8; 16] =
    [0xfd, 0x16, 0x92, 0x54, 0x71, 0x27, 0x13, 0x37, 255, 255, 255, 255, 255, 255, 255, 255];

/// Most probe ports of all enrolled pods together, once per address.
pub const MAX_PROBES: u32 = 65_536;
/// Most entries of [`ExcludedKey`], global and per pod together.
pub const MAX_EXCLUDED: u32 = 65_536;
/// Most entries of [`PortKey`].
pub const MAX_EXCLUDED_PORTS: u32 = 65_536;
/// Most addresses of all enrolled pods together; dual stack needs two each.
pub const MAX_ADDRESSES: u32 = 4 * MAX_NETNS;

/// Which of a pod's listeners a connection is handed to. The number is part of [`ListenerKey`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Slot {
    Out4 = 0,
    Out6 = 1,
    In4 = 2,
    In6 = 3,
    Hbone4 = 4,
    Hbone6 = 5,
    Dns4 = 6,
    Dns6 = 7,
}

impl Slot {
    /// All slots, in the order of their numbers.
    pub const ALL: [Slot; 8] =
        [Slot::Out4, Slot::Out6, Slot::In4, Slot::In6, Slot::Hbone4, Slot::Hbone6, Slot::Dns4, Slot::Dns6];
}

/// Key of the socket map `LISTENERS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ListenerKey {
    pub cookie: u64,
    pub slot: u32,
    /// Always zero: the kernel compares keys byte by byte.
    pub reserved: u32,
}

impl ListenerKey {
    pub const fn new(cookie: u64, slot: Slot) -> Self {
        ListenerKey { cookie, slot: slot as u32, reserved: 0 }
    }
}

/// Value of the map `ENROLLED`, keyed by netns cookie. A netns without one is left alone.
///
/// With no flag set the pod is in its first or last phase: HBONE on 15008 is answered and nothing else is touched.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Enrolled {
    pub flags: u32,
}

impl Enrolled {
    /// TCP connections the pod opens are captured.
    pub const OUTBOUND: u32 = 1;
    /// Plaintext connections to the pod are captured.
    pub const INBOUND: u32 = 1 << 1;
    /// Without a listener connections go direct; without this flag they are refused.
    pub const FAIL_OPEN: u32 = 1 << 2;
    /// UDP to port 53 is captured.
    pub const DNS: u32 = 1 << 3;
    /// There are entries of [`PortKey::TO`]; without the flag nobody looks.
    pub const PORTS_TO: u32 = 1 << 4;
    /// There are entries of [`PortKey::AT`].
    pub const PORTS_AT: u32 = 1 << 5;

    pub const fn has(self, flag: u32) -> bool {
        self.flags & flag != 0
    }
}

/// Key of the map `ADDRESSES`: an address of the pod in that netns. IPv4 is written as an IPv4-mapped IPv6 address.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AddressKey {
    pub cookie: u64,
    pub address: [u8; 16],
}

/// Key of the map `PROBES`: where a pod is probed. The value is the cookie of the pod's netns. IPv4 is written as an
/// IPv4-mapped IPv6 address.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProbeKey {
    pub address: [u8; 16],
    /// In host order.
    pub port: u32,
}

/// Key of the map `EXCLUDED_PORTS`: TCP that is not captured because of its destination port.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortKey {
    pub cookie: u64,
    /// In host order.
    pub port: u16,
    /// [`PortKey::TO`] or [`PortKey::AT`].
    pub way: u16,
    /// Always zero: the kernel compares keys byte by byte.
    pub reserved: u32,
}

impl PortKey {
    /// Connections that the pod opens to the port.
    pub const TO: u16 = 0;
    /// Plaintext connections to the port of the pod.
    pub const AT: u16 = 1;

    pub const fn new(cookie: u64, way: u16, port: u16) -> Self {
        PortKey { cookie, port, way, reserved: 0 }
    }
}

/// Data of the longest-prefix map `EXCLUDED`. Only bytes, so that it stays unpadded behind the 4-byte prefix length.
///
/// The family stands before the address: otherwise `::/0` would exclude IPv4 as well.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ExcludedKey {
    /// Netns cookie in native order, or [`ExcludedKey::GLOBAL`].
    pub cookie: [u8; 8],
    /// 4 or 6 in the first byte, the rest zero.
    pub family: [u8; 4],
    /// Network order; IPv4 fills the first four bytes.
    pub address: [u8; 16],
}

impl ExcludedKey {
    /// In place of a cookie: holds for every netns. The kernel's cookies start at 1.
    pub const GLOBAL: u64 = 0;
    /// Bits before the address, all of which always have to match.
    pub const HEADER_BITS: u32 = 96;
}

/// Index into the per-CPU array `COUNTERS`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Outbound connections marked for capture.
    Captured = 0,
    /// Connections of ztunnel itself.
    Bypassed = 1,
    /// Connections that are excluded by destination or port, outbound and inbound.
    Excluded = 2,
    /// Outbound connections refused because no ztunnel listens.
    Refused = 3,
    /// Connections let through, in or out, because no ztunnel listens and the pod asked for that.
    FailedOpen = 4,
    /// Plaintext connections to the pod handed to ztunnel.
    Inbound = 5,
    /// HBONE connections handed to ztunnel.
    Hbone = 6,
    /// Packets dropped in `sk_lookup` because no ztunnel listens.
    Dropped = 7,
    /// DNS packets handed to ztunnel.
    Dns = 8,
}

impl Counter {
    /// Entries of the array.
    pub const COUNT: u32 = 9;
}

#[cfg(feature = "user")]
mod user {
    use super::{AddressKey, Enrolled, ExcludedKey, ListenerKey, PortKey, ProbeKey};

    // SAFETY: `repr(C)`, `Copy`, no padding (see the layout test) and every bit pattern is a value.
    unsafe impl aya::Pod for ListenerKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Enrolled {}
    // SAFETY: as above.
    unsafe impl aya::Pod for AddressKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for ExcludedKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for ProbeKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for PortKey {}
}

#[cfg(test)]
mod tests {
    use std::mem::{align_of, offset_of, size_of};

    use super::*;

    #[test]
    fn layouts_have_no_padding_and_do_not_move() {
        assert_eq!((size_of::<ListenerKey>(), align_of::<ListenerKey>()), (16, 8));
        assert_eq!((offset_of!(ListenerKey, slot), offset_of!(ListenerKey, reserved)), (8, 12));
        assert_eq!((size_of::<Enrolled>(), align_of::<Enrolled>()), (4, 4));
        assert_eq!((size_of::<AddressKey>(), align_of::<AddressKey>()), (24, 8));
        assert_eq!(offset_of!(AddressKey, address), 8);
        assert_eq!((size_of::<ProbeKey>(), align_of::<ProbeKey>()), (20, 4));
        assert_eq!((size_of::<PortKey>(), align_of::<PortKey>()), (16, 8));
        assert_eq!((offset_of!(PortKey, port), offset_of!(PortKey, way), offset_of!(PortKey, reserved)), (8, 10, 12));
        assert_eq!((size_of::<ExcludedKey>(), align_of::<ExcludedKey>()), (28, 1));
        assert_eq!((offset_of!(ExcludedKey, family), offset_of!(ExcludedKey, address)), (8, 12));
        assert_eq!(offset_of!(ExcludedKey, address) as u32 * 8, ExcludedKey::HEADER_BITS);
    }

    #[test]
    fn one_rule_matches_capture_and_leg_but_not_bypass() {
        let matches = |mark: u32| mark & MARK_MASK == MARK_CAPTURE & MARK_MASK;
        assert!(matches(MARK_CAPTURE) && matches(MARK_LEG));
        assert!(!matches(MARK_BYPASS) && !matches(0));
    }

    #[test]
    fn slots_are_numbered_by_position() {
        for (index, slot) in Slot::ALL.into_iter().enumerate() {
            assert_eq!(slot as usize, index);
        }
    }
}
