//! Worlds from YAML, as users write it, for tests and for fuzzing.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::world::{Table, World};
use crate::types::{CustomKind, Key, Object};

/// Every document of `yaml`; panics on what it does not know, naming it.
#[cfg(test)]
pub(crate) fn world(yaml: &str) -> World {
    let mut world = World::default();
    for document in yaml.split("\n---\n").filter(|document| !document.trim().is_empty()) {
        let object: Value = serde_saphyr::from_str(document).unwrap_or_else(|error| panic!("{error}\n{document}"));
        add(&mut world, object).unwrap_or_else(|error| panic!("{error}\n{document}"));
    }
    world
}

/// Puts one object where it belongs, or says why it belongs nowhere.
pub fn add(world: &mut World, object: Value) -> Result<(), String> {
    match object["kind"].as_str().unwrap_or_default() {
        "Namespace" => core(&mut world.namespaces, object),
        "Node" => core(&mut world.nodes, object),
        "Pod" => core(&mut world.pods, object),
        "Service" => core(&mut world.services, object),
        "EndpointSlice" => core(&mut world.endpoint_slices, object),
        "Deployment" => core(&mut world.deployments, object),
        "GatewayClass" => custom(&mut world.gateway_classes, object),
        "Gateway" => custom(&mut world.gateways, object),
        "HTTPRoute" => custom(&mut world.http_routes, object),
        "AuthorizationPolicy" => custom(&mut world.authorization_policies, object),
        "PeerAuthentication" => custom(&mut world.peer_authentications, object),
        "ServiceEntry" => custom(&mut world.service_entries, object),
        "WorkloadEntry" => custom(&mut world.workload_entries, object),
        other => Err(format!("no table for {other:?}")),
    }
}

fn core<T: DeserializeOwned>(table: &mut Table<T>, object: Value) -> Result<(), String> {
    let meta: ObjectMeta = serde_json::from_value(object["metadata"].clone()).map_err(|error| error.to_string())?;
    let object: T = serde_json::from_value(object).map_err(|error| error.to_string())?;
    Arc::make_mut(table).insert(Key::of(&meta), Arc::new(object));
    Ok(())
}

fn custom<S: CustomKind>(table: &mut Table<Object<S>>, object: Value) -> Result<(), String> {
    let object = Object::from_dynamic(serde_json::from_value(object).map_err(|error| error.to_string())?);
    Arc::make_mut(table).insert(object.key(), Arc::new(object));
    Ok(())
}
