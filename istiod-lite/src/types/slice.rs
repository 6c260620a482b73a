//! EndpointSlices as the control plane remembers them: as with pods, only what is looked at is kept. Addresses and names of
//! pods are laid end to end, as there are as many of them as pods.

use std::net::IpAddr;
use std::sync::Arc;

use internment::ArcIntern;
use k8s_openapi::api::discovery::v1 as api;

use super::Key;

/// The label of a slice that names its Service.
pub const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// An EndpointSlice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slice {
    pub key: Key,
    /// The name of the Service that it is of.
    pub service: Option<Arc<str>>,
    pub address_type: AddressType,
    pub ports: ArcIntern<Vec<SlicePort>>,
    endpoints: Box<[Kept]>,
    /// Those of all endpoints, in their order.
    addresses: Box<[IpAddr]>,
    /// The names of the pods of all endpoints, in their order.
    pods: Box<str>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddressType {
    Ipv4,
    Ipv6,
    /// Of names, or of a type that is not known.
    Other,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SlicePort {
    /// Empty if it has none.
    pub name: String,
    pub number: Option<u16>,
    pub is_tcp: bool,
}

/// Where an endpoint's part of what the slice has of all ends, and with the one before where it starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kept {
    addresses_end: u32,
    pod_end: u32,
    is_pod: bool,
    is_ready: bool,
    is_serving: bool,
}

/// An endpoint of a slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SliceEndpoint<'a> {
    /// Those that are IP addresses.
    pub addresses: &'a [IpAddr],
    /// The name of the pod that it is, if it is one.
    pub pod: Option<&'a str>,
    /// One that says nothing is.
    pub is_ready: bool,
    /// Ready, whether or not it is to end.
    pub is_serving: bool,
}

impl Slice {
    pub fn new(slice: api::EndpointSlice) -> Self {
        let key = Key::of(&slice.metadata);
        let service = slice.metadata.labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME));
        let (mut addresses, mut pods) = (Vec::new(), String::new());
        let endpoints = slice.endpoints.into_iter().map(|endpoint| {
            addresses.extend(endpoint.addresses.iter().filter_map(|address| address.parse::<IpAddr>().ok()));
            let target = endpoint.target_ref.filter(|target| target.kind.as_deref() == Some("Pod"));
            let pod = target.and_then(|target| target.name);
            pods.push_str(pod.as_deref().unwrap_or_default());
            let conditions = endpoint.conditions.unwrap_or_default();
            Kept {
                addresses_end: place(addresses.len()),
                pod_end: place(pods.len()),
                is_pod: pod.is_some(),
                is_ready: conditions.ready.unwrap_or(true),
                is_serving: conditions.serving.or(conditions.ready).unwrap_or(true),
            }
        });
        let endpoints = endpoints.collect();
        Self {
            service: service.map(|name| Arc::from(name.as_str())),
            address_type: match slice.address_type.as_str() {
                "IPv4" => AddressType::Ipv4,
                "IPv6" => AddressType::Ipv6,
                _ => AddressType::Other,
            },
            ports: ArcIntern::new(slice.ports.into_iter().flatten().map(SlicePort::new).collect()),
            endpoints,
            addresses: addresses.into(),
            pods: pods.into(),
            key,
        }
    }

    pub fn endpoints(&self) -> impl Iterator<Item = SliceEndpoint<'_>> {
        let mut start = (0, 0);
        self.endpoints.iter().map(move |kept| {
            let end = (kept.addresses_end as usize, kept.pod_end as usize);
            let (addresses, pod) = (&self.addresses[start.0..end.0], &self.pods[start.1..end.1]);
            start = end;
            SliceEndpoint {
                addresses,
                pod: kept.is_pod.then_some(pod),
                is_ready: kept.is_ready,
                is_serving: kept.is_serving,
            }
        })
    }

    /// The names of the pods among its endpoints.
    pub fn pods(&self) -> impl Iterator<Item = &str> {
        self.endpoints().filter_map(|endpoint| endpoint.pod)
    }
}

/// No API takes an object that is too large for this.
fn place(at: usize) -> u32 {
    u32::try_from(at).expect("a slice is smaller than 4 GiB")
}

impl SlicePort {
    fn new(port: api::EndpointPort) -> Self {
        Self {
            name: port.name.unwrap_or_default(),
            number: port.port.and_then(|number| u16::try_from(number).ok()),
            is_tcp: port.protocol.is_none_or(|protocol| protocol == "TCP"),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn slice(name: &str, endpoints: &Value) -> Slice {
        Slice::new(
            serde_json::from_value(json!({
                "metadata": {"name": name, "namespace": "shop", "labels": {SERVICE_NAME: "web"}},
                "addressType": "IPv4",
                "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
                "endpoints": endpoints,
            }))
            .expect("a slice"),
        )
    }

    #[test]
    fn each_endpoint_has_its_own_addresses_and_pod() {
        let endpoints = json!([
            {"addresses": ["10.0.0.1"], "targetRef": {"kind": "Pod", "name": "web-1"}},
            {"addresses": ["web.test"], "conditions": {"ready": false}, "targetRef": {"kind": "Node", "name": "n1"}},
            {"addresses": ["10.0.0.3", "10.0.0.4"], "conditions": {"ready": false, "serving": true},
                "targetRef": {"kind": "Pod", "name": "web-22"}},
        ]);
        let slice = slice("web-x", &endpoints);
        let ip = |last| IpAddr::from([10, 0, 0, last]);
        let endpoint = |addresses, pod, is_ready, is_serving| SliceEndpoint { addresses, pod, is_ready, is_serving };
        let (one, two) = ([ip(1)], [ip(3), ip(4)]);
        let expected = [
            endpoint(&one, Some("web-1"), true, true),
            endpoint(&[], None, false, false),
            endpoint(&two, Some("web-22"), false, true),
        ];
        assert_eq!(slice.endpoints().collect::<Vec<_>>(), expected);
        assert_eq!(slice.pods().collect::<Vec<_>>(), ["web-1", "web-22"]);
        assert_eq!((slice.service.as_deref(), slice.address_type), (Some("web"), AddressType::Ipv4));
    }

    #[test]
    fn slices_take_little_and_share_ports_and_the_name_of_their_namespace() {
        let (one, other) = (slice("web-x", &json!([])), slice("web-y", &json!([])));
        assert!(std::ptr::eq(&*one.ports, &*other.ports));
        assert!(Arc::ptr_eq(&one.key.namespace, &other.key.namespace));
        assert!(size_of::<Slice>() <= 112, "{}", size_of::<Slice>());
        assert!(size_of::<Kept>() + size_of::<IpAddr>() <= 32, "of each endpoint, and the pod's name");
    }
}
