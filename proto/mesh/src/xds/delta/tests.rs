use super::*;

const A: &str = "type.googleapis.com/a";
const B: &str = "type.googleapis.com/b";

fn client() -> DeltaClient {
    let node = Node { id: "ztunnel~1.1.1.1~z.ns~ns.svc.cluster.local".to_owned(), ..Default::default() };
    DeltaClient::new(node, [(A, Interest::All), (B, Interest::All)])
}

fn resource(type_url: &'static str, name: &str, version: &str) -> Resource {
    Resource { name: name.into(), version: version.into(), content: Content::Handled(type_url) }
}

fn response(type_url: &str, nonce: &str, resources: Vec<Resource>, removed: &[&str]) -> Response {
    Response {
        type_url: type_url.to_owned(),
        nonce: nonce.to_owned(),
        resources,
        removed: removed.iter().map(ToString::to_string).collect(),
        ..Default::default()
    }
}

fn all_good(client: &mut DeltaClient, response: Response) -> DeltaDiscoveryRequest {
    let delivery = client.handle_response(response).unwrap();
    client.handle_applied(delivery, vec![]).expect("the stream is still there")
}

fn versions(request: &DeltaDiscoveryRequest) -> Vec<(&str, &str)> {
    request.initial_resource_versions.iter().map(|(name, version)| (name.as_str(), version.as_str())).collect()
}

#[test]
fn first_requests_ask_for_everything_in_order_and_say_who_we_are() {
    let requests = client().handle_connected();
    assert_eq!(requests.iter().map(|r| r.type_url.as_str()).collect::<Vec<_>>(), [A, B]);
    for request in requests {
        assert!(request.node.is_some());
        assert!(request.resource_names_subscribe.is_empty() && request.initial_resource_versions.is_empty());
        assert!(request.response_nonce.is_empty() && request.error_detail.is_none());
    }
}

#[test]
fn a_good_response_is_delivered_and_acknowledged_by_its_nonce() {
    let mut client = client();
    client.handle_connected();
    let delivery = client.handle_response(response(A, "n1", vec![resource(A, "x", "1")], &["gone"])).unwrap();
    assert_eq!(delivery.removed, ["gone"]);
    let ack = client.handle_applied(delivery, vec![]).unwrap();
    let expected =
        DeltaDiscoveryRequest { type_url: A.to_owned(), response_nonce: "n1".to_owned(), ..Default::default() };
    assert_eq!(ack, expected, "an ACK is type and nonce and nothing else");
}

#[test]
fn a_nack_names_each_rejected_resource() {
    let mut client = client();
    client.handle_connected();
    let empty = Resource { content: Content::Missing, ..resource(A, "empty", "1") };
    let stranger = Resource { content: Content::Other("c".into()), ..resource(A, "stranger", "1") };
    let resources = vec![resource(A, "good", "1"), resource(A, "bad", "1"), resource(B, "alien", "1"), stranger, empty];
    let delivery = client.handle_response(response(A, "n1", resources, &[])).unwrap();
    let nack = client.handle_applied(delivery, vec![Rejected::new("bad", "it is")]).unwrap();
    let status = nack.error_detail.expect("a NACK");
    assert_eq!(status.code, 0);
    let expected = r#"alien: is a "type.googleapis.com/b"; stranger: is a "c"; empty: has no content; bad: it is"#;
    assert_eq!(status.message, expected);
    assert_eq!(nack.response_nonce, "n1");
}

#[test]
fn reconnecting_resumes_with_the_versions_held() {
    let mut client = client();
    client.handle_connected();
    let resources = vec![resource(A, "x", "1"), resource(A, "y", "1"), resource(A, "z", "")];
    all_good(&mut client, response(A, "n1", resources, &[]));
    all_good(&mut client, response(A, "n2", vec![resource(A, "x", "2")], &["y"]));
    let requests = client.handle_connected();
    assert_eq!(versions(&requests[0]), [("x", "2"), ("z", "")]);
    assert!(requests[0].response_nonce.is_empty(), "a nonce means nothing to the next stream");
    assert!(requests[0].node.is_some());
    assert!(versions(&requests[1]).is_empty());
}

#[test]
fn what_was_rejected_is_asked_for_again_and_its_removal_is_told() {
    let mut client = client();
    client.handle_connected();
    all_good(&mut client, response(A, "n1", vec![resource(A, "x", "1")], &[]));
    let delivery = client.handle_response(response(A, "n2", vec![resource(A, "x", "2")], &[])).unwrap();
    client.handle_applied(delivery, vec![Rejected::new("x", "bad")]);
    let requests = client.handle_connected();
    assert_eq!(versions(&requests[0]), [("x", "")], "neither forgotten nor taken for version 1 or 2");
}

#[test]
fn an_answer_to_an_earlier_stream_is_not_sent() {
    let mut client = client();
    client.handle_connected();
    let delivery = client.handle_response(response(A, "n1", vec![resource(A, "x", "1")], &[])).unwrap();
    client.handle_connected();
    assert_eq!(client.handle_applied(delivery, vec![]), None, "its nonce is stale");
    assert_eq!(versions(&client.handle_connected()[0]), [("x", "1")], "but what was applied is held");
}

#[test]
fn a_type_not_asked_for_is_neither_delivered_nor_answered() {
    let mut client = client();
    client.handle_connected();
    let error = client.handle_response(response("type.googleapis.com/c", "n", vec![], &[])).unwrap_err();
    assert_eq!(error, UnknownType("type.googleapis.com/c".to_owned()));
}

#[test]
fn synced_once_every_type_was_answered_even_with_nothing() {
    let mut client = client();
    client.handle_connected();
    all_good(&mut client, response(A, "1", vec![], &[]));
    assert!(!client.is_synced());
    let delivery = client.handle_response(response(B, "2", vec![resource(B, "bad", "1")], &[])).unwrap();
    assert!(!client.is_synced(), "not before it is applied");
    client.handle_applied(delivery, vec![Rejected::new("bad", "x")]);
    assert!(client.is_synced());
    client.handle_connected();
    assert!(client.is_synced(), "losing the stream loses nothing");
}

#[test]
fn on_demand_drops_the_wildcard_and_names_what_it_wants() {
    let mut client = DeltaClient::new(Node::default(), [(A, Interest::OnDemand), (B, Interest::All)]);
    let first = client.handle_connected().swap_remove(0);
    assert_eq!(
        (first.resource_names_subscribe, first.resource_names_unsubscribe),
        (vec!["*".into()], vec!["*".into()])
    );
    let request = client.subscribe(A, "/10.0.0.1").unwrap();
    assert_eq!(request.resource_names_subscribe, ["/10.0.0.1"]);
    assert!(request.response_nonce.is_empty() && request.node.is_none());
    assert_eq!(client.subscribe(A, "/10.0.0.1"), None, "asked for already");
    assert_eq!(client.subscribe(B, "x"), None, "everything comes anyway");

    let again = client.handle_connected().swap_remove(0);
    assert_eq!(again.resource_names_subscribe, ["*", "/10.0.0.1"], "not answered yet");
    all_good(&mut client, response(A, "1", vec![resource(A, "/10.0.0.1", "1")], &[]));
    assert_eq!(client.subscribe(A, "/10.0.0.1"), None, "held already");
    let resumed = client.handle_connected().swap_remove(0);
    assert_eq!(resumed.resource_names_subscribe, ["*", "/10.0.0.1"]);
    assert_eq!(versions(&resumed), [("/10.0.0.1", "1")]);

    assert!(client.subscribe(A, "unknown").is_some() && !client.is_answered(A, "unknown"));
    all_good(&mut client, response(A, "2", vec![], &["unknown"]));
    assert!(client.is_answered(A, "unknown") && client.is_answered(B, "whatever"));
    assert_eq!(client.subscribe(A, "unknown"), None, "we are told when there is something");
    let resumed = client.handle_connected().swap_remove(0);
    assert_eq!(resumed.resource_names_subscribe, ["*", "/10.0.0.1", "unknown"], "and so is the next stream");
}

#[test]
fn on_demand_an_alias_is_answered_by_the_resource_that_has_it() {
    let mut client = DeltaClient::new(Node::default(), [(A, Interest::OnDemand)]);
    client.handle_connected();
    client.subscribe(A, "/10.0.0.1").expect("a request");
    all_good(&mut client, response(A, "1", vec![resource(A, "ns/other", "1")], &[]));
    assert!(!client.is_answered(A, "/10.0.0.1"));
    let aliases = vec!["/10.0.0.1".to_owned()];
    all_good(&mut client, Response { aliases, ..response(A, "2", vec![resource(A, "ns/s", "1")], &[]) });
    assert!(client.is_answered(A, "/10.0.0.1") && client.is_answered(A, "ns/s"));
}

#[test]
fn on_demand_the_oldest_names_that_stand_for_nothing_are_given_up() {
    let mut client = DeltaClient::new(Node::default(), [(A, Interest::OnDemand)]);
    client.handle_connected();
    let names: Vec<String> = (0..=MOST_ABSENT).map(|n| format!("/{n}")).collect();
    let mut answer = |names: &[String]| {
        for name in names {
            client.subscribe(A, name).expect("a request");
        }
        let removed: Vec<&str> = names.iter().map(String::as_str).collect();
        all_good(&mut client, response(A, "1", vec![], &removed));
        client.forget(A)
    };
    assert_eq!(answer(&names[..MOST_ABSENT]), None);
    let forgotten = answer(&names[MOST_ABSENT..]).expect("one too many");
    assert_eq!(forgotten.resource_names_unsubscribe, ["/0"]);
    assert!(forgotten.resource_names_subscribe.is_empty() && forgotten.response_nonce.is_empty());
    assert!(client.subscribe(A, "/0").is_some(), "asked for as if for the first time");
    assert!(client.is_answered(A, "/1"));
}

#[test]
fn versions_come_back_as_they_came() {
    for version in [
        "",
        "1",
        "00000000000000ff",
        "00000000000000FF",
        "+000000000000001",
        "123456789abcdef",
        "2026-11-26T00:00:00Z/7",
    ] {
        assert_eq!(Version::from(version).to_string(), version);
    }
    assert_eq!(Version::from("00000000000000ff"), Version(Number::Hash(255)));
}

#[test]
fn a_name_is_one_text_however_often_it_comes() {
    let mut client = client();
    client.handle_connected();
    let first = client.name(A, "x");
    let named = |name: &Text| Resource { name: name.clone(), ..resource(A, "", "1") };
    all_good(&mut client, response(A, "n1", vec![named(&first)], &[]));
    let again = client.name(A, "x");
    all_good(&mut client, response(A, "n2", vec![named(&again)], &[]));
    assert!([again, client.name(A, "x")].iter().all(|name| std::sync::Arc::ptr_eq(name, &first)));
    assert!(!std::sync::Arc::ptr_eq(&client.name(B, "x"), &first), "another type's names are its own");
}
