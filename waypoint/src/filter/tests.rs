use http::HeaderMap;
use mesh_proto::waypoint::{self as wire, filter, path_modifier};

use super::*;

fn prefix(new: &str) -> PathModifier {
    let kind = Some(path_modifier::Kind::ReplacePrefixMatch(new.into()));
    PathModifier::compile(&wire::PathModifier { kind }).expect("valid")
}

#[test]
fn replacing_a_prefix_joins_without_doubling_or_losing_slashes() {
    for (new, path, want) in [
        ("/xyz", "/foo", "/xyz"),
        ("/xyz", "/foo/", "/xyz/"),
        ("/xyz", "/foo/bar", "/xyz/bar"),
        ("/xyz/", "/foo/bar", "/xyz/bar"),
        ("/", "/foo", "/"),
        ("/", "/foo/bar", "/bar"),
        ("", "/foo", "/"),
        ("", "/foo/bar", "/bar"),
    ] {
        assert_eq!(prefix(new).apply(path, Some("/foo")), want, "{new} on {path}");
    }
    assert_eq!(prefix("/xyz").apply("/a", Some("/")), "/xyz/a");
}

fn headers(set: &[(&str, &str)], add: &[(&str, &str)], remove: &[&str]) -> Filter {
    let list =
        |l: &[(&str, &str)]| l.iter().map(|(n, v)| wire::Header { name: (*n).into(), value: (*v).into() }).collect();
    let m =
        wire::HeaderModifier { set: list(set), add: list(add), remove: remove.iter().map(|r| (*r).into()).collect() };
    Filter::compile(&wire::Filter { filter: Some(filter::Filter::RequestHeaders(m)) }).expect("valid")
}

#[test]
fn header_modifiers_set_add_and_remove() {
    let mut map = HeaderMap::new();
    map.insert("x-old", "old".parse().expect("value"));
    map.insert("x-gone", "1".parse().expect("value"));
    let f = [headers(&[("X-Set", "a"), ("x-set", "ignored")], &[("X-Old", "new"), ("x-fresh", "f")], &["X-Gone"])];
    let mut uri = Uri::from_static("/");
    apply_request(&f, None, Upstream { uri: &mut uri, headers: &mut map });
    assert_eq!(map["x-set"], "a");
    assert_eq!(map["x-old"], "old,new");
    assert_eq!(map["x-fresh"], "f");
    assert!(!map.contains_key("x-gone"));
}

#[test]
fn host_and_malformed_names_are_refused() {
    for name in ["Host", ":path", "a b", ""] {
        let m = wire::HeaderModifier {
            set: vec![wire::Header { name: name.into(), value: "v".into() }],
            ..Default::default()
        };
        let compiled = Filter::compile(&wire::Filter { filter: Some(filter::Filter::ResponseHeaders(m)) });
        assert!(compiled.is_err(), "{name:?}");
    }
}

fn redirect_of(r: wire::Redirect) -> Redirect {
    Redirect::compile(&r).expect("valid")
}

const REQUEST: RedirectContext<'_> =
    RedirectContext { scheme: "http", host: "echo", port: 80, path: "/a/b", query: Some("q=1"), prefix: Some("/a") };

#[test]
fn redirect_locations_follow_the_gateway_api() {
    let r = redirect_of(wire::Redirect { hostname: "example.org".into(), ..Default::default() });
    assert_eq!((r.status.as_u16(), r.location(&REQUEST).as_str()), (302, "http://example.org/a/b?q=1"));
    let r = redirect_of(wire::Redirect { scheme: "https".into(), status: 301, ..Default::default() });
    assert_eq!((r.status.as_u16(), r.location(&REQUEST).as_str()), (301, "https://echo/a/b?q=1"));
    let r = redirect_of(wire::Redirect { port: 8083, ..Default::default() });
    assert_eq!(r.location(&REQUEST), "http://echo:8083/a/b?q=1");
    let context = RedirectContext { port: 8080, ..REQUEST };
    let kind = Some(path_modifier::Kind::ReplacePrefixMatch("/x".into()));
    let r = redirect_of(wire::Redirect { path: Some(wire::PathModifier { kind }), ..Default::default() });
    assert_eq!(r.location(&context), "http://echo:8080/x/b?q=1");
    assert_eq!(
        redirect_of(wire::Redirect::default()).location(&RedirectContext { path: "/é", query: None, ..REQUEST }),
        "http://echo/%C3%A9"
    );
    for path in ["/\u{7f}", "/a b", "/a#b", "a"] {
        let kind = Some(path_modifier::Kind::ReplaceFull(path.into()));
        let path = Some(wire::PathModifier { kind });
        assert!(Redirect::compile(&wire::Redirect { path, ..Default::default() }).is_err());
    }
    assert!(Redirect::compile(&wire::Redirect { status: 200, ..Default::default() }).is_err());
    assert!(Redirect::compile(&wire::Redirect { scheme: "ftp".into(), ..Default::default() }).is_err());
}

#[test]
fn rewrites_change_path_and_host_and_keep_the_query() {
    let rewrite = wire::Rewrite {
        hostname: "other.example".into(),
        path: Some(wire::PathModifier { kind: Some(path_modifier::Kind::ReplaceFull("/full".into())) }),
    };
    let f = [Filter::compile(&wire::Filter { filter: Some(filter::Filter::Rewrite(rewrite)) }).expect("valid")];
    let mut uri = Uri::from_static("http://echo/a/b?q=1");
    let mut map = HeaderMap::new();
    apply_request(&f, None, Upstream { uri: &mut uri, headers: &mut map });
    assert_eq!(uri, "http://other.example/full?q=1");
    assert_eq!(map["host"], "other.example");
    assert_eq!(map["x-envoy-original-path"], "/a/b");
}
