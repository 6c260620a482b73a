//! Pods from Istio's CNI agent (ZDS), in place of the control plane's enrolments.
//!
//! The agent listens on a unix socket of the node and owns the redirection rules in the pods; we connect, are told which
//! pods there are, get each one's network namespace as a file descriptor, and answer when its listeners are open.
//! [`session`] is the protocol and touches nothing; [`socket`] moves packets; [`pods`] owns what was started;
//! [`agent`] ties the three together, reconnects, and says whether we are ready.
//!
//! A pod here has none of what [`crate::node::manager`] is for: it need not be found, nothing is put into its kernel,
//! nobody else is told that it is served. What the two have in common is the data path, from the listeners on.

pub mod agent;
pub mod pods;
pub mod session;
pub mod socket;
