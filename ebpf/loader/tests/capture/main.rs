//! The kernel programs and their loader against a real kernel: the verifier, real network namespaces, real TCP.
//!
//! Each test runs in a process of its own, in a cgroup of its own, with a mount namespace that holds the bpffs and
//! network namespaces nobody else has a name for. Whatever happens to it, nothing stays behind. Needs root, cgroup2 and
//! the compiled programs; without them the tests say so and pass, unless `LAB=required`.

mod dns;
mod escapes;
mod inbound;
mod lifecycle;
mod outbound;
mod probe;
mod scale;
mod setup;
mod support;
