//! The life of the mesh's CA as an operator has it: a real control plane on its own API server, kubectl to plug things in,
//! and clients that ask for certificates, keep a stream open and trust what they were given.

mod standalone_support;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::api::{Api, PostParams};
use mesh_proto::ads::DeltaDiscoveryRequest;
use mesh_proto::ads::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use mesh_proto::ca::IstioCertificateRequest;
use mesh_proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;
use mesh_proto::workload::ADDRESS_TYPE;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, IsCa, Issuer, KeyIdMethod, KeyPair,
    KeyUsagePurpose, SerialNumber,
};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use serde_json::{Value, json};
use standalone_support::{Beside, Kubectl, Server, eventually, eventually_async};
use time::OffsetDateTime;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

const NAMESPACES: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: istio-system}
---
apiVersion: v1
kind: Namespace
metadata: {name: shop}
";
const SERVER_NAME: &str = "istiod.istio-system.svc";
const HOUR: Duration = Duration::from_secs(3600);

/// A CA of an operator's: a key, its certificate, and those above it.
struct Ca {
    certificate: String,
    key: KeyPair,
    /// Between it and the root, itself included; empty for a root.
    chain: String,
    root: String,
}

impl Ca {
    fn root(name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let certificate = params(name).self_signed(&key).unwrap().pem();
        Self { root: certificate.clone(), certificate, key, chain: String::new() }
    }

    fn below(&self, name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let issuer = Issuer::from_ca_cert_pem(&self.certificate, &self.key).unwrap();
        let certificate = params(name).signed_by(&key, &issuer).unwrap().pem();
        let chain = certificate.clone() + &self.chain;
        Self { certificate, key, chain, root: self.root.clone() }
    }

    /// A list that names nobody.
    fn revocations(&self) -> String {
        let issuer = Issuer::from_ca_cert_pem(&self.certificate, &self.key).unwrap();
        let now = OffsetDateTime::now_utc();
        let list = CertificateRevocationListParams {
            this_update: now - HOUR,
            next_update: now + 24 * HOUR,
            crl_number: SerialNumber::from(1u64),
            issuing_distribution_point: None,
            revoked_certs: Vec::new(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&issuer).unwrap().pem().unwrap()
    }

    /// In Istio's layout.
    fn write(&self, directory: &Path) {
        std::fs::create_dir_all(directory).unwrap();
        let key = self.key.serialize_pem();
        for (file, text) in [
            ("ca-cert.pem", &self.certificate),
            ("ca-key.pem", &key),
            ("cert-chain.pem", &self.chain),
            ("root-cert.pem", &self.root),
        ] {
            std::fs::write(directory.join(file), text).unwrap();
        }
    }
}

fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let now = OffsetDateTime::now_utc();
    (params.not_before, params.not_after) = (now - HOUR, now + 1000 * HOUR);
    params
}

/// What a client got: its certificate, those above it, and last the roots it trusts.
type Chain = Vec<String>;

fn roots(chain: &[String]) -> &str {
    chain.last().unwrap()
}

fn is_signed_by(chain: &[String], ca: &Ca) -> bool {
    chain[1].trim() == ca.certificate.trim()
}

/// Whether who trusts `roots` lets in the holder of `chain`.
fn accepts(roots: &str, chain: &[String]) -> bool {
    let parse = |pem: &String| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
    let mut store = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(roots.as_bytes()) {
        store.add(root.unwrap()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(store), provider).build().unwrap();
    let between: Vec<_> = chain[1..chain.len() - 1].iter().map(parse).collect();
    verifier.verify_client_cert(&parse(&chain[0]), &between, UnixTime::now()).is_ok()
}

/// Whether each lets in the other.
fn meet(one: &[String], other: &[String]) -> bool {
    accepts(roots(one), other) && accepts(roots(other), one)
}

fn certificates(pem: &str) -> usize {
    pem.matches("BEGIN CERTIFICATE").count()
}

/// Addresses nobody listens on a moment before.
fn free_addresses() -> [SocketAddr; 2] {
    let sockets = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    sockets.map(|socket| socket.local_addr().unwrap())
}

/// A control plane, the kubectl of its operator and the token of one of its clients.
struct Mesh {
    server: Server,
    kubectl: Kubectl,
    control_plane: Beside,
    grpc: SocketAddr,
    http: SocketAddr,
}

impl Mesh {
    /// With a CA mounted at `directory`, if there is one. `None`: there is no kubectl.
    fn start(directory: &Path) -> Option<Self> {
        let (name, binary) = Kubectl::versions().into_iter().next()?;
        let [grpc, http] = free_addresses();
        let control_plane = Beside::ControlPlane(vec![
            ("ISTIOD_GRPC_ADDR", grpc.to_string()),
            ("ISTIOD_MONITORING_ADDR", http.to_string()),
            ("ISTIOD_WEBHOOK_ADDR", "127.0.0.1:0".to_owned()),
            ("ROOT_CA_DIR", directory.display().to_string()),
        ]);
        let server = Server::start_beside(&control_plane);
        let kubectl = Kubectl::new(&server, name, &binary);
        kubectl.apply(NAMESPACES);
        Some(Self { server, kubectl, control_plane, grpc, http })
    }

    fn plug_in(&self, ca: &Ca, revocations: Option<&str>) {
        let directory = self.server.dir().join("plugged-in");
        ca.write(&directory);
        let mut create = "create secret generic cacerts -n istio-system --dry-run=client -o yaml".to_owned();
        for file in ["ca-cert.pem", "ca-key.pem", "cert-chain.pem", "root-cert.pem"] {
            create += &format!(" --from-file={}", directory.join(file).display());
        }
        if let Some(lists) = revocations {
            let file = directory.join("ca-crl.pem");
            std::fs::write(&file, lists).unwrap();
            create += &format!(" --from-file={}", file.display());
        }
        self.kubectl.apply(&self.kubectl.ok(&create));
    }

    /// The ConfigMaps of this name in all namespaces, if every namespace has one, and the same.
    fn distributed(&self, name: &str, key: &str) -> Option<String> {
        let text = self.kubectl.ok(&format!("get configmaps -A --field-selector metadata.name={name} -o json"));
        let found: Value = serde_json::from_str(&text).unwrap();
        let mut texts: Vec<_> = found["items"].as_array()?.iter().map(|map| map["data"][key].as_str()).collect();
        let namespaces = self.kubectl.ok("get namespaces -o name").lines().count();
        let complete = texts.len() == namespaces;
        texts.dedup();
        texts.first().copied().flatten().filter(|_| complete && texts.len() == 1).map(str::to_owned)
    }

    fn distributed_roots(&self) -> Option<String> {
        self.distributed("istio-ca-root-cert", "root-cert.pem")
    }

    fn lists(&self) -> String {
        self.kubectl.ok("get configmaps -A --field-selector metadata.name=istio-ca-crl -o name")
    }

    async fn token(&self) -> String {
        let accounts: Api<ServiceAccount> = Api::namespaced(self.server.client().await, "shop");
        let request: TokenRequest =
            serde_json::from_value(json!({"metadata": {}, "spec": {"audiences": ["istio-ca"]}})).unwrap();
        let token = accounts.create_token_request("default", &PostParams::default(), &request).await.unwrap();
        token.status.unwrap().token
    }

    /// A connection of somebody who trusts `roots`.
    async fn connect(&self, roots: &str) -> Option<Channel> {
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(roots)).domain_name(SERVER_NAME);
        let endpoint = Endpoint::from_shared(format!("https://{}", self.grpc)).unwrap().tls_config(tls).unwrap();
        endpoint.connect().await.ok()
    }

    async fn certificate(&self, roots: &str) -> Option<Chain> {
        let key = KeyPair::generate().unwrap();
        let csr = CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap();
        let body = IstioCertificateRequest { csr, validity_duration: 24 * 3600, metadata: None };
        let mut client = IstioCertificateServiceClient::new(self.connect(roots).await?);
        let answer = client.create_certificate(authorized(&self.token().await, body)).await.ok()?;
        Some(answer.into_inner().cert_chain)
    }

    /// The first certificate of which `is_so` is true, asked for by somebody who trusts `roots`.
    async fn certificate_that(&self, what: &str, roots: &str, is_so: impl Fn(&Chain) -> bool) -> Chain {
        eventually_async(what, async || self.certificate(roots).await.filter(&is_so)).await
    }

    fn metric(&self, name: &str) -> String {
        let mut stream = TcpStream::connect(self.http).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_default().to_owned()
    }

    /// Lets the control plane believe that this has happened so much longer ago: what it wrote down is dated back, while it
    /// is dead.
    fn age(&mut self, time: Duration) {
        self.server.kill_and_restart();
        let written = self.kubectl.ok(r"get secret istio-ca-roots -n istio-system -o jsonpath={.data.roots\.json}");
        let mut ledger: Value = serde_json::from_slice(&STANDARD.decode(written).unwrap()).unwrap();
        date_back(&mut ledger, time.as_secs().try_into().unwrap());
        let data = json!({"data": {"roots.json": STANDARD.encode(ledger.to_string())}});
        self.kubectl.ok(&format!("patch secret istio-ca-roots -n istio-system --type=merge -p {data}"));
        self.server.kill_and_restart_beside(&self.control_plane);
    }
}

fn date_back(value: &mut Value, seconds: i64) {
    match value {
        Value::Number(number) => *value = (number.as_i64().unwrap() - seconds).into(),
        Value::Array(values) => values.iter_mut().for_each(|value| date_back(value, seconds)),
        Value::Object(fields) => fields.values_mut().for_each(|value| date_back(value, seconds)),
        _ => {}
    }
}

fn authorized<T>(token: &str, body: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(body);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    request
}

/// A client of the control plane that keeps its stream.
struct Subscriber {
    heard: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Subscriber {
    async fn start(mesh: &Mesh, roots: &str) -> Self {
        let (send, requests) = mpsc::channel(16);
        let mut client = AggregatedDiscoveryServiceClient::new(mesh.connect(roots).await.expect("a connection"));
        let first = DeltaDiscoveryRequest { type_url: ADDRESS_TYPE.into(), ..DeltaDiscoveryRequest::default() };
        send.send(first).await.unwrap();
        let call = authorized(&mesh.token().await, ReceiverStream::new(requests));
        let mut responses = client.delta_aggregated_resources(call).await.expect("a stream").into_inner();
        let heard = Arc::new(AtomicUsize::new(0));
        let task = tokio::spawn({
            let heard = Arc::clone(&heard);
            async move {
                while let Ok(Some(response)) = responses.message().await {
                    heard.fetch_add(1, Ordering::SeqCst);
                    let (type_url, response_nonce) = (response.type_url, response.nonce);
                    let ack = DeltaDiscoveryRequest { type_url, response_nonce, ..DeltaDiscoveryRequest::default() };
                    if send.send(ack).await.is_err() {
                        return;
                    }
                }
            }
        });
        let first = || (heard.load(Ordering::SeqCst) > 0).then_some(());
        eventually("what there is", first);
        Self { heard, task }
    }

    /// Is told of something new on the stream it has had all the time.
    fn hears(&self, mesh: &Mesh, service: &str) {
        let before = self.heard.load(Ordering::SeqCst);
        mesh.kubectl.ok(&format!("create service clusterip {service} -n shop --tcp=80"));
        eventually("news on the stream", || (self.heard.load(Ordering::SeqCst) > before).then_some(()));
        assert!(!self.task.is_finished(), "the stream was cut");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ca_is_plugged_in_replaced_and_taken_away_and_nobody_is_cut() {
    let Some(mut mesh) = Mesh::start(Path::new("/nonexistent")) else { return };
    let own = eventually("the roots everywhere", || mesh.distributed_roots());
    assert_eq!(certificates(&own), 1);
    let first = mesh.certificate_that("a certificate", &own, |_| true).await;
    assert_eq!((first.len(), roots(&first)), (2, &*own), "of a root that was made here");
    let subscriber = Subscriber::start(&mesh, &own).await;
    subscriber.hears(&mesh, "one");

    // A CA whose root nobody knows: handed out everywhere, and nothing is signed below it yet.
    let root = Ca::root("corp");
    let (plugged, replacement) = (root.below("policy").below("mesh-a"), root.below("policy").below("mesh-b"));
    mesh.plug_in(&plugged, None);
    let both = eventually("both roots everywhere", || mesh.distributed_roots().filter(|it| certificates(it) == 2));
    assert!(both.starts_with(&own), "the old one first");
    let second = mesh.certificate_that("a certificate with both roots", &own, |it| roots(it) == both).await;
    assert!(second.len() == 2 && meet(&first, &second), "by the old key");
    eventually("the gauge", || (mesh.metric("mesh_ca_waiting") == "1").then_some(()));
    subscriber.hears(&mesh, "two");

    // A day later, through a kill. The old key is still there, the new root is known: it signs.
    drop(subscriber);
    mesh.age(24 * HOUR + HOUR / 2);
    let third = mesh.certificate_that("a certificate by what was plugged in", &both, |it| it.len() == 4).await;
    assert!(is_signed_by(&third, &plugged) && roots(&third) == both);
    assert!(meet(&second, &third), "who has renewed since and who has not");
    assert_eq!(mesh.distributed_roots().as_ref(), Some(&both), "certificates of the old root are about");
    assert!(mesh.connect(&root.root).await.is_some(), "the control plane itself has one of the new root");
    assert_eq!(mesh.metric("mesh_ca_waiting"), "0");
    let subscriber = Subscriber::start(&mesh, &both).await;

    // Another intermediate below a root that everybody has signs at once.
    mesh.plug_in(&replacement, None);
    let fourth = mesh.certificate_that("a certificate by the other", &both, |it| is_signed_by(it, &replacement)).await;
    assert!(meet(&third, &fourth) && meet(&second, &fourth));

    // Lists come to every namespace, also to those that come later, and go.
    assert_eq!(mesh.lists(), "");
    let lists = replacement.revocations();
    mesh.plug_in(&replacement, Some(&lists));
    let has_lists = || mesh.distributed("istio-ca-crl", "ca-crl.pem").filter(|it| *it == lists);
    eventually("lists everywhere", has_lists);
    mesh.kubectl.ok("create namespace late");
    eventually("lists in a new namespace", has_lists);
    eventually("roots in a new namespace", || mesh.distributed_roots().filter(|it| *it == both));

    // What is broken, and what is gone, changes nothing.
    let broken = Ca { certificate: plugged.certificate.clone(), ..root.below("policy").below("mesh-c") };
    mesh.plug_in(&broken, None);
    let refused = r#"mesh_ca_loads_total{outcome="refused"}"#;
    eventually("a refusal", || (mesh.metric(refused) == "1").then_some(()));
    assert!(has_lists().is_some());
    mesh.plug_in(&replacement, None);
    eventually("no lists", || mesh.lists().is_empty().then_some(()));
    mesh.kubectl.ok("delete secret cacerts -n istio-system");
    eventually("another refusal", || (mesh.metric(refused) == "2").then_some(()));
    let fifth = mesh.certificate(&both).await.expect("a certificate");
    assert!(is_signed_by(&fifth, &replacement) && meet(&fourth, &fifth));
    subscriber.hears(&mesh, "three");

    // Put back; and when the last certificate of the first root has ended, nobody is told to trust it any more.
    mesh.plug_in(&replacement, None);
    drop(subscriber);
    mesh.age(24 * HOUR + HOUR / 2);
    let last = eventually("one root everywhere", || mesh.distributed_roots().filter(|it| certificates(it) == 1));
    assert_eq!(last.trim(), root.root.trim());
    let sixth = mesh.certificate_that("a certificate", &last, |it| roots(it) == last).await;
    assert!(is_signed_by(&sixth, &replacement) && accepts(&last, &fifth));
    assert!(!accepts(&last, &first), "which has ended by then");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mounted_ca_is_followed_as_kubelets_and_people_change_it() {
    let directory = tempfile::tempdir().unwrap();
    let place = |name: &str| directory.path().join(name);
    let root = Ca::root("corp");
    let [first, second, third] = ["a", "b", "c"].map(|name| root.below("policy").below(name));
    first.write(&place("..1"));
    second.write(&place("..2"));
    std::os::unix::fs::symlink("..1", place("..data")).unwrap();
    for file in ["ca-cert.pem", "ca-key.pem", "cert-chain.pem", "root-cert.pem"] {
        std::os::unix::fs::symlink(format!("..data/{file}"), place(file)).unwrap();
    }
    let Some(mesh) = Mesh::start(directory.path()) else { return };
    let roots = eventually("the root everywhere", || mesh.distributed_roots());
    assert_eq!(roots.trim(), root.root.trim());
    let before = mesh.certificate_that("a certificate", &roots, |it| is_signed_by(it, &first)).await;
    let subscriber = Subscriber::start(&mesh, &roots).await;

    // A kubelet has the next version whole before it turns the link.
    std::os::unix::fs::symlink("..2", place("..data_tmp")).unwrap();
    std::fs::rename(place("..data_tmp"), place("..data")).unwrap();
    std::fs::remove_dir_all(place("..1")).unwrap();
    let after = mesh.certificate_that("a certificate by the next", &roots, |it| is_signed_by(it, &second)).await;
    assert!(meet(&before, &after));

    // People copy one file after another.
    std::fs::remove_file(place("..data")).unwrap();
    std::fs::write(place("..2/ca-key.pem"), third.key.serialize_pem()).unwrap();
    std::os::unix::fs::symlink("..2", place("..data")).unwrap();
    let refused = r#"mesh_ca_loads_total{outcome="refused"}"#;
    eventually("a refusal", || (!mesh.metric(refused).is_empty()).then_some(()));
    let meanwhile = mesh.certificate(&roots).await.expect("a certificate");
    assert!(is_signed_by(&meanwhile, &second));
    third.write(&place("..2"));
    let last = mesh.certificate_that("a certificate by the third", &roots, |it| is_signed_by(it, &third)).await;
    assert!(meet(&before, &last));
    assert_eq!(mesh.distributed_roots(), Some(roots));
    subscriber.hears(&mesh, "one");
}
