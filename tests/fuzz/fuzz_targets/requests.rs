//! A request as a waypoint reads it: path and head made plain, policy and routes asked, filters applied.
#![no_main]

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, LazyLock};
use std::time::Instant;

use http::request::Parts;
use http::{HeaderName, HeaderValue, Method, Request, Uri, Version, header};
use libfuzzer_sys::{Corpus, fuzz_target};
use mesh::identity::Identity;
use mesh_fuzz::{begin, seed, take, texts};
use mesh_proto::waypoint::{self as wire, path_modifier, route_match, string_match::MatchType};
use prost::Message;
use waypoint::filter::{self, RedirectContext, Upstream};
use waypoint::path::normalise;
use waypoint::policy::{Denial, HttpPolicy, HttpSubject, PolicySet, Subject};
use waypoint::prepare::{Prepared, prepare, to_h2};
use waypoint::route::{CompiledRoute, Found, RequestHead, RouteTable};

fuzz_target!(init: begin(seeds), |input: &[u8]| -> Corpus {
    let Some((letter, content)) = input.split_first() else { return Corpus::Reject };
    match (letter, std::str::from_utf8(content)) {
        (b'p', Ok(text)) => path(text),
        (b'h', _) => head(content),
        (b'r', _) => route(content),
        (b'w', _) => policy(content),
        _ => return Corpus::Reject,
    }
    Corpus::Keep
});

/// Every spelling of a path becomes one, and that one stays.
fn path(text: &str) {
    let Ok(plain) = normalise(text) else { return };
    assert!(plain.starts_with('/') && !plain.contains(['\\', '#']), "{plain}");
    assert!(!plain.split('/').any(|segment| matches!(segment, "." | "..")), "{plain}");
    assert_eq!(normalise(&plain).as_deref(), Ok(&*plain));
    for other in spellings(text) {
        assert_eq!(normalise(&other).as_deref(), Ok(&*plain), "{other}");
    }
}

/// The same path as clients may write it who want to get round a rule.
fn spellings(path: &str) -> Vec<String> {
    let mut all = vec![format!("/.{path}"), format!("/x/..{path}"), format!("\\..{path}").replacen('\\', "/", 1)];
    if let Some(at) = path.find(|c: char| c.is_ascii_alphanumeric()).filter(|at| !path[..*at].ends_with('%')) {
        // What stands behind a percent sign is one character already.
        if !path[..at].contains('%') {
            let escaped = format!("%{:02x}", path.as_bytes()[at]);
            all.push(format!("{}{escaped}{}", &path[..at], &path[at + 1..]));
        }
    }
    all
}

/// `METHOD target VERSION`, then headers, a line each.
fn request(content: &[u8]) -> Option<Parts> {
    let mut lines = content.split(|byte| *byte == b'\n').take(64);
    let mut first = lines.next()?.split(|byte| *byte == b' ');
    let (method, target) = (Method::from_bytes(first.next()?).ok()?, Uri::try_from(first.next()?).ok()?);
    let version = match first.next() {
        Some(b"2") => Version::HTTP_2,
        Some(b"0") => Version::HTTP_10,
        _ => Version::HTTP_11,
    };
    let mut parts = Request::builder().method(method).uri(target).version(version).body(()).ok()?.into_parts().0;
    for line in lines {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let value = HeaderValue::from_bytes(line[colon + 1..].trim_ascii());
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(&line[..colon]), value) {
            parts.headers.append(name, value);
        }
    }
    Some(parts)
}

/// Never sent on, whoever asks.
const NEVER: [&str; 7] = [
    "keep-alive",
    "proxy-connection",
    "proxy-authenticate",
    "transfer-encoding",
    "x-forwarded-client-cert",
    "x-istio-source",
    "x-envoy-max-retries",
];

fn head(content: &[u8]) {
    let Some(original) = request(content) else { return };
    let mut parts = original.clone();
    let Ok(prepared) = prepare(&mut parts) else { return };
    assert_eq!(parts.headers.get_all(header::HOST).iter().count(), 1);
    assert_eq!(parts.headers[header::HOST], prepared.authority);
    assert!(NEVER.iter().all(|name| !parts.headers.contains_key(*name)), "{parts:?}");
    assert_eq!(parts.headers.contains_key(header::UPGRADE), prepared.websocket);
    assert!(parts.headers.get_all(header::UPGRADE).iter().all(|protocol| protocol == "websocket"), "{parts:?}");
    assert!(parts.headers.get_all(header::COOKIE).iter().count() <= 1);

    let mut again = parts.clone();
    assert_eq!(prepare(&mut again).ok().as_ref(), Some(&prepared), "what is plain stays so");
    assert_eq!((&again.uri, &again.headers), (&parts.uri, &parts.headers));

    let decided = decide(&RULES, &parts, &prepared);
    for mut other in rewritings(&original) {
        let Ok(prepared) = prepare(&mut other) else { panic!("{other:?}") };
        assert_eq!(decide(&RULES, &other, &prepared), decided, "{other:?}");
    }
    let path = parts.uri.path().to_owned();
    to_h2(&mut parts);
    assert_eq!((parts.uri.path(), parts.uri.authority().is_some()), (&*path, true));
}

/// The same request in other words.
fn rewritings(original: &Parts) -> Vec<Parts> {
    let mut all = Vec::new();
    let paths = if original.uri.path() == "*" { Vec::new() } else { spellings(original.uri.path()) };
    for path in paths {
        let query = original.uri.query().map(|query| format!("?{query}")).unwrap_or_default();
        let mut uri = original.uri.clone().into_parts();
        let Ok(target) = format!("{path}{query}").parse() else { continue };
        uri.path_and_query = Some(target);
        let mut other = original.clone();
        other.uri = Uri::from_parts(uri).expect("a URI with another path");
        all.push(other);
    }
    if let Some(Ok(host)) = original.headers.get(header::HOST).map(HeaderValue::to_str) {
        let mut other = original.clone();
        other.headers.insert(header::HOST, host.to_ascii_uppercase().parse().expect("a header"));
        all.push(other);
    }
    all
}

/// Rules of which each kind of spelling could get round one.
static RULES: LazyLock<PolicySet> = LazyLock::new(|| {
    let text = |kind| wire::StringMatch { match_type: Some(kind) };
    let operations = [
        wire::Operation {
            paths: vec![
                text(MatchType::Prefix("/admin".into())),
                text(MatchType::Exact("/secret".into())),
                text(MatchType::Suffix(".key".into())),
                text(MatchType::Template("/t/{*}/x/{**}".into())),
            ],
            ..Default::default()
        },
        wire::Operation {
            hosts: vec![text(MatchType::Exact("Internal.example".into())), text(MatchType::Suffix(".internal".into()))],
            ..Default::default()
        },
        wire::Operation { methods: vec![text(MatchType::Exact("DELETE".into()))], ..Default::default() },
    ];
    let when = wire::Condition {
        key: "request.headers[X-Role]".into(),
        values: vec![text(MatchType::Exact("admin".into()))],
        ..Default::default()
    };
    let rules = vec![
        wire::HttpRule { to: operations.into(), ..Default::default() },
        wire::HttpRule { when: vec![when], ..Default::default() },
    ];
    let policy = wire::HttpPolicy { action: wire::Action::Deny.into(), rules, ..Default::default() };
    PolicySet::build([Arc::new(HttpPolicy::compile(&policy).expect("good rules"))])
});

static CLIENT: LazyLock<Identity> = LazyLock::new(|| Identity::new("td", "shop", "cart").expect("an identity"));

fn subject<'a>(http: Option<HttpSubject<'a>>) -> Subject<'a> {
    Subject {
        source: Some(&CLIENT),
        principal: "td/ns/shop/sa/cart",
        source_ip: IpAddr::from([10, 0, 0, 1]),
        destination: ([10, 96, 0, 1], 80).into(),
        http,
    }
}

fn decide(policies: &PolicySet, parts: &Parts, prepared: &Prepared) -> Result<(), Denial> {
    let (method, path) = (parts.method.as_str(), parts.uri.path());
    let http = HttpSubject { method, path, authority: &prepared.authority, headers: &parts.headers };
    policies.authorize(None, &subject(Some(http)), |_| {}).map(drop)
}

/// A message behind its length, and a request.
fn split(mut content: &[u8]) -> (&[u8], &[u8]) {
    let length = usize::from(take(&mut content)) << 8 | usize::from(take(&mut content));
    content.split_at(length.min(content.len()))
}

/// Of a policy that cannot be read nothing is allowed. A rule that makes ALLOW let in makes DENY refuse, so doubt never
/// opens anything.
fn policy(content: &[u8]) {
    let (message, content) = split(content);
    let Ok(policy) = wire::HttpPolicy::decode(message) else { return };
    let policy = wire::HttpPolicy { services: Vec::new(), dry_run: false, ..policy };
    let set = |policy| PolicySet::build([Arc::new(policy)]);
    let head = request(content).and_then(|mut parts| Some((prepare(&mut parts).ok()?, parts)));
    let http = head.as_ref().map(|(prepared, parts)| HttpSubject {
        method: parts.method.as_str(),
        path: parts.uri.path(),
        authority: &prepared.authority,
        headers: &parts.headers,
    });
    let allows = |set: &PolicySet| set.authorize(None, &subject(http), |_| {}).is_ok();
    let with =
        |action: wire::Action| HttpPolicy::compile(&wire::HttpPolicy { action: action.into(), ..policy.clone() });
    match (with(wire::Action::Allow), with(wire::Action::Deny)) {
        (Ok(allow), Ok(deny)) => assert!(!(allows(&set(allow)) && allows(&set(deny))), "{policy:?}"),
        (Err(why), Err(_)) => assert!(!allows(&set(HttpPolicy::unreadable(&policy, &why)))),
        _ => panic!("the action makes a difference: {policy:?}"),
    }
}

/// A rule that is found leads to a request that can be sent on, or an answer that can be given.
fn route(content: &[u8]) {
    let (message, content) = split(content);
    let Ok(mut route) = wire::Route::decode(message) else { return };
    route.parents = vec![wire::Parent { service: "shop/api".into(), port: 0 }];
    let Ok(compiled) = CompiledRoute::compile(&route) else { return };
    let table = RouteTable::build(&BTreeMap::from([("r".to_owned(), Arc::new(compiled))]));
    let Some(mut parts) = request(content) else { return };
    let Ok(prepared) = prepare(&mut parts) else { return };
    let (path, query) = (parts.uri.path(), parts.uri.query());
    let head = RequestHead { method: &parts.method, path, query, headers: &parts.headers };
    let Found::Rule { rule, prefix } = table.find("shop/api", 80, &route.namespace, &head) else { return };
    for timeout in [rule.request_timeout, rule.backend_timeout].into_iter().flatten() {
        assert!(Instant::now().checked_add(timeout).is_some(), "{timeout:?}");
    }
    if let Some(prefix) = prefix {
        assert!(prefix == "/" || path.starts_with(prefix));
    }
    if let Some(redirect) = filter::redirect(&rule.filters) {
        let host = prepared.authority.parse::<http::uri::Authority>().expect("it was one");
        let context = RedirectContext { scheme: "http", host: host.host(), port: 80, path, query, prefix };
        let location = redirect.location(&context);
        assert!(HeaderValue::from_str(&location).is_ok(), "{location:?}");
    }
    let prefix = prefix.map(str::to_owned);
    filter::apply_request(
        &rule.filters,
        prefix.as_deref(),
        Upstream { uri: &mut parts.uri, headers: &mut parts.headers },
    );
    assert!(parts.uri.path().starts_with('/') || parts.uri.path() == "*", "{}", parts.uri);
    filter::apply_response(&rule.filters, &mut parts.headers);
}

fn seeds() -> Vec<Vec<u8>> {
    let paths = ["/a/../b", "/%2e%2e/admin", "/x\\admin", "/a%2Fadmin", "//a//.", "/a/.b/..c/...", "/%20x%C3%A9"];
    let heads = [
        "GET /admin/x?y=1 1\nhost: shop.example:80\ncookie: a=1\ncookie: b=2\nte: trailers",
        "GET http://shop.example/t/a/x/ 2\nx-role: admin\nx-role: user",
        "GET /chat 1\nhost: a.INTERNAL\nconnection: keep-alive, Upgrade\nupgrade: websocket\nx-istio-source: gw",
        "OPTIONS * 1\nhost: h\ntransfer-encoding: chunked\nconnection: x-a, close\nx-a: 1",
    ];
    let mut seeds: Vec<Vec<u8>> = texts(b'p', &paths).chain(texts(b'h', &heads)).collect();
    let behind = |letter: u8, message: Vec<u8>, head: &str| {
        let length = u16::try_from(message.len()).expect("it is short").to_be_bytes();
        seed(letter, [&length[..], &message, head.as_bytes()].concat())
    };
    let text = |text: &str| wire::StringMatch { match_type: Some(MatchType::Prefix(text.into())) };
    let rule = wire::HttpRule {
        from: vec![wire::Source {
            namespaces: vec![text("sh")],
            service_accounts: vec!["shop/cart".into()],
            not_principals: vec![text("td/ns/evil")],
            ip_blocks: vec![wire::IpBlock { address: [10, 0, 0, 0].to_vec().into(), length: 8 }],
            ..Default::default()
        }],
        to: vec![wire::Operation { paths: vec![text("/")], not_hosts: vec![text("x")], ..Default::default() }],
        when: vec![wire::Condition {
            key: "request.headers[x-role]".into(),
            values: vec![text("a")],
            not_values: vec![text("u")],
        }],
    };
    let template = wire::StringMatch { match_type: Some(MatchType::Template("/a/{*}/b/{**}".into())) };
    let templates = wire::HttpRule {
        to: vec![wire::Operation { paths: vec![template], ..Default::default() }],
        ..Default::default()
    };
    let policy = wire::HttpPolicy { rules: vec![rule, templates], ..Default::default() };
    let path = |kind| Some(wire::PathModifier { kind: Some(kind) });
    let filters = [
        wire::filter::Filter::Rewrite(wire::Rewrite {
            hostname: "b.example".into(),
            path: path(path_modifier::Kind::ReplacePrefixMatch("/c".into())),
        }),
        wire::filter::Filter::Redirect(wire::Redirect {
            scheme: "https".into(),
            path: path(path_modifier::Kind::ReplaceFull("/d".into())),
            status: 301,
            ..Default::default()
        }),
        wire::filter::Filter::RequestHeaders(wire::HeaderModifier {
            set: vec![wire::Header { name: "x-a".into(), value: "1".into() }],
            add: vec![wire::Header { name: "cookie".into(), value: "c=3".into() }],
            remove: vec!["te".into()],
        }),
    ];
    for head in heads {
        seeds.push(behind(b'w', policy.encode_to_vec(), head));
        for filter in &filters {
            for matched in
                [route_match::Path::PathPrefix("/t/".into()), route_match::Path::PathRegex("/(a|t).*".into())]
            {
                let route = wire::Route {
                    rules: vec![wire::RouteRule {
                        matches: vec![wire::RouteMatch { path: Some(matched), ..Default::default() }],
                        filters: vec![wire::Filter { filter: Some(filter.clone()) }],
                        ..Default::default()
                    }],
                    ..Default::default()
                };
                seeds.push(behind(b'r', route.encode_to_vec(), head));
            }
        }
    }
    seeds
}
