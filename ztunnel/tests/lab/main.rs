//! ztunnels fed from files, and what an application and somebody on the wire see of the mesh.
//!
//! Needs root, the BPF programs and some programs of a Linux system. Where one is missing a test says so and passes,
//! unless `LAB=required`.

#![forbid(unsafe_code)]

mod foreign;
mod hostile;
mod life;
mod networks;
mod operators;
mod repair;
mod revocation;
mod same_node;
mod sandwich;
mod support;
mod two_nodes;
