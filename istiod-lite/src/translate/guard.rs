//! L7 policy that cannot be walked around. Where a policy attached by targetRefs reaches a workload's port, the node
//! proxy of the destination is told to deny what did not come from the waypoint. It is ordinary authorization on the
//! waypoint's identity, so other implementations of the node proxy enforce it too. Routes and mere binding close nothing.

use std::collections::{BTreeMap, BTreeSet};

use mesh_proto::security::{Action, Authorization, Clause, Group, Match, Scope, StringMatch, string_match};
use xxhash_rust::xxh64::xxh64;

use super::binding::{Binding, Bindings};
use super::http_policy::Reach;
use super::world::World;
use crate::types::Key;

/// The ports of one workload that only waypoints may reach: port (0 = all) → the waypoints that may.
type Guarded = BTreeMap<u32, BTreeSet<Key>>;

/// Of the ports in a name, in bytes. All workloads that it is for repeat it; ports that are many are told apart by a hash.
const LONGEST_PORTS: usize = 256;

/// The authorizations generated for a workload.
pub fn for_workload(
    world: &World,
    namespace: &str,
    workload: &Binding,
    services: &BTreeMap<String, mesh_proto::workload::PortList>,
    service_bindings: &Bindings<'_>,
    reach: &Reach,
) -> Vec<Authorization> {
    let mut guarded = Guarded::new();
    for (name, ports) in services {
        let Some((service, binding)) = service_bindings.get(name) else { continue };
        // A policy of one of them is to hold for all of the traffic; the other is behind the same label.
        if reach.services.contains(&service) || binding.waypoints().any(|waypoint| reach.covers(waypoint)) {
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
            // Both are sorted, and may be all there are.
            not_destination_ports: declared.iter().copied().filter(|port| ports.binary_search(port).is_err()).collect(),
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
    let port_names = match port_names.join("_") {
        long if long.len() > LONGEST_PORTS => format!("{}ports_{:016x}", port_names.len(), xxh64(long.as_bytes(), 0)),
        short => short,
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
        name: format!("istio_only_waypoint_{}_{}", waypoint_names.join("_"), port_names),
        namespace: namespace.to_owned(),
        scope: Scope::WorkloadSelector.into(),
        action: Action::Deny.into(),
        groups: vec![Group { rules }],
        dry_run: false,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::time::{Duration, Instant};

    use mesh_proto::workload::{Port, PortList};

    use super::*;

    #[test]
    fn the_ports_of_a_workload_may_be_all_that_there_are() {
        let (service, waypoint) = (Key::new("shop", "web"), Key::new("shop", "wp"));
        let binding = Binding { address: None, waypoint: Some(waypoint.clone()), canary: None, condition: None };
        let port = |number| Port { service_port: number, target_port: number, ..Port::default() };
        let services = BTreeMap::from([("web".to_owned(), PortList { ports: (1..=65535).map(port).collect() })]);
        let hosts = HashMap::from([("web".to_owned(), (service.clone(), binding.clone()))]);
        let (world, none) = (World::default(), BTreeMap::new());
        let bindings = Bindings::new(&world, &none, &hosts);
        let reach =
            Reach { services: BTreeSet::from([service]), waypoints: BTreeSet::from([waypoint]), ..Reach::default() };
        let start = Instant::now();
        let made = |workload: &Binding| for_workload(&World::default(), "shop", workload, &services, &bindings, &reach);
        let none = Binding { waypoint: None, ..binding.clone() };
        let [behind_service] = &made(&none)[..] else { panic!("one for all of them") };
        assert!(behind_service.name.starts_with("istio_only_waypoint_shop_wp_65535ports_"), "{}", behind_service.name);
        assert!(behind_service.name.len() < LONGEST_PORTS);
        let [behind_both] = &made(&binding)[..] else { panic!("one for all of them") };
        assert_eq!(behind_both.name, "istio_only_waypoint_shop_wp_all");
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    }
}
