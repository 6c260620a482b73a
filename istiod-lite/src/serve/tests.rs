//! The real server on loopback: TLS from its own authority, tokens by a table, clients as plain gRPC.

use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;
use std::time::SystemTime;

use futures_util::future::BoxFuture;
use mesh::drain::{self, DrainTrigger};
use mesh_proto::ads::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use mesh_proto::ads::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use mesh_proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;
use mesh_proto::ca::{IstioCertificateRequest, IstioCertificateResponse};
use mesh_proto::enrolment::enrolment_service_client::EnrolmentServiceClient;
use mesh_proto::enrolment::resolve_response::Verdict;
use mesh_proto::enrolment::{EnrolmentReport, POD_ENROLMENT_TYPE, PodEnrolment, PodState, ResolveRequest};
use mesh_proto::security::AUTHORIZATION_TYPE;
use mesh_proto::workload::ADDRESS_TYPE;
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{Instant, timeout};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Request, Status, Streaming};

use super::*;
use crate::auth::{AuthError, BoundPod, Caller, Proof};
use crate::ca::authority::CaMaterial;
use crate::ca::{Authority, SELF_SIGNED_ROOT_TTL};
use crate::push::session::fixtures::{Held, ack, request, workload};
use crate::resources::{Audience, Resource, lock};
use crate::testing::Pods;

mod certificates;
mod replicas;

/// Longer than anything here takes; a test that waits this long has failed.
const PATIENCE: Duration = Duration::from_secs(10);
const SERVER_NAME: &str = "istiod.istio-system.svc";

/// Tokens are pod names: `istio-system/zt-a` is the token bound to that pod.
#[derive(Default)]
struct Tokens(Mutex<HashMap<String, Caller>>);

impl Tokens {
    fn issue(&self, namespace: &str, pod: &str, account: &str, expires: Option<SystemTime>) {
        let caller = Caller {
            namespace: namespace.into(),
            service_account: account.into(),
            pod: Some(BoundPod { name: pod.into(), uid: format!("{namespace}/{pod}").into() }),
            expires,
            proof: Proof::Token,
        };
        lock(&self.0).insert(format!("{namespace}/{pod}"), caller);
    }
}

impl Authenticate for Tokens {
    fn authenticate<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Caller, AuthError>> {
        let found = lock(&self.0).get(token).cloned().filter(|c| c.expires.is_none_or(|end| SystemTime::now() < end));
        Box::pin(async move { found.ok_or_else(|| AuthError::Rejected("unknown".into())) })
    }
}

#[derive(Default)]
struct Heard {
    reports: Mutex<BTreeMap<String, Vec<PodState>>>,
    gone: Mutex<Vec<String>>,
}

impl ReportSink for Heard {
    fn report(&self, node: &str, states: Vec<PodState>) {
        lock(&self.reports).insert(node.to_owned(), states);
    }

    fn disconnected(&self, node: &str) {
        lock(&self.gone).push(node.to_owned());
    }
}

/// A running control plane of two nodes: on each a ztunnel (`zt-a`, `zt-b`), on node-a a pod `cart`, on node-b `db`.
struct World {
    store: Arc<ResourceStore>,
    acks: Arc<Acks>,
    pods: Arc<Pods>,
    tokens: Arc<Tokens>,
    heard: Arc<Heard>,
    grpc: SocketAddr,
    http: SocketAddr,
    webhook: SocketAddr,
    roots: String,
    /// The authority's key, by which a test signs what the authority would not.
    material: CaMaterial,
    authority: Arc<CurrentAuthority>,
    drain: DrainTrigger,
    server: tokio::task::JoinHandle<anyhow::Result<()>>,
}

impl World {
    async fn start() -> Self {
        let pods = Arc::new(
            Pods::new()
                .pod("istio-system", "zt-a", "ztunnel", "node-a")
                .pod("istio-system", "zt-b", "ztunnel", "node-b")
                .pod("shop", "cart", "cart", "node-a")
                .pod("shop", "db", "db", "node-b"),
        );
        let tokens = Arc::new(Tokens::default());
        for (namespace, pod, account) in [
            ("istio-system", "zt-a", "ztunnel"),
            ("istio-system", "zt-b", "ztunnel"),
            ("shop", "cart", "cart"),
            ("shop", "db", "db"),
        ] {
            tokens.issue(namespace, pod, account, None);
        }
        let material =
            Authority::self_signed("cluster.local", SELF_SIGNED_ROOT_TTL, OffsetDateTime::now_utc()).unwrap();
        let authority = CurrentAuthority::new(Arc::new(Authority::from_material(&material).unwrap()));
        let anywhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let settings = Settings { grpc: anywhere, http: anywhere, webhook: anywhere, ..Settings::default() };
        let listeners = Listeners::bind(&settings).await.unwrap();
        let (grpc, http) = (listeners.grpc.local_addr().unwrap(), listeners.http.local_addr().unwrap());
        let webhook = listeners.webhook.local_addr().unwrap();
        let (store, acks) = (Arc::new(ResourceStore::new()), Arc::new(Acks::default()));
        let heard = Arc::new(Heard::default());
        let (drain, watcher) = drain::channel();
        let (roots, _) = authority.distributed();
        let deps = Deps {
            store: Arc::clone(&store),
            acks: Arc::clone(&acks),
            pods: pods.clone(),
            placements: pods.clone(),
            knowledge: Arc::new(admission::Known::default),
            mesh_config: Arc::new(|| "{}".to_owned()),
            reports: heard.clone(),
            authority: Arc::clone(&authority),
            authenticator: tokens.clone(),
            metrics: Arc::new(|| "some_metric 1\n".to_owned()),
            clock: Clock::system(),
            settings,
        };
        let server = tokio::spawn(run(deps, listeners, watcher));
        Self { store, acks, pods, tokens, heard, grpc, http, webhook, roots, material, authority, drain, server }
    }

    /// Enrolments of `cart` for node-a and `db` for node-b, and the two workloads.
    async fn ready() -> Self {
        let world = Self::start().await;
        world.store.publish(Self::content());
        world
    }

    fn content() -> Vec<Resource> {
        let enrolment = |uid: &str, node: &str| {
            Resource::new(POD_ENROLMENT_TYPE, uid, &PodEnrolment { uid: uid.into(), ..PodEnrolment::default() })
                .for_audience(vec![Audience::Node(node.into())])
        };
        vec![
            enrolment("shop/cart", "node-a"),
            enrolment("shop/db", "node-b"),
            workload("cart", "node-a", &[]),
            workload("db", "node-b", &[]),
        ]
    }

    async fn channel(&self) -> Channel {
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&self.roots)).domain_name(SERVER_NAME);
        Endpoint::from_shared(format!("https://{}", self.grpc))
            .unwrap()
            .tls_config(tls)
            .unwrap()
            .connect()
            .await
            .expect("a client that trusts the root and knows the name connects")
    }

    async fn discover(&self, token: &str) -> Result<Stream, Status> {
        let (send, requests) = mpsc::channel(16);
        let mut client = AggregatedDiscoveryServiceClient::new(self.channel().await);
        let call = authorized(token, ReceiverStream::new(requests));
        let responses = client.delta_aggregated_resources(call).await?.into_inner();
        Ok(Stream { send, responses })
    }

    async fn sign(&self, token: &str, body: IstioCertificateRequest) -> Result<IstioCertificateResponse, Status> {
        let mut client = IstioCertificateServiceClient::new(self.channel().await);
        client.create_certificate(authorized(token, body)).await.map(tonic::Response::into_inner)
    }

    async fn report(&self, token: &str, uids: &[&str]) -> Result<(), Status> {
        let pods = uids.iter().map(|uid| PodState { uid: uid.to_string(), ..PodState::default() }).collect();
        let mut client = EnrolmentServiceClient::new(self.channel().await);
        client.report(authorized(token, EnrolmentReport { pods })).await.map(drop)
    }

    async fn resolve(&self, token: &str, name: &str) -> Result<Verdict, Status> {
        let asked = ResolveRequest { namespace: "shop".into(), name: name.into(), uid: format!("shop/{name}") };
        let mut client = EnrolmentServiceClient::new(self.channel().await);
        let response = timeout(PATIENCE, client.resolve(authorized(token, asked))).await.unwrap()?;
        Ok(response.into_inner().verdict.unwrap())
    }

    async fn get(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(self.http).await.unwrap();
        let text = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut answer = String::new();
        timeout(PATIENCE, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
        answer
    }
}

fn authorized<T>(token: &str, body: T) -> Request<T> {
    let mut request = Request::new(body);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    request
}

struct Stream {
    send: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

impl Stream {
    async fn next(&mut self) -> DeltaDiscoveryResponse {
        let message = timeout(PATIENCE, self.responses.message()).await.expect("in time");
        message.unwrap().expect("the stream goes on")
    }

    /// Waits for the stream's end; a clean end is `None`.
    async fn end(&mut self) -> Option<Status> {
        loop {
            match timeout(PATIENCE, self.responses.message()).await.expect("in time") {
                Ok(Some(_)) => {}
                Ok(None) => return None,
                Err(status) => return Some(status),
            }
        }
    }

    async fn ask(&mut self, request: DeltaDiscoveryRequest) -> DeltaDiscoveryResponse {
        self.send.send(request).await.unwrap();
        let response = self.next().await;
        self.send.send(ack(&response)).await.unwrap();
        response
    }
}

fn names(response: &DeltaDiscoveryResponse) -> Vec<&str> {
    response.resources.iter().map(|resource| resource.name.as_str()).collect()
}

/// Waits for `condition`, looking again at each tick of the runtime.
async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < until, "{what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn csr() -> String {
    let key = KeyPair::generate().unwrap();
    CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap()
}

fn certificate_request(impersonated: Option<&str>) -> IstioCertificateRequest {
    let metadata = impersonated.map(|identity| {
        let value = prost_types::Value { kind: Some(prost_types::value::Kind::StringValue(identity.into())) };
        prost_types::Struct { fields: [("ImpersonatedIdentity".to_owned(), value)].into() }
    });
    IstioCertificateRequest { csr: csr(), validity_duration: 3600, metadata }
}

/// The URI SAN of the leaf.
fn identity_of(response: &IstioCertificateResponse) -> String {
    let (_, pem) = x509_parser::pem::parse_x509_pem(response.cert_chain[0].as_bytes()).unwrap();
    let leaf = pem.parse_x509().unwrap();
    match leaf.subject_alternative_name().unwrap().unwrap().value.general_names.as_slice() {
        [x509_parser::extensions::GeneralName::URI(uri)] => uri.to_string(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_change_reaches_a_subscriber_at_once_and_its_ack_is_known() {
    let world = World::ready().await;
    let mut stream = world.discover("istio-system/zt-a").await.unwrap();
    assert_eq!(names(&stream.ask(request(ADDRESS_TYPE)).await), ["cart", "db"]);
    assert_eq!(names(&stream.ask(request(AUTHORIZATION_TYPE)).await), [""; 0]);

    let mut content = World::content();
    content.push(workload("late", "node-a", &[]));
    let generation = world.store.publish(content);
    let response = stream.next().await;
    assert_eq!(names(&response), ["late"]);
    assert!(!world.acks.wait_acked(ADDRESS_TYPE, generation, Duration::from_millis(20)).await);
    stream.send.send(ack(&response)).await.unwrap();
    assert!(world.acks.wait_acked(ADDRESS_TYPE, generation, PATIENCE).await);
    assert!(world.acks.wait_acked(AUTHORIZATION_TYPE, generation, PATIENCE).await, "no change counts as acknowledged");
}

#[tokio::test]
async fn a_reconnecting_client_is_sent_only_what_it_missed() {
    let world = World::ready().await;
    let mut held = Held::default();
    let mut stream = world.discover("istio-system/zt-a").await.unwrap();
    held.apply(&stream.ask(request(ADDRESS_TYPE)).await);
    drop(stream);
    world.store.publish([workload("cart", "node-a", &[]), workload("late", "node-a", &[])]);
    let mut stream = world.discover("istio-system/zt-a").await.unwrap();
    let again = DeltaDiscoveryRequest { initial_resource_versions: held.0.clone(), ..request(ADDRESS_TYPE) };
    let response = stream.ask(again).await;
    assert_eq!(names(&response), ["late"]);
    assert_eq!(response.removed_resources, ["db"]);
    held.apply(&response);
    assert_eq!(held.names(), ["cart", "late"]);
}

#[tokio::test]
async fn a_node_is_told_of_its_own_pods_only_whatever_the_client_claims() {
    let world = World::ready().await;
    for (token, expected) in [
        ("istio-system/zt-a", vec!["shop/cart"]),
        ("istio-system/zt-b", vec!["shop/db"]),
        // On node-a too, but nobody's node proxy.
        ("shop/cart", vec![]),
    ] {
        let mut stream = world.discover(token).await.unwrap();
        let claim =
            |value: &str| prost_types::Value { kind: Some(prost_types::value::Kind::StringValue(value.into())) };
        let metadata = prost_types::Struct {
            fields: [("NODE_NAME".to_owned(), claim("node-a")), ("NAMESPACE".to_owned(), claim("istio-system"))].into(),
        };
        let node = mesh_proto::ads::Node {
            id: "ztunnel~1.1.1.1~zt-a.x~x".into(),
            metadata: Some(metadata),
            ..Default::default()
        };
        let response = stream.ask(DeltaDiscoveryRequest { node: Some(node), ..request(POD_ENROLMENT_TYPE) }).await;
        assert_eq!(names(&response), expected, "{token}");
    }
}

#[tokio::test]
async fn strangers_are_turned_away() {
    let world = World::ready().await;
    world.tokens.issue("shop", "late", "cart", Some(SystemTime::now() - Duration::from_secs(1)));
    world.tokens.issue("shop", "ghost", "cart", None);
    for token in ["", "nonsense", "shop/late", "shop/ghost"] {
        assert_eq!(world.discover(token).await.err().unwrap().code(), Code::Unauthenticated, "{token}");
        let refused = world.sign(token, certificate_request(None)).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated, "{token}");
        assert_eq!(world.report(token, &[]).await.unwrap_err().code(), Code::Unauthenticated, "{token}");
    }
    let mut client = AggregatedDiscoveryServiceClient::new(world.channel().await);
    let refused = client.delta_aggregated_resources(tokio_stream::empty()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "no token at all");
}

#[tokio::test]
async fn before_the_first_translation_clients_are_told_to_come_back() {
    let world = World::start().await;
    assert_eq!(world.discover("istio-system/zt-a").await.err().unwrap().code(), Code::Unavailable);
    assert_eq!(world.report("istio-system/zt-a", &[]).await.unwrap_err().code(), Code::Unavailable);
    assert!(world.get("/ready").await.starts_with("HTTP/1.1 503"));
    world.store.publish([]);
    assert!(world.get("/ready").await.starts_with("HTTP/1.1 200"));
    assert!(world.get("/metrics").await.ends_with("some_metric 1\n"));
    assert!(world.get("/version").await.contains(env!("CARGO_PKG_VERSION")));
}

#[tokio::test]
async fn a_stream_ends_with_the_pod_or_the_token_it_was_opened_with() {
    let world = World::ready().await;
    let mut stream = world.discover("shop/cart").await.unwrap();
    stream.ask(request(ADDRESS_TYPE)).await;
    world.pods.delete("shop", "cart");
    world.store.publish([]);
    assert_eq!(stream.end().await.map(|status| status.code()), Some(Code::Unauthenticated));

    world.tokens.issue("shop", "db", "db", Some(SystemTime::now() + Duration::from_millis(1500)));
    let mut stream = world.discover("shop/db").await.unwrap();
    assert_eq!(stream.end().await.map(|status| status.code()), Some(Code::Unauthenticated));
}

#[tokio::test]
async fn a_caller_gets_its_own_identity_and_a_usable_chain() {
    let world = World::ready().await;
    let response = world.sign("shop/cart", certificate_request(None)).await.unwrap();
    assert_eq!(identity_of(&response), "spiffe://cluster.local/ns/shop/sa/cart");
    assert_eq!(response.cert_chain.len(), 2);
    assert_eq!(response.cert_chain.last(), Some(&world.roots));
}

#[tokio::test]
async fn a_node_proxy_gets_identities_of_its_node_and_no_others() {
    let world = World::ready().await;
    let cart = "spiffe://cluster.local/ns/shop/sa/cart";
    let response = world.sign("istio-system/zt-a", certificate_request(Some(cart))).await.unwrap();
    assert_eq!(identity_of(&response), cart);
    for (token, wanted) in [
        ("istio-system/zt-b", cart),
        ("istio-system/zt-a", "spiffe://cluster.local/ns/shop/sa/db"),
        ("istio-system/zt-a", "spiffe://other/ns/shop/sa/cart"),
        ("istio-system/zt-a", "spiffe://cluster.local/ns/shop/sa/cart/x"),
        ("istio-system/zt-a", "cart"),
        // On the right node, but no node proxy.
        ("shop/cart", "spiffe://cluster.local/ns/istio-system/sa/ztunnel"),
        ("shop/cart", cart),
    ] {
        let refused = world.sign(token, certificate_request(Some(wanted))).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated, "{token} {wanted}");
    }
    world.pods.delete("shop", "cart");
    let refused = world.sign("istio-system/zt-a", certificate_request(Some(cart))).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "the pod has gone");
    world.pods.delete("istio-system", "zt-b");
    let db = "spiffe://cluster.local/ns/shop/sa/db";
    let refused = world.sign("istio-system/zt-b", certificate_request(Some(db))).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "a stolen token does not outlive its pod");
}

#[tokio::test]
async fn a_machine_whose_token_is_bound_to_no_pod_is_its_service_account_and_no_node() {
    let world = World::ready().await;
    // The node proxies' account among them: without a pod it stands for no node.
    for account in ["billing", "ztunnel"] {
        let caller = Caller {
            namespace: "istio-system".into(),
            service_account: account.into(),
            pod: None,
            expires: Some(SystemTime::now() + Duration::from_secs(60)),
            proof: Proof::Token,
        };
        lock(&world.tokens.0).insert(account.to_owned(), caller);
        let response = world.sign(account, certificate_request(None)).await.unwrap();
        assert_eq!(identity_of(&response), format!("spiffe://cluster.local/ns/istio-system/sa/{account}"));
        let other = certificate_request(Some("spiffe://cluster.local/ns/shop/sa/cart"));
        assert_eq!(world.sign(account, other).await.unwrap_err().code(), Code::Unauthenticated, "{account}");
        let mut stream = world.discover(account).await.unwrap();
        assert!(!names(&stream.ask(request(ADDRESS_TYPE)).await).is_empty(), "the mesh is for all to see");
        assert!(names(&stream.ask(request(POD_ENROLMENT_TYPE)).await).is_empty(), "{account}");
        assert!(world.report(account, &["shop/cart"]).await.is_err(), "{account}");
    }
}

#[tokio::test]
async fn bad_signing_requests_are_named_as_such() {
    let world = World::ready().await;
    let too_long = IstioCertificateRequest { validity_duration: i64::MAX, ..certificate_request(None) };
    let garbage = IstioCertificateRequest { csr: "garbage".into(), ..certificate_request(None) };
    let swapped = IstioCertificateRequest { csr: world.roots.clone(), ..certificate_request(None) };
    for bad in [too_long, garbage, swapped] {
        let refused = world.sign("shop/cart", bad).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
    }
    let huge = IstioCertificateRequest { csr: "x".repeat(MAX_CSR), ..certificate_request(None) };
    assert_eq!(world.sign("shop/cart", huge).await.unwrap_err().code(), Code::OutOfRange);
}

#[tokio::test]
async fn reports_count_for_the_callers_node_only() {
    let world = World::ready().await;
    world.report("istio-system/zt-a", &["shop/cart", "shop/db", "just-left"]).await.unwrap();
    let heard: Vec<_> = lock(&world.heard.reports)["node-a"].iter().map(|state| state.uid.clone()).collect();
    assert_eq!(heard, ["shop/cart", "just-left"], "shop/db is another node's");
    assert!(!lock(&world.heard.reports).contains_key("node-b"));
    let refused = world.report("shop/cart", &["shop/cart"]).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
}

#[tokio::test]
async fn the_longest_token_is_read() {
    let world = World::ready().await;
    let refused = world.report(&"x".repeat(crate::auth::MAX_TOKEN), &[]).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "by the review, not by HTTP/2: {refused:?}");
}

#[tokio::test]
async fn a_node_is_gone_when_its_last_stream_is() {
    let world = World::ready().await;
    let old = world.discover("istio-system/zt-a").await.unwrap();
    let mut new = world.discover("istio-system/zt-a").await.unwrap();
    drop(old);
    new.ask(request(ADDRESS_TYPE)).await;
    assert!(lock(&world.heard.gone).is_empty());
    drop(new);
    eventually("the sink hears of it", || *lock(&world.heard.gone) == ["node-a"]).await;
}

#[tokio::test]
async fn garbage_and_silence_on_the_port_harm_nobody() {
    let world = World::ready().await;
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(TcpStream::connect(world.grpc).await.unwrap());
        let mut noisy = TcpStream::connect(world.grpc).await.unwrap();
        noisy.write_all(b"GET / HTTP/1.1\r\nHost: istiod\r\n\r\n").await.unwrap();
        let mut rest = Vec::new();
        // A TLS alert, or nothing: either way the connection ends.
        let _ = timeout(PATIENCE, noisy.read_to_end(&mut rest)).await.expect("closed in time");
        assert!(!rest.starts_with(b"HTTP"), "plaintext is not answered");
    }
    world.sign("shop/cart", certificate_request(None)).await.unwrap();
}

#[tokio::test]
async fn a_client_that_stops_reading_does_not_hold_up_the_others() {
    let world = World::ready().await;
    let stuck = world.discover("istio-system/zt-b").await.unwrap();
    stuck.send.send(request(ADDRESS_TYPE)).await.unwrap();
    let mut stream = world.discover("istio-system/zt-a").await.unwrap();
    stream.ask(request(ADDRESS_TYPE)).await;
    let mut latest = String::new();
    for round in 0..50 {
        latest = format!("w{round}");
        world.store.publish([workload(&latest, "n", &[])]);
    }
    let mut held = Held::default();
    while held.names() != [latest.as_str()] {
        let response = stream.next().await;
        held.apply(&response);
        held.0.retain(|name, _| name.starts_with('w'));
        stream.send.send(ack(&response)).await.unwrap();
    }
}

#[tokio::test]
async fn a_drain_ends_streams_and_the_server() {
    let world = World::ready().await;
    let mut stream = world.discover("istio-system/zt-a").await.unwrap();
    stream.ask(request(ADDRESS_TYPE)).await;
    let draining = tokio::spawn(world.drain.drain(PATIENCE));
    assert_eq!(stream.end().await.map(|status| status.code()), Some(Code::Unavailable));
    drop(stream);
    timeout(PATIENCE, world.server).await.expect("in time").unwrap().unwrap();
    assert_eq!(draining.await.unwrap(), drain::Drained::Clean);
}

#[tokio::test]
async fn a_client_of_another_root_does_not_connect() {
    let world = World::ready().await;
    let stranger =
        Authority::self_signed("cluster.local", SELF_SIGNED_ROOT_TTL, OffsetDateTime::now_utc()).unwrap().certificate;
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(stranger)).domain_name(SERVER_NAME);
    let distrusting = Endpoint::from_shared(format!("https://{}", world.grpc)).unwrap().tls_config(tls).unwrap();
    assert!(distrusting.connect().await.is_err());
}

#[tokio::test]
async fn the_serving_certificate_is_for_the_service_names() {
    let world = World::ready().await;
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&world.roots)).domain_name("other.example");
    let wrong = Endpoint::from_shared(format!("https://{}", world.grpc)).unwrap().tls_config(tls).unwrap();
    assert!(wrong.connect().await.is_err());
}

fn grpc_config(world: &World, token: &str) -> mesh::grpc::GrpcConfig {
    mesh::grpc::GrpcConfig {
        address: world.grpc.to_string(),
        root_ca: mesh::grpc::RootCa::Pem(world.roots.clone()),
        token: mesh::grpc::TokenSource::Literal(token.to_owned()),
        headers: Vec::new(),
        cluster_id: "Kubernetes".to_owned(),
        alt_hostname: Some(SERVER_NAME.to_owned()),
        dialer: mesh::grpc::Dialer::default(),
    }
}

#[tokio::test]
async fn the_proxies_own_client_follows_rejects_and_acknowledges() {
    let world = World::ready().await;
    let store = mesh::store::Store::new();
    let node = mesh::xds::NodeInfo {
        role: mesh::xds::NodeRole::Ztunnel,
        ip: None,
        name: "zt-a".to_owned(),
        namespace: "istio-system".to_owned(),
        node_name: "node-b, says the client".to_owned(),
        cluster_id: "Kubernetes".to_owned(),
        metadata: BTreeMap::new(),
    };
    let enrolled: Arc<Mutex<Vec<String>>> = Arc::default();
    let handlers = vec![
        mesh::xds::address_handler(Arc::clone(&store)),
        mesh::xds::authorization_handler(Arc::clone(&store)),
        mesh::xds::typed_handler(POD_ENROLMENT_TYPE, {
            let enrolled = Arc::clone(&enrolled);
            move |updated: Vec<(String, PodEnrolment)>, _removed| {
                lock(&enrolled).extend(updated.into_iter().map(|(name, _)| name));
                Vec::new()
            }
        }),
    ];
    let config = mesh::xds::XdsConfig { grpc: grpc_config(&world, "istio-system/zt-a"), node };
    let client = mesh::xds::XdsClient::new(config, handlers);
    let mut synced = client.synced();
    let (_trigger, drain) = drain::channel();
    let running = tokio::spawn(client.run(drain));
    timeout(PATIENCE, synced.wait_for(|synced| *synced)).await.expect("in time").unwrap();
    assert!(store.snapshot().workload("db").is_some());
    assert_eq!(*lock(&enrolled), ["shop/cart"]);

    let mut content = World::content();
    content.retain(|resource| &*resource.name != "db");
    content.push(workload("late", "node-b", &[]));
    // A name that is not that of its content: the client rejects it and applies the rest.
    let mut bad = workload("bad", "node-b", &[]);
    bad.name = "other".into();
    content.push(bad);
    let generation = world.store.publish(content);
    assert!(world.acks.wait_acked(ADDRESS_TYPE, generation, PATIENCE).await);
    let snapshot = store.snapshot();
    assert!(snapshot.workload("late").is_some() && snapshot.workload("db").is_none());
    assert!(snapshot.workload("bad").is_none() && snapshot.workload("other").is_none());
    running.abort();
}

#[tokio::test]
async fn the_proxies_own_ca_client_gets_certificates_for_its_node_only() {
    use mesh::identity::{CaClient, CaConfig, CertificateSource as _, Identity, IdentityError};
    let world = World::ready().await;
    let client = |token: &str, impersonate| {
        let channel = mesh::grpc::channel(grpc_config(&world, token)).unwrap();
        let config = CaConfig { ttl: Duration::from_secs(3600), impersonate };
        CaClient::new(channel, config, Clock::system())
    };
    let cart: Identity = "spiffe://cluster.local/ns/shop/sa/cart".parse().unwrap();
    let certificate = client("istio-system/zt-a", true).fetch(&cart).await.unwrap();
    assert_eq!(*certificate.identity(), cart);
    client("shop/cart", false).fetch(&cart).await.unwrap();
    let refused = client("istio-system/zt-b", true).fetch(&cart).await.expect_err("refused");
    assert!(matches!(refused, IdentityError::Refused { .. }), "{refused}");
}

#[tokio::test]
async fn a_node_proxy_learns_of_its_own_pods_before_anything_is_pushed() {
    let world = World::start().await;
    let Verdict::Enrolment(enrolment) = world.resolve("istio-system/zt-a", "cart").await.unwrap() else {
        panic!("not enrolled")
    };
    assert_eq!(enrolment.uid, "shop/cart");
    assert!(matches!(world.resolve("istio-system/zt-a", "db").await.unwrap(), Verdict::Unknown(_)), "another node's");
    assert_eq!(world.resolve("shop/cart", "cart").await.unwrap_err().code(), tonic::Code::PermissionDenied);
}

#[tokio::test]
async fn a_pod_that_is_not_known_yet_is_waited_for() {
    let world = World::start().await;
    let (verdict, ()) = tokio::join!(world.resolve("istio-system/zt-a", "late"), async {
        // Whether it comes before or after the question makes no difference to the answer.
        tokio::task::yield_now().await;
        world.pods.arrive("shop", "late", "late", "node-a");
    });
    assert!(matches!(verdict.unwrap(), Verdict::Enrolment(_)));
}

#[tokio::test]
async fn a_question_under_way_is_answered_while_the_webhook_drains() {
    let world = World::start().await;
    let mut trusted = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(world.roots.as_bytes()) {
        trusted.add(certificate.unwrap()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = config.with_root_certificates(trusted).with_no_client_auth();
    let stream = TcpStream::connect(world.webhook).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let mut stream = connector.connect(SERVER_NAME.try_into().unwrap(), stream).await.unwrap();
    let review =
        r#"{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","request":{"uid":"u","operation":"DELETE"}}"#;
    let head = format!(
        "POST /validate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\nExpect: 100-continue\r\n\r\n",
        review.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut going_on = [0; 25];
    // It is asked for the rest, so the question is under way.
    timeout(PATIENCE, stream.read_exact(&mut going_on)).await.unwrap().unwrap();
    assert_eq!(&going_on, b"HTTP/1.1 100 Continue\r\n\r\n");
    let (drain, server) = (world.drain, world.server);
    drain.begin();
    let drained = tokio::spawn(drain.drain(PATIENCE));
    until_closed(world.webhook).await;
    stream.write_all(review.as_bytes()).await.unwrap();
    let mut answer = String::new();
    timeout(PATIENCE, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.ends_with(r#""response":{"uid":"u","allowed":true}}"#),
        "{answer}"
    );
    assert_eq!(drained.await.unwrap(), drain::Drained::Clean);
    server.await.unwrap().unwrap();
}

async fn until_closed(address: SocketAddr) {
    let until = Instant::now() + PATIENCE;
    while TcpStream::connect(address).await.is_ok() {
        assert!(Instant::now() < until, "the listener is open");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
