//! Dedicated mode: one workload, in whose own network namespace this process runs. The basis for machines outside the
//! cluster and for a proxy beside each pod.
//!
//! The data path is that of the shared mode. What differs: the workload is not told by an enrolment but looked for in
//! what the control plane says of the mesh ([`workload`]); its namespace is our own, so nothing is searched or entered;
//! certificates are asked for in our own name; and our connections to the control plane start where everything is
//! captured, so they carry the mark that exempts them ([`control`]). With capture off the `redirect` back end listens
//! and nothing is done to bring connections to it ([`open`]).

pub mod control;
pub mod open;
pub mod release;
pub mod workload;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mesh::drain::DrainWatcher;
use mesh::store::Store;
use tokio::sync::watch;

use crate::config::{Config, Dedicated};
use crate::node::enrolment::Desired;
use workload::NotFound;

/// While the workload is not known it is looked for this often too: an address may still have to come up.
const RETRY: Duration = Duration::from_secs(1);

/// Tells the manager to capture the one workload, from when it is known, until the drain begins. It is looked for anew
/// whenever the store has changed. Once known it stays, whatever the control plane forgets: only `ztunnel release`
/// takes a machine out of the mesh.
pub async fn follow(
    config: Arc<Config>,
    settings: Dedicated,
    store: Arc<Store>,
    desired: watch::Sender<Desired>,
    drain: DrainWatcher,
) {
    let mut changes = store.watch();
    let mut told: Option<NotFound> = None;
    loop {
        changes.borrow_and_update();
        match workload::enrolment(&store.snapshot(), &config, &settings) {
            Ok(found) => {
                told = None;
                desired.send_if_modified(|now| {
                    let pods = BTreeMap::from([(found.uid.clone(), found)]);
                    let changed = !now.complete || now.pods != pods;
                    (now.pods, now.complete) = (pods, true);
                    changed
                });
            }
            Err(error) if told.as_ref() != Some(&error) => {
                tracing::warn!(%error, "the workload of this ztunnel cannot be served");
                told = Some(error);
            }
            Err(_) => {}
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(RETRY), if told.is_some() => {}
            () = drain.draining() => return,
        }
    }
}
