//! The driver around [`delta`](super::delta): one stream at a time, again and again until the drain.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use mesh_proto::ads::{DeltaDiscoveryRequest, Node};
use mesh_proto::workload::ADDRESS_TYPE;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;

use super::ResourceHandler;
use super::delta::{DeltaClient, Interest};
use super::inbox::{Applied, Inbox, Received};
use super::response::ResponseError;
use crate::drain::DrainWatcher;
use crate::grpc::{self, AuthChannel, GrpcConfig, GrpcError};

/// The first wait after a lost stream, doubled for each that brought nothing.
const BACKOFF_MIN: Duration = Duration::from_millis(10);
const BACKOFF_MAX: Duration = Duration::from_secs(15);
/// The call, of the service `envoy.service.discovery.v3.AggregatedDiscoveryService`.
const CALL: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
/// Requests on their way; more than the first requests and one answer never are, on-demand names wait their turn.
const REQUESTS: usize = 64;

/// What kind of proxy speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeRole {
    Ztunnel,
    Waypoint,
}

impl NodeRole {
    fn as_str(self) -> &'static str {
        match self {
            Self::Ztunnel => "ztunnel",
            Self::Waypoint => "waypoint",
        }
    }
}

/// Who we say we are. The control plane believes the token and uses this for its logs and for scoping.
#[derive(Clone, Debug)]
pub struct NodeInfo {
    pub role: NodeRole,
    /// The proxy's own address; a placeholder is sent where it is unknown.
    pub ip: Option<IpAddr>,
    /// The pod's name and namespace.
    pub name: String,
    pub namespace: String,
    /// The Kubernetes node.
    pub node_name: String,
    pub cluster_id: String,
    /// Further metadata, see [`NodeInfo::metadata_from`].
    pub metadata: BTreeMap<String, serde_json::Value>,
}

impl NodeInfo {
    /// The metadata among environment variables: `ISTIO_META_<KEY>` as text, `ISTIO_METAJSON_<KEY>` as JSON.
    ///
    /// # Errors
    /// One text for each variable that should hold JSON and does not.
    pub fn metadata_from(
        variables: impl IntoIterator<Item = (String, String)>,
    ) -> Result<BTreeMap<String, serde_json::Value>, Vec<String>> {
        let (mut metadata, mut mistakes) = (BTreeMap::new(), Vec::new());
        for (name, value) in variables {
            if let Some(key) = name.strip_prefix("ISTIO_META_") {
                metadata.insert(key.to_owned(), value.into());
            } else if let Some(key) = name.strip_prefix("ISTIO_METAJSON_") {
                match serde_json::from_str(&value) {
                    Ok(json) => drop(metadata.insert(key.to_owned(), json)),
                    Err(error) => mistakes.push(format!("{name}: {error}")),
                }
            }
        }
        if mistakes.is_empty() { Ok(metadata) } else { Err(mistakes) }
    }

    fn to_wire(&self) -> Node {
        let ip = self.ip.unwrap_or(IpAddr::V4(Ipv4Addr::new(1, 1, 1, 1)));
        let (role, name, namespace) = (self.role.as_str(), &self.name, &self.namespace);
        let own = [
            ("NAME", name.clone()),
            ("NAMESPACE", namespace.clone()),
            ("INSTANCE_IPS", self.ip.map(|ip| ip.to_string()).unwrap_or_default()),
            ("NODE_NAME", self.node_name.clone()),
            ("CLUSTER_ID", self.cluster_id.clone()),
        ];
        let own = own.into_iter().filter(|(_, value)| !value.is_empty()).map(|(key, value)| (key.into(), value.into()));
        let fields = self.metadata.clone().into_iter().chain(own).map(|(key, value)| (key, to_struct_value(value)));
        Node {
            id: format!("{role}~{ip}~{name}.{namespace}~{namespace}.svc.cluster.local"),
            metadata: Some(prost_types::Struct { fields: fields.collect() }),
            ..Default::default()
        }
    }
}

fn to_struct_value(json: serde_json::Value) -> prost_types::Value {
    use prost_types::value::Kind;
    let kind = match json {
        serde_json::Value::Null => Kind::NullValue(0),
        serde_json::Value::Bool(value) => Kind::BoolValue(value),
        serde_json::Value::Number(value) => Kind::NumberValue(value.as_f64().unwrap_or_default()),
        serde_json::Value::String(value) => Kind::StringValue(value),
        serde_json::Value::Array(values) => {
            Kind::ListValue(prost_types::ListValue { values: values.into_iter().map(to_struct_value).collect() })
        }
        serde_json::Value::Object(fields) => Kind::StructValue(prost_types::Struct {
            fields: fields.into_iter().map(|(key, value)| (key, to_struct_value(value))).collect(),
        }),
    };
    prost_types::Value { kind: Some(kind) }
}

/// Where the control plane is and who we are to it.
#[derive(Clone, Debug)]
pub struct XdsConfig {
    pub grpc: GrpcConfig,
    pub node: NodeInfo,
}

/// Asks for single workloads and services, by `network/ip`, a workload's UID or `<namespace>/<hostname>`.
#[derive(Clone, Debug)]
pub struct Demand(mpsc::Sender<Asked>);

/// What is asked for, to be given to the client: see [`XdsClient::on_demand`].
#[derive(Debug)]
pub struct Demanded(mpsc::Receiver<Asked>);

#[derive(Debug)]
struct Asked {
    name: String,
    answered: oneshot::Sender<()>,
}

/// For clients that ask for what they need instead of having everything sent.
pub fn demand() -> (Demand, Demanded) {
    let (demand, demanded) = mpsc::channel(REQUESTS);
    (Demand(demand), Demanded(demanded))
}

impl Demand {
    /// Waits until the control plane has said what `name` stands for; what it has said is in the store by then, and is
    /// kept current from then on. Waits for ever while there is no control plane.
    pub async fn ask(&self, name: impl Into<String>) {
        let (answered, answer) = oneshot::channel();
        // The receivers are gone only after the drain, when nothing is learned any more.
        if self.0.send(Asked { name: name.into(), answered }).await.is_ok() {
            let _ = answer.await;
        }
    }

    /// Asks without waiting, unless many names are on their way already.
    pub fn hint(&self, name: impl Into<String>) {
        let _ = self.0.try_send(Asked { name: name.into(), answered: oneshot::channel().0 });
    }
}

/// How long to wait before the next attempt.
struct Backoff(Duration);

impl Backoff {
    fn new() -> Self {
        Self(BACKOFF_MIN)
    }

    fn next(&mut self) -> Duration {
        let wait = self.0;
        self.0 = (wait * 2).min(BACKOFF_MAX);
        wait
    }
}

/// The xDS client of one process.
pub struct XdsClient {
    config: XdsConfig,
    handlers: Vec<Arc<dyn ResourceHandler>>,
    delta: DeltaClient,
    /// `None` where everything is sent.
    demanded: Option<Demanded>,
    /// Who waits for an answer to which name.
    waiting: HashMap<String, Vec<oneshot::Sender<()>>>,
    synced: watch::Sender<bool>,
    connected: watch::Sender<bool>,
    /// The connection of the stream that is being opened or is up.
    opened: Option<AuthChannel>,
    link: watch::Sender<Option<AuthChannel>>,
}

/// How a stream ended.
#[derive(Debug, thiserror::Error)]
enum StreamEnd {
    #[error("channel to the control plane: {0}")]
    Channel(#[from] GrpcError),
    #[error("control plane is not reachable: {0}")]
    Connect(tonic::Status),
    #[error("stream broke: {0}")]
    Broken(tonic::Status),
    #[error("stream makes no sense: {0}")]
    Senseless(#[from] ResponseError),
    #[error("stream ended within a response")]
    Torn,
    #[error("control plane ended the stream")]
    Complete,
}

impl StreamEnd {
    fn reason(&self) -> &'static str {
        match self {
            Self::Channel(_) | Self::Connect(_) => "ConnectionError",
            Self::Broken(status) if is_expected(status) => "Reconnect",
            Self::Broken(_) | Self::Senseless(_) | Self::Torn => "Error",
            Self::Complete => "Complete",
        }
    }
}

/// Ends that a rolling control plane or a middlebox with a maximum age brings about.
fn is_expected(status: &tonic::Status) -> bool {
    use tonic::Code;
    let gone = || ["transport is closing", "connection reset", "goaway", "GOAWAY", "h2 protocol error"];
    matches!(status.code(), Code::Unknown | Code::Cancelled | Code::DeadlineExceeded)
        || gone().iter().any(|text| status.message().contains(text))
}

impl XdsClient {
    /// A client that feeds `handlers`, whose types it subscribes to in this order.
    pub fn new(config: XdsConfig, handlers: Vec<Arc<dyn ResourceHandler>>) -> Self {
        Self::with(config, handlers, None)
    }

    /// The same, with workloads and services only as they are `demanded`.
    pub fn on_demand(config: XdsConfig, handlers: Vec<Arc<dyn ResourceHandler>>, demanded: Demanded) -> Self {
        Self::with(config, handlers, Some(demanded))
    }

    fn with(config: XdsConfig, handlers: Vec<Arc<dyn ResourceHandler>>, demanded: Option<Demanded>) -> Self {
        let interest = |type_url| match demanded.is_some() && type_url == ADDRESS_TYPE {
            true => Interest::OnDemand,
            false => Interest::All,
        };
        let types: Vec<_> = handlers.iter().map(|h| (h.type_url(), interest(h.type_url()))).collect();
        Self {
            delta: DeltaClient::new(config.node.to_wire(), types),
            config,
            handlers,
            demanded,
            waiting: HashMap::new(),
            synced: watch::Sender::new(false),
            connected: watch::Sender::new(false),
            opened: None,
            link: watch::Sender::new(None),
        }
    }

    /// True once every type has had its first answer; stays so while the control plane is away.
    pub fn synced(&self) -> watch::Receiver<bool> {
        self.synced.subscribe()
    }

    /// Whether a stream is up and has brought something.
    pub fn connected(&self) -> watch::Receiver<bool> {
        self.connected.subscribe()
    }

    /// The connection of the stream while that is up and has brought something: for what must reach the same replica of
    /// the control plane as the acknowledgements do.
    pub fn link(&self) -> watch::Receiver<Option<AuthChannel>> {
        self.link.subscribe()
    }

    /// Keeps a stream up until the drain begins; from then on nothing changes any more.
    pub async fn run(mut self, drain: DrainWatcher) {
        let gauge = metrics::gauge!("xds_connected");
        gauge.set(0.0);
        let mut backoff = Backoff::new();
        loop {
            let end = tokio::select! {
                () = drain.draining() => break,
                end = self.stream() => end,
            };
            self.link.send_replace(None);
            // A stream that brought something was a good one: the next attempt starts afresh.
            if self.connected.send_replace(false) {
                backoff = Backoff::new();
            }
            gauge.set(0.0);
            metrics::counter!("istio_xds_connection_terminations_total", "reason" => end.reason()).increment(1);
            let wait = backoff.next();
            tracing::warn!(address = %self.config.grpc.address, retry_in = ?wait, "xds: {end}");
            tokio::select! {
                () = drain.draining() => break,
                () = tokio::time::sleep(wait) => {}
            }
        }
        self.link.send_replace(None);
        self.connected.send_replace(false);
        gauge.set(0.0);
    }

    /// One stream from connect to end. The channel is new each time: name, roots and token may have changed.
    async fn stream(&mut self) -> StreamEnd {
        match self.exchange().await {
            Ok(()) => StreamEnd::Complete,
            Err(end) => end,
        }
    }

    async fn exchange(&mut self) -> Result<(), StreamEnd> {
        let channel = grpc::channel(self.config.grpc.clone())?;
        self.opened = Some(channel.clone());
        let first = self.delta.handle_connected();
        let (requests, outgoing) = mpsc::channel(REQUESTS.max(first.len()));
        for request in first {
            // There is room for all; servers may hold their headers back until they have read the first.
            let _ = requests.try_send(request);
        }
        let call = grpc::call(channel, CALL, ReceiverStream::new(outgoing));
        let mut answers = call.await.map_err(StreamEnd::Connect)?;
        let mut inbox = Inbox::new(self.handlers.clone());
        tracing::info!(address = %self.config.grpc.address, "xds: stream is open");
        loop {
            tokio::select! {
                bytes = answers.next() => match bytes.map_err(StreamEnd::Broken)? {
                    Some(bytes) => {
                        inbox.push(&bytes);
                        while let Some(received) = inbox.next(&mut self.delta)? {
                            self.received(received, &requests).await;
                        }
                    }
                    None if inbox.is_between() => return Ok(()),
                    None => return Err(StreamEnd::Torn),
                },
                Some(asked) = next(&mut self.demanded) => self.demand(asked, &requests).await,
            }
        }
    }

    async fn demand(&mut self, asked: Asked, requests: &mpsc::Sender<DeltaDiscoveryRequest>) {
        let Asked { name, answered } = asked;
        if let Some(request) = self.delta.subscribe(ADDRESS_TYPE, &name) {
            send(requests, request).await;
        }
        if self.delta.is_answered(ADDRESS_TYPE, &name) {
            // Whoever asked may have given up.
            let _ = answered.send(());
        } else {
            let waiting = self.waiting.entry(name).or_default();
            waiting.retain(|other| !other.is_closed());
            waiting.push(answered);
        }
    }

    fn tell_answered(&mut self) {
        let delta = &self.delta;
        let answered = self.waiting.extract_if(|name, _| delta.is_answered(ADDRESS_TYPE, name));
        for waiting in answered.flat_map(|(_, waiting)| waiting) {
            let _ = waiting.send(());
        }
    }

    async fn received(&mut self, received: Received, requests: &mpsc::Sender<DeltaDiscoveryRequest>) {
        let applied = match received {
            Received::Applied(applied) => applied,
            // No label: the type is the peer's choice of text.
            Received::Unknown { error, bytes } => return tracing::warn!(bytes, "xds: {error}"),
        };
        let Applied { type_url: url, updated, removed, bytes, rejected, answer } = *applied;
        metrics::counter!("istio_xds_message_total", "url" => url).increment(1);
        metrics::counter!("istio_xds_message_bytes_total", "url" => url).increment(bytes as u64);
        tracing::debug!(url, updated, removed, bytes, "xds: received");
        for rejection in &rejected {
            tracing::warn!(url, name = %rejection.name, reason = %rejection.reason, "xds: resource rejected");
        }
        if let Some(answer) = answer {
            send(requests, answer).await;
        }
        self.tell_answered();
        if let Some(request) = self.delta.forget(url) {
            send(requests, request).await;
        }
        if !self.connected.send_replace(true) {
            self.link.send_replace(self.opened.take());
            metrics::gauge!("xds_connected").set(1.0);
        }
        let synced = self.delta.is_synced();
        self.synced.send_if_modified(|known| synced && !std::mem::replace(known, true));
    }
}

async fn next(demanded: &mut Option<Demanded>) -> Option<Asked> {
    demanded.as_mut()?.0.recv().await
}

/// Hands a request to the stream. Where that has ended, the next receive says so.
async fn send(requests: &mpsc::Sender<DeltaDiscoveryRequest>, request: DeltaDiscoveryRequest) {
    let _ = requests.send(request).await;
}

#[cfg(test)]
mod tests;
