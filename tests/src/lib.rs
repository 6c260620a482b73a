//! The lab kit: a mesh in a box, and what the cases in `tests/` share.
//!
//! Nodes and pods are network namespaces below one parent namespace that has no uplink; processes live in cgroups named as a
//! kubelet names them and in mount namespaces of their own. [`raw`] offers just that, for tests and benchmarks which
//! bring their own configuration. [`cluster`] adds an API server and plays kubelet, kube-proxy and the workload controllers on top.
//! The kit is test equipment: no product code knows that it exists.
#![forbid(unsafe_code)]

pub mod bench;
pub mod capture;
pub mod cluster;
pub mod container;
pub mod demo;
pub mod echo;
pub mod load;
pub mod local;
pub mod lossy;
pub mod memory;
pub mod places;
pub mod raw;
pub mod record;
pub mod session;
pub mod sys;
pub mod topology;
pub mod wait;
