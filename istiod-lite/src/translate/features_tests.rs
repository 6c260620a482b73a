//! What the class of waypoints claims of the Gateway API is done, and what of an HTTPRoute is not done it does not claim.

use std::collections::BTreeSet;

use mesh_proto::waypoint::{ROUTE_TYPE, Route};
use mesh_proto::workload::AppProtocol;
use prost::Message as _;

use super::binding::waypoints;
use super::gateway::FEATURES;
use super::translate;
use super::verdict::{Kind, Report, Status};
use super::waypoint::{self, WaypointSettings};
use super::world::World;
use super::{fixture, service};
use crate::types::Key;

const WORLD: &str = "
kind: Namespace
metadata: {name: shop}
---
kind: Gateway
metadata: {name: waypoint, namespace: shop}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
  infrastructure: {labels: {team: marked}, annotations: {note: marked}}
status: {addresses: [{type: IPAddress, value: 10.96.0.9}]}
---
kind: Service
metadata: {name: web, namespace: shop, labels: {istio.io/use-waypoint: waypoint}}
spec:
  clusterIP: 10.96.0.1
  ports:
    - {name: web, port: 80}
    - {name: h2c, port: 81, appProtocol: kubernetes.io/h2c}
    - {name: ws, port: 82, appProtocol: kubernetes.io/ws}
";

/// What a rule has for a feature of HTTPRoute, beside backends, and what waypoints are told of that.
const RULES: &[(&str, &str, &str)] = &[
    ("HTTPRoute", "backendRefs: [{name: web, port: 80}]", "shop/web.shop.svc.cluster.local"),
    (
        "HTTPRoute303RedirectStatusCode",
        "filters: [{type: RequestRedirect, requestRedirect: {statusCode: 303}}]",
        "status: 303",
    ),
    (
        "HTTPRoute307RedirectStatusCode",
        "filters: [{type: RequestRedirect, requestRedirect: {statusCode: 307}}]",
        "status: 307",
    ),
    (
        "HTTPRoute308RedirectStatusCode",
        "filters: [{type: RequestRedirect, requestRedirect: {statusCode: 308}}]",
        "status: 308",
    ),
    ("HTTPRouteBackendProtocolH2C", "backendRefs: [{name: web, port: 81}]", "port: 81"),
    ("HTTPRouteBackendProtocolWebSocket", "backendRefs: [{name: web, port: 82}]", "port: 82"),
    (
        "HTTPRouteBackendRequestHeaderModification",
        "backendRefs: [{name: web, port: 80, filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: x, value: marked}]}}]}]",
        "marked",
    ),
    (
        "HTTPRouteBackendTimeout",
        "timeouts: {backendRequest: 7s}",
        "backend_request_timeout: Some(Duration { seconds: 7",
    ),
    ("HTTPRouteCORS", "filters: [{type: CORS, cors: {allowOrigins: ['*']}}]", ""),
    ("HTTPRouteHostRewrite", "filters: [{type: URLRewrite, urlRewrite: {hostname: marked.example}}]", "marked.example"),
    ("HTTPRouteMethodMatching", "matches: [{method: PUT}]", "\"PUT\""),
    ("HTTPRouteNamedRouteRule", "name: marked", "marked"),
    (
        "HTTPRoutePathRedirect",
        "filters: [{type: RequestRedirect, requestRedirect: {path: {type: ReplaceFullPath, replaceFullPath: /marked}}}]",
        "/marked",
    ),
    (
        "HTTPRoutePathRewrite",
        "filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /marked}}}]",
        "/marked",
    ),
    ("HTTPRoutePortRedirect", "filters: [{type: RequestRedirect, requestRedirect: {port: 8083}}]", "port: 8083"),
    ("HTTPRouteQueryParamMatching", "matches: [{queryParams: [{name: marked, value: a}]}]", "marked"),
    (
        "HTTPRouteRequestMirror",
        "filters: [{type: RequestMirror, requestMirror: {backendRef: {name: web, port: 80}}}]",
        "",
    ),
    (
        "HTTPRouteRequestMultipleMirrors",
        "filters: [{type: RequestMirror, requestMirror: {backendRef: {name: web, port: 80}}}, {type: RequestMirror, requestMirror: {backendRef: {name: web, port: 81}}}]",
        "",
    ),
    (
        "HTTPRouteRequestPercentageMirror",
        "filters: [{type: RequestMirror, requestMirror: {percent: 50, backendRef: {name: web, port: 80}}}]",
        "",
    ),
    ("HTTPRouteRequestTimeout", "timeouts: {request: 7s}", " request_timeout: Some(Duration { seconds: 7"),
    (
        "HTTPRouteResponseHeaderModification",
        "filters: [{type: ResponseHeaderModifier, responseHeaderModifier: {remove: [marked]}}]",
        "marked",
    ),
    ("HTTPRouteRetry", "retry: {attempts: 2}", ""),
    ("HTTPRouteSchemeRedirect", "filters: [{type: RequestRedirect, requestRedirect: {scheme: https}}]", "https"),
    ("HTTPRouteSessionPersistence", "sessionPersistence: {type: Cookie}", ""),
];
/// Those of which a rule does not tell; each has a test below.
const OTHERS: &[&str] = &["GatewayInfrastructurePropagation", "HTTPRouteParentRefPort"];

/// What waypoints are told of a route, if all of it is done.
fn done(parent: &str, rule: &str) -> Option<String> {
    let backends = if rule.contains("backendRefs") || rule.contains("Redirect") {
        ""
    } else {
        ", backendRefs: [{name: web, port: 80}]"
    };
    let route = format!(
        "kind: HTTPRoute\nmetadata: {{name: r, namespace: shop}}\nspec: {{parentRefs: [{{group: '', kind: Service, name: web{parent}}}], rules: [{{{rule}{backends}}}]}}\n"
    );
    let translation = translate(&fixture::world(&format!("{WORLD}---\n{route}")));
    let verdict = translation.verdicts.iter().find(|verdict| verdict.kind == Kind::HttpRoute)?;
    let Report::Parents(parents) = &verdict.report else { panic!("a route's report is one of parents") };
    let is_done = parents[0]
        .conditions
        .iter()
        .all(|condition| (condition.status == Status::True) == (condition.r#type != "PartiallyInvalid"));
    let resource = translation.resources.iter().find(|resource| resource.type_url() == ROUTE_TYPE)?;
    let told = format!("{:?}", Route::decode(resource.body()).expect("a Route"));
    is_done.then_some(told)
}

#[test]
fn a_feature_of_routes_is_claimed_if_and_only_if_it_is_done() {
    for (feature, rule, mark) in RULES {
        let told = done("", rule);
        let is_done = told.as_ref().is_some_and(|told| told.contains(mark));
        assert_eq!(is_done, FEATURES.contains(feature), "{feature}: {told:?}");
    }
}

#[test]
fn every_claim_has_a_test_and_they_are_sorted() {
    let tested: BTreeSet<&str> = RULES.iter().map(|(feature, ..)| *feature).chain(OTHERS.iter().copied()).collect();
    let untested: Vec<_> = FEATURES.iter().filter(|feature| !tested.contains(*feature)).collect();
    assert!(untested.is_empty(), "{untested:?}");
    assert!(FEATURES.is_sorted());
    assert!(FEATURES.iter().all(|feature| !feature.starts_with("Mesh")), "a class is no mesh");
}

#[test]
fn a_route_that_names_a_port_is_one_of_that_port() {
    assert!(FEATURES.contains(&"HTTPRouteParentRefPort"));
    let parents =
        |told: String| told.split("parents: ").nth(1).and_then(|rest| rest.split(']').next()).unwrap().to_owned();
    assert!(parents(done(", port: 81", "name: x").expect("done")).contains("port: 81"));
    assert!(parents(done("", "name: x").expect("done")).contains("port: 0"));
}

#[test]
fn protocols_of_backends_are_told() {
    let world: World = fixture::world(WORLD);
    let web = &world.services[&Key::new("shop", "web")];
    let told: Vec<_> = web.ports().iter().map(service::app_protocol).collect();
    assert_eq!(told[1..], [AppProtocol::Http2, AppProtocol::Http11]);
}

#[test]
fn labels_and_annotations_of_the_infrastructure_are_on_every_object() {
    assert!(FEATURES.contains(&"GatewayInfrastructurePropagation"));
    let world = fixture::world(WORLD);
    let (key, gateway) = waypoints(&world).next().expect("one");
    let spec = gateway.spec.as_ref().expect("it can be read");
    let objects = waypoint::objects(&world, key, gateway, spec, &WaypointSettings::default()).expect("deployed");
    assert_eq!(objects.len(), 3);
    for (_, object) in &objects {
        assert_eq!(object["metadata"]["labels"]["team"], "marked", "{object}");
        assert_eq!(object["metadata"]["annotations"]["note"], "marked", "{object}");
    }
    let pod = &objects.last().expect("the Deployment").1["spec"]["template"]["metadata"];
    assert_eq!(pod["labels"]["team"], "marked");
    assert_eq!(pod["annotations"]["note"], "marked");
}
