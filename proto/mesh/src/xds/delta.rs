//! The client's half of the delta xDS exchange, without I/O: messages in, messages out.
//!
//! ```text
//! handle_connected ─► first request of each type (node, subscription, retained versions)
//!                        │
//! handle_response ◄──────┘  ─► Delivery, to be applied by the handler
//! handle_applied(delivery, rejected) ─► ACK or NACK
//! subscribe ─► request for one more name (on-demand types); is_answered ─► it is held, or stands for nothing
//! forget ─► names given up, the oldest first, when too many stand for nothing
//! ```
//! What is retained survives a reconnect: the server is told the versions we hold and sends the difference. A rejected
//! resource is retained under no version: it comes again, and if it is deleted meanwhile we are told, as the handler may
//! hold an earlier version of it or have closed a door on its account.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt;

use mesh_proto::ads::{DeltaDiscoveryRequest, Node, Status};

use super::Rejected;
use crate::text::{NameHasher, Text};

/// The name that stands for every resource of a type.
const WILDCARD: &str = "*";

/// Names that stand for nothing and are kept nevertheless, so that nobody need ask again: the server tells when there is
/// something. Whoever dials addresses at random must not make the list grow for ever.
const MOST_ABSENT: usize = 10_000;

/// Which resources of a type are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    All,
    /// Those asked for by [`DeltaClient::subscribe`].
    OnDemand,
}

/// The state of the exchange for all types.
#[derive(Debug)]
pub struct DeltaClient {
    node: Node,
    /// In the order in which they are requested.
    types: Vec<TypeState>,
    /// Which connection this is; answers to an earlier one are not sent.
    connection: u64,
}

#[derive(Debug)]
struct TypeState {
    type_url: &'static str,
    interest: Interest,
    /// Name and version of what the handler holds. Handlers mostly have the name too, and share it.
    retained: HashMap<Text, Version, NameHasher>,
    /// On-demand names, of resources or their aliases, that the server has been asked for.
    asked: HashMap<String, Word>,
    /// Those that were answered with nothing, the oldest first; some have become something else since.
    absent: VecDeque<String>,
    synced: bool,
}

/// What has been said to a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Word {
    Pending,
    Found,
    Absent,
}

/// What a server calls the state of a resource. Mostly a hash in hexadecimal digits, which is kept as the number it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version(Number);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Number {
    Hash(u64),
    Other(Text),
}

impl Version {
    /// Of what was rejected; equals no version a server sends.
    fn unreadable() -> Self {
        Self::from("")
    }
}

impl From<&str> for Version {
    fn from(text: &str) -> Self {
        let is_hash = text.len() == 16 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        match is_hash.then(|| u64::from_str_radix(text, 16)) {
            Some(Ok(hash)) => Self(Number::Hash(hash)),
            _ if text.is_empty() => Self(Number::Other(Text::default())),
            _ => Self(Number::Other(text.into())),
        }
    }
}

impl fmt::Display for Version {
    /// As the server wrote it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Number::Hash(hash) => write!(f, "{hash:016x}"),
            Number::Other(text) => f.write_str(text),
        }
    }
}

/// A response whose resources the handler of their type has been given already.
#[derive(Debug, Default)]
pub struct Response {
    pub type_url: String,
    pub nonce: String,
    pub resources: Vec<Resource>,
    pub aliases: Vec<String>,
    pub removed: Vec<String>,
}

/// A resource, without its content.
#[derive(Debug)]
pub struct Resource {
    pub name: Text,
    pub version: Version,
    pub content: Content,
}

/// Of which type a resource's content is.
#[derive(Debug, PartialEq, Eq)]
pub enum Content {
    /// One that somebody handles.
    Handled(&'static str),
    Other(Box<str>),
    Missing,
}

/// One response, to be applied and then reported by [`DeltaClient::handle_applied`].
#[derive(Debug)]
pub struct Delivery {
    pub type_url: &'static str,
    pub removed: Vec<String>,
    /// Resources that are wrong before any handler sees them.
    rejected: Vec<Rejected>,
    /// Name and version of what was sent: it is retained when applied.
    versions: Vec<(Text, Version)>,
    aliases: Vec<String>,
    nonce: String,
    connection: u64,
}

/// A response of a type that was not asked for.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the control plane sent {0:?}, which was not asked for")]
pub struct UnknownType(pub String);

impl DeltaClient {
    /// An exchange for `types`, requested in this order.
    pub fn new(node: Node, types: impl IntoIterator<Item = (&'static str, Interest)>) -> Self {
        let types = types
            .into_iter()
            .map(|(type_url, interest)| TypeState {
                type_url,
                interest,
                retained: HashMap::default(),
                asked: HashMap::new(),
                absent: VecDeque::new(),
                synced: false,
            })
            .collect();
        Self { node, types, connection: 0 }
    }

    /// A new stream: what to send first on it. Only these requests carry the node.
    pub fn handle_connected(&mut self) -> Vec<DeltaDiscoveryRequest> {
        self.connection += 1;
        self.types.iter().map(|state| state.first_request(&self.node)).collect()
    }

    /// The name of a resource of a type: the very text that is retained, if it is.
    pub fn name(&self, type_url: &str, name: &str) -> Text {
        let state = self.types.iter().find(|state| state.type_url == type_url);
        let known = state.and_then(|state| state.retained.get_key_value(name));
        known.map_or_else(|| name.into(), |(known, _)| known.clone())
    }

    /// Takes a response apart.
    ///
    /// # Errors
    /// [`UnknownType`]: nothing is to be sent, since even a NACK would subscribe to the type.
    pub fn handle_response(&mut self, response: Response) -> Result<Delivery, UnknownType> {
        let Some(state) = self.types.iter().find(|state| state.type_url == response.type_url) else {
            return Err(UnknownType(response.type_url));
        };
        let mut delivery = Delivery {
            type_url: state.type_url,
            removed: response.removed,
            rejected: Vec::new(),
            versions: Vec::with_capacity(response.resources.len()),
            aliases: response.aliases,
            nonce: response.nonce,
            connection: self.connection,
        };
        for Resource { name, version, content } in response.resources {
            match content {
                Content::Handled(type_url) if type_url == state.type_url => delivery.versions.push((name, version)),
                Content::Handled(other) => {
                    delivery.rejected.push(Rejected::new(&*name, format_args!("is a {other:?}")));
                }
                Content::Other(other) => {
                    delivery.rejected.push(Rejected::new(&*name, format_args!("is a {other:?}")));
                }
                Content::Missing => delivery.rejected.push(Rejected::new(&*name, "has no content")),
            }
        }
        Ok(delivery)
    }

    /// A delivery was applied but for `rejected`: the ACK or NACK to send. `None` when the stream it came on is gone: its
    /// nonce means nothing to the next one.
    pub fn handle_applied(&mut self, delivery: Delivery, mut rejected: Vec<Rejected>) -> Option<DeltaDiscoveryRequest> {
        let state = self.types.iter_mut().find(|state| state.type_url == delivery.type_url)?;
        rejected.splice(0..0, delivery.rejected);
        for (name, version) in delivery.versions {
            state.found(&name);
            state.retained.insert(name, version);
        }
        for alias in &delivery.aliases {
            state.found(alias);
        }
        for name in &delivery.removed {
            state.retained.remove(&**name);
            state.gone(name);
        }
        for Rejected { name, .. } in &rejected {
            state.found(name);
            state.retained.insert(name.as_str().into(), Version::unreadable());
        }
        state.synced = true;
        let answer = DeltaDiscoveryRequest {
            type_url: state.type_url.to_owned(),
            response_nonce: delivery.nonce,
            error_detail: error_detail(&rejected),
            ..Default::default()
        };
        (delivery.connection == self.connection).then_some(answer)
    }

    /// Asks for one more name of an on-demand type. `None` when it is already held or has been asked for, or all are. The
    /// request is to be sent if there is a stream; the next stream's first request repeats it.
    pub fn subscribe(&mut self, type_url: &str, name: &str) -> Option<DeltaDiscoveryRequest> {
        let state = self.types.iter_mut().find(|state| state.type_url == type_url)?;
        let is_known = state.retained.contains_key(name) || state.asked.contains_key(name);
        if state.interest == Interest::All || is_known {
            return None;
        }
        state.asked.insert(name.to_owned(), Word::Pending);
        Some(DeltaDiscoveryRequest {
            type_url: state.type_url.to_owned(),
            resource_names_subscribe: vec![name.to_owned()],
            ..Default::default()
        })
    }

    /// Has the server said what `name` of an on-demand type stands for, be it nothing? From then on it tells of changes.
    pub fn is_answered(&self, type_url: &str, name: &str) -> bool {
        self.types.iter().find(|state| state.type_url == type_url).is_some_and(|state| {
            let answered = state.asked.get(name).is_some_and(|word| *word != Word::Pending);
            state.interest == Interest::All || answered || state.retained.contains_key(name)
        })
    }

    /// Gives up the oldest of the names that stand for nothing when there are too many.
    pub fn forget(&mut self, type_url: &str) -> Option<DeltaDiscoveryRequest> {
        let state = self.types.iter_mut().find(|state| state.type_url == type_url)?;
        let mut names = Vec::new();
        while state.absent.len() > MOST_ABSENT {
            let name = state.absent.pop_front()?;
            // It may have come into being since.
            if state.asked.get(&name) == Some(&Word::Absent) {
                state.asked.remove(&name);
                names.push(name);
            }
        }
        (!names.is_empty()).then(|| DeltaDiscoveryRequest {
            type_url: state.type_url.to_owned(),
            resource_names_unsubscribe: names,
            ..Default::default()
        })
    }

    /// Whether every type has had an answer, be it an empty one.
    pub fn is_synced(&self) -> bool {
        self.types.iter().all(|state| state.synced)
    }
}

impl TypeState {
    fn found(&mut self, name: &str) {
        if let Some(word) = self.asked.get_mut(name) {
            *word = Word::Found;
        }
    }

    fn gone(&mut self, name: &str) {
        if let Some(word) = self.asked.get_mut(name)
            && std::mem::replace(word, Word::Absent) != Word::Absent
        {
            self.absent.push_back(name.to_owned());
        }
    }

    fn first_request(&self, node: &Node) -> DeltaDiscoveryRequest {
        let (subscribe, unsubscribe) = match self.interest {
            // An empty first subscription means everything.
            Interest::All => (vec![], vec![]),
            // Naming and dropping the wildcard is how a client says that it will name what it wants.
            Interest::OnDemand => {
                let retained = self.retained.keys().map(|name| &**name);
                let held: BTreeSet<&str> = retained.chain(self.asked.keys().map(String::as_str)).collect();
                let names = [WILDCARD].into_iter().chain(held);
                (names.map(str::to_owned).collect(), vec![WILDCARD.to_owned()])
            }
        };
        DeltaDiscoveryRequest {
            node: Some(node.clone()),
            type_url: self.type_url.to_owned(),
            resource_names_subscribe: subscribe,
            resource_names_unsubscribe: unsubscribe,
            initial_resource_versions: self
                .retained
                .iter()
                .map(|(name, version)| (name.to_string(), version.to_string()))
                .collect::<BTreeMap<_, _>>(),
            ..Default::default()
        }
    }
}

/// `None` = ACK. The server looks at the presence only; the text is for its log.
fn error_detail(rejected: &[Rejected]) -> Option<Status> {
    if rejected.is_empty() {
        return None;
    }
    let reasons: Vec<_> = rejected.iter().map(|r| format!("{}: {}", r.name, r.reason)).collect();
    Some(Status { code: 0, message: reasons.join("; ") })
}

#[cfg(test)]
mod tests;
