//! Where the identities of the workloads served here come from: the control plane, or a key on disk.

use std::sync::Arc;

use anyhow::Context;
use mesh::clock::Clock;
use mesh::identity::{CaClient, CaConfig, CertificateManager, CertificateSource, FileCa, HandshakeRules, Rotation};

use crate::config::{CaSource, Config};

/// The manager all workers ask, and the task that does the fetching. Handshakes with its certificates go by `rules`. Must be called inside the control runtime.
///
/// # Errors
/// A CA directory or address that cannot be used.
pub fn open(config: &Config, rules: HandshakeRules) -> anyhow::Result<(CertificateManager, Rotation)> {
    let clock = Clock::system();
    let source: Arc<dyn CertificateSource> = match &config.ca {
        CaSource::Directory(dir) => {
            let ca = FileCa::open(dir, config.certificate_ttl, clock.clone())
                .with_context(|| format!("opening the CA in {}", dir.display()))?;
            Arc::new(ca.with_rules(rules))
        }
        CaSource::Remote(remote) => {
            let channel = mesh::grpc::channel(remote.clone()).context("CA_ADDRESS")?;
            // A node proxy asks in the name of its pods; the control plane checks that they run here. A dedicated one
            // asks for itself, with the workload's own token.
            let impersonate = config.mode.dedicated().is_none();
            let how = CaConfig { ttl: config.certificate_ttl, impersonate };
            Arc::new(CaClient::new(channel, how, clock.clone()).with_rules(rules))
        }
    };
    Ok(CertificateManager::new(source, clock))
}
