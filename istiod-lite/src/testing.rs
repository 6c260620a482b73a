//! Stand-ins shared by this crate's unit tests: a pod directory, a peer that verifies a certificate, a Kubernetes API that
//! answers from a closure.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http_body_util::BodyExt as _;
use mesh_proto::enrolment::resolve_response::Verdict;
use mesh_proto::enrolment::{PodEnrolment, ResolveRequest};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use time::OffsetDateTime;
use tokio::sync::watch;

use crate::ca::authority::Issued;
use crate::placement;
use crate::resources::{Holder, Placements, PodDirectory, PodInfo, lock};

/// A pod directory told as a story. The UID of a pod is `<namespace>/<name>`.
#[derive(Debug, Default)]
pub struct Pods {
    synced: bool,
    pods: Mutex<BTreeMap<(String, String), PodInfo>>,
    /// Namespace and service account of each WorkloadEntry.
    machines: Mutex<BTreeSet<(String, String)>>,
    news: watch::Sender<u64>,
}

impl Pods {
    /// Synced and empty; `default()` is not synced.
    pub fn new() -> Self {
        Self { synced: true, ..Self::default() }
    }

    pub fn pod(self, namespace: &str, name: &str, account: &str, node: &str) -> Self {
        self.add(namespace, name, account, node, "");
        self
    }

    /// Pod `<gateway>-1` of a waypoint, running as `<gateway>`.
    pub fn waypoint(self, namespace: &str, gateway: &str, node: &str) -> Self {
        self.add(namespace, &format!("{gateway}-1"), gateway, node, gateway);
        self
    }

    fn add(&self, namespace: &str, name: &str, account: &str, node: &str, gateway: &str) {
        let info = PodInfo {
            uid: format!("{namespace}/{name}").into(),
            name: name.into(),
            namespace: namespace.into(),
            service_account: account.into(),
            node: node.into(),
            phase: "Running".into(),
            gateway: gateway.into(),
        };
        lock(&self.pods).insert((namespace.into(), name.into()), info);
        self.news.send_modify(|count| *count += 1);
    }

    /// A pod that comes while others look.
    pub fn arrive(&self, namespace: &str, name: &str, account: &str, node: &str) {
        self.add(namespace, name, account, node, "");
    }

    /// A WorkloadEntry that comes while others look.
    pub fn enter_machine(&self, namespace: &str, account: &str) {
        lock(&self.machines).insert((namespace.to_owned(), account.to_owned()));
    }

    pub fn remove_machine(&self, namespace: &str, account: &str) {
        lock(&self.machines).remove(&(namespace.to_owned(), account.to_owned()));
    }

    pub fn delete(&self, namespace: &str, name: &str) {
        lock(&self.pods).remove(&(namespace.to_owned(), name.to_owned()));
    }
}

impl PodDirectory for Pods {
    fn synced(&self) -> bool {
        self.synced
    }

    fn pod(&self, namespace: &str, name: &str) -> Option<PodInfo> {
        lock(&self.pods).get(&(namespace.to_owned(), name.to_owned())).cloned()
    }

    fn node_runs(&self, node: &str, namespace: &str, service_account: &str) -> bool {
        lock(&self.pods)
            .values()
            .any(|pod| *pod.node == *node && *pod.namespace == *namespace && *pod.service_account == *service_account)
    }

    fn holder(&self, namespace: &str, service_account: &str) -> Holder {
        let is_machines = lock(&self.machines).contains(&(namespace.to_owned(), service_account.to_owned()));
        match (is_machines, self.synced) {
            (true, _) => Holder::Somebody,
            (false, true) => Holder::Nobody,
            (false, false) => Holder::Unknown,
        }
    }
}

/// All pods are in the mesh.
impl Placements for Pods {
    fn resolve(&self, node: &str, pod: &ResolveRequest) -> Verdict {
        match self.pod(&pod.namespace, &pod.name) {
            Some(info) if *info.node == *node => {
                Verdict::Enrolment(PodEnrolment { uid: info.uid.to_string(), ..PodEnrolment::default() })
            }
            _ => placement::unknown(),
        }
    }

    fn news(&self) -> watch::Receiver<u64> {
        self.news.subscribe()
    }
}

/// Whether who trusts `roots` accepts the holder of `issued` at `now`.
pub fn accepts(roots: &str, issued: &Issued, now: OffsetDateTime) -> Result<(), rustls::Error> {
    let parse = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
    let mut store = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(roots.as_bytes()) {
        store.add(root.unwrap()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(store), provider).build().unwrap();
    let intermediates: Vec<_> = issued.intermediates.iter().map(|pem| parse(pem)).collect();
    let now = UnixTime::since_unix_epoch(Duration::from_secs(now.unix_timestamp().try_into().unwrap()));
    verifier.verify_client_cert(&parse(&issued.leaf), &intermediates, now).map(|_| ())
}

/// A `kube` client without a network.
pub struct FakeApi;

impl FakeApi {
    /// Answers each request by `answer(method, path, body) → (status, JSON)`.
    pub fn answering(
        answer: impl Fn(&str, &str, &[u8]) -> (u16, serde_json::Value) + Clone + Send + Sync + 'static,
    ) -> kube::Client {
        let service = tower::service_fn(move |request: http::Request<kube::client::Body>| {
            let answer = answer.clone();
            async move {
                let (parts, body) = request.into_parts();
                let body = body.collect().await?.to_bytes();
                let (status, json) = answer(parts.method.as_str(), parts.uri.path(), &body);
                let response = http::Response::builder()
                    .status(status)
                    .body(kube::client::Body::from(serde_json::to_vec(&json)?))?;
                Ok::<_, tower::BoxError>(response)
            }
        });
        kube::Client::new(service, "default")
    }
}
