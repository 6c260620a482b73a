use std::sync::Mutex;

use super::*;
use crate::resources::lock;
use crate::testing::FakeApi;
use crate::translate::fixture::world;

const GATEWAY: &str = "
kind: Namespace
metadata: {name: shop}
---
kind: Gateway
metadata: {name: waypoint, namespace: shop, uid: g-1, generation: 1}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
  infrastructure:
    labels: {team: a, gateway.istio.io/managed: nobody}
    annotations: {note: b}
";

fn of_kind(objects: &[Apply], kind: AppliedKind) -> &Value {
    &objects.iter().find(|apply| apply.kind == kind).expect("is applied").object
}

#[test]
fn a_gateway_is_three_objects_owned_by_it() {
    let objects = differences(&world(GATEWAY), &WaypointSettings::default(), "ROOT");
    for kind in [AppliedKind::ServiceAccount, AppliedKind::Service, AppliedKind::Deployment] {
        let object = of_kind(&objects, kind);
        assert_eq!(object["metadata"]["name"], "waypoint");
        assert_eq!(object["metadata"]["ownerReferences"][0]["uid"], "g-1");
        assert_eq!(object["metadata"]["labels"]["team"], "a");
        assert_eq!(object["metadata"]["labels"]["gateway.istio.io/managed"], "istio.io-mesh-controller");
        assert_eq!(object["metadata"]["annotations"]["note"], "b");
    }
    let pod = &of_kind(&objects, AppliedKind::Deployment)["spec"]["template"];
    assert_eq!(pod["metadata"]["labels"]["istio.io/dataplane-mode"], "none");
    assert_eq!(pod["metadata"]["labels"]["gateway.networking.k8s.io/gateway-name"], "waypoint");
    assert_eq!(pod["spec"]["serviceAccountName"], "waypoint");
    assert_eq!(of_kind(&objects, AppliedKind::ConfigMap)["data"]["root-cert.pem"], "ROOT");
}

#[test]
fn what_was_applied_is_not_applied_again_until_it_should_be_different() {
    let mut world = world(GATEWAY);
    let settings = WaypointSettings::default();
    let objects = differences(&world, &settings, "ROOT");
    for apply in &objects {
        let object = apply.object.clone();
        let key = apply.key.clone();
        fn read<T: serde::de::DeserializeOwned>(object: Value) -> Arc<T> {
            Arc::new(serde_json::from_value(object).expect("what we apply is well-formed"))
        }
        match apply.kind {
            AppliedKind::ServiceAccount => _ = Arc::make_mut(&mut world.service_accounts).insert(key, read(object)),
            AppliedKind::Service => _ = Arc::make_mut(&mut world.services).insert(key, read(object)),
            AppliedKind::Deployment => _ = Arc::make_mut(&mut world.deployments).insert(key, read(object)),
            AppliedKind::ConfigMap => _ = Arc::make_mut(&mut world.root_certs).insert(key, read(object)),
        }
    }
    assert_eq!(differences(&world, &settings, "ROOT"), []);
    let image = WaypointSettings { image: "waypoint:2".into(), ..settings.clone() };
    assert_eq!(differences(&world, &image, "ROOT").len(), 1, "the Deployment");
    assert_eq!(differences(&world, &settings, "OTHER").len(), 1, "the root certificate");
}

#[test]
fn a_gateway_that_is_refused_or_foreign_is_not_deployed() {
    for (from, to) in [("protocol: HBONE", "protocol: HTTP"), ("istio-waypoint", "someone-elses"), ("15008", "15009")] {
        let objects = differences(&world(&GATEWAY.replace(from, to)), &WaypointSettings::default(), "ROOT");
        assert!(objects.iter().all(|apply| apply.kind == AppliedKind::ConfigMap), "{to}");
    }
}

#[test]
fn a_gateway_whose_service_could_have_no_such_name_is_refused() {
    for (name, good) in [("w".repeat(63), true), ("w".repeat(64), false), ("1st".into(), false), ("a.b".into(), false)]
    {
        let world = world(&GATEWAY.replace("name: waypoint,", &format!("name: {name:?},")));
        let objects = differences(&world, &WaypointSettings::default(), "ROOT");
        assert_eq!(objects.iter().any(|apply| apply.kind == AppliedKind::Deployment), good, "{name}");
    }
}

/// What is asked of the API, and what was changed there.
fn api(foreign: Value) -> (Client, Arc<Mutex<Vec<String>>>) {
    let changed = Arc::new(Mutex::new(Vec::new()));
    let client = FakeApi::answering({
        let changed = Arc::clone(&changed);
        move |method, path, _| match method {
            "GET" if path.ends_with("/services/waypoint") => (200, foreign.clone()),
            "GET" => (404, json!({"kind": "Status", "code": 404, "reason": "NotFound", "message": "no"})),
            _ => {
                lock(&changed).push(path.rsplit('/').nth(1).unwrap_or_default().to_owned());
                (200, json!({"apiVersion": "v1", "kind": "Any", "metadata": {"name": "waypoint"}}))
            }
        }
    });
    (client, changed)
}

#[tokio::test]
async fn what_somebody_else_made_is_not_taken_over_and_the_status_says_so() {
    let mut world = world(GATEWAY);
    let meta = |labels: Value, owner: &str| {
        json!({
            "apiVersion": "meta.k8s.io/v1",
            "kind": "PartialObjectMetadata",
            "metadata": {
                "name": "waypoint", "namespace": "shop", "labels": labels,
                "ownerReferences": [{"apiVersion": "v1", "kind": "Gateway", "name": "waypoint", "uid": owner}],
            },
        })
    };
    let settings = WaypointSettings::default();
    for (found, ours) in [
        (meta(json!({}), "other"), false),
        (meta(json!({}), "g-1"), true),
        (meta(json!({MANAGED_LABEL: "istio.io-mesh-controller"}), "g-0"), true),
    ] {
        let (client, changed) = api(found);
        let applied = apply(&client, differences(&world, &settings, "ROOT")).await;
        assert_eq!(lock(&changed).iter().any(|plural| plural == "services"), ours);
        assert_eq!((applied.again, applied.obstacles.is_empty()), (!ours, ours));
        if !ours {
            world.obstacles = Arc::new(applied.obstacles);
            let (key, gateway) = waypoints(&world).next().expect("one");
            let verdict = crate::translate::gateway::gateway(&world, key, gateway, 0).expect("a verdict");
            let said = format!("{verdict:?}");
            assert!(said.contains("Service shop/waypoint exists and is not this Gateway's"), "{said}");
        }
    }
}

#[tokio::test]
async fn what_may_pass_by_itself_is_tried_again_and_is_no_obstacle() {
    let world = world(GATEWAY);
    for (code, lasts) in [(500, false), (429, false), (409, false), (403, true), (422, true)] {
        let client = FakeApi::answering(move |_, _, _| {
            (code, json!({"kind": "Status", "status": "Failure", "code": code, "reason": "R", "message": "no"}))
        });
        let applied = apply(&client, differences(&world, &WaypointSettings::default(), "ROOT")).await;
        assert_eq!((applied.again, !applied.obstacles.is_empty()), (true, lasts), "{code}");
    }
}
