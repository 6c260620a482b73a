//! Resources and a model client for tests of the exchange.

use std::collections::BTreeMap;

use mesh_proto::ads::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use mesh_proto::workload::{ADDRESS_TYPE, Address, PortList, Service, Workload, address};
use prost::Message as _;

use crate::push::answer::{Answer, Writer};
use crate::resources::Resource;

/// An Address holding a workload on `node` behind `services`.
pub fn workload(uid: &str, node: &str, services: &[&str]) -> Resource {
    let workload = Workload {
        uid: uid.into(),
        node: node.into(),
        services: services.iter().map(|name| (name.to_string(), PortList::default())).collect(),
        ..Workload::default()
    };
    let mut resource = Resource::new(ADDRESS_TYPE, uid, &Address { r#type: Some(address::Type::Workload(workload)) });
    resource = resource.with_aliases(vec![format!("/{uid}-ip")]);
    resource
}

/// An Address holding a service with a VIP alias `/<vip>`.
pub fn service(name: &str, vip: &str) -> Resource {
    let service = Service { name: name.into(), ..Service::default() };
    let mut resource = Resource::new(ADDRESS_TYPE, name, &Address { r#type: Some(address::Type::Service(service)) });
    resource = resource.with_aliases(vec![format!("/{vip}")]);
    resource
}

/// What a well-behaved client holds of one type.
#[derive(Debug, Default, Clone)]
pub struct Held(pub BTreeMap<String, String>);

impl Held {
    /// Applies a response as a client does.
    pub fn apply(&mut self, response: &DeltaDiscoveryResponse) {
        for resource in &response.resources {
            self.0.insert(resource.name.clone(), resource.version.clone());
        }
        for name in &response.removed_resources {
            self.0.remove(name);
        }
    }

    pub fn names(&self) -> Vec<&str> {
        self.0.keys().map(String::as_str).collect()
    }
}

/// What a client reads that is sent `answer`.
pub fn read(answer: &Answer) -> DeltaDiscoveryResponse {
    let mut writer = Writer::new(answer.clone()).expect("of a message's length");
    let pieces: Vec<_> = std::iter::from_fn(|| writer.piece()).collect();
    DeltaDiscoveryResponse::decode(&pieces.concat()[5..]).expect("a message")
}

/// A request for `type_url` with nothing else in it.
pub fn request(type_url: &str) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest { type_url: type_url.into(), ..DeltaDiscoveryRequest::default() }
}

/// The acknowledgement of `response`.
pub fn ack(response: &DeltaDiscoveryResponse) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest { response_nonce: response.nonce.clone(), ..request(&response.type_url) }
}
