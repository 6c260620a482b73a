//! Why capture cannot be set up, and what the operator can do about it.

use std::{io, path::PathBuf};

use aya::{
    EbpfError,
    maps::MapError,
    programs::{ProgramError, links::LinkError},
};

use crate::kernel;

/// What went wrong. Each message says what was attempted and what to look at.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    #[error("this binary was built without the eBPF programs; run `cargo xtask bpf` and build again")]
    NoPrograms,
    #[error("capture needs {}; add them to securityContext.capabilities or run as root", missing.join(", "))]
    MissingCapabilities { missing: Vec<&'static str> },
    #[error(
        "{what}: not permitted although the capabilities are there; eBPF works in the initial user namespace only, and \
         a seccomp profile or a kernel lockdown may forbid bpf(2)"
    )]
    NotPermitted { what: String, source: io::Error },
    #[error(
        "{} is not the root of a cgroup2 hierarchy; mount the host's there or set CGROUP_ROOT (/sys/fs/cgroup, on \
         hybrid hosts /sys/fs/cgroup/unified)",
        path.display()
    )]
    NotCgroup2 { path: PathBuf },
    #[error(
        "{} is not on a BPF filesystem; mount the host's /sys/fs/bpf there (`mount -t bpf bpf /sys/fs/bpf`) or set \
         BPFFS_DIR",
        path.display()
    )]
    NotBpffs { path: PathBuf },
    #[error("the kernel is {found}; capture needs {} or later (bpf_set_retval in connect hooks)", kernel::MINIMUM)]
    KernelTooOld { found: String, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("{} was pinned by a build with another layout; stop it and remove the directory above", path.display())]
    IncompatiblePins { path: PathBuf },
    #[error("eBPF program {program}: {source}")]
    Program { program: String, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("eBPF map {map}: {source}")]
    Map { map: &'static str, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("eBPF map {map} is full ({entries} entries)")]
    MapFull { map: &'static str, entries: u32 },
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
}

impl LoadError {
    /// Capabilities are checked before anything is tried, so a refusal here has another cause.
    pub(crate) fn io(what: impl Into<String>, source: io::Error) -> Self {
        let what = what.into();
        if source.raw_os_error() == Some(libc::EPERM) {
            LoadError::NotPermitted { what, source }
        } else {
            LoadError::Io { what, source }
        }
    }

    pub(crate) fn object(source: EbpfError) -> Self {
        Self::rejected("object", source)
    }

    pub(crate) fn program(program: &str, source: ProgramError) -> Self {
        Self::rejected(program, source)
    }

    pub(crate) fn link(program: &str, source: LinkError) -> Self {
        Self::rejected(program, source)
    }

    /// On an old kernel a rejected program is a missing feature, whatever the verifier's own words for it.
    pub(crate) fn rejected(program: &str, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        let errno = errno(&source);
        if errno == Some(libc::EPERM) {
            return LoadError::NotPermitted {
                what: format!("loading eBPF program {program}"),
                source: io::Error::from_raw_os_error(libc::EPERM),
            };
        }
        match kernel::too_old() {
            Some(found) => LoadError::KernelTooOld { found, source: Box::new(source) },
            None => LoadError::Program { program: program.to_owned(), source: Box::new(source) },
        }
    }

    pub(crate) fn map(map: &'static str, entries: u32, source: MapError) -> Self {
        match errno(&source) {
            Some(libc::E2BIG | libc::ENOSPC) => LoadError::MapFull { map, entries },
            _ => LoadError::Map { map, source: Box::new(source) },
        }
    }
}

/// The system error at the bottom of an error, if there is one.
fn errno(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
    let mut current = Some(error);
    while let Some(error) = current {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return io.raw_os_error();
        }
        current = error.source();
    }
    None
}
