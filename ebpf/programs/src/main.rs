//! The kernel side of capture: which connections of enrolled pods go to ztunnel.
//!
//! One file per hook; what they share is in `lookup` (decisions) and `maps` (state). The programs never rewrite an
//! address and never look at payload. IPv4 and IPv6 differ in how an address is read and nowhere else.
#![no_std]
#![no_main]

mod connect4;
mod connect6;
mod lookup;
mod maps;
mod sendmsg4;
mod sendmsg6;
mod sk_lookup;
mod sock_create;

/// Some helpers are only given to programs under a GPL-compatible licence; `bpf_setsockopt` is one of them.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// Never reached: nothing here can panic, and a loop that could be entered would not pass the verifier.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
