//! Certificates from the control plane's signing service: the key is made here and stays here, a request goes out, a
//! chain comes back.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use mesh_proto::ca::{
    IstioCertificateRequest, IstioCertificateResponse, istio_certificate_service_client::IstioCertificateServiceClient,
};
use prost_types::{Struct, Value, value::Kind};
use rcgen::{CertificateParams, DistinguishedName, SanType};

use super::{
    BoxFuture, CertificateSource, HandshakeRules, Identity, IdentityError, WorkloadCertificate, file_ca::new_key,
};
use crate::{clock::Clock, grpc::AuthChannel};

/// How certificates are asked for.
#[derive(Clone, Debug)]
pub struct CaConfig {
    /// Lifetime asked for; the authority may give less.
    pub ttl: Duration,
    /// Whether to name the identity in the request: a node proxy asks for identities of its node's workloads, a waypoint
    /// only for its own.
    pub impersonate: bool,
}

/// One answer may take this long. The manager repeats what fails.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Fetches certificates over gRPC.
pub struct CaClient {
    client: IstioCertificateServiceClient<AuthChannel>,
    config: CaConfig,
    clock: Clock,
    rules: HandshakeRules,
}

/// A signing request and the key it belongs to.
pub struct Csr {
    pub pem: String,
    pub key_pem: String,
}

/// A fresh P-256 key and a request for `identity` as the only name, the subject left empty.
pub fn new_csr(identity: &Identity) -> Result<Csr, IdentityError> {
    let fail = |reason: String| IdentityError::Request { identity: identity.clone(), reason };
    let key = new_key()?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let uri = identity.to_string().try_into().map_err(|e: rcgen::Error| fail(e.to_string()))?;
    params.subject_alt_names = vec![SanType::URI(uri)];
    let request = params.serialize_request(&key).map_err(|e| fail(e.to_string()))?;
    Ok(Csr { pem: request.pem().map_err(|e| fail(e.to_string()))?, key_pem: key.serialize_pem() })
}

impl CaClient {
    pub fn new(channel: AuthChannel, config: CaConfig, clock: Clock) -> Self {
        Self { client: IstioCertificateServiceClient::new(channel), config, clock, rules: HandshakeRules::default() }
    }

    /// Handshakes with what it fetches go by `rules`.
    #[must_use]
    pub fn with_rules(self, rules: HandshakeRules) -> Self {
        Self { rules, ..self }
    }

    async fn create(&self, identity: &Identity) -> Result<WorkloadCertificate, IdentityError> {
        let Csr { pem: csr, key_pem } = new_csr(identity)?;
        let metadata = self.config.impersonate.then(|| Struct {
            fields: BTreeMap::from([(
                "ImpersonatedIdentity".to_owned(),
                Value { kind: Some(Kind::StringValue(identity.to_string())) },
            )]),
        });
        let validity_duration = i64::try_from(self.config.ttl.as_secs()).unwrap_or(i64::MAX);
        let request = IstioCertificateRequest { csr, validity_duration, metadata };
        let mut client = self.client.clone();
        let response = tokio::time::timeout(REQUEST_TIMEOUT, client.create_certificate(request))
            .await
            .map_err(|_| unreachable(identity, "no answer in time"))?
            .map_err(|status| classify(identity, &status))?
            .into_inner();
        from_response(identity, &response, &key_pem, &self.clock)
    }
}

/// The last element of the answer is the bundle of roots, the ones before are leaf and intermediates.
fn from_response(
    identity: &Identity,
    response: &IstioCertificateResponse,
    key_pem: &str,
    clock: &Clock,
) -> Result<WorkloadCertificate, IdentityError> {
    let refused = |reason: &str| IdentityError::Refused { identity: identity.clone(), reason: reason.to_owned() };
    let [chain @ .., roots] = response.cert_chain.as_slice() else { return Err(refused("an empty chain")) };
    if chain.is_empty() {
        return Err(refused("a chain without roots"));
    }
    let certificate = WorkloadCertificate::from_pem(&chain.join("\n"), key_pem, roots, clock)?;
    if certificate.identity() != identity {
        return Err(IdentityError::WrongIdentity { expected: identity.clone(), got: certificate.identity().clone() });
    }
    Ok(certificate)
}

fn unreachable(identity: &Identity, reason: impl ToString) -> IdentityError {
    IdentityError::Unreachable { identity: identity.clone(), reason: reason.to_string() }
}

fn classify(identity: &Identity, status: &tonic::Status) -> IdentityError {
    let reason = crate::grpc::explain(status);
    match status.code() {
        tonic::Code::Unavailable | tonic::Code::DeadlineExceeded | tonic::Code::Cancelled | tonic::Code::Unknown => {
            unreachable(identity, reason)
        }
        _ => IdentityError::Refused { identity: identity.clone(), reason },
    }
}

impl CertificateSource for CaClient {
    fn fetch<'a>(&'a self, identity: &'a Identity) -> BoxFuture<'a, Result<Arc<WorkloadCertificate>, IdentityError>> {
        Box::pin(async move { Ok(Arc::new(self.create(identity).await?.with_rules(self.rules.clone()))) })
    }
}

#[cfg(test)]
mod tests;
