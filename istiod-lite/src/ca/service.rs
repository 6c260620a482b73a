//! `IstioCertificateService`: who may have a certificate for which identity.
//!
//! A caller gets its own identity. A trusted node account (a ztunnel) also gets the identities of pods that run on the
//! node of the very pod its token is bound to, and no others. Who comes with a certificate in place of a token, as machines
//! outside the cluster do, gets the same identity again, while a WorkloadEntry has it. Pods have tokens: a node has the
//! certificates of all its pods, and must not keep them alive by themselves once the pods have gone elsewhere.

use std::sync::Arc;

use mesh::clock::Clock;
use mesh::identity::Identity;
use mesh_proto::ca::istio_certificate_service_server::IstioCertificateService;
use mesh_proto::ca::{IstioCertificateRequest, IstioCertificateResponse};
use prost_types::value::Kind;
use time::OffsetDateTime;
use tonic::{Request, Response, Status};

use super::CurrentAuthority;
use super::authority::{LeafLifetime, SignError};
use crate::auth::{Client, Gatekeeper, Proof};
use crate::resources::Holder;

/// Of what a caller asks to be, in bytes: so much is told.
const SHOWN: usize = 512;
/// Request metadata that names the workload a node proxy asks for.
const IMPERSONATED: &str = "ImpersonatedIdentity";

/// Answers CreateCertificate.
pub struct CertificateService {
    pub gatekeeper: Gatekeeper,
    pub authority: Arc<CurrentAuthority>,
    pub trust_domain: Arc<str>,
    pub lifetime: LeafLifetime,
    pub clock: Clock,
}

/// Why a caller does not get the identity it asked for.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
enum Refusal {
    #[error("`{0}` is not a SPIFFE identity")]
    NotAnIdentity(String),
    #[error("the identity belongs to another trust domain")]
    ForeignTrustDomain,
    #[error("the caller is no trusted node account with a running pod")]
    NotANode,
    #[error("no pod with that identity runs on the caller's node")]
    NotOnNode,
    #[error("no WorkloadEntry names the identity of the certificate")]
    NoMachine,
    #[error("whether a WorkloadEntry names the identity of the certificate is not known yet")]
    NotYetKnown,
}

impl Refusal {
    /// What the caller is told: no reasons, as they help whoever tries.
    fn status(&self) -> Status {
        match self {
            Self::NotAnIdentity(_) | Self::ForeignTrustDomain | Self::NotANode | Self::NotOnNode => {
                Status::unauthenticated("request impersonation authentication failure")
            }
            Self::NoMachine => Status::unauthenticated("authentication failure"),
            Self::NotYetKnown => Status::unavailable("the control plane has not read the cluster yet"),
        }
    }
}

impl CertificateService {
    fn identity(&self, client: &Client, request: &IstioCertificateRequest) -> Result<Identity, Refusal> {
        let Some(wanted) = impersonated(request) else {
            let (namespace, account) = (&client.caller.namespace, &client.caller.service_account);
            // A certificate could otherwise renew itself for ever, wherever it has got to.
            if let Proof::Certificate(_) = client.caller.proof {
                match self.gatekeeper.pods.holder(namespace, account) {
                    Holder::Somebody => {}
                    Holder::Nobody => return Err(Refusal::NoMachine),
                    Holder::Unknown => return Err(Refusal::NotYetKnown),
                }
            }
            return Identity::new(&self.trust_domain, namespace, account)
                .map_err(|error| Refusal::NotAnIdentity(error.to_string()));
        };
        let identity: Identity = wanted.parse().map_err(|_| Refusal::NotAnIdentity(shown(wanted).to_owned()))?;
        if **identity.trust_domain() != *self.trust_domain {
            return Err(Refusal::ForeignTrustDomain);
        }
        let node = client.node.as_deref().ok_or(Refusal::NotANode)?;
        if !self.gatekeeper.pods.node_runs(node, identity.namespace(), identity.service_account()) {
            return Err(Refusal::NotOnNode);
        }
        Ok(identity)
    }
}

#[tonic::async_trait]
impl IstioCertificateService for CertificateService {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        metrics::counter!("citadel_server_csr_count").increment(1);
        let client = self.gatekeeper.admit(request.metadata(), request.extensions()).await?;
        let request = request.get_ref();
        let caller = &client.caller;
        let identity = self.identity(&client, request).map_err(|refusal| {
            metrics::counter!("citadel_server_authentication_failure_count").increment(1);
            tracing::warn!(
                namespace = %caller.namespace, service_account = %caller.service_account, pod = ?caller.pod,
                proof = caller.proof.name(), node = ?client.node, wanted = ?impersonated(request).map(shown), %refusal,
                "certificate refused"
            );
            refusal.status()
        })?;
        let uri = identity.to_string();
        let now = OffsetDateTime::from(self.clock.now());
        let issued = self
            .authority
            .sign(&request.csr, &uri, request.validity_duration, self.lifetime, now)
            .map_err(|error| refuse_signing(&uri, &error))?;
        metrics::counter!("citadel_server_success_cert_issuance_count").increment(1);
        tracing::debug!(identity = %uri, not_after = %issued.not_after, "certificate signed");
        Ok(Response::new(IstioCertificateResponse { cert_chain: issued.into_cert_chain() }))
    }
}

fn impersonated(request: &IstioCertificateRequest) -> Option<&str> {
    match request.metadata.as_ref()?.fields.get(IMPERSONATED)?.kind.as_ref()? {
        Kind::StringValue(text) if !text.is_empty() => Some(text),
        _ => None,
    }
}

fn shown(text: &str) -> &str {
    &text[..text.floor_char_boundary(SHOWN)]
}

fn refuse_signing(identity: &str, error: &SignError) -> Status {
    tracing::warn!(identity, %error, "certificate signing request refused");
    match error {
        SignError::Unparsable(_) | SignError::BadSignature | SignError::UnsupportedKey => {
            metrics::counter!("citadel_server_csr_parsing_err_count").increment(1);
            Status::invalid_argument(error.to_string())
        }
        SignError::LifetimeTooLong { .. } => {
            metrics::counter!("citadel_server_csr_sign_err_count").increment(1);
            Status::invalid_argument(error.to_string())
        }
        SignError::CaExpired | SignError::Signing(_) => {
            metrics::counter!("citadel_server_csr_sign_err_count").increment(1);
            Status::internal(error.to_string())
        }
    }
}
