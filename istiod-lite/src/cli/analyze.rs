//! `istiod-lite analyze`: what would become of objects, said before they are applied, or of those that a cluster has. What
//! it says are the conditions that the control plane would write, found by the same pass.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use serde::Serialize;

use super::connect::Target;
use super::output::{Format, written};
use super::read::{self, Seen};
use super::{Ending, Said};
use crate::revision::{LABEL, Revision};
use crate::translate::owner::Owners;
use crate::translate::verdict::{Kind, Report, Status, Verdict, Wanted};
use crate::translate::world::{MeshSettings, World};
use crate::translate::{binding, discovery, mesh_config, translate};
use crate::types::Key;

/// Reasons of a condition that is true and yet says that something is not done.
const IN_PART: &[&str] = &["PartiallyInvalid", "UnsupportedValue"];
/// Conditions that are true when something is wrong.
const TRUE_IS_BAD: &[&str] = &["PartiallyInvalid", "Conflicted"];

#[derive(Debug, Args)]
pub struct Arguments {
    /// YAML or JSON files, directories, or - for standard input; without any, what the cluster has.
    files: Vec<PathBuf>,
    #[command(flatten)]
    target: Target,
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

pub async fn run(arguments: Arguments, own: MeshSettings) -> anyhow::Result<Said> {
    let Arguments { files, target, output } = arguments;
    let analysis = if files.is_empty() {
        let cluster = target.connect(own).await?;
        Analysis::of(read::cluster(&cluster.client, cluster.mesh).await?, false)
    } else {
        Analysis::of(read::files(&files, &target.offline_namespace(), own)?, true)
    };
    let ending = if analysis.findings.is_empty() { Ending::Good } else { Ending::Findings };
    Ok(Said { text: written(output, &analysis, || analysis.to_string())?, ending })
}

/// Something that is not done as it was written.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Finding {
    object: String,
    condition: String,
    pub reason: String,
    pub message: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { object, condition, reason, message } = self;
        write!(f, "{object}: {condition}: {reason}")?;
        if message.is_empty() { Ok(()) } else { write!(f, ": {message}") }
    }
}

/// What was looked at and what was found.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Analysis {
    pub looked_at: usize,
    pub findings: BTreeSet<Finding>,
    /// Objects of kinds that mean nothing to the control plane, and namespaces that MeshConfig leaves out.
    #[serde(rename = "notLookedAt")]
    pub others: BTreeSet<String>,
}

impl Analysis {
    /// `offline`: it was read from files.
    pub fn of(seen: Seen, offline: bool) -> Self {
        let hidden = seen.world.hidden.iter().map(|name| format!("Namespace {name} (discoverySelectors)"));
        let others = seen.others.iter().cloned().chain(hidden).collect();
        Self { looked_at: seen.objects, findings: findings(&seen.world, offline), others }
    }
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

/// `offline`: what only a running cluster can tell is left out.
fn findings(world: &World, offline: bool) -> BTreeSet<Finding> {
    let world = &discovery::once(world.clone());
    let verdicts = translate(world).verdicts;
    let mut out: BTreeSet<Finding> = verdicts.iter().flat_map(|verdict| problems(verdict, offline)).collect();
    let (kind, of_mesh) = ("MeshConfig", Key::new(&*world.mesh.root_namespace, mesh_config::CONFIG_MAP));
    out.extend(world.mesh_config.findings.iter().map(|finding| Finding {
        object: format!("{kind} {of_mesh}"),
        condition: if finding.field.is_empty() { "mesh".to_owned() } else { finding.field.clone() },
        reason: finding.reason.to_owned(),
        message: finding.message.clone(),
    }));
    out.extend(of_other_revisions(world, offline));
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

/// What their control planes would say of the Gateways of other revisions.
fn of_other_revisions(world: &World, offline: bool) -> Vec<Finding> {
    let owners = Owners::of(world);
    let others: BTreeSet<&str> = binding::waypoints(world)
        .map(|(_, gateway)| owners.revision(&gateway.meta))
        .filter(|revision| *revision != world.mesh.revision.as_str())
        .collect();
    let mut out = Vec::new();
    for other in others {
        let own = binding::waypoints(world).filter(|(_, gateway)| owners.revision(&gateway.meta) == other);
        let Ok(revision) = other.parse::<Revision>() else {
            let reason = format!("no control plane can be of revision {other:?}");
            out.extend(own.map(|(key, _)| Finding {
                object: format!("Gateway {key}"),
                condition: LABEL.into(),
                reason: "NoSuchRevision".into(),
                message: reason.clone(),
            }));
            continue;
        };
        let mesh = MeshSettings { revision, ..MeshSettings::clone(&world.mesh) };
        let verdicts = translate(&World { mesh: Arc::new(mesh), ..world.clone() }).verdicts;
        let of_gateways = verdicts.iter().filter(|verdict| verdict.kind == Kind::Gateway);
        out.extend(of_gateways.flat_map(|verdict| problems(verdict, offline)));
    }
    out
}

/// What of one object is not done as it was written.
pub fn problems(verdict: &Verdict, offline: bool) -> impl Iterator<Item = Finding> {
    let object = format!("{} {}", verdict.kind.name(), verdict.key);
    // Whether pods run is not in a file; why a Gateway is refused, its other condition says.
    let runtime = move |condition: &Wanted| offline && condition.r#type == "Programmed";
    let bad = conditions(verdict).into_iter().filter(move |(_, condition)| is_bad(condition) && !runtime(condition));
    bad.map(move |(place, condition)| Finding {
        object: format!("{object}{place}"),
        condition: condition.r#type.to_owned(),
        reason: condition.reason.to_owned(),
        message: condition.message.clone(),
    })
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
        Report::Conditions { wanted, .. } | Report::Addressed { wanted, .. } | Report::Class { wanted, .. } => {
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
    use std::fs;

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
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: 2nd, labels: {istio.io/rev: canary}}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: third, labels: {istio.io/rev: '1.30'}}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
";

    fn analyse(text: &str) -> Analysis {
        let directory = tempfile::tempdir().expect("a directory");
        fs::write(directory.path().join("a.yaml"), text).expect("a file");
        fs::write(directory.path().join("README"), "kind: [").expect("a file");
        let seen =
            read::files(&[directory.path().to_owned()], "shop", MeshSettings::default()).expect("it can be read");
        Analysis::of(seen, true)
    }

    #[test]
    fn what_is_in_order_is_not_spoken_of() {
        let analysis = analyse(OBJECTS);
        assert_eq!((analysis.looked_at, analysis.findings.len()), (4, 0), "{analysis}");
        assert_eq!(analysis.others, ["Gateway shop/of-another-group".to_owned()].into());
    }

    #[test]
    fn what_is_not_done_of_mesh_config_is_said_and_what_it_leaves_out_too() {
        let config = |mesh: &str| {
            format!(
                "{OBJECTS}---\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\ndata: {{mesh: '{mesh}'}}\n"
            )
        };
        let said = analyse(&config("{trustDomain: example.org, accessLogFile: /dev/stdout}")).to_string();
        for line in [
            "MeshConfig istio-system/istio: accessLogFile: NotCarriedOut: nothing here reads it",
            "MeshConfig istio-system/istio: trustDomain: NeedsRestart: \"cluster.local\" is the trust domain",
        ] {
            assert!(said.contains(line), "{line}\n{said}");
        }
        let said = analyse(&config("discoverySelectors: [{matchLabels: {mesh: here}}]")).to_string();
        assert!(said.contains("not looked at: Namespace shop (discoverySelectors)"), "{said}");
        let said = analyse(&config("discoverySelectors: {}")).to_string();
        assert!(said.contains("MeshConfig istio-system/istio: mesh: Unreadable: discoverySelectors: "), "{said}");
    }

    #[test]
    fn what_will_not_be_done_is_said_with_its_field() {
        let said = analyse(&format!("{OBJECTS}{BAD}")).to_string();
        for line in [
            "AuthorizationPolicy shop/bad: WaypointAccepted: TargetNotFound: targetRefs: Service shop/wbe does not exist",
            "HTTPRoute shop/bad parent web: Accepted: UnsupportedValue: rules[0].retry",
            "Gateway shop/1st: Accepted: Invalid: metadata.name",
            "Gateway shop/2nd: Accepted: Invalid: metadata.name",
            "Gateway shop/third: istio.io/rev: NoSuchRevision: no control plane can be of revision \"1.30\"",
        ] {
            assert!(said.contains(line), "{line}\n{said}");
        }
        assert!(said.ends_with("9 objects, 5 findings\n"), "{said}");
    }
}
