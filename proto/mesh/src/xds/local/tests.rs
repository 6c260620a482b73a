use std::fs;

use serde_json::json;

use super::super::typed_handler;
use super::*;
use crate::drain;
use crate::model::{HealthPolicy, LoadBalancingMode, RoutingScope};

const FILE: &str = r#"
# Two workloads as Istio's ztunnel reads them.
workloads:
- uid: cluster1//v1/Pod/default/local
  name: local
  namespace: default
  serviceAccount: client
  workloadIps: ["127.0.0.1", "fd00::1"]
  protocol: HBONE
  node: node-a
  network: ""
  waypoint:
    destination: default/waypoint.default
    hboneMtlsPort: 15008
  authorizationPolicies: [default/deny]
  services:
    "default/example.com":
      80: 8080
      "81": 0
- uid: cluster1//v1/Pod/default/remote
  name: remote
  namespace: default
  workloadIps: [127.0.0.2]
services:
- name: local
  namespace: default
  hostname: example.com
  vips:
  - /127.10.0.1
  ports:
    80: 8080
  loadBalancer:
    routingPreferences: [Network, Zone]
    mode: Failover
    healthPolicy: AllowAll
policies:
- name: deny
  namespace: default
  scope: WorkloadSelector
  action: Deny
  rules:
  - - - notDestinationPorts: [9999]
        principals:
        - Exact: cluster.local/ns/default/sa/evil
        - Presence: []
enrolments:
- uid: 11111111-2222-3333-4444-555555555555
  name: local
  namespace: default
  serviceAccount: client
  addresses: ["127.0.0.1"]
  workloadUid: cluster1//v1/Pod/default/local
"#;

#[test]
fn every_section_is_read() {
    let file = parse(FILE).unwrap();
    let local = &file.workloads[0];
    assert_eq!(local.identity().unwrap().to_string(), "spiffe://cluster.local/ns/default/sa/client");
    assert_eq!(local.protocol, TunnelProtocol::Hbone);
    assert_eq!(local.waypoint.as_ref().unwrap().destination.to_string(), "default/waypoint.default");
    let ports = &local.services[&"default/example.com".parse().unwrap()];
    assert_eq!((ports.target(80), ports.target(81)), (Some(8080), None));
    assert_eq!((file.workloads[1].capacity, file.workloads[1].protocol), (1, TunnelProtocol::None));
    let service = &file.services[0];
    assert_eq!(service.vips[0].to_string(), "/127.10.0.1");
    assert_eq!(service.ports[&80].target_port, 8080);
    assert_eq!(service.load_balancing.mode, LoadBalancingMode::Failover);
    assert_eq!(service.load_balancing.health_policy, HealthPolicy::AllowAll);
    assert_eq!(service.load_balancing.routing_preferences, [RoutingScope::Network, RoutingScope::Zone]);
    let rules = serde_json::to_value(&file.policies[0]).unwrap();
    assert_eq!(
        rules["rules"],
        json!([[[{
            "principals": [{"Exact": "cluster.local/ns/default/sa/evil"}, {"Presence": []}],
            "notDestinationPorts": [9999],
        }]]])
    );
    let pod = &file.enrolments[0];
    assert_eq!(pod.workload_uid, "cluster1//v1/Pod/default/local");
    assert_eq!(pod.addresses, [Bytes::from_static(&[127, 0, 0, 1])]);
    let capture = pod.capture.as_ref().unwrap();
    assert_eq!((capture.failure_mode(), capture.dns), (FailureMode::Closed, true));
    let own_dns =
        FILE.replace("  workloadUid: cluster1//v1/Pod/default/local\n", "  workloadUid: u\n  dnsCapture: false\n");
    assert!(!parse(&own_dns).unwrap().enrolments[0].capture.as_ref().unwrap().dns);
}

#[test]
fn an_empty_file_is_an_empty_mesh() {
    for text in ["", "# nothing\n", "{}", "workloads: []\n"] {
        let file = parse(text).unwrap_or_else(|error| panic!("{text:?}: {error}"));
        assert!(file.workloads.is_empty() && file.enrolments.is_empty());
    }
}

#[test]
fn mistakes_name_the_line() {
    for (from, to) in [
        ("  workloadUid:", "  workloadUID:"),
        ("  protocol: HBONE", "  protocol: HBON"),
        ("  mode: Failover", "  mode: Sometimes"),
        ("- /127.10.0.1", "- /127.10.0"),
        ("notDestinationPorts: [9999]", "notDestinationPort: [9999]"),
        ("addresses: [\"127.0.0.1\"]", "addresses: [\"localhost\"]"),
        ("80: 8080\n      \"81\"", "http: 8080\n      \"81\""),
        ("80: 8080\n      \"81\"", "80: 65536\n      \"81\""),
        ("\"default/example.com\":", "\"example.com\":"),
        ("enrolments:", "enrollments:"),
    ] {
        let text = FILE.replacen(from, to, 1);
        let differs =
            text.lines().zip(FILE.lines()).position(|(new, old)| new != old).expect("the text is in the file");
        let error = parse(&text).expect_err(to).to_string();
        assert!(error.contains(&format!("line {}", differs + 1)), "{to}: {error}");
    }
}

#[test]
fn what_is_missing_is_named() {
    let error = parse(&FILE.replace("  workloadUid: cluster1//v1/Pod/default/local\n", "")).unwrap_err().to_string();
    assert!(error.contains("workloadUid") && error.contains("line "), "{error}");
}

#[test]
fn a_name_twice_is_a_mistake() {
    let error = parse(&FILE.replace("Pod/default/remote", "Pod/default/local")).unwrap_err();
    assert_eq!(error.to_string(), "workload cluster1//v1/Pod/default/local is there twice");
}

/// Pods in the order in which the handler heard of them; removals with a minus.
fn recorder() -> (Arc<Mutex<Vec<String>>>, Arc<dyn ResourceHandler>) {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let log = heard.clone();
    let handler = typed_handler(
        mesh_proto::enrolment::POD_ENROLMENT_TYPE,
        move |updated: Vec<(String, PodEnrolment)>, removed: Vec<String>| {
            let mut log = log.lock().unwrap();
            log.extend(removed.into_iter().map(|name| format!("-{name}")));
            log.extend(updated.into_iter().map(|(name, pod)| format!("{name}={}", pod.name)));
            vec![]
        },
    );
    (heard, handler)
}

#[test]
fn a_new_version_removes_what_it_no_longer_names_and_a_broken_one_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.yaml");
    let store = Store::new();
    let (heard, handler) = recorder();
    let source = LocalSource::new(&path, store.clone(), Some(handler));
    assert!(matches!(source.load(), Err(LocalError::Read { .. })));

    store.apply(Update::new().workload(Workload { uid: "from-elsewhere".into(), ..Default::default() }));
    fs::write(&path, FILE).unwrap();
    source.load().unwrap();
    let uid = "11111111-2222-3333-4444-555555555555";
    assert_eq!(*heard.lock().unwrap(), [format!("{uid}=local")]);
    let key = "default/example.com".parse().unwrap();
    assert_eq!(store.snapshot().endpoints(&key).count(), 1);
    assert_eq!(store.snapshot().policies().count(), 1);

    fs::write(&path, FILE.replace("enrolments:", "enrollments:")).unwrap();
    let version = store.snapshot().version();
    assert!(matches!(source.load(), Err(LocalError::Parse(_))));
    assert_eq!(store.snapshot().version(), version);

    fs::write(&path, "workloads:\n- {uid: other, name: other, namespace: default}\n").unwrap();
    source.load().unwrap();
    let snapshot = store.snapshot();
    let mut uids: Vec<_> = snapshot.workloads().map(|w| &*w.uid).collect();
    uids.sort_unstable();
    assert_eq!(uids, ["from-elsewhere", "other"]);
    assert_eq!((snapshot.services().count(), snapshot.policies().count()), (0, 0));
    assert_eq!(heard.lock().unwrap().last().unwrap(), &format!("-{uid}"));
}

#[tokio::test(start_paused = true)]
async fn changes_are_noticed_also_after_a_mistake() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.yaml");
    let store = Store::new();
    let source = LocalSource::new(&path, store.clone(), None);
    let (trigger, drain) = drain::channel();
    let running = tokio::spawn(source.run(drain));
    let mut changes = store.watch();
    let put = |content: &str| {
        let next = directory.path().join("next");
        fs::write(&next, content).unwrap();
        fs::rename(&next, &path).unwrap();
    };
    for content in [
        "workloads:\n- {uid: a, name: a, namespace: default}\n",
        "workloads: nonsense\n",
        "workloads:\n- {uid: b, name: b, namespace: default}\n",
    ] {
        put(content);
        if content.contains("uid") {
            tokio::time::timeout(Duration::from_secs(5), changes.changed()).await.expect("noticed").unwrap();
        } else {
            // Time is paused: this is a few looks at the file.
            tokio::time::sleep(POLL * 3).await;
        }
    }
    let uids: Vec<_> = store.snapshot().workloads().map(|w| w.uid.to_string()).collect();
    assert_eq!(uids, ["b"]);
    trigger.drain(Duration::from_secs(1)).await;
    running.await.unwrap();
}
