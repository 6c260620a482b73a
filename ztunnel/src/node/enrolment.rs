//! Which pods this node's ztunnel shall capture: the control plane's words, checked once and kept as a set.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use mesh::xds::{Rejected, ResourceHandler, typed_handler};
use mesh_proto::enrolment::{self as wire, POD_ENROLMENT_TYPE};
use thiserror::Error;
use tokio::sync::watch;

/// A pod that shall be in the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Enrolment {
    /// `metadata.uid` of the pod; finds its namespace.
    pub uid: String,
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub service_account: Arc<str>,
    /// Name of its Workload resource.
    pub workload_uid: Arc<str>,
    /// Empty until the pod has an address; nothing is captured before.
    pub addresses: Vec<IpAddr>,
    pub failure: Failure,
    pub inbound: Inbound,
    pub dns: Dns,
    pub excluded: Vec<IpNet>,
    /// TCP ports: of destinations the pod reaches directly, and of its own where plaintext is not captured.
    pub excluded_ports_to: Vec<u16>,
    pub excluded_ports_at: Vec<u16>,
    /// Where the kubelet calls the pod.
    pub probe_ports: Vec<u16>,
    /// Which stay of the pod in the mesh this is; repeated in reports and nothing else.
    pub epoch: u64,
}

/// What happens to the pod's new connections while no ztunnel is alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    Closed,
    Open,
}

/// Whether plaintext to the pod is captured. HBONE always is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inbound {
    Capture,
    Bypass,
}

/// Whether the pod's DNS is captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dns {
    Capture,
    Direct,
}

/// Why a resource of the control plane is not usable.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BadEnrolment {
    #[error("{0} is empty")]
    Empty(&'static str),
    #[error("an address has {0} bytes; 4 or 16 are possible")]
    Address(usize),
    #[error("an excluded destination has prefix length {0}, which its family does not have")]
    PrefixLength(u32),
    #[error("port {0} is none")]
    Port(u32),
    #[error("failure mode {0} is not known")]
    FailureMode(i32),
    #[error("uid {0:?} has characters no Kubernetes UID has")]
    Uid(String),
}

impl TryFrom<wire::PodEnrolment> for Enrolment {
    type Error = BadEnrolment;

    fn try_from(pod: wire::PodEnrolment) -> Result<Self, BadEnrolment> {
        for (field, value) in [
            ("uid", &pod.uid),
            ("name", &pod.name),
            ("namespace", &pod.namespace),
            ("service_account", &pod.service_account),
            ("workload_uid", &pod.workload_uid),
        ] {
            if value.is_empty() {
                return Err(BadEnrolment::Empty(field));
            }
        }
        if !pod.uid.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
            return Err(BadEnrolment::Uid(pod.uid));
        }
        let options = pod.capture.unwrap_or_default();
        let failure = match wire::FailureMode::try_from(options.failure_mode) {
            Ok(wire::FailureMode::Closed) => Failure::Closed,
            Ok(wire::FailureMode::Open) => Failure::Open,
            Err(_) => return Err(BadEnrolment::FailureMode(options.failure_mode)),
        };
        Ok(Self {
            uid: pod.uid,
            name: pod.name.into(),
            namespace: pod.namespace.into(),
            service_account: pod.service_account.into(),
            workload_uid: pod.workload_uid.into(),
            addresses: pod.addresses.iter().map(|a| address(a)).collect::<Result<_, _>>()?,
            failure,
            inbound: if options.bypass_inbound { Inbound::Bypass } else { Inbound::Capture },
            dns: if options.dns { Dns::Capture } else { Dns::Direct },
            excluded: options
                .excluded_destinations
                .iter()
                .map(|p| {
                    let bad = || BadEnrolment::PrefixLength(p.length);
                    let length = u8::try_from(p.length).map_err(|_| bad())?;
                    IpNet::new(address(&p.address)?, length).map(|n| n.trunc()).map_err(|_| bad())
                })
                .collect::<Result<_, _>>()?,
            excluded_ports_to: ports(options.excluded_outbound_ports)?,
            excluded_ports_at: ports(options.excluded_inbound_ports)?,
            probe_ports: ports(pod.probe_ports)?,
            epoch: pod.epoch,
        })
    }
}

fn ports(numbers: Vec<u32>) -> Result<Vec<u16>, BadEnrolment> {
    let port = |n| u16::try_from(n).ok().filter(|port| *port > 0).ok_or(BadEnrolment::Port(n));
    numbers.into_iter().map(port).collect()
}

fn address(bytes: &[u8]) -> Result<IpAddr, BadEnrolment> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(v4.into());
    }
    <[u8; 16]>::try_from(bytes).map(IpAddr::from).map_err(|_| BadEnrolment::Address(bytes.len()))
}

/// The set of pods to enrol.
#[derive(Debug, Clone, Default)]
pub struct Desired {
    pub pods: BTreeMap<String, Enrolment>,
    /// The source has said all it knows at least once; before that an absent pod means nothing.
    pub complete: bool,
}

/// A handler for the resource type, and the set it keeps.
#[must_use]
pub fn handler() -> (Arc<dyn ResourceHandler>, watch::Receiver<Desired>) {
    let (publish, desired) = watch::channel(Desired::default());
    let handler = typed_handler(POD_ENROLMENT_TYPE, move |updated: Vec<(String, wire::PodEnrolment)>, removed| {
        let mut rejected = Vec::new();
        publish.send_modify(|desired| {
            for name in removed {
                desired.pods.remove(&name);
            }
            for (name, pod) in updated {
                match Enrolment::try_from(pod) {
                    Ok(pod) if pod.uid == name => {
                        desired.pods.insert(name, pod);
                    }
                    Ok(pod) => {
                        let reason = format!("names pod {}", pod.uid);
                        rejected.push(Rejected { name, reason });
                    }
                    Err(bad) => rejected.push(Rejected { name, reason: bad.to_string() }),
                }
            }
            desired.complete = true;
        });
        rejected
    });
    (handler, desired)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire_pod() -> wire::PodEnrolment {
        wire::PodEnrolment {
            uid: "u-1".into(),
            name: "client".into(),
            namespace: "shop".into(),
            service_account: "client".into(),
            addresses: vec![vec![10, 0, 0, 1].into()],
            workload_uid: "Kubernetes//Pod/shop/client".into(),
            capture: Some(wire::CaptureOptions {
                excluded_destinations: vec![wire::Prefix { address: vec![10, 9, 9, 9].into(), length: 16 }],
                excluded_outbound_ports: vec![5432],
                excluded_inbound_ports: vec![9090],
                ..Default::default()
            }),
            probe_ports: vec![8080],
            epoch: 7,
        }
    }

    #[test]
    fn takes_what_the_control_plane_sends() {
        let pod = Enrolment::try_from(wire_pod()).unwrap();
        assert_eq!(pod.addresses, vec!["10.0.0.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(pod.excluded, vec!["10.9.0.0/16".parse::<IpNet>().unwrap()]);
        assert_eq!((pod.excluded_ports_to, pod.excluded_ports_at), (vec![5432], vec![9090]));
        assert_eq!((&*pod.probe_ports, pod.epoch), (&[8080][..], 7));
        assert_eq!((pod.failure, pod.inbound, pod.dns), (Failure::Closed, Inbound::Capture, Dns::Direct));
        let mut dns = wire_pod();
        dns.capture.as_mut().unwrap().dns = true;
        assert_eq!(Enrolment::try_from(dns).unwrap().dns, Dns::Capture);
    }

    #[test]
    fn refuses_what_it_cannot_keep() {
        let bad = |change: fn(&mut wire::PodEnrolment)| {
            let mut pod = wire_pod();
            change(&mut pod);
            Enrolment::try_from(pod).unwrap_err()
        };
        assert_eq!(bad(|p| p.uid.clear()), BadEnrolment::Empty("uid"));
        assert_eq!(bad(|p| p.uid = "../x".into()), BadEnrolment::Uid("../x".into()));
        assert_eq!(bad(|p| p.probe_ports = vec![80, 65_536]), BadEnrolment::Port(65_536));
        let none = |p: &mut wire::PodEnrolment| p.capture.as_mut().unwrap().excluded_inbound_ports = vec![0];
        assert_eq!(bad(none), BadEnrolment::Port(0));
        assert_eq!(bad(|p| p.addresses = vec![vec![1, 2, 3].into()]), BadEnrolment::Address(3));
        assert_eq!(bad(|p| p.capture.as_mut().unwrap().failure_mode = 9), BadEnrolment::FailureMode(9));
        assert_eq!(
            bad(|p| p.capture.as_mut().unwrap().excluded_destinations[0].length = 33),
            BadEnrolment::PrefixLength(33)
        );
    }
}
