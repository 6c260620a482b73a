//! One request, from its head to the end of its response. The phases are the function.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http::header::HOST;
use http::{HeaderName, HeaderValue, Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use mesh::model::{AppProtocol, NamespacedHostname};
use mesh::net::Io;
use mesh::serve::{CopyError, copy_bidirectional};
use mesh::telemetry::ByteCounts;
use tokio::time::Instant;

use crate::balance::{Endpoint, InFlight};
use crate::body::{self, Body, End, How};
use crate::filter::{self, RedirectContext, Upstream};
use crate::listener::Tunnel;
use crate::policy::{Denial, HttpSubject, Permit};
use crate::prepare::{self, Prepared};
use crate::record::{Head, Outcome, RequestRecord};
use crate::reply::{self, Flag, Reply};
use crate::route::{Backend, Found, RequestHead, Rule, Target};
use crate::upstream::{Errand, HttpVersion, Lease, SendError};
use crate::world::World;

/// Tries after the first when an endpoint could not be reached at all.
const CONNECT_RETRIES: u32 = 2;
const RETRY_BACKOFF: Duration = Duration::from_millis(25);

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const SERVICE_TIME: HeaderName = HeaderName::from_static("x-envoy-upstream-service-time");
const ATTEMPTS: HeaderName = HeaderName::from_static("x-envoy-attempt-count");

/// A response under way and all that must live as long as it does.
struct Answer {
    response: Response<Incoming>,
    lease: Lease,
    in_flight: InFlight,
}

/// Both halves of an exchange: the answer may be over before the request is.
struct Exchange {
    answer: Answer,
    /// The request's body has been read to its end.
    uploaded: Arc<AtomicBool>,
}

/// Where the request goes once routes have spoken.
struct Routed<'a> {
    rule: Option<&'a Arc<Rule>>,
    backend: Option<&'a Backend>,
    prefix: Option<&'a str>,
    to: Backends,
}

#[derive(Clone)]
enum Backends {
    Service { key: NamespacedHostname, port: u16, version: HttpVersion },
    Pod { endpoint: Arc<Endpoint>, version: HttpVersion },
}

impl Backends {
    fn service(&self) -> Option<Arc<str>> {
        match self {
            Self::Service { key, .. } => Some(key.hostname.clone()),
            Self::Pod { .. } => None,
        }
    }
}

/// Answers one request of a tunnel.
pub async fn handle(tunnel: Arc<Tunnel>, mut request: Request<Incoming>) -> Response<Body> {
    let upgrade = hyper::upgrade::on(&mut request);
    let (mut parts, body) = request.into_parts();
    let grpc = reply::is_grpc(&parts.headers);
    let mut record = open_record(&tunnel, &parts, grpc);
    let world = tunnel.world();
    let prepared = match prepare::prepare(&mut parts) {
        Ok(prepared) => prepared,
        Err(refused) => return local(record, refused, grpc),
    };
    let permit = match authorize(&tunnel, &world, &parts, &prepared) {
        Ok(permit) => permit,
        Err(denial) => return local(record, Reply::denied(denial.details()), grpc),
    };
    let routed = match route(&tunnel, &world, &parts, &prepared) {
        Ok(routed) => routed,
        Err(answer) => return local(record, answer, grpc),
    };
    record.route = routed.rule.map(|r| r.name.clone());
    edit_request(&tunnel, &routed, &mut parts);
    let deadline = routed.rule.and_then(|r| r.request_timeout).map(|t| record.started() + t);
    let uploaded = Arc::new(AtomicBool::new(false));
    let ended = uploaded.clone();
    let body = Body::watched(Body::incoming(body), None, record.received(), move |end| {
        ended.store(end.how == How::Complete, Ordering::Relaxed);
    });
    let request = Request::from_parts(parts, body);
    match attempts(&tunnel, permit, &routed, request, deadline, &mut record).await {
        Ok(answer) if answer.response.status() == StatusCode::SWITCHING_PROTOCOLS && prepared.websocket => {
            switch(upgrade, answer, record)
        }
        // Nobody asked for another protocol.
        Ok(answer) if answer.response.status().is_informational() => {
            local(record, Reply::upstream_protocol_error(), grpc)
        }
        Ok(answer) => respond(&routed, Exchange { answer, uploaded }, deadline, record, grpc),
        Err(failed) => local(record, failed, grpc),
    }
}

fn open_record(tunnel: &Tunnel, parts: &http::request::Parts, grpc: bool) -> RequestRecord {
    let host = parts.headers.get(HOST).and_then(|v| v.to_str().ok());
    let authority = parts.uri.authority().map(http::uri::Authority::as_str).or(host).unwrap_or("-");
    let path = parts.uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    let head = Head {
        method: &parts.method,
        path,
        version: parts.version,
        authority,
        headers: &parts.headers,
        destination: tunnel.destination.address(),
        grpc,
    };
    RequestRecord::open(tunnel.access_log(), tunnel.client.clone(), tunnel.service().cloned(), &head)
}

fn authorize(
    tunnel: &Tunnel,
    world: &World,
    parts: &http::request::Parts,
    prepared: &Prepared,
) -> Result<Permit, Denial> {
    let http = HttpSubject {
        method: parts.method.as_str(),
        path: parts.uri.path(),
        authority: &prepared.authority,
        headers: &parts.headers,
    };
    tunnel.authorize(world, Some(http))
}

/// Finds the rule and its backend, or the answer that needs none.
fn route<'w>(
    tunnel: &Tunnel,
    world: &'w World,
    parts: &http::request::Parts,
    prepared: &Prepared,
) -> Result<Routed<'w>, Reply> {
    let port = tunnel.destination.address().port();
    let Some(service) = tunnel.service_key() else {
        let endpoint = tunnel.pod_endpoint().ok_or_else(Reply::no_healthy_upstream)?;
        let to = Backends::Pod { endpoint, version: as_client(parts.version) };
        return Ok(Routed { rule: None, backend: None, prefix: None, to });
    };
    let head = RequestHead {
        method: &parts.method,
        path: parts.uri.path(),
        query: parts.uri.query(),
        headers: &parts.headers,
    };
    let (rule, prefix) = match world.routes.find(&service.to_string(), port, &tunnel.client.namespace, &head) {
        Found::Rule { rule, prefix } => (rule, prefix),
        Found::NoMatch => return Err(Reply::no_route()),
        Found::Unrouted => {
            let to = backends(tunnel, service.clone(), port, parts.version)?;
            return Ok(Routed { rule: None, backend: None, prefix: None, to });
        }
    };
    if let Some(redirect) = filter::redirect(&rule.filters) {
        let host = prepared.authority.parse::<http::uri::Authority>().ok();
        let context = RedirectContext {
            scheme: "http",
            host: host.as_ref().map_or("", |a| a.host()),
            port,
            path: parts.uri.path(),
            query: parts.uri.query(),
            prefix,
        };
        return Err(Reply::redirect(redirect.status, redirect.location(&context)));
    }
    let backend = rule.backends.pick().ok_or_else(Reply::invalid_backend)?;
    match &backend.target {
        Target::Invalid(_) => Err(Reply::invalid_backend()),
        Target::Service { service, port } => {
            let key = service.parse::<NamespacedHostname>().map_err(|_| Reply::invalid_backend())?;
            let to = backends(tunnel, key, *port, parts.version)?;
            Ok(Routed { rule: Some(rule), backend: Some(backend), prefix, to })
        }
    }
}

/// The endpoints of a service port and the HTTP version its declaration asks for.
fn backends(tunnel: &Tunnel, key: NamespacedHostname, port: u16, client: Version) -> Result<Backends, Reply> {
    let snapshot = tunnel.snapshot();
    let declared = snapshot
        .service(&key)
        .and_then(|s| s.ports.get(&port))
        .map(|p| p.app_protocol)
        .ok_or_else(Reply::invalid_backend)?;
    let version = match declared {
        AppProtocol::Http2 | AppProtocol::Grpc => HttpVersion::H2,
        AppProtocol::Http11 => HttpVersion::H1,
        AppProtocol::Unknown | AppProtocol::Tcp | AppProtocol::Tls => as_client(client),
    };
    Ok(Backends::Service { key, port, version })
}

fn as_client(version: Version) -> HttpVersion {
    if version == Version::HTTP_2 { HttpVersion::H2 } else { HttpVersion::H1 }
}

fn edit_request(tunnel: &Tunnel, routed: &Routed<'_>, parts: &mut http::request::Parts) {
    let rule = routed.rule.map_or(&[][..], |r| &r.filters);
    let backend = routed.backend.map_or(&[][..], |b| &b.filters);
    for filters in [rule, backend] {
        let upstream = Upstream { uri: &mut parts.uri, headers: &mut parts.headers };
        filter::apply_request(filters, routed.prefix, upstream);
    }
    let headers = &mut parts.headers;
    if !headers.contains_key(REQUEST_ID)
        && let Ok(id) = HeaderValue::from_str(&request_id())
    {
        headers.insert(REQUEST_ID, id);
    }
    if !headers.contains_key(FORWARDED_PROTO) {
        headers.insert(FORWARDED_PROTO, HeaderValue::from_static("http"));
    }
    if tunnel.append_forwarded_for() {
        let client = tunnel.client.address.ip().to_string();
        let chain: Vec<&str> =
            headers.get_all(FORWARDED_FOR).iter().filter_map(|v| v.to_str().ok()).chain([client.as_str()]).collect();
        if let Ok(value) = HeaderValue::from_str(&chain.join(", ")) {
            headers.insert(FORWARDED_FOR, value);
        }
    }
}

/// A random (version 4) UUID.
fn request_id() -> String {
    let mut b: [u8; 16] = rand::random();
    b[6] = (b[6] & 0x0f) | 0x40;
    b[8] = (b[8] & 0x3f) | 0x80;
    let n = u128::from_be_bytes(b);
    format!(
        "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
        n >> 96,
        (n >> 80) & 0xffff,
        (n >> 64) & 0xffff,
        (n >> 48) & 0xffff,
        n & 0xffff_ffff_ffff
    )
}

/// Asks endpoints until one answers. Another endpoint is tried only when the request reached nobody.
async fn attempts(
    tunnel: &Tunnel,
    permit: Permit,
    routed: &Routed<'_>,
    mut request: Request<Body>,
    deadline: Option<Instant>,
    record: &mut RequestRecord,
) -> Result<Answer, Reply> {
    let mut tried = BTreeSet::new();
    for attempt in 0.. {
        let (endpoint, version) = pick(tunnel, &routed.to, &tried).ok_or_else(Reply::no_healthy_upstream)?;
        record.endpoint = Some(endpoint.clone());
        tried.insert(endpoint.address);
        request.headers_mut().insert(ATTEMPTS, (attempt + 1).into());
        let per_try = routed.rule.and_then(|r| r.backend_timeout).map(|t| Instant::now() + t);
        let until = [deadline, per_try].into_iter().flatten().min();
        let errand = Errand { client: tunnel.client.origin.clone(), service: routed.to.service() };
        match one(tunnel, &permit, (&endpoint, version), &errand, request, until).await {
            Ok(answer) => {
                record.upstream_time = Some(record.started().elapsed());
                return Ok(answer);
            }
            Err(Failed::Unreached { cause, request: unsent }) => {
                if attempt >= CONNECT_RETRIES {
                    return Err(Reply::connect_failure(&cause));
                }
                tracing::debug!(endpoint = %endpoint.address, cause, "trying another endpoint");
                request = *unsent;
                tokio::time::sleep(RETRY_BACKOFF * (1 << attempt)).await;
            }
            Err(Failed::Final(reply)) => return Err(reply),
        }
    }
    Err(Reply::no_healthy_upstream())
}

enum Failed {
    Unreached { cause: String, request: Box<Request<Body>> },
    Final(Reply),
}

/// One try against one endpoint, up to its response's head.
async fn one(
    tunnel: &Tunnel,
    _permit: &Permit,
    (endpoint, version): (&Arc<Endpoint>, HttpVersion),
    errand: &Errand,
    request: Request<Body>,
    until: Option<Instant>,
) -> Result<Answer, Failed> {
    let in_flight = endpoint.begin();
    let (mut parts, body) = request.into_parts();
    let prepared = parts.clone();
    match version {
        HttpVersion::H1 => prepare::to_h1(&mut parts),
        HttpVersion::H2 => prepare::to_h2(&mut parts),
    }
    let send = tunnel.upstreams().send(endpoint, version, errand, Request::from_parts(parts, body));
    let sent = match until {
        Some(until) => tokio::time::timeout_at(until, send).await.map_err(|_| Failed::Final(Reply::timeout()))?,
        None => send.await,
    };
    match sent {
        Ok((response, lease)) => Ok(Answer { response, lease, in_flight }),
        Err(SendError::Connect { cause, request }) => {
            let request = Box::new(Request::from_parts(prepared, request.into_body()));
            Err(Failed::Unreached { cause: cause.to_string(), request })
        }
        Err(SendError::Http(error)) => Err(Failed::Final(broken(&error))),
    }
}

fn broken(error: &hyper::Error) -> Reply {
    if error.is_user() {
        Reply::broken_body()
    } else if error.is_parse() {
        Reply::upstream_protocol_error()
    } else if error.is_canceled() || error.is_incomplete_message() {
        Reply::upstream_closed()
    } else {
        Reply::upstream_reset()
    }
}

fn pick(
    tunnel: &Tunnel,
    to: &Backends,
    tried: &BTreeSet<std::net::SocketAddr>,
) -> Option<(Arc<Endpoint>, HttpVersion)> {
    match to {
        Backends::Pod { endpoint, version } => Some((endpoint.clone(), *version)),
        Backends::Service { key, port, version } => {
            tunnel.balancer().pick(&tunnel.snapshot(), key, *port, tried).map(|e| (e, *version))
        }
    }
}

/// The upstream's response, edited, with a body that closes the record when it ends.
fn respond(
    routed: &Routed<'_>,
    exchange: Exchange,
    deadline: Option<Instant>,
    record: RequestRecord,
    grpc: bool,
) -> Response<Body> {
    let Exchange { answer: Answer { response, lease, in_flight }, uploaded } = exchange;
    let (mut parts, incoming) = response.into_parts();
    prepare::strip_hop_by_hop(&mut parts.headers, false);
    if let Some(backend) = routed.backend {
        filter::apply_response(&backend.filters, &mut parts.headers);
    }
    if let Some(rule) = routed.rule {
        filter::apply_response(&rule.filters, &mut parts.headers);
    }
    if let Some(time) = record.upstream_time {
        parts.headers.insert(SERVICE_TIME, u64::try_from(time.as_millis()).unwrap_or(u64::MAX).into());
    }
    let status = parts.status;
    let head_status = grpc.then(|| body::grpc_status(&parts.headers)).flatten();
    let body = Body::watched(Body::incoming(incoming), deadline, Arc::default(), move |end: End| {
        drop(in_flight);
        let (flag, details) = match end.how {
            How::Complete => (Flag::None, "via_upstream"),
            How::Broken => (Flag::UpstreamConnectionTermination, "upstream_reset_after_response_started"),
            How::Deadline => (Flag::UpstreamRequestTimeout, "response_timeout"),
            How::Dropped => (Flag::DownstreamConnectionTermination, "downstream_remote_disconnect"),
        };
        // A connection still busy with this request's body would keep its next user waiting for this client.
        if end.how == How::Complete && uploaded.load(Ordering::Relaxed) {
            lease.give_back();
        }
        record.close(&Outcome {
            status: Some(status),
            flag,
            details: details.into(),
            grpc_status: end.grpc_status.or(head_status),
            sent: end.bytes,
        });
    });
    parts.version = Version::default();
    Response::from_parts(parts, body)
}

/// A WebSocket: after 101 both sides are bytes.
fn switch(downstream: hyper::upgrade::OnUpgrade, answer: Answer, record: RequestRecord) -> Response<Body> {
    let Answer { mut response, lease, in_flight } = answer;
    let upstream = hyper::upgrade::on(&mut response);
    // Ends with the connections it joins.
    tokio::spawn(async move {
        let _hold = (lease, in_flight);
        let bytes = ByteCounts::default();
        let outcome = async {
            let (down, up) = (downstream.await?, upstream.await?);
            let (down, up) = (Io::new(TokioIo::new(down)), Io::new(TokioIo::new(up)));
            copy_bidirectional(down, up, &bytes).await.map_err(SwitchError::Copy)
        };
        let (flag, details) = match outcome.await {
            Ok(_) => (Flag::None, "via_upstream".to_owned()),
            Err(error) => (Flag::UpstreamConnectionTermination, error.to_string()),
        };
        record.received().fetch_add(bytes.received(), Ordering::Relaxed);
        let status = Some(StatusCode::SWITCHING_PROTOCOLS);
        record.close(&Outcome { status, flag, details, grpc_status: None, sent: bytes.sent() });
    });
    let (mut parts, _) = response.into_parts();
    prepare::strip_hop_by_hop(&mut parts.headers, true);
    parts.version = Version::default();
    Response::from_parts(parts, Body::empty())
}

#[derive(Debug, thiserror::Error)]
enum SwitchError {
    #[error(transparent)]
    Http(#[from] hyper::Error),
    #[error(transparent)]
    Copy(CopyError),
}

/// An answer of our own.
fn local(record: RequestRecord, reply: Reply, grpc: bool) -> Response<Body> {
    record.close(&Outcome {
        status: Some(reply.status),
        flag: reply.flag,
        details: reply.details.to_string(),
        grpc_status: grpc.then(|| reply::grpc_status(reply.status)),
        sent: reply.body.len() as u64,
    });
    reply.into_response(grpc)
}
