//! What the fuzz targets (`tests/fuzz`) reach and nobody else may. It exists in their builds only.

use serde_json::Value;

use super::apply::Manager;
use super::registry::{CRDS, built_in_registry};
use super::request::{Form, Query, Target};
use super::selector::Selector;
use super::table::Include;
use super::verbs::{Settings, Write};
use super::{api, apply, builtin, crd, default_service_cidrs, patch, schema, table};

pub use super::registry::Kind;

/// A request's body as JSON.
pub fn body(bytes: &[u8], content_type: &str) -> Option<Value> {
    api::parse_body(bytes, content_type).ok()
}

/// Whether the selectors take a pod; `None` where they are none.
pub fn selects(labels: &str, fields: &str, pod: &Value) -> Option<bool> {
    Some(Selector::parse("/pods", Some(labels), Some(fields)).ok()?.matches(pod))
}

/// What a request is for, and in which form its answer is wanted.
pub fn request(path: &str, query: &str, accept: &str) {
    let (target, query) = (Target::parse(path), Query::parse(query));
    let _ = (query.number("limit"), query.is_true("watch"), Form::negotiate(accept));
    if let Some(target) = target {
        target.attributes(&http::Method::GET, &query, None);
    }
}

/// A pod after a patch of this kind; `None` where it is refused.
pub fn patched(media: &str, pod: &Value, change: Value) -> Option<Value> {
    let mut pod = pod.clone();
    match media {
        "json-patch" => patch::json_patch(&mut pod, change).ok()?,
        "merge-patch" => patch::merge(&mut pod, &change),
        _ => patch::strategic(&mut pod, &change, &schema::reference("io.k8s.api.core.v1.Pod")).ok()?,
    }
    Some(pod)
}

/// A built-in kind, by any number.
pub fn kind(number: u8) -> &'static Kind {
    let all = built_in_registry().all();
    let kinds: Vec<_> = all.filter(|kind| !kind.create_only).collect();
    kinds[usize::from(number) % kinds.len()]
}

/// What becomes of an object of a kind: what is not known is gone, what is missing filled in, its fields have an owner,
/// and it is shown. `None` where it is refused.
pub fn stored(kind: &Kind, mut object: Value) -> Option<Value> {
    let settings = Settings { service_cidrs: default_service_cidrs(), ca_certificate: String::new() };
    Write::internal(kind, &settings, if kind.namespaced { "n" } else { "" }).decode(&mut object).ok()?;
    builtin::apply_defaults(kind, &mut object);
    if let Some(fields) = object.as_object_mut() {
        fields.retain(|_, value| !value.is_null());
    }
    if &*kind.storage == CRDS {
        crd::set_status(&mut object, "");
    }
    let mut causes = builtin::validate_metadata(kind, &object);
    causes.extend(builtin::validate(kind, &object, None));
    let manager = Manager { name: "m", api_version: &kind.api_version(), subresource: "", now: "" };
    apply::track_update(None, &mut object, &kind.schema, &manager);
    table::table(kind, std::slice::from_ref(&object), Value::Null, Include::Object);
    causes.is_empty().then_some(object)
}

/// An object after another was applied to it.
pub fn applied(kind: &Kind, live: &Value, config: &Value) -> Option<Value> {
    let manager = Manager { name: "other", api_version: &kind.api_version(), subresource: "", now: "" };
    apply::apply(Some(live), config, &kind.schema, &manager, true).ok()
}
