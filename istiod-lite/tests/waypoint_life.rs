//! What users see of waypoints' objects: a real control plane on its own API server, and kubectl. Nothing runs behind a
//! Deployment here.

mod standalone_support;

use std::net::{SocketAddr, TcpListener};
use std::path::Path;

use serde_json::Value;
use standalone_support::{Beside, Kubectl, Server, eventually};

const NAMESPACES: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: istio-system}
---
apiVersion: v1
kind: Namespace
metadata: {name: shop}
";
const GATEWAY: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: shop}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
  infrastructure: {parametersRef: {group: '', kind: ConfigMap, name: parameters}}
";

struct Mesh {
    _server: Server,
    kubectl: Kubectl,
}

impl Mesh {
    /// `None`: there is no kubectl.
    fn start() -> Option<Self> {
        let (name, binary) = Kubectl::versions().into_iter().next()?;
        let [grpc, http] = free_addresses();
        let server = Server::start_beside(&Beside::ControlPlane(vec![
            ("ISTIOD_GRPC_ADDR", grpc.to_string()),
            ("ISTIOD_WEBHOOK_ADDR", "127.0.0.1:0".to_owned()),
            ("ISTIOD_MONITORING_ADDR", http.to_string()),
        ]));
        let kubectl = Kubectl::new(&server, name, &binary);
        kubectl.apply(NAMESPACES);
        Some(Self { _server: server, kubectl })
    }

    fn install_definitions(&self) {
        let crds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/crds");
        self.kubectl.ok(&format!("apply -f {}", crds.display()));
    }

    /// An object, once there is one of which `fits` holds.
    fn comes(&self, what: &str, fits: impl Fn(&Value) -> bool) -> Value {
        eventually(what, || {
            let said = self.kubectl.run(&format!("get {what} -o json"));
            serde_json::from_str(&said.out).ok().filter(|object| said.ok && fits(object))
        })
    }

    fn goes(&self, what: &str) {
        eventually(&format!("{what} to go"), || {
            let said = self.kubectl.run(&format!("get {what}"));
            (!said.ok && said.err.contains("NotFound")).then_some(())
        });
    }

    /// What is in the ConfigMap that the Gateway refers to.
    fn parameters(&self, data: &str) {
        self.kubectl.apply(&format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: parameters, namespace: shop}}\ndata: {data}\n"
        ));
    }

    /// The Gateway's condition `Accepted` comes to have this reason, and a message with these words.
    fn accepted(&self, reason: &str, words: &str) {
        self.comes("gateway/waypoint -n shop", |gateway| {
            let mut conditions = gateway["status"]["conditions"].as_array().into_iter().flatten();
            let accepted = conditions.find(|condition| condition["type"] == "Accepted");
            accepted.is_some_and(|accepted| {
                accepted["reason"] == reason && accepted["message"].as_str().is_some_and(|said| said.contains(words))
            })
        });
    }
}

fn free_addresses() -> [SocketAddr; 2] {
    let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").expect("a free port"));
    listeners.map(|listener| listener.local_addr().expect("it has one"))
}

#[test]
fn the_class_is_made_accepted_and_put_back() {
    let Some(mesh) = Mesh::start() else { return };
    let is_accepted = |class: &Value| {
        let features = class["status"]["supportedFeatures"].as_array().map(Vec::as_slice).unwrap_or_default();
        let names: Vec<_> = features.iter().filter_map(|feature| feature["name"].as_str()).collect();
        class["spec"]["controllerName"] == "istio.io/mesh-controller"
            && class["status"]["conditions"][0]["status"] == "True"
            && names.contains(&"HTTPRoute")
            && names.is_sorted()
    };
    // The definitions come later than the control plane.
    mesh.install_definitions();
    let first = mesh.comes("gatewayclass/istio-waypoint", is_accepted);
    mesh.kubectl.ok("delete gatewayclass istio-waypoint");
    let uid = |class: &Value| class["metadata"]["uid"].clone();
    mesh.comes("gatewayclass/istio-waypoint", |class| is_accepted(class) && uid(class) != uid(&first));
}

#[test]
fn parameters_are_followed_and_what_runs_stays_when_they_are_spoilt() {
    let Some(mesh) = Mesh::start() else { return };
    mesh.install_definitions();
    mesh.kubectl.apply(GATEWAY);
    mesh.accepted("InvalidParameters", "ConfigMap shop/parameters: does not exist");
    mesh.goes("deployment/waypoint -n shop");

    mesh.parameters(
        "{deployment: 'spec: {replicas: 3}', horizontalPodAutoscaler: 'spec: {maxReplicas: 5}', podDisruptionBudget: 'spec: {minAvailable: 1}'}",
    );
    mesh.accepted("Accepted", "");
    let replicas = |wanted: u64| move |deployment: &Value| deployment["spec"]["replicas"] == wanted;
    mesh.comes("deployment/waypoint -n shop", replicas(3));
    let scaled = |scaler: &Value| scaler["spec"]["scaleTargetRef"]["name"] == "waypoint";
    mesh.comes("horizontalpodautoscaler/waypoint -n shop", scaled);
    mesh.comes("poddisruptionbudget/waypoint -n shop", |budget| budget["spec"]["minAvailable"] == 1);

    mesh.parameters("{deployment: 'spec: {replicas: 4}', podDisruptionBudget: 'spec: {minAvailable: 2}'}");
    mesh.comes("deployment/waypoint -n shop", replicas(4));
    mesh.comes("poddisruptionbudget/waypoint -n shop", |budget| budget["spec"]["minAvailable"] == 2);
    mesh.goes("horizontalpodautoscaler/waypoint -n shop");

    mesh.parameters("{deployment: 'spec: {replica: 5}'}");
    mesh.accepted("InvalidParameters", "deployment: a Deployment has no spec.replica");
    mesh.comes("deployment/waypoint -n shop", replicas(4));
    mesh.comes("poddisruptionbudget/waypoint -n shop", |_| true);
    mesh.kubectl.ok("delete configmap parameters -n shop");
    mesh.accepted("InvalidParameters", "does not exist");
    mesh.comes("poddisruptionbudget/waypoint -n shop", |_| true);

    mesh.kubectl.apply(
        "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: defaults\n  namespace: istio-system\n  labels: {gateway.istio.io/defaults-for-class: istio-waypoint}\ndata: {service: 'metadata: {annotations: {of: class}}'}\n",
    );
    mesh.kubectl
        .ok("patch gateway waypoint -n shop --type json -p [{\"op\":\"remove\",\"path\":\"/spec/infrastructure\"}]");
    mesh.accepted("Accepted", "");
    mesh.goes("poddisruptionbudget/waypoint -n shop");
    mesh.comes("service/waypoint -n shop", |service| service["metadata"]["annotations"]["of"] == "class");
    mesh.comes("deployment/waypoint -n shop", |deployment| deployment["spec"]["replicas"] != 4);
}
