//! The control plane: watches the Kubernetes API, translates what users wrote into mesh resources, pushes them to the
//! proxies over delta xDS, signs certificates, deploys waypoints and writes status. It carries no user traffic.
//!
//! Data flows one way: `watch` → `translate` (pure) → [`resources::ResourceStore`] → `push`. `status`, `deploy` and
//! `enrol` write back what became of it.

#![forbid(unsafe_code)]

pub mod analyze;
pub mod app;
pub mod auth;
pub mod ca;
pub mod config;
pub mod deploy;
pub mod enrol;
pub mod placement;
pub mod push;
pub mod resources;
pub mod serve;
pub mod standalone;
pub mod status;
pub mod translate;
pub mod types;
pub mod watch;

#[cfg(test)]
mod testing;
