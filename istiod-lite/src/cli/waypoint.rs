//! `istiod-lite waypoint`: Gateways of class `istio-waypoint`, made, shown and removed. The control plane deploys what
//! they stand for; here is only the Gateway, and the label by which a namespace uses it.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand, ValueEnum};
use k8s_openapi::api::core::v1::Namespace;
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
use kube::runtime::wait::await_condition;
use kube::{Api, Client};
use serde::Serialize;
use serde_json::{Value, json};

use super::connect::{Cluster, Target};
use super::output::{Cell, Format, Paint, Table, Tone, written, yaml};
use super::{Ending, Said};
use crate::enrol::rules::DATAPLANE_MODE;
use crate::revision::{LABEL, Revision};
use crate::translate::binding::{HBONE_PORT, USE_WAYPOINT, WAYPOINT_FOR};
use crate::translate::world::MeshSettings;
use crate::types::gateway::{GatewaySpec, WAYPOINT_CLASS};
use crate::types::{CustomKind as _, label};

/// Whose fields these are.
const FIELD_MANAGER: &str = "istiod-lite-cli";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Makes a waypoint, or changes the one of that name.
    Apply {
        #[command(flatten)]
        wanted: Wanted,
        /// Have all Services of the namespace use it (label istio.io/use-waypoint of the namespace).
        #[arg(long)]
        enroll_namespace: bool,
        /// Take over what others have set: fields of the Gateway, or the namespace's label.
        #[arg(long)]
        overwrite: bool,
        #[command(flatten)]
        wait: Wait,
        #[command(flatten)]
        target: Target,
    },
    /// Writes the Gateway that `apply` would apply.
    Generate {
        #[command(flatten)]
        wanted: Wanted,
        #[command(flatten)]
        target: Target,
    },
    /// Lists the waypoints of the namespace.
    #[command(visible_alias = "ls")]
    List {
        /// Of all namespaces.
        #[arg(long, short = 'A')]
        all_namespaces: bool,
        #[command(flatten)]
        target: Target,
        #[arg(long, short, value_enum, default_value_t)]
        output: Format,
    },
    /// Says whether waypoints are programmed, and why not. Exit status 1 if one is not.
    Status {
        /// All of the namespace when none is named.
        name: Option<String>,
        #[command(flatten)]
        wait: Wait,
        #[command(flatten)]
        target: Target,
        #[arg(long, short, value_enum, default_value_t)]
        output: Format,
    },
    /// Removes waypoints. What is bound to them is refused until its label goes, or another comes.
    Delete {
        #[arg(required_unless_present = "all", conflicts_with = "all")]
        names: Vec<String>,
        /// All waypoints of the namespace.
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        target: Target,
    },
}

#[derive(Debug, Args)]
pub struct Wanted {
    #[arg(long, default_value = "waypoint")]
    name: String,
    /// What traffic it is for; a Service's when none is said.
    #[arg(long = "for", value_enum, value_name = "TRAFFIC")]
    traffic: Option<Traffic>,
    /// The control plane that is to deploy it.
    #[arg(long, short)]
    revision: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Traffic {
    Service,
    Workload,
    All,
    None,
}

#[derive(Debug, Args)]
pub struct Wait {
    /// Wait until it is programmed.
    #[arg(long, short)]
    wait: bool,
    /// The longest to wait.
    #[arg(long, default_value = "90s", value_parser = humantime::parse_duration)]
    timeout: Duration,
}

pub async fn run(command: Command, own: MeshSettings, paint: Paint) -> anyhow::Result<Said> {
    match command {
        Command::Generate { wanted, target } => Ok(Said::good(yaml(&gateway(&wanted, target.namespace.as_deref()))?)),
        Command::Apply { wanted, enroll_namespace, overwrite, wait, target } => {
            let cluster = target.connect(own).await?;
            apply(&cluster, &wanted, enroll_namespace, overwrite, &wait, paint).await
        }
        Command::List { all_namespaces, target, output } => {
            let Cluster { client, namespace, .. } = target.connect(own).await?;
            let found = waypoints(&client, (!all_namespaces).then_some(namespace.as_str())).await?;
            let none = if all_namespaces { String::new() } else { format!(" in namespace {namespace}") };
            let text = written(output, &found, || match found.is_empty() {
                true => format!("No waypoints{none}.\n"),
                false => listed(&found, paint),
            })?;
            Ok(Said::good(text))
        }
        Command::Status { name, wait, target, output } => {
            let Cluster { client, namespace, .. } = target.connect(own).await?;
            if wait.wait {
                let name = name.as_deref().context("--wait: for which? Name it")?;
                programmed(&client, &namespace, name, wait.timeout).await?;
            }
            let mut found = waypoints(&client, Some(&namespace)).await?;
            if let Some(name) = &name {
                found.retain(|waypoint| waypoint.name == *name);
            }
            if found.is_empty() {
                let name = name.map(|name| format!(" {name}")).unwrap_or_default();
                bail!("no waypoint{name} in namespace {namespace}");
            }
            let ending =
                if found.iter().all(|found| found.programmed == "True") { Ending::Good } else { Ending::Findings };
            Ok(Said { text: written(output, &found, || statuses(&found, paint))?, ending })
        }
        Command::Delete { names, all, target } => {
            let Cluster { client, namespace, .. } = target.connect(own).await?;
            delete(&client, &namespace, names, all).await.map(Said::good)
        }
    }
}

/// The Gateway of a waypoint.
fn gateway(wanted: &Wanted, namespace: Option<&str>) -> Value {
    let mut labels = BTreeMap::new();
    if let Some(traffic) = wanted.traffic.and_then(|traffic| traffic.to_possible_value()) {
        labels.insert(WAYPOINT_FOR, traffic.get_name().to_owned());
    }
    labels.extend(wanted.revision.clone().map(|revision| (LABEL, revision)));
    let mut gateway = json!({
        "apiVersion": format!("{}/{}", GatewaySpec::GROUP, GatewaySpec::VERSION),
        "kind": GatewaySpec::KIND,
        "metadata": {"name": wanted.name},
        "spec": {
            "gatewayClassName": WAYPOINT_CLASS,
            "listeners": [{"name": "mesh", "port": HBONE_PORT, "protocol": "HBONE"}],
        },
    });
    if let Some(namespace) = namespace {
        gateway["metadata"]["namespace"] = namespace.into();
    }
    if !labels.is_empty() {
        gateway["metadata"]["labels"] = json!(labels);
    }
    gateway
}

fn gateways(client: &Client, namespace: &str) -> Api<DynamicObject> {
    Api::namespaced_with(client.clone(), namespace, &GatewaySpec::api_resource())
}

async fn apply(
    cluster: &Cluster,
    wanted: &Wanted,
    enroll: bool,
    overwrite: bool,
    wait: &Wait,
    paint: Paint,
) -> anyhow::Result<Said> {
    let Cluster { client, namespace, .. } = cluster;
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let enrolled = match enroll {
        true => Some(enrolment(&namespaces.get(namespace).await?, &wanted.name, overwrite)?),
        false => None,
    };
    let params = PatchParams { force: overwrite, ..PatchParams::apply(FIELD_MANAGER) };
    let object = gateway(wanted, Some(namespace));
    match gateways(client, namespace).patch(&wanted.name, &params, &Patch::Apply(&object)).await {
        Ok(_) => {}
        Err(kube::Error::Api(status)) if status.code == 409 => bail!("{}; --overwrite takes it over", status.message),
        Err(kube::Error::Api(status)) if status.code == 404 => {
            bail!("{}: are the CRDs of Gateway API installed, and does namespace {namespace} exist?", status.message)
        }
        Err(error) => return Err(error.into()),
    }
    let mut text = format!("waypoint {namespace}/{} applied\n", wanted.name);
    if let Some(note) = enrolled {
        let label = json!({
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": namespace, "labels": {USE_WAYPOINT: wanted.name}},
        });
        // Whether it may be taken over was asked above.
        namespaces.patch(namespace, &params.force(), &Patch::Apply(&label)).await?;
        text.push_str(&format!("namespace {namespace} labelled {USE_WAYPOINT}={}\n", wanted.name));
        text.push_str(&note.map(|note| Table::line(&note, Tone::Doubtful, paint)).unwrap_or_default());
    }
    if wait.wait {
        programmed(client, namespace, &wanted.name, wait.timeout).await?;
        text.push_str(&format!("waypoint {namespace}/{} is programmed\n", wanted.name));
    }
    Ok(Said::good(text))
}

/// Whether the namespace may be labelled, and what is to be said of it.
fn enrolment(namespace: &Namespace, waypoint: &str, overwrite: bool) -> anyhow::Result<Option<String>> {
    let name = namespace.metadata.name.as_deref().unwrap_or_default();
    if let Some(other) = label(&namespace.metadata, USE_WAYPOINT).filter(|other| *other != waypoint && !overwrite) {
        bail!("namespace {name} uses waypoint {other:?} ({USE_WAYPOINT}); --overwrite has it use {waypoint:?}");
    }
    let outside = label(&namespace.metadata, DATAPLANE_MODE) != Some("ambient");
    Ok(outside.then(|| {
        format!("namespace {name} is not in the mesh: kubectl label namespace {name} {DATAPLANE_MODE}=ambient")
    }))
}

async fn programmed(client: &Client, namespace: &str, name: &str, longest: Duration) -> anyhow::Result<()> {
    let is_programmed = |object: Option<&DynamicObject>| {
        object.is_some_and(|object| condition(object, "Programmed").is_some_and(|found| found["status"] == "True"))
    };
    let api = gateways(client, namespace);
    let waited = tokio::time::timeout(longest, await_condition(api.clone(), name, is_programmed)).await;
    if let Ok(outcome) = waited {
        outcome.with_context(|| format!("waiting for waypoint {namespace}/{name}"))?;
        return Ok(());
    }
    let object = api.get_opt(name).await?.with_context(|| format!("waypoint {namespace}/{name} does not exist"))?;
    let reason = condition(&object, "Programmed").or_else(|| condition(&object, "Accepted"));
    let message = reason.and_then(|found| found["message"].as_str());
    let message = message.unwrap_or("no control plane has said anything about it; is istiod running?");
    bail!("waypoint {namespace}/{name} is not programmed within {}: {message}", humantime::format_duration(longest))
}

fn condition<'a>(object: &'a DynamicObject, r#type: &str) -> Option<&'a Value> {
    object.data["status"]["conditions"].as_array()?.iter().find(|found| found["type"] == r#type)
}

/// What is said of one.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Waypoint {
    namespace: String,
    name: String,
    revision: String,
    traffic: String,
    /// `True`, `False`, or `Unknown` where nobody has said.
    programmed: String,
    reason: String,
    message: String,
}

impl Waypoint {
    /// `inherited` is the revision of its namespace.
    fn of(object: &DynamicObject, inherited: &str) -> Self {
        let programmed = condition(object, "Programmed");
        let said = |field: &str, otherwise: &str| {
            programmed.and_then(|found| found[field].as_str()).unwrap_or(otherwise).to_owned()
        };
        let labelled = |key: &str, otherwise: &str| label(&object.metadata, key).unwrap_or(otherwise).to_owned();
        Self {
            namespace: object.metadata.namespace.clone().unwrap_or_default(),
            name: object.metadata.name.clone().unwrap_or_default(),
            revision: labelled(LABEL, inherited),
            traffic: labelled(WAYPOINT_FOR, "service"),
            programmed: said("status", "Unknown"),
            reason: said("reason", "Pending"),
            message: said("message", "no control plane has said anything about it"),
        }
    }

    fn state(&self) -> Cell {
        let tone = match self.programmed.as_str() {
            "True" => Tone::Good,
            "False" => Tone::Bad,
            _ => Tone::Doubtful,
        };
        Cell::toned(tone, self.programmed.as_str())
    }
}

async fn waypoints(client: &Client, namespace: Option<&str>) -> anyhow::Result<Vec<Waypoint>> {
    let found = objects(client, namespace).await?;
    let revisions = revisions(client, namespace).await;
    let of = |object: &DynamicObject| {
        let namespace = object.metadata.namespace.as_deref().unwrap_or_default();
        let default = Revision::default();
        let inherited = match &revisions {
            Some(revisions) => revisions.get(namespace).map_or(default.as_str(), String::as_str),
            None => "?",
        };
        Waypoint::of(object, inherited)
    };
    Ok(found.iter().map(of).collect())
}

/// The revisions that namespaces are labelled with. `None`: one may not look.
async fn revisions(client: &Client, namespace: Option<&str>) -> Option<BTreeMap<String, String>> {
    let api: Api<Namespace> = Api::all(client.clone());
    let namespaces = match namespace {
        Some(namespace) => vec![api.get(namespace).await.ok()?],
        None => api.list(&ListParams::default()).await.ok()?.items,
    };
    let labelled = |namespace: Namespace| {
        let revision = label(&namespace.metadata, LABEL).filter(|revision| !revision.is_empty())?.to_owned();
        Some((namespace.metadata.name?, revision))
    };
    Some(namespaces.into_iter().filter_map(labelled).collect())
}

/// The Gateways of the class, by name.
async fn objects(client: &Client, namespace: Option<&str>) -> anyhow::Result<Vec<DynamicObject>> {
    let api = match namespace {
        Some(namespace) => gateways(client, namespace),
        None => Api::all_with(client.clone(), &GatewaySpec::api_resource()),
    };
    let mut found = match api.list(&ListParams::default()).await {
        Ok(found) => found.items,
        Err(kube::Error::Api(status)) if status.code == 404 => bail!("the CRDs of Gateway API are not installed"),
        Err(error) => return Err(error.into()),
    };
    found.retain(|object| object.data["spec"]["gatewayClassName"] == WAYPOINT_CLASS);
    found.sort_by(|a, b| (&a.metadata.namespace, &a.metadata.name).cmp(&(&b.metadata.namespace, &b.metadata.name)));
    Ok(found)
}

fn listed(found: &[Waypoint], paint: Paint) -> String {
    let mut table = Table::new(&["NAMESPACE", "NAME", "REVISION", "TRAFFIC", "PROGRAMMED"]);
    for waypoint in found {
        let texts = [&waypoint.namespace, &waypoint.name, &waypoint.revision, &waypoint.traffic];
        table.row(texts.into_iter().map(|text| Cell::from(text.as_str())).chain([waypoint.state()]));
    }
    table.render("", paint)
}

fn statuses(found: &[Waypoint], paint: Paint) -> String {
    let mut table = Table::new(&["NAMESPACE", "NAME", "PROGRAMMED", "REASON", "MESSAGE"]);
    for waypoint in found {
        table.row([
            Cell::from(waypoint.namespace.as_str()),
            Cell::from(waypoint.name.as_str()),
            waypoint.state(),
            Cell::from(waypoint.reason.as_str()),
            Cell::from(waypoint.message.as_str()),
        ]);
    }
    table.render("", paint)
}

/// Gateways of other classes are not touched.
async fn delete(client: &Client, namespace: &str, names: Vec<String>, all: bool) -> anyhow::Result<String> {
    let here = objects(client, Some(namespace)).await?.into_iter().filter_map(|object| object.metadata.name);
    let here: Vec<String> = here.collect();
    if let Some(missing) = names.iter().find(|name| !here.contains(name)) {
        bail!("no waypoint {missing} in namespace {namespace}; nothing was deleted");
    }
    let names = if all { here } else { names };
    if names.is_empty() {
        return Ok(format!("No waypoints in namespace {namespace}.\n"));
    }
    let mut text = String::new();
    for name in names {
        gateways(client, namespace).delete(&name, &DeleteParams::default()).await?;
        text.push_str(&format!("waypoint {namespace}/{name} deleted\n"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests;
