//! L7 policy that cannot be walked around. Where a policy attached by targetRefs reaches a workload's port, the node
//! proxy of the destination is told to deny what did not come from the waypoint. It is ordinary authorization on the
//! waypoint's identity, so other implementations of the node proxy enforce it too. Routes and mere binding close nothing.

use std::collections::{BTreeMap, BTreeSet};

use mesh_proto::security::{Action, Authorization, Clause, Group, Match, Scope, StringMatch, string_match};

use super::binding::Binding;
use super::http_policy::Reach;
use super::world::World;
use crate::types::Key;

/// The ports of one workload that only waypoints may reach: port (0 = all) → the waypoints that may.
type Guarded = BTreeMap<u32, BTreeSet<Key>>;

/// The authorizations generated for a workload.
pub fn for_workload(
    world: &World,
    namespace: &str,
    workload: &Binding,
    services: &BTreeMap<String, mesh_proto::workload::PortList>,
    service_bindings: &BTreeMap<String, (&Key, &Binding)>,
    reach: &Reach,
) -> Vec<Authorization> {
    let mut guarded = Guarded::new();
    for (name, ports) in services {
        let Some((service, binding)) = service_bindings.get(name) else { continue };
        // A policy of one of them is to hold for all of the traffic; the other is behind the same label.
        if reach.services.contains(*service) || binding.waypoints().any(|waypoint| reach.covers(waypoint)) {
            for port in &ports.ports {
                guarded.entry(port.target_port).or_default().extend(binding.waypoints().cloned());
            }
        }
    }
    if let Some(waypoint) = workload.waypoint.as_ref().filter(|waypoint| reach.covers(waypoint)) {
        // Addressed directly, every port of the workload is behind its waypoint; those above keep theirs as well.
        guarded.values_mut().for_each(|waypoints| _ = waypoints.insert(waypoint.clone()));
        guarded.entry(0).or_default().insert(waypoint.clone());
    }
    // One authorization for each set of waypoints, so that workloads alike share it.
    let mut by_waypoints: BTreeMap<BTreeSet<Key>, Vec<u32>> = BTreeMap::new();
    let declared: Vec<u32> = guarded.keys().copied().filter(|port| *port != 0).collect();
    for (port, waypoints) in guarded {
        by_waypoints.entry(waypoints).or_default().push(port);
    }
    by_waypoints
        .into_iter()
        .map(|(waypoints, ports)| authorization(world, namespace, &waypoints, &ports, &declared))
        .collect()
}

fn authorization(
    world: &World,
    namespace: &str,
    waypoints: &BTreeSet<Key>,
    ports: &[u32],
    declared: &[u32],
) -> Authorization {
    let all_ports = ports.contains(&0);
    let scope = match all_ports {
        // All ports apart from those that have an authorization of their own.
        true => Match {
            not_destination_ports: declared.iter().copied().filter(|port| !ports.contains(port)).collect(),
            ..Match::default()
        },
        false => Match { destination_ports: ports.to_vec(), ..Match::default() },
    };
    let waypoint_names: Vec<String> = waypoints.iter().map(|key| format!("{}_{}", key.namespace, key.name)).collect();
    let port_names: Vec<String> = match all_ports {
        true => std::iter::once("all".to_owned())
            .chain(scope.not_destination_ports.iter().map(|port| format!("not{port}")))
            .collect(),
        false => ports.iter().map(ToString::to_string).collect(),
    };
    let not_a_waypoint = Match {
        not_principals: waypoints
            .iter()
            .map(|waypoint| StringMatch {
                match_type: Some(string_match::MatchType::Exact(world.principal(&waypoint.namespace, &waypoint.name))),
            })
            .collect(),
        ..Match::default()
    };
    let mut rules = vec![Clause { matches: vec![not_a_waypoint] }];
    if scope != Match::default() {
        rules.push(Clause { matches: vec![scope] });
    }
    Authorization {
        name: format!("istio_only_waypoint_{}_{}", waypoint_names.join("_"), port_names.join("_")),
        namespace: namespace.to_owned(),
        scope: Scope::WorkloadSelector.into(),
        action: Action::Deny.into(),
        groups: vec![Group { rules }],
        dry_run: false,
    }
}
