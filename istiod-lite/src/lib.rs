//! The control plane: watches the Kubernetes API, translates what users wrote into mesh resources, pushes them to the
//! proxies over delta xDS, signs certificates, deploys waypoints and writes status. It carries no user traffic.
//!
//! Data flows one way: `watch` → `translate` (pure) → [`resources::ResourceStore`] → `push`. `status`, `deploy` and
//! `enrol` write back what became of it.

#![forbid(unsafe_code)]

pub mod admission;
pub mod app;
pub mod auth;
pub mod ca;
pub mod cli;
pub mod config;
pub mod deploy;
pub mod enrol;
pub mod leader;
pub mod placement;
pub mod push;
pub mod replica;
pub mod resources;
pub mod revision;
mod schema;
pub mod serve;
pub mod standalone;
pub mod status;
mod strategic;
pub mod translate;
pub mod types;
pub mod watch;

#[cfg(test)]
mod testing;
