//! A world and what the control plane makes of it, to be asked about one pod or Service. All of it comes from the
//! translation itself and from the proxies' own model of what they are told; nothing is decided here a second time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anyhow::bail;
use mesh::model::{self, NamespacedHostname, NamespacedName, TunnelProtocol, Workload};
use mesh::policy::Policy;
use mesh::store::{Snapshot, Store, Update};
use mesh_proto::security::{AUTHORIZATION_TYPE, Authorization};
use mesh_proto::waypoint::{Action, HTTP_POLICY_TYPE, HttpPolicy, ROUTE_TYPE, Route};
use mesh_proto::workload::{ADDRESS_TYPE, Address};
use prost::Message as _;
use serde::Serialize;

use super::analyze;
use crate::enrol::REDIRECTION;
use crate::enrol::rules::{self, AskedBy, DATAPLANE_MODE, Outside};
use crate::resources::{Audience, Resource};
use crate::translate::binding::{self, MANAGED_LABEL, TrafficType};
use crate::translate::discovery;
use crate::translate::peer_authentication::{CONVERTED, Mode, PeerAuthentications, STATIC_STRICT};
use crate::translate::translate;
use crate::translate::verdict::{Kind, Report, Status, Verdict};
use crate::translate::workload::has_native_tunnel;
use crate::translate::world::{World, in_namespace};
use crate::types::networking::ServiceEntrySpec;
use crate::types::{Key, Meta, Pod, annotation, label};

/// A world and what follows from it.
pub struct Facts {
    pub world: World,
    /// What proxies know of it.
    pub mesh: Arc<Snapshot>,
    /// Oldest first, as waypoints rank them.
    routes: Vec<Route>,
    /// With the waypoints that have them.
    http_policies: Vec<(HttpPolicy, BTreeSet<Key>)>,
    verdicts: Vec<Verdict>,
    peer_authentications: PeerAuthentications,
    /// Whether pods run is not known.
    offline: bool,
}

/// Whether the mesh captures a pod, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Membership {
    pub in_mesh: bool,
    pub reason: String,
    /// What makes it a member, where that is not it is and somebody could want it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mend: Option<String>,
    /// What the pod's node has reported.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub capture: Option<String>,
}

/// What is asked of connections to a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MutualTls {
    pub mode: &'static str,
    /// The PeerAuthentication that decides.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub ports: BTreeMap<u16, &'static str>,
    /// The PeerAuthentication that decides for those ports.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ports_by: Option<String>,
}

/// The waypoint that something is to go through.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct WaypointUse {
    /// It goes there now; else the text says what becomes of it.
    pub works: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    pub message: String,
}

/// A policy that the ztunnel of a pod applies to connections.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ConnectionPolicy {
    pub name: String,
    pub action: String,
    /// `mesh`, `namespace` or `selected`.
    pub reach: &'static str,
    pub dry_run: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// A policy that a waypoint applies to requests.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RequestPolicy {
    /// Those that are asked first come first.
    #[serde(skip)]
    rank: u8,
    pub name: String,
    pub action: &'static str,
    pub rules: usize,
    /// Of all that goes through the waypoint, not of this Service alone.
    pub whole_waypoint: bool,
    pub dry_run: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// A route that a waypoint may choose.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RouteUse {
    pub name: String,
    pub rules: usize,
    /// Of the Service; all of them when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// A route of another namespace than the Service's is for clients of that namespace alone, and goes before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub only_for_clients_of: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

impl Facts {
    /// `offline`: it was read from files.
    pub fn of(world: World, offline: bool) -> Self {
        let translation = translate(&discovery::once(world.clone()));
        let store = Store::default();
        let mut update = Update::new();
        let (mut routes, mut http_policies) = (Vec::new(), Vec::new());
        for resource in &translation.resources {
            let body = resource.body();
            // What we have encoded can be decoded; what proxies refuse, they are without.
            match resource.type_url() {
                ADDRESS_TYPE => {
                    let decoded =
                        Address::decode(body).ok().and_then(|address| model::Resource::try_from(address).ok());
                    if let Some(decoded) = decoded {
                        update.push_resource(decoded);
                    }
                }
                AUTHORIZATION_TYPE => {
                    let policy = Authorization::decode(body).ok().and_then(policy);
                    if let Some(policy) = policy {
                        update.push_policy(policy);
                    }
                }
                ROUTE_TYPE => routes.extend(Route::decode(body)),
                HTTP_POLICY_TYPE => http_policies.extend(HttpPolicy::decode(body).map(|p| (p, waypoints_of(resource)))),
                _ => {}
            }
        }
        store.apply(update);
        routes.sort_by(|a, b| (a.created, &a.namespace, &a.name).cmp(&(b.created, &b.namespace, &b.name)));
        Self {
            mesh: store.snapshot(),
            routes,
            http_policies,
            verdicts: translation.verdicts,
            peer_authentications: PeerAuthentications::new(&world),
            world,
            offline,
        }
    }

    /// As the mesh knows it; none before it has an address and once it has ended.
    pub fn workload(&self, pod: &Key) -> Option<&Arc<Workload>> {
        self.mesh.workload(&self.world.pod_uid(pod))
    }

    /// The pod behind a workload that is one.
    pub fn pod(&self, workload: &Workload) -> Option<&Pod> {
        let key = Key::new(Arc::clone(&workload.namespace), Arc::clone(&workload.name));
        self.world.pods.get(&key).filter(|_| *workload.uid == *self.world.pod_uid(&key)).map(|pod| &**pod)
    }

    /// The xDS name of a Service.
    pub fn service_name(&self, service: &Key) -> NamespacedHostname {
        NamespacedHostname::new(Arc::clone(&service.namespace), self.world.hostname(service))
    }

    /// The Service or ServiceEntry that a name is from.
    pub fn behind(&self, name: &NamespacedHostname) -> Option<(&dyn Meta, TrafficType)> {
        let short = name.hostname.split('.').next().unwrap_or_default();
        let key = Key::new(Arc::clone(&name.namespace), short);
        if let Some(service) = self.world.services.get(&key).filter(|_| self.service_name(&key) == *name) {
            return Some((&**service, TrafficType::Service));
        }
        let has_it = |spec: &ServiceEntrySpec| spec.hosts.iter().any(|host| host.eq_ignore_ascii_case(&name.hostname));
        let mut entries = in_namespace(&self.world.service_entries, &name.namespace);
        let entry = entries.find(|(_, entry)| entry.spec.as_ref().is_ok_and(has_it));
        entry.map(|(_, entry)| (&entry.meta as &dyn Meta, TrafficType::Entry))
    }

    pub fn identity(&self, pod: &Pod) -> String {
        format!("spiffe://{}", self.world.principal(&pod.key.namespace, &pod.template.service_account))
    }

    pub fn membership(&self, pod: &Pod) -> Membership {
        let namespace = &pod.key.namespace;
        let outside = |reason: String, mend: Option<String>| Membership { in_mesh: false, reason, mend, capture: None };
        match rules::judge(&self.world, pod) {
            Ok(asked) => {
                let whose = match asked {
                    AskedBy::Pod => "its own label".to_owned(),
                    AskedBy::Namespace => format!("the label of namespace {namespace}"),
                };
                let capture = match annotation(pod, REDIRECTION) {
                    _ if self.offline => None,
                    Some("enabled") => Some("captured by the ztunnel of its node".to_owned()),
                    Some(_) => {
                        Some("the ztunnel of its node could not capture it yet; see the pod's events".to_owned())
                    }
                    None => Some("no ztunnel has reported yet that it captures it".to_owned()),
                };
                Membership { in_mesh: true, reason: format!("{whose} {DATAPLANE_MODE}=ambient"), mend: None, capture }
            }
            Err(_) if has_native_tunnel(pod) || label(pod, MANAGED_LABEL).is_some() => {
                outside("it speaks HBONE by itself, so it takes part and is not captured".to_owned(), None)
            }
            Err(Outside::NotAsked) => outside(
                format!("neither the pod nor namespace {namespace} has the label {DATAPLANE_MODE}=ambient"),
                Some(format!("kubectl label namespace {namespace} {DATAPLANE_MODE}=ambient")),
            ),
            Err(Outside::OptedOut) => outside(
                format!("its own label says {DATAPLANE_MODE}=none"),
                Some(format!("take the label off the pod's template, or say {DATAPLANE_MODE}=ambient there")),
            ),
            Err(Outside::NamespaceUnknown) => outside(format!("namespace {namespace} is not known"), None),
            Err(Outside::NotDiscovered) => outside(
                format!("no discoverySelectors of MeshConfig select namespace {namespace}"),
                Some("label the namespace as one of them asks".to_owned()),
            ),
            Err(Outside::Ended) => outside("all its containers have ended".to_owned(), None),
            Err(Outside::Barred(bar)) => outside(bar.to_string(), None),
        }
    }

    pub fn mutual_tls(&self, pod: &Pod) -> MutualTls {
        let demand = self.peer_authentications.demand(&pod.key.namespace, &pod.template.labels);
        let (ports_by, ports) = demand.ports.map_or_else(Default::default, |(by, ports)| (Some(by.to_string()), ports));
        MutualTls {
            mode: mode(demand.mode),
            by: demand.by.map(|by| by.to_string()),
            ports: ports.into_iter().map(|(port, asked)| (port, mode(asked))).collect(),
            ports_by,
        }
    }

    /// None where no label asks for one.
    pub fn waypoint(&self, meta: &dyn Meta, traffic: TrafficType) -> Option<WaypointUse> {
        let binding = binding::resolve(&self.world, meta, traffic);
        let condition = binding.condition?;
        let name = binding.waypoint.as_ref().map(ToString::to_string);
        let mut message = condition.message;
        let mut works = condition.status == Status::True;
        if let Some(waypoint) = binding.waypoint.as_ref().filter(|_| works)
            && let Err(why) = self.waypoint_ready(waypoint)
        {
            works = false;
            message = format!("{message}; {why}");
        }
        Some(WaypointUse { works, name, message })
    }

    /// # Errors
    /// Why not.
    pub fn waypoint_ready(&self, waypoint: &Key) -> Result<(), String> {
        let is_it = |verdict: &&Verdict| verdict.kind == Kind::Gateway && verdict.key == *waypoint;
        let Some(Report::Gateway { conditions, .. }) = self.verdicts.iter().find(is_it).map(|found| &found.report)
        else {
            return Err("it does not exist".to_owned());
        };
        let what = if self.offline { "Accepted" } else { "Programmed" };
        let bad = conditions.iter().find(|found| found.r#type == what && found.status == Status::False);
        bad.map_or(Ok(()), |found| Err(found.message.clone()))
    }

    /// Those that govern connections to a workload, denials first.
    pub fn connection_policies(&self, workload: &Workload) -> Vec<ConnectionPolicy> {
        let mut policies: Vec<ConnectionPolicy> =
            self.mesh.policies_for(workload).map(|policy| self.connection_policy(policy)).collect();
        policies.sort_by(|a, b| (std::cmp::Reverse(&a.action), &a.name).cmp(&(std::cmp::Reverse(&b.action), &b.name)));
        policies
    }

    fn connection_policy(&self, policy: &Policy) -> ConnectionPolicy {
        let key = Key::new(policy.namespace(), policy.name());
        ConnectionPolicy {
            name: self.origin(policy.key()),
            action: format!("{:?}", policy.action()).to_uppercase(),
            reach: match policy.scope() {
                mesh::policy::Scope::Global => "mesh",
                mesh::policy::Scope::Namespace => "namespace",
                mesh::policy::Scope::WorkloadSelector => "selected",
            },
            dry_run: policy.is_dry_run(),
            notes: self.notes(Kind::AuthorizationPolicy, &key),
        }
    }

    /// What users know it by.
    pub fn origin(&self, policy: &NamespacedName) -> String {
        let key = Key::new(Arc::clone(&policy.namespace), Arc::clone(&policy.name));
        if self.world.authorization_policies.contains_key(&key) {
            return format!("AuthorizationPolicy {key}");
        }
        match policy.name.strip_prefix(CONVERTED) {
            Some(name) => format!("PeerAuthentication {}/{name}", policy.namespace),
            None if *policy.name == *STATIC_STRICT => "mTLS STRICT".to_owned(),
            // The only others that are made: translate/guard.rs.
            None => "only from its waypoint".to_owned(),
        }
    }

    /// Those that a waypoint applies to requests to a Service, in the order in which they are asked.
    pub fn request_policies(&self, service: &NamespacedHostname, waypoint: &Key) -> Vec<RequestPolicy> {
        let service = service.to_string();
        let applies = |policy: &HttpPolicy| policy.services.is_empty() || policy.services.contains(&service);
        let here = self.http_policies.iter().filter(|(policy, at)| at.contains(waypoint) && applies(policy));
        let mut policies: Vec<RequestPolicy> = here
            .map(|(policy, _)| {
                let key = Key::new(policy.namespace.as_str(), policy.name.as_str());
                let (rank, action) = match policy.action() {
                    Action::Deny => (0, "DENY"),
                    Action::Allow => (1, "ALLOW"),
                    Action::Audit => (2, "AUDIT"),
                };
                RequestPolicy {
                    rank,
                    name: key.to_string(),
                    action,
                    rules: policy.rules.len(),
                    whole_waypoint: policy.services.is_empty(),
                    dry_run: policy.dry_run,
                    notes: self.notes(Kind::AuthorizationPolicy, &key),
                }
            })
            .collect();
        policies.sort();
        policies.dedup();
        policies
    }

    /// Those that hang on a Service: of other namespaces first, then by age.
    pub fn routes(&self, service: &NamespacedHostname) -> Vec<RouteUse> {
        let name = service.to_string();
        let mut routes = Vec::new();
        for route in &self.routes {
            let key = Key::new(route.namespace.as_str(), route.name.as_str());
            let foreign = *route.namespace != *service.namespace;
            routes.extend(route.parents.iter().filter(|parent| parent.service == name).map(|parent| RouteUse {
                name: key.to_string(),
                rules: route.rules.len(),
                port: u16::try_from(parent.port).ok().filter(|port| *port != 0),
                only_for_clients_of: foreign.then(|| route.namespace.clone()),
                notes: self.notes(Kind::HttpRoute, &key),
            }));
        }
        routes.sort_by_key(|route| route.only_for_clients_of.is_none());
        routes
    }

    /// What of an object is not done as it was written.
    fn notes(&self, kind: Kind, key: &Key) -> Vec<String> {
        let verdict = self.verdicts.iter().find(|verdict| verdict.kind == kind && verdict.key == *key);
        let problems = verdict.into_iter().flat_map(|verdict| analyze::problems(verdict, self.offline));
        problems.map(|found| if found.message.is_empty() { found.reason } else { found.message }).collect()
    }

    /// Whether connections to it are carried by HBONE. In files pods are taken to be captured that are to be.
    pub fn takes_hbone(&self, workload: &Workload) -> bool {
        let will = || self.pod(workload).is_some_and(|pod| self.membership(pod).in_mesh);
        workload.protocol == TunnelProtocol::Hbone || (self.offline && will())
    }
}

fn mode(mode: Mode) -> &'static str {
    match mode {
        Mode::Strict => "STRICT",
        Mode::Permissive => "PERMISSIVE",
    }
}

/// As the proxies take it.
fn policy(authorization: Authorization) -> Option<Policy> {
    let key = NamespacedName::new(authorization.namespace.as_str(), authorization.name.as_str());
    match Policy::try_from(authorization.clone()) {
        Ok(policy) => Some(policy),
        Err(error) => Policy::refused(&authorization, key, &error),
    }
}

fn waypoints_of(resource: &Resource) -> BTreeSet<Key> {
    let waypoint = |audience: &Audience| match audience {
        Audience::Waypoint { namespace, name } => Some(Key::new(Arc::clone(namespace), Arc::clone(name))),
        Audience::All | Audience::Node(_) => None,
    };
    resource.audience().iter().filter_map(waypoint).collect()
}

/// What people call an object: `NAME`, `NAME.NAMESPACE` or `NAMESPACE/NAME`.
///
/// # Errors
/// There is none of that name.
pub fn named(what: &str, text: &str, namespace: &str, exists: impl Fn(&Key) -> bool) -> anyhow::Result<Key> {
    let slashed = text.split_once('/').map(|(namespace, name)| Key::new(namespace, name));
    let dotted = || text.rsplit_once('.').map(|(name, namespace)| Key::new(namespace, name));
    // A pod's name may have dots of its own.
    let candidates = match slashed {
        Some(key) => vec![key],
        None => std::iter::once(Key::new(namespace, text)).chain(dotted()).collect(),
    };
    match candidates.iter().find(|key| exists(key)) {
        Some(key) => Ok(key.clone()),
        None => {
            bail!("there is no {what} {}", candidates.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or "))
        }
    }
}
