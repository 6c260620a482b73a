use bytes::Bytes;
use mesh_proto::workload as wire;
use serde_json::json;

use super::*;

fn bytes(octets: &[u8]) -> Bytes {
    Bytes::copy_from_slice(octets)
}

fn minimal() -> wire::Workload {
    wire::Workload { uid: "Kubernetes//Pod/shop/cart".to_owned(), ..Default::default() }
}

fn refused(change: impl FnOnce(&mut wire::Workload)) -> ModelError {
    let mut workload = minimal();
    change(&mut workload);
    Workload::try_from(workload).expect_err("must be refused")
}

fn service() -> wire::Service {
    wire::Service { namespace: "shop".to_owned(), hostname: "api.shop".to_owned(), ..Default::default() }
}

fn refused_service(change: impl FnOnce(&mut wire::Service)) -> ModelError {
    let mut changed = service();
    change(&mut changed);
    Service::try_from(changed).expect_err("must be refused")
}

#[test]
fn elided_defaults_are_filled_in() {
    let workload = Workload::try_from(minimal()).unwrap();
    assert_eq!(&*workload.trust_domain, "cluster.local");
    assert_eq!(&*workload.service_account, "default");
    assert_eq!(&*workload.cluster_id, "Kubernetes");
    assert_eq!(workload.capacity, 1);
    let none = wire::Workload { capacity: Some(0), ..minimal() };
    assert_eq!(Workload::try_from(none).unwrap().capacity, 0, "an explicit zero is not the default");
}

#[test]
fn identity_names_the_workloads_own_parts() {
    let wire = wire::Workload { namespace: "shop".to_owned(), service_account: "cart".to_owned(), ..minimal() };
    let workload = Workload::try_from(wire).unwrap();
    assert_eq!(workload.identity().unwrap().to_string(), "spiffe://cluster.local/ns/shop/sa/cart");
    assert!(Workload::try_from(minimal()).unwrap().identity().is_err(), "nobody proves to be in no namespace");
}

#[test]
fn unknown_enum_numbers_are_refused_by_field() {
    let unknown = |field| ModelError::UnknownEnum { field, value: 99 };
    assert_eq!(refused(|w| w.tunnel_protocol = 99), unknown("tunnel_protocol"));
    assert_eq!(refused(|w| w.workload_type = 99), unknown("workload_type"));
    assert_eq!(refused(|w| w.status = 99), unknown("status"));
    assert_eq!(refused(|w| w.network_mode = 99), unknown("network_mode"));
    let tunnel = wire::ApplicationTunnel { protocol: 99, port: 0 };
    assert_eq!(refused(|w| w.application_tunnel = Some(tunnel)), unknown("application_tunnel.protocol"));
    let port = wire::Port { app_protocol: 99, ..Default::default() };
    assert_eq!(
        refused(|w| drop(w.services.insert("a/b".to_owned(), wire::PortList { ports: vec![port] }))),
        unknown("app_protocol")
    );
    assert_eq!(refused(|w| w.tunnel_protocol = 2), ModelError::LegacyProtocol);
    assert_eq!(refused_service(|s| s.ip_families = 99), unknown("ip_families"));
    let lb = |lb| move |s: &mut wire::Service| s.load_balancing = Some(lb);
    let scope = wire::LoadBalancing { routing_preference: vec![99], ..Default::default() };
    assert_eq!(refused_service(lb(scope)), unknown("routing_preference"));
    let unspecified = wire::LoadBalancing { routing_preference: vec![0], ..Default::default() };
    let expected = ModelError::UnknownEnum { field: "routing_preference", value: 0 };
    assert_eq!(refused_service(lb(unspecified)), expected);
    let mode = wire::LoadBalancing { mode: 99, ..Default::default() };
    assert_eq!(refused_service(lb(mode)), unknown("load_balancing.mode"));
    let health = wire::LoadBalancing { health_policy: 99, ..Default::default() };
    assert_eq!(refused_service(lb(health)), unknown("health_policy"));
}

#[test]
fn unknown_visibility_reads_as_public() {
    let service = Service::try_from(wire::Service { visibility: 99, ..service() }).unwrap();
    assert_eq!(service.visibility, Visibility::Public);
}

#[test]
fn malformed_references_are_refused() {
    assert_eq!(refused(|w| w.uid.clear()), ModelError::Empty("uid"));
    assert_eq!(refused(|w| w.waypoint = Some(Default::default())), ModelError::NoDestination("waypoint"));
    assert_eq!(refused(|w| w.network_gateway = Some(Default::default())), ModelError::NoDestination("network_gateway"));
    assert_eq!(
        refused(|w| w.addresses = vec![bytes(&[1, 2, 3])]),
        ModelError::AddressLength { field: "addresses", length: 3 }
    );
    for name in ["", "no-slash", "/host", "ns/", "a/b/c"] {
        let error = refused(|w| drop(w.services.insert(name.to_owned(), Default::default())));
        assert!(matches!(error, ModelError::ServiceName(_)), "{name}: {error}");
    }
    let port = wire::Port { service_port: 65536, ..Default::default() };
    assert_eq!(refused_service(|s| s.ports = vec![port]), ModelError::Port { field: "service_port", value: 65536 });
    assert_eq!(refused_service(|s| s.hostname.clear()), ModelError::Empty("hostname"));
    assert_eq!(refused_service(|s| s.hostname = "a/b".to_owned()), ModelError::Slash("hostname"));
    assert_eq!(refused_service(|s| s.namespace = "a/b".to_owned()), ModelError::Slash("namespace"));
    assert_eq!(Resource::try_from(wire::Address::default()), Err(ModelError::Empty("type")));
}

#[test]
fn vips_are_hosts_or_ranges_by_their_length() {
    let vip =
        |address: &[u8], length| wire::NetworkAddress { network: "n".to_owned(), address: bytes(address), length };
    let v6 = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9];
    let addresses = vec![
        vip(&[10, 0, 0, 1], None),
        vip(&[10, 0, 0, 2], Some(32)),
        vip(&[10, 1, 2, 3], Some(16)),
        vip(&v6, Some(128)),
        vip(&v6, Some(64)),
        vip(&[0, 0, 0, 0], Some(0)),
    ];
    let parsed = Service::try_from(wire::Service { addresses, ..service() }).unwrap();
    let texts = |list: &[NetworkAddress]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(texts(&parsed.vips), ["n/10.0.0.1", "n/10.0.0.2", "n/fd00::9"]);
    let ranges: Vec<_> = parsed.cidr_vips.iter().map(ToString::to_string).collect();
    assert_eq!(ranges, ["n/10.1.0.0/16", "n/fd00::/64", "n/0.0.0.0/0"]);
    let error = refused_service(|s| s.addresses = vec![vip(&[10, 0, 0, 1], Some(33))]);
    assert_eq!(error, ModelError::PrefixLength { field: "addresses", length: 33 });
}

#[test]
fn mapped_addresses_become_ipv4() {
    let mapped = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 7];
    let workload = Workload::try_from(wire::Workload { addresses: vec![bytes(&mapped)], ..minimal() }).unwrap();
    assert_eq!(workload.addresses, ["10.0.0.7".parse::<IpAddr>().unwrap()]);
}

#[test]
fn gateway_without_a_port_means_the_hbone_port() {
    let destination = wire::gateway_address::Destination::Hostname(wire::NamespacedHostname {
        namespace: "shop".to_owned(),
        hostname: "waypoint.shop".to_owned(),
    });
    let waypoint = Some(wire::GatewayAddress { destination: Some(destination), hbone_mtls_port: 0 });
    let workload = Workload::try_from(wire::Workload { waypoint, ..minimal() }).unwrap();
    let expected = GatewayAddress { destination: "shop/waypoint.shop".parse().unwrap(), hbone_mtls_port: 15008 };
    assert_eq!(workload.waypoint, Some(expected));
}

#[test]
fn gateway_destinations_read_as_address_where_they_can() {
    for (text, is_address) in [("net/10.0.0.1", true), ("/10.0.0.1", true), ("net/fd00::1", true), ("ns/host", false)] {
        let parsed: GatewayDestination = text.parse().unwrap();
        assert_eq!(matches!(parsed, GatewayDestination::Address(_)), is_address, "{text}");
        assert_eq!(parsed.to_string(), text);
    }
}

#[test]
fn endpoint_port_zero_is_no_target() {
    let port = |service_port, target_port| EndpointPort { service_port, target_port, app_protocol: AppProtocol::Tcp };
    let ports: EndpointPorts = [port(80, 8080), port(81, 0)].into_iter().collect();
    assert_eq!((ports.target(80), ports.target(81), ports.target(82)), (Some(8080), None, None));
}

#[test]
fn json_is_the_shape_of_config_dump() {
    let workload = Workload {
        uid: "u".into(),
        name: "cart".into(),
        addresses: vec!["10.0.0.1".parse().unwrap()],
        template: Arc::new(Template {
            namespace: "shop".into(),
            protocol: TunnelProtocol::Hbone,
            waypoint: Some(GatewayAddress { destination: "shop/wp".parse().unwrap(), hbone_mtls_port: 15008 }),
            workload_type: WorkloadType::Pod,
            application_tunnel: Some(ApplicationTunnel {
                protocol: ApplicationTunnelProtocol::Proxy,
                port: Some(15088),
            }),
            authorization_policies: vec!["shop/p".into()],
            locality: Locality { region: "r".into(), zone: "z".into(), subzone: "".into() },
            services: [("shop/api".parse().unwrap(), EndpointPorts::default())].into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    assert_eq!(
        serde_json::to_value(&workload).unwrap(),
        json!({
            "workloadIps": ["10.0.0.1"], "waypoint": {"destination": "shop/wp", "hboneMtlsPort": 15008},
            "protocol": "HBONE", "networkMode": "Standard", "uid": "u", "name": "cart", "namespace": "shop",
            "trustDomain": "cluster.local", "serviceAccount": "default", "workloadType": "pod", "nativeTunnel": false,
            "applicationTunnel": {"protocol": "PROXY", "port": 15088}, "authorizationPolicies": ["shop/p"],
            "status": "Healthy", "clusterId": "Kubernetes", "locality": {"region": "r", "zone": "z", "subzone": ""},
            "services": ["shop/api"], "capacity": 1,
        })
    );
    let service = Service {
        name: "api".into(),
        namespace: "shop".into(),
        hostname: "api.shop".into(),
        vips: vec!["n/10.1.0.1".parse().unwrap()],
        cidr_vips: vec!["n/10.2.0.0/16".parse().unwrap()],
        ports: [(80, ServicePort { target_port: 8080, app_protocol: AppProtocol::Http11 })].into(),
        load_balancing: LoadBalancing {
            routing_preferences: vec![RoutingScope::Network, RoutingScope::Zone],
            mode: LoadBalancingMode::Failover,
            health_policy: HealthPolicy::AllowAll,
        },
        ip_families: IpFamilies::Ipv4,
        canonical: true,
        ..Default::default()
    };
    assert_eq!(
        serde_json::to_value(&service).unwrap(),
        json!({
            "name": "api", "namespace": "shop", "hostname": "api.shop", "vips": ["n/10.1.0.1"],
            "cidrVips": ["n/10.2.0.0/16"], "ports": {"80": 8080},
            "loadBalancer": {"routingPreferences": ["Network", "Zone"], "mode": "Failover", "healthPolicy": "AllowAll"},
            "ipFamilies": "IPv4", "canonical": true, "visibility": "Public",
        })
    );
}
