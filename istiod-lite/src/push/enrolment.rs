//! `EnrolmentService`: node proxies say what became of the pods they were told to capture, and ask about those whose
//! network is being made.
//!
//! Invariant: a report speaks for the node of the caller's own pod only; what it says of pods that another node was told
//! to enrol is dropped and counted. Nor does a node learn anything about pods of others.

use std::sync::Arc;
use std::time::Duration;

use mesh_proto::enrolment::enrolment_service_server::EnrolmentService;
use mesh_proto::enrolment::resolve_response::Verdict;
use mesh_proto::enrolment::{EnrolmentReport, EnrolmentReportAck, POD_ENROLMENT_TYPE, ResolveRequest, ResolveResponse};
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use super::view::Scope;
use crate::auth::Gatekeeper;
use crate::resources::{Placements, ReportSink, ResourceStore};

/// How long a pod that is not known is waited for; a container runtime waits behind it.
const PATIENCE: Duration = Duration::from_millis(1500);

/// Takes reports and answers questions.
pub struct Reports {
    pub gatekeeper: Gatekeeper,
    pub store: Arc<ResourceStore>,
    pub sink: Arc<dyn ReportSink>,
    pub placements: Arc<dyn Placements>,
}

#[tonic::async_trait]
impl EnrolmentService for Reports {
    async fn report(&self, request: Request<EnrolmentReport>) -> Result<Response<EnrolmentReportAck>, Status> {
        let client = self.gatekeeper.admit(request.metadata(), request.extensions()).await?;
        let Some(node) = client.node else {
            return Err(Status::permission_denied("only a node proxy reports enrolments"));
        };
        let snapshot = self.store.snapshot();
        if snapshot.generation() == 0 {
            return Err(Status::unavailable("the control plane has not read the cluster yet"));
        }
        let scope = Scope { node: Some(Arc::clone(&node)), waypoint: None };
        let mut states = request.into_inner().pods;
        let reported = states.len();
        // A pod nobody is to enrol at the moment may be on its way out, and come back before its node has heard that it
        // left: then there will be no other report.
        states.retain(|state| snapshot.get(POD_ENROLMENT_TYPE, &state.uid).is_none_or(|resource| scope.sees(resource)));
        let foreign = reported - states.len();
        if foreign > 0 {
            metrics::counter!("enrolment_reports_ignored_total").increment(foreign as u64);
            tracing::warn!(%node, pods = foreign, "ignored reports about pods of other nodes");
        }
        self.sink.report(&node, states);
        Ok(Response::new(EnrolmentReportAck {}))
    }

    async fn resolve(&self, request: Request<ResolveRequest>) -> Result<Response<ResolveResponse>, Status> {
        let client = self.gatekeeper.admit(request.metadata(), request.extensions()).await?;
        let Some(node) = client.node else {
            return Err(Status::permission_denied("only a node proxy asks about pods"));
        };
        let pod = request.into_inner();
        let end = Instant::now() + PATIENCE;
        let mut news = self.placements.news();
        let verdict = loop {
            news.mark_unchanged();
            let verdict = self.placements.resolve(&node, &pod);
            // Ends with the wait, or with the watch itself.
            if !matches!(verdict, Verdict::Unknown(_))
                || !tokio::time::timeout_at(end, news.changed()).await.is_ok_and(|changed| changed.is_ok())
            {
                break verdict;
            }
        };
        Ok(Response::new(ResolveResponse { verdict: Some(verdict) }))
    }
}
