//! One object by itself: the translation of a world that has it and what it speaks of, and nothing else.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::Value;

use super::{request_authentication, route};
use crate::revision::LABEL;
use crate::translate::binding::is_waypoint;
use crate::translate::owner::{Owners, tag_services};
use crate::translate::verdict::{Fault, Kind, Status, Verdict, Wanted};
use crate::translate::world::World;
use crate::translate::{documents, translate};
use crate::types::gateway::GatewaySpec;
use crate::types::{Key, Object, security};

/// Says what runs, not what was written.
const RUNTIME: &str = "Programmed";
/// Reasons for which no Gateway of ours is ever deployed, and how to mend what they speak of.
const NEVER_DEPLOYED: &[(&str, &str)] = &[
    ("Invalid", "write one of another name"),
    ("ListenersNotValid", "write `protocol: HBONE` and `port: 15008` for one listener"),
];

/// What an object is worth.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Judgement {
    /// What of it can never work.
    pub faults: Vec<Fault>,
    /// What of it is not done for now.
    pub notes: Vec<String>,
}

/// `object` has its name and namespace. What is not ours to judge is in order.
pub fn judge(world: &World, object: Value) -> Judgement {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (kind, namespace) = (text(&object["kind"]), text(&object["metadata"]["namespace"]));
    let key = Key::new(namespace, text(&object["metadata"]["name"]));
    let version = object["apiVersion"].as_str().and_then(|version| version.strip_prefix(security::GROUP));
    if kind == request_authentication::KIND && version.is_some_and(|rest| rest.starts_with('/')) {
        return request_authentication::judge(&object, &world.mesh);
    }
    let mut around = around(world, &object, &key.namespace);
    let of_route = route::faults(&object);
    if documents::add(&mut around, object) != Ok(true) {
        return Judgement::default();
    }
    let verdicts = translate(&around).verdicts;
    let Some(verdict) = verdicts.into_iter().find(|verdict| verdict.kind.name() == kind && verdict.key == key) else {
        let notes =
            around.gateways.get(&key).filter(|_| kind == Kind::Gateway.name()).and_then(|it| of_nobody(world, it));
        return Judgement { faults: Vec::new(), notes: notes.into_iter().collect() };
    };
    let faults = match verdict.kind {
        Kind::HttpRoute => of_route,
        Kind::Gateway => of_gateway(&verdict),
        _ => verdict.report.conditions().into_iter().flat_map(|wanted| wanted.faults.clone()).collect(),
    };
    let bad = verdict.report.conditions().into_iter().filter(|wanted| wanted.r#type != RUNTIME && wanted.is_bad());
    // Several parents or listeners may have the same to say.
    let mut told = BTreeSet::new();
    let notes = bad.map(|wanted| wanted.message.clone()).filter(|message| told.insert(message.clone())).collect();
    // What is a fault is said as one.
    Judgement { notes: if faults.is_empty() { notes } else { Vec::new() }, faults }
}

/// What of `world` an object may speak of: the rest costs time and changes nothing.
fn around(world: &World, object: &Value, namespace: &str) -> World {
    let mut around = World {
        mesh: Arc::clone(&world.mesh),
        mesh_config: world.mesh_config.clone(),
        namespaces: world.namespaces.clone(),
        gateway_classes: world.gateway_classes.clone(),
        gateways: world.gateways.clone(),
        ..World::default()
    };
    for (key, _) in tag_services(world) {
        if let Some(service) = world.services.get(key) {
            around.services.insert(key.clone(), service.clone());
        }
    }
    let mut named = BTreeSet::new();
    references(&object["spec"], namespace, &mut named);
    for key in named {
        if let Some(service) = world.services.get(&key) {
            around.services.insert(key.clone(), service.clone());
        }
        if let Some(entry) = world.service_entries.get(&key) {
            around.service_entries.insert(key, entry.clone());
        }
    }
    around
}

/// Whatever has a name may be an object.
fn references(value: &Value, own: &str, out: &mut BTreeSet<Key>) {
    match value {
        Value::Object(fields) => {
            if let Some(name) = fields.get("name").and_then(Value::as_str) {
                let namespace = fields.get("namespace").and_then(Value::as_str).unwrap_or(own);
                out.insert(Key::new(namespace, name));
            }
            fields.values().for_each(|value| references(value, own, out));
        }
        Value::Array(values) => values.iter().for_each(|value| references(value, own, out)),
        _ => {}
    }
}

/// A waypoint that no control plane is there to deploy. The default revision says so, as it is asked about every one.
fn of_nobody(world: &World, gateway: &Object<GatewaySpec>) -> Option<String> {
    let owners = Owners::of(world);
    let revision = owners.revision(&gateway.meta);
    let is_told = is_waypoint(world, gateway) && world.mesh.revision.is_default() && !owners.is_installed(revision);
    is_told.then(|| {
        format!("{LABEL}: nothing is deployed before there is a control plane of revision {revision} (Service istiod-{revision})")
    })
}

fn of_gateway(verdict: &Verdict) -> Vec<Fault> {
    let refused = |wanted: &&Wanted| wanted.r#type == "Accepted" && wanted.status == Status::False;
    let conditions = verdict.report.conditions();
    let faults = conditions.into_iter().filter(refused).filter_map(|wanted| {
        let (_, mend) = NEVER_DEPLOYED.iter().find(|(reason, _)| *reason == wanted.reason)?;
        Some(Fault::of(&wanted.message, mend))
    });
    faults.collect()
}
