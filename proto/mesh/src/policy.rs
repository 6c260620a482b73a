//! L4 authorization: who may open a connection to a workload.
//!
//! [`Policy`] is the parsed form of one Authorization resource and [`authorize`] the only evaluator. It yields a
//! [`Permit`], which nothing else can make, or a [`Denial`] that names the policy. A policy that cannot be understood is
//! kept as [`Policy::unreadable`] and refuses everything in its scope: a door we cannot read the rules of stays closed.
//! [`still_allows`] asks the same for a connection that is open, without counting it again.
//!
//! Behind a waypoint a connection has two sources: who proved an identity by TLS, and the [`Original`] client that one
//! speaks for. A rule matches when what it demands holds for one of the two and what it excludes for neither.
//!
//! ```text
//! any DENY matches ──yes──► denied
//!        │no
//! any ALLOW applies? ──no──► permitted
//!        │yes
//! any ALLOW matches ──yes──► permitted, else denied
//! ```

mod rules;
mod wire;

#[cfg(test)]
mod tests;

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::identity::Identity;
use crate::model::NamespacedName;

pub use rules::{Cidr, Clause, Group, Match, ServiceAccountMatch, StringMatch};
pub use wire::PolicyError;

/// Which workloads a policy governs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Scope {
    /// All of the mesh.
    Global,
    /// Those of the policy's namespace.
    #[default]
    Namespace,
    /// Those that list it by name.
    WorkloadSelector,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Action {
    Allow,
    Deny,
}

/// One authorization policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    key: NamespacedName,
    scope: Scope,
    body: Body,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Body {
    Rules { action: Action, groups: Vec<Group>, dry_run: bool },
    Unreadable(String),
}

/// What a decision is about.
#[derive(Clone, Debug)]
pub struct Connection {
    /// The identity the peer proved by TLS; `None` for plaintext.
    pub source: Option<Identity>,
    /// The TCP peer.
    pub source_ip: IpAddr,
    /// The workload's address and port after all redirection.
    pub destination: SocketAddr,
    /// The client that the peer speaks for; only of a peer that may.
    pub original: Option<Original>,
}

/// A client behind a proxy, by the word of the proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Original {
    /// What it has proved to the proxy.
    pub identity: Identity,
    /// Port 0 where the proxy carries several of its connections in one.
    pub address: SocketAddr,
}

/// Proof that [`authorize`] let a connection through. Only that function makes one.
#[derive(Debug)]
#[must_use]
pub struct Permit {
    allowed_by: Option<NamespacedName>,
}

impl Permit {
    /// The ALLOW policy that matched; `None` when no ALLOW policy applies to the workload.
    pub fn allowed_by(&self) -> Option<&NamespacedName> {
        self.allowed_by.as_ref()
    }
}

/// Why a connection was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denial {
    #[error("explicitly denied by policy {0}")]
    Policy(NamespacedName),
    #[error("policy {policy} is not understood and denies all it governs: {reason}")]
    Unreadable { policy: NamespacedName, reason: String },
    #[error("allow policies exist, but none matched")]
    NoAllowMatched,
}

impl Denial {
    /// The policy that refused, unless it was the absence of a matching one.
    pub fn policy(&self) -> Option<&NamespacedName> {
        match self {
            Self::Policy(policy) | Self::Unreadable { policy, .. } => Some(policy),
            Self::NoAllowMatched => None,
        }
    }
}

impl Policy {
    /// A policy from its parts. No groups: it never matches (an ALLOW then denies everyone, a DENY nobody).
    pub fn new(key: NamespacedName, scope: Scope, action: Action, groups: Vec<Group>) -> Self {
        Self { key, scope, body: Body::Rules { action, groups, dry_run: false } }
    }

    /// The same policy, evaluated and reported but not enforced.
    #[must_use]
    pub fn dry_run_only(mut self) -> Self {
        if let Body::Rules { dry_run, .. } = &mut self.body {
            *dry_run = true;
        }
        self
    }

    /// Stands in for a policy that was received but not understood: denies everything in `scope`.
    pub fn unreadable(key: NamespacedName, scope: Scope, reason: String) -> Self {
        Self { key, scope, body: Body::Unreadable(reason) }
    }

    pub fn key(&self) -> &NamespacedName {
        &self.key
    }

    pub fn namespace(&self) -> &str {
        &self.key.namespace
    }

    pub fn name(&self) -> &str {
        &self.key.name
    }

    pub fn scope(&self) -> Scope {
        self.scope
    }

    /// ALLOW or DENY; an unreadable policy acts as DENY.
    pub fn action(&self) -> Action {
        match &self.body {
            Body::Rules { action, .. } => *action,
            Body::Unreadable(_) => Action::Deny,
        }
    }

    pub fn is_dry_run(&self) -> bool {
        matches!(self.body, Body::Rules { dry_run: true, .. })
    }

    /// The first rule that matches `conn`, counted from 0. An unreadable policy has none.
    pub fn matching_rule(&self, conn: &Connection) -> Option<usize> {
        rules::first_match(self.groups(), &rules::Subject::new(conn))
    }

    fn groups(&self) -> &[Group] {
        match &self.body {
            Body::Rules { groups, .. } => groups,
            Body::Unreadable(_) => &[],
        }
    }
}

/// Decides whether `conn` may be opened under the policies that govern its destination workload (their order does not
/// matter). Dry-run policies are evaluated, logged and counted, all of them, and change nothing.
///
/// # Errors
/// [`Denial`] when a DENY policy matches, an unreadable one applies, or ALLOW policies apply and none matches.
pub fn authorize<'a>(policies: impl IntoIterator<Item = &'a Policy>, conn: &Connection) -> Result<Permit, Denial> {
    decide(policies, conn, |policy, action, matched| report_dry_run(policy, action, matched, conn))
}

/// Would `conn`, which is open, be let in now? As [`authorize`], but nobody is told: the connection has been counted.
pub fn still_allows<'a>(policies: impl IntoIterator<Item = &'a Policy>, conn: &Connection) -> bool {
    decide(policies, conn, |_, _, _| {}).is_ok()
}

/// `dry_run` hears of each policy that is not enforced, its action, and whether it matches.
fn decide<'a>(
    policies: impl IntoIterator<Item = &'a Policy>,
    conn: &Connection,
    dry_run: impl Fn(&Policy, Action, bool),
) -> Result<Permit, Denial> {
    let subject = rules::Subject::new(conn);
    let (mut must_match, mut allowed_by, mut denied) = (false, None, None);
    for policy in policies {
        let matches = |groups| rules::any_matches(groups, &subject);
        match &policy.body {
            Body::Rules { action, groups, dry_run: true } => dry_run(policy, *action, matches(groups)),
            // What follows decides nothing any more; dry-run policies behind it still count.
            _ if denied.is_some() => {}
            Body::Unreadable(reason) => {
                denied = Some(Denial::Unreadable { policy: policy.key.clone(), reason: reason.clone() });
            }
            Body::Rules { action: Action::Deny, groups, .. } => {
                if matches(groups) {
                    denied = Some(Denial::Policy(policy.key.clone()));
                }
            }
            Body::Rules { action: Action::Allow, groups, .. } => {
                must_match = true;
                if allowed_by.is_none() && matches(groups) {
                    allowed_by = Some(policy.key.clone());
                }
            }
        }
    }
    match denied {
        Some(denial) => Err(denial),
        None if must_match && allowed_by.is_none() => Err(Denial::NoAllowMatched),
        None => Ok(Permit { allowed_by }),
    }
}

fn report_dry_run(policy: &Policy, action: Action, matched: bool, conn: &Connection) {
    let (action, outcome) = match (action, matched) {
        (Action::Deny, true) => ("DENY", "matched"),
        (Action::Deny, false) => ("DENY", "not_matched"),
        (Action::Allow, true) => ("ALLOW", "matched"),
        (Action::Allow, false) => ("ALLOW", "not_matched"),
    };
    metrics::counter!("mesh_authorization_dry_run_total",
        "policy" => policy.key.to_string(), "action" => action, "outcome" => outcome)
    .increment(1);
    tracing::info!(policy = %policy.key, action, outcome, source.ip = %conn.source_ip,
        destination = %conn.destination, "dry-run policy evaluated");
}

impl Serialize for Policy {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Dump<'a> {
            name: &'a str,
            namespace: &'a str,
            scope: Scope,
            action: Action,
            rules: &'a [Group],
            dry_run: bool,
            #[serde(skip_serializing_if = "Option::is_none")]
            unreadable: Option<&'a str>,
        }
        Dump {
            name: self.name(),
            namespace: self.namespace(),
            scope: self.scope,
            action: self.action(),
            rules: self.groups(),
            dry_run: self.is_dry_run(),
            unreadable: match &self.body {
                Body::Unreadable(reason) => Some(reason),
                Body::Rules { .. } => None,
            },
        }
        .serialize(serializer)
    }
}
