//! The wire types of the mesh: Istio's workload, authorization and certificate protocols, delta xDS, and the resource
//! types of our own. Generated from `schemas/` (see `tests/generated.rs`) and checked in; there is no logic here.
//!
//! Type URLs stand beside the types because they are as much wire contract as the field numbers.

#![forbid(unsafe_code)]
#![allow(
    clippy::all,
    clippy::pedantic,
    clippy::allow_attributes_without_reason,
    rust_2018_idioms,
    reason = "generated code is not ours to style"
)]

/// Delta xDS (Envoy discovery service v3).
pub mod ads {
    include!("generated/envoy.service.discovery.v3.rs");
}
/// Workloads and services (Istio's workload discovery).
pub mod workload {
    include!("generated/istio.workload.rs");
    pub const ADDRESS_TYPE: &str = "type.googleapis.com/istio.workload.Address";
    pub const WORKLOAD_TYPE: &str = "type.googleapis.com/istio.workload.Workload";
}
/// L4 authorization.
pub mod security {
    include!("generated/istio.security.rs");
    pub const AUTHORIZATION_TYPE: &str = "type.googleapis.com/istio.security.Authorization";
}
/// Certificate signing.
pub mod ca {
    include!("generated/istio.v1.auth.rs");
}
/// Pods from Istio's CNI agent.
pub mod zds {
    include!("generated/istio.workload.zds.rs");
}
/// Pods a node proxy captures.
pub mod enrolment {
    include!("generated/mesh.enrolment.v1.rs");
    pub const POD_ENROLMENT_TYPE: &str = "type.googleapis.com/mesh.enrolment.v1.PodEnrolment";
}
/// Routes and L7 policy for waypoints.
pub mod waypoint {
    include!("generated/mesh.waypoint.v1.rs");
    pub const ROUTE_TYPE: &str = "type.googleapis.com/mesh.waypoint.v1.Route";
    pub const HTTP_POLICY_TYPE: &str = "type.googleapis.com/mesh.waypoint.v1.HttpPolicy";
}
/// What the replicas of a control plane ask each other.
pub mod replica {
    include!("generated/mesh.replica.v1.rs");
}
