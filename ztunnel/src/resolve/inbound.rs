//! What a tunnel request that arrived for a workload means, and what may be believed of it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mesh::hbone::{Authority, ConnectHeaders};
use mesh::identity::Identity;
use mesh::model::{
    ApplicationTunnelProtocol, GatewayAddress, GatewayDestination, NamespacedHostname, NetworkAddress, Service,
    Workload,
};
use mesh::policy::Original;
use mesh::store::Snapshot;
use thiserror::Error;

use super::gateway::{gateway_service, is_instance_of, named, waypoints_of, workload_at};

/// Why an inbound tunnel request has no target.
#[derive(Debug, Error, PartialEq)]
pub enum BadTarget {
    #[error("tunnel request for {asked} arrived at {here}")]
    WrongAddress { asked: SocketAddr, here: IpAddr },
    #[error("tunnel request for service {host}:{port}, which the local workload does not serve")]
    UnknownService { host: Arc<str>, port: u16 },
    #[error("tunnel request for port {0}, which is the proxy's own")]
    OwnPort(u16),
    #[error("tunnel request for service {0}, which has no address to announce to the local workload")]
    NoAddress(Arc<str>),
}

impl BadTarget {
    #[must_use]
    pub const fn status(&self) -> http::StatusCode {
        match self {
            Self::WrongAddress { .. } => http::StatusCode::BAD_REQUEST,
            Self::UnknownService { .. } | Self::OwnPort(_) | Self::NoAddress(_) => {
                http::StatusCode::SERVICE_UNAVAILABLE
            }
        }
    }
}

/// Ports nobody may ask a tunnel for: dialling them would lead back into a proxy.
const OWN_PORTS: [u16; 3] = [15008, 15006, 15001];

/// What a tunnel request leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// The application: what policy is asked about.
    pub app: SocketAddr,
    /// The application is a proxy that wants to be told by a PROXY header where the connection was going.
    pub announced: Option<SocketAddr>,
}

/// What a tunnel request asks for. `here` is the address the TCP connection came to; the host is always that one,
/// whatever the request names.
///
/// # Errors
/// [`BadTarget`], which knows the status to answer.
pub fn inbound(world: &Snapshot, local: &Workload, here: IpAddr, authority: &Authority) -> Result<Target, BadTarget> {
    let tunnel = local.application_tunnel.unwrap_or_default();
    let (asked, announced) = match authority {
        Authority::Ip(asked) => {
            let meant = asked.ip() == here || local.application_tunnel.is_some() || fronts(world, local, asked.ip());
            if !meant {
                return Err(BadTarget::WrongAddress { asked: *asked, here });
            }
            (Some(asked.port()), Some(*asked))
        }
        Authority::Host { host, port } => {
            let unknown = || BadTarget::UnknownService { host: host.clone(), port: *port };
            let service = world.service_by_hostname(host, &local.namespace).ok_or_else(unknown)?;
            let defined = service.ports.get(port);
            let mapped = local.services.get(&service.key()).and_then(|ports| ports.target(*port));
            let target = mapped.or(defined.map(|p| p.target_port).filter(|p| *p != 0));
            // Where all go to one port, which of its own an endpoint would have does not matter.
            if target.is_none() && (tunnel.port.is_none() || defined.is_none()) {
                return Err(unknown());
            }
            (target, announced_address(service, local).map(|vip| SocketAddr::new(vip, *port)))
        }
    };
    let announced = match (tunnel.protocol, authority) {
        (ApplicationTunnelProtocol::None, _) => None,
        (ApplicationTunnelProtocol::Proxy, Authority::Host { host, .. }) => {
            Some(announced.ok_or_else(|| BadTarget::NoAddress(host.clone()))?)
        }
        (ApplicationTunnelProtocol::Proxy, Authority::Ip(_)) => announced,
    };
    for port in [asked, tunnel.port].into_iter().flatten() {
        if OWN_PORTS.contains(&port) {
            return Err(BadTarget::OwnPort(port));
        }
    }
    let port = tunnel.port.or(asked).unwrap_or_default();
    Ok(Target { app: SocketAddr::new(here, port), announced })
}

/// The address a service is announced by: one of the local workload's network before others, IPv4 before IPv6.
fn announced_address(service: &Service, local: &Workload) -> Option<IpAddr> {
    let rank = |vip: &&NetworkAddress| (vip.network == local.network, vip.address.is_ipv4());
    // `max_by_key` keeps the last of equals; the first is wanted.
    service.vips.iter().rev().max_by_key(rank).map(|vip| vip.address)
}

/// May this peer speak for another: is it a waypoint or gateway that the local workload or one of its services names? It
/// passes on connections of clients that we do not see ourselves.
pub fn speaks_for_others(world: &Snapshot, local: &Workload, peer: &Identity) -> bool {
    let of_services = local.services.keys().filter_map(|key| world.service(key)).flat_map(|s| waypoints_of(s));
    is_one_of(world, local, of_services.chain(&local.waypoint).chain(&local.network_gateway), peer)
}

fn is_one_of<'a>(
    world: &Snapshot,
    local: &Workload,
    mut gateways: impl Iterator<Item = &'a GatewayAddress>,
    peer: &Identity,
) -> bool {
    let is_peer = |w: &Workload| w.identity().is_ok_and(|id| id == *peer);
    gateways.any(|gateway| instances(world, local, gateway).any(|w| is_peer(w)))
}

/// The client that the peer speaks for, if it may here: it is a waypoint or gateway that the control plane names for this
/// port of the workload, and says both who the client is and where. `None` makes the peer itself the client.
pub fn original(
    world: &Snapshot,
    local: &Workload,
    port: u16,
    peer: &Identity,
    headers: &ConnectHeaders,
) -> Option<Original> {
    let (identity, address) = headers.original_peer.clone().zip(headers.forwarded_for)?;
    let of_services = local.services.iter().filter_map(|(key, own)| {
        let service = world.service(key)?;
        let target = |at: u16, declared: u16| own.target(at).unwrap_or(declared);
        service.ports.iter().any(|(at, declared)| target(*at, declared.target_port) == port).then_some(service)
    });
    let named = of_services.flat_map(|s| waypoints_of(s)).chain(&local.waypoint).chain(&local.network_gateway);
    // Nobody of another trust domain gets past the handshake of a proxy of ours.
    let believed = identity.trust_domain() == peer.trust_domain() && is_one_of(world, local, named, peer);
    believed.then_some(Original { identity, address })
}

/// The workloads that a reference of `local` stands for.
fn instances<'a>(
    world: &'a Snapshot,
    local: &Workload,
    gateway: &GatewayAddress,
) -> impl Iterator<Item = &'a Arc<Workload>> {
    let of_service = gateway_service(world, local, gateway).into_iter().flat_map(|service| {
        let key = service.key();
        world.all_endpoints(&key).map(|(workload, _)| workload).collect::<Vec<_>>()
    });
    of_service.chain(workload_at(world, gateway)).chain(named(world, gateway))
}

/// Did the client dial from another network, through a gateway? `said` is the network it says it is on. That counts from
/// whoever may speak for others, and where the TCP connection comes from the gateway that the local workload names:
/// a client of our own network cannot be behind that.
pub fn comes_through_gateway(
    world: &Snapshot,
    local: &Workload,
    (peer, from): (&Identity, IpAddr),
    said: Option<&str>,
) -> bool {
    let is_gateway = |gateway: &GatewayAddress| {
        // Addresses mean something within their network only.
        let here = |network: &str| network == &*local.network;
        let at =
            matches!(&gateway.destination, GatewayDestination::Address(a) if a.address == from && here(&a.network));
        at || instances(world, local, gateway).any(|w| here(&w.network) && w.addresses.contains(&from))
    };
    said.is_some_and(|network| !network.eq_ignore_ascii_case(&local.network))
        && (local.network_gateway.as_ref().is_some_and(is_gateway) || speaks_for_others(world, local, peer))
}

/// Is the local workload a waypoint of whatever has the address `ip`?
fn fronts(world: &Snapshot, local: &Workload, ip: IpAddr) -> bool {
    let service = world.services_by_vip(&local.network, ip).filter_map(|s| s.waypoint.as_ref());
    let workload = world.workload_by_ip(&local.network, ip).and_then(|w| w.waypoint.as_ref());
    service.chain(workload).any(|waypoint| is_instance_of(world, local, waypoint))
}

/// The service an inbound connection was meant for: the one the peer names, if it is one of the local workload's;
/// else the only one that leads to the port. For telemetry alone.
#[must_use]
pub fn inbound_service<'a>(
    world: &'a Snapshot,
    local: &Workload,
    port: u16,
    named: Option<&str>,
) -> Option<&'a Arc<Service>> {
    if let Some(name) = named
        && let Some(key) = local.services.keys().find(|k| &*k.hostname == name)
    {
        return world.service(key);
    }
    let leads_here = |key: &&NamespacedHostname| {
        local.services.get(key).is_some_and(|ports| ports.iter().any(|p| p.target_port == port))
    };
    let mut services = local.services.keys().filter(leads_here);
    match (services.next(), services.next()) {
        (Some(only), None) => world.service(only),
        _ => None,
    }
}
