//! A watch: events of one resource as a stream of JSON lines, filtered by namespace and selector.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use http_body::Frame;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::error::ApiError;
use super::registry::Kind;
use super::request::Form;
use super::selector::Selector;
use super::store::{Event, EventKind, Object, Store};
use super::table::{self, Include};

/// How often a client that asked for bookmarks hears how far the store is.
const BOOKMARKS: Duration = Duration::from_secs(30);

/// What is watched, and how its events are written.
pub struct Watch {
    pub store: Arc<Store>,
    pub kind: Arc<Kind>,
    pub namespace: String,
    pub selector: Selector,
    pub form: Form,
    pub include: Include,
    pub bookmarks: bool,
    pub timeout: Duration,
}

/// Where a watch begins.
pub enum Start {
    /// After this version.
    At(u64),
    /// With an event for everything there is, read at this version; `marked`: and a bookmark that says it was all.
    With { objects: Vec<Arc<Object>>, version: u64, marked: bool },
}

struct Running {
    watch: Watch,
    changed: tokio::sync::watch::Receiver<u64>,
    seen: u64,
    pending: VecDeque<Value>,
    deadline: Instant,
    bookmark_due: Instant,
    ended: bool,
}

impl Watch {
    /// The events as body frames; ends at the timeout, or with an ERROR event when the watcher fell too far behind.
    pub fn run(self, start: Start) -> impl Stream<Item = Result<Frame<Bytes>, Infallible>> + Send {
        let now = Instant::now();
        let mut running = Running {
            changed: self.store.subscribe(&self.kind.storage),
            seen: 0,
            pending: VecDeque::new(),
            deadline: now + self.timeout,
            bookmark_due: now + BOOKMARKS,
            ended: false,
            watch: self,
        };
        match start {
            Start::At(version) => running.seen = version,
            Start::With { objects, version, marked } => {
                running.seen = version;
                for object in objects.iter().filter(|o| running.watch.selects(&o.value)) {
                    running.pending.push_back(running.watch.event("ADDED", &object.value));
                }
                if marked {
                    running.pending.push_back(running.watch.bookmark(version, true));
                }
            }
        }
        futures_util::stream::unfold(running, |mut running| async move {
            let line = running.next().await?;
            let mut text = line.to_string();
            text.push('\n');
            Some((Ok(Frame::data(Bytes::from(text))), running))
        })
    }

    fn selects(&self, object: &Value) -> bool {
        (self.namespace.is_empty() || object["metadata"]["namespace"] == self.namespace.as_str())
            && self.selector.matches(object)
    }

    fn event(&self, kind: &str, object: &Value) -> Value {
        let mut object = object.clone();
        object["apiVersion"] = self.kind.api_version().into();
        let object = match self.form {
            Form::Object => object,
            Form::Partial => table::partial(&object),
            Form::Table => {
                let metadata = json!({"resourceVersion": object["metadata"]["resourceVersion"]});
                table::table(&self.kind, std::slice::from_ref(&object), metadata, self.include)
            }
        };
        json!({"type": kind, "object": object})
    }

    fn bookmark(&self, version: u64, initial_end: bool) -> Value {
        let mut metadata = json!({"resourceVersion": version.to_string(), "creationTimestamp": null});
        if initial_end {
            metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        let object = match self.form {
            Form::Table => json!({
                "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": metadata, "columnDefinitions": [], "rows": [],
            }),
            Form::Partial => {
                json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata})
            }
            Form::Object => {
                json!({"kind": self.kind.kind, "apiVersion": self.kind.api_version(), "metadata": metadata})
            }
        };
        json!({"type": "BOOKMARK", "object": object})
    }

    /// What a change means to this watcher, who sees objects come and go with its selector.
    fn translate(&self, event: &Event) -> Option<Value> {
        let before = event.previous.as_ref().is_some_and(|o| self.selects(&o.value));
        let after = event.kind != EventKind::Deleted && self.selects(&event.object.value);
        match (before, after) {
            (false, false) => None,
            (false, true) => Some(self.event("ADDED", &event.object.value)),
            (true, true) => Some(self.event("MODIFIED", &event.object.value)),
            (true, false) => {
                // The last state this watcher knew, under the version of the change.
                let mut last = event.previous.as_ref().map_or_else(Value::default, |o| o.value.clone());
                last["metadata"]["resourceVersion"] = event.version.to_string().into();
                Some(self.event("DELETED", &last))
            }
        }
    }
}

impl Running {
    async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(event) = self.pending.pop_front() {
                return Some(event);
            }
            if self.ended {
                return None;
            }
            let known = *self.changed.borrow_and_update();
            match self.watch.store.events_since(&self.watch.kind.storage, self.seen) {
                None => {
                    self.ended = true;
                    let status = ApiError::expired(format!("too old resource version: {}", self.seen)).status();
                    return Some(json!({"type": "ERROR", "object": status}));
                }
                Some(events) => {
                    self.seen = events.last().map_or(self.seen.max(known), |e| e.version);
                    self.pending.extend(events.iter().filter_map(|e| self.watch.translate(e)));
                    if !self.pending.is_empty() {
                        continue;
                    }
                }
            }
            // Nothing is lost when a branch is cancelled: the state is read again at the top.
            tokio::select! {
                changed = self.changed.changed() => {
                    if changed.is_err() {
                        return None;
                    }
                }
                () = tokio::time::sleep_until(self.bookmark_due), if self.watch.bookmarks => {
                    self.bookmark_due = Instant::now() + BOOKMARKS;
                    self.pending.push_back(self.watch.bookmark(self.seen, false));
                }
                () = tokio::time::sleep_until(self.deadline) => {
                    self.ended = true;
                    if self.watch.bookmarks {
                        self.pending.push_back(self.watch.bookmark(self.seen, false));
                    }
                }
            }
        }
    }
}
