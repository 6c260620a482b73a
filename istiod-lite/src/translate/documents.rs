//! Objects as files have them, put into a [`World`].

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::world::{Table, World};
use crate::types::{CustomKind, Key, Object, gateway, networking, security};

/// Puts an object of one kind where it belongs.
type Put = fn(&mut World, Value) -> Result<(), String>;

/// Puts one object where it belongs. False: it is of a kind that is not looked at.
///
/// # Errors
/// What it lacks to be one of its kind.
pub fn add(world: &mut World, object: Value) -> Result<bool, String> {
    // Other groups have Gateways, too.
    let is_of = |group: &str| match object["apiVersion"].as_str() {
        Some(version) => version.rsplit_once('/').map_or("", |(group, _)| group) == group,
        None => true,
    };
    let (group, put): (&str, Put) = match object["kind"].as_str().unwrap_or_default() {
        "Namespace" => ("", |world, object| core(&mut world.namespaces, object)),
        "Node" => ("", |world, object| core(&mut world.nodes, object)),
        "Pod" => ("", |world, object| core(&mut world.pods, object)),
        "Service" => ("", |world, object| core(&mut world.services, object)),
        "EndpointSlice" => ("discovery.k8s.io", |world, object| core(&mut world.endpoint_slices, object)),
        "Deployment" => ("apps", |world, object| core(&mut world.deployments, object)),
        "GatewayClass" => (gateway::GROUP, |world, object| custom(&mut world.gateway_classes, object)),
        "Gateway" => (gateway::GROUP, |world, object| custom(&mut world.gateways, object)),
        "HTTPRoute" => (gateway::GROUP, |world, object| custom(&mut world.http_routes, object)),
        "AuthorizationPolicy" => (security::GROUP, |world, object| custom(&mut world.authorization_policies, object)),
        "PeerAuthentication" => (security::GROUP, |world, object| custom(&mut world.peer_authentications, object)),
        "ServiceEntry" => (networking::GROUP, |world, object| custom(&mut world.service_entries, object)),
        "WorkloadEntry" => (networking::GROUP, |world, object| custom(&mut world.workload_entries, object)),
        _ => return Ok(false),
    };
    if !is_of(group) {
        return Ok(false);
    }
    put(world, object).map(|()| true)
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
