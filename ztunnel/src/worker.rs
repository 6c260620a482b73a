//! The data path's threads: each has a single-threaded runtime, accepts its own share of every pod's connections and
//! keeps them to the end. Nothing a worker owns is touched by another; shared state is read through snapshots.

mod busy_poll;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use futures_util::future::{Either, Ready, ready};
use mesh::drain::Guard;
use mesh::hbone::{Authority, H2Settings, Pool, PoolSettings};
use mesh::identity::{CertificateManager, Identity, WorkloadCertificate};
use mesh::model::Workload;
use mesh::net::{PeerAddr, canonical};
use mesh::serve::{Count, accept_loop, copy_bidirectional};
use mesh::store::{Snapshot, Store};
use mesh::telemetry::ResponseFlag;
use mesh::telemetry::access::{self, Direction};
use mesh::xds::Demand;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use crate::config::Config;
use crate::ending::Ending;
use crate::handover::seal;
use crate::handshakes::Handshakes;
use crate::hearsay::Hearsay;
use crate::join::Joins;
use crate::names::Names;
use crate::node::netns::{Family, leg_port};
use crate::node::pod::{LocalPod, Tracked};
use crate::resolve::{self, BadTarget, NoRoute, Route, Target, Via};
use crate::{dns, inbound, outbound, passthrough};

/// How long a connection waits for its own workload to arrive from the control plane.
const WORKLOAD_WAIT: Duration = Duration::from_secs(5);
/// How long a connection waits for the control plane's word on what it is to.
const ANSWER_WAIT: Duration = Duration::from_secs(5);
/// What is asked for leads to more that has to be: from an address to a service, its waypoint, that one's gateway.
const QUESTIONS: usize = 4;
/// How long the other side of a TCP handshake may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// So many ports of our choice are tried for a last leg; then the kernel takes one that is free.
const LEG_TRIES: usize = 4;
/// Pods handed to a worker that it has not taken yet; the control side waits when full.
const QUEUE: usize = 64;

/// What all workers read.
#[derive(Clone)]
pub struct Shared {
    pub config: Arc<Config>,
    pub store: Arc<Store>,
    pub certs: CertificateManager,
    pub names: Names,
    pub joins: Arc<Joins>,
    pub hearsay: Arc<Hearsay>,
    /// `None` where the control plane sends all workloads and services.
    pub demand: Option<Demand>,
    pub handshakes: Arc<Handshakes>,
}

impl Shared {
    /// In dedicated mode metrics and readiness listen in the workload's own namespace.
    #[must_use]
    pub fn serves_beside_workload(&self, port: u16) -> bool {
        let Config { mode, stats_port, readiness_port, .. } = &*self.config;
        mode.dedicated().is_some() && [*stats_port, *readiness_port].contains(&port)
    }

    /// The pod's workload as the control plane describes it.
    ///
    /// # Errors
    /// When it does not arrive within five seconds, or is not the one that was enrolled here: a pod's name may be
    /// another pod's a moment later, and the two kinds of resource come one after the other.
    pub async fn local(&self, pod: &LocalPod) -> Result<Local, Ending> {
        let find = || {
            let world = self.store.snapshot();
            let workload = world.workload(&pod.workload_uid).cloned();
            workload.filter(|w| pod.is_described_by(w)).map(|w| (world, w))
        };
        let (world, workload) = match find() {
            Some(found) => found,
            None => {
                if let Some(demand) = &self.demand {
                    demand.hint(&*pod.workload_uid);
                }
                let mut changes = self.store.watch();
                let arrival = async {
                    loop {
                        if let Some(found) = find() {
                            return Some(found);
                        }
                        changes.changed().await.ok()?;
                    }
                };
                tokio::time::timeout(WORKLOAD_WAIT, arrival).await.ok().flatten().ok_or_else(|| self.missing(pod))?
            }
        };
        pod.learn_addresses(&workload.addresses);
        let identity =
            workload.identity().map_err(|source| Ending::BadIdentity { workload: workload.uid.to_string(), source })?;
        Ok(Local { world, workload, identity })
    }

    /// The world once nothing is `missing` in it that the control plane knows. What it has not said a word about is not
    /// taken for foreign.
    ///
    /// # Errors
    /// [`NoRoute::Unanswered`] when it says nothing within five seconds.
    pub async fn informed(
        &self,
        mut world: Arc<Snapshot>,
        missing: impl Fn(&Snapshot) -> Vec<String> + Send,
    ) -> Result<Arc<Snapshot>, NoRoute> {
        let Some(demand) = &self.demand else { return Ok(world) };
        let mut told = Vec::new();
        let deadline = tokio::time::Instant::now() + ANSWER_WAIT;
        for _ in 0..QUESTIONS {
            let mut names = missing(&world);
            names.retain(|name| !told.contains(name));
            if names.is_empty() {
                break;
            }
            for name in names {
                let unanswered = |_| NoRoute::Unanswered { unknown: name.clone(), seconds: ANSWER_WAIT.as_secs() };
                tokio::time::timeout_at(deadline, demand.ask(&*name)).await.map_err(unanswered)?;
                told.push(name);
            }
            world = self.store.snapshot();
        }
        Ok(world)
    }

    /// Why there is no workload for the pod.
    fn missing(&self, pod: &LocalPod) -> Ending {
        let Some(other) = self.store.snapshot().workload(&pod.workload_uid).cloned() else {
            return Ending::UnknownWorkload(pod.workload_uid.to_string());
        };
        Ending::WorkloadMismatch {
            workload: other.uid.to_string(),
            found: format!("{}/{} at {:?}", other.namespace, other.service_account, other.addresses),
            enrolled: format!("{}/{} at {:?}", pod.namespace, pod.service_account, pod.addresses()),
        }
    }
}

/// What a listener's connections are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Outbound,
    Passthrough,
    Hbone,
    /// Connections to a DNS server, where a port of its own takes them.
    Dns,
}

impl Role {
    const fn direction(self) -> Direction {
        match self {
            Self::Outbound | Self::Dns => Direction::Outbound,
            Self::Passthrough | Self::Hbone => Direction::Inbound,
        }
    }
}

/// A pod's listeners for one worker.
struct Assignment {
    pod: Arc<LocalPod>,
    listeners: Vec<(Role, std::net::TcpListener)>,
    /// One per pod and worker and not per connection: a counter all workers write would be shared by every connection.
    working: Guard,
}

/// What a worker is told.
enum Job {
    Serve(Assignment),
    /// To give up what its thread may do beyond serving what is open.
    GiveUp(oneshot::Sender<io::Result<()>>),
}

/// The worker threads; dropping this ends them.
pub struct Workers {
    queues: Vec<mpsc::Sender<Job>>,
    threads: Vec<JoinHandle<()>>,
    runtimes: Vec<tokio::runtime::Handle>,
}

impl Workers {
    /// Starts `shared.config.worker_threads` threads.
    ///
    /// # Errors
    /// When a thread or its runtime cannot be made.
    pub fn start(shared: &Shared) -> io::Result<Self> {
        let mut workers = Self { queues: Vec::new(), threads: Vec::new(), runtimes: Vec::new() };
        for n in 0..shared.config.worker_threads {
            let (queue, jobs) = mpsc::channel(QUEUE);
            let mut builder = tokio::runtime::Builder::new_current_thread();
            builder.enable_all();
            let busy_poll = shared.config.busy_poll;
            busy_poll::install(&mut builder, busy_poll);
            let runtime = builder.build()?;
            workers.runtimes.push(runtime.handle().clone());
            let shared = shared.clone();
            let thread = std::thread::Builder::new().name(format!("worker-{n}")).spawn(move || {
                let _entered = runtime.enter();
                busy_poll::start(busy_poll);
                runtime.block_on(run(shared, jobs));
            })?;
            workers.queues.push(queue);
            workers.threads.push(thread);
        }
        Ok(workers)
    }

    #[must_use]
    pub fn count(&self) -> usize {
        self.queues.len()
    }

    /// Each worker's runtime, for its figures.
    #[must_use]
    pub fn runtimes(&self) -> &[tokio::runtime::Handle] {
        &self.runtimes
    }

    /// Gives every worker its listeners of a pod.
    pub async fn assign(&self, pod: &Arc<LocalPod>, listeners: Vec<Vec<(Role, std::net::TcpListener)>>) {
        for (queue, listeners) in self.queues.iter().zip(listeners) {
            // A worker ends only when this handle is dropped.
            let job = Assignment { pod: pod.clone(), listeners, working: pod.drain.guard() };
            let _ = queue.send(Job::Serve(job)).await;
        }
    }

    /// Has every worker's thread give up its capabilities. What is open goes on; nothing new can be served.
    ///
    /// # Errors
    /// The first worker's that could not.
    pub async fn give_up_capabilities(&self) -> io::Result<()> {
        for queue in &self.queues {
            let (answer, answered) = oneshot::channel();
            let gone = || io::Error::other("a worker has ended");
            queue.send(Job::GiveUp(answer)).await.map_err(|_| gone())?;
            answered.await.map_err(|_| gone())??;
        }
        Ok(())
    }

    /// Ends the threads. Pods must have been drained; what is open still is dropped.
    pub fn stop(self) {
        drop(self.queues);
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a worker thread panicked");
            }
        }
    }
}

async fn run(shared: Shared, mut jobs: mpsc::Receiver<Job>) {
    let mut pods = JoinSet::new();
    loop {
        tokio::select! {
            job = jobs.recv() => match job {
                Some(Job::Serve(job)) => { pods.spawn(serve_pod(shared.clone(), job)); }
                // Whoever asked may have given up.
                Some(Job::GiveUp(answer)) => drop(answer.send(seal::drop_capabilities())),
                None => return,
            },
            Some(ended) = pods.join_next() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "serving a pod");
                }
            }
        }
    }
}

/// One pod on one worker, until the pod's drain has ended.
async fn serve_pod(shared: Shared, job: Assignment) {
    let pool = Pool::new(pool_settings(&shared.config));
    let at = Arc::new(Place { shared, pod: job.pod, pool });
    let mut loops = JoinSet::new();
    for (role, listener) in job.listeners {
        let listener = match TcpListener::from_std(listener) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::error!(%error, pod = %at.pod.name, "a listener cannot be registered");
                continue;
            }
        };
        let drain = at.pod.drain.clone();
        match role {
            Role::Outbound => loops.spawn(accept_loop(listener, drain, handler(&at, role, outbound::serve))),
            Role::Passthrough => loops.spawn(accept_loop(listener, drain, handler(&at, role, passthrough::serve))),
            Role::Hbone => loops.spawn(accept_loop(listener, drain, handler(&at, role, inbound::serve))),
            Role::Dns => loops.spawn(accept_loop(listener, drain, handler(&at, role, dns::serve::captured))),
        };
    }
    // The loops own the connections, so this is the end of the last one.
    while loops.join_next().await.is_some() {}
    drop(job.working);
    at.pool.drain(&at.pod.drain).await;
}

/// Turns a path function into what the accept loop calls.
fn handler<F, Fut>(
    at: &Arc<Place>,
    role: Role,
    serve: F,
) -> impl Fn(TcpStream, PeerAddr) -> Either<Fut, Ready<()>> + use<F, Fut>
where
    F: Fn(Arc<Place>, TcpStream, SocketAddr, SocketAddr) -> Fut,
    Fut: Future<Output = ()> + Send + 'static,
{
    let at = at.clone();
    move |stream, peer| {
        let client = canonical(peer.0);
        match at.pod.backend.destination(role, &stream) {
            Some(destination) => Either::Left(serve(at.clone(), stream, client, destination)),
            None => {
                count_self_call();
                // A socket that cannot name its own end is closed already.
                let here = stream.local_addr().map_or(client, canonical);
                access::refused(role.direction(), client, here, ResponseFlag::BadRequest, &SELF_CALL);
                Either::Right(ready(()))
            }
        }
    }
}

/// Told of a connection to one of our own listeners.
pub const SELF_CALL: &str = "the proxy's own listener was dialled";

/// Somebody in the pod dialled the proxy's own sockets, and nothing came of it.
pub fn count_self_call() {
    metrics::counter!("ztunnel_self_connections_total").increment(1);
}

/// HTTP/2 as configured.
#[must_use]
pub fn h2_settings(config: &Config) -> H2Settings {
    H2Settings {
        stream_window: config.stream_window,
        connection_window: config.connection_window,
        frame_size: config.frame_size,
        ..H2Settings::default()
    }
}

/// Tunnels as configured.
#[must_use]
pub fn pool_settings(config: &Config) -> PoolSettings {
    PoolSettings {
        h2: h2_settings(config),
        max_streams: u32::try_from(config.pool_max_streams).unwrap_or(u32::MAX),
        unused_release: config.pool_idle,
        connect_timeout: CONNECT_TIMEOUT,
        ..PoolSettings::default()
    }
}

/// The pod's own workload at one moment, with the snapshot everything about one connection is decided on.
pub struct Local {
    pub world: Arc<Snapshot>,
    pub workload: Arc<Workload>,
    pub identity: Identity,
}

/// Where a connection is served: a pod, on a worker.
pub struct Place {
    pub shared: Shared,
    pub pod: Arc<LocalPod>,
    /// Tunnels of this pod that this worker opened.
    pub pool: Pool,
}

impl Place {
    /// Was one of our own listeners dialled? Then the connection is to be closed.
    #[must_use]
    pub fn is_self_call(&self, here: SocketAddr) -> bool {
        let own = self.pod.is_own_listener(here);
        if own {
            count_self_call();
        }
        own
    }

    /// May the bytes be spared the tunnel? Where the control plane says that the destination is on this node; whether it is
    /// in this process, its acceptor knows.
    #[must_use]
    pub fn may_join(&self, route: &Route) -> bool {
        let config = &self.shared.config;
        let here = |workload: &Arc<Workload>| !workload.node.is_empty() && *workload.node == *config.node_name;
        config.same_node_join && route.via == Via::Direct && route.destination.as_ref().is_some_and(here)
    }

    /// [`resolve::inbound`], which must not lead to a port of this process either: in dedicated mode metrics and
    /// readiness listen in the pod's namespace, and our own listeners on its loopback.
    ///
    /// # Errors
    /// [`BadTarget`]; a way back into ourselves is counted.
    pub fn target(&self, local: &Local, here: IpAddr, authority: &Authority) -> Result<Target, BadTarget> {
        let target = resolve::inbound(&local.world, &local.workload, here, authority).and_then(|target| {
            let (port, to) = (target.app.port(), self.dialled(target));
            let own = self.shared.serves_beside_workload(port) || to.ip().is_loopback() && self.pod.is_own_listener(to);
            if own { Err(BadTarget::OwnPort(port)) } else { Ok(target) }
        });
        if let Err(BadTarget::OwnPort(_)) = &target {
            count_self_call();
        }
        target
    }

    /// Where a tunnel's target is called: a proxy that is told of connections by header listens on loopback alone.
    #[must_use]
    pub fn dialled(&self, target: Target) -> SocketAddr {
        match target.announced {
            Some(_) if self.shared.config.localhost_app_tunnel => {
                SocketAddr::new(Family::of(target.app.ip()).loopback(), target.app.port())
            }
            _ => target.app,
        }
    }

    /// The last leg of a tunnel.
    ///
    /// # Errors
    /// What stopped it.
    pub async fn dial_target(&self, client: IpAddr, target: Target) -> Result<TcpStream, Ending> {
        let to = self.dialled(target);
        if to.ip().is_loopback() {
            return in_time(to, self.dial(to.ip(), to)).await;
        }
        self.dial_app(client, to).await
    }

    /// The pod's workload as the control plane describes it.
    ///
    /// # Errors
    /// Those of [`Shared::local`].
    pub async fn local(&self) -> Result<Local, Ending> {
        self.shared.local(&self.pod).await
    }

    /// # Errors
    /// When the certificate source has none for the workload.
    pub async fn certificate(&self, local: &Local) -> Result<Arc<WorkloadCertificate>, Ending> {
        Ok(self.shared.certs.get(&local.identity).await?)
    }

    /// A TCP connection of ztunnel's own from the pod to `to`, never captured.
    ///
    /// # Errors
    /// Those of the socket calls, as they are.
    pub async fn dial(&self, source: IpAddr, to: SocketAddr) -> io::Result<TcpStream> {
        let socket = self.pod.netns.outgoing(source)?;
        mesh::net::tune(&socket)?;
        connect(socket, to).await
    }

    /// [`Self::dial`] with the pod's address and a deadline, for plain connections.
    ///
    /// # Errors
    /// What stopped it.
    pub async fn dial_plain(&self, to: SocketAddr) -> Result<TcpStream, Ending> {
        let source = self.pod.address_like(to.ip()).ok_or(Ending::NoSource(to))?;
        in_time(to, self.dial(source, to)).await
    }

    /// The last leg: to the application at `to`, with the client's address as the source.
    ///
    /// # Errors
    /// What stopped it; refused by the application most of all.
    pub async fn dial_app(&self, client: IpAddr, to: SocketAddr) -> Result<TcpStream, Ending> {
        // A call of the pod to itself already has the right source, and would not come back over lo.
        // Without capture nothing would bring the application's answers to the client's address back to us.
        let keep_source =
            !self.shared.config.mode.is_capture_off() && client != to.ip() && Family::of(client) == Family::of(to.ip());
        if !keep_source {
            return self.dial_plain(to).await;
        }
        let from = |port| async move {
            let socket = self.pod.backend.app_leg(&self.pod.netns, client, port)?;
            // No keepalive: nobody vanishes on this kernel without a word.
            socket.set_tcp_nodelay(true)?;
            connect(socket, to).await
        };
        let leg = async {
            for _ in 0..LEG_TRIES {
                let port = leg_port(&mut rand::rng());
                match from(port).await {
                    Err(error) if is_taken(&error) => {}
                    done => return done,
                }
            }
            from(0).await
        };
        in_time(to, leg).await
    }
}

/// Somebody has that port, or the same connection, also one that has ended less than a minute ago.
fn is_taken(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable)
}

async fn in_time(to: SocketAddr, dial: impl Future<Output = io::Result<TcpStream>>) -> Result<TcpStream, Ending> {
    match tokio::time::timeout(CONNECT_TIMEOUT, dial).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(source)) => Err(Ending::Connect { to, source }),
        Err(_) => Err(Ending::ConnectTimeout { to, seconds: CONNECT_TIMEOUT.as_secs() }),
    }
}

async fn connect(socket: socket2::Socket, to: SocketAddr) -> io::Result<TcpStream> {
    TcpSocket::from_std_stream(socket.into()).connect(to).await
}

/// Moves bytes until both sides are done, policy no longer allows it, the peer is revoked, or the drain deadline has passed.
///
/// # Errors
/// Which of those it was, unless both sides were done.
pub async fn copy<A, B, C>(tracked: &Tracked, pod: &LocalPod, bytes: &C, mut down: A, mut up: B) -> Result<(), Ending>
where
    A: mesh::net::ByteStream,
    B: mesh::net::ByteStream,
    C: Count,
{
    tracked.established();
    let cut = tokio::select! {
        done = copy_bidirectional(&mut down, &mut up, bytes) => match done {
            // The TLS connection of a revoked peer breaks at the same time, and that may be seen first.
            _ if tracked.is_peer_revoked() => Ending::Revoked,
            Ok(_) => return Ok(()),
            Err(error) => error.into(),
        },
        () = tracked.denied() => if tracked.is_peer_revoked() { Ending::Revoked } else { Ending::DeniedLater },
        () = pod.drain.cut() => Ending::Drained,
    };
    // Neither side may take what it got so far for all there was.
    down.abort();
    up.abort();
    Err(cut)
}

/// Makes the coming close a reset: the other side learns at once, as from a port nobody listens on.
pub fn reset(stream: &TcpStream) {
    // Without it the close is an orderly one, which is no worse than late news.
    let _ = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO));
}
