//! Two control planes of different revisions on one API server, installed from the manifests and with no more rights than
//! these give: each deploys its own Gateways, one of them writes what there is once, and neither writes against the other.

mod standalone_support;

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use istiod_lite::leader::{LEASE, MESH_LEASE};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, ResourceExt as _};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use standalone_support::{Server, crds, eventually_async};

/// For a control plane to find that another is gone, and to take over.
const TAKEOVER: Duration = Duration::from_secs(60);
/// What the sed of `manifests/revision.yaml` is told.
const REVISION: &str = "next";
const KINDS: &[(&str, &str, &str, &str)] = &[
    ("gateway.networking.k8s.io", "v1", "Gateway", "gateways"),
    ("gateway.networking.k8s.io", "v1", "GatewayClass", "gatewayclasses"),
    ("gateway.networking.k8s.io", "v1", "HTTPRoute", "httproutes"),
    ("security.istio.io", "v1", "AuthorizationPolicy", "authorizationpolicies"),
    ("admissionregistration.k8s.io", "v1", "ValidatingWebhookConfiguration", "validatingwebhookconfigurations"),
    ("apps", "v1", "Deployment", "deployments"),
    ("", "v1", "Service", "services"),
    ("", "v1", "ServiceAccount", "serviceaccounts"),
    ("", "v1", "ConfigMap", "configmaps"),
];

/// A control plane in a process of its own.
struct ControlPlane {
    child: Child,
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl ControlPlane {
    fn end(mut self) {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

/// What has happened to an object: a version for each time it was written, and whether it was deleted.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Life {
    versions: Vec<String>,
    deleted: bool,
}

type Lives = Arc<Mutex<BTreeMap<String, Life>>>;

struct Mesh {
    server: Server,
    client: Client,
    kubeconfig: PathBuf,
    lives: Lives,
}

fn manifest(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests").join(name)
}

fn objects(text: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(text).unwrap()
}

fn plural(kind: &str) -> String {
    let kind = kind.to_lowercase();
    match kind.strip_suffix("cy") {
        Some(stem) => format!("{stem}cies"),
        None if kind.ends_with('s') => format!("{kind}es"),
        None => format!("{kind}s"),
    }
}

impl Mesh {
    async fn start() -> Self {
        let server = Server::start();
        let client = server.client().await;
        let kubeconfig = server.dir().join("istiod.kubeconfig");
        let mesh = Self { server, client, kubeconfig, lives: Lives::default() };
        for object in crds() {
            mesh.apply(&object).await;
        }
        mesh.apply_all(&std::fs::read_to_string(manifest("install.yaml")).unwrap()).await;
        // As the manifest says.
        let sed = Command::new("sed").arg(format!("s/canary/{REVISION}/g")).arg(manifest("revision.yaml")).output();
        mesh.apply_all(&String::from_utf8(sed.unwrap().stdout).unwrap()).await;
        mesh.namespace("shop").await;

        std::fs::write(mesh.server.dir().join("token"), mesh.token(&["istio-ca"]).await).unwrap();
        let administrator = std::fs::read_to_string(mesh.server.kubeconfig()).unwrap();
        let mut kubeconfig: Value = serde_saphyr::from_str(&administrator).unwrap();
        kubeconfig["users"][0]["user"] = json!({"token": mesh.token(&[]).await});
        std::fs::write(&mesh.kubeconfig, kubeconfig.to_string()).unwrap();
        for (group, version, kind, plural) in KINDS {
            mesh.follow(ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural));
        }
        mesh
    }

    fn api(&self, object: &Value) -> Api<DynamicObject> {
        let text = |field: &str| object[field].as_str().unwrap().to_owned();
        let (version, kind) = (text("apiVersion"), text("kind"));
        let (group, version) = version.rsplit_once('/').unwrap_or(("", &version));
        let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, &kind), &plural(&kind));
        match object["metadata"]["namespace"].as_str() {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, &resource),
            None => Api::all_with(self.client.clone(), &resource),
        }
    }

    async fn apply(&self, object: &Value) {
        let (api, name) = (self.api(object), object["metadata"]["name"].as_str().unwrap());
        // A definition takes a moment until it is served.
        let apply = async || api.patch(name, &PatchParams::apply("test"), &Patch::Apply(object)).await.ok();
        eventually_async(&format!("{} {name} to be taken", object["kind"]), apply).await;
    }

    async fn apply_all(&self, text: &str) {
        for object in objects(text) {
            self.apply(&object).await;
        }
    }

    async fn namespace(&self, name: &str) {
        self.apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})).await;
    }

    /// Of the control planes' account.
    async fn token(&self, audiences: &[&str]) -> String {
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), "istio-system");
        let request = json!({"metadata": {}, "spec": {"audiences": audiences}});
        let request: TokenRequest = serde_json::from_value(request).unwrap();
        let token = accounts.create_token_request("istiod", &PostParams::default(), &request).await.unwrap();
        token.status.unwrap().token
    }

    /// Writes down what happens to all objects of a kind, until the test ends.
    fn follow(&self, resource: ApiResource) {
        let (api, lives) = (Api::<DynamicObject>::all_with(self.client.clone(), &resource), Arc::clone(&self.lives));
        // Ends with the test's runtime.
        tokio::spawn(async move {
            let mut events = std::pin::pin!(watcher::watcher(api, watcher::Config::default()).default_backoff());
            while let Some(event) = events.next().await {
                let (object, deleted) = match event {
                    Ok(Event::Apply(object) | Event::InitApply(object)) => (object, false),
                    Ok(Event::Delete(object)) => (object, true),
                    _ => continue,
                };
                let namespace = object.namespace().unwrap_or_default();
                let mut lives = lives.lock().unwrap();
                let life = lives.entry(format!("{} {namespace}/{}", resource.kind, object.name_any())).or_default();
                let version = object.resource_version().unwrap_or_default();
                if life.versions.last() != Some(&version) {
                    life.versions.push(version);
                }
                life.deleted |= deleted;
            }
        });
    }

    fn life(&self, of: &str) -> Life {
        self.lives.lock().unwrap().get(of).cloned().unwrap_or_default()
    }

    /// What its Deployment in the cluster says of its environment, in a process that is ready and can be found.
    async fn control_plane(&self, deployment: &str) -> ControlPlane {
        let deployments: Api<Deployment> = Api::namespaced(self.client.clone(), "istio-system");
        let pod = deployments.get(deployment).await.unwrap().spec.unwrap().template.spec.unwrap();
        let env = pod.containers[0].env.iter().flatten().filter_map(|of| Some((of.name.clone(), of.value.clone()?)));
        let [grpc, http, webhook] = free_addresses();
        let child = Command::new(env!("CARGO_BIN_EXE_istiod-lite"))
            .envs(env)
            .env("KUBECONFIG", &self.kubeconfig)
            .env("POD_NAME", format!("{deployment}-0"))
            .env("ISTIOD_GRPC_ADDR", grpc.to_string())
            .env("ISTIOD_MONITORING_ADDR", http.to_string())
            .env("ISTIOD_WEBHOOK_ADDR", webhook.to_string())
            .env("ROOT_CA_DIR", "/nonexistent")
            .env("AUTH_TOKEN", self.server.dir().join("token"))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let started = ControlPlane { child };
        let ready = async || get(http, "/ready").filter(|answer| answer.starts_with("HTTP/1.1 200"));
        eventually_async("a control plane", ready).await;
        self.apply(&json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": deployment, "namespace": "istio-system",
                "labels": {"kubernetes.io/service-name": deployment}},
            "addressType": "IPv4", "ports": [{"name": "grpc-xds", "port": grpc.port()}],
            "endpoints": [{"addresses": ["127.0.0.1"], "conditions": {"ready": true},
                "targetRef": {"kind": "Pod", "namespace": "istio-system", "name": format!("{deployment}-0")}}],
        }))
        .await;
        started
    }

    /// As the endpoint controller finds that it is gone.
    async fn is_gone(&self, deployment: &str) {
        let slices: Api<EndpointSlice> = Api::namespaced(self.client.clone(), "istio-system");
        slices.delete(deployment, &DeleteParams::default()).await.unwrap();
    }

    /// Waits for the Lease to be of this one's.
    async fn leads(&self, lease: &str, deployment: &str) {
        let leases: Api<Lease> = Api::namespaced(self.client.clone(), "istio-system");
        let (end, wanted) = (Instant::now() + TAKEOVER, Some(format!("{deployment}-0")));
        loop {
            let holder = leases.get_opt(lease).await.unwrap().and_then(|lease| lease.spec?.holder_identity);
            if holder == wanted {
                return;
            }
            assert!(Instant::now() < end, "{lease} is {holder:?}'s and not {wanted:?}'s");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn gateway(&self, name: &str, revision: Option<&str>) {
        let mut gateway = json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
            "metadata": {"name": name, "namespace": "shop"},
            "spec": {"gatewayClassName": "istio-waypoint",
                "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}]},
        });
        if let Some(revision) = revision {
            gateway["metadata"]["labels"]["istio.io/rev"] = revision.into();
        }
        self.apply(&gateway).await;
    }

    async fn deployment(&self, name: &str) -> Option<Deployment> {
        Api::<Deployment>::namespaced(self.client.clone(), "shop").get_opt(name).await.unwrap()
    }

    /// Waits for a waypoint to be one that asks this control plane; a pod of it is then ready.
    async fn is_deployed_by(&self, name: &str, service: &str) -> Deployment {
        let address = format!("{service}.istio-system.svc:15012");
        let asks = async || {
            let deployment = self.deployment(name).await?;
            let container = deployment.spec.as_ref()?.template.spec.as_ref()?.containers.first()?.clone();
            let of = |name: &str| container.env.iter().flatten().find(|of| of.name == name)?.value.clone();
            let both = ["XDS_ADDRESS", "CA_ADDRESS"].map(of);
            both.iter().all(|found| found.as_ref() == Some(&address)).then_some(deployment)
        };
        let deployment = eventually_async(&format!("{name} to ask {service}"), asks).await;
        let ready = Patch::Merge(json!({"status": {"replicas": 1, "readyReplicas": 1}}));
        let api: Api<Deployment> = Api::namespaced(self.client.clone(), "shop");
        api.patch_status(name, &PatchParams::default(), &ready).await.unwrap();
        self.condition("Gateway", name, "Programmed").await;
        deployment
    }

    /// Waits for the API server to be told by which roots it knows a webhook.
    async fn is_trusted(&self, webhook: &str) {
        let kind = json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration"});
        let api = self.api(&kind);
        let told = async || {
            let object = api.get(webhook).await.ok()?;
            object.data["webhooks"][0]["clientConfig"]["caBundle"].as_str().map(|_| ())
        };
        eventually_async(&format!("the roots of {webhook}"), told).await;
    }

    /// Waits for a condition to be true.
    async fn condition(&self, kind: &str, name: &str, wanted: &str) {
        let version = if kind == "Gateway" { "gateway.networking.k8s.io/v1" } else { "security.istio.io/v1" };
        let api = self.api(&json!({"apiVersion": version, "kind": kind, "metadata": {"namespace": "shop"}}));
        let is_true = async || {
            let object = api.get(name).await.ok()?;
            let conditions = object.data["status"]["conditions"].as_array()?.clone();
            conditions.iter().any(|of| of["type"] == wanted && of["status"] == "True").then_some(())
        };
        eventually_async(&format!("{wanted} of {kind} {name}"), is_true).await;
    }

    async fn policy(&self, name: &str) {
        self.apply(&json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": name, "namespace": "shop"}, "spec": {"action": "DENY", "rules": []},
        }))
        .await;
        self.condition("AuthorizationPolicy", name, "ZtunnelAccepted").await;
    }

    /// Has every control plane look at the world again: a namespace comes, and its own waypoint and roots do.
    async fn look_again(&self, round: &str, revisions: &[(Option<&str>, &str)]) {
        self.namespace(round).await;
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), round);
        eventually_async("the roots", async || maps.get("istio-ca-root-cert").await.ok()).await;
        for (revision, service) in revisions {
            let name = format!("{round}-{service}");
            self.gateway(&name, *revision).await;
            self.is_deployed_by(&name, service).await;
        }
    }

    /// What has been written of everything but what belongs to a round of [`Self::look_again`].
    fn written(&self) -> BTreeMap<String, Life> {
        let mut lives = self.lives.lock().unwrap().clone();
        lives.retain(|of, _| !of.contains("round-"));
        lives
    }

    /// Nothing is written any more, although everybody looks.
    async fn is_settled(&self, round: &str, revisions: &[(Option<&str>, &str)]) {
        self.look_again(&format!("round-{round}-a"), revisions).await;
        let before = self.written();
        self.look_again(&format!("round-{round}-b"), revisions).await;
        let after = self.written();
        let changed: Vec<_> = after.iter().filter(|(of, life)| before.get(*of) != Some(*life)).collect();
        assert!(changed.is_empty(), "round {round}: {changed:#?}");
    }

    async fn label(&self, gateway: &str, revision: Value) {
        let api = self.api(&json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway", "metadata": {"namespace": "shop"},
        }));
        let patch = Patch::Merge(json!({"metadata": {"labels": {"istio.io/rev": revision}}}));
        api.patch(gateway, &PatchParams::default(), &patch).await.unwrap();
    }
}

fn get(address: SocketAddr, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes()).ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    Some(text)
}

/// Addresses nobody listens on a moment before.
fn free_addresses() -> [SocketAddr; 3] {
    let sockets = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    sockets.map(|socket| socket.local_addr().unwrap())
}

const DEFAULT: &str = "istiod";
const NEXT: &str = "istiod-next";
const BOTH: &[(Option<&str>, &str)] = &[(None, DEFAULT), (Some(REVISION), NEXT)];

#[tokio::test(flavor = "multi_thread")]
async fn each_revision_deploys_its_own_and_none_writes_against_another() {
    let mesh = Mesh::start().await;
    let default = mesh.control_plane(DEFAULT).await;
    mesh.leads(MESH_LEASE, DEFAULT).await;

    // What is of a revision that is not there is left for it.
    mesh.gateway("later", Some(REVISION)).await;
    mesh.gateway("now", None).await;
    let now = mesh.is_deployed_by("now", DEFAULT).await;
    assert_eq!(now.labels().get("istio.io/rev"), None);
    assert!(mesh.deployment("later").await.is_none(), "it came first");
    assert!(mesh.life("Gateway shop/later").versions.len() <= 1, "nobody has said anything of it");

    let next = mesh.control_plane(NEXT).await;
    mesh.leads(&format!("{LEASE}-{REVISION}"), NEXT).await;
    let later = mesh.is_deployed_by("later", NEXT).await;
    assert_eq!(later.labels().get("istio.io/rev").map(String::as_str), Some(REVISION));
    mesh.policy("one").await;
    mesh.is_settled("first", BOTH).await;
    assert_eq!(
        mesh.life("AuthorizationPolicy shop/one").versions.len(),
        2,
        "it was made, and one said what became of it"
    );
    mesh.leads(MESH_LEASE, DEFAULT).await;
    for webhook in ["istiod-validator", "istiod-validator-next"] {
        mesh.is_trusted(webhook).await;
    }

    // A waypoint goes over to another revision and back, and is the same all the while.
    mesh.label("now", REVISION.into()).await;
    let moved = mesh.is_deployed_by("now", NEXT).await;
    assert_eq!((moved.uid(), mesh.life("Deployment shop/now").deleted), (now.uid(), false));
    mesh.is_settled("moved", BOTH).await;
    mesh.apply(&json!({
        "apiVersion": "v1", "kind": "Service", "spec": {"ports": [{"port": 15012}]},
        "metadata": {"name": "istiod-revision-tag-prod", "namespace": "istio-system",
            "labels": {"istio.io/tag": "prod", "istio.io/rev": "default"}},
    }))
    .await;
    mesh.label("now", "prod".into()).await;
    let back = mesh.is_deployed_by("now", DEFAULT).await;
    assert_eq!((back.uid(), back.labels().get("istio.io/rev")), (now.uid(), None), "by a tag of the default");
    assert!(!mesh.life("Deployment shop/now").deleted);
    mesh.is_settled("back", BOTH).await;

    // Without the default revision its waypoints stay as they are, and the rest is the other's to write.
    default.end();
    mesh.is_gone(DEFAULT).await;
    mesh.gateway("waits", None).await;
    mesh.leads(MESH_LEASE, NEXT).await;
    mesh.policy("two").await;
    mesh.is_settled("without", &BOTH[1..]).await;
    assert!(mesh.deployment("waits").await.is_none());
    assert!(mesh.deployment("now").await.is_some_and(|deployment| deployment.uid() == now.uid()));

    // It comes back, and has all that was its own.
    let default = mesh.control_plane(DEFAULT).await;
    mesh.leads(MESH_LEASE, DEFAULT).await;
    mesh.is_deployed_by("waits", DEFAULT).await;
    mesh.policy("three").await;
    mesh.is_settled("again", BOTH).await;
    for policy in ["two", "three"] {
        let life = mesh.life(&format!("AuthorizationPolicy shop/{policy}"));
        assert_eq!(life.versions.len(), 2, "{policy}: {life:?}");
    }
    next.end();
    default.end();
}
