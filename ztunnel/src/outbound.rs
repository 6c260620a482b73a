//! One captured connection that leaves a pod, from original destination to last byte.

use std::net::SocketAddr;
use std::sync::Arc;

use ebpf_loader::abi::DNS_PORT;
use mesh::hbone::{self, ConnectHeaders, EarlyBytes, HboneStream, Meanwhile, PoolKey, TraceParent};
use mesh::net::{ByteStream, OriginalDst, is_hang_up};
use mesh::policy::{self, authorize};
use mesh::serve::CopyError;
use mesh::store::Snapshot;
use mesh::telemetry::access::{self, Connection, Direction, Failure, Security, TcpRecord};
use mesh::telemetry::{ByteCounts, ResponseFlag};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::dns;
use crate::ending::Ending;
use crate::inbound::announce;
use crate::join::{ClientTie, Handed};
use crate::node::pod::{Facts, LocalPod, Opening, Tracked, Transport, Way};
use crate::resolve::{self, ByName, NoRoute, Route, Tunnel, Via, missing};
use crate::worker::{Local, Place, SELF_CALL, copy, pool_settings, reset};

/// Serves what the pod's application sent to `dst`.
pub fn serve(
    at: Arc<Place>,
    stream: TcpStream,
    client: SocketAddr,
    dst: SocketAddr,
) -> impl Future<Output = ()> + Send {
    // Given back before the bytes flow: most connections are open for long, and what opening took is several times what
    // they need.
    let opened = Box::pin(open(at.clone(), stream, client, dst));
    async move {
        if let Some(connected) = opened.await {
            carry(&at, connected).await;
        }
    }
}

/// Up to where there is something to copy into; whoever gets none has been told.
async fn open(at: Arc<Place>, stream: TcpStream, client: SocketAddr, dst: SocketAddr) -> Option<Box<Connected>> {
    let opening = at.pod.opening();
    if at.is_self_call(dst) {
        access::refused(Direction::Outbound, client, dst, ResponseFlag::BadRequest, &SELF_CALL);
        return None;
    }
    if dst.port() == DNS_PORT && at.pod.dns.is_captured() {
        Box::pin(dns::serve::tcp(&at, stream, dst)).await;
        return None;
    }
    let mut source = match at.local().await {
        Ok(local) => local,
        Err(ending) => {
            reset(&stream);
            access::refused(Direction::Outbound, client, dst, ending.flag(), &ending);
            return None;
        }
    };
    let decided = match at.shared.demand {
        None => decide(&source, dst),
        Some(_) => Box::pin(ask_first(&at, &mut source, dst)).await,
    };
    let route = match decided {
        // A name outside the mesh; rare, so the wait for it does not make every connection larger.
        Err(NoRoute::ByName(lacking)) => Box::pin(look_up(&at, &source, *lacking)).await,
        decided => decided,
    };
    let captured = Captured { stream, client, dst, opening };
    match route {
        Ok(route) if route.via == Via::Gateway => {
            Box::pin(beyond(&at, &source, route, captured)).await;
            None
        }
        route => {
            let record = TcpRecord::open(describe(&source, client, dst, route.as_ref().ok()));
            match forward(&at, &source, route, captured, &record).await {
                Ok(Some((tracked, stream, upstream))) => {
                    Some(Box::new(Connected { record, tracked, stream, upstream }))
                }
                Ok(None) => {
                    record.close(Ok(()));
                    None
                }
                Err(ending) => {
                    record.close(Err(ending.into()));
                    None
                }
            }
        }
    }
}

/// A connection that bytes flow in.
struct Connected {
    record: TcpRecord,
    tracked: Tracked,
    stream: TcpStream,
    upstream: Upstream,
}

async fn carry(at: &Place, mut connected: Box<Connected>) {
    let Connected { record, tracked, stream, upstream } = &mut *connected;
    let outcome = match upstream {
        Upstream::Plain(up) => copy(tracked, &at.pod, &record.bytes(), stream, up).await,
        Upstream::Tunnel(up) => copy(tracked, &at.pod, &record.bytes(), stream, up).await,
        Upstream::Joined(joined) => Box::pin(carry_joined(tracked, &at.pod, record, stream, joined)).await,
    };
    let Connected { record, .. } = *connected;
    record.close(outcome.map_err(Failure::from));
}

fn decide(source: &Local, dst: SocketAddr) -> Result<Route, NoRoute> {
    resolve::outbound(&source.world, &source.workload, OriginalDst(dst), &mut rand::rng())
}

async fn ask_first(at: &Place, source: &mut Local, dst: SocketAddr) -> Result<Route, NoRoute> {
    let missing = |world: &Snapshot| missing::for_outbound(world, &source.workload, dst.ip());
    source.world = at.shared.informed(source.world.clone(), missing).await?;
    decide(source, dst)
}

async fn look_up(at: &Place, source: &Local, lacking: ByName) -> Result<Route, NoRoute> {
    access::on_demand_dns(&source.workload.party(Some(&source.identity)), lacking.hostname());
    let found = at.shared.names.addresses(lacking.hostname()).await;
    let found = found.as_deref().map_err(ToString::to_string);
    lacking.resolved(&source.workload, found, &mut rand::rng())
}

/// A connection as it was taken from the application.
struct Captured {
    stream: TcpStream,
    client: SocketAddr,
    dst: SocketAddr,
    opening: Opening,
}

/// None: the client is gone already.
async fn forward(
    at: &Arc<Place>,
    source: &Local,
    route: Result<Route, NoRoute>,
    captured: Captured,
    record: &TcpRecord,
) -> Result<Option<(Tracked, TcpStream, Upstream)>, Ending> {
    let Captured { mut stream, client, dst, opening } = captured;
    let opened = async {
        let route = route?;
        let tracked = track(opening, client, dst, &route);
        let upstream = match &route.tunnel {
            Some(tunnel) if at.pod.addresses().contains(&route.next_hop.ip()) => {
                Upstream::Plain(hairpin(at, source, client, tunnel).await?)
            }
            Some(tunnel) if at.may_join(&route) => {
                let mut offer = at.shared.joins.offer();
                let mut announce = |stream| offer.announce(stream);
                let mut meanwhile = Meanwhile::Announce(&mut announce);
                let up =
                    reached(&tracked, open_tunnel(at, source, &route, tunnel, client, &mut meanwhile).await?)?.stream;
                match offer.taken() {
                    Some(Handed { app, bytes, tie }) => {
                        let app = TcpStream::from_std(app).map_err(CopyError::Upstream)?;
                        Upstream::Joined(Box::new(Joined { tunnel: up, app, bytes, tie }))
                    }
                    None => Upstream::Tunnel(up),
                }
            }
            Some(tunnel) => {
                let mut meanwhile = Meanwhile::Say(EarlyBytes::of(&mut stream));
                let up =
                    reached(&tracked, open_tunnel(at, source, &route, tunnel, client, &mut meanwhile).await?)?.stream;
                if let Meanwhile::Say(early) = meanwhile {
                    record.bytes().add_received(early.len() as u64);
                    match early.broken() {
                        None => {}
                        // As in the copy that would follow: the client ended it, and the tunnel dropped is reset.
                        Some(error) if is_hang_up(error.kind()) => return Ok(None),
                        Some(error) => return Err(CopyError::Downstream(error).into()),
                    }
                }
                Upstream::Tunnel(up)
            }
            None => Upstream::Plain(at.dial_plain(route.next_hop).await?),
        };
        Ok::<_, Ending>(Some((tracked, upstream)))
    };
    match opened.await {
        Ok(opened) => Ok(opened.map(|(tracked, upstream)| (tracked, stream, upstream))),
        Err(ending) => {
            reset(&stream);
            Err(ending)
        }
    }
}

/// To another network. Who answers there is known once it has: only then is there a record to open, or once nobody does.
async fn beyond(at: &Arc<Place>, source: &Local, route: Route, captured: Captured) {
    let Captured { stream, client, dst, opening } = captured;
    let mut connection = describe(source, client, dst, Some(&route));
    let tracked = track(opening, client, dst, &route);
    let tunnel = route.tunnel.as_ref().expect("gateways are reached by tunnels");
    let opened = async {
        let outer = reached(&tracked, open_tunnel(at, source, &route, tunnel, client, &mut Meanwhile::Wait).await?)?;
        reached(&tracked, through(at, source, &route, tunnel, client, outer.stream).await?)
    };
    // Whoever is cut before there is a record has one as well.
    let opened = async {
        tokio::select! {
            opened = opened => opened,
            () = at.pod.drain.cut() => Err(Ending::Drained),
        }
    };
    match opened.await {
        Ok(hbone::Tunnel { stream: up, peer, response }) => {
            let said = response.baggage.and_then(|said| at.shared.hearsay.admit(said));
            connection.destination = said.unwrap_or_default().party(peer.identity());
            let record = TcpRecord::open(connection);
            let outcome = copy(&tracked, &at.pod, &record.bytes(), stream, up).await;
            record.close(outcome.map_err(Failure::from));
        }
        Err(ending) => {
            reset(&stream);
            TcpRecord::open(connection).close(Err(ending.into()));
        }
    }
}

/// Enters the connection into its pod's table.
fn track(opening: Opening, client: SocketAddr, dst: SocketAddr, route: &Route) -> Tracked {
    let protocol = if route.tunnel.is_some() { Transport::Hbone } else { Transport::Tcp };
    let facts = Facts {
        way: Way::Outbound,
        src: client,
        original_dst: dst,
        actual_dst: route.next_hop,
        protocol,
        authorized_as: None,
        peers: Vec::new(),
    };
    Tracked::open(opening, facts)
}

/// The peer at the end of a tunnel is known from now on, and may have been revoked since the tunnel's handshake.
fn reached(tracked: &Tracked, tunnel: hbone::Tunnel) -> Result<hbone::Tunnel, Ending> {
    tracked.reached(tunnel.peer.standing());
    if tracked.is_peer_revoked() { Err(Ending::Revoked) } else { Ok(tunnel) }
}

/// What the bytes go into.
enum Upstream {
    Plain(TcpStream),
    Tunnel(HboneStream),
    Joined(Box<Joined>),
}

/// The tunnel stands, and the application behind it is reached without it.
struct Joined {
    tunnel: HboneStream,
    app: TcpStream,
    bytes: Arc<ByteCounts>,
    tie: ClientTie,
}

/// Copies between two applications of this node, for the records of both sides.
async fn carry_joined(
    tracked: &Tracked,
    pod: &LocalPod,
    record: &TcpRecord,
    stream: &mut TcpStream,
    Joined { tunnel, app, bytes, tie }: &mut Joined,
) -> Result<(), Ending> {
    metrics::counter!("ztunnel_same_node_joins_total").increment(1);
    let counts = [record.bytes(), bytes.clone()];
    let done = tokio::select! {
        done = copy(tracked, pod, &counts, &mut *stream, &mut *app) => done,
        // As when a peer resets the tunnel.
        () = tie.cut() => {
            stream.abort();
            app.abort();
            return Ok(());
        }
    };
    tie.over();
    // The other side may be gone.
    let _ = tunnel.shutdown().await;
    done
}

/// A stream to the route's authority inside an mTLS connection to its next hop.
async fn open_tunnel(
    at: &Place,
    source: &Local,
    route: &Route,
    tunnel: &Tunnel,
    client: SocketAddr,
    meanwhile: &mut Meanwhile<'_>,
) -> Result<hbone::Tunnel, Ending> {
    let to = route.next_hop;
    let local = at.pod.address_like(to.ip()).ok_or(Ending::NoSource(to))?;
    let cert = at.certificate(source).await?;
    let key = PoolKey::new(source.identity.clone(), tunnel.expected.clone(), to, local);
    let headers = headers(source, route, client);
    let dial = || at.dial(local, to);
    let opened = at.pool.connect_while(key, &cert, dial, &tunnel.authority, &headers, meanwhile).await;
    opened.map_err(|source| Ending::Tunnel { to, source })
}

/// The second tunnel, inside the one to a gateway, with its own handshake: the gateway only passes bytes on. It is never
/// pooled, as one that was opened before may end elsewhere.
async fn through(
    at: &Place,
    source: &Local,
    route: &Route,
    tunnel: &Tunnel,
    client: SocketAddr,
    outer: HboneStream,
) -> Result<hbone::Tunnel, Ending> {
    let to = route.next_hop;
    let cert = at.certificate(source).await?;
    let network = Some(source.workload.network.clone()).filter(|n| !n.is_empty());
    let headers = ConnectHeaders { network, ..headers(source, route, client) };
    let (expected, settings) = (tunnel.inner.as_deref().unwrap_or_default(), pool_settings(&at.shared.config));
    let opened = hbone::connect_once(outer, &cert, expected, to, &settings, &tunnel.authority, &headers).await;
    opened.map_err(|source| Ending::Beyond { gateway: to, source })
}

fn headers(source: &Local, route: &Route, client: SocketAddr) -> ConnectHeaders {
    ConnectHeaders {
        baggage: Some(source.workload.baggage()),
        forwarded_for: Some(client),
        forwarded_host: route.service.as_ref().map(|s| s.hostname.clone()),
        traceparent: Some(TraceParent::random()),
        ..ConnectHeaders::default()
    }
}

/// A pod that calls its own service and is chosen itself. Its port 15008 cannot be dialled from inside (the steering
/// lets calls of a pod to itself pass), so policy is asked here, as inbound would, and the application dialled.
async fn hairpin(at: &Place, own: &Local, client: SocketAddr, tunnel: &Tunnel) -> Result<TcpStream, Ending> {
    let here = at.pod.address_like(client.ip()).ok_or(Ending::NoSource(client))?;
    let here = match &tunnel.authority {
        hbone::Authority::Ip(to) => to.ip(),
        hbone::Authority::Host { .. } => here,
    };
    let target = at.target(own, here, &tunnel.authority)?;
    let asked = policy::Connection {
        source: Some(own.identity.clone()),
        source_ip: here,
        destination: target.app,
        original: None,
    };
    let _permit = authorize(own.world.policies_for(&own.workload), &asked)?;
    let mut app = at.dial_target(here, target).await?;
    announce(&mut app, at.dialled(target), client, target, &own.identity).await?;
    Ok(app)
}

fn describe(source: &Local, client: SocketAddr, dst: SocketAddr, route: Option<&Route>) -> Connection {
    let tunnel = route.and_then(|r| r.tunnel.as_ref());
    let destination = route.and_then(|r| r.destination.as_ref());
    Connection {
        direction: Direction::Outbound,
        source_addr: client,
        destination_addr: route.map_or(dst, |r| r.next_hop),
        hbone_addr: tunnel.map(|t| t.authority.to_string().into()),
        source: source.workload.party(tunnel.map(|_| &source.identity)),
        destination: destination.map(|d| d.party(tunnel.and_then(|t| t.expected.first()))).unwrap_or_default(),
        service: route
            .filter(|r| r.via != Via::Passthrough || r.service.is_some())
            .and_then(|r| r.service.as_deref().map(mesh::model::Service::labels)),
        security: if tunnel.is_some() { Security::MutualTls } else { Security::Unknown },
        via: None,
    }
}
