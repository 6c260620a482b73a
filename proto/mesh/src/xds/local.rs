//! A file in place of, or beside, the control plane (`LOCAL_XDS_PATH`).
//!
//! `workloads`, `services` and `policies` are written as Istio's ztunnel reads them; `enrolments` is ours and stands for
//! the pods a control plane would tell this node to capture. The file is read as a whole or not at all: one mistake
//! leaves everything as it was, since a file half applied is a mesh nobody described. What a later version of the file
//! no longer names is removed; what came from elsewhere is left alone.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use ipnet::IpNet;
use mesh_proto::enrolment::{CaptureOptions, FailureMode, PodEnrolment, Prefix};
use prost::Message;
use serde::Deserialize;

use super::{Rejected, ResourceHandler};
use crate::drain::DrainWatcher;
use crate::model::{
    ApplicationTunnel, EndpointPort, EndpointPorts, GatewayAddress, HealthStatus, IpFamilies, LoadBalancing, Locality,
    NamespacedHostname, NamespacedName, NetworkAddress, NetworkCidr, NetworkMode, Service, ServicePort, Template,
    TunnelProtocol, Visibility, WeightedWaypoint, Workload, WorkloadType,
};
use crate::policy::{Action, Group, Policy, Scope};
use crate::store::{Store, Update};

/// How often the file is looked at.
const POLL: Duration = Duration::from_millis(500);

/// Why the file was not, or not fully, applied.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    #[error("{}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    /// The text names line and column.
    #[error("{0}")]
    Parse(String),
    #[error("{kind} {name} is there twice")]
    Twice { kind: &'static str, name: String },
    #[error("enrolment {}: {}", .0.name, .0.reason)]
    Rejected(Rejected),
}

/// The content of one file.
#[derive(Debug, Default)]
pub struct LocalResources {
    pub workloads: Vec<Workload>,
    pub services: Vec<Service>,
    pub policies: Vec<Policy>,
    pub enrolments: Vec<PodEnrolment>,
}

/// Reads the YAML (or JSON) form.
///
/// # Errors
/// [`LocalError::Parse`] with line and column for anything unknown, missing or malformed; [`LocalError::Twice`].
pub fn parse(yaml: &str) -> Result<LocalResources, LocalError> {
    // A file of nothing but comments describes an empty mesh.
    let file: Option<File> = serde_saphyr::from_str(yaml).map_err(|error| LocalError::Parse(error.to_string()))?;
    let file = file.unwrap_or_default();
    let resources = LocalResources {
        workloads: file.workloads.into_iter().map(Into::into).collect(),
        services: file.services.into_iter().map(Into::into).collect(),
        policies: file.policies.into_iter().map(Into::into).collect(),
        enrolments: file.enrolments.into_iter().map(Into::into).collect(),
    };
    Names::of(&resources)?;
    Ok(resources)
}

/// The names of everything in a file.
#[derive(Debug, Default)]
struct Names {
    addresses: BTreeSet<String>,
    policies: BTreeSet<String>,
    enrolments: BTreeSet<String>,
}

impl Names {
    fn of(resources: &LocalResources) -> Result<Self, LocalError> {
        let mut names = Self::default();
        let once = |set: &mut BTreeSet<String>, kind, name: String| match set.insert(name.clone()) {
            true => Ok(()),
            false => Err(LocalError::Twice { kind, name }),
        };
        for workload in &resources.workloads {
            once(&mut names.addresses, "workload", workload.uid.to_string())?;
        }
        for service in &resources.services {
            once(&mut names.addresses, "service", service.key().to_string())?;
        }
        for policy in &resources.policies {
            once(&mut names.policies, "policy", policy.key().to_string())?;
        }
        for enrolment in &resources.enrolments {
            once(&mut names.enrolments, "enrolment", enrolment.uid.clone())?;
        }
        Ok(names)
    }
}

/// What distinguishes one version of the file from the next, also when it is replaced by renaming.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    length: u64,
    modified: (i64, i64),
}

#[derive(Debug, Default)]
struct Loaded {
    names: Names,
    stamp: Option<Stamp>,
}

/// Keeps the store as the file says.
pub struct LocalSource {
    path: PathBuf,
    store: Arc<Store>,
    enrolments: Option<Arc<dyn ResourceHandler>>,
    loaded: Mutex<Loaded>,
}

impl LocalSource {
    /// `enrolments` takes the file's pods as `PodEnrolment` resources, just as it takes the control plane's; without it
    /// the list is checked and otherwise ignored (by a waypoint, say).
    pub fn new(path: impl Into<PathBuf>, store: Arc<Store>, enrolments: Option<Arc<dyn ResourceHandler>>) -> Self {
        Self { path: path.into(), store, enrolments, loaded: Mutex::default() }
    }

    /// Reads the file and applies it.
    ///
    /// # Errors
    /// [`LocalError`]. But for `Rejected`, nothing has changed.
    pub fn load(&self) -> Result<(), LocalError> {
        let read = |source| LocalError::Read { path: self.path.clone(), source };
        let mut loaded = self.loaded.lock().expect("loading does not panic");
        // The stamp is taken first: a change while we read is seen by the next look. It stands even for a file that is
        // wrong, so that each mistake is told once.
        let stamp = self.stamp().map_err(read)?;
        loaded.stamp = Some(stamp);
        let text = std::fs::read_to_string(&self.path).map_err(read)?;
        let resources = parse(&text)?;
        let names = Names::of(&resources)?;
        let before = std::mem::replace(&mut loaded.names, names);
        let now = &loaded.names;

        let mut update = Update::new();
        for name in before.addresses.difference(&now.addresses) {
            update.push_remove_address(name);
        }
        for name in before.policies.difference(&now.policies) {
            update.push_remove_policy(name);
        }
        resources.services.into_iter().for_each(|service| update.push_service(service));
        resources.workloads.into_iter().for_each(|workload| update.push_workload(workload));
        resources.policies.into_iter().for_each(|policy| update.push_policy(policy));
        self.store.apply(update);

        let Some(handler) = &self.enrolments else { return Ok(()) };
        let removed = before.enrolments.difference(&now.enrolments).cloned().collect();
        let mut batch = handler.begin();
        for pod in &resources.enrolments {
            batch.update(&pod.uid.as_str().into(), &pod.encode_to_vec());
        }
        match batch.apply(removed).into_iter().next() {
            Some(rejected) => Err(LocalError::Rejected(rejected)),
            None => Ok(()),
        }
    }

    /// Loads each new version of the file until the drain begins.
    pub async fn run(self, drain: DrainWatcher) {
        // Only a change of what is told counts: a file that stays away is told once.
        let mut told = None;
        loop {
            let known = self.loaded.lock().expect("loading does not panic").stamp;
            let changed = match self.stamp() {
                Ok(stamp) => known != Some(stamp),
                Err(_) => true,
            };
            if changed {
                match self.load() {
                    Ok(()) => {
                        told = None;
                        tracing::info!(path = %self.path.display(), "local configuration loaded");
                    }
                    Err(error) => {
                        let error = error.to_string();
                        if told.as_ref() != Some(&error) {
                            tracing::error!("local configuration: {error}; what was loaded before stays");
                        }
                        told = Some(error);
                    }
                }
            }
            tokio::select! {
                () = drain.draining() => return,
                () = tokio::time::sleep(POLL) => {}
            }
        }
    }

    fn stamp(&self) -> std::io::Result<Stamp> {
        let metadata = std::fs::metadata(&self.path)?;
        let modified = (metadata.mtime(), metadata.mtime_nsec());
        Ok(Stamp { inode: metadata.ino(), length: metadata.len(), modified })
    }
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct File {
    workloads: Vec<LocalWorkload>,
    services: Vec<LocalService>,
    policies: Vec<LocalPolicy>,
    enrolments: Vec<LocalEnrolment>,
}

/// Ports as written: `80: 8080`, the key quoted or not.
type Ports = BTreeMap<PortKey, u16>;

#[derive(PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
struct PortKey(u16);

impl TryFrom<String> for PortKey {
    type Error = std::num::ParseIntError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse().map(Self)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct LocalWorkload {
    uid: Arc<str>,
    name: Arc<str>,
    namespace: Arc<str>,
    #[serde(default)]
    service_account: Option<Arc<str>>,
    #[serde(default)]
    trust_domain: Option<Arc<str>>,
    #[serde(default)]
    cluster_id: Option<Arc<str>>,
    #[serde(default)]
    workload_ips: Vec<IpAddr>,
    #[serde(default)]
    protocol: TunnelProtocol,
    #[serde(default)]
    network_mode: NetworkMode,
    #[serde(default)]
    network: Arc<str>,
    #[serde(default)]
    node: Arc<str>,
    #[serde(default)]
    hostname: Arc<str>,
    #[serde(default)]
    waypoint: Option<GatewayAddress>,
    #[serde(default)]
    network_gateway: Option<GatewayAddress>,
    #[serde(default)]
    canonical_name: Arc<str>,
    #[serde(default)]
    canonical_revision: Arc<str>,
    #[serde(default)]
    workload_name: Arc<str>,
    #[serde(default)]
    workload_type: WorkloadType,
    #[serde(default)]
    native_tunnel: bool,
    #[serde(default)]
    application_tunnel: Option<ApplicationTunnel>,
    #[serde(default)]
    authorization_policies: Vec<Arc<str>>,
    #[serde(default)]
    status: HealthStatus,
    #[serde(default)]
    locality: Locality,
    #[serde(default)]
    services: BTreeMap<NamespacedHostname, Ports>,
    #[serde(default)]
    capacity: Option<u32>,
}

impl From<LocalWorkload> for Workload {
    fn from(w: LocalWorkload) -> Self {
        let default = Template::default();
        let ports = |ports: Ports| -> EndpointPorts {
            let port = |(service_port, target_port): (PortKey, u16)| EndpointPort {
                service_port: service_port.0,
                target_port,
                app_protocol: Default::default(),
            };
            ports.into_iter().map(port).collect()
        };
        Workload {
            uid: w.uid,
            name: w.name,
            addresses: w.workload_ips.iter().map(IpAddr::to_canonical).collect(),
            node: w.node,
            status: w.status,
            template: Arc::new(Template {
                namespace: w.namespace,
                service_account: w.service_account.unwrap_or(default.service_account),
                trust_domain: w.trust_domain.unwrap_or(default.trust_domain),
                cluster_id: w.cluster_id.unwrap_or(default.cluster_id),
                protocol: w.protocol,
                network_mode: w.network_mode,
                network: w.network,
                hostname: w.hostname,
                waypoint: w.waypoint,
                network_gateway: w.network_gateway,
                canonical_name: w.canonical_name,
                canonical_revision: w.canonical_revision,
                workload_name: w.workload_name,
                workload_type: w.workload_type,
                native_tunnel: w.native_tunnel,
                application_tunnel: w.application_tunnel,
                authorization_policies: w.authorization_policies,
                locality: w.locality,
                services: w.services.into_iter().map(|(service, list)| (service, ports(list))).collect(),
                capacity: w.capacity.unwrap_or(default.capacity),
            }),
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct LocalService {
    name: Arc<str>,
    namespace: Arc<str>,
    hostname: Arc<str>,
    #[serde(default)]
    vips: Vec<NetworkAddress>,
    #[serde(default)]
    cidr_vips: Vec<NetworkCidr>,
    #[serde(default)]
    ports: Ports,
    #[serde(default)]
    subject_alt_names: Vec<Arc<str>>,
    #[serde(default)]
    waypoint: Option<GatewayAddress>,
    #[serde(default)]
    weighted_waypoints: Vec<WeightedWaypoint>,
    #[serde(default)]
    load_balancer: Option<LoadBalancing>,
    #[serde(default)]
    ip_families: Option<IpFamilies>,
    #[serde(default)]
    canonical: bool,
    #[serde(default)]
    ingress_use_waypoint: bool,
    #[serde(default)]
    visibility: Visibility,
}

impl From<LocalService> for Service {
    fn from(s: LocalService) -> Self {
        let port = |(service_port, target_port): (PortKey, u16)| {
            (service_port.0, ServicePort { target_port, app_protocol: Default::default() })
        };
        Service {
            name: s.name,
            namespace: s.namespace,
            hostname: s.hostname,
            vips: s.vips,
            cidr_vips: s.cidr_vips,
            ports: s.ports.into_iter().map(port).collect(),
            subject_alt_names: s.subject_alt_names,
            waypoint: s.waypoint,
            weighted_waypoints: s.weighted_waypoints,
            load_balancing: s.load_balancer.unwrap_or_default(),
            ip_families: s.ip_families.unwrap_or_default(),
            canonical: s.canonical,
            ingress_use_waypoint: s.ingress_use_waypoint,
            visibility: s.visibility,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct LocalPolicy {
    name: Arc<str>,
    namespace: Arc<str>,
    scope: Scope,
    action: Action,
    #[serde(default)]
    rules: Vec<Group>,
    #[serde(default)]
    dry_run: bool,
}

impl From<LocalPolicy> for Policy {
    fn from(p: LocalPolicy) -> Self {
        let policy = Policy::new(NamespacedName::new(p.namespace, p.name), p.scope, p.action, p.rules);
        if p.dry_run { policy.dry_run_only() } else { policy }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct LocalEnrolment {
    uid: String,
    name: String,
    namespace: String,
    #[serde(default = "default_service_account")]
    service_account: String,
    #[serde(default)]
    addresses: Vec<IpAddr>,
    workload_uid: String,
    #[serde(default)]
    failure_mode: LocalFailureMode,
    #[serde(default)]
    bypass_inbound: bool,
    #[serde(default)]
    excluded_destinations: Vec<IpNet>,
    #[serde(default)]
    excluded_outbound_ports: Vec<u16>,
    #[serde(default)]
    excluded_inbound_ports: Vec<u16>,
    #[serde(default)]
    probe_ports: Vec<u16>,
    #[serde(default = "captured")]
    dns_capture: bool,
}

const fn captured() -> bool {
    true
}

fn default_service_account() -> String {
    crate::model::DEFAULT_SERVICE_ACCOUNT.to_owned()
}

#[derive(Deserialize, Default)]
enum LocalFailureMode {
    #[default]
    Closed,
    Open,
}

fn octets(address: IpAddr) -> Bytes {
    match address {
        IpAddr::V4(v4) => Bytes::copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => Bytes::copy_from_slice(&v6.octets()),
    }
}

impl From<LocalEnrolment> for PodEnrolment {
    fn from(e: LocalEnrolment) -> Self {
        let failure_mode = match e.failure_mode {
            LocalFailureMode::Closed => FailureMode::Closed,
            LocalFailureMode::Open => FailureMode::Open,
        };
        let prefix = |range: IpNet| Prefix { address: octets(range.addr()), length: range.prefix_len().into() };
        PodEnrolment {
            uid: e.uid,
            name: e.name,
            namespace: e.namespace,
            service_account: e.service_account,
            addresses: e.addresses.into_iter().map(octets).collect(),
            workload_uid: e.workload_uid,
            epoch: 0,
            probe_ports: e.probe_ports.into_iter().map(u32::from).collect(),
            capture: Some(CaptureOptions {
                failure_mode: failure_mode as i32,
                bypass_inbound: e.bypass_inbound,
                excluded_destinations: e.excluded_destinations.into_iter().map(prefix).collect(),
                dns: e.dns_capture,
                excluded_outbound_ports: e.excluded_outbound_ports.into_iter().map(u32::from).collect(),
                excluded_inbound_ports: e.excluded_inbound_ports.into_iter().map(u32::from).collect(),
            }),
        }
    }
}

#[cfg(test)]
mod tests;
