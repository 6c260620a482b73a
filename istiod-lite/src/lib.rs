//! The control plane: watches the Kubernetes API, translates what users wrote into mesh resources, pushes them to the
//! proxies over delta xDS, signs certificates, deploys waypoints and writes status. It carries no user traffic.
//!
//! Data flows one way: `watch` → `translate` (pure) → [`resources::ResourceStore`] → `push`. `status`, `deploy` and
//! `enrol` write back what became of it.

#![forbid(unsafe_code)]

pub mod auth;
pub mod ca;
pub mod push;
pub mod resources;
pub mod standalone;
