//! How workloads and services are spoken of: in telemetry, and in what proxies tell each other.

use super::{Service, Workload, WorkloadType};
use crate::{
    hbone::Baggage,
    identity::Identity,
    telemetry::access::{Party, ServiceLabels},
    text::Text,
};

fn given(text: &Text) -> Option<Text> {
    (!text.is_empty()).then(|| text.clone())
}

impl WorkloadType {
    /// As in `k8s.<type>.name`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Deployment => "deployment",
            Self::CronJob => "cronjob",
            Self::Pod => "pod",
            Self::Job => "job",
        }
    }
}

impl Workload {
    /// How telemetry names it; `principal` only where TLS proves it.
    pub fn party(&self, principal: Option<&Identity>) -> Party {
        Party {
            workload: given(&self.workload_name),
            pod: given(&self.name),
            namespace: given(&self.namespace),
            canonical_service: given(&self.canonical_name),
            canonical_revision: given(&self.canonical_revision),
            cluster: given(&self.cluster_id),
            principal: principal.map(|identity| identity.to_string().into()),
            region: given(&self.locality.region),
            zone: given(&self.locality.zone),
        }
    }

    /// What a CONNECT or its answer says about it.
    pub fn baggage(&self) -> Baggage {
        Baggage {
            cluster: given(&self.cluster_id),
            namespace: given(&self.namespace),
            workload_type: Some(self.workload_type.as_str().into()),
            workload: given(&self.workload_name),
            service: given(&self.canonical_name),
            revision: given(&self.canonical_revision),
            region: given(&self.locality.region),
            zone: given(&self.locality.zone),
        }
    }
}

impl Baggage {
    /// How telemetry names a workload that has said this of itself and proved to be `identity`, which has the last word.
    pub fn party(self, identity: &Identity) -> Party {
        Party {
            workload: self.workload,
            pod: None,
            namespace: Some(identity.namespace().clone()),
            canonical_service: self.service,
            canonical_revision: self.revision,
            cluster: self.cluster,
            principal: Some(identity.to_string().into()),
            region: self.region,
            zone: self.zone,
        }
    }
}

impl Service {
    /// How telemetry names it.
    pub fn labels(&self) -> ServiceLabels {
        ServiceLabels { hostname: self.hostname.clone(), namespace: self.namespace.clone(), name: self.name.clone() }
    }
}
