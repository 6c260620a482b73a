use std::fmt::Write as _;
use std::path::Path;

use super::*;
use crate::testing::FakeApi;
use crate::translate::fixture;
use crate::translate::parameters::Parameters;
use crate::translate::verdict::{Report, Verdict};
use crate::translate::world::MeshSettings;
use crate::types::{Held, Service};

const ROOT: Trust<'static> = Trust { roots: "ROOT", revocations: None };
const LISTS: Trust<'static> = Trust { revocations: Some("LISTS"), ..ROOT };

const CLASS: &str = "
kind: GatewayClass
metadata: {name: istio-waypoint}
spec: {controllerName: istio.io/mesh-controller}
";
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

const ACCOUNT: AppliedKind = AppliedKind::Part(Part::ServiceAccount);
const SERVICE: AppliedKind = AppliedKind::Part(Part::Service);
const DEPLOYMENT: AppliedKind = AppliedKind::Part(Part::Deployment);

/// All that is missing or out of date.
fn differences(world: &World, settings: &WaypointSettings, trust: &Trust<'_>) -> Vec<Apply> {
    waypoint_parts(world, settings).into_iter().chain(shared(world, trust)).collect()
}

fn withdrawn(world: &World, trust: &Trust<'_>) -> Vec<Withdrawn> {
    withdrawn_lists(world, trust).into_iter().chain(withdrawn_parts(world)).collect()
}

/// With the class of waypoints.
fn world(yaml: &str) -> World {
    fixture::world(&format!("{CLASS}\n---\n{yaml}"))
}

fn of_kind(objects: &[Apply], kind: AppliedKind) -> &Value {
    &objects.iter().find(|apply| apply.kind == kind).expect("is applied").object
}

/// `testdata/deploy/<case>/in.yaml` → `out.json`. `UPDATE_GOLDEN=1` rewrites; review the diff.
fn golden(case: &str) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/deploy").join(case);
    let input = std::fs::read_to_string(directory.join("in.yaml")).expect("in.yaml");
    let mut actual = String::new();
    for Apply { kind, mut object, .. } in differences(&fixture::world(&input), &WaypointSettings::default(), &ROOT) {
        if let AppliedKind::Part(_) = kind {
            object["metadata"]["annotations"].as_object_mut().expect("they have some").remove(APPLIED);
            writeln!(actual, "{object:#}").expect("strings take all");
        }
    }
    let golden = directory.join("out.json");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&golden, &actual).expect("out.json");
    }
    let expected = std::fs::read_to_string(&golden).expect("out.json");
    assert!(actual == expected, "{case} differs from {}; UPDATE_GOLDEN=1 rewrites it\n{actual}", golden.display());
}

#[test]
fn a_gateway_without_parameters_is_deployed_by_our_defaults() {
    golden("plain");
}

#[test]
fn what_users_want_otherwise_is_merged_into_what_is_deployed() {
    golden("patched");
}

#[test]
fn a_gateway_is_three_objects_owned_by_it() {
    let objects = differences(&world(GATEWAY), &WaypointSettings::default(), &ROOT);
    for kind in [ACCOUNT, SERVICE, DEPLOYMENT] {
        let object = of_kind(&objects, kind);
        assert_eq!(object["metadata"]["name"], "waypoint");
        assert_eq!(object["metadata"]["ownerReferences"][0]["uid"], "g-1");
        assert_eq!(object["metadata"]["labels"]["team"], "a");
        assert_eq!(object["metadata"]["labels"]["gateway.istio.io/managed"], "istio.io-mesh-controller");
        assert_eq!(object["metadata"]["annotations"]["note"], "b");
    }
    let pod = &of_kind(&objects, DEPLOYMENT)["spec"]["template"];
    assert_eq!(pod["metadata"]["labels"]["istio.io/dataplane-mode"], "none");
    assert_eq!(pod["metadata"]["labels"]["gateway.networking.k8s.io/gateway-name"], "waypoint");
    assert_eq!(pod["spec"]["serviceAccountName"], "waypoint");
    assert_eq!(of_kind(&objects, AppliedKind::ConfigMap)["data"]["root-cert.pem"], "ROOT");
}

#[test]
fn what_was_applied_is_not_applied_again_until_it_should_be_different() {
    let mut world = world(GATEWAY);
    let settings = WaypointSettings::default();
    let objects = differences(&world, &settings, &ROOT);
    for apply in &objects {
        let object = apply.object.clone();
        let key = apply.key.clone();
        fn read<T: serde::de::DeserializeOwned>(object: Value) -> Held<T> {
            Held::new(serde_json::from_value(object).expect("what we apply is well-formed"))
        }
        match apply.kind {
            ACCOUNT => _ = world.service_accounts.insert(key, read(object)),
            SERVICE => {
                let service = Service::new(serde_json::from_value(object).expect("what we apply is well-formed"));
                world.services.insert(key, Held::new(service));
            }
            DEPLOYMENT => _ = world.deployments.insert(key, read(object)),
            AppliedKind::ConfigMap => store(&mut world, apply),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(differences(&world, &settings, &ROOT), []);
    let image = WaypointSettings { image: "waypoint:2".into(), ..settings.clone() };
    assert_eq!(differences(&world, &image, &ROOT).len(), 1, "the Deployment");
    assert_eq!(differences(&world, &settings, &Trust { roots: "OTHER", ..ROOT }).len(), 1, "the root certificate");
}

/// The same world, as a control plane of this revision has it.
fn seen_by(revision: &str, world: &World) -> World {
    let mesh = MeshSettings { revision: revision.parse().expect("a revision"), ..MeshSettings::default() };
    World { mesh: Arc::new(mesh), ..world.clone() }
}

#[test]
fn a_gateway_is_deployed_by_its_revision_alone() {
    let settings = WaypointSettings::default();
    for (labelled, expected) in [("default", "default"), ("canary", "canary"), ("gone", "nobody")] {
        let labels = format!("generation: 1, labels: {{istio.io/rev: {labelled}}}");
        let world = world(&GATEWAY.replacen("generation: 1", &labels, 1));
        for revision in ["default", "canary"] {
            let world = seen_by(revision, &world);
            let objects = waypoint_parts(&world, &settings);
            assert_eq!(!objects.is_empty(), revision == expected, "{revision} with {labelled}");
            assert_eq!(shared(&world, &ROOT).len(), 1, "whoever leads the mesh writes what is everybody's");
            for apply in objects {
                let label = Value::from((revision != "default").then_some(revision));
                assert_eq!(apply.object["metadata"]["labels"]["istio.io/rev"], label);
                if apply.kind == DEPLOYMENT {
                    assert_eq!(apply.object["spec"]["template"]["metadata"]["labels"]["istio.io/rev"], label);
                }
            }
        }
    }
}

#[test]
fn a_gateway_that_is_refused_or_foreign_is_not_deployed() {
    for (from, to) in [("protocol: HBONE", "protocol: HTTP"), ("istio-waypoint", "someone-elses"), ("15008", "15009")] {
        let objects = differences(&world(&GATEWAY.replace(from, to)), &WaypointSettings::default(), &ROOT);
        assert!(objects.iter().all(|apply| apply.kind == AppliedKind::ConfigMap), "{to}");
    }
}

#[test]
fn a_gateway_whose_service_could_have_no_such_name_is_refused() {
    for (name, good) in [("w".repeat(63), true), ("w".repeat(64), false), ("1st".into(), false), ("a.b".into(), false)]
    {
        let world = world(&GATEWAY.replace("name: waypoint,", &format!("name: {name:?},")));
        let objects = differences(&world, &WaypointSettings::default(), &ROOT);
        assert_eq!(objects.iter().any(|apply| apply.kind == DEPLOYMENT), good, "{name}");
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
        let applied = apply(&client, differences(&world, &settings, &ROOT), &Told::default()).await;
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
        let applied = apply(&client, differences(&world, &WaypointSettings::default(), &ROOT), &Told::default()).await;
        assert_eq!((applied.again, !applied.obstacles.is_empty()), (true, lasts), "{code}");
    }
}

fn store(world: &mut World, apply: &Apply) {
    let table = match &*apply.key.name {
        REVOCATION_CONFIG_MAP => &mut world.revocation_lists,
        _ => &mut world.root_certs,
    };
    let object = serde_json::from_value(apply.object.clone()).expect("what we apply is well-formed");
    table.insert(apply.key.clone(), Held::new(object));
}

#[test]
fn revocation_lists_are_in_every_namespace_while_there_are_any() {
    let mut world = world("kind: Namespace\nmetadata: {name: shop}\n---\nkind: Namespace\nmetadata: {name: bank}\n");
    let settings = WaypointSettings::default();
    let lists = |objects: &[Apply]| objects.iter().filter(|apply| *apply.key.name == *REVOCATION_CONFIG_MAP).count();
    assert_eq!(lists(&differences(&world, &settings, &ROOT)), 0, "none without lists");

    let objects = differences(&world, &settings, &LISTS);
    assert_eq!((lists(&objects), objects.len()), (2, 4));
    for apply in &objects {
        store(&mut world, apply);
    }
    let key = Key::new("shop", REVOCATION_CONFIG_MAP);
    assert_eq!(world.revocation_lists[&key].data.as_ref().unwrap()["ca-crl.pem"], "LISTS");
    assert_eq!(differences(&world, &settings, &LISTS), []);
    let newer = Trust { revocations: Some("NEWER"), ..ROOT };
    assert_eq!(lists(&differences(&world, &settings, &newer)), 2);

    assert_eq!(withdrawn(&world, &LISTS), []);
    assert_eq!(withdrawn(&world, &ROOT).len(), 2);
    // Somebody's own, which has our name by chance.
    let foreign: ConfigMap = serde_json::from_value(json!({"metadata": {"name": "istio-ca-crl"}})).unwrap();
    world.revocation_lists.insert(key, Held::new(foreign));
    assert_eq!(withdrawn(&world, &ROOT).len(), 1);
}

#[tokio::test]
async fn what_is_withdrawn_is_deleted_once_and_only_if_it_is_still_the_same() {
    for (code, done) in [(200, true), (404, true), (409, true), (500, false)] {
        let client = FakeApi::answering(move |method, path, body| {
            assert_eq!((method, path), ("DELETE", "/api/v1/namespaces/shop/configmaps/istio-ca-crl"));
            let params: Value = serde_json::from_slice(body).unwrap();
            assert_eq!(params["preconditions"]["uid"], "u-1");
            let status = if code == 200 { "Success" } else { "Failure" };
            (code, json!({"kind": "Status", "status": status, "code": code, "reason": "", "message": ""}))
        });
        let key = Key::new("shop", REVOCATION_CONFIG_MAP);
        let withdrawn = Withdrawn { kind: AppliedKind::ConfigMap, key, uid: Some("u-1".into()) };
        assert_eq!(withdraw(&client, vec![withdrawn]).await, done, "{code}");
    }
}

/// The Gateway's parameters are those of `data`, a YAML map.
fn with_parameters(data: &str) -> World {
    let reference = "parametersRef: {group: \"\", kind: ConfigMap, name: parameters}";
    let gateway = GATEWAY.replace("infrastructure:", &format!("infrastructure:\n    {reference}"));
    world(&format!("{gateway}---\nkind: ConfigMap\nmetadata: {{name: parameters, namespace: shop}}\ndata: {data}\n"))
}

/// `Accepted` of the Gateway: reason and message.
fn accepted(world: &World) -> Option<(&'static str, String)> {
    let (key, gateway) = waypoints(world).next().expect("one");
    let Verdict { report: Report::Gateway { conditions, .. }, .. } =
        crate::translate::gateway::gateway(world, key, gateway, 0)?
    else {
        panic!("a Gateway's report is one of a Gateway");
    };
    conditions.into_iter().find(|wanted| wanted.r#type == "Accepted").map(|wanted| (wanted.reason, wanted.message))
}

fn parts(world: &World) -> Vec<Part> {
    let of = |apply: Apply| match apply.kind {
        AppliedKind::Part(part) => Some(part),
        _ => None,
    };
    differences(world, &WaypointSettings::default(), &ROOT).into_iter().filter_map(of).collect()
}

#[test]
fn no_patch_takes_away_what_identity_and_ownership_rest_on() {
    let pod = |spec: &str| format!("{{deployment: 'spec: {{template: {{spec: {spec}}}}}'}}");
    for (data, field) in [
        ("{serviceAccount: 'metadata: {name: other}'}".to_owned(), "serviceAccount: metadata.name"),
        ("{service: 'metadata: {namespace: other}'}".into(), "service: metadata.namespace"),
        ("{deployment: 'metadata: {ownerReferences: []}'}".into(), ""),
        ("{deployment: 'metadata: {ownerReferences: null}'}".into(), "deployment: metadata.ownerReferences"),
        (
            "{deployment: 'metadata: {ownerReferences: [{uid: g-1, $patch: delete}]}'}".into(),
            "metadata.ownerReferences",
        ),
        (
            "{deployment: 'metadata: {ownerReferences: [{uid: g-2, name: a, kind: B, apiVersion: c}]}'}".into(),
            "ownerReferences",
        ),
        ("{deployment: 'metadata: {finalizers: [a.example/b]}'}".into(), "deployment: metadata.finalizers"),
        ("{deployment: 'metadata: null'}".into(), "deployment: metadata.name"),
        ("{deployment: '$patch: replace'}".into(), "deployment: metadata.name"),
        ("{deployment: 'kind: DaemonSet'}".into(), "deployment: kind"),
        ("{deployment: 'status: {replicas: 1}'}".into(), "deployment: status"),
        ("{service: 'metadata: {labels: {gateway.istio.io/managed: me}}'}".into(), "labels.gateway.istio.io/managed"),
        ("{service: 'metadata: {labels: null}'}".into(), "metadata.labels."),
        ("{service: 'spec: {selector: {app: web}}'}".into(), "service: spec.selector"),
        ("{service: 'spec: {ports: [{port: 15008, targetPort: 80}]}'}".into(), "spec.ports.name=mesh.targetPort"),
        ("{service: 'spec: {ports: [{port: 15008, $patch: delete}]}'}".into(), "spec.ports.name=mesh.port"),
        ("{deployment: 'spec: {selector: {matchLabels: {app: web}}}'}".into(), "deployment: spec.selector"),
        (
            "{deployment: 'spec: {template: {metadata: {labels: {istio.io/dataplane-mode: ambient}}}}'}".into(),
            "dataplane-mode",
        ),
        (
            "{deployment: 'spec: {template: {metadata: {$patch: replace}}}'}".into(),
            "deployment: spec.template.metadata",
        ),
        (pod("{serviceAccountName: other}"), "deployment: spec.template.spec.serviceAccountName"),
        (pod("{serviceAccount: other}"), "deployment: spec.template.spec.serviceAccount"),
        (pod("{volumes: [{name: istio-token, $patch: delete}]}"), "volumes.name=istio-token"),
        (pod("{containers: [{name: istio-proxy, $patch: delete}]}"), "env.name=GATEWAY_NAME"),
        (
            pod("{containers: [{name: istio-proxy, env: [{name: SERVICE_ACCOUNT, valueFrom: null, value: x}]}]}"),
            "SERVICE_ACCOUNT",
        ),
        (
            "{horizontalPodAutoscaler: 'spec: {maxReplicas: 2, scaleTargetRef: {kind: Deployment, name: other}}'}"
                .into(),
            "scaleTargetRef",
        ),
        (
            "{podDisruptionBudget: 'spec: {selector: {matchLabels: {app: web}}}'}".into(),
            "podDisruptionBudget: spec.selector",
        ),
    ] {
        let world = with_parameters(&data);
        let (reason, message) = accepted(&world).expect("all is known");
        if field.is_empty() {
            assert_eq!((reason, parts(&world).len()), ("Accepted", 3), "{data}: nothing is merged: {message}");
            continue;
        }
        assert_eq!(reason, "InvalidParameters", "{data}: {message}");
        assert!(message.contains(field) && message.contains("ConfigMap shop/parameters"), "{data}: {message}");
        assert_eq!(parts(&world), [], "{data}: what runs stays as it is");
    }
}

#[test]
fn parameters_that_are_not_there_are_missed_once_they_have_been_looked_for() {
    let mut world = with_parameters("{}");
    let key = Key::new("shop", "parameters");
    assert_eq!((accepted(&world).expect("known").0, parts(&world).len()), ("Accepted", 3));
    world.parameters.remove(&key);
    assert_eq!((accepted(&world), parts(&world).len()), (None, 0), "nobody has looked");
    world.parameters.insert(key, Held::new(Parameters::missing()));
    let (reason, message) = accepted(&world).expect("known");
    assert_eq!((reason, parts(&world).len()), ("InvalidParameters", 0));
    assert!(message.contains("ConfigMap shop/parameters: does not exist: create it"), "{message}");
}

#[test]
fn the_waypoint_is_told_how_long_it_has_after_its_endpoint_is_gone() {
    let told = |data: &str| {
        let world = with_parameters(data);
        let objects = differences(&world, &WaypointSettings::default(), &ROOT);
        let container = of_kind(&objects, DEPLOYMENT)["spec"]["template"]["spec"]["containers"][0].clone();
        let env = container["env"].as_array().expect("a list").clone();
        let grace = env.iter().filter(|entry| entry["name"] == "TERMINATION_GRACE_PERIOD_SECONDS");
        let grace: Vec<_> = grace.map(|entry| entry["value"].as_str().expect("text").to_owned()).collect();
        grace.join(" ")
    };
    let pod = |spec: &str| format!("{{deployment: 'spec: {{template: {{spec: {spec}}}}}'}}");
    let container = |fields: &str| pod(&format!("{{containers: [{{name: istio-proxy, {fields}}}]}}"));
    assert_eq!(told("{}"), "25");
    assert_eq!(told(&pod("{terminationGracePeriodSeconds: 120}")), "115");
    assert_eq!(told(&container("lifecycle: null")), "30");
    assert_eq!(told(&container("lifecycle: {preStop: {sleep: {seconds: 60}}}")), "1");
    assert_eq!(
        told(&container("env: [{name: TERMINATION_GRACE_PERIOD_SECONDS, value: '7'}]").replace("'7'", "\"7\"")),
        "7"
    );
}

/// As the API would have it after it was applied.
fn applied_meta(world: &World, part: Part) -> Held<ObjectMeta> {
    let objects = differences(world, &WaypointSettings::default(), &ROOT);
    let object = of_kind(&objects, AppliedKind::Part(part));
    let mut meta: ObjectMeta = serde_json::from_value(object["metadata"].clone()).expect("well-formed");
    meta.uid = Some("of-the-object".into());
    Held::new(meta)
}

#[test]
fn what_is_there_on_demand_goes_when_nobody_asks_for_it() {
    let asked = with_parameters("{horizontalPodAutoscaler: 'spec: {maxReplicas: 3}', podDisruptionBudget: ''}");
    let key = Key::new("shop", "waypoint");
    let made = |mut world: World| {
        world.autoscalers.insert(key.clone(), applied_meta(&asked, Part::HorizontalPodAutoscaler));
        world.disruption_budgets.insert(key.clone(), applied_meta(&asked, Part::PodDisruptionBudget));
        world
    };
    let kinds = |world: &World| withdrawn(world, &ROOT).into_iter().map(|one| one.kind).collect::<Vec<_>>();
    let autoscaler = AppliedKind::Part(Part::HorizontalPodAutoscaler);
    let budget = AppliedKind::Part(Part::PodDisruptionBudget);
    assert_eq!(kinds(&made(asked.clone())), []);
    assert_eq!(kinds(&made(with_parameters("{podDisruptionBudget: ''}"))), [autoscaler]);
    assert_eq!(kinds(&made(with_parameters("{}"))), [autoscaler, budget]);
    let uids: Vec<_> = withdrawn(&made(with_parameters("{}")), &ROOT).into_iter().map(|one| one.uid).collect();
    assert_eq!(uids, [Some("of-the-object".to_owned()), Some("of-the-object".to_owned())]);

    assert_eq!(kinds(&made(with_parameters("{typo: ''}"))), [], "refused: all stays");
    let mut unknown = made(with_parameters("{}"));
    unknown.parameters.clear();
    assert_eq!(kinds(&unknown), [], "not looked for yet: all stays");
    let mut later = made(with_parameters("{}"));
    let mut gateway = (*later.gateways[&key]).clone();
    gateway.meta.uid = Some("g-2".into());
    later.gateways.insert(key.clone(), Held::new(gateway));
    assert_eq!(kinds(&later), [], "an earlier Gateway's: the API collects it");
    for spoil in [|meta: &mut ObjectMeta| _ = meta.labels.take(), |meta: &mut ObjectMeta| _ = meta.annotations.take()] {
        let mut world = with_parameters("{}");
        let mut meta = (*applied_meta(&asked, Part::HorizontalPodAutoscaler)).clone();
        spoil(&mut meta);
        world.autoscalers.insert(key.clone(), Held::new(meta));
        assert_eq!(kinds(&world), [], "not made by us");
    }
}

#[tokio::test]
async fn an_autoscaler_is_deleted_where_the_api_has_it() {
    let client = FakeApi::answering(|method, path, _| {
        let place = "/apis/autoscaling/v2/namespaces/shop/horizontalpodautoscalers/waypoint";
        assert_eq!((method, path), ("DELETE", place));
        (200, json!({"kind": "Status", "status": "Success", "code": 200, "reason": "", "message": ""}))
    });
    let kind = AppliedKind::Part(Part::HorizontalPodAutoscaler);
    assert!(withdraw(&client, vec![Withdrawn { kind, key: Key::new("shop", "waypoint"), uid: None }]).await);
}

#[test]
fn the_class_is_made_where_there_is_none_and_left_alone_where_there_is() {
    let classes = |world: &World| {
        let objects = differences(world, &WaypointSettings::default(), &ROOT);
        objects.into_iter().filter(|apply| apply.kind == AppliedKind::GatewayClass).collect::<Vec<_>>()
    };
    let mut world = World::default();
    let made = classes(&world);
    assert_eq!(made.len(), 1);
    assert_eq!(made[0].object["metadata"]["name"], "istio-waypoint");
    assert_eq!(made[0].object["spec"]["controllerName"], "istio.io/mesh-controller");
    world.not_installed = Arc::new(["GatewayClass"].into());
    assert_eq!(classes(&world), [], "before its definition is there it cannot be made");
    for controller in ["istio.io/mesh-controller", "example.org/theirs"] {
        let there = fixture::world(&CLASS.replace("istio.io/mesh-controller", controller));
        assert_eq!(classes(&there), [], "{controller}");
    }
}

#[tokio::test]
async fn a_class_that_comes_first_is_not_overwritten_and_one_that_cannot_be_made_is_no_gateway_s_fault() {
    for (code, again) in [(200, false), (409, false), (404, false), (403, true), (500, true)] {
        let client = FakeApi::answering(move |method, path, _| {
            assert_eq!((method, path), ("PATCH", "/apis/gateway.networking.k8s.io/v1/gatewayclasses/istio-waypoint"));
            let object = json!({"apiVersion": "v1", "kind": "Any", "metadata": {"name": "istio-waypoint"}});
            let status = json!({"kind": "Status", "status": "Failure", "code": code, "reason": "R", "message": "no"});
            (code, if code == 200 { object } else { status })
        });
        let objects = differences(&World::default(), &WaypointSettings::default(), &ROOT);
        let applied = apply(&client, objects, &Told::default()).await;
        assert_eq!((applied.again, applied.obstacles.len()), (again, 0), "{code}");
    }
}
