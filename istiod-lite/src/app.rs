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
use mesh_proto::workload::ADDRESS_TYPE;
use serde_json::json;
use time::OffsetDateTime;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::auth::TokenReviewer;
use crate::ca::{CurrentAuthority, Keeper, SourceError};
use crate::config::Config;
use crate::enrol::notices::{self, Told};
use crate::enrol::turns::{Turn, Turns};
use crate::enrol::{
    Annotate, Attention, LEAVE_DEADLINE, Leaving, PATIENCE as PENDING_PATIENCE, REDIRECTION, Reports, Stays, Written,
};
use crate::leader::{Election, Office};
use crate::replica::peers::Peers;
use crate::replica::service::speaks_hbone;
use crate::replica::{POLICY_TYPES, contents};
use crate::resources::{Acks, ResourceStore, lock};
use crate::translate::discovery::Discovery;
use crate::translate::enrolment;
use crate::translate::incremental::{Changes, Translator};
use crate::translate::mesh_config::MeshConfig;
use crate::translate::verdict::{Kind, Verdict};
use crate::translate::world::World;
use crate::types::Key;
use crate::watch::Watch;
use crate::{admission, deploy, serve, status};

/// Changes that arrive within this time of one another are translated together…
const QUIET: Duration = Duration::from_millis(20);
/// …but no change waits longer than this.
const PATIENCE: Duration = Duration::from_millis(100);
/// Before writes that failed are tried again, and between attempts to reach the API at start.
const RETRY: Duration = Duration::from_secs(1);
/// For proxies to acknowledge a policy, before its status says that some have not.
const ACK_PATIENCE: Duration = Duration::from_secs(5);
const CONCURRENT_ANNOTATIONS: usize = 16;
/// Between looks at whether there is little to do.
const MEMORY_LOOK: Duration = Duration::from_secs(5);
/// The audience of tokens that proxies present.
const TOKEN_AUDIENCE: &str = "istio-ca";

/// One pass: what was seen and what is to be said about it.
struct Pass {
    world: World,
    verdicts: Arc<[Verdict]>,
    /// Of the resources that were published when the verdicts were new.
    decided: u64,
}

/// What keeps waypoints from being deployed, as the writer of their objects found it: part of the next pass.
type Obstacles = Arc<Mutex<Arc<BTreeMap<Key, String>>>>;

/// What proxies have been given, and who knows what they say to it: ours, and those of other replicas.
#[derive(Clone)]
struct Proxies {
    store: Arc<ResourceStore>,
    acks: Arc<Acks>,
    peers: Arc<Peers>,
}

/// Where the writer of objects tells what it could not write.
#[derive(Clone)]
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
    let serving = Serving::new()?;
    let settings = config.serve.clone();
    let listeners = serving.run(async move { serve::Listeners::bind(&settings).await }).await?;
    let keeper = tokio::select! {
        keeper = keeper(&config, &client) => keeper?,
        () = drain.draining() => return Ok(()),
    };
    let authority = keeper.current();

    // Dropping the set ends every task below; it goes when the server has drained.
    let mut tasks = JoinSet::new();
    let watch = Watch::start(&client, config.mesh.clone(), &mut tasks);
    let (store, acks, reports) =
        (Arc::new(ResourceStore::new()), Arc::new(Acks::default()), Arc::new(Reports::default()));
    let (passes_in, passes) = watch::channel(None);
    let obstacles = Obstacles::default();
    let peers = Arc::new(Peers::new(config.replica.clone(), Arc::clone(&authority)));
    let proxies = Proxies { store: Arc::clone(&store), acks: Arc::clone(&acks), peers };
    tasks.spawn(translate_changes(Arc::clone(&watch), proxies.clone(), Arc::clone(&obstacles), passes_in));
    let elect = |office| Election::new(&client, &config.mesh.root_namespace, office, config.identity.clone());
    let of_revision = elect(Office::of_revision(&config.mesh.revision));
    let of_mesh = elect(Office::of_mesh(&config.mesh.revision, of_revision.leading()));
    tasks.spawn(write_pods(client.clone(), Arc::clone(&reports), passes.clone(), of_mesh.leading()));
    let writers = Writers {
        client: client.clone(),
        config: config.clone(),
        authority: Arc::clone(&authority),
        applying: Applying { watch: Arc::clone(&watch), obstacles },
        proxies,
        passes: passes.clone(),
    };
    // End with the drain, and are waited for: the Leases are given back.
    let mut electing = JoinSet::new();
    electing.spawn(lead(of_revision, writers.clone(), Writers::of_revision, passes.clone(), drain.clone()));
    electing.spawn(lead(of_mesh, writers, Writers::of_mesh, passes, drain.clone()));
    tasks.spawn(follow_authority(authority.changes(), Arc::clone(&watch)));
    tasks.spawn(keeper.run());
    tasks.spawn(give_memory_back());

    let deps = serve::Deps {
        store,
        acks,
        pods: watch.clone(),
        knowledge: admission::knowledge(&watch),
        mesh_config: mesh_config(&watch),
        placements: watch,
        reports,
        authority,
        authenticator: Arc::new(TokenReviewer::new(client, vec![TOKEN_AUDIENCE.to_owned()])),
        metrics: Arc::new(move || metrics.render()),
        clock: Clock::system(),
        settings: config.serve,
    };
    serving.run(serve::run(deps, listeners, drain)).await?;
    while electing.join_next().await.is_some() {}
    Ok(())
}

/// Threads for whoever is connected. While a fleet comes back they have work for seconds, and a change that the API tells of
/// must not wait behind that until it is known what it means.
struct Serving(Option<Runtime>);

impl Serving {
    fn new() -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().thread_name("serve").enable_all().build()?;
        Ok(Self(Some(runtime)))
    }

    /// Runs it there. What is dropped here is not there: it ends with `self`.
    async fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = anyhow::Result<T>> + Send + 'static,
    ) -> anyhow::Result<T> {
        let runtime = self.0.as_ref().expect("it is there until it is dropped");
        runtime.spawn(work).await.context("serving has panicked")?
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // Waits for nothing: this is on a thread of the other one.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// After lists and storms.
async fn give_memory_back() {
    let mut heap = mesh_memory::Heap::new();
    loop {
        tokio::time::sleep(MEMORY_LOOK).await;
        heap.look();
    }
}

/// What of MeshConfig is in force and what of it is not done, for operators.
fn mesh_config(watch: &Arc<Watch>) -> Arc<dyn Fn() -> String + Send + Sync> {
    let watch = Arc::clone(watch);
    Arc::new(move || {
        let MeshConfig { chosen, findings } = watch.snapshot().mesh_config;
        json!({"inForce": &*chosen, "findings": &*findings}).to_string()
    })
}

/// Stands for election once there is something to write.
async fn lead<F: Future<Output = ()>>(
    election: Election,
    writers: Writers,
    write: impl Fn(Writers) -> F,
    mut passes: Passes,
    drain: DrainWatcher,
) {
    tokio::select! {
        _ = passes.wait_for(Option::is_some) => {}
        () = drain.draining() => return,
    }
    election.run(move || write(writers.clone()), drain).await;
}

/// What leaders write with.
#[derive(Clone)]
struct Writers {
    client: Client,
    config: Config,
    authority: Arc<CurrentAuthority>,
    applying: Applying,
    proxies: Proxies,
    passes: Passes,
}

impl Writers {
    /// What is one revision's: waypoints, the statuses of their Gateways, the webhook. Never ends.
    async fn of_revision(self) {
        let Self { client, config, authority, applying, passes, .. } = self;
        let webhook = config.mesh.revision.named(admission::CONFIGURATION);
        tokio::join!(
            admission::keep_trusted(client.clone(), authority, &webhook),
            write_gateway_statuses(client.clone(), passes.clone()),
            apply_waypoints(client, config, applying, passes),
        );
    }

    /// What there is once, whatever revisions there are: the other statuses, and the objects of every namespace. Never ends.
    async fn of_mesh(self) {
        let Self { client, authority, proxies, passes, .. } = self;
        let peers = Arc::clone(&proxies.peers);
        tokio::join!(
            write_statuses(client.clone(), proxies, passes.clone()),
            apply_shared(client, authority, passes),
            peers.follow_refusals(),
        );
    }
}

/// Who keeps the signing authority; waits for an API that is not there yet, and for its namespace.
async fn keeper(config: &Config, client: &Client) -> anyhow::Result<Keeper> {
    let (mesh, lifetime) = (&config.mesh, config.serve.lifetime);
    loop {
        let (settings, clock) = (config.ca.clone(), Clock::system());
        match Keeper::open(client, &mesh.root_namespace, &mesh.trust_domain, settings, lifetime, clock).await {
            Ok(keeper) => return Ok(keeper),
            Err(SourceError::Api { name, cause }) => {
                tracing::warn!(error = %cause, "Secret {name} cannot be had; trying again");
                tokio::time::sleep(RETRY).await;
            }
            Err(error) => return Err(error).context("the signing authority"),
        }
    }
}

/// Has a new pass made when other roots or revocation lists are to be distributed.
async fn follow_authority(mut changes: watch::Receiver<u64>, watch: Arc<Watch>) {
    while changes.changed().await.is_ok() {
        watch.touch();
    }
}

/// World → resources → store, once per burst of changes.
async fn translate_changes(
    watch: Arc<Watch>,
    Proxies { store, acks, peers }: Proxies,
    obstacles: Obstacles,
    passes: watch::Sender<Option<Arc<Pass>>>,
) {
    let mut translator = Some(Translator::default());
    // The last verdicts, and with which generation they came.
    let mut decided: (Arc<[Verdict]>, u64) = (Arc::default(), 0);
    let mut leaving = Leaving::default();
    let mut discovery = Discovery::default();
    let mut stays = Stays::default();
    let mut unreadable = BTreeMap::new();
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
        peers.observe(&world);
        world.leaving = leaving.observe(&world);
        let mut world = discovery.of(world);
        world.epochs = stays.epochs();
        world.obstacles = Arc::clone(&lock(&obstacles));
        let started = Instant::now();
        // Lost with a translation that panicked: then all is derived anew, and published as the whole.
        let (mut before, is_whole) = match translator.take() {
            Some(translator) => (translator, false),
            None => (Translator::default(), true),
        };
        let translated = tokio::task::spawn_blocking(move || (before.translate(&world), before, world)).await;
        let Ok((changes, after, world)) = translated else {
            tracing::error!("translation panicked; proxies keep the last configuration");
            continue;
        };
        translator = Some(after);
        let Changes { resources, removed, verdicts, pods } = changes;
        tell_unreadable(&world, &pods, &mut unreadable);
        let enrolled =
            of_type(POD_ENROLMENT_TYPE, resources.iter().map(|resource| (resource.type_url(), &resource.name)));
        let withdrawn = of_type(POD_ENROLMENT_TYPE, removed.iter().map(|(type_url, name)| (*type_url, name)));
        stays.observe(&world, &enrolled, &withdrawn, milliseconds());
        let touched = (pods.len(), resources.len(), removed.len());
        let generation = match is_whole {
            true => store.publish(resources),
            false => store.change(resources, removed),
        };
        let (pods, resources, removed) = touched;
        tracing::debug!(generation, pods, resources, removed, elapsed = ?started.elapsed(), "published");
        let parting = leaving.published(generation);
        if !parting.is_empty() {
            let snapshot = store.snapshot();
            let workloads = parting.iter().map(|(_, pod)| world.pod_uid(pod));
            // Others go on speaking HBONE, by a proxy of their own: nobody need hear of it.
            let workloads: Vec<String> = workloads.filter(|name| !speaks_hbone(&snapshot, name)).collect();
            let uids: Vec<String> = parting.into_iter().map(|(uid, _)| uid).collect();
            let (acks, peers) = (Arc::clone(&acks), Arc::clone(&peers));
            let (left, watch) = (left.clone(), Arc::clone(&watch));
            farewells.spawn(async move {
                let (ours, theirs) = tokio::join!(
                    acks.wait_acked(ADDRESS_TYPE, generation, LEAVE_DEADLINE),
                    peers.parted(&workloads, LEAVE_DEADLINE),
                );
                if !ours || !theirs {
                    tracing::warn!(pods = uids.len(), "pods leave although some proxies did not acknowledge it");
                }
                if left.send((generation, uids)).is_ok() {
                    watch.touch();
                }
            });
        }
        if !Arc::ptr_eq(&decided.0, &verdicts) {
            decided = (verdicts, generation);
        }
        let (verdicts, decided) = (Arc::clone(&decided.0), decided.1);
        passes.send_replace(Some(Arc::new(Pass { world, verdicts, decided })));
    }
}

/// The names among `named` that are of this type.
fn of_type<'a>(wanted: &str, named: impl Iterator<Item = (&'static str, &'a Arc<str>)>) -> HashSet<&'a str> {
    named.filter(|(type_url, _)| *type_url == wanted).map(|(_, name)| &**name).collect()
}

/// Since 1970.
fn milliseconds() -> u64 {
    u64::try_from(OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000).unwrap_or_default()
}

/// Says once which annotations of `pods` are not read: they are captured as if they had none, which nobody else would
/// tell.
fn tell_unreadable(world: &World, pods: &BTreeSet<Key>, told: &mut BTreeMap<Key, Vec<String>>) {
    for key in pods {
        let pod = world.pods.get(key);
        let now = pod.map(|pod| enrolment::unreadable(pod)).filter(|now| !now.is_empty());
        let now = now.filter(|_| pod.is_some_and(|pod| enrolment::translate(world, pod).is_some()));
        let before = match &now {
            Some(now) => told.insert(key.clone(), now.clone()),
            None => told.remove(key),
        };
        let before = before.unwrap_or_default();
        for why in now.iter().flatten().filter(|why| !before.contains(why)) {
            tracing::warn!(pod = %key, "{why}; the annotation excludes nothing");
        }
    }
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

/// Of the Gateways that are ours. Whose one is may have changed since: then both have said the same, or the other says it again.
async fn write_gateway_statuses(client: Client, passes: Passes) {
    let refused = Mutex::new(status::Refused::default());
    for_each_pass(passes, |pass| {
        let (client, refused) = (&client, &refused);
        async move {
            let of_gateways = pass.verdicts.iter().filter(|verdict| verdict.kind == Kind::Gateway);
            let verdicts: Vec<Verdict> = of_gateways.cloned().collect();
            let writes = status::differences(&pass.world, &verdicts, OffsetDateTime::now_utc());
            status::write(client, writes, refused).await
        }
    })
    .await;
}

/// Those of all but Gateways. What only depends on us is written at once. That a policy is in force is written once the proxies have it, those of all
/// replicas; that some have not said so is mentioned after [`ACK_PATIENCE`].
async fn write_statuses(client: Client, Proxies { store, acks, peers }: Proxies, mut passes: Passes) {
    let refused = Mutex::new(status::Refused::default());
    let (mut refusals, mut refusals_elsewhere) = (acks.refusals(), peers.refusals());
    // Since when something waits for proxies, over passes that come meanwhile.
    let mut waiting: Option<Instant> = None;
    // For what all statuses say what they should.
    let mut settled: Option<status::Basis> = None;
    loop {
        let pass = passes.borrow_and_update().clone();
        if refusals.has_changed().unwrap_or_default() || refusals_elsewhere.has_changed().unwrap_or_default() {
            refusals.mark_unchanged();
            refusals_elsewhere.mark_unchanged();
            settled = None;
        }
        let mut done = true;
        let is_settled =
            |pass: &Arc<Pass>| settled.as_ref().is_some_and(|basis| basis.holds(&pass.world, &pass.verdicts));
        if let Some(pass) = pass.filter(|pass| !is_settled(pass)) {
            let shared = pass.verdicts.iter().filter(|verdict| verdict.kind != Kind::Gateway);
            let (policies, others): (Vec<Verdict>, _) =
                shared.cloned().partition(|verdict| status::is_carried_out_by_proxies(verdict.kind));
            let write = async |verdicts: &[Verdict]| {
                let writes = status::differences(&pass.world, verdicts, OffsetDateTime::now_utc());
                status::write(&client, writes, &refused).await
            };
            done &= write(&others).await;
            let differences = status::differences(&pass.world, &policies, OffsetDateTime::now_utc());
            let open: BTreeSet<(Kind, Key)> = differences.into_iter().map(|write| (write.kind, write.key)).collect();
            let any_refused = acks.any_refused() || !peers.refusals().borrow().is_empty();
            if open.is_empty() && !any_refused {
                waiting = None;
            } else {
                let since = *waiting.get_or_insert_with(Instant::now);
                let left = (since + ACK_PATIENCE).saturating_duration_since(Instant::now());
                let all_acked = async {
                    let each = POLICY_TYPES.map(|type_url| acks.wait_acked(type_url, pass.decided, left));
                    let (ours, theirs) = tokio::join!(
                        futures_util::future::join_all(each),
                        peers.acknowledged(contents(&store.snapshot(), &POLICY_TYPES), left),
                    );
                    ours.into_iter().all(|acked| acked) && theirs
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
                let elsewhere = Arc::clone(&peers.refusals().borrow());
                let refusal = |type_url: &'static str, name: &str| elsewhere.of(&acks, type_url, name);
                done &= write(&status::answered(policies, refusal, &unacknowledged)).await && !late;
            }
            settled = done.then(|| status::Basis::new(&pass.world, &pass.verdicts));
        }
        tokio::select! {
            changed = passes.changed() => if changed.is_err() { return },
            _ = refusals.changed() => {}
            _ = refusals_elsewhere.changed() => {}
            () = tokio::time::sleep(RETRY), if !done => {}
        }
    }
}

async fn apply_waypoints(client: Client, config: Config, Applying { watch, obstacles }: Applying, passes: Passes) {
    let (foreign, told) = (deploy::ForeignClass::default(), deploy::Told::default());
    for_each_pass(passes, |pass| {
        foreign.tell(&pass.world);
        let objects = deploy::waypoint_parts(&pass.world, &config.waypoint);
        let withdrawn = deploy::withdrawn_parts(&pass.world);
        let (client, told) = (client.clone(), &told);
        let (watch, obstacles) = (Arc::clone(&watch), Arc::clone(&obstacles));
        async move {
            let applied = deploy::apply(&client, objects, told).await;
            let withdrawn = deploy::withdraw(&client, withdrawn).await;
            let mut known = lock(&obstacles);
            if **known != applied.obstacles {
                *known = Arc::new(applied.obstacles);
                watch.touch();
            }
            !applied.again && withdrawn
        }
    })
    .await;
}

async fn apply_shared(client: Client, authority: Arc<CurrentAuthority>, passes: Passes) {
    let told = deploy::Told::default();
    for_each_pass(passes, |pass| {
        let (roots, revocations) = authority.distributed();
        let trust = deploy::Trust { roots: &roots, revocations: revocations.as_deref() };
        let objects = deploy::shared(&pass.world, &trust);
        let withdrawn = deploy::withdrawn_lists(&pass.world, &trust);
        let (client, told) = (client.clone(), &told);
        async move {
            let applied = deploy::apply(&client, objects, told).await;
            let withdrawn = deploy::withdraw(&client, withdrawn).await;
            !applied.again && withdrawn
        }
    })
    .await;
}

/// Annotations and events of pods follow both the world and the nodes' reports, which reach one replica each.
async fn write_pods(client: Client, reports: Arc<Reports>, mut passes: Passes, mut leading: watch::Receiver<bool>) {
    let (mut written, mut told, mut attention) = (Written::default(), Told::default(), Attention::default());
    let mut turns = Turns::default();
    loop {
        let pass = passes.borrow_and_update().clone();
        let leads = *leading.borrow_and_update();
        let mut done = true;
        if let Some(pass) = pass {
            let (stale, gone) = attention.turn(&pass.world, &reports);
            told.forget_pods(&gone);
            let Turn { changes, to_tell, later } = turns.take(&pass.world, &reports, &attention, stale, leads);
            for key in &later {
                attention.keep(&key.namespace, &key.name);
                done = false;
            }
            // Until the watch brings what was written.
            changes.iter().for_each(|change| attention.keep(&change.namespace, &change.name));
            let changes = written.remaining(changes);
            let outcomes = stream::iter(changes).map(|change| async { (annotate(&client, &change).await, change) });
            let mut outcomes = std::pin::pin!(outcomes.buffer_unordered(CONCURRENT_ANNOTATIONS));
            while let Some((outcome, change)) = outcomes.next().await {
                match outcome {
                    true => {
                        attention.wrote(&change);
                        written.add(change);
                    }
                    false => done = false,
                }
            }
            let events = told.fresh(&pass.world, &reports, &to_tell);
            let outcomes = stream::iter(events).map(|event| async { (notices::write(&client, &event).await, event) });
            let mut outcomes = std::pin::pin!(outcomes.buffer_unordered(CONCURRENT_ANNOTATIONS));
            while let Some((outcome, event)) = outcomes.next().await {
                if !outcome {
                    told.forget(&event);
                    let about = &event.involved_object;
                    attention.keep(
                        about.namespace.as_deref().unwrap_or_default(),
                        about.name.as_deref().unwrap_or_default(),
                    );
                    done = false;
                }
            }
        }
        // Nothing is lost by cancelling a branch: each is a wake-up, and the state is read again above.
        tokio::select! {
            changed = passes.changed() => if changed.is_err() { return },
            () = reports.changed() => {}
            Ok(()) = leading.changed() => {}
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
