//! `sendmsg(2)` on an IPv6 UDP socket that is not connected.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::{connect6::destination, lookup::query};

#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(ctx: SockAddrContext) -> i32 {
    let destination = destination(&ctx);
    query(ctx.sock_addr, destination)
}
