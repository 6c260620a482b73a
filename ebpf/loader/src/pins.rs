//! Where things are pinned, and the two filesystems capture stands on.
//!
//! ```text
//! <bpffs_dir>/v<layout>/maps/<MAP>       shared state
//!                       links/<hook>     the cgroup hooks
//!                       netns/<cookie>   one sk_lookup each
//! ```

use std::{
    fs,
    io::{self, ErrorKind},
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, CGROUP2_SUPER_MAGIC, FsType, statfs},
};

use crate::{
    LoadError, NetnsCookie,
    kernel::{delete_by_cookie, link_info, open_pin},
};

#[derive(Debug)]
pub(crate) struct Pins {
    base: PathBuf,
    root: PathBuf,
}

impl Pins {
    /// Makes the directories where they are missing.
    pub(crate) fn create(base: &Path) -> Result<Pins, LoadError> {
        if !stands_on(base, BPF_FS_MAGIC)? {
            return Err(LoadError::NotBpffs { path: base.to_owned() });
        }
        let pins = Pins { base: base.to_owned(), root: base.join(format!("v{}", ebpf_abi::VERSION)) };
        for directory in [pins.maps(), pins.root.join("links"), pins.root.join("netns")] {
            make_directory(&directory)?;
        }
        Ok(pins)
    }

    pub(crate) fn maps(&self) -> PathBuf {
        self.root.join("maps")
    }

    pub(crate) fn map(&self, name: &str) -> PathBuf {
        self.maps().join(name)
    }

    pub(crate) fn link(&self, hook: &str) -> PathBuf {
        self.root.join("links").join(hook)
    }

    pub(crate) fn netns(&self, cookie: NetnsCookie) -> PathBuf {
        self.root.join("netns").join(cookie.to_string())
    }

    /// Every netns with a pin, dead or alive.
    pub(crate) fn pinned_netns(&self) -> Result<Vec<NetnsCookie>, LoadError> {
        let directory = self.root.join("netns");
        let names = list(&directory)?;
        Ok(names.iter().filter_map(|path| path.file_name()?.to_str()?.parse().ok()).map(NetnsCookie).collect())
    }

    /// What builds with another layout left, older and newer ones.
    pub(crate) fn other_layouts(&self) -> Result<Vec<Layout>, LoadError> {
        self.other_roots()?.iter().map(|root| Layout::open(root)).collect()
    }

    /// Takes away what builds with another layout left; their links go with their pins.
    pub(crate) fn remove_other_layouts(&self) -> Result<(), LoadError> {
        self.other_roots()?.iter().try_for_each(|root| remove(root))
    }

    fn other_roots(&self) -> Result<Vec<PathBuf>, LoadError> {
        let is_layout = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str()?.strip_prefix('v'));
            name.is_some_and(|number| number.parse::<u32>().is_ok()) && *path != self.root
        };
        Ok(list(&self.base)?.into_iter().filter(is_layout).collect())
    }

    /// Takes away every pin of this layout.
    pub(crate) fn remove_all(&self) -> Result<(), LoadError> {
        remove(&self.root)
    }
}

/// Network namespaces, by inode, that programs pinned below `directory` are attached to, whatever build pinned them.
///
/// # Errors
/// When the pins cannot be read (CAP_BPF).
pub fn attached_netns(directory: &Path) -> Result<Vec<u64>, LoadError> {
    let mut inodes = Vec::new();
    for layout in list_or_none(directory)? {
        for pin in list_or_none(&layout.join("netns"))? {
            let opening = |source| LoadError::io(format!("opening {}", pin.display()), source);
            let Some(link) = open_pin(&pin).map_err(opening)? else { continue };
            inodes.extend(link_info(link.as_fd()).map_err(opening)?.netns().map(u64::from));
        }
    }
    Ok(inodes)
}

/// Takes away everything pinned below `directory`, and with it all that it captures. New connections then go direct.
///
/// # Errors
/// A pin that cannot be removed.
pub fn remove_pins(directory: &Path) -> Result<(), LoadError> {
    if !directory.exists() {
        return Ok(());
    }
    if !stands_on(directory, BPF_FS_MAGIC)? {
        return Err(LoadError::NotBpffs { path: directory.to_owned() });
    }
    list(directory)?.iter().try_for_each(|path| remove(path))?;
    // It stays where it is a mount of its own.
    let _ = fs::remove_dir(directory);
    Ok(())
}

fn list_or_none(directory: &Path) -> Result<Vec<PathBuf>, LoadError> {
    if directory.is_dir() { list(directory) } else { Ok(Vec::new()) }
}

/// What a build with another layout pinned. Of its maps only one is touched, and of that one only the keys, which are
/// the same in all versions (see [`ebpf_abi::VERSION`]).
pub(crate) struct Layout {
    enrolled: Option<OwnedFd>,
    /// Netns it has a pin for, alive when this was read.
    pub(crate) netns: Vec<NetnsCookie>,
}

impl Layout {
    fn open(root: &Path) -> Result<Layout, LoadError> {
        let path = root.join("maps/ENROLLED");
        let enrolled =
            open_pin(&path).map_err(|source| LoadError::io(format!("opening {}", path.display()), source))?;
        let cookie = |pin: &PathBuf| {
            let link = open_pin(pin).ok()??;
            link_info(link.as_fd()).ok()?.netns()?;
            pin.file_name()?.to_str()?.parse().ok().map(NetnsCookie)
        };
        let pins = root.join("netns");
        let netns = if pins.is_dir() { list(&pins)?.iter().filter_map(cookie).collect() } else { Vec::new() };
        Ok(Layout { enrolled, netns })
    }

    /// Ends what that build decides for a netns, which this one captures now.
    pub(crate) fn release(&self, cookie: NetnsCookie) -> Result<(), LoadError> {
        let Some(map) = &self.enrolled else { return Ok(()) };
        delete_by_cookie(map.as_fd(), cookie)
            .map_err(|source| LoadError::io("releasing a netns from a build with another layout", source))
    }
}

/// Removes one pin; fine when there is none.
pub(crate) fn unpin(path: &Path) -> Result<(), LoadError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != ErrorKind::NotFound => {
            Err(LoadError::io(format!("removing {}", path.display()), source))
        }
        _ => Ok(()),
    }
}

/// Makes `directory` on a BPF filesystem, mounting one there unless it already stands on one.
///
/// # Errors
/// When the directory cannot be made or the mount is refused (CAP_SYS_ADMIN).
pub fn ensure_bpffs(directory: &Path) -> Result<(), LoadError> {
    if stands_on(directory, BPF_FS_MAGIC)? {
        return make_directory(directory);
    }
    make_directory(directory)?;
    mount(Some("bpf"), directory, Some("bpf"), MsFlags::empty(), None::<&str>)
        .map_err(|source| LoadError::io(format!("mounting a BPF filesystem at {}", directory.display()), source.into()))
}

/// Fails unless `path` is a directory of a cgroup2 hierarchy.
pub(crate) fn check_cgroup2(path: &Path) -> Result<(), LoadError> {
    if path.is_dir() && stands_on(path, CGROUP2_SUPER_MAGIC)? {
        Ok(())
    } else {
        Err(LoadError::NotCgroup2 { path: path.to_owned() })
    }
}

/// Is the path, or what of it exists, on a filesystem of that kind?
fn stands_on(path: &Path, kind: FsType) -> Result<bool, LoadError> {
    for existing in path.ancestors() {
        let existing = if existing.as_os_str().is_empty() { Path::new(".") } else { existing };
        match statfs(existing) {
            Ok(found) => return Ok(found.filesystem_type() == kind),
            Err(nix::Error::ENOENT) => {}
            Err(source) => return Err(LoadError::io(format!("examining {}", existing.display()), source.into())),
        }
    }
    Ok(false)
}

fn make_directory(path: &Path) -> Result<(), LoadError> {
    fs::create_dir_all(path).map_err(|source| LoadError::io(format!("creating {}", path.display()), source))
}

fn list(directory: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let entries: io::Result<Vec<_>> =
        fs::read_dir(directory).and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect());
    entries.map_err(|source| LoadError::io(format!("listing {}", directory.display()), source))
}

fn remove(path: &Path) -> Result<(), LoadError> {
    if path.is_dir() {
        for entry in list(path)? {
            remove(&entry)?;
        }
        fs::remove_dir(path).map_err(|source| LoadError::io(format!("removing {}", path.display()), source))
    } else {
        unpin(path)
    }
}
