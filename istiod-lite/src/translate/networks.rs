//! Networks beside the cluster's own, and the gateways by which they are reached: Gateways of class `istio-remote` in
//! the mesh's own namespace, as somebody else runs them. Whoever is named here may speak for others to workloads of
//! that network, so that Gateways of other namespaces name nobody.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use mesh_proto::workload::{
    Address, GatewayAddress, NamespacedHostname, NetworkAddress, TunnelProtocol, Workload, WorkloadType, address,
    gateway_address,
};

use super::service_entry::is_hostname;
use super::verdict::{Kind, ListenerReport, Report, Status, Verdict, Wanted};
use super::workload::elide;
use super::world::World;
use super::{address_bytes, address_resource};
use crate::resources::Resource;
use crate::types::gateway::{GatewaySpec, Listener};
use crate::types::networking::WorkloadEntrySpec;
use crate::types::{Key, Object, Pod, annotation, label};

/// The label that says which network something is on.
pub const NETWORK: &str = "topology.istio.io/network";
const CLASS: &str = "istio-remote";
/// Of the class, where there is an object of it.
const CONTROLLER: &str = "istio.io/unmanaged-gateway";
/// What a gateway runs as: in the Gateway's namespace, over there.
const SERVICE_ACCOUNT: &str = "gateway.istio.io/service-account";
const TRUST_DOMAIN: &str = "gateway.istio.io/trust-domain";

/// By network, what leads into it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Networks(BTreeMap<String, Remote>);

#[derive(Debug, Clone, PartialEq)]
struct Remote {
    gateway: Key,
    /// As they were written, the first of them first; none where it is known by name.
    addresses: Vec<IpAddr>,
    hostname: String,
    port: u32,
    service_account: String,
    trust_domain: String,
}

/// The network of a pod: its label's, else the cluster's.
pub fn of_pod<'a>(world: &'a World, pod: &'a Pod) -> &'a str {
    label(pod, NETWORK).filter(|network| !network.is_empty()).unwrap_or_else(|| world.network())
}

/// The network of what an entry lists: its field's, its label's, that of the entry's label, else the cluster's.
pub fn of_entry<'a>(world: &'a World, meta: &'a ObjectMeta, spec: &'a WorkloadEntrySpec) -> &'a str {
    let labelled = || spec.labels.get(NETWORK).or_else(|| label(meta, NETWORK));
    let written = Some(&*spec.network).filter(|network| !network.is_empty());
    written.or_else(labelled).filter(|network| !network.is_empty()).unwrap_or_else(|| world.network())
}

/// Is it a gateway of another network, as somebody else runs it?
fn is_remote(world: &World, gateway: &Object<GatewaySpec>) -> bool {
    let Ok(spec) = &gateway.spec else { return false };
    let class = || world.gateway_classes.get(&Key::new("", CLASS)).and_then(|class| class.spec.as_ref().ok());
    spec.gateway_class_name == CLASS && class().is_none_or(|class| class.controller_name == CONTROLLER)
}

/// All of them, those that name nobody too.
fn remotes(world: &World) -> impl Iterator<Item = (&Key, &Object<GatewaySpec>)> {
    world.gateways.iter().map(|(key, gateway)| (key, &**gateway)).filter(|(_, gateway)| is_remote(world, gateway))
}

/// Why a Gateway names no way.
#[derive(Debug)]
struct Refusal {
    reason: &'static str,
    message: String,
}

fn refused<T>(reason: &'static str, message: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal { reason, message: message.into() })
}

/// The network that a Gateway names the way to, and the way.
fn read(world: &World, key: &Key, gateway: &Object<GatewaySpec>) -> Result<(String, Remote), Refusal> {
    let spec = match &gateway.spec {
        Ok(spec) => spec,
        Err(reason) => return refused("Unreadable", reason.as_str()),
    };
    let root = &world.mesh.root_namespace;
    if *key.namespace != **root {
        return refused("NotAllowed", format!("metadata.namespace: ways to other networks are named in {root} alone"));
    }
    let Some(network) = label(&gateway.meta, NETWORK).filter(|network| !network.is_empty()) else {
        return refused("NoNetwork", format!("metadata.labels: {NETWORK} is to say which network it leads to"));
    };
    if network == world.network() {
        return refused("OwnNetwork", format!("metadata.labels: {network} is this cluster's own network"));
    }
    let Some(listener) = spec.listeners.iter().find(|listener| is_hbone(listener)) else {
        return refused("NoListener", "spec.listeners: one of protocol HBONE is needed");
    };
    let (mut addresses, mut hostname) = (Vec::new(), String::new());
    for (index, found) in spec.addresses.iter().enumerate() {
        let value = found["value"].as_str().unwrap_or_default();
        match found["type"].as_str().unwrap_or("IPAddress") {
            "IPAddress" => match value.parse::<IpAddr>().map(|ip| ip.to_canonical()) {
                Ok(ip) if ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() => {
                    return refused("InvalidAddress", format!("spec.addresses[{index}]: {ip} leads nowhere"));
                }
                Ok(ip) => addresses.push(ip),
                Err(_) => {
                    return refused("InvalidAddress", format!("spec.addresses[{index}]: {value:?} is no IP address"));
                }
            },
            "Hostname" if is_hostname(value) => {
                if hostname.is_empty() {
                    hostname = value.to_ascii_lowercase();
                }
            }
            "Hostname" => {
                return refused("InvalidAddress", format!("spec.addresses[{index}]: {value:?} is no host name"));
            }
            other => {
                let message = format!("spec.addresses[{index}]: type {other:?} is neither IPAddress nor Hostname");
                return refused("InvalidAddress", message);
            }
        }
    }
    if addresses.is_empty() && hostname.is_empty() {
        return refused("NoAddress", "spec.addresses: there is none");
    }
    // What has an address needs no name.
    if !addresses.is_empty() {
        hostname.clear();
    }
    let said = |name: &str| annotation(&gateway.meta, name).filter(|value| !value.is_empty()).map(str::to_owned);
    let remote = Remote {
        gateway: key.clone(),
        addresses,
        hostname,
        port: listener.port.into(),
        service_account: said(SERVICE_ACCOUNT).unwrap_or_else(|| format!("{}-{CLASS}", key.name)),
        trust_domain: said(TRUST_DOMAIN).unwrap_or_else(|| world.mesh.trust_domain.clone()),
    };
    Ok((network.to_owned(), remote))
}

impl Networks {
    /// Of several Gateways for one network the oldest counts.
    pub fn new(world: &World) -> Self {
        let mut found: Vec<_> = remotes(world).collect();
        found.sort_by_cached_key(|(_, gateway)| gateway.age());
        let mut networks = BTreeMap::new();
        for (key, gateway) in found {
            if let Ok((network, remote)) = read(world, key, gateway) {
                networks.entry(network).or_insert(remote);
            }
        }
        Self(networks)
    }

    /// What workloads of a network say of the way to them.
    pub fn way(&self, network: &str) -> Option<GatewayAddress> {
        let remote = self.0.get(network)?;
        let destination = match remote.addresses.first() {
            Some(ip) => gateway_address::Destination::Address(NetworkAddress {
                network: network.to_owned(),
                address: address_bytes(*ip),
                length: None,
            }),
            None => gateway_address::Destination::Hostname(NamespacedHostname {
                namespace: remote.gateway.namespace.to_string(),
                hostname: remote.hostname.clone(),
            }),
        };
        Some(GatewayAddress { destination: Some(destination), hbone_mtls_port: remote.port })
    }

    /// The gateway whose address it is: nobody else's workload may have it.
    pub fn owner(&self, network: &str, ip: IpAddr) -> Option<String> {
        let remote = self.0.get(network).filter(|remote| remote.addresses.contains(&ip))?;
        Some(format!("Gateway {} of network {network}", remote.gateway))
    }

    /// The gateways, as workloads of the networks that they lead into.
    pub fn resources(&self, world: &World) -> Vec<Resource> {
        self.0.iter().map(|(network, remote)| remote.resource(world, network)).collect()
    }
}

impl Remote {
    fn resource(&self, world: &World, network: &str) -> Resource {
        let Self { gateway, addresses, hostname, port, service_account, trust_domain } = self;
        let place = addresses.first().map_or_else(|| hostname.clone(), ToString::to_string);
        let uid = format!("NetworkGateway/{network}/{place}/{port}");
        let aliases = match addresses.is_empty() {
            true => vec![format!("{}/{hostname}", gateway.namespace)],
            false => addresses.iter().map(|ip| format!("{network}/{ip}")).collect(),
        };
        let message = Workload {
            uid: uid.clone(),
            name: gateway.name.to_string(),
            namespace: gateway.namespace.to_string(),
            addresses: addresses.iter().copied().map(address_bytes).collect(),
            hostname: hostname.clone(),
            network: network.to_owned(),
            tunnel_protocol: TunnelProtocol::Hbone.into(),
            trust_domain: elide(trust_domain, "cluster.local"),
            service_account: elide(service_account, "default"),
            canonical_name: gateway.name.to_string(),
            canonical_revision: "latest".into(),
            workload_type: WorkloadType::Pod.into(),
            workload_name: gateway.name.to_string(),
            native_tunnel: true,
            cluster_id: world.mesh.cluster_id.clone(),
            ..Workload::default()
        };
        address_resource(uid, &Address { r#type: Some(address::Type::Workload(message)) }, aliases)
    }
}

fn is_hbone(listener: &Listener) -> bool {
    listener.protocol == "HBONE" && listener.port != 0
}

/// What became of each Gateway of that class that can be read.
pub fn verdicts(world: &World, networks: &Networks) -> Vec<Verdict> {
    let readable = remotes(world).filter_map(|(key, gateway)| Some((key, gateway, gateway.spec.as_ref().ok()?)));
    readable.map(|(key, gateway, spec)| verdict(world, networks, key, gateway, spec)).collect()
}

fn verdict(
    world: &World,
    networks: &Networks,
    key: &Key,
    gateway: &Object<GatewaySpec>,
    spec: &GatewaySpec,
) -> Verdict {
    let found = read(world, key, gateway).and_then(|(network, remote)| match networks.0.get(&network) {
        Some(other) if other.gateway != *key => {
            let message = format!("the older Gateway {} already names the way to network {network}", other.gateway);
            refused("Conflicted", message)
        }
        _ => Ok((network, remote)),
    });
    let (conditions, addresses) = match &found {
        Ok((network, remote)) => {
            let Remote { service_account, trust_domain, .. } = remote;
            let accepted = format!(
                "Names the way to network {network}: whoever answers is to be \
                 spiffe://{trust_domain}/ns/{}/sa/{service_account}",
                key.namespace
            );
            let conditions = vec![
                Wanted::new("Accepted", Status::True, "Accepted", accepted),
                Wanted::new("Programmed", Status::True, "Programmed", "Run by somebody else"),
            ];
            let addresses = match remote.addresses.is_empty() {
                true => vec![("Hostname", remote.hostname.clone())],
                false => remote.addresses.iter().map(|ip| ("IPAddress", ip.to_string())).collect(),
            };
            (conditions, addresses)
        }
        Err(Refusal { reason, message }) => {
            let conditions = vec![
                Wanted::new("Accepted", Status::False, reason, message.as_str()),
                Wanted::new("Programmed", Status::False, "Invalid", message.as_str()),
            ];
            (conditions, Vec::new())
        }
    };
    let mut hbone = spec.listeners.iter().find(|listener| is_hbone(listener)).map(|listener| listener.name.as_str());
    let listeners = spec.listeners.iter().map(|listener| {
        let is_used = hbone.take_if(|name| **name == *listener.name).is_some();
        let accepted = match is_used {
            true => Wanted::new("Accepted", Status::True, "Accepted", ""),
            false => {
                let message = "only the first listener of protocol HBONE is used: this one means nothing here";
                Wanted::new("Accepted", Status::False, "UnsupportedProtocol", message)
            }
        };
        let programmed = match is_used && found.is_ok() {
            true => Wanted::new("Programmed", Status::True, "Programmed", ""),
            false => Wanted::new("Programmed", Status::False, "Invalid", ""),
        };
        let resolved = Wanted::new("ResolvedRefs", Status::True, "ResolvedRefs", "");
        let conflicted = Wanted::new("Conflicted", Status::False, "NoConflicts", "");
        ListenerReport {
            name: listener.name.clone(),
            kinds: &[],
            attached: 0,
            conditions: vec![accepted, conflicted, programmed, resolved],
        }
    });
    let listeners = listeners.collect();
    let report = Report::Gateway { conditions, addresses: Some(addresses), listeners };
    Verdict { kind: Kind::Gateway, key: key.clone(), generation: gateway.generation(), report }
}
