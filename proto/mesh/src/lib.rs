//! What mesh components must agree on: identity, TLS, HBONE, the workload model, L4 policy, the xDS client, telemetry
//! and drain. It knows no Kubernetes client, no eBPF and no pod.
//!
//! The modules stand lowest first; a module uses only those above it (`cargo xtask layers` checks).

#![forbid(unsafe_code)]

pub mod settings;

pub mod text;

mod fields;

pub mod net;

pub mod clock;

pub mod drain;

pub mod telemetry;

pub mod grpc;

pub mod identity;

pub mod tls;

pub mod hbone;

pub mod model;

pub mod policy;

pub mod store;

pub mod xds;

pub mod serve;

#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
