//! Endpoints that are known by host name only.

use super::*;

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

/// The route to an endpoint without addresses.
fn lacking(mut endpoint: Workload, dialled: &str) -> ByName {
    (endpoint.addresses, endpoint.hostname) = (Vec::new(), "a.test".into());
    match direct(Arc::new(endpoint), None, 80, SocketAddr::new(ip(dialled), 80)) {
        Err(NoRoute::ByName(lacking)) => *lacking,
        decided => panic!("{decided:?}"),
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
    let lacking = lacking(workload("w", "10.0.0.9"), "::1");
    let error = lacking.resolved(&source, Err("why".into()), &mut StdRng::seed_from_u64(7)).unwrap_err();
    assert_eq!((error.to_string().ends_with("why"), error.flag()), (true, ResponseFlag::Connect));
}

#[test]
fn every_address_of_a_name_gets_its_share() {
    let source = client();
    let lacking = lacking(workload("w", "10.0.0.9"), "240.240.0.1");
    let found: Vec<IpAddr> = (1..=4).map(|n| IpAddr::from([192, 0, 2, n])).collect();
    let mut rng = StdRng::seed_from_u64(7);
    let mut count = BTreeMap::new();
    for _ in 0..400 {
        let route = lacking.clone().resolved(&source, Ok(&found), &mut rng).unwrap();
        *count.entry(route.next_hop.ip()).or_insert(0) += 1;
    }
    assert!(count.len() == 4 && count.values().all(|n| *n > 50), "{count:?}");
}
