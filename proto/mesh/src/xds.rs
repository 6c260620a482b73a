//! Configuration from the control plane: delta xDS, and the file that can stand in for it.
//!
//! [`delta`] is the exchange as a state machine without sockets or clocks; [`XdsClient`] drives it over gRPC and
//! reconnects for ever; a [`ResourceHandler`] for each type takes what arrives. Nothing is forgotten while the control
//! plane is away: handlers keep what they were given until it is removed by name.

mod client;
pub mod delta;
mod handlers;
pub mod local;

pub use client::{Demand, Demanded, NodeInfo, NodeRole, XdsClient, XdsConfig, demand};
pub use handlers::{Rejected, ResourceHandler, address_handler, authorization_handler, typed_handler};
