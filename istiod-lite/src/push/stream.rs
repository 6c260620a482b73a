//! Drives one [`Session`] per gRPC stream: authenticates, feeds it requests and views, writes its responses, and ends
//! it when the client's standing changes.
//!
//! A slow client costs at most one response per type: requests are read only when all earlier answers have been handed
//! to the transport, but for one that was under way already, and views that come meanwhile coalesce in the watch channel.
//! Clients that begin, which is costly, are handled on threads of their own (`callers`), so that a fleet that comes back
//! leaves time for those that are there.

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use http::header::CONTENT_TYPE;
use mesh::drain::DrainWatcher;
use mesh_proto::ads::DeltaDiscoveryRequest;
use mesh_proto::ads::aggregated_discovery_service_server::SERVICE_NAME;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use tonic::body::Body;
use tonic::metadata::GRPC_CONTENT_TYPE;
use tonic::server::NamedService;
use tonic::{Request, Status};

use super::answer::Writer;
use super::callers::{Callers, Entry};
use super::grpc::{Answers, Asked, LongRequest, Requests};
use super::session::{Event, Output, ProtocolError, Session};
use super::type_label;
use super::view::{Scope, View};
use crate::auth::{Client, Gatekeeper};
use crate::resources::{Acks, ClientAcks, ClientInfo, ReportSink, lock};

/// How often a client's standing is looked at when no view changes.
const RECHECK: Duration = Duration::from_secs(10);
/// A client's refusals are told of at most this often; all are counted.
const TOLD_EVERY: Duration = Duration::from_secs(1);
/// Stands for "what the caller has shown has no end" in a timer.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// The one call that is served: state-of-the-world streams are not.
const CALL: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";

/// The delta discovery service.
#[derive(Clone)]
pub struct Discovery {
    pub gatekeeper: Gatekeeper,
    pub views: watch::Receiver<Arc<View>>,
    pub acks: Arc<Acks>,
    pub nodes: NodeStreams,
    pub callers: Callers,
    pub drain: DrainWatcher,
}

impl NamedService for Discovery {
    const NAME: &'static str = SERVICE_NAME;
}

impl tower::Service<http::Request<Body>> for Discovery {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let answers = match request.uri().path() {
                CALL => this.open(Request::from_http(request)).await,
                other => Err(Status::unimplemented(format!("{other} is not served"))),
            };
            Ok(answers.map_or_else(Status::into_http, |answers| {
                let mut response = http::Response::new(Body::new(answers));
                response.headers_mut().insert(CONTENT_TYPE, GRPC_CONTENT_TYPE);
                response
            }))
        })
    }
}

impl Discovery {
    /// Lets a client in; its stream ends with it, with the transport dropping the answers, and with the drain.
    async fn open(self, request: Request<Body>) -> Result<Answers, Status> {
        let client = self.gatekeeper.admit(request.metadata(), request.extensions()).await?;
        if self.views.borrow().generation() == 0 {
            return Err(Status::unavailable("the control plane has not read the cluster yet"));
        }
        let peer = request.remote_addr();
        let caller = &client.caller;
        let pod = caller.pod.as_ref().map(|pod| &*pod.uid);
        let entry = self.callers.enter(&caller.namespace, &caller.service_account, pod).map_err(|error| {
            tracing::warn!(namespace = %caller.namespace, service_account = %caller.service_account, pod, "{error}");
            limited("streams", error.to_string())
        })?;
        tracing::info!(
            namespace = %caller.namespace, service_account = %caller.service_account, node = ?client.node,
            pod = caller.pod.as_ref().map(|pod| &*pod.name), proof = caller.proof.name(), ?peer, "xDS client connected"
        );
        let acks = self.acks.client();
        acks.describe(ClientInfo {
            namespace: Arc::clone(&caller.namespace),
            service_account: Arc::clone(&caller.service_account),
            pod: caller.pod.as_ref().map(|pod| Arc::clone(&pod.name)),
            node: client.node.clone(),
            waypoint: client.waypoint.as_ref().map(|(_, name)| Arc::clone(name)),
            address: peer,
            since: SystemTime::now(),
        });
        let driver = Driver {
            session: Session::new(Scope { node: client.node.clone(), waypoint: client.waypoint.clone() }),
            acks,
            _connected: Connected::new(),
            _node: client.node.as_ref().map(|node| self.nodes.enter(node)),
            gatekeeper: self.gatekeeper,
            views: self.views,
            drain: self.drain,
            client,
            told: None,
            entry,
        };
        let requests = Requests::new(request.into_inner(), driver.entry.share());
        let (responses, queue) = mpsc::channel(1);
        tokio::spawn(driver.run(requests, responses));
        Ok(Answers::new(queue))
    }
}

struct Driver {
    client: Client,
    session: Session,
    gatekeeper: Gatekeeper,
    views: watch::Receiver<Arc<View>>,
    acks: ClientAcks,
    drain: DrainWatcher,
    /// When a refusal was last told of.
    told: Option<Instant>,
    _connected: Connected,
    _node: Option<NodeStream>,
    entry: Entry,
}

/// A client asks for more than anybody needs.
fn limited(limit: &'static str, message: String) -> Status {
    metrics::counter!("mesh_xds_limited_total", "limit" => limit).increment(1);
    Status::resource_exhausted(message)
}

type Responses = mpsc::Sender<Result<Writer, Status>>;

/// What one input led to.
#[derive(Default)]
struct Handled {
    events: Vec<Event>,
    answers: Vec<Writer>,
}

impl Handled {
    fn new(output: Output) -> Result<Self, Status> {
        let too_large = || Status::out_of_range("the answer is larger than a gRPC message may be");
        let written = |answer| Writer::new(answer).ok_or_else(too_large);
        let answers = output.responses.into_iter().map(written).collect::<Result<_, _>>()?;
        Ok(Self { events: output.events, answers })
    }

    fn add(&mut self, later: Self) {
        self.events.extend(later.events);
        self.answers.extend(later.answers);
    }
}

/// A request that takes long is being handled. Without the session nothing else is.
type Working = AbortOnDropHandle<(Session, Arc<View>, Result<Handled, Status>)>;

fn handle(session: &mut Session, request: DeltaDiscoveryRequest, view: &Arc<View>) -> Result<Handled, Status> {
    let output = session.handle_request(request, view).map_err(|error| match error {
        ProtocolError::TooManyNames => limited("names", error.to_string()),
        ProtocolError::NoType => Status::invalid_argument(error.to_string()),
    })?;
    Handled::new(output)
}

impl Driver {
    async fn run(mut self, requests: Requests, responses: Responses) {
        let Err(status) = self.exchange(requests, &responses).await else { return };
        tracing::info!(
            namespace = %self.client.caller.namespace, node = ?self.client.node, reason = status.message(),
            "xDS stream ended"
        );
        // A client that does not read does not hear why; it sees the stream end.
        let _ = responses.try_send(Err(status));
    }

    /// Runs until the client leaves (`Ok`) or is sent away (`Err`, with what it is told).
    async fn exchange(&mut self, mut requests: Requests, responses: &Responses) -> Result<(), Status> {
        let mut queue: VecDeque<Writer> = VecDeque::new();
        let mut recheck = tokio::time::interval(RECHECK);
        let proof_ends = tokio::time::sleep_until(proof_end(&self.client));
        tokio::pin!(proof_ends);
        let mut view = Arc::clone(&self.views.borrow_and_update());
        let mut working: Option<Working> = None;
        loop {
            let due = requests.due();
            // Every branch may be cancelled freely: a request stays in the stream, a permit is returned, a view is
            // read again. Endings come first, so that a busy client cannot outlive what it has shown.
            let handled = tokio::select! {
                biased;
                () = self.drain.draining() => return Err(Status::unavailable("the control plane is shutting down")),
                () = &mut proof_ends => {
                    let proof = self.client.caller.proof.name();
                    return Err(Status::unauthenticated(format!("the {proof} has expired")));
                }
                () = responses.closed() => return Ok(()),
                () = due => {
                    requests.check_arrival()?;
                    Handled::default()
                }
                _ = recheck.tick() => {
                    self.check_standing()?;
                    // Not with each view: this looks at signatures.
                    self.gatekeeper.check_certificate(&self.client.caller)?;
                    Handled::default()
                }
                permit = responses.reserve(), if !queue.is_empty() => {
                    let (Ok(permit), Some(response)) = (permit, queue.pop_front()) else { return Ok(()) };
                    self.acks.sent(&response.answer().type_url, response.answer().generation);
                    permit.send(Ok(response));
                    Handled::default()
                }
                done = async { working.as_mut().expect("it is there").await }, if working.is_some() => {
                    working = None;
                    let (session, seen, handled) =
                        done.map_err(|_| Status::internal("a request could not be handled"))?;
                    self.session = session;
                    self.check_standing()?;
                    let mut handled = handled?;
                    // What has come meanwhile, which nobody has looked at.
                    if view.generation() > seen.generation() {
                        handled.add(Handled::new(self.session.handle_view(&view))?);
                    } else {
                        view = seen;
                    }
                    handled
                }
                request = requests.next(), if working.is_none() && (queue.is_empty() || requests.is_under_way()) => match request? {
                    Some(Asked::Shortly(request)) => handle(&mut self.session, request, &view)?,
                    Some(Asked::AtLength(request)) => {
                        working = Some(self.handle_at_length(request));
                        Handled::default()
                    }
                    // The client has gone; how it went is its affair.
                    None => return Ok(()),
                },
                changed = self.views.changed() => {
                    if changed.is_err() {
                        return Err(Status::unavailable("the control plane is shutting down"));
                    }
                    self.check_standing()?;
                    view = Arc::clone(&self.views.borrow_and_update());
                    match working {
                        None => Handled::new(self.session.handle_view(&view))?,
                        Some(_) => Handled::default(),
                    }
                }
            };
            for event in handled.events {
                self.note(event);
            }
            for writer in &handled.answers {
                metrics::counter!("pilot_xds_pushes", "type" => type_label(&writer.answer().type_url)).increment(1);
            }
            queue.extend(handled.answers);
        }
    }

    /// Lends the session out to where it may take long.
    fn handle_at_length(&mut self, request: LongRequest) -> Working {
        // From now on the client is waited for, as it will be told of a view that is not older than this one.
        if let Some(type_url) = request.type_url() {
            self.acks.subscribed(type_url);
        }
        let mut session = std::mem::replace(&mut self.session, Session::new(Scope::default()));
        let views = self.views.clone();
        self.entry.long().run(move || {
            let view = Arc::clone(&views.borrow());
            let handled = request.read().and_then(|read| handle(&mut session, read, &view));
            (session, view, handled)
        })
    }

    /// Sends the client away once its pod is gone, or has become something else than it was let in as.
    fn check_standing(&self) -> Result<(), Status> {
        let now = self.gatekeeper.identify(self.client.caller.clone())?;
        if now == self.client { Ok(()) } else { Err(Status::unavailable("the caller's pod has changed; reconnect")) }
    }

    /// Whether what the client says of this policy is for its status. Pods that are neither a node's proxy nor a waypoint carry
    /// out policies for themselves, if they do: those of other namespaces are none of their business.
    fn speaks_of(&self, name: &str) -> bool {
        let Client { caller, node, waypoint } = &self.client;
        let is_own = || name.split_once('/').is_some_and(|(namespace, _)| *namespace == *caller.namespace);
        node.is_some() || waypoint.is_some() || is_own()
    }

    fn note(&mut self, event: Event) {
        match event {
            Event::Subscribed(type_url) => self.acks.subscribed(type_url),
            Event::Acked(type_url, generation) => self.acks.acked(type_url, generation),
            Event::Answered { type_url, names, mut refused } => {
                refused.retain(|name, _| self.speaks_of(name));
                self.acks.answered(type_url, names, refused);
            }
            Event::Nacked(type_url, reason) => {
                metrics::counter!("pilot_total_xds_rejects", "type" => type_label(type_url)).increment(1);
                self.acks.rejected(type_url, &reason);
                if self.told.is_none_or(|told| told.elapsed() >= TOLD_EVERY) {
                    self.told = Some(Instant::now());
                    let caller = &self.client.caller;
                    tracing::warn!(
                        type_url, namespace = %caller.namespace, pod = ?caller.pod, reason, "client rejected resources"
                    );
                }
            }
            Event::UnknownType(type_url) => tracing::debug!(type_url, "client asked for a type nobody serves"),
        }
    }
}

fn proof_end(client: &Client) -> Instant {
    let left = client
        .caller
        .expires
        .map_or(FOREVER, |end| end.duration_since(SystemTime::now()).unwrap_or(Duration::ZERO).min(FOREVER));
    Instant::now() + left
}

/// Counts in the gauge of connected clients while it lives.
struct Connected(());

impl Connected {
    fn new() -> Self {
        metrics::gauge!("pilot_xds").increment(1.0);
        Self(())
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        metrics::gauge!("pilot_xds").decrement(1.0);
    }
}

/// How many streams each node proxy holds: during an upgrade two ztunnels of one node are connected, and the node is
/// gone only when the last stream is.
#[derive(Clone)]
pub struct NodeStreams {
    counts: Arc<Mutex<HashMap<Arc<str>, usize>>>,
    sink: Arc<dyn ReportSink>,
}

impl NodeStreams {
    pub fn new(sink: Arc<dyn ReportSink>) -> Self {
        Self { counts: Arc::default(), sink }
    }

    fn enter(&self, node: &Arc<str>) -> NodeStream {
        *lock(&self.counts).entry(Arc::clone(node)).or_default() += 1;
        NodeStream { node: Arc::clone(node), streams: self.clone() }
    }
}

struct NodeStream {
    node: Arc<str>,
    streams: NodeStreams,
}

impl Drop for NodeStream {
    fn drop(&mut self) {
        let last = {
            let mut counts = lock(&self.streams.counts);
            let left = counts.get_mut(&self.node).map_or(0, |count| {
                *count -= 1;
                *count
            });
            if left == 0 {
                counts.remove(&self.node);
            }
            left == 0
        };
        if last {
            self.streams.sink.disconnected(&self.node);
        }
    }
}
