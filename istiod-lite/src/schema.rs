//! What objects look like: the definitions of Kubernetes' built-in kinds, how their lists merge, and which fields of an
//! object are unknown or of another type.
//!
//! Definitions come from the generated Kubernetes types; the merge keys, which those do not carry, from [`LISTS`]. A node
//! is plain OpenAPI JSON, a custom resource's too; `$ref` always means a built-in definition. They are made at first use.

use std::sync::LazyLock;

use k8s_openapi::api as v;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1 as apiextensions;
use k8s_openapi::apimachinery::pkg::apis::meta::v1 as meta;
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

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

pub fn is_int_or_string(node: &Value) -> bool {
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

pub fn join(path: &str, field: &str) -> String {
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

pub fn type_name(value: &Value) -> &'static str {
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

pub fn has_type(value: &Value, wanted: &str) -> bool {
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
}
