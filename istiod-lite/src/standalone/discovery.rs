//! Tells clients what is served: `/api`, `/apis`, their lists per group and version, and the aggregated form.

use serde_json::{Value, json};

use super::registry::{Kind, Registry};

/// Media type of aggregated discovery.
pub const AGGREGATED: &str = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";

/// Whether an Accept header asks for aggregated discovery before the plain lists.
pub fn wants_aggregated(accept: &str) -> bool {
    let offer = accept.split(',').find(|offer| offer.trim_start().starts_with("application/json"));
    offer.is_some_and(|o| {
        let has = |wanted: &str| o.split(';').any(|p| p.trim() == wanted);
        has("g=apidiscovery.k8s.io") && has("v=v2") && has("as=APIGroupDiscoveryList")
    })
}

pub fn core_versions() -> Value {
    json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []})
}

fn group_entry(group: &str, versions: &[String]) -> Value {
    let entry = |v: &String| json!({"groupVersion": format!("{group}/{v}"), "version": v});
    let all: Vec<Value> = versions.iter().map(entry).collect();
    json!({"name": group, "versions": all, "preferredVersion": all[0]})
}

pub fn groups(registry: &Registry) -> Value {
    let named = registry.groups().iter().filter(|(g, _)| !g.is_empty());
    let groups: Vec<Value> = named.map(|(g, versions)| group_entry(g, versions)).collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

pub fn group(registry: &Registry, group: &str) -> Option<Value> {
    let (group, versions) = registry.groups().iter().find(|(g, _)| !g.is_empty() && g == group)?;
    let mut entry = group_entry(group, versions);
    entry["kind"] = "APIGroup".into();
    entry["apiVersion"] = "v1".into();
    Some(entry)
}

/// A subresource: name, response group, version and kind, verbs.
type Subresource<'a> = (&'static str, &'a str, &'a str, &'a str, &'static [&'static str]);

fn subresources(kind: &Kind) -> Vec<Subresource<'_>> {
    const EDIT: &[&str] = &["get", "patch", "update"];
    let mut found: Vec<Subresource<'_>> = Vec::new();
    if kind.has_status {
        found.push(("status", &kind.group, &kind.version, &kind.kind, EDIT));
    }
    if kind.scale.is_some() {
        found.push(("scale", "autoscaling", "v1", "Scale", EDIT));
    }
    match &*kind.storage {
        "/serviceaccounts" => found.push(("token", "authentication.k8s.io", "v1", "TokenRequest", &["create"])),
        "/namespaces" => found.push(("finalize", "", "v1", "Namespace", &["update"])),
        "/pods" => found.push(("binding", "", "v1", "Binding", &["create"])),
        _ => {}
    }
    found
}

/// The resources of one version; `None` when it is not served.
pub fn resources(registry: &Registry, group: &str, version: &str) -> Option<Value> {
    let mut list = Vec::new();
    for kind in registry.of_version(group, version) {
        let mut entry = json!({
            "name": kind.plural, "singularName": kind.singular, "namespaced": kind.namespaced, "kind": kind.kind,
            "verbs": kind.verbs(),
        });
        if !kind.short_names.is_empty() {
            entry["shortNames"] = json!(kind.short_names);
        }
        if !kind.categories.is_empty() {
            entry["categories"] = json!(kind.categories);
        }
        list.push(entry);
        for (name, group, version, response, verbs) in subresources(kind) {
            let mut entry = json!({
                "name": format!("{}/{name}", kind.plural), "singularName": "", "namespaced": kind.namespaced,
                "kind": response, "verbs": verbs,
            });
            if (group, version) != (&kind.group, &kind.version) {
                entry["group"] = group.into();
                entry["version"] = version.into();
            }
            list.push(entry);
        }
    }
    let group_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    (!list.is_empty()).then(
        || json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": list}),
    )
}

/// Aggregated discovery of the core group or of all others.
pub fn aggregated(registry: &Registry, core: bool) -> Value {
    let groups = registry.groups().iter().filter(|(g, _)| g.is_empty() == core);
    let items: Vec<Value> = groups
        .map(|(group, versions)| {
            let versions: Vec<Value> = versions
                .iter()
                .map(|version| {
                    let resources: Vec<Value> =
                        registry.of_version(group, version).map(|k| aggregated_kind(k)).collect();
                    json!({"version": version, "freshness": "Current", "resources": resources})
                })
                .collect();
            json!({"metadata": {"name": group}, "versions": versions})
        })
        .collect();
    json!({"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": items})
}

fn aggregated_kind(kind: &Kind) -> Value {
    let response = |group: &str, version: &str, kind: &str| json!({"group": group, "version": version, "kind": kind});
    let subresources: Vec<Value> = subresources(kind)
        .into_iter()
        .map(|(name, group, version, result, verbs)| {
            json!({"subresource": name, "responseKind": response(group, version, result), "verbs": verbs})
        })
        .collect();
    let mut entry = json!({
        "resource": kind.plural, "responseKind": response(&kind.group, &kind.version, &kind.kind),
        "scope": if kind.namespaced { "Namespaced" } else { "Cluster" }, "singularResource": kind.singular,
        "verbs": kind.verbs(),
    });
    for (field, list) in [("shortNames", json!(kind.short_names)), ("categories", json!(kind.categories))] {
        if list != json!([]) {
            entry[field] = list;
        }
    }
    if !subresources.is_empty() {
        entry["subresources"] = subresources.into();
    }
    entry
}

/// What `/version` answers. The minor version is that of the built-in types.
pub fn version() -> Value {
    json!({
        "major": "1", "minor": "32", "gitVersion": concat!("v1.32.0+istiod-lite.", env!("CARGO_PKG_VERSION")),
        "gitCommit": "", "gitTreeState": "", "buildDate": "1970-01-01T00:00:00Z", "goVersion": "",
        "compiler": "rustc", "platform": format!("{}/{}", std::env::consts::OS, std::env::consts::ARCH),
    })
}
