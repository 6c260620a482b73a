//! What this process may do, checked once at start: a missing capability shall be named before a pod depends on it.

use std::fmt;
use std::fs;
use std::io;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::config::Config;

/// 250 pods with their listeners, and some thousand connections.
const FEW_FILES: u64 = 16_384;

/// What is needed in one namespace, our own.
const DEDICATED: [Capability; 3] = [
    ("CAP_BPF", 39, "load the capture programs"),
    ("CAP_NET_ADMIN", 12, "attach them, set rules, routes and socket marks"),
    ("CAP_NET_RAW", 13, "answer DNS in the name of the server that was asked"),
];

/// Where nothing is captured.
const UNCAPTURED: [Capability; 1] = [("CAP_NET_ADMIN", 12, "set socket marks")];

/// A capability ztunnel needs, its bit in `CapEff`, and what for.
type Capability = (&'static str, u32, &'static str);

/// Whoever captures.
const ALWAYS: [Capability; 3] = [
    ("CAP_NET_ADMIN", 12, "set socket marks, rules and routes in pods"),
    ("CAP_SYS_ADMIN", 21, "enter pods' network namespaces"),
    ("CAP_NET_RAW", 13, "open transparent sockets"),
];
/// Where that is ztunnel.
const CAPTURE: [Capability; 2] =
    [("CAP_BPF", 39, "load the capture programs"), ("CAP_SYS_PTRACE", 19, "find pods' network namespaces under /proc")];

/// The capabilities this process lacks.
#[derive(Debug, PartialEq, Eq)]
pub struct Missing(Vec<(&'static str, &'static str)>);

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "missing capabilities:")?;
        for (name, purpose) in &self.0 {
            write!(f, "\n  - {name} to {purpose}")?;
        }
        write!(f, "\nrun as root, or add them under securityContext.capabilities.add of the ztunnel container")
    }
}

impl std::error::Error for Missing {}

/// Looks at this process' effective capabilities. With an agent that hands pods over and captures them, few are needed.
///
/// # Errors
/// The ones that are missing, all of them.
pub fn check(config: &Config) -> anyhow::Result<()> {
    let status = fs::read_to_string("/proc/self/status")?;
    let capabilities = effective(&status).ok_or_else(|| io::Error::other("no CapEff in /proc/self/status"))?;
    let needed = if config.mode.is_capture_off() {
        UNCAPTURED.to_vec()
    } else {
        needed(config.mode.dedicated().is_some(), config.agent.is_some())
    };
    Ok(check_status(capabilities, &needed)?)
}

fn needed(dedicated: bool, agent: bool) -> Vec<Capability> {
    match (dedicated, agent) {
        (true, _) => DEDICATED.to_vec(),
        (false, true) => ALWAYS.to_vec(),
        (false, false) => [&ALWAYS[..], &CAPTURE].concat(),
    }
}

/// Lifts the limit of open files as far as this process may: each pod takes a dozen and each connection two, and what
/// systemd and shells hand out is meant for programs that call `select`.
pub fn lift_file_limit() {
    let lifted = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most).map(|()| most));
    match lifted {
        Ok(files) if files < FEW_FILES => tracing::warn!(files, "the limit of open files is low for a node proxy"),
        Ok(_) => {}
        Err(error) => tracing::warn!(%error, "lifting the limit of open files"),
    }
}

fn effective(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|l| l.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

fn check_status(capabilities: u64, needed: &[Capability]) -> Result<(), Missing> {
    let missing: Vec<_> = needed
        .iter()
        .filter(|(_, bit, _)| capabilities & (1 << bit) == 0)
        .map(|(name, _, purpose)| (*name, *purpose))
        .collect();
    if missing.is_empty() { Ok(()) } else { Err(Missing(missing)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_every_missing_capability_and_the_cure() {
        let all = effective("Name:\tx\nCapEff:\t000001ffffffffff\n").unwrap();
        let shared = needed(false, false);
        assert_eq!(check_status(all, &shared), Ok(()));
        let some = all & !(1 << 39) & !(1 << 19);
        let text = check_status(some, &shared).unwrap_err().to_string();
        assert!(
            text.contains("CAP_BPF") && text.contains("CAP_SYS_PTRACE") && text.contains("securityContext"),
            "{text}"
        );
        assert!(!text.contains("CAP_NET_RAW"), "{text}");
        let text = check_status(some, &needed(true, false)).unwrap_err().to_string();
        assert!(text.contains("CAP_BPF") && !text.contains("CAP_SYS_PTRACE"), "no other process is looked at: {text}");
        let chart = (1 << 12) | (1 << 21) | (1 << 13);
        assert_eq!(check_status(chart, &needed(false, true)), Ok(()), "what Istio's chart gives");
    }
}
