//! What the mesh knows about workloads and services, in types that cannot be half-valid.
//!
//! The wire types are turned into these once, in [`wire`]; everything behind that point may rely on parsed addresses,
//! known enum values and filled-in defaults. Serialisation is the shape of `/config_dump`. This module knows nothing of
//! how resources arrive or how they are looked up.

mod describe;
mod memberships;
mod shared;
mod wire;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::ops::{Deref, DerefMut};
use std::str::FromStr;
use std::sync::{Arc, OnceLock};

use ipnet::IpNet;
use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};

use crate::identity::{Identity, IdentityParseError};
use crate::text::Text;

pub use memberships::Memberships;
pub use shared::{Shared, Sharing};
pub use wire::{ModelError, ip_from_bytes};

/// The port HBONE listens on unless a resource says otherwise.
pub const HBONE_PORT: u16 = 15008;
/// What the control plane leaves out of a workload because nearly all have it.
pub const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";
pub const DEFAULT_SERVICE_ACCOUNT: &str = "default";
pub const DEFAULT_CLUSTER_ID: &str = "Kubernetes";

/// The defaults as shared strings: a hundred thousand workloads hold the same three.
static TRUST_DOMAIN: OnceLock<Arc<str>> = OnceLock::new();
static SERVICE_ACCOUNT: OnceLock<Arc<str>> = OnceLock::new();
static CLUSTER_ID: OnceLock<Arc<str>> = OnceLock::new();

fn default_text(shared: &'static OnceLock<Arc<str>>, text: &str) -> Arc<str> {
    shared.get_or_init(|| text.into()).clone()
}

/// A text that should have been `<first>/<second>`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not of the form {form}")]
pub struct ParseNameError {
    text: String,
    form: &'static str,
}

/// `<namespace>/<hostname>`: the key of a service.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamespacedHostname {
    pub namespace: Arc<str>,
    pub hostname: Arc<str>,
}

/// `<namespace>/<name>`: the key of a policy.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamespacedName {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl NamespacedHostname {
    pub fn new(namespace: impl Into<Arc<str>>, hostname: impl Into<Arc<str>>) -> Self {
        Self { namespace: namespace.into(), hostname: hostname.into() }
    }
}

impl NamespacedName {
    pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

/// Splits `a/b`; both parts must be there and the second may not contain another slash.
fn split_pair<'a>(text: &'a str, form: &'static str) -> Result<(&'a str, &'a str), ParseNameError> {
    match text.split_once('/') {
        Some((first, second)) if !first.is_empty() && !second.is_empty() && !second.contains('/') => {
            Ok((first, second))
        }
        _ => Err(ParseNameError { text: text.to_owned(), form }),
    }
}

impl FromStr for NamespacedHostname {
    type Err = ParseNameError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        split_pair(text, "<namespace>/<hostname>").map(|(namespace, hostname)| Self::new(namespace, hostname))
    }
}

impl FromStr for NamespacedName {
    type Err = ParseNameError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        split_pair(text, "<namespace>/<name>").map(|(namespace, name)| Self::new(namespace, name))
    }
}

impl fmt::Display for NamespacedHostname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.hostname)
    }
}

impl fmt::Display for NamespacedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// An address within a network (networks may reuse each other's ranges).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetworkAddress {
    pub network: Arc<str>,
    pub address: IpAddr,
}

impl fmt::Display for NetworkAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.address)
    }
}

impl FromStr for NetworkAddress {
    type Err = ParseNameError;
    /// The network may be empty, as in `/10.0.0.1`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (network, address) = text.split_once('/').unwrap_or(("", text));
        let address =
            address.parse().map_err(|_| ParseNameError { text: text.to_owned(), form: "<network>/<address>" })?;
        Ok(Self { network: network.into(), address })
    }
}

/// A range of virtual addresses within a network.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetworkCidr {
    pub network: Arc<str>,
    /// Host bits are zero.
    pub cidr: IpNet,
}

impl fmt::Display for NetworkCidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.cidr)
    }
}

impl FromStr for NetworkCidr {
    type Err = ParseNameError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseNameError { text: text.to_owned(), form: "<network>/<address>/<length>" };
        let (network, cidr) = text.split_once('/').ok_or_else(error)?;
        let cidr: IpNet = cidr.parse().map_err(|_| error())?;
        Ok(Self { network: network.into(), cidr: cidr.trunc() })
    }
}

/// Text form in logs, debug output and JSON alike.
macro_rules! as_text {
    ($($type:ty),*) => {$(
        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}
as_text!(NamespacedHostname, NamespacedName, NetworkAddress, NetworkCidr, GatewayDestination);

/// Where a waypoint or network gateway is found.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum GatewayDestination {
    Hostname(NamespacedHostname),
    Address(NetworkAddress),
}

impl fmt::Display for GatewayDestination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hostname(hostname) => hostname.fmt(f),
            Self::Address(address) => address.fmt(f),
        }
    }
}

impl FromStr for GatewayDestination {
    type Err = ParseNameError;
    /// What parses as an address after the slash is one; no hostname does.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        text.parse().map(Self::Hostname)
    }
}

/// A reference to a waypoint or network gateway.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GatewayAddress {
    pub destination: GatewayDestination,
    #[serde(default = "hbone_port")]
    pub hbone_mtls_port: u16,
}

fn hbone_port() -> u16 {
    HBONE_PORT
}

/// How a workload is reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum TunnelProtocol {
    /// Plain TCP.
    #[default]
    #[serde(rename = "TCP")]
    None,
    #[serde(rename = "HBONE")]
    Hbone,
}

/// The kind of controller behind a workload; telemetry only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WorkloadType {
    #[default]
    Deployment,
    CronJob,
    Pod,
    Job,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum HealthStatus {
    #[default]
    Healthy,
    Unhealthy,
}

/// Whether the workload owns its addresses or shares its node's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum NetworkMode {
    #[default]
    Standard,
    HostNetwork,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum AppProtocol {
    #[default]
    Unknown,
    Http11,
    Http2,
    Grpc,
    Tcp,
    Tls,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Locality {
    pub region: Arc<str>,
    pub zone: Arc<str>,
    pub subzone: Arc<str>,
}

impl Locality {
    fn is_empty(&self) -> bool {
        self.region.is_empty() && self.zone.is_empty() && self.subzone.is_empty()
    }
}

/// How the application itself wants to be told about the original connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ApplicationTunnel {
    pub protocol: ApplicationTunnelProtocol,
    /// The port that takes all connections; `None` = each its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum ApplicationTunnelProtocol {
    #[default]
    None,
    /// PROXY protocol version 2.
    Proxy,
}

/// A service port as one endpoint serves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EndpointPort {
    pub service_port: u16,
    /// 0: the endpoint does not say; the service's own target port applies.
    pub target_port: u16,
    pub app_protocol: AppProtocol,
}

/// The ports of one service on one endpoint. Cheap to clone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct EndpointPorts(Arc<[EndpointPort]>);

impl EndpointPorts {
    /// The endpoint's port behind `service_port`; `None` when it does not name one.
    pub fn target(&self, service_port: u16) -> Option<u16> {
        self.get(service_port).map(|port| port.target_port).filter(|port| *port != 0)
    }

    pub fn get(&self, service_port: u16) -> Option<&EndpointPort> {
        self.0.iter().find(|port| port.service_port == service_port)
    }

    pub fn iter(&self) -> impl Iterator<Item = &EndpointPort> {
        self.0.iter()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether somebody else has the same list.
    fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }
}

impl FromIterator<EndpointPort> for EndpointPorts {
    fn from_iter<I: IntoIterator<Item = EndpointPort>>(ports: I) -> Self {
        Self(ports.into_iter().collect())
    }
}

impl Serialize for EndpointPorts {
    /// `{"80": 8080}`.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for port in self.iter() {
            map.serialize_entry(&port.service_port.to_string(), &port.target_port)?;
        }
        map.end()
    }
}

/// One pod, VM or external endpoint. What is its own, and by dereferencing what it has of its [`Template`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Workload {
    pub uid: Arc<str>,
    pub name: Arc<str>,
    #[serde(rename = "workloadIps")]
    pub addresses: Vec<IpAddr>,
    #[serde(skip_serializing_if = "str::is_empty")]
    pub node: Arc<str>,
    pub status: HealthStatus,
    /// Shared by those that have it in common; a change through [`Workload`] leaves the others alone.
    #[serde(flatten)]
    pub template: Arc<Template>,
}

/// What the pods of one deployment have in common, but for where they run: kept once, a mesh of a hundred thousand
/// workloads fits.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Template {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waypoint: Option<GatewayAddress>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_gateway: Option<GatewayAddress>,
    pub protocol: TunnelProtocol,
    pub network_mode: NetworkMode,
    pub namespace: Arc<str>,
    pub trust_domain: Arc<str>,
    pub service_account: Arc<str>,
    #[serde(skip_serializing_if = "str::is_empty")]
    pub network: Arc<str>,
    #[serde(skip_serializing_if = "str::is_empty")]
    pub workload_name: Arc<str>,
    pub workload_type: WorkloadType,
    #[serde(skip_serializing_if = "str::is_empty")]
    pub canonical_name: Arc<str>,
    #[serde(skip_serializing_if = "str::is_empty")]
    pub canonical_revision: Arc<str>,
    /// Resolved at connect time when there are no addresses.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub hostname: Arc<str>,
    /// It speaks HBONE itself and is not captured.
    pub native_tunnel: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub application_tunnel: Option<ApplicationTunnel>,
    /// Selector policies, `<namespace>/<name>`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub authorization_policies: Vec<Arc<str>>,
    pub cluster_id: Arc<str>,
    #[serde(skip_serializing_if = "Locality::is_empty")]
    pub locality: Locality,
    /// The services this workload is an endpoint of, with its ports for each.
    #[serde(skip_serializing_if = "Memberships::is_empty", serialize_with = "keys")]
    pub services: Memberships,
    /// Share of new connections relative to other endpoints; 0 = none.
    pub capacity: u32,
}

fn keys<S: Serializer>(services: &Memberships, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(services.keys())
}

impl Default for Template {
    /// Of a workload nobody has described yet, with the defaults the wire leaves out.
    fn default() -> Self {
        Self {
            waypoint: None,
            network_gateway: None,
            protocol: TunnelProtocol::None,
            network_mode: NetworkMode::Standard,
            namespace: Arc::default(),
            trust_domain: default_text(&TRUST_DOMAIN, DEFAULT_TRUST_DOMAIN),
            service_account: default_text(&SERVICE_ACCOUNT, DEFAULT_SERVICE_ACCOUNT),
            network: Arc::default(),
            workload_name: Arc::default(),
            workload_type: WorkloadType::default(),
            canonical_name: Arc::default(),
            canonical_revision: Arc::default(),
            hostname: Arc::default(),
            native_tunnel: false,
            application_tunnel: None,
            authorization_policies: Vec::new(),
            cluster_id: default_text(&CLUSTER_ID, DEFAULT_CLUSTER_ID),
            locality: Locality::default(),
            services: Memberships::default(),
            capacity: 1,
        }
    }
}

impl Deref for Workload {
    type Target = Template;

    fn deref(&self) -> &Template {
        &self.template
    }
}

impl DerefMut for Workload {
    fn deref_mut(&mut self) -> &mut Template {
        Arc::make_mut(&mut self.template)
    }
}

impl Workload {
    /// The same with a change.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// The SPIFFE identity the workload must present.
    ///
    /// # Errors
    /// When a part is empty or malformed, as for gateways that belong to no namespace: nothing can prove to be it.
    pub fn identity(&self) -> Result<Identity, IdentityParseError> {
        Identity::new(&self.trust_domain, &self.namespace, &self.service_account)
    }
}

/// What a service says about one of its ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ServicePort {
    /// 0: named port, each endpoint says for itself.
    pub target_port: u16,
    pub app_protocol: AppProtocol,
}

impl Serialize for ServicePort {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u16(self.target_port)
    }
}

/// What two workloads may have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum RoutingScope {
    Region,
    Zone,
    Subzone,
    Node,
    Cluster,
    Network,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum LoadBalancingMode {
    #[default]
    Standard,
    Strict,
    Failover,
    Passthrough,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum HealthPolicy {
    #[default]
    OnlyHealthy,
    AllowAll,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct LoadBalancing {
    pub routing_preferences: Vec<RoutingScope>,
    pub mode: LoadBalancingMode,
    pub health_policy: HealthPolicy,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum IpFamilies {
    #[default]
    Automatic,
    #[serde(rename = "IPv4")]
    Ipv4,
    #[serde(rename = "IPv6")]
    Ipv6,
    Dual,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Visibility {
    #[default]
    Public,
    /// Only for clients in the service's namespace.
    Namespace,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WeightedWaypoint {
    pub destination: GatewayAddress,
    pub weight: u32,
}

/// A name clients call, with its virtual addresses and ports.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Service {
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub hostname: Arc<str>,
    /// Empty = headless.
    pub vips: Vec<NetworkAddress>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cidr_vips: Vec<NetworkCidr>,
    pub ports: BTreeMap<u16, ServicePort>,
    /// SPIFFE IDs endpoints may present beside their own.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub subject_alt_names: Vec<Arc<str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waypoint: Option<GatewayAddress>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub weighted_waypoints: Vec<WeightedWaypoint>,
    #[serde(rename = "loadBalancer", skip_serializing_if = "is_default")]
    pub load_balancing: LoadBalancing,
    #[serde(skip_serializing_if = "is_default")]
    pub ip_families: IpFamilies,
    /// The one to take when several namespaces declare the hostname.
    pub canonical: bool,
    #[serde(skip_serializing_if = "is_default")]
    pub ingress_use_waypoint: bool,
    pub visibility: Visibility,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Service {
    pub fn key(&self) -> NamespacedHostname {
        NamespacedHostname { namespace: self.namespace.clone(), hostname: self.hostname.clone() }
    }

    /// Whether a client in `namespace` may know of the service.
    pub fn visible_to(&self, namespace: &str) -> bool {
        match self.visibility {
            Visibility::Public => true,
            Visibility::Namespace => &*self.namespace == namespace,
        }
    }
}

/// The content of one `istio.workload.Address` resource.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resource {
    Workload(Workload),
    Service(Service),
}

impl Resource {
    /// The xDS resource name this content belongs under.
    pub fn name(&self) -> String {
        match self {
            Self::Workload(workload) => workload.uid.to_string(),
            Self::Service(service) => service.key().to_string(),
        }
    }
}
