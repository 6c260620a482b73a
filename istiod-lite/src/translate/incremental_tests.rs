//! What is translated step by step is what is translated from scratch, and no more than what depends on a change is.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

use super::discovery::Discovery;
use super::documents;
use super::fixture::world;
use super::incremental::{Changes, Named, Translator};
use super::mesh_config::MeshConfig;
use super::world::World;
use crate::resources::Resource;
use crate::types::Key;

/// What one has who has applied every change.
#[derive(Default)]
struct Applied {
    discovery: Discovery,
    translator: Translator,
    resources: BTreeMap<Named, Resource>,
}

impl Applied {
    fn step(&mut self, world: &World) -> Changes {
        let changes = self.translator.translate(&self.discovery.of(world.clone()));
        for resource in &changes.resources {
            self.resources.insert((resource.type_url(), Arc::clone(&resource.name)), resource.clone());
        }
        for name in &changes.removed {
            self.resources.remove(name);
        }
        changes
    }
}

fn remove(world: &mut World, object: &Value) {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
    let key = Key::new(text("namespace"), text("name"));
    match object["kind"].as_str().unwrap_or_default() {
        "Namespace" => _ = world.namespaces.remove(&key),
        "Node" => _ = world.nodes.remove(&key),
        "Pod" => _ = world.pods.remove(&key),
        "Service" => _ = world.services.remove(&key),
        "EndpointSlice" => _ = world.endpoint_slices.remove(&key),
        "Deployment" => _ = world.deployments.remove(&key),
        "ConfigMap" => {
            if MeshConfig::is_in(&key, &world.mesh) {
                world.mesh_config = world.mesh_config.after(None, &world.mesh);
            }
            world.parameters.remove(&key);
            world.class_defaults.remove(&key);
        }
        "GatewayClass" => _ = world.gateway_classes.remove(&key),
        "Gateway" => _ = world.gateways.remove(&key),
        "HTTPRoute" => _ = world.http_routes.remove(&key),
        "AuthorizationPolicy" => _ = world.authorization_policies.remove(&key),
        "PeerAuthentication" => _ = world.peer_authentications.remove(&key),
        "ServiceEntry" => _ = world.service_entries.remove(&key),
        "WorkloadEntry" => _ = world.workload_entries.remove(&key),
        other => panic!("{other}"),
    }
    world.find_hidden();
}

/// What depends on one another in ways that the golden cases don't show much of.
const ENTANGLED: &str = "
kind: Service
metadata: {name: manual, namespace: shop, labels: {istio.io/use-waypoint: waypoint}}
spec: {clusterIP: 10.96.7.1, ports: [{name: http, port: 80}]}
---
kind: EndpointSlice
metadata: {name: manual-1, namespace: shop, labels: {kubernetes.io/service-name: manual}}
addressType: IPv4
endpoints: [{addresses: [10.0.0.1], targetRef: {kind: Pod, name: p1}}, {addresses: [192.0.2.9]}]
ports: [{name: http, port: 8080}]
---
kind: ServiceEntry
metadata: {name: picked, namespace: shop, labels: {istio.io/use-waypoint: waypoint}}
spec: {hosts: [picked.example.com], resolution: STATIC, workloadSelector: {labels: {app: web}}, ports: [{number: 80, name: http}]}
---
kind: AuthorizationPolicy
metadata: {name: manual, namespace: shop}
spec: {targetRefs: [{group: '', kind: Service, name: manual}], rules: [{}]}
---
kind: AuthorizationPolicy
metadata: {name: picked, namespace: shop}
spec: {targetRefs: [{group: networking.istio.io, kind: ServiceEntry, name: picked}], rules: [{}]}
---
kind: AuthorizationPolicy
metadata: {name: pods, namespace: shop}
spec: {targetRefs: [{group: '', kind: Service, name: picks}], rules: [{}]}
---
kind: Service
metadata: {name: picks, namespace: shop, labels: {istio.io/use-waypoint: waypoint}}
spec: {clusterIP: 10.96.7.2, selector: {app: web}, ports: [{name: http, port: 80}]}
---
kind: Pod
metadata: {name: p1, namespace: shop, uid: p1, labels: {app: web}}
spec: {nodeName: n1, containers: []}
status: {phase: Running, podIP: 10.0.0.1}
---
kind: Pod
metadata: {name: p2, namespace: shop, uid: p2, labels: {app: db}}
spec: {nodeName: n1, containers: []}
status: {phase: Running, podIP: 10.0.0.2}
---
kind: WorkloadEntry
metadata: {name: abroad, namespace: shop}
spec: {network: n2, address: 10.0.0.3, labels: {app: web}, serviceAccount: web}
---
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data: {mesh: 'trustDomainAliases: [old.example]'}
---
kind: Gateway
metadata: {name: east, namespace: istio-system, labels: {topology.istio.io/network: n2}}
spec: {gatewayClassName: istio-remote, addresses: [{value: 192.0.2.7}], listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
kind: Gateway
metadata: {name: waypoint, namespace: shop}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
status: {addresses: [{value: 10.96.1.1}]}
---
kind: Service
metadata: {name: istiod-canary, namespace: istio-system, labels: {istio.io/rev: canary}}
spec: {clusterIP: 10.96.7.3, ports: [{name: grpc-xds, port: 15012}]}
---
kind: Service
metadata: {name: tag-of-revisions, namespace: istio-system, labels: {istio.io/tag: prod, istio.io/rev: canary}}
spec: {clusterIP: 10.96.7.4, ports: [{name: grpc-xds, port: 15012}]}
";

/// The objects of all golden cases, in one world: many have the same names, so that they replace one another.
fn objects() -> Vec<Value> {
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/translate");
    let mut cases: Vec<_> = std::fs::read_dir(cases).expect("cases").map(|case| case.expect("one").path()).collect();
    cases.sort();
    let texts = cases.iter().map(|case| std::fs::read_to_string(case.join("in.yaml")).expect("in.yaml"));
    let texts = texts.chain([ENTANGLED.to_owned()]);
    let documents: Vec<String> =
        texts.flat_map(|text| text.split("\n---\n").map(str::to_owned).collect::<Vec<_>>()).collect();
    let documents = documents.iter().filter(|document| !document.trim().is_empty());
    let mut objects: Vec<Value> = documents.map(|document| serde_saphyr::from_str(document).expect("YAML")).collect();
    for pod in objects.iter_mut().filter(|object| object["kind"] == "Pod") {
        // Each case has its own, which are those of other pods in others.
        pod["metadata"]["uid"] = format!("{}-{}", pod["metadata"]["namespace"], pod["metadata"]["name"]).into();
    }
    objects
}

/// Changes one thing that translation looks at.
fn mutated(random: &mut StdRng, object: &Value) -> Value {
    let mut object = object.clone();
    if !object["spec"].is_object() && !object["spec"].is_null() {
        return object; // One that cannot be read.
    }
    let pick = |random: &mut StdRng, values: &[Value]| values.choose(random).expect("some").clone();
    let networks = ["", "n2", "net1", "net2", "net3"].map(|network| json!(network));
    let revisions = [json!("default"), json!("canary"), json!("prod"), json!("gone")];
    let waypoints = [json!(null), json!("none"), json!("waypoint"), json!("canary"), json!("gone")];
    match object["kind"].as_str().unwrap_or_default() {
        "ConfigMap" if object["metadata"]["name"] == "istio" => {
            let texts = [
                "{}",
                "{trustDomainAliases: [old.example]}",
                "{trustDomainAliases: 5}",
                "{discoverySelectors: [{matchLabels: {istio.io/dataplane-mode: ambient}}]}",
                "{discoverySelectors: [{matchExpressions: [{key: istio.io/dataplane-mode, operator: DoesNotExist}]}]}",
                "{serviceEntryVisibility: {defaultVisibility: NAMESPACE}}",
                "{serviceEntryVisibility: {policies: [{visibility: NONE, matchingRules: [{namespaceSelector: \
                 {matchLabels: {istio.io/dataplane-mode: ambient}}}]}]}}",
            ];
            object["data"] = json!({"mesh": pick(random, &texts.map(|text| json!(text)))});
        }
        "Namespace" => match random.random_range(0..5) {
            4 => object["metadata"]["labels"]["istio.io/rev"] = pick(random, &revisions),
            0 => {
                object["metadata"]["labels"]["istio.io/dataplane-mode"] =
                    pick(random, &[json!("ambient"), json!("none")])
            }
            1 => object["metadata"]["labels"]["istio.io/use-waypoint"] = pick(random, &waypoints[1..]),
            2 => object["metadata"]["labels"]["topology.istio.io/network"] = pick(random, &[json!(""), json!("n2")]),
            _ => {
                object["metadata"]["annotations"] =
                    json!({"networking.istio.io/traffic-distribution": "PreferSameZone"})
            }
        },
        "Node" => object["metadata"]["labels"]["topology.kubernetes.io/zone"] = pick(random, &[json!("a"), json!("b")]),
        "Pod" => match random.random_range(0..6) {
            5 => object["metadata"]["labels"]["topology.istio.io/network"] = pick(random, &networks),
            0 => object["metadata"]["labels"]["app"] = pick(random, &[json!("web"), json!("cart"), json!("db")]),
            1 => object["metadata"]["labels"]["istio.io/use-waypoint"] = pick(random, &waypoints[1..]),
            2 => object["status"]["podIP"] = json!(format!("10.0.0.{}", random.random_range(1..20))),
            3 => object["status"]["phase"] = pick(random, &[json!("Succeeded"), json!("Running"), json!("Pending")]),
            _ => {
                let value = pick(random, &[json!("enabled"), json!("pending")]);
                object["metadata"]["annotations"]["ambient.istio.io/redirection"] = value;
            }
        },
        "Service" => match random.random_range(0..5) {
            4 => object["metadata"]["labels"]["istio.io/rev"] = pick(random, &revisions),
            0 => {
                object["spec"]["selector"] = pick(random, &[json!(null), json!({"app": "web"}), json!({"app": "cart"})])
            }
            1 => object["metadata"]["labels"]["istio.io/use-waypoint"] = pick(random, &waypoints[1..]),
            2 => object["spec"]["type"] = pick(random, &[json!("ClusterIP"), json!("ExternalName")]),
            _ => object["spec"]["clusterIP"] = json!(format!("10.96.0.{}", random.random_range(1..20))),
        },
        "Gateway" if object["spec"]["gatewayClassName"] == "istio-remote" => match random.random_range(0..4) {
            0 => object["metadata"]["labels"]["topology.istio.io/network"] = pick(random, &networks),
            1 => object["spec"]["addresses"] = json!([{"value": format!("10.96.0.{}", random.random_range(1..20))}]),
            2 => object["spec"]["addresses"] = json!([{"type": "Hostname", "value": "east.example.com"}]),
            _ => object["metadata"]["creationTimestamp"] = pick(random, &[json!(null), json!("2026-01-01T00:00:00Z")]),
        },
        "Gateway" => match random.random_range(0..4) {
            2 => object["metadata"]["labels"]["istio.io/rev"] = pick(random, &revisions),
            3 => {
                object["metadata"]["labels"]["istio.io/rev"] = pick(random, &revisions);
                object["status"] = json!(null);
            }
            0 => object["status"] = pick(random, &[json!(null), json!({"addresses": [{"value": "10.96.1.1"}]})]),
            _ => {
                object["metadata"]["labels"]["istio.io/waypoint-for"] = pick(random, &[json!("all"), json!("workload")])
            }
        },
        "AuthorizationPolicy" => {
            object["spec"]["action"] = pick(random, &[json!("ALLOW"), json!("DENY"), json!("AUDIT")]);
        }
        "PeerAuthentication" => {
            object["spec"]["mtls"] = pick(random, &[json!({"mode": "STRICT"}), json!({"mode": "PERMISSIVE"})]);
        }
        "ServiceEntry" => match random.random_range(0..5) {
            2 => {
                object["spec"]["workloadSelector"] =
                    json!({"labels": {"app": pick(random, &[json!("web"), json!("db")])}})
            }
            3 => object["spec"]["ports"] = json!([{"number": random.random_range(80..83), "name": "http"}]),
            4 => object["metadata"]["labels"]["istio.io/use-waypoint"] = pick(random, &waypoints[1..]),
            0 => object["spec"]["addresses"] = json!([format!("10.0.0.{}", random.random_range(1..20))]),
            _ => object["spec"]["hosts"] = json!(["www.example.com", "web.shop.svc.cluster.local"]),
        },
        "EndpointSlice" => match random.random_range(0..2) {
            0 => {
                let to = pick(random, &[json!("manual"), json!("other")]);
                object["metadata"]["labels"]["kubernetes.io/service-name"] = to;
            }
            _ => {
                let pod = pick(random, &[json!("p1"), json!("p2")]);
                object["endpoints"] = json!([{"addresses": ["10.0.0.1"], "targetRef": {"kind": "Pod", "name": pod}}]);
            }
        },
        "WorkloadEntry" => match random.random_range(0..4) {
            0 => object["spec"]["network"] = pick(random, &networks),
            1 => object["metadata"]["labels"]["topology.istio.io/network"] = pick(random, &networks),
            2 => object["spec"]["labels"]["app"] = pick(random, &[json!("web"), json!("db")]),
            _ => object["spec"]["address"] = json!(format!("10.96.0.{}", random.random_range(1..20))),
        },
        _ => {}
    }
    object
}

#[test]
fn step_by_step_comes_to_the_same_as_from_scratch() {
    let objects = objects();
    assert!(objects.len() > 100, "{} objects", objects.len());
    let kind = |object: &Value| object["kind"].as_str().unwrap_or_default().to_owned();
    let kinds: Vec<String> = objects.iter().map(kind).collect::<BTreeSet<_>>().into_iter().collect();
    for seed in 0..3 {
        let mut random = StdRng::seed_from_u64(seed);
        let (mut world, mut applied) = (World::default(), Applied::default());
        let mut edits: Vec<String> = Vec::new();
        for step in 0..200 {
            // At first they come, then they change.
            for _ in 0..if step < 10 { 20 } else { random.random_range(1..4) } {
                // As many of each kind, and half of the time of those that are about one another.
                let chosen = kinds.choose(&mut random).expect("some");
                let entangled = random.random_bool(0.5);
                let candidates: Vec<&Value> = objects
                    .iter()
                    .enumerate()
                    .filter(|(at, object)| {
                        kind(object) == *chosen
                            && (!entangled || objects.len() - at <= ENTANGLED.matches("\nkind: ").count())
                    })
                    .map(|(_, object)| object)
                    .collect();
                let Some(object) = candidates.choose(&mut random).copied() else { continue };
                let (what, object) = match random.random_range(0..10) {
                    0..2 if step >= 10 => ("-", object.clone()),
                    2..6 => ("~", mutated(&mut random, object)),
                    _ => ("+", object.clone()),
                };
                edits.push(format!("{what} {object}"));
                match what {
                    "-" => remove(&mut world, &object),
                    _ => _ = documents::add(&mut world, object),
                }
            }
            if random.random_bool(0.1) {
                let uids: Vec<String> =
                    world.pods.values().filter_map(|pod| Some(pod.uid.as_deref()?.to_owned())).collect();
                let uid = uids.choose(&mut random).cloned().unwrap_or_default();
                match random.random_bool(0.5) {
                    true => world.leaving = Arc::new([uid].into()),
                    false => world.epochs = [(uid, random.random::<u64>())].into_iter().collect(),
                }
            }
            let changes = applied.step(&world);
            let mut scratch = Applied::default();
            let whole = scratch.step(&world);
            let recent = &edits[edits.len().saturating_sub(4)..];
            let keys = |of: &Applied| of.resources.keys().cloned().collect::<Vec<_>>();
            assert_eq!(keys(&applied), keys(&scratch), "seed {seed}, step {step}: {recent:#?}");
            for (name, resource) in &applied.resources {
                assert!(*resource == scratch.resources[name], "seed {seed}, step {step}: {name:?} after {recent:#?}");
            }
            assert_eq!(changes.verdicts, whole.verdicts, "seed {seed}, step {step}: {recent:#?}");
        }
    }
}

/// What came of a pod is told by the world it came of, and its name may be another in the next.
#[test]
fn a_pod_is_withdrawn_by_the_name_it_had() {
    let mut world = town();
    let mut applied = Applied::default();
    applied.step(&world);
    world.mesh = Arc::new(super::world::MeshSettings { cluster_id: "other".into(), ..(*world.mesh).clone() });
    applied.step(&world);
    let mut anew = Applied::default();
    anew.step(&world);
    assert_eq!(applied.resources, anew.resources);
    let pods: Vec<Key> = world.pods.keys().cloned().collect();
    assert!(!pods.is_empty());
    pods.iter().for_each(|pod| _ = world.pods.remove(pod));
    applied.step(&world);
    let mut anew = Applied::default();
    anew.step(&world);
    assert_eq!(applied.resources, anew.resources);
}

/// Three namespaces of 200 pods each, behind ten Services.
fn town() -> World {
    let mut documents = Vec::new();
    for namespace in ["a", "b", "c"] {
        documents.push(format!(
            "kind: Namespace\nmetadata: {{name: {namespace}, labels: {{istio.io/dataplane-mode: ambient}}}}"
        ));
        for n in 0..10 {
            documents.push(format!(
                "kind: Service\nmetadata: {{name: s{n}, namespace: {namespace}}}\n\
                 spec: {{clusterIP: 10.96.0.{n}, selector: {{app: s{n}}}, ports: [{{port: 80}}]}}"
            ));
        }
        for n in 0..200 {
            documents.push(format!(
                "kind: Pod\nmetadata: {{name: p{n}, namespace: {namespace}, uid: {namespace}-{n}, labels: {{app: s{}}}}}\n\
                 spec: {{nodeName: n{}, containers: []}}\nstatus: {{phase: Running, podIP: 10.1.0.{n}}}",
                n % 10,
                n % 4
            ));
        }
    }
    for n in 0..4 {
        documents.push(format!("kind: Node\nmetadata: {{name: n{n}, labels: {{topology.kubernetes.io/zone: z}}}}"));
    }
    world(&documents.join("\n---\n"))
}

#[test]
fn a_change_costs_what_depends_on_it() {
    let policy = |spec: &str| {
        format!("kind: AuthorizationPolicy\nmetadata: {{name: x, namespace: a}}\nspec: {{{spec}, rules: [{{}}]}}")
    };
    let east = "kind: Gateway\nmetadata: {name: east, namespace: istio-system, labels: {topology.istio.io/network: n2}}\n\
                spec: {gatewayClassName: istio-remote, addresses: [{value: 192.0.2.1}], \
                listeners: [{name: mesh, port: 15008, protocol: HBONE}]}";
    let cases: [(&str, String, usize); 16] = [
        ("nothing that matters", "kind: Node\nmetadata: {name: n1, labels: {topology.kubernetes.io/zone: z}}\nstatus: {}".into(), 0),
        ("a node elsewhere", "kind: Node\nmetadata: {name: n1, labels: {topology.kubernetes.io/zone: other}}".into(), 150),
        ("a pod", "kind: Pod\nmetadata: {name: p1, namespace: a, uid: a-1, labels: {app: s1}}\nspec: {containers: []}\nstatus: {phase: Running, podIP: 10.1.0.1}".into(), 1),
        ("a Service", "kind: Service\nmetadata: {name: s1, namespace: a}\nspec: {clusterIP: 10.96.0.1, selector: {app: s1}, ports: [{port: 81}]}".into(), 20),
        ("what a Service selects", "kind: Service\nmetadata: {name: s1, namespace: a}\nspec: {clusterIP: 10.96.0.1, selector: {app: s2}, ports: [{port: 80}]}".into(), 40),
        ("a slice of what is selected", "kind: EndpointSlice\nmetadata: {name: s1-x, namespace: a, labels: {kubernetes.io/service-name: s1}}\naddressType: IPv4\nendpoints: [{addresses: [10.1.0.1], targetRef: {kind: Pod, name: p1}}]\nports: []".into(), 0),
        ("a namespace", "kind: Namespace\nmetadata: {name: a, labels: {x: other}}".into(), 200),
        ("a policy of a namespace", policy("action: DENY"), 0),
        ("a policy of some", policy("selector: {matchLabels: {app: s3}}"), 20),
        ("a mesh-wide policy of some", policy("selector: {matchLabels: {app: s3}}").replace("namespace: a", "namespace: istio-system"), 60),
        ("a mode of some", "kind: PeerAuthentication\nmetadata: {name: x, namespace: a}\nspec: {selector: {matchLabels: {app: s3}}, mtls: {mode: STRICT}}".into(), 20),
        ("a mode of a namespace", "kind: PeerAuthentication\nmetadata: {name: x, namespace: a}\nspec: {mtls: {mode: STRICT}}".into(), 200),
        ("a way to another network", east.into(), 0),
        ("a workload of another network", "kind: WorkloadEntry\nmetadata: {name: w, namespace: a}\nspec: {network: n2, address: 10.1.0.9, labels: {app: s1}}".into(), 0),
        ("what of MeshConfig nothing is done about", "kind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\ndata: {mesh: 'accessLogFile: /dev/stdout'}".into(), 0),
        ("a waypoint that nobody asks for", "kind: Gateway\nmetadata: {name: w, namespace: a}\nspec: {gatewayClassName: istio-waypoint, listeners: []}".into(), 0),
    ];
    for (what, document, pods) in cases {
        let mut world = town();
        let mut applied = Applied::default();
        assert_eq!(applied.step(&world).pods.len(), 600);
        assert_eq!(applied.step(&world).pods.len(), 0, "nothing changed");
        let object = serde_saphyr::from_str(&document).unwrap_or_else(|error| panic!("{error}\n{document}"));
        documents::add(&mut world, object).expect(what);
        assert_eq!(applied.step(&world).pods.len(), pods, "{what}");
    }
}

/// Each policy is compared with its former self, not with all others.
#[test]
fn one_policy_more_among_ten_thousand_costs_no_square() {
    let policy = |kind: &str, n: usize| {
        let selector = json!({"matchLabels": {"app": format!("app-{n}")}});
        let spec = match kind {
            "AuthorizationPolicy" => json!({"selector": selector, "rules": [{}]}),
            _ => json!({"selector": selector, "portLevelMtls": {"80": {"mode": "STRICT"}}}),
        };
        json!({"kind": kind, "metadata": {"name": format!("policy-of-a-long-name-{n}"), "namespace": "shop"}, "spec": spec})
    };
    let mut world = world("kind: Namespace\nmetadata: {name: shop}\n");
    for n in 0..10_000 {
        for kind in ["AuthorizationPolicy", "PeerAuthentication"] {
            documents::add(&mut world, policy(kind, n)).expect("a policy");
        }
    }
    let mut applied = Applied::default();
    applied.step(&world);
    documents::add(&mut world, policy("AuthorizationPolicy", 10_000)).expect("a policy");
    let start = std::time::Instant::now();
    let changes = applied.step(&world);
    assert!(start.elapsed() < std::time::Duration::from_secs(10), "{:?}", start.elapsed());
    assert!(changes.resources.iter().any(|resource| &*resource.name == "shop/policy-of-a-long-name-10000"));
}
