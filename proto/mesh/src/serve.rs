//! Serving: the accept loop, the copy between two streams, and the small HTTP servers of operators.

mod accept;
pub mod activity;
mod admin;
mod copy;

pub use accept::accept_loop;
pub use admin::{AdminRequest, AdminResponse, AdminServer, Readiness, ReadyGuard, gzip, json, text};
pub use copy::{CopyError, Count, Transferred, copy_bidirectional};
