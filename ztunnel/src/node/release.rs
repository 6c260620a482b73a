//! Gives back a namespace that a ztunnel captured which is gone: in two steps, as open connections may still need the
//! rules when new ones no longer do.

use std::time::Duration;

use ebpf_loader::{Capture, NetnsCookie};

use super::netns::Netns;
use super::sysctl::Sysctls;
use super::{EnrolError, marked, routing};

/// New connections go direct from here on; what the second step takes away is still there. All of it is tried.
///
/// # Errors
/// The first step that was refused.
pub async fn stop(capture: &Capture, netns: &Netns, cookie: NetnsCookie) -> Result<(), EnrolError> {
    // The rule before the steering: sockets that are marked already would have their queries sent to nobody.
    let dns = routing::release_dns(netns).await;
    capture.detach(cookie)?;
    Ok(dns?)
}

/// Waits until no connection is open that needs the rules, whoever made it; looks once each `period`.
pub async fn until_unneeded(netns: &Netns, period: Duration) {
    while marked::any_open(netns).unwrap_or(false) {
        tokio::time::sleep(period).await;
    }
}

/// Takes rules and routes away; sysctls become what they were before the first ztunnel came.
///
/// # Errors
/// The step that was refused.
pub async fn take_back(
    capture: &Capture,
    netns: &Netns,
    cookie: NetnsCookie,
    sysctls: &Sysctls,
) -> Result<(), EnrolError> {
    let found = capture.remember(cookie, 0)?;
    let removed = routing::remove(netns, sysctls, found).await;
    // Whatever came of it: what is remembered has a place in a map of limited size.
    capture.forget_found(cookie)?;
    Ok(removed?)
}
