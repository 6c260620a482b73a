//! Loads the kernel programs, attaches them and speaks to their maps. The only user of aya; callers never see it.
//!
//! Programs, links and maps are pinned in bpffs and outlive the process: a dead ztunnel means that connections of its
//! pods are refused, not that they go around it, and the next ztunnel takes over what it finds. Routing rules, sysctls
//! and listeners in the pod netns are the caller's.

mod capture;
mod error;
mod kernel;
mod maps;
mod pins;
mod pod;
mod steer;

pub use capture::Capture;
pub use ebpf_abi as abi;
pub use ebpf_abi::Slot;
pub use error::LoadError;
pub use kernel::{NetnsCookie, cookie_of, netns_cookie};
pub use maps::Counters;
pub use pins::{attached_netns, ensure_bpffs, remove_pins};
pub use pod::{Dns, FailureMode, Inbound, InvalidPrefix, Phase, PodCapture, Prefix};

/// The compiled kernel programs; empty when the build found none.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/ebpf-programs.o"));

/// Were kernel programs embedded when this was built? If not, [`Capture::open`] fails with [`LoadError::NoPrograms`].
pub fn has_programs() -> bool {
    !OBJECT.is_empty()
}
