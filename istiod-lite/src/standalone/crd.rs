//! CustomResourceDefinitions: what makes one acceptable, and the status that says it is served.

use serde_json::{Value, json};

use super::cel::Rules;
use super::error::Cause;
use super::schema;

/// Who adds kinds to groups of the Kubernetes community says by whose leave.
const APPROVED: &str = "api-approved.kubernetes.io";

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
    approval(crd, &group, old, causes);
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
                Rules::compile(schema, &at, causes);
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

/// A protected group takes a kind with a URL of its approval, or with the word that it has none.
fn approval(crd: &Value, group: &str, old: Option<&Value>, causes: &mut Vec<Cause>) {
    let protected = ["k8s.io", "kubernetes.io"]
        .iter()
        .any(|community| group.strip_suffix(community).is_some_and(|rest| rest.is_empty() || rest.ends_with('.')));
    // What was let in without it stays changeable.
    if !protected || old.is_some_and(|old| old["metadata"]["annotations"][APPROVED].is_null()) {
        return;
    }
    let field = format!("metadata.annotations[{APPROVED}]");
    match crd["metadata"]["annotations"][APPROVED].as_str().filter(|said| !said.is_empty()) {
        None => causes.push(Cause::required(
            field,
            &format!(
                "protected groups must have approval annotation {APPROVED:?}, see \
                 https://github.com/kubernetes/enhancements/pull/1111"
            ),
        )),
        Some(said)
            if said.starts_with("unapproved") || said.parse::<http::Uri>().is_ok_and(|uri| uri.host().is_some()) => {}
        Some(said) => {
            let detail = "must be a URL of the approval, or begin with \"unapproved\"";
            causes.push(Cause::invalid(field, &said.into(), detail));
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

/// Which rules of the versions are not evaluated, of those the first; `None`: all are.
fn ignored_rules(versions: &[Value]) -> Option<String> {
    const NAMED: usize = 3;
    let mut ignored: Vec<String> = Vec::new();
    for version in versions {
        let rules = Rules::compile(&version["schema"]["openAPIV3Schema"], "", &mut Vec::new());
        for rule in rules.ignored() {
            if !ignored.contains(rule) {
                ignored.push(rule.clone());
            }
        }
    }
    let named = ignored.iter().take(NAMED).map(String::as_str).collect::<Vec<_>>().join("; ");
    let more = match ignored.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    (!ignored.is_empty()).then(|| format!("this API server does not evaluate {named}{more}"))
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
    if let Some(message) = ignored_rules(&versions) {
        conditions.push(condition("ValidationRulesIgnored", "True", "NotSupported", &message));
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
    fn a_kind_of_a_community_group_says_by_whose_leave() {
        let refused = |group: &str, said: Option<&str>, old: Option<&Value>| {
            let mut crd = crd(json!({"type": "object"}));
            crd["metadata"] = json!({"name": format!("things.{group}"), "annotations": {APPROVED: said}});
            crd["spec"]["group"] = group.into();
            let mut causes = Vec::new();
            validate(&crd, old, &mut causes);
            causes.into_iter().map(|cause| cause.reason).collect::<Vec<_>>()
        };
        for group in ["k8s.io", "gateway.networking.k8s.io", "a.kubernetes.io"] {
            assert_eq!(refused(group, None, None), ["FieldValueRequired"], "{group}");
            assert_eq!(refused(group, Some("so they said"), None), ["FieldValueInvalid"]);
            assert!(refused(group, Some("https://github.com/kubernetes-sigs/gateway-api/pull/1"), None).is_empty());
            assert!(refused(group, Some("unapproved, an experiment"), None).is_empty());
        }
        assert!(refused("notk8s.io", None, None).is_empty());
        let mut older = crd(json!({"type": "object"}));
        older["spec"]["group"] = "a.k8s.io".into();
        assert!(refused("a.k8s.io", None, Some(&older)).is_empty());
    }

    #[test]
    fn rules_that_are_not_evaluated_are_named() {
        let reported = |rules: &[&str]| {
            let rules: Vec<Value> = rules.iter().map(|rule| json!({"rule": rule})).collect();
            let mut with_rules = crd(json!({"type": "object", "x-kubernetes-validations": rules}));
            set_status(&mut with_rules, "2020-01-01T00:00:00Z");
            let conditions = with_rules["status"]["conditions"].as_array().unwrap();
            let condition = conditions.iter().find(|c| c["type"] == "ValidationRulesIgnored");
            condition.map(|c| c["message"].as_str().unwrap().to_owned())
        };
        assert_eq!(reported(&["has(self.kind)"]), None);
        assert_eq!(
            reported(&["self.kind == 'A'", "url(self.kind) == url('b')"]).unwrap(),
            "this API server does not evaluate <nil>: url(self.kind) == url('b') (the function url of 1 arguments)"
        );
        let more = reported(&["a(1)", "b(1)", "c(1)", "d(1)", "e(1)"]).unwrap();
        assert!(more.contains("c(1)") && !more.contains("d(1)") && more.ends_with("; and 2 more"), "{more}");
    }

    #[test]
    fn a_rule_that_cannot_be_read_refuses_its_definition() {
        let mut causes = Vec::new();
        let rules = json!([{"rule": "self.a =="}]);
        validate(&crd(json!({"type": "object", "x-kubernetes-validations": rules})), None, &mut causes);
        let fields: Vec<_> = causes.into_iter().map(|cause| cause.field).collect();
        assert_eq!(fields, ["spec.versions[0].schema.openAPIV3Schema.x-kubernetes-validations[0].rule"]);
    }
}
