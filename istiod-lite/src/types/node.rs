//! Nodes as the control plane remembers them: where they are. What they say of themselves besides is long, and nobody asks.

use std::collections::BTreeMap;

use internment::ArcIntern;
use k8s_openapi::api::core::v1 as api;

use super::Key;

/// A node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub key: Key,
    /// As its labels say. There are few, and all nodes of one share it.
    pub locality: ArcIntern<Locality>,
}

/// Where a node is; empty what it does not say.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Locality {
    pub region: String,
    pub zone: String,
    pub subzone: String,
}

impl Node {
    pub fn new(node: api::Node) -> Self {
        let key = Key::of(&node.metadata);
        let labels: BTreeMap<String, String> = node.metadata.labels.unwrap_or_default();
        let get = |name: &str| labels.get(name).cloned().unwrap_or_default();
        let locality = Locality {
            region: get("topology.kubernetes.io/region"),
            zone: get("topology.kubernetes.io/zone"),
            subzone: get("topology.istio.io/subzone"),
        };
        Self { key, locality: ArcIntern::new(locality) }
    }
}
