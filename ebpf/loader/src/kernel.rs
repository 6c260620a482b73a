//! What aya does not wrap: a few commands of bpf(2), netns cookies, and what this kernel and process may do.

use std::{
    ffi::{CStr, CString},
    fmt, fs,
    io::{self, ErrorKind},
    mem,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::{ffi::OsStrExt, net::UnixDatagram},
    },
    path::Path,
    thread,
};

use nix::{
    sched::{CloneFlags, setns},
    sys::stat::{fstat, stat},
};

use crate::LoadError;

/// The first kernel with all that is used: `bpf_set_retval` in cgroup hooks came last.
pub(crate) const MINIMUM: &str = "5.18";
const MINIMUM_VERSION: (u32, u32) = (5, 18);

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_OBJ_PIN: libc::c_long = 6;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_PROG_GET_FD_BY_ID: libc::c_long = 13;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_MAP_FREEZE: libc::c_long = 22;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_UPDATE: libc::c_long = 29;
const BPF_MAP_TYPE_ARRAY: u32 = 2;
const BPF_F_RDONLY_PROG: u32 = 1 << 7;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;
/// Enough for the verifier's last words.
const VERIFIER_LOG: usize = 256 * 1024;
const SO_NETNS_COOKIE: libc::c_int = 71;

/// Identity of a network namespace for as long as the machine is up; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetnsCookie(pub u64);

impl fmt::Display for NetnsCookie {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The cookie of the netns a socket was made in.
///
/// # Errors
/// As getsockopt(2); `ENOPROTOOPT` before Linux 5.14.
pub fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<NetnsCookie> {
    let mut cookie = 0_u64;
    let mut length = mem::size_of::<u64>() as libc::socklen_t;
    // SAFETY: the value is eight bytes, as the length says, and both live through the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(NetnsCookie(cookie)) } else { Err(io::Error::last_os_error()) }
}

/// The cookie of the netns behind a file such as `/proc/PID/ns/net`.
///
/// Enters it on a thread of its own, because only a socket made inside can tell. Where the caller is in it already no
/// right is needed.
pub fn cookie_of(netns: BorrowedFd<'_>) -> Result<NetnsCookie, LoadError> {
    thread::scope(|scope| {
        let inside = scope.spawn(|| -> io::Result<NetnsCookie> {
            let (there, here) = (fstat(netns)?, stat("/proc/thread-self/ns/net")?);
            if (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino) {
                setns(netns, CloneFlags::CLONE_NEWNET)?;
            }
            netns_cookie(UnixDatagram::unbound()?.as_fd())
        });
        inside.join().unwrap_or_else(|_| Err(io::Error::other("the thread inside panicked")))
    })
    .map_err(|source| LoadError::io("entering the network namespace (needs CAP_SYS_ADMIN)", source))
}

/// Attributes of the bpf(2) commands used here, zero-padded to the longest.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    words: [u32; 18],
}

impl Attributes {
    fn set_u64(&mut self, index: usize, value: u64) {
        let bytes = value.to_ne_bytes();
        self.words[index] = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        self.words[index + 1] = u32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
    }

    fn call(&mut self, command: libc::c_long) -> io::Result<libc::c_int> {
        // SAFETY: the attributes live through the call, are as long as said, and any address in them is that of a
        // buffer the caller keeps.
        let result = unsafe {
            libc::syscall(libc::SYS_bpf, command, (&raw mut self.words).cast::<u8>(), mem::size_of_val(&self.words))
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as libc::c_int) }
    }

    fn call_for_fd(&mut self, command: libc::c_long) -> io::Result<OwnedFd> {
        let fd = self.call(command)?;
        // SAFETY: the kernel just made this descriptor for us and nobody else knows it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// Opens a pinned object; `None` when nothing is pinned there.
pub(crate) fn open_pin(path: &Path) -> io::Result<Option<OwnedFd>> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    let mut attributes = Attributes::default();
    attributes.set_u64(0, name.as_ptr() as u64);
    match attributes.call_for_fd(BPF_OBJ_GET) {
        Ok(fd) => Ok(Some(fd)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Replaces the program behind a link; connections see one or the other, never neither.
pub(crate) fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attributes = Attributes::default();
    attributes.words[0] = link.as_raw_fd() as u32;
    attributes.words[1] = program.as_raw_fd() as u32;
    attributes.call(BPF_LINK_UPDATE).map(drop)
}

/// Deletes the entry of a netns from a map of another build, without a look at what it holds. Fine when there is none;
/// a map whose keys are no cookies is left alone.
pub(crate) fn delete_by_cookie(map: BorrowedFd<'_>, cookie: NetnsCookie) -> io::Result<()> {
    if map_info(map)?.key_size as usize != mem::size_of_val(&cookie.0) {
        return Err(io::Error::other("the map is not keyed by netns cookie"));
    }
    let mut attributes = Attributes::default();
    attributes.words[0] = map.as_raw_fd() as u32;
    attributes.set_u64(2, (&raw const cookie.0) as u64);
    match attributes.call(BPF_MAP_DELETE_ELEM) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Pins an object; the path must not exist.
pub(crate) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    let mut attributes = Attributes::default();
    attributes.set_u64(0, name.as_ptr() as u64);
    attributes.words[2] = object.as_raw_fd() as u32;
    attributes.call(BPF_OBJ_PIN).map(drop)
}

/// A map of one value that nobody can change any more, so that the verifier takes it for a constant.
pub(crate) fn constant_map(value: &[u8]) -> io::Result<OwnedFd> {
    let mut attributes = Attributes::default();
    attributes.words[0] = BPF_MAP_TYPE_ARRAY;
    attributes.words[1] = mem::size_of::<u32>() as u32;
    attributes.words[2] = value.len() as u32;
    attributes.words[3] = 1;
    attributes.words[4] = BPF_F_RDONLY_PROG;
    let map = attributes.call_for_fd(BPF_MAP_CREATE)?;
    let key = 0_u32;
    let mut attributes = Attributes::default();
    attributes.words[0] = map.as_raw_fd() as u32;
    attributes.set_u64(2, (&raw const key) as u64);
    attributes.set_u64(4, value.as_ptr() as u64);
    attributes.call(BPF_MAP_UPDATE_ELEM)?;
    let mut attributes = Attributes::default();
    attributes.words[0] = map.as_raw_fd() as u32;
    attributes.call(BPF_MAP_FREEZE)?;
    Ok(map)
}

/// Instructions whose maps are descriptors of this process.
pub(crate) struct Instructions<'a>(pub(crate) &'a [aya_obj::generated::bpf_insn]);

/// What the verifier has against a program.
#[derive(Debug, thiserror::Error)]
#[error("{source}; the verifier said: {log}")]
pub(crate) struct Unverified {
    source: io::Error,
    log: String,
}

/// Loads an `sk_lookup` program.
pub(crate) fn load_sk_lookup(name: &str, code: Instructions<'_>, license: &CStr) -> Result<OwnedFd, Unverified> {
    let mut attributes = Attributes::default();
    attributes.words[0] = BPF_PROG_TYPE_SK_LOOKUP;
    attributes.words[1] = code.0.len() as u32;
    attributes.set_u64(2, code.0.as_ptr() as u64);
    attributes.set_u64(4, license.as_ptr() as u64);
    // Sixteen bytes with the final zero.
    let mut padded = [0_u8; 16];
    for (to, from) in padded.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    for (word, bytes) in attributes.words[12..16].iter_mut().zip(padded.chunks_exact(4)) {
        *word = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    attributes.words[17] = BPF_SK_LOOKUP;
    let source = match attributes.call_for_fd(BPF_PROG_LOAD) {
        Ok(program) => return Ok(program),
        Err(source) => source,
    };
    // The log costs more than the program; only who fails asks for it.
    let mut log = vec![0_u8; VERIFIER_LOG];
    attributes.words[6] = 1;
    attributes.words[7] = log.len() as u32;
    attributes.set_u64(8, log.as_mut_ptr() as u64);
    attributes.call_for_fd(BPF_PROG_LOAD).map_err(|_| {
        let end = log.iter().position(|byte| *byte == 0).unwrap_or(log.len());
        let text = String::from_utf8_lossy(&log[..end]);
        let tail: Vec<_> = text.lines().rev().take(10).collect();
        Unverified { source, log: tail.into_iter().rev().collect::<Vec<_>>().join(" | ") }
    })
}

/// Attaches an `sk_lookup` program to a netns.
pub(crate) fn attach_sk_lookup(program: BorrowedFd<'_>, netns: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut attributes = Attributes::default();
    attributes.words[0] = program.as_raw_fd() as u32;
    attributes.words[1] = netns.as_raw_fd() as u32;
    attributes.words[2] = BPF_SK_LOOKUP;
    attributes.call_for_fd(BPF_LINK_CREATE)
}

/// The start of the kernel's `bpf_link_info`. What `target` means depends on the kind of link.
#[repr(C)]
#[derive(Default)]
struct RawLinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    _padding: u32,
    target: [u32; 2],
    _rest: [u64; 8],
}

/// What a link is attached to, and the id of its program.
pub(crate) struct LinkInfo {
    pub program: u32,
    target: [u32; 2],
}

impl LinkInfo {
    /// Inode of the netns; `None` when it is gone.
    pub(crate) fn netns(&self) -> Option<u32> {
        Some(self.target[0]).filter(|inode| *inode != 0)
    }

    /// Id of the cgroup, which is its inode; `None` when it is gone.
    pub(crate) fn cgroup(&self) -> Option<u64> {
        let [low, high] = self.target.map(u32::to_ne_bytes);
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&low);
        bytes[4..].copy_from_slice(&high);
        Some(u64::from_ne_bytes(bytes)).filter(|id| *id != 0)
    }
}

pub(crate) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let mut info = RawLinkInfo::default();
    object_info(link, &mut info)?;
    Ok(LinkInfo { program: info.program, target: info.target })
}

/// The start of the kernel's `bpf_map_info`.
#[repr(C)]
#[derive(Default)]
pub(crate) struct MapInfo {
    pub kind: u32,
    pub id: u32,
    pub key_size: u32,
    pub value_size: u32,
    pub max_entries: u32,
    pub flags: u32,
}

pub(crate) fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    let mut info = MapInfo::default();
    object_info(map, &mut info)?;
    Ok(info)
}

/// The start of the kernel's `bpf_prog_info`.
#[repr(C)]
#[derive(Default)]
struct RawProgramInfo {
    kind: u32,
    id: u32,
    tag: [u8; 8],
    jited_length: u32,
    translated_length: u32,
    jited: u64,
    translated: u64,
    load_time: u64,
    created_by: u32,
    map_count: u32,
    map_ids: u64,
}

/// Digest of a program's instructions, without the maps it uses: equal for two loads of the same object, whatever
/// constants they were given.
pub(crate) fn program_tag(program: BorrowedFd<'_>) -> io::Result<[u8; 8]> {
    let mut info = RawProgramInfo::default();
    object_info(program, &mut info)?;
    Ok(info.tag)
}

/// Ids of the maps a program uses.
pub(crate) fn program_maps(program: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    let mut ids = [0_u32; 16];
    let mut info =
        RawProgramInfo { map_count: ids.len() as u32, map_ids: ids.as_mut_ptr() as u64, ..Default::default() };
    object_info(program, &mut info)?;
    let count = ids.len().min(info.map_count as usize);
    Ok(ids[..count].to_vec())
}

pub(crate) fn program_by_id(id: u32) -> io::Result<OwnedFd> {
    let mut attributes = Attributes::default();
    attributes.words[0] = id;
    attributes.call_for_fd(BPF_PROG_GET_FD_BY_ID)
}

fn object_info<T>(object: BorrowedFd<'_>, info: &mut T) -> io::Result<()> {
    let mut attributes = Attributes::default();
    attributes.words[0] = object.as_raw_fd() as u32;
    attributes.words[1] = mem::size_of::<T>() as u32;
    attributes.set_u64(2, std::ptr::from_mut(info) as u64);
    attributes.call(BPF_OBJ_GET_INFO_BY_FD).map(drop)
}

/// Fails when this thread lacks a capability that capture cannot do without.
pub(crate) fn check_capabilities() -> Result<(), LoadError> {
    let status = fs::read_to_string("/proc/thread-self/status")
        .map_err(|source| LoadError::io("reading /proc/thread-self/status", source))?;
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    let missing = missing_capabilities(effective);
    if missing.is_empty() { Ok(()) } else { Err(LoadError::MissingCapabilities { missing }) }
}

fn missing_capabilities(effective: u64) -> Vec<&'static str> {
    const NET_ADMIN: u32 = 12;
    const SYS_ADMIN: u32 = 21;
    const BPF: u32 = 39;
    let has = |bit: u32| effective & (1 << bit) != 0;
    let mut missing = Vec::new();
    // The kernel takes SYS_ADMIN for BPF, as it did before there was BPF.
    if !has(BPF) && !has(SYS_ADMIN) {
        missing.push("CAP_BPF");
    }
    if !has(NET_ADMIN) {
        missing.push("CAP_NET_ADMIN");
    }
    missing
}

/// The kernel's release when it is older than [`MINIMUM`].
pub(crate) fn too_old() -> Option<String> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    let release = release.trim();
    (version(release)? < MINIMUM_VERSION).then(|| release.to_owned())
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_named_as_the_kernel_asks_for_them() {
        assert_eq!(missing_capabilities(0), ["CAP_BPF", "CAP_NET_ADMIN"]);
        assert!(missing_capabilities(1 << 39 | 1 << 12).is_empty());
        assert_eq!(missing_capabilities(1 << 21), ["CAP_NET_ADMIN"]);
        assert!(missing_capabilities(1 << 21 | 1 << 12).is_empty());
    }

    #[test]
    fn releases_compare_by_number() {
        assert_eq!(version("5.4.0-150-generic"), Some((5, 4)));
        assert_eq!(version("6.18.44-fc"), Some((6, 18)));
        assert!(version("5.15.0").is_some_and(|found| found < MINIMUM_VERSION));
        assert!(version("5.18.0").is_some_and(|found| found >= MINIMUM_VERSION));
        assert_eq!(version("rolling"), None);
    }
}
