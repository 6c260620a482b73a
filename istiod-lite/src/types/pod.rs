//! Pods as the control plane remembers them. There are a hundred thousand of them, so only what is looked at is kept, and
//! what the pods of one template have in common once.

use std::fmt;
use std::net::IpAddr;
use std::ops::Deref;
use std::sync::Arc;

use internment::ArcIntern;
use k8s_openapi::api::core::v1 as api;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::{Key, Labels, Meta};

/// By which the kubelet and the container runtime know a static pod.
pub const STATIC_POD_UID: &str = "kubernetes.io/config.hash";

/// A pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    pub key: Key,
    pub uid: Option<Arc<str>>,
    /// `metadata.resourceVersion`.
    pub version: ObjectVersion,
    pub template: ArcIntern<Template>,
    node: Option<ArcIntern<String>>,
    /// `status.podIPs`, or `status.podIP`.
    addresses: Addresses,
    pub phase: Phase,
    pub is_ready: bool,
    /// It is being deleted.
    pub is_ending: bool,
}

/// `metadata.resourceVersion`, as it is sent back. Almost always a number, which is kept without an allocation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ObjectVersion {
    Number(u64),
    Text(Box<str>),
}

impl ObjectVersion {
    fn new(text: String) -> Self {
        match text.parse() {
            Ok(number) if format!("{number}") == text => Self::Number(number),
            _ => Self::Text(text.into()),
        }
    }
}

impl fmt::Display for ObjectVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Text(text) => text.fmt(f),
        }
    }
}

/// Almost always one, which is kept without an allocation.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Addresses {
    One(IpAddr),
    Many(Box<[IpAddr]>),
}

impl Addresses {
    fn as_slice(&self) -> &[IpAddr] {
        match self {
            Self::One(address) => std::slice::from_ref(address),
            Self::Many(addresses) => addresses,
        }
    }
}

impl From<Vec<IpAddr>> for Addresses {
    fn from(addresses: Vec<IpAddr>) -> Self {
        match addresses[..] {
            [address] => Self::One(address),
            _ => Self::Many(addresses.into()),
        }
    }
}

/// What pods made from one template have in common.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Template {
    pub labels: Labels,
    /// Only those of Istio's groups, and [`STATIC_POD_UID`]. The pods of many templates have the same.
    annotations: ArcIntern<Labels>,
    spec: ArcIntern<Spec>,
}

/// What is the same where pods of one template have labels of their own, as those of a StatefulSet.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Spec {
    /// `default` if the pod names none.
    pub service_account: String,
    pub host_network: bool,
    /// The controller that owns it.
    pub owner: Option<Owner>,
    /// TCP ports that have a name, of containers and of init containers that stay, in that order.
    pub ports: Vec<(String, i32)>,
    /// Where the kubelet calls the pod by TCP: probes and lifecycle hooks of the same.
    pub calls: Vec<Call>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Owner {
    pub kind: String,
    pub name: String,
}

/// A call of the kubelet's.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Call {
    /// As the probe says; `None` = the pod.
    pub host: Option<String>,
    pub port: u16,
}

/// `status.phase`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Phase {
    #[default]
    Unset,
    Pending,
    Running,
    Succeeded,
    Failed,
    Unknown,
}

impl Phase {
    /// All its containers have ended for good.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed)
    }

    /// As the API has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unset => "",
            Self::Pending => "Pending",
            Self::Running => "Running",
            Self::Succeeded => "Succeeded",
            Self::Failed => "Failed",
            Self::Unknown => "Unknown",
        }
    }
}

impl Pod {
    pub fn new(pod: api::Pod) -> Self {
        let meta = pod.metadata;
        let (spec, status) = (pod.spec.unwrap_or_default(), pod.status.unwrap_or_default());
        let is_true = |condition: &api::PodCondition| condition.type_ == "Ready" && condition.status == "True";
        let many = status.pod_ips.iter().flatten().filter_map(|ip| ip.ip.parse().ok());
        let mut addresses: Vec<IpAddr> = many.collect();
        if addresses.is_empty() {
            addresses.extend(status.pod_ip.as_deref().and_then(|ip| ip.parse::<IpAddr>().ok()));
        }
        let mut annotations = meta.annotations.unwrap_or_default();
        annotations.retain(|name, _| is_read(name));
        let labels = meta.labels.unwrap_or_default();
        let owners = meta.owner_references.unwrap_or_default().into_iter();
        let owner = owners.filter(|owner| owner.controller == Some(true)).map(|owner| (owner.kind, owner.name)).next();
        let owner = owner.map(|(kind, name)| Owner { kind, name });
        Self {
            key: Key::new(meta.namespace.as_deref().unwrap_or_default(), meta.name.as_deref().unwrap_or_default()),
            // What no API server gives out, no proxy takes.
            uid: meta.uid.filter(|uid| is_uid(uid)).map(Arc::from),
            version: ObjectVersion::new(meta.resource_version.unwrap_or_default()),
            node: spec.node_name.clone().filter(|node| !node.is_empty()).map(ArcIntern::new),
            template: ArcIntern::new(Template::new(spec, owner, labels.into(), annotations.into())),
            addresses: addresses.into(),
            phase: match status.phase.as_deref() {
                Some("Pending") => Phase::Pending,
                Some("Running") => Phase::Running,
                Some("Succeeded") => Phase::Succeeded,
                Some("Failed") => Phase::Failed,
                Some("") | None => Phase::Unset,
                Some(_) => Phase::Unknown,
            },
            is_ready: status.conditions.iter().flatten().any(is_true),
            is_ending: meta.deletion_timestamp.is_some(),
        }
    }

    /// Where it was placed.
    pub fn node(&self) -> Option<&str> {
        self.node.as_deref().map(String::as_str)
    }

    /// Addresses of a pod that has not ended; `None` before it has any.
    pub fn running_addresses(&self) -> Option<&[IpAddr]> {
        let addresses = self.addresses.as_slice();
        (!self.phase.is_over() && !addresses.is_empty()).then_some(addresses)
    }

    /// Those that are nobody else's: pods of the host's network share the node's.
    pub fn own_addresses(&self) -> &[IpAddr] {
        if self.template.host_network { &[] } else { self.running_addresses().unwrap_or_default() }
    }

    /// Ready for connections, and to stay.
    pub fn is_healthy(&self) -> bool {
        self.is_ready && !self.is_ending
    }

    /// The owning controller; for a Deployment that is the ReplicaSet without its hash.
    pub fn workload_name(&self) -> &str {
        let Some(owner) = &self.template.owner else { return &self.key.name };
        let hash = self.template.labels.get("pod-template-hash").filter(|_| owner.kind == "ReplicaSet");
        hash.and_then(|hash| owner.name.strip_suffix(hash)?.strip_suffix('-')).unwrap_or(&owner.name)
    }

    /// The port of this name.
    pub fn port(&self, name: &str) -> Option<i32> {
        self.template.ports.iter().find(|(of, _)| of == name).map(|(_, port)| *port)
    }
}

impl Meta for Pod {
    fn namespace_name(&self) -> &str {
        &self.key.namespace
    }

    fn label(&self, name: &str) -> Option<&str> {
        self.template.labels.get(name)
    }

    fn annotation(&self, name: &str) -> Option<&str> {
        self.template.annotations.get(name)
    }
}

fn is_read(annotation: &str) -> bool {
    let group = annotation.split_once('/').map_or("", |(group, _)| group);
    group == "istio.io" || group.ends_with(".istio.io") || annotation == STATIC_POD_UID
}

impl Template {
    fn new(spec: api::PodSpec, owner: Option<Owner>, labels: Labels, annotations: Labels) -> Self {
        Self { labels, annotations: ArcIntern::new(annotations), spec: ArcIntern::new(Spec::new(spec, owner)) }
    }
}

impl Deref for Template {
    type Target = Spec;

    fn deref(&self) -> &Spec {
        &self.spec
    }
}

impl Spec {
    fn new(spec: api::PodSpec, owner: Option<Owner>) -> Self {
        let sidecars = spec.init_containers.iter().flatten().filter(|c| c.restart_policy.as_deref() == Some("Always"));
        let containers = || spec.containers.iter().chain(sidecars.clone());
        let ports = containers().flat_map(|container| container.ports.iter().flatten());
        let ports = ports.filter(|port| port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP"));
        let account = spec.service_account_name.as_deref().filter(|name| !name.is_empty()).unwrap_or("default");
        Self {
            service_account: account.to_owned(),
            host_network: spec.host_network == Some(true),
            owner,
            ports: ports.filter_map(|port| Some((port.name.clone()?, port.container_port))).collect(),
            calls: containers().flat_map(calls).collect(),
        }
    }
}

fn calls(container: &api::Container) -> Vec<Call> {
    let probes = [&container.liveness_probe, &container.readiness_probe, &container.startup_probe];
    let of_probes = probes.into_iter().flatten().filter_map(|probe| of_probe(probe, container));
    let lifecycle = container.lifecycle.as_ref();
    let hooks = lifecycle.into_iter().flat_map(|hooks| [&hooks.post_start, &hooks.pre_stop]).flatten();
    let of_hooks = hooks.filter_map(|hook| of_call(hook.http_get.as_ref(), hook.tcp_socket.as_ref(), container));
    of_probes.chain(of_hooks).collect()
}

fn of_probe(probe: &api::Probe, container: &api::Container) -> Option<Call> {
    // A gRPC probe takes numbers only.
    let grpc = probe.grpc.as_ref().and_then(|grpc| number(grpc.port)).map(|port| Call { host: None, port });
    grpc.or_else(|| of_call(probe.http_get.as_ref(), probe.tcp_socket.as_ref(), container))
}

fn of_call(
    http: Option<&api::HTTPGetAction>,
    tcp: Option<&api::TCPSocketAction>,
    container: &api::Container,
) -> Option<Call> {
    let http = http.map(|http| (&http.port, &http.host));
    let (port, host) = http.or_else(|| tcp.map(|tcp| (&tcp.port, &tcp.host)))?;
    let port = match port {
        IntOrString::Int(port) => number(*port),
        IntOrString::String(name) => match name.parse() {
            Ok(port) => number(port),
            Err(_) => {
                let ports = container.ports.iter().flatten();
                ports.filter(|port| port.name.as_deref() == Some(name)).find_map(|port| number(port.container_port))
            }
        },
    };
    Some(Call { host: host.clone().filter(|host| !host.is_empty()), port: port? })
}

fn is_uid(uid: &str) -> bool {
    !uid.is_empty() && uid.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

fn number(port: i32) -> Option<u16> {
    u16::try_from(port).ok().filter(|port| *port > 0)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;

    fn pod(name: &str) -> Pod {
        Pod::new(
            serde_json::from_value(json!({
                "metadata": {
                    "name": name, "namespace": "shop", "uid": name,
                    "labels": {"app": "web", "pod-template-hash": "abc"},
                    "annotations": {"example.com/big": "x".repeat(1000), "ambient.istio.io/redirection": "enabled"},
                    "ownerReferences": [{"apiVersion": "v1", "kind": "ReplicaSet", "name": "web-abc", "uid": "r", "controller": true}],
                },
                "spec": {"nodeName": "n1", "containers": [{
                    "name": "c", "image": "i", "ports": [{"name": "http", "containerPort": 8080}],
                    "readinessProbe": {"httpGet": {"port": "http"}},
                }]},
                "status": {"phase": "Running", "podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]},
            }))
            .expect("a pod"),
        )
    }

    #[test]
    fn pods_of_one_template_share_what_they_have_in_common() {
        let (one, other) = (pod("web-1"), pod("web-2"));
        assert!(std::ptr::eq(&*one.template, &*other.template));
        let own = BTreeMap::from([("statefulset.kubernetes.io/pod-name".to_owned(), "web-1".to_owned())]);
        let own = Template { labels: own.into(), ..Template::clone(&one.template) };
        assert!(std::ptr::eq(&*own, &**other.template), "labels of its own cost a pod its labels");
        assert_eq!(one.template.annotations.len(), 1, "only what is read is kept");
        assert_eq!(
            (one.workload_name(), one.port("http"), &*one.template.service_account),
            ("web", Some(8080), "default")
        );
        assert_eq!(one.template.calls, [Call { host: None, port: 8080 }]);
        assert!(size_of::<Pod>() <= 112, "{}", size_of::<Pod>());
    }

    #[test]
    fn versions_go_back_as_they_came_and_a_uid_is_one_that_an_api_server_gives_out() {
        for text in ["12345", "0", "007", "", "a1", "18446744073709551616"] {
            assert_eq!(ObjectVersion::new(text.into()).to_string(), text);
        }
        assert!(pod("web-1").uid.is_some());
        for uid in ["", "a_b", "a/b", "\u{e9}"] {
            assert_eq!(pod(uid).uid, None, "{uid}");
        }
    }
}
