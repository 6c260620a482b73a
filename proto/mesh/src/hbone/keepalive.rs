//! Noticing that a peer is gone.

use h2::{Ping, PingPong};

use super::H2Settings;

/// Returns once a PING has gone unanswered for too long; never, while the peer is there. Errors of the connection are
/// reported by whoever drives it.
pub(super) async fn peer_gone(ping_pong: Option<PingPong>, settings: H2Settings) {
    let Some(mut ping_pong) = ping_pong else { return std::future::pending().await };
    loop {
        tokio::time::sleep(settings.keepalive).await;
        match tokio::time::timeout(settings.keepalive_timeout, ping_pong.ping(Ping::opaque())).await {
            Err(_) => return,
            Ok(Err(_)) => return std::future::pending().await,
            Ok(Ok(_)) => {}
        }
    }
}
