//! Configuration from the control plane: delta xDS, and the file that can stand in for it.
//!
//! [`delta`] is the exchange as a state machine without sockets or clocks, [`inbox`] what a stream brings for it;
//! [`XdsClient`] drives both over gRPC and reconnects for ever; a [`ResourceHandler`] for each type takes what arrives.
//! Nothing is forgotten while the control plane is away: handlers keep what they were given until it is removed by name.

mod client;
pub mod delta;
mod handlers;
pub mod inbox;
pub mod local;
pub mod response;

pub use client::{Demand, Demanded, NodeInfo, NodeRole, XdsClient, XdsConfig, demand};
pub use handlers::{Batch, Rejected, ResourceHandler, address_handler, authorization_handler, typed_handler};
