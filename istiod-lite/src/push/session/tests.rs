use std::collections::VecDeque;

use mesh_proto::ads::{DeltaDiscoveryResponse, Status};
use mesh_proto::enrolment::{POD_ENROLMENT_TYPE, PodEnrolment};
use mesh_proto::security::{AUTHORIZATION_TYPE, Authorization};
use mesh_proto::waypoint::{ROUTE_TYPE, Route};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::fixtures::{Held, ack, read, request, service, workload};
use super::*;
use crate::resources::{Audience, ResourceStore};

/// A store, its newest view, and one client's session.
struct World {
    store: ResourceStore,
    view: Arc<View>,
    session: Session,
}

impl World {
    fn of(resources: impl IntoIterator<Item = Resource>) -> Self {
        Self::seen_by(Scope::default(), resources)
    }

    fn seen_by(scope: Scope, resources: impl IntoIterator<Item = Resource>) -> Self {
        let store = ResourceStore::new();
        store.publish(resources);
        let view = Arc::new(View::new(store.snapshot()));
        Self { store, view, session: Session::new(scope) }
    }

    fn send(&mut self, request: DeltaDiscoveryRequest) -> Output {
        self.session.handle_request(request, &self.view).unwrap()
    }

    fn ask(&mut self, request: DeltaDiscoveryRequest) -> DeltaDiscoveryResponse {
        only(self.send(request))
    }

    fn publish(&mut self, resources: impl IntoIterator<Item = Resource>) -> Output {
        self.store.publish(resources);
        self.view = Arc::new(self.view.next(self.store.snapshot()));
        self.session.handle_view(&self.view)
    }
}

fn only(output: Output) -> DeltaDiscoveryResponse {
    assert_eq!(output.responses.len(), 1, "{output:?}");
    read(&output.responses[0])
}

fn updated(response: &DeltaDiscoveryResponse) -> Vec<&str> {
    response.resources.iter().map(|resource| &*resource.name).collect()
}

fn subscribe(names: &[&str]) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        resource_names_subscribe: names.iter().map(|name| name.to_string()).collect(),
        ..request(ADDRESS_TYPE)
    }
}

fn on_demand() -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest { resource_names_unsubscribe: vec!["*".into()], ..subscribe(&["*"]) }
}

fn on_node(node: &str) -> Scope {
    Scope { node: Some(node.into()), waypoint: None }
}

#[test]
fn the_first_request_is_answered_even_with_nothing() {
    let mut world = World::of([]);
    for type_url in TYPES {
        let response = world.ask(request(type_url));
        assert_eq!((response.type_url.as_str(), response.resources.len()), (type_url, 0));
        assert!(!response.nonce.is_empty());
        let acked = world.send(ack(&response));
        assert_eq!(acked.responses, [], "an ACK earns no answer");
        assert_eq!(acked.events, [Event::Acked(type_url, 1)]);
    }
}

#[test]
fn a_type_nobody_serves_is_answered_once_with_nothing() {
    let mut world = World::of([]);
    let response = world.ask(request("type.googleapis.com/envoy.config.cluster.v3.Cluster"));
    assert!(response.resources.is_empty());
    assert_eq!(world.send(ack(&response)).responses, []);
    assert_eq!(world.session.handle_request(request(""), &world.view).unwrap_err(), ProtocolError::NoType);
}

#[test]
fn a_wildcard_client_gets_everything_then_only_changes() {
    let mut world = World::of([workload("a", "n", &[]), workload("b", "n", &[])]);
    let first = world.ask(request(ADDRESS_TYPE));
    assert_eq!(updated(&first), ["a", "b"]);
    assert!(first.resources.iter().all(|resource| resource.aliases.is_empty()));
    world.send(ack(&first));
    let second = only(world.publish([workload("a", "moved", &[]), service("ns/s", "vip")]));
    assert_eq!(updated(&second), ["a", "ns/s"]);
    assert_eq!(second.removed_resources, ["b"]);
}

#[test]
fn a_slow_client_gets_the_newest_state_in_one_step() {
    let mut world = World::of([workload("a", "0", &[])]);
    let first = world.ask(request(ADDRESS_TYPE));
    for step in 1..100 {
        let output = world.publish([workload("a", &step.to_string(), &[]), workload(&format!("b{step}"), "n", &[])]);
        assert_eq!(output.responses, [], "one response may be outstanding");
    }
    let second = world.ask(ack(&first));
    assert_eq!(updated(&second), ["a", "b99"]);
    assert!(second.removed_resources.is_empty(), "what came and went was never sent");
}

#[test]
fn a_returning_client_gets_the_difference_to_what_it_retained() {
    let mut world = World::of([workload("same", "n", &[]), workload("new", "n", &[]), workload("changed", "2", &[])]);
    let version = |resource: Resource| resource.version.to_string();
    let response = world.ask(DeltaDiscoveryRequest {
        initial_resource_versions: [
            ("same".to_owned(), version(workload("same", "n", &[]))),
            ("changed".to_owned(), version(workload("changed", "1", &[]))),
            ("gone".to_owned(), "7".to_owned()),
        ]
        .into(),
        ..request(ADDRESS_TYPE)
    });
    assert_eq!(updated(&response), ["changed", "new"]);
    assert_eq!(response.removed_resources, ["gone"]);
}

#[test]
fn a_returning_client_that_has_everything_still_gets_an_answer() {
    let mut world = World::of([workload("a", "n", &[])]);
    let held = workload("a", "n", &[]).version.to_string();
    let response = world.ask(DeltaDiscoveryRequest {
        initial_resource_versions: [("a".to_owned(), held)].into(),
        ..request(ADDRESS_TYPE)
    });
    assert!(response.resources.is_empty() && response.removed_resources.is_empty());
}

#[test]
fn a_stale_nonce_acknowledges_nothing() {
    let mut world = World::of([workload("a", "1", &[])]);
    let first = world.ask(request(ADDRESS_TYPE));
    world.publish([workload("a", "2", &[])]);
    let stale = DeltaDiscoveryRequest { response_nonce: "other".into(), ..request(ADDRESS_TYPE) };
    assert_eq!(world.send(stale), Output::default());
    assert_eq!(updated(&world.ask(ack(&first))), ["a"]);
    assert_eq!(world.send(ack(&first)).events, [], "an acknowledgement counts once");
}

#[test]
fn a_rejected_resource_is_reported_and_not_sent_again_until_it_changes() {
    let mut world = World::of([workload("bad", "1", &[])]);
    let first = world.ask(request(ADDRESS_TYPE));
    let nack =
        DeltaDiscoveryRequest { error_detail: Some(Status { code: 0, message: "bad: no".into() }), ..ack(&first) };
    let output = world.send(nack);
    assert_eq!(output.responses, []);
    assert_eq!(output.events, [Event::Nacked(ADDRESS_TYPE, "bad: no".into()), Event::Acked(ADDRESS_TYPE, 1)]);
    assert_eq!(updated(&only(world.publish([workload("bad", "2", &[])]))), ["bad"]);
}

#[test]
fn of_policies_it_is_told_which_were_refused_and_which_taken() {
    let policy = |name: &str| Resource::new(AUTHORIZATION_TYPE, name, &Authorization::default());
    let mut world = World::of([policy("ns/a"), policy("ns/b")]);
    let first = world.ask(request(AUTHORIZATION_TYPE));
    let nack =
        DeltaDiscoveryRequest { error_detail: Some(Status { code: 0, message: "ns/b: no".into() }), ..ack(&first) };
    let names: Vec<Arc<str>> = vec!["ns/a".into(), "ns/b".into()];
    let answered = |refused: &[(&str, &str)], names: &[Arc<str>]| Event::Answered {
        type_url: AUTHORIZATION_TYPE,
        names: names.to_vec(),
        refused: refused.iter().map(|(name, reason)| (Arc::from(*name), (*reason).to_owned())).collect(),
    };
    let [nacked, said, acked] = world.send(nack).events.try_into().expect("three events");
    assert_eq!(nacked, Event::Nacked(AUTHORIZATION_TYPE, "ns/b: no".into()));
    assert_eq!(said, answered(&[("ns/b", "no")], &names));
    assert_eq!(acked, Event::Acked(AUTHORIZATION_TYPE, 1));
    // What is withdrawn is refused no longer.
    let second = only(world.publish([policy("ns/a")]));
    assert_eq!(world.send(ack(&second)).events[0], answered(&[], &names[1..]));
}

#[test]
fn a_generation_without_change_for_the_client_counts_as_acknowledged() {
    let mut world = World::of([]);
    let first = world.ask(request(AUTHORIZATION_TYPE));
    world.send(ack(&first));
    let output = world.publish([workload("a", "n", &[])]);
    assert_eq!(output, Output { responses: vec![], events: vec![Event::Acked(AUTHORIZATION_TYPE, 2)] });
}

#[test]
fn types_are_pushed_in_order_whatever_the_order_of_subscription() {
    let mut world = World::of([]);
    for type_url in [AUTHORIZATION_TYPE, WORKLOAD_TYPE, ADDRESS_TYPE] {
        let response = world.ask(request(type_url));
        world.send(ack(&response));
    }
    let policy = Resource::new(AUTHORIZATION_TYPE, "ns/p", &Authorization::default());
    let output = world.publish([policy, workload("a", "n", &[]), service("ns/s", "vip")]);
    let order: Vec<_> = output.responses.iter().map(|response| &*response.type_url).collect();
    assert_eq!(order, [ADDRESS_TYPE, WORKLOAD_TYPE, AUTHORIZATION_TYPE]);
    assert_eq!(updated(&read(&output.responses[1])), ["a"], "a service is no workload");
}

#[test]
fn on_demand_a_vip_brings_the_service_and_its_endpoints_and_keeps_them_current() {
    let behind = |uid: &str| workload(uid, "n", &["ns/s"]);
    let mut world = World::of([service("ns/s", "10.0.0.1"), behind("w1"), workload("other", "n", &[])]);
    let first = world.ask(on_demand());
    assert!(first.resources.is_empty(), "nothing unasked");
    world.send(ack(&first));
    let second = world.ask(subscribe(&["/10.0.0.1"]));
    assert_eq!(updated(&second), ["ns/s", "w1"]);
    assert_eq!(second.resources[0].aliases, ["/10.0.0.1"]);
    world.send(ack(&second));
    let third = only(world.publish([service("ns/s", "10.0.0.1"), behind("w2"), workload("other", "moved", &[])]));
    assert_eq!(updated(&third), ["w2"]);
    assert_eq!(third.removed_resources, ["w1"]);
    world.send(ack(&third));
    let unsubscribe =
        DeltaDiscoveryRequest { resource_names_unsubscribe: vec!["/10.0.0.1".into()], ..request(ADDRESS_TYPE) };
    assert_eq!(world.ask(unsubscribe).removed_resources, ["w2"], "the service itself the client has dropped");
}

#[test]
fn on_demand_an_unknown_name_is_answered_and_told_when_it_appears() {
    let mut world = World::of([]);
    let first = world.ask(on_demand());
    world.send(ack(&first));
    let second = world.ask(subscribe(&["/10.9.9.9"]));
    assert_eq!(second.removed_resources, ["/10.9.9.9"]);
    world.send(ack(&second));
    assert_eq!(updated(&only(world.publish([service("ns/late", "10.9.9.9")]))), ["ns/late"]);
}

#[test]
fn on_demand_a_name_asked_for_again_is_answered_again() {
    let mut world = World::of([service("ns/s", "10.0.0.1")]);
    let first = world.ask(on_demand());
    assert_eq!(world.send(subscribe(&["ns/s"])).responses, [], "waits for the ACK");
    let second = world.ask(ack(&first));
    assert_eq!(updated(&second), ["ns/s"]);
    world.send(ack(&second));
    assert_eq!(updated(&world.ask(subscribe(&["ns/s"]))), ["ns/s"]);
}

#[test]
fn on_demand_a_node_proxy_gets_the_workloads_of_its_node_unasked() {
    let mut world =
        World::seen_by(on_node("node-a"), [workload("here", "node-a", &[]), workload("there", "node-b", &[])]);
    assert_eq!(updated(&world.ask(on_demand())), ["here"]);
}

#[test]
fn a_returning_on_demand_client_goes_on_with_what_it_retained() {
    let mut world = World::of([workload("a", "1", &[]), workload("b", "1", &[])]);
    let held = |uid: &str, node: &str| (uid.to_owned(), workload(uid, node, &[]).version.to_string());
    let response = world.ask(DeltaDiscoveryRequest {
        initial_resource_versions: [held("a", "1"), held("b", "0"), held("gone", "0")].into(),
        ..on_demand()
    });
    assert_eq!(updated(&response), ["b"]);
    assert_eq!(response.removed_resources, ["gone"]);
    world.send(ack(&response));
    assert_eq!(updated(&only(world.publish([workload("a", "2", &[]), workload("b", "1", &[])]))), ["a"]);
}

#[test]
fn enrolments_go_to_their_node_and_routes_to_their_waypoint_only() {
    let enrolment = |uid: &str, node: &str| {
        Resource::new(POD_ENROLMENT_TYPE, uid, &PodEnrolment { uid: uid.into(), ..PodEnrolment::default() })
            .for_audience(vec![Audience::Node(node.into())])
    };
    let route = |name: &str, namespace: &str, gateway: &str| {
        Resource::new(ROUTE_TYPE, name, &Route::default())
            .for_audience(vec![Audience::Waypoint { namespace: namespace.into(), name: gateway.into() }])
    };
    let all =
        || [enrolment("a", "node-a"), enrolment("b", "node-b"), route("r1", "shop", "wp"), route("r2", "other", "wp")];
    let waypoint = Scope { node: None, waypoint: Some(("shop".into(), "wp".into())) };
    for (scope, enrolments, routes) in
        [(on_node("node-a"), vec!["a"], vec![]), (waypoint, vec![], vec!["r1"]), (Scope::default(), vec![], vec![])]
    {
        let mut world = World::seen_by(scope.clone(), all());
        assert_eq!(updated(&world.ask(request(POD_ENROLMENT_TYPE))), enrolments, "{scope:?}");
        assert_eq!(updated(&world.ask(request(ROUTE_TYPE))), routes, "{scope:?}");
        // Asking by name does not help either.
        let mut world = World::seen_by(scope.clone(), all());
        let names = DeltaDiscoveryRequest { type_url: POD_ENROLMENT_TYPE.into(), ..subscribe(&["a", "b"]) };
        assert_eq!(updated(&world.ask(names)), enrolments, "{scope:?}");
    }
}

#[test]
fn a_resource_that_leaves_the_clients_sight_is_removed() {
    let enrolment = |node: &str| {
        Resource::new(POD_ENROLMENT_TYPE, "u", &PodEnrolment::default()).for_audience(vec![Audience::Node(node.into())])
    };
    let mut world = World::seen_by(on_node("node-a"), [enrolment("node-a")]);
    let first = world.ask(request(POD_ENROLMENT_TYPE));
    world.send(ack(&first));
    assert_eq!(only(world.publish([enrolment("node-b")])).removed_resources, ["u"]);
}

#[test]
fn a_client_cannot_make_us_hold_names_without_bound() {
    let mut world = World::of([]);
    let many: Vec<String> = (0..=MAX_NAMES).map(|n| n.to_string()).collect();
    let asked = DeltaDiscoveryRequest { resource_names_subscribe: many, ..request(ADDRESS_TYPE) };
    assert_eq!(world.session.handle_request(asked, &world.view).unwrap_err(), ProtocolError::TooManyNames);

    // The same of all types together, in many requests, and in bytes.
    let mut world = World::of([]);
    let ask = |world: &mut World, type_url: &str, names: Vec<String>| {
        let request = DeltaDiscoveryRequest { resource_names_subscribe: names, ..request(type_url) };
        world.session.handle_request(request, &world.view).map(|_| ())
    };
    let half = |of: &str| (0..MAX_NAMES / 2).map(|n| format!("{of}{n}")).collect::<Vec<_>>();
    assert_eq!(ask(&mut world, ADDRESS_TYPE, half("a")), Ok(()));
    assert_eq!(ask(&mut world, AUTHORIZATION_TYPE, half("a")), Ok(()));
    assert_eq!(ask(&mut world, AUTHORIZATION_TYPE, half("a")), Ok(()), "the same again");
    assert_eq!(ask(&mut world, ADDRESS_TYPE, vec!["one more".into()]), Err(ProtocolError::TooManyNames));
    let mut world = World::of([]);
    let long = |n: usize| format!("{n}{}", "x".repeat(MAX_NAME_BYTES / 4));
    for n in 0..3 {
        assert_eq!(ask(&mut world, ADDRESS_TYPE, vec![long(n)]), Ok(()));
    }
    let given_up = DeltaDiscoveryRequest { resource_names_unsubscribe: vec![long(0)], ..request(ADDRESS_TYPE) };
    world.send(given_up);
    assert_eq!(ask(&mut world, ADDRESS_TYPE, vec![long(4)]), Ok(()));
    assert_eq!(ask(&mut world, ADDRESS_TYPE, vec![long(5)]), Err(ProtocolError::TooManyNames));
}

#[test]
fn what_a_returning_client_brings_along_is_bounded_by_what_there_is() {
    let held = |names: usize| DeltaDiscoveryRequest {
        initial_resource_versions: (0..names).map(|n| (n.to_string(), String::new())).collect(),
        ..request(ADDRESS_TYPE)
    };
    let mut world = World::of([service("0", "vip")]);
    let first = world.session.handle_request(held(MAX_NAMES + 1), &world.view).unwrap();
    assert_eq!(first.responses[0].removed.len(), MAX_NAMES, "all but the one that there is");
    let mut world = World::of([service("0", "vip")]);
    let refused = world.session.handle_request(held(MAX_NAMES + 2), &world.view);
    assert_eq!(refused.unwrap_err(), ProtocolError::TooManyNames);
}

/// 10,000 names asked for one by one cost as much as 10,000 names, not as the square of that.
#[test]
fn a_request_costs_what_is_in_it_and_not_what_was_asked_for_before() {
    let mut world = World::of((0..1000).map(|n| workload(&format!("w{n}"), "node-a", &[])));
    world.send(on_demand());
    let start = std::time::Instant::now();
    for n in 0..10_000 {
        world.send(subscribe(&[&format!("w{n}")]));
        let outstanding = world.session.types[0].as_mut().unwrap().outstanding.take();
        assert!(outstanding.is_some(), "each is answered");
    }
    assert!(start.elapsed() < std::time::Duration::from_secs(10), "{:?}", start.elapsed());
}

#[test]
fn a_refusal_as_long_as_a_request_is_read_once_and_kept_in_part() {
    let names: Vec<Arc<str>> = (0..5000).map(|n| Arc::from(format!("shop/p{n}"))).collect();
    let reason = "x".repeat(1000);
    let said: Vec<String> = names.iter().map(|name| format!("{name}: {reason}")).collect();
    let start = std::time::Instant::now();
    let refused = refusals(&said.join("; "), &names);
    assert!(start.elapsed() < std::time::Duration::from_secs(2), "{:?}", start.elapsed());
    assert_eq!(refused.len(), names.len());
    let kept: usize = refused.values().map(String::len).sum();
    assert!((ALL_REASONS..ALL_REASONS + names.len() * SHORT_REASON).contains(&kept), "{kept}");
}

/// Whatever is published, asked, acknowledged, rejected and reconnected in whatever order, once the client has
/// acknowledged all it holds exactly what it may see.
#[test]
fn coalesced_differences_add_up_to_the_final_state() {
    for seed in 0..400 {
        wander(seed);
    }
}

fn wander(seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let wildcard = random.random_bool(0.6);
    let scope = if random.random_bool(0.5) { on_node("node-a") } else { Scope::default() };
    let type_url = [ADDRESS_TYPE, WORKLOAD_TYPE][random.random_range(0..2)];
    let mut world = World::seen_by(scope.clone(), []);
    let mut held = Held::default();
    let mut wanted: BTreeSet<String> = BTreeSet::new();
    let first = |held: &Held| {
        let base = if wildcard { request(type_url) } else { on_demand() };
        DeltaDiscoveryRequest { type_url: type_url.into(), initial_resource_versions: held.0.clone(), ..base }
    };
    let mut inbox: VecDeque<DeltaDiscoveryResponse> = world.send(first(&held)).responses.iter().map(read).collect();
    for _ in 0..random.random_range(1..120) {
        let output = match random.random_range(0..10) {
            0..4 => world.publish(random_world(&mut random)),
            4..8 => {
                let Some(response) = inbox.pop_front() else { continue };
                held.apply(&response);
                let mut answer = ack(&response);
                if random.random_bool(0.1) {
                    answer.error_detail = Some(Status { code: 0, message: "some".into() });
                }
                world.send(answer)
            }
            8 if !wildcard => {
                let name = format!("w{}", random.random_range(0..8));
                wanted.insert(name.clone());
                world.send(DeltaDiscoveryRequest { type_url: type_url.into(), ..subscribe(&[&name]) })
            }
            9 if random.random_bool(0.3) => {
                // What was on the way is lost; what was applied is retained.
                inbox.clear();
                world.session = Session::new(scope.clone());
                let mut again = first(&held);
                again.resource_names_subscribe.extend(wanted.iter().cloned());
                world.send(again)
            }
            _ => continue,
        };
        inbox.extend(output.responses.iter().map(read));
        assert!(inbox.len() <= 1, "seed {seed}: at most one response is outstanding");
    }
    while let Some(response) = inbox.pop_front() {
        held.apply(&response);
        inbox.extend(world.send(ack(&response)).responses.iter().map(read));
    }
    let expected: BTreeMap<String, String> = world
        .view
        .visible(type_url, &scope)
        .filter(|resource| wildcard || is_wanted(&world.view, type_url, resource, &wanted, &held, &scope))
        .map(|resource| (resource.name.to_string(), resource.version.to_string()))
        .collect();
    assert_eq!(held.0, expected, "seed {seed}, wildcard {wildcard}, {type_url}, {scope:?}, asked for {wanted:?}");
}

/// An on-demand client holds what it asked for, what runs on its node, and, after a reconnect, what it retained.
fn is_wanted(
    view: &View,
    type_url: &str,
    resource: &Resource,
    wanted: &BTreeSet<String>,
    held: &Held,
    scope: &Scope,
) -> bool {
    view.get(type_url, &resource.name, scope).is_some()
        && (wanted.contains(&*resource.name)
            || scope.node.as_ref().is_some_and(|node| view.workloads_on(node).contains(&resource.name))
            || held.0.contains_key(&*resource.name))
}

fn random_world(random: &mut StdRng) -> Vec<Resource> {
    let mut resources = Vec::new();
    if random.random_bool(0.8) {
        resources.push(service("ns/s", ["vip", "other-vip"][random.random_range(0..2)]));
    }
    for index in 0..8 {
        if random.random_bool(0.7) {
            let node = ["node-a", "node-b", "node-c"][random.random_range(0..3)];
            let behind: &[&str] = [&["ns/s"][..], &[]][random.random_range(0..2)];
            let resource = workload(&format!("w{index}"), node, behind);
            let hidden = random.random_bool(0.2);
            resources.push(if hidden {
                resource.for_audience(vec![Audience::Node("node-b".into())])
            } else {
                resource
            });
        }
    }
    resources
}

/// Whatever is published, asked for and given up in whatever order, what is worked out from what changed is what is worked out
/// from everything.
#[test]
fn on_demand_what_is_held_is_what_the_names_stand_for() {
    for seed in 0..400 {
        let mut random = StdRng::seed_from_u64(seed);
        let scope = if random.random_bool(0.5) { on_node("node-a") } else { Scope::default() };
        let index = random.random_range(0..2);
        let type_url = TYPES[index];
        let mut world = World::seen_by(scope.clone(), random_world(&mut random));
        let of_type = |request: DeltaDiscoveryRequest| DeltaDiscoveryRequest { type_url: type_url.into(), ..request };
        let mut outstanding: Vec<_> = world.send(of_type(on_demand())).responses;
        for step in 0..random.random_range(1..120) {
            let name = match random.random_range(0..11) {
                8 => "ns/s".to_owned(),
                9 => "/vip".to_owned(),
                10 => "/w1-ip".to_owned(),
                index => format!("w{index}"),
            };
            let output = match random.random_range(0..4) {
                0 => world.publish(random_world(&mut random)),
                1 => world.send(of_type(subscribe(&[&name]))),
                2 => world.send(of_type(DeltaDiscoveryRequest {
                    resource_names_unsubscribe: vec![name],
                    ..DeltaDiscoveryRequest::default()
                })),
                _ => match outstanding.pop() {
                    Some(response) => world.send(ack(&read(&response))),
                    None => continue,
                },
            };
            outstanding.extend(output.responses);
            let subscription = world.session.types[index].as_ref().unwrap();
            if subscription.settled != Some(world.view.generation())
                || !subscription.suspects.is_empty()
                || !subscription.unanswered.is_empty()
            {
                continue;
            }
            let own = scope.node.iter().flat_map(|node| world.view.workloads_on(node).iter().cloned());
            let asked = subscription.requested.iter().flat_map(|name| world.view.resolve(type_url, name, &scope));
            let expected: BTreeMap<Arc<str>, Option<Version>> = own
                .chain(asked)
                .filter_map(|name| world.view.get(type_url, &name, &scope))
                .map(|resource| (Arc::clone(&resource.name), Some(resource.version)))
                .collect();
            let Known::Listed(held) = &subscription.known else { panic!("it is on demand") };
            assert_eq!(held, &expected, "seed {seed}, step {step}, {:?}", subscription.requested);
        }
    }
}

#[test]
fn a_refusal_says_of_which_resources_it_speaks() {
    let names: Vec<Arc<str>> = ["ns/a", "ns/ab", "ns/c"].map(Arc::from).into();
    let said = |text: &str| -> Vec<(String, String)> {
        refusals(text, &names).into_iter().map(|(name, reason)| (name.to_string(), reason)).collect()
    };
    let pair = |name: &str, reason: &str| (name.to_owned(), reason.to_owned());
    assert_eq!(said(""), []);
    assert_eq!(said("something else went wrong: ns/a"), []);
    assert_eq!(said("ns/ab: bad: 1; 2; ns/c: worse"), [pair("ns/ab", "bad: 1; 2"), pair("ns/c", "worse")]);
    assert_eq!(said("ns/c: x; ns/a: y"), [pair("ns/a", "y"), pair("ns/c", "x")]);
    assert_eq!(said(&format!("ns/a: {}", "ö".repeat(1000)))[0].1.len(), LONGEST_REASON);
}
