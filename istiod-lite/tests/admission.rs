//! Admission as an API server meets it: a real control plane on its own API, HTTPS by the roots that it hands out, and the
//! questions that kube-apiserver asks.

mod standalone_support;

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Body, Frame, Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo};
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use serde_json::{Value, json};
use standalone_support::{Beside, Server, eventually_async};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

const SERVER_NAME: &str = "istiod.istio-system.svc";
const CONFIGURATION: &str = "istiod-validator";

fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address")
}

struct Mesh {
    client: kube::Client,
    webhook: SocketAddr,
    roots: String,
    _server: Server,
}

impl Mesh {
    async fn start() -> Self {
        let webhook = free_address();
        let settings = ["ISTIOD_GRPC_ADDR", "ISTIOD_MONITORING_ADDR"].map(|name| (name, "127.0.0.1:0".to_owned()));
        let settings = settings.into_iter().chain([("ISTIOD_WEBHOOK_ADDR", webhook.to_string())]).collect();
        let server = Server::start_beside(&Beside::ControlPlane(settings));
        let client = server.client().await;
        let namespace: Namespace =
            serde_json::from_value(json!({"metadata": {"name": "istio-system"}})).expect("a Namespace");
        let namespaces: Api<Namespace> = Api::all(client.clone());
        namespaces.create(&PostParams::default(), &namespace).await.expect("istio-system");
        let config_maps: Api<ConfigMap> = Api::namespaced(client.clone(), "istio-system");
        let roots = eventually_async("the root certificates", async || {
            config_maps.get("istio-ca-root-cert").await.ok()?.data?.remove("root-cert.pem")
        });
        Self { roots: roots.await, client, webhook, _server: server }
    }

    async fn connect(&self, protocol: &[u8]) -> TlsStream<TcpStream> {
        let mut trusted = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(self.roots.as_bytes()) {
            trusted.add(certificate.expect("PEM")).expect("a root");
        }
        let mut config = rustls::ClientConfig::builder().with_root_certificates(trusted).with_no_client_auth();
        config.alpn_protocols = vec![protocol.to_vec()];
        let stream = TcpStream::connect(self.webhook).await.expect("the webhook's port");
        let name = ServerName::try_from(SERVER_NAME).expect("a name");
        let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.expect("TLS by the mesh's roots");
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(protocol));
        stream
    }

    async fn send<B>(&self, protocol: &[u8], mut request: Request<B>) -> Response<Incoming>
    where
        B: Body<Data = Bytes, Error = std::convert::Infallible> + Send + Unpin + 'static,
    {
        let stream = TokioIo::new(self.connect(protocol).await);
        if protocol == b"h2" {
            request.headers_mut().remove(header::HOST);
            let (mut sender, connection) =
                hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await.expect("HTTP/2");
            tokio::spawn(connection);
            return sender.send_request(request).await.expect("an answer");
        }
        let path = request.uri().path_and_query().cloned().expect("a path");
        *request.uri_mut() = path.into();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await.expect("HTTP/1.1");
        tokio::spawn(connection);
        sender.send_request(request).await.expect("an answer")
    }

    /// As kube-apiserver does, down to the query.
    async fn ask(&self, protocol: &[u8], review: &Value) -> Value {
        let request = post("/validate?timeout=5s", review.to_string());
        let response = self.send(protocol, request).await;
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()[header::CONTENT_TYPE], "application/json");
        let body = response.into_body().collect().await.expect("a body").to_bytes();
        serde_json::from_slice(&body).expect("an AdmissionReview")
    }

    async fn status(&self, request: Request<Full<Bytes>>) -> u16 {
        self.send(b"http/1.1", request).await.status().as_u16()
    }
}

fn post(path: &str, body: String) -> Request<Full<Bytes>> {
    Request::builder()
        .method(Method::POST)
        .uri(format!("https://{SERVER_NAME}{path}"))
        .header(header::HOST, format!("{SERVER_NAME}:443"))
        .header(header::ACCEPT, "application/json, */*")
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::CONTENT_LENGTH, body.len())
        .header(header::USER_AGENT, "kube-apiserver-admission")
        .body(Full::new(Bytes::from(body)))
        .expect("a request")
}

/// About an AuthorizationPolicy of namespace `shop`.
fn review(uid: &str, spec: Value) -> Value {
    let kind = json!({"group": "security.istio.io", "version": "v1", "kind": "AuthorizationPolicy"});
    let resource = json!({"group": "security.istio.io", "version": "v1", "resource": "authorizationpolicies"});
    json!({
        "kind": "AdmissionReview",
        "apiVersion": "admission.k8s.io/v1",
        "request": {
            "uid": uid,
            "kind": kind, "resource": resource, "requestKind": kind, "requestResource": resource,
            "name": "p", "namespace": "shop", "operation": "CREATE",
            "userInfo": {"username": "kubernetes-admin", "groups": ["system:masters", "system:authenticated"]},
            "object": {
                "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
                "metadata": {"name": "p", "namespace": "shop", "creationTimestamp": "2026-11-27T00:00:00Z", "uid": "u"},
                "spec": spec,
            },
            "oldObject": null,
            "dryRun": true,
            "options": {"kind": "CreateOptions", "apiVersion": "meta.k8s.io/v1", "fieldManager": "kubectl-create"},
        },
    })
}

fn configuration() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../manifests/install.yaml");
    let text = std::fs::read_to_string(path).expect("install.yaml");
    let documents = text.split("\n---\n").map(|document| serde_saphyr::from_str::<Value>(document).expect("YAML"));
    documents.into_iter().find(|object| object["kind"] == "ValidatingWebhookConfiguration").expect("a configuration")
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_is_answered_over_both_versions_of_http() {
    let mesh = Mesh::start().await;
    for protocol in [&b"h2"[..], b"http/1.1"] {
        let spec = json!({"rules": [{"from": [{"source": {"ipBlocks": ["10.0.0/8"]}}]}]});
        let bad = mesh.ask(protocol, &review("u-bad", spec)).await;
        assert_eq!((&bad["kind"], &bad["apiVersion"]), (&json!("AdmissionReview"), &json!("admission.k8s.io/v1")));
        let response = &bad["response"];
        assert_eq!((&response["uid"], &response["allowed"]), (&json!("u-bad"), &json!(false)), "{bad}");
        assert_eq!((&response["status"]["code"], &response["status"]["reason"]), (&json!(422), &json!("Invalid")));
        let message = "spec.rules[0].from[0].source.ipBlocks: \"10.0.0/8\": neither an address nor a CIDR; \
                       write it as 10.0.0.0/8.";
        assert_eq!(response["status"]["message"], message);

        let good = mesh.ask(protocol, &review("u-good", json!({"rules": [{}]}))).await;
        assert_eq!(good["response"], json!({"uid": "u-good", "allowed": true}));
    }
    // Once all kinds are listed, what is missing is known to be.
    let spec = json!({"targetRefs": [{"group": "", "kind": "Service", "name": "wbe"}]});
    let warned = eventually_async("a warning", async || {
        let answer = mesh.ask(b"h2", &review("u-warned", spec.clone())).await;
        assert_eq!(answer["response"]["allowed"], true, "{answer}");
        answer["response"]["warnings"].as_array().cloned()
    });
    let expected = "AuthorizationPolicy shop/p: targetRefs: Service shop/wbe does not exist";
    assert_eq!(warned.await, [json!(expected)]);
    // Where Istio's CRD is in the cluster: nothing carries it out, and where the keys are may not be just anywhere.
    let keys = json!({"jwtRules": [{"issuer": "shop", "jwksUri": "http://169.254.169.254/latest/meta-data"}]});
    let mut authentication = review("u-keys", keys);
    for part in ["kind", "object"] {
        authentication["request"][part]["kind"] = "RequestAuthentication".into();
    }
    let refused = &mesh.ask(b"h2", &authentication).await["response"];
    assert_eq!(refused["allowed"], false, "{refused}");
    let message = refused["status"]["message"].as_str().expect("a message");
    assert!(message.starts_with("spec.jwtRules[0].jwksUri: ") && message.contains("is link-local"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_question_costs_little_and_harms_nobody() {
    let mesh = Mesh::start().await;
    let of = |method: Method, path: &str| {
        let request = Request::builder().method(method).uri(path).header(header::HOST, SERVER_NAME);
        request.body(Full::new(Bytes::new())).expect("a request")
    };
    assert_eq!(mesh.status(of(Method::GET, "/validate")).await, 405);
    assert_eq!(mesh.status(of(Method::POST, "/mutate")).await, 404);
    assert_eq!(mesh.status(of(Method::POST, "/validate")).await, 415);
    assert_eq!(mesh.status(post("/validate", "{".into())).await, 400);
    assert_eq!(mesh.status(post("/validate", r#"{"kind": "Pod", "apiVersion": "v1"}"#.into())).await, 400);
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    assert_eq!(mesh.status(post("/validate", deep)).await, 400);
    let many = format!("[{}0]", "0,".repeat(1_000_000));
    assert_eq!(mesh.status(post("/validate", many)).await, 413);

    // Refused by its head, whatever would follow.
    let head = |length: &str| {
        format!("POST /validate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{length}\r\n\r\n")
    };
    for (length, status) in [("Content-Length: 8000000", "413"), ("Transfer-Encoding: chunked", "411")] {
        let mut stream = mesh.connect(b"http/1.1").await;
        stream.write_all(head(length).as_bytes()).await.expect("a head");
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).await.expect("an answer");
        assert_eq!(std::str::from_utf8(&answer), Ok(&*format!("HTTP/1.1 {status}")));
    }
    // Over HTTP/2 a body may come without a length too.
    let frames = futures_util::stream::iter([Ok::<_, std::convert::Infallible>(Frame::data(Bytes::from("{}")))]);
    let (parts, _) = post("/validate", "{}".into()).into_parts();
    let mut request = Request::from_parts(parts, StreamBody::new(frames));
    request.headers_mut().remove(header::CONTENT_LENGTH);
    assert_eq!(mesh.send(b"h2", request).await.status(), StatusCode::LENGTH_REQUIRED);

    // Who speaks no TLS hears nothing of HTTP.
    let mut plain = TcpStream::connect(mesh.webhook).await.expect("the port");
    plain.write_all(head("Content-Length: 2").as_bytes()).await.expect("a head");
    let mut answer = Vec::new();
    // An error, a reset say, is an end as well.
    let _ = plain.read_to_end(&mut answer).await;
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");

    let good = mesh.ask(b"http/1.1", &review("u", json!({}))).await;
    assert_eq!(good["response"]["allowed"], true);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_server_is_told_the_roots_and_nothing_else_is_written() {
    let mesh = Mesh::start().await;
    let api: Api<ValidatingWebhookConfiguration> = Api::all(mesh.client.clone());
    let bundle = |found: &ValidatingWebhookConfiguration| {
        let webhook = &found.webhooks.as_ref().expect("webhooks")[0];
        webhook.client_config.ca_bundle.as_ref().map(|bundle| String::from_utf8(bundle.0.clone()).expect("PEM"))
    };
    let trusted = async || {
        eventually_async("the roots in caBundle", async || {
            let found = api.get(CONFIGURATION).await.ok()?;
            (bundle(&found).as_deref() == Some(&*mesh.roots)).then_some(found)
        })
        .await
    };
    let wanted: ValidatingWebhookConfiguration = serde_json::from_value(configuration()).expect("a configuration");
    let made = api.create(&PostParams::default(), &wanted).await.expect("it is made");
    let mut found = trusted().await;
    let ours = found
        .metadata
        .managed_fields
        .iter()
        .flatten()
        .find(|entry| entry.manager.as_deref() == Some("istiod-lite-webhook"));
    let fields = serde_json::to_value(ours.expect("a manager of its own").fields_v1.as_ref()).expect("fields");
    let mut expected = json!({"f:webhooks": {}});
    expected["f:webhooks"][r#"k:{"name":"validation.istio.io"}"#] =
        json!({".": {}, "f:name": {}, "f:clientConfig": {"f:caBundle": {}}});
    assert_eq!(fields, expected);
    found.webhooks.as_mut().expect("webhooks")[0].client_config.ca_bundle = None;
    assert_eq!(found.webhooks, made.webhooks, "the rest is as it was written");

    // Somebody else's bundle, and none.
    let place = "/webhooks/0/clientConfig/caBundle";
    for change in [
        json!({"op": "replace", "path": place, "value": STANDARD.encode(&mesh.roots[1..])}),
        json!({"op": "remove", "path": place}),
    ] {
        let patch = json!([change]);
        let patch: Patch<()> = Patch::Json(serde_json::from_value(patch).expect("a patch"));
        api.patch(CONFIGURATION, &PatchParams::default(), &patch).await.expect("it is patched");
        trusted().await;
    }
    // Another one of that name.
    api.delete(CONFIGURATION, &DeleteParams::default()).await.expect("it is deleted");
    api.create(&PostParams::default(), &wanted).await.expect("it is made");
    trusted().await;
}
