//! The kernel side of capture, in the words of this crate: what a pod wants is turned into what `ebpf-loader` takes.

use std::path::Path;
use std::sync::Arc;

use ebpf_loader::{Capture, LoadError, PodCapture, Prefix};
use ipnet::IpNet;

use crate::config::Config;
use crate::node::enrolment::{Dns, Enrolment, Failure, Inbound};

pub use ebpf_loader::{NetnsCookie, Phase, Slot};

/// Loads the programs, or takes over those of a predecessor, and sets what no pod's connections are captured for.
///
/// # Errors
/// What is missing on this machine, by name: programs, capability, cgroup2, bpffs, kernel version.
pub fn open(config: &Config) -> Result<Arc<Capture>, LoadError> {
    // What a container mounts for itself goes with it, and with that all pins: the node must have it, or this fails.
    if !has_own_mounts(&config.proc_root) {
        ebpf_loader::ensure_bpffs(&config.bpffs_dir)?;
    }
    let capture = Capture::open(&config.bpffs_dir, &config.cgroup_root)?;
    let prefixes: Vec<Prefix> = config.excluded_destinations.iter().filter_map(prefix).collect();
    capture.set_global_exclusions(&prefixes)?;
    if config.dns_capture {
        capture.capture_dns()?;
    }
    Ok(Arc::new(capture))
}

/// Is what this process mounts seen by itself alone?
fn has_own_mounts(proc_root: &Path) -> bool {
    let node = std::fs::read_link(proc_root.join("1/ns/mnt"));
    node.is_ok_and(|node| std::fs::read_link("/proc/self/ns/mnt").is_ok_and(|own| own != node))
}

/// How much of a pod's traffic is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// What the pod sends, and HBONE to it, but not yet plaintext to it: peers that have not heard that the pod speaks
    /// HBONE would be refused by a policy that demands it.
    NotPlaintext,
    Full,
}

/// Is the pod's DNS to be captured? With failure mode "open" it is not: which sockets are marked is decided when they are
/// made, so with ztunnel gone their packets could not go direct any more, and without names nothing else could either.
#[must_use]
pub fn captures_dns(enrolment: &Enrolment, enabled: bool) -> bool {
    enabled && enrolment.dns == Dns::Capture && enrolment.failure == Failure::Closed
}

/// The kernel's view of a pod; `dns` as [`captures_dns`] says, `ports` as `EXCLUDED_PORTS` does for all pods.
#[must_use]
pub fn pod_capture(enrolment: &Enrolment, reach: Reach, dns: bool, ports: &[u16]) -> PodCapture {
    PodCapture {
        addresses: enrolment.addresses.clone(),
        failure: match enrolment.failure {
            Failure::Closed => ebpf_loader::FailureMode::Closed,
            Failure::Open => ebpf_loader::FailureMode::Open,
        },
        inbound: match (enrolment.inbound, reach) {
            (Inbound::Capture, Reach::Full) => ebpf_loader::Inbound::Capture,
            (Inbound::Bypass, _) | (_, Reach::NotPlaintext) => ebpf_loader::Inbound::Bypass,
        },
        dns: if dns { ebpf_loader::Dns::Capture } else { ebpf_loader::Dns::Direct },
        probe_ports: enrolment.probe_ports.clone(),
        excluded: enrolment.excluded.iter().filter_map(prefix).collect(),
        excluded_ports_to: enrolment.excluded_ports_to.iter().chain(ports).copied().collect(),
        excluded_ports_at: enrolment.excluded_ports_at.clone(),
    }
}

fn prefix(net: &IpNet) -> Option<Prefix> {
    Prefix::new(net.network(), net.prefix_len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dns_is_captured_only_where_it_may_fail_closed() {
        let pod = |dns, failure| Enrolment {
            uid: "u".into(),
            name: "p".into(),
            namespace: "n".into(),
            service_account: "s".into(),
            workload_uid: "w".into(),
            addresses: Vec::new(),
            failure,
            inbound: Inbound::Capture,
            dns,
            probe_ports: Vec::new(),
            epoch: 0,
            excluded: Vec::new(),
            excluded_ports_to: Vec::new(),
            excluded_ports_at: Vec::new(),
        };
        assert!(captures_dns(&pod(Dns::Capture, Failure::Closed), true));
        assert!(!captures_dns(&pod(Dns::Capture, Failure::Closed), false));
        assert!(!captures_dns(&pod(Dns::Direct, Failure::Closed), true));
        assert!(!captures_dns(&pod(Dns::Capture, Failure::Open), true));
    }
}
