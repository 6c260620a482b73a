//! The pinned maps, typed, and what this process knows to be in them.

use std::{
    collections::{HashMap as Table, HashSet},
    os::fd::{AsFd, BorrowedFd},
};

use aya::{
    Ebpf, Pod,
    maps::{Array, HashMap, Map, MapData, MapError, MapType, PerCpuArray, SockHash, lpm_trie},
};
use ebpf_abi::{
    AddressKey, Counter, Enrolled, ExcludedKey, ListenerKey, MAX_ADDRESSES, MAX_EXCLUDED, MAX_EXCLUDED_PORTS,
    MAX_NETNS, MAX_PROBES, PortKey, ProbeKey, Slot,
};

use crate::{
    LoadError, NetnsCookie, PodCapture, Prefix,
    kernel::{MapInfo, map_info, open_pin},
    pins::Pins,
    pod,
};

const ENROLLED: &str = "ENROLLED";
const LISTENERS: &str = "LISTENERS";
const ADDRESSES: &str = "ADDRESSES";
const EXCLUDED: &str = "EXCLUDED";
const EXCLUDED_PORTS: &str = "EXCLUDED_PORTS";
const FOUND: &str = "FOUND";
const PROBES: &str = "PROBES";
const HOST: &str = "HOST";
const COUNTERS: &str = "COUNTERS";
/// Of the kernel's `bpf.h`.
const BPF_F_NO_PREALLOC: u32 = 1;

/// What a pinned map must be like for the programs and for this process.
#[derive(Debug, PartialEq, Eq)]
struct Layout {
    name: &'static str,
    kind: u32,
    key: usize,
    value: usize,
    entries: u32,
    flags: u32,
}

const fn layout(name: &'static str, kind: MapType, key: usize, value: usize, entries: u32, flags: u32) -> Layout {
    Layout { name, kind: kind as u32, key, value, entries, flags }
}

/// Every pinned map. A change of any is a change of [`ebpf_abi::VERSION`].
const LAYOUT: [Layout; 9] = [
    layout(ENROLLED, MapType::Hash, size_of::<u64>(), size_of::<Enrolled>(), MAX_NETNS, BPF_F_NO_PREALLOC),
    layout(
        LISTENERS,
        MapType::SockHash,
        size_of::<ListenerKey>(),
        size_of::<u32>(),
        MAX_NETNS * Slot::ALL.len() as u32,
        0,
    ),
    layout(ADDRESSES, MapType::Hash, size_of::<AddressKey>(), size_of::<u32>(), MAX_ADDRESSES, BPF_F_NO_PREALLOC),
    layout(
        EXCLUDED,
        MapType::LpmTrie,
        size_of::<u32>() + size_of::<ExcludedKey>(),
        size_of::<u32>(),
        MAX_EXCLUDED,
        BPF_F_NO_PREALLOC,
    ),
    layout(
        EXCLUDED_PORTS,
        MapType::Hash,
        size_of::<PortKey>(),
        size_of::<u32>(),
        MAX_EXCLUDED_PORTS,
        BPF_F_NO_PREALLOC,
    ),
    layout(FOUND, MapType::Hash, size_of::<u64>(), size_of::<u32>(), MAX_NETNS, BPF_F_NO_PREALLOC),
    layout(PROBES, MapType::Hash, size_of::<ProbeKey>(), size_of::<u64>(), MAX_PROBES, BPF_F_NO_PREALLOC),
    layout(HOST, MapType::Array, size_of::<u32>(), size_of::<u64>(), 1, 0),
    layout(COUNTERS, MapType::PerCpuArray, size_of::<u32>(), size_of::<u64>(), Counter::COUNT, 0),
];

/// How often each thing happened since the maps were made, on all CPUs together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Outbound connections marked for capture.
    pub captured: u64,
    /// Connections of ztunnel itself.
    pub bypassed: u64,
    /// Connections that are excluded by destination or port, outbound and inbound.
    pub excluded: u64,
    /// Outbound connections refused because no ztunnel listens.
    pub refused: u64,
    /// Connections let through because no ztunnel listens and the pod asked for that.
    pub failed_open: u64,
    /// Plaintext connections to a pod handed to ztunnel.
    pub inbound: u64,
    /// HBONE connections handed to ztunnel.
    pub hbone: u64,
    /// Packets dropped because no ztunnel listens.
    pub dropped: u64,
    /// DNS packets handed to ztunnel.
    pub dns: u64,
}

/// A prefix as the kernel compares it: bits that must match, and the data.
type Excluded = (u32, ExcludedKey);

pub(crate) struct Maps {
    enrolled: HashMap<MapData, u64, Enrolled>,
    listeners: SockHash<MapData, ListenerKey>,
    addresses: HashMap<MapData, AddressKey, u32>,
    excluded: lpm_trie::LpmTrie<MapData, ExcludedKey, u32>,
    excluded_ports: HashMap<MapData, PortKey, u32>,
    found: HashMap<MapData, u64, u32>,
    probes: HashMap<MapData, ProbeKey, u64>,
    host: Array<MapData, u64>,
    counters: PerCpuArray<MapData, u64>,
    /// Contents of `addresses`, `probes`, `excluded` and `excluded_ports` by cookie, so that an update costs what it changes.
    known_addresses: Table<u64, HashSet<[u8; 16]>>,
    known_probes: Table<u64, HashSet<ProbeKey>>,
    known_excluded: Table<u64, HashSet<Excluded>>,
    known_ports: Table<u64, HashSet<PortKey>>,
}

impl Maps {
    /// Takes the maps out of a loaded object and reads what a predecessor left in them.
    pub(crate) fn take(object: &mut Ebpf) -> Result<Maps, LoadError> {
        let mut maps = Maps {
            enrolled: take(object, ENROLLED)?,
            listeners: take(object, LISTENERS)?,
            addresses: take(object, ADDRESSES)?,
            excluded: take(object, EXCLUDED)?,
            excluded_ports: take(object, EXCLUDED_PORTS)?,
            found: take(object, FOUND)?,
            probes: take(object, PROBES)?,
            host: take(object, HOST)?,
            counters: take(object, COUNTERS)?,
            known_addresses: Table::new(),
            known_probes: Table::new(),
            known_excluded: Table::new(),
            known_ports: Table::new(),
        };
        for key in maps.addresses.keys() {
            let key = key.map_err(|error| LoadError::map(ADDRESSES, MAX_ADDRESSES, error))?;
            maps.known_addresses.entry(key.cookie).or_default().insert(key.address);
        }
        for entry in maps.probes.iter() {
            let (key, cookie) = entry.map_err(|error| LoadError::map(PROBES, MAX_PROBES, error))?;
            maps.known_probes.entry(cookie).or_default().insert(key);
        }
        for key in maps.excluded.keys() {
            let key = key.map_err(|error| LoadError::map(EXCLUDED, MAX_EXCLUDED, error))?;
            let cookie = u64::from_ne_bytes(key.data().cookie);
            maps.known_excluded.entry(cookie).or_default().insert((key.prefix_len(), key.data()));
        }
        for key in maps.excluded_ports.keys() {
            let key = key.map_err(ports_error)?;
            maps.known_ports.entry(key.cookie).or_default().insert(key);
        }
        Ok(maps)
    }

    pub(crate) fn set_listener(
        &mut self,
        cookie: NetnsCookie,
        slot: Slot,
        listener: BorrowedFd<'_>,
    ) -> Result<(), LoadError> {
        self.listeners.insert(ListenerKey::new(cookie.0, slot), listener, 0).map_err(listeners_error)
    }

    pub(crate) fn clear_listener(&mut self, cookie: NetnsCookie, slot: Slot) -> Result<(), LoadError> {
        absent_is_fine(self.listeners.remove(&ListenerKey::new(cookie.0, slot))).map_err(listeners_error)
    }

    /// Every slot that has a listener.
    pub(crate) fn listening(&self) -> Result<HashSet<(NetnsCookie, u32)>, LoadError> {
        let keys = self.listeners.keys();
        keys.map(|key| key.map(|key| (NetnsCookie(key.cookie), key.slot)).map_err(listeners_error)).collect()
    }

    /// Remembers `now` as what was found in the netns, unless something is remembered already; returns what is.
    pub(crate) fn remember(&mut self, cookie: NetnsCookie, now: u32) -> Result<u32, LoadError> {
        let failed = |error| LoadError::map(FOUND, MAX_NETNS, error);
        match self.found.get(&cookie.0, 0) {
            Ok(found) => Ok(found),
            Err(MapError::KeyNotFound) => self.found.insert(cookie.0, now, 0).map(|()| now).map_err(failed),
            Err(error) => Err(failed(error)),
        }
    }

    pub(crate) fn forget_found(&mut self, cookie: NetnsCookie) -> Result<(), LoadError> {
        absent_is_fine(self.found.remove(&cookie.0)).map_err(|error| LoadError::map(FOUND, MAX_NETNS, error))
    }

    /// What the verdict is made of comes first and goes last, so that no packet meets half of it.
    pub(crate) fn enrol(&mut self, cookie: NetnsCookie, pod: &PodCapture, state: Enrolled) -> Result<(), LoadError> {
        let addresses: HashSet<_> = pod.addresses.iter().copied().map(pod::mapped).collect();
        let excluded = keys(cookie, &pod.excluded);
        let probes = addresses
            .iter()
            .flat_map(|address| pod.probe_ports.iter().map(|port| ProbeKey { address: *address, port: (*port).into() }))
            .collect();
        self.add_addresses(cookie, &addresses)?;
        let ports = pod.port_keys(cookie);
        self.add_excluded(cookie, &excluded)?;
        self.add_ports(cookie, &ports)?;
        self.add_probes(cookie, &probes)?;
        self.set_state(cookie, state)?;
        self.retain_ports(cookie, &ports)?;
        self.retain_probes(cookie, &probes)?;
        self.retain_addresses(cookie, &addresses)?;
        self.retain_excluded(cookie, &excluded)
    }

    pub(crate) fn set_host(&mut self, cookie: NetnsCookie) -> Result<(), LoadError> {
        self.host.set(0, cookie.0, 0).map_err(|error| LoadError::map(HOST, 1, error))
    }

    pub(crate) fn set_global_exclusions(&mut self, prefixes: &[Prefix]) -> Result<(), LoadError> {
        let global = NetnsCookie(ExcludedKey::GLOBAL);
        let excluded = keys(global, prefixes);
        self.add_excluded(global, &excluded)?;
        self.retain_excluded(global, &excluded)
    }

    pub(crate) fn state(&self, cookie: NetnsCookie) -> Result<Option<Enrolled>, LoadError> {
        match self.enrolled.get(&cookie.0, 0) {
            Ok(state) => Ok(Some(state)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(LoadError::map(ENROLLED, MAX_NETNS, error)),
        }
    }

    pub(crate) fn set_state(&mut self, cookie: NetnsCookie, state: Enrolled) -> Result<(), LoadError> {
        self.enrolled.insert(cookie.0, state, 0).map_err(|error| LoadError::map(ENROLLED, MAX_NETNS, error))
    }

    pub(crate) fn remove_state(&mut self, cookie: NetnsCookie) -> Result<(), LoadError> {
        absent_is_fine(self.enrolled.remove(&cookie.0)).map_err(|error| LoadError::map(ENROLLED, MAX_NETNS, error))
    }

    /// Removes all but the state, which has its own moment.
    pub(crate) fn forget(&mut self, cookie: NetnsCookie) -> Result<(), LoadError> {
        for slot in Slot::ALL {
            self.clear_listener(cookie, slot)?;
        }
        self.retain_probes(cookie, &HashSet::new())?;
        self.retain_ports(cookie, &HashSet::new())?;
        self.retain_addresses(cookie, &HashSet::new())?;
        self.retain_excluded(cookie, &HashSet::new())
    }

    /// Every netns these maps say something about.
    pub(crate) fn cookies(&self) -> Result<HashSet<NetnsCookie>, LoadError> {
        let mut cookies = HashSet::new();
        for cookie in self.enrolled.keys() {
            cookies.insert(NetnsCookie(cookie.map_err(|error| LoadError::map(ENROLLED, MAX_NETNS, error))?));
        }
        for cookie in self.found.keys() {
            cookies.insert(NetnsCookie(cookie.map_err(|error| LoadError::map(FOUND, MAX_NETNS, error))?));
        }
        let known = self.known_addresses.keys().chain(self.known_probes.keys()).chain(self.known_excluded.keys());
        let known = known.chain(self.known_ports.keys());
        cookies.extend(known.copied().map(NetnsCookie));
        cookies.remove(&NetnsCookie(ExcludedKey::GLOBAL));
        Ok(cookies)
    }

    pub(crate) fn counters(&self) -> Result<Counters, LoadError> {
        let sum = |counter: Counter| -> Result<u64, LoadError> {
            let values = self
                .counters
                .get(&(counter as u32), 0)
                .map_err(|error| LoadError::map(COUNTERS, Counter::COUNT, error))?;
            Ok(values.iter().sum())
        };
        Ok(Counters {
            captured: sum(Counter::Captured)?,
            bypassed: sum(Counter::Bypassed)?,
            excluded: sum(Counter::Excluded)?,
            refused: sum(Counter::Refused)?,
            failed_open: sum(Counter::FailedOpen)?,
            inbound: sum(Counter::Inbound)?,
            hbone: sum(Counter::Hbone)?,
            dropped: sum(Counter::Dropped)?,
            dns: sum(Counter::Dns)?,
        })
    }

    fn add_addresses(&mut self, cookie: NetnsCookie, wanted: &HashSet<[u8; 16]>) -> Result<(), LoadError> {
        let known = self.known_addresses.entry(cookie.0).or_default();
        for address in wanted {
            if !known.contains(address) {
                self.addresses
                    .insert(AddressKey { cookie: cookie.0, address: *address }, 1, 0)
                    .map_err(|error| LoadError::map(ADDRESSES, MAX_ADDRESSES, error))?;
                known.insert(*address);
            }
        }
        Ok(())
    }

    fn retain_addresses(&mut self, cookie: NetnsCookie, wanted: &HashSet<[u8; 16]>) -> Result<(), LoadError> {
        let Some(known) = self.known_addresses.get_mut(&cookie.0) else { return Ok(()) };
        let stale: Vec<_> = known.difference(wanted).copied().collect();
        for address in stale {
            absent_is_fine(self.addresses.remove(&AddressKey { cookie: cookie.0, address }))
                .map_err(|error| LoadError::map(ADDRESSES, MAX_ADDRESSES, error))?;
            known.remove(&address);
        }
        if known.is_empty() {
            self.known_addresses.remove(&cookie.0);
        }
        Ok(())
    }

    /// Written each time: the same address and port may have been another pod's until now.
    fn add_probes(&mut self, cookie: NetnsCookie, wanted: &HashSet<ProbeKey>) -> Result<(), LoadError> {
        for key in wanted {
            self.probes.insert(key, cookie.0, 0).map_err(|error| LoadError::map(PROBES, MAX_PROBES, error))?;
            self.known_probes.entry(cookie.0).or_default().insert(*key);
        }
        Ok(())
    }

    fn retain_probes(&mut self, cookie: NetnsCookie, wanted: &HashSet<ProbeKey>) -> Result<(), LoadError> {
        let Some(known) = self.known_probes.get_mut(&cookie.0) else { return Ok(()) };
        let stale: Vec<_> = known.difference(wanted).copied().collect();
        for key in stale {
            let owner = self.probes.get(&key, 0);
            if owner.is_ok_and(|owner| owner == cookie.0) {
                absent_is_fine(self.probes.remove(&key)).map_err(|error| LoadError::map(PROBES, MAX_PROBES, error))?;
            }
            known.remove(&key);
        }
        if known.is_empty() {
            self.known_probes.remove(&cookie.0);
        }
        Ok(())
    }

    fn add_excluded(&mut self, cookie: NetnsCookie, wanted: &HashSet<Excluded>) -> Result<(), LoadError> {
        let known = self.known_excluded.entry(cookie.0).or_default();
        for (bits, data) in wanted {
            if !known.contains(&(*bits, *data)) {
                self.excluded
                    .insert(&lpm_trie::Key::new(*bits, *data), 1, 0)
                    .map_err(|error| LoadError::map(EXCLUDED, MAX_EXCLUDED, error))?;
                known.insert((*bits, *data));
            }
        }
        Ok(())
    }

    fn add_ports(&mut self, cookie: NetnsCookie, wanted: &HashSet<PortKey>) -> Result<(), LoadError> {
        for key in wanted {
            self.excluded_ports.insert(key, 1, 0).map_err(ports_error)?;
            self.known_ports.entry(cookie.0).or_default().insert(*key);
        }
        Ok(())
    }

    fn retain_ports(&mut self, cookie: NetnsCookie, wanted: &HashSet<PortKey>) -> Result<(), LoadError> {
        let Some(known) = self.known_ports.get_mut(&cookie.0) else { return Ok(()) };
        let stale: Vec<_> = known.difference(wanted).copied().collect();
        for key in stale {
            absent_is_fine(self.excluded_ports.remove(&key)).map_err(ports_error)?;
            known.remove(&key);
        }
        if known.is_empty() {
            self.known_ports.remove(&cookie.0);
        }
        Ok(())
    }

    fn retain_excluded(&mut self, cookie: NetnsCookie, wanted: &HashSet<Excluded>) -> Result<(), LoadError> {
        let Some(known) = self.known_excluded.get_mut(&cookie.0) else { return Ok(()) };
        let stale: Vec<_> = known.difference(wanted).copied().collect();
        for (bits, data) in stale {
            absent_is_fine(self.excluded.remove(&lpm_trie::Key::new(bits, data)))
                .map_err(|error| LoadError::map(EXCLUDED, MAX_EXCLUDED, error))?;
            known.remove(&(bits, data));
        }
        if known.is_empty() {
            self.known_excluded.remove(&cookie.0);
        }
        Ok(())
    }
}

/// Compares the maps that are pinned already with what this build expects. The kernel copies keys and values by the size
/// of the map, so a difference would read past our own; a map of another kind or size would fail later and worse.
pub(crate) fn check_layout(pins: &Pins) -> Result<(), LoadError> {
    for expected in LAYOUT {
        let path = pins.map(expected.name);
        let failed = |source| LoadError::io(format!("examining {}", path.display()), source);
        let Some(map) = open_pin(&path).map_err(failed)? else { continue };
        let MapInfo { kind, key_size, value_size, max_entries, flags, .. } = map_info(map.as_fd()).map_err(failed)?;
        let found = Layout {
            name: expected.name,
            kind,
            key: key_size as usize,
            value: value_size as usize,
            entries: max_entries,
            // Others say how it is opened; this one how it stores.
            flags: flags & BPF_F_NO_PREALLOC,
        };
        if found != expected {
            return Err(LoadError::IncompatiblePins { path });
        }
    }
    Ok(())
}

/// The kernel's id of the map every program uses.
pub(crate) fn shared_map_id(pins: &Pins) -> Result<u32, LoadError> {
    let info = MapData::from_pin(pins.map(ENROLLED)).and_then(|map| map.info());
    info.map(|info| info.id()).map_err(|error| LoadError::map(ENROLLED, MAX_NETNS, error))
}

fn keys(cookie: NetnsCookie, prefixes: &[Prefix]) -> HashSet<Excluded> {
    prefixes.iter().map(|prefix| prefix.key(cookie)).collect()
}

fn take<T: TryFrom<Map, Error = MapError>>(object: &mut Ebpf, name: &'static str) -> Result<T, LoadError> {
    object
        .take_map(name)
        .ok_or(MapError::InvalidName { name: name.to_owned() })
        .and_then(T::try_from)
        .map_err(|error| LoadError::Map { map: name, source: Box::new(error) })
}

fn ports_error(error: MapError) -> LoadError {
    LoadError::map(EXCLUDED_PORTS, MAX_EXCLUDED_PORTS, error)
}

fn listeners_error(error: MapError) -> LoadError {
    LoadError::map(LISTENERS, MAX_NETNS * Slot::ALL.len() as u32, error)
}

fn absent_is_fine(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound | MapError::ElementNotFound) => Ok(()),
        Err(MapError::SyscallError(error))
            if matches!(error.io_error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) =>
        {
            Ok(())
        }
        other => other,
    }
}

/// A map key or value must be plain data; this keeps the list above honest when a type is added.
const _: fn() = || {
    fn plain<T: Pod>() {}
    plain::<Enrolled>();
    plain::<ListenerKey>();
    plain::<AddressKey>();
    plain::<ExcludedKey>();
    plain::<ProbeKey>();
    plain::<PortKey>();
};
