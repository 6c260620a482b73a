//! `connect(2)` on an IPv4 socket.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use crate::lookup::{Address, Family, connect};

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    // SAFETY: the kernel hands a valid context.
    let destination = Address::v4(unsafe { (*ctx.sock_addr).user_ip4 });
    connect(ctx.sock_addr, Family::V4, destination)
}
