//! The server: any method, any path, HTTP/1.1 and HTTP/2 on each of its ports. The query may ask for more:
//!
//! | query | the server |
//! |---|---|
//! | `delay=MS` | takes its time |
//! | `key=KEY` | counts requests with this key |
//! | `fail=STATUS` | answers with that status |
//! | `times=N` | delays and fails only the first N requests with the key |
//! | `count=KEY` | counts nothing, and says how many had the key |
//! | `want=N` | with `count`: waits a moment for that many |

use std::collections::HashMap;
use std::future::{Ready, ready};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{CONNECTION, CONTENT_TYPE, HOST, UPGRADE};
use axum::http::{HeaderMap, HeaderName, StatusCode};
use axum::response::{IntoResponse as _, Response};
use axum::{Json, Router};
use clap::Args;
use hyper_util::rt::TokioIo;
use tokio::io::AsyncWriteExt as _;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::{Report, listed};
use crate::bench::serve::{accept, echo, listen};

/// Where HTTP is served.
const HTTP: u16 = 8080;
/// Where callers of gRPC look for it.
const GRPC: u16 = 7070;
/// Says everything back.
const TCP: u16 = 9090;
/// How long `want` waits: what is counted is under way or lost.
const MOMENT: Duration = Duration::from_millis(500);

/// Arguments of a server.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// One more port for HTTP
    #[arg(long)]
    also: Option<u16>,
}

/// Who it is, and what it has counted.
pub struct Server {
    hostname: String,
    namespace: String,
    counts: watch::Sender<HashMap<String, u32>>,
}

/// Serves until killed. The namespace comes from the environment (`NAMESPACE`).
///
/// # Errors
/// When a port is taken.
pub fn run(options: &Options) -> Result<()> {
    let hostname = nix::unistd::gethostname()?.to_string_lossy().into_owned();
    let server = Arc::new(Server::named(&hostname, &std::env::var("NAMESPACE").unwrap_or_default()));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut services = JoinSet::new();
        for port in [HTTP, GRPC].into_iter().chain(options.also) {
            let (listener, routes) = (listen(port)?, routes(server.clone()));
            services.spawn(async move { axum::serve(listener, routes).await.context("HTTP") });
        }
        services.spawn(accept(listen(TCP)?, echo));
        // A service only ends with an error.
        services.join_next().await.context("there are services")??
    })
}

/// All that a server answers.
pub fn routes(server: Arc<Server>) -> Router {
    Router::new().fallback(answer).with_state(server)
}

impl Server {
    pub fn named(hostname: &str, namespace: &str) -> Self {
        Self { hostname: hostname.into(), namespace: namespace.into(), counts: watch::Sender::default() }
    }

    fn report(&self, request: &Request, seen: u32) -> Report {
        let authority = request.uri().authority().map(ToString::to_string);
        let host = || header(request.headers(), HOST).unwrap_or_default().to_owned();
        Report {
            hostname: self.hostname.clone(),
            namespace: self.namespace.clone(),
            method: request.method().to_string(),
            path: request.uri().path_and_query().map(ToString::to_string).unwrap_or_default(),
            host: authority.unwrap_or_else(host),
            protocol: format!("{:?}", request.version()),
            headers: listed(request.headers()),
            seen,
        }
    }

    fn count(&self, key: &str) -> u32 {
        let mut seen = 0;
        self.counts.send_modify(|counts| {
            let count = counts.entry(key.to_owned()).or_default();
            *count += 1;
            seen = *count;
        });
        seen
    }

    /// How many had the key. If fewer come than are wanted, the number says so.
    async fn counted(&self, key: &str, want: u32) -> u32 {
        let mut counts = self.counts.subscribe();
        let enough = counts.wait_for(|counts| of_key(counts, key) >= want);
        let _ = tokio::time::timeout(MOMENT, enough).await;
        of_key(&self.counts.borrow(), key)
    }
}

fn of_key(counts: &HashMap<String, u32>, key: &str) -> u32 {
    counts.get(key).copied().unwrap_or_default()
}

/// What a query asks for.
#[derive(Debug, Default, PartialEq, Eq)]
struct Wish {
    delay: Option<Duration>,
    key: String,
    fail: Option<StatusCode>,
    times: Option<u32>,
    count: Option<String>,
    want: u32,
}

impl Wish {
    fn read(query: &str) -> Self {
        let mut wish = Self::default();
        for (name, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
            match name {
                "delay" => wish.delay = value.parse().ok().map(Duration::from_millis),
                "key" => wish.key = value.to_owned(),
                "fail" => wish.fail = value.parse().ok(),
                "times" => wish.times = value.parse().ok(),
                "count" => wish.count = Some(value.to_owned()),
                "want" => wish.want = value.parse().unwrap_or_default(),
                // Applications have parameters of their own.
                _ => {}
            }
        }
        wish
    }

    /// Whether delay and failure are for a request that is the so manyth.
    fn is_for(&self, seen: u32) -> bool {
        self.times.is_none_or(|times| seen <= times)
    }
}

async fn answer(State(server): State<Arc<Server>>, mut request: Request) -> Response {
    let wish = Wish::read(request.uri().query().unwrap_or_default());
    let seen = match &wish.count {
        Some(key) => server.counted(key, wish.want).await,
        None => server.count(&wish.key),
    };
    let report = server.report(&request, seen);
    if let Some(delay) = wish.delay.filter(|_| wish.is_for(seen)) {
        tokio::time::sleep(delay).await;
    }
    if let Some(status) = wish.fail.filter(|_| wish.is_for(seen)) {
        return (status, Json(report)).into_response();
    }
    if is(request.headers(), CONTENT_TYPE, "application/grpc") {
        return call(&report, request).await;
    }
    if is(request.headers(), UPGRADE, "websocket") {
        return switch(&report, &mut request);
    }
    Json(report).into_response()
}

fn header(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

fn is(headers: &HeaderMap, name: HeaderName, value: &str) -> bool {
    header(headers, name).is_some_and(|found| found.eq_ignore_ascii_case(value))
}

/// The report as text: JSON of plain strings and numbers cannot fail.
fn text(report: &Report) -> String {
    serde_json::to_string(report).expect("strings and numbers have a JSON form")
}

/// Answers a call of any method: nothing in, text out.
async fn call(report: &Report, request: Request) -> Response {
    let codec = tonic_prost::ProstCodec::<String, ()>::default();
    tonic::server::Grpc::new(codec).unary(Say(text(report)), request).await.map(Body::new)
}

struct Say(String);

impl tonic::server::UnaryService<()> for Say {
    type Response = String;
    type Future = Ready<Result<tonic::Response<String>, tonic::Status>>;

    fn call(&mut self, _: tonic::Request<()>) -> Self::Future {
        ready(Ok(tonic::Response::new(std::mem::take(&mut self.0))))
    }
}

/// After the handshake: the report in a line, then everything is said back.
fn switch(report: &Report, request: &mut Request) -> Response {
    let (report, upgrade) = (text(report), hyper::upgrade::on(request));
    // Ends with its client. Its errors are the client's to tell.
    tokio::spawn(async move {
        let mut stream = TokioIo::new(upgrade.await?);
        stream.write_all(format!("{report}\n").as_bytes()).await?;
        let (mut reader, mut writer) = tokio::io::split(stream);
        tokio::io::copy(&mut reader, &mut writer).await?;
        anyhow::Ok(())
    });
    (StatusCode::SWITCHING_PROTOCOLS, [(CONNECTION, "upgrade"), (UPGRADE, "websocket")]).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_may_hold_wishes_among_other_things() {
        let wish = Wish::read("colour=red&delay=20&key=a&fail=503&times=2&x");
        assert_eq!((wish.delay, wish.key.as_str()), (Some(Duration::from_millis(20)), "a"));
        assert_eq!((wish.fail, wish.times), (Some(StatusCode::SERVICE_UNAVAILABLE), Some(2)));
        assert!(wish.is_for(2) && !wish.is_for(3));
        assert_eq!(Wish::read("colour=red"), Wish::default());
    }
}
