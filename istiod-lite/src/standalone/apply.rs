//! Server-side apply and field ownership: which manager set which field, kept in `metadata.managedFields`.
//!
//! A [`Fields`] tree mirrors the FieldsV1 notation (`f:name`, `k:{…}`, `v:…`); trees made from an object also carry the
//! leaves' values, so that "changed" is a comparison of two trees.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::error::{ApiError, ApiResult};
use super::schema::{self, ListType};

/// A set of fields; of an object's fields with their values, or of owned fields without.
#[derive(Debug, Clone, Default, PartialEq)]
struct Fields {
    member: Option<Value>,
    children: BTreeMap<String, Fields>,
}

impl Fields {
    fn parse(value: &Value) -> Self {
        let mut fields = Self::default();
        for (name, child) in value.as_object().into_iter().flatten() {
            if name == "." {
                fields.member = Some(Value::Null);
            } else {
                let mut child = Self::parse(child);
                if child.children.is_empty() {
                    child.member = Some(Value::Null);
                }
                fields.children.insert(name.clone(), child);
            }
        }
        fields
    }

    fn encode(&self) -> Value {
        let mut map = Map::new();
        if self.member.is_some() && !self.children.is_empty() {
            map.insert(".".into(), json!({}));
        }
        for (name, child) in &self.children {
            map.insert(name.clone(), child.encode());
        }
        Value::Object(map)
    }

    fn is_empty(&self) -> bool {
        self.member.is_none() && self.children.is_empty()
    }

    fn of(value: &Value, node: &Value) -> Self {
        let leaf = || Self { member: Some(value.clone()), children: BTreeMap::new() };
        match value {
            Value::Object(fields) if !fields.is_empty() && !schema::is_atomic_map(node) => {
                let child = |(name, value): (&String, &Value)| {
                    let node = schema::child(node, name).unwrap_or(&Value::Null);
                    (format!("f:{name}"), Self::of(value, node))
                };
                Self { member: None, children: fields.iter().map(child).collect() }
            }
            Value::Array(elements) if !elements.is_empty() => match schema::list_type(node) {
                ListType::Atomic => leaf(),
                ListType::Set => {
                    let child = |v: &Value| (format!("v:{v}"), Self { member: Some(Value::Null), ..Self::default() });
                    Self { member: None, children: elements.iter().map(child).collect() }
                }
                ListType::Map(keys) => {
                    let child = |element: &Value| {
                        let mut fields = Self::of(element, schema::items(node));
                        fields.member = Some(Value::Null);
                        (element_key(element, &keys), fields)
                    };
                    Self { member: None, children: elements.iter().map(child).collect() }
                }
            },
            _ => leaf(),
        }
    }

    /// Members of `self` that `other` lacks or holds with another value.
    fn changed_from(&self, other: &Fields) -> Fields {
        let member = self.member.clone().filter(|v| other.member.as_ref() != Some(v));
        self.zip(other, member, Fields::changed_from)
    }

    fn without(&self, other: &Fields) -> Fields {
        let member = self.member.clone().filter(|_| other.member.is_none());
        self.zip(other, member, Fields::without)
    }

    fn intersection(&self, other: &Fields) -> Fields {
        let member = self.member.clone().filter(|_| other.member.is_some());
        self.zip(other, member, Fields::intersection)
    }

    fn zip(&self, other: &Fields, member: Option<Value>, combine: fn(&Fields, &Fields) -> Fields) -> Fields {
        let nothing = Fields::default();
        let children = self.children.iter().filter_map(|(name, child)| {
            let combined = combine(child, other.children.get(name).unwrap_or(&nothing));
            (!combined.is_empty()).then(|| (name.clone(), combined))
        });
        Fields { member, children: children.collect() }
    }

    fn union(&mut self, other: &Fields) {
        if other.member.is_some() {
            self.member = Some(Value::Null);
        }
        for (name, child) in &other.children {
            self.children.entry(name.clone()).or_default().union(child);
        }
    }

    /// Paths of all members as users read them: `.spec.template.spec.containers[name="a"].image`.
    fn paths(&self, prefix: &str, into: &mut Vec<String>) {
        if self.member.is_some() && self.children.is_empty() {
            into.push(prefix.to_owned());
        }
        for (name, child) in &self.children {
            let step = match name.split_once(':') {
                Some(("f", field)) => format!("{prefix}.{field}"),
                Some(("k", keys)) => {
                    let keys: Map<String, Value> = serde_json::from_str(keys).unwrap_or_default();
                    let list: Vec<String> = keys.iter().map(|(k, v)| format!("{k}={v}")).collect();
                    format!("{prefix}[{}]", list.join(","))
                }
                _ => format!("{prefix}[={}]", name.trim_start_matches("v:")),
            };
            child.paths(&step, into);
        }
    }
}

/// Value of a list-map key; the one key with a default in the built-in types is a port's protocol.
fn key_of(element: &Value, key: &str) -> Value {
    match element.get(key) {
        Some(value) => value.clone(),
        None if key == "protocol" => "TCP".into(),
        None => Value::Null,
    }
}

fn element_key(element: &Value, keys: &[String]) -> String {
    let mut sorted: Vec<&String> = keys.iter().collect();
    sorted.sort();
    let fields: Map<String, Value> = sorted.into_iter().map(|k| (k.clone(), key_of(element, k))).collect();
    format!("k:{}", Value::Object(fields))
}

/// Who writes, as far as field ownership is concerned.
#[derive(Debug, Clone, Copy)]
pub struct Manager<'a> {
    pub name: &'a str,
    pub api_version: &'a str,
    /// Empty for the main resource.
    pub subresource: &'a str,
    pub now: &'a str,
}

struct Entry {
    manager: String,
    operation: String,
    api_version: String,
    subresource: String,
    time: Value,
    fields: Fields,
}

impl Entry {
    fn is(&self, manager: &Manager<'_>, operation: &str) -> bool {
        self.manager == manager.name && self.operation == operation && self.subresource == manager.subresource
    }

    fn new(manager: &Manager<'_>, operation: &str, fields: Fields) -> Self {
        Self {
            manager: manager.name.into(),
            operation: operation.into(),
            api_version: manager.api_version.into(),
            subresource: manager.subresource.into(),
            time: manager.now.into(),
            fields,
        }
    }
}

fn entries(object: &Value) -> Vec<Entry> {
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let list = object["metadata"]["managedFields"].as_array();
    list.into_iter()
        .flatten()
        .filter(|e| e["fieldsV1"].is_object())
        .map(|e| Entry {
            manager: text(&e["manager"]),
            operation: text(&e["operation"]),
            api_version: text(&e["apiVersion"]),
            subresource: text(&e["subresource"]),
            time: e["time"].clone(),
            fields: Fields::parse(&e["fieldsV1"]),
        })
        .collect()
}

fn set_entries(object: &mut Value, entries: Vec<Entry>) {
    let list: Vec<Value> = entries
        .into_iter()
        .filter(|e| !e.fields.is_empty())
        .map(|e| {
            let mut entry = json!({
                "manager": e.manager, "operation": e.operation, "apiVersion": e.api_version, "time": e.time,
                "fieldsType": "FieldsV1", "fieldsV1": e.fields.encode(),
            });
            if !e.subresource.is_empty() {
                entry["subresource"] = e.subresource.into();
            }
            entry
        })
        .collect();
    if let Some(metadata) = object["metadata"].as_object_mut() {
        metadata.shift_remove("managedFields");
        if !list.is_empty() {
            metadata.insert("managedFields".into(), list.into());
        }
    }
}

/// The fields of an object somebody can own.
fn ownable(object: &Value, node: &Value) -> Fields {
    let mut fields = Fields::of(object, node);
    fields.children.remove("f:apiVersion");
    fields.children.remove("f:kind");
    if let Some(metadata) = fields.children.get_mut("f:metadata") {
        const SYSTEM: [&str; 11] = [
            "name",
            "namespace",
            "generateName",
            "uid",
            "resourceVersion",
            "generation",
            "creationTimestamp",
            "deletionTimestamp",
            "deletionGracePeriodSeconds",
            "selfLink",
            "managedFields",
        ];
        SYSTEM.iter().for_each(|name| {
            metadata.children.remove(&format!("f:{name}"));
        });
        if metadata.children.is_empty() {
            fields.children.remove("f:metadata");
        }
    }
    fields
}

/// Records an ordinary write: what differs between `old` and `new` now belongs to `manager`.
pub fn track_update(old: Option<&Value>, new: &mut Value, node: &Value, manager: &Manager<'_>) {
    // A client that sends an empty list or [{}] asks for a fresh start.
    let reset = new["metadata"]["managedFields"].as_array().is_some_and(|l| l.iter().all(|e| e == &json!({})));
    let rewritten = new["metadata"]["managedFields"].is_array();
    let mut entries = match old {
        _ if reset => Vec::new(),
        _ if rewritten => entries(new),
        Some(old) => entries(old),
        None => Vec::new(),
    };
    let before = old.map(|old| ownable(old, node)).unwrap_or_default();
    let after = ownable(new, node);
    let taken = after.changed_from(&before);
    for entry in &mut entries {
        entry.fields = entry.fields.intersection(&after);
        if !entry.is(manager, "Update") {
            entry.fields = entry.fields.without(&taken);
        }
    }
    if !taken.is_empty() {
        match entries.iter_mut().find(|e| e.is(manager, "Update")) {
            Some(entry) => {
                entry.fields.union(&taken);
                entry.time = manager.now.into();
                entry.api_version = manager.api_version.into();
            }
            None => entries.push(Entry::new(manager, "Update", taken)),
        }
    }
    set_entries(new, entries);
}

/// Merges an applied configuration into the live object (or makes a new one of it) and settles who owns what.
///
/// # Errors
/// 409 naming fields and managers when others own fields this would change and `force` is not set.
pub fn apply(
    live: Option<&Value>,
    config: &Value,
    node: &Value,
    manager: &Manager<'_>,
    force: bool,
) -> ApiResult<Value> {
    let applied = ownable(config, node);
    let Some(live) = live else {
        let mut created = config.clone();
        set_entries(&mut created, vec![Entry::new(manager, "Apply", applied)]);
        return Ok(created);
    };
    let taken = applied.changed_from(&ownable(live, node));
    let mut entries = entries(live);
    let mut conflicts = Vec::new();
    for entry in entries.iter_mut().filter(|e| !e.is(manager, "Apply")) {
        let contested = entry.fields.intersection(&taken);
        if contested.is_empty() {
            continue;
        }
        if force {
            entry.fields = entry.fields.without(&contested);
            continue;
        }
        let owner = match entry.operation.as_str() {
            "Update" => format!("{} with {:?} using {}", entry.manager, entry.operation, entry.api_version),
            _ => entry.manager.clone(),
        };
        let mut paths = Vec::new();
        contested.paths("", &mut paths);
        conflicts.extend(paths.into_iter().map(|path| (owner.clone(), path)));
    }
    if !conflicts.is_empty() {
        return Err(ApiError::apply_conflict(&conflicts));
    }
    let mut merged = live.clone();
    merge(&mut merged, config, node);

    let mut given_up = Fields::default();
    let mut others = Fields::default();
    for entry in &entries {
        if entry.is(manager, "Apply") { given_up.union(&entry.fields) } else { others.union(&entry.fields) }
    }
    let given_up = given_up.without(&applied).without(&others);
    remove(&mut merged, &given_up, &others, node);

    let kept = ownable(&merged, node);
    for entry in &mut entries {
        entry.fields = entry.fields.intersection(&kept);
    }
    let unowned_values = Fields::parse(&applied.encode());
    match entries.iter_mut().find(|e| e.is(manager, "Apply")) {
        Some(entry) if entry.fields == unowned_values && given_up.is_empty() && taken.is_empty() => {}
        Some(entry) => {
            *entry = Entry::new(manager, "Apply", applied);
        }
        None => entries.push(Entry::new(manager, "Apply", applied)),
    }
    set_entries(&mut merged, entries);
    Ok(merged)
}

fn merge(live: &mut Value, config: &Value, node: &Value) {
    match (live, config) {
        (Value::Object(live), Value::Object(config)) if !schema::is_atomic_map(node) => {
            for (name, value) in config {
                let node = schema::child(node, name).unwrap_or(&Value::Null);
                match live.get_mut(name) {
                    Some(current) => merge(current, value, node),
                    None => {
                        live.insert(name.clone(), value.clone());
                    }
                }
            }
        }
        (Value::Array(live), Value::Array(config)) => match schema::list_type(node) {
            ListType::Atomic => config.clone_into(live),
            ListType::Set => {
                for value in config {
                    if !live.contains(value) {
                        live.push(value.clone());
                    }
                }
            }
            ListType::Map(keys) => {
                for element in config {
                    let id = element_key(element, &keys);
                    match live.iter_mut().find(|l| element_key(l, &keys) == id) {
                        Some(current) => merge(current, element, schema::items(node)),
                        None => live.push(element.clone()),
                    }
                }
            }
        },
        (live, config) => *live = config.clone(),
    }
}

/// Takes out of `value` the fields in `gone`; list elements only where nobody in `others` owns a part of them.
fn remove(value: &mut Value, gone: &Fields, others: &Fields, node: &Value) {
    let nothing = Fields::default();
    match value {
        Value::Object(fields) => {
            for (step, child_gone) in &gone.children {
                let Some(name) = step.strip_prefix("f:") else { continue };
                if child_gone.member.is_some() {
                    fields.shift_remove(name);
                } else if let Some(child) = fields.get_mut(name) {
                    let child_node = schema::child(node, name).unwrap_or(&Value::Null);
                    remove(child, child_gone, others.children.get(step).unwrap_or(&nothing), child_node);
                    let emptied =
                        child.as_object().is_some_and(Map::is_empty) || child.as_array().is_some_and(Vec::is_empty);
                    if emptied {
                        fields.shift_remove(name);
                    }
                }
            }
        }
        Value::Array(elements) => {
            let keys = match schema::list_type(node) {
                ListType::Map(keys) => keys,
                ListType::Set => {
                    elements.retain(|v| !gone.children.contains_key(&format!("v:{v}")));
                    return;
                }
                ListType::Atomic => return,
            };
            elements.retain_mut(|element| {
                let id = element_key(element, &keys);
                let Some(child_gone) = gone.children.get(&id) else { return true };
                let child_others = others.children.get(&id).unwrap_or(&nothing);
                if child_gone.member.is_some() && child_others.is_empty() {
                    return false;
                }
                remove(element, child_gone, child_others, schema::items(node));
                true
            });
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node() -> Value {
        schema::reference("io.k8s.api.apps.v1.Deployment")
    }

    fn by(name: &str) -> Manager<'_> {
        Manager { name, api_version: "apps/v1", subresource: "", now: "2020-01-01T00:00:00Z" }
    }

    fn deployment(replicas: i32, images: &[(&str, &str)]) -> Value {
        let containers: Vec<Value> = images.iter().map(|(n, i)| json!({"name": n, "image": i})).collect();
        json!({"metadata": {"name": "d"}, "spec": {"replicas": replicas, "template": {"spec": {"containers": containers}}}})
    }

    #[test]
    fn a_second_manager_conflicts_until_forced() {
        let live = apply(None, &deployment(1, &[("a", "1")]), &node(), &by("one"), false).unwrap();
        let scale = json!({"metadata": {"name": "d"}, "spec": {"replicas": 3}});
        let error = apply(Some(&live), &scale, &node(), &by("two"), false).unwrap_err();
        assert_eq!(error.code, 409);
        assert!(error.message.contains(r#"conflict with "one": .spec.replicas"#), "{}", error.message);
        let forced = apply(Some(&live), &scale, &node(), &by("two"), true).unwrap();
        assert_eq!(forced["spec"]["replicas"], 3);
        // Now the first one is the intruder.
        assert!(apply(Some(&forced), &deployment(1, &[("a", "1")]), &node(), &by("one"), false).is_err());
    }

    #[test]
    fn equal_values_are_shared_and_left_behind_by_one_stay() {
        let live = apply(None, &deployment(1, &[("a", "1")]), &node(), &by("one"), false).unwrap();
        let both = apply(Some(&live), &deployment(1, &[("a", "1")]), &node(), &by("two"), false).unwrap();
        let without = json!({"metadata": {"name": "d"}, "spec": {"template": {"spec": {"containers": []}}}});
        let after = apply(Some(&both), &without, &node(), &by("one"), false).unwrap();
        assert_eq!(after["spec"]["replicas"], 1, "the other manager still wants it");
        assert_eq!(after["spec"]["template"]["spec"]["containers"][0]["image"], "1");
    }

    #[test]
    fn what_the_only_owner_no_longer_applies_goes() {
        let live = apply(None, &deployment(1, &[("a", "1"), ("b", "1")]), &node(), &by("one"), false).unwrap();
        let after = apply(Some(&live), &deployment(1, &[("a", "1")]), &node(), &by("one"), false).unwrap();
        assert_eq!(after["spec"]["template"]["spec"]["containers"], json!([{"name": "a", "image": "1"}]));
    }

    #[test]
    fn an_update_takes_what_it_changes() {
        let live = apply(None, &deployment(1, &[("a", "1")]), &node(), &by("one"), false).unwrap();
        let mut edited = live.clone();
        edited["spec"]["replicas"] = 5.into();
        edited["metadata"].as_object_mut().unwrap().remove("managedFields");
        track_update(Some(&live), &mut edited, &node(), &by("editor"));
        let error = apply(Some(&edited), &deployment(1, &[("a", "1")]), &node(), &by("one"), false).unwrap_err();
        assert!(error.message.contains("editor"), "{}", error.message);
        assert!(apply(Some(&edited), &deployment(5, &[("a", "2")]), &node(), &by("one"), false).is_ok());
    }

    #[test]
    fn field_sets_survive_their_encoding() {
        let set = ownable(&deployment(1, &[("a", "1")]), &node());
        assert_eq!(Fields::parse(&set.encode()), Fields::parse(&Fields::parse(&set.encode()).encode()));
    }
}
