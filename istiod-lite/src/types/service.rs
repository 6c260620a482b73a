//! Services as the control plane remembers them: as with pods, only what is looked at is kept.

use std::collections::BTreeMap;
use std::net::IpAddr;

use internment::ArcIntern;
use k8s_openapi::api::core::v1 as api;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::{Key, Labels, Meta, created};

/// A Service.
#[derive(Debug, Clone, PartialEq)]
pub struct Service {
    pub key: Key,
    /// `metadata.resourceVersion`.
    pub version: Box<str>,
    /// 0 on older clusters.
    pub generation: i64,
    /// In nanoseconds since the epoch; 0 if unset.
    pub created: i64,
    /// Only those of Istio's groups.
    labels: ArcIntern<Labels>,
    /// Only those of Istio's groups.
    annotations: ArcIntern<Labels>,
    pub spec: Option<ServiceSpec>,
    /// `status.conditions`, those of others as well: they are written together.
    pub conditions: Box<[Condition]>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceSpec {
    /// It is of type `ExternalName`.
    pub is_external: bool,
    /// Empty if there is none.
    pub selector: ArcIntern<Labels>,
    pub ports: ArcIntern<Vec<ServicePort>>,
    /// As it was given out: also `None`.
    pub cluster_ip: Option<Box<str>>,
    /// `clusterIPs`, or `clusterIP`: those that are addresses.
    pub vips: Box<[IpAddr]>,
    /// Of `ipFamilies`.
    pub has_ipv4: bool,
    pub has_ipv6: bool,
    pub traffic_distribution: Option<ArcIntern<str>>,
    /// `internalTrafficPolicy` is `Local`.
    pub is_local: bool,
    pub publishes_not_ready: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ServicePort {
    /// Empty if it has none.
    pub name: String,
    pub number: i32,
    pub is_tcp: bool,
    /// Empty if it has none.
    pub app_protocol: String,
    pub target: TargetPort,
}

/// The port of a workload that is behind one of a Service.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum TargetPort {
    /// Of the same number.
    Same,
    Number(i32),
    Name(String),
}

impl Service {
    pub fn new(service: api::Service) -> Self {
        let meta = service.metadata;
        let key = Key::of(&meta);
        let created = created(&meta);
        let kept = |labels: Option<BTreeMap<String, String>>| {
            let mut labels = labels.unwrap_or_default();
            labels.retain(|name, _| is_read(name));
            ArcIntern::new(Labels::from(labels))
        };
        Self {
            version: meta.resource_version.unwrap_or_default().into(),
            generation: meta.generation.unwrap_or_default(),
            created,
            labels: kept(meta.labels),
            annotations: kept(meta.annotations),
            spec: service.spec.map(ServiceSpec::new),
            conditions: service.status.and_then(|status| status.conditions).unwrap_or_default().into(),
            key,
        }
    }

    /// A name for what is elsewhere, which the mesh does not know.
    pub fn is_external(&self) -> bool {
        self.spec.as_ref().is_some_and(|spec| spec.is_external)
    }

    pub fn is_headless(&self) -> bool {
        self.spec.as_ref().is_some_and(|spec| spec.cluster_ip.as_deref() == Some("None"))
    }

    pub fn ports(&self) -> &[ServicePort] {
        self.spec.as_ref().map_or(&[], |spec| &spec.ports)
    }

    /// Cluster IPs; none for a headless Service or one that has not been given any yet.
    pub fn vips(&self) -> &[IpAddr] {
        self.spec.as_ref().map_or(&[], |spec| &spec.vips)
    }
}

impl Meta for Service {
    fn namespace_name(&self) -> &str {
        &self.key.namespace
    }

    fn label(&self, name: &str) -> Option<&str> {
        self.labels.get(name)
    }

    fn annotation(&self, name: &str) -> Option<&str> {
        self.annotations.get(name)
    }
}

fn is_read(name: &str) -> bool {
    let group = name.split_once('/').map_or("", |(group, _)| group);
    group == "istio.io" || group.ends_with(".istio.io")
}

impl ServiceSpec {
    fn new(spec: api::ServiceSpec) -> Self {
        let many = spec.cluster_ips.unwrap_or_default();
        let one = if many.is_empty() { spec.cluster_ip.as_slice() } else { &[] };
        let families = spec.ip_families.unwrap_or_default();
        Self {
            is_external: spec.type_.as_deref() == Some("ExternalName"),
            selector: ArcIntern::new(spec.selector.unwrap_or_default().into()),
            ports: ArcIntern::new(spec.ports.into_iter().flatten().map(ServicePort::new).collect()),
            vips: many.iter().chain(one).filter_map(|ip| ip.parse().ok()).collect(),
            cluster_ip: spec.cluster_ip.map(Box::from),
            has_ipv4: families.iter().any(|family| family == "IPv4"),
            has_ipv6: families.iter().any(|family| family == "IPv6"),
            traffic_distribution: spec.traffic_distribution.as_deref().map(ArcIntern::from),
            is_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
            publishes_not_ready: spec.publish_not_ready_addresses == Some(true),
        }
    }
}

impl ServicePort {
    fn new(port: api::ServicePort) -> Self {
        Self {
            name: port.name.unwrap_or_default(),
            number: port.port,
            is_tcp: port.protocol.is_none_or(|protocol| protocol == "TCP"),
            app_protocol: port.app_protocol.unwrap_or_default(),
            target: match port.target_port {
                // Zero means the same as absent.
                None | Some(IntOrString::Int(0)) => TargetPort::Same,
                Some(IntOrString::Int(number)) => TargetPort::Number(number),
                Some(IntOrString::String(name)) => TargetPort::Name(name),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn service(name: &str) -> Service {
        Service::new(
            serde_json::from_value(json!({
                "metadata": {
                    "name": name, "namespace": "shop", "resourceVersion": "7", "generation": 2,
                    "labels": {"app": name, "istio.io/use-waypoint": "waypoint"},
                    "annotations": {
                        "example.com/big": "x".repeat(1000),
                        "networking.istio.io/traffic-distribution": "PreferClose",
                    },
                },
                "spec": {
                    "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1", "fd00::1"], "ipFamilies": ["IPv4", "IPv6"],
                    "selector": {"app": "web"}, "ports": [{"name": "http", "port": 80, "targetPort": 0}],
                },
            }))
            .expect("a Service"),
        )
    }

    #[test]
    fn services_share_what_they_have_in_common_and_only_what_is_read_is_kept() {
        let (one, other) = (service("web"), service("web-2"));
        assert!(std::ptr::eq(&*one.labels, &*other.labels), "their own labels are not read");
        assert!(std::ptr::eq(one.ports(), other.ports()));
        assert_eq!((one.labels.len(), one.annotations.len()), (1, 1));
        assert_eq!(one.vips(), ["10.96.0.1".parse::<IpAddr>().unwrap(), "fd00::1".parse().unwrap()]);
        assert_eq!(one.ports()[0].target, TargetPort::Same);
        assert!(size_of::<Service>() <= 192, "{}", size_of::<Service>());
    }
}
