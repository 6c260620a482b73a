//! Drives one [`Session`] per gRPC stream: authenticates, feeds it requests and views, writes its responses, and ends
//! it when the client's standing changes.
//!
//! A slow client costs at most one response per type: requests are read only when all earlier answers have been handed
//! to the transport, and views that come meanwhile coalesce in the watch channel.

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use futures_util::Stream;
use mesh::drain::DrainWatcher;
use mesh_proto::ads::aggregated_discovery_service_server::AggregatedDiscoveryService;
use mesh_proto::ads::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::session::{Event, Output, Session};
use super::type_label;
use super::view::{Scope, View};
use crate::auth::{Client, Gatekeeper};
use crate::resources::{Acks, ClientAcks, ReportSink, lock};

/// How often a client's standing is looked at when no view changes.
const RECHECK: Duration = Duration::from_secs(10);
/// Stands for "the token has no end" in a timer.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// The delta discovery service.
pub struct Discovery {
    pub gatekeeper: Gatekeeper,
    pub views: watch::Receiver<Arc<View>>,
    pub acks: Arc<Acks>,
    pub nodes: NodeStreams,
    pub drain: DrainWatcher,
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Discovery {
    type DeltaAggregatedResourcesStream =
        Pin<Box<dyn Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send + 'static>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let client = self.gatekeeper.admit(request.metadata()).await?;
        if self.views.borrow().generation() == 0 {
            return Err(Status::unavailable("the control plane has not read the cluster yet"));
        }
        let peer = request.remote_addr();
        let caller = &client.caller;
        tracing::info!(
            namespace = %caller.namespace, service_account = %caller.service_account, node = ?client.node,
            pod = caller.pod.as_ref().map(|pod| &*pod.name), ?peer, "xDS client connected"
        );
        let driver = Driver {
            session: Session::new(Scope { node: client.node.clone(), waypoint: client.waypoint.clone() }),
            gatekeeper: self.gatekeeper.clone(),
            views: self.views.clone(),
            acks: self.acks.client(),
            drain: self.drain.clone(),
            _connected: Connected::new(),
            _node: client.node.as_ref().map(|node| self.nodes.enter(node)),
            client,
        };
        let (responses, stream) = mpsc::channel(1);
        // Ends with the client's stream, with the transport dropping `stream`, and with the drain.
        tokio::spawn(driver.run(request.into_inner(), responses));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

struct Driver {
    client: Client,
    session: Session,
    gatekeeper: Gatekeeper,
    views: watch::Receiver<Arc<View>>,
    acks: ClientAcks,
    drain: DrainWatcher,
    _connected: Connected,
    _node: Option<NodeStream>,
}

type Responses = mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>;

impl Driver {
    async fn run(mut self, requests: Streaming<DeltaDiscoveryRequest>, responses: Responses) {
        let Err(status) = self.exchange(requests, &responses).await else { return };
        tracing::info!(
            namespace = %self.client.caller.namespace, node = ?self.client.node, reason = status.message(),
            "xDS stream ended"
        );
        // A client that does not read does not hear why; it sees the stream end.
        let _ = responses.try_send(Err(status));
    }

    /// Runs until the client leaves (`Ok`) or is sent away (`Err`, with what it is told).
    async fn exchange(
        &mut self,
        mut requests: Streaming<DeltaDiscoveryRequest>,
        responses: &Responses,
    ) -> Result<(), Status> {
        let mut queue: VecDeque<DeltaDiscoveryResponse> = VecDeque::new();
        let mut recheck = tokio::time::interval(RECHECK);
        let token_ends = tokio::time::sleep_until(token_end(&self.client));
        tokio::pin!(token_ends);
        let mut view = Arc::clone(&self.views.borrow_and_update());
        loop {
            // Every branch may be cancelled freely: a request stays in the stream, a permit is returned, a view is
            // read again. Endings come first, so that a busy client cannot outlive its token.
            let output = tokio::select! {
                biased;
                () = self.drain.draining() => return Err(Status::unavailable("the control plane is shutting down")),
                () = &mut token_ends => return Err(Status::unauthenticated("the token has expired")),
                () = responses.closed() => return Ok(()),
                _ = recheck.tick() => {
                    self.check_standing()?;
                    Output::default()
                }
                permit = responses.reserve(), if !queue.is_empty() => {
                    let (Ok(permit), Some(response)) = (permit, queue.pop_front()) else { return Ok(()) };
                    permit.send(Ok(response));
                    Output::default()
                }
                request = requests.message(), if queue.is_empty() => match request {
                    Ok(Some(request)) => self
                        .session
                        .handle_request(request, &view)
                        .map_err(|error| Status::invalid_argument(error.to_string()))?,
                    // The client has gone; how it went is its affair.
                    Ok(None) | Err(_) => return Ok(()),
                },
                changed = self.views.changed() => {
                    if changed.is_err() {
                        return Err(Status::unavailable("the control plane is shutting down"));
                    }
                    self.check_standing()?;
                    view = Arc::clone(&self.views.borrow_and_update());
                    self.session.handle_view(&view)
                }
            };
            for event in output.events {
                self.note(event);
            }
            for response in &output.responses {
                metrics::counter!("pilot_xds_pushes", "type" => type_label(&response.type_url)).increment(1);
            }
            queue.extend(output.responses);
        }
    }

    /// Sends the client away once its pod is gone, or has become something else than it was let in as.
    fn check_standing(&self) -> Result<(), Status> {
        let now = self.gatekeeper.identify(self.client.caller.clone())?;
        if now == self.client { Ok(()) } else { Err(Status::unavailable("the caller's pod has changed; reconnect")) }
    }

    fn note(&self, event: Event) {
        match event {
            Event::Subscribed(type_url) => self.acks.subscribed(type_url),
            Event::Acked(type_url, generation) => self.acks.acked(type_url, generation),
            Event::Answered { type_url, names, refused } => self.acks.answered(type_url, names, refused),
            Event::Nacked(type_url, reason) => {
                metrics::counter!("pilot_total_xds_rejects", "type" => type_label(type_url)).increment(1);
                let caller = &self.client.caller;
                tracing::warn!(
                    type_url, namespace = %caller.namespace, pod = ?caller.pod, reason, "client rejected resources"
                );
            }
            Event::UnknownType(type_url) => tracing::debug!(type_url, "client asked for a type nobody serves"),
        }
    }
}

fn token_end(client: &Client) -> Instant {
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
