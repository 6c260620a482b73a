//! From the wire types to the model, once. What cannot be understood is refused as a whole, naming the field: a proxy
//! that guesses routes traffic where nobody meant it to go.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use mesh_proto::workload as wire;

use super::*;

/// Why a resource was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    #[error("{0} is empty")]
    Empty(&'static str),
    #[error("{field}: {length} bytes are neither an IPv4 nor an IPv6 address")]
    AddressLength { field: &'static str, length: usize },
    #[error("{field}: prefix length {length} exceeds the address")]
    PrefixLength { field: &'static str, length: u32 },
    #[error("{field}: {value} is not a known value")]
    UnknownEnum { field: &'static str, value: i32 },
    #[error("tunnel_protocol: LEGACY_ISTIO_MTLS is not supported")]
    LegacyProtocol,
    #[error("{field}: {value} is not a port")]
    Port { field: &'static str, value: u32 },
    #[error("{0}: no destination")]
    NoDestination(&'static str),
    #[error("services: {0}")]
    ServiceName(#[from] ParseNameError),
    /// Nothing could remove it by such a name.
    #[error("{0} has a slash in it")]
    Slash(&'static str),
}

/// Reads 4 or 16 bytes in network order; an IPv4-mapped IPv6 address becomes the IPv4 address it stands for, as on
/// every other way into the mesh.
pub fn ip_from_bytes(field: &'static str, bytes: &[u8]) -> Result<IpAddr, ModelError> {
    let address = if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        IpAddr::from(v4)
    } else if let Ok(v6) = <[u8; 16]>::try_from(bytes) {
        IpAddr::from(v6)
    } else {
        return Err(ModelError::AddressLength { field, length: bytes.len() });
    };
    Ok(address.to_canonical())
}

fn port(field: &'static str, value: u32) -> Result<u16, ModelError> {
    u16::try_from(value).map_err(|_| ModelError::Port { field, value })
}

fn known<W: TryFrom<i32>>(field: &'static str, value: i32) -> Result<W, ModelError> {
    W::try_from(value).map_err(|_| ModelError::UnknownEnum { field, value })
}

/// Absent texts share one allocation; most workloads leave most of them out.
fn text(text: String) -> Arc<str> {
    if text.is_empty() { Arc::default() } else { text.into() }
}

fn or(default: Arc<str>, text: String) -> Arc<str> {
    if text.is_empty() || text == *default { default } else { text.into() }
}

fn required(field: &'static str, text: String) -> Result<Arc<str>, ModelError> {
    if text.is_empty() { Err(ModelError::Empty(field)) } else { Ok(text.into()) }
}

fn app_protocol(value: i32) -> Result<AppProtocol, ModelError> {
    Ok(match known("app_protocol", value)? {
        wire::AppProtocol::Unknown => AppProtocol::Unknown,
        wire::AppProtocol::Http11 => AppProtocol::Http11,
        wire::AppProtocol::Http2 => AppProtocol::Http2,
        wire::AppProtocol::Grpc => AppProtocol::Grpc,
        wire::AppProtocol::Tcp => AppProtocol::Tcp,
        wire::AppProtocol::Tls => AppProtocol::Tls,
    })
}

fn gateway(field: &'static str, gateway: wire::GatewayAddress) -> Result<GatewayAddress, ModelError> {
    let destination = match gateway.destination.ok_or(ModelError::NoDestination(field))? {
        wire::gateway_address::Destination::Hostname(host) => GatewayDestination::Hostname(NamespacedHostname {
            namespace: required(field, host.namespace)?,
            hostname: required(field, host.hostname)?,
        }),
        wire::gateway_address::Destination::Address(address) => GatewayDestination::Address(NetworkAddress {
            network: text(address.network),
            address: ip_from_bytes(field, &address.address)?,
        }),
    };
    let hbone_mtls_port = match port(field, gateway.hbone_mtls_port)? {
        0 => HBONE_PORT,
        port => port,
    };
    Ok(GatewayAddress { destination, hbone_mtls_port })
}

fn endpoint_ports(list: wire::PortList) -> Result<EndpointPorts, ModelError> {
    list.ports
        .into_iter()
        .map(|p| {
            Ok(EndpointPort {
                service_port: port("service_port", p.service_port)?,
                target_port: port("target_port", p.target_port)?,
                app_protocol: app_protocol(p.app_protocol)?,
            })
        })
        .collect()
}

fn application_tunnel(tunnel: wire::ApplicationTunnel) -> Result<ApplicationTunnel, ModelError> {
    let protocol = match known("application_tunnel.protocol", tunnel.protocol)? {
        wire::application_tunnel::Protocol::None => ApplicationTunnelProtocol::None,
        wire::application_tunnel::Protocol::Proxy => ApplicationTunnelProtocol::Proxy,
    };
    let port = Some(port("application_tunnel.port", tunnel.port)?).filter(|port| *port != 0);
    Ok(ApplicationTunnel { protocol, port })
}

fn addresses(addresses: &[bytes::Bytes]) -> Result<Vec<IpAddr>, ModelError> {
    addresses.iter().map(|bytes| ip_from_bytes("addresses", bytes)).collect()
}

/// What [`Workload`] says of its health.
pub(super) fn status(value: i32) -> Result<HealthStatus, ModelError> {
    Ok(match known("status", value)? {
        wire::WorkloadStatus::Healthy => HealthStatus::Healthy,
        wire::WorkloadStatus::Unhealthy => HealthStatus::Unhealthy,
    })
}

impl TryFrom<wire::Workload> for Workload {
    type Error = ModelError;

    fn try_from(mut w: wire::Workload) -> Result<Self, ModelError> {
        use std::mem::take;
        Ok(Workload {
            uid: required("uid", take(&mut w.uid))?,
            name: text(take(&mut w.name)),
            addresses: addresses(&w.addresses)?,
            node: text(take(&mut w.node)),
            status: status(w.status)?,
            template: Arc::new(w.try_into()?),
        })
    }
}

impl TryFrom<wire::Workload> for Template {
    type Error = ModelError;

    /// Looks at nothing that is the workload's own.
    fn try_from(w: wire::Workload) -> Result<Self, ModelError> {
        let default = Template::default();
        Ok(Template {
            namespace: text(w.namespace),
            waypoint: w.waypoint.map(|g| gateway("waypoint", g)).transpose()?,
            network_gateway: w.network_gateway.map(|g| gateway("network_gateway", g)).transpose()?,
            protocol: match known("tunnel_protocol", w.tunnel_protocol)? {
                wire::TunnelProtocol::None => TunnelProtocol::None,
                wire::TunnelProtocol::Hbone => TunnelProtocol::Hbone,
                wire::TunnelProtocol::LegacyIstioMtls => return Err(ModelError::LegacyProtocol),
            },
            network_mode: match known("network_mode", w.network_mode)? {
                wire::NetworkMode::Standard => NetworkMode::Standard,
                wire::NetworkMode::HostNetwork => NetworkMode::HostNetwork,
            },
            trust_domain: or(default.trust_domain, w.trust_domain),
            service_account: or(default.service_account, w.service_account),
            network: text(w.network),
            workload_name: text(w.workload_name),
            workload_type: match known("workload_type", w.workload_type)? {
                wire::WorkloadType::Deployment => WorkloadType::Deployment,
                wire::WorkloadType::Cronjob => WorkloadType::CronJob,
                wire::WorkloadType::Pod => WorkloadType::Pod,
                wire::WorkloadType::Job => WorkloadType::Job,
            },
            canonical_name: text(w.canonical_name),
            canonical_revision: text(w.canonical_revision),
            hostname: text(w.hostname),
            native_tunnel: w.native_tunnel,
            application_tunnel: w.application_tunnel.map(application_tunnel).transpose()?,
            authorization_policies: w.authorization_policies.into_iter().map(Into::into).collect(),
            cluster_id: or(default.cluster_id, w.cluster_id),
            locality: w
                .locality
                .map(|l| Locality { region: text(l.region), zone: text(l.zone), subzone: text(l.subzone) })
                .unwrap_or_default(),
            services: w
                .services
                .into_iter()
                .map(|(service, ports)| Ok((service.parse::<NamespacedHostname>()?, endpoint_ports(ports)?)))
                .collect::<Result<_, ModelError>>()?,
            capacity: w.capacity.unwrap_or(1),
        })
    }
}

/// A VIP without a length, or as long as its address, is a host; else a range.
fn vips(addresses: Vec<wire::NetworkAddress>) -> Result<(Vec<NetworkAddress>, Vec<NetworkCidr>), ModelError> {
    let (mut hosts, mut ranges) = (Vec::new(), Vec::new());
    for vip in addresses {
        let address = ip_from_bytes("addresses", &vip.address)?;
        let network = text(vip.network);
        let full = if address.is_ipv4() { 32 } else { 128 };
        match vip.length {
            None => hosts.push(NetworkAddress { network, address }),
            Some(length) if length == full => hosts.push(NetworkAddress { network, address }),
            Some(length) => {
                let error = ModelError::PrefixLength { field: "addresses", length };
                let length = u8::try_from(length).map_err(|_| error.clone())?;
                let cidr = IpNet::new(address, length).map_err(|_| error)?.trunc();
                ranges.push(NetworkCidr { network, cidr });
            }
        }
    }
    Ok((hosts, ranges))
}

fn load_balancing(lb: wire::LoadBalancing) -> Result<LoadBalancing, ModelError> {
    let scope = |value: i32| {
        Ok(match known("routing_preference", value)? {
            wire::load_balancing::Scope::UnspecifiedScope => {
                return Err(ModelError::UnknownEnum { field: "routing_preference", value });
            }
            wire::load_balancing::Scope::Region => RoutingScope::Region,
            wire::load_balancing::Scope::Zone => RoutingScope::Zone,
            wire::load_balancing::Scope::Subzone => RoutingScope::Subzone,
            wire::load_balancing::Scope::Node => RoutingScope::Node,
            wire::load_balancing::Scope::Cluster => RoutingScope::Cluster,
            wire::load_balancing::Scope::Network => RoutingScope::Network,
        })
    };
    Ok(LoadBalancing {
        routing_preferences: lb.routing_preference.into_iter().map(scope).collect::<Result<_, _>>()?,
        mode: match known("load_balancing.mode", lb.mode)? {
            wire::load_balancing::Mode::UnspecifiedMode => LoadBalancingMode::Standard,
            wire::load_balancing::Mode::Strict => LoadBalancingMode::Strict,
            wire::load_balancing::Mode::Failover => LoadBalancingMode::Failover,
            wire::load_balancing::Mode::Passthrough => LoadBalancingMode::Passthrough,
        },
        health_policy: match known("health_policy", lb.health_policy)? {
            wire::load_balancing::HealthPolicy::OnlyHealthy => HealthPolicy::OnlyHealthy,
            wire::load_balancing::HealthPolicy::AllowAll => HealthPolicy::AllowAll,
        },
    })
}

impl TryFrom<wire::Service> for Service {
    type Error = ModelError;

    fn try_from(s: wire::Service) -> Result<Self, ModelError> {
        for (field, value) in [("namespace", &s.namespace), ("hostname", &s.hostname)] {
            if value.contains('/') {
                return Err(ModelError::Slash(field));
            }
        }
        let (vips, cidr_vips) = vips(s.addresses)?;
        let weighted = |w: wire::WeightedWaypoint| {
            let destination = w.destination.ok_or(ModelError::NoDestination("weighted_waypoints"))?;
            Ok(WeightedWaypoint { destination: gateway("weighted_waypoints", destination)?, weight: w.weight })
        };
        Ok(Service {
            name: text(s.name),
            namespace: required("namespace", s.namespace)?,
            hostname: required("hostname", s.hostname)?,
            vips,
            cidr_vips,
            ports: s
                .ports
                .into_iter()
                .map(|p| {
                    let target = ServicePort {
                        target_port: port("target_port", p.target_port)?,
                        app_protocol: app_protocol(p.app_protocol)?,
                    };
                    Ok((port("service_port", p.service_port)?, target))
                })
                .collect::<Result<_, ModelError>>()?,
            subject_alt_names: s.subject_alt_names.into_iter().map(Into::into).collect(),
            waypoint: s.waypoint.map(|g| gateway("waypoint", g)).transpose()?,
            weighted_waypoints: s.weighted_waypoints.into_iter().map(weighted).collect::<Result<_, ModelError>>()?,
            load_balancing: s.load_balancing.map(load_balancing).transpose()?.unwrap_or_default(),
            ip_families: match known("ip_families", s.ip_families)? {
                wire::IpFamilies::Automatic => IpFamilies::Automatic,
                wire::IpFamilies::Ipv4Only => IpFamilies::Ipv4,
                wire::IpFamilies::Ipv6Only => IpFamilies::Ipv6,
                wire::IpFamilies::Dual => IpFamilies::Dual,
            },
            canonical: s.canonical,
            ingress_use_waypoint: s.ingress_use_waypoint,
            // The one enum where an unknown number has a safe meaning: newer control planes may refine it.
            visibility: match wire::Visibility::try_from(s.visibility) {
                Ok(wire::Visibility::Namespace) => Visibility::Namespace,
                Ok(wire::Visibility::Public) | Err(_) => Visibility::Public,
            },
        })
    }
}

impl TryFrom<wire::Address> for Resource {
    type Error = ModelError;

    fn try_from(address: wire::Address) -> Result<Self, ModelError> {
        match address.r#type {
            Some(wire::address::Type::Workload(workload)) => workload.try_into().map(Self::Workload),
            Some(wire::address::Type::Service(service)) => service.try_into().map(Self::Service),
            None => Err(ModelError::Empty("type")),
        }
    }
}
