//! TCP through a waypoint: one policy decision and one endpoint per connection.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use http::StatusCode;
use mesh::hbone::{ConnectHeaders, ConnectRequest};
use mesh::net::{ByteStream, Io};
use mesh::serve::copy_bidirectional;
use mesh::telemetry::ResponseFlag;
use mesh::telemetry::access::{Connection, Direction, Failure, Security, TcpRecord};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::balance::Endpoint;
use crate::listener::Tunnel;
use crate::policy::Permit;
use crate::upstream::TcpUpstream;

/// Serves a CONNECT to a TCP port: decided and connected before it is accepted, so that a refusal is an answer.
pub async fn serve(tunnel: Arc<Tunnel>, request: ConnectRequest) {
    let opened = match open(&tunnel).await {
        Ok(opened) => opened,
        Err(status) => return request.reject(status),
    };
    match request.accept(None) {
        Ok(stream) => copy(opened, stream).await,
        Err(error) => opened.record.close(Err(Failure::new(ResponseFlag::Reset, error))),
    }
}

/// Serves a stream that turned out not to be HTTP only after it had been accepted.
pub async fn serve_accepted<S>(tunnel: Arc<Tunnel>, stream: S)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    // A denial or a dead upstream closes the stream by dropping it; `open` has recorded why.
    if let Ok(opened) = open(&tunnel).await {
        copy(opened, Io::new(stream)).await;
    }
}

struct Opened {
    record: TcpRecord,
    upstream: TcpUpstream,
}

async fn open(tunnel: &Tunnel) -> Result<Opened, StatusCode> {
    let endpoint = match tunnel.service_key() {
        Some(key) => {
            let port = tunnel.destination.address().port();
            tunnel.balancer().pick(&tunnel.snapshot(), key, port, &BTreeSet::new())
        }
        None => tunnel.pod_endpoint(),
    };
    let record = TcpRecord::open(describe(tunnel, endpoint.as_deref()));
    let permit = match tunnel.authorize(&tunnel.world(), None) {
        Ok(permit) => permit,
        Err(denial) => {
            record.close(Err(Failure::new(ResponseFlag::Deny, denial)));
            return Err(StatusCode::FORBIDDEN);
        }
    };
    let Some(endpoint) = endpoint else {
        record.close(Err(Failure::new(ResponseFlag::NoHealthyUpstream, "no healthy endpoint")));
        return Err(StatusCode::SERVICE_UNAVAILABLE);
    };
    match connect(tunnel, &permit, &endpoint).await {
        Ok(upstream) => Ok(Opened { record, upstream }),
        Err(error) => {
            record.close(Err(Failure::new(ResponseFlag::Connect, error)));
            Err(StatusCode::SERVICE_UNAVAILABLE)
        }
    }
}

async fn connect(
    tunnel: &Tunnel,
    _permit: &Permit,
    endpoint: &Endpoint,
) -> Result<TcpUpstream, crate::upstream::ConnectError> {
    let headers = ConnectHeaders {
        forwarded_for: Some(tunnel.client.address),
        forwarded_host: tunnel.service().map(|s| s.hostname.clone()),
        ..tunnel.client.origin.headers()
    };
    tunnel.upstreams().connect_tcp(endpoint, &headers).await
}

async fn copy(opened: Opened, downstream: impl ByteStream) {
    let Opened { record, upstream } = opened;
    let bytes = record.bytes();
    let outcome = match upstream {
        TcpUpstream::Tunnel(upstream) => copy_bidirectional(downstream, upstream, &bytes).await,
        TcpUpstream::Plain(upstream) => copy_bidirectional(downstream, upstream, &bytes).await,
    };
    record.close(outcome.map(drop).map_err(|error| Failure::new(ResponseFlag::Reset, error)));
}

fn describe(tunnel: &Tunnel, endpoint: Option<&Endpoint>) -> Connection {
    let client = &tunnel.client;
    let destination = endpoint.map(|e| e.workload.party(e.identity.as_ref().filter(|_| e.hbone())));
    Connection {
        direction: Direction::Waypoint,
        source_addr: client.address,
        destination_addr: endpoint.map_or(SocketAddr::from(([0, 0, 0, 0], 0)), |e| e.address),
        hbone_addr: Some(tunnel.destination.address().to_string().into()),
        source: client.party(),
        destination: destination.unwrap_or_default(),
        service: tunnel.service().map(|s| s.labels()),
        security: Security::MutualTls,
        via: None,
    }
}
