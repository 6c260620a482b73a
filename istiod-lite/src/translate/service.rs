//! Kubernetes Services as the mesh's services.

use std::collections::BTreeSet;

use mesh_proto::workload::{
    Address, AppProtocol, IpFamilies, LoadBalancing, NetworkAddress, Port, Service, address, load_balancing,
};

use super::binding::{self, Binding, TrafficType};
use super::workload;
use super::world::{View, World};
use super::{address_bytes, address_resource};
use crate::resources::Resource;
use crate::types::{Key, Meta, Service as KubeService, ServicePort, TargetPort, annotation};

/// The annotation that says which endpoints are preferred.
const TRAFFIC_DISTRIBUTION: &str = "networking.istio.io/traffic-distribution";

/// The service and what it is bound to; `None` for those the mesh does not know (ExternalName).
pub fn translate(view: View<'_>, service: &KubeService) -> Option<(Resource, Binding)> {
    let world = view.world;
    let spec = service.spec.as_ref()?;
    if spec.is_external {
        return None;
    }
    let (key, vips) = (&service.key, &spec.vips);
    let binding = binding::resolve(world, service, TrafficType::Service);
    let network = world.network();
    let message = Service {
        name: key.name.to_string(),
        namespace: key.namespace.to_string(),
        hostname: world.hostname(key),
        addresses: vips
            .iter()
            .map(|vip| NetworkAddress { network: network.into(), address: address_bytes(*vip), length: None })
            .collect(),
        ports: spec.ports.iter().filter_map(port).collect(),
        subject_alt_names: identities_beyond(view, key, service).into_iter().collect(),
        waypoint: binding.address.as_deref().cloned(),
        weighted_waypoints: binding.weighted(),
        load_balancing: load_balancing(world, service),
        ip_families: ip_families(spec.has_ipv4, spec.has_ipv6).into(),
        canonical: true,
        ingress_use_waypoint: binding::ingress_uses_waypoint(world, service),
        ..Service::default()
    };
    let aliases = vips.iter().map(|vip| format!("{network}/{vip}")).collect();
    let resource =
        address_resource(world.service_name(key), &Address { r#type: Some(address::Type::Service(message)) }, aliases);
    Some((resource, binding))
}

/// Who may answer for it on other networks: from here they are known by nothing else.
fn identities_beyond(view: View<'_>, key: &Key, service: &KubeService) -> BTreeSet<String> {
    let beyond = view.lookups.beyond(&key.namespace);
    match workload::selector(service) {
        Some(selector) => beyond.selected(selector),
        None => {
            let pods = view.slices_of(key).flat_map(|slice| slice.pods());
            pods.filter_map(|pod| beyond.pod(pod)).map(str::to_owned).collect()
        }
    }
}

fn port(port: &ServicePort) -> Option<Port> {
    let service_port = port_number(port.number)?;
    Some(Port {
        service_port,
        target_port: match &port.target {
            TargetPort::Same => service_port,
            TargetPort::Number(number) => port_number(*number)?,
            // It differs from pod to pod.
            TargetPort::Name(_) => 0,
        },
        app_protocol: app_protocol(port).into(),
    })
}

/// The number of a port, 1 to 65535. Not every API server checks that, and a proxy refuses the whole address for one port
/// that is none.
pub fn port_number(number: i32) -> Option<u32> {
    u16::try_from(number).ok().filter(|number| *number > 0).map(u32::from)
}

/// The protocol that a name, or its part before the first hyphen, stands for.
pub fn app_protocol_named(text: &str) -> Option<AppProtocol> {
    match text.to_ascii_lowercase().as_str() {
        "kubernetes.io/h2c" => Some(AppProtocol::Http2),
        "kubernetes.io/ws" => Some(AppProtocol::Http11),
        "kubernetes.io/wss" => Some(AppProtocol::Tls),
        "grpc-web" => Some(AppProtocol::Http11),
        lower if lower.starts_with("grpc-web-") => Some(AppProtocol::Http11),
        lower => match lower.split('-').next().unwrap_or_default() {
            "http" => Some(AppProtocol::Http11),
            "http2" => Some(AppProtocol::Http2),
            "grpc" => Some(AppProtocol::Grpc),
            "https" | "tls" => Some(AppProtocol::Tls),
            "tcp" | "mongo" | "redis" | "mysql" => Some(AppProtocol::Tcp),
            _ => None,
        },
    }
}

/// `appProtocol` beats the port's name, which beats well-known numbers; `Unknown` means: look at the first bytes.
pub fn app_protocol(port: &ServicePort) -> AppProtocol {
    if !port.is_tcp {
        return AppProtocol::Unknown;
    }
    let by_number = || matches!(port.number, 25 | 53 | 3306 | 27017).then_some(AppProtocol::Tcp);
    app_protocol_named(&port.app_protocol)
        .or_else(|| app_protocol_named(&port.name))
        .or_else(by_number)
        .unwrap_or(AppProtocol::Unknown)
}

fn ip_families(has_ipv4: bool, has_ipv6: bool) -> IpFamilies {
    match (has_ipv4, has_ipv6) {
        (true, true) => IpFamilies::Dual,
        (true, false) => IpFamilies::Ipv4Only,
        (false, true) => IpFamilies::Ipv6Only,
        (false, false) => IpFamilies::Automatic,
    }
}

/// The preference that a traffic distribution asks for.
pub fn distributed(asked: Option<&str>) -> (load_balancing::Mode, &'static [load_balancing::Scope]) {
    use load_balancing::{Mode, Scope};
    match asked.map(str::to_ascii_lowercase).as_deref() {
        Some("preferclose" | "prefersamezone") => (Mode::Failover, &[Scope::Network, Scope::Region, Scope::Zone]),
        Some("prefersamenode") => {
            (Mode::Failover, &[Scope::Network, Scope::Region, Scope::Zone, Scope::Subzone, Scope::Node])
        }
        _ => (Mode::UnspecifiedMode, &[]),
    }
}

/// The traffic distribution that an object's annotation asks for, else that of its namespace.
pub fn annotated_distribution<'a>(world: &'a World, meta: &'a dyn Meta) -> Option<&'a str> {
    let of_namespace = || annotation(&world.namespace(meta.namespace_name())?.metadata, TRAFFIC_DISTRIBUTION);
    annotation(meta, TRAFFIC_DISTRIBUTION).or_else(of_namespace)
}

/// The field comes before annotations, as in Istio.
fn load_balancing(world: &World, service: &KubeService) -> Option<LoadBalancing> {
    use load_balancing::{HealthPolicy, Mode, Scope};
    let spec = service.spec.as_ref()?;
    let distribution = spec.traffic_distribution.as_deref().or_else(|| annotated_distribution(world, service));
    let (mode, scopes): (Mode, &[Scope]) = match spec.is_local {
        true => (Mode::Strict, &[Scope::Node]),
        false => distributed(distribution),
    };
    let health = if spec.publishes_not_ready { HealthPolicy::AllowAll } else { HealthPolicy::OnlyHealthy };
    if mode == Mode::UnspecifiedMode && health == HealthPolicy::OnlyHealthy {
        return None;
    }
    Some(LoadBalancing {
        routing_preference: scopes.iter().map(|scope| i32::from(*scope)).collect(),
        mode: mode.into(),
        health_policy: health.into(),
    })
}
