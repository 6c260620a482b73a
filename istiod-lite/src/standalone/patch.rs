//! The three client-computed patches: JSON patch (RFC 6902), JSON merge patch (RFC 7396) and Kubernetes' strategic
//! merge patch with its directives. Pure functions of document, patch and schema.

use json_patch::PatchOperation as Operation;
use serde_json::{Map, Value};

use super::depth::{DEEPEST, exceeds};
use super::error::{ApiError, ApiResult};
use super::schema;

/// Operations of one JSON patch, as Kubernetes has it.
const MOST_OPERATIONS: usize = 10_000;
/// Bytes that the copies of one JSON patch may come to: a few of them, each of all there is, would otherwise fill the memory.
const MOST_COPIED: usize = 3 << 20;

/// Applies a JSON patch. When it fails the document is of no use any more.
///
/// # Errors
/// 400 when it is not a patch, 413 when it would do too much, 422 when an operation (or its `test`) does not hold.
pub fn json_patch(document: &mut Value, patch: Value) -> ApiResult<()> {
    let patch: json_patch::Patch =
        serde_json::from_value(patch).map_err(|e| ApiError::bad_request(format!("invalid JSON patch: {e}")))?;
    if patch.0.len() > MOST_OPERATIONS {
        return Err(ApiError::too_much(&format!("the patch has more than {MOST_OPERATIONS} operations")));
    }
    let mut copied = 0;
    for (number, operation) in patch.0.iter().enumerate() {
        let put = match operation {
            Operation::Add(add) => Some(&add.value),
            Operation::Replace(replace) => Some(&replace.value),
            Operation::Copy(copy) => document.pointer(copy.from.as_str()),
            Operation::Move(of) => document.pointer(of.from.as_str()),
            Operation::Remove(_) | Operation::Test(_) => None,
        };
        let level = operation.path().as_str().matches('/').count();
        if put.is_some_and(|value| level > DEEPEST || exceeds(value, DEEPEST - level)) {
            return Err(ApiError::bad_request(format!("the patch nests deeper than {DEEPEST} levels")));
        }
        if let (Operation::Copy(_), Some(value)) = (operation, put) {
            copied += value.to_string().len();
            if copied > MOST_COPIED {
                return Err(ApiError::too_much(&format!("the patch copies more than {MOST_COPIED} bytes")));
            }
        }
        apply(document, number, operation)?;
    }
    Ok(())
}

fn apply(document: &mut Value, number: usize, operation: &Operation) -> ApiResult<()> {
    json_patch::patch_unsafe(document, std::slice::from_ref(operation)).map_err(|mut e| {
        e.operation = number;
        let name = document["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let cause = super::error::Cause {
            reason: "FieldValueInvalid",
            field: "patch".into(),
            message: format!("the server rejected our request due to an error in our request: {e}"),
        };
        ApiError::invalid("", document["kind"].as_str().unwrap_or_default(), &name, &[cause])
    })
}

/// Applies a JSON merge patch.
pub fn merge(document: &mut Value, patch: &Value) {
    json_patch::merge(document, patch);
}

/// Applies a strategic merge patch to a document of the given schema.
///
/// # Errors
/// 400 on a directive that is unknown or has the wrong shape.
pub fn strategic(document: &mut Value, patch: &Value, node: &Value) -> ApiResult<()> {
    let Value::Object(changes) = patch else {
        return Err(ApiError::bad_request("a strategic merge patch is an object"));
    };
    if !document.is_object() {
        *document = Value::Object(Map::new());
    }
    let Value::Object(fields) = document else { return Ok(()) };
    merge_object(fields, changes, node)
}

fn bad_directive(what: &str) -> ApiError {
    ApiError::bad_request(format!("invalid strategic merge patch: {what}"))
}

fn merge_object(fields: &mut Map<String, Value>, changes: &Map<String, Value>, node: &Value) -> ApiResult<()> {
    match changes.get("$patch").map(Value::as_str) {
        None | Some(Some("merge")) => {}
        Some(Some("replace")) => {
            *fields = without_directives(changes);
            return Ok(());
        }
        Some(Some("delete")) => {
            fields.clear();
            return Ok(());
        }
        Some(other) => return Err(bad_directive(&format!("unknown $patch {other:?}"))),
    }
    if let Some(keep) = changes.get("$retainKeys") {
        let keep = keep.as_array().ok_or_else(|| bad_directive("$retainKeys is a list of field names"))?;
        fields.retain(|name, _| keep.iter().any(|k| k == name.as_str()));
    }
    for (name, change) in changes {
        if let Some(field) = name.strip_prefix("$deleteFromPrimitiveList/") {
            let gone = change.as_array().ok_or_else(|| bad_directive("$deleteFromPrimitiveList holds a list"))?;
            if let Some(Value::Array(list)) = fields.get_mut(field) {
                list.retain(|v| !gone.contains(v));
            }
            continue;
        }
        if name.starts_with('$') {
            continue;
        }
        let known = schema::child(node, name);
        let schema = known.unwrap_or(&Value::Null);
        match change {
            Value::Null => {
                fields.shift_remove(name);
            }
            Value::Object(change) if change.get("$patch").is_some_and(|p| p == "delete") => {
                fields.shift_remove(name);
            }
            Value::Object(change) => {
                let target = fields.entry(name).or_insert(Value::Null);
                if !target.is_object() {
                    *target = Value::Object(Map::new());
                }
                if let Value::Object(target) = target {
                    merge_object(target, change, schema)?;
                }
            }
            Value::Array(change) if schema::has_patch_strategy(schema, "merge") => {
                let target = fields.entry(name).or_insert(Value::Null);
                if !target.is_array() {
                    *target = Value::Array(Vec::new());
                }
                if let Value::Array(target) = target {
                    merge_list(target, change, schema)?;
                    let order = changes.get(&format!("$setElementOrder/{name}")).and_then(Value::as_array);
                    if let Some(order) = order {
                        reorder(target, order, schema::patch_merge_key(schema));
                    }
                }
            }
            other => {
                fields.insert(name.clone(), other.clone());
            }
        }
    }
    // An order without a change of the list itself.
    for (name, order) in changes {
        let Some(field) = name.strip_prefix("$setElementOrder/").filter(|f| !changes.contains_key(*f)) else {
            continue;
        };
        if let (Some(Value::Array(list)), Some(order)) = (fields.get_mut(field), order.as_array()) {
            reorder(list, order, schema::child(node, field).and_then(schema::patch_merge_key));
        }
    }
    Ok(())
}

fn without_directives(changes: &Map<String, Value>) -> Map<String, Value> {
    changes.iter().filter(|(k, _)| !k.starts_with('$')).map(|(k, v)| (k.clone(), v.clone())).collect()
}

fn merge_list(list: &mut Vec<Value>, changes: &[Value], node: &Value) -> ApiResult<()> {
    let Some(key) = schema::patch_merge_key(node) else {
        for change in changes {
            if !list.contains(change) {
                list.push(change.clone());
            }
        }
        return Ok(());
    };
    if changes.iter().any(|c| c["$patch"] == "replace") {
        *list = changes.iter().filter(|c| c["$patch"] != "replace").cloned().collect();
        return Ok(());
    }
    for change in changes {
        let Value::Object(fields) = change else {
            return Err(bad_directive("an element of a list with a merge key is not an object"));
        };
        let id = fields.get(key).ok_or_else(|| bad_directive(&format!("an element lacks its merge key {key:?}")))?;
        if change["$patch"] == "delete" {
            list.retain(|element| element.get(key) != Some(id));
            continue;
        }
        match list.iter_mut().find(|element| element.get(key) == Some(id)) {
            Some(Value::Object(element)) => merge_object(element, fields, schema::items(node))?,
            _ => {
                let mut element = Map::new();
                merge_object(&mut element, fields, schema::items(node))?;
                list.push(Value::Object(element));
            }
        }
    }
    Ok(())
}

/// Puts the elements that `order` names in that order; others keep their place behind the one they followed.
fn reorder(list: &mut Vec<Value>, order: &[Value], key: Option<&str>) {
    let id = |element: &Value| key.map_or_else(|| element.clone(), |k| element[k].clone());
    let rank = |element: &Value| order.iter().position(|o| id(o) == id(element));
    let mut last = 0;
    let mut ranked: Vec<(usize, Value)> = std::mem::take(list)
        .into_iter()
        .map(|element| {
            last = rank(&element).map_or(last, |r| r + 1);
            (last, element)
        })
        .collect();
    ranked.sort_by_key(|(rank, _)| *rank);
    list.extend(ranked.into_iter().map(|(_, element)| element));
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn patched(kind: &str, mut document: Value, patch: Value) -> Value {
        strategic(&mut document, &patch, &schema::reference(kind)).unwrap();
        document
    }

    const POD: &str = "io.k8s.api.core.v1.Pod";

    #[test]
    fn containers_merge_by_name_and_env_by_name() {
        let pod = json!({"spec": {"containers": [
            {"name": "a", "image": "1", "env": [{"name": "X", "value": "1"}, {"name": "Y", "value": "2"}]},
            {"name": "b", "image": "1"},
        ]}});
        let patch = json!({"spec": {
            "$setElementOrder/containers": [{"name": "b"}, {"name": "a"}],
            "containers": [
                {"name": "a", "image": "2", "env": [{"name": "X", "$patch": "delete"}]},
                {"name": "b", "image": null},
            ],
        }});
        assert_eq!(
            patched(POD, pod, patch),
            json!({"spec": {"containers": [
                {"name": "b"},
                {"name": "a", "image": "2", "env": [{"name": "Y", "value": "2"}]},
            ]}})
        );
    }

    #[test]
    fn a_patch_that_copies_what_it_has_copied_comes_to_an_end() {
        let double = vec![json!({"op": "copy", "from": "/a", "path": "/a/-"}); 40];
        let error = json_patch(&mut json!({"a": ["x"]}), double.into()).unwrap_err();
        assert_eq!(error.code, 413, "{error}");
        let operations = vec![json!({"op": "add", "path": "/a", "value": 1}); 10_001];
        assert_eq!(json_patch(&mut json!({}), operations.into()).unwrap_err().code, 413);
    }

    #[test]
    fn no_patch_nests_deeper_than_can_be_read_again() {
        let nested = |levels: usize| (0..levels).fold(json!(1), |inside, _| json!([inside]));
        let add = |path: &str, value: Value| json!({"op": "add", "path": path, "value": value});
        let mut document = json!({});
        json_patch(&mut document, json!([add("/a", nested(99))])).unwrap();
        assert_eq!(serde_json::from_str::<Value>(&document.to_string()).unwrap(), document);
        for patch in [
            json!([add("/a", nested(100))]),
            json!([add("/a", nested(99)), add(&format!("/a{}", "/0".repeat(99)), nested(2))]),
            json!([add("/a", nested(99)), add("/b", json!({})), {"op": "copy", "from": "/a", "path": "/b/c"}]),
            json!([add("/a", nested(99)), add("/b", json!({})), {"op": "move", "from": "/a", "path": "/b/c"}]),
        ] {
            assert_eq!(json_patch(&mut json!({}), patch.clone()).unwrap_err().code, 400, "{patch}");
        }
    }

    #[test]
    fn plain_lists_are_replaced_and_sets_are_joined() {
        let pod = json!({"metadata": {"finalizers": ["a", "b"]}, "spec": {"tolerations": [{"key": "x"}]}});
        let patch = json!({
            "metadata": {"finalizers": ["c"], "$deleteFromPrimitiveList/finalizers": ["a"]},
            "spec": {"tolerations": []},
        });
        let expected = json!({"metadata": {"finalizers": ["b", "c"]}, "spec": {"tolerations": []}});
        assert_eq!(patched(POD, pod, patch), expected);
    }

    #[test]
    fn retain_keys_drops_the_other_union_members() {
        let pod = json!({"spec": {"volumes": [{"name": "v", "emptyDir": {}}]}});
        let patch = json!({"spec": {"volumes": [
            {"name": "v", "configMap": {"name": "c"}, "$retainKeys": ["name", "configMap"]},
        ]}});
        assert_eq!(patched(POD, pod, patch)["spec"]["volumes"], json!([{"name": "v", "configMap": {"name": "c"}}]));
    }

    #[test]
    fn an_unknown_directive_is_refused() {
        let mut document = json!({});
        assert!(strategic(&mut document, &json!({"$patch": "explode"}), &schema::reference(POD)).is_err());
    }
}
