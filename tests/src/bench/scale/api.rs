//! The API server of a cluster that is not there. It knows what a control plane asks of one: lists in pages, watches, one Secret,
//! reviews of tokens. It takes no writes but of what a control plane keeps for itself; what it is asked beside that is remembered, as it means that this is out of date.
//!
//! The API server that `istiod-lite standalone` brings could hold as many objects, each of them written to its disk first: minutes
//! before each run, and beside what is measured a second program under load. And when an event went out, only it would know.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::convert::Infallible;
use std::net::{Ipv4Addr, TcpListener};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Result;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::serve::ListenerExt as _;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use bytes::Bytes;
use futures_util::StreamExt as _;
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;

use super::cluster::{self, Cluster, Replaced, SYSTEM, Size, ZTUNNEL};
use super::ledger::{Ledger, News};
use crate::raw::Node;

/// Events that a watch may be behind; one that is further behind ends, as with any API server.
const BACKLOG: usize = 16 * 1024;
/// Events of a kind that a watch can be taken up again before.
const REMEMBERED: usize = 4096;
/// Of a watch that names no time.
const WATCH_SECONDS: u64 = 290;
/// A TokenReview is small.
const MAX_BODY: usize = 64 * 1024;
/// What a first list is a list of.
const FIRST_VERSION: u64 = 1000;
/// 2100: no run takes longer.
const TOKEN_END: u64 = 4_102_444_800;

/// Kinds that there are objects of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Namespaces,
    Nodes,
    Pods,
    Services,
    Slices,
    RootCerts,
    /// One, of nobody's: the control plane would make its own and wait for it.
    Classes,
    /// Installed, and nobody has made any.
    None,
}

/// By the last word of the path: what the control plane watches.
const KINDS: &[(&str, &str, Kind)] = &[
    ("namespaces", "Namespace", Kind::Namespaces),
    ("nodes", "Node", Kind::Nodes),
    ("pods", "Pod", Kind::Pods),
    ("services", "Service", Kind::Services),
    ("endpointslices", "EndpointSlice", Kind::Slices),
    ("configmaps", "ConfigMap", Kind::RootCerts),
    ("deployments", "Deployment", Kind::None),
    ("serviceaccounts", "ServiceAccount", Kind::None),
    ("horizontalpodautoscalers", "HorizontalPodAutoscaler", Kind::None),
    ("poddisruptionbudgets", "PodDisruptionBudget", Kind::None),
    ("validatingwebhookconfigurations", "ValidatingWebhookConfiguration", Kind::None),
    ("gatewayclasses", "GatewayClass", Kind::Classes),
    ("gateways", "Gateway", Kind::None),
    ("httproutes", "HTTPRoute", Kind::None),
    ("authorizationpolicies", "AuthorizationPolicy", Kind::None),
    ("peerauthentications", "PeerAuthentication", Kind::None),
    ("serviceentries", "ServiceEntry", Kind::None),
    ("workloadentries", "WorkloadEntry", Kind::None),
];

const ROOT_CERTS: &str = "istio-ca-root-cert";
/// What a control plane writes for itself: which roots it has handed out, and who leads.
const KEPT: [&str; 2] = ["secrets", "leases"];

/// The mesh's authority, as PEM.
#[derive(Clone, Debug)]
pub struct Authority {
    pub certificate: String,
    pub key: String,
}

/// A server that lives as long as this does.
pub struct Api {
    /// On the node's loopback.
    pub port: u16,
    shared: Arc<Shared>,
    runtime: Runtime,
}

/// Pods are replaced while it lives.
pub struct Churn(JoinHandle<()>);

struct Shared {
    size: Size,
    authority: Authority,
    /// Token → node of the proxy that it is bound to.
    tokens: HashMap<String, u32>,
    served: Mutex<Served>,
    ledger: Arc<Ledger>,
    /// In which the control plane writes down its roots.
    kept: Mutex<BTreeMap<String, Value>>,
    /// What was asked and is not served here, and how often.
    unexpected: Mutex<BTreeMap<String, u64>>,
}

/// What changes.
struct Served {
    cluster: Cluster,
    version: u64,
    feeds: HashMap<Kind, Feed>,
}

/// The events of one kind.
#[derive(Default)]
struct Feed {
    recent: VecDeque<(u64, Bytes)>,
    /// The last event that is not remembered any more.
    forgotten: u64,
    watches: Vec<mpsc::Sender<Bytes>>,
}

impl Api {
    /// Serves the cluster to whoever calls the loopback of a node.
    ///
    /// # Errors
    /// When there is no port or thread to be had.
    pub fn serve(node: &Node, cluster: Cluster, authority: Authority, ledger: Arc<Ledger>) -> Result<Self> {
        let listener = node.net.netns.enter(|| Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?))?;
        listener.set_nonblocking(true)?;
        let port = listener.local_addr()?.port();
        // A thread of its own: events go out on time, however busy the proxies are.
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let size = cluster.size();
        let served = Served { cluster, version: FIRST_VERSION, feeds: HashMap::new() };
        let shared = Arc::new(Shared {
            size,
            authority,
            tokens: (0..size.nodes).map(|node| (token(node), node)).collect(),
            served: Mutex::new(served),
            ledger,
            kept: Mutex::default(),
            unexpected: Mutex::default(),
        });
        let listener = {
            let _inside = runtime.enter();
            tokio::net::TcpListener::from_std(listener)?
        };
        let listener = listener.tap_io(|stream| {
            // Without it an event would wait for the acknowledgement of the one before.
            let _ = stream.set_nodelay(true);
        });
        let routes = axum::Router::new().fallback(answer).with_state(Arc::clone(&shared));
        // Ends with the runtime.
        runtime.spawn(async move { axum::serve(listener, routes).await });
        Ok(Self { port, shared, runtime })
    }

    /// Replaces so many pods each second, evenly.
    pub fn churn(&self, per_second: u32) -> Churn {
        let shared = Arc::clone(&self.shared);
        // Ends with what is returned.
        Churn(self.runtime.spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_secs(1) / per_second.max(1));
            loop {
                ticks.tick().await;
                if !shared.replace() {
                    return;
                }
            }
        }))
    }

    /// Names of all that proxies must know now.
    pub fn resources(&self) -> BTreeSet<String> {
        lock(&self.shared.served).cluster.resources().collect()
    }

    /// What was asked for that is not served here.
    pub fn unexpected(&self) -> Vec<String> {
        lock(&self.shared.unexpected).iter().map(|(what, times)| format!("{what} ({times} times)")).collect()
    }
}

impl Drop for Churn {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What a kubelet would have put beside the proxy of a node: as long as a true one, which nobody but the API server reads.
pub fn token(node: u32) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let head = json!({"alg": "RS256", "kid": "bench"});
    let claims = json!({
        "aud": ["istio-ca"],
        "exp": TOKEN_END,
        "iss": "https://kubernetes.default.svc.cluster.local",
        "kubernetes.io": {
            "namespace": SYSTEM,
            "pod": {"name": cluster::proxy_name(node), "uid": cluster::proxy_uid(node)},
            "serviceaccount": {"name": ZTUNNEL},
        },
        "sub": format!("system:serviceaccount:{SYSTEM}:{ZTUNNEL}"),
    });
    format!("{}.{}.{}", part(&head), part(&claims), "A".repeat(342))
}

async fn answer(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let path = head.uri.path();
    let query = Query::read(head.uri.query().unwrap_or_default());
    let last = path.rsplit('/').next().unwrap_or_default();
    // Of ConfigMaps there are the root certificates alone.
    let others = last == "configmaps" && !head.uri.query().unwrap_or_default().contains(ROOT_CERTS);
    let collection = KINDS.iter().find(|(plural, ..)| *plural == last);
    let collection = collection.map(|(_, name, kind)| (*name, if others { Kind::None } else { *kind }));
    match (&head.method, collection) {
        (&Method::GET, Some((_, kind))) if query.watch => shared.watch(kind, &query),
        (&Method::GET, Some((name, kind))) => shared.list(group_version(path), name, kind, &query),
        (&Method::GET, None) if path.ends_with("/secrets/cacerts") => shared.secret(),
        (&Method::GET, None) if is_kept(path) => match lock(&shared.kept).get(path) {
            Some(object) => reply(object),
            None => failure(StatusCode::NOT_FOUND, "not written yet"),
        },
        (&Method::POST, None) if KEPT.contains(&last) => shared.keep(body, |name| format!("{path}/{name}")).await,
        (&Method::PUT, None) if is_kept(path) => shared.keep(body, |_| path.to_owned()).await,
        (&Method::POST, None) if last == "tokenreviews" => match axum::body::to_bytes(body, MAX_BODY).await {
            Ok(body) => shared.review(&body),
            Err(error) => failure(StatusCode::BAD_REQUEST, &error.to_string()),
        },
        (method, _) => {
            *lock(&shared.unexpected).entry(format!("{method} {path}")).or_default() += 1;
            failure(StatusCode::NOT_FOUND, "this is no API server: it only plays one to a control plane")
        }
    }
}

/// Whether this is one object of those that a control plane writes for itself.
fn is_kept(path: &str) -> bool {
    path.rsplit('/').nth(1).is_some_and(|plural| KEPT.contains(&plural))
}

/// `/apis/GROUP/VERSION/…` or `/api/VERSION/…`.
fn group_version(path: &str) -> &str {
    let below = path.strip_prefix("/apis/").or_else(|| path.strip_prefix("/api/")).unwrap_or_default();
    below.rsplit_once('/').map_or("", |(api, _)| api)
}

/// What is read of a request's query.
#[derive(Debug, PartialEq, Eq)]
struct Query {
    watch: bool,
    by_label: bool,
    since: u64,
    seconds: u64,
    limit: u32,
    /// Version and first index of the page that is asked for.
    page: Option<(u64, u32)>,
}

impl Query {
    fn read(text: &str) -> Self {
        let mut query =
            Self { watch: false, by_label: false, since: 0, seconds: WATCH_SECONDS, limit: u32::MAX, page: None };
        for (name, value) in text.split('&').filter_map(|part| part.split_once('=')) {
            match name {
                "labelSelector" => query.by_label = true,
                "watch" => query.watch = matches!(value, "true" | "1"),
                "resourceVersion" => query.since = value.parse().unwrap_or_default(),
                "timeoutSeconds" => query.seconds = value.parse().unwrap_or(WATCH_SECONDS),
                "limit" => query.limit = value.parse().unwrap_or(u32::MAX).max(1),
                "continue" => {
                    query.page = value
                        .split_once('.')
                        .and_then(|(version, from)| Some((version.parse().ok()?, from.parse().ok()?)));
                }
                _ => {}
            }
        }
        query
    }
}

impl Shared {
    /// Takes an object that is at the path for its name.
    async fn keep(&self, body: Body, path: impl FnOnce(&str) -> String) -> Response {
        let body = axum::body::to_bytes(body, MAX_BODY).await;
        let Ok(Ok(mut object)) = body.map(|body| serde_json::from_slice::<Value>(&body)) else {
            return failure(StatusCode::BAD_REQUEST, "no object");
        };
        let path = path(object["metadata"]["name"].as_str().unwrap_or_default());
        let mut kept = lock(&self.kept);
        let before = kept.get(&path).and_then(|old| old["metadata"]["resourceVersion"].as_str()?.parse().ok());
        object["metadata"]["resourceVersion"] = (before.unwrap_or(0_u64) + 1).to_string().into();
        let answer = reply(&object);
        kept.insert(path, object);
        answer
    }

    /// One page. While pages are fetched pods are replaced; the events since the first page, which a watch begins with, put
    /// that right.
    fn list(&self, api: &str, name: &str, kind: Kind, query: &Query) -> Response {
        let (version, from) = query.page.unwrap_or_else(|| (lock(&self.served).version, 0));
        let count = self.count(kind);
        let to = from.saturating_add(query.limit).min(count);
        let items = self.items(kind, from.min(to)..to, version);
        let mut meta = json!({"resourceVersion": version.to_string()});
        if to < count {
            meta["continue"] = format!("{version}.{to}").into();
            meta["remainingItemCount"] = (count - to).into();
        }
        // Items of a list do not say what they are: the list does.
        reply(&json!({"kind": format!("{name}List"), "apiVersion": api, "metadata": meta, "items": items}))
    }

    fn count(&self, kind: Kind) -> u32 {
        let Size { pods, services, nodes } = self.size;
        match kind {
            Kind::Namespaces | Kind::RootCerts => self.size.namespaces() + 1,
            Kind::Nodes => nodes,
            Kind::Pods => nodes + pods,
            Kind::Services | Kind::Slices => services,
            Kind::Classes => 1,
            Kind::None => 0,
        }
    }

    fn items(&self, kind: Kind, numbers: std::ops::Range<u32>, version: u64) -> Vec<Value> {
        let size = self.size;
        match kind {
            Kind::Namespaces => numbers
                .map(|number| match number < size.namespaces() {
                    true => cluster::namespace(number, version),
                    false => cluster::system_namespace(version),
                })
                .collect(),
            Kind::RootCerts => {
                numbers.map(|number| cluster::root_cert(size, number, &self.authority.certificate, version)).collect()
            }
            Kind::Nodes => numbers.map(|number| cluster::node(number, version)).collect(),
            Kind::Pods => {
                let pods: Vec<_> = {
                    let served = lock(&self.served);
                    let pod = |number: u32| number.checked_sub(size.nodes).and_then(|place| served.cluster.pod(place));
                    numbers.map(|number| (number, pod(number))).collect()
                };
                let object = |(number, pod): (u32, Option<cluster::Pod>)| match pod {
                    Some(pod) => size.pod(pod, version),
                    None => size.proxy(number, version),
                };
                pods.into_iter().map(object).collect()
            }
            Kind::Services => numbers.map(|number| size.service(number, version)).collect(),
            Kind::Slices => {
                let served = lock(&self.served);
                numbers.map(|number| served.cluster.slice(number, version)).collect()
            }
            Kind::Classes => numbers
                .map(|_| {
                    let meta =
                        json!({"name": "istio-waypoint", "uid": "class", "resourceVersion": version.to_string()});
                    json!({"metadata": meta, "spec": {"controllerName": "mesh.bench/none"}})
                })
                .collect(),
            Kind::None => Vec::new(),
        }
    }

    fn watch(&self, kind: Kind, query: &Query) -> Response {
        let (events, watch) = mpsc::channel(BACKLOG);
        lock(&self.served).feeds.entry(kind).or_default().follow(query.since, events);
        let end = tokio::time::sleep(Duration::from_secs(query.seconds));
        let events = ReceiverStream::new(watch).map(Ok::<_, Infallible>).take_until(end);
        ([(header::CONTENT_TYPE, "application/json")], Body::from_stream(events)).into_response()
    }

    /// Replaces a pod and tells the control plane; false when there are no more pods to be had.
    fn replace(&self) -> bool {
        let mut served = lock(&self.served);
        let Some(Replaced { gone, came, service }) = served.cluster.replace() else { return false };
        let first = served.version + 1;
        served.version += 3;
        // Made before any clock is read.
        let deleted = event("DELETED", self.size.pod(gone, first));
        let added = event("ADDED", self.size.pod(came, first + 1));
        let slice = event("MODIFIED", served.cluster.slice(service, first + 2));
        let pods = served.feeds.entry(Kind::Pods).or_default();
        self.ledger.write(gone.serial, News::Gone);
        pods.tell(first, deleted);
        self.ledger.write(came.serial, News::Came);
        pods.tell(first + 1, added);
        served.feeds.entry(Kind::Slices).or_default().tell(first + 2, slice);
        true
    }

    fn secret(&self) -> Response {
        let Authority { certificate, key } = &self.authority;
        reply(&json!({
            "kind": "Secret", "apiVersion": "v1", "metadata": {"name": "cacerts", "namespace": SYSTEM},
            "data": {"ca-cert.pem": STANDARD.encode(certificate), "ca-key.pem": STANDARD.encode(key)},
        }))
    }

    /// Says whose a token is.
    fn review(&self, body: &[u8]) -> Response {
        let Ok(mut review) = serde_json::from_slice::<Value>(body) else {
            return failure(StatusCode::BAD_REQUEST, "not JSON");
        };
        let token = review["spec"]["token"].as_str().unwrap_or_default();
        review["status"] = match self.tokens.get(token) {
            None => json!({"authenticated": false, "error": "not one of ours"}),
            Some(node) => json!({
                "authenticated": true,
                "audiences": ["istio-ca"],
                "user": {
                    "username": format!("system:serviceaccount:{SYSTEM}:{ZTUNNEL}"),
                    "extra": {
                        "authentication.kubernetes.io/pod-name": [cluster::proxy_name(*node)],
                        "authentication.kubernetes.io/pod-uid": [cluster::proxy_uid(*node)],
                    },
                },
            }),
        };
        reply(&review)
    }
}

impl Feed {
    /// A watch that has heard of everything up to `since`.
    fn follow(&mut self, since: u64, events: mpsc::Sender<Bytes>) {
        self.watches.retain(|watch| !watch.is_closed());
        if since < self.forgotten {
            let gone =
                json!({"kind": "Status", "code": 410, "reason": "Expired", "status": "Failure", "message": "too old"});
            let _ = events.try_send(event("ERROR", gone));
            return;
        }
        let missed = self.recent.iter().filter(|(version, _)| *version > since);
        // There is room for all that is remembered.
        missed.for_each(|(_, event)| _ = events.try_send(event.clone()));
        self.watches.push(events);
    }

    fn tell(&mut self, version: u64, event: Bytes) {
        self.watches.retain(|watch| watch.try_send(event.clone()).is_ok());
        self.recent.push_back((version, event));
        if self.recent.len() > REMEMBERED
            && let Some((version, _)) = self.recent.pop_front()
        {
            self.forgotten = version;
        }
    }
}

fn event(kind: &str, object: Value) -> Bytes {
    let mut text = json!({"type": kind, "object": object}).to_string();
    text.push('\n');
    text.into()
}

fn reply(value: &Value) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}

fn failure(code: StatusCode, message: &str) -> Response {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code.as_u16(),
        "reason": code.canonical_reason().unwrap_or_default().replace(' ', ""), "message": message,
    });
    (code, reply(&status)).into_response()
}

/// What is guarded is whole at any time.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_a_client_of_the_api_asks() {
        let list = Query::read("&limit=500&continue=1000.1500");
        assert_eq!((list.watch, list.limit, list.page), (false, 500, Some((1000, 1500))));
        let watch = Query::read("&watch=true&timeoutSeconds=30&allowWatchBookmarks=true&resourceVersion=1234");
        assert_eq!((watch.watch, watch.seconds, watch.since), (true, 30, 1234));
        assert_eq!(group_version("/api/v1/pods"), "v1");
        assert_eq!(group_version("/apis/discovery.k8s.io/v1/endpointslices"), "discovery.k8s.io/v1");
    }

    #[test]
    fn a_watch_goes_on_where_the_last_one_ended() {
        let mut feed = Feed::default();
        let tell = |feed: &mut Feed, version: u64| feed.tell(version, Bytes::from(version.to_string()));
        (1..=3).for_each(|version| tell(&mut feed, version));
        let (events, mut watch) = mpsc::channel(BACKLOG);
        feed.follow(1, events);
        tell(&mut feed, 4);
        let heard: Vec<Bytes> = std::iter::from_fn(|| watch.try_recv().ok()).collect();
        assert_eq!(heard, ["2", "3", "4"]);
        drop(watch);
        tell(&mut feed, 5);
        assert!(feed.watches.is_empty(), "whoever has gone is not told");
    }

    #[test]
    fn a_watch_from_too_long_ago_must_list_again() {
        let mut feed = Feed::default();
        (1..=REMEMBERED as u64 + 1).for_each(|version| feed.tell(version, Bytes::new()));
        let (events, mut watch) = mpsc::channel(BACKLOG);
        feed.follow(0, events);
        let heard = watch.try_recv().unwrap();
        assert!(String::from_utf8_lossy(&heard).contains("410"));
        assert_eq!(watch.try_recv(), Err(mpsc::error::TryRecvError::Disconnected));
    }

    #[test]
    fn tokens_look_like_tokens_and_no_two_are_alike() {
        assert_ne!(token(1), token(2));
        assert!((700..1500).contains(&token(7).len()), "{}", token(7).len());
        let claims = token(7).split('.').nth(1).map(|part| URL_SAFE_NO_PAD.decode(part).unwrap()).unwrap();
        let claims: Value = serde_json::from_slice(&claims).unwrap();
        assert_eq!(claims["kubernetes.io"]["pod"]["name"], "ztunnel-00007");
    }
}
