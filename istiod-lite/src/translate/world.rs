//! What the control plane knows at one moment: every watched object, and indexes over them. Cheap to clone; a clone
//! never changes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use imbl::OrdMap;
use imbl::ordmap::DiffItem;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, ServiceAccount};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::allocate::Prefixes;
use super::lookups::Lookups;
use super::mesh_config::{EntryVisibility, Limit, MeshConfig};
use super::networks::{self, Networks};
use super::owned::Owned;
use super::parameters::Parameters;
use super::service_entry::EntrySelectors;
use crate::revision::Revision;
use crate::types::gateway::{GatewayClassSpec, GatewaySpec, HttpRouteSpec};
use crate::types::networking::{ServiceEntrySpec, WorkloadEntrySpec};
use crate::types::security::{AuthorizationPolicySpec, PeerAuthenticationSpec};
use crate::types::{Held, Key, Node, Object, Pod, Service, Slice, label};

/// Objects of one kind. A clone shares all of it; two tables are compared at the cost of what differs.
pub type Table<T> = OrdMap<Key, Held<T>>;

/// What an operator chose for the whole mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshSettings {
    pub cluster_id: String,
    pub trust_domain: String,
    pub root_namespace: String,
    pub cluster_domain: String,
    /// Whose pods are never captured.
    pub excluded_namespaces: BTreeSet<String>,
    /// Where ServiceEntries without addresses get theirs from.
    pub allocation: Prefixes,
    /// Of the control plane this is. It decides who deploys a Gateway, and nothing of what proxies are told.
    pub revision: Revision,
}

impl Default for MeshSettings {
    fn default() -> Self {
        Self {
            cluster_id: "Kubernetes".into(),
            trust_domain: "cluster.local".into(),
            root_namespace: "istio-system".into(),
            cluster_domain: "cluster.local".into(),
            // As Istio's `excludeNamespaces`.
            excluded_namespaces: BTreeSet::from(["kube-system".to_owned()]),
            allocation: Prefixes::default(),
            revision: Revision::default(),
        }
    }
}

#[derive(Debug, Clone, Default)]
pub struct World {
    pub mesh: Arc<MeshSettings>,
    pub mesh_config: MeshConfig,
    /// Names of namespaces that are not looked at, by MeshConfig.
    pub hidden: Arc<BTreeSet<Arc<str>>>,
    pub namespaces: Table<Namespace>,
    pub nodes: Table<Node>,
    pub pods: Table<Pod>,
    pub services: Table<Service>,
    pub endpoint_slices: Table<Slice>,
    pub gateway_classes: Table<Object<GatewayClassSpec>>,
    pub gateways: Table<Object<GatewaySpec>>,
    pub http_routes: Table<Object<HttpRouteSpec>>,
    pub authorization_policies: Table<Object<AuthorizationPolicySpec>>,
    pub peer_authentications: Table<Object<PeerAuthenticationSpec>>,
    pub service_entries: Table<Object<ServiceEntrySpec>>,
    pub workload_entries: Table<Object<WorkloadEntrySpec>>,
    /// Those made for waypoints.
    pub deployments: Table<Deployment>,
    /// Those made for waypoints.
    pub service_accounts: Table<ServiceAccount>,
    /// Those made for waypoints.
    pub autoscalers: Table<ObjectMeta>,
    /// Those made for waypoints.
    pub disruption_budgets: Table<ObjectMeta>,
    /// ConfigMaps that Gateways refer to, once they have been looked for.
    pub parameters: Table<Parameters>,
    /// ConfigMaps with the defaults of a class of Gateways.
    pub class_defaults: Table<Parameters>,
    /// Those named `istio-ca-root-cert`.
    pub root_certs: Table<ConfigMap>,
    /// Those named `istio-ca-crl`.
    pub revocation_lists: Table<ConfigMap>,
    /// UIDs of pods that are on their way out of the mesh: their enrolment stays until peers know.
    pub leaving: Arc<BTreeSet<String>>,
    /// By pod UID: which stay in the mesh this is, where it is not the first.
    pub epochs: OrdMap<String, u64>,
    /// Kinds of ours that the API does not have.
    pub not_installed: Arc<BTreeSet<&'static str>>,
    /// By Gateway: why what its waypoint consists of could not be written last time.
    pub obstacles: Arc<BTreeMap<Key, String>>,
}

impl World {
    pub fn namespace(&self, name: &str) -> Option<&Held<Namespace>> {
        self.namespaces.get(&Key::new("", name))
    }

    pub fn namespace_label(&self, namespace: &str, key: &str) -> Option<&str> {
        label(&self.namespace(namespace)?.metadata, key)
    }

    /// The network that workloads of this cluster are on unless they say another.
    pub fn network(&self) -> &str {
        self.namespace_label(&self.mesh.root_namespace, networks::NETWORK).unwrap_or_default()
    }

    /// Brings [`Self::hidden`] up to date with the namespaces and MeshConfig.
    pub fn find_hidden(&mut self) {
        let chosen = &self.mesh_config.chosen;
        if !chosen.discovery_selectors.is_empty() || !self.hidden.is_empty() {
            self.hidden = Arc::new(chosen.hidden(self.namespaces.values().map(|found| &**found), &self.mesh));
        }
    }

    /// As far as ServiceEntries of a namespace may be seen.
    pub fn entry_limit(&self, namespace: &str) -> Limit {
        let visibility = &self.mesh_config.chosen.service_entry_visibility;
        let of = |visibility: &EntryVisibility| visibility.of(self.namespace(namespace).map(|found| &**found));
        visibility.as_ref().map_or(Limit::Public, of)
    }

    /// The trust domain and its other names; empty where it has none.
    pub fn trust_domains(&self) -> Arc<[String]> {
        self.mesh_config.chosen.trust_domains(&self.mesh.trust_domain)
    }

    /// The name a Service is known by.
    pub fn hostname(&self, service: &Key) -> String {
        format!("{}.{}.svc.{}", service.name, service.namespace, self.mesh.cluster_domain)
    }

    /// `<namespace>/<hostname>`, the xDS name of a Service.
    pub fn service_name(&self, service: &Key) -> String {
        format!("{}/{}", service.namespace, self.hostname(service))
    }

    pub fn pod_uid(&self, pod: &Key) -> String {
        format!("{}//Pod/{}/{}", self.mesh.cluster_id, pod.namespace, pod.name)
    }

    /// A SPIFFE identity as policies spell it, without the scheme.
    pub fn principal(&self, namespace: &str, service_account: &str) -> String {
        format!("{}/ns/{namespace}/sa/{service_account}", self.mesh.trust_domain)
    }

    /// The SPIFFE identity of a service account, `default` where none is named.
    pub fn identity(&self, namespace: &str, service_account: &str) -> String {
        let account = if service_account.is_empty() { "default" } else { service_account };
        format!("spiffe://{}", self.principal(namespace, account))
    }

    /// Whether a WorkloadEntry names a service account.
    pub fn has_machine_of(&self, namespace: &str, account: &str) -> bool {
        let names = |(_, entry): (&Key, &Object<WorkloadEntrySpec>)| {
            entry.spec.as_ref().is_ok_and(|spec| spec.account() == account)
        };
        in_namespace(&self.workload_entries, namespace).any(names)
    }
}

/// A world and what is looked up in it.
#[derive(Clone, Copy)]
pub struct View<'a> {
    pub world: &'a World,
    pub lookups: &'a Lookups,
    pub entries: &'a EntrySelectors,
    pub networks: &'a Networks,
}

impl<'a> View<'a> {
    pub fn owned(self) -> Owned<'a> {
        Owned { world: self.world, lookups: self.lookups }
    }

    pub fn services_in(self, namespace: &str) -> impl Iterator<Item = (&'a Key, &'a Service)> + use<'a> {
        in_namespace(&self.world.services, namespace)
    }

    pub fn slices_of<'s>(self, service: &'s Key) -> impl Iterator<Item = &'a Slice> + use<'a, 's> {
        let slices = &self.world.endpoint_slices;
        self.lookups.slices_of(service).filter_map(|key| slices.get(key)).map(|slice| &**slice)
    }
}

/// The objects of one namespace.
pub fn in_namespace<'a, T>(
    table: &'a Table<T>,
    namespace: &str,
) -> impl Iterator<Item = (&'a Key, &'a T)> + use<'a, T> {
    let first = Key::first_of(namespace);
    let namespace = Arc::clone(&first.namespace);
    table.range(first..).take_while(move |(key, _)| key.namespace == namespace).map(|(key, object)| (key, &**object))
}

/// What two tables do not have in common: under which key, what the old one has there and what the new one.
pub fn differing<'a, T>(
    old: &'a Table<T>,
    new: &'a Table<T>,
) -> impl Iterator<Item = (&'a Key, Option<&'a T>, Option<&'a T>)> {
    old.diff(new).map(|item| match item {
        DiffItem::Add(key, is) => (key, None, Some(&**is)),
        DiffItem::Update { old: (_, was), new: (key, is) } => (key, Some(&**was), Some(&**is)),
        DiffItem::Remove(key, was) => (key, Some(&**was), None),
    })
}

#[cfg(test)]
mod tests {
    use super::super::fixture;

    #[test]
    fn a_machine_has_the_identity_that_its_entry_names() {
        let world = fixture::world(
            "kind: Pod\nmetadata: {name: p, namespace: shop}\nspec: {serviceAccountName: cart, containers: []}\n\
             status: {phase: Running}\n---\n\
             kind: WorkloadEntry\nmetadata: {name: v, namespace: shop}\nspec: {address: 192.0.2.1, serviceAccount: vm}\n---\n\
             kind: WorkloadEntry\nmetadata: {name: w, namespace: other}\nspec: {address: 192.0.2.2}\n",
        );
        for (namespace, account, is) in [
            ("shop", "cart", false),
            ("shop", "vm", true),
            ("shop", "default", false),
            ("other", "default", true),
            ("other", "vm", false),
            ("other", "cart", false),
        ] {
            assert_eq!(world.has_machine_of(namespace, account), is, "{namespace}/{account}");
        }
    }
}
