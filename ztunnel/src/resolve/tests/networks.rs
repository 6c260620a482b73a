//! Endpoints and waypoints of other networks, which are reached through gateways.

use super::*;

/// The source's network.
const HERE: &str = "east";

fn here(workload: Workload) -> Workload {
    workload.with(|w| w.network = HERE.into())
}

fn from() -> Workload {
    here(client())
}

/// The service, with the identity of its workloads over there.
fn api() -> Service {
    Service {
        vips: vec![NetworkAddress { network: HERE.into(), address: ip("10.96.0.1") }],
        subject_alt_names: vec!["spiffe://cluster.local/ns/shop/sa/web".into(), "not-spiffe".into()],
        ..service("api", "")
    }
}

fn at(network: &str, address: &str) -> GatewayAddress {
    let address = NetworkAddress { network: network.into(), address: ip(address) };
    GatewayAddress { destination: GatewayDestination::Address(address), hbone_mtls_port: 15443 }
}

/// What stands for all of a service on the other network.
fn aggregate(gateway: Option<GatewayAddress>) -> Workload {
    let web = serves(workload("west-api", "10.0.0.2"), "api", &[(80, 80)]);
    web.with(|w| {
        w.addresses = Vec::new();
        w.network = "west".into();
        w.network_gateway = gateway;
    })
}

fn gateway_pod() -> Workload {
    workload("gw", "192.0.2.9").with(|w| {
        w.network = "west".into();
        w.uid = "NetworkGateway/west/192.0.2.9/15443".into();
    })
}

fn world() -> World {
    World(vec![from()], vec![api()])
}

/// (next hop, authority, who ends the outer tunnel, who the inner one)
#[track_caller]
fn crosses(route: Result<Route, NoRoute>, hop: &str, outer: &[&str], inner: &[&str]) {
    let route = route.unwrap();
    let tunnel = route.tunnel.as_ref().expect("a tunnel");
    let accounts = |list: &[Identity]| list.iter().map(|i| i.service_account().to_string()).collect::<Vec<_>>();
    assert_eq!((&*route.next_hop.to_string(), route.via), (hop, Via::Gateway));
    assert_eq!(tunnel.authority.to_string(), "api.shop.svc:80", "over there only the name means the same");
    assert_eq!(accounts(&tunnel.expected), outer);
    assert_eq!(accounts(tunnel.inner.as_ref().expect("an inner tunnel")), inner);
    assert_eq!(&*route.service.expect("what was dialled").name, "api");
}

#[test]
fn an_endpoint_of_another_network_is_reached_through_its_gateway() {
    let world = || world().workload(aggregate(Some(at("west", "192.0.2.9"))));
    crosses(world().workload(gateway_pod()).route(&from(), "10.96.0.1:80"), "192.0.2.9:15443", &["sa-gw"], &["web"]);
    // One that has addresses, which mean something over there only.
    let addressed = Workload { addresses: vec![ip("10.0.0.1")], ..aggregate(Some(at("west", "192.0.2.9"))) };
    let world = super::World(vec![from()], vec![api()]).workload(addressed).workload(gateway_pod());
    crosses(world.route(&from(), "10.96.0.1:80"), "192.0.2.9:15443", &["sa-gw"], &["web"]);
}

#[test]
fn a_gateway_may_be_a_service_by_address_or_by_name() {
    let mut edge = service("edge", "");
    edge.vips = vec![NetworkAddress { network: "west".into(), address: ip("192.0.2.50") }];
    edge.ports = BTreeMap::from([(15443, ServicePort { target_port: 15008, app_protocol: Default::default() })]);
    edge.subject_alt_names = vec!["spiffe://cluster.local/ns/shop/sa/edge".into()];
    let pod = || serves(gateway_pod(), "edge", &[(15443, 16008)]);
    let by_name = GatewayAddress { hbone_mtls_port: 15443, ..gateway("edge") };
    for reference in [at("west", "192.0.2.50"), by_name] {
        let world = world().workload(aggregate(Some(reference))).service(edge.clone());
        let unready = || NoRoute::GatewayUnavailable { gateway: String::new(), network: "".into() };
        let error = World(world.0.clone(), world.1.clone()).route(&from(), "10.96.0.1:80").unwrap_err();
        assert_eq!(std::mem::discriminant(&error), std::mem::discriminant(&unready()), "{error}");
        assert_eq!(error.flag(), ResponseFlag::NoHealthyUpstream);
        let route = world.workload(pod()).route(&from(), "10.96.0.1:80");
        crosses(route, "192.0.2.9:16008", &["sa-gw", "edge"], &["web"]);
    }
}

#[test]
fn a_gateway_may_be_a_workload_with_that_host_name() {
    let named = gateway_pod().with(|w| w.hostname = "edge.shop.svc".into());
    let world = || world().workload(aggregate(Some(GatewayAddress { hbone_mtls_port: 15443, ..gateway("edge") })));
    let addressed = world().workload(named.clone()).route(&from(), "10.96.0.1:80");
    crosses(addressed, "192.0.2.9:15443", &["sa-gw"], &["web"]);
    // As load balancers of some clouds are: known by name alone.
    let nameless = world().workload(Workload { addresses: Vec::new(), ..named });
    let Err(NoRoute::ByName(lacking)) = nameless.route(&from(), "10.96.0.1:80") else { panic!("a name to look up") };
    assert_eq!(&**lacking.hostname(), "edge.shop.svc");
    let found = [ip("198.51.100.7")];
    let route = lacking.resolved(&from(), Ok(&found), &mut StdRng::seed_from_u64(7));
    crosses(route, "198.51.100.7:15443", &["sa-gw"], &["web"]);
}

#[test]
fn a_waypoint_of_another_network_is_reached_in_its_services_name() {
    let api = Service { waypoint: Some(gateway("waypoint")), ..api() };
    let mut fronting = waypoint_service();
    fronting.subject_alt_names = vec!["spiffe://cluster.local/ns/shop/sa/waypoint".into()];
    let away = serves(workload("waypoint", "10.0.9.9"), "waypoint", &[(15008, 15008)]).with(|w| {
        w.network = "west".into();
        w.network_gateway = Some(at("west", "192.0.2.9"));
    });
    let world = || World(vec![from()], vec![api.clone(), fronting.clone()]).workload(gateway_pod());
    let route = world().workload(away.clone()).route(&from(), "10.96.0.1:80");
    // The identities of the service's own workloads would let what the waypoint guards answer in its place.
    crosses(route, "192.0.2.9:15443", &["sa-gw"], &["waypoint"]);
    let local = here(serves(workload("near", "10.0.9.8"), "waypoint", &[(15008, 15008)]));
    let mut preferring = fronting.clone();
    preferring.load_balancing = LoadBalancing {
        mode: LoadBalancingMode::Failover,
        routing_preferences: vec![mesh::model::RoutingScope::Network],
        ..LoadBalancing::default()
    };
    let world =
        World(vec![from()], vec![api.clone(), preferring]).workload(gateway_pod()).workload(away).workload(local);
    let near = world.route(&from(), "10.96.0.1:80");
    check(near, "10.0.9.8:15008", Some("10.96.0.1:80"), &["sa-near", "waypoint"], Via::Waypoint);
}

#[test]
fn what_is_lacking_closes_the_connection_by_name() {
    let error = |world: World| world.route(&from(), "10.96.0.1:80").unwrap_err();
    let none = error(world().workload(Workload { addresses: vec![ip("10.0.0.2")], ..aggregate(None) }));
    assert!(matches!(&none, NoRoute::OtherNetwork { network, .. } if &**network == "west"), "{none}");
    let unknown = error(world().workload(aggregate(Some(at("west", "192.0.2.9")))));
    assert!(matches!(unknown, NoRoute::UnknownGateway { .. }), "{unknown}");
    assert_eq!((none.flag(), unknown.flag()), (ResponseFlag::Connect, ResponseFlag::Connect));
    let unreachable = error(world().workload(aggregate(None)));
    assert!(matches!(unreachable, NoRoute::NoHealthyUpstream { .. }), "neither address nor gateway: {unreachable}");

    let nobody = Service { subject_alt_names: Vec::new(), ..api() };
    let nobody = World(vec![from()], vec![nobody]).workload(aggregate(Some(at("west", "192.0.2.9"))));
    let nobody = error(nobody.workload(gateway_pod()));
    assert!(matches!(nobody, NoRoute::Unrecognisable { .. }), "{nobody}");
    assert_eq!(nobody.flag(), ResponseFlag::IdentityError);

    // A workload's own waypoint, when that is elsewhere: the pod's address means nothing there.
    let web = here(workload("web", "10.0.0.2").with(|w| w.waypoint = Some(at("west", "10.0.9.9"))));
    let away = workload("waypoint", "10.0.9.9").with(|w| {
        w.network = "west".into();
        w.network_gateway = Some(at("west", "192.0.2.9"));
    });
    let by_workload = world().workload(web).workload(away).workload(gateway_pod());
    let error = by_workload.route(&from(), "10.0.0.2:80").unwrap_err();
    assert!(matches!(error, NoRoute::NotByService { .. }), "{error}");
}

#[test]
fn addresses_of_another_network_mean_nothing_here() {
    let twin = workload("twin", "10.0.0.2").with(|w| w.network = "west".into());
    let world = world().workload(twin).service(Service {
        vips: vec![NetworkAddress { network: "west".into(), address: ip("10.96.0.2") }],
        ..service("other", "")
    });
    let snapshot = world.snapshot();
    for to in ["10.0.0.2:80", "10.96.0.2:80"] {
        let route = outbound(&snapshot, &from(), dst(to), &mut StdRng::seed_from_u64(7));
        check(route, to, None, &[], Via::Passthrough);
    }
}

#[test]
fn network_as_the_first_preference_outweighs_all_others() {
    use mesh::model::RoutingScope::{Network, Region, Zone};
    let mut api = api();
    api.load_balancing = LoadBalancing {
        mode: LoadBalancingMode::Failover,
        routing_preferences: vec![Network, Region, Zone],
        ..LoadBalancing::default()
    };
    let zone = |w: Workload, region: &str, zone: &str| {
        w.with(|w| w.locality = Locality { region: region.into(), zone: zone.into(), subzone: "".into() })
    };
    let beyond = |uid: &str, region: &str, z: &str| {
        let w = zone(aggregate(Some(at("west", "192.0.2.9"))), region, z);
        Workload { uid: uid.into(), ..w }
    };
    let far = here(zone(serves(workload("far", "10.0.0.9"), "api", &[(80, 80)]), "r9", "z9"));
    let with = |more: Option<Workload>| {
        let mut world = World(vec![from(), gateway_pod()], vec![api.clone()])
            .workload(beyond("close", "r1", "z1"))
            .workload(beyond("closer-not", "r1", "z2"));
        world.0.extend(more);
        world.snapshot()
    };
    let mut rng = StdRng::seed_from_u64(7);
    let own = with(Some(far));
    for _ in 0..50 {
        let route = outbound(&own, &from(), dst("10.96.0.1:80"), &mut rng).unwrap();
        assert_eq!(
            (route.via, &*route.destination.unwrap().name),
            (Via::Direct, "far"),
            "any of the own network first"
        );
    }
    // Without one, the nearest of the others: missing the network does not end the comparison.
    let others = with(None);
    let service = others.service(&api.key()).unwrap().clone();
    for _ in 0..50 {
        let (picked, _) = pick(&others, &service, &from(), Wanted::Port(80), &mut rng).unwrap();
        assert_eq!(&*picked.uid, "close");
    }
}
