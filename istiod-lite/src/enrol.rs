//! Which pods belong to the mesh, and the life cycle of the annotation that says so.
//!
//! Joining: the enrolment is pushed to the pod's node, its proxy reports ENROLLED, the annotation is set, and *because
//! of the annotation* the workload says HBONE. Leaving: the annotation goes, the workload says NONE, proxies
//! acknowledge (or [`LEAVE_DEADLINE`] passes), then the enrolment is withdrawn. So peers never speak HBONE to a pod that
//! does not answer it.
//!
//! ```text
//!             wanted            report ENROLLED          not wanted            annotation gone, peers acked
//!  outside ───────────► pushed ────────────────► in mesh ───────────► leaving ─────────────────────────────► outside
//! ```
//! The state is in the API and in the nodes' reports; a restarted control plane goes on from there. So does another replica
//! that a node comes to: it is told everything anew.

pub mod notices;
pub mod rules;
pub mod turns;

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use imbl::OrdMap;
use imbl::ordmap::DiffItem;
use k8s_openapi::api::core::v1::Namespace;
use mesh_proto::enrolment::PodState;
use mesh_proto::enrolment::pod_state::State;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::resources::{ReportSink, lock};
use crate::translate::world::{Table, World, differing, in_namespace};
use crate::types::{Held, Key, Pod, annotation};

/// On pods: `enabled` = answers HBONE; `pending` = its node could not capture it.
pub const REDIRECTION: &str = "ambient.istio.io/redirection";
/// How long peers get to learn that a pod left before its enrolment is withdrawn anyway.
pub const LEAVE_DEADLINE: Duration = Duration::from_secs(5);
/// How long a node may look for a pod before the user is told.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// The labels ask for it and nothing forbids it.
pub fn is_wanted(world: &World, pod: &Pod) -> bool {
    rules::judge(world, pod).is_ok()
}

/// A change to make to a pod's annotation; `None` removes it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Annotate {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    /// The version of the pod this was decided on.
    pub version: String,
    pub value: Option<&'static str>,
}

/// What was written and has not come back by the watch yet, so that it is not written again meanwhile.
#[derive(Debug, Default)]
pub struct Written(Vec<Annotate>);

impl Written {
    /// Those of `changes`, all that differs now, that are still to be written.
    pub fn remaining(&mut self, changes: Vec<Annotate>) -> Vec<Annotate> {
        let known: HashSet<Annotate> = std::mem::take(&mut self.0).into_iter().collect();
        let (written, remaining) = changes.into_iter().partition(|change| known.contains(change));
        self.0 = written;
        remaining
    }

    /// The API has taken `change`.
    pub fn add(&mut self, change: Annotate) {
        self.0.push(change);
    }
}

/// What a node last said about a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heard {
    pub state: State,
    pub reason: String,
    /// Which stay of the pod in the mesh it is about.
    epoch: u64,
    /// Since when it has said so.
    since: Instant,
}

impl Heard {
    /// Has the node been looking for the pod for longer than starting one takes?
    pub fn is_overdue(&self, now: Instant) -> bool {
        self.state == State::Pending && now >= self.since + PATIENCE
    }
}

/// What a node said last.
#[derive(Debug)]
struct NodeReport {
    at: Instant,
    /// By pod UID.
    pods: BTreeMap<String, Heard>,
}

/// What all nodes say that are connected to this replica.
#[derive(Debug, Default)]
struct Said {
    nodes: HashMap<String, NodeReport>,
    /// UIDs of pods that a node is looking for.
    pending: BTreeMap<String, BTreeSet<String>>,
    /// UIDs of pods of which something else was said since [`Attention`] looked.
    news: BTreeSet<String>,
}

/// What node proxies say. The sink side of the report service.
#[derive(Debug, Default)]
pub struct Reports {
    said: Mutex<Said>,
    changed: Notify,
}

impl Reports {
    /// What `node`, the node it runs on, says about a pod in its present stay. What it said of an earlier one is not
    /// known to be true any more.
    pub fn of(&self, world: &World, node: &str, uid: &str) -> Option<Heard> {
        let epoch = world.epochs.get(uid).copied().unwrap_or_default();
        lock(&self.said).nodes.get(node)?.pods.get(uid).filter(|heard| heard.epoch == epoch).cloned()
    }

    /// When `node` has last said anything; `None`: it is not connected to this replica.
    pub fn last(&self, node: &str) -> Option<Instant> {
        lock(&self.said).nodes.get(node).map(|report| report.at)
    }

    /// UIDs of pods that a node has said something else of since the last call, or is looking for.
    fn news(&self) -> BTreeSet<String> {
        let mut said = lock(&self.said);
        let mut news = std::mem::take(&mut said.news);
        news.extend(said.pending.values().flatten().cloned());
        news
    }

    /// Is any node still looking for a pod? Then time alone makes news.
    pub fn any_pending(&self) -> bool {
        lock(&self.said).pending.values().any(|pods| !pods.is_empty())
    }

    /// Resolves after the next report.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }
}

impl ReportSink for Reports {
    fn report(&self, node: &str, states: Vec<PodState>) {
        let now = Instant::now();
        let mut all = lock(&self.said);
        let Said { nodes, pending, news } = &mut *all;
        let known = nodes.remove(node).map(|report| report.pods).unwrap_or_default();
        let mut next = BTreeMap::new();
        for said in states {
            let mut heard = Heard { state: said.state(), reason: said.reason, epoch: said.epoch, since: now };
            let before = known.get(&said.uid);
            if let Some(before) = before.filter(|b| b.state == heard.state && b.epoch == heard.epoch) {
                heard.since = before.since;
            }
            if before != Some(&heard) {
                if !heard.reason.is_empty() {
                    tracing::warn!(node, pod.uid = said.uid, state = ?heard.state, reason = heard.reason, "pod not enrolled");
                }
                news.insert(said.uid.clone());
            }
            next.insert(said.uid, heard);
        }
        news.extend(known.keys().filter(|uid| !next.contains_key(*uid)).cloned());
        let looked_for = next.iter().filter(|(_, heard)| heard.state == State::Pending).map(|(uid, _)| uid.clone());
        pending.insert(node.to_owned(), looked_for.collect());
        nodes.insert(node.to_owned(), NodeReport { at: now, pods: next });
        drop(all);
        self.changed.notify_one();
    }

    /// It is another replica that it tells from now on, if any: what it has told us would only grow old. What came of it
    /// is written.
    fn disconnected(&self, node: &str) {
        let mut all = lock(&self.said);
        all.pending.remove(node);
        if let Some(report) = all.nodes.remove(node) {
            all.news.extend(report.pods.into_keys());
        }
        drop(all);
        self.changed.notify_one();
    }
}

/// Which pods something may have to be written about: those that changed, with their namespace or by what their node says,
/// since they were looked at last, those whose node is looking for them, and those that are not done with.
#[derive(Debug, Default)]
pub struct Attention {
    pods: Table<Pod>,
    namespaces: Table<Namespace>,
    epochs: OrdMap<String, u64>,
    by_uid: HashSet<ByUid>,
    open: BTreeSet<Key>,
    /// What we have written into annotations and the watch has not brought yet.
    ours: HashMap<Key, Vec<Option<&'static str>>>,
    /// When somebody else was seen to write another value in the place of one.
    overruled: HashMap<Key, Instant>,
}

/// A pod that is looked for by its UID: there are very many, and this is a pointer.
#[derive(Debug)]
struct ByUid(Held<Pod>);

impl Borrow<str> for ByUid {
    fn borrow(&self) -> &str {
        self.0.uid.as_deref().unwrap_or_default()
    }
}

impl Hash for ByUid {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Borrow::<str>::borrow(self).hash(state);
    }
}

impl PartialEq for ByUid {
    fn eq(&self, other: &Self) -> bool {
        self.0.uid == other.0.uid
    }
}

impl Eq for ByUid {}

impl Attention {
    /// The pods to look at now, and the UIDs of those that are gone.
    pub fn turn(&mut self, world: &World, reports: &Reports) -> (BTreeSet<Key>, Vec<String>) {
        let mut stale = std::mem::take(&mut self.open);
        let mut gone = Vec::new();
        let before = std::mem::take(&mut self.pods);
        for (key, was, is) in differing(&before, &world.pods) {
            let uid = |pod: Option<&Pod>| pod.and_then(|pod| pod.uid.clone());
            let (values, was, is) = ((value(was), value(is)), uid(was), uid(is));
            if was == is {
                self.note_value(key, values.0, values.1);
            } else {
                gone.extend(was.inspect(|uid| _ = self.by_uid.remove(&**uid)).map(|uid| uid.to_string()));
                self.ours.remove(key);
                self.overruled.remove(key);
            }
            if let Some(pod) = world.pods.get(key).filter(|pod| pod.uid.is_some()) {
                self.by_uid.replace(ByUid(pod.clone()));
            }
            stale.insert(key.clone());
        }
        for (namespace, _, _) in differing(&self.namespaces, &world.namespaces) {
            stale.extend(in_namespace(&world.pods, &namespace.name).map(|(key, _)| key.clone()));
        }
        let mut uids = reports.news();
        uids.extend(self.epochs.diff(&world.epochs).map(|item| match item {
            DiffItem::Add(uid, _) | DiffItem::Update { new: (uid, _), .. } | DiffItem::Remove(uid, _) => uid.clone(),
        }));
        stale.extend(uids.iter().filter_map(|uid| self.by_uid.get(&**uid)).map(|of| of.0.key.clone()));
        self.pods = world.pods.clone();
        self.namespaces = world.namespaces.clone();
        self.epochs = world.epochs.clone();
        (stale, gone)
    }

    /// The watch brought another value of a pod's annotation. Ours come back in the order in which they were written, or
    /// the last of them alone.
    fn note_value(&mut self, key: &Key, was: Option<&str>, is: Option<&str>) {
        if was == is {
            return;
        }
        let ours = self.ours.get_mut(key);
        let written = ours.and_then(|ours| Some((ours.iter().position(|value| *value == is)?, ours)));
        match written {
            Some((last, ours)) => _ = ours.drain(..=last),
            None if was.is_some() && is.is_some() => _ = self.overruled.insert(key.clone(), Instant::now()),
            None => {}
        }
        if self.ours.get(key).is_some_and(Vec::is_empty) {
            self.ours.remove(key);
        }
    }

    /// The API has taken `change`.
    pub fn wrote(&mut self, change: &Annotate) {
        self.ours.entry(Key::new(&*change.namespace, &*change.name)).or_default().push(change.value);
    }

    /// Somebody else has heard of the pod's node later than we at `last`: it may be connected to another replica too,
    /// where its next ztunnel reports, or nobody has noticed yet that it is not connected here any more.
    fn is_overruled(&self, pod: &Key, last: Instant) -> bool {
        self.overruled.get(pod).is_some_and(|at| *at > last)
    }

    /// Looks at the pod again next time, whatever happens.
    pub fn keep(&mut self, namespace: &str, name: &str) {
        self.open.insert(Key::new(namespace, name));
    }
}

fn value(pod: Option<&Pod>) -> Option<&str> {
    annotation(pod?, REDIRECTION)
}

/// The annotations of `pods` to change so that they say what is the case.
pub fn annotations(world: &World, reports: &Reports, attention: &Attention, pods: &BTreeSet<Key>) -> Vec<Annotate> {
    let pods = pods.iter().filter_map(|key| world.pods.get(key));
    pods.filter_map(|pod| annotate(world, pod, reports, attention)).collect()
}

fn annotate(world: &World, pod: &Pod, reports: &Reports, attention: &Attention) -> Option<Annotate> {
    let uid = pod.uid.as_deref()?;
    let current = annotation(pod, REDIRECTION);
    let judged = rules::judge(world, pod);
    if judged == Err(rules::Outside::NamespaceUnknown) {
        return None;
    }
    let wanted = if judged.is_ok() {
        let node = pod.node()?;
        let is_late = || reports.last(node).is_some_and(|last| attention.is_overruled(&pod.key, last));
        match reports.of(world, node, uid).map(|heard| heard.state) {
            Some(State::Enrolled | State::Failed) if current.is_some() && is_late() => return None,
            Some(State::Enrolled) => Some("enabled"),
            // Its node gave up on it: it does not answer HBONE.
            Some(State::Failed) => Some("pending"),
            // Not heard of, or its proxy has just restarted: capture outlives the proxy, so what was true stays.
            _ => return None,
        }
    } else {
        None
    };
    (current != wanted).then(|| Annotate {
        namespace: pod.key.namespace.to_string(),
        name: pod.key.name.to_string(),
        uid: uid.to_owned(),
        version: pod.version.to_string(),
        value: wanted,
    })
}

/// Remembers which pods are leaving. The driver tells it each generation and which of them peers have acknowledged.
#[derive(Debug, Default)]
pub struct Leaving {
    /// Those that were seen last.
    pods: Table<Pod>,
    /// By UID.
    waiting: BTreeMap<String, Parting>,
}

#[derive(Debug)]
struct Parting {
    pod: Key,
    /// The generation that first said NONE, once published.
    since: Option<u64>,
}

impl Leaving {
    /// Before translation: notes pods whose annotation has just gone. Returns those whose enrolment is held.
    pub fn observe(&mut self, world: &World) -> Arc<BTreeSet<String>> {
        let is_annotated = |pod: &Pod| annotation(pod, REDIRECTION).is_some();
        for (_, was, is) in differing(&self.pods, &world.pods) {
            // Of another UID: another pod.
            let was = was.filter(|was| match is.is_some_and(|is| is.uid == was.uid) {
                true => true,
                false => {
                    was.uid.as_deref().and_then(|uid| self.waiting.remove(uid));
                    false
                }
            });
            let Some((pod, uid)) = is.and_then(|is| Some((is, is.uid.as_deref()?))) else { continue };
            if is_annotated(pod) {
                self.waiting.remove(uid);
            } else if was.is_some_and(is_annotated) && !is_wanted(world, pod) {
                self.waiting.entry(uid.to_owned()).or_insert_with(|| Parting { pod: pod.key.clone(), since: None });
            }
        }
        self.pods = world.pods.clone();
        Arc::new(self.waiting.keys().cloned().collect())
    }

    /// After publication: pods (UID, name) that now say NONE in `generation`. Peers' acknowledgement of it is to be awaited.
    pub fn published(&mut self, generation: u64) -> Vec<(String, Key)> {
        let fresh = self.waiting.iter_mut().filter(|(_, parting)| parting.since.is_none());
        fresh
            .map(|(uid, parting)| {
                parting.since = Some(generation);
                (uid.clone(), parting.pod.clone())
            })
            .collect()
    }

    /// Peers know of `generation`, or the deadline passed. A pod that came back and left again since waits for its own.
    pub fn acknowledged(&mut self, generation: u64, uids: &[String]) {
        for uid in uids {
            if self.waiting.get(uid).is_some_and(|parting| parting.since == Some(generation)) {
                self.waiting.remove(uid);
            }
        }
    }
}

/// Tells the stays of a pod in the mesh apart, so that what a node said of one is not believed of the next: a pod that
/// leaves and comes back within a moment may be reported as it was before.
#[derive(Debug, Default)]
pub struct Stays {
    /// By UID, of pods that have been outside.
    epochs: OrdMap<String, u64>,
    /// Those that were seen last.
    pods: Table<Pod>,
    started: bool,
}

impl Stays {
    /// The stays as of the next translation.
    pub fn epochs(&self) -> OrdMap<String, u64> {
        self.epochs.clone()
    }

    /// After a translation that enrols the pods of the UIDs `enrolled`, if it has translated them, and no longer those
    /// `withdrawn`: who is outside and was not before, or is when we start and may have been, begins another stay when it
    /// joins. `now` (milliseconds since 1970) names it, so that it is another one also after a restart of the control
    /// plane.
    pub fn observe(&mut self, world: &World, enrolled: &HashSet<&str>, withdrawn: &HashSet<&str>, now: u64) {
        let uid = |pod: &Pod| Some(pod.uid.as_deref()?.to_owned());
        if !std::mem::replace(&mut self.started, true) {
            let outside = world.pods.values().filter_map(|pod| uid(pod)).filter(|uid| !enrolled.contains(&**uid));
            self.epochs = outside.map(|uid| (uid, now)).collect();
        }
        let mut gone = HashSet::new();
        for (_, was, is) in differing(&self.pods, &world.pods) {
            let was = was.and_then(uid).filter(|was| is.is_none_or(|is| is.uid.as_deref() != Some(was)));
            gone.extend(was);
        }
        for uid in withdrawn.iter().filter(|uid| !gone.contains(**uid)) {
            self.epochs.insert((*uid).to_owned(), now);
        }
        for uid in &gone {
            self.epochs.remove(uid);
        }
        self.pods = world.pods.clone();
    }
}

#[cfg(test)]
mod tests {
    use super::rules::DATAPLANE_MODE;
    use super::*;
    use serde_json::json;

    fn world(namespace_mode: Option<&str>, annotations: serde_json::Value) -> World {
        let mut world = World::default();
        let namespace =
            json!({"metadata": {"name": "shop", "labels": {DATAPLANE_MODE: namespace_mode.unwrap_or("x")}}});
        let pod = json!({
            "metadata": {"name": "a", "namespace": "shop", "uid": "u1", "annotations": annotations},
            "spec": {"nodeName": "n1", "containers": []},
        });
        world.namespaces.insert(Key::new("", "shop"), Held::new(serde_json::from_value(namespace).unwrap()));
        world.pods.insert(Key::new("shop", "a"), Held::new(Pod::new(serde_json::from_value(pod).unwrap())));
        world
    }

    fn state(state: State) -> PodState {
        PodState { uid: "u1".into(), state: state.into(), ..PodState::default() }
    }

    /// Of all pods.
    fn all(world: &World, reports: &Reports) -> Vec<Annotate> {
        annotations(world, reports, &Attention::default(), &world.pods.keys().cloned().collect())
    }

    fn value(world: &World, reports: &Reports) -> Option<Option<&'static str>> {
        all(world, reports).pop().map(|change| change.value)
    }

    #[test]
    fn looks_at_what_changed_and_at_nothing_else() {
        let (outside, inside) = (world(Some("none"), json!({})), world(Some("ambient"), json!({})));
        let (mut attention, reports) = (Attention::default(), Reports::default());
        let mut stale = |world: &World| attention.turn(world, &reports).0.len();
        assert_eq!(stale(&outside), 1, "it is new");
        assert_eq!(stale(&outside), 0);
        let labelled = World { namespaces: inside.namespaces.clone(), ..outside.clone() };
        assert_eq!(stale(&labelled), 1, "its namespace");
        reports.report("n1", vec![state(State::Enrolled)]);
        assert_eq!(stale(&labelled), 1, "what its node says");
        reports.report("n1", vec![state(State::Enrolled)]);
        assert_eq!(stale(&labelled), 0, "it says the same again");
        reports.report("n1", vec![state(State::Pending)]);
        assert_eq!((stale(&labelled), stale(&labelled)), (1, 1), "time alone makes news");
        reports.report("n1", vec![]);
        assert_eq!((stale(&labelled), stale(&labelled)), (1, 0));
        let again = World { epochs: [("u1".to_owned(), 7_u64)].into_iter().collect(), ..labelled.clone() };
        assert_eq!((stale(&again), stale(&again)), (1, 0), "another stay");
        attention.keep("shop", "a");
        assert_eq!(attention.turn(&again, &reports), ([Key::new("shop", "a")].into(), vec![]), "not done with");
        assert_eq!(attention.turn(&World::default(), &reports).1, ["u1"], "it is gone");
    }

    #[test]
    fn annotates_only_after_the_pods_own_node_reports_it() {
        let (world, reports) = (world(Some("ambient"), json!({})), Reports::default());
        assert_eq!(value(&world, &reports), None, "nothing reported");
        reports.report("n2", vec![state(State::Enrolled)]);
        assert_eq!(value(&world, &reports), None, "another node's word counts for nothing");
        reports.report("n1", vec![state(State::Pending)]);
        assert_eq!(value(&world, &reports), None);
        reports.report("n1", vec![state(State::Enrolled)]);
        assert_eq!(value(&world, &reports), Some(Some("enabled")));
    }

    #[test]
    fn a_restarted_proxy_does_not_take_its_pods_out() {
        let (world, reports) = (world(Some("ambient"), json!({REDIRECTION: "enabled"})), Reports::default());
        assert_eq!(value(&world, &reports), None);
        reports.report("n1", vec![]);
        assert_eq!(value(&world, &reports), None);
        reports.report("n1", vec![state(State::Failed)]);
        assert_eq!(value(&world, &reports), Some(Some("pending")));
    }

    #[test]
    fn what_a_node_said_is_its_next_replicas_to_write() {
        let (mut world, reports) = (world(Some("ambient"), json!({})), Reports::default());
        reports.report("n1", vec![state(State::Enrolled)]);
        assert!(reports.last("n1").is_some());
        reports.disconnected("n1");
        assert_eq!((value(&world, &reports), reports.last("n1")), (None, None));
        world.epochs.insert("u1".into(), 5);
        reports.report("n1", vec![PodState { epoch: 5, ..state(State::Failed) }]);
        assert_eq!(value(&world, &reports), Some(Some("pending")), "and it comes back");
    }

    /// A node whose next ztunnel reports to another replica, while its former one is still connected to us.
    #[tokio::test(start_paused = true)]
    async fn two_replicas_do_not_write_against_each_other() {
        let (reports, mut attention) = (Reports::default(), Attention::default());
        let turn = |attention: &mut Attention, value: serde_json::Value| {
            let world = world(Some("ambient"), json!({REDIRECTION: value}));
            let (stale, _) = attention.turn(&world, &reports);
            annotations(&world, &reports, attention, &stale).pop().map(|change| change.value)
        };
        reports.report("n1", vec![state(State::Enrolled)]);
        let wait = || tokio::time::advance(Duration::from_secs(1));
        wait().await;
        assert_eq!(turn(&mut attention, json!("enabled")), None);
        assert_eq!(turn(&mut attention, json!("pending")), None, "somebody has heard otherwise since");
        wait().await;
        reports.report("n1", vec![state(State::Enrolled)]);
        attention.keep("shop", "a");
        let change = turn(&mut attention, json!("pending"));
        assert_eq!(change, Some(Some("enabled")), "now we have");

        // What we have written ourselves, and heard otherwise before it came back, is no reason to be silent.
        let world = world(Some("ambient"), json!({REDIRECTION: "pending"}));
        attention.wrote(&annotations(&world, &reports, &attention, &[Key::new("shop", "a")].into())[0]);
        reports.report("n1", vec![state(State::Failed)]);
        wait().await;
        assert_eq!(turn(&mut attention, json!("enabled")), Some(Some("pending")));
    }

    #[test]
    fn removing_the_label_removes_the_annotation_first() {
        let reports = Reports::default();
        reports.report("n1", vec![state(State::Enrolled)]);
        assert_eq!(value(&world(None, json!({REDIRECTION: "enabled"})), &reports), Some(None));
        assert_eq!(value(&world(None, json!({})), &reports), None);
    }

    #[test]
    fn a_namespace_that_is_not_known_takes_no_pod_out() {
        let reports = Reports::default();
        reports.report("n1", vec![state(State::Enrolled)]);
        let mut world = world(Some("ambient"), json!({REDIRECTION: "enabled"}));
        world.namespaces = Table::default();
        assert_eq!(value(&world, &reports), None);
    }

    #[test]
    fn a_leaving_pod_is_held_until_peers_know() {
        let mut leaving = Leaving::default();
        assert!(leaving.observe(&world(Some("ambient"), json!({REDIRECTION: "enabled"}))).is_empty());
        assert!(leaving.observe(&world(None, json!({REDIRECTION: "enabled"}))).is_empty(), "annotation still there");
        let gone = world(None, json!({}));
        assert!(leaving.observe(&gone).contains("u1"));
        assert_eq!(leaving.published(7), [("u1".to_owned(), Key::new("shop", "a"))]);
        assert!(leaving.published(8).is_empty(), "awaited once");
        assert!(leaving.observe(&gone).contains("u1"), "still held");
        leaving.acknowledged(7, &["u1".into()]);
        assert!(leaving.observe(&gone).is_empty());
    }

    #[test]
    fn coming_back_while_leaving_ends_the_leave() {
        let mut leaving = Leaving::default();
        leaving.observe(&world(Some("ambient"), json!({REDIRECTION: "enabled"})));
        assert!(leaving.observe(&world(None, json!({}))).contains("u1"));
        leaving.observe(&world(Some("ambient"), json!({REDIRECTION: "enabled"})));
        leaving.acknowledged(7, &["u1".into()]);
        assert!(leaving.observe(&world(Some("ambient"), json!({REDIRECTION: "enabled"}))).is_empty());
    }

    #[test]
    fn a_second_leave_does_not_end_with_the_first_ones_acknowledgement() {
        let (inside, gone) = (world(Some("ambient"), json!({REDIRECTION: "enabled"})), world(None, json!({})));
        let mut leaving = Leaving::default();
        leaving.observe(&inside);
        leaving.observe(&gone);
        assert_eq!(leaving.published(7).len(), 1);
        leaving.observe(&inside);
        leaving.observe(&gone);
        assert_eq!(leaving.published(9).len(), 1);
        leaving.acknowledged(7, &["u1".into()]);
        assert!(leaving.observe(&gone).contains("u1"), "peers may still believe that it speaks HBONE");
        leaving.acknowledged(9, &["u1".into()]);
        assert!(leaving.observe(&gone).is_empty());
    }

    #[test]
    fn an_annotation_is_written_once_however_late_the_watch_is() {
        let (world, reports) = (world(Some("ambient"), json!({})), Reports::default());
        reports.report("n1", vec![state(State::Enrolled)]);
        let mut written = Written::default();
        let first = written.remaining(all(&world, &reports));
        assert_eq!(first.len(), 1);
        written.add(first[0].clone());
        assert_eq!(written.remaining(all(&world, &reports)), [], "the watch has not brought it yet");
        reports.report("n1", vec![state(State::Failed)]);
        let second = written.remaining(all(&world, &reports));
        assert_eq!(second.iter().map(|change| change.value).collect::<Vec<_>>(), [Some("pending")]);
        reports.report("n1", vec![state(State::Enrolled)]);
        assert_eq!(written.remaining(all(&world, &reports)), first, "said otherwise since");
    }

    #[test]
    fn what_was_said_of_an_earlier_stay_counts_for_nothing() {
        let (mut inside, reports, mut stays) =
            (world(Some("ambient"), json!({})), Reports::default(), Stays::default());
        reports.report("n1", vec![state(State::Enrolled)]);
        let (none, one) = (HashSet::new(), HashSet::from(["u1"]));
        stays.observe(&inside, &one, &none, 1000);
        inside.epochs = stays.epochs();
        assert_eq!(value(&inside, &reports), Some(Some("enabled")), "its first stay");
        // Withdrawn and wanted again before its node has heard either.
        stays.observe(&inside, &none, &one, 2000);
        stays.observe(&inside, &none, &none, 2500);
        stays.observe(&inside, &one, &none, 3000);
        inside.epochs = stays.epochs();
        assert_eq!(inside.epochs.get("u1"), Some(&2000), "from when it was withdrawn");
        assert_eq!(value(&inside, &reports), None, "the node speaks of the first stay");
        reports.report("n1", vec![PodState { epoch: 2000, ..state(State::Enrolled) }]);
        assert_eq!(value(&inside, &reports), Some(Some("enabled")));
        stays.observe(&World::default(), &none, &one, 4000);
        assert!(stays.epochs().is_empty(), "a pod that is gone is forgotten");
    }
}
