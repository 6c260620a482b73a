//! The CNI side: a chained plugin that has a new pod enrolled before its first process runs, and what it takes.
//!
//! ```text
//!  runtime ── stdin, CNI_* ──► plugin ── cni.sock: request, netns as a descriptor ──► server ── order ──► manager
//!                              (host)                                                 (ztunnel)  └─ Resolve ─► control plane
//! ```
//! The plugin runs on the host, once for each call of the runtime: crate `ztunnel-cni`. [`server`] is a task of ztunnel.
//! [`install`] puts the plugin into the node's CNI directories and takes it out.
//!
//! Invariant: an ADD ends with the pod captured, or outside the mesh by the control plane's word (its last one, where it
//! is silent), or with an error that makes the runtime try again. It never leaves a pod half in.

pub mod conflist;
pub mod install;
pub mod server;

pub use ztunnel_cni::{DEFAULT_SOCKET, DEFAULT_STATE};
