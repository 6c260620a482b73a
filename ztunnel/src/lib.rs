//! The node proxy: captures pods' TCP, carries it as HBONE, enforces L4 policy and records it.
//!
//! It parses no HTTP beyond the tunnel's own and never talks to the Kubernetes API: pods, workloads and policies come
//! from the control plane or from a file, pods from a CNI agent as well. One connection's path is one file read from top to bottom: [`outbound`],
//! [`inbound`] or [`passthrough`]. What to do is decided in [`resolve`], which touches nothing.
//!
//! Left out, with an error where it is asked for: gateways between networks, application tunnels.

#![forbid(unsafe_code)]
// `serde_json::json!` takes some steps for each setting that `/config_dump` shows.
#![recursion_limit = "512"]

pub mod admin;
pub mod app;
pub mod capture;
pub mod certs;
pub mod cni;
pub mod config;
pub mod dedicated;
pub mod dns;
pub mod ending;
pub mod explain;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
pub mod handover;
pub mod handshakes;
pub mod hearsay;
pub mod inbound;
pub mod join;
pub mod names;
pub mod node;
pub mod outbound;
pub mod passthrough;
pub mod privileges;
pub mod resolve;
pub mod revocation;
pub mod uninstall;
pub mod worker;
pub mod zds;

/// Name and version of this build, one constant so that it can be read from the binary.
const BUILD: &str = concat!("ztunnel/", env!("CARGO_PKG_VERSION"));
/// The version alone.
pub const VERSION: &str = BUILD.split_at("ztunnel/".len()).1;
