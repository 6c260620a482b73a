//! From one dialled address to its ends: every route that chance may bring, and what the other side says to each.

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};

use mesh::hbone::ConnectHeaders;
use mesh::identity::Identity;
use mesh::model::{GatewayAddress, LoadBalancingMode, Service, TunnelProtocol, Workload};
use mesh::net::OriginalDst;
use mesh::policy::{Connection, Original};
use mesh::telemetry::ResponseFlag;

use super::balance::{self, Balancing, Share};
use super::chance::Script;
use super::{Behind, Captured, Dialled, Hbone, Hop, Refusal, Source, View, Way, policies};
use crate::ending::Ending;
use crate::resolve::{self, NoRoute, Route, Via, Wanted};

pub(super) fn dialled(view: &View<'_>, workload: &Arc<Workload>, source: &Source, to: SocketAddr) -> Dialled {
    let is = meaning(view, workload, to);
    let excluded = excluded(view, to);
    if source.captured == Captured::No || excluded.is_some() {
        return uncaptured(view, workload, to, is, excluded);
    }
    let (balancing, scripts) = outcomes(view, workload, to);
    let ways = scripts.into_iter().map(|(probability, script)| {
        let mut way = Way::new(probability);
        follow(view, workload, source, to, script, &mut way);
        way
    });
    Dialled { address: to, is, balancing, ways: ways.collect() }
}

impl Way {
    fn new(probability: f64) -> Self {
        let (hop, refused) = (None, None);
        Self { probability, hop, policies: Vec::new(), notes: Vec::new(), behind: Vec::new(), refused }
    }
}

fn refused(by: &'static str, ending: impl Into<Ending>) -> Refusal {
    let ending = ending.into();
    Refusal { by, flag: ending.flag().as_str(), reason: ending.to_string() }
}

/// What the mesh takes an address for.
fn meaning(view: &View<'_>, source: &Workload, to: SocketAddr) -> Vec<String> {
    let (world, network) = (view.world, &*source.network);
    let mut said = Vec::new();
    let workload = world.workload_by_ip(network, to.ip());
    let service = world.best_service_by_vip(network, to.ip(), &source.namespace);
    if let Some(service) = service {
        let exact: Vec<_> = world.services_by_vip(network, to.ip()).collect();
        let others = exact.iter().filter(|other| other.key() != service.key()).count();
        let why = if !exact.iter().any(|s| s.key() == service.key()) {
            "whose range of addresses holds it"
        } else if others == 0 {
            "the only one with that address"
        } else if service.namespace == source.namespace {
            "of several with that address the one of the source's own namespace"
        } else if service.canonical {
            "of several with that address the canonical one"
        } else {
            "of several with that address the first that the source may see"
        };
        said.push(format!("it is service {}, {why}", service.key()));
    }
    match workload {
        Some(workload) => said.push(format!("it is an address of workload {}", workload.uid)),
        None if service.is_none() => {
            said.push("the mesh knows neither a service nor a workload with that address".into())
        }
        None => {}
    }
    said
}

fn excluded(view: &View<'_>, to: SocketAddr) -> Option<String> {
    let by_address = view.settings.excluded_destinations.iter().find(|range| range.contains(&to.ip()));
    let by_port = view.settings.excluded_ports.iter().find(|port| **port == to.port());
    by_address
        .map(|range| format!("EXCLUDED_DESTINATIONS has {range}"))
        .or_else(|| by_port.map(|port| format!("EXCLUDED_PORTS has {port}")))
}

/// What chance may decide, with the probability of each outcome and the numbers that bring it about.
fn outcomes(view: &View<'_>, source: &Workload, to: SocketAddr) -> (Vec<Balancing>, Vec<(f64, Script)>) {
    let (world, network) = (view.world, &*source.network);
    let workload = world.workload_by_ip(network, to.ip());
    let service = world.best_service_by_vip(network, to.ip(), &source.namespace);
    let waypoints: Vec<(f64, Script, Option<&GatewayAddress>)> = match (workload, service) {
        (None, Some(service)) => of_service(service),
        (Some(workload), None) => {
            let waypoint = workload.waypoint.as_ref().filter(|w| !resolve::is_instance_of(world, source, w));
            vec![(1.0, Script::default(), waypoint)]
        }
        _ => vec![(1.0, Script::default(), None)],
    };
    let (mut balancing, mut scripts) = (Vec::new(), Vec::new());
    for (probability, script, waypoint) in waypoints {
        let of = match waypoint {
            Some(gateway) => resolve::gateway_service(world, source, gateway)
                .map(|service| (service, Wanted::Hbone(gateway.hbone_mtls_port))),
            None => service
                .filter(|service| service.load_balancing.mode != LoadBalancingMode::Passthrough)
                .map(|service| (service, Wanted::Port(to.port()))),
        };
        let mut shares: Vec<Share> = Vec::new();
        if let Some((service, wanted)) = of {
            let (balanced, found) = balance::balance(view, source, service, wanted);
            balancing.push(balanced);
            shares = found;
        }
        if shares.is_empty() {
            scripts.push((probability, script));
        } else {
            let each = shares.iter().map(|share| {
                (probability * share.probability(), script.clone().then(share.before, share.weight, share.total))
            });
            scripts.extend(each);
        }
    }
    (balancing, scripts)
}

/// The waypoints of a service, by weight.
fn of_service(service: &Service) -> Vec<(f64, Script, Option<&GatewayAddress>)> {
    let total: u64 = service.weighted_waypoints.iter().map(|w| u64::from(w.weight)).sum();
    if total == 0 {
        return vec![(1.0, Script::default(), service.waypoint.as_ref())];
    }
    let mut before = 0;
    let mut choices = Vec::new();
    for waypoint in service.weighted_waypoints.iter().filter(|w| w.weight > 0) {
        let script = Script::default().then(before, waypoint.weight, total);
        choices.push((f64::from(waypoint.weight) / total as f64, script, Some(&waypoint.destination)));
        before += u64::from(waypoint.weight);
    }
    choices
}

/// One way, as the source's ztunnel and then the destination's would have it.
fn follow(
    view: &View<'_>,
    workload: &Arc<Workload>,
    source: &Source,
    to: SocketAddr,
    mut script: Script,
    way: &mut Way,
) {
    let decided = resolve::outbound(view.world, workload, OriginalDst(to), &mut script);
    let decided = match decided {
        Err(NoRoute::ByName(lacking)) => {
            let name = lacking.hostname().clone();
            way.notes.push(format!("its address is what DNS says of {name} at the time"));
            let Some(found) = view.names.get(&name) else {
                view.lacking.lock().unwrap_or_else(PoisonError::into_inner).insert(name);
                return;
            };
            let found = found.as_ref().map(Vec::as_slice).map_err(Clone::clone);
            lacking.resolved(workload, found, &mut script)
        }
        decided => decided,
    };
    let route = match decided {
        Ok(route) => route,
        Err(none) => return way.refused = Some(refused("source", none)),
    };
    way.hop = Some(hop(&route));
    let identity = match workload.identity() {
        Ok(identity) => identity,
        Err(error) => {
            let ending = Ending::BadIdentity { workload: workload.uid.to_string(), source: error };
            return way.refused = Some(refused("source", ending));
        }
    };
    let Some(local) = workload.addresses.iter().find(|ip| ip.is_ipv4() == route.next_hop.is_ipv4()) else {
        return way.refused = Some(refused("source", Ending::NoSource(route.next_hop)));
    };
    let from = SocketAddr::new(*local, 0);
    if route.tunnel.is_some()
        && let Some(state) = source.certificate.as_ref().filter(|state| state.starts_with("Unavailable"))
    {
        let reason = format!("certificate of {identity}: {state}");
        return way.refused = Some(Refusal { by: "source", flag: ResponseFlag::IdentityError.as_str(), reason });
    }
    match (route.via, &route.destination) {
        (Via::Passthrough, _) | (_, None) => {
            way.notes.push("passed through in plain TCP; what is there decides for itself".into());
        }
        (Via::Gateway, Some(_)) => {
            way.notes
                .push("the gateway passes the inner tunnel on without seeing it; who ends it is not known here".into());
        }
        (Via::Waypoint, Some(waypoint)) => behind_waypoint(view, (workload, &identity), waypoint, &route, to, way),
        (Via::Direct, Some(destination)) => {
            let (asked, refusal) = arrive(view, &route, destination, &identity, from, &mut way.notes);
            (way.policies, way.refused) = (asked, refusal);
        }
    }
}

fn hop(route: &Route) -> Hop {
    let via = match route.via {
        Via::Direct => "direct",
        Via::Waypoint => "waypoint",
        Via::Gateway => "gateway",
        Via::Passthrough => "passthrough",
    };
    let hbone = route.tunnel.as_ref().map(|tunnel| Hbone {
        authority: tunnel.authority.to_string(),
        expected: tunnel.expected.iter().map(ToString::to_string).collect(),
    });
    Hop { next: route.next_hop, via, workload: route.destination.as_ref().map(|w| w.uid.to_string()), hbone }
}

type Said = (Vec<policies::Asked>, Option<Refusal>);

/// At the destination itself.
fn arrive(
    view: &View<'_>,
    route: &Route,
    destination: &Arc<Workload>,
    identity: &Identity,
    from: SocketAddr,
    notes: &mut Vec<String>,
) -> Said {
    let Some(tunnel) = &route.tunnel else {
        return plaintext(view, destination, from, route.next_hop, notes);
    };
    if destination.native_tunnel {
        notes.push("it speaks HBONE by itself: whether it enforces L4 policy is its own business".into());
    }
    match resolve::inbound(view.world, destination, route.next_hop.ip(), &tunnel.authority) {
        Err(bad) => (Vec::new(), Some(refused("destination", bad))),
        Ok(target) => hbone(view, destination, (identity, None), from, target.app),
    }
}

/// The TLS of the destination takes identities of its own trust domain only; then policy is asked.
fn hbone(
    view: &View<'_>,
    destination: &Workload,
    (identity, original): (&Identity, Option<Original>),
    from: SocketAddr,
    app: SocketAddr,
) -> Said {
    let own = &destination.trust_domain;
    if **identity.trust_domain() != **own {
        let reason = format!("tls: the destination trusts {own} only, and {identity} is of another trust domain");
        return (Vec::new(), Some(Refusal { by: "destination", flag: ResponseFlag::TlsFailure.as_str(), reason }));
    }
    let conn = Connection { source: Some(identity.clone()), source_ip: from.ip(), destination: app, original };
    policies::ask(view.world, destination, &conn)
}

/// In plain TCP: asked without an identity, if there is a ztunnel to ask.
fn plaintext(
    view: &View<'_>,
    destination: &Workload,
    from: SocketAddr,
    to: SocketAddr,
    notes: &mut Vec<String>,
) -> Said {
    if destination.protocol == TunnelProtocol::None || destination.native_tunnel {
        notes.push("in plain TCP to a workload that no ztunnel takes connections for: no L4 policy is enforced".into());
        return Default::default();
    }
    notes.push("in plain TCP: policy is asked without an identity".into());
    let conn = Connection { source: None, source_ip: from.ip(), destination: to, original: None };
    policies::ask(view.world, destination, &conn)
}

/// The waypoint decides by policies of its own; what can be told is whether the endpoints would let it in.
fn behind_waypoint(
    view: &View<'_>,
    (source, client): (&Workload, &Identity),
    waypoint: &Arc<Workload>,
    route: &Route,
    to: SocketAddr,
    way: &mut Way,
) {
    way.notes.push("the waypoint applies the L7 policies and routes of the service, which are not known here".into());
    let endpoints: Vec<(Arc<Workload>, u16)> = match &route.service {
        Some(service) => {
            let usable = resolve::usable(view.world, service, waypoint, Wanted::Port(to.port())).unwrap_or_default();
            usable.into_iter().map(|(workload, port)| (workload.clone(), port)).collect()
        }
        None => {
            let workload = view.world.workload_by_ip(&source.network, to.ip());
            workload.map(|workload| (workload.clone(), to.port())).into_iter().collect()
        }
    };
    let (Ok(identity), Some(from)) = (waypoint.identity(), waypoint.addresses.first()) else { return };
    let from = SocketAddr::new(*from, 0);
    for (endpoint, port) in endpoints {
        let Some(ip) = endpoint.addresses.first() else { continue };
        let address = SocketAddr::new(*ip, port);
        let (asked, refused) = match endpoint.protocol {
            TunnelProtocol::Hbone => {
                // As our waypoints say it.
                let says = ConnectHeaders {
                    original_peer: Some(client.clone()),
                    forwarded_for: source.addresses.first().map(|ip| SocketAddr::new(*ip, 0)),
                    ..ConnectHeaders::default()
                };
                let original = resolve::original(view.world, &endpoint, port, &identity, &says);
                hbone(view, &endpoint, (&identity, original), from, address)
            }
            TunnelProtocol::None => Default::default(),
        };
        way.behind.push(Behind { endpoint: endpoint.uid.to_string(), address, policies: asked, refused });
    }
    if let Some(first) = way.behind.first().and_then(|first| first.refused.clone())
        && way.behind.iter().all(|endpoint| endpoint.refused.is_some())
    {
        let reason = format!("every endpoint refuses the waypoint ({identity}): {}", first.reason);
        way.refused = Some(Refusal { reason, ..first });
    }
}

/// No ztunnel has a hand in it at the source: kube-proxy, or whoever is in its place, translates a service's address.
fn uncaptured(
    view: &View<'_>,
    source: &Workload,
    to: SocketAddr,
    is: Vec<String>,
    excluded: Option<String>,
) -> Dialled {
    let why = excluded.unwrap_or_else(|| "the source is not in the mesh".into());
    let service = view.world.best_service_by_vip(&source.network, to.ip(), &source.namespace);
    let mut balancing = Vec::new();
    let ends: Vec<(f64, Option<Arc<Workload>>, SocketAddr)> = match service {
        Some(service) => {
            let usable = resolve::usable(view.world, service, source, Wanted::Port(to.port())).unwrap_or_default();
            balancing.push(balance::balance(view, source, service, Wanted::Port(to.port())).0);
            let ends: Vec<_> = usable
                .iter()
                .filter_map(|(workload, port)| {
                    let ip = workload.addresses.iter().find(|ip| ip.is_ipv4() == to.is_ipv4())?;
                    Some(((*workload).clone(), SocketAddr::new(*ip, *port)))
                })
                .collect();
            let share = 1.0 / ends.len() as f64;
            ends.into_iter().map(|(workload, at)| (share, Some(workload), at)).collect()
        }
        None => vec![(1.0, view.world.workload_by_ip(&source.network, to.ip()).cloned(), to)],
    };
    let mut ways: Vec<Way> = Vec::new();
    for (probability, workload, at) in ends {
        let mut way = Way::new(probability);
        way.notes.push(format!("not captured ({why}): it goes out as plain TCP"));
        way.hop = Some(Hop {
            next: at,
            via: "passthrough",
            workload: workload.as_ref().map(|w| w.uid.to_string()),
            hbone: None,
        });
        let from = source.addresses.iter().find(|ip| ip.is_ipv4() == at.is_ipv4());
        if let (Some(workload), Some(from)) = (workload, from) {
            let said = plaintext(view, &workload, SocketAddr::new(*from, 0), at, &mut way.notes);
            (way.policies, way.refused) = said;
        }
        ways.push(way);
    }
    if ways.is_empty() {
        let mut way = Way::new(1.0);
        let reason = format!("no endpoint of the service can be called on port {}", to.port());
        way.refused = Some(Refusal { by: "source", flag: ResponseFlag::None.as_str(), reason });
        ways.push(way);
    }
    Dialled { address: to, is, balancing, ways }
}
