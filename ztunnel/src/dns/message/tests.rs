use hickory_proto::rr::rdata::TXT;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;

fn question(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(0x1234, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Question::query(Name::from_ascii(name).unwrap(), kind));
    message
}

fn with_edns(mut message: Message, payload: u16) -> Message {
    let mut edns = Edns::new();
    edns.set_max_payload(payload).set_version(0);
    message.set_edns(edns);
    message
}

fn query(message: &Message, transport: Transport) -> Query {
    match read(&message.to_vec().unwrap(), transport) {
        Asked::Query(query) => *query,
        other => panic!("{other:?}"),
    }
}

fn found(count: u32) -> Found {
    Found { canonical: None, addresses: (0..count).map(|n| std::net::Ipv4Addr::from(0x0a00_0000 + n).into()).collect() }
}

fn answered(query: &Query, found: Found) -> (Message, usize) {
    let bytes = query.answer(found).expect("an answer");
    (Message::from_vec(&bytes).unwrap(), bytes.len())
}

#[test]
fn an_answer_is_authoritative_recursive_and_short_lived() {
    let query = query(&question("API.shop.", RecordType::A), Transport::Udp);
    assert_eq!(query.wanted(), Some(("api.shop".into(), Kind::A)));
    let (answer, _) = answered(&query, found(2));
    let m = answer.metadata;
    assert_eq!((m.id, m.message_type, m.response_code), (0x1234, MessageType::Response, ResponseCode::NoError));
    assert!(m.authoritative && m.recursion_available && m.recursion_desired && !m.truncation);
    assert_eq!(answer.queries[0].name().to_ascii(), "API.shop.");
    assert!(answer.edns.is_none(), "only those who speak it are answered in it");
    let told: Vec<_> = answer.answers.iter().map(|r| (r.name.to_ascii(), r.ttl, r.data.to_string())).collect();
    assert_eq!(told[0], ("API.shop.".into(), 30, "10.0.0.0".into()));
    assert_eq!(told.len(), 2);
}

#[test]
fn a_canonical_name_comes_first_and_owns_the_addresses() {
    let query = query(&question("www.example.com.shop.svc.cluster.local.", RecordType::A), Transport::Udp);
    let (answer, _) = answered(&query, Found { canonical: Some("www.example.com".into()), ..found(1) });
    let told: Vec<_> = answer.answers.iter().map(|r| (r.name.to_ascii(), r.data.to_string())).collect();
    assert_eq!(
        told,
        [
            ("www.example.com.shop.svc.cluster.local.".into(), "www.example.com.".into()),
            ("www.example.com.".into(), "10.0.0.0".to_owned())
        ]
    );
}

#[test]
fn an_answer_without_addresses_is_empty_and_no_error() {
    let (answer, _) = answered(&query(&question("api.", RecordType::AAAA), Transport::Udp), found(0));
    assert_eq!((answer.answers.len(), answer.metadata.response_code), (0, ResponseCode::NoError));
}

#[test]
fn udp_answers_are_cut_to_what_the_client_takes() {
    let message = question("api.", RecordType::A);
    for (message, transport, count, limit, cut) in [
        (message.clone(), Transport::Udp, 25, 512, false),
        (message.clone(), Transport::Udp, 100, 512, true),
        (with_edns(message.clone(), 100), Transport::Udp, 100, 512, true),
        (with_edns(message.clone(), 4096), Transport::Udp, 100, 4096, false),
        (with_edns(message.clone(), 4096), Transport::Udp, 1000, 4096, true),
        (message.clone(), Transport::Tcp, 1000, 65_535, false),
        (message, Transport::Tcp, 20_000, 65_535, true),
    ] {
        let query = query(&message, transport);
        let (answer, length) = answered(&query, found(count));
        assert!(length <= limit, "{length}");
        assert_eq!(answer.metadata.truncation, cut, "{count} records in {limit}");
        let told = u32::try_from(answer.answers.len()).unwrap();
        assert!(if cut { told > 0 && length > limit * 9 / 10 } else { told == count }, "{told} of {count}, {length}");
        assert_eq!(answer.edns.is_some(), message_has_edns(&query));
    }
}

fn message_has_edns(query: &Query) -> bool {
    query.edns.is_some()
}

#[test]
fn what_is_not_an_address_is_passed_on() {
    for kind in [RecordType::TXT, RecordType::SRV, RecordType::ANY, RecordType::Unknown(65_000)] {
        let query = query(&question("api.", kind), Transport::Udp);
        assert_eq!(query.wanted(), None);
        assert!(query.type_label().len() < 6);
    }
    let mut chaos = question("version.bind.", RecordType::A);
    chaos.queries[0].set_query_class(DNSClass::CH);
    assert_eq!(query(&chaos, Transport::Udp).wanted(), None);
    let mut newer = with_edns(question("api.", RecordType::A), 1232);
    newer.edns.as_mut().unwrap().set_version(1);
    assert_eq!(query(&newer, Transport::Udp).wanted(), None, "the server it was meant for says BADVERS");
}

#[test]
fn other_operations_and_other_numbers_of_questions_are_refused() {
    let refused = |message: &Message| match read(&message.to_vec().unwrap(), Transport::Udp) {
        Asked::Refused(reply) => {
            let reply = Message::from_vec(&reply).unwrap().metadata;
            assert_eq!((reply.id, reply.message_type), (0x1234, MessageType::Response));
            reply.response_code
        }
        other => panic!("{other:?}"),
    };
    let mut update = question("api.", RecordType::A);
    update.metadata.op_code = OpCode::Update;
    assert_eq!(refused(&update), ResponseCode::NotImp);
    let mut two = question("api.", RecordType::A);
    two.add_query(two.queries[0].clone());
    assert_eq!(refused(&two), ResponseCode::FormErr);
    let mut none = question("api.", RecordType::A);
    none.queries.clear();
    assert_eq!(refused(&none), ResponseCode::FormErr);
}

#[test]
fn an_answer_is_never_answered() {
    let mut message = question("api.", RecordType::A);
    message.metadata.message_type = MessageType::Response;
    assert!(matches!(read(&message.to_vec().unwrap(), Transport::Udp), Asked::Nothing));
}

#[test]
fn hostile_bytes_are_refused_or_passed_on_and_never_more() {
    let whole = with_edns(question("a.long.name.of.some.service.example.com.", RecordType::A), 1232).to_vec().unwrap();
    for length in 0..whole.len() {
        // Without its last bytes the message is not ours to answer.
        if let Asked::Query(query) = read(&whole[..length], Transport::Udp) {
            assert_eq!(query.wanted(), None, "cut at {length}");
        }
    }
    let mut rng = StdRng::seed_from_u64(7);
    for _ in 0..20_000 {
        let mut bytes = whole.clone();
        for _ in 0..rng.random_range(1..8) {
            let at = rng.random_range(0..bytes.len());
            bytes[at] = rng.random();
        }
        bytes.truncate(rng.random_range(0..=bytes.len()));
        if let Asked::Query(query) = read(&bytes, Transport::Udp) {
            let _ = (query.wanted(), query.name(), query.fail(), query.is_answered_by(&bytes, 1));
            assert!(query.answer(found(50)).is_none_or(|a| a.len() <= query.limit()));
        }
    }
    // A name that points at itself, and one that goes round.
    for name in [&[0xc0, 12][..], &[1, b'a', 0xc0, 12]] {
        let mut bytes = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        bytes.extend(name);
        bytes.extend([0, 1, 0, 1]);
        assert!(matches!(read(&bytes, Transport::Udp), Asked::Refused(_)));
    }
}

#[test]
fn an_answer_counts_only_with_the_id_and_the_question() {
    let asked = question("www.example.com.", RecordType::A);
    let query = query(&asked, Transport::Udp);
    let reply = |id: u16, change: fn(&mut Message)| {
        let mut reply = asked.clone();
        reply.metadata.id = id;
        reply.metadata.message_type = MessageType::Response;
        change(&mut reply);
        query.is_answered_by(&reply.to_vec().unwrap(), 77)
    };
    assert!(reply(77, |_| {}));
    assert!(reply(77, |m| m.queries = question("WWW.example.COM.", RecordType::A).queries), "case means nothing");
    assert!(!reply(78, |_| {}));
    assert!(!reply(77, |m| m.metadata.message_type = MessageType::Query));
    assert!(!reply(77, |m| m.queries = question("www.example.org.", RecordType::A).queries));
    assert!(!reply(77, |m| m.queries = question("www.example.com.", RecordType::AAAA).queries));
    assert!(!reply(77, |m| m.queries.clear()), "no error is claimed for no question");
    assert!(reply(77, |m| {
        m.queries.clear();
        m.metadata.response_code = ResponseCode::FormErr;
    }));
    assert!(!query.is_answered_by(&[0; 11], 0));
}

#[test]
fn only_the_id_of_a_message_is_changed_on_its_way() {
    let mut message = question("a.", RecordType::TXT);
    message.add_answer(Record::from_rdata(Name::root(), 1, RData::TXT(TXT::new(vec!["x".into()]))));
    let bytes = message.to_vec().unwrap();
    let changed = Query::with_id(&bytes, 0xbeef);
    assert_eq!((&changed[..2], &changed[2..]), (&[0xbe, 0xef][..], &bytes[2..]));
    assert_eq!(Query::with_id(&[1], 5), [1]);
}
