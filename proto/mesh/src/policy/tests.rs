use bytes::Bytes;
use mesh_proto::security as wire;
use serde_json::json;

use super::*;

fn client() -> Connection {
    Connection {
        source: Some("spiffe://cluster.local/ns/shop/sa/cart".parse().unwrap()),
        source_ip: "10.0.0.1".parse().unwrap(),
        destination: "10.0.0.9:8080".parse().unwrap(),
        original: None,
    }
}

/// `client` as it arrives behind a waypoint.
fn behind_waypoint() -> Connection {
    let address = "10.0.0.1:0".parse().unwrap();
    Connection {
        source: Some("spiffe://cluster.local/ns/infra/sa/waypoint".parse().unwrap()),
        source_ip: "10.0.7.7".parse().unwrap(),
        original: client().source.map(|identity| Original { identity, address }),
        ..client()
    }
}

fn stranger() -> Connection {
    Connection { source: None, ..client() }
}

/// A policy from the JSON form of its rules, so that a case reads as the user sees it.
fn policy(name: &str, action: Action, rules: serde_json::Value) -> Policy {
    let groups = serde_json::from_value(rules).expect("rules of a test parse");
    Policy::new(NamespacedName::new("ns", name), Scope::Namespace, action, groups)
}

fn one_match(m: serde_json::Value) -> serde_json::Value {
    json!([[[m]]])
}

/// Whether `rules` match: a DENY policy of them denies.
fn matches(rules: serde_json::Value, conn: &Connection) -> bool {
    authorize([&policy("p", Action::Deny, rules)], conn).is_err()
}

#[test]
fn each_kind_of_match_compares_with_its_part_of_the_connection() {
    let same = || json!([{"namespace": "shop", "serviceAccount": "cart"}]);
    let table = [
        // (match, identified client, client without identity)
        (json!({"principals": [{"Exact": "cluster.local/ns/shop/sa/cart"}]}), true, false),
        (json!({"principals": [{"Exact": "spiffe://cluster.local/ns/shop/sa/cart"}]}), false, false),
        (json!({"principals": [{"Prefix": "cluster.local/ns/shop/"}]}), true, false),
        (json!({"principals": [{"Prefix": ""}]}), true, false),
        (json!({"principals": [{"Suffix": "/sa/cart"}]}), true, false),
        (json!({"principals": [{"Suffix": "/sa/other"}]}), false, false),
        (json!({"principals": [{"Presence": []}]}), true, false),
        (json!({"principals": [{"Exact": "x"}, {"Suffix": "cart"}]}), true, false),
        (json!({"notPrincipals": [{"Exact": "cluster.local/ns/shop/sa/cart"}]}), false, true),
        (json!({"notPrincipals": [{"Exact": "x"}]}), true, true),
        (json!({"notPrincipals": [{"Presence": []}]}), false, true),
        (json!({"namespaces": [{"Exact": "shop"}]}), true, false),
        (json!({"namespaces": [{"Exact": "other"}]}), false, false),
        (json!({"namespaces": [{"Presence": []}]}), true, false),
        (json!({"namespaces": [{"Exact": ""}]}), false, true),
        (json!({"notNamespaces": [{"Exact": "shop"}]}), false, true),
        (json!({"notNamespaces": [{"Prefix": "sh"}, {"Exact": "x"}]}), false, true),
        (json!({"notNamespaces": [{"Exact": "other"}]}), true, true),
        (json!({"serviceAccounts": same()}), true, false),
        (json!({"serviceAccounts": [{"namespace": "other", "serviceAccount": "cart"}]}), false, false),
        (json!({"notServiceAccounts": same()}), false, true),
        (json!({"notServiceAccounts": [{"namespace": "shop", "serviceAccount": "x"}]}), true, true),
        (json!({"sourceIps": ["10.0.0.0/24"]}), true, true),
        (json!({"sourceIps": ["10.0.0.1"]}), true, true),
        (json!({"sourceIps": ["10.0.1.0/24", "fd00::/8"]}), false, false),
        (json!({"notSourceIps": ["10.0.0.0/24"]}), false, false),
        (json!({"notSourceIps": ["10.0.1.0/24"]}), true, true),
        (json!({"destinationIps": ["10.0.0.9/32"]}), true, true),
        (json!({"destinationIps": ["10.0.0.1/32"]}), false, false),
        (json!({"notDestinationIps": ["10.0.0.9/32"]}), false, false),
        (json!({"notDestinationIps": ["10.0.0.1/32"]}), true, true),
        (json!({"destinationPorts": [80, 8080]}), true, true),
        (json!({"destinationPorts": [80]}), false, false),
        (json!({"notDestinationPorts": [8080]}), false, false),
        (json!({"notDestinationPorts": [80]}), true, true),
    ];
    for (m, identified, unidentified) in table {
        assert_eq!(matches(one_match(m.clone()), &client()), identified, "{m}");
        assert_eq!(matches(one_match(m.clone()), &stranger()), unidentified, "{m} without identity");
    }
}

#[test]
fn service_accounts_match_in_any_trust_domain_and_principals_do_not() {
    let foreign = Connection { source: Some("spiffe://other/ns/shop/sa/cart".parse().unwrap()), ..client() };
    assert!(matches(
        one_match(json!({"serviceAccounts": [{"namespace": "shop", "serviceAccount": "cart"}]})),
        &foreign
    ));
    assert!(!matches(one_match(json!({"principals": [{"Prefix": "cluster.local/"}]})), &foreign));
}

#[test]
fn fields_and_clauses_are_anded_values_matches_and_groups_ored() {
    let (yes, no) = (json!({"destinationPorts": [8080]}), json!({"destinationPorts": [1]}));
    let both = json!({"destinationPorts": [8080], "namespaces": [{"Exact": "other"}]});
    for (rules, expected) in [
        (one_match(both), false),
        (json!([[[yes, no]]]), true),
        (json!([[[yes], [no]]]), false),
        (json!([[[yes], [yes]]]), true),
        (json!([[[no]], [[yes]]]), true),
        (json!([[[no]], [[no]]]), false),
    ] {
        assert_eq!(matches(rules.clone(), &client()), expected, "{rules}");
    }
}

#[test]
fn emptiness_has_its_own_meaning_at_each_level() {
    for (rules, expected, why) in [
        (json!([]), false, "no groups: never"),
        (json!([[]]), true, "a group without clauses: always"),
        (json!([[[]]]), true, "a clause without matches: always"),
        (json!([[[{}]]]), false, "an empty match: never"),
        (json!([[[{}, {"destinationPorts": [8080]}]]]), true, "an empty match is skipped"),
        (json!([[[{}], []]]), false, "a clause of empty matches fails its group"),
    ] {
        assert_eq!(matches(rules, &client()), expected, "{why}");
    }
}

#[test]
fn deny_comes_before_allow_and_allow_must_match_when_it_applies() {
    let allow_all = policy("allow", Action::Allow, json!([[]]));
    let allow_none = policy("nobody", Action::Allow, json!([]));
    let deny_all = policy("deny", Action::Deny, json!([[]]));
    let deny_none = policy("noop", Action::Deny, json!([]));
    let decide = |policies: &[&Policy]| authorize(policies.iter().copied(), &client());
    let key = |name| NamespacedName::new("ns", name);

    assert_eq!(decide(&[]).unwrap().allowed_by(), None);
    assert_eq!(decide(&[&deny_none]).unwrap().allowed_by(), None);
    assert_eq!(decide(&[&allow_all]).unwrap().allowed_by(), Some(&key("allow")));
    assert_eq!(decide(&[&allow_none]).unwrap_err(), Denial::NoAllowMatched);
    assert_eq!(decide(&[&allow_none, &allow_all]).unwrap().allowed_by(), Some(&key("allow")));
    for order in [[&allow_all, &deny_all], [&deny_all, &allow_all]] {
        assert_eq!(decide(&order).unwrap_err(), Denial::Policy(key("deny")), "whatever the order");
    }
    assert_eq!(decide(&[&allow_all, &deny_all]).unwrap_err().policy(), Some(&key("deny")));
    assert_eq!(decide(&[&deny_all]).unwrap_err().to_string(), "explicitly denied by policy ns/deny");
}

#[test]
fn strict_mutual_tls_denies_who_has_no_identity() {
    let strict = policy("strict", Action::Deny, one_match(json!({"notPrincipals": [{"Presence": []}]})));
    assert!(authorize([&strict], &client()).is_ok());
    assert!(authorize([&strict], &stranger()).is_err());
}

#[test]
fn behind_a_waypoint_one_source_must_match_and_neither_be_excluded() {
    let account = |namespace: &str, name: &str| json!([{"namespace": namespace, "serviceAccount": name}]);
    let table = [
        // (match, does it match)
        (json!({"principals": [{"Suffix": "/sa/cart"}]}), true),
        (json!({"principals": [{"Suffix": "/sa/waypoint"}]}), true),
        (json!({"principals": [{"Suffix": "/sa/other"}]}), false),
        (json!({"namespaces": [{"Exact": "shop"}]}), true),
        (json!({"namespaces": [{"Exact": "infra"}]}), true),
        (json!({"serviceAccounts": account("shop", "cart")}), true),
        (json!({"serviceAccounts": account("infra", "waypoint")}), true),
        (json!({"sourceIps": ["10.0.0.0/24"]}), true),
        (json!({"sourceIps": ["10.0.7.7"]}), true),
        (json!({"notPrincipals": [{"Suffix": "/sa/cart"}]}), false),
        (json!({"notPrincipals": [{"Suffix": "/sa/waypoint"}]}), false),
        (json!({"notPrincipals": [{"Suffix": "/sa/other"}]}), true),
        (json!({"notPrincipals": [{"Presence": []}]}), false),
        (json!({"notNamespaces": [{"Exact": "shop"}]}), false),
        (json!({"notNamespaces": [{"Exact": "infra"}]}), false),
        (json!({"notServiceAccounts": account("shop", "cart")}), false),
        (json!({"notServiceAccounts": account("infra", "waypoint")}), false),
        (json!({"notSourceIps": ["10.0.0.1"]}), false),
        (json!({"notSourceIps": ["10.0.7.7"]}), false),
        (json!({"notSourceIps": ["10.0.8.0/24"]}), true),
        // Both halves must be of one and the same source.
        (json!({"principals": [{"Suffix": "/sa/cart"}], "sourceIps": ["10.0.0.1"]}), true),
        (json!({"principals": [{"Suffix": "/sa/waypoint"}], "sourceIps": ["10.0.0.1"]}), false),
        (json!({"principals": [{"Suffix": "/sa/cart"}], "notPrincipals": [{"Suffix": "/sa/waypoint"}]}), false),
    ];
    for (m, expected) in table {
        assert_eq!(matches(one_match(m.clone()), &behind_waypoint()), expected, "{m}");
        let allow = policy("allow", Action::Allow, one_match(m.clone()));
        assert_eq!(authorize([&allow], &behind_waypoint()).is_ok(), expected, "ALLOW {m}");
        assert_eq!(still_allows([&allow], &behind_waypoint()), expected, "ALLOW {m}, asked again");
    }
    let apart = json!([[[{"principals": [{"Suffix": "/sa/waypoint"}]}], [{"sourceIps": ["10.0.0.1"]}]]]);
    assert!(!matches(apart, &behind_waypoint()), "in two clauses neither");
}

#[test]
fn what_only_a_waypoint_may_reach_it_reaches_for_any_client() {
    let guard = one_match(json!({"notPrincipals": [{"Exact": "cluster.local/ns/infra/sa/waypoint"}]}));
    let guard = policy("guard", Action::Deny, guard);
    assert!(authorize([&guard], &behind_waypoint()).is_ok());
    assert!(authorize([&guard], &client()).is_err());
    assert!(authorize([&guard], &stranger()).is_err());
}

#[test]
fn dry_run_changes_no_decision_and_is_counted() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let handle = recorder.handle();
    metrics::with_local_recorder(&recorder, || {
        let deny = policy("deny", Action::Deny, json!([[]])).dry_run_only();
        let allow = policy("allow", Action::Allow, json!([])).dry_run_only();
        assert!(authorize([&deny, &allow], &client()).is_ok());
    });
    let text = handle.render();
    for expected in [
        r#"mesh_authorization_dry_run_total{policy="ns/deny",action="DENY",outcome="matched"} 1"#,
        r#"mesh_authorization_dry_run_total{policy="ns/allow",action="ALLOW",outcome="not_matched"} 1"#,
    ] {
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn dry_run_is_evaluated_whatever_the_order_and_never_for_a_connection_that_is_open() {
    let deny = policy("deny", Action::Deny, json!([[]]));
    let watched = policy("watched", Action::Allow, json!([[]])).dry_run_only();
    let count = |evaluate: &dyn Fn()| {
        let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
        let handle = recorder.handle();
        metrics::with_local_recorder(&recorder, evaluate);
        handle.render().lines().filter(|line| line.starts_with("mesh_authorization_dry_run_total{")).count()
    };
    for order in [[&deny, &watched], [&watched, &deny]] {
        assert_eq!(count(&|| assert!(authorize(order, &client()).is_err())), 1, "counted behind a denial too");
        assert_eq!(count(&|| assert!(!still_allows(order, &client()))), 0, "asked again");
    }
    // What a dry-run ALLOW does not match is not denied, and what it matches is not allowed by it.
    let nobody = policy("nobody", Action::Allow, json!([]));
    assert!(still_allows([&policy("p", Action::Allow, json!([])).dry_run_only()], &client()));
    assert_eq!(authorize([&nobody, &watched], &client()).unwrap_err(), Denial::NoAllowMatched);
}

#[test]
fn every_scope_is_asked_and_any_denial_counts() {
    let scoped = |name, scope, action, rules| {
        let groups = serde_json::from_value(rules).unwrap();
        Policy::new(NamespacedName::new("ns", name), scope, action, groups)
    };
    for scope in [Scope::Global, Scope::Namespace, Scope::WorkloadSelector] {
        let allow = scoped("allow", Scope::Namespace, Action::Allow, json!([[]]));
        let deny = scoped("deny", scope, Action::Deny, json!([[]]));
        assert_eq!(authorize([&allow, &deny], &client()).unwrap_err(), Denial::Policy(deny.key().clone()), "{scope:?}");
        let only = scoped("only", scope, Action::Allow, one_match(json!({"namespaces": [{"Exact": "other"}]})));
        assert_eq!(authorize([&only], &client()).unwrap_err(), Denial::NoAllowMatched, "{scope:?}");
        assert_eq!(authorize([&only, &allow], &client()).unwrap().allowed_by(), Some(allow.key()), "{scope:?}");
    }
}

#[test]
fn an_unreadable_policy_denies_even_beside_an_allow() {
    let unreadable = Policy::unreadable(NamespacedName::new("ns", "new"), Scope::Global, "action: 9".to_owned());
    let allow = policy("allow", Action::Allow, json!([[]]));
    let denial = authorize([&allow, &unreadable], &client()).unwrap_err();
    assert_eq!(denial.policy(), Some(&NamespacedName::new("ns", "new")));
    assert!(denial.to_string().contains("action: 9"), "{denial}");
}

#[test]
fn mapped_addresses_match_ipv4_ranges() {
    let conn = Connection {
        source_ip: "::ffff:10.0.0.1".parse().unwrap(),
        destination: "[::ffff:10.0.0.9]:8080".parse().unwrap(),
        ..client()
    };
    let rules = json!({"sourceIps": ["10.0.0.1"], "destinationIps": ["10.0.0.9"]});
    assert!(matches(one_match(rules), &conn));
}

fn wire_policy(m: wire::Match) -> wire::Authorization {
    wire::Authorization {
        name: "p".to_owned(),
        namespace: "ns".to_owned(),
        groups: vec![wire::Group { rules: vec![wire::Clause { matches: vec![m] }] }],
        ..Default::default()
    }
}

#[test]
fn wire_and_json_mean_the_same() {
    use wire::string_match::MatchType::*;
    let text = |kind| vec![wire::StringMatch { match_type: Some(kind) }];
    let range = |octets: &[u8], length| vec![wire::Address { address: Bytes::copy_from_slice(octets), length }];
    let account =
        |name: &str| vec![wire::ServiceAccountMatch { namespace: "shop".to_owned(), service_account: name.to_owned() }];
    let decoded = Policy::try_from(wire::Authorization {
        scope: wire::Scope::WorkloadSelector as i32,
        action: wire::Action::Deny as i32,
        dry_run: true,
        ..wire_policy(wire::Match {
            namespaces: text(Exact("a".to_owned())),
            not_namespaces: text(Prefix("b".to_owned())),
            principals: text(Suffix("c".to_owned())),
            not_principals: text(Presence(())),
            source_ips: range(&[10, 0, 0, 0], 8),
            not_source_ips: range(&[0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8),
            destination_ips: range(&[10, 1, 0, 0], 16),
            not_destination_ips: range(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 2, 0, 0], 112),
            destination_ports: vec![80],
            not_destination_ports: vec![81],
            service_accounts: account("x"),
            not_service_accounts: account("y"),
        })
    });
    assert_eq!(
        serde_json::to_value(decoded.unwrap()).unwrap(),
        json!({
            "name": "p", "namespace": "ns", "scope": "WorkloadSelector", "action": "Deny", "dryRun": true,
            "rules": [[[{
                "namespaces": [{"Exact": "a"}], "notNamespaces": [{"Prefix": "b"}],
                "principals": [{"Suffix": "c"}], "notPrincipals": [{"Presence": []}],
                "serviceAccounts": [{"namespace": "shop", "serviceAccount": "x"}],
                "notServiceAccounts": [{"namespace": "shop", "serviceAccount": "y"}],
                "sourceIps": ["10.0.0.0/8"], "notSourceIps": ["fd00::/8"],
                "destinationIps": ["10.1.0.0/16"], "notDestinationIps": ["10.2.0.0/16"],
                "destinationPorts": [80], "notDestinationPorts": [81],
            }]]],
        })
    );
}

#[test]
fn what_cannot_be_read_is_refused_by_field() {
    let refused = |policy: wire::Authorization| Policy::try_from(policy).expect_err("must be refused").to_string();
    let action = wire::Authorization { action: 2, ..wire_policy(Default::default()) };
    assert_eq!(refused(action), "action: 2 is not a known value");
    let scope = wire::Authorization { scope: 3, ..wire_policy(Default::default()) };
    assert_eq!(refused(scope), "scope: 3 is not a known value");
    let kindless = wire::Match { principals: vec![Default::default()], ..Default::default() };
    assert_eq!(refused(wire_policy(kindless)), "principals: a string match without a kind this version knows");
    let port = wire::Match { destination_ports: vec![65536], ..Default::default() };
    assert_eq!(refused(wire_policy(port)), "destination_ports: 65536 is not a port");
    let range = |length| wire::Address { address: Bytes::from_static(&[10, 0, 0, 0]), length };
    let long = wire::Match { source_ips: vec![range(33)], ..Default::default() };
    assert_eq!(refused(wire_policy(long)), "source_ips: prefix length 33 exceeds the address");
    let odd = wire::Address { address: Bytes::from_static(&[10, 0]), length: 8 };
    let odd = wire::Match { not_source_ips: vec![odd], ..Default::default() };
    assert!(refused(wire_policy(odd)).starts_with("not_source_ips: 2 bytes"));
    let nameless = wire::Authorization { name: String::new(), ..wire_policy(Default::default()) };
    assert_eq!(refused(nameless), "name is empty");
}
