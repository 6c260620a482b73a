//! The record of one proxied TCP connection: opened when its request is known, closed by value with its outcome, which
//! becomes the access-log line and the `istio_tcp_*` metrics. Nothing else counts connections.

use std::{cell::RefCell, collections::HashMap, fmt::Display, hash::Hash, net::SocketAddr, sync::Arc};

use ::metrics::{Counter, Gauge, Label, counter, gauge};
use tokio::time::Instant;

use super::{
    ByteCounts, ResponseFlag,
    metrics::{OPEN, OpenEntry, metrics_handle},
};
use crate::text::Text;

/// Which way a connection goes, seen from the workload we act for; decides the `reporter`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Direction {
    /// To our workload: we report as destination.
    Inbound,
    /// From our workload: we report as source.
    Outbound,
    /// Through a waypoint: it reports as itself.
    Waypoint,
}

impl Direction {
    const fn reporter(self) -> &'static str {
        match self {
            Self::Inbound => "destination",
            Self::Outbound => "source",
            Self::Waypoint => "waypoint",
        }
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
            Self::Waypoint => "inbound",
        }
    }
}

/// How the connection between the two workloads is protected.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Security {
    #[default]
    Unknown,
    MutualTls,
}

/// What is known of the workload at one end. Every field becomes a label, so each is something the control plane sent or
/// a certificate said, never something a client chose.
#[derive(Clone, Default, PartialEq, Eq, Hash, Debug)]
pub struct Party {
    /// Name of the owner (Deployment, Job, ...), for metrics.
    pub workload: Option<Text>,
    /// Name of the pod, for the log.
    pub pod: Option<Text>,
    pub namespace: Option<Text>,
    pub canonical_service: Option<Text>,
    pub canonical_revision: Option<Text>,
    pub cluster: Option<Text>,
    /// SPIFFE URI, only where mTLS proved it.
    pub principal: Option<Text>,
    pub region: Option<Text>,
    pub zone: Option<Text>,
}

/// The service that was dialled.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct ServiceLabels {
    /// Fully qualified.
    pub hostname: Text,
    pub namespace: Text,
    pub name: Text,
}

/// Who carries a connection for its source and proved an identity instead of it: a waypoint.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Via {
    pub addr: SocketAddr,
    /// SPIFFE URI.
    pub identity: Text,
}

/// A connection about to be made.
#[derive(Clone, Debug)]
pub struct Connection {
    pub direction: Direction,
    /// Port 0 where a waypoint carries several connections of the source in one.
    pub source_addr: SocketAddr,
    /// The next hop.
    pub destination_addr: SocketAddr,
    /// The CONNECT authority.
    pub hbone_addr: Option<Text>,
    pub source: Party,
    pub destination: Party,
    pub service: Option<ServiceLabels>,
    pub security: Security,
    /// For the log only.
    pub via: Option<Box<Via>>,
}

/// Why a connection did not go well.
#[derive(Clone, Debug)]
pub struct Failure {
    pub flag: ResponseFlag,
    pub message: String,
}

impl Failure {
    pub fn new(flag: ResponseFlag, message: impl Display) -> Self {
        Self { flag, message: message.to_string() }
    }
}

/// An open connection. Dropping it unclosed counts as a failure of its own, [`ResponseFlag::Cancelled`].
pub struct TcpRecord {
    labels: Labels,
    source_addr: SocketAddr,
    destination_addr: SocketAddr,
    hbone_addr: Option<Text>,
    via: Option<Box<Via>>,
    started: Instant,
    /// `None` once closed.
    open: Option<Opened>,
}

struct Opened {
    handles: Arc<Handles>,
    bytes: OpenEntry,
}

impl TcpRecord {
    /// Counts the connection as opened.
    pub fn open(connection: Connection) -> Self {
        let Connection {
            direction,
            source_addr,
            destination_addr,
            hbone_addr,
            source,
            destination,
            service,
            security,
            via,
        } = connection;
        let labels = Labels { direction, source, destination, service, security };
        let handles = labels.handles();
        handles.opened.increment(1);
        handles.sockets.increment(1.0);
        let bytes = OPEN.add(handles.received.clone(), handles.sent.clone());
        let record = Self {
            labels,
            source_addr,
            destination_addr,
            hbone_addr,
            via,
            started: Instant::now(),
            open: Some(Opened { handles, bytes }),
        };
        if tracing::enabled!(target: "access", tracing::Level::DEBUG) {
            record.line(tracing::Level::DEBUG, None, None);
        }
        record
    }

    /// Where the copy loop counts.
    pub fn bytes(&self) -> Arc<ByteCounts> {
        match &self.open {
            Some(open) => open.bytes.bytes.counts.clone(),
            None => Arc::default(),
        }
    }

    /// The next hop became known or changed after opening. For the log only: labels stay as they were opened.
    pub fn next_hop(&mut self, destination: SocketAddr, hbone_addr: Option<Text>) {
        self.destination_addr = destination;
        self.hbone_addr = hbone_addr;
    }

    /// The end: one log line, and the metrics that go with it.
    pub fn close(mut self, outcome: Result<(), Failure>) {
        self.end(outcome.err());
    }

    fn end(&mut self, failure: Option<Failure>) {
        let Some(Opened { handles, bytes }) = self.open.take() else { return };
        handles.sockets.decrement(1.0);
        match &failure {
            Some(failure) if failure.flag != ResponseFlag::None => {
                let failed = self.labels.failed_handles(failure.flag);
                failed.closed.increment(1);
                failed.failed.increment(1);
            }
            _ => handles.closed.increment(1),
        }
        let level = if failure.is_some() { tracing::Level::ERROR } else { tracing::Level::INFO };
        self.line(level, Some(&bytes.bytes.counts), failure.as_ref());
    }

    fn line(&self, level: tracing::Level, bytes: Option<&ByteCounts>, failure: Option<&Failure>) {
        let Labels { direction, source, destination, service, .. } = &self.labels;
        // Counts are kept as downstream sees them; the log tells them as the workload does.
        let (sent, received) = match (direction, bytes) {
            (_, None) => (None, None),
            (Direction::Outbound, Some(bytes)) => (Some(bytes.received()), Some(bytes.sent())),
            (Direction::Inbound | Direction::Waypoint, Some(bytes)) => (Some(bytes.sent()), Some(bytes.received())),
        };
        let duration = bytes.map(|_| format!("{}ms", self.started.elapsed().as_millis()));
        macro_rules! line {
            ($level:expr, $message:literal) => {
                tracing::event!(
                    target: "access", $level,
                    src.addr = %self.source_addr,
                    src.workload = source.pod_or_service(),
                    src.namespace = source.namespace.as_deref(),
                    src.identity = source.principal.as_deref(),
                    src.cluster = source.cluster.as_deref(),
                    dst.addr = %self.destination_addr,
                    dst.hbone_addr = self.hbone_addr.as_deref().map(tracing::field::display),
                    dst.service = service.as_ref().map(|service| &*service.hostname),
                    dst.workload = destination.pod_or_service(),
                    dst.namespace = destination.namespace.as_deref(),
                    dst.identity = destination.principal.as_deref(),
                    dst.cluster = destination.cluster.as_deref(),
                    direction = direction.as_str(),
                    bytes_sent = sent,
                    bytes_recv = received,
                    duration = duration.as_deref(),
                    error = failure.map(|failure| failure.message.as_str()),
                    response_flags = failure.map(|failure| failure.flag.as_str()),
                    via.addr = self.via.as_ref().map(|via| tracing::field::display(via.addr)),
                    via.identity = self.via.as_ref().map(|via| &*via.identity),
                    $message
                )
            };
        }
        match level {
            tracing::Level::DEBUG => line!(tracing::Level::DEBUG, "connection opened"),
            tracing::Level::ERROR => line!(tracing::Level::ERROR, "connection complete"),
            _ => line!(tracing::Level::INFO, "connection complete"),
        }
    }
}

impl Drop for TcpRecord {
    fn drop(&mut self) {
        if self.open.is_some() {
            self.end(Some(Failure::new(ResponseFlag::Cancelled, "given up before it ended")));
        }
    }
}

/// Notes a request in an authenticated connection that asks for no destination at all, as [`refused`] does.
pub fn refused_request(source: SocketAddr, identity: &dyn Display, flag: ResponseFlag, error: &dyn Display) {
    let direction = Direction::Inbound;
    count_refused(direction, flag);
    tracing::event!(
        target: "access", tracing::Level::WARN,
        src.addr = %source,
        src.identity = identity.to_string(),
        direction = direction.as_str(),
        error = error.to_string(),
        response_flags = flag.as_str(),
        "request failed"
    );
}

/// Notes an HBONE connection that ended badly, in the log and in `mesh_hbone_connections_broken_total`. Its tunnels have
/// records of their own, and it may have had none.
pub fn broken(
    direction: Direction,
    source: SocketAddr,
    identity: &dyn Display,
    destination: SocketAddr,
    flag: ResponseFlag,
    error: &dyn Display,
) {
    counter!("mesh_hbone_connections_broken_total", "reporter" => direction.reporter(), "response_flags" => flag.as_str())
        .increment(1);
    tracing::event!(
        target: "access", tracing::Level::WARN,
        src.addr = %source,
        src.identity = identity.to_string(),
        dst.addr = %destination,
        direction = direction.as_str(),
        error = error.to_string(),
        response_flags = flag.as_str(),
        "HBONE connection failed"
    );
}

/// Counts as [`refused`] does, without a line: of connections so many that lines would be one more harm.
pub fn count_refused(direction: Direction, flag: ResponseFlag) {
    counter!("mesh_connections_refused_total", "reporter" => direction.reporter(), "response_flags" => flag.as_str())
        .increment(1);
}

/// Notes a connection that was refused before anything is known that could label it, in the log and in
/// `mesh_connections_refused_total`.
pub fn refused(
    direction: Direction,
    source: SocketAddr,
    destination: SocketAddr,
    flag: ResponseFlag,
    error: &dyn Display,
) {
    count_refused(direction, flag);
    tracing::event!(
        target: "access", tracing::Level::WARN,
        src.addr = %source,
        dst.addr = %destination,
        direction = direction.as_str(),
        error = error.to_string(),
        response_flags = flag.as_str(),
        "connection failed"
    );
}

impl Party {
    fn pod_or_service(&self) -> Option<&str> {
        self.pod.as_deref().or(self.canonical_service.as_deref())
    }
}

/// All that the label set of a connection is made of, apart from the response flag.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Labels {
    direction: Direction,
    source: Party,
    destination: Party,
    service: Option<ServiceLabels>,
    security: Security,
}

struct Handles {
    opened: Counter,
    closed: Counter,
    received: Counter,
    sent: Counter,
    sockets: Gauge,
}

struct FailedHandles {
    closed: Counter,
    failed: Counter,
}

/// Label sets remembered per thread. Beyond that many, connections are so varied that remembering gains nothing.
const REMEMBERED: usize = 4096;

thread_local! {
    static HANDLES: RefCell<HashMap<Labels, Arc<Handles>>> = RefCell::default();
}

impl Labels {
    /// The metrics of this label set, found without building labels when this thread has seen it before.
    fn handles(&self) -> Arc<Handles> {
        HANDLES.with_borrow_mut(|known| {
            if let Some(handles) = known.get(self) {
                return handles.clone();
            }
            metrics_handle();
            let labels = self.labels(ResponseFlag::None);
            let handles = Arc::new(Handles {
                opened: counter!("istio_tcp_connections_opened_total", labels.clone()),
                closed: counter!("istio_tcp_connections_closed_total", labels.clone()),
                received: counter!("istio_tcp_received_bytes_total", labels.clone()),
                sent: counter!("istio_tcp_sent_bytes_total", labels),
                sockets: gauge!("istio_tcp_sockets_open", "reporter" => self.direction.reporter()),
            });
            if known.len() >= REMEMBERED {
                known.clear();
            }
            known.insert(self.clone(), handles.clone());
            handles
        })
    }

    fn failed_handles(&self, flag: ResponseFlag) -> FailedHandles {
        let labels = self.labels(flag);
        FailedHandles {
            closed: counter!("istio_tcp_connections_closed_total", labels.clone()),
            failed: counter!("istio_tcp_connections_failed_total", labels),
        }
    }

    /// In Istio's order.
    fn labels(&self, flag: ResponseFlag) -> Vec<Label> {
        let Self { direction, source, destination, service, security } = self;
        let mut labels = common_labels(*direction, source, destination, service.as_ref());
        labels.extend([
            Label::from_static_parts("request_protocol", "tcp"),
            Label::from_static_parts("response_flags", flag.as_str()),
            Label::from_static_parts("connection_security_policy", security.as_str()),
            label("source_region", &source.region),
            label("source_zone", &source.zone),
            label("destination_region", &destination.region),
            label("destination_zone", &destination.zone),
        ]);
        labels
    }
}

impl Security {
    /// The `connection_security_policy` label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::MutualTls => "mutual_tls",
        }
    }
}

/// The labels that metrics of connections and of requests share: who reports, who speaks with whom, as which service.
pub fn common_labels(
    direction: Direction,
    source: &Party,
    destination: &Party,
    service: Option<&ServiceLabels>,
) -> Vec<Label> {
    let mut labels = vec![Label::from_static_parts("reporter", direction.reporter())];
    labels.extend(source_labels(source));
    labels.extend([
        label("destination_service", &service.map(|service| service.hostname.clone())),
        label("destination_service_namespace", &service.map(|service| service.namespace.clone())),
        label("destination_service_name", &service.map(|service| service.name.clone())),
        label("destination_workload", &destination.workload),
        label("destination_canonical_service", &destination.canonical_service),
        label("destination_canonical_revision", &destination.canonical_revision),
        label("destination_workload_namespace", &destination.namespace),
        label("destination_principal", &destination.principal),
        label("destination_app", &destination.canonical_service),
        label("destination_version", &destination.canonical_revision),
        label("destination_cluster", &destination.cluster),
    ]);
    labels
}

fn source_labels(source: &Party) -> [Label; 8] {
    [
        label("source_workload", &source.workload),
        label("source_canonical_service", &source.canonical_service),
        label("source_canonical_revision", &source.canonical_revision),
        label("source_workload_namespace", &source.namespace),
        label("source_principal", &source.principal),
        label("source_app", &source.canonical_service),
        label("source_version", &source.canonical_revision),
        label("source_cluster", &source.cluster),
    ]
}

/// Counts a connection whose endpoint is known by `hostname` alone, so that DNS was needed to make it.
pub fn on_demand_dns(source: &Party, hostname: &Text) {
    let mut labels = source_labels(source).to_vec();
    labels.push(Label::new("hostname", ::metrics::SharedString::from_shared(hostname.clone())));
    counter!("istio_on_demand_dns_total", labels).increment(1);
}

fn label(name: &'static str, value: &Option<Text>) -> Label {
    match value {
        Some(value) if !value.is_empty() => Label::new(name, ::metrics::SharedString::from_shared(value.clone())),
        _ => Label::from_static_parts(name, "unknown"),
    }
}

#[cfg(test)]
mod tests;
