//! Plaintext that arrives for a pod: policy is asked without an identity, so whatever demands one says no here.

use std::net::SocketAddr;
use std::sync::Arc;

use mesh::model::{ApplicationTunnelProtocol, Workload};
use mesh::policy::{self, authorize};
use mesh::telemetry::ResponseFlag;
use mesh::telemetry::access::{self, Connection, Direction, Failure, Security, TcpRecord};
use tokio::net::TcpStream;

use crate::ending::Ending;
use crate::inbound::log_decision;
use crate::node::pod::{Facts, Opening, Tracked, Transport, Way};
use crate::resolve::{self, BadTarget};
use crate::worker::{Local, Place, SELF_CALL, copy, reset};

/// Serves one plain connection to the pod's application at `app`.
pub async fn serve(at: Arc<Place>, stream: TcpStream, client: SocketAddr, app: SocketAddr) {
    let opening = at.pod.opening();
    if at.is_self_call(app) {
        return access::refused(Direction::Inbound, client, app, ResponseFlag::BadRequest, &SELF_CALL);
    }
    let Local { world, workload: local, .. } = match at.local().await {
        Ok(local) => local,
        Err(ending) => {
            access::refused(Direction::Inbound, client, app, ending.flag(), &ending);
            return reset(&stream);
        }
    };
    let source = world.workload_by_ip(&local.network, client.ip());
    let record = TcpRecord::open(Connection {
        direction: Direction::Inbound,
        source_addr: client,
        destination_addr: app,
        hbone_addr: None,
        source: source.map(|w| w.party(None)).unwrap_or_default(),
        destination: local.party(None),
        service: resolve::inbound_service(&world, &local, app.port(), None).map(|s| s.labels()),
        security: Security::Unknown,
        via: None,
    });
    let outcome = Box::pin(forward(&at, &local, opening, stream, client, app, &record)).await;
    record.close(outcome.map_err(Failure::from));
}

async fn forward(
    at: &Arc<Place>,
    local: &Workload,
    opening: Opening,
    stream: TcpStream,
    client: SocketAddr,
    app: SocketAddr,
    record: &TcpRecord,
) -> Result<(), Ending> {
    let asked = policy::Connection { source: None, source_ip: client.ip(), destination: app, original: None };
    // In the table before policy is asked: a policy that changes in between finds the connection there.
    let tracked = Tracked::open(
        opening,
        Facts {
            way: Way::Inbound,
            src: client,
            original_dst: app,
            actual_dst: app,
            protocol: Transport::Tcp,
            authorized_as: Some(asked.clone()),
            peers: Vec::new(),
        },
    );
    let connected = async {
        // Behind a PROXY header it believes what it is told; in plain text anybody could tell it.
        let is_told = local.application_tunnel.is_some_and(|tunnel| {
            tunnel.protocol == ApplicationTunnelProtocol::Proxy && tunnel.port.is_none_or(|port| port == app.port())
        });
        if is_told {
            return Err(BadTarget::OwnPort(app.port()).into());
        }
        // The workload's policy is about the workload, not about the proxy's own metrics and readiness.
        if !at.shared.serves_beside_workload(app.port()) {
            let world = at.shared.store.snapshot();
            let decided = authorize(world.policies_for(local), &asked);
            log_decision(at, &asked, &decided);
            let _permit = decided?;
        }
        at.dial_app(client.ip(), app).await
    };
    match connected.await {
        Ok(upstream) => copy(&tracked, &at.pod, &record.bytes(), stream, upstream).await,
        Err(ending) => {
            reset(&stream);
            Err(ending)
        }
    }
}
