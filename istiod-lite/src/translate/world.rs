//! What the control plane knows at one moment: every watched object, and indexes over them. Cheap to clone; a clone
//! never changes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::allocate::Prefixes;
use super::owned::Owned;
use super::service_entry::Entries;
use crate::types::gateway::{GatewayClassSpec, GatewaySpec, HttpRouteSpec};
use crate::types::networking::{ServiceEntrySpec, WorkloadEntrySpec};
use crate::types::security::{AuthorizationPolicySpec, PeerAuthenticationSpec};
use crate::types::{Key, Object, label};

/// Objects of one kind. The map is shared between clones and copied when written while shared.
pub type Table<T> = Arc<BTreeMap<Key, Arc<T>>>;

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
        }
    }
}

#[derive(Debug, Clone, Default)]
pub struct World {
    pub mesh: Arc<MeshSettings>,
    pub namespaces: Table<Namespace>,
    pub nodes: Table<Node>,
    pub pods: Table<Pod>,
    pub services: Table<Service>,
    pub endpoint_slices: Table<EndpointSlice>,
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
    /// Those named `istio-ca-root-cert`.
    pub root_certs: Table<ConfigMap>,
    /// UIDs of pods that are on their way out of the mesh: their enrolment stays until peers know.
    pub leaving: Arc<BTreeSet<String>>,
    /// By pod UID: which stay in the mesh this is, where it is not the first.
    pub epochs: Arc<BTreeMap<String, u64>>,
    /// By Gateway: why what its waypoint consists of could not be written last time.
    pub obstacles: Arc<BTreeMap<Key, String>>,
}

impl World {
    pub fn namespace(&self, name: &str) -> Option<&Arc<Namespace>> {
        self.namespaces.get(&Key::new("", name))
    }

    pub fn namespace_label(&self, namespace: &str, key: &str) -> Option<&str> {
        label(&self.namespace(namespace)?.metadata, key)
    }

    /// The network all workloads of this cluster are on.
    pub fn network(&self) -> &str {
        self.namespace_label(&self.mesh.root_namespace, "topology.istio.io/network").unwrap_or_default()
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
}

/// Lookups that would otherwise be scans, built once per translation.
pub struct View<'a> {
    pub world: &'a World,
    pub owned: Owned<'a>,
    pub entries: Entries<'a>,
    services: HashMap<&'a str, Vec<&'a Service>>,
    /// By namespace and Service name.
    slices: HashMap<&'a str, HashMap<&'a str, Vec<&'a EndpointSlice>>>,
}

impl<'a> View<'a> {
    pub fn new(world: &'a World) -> Self {
        let mut services: HashMap<&str, Vec<&Service>> = HashMap::new();
        for (key, service) in world.services.iter() {
            services.entry(&key.namespace).or_default().push(service);
        }
        let mut slices: HashMap<&str, HashMap<&str, Vec<&EndpointSlice>>> = HashMap::new();
        for (key, slice) in world.endpoint_slices.iter() {
            if let Some(service) = label(&slice.metadata, "kubernetes.io/service-name") {
                slices.entry(&key.namespace).or_default().entry(service).or_default().push(slice);
            }
        }
        let owned = Owned::new(world);
        let entries = Entries::new(world, &owned);
        Self { world, owned, entries, services, slices }
    }

    pub fn services_in(&self, namespace: &str) -> impl Iterator<Item = &'a Service> + '_ {
        self.services.get(namespace).into_iter().flatten().copied()
    }

    pub fn slices_of(&self, meta: &ObjectMeta) -> impl Iterator<Item = &'a EndpointSlice> + use<'_, 'a> {
        let name = meta.name.as_deref().unwrap_or_default();
        let namespace = self.slices.get(meta.namespace.as_deref().unwrap_or_default());
        namespace.and_then(|services| services.get(name)).into_iter().flatten().copied()
    }
}
