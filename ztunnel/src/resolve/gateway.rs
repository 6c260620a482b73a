//! Proxies on the way: waypoints, and the gateways by which other networks are reached.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mesh::hbone::Authority;
use mesh::model::{GatewayAddress, GatewayDestination, Service, Workload};
use mesh::store::Snapshot;
use rand::Rng;

use super::address::{Hop, Plan, expected_identities, named_identities};
use super::balance::{Wanted, pick, weighted_pick};
use super::{NoRoute, Route, Tunnel, Via};

/// What is known of one connection while its way is sought.
#[derive(Clone, Copy)]
pub(super) struct Wish<'a> {
    pub(super) world: &'a Snapshot,
    pub(super) source: &'a Workload,
    pub(super) dst: SocketAddr,
    /// What `dst` is an address of.
    pub(super) service: Option<&'a Arc<Service>>,
}

/// To a waypoint, which gets the address exactly as the application dialled it.
pub(super) fn to_waypoint<R: Rng>(wish: Wish<'_>, waypoint: &GatewayAddress, rng: &mut R) -> Result<Route, NoRoute> {
    let Wish { world, source, dst, service } = wish;
    let unknown = || NoRoute::UnknownWaypoint { waypoint: waypoint.destination.to_string() };
    let closed = || NoRoute::WaypointUnavailable { waypoint: waypoint.destination.to_string() };
    let found = match gateway_service(world, source, waypoint) {
        Some(of) => Found::Service(of),
        None => Found::Workload(workload_at(world, waypoint).ok_or_else(unknown)?),
    };
    let chosen = found.choose(world, source, waypoint, rng).ok_or_else(closed)?;
    if chosen.workload.network != source.network {
        return to_other_network(wish, &chosen.workload, chosen.of.as_deref(), rng);
    }
    let expected = expected_identities(&chosen.workload, chosen.of.as_deref())?;
    let tunnel = Tunnel { authority: Authority::Ip(dst), expected, inner: None };
    chosen.plan(service, tunnel, Via::Waypoint).like(address_of(waypoint).unwrap_or(dst.ip()))
}

/// To an endpoint, or a waypoint, of another network: through the gateway that it names. Inside the tunnel that ends at
/// the gateway there is a second one, whose far end must be known by the names of `of`, the service that the endpoint
/// was chosen of: which of its workloads answers is for the other side to choose.
pub(super) fn to_other_network<R: Rng>(
    wish: Wish<'_>,
    endpoint: &Workload,
    of: Option<&Service>,
    rng: &mut R,
) -> Result<Route, NoRoute> {
    let Wish { world, source, dst, service } = wish;
    let (workload, network) = (&endpoint.uid, &endpoint.network);
    let gateway = endpoint
        .network_gateway
        .as_ref()
        .ok_or_else(|| NoRoute::OtherNetwork { workload: workload.clone(), network: network.clone() })?;
    // Over there only names mean the same as here.
    let (Some(service), Some(of)) = (service, of) else {
        return Err(NoRoute::NotByService { workload: workload.clone(), network: network.clone() });
    };
    let inner: Vec<_> = named_identities(of).collect();
    if inner.is_empty() {
        return Err(NoRoute::Unrecognisable { service: of.key(), network: network.clone() });
    }
    let unknown = || NoRoute::UnknownGateway { gateway: gateway.destination.to_string(), network: network.clone() };
    let closed = || NoRoute::GatewayUnavailable { gateway: gateway.destination.to_string(), network: network.clone() };
    let found = match gateway_service(world, source, gateway) {
        Some(of) => Found::Service(of),
        None => Found::Workload(workload_at(world, gateway).or_else(|| named(world, gateway)).ok_or_else(unknown)?),
    };
    let chosen = found.choose(world, source, gateway, rng).ok_or_else(closed)?;
    let expected = expected_identities(&chosen.workload, chosen.of.as_deref())?;
    let authority = Authority::Host { host: service.hostname.clone(), port: dst.port() };
    let tunnel = Tunnel { authority, expected, inner: Some(inner) };
    chosen.plan(Some(service), tunnel, Via::Gateway).like(address_of(gateway).unwrap_or(dst.ip()))
}

/// What a reference to a proxy stands for.
enum Found<'a> {
    Service(&'a Arc<Service>),
    Workload(&'a Arc<Workload>),
}

/// One instance of a proxy.
struct Chosen {
    workload: Arc<Workload>,
    port: u16,
    of: Option<Arc<Service>>,
}

impl Found<'_> {
    fn choose<R: Rng>(
        self,
        world: &Snapshot,
        source: &Workload,
        gateway: &GatewayAddress,
        rng: &mut R,
    ) -> Option<Chosen> {
        let port = gateway.hbone_mtls_port;
        match self {
            Found::Workload(workload) => Some(Chosen { workload: workload.clone(), port, of: None }),
            Found::Service(of) => {
                let (workload, port) = pick(world, of, source, Wanted::Hbone(port), rng).ok()?;
                Some(Chosen { workload, port, of: Some(of.clone()) })
            }
        }
    }
}

impl Chosen {
    fn plan(self, service: Option<&Arc<Service>>, tunnel: Tunnel, via: Via) -> Plan {
        let Self { workload, port, of } = self;
        Plan { workload, of, service: service.cloned(), port, hop: Hop::Proxy { tunnel, via } }
    }
}

const fn address_of(gateway: &GatewayAddress) -> Option<IpAddr> {
    match &gateway.destination {
        GatewayDestination::Address(a) => Some(a.address),
        GatewayDestination::Hostname(_) => None,
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

/// The workload that a reference names by its address.
pub(super) fn workload_at<'a>(world: &'a Snapshot, gateway: &GatewayAddress) -> Option<&'a Arc<Workload>> {
    match &gateway.destination {
        GatewayDestination::Hostname(_) => None,
        GatewayDestination::Address(a) => world.workload_by_ip(&a.network, a.address),
    }
}

/// The workload that a reference names by its own host name, not that of a service.
pub(super) fn named<'a>(world: &'a Snapshot, gateway: &GatewayAddress) -> Option<&'a Arc<Workload>> {
    match &gateway.destination {
        GatewayDestination::Hostname(name) => world.workload_by_hostname(name),
        GatewayDestination::Address(_) => None,
    }
}

/// All that a service names, one of which its connections go through.
pub(super) fn waypoints_of(service: &Service) -> impl Iterator<Item = &GatewayAddress> {
    service.waypoint.iter().chain(service.weighted_waypoints.iter().map(|w| &w.destination))
}

/// One of the weighted waypoints, or the plain one when no weight counts.
pub(super) fn service_waypoint<'a, R: Rng>(service: &'a Service, rng: &mut R) -> Option<&'a GatewayAddress> {
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
