//! What has to be asked for on demand, step by step.

use super::super::missing::{for_inbound, for_outbound};
use super::*;

fn asked(world: World, dst: &str) -> Vec<String> {
    for_outbound(&world.snapshot(), &client(), ip(dst))
}

#[test]
fn an_address_is_asked_for_unless_it_is_known_exactly() {
    assert_eq!(asked(World::new(), "10.96.0.1"), ["/10.96.0.1"]);
    assert_eq!(asked(World::new(), "fd00::1"), ["/fd00::1"]);
    let known = || World::new().service(service("api", "10.96.0.1")).workload(workload("web", "10.0.0.2"));
    assert!(asked(known(), "10.96.0.1").is_empty());
    assert!(asked(known(), "10.0.0.2").is_empty());
    assert_eq!(asked(known(), "10.96.0.2"), ["/10.96.0.2"]);
}

#[test]
fn a_waypoint_is_asked_for_by_the_name_that_refers_to_it() {
    let bound = || {
        let mut api = service("api", "10.96.0.1");
        api.waypoint = Some(gateway("waypoint"));
        World::new().service(api)
    };
    assert_eq!(asked(bound(), "10.96.0.1"), ["shop/waypoint.shop.svc"]);
    assert!(asked(bound().service(waypoint_service()), "10.96.0.1").is_empty());
    let web = workload("web", "10.0.0.2").with(|w| w.waypoint = Some(gateway("waypoint")));
    assert_eq!(asked(World::new().workload(web), "10.0.0.2"), ["shop/waypoint.shop.svc"]);
}

#[test]
fn a_pods_services_and_their_waypoints_are_asked_for_before_a_peer_is_believed() {
    let web = serves(workload("web", "10.0.0.2"), "api", &[(80, 9090)]);
    let mut api = service("api", "10.96.0.1");
    api.waypoint = Some(gateway("waypoint"));
    let asked = |world: World| for_inbound(&world.workload(web.clone()).snapshot(), &web);
    assert_eq!(asked(World::new()), ["shop/api.shop.svc"]);
    assert_eq!(asked(World::new().service(api.clone())), ["shop/waypoint.shop.svc"]);
    assert!(asked(World::new().service(api).service(waypoint_service())).is_empty());
}
