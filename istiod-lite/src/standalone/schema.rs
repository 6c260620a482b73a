//! What the API server does by the schemas of custom resources: defaults and validation. Built-in kinds have their own
//! (`builtin`). What definitions say in CEL comes after it (`cel`).

use std::collections::HashSet;

use serde_json::Value;

use super::error::Cause;
pub use crate::schema::*;

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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

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
