//! Objects as files have them, put into a [`World`].

use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::mesh_config::MeshConfig;
use super::parameters::{DEFAULTS_FOR, Parameters};
use super::world::{Table, World};
use crate::types::{CustomKind, Held, Key, Node, Object, Pod, Service, Slice, gateway, label, networking, security};

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
        "Namespace" => ("", |world, object| {
            core(&mut world.namespaces, object)?;
            world.find_hidden();
            Ok(())
        }),
        "Node" => ("", |world, object| {
            let node = Node::new(decoded(object)?);
            world.nodes.insert(node.key.clone(), Held::new(node));
            Ok(())
        }),
        "Pod" => ("", |world, object| {
            let pod = Pod::new(decoded(object)?);
            world.pods.insert(pod.key.clone(), Held::new(pod));
            Ok(())
        }),
        "Service" => ("", |world, object| {
            let service = Service::new(decoded(object)?);
            world.services.insert(service.key.clone(), Held::new(service));
            Ok(())
        }),
        "EndpointSlice" => ("discovery.k8s.io", |world, object| {
            let slice = Slice::new(decoded(object)?);
            world.endpoint_slices.insert(slice.key.clone(), Held::new(slice));
            Ok(())
        }),
        "Deployment" => ("apps", |world, object| core(&mut world.deployments, object)),
        "ConfigMap" => ("", parameters),
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

fn decoded<T: DeserializeOwned>(object: Value) -> Result<T, String> {
    serde_json::from_value(object).map_err(|error| error.to_string())
}

/// As MeshConfig, or as parameters of waypoints: nothing else of a ConfigMap is looked at.
fn parameters(world: &mut World, object: Value) -> Result<(), String> {
    let found: ConfigMap = decoded(object)?;
    let key = Key::of(&found.metadata);
    if MeshConfig::is_in(&key, &world.mesh) {
        world.mesh_config = world.mesh_config.after(Some(&found), &world.mesh);
        world.find_hidden();
    }
    let has_defaults = *key.namespace == *world.mesh.root_namespace && label(&found.metadata, DEFAULTS_FOR).is_some();
    let read = Held::new(Parameters::read(found));
    match has_defaults {
        true => _ = world.class_defaults.insert(key.clone(), read.clone()),
        false => _ = world.class_defaults.remove(&key),
    }
    world.parameters.insert(key, read);
    Ok(())
}

fn core<T: DeserializeOwned>(table: &mut Table<T>, object: Value) -> Result<(), String> {
    let meta: ObjectMeta = decoded(object["metadata"].clone())?;
    table.insert(Key::of(&meta), Held::new(decoded(object)?));
    Ok(())
}

fn custom<S: CustomKind>(table: &mut Table<Object<S>>, object: Value) -> Result<(), String> {
    let object = Object::from_dynamic(decoded(object)?);
    table.insert(object.key(), Held::new(object));
    Ok(())
}
