//! What a waypoint does with requests, seen from the client and from the application.

mod support;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use mesh::hbone::{self, ConnectRequest, H2Settings, TunnelError};
use mesh::identity::CertificateSource;
use mesh::model::{NamespacedHostname, TunnelProtocol};
use mesh::store::Update;
use mesh_proto::waypoint::{self as wire, backend, filter, key_match, route_match, string_match::MatchType};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use support::*;

fn prefix(path: &str) -> wire::RouteMatch {
    wire::RouteMatch { path: Some(route_match::Path::PathPrefix(path.into())), ..Default::default() }
}

fn to(service: &str, weight: u32) -> wire::Backend {
    let service = format!("shop/{service}.shop.svc.cluster.local");
    let target = Some(backend::Target::Service(wire::ServicePort { service, port: u32::from(HTTP) }));
    wire::Backend { weight, target, ..Default::default() }
}

fn route(rules: Vec<wire::RouteRule>) -> wire::Route {
    let parent = wire::Parent { service: "shop/server.shop.svc.cluster.local".into(), port: 0 };
    wire::Route { name: "r".into(), namespace: "shop".into(), parents: vec![parent], rules, ..Default::default() }
}

fn allow_get() -> wire::HttpPolicy {
    let methods = vec![wire::StringMatch { match_type: Some(MatchType::Exact("GET".into())) }];
    let operation = wire::Operation { methods, ..Default::default() };
    wire::HttpPolicy {
        name: "get".into(),
        namespace: "shop".into(),
        action: wire::Action::Allow.into(),
        services: vec!["shop/server.shop.svc.cluster.local".into()],
        rules: vec![wire::HttpRule { to: vec![operation], ..Default::default() }],
        ..Default::default()
    }
}

#[tokio::test]
async fn requests_reach_the_endpoint_with_what_proxies_add() {
    let mesh = Mesh::start().await;
    mesh.serve(&[origin("a").await]);
    let (status, headers, body) =
        mesh.ask(Request::get("/x/../y?q=1").header("x-forwarded-client-cert", "forged")).await;
    assert_eq!((status, body.as_str()), (StatusCode::OK, "a GET /y?q=1 xff=127.0.0.1 id=36 proto=http gone=-"));
    assert!(headers.contains_key("x-envoy-upstream-service-time"));
}

#[tokio::test]
async fn a_split_and_a_header_match_are_kept_to_the_request() {
    let mesh = Mesh::start().await;
    mesh.serve(&[origin("server").await]);
    mesh.backend("v1", origin("v1").await);
    mesh.backend("v2", origin("v2").await);
    let key = wire::KeyMatch { name: "x-version".into(), value: Some(key_match::Value::Exact("v2".into())) };
    let pinned = wire::RouteMatch { headers: vec![key], ..prefix("/") };
    mesh.routes(vec![route(vec![
        wire::RouteRule {
            matches: vec![prefix("/")],
            backends: vec![to("v1", 90), to("v2", 10)],
            ..Default::default()
        },
        wire::RouteRule { matches: vec![pinned], backends: vec![to("v2", 1)], ..Default::default() },
    ])]);
    let mut seen: BTreeMap<String, u32> = BTreeMap::new();
    for _ in 0..100 {
        let (_, _, body) = mesh.get("/").await;
        *seen.entry(body.split(' ').next().unwrap_or_default().to_owned()).or_default() += 1;
    }
    assert!((89..=91).contains(&seen["v1"]) && seen["v1"] + seen["v2"] == 100, "{seen:?}");
    for _ in 0..5 {
        assert!(mesh.ask(Request::get("/").header("x-version", "v2")).await.2.starts_with("v2 "));
    }
}

#[tokio::test]
async fn policy_answers_403_with_envoys_body_and_grpc_status_7() {
    let mesh = Mesh::start().await;
    mesh.serve(&[origin("a").await]);
    mesh.policies(vec![allow_get()]);
    assert_eq!(mesh.get("/").await.0, StatusCode::OK);
    let (status, headers, body) = mesh.ask(Request::post("/")).await;
    assert_eq!((status, body.as_str()), (StatusCode::FORBIDDEN, "RBAC: access denied"));
    assert_eq!(headers["content-length"], "19");
    let (status, headers, _) = mesh.ask(Request::post("/").header("content-type", "application/grpc")).await;
    assert_eq!((status, &headers["grpc-status"]), (StatusCode::OK, &"7".parse().expect("value")));
}

#[tokio::test]
async fn a_policy_that_cannot_be_read_closes_its_service() {
    let mesh = Mesh::start().await;
    mesh.serve(&[origin("a").await]);
    let bad = wire::HttpPolicy { action: 9, ..allow_get() };
    let mut batch = mesh.world.policy_handler().begin();
    batch.update(&"AuthorizationPolicy/shop/get".into(), &bad.encode_to_vec());
    assert_eq!(batch.apply(vec![]).len(), 1);
    assert_eq!(mesh.get("/").await.0, StatusCode::FORBIDDEN);
}

#[tokio::test]
async fn routing_failures_have_their_own_status() {
    let mesh = Mesh::start().await;
    mesh.serve(&[]);
    let (status, _, body) = mesh.get("/").await;
    assert_eq!((status, body.as_str()), (StatusCode::SERVICE_UNAVAILABLE, "no healthy upstream"));
    let invalid =
        wire::Backend { weight: 1, target: Some(backend::Target::Invalid("gone".into())), ..Default::default() };
    let redirect = wire::Redirect { scheme: "https".into(), status: 301, ..Default::default() };
    let redirect = wire::Filter { filter: Some(filter::Filter::Redirect(redirect)) };
    let timeout = Some(prost_types::Duration { seconds: 0, nanos: 200_000_000 });
    mesh.backend("slow", origin("slow").await);
    mesh.routes(vec![route(vec![
        wire::RouteRule { matches: vec![prefix("/invalid")], backends: vec![invalid], ..Default::default() },
        wire::RouteRule { matches: vec![prefix("/moved")], filters: vec![redirect], ..Default::default() },
        wire::RouteRule {
            matches: vec![prefix("/never")],
            backends: vec![to("slow", 1)],
            request_timeout: timeout,
            ..Default::default()
        },
    ])]);
    assert_eq!(mesh.get("/invalid").await.0, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(mesh.get("/nothing").await.0, StatusCode::NOT_FOUND);
    let (status, headers, _) = mesh.get("/moved").await;
    assert_eq!(
        (status, &headers["location"]),
        (StatusCode::MOVED_PERMANENTLY, &"https://server/moved".parse().expect("value"))
    );
    let (status, _, body) = mesh.get("/never").await;
    assert_eq!((status, body.as_str()), (StatusCode::GATEWAY_TIMEOUT, "upstream request timeout"));
}

#[tokio::test]
async fn an_endpoint_that_refuses_is_passed_over_and_kept_connections_may_have_closed() {
    let mesh = Mesh::start().await;
    let gone = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("listener");
    let refused = gone.local_addr().expect("address");
    drop(gone);
    mesh.serve(&[refused, origin("a").await]);
    for _ in 0..6 {
        assert_eq!(mesh.ask(Request::get("/").header("x-close", "1")).await.0, StatusCode::OK);
    }
}

#[tokio::test]
async fn only_bound_services_are_forwarded_to() {
    let mesh = Mesh::start().await;
    mesh.serve(&[origin("a").await]);
    mesh.backend("unbound", origin("b").await);
    // Together: each is given a moment in which the control plane might yet bind it.
    let asked = ["10.96.0.77:80", "127.0.0.1:15000", "192.0.2.1:80", "10.96.0.1:81"].map(|authority| {
        let mesh = &mesh;
        async move { (authority, mesh.connect(authority).await) }
    });
    for (authority, outcome) in futures_util::future::join_all(asked).await {
        match outcome {
            Err(TunnelError::Status(StatusCode::NOT_FOUND)) => {}
            other => panic!("{authority}: {:?}", other.map(drop)),
        }
    }
}

#[tokio::test]
async fn tcp_and_undeclared_ports_pass_bytes_and_websockets_switch() {
    let mesh = Mesh::start().await;
    let echo = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("listener");
    mesh.serve(&[echo.local_addr().expect("address")]);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = echo.accept().await {
            tokio::spawn(async move {
                let (mut r, mut w) = stream.split();
                let _ = tokio::io::copy(&mut r, &mut w).await;
            });
        }
    });
    for port in [TCP, AUTO] {
        let mut stream = mesh.tunnel(port).await;
        stream.write_all(b"\x00bytes").await.expect("write");
        stream.shutdown().await.expect("half close");
        let mut back = Vec::new();
        stream.read_to_end(&mut back).await.expect("read");
        assert_eq!(back, b"\x00bytes", "port {port}");
    }
    let mesh = Mesh::start().await;
    mesh.serve(&[origin("ws").await]);
    let mut stream = mesh.tunnel(HTTP).await;
    let handshake = b"GET /ws HTTP/1.1\r\nhost: server\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\nping";
    stream.write_all(handshake).await.expect("write");
    let mut back = Vec::new();
    stream.read_to_end(&mut back).await.expect("read");
    let text = String::from_utf8_lossy(&back);
    assert!(text.starts_with("HTTP/1.1 101 ") && text.ends_with("\r\n\r\nping"), "{text}");
}

#[tokio::test]
async fn http2_requests_are_balanced_one_by_one() {
    let mesh = Mesh::start().await;
    mesh.serve(&[origin("a").await, origin("b").await]);
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(mesh.tunnel(GRPC).await))
            .await
            .expect("handshake");
    tokio::spawn(connection);
    let mut seen: BTreeMap<String, u32> = BTreeMap::new();
    for _ in 0..10 {
        let request = Request::builder()
            .method(Method::POST)
            .uri("http://server/pkg.Service/Method")
            .body(Full::<Bytes>::default())
            .expect("request");
        let (status, _, body) = read(sender.send_request(request).await.expect("response")).await;
        assert_eq!(status, StatusCode::OK);
        *seen.entry(body.split(' ').next().unwrap_or_default().to_owned()).or_default() += 1;
    }
    assert_eq!(seen.values().copied().collect::<Vec<_>>(), [5, 5], "{seen:?}");
}

#[tokio::test]
async fn an_endpoint_with_a_tunnel_is_reached_by_hbone_as_the_waypoint() {
    let mesh = Mesh::start().await;
    // Stands for the node proxy of the endpoint: it must be dialled on 15008 and asked for the pod's own port.
    let pod: SocketAddr = "127.0.0.7:8080".parse().expect("address");
    let listener = TcpListener::bind(SocketAddr::new(pod.ip(), hbone::HBONE_PORT)).await.expect("listener");
    let certificate = mesh.ca.fetch(&identity("server")).await.expect("certificate");
    let drain = mesh.drain.clone();
    tokio::spawn(async move {
        while let Ok((stream, peer)) = listener.accept().await {
            let (tls, peer) = mesh::tls::accept(&certificate, stream, peer).await.expect("mTLS");
            let handler = |request: ConnectRequest| async move {
                assert_eq!(request.authority.to_string(), "127.0.0.7:8080");
                assert_eq!(request.peer.identity(), &identity("waypoint"));
                let stream = request.accept(None).expect("accepted");
                let service =
                    service_fn(|_| async { Ok::<_, Infallible>(Response::new(Full::new(Bytes::from("tunnelled")))) });
                let _ = auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
            };
            tokio::spawn(hbone::serve(tls, peer, H2Settings::default(), drain.clone(), handler));
        }
    });
    mesh.serve(&[]);
    let key = NamespacedHostname::new("shop", "server.shop.svc.cluster.local");
    let workload = endpoint(&key, 0, pod).with(|w| w.protocol = TunnelProtocol::Hbone);
    mesh.store.apply(Update::new().workload(workload));
    let (status, _, body) = mesh.get("/").await;
    assert_eq!((status, body.as_str()), (StatusCode::OK, "tunnelled"));
}

#[tokio::test]
async fn the_metrics_name_client_route_and_pod() {
    let mesh = Mesh::start().await;
    mesh.serve(&[origin("a").await]);
    mesh.get("/").await;
    let text = mesh::telemetry::metrics_handle().render();
    let line = text
        .lines()
        .find(|l| l.starts_with("istio_requests_total") && l.contains("response_code=\"200\""))
        .unwrap_or_else(|| panic!("no metric in {text}"));
    for part in [
        "reporter=\"waypoint\"",
        "source_principal=\"spiffe://cluster.local/ns/shop/sa/client\"",
        "destination_service=\"server.shop.svc.cluster.local\"",
        "connection_security_policy=\"mutual_tls\"",
    ] {
        assert!(line.contains(part), "{part} in {line}");
    }
    assert!(text.contains("istio_request_duration_milliseconds_bucket"));
}
