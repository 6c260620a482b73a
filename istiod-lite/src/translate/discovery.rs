//! The namespaces that MeshConfig's `discoverySelectors` leave: the others are as if they were not there, but for pods
//! of theirs that are still to leave the mesh.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::world::{Table, World, differing, in_namespace};
use crate::enrol::REDIRECTION;
use crate::types::{Held, Key, Pod, annotation};

/// Keeps the part of the world that is looked at, at the cost of what changes.
#[derive(Debug, Default)]
pub struct Discovery {
    /// What it was made of last; `None` while everything is looked at.
    last: Option<(World, World)>,
}

impl Discovery {
    /// The part of `world` that is looked at.
    pub fn of(&mut self, world: World) -> World {
        if world.hidden.is_empty() {
            self.last = None;
            return world;
        }
        let (old, part) = self.last.take().unwrap_or_default();
        let part = narrowed(&old, &world, part);
        self.last = Some((world, part.clone()));
        part
    }
}

/// The same for a world seen once.
pub fn once(world: World) -> World {
    Discovery::default().of(world)
}

fn narrowed(old: &World, world: &World, part: World) -> World {
    let moved: Vec<&Arc<str>> = old.hidden.symmetric_difference(&world.hidden).collect();
    let cut = Cut { hidden: &world.hidden, moved: &moved };
    let mut namespaces = part.namespaces;
    let names = differing(&old.namespaces, &world.namespaces).map(|(key, _, _)| key.clone());
    for key in names.chain(moved.iter().map(|name| Key::new("", Arc::clone(name)))) {
        let found = world.namespaces.get(&key).filter(|_| !world.hidden.contains(&key.name));
        put(&mut namespaces, &key, found.cloned());
    }
    let leaves = |pod: &Pod| {
        annotation(pod, REDIRECTION).is_some() || pod.uid.as_deref().is_some_and(|uid| world.leaving.contains(uid))
    };
    let mut pods = cut.apply(&old.pods, &world.pods, part.pods, leaves);
    // Those that have left differ in nothing but that.
    if old.leaving != world.leaving {
        for (key, pod) in world.hidden.iter().flat_map(|namespace| in_namespace(&world.pods, namespace)) {
            if pod.uid.as_ref().is_some_and(|uid| old.leaving.contains(&**uid) != world.leaving.contains(&**uid)) {
                put(&mut pods, key, world.pods.get(key).filter(|_| leaves(pod)).cloned());
            }
        }
    }
    World {
        mesh: Arc::clone(&world.mesh),
        mesh_config: world.mesh_config.clone(),
        hidden: Arc::clone(&world.hidden),
        namespaces,
        nodes: world.nodes.clone(),
        pods,
        services: cut.all(&old.services, &world.services, part.services),
        endpoint_slices: cut.all(&old.endpoint_slices, &world.endpoint_slices, part.endpoint_slices),
        gateway_classes: world.gateway_classes.clone(),
        gateways: cut.all(&old.gateways, &world.gateways, part.gateways),
        http_routes: cut.all(&old.http_routes, &world.http_routes, part.http_routes),
        authorization_policies: cut.all(
            &old.authorization_policies,
            &world.authorization_policies,
            part.authorization_policies,
        ),
        peer_authentications: cut.all(
            &old.peer_authentications,
            &world.peer_authentications,
            part.peer_authentications,
        ),
        service_entries: cut.all(&old.service_entries, &world.service_entries, part.service_entries),
        workload_entries: cut.all(&old.workload_entries, &world.workload_entries, part.workload_entries),
        deployments: cut.all(&old.deployments, &world.deployments, part.deployments),
        service_accounts: cut.all(&old.service_accounts, &world.service_accounts, part.service_accounts),
        autoscalers: cut.all(&old.autoscalers, &world.autoscalers, part.autoscalers),
        disruption_budgets: cut.all(&old.disruption_budgets, &world.disruption_budgets, part.disruption_budgets),
        parameters: cut.all(&old.parameters, &world.parameters, part.parameters),
        class_defaults: cut.all(&old.class_defaults, &world.class_defaults, part.class_defaults),
        root_certs: cut.all(&old.root_certs, &world.root_certs, part.root_certs),
        revocation_lists: cut.all(&old.revocation_lists, &world.revocation_lists, part.revocation_lists),
        leaving: Arc::clone(&world.leaving),
        epochs: world.epochs.clone(),
        not_installed: Arc::clone(&world.not_installed),
        obstacles: Arc::clone(&world.obstacles),
    }
}

struct Cut<'a> {
    hidden: &'a BTreeSet<Arc<str>>,
    /// Namespaces that are hidden now and were not, or the other way round.
    moved: &'a [&'a Arc<str>],
}

impl Cut<'_> {
    /// What of `new` is looked at, from `part`, which is what was of `old`.
    fn apply<T>(&self, old: &Table<T>, new: &Table<T>, mut part: Table<T>, keeps: impl Fn(&T) -> bool) -> Table<T> {
        let changed = differing(old, new).map(|(key, _, _)| key);
        let moved = self.moved.iter().flat_map(|namespace| in_namespace(new, namespace).map(|(key, _)| key));
        for key in changed.chain(moved) {
            let found = new.get(key).filter(|found| !self.hidden.contains(&key.namespace) || keeps(found));
            put(&mut part, key, found.cloned());
        }
        part
    }

    fn all<T>(&self, old: &Table<T>, new: &Table<T>, part: Table<T>) -> Table<T> {
        self.apply(old, new, part, |_| false)
    }
}

fn put<T>(table: &mut Table<T>, key: &Key, object: Option<Held<T>>) {
    match object {
        Some(object) => _ = table.insert(key.clone(), object),
        None => _ = table.remove(key),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::enrol::rules;
    use crate::translate::fixture;

    const NAMESPACES: &str = "
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data: {mesh: 'discoverySelectors: [{matchLabels: {mesh: \"yes\"}}]'}
---
kind: Namespace
metadata: {name: in, labels: {mesh: 'yes', istio.io/dataplane-mode: ambient}}
---
kind: Namespace
metadata: {name: out, labels: {istio.io/dataplane-mode: ambient}}
---
";

    fn pod(namespace: &str, name: &str, annotations: &str) -> String {
        format!(
            "kind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, uid: {name}, annotations: {{{annotations}}}}}\n\
             spec: {{nodeName: n1, containers: []}}\nstatus: {{phase: Running, podIP: 10.0.0.1}}\n---\n"
        )
    }

    fn names<T>(table: &Table<T>) -> Vec<String> {
        table.keys().map(ToString::to_string).collect()
    }

    #[test]
    fn what_is_in_a_namespace_that_no_selector_selects_is_not_there() {
        let service = "kind: Service\nmetadata: {name: s, namespace: out}\nspec: {clusterIP: 10.96.0.1}\n";
        let text = NAMESPACES.to_owned() + &pod("in", "a", "") + &pod("out", "b", "") + service;
        let world = once(fixture::world(&text));
        assert_eq!(names(&world.namespaces), ["in"]);
        assert_eq!(names(&world.pods), ["in/a"]);
        assert!(world.services.is_empty());
    }

    #[test]
    fn a_pod_stays_until_it_has_left() {
        let text = NAMESPACES.to_owned() + &pod("out", "b", "ambient.istio.io/redirection: enabled");
        let annotated = fixture::world(&text);
        let mut discovery = Discovery::default();
        assert_eq!(names(&discovery.of(annotated).pods), ["out/b"]);
        let mut bare = fixture::world(&(NAMESPACES.to_owned() + &pod("out", "b", "")));
        bare.leaving = Arc::new(["b".to_owned()].into());
        let leaving = discovery.of(bare.clone());
        assert_eq!(names(&leaving.pods), ["out/b"]);
        let judged = rules::judge(&leaving, leaving.pods.values().next().expect("it"));
        assert_eq!(judged, Err(rules::Outside::NotDiscovered));
        bare.leaving = Arc::default();
        assert!(discovery.of(bare).pods.is_empty());
    }
}
