//! WorkloadEntries, and endpoints that ServiceEntries list, as the mesh's workloads.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use mesh_proto::workload::{
    Address, GatewayAddress, Locality, PortList, TunnelProtocol, Workload, WorkloadStatus, WorkloadType, address,
};

use super::binding::{self, TrafficType};
use super::networks;
use super::service_entry::{self, Entries, is_hostname};
use super::verdict::{EXPLAIN, Kind, Problem, Report, Status, Verdict, Wanted};
use super::workload::{self, NATIVE_TUNNEL, elide};
use super::world::View;
use super::{address_bytes, address_resource};
use crate::resources::Resource;
use crate::types::networking::{self, WorkloadEntrySpec};
use crate::types::{Key, Labels, Object, annotation};

const OWNED: &[&str] = &[service_entry::ACCEPTED, "istio.io/WaypointBound"];
/// `true`: the condition `Healthy` says whether the workload may receive connections.
const HEALTH_CHECKED: &str = "proxy.istio.io/health-checks-enabled";

/// One endpoint and what is known around it.
#[derive(Debug, Default)]
pub struct Endpoint {
    pub uid: String,
    pub spec: WorkloadEntrySpec,
    pub services: BTreeMap<String, PortList>,
    pub is_unhealthy: bool,
    pub policies: Vec<String>,
    pub waypoint: Option<GatewayAddress>,
}

/// Labels of the object and of the workload, the latter's first.
pub fn labels(object: &Object<WorkloadEntrySpec>) -> Labels {
    match &object.spec {
        Ok(spec) => labels_of(&object.meta, spec),
        Err(_) => object.meta.labels.clone().unwrap_or_default().into(),
    }
}

/// The same for any workload that `meta`'s object lists.
pub fn labels_of(meta: &ObjectMeta, spec: &WorkloadEntrySpec) -> Labels {
    let mut labels = meta.labels.clone().unwrap_or_default();
    labels.extend(spec.labels.iter().map(|(name, value)| (name.to_owned(), value.to_owned())));
    labels.into()
}

/// The services that select it, its ports behind each.
pub fn services(
    view: View<'_>,
    entries: &Entries<'_>,
    object: &Object<WorkloadEntrySpec>,
) -> BTreeMap<String, PortList> {
    let Ok(spec) = &object.spec else { return BTreeMap::new() };
    let labels = labels(object);
    let mut services = workload::services_of_labels(view, object.namespace(), &labels, &spec.ports);
    let selecting = service_entry::services_selecting(entries, object.namespace(), &labels, &spec.ports);
    services.extend(selecting);
    services
}

/// The workload of a WorkloadEntry, and what became of the object.
pub fn translate(
    view: View<'_>,
    entries: &Entries<'_>,
    key: &Key,
    object: &Object<WorkloadEntrySpec>,
    policies: Vec<String>,
) -> (Option<Resource>, Verdict) {
    let world = view.world;
    let (resource, wanted) = match &object.spec {
        Err(reason) => (None, vec![invalid(Unusable { reason: reason.clone(), mend: Some(EXPLAIN) })]),
        Ok(spec) => {
            let binding = binding::resolve(world, &object.meta, TrafficType::Workload);
            let endpoint = Endpoint {
                uid: format!("{}/{}/WorkloadEntry/{key}", world.mesh.cluster_id, networking::GROUP),
                spec: spec.clone(),
                services: services(view, entries, object),
                is_unhealthy: !is_healthy(object),
                policies,
                waypoint: binding.address.map(|address| *address),
            };
            let other = view.owned().host(&spec.address.to_ascii_lowercase(), &key.namespace);
            let resource = match other {
                Some(other) => Err(format!("address: {:?} belongs to {other}", spec.address).into()),
                None => resource(view, &object.meta, &endpoint, true),
            };
            match resource {
                Ok(resource) => {
                    let accepted =
                        Wanted::new(service_entry::ACCEPTED, Status::True, "Accepted", "all of it is enforced");
                    (
                        Some(resource),
                        [accepted].into_iter().chain(binding.condition.map(|condition| *condition)).collect(),
                    )
                }
                Err(unusable) => (None, vec![invalid(unusable)]),
            }
        }
    };
    let report = Report::Conditions { owned: OWNED, wanted };
    (resource, Verdict { kind: Kind::WorkloadEntry, key: key.clone(), generation: object.generation(), report })
}

fn invalid(unusable: Unusable) -> Wanted {
    let problem = unusable.worded(|reason| reason);
    let message = format!("{}; it is not known to the mesh", problem.message);
    Wanted::new(service_entry::ACCEPTED, Status::False, "Invalid", message).because([&problem])
}

/// Why there is no such workload.
#[derive(Debug)]
pub struct Unusable {
    pub reason: String,
    /// `None`: something else than the object may mend it.
    pub mend: Option<&'static str>,
}

impl Unusable {
    /// As a problem of an object that says so in these words.
    pub fn worded(self, words: impl FnOnce(String) -> String) -> Problem {
        let message = words(self.reason);
        match self.mend {
            Some(mend) => Problem::fault(message, mend),
            None => message.into(),
        }
    }
}

impl From<String> for Unusable {
    fn from(reason: String) -> Self {
        Self { reason, mend: None }
    }
}

/// The workload that `meta`'s object lists; an error says why there is none. `by_name`: its address may be a host name.
pub fn resource(view: View<'_>, meta: &ObjectMeta, endpoint: &Endpoint, by_name: bool) -> Result<Resource, Unusable> {
    let world = view.world;
    let unusable = |reason: String, mend| Err(Unusable { reason, mend: Some(mend) });
    let Endpoint { uid, spec, services, is_unhealthy, policies, waypoint } = endpoint;
    let network = networks::of_entry(world, meta, spec);
    let way = (network != world.network()).then(|| view.networks.way(network)).flatten();
    // As proxies read it: one IPv4 address has one form.
    let (addresses, hostname) = match spec.address.parse::<IpAddr>().map(|ip| ip.to_canonical()) {
        // A workload of that address would be taken for what is dialled there.
        Ok(ip)
            if network == world.network()
                && let Some(service) = view.owned().cluster_ip(ip) =>
        {
            return Err(format!("address: {ip} belongs to {service}").into());
        }
        // Nor for the gateway that others are reached by.
        Ok(ip) if let Some(gateway) = view.networks.owner(network, ip) => {
            return Err(format!("address: {ip} belongs to {gateway}").into());
        }
        Ok(ip) => (vec![ip], String::new()),
        // The gateway of its network knows the way.
        Err(_) if spec.address.is_empty() && way.is_some() => (Vec::new(), String::new()),
        Err(_) if spec.address.is_empty() && network != world.network() => {
            let reason =
                format!("address: there is none, and no Gateway of class istio-remote leads to network {network}");
            return Err(reason.into());
        }
        Err(_) if spec.address.is_empty() => {
            return unusable("address: there is none".into(), "write its IP address or host name");
        }
        Err(_) if spec.address.starts_with("unix://") => {
            return Err("address: sockets are not supported".to_owned().into());
        }
        Err(_) if !is_hostname(&spec.address) => {
            let reason = format!("address: {:?} is neither an IP address nor a host name", spec.address);
            return unusable(reason, "write it without scheme, port and path");
        }
        Err(_) if !by_name => {
            let reason = format!("address: {:?} needs resolution DNS", spec.address);
            return unusable(reason, "write that, or the IP address");
        }
        Err(_) => (Vec::new(), spec.address.to_ascii_lowercase()),
    };
    let key = Key::of(meta);
    let labels = labels_of(meta, spec);
    let first = |keys: &[&str]| keys.iter().find_map(|key| labels.get(key)).map(str::to_owned);
    // Only who says so itself: nobody captures it.
    let native_tunnel = labels.get(NATIVE_TUNNEL) == Some("http");
    let mut place = spec.locality.split('/').map(str::to_owned);
    let mut next = || place.next().unwrap_or_default();
    let locality = Locality { region: next(), zone: next(), subzone: next() };
    let aliases = addresses.iter().map(|ip| format!("{network}/{ip}")).collect();
    let message = Workload {
        uid: uid.clone(),
        name: key.name.to_string(),
        namespace: key.namespace.to_string(),
        addresses: addresses.into_iter().map(address_bytes).collect(),
        hostname,
        network: network.to_owned(),
        network_gateway: way,
        tunnel_protocol: if native_tunnel { TunnelProtocol::Hbone } else { TunnelProtocol::None }.into(),
        trust_domain: elide(&world.mesh.trust_domain, "cluster.local"),
        service_account: elide(&spec.service_account, "default"),
        waypoint: waypoint.clone(),
        canonical_name: first(&["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"])
            .unwrap_or_else(|| key.name.to_string()),
        canonical_revision: first(&["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"])
            .unwrap_or_else(|| "latest".into()),
        workload_type: WorkloadType::Pod.into(),
        workload_name: key.name.to_string(),
        native_tunnel,
        authorization_policies: policies.clone(),
        status: if *is_unhealthy { WorkloadStatus::Unhealthy } else { WorkloadStatus::Healthy }.into(),
        cluster_id: world.mesh.cluster_id.clone(),
        services: services.clone(),
        locality: (locality != Locality::default()).then_some(locality),
        capacity: (spec.weight > 0).then_some(spec.weight),
        ..Workload::default()
    };
    let address = Address { r#type: Some(address::Type::Workload(message)) };
    Ok(address_resource(uid.clone(), &address, aliases))
}

fn is_healthy(object: &Object<WorkloadEntrySpec>) -> bool {
    if annotation(&object.meta, HEALTH_CHECKED) != Some("true") {
        return true;
    }
    let conditions = object.status["conditions"].as_array().into_iter().flatten();
    conditions.into_iter().any(|condition| condition["type"] == "Healthy" && condition["status"] == "True")
}
