//! One captured connection that leaves a pod, from original destination to last byte.

use std::net::SocketAddr;
use std::sync::Arc;

use ebpf_loader::abi::DNS_PORT;
use mesh::hbone::{ConnectHeaders, HboneStream, PoolKey, TraceParent};
use mesh::net::OriginalDst;
use mesh::policy::{self, authorize};
use mesh::telemetry::ResponseFlag;
use mesh::telemetry::access::{self, Connection, Direction, Failure, Security, TcpRecord};
use tokio::net::TcpStream;

use crate::dns;
use crate::ending::Ending;
use crate::node::pod::{Facts, Opening, Tracked, Transport, Way};
use crate::resolve::{self, ByName, NoRoute, Route, Tunnel, Via};
use crate::worker::{Local, Place, SELF_CALL, copy, reset};

/// Serves what the pod's application sent to `dst`.
pub async fn serve(at: Arc<Place>, stream: TcpStream, client: SocketAddr, dst: SocketAddr) {
    let opening = at.pod.opening();
    if at.is_self_call(dst) {
        return access::refused(Direction::Outbound, client, dst, ResponseFlag::BadRequest, &SELF_CALL);
    }
    if dst.port() == DNS_PORT && at.pod.dns.is_captured() {
        return Box::pin(dns::serve::tcp(&at, stream, dst)).await;
    }
    let source = match at.local().await {
        Ok(local) => local,
        Err(ending) => {
            reset(&stream);
            return access::refused(Direction::Outbound, client, dst, ending.flag(), &ending);
        }
    };
    let decided = resolve::outbound(&source.world, &source.workload, OriginalDst(dst), &mut rand::rng());
    let route = match decided {
        // A name outside the mesh; rare, so the wait for it does not make every connection larger.
        Err(NoRoute::ByName(lacking)) => Box::pin(look_up(&at, &source, *lacking)).await,
        decided => decided,
    };
    let record = TcpRecord::open(describe(&source, client, dst, &route));
    let captured = Captured { stream, client, dst, opening };
    let outcome = Box::pin(forward(&at, &source, route, captured, &record)).await;
    record.close(outcome.map_err(Failure::from));
}

async fn look_up(at: &Place, source: &Local, lacking: ByName) -> Result<Route, NoRoute> {
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

async fn forward(
    at: &Arc<Place>,
    source: &Local,
    route: Result<Route, NoRoute>,
    captured: Captured,
    record: &TcpRecord,
) -> Result<(), Ending> {
    let Captured { stream, client, dst, opening } = captured;
    let opened = async {
        let route = route?;
        let tracked = Tracked::open(
            opening,
            Facts {
                way: Way::Outbound,
                src: client,
                original_dst: dst,
                actual_dst: route.next_hop,
                protocol: if route.tunnel.is_some() { Transport::Hbone } else { Transport::Tcp },
                authorized_as: None,
                peer: None,
            },
        );
        let upstream = match &route.tunnel {
            Some(tunnel) if at.pod.addresses().contains(&route.next_hop.ip()) => {
                Upstream::Plain(hairpin(at, source, client, tunnel).await?)
            }
            Some(tunnel) => {
                let mesh::hbone::Tunnel { stream, peer, .. } = open_tunnel(at, source, &route, tunnel, client).await?;
                tracked.reached(peer.standing());
                if tracked.is_peer_revoked() {
                    return Err(Ending::Revoked);
                }
                Upstream::Tunnel(stream)
            }
            None => Upstream::Plain(at.dial_plain(route.next_hop).await?),
        };
        Ok::<_, Ending>((tracked, upstream))
    };
    match opened.await {
        Ok((tracked, upstream)) => match upstream {
            Upstream::Plain(up) => copy(&tracked, &at.pod, &record.bytes(), stream, up).await,
            Upstream::Tunnel(up) => copy(&tracked, &at.pod, &record.bytes(), stream, up).await,
        },
        Err(ending) => {
            reset(&stream);
            Err(ending)
        }
    }
}

/// What the bytes go into.
enum Upstream {
    Plain(TcpStream),
    Tunnel(HboneStream),
}

/// A stream to the route's authority inside an mTLS connection to its next hop.
async fn open_tunnel(
    at: &Place,
    source: &Local,
    route: &Route,
    tunnel: &Tunnel,
    client: SocketAddr,
) -> Result<mesh::hbone::Tunnel, Ending> {
    let to = route.next_hop;
    let local = at.pod.address_like(to.ip()).ok_or(Ending::NoSource(to))?;
    let cert = at.certificate(source).await?;
    let key = PoolKey::new(source.identity.clone(), tunnel.expected.clone(), to, local);
    let headers = ConnectHeaders {
        baggage: Some(source.workload.baggage()),
        forwarded_for: Some(client),
        forwarded_host: route.service.as_ref().map(|s| s.hostname.clone()),
        traceparent: Some(TraceParent::random()),
        ..ConnectHeaders::default()
    };
    let opened = at.pool.connect(key, &cert, || at.dial(local, to), &tunnel.authority, &headers).await;
    opened.map_err(|source| Ending::Tunnel { to, source })
}

/// A pod that calls its own service and is chosen itself. Its port 15008 cannot be dialled from inside (the steering
/// lets calls of a pod to itself pass), so policy is asked here, as inbound would, and the application dialled.
async fn hairpin(at: &Place, own: &Local, client: SocketAddr, tunnel: &Tunnel) -> Result<TcpStream, Ending> {
    let here = at.pod.address_like(client.ip()).ok_or(Ending::NoSource(client))?;
    let here = match &tunnel.authority {
        mesh::hbone::Authority::Ip(to) => to.ip(),
        mesh::hbone::Authority::Host { .. } => here,
    };
    let to = at.target(own, here, &tunnel.authority)?;
    let asked = policy::Connection { source: Some(own.identity.clone()), source_ip: here, destination: to };
    let _permit = authorize(own.world.policies_for(&own.workload), &asked)?;
    at.dial_plain(to).await
}

fn describe(source: &Local, client: SocketAddr, dst: SocketAddr, route: &Result<Route, NoRoute>) -> Connection {
    let route = route.as_ref().ok();
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
    }
}
