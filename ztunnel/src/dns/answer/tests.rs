use std::sync::Arc;

use mesh::model::{HealthStatus, NamespacedHostname, NetworkAddress, Visibility, Workload};
use mesh::store::{Store, Update};

use super::*;

/// A mesh told as a story; the client is in namespace shop.
#[derive(Default)]
struct World(Vec<Service>, Vec<Workload>);

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

impl World {
    fn service(mut self, namespace: &str, hostname: &str, vips: &[&str]) -> Self {
        let vip = |vip: &&str| {
            let (network, address) = vip.split_once('/').unwrap_or(("", *vip));
            NetworkAddress { network: network.into(), address: ip(address) }
        };
        self.0.push(Service {
            name: hostname.into(),
            namespace: namespace.into(),
            hostname: hostname.into(),
            vips: vips.iter().map(vip).collect(),
            ..Service::default()
        });
        self
    }

    /// Changes the service told last.
    fn but(mut self, change: impl FnOnce(&mut Service)) -> Self {
        change(self.0.last_mut().unwrap());
        self
    }

    /// Of the service told last.
    fn endpoint(mut self, addresses: &[&str], change: impl FnOnce(&mut Workload)) -> Self {
        let service = self.0.last().unwrap();
        let key = NamespacedHostname::new(service.namespace.clone(), service.hostname.clone());
        let mut workload = Workload {
            uid: format!("w{}", self.1.len()).into(),
            addresses: addresses.iter().map(|a| ip(a)).collect(),
            ..Workload::default()
        };
        workload.services.insert(key, Default::default());
        change(&mut workload);
        self.1.push(workload);
        self
    }

    fn known(self) -> Arc<Snapshot> {
        let store = Store::new();
        let update = self.0.into_iter().fold(Update::new(), Update::service);
        store.apply(self.1.into_iter().fold(update, Update::workload));
        store.snapshot()
    }

    /// What the client is told, as "canonical: addresses", `-` for not ours.
    fn told(self, name: &str, kind: Kind) -> String {
        ask(&self.known(), &CLIENT, name, kind)
    }
}

const CLIENT: Client<'_> =
    Client { namespace: "shop", network: "", domain: "cluster.local", preferred_namespace: None, ipv6: true };

fn ask(world: &Snapshot, client: &Client<'_>, name: &str, kind: Kind) -> String {
    let Some(mut found) = answer(world, client, name, kind) else { return "-".into() };
    found.addresses.sort();
    let addresses: Vec<String> = found.addresses.iter().map(IpAddr::to_string).collect();
    format!("{}: {}", found.canonical.unwrap_or_default(), addresses.join(" "))
}

const API: &str = "api.shop.svc.cluster.local";

#[test]
fn every_form_of_a_name_finds_the_service() {
    for (name, expected) in [
        (API, ": 10.96.0.1"),
        ("api", ": 10.96.0.1"),
        ("api.shop", ": 10.96.0.1"),
        ("api.shop.svc", ": 10.96.0.1"),
        // What a search list makes of the above.
        ("api.shop.svc.cluster.local.shop.svc.cluster.local", "api.shop.svc.cluster.local: 10.96.0.1"),
        ("api.shop.shop.svc.cluster.local", "api.shop: 10.96.0.1"),
        ("api.shop.cluster.local", "api.shop: 10.96.0.1"),
        // Somebody else's.
        ("api.other", "-"),
        ("api.other.svc.cluster.local", "-"),
        ("nothing", "-"),
        ("www.example.com", "-"),
        ("cluster.local", "-"),
        ("shop.svc.cluster.local", "-"),
        ("", "-"),
    ] {
        assert_eq!(World::default().service("shop", API, &["10.96.0.1"]).told(name, Kind::A), expected, "{name:?}");
    }
}

#[test]
fn names_outside_the_cluster_are_found_with_the_search_list_appended() {
    let world = World::default().service("shop", "www.example.com", &["240.240.0.1"]).known();
    for (name, expected) in [
        ("www.example.com", ": 240.240.0.1"),
        ("www.example.com.shop.svc.cluster.local", "www.example.com: 240.240.0.1"),
        ("www.example.com.svc.cluster.local", "www.example.com: 240.240.0.1"),
        ("www.example.com.cluster.local", "www.example.com: 240.240.0.1"),
        ("www.example.com.other.svc.cluster.local", "-"),
        ("example.com", "-"),
    ] {
        assert_eq!(ask(&world, &CLIENT, name, Kind::A), expected, "{name}");
    }
}

#[test]
fn a_wildcard_stands_for_any_labels_and_has_no_canonical_name() {
    let world = World::default()
        .service("shop", "*.example.com", &["240.240.0.1"])
        .service("shop", "www.example.com", &["240.240.0.2"])
        .known();
    for (name, expected) in [
        ("a.example.com", ": 240.240.0.1"),
        ("a.b.example.com", ": 240.240.0.1"),
        ("www.example.com", ": 240.240.0.2"),
        ("a.example.com.shop.svc.cluster.local", ": 240.240.0.1"),
        ("example.com", "-"),
        ("aexample.com", "-"),
    ] {
        assert_eq!(ask(&world, &CLIENT, name, Kind::A), expected, "{name}");
    }
}

#[test]
fn a_family_the_service_lacks_is_an_empty_answer_and_not_somebody_elses() {
    let both = &["10.96.0.1", "fd00::1"][..];
    let plain = || World::default().service("shop", API, both);
    assert_eq!(plain().told("api", Kind::Aaaa), ": fd00::1");
    assert_eq!(World::default().service("shop", API, &["10.96.0.1"]).told("api", Kind::Aaaa), ": ");
    assert_eq!(plain().but(|s| s.ip_families = IpFamilies::Ipv4).told("api", Kind::Aaaa), ": ");
    assert_eq!(plain().but(|s| s.ip_families = IpFamilies::Ipv6).told("api", Kind::A), ": ");
    assert_eq!(plain().but(|s| s.ip_families = IpFamilies::Dual).told("api", Kind::A), ": 10.96.0.1");
    let without = Client { ipv6: false, ..CLIENT };
    assert_eq!(ask(&plain().known(), &without, "api", Kind::Aaaa), ": ");
}

#[test]
fn a_headless_service_is_its_healthy_endpoints() {
    let headless = || World::default().service("shop", API, &[]);
    assert_eq!(headless().told("api", Kind::A), ": ", "it exists, nobody is there");
    let world = headless()
        .endpoint(&["10.0.0.1", "10.0.0.9", "fd00::1"], |_| {})
        .endpoint(&["10.0.0.2"], |_| {})
        .endpoint(&["10.0.0.3"], |w| w.status = HealthStatus::Unhealthy)
        .endpoint(&["10.0.0.4"], |w| w.network = "elsewhere".into())
        .known();
    assert_eq!(ask(&world, &CLIENT, "api", Kind::A), ": 10.0.0.1 10.0.0.2");
    assert_eq!(ask(&world, &CLIENT, "api", Kind::Aaaa), ": fd00::1");
    assert_eq!(ask(&world, &CLIENT, "db-0.api", Kind::A), "-", "single pods are the cluster DNS's to name");
    let all = headless()
        .but(|s| s.load_balancing.health_policy = mesh::model::HealthPolicy::AllowAll)
        .endpoint(&["10.0.0.1"], |w| w.status = HealthStatus::Unhealthy);
    assert_eq!(all.told("api", Kind::A), ": 10.0.0.1", "it publishes those that are not ready");
}

#[test]
fn names_of_service_entries_are_told_by_the_address_they_were_given() {
    let given = &["240.240.0.1", "2001:2::1"][..];
    let endpoint = |w: &mut Workload| w.hostname = "mirror.example.net".into();
    let world = World::default()
        .service("shop", "api.example.com", given)
        .endpoint(&[], endpoint)
        .service("shop", "waiting.example.com", &[])
        .endpoint(&[], endpoint)
        .service("shop", "*.wild.example.com", &[])
        .service("shop", "single", &["240.240.0.2"])
        .known();
    for (name, kind, expected) in [
        ("api.example.com", Kind::A, ": 240.240.0.1"),
        ("api.example.com", Kind::Aaaa, ": 2001:2::1"),
        ("api.example.com.shop.svc.cluster.local", Kind::A, "api.example.com: 240.240.0.1"),
        // Without an address there is nothing to tell: the name is whoever's it was before.
        ("waiting.example.com", Kind::A, "-"),
        ("a.wild.example.com", Kind::A, "-"),
        ("single", Kind::A, ": 240.240.0.2"),
        ("single.shop.svc.cluster.local", Kind::A, "single: 240.240.0.2"),
    ] {
        assert_eq!(ask(&world, &CLIENT, name, kind), expected, "{name} {kind:?}");
    }
}

#[test]
fn a_service_that_has_its_addresses_in_other_dns_is_left_to_it() {
    let world = World::default().service("shop", "db.example.com", &[]);
    assert_eq!(world.told("db.example.com", Kind::A), "-");
}

#[test]
fn only_addresses_of_the_clients_network_are_told() {
    let world = World::default().service("shop", API, &["10.96.0.1", "elsewhere/10.96.0.2"]).known();
    assert_eq!(ask(&world, &CLIENT, "api", Kind::A), ": 10.96.0.1");
    assert_eq!(ask(&world, &Client { network: "elsewhere", ..CLIENT }, "api", Kind::A), ": 10.96.0.2");
    assert_eq!(ask(&world, &Client { network: "third", ..CLIENT }, "api", Kind::A), ": ");
}

#[test]
fn of_services_with_one_name_the_nearest_wins_and_hidden_ones_are_not_seen() {
    let name = "www.example.com";
    let both =
        || World::default().service("far", name, &["240.240.0.1"]).service("near", name, &["240.240.0.2"]).known();
    assert_eq!(ask(&both(), &Client { namespace: "near", ..CLIENT }, name, Kind::A), ": 240.240.0.2");
    assert_eq!(ask(&both(), &Client { namespace: "far", ..CLIENT }, name, Kind::A), ": 240.240.0.1");
    let preferring = |namespace| Client { preferred_namespace: Some(namespace), ..CLIENT };
    assert_eq!(ask(&both(), &preferring("near"), name, Kind::A), ": 240.240.0.2");
    assert_eq!(ask(&both(), &preferring("far"), name, Kind::A), ": 240.240.0.1");
    let canonical = World::default()
        .service("far", name, &["240.240.0.1"])
        .but(|s| s.canonical = true)
        .service("near", name, &["240.240.0.2"])
        .known();
    assert_eq!(ask(&canonical, &preferring("near"), name, Kind::A), ": 240.240.0.1");
    let hidden =
        || World::default().service("far", name, &["240.240.0.1"]).but(|s| s.visibility = Visibility::Namespace);
    assert_eq!(hidden().told(name, Kind::A), "-");
    assert_eq!(ask(&hidden().known(), &Client { namespace: "far", ..CLIENT }, name, Kind::A), ": 240.240.0.1");
}

#[test]
fn a_kubernetes_service_is_found_by_its_short_names_whatever_other_namespaces_call_theirs() {
    let world = World::default()
        .service("shop", API, &["10.96.0.1"])
        .service("aaa", "api", &["240.240.0.1"])
        .service("aaa", "api.shop", &["240.240.0.2"])
        .service("aaa", "*.shop", &["240.240.0.3"])
        .service("aaa", "*.local", &["240.240.0.4"])
        .service("aaa", "www.example.com", &["240.240.0.5"])
        .known();
    for (name, expected) in [
        ("api", ": 10.96.0.1"),
        ("api.shop", ": 10.96.0.1"),
        ("api.shop.svc", ": 10.96.0.1"),
        (API, ": 10.96.0.1"),
        ("api.shop.shop.svc.cluster.local", "api.shop: 10.96.0.1"),
        ("api.shop.cluster.local", "api.shop: 10.96.0.1"),
        // No Service is called so.
        ("www.example.com", ": 240.240.0.5"),
        ("db.shop", ": 240.240.0.3"),
    ] {
        assert_eq!(ask(&world, &CLIENT, name, Kind::A), expected, "{name}");
    }
    let own = Client { namespace: "aaa", ..CLIENT };
    assert_eq!(ask(&world, &own, "api.shop", Kind::A), ": 240.240.0.2", "for its own pods a namespace may say so");
    assert_eq!(ask(&world, &own, "api.shop.svc.cluster.local", Kind::A), ": 10.96.0.1");
}

#[test]
fn the_longest_name_there_can_be_is_looked_up_in_bounded_time() {
    let name = vec!["a"; 127].join(".");
    assert_eq!(World::default().service("shop", API, &["10.96.0.1"]).told(&name, Kind::A), "-");
    let count: usize = candidates(&CLIENT, &name).iter().map(|c| 1 + wildcards(&c.name).count()).sum();
    assert!(count < 2000, "{count}");
}
