//! The indexes behind a snapshot, and how one resource enters and leaves them.
//!
//! All are persistent maps: a clone shares, and a change copies the path to what it touches. Endpoints hang on the name
//! of a service, not on the service, so either may come first and updating a service leaves its endpoints alone.

use std::borrow::Borrow;
use std::cmp::{Ordering, Reverse};
use std::hash::{Hash, Hasher};
use std::net::IpAddr;
use std::sync::Arc;

use imbl::shared_ptr::DefaultSharedPtr;
use imbl::{GenericHashMap, OrdMap, OrdSet};
use ipnet::IpNet;

use super::buckets::Buckets;
use crate::model::{
    HealthPolicy, HealthStatus, NamespacedHostname, NetworkMode, Service, Template, TunnelProtocol, Workload,
};
use crate::policy::{Policy, Scope};
use crate::text::NameHasher;

type HashMap<K, V> = GenericHashMap<K, V, NameHasher, DefaultSharedPtr>;

/// A workload as it stands in a collection: for its UID, which is not kept a second time as a key.
#[derive(Clone, Debug)]
pub(super) struct ByUid(pub(super) Arc<Workload>);

impl Borrow<str> for ByUid {
    fn borrow(&self) -> &str {
        &self.0.uid
    }
}

impl PartialEq for ByUid {
    fn eq(&self, other: &Self) -> bool {
        self.0.uid == other.0.uid
    }
}

impl Eq for ByUid {}

impl PartialOrd for ByUid {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for ByUid {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.uid.cmp(&other.0.uid)
    }
}

impl Hash for ByUid {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.uid.hash(state);
    }
}

/// In a mesh of many workloads these are the half of a node's memory: entries are small, and maps are ordered where that
/// costs no more to search, since the nodes of ordered ones are fuller.
#[derive(Clone, Debug, Default)]
pub(super) struct Indexes {
    pub(super) workloads: HashMap<ByUid, ()>,
    /// Workloads that own the address, in whatever network; the best first.
    pub(super) by_ip: Buckets<IpAddr, Workload>,
    /// The few workloads that have a host name of their own.
    pub(super) by_name: Buckets<NamespacedHostname, Workload>,
    pub(super) services: HashMap<NamespacedHostname, Arc<Service>>,
    pub(super) by_vip: Buckets<IpAddr, Service>,
    pub(super) by_hostname: Buckets<Arc<str>, Service>,
    by_range: Buckets<IpNet, Service>,
    /// How many ranges have each prefix length, so that a lookup tries only those: (is IPv6, length).
    range_lengths: OrdMap<Reverse<(bool, u8)>, usize>,
    /// The workloads of a service; they know their ports. Branches of a large set may keep what has left it, as far as it
    /// divided those that are there: one in sixteen at most.
    pub(super) endpoints: HashMap<NamespacedHostname, OrdSet<ByUid>>,
    /// By `<namespace>/<name>`.
    pub(super) policies: OrdMap<Arc<str>, Arc<Policy>>,
    pub(super) global_policies: OrdMap<Arc<str>, Arc<Policy>>,
    pub(super) policies_by_namespace: HashMap<Arc<str>, OrdMap<Arc<str>, Arc<Policy>>>,
}

/// Which endpoints of a service may be used.
#[derive(Clone, Copy)]
pub(super) enum HealthFilter {
    Healthy,
    Any,
}

impl HealthFilter {
    pub(super) fn of(service: Option<&Arc<Service>>) -> Self {
        match service.map(|service| service.load_balancing.health_policy) {
            Some(HealthPolicy::AllowAll) => Self::Any,
            Some(HealthPolicy::OnlyHealthy) | None => Self::Healthy,
        }
    }

    pub(super) fn admits(self, workload: &Workload) -> bool {
        match self {
            Self::Any => true,
            Self::Healthy => workload.status == HealthStatus::Healthy,
        }
    }
}

impl Indexes {
    pub(super) fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.workloads.get_key_value(uid).map(|(workload, ())| &workload.0)
    }

    pub(super) fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.keys().map(|workload| &workload.0)
    }

    /// Adds or replaces; false when it was known just so.
    pub(super) fn put_workload(&mut self, workload: Arc<Workload>) -> bool {
        match self.workload(&workload.uid) {
            Some(known) if *known == workload => return false,
            Some(_) => drop(self.remove_workload(&workload.uid)),
            None => {}
        }
        for ip in owned_addresses(&workload) {
            self.by_ip.put(ip, workload.clone(), |w| (Reverse(ownership(w)), w.uid.clone()));
        }
        if let Some(name) = own_name(&workload) {
            self.by_name.put(name, workload.clone(), |w| w.uid.clone());
        }
        for service in workload.services.keys() {
            match self.endpoints.get_mut(service) {
                Some(endpoints) => drop(endpoints.insert(ByUid(workload.clone()))),
                None => drop(self.endpoints.insert(service.clone(), OrdSet::unit(ByUid(workload.clone())))),
            }
        }
        self.workloads.insert(ByUid(workload), ());
        true
    }

    fn remove_workload(&mut self, uid: &str) -> bool {
        let Some((ByUid(old), ())) = self.workloads.remove_with_key(uid) else { return false };
        for ip in owned_addresses(&old) {
            self.by_ip.take(&ip, |w| *w.uid == *uid);
        }
        if let Some(name) = own_name(&old) {
            self.by_name.take(&name, |w| *w.uid == *uid);
        }
        for service in old.services.keys() {
            if let Some(endpoints) = self.endpoints.get_mut(service) {
                endpoints.remove(uid);
                if endpoints.is_empty() {
                    self.endpoints.remove(service);
                }
            }
        }
        true
    }

    pub(super) fn put_service(&mut self, service: Arc<Service>) -> bool {
        let key = service.key();
        if self.services.get(&key).is_some_and(|known| *known == service) {
            return false;
        }
        self.remove_service(&key);
        let order = |s: &Service| s.key();
        for vip in &service.vips {
            self.by_vip.put(vip.address, service.clone(), order);
        }
        for range in &service.cidr_vips {
            if self.by_range.put(range.cidr, service.clone(), order) {
                *self.range_lengths.entry(length_of(&range.cidr)).or_insert(0) += 1;
            }
        }
        self.by_hostname.put(service.hostname.clone(), service.clone(), order);
        self.services.insert(key, service);
        true
    }

    fn remove_service(&mut self, key: &NamespacedHostname) -> bool {
        let Some(old) = self.services.remove(key) else { return false };
        let is_it = |s: &Service| s.namespace == key.namespace && s.hostname == key.hostname;
        for vip in &old.vips {
            self.by_vip.take(&vip.address, is_it);
        }
        for range in &old.cidr_vips {
            if self.by_range.take(&range.cidr, is_it) {
                let length = length_of(&range.cidr);
                if let Some(count) = self.range_lengths.get_mut(&length) {
                    *count -= 1;
                    if *count == 0 {
                        self.range_lengths.remove(&length);
                    }
                }
            }
        }
        self.by_hostname.take(&old.hostname, is_it);
        true
    }

    /// UIDs and `<namespace>/<hostname>` share one name space on the wire; no name is both.
    pub(super) fn remove_address(&mut self, name: &str) -> bool {
        self.remove_workload(name) || name.parse().is_ok_and(|key| self.remove_service(&key))
    }

    pub(super) fn put_policy(&mut self, policy: Policy) -> bool {
        let name: Arc<str> = policy.key().to_string().into();
        if self.policies.get(&name).is_some_and(|known| **known == policy) {
            return false;
        }
        self.remove_policy(&name);
        let policy = Arc::new(policy);
        match policy.scope() {
            Scope::Global => {
                self.global_policies.insert(name.clone(), policy.clone());
            }
            Scope::Namespace => {
                let namespace = policy.key().namespace.clone();
                self.policies_by_namespace.entry(namespace).or_default().insert(name.clone(), policy.clone());
            }
            Scope::WorkloadSelector => {}
        }
        self.policies.insert(name, policy);
        true
    }

    pub(super) fn remove_policy(&mut self, name: &str) -> bool {
        let Some(old) = self.policies.remove(name) else { return false };
        self.global_policies.remove(name);
        if let Some(policies) = self.policies_by_namespace.get_mut(&old.key().namespace) {
            policies.remove(name);
            if policies.is_empty() {
                self.policies_by_namespace.remove(&old.key().namespace);
            }
        }
        true
    }

    /// The best service whose range holds `ip`: own namespace, then the longer prefix, then canonical.
    pub(super) fn best_by_range(&self, network: &str, ip: IpAddr, client_namespace: &str) -> Option<&Arc<Service>> {
        type Rank = (bool, u8, bool);
        let mut best: Option<(Rank, &Arc<Service>)> = None;
        for Reverse((is_v6, length)) in self.range_lengths.keys() {
            if *is_v6 != ip.is_ipv6() {
                continue;
            }
            let range = IpNet::new(ip, *length).expect("the length came from a range of this family").trunc();
            for service in self.by_range.all(&range) {
                let here = service.cidr_vips.iter().any(|vip| vip.cidr == range && &*vip.network == network);
                let rank = (&*service.namespace == client_namespace, *length, service.canonical);
                if here && service.visible_to(client_namespace) && best.is_none_or(|(known, _)| rank > known) {
                    best = Some((rank, service));
                }
            }
        }
        best.map(|(_, service)| service)
    }
}

fn length_of(range: &IpNet) -> Reverse<(bool, u8)> {
    Reverse((range.addr().is_ipv6(), range.prefix_len()))
}

/// The addresses a workload is found by. Those of the host belong to nobody in particular.
fn owned_addresses(workload: &Workload) -> impl Iterator<Item = IpAddr> + '_ {
    let owned = match workload.network_mode {
        NetworkMode::Standard => workload.addresses.as_slice(),
        NetworkMode::HostNetwork => &[],
    };
    owned.iter().copied()
}

fn own_name(workload: &Workload) -> Option<NamespacedHostname> {
    let Template { namespace, hostname, .. } = &**workload;
    (!hostname.is_empty()).then(|| NamespacedHostname { namespace: namespace.clone(), hostname: hostname.clone() })
}

/// Of several workloads on one address: a captured pod, a pod, something that speaks HBONE, anything.
fn ownership(workload: &Workload) -> u8 {
    let pod = workload.uid.contains("//Pod/");
    u8::from(pod) * 2 + u8::from(workload.protocol == TunnelProtocol::Hbone)
}

/// The same content, not only the same keys: for tests of whether the order of arrival leaves a trace.
#[cfg(any(test, fuzzing))]
impl PartialEq for Indexes {
    fn eq(&self, other: &Self) -> bool {
        let workloads = |indexes: &Self| indexes.workloads().cloned().map(|w| (w.uid.clone(), w)).collect();
        let [own, others]: [std::collections::BTreeMap<_, _>; 2] = [workloads(self), workloads(other)];
        let ends = |(key, set): (&NamespacedHostname, &OrdSet<ByUid>)| {
            (key.clone(), set.iter().map(|workload| workload.0.clone()).collect())
        };
        let endpoints = |indexes: &Self| indexes.endpoints.iter().map(ends).collect();
        let [own_endpoints, others_endpoints]: [std::collections::BTreeMap<_, Vec<_>>; 2] =
            [endpoints(self), endpoints(other)];
        own == others
            && own_endpoints == others_endpoints
            && self.by_ip == other.by_ip
            && self.by_name == other.by_name
            && self.services == other.services
            && self.by_vip == other.by_vip
            && self.by_hostname == other.by_hostname
            && self.by_range == other.by_range
            && self.range_lengths == other.range_lengths
            && self.policies == other.policies
            && self.global_policies == other.global_policies
            && self.policies_by_namespace == other.policies_by_namespace
    }
}
