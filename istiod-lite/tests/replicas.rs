//! Two control planes on one API server: one of them writes what follows from the world, each what its nodes say, and
//! what waits for proxies waits for those of both.

mod standalone_support;

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use istiod_lite::leader::LEASE;
use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client};
use mesh_proto::ads::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use mesh_proto::ads::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use mesh_proto::enrolment::enrolment_service_client::EnrolmentServiceClient;
use mesh_proto::enrolment::pod_state::State;
use mesh_proto::enrolment::{EnrolmentReport, POD_ENROLMENT_TYPE, PodEnrolment, PodState};
use mesh_proto::security::AUTHORIZATION_TYPE;
use mesh_proto::workload::{ADDRESS_TYPE, Address, TunnelProtocol, address};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use prost::Message as _;
use serde_json::{Value, json};
use standalone_support::{Server, crds, eventually_async};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

/// For anything but a leader that has to be found dead.
const PATIENCE: Duration = Duration::from_secs(20);
const LEASE_TIME: Duration = Duration::from_secs(15);
const REDIRECTION: &str = "ambient.istio.io/redirection";
const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";

/// A control plane in a process of its own, as pod `istiod-<name>`.
struct Replica {
    name: &'static str,
    child: Child,
    grpc: SocketAddr,
    http: SocketAddr,
}

impl Drop for Replica {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Replica {
    fn metric(&self, line: &str) -> Option<String> {
        let text = self.get("/metrics")?;
        text.lines().find_map(|of| of.strip_prefix(line)?.strip_prefix(' ')).map(str::to_owned)
    }

    fn get(&self, path: &str) -> Option<String> {
        let mut stream = TcpStream::connect(self.http).ok()?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        Some(text)
    }

    fn leads(&self) -> bool {
        self.metric(&format!("leader_election_master_status{{name=\"{LEASE}\"}}")).as_deref() == Some("1")
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), signal).unwrap();
    }
}

/// What was said of an object, one after the other.
type History = Arc<Mutex<BTreeMap<String, Vec<String>>>>;

struct Mesh {
    server: Server,
    client: Client,
}

impl Mesh {
    async fn start() -> Self {
        let server = Server::start();
        let client = server.client().await;
        let mesh = Self { server, client };
        for object in crds() {
            mesh.apply(&object).await;
        }
        for namespace in ["istio-system", "shop"] {
            mesh.apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})).await;
        }
        for account in ["istiod", "ztunnel"] {
            let metadata = json!({"name": account, "namespace": "istio-system"});
            mesh.apply(&json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata})).await;
        }
        let token = mesh.token("istio-system", "istiod", None).await;
        std::fs::write(mesh.server.dir().join("token"), token).unwrap();
        mesh
    }

    async fn apply(&self, object: &Value) {
        let text = |field: &str| object[field].as_str().unwrap().to_owned();
        let (version, kind) = (text("apiVersion"), text("kind"));
        let (group, version) = version.rsplit_once('/').unwrap_or(("", &version));
        let plural = match &*kind {
            "AuthorizationPolicy" => "authorizationpolicies".to_owned(),
            _ => format!("{}s", kind.to_lowercase()),
        };
        let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, &kind), &plural);
        let api: Api<DynamicObject> = match object["metadata"]["namespace"].as_str() {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, &resource),
            None => Api::all_with(self.client.clone(), &resource),
        };
        let name = object["metadata"]["name"].as_str().unwrap();
        api.patch(name, &PatchParams::apply("test"), &Patch::Apply(object)).await.unwrap();
    }

    async fn token(&self, namespace: &str, account: &str, pod: Option<&Pod>) -> String {
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), namespace);
        let mut spec = json!({"audiences": ["istio-ca"]});
        if let Some(pod) = pod {
            let meta = &pod.metadata;
            spec["boundObjectRef"] = json!({"apiVersion": "v1", "kind": "Pod", "name": meta.name, "uid": meta.uid});
        }
        let request: TokenRequest = serde_json::from_value(json!({"metadata": {}, "spec": spec})).unwrap();
        let request = async || accounts.create_token_request(account, &PostParams::default(), &request).await.ok();
        eventually_async("the account", request).await.status.unwrap().token
    }

    /// Starts a replica; it is ready, and the others can find it.
    async fn replica(&self, name: &'static str) -> Replica {
        let [grpc, http] = free_addresses();
        let child = Command::new(env!("CARGO_BIN_EXE_istiod-lite"))
            .env("KUBECONFIG", self.server.kubeconfig())
            .env("POD_NAME", format!("istiod-{name}"))
            .env("ISTIOD_GRPC_ADDR", grpc.to_string())
            .env("ISTIOD_WEBHOOK_ADDR", "127.0.0.1:0")
            .env("ISTIOD_MONITORING_ADDR", http.to_string())
            .env("ISTIOD_WEBHOOK_ADDR", "127.0.0.1:0")
            .env("ROOT_CA_DIR", "/nonexistent")
            .env("AUTH_TOKEN", self.server.dir().join("token"))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let replica = Replica { name, child, grpc, http };
        let ready = async || replica.get("/ready").filter(|answer| answer.starts_with("HTTP/1.1 200"));
        eventually_async("a replica", ready).await;
        self.apply(&json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": format!("istiod-{name}"), "namespace": "istio-system",
                "labels": {"kubernetes.io/service-name": "istiod"}},
            "addressType": "IPv4", "ports": [{"name": "grpc-xds", "port": grpc.port()}],
            "endpoints": [{"addresses": ["127.0.0.1"], "conditions": {"ready": true},
                "targetRef": {"kind": "Pod", "namespace": "istio-system", "name": format!("istiod-{name}")}}],
        }))
        .await;
        replica
    }

    /// As the endpoint controller finds that it is gone.
    async fn is_gone(&self, name: &str) {
        let slices: Api<EndpointSlice> = Api::namespaced(self.client.clone(), "istio-system");
        slices.delete(&format!("istiod-{name}"), &DeleteParams::default()).await.unwrap();
    }

    async fn holder(&self) -> Option<String> {
        let leases: Api<Lease> = Api::namespaced(self.client.clone(), "istio-system");
        leases.get(LEASE).await.ok()?.spec?.holder_identity
    }

    async fn leads(&self, replica: &Replica, patience: Duration) {
        let end = Instant::now() + patience;
        while !replica.leads() {
            assert!(Instant::now() < end, "{} does not lead within {patience:?}", replica.name);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(self.holder().await, Some(format!("istiod-{}", replica.name)));
    }

    async fn policy(&self, name: &str) {
        let rules = json!([{"from": [{"source": {"namespaces": [name]}}]}]);
        self.apply(&json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": name, "namespace": "shop"}, "spec": {"action": "ALLOW", "rules": rules},
        }))
        .await;
    }

    /// Writes down each status of each policy, until the test ends.
    fn follow_policies(&self) -> History {
        let history = History::default();
        let gvk = GroupVersionKind::gvk("security.istio.io", "v1", "AuthorizationPolicy");
        let resource = ApiResource::from_gvk_with_plural(&gvk, "authorizationpolicies");
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource);
        let log = Arc::clone(&history);
        // Ends with the test's runtime.
        tokio::spawn(async move {
            let mut events = std::pin::pin!(watcher::watcher(api, watcher::Config::default()).default_backoff());
            while let Some(event) = events.next().await {
                let Ok(Event::Apply(object) | Event::InitApply(object)) = event else { continue };
                let said = object.data["status"]["conditions"].as_array().cloned().unwrap_or_default();
                let said: Vec<String> = said.iter().map(|of| format!("{}: {}", of["status"], of["message"])).collect();
                let mut log = log.lock().unwrap();
                let of = log.entry(object.metadata.name.unwrap_or_default()).or_default();
                if !said.is_empty() && of.last() != Some(&said.join(", ")) {
                    of.push(said.join(", "));
                }
            }
        });
        history
    }

    /// What a pod needs of the mesh: the roots.
    async fn roots(&self) -> String {
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), "shop");
        let roots = async || maps.get("istio-ca-root-cert").await.ok()?.data?.get("root-cert.pem").cloned();
        eventually_async("the roots", roots).await
    }

    async fn connect(&self, replica: &Replica, token: String) -> Proxy {
        let name = "istiod.istio-system.svc";
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(self.roots().await)).domain_name(name);
        let endpoint = Endpoint::from_shared(format!("https://{}", replica.grpc)).unwrap().tls_config(tls).unwrap();
        let channel = endpoint.connect().await.unwrap();
        let (send, requests) = mpsc::channel(16);
        let mut client = AggregatedDiscoveryServiceClient::new(channel.clone());
        let call = authorized(&token, ReceiverStream::new(requests));
        // Its headers come with the first answer.
        let responses =
            tokio::spawn(async move { client.delta_aggregated_resources(call).await.unwrap().into_inner() });
        Proxy { channel, token, send, responses: Answers::Awaited(responses) }
    }

    /// A pod that runs on node `n1`.
    async fn pod(&self, namespace: &str, name: &str, account: &str, ip: &str) -> Pod {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let pod = serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"nodeName": "n1", "serviceAccountName": account, "containers": [{"name": "c", "image": "i"}]},
        }));
        let pod: Pod = pod.unwrap();
        let create = async || pods.create(&PostParams::default(), &pod).await.ok();
        eventually_async("the account", create).await;
        let ready = json!([{"type": "Ready", "status": "True"}]);
        let status = json!({"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": ready});
        let patch = Patch::Merge(json!({"status": status}));
        pods.patch_status(name, &PatchParams::default(), &patch).await.unwrap()
    }

    async fn label_shop(&self, mode: Value) {
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        let patch = Patch::Merge(json!({"metadata": {"labels": {DATAPLANE_MODE: mode}}}));
        namespaces.patch("shop", &PatchParams::default(), &patch).await.unwrap();
    }

    /// Waits for the annotation to be this.
    async fn annotated(&self, pod: &str, wanted: Option<&str>) {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), "shop");
        let found = async || {
            let pod = pods.get(pod).await.ok()?;
            let annotations = pod.metadata.annotations.unwrap_or_default();
            (annotations.get(REDIRECTION).map(String::as_str) == wanted).then_some(())
        };
        eventually_async("the annotation", found).await;
    }
}

fn authorized<T>(token: &str, body: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(body);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    request
}

/// Addresses nobody listens on a moment before.
fn free_addresses() -> [SocketAddr; 2] {
    let sockets = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    sockets.map(|socket| socket.local_addr().unwrap())
}

enum Answers {
    Awaited(tokio::task::JoinHandle<tonic::Streaming<DeltaDiscoveryResponse>>),
    Open(Box<tonic::Streaming<DeltaDiscoveryResponse>>),
}

/// A client of one replica that acknowledges when the test says so.
struct Proxy {
    channel: Channel,
    token: String,
    send: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Answers,
}

impl Proxy {
    async fn subscribe(&self, type_url: &str) {
        let request = DeltaDiscoveryRequest { type_url: type_url.into(), ..DeltaDiscoveryRequest::default() };
        self.send.send(request).await.unwrap();
    }

    async fn next(&mut self) -> DeltaDiscoveryResponse {
        if let Answers::Awaited(opening) = &mut self.responses {
            self.responses = Answers::Open(Box::new(opening.await.unwrap()));
        }
        let Answers::Open(responses) = &mut self.responses else { unreachable!("it was opened above") };
        let response = tokio::time::timeout(PATIENCE, responses.message()).await.expect("an answer in time");
        response.unwrap().expect("the stream goes on")
    }

    async fn ack(&self, response: &DeltaDiscoveryResponse) {
        let (type_url, response_nonce) = (response.type_url.clone(), response.nonce.clone());
        self.send.send(DeltaDiscoveryRequest { type_url, response_nonce, ..Default::default() }).await.unwrap();
    }

    /// Acknowledges everything until the answer that `is_it`, which is returned.
    async fn next_that(&mut self, is_it: impl Fn(&DeltaDiscoveryResponse) -> bool) -> DeltaDiscoveryResponse {
        loop {
            let response = self.next().await;
            if is_it(&response) {
                return response;
            }
            self.ack(&response).await;
        }
    }

    async fn report(&self, pods: Vec<PodState>) {
        let mut client = EnrolmentServiceClient::new(self.channel.clone());
        client.report(authorized(&self.token, EnrolmentReport { pods })).await.unwrap();
    }
}

fn has(name: &str) -> impl Fn(&DeltaDiscoveryResponse) -> bool {
    move |response| response.resources.iter().any(|resource| resource.name == name)
}

/// What is said of this policy last, once that is `wanted`.
async fn says(history: &History, policy: &str, patience: Duration, wanted: impl Fn(&str) -> bool) -> Duration {
    let start = Instant::now();
    loop {
        let said = history.lock().unwrap().get(policy).and_then(|said| said.last().cloned()).unwrap_or_default();
        if wanted(&said) {
            return start.elapsed();
        }
        assert!(start.elapsed() < patience, "{policy}: {said}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

const LATE: &str = "not every proxy has acknowledged it";

fn is_accepted(said: &str) -> bool {
    said.contains("True") && !said.contains(LATE)
}

#[tokio::test(flavor = "multi_thread")]
async fn one_replica_writes_and_another_takes_over() {
    let mesh = Mesh::start().await;
    let history = mesh.follow_policies();
    let mut a = mesh.replica("a").await;
    mesh.leads(&a, PATIENCE).await;
    let mut b = mesh.replica("b").await;
    mesh.policy("one").await;
    says(&history, "one", PATIENCE, is_accepted).await;
    assert!(a.leads() && !b.leads());

    // A policy is accepted when the proxies of the other replica have it, too.
    let mut proxy = mesh.connect(&b, mesh.token("shop", "default", None).await).await;
    proxy.subscribe(AUTHORIZATION_TYPE).await;
    let first = proxy.next().await;
    proxy.ack(&first).await;
    mesh.policy("two").await;
    let second = proxy.next_that(has("shop/two")).await;
    says(&history, "two", PATIENCE, |said| said.contains(LATE)).await;
    proxy.ack(&second).await;
    says(&history, "two", PATIENCE, is_accepted).await;
    drop(proxy);

    // The leader dies without a word: nobody writes until its time is over.
    a.signal(Signal::SIGKILL);
    a.child.wait().unwrap();
    mesh.is_gone("a").await;
    mesh.policy("three").await;
    let taken = says(&history, "three", LEASE_TIME + PATIENCE, is_accepted).await;
    assert!(taken >= LEASE_TIME / 2, "after {taken:?} the Lease was still the other's");
    mesh.leads(&b, PATIENCE).await;

    // It comes back as a follower; and the leader that is told to end gives way at once.
    let a = mesh.replica("a").await;
    assert!(!a.leads());
    b.signal(Signal::SIGTERM);
    mesh.leads(&a, LEASE_TIME / 3).await;
    assert!(b.child.wait().unwrap().success());
    mesh.is_gone("b").await;
    mesh.policy("four").await;
    says(&history, "four", PATIENCE, is_accepted).await;

    let history = history.lock().unwrap();
    for (policy, said) in &*history {
        let expected = if policy == "two" { 2 } else { 1 };
        assert_eq!(said.len(), expected, "{policy} was said once, and nothing else of it: {said:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_leaves_when_the_proxies_of_both_replicas_know() {
    let mesh = Mesh::start().await;
    let a = mesh.replica("a").await;
    mesh.leads(&a, PATIENCE).await;
    let b = mesh.replica("b").await;
    let app = mesh.pod("shop", "app", "default", "10.0.0.9").await;
    let uid = app.metadata.uid.unwrap();
    let ztunnel = mesh.pod("istio-system", "zt", "ztunnel", "10.0.0.8").await;

    // Its node is connected to the one that does not lead, a peer to the leader.
    let mut node = mesh.connect(&b, mesh.token("istio-system", "ztunnel", Some(&ztunnel)).await).await;
    node.subscribe(POD_ENROLMENT_TYPE).await;
    let mut peer = mesh.connect(&a, mesh.token("shop", "default", None).await).await;
    peer.subscribe(ADDRESS_TYPE).await;
    mesh.label_shop("ambient".into()).await;
    let enrolled = node.next_that(has(&uid)).await;
    let resource = enrolled.resources[0].resource.as_ref().unwrap();
    let epoch = PodEnrolment::decode(&*resource.value).unwrap().epoch;
    node.ack(&enrolled).await;
    let enrolled = PodState { uid: uid.clone(), state: State::Enrolled.into(), reason: String::new(), epoch };
    node.report(vec![enrolled]).await;
    mesh.annotated("app", Some("enabled")).await;

    // The peer takes its time to learn that the pod left.
    let spoken = peer.next_that(|response| speaks_hbone(response) == Some(true)).await;
    peer.ack(&spoken).await;
    mesh.label_shop(Value::Null).await;
    mesh.annotated("app", None).await;
    let unspoken = peer.next_that(|response| speaks_hbone(response) == Some(false)).await;
    let withdrawn = async |node: &mut Proxy| {
        let is_it = |response: &DeltaDiscoveryResponse| response.removed_resources.contains(&uid);
        node.next_that(is_it).await
    };
    let early = tokio::time::timeout(Duration::from_secs(1), withdrawn(&mut node)).await;
    assert!(early.is_err(), "the peer still speaks HBONE to it");
    peer.ack(&unspoken).await;
    let in_time = tokio::time::timeout(Duration::from_secs(2), withdrawn(&mut node)).await;
    assert!(in_time.is_ok(), "it knows now");
}

/// Whether the pod is said to; `None`: nothing is said of it.
fn speaks_hbone(response: &DeltaDiscoveryResponse) -> Option<bool> {
    let resource = response.resources.iter().find(|resource| resource.name == "Kubernetes//Pod/shop/app")?;
    match Address::decode(&*resource.resource.as_ref()?.value).unwrap().r#type? {
        address::Type::Workload(workload) => Some(workload.tunnel_protocol() == TunnelProtocol::Hbone),
        address::Type::Service(_) => None,
    }
}
