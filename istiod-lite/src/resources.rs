//! What `translate` produces and `push` sends, and the small interfaces through which the two halves of the control
//! plane know each other: the store of mesh resources, who has acknowledged which generation, which pod runs where,
//! and what node proxies report. Nothing here knows Kubernetes or gRPC.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use mesh_proto::enrolment::resolve_response::Verdict;
use mesh_proto::enrolment::{PodState, ResolveRequest};
use prost::Message;
use tokio::sync::watch;
use xxhash_rust::xxh64::xxh64;

/// Who may see a resource.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Audience {
    /// Every authenticated proxy.
    All,
    /// The node proxy whose pod runs on this node (`spec.nodeName` of the pod in the caller's bound token).
    Node(Arc<str>),
    /// The pods of one waypoint: `namespace` of the caller's token and the Gateway it belongs to.
    Waypoint { namespace: Arc<str>, name: Arc<str> },
}

/// One mesh resource, encoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    pub type_url: &'static str,
    pub name: Arc<str>,
    /// Hex xxh64 of `body`: equal bytes have equal versions, across restarts too.
    pub version: Arc<str>,
    /// The protobuf message (value of the `Any`).
    pub body: Bytes,
    /// Other names an on-demand client may ask for (`<network>/<ip>` of workloads and VIPs).
    pub aliases: Vec<Arc<str>>,
    /// Any of these may see it; never empty.
    pub audience: Vec<Audience>,
}

impl Resource {
    /// Encodes `message` as a resource that every proxy may see.
    pub fn new(type_url: &'static str, name: impl Into<Arc<str>>, message: &impl Message) -> Self {
        let body = Bytes::from(message.encode_to_vec());
        let version = format!("{:016x}", xxh64(&body, 0)).into();
        Self { type_url, name: name.into(), version, body, aliases: Vec::new(), audience: vec![Audience::All] }
    }

    /// Restricts who may see it.
    pub fn for_audience(mut self, audience: Vec<Audience>) -> Self {
        self.audience = audience;
        self
    }
}

/// All resources of one generation. Cheap to hold; never changes.
#[derive(Debug, Default)]
pub struct Snapshot {
    generation: u64,
    types: BTreeMap<&'static str, BTreeMap<Arc<str>, Arc<Resource>>>,
}

impl Snapshot {
    /// 0 until the first publication: nothing is known yet and nothing may be answered.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The resources of a type by name.
    pub fn of_type(&self, type_url: &str) -> impl Iterator<Item = &Arc<Resource>> + '_ {
        self.types.get(type_url).into_iter().flat_map(BTreeMap::values)
    }

    pub fn get(&self, type_url: &str, name: &str) -> Option<&Arc<Resource>> {
        self.types.get(type_url)?.get(name)
    }

    pub fn len(&self) -> usize {
        self.types.values().map(BTreeMap::len).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The published resources. Readers take a snapshot; one writer publishes.
#[derive(Debug)]
pub struct ResourceStore {
    current: ArcSwap<Snapshot>,
    generation: watch::Sender<u64>,
    publishing: Mutex<()>,
}

impl Default for ResourceStore {
    fn default() -> Self {
        Self::new()
    }
}

impl ResourceStore {
    pub fn new() -> Self {
        Self {
            current: ArcSwap::from_pointee(Snapshot::default()),
            generation: watch::Sender::new(0),
            publishing: Mutex::new(()),
        }
    }

    /// Makes `resources` the whole content. Resources whose version, audience and aliases did not change keep their
    /// identity (`Arc::ptr_eq`), so a reader can tell cheaply. Wakes subscribers when anything changed; the first
    /// publication always does. Returns the generation that holds `resources`.
    pub fn publish(&self, resources: impl IntoIterator<Item = Resource>) -> u64 {
        let _one_writer = lock(&self.publishing);
        let last = self.current.load_full();
        let mut types: BTreeMap<&'static str, BTreeMap<Arc<str>, Arc<Resource>>> = BTreeMap::new();
        let mut changed = last.generation == 0;
        let mut count = 0;
        for resource in resources {
            let kept = match last.get(resource.type_url, &resource.name) {
                Some(old) if **old == resource => Arc::clone(old),
                _ => {
                    changed = true;
                    Arc::new(resource)
                }
            };
            if types.entry(kept.type_url).or_default().insert(Arc::clone(&kept.name), kept).is_none() {
                count += 1;
            }
        }
        if !changed && count == last.len() {
            return last.generation;
        }
        let generation = last.generation + 1;
        self.current.store(Arc::new(Snapshot { generation, types }));
        self.generation.send_replace(generation);
        generation
    }

    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Changes to the current generation. The snapshot read after a wake-up is at least as new as the value seen.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    pub fn generation(&self) -> u64 {
        self.current.load().generation
    }
}

/// What each connected client has acknowledged and refused.
#[derive(Debug)]
pub struct Acks {
    clients: Mutex<HashMap<u64, Answers>>,
    next: AtomicU64,
    changed: watch::Sender<()>,
    refusals: watch::Sender<()>,
}

/// One client's.
#[derive(Debug, Default)]
struct Answers {
    /// The last generation, by type.
    acked: HashMap<String, u64>,
    /// Why, by type and name of a resource.
    refused: BTreeMap<(&'static str, Arc<str>), String>,
}

impl Default for Acks {
    fn default() -> Self {
        Self {
            clients: Mutex::default(),
            next: AtomicU64::new(0),
            changed: watch::Sender::new(()),
            refusals: watch::Sender::new(()),
        }
    }
}

impl Acks {
    /// Registers a connected client; it counts for a type from its first [`ClientAcks::subscribed`] on, until dropped.
    pub fn client(self: &Arc<Self>) -> ClientAcks {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.clients).insert(id, Answers::default());
        ClientAcks { acks: Arc::clone(self), id }
    }

    /// Waits until every client that listens to `type_url` has acknowledged `generation` or has gone; false when the
    /// deadline passed first.
    pub async fn wait_acked(&self, type_url: &str, generation: u64, deadline: Duration) -> bool {
        let mut changed = self.changed.subscribe();
        tokio::time::timeout(deadline, async {
            while !self.all_acked(type_url, generation) {
                if changed.changed().await.is_err() {
                    return;
                }
            }
        })
        .await
        .is_ok()
    }

    fn all_acked(&self, type_url: &str, generation: u64) -> bool {
        lock(&self.clients).values().filter_map(|of| of.acked.get(type_url)).all(|acked| *acked >= generation)
    }

    /// How many clients have refused what they were sent last of a resource, and what one of them says of it.
    pub fn refused(&self, type_url: &'static str, name: &str) -> Option<(usize, String)> {
        let place = (type_url, Arc::from(name));
        let clients = lock(&self.clients);
        let mut reasons = clients.values().filter_map(|of| of.refused.get(&place));
        let first = reasons.next()?.clone();
        Some((1 + reasons.count(), first))
    }

    pub fn any_refused(&self) -> bool {
        lock(&self.clients).values().any(|of| !of.refused.is_empty())
    }

    /// Changes when [`Self::refused`] may have.
    pub fn refusals(&self) -> watch::Receiver<()> {
        self.refusals.subscribe()
    }
}

/// One client's entries in [`Acks`]; dropping it takes them out.
#[derive(Debug)]
pub struct ClientAcks {
    acks: Arc<Acks>,
    id: u64,
}

impl ClientAcks {
    /// The client asked for `type_url` and is waited for from now on.
    pub fn subscribed(&self, type_url: &str) {
        if let Some(of) = lock(&self.acks.clients).get_mut(&self.id) {
            of.acked.entry(type_url.to_owned()).or_insert(0);
        }
    }

    /// The client has acknowledged everything of `type_url` up to `generation`, or that generation holds no change for
    /// it. A NACK counts: the good resources were applied.
    pub fn acked(&self, type_url: &str, generation: u64) {
        if let Some(of) = lock(&self.acks.clients).get_mut(&self.id) {
            let last = of.acked.entry(type_url.to_owned()).or_insert(0);
            *last = generation.max(*last);
        }
        self.acks.changed.send_replace(());
    }

    /// Of the resources `names` of one response the client has refused these, and taken the others.
    pub fn answered(&self, type_url: &'static str, names: Vec<Arc<str>>, mut refused: BTreeMap<Arc<str>, String>) {
        let mut changed = false;
        if let Some(of) = lock(&self.acks.clients).get_mut(&self.id) {
            for name in names {
                let now = refused.remove(&name);
                let place = (type_url, name);
                changed |= of.refused.get(&place) != now.as_ref();
                match now {
                    Some(reason) => _ = of.refused.insert(place, reason),
                    None => _ = of.refused.remove(&place),
                }
            }
        }
        if changed {
            self.acks.refusals.send_replace(());
        }
    }
}

impl Drop for ClientAcks {
    fn drop(&mut self) {
        let gone = lock(&self.acks.clients).remove(&self.id);
        self.acks.changed.send_replace(());
        if gone.is_some_and(|of| !of.refused.is_empty()) {
            self.acks.refusals.send_replace(());
        }
    }
}

/// What authorization needs to know of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodInfo {
    pub uid: Arc<str>,
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub service_account: Arc<str>,
    /// Empty until scheduled.
    pub node: Arc<str>,
    /// `status.phase`, empty if unset.
    pub phase: Arc<str>,
    pub labels: BTreeMap<String, String>,
}

/// Which pods run where, as the control plane knows it now.
pub trait PodDirectory: Send + Sync {
    /// True once the pods have been listed; until then callers are told to come back.
    fn synced(&self) -> bool;
    fn pod(&self, namespace: &str, name: &str) -> Option<PodInfo>;
    /// Whether some pod with `spec.nodeName == node`, not Failed and not Succeeded, has this identity.
    fn node_runs(&self, node: &str, namespace: &str, service_account: &str) -> bool;
}

/// Which pods are to be captured, as decided now: ahead of what has been pushed.
pub trait Placements: Send + Sync {
    /// About a pod that is placed on `node`; any other is unknown.
    fn resolve(&self, node: &str, pod: &ResolveRequest) -> Verdict;
    /// Changes whenever an answer may have changed.
    fn news(&self) -> watch::Receiver<u64>;
}

/// Where enrolment reports arrive. `node` is that of the pod in the caller's token, never what the caller says.
pub trait ReportSink: Send + Sync {
    /// The complete list of the node: a pod that is not named is not enrolled.
    fn report(&self, node: &str, states: Vec<PodState>);
    /// The node's last stream ended. What it reported stays believed: its capture outlives the stream.
    fn disconnected(&self, _node: &str) {}
}

/// A poisoned lock guards plain maps whose every state is valid, so the data is used on.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resource(name: &str, body: &str) -> Resource {
        Resource::new("t", name, &body.to_owned())
    }

    #[test]
    fn publishing_the_same_content_wakes_nobody() {
        let store = ResourceStore::new();
        let mut seen = store.subscribe();
        assert_eq!(store.publish([resource("a", "1")]), 1);
        assert!(seen.has_changed().unwrap());
        seen.mark_unchanged();
        assert_eq!(store.publish([resource("a", "1")]), 1);
        assert!(!seen.has_changed().unwrap());
    }

    #[test]
    fn the_first_publication_counts_even_when_empty() {
        let store = ResourceStore::new();
        assert_eq!(store.publish([]), 1);
        assert_eq!(store.publish([]), 1);
    }

    #[test]
    fn a_change_leaves_the_other_resources_shared() {
        let store = ResourceStore::new();
        store.publish([resource("a", "1"), resource("b", "1")]);
        let before = store.snapshot();
        store.publish([resource("a", "2"), resource("b", "1")]);
        let after = store.snapshot();
        assert!(Arc::ptr_eq(before.get("t", "b").unwrap(), after.get("t", "b").unwrap()));
        assert_ne!(before.get("t", "a").unwrap().version, after.get("t", "a").unwrap().version);
        assert_eq!(store.publish([resource("b", "1")]), 3, "a removal is a change");
    }

    #[test]
    fn a_changed_audience_is_a_change() {
        let store = ResourceStore::new();
        store.publish([resource("a", "1")]);
        let moved = resource("a", "1").for_audience(vec![Audience::Node("n".into())]);
        assert_eq!(store.publish([moved]), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn waits_for_every_listening_client_and_forgets_those_that_left() {
        let acks = Arc::new(Acks::default());
        let (one, two, other) = (acks.client(), acks.client(), acks.client());
        one.subscribed("t");
        two.subscribed("t");
        other.subscribed("else");
        one.acked("t", 5);
        assert!(!acks.wait_acked("t", 5, Duration::from_secs(5)).await);
        drop(two);
        assert!(acks.wait_acked("t", 5, Duration::from_secs(5)).await);
    }
}
