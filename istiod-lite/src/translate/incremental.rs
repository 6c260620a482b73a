//! Translation of what a change touches.
//!
//! Of one world and the next it is known at the cost of the difference which objects differ. From there:
//!
//! - a **pod** is translated again when it, its namespace, its node's locality, a Service or ServiceEntry that selects it
//!   (or did), a slice that names it, a policy that may select it, or a waypoint that it could be bound to has changed;
//! - a pod of another network also when a Gateway that leads there has;
//! - a **Service** when it, its namespace, a slice of one without selector, a waypoint that it could be bound to, or a
//!   workload of its namespace that is on another network has;
//! - **everything else** (policies, entries, routes, Gateways: what users write by hand, and what knows of one another)
//!   as a whole, when any of it has, a Service or a namespace; pods coming and going leave it alone.
//!
//! What came of an object is remembered by name, so that it is withdrawn when the object goes or comes to something else. Of
//! a pod it is not: what it came to follows from the world before (`names_of`), so whatever that reads has to make pods stale.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use imbl::ordmap::DiffItem;
use mesh_proto::enrolment::POD_ENROLMENT_TYPE;
use mesh_proto::workload::ADDRESS_TYPE;

use super::binding::{self, Binding, Bindings, TrafficType, USE_WAYPOINT};
use super::lookups::{Lookups, service_of};
use super::networks::{self, NETWORK, Networks};
use super::owner::{self, Owners};
use super::service_entry::{self, Entries, EntrySelectors};
use super::verdict::Verdict;
use super::world::{View, World, differing, in_namespace};
use super::{Policies, Selecting, Translation, authorization_resource, gateway, guard, peer_authentication, workload};
use super::{enrolment, policies, routes, service, service_verdict, workload_entry};
use crate::resources::Resource;
use crate::types::{Key, Labels, Pod, Service, Slice, label};

/// Type and name of a resource.
pub type Named = (&'static str, Arc<str>);

/// What a step of [`Translator`] led to.
#[derive(Debug, Default)]
pub struct Changes {
    /// Those that are new or may have changed; of each name one.
    pub resources: Vec<Resource>,
    /// Those that are no more.
    pub removed: Vec<Named>,
    /// All of them, the same while none can have changed.
    pub verdicts: Arc<[Verdict]>,
    /// The pods that were looked at again, those that are gone included.
    pub pods: BTreeSet<Key>,
}

/// Remembers the last world and what came of it.
#[derive(Debug, Default)]
pub struct Translator {
    world: World,
    started: bool,
    lookups: Lookups,
    services: BTreeMap<Key, ServiceUnit>,
    bindings: BTreeMap<Key, Binding>,
    /// The bindings of ServiceEntries' hosts, by xDS name.
    hosts: HashMap<String, (Key, Binding)>,
    policies: Policies,
    entries: EntrySelectors,
    /// The xDS names of the entries' hosts.
    entry_names: BTreeSet<String>,
    /// The single addresses that users wrote into entries.
    written: HashSet<IpAddr>,
    networks: Networks,
    /// What came of everything but Services and pods.
    rest: BTreeSet<Named>,
    rest_guards: Vec<Arc<str>>,
    /// The generated authorizations that a pod's workload carries, where there are any. What else comes of a pod follows from
    /// the world it came of: there are too many to remember it of each.
    guarded: HashMap<Key, Box<[Arc<str>]>>,
    /// How many workloads carry each of the generated authorizations.
    guards: HashMap<Arc<str>, usize>,
    verdicts: Arc<[Verdict]>,
}

#[derive(Debug)]
struct ServiceUnit {
    names: Vec<Named>,
    /// `None`: there is nothing to say of it, nor was there.
    verdict: Option<Box<Verdict>>,
}

/// What a step emits, by name: a later one of the same name counts.
#[derive(Debug, Default)]
struct Emitted {
    resources: BTreeMap<Named, Resource>,
    gone: Vec<Named>,
}

impl Emitted {
    fn add(&mut self, resource: Resource) -> Named {
        let name = (resource.type_url(), Arc::clone(&resource.name));
        self.resources.insert(name.clone(), resource);
        name
    }

    fn add_all(&mut self, resources: impl IntoIterator<Item = Resource>) -> Vec<Named> {
        resources.into_iter().map(|resource| self.add(resource)).collect()
    }
}

impl Translator {
    /// What follows from `world` that did not from the one before.
    pub fn translate(&mut self, world: &World) -> Changes {
        let old = std::mem::replace(&mut self.world, world.clone());
        let all = !std::mem::replace(&mut self.started, true)
            || old.mesh != world.mesh
            || old.mesh_config.chosen != world.mesh_config.chosen
            || old.network() != world.network();
        let beyond = self.lookups.update(&old, world);
        let seen = Seen::between(&old, world, all, &self.written, beyond);
        let mut out = Emitted::default();
        let mut stale = Stale { world, old: &old, pods: BTreeSet::new() };
        if all || seen.waypoints {
            let networks = Networks::new(world);
            if networks != self.networks {
                self.networks = networks;
                stale.pods_where(|_| true, |_, pod| label(pod, NETWORK).is_some());
            }
        }

        let rebound = self.services(world, &seen, &mut out);
        if seen.rest || !rebound.is_empty() {
            let before = std::mem::take(&mut self.policies);
            let entries_before = std::mem::take(&mut self.entries);
            let changed_names = self.rest(world, &mut out);
            if !all {
                self.mark_by_policies(&before, &mut stale);
                mark_by_entries(&entries_before, &self.entries, &mut stale);
                self.mark_by_entry_names(&changed_names, &mut stale);
            }
        }
        match all {
            true => stale.pods.extend(old.pods.keys().chain(world.pods.keys()).cloned()),
            false => {
                seen.mark(&mut stale);
                rebound.iter().for_each(|service| self.mark_by_service(service, &mut stale));
                self.mark_by_services(&mut stale);
            }
        }
        let stale = stale.pods;
        for key in &stale {
            self.pod(&old, world, key, &mut out);
        }
        let Emitted { resources, mut gone } = out;
        gone.retain(|name| !resources.contains_key(name));
        Changes {
            resources: resources.into_values().collect(),
            removed: gone,
            verdicts: Arc::clone(&self.verdicts),
            pods: stale,
        }
    }

    fn view<'a>(&'a self, world: &'a World) -> View<'a> {
        View { world, lookups: &self.lookups, entries: &self.entries, networks: &self.networks }
    }

    /// Translates Services again; returns those that are bound otherwise than before.
    fn services(&mut self, world: &World, seen: &Seen, out: &mut Emitted) -> BTreeSet<Key> {
        let mut rebound = BTreeSet::new();
        for key in &seen.services {
            let before = self.bindings.remove(key);
            if let Some(unit) = self.services.remove(key) {
                out.gone.extend(unit.names);
            }
            let object: Option<&Service> = world.services.get(key).map(|object| &**object);
            let translated = object.and_then(|object| Some((object, service::translate(self.view(world), object)?)));
            if let Some((object, (resource, binding))) = translated {
                let mut names = vec![out.add(resource)];
                for slice in self.view(world).slices_of(key) {
                    names.extend(out.add_all(workload::from_slice(world, object, slice)));
                }
                let verdict = service_verdict(key, object, &binding).map(Box::new);
                self.services.insert(key.clone(), ServiceUnit { names, verdict });
                self.bindings.insert(key.clone(), binding);
            }
            if before.as_ref() != self.bindings.get(key) {
                rebound.insert(key.clone());
            }
        }
        rebound
    }

    /// Translates everything but Services and pods; returns the names of entries' hosts that are bound otherwise.
    fn rest(&mut self, world: &World, out: &mut Emitted) -> Vec<Key> {
        let mut made = Translation::default();
        let policies = policies(world, &self.bindings, &mut made);
        let owned = View { world, lookups: &self.lookups, entries: &self.entries, networks: &self.networks }.owned();
        let entries = Entries::new(world, owned);
        self.entries = entries.selectors();
        self.written = Entries::written(world);
        let view = View { world, lookups: &self.lookups, entries: &self.entries, networks: &self.networks };
        let select = |namespace: &str, labels: &Labels| policies.selecting(namespace, labels);
        let bound = service_entry::translate(view, &entries, &select, &mut made);

        let mut changed: Vec<Key> = Vec::new();
        let names: BTreeSet<String> = bound.keys().cloned().collect();
        for gone in self.entry_names.difference(&names) {
            changed.extend(self.hosts.remove(gone).map(|(key, _)| key));
        }
        for (name, (key, binding)) in bound {
            let now = (key.clone(), binding);
            if self.hosts.get(&name) != Some(&now) {
                changed.push(key);
                self.hosts.insert(name, now);
            }
        }
        self.entry_names = names;

        let mut guards = Vec::new();
        let bindings = Bindings::new(world, &self.bindings, &self.hosts);
        for (key, object) in world.workload_entries.iter() {
            let mut references = policies.selecting(&key.namespace, &workload_entry::labels(object));
            let own = binding::resolve(world, &object.meta, TrafficType::Workload);
            let services = workload_entry::services(view, &entries, object);
            let needed = guard::for_workload(world, &key.namespace, &own, &services, &bindings, &policies.reach);
            for authorization in needed {
                let reference: Arc<str> = format!("{}/{}", authorization.namespace, authorization.name).into();
                references.push(reference.to_string());
                take_guard(&mut self.guards, &reference, || authorization_resource(&authorization), out);
                guards.push(reference);
            }
            references.sort_unstable();
            let (resource, verdict) = workload_entry::translate(view, &entries, key, object, references);
            made.resources.extend(resource);
            made.verdicts.push(verdict);
        }
        for guard in std::mem::replace(&mut self.rest_guards, guards) {
            drop_guard(&mut self.guards, guard, out);
        }

        let attached = routes(world, &self.bindings, &mut made);
        made.verdicts.extend(world.gateway_classes.iter().filter_map(|(key, class)| gateway::class(key, class)));
        let owners = Owners::of(world);
        let ours = binding::waypoints(world).filter(|(_, object)| owners.is_ours(&object.meta));
        made.verdicts.extend(ours.filter_map(|(key, object)| {
            gateway::gateway(world, key, object, attached.get(key).copied().unwrap_or_default())
        }));
        made.resources.extend(self.networks.resources(world));
        made.verdicts.extend(networks::verdicts(world, &self.networks));
        self.policies = policies;

        let names: BTreeSet<Named> = out.add_all(made.resources).into_iter().collect();
        out.gone.extend(self.rest.difference(&names).cloned());
        self.rest = names;
        let of_services = self.services.values().filter_map(|unit| unit.verdict.as_deref().cloned());
        self.verdicts = of_services.chain(made.verdicts).collect();
        changed
    }

    fn pod(&mut self, old: &World, world: &World, key: &Key, out: &mut Emitted) {
        let guards = self.guarded.remove(key).unwrap_or_default();
        let now = world.pods.get(key).map(|pod| self.placed(world, key, pod, out)).unwrap_or_default();
        let before = old.pods.get(key).map(|pod| names_of(old, pod)).unwrap_or_default();
        out.gone.extend(before.into_iter().flatten().filter(|name| !now.contains(&Some(name.clone()))));
        for guard in guards {
            drop_guard(&mut self.guards, guard, out);
        }
    }

    /// Returns the names of what comes of a pod.
    fn placed(&mut self, world: &World, key: &Key, pod: &Pod, out: &mut Emitted) -> [Option<Named>; 2] {
        let mut references = self.policies.selecting(&key.namespace, &pod.template.labels);
        let own = binding::resolve(world, pod, TrafficType::Workload);
        let view = View { world, lookups: &self.lookups, entries: &self.entries, networks: &self.networks };
        let services = workload::services(view, pod);
        let reach = &self.policies.reach;
        let bindings = Bindings::new(world, &self.bindings, &self.hosts);
        let mut guards = Vec::new();
        for authorization in guard::for_workload(world, &key.namespace, &own, &services, &bindings, reach) {
            let reference: Arc<str> = format!("{}/{}", authorization.namespace, authorization.name).into();
            references.push(reference.to_string());
            take_guard(&mut self.guards, &reference, || authorization_resource(&authorization), out);
            guards.push(reference);
        }
        references.sort_unstable();
        let workload = workload::from_pod(view, pod, references).map(|(resource, _)| resource);
        let names = [workload, enrolment::translate(world, pod)].map(|made| made.map(|resource| out.add(resource)));
        debug_assert_eq!(names, names_of(world, pod));
        if !guards.is_empty() {
            self.guarded.insert(key.clone(), guards.into());
        }
        names
    }

    /// What policies no longer say of pods, or say now.
    fn mark_by_policies(&self, before: &Policies, stale: &mut Stale<'_>) {
        let now = &self.policies;
        let differ: Vec<&Selecting> = {
            fn by_name(of: &Policies) -> HashMap<&str, &Selecting> {
                of.selected.iter().map(|of| (&*of.reference, of)).collect()
            }
            let (was, is) = (by_name(before), by_name(now));
            let gone = was.iter().filter(|(name, of)| is.get(*name) != Some(*of));
            let come = is.iter().filter(|(name, of)| was.get(*name) != Some(*of));
            gone.chain(come).map(|(_, of)| *of).collect()
        };
        stale.pods_where(
            |namespace| differ.iter().any(|of| of.namespace.as_deref().is_none_or(|of| *of == *namespace)),
            |key, pod| differ.iter().any(|of| of.selects(&key.namespace, &pod.template.labels)),
        );
        let root = &*stale.world.mesh.root_namespace;
        for (key, was, is) in differing(&stale.old.peer_authentications, &stale.world.peer_authentications) {
            let policies = || was.into_iter().chain(is);
            // One without a selector is inherited.
            let of_all = policies().any(|policy| !peer_authentication::has_selector(policy));
            stale.pods_where(
                |namespace| *namespace == *key.namespace || (of_all && *key.namespace == *root),
                |_, pod| {
                    of_all || policies().any(|policy| peer_authentication::may_select(policy, &pod.template.labels))
                },
            );
        }
        let (was, is) = (&before.reach, &now.reach);
        if was == is {
            return;
        }
        for key in was.services.symmetric_difference(&is.services) {
            match stale.world.services.contains_key(key) || stale.old.services.contains_key(key) {
                true => self.mark_by_service(key, stale),
                // A host of an entry.
                false => stale.pods_where(|namespace| *namespace == *key.namespace, |_, _| true),
            }
        }
        let differs = |waypoint: &Key| was.covers(waypoint) != is.covers(waypoint);
        let hosts = self.hosts.values().map(|(key, binding)| (key, binding));
        let bound = self.bindings.iter().chain(hosts);
        let behind: Vec<Key> =
            bound.filter(|(_, binding)| binding.waypoints().any(differs)).map(|(key, _)| key.clone()).collect();
        for key in &behind {
            match stale.world.services.contains_key(key) {
                true => self.mark_by_service(key, stale),
                false => stale.pods_where(|namespace| *namespace == *key.namespace, |_, _| true),
            }
        }
        if was.every_waypoint != is.every_waypoint || was.waypoints != is.waypoints {
            stale.pods_that_ask_for_waypoints();
        }
    }

    fn mark_by_entry_names(&self, changed: &[Key], stale: &mut Stale<'_>) {
        let namespaces: BTreeSet<&str> = changed.iter().map(|key| &*key.namespace).collect();
        stale.pods_where(|namespace| namespaces.contains(namespace), |_, _| true);
    }

    /// Services that differ, and slices of those that have no selector.
    fn mark_by_services(&self, stale: &mut Stale<'_>) {
        let (old, world) = (stale.old, stale.world);
        for (key, _, _) in differing(&old.services, &world.services) {
            self.mark_by_service(key, stale);
        }
        for (_, was, is) in differing(&old.endpoint_slices, &world.endpoint_slices) {
            for slice in was.into_iter().chain(is) {
                let Some(service) = service_of(slice) else { continue };
                let selectorless = |world: &World| {
                    world.services.get(&service).is_some_and(|service| workload::has_no_selector(service))
                };
                if selectorless(old) || selectorless(world) {
                    stale.pods_named(&service.namespace, slice);
                }
            }
        }
    }

    /// The pods that are behind a Service, or were.
    fn mark_by_service(&self, key: &Key, stale: &mut Stale<'_>) {
        let (was, is) = (stale.old.services.get(key), stale.world.services.get(key));
        for service in was.into_iter().filter(|was| Some(*was) != is).chain(is) {
            if let Some(selector) = workload::selector(service) {
                stale.pods_where(
                    |namespace| *namespace == *key.namespace,
                    |_, pod| selector.are_among(&pod.template.labels),
                );
            } else {
                for slice in self.view(stale.world).slices_of(key) {
                    stale.pods_named(&key.namespace, slice);
                }
            }
        }
    }
}

/// Where what entries select of a namespace differs.
fn mark_by_entries(before: &EntrySelectors, now: &EntrySelectors, stale: &mut Stale<'_>) {
    let differ: BTreeSet<&String> =
        before.keys().chain(now.keys()).filter(|namespace| before.get(*namespace) != now.get(*namespace)).collect();
    stale.pods_where(|namespace| differ.iter().any(|of| of.as_str() == namespace), |_, _| true);
}

/// What comes of a pod in a world.
fn names_of(world: &World, pod: &Pod) -> [Option<Named>; 2] {
    let workload = workload::name(world, pod).map(|name| (ADDRESS_TYPE, name.into()));
    [workload, enrolment::name(world, pod).map(|name| (POD_ENROLMENT_TYPE, Arc::clone(name)))]
}

fn take_guard(
    guards: &mut HashMap<Arc<str>, usize>,
    reference: &Arc<str>,
    resource: impl FnOnce() -> Resource,
    out: &mut Emitted,
) {
    let count = guards.entry(Arc::clone(reference)).or_default();
    *count += 1;
    if *count == 1 {
        out.add(resource());
    }
}

fn drop_guard(guards: &mut HashMap<Arc<str>, usize>, reference: Arc<str>, out: &mut Emitted) {
    let Some(count) = guards.get_mut(&reference) else { return };
    *count -= 1;
    if *count == 0 {
        guards.remove(&reference);
        let name = (mesh_proto::security::AUTHORIZATION_TYPE, reference);
        out.resources.remove(&name);
        out.gone.push(name);
    }
}

/// What differs between two worlds, as far as it is more than one kind's affair.
#[derive(Debug, Default)]
struct Seen {
    namespaces: BTreeSet<String>,
    /// To be translated again.
    services: BTreeSet<Key>,
    /// Nodes that are elsewhere.
    nodes: BTreeSet<String>,
    /// Waypoints, or what says who may use them.
    waypoints: bool,
    /// Namespaces of which other workloads are on other networks.
    beyond: BTreeSet<Arc<str>>,
    /// What is translated as a whole is to be.
    rest: bool,
    /// UIDs of pods whose enrolment differs.
    enrolments: BTreeSet<String>,
}

impl Seen {
    fn between(old: &World, new: &World, all: bool, written: &HashSet<IpAddr>, beyond: BTreeSet<Arc<str>>) -> Self {
        let mut namespaces: BTreeSet<String> =
            differing(&old.namespaces, &new.namespaces).map(|(key, _, _)| key.name.to_string()).collect();
        if old.hidden != new.hidden {
            namespaces.extend(old.hidden.symmetric_difference(&new.hidden).map(ToString::to_string));
        }
        let waypoints = !old.gateways.ptr_eq(&new.gateways)
            || !old.gateway_classes.ptr_eq(&new.gateway_classes)
            || owner::differ(old, new);
        let nodes = differing(&old.nodes, &new.nodes)
            .filter(|(_, was, is)| was.map(|node| &node.locality) != is.map(|node| &node.locality))
            .map(|(key, _, _)| key.name.to_string())
            .collect();
        let mut this = Self { namespaces, nodes, waypoints, beyond, ..Self::default() };
        let others = !old.authorization_policies.ptr_eq(&new.authorization_policies)
            || !old.peer_authentications.ptr_eq(&new.peer_authentications)
            || !old.service_entries.ptr_eq(&new.service_entries)
            || !old.workload_entries.ptr_eq(&new.workload_entries)
            || !old.http_routes.ptr_eq(&new.http_routes)
            || !old.services.ptr_eq(&new.services)
            || !old.deployments.ptr_eq(&new.deployments)
            || !old.parameters.ptr_eq(&new.parameters)
            || !old.class_defaults.ptr_eq(&new.class_defaults)
            || old.obstacles != new.obstacles;
        this.rest = all
            || others
            || waypoints
            || !this.namespaces.is_empty()
            || !this.beyond.is_empty()
            || takes(old, new, written);
        this.services = this.stale_services(old, new, all);
        let uids = |was: &BTreeSet<&String>, is: &BTreeSet<&String>| -> Vec<String> {
            was.symmetric_difference(is).map(|uid| (*uid).clone()).collect()
        };
        if old.leaving != new.leaving {
            this.enrolments.extend(uids(&old.leaving.iter().collect(), &new.leaving.iter().collect()));
        }
        this.enrolments.extend(old.epochs.diff(&new.epochs).map(|item| match item {
            DiffItem::Add(uid, _) | DiffItem::Update { new: (uid, _), .. } | DiffItem::Remove(uid, _) => uid.clone(),
        }));
        this
    }

    fn stale_services(&self, old: &World, new: &World, all: bool) -> BTreeSet<Key> {
        if all {
            return old.services.keys().chain(new.services.keys()).cloned().collect();
        }
        let mut services: BTreeSet<Key> =
            differing(&old.services, &new.services).map(|(key, _, _)| key.clone()).collect();
        for namespace in self.namespaces.iter().map(String::as_str).chain(self.beyond.iter().map(|of| &**of)) {
            services.extend(in_namespace(&new.services, namespace).map(|(key, _)| key.clone()));
        }
        for (_, was, is) in differing(&old.endpoint_slices, &new.endpoint_slices) {
            let of = was.into_iter().chain(is).filter_map(service_of);
            services.extend(
                of.filter(|key| new.services.get(key).is_some_and(|service| workload::has_no_selector(service))),
            );
        }
        if self.waypoints {
            let asks = |key: &Key, service: &Service| {
                label(service, USE_WAYPOINT).is_some() || new.namespace_label(&key.namespace, USE_WAYPOINT).is_some()
            };
            services
                .extend(new.services.iter().filter(|(key, service)| asks(key, service)).map(|(key, _)| key.clone()));
        }
        services
    }

    /// The pods that are touched by themselves, their namespace or their node.
    fn mark(&self, stale: &mut Stale<'_>) {
        let (old, world) = (stale.old, stale.world);
        stale.pods.extend(differing(&old.pods, &world.pods).map(|(key, _, _)| key.clone()));
        if !self.namespaces.is_empty() {
            stale.pods_where(|namespace| self.namespaces.contains(namespace), |_, _| true);
        }
        if !self.nodes.is_empty() {
            stale.pods_where(|_| true, |_, pod| pod.node().is_some_and(|node| self.nodes.contains(node)));
        }
        if !self.enrolments.is_empty() {
            stale.pods_where(|_| true, |_, pod| pod.uid.as_deref().is_some_and(|uid| self.enrolments.contains(uid)));
        }
        if self.waypoints {
            stale.pods_that_ask_for_waypoints();
        }
    }
}

/// Has a pod got or lost an address that a user has written into an entry?
fn takes(old: &World, new: &World, written: &HashSet<IpAddr>) -> bool {
    !written.is_empty()
        && differing(&old.pods, &new.pods).any(|(_, was, is)| {
            let (was, is) = (was.map(Pod::own_addresses), is.map(Pod::own_addresses));
            was != is && was.into_iter().chain(is).flatten().any(|ip| written.contains(ip))
        })
}

/// The pods to translate again.
struct Stale<'a> {
    old: &'a World,
    world: &'a World,
    pods: BTreeSet<Key>,
}

impl Stale<'_> {
    /// Those of certain namespaces that `touched` holds of.
    fn pods_where(&mut self, of: impl Fn(&str) -> bool, touched: impl Fn(&Key, &Pod) -> bool) {
        let mut found = Vec::new();
        // The first pod of each namespace, which need not be known itself.
        let mut first = self.world.pods.get_min().map(|(key, _)| key);
        while let Some(Key { namespace, .. }) = first {
            if of(namespace) {
                let pods = in_namespace(&self.world.pods, namespace);
                found.extend(pods.filter(|(key, pod)| touched(key, pod)).map(|(key, _)| key.clone()));
            }
            // Nothing sorts between a text and the same with a NUL after it.
            let next = Key::first_of(&format!("{namespace}\0"));
            first = self.world.pods.range(next..).next().map(|(key, _)| key);
        }
        self.pods.extend(found);
    }

    /// Those that a slice is for.
    fn pods_named(&mut self, namespace: &str, slice: &Slice) {
        for name in slice.pods() {
            let key = Key::new(namespace, name);
            if self.world.pods.contains_key(&key) {
                self.pods.insert(key);
            }
        }
    }

    fn pods_that_ask_for_waypoints(&mut self) {
        let world = self.world;
        self.pods_where(
            |_| true,
            |key, pod| {
                label(pod, USE_WAYPOINT).is_some() || world.namespace_label(&key.namespace, USE_WAYPOINT).is_some()
            },
        );
    }
}
