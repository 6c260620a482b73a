//! The Kubernetes API as a [`World`]: one task for each kind keeps its table current and says when something changed.
//! Custom kinds are read as dynamic objects, so a malformed one costs itself alone. A kind whose CRD is not installed is
//! an empty table until it is.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::{StreamExt, pin_mut};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::DynamicObject;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use crate::resources::{PodDirectory, PodInfo, lock};
use crate::translate::binding::MANAGED_LABEL;
use crate::translate::workload::service_account;
use crate::translate::world::{MeshSettings, Table, World};
use crate::types::{CustomKind, Key, Object};

/// Between attempts while the API does not answer; doubled up to the second.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// The name of the ConfigMap with the mesh's root certificate, in every namespace.
pub const ROOT_CERT_CONFIG_MAP: &str = "istio-ca-root-cert";

/// What the API holds, as far as we have heard.
#[derive(Debug)]
pub struct Watch {
    world: Mutex<World>,
    /// Kinds whose first list is still outstanding.
    unsynced: Mutex<BTreeSet<&'static str>>,
    changed: Notify,
}

impl Watch {
    /// Starts watching. The tasks end when `tasks` is dropped.
    pub fn start(client: &Client, mesh: MeshSettings, tasks: &mut JoinSet<()>) -> Arc<Self> {
        let watch = Arc::new(Self {
            world: Mutex::new(World { mesh: Arc::new(mesh), ..World::default() }),
            unsynced: Mutex::default(),
            changed: Notify::new(),
        });
        let mut start = Start { watch: &watch, client, tasks };
        let all = watcher::Config::default;
        let managed = || all().labels(MANAGED_LABEL);
        start.core::<Namespace>("Namespace", all(), |world| &mut world.namespaces);
        start.core::<Node>("Node", all(), |world| &mut world.nodes);
        start.core::<Pod>("Pod", all(), |world| &mut world.pods);
        start.core::<Service>("Service", all(), |world| &mut world.services);
        start.core::<EndpointSlice>("EndpointSlice", all(), |world| &mut world.endpoint_slices);
        start.core::<Deployment>("Deployment", managed(), |world| &mut world.deployments);
        start.core::<ServiceAccount>("ServiceAccount", managed(), |world| &mut world.service_accounts);
        let named = all().fields(&format!("metadata.name={ROOT_CERT_CONFIG_MAP}"));
        start.core::<ConfigMap>("ConfigMap", named, |world| &mut world.root_certs);
        start.custom(|world| &mut world.gateway_classes);
        start.custom(|world| &mut world.gateways);
        start.custom(|world| &mut world.http_routes);
        start.custom(|world| &mut world.authorization_policies);
        start.custom(|world| &mut world.peer_authentications);
        start.custom(|world| &mut world.service_entries);
        start.custom(|world| &mut world.workload_entries);
        watch
    }

    /// The world now. Cheap.
    pub fn snapshot(&self) -> World {
        lock(&self.world).clone()
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
        self.changed.notify_one();
    }

    fn synced_kind(&self, kind: &'static str) {
        if lock(&self.unsynced).remove(kind) {
            self.changed.notify_one();
        }
    }
}

impl PodDirectory for Watch {
    fn synced(&self) -> bool {
        !lock(&self.unsynced).contains("Pod")
    }

    fn pod(&self, namespace: &str, name: &str) -> Option<PodInfo> {
        let pods = Arc::clone(&lock(&self.world).pods);
        let pod = pods.get(&Key::new(namespace, name))?;
        Some(PodInfo {
            uid: pod.metadata.uid.as_deref().unwrap_or_default().into(),
            name: name.into(),
            namespace: namespace.into(),
            service_account: service_account(pod).into(),
            node: node_name(pod).into(),
            phase: phase(pod).into(),
            labels: pod.labels().clone(),
        })
    }

    fn node_runs(&self, node: &str, namespace: &str, account: &str) -> bool {
        let pods = Arc::clone(&lock(&self.world).pods);
        pods.iter().any(|(key, pod)| {
            *key.namespace == *namespace
                && !node.is_empty()
                && node_name(pod) == node
                && service_account(pod) == account
                && !matches!(phase(pod), "Failed" | "Succeeded")
        })
    }
}

fn node_name(pod: &Pod) -> &str {
    pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or_default()
}

fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
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
            object
        });
    }

    fn custom<S: CustomKind>(&mut self, table: fn(&mut World) -> &mut Table<Object<S>>) {
        let api = Api::<DynamicObject>::all_with(self.client.clone(), &S::api_resource());
        self.spawn(S::KIND, api, watcher::Config::default(), table, Object::from_dynamic);
    }

    fn spawn<K, T>(
        &mut self,
        kind: &'static str,
        api: Api<K>,
        config: watcher::Config,
        table: fn(&mut World) -> &mut Table<T>,
        convert: fn(K) -> T,
    ) where
        K: Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + Sync + 'static,
        T: Send + Sync + 'static,
    {
        lock(&self.watch.unsynced).insert(kind);
        self.tasks.spawn(follow(Arc::clone(self.watch), kind, api, config, table, convert));
    }
}

/// Keeps one table current, for ever.
async fn follow<K, T>(
    watch: Arc<Watch>,
    kind: &'static str,
    api: Api<K>,
    config: watcher::Config,
    table: fn(&mut World) -> &mut Table<T>,
    convert: fn(K) -> T,
) where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + Sync + 'static,
    T: Send + Sync + 'static,
{
    let events = watcher(api, config);
    pin_mut!(events);
    let mut listing = std::collections::BTreeMap::new();
    let mut retry = RETRY.0;
    let entry = |object: K| (Key::of(object.meta()), Arc::new(convert(object)));
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => {
                retry = RETRY.0;
                match event {
                    Event::Init => listing.clear(),
                    Event::InitApply(object) => {
                        let (key, object) = entry(object);
                        listing.insert(key, object);
                    }
                    Event::InitDone => {
                        let listed = Arc::new(std::mem::take(&mut listing));
                        watch.update(table, |table| *table = listed);
                        watch.synced_kind(kind);
                    }
                    Event::Apply(object) => {
                        let (key, object) = entry(object);
                        watch.update(table, |table| _ = Arc::make_mut(table).insert(key, object));
                    }
                    Event::Delete(object) => {
                        let key = Key::of(object.meta());
                        watch.update(table, |table| _ = Arc::make_mut(table).remove(&key));
                    }
                }
            }
            Err(error) => {
                if is_not_installed(&error) {
                    tracing::debug!(kind, "kind is not installed");
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
