//! The command line as people use it: beside kubectl, on a real control plane with its own API server.

mod standalone_support;

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Command, Stdio};

use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::api::{Api, PostParams};
use mesh_proto::ads::DeltaDiscoveryRequest;
use mesh_proto::ads::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use mesh_proto::workload::ADDRESS_TYPE;
use serde_json::{Value, json};
use standalone_support::{Beside, Kubectl, Said, Server, eventually};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};

const NAMESPACES: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: istio-system}
---
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {name: istio-waypoint}
spec: {controllerName: istio.io/mesh-controller}
";

const APP: &str = "
apiVersion: v1
kind: Service
metadata: {name: server, namespace: shop}
spec: {selector: {app: server}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: server-1, namespace: shop, labels: {app: server}}
spec: {nodeName: n1, containers: [{name: c, image: i}]}
---
apiVersion: v1
kind: Pod
metadata: {name: client-1, namespace: shop, labels: {app: client}}
spec: {nodeName: n1, containers: [{name: c, image: i}]}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: shop}
spec: {mtls: {mode: STRICT}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: get-only, namespace: shop}
spec:
  targetRefs: [{group: '', kind: Service, name: server}]
  rules: [{to: [{operation: {methods: [GET]}}]}]
";

struct Mesh {
    server: Server,
    kubectl: Kubectl,
    grpc: SocketAddr,
    http: SocketAddr,
}

impl Mesh {
    /// None where there is no kubectl, which has been said.
    fn start() -> Option<Self> {
        let (name, binary) = Kubectl::versions().into_iter().next()?;
        let sockets = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").expect("a port"));
        let [grpc, http] = sockets.map(|socket| socket.local_addr().expect("its address"));
        let server = Server::start_beside(&Beside::ControlPlane(vec![
            ("ISTIOD_GRPC_ADDR", grpc.to_string()),
            ("ISTIOD_WEBHOOK_ADDR", "127.0.0.1:0".to_owned()),
            ("ISTIOD_MONITORING_ADDR", http.to_string()),
            ("ROOT_CA_DIR", "/nonexistent".to_owned()),
        ]));
        let kubectl = Kubectl::new(&server, name, &binary);
        kubectl.ok(&format!("apply -f {}/../manifests/crds", env!("CARGO_MANIFEST_DIR")));
        kubectl.ok("wait --for=condition=Established crd --all");
        kubectl.apply(NAMESPACES);
        Some(Self { server, kubectl, grpc, http })
    }

    /// `istiod-lite` with these arguments.
    fn run(&self, arguments: &str) -> (Option<i32>, Said) {
        let output = Command::new(env!("CARGO_BIN_EXE_istiod-lite"))
            .args(arguments.split_whitespace())
            .args(["--kubeconfig".as_ref(), self.server.kubeconfig().as_os_str()])
            .current_dir(self.server.dir())
            .stdin(Stdio::null())
            .output()
            .expect("it runs");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
        let said = Said { ok: output.status.success(), out: text(output.stdout), err: text(output.stderr) };
        (output.status.code(), said)
    }

    /// What it says that ends with 0.
    fn ok(&self, arguments: &str) -> String {
        let (code, said) = self.run(arguments);
        assert_eq!(code, Some(0), "{arguments}: {}{}", said.out, said.err);
        assert!(said.err.is_empty() && !said.out.contains('\x1b'), "{arguments}: {}{}", said.out, said.err);
        said.out
    }

    /// Plays the kubelet.
    fn start_pod(&self, name: &str, address: &str) {
        let conditions = r#"[{"type":"Ready","status":"True"}]"#;
        let status = format!(
            r#"{{"status":{{"phase":"Running","podIP":"{address}","podIPs":[{{"ip":"{address}"}}],"conditions":{conditions}}}}}"#
        );
        self.kubectl.ok(&format!("patch pod {name} -n shop --subresource=status --type=merge -p {status}"));
    }

    /// Plays the controller of Deployments: the waypoint's pod is ready.
    fn start_waypoint(&self) {
        eventually("a Deployment", || self.kubectl.run("get deployment waypoint -n shop").ok.then_some(()));
        let status = r#"{"status":{"replicas":1,"readyReplicas":1}}"#;
        self.kubectl.ok(&format!("patch deployment waypoint -n shop --subresource=status --type=merge -p {status}"));
    }
}

#[test]
fn a_waypoint_is_made_used_described_and_removed() {
    let Some(mesh) = Mesh::start() else { return };
    mesh.kubectl.apply(APP);
    mesh.start_pod("server-1", "10.0.0.2");
    mesh.start_pod("client-1", "10.0.0.1");

    assert_eq!(mesh.ok("waypoint list -n shop"), "No waypoints in namespace shop.\n");
    let (code, said) = mesh.run("waypoint apply -n shop --wait --timeout 100ms");
    assert_eq!(code, Some(2), "{}", said.out);
    assert!(said.err.contains("waypoint shop/waypoint is not programmed within 100ms"), "{}", said.err);
    mesh.start_waypoint();
    let applied = mesh.ok("waypoint apply -n shop --enroll-namespace --for all --wait");
    assert_eq!(
        applied,
        "waypoint shop/waypoint applied\nnamespace shop labelled istio.io/use-waypoint=waypoint\n\
         waypoint shop/waypoint is programmed\n"
    );
    let labels = mesh.kubectl.ok("get gateway waypoint -n shop -o jsonpath={.metadata.labels}");
    assert_eq!(labels, r#"{"istio.io/waypoint-for":"all"}"#);
    let listed = mesh.ok("waypoint list -A");
    assert_eq!(listed.lines().nth(1), Some("shop        waypoint   default    all       True"), "{listed}");
    let status: Value = serde_json::from_str(&mesh.ok("waypoint status waypoint -n shop -o json")).expect("JSON");
    assert_eq!((&status[0]["programmed"], &status[0]["reason"]), (&json!("True"), &json!("Programmed")));

    // What `generate` says is what `apply` has made.
    let generated = mesh.ok("waypoint generate -n shop --for all");
    let diff = mesh.kubectl.with_input("diff --server-side -f -", &generated);
    assert!(diff.ok, "{}{}", diff.out, diff.err);

    let described = mesh.ok("describe svc server -n shop");
    for line in [
        "Host         server.shop.svc.cluster.local",
        "Waypoint     Successfully attached to waypoint shop/waypoint",
        "  shop/get-only   ALLOW    1       service",
        "shop/server-1",
        "only from its waypoint",
    ] {
        assert!(described.contains(line), "{line}\n{described}");
    }
    let described: Value = serde_json::from_str(&mesh.ok("describe pod server-1.shop -o json")).expect("JSON");
    assert_eq!(described["mesh"]["inMesh"], true);
    assert_eq!(described["mutualTls"], json!({"mode": "STRICT", "by": "shop/default"}));
    assert_eq!(described["identity"], "spiffe://cluster.local/ns/shop/sa/default");
    let (code, said) = mesh.run("describe pod nobody -n shop");
    assert_eq!((code, &*said.err), (Some(2), "istiod-lite: there is no Pod shop/nobody\n"));

    let explained: Value =
        serde_json::from_str(&mesh.ok("explain --from client-1 --to server:80 -n shop -o json")).expect("JSON");
    assert_eq!(explained["waypoint"]["name"], "shop/waypoint");
    assert_eq!(explained["waypoint"]["policies"][0]["name"], "shop/get-only");

    assert_eq!(mesh.ok("waypoint delete waypoint -n shop"), "waypoint shop/waypoint deleted\n");
    let (code, said) = mesh.run("analyze");
    assert_eq!(code, Some(1), "{}{}", said.out, said.err);
    assert!(said.out.contains("waypoint shop/waypoint does not exist"), "{}", said.out);
}

#[tokio::test(flavor = "multi_thread")]
async fn proxies_are_told_with_what_they_have() {
    let Some(mesh) = Mesh::start() else { return };
    let address = format!("http://{}", mesh.http);
    assert_eq!(mesh.ok(&format!("proxy-status --istiod-address {address}")), "No proxies are connected.\n");
    let (code, said) = mesh.run("proxy-status");
    assert_eq!(code, Some(2));
    assert!(said.err.contains("no pod with label app=istiod runs in namespace istio-system"), "{}", said.err);

    let roots = eventually("the roots", || {
        let roots = mesh.kubectl.run(r"get configmap istio-ca-root-cert -n shop -o jsonpath={.data.root-cert\.pem}");
        Some(roots.out).filter(|pem| !pem.is_empty())
    });
    let accounts: Api<ServiceAccount> = Api::namespaced(mesh.server.client().await, "shop");
    let request: TokenRequest =
        serde_json::from_value(json!({"metadata": {}, "spec": {"audiences": ["istio-ca"]}})).expect("a request");
    let token = accounts.create_token_request("default", &PostParams::default(), &request).await.expect("a token");
    let token = token.status.expect("a token").token;
    let tls =
        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&roots)).domain_name("istiod.istio-system.svc");
    let endpoint = Endpoint::from_shared(format!("https://{}", mesh.grpc)).expect("an address").tls_config(tls);
    let channel = endpoint.expect("usable roots").connect().await.expect("a connection");
    let (send, requests) = mpsc::channel(4);
    let mut call = tonic::Request::new(ReceiverStream::new(requests));
    call.metadata_mut().insert("authorization", format!("Bearer {token}").parse().expect("a header"));
    let first = DeltaDiscoveryRequest { type_url: ADDRESS_TYPE.into(), ..DeltaDiscoveryRequest::default() };
    send.send(first).await.expect("room");
    let mut client = AggregatedDiscoveryServiceClient::new(channel);
    let mut responses = client.delta_aggregated_resources(call).await.expect("a stream").into_inner();
    let response = responses.message().await.expect("an answer").expect("an answer");

    // It has been sent something and has not said a word.
    let status = || mesh.run(&format!("proxy-status --istiod-address {address}"));
    let line = |said: &Said, state: &str| {
        said.out.lines().any(|line| line.starts_with("default.shop") && line.contains(state))
    };
    eventually("a proxy that is behind", || {
        let (code, said) = status();
        (code == Some(1) && line(&said, "STALE")).then_some(())
    });
    let ack = DeltaDiscoveryRequest {
        type_url: response.type_url,
        response_nonce: response.nonce,
        ..DeltaDiscoveryRequest::default()
    };
    send.send(ack).await.expect("room");
    eventually("a proxy that has everything", || {
        let (code, said) = status();
        (code == Some(0) && line(&said, "SYNCED")).then_some(())
    });
}

#[test]
fn a_cluster_is_checked_and_reported_on() {
    let Some(mesh) = Mesh::start() else { return };
    let (code, said) = mesh.run("install-check -o json");
    assert_eq!(code, Some(0), "{}{}", said.out, said.err);
    let checks: Value = serde_json::from_str(&said.out).expect("JSON");
    let found: Vec<(&str, &str)> = checks
        .as_array()
        .expect("a list")
        .iter()
        .map(|check| (check["what"].as_str().expect("text"), check["state"].as_str().expect("text")))
        .collect();
    let all = ["API server", "kernel", "CRDs", "other meshes", "permissions", "installation"];
    assert_eq!(found, all.map(|what| (what, "good")));

    mesh.kubectl.ok("delete crd httproutes.gateway.networking.k8s.io");
    let (code, said) = mesh.run("install-check");
    assert_eq!(code, Some(1), "{}", said.out);
    assert!(said.out.contains("httproutes.gateway.networking.k8s.io is missing"), "{}", said.out);

    let said = mesh.ok("bug-report");
    assert!(said.starts_with("bug-report.tar.gz: "), "{said}");
    let listed =
        Command::new("tar").arg("-tzf").arg(mesh.server.dir().join("bug-report.tar.gz")).output().expect("tar");
    let listed = String::from_utf8(listed.stdout).expect("names");
    for name in ["version.txt", "analyze.txt", "install-check.txt", "objects/namespaces.yaml", "missing.txt"] {
        assert!(listed.lines().any(|line| Path::new(line).ends_with(name)), "{name}\n{listed}");
    }
    let (code, said) = mesh.run("bug-report");
    assert_eq!(code, Some(2), "{}", said.out);
    assert!(said.err.contains("bug-report.tar.gz"), "an older one is left alone: {}", said.err);
}

#[test]
fn files_are_described_without_a_cluster() {
    let run = |arguments: &[&str]| {
        let file = format!("{}/testdata/cli/shop/in.yaml", env!("CARGO_MANIFEST_DIR"));
        let output = Command::new(env!("CARGO_BIN_EXE_istiod-lite"))
            .args(arguments)
            .args(["-f", &file, "-n", "shop"])
            .env("KUBECONFIG", "/nonexistent")
            .output()
            .expect("it runs");
        (output.status.code(), String::from_utf8(output.stdout).expect("text"))
    };
    let (code, said) = run(&["describe", "pod", "server-1"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("in, by the label of namespace shop"), "{said}");
    let (code, said) = run(&["explain", "--from", "client-1", "--to", "server-1:8080"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("would be refused"), "{said}");
}
