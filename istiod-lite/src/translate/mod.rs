//! From what users wrote to what proxies are told, as a pure function: no client, no clock, no push. The same pass says
//! what became of each object ([`verdict`]), so a field is either enforced or reported.
//!
//! It derives everything anew on each change. That is simple and cheap enough for thousands of pods; the store sends
//! only what differs. Deriving only what a change touches is the next step when it no longer is.

pub mod allocate;
pub mod authorization;
pub mod binding;
pub mod documents;
pub mod enrolment;
pub mod gateway;
pub mod guard;
pub mod http_policy;
pub mod owned;
pub mod parse;
pub mod peer_authentication;
pub mod route;
pub mod service;
pub mod service_entry;
pub mod verdict;
pub mod workload;
pub mod workload_entry;
pub mod world;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use mesh_proto::security::{AUTHORIZATION_TYPE, Authorization};
use mesh_proto::waypoint::{HTTP_POLICY_TYPE, ROUTE_TYPE};
use mesh_proto::workload::{ADDRESS_TYPE, Address, PortList};

use self::authorization as l4;
use self::binding::Binding;
use self::http_policy::Reach;
use self::peer_authentication::PeerAuthentications;
use self::verdict::{Kind, Report, Status, Verdict, Wanted};
use self::world::{View, World};
use crate::resources::{Audience, Resource};
use crate::types::security::{AuthorizationPolicySpec, WorkloadSelector};
use crate::types::{Key, matches_labels};

/// Everything that follows from a world.
#[derive(Debug, Default)]
pub struct Translation {
    pub resources: Vec<Resource>,
    pub verdicts: Vec<Verdict>,
}

pub fn translate(world: &World) -> Translation {
    let view = View::new(world);
    let mut out = Translation::default();
    let bindings = services(&view, &mut out);
    let policies = policies(world, &bindings, &mut out);
    let select = |namespace: &str, labels: &BTreeMap<String, String>| policies.selecting(namespace, Some(labels));
    let entry_bindings = service_entry::translate(&view, &select, &mut out);
    workloads(&view, &bindings, &entry_bindings, &policies, &mut out);
    let attached = routes(world, &bindings, &mut out);
    out.verdicts.extend(world.gateway_classes.iter().filter_map(|(key, class)| gateway::class(key, class)));
    out.verdicts.extend(binding::waypoints(world).filter_map(|(key, object)| {
        gateway::gateway(world, key, object, attached.get(key).copied().unwrap_or_default())
    }));
    out.resources.extend(world.pods.values().filter_map(|pod| enrolment::translate(world, pod)));
    out
}

fn services(view: &View<'_>, out: &mut Translation) -> BTreeMap<Key, Binding> {
    let mut bindings = BTreeMap::new();
    for (key, object) in view.world.services.iter() {
        let Some((resource, binding)) = service::translate(view.world, object) else { continue };
        out.resources.push(resource);
        for slice in view.slices_of(&object.metadata) {
            out.resources.extend(workload::from_slice(view.world, object, slice));
        }
        out.verdicts.push(Verdict {
            kind: Kind::Service,
            key: key.clone(),
            generation: object.metadata.generation.unwrap_or_default(),
            report: Report::Conditions {
                owned: &["istio.io/WaypointBound"],
                wanted: binding.condition.clone().into_iter().collect(),
            },
        });
        bindings.insert(key.clone(), binding);
    }
    bindings
}

/// What workloads need to know of policies.
struct Policies<'a> {
    /// Connection-level policies with a selector: namespace (`None` = every one), selector, reference.
    selected: Vec<(Option<String>, &'a WorkloadSelector, String)>,
    peer_authentications: PeerAuthentications<'a>,
    reach: Reach,
}

fn policies<'a>(world: &'a World, bindings: &BTreeMap<Key, Binding>, out: &mut Translation) -> Policies<'a> {
    let mut selected = Vec::new();
    let mut reach = Reach::default();
    for (key, policy) in world.authorization_policies.iter() {
        let wanted = match &policy.spec {
            // Does not happen, for any spec decodes; if it did, all that is known is where the object lies.
            Err(reason) => {
                let (closed, _) = l4::translate(world, policy, &AuthorizationPolicySpec::default());
                out.resources.extend(closed.as_ref().map(authorization_resource));
                Wanted::new(l4::CONDITION, Status::False, "Invalid", format!("{reason}; everything is denied"))
            }
            Ok(spec) if spec.is_targeted => {
                let (attached, wanted) = http_policy::translate(world, policy, spec, bindings, &mut reach);
                out.resources.extend(attached.into_iter().map(|attached| {
                    Resource::new(HTTP_POLICY_TYPE, attached.name, &attached.policy)
                        .for_audience(attached.waypoints.iter().map(waypoint_audience).collect())
                }));
                wanted
            }
            Ok(spec) => {
                let (authorization, wanted) = l4::translate(world, policy, spec);
                if let Some(authorization) = authorization {
                    if let Some(selector) = spec.selector.as_ref().filter(|s| !s.match_labels.is_empty()) {
                        let everywhere = *key.namespace == *world.mesh.root_namespace;
                        let namespace = (!everywhere).then(|| key.namespace.to_string());
                        selected.push((namespace, selector, key.to_string()));
                    }
                    out.resources.push(authorization_resource(&authorization));
                }
                wanted
            }
        };
        out.verdicts.push(Verdict {
            kind: Kind::AuthorizationPolicy,
            key: key.clone(),
            generation: policy.generation(),
            report: Report::Conditions { owned: &[l4::CONDITION, http_policy::CONDITION], wanted: vec![wanted] },
        });
    }
    let peer_authentications = PeerAuthentications::new(world);
    out.resources.extend(peer_authentications.authorizations().iter().map(authorization_resource));
    out.verdicts.extend(world.peer_authentications.iter().map(|(key, policy)| Verdict {
        kind: Kind::PeerAuthentication,
        key: key.clone(),
        generation: policy.generation(),
        report: Report::Conditions {
            owned: &[peer_authentication::CONDITION],
            wanted: peer_authentication::condition(world, policy).into_iter().collect(),
        },
    }));
    Policies { selected, peer_authentications, reach }
}

impl Policies<'_> {
    /// Those that select what has these labels.
    fn selecting(&self, namespace: &str, labels: Option<&BTreeMap<String, String>>) -> Vec<String> {
        let selected = self.selected.iter().filter(|(of, selector, _)| {
            of.as_deref().is_none_or(|of| *of == *namespace) && matches_labels(&selector.match_labels, labels)
        });
        let mut references: Vec<String> = selected.map(|(_, _, reference)| reference.clone()).collect();
        references.extend(self.peer_authentications.policy_of(namespace, labels));
        references
    }
}

fn workloads(
    view: &View<'_>,
    bindings: &BTreeMap<Key, Binding>,
    entry_bindings: &BTreeMap<String, (Key, Binding)>,
    policies: &Policies<'_>,
    out: &mut Translation,
) {
    let world = view.world;
    let of_services = bindings.iter().map(|(key, binding)| (world.service_name(key), (key, binding)));
    let of_entries = entry_bindings.iter().map(|(name, (key, binding))| (name.clone(), (key, binding)));
    // A Service's host is never also an entry's of the same namespace.
    let by_name: BTreeMap<String, (&Key, &Binding)> = of_services.chain(of_entries).collect();
    let mut guards: BTreeMap<String, Authorization> = BTreeMap::new();
    let mut guarded = |namespace: &str, own: &Binding, services: &BTreeMap<String, PortList>, to: &mut Vec<String>| {
        for guard in guard::for_workload(world, namespace, own, services, &by_name, &policies.reach) {
            let reference = format!("{}/{}", guard.namespace, guard.name);
            to.push(reference.clone());
            guards.insert(reference, guard);
        }
        to.sort_unstable();
    };
    for (key, pod) in world.pods.iter() {
        let mut references = policies.selecting(&key.namespace, pod.metadata.labels.as_ref());
        let own = binding::resolve(world, &pod.metadata, binding::TrafficType::Workload);
        guarded(&key.namespace, &own, &workload::services(view, pod), &mut references);
        out.resources.extend(workload::from_pod(view, pod, references).map(|(resource, _)| resource));
    }
    for (key, object) in world.workload_entries.iter() {
        let mut references = policies.selecting(&key.namespace, Some(&workload_entry::labels(object)));
        let own = binding::resolve(world, &object.meta, binding::TrafficType::Workload);
        guarded(&key.namespace, &own, &workload_entry::services(view, object), &mut references);
        let (resource, verdict) = workload_entry::translate(view, key, object, references);
        out.resources.extend(resource);
        out.verdicts.push(verdict);
    }
    out.resources.extend(guards.values().map(authorization_resource));
}

/// The number of routes each waypoint carries out.
fn routes(world: &World, bindings: &BTreeMap<Key, Binding>, out: &mut Translation) -> BTreeMap<Key, usize> {
    let mut attached: BTreeMap<Key, usize> = BTreeMap::new();
    for (key, object) in world.http_routes.iter() {
        let translated = route::translate(world, object, bindings);
        if let Some(route) = translated.route {
            let audience = translated.waypoints.iter().map(waypoint_audience).collect();
            out.resources.push(Resource::new(ROUTE_TYPE, format!("HTTPRoute/{key}"), &route).for_audience(audience));
        }
        for waypoint in translated.waypoints {
            *attached.entry(waypoint).or_default() += 1;
        }
        out.verdicts.push(Verdict {
            kind: Kind::HttpRoute,
            key: key.clone(),
            generation: object.generation(),
            report: Report::Parents(translated.parents),
        });
    }
    attached
}

fn waypoint_audience(waypoint: &Key) -> Audience {
    Audience::Waypoint { namespace: Arc::clone(&waypoint.namespace), name: Arc::clone(&waypoint.name) }
}

fn authorization_resource(authorization: &Authorization) -> Resource {
    Resource::new(AUTHORIZATION_TYPE, format!("{}/{}", authorization.namespace, authorization.name), authorization)
}

fn address_resource(name: String, address: &Address, aliases: Vec<Arc<str>>) -> Resource {
    Resource { aliases, ..Resource::new(ADDRESS_TYPE, name, address) }
}

/// Network order, 4 or 16 bytes.
fn address_bytes(address: IpAddr) -> Bytes {
    match address {
        IpAddr::V4(address) => Bytes::copy_from_slice(&address.octets()),
        IpAddr::V6(address) => Bytes::copy_from_slice(&address.octets()),
    }
}

#[cfg(test)]
mod fields_tests;
#[cfg(any(test, fuzzing))]
pub mod fixture;
#[cfg(test)]
mod tests;
