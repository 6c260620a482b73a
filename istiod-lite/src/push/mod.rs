//! The delta ADS server and the enrolment service: what goes to the proxies and what they report back.
//!
//! [`view`] turns the resource store into shared views, [`session`] is one client's exchange without any I/O, whose
//! [`answer`]s are written while the transport takes them; [`stream`] drives a session over gRPC, [`enrolment`] takes node
//! proxies' reports, [`callers`] bounds what one caller may hold of us. Nothing here knows Kubernetes.

pub mod answer;
pub mod callers;
pub mod enrolment;
mod grpc;
pub mod session;
pub mod stream;
pub mod view;

use mesh_proto::enrolment::POD_ENROLMENT_TYPE;
use mesh_proto::security::AUTHORIZATION_TYPE;
use mesh_proto::waypoint::{HTTP_POLICY_TYPE, ROUTE_TYPE};
use mesh_proto::workload::{ADDRESS_TYPE, WORKLOAD_TYPE};

/// The metric label of a type: bounded by what we serve, whatever clients ask for.
fn type_label(type_url: &str) -> &'static str {
    match type_url {
        ADDRESS_TYPE => "address",
        WORKLOAD_TYPE => "workload",
        AUTHORIZATION_TYPE => "authorization",
        POD_ENROLMENT_TYPE => "pod_enrolment",
        ROUTE_TYPE => "route",
        HTTP_POLICY_TYPE => "http_policy",
        _ => "other",
    }
}
