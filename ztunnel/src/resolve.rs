//! Where a captured connection goes: a pure function of a snapshot, the source workload and the original destination.
//!
//! No sockets, no clock and no waiting here; chance comes in as an argument. What cannot be routed says why by name,
//! and a destination that asks for a waypoint never falls back to a direct path.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mesh::hbone::Authority;
use mesh::identity::Identity;
use mesh::model::{
    ApplicationTunnelProtocol, GatewayAddress, GatewayDestination, IpFamilies, LoadBalancingMode, NamespacedHostname,
    RoutingScope, Service, TunnelProtocol, Workload,
};
use mesh::net::OriginalDst;
use mesh::store::Snapshot;
use mesh::telemetry::ResponseFlag;
use rand::Rng;
use thiserror::Error;

/// HBONE's port on every pod address.
pub const HBONE_PORT: u16 = 15008;

/// The way to one destination.
#[derive(Debug, Clone, PartialEq)]
pub struct Route {
    /// Where the TCP connection goes: the application, port 15008 of its pod, or a waypoint pod.
    pub next_hop: SocketAddr,
    /// `None`: plain TCP, because the next hop does not speak HBONE or is not known at all.
    pub tunnel: Option<Tunnel>,
    /// Who answers at `next_hop` (the waypoint's workload when there is one); `None` when nobody knows the address.
    pub destination: Option<Arc<Workload>>,
    /// The service the application dialled.
    pub service: Option<Arc<Service>>,
    pub via: Via,
}

/// What kind of hop the next one is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// The destination workload itself.
    Direct,
    Waypoint,
    /// The mesh has nothing to say about this destination.
    Passthrough,
}

/// What to say and whom to expect inside the TLS connection to the next hop.
#[derive(Debug, Clone, PartialEq)]
pub struct Tunnel {
    pub authority: Authority,
    /// Any one of these must be proven by the peer; never empty.
    pub expected: Vec<Identity>,
}

/// Why a connection is not routed. None of these falls back to plain text.
#[derive(Debug, Error, PartialEq)]
pub enum NoRoute {
    #[error("no healthy endpoint of service {service} on port {port}")]
    NoHealthyUpstream { service: NamespacedHostname, port: u16 },
    #[error("service {service} does not define port {port}")]
    UnknownPort { service: NamespacedHostname, port: u16 },
    #[error("waypoint {waypoint} is named by the destination but not known; the connection stays closed")]
    UnknownWaypoint { waypoint: String },
    #[error("waypoint {waypoint} has no ready endpoint; the connection stays closed")]
    WaypointUnavailable { waypoint: String },
    #[error("workload {workload} has no address this source can use")]
    NoAddress { workload: Arc<str> },
    /// Not the end: whoever can look names up completes it.
    #[error("workload {} is known by its hostname {} only", .0.workload.uid, .0.workload.hostname)]
    ByName(Box<ByName>),
    #[error("looking up {hostname}, the endpoint of workload {workload}: {reason}")]
    NameFailed { workload: Arc<str>, hostname: Arc<str>, reason: String },
    #[error("workload {workload}: {reason}")]
    BadIdentity { workload: Arc<str>, reason: String },
    #[error("workload {workload} is on network {network:?}; gateways between networks are not supported yet")]
    OtherNetwork { workload: Arc<str>, network: Arc<str> },
}

impl NoRoute {
    /// The response flag of a connection that ended so.
    #[must_use]
    pub fn flag(&self) -> ResponseFlag {
        match self {
            Self::NoHealthyUpstream { .. } | Self::UnknownPort { .. } => ResponseFlag::NoHealthyUpstream,
            Self::UnknownWaypoint { .. } | Self::WaypointUnavailable { .. } => ResponseFlag::WaypointUnavailable,
            Self::BadIdentity { .. } => ResponseFlag::IdentityError,
            Self::NoAddress { .. } | Self::ByName(_) | Self::NameFailed { .. } | Self::OtherNetwork { .. } => {
                ResponseFlag::Connect
            }
        }
    }
}

/// Decides where `source`'s connection to `dst` goes.
///
/// # Errors
/// [`NoRoute`] when the mesh knows the destination and cannot reach it. An unknown destination is no error: it is
/// passed through.
pub fn outbound<R: Rng>(world: &Snapshot, source: &Workload, dst: OriginalDst, rng: &mut R) -> Result<Route, NoRoute> {
    let OriginalDst(dst) = dst;
    let network = &*source.network;
    let by_address = world.workload_by_ip(network, dst.ip());
    let service = world.best_service_by_vip(network, dst.ip(), &source.namespace);

    // A waypoint belongs to what was dialled: an address that is a workload's is never a call to a service.
    if let (None, Some(service)) = (by_address, service)
        && let Some(waypoint) = service_waypoint(service, rng)
    {
        let target = Authority::Ip(dst);
        return waypoint_route(world, source, waypoint, target, Some(service.clone()), rng);
    }
    if let Some(service) = service {
        if service.load_balancing.mode == LoadBalancingMode::Passthrough {
            return Ok(passthrough(dst, Some(service.clone())));
        }
        let (workload, port) = pick(world, service, source, Wanted::Port(dst.port()), rng)?;
        return direct(source, workload, Some(service), port, dst);
    }
    let Some(workload) = by_address else { return Ok(passthrough(dst, None)) };
    if let Some(waypoint) = &workload.waypoint
        && !is_instance_of(world, source, waypoint)
    {
        return waypoint_route(world, source, waypoint, Authority::Ip(dst), None, rng);
    }
    direct(source, workload.clone(), None, dst.port(), dst)
}

fn passthrough(dst: SocketAddr, service: Option<Arc<Service>>) -> Route {
    Route { next_hop: dst, tunnel: None, destination: None, service, via: Via::Passthrough }
}

/// Straight to the workload: HBONE when it speaks it, else plain.
fn direct(
    source: &Workload,
    workload: Arc<Workload>,
    service: Option<&Arc<Service>>,
    port: u16,
    dst: SocketAddr,
) -> Result<Route, NoRoute> {
    let ip = match select_address(source, &workload, service.map(|s| &**s), dst.ip()) {
        Err(NoRoute::NoAddress { .. }) if workload.addresses.is_empty() && !workload.hostname.is_empty() => {
            let service = service.cloned();
            return Err(NoRoute::ByName(Box::new(ByName { workload, service, port, dialled: dst.ip() })));
        }
        selected => selected?,
    };
    at_address(workload, service, SocketAddr::new(ip, port))
}

/// A route that lacks one fact: the addresses behind a host name.
#[derive(Debug, Clone, PartialEq)]
pub struct ByName {
    workload: Arc<Workload>,
    service: Option<Arc<Service>>,
    port: u16,
    dialled: IpAddr,
}

impl ByName {
    #[must_use]
    pub fn hostname(&self) -> &Arc<str> {
        &self.workload.hostname
    }

    /// The route, once it is known what the name stands for: any address that the service allows and the source can
    /// use, preferably of the family that was dialled.
    ///
    /// # Errors
    /// There is no such address, or nobody could say.
    pub fn resolved<R: Rng>(
        self,
        source: &Workload,
        found: Result<&[IpAddr], String>,
        rng: &mut R,
    ) -> Result<Route, NoRoute> {
        let failed = |reason| {
            let (workload, hostname) = (self.workload.uid.clone(), self.workload.hostname.clone());
            NoRoute::NameFailed { workload, hostname, reason }
        };
        let families = self.service.as_ref().map_or(IpFamilies::Automatic, |s| s.ip_families);
        let usable =
            |ip: &&IpAddr| allows(families, **ip) && source.addresses.iter().any(|own| own.is_ipv4() == ip.is_ipv4());
        let usable: Vec<&IpAddr> = found.map_err(failed)?.iter().filter(usable).collect();
        let dialled = |ip: &&&IpAddr| ip.is_ipv4() == self.dialled.is_ipv4();
        let preferred: Vec<&IpAddr> = match usable.iter().any(|ip| dialled(&ip)) {
            true => usable.iter().filter(dialled).copied().collect(),
            false => usable,
        };
        match weighted_pick(&preferred, |_| 1, rng) {
            Some(ip) => at_address(self.workload, self.service.as_ref(), SocketAddr::new(**ip, self.port)),
            None => Err(failed("it has no address of a family that can be used".into())),
        }
    }
}

fn at_address(workload: Arc<Workload>, service: Option<&Arc<Service>>, target: SocketAddr) -> Result<Route, NoRoute> {
    let ip = target.ip();
    let (next_hop, tunnel) = match workload.protocol {
        TunnelProtocol::None => (target, None),
        TunnelProtocol::Hbone => {
            let expected = expected_identities(&workload, service.map(|s| &**s))?;
            (SocketAddr::new(ip, HBONE_PORT), Some(Tunnel { authority: Authority::Ip(target), expected }))
        }
    };
    Ok(Route { next_hop, tunnel, destination: Some(workload), service: service.cloned(), via: Via::Direct })
}

/// To a waypoint, which gets the address exactly as the application dialled it.
fn waypoint_route<R: Rng>(
    world: &Snapshot,
    source: &Workload,
    waypoint: &GatewayAddress,
    authority: Authority,
    service: Option<Arc<Service>>,
    rng: &mut R,
) -> Result<Route, NoRoute> {
    let name = gateway_name(waypoint);
    let closed = || NoRoute::WaypointUnavailable { waypoint: name.clone() };
    let unknown = || NoRoute::UnknownWaypoint { waypoint: name.clone() };
    let port = waypoint.hbone_mtls_port;
    let like = match &waypoint.destination {
        GatewayDestination::Address(a) => a.address,
        GatewayDestination::Hostname(_) => authority_ip(&authority).unwrap_or(IpAddr::from([0, 0, 0, 0])),
    };
    let (workload, port, of) = match gateway_service(world, source, waypoint) {
        Some(gateway) => {
            let picked = pick(world, gateway, source, Wanted::Hbone(port), rng).map_err(|_| closed())?;
            (picked.0, picked.1, Some(gateway))
        }
        None => match &waypoint.destination {
            GatewayDestination::Address(a) => {
                let workload = world.workload_by_ip(&a.network, a.address).ok_or_else(unknown)?;
                (workload.clone(), port, None)
            }
            GatewayDestination::Hostname(_) => return Err(unknown()),
        },
    };
    let ip = select_address(source, &workload, of.map(|s| &**s), like)?;
    let expected = expected_identities(&workload, of.map(|s| &**s))?;
    Ok(Route {
        next_hop: SocketAddr::new(ip, port),
        tunnel: Some(Tunnel { authority, expected }),
        destination: Some(workload),
        service,
        via: Via::Waypoint,
    })
}

fn authority_ip(authority: &Authority) -> Option<IpAddr> {
    match authority {
        Authority::Ip(addr) => Some(addr.ip()),
        Authority::Host { .. } => None,
    }
}

fn gateway_name(gateway: &GatewayAddress) -> String {
    match &gateway.destination {
        GatewayDestination::Hostname(name) => name.to_string(),
        GatewayDestination::Address(address) => address.to_string(),
    }
}

pub(crate) fn gateway_service<'a>(
    world: &'a Snapshot,
    source: &Workload,
    gateway: &GatewayAddress,
) -> Option<&'a Arc<Service>> {
    match &gateway.destination {
        GatewayDestination::Hostname(name) => world.service(name),
        GatewayDestination::Address(a) => world.best_service_by_vip(&a.network, a.address, &source.namespace),
    }
}

/// One of the weighted waypoints, or the plain one when no weight counts.
fn service_waypoint<'a, R: Rng>(service: &'a Service, rng: &mut R) -> Option<&'a GatewayAddress> {
    let weighted = &service.weighted_waypoints;
    weighted_pick(weighted, |w| w.weight, rng).map(|w| &w.destination).or(service.waypoint.as_ref())
}

/// A waypoint's own pod must reach the workloads it fronts directly.
pub(crate) fn is_instance_of(world: &Snapshot, source: &Workload, waypoint: &GatewayAddress) -> bool {
    if let GatewayDestination::Address(a) = &waypoint.destination
        && a.network == source.network
        && source.addresses.contains(&a.address)
    {
        return true;
    }
    gateway_service(world, source, waypoint)
        .is_some_and(|gateway| world.all_endpoints(&gateway.key()).any(|(w, _)| w.uid == source.uid))
}

/// Which port the caller wants of a service.
#[derive(Clone, Copy)]
pub(crate) enum Wanted {
    Port(u16),
    /// A waypoint: an endpoint behind an application tunnel need not map the port.
    Hbone(u16),
}

impl Wanted {
    pub(crate) const fn port(self) -> u16 {
        match self {
            Self::Port(p) | Self::Hbone(p) => p,
        }
    }
}

/// One endpoint of `service` and the port to call it on.
fn pick<R: Rng>(
    world: &Snapshot,
    service: &Arc<Service>,
    source: &Workload,
    wanted: Wanted,
    rng: &mut R,
) -> Result<(Arc<Workload>, u16), NoRoute> {
    let preferred = prefer(service, source, usable(world, service, wanted)?);
    weighted_pick(&preferred, |(w, _)| w.capacity, rng)
        .map(|(w, target)| (Arc::clone(w), *target))
        .ok_or_else(|| NoRoute::NoHealthyUpstream { service: service.key(), port: wanted.port() })
}

/// The endpoints of `service` that can be called, each with the port to call it on.
pub(crate) fn usable<'a>(
    world: &'a Snapshot,
    service: &Service,
    wanted: Wanted,
) -> Result<Vec<(&'a Arc<Workload>, u16)>, NoRoute> {
    let port = wanted.port();
    let key = service.key();
    let defined = service.ports.get(&port);
    if defined.is_none() && matches!(wanted, Wanted::Port(_)) {
        return Err(NoRoute::UnknownPort { service: key, port });
    }
    let default_target = defined.map(|p| p.target_port).filter(|p| *p != 0);
    let candidates = world.endpoints(&key).filter_map(|(workload, ports)| {
        // Behind an application tunnel the port may go unmapped: the tunnel decides where the bytes end.
        let tunnelled = match (&workload.application_tunnel, wanted) {
            (Some(tunnel), Wanted::Port(_)) => tunnel.port.is_some(),
            (Some(_), Wanted::Hbone(_)) => true,
            (None, _) => false,
        };
        let target = ports.target(port).or(default_target).or(tunnelled.then_some(port))?;
        Some((workload, target))
    });
    let usable =
        candidates.filter(|(w, _)| !w.addresses.is_empty() || !w.hostname.is_empty() || w.network_gateway.is_some());
    Ok(usable.collect())
}

/// Keeps the candidates the service's load balancing wants for this source.
pub(crate) fn prefer<'a>(
    service: &Service,
    source: &Workload,
    candidates: Vec<(&'a Arc<Workload>, u16)>,
) -> Vec<(&'a Arc<Workload>, u16)> {
    let scopes = &service.load_balancing.routing_preferences;
    match service.load_balancing.mode {
        LoadBalancingMode::Standard | LoadBalancingMode::Passthrough => candidates,
        LoadBalancingMode::Strict => {
            candidates.into_iter().filter(|(w, _)| scopes.iter().all(|s| same(*s, source, w))).collect()
        }
        LoadBalancingMode::Failover => {
            let ranked: Vec<_> = candidates.into_iter().map(|c| (rank(scopes, source, c.0), c)).collect();
            let best = ranked.iter().map(|(r, _)| *r).max().unwrap_or(0);
            ranked.into_iter().filter(|(r, _)| *r == best).map(|(_, c)| c).collect()
        }
    }
}

/// Leading scopes in common. A first scope NETWORK outweighs all others together, and missing it does not end the
/// comparison: among endpoints of other networks the nearest still wins.
fn rank(scopes: &[RoutingScope], source: &Workload, candidate: &Workload) -> usize {
    let (mut rank, rest) = match scopes.split_first() {
        Some((RoutingScope::Network, rest)) => {
            (if same(RoutingScope::Network, source, candidate) { scopes.len() } else { 0 }, rest)
        }
        _ => (0, scopes),
    };
    rank += rest.iter().take_while(|s| same(**s, source, candidate)).count();
    rank
}

fn same(scope: RoutingScope, a: &Workload, b: &Workload) -> bool {
    match scope {
        RoutingScope::Region => a.locality.region == b.locality.region,
        RoutingScope::Zone => a.locality.zone == b.locality.zone,
        RoutingScope::Subzone => a.locality.subzone == b.locality.subzone,
        RoutingScope::Node => a.node == b.node,
        RoutingScope::Cluster => a.cluster_id == b.cluster_id,
        RoutingScope::Network => a.network == b.network,
    }
}

/// Chance in proportion to the weight; weight 0 is never picked.
fn weighted_pick<'a, T, R: Rng>(items: &'a [T], weight: impl Fn(&T) -> u32, rng: &mut R) -> Option<&'a T> {
    let total: u64 = items.iter().map(|i| u64::from(weight(i))).sum();
    if total == 0 {
        return None;
    }
    let mut ticket = rng.random_range(0..total);
    items.iter().find(|i| {
        let w = u64::from(weight(i));
        let hit = ticket < w;
        ticket = ticket.saturating_sub(w);
        hit
    })
}

/// The requested address if it is the workload's, else one the service's address families allow, preferably of the
/// family that was dialled.
fn select_address(
    source: &Workload,
    workload: &Workload,
    service: Option<&Service>,
    dialled: IpAddr,
) -> Result<IpAddr, NoRoute> {
    if workload.network != source.network {
        return Err(NoRoute::OtherNetwork { workload: workload.uid.clone(), network: workload.network.clone() });
    }
    if workload.addresses.contains(&dialled) {
        return Ok(dialled);
    }
    let families = service.map_or(IpFamilies::Automatic, |s| s.ip_families);
    let allowed: Vec<&IpAddr> = workload.addresses.iter().filter(|ip| allows(families, **ip)).collect();
    let family = allowed.iter().find(|ip| ip.is_ipv4() == dialled.is_ipv4());
    match family.or(allowed.first()) {
        Some(ip) => Ok(**ip),
        None => Err(NoRoute::NoAddress { workload: workload.uid.clone() }),
    }
}

const fn allows(families: IpFamilies, ip: IpAddr) -> bool {
    match families {
        IpFamilies::Automatic | IpFamilies::Dual => true,
        IpFamilies::Ipv4 => ip.is_ipv4(),
        IpFamilies::Ipv6 => ip.is_ipv6(),
    }
}

fn expected_identities(workload: &Workload, service: Option<&Service>) -> Result<Vec<Identity>, NoRoute> {
    let own = workload
        .identity()
        .map_err(|error| NoRoute::BadIdentity { workload: workload.uid.clone(), reason: error.to_string() })?;
    let extra = service.into_iter().flat_map(|s| s.subject_alt_names.iter().filter_map(|san| san.parse().ok()));
    Ok(std::iter::once(own).chain(extra).collect())
}

/// Why an inbound tunnel request has no target.
#[derive(Debug, Error, PartialEq)]
pub enum BadTarget {
    #[error("tunnel request for {asked} arrived at {here}")]
    WrongAddress { asked: SocketAddr, here: IpAddr },
    #[error("tunnel request for service {host}:{port}, which the local workload does not serve")]
    UnknownService { host: Arc<str>, port: u16 },
    #[error("tunnel request for port {0}, which is the proxy's own")]
    OwnPort(u16),
    #[error("the local workload wants an application tunnel, which is not supported yet")]
    ApplicationTunnel,
}

impl BadTarget {
    #[must_use]
    pub const fn status(&self) -> http::StatusCode {
        match self {
            Self::WrongAddress { .. } => http::StatusCode::BAD_REQUEST,
            Self::UnknownService { .. } | Self::OwnPort(_) | Self::ApplicationTunnel => {
                http::StatusCode::SERVICE_UNAVAILABLE
            }
        }
    }
}

/// Ports nobody may ask a tunnel for: dialling them would lead back into a proxy.
const OWN_PORTS: [u16; 3] = [15008, 15006, 15001];

/// The address of the application a tunnel request asks for. `here` is the address the TCP connection came to; the
/// host is always that one, whatever the request names.
///
/// # Errors
/// [`BadTarget`], which knows the status to answer.
pub fn inbound(
    world: &Snapshot,
    local: &Workload,
    here: IpAddr,
    authority: &Authority,
) -> Result<SocketAddr, BadTarget> {
    let tunnel = local.application_tunnel.as_ref();
    if tunnel.is_some_and(|t| t.protocol != ApplicationTunnelProtocol::None || t.port.is_some()) {
        return Err(BadTarget::ApplicationTunnel);
    }
    let port = match authority {
        Authority::Ip(asked) => {
            if asked.ip() != here && !fronts(world, local, asked.ip()) {
                return Err(BadTarget::WrongAddress { asked: *asked, here });
            }
            asked.port()
        }
        Authority::Host { host, port } => {
            let unknown = || BadTarget::UnknownService { host: host.clone(), port: *port };
            let service = world.service_by_hostname(host, &local.namespace).ok_or_else(unknown)?;
            let mapped = local.services.get(&service.key()).and_then(|ports| ports.target(*port));
            let default = service.ports.get(port).map(|p| p.target_port).filter(|p| *p != 0);
            mapped.or(default).ok_or_else(unknown)?
        }
    };
    if OWN_PORTS.contains(&port) {
        return Err(BadTarget::OwnPort(port));
    }
    Ok(SocketAddr::new(here, port))
}

/// May this peer speak for another: is it a waypoint or gateway that the local workload or one of its services names? It
/// passes on connections of clients that we do not see ourselves.
pub fn speaks_for_others(world: &Snapshot, local: &Workload, peer: &Identity) -> bool {
    let of_services = local
        .services
        .keys()
        .filter_map(|key| world.service(key))
        .flat_map(|s| s.waypoint.iter().chain(s.weighted_waypoints.iter().map(|w| &w.destination)));
    of_services.chain(&local.waypoint).chain(&local.network_gateway).any(|gateway| {
        let by_address = match &gateway.destination {
            GatewayDestination::Address(a) => world.workload_by_ip(&a.network, a.address),
            GatewayDestination::Hostname(_) => None,
        };
        let is_peer = |w: &Workload| w.identity().is_ok_and(|id| id == *peer);
        by_address.is_some_and(|w| is_peer(w))
            || gateway_service(world, local, gateway)
                .is_some_and(|s| world.all_endpoints(&s.key()).any(|(w, _)| is_peer(w)))
    })
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
        local.services.get(*key).is_some_and(|ports| ports.iter().any(|p| p.target_port == port))
    };
    let mut services = local.services.keys().filter(leads_here);
    match (services.next(), services.next()) {
        (Some(only), None) => world.service(only),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
