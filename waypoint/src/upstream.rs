//! From the waypoint to an endpoint: HBONE with the waypoint's own identity, or plain TCP where the endpoint has no
//! tunnel; HTTP connections on top are kept and reused per endpoint and client. A tunnel says for whom it was made, so
//! what is in it must be of that client alone.
//!
//! One [`Upstreams`] belongs to one worker thread; nothing here is shared between threads.

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use mesh::drain::DrainWatcher;
use mesh::hbone::{
    Authority, Baggage, ConnectHeaders, HBONE_PORT, HboneStream, Pool, PoolKey, PoolSettings, TunnelError,
};
use mesh::identity::{CertificateManager, Identity, IdentityError};
use mesh::model::Workload;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::balance::Endpoint;
use crate::body::Body;

/// How long a TCP connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Idle HTTP connections are closed after this; below the 75 s that common servers allow, so that we close first.
const IDLE: Duration = Duration::from_secs(60);
/// Idle HTTP connections kept for one client to one endpoint.
const IDLE_PER_ENDPOINT: usize = 64;
/// Idle HTTP/1 connections kept in all: with many clients and endpoints there could be one for each pair of them.
const IDLE_IN_ALL: usize = 1024;

/// Why an endpoint could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("no certificate for the waypoint: {0}")]
    Identity(#[from] IdentityError),
    #[error("{0}")]
    Tunnel(#[from] TunnelError),
    #[error("connecting: {0}")]
    Tcp(#[from] io::Error),
    #[error("connecting took longer than {} s", CONNECT_TIMEOUT.as_secs())]
    Timeout,
    #[error("HTTP handshake: {0}")]
    Handshake(hyper::Error),
}

/// Why a request got no response.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// Nothing reached the application: safe to try elsewhere.
    #[error("{cause}")]
    Connect { cause: ConnectError, request: Box<Request<Body>> },
    #[error("the upstream closed the connection: {0}")]
    Http(#[from] hyper::Error),
}

/// The HTTP version to speak to an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HttpVersion {
    H1,
    H2,
}

/// The client that tunnels are made for, as endpoints are told of it.
#[derive(Debug, PartialEq, Eq)]
pub struct Origin {
    identity: Identity,
    ip: IpAddr,
    baggage: Option<Baggage>,
}

impl Origin {
    /// `workload`: where the control plane knows one of that address and identity.
    pub fn new(identity: Identity, ip: IpAddr, workload: Option<&Workload>) -> Self {
        Self { identity, ip, baggage: workload.map(Workload::baggage) }
    }

    /// For a tunnel that all its connections may share.
    pub fn headers(&self) -> ConnectHeaders {
        ConnectHeaders {
            forwarded_for: Some(SocketAddr::new(self.ip, 0)),
            original_peer: Some(self.identity.clone()),
            baggage: self.baggage.clone(),
            ..ConnectHeaders::default()
        }
    }
}

/// What a request is sent for, as its tunnel says it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Errand {
    pub client: Arc<Origin>,
    /// Host name of the service that the endpoint was chosen of.
    pub service: Option<Arc<str>>,
}

impl Errand {
    fn headers(&self) -> ConnectHeaders {
        ConnectHeaders { forwarded_host: self.service.clone(), ..self.client.headers() }
    }
}

impl Hash for Origin {
    /// The address tells nearly all apart.
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.ip.hash(state);
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    uid: Arc<str>,
    /// Who was proved to be there when the connection was made.
    identity: Option<Identity>,
    address: SocketAddr,
    /// In a tunnel, and what for; `None` in plain TCP, which tells nobody.
    tunnel: Option<Errand>,
    version: HttpVersion,
}

struct IdleH1 {
    sender: http1::SendRequest<Body>,
    since: Instant,
}

/// The HTTP/2 connection to an endpoint. Whoever finds it missing makes it under the lock; the others wait.
#[derive(Default)]
struct SharedH2 {
    sender: Option<http2::SendRequest<Body>>,
    /// Tells the connection that failed from one made since.
    generation: u64,
    /// When a request last began.
    used: Option<Instant>,
}

#[derive(Default)]
struct Connections {
    h1: HashMap<Key, Vec<IdleH1>>,
    /// How many `h1` holds.
    idle: usize,
    h2: HashMap<Key, Arc<tokio::sync::Mutex<SharedH2>>>,
    /// The end of the certificate they were made with.
    valid_until: Option<SystemTime>,
}

impl Connections {
    fn count_idle(&mut self) {
        self.idle = self.h1.values().map(Vec::len).sum();
    }
}

/// All connections of one worker to endpoints.
pub struct Upstreams {
    identity: Identity,
    certificates: CertificateManager,
    pool: Pool,
    local: IpAddr,
    connections: Arc<Mutex<Connections>>,
}

impl Upstreams {
    pub fn new(identity: Identity, certificates: CertificateManager, local: Option<IpAddr>) -> Self {
        Self {
            identity,
            certificates,
            pool: Pool::new(PoolSettings::default()),
            local: local.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
            connections: Arc::default(),
        }
    }

    /// Sends a request and waits for the response's headers. A kept connection that turns out to be closed before the
    /// request went out is replaced by the next, in the end by a fresh one.
    ///
    /// # Errors
    /// [`SendError::Connect`] gives the request back; it reached nobody.
    pub async fn send(
        &self,
        endpoint: &Endpoint,
        version: HttpVersion,
        errand: &Errand,
        request: Request<Body>,
    ) -> Result<(Response<Incoming>, Lease), SendError> {
        match version {
            HttpVersion::H1 => self.send_h1(endpoint, errand, request).await,
            HttpVersion::H2 => self.send_h2(endpoint, errand, request).await,
        }
    }

    async fn send_h1(
        &self,
        endpoint: &Endpoint,
        errand: &Errand,
        mut request: Request<Body>,
    ) -> Result<(Response<Incoming>, Lease), SendError> {
        let key = key(endpoint, HttpVersion::H1, errand);
        loop {
            let kept = self.take_h1(&key);
            let fresh = kept.is_none();
            let mut sender = match kept {
                Some(sender) => sender,
                None => match self.connect_h1(endpoint, errand).await {
                    Ok(sender) => sender,
                    Err(cause) => return Err(SendError::Connect { cause, request: Box::new(request) }),
                },
            };
            if let Err(error) = sender.ready().await {
                if fresh {
                    return Err(SendError::Connect {
                        cause: ConnectError::Handshake(error),
                        request: Box::new(request),
                    });
                }
                continue;
            }
            match sender.try_send_request(request).await {
                Ok(response) => {
                    let lease = Lease { key: Some((key, sender)), connections: self.connections.clone() };
                    return Ok((response, lease));
                }
                Err(mut error) => match error.take_message() {
                    // Never written: the kept connection had been closed meanwhile.
                    Some(unsent) if !fresh => request = unsent,
                    Some(unsent) => return Err(unsent_on_fresh(error.into_error(), unsent)),
                    None => return Err(error.into_error().into()),
                },
            }
        }
    }

    async fn send_h2(
        &self,
        endpoint: &Endpoint,
        errand: &Errand,
        mut request: Request<Body>,
    ) -> Result<(Response<Incoming>, Lease), SendError> {
        let shared = self.lock().h2.entry(key(endpoint, HttpVersion::H2, errand)).or_default().clone();
        loop {
            let taken = tokio::time::timeout(CONNECT_TIMEOUT, self.take_h2(&shared, endpoint, errand)).await;
            let H2 { mut sender, generation, fresh } = match taken.unwrap_or(Err(ConnectError::Timeout)) {
                Ok(taken) => taken,
                Err(cause) => return Err(SendError::Connect { cause, request: Box::new(request) }),
            };
            match sender.try_send_request(request).await {
                Ok(response) => return Ok((response, Lease { key: None, connections: self.connections.clone() })),
                Err(mut error) => match error.take_message() {
                    Some(unsent) if !fresh => {
                        let mut shared = shared.lock().await;
                        if shared.generation == generation {
                            shared.sender = None;
                        }
                        request = unsent;
                    }
                    Some(unsent) => return Err(unsent_on_fresh(error.into_error(), unsent)),
                    None => return Err(error.into_error().into()),
                },
            }
        }
    }

    async fn take_h2(
        &self,
        shared: &tokio::sync::Mutex<SharedH2>,
        endpoint: &Endpoint,
        errand: &Errand,
    ) -> Result<H2, ConnectError> {
        let mut shared = shared.lock().await;
        shared.used = Some(Instant::now());
        if let Some(sender) = shared.sender.as_ref().filter(|s| !s.is_closed()) {
            return Ok(H2 { sender: sender.clone(), generation: shared.generation, fresh: false });
        }
        let sender = self.connect_h2(endpoint, errand).await?;
        shared.sender = Some(sender.clone());
        shared.generation += 1;
        Ok(H2 { sender, generation: shared.generation, fresh: true })
    }

    /// A byte stream to an endpoint, for TCP.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub async fn connect_tcp(
        &self,
        endpoint: &Endpoint,
        headers: &ConnectHeaders,
    ) -> Result<TcpUpstream, ConnectError> {
        if endpoint.hbone() {
            return self.tunnel(endpoint, headers).await.map(TcpUpstream::Tunnel);
        }
        plain(endpoint.address).await.map(TcpUpstream::Plain)
    }

    async fn tunnel(&self, endpoint: &Endpoint, headers: &ConnectHeaders) -> Result<HboneStream, ConnectError> {
        let certificate = self.certificates.get(&self.identity).await?;
        let destination = SocketAddr::new(endpoint.address.ip(), HBONE_PORT);
        let expected = endpoint.identity.iter().cloned().collect();
        let key = PoolKey::new(self.identity.clone(), expected, destination, self.local);
        let authority = Authority::Ip(endpoint.address);
        let dial = move || async move {
            let stream = TcpStream::connect(destination).await?;
            mesh::net::tune(&stream)?;
            Ok(stream)
        };
        let tunnel = self.pool.connect(key, &certificate, dial, &authority, headers).await?;
        Ok(tunnel.stream)
    }

    async fn connect_h1(&self, endpoint: &Endpoint, errand: &Errand) -> Result<http1::SendRequest<Body>, ConnectError> {
        if endpoint.hbone() {
            return handshake_h1(self.tunnel(endpoint, &errand.headers()).await?).await;
        }
        handshake_h1(plain(endpoint.address).await?).await
    }

    async fn connect_h2(&self, endpoint: &Endpoint, errand: &Errand) -> Result<http2::SendRequest<Body>, ConnectError> {
        if endpoint.hbone() {
            return handshake_h2(self.tunnel(endpoint, &errand.headers()).await?).await;
        }
        handshake_h2(plain(endpoint.address).await?).await
    }

    fn take_h1(&self, key: &Key) -> Option<http1::SendRequest<Body>> {
        let mut connections = self.lock();
        let Connections { h1, idle, .. } = &mut *connections;
        let of_key = h1.get_mut(key)?;
        while let Some(kept) = of_key.pop() {
            *idle -= 1;
            if !kept.sender.is_closed() && kept.since.elapsed() < IDLE {
                return Some(kept.sender);
            }
        }
        h1.remove(key);
        None
    }

    /// Lets go of connections that have been idle too long or were made with a certificate that has been renewed since.
    /// Called now and then by the worker.
    pub fn sweep(&self) {
        let valid_until = self.certificates.get_cached(&self.identity).map(|c| c.not_after());
        let mut connections = self.lock();
        if connections.valid_until != valid_until {
            // Requests under way are finished: only the handles go.
            *connections = Connections { valid_until, ..Connections::default() };
        }
        connections.h1.retain(|_, idle| {
            idle.retain(|kept| !kept.sender.is_closed() && kept.since.elapsed() < IDLE);
            !idle.is_empty()
        });
        connections.h2.retain(|_, shared| {
            let is_kept = |shared: &SharedH2| {
                let used = shared.used.is_some_and(|used| used.elapsed() < IDLE);
                used && shared.sender.as_ref().is_some_and(|sender| !sender.is_closed())
            };
            // Locked: being made right now.
            shared.try_lock().map_or(true, |shared| is_kept(&shared))
        });
        connections.count_idle();
    }

    /// Lets go of all kept connections and waits until what was written has left, at the latest until the cut.
    pub async fn drain(&self, watcher: &DrainWatcher) {
        *self.lock() = Connections::default();
        self.pool.drain(watcher).await;
    }

    /// Connections to endpoints for which `keep` is false are given up once their requests are done.
    pub fn retain(&self, keep: impl Fn(&str) -> bool) {
        let mut connections = self.lock();
        connections.h1.retain(|key, _| keep(&key.uid));
        connections.h2.retain(|key, _| keep(&key.uid));
        connections.count_idle();
    }

    fn lock(&self) -> MutexGuard<'_, Connections> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A handle on a shared HTTP/2 connection.
struct H2 {
    sender: http2::SendRequest<Body>,
    generation: u64,
    /// Made just now.
    fresh: bool,
}

/// A stream to an endpoint of a TCP port.
pub enum TcpUpstream {
    Tunnel(HboneStream),
    Plain(TcpStream),
}

fn unsent_on_fresh(error: hyper::Error, request: Request<Body>) -> SendError {
    SendError::Connect { cause: ConnectError::Handshake(error), request: Box::new(request) }
}

/// A connection in use; gives an HTTP/1 connection back for reuse when the response has been read to its end.
pub struct Lease {
    key: Option<(Key, http1::SendRequest<Body>)>,
    connections: Arc<Mutex<Connections>>,
}

impl Lease {
    /// The exchange is complete: the connection may serve the next.
    pub fn give_back(mut self) {
        let Some((key, sender)) = self.key.take() else { return };
        if sender.is_closed() {
            return;
        }
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        let Connections { h1, idle, .. } = &mut *connections;
        if *idle >= IDLE_IN_ALL {
            return;
        }
        let of_key = h1.entry(key).or_default();
        if of_key.len() < IDLE_PER_ENDPOINT {
            of_key.push(IdleH1 { sender, since: Instant::now() });
            *idle += 1;
        }
    }
}

fn key(endpoint: &Endpoint, version: HttpVersion, errand: &Errand) -> Key {
    Key {
        uid: endpoint.workload.uid.clone(),
        identity: endpoint.identity.clone(),
        address: endpoint.address,
        tunnel: endpoint.hbone().then(|| errand.clone()),
        version,
    }
}

async fn plain(address: SocketAddr) -> Result<TcpStream, ConnectError> {
    let stream = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address))
        .await
        .map_err(|_| ConnectError::Timeout)??;
    mesh::net::tune(&stream)?;
    Ok(stream)
}

async fn handshake_h1<S>(stream: S) -> Result<http1::SendRequest<Body>, ConnectError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) =
        http1::Builder::new().handshake(TokioIo::new(stream)).await.map_err(ConnectError::Handshake)?;
    // Ends when the sender is dropped or the peer closes.
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "upstream HTTP/1 connection ended");
        }
    });
    Ok(sender)
}

async fn handshake_h2<S>(stream: S) -> Result<http2::SendRequest<Body>, ConnectError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sender, connection) = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(Some(Duration::from_secs(10)))
        .keep_alive_timeout(Duration::from_secs(20))
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(ConnectError::Handshake)?;
    // Ends when the last sender is dropped or the peer closes.
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "upstream HTTP/2 connection ended");
        }
    });
    Ok(sender)
}
