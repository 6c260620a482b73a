//! HBONE that arrives for a pod: the TLS connection, then each tunnel request in it from authority to last byte.

pub(crate) mod proxy_protocol;

use std::net::SocketAddr;
use std::sync::Arc;

use mesh::hbone::{self, Baggage, ConnectRequest, HboneStream, ServeError};
use mesh::identity::Identity;
use mesh::model::Workload;
use mesh::policy::{self, Denial, Original, Permit, authorize};
use mesh::serve::CopyError;
use mesh::store::Snapshot;
use mesh::telemetry::ResponseFlag;
use mesh::telemetry::access::{self, Connection, Direction, Failure, Security, TcpRecord, Via};
use mesh::tls::{TlsError, TlsStream, VerifiedPeer};
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::ending::Ending;
use crate::join::AcceptorTie;
use crate::node::pod::{Facts, LocalPod, Opening, Tracked, Transport, Way};
use crate::resolve::{self, NoRoute, Target, missing};
use crate::worker::{Local, Place, SELF_CALL, copy, h2_settings};

/// Serves one connection to port 15008 of the pod at `here`.
pub async fn serve(at: Arc<Place>, stream: TcpStream, client: SocketAddr, here: SocketAddr) {
    let opening = at.pod.opening();
    if at.is_self_call(here) {
        return access::refused(Direction::Inbound, client, here, ResponseFlag::BadRequest, &SELF_CALL);
    }
    let handshake = at.shared.handshakes.begin(at.pod.cookie, client.ip());
    let accepted = tokio::select! {
        biased;
        accepted = Box::pin(accept(&at, stream, client)) => accepted,
        // Told already.
        () = handshake.displaced() => return,
    };
    let (tls, peer) = match accepted {
        Ok(accepted) => accepted,
        Err(error) => return access::refused(Direction::Inbound, client, here, error.flag(), &error),
    };
    drop((handshake, opening));
    let drain = at.pod.drain.clone();
    let settings = h2_settings(&at.shared.config);
    let tunnels = {
        let at = at.clone();
        move |request| tunnel(at.clone(), request, here)
    };
    let identity = peer.identity().clone();
    match Box::pin(hbone::serve(tls, peer, settings, drain, tunnels)).await {
        Ok(()) => {}
        // Its tunnels tell of that.
        Err(ServeError::Cut) => tracing::debug!(%client, %here, "HBONE connection cut"),
        Err(error) => access::broken(Direction::Inbound, client, &identity, here, error.flag(), &error),
    }
}

/// Why a connection to port 15008 had no tunnel request in it.
#[derive(Debug, Error)]
enum NotAccepted {
    #[error(transparent)]
    Ours(#[from] Ending),
    #[error(transparent)]
    Theirs(#[from] TlsError),
}

impl NotAccepted {
    fn flag(&self) -> ResponseFlag {
        match self {
            Self::Ours(ending) => ending.flag(),
            Self::Theirs(error) => error.flag(),
        }
    }
}

/// The handshake, with the certificate of this pod.
async fn accept(
    at: &Place,
    stream: TcpStream,
    client: SocketAddr,
) -> Result<(TlsStream<TcpStream>, VerifiedPeer), NotAccepted> {
    let local = at.local().await?;
    let cert = at.certificate(&local).await?;
    Ok(mesh::tls::accept(&cert, stream, client).await?)
}

/// One tunnel request.
fn tunnel(at: Arc<Place>, request: ConnectRequest, here: SocketAddr) -> impl Future<Output = ()> + Send {
    // As where connections leave: what opening takes is given back before the bytes flow.
    let opened = Box::pin(open(at.clone(), request, here));
    async move {
        if let Some(connected) = opened.await {
            carry(&at, connected).await;
        }
    }
}

/// Up to where there is something to copy into; whoever gets none has been told.
async fn open(at: Arc<Place>, request: ConnectRequest, here: SocketAddr) -> Option<Box<Connected>> {
    if at.pod.is_door_closed() {
        request.send_away();
        return None;
    }
    let opening = at.pod.opening();
    let client = request.peer.addr();
    let refused = |request: ConnectRequest, ending: &Ending| {
        access::refused(Direction::Inbound, client, here, ending.flag(), ending);
        request.reject(ending.status());
        None
    };
    let mut local = match at.local().await {
        Ok(local) => local,
        Err(ending) => return refused(request, &ending),
    };
    if at.shared.demand.is_some()
        && let Err(error) = Box::pin(ask_first(&at, &mut local, &request)).await
    {
        return refused(request, &error.into());
    }
    let target = match at.target(&local, here.ip(), &request.authority) {
        Ok(target) => target,
        Err(error) => return refused(request, &error.into()),
    };
    let peer = request.peer.identity();
    let original = resolve::original(&local.world, &local.workload, target.app.port(), peer, &request.headers);
    let record = TcpRecord::open(describe(&at, &local, &request, original.as_ref(), here, target.app));
    match forward(&at, &local, opening, (request, original), target, &record).await {
        Ok((tracked, downstream, upstream)) => Some(Box::new(Connected { record, tracked, downstream, upstream })),
        Err(ending) => {
            record.close(Err(ending.into()));
            None
        }
    }
}

/// A tunnel that bytes flow in.
struct Connected {
    record: TcpRecord,
    tracked: Tracked,
    downstream: HboneStream,
    upstream: Upstream,
}

/// Where they go.
enum Upstream {
    App(TcpStream),
    /// The client's side copies.
    Joined(AcceptorTie),
}

async fn carry(at: &Place, mut connected: Box<Connected>) {
    let Connected { record, tracked, downstream, upstream } = &mut *connected;
    let outcome = match upstream {
        Upstream::App(app) => copy(tracked, &at.pod, &record.bytes(), downstream, app).await,
        Upstream::Joined(tie) => joined(tracked, &at.pod, downstream, tie).await,
    };
    let Connected { record, .. } = *connected;
    record.close(outcome.map_err(Failure::from));
}

/// Where not everything is sent: what has a say in who the client is, or in what a host name means, is asked for and waited
/// for. The peer itself is only for telemetry to name, which does not wait.
async fn ask_first(at: &Place, local: &mut Local, request: &ConnectRequest) -> Result<(), NoRoute> {
    let Some(demand) = &at.shared.demand else { return Ok(()) };
    let (network, peer) = (&*local.workload.network, request.peer.addr().ip());
    if local.world.workload_by_ip(network, peer).is_none() {
        demand.hint(format!("{network}/{peer}"));
    }
    let headers = &request.headers;
    let waits = headers.original_peer.is_some()
        || headers.network.is_some()
        || matches!(request.authority, hbone::Authority::Host { .. });
    let missing = |world: &Snapshot| missing::for_inbound(world, &local.workload);
    if waits {
        local.world = at.shared.informed(local.world.clone(), missing).await?;
    } else {
        missing(&local.world).into_iter().for_each(|name| demand.hint(name));
    }
    if let Some(client) = headers.forwarded_for.filter(|_| headers.original_peer.is_some()) {
        let client = client.ip();
        if local.world.workload_by_ip(network, client).is_none() {
            demand.hint(format!("{network}/{client}"));
        }
    }
    Ok(())
}

async fn forward(
    at: &Arc<Place>,
    local: &Local,
    opening: Opening,
    (mut request, original): (ConnectRequest, Option<Original>),
    target: Target,
    record: &TcpRecord,
) -> Result<(Tracked, HboneStream, Upstream), Ending> {
    let (client, identity) = (request.peer.addr(), request.peer.identity().clone());
    let asked = policy::Connection {
        source: Some(identity.clone()),
        source_ip: client.ip(),
        destination: target.app,
        original,
    };
    // In the table before policy is asked: a policy that changes in between finds the connection there.
    let tracked = Tracked::open(
        opening,
        Facts {
            way: Way::Inbound,
            src: client,
            original_dst: target.app,
            actual_dst: at.dialled(target),
            protocol: Transport::Hbone,
            authorized_as: Some(asked.clone()),
            peers: request.peer.standing().cloned().into_iter().collect(),
        },
    );
    let connected = async {
        let world = at.shared.store.snapshot();
        if tracked.is_peer_revoked() {
            return Err(Ending::Revoked);
        }
        let decided = authorize(world.policies_for(&local.workload), &asked);
        log_decision(at, &asked, &decided);
        let _permit = decided?;
        at.dial_target(client.ip(), target).await
    };
    let connected = tokio::select! {
        biased;
        connected = connected => connected,
        // Or a client that asks and gives up, over and over, would have us dial without end.
        () = request.given_up() => Err(Ending::GivenUp),
    };
    let mut upstream = match connected {
        Ok(upstream) => upstream,
        Err(ending) => {
            request.reject(ending.status());
            return Err(ending);
        }
    };
    let own = local.workload.baggage();
    let answer = at.shared.config.response_baggage.then_some(&own);
    // A proxy that wants to be told of the connection first is told on this side.
    let offer = at.shared.joins.find(request.stream()).filter(|_| target.announced.is_none());
    if let Some(found) = offer {
        let tie = found.hand_over(upstream.into_std().map_err(CopyError::Upstream)?, record.bytes());
        let downstream = request.accept(answer).map_err(Ending::Answer)?;
        return Ok((tracked, downstream, Upstream::Joined(tie)));
    }
    let downstream = request.accept(answer).map_err(Ending::Answer)?;
    announce(&mut upstream, at.dialled(target), client, target, &identity).await?;
    Ok((tracked, downstream, Upstream::App(upstream)))
}

/// Stands by while the client's side copies: policy and drain here end it there, and so does the end of the tunnel.
async fn joined(
    tracked: &Tracked,
    pod: &LocalPod,
    tunnel: &mut HboneStream,
    tie: &mut AcceptorTie,
) -> Result<(), Ending> {
    tracked.established();
    let mut nothing = [0];
    tokio::select! {
        biased;
        () = tie.over() => {
            // A client that is gone wants no goodbye.
            let _ = tunnel.shutdown().await;
            Ok(())
        }
        () = tracked.denied() => Err(if tracked.is_peer_revoked() { Ending::Revoked } else { Ending::DeniedLater }),
        () = pod.drain.cut() => Err(Ending::Drained),
        // Nothing travels in it, so all that can come is its end.
        _ = tunnel.read(&mut nothing) => if tracked.is_peer_revoked() { Err(Ending::Revoked) } else { Ok(()) },
    }
}

/// Tells a proxy in the application's place what the connection is, where it wants to be told.
///
/// # Errors
/// It hung up before it had read that.
pub async fn announce(
    app: &mut TcpStream,
    to: SocketAddr,
    client: SocketAddr,
    target: Target,
    identity: &Identity,
) -> Result<(), Ending> {
    let Some(destination) = target.announced else { return Ok(()) };
    let header = proxy_protocol::header(client, destination, identity);
    app.write_all(&header).await.map_err(|source| Ending::Announce { to, source })
}

/// Why a connection was let in or not, for those who asked to see it (`AUTHZ_POLICY_INFO_LOGGING`).
pub fn log_decision(at: &Place, asked: &policy::Connection, decided: &Result<Permit, Denial>) {
    let (decision, policy) = match decided {
        Ok(permit) => ("allowed", permit.allowed_by()),
        Err(denial) => ("denied", denial.policy()),
    };
    let policy = policy.map_or_else(|| "none".to_owned(), ToString::to_string);
    let identity = asked.source.as_ref().map(tracing::field::display);
    let original = asked.original.as_ref().map(|original| tracing::field::display(&original.identity));
    let (pod, src, dst) = (&at.pod.name, asked.source_ip, asked.destination);
    if at.shared.config.log_policy_decisions {
        tracing::info!(%pod, %src, identity, original, %dst, %policy, decision, "policy decision");
    } else {
        tracing::debug!(%pod, %src, identity, original, %dst, %policy, decision, "policy decision");
    }
}

fn describe(
    at: &Place,
    local: &Local,
    request: &ConnectRequest,
    original: Option<&Original>,
    here: SocketAddr,
    app: SocketAddr,
) -> Connection {
    let (world, workload) = (&local.world, &local.workload);
    let peer = &request.peer;
    let said = request.headers.network.as_deref();
    let from_elsewhere = original.is_none()
        && resolve::comes_through_gateway(world, workload, (peer.identity(), peer.addr().ip()), said);
    let (identity, client) = match original {
        Some(original) => (&original.identity, original.address),
        None => (peer.identity(), peer.addr()),
    };
    // What the control plane says about the client's address counts more than what is said about the client in the
    // request, as long as it is the same identity. Of a client behind a gateway we see no address.
    let known = (!from_elsewhere)
        .then(|| world.workload_by_ip(&workload.network, client.ip()))
        .flatten()
        .filter(|w| w.identity().is_ok_and(|i| i == *identity));
    if original.is_none() && !from_elsewhere {
        count_false_claim(request, known);
    }
    let source = match known {
        Some(known) => known.party(Some(identity)),
        None => believed(at, world, workload, request, from_elsewhere).unwrap_or_default().party(identity),
    };
    // Whoever says it can only choose among the services of this workload.
    let named = request.headers.forwarded_host.as_deref();
    Connection {
        direction: Direction::Inbound,
        source_addr: client,
        destination_addr: here,
        hbone_addr: Some(request.authority.to_string().into()),
        source,
        destination: workload.party(Some(&local.identity)),
        service: resolve::inbound_service(world, workload, app.port(), named).map(|s| s.labels()),
        security: Security::MutualTls,
        via: original.map(|_| Box::new(Via { addr: peer.addr(), identity: peer.identity().to_string().into() })),
    }
}

/// Counts a peer that names another as the client without being one that may. Every node proxy names the client; as long
/// as that is the peer itself, it claims nothing.
fn count_false_claim(request: &ConnectRequest, known: Option<&Arc<Workload>>) {
    let own = |ip| ip == request.peer.addr().ip() || known.is_some_and(|known| known.addresses.contains(&ip));
    let headers = &request.headers;
    let other = headers.original_peer.as_ref().is_some_and(|identity| identity != request.peer.identity());
    if other || headers.forwarded_for.is_some_and(|addr| !own(addr.ip())) {
        metrics::counter!("ztunnel_original_peer_dropped_total").increment(1);
    }
}

/// What the peer says about the source, if it may: its words become labels, and a client must not make up labels. Clients
/// of other networks speak for themselves, within bounds.
fn believed(
    at: &Place,
    world: &Snapshot,
    workload: &Workload,
    request: &ConnectRequest,
    from_elsewhere: bool,
) -> Option<Baggage> {
    let said = request.headers.baggage.as_ref().filter(|_| at.shared.config.response_baggage)?;
    if resolve::speaks_for_others(world, workload, request.peer.identity()) {
        return Some(said.clone());
    }
    if from_elsewhere {
        return at.shared.hearsay.admit(said.clone());
    }
    metrics::counter!("ztunnel_baggage_dropped_total").increment(1);
    None
}
