//! `connect(2)` on an IPv6 socket, also to IPv4-mapped destinations.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::lookup::{Address, Family, connect};

/// Where the socket is to connect or to send.
#[inline(always)]
pub fn destination(ctx: &SockAddrContext) -> Address {
    // SAFETY: the kernel hands a valid context; the address is read word by word, as the verifier wants it.
    Address::v6(unsafe {
        [
            (&raw const (*ctx.sock_addr).user_ip6[0]).read_volatile(),
            (&raw const (*ctx.sock_addr).user_ip6[1]).read_volatile(),
            (&raw const (*ctx.sock_addr).user_ip6[2]).read_volatile(),
            (&raw const (*ctx.sock_addr).user_ip6[3]).read_volatile(),
        ]
    })
}

#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    let destination = destination(&ctx);
    connect(ctx.sock_addr, Family::V6, destination)
}
