//! Service account tokens, honest and forged, and what the control plane gives for them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::Api;
use kube::api::PostParams;
use mesh::clock::Clock;
use mesh::grpc::{self, AuthChannel, GrpcConfig, RootCa, TokenSource};
use mesh::identity::{CaClient, CaConfig, CertificateSource, Identity, WorkloadCertificate};
use mesh_proto::ads::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use mesh_proto::ads::{DeltaDiscoveryRequest, Node};
use mesh_proto::enrolment::enrolment_service_client::EnrolmentServiceClient;
use mesh_proto::enrolment::{EnrolmentReport, POD_ENROLMENT_TYPE};
use mesh_proto::workload::ADDRESS_TYPE;
use mesh_tests::cluster::api;
use mesh_tests::cluster::state::Pod;
use mesh_tests::sys;
use prost_types::value::Kind;
use prost_types::{Struct, Value};
use rcgen::{KeyPair, SigningKey as _};
use tokio_stream::wrappers::ReceiverStream;

use crate::support::Stage;

/// The audience the control plane asks for.
pub const AUDIENCE: &str = "istio-ca";
const PATIENCE: Duration = Duration::from_secs(8);

/// The control plane as one caller meets it.
#[derive(Clone)]
pub struct ControlPlane {
    config: GrpcConfig,
    wire: std::path::PathBuf,
}

/// Whether a certificate is asked for as oneself or as somebody else.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Asking {
    AsSelf,
    Impersonating,
}

/// A token of this service account, bound to this pod, as a kubelet would get it.
pub fn bound(stage: &Stage, pod: &Pod, account: &str, audience: &str) -> Result<String> {
    let request = TokenRequest {
        spec: TokenRequestSpec {
            audiences: vec![audience.to_owned()],
            expiration_seconds: Some(600),
            bound_object_ref: Some(BoundObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Pod".into()),
                name: Some(pod.name.clone()),
                uid: Some(pod.uid.clone()),
            }),
        },
        ..TokenRequest::default()
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let reply: TokenRequest = runtime.block_on(async {
        let client = api::client(&stage.teller.session.kubeconfig()).await?;
        let accounts: Api<ServiceAccount> = Api::namespaced(client, &pod.namespace);
        anyhow::Ok(accounts.create_subresource("token", account, &PostParams::default(), &request).await?)
    })?;
    Ok(reply.status.context("the API server gave no token")?.token)
}

/// The API server's own key for tokens.
pub fn true_key(stage: &Stage) -> Result<KeyPair> {
    let path = stage.teller.session.record.run_dir.join("api-data/service-account.key");
    let key = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(KeyPair::try_from(key)?)
}

/// The same token with other claims, signed with `key`.
pub fn resigned(token: &str, key: &KeyPair, change: impl FnOnce(&mut serde_json::Value)) -> Result<String> {
    let mut parts = token.split('.');
    let (header, claims) = (parts.next().context("no header")?, parts.next().context("no claims")?);
    let mut claims = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims)?)?;
    change(&mut claims);
    let signed = format!("{header}.{}", URL_SAFE_NO_PAD.encode(serde_json::to_vec(&claims)?));
    let signature = fixed(&key.sign(signed.as_bytes())?).context("not an ECDSA signature")?;
    Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
}

/// Seconds since 1970.
pub fn now() -> Result<u64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())
}

/// A DER signature as two numbers of 32 bytes, which is what JWTs carry.
fn fixed(der: &[u8]) -> Option<Vec<u8>> {
    let [0x30, _, rest @ ..] = der else { return None };
    let mut rest = rest;
    let mut out = Vec::with_capacity(64);
    for _ in 0..2 {
        let [0x02, length, tail @ ..] = rest else { return None };
        let (number, tail) = tail.split_at_checked(usize::from(*length))?;
        let digits: Vec<u8> = number.iter().copied().skip_while(|byte| *byte == 0).collect();
        out.resize(out.len() + 32usize.checked_sub(digits.len())?, 0);
        out.extend(digits);
        rest = tail;
    }
    Some(out)
}

impl ControlPlane {
    /// As the holder of `token`.
    pub fn with_token(stage: &Stage, token: &str) -> Result<Self> {
        let istiod = stage.teller.session.pod("istio-system/istiod")?;
        let ip = istiod.addresses.first().context("istiod has no address")?;
        let root = stage.kubectl(&[
            "-n",
            "shop",
            "get",
            "configmap",
            "istio-ca-root-cert",
            "-o",
            "jsonpath={.data.root-cert\\.pem}",
        ])?;
        let config = GrpcConfig {
            address: format!("{ip}:15012"),
            root_ca: RootCa::Pem(root),
            token: TokenSource::Literal(token.to_owned()),
            headers: Vec::new(),
            cluster_id: "Kubernetes".into(),
            alt_hostname: Some("istiod.istio-system.svc".into()),
            dialer: mesh::grpc::Dialer::default(),
        };
        Ok(Self { config, wire: stage.teller.session.wire().path() })
    }

    /// Speaks to it from the network between the nodes.
    fn speak<T: Send + 'static>(
        &self,
        speech: impl AsyncFnOnce(AuthChannel) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let config = self.config.clone();
        sys::in_netns(&self.wire, move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let channel = grpc::channel(config)?;
                tokio::time::timeout(PATIENCE, speech(channel)).await.context("the control plane does not answer")?
            })
        })
    }

    /// Asks for a certificate. The error is what a caller would see.
    pub fn certificate(&self, identity: &str, asking: Asking) -> Result<Arc<WorkloadCertificate>> {
        let identity: Identity = identity.parse()?;
        self.speak(async move |channel| {
            let config = CaConfig { ttl: Duration::from_secs(600), impersonate: asking == Asking::Impersonating };
            Ok(CaClient::new(channel, config, Clock::system()).fetch(&identity).await?)
        })
    }

    /// UIDs of the pods it would have us capture when we call ourselves `node` and ask for everything and for `also`.
    pub fn enrolments(&self, node: &str, also: &[String]) -> Result<BTreeSet<String>> {
        let text = |text: &str| Value { kind: Some(Kind::StringValue(text.to_owned())) };
        let metadata = Struct {
            fields: [("NODE_NAME", node), ("NAMESPACE", "istio-system")]
                .map(|(key, value)| (key.to_owned(), text(value)))
                .into(),
        };
        let node = Node { id: format!("ztunnel~10.0.0.1~x.{node}"), metadata: Some(metadata), ..Node::default() };
        let mut names = vec!["*".to_owned()];
        names.extend(also.iter().cloned());
        let ask = |type_url: &str, names: Vec<String>| DeltaDiscoveryRequest {
            node: Some(node.clone()),
            type_url: type_url.into(),
            resource_names_subscribe: names,
            ..DeltaDiscoveryRequest::default()
        };
        // Answers come in the order of requests: after the second nothing of the first is to come.
        let requests = [ask(POD_ENROLMENT_TYPE, names), ask(ADDRESS_TYPE, vec!["*".into()])];
        self.speak(async move |channel| {
            let (sender, outgoing) = tokio::sync::mpsc::channel(2);
            for request in requests {
                sender.send(request).await?;
            }
            let mut client = AggregatedDiscoveryServiceClient::new(channel);
            let mut responses = client.delta_aggregated_resources(ReceiverStream::new(outgoing)).await?.into_inner();
            let mut found = BTreeSet::new();
            while let Some(response) = responses.message().await? {
                match response.type_url.as_str() {
                    POD_ENROLMENT_TYPE => found.extend(response.resources.into_iter().map(|resource| resource.name)),
                    _ => return Ok(found),
                }
            }
            bail!("the stream ended early")
        })
    }

    /// Reports that nothing is enrolled.
    pub fn report(&self) -> Result<()> {
        self.speak(async |channel| {
            EnrolmentServiceClient::new(channel).report(EnrolmentReport::default()).await?;
            Ok(())
        })
    }
}
