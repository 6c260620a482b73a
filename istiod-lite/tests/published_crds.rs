//! Our CRDs are those that Gateway API and Istio publish, in other words: kinds, versions, limits, defaults, rules. And our
//! API server judges objects by them as another reader of the same schemas does.

mod standalone_support;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use futures_util::StreamExt as _;
use kube::Client;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, PostParams};
use serde_json::Value;
use standalone_support::{Kubectl, Server};

/// Of each kind.
const OBJECTS: &str = "1000";
const SEED: &str = "2026-11-27";
/// Every so many of them our API is asked about: each question takes it some milliseconds.
const ASKED: usize = 4;
/// Questions at a time.
const AT_ONCE: usize = 8;

/// What `cargo xtask setup` has loaded: a Python and the modules with what is published.
struct Published {
    python: PathBuf,
    modules: Vec<PathBuf>,
}

impl Published {
    fn find() -> Option<Self> {
        // Beside the binary under test, wherever the target directory is.
        let tools = Path::new(env!("CARGO_BIN_EXE_istiod-lite")).ancestors().nth(2)?.join("tools");
        let mut modules: Vec<PathBuf> = std::fs::read_dir(tools.join("modules"))
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|extension| extension == "zip"))
            .collect();
        modules.sort();
        let python = tools.join("crds/bin/python");
        if python.exists() && modules.len() == 2 {
            return Some(Self { python, modules });
        }
        assert!(std::env::var_os("LAB").is_none_or(|lab| lab != "required"), "no published CRDs: cargo xtask setup");
        eprintln!("SKIPPED: no published CRDs; cargo xtask setup loads them");
        None
    }

    /// What the script says of a directory of CRDs, line by line.
    fn ask(&self, question: &str, crds: &Path, more: &[&str]) -> Vec<String> {
        let mut python = Command::new(&self.python);
        python.arg(root("tests/published_crds.py")).arg(question).arg(crds).args(more).args(&self.modules);
        let output = python.output().expect("Python starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text").lines().map(str::to_owned).collect()
    }
}

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn crds() -> PathBuf {
    root("../manifests/crds")
}

#[test]
fn ours_say_what_the_published_ones_say() {
    let Some(published) = Published::find() else { return };
    assert_eq!(published.ask("compare", &crds(), &[]), Vec::<String>::new());
}

#[test]
fn a_difference_is_named_by_its_place() {
    let Some(published) = Published::find() else { return };
    let text = |name: &str| std::fs::read_to_string(crds().join(name)).expect("a CRD");
    let said_of = |name: &str, from: &str, to: &str| {
        let changed = text(name).replacen(from, to, 1);
        assert_ne!(changed, text(name), "{from}");
        let directory = tempfile::tempdir().expect("a temporary directory");
        std::fs::write(directory.path().join(name), changed).expect("a file");
        published.ask("compare", directory.path(), &[])
    };
    for (name, from, to, place) in [
        ("httproutes.yaml", "maxLength: 253", "maxLength: 254", "parentRefs.items.properties.group.maxLength"),
        ("httproutes.yaml", "<= 128", "<= 129", "rules.x-kubernetes-validations."),
        ("httproutes.yaml", "x-kubernetes-list-type: atomic", "x-kubernetes-list-type: set", ".x-kubernetes-list-type"),
        ("gatewayclasses.yaml", "priority: 1", "priority: 2", "additionalPrinterColumns"),
        ("gatewayclasses.yaml", "- gc", "- gwc", "names.shortNames"),
        ("gatewayclasses.yaml", "scope: Cluster", "scope: Namespaced", "spec.scope"),
        ("gatewayclasses.yaml", "  api-approved", "  approved", "annotations.api-approved.kubernetes.io"),
        ("referencegrants.yaml", "storage: false", "storage: true", "versions.v1.storage"),
        ("workloadentries.yaml", "- name: v1alpha3", "- name: v1alpha1", "versions.v1alpha3: only the published one"),
    ] {
        let said = said_of(name, from, to);
        assert!(!said.is_empty() && said.iter().any(|line| line.contains(place)), "{place}: {said:#?}");
    }
    // Words are ours.
    for (from, to) in [("description: ", "description: In short, "), ("message: ", "message: Listen, ")] {
        assert_eq!(said_of("workloadentries.yaml", from, to), Vec::<String>::new());
    }
}

/// Clusters with the experimental ones hand these fields to us: `translate/fields_tests.rs` knows what becomes of each.
#[test]
fn the_fields_that_only_experimental_ones_have_are_known() {
    let Some(published) = Published::find() else { return };
    let text = std::fs::read_to_string(root("testdata/fields/experimental.yaml")).expect("the list");
    let list: Vec<Value> = serde_saphyr::from_str(&text).expect("a list");
    let name = |known: &Value| format!("{} {}", known["kind"].as_str().unwrap(), known["field"].as_str().unwrap());
    let known: Vec<String> = list.iter().map(name).collect();
    assert_eq!(published.ask("experimental", &crds(), &[]), known);
}

/// The other reader knows no CEL: what its schema takes and ours refuses is refused in the words of a rule.
#[tokio::test(flavor = "multi_thread")]
async fn the_api_refuses_what_the_published_schemas_refuse_and_nothing_else() {
    let Some(published) = Published::find() else { return };
    let Some((name, binary)) = Kubectl::versions().into_iter().next() else { return };
    let files = format!("{}:{}", root("../manifests/samples").display(), root("testdata").display());
    let made: Vec<Value> = published
        .ask("objects", &crds(), &[&files, OBJECTS, SEED])
        .iter()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    assert_eq!(made.len(), 8 * OBJECTS.parse::<usize>().unwrap());

    let server = Server::start();
    Kubectl::new(&server, name, &binary).ok(&format!("apply -f {}", crds().display()));
    let client = server.client().await;
    let made: Vec<&Value> = made.iter().step_by(ASKED).collect();
    let asked = futures_util::stream::iter(made.clone()).map(|made| ask(&client, made)).buffered(AT_ONCE);
    let answers: Vec<(bool, Vec<String>)> = asked.collect().await;
    let sentences = sentences();
    let by_rule = |said: &String| sentences.iter().any(|sentence| said.ends_with(sentence.as_str()));
    let mut wrong = Vec::new();
    let (mut taken, mut refused, mut ruled_out) = (0, 0, 0);
    for (made, (is_taken, said)) in made.iter().zip(answers) {
        let faults = made["faults"].as_array().expect("faults");
        let is_ruled_out = !is_taken && !said.is_empty() && said.iter().all(by_rule);
        *(if is_taken {
            &mut taken
        } else if is_ruled_out {
            &mut ruled_out
        } else {
            &mut refused
        }) += 1;
        if (is_taken || is_ruled_out) != faults.is_empty() {
            wrong.push(format!("{}\n  our API: {said:?}\n  published schema: {faults:?}", made["object"]));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), made.len(), wrong[..wrong.len().min(10)].join("\n"));
    // It is about limits: many of either.
    assert!(taken > 100 && refused > 500, "{taken} taken, {refused} refused, {ruled_out} by a rule");
}

/// What the rules of our CRDs say.
fn sentences() -> HashSet<String> {
    fn collect(schema: &Value, sentences: &mut HashSet<String>) {
        match schema {
            Value::Object(fields) => {
                let rules = fields.get("x-kubernetes-validations").and_then(Value::as_array).into_iter().flatten();
                sentences.extend(rules.filter_map(|rule| rule["message"].as_str().map(str::to_owned)));
                fields.values().for_each(|field| collect(field, sentences));
            }
            Value::Array(elements) => elements.iter().for_each(|element| collect(element, sentences)),
            _ => {}
        }
    }
    let mut sentences = HashSet::new();
    for file in std::fs::read_dir(crds()).expect("our CRDs") {
        let path = file.expect("a file").path();
        if path.extension().is_some_and(|extension| extension == "yaml") {
            let text = std::fs::read_to_string(path).expect("a CRD");
            collect(&serde_saphyr::from_str(&text).expect("YAML"), &mut sentences);
        }
    }
    sentences
}

fn api(client: &Client, made: &Value) -> Api<DynamicObject> {
    let object = &made["object"];
    let (group, version) = object["apiVersion"].as_str().expect("a version").split_once('/').expect("a group");
    let kind = GroupVersionKind::gvk(group, version, object["kind"].as_str().expect("a kind"));
    let resource = ApiResource::from_gvk_with_plural(&kind, made["plural"].as_str().expect("a plural"));
    match resource.plural.as_str() {
        "gatewayclasses" => Api::all_with(client.clone(), &resource),
        _ => Api::default_namespaced_with(client.clone(), &resource),
    }
}

/// Whether it would be stored, and what is said against it.
async fn ask(client: &Client, made: &Value) -> (bool, Vec<String>) {
    let object: DynamicObject = serde_json::from_value(made["object"].clone()).expect("an object");
    let only_ask = PostParams { dry_run: true, ..PostParams::default() };
    match api(client, made).create(&only_ask, &object).await {
        Ok(_) => (true, Vec::new()),
        Err(kube::Error::Api(status)) if [400, 422].contains(&status.code) => {
            let causes = status.details.iter().flat_map(|details| &details.causes);
            (false, causes.map(|cause| cause.message.clone()).collect())
        }
        Err(other) => panic!("{other}: {}", made["object"]),
    }
}
