//! What is known of the mesh, indexed for the questions the data path asks.
//!
//! Readers take a [`Snapshot`] and keep it for one connection or request. Writers apply an [`Update`], which publishes
//! the next snapshot; the two share everything that did not change, so an update costs its own size and not that of the
//! mesh. The content of a snapshot depends on what is known and never on the order in which it arrived. The store does
//! not know where updates come from.

mod buckets;
mod dump;
mod indexes;

#[cfg(test)]
mod tests;

use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;
use tokio::sync::watch;

use crate::model::{EndpointPorts, NamespacedHostname, Resource, Service, Workload};
use crate::policy::Policy;
use indexes::{ByUid, Indexes};

/// The shared, current state. One writer at a time; readers never wait.
#[derive(Debug)]
pub struct Store {
    current: ArcSwap<Snapshot>,
    /// What the next snapshot starts from; shares its content with the current one.
    next: Mutex<Snapshot>,
    changed: watch::Sender<u64>,
}

/// Changes that become visible together.
#[derive(Debug, Default)]
pub struct Update {
    changes: Vec<Change>,
}

#[derive(Debug)]
enum Change {
    Workload(Arc<Workload>),
    Service(Arc<Service>),
    Policy(Box<Policy>),
    RemoveAddress(String),
    RemovePolicy(String),
}

impl Update {
    pub fn new() -> Self {
        Self::default()
    }

    #[must_use]
    pub fn workload(mut self, workload: Workload) -> Self {
        self.push_workload(workload);
        self
    }

    #[must_use]
    pub fn service(mut self, service: Service) -> Self {
        self.push_service(service);
        self
    }

    #[must_use]
    pub fn policy(mut self, policy: Policy) -> Self {
        self.push_policy(policy);
        self
    }

    /// Removes the workload with this UID or the service `<namespace>/<hostname>`.
    #[must_use]
    pub fn remove_address(mut self, name: impl Into<String>) -> Self {
        self.push_remove_address(name);
        self
    }

    /// Removes the policy `<namespace>/<name>`.
    #[must_use]
    pub fn remove_policy(mut self, name: impl Into<String>) -> Self {
        self.push_remove_policy(name);
        self
    }

    pub fn push_workload(&mut self, workload: Workload) {
        self.changes.push(Change::Workload(Arc::new(workload)));
    }

    pub fn push_service(&mut self, service: Service) {
        self.changes.push(Change::Service(Arc::new(service)));
    }

    pub fn push_resource(&mut self, resource: Resource) {
        match resource {
            Resource::Workload(workload) => self.push_workload(workload),
            Resource::Service(service) => self.push_service(service),
        }
    }

    pub fn push_policy(&mut self, policy: Policy) {
        self.changes.push(Change::Policy(Box::new(policy)));
    }

    pub fn push_remove_address(&mut self, name: impl Into<String>) {
        self.changes.push(Change::RemoveAddress(name.into()));
    }

    pub fn push_remove_policy(&mut self, name: impl Into<String>) {
        self.changes.push(Change::RemovePolicy(name.into()));
    }

    /// `later` after what there is.
    pub fn append(&mut self, later: Self) {
        if self.changes.is_empty() {
            self.changes = later.changes;
        } else {
            self.changes.extend(later.changes);
        }
    }

    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }
}

impl Default for Store {
    fn default() -> Self {
        Self {
            current: ArcSwap::from_pointee(Snapshot::default()),
            next: Mutex::new(Snapshot::default()),
            changed: watch::Sender::new(0),
        }
    }
}

impl Store {
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// What is known now. Hold it for one decision, not for the life of a connection.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Publishes the next snapshot and returns its version. Changes that change nothing publish nothing.
    pub fn apply(&self, update: Update) -> u64 {
        let mut next = self.next.lock().expect("no index operation panics, so the lock is never poisoned");
        let mut changed = false;
        for change in update.changes {
            changed |= match change {
                Change::Workload(workload) => next.indexes.put_workload(workload),
                Change::Service(service) => next.indexes.put_service(service),
                Change::Policy(policy) => next.indexes.put_policy(*policy),
                Change::RemoveAddress(name) => next.indexes.remove_address(&name),
                Change::RemovePolicy(name) => next.indexes.remove_policy(&name),
            };
        }
        if changed {
            next.version += 1;
            self.current.store(Arc::new(next.clone()));
            self.changed.send_replace(next.version);
        }
        next.version
    }

    /// The version of the current snapshot, with notice of each change.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}

/// Everything known at one moment. Cloning is cheap and independent of size.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    version: u64,
    indexes: Indexes,
}

impl Snapshot {
    /// Grows with each change; 0 = nothing was ever known.
    pub fn version(&self) -> u64 {
        self.version
    }

    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.indexes.workload(uid)
    }

    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.indexes.workloads()
    }

    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.indexes.services.values()
    }

    pub fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.indexes.policies.values()
    }

    /// The workload that owns `ip`. Host-network workloads own none; of several the most capable pod is taken.
    pub fn workload_by_ip(&self, network: &str, ip: IpAddr) -> Option<&Arc<Workload>> {
        self.indexes.by_ip.all(&ip).iter().find(|workload| &*workload.network == network)
    }

    /// A workload with this host name of its own (not that of a service): a gateway that is known by name.
    pub fn workload_by_hostname(&self, name: &NamespacedHostname) -> Option<&Arc<Workload>> {
        self.indexes.by_name.all(name).first()
    }

    pub fn service(&self, key: &NamespacedHostname) -> Option<&Arc<Service>> {
        self.indexes.services.get(key)
    }

    /// Every service with exactly this virtual address, at most one for each hostname and namespace.
    pub fn services_by_vip(&self, network: &str, ip: IpAddr) -> impl Iterator<Item = &Arc<Service>> {
        let has_it =
            move |service: &&Arc<Service>| service.vips.iter().any(|vip| vip.address == ip && &*vip.network == network);
        self.indexes.by_vip.all(&ip).iter().filter(has_it)
    }

    /// The service a client of `client_namespace` reaches at `ip`: among those it may see, one of its own namespace
    /// before the canonical one before any other. Ranges count only where no exact address does, of a service or of a
    /// workload: whoever writes a wide one must not take the way to pods, and their HBONE, from others.
    pub fn best_service_by_vip(&self, network: &str, ip: IpAddr, client_namespace: &str) -> Option<&Arc<Service>> {
        best(self.services_by_vip(network, ip), client_namespace, None).or_else(|| {
            let is_workloads = self.workload_by_ip(network, ip).is_some();
            (!is_workloads).then(|| self.indexes.best_by_range(network, ip, client_namespace)).flatten()
        })
    }

    pub fn services_by_hostname(&self, hostname: &str) -> impl Iterator<Item = &Arc<Service>> {
        self.indexes.by_hostname.all(hostname).iter()
    }

    /// The service a client of `client_namespace` means by `hostname`, ranked as for virtual addresses.
    pub fn service_by_hostname(&self, hostname: &str, client_namespace: &str) -> Option<&Arc<Service>> {
        self.service_by_hostname_preferring(hostname, client_namespace, None)
    }

    /// As [`Self::service_by_hostname`], with a namespace that wins where neither the client's own nor a canonical
    /// service does.
    pub fn service_by_hostname_preferring(
        &self,
        hostname: &str,
        client_namespace: &str,
        preferred_namespace: Option<&str>,
    ) -> Option<&Arc<Service>> {
        best(self.services_by_hostname(hostname), client_namespace, preferred_namespace)
    }

    /// The endpoints of a service that may receive connections: healthy ones, or all where the service says so.
    pub fn endpoints(&self, service: &NamespacedHostname) -> impl Iterator<Item = (&Arc<Workload>, &EndpointPorts)> {
        let accepts = indexes::HealthFilter::of(self.service(service));
        self.all_endpoints(service).filter(move |(workload, _)| accepts.admits(workload))
    }

    /// The endpoints of a service, whatever their health, also of a service not (yet) known.
    pub fn all_endpoints(
        &self,
        service: &NamespacedHostname,
    ) -> impl Iterator<Item = (&Arc<Workload>, &EndpointPorts)> {
        // The service as the index knows it: what is returned does not outlive that, and the caller's key may.
        let endpoints = self.indexes.endpoints.get_key_value(service);
        endpoints.into_iter().flat_map(|(service, set)| {
            set.iter().filter_map(move |ByUid(workload)| Some((workload, workload.services.get(service)?)))
        })
    }

    /// The policies that govern connections to `workload`: mesh-wide ones, its namespace's, and those it lists. A listed
    /// policy that is not known constrains nothing (one that was received and not understood is known).
    pub fn policies_for<'a>(&'a self, workload: &'a Workload) -> impl Iterator<Item = &'a Policy> {
        let namespace = self.indexes.policies_by_namespace.get(&workload.namespace);
        let listed = workload.authorization_policies.iter().filter_map(|name| {
            let policy = self.indexes.policies.get(name);
            if policy.is_none() {
                tracing::debug!(policy = %name, workload = %workload.uid, "workload lists an unknown policy");
            }
            policy
        });
        let mesh = self.indexes.global_policies.values();
        mesh.chain(namespace.into_iter().flat_map(|policies| policies.values())).chain(listed).map(|policy| &**policy)
    }

    /// Is the same known here as there, whatever the order it came in?
    #[cfg(fuzzing)]
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        self.indexes == other.indexes
    }

    /// The `workloads`, `services`, `policies`, `stagedServices` and `storeVersion` of `/config_dump`.
    pub fn config_dump(&self) -> serde_json::Map<String, serde_json::Value> {
        dump::config_dump(self)
    }
}

/// Picks by visibility, then own namespace, canonical, preferred namespace, and last the order of namespaces.
fn best<'a>(
    candidates: impl Iterator<Item = &'a Arc<Service>>,
    client_namespace: &str,
    preferred_namespace: Option<&str>,
) -> Option<&'a Arc<Service>> {
    let rank = |service: &Service| {
        let preferred = preferred_namespace.is_some_and(|preferred| preferred == &*service.namespace);
        (&*service.namespace == client_namespace, service.canonical, preferred)
    };
    let visible = candidates.filter(|service| service.visible_to(client_namespace));
    // `max_by` keeps the last of equals; the first is wanted.
    visible.reduce(|best, next| if rank(next) > rank(best) { next } else { best })
}
