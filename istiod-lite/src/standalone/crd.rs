//! CustomResourceDefinitions: what makes one acceptable, and the status that says it is served.

use serde_json::{Value, json};

use super::error::Cause;
use super::schema;

/// Present while custom resources of a deleted definition remain.
pub const CLEANUP_FINALIZER: &str = "customresourcecleanup.apiextensions.k8s.io";

pub fn validate(crd: &Value, old: Option<&Value>, causes: &mut Vec<Cause>) {
    let spec = &crd["spec"];
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let (group, plural) = (text(&spec["group"]), text(&spec["names"]["plural"]));
    if group.is_empty() {
        causes.push(Cause::required("spec.group", ""));
    }
    for field in ["plural", "kind"] {
        if text(&spec["names"][field]).is_empty() {
            causes.push(Cause::required(format!("spec.names.{field}"), ""));
        }
    }
    if text(&crd["metadata"]["name"]) != format!("{plural}.{group}") {
        let name = &crd["metadata"]["name"];
        causes.push(Cause::invalid("metadata.name", name, "must be spec.names.plural+\".\"+spec.group"));
    }
    let scopes = ["Cluster".to_owned(), "Namespaced".to_owned()];
    if !scopes.iter().any(|s| spec["scope"] == s.as_str()) {
        causes.push(Cause::not_supported("spec.scope", &spec["scope"], &scopes));
    }
    if spec["conversion"]["strategy"].as_str().is_some_and(|s| s != "None") {
        let strategy = &spec["conversion"]["strategy"];
        causes.push(Cause::not_supported("spec.conversion.strategy", strategy, &["None".to_owned()]));
    }
    let versions = spec["versions"].as_array().map(Vec::as_slice).unwrap_or_default();
    if versions.iter().filter(|v| v["storage"] == true).count() != 1 {
        let detail = "must have exactly one version marked as storage version";
        causes.push(Cause::invalid("spec.versions", &json!(versions.len()), detail));
    }
    for (index, version) in versions.iter().enumerate() {
        let at = format!("spec.versions[{index}].schema.openAPIV3Schema");
        match version["schema"].get("openAPIV3Schema") {
            Some(schema) => {
                if schema["type"] != "object" {
                    causes.push(Cause::invalid(format!("{at}.type"), &schema["type"], "must be object at the root"));
                }
                structural(schema, &at, causes);
            }
            None => causes.push(Cause::required(at, "schemas are required")),
        }
        if versions[..index].iter().any(|earlier| earlier["name"] == version["name"]) {
            causes.push(Cause::duplicate(format!("spec.versions[{index}].name"), &version["name"]));
        }
    }
    if let Some(old) = old {
        for (field, new, old) in [
            ("spec.group", &spec["group"], &old["spec"]["group"]),
            ("spec.scope", &spec["scope"], &old["spec"]["scope"]),
            ("spec.names.kind", &spec["names"]["kind"], &old["spec"]["names"]["kind"]),
        ] {
            if new != old {
                causes.push(Cause::invalid(field, new, "field is immutable"));
            }
        }
    }
}

/// What a schema must be for pruning and defaults to work: every node typed, every pattern a regular expression.
fn structural(schema: &Value, at: &str, causes: &mut Vec<Cause>) {
    let untyped = schema["type"].as_str().is_none_or(str::is_empty)
        && schema["x-kubernetes-int-or-string"] != true
        && schema["x-kubernetes-preserve-unknown-fields"] != true;
    if untyped {
        causes.push(Cause::required(format!("{at}.type"), "must not be empty for specified object fields"));
    }
    if schema.get("$ref").is_some() {
        causes.push(Cause::forbidden(format!("{at}.$ref"), "$ref is not supported"));
    }
    if let Some(pattern) = schema["pattern"].as_str()
        && regex::Regex::new(pattern).is_err()
    {
        causes.push(Cause::invalid(format!("{at}.pattern"), &schema["pattern"], "must be a valid regular expression"));
    }
    for (name, child) in schema["properties"].as_object().into_iter().flatten() {
        if let Some(default) = child.get("default") {
            let mut found = Vec::new();
            schema::validate(default, child, name, &mut found);
            if !found.is_empty() {
                causes.push(Cause::invalid(format!("{at}.properties[{name}].default"), default, "must validate"));
            }
        }
        structural(child, &format!("{at}.properties[{name}]"), causes);
    }
    if schema["items"].is_object() {
        structural(&schema["items"], &format!("{at}.items"), causes);
    }
    if schema["additionalProperties"].is_object() {
        structural(&schema["additionalProperties"], &format!("{at}.additionalProperties"), causes);
    }
}

/// Writes the status of a valid definition: it is served from the same commit on.
pub fn set_status(crd: &mut Value, now: &str) {
    let names = crd["spec"]["names"].clone();
    let versions = crd["spec"]["versions"].as_array().cloned().unwrap_or_default();
    let mut stored = crd["status"]["storedVersions"].as_array().cloned().unwrap_or_default();
    for version in versions.iter().filter(|v| v["storage"] == true) {
        if !stored.contains(&version["name"]) {
            stored.push(version["name"].clone());
        }
    }
    let previous = crd["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let condition = |kind: &str, status: &str, reason: &str, message: &str| {
        let since = previous.iter().find(|c| c["type"] == kind && c["status"] == status);
        let since = since.map_or(now, |c| c["lastTransitionTime"].as_str().unwrap_or(now));
        json!({"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": since})
    };
    let mut conditions = vec![
        condition("NamesAccepted", "True", "NoConflicts", "no conflicts found"),
        condition("Established", "True", "InitialNamesAccepted", "the initial names have been accepted"),
    ];
    if versions.iter().any(|v| schema::has_cel_rules(&v["schema"]["openAPIV3Schema"])) {
        let message = "x-kubernetes-validations (CEL) rules are not evaluated by this API server";
        conditions.push(condition("ValidationRulesIgnored", "True", "NotSupported", message));
    }
    if crd["metadata"].get("deletionTimestamp").is_some() {
        conditions.push(condition(
            "Terminating",
            "True",
            "InstanceDeletionInProgress",
            "deleting the custom resources",
        ));
    }
    crd["status"] = json!({"conditions": conditions, "acceptedNames": names, "storedVersions": stored});
}

#[cfg(test)]
mod tests {
    use super::*;

    fn crd(schema: Value) -> Value {
        json!({"metadata": {"name": "things.example.org"}, "spec": {
            "group": "example.org", "scope": "Namespaced", "names": {"plural": "things", "kind": "Thing"},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": schema}}],
        }})
    }

    #[test]
    fn a_schema_must_be_structural() {
        let fields = |schema| {
            let mut causes = Vec::new();
            validate(&crd(schema), None, &mut causes);
            causes.into_iter().map(|c| c.field).collect::<Vec<_>>()
        };
        assert!(fields(json!({"type": "object"})).is_empty());
        let untyped = json!({"type": "object", "properties": {"spec": {"properties": {}}}});
        assert_eq!(fields(untyped), ["spec.versions[0].schema.openAPIV3Schema.properties[spec].type"]);
        let bad_default = json!({"type": "object", "properties": {"n": {"type": "integer", "default": "x"}}});
        assert_eq!(fields(bad_default), ["spec.versions[0].schema.openAPIV3Schema.properties[n].default"]);
    }

    #[test]
    fn unevaluated_rules_are_reported() {
        let mut with_rules = crd(json!({"type": "object", "x-kubernetes-validations": [{"rule": "true"}]}));
        set_status(&mut with_rules, "2020-01-01T00:00:00Z");
        let conditions = with_rules["status"]["conditions"].as_array().unwrap();
        assert!(conditions.iter().any(|c| c["type"] == "ValidationRulesIgnored"));
    }
}
