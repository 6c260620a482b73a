//! Which endpoint gets the next request: least request.
//!
//! Two candidates, neighbours in rotation, are compared by requests in flight over capacity, and the less loaded one is
//! taken. Idle endpoints therefore take turns (round robin), busy ones are passed over (power of two choices), and both
//! hold per request, not per connection.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use mesh::identity::Identity;
use mesh::model::{NamespacedHostname, TunnelProtocol, Workload};
use mesh::store::Snapshot;

/// One pod behind a service port.
#[derive(Debug)]
pub struct Endpoint {
    pub workload: Arc<Workload>,
    /// Who it must prove to be. `None` when its resource names no valid identity: such an endpoint has no tunnel.
    pub identity: Option<Identity>,
    /// Pod IP and target port.
    pub address: SocketAddr,
    active: Arc<AtomicU32>,
}

impl Endpoint {
    pub fn hbone(&self) -> bool {
        self.workload.protocol == TunnelProtocol::Hbone
    }

    fn new(workload: Arc<Workload>, address: SocketAddr, active: Arc<AtomicU32>) -> Arc<Self> {
        let identity = workload.identity().ok();
        Arc::new(Self { workload, identity, address, active })
    }

    /// Addressed directly, outside any service.
    pub fn direct(workload: Arc<Workload>, address: SocketAddr) -> Arc<Self> {
        Self::new(workload, address, Arc::default())
    }

    fn load(&self) -> u64 {
        let capacity = u64::from(self.workload.capacity.max(1));
        (u64::from(self.active.load(Ordering::Relaxed)) + 1) * 1_000_000 / capacity
    }

    /// Counts a request in flight until the value is dropped.
    pub fn begin(&self) -> InFlight {
        self.active.fetch_add(1, Ordering::Relaxed);
        InFlight(self.active.clone())
    }
}

/// A request in flight.
#[derive(Debug)]
pub struct InFlight(Arc<AtomicU32>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The endpoints of one service port at one version of the world.
#[derive(Debug)]
struct Group {
    version: u64,
    endpoints: Vec<Arc<Endpoint>>,
    next: AtomicUsize,
}

/// The balancer of one worker. Groups are rebuilt when the world has moved on, keeping the counts in flight.
#[derive(Debug, Default)]
pub struct Balancer {
    /// Where addresses mean what they mean here: those of other networks are somebody else's.
    network: Arc<str>,
    groups: Mutex<HashMap<(NamespacedHostname, u16), Arc<Group>>>,
}

impl Balancer {
    pub fn new(network: Arc<str>) -> Self {
        Self { network, groups: Mutex::default() }
    }

    /// The endpoint for the next request to `port` of `service`, leaving out those in `tried` while there are others.
    /// `None` when there is no healthy endpoint.
    pub fn pick(
        &self,
        world: &Snapshot,
        service: &NamespacedHostname,
        port: u16,
        tried: &BTreeSet<SocketAddr>,
    ) -> Option<Arc<Endpoint>> {
        let group = self.group(world, service, port);
        let fresh = || group.endpoints.iter().filter(|e| !tried.contains(&e.address));
        let candidates: Vec<&Arc<Endpoint>> = match tried.is_empty() || fresh().next().is_none() {
            true => group.endpoints.iter().collect(),
            false => fresh().collect(),
        };
        let first = group.next.fetch_add(1, Ordering::Relaxed);
        let at = |i: usize| candidates.get(i % candidates.len().max(1)).copied();
        let (a, b) = (at(first)?, at(first.wrapping_add(1))?);
        Some(if b.load() < a.load() { b.clone() } else { a.clone() })
    }

    fn group(&self, world: &Snapshot, service: &NamespacedHostname, port: u16) -> Arc<Group> {
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (service.clone(), port);
        if let Some(group) = groups.get(&key).filter(|g| g.version == world.version()) {
            return group.clone();
        }
        let old = groups.get(&key);
        let group = Arc::new(Group {
            version: world.version(),
            endpoints: endpoints(world, &self.network, (service, port), old.map(|g| &**g)),
            next: AtomicUsize::new(old.map_or(0, |g| g.next.load(Ordering::Relaxed))),
        });
        if group.endpoints.is_empty() {
            groups.remove(&key);
        } else {
            groups.insert(key, group.clone());
        }
        group
    }
}

fn endpoints(
    world: &Snapshot,
    network: &str,
    (service, port): (&NamespacedHostname, u16),
    old: Option<&Group>,
) -> Vec<Arc<Endpoint>> {
    let Some(of_service) = world.service(service) else { return Vec::new() };
    let Some(declared) = of_service.ports.get(&port) else { return Vec::new() };
    let mut list = Vec::new();
    for (workload, ports) in world.endpoints(service).filter(|(w, _)| w.capacity > 0 && *w.network == *network) {
        let Some(ip) = workload.addresses.first() else { continue };
        // The endpoint's own mapping wins: a named port may differ from pod to pod.
        let Some(target) = ports.target(port).or(Some(declared.target_port).filter(|p| *p != 0)) else { continue };
        let address = SocketAddr::new(*ip, target);
        let known =
            old.and_then(|g| g.endpoints.iter().find(|e| e.address == address && e.workload.uid == workload.uid));
        let active = known.map_or_else(Arc::default, |e| e.active.clone());
        list.push(Endpoint::new(workload.clone(), address, active));
    }
    list.sort_by_key(|e| e.address);
    list
}

#[cfg(test)]
mod tests {
    use mesh::model::{AppProtocol, EndpointPort, Service, ServicePort, Template};
    use mesh::store::{Store, Update};

    use super::*;

    fn world(pods: &[(&str, u32)]) -> (Arc<Store>, NamespacedHostname) {
        let key = NamespacedHostname::new("shop", "server.shop.svc.cluster.local");
        let store = Store::new();
        let mut update = Update::new().service(Service {
            name: "server".into(),
            namespace: "shop".into(),
            hostname: key.hostname.clone(),
            ports: [(80, ServicePort { target_port: 8080, ..Default::default() })].into(),
            ..Default::default()
        });
        for (ip, capacity) in pods {
            let port = EndpointPort { service_port: 80, target_port: 8080, app_protocol: AppProtocol::Unknown };
            update = update.workload(Workload {
                uid: format!("c//Pod/shop/{ip}").into(),
                addresses: vec![ip.parse().expect("ip")],
                template: Arc::new(Template {
                    capacity: *capacity,
                    services: [(key.clone(), [port].into_iter().collect())].into(),
                    ..Default::default()
                }),
                ..Default::default()
            });
        }
        store.apply(update);
        (store, key)
    }

    #[test]
    fn idle_endpoints_take_turns_and_busy_ones_are_passed_over() {
        let (store, key) = world(&[("10.0.0.1", 1), ("10.0.0.2", 1), ("10.0.0.3", 1)]);
        let balancer = Balancer::default();
        let pick = || balancer.pick(&store.snapshot(), &key, 80, &BTreeSet::new()).expect("endpoint");
        let turn: BTreeSet<_> = (0..3).map(|_| pick().address).collect();
        assert_eq!(turn.len(), 3, "every endpoint has had its turn");
        let busy = pick();
        let _held: Vec<_> = (0..10).map(|_| busy.begin()).collect();
        assert!((0..30).all(|_| pick().address != busy.address));
    }

    #[test]
    fn a_tried_endpoint_is_left_out_while_there_are_others() {
        let (store, key) = world(&[("10.0.0.1", 1), ("10.0.0.2", 1)]);
        let balancer = Balancer::default();
        let tried: BTreeSet<_> = ["10.0.0.1:8080".parse().expect("address")].into();
        for _ in 0..4 {
            let picked = balancer.pick(&store.snapshot(), &key, 80, &tried).expect("endpoint");
            assert_eq!(picked.address.to_string(), "10.0.0.2:8080");
        }
    }

    #[test]
    fn an_address_of_another_network_is_not_dialled() {
        let (store, key) = world(&[("10.0.0.1", 1)]);
        let pick = |network: &str| Balancer::new(network.into()).pick(&store.snapshot(), &key, 80, &BTreeSet::new());
        assert!(pick("").is_some());
        assert!(pick("east").is_none());
    }

    #[test]
    fn without_endpoints_or_port_there_is_nothing_to_pick() {
        let (store, key) = world(&[("10.0.0.1", 0)]);
        let balancer = Balancer::default();
        assert!(balancer.pick(&store.snapshot(), &key, 80, &BTreeSet::new()).is_none(), "capacity 0 is never used");
        assert!(balancer.pick(&store.snapshot(), &key, 81, &BTreeSet::new()).is_none());
    }
}
