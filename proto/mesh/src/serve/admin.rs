//! The small HTTP servers of operators: readiness, metrics, admin. HTTP/1.1, a handful of exact paths, short answers.

use std::{
    collections::BTreeSet,
    convert::Infallible,
    fmt::Display,
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener, UnixStream},
    task::JoinSet,
};

use super::accept_loop;
use crate::{
    drain::DrainWatcher,
    telemetry::{Exposition, LogHandle, MetricsHandle, preferences},
};

const MAX_BODY: usize = 1 << 20;
/// For a client to send its request's head; these ports are reachable by whoever reaches the pod.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// After an `accept` that failed, most likely for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

pub type AdminResponse = Response<Full<Bytes>>;

/// A request with its body read.
pub struct AdminRequest {
    pub method: Method,
    pub path: String,
    pub query: Option<String>,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl AdminRequest {
    /// The value of `name` in the query, percent-decoded. `Some("")` when it stands there without one.
    pub fn param(&self, name: &str) -> Option<String> {
        let pairs = self.query.as_deref()?.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        let (_, value) = pairs.into_iter().find(|(key, _)| *key == name)?;
        Some(percent_encoding::percent_decode_str(value).decode_utf8_lossy().into_owned())
    }

    /// The value of a header; empty where it is not there or no text.
    fn header(&self, name: header::HeaderName) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }
}

type Handler = Arc<dyn Fn(AdminRequest) -> Pin<Box<dyn Future<Output = AdminResponse> + Send>> + Send + Sync>;

/// A set of routes to serve on one port.
pub struct AdminServer {
    name: &'static str,
    routes: Vec<(Method, &'static str, Handler)>,
}

impl AdminServer {
    /// `name` is for the log.
    pub fn new(name: &'static str) -> Self {
        Self { name, routes: Vec::new() }
    }

    /// Answers `method` on exactly `path`.
    pub fn route<H, F>(mut self, method: Method, path: &'static str, handler: H) -> Self
    where
        H: Fn(AdminRequest) -> F + Send + Sync + 'static,
        F: Future<Output = AdminResponse> + Send + 'static,
    {
        self.routes.push((method, path, Arc::new(move |request| Box::pin(handler(request)))));
        self
    }

    /// `GET /healthz/ready`.
    pub fn readiness(self, readiness: Readiness) -> Self {
        self.route(Method::GET, "/healthz/ready", move |_| {
            let answer = match readiness.pending_tasks() {
                tasks if tasks.is_empty() => text(StatusCode::OK, "ready"),
                tasks => text(StatusCode::INTERNAL_SERVER_ERROR, format!("not ready, pending: {}", tasks.join(", "))),
            };
            async { answer }
        })
    }

    /// `GET /metrics` and its Envoy spelling, in the format and encoding that the scraper prefers.
    pub fn metrics(self, metrics: MetricsHandle) -> Self {
        let answer = move |request: AdminRequest| {
            let format = Exposition::accepted(request.header(header::ACCEPT));
            let exposed = metrics.expose(format).into_bytes();
            let packed = accepts_gzip(request.header(header::ACCEPT_ENCODING));
            let mut response = text(StatusCode::OK, if packed { gzip(&exposed) } else { exposed });
            let headers = response.headers_mut();
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(format.content_type()));
            headers.insert(header::VARY, HeaderValue::from_static("accept, accept-encoding"));
            if packed {
                headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            }
            async { response }
        };
        self.route(Method::GET, "/metrics", answer.clone()).route(Method::GET, "/stats/prometheus", answer)
    }

    /// `GET /`: a page with the routes that were added before, each with what `about` says of its path.
    pub fn index(self, title: &str, about: &[(&str, &str)]) -> Self {
        let mut page =
            format!("<!DOCTYPE html>\n<html><head><title>{title}</title></head><body>\n<h1>{title}</h1>\n<table>\n");
        for (method, path, _) in &self.routes {
            let said = about.iter().find(|(of, _)| of == path).map_or("", |(_, said)| said);
            // What a browser asks for by a click is GET.
            let link =
                if *method == Method::GET { format!("<a href=\"{path}\">{path}</a>") } else { (*path).to_owned() };
            page.push_str(&format!("<tr><td>{method}</td><td>{link}</td><td>{said}</td></tr>\n"));
        }
        page.push_str("</table>\n</body></html>\n");
        let page = Bytes::from(page);
        self.route(Method::GET, "/", move |_| {
            let mut response = text(StatusCode::OK, page.clone());
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
            async { response }
        })
    }

    /// `POST /logging`: `?level=<filter>` adds, `?reset` resets, bare shows.
    pub fn logging(self, log: LogHandle) -> Self {
        self.route(Method::POST, "/logging", move |request| {
            let changed = match (request.param("reset"), request.param("level")) {
                (Some(_), None) => log.reset(),
                (Some(_), Some(level)) if !level.is_empty() => log.reset().and_then(|()| log.add(&level)),
                (None, Some(level)) if !level.is_empty() => log.add(&level),
                _ => Ok(()),
            };
            let answer = match changed {
                Ok(()) => text(StatusCode::OK, format!("current log level is {}\n", log.current())),
                Err(error) => text(StatusCode::BAD_REQUEST, format!("{error}\n")),
            };
            async { answer }
        })
    }

    /// `POST /quitquitquit` calls `quit`.
    pub fn quit(self, quit: impl Fn() + Send + Sync + 'static) -> Self {
        self.route(Method::POST, "/quitquitquit", move |_| {
            quit();
            async { text(StatusCode::OK, "shutdown now\n") }
        })
    }

    /// Serves until the drain; requests that have begun are answered.
    pub async fn serve(self, listener: TcpListener, drain: DrainWatcher) {
        let server = Arc::new(self);
        let watcher = drain.clone();
        accept_loop(listener, drain, move |stream, _| server.clone().connection(stream, watcher.clone())).await;
    }

    /// The same on a socket in the filesystem, for root and whoever runs this process and nobody else, whatever the
    /// mode of the file says.
    pub async fn serve_unix(self, listener: UnixListener, drain: DrainWatcher) {
        let server = Arc::new(self);
        let mut tasks = JoinSet::new();
        loop {
            tokio::select! {
                () = drain.draining() => break,
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) if is_owner(&stream) => {
                        tasks.spawn(server.clone().connection(stream, drain.clone()));
                    }
                    Ok(_) => tracing::warn!(server = server.name, "a stranger was turned away"),
                    Err(error) => {
                        tracing::warn!(server = server.name, %error, "accepting a connection");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
                Some(_) = tasks.join_next() => {}
            }
        }
        tokio::select! {
            () = async { while tasks.join_next().await.is_some() {} } => {}
            () = drain.cut() => {}
        }
    }

    /// One connection, until it or the drain ends.
    async fn connection<S>(self: Arc<Self>, stream: S, drain: DrainWatcher)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let name = self.name;
        let service = service_fn(move |request| {
            let server = self.clone();
            async move { Ok::<_, Infallible>(server.answer(request).await) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = std::pin::pin!(connection);
        let outcome = tokio::select! {
            outcome = &mut connection => outcome,
            () = drain.draining() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = outcome {
            tracing::debug!(server = name, %error, "connection ended");
        }
    }

    async fn answer(&self, request: Request<Incoming>) -> AdminResponse {
        let (parts, body) = request.into_parts();
        let handler = match self.find(&parts.method, parts.uri.path()) {
            Ok(handler) => handler,
            Err(status) => return text(status, format!("{status}\n")),
        };
        let Ok(body) = Limited::new(body, MAX_BODY).collect().await else {
            return text(StatusCode::PAYLOAD_TOO_LARGE, "the body is incomplete or too large\n");
        };
        handler(AdminRequest {
            method: parts.method,
            path: parts.uri.path().to_owned(),
            query: parts.uri.query().map(str::to_owned),
            headers: parts.headers,
            body: body.to_bytes(),
        })
        .await
    }
}

impl AdminServer {
    fn find(&self, method: &Method, path: &str) -> Result<Handler, StatusCode> {
        let method = if *method == Method::HEAD { Method::GET } else { method.clone() };
        let mut refusal = StatusCode::NOT_FOUND;
        for (allowed, route, handler) in &self.routes {
            if *route == path {
                if *allowed == method {
                    return Ok(handler.clone());
                }
                refusal = StatusCode::METHOD_NOT_ALLOWED;
            }
        }
        Err(refusal)
    }
}

/// Is the process at the other end root's or of our own user?
fn is_owner(stream: &UnixStream) -> bool {
    let ours = std::fs::metadata("/proc/self").map(|own| std::os::unix::fs::MetadataExt::uid(&own));
    stream.peer_cred().is_ok_and(|peer| peer.uid() == 0 || ours.is_ok_and(|uid| uid == peer.uid()))
}

fn accepts_gzip(accept_encoding: &str) -> bool {
    preferences(accept_encoding).any(|(coding, weight)| coding.eq_ignore_ascii_case("gzip") && weight > 0.0)
}

/// Packed quickly rather than well: metrics are full of repetitions.
pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let packed = std::io::Write::write_all(&mut packer, bytes).and_then(|()| packer.finish());
    packed.expect("writing to a vector does not fail")
}

/// An answer in plain text.
pub fn text(status: StatusCode, body: impl Into<Bytes>) -> AdminResponse {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

/// An answer as JSON, indented for people.
pub fn json(value: &impl Serialize) -> AdminResponse {
    match serde_json::to_vec_pretty(value) {
        Ok(body) => {
            let mut response = text(StatusCode::OK, body);
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
            response
        }
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

/// Whether the process can do its job yet: ready once every task that was announced is done.
#[derive(Clone, Default)]
pub struct Readiness(Arc<ReadinessState>);

#[derive(Default)]
struct ReadinessState {
    pending: Mutex<BTreeSet<String>>,
    shutting_down: AtomicBool,
}

/// A task that readiness waits for, until this is dropped.
pub struct ReadyGuard {
    readiness: Readiness,
    name: String,
}

impl Readiness {
    /// Announces a task. Its name is what operators read while it is pending.
    pub fn pending(&self, name: impl Display) -> ReadyGuard {
        let name = name.to_string();
        self.0.pending.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone());
        ReadyGuard { readiness: self.clone(), name }
    }

    pub fn is_ready(&self) -> bool {
        self.pending_tasks().is_empty()
    }

    /// Not ready from now on: the first step of a drain.
    pub fn shutting_down(&self) {
        self.0.shutting_down.store(true, Ordering::Relaxed);
    }

    fn pending_tasks(&self) -> Vec<String> {
        let pending = self.0.pending.lock().unwrap_or_else(PoisonError::into_inner);
        let down = self.0.shutting_down.load(Ordering::Relaxed).then(|| "shutting down".to_owned());
        pending.iter().cloned().chain(down).collect()
    }
}

impl Drop for ReadyGuard {
    fn drop(&mut self) {
        self.readiness.0.pending.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
    }
}

#[cfg(test)]
mod tests;
