//! What a user should hear about a pod's capture, as Events on the pod: why it is not captured, and what of its
//! annotations is not done. Which notices there are is decided purely; [`Told`] remembers what was written.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use k8s_openapi::api::core::v1::Event;
use kube::api::PostParams;
use kube::{Api, Client};
use mesh_proto::enrolment::pod_state::State;
use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::time::Instant;

use super::Reports;
use super::rules::{self, AskedBy, DATAPLANE_MODE, Outside};
use crate::status::FIELD_MANAGER;
use crate::translate::enrolment::{BYPASS_INBOUND, DNS_CAPTURE, FAILURE_MODE, unreadable};
use crate::translate::world::World;
use crate::types::{Key, Pod, annotation, flag, label};

/// As Istio's; what arrives on these interfaces (of virtual machines in the pod) is to be captured as outbound.
const REROUTE_INTERFACES: &str = "istio.io/reroute-virtual-interfaces";
/// Of one pod, ever. A node could send a new reason each second.
const MOST_PER_POD: usize = 16;
/// Of a pod's name in an Event's, which may have 253 characters and ends with a dot and a digest of 16.
const LONGEST_NAME: usize = 253 - 17;
/// The API takes 1024 bytes.
const LONGEST_MESSAGE: usize = 1000;

/// One thing to tell about one pod.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Notice {
    pub severity: Severity,
    pub reason: &'static str,
    pub message: String,
}

/// An Event's `type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Severity {
    Normal,
    Warning,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

fn warning(reason: &'static str, message: String) -> Notice {
    Notice { severity: Severity::Warning, reason, message }
}

/// All there is to say about a pod.
pub fn notices(world: &World, pod: &Pod, reports: &Reports, now: Instant) -> Vec<Notice> {
    let mut notices = Vec::new();
    match rules::judge(world, pod) {
        Ok(_) => {
            notices.extend(of_node(world, pod, reports, now));
            notices.extend(of_annotations(pod));
        }
        Err(Outside::Barred(bar)) => {
            // A namespace asks for all its pods; one that asks itself has made a mistake.
            let severity = match rules::asked_by(world, pod) {
                Ok(AskedBy::Pod) => Severity::Warning,
                Ok(AskedBy::Namespace) | Err(_) => Severity::Normal,
            };
            notices.push(Notice { severity, reason: "NotEnrolled", message: format!("not captured: {bar}") });
        }
        Err(
            Outside::NotAsked | Outside::NamespaceUnknown | Outside::OptedOut | Outside::Ended | Outside::NotDiscovered,
        ) => {}
    }
    if let Some(mode) = label(pod, DATAPLANE_MODE).filter(|mode| !matches!(*mode, "ambient" | "none")) {
        let message = format!("label {DATAPLANE_MODE}={mode:?} is neither ambient nor none: the namespace decides");
        notices.push(warning("InvalidLabel", message));
    }
    notices
}

fn of_node(world: &World, pod: &Pod, reports: &Reports, now: Instant) -> Option<Notice> {
    let node = pod.node()?;
    let heard = reports.of(world, node, pod.uid.as_deref()?)?;
    let late = heard.is_overdue(now);
    match heard.state {
        State::Failed => Some(warning("NotEnrolled", format!("node {node}: {}", heard.reason))),
        State::Pending if late => Some(warning("NotEnrolledYet", format!("node {node}: {}", heard.reason))),
        State::Pending | State::Enrolled | State::Leaving => None,
    }
}

fn of_annotations(pod: &Pod) -> Vec<Notice> {
    let mut notices = Vec::new();
    if annotation(pod, REROUTE_INTERFACES).is_some_and(|interfaces| !interfaces.trim().is_empty()) {
        let message = format!("annotation {REROUTE_INTERFACES} is not supported: what arrives there is not captured");
        notices.push(warning("Unsupported", message));
    }
    for (key, default) in [(BYPASS_INBOUND, false), (DNS_CAPTURE, true)] {
        if let Err(value) = flag(pod, key) {
            let message = format!("annotation {key}: {value:?} is neither true nor false; taken as {default}");
            notices.push(warning("InvalidAnnotation", message));
        }
    }
    if let Some(mode) = annotation(pod, FAILURE_MODE).filter(|mode| !matches!(*mode, "open" | "closed")) {
        let message = format!("annotation {FAILURE_MODE}: {mode:?} is neither open nor closed; taken as closed");
        notices.push(warning("InvalidAnnotation", message));
    }
    notices.extend(
        unreadable(pod).into_iter().map(|why| warning("InvalidAnnotation", format!("{why}; it excludes nothing"))),
    );
    notices
}

/// What was told, by pod UID, so that it is told once. After a restart everything is told again under the same names,
/// which the API refuses as already there.
#[derive(Debug, Default)]
pub struct Told(BTreeMap<String, BTreeSet<u64>>);

impl Told {
    /// Those notices about `pods` that are still to be told, as Events.
    pub fn fresh(&mut self, world: &World, reports: &Reports, pods: &BTreeSet<Key>) -> Vec<Event> {
        let now = Instant::now();
        let mut events = Vec::new();
        for pod in pods.iter().filter_map(|key| world.pods.get(key)) {
            let Some(uid) = pod.uid.as_deref() else { continue };
            let mut told = self.0.remove(uid).unwrap_or_default();
            for notice in notices(world, pod, reports, now) {
                let digest = digest(uid, &notice);
                if told.len() < MOST_PER_POD && told.insert(digest) {
                    events.extend(event(pod, &notice, digest));
                }
            }
            if !told.is_empty() {
                self.0.insert(uid.to_owned(), told);
            }
        }
        events
    }

    /// These pods are gone.
    pub fn forget_pods(&mut self, uids: &[String]) {
        for uid in uids {
            self.0.remove(uid);
        }
    }

    /// The event could not be written: it counts as fresh again.
    pub fn forget(&mut self, event: &Event) {
        let uid = event.involved_object.uid.as_deref().unwrap_or_default();
        let digest = event.metadata.name.as_deref().and_then(|name| name.rsplit('.').next());
        if let Some(digest) = digest.and_then(|hex| u64::from_str_radix(hex, 16).ok())
            && let Some(told) = self.0.get_mut(uid)
        {
            told.remove(&digest);
        }
    }
}

/// The same in every run of this program.
fn digest(uid: &str, notice: &Notice) -> u64 {
    let mut hasher = DefaultHasher::new();
    (uid, notice).hash(&mut hasher);
    hasher.finish()
}

fn event(pod: &Pod, notice: &Notice, digest: u64) -> Option<Event> {
    let (pod_name, namespace, uid) = (&*pod.key.name, &*pod.key.namespace, pod.uid.as_deref());
    let now = OffsetDateTime::now_utc().replace_nanosecond(0).ok()?.format(&Rfc3339).ok()?;
    let mut message = notice.message.clone();
    message.truncate(message.floor_char_boundary(LONGEST_MESSAGE));
    // No label of a name ends with a hyphen, and none is empty. The digest is of the pod too.
    let name = pod_name[..pod_name.floor_char_boundary(LONGEST_NAME)].trim_end_matches(['-', '.']);
    // The owner lets it go with its pod where Events have no end of their own.
    let event = json!({
        "metadata": {
            "name": format!("{name}.{digest:016x}"), "namespace": namespace,
            "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": pod_name, "uid": uid}],
        },
        "involvedObject": {"apiVersion": "v1", "kind": "Pod", "name": pod_name, "namespace": namespace,
            "uid": uid, "resourceVersion": pod.version.to_string()},
        "type": notice.severity.to_string(), "reason": notice.reason, "message": message, "count": 1,
        "firstTimestamp": now, "lastTimestamp": now, "source": {"component": FIELD_MANAGER},
        "reportingComponent": FIELD_MANAGER, "reportingInstance": FIELD_MANAGER,
    });
    serde_json::from_value(event).ok()
}

/// False: not written, for a reason that may pass.
pub async fn write(client: &Client, event: &Event) -> bool {
    let namespace = event.metadata.namespace.as_deref().unwrap_or_default();
    match Api::<Event>::namespaced(client.clone(), namespace).create(&PostParams::default(), event).await {
        Ok(_) => true,
        // Told before; or the namespace is gone or about to be; or what it says cannot be said. None of it will change.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409 | 403 | 422) => {
            tracing::debug!(error = %status.message, "event not written");
            true
        }
        Err(error) => {
            tracing::warn!(%error, "event not written");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::ReportSink;
    use crate::translate::fixture;
    use mesh_proto::enrolment::PodState;

    fn world(labels: &str, annotations: &str, spec: &str) -> World {
        fixture::world(&format!(
            "kind: Namespace\nmetadata: {{name: shop, labels: {{{DATAPLANE_MODE}: ambient}}}}\n---\n\
             kind: Pod\nmetadata: {{name: a, namespace: shop, uid: u, labels: {{{labels}}}, annotations: {{{annotations}}}}}\n\
             spec: {{nodeName: n1, containers: []{spec}}}\nstatus: {{phase: Running}}\n"
        ))
    }

    fn told(world: &World, reports: &Reports, now: Instant) -> Vec<(Severity, &'static str, String)> {
        let pod = world.pods.values().next().expect("one pod");
        notices(world, pod, reports, now).into_iter().map(|n| (n.severity, n.reason, n.message)).collect()
    }

    #[tokio::test]
    async fn every_way_not_to_be_captured_and_every_word_not_followed_is_told() {
        let none = Reports::default();
        let now = Instant::now();
        assert_eq!(told(&world("", "", ""), &none, now), []);
        let cases = [
            ("", "", ", hostNetwork: true", Severity::Normal, "NotEnrolled", "hostNetwork"),
            (
                "istio.io/dataplane-mode: ambient",
                "",
                ", hostNetwork: true",
                Severity::Warning,
                "NotEnrolled",
                "hostNetwork",
            ),
            ("", "sidecar.istio.io/status: x", "", Severity::Normal, "NotEnrolled", "sidecar"),
            ("istio.io/dataplane-mode: Ambient", "", "", Severity::Warning, "InvalidLabel", "\"Ambient\""),
            ("", "istio.io/reroute-virtual-interfaces: net1", "", Severity::Warning, "Unsupported", "reroute"),
            (
                "",
                "ambient.istio.io/bypass-inbound-capture: yes please",
                "",
                Severity::Warning,
                "InvalidAnnotation",
                "false",
            ),
            ("", "ambient.istio.io/dns-capture: 'off'", "", Severity::Warning, "InvalidAnnotation", "dns-capture"),
            ("", "ambient.istio.io/capture-failure-mode: ajar", "", Severity::Warning, "InvalidAnnotation", "closed"),
        ];
        for (labels, annotations, spec, severity, reason, word) in cases {
            let told = told(&world(labels, annotations, spec), &none, now);
            assert_eq!(told.len(), 1, "{labels} {annotations} {spec}: {told:?}");
            assert_eq!((told[0].0, told[0].1), (severity, reason), "{labels} {annotations} {spec}");
            assert!(told[0].2.contains(word), "{word}: {}", told[0].2);
        }
        assert_eq!(told(&world("", "ambient.istio.io/bypass-inbound-capture: 'True'", ""), &none, now), []);
        let opted_out = world("istio.io/dataplane-mode: none", "", ", hostNetwork: true");
        assert_eq!(told(&opted_out, &none, now), [], "nobody asked");
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_node_says_is_passed_on_and_patience_has_an_end() {
        let (world, reports) = (world("", "", ""), Reports::default());
        let report = |state: State, reason: &str| {
            reports
                .report("n1", vec![PodState { uid: "u".into(), state: state.into(), reason: reason.into(), epoch: 0 }]);
        };
        report(State::Pending, "no process yet");
        assert_eq!(told(&world, &reports, Instant::now()), [], "every pod starts like that");
        tokio::time::advance(super::super::PATIENCE).await;
        report(State::Pending, "no process yet");
        let late = told(&world, &reports, Instant::now());
        assert_eq!(late, [(Severity::Warning, "NotEnrolledYet", "node n1: no process yet".to_owned())]);
        report(State::Failed, "two namespaces");
        let failed = told(&world, &reports, Instant::now());
        assert_eq!(failed, [(Severity::Warning, "NotEnrolled", "node n1: two namespaces".to_owned())]);
        report(State::Enrolled, "");
        assert_eq!(told(&world, &reports, Instant::now()), []);
    }

    #[tokio::test]
    async fn a_notice_is_told_once_unless_it_could_not_be_written() {
        let (world, reports) = (world("", "", ", hostNetwork: true"), Reports::default());
        let mut told = Told::default();
        let pods: BTreeSet<Key> = world.pods.keys().cloned().collect();
        let first = told.fresh(&world, &reports, &pods);
        assert_eq!(first.len(), 1);
        assert_eq!(told.fresh(&world, &reports, &pods), []);
        told.forget(&first[0]);
        assert_eq!(told.fresh(&world, &reports, &pods).len(), 1);
        let again = Told::default().fresh(&world, &reports, &pods);
        assert_eq!(again[0].metadata.name, first[0].metadata.name, "a restart finds its own events");
    }

    #[test]
    fn the_event_of_a_pod_with_a_long_name_has_a_name_that_the_api_takes() {
        let notice = warning("R", "m".into());
        for (pod, expected) in [
            ("a".repeat(253), format!("{}.00000000000000ff", "a".repeat(236))),
            (format!("{}-.{}", "a".repeat(234), "b".repeat(17)), format!("{}.00000000000000ff", "a".repeat(234))),
            ("a".into(), "a.00000000000000ff".into()),
        ] {
            let mut long = k8s_openapi::api::core::v1::Pod::default();
            long.metadata.name = Some(pod);
            let name = event(&Pod::new(long), &notice, 255).expect("an Event").metadata.name.expect("a name");
            assert!(name.len() <= 253, "{name}");
            assert_eq!(name, expected);
        }
    }
}
