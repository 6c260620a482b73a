//! What the control plane creates: the class of waypoints, the objects of each waypoint, and in every namespace the root
//! certificates and, if there are any, the revocation lists of the authority. By server-side apply under our own field
//! manager, so what users add (replicas, resources) stays theirs; written again only when what we want changed or the
//! object is gone. Deletion is left to ownerReferences, but for what is withdrawn while its owner stays: revocation lists,
//! and autoscalers and disruption budgets that nobody asks for any more.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use futures_util::{StreamExt, stream};
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, Preconditions};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client};
use serde_json::{Value, json};
use xxhash_rust::xxh64::xxh64;

use crate::resources::lock;
use crate::translate::binding::{MANAGED_LABEL, is_waypoint, waypoints};
use crate::translate::owner::Owners;
use crate::translate::parameters::{self, Part};
use crate::translate::waypoint::{self, MANAGED_BY};
use crate::translate::world::{Table, World};
use crate::types::gateway::{GROUP, GatewayClassSpec, MESH_CONTROLLER, WAYPOINT_CLASS};
use crate::types::{CustomKind, Key, Meta, annotation, label};
use crate::watch::{REVOCATION_CONFIG_MAP, ROOT_CERT_CONFIG_MAP};

pub use crate::translate::waypoint::WaypointSettings;

pub const FIELD_MANAGER: &str = "istio.io/mesh-controller";
/// Digest of what we applied last, on the object itself.
const APPLIED: &str = "gateway.istio.io/applied";
/// On what is the same in every namespace, as Istio has it.
const CONFIG_LABEL: &str = "istio.io/config";
const REVOCATION_KEY: &str = "ca-crl.pem";
const CONCURRENCY: usize = 8;

/// What certificates are checked by, PEM.
#[derive(Debug, Clone, Copy)]
pub struct Trust<'a> {
    pub roots: &'a str,
    pub revocations: Option<&'a str>,
}

/// An object to delete, if it is still the one that was seen.
#[derive(Debug, PartialEq, Eq)]
pub struct Withdrawn {
    kind: AppliedKind,
    key: Key,
    uid: Option<String>,
}

/// An object to apply.
#[derive(Debug, PartialEq)]
pub struct Apply {
    kind: AppliedKind,
    key: Key,
    object: Value,
}

/// What became of a round of objects.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Something failed that may succeed later.
    pub again: bool,
    /// By Gateway, what keeps its waypoint from being deployed.
    pub obstacles: BTreeMap<Key, String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AppliedKind {
    /// Of a waypoint, and named like its Gateway.
    Part(Part),
    ConfigMap,
    GatewayClass,
}

impl AppliedKind {
    fn name(self) -> &'static str {
        match self {
            Self::Part(part) => part.kind(),
            Self::ConfigMap => "ConfigMap",
            Self::GatewayClass => GatewayClassSpec::KIND,
        }
    }

    fn api_resource(self) -> ApiResource {
        let (group, version, kind, plural) = match self {
            Self::Part(part) => part.api(),
            Self::ConfigMap => ("", "v1", "ConfigMap", "configmaps"),
            Self::GatewayClass => return GatewayClassSpec::api_resource(),
        };
        ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural)
    }

    fn existing<'a>(self, world: &'a World, key: &Key) -> Option<&'a dyn Meta> {
        match self {
            Self::Part(Part::ServiceAccount) => world.service_accounts.get(key).map(|object| &object.metadata as _),
            Self::Part(Part::Service) => world.services.get(key).map(|service| &**service as _),
            Self::Part(Part::Deployment) => world.deployments.get(key).map(|object| &object.metadata as _),
            Self::Part(Part::HorizontalPodAutoscaler) => world.autoscalers.get(key).map(|meta| &**meta as _),
            Self::Part(Part::PodDisruptionBudget) => world.disruption_budgets.get(key).map(|meta| &**meta as _),
            Self::ConfigMap => config_maps(world, &key.name).get(key).map(|object| &object.metadata as _),
            Self::GatewayClass => world.gateway_classes.get(key).map(|class| &class.meta as _),
        }
    }

    fn api(self, client: &Client, namespace: &str) -> Api<DynamicObject> {
        match namespace {
            "" => Api::all_with(client.clone(), &self.api_resource()),
            _ => Api::namespaced_with(client.clone(), namespace, &self.api_resource()),
        }
    }
}

/// What is missing or out of date of the waypoints that are ours to deploy.
pub fn waypoint_parts(world: &World, settings: &WaypointSettings) -> Vec<Apply> {
    let mut out = Vec::new();
    let owners = Owners::of(world);
    for (key, gateway) in waypoints(world).filter(|(_, gateway)| owners.is_ours(&gateway.meta)) {
        let Ok(spec) = &gateway.spec else { continue };
        if gateway.meta.deletion_timestamp.is_some() || is_terminating(world, &key.namespace) {
            continue;
        }
        // Of one that is refused, what runs stays as it is.
        let Ok(objects) = waypoint::objects(world, key, gateway, spec, settings) else { continue };
        for (part, object) in objects {
            out.extend(outdated(world, AppliedKind::Part(part), key.clone(), object));
        }
    }
    out
}

/// What is missing or out of date of what is there once, whatever revisions there are.
pub fn shared(world: &World, trust: &Trust<'_>) -> Vec<Apply> {
    let mut out = Vec::from_iter(class(world));
    for (key, _) in world.namespaces.iter().filter(|(key, _)| !is_terminating(world, &key.name)) {
        out.extend(config_map(world, &key.name, ROOT_CERT_CONFIG_MAP, "root-cert.pem", trust.roots));
        if let Some(lists) = trust.revocations {
            out.extend(config_map(world, &key.name, REVOCATION_CONFIG_MAP, REVOCATION_KEY, lists));
        }
    }
    out
}

/// The class of waypoints, where there is none. One that is there is left as it is, whoever made it.
fn class(world: &World) -> Option<Apply> {
    let (kind, key) = (AppliedKind::GatewayClass, Key::new("", WAYPOINT_CLASS));
    if world.not_installed.contains(kind.name()) || kind.existing(world, &key).is_some() {
        return None;
    }
    let object = json!({
        "apiVersion": format!("{GROUP}/{}", GatewayClassSpec::VERSION),
        "kind": kind.name(),
        "metadata": {"name": WAYPOINT_CLASS, "labels": {"app.kubernetes.io/part-of": "mesh"}},
        "spec": {"controllerName": MESH_CONTROLLER, "description": "L7 proxy for services of the mesh"},
    });
    Some(Apply { kind, key, object })
}

/// Says, once for each that is found, that the class of waypoints is somebody else's: Gateways of it are not ours then.
#[derive(Debug, Default)]
pub struct ForeignClass(Mutex<Option<String>>);

impl ForeignClass {
    pub fn tell(&self, world: &World) {
        let spec = world.gateway_classes.get(&Key::new("", WAYPOINT_CLASS)).and_then(|class| class.spec.as_ref().ok());
        let controller = spec.map(|spec| &spec.controller_name).filter(|name| *name != MESH_CONTROLLER);
        let mut told = lock(&self.0);
        if told.as_ref() == controller {
            return;
        }
        if let Some(controller) = controller {
            tracing::warn!(
                class = WAYPOINT_CLASS,
                controller,
                "the class is another controller's: its Gateways are left alone, and get no waypoint from here; delete \
                 it, and one of {MESH_CONTROLLER} takes its place"
            );
        }
        *told = controller.cloned();
    }
}

/// The revocation lists that we have made, where there are none any more.
pub fn withdrawn_lists(world: &World, trust: &Trust<'_>) -> Vec<Withdrawn> {
    if trust.revocations.is_some() {
        return Vec::new();
    }
    let lists = world.revocation_lists.iter();
    let ours = lists.filter(|(_, found)| label(&found.metadata, CONFIG_LABEL) == Some("true"));
    let withdrawn = ours.map(|(key, found)| Withdrawn {
        kind: AppliedKind::ConfigMap,
        key: key.clone(),
        uid: found.metadata.uid.clone(),
    });
    withdrawn.collect()
}

/// The parts of waypoints that are there only on demand, and not asked for any more.
pub fn withdrawn_parts(world: &World) -> Vec<Withdrawn> {
    let (mut out, owners) = (Vec::new(), Owners::of(world));
    let on_demand =
        [(Part::HorizontalPodAutoscaler, &world.autoscalers), (Part::PodDisruptionBudget, &world.disruption_budgets)];
    for (part, table) in on_demand {
        let unwanted = table.iter().filter(|(key, meta)| is_unwanted(world, &owners, part, key, meta));
        out.extend(unwanted.map(|(key, meta)| Withdrawn {
            kind: AppliedKind::Part(part),
            key: key.clone(),
            uid: meta.uid.clone(),
        }));
    }
    out
}

/// Whether we have made it for a Gateway that is there, deployed by us, and does without it now.
fn is_unwanted(world: &World, owners: &Owners<'_>, part: Part, key: &Key, meta: &ObjectMeta) -> bool {
    let ours = label(meta, MANAGED_LABEL) == Some(MANAGED_BY) && annotation(meta, APPLIED).is_some();
    let Some(gateway) = world.gateways.get(key).filter(|gateway| ours && is_waypoint(world, gateway)) else {
        return false;
    };
    if !owners.is_ours(&gateway.meta) {
        return false;
    }
    let uid = gateway.meta.uid.as_deref();
    let owns = meta.owner_references.iter().flatten().any(|owner| Some(owner.uid.as_str()) == uid);
    let Ok(spec) = &gateway.spec else { return false };
    let asked = parameters::of(world, key, spec).is_ok_and(|applying| applying.asks_for(part));
    // Of one that is refused, or not known yet, everything stays.
    owns && !asked && waypoint::check(world, key, gateway, spec).is_ok()
}

/// A ConfigMap that is the same in every namespace, where it is not yet.
fn config_map(world: &World, namespace: &Arc<str>, name: &str, data: &str, text: &str) -> Option<Apply> {
    let key = Key::new(Arc::clone(namespace), name);
    let current = config_maps(world, name).get(&key).and_then(|found| found.data.as_ref()?.get(data));
    if current.map(String::as_str) == Some(text) {
        return None;
    }
    let object = json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": &**namespace, "labels": {CONFIG_LABEL: "true"}},
        "data": {data: text},
    });
    Some(Apply { kind: AppliedKind::ConfigMap, key, object })
}

fn config_maps<'a>(world: &'a World, name: &str) -> &'a Table<ConfigMap> {
    if name == REVOCATION_CONFIG_MAP { &world.revocation_lists } else { &world.root_certs }
}

fn is_terminating(world: &World, namespace: &str) -> bool {
    world.namespace(namespace).is_none_or(|namespace| namespace.metadata.deletion_timestamp.is_some())
}

fn outdated(world: &World, kind: AppliedKind, key: Key, mut object: Value) -> Option<Apply> {
    let digest = format!("{:016x}", xxh64(object.to_string().as_bytes(), 0));
    let existing = kind.existing(world, &key);
    if existing.and_then(|meta| annotation(meta, APPLIED)) == Some(&digest) {
        return None;
    }
    object["metadata"]["annotations"][APPLIED] = digest.into();
    Some(Apply { kind, key, object })
}

/// What the last round could not apply, and why: said once, not each time that it is tried again.
#[derive(Debug, Default)]
pub struct Told(Mutex<BTreeMap<(&'static str, Key), String>>);

/// Applies them: all that there are to apply, so that what is not among them is not told any more.
pub async fn apply(client: &Client, objects: Vec<Apply>, told: &Told) -> Applied {
    let outcomes = stream::iter(objects).map(|apply| async {
        let outcome = apply_one(client, &apply).await;
        (apply, outcome)
    });
    let mut outcomes = std::pin::pin!(outcomes.buffer_unordered(CONCURRENCY));
    let mut applied = Applied::default();
    let mut failed = BTreeMap::new();
    while let Some((Apply { kind, key, .. }, outcome)) = outcomes.next().await {
        let Err(Failure { reason, lasts }) = outcome else { continue };
        let what = (kind.name(), key.clone());
        if lock(&told.0).get(&what) != Some(&reason) {
            tracing::warn!(kind = kind.name(), object = %key, %reason, "not applied");
        }
        failed.insert(what, reason.clone());
        applied.again = true;
        if lasts && matches!(kind, AppliedKind::Part(_)) {
            applied.obstacles.entry(key).or_insert(reason);
        }
    }
    *lock(&told.0) = failed;
    applied
}

/// Why an object was not applied.
struct Failure {
    /// As the Gateway's status says it.
    reason: String,
    /// Somebody has to do something about it. Else it may be gone before anybody reads of it.
    lasts: bool,
}

async fn apply_one(client: &Client, apply: &Apply) -> Result<(), Failure> {
    let Apply { kind, key, object } = apply;
    let (api, name) = (kind.api(client, &key.namespace), kind.name());
    let failed = |error: kube::Error| Failure {
        lasts: matches!(&error, kube::Error::Api(status) if (400..500).contains(&status.code) && !matches!(status.code, 408 | 409 | 429)),
        reason: format!("{name} {key} cannot be written: {error}"),
    };
    let current = match kind {
        // Asked, as those without our label are not watched.
        AppliedKind::Part(_) => api.get_metadata_opt(&key.name).await.map_err(failed)?,
        // Ours by its name, as everywhere in Istio.
        AppliedKind::ConfigMap => None,
        // Known not to be there.
        AppliedKind::GatewayClass => None,
    };
    if current.is_some_and(|current| !belongs(&current.metadata, &object["metadata"]["ownerReferences"][0]["uid"])) {
        let reason = format!("{name} {key} exists and is not this Gateway's: it is not taken over");
        return Err(Failure { reason, lasts: true });
    }
    let params = PatchParams::apply(FIELD_MANAGER);
    // A class that has come meanwhile is somebody's.
    let params = if *kind == AppliedKind::GatewayClass { params } else { params.force() };
    match (api.patch(&key.name, &params, &Patch::Apply(object)).await, kind) {
        (Ok(_), _) => tracing::info!(kind = name, object = %key, "applied"),
        // The namespace has gone or is going.
        (Err(kube::Error::Api(status)), AppliedKind::ConfigMap) if matches!(status.code, 403 | 404) => {
            tracing::debug!(object = %key, error = %status, "not written");
        }
        // It is there by now, or its definition has gone: the watch brings either.
        (Err(kube::Error::Api(status)), AppliedKind::GatewayClass) if matches!(status.code, 404 | 409) => {
            tracing::debug!(object = %key, error = %status, "not written");
        }
        (Err(error), _) => return Err(failed(error)),
    }
    Ok(())
}

/// Made for that Gateway, or for an earlier one of its name, by whatever controls the class.
fn belongs(meta: &ObjectMeta, gateway_uid: &Value) -> bool {
    let owned = meta.owner_references.iter().flatten().any(|owner| owner.uid == *gateway_uid);
    owned || label(meta, MANAGED_LABEL).is_some()
}

/// Deletes them. False: some could not be; try again.
pub async fn withdraw(client: &Client, withdrawn: Vec<Withdrawn>) -> bool {
    let outcomes = stream::iter(withdrawn).map(|one| withdraw_one(client, one)).buffer_unordered(CONCURRENCY);
    outcomes.fold(true, |all, one| std::future::ready(all && one)).await
}

async fn withdraw_one(client: &Client, Withdrawn { kind, key, uid }: Withdrawn) -> bool {
    let api = kind.api(client, &key.namespace);
    let params = DeleteParams {
        preconditions: Some(Preconditions { uid, ..Preconditions::default() }),
        ..DeleteParams::default()
    };
    match api.delete(&key.name, &params).await {
        Ok(_) => {
            tracing::info!(kind = kind.name(), object = %key, "deleted");
            true
        }
        // Gone, or another one by now.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => true,
        Err(error) => {
            tracing::warn!(kind = kind.name(), object = %key, error = %error, "not deleted");
            false
        }
    }
}

#[cfg(test)]
mod tests;
