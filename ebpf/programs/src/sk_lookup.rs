//! Which listener of a pod netns gets a connection: the application's own, or one of ztunnel's.
//!
//! Attached to each pod netns. The helper that would tell which netns it runs in does not exist here, so it is loaded
//! once for each, with the cookie as a constant.

use aya_ebpf::{Global, bindings::bpf_sk_lookup, macros::sk_lookup, programs::SkLookupContext};
use ebpf_abi::{Counter, DNS_PORT, Enrolled, HBONE_PORT, ListenerKey, PortKey, Slot};

use crate::{
    lookup::{Address, IPPROTO_TCP, IPPROTO_UDP},
    maps::{LISTENERS, count, enrolled, is_port_excluded},
};

/// Written by the loader before the program is loaded.
#[unsafe(no_mangle)]
static NETNS_COOKIE: Global<u64> = Global::new(0);

const AF_INET: u32 = 2;
/// The interface index of `lo`, in every netns.
const LOOPBACK: u32 = 1;

const PASS: u32 = 1;
const DROP: u32 = 0;

// Not named like its section: LLVM gives sections a symbol of their name, and the two would clash.
#[sk_lookup]
pub fn steer(ctx: SkLookupContext) -> u32 {
    // SAFETY: the kernel hands a valid context.
    let protocol = unsafe { (*ctx.lookup).protocol };
    match protocol {
        IPPROTO_TCP => tcp(&ctx),
        // Asked for every datagram outside a connected socket, hence the short way out.
        IPPROTO_UDP if local_port(&ctx) == DNS_PORT && ingress(&ctx) == LOOPBACK => dns(&ctx),
        _ => PASS,
    }
}

#[inline(always)]
fn tcp(ctx: &SkLookupContext) -> u32 {
    let cookie = NETNS_COOKIE.load();
    let Some(pod) = enrolled(cookie) else {
        return PASS;
    };
    let (local, remote) = addresses(ctx);
    if local.is_loopback() {
        return PASS;
    }
    // A process calling an address of its own netns that is not the pod's: nobody to hand it to, and ztunnel's own
    // attempt to forward it would come back here without end.
    if local == remote {
        return PASS;
    }
    let to_pod = local.belongs_to(cookie);
    // Not "the device it came over": a connection to the pod's own address shows the device that has the address.
    // Over `lo` proper come only ztunnel's leg to the application and what the connect hook marked.
    if ingress(ctx) == LOOPBACK {
        // Captured outbound never passes, not even fail-open: a foreign destination would land on whatever the
        // application has on that port.
        return if to_pod || assign(ctx, cookie, (Slot::Out4, Slot::Out6)) { PASS } else { drop() };
    }
    // The application calls itself.
    if to_pod && remote.belongs_to(cookie) {
        return PASS;
    }
    // The kubelet, at a port that the pod's own probes and hooks name, and nowhere else: whoever takes the address
    // gains no more than that.
    if remote.is_probe_source() && local.probed_at(local_port(ctx)) == Some(cookie) {
        return PASS;
    }
    if local_port(ctx) == HBONE_PORT {
        if !assign(ctx, cookie, (Slot::Hbone4, Slot::Hbone6)) {
            return drop();
        }
        count(Counter::Hbone);
        return PASS;
    }
    if !pod.has(Enrolled::INBOUND) {
        return PASS;
    }
    if pod.has(Enrolled::PORTS_AT) && is_port_excluded(&PortKey::new(cookie, PortKey::AT, local_port(ctx))) {
        count(Counter::Excluded);
        return PASS;
    }
    if assign(ctx, cookie, (Slot::In4, Slot::In6)) {
        count(Counter::Inbound);
    } else if pod.has(Enrolled::FAIL_OPEN) {
        count(Counter::FailedOpen);
    } else {
        return drop();
    }
    PASS
}

#[inline(always)]
fn dns(ctx: &SkLookupContext) -> u32 {
    let cookie = NETNS_COOKIE.load();
    if !enrolled(cookie).is_some_and(|pod| pod.has(Enrolled::DNS)) {
        return PASS;
    }
    let (local, remote) = addresses(ctx);
    // As for TCP: a server on an address that the netns has beside the pod's is the netns' own business. (A captured
    // query comes from an address of the pod, which is never the server it was meant for.)
    if local.is_loopback() || local == remote {
        return PASS;
    }
    if !assign(ctx, cookie, (Slot::Dns4, Slot::Dns6)) {
        return drop();
    }
    count(Counter::Dns);
    PASS
}

/// Hands the connection to the listener in the slot of its family; false when that slot is empty.
#[inline(always)]
fn assign(ctx: &SkLookupContext, cookie: u64, (v4, v6): (Slot, Slot)) -> bool {
    let slot = if is_v4(ctx) { v4 } else { v6 };
    LISTENERS.redirect_sk_lookup(ctx, ListenerKey::new(cookie, slot), 0).is_ok()
}

#[inline(always)]
fn drop() -> u32 {
    count(Counter::Dropped);
    DROP
}

/// Destination and source of the packet.
#[inline(always)]
fn addresses(ctx: &SkLookupContext) -> (Address, Address) {
    let l: *const bpf_sk_lookup = ctx.lookup;
    // SAFETY: the kernel hands a valid context; addresses are read word by word, as the verifier wants it.
    unsafe {
        if (*l).family == AF_INET {
            (Address::v4((*l).local_ip4), Address::v4((*l).remote_ip4))
        } else {
            let word = |field: *const u32, index: usize| field.add(index).read_volatile();
            let local = (&raw const (*l).local_ip6).cast();
            let remote = (&raw const (*l).remote_ip6).cast();
            (
                Address::v6([word(local, 0), word(local, 1), word(local, 2), word(local, 3)]),
                Address::v6([word(remote, 0), word(remote, 1), word(remote, 2), word(remote, 3)]),
            )
        }
    }
}

#[inline(always)]
fn is_v4(ctx: &SkLookupContext) -> bool {
    // SAFETY: the kernel hands a valid context.
    unsafe { (*ctx.lookup).family == AF_INET }
}

/// In host order.
#[inline(always)]
fn local_port(ctx: &SkLookupContext) -> u16 {
    // SAFETY: the kernel hands a valid context.
    unsafe { (*ctx.lookup).local_port as u16 }
}

#[inline(always)]
fn ingress(ctx: &SkLookupContext) -> u32 {
    // SAFETY: the kernel hands a valid context.
    unsafe { (*ctx.lookup).ingress_ifindex }
}
