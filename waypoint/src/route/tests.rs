use std::collections::BTreeMap;
use std::sync::Arc;

use http::{HeaderMap, HeaderName, Method};
use mesh_proto::waypoint::{self as wire, backend, key_match, route_match};

use super::*;

/// A route under construction, told as a story.
struct Story(wire::Route);

impl Story {
    fn new(namespace: &str, name: &str, service: &str) -> Self {
        Self(wire::Route {
            namespace: namespace.into(),
            name: name.into(),
            parents: vec![wire::Parent { service: service.into(), port: 0 }],
            ..Default::default()
        })
    }

    fn rule(mut self, to: &str, matches: Vec<wire::RouteMatch>) -> Self {
        let target = Some(backend::Target::Service(wire::ServicePort { service: to.into(), port: 80 }));
        self.0.rules.push(wire::RouteRule {
            matches,
            backends: vec![wire::Backend { weight: 1, target, ..Default::default() }],
            ..Default::default()
        });
        self
    }

    fn port(mut self, port: u32) -> Self {
        self.0.parents[0].port = port;
        self
    }

    fn created(mut self, at: i64) -> Self {
        self.0.created = at;
        self
    }
}

fn table(stories: Vec<Story>) -> RouteTable {
    let routes: BTreeMap<_, _> = stories
        .into_iter()
        .map(|s| (format!("{}/{}", s.0.namespace, s.0.name), Arc::new(CompiledRoute::compile(&s.0).expect("valid"))))
        .collect();
    RouteTable::build(&routes)
}

fn prefix(path: &str) -> wire::RouteMatch {
    wire::RouteMatch { path: Some(route_match::Path::PathPrefix(path.into())), ..Default::default() }
}
fn exact(path: &str) -> wire::RouteMatch {
    wire::RouteMatch { path: Some(route_match::Path::PathExact(path.into())), ..Default::default() }
}
fn key(name: &str, value: &str) -> wire::KeyMatch {
    wire::KeyMatch { name: name.into(), value: Some(key_match::Value::Exact(value.into())) }
}
fn header(m: wire::RouteMatch, name: &str, value: &str) -> wire::RouteMatch {
    let mut m = m;
    m.headers.push(key(name, value));
    m
}

/// The service that a GET would reach: `None` = 404.
fn goes(table: &RouteTable, target: &str, headers: &[(&str, &str)]) -> Option<String> {
    goes_from(table, "shop", 80, target, headers)
}

fn goes_from(table: &RouteTable, ns: &str, port: u16, target: &str, headers: &[(&str, &str)]) -> Option<String> {
    let map: HeaderMap =
        headers.iter().map(|(n, v)| (n.parse::<HeaderName>().expect("name"), v.parse().expect("value"))).collect();
    let (path, query) = target.split_once('?').map_or((target, None), |(p, q)| (p, Some(q)));
    let head = RequestHead { method: &Method::GET, path, query, headers: &map };
    match table.find("shop/echo", port, ns, &head) {
        Found::Rule { rule, .. } => match &rule.backends.pick()?.target {
            Target::Service { service, .. } => Some(service.to_string()),
            Target::Invalid(why) => Some(format!("invalid: {why}")),
        },
        Found::NoMatch => None,
        Found::Unrouted => Some("service".into()),
    }
}

#[test]
fn prefixes_match_whole_segments() {
    let t = table(vec![Story::new("shop", "r", "shop/echo").rule("v2", vec![prefix("/v2")])]);
    for (path, want) in [("/v2", true), ("/v2/", true), ("/v2/x", true), ("/v2example", false), ("/foo/v2", false)] {
        assert_eq!(goes(&t, path, &[]).is_some(), want, "{path}");
    }
    let t = table(vec![Story::new("shop", "r", "shop/echo").rule("v2", vec![prefix("/v2/")])]);
    assert!(goes(&t, "/v2", &[]).is_some(), "a trailing slash in the value is ignored");
}

#[test]
fn a_longer_prefix_beats_more_headers_and_exact_beats_both() {
    let t = table(vec![
        Story::new("shop", "a", "shop/echo")
            .rule("headers", vec![header(header(prefix("/"), "x", "1"), "y", "2")])
            .rule("prefix", vec![prefix("/a")]),
        Story::new("shop", "b", "shop/echo").rule("exact", vec![exact("/a/b")]),
    ]);
    let both = [("x", "1"), ("y", "2")];
    assert_eq!(goes(&t, "/a", &both).as_deref(), Some("prefix"));
    assert_eq!(goes(&t, "/a/b", &both).as_deref(), Some("exact"));
    assert_eq!(goes(&t, "/b", &both).as_deref(), Some("headers"));
    assert_eq!(goes(&t, "/b", &[]), None, "no fall-back to the service once routes exist");
}

#[test]
fn method_headers_and_query_decide_in_that_order() {
    let method = wire::RouteMatch { method: "GET".into(), ..prefix("/") };
    let query = wire::RouteMatch { query_params: vec![key("animal", "hydra")], ..prefix("/") };
    let t = table(vec![
        Story::new("shop", "r", "shop/echo")
            .rule("query", vec![query])
            .rule("header", vec![header(prefix("/"), "version", "v2")])
            .rule("method", vec![method]),
    ]);
    assert_eq!(goes(&t, "/?animal=hydra", &[("version", "v2")]).as_deref(), Some("method"));
}

#[test]
fn query_values_are_decoded_and_only_the_first_of_a_name_counts() {
    let query = wire::RouteMatch { query_params: vec![key("a", "b c")], ..prefix("/") };
    let t = table(vec![Story::new("shop", "r", "shop/echo").rule("yes", vec![query])]);
    assert!(goes(&t, "/?a=b%20c", &[]).is_some());
    assert!(goes(&t, "/?a=b+c", &[]).is_some());
    assert!(goes(&t, "/?a=x&a=b+c", &[]).is_none());
    assert!(goes(&t, "/", &[]).is_none());
}

#[test]
fn regular_expressions_match_the_whole_value_and_rank_last() {
    let re = wire::RouteMatch { path: Some(route_match::Path::PathRegex("/v[0-9]+".into())), ..Default::default() };
    let t =
        table(vec![Story::new("shop", "r", "shop/echo").rule("regex", vec![re]).rule("prefix", vec![prefix("/v1")])]);
    assert_eq!(goes(&t, "/v2", &[]).as_deref(), Some("regex"));
    assert_eq!(goes(&t, "/v1", &[]).as_deref(), Some("prefix"));
    assert_eq!(goes(&t, "/v2/x", &[]), None);
}

#[test]
fn a_regular_expression_that_gets_out_of_its_anchors_is_refused() {
    let re = wire::RouteMatch { path: Some(route_match::Path::PathRegex("/a)|(?:b".into())), ..Default::default() };
    let Story(route) = Story::new("shop", "r", "shop/echo").rule("regex", vec![re]);
    assert!(matches!(CompiledRoute::compile(&route), Err(RouteError::Regex { rule: 0, .. })));
}

#[test]
fn a_timeout_that_no_clock_can_count_is_refused() {
    let route = |seconds| {
        let Story(mut route) = Story::new("shop", "r", "shop/echo").rule("v1", vec![prefix("/")]);
        route.rules[0].request_timeout = Some(prost_types::Duration { seconds, nanos: 0 });
        CompiledRoute::compile(&route)
    };
    assert!(route(99_999 * 3600).is_ok());
    for seconds in [i64::MAX, -1] {
        assert!(matches!(route(seconds), Err(RouteError::Invalid { what: "timeout", .. })));
    }
}

#[test]
fn older_routes_win_ties_then_names_then_position() {
    let t = table(vec![
        Story::new("shop", "a", "shop/echo").created(2).rule("young", vec![prefix("/")]),
        Story::new("shop", "b", "shop/echo").created(1).rule("old", vec![prefix("/")]).rule("later", vec![prefix("/")]),
    ]);
    assert_eq!(goes(&t, "/", &[]).as_deref(), Some("old"));
}

#[test]
fn a_parent_port_leaves_other_ports_alone() {
    let t = table(vec![Story::new("shop", "r", "shop/echo").port(80).rule("v2", vec![prefix("/x")])]);
    assert_eq!(goes_from(&t, "shop", 8080, "/x", &[]).as_deref(), Some("service"));
    assert_eq!(goes_from(&t, "shop", 80, "/y", &[]), None);
}

#[test]
fn consumer_routes_replace_the_producers_for_their_namespace_only() {
    let t = table(vec![
        Story::new("shop", "producer", "shop/echo").rule("producer", vec![prefix("/")]),
        Story::new("other", "consumer", "shop/echo").rule("consumer", vec![prefix("/c")]),
    ]);
    assert_eq!(goes_from(&t, "other", 80, "/c", &[]).as_deref(), Some("consumer"));
    assert_eq!(goes_from(&t, "other", 80, "/", &[]), None, "replaced, not merged");
    assert_eq!(goes_from(&t, "shop", 80, "/c", &[]).as_deref(), Some("producer"));
}

#[test]
fn repeated_headers_compare_joined() {
    let t = table(vec![Story::new("shop", "r", "shop/echo").rule("yes", vec![header(prefix("/"), "x", "a,b")])]);
    let mut map = HeaderMap::new();
    map.append("x", "a".parse().expect("value"));
    map.append("x", "b".parse().expect("value"));
    let head = RequestHead { method: &Method::GET, path: "/", query: None, headers: &map };
    assert!(matches!(t.find("shop/echo", 80, "shop", &head), Found::Rule { .. }));
}

#[test]
fn bad_resources_are_refused_with_the_place() {
    let bad = |m: wire::RouteMatch| {
        let s = Story::new("shop", "r", "shop/echo").rule("x", vec![m]);
        CompiledRoute::compile(&s.0).expect_err("refused").to_string()
    };
    let re = wire::RouteMatch { path: Some(route_match::Path::PathRegex("(".into())), ..Default::default() };
    assert!(bad(re).starts_with("rule 0: regular expression"));
    assert!(bad(wire::RouteMatch { method: "G T".into(), ..prefix("/") }).contains("method"));
    assert!(bad(header(prefix("/"), "a b", "1")).contains("header name"));
}
