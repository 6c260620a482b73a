//! The controllers that belong to an API server: initial objects, every namespace's content, namespace and definition
//! clean-up, and garbage collection by owner references.
//!
//! [`plan`] is a pure function of everything stored; the loop runs it after each commit and carries out what it says in
//! one transaction, planned again inside.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;

use super::api::Api;
use super::crd::CLEANUP_FINALIZER;
use super::error::ApiResult;
use super::rbac;
use super::registry::{CONFIG_MAPS, CRDS, Kind, NAMESPACES, Registry, SERVICE_ACCOUNTS, SERVICES, built_in_registry};
use super::store::{Key, Mode, Object, Transaction};
use super::verbs::{self, DeleteOptions, FOREGROUND, ORPHAN, Settings, Write, is_terminating};

/// Commits that come close together are looked at once.
const SETTLE: Duration = Duration::from_millis(5);
/// Looking at everything takes at most one part in this of one core, however much there is and however fast it changes.
const SHARE: u32 = 10;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Action {
    /// Create what every namespace has.
    FillNamespace(Arc<str>),
    Delete {
        key: Key,
        propagation: &'static str,
    },
    RemoveFinalizer {
        key: Key,
        finalizer: &'static str,
    },
    /// Forget owners, by UID.
    Disown {
        key: Key,
        owners: Vec<String>,
    },
    /// Nothing is left in a terminating namespace.
    FinishNamespace(Key),
}

/// Runs until `stopping`.
pub async fn run(api: Arc<Api>, stopping: watch::Receiver<bool>) {
    let mut commits = api.store.subscribe_all();
    commits.mark_changed();
    let mut settle = SETTLE;
    loop {
        tokio::select! {
            () = super::server::stopped(stopping.clone()) => return,
            changed = commits.changed() => if changed.is_err() { return },
        }
        tokio::time::sleep(settle).await;
        commits.mark_unchanged();
        let started = Instant::now();
        let idle = plan(&api.store.all()).is_empty();
        settle = SETTLE.max(started.elapsed() * (SHARE - 1));
        if idle {
            continue;
        }
        let registry = api.registry();
        let settings = Arc::clone(&api.settings);
        let outcome = api
            .write(Mode::Commit, move |tx| {
                for action in plan(&tx.all()) {
                    // One object that cannot be changed must not hold up the others.
                    if let Err(error) = carry_out(tx, &registry, &settings, &action) {
                        tracing::warn!(?action, %error, "controller");
                    }
                }
                Ok(())
            })
            .await;
        if let Err(error) = outcome {
            tracing::warn!(%error, "the controllers' changes were not stored; they are tried again after the next change");
        }
    }
}

/// What has to happen, given everything stored.
fn plan(all: &[(Key, Arc<Object>)]) -> Vec<Action> {
    let mut actions = Vec::new();
    namespaces(all, &mut actions);
    definitions(all, &mut actions);
    owners(all, &mut actions);
    actions
}

fn namespaces(all: &[(Key, Arc<Object>)], actions: &mut Vec<Action>) {
    let mut content: HashMap<&str, Vec<(&Key, &Object)>> = HashMap::new();
    for (key, object) in all.iter().filter(|(key, _)| !key.namespace.is_empty()) {
        content.entry(&key.namespace).or_default().push((key, object));
    }
    for (key, namespace) in all.iter().filter(|(key, _)| &*key.resource == NAMESPACES) {
        let inside = content.get(&*key.name).map(Vec::as_slice).unwrap_or_default();
        if !is_terminating(&namespace.value) {
            let has =
                |resource: &str, name: &str| inside.iter().any(|(k, _)| &*k.resource == resource && &*k.name == name);
            if !has(SERVICE_ACCOUNTS, "default") || !has(CONFIG_MAPS, "kube-root-ca.crt") {
                actions.push(Action::FillNamespace(key.name.clone()));
            }
        } else if inside.is_empty() {
            if namespace.value["spec"]["finalizers"].as_array().is_some_and(|f| f.iter().any(|f| f == "kubernetes")) {
                actions.push(Action::FinishNamespace(key.clone()));
            }
        } else {
            let alive = inside.iter().filter(|(_, object)| !is_terminating(&object.value));
            actions.extend(alive.map(|(key, _)| Action::Delete { key: (*key).clone(), propagation: "Background" }));
        }
    }
}

fn definitions(all: &[(Key, Arc<Object>)], actions: &mut Vec<Action>) {
    for (key, crd) in all.iter().filter(|(k, o)| &*k.resource == CRDS && is_terminating(&o.value)) {
        if !has_finalizer(&crd.value, CLEANUP_FINALIZER) {
            continue;
        }
        let spec = &crd.value["spec"];
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        let resource = format!("{}/{}", text(&spec["group"]), text(&spec["names"]["plural"]));
        let mut instances = all.iter().filter(|(k, _)| *k.resource == *resource).peekable();
        if instances.peek().is_none() {
            actions.push(Action::RemoveFinalizer { key: key.clone(), finalizer: CLEANUP_FINALIZER });
        }
        let alive = instances.filter(|(_, o)| !is_terminating(&o.value));
        actions.extend(alive.map(|(key, _)| Action::Delete { key: key.clone(), propagation: "Background" }));
    }
}

fn has_finalizer(object: &Value, finalizer: &str) -> bool {
    object["metadata"]["finalizers"].as_array().is_some_and(|list| list.iter().any(|f| f == finalizer))
}

fn references(object: &Value) -> &[Value] {
    object["metadata"]["ownerReferences"].as_array().map(Vec::as_slice).unwrap_or_default()
}

/// Garbage collection: dependents whose owners are gone go, unless the owner said to orphan them.
fn owners(all: &[(Key, Arc<Object>)], actions: &mut Vec<Action>) {
    let by_uid: HashMap<&str, &(Key, Arc<Object>)> =
        all.iter().filter_map(|entry| Some((entry.1.value["metadata"]["uid"].as_str()?, entry))).collect();
    // Owners somebody still refers to, and those whose deletion must wait for a dependent.
    let (mut referred, mut blocked) = (HashSet::new(), HashSet::new());
    for (_, object) in all {
        for reference in references(&object.value) {
            let uid = reference["uid"].as_str().unwrap_or_default();
            referred.insert(uid);
            if reference["blockOwnerDeletion"] == true {
                blocked.insert(uid);
            }
        }
    }
    for (key, object) in all {
        let references = references(&object.value);
        if references.is_empty() || is_terminating(&object.value) {
            continue;
        }
        let (mut alive, mut going, mut gone, mut orphaning) = (false, false, Vec::new(), Vec::new());
        for reference in references {
            let uid = reference["uid"].as_str().unwrap_or_default();
            // An owner in another namespace is no owner.
            let owner = by_uid.get(uid).filter(|(k, _)| k.namespace.is_empty() || k.namespace == key.namespace);
            match owner {
                None => gone.push(uid.to_owned()),
                Some((_, o)) if is_terminating(&o.value) && has_finalizer(&o.value, ORPHAN) => {
                    orphaning.push(uid.to_owned())
                }
                Some((_, o)) if is_terminating(&o.value) && has_finalizer(&o.value, FOREGROUND) => going = true,
                Some(_) => alive = true,
            }
        }
        if !orphaning.is_empty() {
            actions.push(Action::Disown { key: key.clone(), owners: orphaning });
        } else if !alive && (going || !gone.is_empty()) {
            let own = object.value["metadata"]["uid"].as_str().unwrap_or_default();
            let propagation = if going && referred.contains(own) { "Foreground" } else { "Background" };
            actions.push(Action::Delete { key: key.clone(), propagation });
        } else if !gone.is_empty() {
            actions.push(Action::Disown { key: key.clone(), owners: gone });
        }
    }
    for (key, object) in all.iter().filter(|(_, o)| is_terminating(&o.value)) {
        let uid = object.value["metadata"]["uid"].as_str().unwrap_or_default();
        for (finalizer, holding) in [(FOREGROUND, &blocked), (ORPHAN, &referred)] {
            if has_finalizer(&object.value, finalizer) && !holding.contains(uid) {
                actions.push(Action::RemoveFinalizer { key: key.clone(), finalizer });
            }
        }
    }
}

fn carry_out(tx: &mut Transaction<'_>, registry: &Registry, settings: &Settings, action: &Action) -> ApiResult<()> {
    let key = match action {
        Action::FillNamespace(name) => return verbs::ensure_namespace_content(tx, settings, name),
        Action::Delete { key, .. }
        | Action::RemoveFinalizer { key, .. }
        | Action::Disown { key, .. }
        | Action::FinishNamespace(key) => key,
    };
    // An earlier action of this round may have taken it along.
    if tx.get(key).is_none() {
        return Ok(());
    }
    let Some(kind) = registry.by_storage(&key.resource) else {
        // Its definition is gone, so nobody can delete it in the ordinary way.
        tx.delete(key);
        return Ok(());
    };
    let mut write = Write::internal(kind, settings, &key.namespace);
    match action {
        Action::Delete { propagation, .. } => {
            let options = DeleteOptions { propagation: Some((*propagation).to_owned()), ..DeleteOptions::default() };
            write.delete(tx, &key.name, &options)?;
        }
        Action::RemoveFinalizer { finalizer, .. } => {
            edit(&mut write, tx, key, |metadata| {
                if let Some(list) = metadata["finalizers"].as_array_mut() {
                    list.retain(|f| f != finalizer);
                }
            })?;
        }
        Action::Disown { owners, .. } => {
            edit(&mut write, tx, key, |metadata| {
                if let Some(list) = metadata["ownerReferences"].as_array_mut() {
                    list.retain(|r| !owners.iter().any(|uid| r["uid"] == uid.as_str()));
                }
            })?;
        }
        Action::FinishNamespace(_) => {
            write.subresource = "finalize";
            write.update(tx, &key.name, |_, current| {
                let mut new = current.clone();
                new["spec"]["finalizers"] = json!([]);
                Ok(new)
            })?;
        }
        Action::FillNamespace(_) => {}
    }
    Ok(())
}

fn edit(write: &mut Write<'_>, tx: &mut Transaction<'_>, key: &Key, change: impl FnOnce(&mut Value)) -> ApiResult<()> {
    write.update(tx, &key.name, |_, current| {
        let mut new = current.clone();
        change(&mut new["metadata"]);
        Ok(new)
    })?;
    Ok(())
}

/// The `kubernetes` Service's address in a range: the first one.
pub fn api_address(range: &IpNet) -> Option<IpAddr> {
    range.hosts().next()
}

/// Creates what a cluster starts with, where it is missing.
///
/// # Errors
/// When the store refuses.
pub async fn bootstrap(api: &Arc<Api>, listening: &[SocketAddr]) -> ApiResult<()> {
    let settings = Arc::clone(&api.settings);
    let listening = listening.to_vec();
    api.write(Mode::Commit, move |tx| {
        let create = |tx: &mut Transaction<'_>, storage: &str, namespace: &str, object: Value| {
            let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
            match built_in_registry().by_storage(storage) {
                Some(kind) if tx.get(&Key::new(storage, namespace, &name)).is_none() => {
                    Write::internal(kind, &settings, namespace).create(tx, object).map(|_| ())
                }
                _ => Ok(()),
            }
        };
        for name in ["default", "kube-system", "kube-public", "kube-node-lease"] {
            create(tx, NAMESPACES, "", json!({"metadata": {"name": name}}))?;
            verbs::ensure_namespace_content(tx, &settings, name)?;
        }
        for (storage, object) in rbac::bootstrap() {
            create(tx, storage, "", object)?;
        }
        let port = listening.first().map_or(6443, SocketAddr::port);
        let addresses: Vec<String> =
            settings.service_cidrs.iter().filter_map(api_address).map(|ip| ip.to_string()).collect();
        let service = json!({
            "metadata": {"name": "kubernetes", "labels": {"component": "apiserver", "provider": "kubernetes"}},
            "spec": {
                "clusterIP": addresses.first(), "clusterIPs": addresses,
                "ports": [{"name": "https", "port": 443, "targetPort": port, "protocol": "TCP"}],
            },
        });
        create(tx, SERVICES, "default", service)?;
        publish_endpoints(tx, &settings, &listening)
    })
    .await
}

/// The addresses pods can reach the API server at, as the `kubernetes` Service's endpoints.
fn publish_endpoints(tx: &mut Transaction<'_>, settings: &Settings, listening: &[SocketAddr]) -> ApiResult<()> {
    const SLICES: &str = "discovery.k8s.io/endpointslices";
    let Some(kind) = built_in_registry().by_storage(SLICES) else { return Ok(()) };
    let kind: &Kind = kind;
    for (name, family, is_v4) in [("kubernetes", "IPv4", true), ("kubernetes-v6", "IPv6", false)] {
        let outside = |a: &&SocketAddr| a.is_ipv4() == is_v4 && !a.ip().is_loopback() && !a.ip().is_unspecified();
        let reachable: Vec<&SocketAddr> = listening.iter().filter(outside).collect();
        let exists = tx.get(&Key::new(SLICES, "default", name)).is_some();
        let mut write = Write::internal(kind, settings, "default");
        let Some(first) = reachable.first() else {
            if exists {
                write.delete(tx, name, &DeleteOptions::default())?;
            }
            continue;
        };
        let same_port = reachable.iter().filter(|a| a.port() == first.port());
        let endpoints: Vec<Value> =
            same_port.map(|a| json!({"addresses": [a.ip().to_string()], "conditions": {"ready": true}})).collect();
        let slice = json!({
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": "kubernetes"}},
            "addressType": family, "endpoints": endpoints,
            "ports": [{"name": "https", "port": first.port(), "protocol": "TCP"}],
        });
        if exists {
            write.update(tx, name, |_, current| {
                let mut new = current.clone();
                new["endpoints"] = slice["endpoints"].clone();
                new["ports"] = slice["ports"].clone();
                Ok(new)
            })?;
        } else {
            write.create(tx, slice)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(resource: &str, namespace: &str, name: &str, metadata: Value) -> (Key, Arc<Object>) {
        let mut value = json!({"metadata": metadata});
        value["metadata"]["name"] = name.into();
        (Key::new(resource, namespace, name), Arc::new(Object { version: 1, value }))
    }

    fn owned_by(uid: &str) -> Value {
        json!({"uid": format!("of-{uid}"), "ownerReferences": [{"uid": uid, "blockOwnerDeletion": true}]})
    }

    #[test]
    fn dependents_follow_their_last_owner() {
        let mut actions = Vec::new();
        owners(&[entry("/pods", "a", "p", owned_by("gone"))], &mut actions);
        assert_eq!(actions, [Action::Delete { key: Key::new("/pods", "a", "p"), propagation: "Background" }]);

        actions.clear();
        let owner = entry("apps/deployments", "a", "d", json!({"uid": "here"}));
        owners(&[owner.clone(), entry("/pods", "a", "p", owned_by("here"))], &mut actions);
        assert_eq!(actions, []);

        owners(&[owner, entry("/pods", "other", "p", owned_by("here"))], &mut actions);
        assert!(matches!(actions.as_slice(), [Action::Delete { .. }]), "an owner in another namespace is none");
    }

    #[test]
    fn foreground_deletion_waits_for_dependents() {
        let going = json!({"uid": "o", "deletionTimestamp": "x", "finalizers": [FOREGROUND]});
        let owner = entry("apps/deployments", "a", "d", going);
        let mut actions = Vec::new();
        owners(&[owner.clone(), entry("/pods", "a", "p", owned_by("o"))], &mut actions);
        assert_eq!(actions, [Action::Delete { key: Key::new("/pods", "a", "p"), propagation: "Background" }]);
        actions.clear();
        owners(&[owner], &mut actions);
        assert!(matches!(actions.as_slice(), [Action::RemoveFinalizer { finalizer: FOREGROUND, .. }]));
    }

    #[test]
    fn a_terminating_namespace_is_emptied_then_finished() {
        let mut namespace = entry(NAMESPACES, "", "a", json!({"deletionTimestamp": "x"}));
        let value = json!({"metadata": namespace.1.value["metadata"], "spec": {"finalizers": ["kubernetes"]}});
        namespace.1 = Arc::new(Object { version: 1, value });
        let mut actions = Vec::new();
        namespaces(&[namespace.clone(), entry("/pods", "a", "p", json!({}))], &mut actions);
        assert!(matches!(actions.as_slice(), [Action::Delete { .. }]));
        actions.clear();
        namespaces(&[namespace], &mut actions);
        assert!(matches!(actions.as_slice(), [Action::FinishNamespace(_)]));
    }
}
