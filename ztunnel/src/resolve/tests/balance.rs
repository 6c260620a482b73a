//! Which endpoints of a service are called, and how often.

use super::*;

/// Three endpoints: same node; same zone; elsewhere.
fn spread(mode: LoadBalancingMode, scopes: &[RoutingScope], from: &Workload) -> Result<Vec<String>, NoRoute> {
    let at = |name, address, node: &str, zone: &str| {
        let locality = Locality { region: "r1".into(), zone: zone.into(), subzone: "".into() };
        let pod = workload(name, address).with(|w| {
            w.node = node.into();
            w.locality = locality;
        });
        serves(pod, "api", &[(80, 80)])
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
    let lost = client().with(|w| {
        w.node = "node-z".into();
        w.locality = Locality::default();
    });
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
    let with =
        |name, address, capacity| serves(workload(name, address).with(|w| w.capacity = capacity), "api", &[(80, 80)]);
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

fn picks(world: World, to: &str) -> Result<std::collections::BTreeSet<String>, NoRoute> {
    let (world, mut rng) = (world.snapshot(), StdRng::seed_from_u64(5));
    let one = |_| Ok(outbound(&world, &client(), dst(to), &mut rng)?.destination.unwrap().name.to_string());
    (0..200).map(one).collect()
}

#[test]
fn endpoints_that_are_not_ready_serve_where_the_service_wants_all() {
    let sick = Workload { status: HealthStatus::Unhealthy, ..serves(workload("sick", "10.0.0.2"), "api", &[(80, 80)]) };
    let well = serves(workload("well", "10.0.0.3"), "api", &[(80, 80)]);
    let with = |health_policy| {
        let mut api = service("api", "10.96.0.1");
        api.load_balancing.health_policy = health_policy;
        World::new().service(api).workload(sick.clone()).workload(well.clone())
    };
    let names = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
    assert_eq!(picks(with(HealthPolicy::OnlyHealthy), "10.96.0.1:80"), Ok(names(&["well"])));
    assert_eq!(picks(with(HealthPolicy::AllowAll), "10.96.0.1:80"), Ok(names(&["sick", "well"])));
}

#[test]
fn an_endpoint_without_address_name_or_gateway_is_none() {
    let mut ghost = serves(workload("ghost", "10.0.0.2"), "api", &[(80, 80)]);
    ghost.addresses.clear();
    let here = ghost.clone();
    // A gateway is of use on the other side of it only.
    ghost.network_gateway = Some(gateway("edge"));
    for ghost in [here, ghost] {
        let world = World::new().service(service("api", "10.96.0.1")).workload(ghost);
        assert!(matches!(picks(world, "10.96.0.1:80"), Err(NoRoute::NoHealthyUpstream { .. })));
    }
}

#[test]
fn an_endpoint_counts_where_its_port_is_known() {
    let mut api = service("api", "10.96.0.1");
    api.ports = BTreeMap::from([(80, ServicePort::default()), (81, ServicePort::default())]);
    let world = || {
        World::new()
            .service(api.clone())
            .workload(serves(workload("first", "10.0.0.2"), "api", &[(80, 8080)]))
            .workload(serves(workload("zero", "10.0.0.3"), "api", &[(80, 0)]))
            .workload(serves(workload("second", "10.0.0.4"), "api", &[(81, 8081)]))
    };
    let names = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
    assert_eq!(picks(world(), "10.96.0.1:80"), Ok(names(&["first"])), "a named port that the others do not have");
    assert_eq!(picks(world(), "10.96.0.1:81"), Ok(names(&["second"])));
    assert!(matches!(picks(world(), "10.96.0.1:82"), Err(NoRoute::UnknownPort { port: 82, .. })));
}

#[test]
fn an_application_tunnel_with_a_port_needs_no_mapping() {
    let mut api = service("api", "10.96.0.1");
    api.ports = BTreeMap::from([(80, ServicePort::default())]);
    let tunnel = |port| Some(ApplicationTunnel { protocol: mesh::model::ApplicationTunnelProtocol::Proxy, port });
    let pod = |port| serves(workload("web", "10.0.0.2"), "api", &[]).with(|w| w.application_tunnel = tunnel(port));
    let route = |port| World::new().service(api.clone()).workload(pod(port)).route(&client(), "10.96.0.1:80");
    check(route(Some(9000)), "10.0.0.2:15008", Some("10.0.0.2:80"), &["sa-web"], Via::Direct);
    assert!(matches!(route(None), Err(NoRoute::NoHealthyUpstream { .. })));
}

#[test]
fn scopes_compare_what_they_name() {
    use RoutingScope::{Cluster, Network, Node, Region, Subzone, Zone};
    let base = client().with(|w| {
        w.cluster_id = "c1".into();
        w.locality = Locality { region: "r1".into(), zone: "z1".into(), subzone: "s1".into() };
    });
    type Change = (RoutingScope, fn(&mut Workload));
    let changed: [Change; 6] = [
        (Region, |w| w.locality.region = "x".into()),
        (Zone, |w| w.locality.zone = "x".into()),
        (Subzone, |w| w.locality.subzone = "x".into()),
        (Node, |w| w.node = "x".into()),
        (Cluster, |w| w.cluster_id = "x".into()),
        (Network, |w| w.network = "x".into()),
    ];
    let all = [Region, Zone, Subzone, Node, Cluster, Network];
    for (scope, change) in changed {
        let mut other = base.clone();
        change(&mut other);
        for asked in all {
            let mut api = service("api", "10.96.0.1");
            api.load_balancing = LoadBalancing {
                mode: LoadBalancingMode::Strict,
                routing_preferences: vec![asked],
                ..LoadBalancing::default()
            };
            let candidate = serves(Workload { uid: "other".into(), ..other.clone() }, "api", &[(80, 80)]);
            let candidate = candidate.with(|w| w.network_gateway = Some(gateway("edge")));
            let world = World(vec![base.clone(), candidate], vec![api.clone()]).snapshot();
            let picked = pick(&world, &Arc::new(api), &base, Wanted::Port(80), &mut StdRng::seed_from_u64(1));
            assert_eq!(picked.is_err(), asked == scope, "{asked:?} where {scope:?} differs");
        }
    }
}

#[test]
fn failover_stops_at_the_first_scope_that_differs() {
    use RoutingScope::{Node, Region, Zone};
    // The node is the same, but its region is not: that it is near counts for nothing.
    let from = client().with(|w| w.locality.region = "r9".into());
    let all = ["far", "here", "near"].map(str::to_owned).to_vec();
    assert_eq!(spread(LoadBalancingMode::Failover, &[Region, Zone, Node], &from), Ok(all));
    let none = spread(LoadBalancingMode::Strict, &[Region, Node], &from);
    assert!(matches!(none, Err(NoRoute::NoHealthyUpstream { .. })), "all of them must fit: {none:?}");
}

#[test]
fn weights_decide_among_waypoints() {
    let mut api = service("api", "10.96.0.1");
    let weighted = |name: &str, weight| WeightedWaypoint { destination: gateway(name), weight };
    api.weighted_waypoints = vec![weighted("blue", 1), weighted("green", 9)];
    let proxy = |name: &str, address: &str| {
        let mut of = waypoint_service();
        (of.name, of.hostname) = (name.into(), format!("{name}.shop.svc").into());
        of.vips.clear();
        (of, serves(workload(name, address), name, &[(15008, 15008)]))
    };
    let ((blue, blue_pod), (green, green_pod)) = (proxy("blue", "10.0.9.1"), proxy("green", "10.0.9.2"));
    let world = World::new().service(api.clone()).service(blue).service(green.clone());
    let world = world.workload(blue_pod).workload(green_pod.clone()).snapshot();
    let mut rng = StdRng::seed_from_u64(3);
    let mut counts = BTreeMap::<String, u32>::new();
    for _ in 0..1000 {
        let route = outbound(&world, &client(), dst("10.96.0.1:80"), &mut rng).unwrap();
        *counts.entry(route.destination.unwrap().name.to_string()).or_default() += 1;
    }
    assert!((60..=140).contains(&counts["blue"]), "{counts:?}");
    // No weight counts: the plain one.
    api.weighted_waypoints = vec![weighted("blue", 0)];
    api.waypoint = Some(gateway("green"));
    let route = World::new().service(api).service(green).workload(green_pod).route(&client(), "10.96.0.1:80");
    check(route, "10.0.9.2:15008", Some("10.96.0.1:80"), &["sa-green"], Via::Waypoint);
}
