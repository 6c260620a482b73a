//! Connections to reuse. One pool belongs to one worker thread; its connections carry many tunnels between the same two
//! identities and addresses.
//!
//! ```text
//!  connect ─► a pooled connection with room? ──yes──► CONNECT ──ok──► tunnel
//!                     │ no            ▲                  │ not processed (GOAWAY, REFUSED_STREAM, closed)
//!                     ▼               └── discard it ◄───┘
//!            one dials, others of the key wait
//! ```

use std::{
    collections::HashMap,
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use tokio::{net::TcpStream, task::JoinSet, time::timeout};

use super::{
    Authority, ConnectHeaders, H2Settings, Tunnel, TunnelError,
    client::{self, OpenError, Opener, StreamPermit},
};
use crate::{
    drain::DrainWatcher,
    identity::{Identity, WorkloadCertificate},
    net,
};

/// What connections are shared by: all of it must be equal.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct PoolKey {
    pub source: Identity,
    /// Sorted.
    pub expected: Vec<Identity>,
    pub destination: SocketAddr,
    /// Our end's address: peers apply policy to it.
    pub local: IpAddr,
}

impl PoolKey {
    pub fn new(source: Identity, mut expected: Vec<Identity>, destination: SocketAddr, local: IpAddr) -> Self {
        expected.sort();
        expected.dedup();
        Self { source, expected, destination, local }
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PoolSettings {
    pub h2: H2Settings,
    /// Tunnels on one connection; the peer may allow fewer.
    pub max_streams: u32,
    /// A connection without tunnels for this long is closed.
    pub unused_release: Duration,
    /// For TCP alone. Also how long to wait for somebody else's attempt.
    pub connect_timeout: Duration,
    /// For the answer to the CONNECT, in which the peer makes a connection of its own.
    pub response_timeout: Duration,
}

impl Default for PoolSettings {
    fn default() -> Self {
        Self {
            h2: H2Settings::default(),
            max_streams: 100,
            unused_release: Duration::from_secs(300),
            connect_timeout: Duration::from_secs(10),
            response_timeout: Duration::from_secs(20),
        }
    }
}

/// What a pool holds.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct PoolStats {
    pub connections: usize,
    pub streams: usize,
}

/// Pooled connections would otherwise be tried one after another for ever while a peer restarts. More than a pool has for
/// one peer: when that says goodbye, each is tried in vain once, and most without a word on the wire.
const MAX_TRIES: usize = 64;

/// Connections made for one tunnel. More than one only where the peer says that it has not acted: a proxy that hands over
/// to its successor may take a connection as its last and send the tunnel away.
const MAX_DIALS: usize = 3;

/// The client connections of one worker. Dropping the last clone cuts them.
#[derive(Clone)]
pub struct Pool(Arc<Inner>);

struct Inner {
    settings: PoolSettings,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    keys: HashMap<PoolKey, Connections>,
    /// Drivers of the connections, pooled or not.
    drivers: JoinSet<()>,
}

#[derive(Default)]
struct Connections {
    open: Vec<Opener>,
    /// Held by whoever dials.
    dialling: Arc<tokio::sync::Mutex<()>>,
}

impl Pool {
    pub fn new(settings: PoolSettings) -> Self {
        Self(Arc::new(Inner { settings, state: Mutex::default() }))
    }

    /// A tunnel to `authority` through the peer that `key` names, on a pooled connection that was made with no older a
    /// certificate than `cert`, or on one made by `dial`.
    pub async fn connect<D, F>(
        &self,
        key: PoolKey,
        cert: &Arc<WorkloadCertificate>,
        dial: D,
        authority: &Authority,
        headers: &ConnectHeaders,
    ) -> Result<Tunnel, TunnelError>
    where
        D: FnMut() -> F,
        F: Future<Output = io::Result<TcpStream>>,
    {
        let mut dials = Dials { dial, left: MAX_DIALS };
        for _ in 0..MAX_TRIES {
            let (opener, permit) = match self.0.reserve(&key, cert) {
                Some(reserved) => reserved,
                // Boxed, because most connections find one that is open.
                None => Box::pin(self.establish(&key, cert, &mut dials)).await?,
            };
            let request = client::request(authority, headers)?;
            match timeout(self.0.settings.response_timeout, opener.open(request, permit)).await {
                Ok(Ok(tunnel)) => return Ok(tunnel),
                Ok(Err(OpenError::Final(error))) => return Err(error),
                Err(_) => return Err(TunnelError::ResponseTimeout),
                Ok(Err(OpenError::Unprocessed(error))) => {
                    self.0.discard(&key, &opener);
                    // One made for us has failed as well: unless the peer asks for it, trying again would only repeat that.
                    if dials.left < MAX_DIALS && (dials.left == 0 || !client::sent_away(&error)) {
                        return Err(TunnelError::from_h2(error, TunnelError::Stream));
                    }
                }
            }
        }
        Err(TunnelError::Unstable)
    }

    /// A new connection, unless somebody makes one while we wait for our turn.
    async fn establish<D, F>(
        &self,
        key: &PoolKey,
        cert: &WorkloadCertificate,
        dials: &mut Dials<D>,
    ) -> Result<(Opener, StreamPermit), TunnelError>
    where
        D: FnMut() -> F,
        F: Future<Output = io::Result<TcpStream>>,
    {
        let settings = &self.0.settings;
        let attempt = Attempt {
            turn: Some(self.0.state().keys.entry(key.clone()).or_default().dialling.clone()),
            pool: &self.0,
            key,
        };
        let turn = attempt.turn.as_ref().expect("taken only when the attempt is over").lock();
        let _turn = timeout(settings.connect_timeout, turn).await.map_err(|_| TunnelError::ConnectTimeout)?;
        if let Some(reserved) = self.0.reserve(key, cert) {
            return Ok(reserved);
        }
        dials.left = dials.left.checked_sub(1).ok_or(TunnelError::Unstable)?;
        let stream = timeout(settings.connect_timeout, (dials.dial)())
            .await
            .map_err(|_| TunnelError::ConnectTimeout)?
            .map_err(from_dial)?;
        net::tune(&stream).map_err(TunnelError::Connect)?;
        let (opener, connection) =
            client::handshake(stream, cert, &key.expected, key.destination, &settings.h2).await?;
        let permit = opener.reserve(settings.max_streams).ok_or(TunnelError::Unstable)?;
        let driver = client::drive(connection, settings.h2.clone());
        self.0.adopt(key, &opener, driver, Arc::downgrade(&self.0));
        Ok((opener, permit))
    }

    /// Lets go of the connections whose key `keep` refuses; their tunnels go on.
    pub fn retain(&self, mut keep: impl FnMut(&PoolKey) -> bool) {
        self.0.state().keys.retain(|key, _| keep(key));
    }

    /// Waits until every connection has ended: those without tunnels now, the others with their last tunnel or, at the
    /// latest, with the cut.
    pub async fn drain(&self, watcher: &DrainWatcher) {
        let mut drivers = {
            let mut state = self.0.state();
            state.keys.clear();
            std::mem::take(&mut state.drivers)
        };
        // What is left when the cut comes is aborted by dropping the set.
        tokio::select! {
            () = async { while drivers.join_next().await.is_some() {} } => {}
            () = watcher.cut() => {}
        }
    }

    #[cfg(test)]
    pub(super) fn keys(&self) -> usize {
        self.0.state().keys.len()
    }

    pub fn stats(&self) -> PoolStats {
        let state = self.0.state();
        let open = || state.keys.values().flat_map(|connections| &connections.open);
        PoolStats { connections: open().count(), streams: open().map(|opener| opener.usage.streams() as usize).sum() }
    }
}

/// How to dial, and how often still.
struct Dials<D> {
    dial: D,
    left: usize,
}

/// Somebody's wish for a new connection. However it ends, also by being given up half-way, a key that it leaves without
/// connections is forgotten.
struct Attempt<'a> {
    pool: &'a Inner,
    key: &'a PoolKey,
    turn: Option<Arc<tokio::sync::Mutex<()>>>,
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        self.turn = None;
        self.pool.tidy(self.key);
    }
}

fn from_dial(error: io::Error) -> TunnelError {
    match error.kind() {
        io::ErrorKind::TimedOut => TunnelError::ConnectTimeout,
        _ => TunnelError::Connect(error),
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place on a connection made with `cert` or its equal. Once a certificate is renewed, what was made with the old
    /// one gets no more tunnels: it would otherwise be in use long after that has expired.
    fn reserve(&self, key: &PoolKey, cert: &WorkloadCertificate) -> Option<(Opener, StreamPermit)> {
        let mut state = self.state();
        let connections = state.keys.get_mut(key)?;
        connections.open.retain(|opener| opener.valid_until >= cert.not_after() && !opener.peer.is_revoked());
        connections.open.iter().find_map(|opener| Some((opener.clone(), opener.reserve(self.settings.max_streams)?)))
    }

    fn adopt(
        &self,
        key: &PoolKey,
        opener: &Opener,
        driver: impl Future<Output = ()> + Send + 'static,
        pool: Weak<Self>,
    ) {
        let mut state = self.state();
        while state.drivers.try_join_next().is_some() {}
        state.keys.entry(key.clone()).or_default().open.push(opener.clone());
        let usage = opener.usage.clone();
        let (key, unused_release) = (key.clone(), self.settings.unused_release);
        state.drivers.spawn(async move {
            let usage_ptr = usage.clone();
            let forget = || {
                if let Some(pool) = pool.upgrade() {
                    pool.remove(&key, |opener| Arc::ptr_eq(&opener.usage, &usage_ptr));
                }
            };
            let mut driver = std::pin::pin!(driver);
            let unused = async {
                loop {
                    let released = usage.released.notified();
                    // Released again in the meantime: the time starts anew.
                    if timeout(unused_release, released).await.is_err() && usage.streams() == 0 {
                        return;
                    }
                }
            };
            tokio::select! {
                biased;
                () = &mut driver => {}
                // Once the pool has let go, the connection ends by itself as soon as nobody uses it.
                () = unused => {
                    forget();
                    driver.await;
                }
            }
            forget();
        });
    }

    fn discard(&self, key: &PoolKey, opener: &Opener) {
        self.remove(key, |other| Arc::ptr_eq(&other.usage, &opener.usage));
    }

    fn remove(&self, key: &PoolKey, which: impl Fn(&Opener) -> bool) {
        if let Some(connections) = self.state().keys.get_mut(key) {
            connections.open.retain(|opener| !which(opener));
        }
        self.tidy(key);
    }

    /// Forgets a key that has no connection and that nobody dials.
    fn tidy(&self, key: &PoolKey) {
        let mut state = self.state();
        if let Some(connections) = state.keys.get(key)
            && connections.open.is_empty()
            && Arc::strong_count(&connections.dialling) == 1
        {
            state.keys.remove(key);
        }
    }
}
