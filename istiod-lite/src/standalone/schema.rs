//! Schemas of objects and what they are used for: dropping and naming unknown fields, type checks, defaults, validation
//! of custom resources, and the merge behaviour of lists.
//!
//! Built-in definitions come from the generated Kubernetes types; the merge keys, which those do not carry, from
//! [`LISTS`]. Custom resources bring theirs. A node is plain OpenAPI JSON; `$ref` always means a built-in definition.
//! CEL rules (`x-kubernetes-validations`) are not evaluated; the CRD's condition says so.

use std::collections::HashSet;
use std::sync::LazyLock;

use k8s_openapi::api as v;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1 as apiextensions;
use k8s_openapi::apimachinery::pkg::apis::meta::v1 as meta;
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use super::error::Cause;

pub const OBJECT_META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta";
const ANY_JSON: &str = "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSON";
const REF_PREFIX: &str = "#/definitions/";

/// How a list in a built-in type merges: definition, field, patch merge key, patch strategy, list type, map keys.
type ListRule = (&'static str, &'static str, &'static str, &'static str, &'static str, &'static [&'static str]);

/// The lists of built-in types that are not replaced as a whole.
const LISTS: &[ListRule] = &[
    ("core.v1.PodSpec", "volumes", "name", "merge,retainKeys", "map", &["name"]),
    ("core.v1.PodSpec", "containers", "name", "merge", "map", &["name"]),
    ("core.v1.PodSpec", "initContainers", "name", "merge", "map", &["name"]),
    ("core.v1.PodSpec", "ephemeralContainers", "name", "merge", "map", &["name"]),
    ("core.v1.PodSpec", "imagePullSecrets", "name", "merge", "map", &["name"]),
    ("core.v1.PodSpec", "hostAliases", "ip", "merge", "map", &["ip"]),
    (
        "core.v1.PodSpec",
        "topologySpreadConstraints",
        "topologyKey",
        "merge",
        "map",
        &["topologyKey", "whenUnsatisfiable"],
    ),
    ("core.v1.PodSpec", "resourceClaims", "name", "merge,retainKeys", "map", &["name"]),
    ("core.v1.PodSpec", "schedulingGates", "name", "merge", "map", &["name"]),
    ("core.v1.PodStatus", "conditions", "type", "merge", "map", &["type"]),
    ("core.v1.PodStatus", "podIPs", "ip", "merge", "map", &["ip"]),
    ("core.v1.PodStatus", "hostIPs", "ip", "merge", "atomic", &[]),
    ("core.v1.Container", "ports", "containerPort", "merge", "map", &["containerPort", "protocol"]),
    ("core.v1.Container", "env", "name", "merge", "map", &["name"]),
    ("core.v1.Container", "volumeMounts", "mountPath", "merge", "map", &["mountPath"]),
    ("core.v1.Container", "volumeDevices", "devicePath", "merge", "map", &["devicePath"]),
    ("core.v1.EphemeralContainer", "ports", "containerPort", "merge", "map", &["containerPort", "protocol"]),
    ("core.v1.EphemeralContainer", "env", "name", "merge", "map", &["name"]),
    ("core.v1.EphemeralContainer", "volumeMounts", "mountPath", "merge", "map", &["mountPath"]),
    ("core.v1.ResourceRequirements", "claims", "", "", "map", &["name"]),
    ("core.v1.ServiceSpec", "ports", "port", "merge", "map", &["port", "protocol"]),
    ("core.v1.ServiceStatus", "conditions", "type", "merge", "map", &["type"]),
    ("core.v1.ServiceAccount", "secrets", "name", "merge", "map", &["name"]),
    ("core.v1.NodeSpec", "podCIDRs", "", "merge", "set", &[]),
    ("core.v1.NodeStatus", "conditions", "type", "merge", "map", &["type"]),
    ("core.v1.NodeStatus", "addresses", "type", "merge", "map", &["type"]),
    ("core.v1.NamespaceStatus", "conditions", "type", "merge", "map", &["type"]),
    ("apps.v1.DeploymentStatus", "conditions", "type", "merge", "map", &["type"]),
    ("apps.v1.DaemonSetStatus", "conditions", "type", "merge", "map", &["type"]),
    ("apps.v1.ReplicaSetStatus", "conditions", "type", "merge", "map", &["type"]),
    ("apps.v1.StatefulSetStatus", "conditions", "type", "merge", "map", &["type"]),
    ("batch.v1.JobStatus", "conditions", "type", "merge", "atomic", &[]),
    ("autoscaling.v2.HorizontalPodAutoscalerStatus", "conditions", "type", "merge", "map", &["type"]),
    ("policy.v1.PodDisruptionBudgetStatus", "conditions", "type", "merge", "map", &["type"]),
    ("admissionregistration.v1.MutatingWebhookConfiguration", "webhooks", "name", "merge", "map", &["name"]),
    ("admissionregistration.v1.ValidatingWebhookConfiguration", "webhooks", "name", "merge", "map", &["name"]),
    ("admissionregistration.v1.MutatingWebhook", "matchConditions", "name", "merge", "map", &["name"]),
    ("admissionregistration.v1.ValidatingWebhook", "matchConditions", "name", "merge", "map", &["name"]),
    ("discovery.v1.EndpointSlice", "endpoints", "", "", "atomic", &[]),
    ("meta.v1.ObjectMeta", "ownerReferences", "uid", "merge", "map", &["uid"]),
    ("meta.v1.ObjectMeta", "finalizers", "", "merge", "set", &[]),
    ("apiextensions.v1.CustomResourceDefinitionStatus", "conditions", "", "", "map", &["type"]),
];

/// Structs that change as a whole or drop what a patch does not name: definition, field, extension, value.
const STRUCTS: &[(&str, &str, &str, &str)] = &[
    ("apps.v1.DeploymentSpec", "strategy", "x-kubernetes-patch-strategy", "retainKeys"),
    ("meta.v1.ObjectMeta", "managedFields", "x-kubernetes-list-type", "atomic"),
];

/// Definitions whose value is one unit to server-side apply.
const ATOMIC_MAPS: &[&str] = &[
    "io.k8s.apimachinery.pkg.apis.meta.v1.LabelSelector",
    "io.k8s.api.core.v1.ObjectReference",
    "io.k8s.api.core.v1.LocalObjectReference",
    "io.k8s.api.core.v1.SecretKeySelector",
    "io.k8s.api.core.v1.ConfigMapKeySelector",
    "io.k8s.api.core.v1.ObjectFieldSelector",
    "io.k8s.api.core.v1.NodeSelector",
    "io.k8s.api.rbac.v1.RoleRef",
    "io.k8s.api.rbac.v1.Subject",
];

static DEFINITIONS: LazyLock<Map<String, Value>> = LazyLock::new(build_definitions);

/// All built-in definitions by full name.
pub fn definitions() -> &'static Map<String, Value> {
    &DEFINITIONS
}

fn build_definitions() -> Map<String, Value> {
    let mut generator =
        SchemaSettings::draft2020_12().with(|s| s.definitions_path = "/definitions".into()).into_generator();
    macro_rules! add { ($($t:ty),* $(,)?) => { $( generator.subschema_for::<$t>(); )* } }
    add!(
        v::core::v1::Namespace,
        v::core::v1::Pod,
        v::core::v1::Service,
        v::core::v1::ServiceAccount,
        v::core::v1::ConfigMap,
        v::core::v1::Secret,
        v::core::v1::Node,
        v::core::v1::Endpoints,
        v::core::v1::PersistentVolumeClaim,
        v::core::v1::PersistentVolume,
        v::core::v1::ReplicationController,
        v::batch::v1::CronJob,
        v::networking::v1::Ingress,
        v::core::v1::Event,
        v::apps::v1::Deployment,
        v::apps::v1::DaemonSet,
        v::apps::v1::ReplicaSet,
        v::apps::v1::StatefulSet,
        v::batch::v1::Job,
        v::discovery::v1::EndpointSlice,
        v::rbac::v1::Role,
        v::rbac::v1::ClusterRole,
        v::rbac::v1::RoleBinding,
        v::rbac::v1::ClusterRoleBinding,
        v::coordination::v1::Lease,
        v::autoscaling::v1::Scale,
        v::autoscaling::v2::HorizontalPodAutoscaler,
        v::policy::v1::PodDisruptionBudget,
        v::networking::v1::NetworkPolicy,
        v::admissionregistration::v1::ValidatingWebhookConfiguration,
        v::admissionregistration::v1::MutatingWebhookConfiguration,
        v::authentication::v1::TokenRequest,
        v::authentication::v1::TokenReview,
        v::authentication::v1::SelfSubjectReview,
        v::authorization::v1::SubjectAccessReview,
        v::authorization::v1::LocalSubjectAccessReview,
        v::authorization::v1::SelfSubjectAccessReview,
        v::authorization::v1::SelfSubjectRulesReview,
        apiextensions::CustomResourceDefinition,
        meta::DeleteOptions,
        meta::Status,
    );
    // Transforms would rewrite nothing here but the metadata of the generator itself.
    let mut definitions = generator.take_definitions(false);
    for &(definition, field, merge_key, strategy, list_type, keys) in LISTS {
        let Some(node) = find(&mut definitions, definition, field) else { continue };
        for (extension, value) in [
            ("x-kubernetes-patch-merge-key", json!(merge_key)),
            ("x-kubernetes-patch-strategy", json!(strategy)),
            ("x-kubernetes-list-type", json!(list_type)),
            ("x-kubernetes-list-map-keys", json!(keys)),
        ] {
            if value != json!("") && value != json!([]) {
                node[extension] = value;
            }
        }
    }
    for &(definition, field, extension, value) in STRUCTS {
        if let Some(node) = find(&mut definitions, definition, field) {
            node[extension] = value.into();
        }
    }
    for name in ATOMIC_MAPS {
        if let Some(node) = definitions.get_mut(*name) {
            node["x-kubernetes-map-type"] = "atomic".into();
        }
    }
    // Any JSON, which the generated schema calls an object.
    if let Some(Value::Object(node)) = definitions.get_mut(ANY_JSON) {
        node.shift_remove("type");
    }
    for node in definitions.values_mut() {
        let typed_object = node["type"] == "object";
        if typed_object && node.get("properties").is_none() && node.get("additionalProperties").is_none() {
            node["x-kubernetes-preserve-unknown-fields"] = true.into();
        }
    }
    // Any value at all, which a client only believes of a schema without a type.
    let any = definitions.get_mut("io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSON");
    if let Some(node) = any.and_then(Value::as_object_mut) {
        node.remove("type");
    }
    definitions
}

fn find<'a>(definitions: &'a mut Map<String, Value>, suffix: &str, field: &str) -> Option<&'a mut Value> {
    let suffix = format!(".{suffix}");
    let (_, definition) = definitions.iter_mut().find(|(name, _)| name.ends_with(&suffix))?;
    definition.get_mut("properties")?.get_mut(field)
}

/// The node a reference points at, or the node itself.
pub fn resolve(node: &Value) -> &Value {
    match node["$ref"].as_str().and_then(|r| r.strip_prefix(REF_PREFIX)) {
        Some(name) => DEFINITIONS.get(name).unwrap_or(node),
        None => node,
    }
}

/// An extension of a node, looked for beside the reference first, then behind it.
fn extension<'a>(node: &'a Value, name: &str) -> Option<&'a str> {
    node[name].as_str().or_else(|| resolve(node)[name].as_str())
}

/// Schema of a named field (or map value) of an object; `None` when the schema does not know it.
pub fn child<'a>(node: &'a Value, field: &str) -> Option<&'a Value> {
    let node = resolve(node);
    if let Some(found) = node["properties"].get(field) {
        return Some(found);
    }
    match node.get("additionalProperties") {
        Some(values @ Value::Object(_)) => Some(values),
        _ => None,
    }
}

/// Schema of a list's elements.
pub fn items(node: &Value) -> &Value {
    &resolve(node)["items"]
}

/// Whether unknown content is kept as it is.
pub fn is_opaque(node: &Value) -> bool {
    let node = resolve(node);
    if node["x-kubernetes-preserve-unknown-fields"] == true || node["additionalProperties"] == true {
        return true;
    }
    let Some(fields) = node.as_object() else { return true };
    let shapes = ["type", "properties", "additionalProperties", "items", "x-kubernetes-int-or-string", "format"];
    !shapes.iter().any(|k| fields.contains_key(*k))
}

fn is_int_or_string(node: &Value) -> bool {
    resolve(node)["x-kubernetes-int-or-string"] == true
}

/// How a list merges under server-side apply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListType {
    Atomic,
    Set,
    Map(Vec<String>),
}

pub fn list_type(node: &Value) -> ListType {
    match extension(node, "x-kubernetes-list-type") {
        Some("set") => ListType::Set,
        Some("map") => {
            let keys = node["x-kubernetes-list-map-keys"].as_array().into_iter().flatten();
            ListType::Map(keys.filter_map(|k| k.as_str().map(str::to_owned)).collect())
        }
        _ => ListType::Atomic,
    }
}

/// Whether a struct or map is one unit under server-side apply.
pub fn is_atomic_map(node: &Value) -> bool {
    extension(node, "x-kubernetes-map-type") == Some("atomic") || is_opaque(node)
}

/// Merge key of a list under strategic merge patch; `None`: the list is replaced or is one of plain values.
pub fn patch_merge_key(node: &Value) -> Option<&str> {
    extension(node, "x-kubernetes-patch-merge-key")
}

pub fn has_patch_strategy(node: &Value, strategy: &str) -> bool {
    extension(node, "x-kubernetes-patch-strategy").is_some_and(|s| s.split(',').any(|s| s == strategy))
}

fn join(path: &str, field: &str) -> String {
    if path.is_empty() { field.to_owned() } else { format!("{path}.{field}") }
}

/// Removes fields the schema does not know, and nulls it does not permit; names the former in `unknown`.
pub fn prune(value: &mut Value, node: &Value, path: &str, unknown: &mut Vec<String>) {
    let schema = resolve(node);
    let keep_unknown = is_opaque(node);
    match value {
        Value::Object(fields) => {
            let embedded = schema["x-kubernetes-embedded-resource"] == true;
            fields.retain(|name, value| {
                match child(node, name) {
                    Some(known) => {
                        if value.is_null() && resolve(known)["nullable"] != true && !is_opaque(known) {
                            return false;
                        }
                        prune(value, known, &join(path, name), unknown);
                    }
                    None if keep_unknown
                        || (embedded && matches!(name.as_str(), "apiVersion" | "kind" | "metadata")) => {}
                    None => {
                        unknown.push(join(path, name));
                        return false;
                    }
                }
                true
            });
        }
        Value::Array(elements) if schema.get("items").is_some() => {
            for (index, element) in elements.iter_mut().enumerate() {
                prune(element, items(node), &format!("{path}[{index}]"), unknown);
            }
        }
        _ => {}
    }
}

/// Fills in the schema's defaults (custom resources).
pub fn apply_defaults(value: &mut Value, node: &Value) {
    let schema = resolve(node);
    match value {
        Value::Object(fields) => {
            for (name, known) in schema["properties"].as_object().into_iter().flatten() {
                if let Some(default) = known.get("default") {
                    let unset = fields.get(name).is_none_or(|v| v.is_null() && known["nullable"] != true);
                    if unset {
                        fields.insert(name.clone(), default.clone());
                    }
                }
            }
            for (name, value) in fields.iter_mut() {
                if let Some(known) = child(node, name) {
                    apply_defaults(value, known);
                }
            }
        }
        Value::Array(elements) => elements.iter_mut().for_each(|e| apply_defaults(e, items(node))),
        _ => {}
    }
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(n) if n.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn has_type(value: &Value, wanted: &str) -> bool {
    match (wanted, value) {
        ("number", Value::Number(_)) => true,
        // 1.0 is an integer to JSON.
        ("integer", Value::Number(n)) => n.as_f64().is_none_or(|f| f.fract() == 0.0),
        _ => type_name(value) == wanted,
    }
}

/// First value of a built-in object whose JSON type its field cannot hold, as the decoder would say it.
pub fn type_error(value: &Value, node: &Value, path: &str) -> Option<String> {
    let schema = resolve(node);
    if value.is_null() || is_opaque(node) {
        return None;
    }
    if is_int_or_string(node) {
        let fits = value.is_string() || value.is_number();
        return (!fits)
            .then(|| format!("json: cannot unmarshal {} into field {path} of type IntOrString", type_name(value)));
    }
    if let Some(wanted) = schema["type"].as_str()
        && !has_type(value, wanted)
    {
        let go = match type_name(value) {
            "integer" => "number",
            "boolean" => "bool",
            other => other,
        };
        return Some(format!("json: cannot unmarshal {go} into field {path} of type {wanted}"));
    }
    match value {
        Value::Object(fields) => fields
            .iter()
            .find_map(|(name, value)| child(node, name).and_then(|known| type_error(value, known, &join(path, name)))),
        Value::Array(elements) => elements
            .iter()
            .enumerate()
            .find_map(|(i, element)| type_error(element, items(node), &format!("{path}[{i}]"))),
        _ => None,
    }
}

/// Checks a custom resource against its schema.
pub fn validate(value: &Value, node: &Value, path: &str, causes: &mut Vec<Cause>) {
    let schema = resolve(node);
    let at = || if path.is_empty() { "<nil>".to_owned() } else { path.to_owned() };
    if value.is_null() && schema["nullable"] == true {
        return;
    }
    if is_int_or_string(node) {
        if !(value.is_string() || has_type(value, "integer")) {
            causes.push(type_cause(at(), value, "integer,string"));
            return;
        }
    } else if let Some(wanted) = schema["type"].as_str()
        && !has_type(value, wanted)
    {
        causes.push(type_cause(at(), value, wanted));
        return;
    }
    if let Some(allowed) = schema["enum"].as_array()
        && !allowed.contains(value)
    {
        let allowed: Vec<String> = allowed.iter().map(|v| v.as_str().map_or(v.to_string(), str::to_owned)).collect();
        causes.push(Cause::not_supported(at(), value, &allowed));
    }
    match value {
        Value::String(text) => validate_string(text, schema, at, causes),
        Value::Number(number) => validate_number(number.as_f64().unwrap_or_default(), value, schema, at, causes),
        Value::Array(elements) => {
            validate_count(elements.len(), value, schema, ["minItems", "maxItems"], "items", at, causes);
            for (index, element) in elements.iter().enumerate() {
                validate(element, &schema["items"], &format!("{path}[{index}]"), causes);
            }
            validate_unique(elements, node, path, causes);
        }
        Value::Object(fields) => {
            validate_count(fields.len(), value, schema, ["minProperties", "maxProperties"], "properties", at, causes);
            for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
                if !fields.contains_key(name) {
                    causes.push(Cause::required(join(path, name), ""));
                }
            }
            for (name, value) in fields {
                // Metadata has its own rules; its schema is a built-in one.
                if path.is_empty() && name == "metadata" {
                    continue;
                }
                if let Some(known) = child(node, name) {
                    validate(value, known, &join(path, name), causes);
                }
            }
        }
        _ => {}
    }
    validate_combined(value, schema, path, causes);
}

fn type_cause(field: String, value: &Value, wanted: &str) -> Cause {
    let message = format!(
        "Invalid value: {:?}: {field} in body must be of type {wanted}: {:?}",
        type_name(value),
        type_name(value)
    );
    Cause { reason: "FieldValueTypeInvalid", field, message }
}

fn in_body(field: String, value: &Value, rule: &str) -> Cause {
    let detail = format!("{field} in body {rule}");
    Cause::invalid(field, value, &detail)
}

fn validate_string(text: &str, schema: &Value, at: impl Fn() -> String, causes: &mut Vec<Cause>) {
    let value = Value::from(text);
    let length = text.chars().count() as u64;
    if let Some(limit) = schema["minLength"].as_u64().filter(|limit| length < *limit) {
        causes.push(in_body(at(), &value, &format!("should be at least {limit} chars long")));
    }
    if let Some(limit) = schema["maxLength"].as_u64().filter(|limit| length > *limit) {
        causes.push(in_body(at(), &value, &format!("should be at most {limit} chars long")));
    }
    if let Some(pattern) = schema["pattern"].as_str()
        && regex::Regex::new(pattern).is_ok_and(|r| !r.is_match(text))
    {
        causes.push(in_body(at(), &value, &format!("should match '{pattern}'")));
    }
    let well_formed = match schema["format"].as_str() {
        Some("date-time") => time::OffsetDateTime::parse(text, &time::format_description::well_known::Rfc3339).is_ok(),
        Some("ipv4") => text.parse::<std::net::Ipv4Addr>().is_ok(),
        Some("ipv6") => text.parse::<std::net::Ipv6Addr>().is_ok(),
        Some("cidr") => text.parse::<ipnet::IpNet>().is_ok(),
        Some("uuid") => uuid::Uuid::parse_str(text).is_ok(),
        _ => true,
    };
    if !well_formed {
        let format = schema["format"].as_str().unwrap_or_default();
        causes.push(in_body(at(), &value, &format!("must be of type {format}: {text:?}")));
    }
}

fn validate_number(number: f64, value: &Value, schema: &Value, at: impl Fn() -> String, causes: &mut Vec<Cause>) {
    let exclusive_min = schema["exclusiveMinimum"] == true;
    let exclusive_max = schema["exclusiveMaximum"] == true;
    if let Some(limit) = schema["minimum"].as_f64()
        && (number < limit || exclusive_min && number == limit)
    {
        let word = if exclusive_min { "greater than" } else { "greater than or equal to" };
        causes.push(in_body(at(), value, &format!("should be {word} {limit}")));
    }
    if let Some(limit) = schema["maximum"].as_f64()
        && (number > limit || exclusive_max && number == limit)
    {
        let word = if exclusive_max { "less than" } else { "less than or equal to" };
        causes.push(in_body(at(), value, &format!("should be {word} {limit}")));
    }
    if let Some(step) = schema["multipleOf"].as_f64().filter(|step| *step > 0.0 && (number / step).fract() != 0.0) {
        causes.push(in_body(at(), value, &format!("should be a multiple of {step}")));
    }
    let range = match schema["format"].as_str() {
        Some("int32") => f64::from(i32::MIN)..=f64::from(i32::MAX),
        _ => f64::NEG_INFINITY..=f64::INFINITY,
    };
    if !range.contains(&number) {
        causes.push(in_body(at(), value, "must be of type int32"));
    }
}

fn validate_count(
    count: usize,
    value: &Value,
    schema: &Value,
    [min, max]: [&str; 2],
    what: &str,
    at: impl Fn() -> String,
    causes: &mut Vec<Cause>,
) {
    if let Some(limit) = schema[min].as_u64().filter(|limit| (count as u64) < *limit) {
        causes.push(in_body(at(), value, &format!("should have at least {limit} {what}")));
    }
    if let Some(limit) = schema[max].as_u64().filter(|limit| (count as u64) > *limit) {
        let message = format!("Too many: {count}: must have at most {limit} {what}");
        causes.push(Cause { reason: "FieldValueTooMany", field: at(), message });
    }
}

fn validate_unique(elements: &[Value], node: &Value, path: &str, causes: &mut Vec<Cause>) {
    let identity = |element: &Value| match list_type(node) {
        ListType::Atomic => None,
        ListType::Set => Some(element.clone()),
        ListType::Map(keys) => Some(keys.iter().map(|k| element[k.as_str()].clone()).collect()),
    };
    // By text, or a body full of elements would take hours.
    let mut seen = HashSet::new();
    for (index, element) in elements.iter().enumerate() {
        let Some(mut id) = identity(element) else { return };
        id.sort_all_objects();
        if !seen.insert(id.to_string()) {
            causes.push(Cause::duplicate(format!("{path}[{index}]"), &id));
        }
    }
}

fn validate_combined(value: &Value, schema: &Value, path: &str, causes: &mut Vec<Cause>) {
    let fits = |branch: &Value| {
        let mut found = Vec::new();
        validate(value, branch, path, &mut found);
        found.is_empty()
    };
    let branches = |name: &str| schema[name].as_array().filter(|b| !b.is_empty());
    let field = || if path.is_empty() { "<nil>".to_owned() } else { path.to_owned() };
    let shown = Value::from("");
    if let Some(all) = branches("allOf") {
        all.iter().for_each(|branch| validate(value, branch, path, causes));
    }
    if branches("anyOf").is_some_and(|any| !any.iter().any(fits)) {
        causes.push(in_body(field(), &shown, "must validate at least one schema (anyOf)"));
    }
    if let Some(one) = branches("oneOf") {
        match one.iter().filter(|branch| fits(branch)).count() {
            1 => {}
            0 => {
                causes.push(in_body(field(), &shown, "must validate one and only one schema (oneOf). Found none valid"))
            }
            n => causes.push(in_body(
                field(),
                &shown,
                &format!("must validate one and only one schema (oneOf). Found {n} valid alternatives"),
            )),
        }
    }
    if schema.get("not").is_some_and(fits) {
        causes.push(in_body(field(), &shown, "must not validate the schema (not)"));
    }
}

/// Whether any node of a schema carries CEL rules.
pub fn has_cel_rules(node: &Value) -> bool {
    match node {
        Value::Object(fields) => {
            fields.get("x-kubernetes-validations").is_some_and(Value::is_array) || fields.values().any(has_cel_rules)
        }
        Value::Array(elements) => elements.iter().any(has_cel_rules),
        _ => false,
    }
}

/// The reference node of a built-in definition.
pub fn reference(definition: &str) -> Value {
    json!({"$ref": format!("{REF_PREFIX}{definition}")})
}

/// Full definition name of a built-in type.
pub fn name_of<T: JsonSchema>() -> String {
    T::schema_name().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_list_rule_names_a_field_that_exists() {
        let mut definitions = definitions().clone();
        for (definition, field, ..) in LISTS {
            assert!(find(&mut definitions, definition, field).is_some(), "{definition}.{field}");
        }
        for (definition, field, ..) in STRUCTS {
            assert!(find(&mut definitions, definition, field).is_some(), "{definition}.{field}");
        }
        for name in ATOMIC_MAPS {
            assert!(definitions.contains_key(*name), "{name}");
        }
    }

    #[test]
    fn unknown_fields_are_named_with_their_path() {
        let node = reference("io.k8s.api.core.v1.Pod");
        let mut pod = json!({"spec": {"containers": [{"name": "a", "imagee": "b"}], "nodeName": null}});
        let mut unknown = Vec::new();
        prune(&mut pod, &node, "", &mut unknown);
        assert_eq!(unknown, ["spec.containers[0].imagee"]);
        assert_eq!(pod, json!({"spec": {"containers": [{"name": "a"}]}}));
    }

    #[test]
    fn what_a_set_holds_twice_is_named_in_any_spelling_and_at_any_length() {
        let node = json!({"type": "array", "x-kubernetes-list-type": "set"});
        let doubles = |value: &Value| {
            let mut causes = Vec::new();
            validate(value, &node, "l", &mut causes);
            causes.into_iter().map(|cause| cause.field).collect::<Vec<_>>()
        };
        assert_eq!(doubles(&json!([1, {"a": 1, "b": 2}, "1", {"b": 2, "a": 1}, 1])), ["l[3]", "l[4]"]);
        let many: Vec<u32> = (0..200_000).chain([7]).collect();
        assert_eq!(doubles(&json!(many)), ["l[200000]"]);
    }

    #[test]
    fn a_custom_schema_is_enforced() {
        let schema = json!({"type": "object", "required": ["spec"], "properties": {"spec": {
            "type": "object", "properties": {
                "mode": {"type": "string", "enum": ["A", "B"]},
                "port": {"type": "integer", "minimum": 1, "maximum": 65535},
            },
            "oneOf": [{"required": ["mode"]}, {"required": ["port"]}],
        }}});
        let check = |value: Value| {
            let mut causes = Vec::new();
            validate(&value, &schema, "", &mut causes);
            causes.into_iter().map(|c| c.field).collect::<Vec<_>>()
        };
        assert!(check(json!({"spec": {"mode": "A"}})).is_empty());
        assert_eq!(check(json!({})), ["spec"]);
        assert_eq!(check(json!({"spec": {"mode": "C"}})), ["spec.mode"]);
        assert_eq!(check(json!({"spec": {"port": 0}})), ["spec.port"]);
        assert_eq!(check(json!({"spec": {"port": "x"}})), ["spec.port"]);
        assert_eq!(check(json!({"spec": {"port": 1, "mode": "A"}})), ["spec"]);
    }
}
