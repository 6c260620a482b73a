//! `istiod-lite install-check`: before an installation, whether the cluster has what the mesh needs; after it, whether
//! the mesh is there and whole. Each finding says how to mend it. Nothing is changed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anyhow::Context as _;
use clap::Args;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec};
use k8s_openapi::api::core::v1::{self as api, ConfigMap, Namespace, Node, PodSpec};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DynamicObject, ListParams, PostParams};
use kube::core::ApiResource;
use kube::{Api, Client};
use serde::Serialize;

use super::connect::{Cluster, Target, of_control_planes};
use super::output::{Cell, Format, Paint, Table, Tone, written};
use super::{Ending, Said, read};
use crate::enrol::rules::DATAPLANE_MODE;
use crate::revision::{self, Revision};
use crate::translate::binding;
use crate::translate::owner::Owners;
use crate::translate::world::{MeshSettings, World};
use crate::types::gateway::{GatewayClassSpec, GatewaySpec, MESH_CONTROLLER, WAYPOINT_CLASS};
use crate::types::{CustomKind as _, Held, Key, Object, Service, label};
use crate::watch::ROOT_CERT_CONFIG_MAP;

/// The oldest Kubernetes that the manifests are tested against.
const OLDEST: (u32, u32) = (1, 30);
/// The oldest Linux that has all that ztunnel's programs use.
const OLDEST_KERNEL: (u32, u32) = (5, 18);
/// Of nodes, and of namespaces, that are named in one finding.
const MOST_NAMED: usize = 5;

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    target: Target,
    #[arg(long, short, value_enum, default_value_t)]
    output: Format,
}

/// Exit status 1 where something has to be mended, 2 where the API does not answer.
pub async fn run(arguments: Arguments, own: MeshSettings, paint: Paint) -> anyhow::Result<Said> {
    let cluster = arguments.target.connect(own).await?;
    let checks = check(&cluster).await?;
    let ending = if checks.iter().all(|check| check.state == State::Good) { Ending::Good } else { Ending::Findings };
    Ok(Said { text: written(arguments.output, &checks, || text(&checks, paint))?, ending })
}

/// The same as a text.
///
/// # Errors
/// The API does not answer.
pub async fn report(cluster: &Cluster) -> anyhow::Result<String> {
    Ok(text(&check(cluster).await?, Paint::PLAIN))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
enum State {
    Good,
    /// It works, in part or not for long.
    Warning,
    Problem,
    /// It could not be looked at.
    Unknown,
}

/// One thing that was looked at.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Check {
    what: &'static str,
    state: State,
    message: String,
    /// How to mend it.
    #[serde(skip_serializing_if = "Option::is_none")]
    mend: Option<String>,
}

impl Check {
    fn good(what: &'static str, message: impl Into<String>) -> Self {
        Self { what, state: State::Good, message: message.into(), mend: None }
    }

    fn bad(what: &'static str, state: State, message: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { what, state, message: message.into(), mend: Some(mend.into()) }
    }

    fn problem(what: &'static str, message: impl Into<String>, mend: impl Into<String>) -> Self {
        Self::bad(what, State::Problem, message, mend)
    }

    fn unknown(what: &'static str, error: &kube::Error) -> Self {
        Self::bad(what, State::Unknown, error.to_string(), "ask as somebody who may look at it")
    }
}

async fn check(cluster: &Cluster) -> anyhow::Result<Vec<Check>> {
    let Cluster { client, system, .. } = cluster;
    let version = client.apiserver_version().await.context("asking the API server for its version")?;
    let mut checks = vec![api_version(&version.major, &version.minor)];
    match all::<Node>(client, None).await {
        Ok(nodes) => checks.extend(kernels(&nodes)),
        Err(error) => checks.push(Check::unknown("kernel", &error)),
    }
    checks.push(crds(client).await);
    let daemon_sets: Api<DaemonSet> = Api::namespaced(client.clone(), system);
    let control_plane: Result<Vec<Deployment>, _> = of_control_planes(client, system).await;
    let node_proxy = daemon_sets.get_opt("ztunnel").await;
    let installed =
        control_plane.as_ref().is_ok_and(|found| !found.is_empty()) || node_proxy.as_ref().is_ok_and(Option::is_some);
    checks.push(conflicts(client).await);
    if !installed {
        checks.extend(permissions(client, system).await);
        let looked = control_plane.err().or(node_proxy.err());
        checks.push(match looked {
            None => Check::good("installation", format!("there is none yet in namespace {system}")),
            Some(error) => Check::unknown("installation", &error),
        });
        return Ok(checks);
    }
    match control_plane {
        Ok(found) if found.is_empty() => checks.push(missing("control plane", "Deployment istiod", system)),
        Ok(found) => {
            checks.extend(found.iter().map(deployment));
            checks.extend(revisions(client, system, &found).await);
        }
        Err(error) => checks.push(Check::unknown("control plane", &error)),
    }
    match node_proxy {
        Ok(found) => {
            checks.push(found.as_ref().map_or_else(|| missing("node proxies", "DaemonSet ztunnel", system), daemon_set))
        }
        Err(error) => checks.push(Check::unknown("node proxies", &error)),
    }
    checks.push(waypoint_class(client).await);
    checks.push(roots(client, system).await);
    Ok(checks)
}

async fn all<K>(client: &Client, labels: Option<&str>) -> Result<Vec<K>, kube::Error>
where
    K: kube::Resource<DynamicType = ()> + Clone + std::fmt::Debug + serde::de::DeserializeOwned,
{
    let params = labels.map_or_else(ListParams::default, |labels| ListParams::default().labels(labels));
    Ok(Api::<K>::all(client.clone()).list(&params).await?.items)
}

fn missing(what: &'static str, object: &str, system: &str) -> Check {
    Check::problem(
        what,
        format!("{object} is not in namespace {system}, and the rest of the mesh is"),
        "kubectl apply -f manifests/install.yaml",
    )
}

fn numbers(version: &str) -> Option<(u32, u32)> {
    // Some say `30+`.
    let number = |text: &str| text.trim_end_matches(|c: char| !c.is_ascii_digit()).parse().ok();
    let mut parts = version.split(['.', '-']);
    Some((number(parts.next()?)?, number(parts.next()?)?))
}

fn api_version(major: &str, minor: &str) -> Check {
    let text = format!("{major}.{minor}");
    match numbers(&text) {
        Some(found) if found >= OLDEST => Check::good("API server", format!("Kubernetes {text}")),
        _ => Check::bad(
            "API server",
            State::Warning,
            format!("Kubernetes {text}; nothing older than {}.{} has been tried", OLDEST.0, OLDEST.1),
            "upgrade the cluster",
        ),
    }
}

fn kernels(nodes: &[Node]) -> Vec<Check> {
    let info = |node: &Node| node.status.as_ref().and_then(|status| status.node_info.clone()).unwrap_or_default();
    let name = |node: &Node| node.metadata.name.clone().unwrap_or_default();
    let linux = nodes.iter().filter(|node| matches!(&*info(node).operating_system, "linux" | ""));
    let (mut old, mut unknown, mut fine) = (Vec::new(), Vec::new(), 0);
    for node in linux {
        let kernel = info(node).kernel_version;
        match numbers(&kernel) {
            Some(found) if found >= OLDEST_KERNEL => fine += 1,
            Some(_) => old.push(format!("{} ({kernel})", name(node))),
            None => unknown.push(name(node)),
        }
    }
    let needed = format!("{}.{}", OLDEST_KERNEL.0, OLDEST_KERNEL.1);
    let mut checks = Vec::new();
    if !old.is_empty() {
        checks.push(Check::problem(
            "kernel",
            format!("older than Linux {needed}, so ztunnel cannot capture there: {}", some(&old)),
            "upgrade these nodes, or keep ztunnel and the mesh's pods off them by a nodeSelector",
        ));
    }
    if !unknown.is_empty() {
        checks.push(Check::bad(
            "kernel",
            State::Warning,
            format!("not known of {}", some(&unknown)),
            format!("see for yourself that it is Linux {needed} or newer (uname -r)"),
        ));
    }
    if checks.is_empty() {
        checks.push(Check::good("kernel", format!("Linux {needed} or newer on {fine} nodes")));
    }
    checks
}

/// The first few of a list, and how many more there are.
fn some(names: &[String]) -> String {
    let more = names.len().saturating_sub(MOST_NAMED);
    let named = names.iter().take(MOST_NAMED).map(String::as_str).collect::<Vec<_>>().join(", ");
    if more == 0 { named } else { format!("{named} and {more} more") }
}

/// Those of the kinds that are read.
async fn crds(client: &Client) -> Check {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    let custom = read::kinds()
        .into_iter()
        .map(|kind| kind.resource)
        .filter(|resource| resource.group.contains(".istio.io") || resource.group.contains("gateway."));
    let (mut wanted, mut lacking) = (0, Vec::new());
    for resource in custom {
        wanted += 1;
        let name = format!("{}.{}", resource.plural, resource.group);
        match api.get_opt(&name).await {
            Ok(found) => lacking.extend(lacks(found.as_ref(), &name, &resource)),
            Err(error) => return Check::unknown("CRDs", &error),
        }
    }
    match lacking.is_empty() {
        true => Check::good("CRDs", format!("all {wanted} are there")),
        false => Check::problem(
            "CRDs",
            lacking.join("; "),
            "kubectl apply -f manifests/crds/ (where the cluster has some of its own, only those that it lacks)",
        ),
    }
}

fn lacks(found: Option<&CustomResourceDefinition>, name: &str, resource: &ApiResource) -> Option<String> {
    let Some(found) = found else { return Some(format!("{name} is missing")) };
    if !found.spec.versions.iter().any(|version| version.served && version.name == resource.version) {
        return Some(format!("{name} does not serve version {}", resource.version));
    }
    let conditions = found.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let established = conditions.iter().any(|found| found.type_ == "Established" && found.status == "True");
    (!established).then(|| format!("{name} is not established yet"))
}

/// What else would capture pods or deploy waypoints here.
async fn conflicts(client: &Client) -> Check {
    let (daemon_sets, deployments) = match (all::<DaemonSet>(client, None).await, all::<Deployment>(client, None).await)
    {
        (Ok(daemon_sets), Ok(deployments)) => (daemon_sets, deployments),
        (Err(error), _) | (_, Err(error)) => return Check::unknown("other meshes", &error),
    };
    let daemon_sets = daemon_sets
        .iter()
        .filter_map(|set| Some(("DaemonSet", &set.metadata, set.spec.as_ref()?.template.spec.as_ref()?)));
    let deployments = deployments
        .iter()
        .filter_map(|set| Some(("Deployment", &set.metadata, set.spec.as_ref()?.template.spec.as_ref()?)));
    let others: BTreeSet<String> = daemon_sets
        .chain(deployments)
        .filter_map(|(kind, meta, pod)| {
            let what = foreign(pod)?;
            let (namespace, name) =
                (meta.namespace.as_deref().unwrap_or_default(), meta.name.as_deref().unwrap_or_default());
            Some(format!("{kind} {namespace}/{name} is {what}"))
        })
        .collect();
    match others.is_empty() {
        true => Check::good("other meshes", "none that would be in the way"),
        false => Check::problem(
            "other meshes",
            others.into_iter().collect::<Vec<_>>().join("; "),
            "two meshes cannot capture the same pods: uninstall one, or have them keep to namespaces of their own",
        ),
    }
}

/// What other mesh these are the pods of, by their images' names.
fn foreign(pod: &PodSpec) -> Option<&'static str> {
    pod.containers.iter().find_map(|container| {
        let image = container.image.as_deref()?.split('@').next()?;
        let (path, _) = image.rsplit_once(':').filter(|(_, tag)| !tag.contains('/')).unwrap_or((image, ""));
        let (repository, name) = path.rsplit_once('/').unwrap_or(("", path));
        let of_istio = repository.ends_with("istio") || repository.contains("istio-");
        match name {
            "pilot" => Some("Istio's control plane"),
            "install-cni" => Some("Istio's CNI agent, which redirects pods by itself"),
            "ztunnel" if of_istio => Some("Istio's ztunnel"),
            "linkerd-proxy-injector" | "controller" if repository.ends_with("linkerd") => Some("Linkerd"),
            _ => None,
        }
    })
}

fn images(pod: &PodSpec) -> String {
    let images = pod.containers.iter().filter_map(|container| container.image.as_deref());
    images.collect::<Vec<_>>().join(", ")
}

fn deployment(found: &Deployment) -> Check {
    let spec = found.spec.as_ref();
    let wanted = spec.and_then(|spec| spec.replicas).unwrap_or(1);
    let status = found.status.clone().unwrap_or_default();
    let images = spec.and_then(|spec| spec.template.spec.as_ref()).map(images).unwrap_or_default();
    let observed = status.observed_generation >= found.metadata.generation;
    let (ready, updated) = (status.ready_replicas.unwrap_or_default(), status.updated_replicas.unwrap_or_default());
    let name = found.metadata.name.as_deref().unwrap_or_default();
    let check = rollout("control plane", wanted, ready, updated, observed, &images, &format!("deployment/{name}"));
    match label(&found.metadata, revision::LABEL) {
        Some(revision) => Check { message: format!("revision {revision}: {}", check.message), ..check },
        None => check,
    }
}

fn daemon_set(found: &DaemonSet) -> Check {
    let status = found.status.clone().unwrap_or_default();
    let images = found.spec.as_ref().and_then(|spec| spec.template.spec.as_ref()).map(images).unwrap_or_default();
    let observed = status.observed_generation >= found.metadata.generation;
    let (wanted, ready) = (status.desired_number_scheduled, status.number_ready);
    let updated = status.updated_number_scheduled.unwrap_or_default();
    rollout("node proxies", wanted, ready, updated, observed, &images, "daemonset/ztunnel")
}

fn rollout(
    what: &'static str,
    wanted: i32,
    ready: i32,
    updated: i32,
    observed: bool,
    images: &str,
    object: &str,
) -> Check {
    let mend = format!("kubectl rollout status {object}; kubectl describe and kubectl logs of its pods say why");
    if wanted == 0 {
        return Check::problem(
            what,
            format!("no pod is wanted ({images})"),
            format!("scale {object} up, or see its nodeSelector"),
        );
    }
    if ready < wanted {
        let state = if ready == 0 { State::Problem } else { State::Warning };
        return Check::bad(what, state, format!("{ready} of {wanted} pods are ready ({images})"), mend);
    }
    if updated < wanted || !observed {
        let message = format!("{updated} of {wanted} pods are of the newest template ({images})");
        return Check::bad(what, State::Warning, message, mend);
    }
    Check::good(what, format!("{ready} of {wanted} pods are ready ({images})"))
}

/// Whether each waypoint has a control plane to deploy it. `None`: there is one revision, and it has all.
async fn revisions(client: &Client, system: &str, control_planes: &[Deployment]) -> Option<Check> {
    const WHAT: &str = "revisions";
    let world = match waypoints_and_tags(client, system).await {
        Ok(world) => world,
        Err(error) => return Some(Check::unknown(WHAT, &error)),
    };
    let owners = Owners::of(&world);
    let names: BTreeSet<&str> = control_planes.iter().filter_map(|found| found.metadata.name.as_deref()).collect();
    let is_there =
        |revision: &str| revision.parse::<Revision>().is_ok_and(|revision| names.contains(&*revision.named("istiod")));
    let mut waypoints: BTreeMap<&str, usize> = BTreeMap::new();
    let mut orphans = Vec::new();
    for (key, gateway) in binding::waypoints(&world) {
        let revision = owners.revision(&gateway.meta);
        *waypoints.entry(revision).or_default() += 1;
        if !is_there(revision) {
            orphans.push(format!("{key} ({revision})"));
        }
    }
    if !orphans.is_empty() {
        return Some(Check::problem(
            WHAT,
            format!("no control plane is there to deploy {}", some(&orphans)),
            format!(
                "label the Gateways, or their namespaces, {}=REVISION of one that is, or install theirs",
                revision::LABEL
            ),
        ));
    }
    let counts: Vec<String> =
        waypoints.iter().map(|(revision, count)| format!("{count} waypoints of {revision}")).collect();
    (names.len() > 1)
        .then(|| Check::good(WHAT, if counts.is_empty() { "no waypoints".into() } else { counts.join(", ") }))
}

/// What it takes to tell whose a waypoint is.
async fn waypoints_and_tags(client: &Client, system: &str) -> Result<World, kube::Error> {
    let gateways: Api<DynamicObject> = Api::all_with(client.clone(), &GatewaySpec::api_resource());
    let gateways = match gateways.list(&ListParams::default()).await {
        Ok(found) => found.items,
        // Its definition is missing, which is told elsewhere.
        Err(kube::Error::Api(status)) if status.code == 404 => Vec::new(),
        Err(error) => return Err(error),
    };
    let services = Api::<api::Service>::namespaced(client.clone(), system).list(&ListParams::default()).await?;
    let services = services.items.into_iter().map(Service::new);
    let mesh = MeshSettings { root_namespace: system.to_owned(), ..MeshSettings::default() };
    Ok(World {
        mesh: Arc::new(mesh),
        gateways: gateways
            .into_iter()
            .map(Object::<GatewaySpec>::from_dynamic)
            .map(|it| (it.key(), Held::new(it)))
            .collect(),
        services: services.map(|it| (it.key.clone(), Held::new(it))).collect(),
        namespaces: all::<Namespace>(client, None)
            .await?
            .into_iter()
            .map(|it| (Key::of(&it.metadata), Held::new(it)))
            .collect(),
        ..World::default()
    })
}

async fn waypoint_class(client: &Client) -> Check {
    const WHAT: &str = "waypoints";
    let api: Api<DynamicObject> = Api::all_with(client.clone(), &GatewayClassSpec::api_resource());
    let class = match api.get_opt(WAYPOINT_CLASS).await {
        Ok(Some(class)) => class,
        Ok(None) => {
            let message = format!("GatewayClass {WAYPOINT_CLASS} is missing, so no waypoint is deployed");
            return Check::problem(WHAT, message, "kubectl apply -f manifests/install.yaml");
        }
        Err(error) => return Check::unknown(WHAT, &error),
    };
    let controller = class.data["spec"]["controllerName"].as_str().unwrap_or_default();
    if controller != MESH_CONTROLLER {
        let message = format!("GatewayClass {WAYPOINT_CLASS} is of controller {controller}");
        return Check::problem(WHAT, message, "have whoever made it take it away, and apply manifests/install.yaml");
    }
    let conditions = class.data["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    match conditions.iter().find(|found| found["type"] == "Accepted") {
        Some(found) if found["status"] == "True" => {
            Check::good(WHAT, format!("GatewayClass {WAYPOINT_CLASS} is accepted"))
        }
        Some(found) => Check::problem(
            WHAT,
            format!("GatewayClass {WAYPOINT_CLASS}: {}", found["message"].as_str().unwrap_or_default()),
            "mend it as the message says",
        ),
        None => Check::problem(
            WHAT,
            format!("GatewayClass {WAYPOINT_CLASS} has not been accepted by anybody"),
            "see whether istiod runs, and its log",
        ),
    }
}

/// Proxies cannot trust the control plane without them.
async fn roots(client: &Client, system: &str) -> Check {
    const WHAT: &str = "root certificates";
    let namespaces = match all::<Namespace>(client, None).await {
        Ok(namespaces) => namespaces,
        Err(error) => return Check::unknown(WHAT, &error),
    };
    let fields = ListParams::default().fields(&format!("metadata.name={ROOT_CERT_CONFIG_MAP}"));
    let found = match Api::<ConfigMap>::all(client.clone()).list(&fields).await {
        Ok(found) => found.items,
        Err(error) => return Check::unknown(WHAT, &error),
    };
    let has = |name: &str| {
        let of = found.iter().filter(|map| map.metadata.namespace.as_deref() == Some(name));
        of.filter_map(|map| map.data.as_ref()).any(|data| data.get("root-cert.pem").is_some_and(|pem| !pem.is_empty()))
    };
    let needs = |namespace: &&Namespace| {
        let name = namespace.metadata.name.as_deref().unwrap_or_default();
        let stays = namespace.metadata.deletion_timestamp.is_none();
        stays && (name == system || label(&namespace.metadata, DATAPLANE_MODE) == Some("ambient"))
    };
    let names = namespaces.iter().filter(needs).filter_map(|namespace| namespace.metadata.name.clone());
    let (with, without): (Vec<String>, Vec<String>) = names.partition(|name| has(name));
    match without.is_empty() {
        true => {
            Check::good(WHAT, format!("ConfigMap {ROOT_CERT_CONFIG_MAP} is in {} namespaces of the mesh", with.len()))
        }
        false => Check::problem(
            WHAT,
            format!("ConfigMap {ROOT_CERT_CONFIG_MAP} is missing in {}", some(&without)),
            "see istiod's log: it writes them, and again when they are deleted",
        ),
    }
}

/// What whoever asks needs for an installation.
async fn permissions(client: &Client, system: &str) -> Vec<Check> {
    const WHAT: &str = "permissions";
    let needed = [
        ("", "namespaces", None),
        ("apiextensions.k8s.io", "customresourcedefinitions", None),
        ("rbac.authorization.k8s.io", "clusterroles", None),
        ("rbac.authorization.k8s.io", "clusterrolebindings", None),
        ("gateway.networking.k8s.io", "gatewayclasses", None),
        ("rbac.authorization.k8s.io", "roles", Some(system)),
        ("rbac.authorization.k8s.io", "rolebindings", Some(system)),
        ("", "serviceaccounts", Some(system)),
        ("", "services", Some(system)),
        ("apps", "deployments", Some(system)),
        ("apps", "daemonsets", Some(system)),
    ];
    let api: Api<SelfSubjectAccessReview> = Api::all(client.clone());
    let mut lacking = Vec::new();
    for (group, resource, namespace) in needed {
        for verb in ["create", "patch"] {
            let attributes = ResourceAttributes {
                group: Some(group.to_owned()),
                resource: Some(resource.to_owned()),
                verb: Some(verb.to_owned()),
                namespace: namespace.map(str::to_owned),
                ..ResourceAttributes::default()
            };
            let spec = SelfSubjectAccessReviewSpec { resource_attributes: Some(attributes), ..Default::default() };
            let review = SelfSubjectAccessReview { spec, ..SelfSubjectAccessReview::default() };
            match api.create(&PostParams::default(), &review).await {
                Ok(answer) if answer.status.as_ref().is_some_and(|status| status.allowed) => {}
                Ok(_) => lacking.push(format!("{verb} {resource}")),
                Err(error) => return vec![Check::unknown(WHAT, &error)],
            }
        }
    }
    vec![match lacking.is_empty() {
        true => Check::good(WHAT, "yours suffice to install the mesh"),
        false => Check::problem(
            WHAT,
            format!("you may not {}", lacking.join(", ")),
            "install as somebody who may, such as a member of cluster-admin",
        ),
    }]
}

fn text(checks: &[Check], paint: Paint) -> String {
    let mut table = Table::new(&["CHECK", "STATE", "FOUND"]);
    for check in checks {
        let state = match check.state {
            State::Good => Cell::toned(Tone::Good, "good"),
            State::Warning => Cell::toned(Tone::Doubtful, "warning"),
            State::Problem => Cell::toned(Tone::Bad, "problem"),
            State::Unknown => Cell::toned(Tone::Doubtful, "unknown"),
        };
        table.row([Cell::from(check.what), state, Cell::from(check.message.as_str())]);
        if let Some(mend) = &check.mend {
            table.row([Cell::from(""), Cell::from(""), Cell::from(format!("to mend it: {mend}"))]);
        }
    }
    let bad = checks.iter().filter(|check| check.state != State::Good).count();
    format!("{}{} checks, {bad} findings\n", table.render("", paint), checks.len())
}

#[cfg(test)]
mod tests;
