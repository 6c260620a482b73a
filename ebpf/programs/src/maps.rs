//! State shared with user space and between the hooks. All maps are pinned by the loader and outlive it.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    macros::map,
    maps::{Array, HashMap, LpmTrie, PerCpuArray, SockHash},
};
use ebpf_abi::{
    AddressKey, Counter, Enrolled, ExcludedKey, ListenerKey, MAX_ADDRESSES, MAX_EXCLUDED, MAX_EXCLUDED_PORTS,
    MAX_NETNS, MAX_PROBES, PortKey, ProbeKey, Slot,
};

/// Netns cookie → what is captured there. Not preallocated: a preallocated element may be reused by another netns
/// while a program still reads it.
#[map]
pub static ENROLLED: HashMap<u64, Enrolled> = HashMap::pinned(MAX_NETNS, BPF_F_NO_PREALLOC);

/// The listeners of each netns. A listener that is closed leaves by itself, so an empty slot means a dead ztunnel.
#[map]
pub static LISTENERS: SockHash<ListenerKey> = SockHash::pinned(MAX_NETNS * Slot::ALL.len() as u32, 0);

/// The pod's own addresses.
#[map]
pub static ADDRESSES: HashMap<AddressKey, u32> = HashMap::pinned(MAX_ADDRESSES, BPF_F_NO_PREALLOC);

/// Destinations that are reached directly, for one netns or for all.
#[map]
pub static EXCLUDED: LpmTrie<ExcludedKey, u32> = LpmTrie::pinned(MAX_EXCLUDED, 0);

/// Ports that are reached directly, where [`Enrolled`] says that there are any.
#[map]
pub static EXCLUDED_PORTS: HashMap<PortKey, u32> = HashMap::pinned(MAX_EXCLUDED_PORTS, BPF_F_NO_PREALLOC);

/// Of no use to the programs: what user space found in a netns and has to put back, also after a restart.
#[map]
pub static FOUND: HashMap<u64, u32> = HashMap::pinned(MAX_NETNS, BPF_F_NO_PREALLOC);

/// Where the kubelet probes the pods of this node, and the netns of each.
#[map]
pub static PROBES: HashMap<ProbeKey, u64> = HashMap::pinned(MAX_PROBES, BPF_F_NO_PREALLOC);

/// One element: the netns the kubelet lives in; 0 while nobody has said.
#[map]
pub static HOST: Array<u64> = Array::pinned(1, 0);

#[map]
pub static COUNTERS: PerCpuArray<u64> = PerCpuArray::pinned(Counter::COUNT, 0);

/// What `ENROLLED` says of a netns.
#[inline(always)]
pub fn enrolled(cookie: u64) -> Option<Enrolled> {
    // SAFETY: the map does not preallocate, so the element cannot become another one's before RCU lets it go.
    unsafe { ENROLLED.get(&cookie) }.copied()
}

/// Is the port one that is not captured?
#[inline(always)]
pub fn is_port_excluded(key: &PortKey) -> bool {
    EXCLUDED_PORTS.get_ptr(key).is_some()
}

/// The netns of the pod that is probed there.
#[inline(always)]
pub fn probed(key: &ProbeKey) -> Option<u64> {
    // SAFETY: as above.
    unsafe { PROBES.get(key) }.copied()
}

/// Is this the netns the kubelet lives in?
#[inline(always)]
pub fn is_host(cookie: u64) -> bool {
    HOST.get(0).is_some_and(|host| *host == cookie && cookie != 0)
}

#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the pointer is this CPU's element; an interrupted increment can lose one, never more.
        unsafe { *value += 1 };
    }
}
