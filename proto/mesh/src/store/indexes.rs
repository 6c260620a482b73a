//! The indexes behind a snapshot, and how one resource enters and leaves them.
//!
//! All are persistent maps: a clone shares, and a change copies the path to what it touches. Endpoints hang on the name
//! of a service, not on the service, so either may come first and updating a service leaves its endpoints alone.

use std::cmp::Reverse;
use std::net::IpAddr;
use std::sync::Arc;

use imbl::{HashMap, OrdMap};
use ipnet::IpNet;

use crate::model::{
    EndpointPorts, HealthPolicy, HealthStatus, NamespacedHostname, NetworkMode, Service, TunnelProtocol, Workload,
};
use crate::policy::{Policy, Scope};

/// The few resources that share a key, in an order that does not depend on arrival.
pub(super) type Bucket<T> = Arc<[Arc<T>]>;

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Endpoint {
    pub(super) workload: Arc<Workload>,
    pub(super) ports: EndpointPorts,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Indexes {
    /// By UID.
    pub(super) workloads: HashMap<Arc<str>, Arc<Workload>>,
    /// Workloads that own the address, in whatever network; the best first.
    pub(super) by_ip: HashMap<IpAddr, Bucket<Workload>>,
    /// The few workloads that have a host name of their own.
    pub(super) by_name: HashMap<NamespacedHostname, Bucket<Workload>>,
    pub(super) services: HashMap<NamespacedHostname, Arc<Service>>,
    pub(super) by_vip: HashMap<IpAddr, Bucket<Service>>,
    pub(super) by_hostname: HashMap<Arc<str>, Bucket<Service>>,
    by_range: HashMap<IpNet, Bucket<Service>>,
    /// How many ranges have each prefix length, so that a lookup tries only those: (is IPv6, length).
    range_lengths: OrdMap<Reverse<(bool, u8)>, usize>,
    /// By service and workload UID.
    pub(super) endpoints: HashMap<NamespacedHostname, OrdMap<Arc<str>, Endpoint>>,
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
    /// Adds or replaces; false when it was known just so.
    pub(super) fn put_workload(&mut self, workload: Workload) -> bool {
        if self.workloads.get(&workload.uid).is_some_and(|known| **known == workload) {
            return false;
        }
        self.remove_workload(&workload.uid.clone());
        let workload = Arc::new(workload);
        for ip in owned_addresses(&workload) {
            put_in_bucket(&mut self.by_ip, ip, workload.clone(), |w| (Reverse(ownership(w)), w.uid.clone()));
        }
        if let Some(name) = own_name(&workload) {
            put_in_bucket(&mut self.by_name, name, workload.clone(), |w| w.uid.clone());
        }
        for (service, ports) in workload.services.iter() {
            let endpoint = Endpoint { workload: workload.clone(), ports: ports.clone() };
            self.endpoints.entry(service.clone()).or_default().insert(workload.uid.clone(), endpoint);
        }
        self.workloads.insert(workload.uid.clone(), workload);
        true
    }

    fn remove_workload(&mut self, uid: &str) -> bool {
        let Some(old) = self.workloads.remove(uid) else { return false };
        for ip in owned_addresses(&old) {
            take_from_bucket(&mut self.by_ip, ip, |w| *w.uid == *uid);
        }
        if let Some(name) = own_name(&old) {
            take_from_bucket(&mut self.by_name, name, |w| *w.uid == *uid);
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

    pub(super) fn put_service(&mut self, service: Service) -> bool {
        let key = service.key();
        if self.services.get(&key).is_some_and(|known| **known == service) {
            return false;
        }
        self.remove_service(&key);
        let service = Arc::new(service);
        let order = |s: &Service| s.key();
        for vip in &service.vips {
            put_in_bucket(&mut self.by_vip, vip.address, service.clone(), order);
        }
        for range in &service.cidr_vips {
            if put_in_bucket(&mut self.by_range, range.cidr, service.clone(), order) {
                *self.range_lengths.entry(length_of(&range.cidr)).or_insert(0) += 1;
            }
        }
        put_in_bucket(&mut self.by_hostname, service.hostname.clone(), service.clone(), order);
        self.services.insert(key, service);
        true
    }

    fn remove_service(&mut self, key: &NamespacedHostname) -> bool {
        let Some(old) = self.services.remove(key) else { return false };
        let is_it = |s: &Service| s.namespace == key.namespace && s.hostname == key.hostname;
        for vip in &old.vips {
            take_from_bucket(&mut self.by_vip, vip.address, is_it);
        }
        for range in &old.cidr_vips {
            if take_from_bucket(&mut self.by_range, range.cidr, is_it) {
                let length = length_of(&range.cidr);
                if let Some(count) = self.range_lengths.get_mut(&length) {
                    *count -= 1;
                    if *count == 0 {
                        self.range_lengths.remove(&length);
                    }
                }
            }
        }
        take_from_bucket(&mut self.by_hostname, old.hostname.clone(), is_it);
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
            for service in self.by_range.get(&range).map(|bucket| &**bucket).unwrap_or_default() {
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
    let Workload { namespace, hostname, .. } = workload;
    (!hostname.is_empty()).then(|| NamespacedHostname { namespace: namespace.clone(), hostname: hostname.clone() })
}

/// Of several workloads on one address: a captured pod, a pod, something that speaks HBONE, anything.
fn ownership(workload: &Workload) -> u8 {
    let pod = workload.uid.contains("//Pod/");
    u8::from(pod) * 2 + u8::from(workload.protocol == TunnelProtocol::Hbone)
}

/// Puts `item` into its bucket, sorted by `order`; false when it is there already (one resource may name a key twice).
fn put_in_bucket<K, T, O>(index: &mut HashMap<K, Bucket<T>>, key: K, item: Arc<T>, order: impl Fn(&T) -> O) -> bool
where
    K: std::hash::Hash + Eq + Clone,
    O: Ord,
{
    match index.get_mut(&key) {
        None => {
            index.insert(key, Arc::new([item]));
            true
        }
        Some(bucket) => match bucket.binary_search_by_key(&order(&item), |known| order(known)) {
            Ok(_) => false,
            Err(position) => {
                let (before, after) = bucket.split_at(position);
                *bucket = before.iter().cloned().chain([item]).chain(after.iter().cloned()).collect();
                true
            }
        },
    }
}

/// Takes what `is_it` names out of its bucket; false when it was not there.
fn take_from_bucket<K, T>(index: &mut HashMap<K, Bucket<T>>, key: K, is_it: impl Fn(&T) -> bool) -> bool
where
    K: std::hash::Hash + Eq + Clone,
{
    let Some(bucket) = index.get_mut(&key) else { return false };
    let rest: Bucket<T> = bucket.iter().filter(|item| !is_it(item)).cloned().collect();
    let found = rest.len() < bucket.len();
    if rest.is_empty() {
        index.remove(&key);
    } else {
        *bucket = rest;
    }
    found
}
