//! A snapshot as the JSON that `/config_dump` shows and `istioctl ztunnel-config` reads.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;
use serde_json::{Map, Value};

use super::Snapshot;
use crate::model::{EndpointPorts, HealthStatus, NamespacedHostname, Service, Workload};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct EndpointDump<'a> {
    workload_uid: &'a str,
    port: &'a EndpointPorts,
    status: HealthStatus,
}

#[derive(Serialize)]
struct ServiceDump<'a> {
    #[serde(flatten)]
    service: &'a Service,
    endpoints: BTreeMap<&'a str, EndpointDump<'a>>,
}

pub(super) fn config_dump(snapshot: &Snapshot) -> Map<String, Value> {
    let indexes = &snapshot.indexes;
    let mut workloads: Vec<_> = indexes.workloads().collect();
    workloads.sort_by_key(|workload| &workload.uid);
    let mut services: Vec<_> = indexes.services.iter().collect();
    services.sort_by_key(|(key, _)| *key);
    let services: Vec<_> = services
        .into_iter()
        .map(|(key, service)| ServiceDump { service, endpoints: endpoints(snapshot, key) })
        .collect();
    let staged: BTreeMap<_, _> = indexes
        .endpoints
        .keys()
        .filter(|key| !indexes.services.contains_key(*key))
        .map(|key| (key.to_string(), endpoints(snapshot, key)))
        .collect();
    let policies: Vec<_> = indexes.policies.values().collect();
    Map::from_iter([
        ("workloads".to_owned(), value(&workloads)),
        ("services".to_owned(), value(&services)),
        ("policies".to_owned(), value(&policies)),
        ("stagedServices".to_owned(), value(&staged)),
        ("storeVersion".to_owned(), snapshot.version.into()),
    ])
}

fn endpoints<'a>(snapshot: &'a Snapshot, service: &NamespacedHostname) -> BTreeMap<&'a str, EndpointDump<'a>> {
    let dump = |(workload, port): (&'a Arc<Workload>, &'a EndpointPorts)| {
        (&*workload.uid, EndpointDump { workload_uid: &workload.uid, port, status: workload.status })
    };
    snapshot.all_endpoints(service).map(dump).collect()
}

fn value(content: &impl Serialize) -> Value {
    serde_json::to_value(content).expect("all keys of the model are strings or numbers")
}
