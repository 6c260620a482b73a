//! Istio's rules on which pods are captured, as one decision that says why not.

use std::fmt;

use crate::translate::binding::MANAGED_LABEL;
use crate::translate::workload::has_native_tunnel;
use crate::translate::world::World;
use crate::types::{Pod, annotation, label};

pub const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";
/// Present where a sidecar was injected.
const SIDECAR_STATUS: &str = "sidecar.istio.io/status";
/// Label `app` of the mesh's own pods in its root namespace: a control plane or node proxy that waits for itself never
/// starts.
const OWN_APPS: [&str; 2] = ["ztunnel", "istiod"];

/// Why a pod is not to be captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outside {
    /// Neither the pod nor its namespace asks for it.
    NotAsked,
    /// The pod says `none`.
    OptedOut,
    /// The pod's labels leave it to its namespace, which is not known (yet): nothing can be said.
    NamespaceUnknown,
    /// All its containers have ended for good.
    Ended,
    /// No selector of MeshConfig selects its namespace.
    NotDiscovered,
    /// Asked for, and not possible.
    Barred(Bar),
}

/// What keeps a pod out whatever its labels say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bar {
    HostNetwork,
    ExcludedNamespace,
    MeshItself,
    Gateway,
    Sidecar,
}

impl fmt::Display for Bar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::HostNetwork => "the pod uses its node's network (hostNetwork), which is never captured",
            Self::ExcludedNamespace => "its namespace is excluded from the mesh (EXCLUDE_NAMESPACES of istiod-lite)",
            Self::MeshItself => "the pod is part of the mesh itself",
            Self::Gateway => "the pod is a waypoint or gateway, which speaks HBONE itself",
            Self::Sidecar => "a sidecar was injected into the pod (annotation sidecar.istio.io/status), which wins",
        })
    }
}

/// Whose label asks for a pod to be captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AskedBy {
    Pod,
    Namespace,
}

/// The decision.
///
/// # Errors
/// Why the pod stays outside.
pub fn judge(world: &World, pod: &Pod) -> Result<AskedBy, Outside> {
    let asked = asked_by(world, pod)?;
    if let Some(bar) = bar(world, pod) {
        return Err(Outside::Barred(bar));
    }
    // A pod that is being deleted serves until its last container has ended, and is captured as long.
    if pod.phase.is_over() { Err(Outside::Ended) } else { Ok(asked) }
}

/// Whose labels ask for it: the pod's own, else its namespace's unless the pod says `none`.
///
/// # Errors
/// [`Outside::NotAsked`], [`Outside::OptedOut`], [`Outside::NamespaceUnknown`] or [`Outside::NotDiscovered`].
pub fn asked_by(world: &World, pod: &Pod) -> Result<AskedBy, Outside> {
    let namespace = &*pod.key.namespace;
    if world.hidden.contains(namespace) {
        return Err(Outside::NotDiscovered);
    }
    match label(pod, DATAPLANE_MODE) {
        Some("ambient") => Ok(AskedBy::Pod),
        Some("none") => Err(Outside::OptedOut),
        _ if world.namespace(namespace).is_none() => Err(Outside::NamespaceUnknown),
        _ if world.namespace_label(namespace, DATAPLANE_MODE) == Some("ambient") => Ok(AskedBy::Namespace),
        _ => Err(Outside::NotAsked),
    }
}

/// What forbids that the pod be captured, if anything does.
pub fn bar(world: &World, pod: &Pod) -> Option<Bar> {
    // A ztunnel of the pod's own (dedicated mode) is a sidecar too: the pod answers HBONE by itself.
    let sidecar = || annotation(pod, SIDECAR_STATUS).is_some() || has_native_tunnel(pod);
    never(world, pod).or_else(|| sidecar().then_some(Bar::Sidecar))
}

/// What forbids it from the pod's first day to its last: such a pod was never captured, whatever an annotation claims.
/// (A sidecar's annotation may come late; then the pod leaves like any other.)
pub fn never(world: &World, pod: &Pod) -> Option<Bar> {
    let namespace = &*pod.key.namespace;
    let own = namespace == world.mesh.root_namespace;
    if pod.template.host_network {
        Some(Bar::HostNetwork)
    } else if world.mesh.excluded_namespaces.contains(namespace) {
        Some(Bar::ExcludedNamespace)
    } else if own && label(pod, "app").is_some_and(|app| OWN_APPS.contains(&app)) {
        Some(Bar::MeshItself)
    } else if label(pod, MANAGED_LABEL).is_some() {
        Some(Bar::Gateway)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::translate::fixture;

    /// A pod of namespace `shop` (or another) with these lines of metadata, spec and status.
    struct Given<'a> {
        namespace: &'a str,
        namespace_mode: Option<&'a str>,
        pod_mode: Option<&'a str>,
        labels: &'a str,
        annotations: &'a str,
        spec: &'a str,
        metadata: &'a str,
        phase: &'a str,
    }

    const PLAIN: Given<'_> = Given {
        namespace: "shop",
        namespace_mode: Some("ambient"),
        pod_mode: None,
        labels: "",
        annotations: "",
        spec: "",
        metadata: "",
        phase: "Running",
    };

    fn judged(given: &Given<'_>) -> Result<AskedBy, Outside> {
        let mode = |mode: Option<&str>| mode.map(|mode| format!("{DATAPLANE_MODE}: '{mode}'")).unwrap_or_default();
        let labels = [mode(given.pod_mode), given.labels.to_owned()].into_iter().filter(|l| !l.is_empty());
        let world = fixture::world(&format!(
            "kind: Namespace\nmetadata: {{name: {namespace}, labels: {{{of_namespace}}}}}\n---\n\
             kind: Pod\nmetadata: {{name: a, namespace: {namespace}, uid: u, labels: {{{labels}}}, annotations: {{{annotations}}}{metadata}}}\n\
             spec: {{nodeName: n1, containers: []{spec}}}\nstatus: {{phase: {phase}}}\n",
            namespace = given.namespace,
            of_namespace = mode(given.namespace_mode),
            labels = labels.collect::<Vec<_>>().join(", "),
            annotations = given.annotations,
            metadata = given.metadata,
            spec = given.spec,
            phase = given.phase,
        ));
        let pod = world.pods.values().next().expect("one pod").clone();
        judge(&world, &pod)
    }

    #[test]
    fn the_pods_label_goes_before_its_namespaces() {
        use AskedBy::{Namespace, Pod};
        use Outside::{NotAsked, OptedOut};
        // Rows: namespace; columns: pod without, `ambient`, `none`, another value.
        let columns = [None, Some("ambient"), Some("none"), Some("sideways")];
        let table = [
            (None, [Err(NotAsked), Ok(Pod), Err(OptedOut), Err(NotAsked)]),
            (Some("ambient"), [Ok(Namespace), Ok(Pod), Err(OptedOut), Ok(Namespace)]),
            (Some("none"), [Err(NotAsked), Ok(Pod), Err(OptedOut), Err(NotAsked)]),
            (Some("sideways"), [Err(NotAsked), Ok(Pod), Err(OptedOut), Err(NotAsked)]),
            (Some("Ambient"), [Err(NotAsked), Ok(Pod), Err(OptedOut), Err(NotAsked)]),
            (Some(""), [Err(NotAsked), Ok(Pod), Err(OptedOut), Err(NotAsked)]),
        ];
        for (namespace_mode, row) in table {
            for (pod_mode, expected) in columns.into_iter().zip(row) {
                let got = judged(&Given { namespace_mode, pod_mode, ..PLAIN });
                assert_eq!(got, expected, "namespace {namespace_mode:?}, pod {pod_mode:?}");
            }
        }
    }

    #[test]
    fn a_namespace_that_is_not_known_has_asked_for_nothing_and_refused_nothing() {
        for (label, expected) in [
            ("", Err(Outside::NamespaceUnknown)),
            ("istio.io/dataplane-mode: sideways", Err(Outside::NamespaceUnknown)),
            ("istio.io/dataplane-mode: none", Err(Outside::OptedOut)),
            ("istio.io/dataplane-mode: ambient", Ok(AskedBy::Pod)),
        ] {
            let world = fixture::world(&format!(
                "kind: Pod\nmetadata: {{name: a, namespace: shop, labels: {{{label}}}}}\nspec: {{containers: []}}\n"
            ));
            assert_eq!(judge(&world, world.pods.values().next().expect("one pod")), expected, "{label}");
        }
    }

    #[test]
    fn what_bars_a_pod_bars_it_however_it_asks() {
        let cases = [
            (Given { spec: ", hostNetwork: true", ..PLAIN }, Bar::HostNetwork),
            (Given { annotations: "sidecar.istio.io/status: '{}'", ..PLAIN }, Bar::Sidecar),
            (Given { annotations: "sidecar.istio.io/status: ''", ..PLAIN }, Bar::Sidecar),
            (Given { namespace: "kube-system", ..PLAIN }, Bar::ExcludedNamespace),
            (Given { namespace: "istio-system", labels: "app: ztunnel", ..PLAIN }, Bar::MeshItself),
            (Given { namespace: "istio-system", labels: "app: istiod", ..PLAIN }, Bar::MeshItself),
            (Given { labels: "gateway.istio.io/managed: istio.io-mesh-controller", ..PLAIN }, Bar::Gateway),
        ];
        for (given, bar) in cases {
            assert_eq!(judged(&given), Err(Outside::Barred(bar)));
            let asks_itself = Given { pod_mode: Some("ambient"), ..given };
            assert_eq!(judged(&asks_itself), Err(Outside::Barred(bar)), "by the pod's own label");
            let silent = Given { namespace_mode: None, pod_mode: None, ..asks_itself };
            assert_eq!(judged(&silent), Err(Outside::NotAsked), "{bar:?}: nobody asked, so nobody is to be told");
        }
    }

    #[test]
    fn neighbours_of_the_mesh_are_ordinary_pods() {
        for (namespace, labels) in [("istio-system", "app: grafana"), ("shop", "app: ztunnel"), ("shop", "app: istiod")]
        {
            assert_eq!(judged(&Given { namespace, labels, ..PLAIN }), Ok(AskedBy::Namespace), "{namespace} {labels}");
        }
    }

    #[test]
    fn a_pod_is_captured_from_its_first_day_until_its_last_container_has_ended() {
        let deleted = ", deletionTimestamp: '2026-11-25T00:00:00Z', deletionGracePeriodSeconds: 30";
        for (phase, metadata, expected) in [
            ("Pending", "", Ok(AskedBy::Namespace)),
            ("Running", "", Ok(AskedBy::Namespace)),
            ("Unknown", "", Ok(AskedBy::Namespace)),
            ("Running", deleted, Ok(AskedBy::Namespace)),
            ("Succeeded", "", Err(Outside::Ended)),
            ("Failed", "", Err(Outside::Ended)),
            ("Failed", deleted, Err(Outside::Ended)),
        ] {
            assert_eq!(judged(&Given { phase, metadata, ..PLAIN }), expected, "{phase}{metadata}");
        }
    }
}
