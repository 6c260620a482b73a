//! Where a captured connection goes: a pure function of a snapshot, the source workload and the original destination.
//!
//! No sockets, no clock and no waiting here; chance comes in as an argument. What cannot be routed says why by name,
//! and a destination that asks for a waypoint never falls back to a direct path.

mod address;
mod balance;
mod gateway;
mod inbound;
pub mod missing;

use std::net::SocketAddr;
use std::sync::Arc;

use mesh::hbone::Authority;
use mesh::identity::Identity;
use mesh::model::{LoadBalancingMode, NamespacedHostname, Service, Workload};
use mesh::net::OriginalDst;
use mesh::store::Snapshot;
use mesh::telemetry::ResponseFlag;
use rand::Rng;
use thiserror::Error;

use address::{Hop, Plan};
use balance::pick;
use gateway::{Wish, service_waypoint, to_other_network, to_waypoint};

pub use address::ByName;
pub(crate) use balance::{Wanted, prefer, usable};
pub(crate) use gateway::{gateway_service, is_instance_of};
pub use inbound::{BadTarget, Target, comes_through_gateway, inbound, inbound_service, original, speaks_for_others};

/// HBONE's port on every pod address.
pub const HBONE_PORT: u16 = 15008;

/// The way to one destination.
#[derive(Debug, Clone, PartialEq)]
pub struct Route {
    /// Where the TCP connection goes: the application, port 15008 of its pod, a waypoint pod, or a gateway.
    pub next_hop: SocketAddr,
    /// `None`: plain TCP, because the next hop does not speak HBONE or is not known at all.
    pub tunnel: Option<Tunnel>,
    /// Who answers at `next_hop` (a waypoint's or gateway's workload when there is one); `None` when nobody knows the
    /// address.
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
    /// The gateway to another network, which passes on what is inside without seeing it.
    Gateway,
    /// The mesh has nothing to say about this destination.
    Passthrough,
}

/// What to say and whom to expect inside the TLS connection to the next hop.
#[derive(Debug, Clone, PartialEq)]
pub struct Tunnel {
    pub authority: Authority,
    /// Any one of these must be proven by the peer; never empty.
    pub expected: Vec<Identity>,
    /// Another tunnel inside this one, to the same authority: whoever ends it must prove one of these; never empty.
    pub inner: Option<Vec<Identity>>,
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
    #[error(
        "whether {unknown} is of the mesh, the control plane has not said within {seconds} s; the connection stays closed"
    )]
    Unanswered { unknown: String, seconds: u64 },
    #[error("workload {workload} has no address this source can use")]
    NoAddress { workload: Arc<str> },
    /// Not the end: whoever can look names up completes it.
    #[error("workload {} is known by its hostname {} only", .0.workload(), .0.hostname())]
    ByName(Box<ByName>),
    #[error("looking up {hostname}, the endpoint of workload {workload}: {reason}")]
    NameFailed { workload: Arc<str>, hostname: Arc<str>, reason: String },
    #[error("workload {workload}: {reason}")]
    BadIdentity { workload: Arc<str>, reason: String },
    #[error("workload {workload} is on network {network:?} and names no gateway to it")]
    OtherNetwork { workload: Arc<str>, network: Arc<str> },
    #[error(
        "workload {workload} is on network {network:?}, where only endpoints and waypoints of services are reached"
    )]
    NotByService { workload: Arc<str>, network: Arc<str> },
    #[error("service {service} has endpoints on network {network:?} and no identity that tells them from others")]
    Unrecognisable { service: NamespacedHostname, network: Arc<str> },
    #[error("gateway {gateway} to network {network:?} is not known")]
    UnknownGateway { gateway: String, network: Arc<str> },
    #[error("gateway {gateway} to network {network:?} has no ready endpoint")]
    GatewayUnavailable { gateway: String, network: Arc<str> },
}

impl NoRoute {
    /// The response flag of a connection that ended so.
    #[must_use]
    pub fn flag(&self) -> ResponseFlag {
        match self {
            Self::NoHealthyUpstream { .. } | Self::UnknownPort { .. } | Self::GatewayUnavailable { .. } => {
                ResponseFlag::NoHealthyUpstream
            }
            Self::UnknownWaypoint { .. } | Self::WaypointUnavailable { .. } => ResponseFlag::WaypointUnavailable,
            Self::BadIdentity { .. } | Self::Unrecognisable { .. } => ResponseFlag::IdentityError,
            Self::Unanswered { .. }
            | Self::NoAddress { .. }
            | Self::ByName(_)
            | Self::NameFailed { .. }
            | Self::OtherNetwork { .. }
            | Self::NotByService { .. }
            | Self::UnknownGateway { .. } => ResponseFlag::Connect,
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
    let wish = Wish { world, source, dst, service };

    // A waypoint belongs to what was dialled: an address that is a workload's is never a call to a service.
    if let (None, Some(service)) = (by_address, service)
        && let Some(waypoint) = service_waypoint(service, rng)
    {
        return to_waypoint(wish, waypoint, rng);
    }
    if let Some(service) = service {
        if service.load_balancing.mode == LoadBalancingMode::Passthrough {
            return Ok(passthrough(dst, Some(service.clone())));
        }
        let (workload, port) = pick(world, service, source, Wanted::Port(dst.port()), rng)?;
        if workload.network != source.network {
            return to_other_network(wish, &workload, Some(service), rng);
        }
        return direct(workload, Some(service), port, dst);
    }
    let Some(workload) = by_address else { return Ok(passthrough(dst, None)) };
    if let Some(waypoint) = &workload.waypoint
        && !is_instance_of(world, source, waypoint)
    {
        return to_waypoint(wish, waypoint, rng);
    }
    direct(workload.clone(), None, dst.port(), dst)
}

fn passthrough(dst: SocketAddr, service: Option<Arc<Service>>) -> Route {
    Route { next_hop: dst, tunnel: None, destination: None, service, via: Via::Passthrough }
}

/// Straight to the workload.
fn direct(
    workload: Arc<Workload>,
    service: Option<&Arc<Service>>,
    port: u16,
    dst: SocketAddr,
) -> Result<Route, NoRoute> {
    let service = service.cloned();
    Plan { workload, of: service.clone(), service, port, hop: Hop::Destination }.like(dst.ip())
}

#[cfg(test)]
mod tests;
