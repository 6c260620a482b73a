//! `istiod-lite analyze`: what would become of objects, said before they are applied, or of those that a cluster has. What
//! it says are the conditions that the control plane would write, found by the same pass.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use kube::Client;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::translate::verdict::{Report, Status, Verdict, Wanted};
use crate::translate::world::{MeshSettings, World};
use crate::translate::{documents, translate};
use crate::types::Key;
use crate::watch::Watch;

/// Longest that a cluster may take to list everything.
const LISTED: Duration = Duration::from_secs(30);
/// Kinds without a namespace.
const CLUSTER_SCOPED: &[&str] = &["Namespace", "Node", "GatewayClass"];
/// Reasons of a condition that is true and yet says that something is not done.
const IN_PART: &[&str] = &["PartiallyInvalid", "UnsupportedValue"];
/// Conditions that are true when something is wrong.
const TRUE_IS_BAD: &[&str] = &["PartiallyInvalid", "Conflicted"];

/// Something that is not done as it was written.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    object: String,
    condition: String,
    reason: String,
    message: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { object, condition, reason, message } = self;
        write!(f, "{object}: {condition}: {reason}")?;
        if message.is_empty() { Ok(()) } else { write!(f, ": {message}") }
    }
}

/// What was looked at and what was found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Analysis {
    pub looked_at: usize,
    pub findings: BTreeSet<Finding>,
    /// Objects of kinds that mean nothing to the control plane.
    pub others: BTreeSet<String>,
}

impl fmt::Display for Analysis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.findings {
            writeln!(f, "{finding}")?;
        }
        for other in &self.others {
            writeln!(f, "not looked at: {other}")?;
        }
        writeln!(f, "{} objects, {} findings", self.looked_at, self.findings.len())
    }
}

/// Looks at files, directories (their `.yaml`, `.yml` and `.json` files) and `-`, the standard input. Objects without a
/// namespace are of `namespace`. Waypoints are taken to be up: whether they are is not in a file.
///
/// # Errors
/// A file that cannot be read, or an object that is not one of its kind.
pub fn files(paths: &[PathBuf], namespace: &str, mesh: MeshSettings) -> anyhow::Result<Analysis> {
    let mut world = World { mesh: Arc::new(mesh), ..World::default() };
    let mut analysis = Analysis::default();
    for (path, text) in texts(paths)? {
        let found: Vec<Value> = serde_saphyr::from_multiple(&text).with_context(|| path.display().to_string())?;
        for object in found.into_iter().flat_map(items) {
            let object = placed(object, namespace);
            let name = named(&object);
            match documents::add(&mut world, up(object)) {
                Ok(true) => analysis.looked_at += 1,
                Ok(false) => _ = analysis.others.insert(name),
                Err(error) => bail!("{}: {name}: {error}", path.display()),
            }
        }
    }
    analysis.findings = findings(&world, true);
    Ok(analysis)
}

/// Looks at all that a cluster has.
///
/// # Errors
/// When it does not list everything within half a minute.
pub async fn cluster(client: &Client, mesh: MeshSettings) -> anyhow::Result<Analysis> {
    let mut tasks = JoinSet::new();
    let watch = Watch::start(client, mesh, &mut tasks);
    let all = tokio::time::timeout(LISTED, async {
        while !watch.missing().is_empty() {
            watch.changed().await;
        }
    });
    if all.await.is_err() {
        bail!("not listed within {LISTED:?}: {}", watch.missing().join(", "));
    }
    let world = watch.snapshot();
    let looked_at = world.gateways.len()
        + world.gateway_classes.len()
        + world.http_routes.len()
        + world.authorization_policies.len()
        + world.peer_authentications.len()
        + world.service_entries.len()
        + world.workload_entries.len()
        + world.services.len();
    Ok(Analysis { looked_at, findings: findings(&world, false), others: BTreeSet::new() })
}

fn texts(paths: &[PathBuf]) -> anyhow::Result<Vec<(PathBuf, String)>> {
    let mut out = Vec::new();
    for path in paths {
        if path == Path::new("-") {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("standard input")?;
            out.push((path.clone(), text));
            continue;
        }
        let mut files = vec![path.clone()];
        if path.is_dir() {
            let entries = fs::read_dir(path).with_context(|| path.display().to_string())?;
            files = entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
            files.retain(|file| file.extension().is_some_and(|end| end == "yaml" || end == "yml" || end == "json"));
            files.sort_unstable();
        }
        for file in files {
            let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
            out.push((file, text));
        }
    }
    Ok(out)
}

/// The objects of a list, such as `kubectl get -o yaml` prints; an empty document is none.
fn items(document: Value) -> Vec<Value> {
    match document {
        Value::Null => Vec::new(),
        Value::Object(mut list)
            if list.get("kind").and_then(Value::as_str).is_some_and(|kind| kind.ends_with("List")) =>
        {
            match list.remove("items") {
                Some(Value::Array(items)) => items,
                _ => Vec::new(),
            }
        }
        object => vec![object],
    }
}

fn placed(mut object: Value, namespace: &str) -> Value {
    let scoped = object["kind"].as_str().is_some_and(|kind| !CLUSTER_SCOPED.contains(&kind));
    if scoped && object["metadata"].is_object() && object["metadata"]["namespace"].is_null() {
        object["metadata"]["namespace"] = namespace.into();
    }
    object
}

fn named(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let key = Key::new(text(&object["metadata"]["namespace"]), text(&object["metadata"]["name"]));
    format!("{} {key}", text(&object["kind"]))
}

/// A Gateway as it is when its pods are ready.
fn up(mut object: Value) -> Value {
    if object["kind"] == "Gateway" && object["status"]["addresses"].is_null() {
        object["status"] = json!({"addresses": [{"type": "IPAddress", "value": "192.0.2.1"}]});
    }
    object
}

/// `offline`: what only a running cluster can tell is left out.
fn findings(world: &World, offline: bool) -> BTreeSet<Finding> {
    let mut out = BTreeSet::new();
    for verdict in translate(world).verdicts {
        let object = format!("{} {}", verdict.kind.name(), verdict.key);
        for (place, condition) in conditions(&verdict) {
            // Whether pods run is not in a file; why a Gateway is refused, its other condition says.
            let runtime = offline && condition.r#type == "Programmed";
            if is_bad(condition) && !runtime {
                out.insert(Finding {
                    object: format!("{object}{place}"),
                    condition: condition.r#type.to_owned(),
                    reason: condition.reason.to_owned(),
                    message: condition.message.clone(),
                });
            }
        }
    }
    // Nobody can tell whose these are, so no status says it.
    for (key, object) in world.gateways.iter() {
        let Err(reason) = &object.spec else { continue };
        out.insert(unreadable("Gateway", key, reason));
    }
    for (key, object) in world.http_routes.iter() {
        let Err(reason) = &object.spec else { continue };
        out.insert(unreadable("HTTPRoute", key, reason));
    }
    out
}

fn unreadable(kind: &str, key: &Key, reason: &str) -> Finding {
    Finding {
        object: format!("{kind} {key}"),
        condition: "spec".into(),
        reason: "Unreadable".into(),
        message: reason.to_owned(),
    }
}

fn conditions(verdict: &Verdict) -> Vec<(String, &Wanted)> {
    match &verdict.report {
        Report::Conditions { wanted, .. } | Report::Addressed { wanted, .. } => {
            wanted.iter().map(|wanted| (String::new(), wanted)).collect()
        }
        Report::Gateway { conditions, listeners, .. } => {
            let own = conditions.iter().map(|wanted| (String::new(), wanted));
            let listeners = listeners.iter().flat_map(|listener| {
                listener.conditions.iter().map(|wanted| (format!(" listener {}", listener.name), wanted))
            });
            own.chain(listeners).collect()
        }
        Report::Parents(parents) => parents
            .iter()
            .flat_map(|parent| {
                let name = parent.parent["name"].as_str().unwrap_or_default();
                parent.conditions.iter().map(move |wanted| (format!(" parent {name}"), wanted))
            })
            .collect(),
    }
}

fn is_bad(condition: &Wanted) -> bool {
    match condition.status {
        Status::False => !TRUE_IS_BAD.contains(&condition.r#type),
        Status::True => TRUE_IS_BAD.contains(&condition.r#type) || IN_PART.contains(&condition.reason),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OBJECTS: &str = "
apiVersion: v1
kind: List
items:
  - {apiVersion: v1, kind: Namespace, metadata: {name: shop}}
  - apiVersion: v1
    kind: Service
    metadata: {name: web, namespace: shop, labels: {istio.io/use-waypoint: waypoint}}
    spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: of-another-group}
---
apiVersion: security.istio.io/v1beta1
kind: AuthorizationPolicy
metadata: {name: good}
spec: {targetRefs: [{group: '', kind: Service, name: web}], rules: [{to: [{operation: {methods: [GET]}}]}]}
";
    const BAD: &str = "
---
apiVersion: security.istio.io/v1beta1
kind: AuthorizationPolicy
metadata: {name: bad}
spec: {targetRefs: [{group: '', kind: Service, name: wbe}], rules: [{to: [{operation: {methods: [GET]}}]}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: bad}
spec: {parentRefs: [{group: '', kind: Service, name: web}], rules: [{retry: {attempts: 1}, backendRefs: [{name: web, port: 80}]}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: 1st}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
";

    fn analyse(text: &str) -> Analysis {
        let directory = tempfile::tempdir().expect("a directory");
        fs::write(directory.path().join("a.yaml"), text).expect("a file");
        fs::write(directory.path().join("README"), "kind: [").expect("a file");
        files(&[directory.path().to_owned()], "shop", MeshSettings::default()).expect("it can be read")
    }

    #[test]
    fn what_is_in_order_is_not_spoken_of() {
        let analysis = analyse(OBJECTS);
        assert_eq!((analysis.looked_at, analysis.findings.len()), (4, 0), "{analysis}");
        assert_eq!(analysis.others, ["Gateway shop/of-another-group".to_owned()].into());
    }

    #[test]
    fn what_will_not_be_done_is_said_with_its_field() {
        let said = analyse(&format!("{OBJECTS}{BAD}")).to_string();
        for line in [
            "AuthorizationPolicy shop/bad: WaypointAccepted: TargetNotFound: targetRefs: Service shop/wbe does not exist",
            "HTTPRoute shop/bad parent web: Accepted: UnsupportedValue: rules[0].retry",
            "Gateway shop/1st: Accepted: Invalid: metadata.name",
        ] {
            assert!(said.contains(line), "{line}\n{said}");
        }
        assert!(said.ends_with("7 objects, 3 findings\n"), "{said}");
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named() {
        let directory = tempfile::tempdir().expect("a directory");
        fs::write(directory.path().join("a.yaml"), "kind: [").expect("a file");
        let error = files(&[directory.path().join("a.yaml")], "shop", MeshSettings::default()).expect_err("no YAML");
        assert!(format!("{error:#}").contains("a.yaml"), "{error:#}");
    }
}
