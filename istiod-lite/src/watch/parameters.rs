//! The ConfigMaps that Gateways refer to. Each has a watch of its own, by its name, for as long as a Gateway names it, as
//! kubelets watch those of their pods: a cluster has thousands of ConfigMaps and a handful of these.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::{StreamExt, pin_mut};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client};
use tokio::task::JoinSet;

use super::{RETRY, Watch};
use crate::translate::parameters::{Parameters, referenced};
use crate::types::{Held, Key};

/// Keeps the table of parameters to what Gateways refer to, for ever.
pub(super) async fn follow(watch: Arc<Watch>, client: Client) {
    let mut news = watch.news.subscribe();
    // Each set holds the one task of its ConfigMap; all end with this one.
    let mut followed: BTreeMap<Key, JoinSet<()>> = BTreeMap::new();
    let mut seen = None;
    loop {
        news.mark_unchanged();
        let world = watch.snapshot();
        let now = (world.gateways.clone(), world.gateway_classes.clone());
        let is_same =
            seen.as_ref().is_some_and(|(gateways, classes): &(_, _)| now.0.ptr_eq(gateways) && now.1.ptr_eq(classes));
        if !is_same {
            let wanted = referenced(&world);
            for (key, mut task) in followed.extract_if(.., |key, _| !wanted.contains(key)).collect::<Vec<_>>() {
                // Awaited, so that it puts nothing back.
                task.shutdown().await;
                watch.update(|world| &mut world.parameters, |table| _ = table.remove(&key));
            }
            for key in wanted {
                let start = || {
                    let mut task = JoinSet::new();
                    task.spawn(follow_one(Arc::clone(&watch), client.clone(), key.clone()));
                    task
                };
                followed.entry(key.clone()).or_insert_with(start);
            }
            seen = Some(now);
        }
        if news.changed().await.is_err() {
            return;
        }
    }
}

async fn follow_one(watch: Arc<Watch>, client: Client, key: Key) {
    let api = Api::<ConfigMap>::namespaced(client, &key.namespace);
    let events = watcher(api, watcher::Config::default().fields(&format!("metadata.name={}", key.name)));
    pin_mut!(events);
    let put =
        |found| watch.update(|world| &mut world.parameters, |table| _ = table.insert(key.clone(), Held::new(found)));
    let mut listed = None;
    let mut retry = RETRY.0;
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => {
                retry = RETRY.0;
                match event {
                    Event::Init => listed = None,
                    Event::InitApply(found) => listed = Some(found),
                    Event::InitDone => put(listed.take().map_or_else(Parameters::missing, Parameters::read)),
                    Event::Apply(found) => put(Parameters::read(found)),
                    Event::Delete(_) => put(Parameters::missing()),
                }
            }
            Err(error) => {
                tracing::warn!(object = %key, %error, "watch of a waypoint's parameters interrupted; going on with what is known");
                let was_read = watch.snapshot().parameters.contains_key(&key);
                if let Some(reason) = refused(&error).filter(|_| !was_read) {
                    put(Parameters::unreadable(format!("cannot be read: {reason}")));
                }
                tokio::time::sleep(retry).await;
                retry = (retry * 2).min(RETRY.1);
            }
        }
    }
}

/// What the API has against it for good, such as a right that is missing.
fn refused(error: &watcher::Error) -> Option<String> {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status)) if matches!(status.code, 401 | 403) => {
            Some(status.message.clone())
        }
        _ => None,
    }
}
