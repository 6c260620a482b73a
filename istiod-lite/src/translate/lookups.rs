//! Lookups over a world that would otherwise be scans, brought up to date with what changed in it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Arc;

use super::networks;
use super::workload_entry;
use super::world::{World, differing};
use crate::types::networking::WorkloadEntrySpec;
use crate::types::{Key, Labels, Object, Pod, Service, Slice, label};

#[derive(Debug, Default)]
pub struct Lookups {
    slices: Places<Key>,
    /// Kept only while there are objects whose users write addresses.
    addresses: Option<Addresses>,
    /// By namespace, the workloads of other networks.
    beyond: BTreeMap<Arc<str>, Beyond>,
}

/// The workloads of one namespace that are on another network than the cluster's.
#[derive(Debug, Default, PartialEq)]
pub struct Beyond {
    pods: BTreeMap<Arc<str>, Abroad>,
    entries: BTreeMap<Arc<str>, Abroad>,
}

#[derive(Debug, PartialEq)]
struct Abroad {
    labels: Labels,
    identity: String,
}

impl Beyond {
    const NONE: &'static Self = &Self { pods: BTreeMap::new(), entries: BTreeMap::new() };

    /// The identities of those with these labels.
    pub fn selected(&self, selector: &Labels) -> BTreeSet<String> {
        let all = self.pods.values().chain(self.entries.values());
        let selected = all.filter(|abroad| selector.are_among(&abroad.labels));
        selected.map(|abroad| abroad.identity.clone()).collect()
    }

    pub fn pod(&self, name: &str) -> Option<&str> {
        self.pods.get(name).map(|abroad| &*abroad.identity)
    }
}

/// Who has an address; the last of several by name.
#[derive(Debug, Default)]
struct Addresses {
    services: Places<IpAddr>,
    /// Pods of the host's network have none of their own.
    pods: Places<IpAddr>,
}

impl Lookups {
    #[cfg(test)]
    pub fn of(world: &World) -> Self {
        let mut this = Self::default();
        _ = this.update(&World::default(), world);
        this
    }

    /// From what was true of `old` to what is of `new`. Returns the namespaces of which other workloads are on other
    /// networks.
    pub fn update(&mut self, old: &World, new: &World) -> BTreeSet<Arc<str>> {
        let moved = self.update_beyond(old, new);
        self.update_places(old, new);
        moved
    }

    fn update_beyond(&mut self, old: &World, new: &World) -> BTreeSet<Arc<str>> {
        let none = World::default();
        let mut touched = BTreeSet::new();
        let old = match old.network() == new.network() && old.mesh == new.mesh {
            true => old,
            false => {
                touched.extend(std::mem::take(&mut self.beyond).into_keys());
                &none
            }
        };
        let home = new.network();
        for (key, was, is) in differing(&old.pods, &new.pods) {
            // Almost none is: nothing is made for the others.
            let abroad = is.filter(|pod| networks::of_pod(new, pod) != home).map(|pod| Abroad {
                labels: Labels::clone(&pod.template.labels),
                identity: new.identity(&key.namespace, &pod.template.service_account),
            });
            let was = was.is_some_and(|was| label(was, networks::NETWORK).is_some());
            if was || abroad.is_some() {
                let there = self.beyond.entry(Arc::clone(&key.namespace)).or_default();
                if place(&mut there.pods, key, abroad) {
                    touched.insert(Arc::clone(&key.namespace));
                }
            }
        }
        for (key, _, is) in differing(&old.workload_entries, &new.workload_entries) {
            let spec = |object: &Object<WorkloadEntrySpec>| object.spec.as_ref().ok().cloned();
            let abroad = is.and_then(|object| Some((object, spec(object)?)));
            let abroad = abroad.filter(|(object, spec)| networks::of_entry(new, &object.meta, spec) != home);
            let abroad = abroad.map(|(object, spec)| Abroad {
                labels: workload_entry::labels(object),
                identity: new.identity(&key.namespace, &spec.service_account),
            });
            let there = self.beyond.entry(Arc::clone(&key.namespace)).or_default();
            if place(&mut there.entries, key, abroad) {
                touched.insert(Arc::clone(&key.namespace));
            }
        }
        self.beyond.retain(|_, there| there != Beyond::NONE);
        touched
    }

    /// The workloads of a namespace that are on other networks.
    pub fn beyond(&self, namespace: &str) -> &Beyond {
        self.beyond.get(namespace).unwrap_or(Beyond::NONE)
    }

    fn update_places(&mut self, old: &World, new: &World) {
        for (key, was, is) in differing(&old.endpoint_slices, &new.endpoint_slices) {
            self.slices.replace(key, was.and_then(service_of), is.and_then(service_of));
        }
        if new.service_entries.is_empty() && new.workload_entries.is_empty() {
            self.addresses = None;
            return;
        }
        let none = World::default();
        let (old, addresses) = match &mut self.addresses {
            Some(addresses) => (old, addresses),
            unknown => (&none, unknown.insert(Addresses::default())),
        };
        for (key, was, is) in differing(&old.services, &new.services) {
            let of = |service: Option<&Service>| service.map(|service| service.vips().to_vec()).unwrap_or_default();
            addresses.services.replace(key, of(was), of(is));
        }
        for (key, was, is) in differing(&old.pods, &new.pods) {
            let of = |pod: Option<&Pod>| pod.map(|pod| pod.own_addresses().to_vec()).unwrap_or_default();
            addresses.pods.replace(key, of(was), of(is));
        }
    }

    /// The slices of a Service, by name.
    pub fn slices_of(&self, service: &Key) -> impl Iterator<Item = &Key> {
        self.slices.0.get(service).into_iter().flatten()
    }

    pub fn service_at(&self, ip: IpAddr) -> Option<&Key> {
        self.addresses.as_ref()?.services.0.get(&ip)?.last()
    }

    pub fn pod_at(&self, ip: IpAddr) -> Option<&Key> {
        self.addresses.as_ref()?.pods.0.get(&ip)?.last()
    }
}

/// Puts one in place of what was there; says whether that makes a difference.
fn place(there: &mut BTreeMap<Arc<str>, Abroad>, key: &Key, abroad: Option<Abroad>) -> bool {
    if there.get(&key.name) == abroad.as_ref() {
        return false;
    }
    match abroad {
        Some(abroad) => _ = there.insert(Arc::clone(&key.name), abroad),
        None => _ = there.remove(&key.name),
    }
    true
}

/// The Service that a slice is of.
pub fn service_of(slice: &Slice) -> Option<Key> {
    Some(Key::new(Arc::clone(&slice.key.namespace), Arc::clone(slice.service.as_ref()?)))
}

/// Which objects are at a place, sorted; one may be at several, and several at one. Almost always it is one at one.
#[derive(Debug)]
struct Places<P>(HashMap<P, Vec<Key>>);

impl<P> Default for Places<P> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<P: Eq + Hash> Places<P> {
    fn replace(&mut self, key: &Key, was: impl IntoIterator<Item = P>, is: impl IntoIterator<Item = P>) {
        for place in was {
            if let Some(there) = self.0.get_mut(&place) {
                there.retain(|of| of != key);
                if there.is_empty() {
                    self.0.remove(&place);
                }
            }
        }
        for place in is {
            let there = self.0.entry(place).or_default();
            if let Err(at) = there.binary_search(key) {
                there.reserve_exact(1);
                there.insert(at, key.clone());
            }
        }
    }
}
