//! The record of one request: opened when its head is read, closed when its response has ended; the only place where an
//! outcome becomes the access log line and the `istio_*` request metrics.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::header::{HeaderName, USER_AGENT};
use http::{HeaderMap, Method, StatusCode, Version};
use mesh::model::{Service, TunnelProtocol, Workload};
use mesh::telemetry::access::{Direction, Party, Security, common_labels};
use metrics::{Counter, Histogram, Label, counter, histogram};
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;
use tokio::time::Instant;

use crate::balance::Endpoint;
use crate::config::AccessLog;
use crate::reply::Flag;
use crate::upstream::Origin;

/// Envoy's `%START_TIME%`.
const START_TIME: &[BorrowedFormatItem<'_>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");
/// Label sets remembered per worker; beyond, remembering gains nothing.
const REMEMBERED: usize = 4096;

/// Who asked: what the tunnel knows of its client.
#[derive(Debug, Clone)]
pub struct Client {
    pub address: SocketAddr,
    /// `spiffe://…`, proved by mTLS.
    pub principal: Arc<str>,
    pub namespace: Arc<str>,
    /// From the workload store, when address and identity agree.
    pub workload: Option<Arc<Workload>>,
    /// What endpoints are told about it.
    pub origin: Arc<Origin>,
}

impl Client {
    /// How telemetry names it.
    pub fn party(&self) -> Party {
        Party {
            principal: Some(self.principal.clone()),
            namespace: Some(self.namespace.clone()),
            ..self.workload.as_deref().map(|w| w.party(None)).unwrap_or_default()
        }
    }
}

/// An open request. Dropped unclosed, it counts as ended by the client (flag DC).
#[derive(Debug)]
pub struct RequestRecord {
    log: AccessLog,
    client: Arc<Client>,
    service: Option<Arc<Service>>,
    started: Instant,
    wall: OffsetDateTime,
    method: Method,
    path: String,
    version: Version,
    authority: String,
    headers: LoggedHeaders,
    destination: SocketAddr,
    grpc: bool,
    received: Arc<AtomicU64>,
    pub route: Option<Arc<str>>,
    pub endpoint: Option<Arc<Endpoint>>,
    /// Until the upstream's response headers.
    pub upstream_time: Option<Duration>,
    open: bool,
}

#[derive(Debug, Default)]
struct LoggedHeaders {
    forwarded_for: Option<String>,
    user_agent: Option<String>,
    request_id: Option<String>,
}

/// How a request ended.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// `None` when the client was gone before there was one.
    pub status: Option<StatusCode>,
    pub flag: Flag,
    pub details: String,
    pub grpc_status: Option<u16>,
    pub sent: u64,
}

/// What the head of a request tells the record.
#[derive(Debug)]
pub struct Head<'a> {
    pub method: &'a Method,
    /// With its query, as sent.
    pub path: &'a str,
    pub version: Version,
    pub authority: &'a str,
    pub headers: &'a HeaderMap,
    pub destination: SocketAddr,
    pub grpc: bool,
}

impl RequestRecord {
    pub fn open(log: AccessLog, client: Arc<Client>, service: Option<Arc<Service>>, head: &Head<'_>) -> Self {
        let text = |name: HeaderName| head.headers.get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
        Self {
            log,
            client,
            service,
            started: Instant::now(),
            wall: OffsetDateTime::now_utc(),
            method: head.method.clone(),
            path: head.path.to_owned(),
            version: head.version,
            authority: head.authority.to_owned(),
            headers: LoggedHeaders {
                forwarded_for: text(HeaderName::from_static("x-forwarded-for")),
                user_agent: text(USER_AGENT),
                request_id: text(HeaderName::from_static("x-request-id")),
            },
            destination: head.destination,
            grpc: head.grpc,
            received: Arc::default(),
            route: None,
            endpoint: None,
            upstream_time: None,
            open: true,
        }
    }

    /// Where bytes of the request body are counted.
    pub fn received(&self) -> Arc<AtomicU64> {
        self.received.clone()
    }

    pub fn started(&self) -> Instant {
        self.started
    }

    /// The end: one log line and the metrics that go with it.
    pub fn close(mut self, outcome: &Outcome) {
        self.end(outcome);
    }

    fn end(&mut self, outcome: &Outcome) {
        self.open = false;
        let elapsed = self.started.elapsed();
        let received = self.received.load(Ordering::Relaxed);
        self.labels(outcome).count(elapsed, received, outcome.sent);
        let line = match self.log {
            AccessLog::Off => return,
            AccessLog::Text => self.text(outcome, elapsed, received),
            AccessLog::Json => self.json(outcome, elapsed, received),
        };
        // A log that cannot be written must not take the request path down with it.
        let _ = std::io::stdout().lock().write_all(line.as_bytes());
    }

    fn text(&self, o: &Outcome, elapsed: Duration, received: u64) -> String {
        format!(
            "[{}] \"{} {} {:?}\" {} {} {} - \"-\" {received} {} {} {} \"{}\" \"{}\" \"{}\" \"{}\" \"{}\" {} - {} {} - {}\n",
            self.start_time(),
            self.method,
            self.path,
            self.version,
            o.status.map_or(0, |s| s.as_u16()),
            o.flag.as_str(),
            or_dash(Some(&o.details)),
            o.sent,
            elapsed.as_millis(),
            self.upstream_time.map_or_else(|| "-".to_owned(), |t| t.as_millis().to_string()),
            or_dash(self.headers.forwarded_for.as_deref()),
            or_dash(self.headers.user_agent.as_deref()),
            or_dash(self.headers.request_id.as_deref()),
            self.authority,
            self.endpoint.as_ref().map_or_else(|| "-".to_owned(), |e| e.address.to_string()),
            or_dash(self.service.as_ref().map(|s| &*s.hostname)),
            self.destination,
            self.client.address,
            or_dash(self.route.as_deref()),
        )
    }

    fn json(&self, o: &Outcome, elapsed: Duration, received: u64) -> String {
        let value = serde_json::json!({
            "start_time": self.start_time(),
            "route_name": self.route.as_deref(),
            "method": self.method.as_str(),
            "path": self.path,
            "protocol": format!("{:?}", self.version),
            "response_code": o.status.map_or(0, |s| s.as_u16()),
            "response_flags": o.flag.as_str(),
            "response_code_details": o.details,
            "connection_termination_details": null,
            "bytes_received": received,
            "bytes_sent": o.sent,
            "duration": u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
            "upstream_service_time": self.upstream_time.map(|t| t.as_millis().to_string()),
            "x_forwarded_for": self.headers.forwarded_for,
            "user_agent": self.headers.user_agent,
            "request_id": self.headers.request_id,
            "authority": self.authority,
            "upstream_host": self.endpoint.as_ref().map(|e| e.address.to_string()),
            "upstream_cluster": self.service.as_ref().map(|s| s.hostname.to_string()),
            "upstream_local_address": null,
            "downstream_local_address": self.destination.to_string(),
            "downstream_remote_address": self.client.address.to_string(),
            "requested_server_name": null,
            "upstream_transport_failure_reason": null,
        });
        format!("{value}\n")
    }

    fn start_time(&self) -> String {
        self.wall.format(START_TIME).unwrap_or_default()
    }

    fn labels(&self, o: &Outcome) -> LabelSet {
        LabelSet {
            client: self.client.clone(),
            service: self.service.clone(),
            destination: self.endpoint.as_ref().map(|e| e.workload.clone()),
            grpc: self.grpc,
            status: o.status.map_or(0, |s| s.as_u16()),
            grpc_status: o.grpc_status,
            flag: o.flag,
        }
    }
}

impl Drop for RequestRecord {
    fn drop(&mut self) {
        if self.open {
            self.end(&Outcome {
                status: None,
                flag: Flag::DownstreamConnectionTermination,
                details: "downstream_remote_disconnect".into(),
                grpc_status: None,
                sent: 0,
            });
        }
    }
}

fn or_dash(text: Option<&str>) -> &str {
    text.filter(|t| !t.is_empty()).unwrap_or("-")
}

/// All that the labels of a request are made of. Bounded by what the control plane sends and by status codes.
#[derive(Debug)]
struct LabelSet {
    client: Arc<Client>,
    service: Option<Arc<Service>>,
    destination: Option<Arc<Workload>>,
    grpc: bool,
    status: u16,
    grpc_status: Option<u16>,
    flag: Flag,
}

/// A [`LabelSet`] as a map key: names, not contents, since those follow from them.
#[derive(Debug, PartialEq, Eq, Hash)]
struct LabelKey {
    principal: Arc<str>,
    source: Option<Arc<str>>,
    service: Option<(Arc<str>, Arc<str>)>,
    destination: Option<Arc<str>>,
    grpc: bool,
    status: u16,
    grpc_status: Option<u16>,
    flag: Flag,
}

struct Handles {
    requests: Counter,
    duration: Histogram,
    request_bytes: Histogram,
    response_bytes: Histogram,
}

thread_local! {
    static HANDLES: RefCell<HashMap<LabelKey, Handles>> = RefCell::default();
}

impl LabelSet {
    fn count(&self, elapsed: Duration, received: u64, sent: u64) {
        let key = LabelKey {
            principal: self.client.principal.clone(),
            source: self.client.workload.as_ref().map(|w| w.uid.clone()),
            service: self.service.as_ref().map(|s| (s.namespace.clone(), s.hostname.clone())),
            destination: self.destination.as_ref().map(|w| w.uid.clone()),
            grpc: self.grpc,
            status: self.status,
            grpc_status: self.grpc_status,
            flag: self.flag,
        };
        HANDLES.with_borrow_mut(|known| {
            if known.len() >= REMEMBERED {
                known.clear();
            }
            let handles = known.entry(key).or_insert_with(|| self.handles());
            handles.requests.increment(1);
            handles.duration.record(elapsed.as_secs_f64() * 1000.0);
            handles.request_bytes.record(received as f64);
            handles.response_bytes.record(sent as f64);
        });
    }

    fn handles(&self) -> Handles {
        let labels = self.labels();
        Handles {
            requests: counter!("istio_requests_total", labels.clone()),
            duration: histogram!("istio_request_duration_milliseconds", labels.clone()),
            request_bytes: histogram!("istio_request_bytes", labels.clone()),
            response_bytes: histogram!("istio_response_bytes", labels),
        }
    }

    fn labels(&self) -> Vec<Label> {
        let destination = self.destination.as_deref().map(|w| {
            // Plain TCP proves nobody.
            let identity = w.identity().ok().filter(|_| w.protocol == TunnelProtocol::Hbone);
            w.party(identity.as_ref())
        });
        let service = self.service.as_deref().map(Service::labels);
        let grpc_status = self.grpc_status.filter(|_| self.grpc).map_or_else(String::new, |s| s.to_string());
        let destination = destination.unwrap_or_default();
        let mut labels = common_labels(Direction::Waypoint, &self.client.party(), &destination, service.as_ref());
        labels.extend([
            Label::from_static_parts("request_protocol", if self.grpc { "grpc" } else { "http" }),
            Label::new("response_code", self.status.to_string()),
            Label::new("grpc_response_status", grpc_status),
            Label::from_static_parts("response_flags", self.flag.as_str()),
            Label::from_static_parts("connection_security_policy", Security::MutualTls.as_str()),
        ]);
        labels
    }
}
