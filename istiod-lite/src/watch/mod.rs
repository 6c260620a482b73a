//! The Kubernetes API as a [`World`]: one task for each kind keeps its table current and says when something changed.
//! Custom kinds are read as dynamic objects, so a malformed one costs itself alone. A kind whose CRD is not installed is
//! an empty table until it is.

mod mesh_config;
mod parameters;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::{StreamExt, pin_mut};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::core::v1::{self as api, ConfigMap, Namespace, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::DynamicObject;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Resource};
use mesh_proto::enrolment::ResolveRequest;
use mesh_proto::enrolment::resolve_response::Verdict;
use serde::de::DeserializeOwned;
use tokio::sync::{self, Notify};
use tokio::task::JoinSet;

use crate::placement;
use crate::resources::{Holder, Placements, PodDirectory, PodInfo, interleaved, lock};
use crate::translate::binding::MANAGED_LABEL;
use crate::translate::mesh_config::Chosen;
use crate::translate::parameters::{DEFAULTS_FOR, Parameters};
use crate::translate::world::{MeshSettings, Table, World};
use crate::types::gateway::GATEWAY_NAME;
use crate::types::networking::WorkloadEntrySpec;
use crate::types::{CustomKind, Held, Key, Node, Object, Pod, Service, Slice, label};

/// Between attempts while the API does not answer; doubled up to the second.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// The name of the ConfigMap with the mesh's root certificate, in every namespace.
pub const ROOT_CERT_CONFIG_MAP: &str = "istio-ca-root-cert";
/// The name of the ConfigMap with the revocation lists that came with the authority's key, in every namespace if there
/// are any.
pub const REVOCATION_CONFIG_MAP: &str = "istio-ca-crl";

/// What the API holds, as far as we have heard.
#[derive(Debug)]
pub struct Watch {
    world: Mutex<World>,
    /// Kinds whose first list is still outstanding.
    unsynced: Mutex<BTreeSet<&'static str>>,
    /// By which namespaces and which MeshConfig the hidden ones were found.
    hidden: Mutex<Hidden>,
    changed: Notify,
    /// The same for any number of listeners.
    news: sync::watch::Sender<u64>,
}

impl Watch {
    /// Starts watching. The tasks end when `tasks` is dropped.
    pub fn start(client: &Client, mesh: MeshSettings, tasks: &mut JoinSet<()>) -> Arc<Self> {
        let watch = Arc::new(Self {
            world: Mutex::new(World { mesh: Arc::new(mesh), ..World::default() }),
            unsynced: Mutex::default(),
            hidden: Mutex::default(),
            changed: Notify::new(),
            news: sync::watch::Sender::new(0),
        });
        let mut start = Start { watch: &watch, client, tasks };
        let all = watcher::Config::default;
        let managed = || all().labels(MANAGED_LABEL);
        start.core::<Namespace>("Namespace", all(), |world| &mut world.namespaces);
        start.compact(
            "Node",
            |world| &mut world.nodes,
            |node: api::Node| {
                let node = Node::new(node);
                (node.key.clone(), node)
            },
        );
        start.compact(
            "Pod",
            |world| &mut world.pods,
            |pod: api::Pod| {
                let key = Key::of(&pod.metadata);
                let mut pod = Pod::new(pod);
                pod.key = key.clone();
                (key, pod)
            },
        );
        start.compact(
            "Service",
            |world| &mut world.services,
            |service: api::Service| {
                let service = Service::new(service);
                (service.key.clone(), service)
            },
        );
        start.compact(
            "EndpointSlice",
            |world| &mut world.endpoint_slices,
            |slice: EndpointSlice| {
                let slice = Slice::new(slice);
                (slice.key.clone(), slice)
            },
        );
        start.core::<Deployment>("Deployment", managed(), |world| &mut world.deployments);
        start.core::<ServiceAccount>("ServiceAccount", managed(), |world| &mut world.service_accounts);
        start.meta::<HorizontalPodAutoscaler>("HorizontalPodAutoscaler", managed(), |world| &mut world.autoscalers);
        start.meta::<PodDisruptionBudget>("PodDisruptionBudget", managed(), |world| &mut world.disruption_budgets);
        let named = all().fields(&format!("metadata.name={ROOT_CERT_CONFIG_MAP}"));
        start.core::<ConfigMap>("ConfigMap", named, |world| &mut world.root_certs);
        let named = all().fields(&format!("metadata.name={REVOCATION_CONFIG_MAP}"));
        start.core::<ConfigMap>(REVOCATION_CONFIG_MAP, named, |world| &mut world.revocation_lists);
        start.parameters();
        start.mesh_config();
        start.custom(|world| &mut world.gateway_classes);
        start.custom(|world| &mut world.gateways);
        start.custom(|world| &mut world.http_routes);
        start.custom(|world| &mut world.authorization_policies);
        start.custom(|world| &mut world.peer_authentications);
        start.custom(|world| &mut world.service_entries);
        start.custom(|world| &mut world.workload_entries);
        watch
    }

    /// The world now, with what is hidden. Cheap.
    pub fn snapshot(&self) -> World {
        let mut world = lock(&self.world).clone();
        let mut hidden = lock(&self.hidden);
        let chosen = &world.mesh_config.chosen;
        if !hidden.namespaces.ptr_eq(&world.namespaces) || !Arc::ptr_eq(&hidden.chosen, chosen) {
            let (namespaces, chosen) = (world.namespaces.clone(), Arc::clone(chosen));
            world.hidden = Arc::clone(&hidden.names);
            world.find_hidden();
            // The same while the names are: namespaces change for other reasons.
            let names = if *world.hidden == *hidden.names { &hidden.names } else { &world.hidden };
            *hidden = Hidden { namespaces, chosen, names: Arc::clone(names) };
        }
        world.hidden = Arc::clone(&hidden.names);
        world
    }

    /// Resolves once after any number of changes.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Has the next [`Self::changed`] resolve although nothing did.
    pub fn touch(&self) {
        self.changed.notify_one();
    }

    /// Kinds that have not been listed yet; empty = the world is complete.
    pub fn missing(&self) -> Vec<&'static str> {
        lock(&self.unsynced).iter().copied().collect()
    }

    fn update<T>(&self, table: fn(&mut World) -> &mut Table<T>, write: impl FnOnce(&mut Table<T>)) {
        write(table(&mut lock(&self.world)));
        self.announce();
    }

    fn announce(&self) {
        self.changed.notify_one();
        self.news.send_modify(|count| *count += 1);
    }

    /// Notes whether the API has a kind.
    fn installed(&self, kind: &'static str, is_installed: bool) {
        let mut world = lock(&self.world);
        if world.not_installed.contains(kind) == is_installed {
            let kinds = Arc::make_mut(&mut world.not_installed);
            _ = if is_installed { kinds.remove(kind) } else { kinds.insert(kind) };
        }
    }

    fn synced_kind(&self, kind: &'static str) {
        if lock(&self.unsynced).remove(kind) {
            self.changed.notify_one();
        }
    }
}

/// Namespaces that MeshConfig hides, and what says so.
#[derive(Debug, Default)]
struct Hidden {
    namespaces: Table<Namespace>,
    chosen: Arc<Chosen>,
    names: Arc<BTreeSet<Arc<str>>>,
}

impl PodDirectory for Watch {
    fn synced(&self) -> bool {
        !lock(&self.unsynced).contains("Pod")
    }

    fn pod(&self, namespace: &str, name: &str) -> Option<PodInfo> {
        let pods = lock(&self.world).pods.clone();
        let pod = pods.get(&Key::new(namespace, name))?;
        Some(PodInfo {
            uid: pod.uid.clone().unwrap_or_default(),
            name: name.into(),
            namespace: namespace.into(),
            service_account: pod.template.service_account.as_str().into(),
            node: pod.node().unwrap_or_default().into(),
            phase: pod.phase.name().into(),
            gateway: label(&**pod, GATEWAY_NAME).unwrap_or_default().into(),
        })
    }

    fn node_runs(&self, node: &str, namespace: &str, account: &str) -> bool {
        let pods = lock(&self.world).pods.clone();
        pods.iter().any(|(key, pod)| {
            *key.namespace == *namespace
                && !node.is_empty()
                && pod.node() == Some(node)
                && pod.template.service_account == account
                && !pod.phase.is_over()
        })
    }

    fn holder(&self, namespace: &str, account: &str) -> Holder {
        let world = lock(&self.world).clone();
        if world.has_machine_of(namespace, account) {
            Holder::Somebody
        } else if lock(&self.unsynced).contains(WorkloadEntrySpec::KIND) {
            Holder::Unknown
        } else {
            Holder::Nobody
        }
    }
}

impl Placements for Watch {
    fn resolve(&self, node: &str, pod: &ResolveRequest) -> Verdict {
        // Without the labels of namespaces nothing can be said of a pod.
        if self.missing().is_empty() { placement::resolve(&self.snapshot(), node, pod) } else { placement::unknown() }
    }

    fn news(&self) -> sync::watch::Receiver<u64> {
        self.news.subscribe()
    }
}

struct Start<'a> {
    watch: &'a Arc<Watch>,
    client: &'a Client,
    tasks: &'a mut JoinSet<()>,
}

impl Start<'_> {
    fn core<K>(&mut self, kind: &'static str, config: watcher::Config, table: fn(&mut World) -> &mut Table<K>)
    where
        K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug + Send + Sync + 'static,
    {
        let api = Api::<K>::all(self.client.clone());
        self.spawn(kind, api, config, table, |mut object| {
            object.meta_mut().managed_fields = None;
            (Key::of(object.meta()), object)
        });
    }

    /// Of objects of which nothing else is looked at.
    fn meta<K>(&mut self, kind: &'static str, config: watcher::Config, table: fn(&mut World) -> &mut Table<ObjectMeta>)
    where
        K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug + Send + Sync + 'static,
    {
        let api = Api::<K>::all(self.client.clone());
        self.spawn(kind, api, config, table, |mut object| {
            let mut meta = std::mem::take(object.meta_mut());
            meta.managed_fields = None;
            (Key::of(&meta), meta)
        });
    }

    /// What waypoints are to be made like.
    fn parameters(&mut self) {
        let root = lock(&self.watch.world).mesh.root_namespace.clone();
        let api = Api::<ConfigMap>::namespaced(self.client.clone(), &root);
        let defaults = watcher::Config::default().labels(DEFAULTS_FOR);
        self.spawn(
            DEFAULTS_FOR,
            api,
            defaults,
            |world| &mut world.class_defaults,
            |found| (Key::of(&found.metadata), Parameters::read(found)),
        );
        self.tasks.spawn(parameters::follow(Arc::clone(self.watch), self.client.clone()));
    }

    fn mesh_config(&mut self) {
        lock(&self.watch.unsynced).insert(mesh_config::KIND);
        self.tasks.spawn(mesh_config::follow(Arc::clone(self.watch), self.client.clone()));
    }

    /// Of objects of which only what is looked at is kept.
    fn compact<K, T>(&mut self, kind: &'static str, table: fn(&mut World) -> &mut Table<T>, convert: fn(K) -> (Key, T))
    where
        K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug + Send + Sync + 'static,
        T: Send + Sync + 'static,
    {
        let api = Api::<K>::all(self.client.clone());
        self.spawn(kind, api, watcher::Config::default(), table, convert);
    }

    fn custom<S: CustomKind>(&mut self, table: fn(&mut World) -> &mut Table<Object<S>>) {
        let api = Api::<DynamicObject>::all_with(self.client.clone(), &S::api_resource());
        self.spawn(S::KIND, api, watcher::Config::default(), table, |object| {
            let object = Object::from_dynamic(object);
            (object.key(), object)
        });
    }

    fn spawn<K, T>(
        &mut self,
        kind: &'static str,
        api: Api<K>,
        config: watcher::Config,
        table: fn(&mut World) -> &mut Table<T>,
        convert: fn(K) -> (Key, T),
    ) where
        K: Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + Sync + 'static,
        T: Send + Sync + 'static,
    {
        lock(&self.watch.unsynced).insert(kind);
        self.tasks.spawn(follow(Arc::clone(self.watch), kind, api, config, table, convert));
    }
}

/// Keeps one table current, for ever. `convert` says what to keep of an object, and under which key.
async fn follow<K, T>(
    watch: Arc<Watch>,
    kind: &'static str,
    api: Api<K>,
    config: watcher::Config,
    table: fn(&mut World) -> &mut Table<T>,
    convert: fn(K) -> (Key, T),
) where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + Sync + 'static,
    T: Send + Sync + 'static,
{
    let events = watcher(api, config);
    pin_mut!(events);
    let mut listing = Vec::new();
    let mut retry = RETRY.0;
    let entry = |object: K| {
        let (key, object) = convert(object);
        (key, Held::new(object))
    };
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => {
                retry = RETRY.0;
                match event {
                    Event::Init => listing.clear(),
                    Event::InitApply(object) => listing.push(entry(object)),
                    Event::InitDone => {
                        // No object is in a list twice.
                        let listed: Table<T> = interleaved(std::mem::take(&mut listing)).collect();
                        watch.installed(kind, true);
                        watch.update(table, |table| *table = listed);
                        watch.synced_kind(kind);
                    }
                    Event::Apply(object) => {
                        let (key, object) = entry(object);
                        watch.update(table, |table| _ = table.insert(key, object));
                    }
                    Event::Delete(object) => {
                        let key = Key::of(object.meta());
                        watch.update(table, |table| _ = table.remove(&key));
                    }
                }
            }
            Err(error) => {
                if is_not_installed(&error) {
                    tracing::debug!(kind, "kind is not installed");
                    watch.installed(kind, false);
                    watch.update(table, |table| *table = Table::default());
                    watch.synced_kind(kind);
                } else {
                    tracing::warn!(kind, error = %error, "watch interrupted; going on with what is known");
                }
                tokio::time::sleep(retry).await;
                retry = (retry * 2).min(RETRY.1);
            }
        }
    }
}

fn is_not_installed(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::InitialListFailed(kube::Error::Api(status)) if status.code == 404)
}
