//! Marks the UDP sockets of pods whose DNS is captured.
//!
//! `connect` and `sendmsg` come too late: the first packet reads the mark before their hooks run. The mark alone is
//! harmless, because the routing rule also asks for port 53.

use aya_ebpf::{helpers::bpf_get_netns_cookie, macros::cgroup_sock, programs::SockContext};
use ebpf_abi::{Enrolled, MARK_CAPTURE};

use crate::{lookup::IPPROTO_UDP, maps::enrolled};

const SOCK_DGRAM: u32 = 2;

#[cgroup_sock(sock_create)]
pub fn sock_create(ctx: SockContext) -> i32 {
    // SAFETY: the kernel hands a valid socket; these fields may be read.
    let (kind, protocol) = unsafe { ((*ctx.sock).type_, (*ctx.sock).protocol) };
    if kind == SOCK_DGRAM && protocol == IPPROTO_UDP {
        // SAFETY: the helper takes this context.
        let cookie = unsafe { bpf_get_netns_cookie(ctx.sock.cast()) };
        if enrolled(cookie).is_some_and(|pod| pod.has(Enrolled::DNS)) {
            // SAFETY: `mark` may be written in this hook.
            unsafe { (*ctx.sock).mark = MARK_CAPTURE };
        }
    }
    1
}
