//! Pods, and endpoints that are not pods, as the mesh's workloads.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Pod, Service as KubeService, ServicePort};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use mesh_proto::workload::{
    Address, Locality, NetworkMode, Port, PortList, TunnelProtocol, Workload, WorkloadStatus, WorkloadType, address,
};

use super::binding::{self, Binding, TrafficType};
use super::service::{app_protocol, port_number};
use super::service_entry::services_selecting;
use super::world::{View, World};
use super::{address_bytes, address_resource};
use crate::enrol;
use crate::resources::Resource;
use crate::types::{Key, annotation, label, matches_labels};

/// The label by which a pod says that it answers HBONE itself.
pub const NATIVE_TUNNEL: &str = "networking.istio.io/tunnel";

/// Does the workload have a proxy of its own that answers HBONE?
pub fn has_native_tunnel(meta: &ObjectMeta) -> bool {
    label(meta, NATIVE_TUNNEL) == Some("http")
}

/// The pod's workload and binding. `None` while it has no address and once it has ended.
pub fn from_pod(view: &View<'_>, pod: &Pod, policies: Vec<String>) -> Option<(Resource, Binding)> {
    let world = view.world;
    let addresses = running_addresses(pod)?;
    let key = Key::of(&pod.metadata);
    let spec = pod.spec.as_ref()?;
    let meta = &pod.metadata;
    let native_tunnel = has_native_tunnel(meta);
    let captured = annotation(meta, enrol::REDIRECTION) == Some("enabled");
    let binding = binding::resolve(world, meta, TrafficType::Workload);
    let workload_name = workload_name(pod);
    let first = |keys: &[&str]| keys.iter().find_map(|key| label(meta, key)).map(str::to_owned);
    let message = Workload {
        uid: world.pod_uid(&key),
        name: key.name.to_string(),
        namespace: key.namespace.to_string(),
        addresses: addresses.iter().copied().map(address_bytes).collect(),
        network: world.network().into(),
        tunnel_protocol: if captured || native_tunnel { TunnelProtocol::Hbone } else { TunnelProtocol::None }.into(),
        trust_domain: elide(&world.mesh.trust_domain, "cluster.local"),
        service_account: elide(service_account(pod), "default"),
        waypoint: binding.address.clone(),
        node: spec.node_name.clone().unwrap_or_default(),
        canonical_name: first(&["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"])
            .unwrap_or_else(|| workload_name.clone()),
        canonical_revision: first(&["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"])
            .unwrap_or_else(|| "latest".into()),
        workload_type: WorkloadType::Pod.into(),
        workload_name,
        native_tunnel,
        authorization_policies: policies,
        status: if is_healthy(pod) { WorkloadStatus::Healthy } else { WorkloadStatus::Unhealthy }.into(),
        cluster_id: world.mesh.cluster_id.clone(),
        services: services(view, pod),
        locality: spec.node_name.as_deref().and_then(|node| locality(world, node)),
        network_mode: if spec.host_network == Some(true) { NetworkMode::HostNetwork } else { NetworkMode::Standard }
            .into(),
        ..Workload::default()
    };
    // Pods of the host network share the node's address; it names none of them.
    let aliases = if spec.host_network == Some(true) { Vec::new() } else { aliases(world, &addresses) };
    Some((
        address_resource(message.uid.clone(), &Address { r#type: Some(address::Type::Workload(message)) }, aliases),
        binding,
    ))
}

/// Endpoints of a Service without selector that are plain addresses.
pub fn from_slice<'a>(
    world: &'a World,
    service: &'a KubeService,
    slice: &'a EndpointSlice,
) -> impl Iterator<Item = Resource> + 'a {
    let addressed = has_no_selector(service) && matches!(slice.address_type.as_str(), "IPv4" | "IPv6");
    let key = Key::of(&slice.metadata);
    slice
        .endpoints
        .iter()
        .filter(move |endpoint| addressed && target_pod(endpoint).is_none())
        .flat_map(|endpoint| endpoint.addresses.iter().map(move |ip| (endpoint, ip)))
        .filter_map(move |(endpoint, ip)| {
            let ip: IpAddr = ip.parse().ok()?;
            let uid = format!("{}/discovery.k8s.io/EndpointSlice/{key}/{ip}", world.mesh.cluster_id);
            let ports = slice_ports(service, slice);
            let name = Key::of(&service.metadata);
            let ready = endpoint.conditions.as_ref().and_then(|conditions| conditions.ready).unwrap_or(true);
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
                status: if ready { WorkloadStatus::Healthy } else { WorkloadStatus::Unhealthy }.into(),
                cluster_id: world.mesh.cluster_id.clone(),
                services: BTreeMap::from([(world.service_name(&name), PortList { ports })]),
                network_mode: NetworkMode::HostNetwork.into(),
                ..Workload::default()
            };
            Some(address_resource(uid, &Address { r#type: Some(address::Type::Workload(message)) }, Vec::new()))
        })
}

/// Addresses of a pod that has not ended; `None` before it has any.
pub fn running_addresses(pod: &Pod) -> Option<Vec<IpAddr>> {
    let status = pod.status.as_ref()?;
    if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
        return None;
    }
    let mut addresses: Vec<IpAddr> = status.pod_ips.iter().flatten().filter_map(|ip| ip.ip.parse().ok()).collect();
    if addresses.is_empty() {
        addresses.extend(status.pod_ip.as_deref().and_then(|ip| ip.parse::<IpAddr>().ok()));
    }
    (!addresses.is_empty()).then_some(addresses)
}

pub fn service_account(pod: &Pod) -> &str {
    let name = pod.spec.as_ref().and_then(|spec| spec.service_account_name.as_deref());
    name.filter(|name| !name.is_empty()).unwrap_or("default")
}

/// The pod ports behind each of its services, by service port.
pub fn services(view: &View<'_>, pod: &Pod) -> BTreeMap<String, PortList> {
    let world = view.world;
    let key = Key::of(&pod.metadata);
    let mut services = BTreeMap::new();
    for service in view.services_in(&key.namespace) {
        let ports = match selector(service) {
            Some(selector) if matches_labels(selector, pod.metadata.labels.as_ref()) => selected_ports(service, pod),
            Some(_) => continue,
            None => {
                let mut slices = view.slices_of(&service.metadata).filter(|slice| names_pod(slice, &key.name));
                let Some(slice) = slices.next() else { continue };
                slice_ports(service, slice)
            }
        };
        services.insert(world.service_name(&Key::of(&service.metadata)), PortList { ports });
    }
    let labels = pod.metadata.labels.as_ref();
    services.extend(services_selecting(&view.entries, &key.namespace, labels, &BTreeMap::new()));
    services
}

/// The Services that select a WorkloadEntry, with its ports behind each: those it names, else the Service's targets.
pub fn services_of_labels(
    view: &View<'_>,
    namespace: &str,
    labels: &BTreeMap<String, String>,
    named: &BTreeMap<String, u16>,
) -> BTreeMap<String, PortList> {
    let selected = view
        .services_in(namespace)
        .filter(|service| selector(service).is_some_and(|wanted| matches_labels(wanted, Some(labels))));
    let own = |name: &str| named.get(name).copied().map(i32::from);
    selected
        .map(|service| {
            let ports = tcp_ports(service).filter_map(|port| {
                let target = match (own(port.name.as_deref().unwrap_or_default()), &port.target_port) {
                    (Some(own), _) => own,
                    (None, Some(IntOrString::Int(number))) if *number != 0 => *number,
                    (None, Some(IntOrString::String(name))) => own(name)?,
                    (None, _) => port.port,
                };
                resolved_port(port, target)
            });
            (view.world.service_name(&Key::of(&service.metadata)), PortList { ports: ports.collect() })
        })
        .collect()
}

fn is_external(service: &KubeService) -> bool {
    service.spec.as_ref().and_then(|spec| spec.type_.as_deref()) == Some("ExternalName")
}

fn selector(service: &KubeService) -> Option<&BTreeMap<String, String>> {
    let selector = service.spec.as_ref()?.selector.as_ref()?;
    (!selector.is_empty() && !is_external(service)).then_some(selector)
}

fn has_no_selector(service: &KubeService) -> bool {
    selector(service).is_none() && !is_external(service)
}

fn tcp_ports(service: &KubeService) -> impl Iterator<Item = &ServicePort> {
    let ports = service.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
    ports.filter(|port| port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP"))
}

fn selected_ports(service: &KubeService, pod: &Pod) -> Vec<Port> {
    tcp_ports(service)
        .filter_map(|port| {
            let target = match &port.target_port {
                Some(IntOrString::Int(number)) if *number != 0 => *number,
                Some(IntOrString::String(name)) => container_port(pod, name)?,
                _ => port.port,
            };
            resolved_port(port, target)
        })
        .collect()
}

fn resolved_port(port: &ServicePort, target: i32) -> Option<Port> {
    Some(Port {
        service_port: port_number(port.port)?,
        target_port: port_number(target)?,
        app_protocol: app_protocol(port).into(),
    })
}

/// A TCP port of a container, or of an init container that keeps running beside them.
fn container_port(pod: &Pod, name: &str) -> Option<i32> {
    let spec = pod.spec.as_ref()?;
    let sidecars = spec.init_containers.iter().flatten().filter(|c| c.restart_policy.as_deref() == Some("Always"));
    spec.containers
        .iter()
        .chain(sidecars)
        .flat_map(|container| container.ports.iter().flatten())
        .find(|port| {
            port.name.as_deref() == Some(name) && port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP")
        })
        .map(|port| port.container_port)
}

/// Pairs a slice's ports with the Service's by name.
fn slice_ports(service: &KubeService, slice: &EndpointSlice) -> Vec<Port> {
    tcp_ports(service)
        .filter_map(|port| {
            let name = port.name.as_deref().unwrap_or_default();
            let found = slice.ports.iter().flatten().find(|candidate| {
                candidate.name.as_deref().unwrap_or_default() == name
                    && candidate.protocol.as_deref().is_none_or(|protocol| protocol == "TCP")
            })?;
            resolved_port(port, found.port?)
        })
        .collect()
}

fn target_pod(endpoint: &Endpoint) -> Option<&str> {
    let target = endpoint.target_ref.as_ref()?;
    (target.kind.as_deref() == Some("Pod")).then_some(target.name.as_deref()?)
}

fn names_pod(slice: &EndpointSlice, pod: &str) -> bool {
    slice.endpoints.iter().any(|endpoint| target_pod(endpoint) == Some(pod))
}

fn is_healthy(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let ready = conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "True");
    ready && pod.metadata.deletion_timestamp.is_none()
}

/// The owning controller; for a Deployment that is the ReplicaSet without its hash.
fn workload_name(pod: &Pod) -> String {
    let name = pod.metadata.name.clone().unwrap_or_default();
    let owners = pod.metadata.owner_references.iter().flatten();
    let Some(owner) = owners.into_iter().find(|owner| owner.controller == Some(true)) else { return name };
    let hash = label(&pod.metadata, "pod-template-hash").filter(|_| owner.kind == "ReplicaSet");
    hash.and_then(|hash| owner.name.strip_suffix(hash)?.strip_suffix('-')).unwrap_or(&owner.name).to_owned()
}

fn locality(world: &World, node: &str) -> Option<Locality> {
    let node = world.nodes.get(&Key::new("", node))?;
    let get = |key| label(&node.metadata, key).unwrap_or_default().to_owned();
    let locality = Locality {
        region: get("topology.kubernetes.io/region"),
        zone: get("topology.kubernetes.io/zone"),
        subzone: get("topology.istio.io/subzone"),
    };
    (locality != Locality::default()).then_some(locality)
}

fn aliases(world: &World, addresses: &[IpAddr]) -> Vec<std::sync::Arc<str>> {
    addresses.iter().map(|ip| format!("{}/{ip}", world.network()).into()).collect()
}

/// Values that the reader assumes are not sent.
pub fn elide(value: &str, assumed: &str) -> String {
    if value == assumed { String::new() } else { value.to_owned() }
}
