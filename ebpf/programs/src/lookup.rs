//! The decision of the connect hooks, and the address arithmetic all hooks share.

use core::ptr;

use aya_ebpf::{
    bindings::{bpf_sock, bpf_sock_addr},
    helpers::{bpf_bind, bpf_get_netns_cookie, bpf_map_lookup_elem, bpf_set_retval, bpf_setsockopt, bpf_sk_release},
    maps::lpm_trie::Key,
};
use ebpf_abi::{
    AddressKey, Counter, DNS_PORT, Enrolled, ExcludedKey, ListenerKey, MARK_BYPASS, MARK_CAPTURE, MARK_LEG,
    PROBE_SOURCE4, PROBE_SOURCE6, PortKey, ProbeKey, Slot,
};

use crate::maps::{ADDRESSES, EXCLUDED, LISTENERS, count, enrolled, is_host, is_port_excluded, probed};

pub const IPPROTO_TCP: u32 = 6;
pub const IPPROTO_UDP: u32 = 17;
/// An MPTCP socket opens ordinary TCP connections, and its hook sees this protocol number.
const IPPROTO_MPTCP: u32 = 262;
const SOL_SOCKET: i32 = 1;
const SO_MARK: i32 = 36;
const SO_BINDTOIFINDEX: i32 = 62;
const ECONNREFUSED: i32 = 111;

const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;

/// What kind of socket a hook was called for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

/// The kernel's `struct sockaddr_in`.
#[repr(C)]
struct SocketAddress4 {
    family: u16,
    port: u16,
    address: [u8; 4],
    zero: [u8; 8],
}

/// The kernel's `struct sockaddr_in6`.
#[repr(C)]
struct SocketAddress6 {
    family: u16,
    port: u16,
    flow: u32,
    address: [u8; 16],
    scope: u32,
}

/// Verdicts of a cgroup hook.
const PROCEED: i32 = 1;
const REJECT: i32 = 0;

/// An IP address as it lies in memory, network order, IPv4 as IPv4-mapped IPv6. `connect6` is called for mapped
/// destinations too, and this makes them IPv4 without another test.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Address([u32; 4]);

impl Address {
    #[inline(always)]
    pub fn v4(ip: u32) -> Self {
        Address([0, 0, 0xffff_u32.to_be(), ip])
    }

    #[inline(always)]
    pub fn v6(words: [u32; 4]) -> Self {
        Address(words)
    }

    #[inline(always)]
    pub fn is_v4(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == 0xffff_u32.to_be()
    }

    #[inline(always)]
    pub fn is_loopback(&self) -> bool {
        if self.is_v4() {
            u32::from_be(self.0[3]) >> 24 == 127
        } else {
            self.0[0] == 0 && self.0[1] == 0 && self.0[2] == 0 && u32::from_be(self.0[3]) == 1
        }
    }

    /// 0.0.0.0 and `::`, which connect to this host.
    #[inline(always)]
    fn is_unspecified(&self) -> bool {
        self.0[3] == 0 && (self.is_v4() || (self.0[0] == 0 && self.0[1] == 0 && self.0[2] == 0))
    }

    /// `fe80::/10`. Such an address means nothing without its interface, which capture could not keep.
    #[inline(always)]
    fn is_link_local_v6(&self) -> bool {
        u32::from_be(self.0[0]) >> 22 == 0xfe80 >> 6
    }

    #[inline(always)]
    fn octets(&self) -> [u8; 16] {
        // SAFETY: both are sixteen bytes without invalid patterns.
        unsafe { core::mem::transmute(self.0) }
    }

    /// Is this an address of the pod in that netns?
    #[inline(always)]
    pub fn belongs_to(&self, cookie: u64) -> bool {
        ADDRESSES.get_ptr(&AddressKey { cookie, address: self.octets() }).is_some()
    }

    /// The netns of the pod that is probed at this address and port.
    #[inline(always)]
    pub fn probed_at(&self, port: u16) -> Option<u64> {
        probed(&ProbeKey { address: self.octets(), port: port.into() })
    }

    /// Does a probe come from here?
    #[inline(always)]
    pub fn is_probe_source(&self) -> bool {
        if self.is_v4() {
            self.0[3] == u32::from_ne_bytes(PROBE_SOURCE4)
        } else {
            let source = Address::from_octets(PROBE_SOURCE6);
            // Word by word: comparing arrays becomes a call of `memcmp`.
            self.0[0] == source.0[0] && self.0[1] == source.0[1] && self.0[2] == source.0[2] && self.0[3] == source.0[3]
        }
    }

    #[inline(always)]
    fn from_octets(octets: [u8; 16]) -> Self {
        // SAFETY: both are sixteen bytes without invalid patterns.
        Address(unsafe { core::mem::transmute::<[u8; 16], [u32; 4]>(octets) })
    }

    #[inline(always)]
    fn is_excluded(&self, cookie: u64) -> bool {
        let (family, words) = if self.is_v4() { (4, [self.0[3], 0, 0, 0]) } else { (6, self.0) };
        // SAFETY: both are sixteen bytes without invalid patterns.
        let address = unsafe { core::mem::transmute::<[u32; 4], [u8; 16]>(words) };
        let mut key = Key::new(
            ExcludedKey::HEADER_BITS + 128,
            ExcludedKey { cookie: cookie.to_ne_bytes(), family: [family, 0, 0, 0], address },
        );
        if EXCLUDED.get(&key).is_some() {
            return true;
        }
        key.data.cookie = ExcludedKey::GLOBAL.to_ne_bytes();
        EXCLUDED.get(&key).is_some()
    }
}

/// One `connect(2)`, before the route is looked up: marks the socket for capture, lets it go, or refuses.
///
/// The mark survives `connect(AF_UNSPEC)`, so every way out that is not capture takes a stale one away.
#[inline(always)]
pub fn connect(ctx: *mut bpf_sock_addr, family: Family, destination: Address) -> i32 {
    // SAFETY: the kernel hands a valid context; these fields may be read in it.
    let (protocol, sk) = unsafe { ((*ctx).protocol, (*ctx).__bindgen_anon_1.sk) };
    if protocol == IPPROTO_UDP {
        return query(ctx, destination);
    }
    if protocol != IPPROTO_TCP && protocol != IPPROTO_MPTCP {
        return PROCEED;
    }
    // SAFETY: the helper takes this context.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.cast()) };
    let Some(pod) = enrolled(cookie) else {
        if is_host(cookie) && !sk.is_null() && !has_source(sk, family) {
            probe(ctx, family, destination);
        }
        return PROCEED;
    };
    // The verifier wants this test although the hook always has a socket.
    if sk.is_null() {
        return PROCEED;
    }
    // SAFETY: a socket pointer of the context, not null; both fields may be read.
    let (mark, device) = unsafe { ((*sk).mark, (*sk).bound_dev_if) };
    if mark == MARK_BYPASS || mark == MARK_LEG {
        count(Counter::Bypassed);
        return PROCEED;
    }
    if !pod.has(Enrolled::OUTBOUND) || destination.is_loopback() || destination.is_unspecified() {
        return direct(ctx, mark);
    }
    if destination.is_link_local_v6() || destination.is_excluded(cookie) {
        count(Counter::Excluded);
        return direct(ctx, mark);
    }
    if pod.has(Enrolled::PORTS_TO) && is_port_excluded(&PortKey::new(cookie, PortKey::TO, port(ctx))) {
        count(Counter::Excluded);
        return direct(ctx, mark);
    }
    let slot = if destination.is_v4() { Slot::Out4 } else { Slot::Out6 };
    if !listens(&ListenerKey::new(cookie, slot)) {
        if pod.has(Enrolled::FAIL_OPEN) {
            count(Counter::FailedOpen);
            return direct(ctx, mark);
        }
        return refuse();
    }
    // A socket bound to a device would not find the route to `lo`.
    if device != 0 && !set(ctx, SO_BINDTOIFINDEX, 0) {
        return refuse();
    }
    if !set(ctx, SO_MARK, MARK_CAPTURE) {
        return refuse();
    }
    count(Counter::Captured);
    PROCEED
}

/// The UDP socket of a resolver, marked since it was made, connects or sends: refused at once where no ztunnel is there
/// to take its query, which would be dropped on `lo` and time out.
#[inline(always)]
pub fn query(ctx: *mut bpf_sock_addr, destination: Address) -> i32 {
    // SAFETY: the kernel hands a valid context; the field may be read in it.
    let sk = unsafe { (*ctx).__bindgen_anon_1.sk };
    if port(ctx) != DNS_PORT || sk.is_null() {
        return PROCEED;
    }
    // SAFETY: the helper takes this context.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.cast()) };
    if !enrolled(cookie).is_some_and(|pod| pod.has(Enrolled::DNS)) {
        return PROCEED;
    }
    // SAFETY: a socket pointer of the context, not null; the field may be read.
    let captured = unsafe { (*sk).mark } == MARK_CAPTURE;
    if !captured || destination.is_loopback() || destination.belongs_to(cookie) {
        return PROCEED;
    }
    let slot = if destination.is_v4() { Slot::Dns4 } else { Slot::Dns6 };
    if listens(&ListenerKey::new(cookie, slot)) { PROCEED } else { refuse() }
}

/// The destination's, in host order.
#[inline(always)]
fn port(ctx: *mut bpf_sock_addr) -> u16 {
    // SAFETY: the kernel hands a valid context; the field may be read in it.
    u16::from_be(unsafe { (*ctx).user_port } as u16)
}

/// Has the process chosen an address to connect from? A kubelet never does.
#[inline(always)]
fn has_source(sk: *mut bpf_sock, family: Family) -> bool {
    // SAFETY: a socket pointer of the context, not null; these fields may be read, word by word.
    unsafe {
        match family {
            Family::V4 => (*sk).src_ip4 != 0,
            Family::V6 => {
                let word = |index: usize| (&raw const (*sk).src_ip6[index]).read_volatile();
                word(0) | word(1) | word(2) | word(3) != 0
            }
        }
    }
}

/// From the host itself to a port where a pod is probed: the connection gets the source that tells it from what the
/// node forwards. Where that fails (the node has lost the address) it is ordinary traffic, and policy decides.
#[inline(always)]
fn probe(ctx: *mut bpf_sock_addr, family: Family, destination: Address) {
    if destination.probed_at(port(ctx)).is_none() {
        return;
    }
    if family == Family::V4 {
        let mut source = SocketAddress4 { family: AF_INET, port: 0, address: PROBE_SOURCE4, zero: [0; 8] };
        bind(ctx, &mut source);
    } else {
        let mut address = PROBE_SOURCE6;
        if destination.is_v4() {
            let [a, b, c, d] = PROBE_SOURCE4;
            address = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d];
        }
        let mut source = SocketAddress6 { family: AF_INET6, port: 0, flow: 0, address, scope: 0 };
        bind(ctx, &mut source);
    }
}

#[inline(always)]
fn bind<T>(ctx: *mut bpf_sock_addr, source: &mut T) {
    // SAFETY: a socket address of the length said, without padding, on the stack.
    unsafe { bpf_bind(ctx, ptr::from_mut(source).cast(), size_of::<T>() as i32) };
}

/// Lets the connection take the ordinary route.
#[inline(always)]
fn direct(ctx: *mut bpf_sock_addr, mark: u32) -> i32 {
    if mark == MARK_CAPTURE && !set(ctx, SO_MARK, 0) {
        return refuse();
    }
    PROCEED
}

/// Fails the `connect` at once. Without it the SYN would be dropped on `lo` without an answer and time out.
#[inline(always)]
fn refuse() -> i32 {
    count(Counter::Refused);
    // SAFETY: the helper takes any errno.
    unsafe { bpf_set_retval(-ECONNREFUSED) };
    REJECT
}

#[inline(always)]
fn listens(key: &ListenerKey) -> bool {
    // SAFETY: map and key are of the type the helper expects for this map.
    let sk = unsafe { bpf_map_lookup_elem((&raw const LISTENERS).cast_mut().cast(), ptr::from_ref(key).cast()) };
    if sk.is_null() {
        return false;
    }
    // SAFETY: the lookup took a reference, which is given back once and not used again.
    unsafe { bpf_sk_release(sk) };
    true
}

#[inline(always)]
fn set(ctx: *mut bpf_sock_addr, option: i32, mut value: u32) -> bool {
    // SAFETY: the value is four bytes on the stack, as the length says.
    unsafe { bpf_setsockopt(ctx.cast(), SOL_SOCKET, option, (&raw mut value).cast(), 4) == 0 }
}
