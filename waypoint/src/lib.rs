//! The waypoint: the mesh's L7 proxy. HBONE in with the client's identity proved, routing and policy, HBONE out to the
//! endpoint. It knows workloads, services, routes and policies as the control plane resolves them; it knows neither
//! Kubernetes nor pods.
//!
//! The path of a request: [`listener`] (accept, CONNECT, protocol) → [`request`] (phases) → [`upstream`]; decisions are
//! pure and stand beside it: [`target`], [`route`], [`policy`], [`filter`], [`balance`].

#![forbid(unsafe_code)]

pub mod app;
pub mod balance;
pub mod body;
pub mod config;
pub mod filter;
pub mod listener;
pub mod path;
pub mod policy;
pub mod prepare;
pub mod record;
pub mod reply;
pub mod request;
pub mod route;
pub mod sniff;
pub mod target;
pub mod tcp;
pub mod upstream;
pub mod world;
