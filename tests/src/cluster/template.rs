//! From a container's spec to what it is started with: environment, arguments, rights. Pure apart from what is looked up for it.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1 as core;

use crate::container::{DEFAULT_CAPABILITIES, Security};

/// Replaces `$(NAME)` by variables known so far; `$$(NAME)` is the literal text and unknown names stay, as Kubernetes does it.
pub fn expand(text: &str, env: &BTreeMap<String, String>) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some(after) = rest.strip_prefix("$$") {
            out.push('$');
            rest = after;
            continue;
        }
        let name = rest.strip_prefix("$(").and_then(|after| after.split_once(')'));
        match name.and_then(|(name, after)| Some((env.get(name)?, after))) {
            Some((value, after)) => {
                out.push_str(value);
                rest = after;
            }
            None => {
                out.push('$');
                rest = &rest[1..];
            }
        }
    }
    out + rest
}

/// The downward API: the value of a field of the pod.
///
/// # Errors
/// For a path the lab does not know.
pub fn field(pod: &core::Pod, path: &str) -> Result<String, String> {
    let metadata = &pod.metadata;
    let spec = pod.spec.clone().unwrap_or_default();
    let status = pod.status.clone().unwrap_or_default();
    let keyed = |prefix: &str| path.strip_prefix(prefix)?.strip_suffix("']");
    let in_map = |map: &Option<BTreeMap<String, String>>, key: &str| {
        map.as_ref().and_then(|map| map.get(key)).cloned().unwrap_or_default()
    };
    if let Some(key) = keyed("metadata.labels['") {
        return Ok(in_map(&metadata.labels, key));
    }
    if let Some(key) = keyed("metadata.annotations['") {
        return Ok(in_map(&metadata.annotations, key));
    }
    let lines = |map: &Option<BTreeMap<String, String>>| {
        map.iter().flatten().map(|(k, v)| format!("{k}={v:?}\n")).collect::<String>()
    };
    let value = match path {
        "metadata.name" => metadata.name.clone(),
        "metadata.namespace" => metadata.namespace.clone(),
        "metadata.uid" => metadata.uid.clone(),
        "metadata.labels" => Some(lines(&metadata.labels)),
        "metadata.annotations" => Some(lines(&metadata.annotations)),
        "spec.nodeName" => spec.node_name,
        "spec.serviceAccountName" => spec.service_account_name,
        "status.podIP" => status.pod_ip,
        "status.hostIP" => status.host_ip,
        "status.podIPs" => status.pod_ips.map(|ips| ips.into_iter().map(|ip| ip.ip).collect::<Vec<_>>().join(",")),
        _ => return Err(format!("the downward API of the lab has no field {path}")),
    };
    Ok(value.unwrap_or_default())
}

/// User, group and capabilities: the container's settings over the pod's over a runtime's defaults.
pub fn security(pod: &core::PodSpec, container: &core::Container) -> Security {
    let of_pod = pod.security_context.clone().unwrap_or_default();
    let own = container.security_context.clone().unwrap_or_default();
    let id = |own: Option<i64>, of_pod: Option<i64>| u32::try_from(own.or(of_pod).unwrap_or(0)).unwrap_or(0);
    let capabilities = if own.privileged == Some(true) {
        None
    } else {
        let asked = own.capabilities.unwrap_or_default();
        let name = |name: &String| name.trim_start_matches("CAP_").to_lowercase();
        let dropped: Vec<String> = asked.drop.iter().flatten().map(name).collect();
        let mut kept: Vec<String> = DEFAULT_CAPABILITIES
            .iter()
            .filter(|name| !dropped.iter().any(|drop| drop == "all" || drop == *name))
            .map(|name| (*name).to_owned())
            .collect();
        kept.extend(asked.add.iter().flatten().map(name));
        kept.sort();
        kept.dedup();
        if kept.iter().any(|name| name == "all") { None } else { Some(kept) }
    };
    Security {
        uid: id(own.run_as_user, of_pod.run_as_user),
        gid: id(own.run_as_group, of_pod.run_as_group),
        capabilities,
        no_new_privileges: own.allow_privilege_escalation == Some(false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_expand_as_in_kubernetes() {
        let env = BTreeMap::from([("A".to_owned(), "1".to_owned())]);
        assert_eq!(expand("x$(A)y$$(A)$(B)$", &env), "x1y$(A)$(B)$");
    }

    #[test]
    fn dropping_all_leaves_what_was_added() {
        let container: core::Container = serde_json::from_value(serde_json::json!({
            "name": "c",
            "securityContext": {"runAsUser": 7, "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN", "BPF"]}}
        }))
        .expect("a container");
        let security = security(&core::PodSpec::default(), &container);
        assert_eq!(security.capabilities, Some(vec!["bpf".to_owned(), "net_admin".to_owned()]));
        assert_eq!(security.uid, 7);
    }
}
