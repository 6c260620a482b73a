use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::json;

use super::*;
use crate::model::{
    EndpointPort, HealthPolicy, HealthStatus, LoadBalancing, NamespacedName, NetworkAddress, NetworkMode, ServicePort,
    Template, TunnelProtocol, Visibility,
};
use crate::policy::{Action, Scope};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn key(text: &str) -> NamespacedHostname {
    text.parse().unwrap()
}

fn pod(name: &str, address: &str) -> Workload {
    Workload {
        uid: format!("Kubernetes//Pod/shop/{name}").into(),
        name: name.into(),
        addresses: vec![ip(address)],
        template: Arc::new(Template { namespace: "shop".into(), ..Default::default() }),
        ..Default::default()
    }
}

fn serving(mut workload: Workload, service: &str) -> Workload {
    let port = EndpointPort { service_port: 80, target_port: 8080, app_protocol: Default::default() };
    workload.services.insert(key(service), [port].into_iter().collect());
    workload
}

fn service(name: &str) -> Service {
    let NamespacedHostname { namespace, hostname } = key(name);
    let ports = [(80, ServicePort { target_port: 8080, app_protocol: Default::default() })].into();
    Service { name: hostname.clone(), namespace, hostname, ports, ..Default::default() }
}

fn vip(service: Service, address: &str) -> Service {
    Service { vips: vec![address.parse().unwrap()], ..service }
}

fn endpoints(snapshot: &Snapshot, service: &str) -> Vec<String> {
    snapshot.endpoints(&key(service)).map(|(workload, _)| workload.name.to_string()).collect()
}

fn name(service: Option<&Arc<Service>>) -> Option<String> {
    service.map(|service| service.key().to_string())
}

#[test]
fn a_workload_is_found_by_address_in_its_network_only() {
    let store = Store::new();
    let east = pod("a", "10.0.0.1").with(|w| w.network = "east".into());
    store.apply(Update::new().workload(east).workload(pod("b", "10.0.0.1")));
    let snapshot = store.snapshot();
    let found = |network| snapshot.workload_by_ip(network, ip("10.0.0.1")).map(|w| w.name.to_string());
    assert_eq!(found("east").as_deref(), Some("a"));
    assert_eq!(found("").as_deref(), Some("b"));
    assert_eq!(found("west"), None);
}

#[test]
fn host_network_workloads_are_never_found_by_address() {
    let store = Store::new();
    store.apply(
        Update::new()
            .workload(pod("host", "192.0.2.1").with(|w| w.network_mode = NetworkMode::HostNetwork))
            .workload(pod("host2", "192.0.2.1").with(|w| w.network_mode = NetworkMode::HostNetwork)),
    );
    let snapshot = store.snapshot();
    assert!(snapshot.workload_by_ip("", ip("192.0.2.1")).is_none());
    assert!(snapshot.workload("Kubernetes//Pod/shop/host").is_some());
}

#[test]
fn a_workload_is_found_by_the_host_name_it_has_itself() {
    let store = Store::new();
    let named = |uid: &str, host: &str| {
        pod(uid, "192.0.2.1").with(|w| {
            w.uid = uid.into();
            w.hostname = host.into();
        })
    };
    let find = |name: &str| store.snapshot().workload_by_hostname(&key(name)).map(|w| w.uid.to_string());
    store.apply(Update::new().workload(named("b", "gw.test")).workload(named("a", "gw.test")).workload(named("c", "")));
    assert_eq!(find("shop/gw.test").as_deref(), Some("a"), "the order of arrival does not matter");
    assert_eq!(find("other/gw.test"), None);
    let nameless = NamespacedHostname { namespace: "shop".into(), hostname: "".into() };
    assert!(store.snapshot().workload_by_hostname(&nameless).is_none(), "most have no name");
    store.apply(Update::new().workload(named("a", "gw2.test")));
    assert_eq!((find("shop/gw.test").as_deref(), find("shop/gw2.test").as_deref()), (Some("b"), Some("a")));
    store.apply(Update::new().remove_address("b"));
    assert_eq!(find("shop/gw.test"), None);
}

#[test]
fn of_several_workloads_on_one_address_the_captured_pod_wins() {
    let entry = |uid: &str, protocol| {
        pod(uid, "10.0.0.1").with(|w| {
            w.uid = uid.into();
            w.protocol = protocol;
        })
    };
    let ranked = [
        entry("c//Pod/shop/captured", TunnelProtocol::Hbone),
        entry("c//Pod/shop/plain", TunnelProtocol::None),
        entry("c/networking.istio.io/WorkloadEntry/shop/vm", TunnelProtocol::Hbone),
        entry("c/discovery.k8s.io/EndpointSlice/shop/x", TunnelProtocol::None),
    ];
    let store = Store::new();
    for workload in ranked.iter().rev() {
        store.apply(Update::new().workload(workload.clone()));
    }
    for workload in &ranked {
        let snapshot = store.snapshot();
        assert_eq!(snapshot.workload_by_ip("", ip("10.0.0.1")).unwrap().uid, workload.uid);
        store.apply(Update::new().remove_address(&*workload.uid));
    }
    assert!(store.snapshot().workload_by_ip("", ip("10.0.0.1")).is_none());
}

#[test]
fn an_update_moves_a_workload_to_its_new_address_and_services() {
    let store = Store::new();
    store.apply(Update::new().service(service("shop/a")).service(service("shop/b")));
    store.apply(Update::new().workload(serving(pod("p", "10.0.0.1"), "shop/a")));
    store.apply(Update::new().workload(serving(pod("p", "10.0.0.2"), "shop/b")));
    let snapshot = store.snapshot();
    assert!(snapshot.workload_by_ip("", ip("10.0.0.1")).is_none());
    assert!(snapshot.workload_by_ip("", ip("10.0.0.2")).is_some());
    assert_eq!(endpoints(&snapshot, "shop/a"), Vec::<String>::new());
    assert_eq!(endpoints(&snapshot, "shop/b"), ["p"]);
}

#[test]
fn one_vip_may_belong_to_a_service_in_each_namespace() {
    let store = Store::new();
    let shared = |name| vip(service(name), "net/10.1.0.1");
    store.apply(
        Update::new()
            .service(shared("a/api"))
            .service(Service { canonical: true, ..shared("b/api") })
            .service(shared("c/api"))
            .service(Service { visibility: Visibility::Namespace, ..shared("d/api") }),
    );
    let snapshot = store.snapshot();
    assert_eq!(snapshot.services_by_vip("net", ip("10.1.0.1")).count(), 4);
    assert_eq!(snapshot.services_by_vip("other", ip("10.1.0.1")).count(), 0);
    let by_vip = |namespace| name(snapshot.best_service_by_vip("net", ip("10.1.0.1"), namespace));
    let by_host = |namespace| name(snapshot.service_by_hostname("api", namespace));
    for (client, expected) in [("c", "c/api"), ("elsewhere", "b/api"), ("d", "d/api"), ("b", "b/api")] {
        assert_eq!(by_vip(client).as_deref(), Some(expected), "client in {client}");
        assert_eq!(by_host(client).as_deref(), Some(expected), "client in {client}");
    }
}

#[test]
fn a_private_service_does_not_exist_for_others() {
    let store = Store::new();
    let private = Service { visibility: Visibility::Namespace, canonical: true, ..vip(service("a/api"), "/10.1.0.1") };
    store.apply(Update::new().service(private));
    let snapshot = store.snapshot();
    assert!(snapshot.best_service_by_vip("", ip("10.1.0.1"), "b").is_none());
    assert!(snapshot.service_by_hostname("api", "b").is_none());
    assert!(snapshot.best_service_by_vip("", ip("10.1.0.1"), "a").is_some());
}

#[test]
fn preferred_namespace_counts_after_own_and_canonical() {
    let store = Store::new();
    store.apply(Update::new().service(service("a/api")).service(service("b/api")));
    let choose =
        |client, preferred| name(store.snapshot().service_by_hostname_preferring("api", client, preferred)).unwrap();
    assert_eq!(choose("x", None), "a/api");
    assert_eq!(choose("x", Some("b")), "b/api");
    assert_eq!(choose("a", Some("b")), "a/api");
    store.apply(Update::new().service(Service { canonical: true, ..service("a/api") }));
    assert_eq!(choose("x", Some("b")), "a/api");
}

#[test]
fn ranges_count_only_where_no_exact_vip_does() {
    let ranges = |name, list: &[&str]| Service {
        cidr_vips: list.iter().map(|range| range.parse().unwrap()).collect(),
        ..service(name)
    };
    let store = Store::new();
    store.apply(
        Update::new()
            .service(ranges("a/wide", &["net/10.0.0.0/8", "net/fd00::/8"]))
            .service(ranges("b/narrow", &["net/10.5.0.0/16"]))
            .service(Service { canonical: true, ..ranges("c/canonical", &["net/10.5.0.0/16", "other/0.0.0.0/0"]) })
            .service(vip(service("d/exact"), "net/10.5.0.1")),
    );
    let find = |network: &str, address, client| {
        name(store.snapshot().best_service_by_vip(network, ip(address), client)).unwrap_or_default()
    };
    assert_eq!(find("net", "10.5.0.1", "a"), "d/exact");
    assert_eq!(find("net", "10.5.0.2", "x"), "c/canonical");
    assert_eq!(find("net", "10.5.0.2", "b"), "b/narrow");
    assert_eq!(find("net", "10.5.0.2", "a"), "a/wide", "own namespace before the longer prefix");
    assert_eq!(find("net", "10.6.0.1", "x"), "a/wide");
    assert_eq!(find("net", "fd00::1", "x"), "a/wide");
    assert_eq!(find("net", "192.0.2.1", "x"), "");
    assert_eq!(find("other", "192.0.2.1", "x"), "c/canonical");
    store.apply(Update::new().remove_address("c/canonical").remove_address("b/narrow"));
    assert_eq!(find("net", "10.5.0.2", "x"), "a/wide");
    store.apply(Update::new().workload(pod("p", "10.5.0.2").with(|w| w.network = "net".into())));
    assert_eq!(find("net", "10.5.0.2", "a"), "", "a workload's");
    assert_eq!(find("net", "10.5.0.3", "x"), "a/wide");
    store.apply(Update::new().workload(pod("p", "10.5.0.1").with(|w| w.network = "net".into())));
    assert_eq!(find("net", "10.5.0.1", "x"), "d/exact");
}

#[test]
fn endpoints_may_come_before_their_service() {
    let store = Store::new();
    store.apply(Update::new().workload(serving(pod("p", "10.0.0.1"), "shop/api")));
    let dump = store.snapshot().config_dump();
    assert!(dump["stagedServices"]["shop/api"]["Kubernetes//Pod/shop/p"].is_object(), "{dump:?}");
    store.apply(Update::new().service(service("shop/api")));
    let snapshot = store.snapshot();
    assert_eq!(endpoints(&snapshot, "shop/api"), ["p"]);
    assert_eq!(snapshot.config_dump()["stagedServices"], json!({}));
    let (_, ports) = snapshot.endpoints(&key("shop/api")).next().unwrap();
    assert_eq!(ports.target(80), Some(8080));
}

#[test]
fn updating_or_recreating_a_service_keeps_its_endpoints() {
    let store = Store::new();
    store.apply(Update::new().service(service("shop/api")).workload(serving(pod("p", "10.0.0.1"), "shop/api")));
    store.apply(Update::new().service(vip(service("shop/api"), "/10.1.0.1")));
    assert_eq!(endpoints(&store.snapshot(), "shop/api"), ["p"]);
    store.apply(Update::new().remove_address("shop/api"));
    assert!(store.snapshot().service(&key("shop/api")).is_none());
    store.apply(Update::new().service(service("shop/api")));
    assert_eq!(endpoints(&store.snapshot(), "shop/api"), ["p"]);
}

#[test]
fn unhealthy_endpoints_serve_only_where_all_are_allowed() {
    let store = Store::new();
    let sick = Workload { status: HealthStatus::Unhealthy, ..serving(pod("sick", "10.0.0.1"), "shop/api") };
    let well = serving(pod("well", "10.0.0.2"), "shop/api");
    store.apply(Update::new().workload(sick).workload(well).service(service("shop/api")));
    assert_eq!(endpoints(&store.snapshot(), "shop/api"), ["well"]);
    assert_eq!(store.snapshot().all_endpoints(&key("shop/api")).count(), 2);
    let load_balancing = LoadBalancing { health_policy: HealthPolicy::AllowAll, ..Default::default() };
    store.apply(Update::new().service(Service { load_balancing, ..service("shop/api") }));
    assert_eq!(endpoints(&store.snapshot(), "shop/api"), ["sick", "well"]);
}

fn policy(name: &str, scope: Scope) -> Policy {
    let NamespacedHostname { namespace, hostname } = key(name);
    Policy::new(NamespacedName::new(namespace, hostname), scope, Action::Deny, vec![])
}

#[test]
fn policies_govern_by_mesh_namespace_and_name() {
    let store = Store::new();
    store.apply(
        Update::new()
            .policy(policy("root/mesh", Scope::Global))
            .policy(policy("shop/all", Scope::Namespace))
            .policy(policy("other/all", Scope::Namespace))
            .policy(policy("shop/selected", Scope::WorkloadSelector))
            .policy(policy("shop/unselected", Scope::WorkloadSelector)),
    );
    let selected = vec!["shop/selected".into(), "shop/unknown".into()];
    let workload = pod("p", "10.0.0.1").with(|w| w.authorization_policies = selected);
    let governing = || {
        let snapshot = store.snapshot();
        snapshot.policies_for(&workload).map(|policy| policy.key().to_string()).collect::<Vec<_>>()
    };
    assert_eq!(governing(), ["root/mesh", "shop/all", "shop/selected"]);
    store.apply(Update::new().policy(policy("shop/all", Scope::WorkloadSelector)).remove_policy("root/mesh"));
    assert_eq!(governing(), ["shop/selected"], "a policy leaves its old scope");
}

#[test]
fn readers_keep_their_snapshot_and_learn_of_changes() {
    let store = Store::new();
    let mut changes = store.watch();
    let before = store.snapshot();
    let version = store.apply(Update::new().workload(pod("p", "10.0.0.1")));
    assert!(changes.has_changed().unwrap());
    assert_eq!(*changes.borrow_and_update(), version);
    assert_eq!((before.version(), before.workloads().count()), (0, 0));
    assert_eq!(store.snapshot().version(), version);
    assert_eq!(store.apply(Update::new().workload(pod("p", "10.0.0.1"))), version, "nothing changed");
    assert!(!changes.has_changed().unwrap());
}

#[test]
fn an_update_shares_what_it_does_not_touch() {
    let store = Store::new();
    let mut update = Update::new();
    for i in 0..1000u32 {
        let address = std::net::Ipv4Addr::from(0x0a00_0000 + i).to_string();
        update.push_workload(serving(pod(&format!("p{i:04}"), &address), "shop/api"));
    }
    store.apply(update.service(service("shop/api")));
    let before = store.snapshot();
    store.apply(
        Update::new().workload(Workload { node: "n".into(), ..serving(pod("p0500", "10.0.1.244"), "shop/api") }),
    );
    let after = store.snapshot();
    let unchanged =
        before.workloads().filter(|old| after.workload(&old.uid).is_some_and(|new| Arc::ptr_eq(old, new))).count();
    assert_eq!(unchanged, 999);
    assert!(before.indexes.services.ptr_eq(&after.indexes.services), "no service was touched");
    assert!(before.indexes.policies.ptr_eq(&after.indexes.policies));
    assert!(!before.indexes.workloads.ptr_eq(&after.indexes.workloads));
    let endpoint = |snapshot: &Snapshot| {
        snapshot.endpoints(&key("shop/api")).find(|(w, _)| &*w.name == "p0500").map(|(w, _)| w.node.to_string())
    };
    assert_eq!((endpoint(&before).as_deref(), endpoint(&after).as_deref()), (Some(""), Some("n")));
}

/// A mesh small enough that random changes collide: same addresses, same services, same names.
fn random_change(rng: &mut StdRng) -> Change {
    let uids = ["c//Pod/a/1", "c//Pod/a/2", "c//Pod/b/3", "c/x/WorkloadEntry/a/4", "c/x/EndpointSlice/b/5"];
    let services = ["a/api", "b/api", "a/web", "c/db"];
    let addresses = ["10.0.0.1", "10.0.0.2", "fd00::1"];
    let networks = ["", "east"];
    let ranges = ["/10.0.0.0/8", "/10.0.0.0/24", "east/10.0.0.0/24", "/fd00::/8"];
    let policies = ["a/p", "b/p", "root/p"];
    let pick = |rng: &mut StdRng, list: &[&str]| list.choose(rng).copied().unwrap_or_default().to_owned();
    match rng.random_range(0..10) {
        0..4 => {
            let mut workload = Workload::default().with(|w| {
                w.uid = pick(rng, &uids).into();
                w.namespace = pick(rng, &["a", "b"]).into();
                w.network = pick(rng, &networks).into();
                w.addresses = (0..rng.random_range(0..3)).map(|_| ip(&pick(rng, &addresses))).collect();
                w.hostname = pick(rng, &["", "h.test"]).into();
                w.protocol = if rng.random() { TunnelProtocol::Hbone } else { TunnelProtocol::None };
                w.network_mode = if rng.random_ratio(1, 4) { NetworkMode::HostNetwork } else { NetworkMode::Standard };
                w.status = if rng.random_ratio(1, 4) { HealthStatus::Unhealthy } else { HealthStatus::Healthy };
            });
            for _ in 0..rng.random_range(0..3) {
                workload = serving(workload, &pick(rng, &services));
            }
            Change::Workload(Arc::new(workload))
        }
        4..7 => {
            let vip = |rng: &mut StdRng| NetworkAddress {
                network: pick(rng, &networks).into(),
                address: ip(&pick(rng, &addresses)),
            };
            let health_policy = if rng.random() { HealthPolicy::AllowAll } else { HealthPolicy::OnlyHealthy };
            let service = Service {
                vips: (0..rng.random_range(0..3)).map(|_| vip(rng)).collect(),
                cidr_vips: (0..rng.random_range(0..3)).map(|_| pick(rng, &ranges).parse().unwrap()).collect(),
                canonical: rng.random(),
                visibility: if rng.random() { Visibility::Public } else { Visibility::Namespace },
                load_balancing: LoadBalancing { health_policy, ..Default::default() },
                ..service(&pick(rng, &services))
            };
            Change::Service(Arc::new(service))
        }
        7 => {
            let scope = [Scope::Global, Scope::Namespace, Scope::WorkloadSelector].choose(rng).copied();
            Change::Policy(Box::new(policy(&pick(rng, &policies), scope.unwrap_or_default())))
        }
        8 => Change::RemovePolicy(pick(rng, &policies)),
        _ => Change::RemoveAddress(if rng.random() { pick(rng, &uids) } else { pick(rng, &services) }),
    }
}

/// The invariant of the module: content follows from what is known, whatever the way there.
#[test]
fn any_sequence_of_updates_gives_the_snapshot_of_its_final_state() {
    for seed in 0..300 {
        let mut rng = StdRng::seed_from_u64(seed);
        let store = Store::new();
        for _ in 0..rng.random_range(1..60) {
            let changes = (0..rng.random_range(1..4)).map(|_| random_change(&mut rng)).collect();
            store.apply(Update { changes });
        }
        let reached = store.snapshot();

        let fresh = Store::new();
        let mut update = Update::new();
        // Services after workloads for half of the seeds: staging takes part.
        if seed % 2 == 0 {
            reached.services().for_each(|service| update.push_service((**service).clone()));
        }
        reached.workloads().for_each(|workload| update.push_workload((**workload).clone()));
        reached.services().for_each(|service| update.push_service((**service).clone()));
        reached.policies().for_each(|policy| update.push_policy((**policy).clone()));
        fresh.apply(update);
        assert_eq!(reached.indexes, fresh.snapshot().indexes, "seed {seed}");

        let names: Vec<_> = reached.workloads().map(|w| w.uid.to_string()).collect();
        let services: Vec<_> = reached.services().map(|s| s.key().to_string()).collect();
        let policies: Vec<_> = reached.policies().map(|p| p.key().to_string()).collect();
        let mut removal = Update::new();
        names.into_iter().chain(services).for_each(|name| removal.push_remove_address(name));
        policies.into_iter().for_each(|name| removal.push_remove_policy(name));
        store.apply(removal);
        assert_eq!(store.snapshot().indexes, Indexes::default(), "seed {seed}: removal leaves nothing behind");
    }
}

#[test]
fn dump_shows_services_with_their_endpoints_and_health() {
    let store = Store::new();
    store.apply(
        Update::new()
            .service(vip(service("shop/api"), "net/10.1.0.1"))
            .workload(Workload { status: HealthStatus::Unhealthy, ..serving(pod("p", "10.0.0.1"), "shop/api") })
            .policy(policy("shop/deny", Scope::Namespace)),
    );
    let dump = store.snapshot().config_dump();
    let uid = "Kubernetes//Pod/shop/p";
    assert_eq!(
        dump["services"][0]["endpoints"],
        json!({ uid: {"workloadUid": uid, "port": {"80": 8080}, "status": "Unhealthy"} })
    );
    assert_eq!(dump["services"][0]["vips"], json!(["net/10.1.0.1"]));
    assert_eq!(dump["workloads"][0]["uid"], json!(uid));
    assert_eq!(dump["policies"][0]["action"], json!("Deny"));
}
