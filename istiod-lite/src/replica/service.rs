//! `ReplicaService`: answers other replicas about the clients of this one.
//!
//! Invariant: nobody but the control plane's own service account is answered, and by a token only: who refuses what, and
//! with which words, is nobody else's business.

use std::sync::Arc;
use std::time::Duration;

use mesh_proto::replica::replica_service_server::ReplicaService;
use mesh_proto::replica::{AcknowledgedRequest, AcknowledgedResponse, PartedRequest, PartedResponse, Refusal};
use mesh_proto::workload::{ADDRESS_TYPE, Address, TunnelProtocol, address};
use prost::Message as _;
use tonic::metadata::MetadataMap;
use tonic::{Extensions, Request, Response, Status};

use super::{POLICY_TYPES, contents};
use crate::auth::{Gatekeeper, Proof};
use crate::resources::{Acks, ResourceStore, Snapshot};

/// Nobody waits longer for an answer; a caller that has gone is noticed earlier.
const PATIENCE: Duration = Duration::from_secs(30);

/// The service account of the control plane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    pub namespace: String,
    pub name: String,
}

/// Answers.
pub struct Replica {
    pub gatekeeper: Gatekeeper,
    pub store: Arc<ResourceStore>,
    pub acks: Arc<Acks>,
    pub account: Account,
}

impl Replica {
    async fn admit(&self, metadata: &MetadataMap, extensions: &Extensions) -> Result<(), Status> {
        let caller = self.gatekeeper.admit(metadata, extensions).await?.caller;
        let is_ours = *caller.namespace == *self.account.namespace && *caller.service_account == *self.account.name;
        // Replicas have tokens. A certificate of their account is also what a node proxy asks for on their behalf.
        if is_ours && caller.proof == Proof::Token {
            return Ok(());
        }
        tracing::warn!(
            namespace = %caller.namespace, account = %caller.service_account, proof = caller.proof.name(),
            "not a replica of this control plane"
        );
        Err(Status::permission_denied("only another replica asks this"))
    }

    /// Waits for resources of which `is_so` is true. Returns a generation that holds them.
    async fn generation(&self, is_so: impl Fn(&Snapshot) -> bool) -> Result<u64, Status> {
        let mut generations = self.store.subscribe();
        loop {
            generations.mark_unchanged();
            let snapshot = self.store.snapshot();
            // 0: nothing is known yet, and whoever is connected has been told nothing by this process.
            if snapshot.generation() > 0 && is_so(&snapshot) {
                return Ok(snapshot.generation());
            }
            generations.changed().await.map_err(|_| Status::unavailable("the control plane is shutting down"))?;
        }
    }

    /// Waits for our clients to acknowledge `generation` of these types.
    async fn all_have(&self, types: &[&str], generation: u64) -> Result<(), Status> {
        for type_url in types {
            if !self.acks.wait_acked(type_url, generation, PATIENCE).await {
                return Err(Status::deadline_exceeded("some proxies have not acknowledged it"));
            }
        }
        Ok(())
    }

    fn refusals(&self) -> Vec<Refusal> {
        // Hardly ever any: then there is nothing to look through.
        if !self.acks.any_refused() {
            return Vec::new();
        }
        let snapshot = self.store.snapshot();
        let names = POLICY_TYPES.into_iter().flat_map(|type_url| {
            snapshot.of_type(type_url).map(move |resource| (type_url, Arc::clone(&resource.name)))
        });
        let refused = names.filter_map(|(type_url, name)| {
            let (proxies, reason) = self.acks.refused(type_url, &name)?;
            let proxies = u32::try_from(proxies).unwrap_or(u32::MAX);
            Some(Refusal { type_url: type_url.to_owned(), name: name.to_string(), proxies, reason })
        });
        refused.collect()
    }
}

#[tonic::async_trait]
impl ReplicaService for Replica {
    async fn acknowledged(
        &self,
        request: Request<AcknowledgedRequest>,
    ) -> Result<Response<AcknowledgedResponse>, Status> {
        self.admit(request.metadata(), request.extensions()).await?;
        let wanted = request.into_inner().contents;
        let types: Vec<&str> = wanted.iter().map(|content| &*content.type_url).collect();
        if !types.iter().all(|type_url| POLICY_TYPES.contains(type_url)) || types.len() > POLICY_TYPES.len() {
            return Err(Status::invalid_argument("policies are asked about, each type once"));
        }
        let found = self.generation(|snapshot| contents(snapshot, &types) == wanted);
        let generation = within(found, "others than these resources are here").await?;
        self.all_have(&types, generation).await?;
        Ok(Response::new(AcknowledgedResponse { refusals: self.refusals() }))
    }

    async fn parted(&self, request: Request<PartedRequest>) -> Result<Response<PartedResponse>, Status> {
        self.admit(request.metadata(), request.extensions()).await?;
        let workloads = request.into_inner().workloads;
        let all_parted = |snapshot: &Snapshot| workloads.iter().all(|name| !speaks_hbone(snapshot, name));
        let generation = within(self.generation(all_parted), "some of these speak HBONE here").await?;
        self.all_have(&[ADDRESS_TYPE], generation).await?;
        Ok(Response::new(PartedResponse {}))
    }
}

async fn within<T>(found: impl Future<Output = Result<T, Status>>, late: &'static str) -> Result<T, Status> {
    tokio::time::timeout(PATIENCE, found).await.unwrap_or_else(|_| Err(Status::deadline_exceeded(late)))
}

/// Whether peers are told that this workload does.
pub fn speaks_hbone(snapshot: &Snapshot, name: &str) -> bool {
    let address = snapshot.get(ADDRESS_TYPE, name).map(|resource| Address::decode(resource.message().reader()));
    match address {
        Some(Ok(Address { r#type: Some(address::Type::Workload(workload)) })) => {
            workload.tunnel_protocol() == TunnelProtocol::Hbone
        }
        // Nobody connects to what is not there.
        _ => false,
    }
}
