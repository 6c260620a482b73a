//! MeshConfig as users change it: a real control plane on its own API server, and kubectl.

mod standalone_support;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;

use serde_json::Value;
use standalone_support::{Beside, Kubectl, Server, eventually};

const OBJECTS: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: istio-system}
---
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Namespace
metadata: {name: other}
";
const ENTRY: &str = "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: api, namespace: shop}
spec: {hosts: [api.example.com], addresses: [240.0.0.1], resolution: NONE, ports: [{number: 80, name: http}]}
";

struct Mesh {
    _server: Server,
    kubectl: Kubectl,
    http: SocketAddr,
}

impl Mesh {
    /// `None`: there is no kubectl.
    fn start() -> Option<Self> {
        let (name, binary) = Kubectl::versions().into_iter().next()?;
        let [grpc, http, webhook] = free_addresses();
        let server = Server::start_beside(&Beside::ControlPlane(vec![
            ("ISTIOD_GRPC_ADDR", grpc.to_string()),
            ("ISTIOD_MONITORING_ADDR", http.to_string()),
            ("ISTIOD_WEBHOOK_ADDR", webhook.to_string()),
        ]));
        let kubectl = Kubectl::new(&server, name, &binary);
        kubectl.apply(OBJECTS);
        let crds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/crds");
        kubectl.ok(&format!("apply -f {}", crds.display()));
        Some(Self { _server: server, kubectl, http })
    }

    fn configure(&self, mesh: &str) {
        self.kubectl.apply(&format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\ndata: {{mesh: '{mesh}'}}\n"
        ));
    }

    /// The reason of a condition of the entry, once it `fits`.
    fn entry(&self, what: &str, r#type: &str, fits: impl Fn(Option<&str>) -> bool) {
        eventually(what, || {
            let said = self.kubectl.run("get serviceentry api -n shop -o json");
            let object: Value = serde_json::from_str(&said.out).ok()?;
            let mut conditions = object["status"]["conditions"].as_array().into_iter().flatten();
            let reason = conditions.find(|condition| condition["type"] == r#type).map(|found| found["reason"].clone());
            fits(reason.as_ref().and_then(Value::as_str)).then_some(())
        });
    }

    /// What the control plane says of MeshConfig, once it `fits`.
    fn says(&self, what: &str, fits: impl Fn(&Value) -> bool) {
        eventually(what, || fits(&debug_mesh(self.http)?).then_some(()));
    }
}

fn debug_mesh(address: SocketAddr) -> Option<Value> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.write_all(b"GET /debug/mesh HTTP/1.0\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()
}

fn free_addresses() -> [SocketAddr; 3] {
    let listeners = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").expect("a free port"));
    listeners.map(|listener| listener.local_addr().expect("it has one"))
}

#[test]
fn mesh_config_is_followed_and_the_last_good_one_stays() {
    let Some(mesh) = Mesh::start() else { return };
    let visibility =
        |reason: &'static str| mesh.entry(reason, "istio.io/VisibilityApplied", |found| found == Some(reason));
    mesh.kubectl.apply(ENTRY);
    visibility("Public");

    mesh.configure("{serviceEntryVisibility: {defaultVisibility: NAMESPACE}, trustDomain: example.org}");
    visibility("Namespace");
    let reasons = |said: &Value| -> Vec<String> {
        let findings = said["findings"].as_array().into_iter().flatten();
        findings.filter_map(|finding| finding["reason"].as_str().map(str::to_owned)).collect()
    };
    mesh.says("what needs a restart", |said| reasons(said) == ["NeedsRestart"]);

    mesh.configure("{serviceEntryVisibility: {defaultVisibility: SOME}}");
    mesh.says("what cannot be read", |said| {
        reasons(said) == ["Unreadable"] && said["inForce"]["serviceEntryVisibility"]["defaultVisibility"] == "NAMESPACE"
    });

    // A namespace that is not looked at any more keeps what was last said of its objects; another is looked at.
    mesh.configure("{discoverySelectors: [{matchLabels: {kubernetes.io/metadata.name: other}}]}");
    mesh.says("selectors", |said| said["inForce"]["discoverySelectors"].as_array().is_some_and(|all| all.len() == 1));
    mesh.kubectl
        .apply(&ENTRY.replace("api.example.com", "www.example.com").replace("namespace: shop", "namespace: other"));
    eventually("the entry that is looked at", || {
        let said = mesh.kubectl.run("get serviceentry api -n other -o json");
        let object: Value = serde_json::from_str(&said.out).ok()?;
        object["status"]["conditions"].is_array().then_some(())
    });
    mesh.entry("what was said last", "istio.io/VisibilityApplied", |found| found == Some("Namespace"));

    mesh.kubectl.ok("delete configmap istio -n istio-system");
    visibility("Public");
}
