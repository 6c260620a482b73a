//! Label and field selectors of list, watch and deletecollection.

use serde_json::Value;

use super::error::{ApiError, ApiResult};

#[derive(Debug, Clone, PartialEq, Eq)]
enum Requirement {
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    Missing(String),
}

/// A parsed pair of selectors; the default selects everything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selector {
    labels: Vec<Requirement>,
    fields: Vec<(String, bool, String)>,
}

/// Fields that can be selected on beside `metadata.name` and `metadata.namespace`, by store key of the resource.
fn selectable(storage: &str) -> &'static [&'static str] {
    match storage {
        "/pods" => &[
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "status.phase",
            "status.podIP",
        ],
        "/nodes" => &["spec.unschedulable"],
        "/namespaces" => &["status.phase"],
        "/secrets" => &["type"],
        "/services" => &["spec.clusterIP", "spec.type"],
        "/events" => &[
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "involvedObject.apiVersion",
            "involvedObject.resourceVersion",
            "involvedObject.fieldPath",
            "reason",
            "reportingComponent",
            "source",
            "type",
        ],
        "apps/replicasets" => &["status.replicas"],
        "batch/jobs" => &["status.successful"],
        _ => &[],
    }
}

impl Selector {
    /// # Errors
    /// 400 on a syntax error or a field this resource cannot be selected by.
    pub fn parse(storage: &str, labels: Option<&str>, fields: Option<&str>) -> ApiResult<Self> {
        let labels = parse_labels(labels.unwrap_or_default())
            .map_err(|e| ApiError::bad_request(format!("unable to parse requirement: {e}")))?;
        let mut parsed = Vec::new();
        for term in fields.unwrap_or_default().split(',').filter(|t| !t.trim().is_empty()) {
            let (path, equal, value) = if let Some((path, value)) = term.split_once("!=") {
                (path, false, value)
            } else if let Some((path, value)) = term.split_once("==").or_else(|| term.split_once('=')) {
                (path, true, value)
            } else {
                return Err(ApiError::bad_request(format!("invalid field selector: {term:?}")));
            };
            let path = path.trim();
            if !matches!(path, "metadata.name" | "metadata.namespace") && !selectable(storage).contains(&path) {
                return Err(ApiError::bad_request(format!("field label not supported: {path}")));
            }
            parsed.push((path.to_owned(), equal, value.trim().to_owned()));
        }
        Ok(Self { labels, fields: parsed })
    }

    pub fn matches(&self, object: &Value) -> bool {
        let labels = &object["metadata"]["labels"];
        let label = |key: &str| labels.get(key).and_then(Value::as_str);
        self.labels.iter().all(|requirement| match requirement {
            Requirement::In(key, values) => label(key).is_some_and(|v| values.iter().any(|w| w == v)),
            Requirement::NotIn(key, values) => label(key).is_none_or(|v| values.iter().all(|w| w != v)),
            Requirement::Exists(key) => label(key).is_some(),
            Requirement::Missing(key) => label(key).is_none(),
        }) && self.fields.iter().all(|(path, equal, value)| (text_at(object, path) == *value) == *equal)
    }

    /// The one name a field selector asks for, if it does: authorization may be by name.
    pub fn name(&self) -> Option<&str> {
        self.fields
            .iter()
            .find(|(path, equal, _)| *equal && path == "metadata.name")
            .map(|(_, _, value)| value.as_str())
    }
}

/// Value at a dotted path as a selector compares it; missing is empty.
fn text_at(object: &Value, path: &str) -> String {
    let found = path.split('.').fold(object, |value, step| &value[step]);
    match found {
        Value::String(text) => text.clone(),
        Value::Null if path == "spec.unschedulable" => "false".into(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

fn parse_labels(text: &str) -> Result<Vec<Requirement>, String> {
    let mut terms = Vec::new();
    // Commas separate terms, except inside parentheses.
    let (mut depth, mut start) = (0, 0);
    for (index, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => {
                terms.push(&text[start..index]);
                start = index + 1;
            }
            _ => {}
        }
    }
    terms.push(&text[start..]);
    terms.into_iter().map(str::trim).filter(|t| !t.is_empty()).map(parse_term).collect()
}

fn parse_term(term: &str) -> Result<Requirement, String> {
    let key = |k: &str| {
        let k = k.trim();
        let well_formed = !k.is_empty() && k.chars().all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c));
        if well_formed { Ok(k.to_owned()) } else { Err(format!("{k:?} is not a label key")) }
    };
    let set = |rest: &str| -> Result<Vec<String>, String> {
        let inner = rest.trim().strip_prefix('(').and_then(|r| r.strip_suffix(')'));
        let inner = inner.ok_or_else(|| format!("expected (values) in {term:?}"))?;
        Ok(inner.split(',').map(|v| v.trim().to_owned()).collect())
    };
    if let Some(missing) = term.strip_prefix('!').filter(|t| !t.starts_with('=')) {
        return Ok(Requirement::Missing(key(missing)?));
    }
    if let Some((k, v)) = term.split_once("!=") {
        return Ok(Requirement::NotIn(key(k)?, vec![v.trim().to_owned()]));
    }
    if let Some((k, v)) = term.split_once("==").or_else(|| term.split_once('=')) {
        return Ok(Requirement::In(key(k)?, vec![v.trim().to_owned()]));
    }
    if let Some((k, rest)) =
        term.split_once(" notin ").or_else(|| term.split_once(" notin(").map(|_| split_at_set(term)))
    {
        return Ok(Requirement::NotIn(key(k)?, set(rest)?));
    }
    if let Some((k, rest)) = term.split_once(" in ").or_else(|| term.split_once(" in(").map(|_| split_at_set(term))) {
        return Ok(Requirement::In(key(k)?, set(rest)?));
    }
    Ok(Requirement::Exists(key(term)?))
}

/// `key in(a,b)` without the blank before the parenthesis: the key and the rest from it.
fn split_at_set(term: &str) -> (&str, &str) {
    let paren = term.find('(').unwrap_or(term.len());
    let key = term[..paren].split_whitespace().next().unwrap_or_default();
    (key, &term[paren..])
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn label_selectors_follow_the_grammar() {
        let object = json!({"metadata": {"labels": {"app": "web", "tier": "a"}}});
        let selects = |s: &str| Selector::parse("/pods", Some(s), None).unwrap().matches(&object);
        for yes in
            ["", "app=web", "app==web,tier", "tier in (a,b)", "tier in(a)", "!x", "x!=1", "app notin (db)", "app,tier"]
        {
            assert!(selects(yes), "{yes}");
        }
        for no in ["app=db", "x", "!app", "tier notin (a, b)", "tier notin(a)", "app!=web"] {
            assert!(!selects(no), "{no}");
        }
        assert!(Selector::parse("/pods", Some("a b c"), None).is_err());
    }

    #[test]
    fn only_known_fields_can_be_selected() {
        let pod = json!({"metadata": {"name": "p"}, "spec": {"nodeName": "n"}, "status": {"phase": "Running"}});
        let parse = |f: &str| Selector::parse("/pods", None, Some(f));
        assert!(parse("spec.nodeName=n,status.phase!=Failed").unwrap().matches(&pod));
        assert!(!parse("metadata.name=other").unwrap().matches(&pod));
        assert_eq!(parse("spec.color=red").unwrap_err().message, "field label not supported: spec.color");
    }
}
