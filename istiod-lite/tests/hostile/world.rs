//! The control plane under attack, its API, and a client that means well.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, ServiceAccount};
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use mesh_proto::ads::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use mesh_proto::ads::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use mesh_proto::ca::istio_certificate_service_client::IstioCertificateServiceClient;
use mesh_proto::ca::{IstioCertificateRequest, IstioCertificateResponse};
use mesh_proto::security::AUTHORIZATION_TYPE;
use mesh_proto::workload::ADDRESS_TYPE;
use prost::bytes::Bytes;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

use super::NOTICED_WITHIN;
use super::standalone_support::{Server, crds, eventually_async};

/// For what is to happen at all.
pub const PATIENCE: Duration = Duration::from_secs(20);
const SERVER_NAME: &str = "istiod.istio-system.svc";
/// Between two changes that the bystander is to hear of.
const PACE: Duration = Duration::from_millis(200);
/// Whose rules change all the time.
const HEARTBEAT: &str = "shop/heartbeat";

pub struct Mesh {
    server: Server,
    pub client: Client,
    plane: Child,
    grpc: SocketAddr,
    http: SocketAddr,
    roots: String,
}

impl Drop for Mesh {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let end = log.lines().count();
            for line in log.lines().skip(end.saturating_sub(30)) {
                eprintln!("control plane: {}", line.chars().take(500).collect::<String>());
            }
        }
        // It may have ended already.
        let _ = self.plane.kill();
        let _ = self.plane.wait();
    }
}

impl Mesh {
    /// Namespaces `shop`, of all who mean well, and `pest`; the control plane is ready.
    pub async fn start() -> Self {
        let server = Server::start();
        let client = server.client().await;
        for object in crds() {
            write(&client, &object).await.unwrap();
        }
        for namespace in ["istio-system", "shop", "pest"] {
            write(&client, &namespace_named(namespace)).await.unwrap();
        }
        let [grpc, http] = free_addresses();
        let log = File::create(server.dir().join("log")).unwrap();
        let plane = Command::new(env!("CARGO_BIN_EXE_istiod-lite"))
            .env("KUBECONFIG", server.kubeconfig())
            .env("POD_NAME", "istiod-1")
            .env("ISTIOD_GRPC_ADDR", grpc.to_string())
            .env("ISTIOD_MONITORING_ADDR", http.to_string())
            .env("ISTIOD_WEBHOOK_ADDR", "127.0.0.1:0")
            .env("ROOT_CA_DIR", "/nonexistent")
            .stdin(Stdio::null())
            .stdout(log)
            .spawn()
            .unwrap();
        let mut mesh = Self { server, client, plane, grpc, http, roots: String::new() };
        for (namespace, account) in [("istio-system", "ztunnel"), ("shop", "app"), ("shop", "other"), ("pest", "pest")]
        {
            let metadata = json!({"name": account, "namespace": namespace});
            mesh.create(&json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata})).await.unwrap();
        }
        eventually_async("the control plane", async || mesh.get("/ready").filter(|it| it.starts_with("HTTP/1.1 200")))
            .await;
        let maps: Api<ConfigMap> = Api::namespaced(mesh.client.clone(), "shop");
        let roots = async || maps.get("istio-ca-root-cert").await.ok()?.data?.remove("root-cert.pem");
        mesh.roots = eventually_async("the roots", roots).await;
        mesh
    }

    /// Server-side apply, as somebody whose client does not ask about other managers.
    pub async fn apply(&self, object: &Value) -> Result<DynamicObject, kube::Error> {
        write(&self.client, object).await
    }

    pub async fn create(&self, object: &Value) -> Result<DynamicObject, kube::Error> {
        let (api, _) = api(&self.client, object);
        api.create(&PostParams::default(), &serde_json::from_value(object.clone()).unwrap()).await
    }

    pub async fn delete(&self, object: &Value) {
        let (api, name) = api(&self.client, object);
        api.delete(name, &Default::default()).await.unwrap();
    }

    /// What the API says of an object that it does not take.
    pub async fn refusal(&self, object: &Value) -> String {
        match self.create(object).await {
            Err(kube::Error::Api(status)) => format!("{} {}", status.code, status.message),
            Err(error) => panic!("no answer: {error}"),
            Ok(_) => panic!("{} {} was taken", object["kind"], object["metadata"]["name"]),
        }
    }

    /// The conditions of an object, `Type=Status Reason: message` each, once `is_it` holds of one. Those of a route's parents
    /// and a Gateway's listeners as well.
    pub async fn condition(&self, object: &Value, is_it: impl Fn(&str) -> bool) -> String {
        let (api, name) = api(&self.client, object);
        let end = Instant::now() + PATIENCE;
        let mut said = Vec::new();
        while Instant::now() < end {
            let status = api.get(name).await.map(|it| it.data["status"].clone()).unwrap_or_default();
            let inner = ["parents", "listeners"].map(|of| status[of].as_array().cloned().unwrap_or_default());
            let all = std::iter::once(&status).chain(inner.iter().flatten());
            said = all
                .flat_map(|of| of["conditions"].as_array().cloned().unwrap_or_default())
                .map(|it| text(&it))
                .collect();
            if let Some(found) = said.iter().find(|it| is_it(it)) {
                return found.clone();
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let said: Vec<String> = said.iter().map(|it| it.chars().take(500).collect()).collect();
        panic!("{} {name} says {said:?}", object["kind"]);
    }

    /// A pod that runs on `node`; one of no node is not scheduled.
    pub async fn pod(&self, namespace: &str, name: &str, account: &str, node: Option<&str>, more: Value) -> Pod {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let mut pod = json!({
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"serviceAccountName": account, "containers": [{"name": "c", "image": "i"}]},
        });
        pod["metadata"]["labels"] = more;
        pod["spec"]["nodeName"] = json!(node);
        let pod: Pod = serde_json::from_value(pod).unwrap();
        let pod = pods.create(&PostParams::default(), &pod).await.unwrap();
        if node.is_none() {
            return pod;
        }
        let ip = format!("10.0.{}.{}", name.len() % 250, 1 + name.bytes().map(u32::from).sum::<u32>() % 250);
        let ready = json!([{"type": "Ready", "status": "True"}]);
        let status = json!({"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": ready});
        let patch = Patch::Merge(json!({"status": status}));
        pods.patch_status(name, &PatchParams::default(), &patch).await.unwrap()
    }

    pub async fn token_for(&self, audience: &str, namespace: &str, account: &str, pod: Option<&Pod>) -> String {
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), namespace);
        let mut spec = json!({"audiences": [audience]});
        if let Some(pod) = pod {
            let meta = &pod.metadata;
            spec["boundObjectRef"] = json!({"apiVersion": "v1", "kind": "Pod", "name": meta.name, "uid": meta.uid});
        }
        let request: TokenRequest = serde_json::from_value(json!({"metadata": {}, "spec": spec})).unwrap();
        let answer = accounts.create_token_request(account, &PostParams::default(), &request).await.unwrap();
        answer.status.unwrap().token
    }

    /// As a kubelet projects it into the pod.
    pub async fn token(&self, namespace: &str, account: &str, pod: &Pod) -> String {
        self.token_for("istio-ca", namespace, account, Some(pod)).await
    }

    /// What the API signs tokens with.
    pub fn signing_key(&self) -> Vec<u8> {
        std::fs::read(self.server.dir().join("data/service-account.key")).unwrap()
    }

    /// A connection of its own.
    pub async fn connect(&self) -> Channel {
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&self.roots)).domain_name(SERVER_NAME);
        let endpoint = Endpoint::from_shared(format!("https://{}", self.grpc)).unwrap().tls_config(tls).unwrap();
        endpoint.connect().await.unwrap()
    }

    /// Opens a stream and sends `first`; the answers are there for who reads them.
    pub async fn discover(&self, token: &str, first: DeltaDiscoveryRequest) -> Result<Stream, Status> {
        self.discover_on(self.connect().await, token, first).await
    }

    pub async fn discover_on(&self, on: Channel, token: &str, first: DeltaDiscoveryRequest) -> Result<Stream, Status> {
        let (send, requests) = mpsc::channel(64);
        send.send(first).await.unwrap();
        let mut client = AggregatedDiscoveryServiceClient::new(on).max_decoding_message_size(64 << 20);
        let call = authorized(token, ReceiverStream::new(requests));
        let answers = client.delta_aggregated_resources(call).await?.into_inner();
        Ok(Stream { send, answers })
    }

    pub async fn sign(
        &self,
        token: &str,
        request: IstioCertificateRequest,
    ) -> Result<IstioCertificateResponse, Status> {
        let mut client = IstioCertificateServiceClient::new(self.connect().await).max_encoding_message_size(64 << 20);
        client.create_certificate(authorized(token, request)).await.map(tonic::Response::into_inner)
    }

    /// What it has written to, in KiB.
    pub fn memory(&self) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", self.plane.id())).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("Anonymous:")).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.server.dir().join("log")).unwrap()
    }

    /// Waits until all of `words` are in one line of the log.
    pub async fn logged(&self, words: &[&str]) {
        let said = async || self.log().lines().any(|line| words.iter().all(|word| line.contains(word))).then_some(());
        eventually_async(&format!("{words:?} in the log"), said).await;
    }

    /// 0 where there is none yet.
    pub fn metric(&self, name: &str) -> u64 {
        let text = self.get("/metrics").unwrap();
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.map_or(0, |value| value.parse().unwrap())
    }

    pub fn get(&self, path: &str) -> Option<String> {
        let mut stream = TcpStream::connect(self.http).ok()?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        Some(text)
    }
}

fn text(condition: &Value) -> String {
    let of = |field: &str| condition[field].as_str().unwrap_or_default().to_owned();
    format!("{}={} {}: {}", of("type"), of("status"), of("reason"), of("message"))
}

pub fn namespace_named(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
}

fn api<'a>(client: &Client, object: &'a Value) -> (Api<DynamicObject>, &'a str) {
    let (version, kind) = (object["apiVersion"].as_str().unwrap(), object["kind"].as_str().unwrap());
    let (group, version) = version.rsplit_once('/').unwrap_or(("", version));
    let plural = match kind.strip_suffix('y') {
        Some(stem) if kind != "Gateway" => format!("{}ies", stem.to_lowercase()),
        _ => format!("{}s", kind.to_lowercase()),
    };
    let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), &plural);
    let api = match object["metadata"]["namespace"].as_str() {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    };
    (api, object["metadata"]["name"].as_str().unwrap())
}

async fn write(client: &Client, object: &Value) -> Result<DynamicObject, kube::Error> {
    let (api, name) = api(client, object);
    api.patch(name, &PatchParams::apply("test").force(), &Patch::Apply(object)).await
}

/// Addresses nobody listens on a moment before.
fn free_addresses() -> [SocketAddr; 2] {
    let sockets = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    sockets.map(|socket| socket.local_addr().unwrap())
}

pub fn authorized<T>(token: &str, body: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(body);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    request
}

pub fn subscribe(type_url: &str) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest { type_url: type_url.into(), ..DeltaDiscoveryRequest::default() }
}

pub fn ack(response: &DeltaDiscoveryResponse) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest { response_nonce: response.nonce.clone(), ..subscribe(&response.type_url) }
}

pub struct Stream {
    pub send: mpsc::Sender<DeltaDiscoveryRequest>,
    pub answers: tonic::Streaming<DeltaDiscoveryResponse>,
}

impl Stream {
    pub async fn next(&mut self) -> Result<DeltaDiscoveryResponse, Status> {
        let answer = tokio::time::timeout(PATIENCE, self.answers.message()).await.expect("an answer in time");
        answer.map(|answer| answer.expect("an answer or a status"))
    }

    /// How it ends, whatever comes before; without an acknowledgement.
    pub async fn end(&mut self) -> Status {
        loop {
            if let Err(status) = self.next().await {
                return status;
            }
        }
    }
}

/// A ztunnel of node `n-b` that acknowledges everything, while a policy changes all the time.
pub struct Bystander {
    held: Arc<Mutex<HashMap<String, Bytes>>>,
    following: tokio::task::JoinHandle<()>,
    beating: tokio::task::JoinHandle<Seen>,
    stop: watch::Sender<bool>,
}

/// What was found while it was served.
#[derive(Debug, Default)]
pub struct Seen {
    pub changes: u64,
    pub slowest: Duration,
    /// In KiB.
    pub most_memory: u64,
}

impl Bystander {
    pub async fn start(mesh: &Mesh) -> Self {
        let ztunnel = mesh.pod("istio-system", "zt-b", "ztunnel", Some("n-b"), json!({})).await;
        let token = mesh.token("istio-system", "ztunnel", &ztunnel).await;
        let open = async || mesh.discover(&token, subscribe(ADDRESS_TYPE)).await.ok();
        let Stream { send, mut answers } = eventually_async("a stream of the good client", open).await;
        send.send(subscribe(AUTHORIZATION_TYPE)).await.unwrap();
        let held: Arc<Mutex<HashMap<String, Bytes>>> = Arc::default();
        let (news, heard) = watch::channel(());
        let following = tokio::spawn({
            let held = Arc::clone(&held);
            async move {
                while let Some(answer) = answers.message().await.expect("the good client's stream goes on") {
                    {
                        let mut held = held.lock().unwrap();
                        for resource in &answer.resources {
                            let body = resource.resource.as_ref().map(|any| Bytes::from(any.value.clone()));
                            held.insert(resource.name.clone(), body.unwrap_or_default());
                        }
                        answer.removed_resources.iter().for_each(|name| _ = held.remove(name));
                    }
                    news.send_replace(());
                    if send.send(ack(&answer)).await.is_err() {
                        return;
                    }
                }
            }
        });
        let (stop, stopped) = watch::channel(false);
        let pid = mesh.plane.id();
        let beating = tokio::spawn(beat(mesh.client.clone(), Arc::clone(&held), heard, stopped, pid));
        Self { held, following, beating, stop }
    }

    /// Waits for a resource of which `is_it` holds.
    pub async fn has(&self, name: &str, is_it: impl Fn(&[u8]) -> bool) {
        let found = async || {
            assert!(!self.beating.is_finished() && !self.following.is_finished(), "the good client is not served");
            self.held.lock().unwrap().get(name).is_some_and(|body| is_it(body)).then_some(())
        };
        eventually_async(name, found).await;
    }

    /// The test goes on until the last change is heard of.
    pub async fn end(self, mesh: &Mesh) -> Seen {
        self.stop.send_replace(true);
        let seen = self.beating.await.expect("changes are heard of");
        assert!(!self.following.is_finished(), "the good client's stream goes on");
        self.following.abort();
        Seen { most_memory: seen.most_memory.max(mesh.memory()), ..seen }
    }
}

async fn beat(
    client: Client,
    held: Arc<Mutex<HashMap<String, Bytes>>>,
    mut heard: watch::Receiver<()>,
    mut stopped: watch::Receiver<bool>,
    pid: u32,
) -> Seen {
    let mut seen = Seen::default();
    let mut done = false;
    while !done {
        done = *stopped.borrow_and_update();
        seen.changes += 1;
        let mark = format!("beat-{}-end", seen.changes);
        let rules = json!([{"from": [{"source": {"namespaces": [mark]}}]}]);
        let policy = json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "heartbeat", "namespace": "shop"}, "spec": {"action": "ALLOW", "rules": rules},
        });
        write(&client, &policy).await.expect("the API takes a change");
        let start = Instant::now();
        let is_there = |held: &HashMap<String, Bytes>| {
            held.get(HEARTBEAT).is_some_and(|body| body.windows(mark.len()).any(|found| found == mark.as_bytes()))
        };
        while !is_there(&held.lock().unwrap()) {
            let left = (NOTICED_WITHIN * 2).saturating_sub(start.elapsed());
            let more = tokio::time::timeout(left, heard.changed()).await;
            assert!(matches!(more, Ok(Ok(()))), "{mark} is not heard of within {:?}", start.elapsed());
        }
        seen.slowest = seen.slowest.max(start.elapsed());
        let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("the control plane lives");
        let now = text.lines().find_map(|line| line.strip_prefix("Anonymous:")).expect("its memory");
        seen.most_memory = seen.most_memory.max(now.trim().trim_end_matches(" kB").parse().expect("a number"));
        // The pace of the changes, not a wait for anything.
        let _ = tokio::time::timeout(PACE, stopped.changed()).await;
    }
    seen
}
