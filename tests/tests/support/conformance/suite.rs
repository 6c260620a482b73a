//! The 23 cases that the suite has for a mesh, under its names.

use super::{CONSUMER, Case, MESH, POD, Said, Vector, call, get, route, route_in};

const GRPC: &str = "no GRPCRoute yet";
const NO_GRPC: Said = Said::NoSuchKind("GRPCRoute");
const GRPC_METHOD: &str = "/mesh.lab.Echo/Say";

pub fn cases() -> Vec<Case> {
    let carried_out =
        |name, features, objects, vectors| Case { name, features, objects, said: Said::CarriedOut, vectors };
    let no_grpc = |name, objects, vectors| Case { name, features: &["GRPCRoute"], objects, said: NO_GRPC, vectors };
    vec![
        carried_out("MeshBasic", &["Mesh"], String::new(), vec![get("/").lands_on("echo-v")]),
        carried_out(
            "MeshHTTPRouteSimpleSameNamespace",
            &["HTTPRoute"],
            route("echo:80", "\n  - backendRefs: [{name: echo-v1, port: 8080}]"),
            vec![get("/").times(20).lands_on("echo-v1")],
        ),
        carried_out("MeshHTTPRouteMatching", &["HTTPRoute"], route("echo:80", MATCHING), matching()),
        carried_out(
            "MeshHTTPRouteRequestHeaderModifier",
            &["HTTPRoute"],
            route(
                "echo:80",
                &modifiers(|filter| format!("filters: [{filter}], backendRefs: [{{name: echo-v1, port: 80}}]")),
            ),
            modified(),
        ),
        carried_out(
            "MeshHTTPRouteRedirectHostAndStatus",
            &["HTTPRoute"],
            route("echo:80", REDIRECT_HOST),
            vec![
                get("/host").redirected(302, "http://example.org/host"),
                get("/host-and-status").redirected(301, "http://example.org/host-and-status"),
            ],
        ),
        carried_out(
            "MeshHTTPRouteWeight",
            &["HTTPRoute"],
            route(
                "echo:80",
                "\n  - backendRefs: [{name: echo-v1, port: 80, weight: 70}, {name: echo-v2, port: 80, weight: 30}]",
            ),
            vec![get("/").shared(&[("echo-v1", 70), ("echo-v2", 30)])],
        ),
        carried_out(
            "MeshTrafficSplit",
            &["HTTPRoute"],
            route("echo", SPLIT),
            vec![get("/v1").lands_on("echo-v1"), get("/v2").lands_on("echo-v2")],
        ),
        carried_out(
            "MeshHTTPRouteBackendRequestHeaderModifier",
            &["MeshHTTPRouteBackendRequestHeaderModification"],
            route(
                "echo:80",
                &modifiers(|filter| format!("backendRefs: [{{name: echo-v1, port: 80, filters: [{filter}]}}]")),
            ),
            modified(),
        ),
        carried_out(
            "MeshHTTPRouteQueryParamMatching",
            &["MeshHTTPRouteQueryParamMatching"],
            route("echo:80", QUERIES),
            queries(),
        ),
        carried_out(
            "MeshHTTPRouteRedirectPath",
            &["MeshHTTPRouteRedirectPath"],
            route("echo:80", REDIRECT_PATH),
            vec![
                get("/prefix/lemon").redirected(302, "http://echo/other/lemon"),
                get("/whole/path").redirected(302, "http://echo/another"),
                get("/prefix-and-host").redirected(302, "http://example.org/other"),
                get("/prefix-and-status").redirected(301, "http://echo/other"),
                get("/whole-and-host").redirected(302, "http://example.org/another"),
                get("/whole-and-status").redirected(301, "http://echo/another"),
            ],
        ),
        carried_out(
            "MeshHTTPRouteRedirectPort",
            &["MeshHTTPRouteRedirectPort"],
            route("echo:80", REDIRECT_PORT),
            vec![
                get("/port").redirected(302, "http://echo:8083/port"),
                get("/port-and-host").redirected(302, "http://example.org:8083/port-and-host"),
                get("/port-and-status").redirected(301, "http://echo:8083/port-and-status"),
                get("/all-three").redirected(302, "http://example.org:8083/all-three"),
            ],
        ),
        carried_out(
            "MeshHTTPRouteSchemeRedirect",
            &["MeshHTTPRouteSchemeRedirect"],
            route("echo:80", REDIRECT_SCHEME),
            vec![
                get("/scheme").redirected(302, "https://echo/scheme"),
                get("/scheme-and-host").redirected(302, "https://example.org/scheme-and-host"),
                get("/scheme-and-status").redirected(301, "https://echo/scheme-and-status"),
                get("/all-three").redirected(302, "https://example.org/all-three"),
            ],
        ),
        carried_out("MeshHTTPRouteRewritePath", &["MeshHTTPRouteRewritePath"], route("echo:80", REWRITE), rewritten()),
        carried_out(
            "MeshHTTPRouteNamedRule",
            &["MeshHTTPRouteNamedRouteRule"],
            route("echo:80", NAMED),
            vec![get("/named").lands_on("echo-v1"), get("/unnamed").lands_on("echo-v2")],
        ),
        carried_out(
            "MeshFrontend",
            &["HTTPRouteResponseHeaderModification"],
            route("echo-v2", MARKED_V2),
            vec![
                get("/").to("echo-v2").lands_on("echo-v2").returns("x-route", "v2"),
                get("/").to(&format!("{POD}:8080")).lands_on("echo-v2").returns_without("x-route"),
            ],
        ),
        carried_out(
            "MeshFrontendHostname",
            &["MeshClusterIPMatching", "HTTPRouteResponseHeaderModification"],
            route("echo-v2", MARKED_V2),
            vec![
                get("/").to("echo-v2").with("host", "echo-v1").lands_on("echo-v2").returns("x-route", "v2"),
                get("/").to("echo-v1").with("host", "echo-v2").lands_on("echo-v1").returns_without("x-route"),
            ],
        ),
        carried_out(
            "MeshPorts",
            &["HTTPRouteParentRefPort", "HTTPRouteResponseHeaderModification"],
            route("echo-v1:80", MARKED_V1) + &route_in(MESH, "beside", "echo-v2", MARKED_V2),
            vec![
                get("/").to("echo-v1").lands_on("echo-v1").returns("x-route", "v1"),
                get("/").to("echo-v1:8080").lands_on("echo-v1").returns_without("x-route"),
                get("/").to("echo-v2").lands_on("echo-v2").returns("x-route", "v2"),
                get("/").to("echo-v2:8080").lands_on("echo-v2").returns("x-route", "v2"),
            ],
        ),
        carried_out(
            "MeshConsumerRoute",
            &["MeshConsumerRoute", "HTTPRouteResponseHeaderModification"],
            route_in(CONSUMER, "case", "echo-v1", MARKED_BY_CONSUMER),
            vec![
                get("/")
                    .to("echo-v1.gateway-conformance-mesh")
                    .from(CONSUMER)
                    .lands_on("echo-v1")
                    .returns("x-route", "mine"),
                get("/").to("echo-v1.gateway-conformance-mesh").lands_on("echo-v1").returns_without("x-route"),
            ],
        ),
        redirect("MeshHTTPRoute303Redirect", &["HTTPRoute303RedirectStatusCode"], 303),
        redirect("MeshHTTPRoute307Redirect", &["HTTPRoute307RedirectStatusCode"], 307),
        redirect("MeshHTTPRoute308Redirect", &["HTTPRoute308RedirectStatusCode"], 308),
        no_grpc(
            "MeshGRPCRouteWeight",
            grpc_route(GRPC_WEIGHTS),
            vec![call(GRPC_METHOD).shared(&[("echo-v1", 70), ("echo-v2", 30)]).owed(GRPC, 200)],
        ),
        no_grpc("MeshGRPCRouteRequestHeaderModifier", grpc_route(GRPC_MODIFIERS), calls_modified()),
    ]
}

const MATCHING: &str = "
  - matches: [{path: {type: PathPrefix, value: /}}, {headers: [{name: version, value: one}]}]
    backendRefs: [{name: echo-v1, port: 80}]
  - matches: [{path: {type: PathPrefix, value: /v2}}, {headers: [{name: version, value: two}]}]
    backendRefs: [{name: echo-v2, port: 80}]";

fn matching() -> Vec<Vector> {
    vec![
        get("/").lands_on("echo-v1"),
        get("/page").lands_on("echo-v1"),
        get("/").with("version", "one").lands_on("echo-v1"),
        get("/v2").lands_on("echo-v2"),
        get("/v2/page").lands_on("echo-v2"),
        get("/").with("version", "two").lands_on("echo-v2"),
        get("/v2/").lands_on("echo-v2"),
        // A prefix is one of segments.
        get("/v2example").lands_on("echo-v1"),
        get("/foo/v2/example").lands_on("echo-v1"),
    ]
}

/// Rules for five paths; `with` puts a filter where it belongs.
fn modifiers(with: fn(&str) -> String) -> String {
    let several = "set: [{name: X-Set-1, value: set-1}, {name: X-Set-2, value: set-2}], \
                   add: [{name: X-Add-1, value: add-1}, {name: X-Add-2, value: add-2}, {name: X-Add-3, value: add-3}], \
                   remove: [X-Remove-1, X-Remove-2]";
    let any_case = "set: [{name: X-SeT, value: by-route}], add: [{name: x-ADD, value: by-route}], remove: [X-REMOVE]";
    let all = [
        ("/set", "set: [{name: X-Set, value: by-route}]"),
        ("/add", "add: [{name: X-Add, value: by-route}]"),
        ("/remove", "remove: [X-Remove]"),
        ("/several", several),
        ("/any-case", any_case),
    ];
    let rule = |(path, modifier): (&str, &str)| {
        let filter = format!("{{type: RequestHeaderModifier, requestHeaderModifier: {{{modifier}}}}}");
        format!("\n  - {{matches: [{{path: {{value: {path}}}}}], {}}}", with(&filter))
    };
    all.map(rule).concat()
}

fn modified() -> Vec<Vector> {
    let get = |path| get(path).lands_on("echo-v1").arrives_at(path);
    vec![
        get("/set").with("x-other", "kept").arrives_with("x-set", "by-route").arrives_with("x-other", "kept"),
        get("/set")
            .with("x-other", "kept")
            .with("x-set", "mine")
            .arrives_with("x-set", "by-route")
            .arrives_with("x-other", "kept"),
        get("/add").with("x-other", "kept").arrives_with("x-add", "by-route").arrives_with("x-other", "kept"),
        get("/add")
            .with("x-other", "kept")
            .with("x-add", "mine")
            .arrives_with("x-add", "mine,by-route")
            .arrives_with("x-other", "kept"),
        get("/remove").with("x-remove", "mine").arrives_without("x-remove"),
        get("/several")
            .with("x-set-2", "mine")
            .with("x-add-2", "mine")
            .with("x-remove-2", "mine")
            .with("x-other", "kept")
            .arrives_with("x-set-1", "set-1")
            .arrives_with("x-set-2", "set-2")
            .arrives_with("x-add-1", "add-1")
            .arrives_with("x-add-2", "mine,add-2")
            .arrives_with("x-add-3", "add-3")
            .arrives_with("x-other", "kept")
            .arrives_without("x-remove-1")
            .arrives_without("x-remove-2"),
        get("/any-case")
            .with("x-set", "mine")
            .with("x-add", "mine")
            .with("x-remove", "mine")
            .with("x-other", "kept")
            .arrives_with("x-set", "by-route")
            .arrives_with("x-add", "mine,by-route")
            .arrives_with("x-other", "kept")
            .arrives_without("x-remove"),
    ]
}

const REDIRECT_HOST: &str = "
  - matches: [{path: {value: /host}}]
    filters: [{type: RequestRedirect, requestRedirect: {hostname: example.org}}]
  - matches: [{path: {value: /host-and-status}}]
    filters: [{type: RequestRedirect, requestRedirect: {hostname: example.org, statusCode: 301}}]";

const SPLIT: &str = "
  - matches: [{path: {type: Exact, value: /v1}}]
    backendRefs: [{name: echo-v1, port: 80}]
  - matches: [{path: {type: Exact, value: /v2}}]
    backendRefs: [{name: echo-v2, port: 80}]";

const QUERIES: &str = "
  - matches: [{queryParams: [{name: colour, value: red}]}]
    backendRefs: [{name: echo-v1, port: 80}]
  - matches: [{queryParams: [{name: colour, value: blue}]}]
    backendRefs: [{name: echo-v2, port: 80}]
  - matches: [{path: {value: /one}, queryParams: [{name: colour, value: red}]}]
    backendRefs: [{name: echo-v2, port: 80}]
  - matches: [{headers: [{name: version, value: two}], queryParams: [{name: colour, value: red}]}]
    backendRefs: [{name: echo-v2, port: 80}]
  - matches:
      - {path: {value: /three}, queryParams: [{name: colour, value: green}]}
      - {headers: [{name: version, value: four}], queryParams: [{name: colour, value: grey}]}
    backendRefs: [{name: echo-v1, port: 80}]
  - matches: [{path: {value: /five}}]
    backendRefs: [{name: echo-v1, port: 80}]
  - matches: [{queryParams: [{name: colour, value: white}]}]
    backendRefs: [{name: echo-v2, port: 80}]";

fn queries() -> Vec<Vector> {
    vec![
        get("/?colour=red").lands_on("echo-v1"),
        get("/?colour=blue").lands_on("echo-v2"),
        get("/?colour=red&size=9").lands_on("echo-v1"),
        get("/?colour=blue&size=9").lands_on("echo-v2"),
        get("/?size=9").answered(404),
        get("/?colour=yellow").answered(404),
        get("/?colour=redblue").answered(404),
        get("/").answered(404),
        // With a path, with a header.
        get("/one?colour=red").lands_on("echo-v2"),
        get("/?colour=red").with("version", "two").lands_on("echo-v2"),
        // Either of two matches.
        get("/three?colour=green").lands_on("echo-v1"),
        get("/four?colour=grey").with("version", "four").lands_on("echo-v1"),
        // All of what one match asks for.
        get("/?colour=green").answered(404),
        get("/four?colour=grey").answered(404),
        // A path comes before a parameter.
        get("/five?colour=white").lands_on("echo-v1"),
    ]
}

const REDIRECT_PATH: &str = "
  - matches: [{path: {value: /prefix}}]
    filters: [{type: RequestRedirect, requestRedirect: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /other}}}]
  - matches: [{path: {value: /whole}}]
    filters: [{type: RequestRedirect, requestRedirect: {path: {type: ReplaceFullPath, replaceFullPath: /another}}}]
  - matches: [{path: {value: /prefix-and-host}}]
    filters:
      - type: RequestRedirect
        requestRedirect: {hostname: example.org, path: {type: ReplacePrefixMatch, replacePrefixMatch: /other}}
  - matches: [{path: {value: /prefix-and-status}}]
    filters:
      - type: RequestRedirect
        requestRedirect: {statusCode: 301, path: {type: ReplacePrefixMatch, replacePrefixMatch: /other}}
  - matches: [{path: {value: /whole-and-host}}]
    filters:
      - type: RequestRedirect
        requestRedirect: {hostname: example.org, path: {type: ReplaceFullPath, replaceFullPath: /another}}
  - matches: [{path: {value: /whole-and-status}}]
    filters:
      - type: RequestRedirect
        requestRedirect: {statusCode: 301, path: {type: ReplaceFullPath, replaceFullPath: /another}}";

const REDIRECT_PORT: &str = "
  - matches: [{path: {value: /port}}]
    filters: [{type: RequestRedirect, requestRedirect: {port: 8083}}]
  - matches: [{path: {value: /port-and-host}}]
    filters: [{type: RequestRedirect, requestRedirect: {port: 8083, hostname: example.org}}]
  - matches: [{path: {value: /port-and-status}}]
    filters: [{type: RequestRedirect, requestRedirect: {port: 8083, statusCode: 301}}]
  - matches: [{path: {value: /all-three}}]
    filters: [{type: RequestRedirect, requestRedirect: {port: 8083, hostname: example.org, statusCode: 302}}]";

const REDIRECT_SCHEME: &str = "
  - matches: [{path: {value: /scheme}}]
    filters: [{type: RequestRedirect, requestRedirect: {scheme: https}}]
  - matches: [{path: {value: /scheme-and-host}}]
    filters: [{type: RequestRedirect, requestRedirect: {scheme: https, hostname: example.org}}]
  - matches: [{path: {value: /scheme-and-status}}]
    filters: [{type: RequestRedirect, requestRedirect: {scheme: https, statusCode: 301}}]
  - matches: [{path: {value: /all-three}}]
    filters: [{type: RequestRedirect, requestRedirect: {scheme: https, hostname: example.org, statusCode: 302}}]";

const REWRITE: &str = "
  - matches: [{path: {value: /prefix/one}}]
    filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /one}}}]
    backendRefs: [{name: echo-v1, port: 80}]
  - matches: [{path: {value: /strip}}]
    filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /}}}]
    backendRefs: [{name: echo-v1, port: 80}]
  - matches: [{path: {value: /whole/one}}]
    filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath, replaceFullPath: /one}}}]
    backendRefs: [{name: echo-v1, port: 80}]
  - matches: [{path: {value: /whole/and-headers}}]
    filters:
      - {type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath, replaceFullPath: /all}}}
      - &headers
        type: RequestHeaderModifier
        requestHeaderModifier:
          set: [{name: X-Set, value: by-route}]
          add: [{name: X-Add, value: by-route}, {name: X-Append, value: by-route}]
          remove: [X-Remove]
    backendRefs: [{name: echo-v1, port: 80}]
  - matches: [{path: {value: /prefix/and-headers}}]
    filters:
      - {type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /prefix}}}
      - *headers
    backendRefs: [{name: echo-v1, port: 80}]";

fn rewritten() -> Vec<Vector> {
    let with_headers = |path| {
        let sent = get(path).with("x-set", "mine").with("x-append", "mine").with("x-remove", "mine");
        let arrived = sent.arrives_with("x-set", "by-route").arrives_with("x-add", "by-route");
        arrived.arrives_with("x-append", "mine,by-route").arrives_without("x-remove")
    };
    let all = [
        get("/prefix/one/two").arrives_at("/one/two"),
        get("/strip/three").arrives_at("/three"),
        get("/strip").arrives_at("/"),
        get("/whole/one/two").arrives_at("/one"),
        with_headers("/whole/and-headers/test").arrives_at("/all"),
        with_headers("/prefix/and-headers/one").arrives_at("/prefix/one"),
    ];
    all.map(|vector| vector.lands_on("echo-v1")).into()
}

const NAMED: &str = "
  - name: first
    matches: [{path: {value: /named}}]
    backendRefs: [{name: echo-v1, port: 8080}]
  - matches: [{path: {value: /unnamed}}]
    backendRefs: [{name: echo-v2, port: 8080}]";

const MARKED_V1: &str = "
  - filters: [{type: ResponseHeaderModifier, responseHeaderModifier: {set: [{name: X-Route, value: v1}]}}]
    backendRefs: [{name: echo-v1, port: 80}]";

const MARKED_V2: &str = "
  - filters: [{type: ResponseHeaderModifier, responseHeaderModifier: {set: [{name: X-Route, value: v2}]}}]
    backendRefs: [{name: echo-v2, port: 80}]";

const MARKED_BY_CONSUMER: &str = "
  - filters: [{type: ResponseHeaderModifier, responseHeaderModifier: {set: [{name: X-Route, value: mine}]}}]
    backendRefs: [{name: echo-v1, namespace: gateway-conformance-mesh, port: 80}]";

fn redirect(name: &'static str, features: &'static [&'static str], status: u16) -> Case {
    let rules = format!(
        "\n  - matches: [{{path: {{value: /redirect}}}}]\n    \
         filters: [{{type: RequestRedirect, requestRedirect: {{hostname: example.org, statusCode: {status}}}}}]"
    );
    let vectors = vec![get("/redirect").redirected(status, "http://example.org/redirect")];
    Case { name, features, objects: route("echo:80", &rules), said: Said::CarriedOut, vectors }
}

fn grpc_route(rules: &str) -> String {
    route("echo:7070", rules).replace("kind: HTTPRoute", "kind: GRPCRoute")
}

/// The third backend does not exist, and nothing goes there.
const GRPC_WEIGHTS: &str = "
  - backendRefs:
      - {name: echo-v1, port: 7070, weight: 70}
      - {name: echo-v2, port: 7070, weight: 30}
      - {name: nowhere, port: 7070, weight: 0}";

const GRPC_MODIFIERS: &str = "
  - matches: [{method: {service: mesh.lab.Echo, method: Say}, headers: [{name: x-case, value: set}]}]
    filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: X-Set, value: by-route}]}}]
    backendRefs: [{name: echo-v1, port: 7070}]
  - matches: [{method: {service: mesh.lab.Echo, method: Say}, headers: [{name: x-case, value: add}]}]
    filters: [{type: RequestHeaderModifier, requestHeaderModifier: {add: [{name: X-Add, value: by-route}]}}]
    backendRefs: [{name: echo-v1, port: 7070}]
  - matches: [{method: {service: mesh.lab.Echo, method: Say}, headers: [{name: x-case, value: remove}]}]
    filters: [{type: RequestHeaderModifier, requestHeaderModifier: {remove: [X-Remove]}}]
    backendRefs: [{name: echo-v1, port: 7070}]
  - matches: [{method: {service: mesh.lab.Echo, method: Say}, headers: [{name: x-case, value: several}]}]
    filters:
      - type: RequestHeaderModifier
        requestHeaderModifier:
          set: [{name: X-Set-1, value: set-1}, {name: X-Set-2, value: set-2}]
          add: [{name: X-Add-1, value: add-1}, {name: X-Add-2, value: add-2}]
          remove: [X-Remove-1, X-Remove-2]
    backendRefs: [{name: echo-v2, port: 7070}]";

fn calls_modified() -> Vec<Vector> {
    let case = |name| call(GRPC_METHOD).with("x-case", name).arrives_with("x-case", name);
    let several = case("several").with("x-set-2", "mine").with("x-add-2", "mine").with("x-remove-2", "mine");
    let several = several.arrives_with("x-set-1", "set-1").arrives_with("x-set-2", "set-2");
    let several = several.arrives_with("x-add-1", "add-1").arrives_with("x-add-2", "mine,add-2");
    let all = [
        case("set")
            .with("x-set", "mine")
            .with("x-other", "kept")
            .arrives_with("x-set", "by-route")
            .arrives_with("x-other", "kept")
            .lands_on("echo-v1"),
        case("add").with("x-add", "mine").arrives_with("x-add", "mine,by-route").lands_on("echo-v1"),
        case("remove").with("x-remove", "mine").arrives_without("x-remove").lands_on("echo-v1"),
        several.arrives_without("x-remove-1").arrives_without("x-remove-2").lands_on("echo-v2"),
    ];
    all.map(|vector| vector.owed(GRPC, 200)).into()
}
