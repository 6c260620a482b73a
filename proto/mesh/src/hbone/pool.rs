//! Connections to reuse. One pool belongs to one worker thread; its connections carry many tunnels between the same two
//! identities and addresses.
//!
//! ```text
//!  connect ─► a pooled connection with room? ──yes──► CONNECT ──ok──► tunnel
//!                     │ no            ▲                  │ not processed (GOAWAY, REFUSED_STREAM, closed)
//!                     ▼               └── discard it ◄───┘
//!            one dials, others of the key wait, and fail with it if it fails
//! ```

use std::{
    collections::HashMap,
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, SystemTime},
};

use tokio::{net::TcpStream, sync::watch, task::JoinSet, time::timeout};

use super::{
    Authority, ConnectHeaders, H2Settings, Meanwhile, Tunnel, TunnelError,
    client::{self, OpenError, Opener, StreamPermit},
};
use crate::{
    drain::DrainWatcher,
    identity::{Identity, WorkloadCertificate},
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
    /// For TCP alone.
    pub connect_timeout: Duration,
    /// For the answer to the CONNECT, in which the peer makes a connection of its own.
    pub response_timeout: Duration,
    /// A CONNECT that is unanswered for so long makes us ask, by a PING, whether the peer is there at all.
    pub answer_patience: Duration,
    /// Without a byte from the peer for so long after that, it is given up. Longer than a loaded machine needs to get
    /// round to a PONG.
    pub pong_patience: Duration,
}

impl Default for PoolSettings {
    fn default() -> Self {
        Self {
            h2: H2Settings::default(),
            max_streams: 100,
            unused_release: Duration::from_secs(300),
            connect_timeout: Duration::from_secs(10),
            response_timeout: Duration::from_secs(20),
            answer_patience: Duration::from_secs(2),
            pong_patience: Duration::from_secs(5),
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
    /// Somebody dials, and others may wait for that.
    attempt: Option<Attempt>,
}

/// Somebody's attempt to make a connection.
#[derive(Clone)]
struct Attempt {
    /// Closed without an outcome when it is given up half-way.
    outcome: watch::Receiver<Option<Result<(), Arc<TunnelError>>>>,
    /// When the certificate ends that it is made with.
    valid_until: SystemTime,
}

/// What somebody does who needs a connection that is not there.
enum Turn {
    Reserved(Opener, StreamPermit),
    Dial(Dialling),
    Wait(Attempt),
}

/// The right to dial. However it ends, also by being given up half-way, others may dial then, and a key that it leaves
/// without connections is forgotten.
struct Dialling {
    pool: Arc<Inner>,
    key: PoolKey,
    outcome: watch::Sender<Option<Result<(), Arc<TunnelError>>>>,
}

impl Dialling {
    /// Ends the attempt and tells those who waited for it; who comes later dials anew.
    fn end(self, outcome: Result<(), Arc<TunnelError>>) {
        self.withdraw();
        self.outcome.send_replace(Some(outcome));
    }

    fn is_awaited(&self) -> bool {
        // One receiver is the key's own.
        self.outcome.receiver_count() > 1
    }

    fn withdraw(&self) {
        if let Some(connections) = self.pool.state().keys.get_mut(&self.key) {
            // The pool may have let go of the key in the meantime, and somebody else dial for it.
            let own = self.outcome.subscribe();
            connections.attempt.take_if(|attempt| attempt.outcome.same_channel(&own));
        }
        self.pool.tidy(&self.key);
    }
}

impl Drop for Dialling {
    fn drop(&mut self) {
        self.withdraw();
    }
}

impl Pool {
    pub fn new(settings: PoolSettings) -> Self {
        Self(Arc::new(Inner { settings, state: Mutex::default() }))
    }

    /// A tunnel to `authority` through the peer that `key` names, on a pooled connection that was made with no older a
    /// certificate than `cert`, or on one made by `dial`, which has to [`tune`](crate::net::tune) it.
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
        self.connect_while(key, cert, dial, authority, headers, &mut Meanwhile::Wait).await
    }

    /// As [`Self::connect`]; `meanwhile` until the answer is there.
    pub async fn connect_while<D, F>(
        &self,
        key: PoolKey,
        cert: &Arc<WorkloadCertificate>,
        dial: D,
        authority: &Authority,
        headers: &ConnectHeaders,
        meanwhile: &mut Meanwhile<'_>,
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
            match opener.open(request, permit, meanwhile, &self.0.settings).await {
                Ok(tunnel) => return Ok(tunnel),
                Err(OpenError::Final(error)) => return Err(error),
                Err(OpenError::Silent) => {
                    self.0.discard(&key, &opener);
                    return Err(TunnelError::PeerGone);
                }
                Err(OpenError::Unprocessed(error)) => {
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

    /// A new connection: somebody else's if one is being made, else our own. Whoever waits for an attempt shares its
    /// failure, which is news for all of them; each would otherwise find it out after the other.
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
        loop {
            match self.turn(key, cert) {
                Turn::Reserved(opener, permit) => return Ok((opener, permit)),
                Turn::Wait(mut attempt) => {
                    let outcome = attempt.outcome.wait_for(Option::is_some).await;
                    let failure = outcome.ok().and_then(|outcome| outcome.clone()?.err());
                    // With a certificate that ended earlier it may have failed because of that.
                    if let Some(error) = failure.filter(|_| attempt.valid_until >= cert.not_after()) {
                        return Err(TunnelError::Shared(error));
                    }
                }
                Turn::Dial(dialling) => {
                    dials.left = dials.left.checked_sub(1).ok_or(TunnelError::Unstable)?;
                    let made = self.dial(key, cert, dials).await;
                    return match made {
                        Ok(made) => {
                            dialling.end(Ok(()));
                            Ok(made)
                        }
                        Err(error) if dialling.is_awaited() => {
                            let error = Arc::new(error);
                            dialling.end(Err(error.clone()));
                            Err(TunnelError::Shared(error))
                        }
                        Err(error) => Err(error),
                    };
                }
            }
        }
    }

    /// Decides, in one step, who dials and who waits.
    fn turn(&self, key: &PoolKey, cert: &WorkloadCertificate) -> Turn {
        let mut state = self.0.state();
        if let Some((opener, permit)) = self.0.reserve_in(&mut state, key, cert) {
            return Turn::Reserved(opener, permit);
        }
        let connections = state.keys.entry(key.clone()).or_default();
        if let Some(attempt) = &connections.attempt {
            return Turn::Wait(attempt.clone());
        }
        let (outcome, waiting) = watch::channel(None);
        connections.attempt = Some(Attempt { outcome: waiting, valid_until: cert.not_after() });
        Turn::Dial(Dialling { pool: self.0.clone(), key: key.clone(), outcome })
    }

    async fn dial<D, F>(
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
        let stream = timeout(settings.connect_timeout, (dials.dial)())
            .await
            .map_err(|_| TunnelError::ConnectTimeout)?
            .map_err(from_dial)?;
        let (opener, connection) =
            client::handshake(stream, cert, &key.expected, key.destination, &settings.h2).await?;
        let permit = opener.reserve(settings.max_streams).ok_or(TunnelError::Unstable)?;
        let driver = client::drive(&opener, connection, settings.h2.clone());
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
        self.reserve_in(&mut self.state(), key, cert)
    }

    fn reserve_in(
        &self,
        state: &mut State,
        key: &PoolKey,
        cert: &WorkloadCertificate,
    ) -> Option<(Opener, StreamPermit)> {
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
            && connections.attempt.is_none()
        {
            state.keys.remove(key);
        }
    }
}
