//! What the control plane creates: the objects of each waypoint, and the root certificate in every namespace. By
//! server-side apply under our own field manager, so what users add (replicas, resources) stays theirs; written again
//! only when what we want changed or the object is gone. Deletion is left to ownerReferences.

mod waypoint;

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::{StreamExt, stream};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client};
use serde_json::{Value, json};
use xxhash_rust::xxh64::xxh64;

use crate::translate::binding::{MANAGED_LABEL, waypoints};
use crate::translate::gateway::refusal;
use crate::translate::world::World;
use crate::types::{Key, annotation, label};
use crate::watch::ROOT_CERT_CONFIG_MAP;

pub use waypoint::WaypointSettings;

pub const FIELD_MANAGER: &str = "istio.io/mesh-controller";
/// Digest of what we applied last, on the object itself.
const APPLIED: &str = "gateway.istio.io/applied";
const CONCURRENCY: usize = 8;

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
    ServiceAccount,
    Service,
    Deployment,
    ConfigMap,
}

impl AppliedKind {
    fn api_resource(self) -> ApiResource {
        let (group, kind, plural) = match self {
            Self::ServiceAccount => ("", "ServiceAccount", "serviceaccounts"),
            Self::Service => ("", "Service", "services"),
            Self::Deployment => ("apps", "Deployment", "deployments"),
            Self::ConfigMap => ("", "ConfigMap", "configmaps"),
        };
        ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, "v1", kind), plural)
    }

    fn existing<'a>(self, world: &'a World, key: &Key) -> Option<&'a ObjectMeta> {
        match self {
            Self::ServiceAccount => world.service_accounts.get(key).map(|object| &object.metadata),
            Self::Service => world.services.get(key).map(|object| &object.metadata),
            Self::Deployment => world.deployments.get(key).map(|object| &object.metadata),
            Self::ConfigMap => world.root_certs.get(key).map(|object| &object.metadata),
        }
    }
}

/// What is missing or out of date.
pub fn differences(world: &World, settings: &WaypointSettings, root_bundle_pem: &str) -> Vec<Apply> {
    let mut out = Vec::new();
    for (key, gateway) in waypoints(world) {
        let Ok(spec) = &gateway.spec else { continue };
        if refusal(key, spec).is_some()
            || gateway.meta.deletion_timestamp.is_some()
            || is_terminating(world, &key.namespace)
        {
            continue;
        }
        for (kind, object) in waypoint::objects(key, gateway, spec, settings) {
            out.extend(outdated(world, kind, key.clone(), object));
        }
    }
    for (key, _) in world.namespaces.iter().filter(|(key, _)| !is_terminating(world, &key.name)) {
        let object = json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": ROOT_CERT_CONFIG_MAP,
                "namespace": &*key.name,
                "labels": {"istio.io/config": "true"},
            },
            "data": {"root-cert.pem": root_bundle_pem},
        });
        let key = Key::new(Arc::clone(&key.name), ROOT_CERT_CONFIG_MAP);
        let current = world.root_certs.get(&key).and_then(|found| found.data.as_ref()?.get("root-cert.pem"));
        if current.map(String::as_str) != Some(root_bundle_pem) {
            out.push(Apply { kind: AppliedKind::ConfigMap, key, object });
        }
    }
    out
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

/// Applies them.
pub async fn apply(client: &Client, objects: Vec<Apply>) -> Applied {
    let outcomes = stream::iter(objects).map(|apply| async {
        let outcome = apply_one(client, &apply).await;
        (apply, outcome)
    });
    let mut outcomes = std::pin::pin!(outcomes.buffer_unordered(CONCURRENCY));
    let mut applied = Applied::default();
    while let Some((Apply { kind, key, .. }, outcome)) = outcomes.next().await {
        let Err(Failure { reason, lasts }) = outcome else { continue };
        tracing::warn!(?kind, object = %key, %reason, "not applied");
        applied.again = true;
        if lasts && kind != AppliedKind::ConfigMap {
            applied.obstacles.entry(key).or_insert(reason);
        }
    }
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
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), &key.namespace, &kind.api_resource());
    let failed = |error: kube::Error| Failure {
        lasts: matches!(&error, kube::Error::Api(status) if (400..500).contains(&status.code) && !matches!(status.code, 408 | 409 | 429)),
        reason: format!("{kind:?} {key} cannot be written: {error}"),
    };
    let current = match kind {
        // Ours by its name, as everywhere in Istio.
        AppliedKind::ConfigMap => None,
        // Asked, as those without our label are not watched.
        _ => api.get_metadata_opt(&key.name).await.map_err(failed)?,
    };
    if current.is_some_and(|current| !belongs(&current.metadata, &object["metadata"]["ownerReferences"][0]["uid"])) {
        let reason = format!("{kind:?} {key} exists and is not this Gateway's: it is not taken over");
        return Err(Failure { reason, lasts: true });
    }
    let params = PatchParams::apply(FIELD_MANAGER).force();
    match api.patch(&key.name, &params, &Patch::Apply(object)).await {
        Ok(_) => tracing::info!(?kind, object = %key, "applied"),
        // The namespace has gone or is going.
        Err(kube::Error::Api(status)) if matches!(status.code, 403 | 404) && *kind == AppliedKind::ConfigMap => {
            tracing::debug!(object = %key, error = %status, "root certificate not written");
        }
        Err(error) => return Err(failed(error)),
    }
    Ok(())
}

/// Made for that Gateway, or for an earlier one of its name, by whatever controls the class.
fn belongs(meta: &ObjectMeta, gateway_uid: &Value) -> bool {
    let owned = meta.owner_references.iter().flatten().any(|owner| owner.uid == *gateway_uid);
    owned || label(meta, MANAGED_LABEL).is_some()
}

#[cfg(test)]
mod tests;
