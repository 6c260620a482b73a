//! `testdata/admission/<plural>.yaml` has objects that are good, bad, or to be warned of, as their names say; `<plural>.txt`
//! what is said of each. `UPDATE_GOLDEN=1` rewrites; review the diff.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::*;
use crate::revision::Revision;
use crate::translate::world::MeshSettings;
use crate::translate::{documents, fixture, translate};

/// Plural and kind of what is judged, with the group and the versions that are served.
const KINDS: &[(&str, &str, &str, &[&str])] = &[
    ("authorizationpolicies", "AuthorizationPolicy", "security.istio.io", &["v1", "v1beta1"]),
    ("peerauthentications", "PeerAuthentication", "security.istio.io", &["v1", "v1beta1"]),
    ("serviceentries", "ServiceEntry", "networking.istio.io", &["v1", "v1beta1", "v1alpha3"]),
    ("workloadentries", "WorkloadEntry", "networking.istio.io", &["v1", "v1beta1", "v1alpha3"]),
    ("gatewayclasses", "GatewayClass", "gateway.networking.k8s.io", &["v1", "v1beta1"]),
    ("gateways", "Gateway", "gateway.networking.k8s.io", &["v1", "v1beta1"]),
    ("httproutes", "HTTPRoute", "gateway.networking.k8s.io", &["v1", "v1beta1"]),
];

/// Likewise, of what nothing here carries out and has no CRD of ours.
const OTHERS: &[(&str, &str, &str, &[&str])] =
    &[("requestauthentications", "RequestAuthentication", "security.istio.io", &["v1", "v1beta1"])];

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn parsed(yaml: &str) -> Value {
    serde_saphyr::from_str(yaml).unwrap_or_else(|error| panic!("{error}\n{yaml}"))
}

fn known(yaml: &str) -> Known {
    Known { world: fixture::world(yaml), is_complete: true }
}

fn shop() -> Known {
    known(&read(&root("testdata/admission/world.yaml")))
}

/// The objects of a table, each with what it leaves out.
fn objects(plural: &str) -> Vec<Value> {
    let (_, kind, group, versions) = KINDS.iter().chain(OTHERS).find(|(of, ..)| *of == plural).expect("a kind");
    let text = read(&root(&format!("testdata/admission/{plural}.yaml")));
    let complete = |document: &str| {
        let mut object = parsed(document);
        object["kind"] = (*kind).into();
        object["apiVersion"] = format!("{group}/{}", versions[0]).into();
        if *kind != "GatewayClass" && object["metadata"]["namespace"].is_null() {
            object["metadata"]["namespace"] = "shop".into();
        }
        object
    };
    text.split("\n---\n").map(complete).collect()
}

/// As the API server asks.
fn request(operation: &str, object: Option<Value>, old: Option<Value>) -> Request {
    let either = object.as_ref().or(old.as_ref()).expect("an object");
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let asked = json!({
        "uid": "u-1",
        "kind": {"group": "", "version": "v1", "kind": either["kind"]},
        "namespace": text(&either["metadata"]["namespace"]),
        "operation": operation,
        "object": object,
        "oldObject": old,
    });
    serde_json::from_value(asked).expect("a request")
}

fn created(known: &Known, object: Value) -> Outcome {
    decide(known, &mut request("CREATE", Some(object), None))
}

fn updated(old: &Value, new: &Value) -> Outcome {
    decide(&shop(), &mut request("UPDATE", Some(new.clone()), Some(old.clone())))
}

fn is_refused(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Refused { .. })
}

#[test]
fn what_can_never_work_is_refused_and_what_may_work_later_warned_of() {
    let shop = shop();
    for (plural, ..) in KINDS.iter().chain(OTHERS) {
        let mut said = String::new();
        for object in objects(plural) {
            let name = object["metadata"]["name"].as_str().expect("a name").to_owned();
            let (word, texts) = match created(&shop, object) {
                Outcome::Admitted { warnings } if warnings.is_empty() => ("good", warnings),
                Outcome::Admitted { warnings } => ("warned", warnings),
                Outcome::Refused { message } => ("bad", vec![message]),
            };
            assert!(name.contains(word), "{plural} {name} is {word}: {texts:#?}");
            writeln!(said, "{name}").expect("strings take all");
            texts.iter().for_each(|text| writeln!(said, "    {text}").expect("strings take all"));
        }
        let golden = root(&format!("testdata/admission/{plural}.txt"));
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(&golden, &said).expect("the golden file");
        }
        assert!(said == read(&golden), "{plural} differs; UPDATE_GOLDEN=1 rewrites it\n{said}");
    }
}

/// A refusal must not be ahead of the translation: what is refused, the status would not call in order.
#[test]
fn nothing_is_refused_that_would_be_enforced() {
    let mut refused = 0;
    for (plural, kind, ..) in KINDS {
        for object in objects(plural).into_iter().filter(|object| is_refused(&created(&shop(), object.clone()))) {
            refused += 1;
            let name = object["metadata"]["name"].clone();
            let mut world = shop().world;
            assert_eq!(documents::add(&mut world, object), Ok(true));
            let verdicts = translate(&world).verdicts;
            let of_it = |verdict: &&crate::translate::verdict::Verdict| {
                verdict.kind.name() == *kind && name == *verdict.key.name
            };
            let verdict = verdicts.iter().find(of_it).unwrap_or_else(|| panic!("{plural} {name}: no verdict"));
            assert!(verdict.report.conditions().iter().any(|wanted| wanted.is_bad()), "{plural} {name}: {verdict:#?}");
        }
    }
    assert!(refused > 30, "{refused}");
}

/// Objects that have every field that there is.
#[test]
fn fields_that_are_not_done_yet_are_never_refused() {
    for (plural, kind, group, _) in KINDS {
        let text = read(&root(&format!("testdata/fields/{plural}.yaml")));
        let name = |object: &Value| object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let all = text.split("\n---\n").map(parsed);
        for mut subject in all.filter(|object| object["kind"] == *kind && name(object).starts_with("subject")) {
            subject["apiVersion"] = format!("{group}/v1").into();
            // Of action CUSTOM alone, which theirs is not.
            subject["spec"].as_object_mut().expect("a spec").remove("provider");
            let outcome = created(&known(&text), subject.clone());
            assert!(!is_refused(&outcome), "{plural} {}: {outcome:#?}", name(&subject));
        }
    }
}

#[test]
fn the_samples_are_admitted_without_a_word() {
    let mut world = World::default();
    let mut samples = Vec::new();
    for entry in std::fs::read_dir(root("../manifests/samples")).expect("samples") {
        let path = entry.expect("a sample").path();
        if path.extension().is_some_and(|end| end == "yaml") {
            let all: Vec<Value> = serde_saphyr::from_multiple(&read(&path)).expect("YAML");
            samples.extend(all.into_iter().filter(|object| !object.is_null()));
        }
    }
    for object in &samples {
        let mut object = object.clone();
        match object["kind"].as_str() {
            // As waypoint.yaml says.
            Some("Namespace") => object["metadata"]["labels"] = json!({"istio.io/use-waypoint": "waypoint"}),
            Some("Gateway") => object["status"] = json!({"addresses": [{"type": "IPAddress", "value": "10.96.0.9"}]}),
            _ => {}
        }
        documents::add(&mut world, object).expect("an object");
    }
    let known = Known { world, is_complete: true };
    let mut judged = 0;
    for object in samples.into_iter().filter(|object| KINDS.iter().any(|(_, kind, ..)| object["kind"] == *kind)) {
        let name = object["metadata"]["name"].clone();
        assert_eq!(created(&known, object), Outcome::SILENT, "{name}");
        judged += 1;
    }
    assert!(judged >= 7, "{judged}");
}

fn policy(blocks: &[&str]) -> Value {
    let rules: Vec<Value> = blocks.iter().map(|block| json!({"from": [{"source": {"ipBlocks": [block]}}]})).collect();
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "p", "namespace": "shop"}, "spec": {"rules": rules},
    })
}

#[test]
fn what_was_as_bad_before_stays_and_what_is_new_is_refused() {
    let old = policy(&["x", "10.0.0.1"]);
    let mut labelled = old.clone();
    labelled["metadata"]["labels"] = json!({"a": "b"});
    let Outcome::Admitted { warnings } = updated(&old, &labelled) else { panic!("as bad as before") };
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].starts_with("AuthorizationPolicy shop/p: spec.rules[0].from[0].source.ipBlocks: \"x\""));
    // Somewhere else in the list, and one of two mended.
    assert!(!is_refused(&updated(&old, &policy(&["10.0.0.1", "x"]))));
    assert!(!is_refused(&updated(&policy(&["x", "x"]), &policy(&["x"]))));
    assert_eq!(updated(&old, &policy(&["10.0.0.1"])), Outcome::SILENT);
    // The same once more, and another one, of which alone it is spoken.
    assert!(is_refused(&updated(&old, &policy(&["x", "x"]))));
    let Outcome::Refused { message } = updated(&old, &policy(&["x", "y"])) else { panic!("it is new") };
    assert_eq!(
        message,
        "spec.rules[1].from[0].source.ipBlocks: \"y\": neither an address nor a CIDR; write it as 10.1.2.3 or 10.1.0.0/16."
    );
    assert!(is_refused(&updated(&policy(&["10.0.0.1"]), &old)));
}

#[test]
fn what_writes_no_spec_is_not_looked_at() {
    let bad = policy(&["x"]);
    let passes = |request: &mut Request| decide(&shop(), request) == Outcome::SILENT;
    assert!(passes(&mut request("DELETE", None, Some(bad.clone()))));
    assert!(passes(&mut request("CONNECT", Some(bad.clone()), None)));
    assert!(passes(&mut request("CREATE", None, Some(bad.clone()))));
    assert!(passes(&mut Request { object: Some(json!(1)), ..request("CREATE", Some(bad.clone()), None) }));
    let mut status = request("UPDATE", Some(bad.clone()), Some(policy(&[])));
    assert!(is_refused(&decide(&shop(), &mut status.clone())), "it would be");
    status.sub_resource = Some("status".into());
    assert!(passes(&mut status));
    let mut dying = bad.clone();
    dying["metadata"]["deletionTimestamp"] = "2026-11-27T00:00:00Z".into();
    assert!(passes(&mut request("UPDATE", Some(dying), Some(bad))));
    let other =
        json!({"apiVersion": "networking.istio.io/v1", "kind": "Gateway", "metadata": {"name": "1"}, "spec": 1});
    assert!(passes(&mut request("CREATE", Some(other), None)), "of another group");
}

#[test]
fn until_everything_is_listed_nothing_is_said_to_be_missing() {
    let policy = objects("authorizationpolicies").remove(18);
    assert_eq!(policy["metadata"]["name"], "warned-missing-service");
    assert_ne!(created(&shop(), policy.clone()), Outcome::SILENT);
    assert_eq!(created(&Known::default(), policy), Outcome::SILENT);
    assert!(is_refused(&created(&Known::default(), super::tests::policy(&["x"]))), "by itself it is as bad");
}

#[test]
fn a_name_that_is_yet_to_be_made_is_none_that_is_wrong() {
    let mut waypoint = objects("gateways").remove(0);
    waypoint["metadata"] = json!({"generateName": "waypoint-", "namespace": "shop"});
    assert_eq!(created(&shop(), waypoint.clone()), Outcome::SILENT);
    waypoint["metadata"]["generateName"] = "1-".into();
    assert!(is_refused(&created(&shop(), waypoint)));
}

#[test]
fn older_versions_are_judged_alike_and_the_namespace_is_the_requests() {
    let mut object = policy(&["x"]);
    object["apiVersion"] = "security.istio.io/v1beta1".into();
    assert!(is_refused(&created(&shop(), object.clone())));
    object["metadata"].as_object_mut().expect("metadata").remove("namespace");
    object["spec"] = json!({"targetRefs": [{"kind": "Service", "name": "web"}]});
    let mut request = request("CREATE", Some(object), None);
    request.namespace = Some("shop".into());
    assert_eq!(decide(&shop(), &mut request), Outcome::SILENT);
}

#[test]
fn no_answer_is_longer_than_the_api_takes() {
    let many: Vec<String> = (0..100).map(|n| format!("{n}\u{1b}{}", "ä".repeat(5000))).collect();
    let bad: Vec<&str> = many.iter().map(String::as_str).collect();
    let Outcome::Refused { message } = created(&shop(), policy(&bad)) else { panic!("it is refused") };
    assert!(message.chars().count() <= LONGEST_REFUSAL, "{}", message.chars().count());
    assert!(!message.contains(char::is_control), "{message}");
    let Outcome::Admitted { warnings } = updated(&policy(&bad), &policy(&bad)) else { panic!("as before") };
    assert_eq!(warnings.len(), WARNINGS + 1);
    assert!(warnings.iter().all(|warning| warning.chars().count() <= LONGEST_WARNING), "{warnings:#?}");
    assert!(!warnings.concat().contains(char::is_control));
    assert!(warnings[WARNINGS].ends_with("and others; see its status"), "{}", warnings[WARNINGS]);
    let short: Vec<String> = (0..40).map(|n| format!("x{n}")).collect();
    let short: Vec<&str> = short.iter().map(String::as_str).collect();
    let Outcome::Refused { message } = created(&shop(), policy(&short)) else { panic!("it is refused") };
    assert!(message.ends_with("And others."), "{message}");
}

#[test]
fn questions_of_another_kind_are_not_answered() {
    let ask = |version: &str, kind: &str| {
        let review = json!({"apiVersion": version, "kind": kind, "request": {"uid": "u", "operation": "CREATE"}});
        serde_json::from_value::<Review>(review).expect("a review").request().map(|request| request.uid)
    };
    assert_eq!(ask("admission.k8s.io/v1", "AdmissionReview"), Ok("u".into()));
    assert!(ask("admission.k8s.io/v1beta1", "AdmissionReview").is_err());
    assert!(ask("admission.k8s.io/v1", "TokenReview").is_err());
}

#[test]
fn a_gateway_is_judged_by_its_revision_and_one_of_nobody_is_warned_of() {
    let asked = |known: &Known, revision: &str, name: &str| {
        let mut gateway = objects("gateways").swap_remove(0);
        gateway["metadata"]["name"] = name.into();
        gateway["metadata"]["labels"]["istio.io/rev"] = revision.into();
        created(known, gateway)
    };
    let tag = "
---
kind: Service
metadata: {name: prod, namespace: istio-system, labels: {istio.io/tag: prod, istio.io/rev: canary}}
---
kind: Service
metadata: {name: istiod-canary, namespace: istio-system, labels: {istio.io/rev: canary}}
";
    let default = known(&(read(&root("testdata/admission/world.yaml")) + tag));
    let mut canary = default.clone();
    let mesh = MeshSettings { revision: "canary".parse().expect("a revision"), ..MeshSettings::default() };
    canary.world.mesh = Arc::new(mesh);
    let silent = Outcome::SILENT;
    for (revision, by_default, by_canary) in
        [("default", true, false), ("", true, false), ("canary", false, true), ("prod", false, true)]
    {
        for (known, judged) in [(&default, by_default), (&canary, by_canary)] {
            assert_eq!(asked(known, revision, "good"), silent, "{revision}");
            let outcome = asked(known, revision, "1st");
            assert_eq!((is_refused(&outcome), outcome == silent), (judged, !judged), "{revision}");
        }
    }
    let Outcome::Admitted { warnings } = asked(&default, "gone", "good") else { panic!("it may come") };
    assert_eq!(
        warnings,
        ["Gateway shop/good: istio.io/rev: nothing is deployed before there is a control plane of revision gone \
          (Service istiod-gone)"]
    );
    assert_eq!(asked(&canary, "gone", "good"), silent, "it is said once");
}

fn installed() -> Vec<Value> {
    read(&root("../manifests/install.yaml")).split("\n---\n").map(parsed).collect()
}

#[test]
fn the_manifest_asks_about_exactly_the_kinds_and_versions_that_are_served() {
    let installed = installed();
    let of_kind = |kind: &str| installed.iter().filter(|object| object["kind"] == kind).collect::<Vec<_>>();
    let [configuration] = of_kind("ValidatingWebhookConfiguration")[..] else { panic!("one configuration") };
    assert_eq!(configuration["metadata"]["name"], CONFIGURATION);
    let webhook = &configuration["webhooks"][0];
    assert_eq!(webhook["name"], WEBHOOK);
    assert_eq!((&webhook["failurePolicy"], &webhook["sideEffects"]), (&json!("Ignore"), &json!("None")));
    let mut asked = Vec::new();
    for rule in webhook["rules"].as_array().expect("rules") {
        assert_eq!(rule["operations"], json!(["CREATE", "UPDATE"]));
        for resource in rule["resources"].as_array().expect("resources") {
            asked.push((rule["apiGroups"].clone(), resource.clone(), rule["apiVersions"].clone()));
        }
    }
    let mut served = Vec::new();
    for (plural, kind, group, versions) in KINDS {
        let crd = parsed(&read(&root(&format!("../manifests/crds/{plural}.yaml"))));
        let all = crd["spec"]["versions"].as_array().expect("versions").iter();
        let served_now: Vec<&Value> = all.filter(|version| version["served"] == true).map(|v| &v["name"]).collect();
        assert_eq!((json!(served_now), &crd["spec"]["names"]["kind"]), (json!(versions), &json!(kind)), "{plural}");
        served.push((json!([group]), json!(plural), json!(versions)));
    }
    served.extend(OTHERS.iter().map(|(plural, _, group, versions)| (json!([group]), json!(plural), json!(versions))));
    let sorted = |mut all: Vec<(Value, Value, Value)>| {
        all.sort_by_key(|(_, resource, _)| resource.to_string());
        all
    };
    assert_eq!(sorted(asked), sorted(served));

    let service = &webhook["clientConfig"]["service"];
    let istiod = of_kind("Service").into_iter().find(|object| object["metadata"]["name"] == "istiod");
    assert_eq!((&service["name"], &service["path"]), (&json!("istiod"), &json!("/validate")));
    let ports = istiod.expect("the Service")["spec"]["ports"].as_array().expect("ports");
    let found = ports.iter().find(|port| port["port"] == service["port"]).expect("the port");
    assert_eq!(found["targetPort"], 15017);
    let dns = format!("{}.{}.svc", service["name"].as_str().unwrap(), service["namespace"].as_str().unwrap());
    assert!(crate::ca::serving::dns_names("istio-system", &Revision::default(), None).contains(&dns), "{dns}");

    let rules = of_kind("ClusterRole")[0]["rules"].as_array().expect("rules").clone();
    let of_group = rules.iter().filter(|rule| rule["apiGroups"] == json!(["admissionregistration.k8s.io"]));
    let [rule] = of_group.collect::<Vec<_>>()[..] else { panic!("one rule") };
    assert_eq!(rule["resourceNames"], json!([CONFIGURATION]));
    assert_eq!(rule["verbs"], json!(["get", "list", "watch", "patch"]));
}
