//! From what users wrote to what proxies are told, as a pure function: no client, no clock, no push. The same pass says
//! what became of each object ([`verdict`]), so a field is either enforced or reported.
//!
//! [`incremental`] does so again for what a change touches; [`translate`] is the same for a world seen for the first time.

pub mod allocate;
pub mod authorization;
pub mod binding;
pub mod discovery;
pub mod documents;
pub mod enrolment;
pub mod gateway;
pub mod guard;
pub mod http_policy;
pub mod incremental;
pub mod lookups;
pub mod mesh_config;
pub mod networks;
pub mod outside;
pub mod owned;
pub mod owner;
pub mod parameters;
pub mod parse;
pub mod peer_authentication;
pub mod regular_expression;
pub mod route;
pub mod service;
pub mod service_entry;
pub mod verdict;
pub mod waypoint;
pub mod workload;
pub mod workload_entry;
pub mod world;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use mesh_proto::security::{AUTHORIZATION_TYPE, Authorization};
use mesh_proto::waypoint::{HTTP_POLICY_TYPE, ROUTE_TYPE};
use mesh_proto::workload::{ADDRESS_TYPE, Address};

use self::authorization as l4;
use self::binding::Binding;
use self::http_policy::Reach;
use self::incremental::{Changes, Translator};
use self::peer_authentication::PeerAuthentications;
use self::verdict::{Kind, Report, Status, Verdict, Wanted};
use self::world::World;
use crate::resources::{Audience, Resource};
use crate::types::security::{AuthorizationPolicySpec, WorkloadSelector};
use crate::types::{Key, Labels, Service};

/// Everything that follows from a world.
#[derive(Debug, Default)]
pub struct Translation {
    pub resources: Vec<Resource>,
    pub verdicts: Vec<Verdict>,
}

pub fn translate(world: &World) -> Translation {
    let Changes { resources, verdicts, .. } = Translator::default().translate(world);
    Translation { resources, verdicts: verdicts.to_vec() }
}

/// A connection-level policy with a selector.
#[derive(Debug, Clone, PartialEq)]
struct Selecting {
    /// `None` = every one.
    namespace: Option<String>,
    selector: WorkloadSelector,
    reference: String,
}

impl Selecting {
    fn selects(&self, namespace: &str, labels: &Labels) -> bool {
        self.namespace.as_deref().is_none_or(|of| *of == *namespace) && self.selector.match_labels.are_among(labels)
    }
}

/// What workloads need to know of policies.
#[derive(Debug, Default)]
struct Policies {
    selected: Vec<Selecting>,
    peer_authentications: PeerAuthentications,
    reach: Reach,
}

fn policies(world: &World, bindings: &BTreeMap<Key, Binding>, out: &mut Translation) -> Policies {
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
                        selected.push(Selecting { namespace, selector: selector.clone(), reference: key.to_string() });
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

impl Policies {
    /// Those that select what has these labels.
    fn selecting(&self, namespace: &str, labels: &Labels) -> Vec<String> {
        let selected = self.selected.iter().filter(|policy| policy.selects(namespace, labels));
        let mut references: Vec<String> = selected.map(|policy| policy.reference.clone()).collect();
        references.extend(self.peer_authentications.policy_of(namespace, labels));
        references
    }
}

/// The verdict on a Service; `None` where there is none to give or to take back, as for almost all.
fn service_verdict(key: &Key, service: &Service, binding: &Binding) -> Option<Verdict> {
    const OWNED: &[&str] = &["istio.io/WaypointBound"];
    let has_any = || service.conditions.iter().any(|condition| OWNED.contains(&&*condition.type_));
    let wanted: Vec<Wanted> = binding.condition.as_deref().cloned().into_iter().collect();
    (!wanted.is_empty() || has_any()).then(|| Verdict {
        kind: Kind::Service,
        key: key.clone(),
        generation: service.generation,
        report: Report::Conditions { owned: OWNED, wanted },
    })
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

fn address_resource(name: String, address: &Address, aliases: Vec<String>) -> Resource {
    Resource::new(ADDRESS_TYPE, name, address).with_aliases(aliases)
}

/// Network order, 4 or 16 bytes.
fn address_bytes(address: IpAddr) -> Bytes {
    match address {
        IpAddr::V4(address) => Bytes::copy_from_slice(&address.octets()),
        IpAddr::V6(address) => Bytes::copy_from_slice(&address.octets()),
    }
}

#[cfg(test)]
mod features_tests;
#[cfg(test)]
mod fields_tests;
#[cfg(any(test, fuzzing))]
pub mod fixture;
#[cfg(test)]
mod incremental_tests;
#[cfg(test)]
mod tests;
