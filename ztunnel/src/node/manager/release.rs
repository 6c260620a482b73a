//! What a predecessor captured and nobody wants any more: pods that left the mesh while no ztunnel served the node.

use std::collections::BTreeMap;

use ebpf_loader::NetnsCookie;

use super::{GONE_CHECK, Manager, State};
use crate::node::find::Found;
use crate::node::release;

impl Manager {
    /// Releases it. True when something was left alone because it may be that of a wanted pod which has not been found
    /// yet; then it is to be looked at again.
    pub(super) async fn release_unwanted(&mut self) -> bool {
        let known: Vec<NetnsCookie> = self.deps.registry.pods().iter().map(|pod| pod.cookie).collect();
        let attached = self.deps.capture.attached().unwrap_or_else(|error| {
            tracing::warn!(%error, "reading what a predecessor captured");
            Vec::new()
        });
        let foreign: Vec<_> = attached.into_iter().filter(|cookie| !known.contains(cookie)).collect();
        let mut owners = if foreign.is_empty() { BTreeMap::new() } else { self.owners().await };
        let may_be_wanted = self.entries.values().any(|entry| matches!(entry.state, State::Waiting(_)));
        let mut is_left = false;
        for cookie in foreign {
            let owner = self.deps.capture.netns_inode(cookie).ok().flatten().and_then(|inode| owners.remove(&inode));
            match owner {
                Some((uid, _)) if self.entries.contains_key(&uid) => is_left = true,
                Some((uid, found)) => self.release(&uid, cookie, found).await,
                None => is_left |= may_be_wanted,
            }
        }
        if is_left {
            return true;
        }
        match self.deps.capture.collect_garbage(&known) {
            Ok(removed) if removed.is_empty() => {}
            Ok(removed) => tracing::info!(count = removed.len(), "released namespaces that are no longer wanted"),
            Err(error) => tracing::warn!(%error, "releasing namespaces that are no longer wanted"),
        }
        false
    }

    /// Whose namespaces there are, by inode.
    async fn owners(&self) -> BTreeMap<u64, (String, Found)> {
        let finder = self.deps.finder.clone();
        let found = tokio::task::spawn_blocking(move || finder.all()).await.map_err(std::io::Error::other).flatten();
        found.unwrap_or_else(|error| {
            tracing::error!(%error, "listing processes; it is not known whose a captured namespace is");
            BTreeMap::new()
        })
    }

    /// Ends a pod's capture; rules stay for as long as connections are open that need them.
    async fn release(&mut self, uid: &str, cookie: NetnsCookie, Found { netns, .. }: Found) {
        tracing::info!(%uid, netns = %cookie, "releasing a pod that left the mesh while no ztunnel was here");
        if let Err(error) = release::stop(&self.deps.capture, &netns, cookie).await {
            tracing::warn!(%uid, %error, "ending a pod's capture");
        }
        let (capture, keeper) = (self.deps.capture.clone(), self.keeper.clone());
        self.releasing.spawn(async move {
            release::until_unneeded(&netns, GONE_CHECK).await;
            // It may have joined again.
            if !capture.is_attached(cookie).unwrap_or(true)
                && let Err(error) = keeper.unroute_namespace(&netns, cookie).await
            {
                tracing::debug!(%error, netns = %cookie, "removing a pod's routing");
            }
        });
    }
}
