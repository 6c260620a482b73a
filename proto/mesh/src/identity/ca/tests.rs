use std::{net::SocketAddr, path::Path, sync::Mutex};

use mesh_proto::ca::istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer};
use rcgen::{CertificateSigningRequestParams, KeyPair};
use tonic::{
    Request, Response, Status,
    transport::{Identity as ServerIdentity, Server, ServerTlsConfig},
};

use super::*;
use crate::{
    grpc::{self, GrpcConfig, RootCa, TokenSource},
    identity::FileCa,
};

const TTL: Duration = Duration::from_secs(3600);

/// What the authority saw of a request.
#[derive(Clone, Debug, Default, PartialEq)]
struct Seen {
    authorization: String,
    cluster: String,
    impersonated: Option<String>,
    seconds: i64,
    names: Vec<SanType>,
}

/// Signs whatever name the request asks for with `issues`, as a control plane would after its checks.
struct Authority {
    ca: FileCa,
    seen: Arc<Mutex<Vec<Seen>>>,
    answer: fn(&FileCa, &Identity, String) -> Result<Vec<String>, Status>,
}

#[tonic::async_trait]
impl IstioCertificateService for Authority {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let header = |name: &str| request.metadata().get(name).and_then(|v| v.to_str().ok()).unwrap_or("").to_owned();
        let (authorization, cluster) = (header("authorization"), header("clusterid"));
        let message = request.into_inner();
        let csr = CertificateSigningRequestParams::from_pem(&message.csr)
            .map_err(|e| Status::invalid_argument(e.to_string()))?;
        let impersonated = message.metadata.and_then(|m| match m.fields.get("ImpersonatedIdentity")?.kind.clone()? {
            Kind::StringValue(text) => Some(text),
            _ => None,
        });
        let names = csr.params.subject_alt_names.clone();
        let Some(SanType::URI(uri)) = names.first().cloned() else { return Err(Status::invalid_argument("no URI")) };
        let identity: Identity = uri.as_str().parse().map_err(|_| Status::invalid_argument("no identity"))?;
        let seconds = message.validity_duration;
        self.seen.lock().unwrap().push(Seen { authorization, cluster, impersonated, seconds, names });
        let leaf = self.ca.sign_csr_pem(&message.csr, &identity).map_err(|e| Status::internal(e.to_string()))?;
        Ok(Response::new(IstioCertificateResponse { cert_chain: (self.answer)(&self.ca, &identity, leaf)? }))
    }
}

struct World {
    addr: SocketAddr,
    /// Of the control plane's own certificate.
    serving_root: String,
    seen: Arc<Mutex<Vec<Seen>>>,
}

async fn world(answer: fn(&FileCa, &Identity, String) -> Result<Vec<String>, Status>) -> World {
    let serving_key = KeyPair::generate().unwrap();
    let serving = CertificateParams::new(["istiod.test".to_owned()]).unwrap().self_signed(&serving_key).unwrap();
    let tls = ServerTlsConfig::new().identity(ServerIdentity::from_pem(serving.pem(), serving_key.serialize_pem()));
    let ca = FileCa::generate("td", TTL, Clock::system()).unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let service = IstioCertificateServiceServer::new(Authority { ca, seen: seen.clone(), answer });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    // Ends with the runtime of the test.
    tokio::spawn(Server::builder().tls_config(tls).unwrap().add_service(service).serve_with_incoming(incoming));
    World { addr, serving_root: serving.pem(), seen }
}

impl World {
    fn client(&self, root_ca: RootCa, alt_hostname: Option<&str>, impersonate: bool) -> CaClient {
        let channel = grpc::channel(GrpcConfig {
            address: self.addr.to_string(),
            root_ca,
            token: TokenSource::Literal("secret".into()),
            headers: vec![("x-extra".into(), "1".into())],
            cluster_id: "Kubernetes".into(),
            alt_hostname: alt_hostname.map(str::to_owned),
            dialer: grpc::Dialer::default(),
        })
        .unwrap();
        CaClient::new(channel, CaConfig { ttl: TTL, impersonate }, Clock::system())
    }

    fn trusting_client(&self) -> CaClient {
        self.client(RootCa::Pem(self.serving_root.clone()), Some("istiod.test"), true)
    }
}

fn identity() -> Identity {
    "spiffe://td/ns/shop/sa/cart".parse().unwrap()
}

fn good(ca: &FileCa, _: &Identity, leaf: String) -> Result<Vec<String>, Status> {
    Ok(vec![leaf, ca.root_pem().to_owned()])
}

#[tokio::test]
async fn a_certificate_comes_for_exactly_the_name_asked_for() {
    let world = world(good).await;
    let certificate = world.trusting_client().fetch(&identity()).await.unwrap();
    assert_eq!(certificate.identity(), &identity());
    assert_eq!((certificate.chain().len(), certificate.roots().len()), (1, 1));
    let uri = SanType::URI(identity().to_string().try_into().unwrap());
    let wanted = Seen {
        authorization: "Bearer secret".into(),
        cluster: "Kubernetes".into(),
        impersonated: Some(identity().to_string()),
        seconds: 3600,
        names: vec![uri],
    };
    assert_eq!(*world.seen.lock().unwrap(), [wanted]);
}

#[tokio::test]
async fn a_waypoint_names_nobody_else() {
    let world = world(good).await;
    let client = world.client(RootCa::Pem(world.serving_root.clone()), Some("istiod.test"), false);
    client.fetch(&identity()).await.unwrap();
    assert_eq!(world.seen.lock().unwrap()[0].impersonated, None);
}

#[tokio::test]
async fn the_control_plane_must_prove_its_name_and_root() {
    let world = world(good).await;
    let nameless = world.client(RootCa::Pem(world.serving_root.clone()), None, true);
    let error = nameless.fetch(&identity()).await.unwrap_err();
    assert!(matches!(error, IdentityError::Unreachable { .. }), "{error}");

    let other = FileCa::generate("td", TTL, Clock::system()).unwrap();
    let mistrusting = world.client(RootCa::Pem(other.root_pem().into()), Some("istiod.test"), true);
    let error = mistrusting.fetch(&identity()).await.unwrap_err();
    assert!(matches!(error, IdentityError::Unreachable { .. }), "{error}");
    assert!(world.seen.lock().unwrap().is_empty(), "no token goes to a stranger");
}

#[tokio::test]
async fn a_root_file_that_comes_late_is_taken_up() {
    let world = world(good).await;
    let dir = tempfile::tempdir().unwrap();
    let path: &Path = &dir.path().join("root-cert.pem");
    let client = world.client(RootCa::Path(path.into()), Some("istiod.test"), true);
    let error = client.fetch(&identity()).await.unwrap_err();
    assert!(error.to_string().contains("root-cert.pem"), "{error}");
    std::fs::write(path, &world.serving_root).unwrap();
    client.fetch(&identity()).await.expect("the file is there now");
}

#[tokio::test]
async fn answers_that_do_not_fit_are_refused() {
    let fetch = async |answer| world(answer).await.trusting_client().fetch(&identity()).await.unwrap_err();
    let refused = fetch(|_, _, _| Err(Status::unauthenticated("no such pod"))).await;
    assert!(matches!(&refused, IdentityError::Refused { reason, .. } if reason.contains("no such pod")), "{refused}");
    let rootless = fetch(|_, _, leaf| Ok(vec![leaf])).await;
    assert!(matches!(rootless, IdentityError::Refused { .. }), "{rootless}");
    let empty = fetch(|_, _, _| Ok(vec![])).await;
    assert!(matches!(empty, IdentityError::Refused { .. }), "{empty}");
    let foreign = fetch(|ca, _, _| {
        let other = ca.sign_pem(&Identity::new("td", "shop", "thief").unwrap()).unwrap().0;
        Ok(vec![other, ca.root_pem().to_owned()])
    })
    .await;
    assert!(matches!(foreign, IdentityError::Malformed(_)), "not our key: {foreign}");
    let garbage = fetch(|_, _, _| Ok(vec!["garbage".into(), "garbage".into()])).await;
    assert!(matches!(garbage, IdentityError::Malformed(_)), "{garbage}");
}
