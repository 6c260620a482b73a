use std::sync::Arc;

use http::HeaderMap;
use mesh_proto::waypoint::{self as wire, string_match::MatchType};

use super::*;

fn m(t: MatchType) -> Vec<wire::StringMatch> {
    vec![wire::StringMatch { match_type: Some(t) }]
}
fn exact(t: &str) -> Vec<wire::StringMatch> {
    m(MatchType::Exact(t.into()))
}

fn policy(name: &str, action: wire::Action, rules: Vec<wire::HttpRule>) -> wire::HttpPolicy {
    wire::HttpPolicy { namespace: "shop".into(), name: name.into(), action: action.into(), rules, ..Default::default() }
}

fn set(policies: &[wire::HttpPolicy]) -> PolicySet {
    PolicySet::build(
        policies.iter().map(|p| Arc::new(HttpPolicy::compile(p).unwrap_or_else(|why| HttpPolicy::unreadable(p, &why)))),
    )
}

fn methods(method: &str) -> wire::HttpRule {
    wire::HttpRule { to: vec![wire::Operation { methods: exact(method), ..Default::default() }], ..Default::default() }
}
fn from(principal: &str) -> wire::HttpRule {
    wire::HttpRule {
        from: vec![wire::Source { principals: exact(principal), ..Default::default() }],
        ..Default::default()
    }
}

struct Call {
    identity: Identity,
    principal: String,
    headers: HeaderMap,
    method: &'static str,
    path: &'static str,
    authority: &'static str,
    tcp: bool,
}

fn call(method: &'static str, path: &'static str) -> Call {
    let identity: Identity = "spiffe://cluster.local/ns/shop/sa/web".parse().expect("identity");
    let principal = "cluster.local/ns/shop/sa/web".to_owned();
    Call { identity, principal, headers: HeaderMap::new(), method, path, authority: "server", tcp: false }
}

impl Call {
    fn ask(&self, set: &PolicySet) -> Result<Permit, Denial> {
        self.observe(set, |_| {})
    }

    fn observe(&self, set: &PolicySet, observed: impl FnMut(Observed)) -> Result<Permit, Denial> {
        let http =
            HttpSubject { method: self.method, path: self.path, authority: self.authority, headers: &self.headers };
        let subject = Subject {
            source: Some(&self.identity),
            principal: &self.principal,
            source_ip: "10.0.0.7".parse().expect("ip"),
            destination: "10.96.0.1:80".parse().expect("address"),
            http: (!self.tcp).then_some(http),
        };
        set.authorize(Some("shop/server"), &subject, observed)
    }
}

#[test]
fn get_is_allowed_and_post_is_not() {
    let s = set(&[policy("p", wire::Action::Allow, vec![methods("GET")])]);
    assert!(call("GET", "/").ask(&s).is_ok());
    assert_eq!(call("POST", "/").ask(&s), Err(Denial::NoAllowMatched));
    assert_eq!(call("get", "/").ask(&s), Err(Denial::NoAllowMatched), "methods are case-sensitive");
}

#[test]
fn deny_beats_allow_and_names_itself() {
    let s = set(&[
        policy("allow", wire::Action::Allow, vec![wire::HttpRule::default()]),
        policy("deny", wire::Action::Deny, vec![from("x"), from("cluster.local/ns/shop/sa/web")]),
    ]);
    let denial = call("GET", "/").ask(&s).expect_err("denied");
    assert_eq!(denial.details(), "rbac_access_denied_matched_policy[ns[shop]-policy[deny]-rule[1]]");
}

#[test]
fn no_policy_allows_and_an_allow_without_rules_denies_all() {
    assert!(call("GET", "/").ask(&set(&[])).is_ok());
    assert!(call("GET", "/").ask(&set(&[policy("p", wire::Action::Allow, vec![])])).is_err());
    assert!(call("GET", "/").ask(&set(&[policy("p", wire::Action::Deny, vec![])])).is_ok());
}

#[test]
fn policies_of_other_services_do_not_apply() {
    let mut p = policy("p", wire::Action::Deny, vec![wire::HttpRule::default()]);
    p.services = vec!["shop/other".into()];
    assert!(call("GET", "/").ask(&set(&[p.clone()])).is_ok());
    p.services.push("shop/server".into());
    assert!(call("GET", "/").ask(&set(&[p])).is_err());
}

#[test]
fn hosts_compare_with_port_and_without_case() {
    let host = |h: MatchType| {
        let to = vec![wire::Operation { hosts: m(h), ..Default::default() }];
        set(&[policy("p", wire::Action::Allow, vec![wire::HttpRule { to, ..Default::default() }])])
    };
    let mut c = call("GET", "/");
    c.authority = "A.example.com:8080";
    assert!(c.ask(&host(MatchType::Exact("a.example.com".into()))).is_err());
    assert!(c.ask(&host(MatchType::Prefix("a.Example.com:".into()))).is_ok());
}

#[test]
fn negations_hold_only_when_nothing_matches() {
    let to = vec![wire::Operation { not_paths: exact("/admin"), ..Default::default() }];
    let s = set(&[policy("p", wire::Action::Allow, vec![wire::HttpRule { to, ..Default::default() }])]);
    assert!(call("GET", "/x").ask(&s).is_ok());
    assert!(call("GET", "/admin").ask(&s).is_err());
}

#[test]
fn conditions_on_absent_headers_fail_values_and_pass_not_values() {
    let when = |values: Vec<wire::StringMatch>, not_values: Vec<wire::StringMatch>| {
        let when = vec![wire::Condition { key: "request.headers[x-a]".into(), values, not_values }];
        set(&[policy("p", wire::Action::Allow, vec![wire::HttpRule { when, ..Default::default() }])])
    };
    let mut c = call("GET", "/");
    assert!(c.ask(&when(exact("1"), vec![])).is_err());
    assert!(c.ask(&when(vec![], exact("1"))).is_ok());
    c.headers.insert("x-a", "1".parse().expect("value"));
    assert!(c.ask(&when(exact("1"), vec![])).is_ok());
    assert!(c.ask(&when(vec![], exact("1"))).is_err());
}

#[test]
fn no_way_to_send_a_header_slips_past_a_rule() {
    let when = |values, not_values| {
        let key = "request.headers[x-group]".into();
        wire::HttpRule { when: vec![wire::Condition { key, values, not_values }], ..Default::default() }
    };
    let deny = |values| set(&[policy("p", wire::Action::Deny, vec![when(values, vec![])])]);
    let allow = |values, not| set(&[policy("p", wire::Action::Allow, vec![when(values, not)])]);
    let with = |lines: &[&[u8]]| {
        let mut c = call("GET", "/");
        for line in lines {
            c.headers.append("x-group", http::HeaderValue::from_bytes(line).expect("value"));
        }
        c
    };
    let guest_twice = with(&[b"staff", b"guest"]);
    assert!(guest_twice.ask(&deny(exact("guest"))).is_err());
    assert!(guest_twice.ask(&deny(m(MatchType::Prefix("staff,".into())))).is_err());
    assert!(guest_twice.ask(&allow(exact("staff"), vec![])).is_err());
    assert!(guest_twice.ask(&allow(vec![], exact("guest"))).is_err());
    assert!(with(&[b"guest\xff"]).ask(&deny(m(MatchType::Prefix("guest".into())))).is_err());
    assert!(with(&[b""]).ask(&deny(m(MatchType::Presence(())))).is_err());
    assert!(with(&[b"staff"]).ask(&allow(exact("staff"), vec![])).is_ok());
}

#[test]
fn on_tcp_http_fields_fail_allow_rules_and_are_ignored_in_deny_rules() {
    let mut c = call("GET", "/");
    c.tcp = true;
    assert!(c.ask(&set(&[policy("p", wire::Action::Allow, vec![methods("GET")])])).is_err());
    assert!(c.ask(&set(&[policy("p", wire::Action::Deny, vec![methods("POST")])])).is_err());
    assert!(c.ask(&set(&[policy("p", wire::Action::Allow, vec![from("cluster.local/ns/shop/sa/web")])])).is_ok());
}

#[test]
fn without_an_identity_positive_principals_fail_and_negative_ones_hold() {
    let positive = set(&[policy(
        "p",
        wire::Action::Allow,
        vec![wire::HttpRule {
            from: vec![wire::Source { principals: m(MatchType::Presence(())), ..Default::default() }],
            ..Default::default()
        }],
    )]);
    let subject = Subject {
        source: None,
        principal: "",
        source_ip: "10.0.0.7".parse().expect("ip"),
        destination: "10.96.0.1:80".parse().expect("address"),
        http: None,
    };
    assert!(positive.authorize(None, &subject, |_| {}).is_err());
    let negative = set(&[policy(
        "p",
        wire::Action::Deny,
        vec![wire::HttpRule {
            from: vec![wire::Source { not_principals: exact("a"), ..Default::default() }],
            ..Default::default()
        }],
    )]);
    assert!(negative.authorize(None, &subject, |_| {}).is_err());
}

#[test]
fn dry_run_and_audit_are_seen_and_not_enforced() {
    let mut deny = policy("dry", wire::Action::Deny, vec![wire::HttpRule::default()]);
    deny.dry_run = true;
    let audit = policy("audit", wire::Action::Audit, vec![wire::HttpRule::default()]);
    let mut seen = Vec::new();
    assert!(call("GET", "/").observe(&set(&[deny, audit]), |o| seen.push(o.kind)).is_ok());
    assert_eq!(seen, [ObservedKind::DryRunDenied, ObservedKind::Audit]);
}

#[test]
fn what_cannot_be_read_is_denied() {
    let mut p = policy("p", wire::Action::Allow, vec![]);
    p.action = 9;
    assert!(matches!(call("GET", "/").ask(&set(&[p])), Err(Denial::Unreadable { .. })));
    let when = vec![wire::Condition { key: "request.auth.claims[x]".into(), values: exact("1"), not_values: vec![] }];
    let p = policy("p", wire::Action::Allow, vec![wire::HttpRule { when, ..Default::default() }]);
    assert!(matches!(call("GET", "/").ask(&set(&[p])), Err(Denial::Unreadable { .. })));
}
