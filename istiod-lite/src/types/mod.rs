//! Our own types for the custom resources we read: Gateway API and Istio. Enumerations are strings and lists of rules
//! are decoded one by one, so that an object written for a newer version, or a malformed one, costs that object (or that
//! rule) and not the whole list. What a value means is decided in `translate`, which also reports what it did not like.

pub mod gateway;
mod labels;
pub mod networking;
mod node;
mod pod;
pub mod security;
mod service;
mod slice;

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, LazyLock, Mutex};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use mesh::text::Texts;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::resources::lock;

pub use labels::Labels;
pub use node::{Locality, Node};
pub use pod::{Phase, Pod, STATIC_POD_UID};
pub use service::{Service, ServicePort, TargetPort};
pub use slice::{AddressType, SERVICE_NAME, Slice};

/// Namespace (empty for cluster-scoped objects) and name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl Key {
    pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }

    /// That of an object; those of one namespace share its name.
    pub fn of(meta: &ObjectMeta) -> Self {
        let namespace = shared_namespace(meta.namespace.as_deref().unwrap_or_default());
        Self::new(namespace, meta.name.as_deref().unwrap_or_default())
    }

    /// What stands before every object of a namespace in a map.
    pub fn first_of(namespace: &str) -> Self {
        Self::new(namespace, "")
    }
}

/// Names of namespaces that keys of objects share.
#[derive(Default)]
struct Namespaces {
    names: Texts,
    /// How many were left by the last sweep.
    left: usize,
}

static NAMESPACES: LazyLock<Mutex<Namespaces>> = LazyLock::new(Mutex::default);

fn shared_namespace(name: &str) -> Arc<str> {
    let mut known = lock(&NAMESPACES);
    let name = known.names.get(name);
    if known.names.len() > 2 * known.left {
        known.names.sweep();
        known.left = known.names.len();
    }
    name
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() { f.write_str(&self.name) } else { write!(f, "{}/{}", self.namespace, self.name) }
    }
}

/// An object as it was read; shared, and equal to nothing but itself, so that tables are compared at the cost of what
/// differs.
#[derive(Debug)]
pub struct Held<T>(Arc<T>);

impl<T> Held<T> {
    pub fn new(object: T) -> Self {
        Self(Arc::new(object))
    }
}

impl<T> Clone for Held<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> PartialEq for Held<T> {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl<T> Deref for Held<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

/// What labels and annotations are read from.
pub trait Meta {
    fn namespace_name(&self) -> &str;
    fn label(&self, name: &str) -> Option<&str>;
    fn annotation(&self, name: &str) -> Option<&str>;
}

impl Meta for ObjectMeta {
    fn namespace_name(&self) -> &str {
        self.namespace.as_deref().unwrap_or_default()
    }

    fn label(&self, name: &str) -> Option<&str> {
        self.labels.as_ref()?.get(name).map(String::as_str)
    }

    fn annotation(&self, name: &str) -> Option<&str> {
        self.annotations.as_ref()?.get(name).map(String::as_str)
    }
}

/// A custom kind, named by the type of its `spec`.
pub trait CustomKind: DeserializeOwned + Default + fmt::Debug + Send + Sync + 'static {
    const GROUP: &'static str;
    const VERSION: &'static str;
    const KIND: &'static str;
    const PLURAL: &'static str;

    fn api_resource() -> ApiResource {
        ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(Self::GROUP, Self::VERSION, Self::KIND), Self::PLURAL)
    }
}

/// A custom object: metadata always, the spec if it could be read.
#[derive(Debug, Clone)]
pub struct Object<S> {
    pub meta: ObjectMeta,
    /// Why it could not be read, with the path of the field.
    pub spec: Result<S, String>,
    /// As found; other controllers write here too.
    pub status: Value,
}

impl<S: CustomKind> Object<S> {
    pub fn from_dynamic(object: DynamicObject) -> Self {
        let mut data = object.data;
        let spec = match data.get_mut("spec").map(Value::take) {
            None | Some(Value::Null) => Ok(S::default()),
            Some(spec) => S::deserialize(spec).map_err(|error| format!("spec: {error}")),
        };
        let status = data.get_mut("status").map(Value::take).unwrap_or_default();
        let mut meta = object.metadata;
        meta.managed_fields = None;
        Self { meta, spec, status }
    }
}

impl<S> Object<S> {
    pub fn key(&self) -> Key {
        Key::of(&self.meta)
    }

    pub fn name(&self) -> &str {
        self.meta.name.as_deref().unwrap_or_default()
    }

    pub fn namespace(&self) -> &str {
        self.meta.namespace.as_deref().unwrap_or_default()
    }

    pub fn generation(&self) -> i64 {
        self.meta.generation.unwrap_or_default()
    }

    /// Sorts the oldest first, ties by name.
    pub fn age(&self) -> (i64, Key) {
        (created(&self.meta), self.key())
    }
}

/// `metadata.creationTimestamp` in nanoseconds since the epoch; 0 if unset.
pub fn created(meta: &ObjectMeta) -> i64 {
    meta.creation_timestamp.as_ref().map_or(0, |time| i64::try_from(time.0.as_nanosecond()).unwrap_or(i64::MAX))
}

pub fn label<'a>(meta: &'a (impl Meta + ?Sized), key: &str) -> Option<&'a str> {
    meta.label(key)
}

pub fn annotation<'a>(meta: &'a (impl Meta + ?Sized), key: &str) -> Option<&'a str> {
    meta.annotation(key)
}

/// A yes or no among the annotations, as Go's `strconv.ParseBool` reads it; `None` where there is none.
///
/// # Errors
/// The value, where it is neither.
pub fn flag<'a>(meta: &'a (impl Meta + ?Sized), key: &str) -> Result<Option<bool>, &'a str> {
    match annotation(meta, key) {
        None => Ok(None),
        Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(Some(true)),
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(Some(false)),
        Some(other) => Err(other),
    }
}

/// An element of a list that was or was not readable; the others don't suffer.
#[derive(Debug, Clone, PartialEq)]
pub enum Lenient<T> {
    Good(T),
    Bad(String),
}

impl<'de, T: DeserializeOwned> Deserialize<'de> for Lenient<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        Ok(T::deserialize(value).map_or_else(|error| Self::Bad(error.to_string()), Self::Good))
    }
}

/// A status condition as written and read on every kind we report on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    pub r#type: String,
    pub status: String,
    #[serde(default)]
    pub reason: String,
    #[serde(default)]
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    #[serde(default)]
    pub last_transition_time: String,
}

/// Whether a Kubernetes label selector admits these labels; an operator we don't know admits nothing.
pub fn selects(selector: &LabelSelector, labels: Option<&BTreeMap<String, String>>) -> bool {
    let get = |key: &str| labels.and_then(|labels| labels.get(key));
    let exact = selector.match_labels.iter().flatten().all(|(key, value)| get(key) == Some(value));
    exact
        && selector.match_expressions.iter().flatten().all(|rule| {
            let values = rule.values.as_deref().unwrap_or_default();
            match rule.operator.as_str() {
                "In" => get(&rule.key).is_some_and(|value| values.contains(value)),
                "NotIn" => get(&rule.key).is_none_or(|value| !values.contains(value)),
                "Exists" => get(&rule.key).is_some(),
                "DoesNotExist" => get(&rule.key).is_none(),
                _ => false,
            }
        })
}
