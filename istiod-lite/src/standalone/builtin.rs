//! What Kubernetes fills in for and demands of the built-in kinds, as far as users see it.

use std::net::IpAddr;
use std::sync::LazyLock;

use regex::Regex;
use serde_json::{Map, Value, json};

use super::error::Cause;
use super::registry::Kind;

static DNS_LABEL: LazyLock<Regex> = LazyLock::new(|| pattern(r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"));
static DNS_SUBDOMAIN: LazyLock<Regex> =
    LazyLock::new(|| pattern(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"));
static LABEL_VALUE: LazyLock<Regex> = LazyLock::new(|| pattern(r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$"));
static LABEL_KEY: LazyLock<Regex> = LazyLock::new(|| {
    pattern(
        r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$",
    )
});

fn pattern(text: &str) -> Regex {
    Regex::new(text).expect("a constant pattern that the tests exercise")
}

const LABEL_RULE: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
const SUBDOMAIN_RULE: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";

pub fn is_dns_label(name: &str) -> bool {
    DNS_LABEL.is_match(name)
}

fn is_subdomain(name: &str) -> bool {
    name.len() <= 253 && DNS_SUBDOMAIN.is_match(name)
}

/// Sets a field of an object unless it is there.
fn default(object: &mut Value, field: &str, value: impl Into<Value>) {
    if let Some(fields) = object.as_object_mut()
        && fields.get(field).is_none_or(Value::is_null)
    {
        fields.insert(field.to_owned(), value.into());
    }
}

fn each<'a>(object: &'a mut Value, field: &str) -> impl Iterator<Item = &'a mut Value> {
    object.get_mut(field).and_then(Value::as_array_mut).into_iter().flatten()
}

/// Fills in the defaults of a built-in kind. ClusterIPs and status are not defaults: the verbs see to them.
pub fn apply_defaults(kind: &Kind, object: &mut Value) {
    match &*kind.storage {
        "/pods" => pod_spec(&mut object["spec"], "Always"),
        "/services" => service(&mut object["spec"]),
        "/secrets" => {
            default(object, "type", "Opaque");
            merge_string_data(object);
        }
        "apps/deployments" => deployment(&mut object["spec"]),
        "apps/daemonsets" => daemon_set(&mut object["spec"]),
        "apps/replicasets" => {
            default(&mut object["spec"], "replicas", 1);
            template(&mut object["spec"], "Always");
        }
        "apps/statefulsets" => stateful_set(&mut object["spec"]),
        "batch/jobs" => {
            let spec = &mut object["spec"];
            default(spec, "backoffLimit", 6);
            default(spec, "completions", 1);
            default(spec, "parallelism", 1);
            default(spec, "completionMode", "NonIndexed");
            default(spec, "suspend", false);
            template(spec, "Never");
        }
        "rbac.authorization.k8s.io/rolebindings" | "rbac.authorization.k8s.io/clusterrolebindings" => {
            default(&mut object["roleRef"], "apiGroup", "rbac.authorization.k8s.io");
            for subject in each(object, "subjects") {
                if subject["kind"] != "ServiceAccount" {
                    default(subject, "apiGroup", "rbac.authorization.k8s.io");
                }
            }
        }
        "discovery.k8s.io/endpointslices" => {
            each(object, "ports").for_each(|port| {
                default(port, "name", "");
                default(port, "protocol", "TCP");
            });
        }
        "autoscaling/horizontalpodautoscalers" => default(&mut object["spec"], "minReplicas", 1),
        "networking.k8s.io/networkpolicies" => {
            let spec = &mut object["spec"];
            let types = if spec.get("egress").is_some() { json!(["Ingress", "Egress"]) } else { json!(["Ingress"]) };
            default(spec, "policyTypes", types);
        }
        "admissionregistration.k8s.io/validatingwebhookconfigurations"
        | "admissionregistration.k8s.io/mutatingwebhookconfigurations" => {
            for webhook in each(object, "webhooks") {
                default(webhook, "failurePolicy", "Fail");
                default(webhook, "matchPolicy", "Equivalent");
                default(webhook, "timeoutSeconds", 10);
                default(webhook, "namespaceSelector", json!({}));
                default(webhook, "objectSelector", json!({}));
            }
        }
        "apiextensions.k8s.io/customresourcedefinitions" => crd_names(&mut object["spec"]),
        _ => {}
    }
}

fn merge_string_data(secret: &mut Value) {
    use base64::Engine as _;
    let Some(plain) = secret.as_object_mut().and_then(|s| s.shift_remove("stringData")) else { return };
    for (key, value) in plain.as_object().into_iter().flatten() {
        let encoded = base64::engine::general_purpose::STANDARD.encode(value.as_str().unwrap_or_default());
        secret["data"][key] = encoded.into();
    }
}

fn crd_names(spec: &mut Value) {
    let kind = spec["names"]["kind"].as_str().unwrap_or_default().to_owned();
    if spec["names"].is_object() {
        default(&mut spec["names"], "singular", kind.to_lowercase());
        default(&mut spec["names"], "listKind", format!("{kind}List"));
    }
    default(spec, "conversion", json!({"strategy": "None"}));
}

fn template(spec: &mut Value, restart_policy: &str) {
    if spec["template"]["spec"].is_object() {
        pod_spec(&mut spec["template"]["spec"], restart_policy);
    }
}

fn deployment(spec: &mut Value) {
    default(spec, "replicas", 1);
    default(spec, "revisionHistoryLimit", 10);
    default(spec, "progressDeadlineSeconds", 600);
    default(spec, "strategy", json!({}));
    default(&mut spec["strategy"], "type", "RollingUpdate");
    if spec["strategy"]["type"] == "RollingUpdate" {
        default(&mut spec["strategy"], "rollingUpdate", json!({}));
        default(&mut spec["strategy"]["rollingUpdate"], "maxUnavailable", "25%");
        default(&mut spec["strategy"]["rollingUpdate"], "maxSurge", "25%");
    }
    template(spec, "Always");
}

fn daemon_set(spec: &mut Value) {
    default(spec, "revisionHistoryLimit", 10);
    default(spec, "updateStrategy", json!({}));
    default(&mut spec["updateStrategy"], "type", "RollingUpdate");
    if spec["updateStrategy"]["type"] == "RollingUpdate" {
        default(&mut spec["updateStrategy"], "rollingUpdate", json!({}));
        default(&mut spec["updateStrategy"]["rollingUpdate"], "maxUnavailable", 1);
        default(&mut spec["updateStrategy"]["rollingUpdate"], "maxSurge", 0);
    }
    template(spec, "Always");
}

fn stateful_set(spec: &mut Value) {
    default(spec, "replicas", 1);
    default(spec, "revisionHistoryLimit", 10);
    default(spec, "podManagementPolicy", "OrderedReady");
    default(spec, "updateStrategy", json!({"type": "RollingUpdate", "rollingUpdate": {"partition": 0}}));
    template(spec, "Always");
}

fn pod_spec(spec: &mut Value, restart_policy: &str) {
    default(spec, "restartPolicy", restart_policy);
    default(spec, "dnsPolicy", "ClusterFirst");
    default(spec, "terminationGracePeriodSeconds", 30);
    default(spec, "schedulerName", "default-scheduler");
    default(spec, "securityContext", json!({}));
    if let Some(name) = spec.get("serviceAccountName").cloned() {
        default(spec, "serviceAccount", name);
    }
    for volume in each(spec, "volumes") {
        for (source, field, mode) in [
            ("secret", "defaultMode", 420),
            ("configMap", "defaultMode", 420),
            ("projected", "defaultMode", 420),
            ("downwardAPI", "defaultMode", 420),
        ] {
            if volume[source].is_object() {
                default(&mut volume[source], field, mode);
            }
        }
        if volume["hostPath"].is_object() {
            default(&mut volume["hostPath"], "type", "");
        }
        if let Some(sources) = volume["projected"].get_mut("sources").and_then(Value::as_array_mut) {
            for source in sources.iter_mut().filter(|s| s["serviceAccountToken"].is_object()) {
                default(&mut source["serviceAccountToken"], "expirationSeconds", 3600);
            }
        }
    }
    for list in ["containers", "initContainers"] {
        each(spec, list).for_each(container);
    }
}

fn container(container: &mut Value) {
    let image = container["image"].as_str().unwrap_or_default();
    let tag = image.rsplit('/').next().unwrap_or_default();
    let floating = !tag.contains('@') && (!tag.contains(':') || tag.ends_with(":latest"));
    default(container, "imagePullPolicy", if floating { "Always" } else { "IfNotPresent" });
    default(container, "terminationMessagePath", "/dev/termination-log");
    default(container, "terminationMessagePolicy", "File");
    default(container, "resources", json!({}));
    each(container, "ports").for_each(|port| default(port, "protocol", "TCP"));
    for env in each(container, "env") {
        if env["valueFrom"]["fieldRef"].is_object() {
            default(&mut env["valueFrom"]["fieldRef"], "apiVersion", "v1");
        }
    }
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if container[probe].is_object() {
            let probe = &mut container[probe];
            default(probe, "timeoutSeconds", 1);
            default(probe, "periodSeconds", 10);
            default(probe, "successThreshold", 1);
            default(probe, "failureThreshold", 3);
            if probe["httpGet"].is_object() {
                default(&mut probe["httpGet"], "path", "/");
                default(&mut probe["httpGet"], "scheme", "HTTP");
            }
        }
    }
}

fn service(spec: &mut Value) {
    default(spec, "type", "ClusterIP");
    default(spec, "sessionAffinity", "None");
    let kind = spec["type"].as_str().unwrap_or_default().to_owned();
    if spec["sessionAffinity"] == "ClientIP" {
        default(spec, "sessionAffinityConfig", json!({"clientIP": {"timeoutSeconds": 10800}}));
    }
    if kind != "ExternalName" {
        default(spec, "internalTrafficPolicy", "Cluster");
    }
    if matches!(kind.as_str(), "NodePort" | "LoadBalancer") {
        default(spec, "externalTrafficPolicy", "Cluster");
    }
    if kind == "LoadBalancer" {
        default(spec, "allocateLoadBalancerNodePorts", true);
    }
    for port in each(spec, "ports") {
        default(port, "protocol", "TCP");
        let number = port["port"].clone();
        if port["targetPort"] == "" || port["targetPort"] == 0 {
            port["targetPort"] = Value::Null;
        }
        default(port, "targetPort", number);
    }
}

/// Rules every object's metadata obeys.
pub fn validate_metadata(kind: &Kind, object: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let metadata = &object["metadata"];
    let name = &metadata["name"];
    let text = name.as_str().unwrap_or_default();
    if text.is_empty() {
        causes.push(Cause::required("metadata.name", "name or generateName is required"));
    } else if let Some(rule) = name_rule(kind, text) {
        causes.push(Cause::invalid("metadata.name", name, rule));
    }
    let empty = Map::new();
    for (key, value) in metadata["labels"].as_object().unwrap_or(&empty) {
        if !LABEL_KEY.is_match(key) || key.rsplit('/').next().is_some_and(|k| k.len() > 63) {
            causes.push(Cause::invalid("metadata.labels", &key.as_str().into(), "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character"));
        }
        let valid = value.as_str().is_some_and(|v| v.len() <= 63 && LABEL_VALUE.is_match(v));
        if !valid {
            causes.push(Cause::invalid("metadata.labels", value, "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character"));
        }
    }
    let mut size = 0;
    for (key, value) in metadata["annotations"].as_object().unwrap_or(&empty) {
        size += key.len() + value.as_str().map_or(0, str::len);
        if !LABEL_KEY.is_match(&key.to_lowercase()) {
            causes.push(Cause::invalid("metadata.annotations", &key.as_str().into(), "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character"));
        }
        if !value.is_string() {
            causes.push(Cause::invalid("metadata.annotations", value, "must be a string"));
        }
    }
    if size > 256 * 1024 {
        let message = "Too long: may not be more than 262144 bytes".into();
        causes.push(Cause { reason: "FieldValueTooLong", field: "metadata.annotations".into(), message });
    }
    for (index, owner) in metadata["ownerReferences"].as_array().into_iter().flatten().enumerate() {
        for field in ["apiVersion", "kind", "name", "uid"] {
            if owner[field].as_str().is_none_or(str::is_empty) {
                causes.push(Cause::required(format!("metadata.ownerReferences[{index}].{field}"), "must not be empty"));
            }
        }
    }
    causes
}

fn name_rule(kind: &Kind, name: &str) -> Option<&'static str> {
    match &*kind.storage {
        "/namespaces" | "/services" => (!is_dns_label(name)).then_some(LABEL_RULE),
        storage if storage.starts_with("rbac.authorization.k8s.io/") => {
            let bad = name == "." || name == ".." || name.contains(['/', '%']);
            bad.then_some("may not contain '/' or '%', nor be '.' or '..'")
        }
        _ => (!is_subdomain(name)).then_some(SUBDOMAIN_RULE),
    }
}

/// Rules of one built-in kind; `old` on updates, for what may not change.
pub fn validate(kind: &Kind, object: &Value, old: Option<&Value>) -> Vec<Cause> {
    let mut causes = Vec::new();
    let spec = &object["spec"];
    match &*kind.storage {
        "/pods" => {
            pod(spec, "spec", &mut causes);
            if let Some(old) = old {
                pod_update(spec, &old["spec"], &mut causes);
            }
        }
        "/services" => service_rules(spec, old.map(|o| &o["spec"]), &mut causes),
        "/configmaps" => data_keys(object, &["data", "binaryData"], old, &mut causes),
        "/secrets" => {
            data_keys(object, &["data"], old, &mut causes);
            secret_rules(object, old, &mut causes);
        }
        "apps/deployments" | "apps/daemonsets" | "apps/replicasets" | "apps/statefulsets" => {
            workload(spec, old.map(|o| &o["spec"]), &mut causes);
        }
        "batch/jobs" => pod(&spec["template"]["spec"], "spec.template.spec", &mut causes),
        "coordination.k8s.io/leases" => lease(spec, &mut causes),
        "discovery.k8s.io/endpointslices" => endpoint_slice(object, old, &mut causes),
        "rbac.authorization.k8s.io/rolebindings" | "rbac.authorization.k8s.io/clusterrolebindings" => {
            binding(object, old, &mut causes);
        }
        "rbac.authorization.k8s.io/roles" | "rbac.authorization.k8s.io/clusterroles" => role(object, &mut causes),
        "apiextensions.k8s.io/customresourcedefinitions" => super::crd::validate(object, old, &mut causes),
        _ => {}
    }
    causes
}

fn pod(spec: &Value, path: &str, causes: &mut Vec<Cause>) {
    let containers = spec["containers"].as_array();
    if containers.is_none_or(Vec::is_empty) {
        causes.push(Cause::required(format!("{path}.containers"), ""));
    }
    let mut names = Vec::new();
    for list in ["initContainers", "containers"] {
        for (index, container) in spec[list].as_array().into_iter().flatten().enumerate() {
            let at = format!("{path}.{list}[{index}]");
            let name = container["name"].as_str().unwrap_or_default();
            if name.is_empty() {
                causes.push(Cause::required(format!("{at}.name"), ""));
            } else if !is_dns_label(name) {
                causes.push(Cause::invalid(format!("{at}.name"), &container["name"], LABEL_RULE));
            } else if names.contains(&name) {
                causes.push(Cause::duplicate(format!("{at}.name"), &container["name"]));
            }
            names.push(name);
            if container["image"].as_str().is_none_or(str::is_empty) {
                causes.push(Cause::required(format!("{at}.image"), ""));
            }
            for (index, port) in container["ports"].as_array().into_iter().flatten().enumerate() {
                port_number(&port["containerPort"], format!("{at}.ports[{index}].containerPort"), causes);
            }
            for (index, mount) in container["volumeMounts"].as_array().into_iter().flatten().enumerate() {
                let volumes = spec["volumes"].as_array();
                if volumes.is_none_or(|v| v.iter().all(|v| v["name"] != mount["name"])) {
                    let message = format!("Not found: {}", mount["name"]);
                    let field = format!("{at}.volumeMounts[{index}].name");
                    causes.push(Cause { reason: "FieldValueNotFound", field, message });
                }
            }
        }
    }
    one_of(&spec["restartPolicy"], &["Always", "OnFailure", "Never"], format!("{path}.restartPolicy"), causes);
    one_of(
        &spec["dnsPolicy"],
        &["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"],
        format!("{path}.dnsPolicy"),
        causes,
    );
}

fn pod_update(new: &Value, old: &Value, causes: &mut Vec<Cause>) {
    const MUTABLE: [&str; 4] =
        ["activeDeadlineSeconds", "terminationGracePeriodSeconds", "tolerations", "ephemeralContainers"];
    let fixed = |spec: &Value| {
        let mut spec = spec.clone();
        if let Some(fields) = spec.as_object_mut() {
            MUTABLE.iter().for_each(|f| {
                fields.shift_remove(*f);
            });
            // Binding to a node is the one assignment that may come later.
            if old["nodeName"].as_str().is_none_or(str::is_empty) {
                fields.shift_remove("nodeName");
            }
        }
        for list in ["containers", "initContainers"] {
            each(&mut spec, list).for_each(|c| {
                c.as_object_mut().map(|c| c.shift_remove("image"));
            });
        }
        spec
    };
    if fixed(new) != fixed(old) {
        causes.push(Cause::forbidden("spec", "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)"));
    }
}

fn one_of(value: &Value, allowed: &[&str], field: String, causes: &mut Vec<Cause>) {
    if value.as_str().is_some_and(|v| !allowed.contains(&v)) {
        let allowed: Vec<String> = allowed.iter().map(|s| (*s).to_owned()).collect();
        causes.push(Cause::not_supported(field, value, &allowed));
    }
}

fn port_number(value: &Value, field: String, causes: &mut Vec<Cause>) {
    if !value.as_i64().is_some_and(|p| (1..=65535).contains(&p)) {
        causes.push(Cause::invalid(field, value, "must be between 1 and 65535, inclusive"));
    }
}

fn lease(spec: &Value, causes: &mut Vec<Cause>) {
    for (field, least, rule) in [
        ("leaseDurationSeconds", 1, "must be greater than 0"),
        ("leaseTransitions", 0, "must be greater than or equal to 0"),
    ] {
        if spec[field].as_i64().is_some_and(|number| number < least) {
            causes.push(Cause::invalid(format!("spec.{field}"), &spec[field], rule));
        }
    }
}

fn service_rules(spec: &Value, old: Option<&Value>, causes: &mut Vec<Cause>) {
    let kind = spec["type"].as_str().unwrap_or_default();
    one_of(&spec["type"], &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"], "spec.type".into(), causes);
    one_of(&spec["sessionAffinity"], &["ClientIP", "None"], "spec.sessionAffinity".into(), causes);
    let ports = spec["ports"].as_array().map(Vec::as_slice).unwrap_or_default();
    if ports.is_empty() && spec["clusterIP"] != "None" && kind != "ExternalName" {
        causes.push(Cause::required("spec.ports", ""));
    }
    if kind == "ExternalName" && spec["externalName"].as_str().is_none_or(str::is_empty) {
        causes.push(Cause::required("spec.externalName", ""));
    }
    for (index, port) in ports.iter().enumerate() {
        let at = format!("spec.ports[{index}]");
        port_number(&port["port"], format!("{at}.port"), causes);
        one_of(&port["protocol"], &["SCTP", "TCP", "UDP"], format!("{at}.protocol"), causes);
        if port["targetPort"].is_number() {
            port_number(&port["targetPort"], format!("{at}.targetPort"), causes);
        }
        let name = port["name"].as_str().unwrap_or_default();
        if name.is_empty() && ports.len() > 1 {
            causes.push(Cause::required(format!("{at}.name"), ""));
        } else if !name.is_empty() && !is_dns_label(name) {
            causes.push(Cause::invalid(format!("{at}.name"), &port["name"], LABEL_RULE));
        }
        for earlier in &ports[..index] {
            if !name.is_empty() && earlier["name"] == name {
                causes.push(Cause::duplicate(format!("{at}.name"), &port["name"]));
            }
            if earlier["port"] == port["port"] && earlier["protocol"] == port["protocol"] {
                causes.push(Cause::duplicate(at.clone(), &json!({"protocol": port["protocol"], "port": port["port"]})));
            }
        }
    }
    let had_address = |old: &Value| old["clusterIP"].as_str().is_some_and(|ip| !ip.is_empty());
    if let Some(old) = old
        && had_address(old)
        && kind != "ExternalName"
        && old["clusterIP"] != spec["clusterIP"]
    {
        causes.push(Cause::invalid("spec.clusterIP", &spec["clusterIP"], "field is immutable"));
    }
}

fn data_keys(object: &Value, maps: &[&str], old: Option<&Value>, causes: &mut Vec<Cause>) {
    for map in maps {
        for key in object[*map].as_object().into_iter().flat_map(Map::keys) {
            let valid = !key.is_empty()
                && key.len() <= 253
                && key.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
            if !valid || key == "." || key == ".." {
                causes.push(Cause::invalid(
                    format!("{map}[{key}]"),
                    &key.as_str().into(),
                    "a valid config key must consist of alphanumeric characters, '-', '_' or '.'",
                ));
            }
        }
        if old.is_some_and(|old| old["immutable"] == true && old[*map] != object[*map]) {
            causes.push(Cause::forbidden(*map, "field is immutable when `immutable` is set"));
        }
    }
}

fn secret_rules(object: &Value, old: Option<&Value>, causes: &mut Vec<Cause>) {
    use base64::Engine as _;
    for (key, value) in object["data"].as_object().into_iter().flatten() {
        let decodes = value.as_str().is_some_and(|v| base64::engine::general_purpose::STANDARD.decode(v).is_ok());
        if !decodes {
            causes.push(Cause::invalid(format!("data[{key}]"), &"<value omitted>".into(), "must be base64"));
        }
    }
    if old.is_some_and(|old| old["type"] != object["type"]) {
        causes.push(Cause::invalid("type", &object["type"], "field is immutable"));
    }
    if object["type"] == "kubernetes.io/tls" {
        for key in ["tls.crt", "tls.key"] {
            if object["data"].get(key).is_none() {
                causes.push(Cause::required(format!("data[{key}]"), ""));
            }
        }
    }
}

fn workload(spec: &Value, old: Option<&Value>, causes: &mut Vec<Cause>) {
    if !spec["selector"].is_object() {
        causes.push(Cause::required("spec.selector", ""));
    } else if !selects(&spec["selector"], &spec["template"]["metadata"]["labels"]) {
        let labels = &spec["template"]["metadata"]["labels"];
        causes.push(Cause::invalid(
            "spec.template.metadata.labels",
            labels,
            "`selector` does not match template `labels`",
        ));
    }
    if spec["replicas"].as_i64().is_some_and(|r| r < 0) {
        causes.push(Cause::invalid("spec.replicas", &spec["replicas"], "must be greater than or equal to 0"));
    }
    if let Some(old) = old
        && old["selector"] != spec["selector"]
    {
        causes.push(Cause::invalid("spec.selector", &spec["selector"], "field is immutable"));
    }
    pod(&spec["template"]["spec"], "spec.template.spec", causes);
    let policy = &spec["template"]["spec"]["restartPolicy"];
    if policy.as_str().is_some_and(|p| p != "Always") {
        causes.push(Cause::not_supported("spec.template.spec.restartPolicy", policy, &["Always".to_owned()]));
    }
}

/// Whether a LabelSelector selects these labels.
pub fn selects(selector: &Value, labels: &Value) -> bool {
    let empty = Map::new();
    let exact = selector["matchLabels"].as_object().unwrap_or(&empty);
    exact.iter().all(|(k, v)| labels.get(k) == Some(v))
        && selector["matchExpressions"].as_array().into_iter().flatten().all(|expression| {
            let value = labels.get(expression["key"].as_str().unwrap_or_default());
            let listed = || value.is_some_and(|v| expression["values"].as_array().is_some_and(|l| l.contains(v)));
            match expression["operator"].as_str() {
                Some("In") => listed(),
                Some("NotIn") => !listed(),
                Some("Exists") => value.is_some(),
                Some("DoesNotExist") => value.is_none(),
                _ => false,
            }
        })
}

fn endpoint_slice(object: &Value, old: Option<&Value>, causes: &mut Vec<Cause>) {
    let kind = &object["addressType"];
    if !kind.is_string() {
        causes.push(Cause::required("addressType", ""));
    }
    one_of(kind, &["FQDN", "IPv4", "IPv6"], "addressType".into(), causes);
    if old.is_some_and(|old| old["addressType"] != *kind) {
        causes.push(Cause::invalid("addressType", kind, "field is immutable"));
    }
    for (index, endpoint) in object["endpoints"].as_array().into_iter().flatten().enumerate() {
        let at = format!("endpoints[{index}].addresses");
        let addresses = endpoint["addresses"].as_array().map(Vec::as_slice).unwrap_or_default();
        if addresses.is_empty() {
            causes.push(Cause::required(at.clone(), "must contain at least 1 address"));
        }
        for (index, address) in addresses.iter().enumerate() {
            let parsed: Option<IpAddr> = address.as_str().and_then(|a| a.parse().ok());
            let fits = match kind.as_str() {
                Some("IPv4") => parsed.is_some_and(|ip| ip.is_ipv4()),
                Some("IPv6") => parsed.is_some_and(|ip| ip.is_ipv6()),
                _ => true,
            };
            if !fits {
                causes.push(Cause::invalid(
                    format!("{at}[{index}]"),
                    address,
                    "must be a valid IP address of addressType",
                ));
            }
        }
    }
}

fn binding(object: &Value, old: Option<&Value>, causes: &mut Vec<Cause>) {
    one_of(&object["roleRef"]["kind"], &["Role", "ClusterRole"], "roleRef.kind".into(), causes);
    if object["roleRef"]["name"].as_str().is_none_or(str::is_empty) {
        causes.push(Cause::required("roleRef.name", ""));
    }
    if old.is_some_and(|old| old["roleRef"] != object["roleRef"]) {
        causes.push(Cause::invalid("roleRef", &object["roleRef"], "cannot change roleRef"));
    }
    for (index, subject) in object["subjects"].as_array().into_iter().flatten().enumerate() {
        let at = format!("subjects[{index}]");
        one_of(&subject["kind"], &["ServiceAccount", "User", "Group"], format!("{at}.kind"), causes);
        if subject["name"].as_str().is_none_or(str::is_empty) {
            causes.push(Cause::required(format!("{at}.name"), ""));
        }
        if subject["kind"] == "ServiceAccount" && subject["namespace"].as_str().is_none_or(str::is_empty) {
            causes.push(Cause::required(format!("{at}.namespace"), ""));
        }
    }
}

fn role(object: &Value, causes: &mut Vec<Cause>) {
    for (index, rule) in object["rules"].as_array().into_iter().flatten().enumerate() {
        let present = |field: &str| rule[field].as_array().is_some_and(|l| !l.is_empty());
        if !present("verbs") {
            causes.push(Cause::required(format!("rules[{index}].verbs"), "verbs must contain at least one value"));
        }
        if !present("nonResourceURLs") {
            for field in ["apiGroups", "resources"] {
                if !present(field) {
                    causes.push(Cause::required(
                        format!("rules[{index}].{field}"),
                        "resource rules must supply at least one",
                    ));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::standalone::registry::Registry;

    fn kind(plural: &str) -> Kind {
        let registry = Registry::new([]);
        let kind = registry.all().find(|k| k.plural == plural).unwrap();
        Kind::clone(kind)
    }

    #[test]
    fn a_service_gets_what_users_see() {
        let mut service = json!({"spec": {"ports": [{"port": 80}]}});
        apply_defaults(&kind("services"), &mut service);
        let spec = &service["spec"];
        assert_eq!((&spec["type"], &spec["sessionAffinity"]), (&json!("ClusterIP"), &json!("None")));
        assert_eq!(spec["ports"][0], json!({"port": 80, "protocol": "TCP", "targetPort": 80}));
    }

    #[test]
    fn names_are_checked_by_kind() {
        let named = |n: &str| json!({"metadata": {"name": n}});
        assert!(validate_metadata(&kind("configmaps"), &named("a.b")).is_empty());
        assert_eq!(validate_metadata(&kind("services"), &named("a.b"))[0].field, "metadata.name");
        assert!(validate_metadata(&kind("clusterroles"), &named("system:x")).is_empty());
        assert!(!validate_metadata(&kind("pods"), &named("Upper")).is_empty());
    }

    #[test]
    fn a_pod_cannot_change_under_its_kubelet() {
        let kind = kind("pods");
        let old = json!({"spec": {"containers": [{"name": "a", "image": "1"}], "hostNetwork": false}});
        let mut new = old.clone();
        new["spec"]["containers"][0]["image"] = "2".into();
        new["spec"]["nodeName"] = "n".into();
        assert!(validate(&kind, &new, Some(&old)).is_empty());
        new["spec"]["hostNetwork"] = true.into();
        assert_eq!(validate(&kind, &new, Some(&old))[0].reason, "FieldValueForbidden");
    }

    #[test]
    fn a_deployment_must_select_its_own_pods() {
        let object = json!({"spec": {
            "selector": {"matchLabels": {"app": "a"}},
            "template": {"metadata": {"labels": {"app": "b"}}, "spec": {"containers": [{"name": "a", "image": "i"}]}},
        }});
        assert_eq!(validate(&kind("deployments"), &object, None)[0].field, "spec.template.metadata.labels");
    }
}
