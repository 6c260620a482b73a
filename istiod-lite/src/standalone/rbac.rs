//! Who may do what: Roles and ClusterRoles through their bindings, read from the store on each question.

use serde_json::{Value, json};

use super::builtin;
use super::store::{Key, Store};
use super::tokens::{AUTHENTICATED, MASTERS, UNAUTHENTICATED, User};

const ROLES: &str = "rbac.authorization.k8s.io/roles";
const CLUSTER_ROLES: &str = "rbac.authorization.k8s.io/clusterroles";
const ROLE_BINDINGS: &str = "rbac.authorization.k8s.io/rolebindings";
const CLUSTER_ROLE_BINDINGS: &str = "rbac.authorization.k8s.io/clusterrolebindings";

/// One question.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attributes {
    pub verb: String,
    /// Empty for a request that names no resource; then `path` counts.
    pub resource: String,
    pub subresource: String,
    pub group: String,
    pub namespace: String,
    pub name: String,
    pub path: String,
}

/// The rules a user has: cluster-wide ones and those of `namespace`.
pub fn rules_for(store: &Store, user: &User, namespace: &str) -> Vec<Value> {
    let mut rules = Vec::new();
    for binding in store.list(CLUSTER_ROLE_BINDINGS, "").1 {
        if binds(&binding.value, user, "") {
            rules.extend(role_rules(store, &binding.value["roleRef"], ""));
        }
    }
    if !namespace.is_empty() {
        for binding in store.list(ROLE_BINDINGS, namespace).1 {
            if binds(&binding.value, user, namespace) {
                rules.extend(role_rules(store, &binding.value["roleRef"], namespace));
            }
        }
    }
    rules
}

pub fn is_allowed(store: &Store, user: &User, asked: &Attributes) -> bool {
    user.groups.iter().any(|g| g == MASTERS)
        || rules_for(store, user, &asked.namespace).iter().any(|rule| permits(rule, asked))
}

fn binds(binding: &Value, user: &User, namespace: &str) -> bool {
    binding["subjects"].as_array().into_iter().flatten().any(|subject| {
        let name = subject["name"].as_str().unwrap_or_default();
        match subject["kind"].as_str() {
            Some("User") => user.name == name,
            Some("Group") => user.groups.iter().any(|g| g == name),
            Some("ServiceAccount") => {
                let namespace = subject["namespace"].as_str().filter(|n| !n.is_empty()).unwrap_or(namespace);
                user.name == format!("system:serviceaccount:{namespace}:{name}")
            }
            _ => false,
        }
    })
}

/// Rules of the role a binding refers to; none if it does not exist.
pub fn role_rules(store: &Store, reference: &Value, namespace: &str) -> Vec<Value> {
    let name = reference["name"].as_str().unwrap_or_default();
    let key = match reference["kind"].as_str() {
        Some("ClusterRole") => Key::new(CLUSTER_ROLES, "", name),
        Some("Role") => Key::new(ROLES, namespace, name),
        _ => return Vec::new(),
    };
    let Some(role) = store.get(&key) else { return Vec::new() };
    let mut rules = role.value["rules"].as_array().cloned().unwrap_or_default();
    for selector in role.value["aggregationRule"]["clusterRoleSelectors"].as_array().into_iter().flatten() {
        for other in store.list(CLUSTER_ROLES, "").1 {
            if builtin::selects(selector, &other.value["metadata"]["labels"]) {
                rules.extend(other.value["rules"].as_array().cloned().unwrap_or_default());
            }
        }
    }
    rules
}

fn lists(rule: &Value, field: &str, wanted: &str) -> bool {
    rule[field].as_array().into_iter().flatten().any(|v| v == "*" || v == wanted)
}

pub fn permits(rule: &Value, asked: &Attributes) -> bool {
    if !lists(rule, "verbs", &asked.verb) {
        return false;
    }
    if asked.resource.is_empty() {
        return rule["nonResourceURLs"].as_array().into_iter().flatten().filter_map(Value::as_str).any(|pattern| {
            pattern == asked.path || pattern.strip_suffix('*').is_some_and(|prefix| asked.path.starts_with(prefix))
        });
    }
    let resource = match asked.subresource.as_str() {
        "" => lists(rule, "resources", &asked.resource),
        sub => {
            lists(rule, "resources", &format!("{}/{sub}", asked.resource))
                || lists(rule, "resources", &format!("*/{sub}"))
        }
    };
    let names = rule["resourceNames"].as_array().map(Vec::as_slice).unwrap_or_default();
    let named = names.is_empty() || (!asked.name.is_empty() && names.iter().any(|n| *n == asked.name));
    resource && named && lists(rule, "apiGroups", &asked.group)
}

/// First of `wanted` that `held` does not cover; a role may not be granted by who has less.
pub fn uncovered<'a>(held: &[Value], wanted: &'a [Value]) -> Option<&'a Value> {
    wanted.iter().find(|rule| !questions(rule).iter().all(|asked| held.iter().any(|h| permits_all(h, asked))))
}

/// A rule as single (verb, group, resource, name) or (verb, URL) questions; `*` stays a value of its own.
fn questions(rule: &Value) -> Vec<Attributes> {
    let texts = |field: &str| -> Vec<String> {
        rule[field].as_array().into_iter().flatten().filter_map(|v| v.as_str().map(str::to_owned)).collect()
    };
    let mut asked = Vec::new();
    let names = match texts("resourceNames") {
        names if names.is_empty() => vec![String::new()],
        names => names,
    };
    for verb in texts("verbs") {
        for path in texts("nonResourceURLs") {
            asked.push(Attributes { verb: verb.clone(), path, ..Attributes::default() });
        }
        for group in texts("apiGroups") {
            for resource in texts("resources") {
                let (resource, subresource) = resource.split_once('/').unwrap_or((&resource, ""));
                for name in &names {
                    asked.push(Attributes {
                        verb: verb.clone(),
                        group: group.clone(),
                        resource: resource.into(),
                        subresource: subresource.into(),
                        name: name.clone(),
                        ..Attributes::default()
                    });
                }
            }
        }
    }
    asked
}

fn permits_all(held: &Value, asked: &Attributes) -> bool {
    // A held "*" covers every subresource too.
    let everything = held["resources"].as_array().is_some_and(|r| r.iter().any(|v| v == "*"));
    if everything && !asked.subresource.is_empty() {
        let whole = Attributes { subresource: String::new(), ..asked.clone() };
        return permits(held, &whole);
    }
    permits(held, asked)
}

/// The roles and bindings every cluster has.
pub fn bootstrap() -> Vec<(&'static str, Value)> {
    let all = ["*"];
    let write = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];
    let read = ["get", "list", "watch"];
    let workloads = json!([
        {"apiGroups": [""], "resources": ["configmaps", "endpoints", "events", "pods", "pods/log", "services", "serviceaccounts"]},
        {"apiGroups": ["apps"], "resources": ["daemonsets", "deployments", "deployments/scale", "replicasets", "statefulsets"]},
        {"apiGroups": ["batch"], "resources": ["jobs"]},
        {"apiGroups": ["autoscaling"], "resources": ["horizontalpodautoscalers"]},
        {"apiGroups": ["policy"], "resources": ["poddisruptionbudgets"]},
        {"apiGroups": ["networking.k8s.io"], "resources": ["networkpolicies"]},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"]},
    ]);
    let with = |verbs: &[&str]| -> Vec<Value> {
        let mut rules = workloads.as_array().cloned().unwrap_or_default();
        rules.iter_mut().for_each(|rule| rule["verbs"] = json!(verbs));
        rules
    };
    let extended = |mut rules: Vec<Value>, more: Value| {
        rules.extend(more.as_array().cloned().unwrap_or_default());
        json!(rules)
    };
    let namespaces = json!([{"apiGroups": [""], "resources": ["namespaces"], "verbs": read}]);
    let secrets = json!([
        {"apiGroups": [""], "resources": ["secrets"], "verbs": write},
        {"apiGroups": [""], "resources": ["namespaces"], "verbs": read},
    ]);
    let roles = json!([
        {"apiGroups": [""], "resources": ["secrets"], "verbs": write},
        {"apiGroups": [""], "resources": ["namespaces"], "verbs": read},
        {"apiGroups": ["rbac.authorization.k8s.io"], "resources": ["roles", "rolebindings"], "verbs": write},
        {"apiGroups": [""], "resources": ["serviceaccounts/token"], "verbs": ["create"]},
    ]);
    let discovery = json!([{"nonResourceURLs": ["/api", "/api/*", "/apis", "/apis/*", "/openapi", "/openapi/*", "/version", "/version/", "/healthz", "/livez", "/readyz"], "verbs": ["get"]}]);
    let public =
        json!([{"nonResourceURLs": ["/healthz", "/livez", "/readyz", "/version", "/version/"], "verbs": ["get"]}]);
    let reviews = json!([
        {"apiGroups": ["authorization.k8s.io"], "resources": ["selfsubjectaccessreviews", "selfsubjectrulesreviews"], "verbs": ["create"]},
        {"apiGroups": ["authentication.k8s.io"], "resources": ["selfsubjectreviews"], "verbs": ["create"]},
    ]);
    let delegator = json!([
        {"apiGroups": ["authentication.k8s.io"], "resources": ["tokenreviews"], "verbs": ["create"]},
        {"apiGroups": ["authorization.k8s.io"], "resources": ["subjectaccessreviews"], "verbs": ["create"]},
    ]);
    let issuer =
        json!([{"nonResourceURLs": ["/.well-known/openid-configuration", "/openid/v1/jwks"], "verbs": ["get"]}]);
    let admin = json!([
        {"apiGroups": all, "resources": all, "verbs": all},
        {"nonResourceURLs": all, "verbs": all},
    ]);
    let labels = json!({"kubernetes.io/bootstrapping": "rbac-defaults"});
    let role = |name: &str, rules: Value| {
        (CLUSTER_ROLES, json!({"metadata": {"name": name, "labels": labels}, "rules": rules}))
    };
    let binding = |name: &str, groups: &[&str]| {
        let subject = |g: &&str| json!({"kind": "Group", "name": g, "apiGroup": "rbac.authorization.k8s.io"});
        let subjects: Vec<Value> = groups.iter().map(subject).collect();
        let role_ref = json!({"kind": "ClusterRole", "name": name, "apiGroup": "rbac.authorization.k8s.io"});
        let metadata = json!({"name": name, "labels": labels});
        (CLUSTER_ROLE_BINDINGS, json!({"metadata": metadata, "subjects": subjects, "roleRef": role_ref}))
    };
    vec![
        role("cluster-admin", admin),
        role("admin", extended(with(&write), roles)),
        role("edit", extended(with(&write), secrets)),
        role("view", extended(with(&read), namespaces)),
        role("system:discovery", discovery),
        role("system:public-info-viewer", public),
        role("system:basic-user", reviews),
        role("system:auth-delegator", delegator),
        role("system:service-account-issuer-discovery", issuer),
        binding("cluster-admin", &[MASTERS]),
        binding("system:discovery", &[AUTHENTICATED]),
        binding("system:basic-user", &[AUTHENTICATED]),
        binding("system:public-info-viewer", &[AUTHENTICATED, UNAUTHENTICATED]),
        binding("system:service-account-issuer-discovery", &["system:serviceaccounts"]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(verb: &str, group: &str, resource: &str, name: &str) -> Attributes {
        let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
        Attributes {
            verb: verb.into(),
            group: group.into(),
            resource: resource.into(),
            subresource: subresource.into(),
            name: name.into(),
            ..Attributes::default()
        }
    }

    #[test]
    fn a_rule_permits_no_more_than_it_says() {
        let rule =
            json!({"apiGroups": [""], "resources": ["pods", "*/status"], "resourceNames": ["a"], "verbs": ["get"]});
        assert!(permits(&rule, &asked("get", "", "pods", "a")));
        assert!(permits(&rule, &asked("get", "", "services/status", "a")));
        for no in [
            asked("get", "", "pods", "b"),
            asked("get", "", "pods", ""),
            asked("list", "", "pods", "a"),
            asked("get", "apps", "pods", "a"),
            asked("get", "", "pods/log", "a"),
        ] {
            assert!(!permits(&rule, &no), "{no:?}");
        }
        let urls = json!({"nonResourceURLs": ["/api/*"], "verbs": ["get"]});
        let path = |p: &str| Attributes { verb: "get".into(), path: p.into(), ..Attributes::default() };
        assert!(permits(&urls, &path("/api/v1")) && !permits(&urls, &path("/metrics")));
    }

    #[test]
    fn nobody_grants_more_than_they_have() {
        let held = [json!({"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list"]})];
        let less = [json!({"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]})];
        let more = [json!({"apiGroups": [""], "resources": ["pods", "secrets"], "verbs": ["get"]})];
        let any = [json!({"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]})];
        assert!(uncovered(&held, &less).is_none());
        assert!(uncovered(&held, &more).is_some());
        assert!(uncovered(&held, &any).is_some());
        assert!(uncovered(&any, &more).is_none());
    }
}
