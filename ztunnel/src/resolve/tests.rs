use std::collections::BTreeMap;

use mesh::model::{
    ApplicationTunnel, EndpointPort, HealthStatus, LoadBalancing, Locality, NetworkAddress, ServicePort, Visibility,
    WeightedWaypoint,
};
use mesh::store::{Store, Update};
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::*;

/// A mesh told as a story. The client is 10.0.0.1 on node-a, region r1, zone z1; everything is in namespace shop.
struct World(Vec<Workload>, Vec<Service>);

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn dst(text: &str) -> OriginalDst {
    OriginalDst(text.parse().unwrap())
}

fn workload(name: &str, address: &str) -> Workload {
    Workload {
        uid: format!("Kubernetes//Pod/shop/{name}").into(),
        name: name.into(),
        namespace: "shop".into(),
        service_account: format!("sa-{name}").into(),
        addresses: vec![ip(address)],
        protocol: TunnelProtocol::Hbone,
        ..Workload::default()
    }
}

fn client() -> Workload {
    let locality = Locality { region: "r1".into(), zone: "z1".into(), subzone: "".into() };
    Workload { node: "node-a".into(), locality, ..workload("client", "10.0.0.1") }
}

fn service(name: &str, vip: &str) -> Service {
    Service {
        name: name.into(),
        namespace: "shop".into(),
        hostname: format!("{name}.shop.svc").into(),
        vips: (!vip.is_empty()).then(|| NetworkAddress { network: "".into(), address: ip(vip) }).into_iter().collect(),
        ports: BTreeMap::from([(80, ServicePort { target_port: 8080, app_protocol: Default::default() })]),
        ..Service::default()
    }
}

fn serves(mut workload: Workload, service: &str, ports: &[(u16, u16)]) -> Workload {
    let ports = ports.iter().map(|(service_port, target_port)| EndpointPort {
        service_port: *service_port,
        target_port: *target_port,
        app_protocol: Default::default(),
    });
    workload.services.insert(NamespacedHostname::new("shop", format!("{service}.shop.svc")), ports.collect());
    workload
}

fn gateway(name: &str) -> GatewayAddress {
    let name = NamespacedHostname::new("shop", format!("{name}.shop.svc"));
    GatewayAddress { destination: GatewayDestination::Hostname(name), hbone_mtls_port: 15008 }
}

fn waypoint_service() -> Service {
    let mut service = service("waypoint", "10.96.0.99");
    service.ports = BTreeMap::from([(15008, ServicePort { target_port: 15008, app_protocol: Default::default() })]);
    service
}

fn waypoint_pod() -> Workload {
    serves(workload("waypoint", "10.0.9.9"), "waypoint", &[(15008, 15008)])
}

impl World {
    fn new() -> Self {
        Self(vec![client()], Vec::new())
    }
    fn workload(mut self, workload: Workload) -> Self {
        self.0.push(workload);
        self
    }
    fn service(mut self, service: Service) -> Self {
        self.1.push(service);
        self
    }
    fn snapshot(self) -> Arc<Snapshot> {
        let store = Store::new();
        let mut update = Update::new();
        self.0.into_iter().for_each(|w| update.push_workload(w));
        self.1.into_iter().for_each(|s| update.push_service(s));
        store.apply(update);
        store.snapshot()
    }
    fn route(self, from: &Workload, to: &str) -> Result<Route, NoRoute> {
        outbound(&self.snapshot(), from, dst(to), &mut StdRng::seed_from_u64(7))
    }
}

/// (next hop, authority, identities' service accounts, kind)
fn brief(route: &Route) -> (String, Option<String>, Vec<String>, Via) {
    let tunnel = route.tunnel.as_ref();
    let accounts = tunnel.into_iter().flat_map(|t| &t.expected).map(|i| i.service_account().to_string());
    (route.next_hop.to_string(), tunnel.map(|t| t.authority.to_string()), accounts.collect(), route.via)
}

#[track_caller]
fn check(route: Result<Route, NoRoute>, hop: &str, authority: Option<&str>, accounts: &[&str], via: Via) {
    let route = route.unwrap();
    let accounts: Vec<String> = accounts.iter().map(|a| (*a).to_owned()).collect();
    assert_eq!(brief(&route), (hop.to_owned(), authority.map(str::to_owned), accounts, via));
}

#[test]
fn unknown_destination_passes_through() {
    check(World::new().route(&client(), "192.0.2.1:443"), "192.0.2.1:443", None, &[], Via::Passthrough);
}

#[test]
fn workload_is_called_on_the_port_that_was_dialled() {
    let world = World::new().workload(workload("web", "10.0.0.2"));
    check(world.route(&client(), "10.0.0.2:8080"), "10.0.0.2:15008", Some("10.0.0.2:8080"), &["sa-web"], Via::Direct);
}

#[test]
fn workload_without_hbone_gets_plain_tcp() {
    let world = World::new().workload(Workload { protocol: TunnelProtocol::None, ..workload("web", "10.0.0.2") });
    check(world.route(&client(), "10.0.0.2:8080"), "10.0.0.2:8080", None, &[], Via::Direct);
}

#[test]
fn service_is_resolved_to_an_endpoint_and_its_target_port() {
    let web = serves(workload("web", "10.0.0.2"), "api", &[(80, 9090)]);
    let world = World::new().service(service("api", "10.96.0.1")).workload(web);
    check(world.route(&client(), "10.96.0.1:80"), "10.0.0.2:15008", Some("10.0.0.2:9090"), &["sa-web"], Via::Direct);
}

#[test]
fn service_default_target_port_counts_where_the_endpoint_names_none() {
    let web = serves(workload("web", "10.0.0.2"), "api", &[]);
    let world = World::new().service(service("api", "10.96.0.1")).workload(web);
    check(world.route(&client(), "10.96.0.1:80"), "10.0.0.2:15008", Some("10.0.0.2:8080"), &["sa-web"], Via::Direct);
}

#[test]
fn extra_names_of_a_service_are_accepted_beside_the_workload() {
    let web = serves(workload("web", "10.0.0.2"), "api", &[(80, 80)]);
    let mut api = service("api", "10.96.0.1");
    api.subject_alt_names = vec!["spiffe://cluster.local/ns/shop/sa/extra".into(), "not-spiffe".into()];
    let world = World::new().service(api).workload(web);
    let hop = "10.0.0.2:15008";
    check(world.route(&client(), "10.96.0.1:80"), hop, Some("10.0.0.2:80"), &["sa-web", "extra"], Via::Direct);
}

#[test]
fn service_never_falls_back_to_passthrough() {
    let none = World::new().service(service("api", "10.96.0.1"));
    assert!(matches!(none.route(&client(), "10.96.0.1:80"), Err(NoRoute::NoHealthyUpstream { port: 80, .. })));
    let sick = Workload { status: HealthStatus::Unhealthy, ..serves(workload("web", "10.0.0.2"), "api", &[(80, 80)]) };
    let unhealthy = World::new().service(service("api", "10.96.0.1")).workload(sick);
    assert!(matches!(unhealthy.route(&client(), "10.96.0.1:80"), Err(NoRoute::NoHealthyUpstream { .. })));
    let port = World::new().service(service("api", "10.96.0.1"));
    assert!(matches!(port.route(&client(), "10.96.0.1:81"), Err(NoRoute::UnknownPort { port: 81, .. })));
}

#[test]
fn own_namespace_wins_where_a_vip_is_shared() {
    let mut other = service("api", "10.96.0.1");
    other.namespace = "other".into();
    other.hostname = "api.other.svc".into();
    other.canonical = true;
    let mut hidden = service("api", "10.96.0.1");
    hidden.namespace = "third".into();
    hidden.visibility = Visibility::Namespace;
    let web = serves(workload("web", "10.0.0.2"), "api", &[(80, 80)]);
    let world = World::new().service(other).service(hidden).service(service("api", "10.96.0.1")).workload(web);
    check(world.route(&client(), "10.96.0.1:80"), "10.0.0.2:15008", Some("10.0.0.2:80"), &["sa-web"], Via::Direct);
}

#[test]
fn passthrough_service_keeps_the_original_destination() {
    let mut api = service("api", "10.96.0.1");
    api.load_balancing.mode = LoadBalancingMode::Passthrough;
    let world = World::new().service(api);
    check(world.route(&client(), "10.96.0.1:443"), "10.96.0.1:443", None, &[], Via::Passthrough);
}

#[test]
fn a_range_says_nothing_of_an_address_that_is_a_workloads() {
    let range = |mode| {
        let mut wide = service("wide", "192.0.2.1");
        wide.vips.clear();
        wide.cidr_vips = vec!["/10.0.0.0/8".parse().unwrap()];
        wide.load_balancing.mode = mode;
        wide
    };
    let web = || workload("web", "10.0.0.2");
    for mode in [LoadBalancingMode::Passthrough, LoadBalancingMode::Standard] {
        let world = World::new().service(range(mode)).workload(web());
        let route = world.route(&client(), "10.0.0.2:8080");
        check(route, "10.0.0.2:15008", Some("10.0.0.2:8080"), &["sa-web"], Via::Direct);
    }
    let world = World::new().service(range(LoadBalancingMode::Passthrough)).workload(web());
    let other = world.route(&client(), "10.0.0.3:8080").unwrap();
    assert_eq!((other.next_hop, other.tunnel), ("10.0.0.3:8080".parse().unwrap(), None));
    assert_eq!(&*other.service.expect("the range's").name, "wide", "an address that nobody has");
    let mut exact = range(LoadBalancingMode::Passthrough);
    exact.vips = vec!["/10.0.0.2".parse().unwrap()];
    let route = World::new().service(exact).workload(web()).route(&client(), "10.0.0.2:8080").unwrap();
    assert_eq!(route.via, Via::Passthrough, "an exact one counts");
}

#[test]
fn a_waypoint_named_by_its_pods_address_is_not_hidden_by_a_range() {
    let mut wide = service("wide", "192.0.2.1");
    wide.vips.clear();
    wide.cidr_vips = vec!["/0.0.0.0/0".parse().unwrap()];
    wide.load_balancing.mode = LoadBalancingMode::Passthrough;
    let mut by_address = gateway("waypoint");
    by_address.destination = GatewayDestination::Address("/10.0.9.9".parse().unwrap());
    let web = Workload { waypoint: Some(by_address), ..workload("web", "10.0.0.2") };
    let world = World::new().service(wide).workload(web).workload(waypoint_pod());
    let hop = "10.0.9.9:15008";
    check(world.route(&client(), "10.0.0.2:99"), hop, Some("10.0.0.2:99"), &["sa-waypoint"], Via::Waypoint);
}

#[test]
fn service_waypoint_gets_the_address_as_it_was_dialled() {
    let mut api = service("api", "10.96.0.1");
    api.waypoint = Some(gateway("waypoint"));
    let world = World::new().service(api).service(waypoint_service()).workload(waypoint_pod());
    let hop = "10.0.9.9:15008";
    check(world.route(&client(), "10.96.0.1:80"), hop, Some("10.96.0.1:80"), &["sa-waypoint"], Via::Waypoint);
}

#[test]
fn workload_waypoint_gets_the_address_as_it_was_dialled() {
    let web = Workload { waypoint: Some(gateway("waypoint")), ..workload("web", "10.0.0.2") };
    let world = World::new().workload(web).service(waypoint_service()).workload(waypoint_pod());
    let hop = "10.0.9.9:15008";
    check(world.route(&client(), "10.0.0.2:99"), hop, Some("10.0.0.2:99"), &["sa-waypoint"], Via::Waypoint);
}

#[test]
fn service_call_ignores_the_waypoint_of_the_workload_and_the_reverse() {
    let web =
        Workload { waypoint: Some(gateway("waypoint")), ..serves(workload("web", "10.0.0.2"), "api", &[(80, 80)]) };
    let world = World::new()
        .workload(web.clone())
        .service(service("api", "10.96.0.1"))
        .service(waypoint_service())
        .workload(waypoint_pod());
    check(world.route(&client(), "10.96.0.1:80"), "10.0.0.2:15008", Some("10.0.0.2:80"), &["sa-web"], Via::Direct);
    let mut api = service("api", "10.96.0.1");
    api.waypoint = Some(gateway("waypoint"));
    let plain = serves(workload("web", "10.0.0.2"), "api", &[(80, 80)]);
    let world = World::new().workload(plain).service(api).service(waypoint_service()).workload(waypoint_pod());
    check(world.route(&client(), "10.0.0.2:80"), "10.0.0.2:15008", Some("10.0.0.2:80"), &["sa-web"], Via::Direct);
}

#[test]
fn waypoint_reaches_what_it_fronts_directly() {
    let web = Workload { waypoint: Some(gateway("waypoint")), ..workload("web", "10.0.0.2") };
    let world = World::new().workload(web).service(waypoint_service()).workload(waypoint_pod());
    let route = world.route(&waypoint_pod(), "10.0.0.2:99");
    check(route, "10.0.0.2:15008", Some("10.0.0.2:99"), &["sa-web"], Via::Direct);
}

#[test]
fn missing_or_unready_waypoint_stays_closed() {
    let mut api = service("api", "10.96.0.1");
    api.waypoint = Some(gateway("waypoint"));
    let web = serves(workload("web", "10.0.0.2"), "api", &[(80, 80)]);
    let missing = World::new().service(api.clone()).workload(web.clone()).route(&client(), "10.96.0.1:80").unwrap_err();
    assert!(matches!(missing, NoRoute::UnknownWaypoint { .. }));
    assert_eq!(missing.flag(), ResponseFlag::WaypointUnavailable);
    let unready = World::new().service(api).workload(web).service(waypoint_service());
    let unready = unready.route(&client(), "10.96.0.1:80").unwrap_err();
    assert!(matches!(unready, NoRoute::WaypointUnavailable { .. }));
}

#[test]
fn weighted_waypoints_count_before_the_plain_one() {
    let mut api = service("api", "10.96.0.1");
    api.waypoint = Some(gateway("nowhere"));
    api.weighted_waypoints = vec![
        WeightedWaypoint { destination: gateway("nowhere"), weight: 0 },
        WeightedWaypoint { destination: gateway("waypoint"), weight: 3 },
    ];
    let world = World::new().service(api).service(waypoint_service()).workload(waypoint_pod());
    let hop = "10.0.9.9:15008";
    check(world.route(&client(), "10.96.0.1:80"), hop, Some("10.96.0.1:80"), &["sa-waypoint"], Via::Waypoint);
}

#[test]
fn waypoint_with_an_application_tunnel_needs_no_port_mapping() {
    let mut api = service("api", "10.96.0.1");
    api.waypoint = Some(gateway("waypoint"));
    let mut bare = waypoint_service();
    bare.ports.clear();
    let mut pod = serves(workload("waypoint", "10.0.9.9"), "waypoint", &[]);
    pod.application_tunnel =
        Some(ApplicationTunnel { protocol: mesh::model::ApplicationTunnelProtocol::Proxy, port: None });
    let world = World::new().service(api).service(bare).workload(pod);
    let hop = "10.0.9.9:15008";
    check(world.route(&client(), "10.96.0.1:80"), hop, Some("10.96.0.1:80"), &["sa-waypoint"], Via::Waypoint);
}

#[test]
fn other_networks_are_refused_by_name() {
    let mut web = serves(workload("web", "10.0.0.2"), "api", &[(80, 80)]);
    web.network = "west".into();
    let world = World::new().service(service("api", "10.96.0.1")).workload(web);
    let error = world.route(&client(), "10.96.0.1:80").unwrap_err();
    assert!(error.to_string().contains("not supported yet"), "{error}");
}

/// Three endpoints: same node; same zone; elsewhere.
fn spread(mode: LoadBalancingMode, scopes: &[RoutingScope], from: &Workload) -> Result<Vec<String>, NoRoute> {
    let at = |name, address, node: &str, zone: &str| {
        let locality = Locality { region: "r1".into(), zone: zone.into(), subzone: "".into() };
        serves(Workload { node: node.into(), locality, ..workload(name, address) }, "api", &[(80, 80)])
    };
    let mut api = service("api", "10.96.0.1");
    api.load_balancing = LoadBalancing { mode, routing_preferences: scopes.to_vec(), ..LoadBalancing::default() };
    let world = World::new()
        .service(api)
        .workload(at("here", "10.0.0.2", "node-a", "z1"))
        .workload(at("near", "10.0.0.3", "node-b", "z1"))
        .workload(at("far", "10.0.0.4", "node-c", "z2"))
        .snapshot();
    let mut rng = StdRng::seed_from_u64(1);
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..200 {
        let route = outbound(&world, from, dst("10.96.0.1:80"), &mut rng)?;
        seen.insert(route.destination.unwrap().name.to_string());
    }
    Ok(seen.into_iter().collect())
}

#[test]
fn load_balancing_follows_the_preferences() {
    use LoadBalancingMode::{Failover, Standard, Strict};
    use RoutingScope::{Network, Node, Region, Zone};
    let names = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
    let lost = Workload { node: "node-z".into(), locality: Locality::default(), ..client() };
    for (mode, scopes, from, expected) in [
        (Standard, vec![], client(), names(&["far", "here", "near"])),
        (Strict, vec![Node], client(), names(&["here"])),
        (Strict, vec![Region, Zone], client(), names(&["here", "near"])),
        (Failover, vec![Network, Region, Zone], client(), names(&["here", "near"])),
        (Failover, vec![Network, Region, Zone, Node], client(), names(&["here"])),
        (Failover, vec![Node], lost.clone(), names(&["far", "here", "near"])),
    ] {
        assert_eq!(spread(mode, &scopes, &from).unwrap(), expected, "{mode:?} {scopes:?}");
    }
    assert!(matches!(spread(Strict, &[Node], &lost), Err(NoRoute::NoHealthyUpstream { .. })));
}

#[test]
fn capacity_is_the_weight_and_zero_is_never_picked() {
    let with = |name, address, capacity| serves(Workload { capacity, ..workload(name, address) }, "api", &[(80, 80)]);
    let world = World::new()
        .service(service("api", "10.96.0.1"))
        .workload(with("one", "10.0.0.2", 1))
        .workload(with("nine", "10.0.0.3", 9))
        .workload(with("never", "10.0.0.4", 0))
        .snapshot();
    let mut rng = StdRng::seed_from_u64(3);
    let mut counts = BTreeMap::<String, u32>::new();
    for _ in 0..1000 {
        let route = outbound(&world, &client(), dst("10.96.0.1:80"), &mut rng).unwrap();
        *counts.entry(route.destination.unwrap().name.to_string()).or_default() += 1;
    }
    assert!(!counts.contains_key("never"), "{counts:?}");
    assert!((60..=140).contains(&counts["one"]), "{counts:?}");
}

#[test]
fn address_family_of_the_call_is_kept_where_the_service_allows() {
    let dual = |families| {
        let mut api = service("api", "10.96.0.1");
        api.vips.push(NetworkAddress { network: "".into(), address: ip("fd00::1") });
        api.ip_families = families;
        let mut web = serves(workload("web", "10.0.0.2"), "api", &[(80, 80)]);
        web.addresses.push(ip("fd00::2"));
        World::new().service(api).workload(web)
    };
    let hop = |world: World, to| world.route(&client(), to).unwrap().next_hop.to_string();
    assert_eq!(hop(dual(IpFamilies::Automatic), "10.96.0.1:80"), "10.0.0.2:15008");
    assert_eq!(hop(dual(IpFamilies::Dual), "[fd00::1]:80"), "[fd00::2]:15008");
    assert_eq!(hop(dual(IpFamilies::Ipv6), "10.96.0.1:80"), "[fd00::2]:15008");
}

fn target(world: World, local: &Workload, authority: &str) -> Result<SocketAddr, BadTarget> {
    inbound(&world.snapshot(), local, ip("10.0.0.2"), &authority.parse().unwrap())
}

#[test]
fn tunnel_requests_reach_only_the_local_workload() {
    let web = serves(workload("web", "10.0.0.2"), "api", &[(80, 9090)]);
    let world = || World::new().workload(web.clone()).service(service("api", "10.96.0.1"));
    assert_eq!(target(world(), &web, "10.0.0.2:8080"), Ok("10.0.0.2:8080".parse().unwrap()));
    assert_eq!(target(world(), &web, "api.shop.svc:80"), Ok("10.0.0.2:9090".parse().unwrap()));
    for (authority, status) in [
        ("10.0.0.3:8080", 400),
        ("10.96.0.1:80", 400),
        ("api.shop.svc:81", 503),
        ("other.shop.svc:80", 503),
        ("10.0.0.2:15008", 503),
        ("10.0.0.2:15006", 503),
        ("10.0.0.2:15001", 503),
    ] {
        let error = target(world(), &web, authority).unwrap_err();
        assert_eq!(error.status().as_u16(), status, "{authority}: {error}");
    }
}

#[test]
fn a_captured_waypoint_takes_requests_for_what_it_fronts() {
    let waypoint = serves(workload("waypoint", "10.0.0.2"), "waypoint", &[(15008, 15008)]);
    let mut api = service("api", "10.96.0.1");
    api.waypoint = Some(gateway("waypoint"));
    let world = World::new().service(api).service(waypoint_service()).workload(waypoint.clone());
    assert_eq!(target(world, &waypoint, "10.96.0.1:80"), Ok("10.0.0.2:80".parse().unwrap()));
}

#[test]
fn service_of_an_inbound_connection_is_named_or_guessed_but_never_foreign() {
    let web = serves(serves(workload("web", "10.0.0.2"), "api", &[(80, 9090)]), "admin", &[(81, 9091)]);
    let world = World::new()
        .workload(web.clone())
        .service(service("api", "10.96.0.1"))
        .service(service("admin", "10.96.0.2"))
        .service(service("foreign", "10.96.0.3"))
        .snapshot();
    let name = |port, named| inbound_service(&world, &web, port, named).map(|s| s.name.to_string());
    assert_eq!(name(9090, None).as_deref(), Some("api"));
    assert_eq!(name(9090, Some("admin.shop.svc")).as_deref(), Some("admin"));
    assert_eq!(name(9091, Some("foreign.shop.svc")).as_deref(), Some("admin"));
    assert_eq!(name(7, None), None);
}

#[test]
fn only_a_waypoint_of_the_destination_speaks_for_others() {
    let pod = serves(workload("web", "10.0.0.2"), "api", &[(80, 9090)]);
    let waypoint = waypoint_pod().identity().unwrap();
    let speaks = |pod: &Workload, of_service: Option<GatewayAddress>, peer: &Identity| {
        let mut api = service("api", "10.96.0.1");
        api.waypoint = of_service;
        let world =
            World::new().workload(pod.clone()).service(api).service(waypoint_service()).workload(waypoint_pod());
        speaks_for_others(&world.snapshot(), pod, peer)
    };
    assert!(speaks(&pod, Some(gateway("waypoint")), &waypoint));
    let own = Workload { waypoint: Some(gateway("waypoint")), ..pod.clone() };
    assert!(speaks(&own, None, &waypoint));
    assert!(!speaks(&pod, None, &waypoint), "a waypoint of somebody else");
    assert!(!speaks(&pod, Some(gateway("waypoint")), &client().identity().unwrap()));
    assert!(!speaks(&pod, Some(gateway("unknown")), &waypoint));
}

/// An address is another pod's before its last owner has left the mesh: in whatever order that becomes known, the tunnel
/// is for one of the two by its own identity, so whoever answers as the other is refused.
#[test]
fn a_reused_address_is_never_taken_for_its_last_owner() {
    let (old, new) = (workload("old", "10.0.0.5"), workload("new", "10.0.0.5"));
    let plain = |w: &Workload| Workload { protocol: TunnelProtocol::None, ..w.clone() };
    let orders = [
        vec![old.clone(), new.clone()],
        vec![new.clone(), old.clone()],
        vec![old.clone(), plain(&new)],
        vec![plain(&new), old.clone()],
    ];
    for order in orders {
        let (store, mut update) = (Store::new(), Update::new());
        order.iter().cloned().for_each(|w| update.push_workload(w));
        store.apply(update);
        let go =
            || outbound(&store.snapshot(), &client(), dst("10.0.0.5:8080"), &mut StdRng::seed_from_u64(7)).unwrap();
        // A pod that speaks HBONE goes first: what is sent in plain text then would reach whoever has the address now.
        let route = go();
        let expected = &route.tunnel.as_ref().expect("a tunnel").expected;
        let owner = route.destination.as_ref().expect("a workload");
        assert_eq!(*expected, vec![owner.identity().unwrap()], "one pod, and that one's identity");
        store.apply(Update::new().remove_address(old.uid.to_string()));
        let route = go();
        assert_eq!(route.destination.as_ref().map(|w| &w.uid), Some(&new.uid), "the old one's end leaves the new one");
        let is_plain = order.iter().any(|w| w.uid == new.uid && w.protocol == TunnelProtocol::None);
        assert_eq!(route.tunnel.is_none(), is_plain);
    }
}

/// Where a connection to `dialled` goes when the endpoint's name stands for `found`.
fn by_name(dialled: &str, found: &[&str], change: impl FnOnce(&mut Workload, &mut Service, &mut Workload)) -> String {
    let mut source = client();
    source.addresses.push(ip("fd00::1"));
    let mut api = service("api", "240.240.0.1");
    api.vips.push(NetworkAddress { network: "".into(), address: ip("2001:2::1") });
    let mut endpoint = serves(workload("mirror", "10.0.0.9"), "api", &[(80, 8443)]);
    (endpoint.addresses, endpoint.hostname) = (Vec::new(), "mirror.example.com".into());
    endpoint.protocol = TunnelProtocol::None;
    change(&mut source, &mut api, &mut endpoint);
    let world = World(vec![source.clone(), endpoint], vec![api]).snapshot();
    let mut rng = StdRng::seed_from_u64(7);
    let lacking = match outbound(&world, &source, dst(dialled), &mut rng) {
        Err(NoRoute::ByName(lacking)) => *lacking,
        decided => return format!("{decided:?}"),
    };
    assert_eq!(&**lacking.hostname(), "mirror.example.com");
    let found: Vec<IpAddr> = found.iter().map(|a| ip(a)).collect();
    match lacking.resolved(&source, Ok(&found), &mut rng) {
        Ok(Route { next_hop, tunnel: None, .. }) => next_hop.to_string(),
        Ok(Route { next_hop, tunnel: Some(tunnel), .. }) => format!("{} by {next_hop}", tunnel.authority),
        Err(error) => error.to_string(),
    }
}

#[test]
fn an_endpoint_known_by_name_is_reached_at_an_address_of_that_name() {
    let both = ["192.0.2.1", "2001:db8::1"];
    assert_eq!(by_name("240.240.0.1:80", &both, |_, _, _| {}), "192.0.2.1:8443");
    assert_eq!(by_name("[2001:2::1]:80", &both, |_, _, _| {}), "[2001:db8::1]:8443");
    assert_eq!(
        by_name("[2001:2::1]:80", &both[..1], |_, _, _| {}),
        "192.0.2.1:8443",
        "the other family is a fall-back"
    );
    let hbone = by_name("240.240.0.1:80", &both, |_, _, w| w.protocol = TunnelProtocol::Hbone);
    assert_eq!(hbone, "192.0.2.1:8443 by 192.0.2.1:15008");
    let only = by_name("240.240.0.1:80", &both, |_, s, _| s.ip_families = IpFamilies::Ipv6);
    assert_eq!(only, "[2001:db8::1]:8443");
}

#[test]
fn a_name_without_a_usable_address_closes_the_connection() {
    let v6_only = |w: &mut Workload| w.addresses.retain(IpAddr::is_ipv6);
    assert!(by_name("[2001:2::1]:80", &["192.0.2.1"], |w, _, _| v6_only(w)).contains("no address of a family"));
    assert!(by_name("240.240.0.1:80", &[], |_, _, _| {}).contains("mirror.example.com"));
    assert!(by_name("240.240.0.1:80", &["192.0.2.1"], |_, _, w| w.network = "far".into()).contains("OtherNetwork"));
    let mut source = client();
    source.uid = "x".into();
    let lacking = ByName { workload: Arc::new(workload("w", "10.0.0.9")), service: None, port: 1, dialled: ip("::1") };
    let error = lacking.resolved(&source, Err("why".into()), &mut StdRng::seed_from_u64(7)).unwrap_err();
    assert_eq!((error.to_string().ends_with("why"), error.flag()), (true, ResponseFlag::Connect));
}

#[test]
fn every_address_of_a_name_gets_its_share() {
    let source = client();
    let endpoint = Workload { addresses: Vec::new(), hostname: "a.test".into(), ..workload("w", "10.0.0.9") };
    let lacking = ByName { workload: Arc::new(endpoint), service: None, port: 80, dialled: ip("240.240.0.1") };
    let found: Vec<IpAddr> = (1..=4).map(|n| IpAddr::from([192, 0, 2, n])).collect();
    let mut rng = StdRng::seed_from_u64(7);
    let mut count = BTreeMap::new();
    for _ in 0..400 {
        let route = lacking.clone().resolved(&source, Ok(&found), &mut rng).unwrap();
        *count.entry(route.next_hop.ip()).or_insert(0) += 1;
    }
    assert!(count.len() == 4 && count.values().all(|n| *n > 50), "{count:?}");
}
