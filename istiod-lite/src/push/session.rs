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

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mesh_proto::ads::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource as WireResource};
use mesh_proto::security::AUTHORIZATION_TYPE;
use mesh_proto::waypoint::HTTP_POLICY_TYPE;
use mesh_proto::workload::{ADDRESS_TYPE, WORKLOAD_TYPE};

use super::view::{Changed, Scope, TYPES, View, payload};
use crate::resources::Resource;

/// On-demand names one client may hold per type; beyond that the stream is ended, for the memory is ours.
const MAX_NAMES: usize = 200_000;

/// Types whose refusals go into a status. Of others, of which a response may hold a hundred thousand, names are not kept.
const ANSWERED_BY_NAME: [&str; 2] = [AUTHORIZATION_TYPE, HTTP_POLICY_TYPE];
/// Of a client's reason for a refusal, in bytes.
const LONGEST_REASON: usize = 1024;

/// What a step of the state machine tells its driver beside responses.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// The client listens to this type from now on.
    Subscribed(&'static str),
    /// The client has all of this type up to this generation.
    Acked(&'static str, u64),
    /// The client rejected part of a response; the text is its.
    Nacked(&'static str, String),
    /// Of these resources the client refused some, and why, and took the others. Before the acknowledgement.
    Answered { type_url: &'static str, names: Vec<Arc<str>>, refused: BTreeMap<Arc<str>, String> },
    /// Nobody here serves this type; it was answered with nothing.
    UnknownType(String),
}

/// Why a stream cannot go on.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ProtocolError {
    #[error("more than {MAX_NAMES} names subscribed")]
    TooManyNames,
    #[error("a request without type URL")]
    NoType,
}

/// What one input led to.
#[derive(Debug, Default, PartialEq)]
pub struct Output {
    pub responses: Vec<DeltaDiscoveryResponse>,
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
    /// Requested names that must be answered even if nothing changed.
    unanswered: BTreeSet<Arc<str>>,
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
    /// Exactly these, name → version.
    Listed(BTreeMap<Arc<str>, Arc<str>>),
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
                output.responses.push(DeltaDiscoveryResponse {
                    type_url: request.type_url.clone(),
                    nonce,
                    system_version_info: view.generation().to_string(),
                    ..Default::default()
                });
                output.events.push(Event::UnknownType(request.type_url));
            }
            return Ok(output);
        };
        let type_url = TYPES[index];

        match &mut self.types[index] {
            None => {
                output.events.push(Event::Subscribed(type_url));
                self.types[index] = Some(Subscription::first(&request));
            }
            Some(subscription) => {
                subscription.handle_ack(type_url, &request, &mut output.events);
                subscription.handle_names(type_url, &request, view, &self.scope);
            }
        }
        if self.types[index].as_ref().is_some_and(|subscription| subscription.requested.len() > MAX_NAMES) {
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
        output.responses.push(DeltaDiscoveryResponse {
            system_version_info: view.generation().to_string(),
            resources: changes.updated.iter().filter_map(|resource| encode(type_url, resource, with_aliases)).collect(),
            type_url: type_url.to_owned(),
            nonce,
            removed_resources: changes.removed.iter().map(|name| name.to_string()).collect(),
        });
    }

    fn next_nonce(&mut self) -> String {
        self.nonce += 1;
        self.nonce.to_string()
    }
}

/// Which of `names` a client's text speaks of, as `name: reason; name: reason`; a reason may hold anything.
fn refusals(said: &str, names: &[Arc<str>]) -> BTreeMap<Arc<str>, String> {
    let starts_at = |name: &Arc<str>| {
        let prefix = format!("{name}: ");
        let mut found = said.match_indices(&*prefix).map(|(at, _)| at);
        let at = found.find(|at| *at == 0 || said[..*at].ends_with("; "))?;
        Some((at, at + prefix.len(), Arc::clone(name)))
    };
    let mut starts: Vec<_> = names.iter().filter_map(starts_at).collect();
    starts.sort_unstable();
    let ends: Vec<usize> = starts.iter().skip(1).map(|(at, ..)| *at).chain([said.len()]).collect();
    let reason = |from: usize, to: usize| {
        let text = said.get(from..to).unwrap_or_default().trim_end_matches("; ");
        text[..text.floor_char_boundary(LONGEST_REASON)].to_owned()
    };
    starts.into_iter().zip(ends).map(|((_, from, name), to)| (name, reason(from, to))).collect()
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
}

impl Subscription {
    fn first(request: &DeltaDiscoveryRequest) -> Self {
        let star = |names: &[String]| names.iter().any(|name| name == "*");
        let subscribe = &request.resource_names_subscribe;
        // `*` in both lists is how an on-demand client says that it wants nothing unasked.
        let wildcard = (subscribe.is_empty() || star(subscribe)) && !star(&request.resource_names_unsubscribe);
        let mut requested: BTreeSet<Arc<str>> =
            subscribe.iter().filter(|name| *name != "*").map(|name| Arc::from(name.as_str())).collect();
        let held: BTreeMap<Arc<str>, Arc<str>> = request
            .initial_resource_versions
            .iter()
            .map(|(name, version)| (Arc::from(name.as_str()), Arc::from(version.as_str())))
            .collect();
        let unanswered = requested.iter().filter(|name| !held.contains_key(*name)).cloned().collect();
        if !wildcard {
            // A returning client goes on with all it retained, whether it lists the names again or not.
            requested.extend(held.keys().cloned());
        }
        Self { wildcard, unanswered, requested, known: Known::Listed(held), due: true, outstanding: None, acked: 0 }
    }

    fn handle_ack(&mut self, type_url: &'static str, request: &DeltaDiscoveryRequest, events: &mut Vec<Event>) {
        if request.response_nonce.is_empty() {
            return;
        }
        // A nonce that is not the outstanding one is stale; it acknowledges nothing.
        let Some(outstanding) = self.outstanding.take_if(|sent| sent.nonce == request.response_nonce) else { return };
        if let Some(detail) = &request.error_detail {
            // What was rejected is not sent again until it changes: the same bytes would meet the same fate.
            events.push(Event::Nacked(type_url, detail.message.clone()));
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
                self.requested.insert(name);
                self.due = true;
            }
        }
        for name in &request.resource_names_unsubscribe {
            if name == "*" {
                self.list_known(type_url, scope);
                self.wildcard = false;
                continue;
            }
            self.requested.remove(name.as_str());
            self.unanswered.remove(name.as_str());
            if !self.wildcard
                && let Known::Listed(held) = &mut self.known
            {
                // The client has dropped what the name stands for; what came along with it is withdrawn by the next
                // response. A name that something else still brings in will be sent again.
                held.remove(name.as_str());
                for resolved in view.resolve(type_url, name, scope) {
                    if view
                        .get(type_url, &resolved, scope)
                        .is_some_and(|found| found.aliases.iter().any(|a| **a == **name))
                    {
                        held.remove(&resolved);
                    }
                }
            }
        }
    }

    /// Writes out a shared state, before it stops being "everything".
    fn list_known(&mut self, type_url: &str, scope: &Scope) {
        if let Known::Everything(base) = &self.known {
            let held = base
                .visible(type_url, scope)
                .map(|resource| (Arc::clone(&resource.name), Arc::clone(&resource.version)))
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
                    if held.remove(&resource.name).is_none_or(|version| version != resource.version) {
                        changes.updated.push(Arc::clone(resource));
                    }
                }
                changes.removed = std::mem::take(held).into_keys().collect();
                self.known = Known::Everything(Arc::clone(view));
                changes
            }
            Known::Listed(held) => {
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
                for resource in wanted.iter().filter_map(|name| view.get(type_url, name, scope)) {
                    if held.get(&resource.name) != Some(&resource.version) {
                        held.insert(Arc::clone(&resource.name), Arc::clone(&resource.version));
                        changes.updated.push(Arc::clone(resource));
                    }
                }
                changes
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

fn encode(type_url: &str, resource: &Resource, with_aliases: bool) -> Option<WireResource> {
    Some(WireResource {
        version: resource.version.to_string(),
        resource: Some(prost_types::Any {
            type_url: type_url.to_owned(),
            value: payload(type_url, resource)?.to_vec(),
        }),
        name: resource.name.to_string(),
        aliases: if with_aliases {
            resource.aliases.iter().map(|alias| alias.to_string()).collect()
        } else {
            Vec::new()
        },
    })
}

#[cfg(test)]
pub(crate) mod fixtures;
#[cfg(test)]
mod tests;
