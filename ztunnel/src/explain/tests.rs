use std::collections::BTreeMap;

use mesh::model::{
    EndpointPort, GatewayAddress, GatewayDestination, HealthPolicy, HealthStatus, LoadBalancing, LoadBalancingMode,
    NamespacedHostname, NamespacedName, NetworkAddress, RoutingScope, Service, ServicePort, Template, TunnelProtocol,
    WeightedWaypoint,
};
use mesh::policy::{Action, Policy, Scope};
use mesh::store::{Store, Update};

use super::*;

/// A mesh told as a story, everything in namespace shop unless told otherwise.
#[derive(Default)]
struct Story {
    workloads: Vec<Workload>,
    services: Vec<Service>,
    policies: Vec<Policy>,
    settings: Settings,
    /// Names of workloads that are captured here, with the states of their certificates.
    here: Vec<(&'static str, &'static str)>,
    names: BTreeMap<Arc<str>, Result<Vec<IpAddr>, String>>,
}

fn workload(name: &str, address: &str) -> Workload {
    Workload {
        uid: format!("Kubernetes//Pod/shop/{name}").into(),
        name: name.into(),
        addresses: vec![address.parse().expect("an address")],
        template: Arc::new(Template {
            namespace: "shop".into(),
            service_account: name.into(),
            protocol: TunnelProtocol::Hbone,
            ..Template::default()
        }),
        ..Workload::default()
    }
}

fn service(name: &str, vip: &str) -> Service {
    let vip =
        (!vip.is_empty()).then(|| NetworkAddress { network: "".into(), address: vip.parse().expect("an address") });
    Service {
        name: name.into(),
        namespace: "shop".into(),
        hostname: format!("{name}.shop.svc.cluster.local").into(),
        vips: vip.into_iter().collect(),
        ports: BTreeMap::from([(80, ServicePort { target_port: 8080, ..ServicePort::default() })]),
        ..Service::default()
    }
}

fn key(service: &str) -> NamespacedHostname {
    NamespacedHostname::new("shop", format!("{service}.shop.svc.cluster.local"))
}

fn serves(mut workload: Workload, service: &str, port: u16) -> Workload {
    let port = EndpointPort { service_port: port, target_port: 8080, app_protocol: Default::default() };
    workload.services.insert(key(service), [port].into_iter().collect());
    workload
}

fn waypoint() -> GatewayAddress {
    GatewayAddress { destination: GatewayDestination::Hostname(key("wp")), hbone_mtls_port: 15008 }
}

fn policy(name: &str, action: Action, rules: serde_json::Value) -> Policy {
    let groups = serde_json::from_value(rules).expect("rules of a test parse");
    Policy::new(NamespacedName::new("shop", name), Scope::Namespace, action, groups)
}

fn principal(name: &str) -> serde_json::Value {
    serde_json::json!([[{"principals": [{"Exact": format!("cluster.local/ns/shop/sa/{name}")}]}]])
}

/// A client and a service `web` of two pods.
fn story() -> Story {
    Story {
        workloads: vec![
            workload("client", "10.0.0.1"),
            serves(workload("web-1", "10.0.0.2"), "web", 80),
            serves(workload("web-2", "10.0.0.3"), "web", 80),
        ],
        services: vec![service("web", "10.96.0.1")],
        settings: Settings { domain: "cluster.local".into(), ipv6: true, ..Settings::default() },
        here: vec![("client", "Available")],
        ..Story::default()
    }
}

impl Story {
    fn asked(&self, from: &str, to: &str) -> (Result<Explanation, NoAnswer>, BTreeSet<Arc<str>>) {
        let store = Store::new();
        let mut update = Update::new();
        self.workloads.iter().cloned().for_each(|workload| update.push_workload(workload));
        self.services.iter().cloned().for_each(|service| update.push_service(service));
        self.policies.iter().cloned().for_each(|policy| update.push_policy(policy));
        store.apply(update);
        let here = |workload: &Workload| {
            let state = self.here.iter().find(|(name, _)| *name == &*workload.name);
            state.map(|(_, state)| (*state).to_owned())
        };
        let (world, lacking) = (store.snapshot(), Mutex::default());
        let view = View { world: &world, settings: &self.settings, here: &here, names: &self.names, lacking };
        let outcome = explain(&view, from, to);
        (outcome, view.lacking.into_inner().expect("nothing panicked"))
    }

    #[track_caller]
    fn ask(&self, to: &str) -> Explanation {
        self.asked("shop/client", to).0.expect("an answer")
    }

    /// How the connection ends: with the flag of the first refusal.
    #[track_caller]
    fn ends(&self, to: &str) -> (Verdict, Option<&'static str>, String) {
        let said = self.ask(to);
        let refusal = said.dialled.iter().flat_map(|d| &d.ways).find_map(|way| way.refused.clone());
        (said.verdict, refusal.map(|r| r.flag), said.because)
    }
}

#[test]
fn a_service_is_explained_to_its_end() {
    let said = story().ask("web.shop:80");
    assert_eq!(said.verdict, Verdict::Connects);
    assert_eq!(said.source.captured, Captured::Here);
    let [dialled] = &said.dialled[..] else { panic!("one address") };
    assert_eq!(dialled.address, "10.96.0.1:80".parse().expect("an address"));
    assert!(dialled.is[0].contains("service shop/web.shop.svc.cluster.local, the only one"), "{:?}", dialled.is);
    let next: Vec<_> = dialled.ways.iter().map(|way| way.hop.as_ref().expect("a hop").next.to_string()).collect();
    assert_eq!(next, ["10.0.0.2:15008", "10.0.0.3:15008"]);
    assert!(dialled.ways.iter().all(|way| way.probability == 0.5));
    let hbone = dialled.ways[1].hop.as_ref().and_then(|hop| hop.hbone.as_ref()).expect("HBONE");
    assert_eq!(hbone.authority, "10.0.0.3:8080");
    assert_eq!(hbone.expected, ["spiffe://cluster.local/ns/shop/sa/web-2"]);
    let text = said.to_string();
    for line in [
        "captured by this ztunnel",
        "in   Kubernetes//Pod/shop/web-1 on port 8080: 50 %",
        "by HBONE, authority 10.0.0.2:8080, expecting spiffe://cluster.local/ns/shop/sa/web-1",
        "WOULD CONNECT",
    ] {
        assert!(text.contains(line), "{line} in\n{text}");
    }
}

#[test]
fn every_form_of_a_destination_leads_to_the_same_place() {
    for to in ["web:80", "web.shop:80", "web.shop.svc.cluster.local.:80", "shop/web:80", "10.96.0.1:80"] {
        assert_eq!(story().ask(to).dialled[0].address.to_string(), "10.96.0.1:80", "{to}");
    }
    for to in ["shop/web-1:8080", "10.0.0.2:8080"] {
        let said = story().ask(to);
        assert_eq!(said.dialled[0].ways[0].hop.as_ref().expect("a hop").next.to_string(), "10.0.0.2:15008", "{to}");
    }
    let mut headless = story();
    headless.services = vec![service("web", "")];
    for to in ["web:8080", "shop/web:8080"] {
        let mut dialled: Vec<_> = headless.ask(to).dialled.iter().map(|d| d.address.to_string()).collect();
        dialled.sort();
        assert_eq!(dialled, ["10.0.0.2:8080", "10.0.0.3:8080"], "{to}");
    }
}

#[test]
fn questions_without_an_answer_say_why() {
    let ask = |from, to| story().asked(from, to).0.map(|_| ()).expect_err("no answer");
    for (from, to) in
        [("client", "web:80"), ("shop/client", "web"), ("shop/client", "web:0"), ("shop/client", "::1:80")]
    {
        assert!(matches!(ask(from, to), NoAnswer::Usage(_)), "{from} {to}");
    }
    for (from, to) in [
        ("shop/nobody", "web:80"),
        ("10.9.9.9", "web:80"),
        ("shop/client", "example.com:80"),
        ("shop/client", "shop/nothing:80"),
    ] {
        assert!(matches!(ask(from, to), NoAnswer::Unknown(_)), "{from} {to}");
    }
    let mut twins = story();
    twins.workloads.push(Workload { uid: "other//Pod/shop/client".into(), ..workload("client", "10.0.0.9") });
    let several = twins.asked("shop/client", "web:80").0.map(|_| ()).expect_err("ambiguous");
    assert!(several.to_string().contains("other//Pod/shop/client"), "{several}");
    assert!(twins.asked("other//Pod/shop/client", "web:80").0.is_ok() && twins.asked("10.0.0.9", "web:80").0.is_ok());
}

#[test]
fn endpoints_that_are_out_say_why() {
    let mut story = story();
    let unhealthy = Workload { status: HealthStatus::Unhealthy, ..serves(workload("sick", "10.0.0.4"), "web", 80) };
    let idle = serves(workload("idle", "10.0.0.5"), "web", 80).with(|w| w.capacity = 0);
    let heavy = serves(workload("heavy", "10.0.0.6"), "web", 80).with(|w| w.capacity = 2);
    let nowhere = Workload { addresses: vec![], ..serves(workload("nowhere", "10.0.0.7"), "web", 80) };
    story.workloads.extend([unhealthy, idle, heavy, nowhere]);
    let balancing = |story: &Story| {
        let said = story.ask("web:80");
        let candidates =
            said.dialled.into_iter().next().expect("one").balancing.into_iter().next().expect("one").candidates;
        BTreeMap::from_iter(candidates.into_iter().map(|c| {
            let name = c.workload.rsplit('/').next().unwrap_or_default().to_owned();
            (name, c.out.unwrap_or_else(|| format!("{}", c.probability)))
        }))
    };
    let found = balancing(&story);
    assert_eq!(found["sick"], "unhealthy");
    assert_eq!(found["idle"], "its capacity is 0");
    assert_eq!(found["nowhere"], "it has no address");
    assert_eq!([&*found["web-1"], &found["heavy"]], ["0.25", "0.5"]);
    // Every way that may be taken ends where the list says it does.
    let said = story.ask("web:80");
    let ways: BTreeMap<_, _> =
        said.dialled[0].ways.iter().map(|w| (w.hop.as_ref().expect("a hop").next.to_string(), w.probability)).collect();
    assert_eq!(
        ways,
        [("10.0.0.2:15008".into(), 0.25), ("10.0.0.3:15008".into(), 0.25), ("10.0.0.6:15008".into(), 0.5)].into()
    );

    story.services[0].load_balancing = LoadBalancing {
        mode: LoadBalancingMode::Strict,
        routing_preferences: vec![RoutingScope::Node],
        health_policy: HealthPolicy::AllowAll,
    };
    story.workloads[0].node = "a".into();
    story.workloads[1].node = "a".into();
    let found = balancing(&story);
    assert_eq!(found["web-1"], "1");
    assert!(found["sick"].contains("others match more of [Node]"), "{found:?}");
}

#[test]
fn the_policy_that_decides_is_named_with_its_rule() {
    let mut story = story();
    story.policies = vec![
        policy("friends", Action::Allow, serde_json::json!([principal("other"), principal("client")])),
        policy("later", Action::Deny, serde_json::json!([principal("client")])).dry_run_only(),
    ];
    let said = story.ask("shop/web-1:8080");
    assert_eq!(said.verdict, Verdict::Connects);
    let policies = &said.dialled[0].ways[0].policies;
    let of = |name: &str| policies.iter().find(|p| p.policy == name).expect("it governs");
    assert_eq!((of("shop/friends").rule, of("shop/friends").decides), (Some(1), true));
    assert_eq!((of("shop/later").rule, of("shop/later").decides, of("shop/later").dry_run), (Some(0), false, true));

    story.policies.push(policy("no", Action::Deny, serde_json::json!([principal("x"), principal("client")])));
    let (verdict, flag, because) = story.ends("shop/web-1:8080");
    assert_eq!((verdict, flag), (Verdict::Refused, Some("DENY")));
    assert!(because.contains("shop/no, rule 1"), "{because}");

    story.policies = vec![policy("others", Action::Allow, serde_json::json!([principal("x")]))];
    let (verdict, flag, because) = story.ends("web:80");
    assert_eq!((verdict, flag), (Verdict::Refused, Some("DENY")));
    assert!(because.contains("none matched"), "{because}");

    // One of two endpoints refuses.
    let selected = Policy::new(NamespacedName::new("shop", "one"), Scope::WorkloadSelector, Action::Allow, vec![]);
    story.policies = vec![selected];
    story.workloads[1].authorization_policies = vec!["shop/one".into()];
    assert_eq!(story.ends("web:80").0, Verdict::Partly);
}

#[test]
fn what_the_data_path_refuses_is_refused() {
    let (refused, connects) = (Verdict::Refused, Verdict::Connects);
    let with = |change: fn(&mut Story)| {
        let mut story = story();
        change(&mut story);
        story
    };
    let table: [(Story, &str, Verdict, Option<&str>); 9] = [
        (with(|s| s.workloads.truncate(1)), "web:80", refused, Some("NO_HEALTHY_UPSTREAM")),
        (with(|_| {}), "web:81", refused, Some("NO_HEALTHY_UPSTREAM")),
        (with(|s| s.services[0].waypoint = Some(waypoint())), "web:80", refused, Some("WAYPOINT_UNAVAILABLE")),
        (with(|s| s.here[0].1 = "Unavailable: no"), "web:80", refused, Some("IDENTITY_ERROR")),
        (with(|s| s.workloads[1].trust_domain = "other".into()), "shop/web-1:8080", refused, Some("TLS_FAILURE")),
        (with(|_| {}), "shop/web-1:15008", refused, Some("BAD_REQUEST")),
        (with(|s| s.workloads[1].network = "far".into()), "shop/web-2:8080", connects, None),
        (with(|_| {}), "192.0.2.1:443", connects, None),
        (with(|s| s.workloads[1].protocol = TunnelProtocol::None), "shop/web-1:8080", connects, None),
    ];
    for (n, (story, to, verdict, flag)) in table.into_iter().enumerate() {
        let (found, by, because) = story.ends(to);
        assert_eq!((found, by), (verdict, flag), "case {n}, {to}: {because}");
    }
}

#[test]
fn a_source_outside_the_mesh_is_plaintext_at_the_destination() {
    let mut story = story();
    story.here.clear();
    assert_eq!(story.ask("web:80").source.captured, Captured::Elsewhere);
    story.workloads[0].protocol = TunnelProtocol::None;
    assert_eq!(story.ask("web:80").source.captured, Captured::No);
    assert_eq!(story.ends("web:80").0, Verdict::Connects, "PERMISSIVE");
    let strict = serde_json::json!([[[{"notPrincipals": [{"Presence": []}]}]]]);
    story.policies = vec![policy("strict", Action::Deny, strict)];
    let (verdict, flag, because) = story.ends("web:80");
    assert_eq!((verdict, flag), (Verdict::Refused, Some("DENY")));
    assert!(because.contains("shop/strict, rule 0"), "{because}");
    // The same where capture leaves a destination alone.
    story.workloads[0].protocol = TunnelProtocol::Hbone;
    assert_eq!(story.ends("web:80").0, Verdict::Connects);
    story.settings.excluded_ports = vec![80];
    assert_eq!(story.ends("web:80").0, Verdict::Refused);
}

#[test]
fn behind_a_waypoint_the_endpoints_see_the_waypoint_and_its_client() {
    let mut story = story();
    story.services[0].waypoint = Some(waypoint());
    let mut gateway = service("wp", "10.96.0.2");
    gateway.ports = BTreeMap::from([(15008, ServicePort { target_port: 15008, ..ServicePort::default() })]);
    story.services.push(gateway);
    let mut pod = workload("wp-1", "10.0.0.8");
    let port = EndpointPort { service_port: 15008, target_port: 15008, app_protocol: Default::default() };
    pod.services.insert(key("wp"), [port].into_iter().collect());
    story.workloads.push(pod);
    let said = story.ask("web:80");
    assert_eq!(said.verdict, Verdict::Connects);
    let way = &said.dialled[0].ways[0];
    let hop = way.hop.as_ref().expect("a hop");
    assert_eq!((hop.via, hop.next.to_string()), ("waypoint", "10.0.0.8:15008".to_owned()));
    assert_eq!(hop.hbone.as_ref().expect("HBONE").authority, "10.96.0.1:80");
    assert_eq!(way.behind.len(), 2);
    assert!(said.to_string().contains("L7 policies"), "{said}");
    // A policy that knows either of them lets it in, one that knows neither does not.
    story.policies = vec![policy("client-only", Action::Allow, serde_json::json!([principal("client")]))];
    assert_eq!(story.ends("web:80").0, Verdict::Connects);
    story.policies = vec![policy("not-client", Action::Deny, serde_json::json!([principal("client")]))];
    assert_eq!(story.ends("web:80").0, Verdict::Refused);
    story.policies = vec![policy("others-only", Action::Allow, serde_json::json!([principal("others")]))];
    let (verdict, flag, because) = story.ends("web:80");
    assert_eq!((verdict, flag), (Verdict::Refused, Some("DENY")));
    assert!(
        because.contains("every endpoint refuses the waypoint (spiffe://cluster.local/ns/shop/sa/wp-1)"),
        "{because}"
    );

    // Two waypoints by weight, one of which is not there.
    story.policies.clear();
    let absent = GatewayAddress { destination: GatewayDestination::Hostname(key("gone")), hbone_mtls_port: 15008 };
    story.services[0].weighted_waypoints = vec![
        WeightedWaypoint { destination: absent, weight: 1 },
        WeightedWaypoint { destination: waypoint(), weight: 3 },
    ];
    let said = story.ask("web:80");
    assert_eq!(said.verdict, Verdict::Partly);
    let ways: Vec<_> = said.dialled[0].ways.iter().map(|way| (way.probability, way.refused.is_some())).collect();
    assert_eq!(ways, [(0.25, true), (0.75, false)]);
}

#[test]
fn of_several_services_the_one_that_is_taken_is_explained() {
    let mut story = story();
    story.services.push(Service { namespace: "other".into(), canonical: true, ..service("web", "10.96.0.1") });
    let said = story.ask("10.96.0.1:80");
    assert!(said.dialled[0].is[0].contains("shop/web.shop.svc.cluster.local, of several"), "{:?}", said.dialled[0].is);
    assert!(said.dialled[0].is[0].contains("own namespace"), "{:?}", said.dialled[0].is);
    story.workloads[0].namespace = "third".into();
    let said = story.asked("third/client", "10.96.0.1:80").0.expect("an answer");
    assert!(said.dialled[0].is[0].contains("canonical"), "{:?}", said.dialled[0].is);
}

#[test]
fn endpoints_known_by_name_are_looked_up_first() {
    let mut story = story();
    let named = workload("db", "10.0.0.9").with(|w| {
        w.addresses = vec![];
        w.hostname = "db.example.com".into();
        w.protocol = TunnelProtocol::None;
    });
    story.workloads.push(serves(named, "db", 80));
    story.services.push(service("db", "10.96.0.3"));
    let (_, lacking) = story.asked("shop/client", "db:80");
    assert_eq!(lacking.into_iter().collect::<Vec<_>>(), ["db.example.com".into()]);
    story.names.insert("db.example.com".into(), Ok(vec!["192.0.2.7".parse().expect("an address")]));
    let said = story.ask("db:80");
    assert_eq!(said.dialled[0].ways[0].hop.as_ref().expect("a hop").next.to_string(), "192.0.2.7:8080");
    story.names.insert("db.example.com".into(), Err("there is no such name".into()));
    let (verdict, flag, because) = story.ends("db:80");
    assert_eq!((verdict, flag), (Verdict::Refused, Some("CONNECT")));
    assert!(because.contains("there is no such name"), "{because}");
}

#[test]
fn json_says_what_the_text_says() {
    let value = serde_json::to_value(story().ask("web:80")).expect("JSON");
    assert_eq!(value["verdict"], "connects");
    assert_eq!(value["source"]["captured"], "here");
    assert_eq!(value["dialled"][0]["ways"][0]["hop"]["hbone"]["authority"], "10.0.0.2:8080");
    assert_eq!(value["dialled"][0]["balancing"][0]["candidates"][0]["probability"], 0.5);
    assert!(value["notKnown"].as_array().is_some_and(|unknown| !unknown.is_empty()));
}
