//! The objects behind a Gateway of a waypoint class.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::AppliedKind;
use crate::enrol::rules::DATAPLANE_MODE;
use crate::translate::binding::MANAGED_LABEL;
use crate::types::gateway::GatewaySpec;
use crate::types::{Key, Object};

/// Value of [`MANAGED_LABEL`]; a label cannot hold the slash of the controller's name.
const MANAGED_BY: &str = "istio.io-mesh-controller";
const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";
const GATEWAY_CLASS: &str = "gateway.networking.k8s.io/gateway-class-name";

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

/// ServiceAccount, Service and Deployment, all named like the Gateway.
pub(super) fn objects(
    key: &Key,
    gateway: &Object<GatewaySpec>,
    spec: &GatewaySpec,
    settings: &WaypointSettings,
) -> [(AppliedKind, Value); 3] {
    let meta = Meta { key, gateway, spec };
    let account = json!({
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": meta.render(),
        "automountServiceAccountToken": false,
    });
    [
        (AppliedKind::ServiceAccount, account),
        (AppliedKind::Service, service(&meta)),
        (AppliedKind::Deployment, deployment(&meta, settings)),
    ]
}

struct Meta<'a> {
    key: &'a Key,
    gateway: &'a Object<GatewaySpec>,
    spec: &'a GatewaySpec,
}

impl Meta<'_> {
    /// Ours win over those of `spec.infrastructure`.
    fn labels(&self) -> BTreeMap<String, String> {
        let mut labels = self.spec.infrastructure.labels.clone();
        labels.extend(self.selector());
        labels.insert(GATEWAY_CLASS.into(), self.spec.gateway_class_name.clone());
        labels.insert(MANAGED_LABEL.into(), MANAGED_BY.into());
        labels
    }

    fn selector(&self) -> BTreeMap<String, String> {
        BTreeMap::from([(GATEWAY_NAME.into(), self.key.name.to_string())])
    }

    fn render(&self) -> Value {
        json!({
            "name": &*self.key.name,
            "namespace": &*self.key.namespace,
            "labels": self.labels(),
            "annotations": self.spec.infrastructure.annotations,
            "ownerReferences": [{
                "apiVersion": "gateway.networking.k8s.io/v1",
                "kind": "Gateway",
                "name": &*self.key.name,
                "uid": self.gateway.meta.uid.as_deref().unwrap_or_default(),
                "controller": true,
                "blockOwnerDeletion": true,
            }],
        })
    }
}

fn service(meta: &Meta<'_>) -> Value {
    let mut metadata = meta.render();
    metadata["annotations"]["networking.istio.io/traffic-distribution"] = "PreferClose".into();
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
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

fn deployment(meta: &Meta<'_>, settings: &WaypointSettings) -> Value {
    let mut pod_labels = meta.labels();
    pod_labels.insert(DATAPLANE_MODE.into(), "none".into());
    let mut pod_annotations = meta.spec.infrastructure.annotations.clone();
    pod_annotations.insert("prometheus.io/scrape".into(), "true".into());
    pod_annotations.insert("prometheus.io/port".into(), "15020".into());
    pod_annotations.insert("prometheus.io/path".into(), "/metrics".into());
    let field = |name: &str, path: &str| json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}});
    let value = |name: &str, value: &str| json!({"name": name, "value": value});
    let env = [
        value("XDS_ADDRESS", &settings.control_plane),
        value("CA_ADDRESS", &settings.control_plane),
        value("CLUSTER_ID", &settings.cluster_id),
        value("TRUST_DOMAIN", &settings.trust_domain),
        value("RUST_LOG", &settings.log_filter),
        value("GATEWAY_NAME", &meta.key.name),
        value("TERMINATION_GRACE_PERIOD_SECONDS", "30"),
        field("POD_NAME", "metadata.name"),
        field("POD_NAMESPACE", "metadata.namespace"),
        field("INSTANCE_IP", "status.podIP"),
        field("NODE_NAME", "spec.nodeName"),
        field("SERVICE_ACCOUNT", "spec.serviceAccountName"),
    ];
    let port = |name: &str, number: u16| json!({"name": name, "containerPort": number, "protocol": "TCP"});
    let container = json!({
        "name": "istio-proxy",
        "image": settings.image,
        "imagePullPolicy": "IfNotPresent",
        "ports": [port("mesh", 15008), port("metrics", 15020), port("status-port", 15021)],
        "env": env,
        "readinessProbe": {
            "httpGet": {"path": "/healthz/ready", "port": 15021},
            "periodSeconds": 1,
            "timeoutSeconds": 5,
        },
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
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": meta.render(),
        // No replicas: that field belongs to the user or an autoscaler; the API's default is 1.
        "spec": {
            "selector": {"matchLabels": meta.selector()},
            "strategy": {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "template": {
                "metadata": {"labels": pod_labels, "annotations": pod_annotations},
                "spec": {
                    "serviceAccountName": &*meta.key.name,
                    "automountServiceAccountToken": false,
                    "terminationGracePeriodSeconds": 30,
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
