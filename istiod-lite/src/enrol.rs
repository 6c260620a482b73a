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

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use mesh_proto::enrolment::PodState;
use mesh_proto::enrolment::pod_state::State;
use tokio::sync::Notify;

use crate::resources::{ReportSink, lock};
use crate::translate::binding::MANAGED_LABEL;
use crate::translate::workload::has_native_tunnel;
use crate::translate::world::World;
use crate::types::{annotation, label};

/// On pods: `enabled` = answers HBONE; `pending` = its node could not capture it.
pub const REDIRECTION: &str = "ambient.istio.io/redirection";
pub const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";
/// Present where a sidecar was injected.
const SIDECAR_STATUS: &str = "sidecar.istio.io/status";
/// As Istio's default `excludeNamespaces`.
const EXCLUDED_NAMESPACES: [&str; 1] = ["kube-system"];
/// How long peers get to learn that a pod left before its enrolment is withdrawn anyway.
pub const LEAVE_DEADLINE: Duration = Duration::from_secs(5);

/// The labels ask for it and nothing forbids it.
pub fn is_wanted(world: &World, pod: &Pod) -> bool {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let asked = match label(&pod.metadata, DATAPLANE_MODE) {
        Some("ambient") => true,
        Some("none") => false,
        _ => world.namespace_label(namespace, DATAPLANE_MODE) == Some("ambient"),
    };
    let ended = matches!(pod.status.as_ref().and_then(|status| status.phase.as_deref()), Some("Succeeded" | "Failed"));
    asked && !ended && may_be_captured(world, pod)
}

/// Never: the host's network, sidecars (those of ztunnel's dedicated mode too: the pod answers HBONE itself), system
/// namespaces, the mesh's own proxies.
pub fn may_be_captured(world: &World, pod: &Pod) -> bool {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let host_network = pod.spec.as_ref().and_then(|spec| spec.host_network) == Some(true);
    let node_proxy = namespace == world.mesh.root_namespace && label(&pod.metadata, "app") == Some("ztunnel");
    !host_network
        && !node_proxy
        && !EXCLUDED_NAMESPACES.contains(&namespace)
        && annotation(&pod.metadata, SIDECAR_STATUS).is_none()
        && !has_native_tunnel(&pod.metadata)
        && label(&pod.metadata, MANAGED_LABEL).is_none()
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

/// By pod UID: the state, and why.
type NodeReport = BTreeMap<String, (State, String)>;

/// What node proxies say. The sink side of the report service.
#[derive(Debug, Default)]
pub struct Reports {
    /// By node.
    nodes: Mutex<HashMap<String, NodeReport>>,
    changed: Notify,
}

impl Reports {
    /// The state of a pod according to `node`, the node it runs on.
    fn state(&self, node: &str, uid: &str) -> Option<State> {
        lock(&self.nodes).get(node)?.get(uid).map(|(state, _)| *state)
    }

    /// Resolves after the next report.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }
}

impl ReportSink for Reports {
    fn report(&self, node: &str, states: Vec<PodState>) {
        let mut all = lock(&self.nodes);
        let known = all.entry(node.to_owned()).or_default();
        let mut next = BTreeMap::new();
        for state in states {
            let entry = (state.state(), state.reason.clone());
            if known.get(&state.uid) != Some(&entry) && !entry.1.is_empty() {
                tracing::warn!(node, pod.uid = state.uid, state = ?entry.0, reason = entry.1, "pod not enrolled");
            }
            next.insert(state.uid, entry);
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
    let wanted = if is_wanted(world, pod) {
        let node = pod.spec.as_ref()?.node_name.as_deref()?;
        match reports.state(node, uid) {
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

#[cfg(test)]
mod tests {
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
        PodState { uid: "u1".into(), state: state.into(), reason: String::new() }
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
}
