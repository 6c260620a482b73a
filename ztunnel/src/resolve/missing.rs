//! What a decision depends on and a snapshot does not hold, by the names the control plane answers to. Where all is sent
//! there is nothing to ask for; on demand it is asked for first, or the decision would take the unknown for foreign.

use std::net::IpAddr;

use mesh::model::{GatewayAddress, GatewayDestination, Service, Workload};
use mesh::store::Snapshot;

use super::gateway::{gateway_service, is_instance_of, named, waypoints_of, workload_at};

/// For a connection of `source` to the address `dst`.
pub fn for_outbound(world: &Snapshot, source: &Workload, dst: IpAddr) -> Vec<String> {
    let network = &*source.network;
    let workload = world.workload_by_ip(network, dst);
    // A range is no answer: an exact address, still unknown, would count before it.
    if workload.is_none() && world.services_by_vip(network, dst).next().is_none() {
        return vec![format!("{network}/{dst}")];
    }
    let mut missing = Vec::new();
    match (world.best_service_by_vip(network, dst, &source.namespace), workload) {
        (Some(service), _) => {
            for waypoint in waypoints_of(service) {
                gateway(world, source, waypoint, &mut missing);
            }
            gateways_of_endpoints(world, source, service, &mut missing);
        }
        (None, Some(workload)) => {
            let waypoint = workload.waypoint.as_ref().filter(|waypoint| !is_instance_of(world, source, waypoint));
            waypoint.into_iter().for_each(|waypoint| gateway(world, source, waypoint, &mut missing));
        }
        (None, None) => {}
    }
    missing
}

/// For what may be believed of those who connect to `local`: its services, their waypoints and its own.
pub fn for_inbound(world: &Snapshot, local: &Workload) -> Vec<String> {
    let mut missing = Vec::new();
    for key in local.services.keys() {
        match world.service(key) {
            Some(service) => waypoints_of(service).for_each(|waypoint| gateway(world, local, waypoint, &mut missing)),
            None => missing.push(key.to_string()),
        }
    }
    local.waypoint.iter().chain(&local.network_gateway).for_each(|named| gateway(world, local, named, &mut missing));
    missing
}

fn gateway(world: &Snapshot, source: &Workload, reference: &GatewayAddress, missing: &mut Vec<String>) {
    if let Some(service) = gateway_service(world, source, reference) {
        return gateways_of_endpoints(world, source, service, missing);
    }
    if workload_at(world, reference).or_else(|| named(world, reference)).is_none() {
        missing.push(match &reference.destination {
            GatewayDestination::Hostname(name) => name.to_string(),
            GatewayDestination::Address(address) => format!("{}/{}", address.network, address.address),
        });
    }
}

/// Endpoints of other networks are reached through gateways, which are reached directly.
fn gateways_of_endpoints(world: &Snapshot, source: &Workload, service: &Service, missing: &mut Vec<String>) {
    let key = service.key();
    let beyond = world.all_endpoints(&key).filter(|(workload, _)| workload.network != source.network);
    for reference in beyond.filter_map(|(workload, _)| workload.network_gateway.as_ref()) {
        let known = gateway_service(world, source, reference).is_some()
            || workload_at(world, reference).or_else(|| named(world, reference)).is_some();
        if !known {
            gateway(world, source, reference, missing);
        }
    }
}
