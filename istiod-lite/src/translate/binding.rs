//! Which waypoint an object uses. The most specific label wins and there is no fall-through; a waypoint that is missing,
//! not ready or not allowed binds *closed*: the object is given a waypoint address that leads nowhere, so that clients
//! refuse rather than skip L7 policy, unless the annotation [`FAILURE_MODE`] says `open`.

use std::collections::{BTreeMap, HashMap};

use mesh_proto::workload::{GatewayAddress, NamespacedHostname, WeightedWaypoint, gateway_address};

use super::mesh_config::Limit;
use super::owner::Owners;
use super::verdict::{Status, Wanted};
use super::world::World;
use crate::revision::Revision;
use crate::types::gateway::{GatewaySpec, MESH_CONTROLLER, WAYPOINT_CLASS};
use crate::types::{Key, Meta, Object, annotation, label, selects};

/// `open`: traffic skips a waypoint that cannot be used. On the object or its namespace; anything else is closed.
pub const FAILURE_MODE: &str = "ambient.istio.io/waypoint-failure-mode";
/// On every object made for a Gateway.
pub const MANAGED_LABEL: &str = "gateway.istio.io/managed";
pub const USE_WAYPOINT: &str = "istio.io/use-waypoint";
const USE_WAYPOINT_NAMESPACE: &str = "istio.io/use-waypoint-namespace";
const USE_WAYPOINT_CANARY: &str = "istio.io/use-waypoint-canary";
const USE_WAYPOINT_CANARY_NAMESPACE: &str = "istio.io/use-waypoint-canary-namespace";
/// Of a hundred connections, how many; none when absent.
const CANARY_WEIGHT: &str = "istio.io/use-waypoint-canary-weight";
pub const WAYPOINT_FOR: &str = "istio.io/waypoint-for";
const INGRESS_USE_WAYPOINT: &str = "istio.io/ingress-use-waypoint";
pub const HBONE_PORT: u32 = 15008;

/// What the traffic of an object is addressed to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrafficType {
    Service,
    /// A service as well, of a ServiceEntry: MeshConfig may confine it to its namespace.
    Entry,
    Workload,
}

/// Where an object's traffic goes first.
#[derive(Debug, Clone, PartialEq)]
pub struct Binding {
    /// What the mesh is told; may lead nowhere on purpose.
    pub address: Option<Box<GatewayAddress>>,
    /// The Gateway it names and may use, or could if it existed. What only that waypoint may reach stays closed
    /// without it.
    pub waypoint: Option<Key>,
    /// A second one that takes a part of the connections.
    pub canary: Option<Box<Canary>>,
    /// The condition `istio.io/WaypointBound`; `None` when nothing was asked for.
    pub condition: Option<Box<Wanted>>,
}

/// What services are bound to, by their xDS names.
pub struct Bindings<'a> {
    cluster_domain: &'a str,
    services: &'a BTreeMap<Key, Binding>,
    hosts: &'a HashMap<String, (Key, Binding)>,
}

impl<'a> Bindings<'a> {
    /// Those of Services, and those of ServiceEntries' hosts.
    pub fn new(
        world: &'a World,
        services: &'a BTreeMap<Key, Binding>,
        hosts: &'a HashMap<String, (Key, Binding)>,
    ) -> Self {
        Self { cluster_domain: &world.mesh.cluster_domain, services, hosts }
    }

    pub fn get(&self, name: &str) -> Option<(Key, &'a Binding)> {
        if let Some((key, binding)) = self.hosts.get(name) {
            return Some((key.clone(), binding));
        }
        let (namespace, host) = name.split_once('/')?;
        let of = host.strip_suffix(self.cluster_domain)?.strip_suffix(".svc.")?;
        let key = Key::new(namespace, of.strip_suffix(namespace)?.strip_suffix('.')?);
        let binding = self.services.get(&key)?;
        Some((key, binding))
    }
}

/// A waypoint beside the one an object uses. It has all routes and policies of the object, whatever its share.
#[derive(Debug, Clone, PartialEq)]
pub struct Canary {
    pub waypoint: Key,
    /// Of a hundred connections.
    pub weight: u32,
    address: GatewayAddress,
}

impl Binding {
    const NONE: Self = Self { address: None, waypoint: None, canary: None, condition: None };

    /// All that carry the object's traffic.
    pub fn waypoints(&self) -> impl Iterator<Item = &Key> {
        self.waypoint.iter().chain(self.canary.as_ref().map(|canary| &canary.waypoint))
    }

    /// What clients choose from, for each connection anew; empty without a canary.
    pub fn weighted(&self) -> Vec<WeightedWaypoint> {
        let (Some(address), Some(canary)) = (&self.address, &self.canary) else { return Vec::new() };
        let weighted =
            |destination: &GatewayAddress, weight| WeightedWaypoint { destination: Some(destination.clone()), weight };
        vec![weighted(address, 100 - canary.weight), weighted(&canary.address, canary.weight)]
    }
}

/// A Gateway of a class that this control plane implements as a waypoint.
pub fn is_waypoint(world: &World, gateway: &Object<GatewaySpec>) -> bool {
    let Ok(spec) = &gateway.spec else { return false };
    match world.gateway_classes.get(&Key::new("", spec.gateway_class_name.as_str())) {
        Some(class) => class.spec.as_ref().is_ok_and(|class| class.controller_name == MESH_CONTROLLER),
        None => spec.gateway_class_name == WAYPOINT_CLASS,
    }
}

/// All waypoints, whatever their state.
pub fn waypoints(world: &World) -> impl Iterator<Item = (&Key, &Object<GatewaySpec>)> {
    world.gateways.iter().map(|(key, gateway)| (key, &**gateway)).filter(|(_, gateway)| is_waypoint(world, gateway))
}

/// Resolves the labels of `meta`, else of its namespace.
pub fn resolve(world: &World, meta: &dyn Meta, traffic: TrafficType) -> Binding {
    if label(meta, MANAGED_LABEL).is_some() {
        return Binding::NONE; // A waypoint has no waypoint.
    }
    let own_namespace = meta.namespace_name();
    let namespace = world.namespace(own_namespace);
    let (level, own): (&dyn Meta, bool) = match (label(meta, USE_WAYPOINT), namespace) {
        (Some(_), _) => (meta, true),
        (None, Some(namespace)) => (&namespace.metadata, false),
        (None, None) => return Binding::NONE,
    };
    let Some(name) = label(level, USE_WAYPOINT).filter(|name| *name != "none" && !name.is_empty()) else {
        return Binding::NONE;
    };
    let waypoint = Key::new(label(level, USE_WAYPOINT_NAMESPACE).unwrap_or(own_namespace), name);
    let fails_open = annotation(meta, FAILURE_MODE)
        .or_else(|| namespace.and_then(|namespace| annotation(&namespace.metadata, FAILURE_MODE)))
        .is_some_and(|mode| mode == "open");

    match usable(world, &waypoint, own_namespace, traffic) {
        Ok(()) => {
            let mut message = format!("Successfully attached to waypoint {waypoint}");
            if ingress_uses_waypoint(world, meta) {
                message.push_str(". Ingress traffic will traverse the waypoint");
            }
            let asked =
                (traffic != TrafficType::Workload).then(|| canary(world, level, (own_namespace, traffic), &waypoint));
            let canary = match asked.flatten() {
                Some(Ok(canary)) => {
                    let Canary { waypoint, weight, .. } = &canary;
                    message.push_str(&format!(". Canary waypoint {waypoint} takes {weight} of 100 connections"));
                    Some(Box::new(canary))
                }
                Some(Err(problem)) => {
                    message.push_str(&format!(". Canary: {problem}; all traffic takes {waypoint}"));
                    None
                }
                None => None,
            };
            Binding {
                address: Some(address(&waypoint, world.hostname(&waypoint)).into()),
                waypoint: Some(waypoint),
                canary,
                condition: Some(
                    Wanted::new("istio.io/WaypointBound", Status::True, "WaypointAccepted", message).into(),
                ),
            }
        }
        // A namespace label speaks to services and pods alike; it binds those its waypoint is for.
        Err(Unusable::TrafficType(message)) if !own => Binding {
            condition: (traffic != TrafficType::Workload).then(|| Unusable::TrafficType(message).condition("").into()),
            ..Binding::NONE
        },
        Err(problem) => {
            let allowed = matches!(problem, Unusable::Missing(_) | Unusable::NotReady(_));
            let consequence =
                if fails_open { "; traffic skips it" } else { "; traffic is refused until it can be used" };
            let hostname = match &problem {
                Unusable::NotReady(_) => world.hostname(&waypoint),
                // Must not reach whatever answers to the waypoint's own name.
                _ => format!("{}.{}.waypoint-unusable.invalid", waypoint.name, waypoint.namespace),
            };
            Binding {
                address: (!fails_open).then(|| address(&waypoint, hostname).into()),
                waypoint: allowed.then_some(waypoint),
                canary: None,
                condition: Some(problem.condition(consequence).into()),
            }
        }
    }
}

/// The canary that the labels beside those of `primary` ask for, or why it takes nothing.
fn canary(
    world: &World,
    level: &dyn Meta,
    (from, traffic): (&str, TrafficType),
    primary: &Key,
) -> Option<Result<Canary, String>> {
    let name = label(level, USE_WAYPOINT_CANARY).filter(|name| !name.is_empty())?;
    let waypoint = Key::new(label(level, USE_WAYPOINT_CANARY_NAMESPACE).unwrap_or(from), name);
    let weight = match annotation(level, CANARY_WEIGHT).map(str::parse::<u32>) {
        None => Some(0),
        Some(weight) => weight.ok().filter(|weight| *weight <= 100),
    };
    let Some(weight) = weight else { return Some(Err(format!("{CANARY_WEIGHT} is not a number from 0 to 100"))) };
    if waypoint == *primary {
        return Some(Err(format!("{USE_WAYPOINT_CANARY} names the same waypoint as {USE_WAYPOINT}")));
    }
    Some(match usable(world, &waypoint, from, traffic) {
        Ok(()) => Ok(Canary { address: address(&waypoint, world.hostname(&waypoint)), waypoint, weight }),
        Err(problem) => Err(problem.message()),
    })
}

/// `istio.io/ingress-use-waypoint` of the object, else of its namespace.
pub fn ingress_uses_waypoint(world: &World, meta: &dyn Meta) -> bool {
    label(meta, INGRESS_USE_WAYPOINT)
        .or_else(|| world.namespace_label(meta.namespace_name(), INGRESS_USE_WAYPOINT))
        .is_some_and(|value| value == "true")
}

enum Unusable {
    Missing(String),
    NotReady(String),
    Denied(String),
    TrafficType(String),
    Forbidden(String),
}

impl Unusable {
    fn message(self) -> String {
        let (Self::Missing(message)
        | Self::NotReady(message)
        | Self::Denied(message)
        | Self::TrafficType(message)
        | Self::Forbidden(message)) = self;
        message
    }

    fn condition(self, consequence: &str) -> Wanted {
        let (reason, message) = match self {
            Self::Missing(message) | Self::NotReady(message) => ("WaypointIsNotReady", message),
            Self::Denied(message) => ("AttachmentDenied", message),
            Self::TrafficType(message) => ("UnsupportedTrafficType", message),
            Self::Forbidden(message) => ("CrossNamespaceWaypointForbidden", message),
        };
        Wanted::new("istio.io/WaypointBound", Status::False, reason, message + consequence)
    }
}

fn usable(world: &World, waypoint: &Key, from: &str, traffic: TrafficType) -> Result<(), Unusable> {
    let gateway = world
        .gateways
        .get(waypoint)
        .filter(|gateway| is_waypoint(world, gateway))
        .ok_or_else(|| Unusable::Missing(format!("waypoint {waypoint} does not exist")))?;
    let confined = || world.entry_limit(from) < Limit::Public;
    if traffic == TrafficType::Entry && *waypoint.namespace != *from && confined() {
        let message =
            format!("waypoint {waypoint} is of another namespace, and serviceEntryVisibility keeps it in its own");
        return Err(Unusable::Forbidden(message));
    }
    if !admits(world, gateway, from) {
        let message = format!("listener of waypoint {waypoint} does not allow namespace {from} (allowedRoutes)");
        return Err(Unusable::Denied(message));
    }
    let for_what = waypoint_for(world, gateway);
    let fits = match traffic {
        TrafficType::Service | TrafficType::Entry => matches!(for_what, "service" | "all"),
        TrafficType::Workload => matches!(for_what, "workload" | "all"),
    };
    if !fits {
        return Err(Unusable::TrafficType(format!("waypoint {waypoint} is for {for_what} traffic ({WAYPOINT_FOR})")));
    }
    let ready = gateway.status["addresses"].as_array().is_some_and(|addresses| !addresses.is_empty());
    if ready {
        return Ok(());
    }
    // Whose it is is the same to all, as what is said of a Service is one's to say.
    let owners = Owners::of(world);
    let of = match owners.revision(&gateway.meta) {
        revision if revision == Revision::default().as_str() => String::new(),
        revision if owners.is_installed(revision) => format!(" of revision {revision}"),
        revision => format!(" of revision {revision}, which no control plane here has,"),
    };
    Err(Unusable::NotReady(format!("waypoint {waypoint}{of} has no ready pod yet")))
}

/// `istio.io/waypoint-for` of the Gateway, else of its class, else `service`.
pub fn waypoint_for<'a>(world: &'a World, gateway: &'a Object<GatewaySpec>) -> &'a str {
    let class = || {
        let spec = gateway.spec.as_ref().ok()?;
        label(&world.gateway_classes.get(&Key::new("", spec.gateway_class_name.as_str()))?.meta, WAYPOINT_FOR)
    };
    label(&gateway.meta, WAYPOINT_FOR).or_else(class).unwrap_or("service")
}

fn admits(world: &World, gateway: &Object<GatewaySpec>, namespace: &str) -> bool {
    let Ok(spec) = &gateway.spec else { return false };
    let Some(listener) = spec.listeners.iter().find(|l| l.protocol == "HBONE" && u32::from(l.port) == HBONE_PORT)
    else {
        return false;
    };
    let allowed = &listener.allowed_routes.namespaces;
    match allowed.from.as_str() {
        "" | "Same" => gateway.namespace() == namespace,
        "All" => true,
        "Selector" => allowed.selector.as_ref().is_some_and(|selector| {
            world.namespace(namespace).is_some_and(|found| selects(selector, found.metadata.labels.as_ref()))
        }),
        _ => false,
    }
}

fn address(waypoint: &Key, hostname: String) -> GatewayAddress {
    let host = NamespacedHostname { namespace: waypoint.namespace.to_string(), hostname };
    GatewayAddress { destination: Some(gateway_address::Destination::Hostname(host)), hbone_mtls_port: HBONE_PORT }
}
