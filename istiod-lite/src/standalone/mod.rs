//! The embedded Kubernetes API server: for laptops, VMs and tests, not a Kubernetes replacement.
//!
//! A request goes `server` (sockets, TLS) → `api` (who, may they) → `handlers` (which verb) → `verbs` (what the write
//! does to the object) → `store` (durable, then visible). Controllers that belong to an API server (namespaces, owner references,
//! definitions) run beside it. Nothing outside this module may know which server it talks to: clients get a kubeconfig.
//!
//! Deliberately absent: scheduler, workload controllers, admission webhooks (stored, never called), conversion webhooks,
//! logs and exec, a few functions of CEL (`cel`; a definition's status names the rules that call them), and protobuf beyond
//! the few kinds kubectl sends that way (see `protobuf`).

mod api;
mod apply;
mod builtin;
mod cel;
mod controllers;
mod crd;
mod depth;
mod discovery;
mod error;
mod files;
#[cfg(fuzzing)]
pub mod fuzzing;
mod handlers;
mod openapi;
mod patch;
mod protobuf;
mod rbac;
mod registry;
mod request;
mod reviews;
mod schema;
mod selector;
mod server;
mod services;
mod store;
mod table;
mod tls;
mod tokens;
mod verbs;
mod watch;

pub use server::{Server, StandaloneArgs, default_service_cidrs, run};
