//! When a waypoint comes in between, and what it is told.

use super::*;

#[test]
fn a_waypoint_named_by_its_pods_address_is_not_hidden_by_a_range() {
    let mut wide = service("wide", "192.0.2.1");
    wide.vips.clear();
    wide.cidr_vips = vec!["/0.0.0.0/0".parse().unwrap()];
    wide.load_balancing.mode = LoadBalancingMode::Passthrough;
    let mut by_address = gateway("waypoint");
    by_address.destination = GatewayDestination::Address("/10.0.9.9".parse().unwrap());
    let web = workload("web", "10.0.0.2").with(|w| w.waypoint = Some(by_address));
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
    let web = workload("web", "10.0.0.2").with(|w| w.waypoint = Some(gateway("waypoint")));
    let world = World::new().workload(web).service(waypoint_service()).workload(waypoint_pod());
    let hop = "10.0.9.9:15008";
    check(world.route(&client(), "10.0.0.2:99"), hop, Some("10.0.0.2:99"), &["sa-waypoint"], Via::Waypoint);
}

#[test]
fn service_call_ignores_the_waypoint_of_the_workload_and_the_reverse() {
    let web = serves(workload("web", "10.0.0.2"), "api", &[(80, 80)]).with(|w| w.waypoint = Some(gateway("waypoint")));
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
    let web = workload("web", "10.0.0.2").with(|w| w.waypoint = Some(gateway("waypoint")));
    let world = World::new().workload(web).service(waypoint_service()).workload(waypoint_pod());
    let route = world.route(&waypoint_pod(), "10.0.0.2:99");
    check(route, "10.0.0.2:15008", Some("10.0.0.2:99"), &["sa-web"], Via::Direct);
}

#[test]
fn a_waypoints_own_pods_do_not_skip_the_waypoint_of_a_service() {
    let mut api = service("api", "10.96.0.1");
    api.waypoint = Some(gateway("waypoint"));
    let web = serves(workload("web", "10.0.0.2"), "api", &[(80, 80)]);
    let world = World::new().service(api).service(waypoint_service()).workload(waypoint_pod()).workload(web);
    let route = world.route(&waypoint_pod(), "10.96.0.1:80");
    check(route, "10.0.9.9:15008", Some("10.96.0.1:80"), &["sa-waypoint"], Via::Waypoint);
}

#[test]
fn only_the_named_pod_skips_a_waypoint_named_by_address() {
    let by_address = GatewayAddress {
        destination: GatewayDestination::Address("/10.0.9.9".parse().unwrap()),
        hbone_mtls_port: 15008,
    };
    let web = workload("web", "10.0.0.2").with(|w| w.waypoint = Some(by_address));
    let world = || World::new().workload(waypoint_pod()).workload(web.clone());
    let own = world().route(&waypoint_pod(), "10.0.0.2:99");
    check(own, "10.0.0.2:15008", Some("10.0.0.2:99"), &["sa-web"], Via::Direct);
    // The same account, another address.
    let twin = Workload { uid: "twin".into(), addresses: vec![ip("10.0.9.8")], ..waypoint_pod() };
    let route = world().route(&twin, "10.0.0.2:99");
    check(route, "10.0.9.9:15008", Some("10.0.0.2:99"), &["sa-waypoint"], Via::Waypoint);
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
