//! What the suite asks of gateways only and a mesh owes as well, each with a Service as parent.

use mesh_tests::echo::How;

use super::{CONSUMER, Case, KEY, Said, Vector, get, route};

const RETRY: &str = "no retries by a route yet";
const MIRROR: &str = "no mirrors yet";
const CORS: &str = "no CORS yet";

/// What the consumer's copy of the server is called from the namespace of the mesh.
const ELSEWHERE: &str = "echo-v1.gateway-conformance-mesh-consumer";

pub fn cases() -> Vec<Case> {
    let case =
        |name, features, said, rules, vectors| Case { name, features, objects: route("echo:80", rules), said, vectors };
    vec![
        case("timeouts of requests", &["HTTPRouteRequestTimeout"], Said::CarriedOut, REQUEST_TIMEOUT, timed()),
        case("timeouts of tries", &["HTTPRouteBackendTimeout"], Said::CarriedOut, BACKEND_TIMEOUT, timed()),
        case("retries", &["HTTPRouteRetry"], Said::Refused(&["rules[0].retry", "not supported"]), RETRIES, retried()),
        case(
            "retries of tries that take too long",
            &["HTTPRouteRetryBackendTimeout"],
            Said::Refused(&["rules[0].retry", "not supported"]),
            RETRY_SLOW,
            vec![get(&format!("/?key={KEY}&times=1&delay=2000")).lands_on("echo-v1").seen(2).owed(RETRY, 500)],
        ),
        case(
            "retries of connections that fail",
            &["HTTPRouteRetryConnectionError"],
            Said::Refused(&["rules[0].retry", "not supported"]),
            RETRY_CONNECTION,
            vec![get("/").times(10).lands_on("echo-v2").owed(RETRY, 500)],
        ),
        case(
            "a mirror",
            &["HTTPRouteRequestMirror"],
            Said::Refused(&["rules[0].filters[0]", "RequestMirror", "not supported"]),
            MIRROR_ONE,
            vec![get(&format!("/?key={KEY}")).lands_on("echo-v1").counted("echo-v2", 3..=3).owed(MIRROR, 500)],
        ),
        case(
            "several mirrors",
            &["HTTPRouteRequestMultipleMirrors"],
            Said::Refused(&["rules[0].filters[0]", "rules[0].filters[1]", "RequestMirror", "not supported"]),
            MIRROR_TWO,
            vec![
                get(&format!("/?key={KEY}"))
                    .lands_on("echo-v1")
                    .counted("echo-v2", 3..=3)
                    .counted(ELSEWHERE, 3..=3)
                    .owed(MIRROR, 500),
            ],
        ),
        case(
            "mirrors of a part",
            &["HTTPRouteRequestPercentageMirror"],
            Said::Refused(&["rules[0].filters[0]", "RequestMirror", "not supported"]),
            MIRROR_PART,
            vec![
                mirrored_in_part("/percent").counted("echo-v2", 35..=65).owed(MIRROR, 500),
                mirrored_in_part("/fraction").counted("echo-v2", 15..=45).owed(MIRROR, 500),
            ],
        ),
        case(
            "CORS",
            &["HTTPRouteCORS"],
            Said::Refused(&["rules[0].filters[0]", "CORS", "not supported"]),
            CORS_RULE,
            cors(),
        ),
        case(
            "rewritten hosts",
            &["HTTPRouteHostRewrite"],
            Said::CarriedOut,
            REWRITE_HOST,
            vec![
                get("/one").lands_on("echo-v1").arrives_for("one.example.org").arrives_at("/one"),
                get("/two").lands_on("echo-v2").arrives_for("two.example.org").arrives_with("x-set", "by-route"),
            ],
        ),
        case(
            "rewritten paths",
            &["HTTPRoutePathRewrite"],
            Said::CarriedOut,
            REWRITE_PATH,
            vec![
                get("/strip/one?a=b").lands_on("echo-v1").arrives_at("/one?a=b"),
                get("/whole/one?a=b").lands_on("echo-v1").arrives_at("/new?a=b"),
            ],
        ),
        case("methods", &["HTTPRouteMethodMatching"], Said::CarriedOut, METHODS, methods()),
        case(
            "backends that speak HTTP/2 in clear",
            &["HTTPRouteBackendProtocolH2C"],
            Said::CarriedOut,
            "\n  - backendRefs: [{name: protocols, port: 8081}]",
            vec![
                get("/").lands_on("echo-v1").arrives_by("HTTP/2.0").arrives_for("echo"),
                get("/").how(How::Http2).lands_on("echo-v1").arrives_by("HTTP/2.0").arrives_for("echo"),
            ],
        ),
        case(
            "backends that speak WebSocket",
            &["HTTPRouteBackendProtocolWebSocket"],
            Said::CarriedOut,
            "\n  - backendRefs: [{name: protocols, port: 8082}]",
            vec![get("/chat").how(How::WebSocket).answered(101).lands_on("echo-v1").arrives_at("/chat")],
        ),
        case(
            "named rules",
            &["HTTPRouteNamedRouteRule"],
            Said::CarriedOut,
            NAMED,
            vec![get("/one").lands_on("echo-v1"), get("/two").lands_on("echo-v2")],
        ),
        case(
            "backends that do not exist",
            &["HTTPRoute"],
            Said::Unresolved(&["rules[0].backendRefs[1]", "nowhere", "rules[1].backendRefs[0]", "no port 81"]),
            MISSING,
            vec![
                get("/half").shared(&[("echo-v1", 50), ("500", 50)]),
                get("/port").answered(500),
                get("/good").lands_on("echo-v2"),
            ],
        ),
        case(
            "backends of a kind that is none",
            &["HTTPRoute"],
            Said::Unresolved(&["rules[0].backendRefs[0]", "Teapot", "not supported"]),
            UNKNOWN_KIND,
            vec![get("/tea").answered(500), get("/good").lands_on("echo-v2")],
        ),
        case(
            "rules that lead nowhere",
            &["HTTPRoute"],
            Said::CarriedOut,
            NOWHERE,
            vec![get("/none").answered(500), get("/zero").answered(500), get("/good").lands_on("echo-v1")],
        ),
        case(
            "backends in another namespace",
            &["HTTPRoute"],
            Said::CarriedOut,
            "\n  - backendRefs: [{name: echo-v1, namespace: gateway-conformance-mesh-consumer, port: 80}]",
            vec![get("/").lands_in(CONSUMER, "echo-v1")],
        ),
    ]
}

const REQUEST_TIMEOUT: &str = "
  - matches: [{path: {value: /timed}}]
    timeouts: {request: 300ms}
    backendRefs: [{name: echo-v1, port: 80}]
  - matches: [{path: {value: /untimed}}]
    timeouts: {request: 0s}
    backendRefs: [{name: echo-v1, port: 80}]";

const BACKEND_TIMEOUT: &str = "
  - matches: [{path: {value: /timed}}]
    timeouts: {request: 4s, backendRequest: 300ms}
    backendRefs: [{name: echo-v1, port: 80}]
  - matches: [{path: {value: /untimed}}]
    timeouts: {backendRequest: 0s}
    backendRefs: [{name: echo-v1, port: 80}]";

fn timed() -> Vec<Vector> {
    vec![
        get("/timed").lands_on("echo-v1"),
        get("/timed?delay=2000").answered(504).takes(300),
        get("/untimed?delay=500").lands_on("echo-v1").takes(500),
    ]
}

const RETRIES: &str = "
  - matches: [{path: {value: /codes}}]
    retry: {codes: [500, 502, 503, 504], attempts: 1}
    backendRefs: [{name: echo-v1, port: 80}]
  - matches: [{path: {value: /attempts}}]
    retry: {codes: [503], attempts: 3}
    backendRefs: [{name: echo-v1, port: 80}]
  - matches: [{path: {value: /backoff}}]
    retry: {codes: [503], attempts: 2, backoff: 200ms}
    backendRefs: [{name: echo-v1, port: 80}]";

fn retried() -> Vec<Vector> {
    let failing = |path: &str, status: u16, times: u32| get(&format!("{path}?key={KEY}&fail={status}&times={times}"));
    vec![
        failing("/codes", 500, 1).lands_on("echo-v1").seen(2).owed(RETRY, 500),
        failing("/codes", 502, 1).lands_on("echo-v1").seen(2).owed(RETRY, 500),
        failing("/codes", 503, 1).lands_on("echo-v1").seen(2).owed(RETRY, 500),
        failing("/codes", 504, 1).lands_on("echo-v1").seen(2).owed(RETRY, 500),
        // Another status, and more failures than tries, come back as they are.
        failing("/codes", 501, 1).answered(501).seen(1).owed(RETRY, 500),
        failing("/codes", 503, 2).answered(503).seen(2).owed(RETRY, 500),
        failing("/attempts", 503, 3).lands_on("echo-v1").seen(4).owed(RETRY, 500),
        failing("/backoff", 503, 2).lands_on("echo-v1").seen(3).takes(400).owed(RETRY, 500),
    ]
}

const RETRY_SLOW: &str = "
  - timeouts: {request: 4s, backendRequest: 300ms}
    retry: {attempts: 2}
    backendRefs: [{name: echo-v1, port: 80}]";

const RETRY_CONNECTION: &str = "
  - retry: {attempts: 2}
    backendRefs: [{name: half, port: 80}]";

const MIRROR_ONE: &str = "
  - filters: [{type: RequestMirror, requestMirror: {backendRef: {name: echo-v2, port: 80}}}]
    backendRefs: [{name: echo-v1, port: 80}]";

const MIRROR_TWO: &str = "
  - filters:
      - {type: RequestMirror, requestMirror: {backendRef: {name: echo-v2, port: 80}}}
      - type: RequestMirror
        requestMirror: {backendRef: {name: echo-v1, namespace: gateway-conformance-mesh-consumer, port: 80}}
    backendRefs: [{name: echo-v1, port: 80}]";

const MIRROR_PART: &str = "
  - matches: [{path: {value: /percent}}]
    filters: [{type: RequestMirror, requestMirror: {percent: 50, backendRef: {name: echo-v2, port: 80}}}]
    backendRefs: [{name: echo-v1, port: 80}]
  - matches: [{path: {value: /fraction}}]
    filters:
      - type: RequestMirror
        requestMirror: {fraction: {numerator: 3, denominator: 10}, backendRef: {name: echo-v2, port: 80}}
    backendRefs: [{name: echo-v1, port: 80}]";

fn mirrored_in_part(path: &str) -> Vector {
    get(&format!("{path}?key={KEY}")).times(100).lands_on("echo-v1")
}

const CORS_RULE: &str = "
  - filters:
      - type: CORS
        cors:
          allowOrigins: ['https://www.example.com', 'https://*.example.org']
          allowMethods: [GET, PUT]
          allowHeaders: [x-one, x-two]
          exposeHeaders: [x-three]
          maxAge: 600
          allowCredentials: true
    backendRefs: [{name: echo-v1, port: 80}]";

fn cors() -> Vec<Vector> {
    let preflight = |origin: &str| {
        let asked = get("/").method("OPTIONS").with("origin", origin);
        let asked = asked.with("access-control-request-method", "PUT");
        asked.with("access-control-request-headers", "x-one").or(204)
    };
    let vectors = vec![
        preflight("https://www.example.com")
            .returns("access-control-allow-origin", "https://www.example.com")
            .returns("access-control-allow-credentials", "true")
            .returns("access-control-max-age", "600"),
        preflight("https://any.example.org").returns("access-control-allow-origin", "https://any.example.org"),
        preflight("https://other.example.net").returns_without("access-control-allow-origin"),
        get("/")
            .with("origin", "https://www.example.com")
            .lands_on("echo-v1")
            .returns("access-control-allow-origin", "https://www.example.com")
            .returns("access-control-expose-headers", "x-three"),
        get("/")
            .with("origin", "https://other.example.net")
            .lands_on("echo-v1")
            .returns_without("access-control-allow-origin"),
    ];
    vectors.into_iter().map(|vector| vector.owed(CORS, 500)).collect()
}

const REWRITE_HOST: &str = "
  - matches: [{path: {value: /one}}]
    filters: [{type: URLRewrite, urlRewrite: {hostname: one.example.org}}]
    backendRefs: [{name: echo-v1, port: 80}]
  - matches: [{path: {value: /two}}]
    filters:
      - {type: URLRewrite, urlRewrite: {hostname: two.example.org}}
      - {type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: X-Set, value: by-route}]}}
    backendRefs: [{name: echo-v2, port: 80}]";

const REWRITE_PATH: &str = "
  - matches: [{path: {value: /strip}}]
    filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /}}}]
    backendRefs: [{name: echo-v1, port: 80}]
  - matches: [{path: {value: /whole}}]
    filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath, replaceFullPath: /new}}}]
    backendRefs: [{name: echo-v1, port: 80}]";

const METHODS: &str = "
  - matches: [{method: POST}]
    backendRefs: [{name: echo-v1, port: 80}]
  - matches: [{method: GET}]
    backendRefs: [{name: echo-v2, port: 80}]
  - matches: [{path: {value: /one}, method: PUT}]
    backendRefs: [{name: echo-v1, port: 80}]
  - matches: [{headers: [{name: version, value: two}], method: PUT}]
    backendRefs: [{name: echo-v2, port: 80}]
  - matches: [{path: {value: /two}}]
    backendRefs: [{name: echo-v1, port: 80}]
  - matches: [{headers: [{name: version, value: three}]}]
    backendRefs: [{name: echo-v1, port: 80}]";

fn methods() -> Vec<Vector> {
    vec![
        get("/").method("POST").lands_on("echo-v1"),
        get("/").lands_on("echo-v2"),
        get("/").method("HEAD").answered(404),
        // With a path, with a header.
        get("/one").method("PUT").lands_on("echo-v1"),
        get("/").method("PUT").with("version", "two").lands_on("echo-v2"),
        get("/").method("PUT").answered(404),
        // A path comes before a method, and that before headers.
        get("/two").lands_on("echo-v1"),
        get("/").with("version", "three").lands_on("echo-v2"),
    ]
}

const NAMED: &str = "
  - name: first
    matches: [{path: {value: /one}}]
    backendRefs: [{name: echo-v1, port: 80}]
  - name: second
    matches: [{path: {value: /two}}]
    backendRefs: [{name: echo-v2, port: 80}]";

const MISSING: &str = "
  - matches: [{path: {value: /half}}]
    backendRefs: [{name: echo-v1, port: 80, weight: 1}, {name: nowhere, port: 80, weight: 1}]
  - matches: [{path: {value: /port}}]
    backendRefs: [{name: echo-v1, port: 81}]
  - matches: [{path: {value: /good}}]
    backendRefs: [{name: echo-v2, port: 80}]";

const UNKNOWN_KIND: &str = "
  - matches: [{path: {value: /tea}}]
    backendRefs: [{group: kitchen.example, kind: Teapot, name: blue, port: 80}]
  - matches: [{path: {value: /good}}]
    backendRefs: [{name: echo-v2, port: 80}]";

const NOWHERE: &str = "
  - matches: [{path: {value: /none}}]
  - matches: [{path: {value: /zero}}]
    backendRefs: [{name: echo-v1, port: 80, weight: 0}, {name: echo-v2, port: 80, weight: 0}]
  - matches: [{path: {value: /good}}]
    backendRefs: [{name: echo-v1, port: 80}]";
