//! The node's own network namespace, where the kubelet lives, and the addresses its probes come from.
//!
//! The connect hook binds a probe to them, which fails unless they are local there. They are on `lo`, because nothing
//! else of the node is ours, and in a scope that no other connection takes its source from.

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::path::Path;

use ebpf_loader::abi::{PROBE_SOURCE4, PROBE_SOURCE6};
use nix::sys::stat::fstat;

use super::netns::Netns;
use super::routing::{Link, RoutingError};

/// The namespace, and whether it has the addresses.
#[derive(Debug)]
pub struct Host {
    /// `None` where no kubelet's probes are told apart.
    netns: Option<Netns>,
    state: Addresses,
}

/// What is known of the addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Addresses {
    /// A predecessor may have left them.
    Unknown,
    Present,
    Absent,
    /// Tried in vain, and told.
    Refused,
}

impl Host {
    /// # Errors
    /// When the file cannot be opened: not there, or not allowed (CAP_SYS_PTRACE, hostPID).
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let inode = fstat(&file)?.st_ino;
        Ok(Self { netns: Some(Netns::new(file.into(), inode)?), state: Addresses::Unknown })
    }

    /// For a ztunnel that knows no namespace but its own.
    #[must_use]
    pub const fn none() -> Self {
        Self { netns: None, state: Addresses::Absent }
    }

    #[must_use]
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        self.netns.as_ref().map(Netns::file)
    }

    #[must_use]
    pub fn inode(&self) -> Option<u64> {
        self.netns.as_ref().map(Netns::inode)
    }

    /// What is known may no longer be true: the next call looks.
    pub fn doubt(&mut self) {
        if self.state != Addresses::Refused {
            self.state = Addresses::Unknown;
        }
    }

    /// Adds the addresses where they are missing. Without them probes are ordinary traffic, so a failure is told once
    /// and nothing else waits for it.
    pub async fn add_addresses(&mut self, ipv6: bool) {
        if matches!(self.state, Addresses::Present) {
            return;
        }
        let mut state = Addresses::Present;
        for address in sources(ipv6) {
            if let Err(error) = self.add(address).await {
                if self.state != Addresses::Refused {
                    tracing::warn!(%address, %error, "the kubelet's probes of pods will be judged by policy");
                }
                state = Addresses::Refused;
            }
        }
        self.state = state;
    }

    /// Takes the addresses away; fine when they are not there. Both are tried, and only once.
    ///
    /// # Errors
    /// The first that the kernel refused.
    pub async fn remove_addresses(&mut self) -> Result<(), RoutingError> {
        let mut outcome = Ok(());
        if self.state != Addresses::Absent {
            for address in sources(true) {
                outcome = outcome.and(self.remove(address).await);
            }
            self.state = Addresses::Absent;
        }
        outcome
    }

    async fn add(&self, address: IpAddr) -> Result<(), RoutingError> {
        let Some(netns) = &self.netns else { return Ok(()) };
        Link::open(netns)?.add_probe_source(address).await
    }

    async fn remove(&self, address: IpAddr) -> Result<(), RoutingError> {
        let Some(netns) = &self.netns else { return Ok(()) };
        Link::open(netns)?.remove_probe_source(address).await
    }
}

fn sources(ipv6: bool) -> impl Iterator<Item = IpAddr> {
    [IpAddr::from(PROBE_SOURCE4)].into_iter().chain(ipv6.then(|| IpAddr::from(PROBE_SOURCE6)))
}
