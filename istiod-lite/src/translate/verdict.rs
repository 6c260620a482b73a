//! What becomes of each object, decided by the same functions that translate it: what is accepted is either enforced or
//! reported here. `status` writes it down.

use std::net::IpAddr;

use crate::types::Key;

/// Of a condition; the API takes so many characters (`maxLength`).
pub const LONGEST_MESSAGE: usize = 32768;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    True,
    False,
}

impl Status {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
        }
    }
}

impl From<bool> for Status {
    fn from(value: bool) -> Self {
        if value { Self::True } else { Self::False }
    }
}

/// A condition as it should be; times are added when it is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    pub r#type: &'static str,
    pub status: Status,
    pub reason: &'static str,
    pub message: String,
}

impl Wanted {
    pub fn new(r#type: &'static str, status: Status, reason: &'static str, message: impl Into<String>) -> Self {
        Self { r#type, status, reason, message: message.into() }
    }
}

/// What is wrong with an object as one message: as many of its problems as the API takes, and how many more there are.
pub fn joined<S: AsRef<str>>(problems: &[S]) -> String {
    // Leaves room for what is said around them and of the rest.
    const ENOUGH: usize = LONGEST_MESSAGE - 1024;
    let mut message = String::new();
    for (n, problem) in problems.iter().map(AsRef::as_ref).enumerate() {
        if message.len() + problem.len() > ENOUGH {
            let more = if n == 0 { "" } else { "; and " };
            return format!("{message}{more}{} more", problems.len() - n);
        }
        if n > 0 {
            message.push_str("; ");
        }
        message.push_str(problem);
    }
    message
}

/// The kinds we report on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Service,
    GatewayClass,
    Gateway,
    HttpRoute,
    AuthorizationPolicy,
    PeerAuthentication,
    ServiceEntry,
    WorkloadEntry,
}

impl Kind {
    /// As the API has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::GatewayClass => "GatewayClass",
            Self::Gateway => "Gateway",
            Self::HttpRoute => "HTTPRoute",
            Self::AuthorizationPolicy => "AuthorizationPolicy",
            Self::PeerAuthentication => "PeerAuthentication",
            Self::ServiceEntry => "ServiceEntry",
            Self::WorkloadEntry => "WorkloadEntry",
        }
    }
}

/// What is to be said about one object.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    pub kind: Kind,
    pub key: Key,
    /// `metadata.generation` that was judged.
    pub generation: i64,
    pub report: Report,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Report {
    /// `status.conditions`: those of `owned` types become exactly `wanted`, others are left alone.
    Conditions { owned: &'static [&'static str], wanted: Vec<Wanted> },
    /// As [`Self::Conditions`], and `status.addresses` become exactly these: host and address.
    Addressed { owned: &'static [&'static str], wanted: Vec<Wanted>, addresses: Vec<(String, IpAddr)> },
    Gateway {
        conditions: Vec<Wanted>,
        /// `(type, value)`; `None` leaves what is there.
        addresses: Option<Vec<(&'static str, String)>>,
        listeners: Vec<ListenerReport>,
    },
    /// `status.parents` of our controller become exactly these.
    Parents(Vec<ParentReport>),
}

#[derive(Debug, Clone, PartialEq)]
pub struct ListenerReport {
    pub name: String,
    /// Kinds of routes it takes, all of the Gateway API's group.
    pub kinds: &'static [&'static str],
    pub attached: i32,
    pub conditions: Vec<Wanted>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct ParentReport {
    /// The parentRef as the user wrote it.
    pub parent: serde_json::Value,
    pub conditions: Vec<Wanted>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_too_many_problems_as_many_are_told_as_fit_and_how_many_more_there_are() {
        assert_eq!(joined(&["a", "b: c"]), "a; b: c");
        assert_eq!(joined::<&str>(&[]), "");
        let problems: Vec<String> = (0..10_000).map(|n| format!("hosts: {n} is not a host name")).collect();
        let message = joined(&problems);
        assert!((LONGEST_MESSAGE - 2048..LONGEST_MESSAGE).contains(&message.len()), "{}", message.len());
        let told = message.matches("is not a host name").count();
        assert!(message.ends_with(&format!("is not a host name; and {} more", problems.len() - told)), "{told}");
        assert_eq!(joined(&["x".repeat(LONGEST_MESSAGE)]), "1 more");
    }
}
