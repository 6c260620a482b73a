//! Writes what became of each object into its status. Only what differs is written, only our own conditions are
//! touched, and a write is refused by the API if the object has changed meanwhile: then the next pass sees the new one.

mod merge;

use std::sync::Arc;

use futures_util::{StreamExt, stream};
use kube::api::{DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::translate::verdict::{Kind, Verdict};
use crate::translate::world::World;
use crate::types::gateway::{GatewayClassSpec, GatewaySpec, HttpRouteSpec};
use crate::types::networking::{ServiceEntrySpec, WorkloadEntrySpec};
use crate::types::security::{AuthorizationPolicySpec, PeerAuthenticationSpec};
use crate::types::{CustomKind, Key, Object};

pub const FIELD_MANAGER: &str = "istiod-lite";
/// Writes under way at once.
const CONCURRENCY: usize = 16;

/// A status to write: the body of a merge patch.
#[derive(Debug, PartialEq)]
pub struct Write {
    pub kind: Kind,
    pub key: Key,
    pub body: Value,
}

/// What must be written so that every status says what its verdict says.
pub fn differences(world: &World, verdicts: &[Verdict], now: OffsetDateTime) -> Vec<Write> {
    let now = now.replace_nanosecond(0).unwrap_or(now).format(&Rfc3339).unwrap_or_default();
    verdicts
        .iter()
        .filter_map(|verdict| {
            let (status, version) = current(world, verdict.kind, &verdict.key)?;
            let status = merge::status(&status, &verdict.report, verdict.generation, &now)?;
            let body = json!({"metadata": {"resourceVersion": version}, "status": status});
            Some(Write { kind: verdict.kind, key: verdict.key.clone(), body })
        })
        .collect()
}

/// Carries out `writes`. False: some failed for a reason that will not bring a watch event, so try again.
pub async fn write(client: &Client, writes: Vec<Write>) -> bool {
    let outcomes = stream::iter(writes).map(|write| patch(client, write)).buffer_unordered(CONCURRENCY);
    outcomes.fold(true, |all, one| std::future::ready(all && one)).await
}

async fn patch(client: &Client, write: Write) -> bool {
    let resource = api_resource(write.kind);
    let api: Api<DynamicObject> = match write.key.namespace.is_empty() {
        true => Api::all_with(client.clone(), &resource),
        false => Api::namespaced_with(client.clone(), &write.key.namespace, &resource),
    };
    let params = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
    match api.patch_status(&write.key.name, &params, &Patch::Merge(&write.body)).await {
        Ok(_) => true,
        // Changed or deleted meanwhile; the watch brings the news.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => true,
        Err(error) => {
            tracing::warn!(kind = ?write.kind, object = %write.key, error = %error, "status not written");
            false
        }
    }
}

/// The status and resource version we know of.
fn current(world: &World, kind: Kind, key: &Key) -> Option<(Value, String)> {
    fn custom<S>(object: Option<&Arc<Object<S>>>) -> Option<(Value, String)> {
        let object = object?;
        Some((object.status.clone(), object.meta.resource_version.clone().unwrap_or_default()))
    }
    match kind {
        Kind::Service => {
            let service = world.services.get(key)?;
            let status = serde_json::to_value(service.status.as_ref()).unwrap_or_default();
            Some((status, service.metadata.resource_version.clone().unwrap_or_default()))
        }
        Kind::GatewayClass => custom(world.gateway_classes.get(key)),
        Kind::Gateway => custom(world.gateways.get(key)),
        Kind::HttpRoute => custom(world.http_routes.get(key)),
        Kind::AuthorizationPolicy => custom(world.authorization_policies.get(key)),
        Kind::PeerAuthentication => custom(world.peer_authentications.get(key)),
        Kind::ServiceEntry => custom(world.service_entries.get(key)),
        Kind::WorkloadEntry => custom(world.workload_entries.get(key)),
    }
}

fn api_resource(kind: Kind) -> ApiResource {
    match kind {
        Kind::Service => ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("", "v1", "Service"), "services"),
        Kind::GatewayClass => GatewayClassSpec::api_resource(),
        Kind::Gateway => GatewaySpec::api_resource(),
        Kind::HttpRoute => HttpRouteSpec::api_resource(),
        Kind::AuthorizationPolicy => AuthorizationPolicySpec::api_resource(),
        Kind::PeerAuthentication => PeerAuthenticationSpec::api_resource(),
        Kind::ServiceEntry => ServiceEntrySpec::api_resource(),
        Kind::WorkloadEntry => WorkloadEntrySpec::api_resource(),
    }
}
