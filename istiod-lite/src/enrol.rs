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
//! The state is in the API and in the nodes' reports; a restarted control plane goes on from there.

pub mod notices;
pub mod rules;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use mesh_proto::enrolment::PodState;
use mesh_proto::enrolment::pod_state::State;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::resources::{ReportSink, lock};
use crate::translate::world::World;
use crate::types::annotation;

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

/// By pod UID.
type NodeReport = BTreeMap<String, Heard>;

/// What node proxies say. The sink side of the report service.
#[derive(Debug, Default)]
pub struct Reports {
    /// By node.
    nodes: Mutex<HashMap<String, NodeReport>>,
    changed: Notify,
}

impl Reports {
    /// What `node`, the node it runs on, says about a pod in its present stay. What it said of an earlier one is not
    /// known to be true any more.
    pub fn of(&self, world: &World, node: &str, uid: &str) -> Option<Heard> {
        let epoch = world.epochs.get(uid).copied().unwrap_or_default();
        lock(&self.nodes).get(node)?.get(uid).filter(|heard| heard.epoch == epoch).cloned()
    }

    /// Is any node still looking for a pod? Then time alone makes news.
    pub fn any_pending(&self) -> bool {
        lock(&self.nodes).values().flat_map(BTreeMap::values).any(|heard| heard.state == State::Pending)
    }

    /// Resolves after the next report.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }
}

impl ReportSink for Reports {
    fn report(&self, node: &str, states: Vec<PodState>) {
        let now = Instant::now();
        let mut all = lock(&self.nodes);
        let known = all.entry(node.to_owned()).or_default();
        let mut next = BTreeMap::new();
        for said in states {
            let mut heard = Heard { state: said.state(), reason: said.reason, epoch: said.epoch, since: now };
            let before = known.get(&said.uid);
            if let Some(before) = before.filter(|b| b.state == heard.state && b.epoch == heard.epoch) {
                heard.since = before.since;
            }
            if before != Some(&heard) && !heard.reason.is_empty() {
                tracing::warn!(node, pod.uid = said.uid, state = ?heard.state, reason = heard.reason, "pod not enrolled");
            }
            next.insert(said.uid, heard);
        }
        *known = next;
        drop(all);
        self.changed.notify_one();
    }
}

/// The annotations to change so that they say what is the case.
pub fn annotations(world: &World, reports: &Reports) -> Vec<Annotate> {
    world.pods.values().filter_map(|pod| annotate(world, pod, reports)).collect()
}

fn annotate(world: &World, pod: &Pod, reports: &Reports) -> Option<Annotate> {
    let uid = pod.metadata.uid.as_deref()?;
    let current = annotation(&pod.metadata, REDIRECTION);
    let judged = rules::judge(world, pod);
    if judged == Err(rules::Outside::NamespaceUnknown) {
        return None;
    }
    let wanted = if judged.is_ok() {
        let node = pod.spec.as_ref()?.node_name.as_deref()?;
        match reports.of(world, node, uid).map(|heard| heard.state) {
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
        namespace: pod.metadata.namespace.clone().unwrap_or_default(),
        name: pod.metadata.name.clone().unwrap_or_default(),
        uid: uid.to_owned(),
        version: pod.metadata.resource_version.clone().unwrap_or_default(),
        value: wanted,
    })
}

/// Remembers which pods are leaving. The driver tells it each generation and which of them peers have acknowledged.
#[derive(Debug, Default)]
pub struct Leaving {
    /// UIDs that were seen with the annotation.
    annotated: BTreeSet<String>,
    /// UID → the generation that first said NONE, once published.
    waiting: BTreeMap<String, Option<u64>>,
}

impl Leaving {
    /// Before translation: notes pods whose annotation has just gone. Returns those whose enrolment is held.
    pub fn observe(&mut self, world: &World) -> Arc<BTreeSet<String>> {
        let mut annotated = BTreeSet::new();
        let mut alive = BTreeSet::new();
        for pod in world.pods.values() {
            let Some(uid) = pod.metadata.uid.as_deref() else { continue };
            if annotation(&pod.metadata, REDIRECTION).is_some() {
                annotated.insert(uid.to_owned());
                self.waiting.remove(uid);
            } else if self.annotated.contains(uid) && !is_wanted(world, pod) {
                self.waiting.entry(uid.to_owned()).or_insert(None);
            }
            alive.insert(uid);
        }
        self.waiting.retain(|uid, _| alive.contains(uid.as_str()));
        self.annotated = annotated;
        Arc::new(self.waiting.keys().cloned().collect())
    }

    /// After publication: pods that now say NONE in `generation`. Peers' acknowledgement of it is to be awaited.
    pub fn published(&mut self, generation: u64) -> Vec<String> {
        let fresh = self.waiting.iter_mut().filter(|(_, since)| since.is_none());
        fresh
            .map(|(uid, since)| {
                *since = Some(generation);
                uid.clone()
            })
            .collect()
    }

    /// Peers know of `generation`, or the deadline passed. A pod that came back and left again since waits for its own.
    pub fn acknowledged(&mut self, generation: u64, uids: &[String]) {
        for uid in uids {
            if self.waiting.get(uid) == Some(&Some(generation)) {
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
    epochs: BTreeMap<String, u64>,
    /// Those that are enrolled now.
    inside: BTreeSet<String>,
    started: bool,
}

impl Stays {
    /// The stays as of the next translation.
    pub fn epochs(&self) -> Arc<BTreeMap<String, u64>> {
        Arc::new(self.epochs.clone())
    }

    /// After a translation that enrols the pods `enrolled`: who is outside and was not before, or is when we start and
    /// may have been, begins another stay when it joins. `now` (milliseconds since 1970) names it, so that it is
    /// another one also after a restart of the control plane.
    pub fn observe(&mut self, world: &World, enrolled: &HashSet<&str>, now: u64) {
        let alive: BTreeSet<&str> = world.pods.values().filter_map(|pod| pod.metadata.uid.as_deref()).collect();
        let gone_out = std::mem::take(&mut self.inside).into_iter().filter(|uid| !enrolled.contains(uid.as_str()));
        let at_start =
            alive.iter().filter(|uid| !self.started && !enrolled.contains(**uid)).map(|uid| (*uid).to_owned());
        for uid in gone_out.chain(at_start).filter(|uid| alive.contains(uid.as_str())) {
            self.epochs.insert(uid, now);
        }
        self.started = true;
        self.inside = enrolled.iter().map(|uid| (*uid).to_owned()).collect();
        self.epochs.retain(|uid, _| alive.contains(uid.as_str()));
    }
}

#[cfg(test)]
mod tests {
    use super::rules::DATAPLANE_MODE;
    use super::*;
    use crate::types::Key;
    use serde_json::json;

    fn world(namespace_mode: Option<&str>, annotations: serde_json::Value) -> World {
        let mut world = World::default();
        let namespace =
            json!({"metadata": {"name": "shop", "labels": {DATAPLANE_MODE: namespace_mode.unwrap_or("x")}}});
        let pod = json!({
            "metadata": {"name": "a", "namespace": "shop", "uid": "u1", "annotations": annotations},
            "spec": {"nodeName": "n1", "containers": []},
        });
        Arc::make_mut(&mut world.namespaces)
            .insert(Key::new("", "shop"), Arc::new(serde_json::from_value(namespace).unwrap()));
        Arc::make_mut(&mut world.pods).insert(Key::new("shop", "a"), Arc::new(serde_json::from_value(pod).unwrap()));
        world
    }

    fn state(state: State) -> PodState {
        PodState { uid: "u1".into(), state: state.into(), ..PodState::default() }
    }

    fn value(world: &World, reports: &Reports) -> Option<Option<&'static str>> {
        annotations(world, reports).pop().map(|change| change.value)
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
        world.namespaces = Arc::default();
        assert_eq!(value(&world, &reports), None);
    }

    #[test]
    fn a_leaving_pod_is_held_until_peers_know() {
        let mut leaving = Leaving::default();
        assert!(leaving.observe(&world(Some("ambient"), json!({REDIRECTION: "enabled"}))).is_empty());
        assert!(leaving.observe(&world(None, json!({REDIRECTION: "enabled"}))).is_empty(), "annotation still there");
        let gone = world(None, json!({}));
        assert!(leaving.observe(&gone).contains("u1"));
        assert_eq!(leaving.published(7), ["u1"]);
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
        assert_eq!(leaving.published(7), ["u1"]);
        leaving.observe(&inside);
        leaving.observe(&gone);
        assert_eq!(leaving.published(9), ["u1"]);
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
        let first = written.remaining(annotations(&world, &reports));
        assert_eq!(first.len(), 1);
        written.add(first[0].clone());
        assert_eq!(written.remaining(annotations(&world, &reports)), [], "the watch has not brought it yet");
        reports.report("n1", vec![state(State::Failed)]);
        let second = written.remaining(annotations(&world, &reports));
        assert_eq!(second.iter().map(|change| change.value).collect::<Vec<_>>(), [Some("pending")]);
        reports.report("n1", vec![state(State::Enrolled)]);
        assert_eq!(written.remaining(annotations(&world, &reports)), first, "said otherwise since");
    }

    #[test]
    fn what_was_said_of_an_earlier_stay_counts_for_nothing() {
        let (mut inside, reports, mut stays) =
            (world(Some("ambient"), json!({})), Reports::default(), Stays::default());
        reports.report("n1", vec![state(State::Enrolled)]);
        stays.observe(&inside, &HashSet::from(["u1"]), 1000);
        inside.epochs = stays.epochs();
        assert_eq!(value(&inside, &reports), Some(Some("enabled")), "its first stay");
        // Withdrawn and wanted again before its node has heard either.
        stays.observe(&inside, &HashSet::new(), 2000);
        stays.observe(&inside, &HashSet::new(), 2500);
        stays.observe(&inside, &HashSet::from(["u1"]), 3000);
        inside.epochs = stays.epochs();
        assert_eq!(inside.epochs.get("u1"), Some(&2000), "from when it was withdrawn");
        assert_eq!(value(&inside, &reports), None, "the node speaks of the first stay");
        reports.report("n1", vec![PodState { epoch: 2000, ..state(State::Enrolled) }]);
        assert_eq!(value(&inside, &reports), Some(Some("enabled")));
        stays.observe(&World::default(), &HashSet::new(), 4000);
        assert!(stays.epochs().is_empty(), "a pod that is gone is forgotten");
    }
}
