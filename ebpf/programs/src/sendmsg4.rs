//! `sendmsg(2)` on an IPv4 UDP socket that is not connected.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::lookup::{Address, query};

#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(ctx: SockAddrContext) -> i32 {
    // SAFETY: the kernel hands a valid context.
    let destination = Address::v4(unsafe { (*ctx.sock_addr).user_ip4 });
    query(ctx.sock_addr, destination)
}
