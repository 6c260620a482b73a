//! Which pods their node's proxy captures, as resources for that node alone.

use k8s_openapi::api::core::v1::Pod;
use mesh_proto::enrolment::{CaptureOptions, FailureMode, POD_ENROLMENT_TYPE, PodEnrolment};

use super::address_bytes;
use super::workload::{running_addresses, service_account};
use super::world::World;
use crate::enrol;
use crate::resources::{Audience, Resource};
use crate::types::{Key, annotation};

/// `open`: while no node proxy is alive the pod's connections go out uncaptured. Anything else is closed.
const FAILURE_MODE: &str = "ambient.istio.io/capture-failure-mode";
const BYPASS_INBOUND: &str = "ambient.istio.io/bypass-inbound-capture";
/// `false`: the pod asks its DNS servers itself. Anything else is the default, captured.
const DNS_CAPTURE: &str = "ambient.istio.io/dns-capture";

/// `None` for pods outside the mesh and those that no node has been chosen for. A pod that leaves keeps its enrolment
/// while peers may still speak HBONE to it.
pub fn translate(world: &World, pod: &Pod) -> Option<Resource> {
    let uid = pod.metadata.uid.as_deref()?;
    let node = pod.spec.as_ref()?.node_name.as_deref().filter(|node| !node.is_empty())?;
    let held = annotation(&pod.metadata, enrol::REDIRECTION).is_some() || world.leaving.contains(uid);
    let enrolled = enrol::is_wanted(world, pod) || (held && enrol::may_be_captured(world, pod));
    if !enrolled {
        return None;
    }
    let key = Key::of(&pod.metadata);
    let failure_mode = match annotation(&pod.metadata, FAILURE_MODE) {
        Some("open") => FailureMode::Open,
        _ => FailureMode::Closed,
    };
    let message = PodEnrolment {
        uid: uid.to_owned(),
        name: key.name.to_string(),
        namespace: key.namespace.to_string(),
        service_account: service_account(pod).to_owned(),
        addresses: running_addresses(pod).into_iter().flatten().map(address_bytes).collect(),
        capture: Some(CaptureOptions {
            failure_mode: failure_mode.into(),
            bypass_inbound: annotation(&pod.metadata, BYPASS_INBOUND) == Some("true"),
            excluded_destinations: Vec::new(),
            dns: annotation(&pod.metadata, DNS_CAPTURE) != Some("false"),
        }),
        workload_uid: world.pod_uid(&key),
    };
    Some(Resource::new(POD_ENROLMENT_TYPE, uid, &message).for_audience(vec![Audience::Node(node.into())]))
}
