//! What arrives for a pod: each check of a tunnel request, in their order, and what may be believed of it.

use mesh::hbone::ConnectHeaders;

use super::*;

fn target(world: World, local: &Workload, authority: &str) -> Result<SocketAddr, BadTarget> {
    inbound(&world.snapshot(), local, ip("10.0.0.2"), &authority.parse().unwrap()).map(|target| target.app)
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
    let own = pod.clone().with(|w| w.waypoint = Some(gateway("waypoint")));
    assert!(speaks(&own, None, &waypoint));
    assert!(!speaks(&pod, None, &waypoint), "a waypoint of somebody else");
    assert!(!speaks(&pod, Some(gateway("waypoint")), &client().identity().unwrap()));
    assert!(!speaks(&pod, Some(gateway("unknown")), &waypoint));
}

#[test]
fn only_a_waypoint_of_the_port_is_believed_about_its_client() {
    let pod = serves(serves(workload("web", "10.0.0.2"), "api", &[(80, 9090)]), "admin", &[(81, 9091)]);
    let waypoint = waypoint_pod().identity().unwrap();
    let mut api = service("api", "10.96.0.1");
    api.waypoint = Some(gateway("waypoint"));
    let mut admin = service("admin", "10.96.0.2");
    admin.ports = BTreeMap::from([(81, ServicePort::default())]);
    let world = World::new().service(api).service(admin).service(waypoint_service()).workload(waypoint_pod());
    let world = world.workload(pod.clone()).snapshot();
    let says = |identity: &str, address: Option<&str>| ConnectHeaders {
        original_peer: Some(identity.parse().unwrap()),
        forwarded_for: address.map(|address| address.parse().unwrap()),
        ..ConnectHeaders::default()
    };
    let client = "spiffe://cluster.local/ns/shop/sa/client";
    let believed = |port, peer: &Identity, says: &ConnectHeaders| original(&world, &pod, port, peer, says);

    let told = says(client, Some("10.0.0.1:0"));
    let found = believed(9090, &waypoint, &told).expect("its waypoint");
    assert_eq!((found.identity.to_string(), found.address.to_string()), (client.into(), "10.0.0.1:0".into()));
    assert_eq!(believed(9091, &waypoint, &told), None, "a port of a service that it is no waypoint of");
    assert_eq!(believed(7, &waypoint, &told), None, "a port of no service");
    assert_eq!(believed(9090, &super::client().identity().unwrap(), &told), None, "an ordinary peer");
    assert_eq!(believed(9090, &waypoint, &says(client, None)), None, "half of it");
    assert_eq!(believed(9090, &waypoint, &says("spiffe://elsewhere/ns/shop/sa/client", Some("10.0.0.1:0"))), None);
    let own = pod.clone().with(|w| w.waypoint = Some(gateway("waypoint")));
    assert!(original(&world, &own, 7, &waypoint, &told).is_some(), "every port of a workload that names it");
}

#[test]
fn a_host_name_means_the_service_of_the_own_namespace_first() {
    let web = serves(workload("web", "10.0.0.2"), "api", &[(80, 9090)]);
    let foreign = Service {
        namespace: "other".into(),
        canonical: true,
        ports: BTreeMap::from([(80, ServicePort { target_port: 1, app_protocol: Default::default() })]),
        ..service("api", "10.96.0.1")
    };
    let world = || World::new().workload(web.clone()).service(foreign.clone());
    assert_eq!(
        target(world().service(service("api", "")), &web, "api.shop.svc:80"),
        Ok("10.0.0.2:9090".parse().unwrap())
    );
    assert_eq!(target(world(), &web, "api.shop.svc:80"), Ok("10.0.0.2:1".parse().unwrap()), "the only one there is");
}

#[test]
fn a_named_port_is_resolved_by_the_endpoint_alone() {
    let web = serves(workload("web", "10.0.0.2"), "api", &[(80, 9090)]);
    let mut api = service("api", "10.96.0.1");
    api.ports = BTreeMap::from([(80, ServicePort::default()), (81, ServicePort::default())]);
    let world = || World::new().workload(web.clone()).service(api.clone());
    assert_eq!(target(world(), &web, "api.shop.svc:80"), Ok("10.0.0.2:9090".parse().unwrap()));
    let unmapped = target(world(), &web, "api.shop.svc:81").unwrap_err();
    assert_eq!(unmapped.status().as_u16(), 503, "{unmapped}");
}

#[test]
fn the_host_is_always_the_local_one() {
    let web = serves(workload("web", "10.0.0.2"), "api", &[(80, 9090)]);
    let world = World::new().workload(web.clone()).service(service("api", "10.96.0.1")).snapshot();
    let here = |authority: &str| inbound(&world, &web, ip("fd00::2"), &authority.parse().unwrap()).map(|t| t.app);
    assert_eq!(here("[fd00::2]:8080"), Ok("[fd00::2]:8080".parse().unwrap()));
    assert_eq!(here("api.shop.svc:80"), Ok("[fd00::2]:9090".parse().unwrap()));
    assert!(here("10.0.0.2:8080").is_err(), "another address of its own, to which the connection did not come");
}

fn tunnelling(port: Option<u16>, protocol: ApplicationTunnelProtocol) -> Workload {
    let pod = serves(workload("waypoint", "10.0.0.2"), "waypoint", &[(15008, 15008)]);
    pod.with(|w| w.application_tunnel = Some(ApplicationTunnel { protocol, port }))
}

fn tunnelled(local: &Workload, authority: &str) -> Result<(String, Option<String>), BadTarget> {
    let mut api = service("api", "10.96.0.1");
    api.ports.insert(81, ServicePort::default());
    let elsewhere = NetworkAddress { network: "west".into(), address: ip("10.97.0.1") };
    let second = NetworkAddress { network: "".into(), address: ip("fd00:96::1") };
    api.vips = vec![elsewhere, second, api.vips.remove(0)];
    let mut headless = service("headless", "");
    headless.hostname = "headless.shop.svc".into();
    let world = World::new().service(api).service(headless).service(waypoint_service()).workload(local.clone());
    let target = inbound(&world.snapshot(), local, ip("10.0.0.2"), &authority.parse().unwrap())?;
    Ok((target.app.to_string(), target.announced.map(|a| a.to_string())))
}

#[test]
fn an_application_tunnel_takes_requests_for_any_address() {
    use ApplicationTunnelProtocol::{None as Plain, Proxy};
    let told = |app: &str, announced: &str| Ok((app.to_owned(), Some(announced.to_owned())));
    let all_to_one = tunnelling(Some(15088), Proxy);
    assert_eq!(tunnelled(&all_to_one, "10.96.0.1:80"), told("10.0.0.2:15088", "10.96.0.1:80"));
    assert_eq!(tunnelled(&all_to_one, "192.0.2.1:443"), told("10.0.0.2:15088", "192.0.2.1:443"), "whatever it is");
    let each_its_own = tunnelling(None, Proxy);
    assert_eq!(tunnelled(&each_its_own, "10.96.0.1:80"), told("10.0.0.2:80", "10.96.0.1:80"));
    let silent = tunnelling(Some(15088), Plain);
    assert_eq!(tunnelled(&silent, "10.96.0.1:80"), Ok(("10.0.0.2:15088".to_owned(), None)));
}

#[test]
fn a_name_is_announced_by_the_services_address() {
    let proxy = ApplicationTunnelProtocol::Proxy;
    let told = |app: &str, announced: &str| Ok((app.to_owned(), Some(announced.to_owned())));
    let all_to_one = tunnelling(Some(15088), proxy);
    // Of the own network, and IPv4.
    assert_eq!(tunnelled(&all_to_one, "api.shop.svc:80"), told("10.0.0.2:15088", "10.96.0.1:80"));
    assert_eq!(tunnelled(&all_to_one, "api.shop.svc:81"), told("10.0.0.2:15088", "10.96.0.1:81"), "a named port");
    let each_its_own = tunnelling(None, proxy);
    assert_eq!(tunnelled(&each_its_own, "api.shop.svc:80"), told("10.0.0.2:8080", "10.96.0.1:80"));
    for (local, authority) in [
        (&all_to_one, "headless.shop.svc:80"),
        (&all_to_one, "api.shop.svc:82"),
        (&all_to_one, "unknown.shop.svc:80"),
        (&each_its_own, "api.shop.svc:81"),
    ] {
        let error = tunnelled(local, authority).unwrap_err();
        assert_eq!(error.status().as_u16(), 503, "{authority}: {error}");
    }
}

#[test]
fn no_port_of_the_proxy_is_reached_through_an_application_tunnel() {
    let proxy = ApplicationTunnelProtocol::Proxy;
    for (port, authority) in [
        (Some(15088), "10.96.0.1:15008"),
        (None, "10.96.0.1:15001"),
        (Some(15006), "10.96.0.1:80"),
        (Some(15008), "api.shop.svc:80"),
    ] {
        let error = tunnelled(&tunnelling(port, proxy), authority).unwrap_err();
        assert!(matches!(error, BadTarget::OwnPort(_)), "{authority}: {error}");
        assert_eq!(error.status().as_u16(), 503);
    }
}

#[test]
fn a_captured_waypoint_takes_requests_for_workloads_it_fronts_and_no_others() {
    let waypoint = serves(workload("waypoint", "10.0.0.2"), "waypoint", &[(15008, 15008)]);
    let by_address = GatewayDestination::Address("/10.0.0.2".parse().unwrap());
    for reference in [gateway("waypoint"), GatewayAddress { destination: by_address, hbone_mtls_port: 15008 }] {
        let fronted = workload("web", "10.0.0.3").with(|w| w.waypoint = Some(reference));
        let world = || {
            let world = World::new().service(waypoint_service()).workload(waypoint.clone());
            world.workload(fronted.clone()).workload(workload("other", "10.0.0.4"))
        };
        assert_eq!(target(world(), &waypoint, "10.0.0.3:80"), Ok("10.0.0.2:80".parse().unwrap()));
        assert_eq!(target(world(), &waypoint, "10.0.0.4:80").unwrap_err().status().as_u16(), 400);
    }
}

#[test]
fn another_network_is_believed_from_the_gateway_and_from_who_speaks_for_others() {
    let edge = serves(workload("edge", "10.0.0.7"), "edge", &[(15008, 15008)]);
    let edge = edge.with(|w| w.network = "east".into());
    let at = |address: &str| GatewayAddress {
        destination: GatewayDestination::Address(address.parse().unwrap()),
        hbone_mtls_port: 1,
    };
    let believed = |gateway: Option<GatewayAddress>, peer: &str, from: &str, said: Option<&str>| {
        let local = workload("web", "10.0.0.2").with(|w| {
            w.network = "east".into();
            w.network_gateway = gateway;
        });
        let mut edge_service = service("edge", "10.96.0.7");
        edge_service.ports = waypoint_service().ports;
        let world = World::new().workload(local.clone()).workload(edge.clone()).service(edge_service).snapshot();
        let peer = Identity::new("cluster.local", "shop", peer).unwrap();
        comes_through_gateway(&world, &local, (&peer, ip(from)), said)
    };
    let edge = || Some(gateway("edge"));
    assert!(believed(edge(), "client", "10.0.0.7", Some("west")), "by the address of an instance");
    assert!(believed(Some(at("east/192.0.2.9")), "client", "192.0.2.9", Some("west")), "by its own address");
    assert!(
        !believed(Some(at("south/192.0.2.9")), "client", "192.0.2.9", Some("west")),
        "an address of another network"
    );
    assert!(believed(edge(), "sa-edge", "10.0.0.99", Some("west")), "by its identity");
    assert!(!believed(edge(), "client", "10.0.0.99", Some("west")), "whoever says so");
    assert!(!believed(None, "client", "10.0.0.7", Some("west")), "a gateway that is not ours");
    assert!(!believed(edge(), "client", "10.0.0.7", Some("EAST")), "our own network");
    assert!(!believed(edge(), "client", "10.0.0.7", None));
}
