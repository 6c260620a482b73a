//! What the control plane sends: responses, the model made of them, and the decisions on it.
#![no_main]

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use libfuzzer_sys::{Corpus, fuzz_target};
use mesh::hbone::Authority;
use mesh::identity::Identity;
use mesh::model::{NamespacedName, Resource, Shared, Sharing, Workload};
use mesh::net::OriginalDst;
use mesh::policy::{Action, Connection, Group, Policy, Scope, authorize, still_allows};
use mesh::store::{Snapshot, Store, Update};
use mesh::xds::delta::{DeltaClient, Interest};
use mesh::xds::inbox::{Inbox, Received};
use mesh::xds::response::{Part, Responses};
use mesh::xds::{address_handler, authorization_handler};
use mesh_fuzz::{begin, seed, take, texts};
use mesh_proto::ads::{DeltaDiscoveryResponse, Node, Resource as WireResource};
use mesh_proto::enrolment::PodEnrolment;
use mesh_proto::security::{self, AUTHORIZATION_TYPE, Authorization};
use mesh_proto::workload::{self as wire, ADDRESS_TYPE, Address};
use prost::Message;
use prost_types::Any;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use ztunnel::node::enrolment::Enrolment;
use ztunnel::resolve;

fuzz_target!(init: begin(seeds), |input: &[u8]| -> Corpus {
    let Some((letter, content)) = input.split_first() else { return Corpus::Reject };
    match (letter, std::str::from_utf8(content)) {
        (b'x', _) => exchange(content),
        (b'e', _) => enrolment(content),
        (b'y', Ok(text)) => drop(mesh::xds::local::parse(text)),
        _ => return Corpus::Reject,
    }
    Corpus::Keep
});

/// Steps of a connection with the control plane, each of them a letter, two bytes of length, and content.
fn exchange(mut input: &[u8]) {
    let store = Store::new();
    // They outlive the streams.
    let handlers = vec![address_handler(store.clone()), authorization_handler(store.clone())];
    let types = [(ADDRESS_TYPE, Interest::OnDemand), (AUTHORIZATION_TYPE, Interest::All)];
    let mut client = DeltaClient::new(Node::default(), types);
    let mut inbox = Inbox::new(handlers.clone());
    let mut shared = (Shared::default(), Sharing::default());
    while !input.is_empty() {
        // Only more of a stream that is amid a response can follow it.
        if input[0] != b'b' && !inbox.is_between() {
            inbox = Inbox::new(handlers.clone());
            client.handle_connected();
        }
        let (step, length) = (take(&mut input), usize::from(take(&mut input)) << 8 | usize::from(take(&mut input)));
        let (content, rest) = input.split_at(length.min(input.len()));
        input = rest;
        match step {
            // A response, whatever it may be.
            b'r' => {
                let Ok(response) = DeltaDiscoveryResponse::decode(content) else { continue };
                reads_alike(&response, content);
                respond(&mut client, &mut inbox, response);
            }
            // More of the stream, which ends where it makes no sense.
            b'b' => {
                inbox.push(content);
                loop {
                    match inbox.next(&mut client) {
                        Ok(Some(_)) => {}
                        Ok(None) => break,
                        Err(_) => {
                            inbox = Inbox::new(handlers.clone());
                            client.handle_connected();
                            break;
                        }
                    }
                }
            }
            b'a' => {
                let Ok(address) = Address::decode(content) else { continue };
                let read = Resource::try_from(address).map_err(|error| error.to_string());
                let name = read.as_ref().map_or_else(|_| "a/b".to_owned(), Resource::name);
                // Unknown and known before, the quick way and the other.
                for _ in 0..2 {
                    let quick = shared.0.read(&name.as_str().into(), content, &mut shared.1);
                    assert_eq!(quick, read);
                }
                respond(&mut client, &mut inbox, update(ADDRESS_TYPE, &name, content));
            }
            b'p' => {
                let Ok(policy) = Authorization::decode(content) else { continue };
                let name = format!("{}/{}", policy.namespace, policy.name);
                respond(&mut client, &mut inbox, update(AUTHORIZATION_TYPE, &name, content));
                closes(&store.snapshot(), &name, content);
            }
            b'd' => {
                let name = String::from_utf8_lossy(content).into_owned();
                let removed_resources = vec![name];
                let removal =
                    DeltaDiscoveryResponse { type_url: ADDRESS_TYPE.into(), removed_resources, ..Default::default() };
                respond(&mut client, &mut inbox, removal);
            }
            b'c' => drop(client.handle_connected()),
            b's' => drop(client.subscribe(ADDRESS_TYPE, &String::from_utf8_lossy(content))),
            _ => {}
        }
    }
    let world = store.snapshot();
    order_does_not_matter(&world);
    decisions(&world);
    nothing_stays(&store);
}

fn update(type_url: &str, name: &str, content: &[u8]) -> DeltaDiscoveryResponse {
    let any = Any { type_url: type_url.into(), value: content.to_vec() };
    let resource = WireResource { name: name.into(), version: "1".into(), resource: Some(any), ..Default::default() };
    DeltaDiscoveryResponse { type_url: type_url.into(), resources: vec![resource], ..Default::default() }
}

/// What is taken is acknowledged, what is not is named.
fn respond(client: &mut DeltaClient, inbox: &mut Inbox, response: DeltaDiscoveryResponse) {
    let (type_url, nonce) = (response.type_url.clone(), response.nonce.clone());
    let is_other = |resource: &WireResource| resource.resource.as_ref().is_none_or(|any| any.type_url != type_url);
    let others = response.resources.iter().any(is_other);
    inbox.push(&framed(&response.encode_to_vec()));
    match inbox.next(client).expect("it is a response").expect("it is complete") {
        Received::Unknown { .. } => assert!(![ADDRESS_TYPE, AUTHORIZATION_TYPE].contains(&&*type_url)),
        Received::Applied(applied) => {
            let answer = applied.answer.expect("the connection is the same");
            let refused = !applied.rejected.is_empty() || others;
            assert_eq!((answer.response_nonce, answer.error_detail.is_some()), (nonce, refused));
        }
    }
    assert!(inbox.is_between());
}

/// The response taken apart as it arrives is the response as it is decoded.
fn reads_alike(response: &DeltaDiscoveryResponse, encoded: &[u8]) {
    let mut responses = Responses::default();
    responses.push(&framed(encoded));
    let mut resources = response.resources.iter();
    loop {
        match responses.pop() {
            Ok(Some(Part::Resource(read))) => {
                let known = resources.next().expect("it is there");
                assert_eq!((read.name, read.version), (&*known.name, &*known.version));
                assert_eq!(read.aliases, known.aliases);
                let content = known.resource.as_ref().map(|any| (&*any.type_url, &*any.value));
                assert_eq!(read.content, content);
            }
            Ok(Some(Part::End(rest))) => {
                assert!(resources.next().is_none());
                assert_eq!((&rest.type_url, &rest.nonce), (&response.type_url, &response.nonce));
                assert_eq!((&rest.removed, rest.bytes), (&response.removed_resources, encoded.len()));
                return;
            }
            // Groups, which nobody sends, are nothing we read.
            Err(_) => return,
            Ok(None) => panic!("it is complete"),
        }
    }
}

fn framed(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).expect("inputs are short").to_be_bytes();
    [&[0], &length[..], message].concat()
}

/// A policy that cannot be read closes what it was to govern.
fn closes(world: &Snapshot, name: &str, content: &[u8]) {
    let Ok(policy) = Authorization::decode(content) else { return };
    let Ok(key) = name.parse::<NamespacedName>() else { return };
    if policy.dry_run || Policy::try_from(policy).is_ok() {
        return;
    }
    let known = world.policies().find(|policy| *policy.key() == key).expect("it stands as a closed door");
    assert!(authorize([&**known], &connection(None, [10, 0, 0, 1].into())).is_err());
}

/// The same content in another order is the same world.
fn order_does_not_matter(world: &Snapshot) {
    let (again, mut update) = (Store::new(), Update::new());
    world.policies().for_each(|policy| update.push_policy((**policy).clone()));
    world.services().for_each(|service| update.push_service((**service).clone()));
    let mut workloads: Vec<_> = world.workloads().collect();
    workloads.sort_by(|a, b| b.uid.cmp(&a.uid));
    workloads.iter().for_each(|workload| update.push_workload((***workload).clone()));
    again.apply(update);
    assert!(mesh::fuzzing::are_alike(world, &again.snapshot()));
}

fn nothing_stays(store: &Store) {
    let (world, mut update) = (store.snapshot(), Update::new());
    world.workloads().for_each(|workload| update.push_remove_address(&*workload.uid));
    world.services().for_each(|service| update.push_remove_address(service.key().to_string()));
    world.policies().for_each(|policy| update.push_remove_policy(policy.key().to_string()));
    store.apply(update);
    assert!(mesh::fuzzing::are_alike(&store.snapshot(), &Store::new().snapshot()), "{:?}", store.snapshot());
}

fn connection(source: Option<Identity>, ip: IpAddr) -> Connection {
    Connection { source, source_ip: ip, destination: SocketAddr::new(ip, 80), original: None }
}

fn decisions(world: &Snapshot) {
    let _ = world.config_dump();
    let workloads: Vec<&Arc<Workload>> = world.workloads().take(4).collect();
    for local in &workloads {
        let policies: Vec<&Policy> = world.policies_for(local).collect();
        let ip = local.addresses.first().copied().unwrap_or([10, 0, 0, 1].into());
        for source in [None, workloads.iter().find_map(|workload| workload.identity().ok())] {
            policy(&policies, &connection(source, ip));
        }
        inbound(world, local, ip);
        outbound(world, local);
    }
}

/// Order does not matter; nor how an address is written; and a door that is closed stays so whatever else there is.
fn policy(policies: &[&Policy], conn: &Connection) {
    let allows = |policies: &[&Policy]| authorize(policies.iter().copied(), conn).is_ok();
    let allowed = allows(policies);
    assert_eq!(allowed, still_allows(policies.iter().copied(), conn));
    assert_eq!(allowed, allows(&policies.iter().rev().copied().collect::<Vec<_>>()));
    if let IpAddr::V4(v4) = conn.source_ip {
        let mapped = Connection { source_ip: v4.to_ipv6_mapped().into(), ..conn.clone() };
        assert_eq!(allowed, still_allows(policies.iter().copied(), &mapped));
    }
    let key = || NamespacedName::new("a", "b");
    let everybody = Policy::new(key(), Scope::Global, Action::Deny, vec![Group::default()]);
    let unreadable = Policy::unreadable(key(), Scope::Global, String::new());
    for door in [&everybody, &unreadable] {
        assert!(!allows(&[policies, &[door]].concat()) && !allows(&[&[door], policies].concat()));
    }
    let dry = everybody.clone().dry_run_only();
    assert_eq!(allowed, allows(&[policies, &[&dry]].concat()));
    let only = |action| policies.iter().copied().filter(|policy| policy.action() == action).collect::<Vec<_>>();
    assert_eq!(allowed, allows(&only(Action::Allow)) && allows(&only(Action::Deny)));
}

/// A tunnel leads to the address it came to, and never into a proxy.
fn inbound(world: &Snapshot, local: &Workload, here: IpAddr) {
    let hosts = world.services().take(4).flat_map(|service| {
        let host = Authority::Host { host: service.hostname.clone(), port: 80 };
        service.vips.iter().map(|vip| Authority::Ip(SocketAddr::new(vip.address, 80))).chain([host]).collect::<Vec<_>>()
    });
    for authority in hosts.chain([Authority::Ip(SocketAddr::new(here, 80))]) {
        if let Ok(target) = resolve::inbound(world, local, here, &authority) {
            assert_eq!(target.app.ip(), here);
            assert!(![15_008, 15_006, 15_001].contains(&target.app.port()));
        }
    }
}

/// Whoever is reached by a tunnel has to prove something; where a waypoint is asked for, nothing goes round it.
fn outbound(world: &Snapshot, source: &Workload) {
    let mut chance = SmallRng::seed_from_u64(1);
    let addresses: BTreeSet<IpAddr> = world
        .services()
        .flat_map(|service| service.vips.iter().map(|vip| vip.address))
        .chain(world.workloads().flat_map(|workload| workload.addresses.clone()))
        .take(16)
        .collect();
    for address in addresses {
        let Ok(route) = resolve::outbound(world, source, OriginalDst((address, 80).into()), &mut chance) else {
            continue;
        };
        if let Some(tunnel) = &route.tunnel {
            assert!(!tunnel.expected.is_empty() && tunnel.inner.as_ref().is_none_or(|inner| !inner.is_empty()));
        }
        let is_workloads = world.workload_by_ip(&source.network, address).is_some();
        let service = world.best_service_by_vip(&source.network, address, &source.namespace);
        if let Some(service) = service.filter(|service| !is_workloads && service.waypoint.is_some()) {
            assert!(!matches!(route.via, resolve::Via::Direct | resolve::Via::Passthrough), "{service:?}");
        }
    }
}

fn enrolment(bytes: &[u8]) {
    let Ok(pod) = PodEnrolment::decode(bytes) else { return };
    let Ok(enrolment) = Enrolment::try_from(pod) else { return };
    assert!(
        !enrolment.uid.is_empty() && enrolment.uid.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    );
    let ports = [&enrolment.excluded_ports_to, &enrolment.excluded_ports_at, &enrolment.probe_ports];
    assert!(ports.iter().all(|ports| !ports.contains(&0)));
}

fn seeds() -> Vec<Vec<u8>> {
    let step = |letter: u8, content: Vec<u8>| {
        let length = u16::try_from(content.len()).expect("it is short").to_be_bytes();
        [&[letter], &length[..], &content].concat()
    };
    let gateway = |host: &str| wire::GatewayAddress {
        destination: Some(wire::gateway_address::Destination::Hostname(wire::NamespacedHostname {
            namespace: "shop".into(),
            hostname: host.into(),
        })),
        hbone_mtls_port: 15_008,
        ..Default::default()
    };
    let pod = |name: &str, ip: [u8; 4], network: &str| wire::Workload {
        uid: format!("c//Pod/shop/{name}"),
        name: name.into(),
        namespace: "shop".into(),
        addresses: vec![ip.to_vec().into()],
        network: network.into(),
        tunnel_protocol: wire::TunnelProtocol::Hbone.into(),
        services: [(
            "shop/api.shop.svc".to_owned(),
            wire::PortList { ports: vec![wire::Port { service_port: 80, target_port: 8080, ..Default::default() }] },
        )]
        .into(),
        authorization_policies: vec!["shop/p".into()],
        ..Default::default()
    };
    let service = |host: &str, ip: [u8; 4], waypoint: Option<wire::GatewayAddress>| wire::Service {
        name: host.into(),
        namespace: "shop".into(),
        hostname: host.into(),
        addresses: vec![wire::NetworkAddress {
            network: String::new(),
            address: ip.to_vec().into(),
            ..Default::default()
        }],
        ports: vec![wire::Port { service_port: 80, target_port: 8080, ..Default::default() }],
        waypoint,
        ..Default::default()
    };
    let workload = |workload| Address { r#type: Some(wire::address::Type::Workload(workload)) }.encode_to_vec();
    let service = |host, ip, waypoint| {
        Address { r#type: Some(wire::address::Type::Service(service(host, ip, waypoint))) }.encode_to_vec()
    };
    let text =
        |text: &str| security::StringMatch { match_type: Some(security::string_match::MatchType::Prefix(text.into())) };
    let rule = security::Match {
        namespaces: vec![text("sh")],
        not_principals: vec![text("cluster.local/ns/evil")],
        source_ips: vec![security::Address { address: [10, 0, 0, 0].to_vec().into(), length: 8 }],
        destination_ports: vec![80],
        ..Default::default()
    };
    let policy = |scope: security::Scope, action: i32| Authorization {
        name: "p".into(),
        namespace: "shop".into(),
        scope: scope.into(),
        action,
        groups: vec![security::Group { rules: vec![security::Clause { matches: vec![rule.clone()] }] }],
        ..Default::default()
    };
    let deny = policy(security::Scope::Namespace, security::Action::Deny.into()).encode_to_vec();
    let allow = policy(security::Scope::WorkloadSelector, security::Action::Allow.into()).encode_to_vec();
    let unknown = policy(security::Scope::Global, 7).encode_to_vec();
    let response = update(ADDRESS_TYPE, "c//Pod/shop/a", &workload(pod("a", [10, 0, 0, 1], ""))).encode_to_vec();
    let steps = |steps: &[Vec<u8>]| seed(b'x', steps.concat());
    let stream = [framed(&response), framed(&update(AUTHORIZATION_TYPE, "shop/p", &allow).encode_to_vec())].concat();
    let mut seeds = vec![
        steps(&[step(b'c', Vec::new()), step(b'b', stream.clone()), step(b'b', stream[..stream.len() / 2].to_vec())]),
        steps(&[
            step(b'c', Vec::new()),
            step(b'a', workload(pod("a", [10, 0, 0, 1], ""))),
            step(b'a', workload(pod("b", [10, 0, 0, 2], "west"))),
            step(b'a', service("api.shop.svc", [10, 96, 0, 1], None)),
            step(b'p', allow.clone()),
            step(b'd', b"c//Pod/shop/a".to_vec()),
        ]),
        steps(&[
            step(b'a', workload(pod("a", [10, 0, 0, 1], ""))),
            step(b'a', service("api.shop.svc", [10, 96, 0, 1], Some(gateway("waypoint.shop.svc")))),
            step(b'a', service("waypoint.shop.svc", [10, 96, 0, 2], None)),
            step(b'p', deny),
            step(b'p', unknown),
        ]),
        steps(&[step(b'r', response), step(b's', b"/10.0.0.1".to_vec()), step(b'p', allow)]),
    ];
    let pod = PodEnrolment {
        uid: "d1a56d9d".into(),
        name: "p".into(),
        namespace: "n".into(),
        service_account: "s".into(),
        workload_uid: "w".into(),
        addresses: vec![[10, 0, 0, 1].to_vec().into()],
        probe_ports: vec![8080],
        ..Default::default()
    };
    seeds.push(seed(b'e', pod.encode_to_vec()));
    let yaml =
        "workloads:\n- uid: a\n  name: a\n  namespace: n\n  workloadIps: [10.0.0.1]\n  services: {n/h: {80: 8080}}\n";
    seeds.extend(texts(b'y', &[yaml, "policies:\n- {name: p, namespace: n, action: Deny, rules: []}\n"]));
    seeds
}
