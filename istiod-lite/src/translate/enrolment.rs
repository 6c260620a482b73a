//! Which pods their node's proxy captures, as resources for that node alone.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use mesh_proto::enrolment::{CaptureOptions, FailureMode, PodEnrolment, Prefix};

use super::address_bytes;
use super::world::World;
use crate::enrol::{self, rules};
use crate::resources::{Audience, Resource};
use crate::types::{Pod, annotation, flag};

/// `open`: while no node proxy is alive the pod's connections go out uncaptured. Anything else is closed.
pub const FAILURE_MODE: &str = "ambient.istio.io/capture-failure-mode";
pub const BYPASS_INBOUND: &str = "ambient.istio.io/bypass-inbound-capture";
/// `false`: the pod asks its DNS servers itself. Anything else is the default, captured.
pub const DNS_CAPTURE: &str = "ambient.istio.io/dns-capture";

/// What a pod's own connections, or plaintext to it, are not captured for; Istio's names. A value that cannot be read
/// excludes nothing: see [`unreadable`].
const EXCLUDE_TO_PREFIXES: &str = "traffic.sidecar.istio.io/excludeOutboundIPRanges";
const EXCLUDE_TO_PORTS: &str = "traffic.sidecar.istio.io/excludeOutboundPorts";
const EXCLUDE_AT_PORTS: &str = "traffic.sidecar.istio.io/excludeInboundPorts";

/// The UID and the node of a pod that its node is told of: `None` for pods outside the mesh and those that no node has been
/// chosen for. A pod that leaves keeps its enrolment while peers may still speak HBONE to it.
fn placed<'a>(world: &World, pod: &'a Pod) -> Option<(&'a Arc<str>, &'a str)> {
    let uid = pod.uid.as_ref()?;
    let node = pod.node()?;
    let held = annotation(pod, enrol::REDIRECTION).is_some() || world.leaving.contains(&**uid);
    let enrolled = enrol::is_wanted(world, pod) || (held && rules::never(world, pod).is_none());
    enrolled.then_some((uid, node))
}

/// The name of what [`translate`] comes to.
pub fn name<'a>(world: &World, pod: &'a Pod) -> Option<&'a Arc<str>> {
    placed(world, pod).map(|(uid, _)| uid)
}

/// What the pod's node is told.
pub fn translate(world: &World, pod: &Pod) -> Option<Resource> {
    let (uid, node) = placed(world, pod)?;
    let key = &pod.key;
    let failure_mode = match annotation(pod, FAILURE_MODE) {
        Some("open") => FailureMode::Open,
        _ => FailureMode::Closed,
    };
    let own = PodEnrolment {
        name: key.name.to_string(),
        addresses: pod.running_addresses().into_iter().flatten().copied().map(address_bytes).collect(),
        workload_uid: world.pod_uid(key),
        epoch: world.epochs.get(&**uid).copied().unwrap_or_default(),
        ..PodEnrolment::default()
    };
    let common = PodEnrolment {
        namespace: key.namespace.to_string(),
        service_account: pod.template.service_account.clone(),
        capture: Some(CaptureOptions {
            failure_mode: failure_mode.into(),
            bypass_inbound: flag(pod, BYPASS_INBOUND) == Ok(Some(true)),
            excluded_destinations: prefixes(pod).unwrap_or_default(),
            dns: flag(pod, DNS_CAPTURE) != Ok(Some(false)),
            excluded_outbound_ports: ports(pod, EXCLUDE_TO_PORTS).unwrap_or_default(),
            excluded_inbound_ports: ports(pod, EXCLUDE_AT_PORTS).unwrap_or_default(),
        }),
        probe_ports: probe_ports(pod).into_iter().map(u32::from).collect(),
        ..PodEnrolment::default()
    };
    Some(Resource::enrolment(Arc::clone(uid), &own, &common).for_audience(vec![Audience::Node(node.into())]))
}

/// What is wrong with the pod's annotations about exclusions, one line each. Such a pod is captured as if it had none.
pub fn unreadable(pod: &Pod) -> Vec<String> {
    let ports = [EXCLUDE_TO_PORTS, EXCLUDE_AT_PORTS].map(|name| ports(pod, name).err());
    ports.into_iter().chain([prefixes(pod).err()]).flatten().collect()
}

fn ports(pod: &Pod, name: &str) -> Result<Vec<u32>, String> {
    let port = |item: &str| item.parse::<u16>().ok().filter(|port| *port > 0).map(u32::from);
    let ports: BTreeSet<u32> = items(pod, name, "a port", port)?.into_iter().collect();
    Ok(ports.into_iter().collect())
}

fn prefixes(pod: &Pod) -> Result<Vec<Prefix>, String> {
    items(pod, EXCLUDE_TO_PREFIXES, "an address prefix such as 10.0.0.0/8", |item| {
        let net = item.parse::<IpNet>().or_else(|_| item.parse::<IpAddr>().map(IpNet::from)).ok()?.trunc();
        Some(Prefix { address: address_bytes(net.addr()), length: net.prefix_len().into() })
    })
}

/// The items of a list in an annotation: all of them, or why it is not read.
fn items<T>(pod: &Pod, name: &str, what: &str, read: impl Fn(&str) -> Option<T>) -> Result<Vec<T>, String> {
    let text = annotation(pod, name).unwrap_or_default();
    let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
    items.map(|item| read(item).ok_or_else(|| format!("{name}: {item:?} is not {what}"))).collect()
}

/// Where the kubelet calls the pod by TCP: probes and lifecycle hooks of its containers. A probe that calls another host
/// says nothing about the pod's port.
fn probe_ports(pod: &Pod) -> BTreeSet<u16> {
    let addresses = pod.running_addresses().unwrap_or_default();
    let here = |host: &String| host.parse().is_ok_and(|ip| addresses.contains(&ip));
    let calls = pod.template.calls.iter().filter(|call| call.host.as_ref().is_none_or(here));
    calls.map(|call| call.port).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, value: &str) -> Pod {
        let mut pod = k8s_openapi::api::core::v1::Pod::default();
        pod.metadata.annotations = Some([(name.to_owned(), value.to_owned())].into());
        Pod::new(pod)
    }

    #[test]
    fn says_which_exclusion_is_not_read() {
        let told = unreadable(&pod(EXCLUDE_TO_PORTS, "22,ssh"));
        assert_eq!(told, [r#"traffic.sidecar.istio.io/excludeOutboundPorts: "ssh" is not a port"#]);
        assert_eq!(unreadable(&pod(EXCLUDE_AT_PORTS, "65536")).len(), 1);
        assert_eq!(unreadable(&pod(EXCLUDE_TO_PREFIXES, "10.0.0.0/33")).len(), 1);
        for fine in ["", " ", "22", "22, 23,"] {
            assert!(unreadable(&pod(EXCLUDE_TO_PORTS, fine)).is_empty(), "{fine:?}");
        }
    }
}
