//! What becomes of each object, decided by the same functions that translate it: what is accepted is either enforced or
//! reported here. `status` writes it down.

use std::fmt;
use std::net::IpAddr;

use crate::types::Key;

/// Of a condition; the API takes so many characters (`maxLength`).
pub const LONGEST_MESSAGE: usize = 32768;
/// Of one condition; an object may be as large as the API takes.
pub const MOST_FAULTS: usize = 128;
/// What mends a value of another type than there must be.
pub const EXPLAIN: &str = "`kubectl explain` says what belongs there";

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

/// A mistake in an object that only another version of that object mends: whatever else there is, and whatever later
/// versions of the mesh can do. Who is about to write it is told (`admission`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Its path, from `spec` or `metadata` on.
    pub field: String,
    /// What is wrong there, and how to write it.
    pub text: String,
}

impl Fault {
    pub fn new(field: impl Into<String>, text: impl Into<String>) -> Self {
        Self { field: field.into(), text: text.into() }
    }

    /// From a message of ours, which begins with the field it speaks of.
    pub fn of(message: &str, mend: &str) -> Self {
        let (field, text) = message.split_once(": ").unwrap_or(("spec", message));
        let is_whole = ["spec", "metadata"].iter().any(|root| field.strip_prefix(root).is_some_and(is_below));
        let field = if is_whole { field.to_owned() } else { format!("spec.{field}") };
        Self { field, text: format!("{text}; {mend}") }
    }
}

fn is_below(rest: &str) -> bool {
    rest.is_empty() || rest.starts_with('.')
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.text)
    }
}

/// What is wrong with an object, as its status has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub message: String,
    /// `None`: other objects or a later version may mend it, or others than this mesh know what to do with it.
    pub fault: Option<Fault>,
}

impl Problem {
    /// One that nothing but another version of the object mends; `mend` says how.
    pub fn fault(message: impl Into<String>, mend: &str) -> Self {
        let message = message.into();
        let fault = Some(Fault::of(&message, mend));
        Self { message, fault }
    }

    /// The same, in other words.
    pub fn worded(self, words: impl FnOnce(String) -> String) -> Self {
        Self { message: words(self.message), ..self }
    }
}

impl From<String> for Problem {
    fn from(message: String) -> Self {
        Self { message, fault: None }
    }
}

impl From<&str> for Problem {
    fn from(message: &str) -> Self {
        message.to_owned().into()
    }
}

impl AsRef<str> for Problem {
    fn as_ref(&self) -> &str {
        &self.message
    }
}

/// A condition as it should be; times are added when it is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    pub r#type: &'static str,
    pub status: Status,
    pub reason: &'static str,
    pub message: String,
    /// Those that it speaks of, or the first of them.
    pub faults: Vec<Fault>,
}

impl Wanted {
    pub fn new(r#type: &'static str, status: Status, reason: &'static str, message: impl Into<String>) -> Self {
        Self { r#type, status, reason, message: message.into(), faults: Vec::new() }
    }

    /// Something is not done as it was written.
    pub fn is_bad(&self) -> bool {
        let tells_of_bad = matches!(self.r#type, "PartiallyInvalid" | "Conflicted");
        match self.status {
            Status::False => !tells_of_bad,
            Status::True => tells_of_bad || matches!(self.reason, "PartiallyInvalid" | "UnsupportedValue"),
        }
    }

    /// Keeps what of these is a fault.
    pub fn because<'a>(self, problems: impl IntoIterator<Item = &'a Problem>) -> Self {
        let faults = problems.into_iter().filter_map(|problem| problem.fault.as_ref());
        Self { faults: faults.take(MOST_FAULTS).cloned().collect(), ..self }
    }
}

/// What is wrong with an object as one message: as many of its problems as the API takes, and how many more there are.
pub fn joined<S: AsRef<str>>(problems: &[S]) -> String {
    // Leaves room for what is said around them and of the rest.
    const ENOUGH: usize = LONGEST_MESSAGE - 1024;
    let mut message = String::new();
    for (n, problem) in problems.iter().map(AsRef::as_ref).enumerate() {
        if message.len() + problem.len() > ENOUGH {
            if n > 0 {
                return format!("{message}; and {} more", problems.len() - n);
            }
            let more = problems.len() - 1;
            let more = if more == 0 { String::new() } else { format!("; and {more} more") };
            return format!("{}…{more}", &problem[..problem.floor_char_boundary(ENOUGH)]);
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
    /// `status.conditions` of the types wanted, and `status.supportedFeatures`, become exactly these.
    Class { wanted: Vec<Wanted>, features: &'static [&'static str] },
    Gateway {
        conditions: Vec<Wanted>,
        /// `(type, value)`; `None` leaves what is there.
        addresses: Option<Vec<(&'static str, String)>>,
        listeners: Vec<ListenerReport>,
    },
    /// `status.parents` of our controller become exactly these.
    Parents(Vec<ParentReport>),
}

impl Report {
    /// All of them, those of listeners and parents too.
    pub fn conditions(&self) -> Vec<&Wanted> {
        match self {
            Self::Conditions { wanted, .. } | Self::Addressed { wanted, .. } | Self::Class { wanted, .. } => {
                wanted.iter().collect()
            }
            Self::Gateway { conditions, listeners, .. } => {
                conditions.iter().chain(listeners.iter().flat_map(|listener| &listener.conditions)).collect()
            }
            Self::Parents(parents) => parents.iter().flat_map(|parent| &parent.conditions).collect(),
        }
    }
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
    fn a_fault_has_its_field_from_the_message_about_it() {
        let said = |message: &str| Fault::of(message, "mend it").to_string();
        assert_eq!(said("hosts: \"a b\": no name"), "spec.hosts: \"a b\": no name; mend it");
        assert_eq!(said("spec: 1 is not an object"), "spec: 1 is not an object; mend it");
        assert_eq!(said("spec.listeners: none"), "spec.listeners: none; mend it");
        assert_eq!(said("metadata.name: too long"), "metadata.name: too long; mend it");
        assert_eq!(said("nothing at all"), "spec: nothing at all; mend it");
    }

    #[test]
    fn of_too_many_problems_as_many_are_told_as_fit_and_how_many_more_there_are() {
        assert_eq!(joined(&["a", "b: c"]), "a; b: c");
        assert_eq!(joined::<&str>(&[]), "");
        let problems: Vec<String> = (0..10_000).map(|n| format!("hosts: {n} is not a host name")).collect();
        let message = joined(&problems);
        assert!((LONGEST_MESSAGE - 2048..LONGEST_MESSAGE).contains(&message.len()), "{}", message.len());
        let told = message.matches("is not a host name").count();
        assert!(message.ends_with(&format!("is not a host name; and {} more", problems.len() - told)), "{told}");
        let long = "ü".repeat(LONGEST_MESSAGE);
        let cut = joined(&[&*long]);
        assert!(cut.len() < LONGEST_MESSAGE && cut.starts_with("üü") && cut.ends_with("ü…"), "{}", cut.len());
        assert!(joined(&[&*long, "a", "b"]).ends_with("ü…; and 2 more"));
    }
}
