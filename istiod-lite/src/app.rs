//! Wiring of the control plane: start order, the loop from a changed world to published resources, and the writers that
//! bring the API up to date. Decisions live elsewhere.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context as _;
use futures_util::{StreamExt, stream};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use mesh::clock::Clock;
use mesh::drain::DrainWatcher;
use mesh_proto::enrolment::POD_ENROLMENT_TYPE;
use mesh_proto::security::AUTHORIZATION_TYPE;
use mesh_proto::waypoint::HTTP_POLICY_TYPE;
use mesh_proto::workload::ADDRESS_TYPE;
use serde_json::json;
use time::OffsetDateTime;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::auth::TokenReviewer;
use crate::ca::Authority;
use crate::config::Config;
use crate::enrol::notices::{self, Told};
use crate::enrol::{
    self, Annotate, LEAVE_DEADLINE, Leaving, PATIENCE as PENDING_PATIENCE, REDIRECTION, Reports, Stays, Written,
};
use crate::resources::{Acks, Resource, ResourceStore, lock};
use crate::translate::enrolment;
use crate::translate::translate;
use crate::translate::verdict::{Kind, Verdict};
use crate::translate::world::World;
use crate::types::Key;
use crate::watch::Watch;
use crate::{deploy, serve, status};

/// Changes that arrive within this time of one another are translated together…
const QUIET: Duration = Duration::from_millis(20);
/// …but no change waits longer than this.
const PATIENCE: Duration = Duration::from_millis(100);
/// Before writes that failed are tried again, and between attempts to reach the API at start.
const RETRY: Duration = Duration::from_secs(1);
/// For proxies to acknowledge a policy, before its status says that some have not.
const ACK_PATIENCE: Duration = Duration::from_secs(5);
const CONCURRENT_ANNOTATIONS: usize = 16;
/// The audience of tokens that proxies present.
const TOKEN_AUDIENCE: &str = "istio-ca";

/// One pass: what was seen and what is to be said about it.
struct Pass {
    world: World,
    verdicts: Vec<Verdict>,
    /// Of the resources that were published.
    generation: u64,
}

/// What keeps waypoints from being deployed, as the writer of their objects found it: part of the next pass.
type Obstacles = Arc<Mutex<Arc<BTreeMap<Key, String>>>>;

/// What a pass goes to, and what comes back from it.
struct Published {
    store: Arc<ResourceStore>,
    acks: Arc<Acks>,
    obstacles: Obstacles,
}

/// Where the writer of objects tells what it could not write.
struct Applying {
    watch: Arc<Watch>,
    obstacles: Obstacles,
}

type Passes = watch::Receiver<Option<Arc<Pass>>>;

/// Runs the control plane against the API that `client` speaks to, until drained.
///
/// # Errors
/// A port is taken, or the CA Secret is unusable. An API that does not answer is waited for.
pub async fn run(config: Config, client: Client, drain: DrainWatcher) -> anyhow::Result<()> {
    let metrics = mesh::telemetry::metrics_handle();
    let listeners = serve::Listeners::bind(&config.serve).await?;
    let authority = tokio::select! {
        authority = authority(&config, &client) => authority?,
        () = drain.draining() => return Ok(()),
    };

    // Dropping the set ends every task below; it goes when the server has drained.
    let mut tasks = JoinSet::new();
    let watch = Watch::start(&client, config.mesh.clone(), &mut tasks);
    let (store, acks, reports) =
        (Arc::new(ResourceStore::new()), Arc::new(Acks::default()), Arc::new(Reports::default()));
    let (passes_in, passes) = watch::channel(None);
    let obstacles = Obstacles::default();
    let published = Published { store: Arc::clone(&store), acks: Arc::clone(&acks), obstacles: Arc::clone(&obstacles) };
    tasks.spawn(translate_changes(Arc::clone(&watch), published, passes_in));
    tasks.spawn(write_statuses(client.clone(), Arc::clone(&acks), passes.clone()));
    tasks.spawn(write_pods(client.clone(), Arc::clone(&reports), passes.clone()));
    let applying = Applying { watch: Arc::clone(&watch), obstacles };
    tasks.spawn(apply_objects(client.clone(), config.clone(), Arc::clone(&authority), applying, passes));

    let deps = serve::Deps {
        store,
        acks,
        pods: watch.clone(),
        placements: watch,
        reports,
        authority,
        authenticator: Arc::new(TokenReviewer::new(client, vec![TOKEN_AUDIENCE.to_owned()])),
        metrics: Arc::new(move || metrics.render()),
        clock: Clock::system(),
        settings: config.serve,
    };
    serve::run(deps, listeners, drain).await
}

/// The signing authority; waits for an API that is not there yet, and for its namespace.
async fn authority(config: &Config, client: &Client) -> anyhow::Result<Arc<Authority>> {
    loop {
        let namespace = &config.mesh.root_namespace;
        match Authority::load_or_create(client, namespace, &config.mesh.trust_domain).await {
            Ok(authority) => return Ok(authority),
            Err(error) => match error.downcast_ref::<kube::Error>() {
                Some(cause) => {
                    tracing::warn!(error = %cause, "{error}; trying again");
                    tokio::time::sleep(RETRY).await;
                }
                None => return Err(error).context("the signing authority"),
            },
        }
    }
}

/// World → resources → store, once per burst of changes.
async fn translate_changes(
    watch: Arc<Watch>,
    Published { store, acks, obstacles }: Published,
    passes: watch::Sender<Option<Arc<Pass>>>,
) {
    let mut leaving = Leaving::default();
    let mut stays = Stays::default();
    let mut unreadable = BTreeSet::new();
    let (left, mut all_left) = mpsc::unbounded_channel::<(u64, Vec<String>)>();
    // Owned here: ends with this task.
    let mut farewells = JoinSet::new();
    loop {
        watch.changed().await;
        settle(&watch).await;
        while let Ok((generation, uids)) = all_left.try_recv() {
            leaving.acknowledged(generation, &uids);
        }
        while farewells.try_join_next().is_some() {}
        let missing = watch.missing();
        if !missing.is_empty() {
            tracing::debug!(?missing, "waiting for the first lists");
            continue;
        }
        let mut world = watch.snapshot();
        world.leaving = leaving.observe(&world);
        world.epochs = stays.epochs();
        world.obstacles = Arc::clone(&lock(&obstacles));
        let started = Instant::now();
        let translated = tokio::task::spawn_blocking(move || (translate(&world), world)).await;
        let Ok((translation, world)) = translated else {
            tracing::error!("translation panicked; proxies keep the last configuration");
            continue;
        };
        let resources = translation.resources.len();
        stays.observe(&world, &enrolled(&translation.resources), milliseconds());
        let generation = store.publish(translation.resources);
        tracing::debug!(generation, resources, elapsed = ?started.elapsed(), "published");
        tell_unreadable(&world, &mut unreadable);
        let uids = leaving.published(generation);
        if !uids.is_empty() {
            let (acks, left, watch) = (Arc::clone(&acks), left.clone(), Arc::clone(&watch));
            farewells.spawn(async move {
                if !acks.wait_acked(ADDRESS_TYPE, generation, LEAVE_DEADLINE).await {
                    tracing::warn!(pods = uids.len(), "pods leave although some proxies did not acknowledge it");
                }
                if left.send((generation, uids)).is_ok() {
                    watch.touch();
                }
            });
        }
        passes.send_replace(Some(Arc::new(Pass { world, verdicts: translation.verdicts, generation })));
    }
}

/// UIDs of the pods that their nodes are told to enrol.
fn enrolled(resources: &[Resource]) -> HashSet<&str> {
    resources
        .iter()
        .filter(|resource| resource.type_url == POD_ENROLMENT_TYPE)
        .map(|resource| &*resource.name)
        .collect()
}

/// Since 1970.
fn milliseconds() -> u64 {
    u64::try_from(OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000).unwrap_or_default()
}

/// Says once which pods' annotations are not read: they are captured as if they had none, which nobody else would tell.
fn tell_unreadable(world: &World, told: &mut BTreeSet<(String, String)>) {
    let enrolled = world.pods.values().filter(|pod| enrolment::translate(world, pod).is_some());
    let now: BTreeSet<_> = enrolled
        .flat_map(|pod| enrolment::unreadable(pod).into_iter().map(|why| (Key::of(&pod.metadata).to_string(), why)))
        .collect();
    for (pod, why) in now.difference(told) {
        tracing::warn!(%pod, "{why}; the annotation excludes nothing");
    }
    *told = now;
}

/// Returns when nothing has changed for [`QUIET`], or after [`PATIENCE`].
async fn settle(watch: &Watch) {
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        let quiet = (Instant::now() + QUIET).min(end);
        if tokio::time::timeout_at(quiet, watch.changed()).await.is_err() {
            return;
        }
    }
}

/// Calls `write` with the newest pass, again whenever there is a newer one, and again after [`RETRY`] if it says false.
async fn for_each_pass<F: Future<Output = bool>>(mut passes: Passes, write: impl Fn(Arc<Pass>) -> F) {
    loop {
        let pass = passes.borrow_and_update().clone();
        let done = match pass {
            Some(pass) => write(pass).await,
            None => true,
        };
        let next = passes.changed();
        let ended = match done {
            true => next.await.is_err(),
            false => tokio::time::timeout(RETRY, next).await.is_ok_and(|changed| changed.is_err()),
        };
        if ended {
            return;
        }
    }
}

/// What only depends on us is written at once. That a policy is in force is written once the proxies have it; those that
/// have not said so after [`ACK_PATIENCE`] are mentioned.
async fn write_statuses(client: Client, acks: Arc<Acks>, mut passes: Passes) {
    let refused = Mutex::new(status::Refused::default());
    let mut refusals = acks.refusals();
    // Since when something waits for proxies, over passes that come meanwhile.
    let mut waiting: Option<Instant> = None;
    loop {
        let pass = passes.borrow_and_update().clone();
        refusals.mark_unchanged();
        let mut done = true;
        if let Some(pass) = pass {
            let (policies, others): (Vec<Verdict>, _) =
                pass.verdicts.iter().cloned().partition(|verdict| status::is_carried_out_by_proxies(verdict.kind));
            let write = async |verdicts: &[Verdict]| {
                let writes = status::differences(&pass.world, verdicts, OffsetDateTime::now_utc());
                status::write(&client, writes, &refused).await
            };
            done &= write(&others).await;
            let differences = status::differences(&pass.world, &policies, OffsetDateTime::now_utc());
            let open: BTreeSet<(Kind, Key)> = differences.into_iter().map(|write| (write.kind, write.key)).collect();
            if open.is_empty() && !acks.any_refused() {
                waiting = None;
            } else {
                let since = *waiting.get_or_insert_with(Instant::now);
                let left = (since + ACK_PATIENCE).saturating_duration_since(Instant::now());
                let all_acked = async {
                    let types = [AUTHORIZATION_TYPE, HTTP_POLICY_TYPE];
                    let each = types.map(|type_url| acks.wait_acked(type_url, pass.generation, left));
                    futures_util::future::join_all(each).await.into_iter().all(|acked| acked)
                };
                let late = tokio::select! {
                    acked = all_acked => !acked,
                    // The newer one holds this one's policies as well.
                    changed = passes.changed() => match changed {
                        Ok(()) => continue,
                        Err(_) => return,
                    },
                };
                waiting = None;
                let unacknowledged = if late { open } else { BTreeSet::new() };
                done &= write(&status::answered(policies, &acks, &unacknowledged)).await && !late;
            }
        }
        tokio::select! {
            changed = passes.changed() => if changed.is_err() { return },
            _ = refusals.changed() => {}
            () = tokio::time::sleep(RETRY), if !done => {}
        }
    }
}

async fn apply_objects(
    client: Client,
    config: Config,
    authority: Arc<Authority>,
    Applying { watch, obstacles }: Applying,
    passes: Passes,
) {
    for_each_pass(passes, |pass| {
        let objects = deploy::differences(&pass.world, &config.waypoint, &authority.root_bundle_pem());
        let (client, watch, obstacles) = (client.clone(), Arc::clone(&watch), Arc::clone(&obstacles));
        async move {
            let applied = deploy::apply(&client, objects).await;
            let mut known = lock(&obstacles);
            if **known != applied.obstacles {
                *known = Arc::new(applied.obstacles);
                watch.touch();
            }
            !applied.again
        }
    })
    .await;
}

/// Annotations and events of pods follow both the world and the nodes' reports.
async fn write_pods(client: Client, reports: Arc<Reports>, mut passes: Passes) {
    let (mut written, mut told) = (Written::default(), Told::default());
    loop {
        let pass = passes.borrow_and_update().clone();
        let mut done = true;
        if let Some(pass) = pass {
            let changes = written.remaining(enrol::annotations(&pass.world, &reports));
            let outcomes = stream::iter(changes).map(|change| async { (annotate(&client, &change).await, change) });
            let mut outcomes = std::pin::pin!(outcomes.buffer_unordered(CONCURRENT_ANNOTATIONS));
            while let Some((outcome, change)) = outcomes.next().await {
                match outcome {
                    true => written.add(change),
                    false => done = false,
                }
            }
            let events = told.fresh(&pass.world, &reports);
            let outcomes = stream::iter(events).map(|event| async { (notices::write(&client, &event).await, event) });
            let mut outcomes = std::pin::pin!(outcomes.buffer_unordered(CONCURRENT_ANNOTATIONS));
            while let Some((outcome, event)) = outcomes.next().await {
                if !outcome {
                    told.forget(&event);
                    done = false;
                }
            }
        }
        // Nothing is lost by cancelling a branch: each is a wake-up, and the state is read again above.
        tokio::select! {
            changed = passes.changed() => if changed.is_err() { return },
            () = reports.changed() => {}
            () = tokio::time::sleep(RETRY), if !done => {}
            () = tokio::time::sleep(PENDING_PATIENCE), if reports.any_pending() => {}
        }
    }
}

/// By the status subresource, so that no right to change pods is needed. The UID makes sure that it is the same pod.
async fn annotate(client: &Client, change: &Annotate) -> bool {
    let pods: Api<Pod> = Api::namespaced(client.clone(), &change.namespace);
    let body = json!({"metadata": {"uid": change.uid, "annotations": {REDIRECTION: change.value}}});
    let params = PatchParams { field_manager: Some(status::FIELD_MANAGER.into()), ..PatchParams::default() };
    match pods.patch_status(&change.name, &params, &Patch::Merge(&body)).await {
        Ok(_) => {
            tracing::info!(
                pod = change.name,
                namespace = change.namespace,
                value = change.value.unwrap_or("none"),
                "redirection"
            );
            true
        }
        // Gone, or another pod of that name.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409 | 422) => true,
        Err(error) => {
            tracing::warn!(pod = change.name, namespace = change.namespace, error = %error, "not annotated");
            false
        }
    }
}
