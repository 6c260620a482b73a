//! Istio's networking API, as far as it is read: ServiceEntry and WorkloadEntry. Field meanings are Istio's.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{CustomKind, Labels, Lenient};

pub const GROUP: &str = "networking.istio.io";

impl CustomKind for ServiceEntrySpec {
    const GROUP: &'static str = GROUP;
    const VERSION: &'static str = "v1";
    const KIND: &'static str = "ServiceEntry";
    const PLURAL: &'static str = "serviceentries";
}

impl CustomKind for WorkloadEntrySpec {
    const GROUP: &'static str = GROUP;
    const VERSION: &'static str = "v1";
    const KIND: &'static str = "WorkloadEntry";
    const PLURAL: &'static str = "workloadentries";
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceEntrySpec {
    pub hosts: Vec<String>,
    /// Addresses and CIDRs.
    pub addresses: Vec<String>,
    pub ports: Vec<Lenient<Port>>,
    /// `MESH_EXTERNAL` when empty.
    pub location: String,
    /// `NONE` when empty.
    pub resolution: String,
    pub endpoints: Vec<Lenient<WorkloadEntrySpec>>,
    pub workload_selector: Option<Selector>,
    pub export_to: Vec<String>,
    pub subject_alt_names: Vec<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Port {
    pub number: u16,
    #[serde(default)]
    pub protocol: String,
    #[serde(default)]
    pub name: String,
    /// At the endpoints; 0 is the same as absent.
    #[serde(default)]
    pub target_port: u16,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Selector {
    pub labels: Labels,
}

/// An endpoint, on its own or inside a ServiceEntry.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WorkloadEntrySpec {
    /// An IP address or a host name.
    pub address: String,
    /// By the name of the service's port.
    pub ports: BTreeMap<String, u16>,
    pub labels: Labels,
    pub network: String,
    /// `region/zone/subzone`, the latter ones optional.
    pub locality: String,
    /// 0 is the same as absent.
    pub weight: u32,
    pub service_account: String,
}

impl WorkloadEntrySpec {
    /// The service account that the workload runs as.
    pub fn account(&self) -> &str {
        if self.service_account.is_empty() { "default" } else { &self.service_account }
    }
}
