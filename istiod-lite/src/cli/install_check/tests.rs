use serde_json::{Value, json};

use super::*;
use crate::cli::testing::failure;
use crate::testing::FakeApi;

fn node(name: &str, kernel: &str) -> Value {
    json!({"metadata": {"name": name}, "status": {"nodeInfo": {
        "operatingSystem": "linux", "kernelVersion": kernel, "architecture": "", "bootID": "", "containerRuntimeVersion": "",
        "kubeProxyVersion": "", "kubeletVersion": "", "machineID": "", "osImage": "", "systemUUID": "",
    }}})
}

fn workload(name: &str, namespace: &str, image: &str, status: Value) -> Value {
    json!({
        "metadata": {"name": name, "namespace": namespace, "generation": 1},
        "spec": {"selector": {}, "template": {"spec": {"containers": [{"name": "c", "image": image}]}}},
        "status": status,
    })
}

fn crd(name: &str) -> Value {
    let (plural, group) = name.split_once('.').expect("plural.group");
    let version = json!({"name": "v1", "served": true, "storage": true});
    json!({
        "metadata": {"name": name},
        "spec": {"group": group, "scope": "Namespaced", "names": {"plural": plural, "kind": "X"}, "versions": [version]},
        "status": {"conditions": [{"type": "Established", "status": "True"}]},
    })
}

/// A cluster with a mesh that is whole, apart from what `other` answers otherwise.
fn cluster(other: impl Fn(&str, &str) -> Option<(u16, Value)> + Clone + Send + Sync + 'static) -> Cluster {
    let list = |items: Vec<Value>| (200, json!({"metadata": {}, "items": items}));
    let client = FakeApi::answering(move |method, path, _| {
        if let Some(answer) = other(method, path) {
            return answer;
        }
        let istiod = workload(
            "istiod",
            "istio-system",
            "istiod-lite:1",
            json!({"readyReplicas": 1, "updatedReplicas": 1, "observedGeneration": 1}),
        );
        let status = json!({
            "desiredNumberScheduled": 2, "numberReady": 2, "updatedNumberScheduled": 2, "observedGeneration": 1,
            "currentNumberScheduled": 2, "numberMisscheduled": 0,
        });
        let ztunnel = workload("ztunnel", "istio-system", "ztunnel:1", status);
        match path {
            "/version" => (200, json!({
                "major": "1", "minor": "36+", "buildDate": "", "compiler": "", "gitCommit": "", "gitTreeState": "",
                "gitVersion": "v1.36.0", "goVersion": "", "platform": "",
            })),
            "/api/v1/nodes" => list(vec![node("a", "6.1.0-18-amd64"), node("b", "5.18.0")]),
            "/api/v1/namespaces" => list(vec![
                json!({"metadata": {"name": "istio-system"}}),
                json!({"metadata": {"name": "shop", "labels": {"istio.io/dataplane-mode": "ambient"}}}),
                json!({"metadata": {"name": "other"}}),
            ]),
            "/api/v1/configmaps" => list(["istio-system", "shop"].map(|namespace| json!({
                "metadata": {"name": "istio-ca-root-cert", "namespace": namespace}, "data": {"root-cert.pem": "PEM"},
            })).into()),
            "/api/v1/namespaces/istio-system/services" => list(Vec::new()),
            "/apis/gateway.networking.k8s.io/v1/gateways" => list(Vec::new()),
            "/apis/apps/v1/deployments" | "/apis/apps/v1/namespaces/istio-system/deployments" => list(vec![istiod]),
            "/apis/apps/v1/daemonsets" => list(vec![ztunnel]),
            "/apis/apps/v1/namespaces/istio-system/daemonsets/ztunnel" => (200, ztunnel),
            "/apis/gateway.networking.k8s.io/v1/gatewayclasses/istio-waypoint" => (200, json!({
                "metadata": {"name": "istio-waypoint"}, "spec": {"controllerName": MESH_CONTROLLER},
                "status": {"conditions": [{"type": "Accepted", "status": "True"}]},
            })),
            path => match path.strip_prefix("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/") {
                Some(name) => (200, crd(name)),
                None => panic!("{method} {path}"),
            },
        }
    });
    Cluster { client, namespace: "default".into(), system: "istio-system".into(), mesh: MeshSettings::default() }
}

async fn found(other: impl Fn(&str, &str) -> Option<(u16, Value)> + Clone + Send + Sync + 'static) -> String {
    report(&cluster(other)).await.expect("a report")
}

#[tokio::test]
async fn of_a_mesh_that_is_whole_nothing_is_to_be_mended() {
    assert_eq!(
        found(|_, _| None).await,
        "\
CHECK               STATE   FOUND
API server          good    Kubernetes 1.36+
kernel              good    Linux 5.18 or newer on 2 nodes
CRDs                good    all 7 are there
other meshes        good    none that would be in the way
control plane       good    1 of 1 pods are ready (istiod-lite:1)
node proxies        good    2 of 2 pods are ready (ztunnel:1)
waypoints           good    GatewayClass istio-waypoint is accepted
root certificates   good    ConfigMap istio-ca-root-cert is in 2 namespaces of the mesh
8 checks, 0 findings
"
    );
}

#[tokio::test]
async fn each_thing_that_is_wrong_is_told_with_how_to_mend_it() {
    let list = |items: Vec<Value>| Some((200, json!({"metadata": {}, "items": items})));
    let said = found(move |_, path| match path {
        "/api/v1/nodes" => list(vec![node("a", "5.10.0-28-amd64"), node("b", "6.1.0")]),
        "/apis/apps/v1/daemonsets" => list(vec![workload(
            "istio-cni-node",
            "istio-system",
            "docker.io/istio/install-cni:1.27.0",
            json!({"currentNumberScheduled": 0, "desiredNumberScheduled": 0, "numberMisscheduled": 0, "numberReady": 0}),
        )]),
        "/apis/apps/v1/namespaces/istio-system/deployments" => {
            list(vec![workload("istiod", "istio-system", "istiod-lite:1", json!({"observedGeneration": 1}))])
        }
        "/api/v1/configmaps" => list(Vec::new()),
        "/apis/gateway.networking.k8s.io/v1/gatewayclasses/istio-waypoint" => Some(failure(404, "not found")),
        path if path.ends_with("/httproutes.gateway.networking.k8s.io") => Some(failure(404, "not found")),
        _ => None,
    });
    let said = said.await;
    for line in [
        "kernel              problem   older than Linux 5.18, so ztunnel cannot capture there: a (5.10.0-28-amd64)",
        "CRDs                problem   httproutes.gateway.networking.k8s.io is missing",
        "to mend it: kubectl apply -f manifests/crds/",
        "DaemonSet istio-system/istio-cni-node is Istio's CNI agent",
        "control plane       problem   0 of 1 pods are ready",
        "waypoints           problem   GatewayClass istio-waypoint is missing",
        "root certificates   problem   ConfigMap istio-ca-root-cert is missing in istio-system, shop",
        "8 checks, 6 findings",
    ] {
        assert!(said.contains(line), "{line}\n{said}");
    }
}

#[tokio::test]
async fn of_several_revisions_each_is_looked_at_and_waypoints_of_nobody_are_named() {
    let list = |items: Vec<Value>| Some((200, json!({"metadata": {}, "items": items})));
    let gateway = |name: &str, revision: &str| {
        json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
            "metadata": {"name": name, "namespace": "shop", "labels": {"istio.io/rev": revision}},
            "spec": {"gatewayClassName": "istio-waypoint"}})
    };
    let said = async |gateways: Vec<Value>| {
        found(move |_, path| match path {
            "/apis/apps/v1/namespaces/istio-system/deployments" => {
                let ready = json!({"readyReplicas": 1, "updatedReplicas": 1, "observedGeneration": 1});
                let mut canary = workload("istiod-canary", "istio-system", "istiod-lite:2", ready);
                canary["metadata"]["labels"] = json!({"istio.io/rev": "canary", "app": "istiod-canary"});
                list(vec![canary])
            }
            "/api/v1/namespaces/istio-system/services" => list(vec![json!({
                "metadata": {"name": "tag", "namespace": "istio-system",
                    "labels": {"istio.io/rev": "canary", "istio.io/tag": "prod"}},
            })]),
            "/apis/gateway.networking.k8s.io/v1/gateways" => list(gateways.clone()),
            _ => None,
        })
        .await
    };
    let orphaned = said(vec![gateway("a", "canary"), gateway("b", "prod"), gateway("c", "gone")]).await;
    let whole = said(vec![gateway("a", "canary")]).await;
    assert!(!whole.contains("revisions"), "of one there is nothing to say: {whole}");
    for line in [
        "control plane       good      revision canary: 1 of 1 pods are ready (istiod-lite:2)",
        "revisions           problem   no control plane is there to deploy shop/c (gone)",
    ] {
        assert!(orphaned.contains(line), "{line}\n{orphaned}");
    }
}

#[tokio::test]
async fn before_an_installation_permissions_are_asked_for_and_what_cannot_be_looked_at_is_said() {
    let said = found(|method, path| match path {
        "/apis/apps/v1/namespaces/istio-system/deployments" => Some((200, json!({"metadata": {}, "items": []}))),
        path if path.ends_with("/daemonsets/ztunnel") => Some(failure(404, "not found")),
        "/apis/apps/v1/daemonsets" => Some(failure(403, "daemonsets is forbidden")),
        "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews" => {
            assert_eq!(method, "POST");
            Some((201, json!({"metadata": {}, "spec": {}, "status": {"allowed": false}})))
        }
        _ => None,
    });
    let said = said.await;
    for line in [
        "other meshes   unknown",
        "daemonsets is forbidden",
        "you may not create namespaces, patch namespaces, create customresourcedefinitions",
        "there is none yet in namespace istio-system",
    ] {
        assert!(said.contains(line), "{line}\n{said}");
    }
}

#[test]
fn images_tell_whose_pods_they_are() {
    let of = |image: &str| {
        let containers = json!([{"name": "c", "image": image}]);
        foreign(&serde_json::from_value(json!({"containers": containers})).expect("a pod's spec")).is_some()
    };
    for image in [
        "docker.io/istio/pilot:1.27",
        "registry.example.org:5000/istio/install-cni@sha256:0",
        "gcr.io/istio-release/ztunnel:1.27",
    ] {
        assert!(of(image), "{image}");
    }
    for image in ["ztunnel", "ztunnel:1", "registry.example.org:5000/mesh/ztunnel", "istiod-lite:1", "nginx"] {
        assert!(!of(image), "{image}");
    }
}
