//! Endpoints known by their host name: looked up when a connection needs them, as ztunnel itself would.
//!
//! The servers are those of ztunnel's own `resolv.conf`, asked from its own network namespace: no pod can stand between,
//! and what one believes all may share. Lookups run on the control runtime; a worker only waits. A name is asked for
//! once, however many connections want it ([`cache`]); a name is taken whole, no search list is applied ([`stub`]).

mod cache;
pub(crate) mod stub;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use thiserror::Error;
use tokio::runtime::Handle;
use tokio::time::Instant;

use crate::dns::resolv;
use cache::{Cache, Known};

/// How long all servers together may take.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How long a failure is remembered, so that a burst of connections asks once.
const FAILURE_TTL: Duration = Duration::from_secs(2);
/// An answer that says 0 would be asked for again by every connection of a burst; one that says years, never again.
const SHORTEST_TTL: Duration = Duration::from_secs(1);
const LONGEST_TTL: Duration = Duration::from_secs(3600);
/// Where DNS servers listen.
const PORT: u16 = 53;

/// What a name came to: addresses of both families (never none), or why there are none.
pub type Outcome = Result<Arc<[IpAddr]>, NameError>;

/// Why a name has no address.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum NameError {
    #[error("it is no DNS name")]
    Unusable,
    #[error("there is no such name")]
    NoSuchName,
    #[error("it has no address that could be used")]
    NoAddress,
    #[error("no server answered: {0}")]
    NoAnswer(String),
    #[error("{file}: {reason}")]
    Settings { file: String, reason: String },
    #[error("the proxy is ending")]
    Ending,
}

/// The resolver. Cheap to clone; clones share what is known.
#[derive(Debug, Clone)]
pub struct Names(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    cache: Mutex<Cache>,
    servers: Servers,
    control: Handle,
    ipv6: bool,
}

/// Who is asked.
#[derive(Debug, Clone)]
pub enum Servers {
    /// Those of a file like `/etc/resolv.conf`, which is read for each lookup: it changes.
    File(PathBuf),
    These(Vec<SocketAddr>),
}

impl Names {
    /// Lookups will run on the runtime this is called on. Without `ipv6` only IPv4 addresses are looked for.
    #[must_use]
    pub fn new(servers: Servers, ipv6: bool) -> Self {
        Self(Arc::new(Inner { cache: Mutex::default(), servers, control: Handle::current(), ipv6 }))
    }

    /// The addresses of a host; waits for servers if they are not known.
    ///
    /// # Errors
    /// Why it has none, at most [`TIMEOUT`] later.
    pub async fn addresses(&self, host: &Arc<str>) -> Outcome {
        let known = self.cache().get(host, Instant::now());
        let mut pending = match known {
            Known::Outcome(outcome) => return outcome,
            Known::Pending(pending) => pending,
            Known::Nothing(pending) => {
                let (this, host) = (self.clone(), host.clone());
                // Ends by itself, with the time that servers may take.
                self.0.control.spawn(async move {
                    let (outcome, ttl) = this.look_up(&host).await;
                    tracing::debug!(target: "dns", %host, ?outcome, ttl = ttl.as_secs(), "endpoint looked up");
                    this.cache().put(&host, outcome, Instant::now() + ttl);
                });
                pending
            }
        };
        // An error: the runtime ended under the lookup.
        pending
            .wait_for(Option::is_some)
            .await
            .map_or(Err(NameError::Ending), |outcome| outcome.clone().unwrap_or(Err(NameError::Ending)))
    }

    /// Never held while waiting.
    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.0.cache.lock().expect("nothing that holds it panics")
    }

    async fn look_up(&self, host: &str) -> (Outcome, Duration) {
        let servers = match &self.0.servers {
            Servers::These(servers) => Ok(servers.clone()),
            Servers::File(path) => match tokio::fs::read_to_string(path).await {
                Ok(text) => Ok(servers(&text)),
                Err(error) => Err(NameError::Settings { file: path.display().to_string(), reason: error.to_string() }),
            },
        };
        let servers = match servers {
            Ok(servers) => servers,
            Err(error) => return (Err(error), FAILURE_TTL),
        };
        metrics::counter!("ztunnel_endpoint_lookups_total").increment(1);
        let found = tokio::time::timeout(TIMEOUT, stub::look_up(&servers, host, self.0.ipv6)).await;
        let found = found.unwrap_or_else(|_| Err(NameError::NoAnswer(format!("{} s have passed", TIMEOUT.as_secs()))));
        match found {
            Ok(stub::Found { addresses, ttl }) => {
                let usable: Arc<[IpAddr]> = addresses.into_iter().filter(is_usable).collect();
                let outcome = if usable.is_empty() { Err(NameError::NoAddress) } else { Ok(usable) };
                (outcome, ttl.clamp(SHORTEST_TTL, LONGEST_TTL))
            }
            Err(error) => (Err(error), FAILURE_TTL),
        }
    }
}

/// An endpoint is never the pod itself: that would let whoever owns the name reach what listens on its loopback.
fn is_usable(ip: &IpAddr) -> bool {
    let ip = ip.to_canonical();
    !ip.is_loopback() && !ip.is_unspecified() && !ip.is_multicast()
}

/// The servers of a `resolv.conf`; the local one where it names none.
fn servers(text: &str) -> Vec<SocketAddr> {
    let found = resolv::servers(text);
    if found.is_empty() { vec![SocketAddr::from(([127, 0, 0, 1], PORT))] } else { found }
}

#[cfg(test)]
mod tests;
