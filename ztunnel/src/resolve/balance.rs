//! One endpoint of a service for one source: who may be called, who is preferred, and chance by weight.

use std::sync::Arc;

use mesh::model::{LoadBalancingMode, RoutingScope, Service, Workload};
use mesh::store::Snapshot;
use rand::Rng;

use super::NoRoute;

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
pub(super) fn pick<R: Rng>(
    world: &Snapshot,
    service: &Arc<Service>,
    source: &Workload,
    wanted: Wanted,
    rng: &mut R,
) -> Result<(Arc<Workload>, u16), NoRoute> {
    let preferred = prefer(service, source, usable(world, service, source, wanted)?);
    weighted_pick(&preferred, |(w, _)| w.capacity, rng)
        .map(|(w, target)| (Arc::clone(w), *target))
        .ok_or_else(|| NoRoute::NoHealthyUpstream { service: service.key(), port: wanted.port() })
}

/// The endpoints of `service` that `source` can call, each with the port to call it on.
pub(crate) fn usable<'a>(
    world: &'a Snapshot,
    service: &Service,
    source: &Workload,
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
    // Behind a gateway an address is not needed: the other side chooses who answers.
    let beyond = |w: &Workload| w.network != source.network && w.network_gateway.is_some();
    let usable = candidates.filter(|(w, _)| !w.addresses.is_empty() || !w.hostname.is_empty() || beyond(w));
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
pub(super) fn weighted_pick<'a, T, R: Rng>(items: &'a [T], weight: impl Fn(&T) -> u32, rng: &mut R) -> Option<&'a T> {
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
