//! The server-side tables that `kubectl get` prints.

use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::registry::{Kind, Source};

/// A column: name, type, priority (0 is always shown), and the cell of an object.
type Column = (&'static str, &'static str, u8, fn(&Value) -> Value);

fn name(object: &Value) -> Value {
    object["metadata"]["name"].clone()
}

fn age(object: &Value) -> Value {
    since(&object["metadata"]["creationTimestamp"]).into()
}

fn since(timestamp: &Value) -> String {
    let parsed = timestamp.as_str().and_then(|t| OffsetDateTime::parse(t, &Rfc3339).ok());
    parsed.map_or("<unknown>".into(), |t| human((OffsetDateTime::now_utc() - t).whole_seconds()))
}

/// A duration with the precision kubectl shows.
fn human(seconds: i64) -> String {
    let two = |large: i64, unit: &str, small: i64, small_unit: &str| match small {
        0 => format!("{large}{unit}"),
        _ => format!("{large}{unit}{small}{small_unit}"),
    };
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        ..0 => "0s".into(),
        0..120 => format!("{seconds}s"),
        120..600 => two(minutes, "m", seconds % 60, "s"),
        600..10_800 => format!("{minutes}m"),
        10_800..28_800 => two(hours, "h", minutes % 60, "m"),
        28_800..172_800 => format!("{hours}h"),
        172_800..691_200 => two(days, "d", hours % 24, "h"),
        691_200..63_072_000 => format!("{days}d"),
        63_072_000..252_288_000 => two(days / 365, "y", days % 365, "d"),
        _ => format!("{}y", days / 365),
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn text_or(value: &Value, otherwise: &str) -> Value {
    match value.as_str() {
        Some(text) if !text.is_empty() => text.into(),
        _ => otherwise.into(),
    }
}

fn number(value: &Value) -> i64 {
    value.as_i64().unwrap_or(0)
}

fn joined(items: impl Iterator<Item = String>) -> Value {
    let all: Vec<String> = items.collect();
    if all.is_empty() { "<none>".into() } else { all.join(",").into() }
}

fn pairs(map: &Value) -> Value {
    joined(map.as_object().into_iter().flatten().map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or_default())))
}

fn pod_status(pod: &Value) -> Value {
    let status = &pod["status"];
    let mut shown = status["reason"].as_str().or(status["phase"].as_str()).unwrap_or("Unknown").to_owned();
    for container in list(&status["containerStatuses"]) {
        let state = &container["state"];
        if let Some(reason) = state["waiting"]["reason"].as_str().or(state["terminated"]["reason"].as_str()) {
            shown = reason.to_owned();
        }
    }
    if pod["metadata"].get("deletionTimestamp").is_some() { "Terminating".into() } else { shown.into() }
}

fn condition<'a>(object: &'a Value, kind: &str) -> &'a Value {
    list(&object["status"]["conditions"]).iter().find(|c| c["type"] == kind).map_or(&Value::Null, |c| &c["status"])
}

fn containers(object: &Value, field: &str) -> Value {
    let spec = &object["spec"]["template"]["spec"];
    joined(list(&spec["containers"]).iter().map(|c| c[field].as_str().unwrap_or_default().to_owned()))
}

fn selector(object: &Value) -> Value {
    pairs(&object["spec"]["selector"]["matchLabels"])
}

const NAME: Column = ("Name", "string", 0, name);
const AGE: Column = ("Age", "string", 0, age);

const POD: &[Column] = &[
    NAME,
    ("Ready", "string", 0, |o| {
        let ready = list(&o["status"]["containerStatuses"]).iter().filter(|c| c["ready"] == true).count();
        format!("{ready}/{}", list(&o["spec"]["containers"]).len()).into()
    }),
    ("Status", "string", 0, pod_status),
    ("Restarts", "string", 0, |o| {
        let restarts: i64 = list(&o["status"]["containerStatuses"]).iter().map(|c| number(&c["restartCount"])).sum();
        restarts.to_string().into()
    }),
    AGE,
    ("IP", "string", 1, |o| text_or(&o["status"]["podIP"], "<none>")),
    ("Node", "string", 1, |o| text_or(&o["spec"]["nodeName"], "<none>")),
    ("Nominated Node", "string", 1, |o| text_or(&o["status"]["nominatedNodeName"], "<none>")),
    ("Readiness Gates", "string", 1, |o| match list(&o["spec"]["readinessGates"]) {
        [] => "<none>".into(),
        gates => {
            let met = gates.iter().filter(|g| condition(o, g["conditionType"].as_str().unwrap_or_default()) == "True");
            format!("{}/{}", met.count(), gates.len()).into()
        }
    }),
];

const DEPLOYMENT: &[Column] = &[
    NAME,
    ("Ready", "string", 0, |o| {
        format!("{}/{}", number(&o["status"]["readyReplicas"]), number(&o["spec"]["replicas"])).into()
    }),
    ("Up-to-date", "integer", 0, |o| number(&o["status"]["updatedReplicas"]).into()),
    ("Available", "integer", 0, |o| number(&o["status"]["availableReplicas"]).into()),
    AGE,
    ("Containers", "string", 1, |o| containers(o, "name")),
    ("Images", "string", 1, |o| containers(o, "image")),
    ("Selector", "string", 1, selector),
];

const REPLICA_SET: &[Column] = &[
    NAME,
    ("Desired", "integer", 0, |o| number(&o["spec"]["replicas"]).into()),
    ("Current", "integer", 0, |o| number(&o["status"]["replicas"]).into()),
    ("Ready", "integer", 0, |o| number(&o["status"]["readyReplicas"]).into()),
    AGE,
];

const STATEFUL_SET: &[Column] = &[
    NAME,
    ("Ready", "string", 0, |o| {
        format!("{}/{}", number(&o["status"]["readyReplicas"]), number(&o["spec"]["replicas"])).into()
    }),
    AGE,
];

const DAEMON_SET: &[Column] = &[
    NAME,
    ("Desired", "integer", 0, |o| number(&o["status"]["desiredNumberScheduled"]).into()),
    ("Current", "integer", 0, |o| number(&o["status"]["currentNumberScheduled"]).into()),
    ("Ready", "integer", 0, |o| number(&o["status"]["numberReady"]).into()),
    ("Up-to-date", "integer", 0, |o| number(&o["status"]["updatedNumberScheduled"]).into()),
    ("Available", "integer", 0, |o| number(&o["status"]["numberAvailable"]).into()),
    ("Node Selector", "string", 0, |o| pairs(&o["spec"]["template"]["spec"]["nodeSelector"])),
    AGE,
    ("Containers", "string", 1, |o| containers(o, "name")),
    ("Images", "string", 1, |o| containers(o, "image")),
    ("Selector", "string", 1, selector),
];

const SERVICE: &[Column] = &[
    NAME,
    ("Type", "string", 0, |o| o["spec"]["type"].clone()),
    ("Cluster-IP", "string", 0, |o| text_or(&o["spec"]["clusterIP"], "<none>")),
    ("External-IP", "string", 0, |o| {
        if let Some(name) = o["spec"]["externalName"].as_str() {
            return name.into();
        }
        let ingress = list(&o["status"]["loadBalancer"]["ingress"]).iter();
        let found: Vec<String> =
            ingress.filter_map(|i| i["ip"].as_str().or(i["hostname"].as_str()).map(str::to_owned)).collect();
        match (found.is_empty(), o["spec"]["type"] == "LoadBalancer") {
            (false, _) => found.join(",").into(),
            (true, true) => "<pending>".into(),
            (true, false) => "<none>".into(),
        }
    }),
    ("Port(s)", "string", 0, |o| {
        joined(list(&o["spec"]["ports"]).iter().map(|p| {
            let protocol = p["protocol"].as_str().unwrap_or("TCP");
            match p["nodePort"].as_u64() {
                Some(node) => format!("{}:{node}/{protocol}", p["port"]),
                None => format!("{}/{protocol}", p["port"]),
            }
        }))
    }),
    AGE,
    ("Selector", "string", 1, |o| pairs(&o["spec"]["selector"])),
];

const NODE: &[Column] = &[
    NAME,
    ("Status", "string", 0, |o| {
        let ready = match condition(o, "Ready").as_str() {
            Some("True") => "Ready",
            Some(_) => "NotReady",
            None => "Unknown",
        };
        let closed = o["spec"]["unschedulable"] == true;
        if closed { format!("{ready},SchedulingDisabled").into() } else { ready.into() }
    }),
    ("Roles", "string", 0, |o| {
        let labels = o["metadata"]["labels"].as_object();
        let roles = labels.into_iter().flatten().filter_map(|(k, _)| k.strip_prefix("node-role.kubernetes.io/"));
        joined(roles.map(str::to_owned))
    }),
    AGE,
    ("Version", "string", 0, |o| text_or(&o["status"]["nodeInfo"]["kubeletVersion"], "<unknown>")),
    ("Internal-IP", "string", 1, |o| {
        let address = list(&o["status"]["addresses"]).iter().find(|a| a["type"] == "InternalIP");
        address.map_or("<none>".into(), |a| a["address"].clone())
    }),
];

const NAMESPACE: &[Column] = &[NAME, ("Status", "string", 0, |o| text_or(&o["status"]["phase"], "Active")), AGE];

const CONFIG_MAP: &[Column] = &[
    NAME,
    ("Data", "integer", 0, |o| {
        let count = |field: &str| o[field].as_object().map_or(0, serde_json::Map::len);
        (count("data") + count("binaryData")).into()
    }),
    AGE,
];

const SECRET: &[Column] = &[
    NAME,
    ("Type", "string", 0, |o| text_or(&o["type"], "Opaque")),
    ("Data", "integer", 0, |o| o["data"].as_object().map_or(0, serde_json::Map::len).into()),
    AGE,
];

const SERVICE_ACCOUNT: &[Column] = &[NAME, ("Secrets", "integer", 0, |o| list(&o["secrets"]).len().into()), AGE];

const ENDPOINT_SLICE: &[Column] = &[
    NAME,
    ("AddressType", "string", 0, |o| o["addressType"].clone()),
    ("Ports", "string", 0, |o| joined(list(&o["ports"]).iter().map(|p| p["port"].to_string()))),
    ("Endpoints", "string", 0, |o| {
        let addresses = list(&o["endpoints"]).iter().flat_map(|e| list(&e["addresses"]));
        joined(addresses.map(|a| a.as_str().unwrap_or_default().to_owned()))
    }),
    AGE,
];

const EVENT: &[Column] = &[
    ("Last Seen", "string", 0, |o| {
        let seen = if o["lastTimestamp"].is_string() { &o["lastTimestamp"] } else { &o["eventTime"] };
        let seen = if seen.is_string() { seen } else { &o["metadata"]["creationTimestamp"] };
        since(seen).into()
    }),
    ("Type", "string", 0, |o| o["type"].clone()),
    ("Reason", "string", 0, |o| o["reason"].clone()),
    ("Object", "string", 0, |o| {
        let about = &o["involvedObject"];
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        format!("{}/{}", text(&about["kind"]).to_lowercase(), text(&about["name"])).into()
    }),
    ("Message", "string", 0, |o| o["message"].clone()),
    ("Name", "string", 1, name),
];

const ROLE_BINDING: &[Column] = &[
    NAME,
    ("Role", "string", 0, |o| {
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        format!("{}/{}", text(&o["roleRef"]["kind"]), text(&o["roleRef"]["name"])).into()
    }),
    AGE,
];

/// Roles and definitions show when they came, not how long ago.
const CREATED: &[Column] = &[NAME, ("Created At", "date", 0, |o| o["metadata"]["creationTimestamp"].clone())];

const LEASE: &[Column] = &[NAME, ("Holder", "string", 0, |o| text_or(&o["spec"]["holderIdentity"], "")), AGE];

const OTHER: &[Column] = &[NAME, AGE];

fn columns_of(storage: &str) -> &'static [Column] {
    match storage {
        "/pods" => POD,
        "/services" => SERVICE,
        "/nodes" => NODE,
        "/namespaces" => NAMESPACE,
        "/configmaps" => CONFIG_MAP,
        "/secrets" => SECRET,
        "/serviceaccounts" => SERVICE_ACCOUNT,
        "/events" => EVENT,
        "apps/deployments" => DEPLOYMENT,
        "apps/replicasets" => REPLICA_SET,
        "apps/statefulsets" => STATEFUL_SET,
        "apps/daemonsets" => DAEMON_SET,
        "coordination.k8s.io/leases" => LEASE,
        "discovery.k8s.io/endpointslices" => ENDPOINT_SLICE,
        "rbac.authorization.k8s.io/rolebindings" | "rbac.authorization.k8s.io/clusterrolebindings" => ROLE_BINDING,
        "rbac.authorization.k8s.io/roles"
        | "rbac.authorization.k8s.io/clusterroles"
        | "apiextensions.k8s.io/customresourcedefinitions" => CREATED,
        _ => OTHER,
    }
}

/// Which part of each object travels with its row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Include {
    Nothing,
    Metadata,
    Object,
}

/// What fills an object's row.
type Cells<'a> = Box<dyn Fn(&Value) -> Vec<Value> + 'a>;

/// A Table of `objects`, each with its `apiVersion` and `kind`.
pub fn table(kind: &Kind, objects: &[Value], metadata: Value, include: Include) -> Value {
    let definition = |name: &str, data: &str, format: &str, priority: u64, description: &str| {
        let format = if name == "Name" { "name" } else { format };
        json!({"name": name, "type": data, "format": format, "description": description, "priority": priority})
    };
    let (definitions, cells): (Vec<Value>, Cells<'_>) = match &kind.source {
        Source::Custom { columns } if !columns.is_empty() => {
            let mut definitions = vec![definition("Name", "string", "name", 0, "")];
            definitions.extend(columns.iter().map(|c| {
                let text = |field: &str| c[field].as_str().unwrap_or_default();
                let priority = c["priority"].as_u64().unwrap_or(0);
                definition(text("name"), text("type"), text("format"), priority, text("description"))
            }));
            let cells = move |object: &Value| {
                let mut row = vec![name(object)];
                row.extend(columns.iter().map(|column| custom_cell(object, column)));
                row
            };
            (definitions, Box::new(cells))
        }
        _ => {
            let columns = columns_of(&kind.storage);
            let definitions =
                columns.iter().map(|(name, data, priority, _)| definition(name, data, "", u64::from(*priority), ""));
            (definitions.collect(), Box::new(|object| columns.iter().map(|(.., cell)| cell(object)).collect()))
        }
    };
    let rows: Vec<Value> = objects
        .iter()
        .map(|object| {
            let mut row = json!({"cells": cells(object)});
            match include {
                Include::Nothing => {}
                Include::Metadata => row["object"] = partial(object),
                Include::Object => row["object"] = object.clone(),
            }
            row
        })
        .collect();
    json!({
        "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": metadata,
        "columnDefinitions": definitions, "rows": rows,
    })
}

/// An object reduced to its metadata.
pub fn partial(object: &Value) -> Value {
    json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": object["metadata"]})
}

fn custom_cell(object: &Value, column: &Value) -> Value {
    let found = at_path(object, column["jsonPath"].as_str().unwrap_or_default());
    match (column["type"].as_str(), found.as_slice()) {
        (_, []) => Value::Null,
        (Some("date"), [first, ..]) => since(first).into(),
        (Some("integer" | "number" | "boolean"), [first, ..]) => (*first).clone(),
        (_, all) => {
            let shown = |v: &&Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
            all.iter().map(shown).collect::<Vec<_>>().join(",").into()
        }
    }
}

/// The values a simple JSONPath selects: `.a.b`, `['a']`, `[0]`, `[*]`, `[?(@.type=="Ready")]`.
fn at_path<'a>(object: &'a Value, path: &str) -> Vec<&'a Value> {
    let mut found = vec![object];
    let mut rest = path.trim().trim_start_matches('{').trim_end_matches('}').trim_start_matches('$');
    while !rest.is_empty() {
        if let Some(tail) = rest.strip_prefix('.') {
            let end = field_end(tail);
            let field = tail[..end].replace("\\.", ".");
            if !field.is_empty() {
                found = found.into_iter().filter_map(|v| v.get(&field)).collect();
            }
            rest = &tail[end..];
        } else if let Some(tail) = rest.strip_prefix('[') {
            let Some(end) = tail.find(']') else { return Vec::new() };
            found = step(found, tail[..end].trim());
            rest = &tail[end + 1..];
        } else {
            return Vec::new();
        }
    }
    found
}

fn field_end(text: &str) -> usize {
    let bytes = text.as_bytes();
    let ends = |i: usize| matches!(bytes[i], b'.' | b'[') && (i == 0 || bytes[i - 1] != b'\\');
    (0..bytes.len()).find(|i| ends(*i)).unwrap_or(bytes.len())
}

fn step<'a>(found: Vec<&'a Value>, inside: &str) -> Vec<&'a Value> {
    let unquote = |s: &str| s.trim().trim_matches(|c| c == '\'' || c == '"').to_owned();
    if inside == "*" {
        return found.into_iter().flat_map(list).collect();
    }
    if let Ok(index) = inside.parse::<usize>() {
        return found.into_iter().filter_map(|v| v.get(index)).collect();
    }
    let filter = inside.strip_prefix("?(@.").and_then(|f| f.strip_suffix(')')).and_then(|f| f.split_once("=="));
    if let Some((field, wanted)) = filter {
        let (field, wanted) = (field.trim().to_owned(), unquote(wanted));
        return found.into_iter().flat_map(list).filter(|v| v[&field] == wanted.as_str()).collect();
    }
    let field = unquote(inside);
    found.into_iter().filter_map(|v| v.get(&field)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_read_as_in_kubectl() {
        for (seconds, shown) in [
            (5, "5s"),
            (119, "119s"),
            (130, "2m10s"),
            (3_600, "60m"),
            (11_000, "3h3m"),
            (90_000, "25h"),
            (700_000, "8d"),
        ] {
            assert_eq!(human(seconds), shown);
        }
    }

    #[test]
    fn printer_columns_follow_simple_paths() {
        let object = json!({"spec": {"hosts": ["a", "b"]}, "metadata": {"labels": {"x.y": "z"}}, "status": {"conditions": [
            {"type": "Ready", "status": "True"}, {"type": "Other", "status": "False"},
        ]}});
        for (path, shown) in [
            (".spec.hosts[*]", json!("a,b")),
            (".spec.hosts[0]", json!("a")),
            (".spec.hosts", json!(r#"["a","b"]"#)),
            (".status.conditions[?(@.type==\"Ready\")].status", json!("True")),
            (".status.conditions[?(@.type=='Nope')].status", Value::Null),
            (".metadata.labels['x\\.y']", Value::Null),
            (".metadata.labels.x\\.y", json!("z")),
        ] {
            assert_eq!(custom_cell(&object, &json!({"type": "string", "jsonPath": path})), shown, "{path}");
        }
    }
}
