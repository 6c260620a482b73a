//! What sessions read: one snapshot, what changed on the way to it, and, for on-demand clients, which resources a name
//! stands for. Computed once per generation however many clients are connected, so that a change costs each client
//! the size of the change.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, OnceLock};

use mesh_proto::enrolment::POD_ENROLMENT_TYPE;
use mesh_proto::security::AUTHORIZATION_TYPE;
use mesh_proto::waypoint::{HTTP_POLICY_TYPE, ROUTE_TYPE};
use mesh_proto::workload::{ADDRESS_TYPE, WORKLOAD_TYPE};
use prost::Message as _;
use tokio::sync::watch;

use crate::resources::{Audience, Resource, ResourceStore, Snapshot};

/// The types served, in the order in which one change is pushed: what others refer to comes first.
pub const TYPES: [&str; 6] =
    [ADDRESS_TYPE, WORKLOAD_TYPE, AUTHORIZATION_TYPE, POD_ENROLMENT_TYPE, ROUTE_TYPE, HTTP_POLICY_TYPE];

/// Changes are remembered for this many generations, and this many names; a client further behind is compared with its whole last
/// state. A client that is told of a hundred thousand resources among a hundred others answers half a minute later, and ten
/// generations may come in a second.
const REMEMBERED: usize = 512;
const REMEMBERED_NAMES: usize = 64 * 1024;

/// Who a client is, as far as audiences go. Derived from its bound token, never from what it says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scope {
    /// Set only for node proxies.
    pub node: Option<Arc<str>>,
    /// The waypoint the client's pod belongs to: namespace, name.
    pub waypoint: Option<(Arc<str>, Arc<str>)>,
}

impl Scope {
    /// Whether a client of this scope may see `resource`.
    pub fn sees(&self, resource: &Resource) -> bool {
        resource.audience().iter().any(|audience| match audience {
            Audience::All => true,
            Audience::Node(node) => self.node.as_ref() == Some(node),
            Audience::Waypoint { namespace, name } => {
                self.waypoint.as_ref().is_some_and(|(ns, gateway)| ns == namespace && gateway == name)
            }
        })
    }
}

/// Names of one type that differ between two generations, or `Everything` if that is not known any more.
#[derive(Debug, PartialEq, Eq)]
pub enum Changed {
    Names(BTreeSet<Arc<str>>),
    Everything,
}

#[derive(Debug)]
struct Step {
    from: u64,
    names: BTreeMap<&'static str, Vec<Arc<str>>>,
}

impl Step {
    fn len(&self) -> usize {
        self.names.values().map(Vec::len).sum()
    }
}

/// A snapshot with its recent past.
#[derive(Debug, Default)]
pub struct View {
    snapshot: Arc<Snapshot>,
    /// Oldest first; each step begins at the generation where the one before it ended.
    steps: VecDeque<Arc<Step>>,
    demand: OnceLock<DemandIndex>,
}

impl View {
    /// A view of `snapshot` without memory of earlier ones.
    pub fn new(snapshot: Arc<Snapshot>) -> Self {
        Self { snapshot, ..Self::default() }
    }

    /// The view after this one.
    pub fn next(&self, snapshot: Arc<Snapshot>) -> Self {
        if self.generation() == 0 {
            // Nobody was told of that, and all the names there are would be remembered.
            return Self::new(snapshot);
        }
        let mut steps = self.steps.clone();
        let names = [ADDRESS_TYPE, AUTHORIZATION_TYPE, POD_ENROLMENT_TYPE, ROUTE_TYPE, HTTP_POLICY_TYPE]
            .map(|type_url| (type_url, self.snapshot.differing(&snapshot, type_url)));
        steps.push_back(Arc::new(Step { from: self.snapshot.generation(), names: names.into() }));
        let mut names: usize = steps.iter().map(|step| step.len()).sum();
        while steps.len() > REMEMBERED || (names > REMEMBERED_NAMES && steps.len() > 1) {
            names -= steps.pop_front().map_or(0, |step| step.len());
        }
        Self { snapshot, steps, demand: OnceLock::new() }
    }

    pub fn generation(&self) -> u64 {
        self.snapshot.generation()
    }

    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// What may differ between the view of `generation` and this one.
    pub fn changed_since(&self, generation: u64, type_url: &str) -> Changed {
        if generation == self.generation() {
            return Changed::Names(BTreeSet::new());
        }
        let Some(first) = self.steps.iter().position(|step| step.from == generation) else {
            return Changed::Everything;
        };
        let mut names = BTreeSet::new();
        for step in self.steps.iter().skip(first) {
            names.extend(step.names.get(stored_type(type_url)).into_iter().flatten().cloned());
        }
        Changed::Names(names)
    }

    /// The resource of this name, if the client may see it.
    pub fn get(&self, type_url: &str, name: &str, scope: &Scope) -> Option<&Arc<Resource>> {
        self.snapshot
            .get(stored_type(type_url), name)
            .filter(|resource| scope.sees(resource) && resource.message_as(type_url).is_some())
    }

    /// All resources of a type that the client may see.
    pub fn visible(&self, type_url: &str, scope: &Scope) -> impl Iterator<Item = &Arc<Resource>> {
        self.snapshot
            .of_type(stored_type(type_url))
            .filter(move |resource| scope.sees(resource) && resource.message_as(type_url).is_some())
    }

    /// The names an on-demand subscription to `requested` comes to: the resource itself (by name or alias) and, for a
    /// service, the workloads behind it.
    pub fn resolve(&self, type_url: &str, requested: &str, scope: &Scope) -> BTreeSet<Arc<str>> {
        let mut names: BTreeSet<Arc<str>> =
            self.get(type_url, requested, scope).map(|resource| Arc::clone(&resource.name)).into_iter().collect();
        if stored_type(type_url) == ADDRESS_TYPE {
            let index = self.demand();
            names.extend(index.aliases.get(requested).into_iter().flatten().cloned());
            let services: Vec<_> = names.iter().filter_map(|name| index.endpoints.get(name)).collect();
            names.extend(services.into_iter().flatten().cloned());
        }
        names.retain(|name| self.get(type_url, name, scope).is_some());
        names
    }

    /// Whether a client that has `requested` such names on demand is to have the resource of this name: as [`Self::resolve`] and
    /// [`Self::workloads_on`] would say, asked from the other end.
    pub fn is_wanted(&self, type_url: &str, name: &str, requested: &BTreeSet<Arc<str>>, scope: &Scope) -> bool {
        let Some(resource) = self.get(type_url, name, scope) else { return false };
        let by_alias = |resource: &Resource| resource.aliases().any(|alias| requested.contains(alias));
        if requested.contains(name) {
            return true;
        }
        if stored_type(type_url) != ADDRESS_TYPE {
            return false;
        }
        if by_alias(resource) {
            return true;
        }
        let Some(place) = self.demand().places.get(name) else { return false };
        let by_service = |service: &Arc<str>| {
            requested.contains(service) && self.get(type_url, service, scope).is_some()
                || self.snapshot.get(ADDRESS_TYPE, service).is_some_and(|service| by_alias(service))
        };
        let is_own = scope.node.is_some() && place.node == scope.node;
        is_own || place.services.iter().any(by_service)
    }

    /// What may be wanted otherwise, or be something else, than in the view of `generation`: what differs, and what is behind
    /// it. `None`: anything.
    pub fn touched_since(&self, generation: u64, type_url: &str) -> Option<BTreeSet<Arc<str>>> {
        let Changed::Names(mut names) = self.changed_since(generation, type_url) else { return None };
        if stored_type(type_url) == ADDRESS_TYPE && !names.is_empty() {
            let endpoints = &self.demand().endpoints;
            let behind: Vec<_> = names.iter().filter_map(|name| endpoints.get(name)).flatten().cloned().collect();
            names.extend(behind);
        }
        Some(names)
    }

    /// The workloads on a node; a node proxy that subscribes on demand is told of these unasked.
    pub fn workloads_on(&self, node: &str) -> &[Arc<str>] {
        self.demand().nodes.get(node).map_or(&[], Vec::as_slice)
    }

    fn demand(&self) -> &DemandIndex {
        self.demand.get_or_init(|| DemandIndex::build(&self.snapshot))
    }
}

/// Which stored type a served type is made of: a Workload is the inside of an Address.
fn stored_type(type_url: &str) -> &str {
    if type_url == WORKLOAD_TYPE { ADDRESS_TYPE } else { type_url }
}

/// What on-demand subscriptions look names up in. Built for a view when the first such client asks.
#[derive(Debug, Default)]
struct DemandIndex {
    aliases: HashMap<Arc<str>, Vec<Arc<str>>>,
    /// Service name → names of the workloads behind it.
    endpoints: HashMap<Arc<str>, Vec<Arc<str>>>,
    nodes: HashMap<Arc<str>, Vec<Arc<str>>>,
    /// By name of a workload.
    places: HashMap<Arc<str>, Place>,
}

/// Where a workload is.
#[derive(Debug)]
struct Place {
    node: Option<Arc<str>>,
    /// The names of those that it is behind.
    services: Vec<Arc<str>>,
}

impl DemandIndex {
    fn build(snapshot: &Snapshot) -> Self {
        let mut index = Self::default();
        for resource in snapshot.of_type(ADDRESS_TYPE) {
            for alias in resource.aliases() {
                index.aliases.entry(alias.into()).or_default().push(Arc::clone(&resource.name));
            }
            let Some(message) = resource.message_as(WORKLOAD_TYPE) else { continue };
            let Ok(workload) = mesh_proto::workload::Workload::decode(message.reader()) else { continue };
            let node = (!workload.node.is_empty()).then(|| Arc::from(workload.node));
            if let Some(node) = &node {
                index.nodes.entry(Arc::clone(node)).or_default().push(Arc::clone(&resource.name));
            }
            let services: Vec<Arc<str>> = workload.services.into_keys().map(Arc::from).collect();
            for service in &services {
                index.endpoints.entry(Arc::clone(service)).or_default().push(Arc::clone(&resource.name));
            }
            index.places.insert(Arc::clone(&resource.name), Place { node, services });
        }
        index
    }
}

/// Follows the store and publishes a view of each generation; ends when every reader has gone.
pub async fn follow(store: Arc<ResourceStore>, views: watch::Sender<Arc<View>>) {
    let mut generations = store.subscribe();
    loop {
        generations.borrow_and_update();
        let snapshot = store.snapshot();
        views.send_if_modified(|view| {
            if view.generation() == snapshot.generation() {
                return false;
            }
            *view = Arc::new(view.next(Arc::clone(&snapshot)));
            true
        });
        tokio::select! {
            changed = generations.changed() => if changed.is_err() { return },
            () = views.closed() => return,
        }
    }
}

#[cfg(test)]
mod tests;
