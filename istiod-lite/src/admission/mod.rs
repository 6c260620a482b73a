//! Admission: what the API server asks before it stores an object of a kind that we serve. Refused is what can never work,
//! whatever else there is in the cluster and whatever a later version can do; what waits for another object, or is not
//! done yet, is admitted with a warning. The judgement is the translation's own ([`judge`]), so a refusal and a status never
//! disagree; one kind is judged that nothing carries out yet ([`request_authentication`]). Whoever runs without us loses nothing but early news: `failurePolicy: Ignore`.

mod judge;
mod request_authentication;
mod review;
mod route;
mod server;
mod trust;

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::Value;

use crate::translate::verdict::Fault;
use crate::translate::world::World;
use crate::watch::Watch;

pub use judge::{Judgement, judge};
pub use review::{Answer, Request, Review};
pub use server::serve;
pub use trust::keep_trusted;

/// The object by which the API server knows us, but for the revision, and the name of our webhook in it
/// (`manifests/install.yaml`, `manifests/revision.yaml`).
pub const CONFIGURATION: &str = "istiod-validator";
pub const WEBHOOK: &str = "validation.istio.io";

/// Faults that one refusal tells of.
const TOLD: usize = 16;
/// Warnings of one answer. The API server cuts them at 4 KiB in all.
const WARNINGS: usize = 12;
/// Characters of one warning, as the API has it.
const LONGEST_WARNING: usize = 256;
/// Bytes of what one refusal says. A value may be as long as an object.
const LONGEST_REFUSAL: usize = 8 * 1024;

/// What is known of the cluster when an object is judged.
#[derive(Debug, Clone, Default)]
pub struct Known {
    pub world: World,
    /// Everything was listed: what is missing in the world is missing in the cluster.
    pub is_complete: bool,
}

/// Gives what is known now. Cheap.
pub type Knowledge = Arc<dyn Fn() -> Known + Send + Sync>;

/// What the watch has.
pub fn knowledge(watch: &Arc<Watch>) -> Knowledge {
    let watch = Arc::clone(watch);
    Arc::new(move || Known { is_complete: watch.missing().is_empty(), world: watch.snapshot() })
}

/// Whether an object may be stored, and what is to be said of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Admitted { warnings: Vec<String> },
    Refused { message: String },
}

impl Outcome {
    const SILENT: Self = Self::Admitted { warnings: Vec::new() };
}

/// Decides on one request.
pub fn decide(known: &Known, request: &mut Request) -> Outcome {
    let writes = matches!(request.operation.as_str(), "CREATE" | "UPDATE");
    if !writes || request.sub_resource.as_deref().is_some_and(|sub| !sub.is_empty()) {
        return Outcome::SILENT;
    }
    // One on its way out is only to lose its finalizers.
    let Some(object) = request.object.take().filter(|object| object["metadata"]["deletionTimestamp"].is_null()) else {
        return Outcome::SILENT;
    };
    let name = described(&object, request);
    let Judgement { faults, notes } = judge(&known.world, place(object, request));
    // Before everything is listed nobody knows what is missing.
    let notes = if known.is_complete { notes } else { Vec::new() };
    let before = match request.old_object.take() {
        Some(old) if !faults.is_empty() => judge(&known.world, place(old, request)).faults,
        _ => Vec::new(),
    };
    let new = fresh(&faults, &before);
    if !new.is_empty() {
        return Outcome::Refused { message: refusal(&new) };
    }
    let all = faults.iter().map(ToString::to_string).chain(notes);
    Outcome::Admitted { warnings: warnings(&name, all.collect()) }
}

/// Kind and name, for people.
fn described(object: &Value, request: &Request) -> String {
    let name = object["metadata"]["name"].as_str().or(object["metadata"]["generateName"].as_str()).unwrap_or_default();
    match request.namespace.as_deref().filter(|namespace| !namespace.is_empty()) {
        Some(namespace) => format!("{} {namespace}/{name}", request.kind.kind),
        None => format!("{} {name}", request.kind.kind),
    }
}

/// An object as it will be stored: in its namespace, and under a name even if the API server is yet to make it.
fn place(mut object: Value, request: &Request) -> Value {
    let Some(meta) = object.get_mut("metadata").and_then(Value::as_object_mut) else { return object };
    if let Some(namespace) = request.namespace.as_deref().filter(|namespace| !namespace.is_empty()) {
        meta.insert("namespace".into(), namespace.into());
    }
    if meta.get("name").and_then(Value::as_str).is_none_or(str::is_empty) {
        let prefix = meta.get("generateName").and_then(Value::as_str).unwrap_or_default();
        meta.insert("name".into(), format!("{prefix}xxxxx").into());
    }
    object
}

/// Those that the object did not have before, wherever in their lists: what was as bad may stay, so that labels can be
/// changed and finalizers be taken off.
fn fresh<'a>(now: &'a [Fault], before: &[Fault]) -> Vec<&'a Fault> {
    let told = |fault: &Fault| (without_indexes(&fault.field), fault.text.clone());
    let mut known: HashMap<(String, String), usize> = HashMap::new();
    for fault in before {
        *known.entry(told(fault)).or_default() += 1;
    }
    let is_new = |fault: &&Fault| match known.get_mut(&told(fault)) {
        Some(left) if *left > 0 => {
            *left -= 1;
            false
        }
        _ => true,
    };
    now.iter().filter(is_new).collect()
}

/// `rules[3].from[0]` as `rules[].from[]`.
fn without_indexes(path: &str) -> String {
    let mut inside = false;
    let mut outside = |letter: &char| {
        let keep = !inside || *letter == ']';
        inside = *letter == '[' || (inside && *letter != ']');
        keep
    };
    path.chars().filter(|letter| outside(letter)).collect()
}

fn refusal(faults: &[&Fault]) -> String {
    let mut message = String::new();
    for (told, fault) in faults.iter().enumerate() {
        let sentence = format!("{fault}. ");
        // The first is told whatever its length; it is cut below.
        if told == TOLD || (told > 0 && message.len() + sentence.len() > LONGEST_REFUSAL) {
            message.push_str("And others.");
            break;
        }
        message.push_str(&sentence);
    }
    cut(message.trim_end(), LONGEST_REFUSAL)
}

fn warnings(name: &str, said: Vec<String>) -> Vec<String> {
    let more = (said.len() > WARNINGS).then(|| format!("{name}: and others; see its status"));
    let told = said.into_iter().take(WARNINGS).map(|text| cut(&format!("{name}: {text}"), LONGEST_WARNING));
    told.chain(more).collect()
}

/// At most so many characters, none of which breaks a line or a header.
fn cut(text: &str, longest: usize) -> String {
    let plain = |letter: char| if letter.is_control() { ' ' } else { letter };
    match text.char_indices().nth(longest) {
        None => text.chars().map(plain).collect(),
        Some(_) => text.chars().take(longest - 1).map(plain).chain(['…']).collect(),
    }
}

#[cfg(test)]
mod tests;
