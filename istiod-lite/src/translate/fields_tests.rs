//! Every field of every custom kind that users can write does something or is reported. The fields are those of the CRDs'
//! schemas; `testdata/fields/<plural>.yaml` has all of them in objects named `subject…`, and where the value of one is
//! changed, what proxies are told, what is deployed, or a status has to change.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;

use serde_json::Value;

use super::translate;
use super::world::World;
use crate::deploy::{self, WaypointSettings};
use crate::translate::fixture;

/// ReferenceGrant is not among them: routes of Services need none (Gateway API, GEP-1426), and others are not ours.
const PLURALS: &[&str] = &[
    "authorizationpolicies",
    "gatewayclasses",
    "gateways",
    "httproutes",
    "peerauthentications",
    "serviceentries",
    "workloadentries",
];

/// What is reported for being there, whatever is in it: kind and field. That it is there has to change something.
const WHOLE: &[(&str, &str)] = &[
    ("AuthorizationPolicy", "spec.provider"),
    ("AuthorizationPolicy", "spec.rules[].from[].source.requestPrincipals"),
    ("AuthorizationPolicy", "spec.rules[].from[].source.notRequestPrincipals"),
    ("AuthorizationPolicy", "spec.rules[].from[].source.remoteIpBlocks"),
    ("AuthorizationPolicy", "spec.rules[].from[].source.notRemoteIpBlocks"),
    ("AuthorizationPolicy", "spec.rules[].from[].source.trustDomains"),
    ("AuthorizationPolicy", "spec.rules[].from[].source.notTrustDomains"),
    ("GatewayClass", "spec.parametersRef"),
    ("Gateway", "spec.listeners[].hostname"),
    ("Gateway", "spec.listeners[].tls"),
    ("Gateway", "spec.addresses"),
    ("Gateway", "spec.tls"),
    ("Gateway", "spec.allowedListeners"),
    ("HTTPRoute", "spec.rules[].retry"),
];

/// What neither does anything nor is reported, and why that is right: kind, field with all below it, reason.
const SILENT: &[(&str, &str, &str)] = &[
    ("GatewayClass", "spec.description", "for people"),
    ("ServiceEntry", "spec.location", "an endpoint is in the mesh if it speaks HBONE, whatever the entry says"),
    ("HTTPRoute", "spec.hostnames[]", "a route of a Service is not chosen by host (Gateway API, GEP-1426)"),
    ("HTTPRoute", "spec.rules[].filters[].requestMirror", "refused by its type"),
    ("HTTPRoute", "spec.rules[].filters[].cors", "refused by its type"),
    ("HTTPRoute", "spec.rules[].filters[].extensionRef", "refused by its type"),
    ("HTTPRoute", "spec.rules[].backendRefs[].filters[].requestRedirect", "refused by its type"),
    ("HTTPRoute", "spec.rules[].backendRefs[].filters[].urlRewrite", "refused by its type"),
    ("HTTPRoute", "spec.rules[].backendRefs[].filters[].requestMirror", "refused by its type"),
    ("HTTPRoute", "spec.rules[].backendRefs[].filters[].cors", "refused by its type"),
    ("HTTPRoute", "spec.rules[].backendRefs[].filters[].extensionRef", "refused by its type"),
];

#[test]
fn every_field_of_every_kind_is_enforced_or_reported() {
    let mut wrong = String::new();
    for plural in PLURALS {
        for problem in problems(plural) {
            writeln!(wrong, "{problem}").expect("strings take all");
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

/// Clusters have the CRDs of either channel; ours are the standard ones. What more the experimental ones have is listed, and
/// that the list is whole is tested against the published CRDs (`tests/published_crds.rs`).
#[test]
fn every_field_that_only_experimental_crds_have_is_reported_or_silent_for_a_reason() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let list = documents(&root.join("testdata/fields/experimental.yaml")).remove(0);
    for known in list.as_array().expect("a list") {
        let text = |name: &str| known[name].as_str().unwrap_or_else(|| panic!("{name} of {known}")).to_owned();
        let (kind, field) = (text("kind"), text("field"));
        let plural = format!("{}s", kind.to_lowercase());
        let mut world = documents(&root.join(format!("testdata/fields/{plural}.yaml")));
        let name = known["subject"].as_str().unwrap_or("subject");
        let is_subject = |object: &&mut Value| object["kind"] == *kind && object["metadata"]["name"] == name;
        let subject = world.iter_mut().find(is_subject).expect("a subject");
        // Beside what is there already.
        let place = format!("/{}", field.replace("[]", ".0").replace('.', "/"));
        let (parent, last) = place.rsplit_once('/').expect("it is below spec");
        let object =
            subject.pointer_mut(parent).and_then(Value::as_object_mut).unwrap_or_else(|| panic!("no {parent}"));
        object.extend(known["beside"].as_object().cloned().unwrap_or_default());
        let before = outcome(&world);
        let subject = world.iter_mut().find(is_subject).expect("a subject");
        subject.pointer_mut(parent).expect("it was there")[last] = known["value"].clone();
        let tells = outcome(&world) != before;
        assert_eq!(tells, known["silent"].is_null(), "{kind}: {field}");
    }
}

fn problems(plural: &str) -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let crd = documents(&root.join(format!("../manifests/crds/{plural}.yaml"))).remove(0);
    let kind = crd["spec"]["names"]["kind"].as_str().expect("a kind").to_owned();
    let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
    let mut world = documents(&root.join(format!("testdata/fields/{plural}.yaml")));
    let before = outcome(&world);
    let mut known = Vec::new();
    fields(schema, "spec", &mut known);
    let mut seen = BTreeSet::new();
    let mut telling = BTreeSet::new();
    for index in 0..world.len() {
        let subject = &world[index];
        let is_subject = subject["kind"] == *kind
            && subject["metadata"]["name"].as_str().is_some_and(|name| name.starts_with("subject"));
        if !is_subject {
            continue;
        }
        let original = subject.clone();
        let mut places = Vec::new();
        values(&original["spec"], schema, "spec", "/spec", &mut places);
        for (field, pointer, variants) in places {
            let whole = WHOLE.iter().find(|(of, prefix)| *of == kind && is_below(&field, prefix));
            let tells = match whole {
                Some((_, prefix)) => {
                    let parent = &pointer[..parent_length(&field, &pointer, prefix)];
                    let object = world[index].pointer_mut(&parent[..parent.rfind('/').unwrap_or_default()]);
                    let last = parent.rsplit('/').next().unwrap_or_default();
                    object.and_then(Value::as_object_mut).and_then(|object| object.remove(last));
                    outcome(&world) != before
                }
                None => variants.into_iter().any(|variant| {
                    *world[index].pointer_mut(&pointer).expect("it was found there") = variant;
                    outcome(&world) != before
                }),
            };
            world[index] = original.clone();
            if tells {
                telling.insert(field.clone());
            }
            seen.insert(field);
        }
    }
    let is_silent = |field: &str| SILENT.iter().any(|(of, prefix, _)| *of == kind && is_below(field, prefix));
    let has_whole = |field: &str| {
        let prefix = WHOLE.iter().find(|(of, prefix)| *of == kind && is_below(field, prefix));
        prefix.is_some_and(|(_, prefix)| seen.iter().any(|seen| is_below(seen, prefix)))
    };
    let dumb = seen.difference(&telling).filter(|field| !is_silent(field));
    let told = telling.iter().filter(|field| is_silent(field));
    let unseen = known.iter().filter(|field| !seen.contains(*field) && !is_silent(field) && !has_whole(field));
    dumb.map(|field| format!("{kind}: {field} does nothing and is not reported"))
        .chain(told.map(|field| format!("{kind}: {field} is no longer silent")))
        .chain(unseen.map(|field| format!("{kind}: no subject has {field}")))
        .collect()
}

fn documents(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.split("\n---\n")
        .map(|document| serde_saphyr::from_str(document).unwrap_or_else(|error| panic!("{error}\n{document}")))
        .collect()
}

fn is_below(field: &str, prefix: &str) -> bool {
    field.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
}

/// How much of `pointer` leads to what `prefix` of `field` names.
fn parent_length(field: &str, pointer: &str, prefix: &str) -> usize {
    let steps = |path: &str| path.replace("[]", ".[]").split('.').count();
    let beyond = steps(field) - steps(prefix);
    let mut end = pointer.len();
    for _ in 0..beyond {
        end = pointer[..end].rfind('/').unwrap_or_default();
    }
    end
}

/// All that is said to anybody about such a world.
fn outcome(objects: &[Value]) -> Vec<String> {
    let mut world = World::default();
    for object in objects {
        assert!(fixture::add(&mut world, object.clone()).unwrap_or_else(|error| panic!("{error}\n{object}")));
    }
    let translation = translate(&world);
    let mut said: Vec<String> = translation.resources.iter().map(|resource| format!("{resource:?}")).collect();
    said.extend(translation.verdicts.iter().map(|verdict| format!("{verdict:?}")));
    let trust = deploy::Trust { roots: "ROOT", revocations: None };
    let mut deployed = deploy::waypoint_parts(&world, &WaypointSettings::default());
    deployed.extend(deploy::shared(&world, &trust));
    said.extend(deployed.iter().map(|object| format!("{object:?}")));
    said.sort_unstable();
    said
}

/// The fields of a schema that hold a value: `spec.a.list[].b`, `.{}` for the keys of a map.
fn fields(schema: &Value, at: &str, out: &mut Vec<String>) {
    if let Some(properties) = schema["properties"].as_object() {
        properties.iter().for_each(|(name, schema)| fields(schema, &format!("{at}.{name}"), out));
    } else if schema["additionalProperties"].is_object() {
        fields(&schema["additionalProperties"], &format!("{at}.{{}}"), out);
    } else if schema["type"] == "array" {
        fields(&schema["items"], &format!("{at}[]"), out);
    } else {
        out.push(at.to_owned());
    }
}

/// Those of an object: field, place, and what else could be there.
fn values(value: &Value, schema: &Value, at: &str, pointer: &str, out: &mut Vec<(String, String, Vec<Value>)>) {
    match value {
        Value::Object(object) => {
            for (name, value) in object {
                let pointer = format!("{pointer}/{}", name.replace('~', "~0").replace('/', "~1"));
                match schema["properties"].get(name) {
                    Some(schema) => values(value, schema, &format!("{at}.{name}"), &pointer, out),
                    None => {
                        let schema = &schema["additionalProperties"];
                        assert!(schema.is_object(), "{at}.{name} is not in the schema");
                        values(value, schema, &format!("{at}.{{}}"), &pointer, out);
                    }
                }
            }
        }
        Value::Array(list) => {
            for (index, value) in list.iter().enumerate() {
                values(value, &schema["items"], &format!("{at}[]"), &format!("{pointer}/{index}"), out);
            }
        }
        _ => {
            let variants = match (schema["enum"].as_array(), value) {
                (Some(choices), _) => choices.iter().filter(|choice| *choice != value).cloned().collect(),
                (None, Value::String(text)) => vec![format!("{text}x").into()],
                (None, Value::Number(number)) => vec![(number.as_i64().expect("an integer") + 1).into()],
                (None, Value::Bool(set)) => vec![(!set).into()],
                (None, other) => panic!("{at}: {other}"),
            };
            out.push((at.to_owned(), pointer.to_owned(), variants));
        }
    }
}
