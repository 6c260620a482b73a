//! The objects behind a Gateway of a waypoint class, and why there are none.
//!
//! Users patch them ([`parameters`]), but not what identity and ownership rest on: a patch that would change one of
//! [`KEPT`] is refused as a whole, and what runs stays as it was.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::binding::{HBONE_PORT, MANAGED_LABEL};
use super::parameters::{self, Part, Unusable};
use super::world::World;
use crate::enrol::rules::DATAPLANE_MODE;
use crate::revision::{self, Revision};
use crate::strategic;
use crate::types::gateway::{GATEWAY_NAME, GatewaySpec, Listener};
use crate::types::{Key, Object};

/// Value of [`MANAGED_LABEL`]; a label cannot hold the slash of the controller's name.
pub const MANAGED_BY: &str = "istio.io-mesh-controller";
const GATEWAY_CLASS: &str = "gateway.networking.k8s.io/gateway-class-name";
const CONTAINER: &str = "istio-proxy";
/// From the signal to the kill, as the waypoint is told.
const GRACE: &str = "TERMINATION_GRACE_PERIOD_SECONDS";
/// A pod that is being deleted is no endpoint any more, and proxies hear of that a moment later. So long it goes on
/// taking connections as if nothing were.
const LINGER_SECONDS: u64 = 5;
/// From the deletion of a pod to the kill.
const TERMINATION_SECONDS: u64 = 30;
/// Longest name of a Service, and longest value of a label.
const LONGEST_NAME: usize = 63;

/// What identity and ownership rest on, beside all metadata but labels and annotations: kind, and place; `name=x` is the
/// element of a list with that name.
const KEPT: &[(Part, &[&str])] = &[
    (Part::Service, &["spec", "selector"]),
    (Part::Service, &["spec", "ports", "name=mesh", "port"]),
    (Part::Service, &["spec", "ports", "name=mesh", "targetPort"]),
    (Part::Deployment, &["spec", "selector"]),
    (Part::Deployment, &["spec", "template", "metadata", "labels", GATEWAY_NAME]),
    (Part::Deployment, &["spec", "template", "metadata", "labels", GATEWAY_CLASS]),
    (Part::Deployment, &["spec", "template", "metadata", "labels", MANAGED_LABEL]),
    (Part::Deployment, &["spec", "template", "metadata", "labels", revision::LABEL]),
    (Part::Deployment, &["spec", "template", "metadata", "labels", DATAPLANE_MODE]),
    (Part::Deployment, &["spec", "template", "spec", "serviceAccountName"]),
    (Part::Deployment, &["spec", "template", "spec", "serviceAccount"]),
    (Part::Deployment, &["spec", "template", "spec", "volumes", "name=istio-token"]),
    (Part::Deployment, &["spec", "template", "spec", "volumes", "name=istiod-ca-cert"]),
    (Part::Deployment, &["spec", "template", "spec", "containers", "name=istio-proxy", "env", "name=GATEWAY_NAME"]),
    (Part::Deployment, &["spec", "template", "spec", "containers", "name=istio-proxy", "env", "name=POD_NAME"]),
    (Part::Deployment, &["spec", "template", "spec", "containers", "name=istio-proxy", "env", "name=POD_NAMESPACE"]),
    (Part::Deployment, &["spec", "template", "spec", "containers", "name=istio-proxy", "env", "name=SERVICE_ACCOUNT"]),
    (Part::HorizontalPodAutoscaler, &["spec", "scaleTargetRef"]),
    (Part::PodDisruptionBudget, &["spec", "selector"]),
];
/// Labels of each object that are ours.
const KEPT_LABELS: &[&str] = &[GATEWAY_NAME, GATEWAY_CLASS, MANAGED_LABEL, revision::LABEL];

/// What all waypoints have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WaypointSettings {
    pub image: String,
    /// `host:port` of the control plane.
    pub control_plane: String,
    pub cluster_id: String,
    pub trust_domain: String,
    pub log_filter: String,
}

impl Default for WaypointSettings {
    fn default() -> Self {
        Self {
            image: "waypoint".into(),
            control_plane: "istiod.istio-system.svc:15012".into(),
            cluster_id: "Kubernetes".into(),
            trust_domain: "cluster.local".into(),
            log_filter: "info".into(),
        }
    }
}

/// Why a Gateway has no objects, or none other than it had.
#[derive(Debug, PartialEq, Eq)]
pub enum Unfit {
    /// That cannot be said before its parameters have been read.
    NotYet,
    /// Reason and message of the condition `Accepted`.
    Refused(&'static str, String),
}

impl From<Unusable> for Unfit {
    fn from(unusable: Unusable) -> Self {
        match unusable {
            Unusable::NotRead => Self::NotYet,
            Unusable::Invalid(message) => Self::Refused("InvalidParameters", message),
        }
    }
}

/// All that is behind a Gateway, each object named like it.
///
/// # Errors
/// Why that cannot be made.
pub fn objects(
    world: &World,
    key: &Key,
    gateway: &Object<GatewaySpec>,
    spec: &GatewaySpec,
    settings: &WaypointSettings,
) -> Result<Vec<(Part, Value)>, Unfit> {
    if let Some((reason, message)) = refusal(key, spec) {
        return Err(Unfit::Refused(reason, message));
    }
    let applying = parameters::of(world, key, spec)?;
    let meta = Meta { key, gateway, spec, revision: &world.mesh.revision };
    let mut objects = Vec::new();
    for part in Part::ALL {
        let mut object = match part {
            Part::ServiceAccount => json!({"automountServiceAccountToken": false}),
            Part::Service => service(&meta),
            Part::Deployment => deployment(&meta, settings, world.network()),
            Part::HorizontalPodAutoscaler | Part::PodDisruptionBudget if !applying.asks_for(part) => continue,
            Part::HorizontalPodAutoscaler => autoscaler(&meta),
            Part::PodDisruptionBudget => json!({"spec": {"selector": {"matchLabels": meta.selector()}}}),
        };
        meta.put_on(part, &mut object);
        let original = object.clone();
        for (name, patches) in &applying.patches {
            let Some(patch) = patches.get(&part) else { continue };
            let refused = |problem| Unfit::Refused("InvalidParameters", format!("{name}: {}: {problem}", part.key()));
            strategic::merge(&mut object, patch, &part.schema()).map_err(|bad| refused(bad.to_string()))?;
            if let Some(field) = changed(part, &original, &object) {
                return Err(refused(format!(
                    "{field}: cannot be changed, as identity or ownership rests on it: take it out"
                )));
            }
        }
        if part == Part::HorizontalPodAutoscaler && !object["spec"]["maxReplicas"].is_u64() {
            let asked = applying.patches.iter().rfind(|(_, patches)| patches.contains_key(&part));
            let name = asked.map(|(name, _)| name.as_str()).unwrap_or_default();
            let message = format!("{name}: {}: spec.maxReplicas: has to be given", part.key());
            return Err(Unfit::Refused("InvalidParameters", message));
        }
        if part == Part::Deployment {
            tell_grace(&mut object);
        }
        objects.push((part, object));
    }
    Ok(objects)
}

/// Why a Gateway has no objects, or `Ok`: as [`objects`], whatever the settings.
///
/// # Errors
/// As there.
pub fn check(world: &World, key: &Key, gateway: &Object<GatewaySpec>, spec: &GatewaySpec) -> Result<(), Unfit> {
    if let Some((reason, message)) = refusal(key, spec) {
        return Err(Unfit::Refused(reason, message));
    }
    // Spares making them where nothing is patched.
    match parameters::of(world, key, spec)?.patches.is_empty() {
        true => Ok(()),
        false => objects(world, key, gateway, spec, &WaypointSettings::default()).map(|_| ()),
    }
}

/// What of the Gateway itself keeps it from being deployed: reason and message.
fn refusal(key: &Key, spec: &GatewaySpec) -> Option<(&'static str, String)> {
    if !is_service_name(&key.name) {
        let message = format!(
            "metadata.name: the Service of the same name cannot exist: at most {LONGEST_NAME} of a-z, 0-9 and -, \
             with a letter first and no - last"
        );
        return Some(("Invalid", message));
    }
    if !spec.addresses.is_empty() {
        return Some(("UnsupportedAddress", "spec.addresses: cannot be asked for".into()));
    }
    if !spec.listeners.iter().any(is_hbone) {
        let message = format!("spec.listeners: a waypoint needs one with protocol HBONE and port {HBONE_PORT}");
        return Some(("ListenersNotValid", message));
    }
    None
}

/// As RFC 1035 has labels, which is what Services are called by.
fn is_service_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    name.len() <= LONGEST_NAME
        && name.starts_with(|first: char| first.is_ascii_lowercase())
        && !name.ends_with('-')
        && name.bytes().all(plain)
}

pub fn is_hbone(listener: &Listener) -> bool {
    listener.protocol == "HBONE" && u32::from(listener.port) == HBONE_PORT
}

/// The first thing of `after` that is not as it has to be.
fn changed(part: Part, before: &Value, after: &Value) -> Option<String> {
    let none = Map::new();
    let metadata = |object: &'_ Value| object["metadata"].as_object().unwrap_or(&none).clone();
    let (was, is) = (metadata(before), metadata(after));
    let free = ["labels", "annotations"];
    let mut names = was.keys().chain(is.keys()).filter(|name| !free.contains(&name.as_str()));
    if let Some(name) = names.find(|name| was.get(*name) != is.get(*name)) {
        return Some(format!("metadata.{name}"));
    }
    let everywhere = ["apiVersion", "kind", "status"].map(|name| vec![name]);
    let labels = KEPT_LABELS.iter().map(|label| vec!["metadata", "labels", *label]);
    let places = KEPT.iter().filter(|(of, _)| *of == part).map(|(_, place)| place.to_vec());
    let mut places = everywhere.into_iter().chain(labels).chain(places);
    places.find(|place| at(before, place) != at(after, place)).map(|place| place.join("."))
}

/// What stands at such a place; null: nothing.
fn at<'a>(value: &'a Value, place: &[&str]) -> &'a Value {
    place.iter().fold(value, |value, step| match (value, step.split_once('=')) {
        (Value::Array(list), Some((key, wanted))) => {
            list.iter().find(|element| element[key] == wanted).unwrap_or(&Value::Null)
        }
        _ => &value[*step],
    })
}

/// How long it has from the signal on is for the waypoint to know, whatever the pod's times have been patched to.
fn tell_grace(deployment: &mut Value) {
    let pod = &deployment["spec"]["template"]["spec"];
    let container = at(pod, &["containers", "name=istio-proxy"]);
    let lingers = container["lifecycle"]["preStop"]["sleep"]["seconds"].as_u64().unwrap_or_default();
    let all = pod["terminationGracePeriodSeconds"].as_u64().unwrap_or(TERMINATION_SECONDS);
    let told = json!({"name": GRACE, "value": all.saturating_sub(lingers).max(1).to_string()});
    let containers = deployment["spec"]["template"]["spec"]["containers"].as_array_mut();
    let container = containers.into_iter().flatten().find(|container| container["name"] == CONTAINER);
    let env = container.and_then(|container| container["env"].as_array_mut());
    if let Some(env) = env.filter(|env| env.iter().all(|entry| entry["name"] != GRACE)) {
        env.push(told);
    }
}

struct Meta<'a> {
    key: &'a Key,
    gateway: &'a Object<GatewaySpec>,
    spec: &'a GatewaySpec,
    /// Who deploys it.
    revision: &'a Revision,
}

impl Meta<'_> {
    /// Ours win over those of `spec.infrastructure`.
    fn labels(&self) -> BTreeMap<String, String> {
        let mut labels = self.spec.infrastructure.labels.clone();
        labels.extend(self.selector());
        labels.insert(GATEWAY_CLASS.into(), self.spec.gateway_class_name.clone());
        labels.insert(MANAGED_LABEL.into(), MANAGED_BY.into());
        // Without it they are of the default revision, as a Gateway is.
        match self.revision.is_default() {
            true => _ = labels.remove(revision::LABEL),
            false => _ = labels.insert(revision::LABEL.into(), self.revision.to_string()),
        }
        labels
    }

    fn selector(&self) -> BTreeMap<String, String> {
        BTreeMap::from([(GATEWAY_NAME.into(), self.key.name.to_string())])
    }

    /// What all of them say of themselves; annotations of their own stay.
    fn put_on(&self, part: Part, object: &mut Value) {
        let mut annotations = json!(self.spec.infrastructure.annotations);
        let own = object["metadata"]["annotations"].take();
        annotations
            .as_object_mut()
            .into_iter()
            .for_each(|all| all.extend(own.as_object().cloned().unwrap_or_default()));
        object["apiVersion"] = part.api_version().into();
        object["kind"] = part.kind().into();
        object["metadata"] = json!({
            "name": &*self.key.name,
            "namespace": &*self.key.namespace,
            "labels": self.labels(),
            "annotations": annotations,
            "ownerReferences": [{
                "apiVersion": "gateway.networking.k8s.io/v1",
                "kind": "Gateway",
                "name": &*self.key.name,
                "uid": self.gateway.meta.uid.as_deref().unwrap_or_default(),
                "controller": true,
                "blockOwnerDeletion": true,
            }],
        });
    }
}

fn service(meta: &Meta<'_>) -> Value {
    json!({
        "metadata": {"annotations": {"networking.istio.io/traffic-distribution": "PreferClose"}},
        "spec": {
            "type": "ClusterIP",
            "ipFamilyPolicy": "PreferDualStack",
            "selector": meta.selector(),
            "ports": [
                {"name": "status-port", "port": 15021, "protocol": "TCP", "targetPort": 15021, "appProtocol": "tcp"},
                {"name": "mesh", "port": 15008, "protocol": "TCP", "targetPort": 15008, "appProtocol": "hbone"},
            ],
        },
    })
}

fn deployment(meta: &Meta<'_>, settings: &WaypointSettings, network: &str) -> Value {
    let mut pod_labels = meta.labels();
    pod_labels.insert(DATAPLANE_MODE.into(), "none".into());
    let mut pod_annotations = meta.spec.infrastructure.annotations.clone();
    pod_annotations.insert("prometheus.io/scrape".into(), "true".into());
    pod_annotations.insert("prometheus.io/port".into(), "15020".into());
    pod_annotations.insert("prometheus.io/path".into(), "/metrics".into());
    let field = |name: &str, path: &str| json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}});
    let value = |name: &str, value: &str| json!({"name": name, "value": value});
    let mut env = vec![
        value("XDS_ADDRESS", &settings.control_plane),
        value("CA_ADDRESS", &settings.control_plane),
        value("CLUSTER_ID", &settings.cluster_id),
        value("TRUST_DOMAIN", &settings.trust_domain),
        value("RUST_LOG", &settings.log_filter),
        value("GATEWAY_NAME", &meta.key.name),
        field("POD_NAME", "metadata.name"),
        field("POD_NAMESPACE", "metadata.namespace"),
        field("INSTANCE_IP", "status.podIP"),
        field("NODE_NAME", "spec.nodeName"),
        field("SERVICE_ACCOUNT", "spec.serviceAccountName"),
    ];
    // By which it looks up addresses; nothing is the same as none.
    if !network.is_empty() {
        env.push(value("NETWORK", network));
    }
    let port = |name: &str, number: u16| json!({"name": name, "containerPort": number, "protocol": "TCP"});
    let container = json!({
        "name": CONTAINER,
        "image": settings.image,
        "imagePullPolicy": "IfNotPresent",
        "ports": [port("mesh", 15008), port("metrics", 15020), port("status-port", 15021)],
        "env": env,
        "readinessProbe": {
            "httpGet": {"path": "/healthz/ready", "port": 15021},
            "periodSeconds": 1,
            "timeoutSeconds": 5,
        },
        "lifecycle": {"preStop": {"sleep": {"seconds": LINGER_SECONDS}}},
        "resources": {"requests": {"cpu": "50m", "memory": "32Mi"}},
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "privileged": false,
            "readOnlyRootFilesystem": true,
            "runAsNonRoot": true,
            "runAsUser": 1337,
            "runAsGroup": 1337,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "istiod-ca-cert", "mountPath": "/var/run/secrets/istio", "readOnly": true},
            {"name": "istio-token", "mountPath": "/var/run/secrets/tokens", "readOnly": true},
        ],
    });
    let token = json!({"audience": "istio-ca", "expirationSeconds": 43200, "path": "istio-token"});
    json!({
        // No replicas: that field belongs to the user or an autoscaler; the API's default is 1.
        "spec": {
            "selector": {"matchLabels": meta.selector()},
            "strategy": {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "template": {
                "metadata": {"labels": pod_labels, "annotations": pod_annotations},
                "spec": {
                    "serviceAccountName": &*meta.key.name,
                    "automountServiceAccountToken": false,
                    "terminationGracePeriodSeconds": TERMINATION_SECONDS,
                    // What the level "restricted" of Pod Security asks for, with the container's own.
                    "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
                    "containers": [container],
                    "volumes": [
                        {"name": "istio-token", "projected": {"sources": [{"serviceAccountToken": token}]}},
                        {"name": "istiod-ca-cert", "configMap": {"name": "istio-ca-root-cert"}},
                    ],
                },
            },
        },
    })
}

fn autoscaler(meta: &Meta<'_>) -> Value {
    json!({
        "spec": {"scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": &*meta.key.name}},
    })
}
