//! Kubernetes' strategic merge patch with its directives, as a pure function of document, patch and schema.

use serde_json::{Map, Value};

use crate::schema;

/// What is wrong with a patch.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("invalid strategic merge patch: {0}")]
pub struct Bad(String);

/// Applies a strategic merge patch to a document of the given schema.
///
/// # Errors
/// A directive that is unknown or has the wrong shape. The document is of no use any more.
pub fn merge(document: &mut Value, patch: &Value, node: &Value) -> Result<(), Bad> {
    let Value::Object(changes) = patch else {
        return Err(Bad("it is not an object".into()));
    };
    if !document.is_object() {
        *document = Value::Object(Map::new());
    }
    let Value::Object(fields) = document else { return Ok(()) };
    merge_object(fields, changes, node)
}

fn bad_directive(what: &str) -> Bad {
    Bad(what.to_owned())
}

fn merge_object(fields: &mut Map<String, Value>, changes: &Map<String, Value>, node: &Value) -> Result<(), Bad> {
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

fn merge_list(list: &mut Vec<Value>, changes: &[Value], node: &Value) -> Result<(), Bad> {
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
        merge(&mut document, &patch, &schema::reference(kind)).unwrap();
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
        assert!(merge(&mut document, &json!({"$patch": "explode"}), &schema::reference(POD)).is_err());
    }
}
