//! DNS: what a pod asks, what is answered, and what servers answer to us.
#![no_main]

use std::net::IpAddr;
use std::sync::{Arc, LazyLock};

use hickory_proto::op::{Message, MessageType, OpCode, Query as Question};
use hickory_proto::rr::rdata::{A, CNAME};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use libfuzzer_sys::{Corpus, fuzz_target};
use mesh::model::{NamespacedHostname, Service, Template, Workload};
use mesh::store::{Snapshot, Store, Update};
use mesh_fuzz::{begin, seed, texts};
use ztunnel::dns::answer::{self, Client};
use ztunnel::dns::message::{self, Asked, Query, Transport};
use ztunnel::dns::{packet, resolv};

fuzz_target!(init: begin(seeds), |input: &[u8]| -> Corpus {
    let Some((letter, content)) = input.split_first() else { return Corpus::Reject };
    match (letter, std::str::from_utf8(content)) {
        (b'u', _) => query(content, Transport::Udp),
        (b't', _) => query(content, Transport::Tcp),
        (b'a', _) => server_answer(content),
        (b'n', Ok(text)) => name(text),
        (b'r', Ok(text)) => assert!(resolv::servers(text).len() <= 3),
        _ => return Corpus::Reject,
    }
    Corpus::Keep
});

const CLIENT: Client<'_> =
    Client { namespace: "shop", network: "", domain: "cluster.local", preferred_namespace: None, ipv6: true };

/// More endpoints than one message can tell, a wildcard, and names of both families.
static WORLD: LazyLock<Arc<Snapshot>> = LazyLock::new(|| {
    let service = |namespace: &str, hostname: &str, vips: &[&str]| Service {
        name: hostname.into(),
        namespace: namespace.into(),
        hostname: hostname.into(),
        vips: vips.iter().map(|vip| vip.parse().expect("an address")).collect(),
        ..Service::default()
    };
    let all = NamespacedHostname::new("shop", "all.shop.svc.cluster.local");
    let endpoints = (0..5000_u32).map(|n| Workload {
        uid: format!("{n}").into(),
        addresses: vec![IpAddr::from((0x0a00_0000 + n).to_be_bytes())],
        template: Arc::new(Template { services: [(all.clone(), Default::default())].into(), ..Template::default() }),
        ..Workload::default()
    });
    let services = [
        service("shop", "api.shop.svc.cluster.local", &["/10.96.0.1", "/fd00::1"]),
        service("shop", &all.hostname, &[]),
        service("ext", "*.example.com", &["/240.240.0.1"]),
        service("ext", "www.example.com", &["/240.240.0.2"]),
    ];
    let store = Store::new();
    let update = endpoints.fold(Update::new(), Update::workload);
    store.apply(services.into_iter().fold(update, Update::service));
    store.snapshot()
});

/// Is it an answer to whoever sent `query`, which never is answered itself, and no longer than its client takes?
fn check(answer: &[u8], query: &[u8], transport: Transport) {
    let read = Message::from_vec(answer).expect("what we write can be read");
    assert_eq!(
        (read.metadata.id.to_be_bytes(), read.metadata.message_type),
        ([query[0], query[1]], MessageType::Response)
    );
    assert!(matches!(message::read(answer, transport), Asked::Nothing));
    let asked = Message::from_vec(query).ok().and_then(|query| query.edns).map(|edns| usize::from(edns.max_payload()));
    let limit = match transport {
        Transport::Udp => asked.unwrap_or(0).max(512),
        Transport::Tcp => 65_535,
    };
    assert!(answer.len() <= limit, "{} of {limit}", answer.len());
    let (server, client) = ("10.96.0.10:53".parse().expect("an address"), "10.0.0.1:4000".parse().expect("an address"));
    let whole = packet::udp(server, client, answer).map(|packet| packet.len());
    assert_eq!(whole, (answer.len() <= 65_507).then_some(answer.len() + 28));
}

fn query(bytes: &[u8], transport: Transport) {
    let query = match message::read(bytes, transport) {
        Asked::Query(query) => query,
        Asked::Refused(reply) => return check(&reply, bytes, transport),
        Asked::Nothing => return,
    };
    let _ = (query.name(), query.type_label(), query.is_transfer());
    assert_eq!(query.id().to_be_bytes(), bytes[..2]);
    let failed = query.fail();
    let found = query.wanted().and_then(|(name, kind)| answer::answer(&WORLD, &CLIENT, &name, kind));
    for answer in [failed, found.and_then(|found| query.answer(found))].into_iter().flatten() {
        check(&answer, bytes, transport);
        assert!(query.is_answered_by(&answer, query.id()));
        let other = query.id().wrapping_add(1);
        assert!(!query.is_answered_by(&answer, other));
        assert!(query.is_answered_by(&Query::with_id(&answer, other), other));
    }
}

/// What a server says about names we look up ourselves.
fn server_answer(bytes: &[u8]) {
    let (Ok(answer), name) = (Message::from_vec(bytes), gateway()) else { return };
    for kind in [RecordType::A, RecordType::AAAA] {
        let (addresses, ttl) = ztunnel::fuzzing::addresses(&answer, &name, kind);
        assert!(addresses.iter().all(|ip| ip.is_ipv4() == (kind == RecordType::A)));
        assert!(addresses.len() <= answer.answers.len() && ttl.as_secs() <= u64::from(u32::MAX));
    }
}

/// A name is answered for as itself and as its search list makes it, or not at all; whatever it is made of.
fn name(text: &str) {
    for kind in [answer::Kind::A, answer::Kind::Aaaa] {
        let Some(found) = answer::answer(&WORLD, &CLIENT, text, kind) else { continue };
        assert!(found.addresses.iter().all(|ip| ip.is_ipv4() == (kind == answer::Kind::A)));
        if let Some(canonical) = found.canonical {
            assert!(text.starts_with(&canonical) && canonical.len() < text.len());
        }
    }
}

fn gateway() -> Name {
    Name::from_ascii("gw.example.com.").expect("a name")
}

fn seeds() -> Vec<Vec<u8>> {
    let mut seeds: Vec<Vec<u8>> =
        texts(b'r', &["nameserver 10.96.0.10\nnameserver fd00::a\noptions ndots:5\n"]).collect();
    seeds.extend(texts(
        b'n',
        &["api", "api.shop.svc.cluster.local.shop.svc.cluster.local", "a.example.com.svc.cluster.local"],
    ));
    let names = ["api.shop.svc.cluster.local.", "ALL.shop.svc.cluster.local.", "x.y.example.com.", "www.example.com."];
    for (number, name) in (0_u16..).zip(names) {
        for kind in [RecordType::A, RecordType::AAAA, RecordType::SRV, RecordType::AXFR] {
            let mut query = Message::new(number, MessageType::Query, OpCode::Query);
            query.add_query(Question::query(Name::from_ascii(name).expect("a name"), kind));
            seeds.push(seed(b'u', query.to_vec().expect("a query")));
            let mut edns = hickory_proto::op::Edns::new();
            edns.set_max_payload(1 << (number + 9)).set_version(0);
            query.set_edns(edns);
            seeds.push(seed(b'u', query.to_vec().expect("a query")));
            seeds.push(seed(b't', query.to_vec().expect("a query")));
        }
    }
    let mut answer = Message::new(1, MessageType::Response, OpCode::Query);
    let alias = Name::from_ascii("b.example.com.").expect("a name");
    answer.add_query(Question::query(gateway(), RecordType::A));
    answer.add_answer(Record::from_rdata(gateway(), 60, RData::CNAME(CNAME(alias.clone()))));
    answer.add_answer(Record::from_rdata(alias, 30, RData::A(A([192, 0, 2, 1].into()))));
    seeds.push(seed(b'a', answer.to_vec().expect("an answer")));
    seeds
}
