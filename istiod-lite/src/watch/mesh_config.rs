//! The ConfigMap with MeshConfig, by its name: what of it is in force, and a word in the log for all that is not.

use std::sync::Arc;

use futures_util::{StreamExt, pin_mut};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client};

use super::{RETRY, Watch};
use crate::resources::lock;
use crate::translate::mesh_config::{CONFIG_MAP, MeshConfig};

/// As a kind of which the first list is outstanding.
pub(super) const KIND: &str = "MeshConfig";

/// Keeps MeshConfig current, for ever.
pub(super) async fn follow(watch: Arc<Watch>, client: Client) {
    let root = lock(&watch.world).mesh.root_namespace.clone();
    let api = Api::<ConfigMap>::namespaced(client, &root);
    let events = watcher(api, watcher::Config::default().fields(&format!("metadata.name={CONFIG_MAP}")));
    pin_mut!(events);
    let mut listed = None;
    let mut retry = RETRY.0;
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => {
                retry = RETRY.0;
                match event {
                    Event::Init => listed = None,
                    Event::InitApply(found) => listed = Some(found),
                    Event::InitDone => {
                        take(&watch, listed.take().as_ref());
                        watch.synced_kind(KIND);
                    }
                    Event::Apply(found) => take(&watch, Some(&found)),
                    Event::Delete(_) => take(&watch, None),
                }
            }
            Err(error) => {
                tracing::warn!(kind = KIND, %error, "watch interrupted; going on with what is known");
                tokio::time::sleep(retry).await;
                retry = (retry * 2).min(RETRY.1);
            }
        }
    }
}

fn take(watch: &Watch, found: Option<&ConfigMap>) {
    let (before, now) = {
        let mut world = lock(&watch.world);
        let now = world.mesh_config.after(found, &world.mesh);
        (std::mem::replace(&mut world.mesh_config, now.clone()), now)
    };
    tell(&before, &now);
    if !Arc::ptr_eq(&before.chosen, &now.chosen) {
        tracing::info!(in_force = ?now.chosen, "MeshConfig");
        watch.announce();
    }
}

/// Once for each change, not for each time that the object is written.
fn tell(before: &MeshConfig, now: &MeshConfig) {
    for finding in now.findings.iter().filter(|finding| !before.findings.contains(finding)) {
        tracing::warn!(field = finding.field, reason = finding.reason, "MeshConfig: {}", finding.message);
    }
}
