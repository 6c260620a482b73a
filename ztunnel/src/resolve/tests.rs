use std::collections::BTreeMap;
use std::net::IpAddr;

use mesh::model::{
    ApplicationTunnel, ApplicationTunnelProtocol, EndpointPort, GatewayAddress, GatewayDestination, HealthPolicy,
    HealthStatus, IpFamilies, LoadBalancing, Locality, NetworkAddress, NetworkMode, RoutingScope, ServicePort,
    Template, TunnelProtocol, Visibility, WeightedWaypoint,
};
use mesh::store::{Store, Update};
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::*;

mod balance;
mod inbound;
mod missing;
mod names;
mod networks;
mod waypoints;

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
        addresses: vec![ip(address)],
        template: Arc::new(Template {
            namespace: "shop".into(),
            service_account: format!("sa-{name}").into(),
            protocol: TunnelProtocol::Hbone,
            ..Template::default()
        }),
        ..Workload::default()
    }
}

fn client() -> Workload {
    let locality = Locality { region: "r1".into(), zone: "z1".into(), subzone: "".into() };
    workload("client", "10.0.0.1").with(|w| {
        w.node = "node-a".into();
        w.locality = locality;
    })
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
    let world = World::new().workload(workload("web", "10.0.0.2").with(|w| w.protocol = TunnelProtocol::None));
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
fn a_private_service_is_nobodys_to_other_namespaces() {
    let mut private = service("api", "10.96.0.1");
    private.namespace = "vault".into();
    private.visibility = Visibility::Namespace;
    let mut inside = serves(workload("web", "10.0.0.2"), "none", &[]);
    inside.services.insert(
        private.key(),
        [EndpointPort { service_port: 80, target_port: 80, app_protocol: Default::default() }].into_iter().collect(),
    );
    let world = || World::new().service(private.clone()).workload(inside.clone());
    check(world().route(&client(), "10.96.0.1:80"), "10.96.0.1:80", None, &[], Via::Passthrough);
    let neighbour = client().with(|w| w.namespace = "vault".into());
    check(world().route(&neighbour, "10.96.0.1:80"), "10.0.0.2:15008", Some("10.0.0.2:80"), &["sa-web"], Via::Direct);
}

#[test]
fn a_canonical_service_wins_where_none_is_the_clients_own() {
    let of = |namespace: &str, canonical, target| {
        let mut api = service("api", "10.96.0.1");
        (api.namespace, api.canonical) = (namespace.into(), canonical);
        api.ports = BTreeMap::from([(80, ServicePort { target_port: target, app_protocol: Default::default() })]);
        let pod = workload(namespace, &format!("10.0.1.{target}"));
        let port = EndpointPort { service_port: 80, target_port: target, app_protocol: Default::default() };
        let pod = pod.with(|w| w.services = [(api.key(), [port].into_iter().collect())].into());
        (api, pod)
    };
    let ((a, a_pod), (b, b_pod), (c, c_pod)) = (of("a", false, 1), of("b", true, 2), of("c", false, 3));
    let world = World(vec![client(), a_pod, b_pod, c_pod], vec![a, b, c]).snapshot();
    let hop = |namespace: &str| {
        let from = client().with(|w| w.namespace = namespace.into());
        outbound(&world, &from, dst("10.96.0.1:80"), &mut StdRng::seed_from_u64(1)).unwrap().next_hop.to_string()
    };
    assert_eq!([hop("shop"), hop("a"), hop("c")], ["10.0.1.2:15008", "10.0.1.1:15008", "10.0.1.3:15008"]);
}

#[test]
fn an_address_in_a_range_is_the_services() {
    let mut wide = service("wide", "");
    wide.cidr_vips = vec!["/198.51.100.0/24".parse().unwrap()];
    let mut exact = service("exact", "198.51.100.7");
    exact.ports = BTreeMap::from([(80, ServicePort { target_port: 1, app_protocol: Default::default() })]);
    let pod = serves(serves(workload("web", "10.0.0.2"), "wide", &[]), "exact", &[]);
    let world = || World::new().service(wide.clone()).service(exact.clone()).workload(pod.clone());
    let route = world().route(&client(), "198.51.100.1:80");
    check(route, "10.0.0.2:15008", Some("10.0.0.2:8080"), &["sa-web"], Via::Direct);
    let route = world().route(&client(), "198.51.100.7:80");
    check(route, "10.0.0.2:15008", Some("10.0.0.2:1"), &["sa-web"], Via::Direct);
    check(world().route(&client(), "198.51.101.1:80"), "198.51.101.1:80", None, &[], Via::Passthrough);
}

#[test]
fn a_headless_services_pods_are_called_as_workloads() {
    let mut api = service("api", "");
    api.waypoint = Some(gateway("waypoint"));
    let web = serves(workload("web", "10.0.0.2"), "api", &[(80, 9090)]);
    let world = World::new().service(api).service(waypoint_service()).workload(waypoint_pod()).workload(web);
    // What DNS answers is the pod's address: neither the service's port nor its waypoint has a part in that.
    check(world.route(&client(), "10.0.0.2:80"), "10.0.0.2:15008", Some("10.0.0.2:80"), &["sa-web"], Via::Direct);
}

#[test]
fn host_network_pods_are_endpoints_but_no_ones_by_address() {
    let web = serves(workload("web", "192.0.2.5"), "api", &[(80, 9090)]);
    let web = web.with(|w| {
        w.network_mode = NetworkMode::HostNetwork;
        w.protocol = TunnelProtocol::None;
    });
    let world = || World::new().service(service("api", "10.96.0.1")).workload(web.clone());
    check(world().route(&client(), "10.96.0.1:80"), "192.0.2.5:9090", None, &[], Via::Direct);
    check(world().route(&client(), "192.0.2.5:9090"), "192.0.2.5:9090", None, &[], Via::Passthrough);
}

#[test]
fn a_pod_may_be_an_endpoint_of_the_service_it_calls() {
    let own = serves(client(), "api", &[(80, 9090)]);
    let world = World(vec![own.clone()], vec![service("api", "10.96.0.1")]);
    check(world.route(&own, "10.96.0.1:80"), "10.0.0.1:15008", Some("10.0.0.1:9090"), &["sa-client"], Via::Direct);
}

#[test]
fn a_pod_that_speaks_hbone_itself_is_called_like_any_other() {
    let world = World::new().workload(workload("web", "10.0.0.2").with(|w| w.native_tunnel = true));
    check(world.route(&client(), "10.0.0.2:80"), "10.0.0.2:15008", Some("10.0.0.2:80"), &["sa-web"], Via::Direct);
}

#[test]
fn of_several_workloads_on_an_address_the_captured_pod_is_called() {
    let entry = workload("vm", "10.0.0.2").with(|w| {
        w.uid = "Kubernetes/networking.istio.io/WorkloadEntry/shop/vm".into();
        w.protocol = TunnelProtocol::None;
    });
    let world = World::new().workload(entry).workload(workload("web", "10.0.0.2"));
    check(world.route(&client(), "10.0.0.2:80"), "10.0.0.2:15008", Some("10.0.0.2:80"), &["sa-web"], Via::Direct);
}

#[test]
fn endpoints_count_that_were_known_before_their_service() {
    let store = Store::new();
    let go = || outbound(&store.snapshot(), &client(), dst("10.96.0.1:80"), &mut StdRng::seed_from_u64(1));
    store.apply(Update::new().workload(serves(workload("web", "10.0.0.2"), "api", &[(80, 80)])));
    check(go(), "10.96.0.1:80", None, &[], Via::Passthrough);
    store.apply(Update::new().service(service("api", "10.96.0.1")));
    check(go(), "10.0.0.2:15008", Some("10.0.0.2:80"), &["sa-web"], Via::Direct);
}

#[test]
fn who_cannot_prove_an_identity_is_not_called() {
    let world = World::new().workload(workload("web", "10.0.0.2").with(|w| w.service_account = "".into()));
    let error = world.route(&client(), "10.0.0.2:80").unwrap_err();
    assert!(matches!(error, NoRoute::BadIdentity { .. }), "{error}");
    assert_eq!(error.flag(), ResponseFlag::IdentityError);
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

/// An address is another pod's before its last owner has left the mesh: in whatever order that becomes known, the tunnel
/// is for one of the two by its own identity, so whoever answers as the other is refused.
#[test]
fn a_reused_address_is_never_taken_for_its_last_owner() {
    let (old, new) = (workload("old", "10.0.0.5"), workload("new", "10.0.0.5"));
    let plain = |w: &Workload| w.clone().with(|w| w.protocol = TunnelProtocol::None);
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
