//! What an API server of Kubernetes refuses in our manifests, and the lab's does not know of.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use mesh_tests::places::Places;
use mesh_tests::raw;
use serde_json::{Value, json};

/// `manifests/` and what is in it.
fn manifests() -> Result<Vec<PathBuf>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests");
    let mut found = Vec::new();
    for folder in [directory.clone(), directory.join("crds"), directory.join("samples")] {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            let is_object = path.file_name().is_some_and(|name| name != "kustomization.yaml");
            if is_object && path.extension().is_some_and(|extension| extension == "yaml") {
                found.push(path);
            }
        }
    }
    ensure!(found.len() > 10, "{found:?}");
    Ok(found)
}

fn objects() -> Result<Vec<Value>> {
    let mut objects = Vec::new();
    for path in manifests()? {
        objects.extend(parsed(&fs::read_to_string(&path)?).with_context(|| path.display().to_string())?);
    }
    Ok(objects)
}

fn parsed(text: &str) -> Result<Vec<Value>> {
    let documents = text
        .split("\n---\n")
        .filter(|document| document.lines().any(|line| !line.trim_start().starts_with('#') && !line.trim().is_empty()));
    documents.map(|document| Ok(serde_saphyr::from_str(document)?)).collect()
}

/// What is wrong with objects by the schemas of each version of Kubernetes that has some here.
fn mistakes(objects: &[Value]) -> Result<Vec<String>> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/kubernetes_schemas.py");
    let mut found = Vec::new();
    let mut versions = 0;
    for entry in fs::read_dir(Places::find()?.tools().join("schemas")).context("run `cargo xtask test`")? {
        let wheel = entry?.path();
        if wheel.extension().is_none_or(|extension| extension != "whl") {
            continue;
        }
        versions += 1;
        let mut python = Command::new("/usr/bin/python3");
        let mut python = python.arg(&script).arg(&wheel).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        python.stdin.take().context("a pipe")?.write_all(&serde_json::to_vec(objects)?)?;
        let output = python.wait_with_output()?;
        let text = String::from_utf8(output.stdout)?;
        let (looked_at, said) = text.split_once('\n').unwrap_or_default();
        ensure!(output.status.success() && looked_at.parse::<usize>()? > 0, "{}: {text}", wheel.display());
        let name = wheel.file_name().unwrap_or_default().display().to_string();
        found.extend(said.lines().filter(|line| !line.is_empty()).map(|line| format!("{name}: {line}")));
    }
    ensure!(versions >= 7, "{versions} versions of Kubernetes");
    Ok(found)
}

/// From 1.30 on: fields that were renamed, kinds that went, values of the wrong type.
#[test]
fn every_version_of_kubernetes_knows_all_that_we_write() -> Result<()> {
    if !raw::available() {
        return Ok(());
    }
    let mut objects = objects()?;
    assert_eq!(mistakes(&objects)?, Vec::<String>::new());
    // It would be told.
    let daemon_set = objects.iter_mut().find(|object| object["kind"] == "DaemonSet").context("a DaemonSet")?;
    daemon_set["spec"]["selectr"] = daemon_set["spec"]["selector"].take();
    daemon_set["spec"].as_object_mut().context("a spec")?.remove("selector");
    daemon_set["spec"]["minReadySeconds"] = json!("5");
    let found = mistakes(&objects)?;
    assert_eq!(found.len() % 3, 0, "{found:#?}");
    for mistake in ["no such field: selectr", "no selector", "'5' is no int"] {
        assert!(found.iter().any(|found| found.ends_with(mistake)), "{mistake}: {found:#?}");
    }
    Ok(())
}

/// Containers that share mounts with the node both ways must be privileged, and ours are not.
#[test]
fn no_container_shares_its_mounts_with_the_node() -> Result<()> {
    for path in manifests()? {
        let text = fs::read_to_string(&path)?;
        let shares = text.lines().any(|line| line.trim() == "mountPropagation: Bidirectional");
        assert!(!shares || text.contains("privileged: true"), "{}", path.display());
    }
    Ok(())
}

/// What `kubectl kustomize` prints of `manifests/` with these components, by kind and name.
fn kustomized(kubectl: &Path, components: &[&str]) -> Result<BTreeMap<String, Value>> {
    // A file of one's own, beside a copy: a directory may not ask for one that it is in.
    let directory = tempfile::tempdir()?;
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests");
    let copied = Command::new("cp").arg("-r").arg(&source).arg(directory.path()).status()?;
    ensure!(copied.success(), "cannot copy {}", source.display());
    let mut own = directory.path().join("manifests");
    if !components.is_empty() {
        own = directory.path().join("own");
        fs::create_dir(&own)?;
        let components: Vec<String> = components.iter().map(|name| format!("../manifests/kustomize/{name}")).collect();
        let kustomization = json!({"resources": ["../manifests"], "components": components});
        fs::write(own.join("kustomization.yaml"), kustomization.to_string())?;
    }
    let output = Command::new(kubectl).arg("kustomize").arg(&own).env("HOME", directory.path()).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && said.is_empty(), "{components:?}: {said}");
    by_name(parsed(&String::from_utf8(output.stdout)?)?)
}

fn by_name(objects: Vec<Value>) -> Result<BTreeMap<String, Value>> {
    let count = objects.len();
    let name = |object: &Value| format!("{} {}", object["kind"], object["metadata"]["name"]).replace('"', "");
    let by_name: BTreeMap<String, Value> = objects.into_iter().map(|object| (name(&object), object)).collect();
    ensure!(by_name.len() == count, "two of {count} objects are of one name");
    Ok(by_name)
}

fn installed() -> Result<BTreeMap<String, Value>> {
    by_name(parsed(&fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/install.yaml"))?)?)
}

/// The leaves of an object, elements of lists by name where they have one.
fn leaves(value: &Value, at: &str, out: &mut BTreeMap<String, String>) {
    match value {
        Value::Object(fields) => fields.iter().for_each(|(name, value)| leaves(value, &format!("{at}.{name}"), out)),
        Value::Array(list) => list.iter().enumerate().for_each(|(index, value)| {
            let name = value["name"].as_str().map_or_else(|| index.to_string(), str::to_owned);
            leaves(value, &format!("{at}[{name}]"), out);
        }),
        Value::String(text) => drop(out.insert(at.to_owned(), text.clone())),
        other => drop(out.insert(at.to_owned(), other.to_string())),
    }
}

/// `-` what is gone, `+` what came or changed.
fn changes(before: &BTreeMap<String, Value>, after: &BTreeMap<String, Value>) -> BTreeSet<String> {
    let mut changes = BTreeSet::new();
    let names: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    for name in names {
        let (Some(before), Some(after)) = (before.get(name), after.get(name)) else {
            changes.insert(format!("{} {name}", if after.contains_key(name) { '+' } else { '-' }));
            continue;
        };
        let (mut was, mut is) = (BTreeMap::new(), BTreeMap::new());
        leaves(before, "", &mut was);
        leaves(after, "", &mut is);
        let gone = was.keys().filter(|leaf| !is.contains_key(*leaf)).map(|leaf| format!("- {name} {leaf}"));
        let come = is.iter().filter(|(leaf, value)| was.get(*leaf) != Some(value));
        changes.extend(gone.chain(come.map(|(leaf, value)| format!("+ {name} {leaf}={value}"))));
    }
    changes
}

#[test]
fn kustomize_prints_what_is_installed() -> Result<()> {
    if !raw::available() {
        return Ok(());
    }
    let places = Places::find()?;
    for kubectl in [places.kubectl()?, places.current_kubectl()?] {
        let changes = changes(&installed()?, &kustomized(&kubectl, &[])?);
        assert!(changes.is_empty(), "{}: {changes:#?}", kubectl.display());
    }
    Ok(())
}

/// Each option changes what it is for, and nothing else.
#[test]
fn options_change_what_they_are_for() -> Result<()> {
    if !raw::available() {
        return Ok(());
    }
    const ISTIOD: &str = "Deployment istiod";
    const ZTUNNEL: &str = "DaemonSet ztunnel";
    let env = |container: &str| format!(".spec.template.spec.containers[{container}].env");
    let (discovery, proxy) = (env("discovery"), env("istio-proxy"));
    let mut expected: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    let crds = objects()?.into_iter().filter(|object| object["kind"] == "CustomResourceDefinition");
    let crds: BTreeMap<String, Value> = by_name(crds.collect())?;
    expected.insert("with-crds", crds.keys().map(|name| format!("+ {name}")).collect());
    expected.insert("control-plane", [format!("- {ZTUNNEL}"), "- ServiceAccount ztunnel".into()].into());
    expected.insert("two-replicas", [format!("+ {ISTIOD} .spec.replicas=2")].into());
    let image = |of: &str| format!("registry.example.org/mesh/{of}:1");
    expected.insert(
        "registry",
        [
            format!("+ {ISTIOD} .spec.template.spec.containers[discovery].image={}", image("istiod-lite")),
            format!("+ {ISTIOD} {discovery}[WAYPOINT_IMAGE].value={}", image("waypoint")),
            format!("+ {ZTUNNEL} .spec.template.spec.containers[istio-proxy].image={}", image("ztunnel")),
        ]
        .into(),
    );
    let mut plugin: BTreeSet<String> = ["CNI_SOCKET", "CNI_BIN_DIR", "CNI_CONF_DIR"]
        .map(|variable| format!("+ {ZTUNNEL} {proxy}[{variable}].value="))
        .into();
    for directory in ["cni-bin", "cni-conf"] {
        let (mount, volume) = (
            format!("- {ZTUNNEL} .spec.template.spec.containers[istio-proxy].volumeMounts[{directory}]"),
            format!("- {ZTUNNEL} .spec.template.spec.volumes[{directory}]"),
        );
        plugin.extend([format!("{mount}.mountPath"), format!("{mount}.name")]);
        plugin.extend([format!("{volume}.name"), format!("{volume}.hostPath.path"), format!("{volume}.hostPath.type")]);
    }
    expected.insert("no-cni-plugin", plugin);
    let mut namespace: BTreeSet<String> = [
        format!("{ZTUNNEL} {proxy}[XDS_ADDRESS].value=istiod.mesh-system.svc:15012"),
        format!("{ZTUNNEL} {proxy}[CA_ADDRESS].value=istiod.mesh-system.svc:15012"),
        format!("{ZTUNNEL} {proxy}[CNI_PASS_NAMESPACES].value=kube-system,mesh-system"),
        format!("{ISTIOD} {discovery}[CA_TRUSTED_NODE_ACCOUNTS].name=CA_TRUSTED_NODE_ACCOUNTS"),
        format!("{ISTIOD} {discovery}[CA_TRUSTED_NODE_ACCOUNTS].value=mesh-system/ztunnel"),
        "ClusterRoleBinding istiod .subjects[istiod].namespace=mesh-system".into(),
        "RoleBinding istiod .subjects[istiod].namespace=mesh-system".into(),
        "ValidatingWebhookConfiguration istiod-validator .webhooks[validation.istio.io].clientConfig.service.namespace=mesh-system"
            .into(),
        "ValidatingWebhookConfiguration istiod-validator .webhooks[validation.istio.io].namespaceSelector.matchExpressions[0].values[1]=mesh-system"
            .into(),
        "Namespace mesh-system".into(),
    ]
    .map(|change: String| format!("+ {change}"))
    .into();
    namespace.insert("- Namespace istio-system".into());
    let inside = installed()?.into_iter().filter(|(_, object)| object["metadata"]["namespace"] == "istio-system");
    namespace.extend(inside.map(|(name, _)| format!("+ {name} .metadata.namespace=mesh-system")));
    expected.insert("namespace", namespace);

    let options = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/kustomize"))?;
    let options = options.map(|option| Ok(option?.file_name().to_string_lossy().into_owned()));
    let options: BTreeSet<String> = options.collect::<Result<_>>()?;
    let known: BTreeSet<String> = expected.keys().map(|option| (*option).to_owned()).collect();
    assert_eq!(options, known);
    let kubectl = Places::find()?.current_kubectl()?;
    for (option, expected) in &expected {
        assert_eq!(changes(&installed()?, &kustomized(&kubectl, &[*option])?), *expected, "{option}");
    }
    // Together, in either order; and an API server takes what comes out.
    let mut together = ["namespace", "registry", "no-cni-plugin", "two-replicas", "with-crds"];
    let all: BTreeSet<String> = together.iter().flat_map(|option| expected[option].clone()).collect();
    assert_eq!(changes(&installed()?, &kustomized(&kubectl, &together)?), all);
    together.reverse();
    let made = kustomized(&kubectl, &together)?;
    assert_eq!(changes(&installed()?, &made), all);
    assert_eq!(mistakes(&made.into_values().collect::<Vec<_>>())?, Vec::<String>::new());
    Ok(())
}
