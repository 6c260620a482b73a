//! Objects as large, as long-winded and as entangled as the API takes them.

use std::time::{Duration, Instant};

use kube::Api;
use kube::api::{Patch, PatchParams};
use mesh_proto::security::Authorization;
use mesh_proto::workload::{Address, Service, Workload, address};
use prost::Message as _;
use serde_json::{Value, json};

use super::callers::{csr, names_of, request};
use super::standalone_support::eventually_async;
use super::world::{Bystander, Mesh, namespace_named, subscribe};

/// From when an object is written until its status says what became of it.
const SAID_WITHIN: Duration = Duration::from_secs(10);

fn object(version: &str, kind: &str, name: &str, spec: Value) -> Value {
    json!({"apiVersion": version, "kind": kind, "metadata": {"name": name, "namespace": "shop"}, "spec": spec})
}

fn policy(name: &str, spec: Value) -> Value {
    object("security.istio.io/v1", "AuthorizationPolicy", name, spec)
}

fn entry(name: &str, spec: Value) -> Value {
    object("networking.istio.io/v1", "ServiceEntry", name, spec)
}

fn gateway(name: &str) -> Value {
    let listener = json!({"name": "mesh", "port": 15008, "protocol": "HBONE"});
    let spec = json!({"gatewayClassName": "istio-waypoint", "listeners": [listener]});
    object("gateway.networking.k8s.io/v1", "Gateway", name, spec)
}

fn service(name: &str, waypoint: Option<&str>) -> Value {
    let mut service = object("v1", "Service", name, json!({"ports": [{"name": "http", "port": 80}]}));
    if let Some(waypoint) = waypoint {
        service["metadata"]["labels"] = json!({"istio.io/use-waypoint": waypoint});
    }
    service
}

fn as_service(body: &[u8]) -> Option<Service> {
    match Address::decode(body).ok()?.r#type? {
        address::Type::Service(service) => Some(service),
        address::Type::Workload(_) => None,
    }
}

fn as_workload(body: &[u8]) -> Option<Workload> {
    match Address::decode(body).ok()?.r#type? {
        address::Type::Workload(workload) => Some(workload),
        address::Type::Service(_) => None,
    }
}

/// Writes it, and waits until its status says what `is_it` is about.
async fn says(mesh: &Mesh, object: &Value, is_it: impl Fn(&str) -> bool) -> String {
    mesh.create(object).await.unwrap();
    let start = Instant::now();
    let said = mesh.condition(object, is_it).await;
    assert!(start.elapsed() < SAID_WITHIN, "{} after {:?}", object["metadata"]["name"], start.elapsed());
    said
}

/// Waypoints behind themselves and behind each other.
pub async fn cycles(mesh: &Mesh) {
    // Somebody's own Service of that name, behind the waypoint that it would be.
    mesh.create(&service("taken", Some("taken"))).await.unwrap();
    mesh.create(&gateway("taken")).await.unwrap();
    for name in ["wp", "wp-other"] {
        let mut gateway = gateway(name);
        gateway["metadata"]["labels"] = json!({"istio.io/use-waypoint": name});
        mesh.create(&gateway).await.unwrap();
        mesh.condition(&gateway, |it| it.starts_with("Accepted=True")).await;
    }
    mesh.condition(&gateway("taken"), |it| it.starts_with("Programmed=False Invalid") && it.contains("taken")).await;
    let services: Api<k8s_openapi::api::core::v1::Service> = Api::namespaced(mesh.client.clone(), "shop");
    for (of, behind) in [("wp", "wp-other"), ("wp-other", "wp"), ("wp", "wp")] {
        eventually_async("the waypoint's Service", async || services.get(of).await.ok()).await;
        let patch = Patch::Merge(json!({"metadata": {"labels": {"istio.io/use-waypoint": behind}}}));
        services.patch(of, &PatchParams::default(), &patch).await.unwrap();
    }
    // One that is written after those, so that they have been looked at when it is there.
    mesh.create(&service("bound", Some("wp"))).await.unwrap();
    let bound = mesh.condition(&service("bound", None), |it| it.starts_with("istio.io/WaypointBound=False")).await;
    assert!(bound.contains("has no ready pod yet"), "{bound}");
    let looked_at = async || {
        let pods: Api<k8s_openapi::api::core::v1::Pod> = Api::namespaced(mesh.client.clone(), "shop");
        let token = mesh.token("shop", "app", &pods.get("app").await.unwrap()).await;
        let mut stream = mesh.discover(&token, subscribe(mesh_proto::workload::ADDRESS_TYPE)).await.ok()?;
        let all = stream.next().await.ok()?.resources;
        let named = |name: &str| {
            let host = format!("shop/{name}.shop.svc.cluster.local");
            let found = all.iter().find(|resource| resource.name == host)?;
            as_service(&found.resource.as_ref()?.value)
        };
        named("bound")?.waypoint?;
        Some([named("wp")?, named("wp-other")?])
    };
    for service in eventually_async("the waypoints' Services", looked_at).await {
        assert!(service.waypoint.is_none(), "a waypoint has no waypoint: {service:?}");
    }
    // A route from behind the waypoint to the waypoint.
    let route = object(
        "gateway.networking.k8s.io/v1",
        "HTTPRoute",
        "round",
        json!({
            "parentRefs": [{"group": "", "kind": "Service", "name": "bound"}],
            "rules": [{"backendRefs": [{"name": "wp", "port": 15008}, {"name": "bound", "port": 80}]}],
        }),
    );
    says(mesh, &route, |it| it.starts_with("Accepted=True")).await;
}

pub async fn long_names(mesh: &Mesh, bystander: &Bystander) {
    let namespace = "n".repeat(63);
    let (account, pod, label) = ("s".repeat(253), "p".repeat(253), "l".repeat(63));
    mesh.create(&namespace_named(&namespace)).await.unwrap();
    let metadata = json!({"name": account, "namespace": namespace});
    mesh.create(&json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata})).await.unwrap();
    let made = mesh.pod(&namespace, &pod, &account, Some(&"d".repeat(253)), json!({(label.clone()): label})).await;
    let token = mesh.token(&namespace, &account, &made).await;
    let signed = eventually_async("a certificate", async || mesh.sign(&token, request(csr(), None)).await.ok()).await;
    let identity = format!("spiffe://cluster.local/ns/{namespace}/sa/{account}");
    assert_eq!(names_of(&signed.cert_chain).0, [identity]);
    let uid = format!("Kubernetes//Pod/{namespace}/{pod}");
    bystander.has(&uid, |body| as_workload(body).is_some_and(|it| it.service_account == account)).await;

    let host = format!("{0}.{0}.{0}.{1}", "h".repeat(63), "h".repeat(61));
    let ports = json!([{"number": 1, "name": "first"}, {"number": 65535, "name": "last", "targetPort": 65535}]);
    let mut longest = entry(&"e".repeat(253), json!({"hosts": [host], "ports": ports, "resolution": "DNS"}));
    longest["metadata"]["namespace"] = json!(namespace);
    says(mesh, &longest, |it| it.starts_with("Accepted=True Accepted")).await;
    let last = |body: &[u8]| as_service(body).is_some_and(|it| it.ports.iter().any(|port| port.target_port == 65535));
    bystander.has(&format!("{namespace}/{host}"), last).await;
    let name = "p".repeat(253);
    let mut policy_of_pod = policy(
        &name,
        json!({
            "selector": {"matchLabels": {(label.clone()): label}},
            "rules": [{"to": [{"operation": {"ports": ["0", "1", "65535", "65536", "-1", "http"]}}]}],
        }),
    );
    policy_of_pod["metadata"]["namespace"] = json!(namespace);
    let said = says(mesh, &policy_of_pod, |it| it.starts_with("ZtunnelAccepted=True UnsupportedValue")).await;
    assert!(["\"65536\"", "\"-1\"", "\"http\""].iter().all(|bad| said.contains(bad)), "{said}");
    let reference = format!("{namespace}/{name}");
    bystander.has(&uid, |body| as_workload(body).is_some_and(|it| it.authorization_policies == [&*reference])).await;

    // One more of each is refused by the API, by field.
    for (object, field) in [
        (namespace_named(&"n".repeat(64)), "metadata.name"),
        (policy(&"p".repeat(254), json!({})), "metadata.name"),
        (policy("label", json!({"selector": {"matchLabels": {"a": "l".repeat(64)}}})), "spec.selector.matchLabels"),
    ] {
        let refused = mesh.refusal(&object).await;
        assert!(refused.starts_with("422") && refused.contains(field), "{refused}");
    }
    let bad: Vec<String> = ["a..b", "-a.b", "a_.-", "h h", "ä.example.com"]
        .map(str::to_owned)
        .into_iter()
        .chain([format!("{}.example.com", "h".repeat(64)), "h".repeat(254), "*.*.example.com".to_owned()])
        .collect();
    let said = says(mesh, &entry("bad-hosts", json!({"hosts": bad, "resolution": "DNS"})), |it| {
        it.starts_with("Accepted=False Invalid")
    })
    .await;
    assert!(bad.iter().all(|host| said.contains(&format!("{host:?}"))), "{said}");
}

pub async fn large_policies(mesh: &Mesh, bystander: &Bystander) {
    let from = |n: usize, names: usize| {
        let names: Vec<String> = (0..names).map(|name| format!("rule-{n}-namespace-{name:0>30}")).collect();
        json!({"from": [{"source": {"namespaces": names}}]})
    };
    let rules = |count: usize, names: usize| (0..count).map(|n| from(n, names)).collect::<Vec<_>>();
    let refused = mesh.refusal(&policy("ten-thousand", json!({"rules": rules(10_000, 1)}))).await;
    assert!(refused.starts_with("422") && refused.contains("spec.rules"), "{}", &refused[..refused.len().min(500)]);
    let refused = mesh.refusal(&policy("four-mib", json!({"rules": rules(512, 160)}))).await;
    assert!(refused.starts_with("413"), "{}", &refused[..refused.len().min(500)]);

    let large = policy("large", json!({"action": "DENY", "rules": rules(512, 55)}));
    assert!((1_300_000..1_572_864).contains(&large.to_string().len()), "{}", large.to_string().len());
    says(mesh, &large, |it| it.starts_with("ZtunnelAccepted=True Accepted")).await;
    let all = |body: &[u8]| Authorization::decode(body).is_ok_and(|it| it.groups.len() == 512);
    bystander.has("shop/large", all).await;
    mesh.delete(&large).await;

    // Each rule has something wrong: as much of it is said as a condition holds.
    let unknown = |n: usize| json!({"when": [{"key": format!("no.such[{n}]-{}", "k".repeat(2000)), "values": ["v"]}]});
    let wrong = policy("wrong", json!({"rules": (0..512).map(unknown).collect::<Vec<_>>()}));
    let said = says(mesh, &wrong, |it| it.starts_with("ZtunnelAccepted=True UnsupportedValue")).await;
    assert!(said.contains("no.such[0]") && said.ends_with(" more"), "{}", &said[said.len() - 100..]);
    bystander.has("shop/wrong", |body| Authorization::decode(body).is_ok_and(|it| it.groups.is_empty())).await;
}

pub async fn large_routes(mesh: &Mesh) {
    let route = |name: &str, rules: Vec<Value>| {
        let parents = json!([{"group": "", "kind": "Service", "name": "bound"}]);
        object("gateway.networking.k8s.io/v1", "HTTPRoute", name, json!({"parentRefs": parents, "rules": rules}))
    };
    // As many matches and headers as a route may have, with as long values as that leaves.
    let header = |n: usize| {
        let value = format!("[a-f]{n}{}", "x".repeat(500));
        json!({"name": format!("h{n}"), "type": "RegularExpression", "value": value})
    };
    let of_match =
        |n: usize| json!({"headers": (0..16).map(|header_of| header(n * 16 + header_of)).collect::<Vec<_>>()});
    let rule = |n: usize| json!({"matches": (0..64).map(|found| of_match(n * 64 + found)).collect::<Vec<_>>()});
    let expressions = route("expressions", (0..2).map(rule).collect());
    assert!(expressions.to_string().len() > 1_000_000);
    let said = says(mesh, &expressions, |it| it.starts_with("PartiallyInvalid=True")).await;
    assert!(said.contains("one route may have 256 regular expressions"), "{}", &said[..500]);
    mesh.delete(&expressions).await;

    let path = |value: &str| json!({"matches": [{"path": {"type": "RegularExpression", "value": value}}]});
    let bad = ["/(\\w{100}){100}", "/(((((((((((((((a", "/a)(b", "/(?P<n>a)(?P<n>b)"];
    let said =
        says(mesh, &route("bad", bad.map(path).into()), |it| it.starts_with("Accepted=False UnsupportedValue")).await;
    assert!(said.contains("takes more memory than a waypoint gives one"), "{said}");
    assert_eq!(said.matches("is not a regular expression").count(), 3, "{said}");
}

pub async fn large_parameters(mesh: &Mesh) {
    let bomb: String = (1..12).fold("a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned(), |text, n| {
        let before = format!("*a{}, ", n - 1).repeat(9);
        format!("{text}a{n}: &a{n} [{}]\n", before.trim_end_matches(", "))
    });
    let unknown: String = (0..30_000).map(|n| format!("no-such-field-{n}: true\n")).collect();
    for (name, text) in [
        ("bomb", bomb),
        ("deep", "[".repeat(500_000)),
        ("deep-maps", (0..700).map(|n| format!("{}a:\n", " ".repeat(n))).collect()),
        ("unknown-fields", unknown),
        ("binary", "\u{1}".repeat(100_000)),
    ] {
        let data = json!({"deployment": text});
        let metadata = json!({"name": name, "namespace": "shop"});
        mesh.create(&json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}))
            .await
            .unwrap();
        let mut gateway = gateway(&format!("with-{name}"));
        gateway["spec"]["infrastructure"] = json!({"parametersRef": {"group": "", "kind": "ConfigMap", "name": name}});
        let said = says(mesh, &gateway, |it| it.starts_with("Accepted=False InvalidParameters")).await;
        assert!(said.contains("deployment"), "{name}: {}", &said[..said.len().min(500)]);
        mesh.delete(&gateway).await;
    }
    // Nobody reads what nobody names.
    let data = json!({"text": "x".repeat(1_000_000)});
    let metadata = json!({"name": "large", "namespace": "shop"});
    mesh.create(&json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})).await.unwrap();
}

pub async fn entries_that_multiply(mesh: &Mesh, bystander: &Bystander) {
    let hosts = |of: &str, count: usize| (0..count).map(|n| format!("{n}.{of}.example.com")).collect::<Vec<_>>();
    let ports = |count: usize| (1..=count).map(|n| json!({"number": n, "name": format!("p{n}")})).collect::<Vec<_>>();
    let selector = json!({"labels": {"app": "app"}});
    for name in ["a", "b", "c", "d"] {
        let spec = json!({
            "hosts": hosts(name, 250), "ports": ports(2), "resolution": "STATIC", "workloadSelector": selector,
        });
        mesh.create(&entry(name, spec)).await.unwrap();
    }
    let behind = |count: usize| move |body: &[u8]| as_workload(body).is_some_and(|it| it.services.len() == count);
    bystander.has("Kubernetes//Pod/shop/app", behind(1000)).await;

    let spec = json!({
        "hosts": hosts("selecting", 256), "ports": ports(256), "resolution": "STATIC", "workloadSelector": selector,
    });
    let said = says(mesh, &entry("selecting", spec), |it| it.starts_with("Accepted=True PartiallyInvalid")).await;
    assert!(said.contains("workloadSelector") && said.contains("10000 pairs"), "{said}");
    bystander.has("Kubernetes//Pod/shop/app", behind(1000)).await;

    let endpoints: Vec<Value> =
        (0..4096).map(|n| json!({"address": format!("192.0.{}.{}", n / 256, n % 256)})).collect();
    let spec = json!({
        "hosts": hosts("listing", 256), "ports": ports(256), "resolution": "STATIC", "endpoints": endpoints,
    });
    let listing = entry("listing", spec);
    let said = says(mesh, &listing, |it| it.starts_with("Accepted=True PartiallyInvalid")).await;
    assert!(said.contains("endpoints: 4093 are left out"), "{said}");
    mesh.delete(&listing).await;

    let identities: Vec<String> =
        (0..600).map(|n| format!("spiffe://cluster.local/ns/{n}/{}", "x".repeat(2000))).collect();
    let spec = json!({
        "hosts": hosts("named", 256), "ports": ports(1), "resolution": "DNS", "subjectAltNames": identities,
    });
    let named = entry("named", spec);
    let said = says(mesh, &named, |it| it.starts_with("Accepted=True PartiallyInvalid")).await;
    assert!(said.contains("subjectAltNames: the last 592 are left out"), "{said}");
    mesh.delete(&named).await;
}
