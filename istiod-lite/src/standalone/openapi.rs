//! The OpenAPI documents clients read before they send anything: v2 as JSON and as protobuf (all that kubectl 1.20
//! takes), v3 as an index and one document per group and version.

use serde_json::{Map, Value, json};

use super::registry::{Kind, Registry, Source};
use super::schema;

/// Name of a kind's definition.
fn definition_name(kind: &Kind) -> String {
    match &kind.source {
        Source::BuiltIn(name) => name.clone(),
        Source::Custom { .. } => {
            let reversed: Vec<&str> = kind.group.rsplit('.').collect();
            format!("{}.{}.{}", reversed.join("."), kind.version, kind.kind)
        }
    }
}

fn gvk(kind: &Kind) -> Value {
    json!({"group": kind.group, "version": kind.version, "kind": kind.kind})
}

/// Which document a schema is written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dialect {
    V2,
    V3,
}

/// All definitions the kinds need, each kind's marked with its group, version and kind.
fn definitions<'a>(kinds: impl Iterator<Item = &'a Kind>, dialect: Dialect) -> Map<String, Value> {
    let mut marked: Map<String, Value> = Map::new();
    let mut wanted: Vec<String> = Vec::new();
    for kind in kinds {
        let name = definition_name(kind);
        let mut node = match &kind.source {
            Source::BuiltIn(name) => schema::definitions().get(name).cloned().unwrap_or_default(),
            Source::Custom { .. } => kind.schema.clone(),
        };
        collect_references(&node, &mut wanted);
        node["x-kubernetes-group-version-kind"] = json!([gvk(kind)]);
        marked.insert(name, node);
    }
    wanted.push(schema::name_of::<k8s_openapi::apimachinery::pkg::apis::meta::v1::DeleteOptions>());
    while let Some(name) = wanted.pop() {
        if let Some(node) = schema::definitions().get(&name).filter(|_| !marked.contains_key(&name)) {
            collect_references(node, &mut wanted);
            marked.insert(name, node.clone());
        }
    }
    marked.into_iter().map(|(name, node)| (name, translate(&node, dialect))).collect()
}

fn collect_references(node: &Value, into: &mut Vec<String>) {
    match node {
        Value::Object(fields) => {
            if let Some(name) =
                fields.get("$ref").and_then(Value::as_str).and_then(|r| r.strip_prefix("#/definitions/"))
            {
                into.push(name.to_owned());
            }
            fields.values().for_each(|v| collect_references(v, into));
        }
        Value::Array(elements) => elements.iter().for_each(|v| collect_references(v, into)),
        _ => {}
    }
}

fn translate(node: &Value, dialect: Dialect) -> Value {
    let Value::Object(fields) = node else { return node.clone() };
    let mut out = Map::new();
    for (name, value) in fields {
        let value = match (name.as_str(), value) {
            ("properties", Value::Object(children)) => {
                children.iter().map(|(k, v)| (k.clone(), translate(v, dialect))).collect::<Map<_, _>>().into()
            }
            ("items" | "additionalProperties" | "not", child) => translate(child, dialect),
            ("allOf" | "anyOf" | "oneOf", Value::Array(children)) => {
                children.iter().map(|v| translate(v, dialect)).collect::<Vec<_>>().into()
            }
            (_, value) => value.clone(),
        };
        out.insert(name.clone(), value);
    }
    let int_or_string = out.get("x-kubernetes-int-or-string") == Some(&Value::Bool(true));
    match dialect {
        Dialect::V2 => {
            // Words this dialect does not have.
            for name in ["anyOf", "oneOf", "not", "nullable", "x-kubernetes-validations", "default"] {
                out.shift_remove(name);
            }
            if int_or_string {
                out.insert("type".into(), "string".into());
                out.insert("format".into(), "int-or-string".into());
            }
            // Anything goes below: a client that checks types must not.
            if fields.get("nullable") == Some(&Value::Bool(true)) {
                for name in ["type", "properties", "items", "additionalProperties", "required", "enum"] {
                    out.shift_remove(name);
                }
            }
        }
        Dialect::V3 => {
            if let Some(Value::String(reference)) = out.shift_remove("$ref") {
                let target = reference.replace("#/definitions/", "#/components/schemas/");
                out.insert("allOf".into(), json!([{"$ref": target}]));
            }
            if int_or_string && !out.contains_key("anyOf") {
                out.insert("oneOf".into(), json!([{"type": "integer"}, {"type": "string"}]));
            }
        }
    }
    out.into()
}

const PARAMETERS: [&str; 4] = ["dryRun", "fieldManager", "fieldValidation", "pretty"];

fn parameters(names: &[&str], dialect: Dialect) -> Value {
    let one = |name: &&str| match dialect {
        Dialect::V2 => json!({"name": name, "in": "query", "type": "string", "uniqueItems": true}),
        Dialect::V3 => json!({"name": name, "in": "query", "schema": {"type": "string", "uniqueItems": true}}),
    };
    names.iter().map(one).collect()
}

/// The paths of a kind, with the operations clients look features up in.
fn paths(kind: &Kind, dialect: Dialect, into: &mut Map<String, Value>) {
    let root = if kind.group.is_empty() {
        format!("/api/{}", kind.version)
    } else {
        format!("/apis/{}/{}", kind.group, kind.version)
    };
    let scope = if kind.namespaced { "/namespaces/{namespace}" } else { "" };
    let name = definition_name(kind);
    let reference = match dialect {
        Dialect::V2 => json!({"schema": {"$ref": format!("#/definitions/{name}")}}),
        Dialect::V3 => {
            json!({"content": {"application/json": {"schema": {"$ref": format!("#/components/schemas/{name}")}}}})
        }
    };
    let operation = |action: &str, verb: &str, names: &[&str], body: bool| {
        let mut ok = reference.clone();
        ok["description"] = "OK".into();
        let mut parameters = parameters(names, dialect);
        let mut operation = json!({
            "operationId": format!("{verb}{}{}", kind.group.replace('.', ""), kind.kind),
            "responses": {"200": ok},
            "x-kubernetes-action": action,
            "x-kubernetes-group-version-kind": gvk(kind),
        });
        if body {
            match (dialect, parameters.as_array_mut()) {
                (Dialect::V2, Some(list)) => {
                    let schema = &reference["schema"];
                    list.insert(0, json!({"name": "body", "in": "body", "required": true, "schema": schema}));
                }
                _ => operation["requestBody"] = json!({"content": reference["content"], "required": true}),
            }
        }
        operation["parameters"] = parameters;
        operation
    };
    let collection = format!("{root}{scope}/{}", kind.plural);
    let create = operation("post", "create", &PARAMETERS, true);
    if kind.create_only {
        into.insert(collection, json!({"post": create}));
        return;
    }
    let list = operation("list", "list", &["labelSelector", "fieldSelector", "limit", "continue", "watch"], false);
    into.insert(collection.clone(), json!({"get": list, "post": create}));
    let mut patch = operation("patch", "patch", &["dryRun", "fieldManager", "fieldValidation", "force"], true);
    let mut media = vec!["application/json-patch+json", "application/merge-patch+json", "application/apply-patch+yaml"];
    if !kind.is_custom() {
        media.push("application/strategic-merge-patch+json");
    }
    match dialect {
        Dialect::V2 => patch["consumes"] = json!(media),
        Dialect::V3 => {
            let content: Map<String, Value> =
                media.into_iter().map(|m| (m.to_owned(), json!({"schema": {"type": "object"}}))).collect();
            patch["requestBody"] = json!({"content": content, "required": true});
        }
    }
    into.insert(
        format!("{collection}/{{name}}"),
        json!({
            "get": operation("get", "read", &["pretty"], false),
            "put": operation("put", "replace", &PARAMETERS, true),
            "patch": patch,
            "delete": operation("delete", "delete", &["dryRun", "gracePeriodSeconds", "propagationPolicy"], false),
        }),
    );
}

/// The whole v2 document.
pub fn v2(registry: &Registry) -> Value {
    let mut all_paths = Map::new();
    registry.all().for_each(|kind| paths(kind, Dialect::V2, &mut all_paths));
    json!({
        "swagger": "2.0", "info": {"title": "Kubernetes", "version": "v1.32.0"}, "paths": all_paths,
        "definitions": definitions(registry.all().map(|k| &**k), Dialect::V2),
    })
}

/// The v3 index: one relative URL per group and version, tagged with a hash of what it will answer.
pub fn v3_index(registry: &Registry, hash: &str) -> Value {
    let mut index = Map::new();
    for (group, versions) in registry.groups() {
        for version in versions {
            let path = if group.is_empty() { format!("api/{version}") } else { format!("apis/{group}/{version}") };
            let url = format!("/openapi/v3/{path}?hash={hash}");
            index.insert(path, json!({"serverRelativeURL": url}));
        }
    }
    json!({"paths": index})
}

/// The v3 document of one group and version; `None` when it is not served.
pub fn v3(registry: &Registry, group: &str, version: &str) -> Option<Value> {
    let kinds: Vec<&Kind> = registry.of_version(group, version).map(|k| &**k).collect();
    if kinds.is_empty() {
        return None;
    }
    let mut all_paths = Map::new();
    kinds.iter().for_each(|kind| paths(kind, Dialect::V3, &mut all_paths));
    Some(json!({
        "openapi": "3.0.0", "info": {"title": "Kubernetes", "version": "v1.32.0"}, "paths": all_paths,
        "components": {"schemas": definitions(kinds.into_iter(), Dialect::V3)},
    }))
}

/// The v2 document in the protobuf encoding of gnostic's `openapi.v2.Document`.
pub fn v2_protobuf(document: &Value) -> Vec<u8> {
    let mut out = Message::default();
    out.text(1, &document["swagger"]);
    let mut info = Message::default();
    info.text(1, &document["info"]["title"]);
    info.text(2, &document["info"]["version"]);
    out.message(2, &info);
    let mut paths = Message::default();
    for (name, item) in entries(&document["paths"]) {
        let mut value = Message::default();
        for (field, method) in [(2, "get"), (3, "put"), (4, "post"), (5, "delete"), (8, "patch")] {
            if let Some(operation) = item.get(method) {
                value.message(field, &encode_operation(operation));
            }
        }
        paths.message(2, &named(name, &value));
    }
    out.message(8, &paths);
    out.message(9, &named_schemas(&document["definitions"]));
    out.0
}

/// A protobuf message under construction.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push((value & 0x7f) as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn bytes(&mut self, field: u64, bytes: &[u8]) {
        self.varint(field << 3 | 2);
        self.varint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    fn message(&mut self, field: u64, message: &Message) {
        self.bytes(field, &message.0);
    }

    fn text(&mut self, field: u64, value: &Value) {
        if let Some(text) = value.as_str().filter(|t| !t.is_empty()) {
            self.bytes(field, text.as_bytes());
        }
    }

    fn texts(&mut self, field: u64, value: &Value) {
        for text in value.as_array().into_iter().flatten().filter_map(Value::as_str) {
            self.bytes(field, text.as_bytes());
        }
    }

    fn flag(&mut self, field: u64, value: &Value) {
        if value == &Value::Bool(true) {
            self.varint(field << 3);
            self.varint(1);
        }
    }

    fn integer(&mut self, field: u64, value: &Value) {
        if let Some(number) = value.as_u64().filter(|n| *n > 0) {
            self.varint(field << 3);
            self.varint(number);
        }
    }

    fn double(&mut self, field: u64, value: &Value) {
        if let Some(number) = value.as_f64() {
            self.varint(field << 3 | 1);
            self.0.extend_from_slice(&number.to_le_bytes());
        }
    }
}

fn entries(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flatten()
}

fn named(name: &str, value: &Message) -> Message {
    let mut out = Message::default();
    out.bytes(1, name.as_bytes());
    out.message(2, value);
    out
}

/// gnostic's `Any`: the value as YAML text; JSON is YAML.
fn any(value: &Value) -> Message {
    let mut out = Message::default();
    out.bytes(2, value.to_string().as_bytes());
    out
}

fn extensions(node: &Value, field: u64, into: &mut Message) {
    for (name, value) in entries(node).filter(|(name, _)| name.starts_with("x-")) {
        into.message(field, &named(name, &any(value)));
    }
}

fn encode_operation(operation: &Value) -> Message {
    let mut out = Message::default();
    out.text(5, &operation["operationId"]);
    out.texts(7, &operation["consumes"]);
    for parameter in operation["parameters"].as_array().into_iter().flatten() {
        let mut encoded = Message::default();
        let mut choice = Message::default();
        if parameter["in"] == "body" {
            encoded.text(2, &parameter["name"]);
            encoded.text(3, &parameter["in"]);
            encoded.flag(4, &parameter["required"]);
            encoded.message(5, &encode_schema(&parameter["schema"]));
            choice.message(1, &encoded);
        } else {
            encoded.text(2, &parameter["in"]);
            encoded.text(4, &parameter["name"]);
            encoded.text(6, &parameter["type"]);
            let mut non_body = Message::default();
            non_body.message(3, &encoded);
            choice.message(2, &non_body);
        }
        let mut item = Message::default();
        item.message(1, &choice);
        out.message(8, &item);
    }
    let mut responses = Message::default();
    for (code, response) in entries(&operation["responses"]) {
        let mut body = Message::default();
        body.text(1, &response["description"]);
        if response["schema"].is_object() {
            let mut item = Message::default();
            item.message(1, &encode_schema(&response["schema"]));
            body.message(2, &item);
        }
        let mut value = Message::default();
        value.message(1, &body);
        responses.message(1, &named(code, &value));
    }
    out.message(9, &responses);
    extensions(operation, 13, &mut out);
    out
}

fn named_schemas(map: &Value) -> Message {
    let mut out = Message::default();
    for (name, schema) in entries(map) {
        out.message(1, &named(name, &encode_schema(schema)));
    }
    out
}

fn encode_schema(node: &Value) -> Message {
    let mut out = Message::default();
    out.text(1, &node["$ref"]);
    out.text(2, &node["format"]);
    out.text(4, &node["description"]);
    out.double(6, &node["multipleOf"]);
    out.double(7, &node["maximum"]);
    out.flag(8, &node["exclusiveMaximum"]);
    out.double(9, &node["minimum"]);
    out.flag(10, &node["exclusiveMinimum"]);
    out.integer(11, &node["maxLength"]);
    out.integer(12, &node["minLength"]);
    out.text(13, &node["pattern"]);
    out.integer(14, &node["maxItems"]);
    out.integer(15, &node["minItems"]);
    out.texts(19, &node["required"]);
    for value in node["enum"].as_array().into_iter().flatten() {
        out.message(20, &any(value));
    }
    match &node["additionalProperties"] {
        Value::Bool(allowed) => {
            let mut item = Message::default();
            item.varint(2 << 3);
            item.varint(u64::from(*allowed));
            out.message(21, &item);
        }
        Value::Object(_) => {
            let mut item = Message::default();
            item.message(1, &encode_schema(&node["additionalProperties"]));
            out.message(21, &item);
        }
        _ => {}
    }
    if node["type"].is_string() {
        let mut item = Message::default();
        item.text(1, &node["type"]);
        out.message(22, &item);
    }
    if node["items"].is_object() {
        let mut item = Message::default();
        item.message(1, &encode_schema(&node["items"]));
        out.message(23, &item);
    }
    for part in node["allOf"].as_array().into_iter().flatten() {
        out.message(24, &encode_schema(part));
    }
    if node["properties"].is_object() {
        out.message(25, &named_schemas(&node["properties"]));
    }
    extensions(node, 31, &mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reference_in_a_document_resolves() {
        let registry = Registry::new([]);
        let document = v2(&registry);
        let mut wanted = Vec::new();
        collect_references(&document, &mut wanted);
        assert!(!wanted.is_empty());
        for name in wanted {
            assert!(document["definitions"].get(&name).is_some(), "{name}");
        }
    }

    #[test]
    fn a_kind_can_be_found_by_its_extension() {
        let document = v3(&Registry::new([]), "apps", "v1").unwrap();
        let deployment = &document["components"]["schemas"]["io.k8s.api.apps.v1.Deployment"];
        assert_eq!(deployment["x-kubernetes-group-version-kind"][0]["kind"], "Deployment");
        let spec = &deployment["properties"]["spec"]["allOf"][0]["$ref"];
        assert_eq!(spec, "#/components/schemas/io.k8s.api.apps.v1.DeploymentSpec");
    }

    #[test]
    fn varints_and_lengths_are_protobuf() {
        let mut message = Message::default();
        message.text(1, &"ab".into());
        message.integer(11, &300.into());
        assert_eq!(message.0, [0x0a, 2, b'a', b'b', 0x58, 0xac, 0x02]);
    }
}
