//! The cluster around a lab: an API server, and everything a node's kubelet, kube-proxy and the workload controllers would do.
//!
//! [`Supervisor`] is the one process that answers for it. It watches the API and brings the machine to what the objects say:
//! `workloads` turns Deployments and DaemonSets into pods, `kubelet` runs pods, `endpoints` lists what is ready,
//! `services` programs the nodes, `dns` answers names.

pub mod api;
pub mod dns;
pub mod endpoints;
pub mod images;
pub mod kubelet;
pub mod probe;
pub mod services;
pub mod state;
pub mod supervisor;
pub mod template;
pub mod volumes;
pub mod workloads;

pub use supervisor::{Options, Supervisor};

/// Port of the API server, in the parent namespace.
pub const API_PORT: u16 = 6443;
