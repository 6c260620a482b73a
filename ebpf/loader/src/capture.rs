//! Loading, attaching and taking over.

use std::{
    collections::HashSet,
    fs::File,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard},
};

use aya::{
    Ebpf, EbpfLoader,
    programs::{
        CgroupAttachMode, CgroupSockAddr, Program, ProgramError,
        links::{FdLink, LinkError},
    },
};
use ebpf_abi::Slot;
use mesh_memory::give_back_memory;
use tracing::{debug, info};

use crate::{
    Counters, LoadError, NetnsCookie, OBJECT, Phase, PodCapture, Prefix, cookie_of, has_programs,
    kernel::{self, check_capabilities, link_info, open_pin, program_by_id, program_maps, program_tag, update_link},
    maps::{self, Maps},
    pins::{Layout, Pins, check_cgroup2, unpin},
    pod,
    steer::Steer,
};

const CONNECT4: &str = "connect4";
const CONNECT6: &str = "connect6";
/// The hooks of DNS capture.
const DNS_HOOKS: [&str; 3] = ["sock_create", "sendmsg4", "sendmsg6"];

/// The kernel side of capture on one node. Share it in an `Arc`; the calls block for microseconds, attaching for about a
/// millisecond, opening for many.
///
/// Dropping it detaches nothing: what was pinned goes on deciding, and fails closed (or open, per pod) once the
/// listeners are gone. Two of them may stand on the same pins while one ztunnel hands over to the next; the leaving one
/// must then no longer change anything.
pub struct Capture {
    pins: Pins,
    cgroup_root: PathBuf,
    /// Tells whether a netns of a predecessor runs the same program as this build.
    steer_tag: [u8; 8],
    shared_map: u32,
    steer: Steer,
    maps: Mutex<Maps>,
    /// What builds with another layout pinned; emptied by [`Capture::collect_garbage`].
    others: Mutex<Vec<Layout>>,
}

impl Capture {
    /// Loads the programs and attaches the connect hooks to `cgroup_root`, or takes over what a predecessor pinned below
    /// `bpffs_dir`: its maps are used on and the programs behind its links replaced, without a gap.
    ///
    /// # Errors
    /// Names the missing capability, filesystem or kernel feature; see [`LoadError`].
    pub fn open(bpffs_dir: &Path, cgroup_root: &Path) -> Result<Capture, LoadError> {
        if !has_programs() {
            return Err(LoadError::NoPrograms);
        }
        check_capabilities()?;
        check_cgroup2(cgroup_root)?;
        let pins = Pins::create(bpffs_dir)?;
        maps::check_layout(&pins)?;
        let mut object = load_object(&pins)?;

        for hook in [CONNECT4, CONNECT6] {
            load(&mut object, hook)?;
        }
        // Before the hooks are attached: a steer program the verifier refuses would leave capture half done.
        let steer = Steer::parse(&pins)?;
        let steer_tag = program_tag(steer.load(NetnsCookie(0))?.as_fd())
            .map_err(|source| LoadError::io("reading the tag of program steer", source))?;
        for hook in [CONNECT4, CONNECT6] {
            attach_cgroup(&mut object, hook, cgroup_root, &pins.link(hook))?;
        }
        for hook in DNS_HOOKS {
            if open_link(&pins.link(hook))?.is_some() {
                load(&mut object, hook)?;
                attach_cgroup(&mut object, hook, cgroup_root, &pins.link(hook))?;
            }
        }
        let shared_map = maps::shared_map_id(&pins)?;
        let maps = Mutex::new(Maps::take(&mut object)?);
        drop(object);
        give_back_memory();
        let others = Mutex::new(pins.other_layouts()?);
        Ok(Capture { pins, cgroup_root: cgroup_root.to_owned(), steer_tag, shared_map, steer, maps, others })
    }

    /// Attaches `sk_lookup` to a netns and pins it, unless this build's program is there already.
    ///
    /// It passes everything until [`Capture::enrol`].
    pub fn attach_netns(&self, netns: BorrowedFd<'_>) -> Result<NetnsCookie, LoadError> {
        let cookie = cookie_of(netns)?;
        let pin = self.pins.netns(cookie);
        if let Some(link) = open_link(&pin)? {
            let found = link_info(link.as_fd()).map_err(|source| LoadError::io("reading a link", source))?;
            if found.netns().is_some() {
                if !self.is_current(found.program) {
                    let program = self.steer.load(cookie)?;
                    update_link(link.as_fd(), program.as_fd())
                        .map_err(|source| LoadError::io(format!("replacing sk_lookup of netns {cookie}"), source))?;
                    info!(netns = %cookie, "replaced the sk_lookup program of a predecessor");
                }
                return Ok(cookie);
            }
            unpin(&pin)?;
        }
        let program = self.steer.load(cookie)?;
        let link = kernel::attach_sk_lookup(program.as_fd(), netns)
            .map_err(|source| LoadError::io(format!("attaching sk_lookup to netns {cookie}"), source))?;
        kernel::pin(link.as_fd(), &pin)
            .map_err(|source| LoadError::io(format!("pinning {}", pin.display()), source))?;
        debug!(netns = %cookie, "attached sk_lookup");
        Ok(cookie)
    }

    /// Makes `listener` the one that gets the connections of this slot, at once and in place of any other.
    ///
    /// Of listeners that share a port by SO_REUSEPORT insert one: the kernel spreads over the group.
    pub fn set_listener(&self, cookie: NetnsCookie, slot: Slot, listener: BorrowedFd<'_>) -> Result<(), LoadError> {
        self.maps().set_listener(cookie, slot, listener)
    }

    /// Empties a slot. Closing the listener does the same.
    pub fn clear_listener(&self, cookie: NetnsCookie, slot: Slot) -> Result<(), LoadError> {
        self.maps().clear_listener(cookie, slot)
    }

    /// Enrols a netns, or changes how it is enrolled. Open connections are never touched.
    ///
    /// What a build with another layout decided for this netns ends with it, in this order: between the two the netns is
    /// captured by both, and the later program has the last word.
    pub fn enrol(&self, cookie: NetnsCookie, pod: &PodCapture, phase: Phase) -> Result<(), LoadError> {
        self.maps().enrol(cookie, pod, pod.enrolled(phase))?;
        self.others().iter().try_for_each(|other| other.release(cookie))
    }

    /// Every slot that has a listener now, of all netns.
    pub fn listening(&self) -> Result<HashSet<(NetnsCookie, Slot)>, LoadError> {
        let slot = |number| Slot::ALL.into_iter().find(|slot| *slot as u32 == number);
        let listening = self.maps().listening()?;
        Ok(listening.into_iter().filter_map(|(cookie, number)| Some((cookie, slot(number)?))).collect())
    }

    /// The inode of a netns with a pinned `sk_lookup`; `None` when it is gone.
    pub fn netns_inode(&self, cookie: NetnsCookie) -> Result<Option<u64>, LoadError> {
        netns_of(&self.pins.netns(cookie))
    }

    /// Is `sk_lookup` still attached to the netns?
    pub fn is_attached(&self, cookie: NetnsCookie) -> Result<bool, LoadError> {
        is_alive(&self.pins.netns(cookie))
    }

    /// Keeps for successors what was found in a netns and has to be put back, unless a predecessor did; returns what is
    /// kept. It outlives [`Capture::detach`] and ends with [`Capture::forget_found`]. The meaning is the caller's.
    pub fn remember(&self, cookie: NetnsCookie, now: u32) -> Result<u32, LoadError> {
        self.maps().remember(cookie, now)
    }

    /// Ends [`Capture::remember`]. Fine when nothing is kept.
    pub fn forget_found(&self, cookie: NetnsCookie) -> Result<(), LoadError> {
        self.maps().forget_found(cookie)
    }

    /// Stops capturing; 15008 is still answered. Fine when the netns is not enrolled.
    pub fn leave(&self, cookie: NetnsCookie) -> Result<(), LoadError> {
        let mut maps = self.maps();
        match maps.state(cookie)? {
            Some(state) => maps.set_state(cookie, pod::leaving(state)),
            None => Ok(()),
        }
    }

    /// Takes a netns out altogether. Fine when it is not in. Call it after [`Capture::leave`] and the drain: captured
    /// connections that are still being opened would otherwise get no answer.
    pub fn detach(&self, cookie: NetnsCookie) -> Result<(), LoadError> {
        let mut maps = self.maps();
        maps.remove_state(cookie)?;
        unpin(&self.pins.netns(cookie))?;
        maps.forget(cookie)
    }

    /// Sets the destinations that no pod's connections are captured to.
    pub fn set_global_exclusions(&self, prefixes: &[Prefix]) -> Result<(), LoadError> {
        self.maps().set_global_exclusions(prefixes)
    }

    /// Says in which netns the kubelet lives. Its connections to the probe ports of pods get a source address of their
    /// own, [`crate::abi::PROBE_SOURCE4`] or [`crate::abi::PROBE_SOURCE6`], which pods let in at those ports; the netns
    /// must have both addresses.
    pub fn set_host(&self, netns: BorrowedFd<'_>) -> Result<NetnsCookie, LoadError> {
        let cookie = cookie_of(netns)?;
        self.maps().set_host(cookie)?;
        Ok(cookie)
    }

    /// Attaches the hooks that mark the UDP sockets of pods with [`crate::Dns::Capture`] and refuse what they send while
    /// nobody serves it. They stay, also for successors.
    pub fn capture_dns(&self) -> Result<(), LoadError> {
        let mut object = load_object(&self.pins)?;
        for hook in DNS_HOOKS {
            load(&mut object, hook)?;
            attach_cgroup(&mut object, hook, &self.cgroup_root, &self.pins.link(hook))?;
        }
        drop(object);
        give_back_memory();
        Ok(())
    }

    /// Every live netns with a pinned `sk_lookup`, those of predecessors included, also of one with another layout.
    pub fn attached(&self) -> Result<Vec<NetnsCookie>, LoadError> {
        let mut alive: Vec<_> = self.others().iter().flat_map(|other| other.netns.iter().copied()).collect();
        for cookie in self.pins.pinned_netns()? {
            if is_alive(&self.pins.netns(cookie))? {
                alive.push(cookie);
            }
        }
        Ok(alive)
    }

    /// Every netns of which anything is kept: those that are attached, and those that were and have something remembered.
    pub fn kept(&self) -> Result<HashSet<NetnsCookie>, LoadError> {
        let mut kept = self.maps().cookies()?;
        kept.extend(self.attached()?);
        Ok(kept)
    }

    /// Takes out every netns that is gone, every one that is not in `known`, and what builds with another layout left.
    /// Returns what was taken out.
    ///
    /// Call it once all pods of the node have been enrolled: until then a predecessor's pods that are not yet `known`
    /// rightly stay refused.
    pub fn collect_garbage(&self, known: &[NetnsCookie]) -> Result<Vec<NetnsCookie>, LoadError> {
        let known: HashSet<_> = known.iter().copied().collect();
        let mut removed = Vec::new();
        let mut candidates = self.maps().cookies()?;
        candidates.extend(self.pins.pinned_netns()?);
        for cookie in candidates {
            if known.contains(&cookie) && is_alive(&self.pins.netns(cookie))? {
                continue;
            }
            self.detach(cookie)?;
            self.forget_found(cookie)?;
            removed.push(cookie);
        }
        self.others().clear();
        self.pins.remove_other_layouts()?;
        removed.sort_unstable();
        Ok(removed)
    }

    /// Takes out every netns that is gone. Returns what was taken out.
    pub fn collect_dead(&self) -> Result<Vec<NetnsCookie>, LoadError> {
        let mut dead = Vec::new();
        for cookie in self.pins.pinned_netns()? {
            let pin = self.pins.netns(cookie);
            // Not pinned any more: another thread was here first.
            if open_link(&pin)?.is_some() && !is_alive(&pin)? {
                self.detach(cookie)?;
                self.forget_found(cookie)?;
                dead.push(cookie);
            }
        }
        Ok(dead)
    }

    /// How often what happened, since the maps were made.
    pub fn counters(&self) -> Result<Counters, LoadError> {
        self.maps().counters()
    }

    /// Removes every pin, and with the pins all capture on this node. New connections then go direct.
    pub fn destroy(self) -> Result<(), LoadError> {
        self.pins.remove_all()
    }

    /// Does the program come from the same object, and does it use our maps?
    fn is_current(&self, program: u32) -> bool {
        let Ok(program) = program_by_id(program) else { return false };
        program_tag(program.as_fd()).is_ok_and(|tag| tag == self.steer_tag)
            && program_maps(program.as_fd()).is_ok_and(|maps| maps.contains(&self.shared_map))
    }

    fn others(&self) -> MutexGuard<'_, Vec<Layout>> {
        self.others.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn maps(&self) -> MutexGuard<'_, Maps> {
        // A panic between two map updates leaves a state that the next update of that netns repairs.
        self.maps.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Parses the object and opens or makes its maps. The programs are not loaded yet.
fn load_object(pins: &Pins) -> Result<Ebpf, LoadError> {
    EbpfLoader::new().default_map_pin_directory(pins.maps()).load(OBJECT).map_err(LoadError::object)
}

/// Gives one program to the verifier.
fn load(object: &mut Ebpf, name: &str) -> Result<OwnedFd, LoadError> {
    let program = object.program_mut(name).ok_or_else(|| absent(name))?;
    let loaded = match program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    };
    loaded.map_err(|error| LoadError::program(name, error))?;
    let fd = program.fd().map_err(|error| LoadError::program(name, error))?;
    fd.as_fd()
        .try_clone_to_owned()
        .map_err(|source| LoadError::io(format!("duplicating the descriptor of program {name}"), source))
}

/// Puts a loaded program behind the pinned link, or makes and pins the link.
fn attach_cgroup(object: &mut Ebpf, name: &str, cgroup_root: &Path, pin: &Path) -> Result<(), LoadError> {
    let open = || File::open(cgroup_root).and_then(|file| Ok((file.metadata()?.ino(), file)));
    let (cgroup_id, cgroup) =
        open().map_err(|source| LoadError::io(format!("opening {}", cgroup_root.display()), source))?;
    if let Some(link) = open_link(pin)? {
        let found = link_info(link.as_fd()).map_err(|source| LoadError::io("reading a link", source))?;
        if found.cgroup() == Some(cgroup_id) {
            let program = object.program(name).ok_or_else(|| absent(name))?;
            let fd = program.fd().map_err(|error| LoadError::program(name, error))?;
            return update_link(link.as_fd(), fd.as_fd())
                .map_err(|source| LoadError::io(format!("replacing program {name}"), source));
        }
        info!(hook = name, "the pinned hook belongs to another cgroup or to none; attaching anew");
        unpin(pin)?;
    }
    // Links are always "multi"; the flag would be refused.
    let mode = CgroupAttachMode::Single;
    let failed = |error| LoadError::program(name, error);
    let link: Result<FdLink, LinkError> = match object.program_mut(name).ok_or_else(|| absent(name))? {
        Program::CgroupSockAddr(program) => attached_sock_addr(program, &cgroup, mode).map_err(failed)?,
        Program::CgroupSock(program) => {
            let id = program.attach(&cgroup, mode).map_err(failed)?;
            program.take_link(id).map_err(failed)?.try_into()
        }
        _ => return Err(failed(ProgramError::UnexpectedProgramType)),
    };
    pin_link(link.map_err(|error| LoadError::link(name, error))?, pin)
}

fn attached_sock_addr(
    program: &mut CgroupSockAddr,
    cgroup: &File,
    mode: CgroupAttachMode,
) -> Result<Result<FdLink, LinkError>, ProgramError> {
    let id = program.attach(cgroup, mode)?;
    Ok(program.take_link(id)?.try_into())
}

/// Pins a link; without its descriptor it lives on in the filesystem alone.
fn pin_link(link: FdLink, path: &Path) -> Result<(), LoadError> {
    match link.pin(path) {
        Ok(_pinned) => Ok(()),
        Err(error) => Err(LoadError::rejected(&format!("pin {}", path.display()), error)),
    }
}

fn open_link(path: &Path) -> Result<Option<OwnedFd>, LoadError> {
    open_pin(path).map_err(|source| LoadError::io(format!("opening {}", path.display()), source))
}

/// Is there a pinned link whose netns still exists?
fn is_alive(pin: &Path) -> Result<bool, LoadError> {
    Ok(netns_of(pin)?.is_some())
}

/// The inode of the netns that a pinned link is attached to, while it exists.
fn netns_of(pin: &Path) -> Result<Option<u64>, LoadError> {
    let Some(link) = open_link(pin)? else { return Ok(None) };
    let found = kernel::link_info(link.as_fd()).map_err(|source| LoadError::io("reading a link", source))?;
    Ok(found.netns().map(u64::from))
}

fn absent(name: &str) -> LoadError {
    LoadError::Program { program: name.to_owned(), source: "not in the embedded object".into() }
}
