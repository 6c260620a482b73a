//! One client's delta xDS exchange as a state machine: requests and views go in, responses come out. It knows no
//! socket, no task and no clock.
//!
//! ```text
//!             first request                 send                      ACK / NACK
//!  (no such type) ───────► subscribed, due ──────► one outstanding ──────────────► idle
//!                                 ▲                                                  │
//!                                 └── view differs from what was sent, or asked ◄────┘
//! ```
//!
//! Invariants: at most one response per type is unacknowledged, so a slow client is sent the difference to the newest
//! view when it is ready, not every step; and what is sent is filtered by [`Scope`], which no message can widen.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use mesh_proto::ads::DeltaDiscoveryRequest;
use mesh_proto::security::AUTHORIZATION_TYPE;
use mesh_proto::waypoint::HTTP_POLICY_TYPE;
use mesh_proto::workload::{ADDRESS_TYPE, WORKLOAD_TYPE};

use super::answer::Answer;
use super::view::{Changed, Scope, TYPES, View};
use crate::resources::{Resource, Version};

/// Names one stream may ask for or bring along, of all types together, and their bytes; beyond that it is ended, for the memory
/// is ours. As many resources as the largest mesh has, of which a node uses a part.
pub(super) const MAX_NAMES: usize = 200_000;
const MAX_NAME_BYTES: usize = 24 * 1024 * 1024;

/// Types whose refusals go into a status. Of others, of which a response may hold a hundred thousand, names are not kept.
const ANSWERED_BY_NAME: [&str; 2] = [AUTHORIZATION_TYPE, HTTP_POLICY_TYPE];
/// Of a client's reason for a refusal, in bytes.
const LONGEST_REASON: usize = 1024;
/// Of all reasons for what it refuses of one response; beyond that each is cut to [`SHORT_REASON`].
const ALL_REASONS: usize = 256 * 1024;
const SHORT_REASON: usize = 64;

/// What a step of the state machine tells its driver beside responses.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// The client listens to this type from now on.
    Subscribed(&'static str),
    /// The client has all of this type up to this generation.
    Acked(&'static str, u64),
    /// The client rejected part of a response; the text is its, or the beginning of it.
    Nacked(&'static str, String),
    /// Of these resources the client refused some, and why, and took the others. Before the acknowledgement.
    Answered { type_url: &'static str, names: Vec<Arc<str>>, refused: BTreeMap<Arc<str>, String> },
    /// Nobody here serves this type; it was answered with nothing.
    UnknownType(String),
}

/// Why a stream cannot go on.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ProtocolError {
    #[error("more names than one stream may hold: {MAX_NAMES}, of {MAX_NAME_BYTES} bytes in all")]
    TooManyNames,
    #[error("a request without type URL")]
    NoType,
}

/// What one input led to.
#[derive(Debug, Default, PartialEq)]
pub struct Output {
    pub responses: Vec<Answer>,
    pub events: Vec<Event>,
}

/// The state of one stream.
#[derive(Debug)]
pub struct Session {
    scope: Scope,
    /// By position in [`TYPES`], so that iteration is push order.
    types: [Option<Subscription>; TYPES.len()],
    nonce: u64,
}

#[derive(Debug)]
struct Subscription {
    wildcard: bool,
    /// Names the client asked for one by one, as it wrote them.
    requested: BTreeSet<Arc<str>>,
    /// Their bytes.
    requested_bytes: usize,
    /// Requested names that must be answered even if nothing changed.
    unanswered: BTreeSet<Arc<str>>,
    /// On demand: resources that may not be wanted any more, as a name was given up that stood for them.
    suspects: BTreeSet<Arc<str>>,
    /// On demand: the generation in which what is held was what is wanted, apart from `unanswered` and `suspects`.
    settled: Option<u64>,
    known: Known,
    /// A response is owed, be it empty.
    due: bool,
    outstanding: Option<Outstanding>,
    /// The last generation reported as acknowledged.
    acked: u64,
}

#[derive(Debug)]
struct Outstanding {
    nonce: String,
    generation: u64,
    /// What it holds, for the types of [`ANSWERED_BY_NAME`].
    names: Vec<Arc<str>>,
}

/// What the client holds.
#[derive(Debug)]
enum Known {
    /// Exactly these; of those without a version something that we have not sent.
    Listed(BTreeMap<Arc<str>, Option<Version>>),
    /// All that was visible in this view: a wildcard client's state, shared instead of copied per client.
    Everything(Arc<View>),
}

impl Session {
    pub fn new(scope: Scope) -> Self {
        Self { scope, types: [const { None }; TYPES.len()], nonce: 0 }
    }

    pub fn scope(&self) -> &Scope {
        &self.scope
    }

    /// A message from the client.
    ///
    /// # Errors
    /// [`ProtocolError`] ends the stream.
    pub fn handle_request(
        &mut self,
        request: DeltaDiscoveryRequest,
        view: &Arc<View>,
    ) -> Result<Output, ProtocolError> {
        let mut output = Output::default();
        if request.type_url.is_empty() {
            return Err(ProtocolError::NoType);
        }
        let Some(index) = TYPES.iter().position(|type_url| *type_url == request.type_url) else {
            // Clients wait for an answer to each subscription; acknowledging that answer must not earn another.
            if request.response_nonce.is_empty() {
                let nonce = self.next_nonce();
                output.responses.push(Answer {
                    type_url: request.type_url.clone().into(),
                    nonce,
                    generation: view.generation(),
                    updated: Vec::new(),
                    removed: Vec::new(),
                    with_aliases: false,
                });
                output.events.push(Event::UnknownType(request.type_url));
            }
            return Ok(output);
        };
        let type_url = TYPES[index];

        match &mut self.types[index] {
            None => {
                output.events.push(Event::Subscribed(type_url));
                let subscription = Subscription::first(&request);
                if subscription.unknown_beyond(MAX_NAMES, type_url, view, &self.scope) {
                    return Err(ProtocolError::TooManyNames);
                }
                self.types[index] = Some(subscription);
            }
            Some(subscription) => {
                subscription.handle_ack(type_url, &request, &mut output.events);
                subscription.handle_names(type_url, &request, view, &self.scope);
            }
        }
        let (names, bytes) = self.types.iter().flatten().fold((0, 0), |(names, bytes), subscription| {
            (names + subscription.requested.len(), bytes + subscription.requested_bytes)
        });
        if names > MAX_NAMES || bytes > MAX_NAME_BYTES {
            return Err(ProtocolError::TooManyNames);
        }
        self.poll(index, view, &mut output);
        Ok(output)
    }

    /// The newest view. Types whose last response is unacknowledged are looked at when the acknowledgement comes.
    pub fn handle_view(&mut self, view: &Arc<View>) -> Output {
        let mut output = Output::default();
        for index in 0..TYPES.len() {
            self.poll(index, view, &mut output);
        }
        output
    }

    /// Sends what the client lacks of one type, if it is ready for it.
    fn poll(&mut self, index: usize, view: &Arc<View>, output: &mut Output) {
        let Some(subscription) = &mut self.types[index] else { return };
        if subscription.outstanding.is_some() {
            return;
        }
        let type_url = TYPES[index];
        let changes = subscription.take_changes(type_url, view, &self.scope);
        if changes.is_empty() && !subscription.due {
            if subscription.acked < view.generation() {
                subscription.acked = view.generation();
                output.events.push(Event::Acked(type_url, view.generation()));
            }
            return;
        }
        subscription.due = false;
        let with_aliases = !subscription.wildcard;
        self.nonce += 1;
        let nonce = self.nonce.to_string();
        let names = match ANSWERED_BY_NAME.contains(&type_url) {
            true => changes.updated.iter().map(|resource| &resource.name).chain(&changes.removed).cloned().collect(),
            false => Vec::new(),
        };
        subscription.outstanding = Some(Outstanding { nonce: nonce.clone(), generation: view.generation(), names });
        output.responses.push(Answer {
            type_url: type_url.into(),
            nonce,
            generation: view.generation(),
            updated: changes.updated,
            removed: changes.removed.into_iter().collect(),
            with_aliases,
        });
    }

    fn next_nonce(&mut self) -> String {
        self.nonce += 1;
        self.nonce.to_string()
    }
}

/// Which of `names` a client's text speaks of, as `name: reason; name: reason`; a reason may hold anything. The text may be as
/// long as a request and the names as many as policies, so it is read once.
fn refusals(said: &str, names: &[Arc<str>]) -> BTreeMap<Arc<str>, String> {
    let mut named: HashMap<&str, &Arc<str>> = names.iter().map(|name| (&**name, name)).collect();
    let mut starts = Vec::new();
    let mut at = 0;
    for part in said.split("; ") {
        // What is said of it later is part of a reason.
        if let Some(name) = part.split_once(": ").and_then(|(name, _)| named.remove(name)) {
            starts.push((at, at + name.len() + 2, Arc::clone(name)));
        }
        at += part.len() + 2;
    }
    let ends: Vec<usize> = starts.iter().skip(1).map(|(at, ..)| *at).chain([said.len()]).collect();
    let mut left = ALL_REASONS;
    let mut reason = |from: usize, to: usize| {
        let text = said.get(from..to).unwrap_or_default().trim_end_matches("; ");
        let text = cut(text, LONGEST_REASON.min(left).max(SHORT_REASON));
        left = left.saturating_sub(text.len());
        text
    };
    starts.into_iter().zip(ends).map(|((_, from, name), to)| (name, reason(from, to))).collect()
}

fn cut(text: &str, longest: usize) -> String {
    text[..text.floor_char_boundary(longest)].to_owned()
}

#[derive(Debug, Default)]
struct Changes {
    updated: Vec<Arc<Resource>>,
    removed: BTreeSet<Arc<str>>,
}

impl Changes {
    fn is_empty(&self) -> bool {
        self.updated.is_empty() && self.removed.is_empty()
    }

    /// Of what is `wanted`, what is not `held` as it is now; it is from here on.
    fn update(
        &mut self,
        held: &mut BTreeMap<Arc<str>, Option<Version>>,
        wanted: &BTreeSet<Arc<str>>,
        type_url: &str,
        view: &View,
        scope: &Scope,
    ) {
        for resource in wanted.iter().filter_map(|name| view.get(type_url, name, scope)) {
            if held.get(&resource.name) != Some(&Some(resource.version)) {
                held.insert(Arc::clone(&resource.name), Some(resource.version));
                self.updated.push(Arc::clone(resource));
            }
        }
    }
}

impl Subscription {
    fn first(request: &DeltaDiscoveryRequest) -> Self {
        let star = |names: &[String]| names.iter().any(|name| name == "*");
        let subscribe = &request.resource_names_subscribe;
        // `*` in both lists is how an on-demand client says that it wants nothing unasked.
        let wildcard = (subscribe.is_empty() || star(subscribe)) && !star(&request.resource_names_unsubscribe);
        let mut requested: BTreeSet<Arc<str>> =
            subscribe.iter().filter(|name| *name != "*").map(|name| Arc::from(name.as_str())).collect();
        let held: BTreeMap<Arc<str>, Option<Version>> = request
            .initial_resource_versions
            .iter()
            .map(|(name, version)| (Arc::from(name.as_str()), Version::parse(version)))
            .collect();
        let unanswered = requested.iter().filter(|name| !held.contains_key(*name)).cloned().collect();
        if !wildcard {
            // A returning client goes on with all it retained, whether it lists the names again or not.
            requested.extend(held.keys().cloned());
        }
        Self {
            wildcard,
            unanswered,
            requested_bytes: requested.iter().map(|name| name.len()).sum(),
            requested,
            suspects: BTreeSet::new(),
            settled: None,
            known: Known::Listed(held),
            due: true,
            outstanding: None,
            acked: 0,
        }
    }

    /// Whether the client has brought along more than `most` names that stand for nothing: each of them is answered.
    fn unknown_beyond(&self, most: usize, type_url: &str, view: &View, scope: &Scope) -> bool {
        let Known::Listed(held) = &self.known else { return false };
        held.len() > most && held.keys().filter(|name| view.get(type_url, name, scope).is_none()).nth(most).is_some()
    }

    fn handle_ack(&mut self, type_url: &'static str, request: &DeltaDiscoveryRequest, events: &mut Vec<Event>) {
        if request.response_nonce.is_empty() {
            return;
        }
        // A nonce that is not the outstanding one is stale; it acknowledges nothing.
        let Some(outstanding) = self.outstanding.take_if(|sent| sent.nonce == request.response_nonce) else { return };
        if let Some(detail) = &request.error_detail {
            // What was rejected is not sent again until it changes: the same bytes would meet the same fate.
            events.push(Event::Nacked(type_url, cut(&detail.message, LONGEST_REASON)));
        }
        if !outstanding.names.is_empty() {
            let said = request.error_detail.as_ref().map_or("", |detail| &detail.message);
            let refused = refusals(said, &outstanding.names);
            events.push(Event::Answered { type_url, names: outstanding.names, refused });
        }
        self.acked = self.acked.max(outstanding.generation);
        events.push(Event::Acked(type_url, outstanding.generation));
    }

    fn handle_names(&mut self, type_url: &str, request: &DeltaDiscoveryRequest, view: &View, scope: &Scope) {
        for name in &request.resource_names_subscribe {
            if name == "*" {
                self.list_known(type_url, scope);
                self.wildcard = true;
                self.due = true;
            } else {
                let name: Arc<str> = name.as_str().into();
                self.unanswered.insert(Arc::clone(&name));
                self.requested_bytes += name.len();
                if let Some(same) = self.requested.replace(name) {
                    self.requested_bytes -= same.len();
                }
                self.due = true;
            }
        }
        for name in &request.resource_names_unsubscribe {
            if name == "*" {
                self.list_known(type_url, scope);
                self.wildcard = false;
                continue;
            }
            if self.requested.remove(name.as_str()) {
                self.requested_bytes -= name.len();
            }
            self.unanswered.remove(name.as_str());
            if !self.wildcard
                && let Known::Listed(held) = &mut self.known
            {
                // The client has dropped what the name stands for; what came along with it is withdrawn by the next
                // response. A name that something else still brings in will be sent again.
                if let Some((name, _)) = held.remove_entry(name.as_str()) {
                    self.suspects.insert(name);
                }
                for resolved in view.resolve(type_url, name, scope) {
                    self.suspects.insert(Arc::clone(&resolved));
                    if view
                        .get(type_url, &resolved, scope)
                        .is_some_and(|found| found.aliases().any(|alias| alias == name))
                    {
                        held.remove(&resolved);
                    }
                }
            }
        }
    }

    /// Writes out a shared state, before it stops being "everything".
    fn list_known(&mut self, type_url: &str, scope: &Scope) {
        self.settled = None;
        if let Known::Everything(base) = &self.known {
            let held = base
                .visible(type_url, scope)
                .map(|resource| (Arc::clone(&resource.name), Some(resource.version)))
                .collect();
            self.known = Known::Listed(held);
        }
    }

    /// The difference between what the client holds and what it should hold under `view`; it is held from here on.
    fn take_changes(&mut self, type_url: &str, view: &Arc<View>, scope: &Scope) -> Changes {
        let mut changes = match &mut self.known {
            Known::Everything(base) => {
                let changes = difference(type_url, base, view, scope);
                *base = Arc::clone(view);
                changes
            }
            Known::Listed(held) if self.wildcard => {
                let mut changes = Changes::default();
                for resource in view.visible(type_url, scope) {
                    if held.remove(&resource.name) != Some(Some(resource.version)) {
                        changes.updated.push(Arc::clone(resource));
                    }
                }
                changes.removed = std::mem::take(held).into_keys().collect();
                self.known = Known::Everything(Arc::clone(view));
                changes
            }
            Known::Listed(held) => {
                let suspects = std::mem::take(&mut self.suspects);
                let touched = self.settled.and_then(|generation| view.touched_since(generation, type_url));
                self.settled = Some(view.generation());
                match touched {
                    // What one request or change costs does not grow with all that was ever asked for.
                    Some(mut touched) => {
                        touched.extend(suspects);
                        touched.extend(self.unanswered.iter().flat_map(|name| view.resolve(type_url, name, scope)));
                        let wanted = |name: &Arc<str>| view.is_wanted(type_url, name, &self.requested, scope);
                        let (wanted, unwanted): (BTreeSet<_>, BTreeSet<_>) = touched.into_iter().partition(wanted);
                        let mut changes = Changes::default();
                        let gone = unwanted.into_iter().filter(|name| held.remove(name).is_some());
                        changes.removed.extend(gone);
                        changes.update(held, &wanted, type_url, view, scope);
                        changes
                    }
                    None => {
                        let mut wanted: BTreeSet<Arc<str>> = BTreeSet::new();
                        for name in &self.requested {
                            wanted.extend(view.resolve(type_url, name, scope));
                        }
                        if let (ADDRESS_TYPE | WORKLOAD_TYPE, Some(node)) = (type_url, &scope.node) {
                            let visible = |name: &&Arc<str>| view.get(type_url, name, scope).is_some();
                            wanted.extend(view.workloads_on(node).iter().filter(visible).cloned());
                        }
                        let mut changes = Changes::default();
                        held.retain(|name, _| wanted.contains(name) || !changes.removed.insert(Arc::clone(name)));
                        changes.update(held, &wanted, type_url, view, scope);
                        changes
                    }
                }
            }
        };
        // The client blocks on each name it asked for: it gets the resource again, or hears that there is none.
        let mut sent: BTreeSet<Arc<str>> = if self.unanswered.is_empty() {
            BTreeSet::new()
        } else {
            changes.updated.iter().map(|resource| Arc::clone(&resource.name)).collect()
        };
        for name in std::mem::take(&mut self.unanswered) {
            let found = view.resolve(type_url, &name, scope);
            if found.is_empty() {
                changes.removed.insert(name);
                continue;
            }
            for resource in found.iter().filter_map(|name| view.get(type_url, name, scope)) {
                if sent.insert(Arc::clone(&resource.name)) {
                    changes.updated.push(Arc::clone(resource));
                }
            }
        }
        changes
    }
}

/// What a client that holds all it could see in `old` must hear to hold all it can see in `new`.
fn difference(type_url: &str, old: &View, new: &View, scope: &Scope) -> Changes {
    let names = match new.changed_since(old.generation(), type_url) {
        Changed::Names(names) => names,
        Changed::Everything => old
            .visible(type_url, scope)
            .chain(new.visible(type_url, scope))
            .map(|resource| Arc::clone(&resource.name))
            .collect(),
    };
    let mut changes = Changes::default();
    for name in names {
        match (old.get(type_url, &name, scope), new.get(type_url, &name, scope)) {
            (before, Some(after)) => {
                if before.is_none_or(|before| before.version != after.version) {
                    changes.updated.push(Arc::clone(after));
                }
            }
            (Some(_), None) => {
                changes.removed.insert(name);
            }
            (None, None) => {}
        }
    }
    changes
}

#[cfg(test)]
pub(crate) mod fixtures;
#[cfg(test)]
mod tests;
