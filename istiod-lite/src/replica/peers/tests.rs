use std::net::IpAddr;

use serde_json::{Value, json};

use super::*;
use crate::ca::{Authority, SELF_SIGNED_ROOT_TTL};
use crate::translate::fixture;
use crate::types::SERVICE_NAME;

const NOBODY: [u8; 0] = [];
const NOW: time::OffsetDateTime = time::macros::datetime!(2030-01-01 0:00 UTC);

fn slice(name: &str, service: &str, port: &str, endpoints: &str) -> String {
    format!(
        "kind: EndpointSlice\nmetadata: {{name: {name}, namespace: istio-system, labels: {{{SERVICE_NAME}: {service}}}}}\n\
         addressType: IPv4\nports: [{{name: http-monitoring, port: 15014}}, {{name: {port}, port: 15012}}]\n\
         endpoints: [{endpoints}]\n---\n"
    )
}

fn endpoint(last: u8, conditions: &str) -> String {
    format!(
        "{{addresses: [10.0.0.{last}], conditions: {{{conditions}}}, targetRef: {{kind: Pod, name: istiod-{last}}}}},"
    )
}

fn peers() -> Peers {
    let material = Authority::self_signed("cluster.local", SELF_SIGNED_ROOT_TTL, NOW).unwrap();
    let authority = CurrentAuthority::new(Arc::new(Authority::from_material(&material).unwrap()));
    let credentials = Credentials {
        token: TokenSource::None,
        namespace: "istio-system".into(),
        cluster_id: "Kubernetes".into(),
        pod: Some("istiod-1".into()),
    };
    Peers::new(credentials, authority)
}

/// The last numbers of the addresses that are asked.
fn asked(peers: &Peers, slices: &str) -> Vec<u8> {
    peers.observe(&fixture::world(slices));
    let last = |address: SocketAddr| match address.ip() {
        IpAddr::V4(ip) => ip.octets()[3],
        IpAddr::V6(_) => unreachable!("none is given"),
    };
    peers.addresses().into_iter().map(last).collect()
}

#[test]
fn a_replica_counts_from_when_it_is_ready_until_it_is_gone() {
    let of_service = |endpoints: &str| slice("istiod-x", "istiod", PORT, endpoints);
    let peers = peers();
    let own = endpoint(1, "ready: true");
    assert_eq!(asked(&peers, &of_service(&own)), NOBODY, "this one");
    let starting = own.clone() + &endpoint(2, "ready: false, serving: false");
    assert_eq!(asked(&peers, &of_service(&starting)), NOBODY, "it has no clients yet");
    let ready = own.clone() + &endpoint(2, "ready: true") + &endpoint(3, "");
    assert_eq!(asked(&peers, &of_service(&ready)), [2, 3], "one that says nothing is ready");
    let ending = own.clone() + &endpoint(2, "ready: false, serving: true, terminating: true");
    assert_eq!(asked(&peers, &of_service(&ending)), [2]);
    let hung = own.clone() + &endpoint(2, "ready: false, serving: false");
    assert_eq!(asked(&peers, &of_service(&hung)), [2], "its clients may still be there");
    assert_eq!(asked(&peers, &of_service(&own)), NOBODY);
    assert_eq!(asked(&peers, &of_service(&hung)), NOBODY, "another one of its address, which starts");
}

#[test]
fn the_replicas_of_other_revisions_are_asked_too() {
    let peers = peers();
    let service = |name: &str, revision: &str| {
        format!(
            "kind: Service\nmetadata: {{name: {name}, namespace: istio-system, labels: {{istio.io/rev: {revision}}}}}\n---\n"
        )
    };
    let ready = endpoint(2, "ready: true");
    let slices = slice("a", "istiod-canary", PORT, &ready);
    assert_eq!(asked(&peers, &(service("istiod-canary", "canary") + &slices)), [2]);
    for other in [service("istiod-canary", "prod"), service("istiod", "canary"), String::new()] {
        assert_eq!(asked(&peers, &(other + &slices)), NOBODY);
    }
}

#[test]
fn nobody_else_is_asked() {
    let peers = peers();
    let ready = endpoint(2, "ready: true");
    for slices in [slice("a", "grafana", PORT, &ready), slice("a", "istiod", "grpc", &ready)] {
        assert_eq!(asked(&peers, &slices), NOBODY);
        let elsewhere = slice("a", "istiod", PORT, &ready).replace("istio-system", "shop");
        assert_eq!(asked(&peers, &elsewhere), NOBODY);
    }
}

#[tokio::test(start_paused = true)]
async fn one_that_cannot_be_reached_has_not_acknowledged_anything() {
    let peers = peers();
    assert!(peers.acknowledged(Vec::new(), Duration::ZERO).await, "there is nobody else");
    let unreachable = slice("a", "istiod", PORT, &endpoint(2, "")).replace("10.0.0.2", "127.0.0.1");
    peers.observe(&fixture::world(&unreachable.replace("15012", "1")));
    let patience = Duration::from_secs(5);
    assert!(!peers.acknowledged(Vec::new(), patience).await);
    assert!(!peers.parted(&["w".to_owned()], patience).await);
    assert!(peers.parted(&[], patience).await, "nothing is asked");
}

#[test]
fn the_installation_has_what_replicas_know_each_other_by() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../manifests/install.yaml");
    let objects: Vec<Value> = serde_saphyr::from_multiple(&std::fs::read_to_string(path).unwrap()).unwrap();
    let of = |kind: &str, name: &str| {
        objects.iter().find(|it| it["kind"] == kind && it["metadata"]["name"] == name).expect("it is there")
    };
    let ports = of("Service", SERVICE)["spec"]["ports"].as_array().unwrap();
    assert!(ports.iter().any(|port| port["name"] == PORT && port["targetPort"] == 15012));
    let pod = &of("Deployment", "istiod")["spec"]["template"]["spec"];
    let token = &pod["volumes"][0]["projected"]["sources"][0]["serviceAccountToken"];
    assert_eq!((&token["audience"], &token["path"]), (&json!("istio-ca"), &json!("istio-token")));
    let container = &pod["containers"][0];
    assert_eq!(container["volumeMounts"][0]["name"], pod["volumes"][0]["name"]);
    assert_eq!(container["volumeMounts"][0]["mountPath"], "/var/run/secrets/tokens");
    let from = |name: &str| {
        let variable = container["env"].as_array().unwrap().iter().find(|variable| variable["name"] == name);
        variable.map(|variable| variable["valueFrom"]["fieldRef"]["fieldPath"].clone())
    };
    assert_eq!(from("POD_NAME"), Some("metadata.name".into()));
    assert_eq!(from("SERVICE_ACCOUNT"), Some("spec.serviceAccountName".into()));
}
