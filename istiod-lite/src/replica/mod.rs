//! What the replicas of a control plane tell each other. Each has the acknowledgements of its own clients only, and two
//! things wait for those of all: that a policy is called accepted, and that the enrolment of a pod that leaves is withdrawn.
//!
//! Generations are each replica's own, so questions are about content: the digest of all resources of a type, which is
//! the same where the world is the same, or what a workload says. [`service`] answers, [`peers`] asks.

pub mod peers;
pub mod service;

use std::collections::BTreeMap;

use mesh_proto::replica::Content;
use mesh_proto::security::AUTHORIZATION_TYPE;
use mesh_proto::waypoint::HTTP_POLICY_TYPE;
use xxhash_rust::xxh64::Xxh64;

use crate::resources::{Acks, Audience, Snapshot};

/// The types that policies become, whose refusals go into a status.
pub const POLICY_TYPES: [&str; 2] = [AUTHORIZATION_TYPE, HTTP_POLICY_TYPE];

/// What there is of these types.
pub fn contents(snapshot: &Snapshot, types: &[&str]) -> Vec<Content> {
    let content = |type_url: &&str| Content { type_url: (*type_url).to_owned(), digest: digest(snapshot, type_url) };
    types.iter().map(content).collect()
}

/// Of what clients may see of a type. The same in every process: it goes to another one.
fn digest(snapshot: &Snapshot, type_url: &str) -> u64 {
    let mut hasher = Xxh64::new(0);
    let mut add = |text: &str| {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    };
    for resource in snapshot.of_type(type_url) {
        add(&resource.name);
        add(&resource.version.to_string());
        for audience in resource.audience() {
            match audience {
                Audience::All => add("all"),
                Audience::Node(node) => add(&format!("node/{node}")),
                Audience::Waypoint { namespace, name } => add(&format!("waypoint/{namespace}/{name}")),
            }
        }
    }
    hasher.digest()
}

/// Which resources proxies refuse, by type and name: how many do, and what one of them says.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Refusals(BTreeMap<(String, String), (usize, String)>);

impl Refusals {
    /// What the clients of this process refuse, and those of others.
    pub fn of(&self, acks: &Acks, type_url: &'static str, name: &str) -> Option<(usize, String)> {
        let ours = acks.refused(type_url, name);
        let theirs = self.0.get(&(type_url.to_owned(), name.to_owned()));
        match (ours, theirs) {
            (Some((some, reason)), Some((others, _))) => Some((some + others, reason)),
            (ours, theirs) => ours.or_else(|| theirs.cloned()),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
