//! Pods, and endpoints that are not pods, as the mesh's workloads.

use std::collections::BTreeMap;
use std::net::IpAddr;

use mesh_proto::workload::{
    Address, Locality, NetworkMode, Port, PortList, TunnelProtocol, Workload, WorkloadStatus, WorkloadType, address,
};

use super::binding::{self, Binding, TrafficType};
use super::networks;
use super::service::{app_protocol, port_number};
use super::service_entry::services_selecting_pod;
use super::world::{View, World};
use super::{address_bytes, address_resource};
use crate::enrol;
use crate::resources::Resource;
use crate::types::{
    self, AddressType, Key, Labels, Meta, Pod, Service, ServicePort, Slice, TargetPort, annotation, label,
};

/// The label by which a pod says that it answers HBONE itself.
pub const NATIVE_TUNNEL: &str = "networking.istio.io/tunnel";

/// Does the workload have a proxy of its own that answers HBONE?
pub fn has_native_tunnel(meta: &dyn Meta) -> bool {
    label(meta, NATIVE_TUNNEL) == Some("http")
}

/// The name of what [`from_pod`] comes to.
pub fn name(world: &World, pod: &Pod) -> Option<String> {
    pod.running_addresses().map(|_| world.pod_uid(&pod.key))
}

/// The pod's workload and binding. `None` while it has no address and once it has ended.
pub fn from_pod(view: View<'_>, pod: &Pod, policies: Vec<String>) -> Option<(Resource, Binding)> {
    let world = view.world;
    let addresses = pod.running_addresses()?;
    let (key, template) = (&pod.key, &pod.template);
    let native_tunnel = has_native_tunnel(pod);
    let captured = annotation(pod, enrol::REDIRECTION) == Some("enabled");
    let binding = binding::resolve(world, pod, TrafficType::Workload);
    let workload_name = pod.workload_name().to_owned();
    let network = networks::of_pod(world, pod);
    let first = |keys: &[&str]| keys.iter().find_map(|key| label(pod, key)).map(str::to_owned);
    let own = Workload {
        name: key.name.to_string(),
        addresses: addresses.iter().copied().map(address_bytes).collect(),
        node: pod.node().unwrap_or_default().to_owned(),
        status: if pod.is_healthy() { WorkloadStatus::Healthy } else { WorkloadStatus::Unhealthy }.into(),
        locality: pod.node().and_then(|node| locality(world, node)),
        ..Workload::default()
    };
    let common = Workload {
        namespace: key.namespace.to_string(),
        network: network.to_owned(),
        network_gateway: (network != world.network()).then(|| view.networks.way(network)).flatten(),
        tunnel_protocol: if captured || native_tunnel { TunnelProtocol::Hbone } else { TunnelProtocol::None }.into(),
        trust_domain: elide(&world.mesh.trust_domain, "cluster.local"),
        service_account: elide(&template.service_account, "default"),
        waypoint: binding.address.as_deref().cloned(),
        canonical_name: first(&["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"])
            .unwrap_or_else(|| workload_name.clone()),
        canonical_revision: first(&["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"])
            .unwrap_or_else(|| "latest".into()),
        workload_type: WorkloadType::Pod.into(),
        workload_name,
        native_tunnel,
        authorization_policies: policies,
        cluster_id: world.mesh.cluster_id.clone(),
        services: services(view, pod),
        network_mode: if template.host_network { NetworkMode::HostNetwork } else { NetworkMode::Standard }.into(),
        ..Workload::default()
    };
    // Pods of the host network share the node's address; it names none of them.
    let aliases = if template.host_network { Vec::new() } else { aliases(network, addresses) };
    Some((Resource::workload(world.pod_uid(key), &own, &common).with_aliases(aliases), binding))
}

/// Endpoints of a Service without selector that are plain addresses.
pub fn from_slice<'a>(world: &'a World, service: &'a Service, slice: &'a Slice) -> impl Iterator<Item = Resource> + 'a {
    let addressed = has_no_selector(service) && slice.address_type != AddressType::Other;
    let (key, name) = (&slice.key, &service.key);
    slice
        .endpoints()
        .filter(move |endpoint| addressed && endpoint.pod.is_none())
        .flat_map(|endpoint| endpoint.addresses.iter().map(move |ip| (endpoint, *ip)))
        .map(move |(endpoint, ip)| {
            let uid = format!("{}/discovery.k8s.io/EndpointSlice/{key}/{ip}", world.mesh.cluster_id);
            let ports = slice_ports(service, slice);
            let message = Workload {
                uid: uid.clone(),
                name: key.name.to_string(),
                namespace: key.namespace.to_string(),
                addresses: vec![address_bytes(ip)],
                network: world.network().into(),
                trust_domain: elide(&world.mesh.trust_domain, "cluster.local"),
                canonical_name: name.name.to_string(),
                canonical_revision: "latest".into(),
                workload_type: WorkloadType::Pod.into(),
                workload_name: key.name.to_string(),
                status: if endpoint.is_ready { WorkloadStatus::Healthy } else { WorkloadStatus::Unhealthy }.into(),
                cluster_id: world.mesh.cluster_id.clone(),
                services: BTreeMap::from([(world.service_name(name), PortList { ports })]),
                network_mode: NetworkMode::HostNetwork.into(),
                ..Workload::default()
            };
            address_resource(uid, &Address { r#type: Some(address::Type::Workload(message)) }, Vec::new())
        })
}

/// The pod ports behind each of its services, by service port.
pub fn services(view: View<'_>, pod: &Pod) -> BTreeMap<String, PortList> {
    let (world, key) = (view.world, &pod.key);
    let mut services = BTreeMap::new();
    for (name, service) in view.services_in(&key.namespace) {
        let ports = match selector(service) {
            Some(selector) if selector.are_among(&pod.template.labels) => selected_ports(service, pod),
            Some(_) => continue,
            // A name, whatever slices say that are called so.
            None if service.is_external() => continue,
            None => {
                let mut slices = view.slices_of(name).filter(|slice| slice.pods().any(|pod| *pod == *key.name));
                let Some(slice) = slices.next() else { continue };
                slice_ports(service, slice)
            }
        };
        services.insert(world.service_name(name), PortList { ports });
    }
    services.extend(services_selecting_pod(view.entries, &key.namespace, &pod.template.labels));
    services
}

/// The Services that select a WorkloadEntry, with its ports behind each: those it names, else the Service's targets.
pub fn services_of_labels(
    view: View<'_>,
    namespace: &str,
    labels: &Labels,
    named: &BTreeMap<String, u16>,
) -> BTreeMap<String, PortList> {
    let selected = view
        .services_in(namespace)
        .filter(|(_, service)| selector(service).is_some_and(|wanted| wanted.are_among(labels)));
    let own = |name: &str| named.get(name).copied().map(i32::from);
    selected
        .map(|(key, service)| {
            let ports = tcp_ports(service).filter_map(|port| {
                let target = match (own(&port.name), &port.target) {
                    (Some(own), _) => own,
                    (None, TargetPort::Number(number)) => *number,
                    (None, TargetPort::Name(name)) => own(name)?,
                    (None, TargetPort::Same) => port.number,
                };
                resolved_port(port, target)
            });
            (view.world.service_name(key), PortList { ports: ports.collect() })
        })
        .collect()
}

pub fn selector(service: &Service) -> Option<&Labels> {
    let spec = service.spec.as_ref()?;
    (!spec.selector.is_empty() && !spec.is_external).then_some(&spec.selector)
}

pub fn has_no_selector(service: &Service) -> bool {
    selector(service).is_none() && !service.is_external()
}

fn tcp_ports(service: &Service) -> impl Iterator<Item = &ServicePort> {
    service.ports().iter().filter(|port| port.is_tcp)
}

fn selected_ports(service: &Service, pod: &Pod) -> Vec<Port> {
    tcp_ports(service)
        .filter_map(|port| {
            let target = match &port.target {
                TargetPort::Number(number) => *number,
                TargetPort::Name(name) => pod.port(name)?,
                TargetPort::Same => port.number,
            };
            resolved_port(port, target)
        })
        .collect()
}

fn resolved_port(port: &ServicePort, target: i32) -> Option<Port> {
    Some(Port {
        service_port: port_number(port.number)?,
        target_port: port_number(target)?,
        app_protocol: app_protocol(port).into(),
    })
}

/// Pairs a slice's ports with the Service's by name.
fn slice_ports(service: &Service, slice: &Slice) -> Vec<Port> {
    tcp_ports(service)
        .filter_map(|port| {
            let found = slice.ports.iter().find(|candidate| candidate.name == port.name && candidate.is_tcp)?;
            resolved_port(port, found.number?.into())
        })
        .collect()
}

/// Where a node says that it is.
fn locality(world: &World, node: &str) -> Option<Locality> {
    let types::Locality { region, zone, subzone } =
        types::Locality::clone(&world.nodes.get(&Key::new("", node))?.locality);
    let locality = Locality { region, zone, subzone };
    (locality != Locality::default()).then_some(locality)
}

fn aliases(network: &str, addresses: &[IpAddr]) -> Vec<String> {
    addresses.iter().map(|ip| format!("{network}/{ip}")).collect()
}

/// Values that the reader assumes are not sent.
pub fn elide(value: &str, assumed: &str) -> String {
    if value == assumed { String::new() } else { value.to_owned() }
}
