//! Callers with a certificate of the mesh in place of a token.

use mesh_proto::replica::replica_service_client::ReplicaServiceClient;
use mesh_proto::replica::{AcknowledgedRequest, PartedRequest};
use rcgen::{
    BasicConstraints, CertificateRevocationListParams, IsCa, Issuer, KeyIdMethod, RevokedCertParams, SanType,
    SerialNumber,
};
use rustls::AlertDescription;
use rustls::pki_types::PrivateKeyDer;
use tokio_rustls::TlsConnector;

use super::*;
use crate::ca::authority::Subject;

const BILLING: &str = "spiffe://cluster.local/ns/shop/sa/billing";
const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";
const DAY: Duration = Duration::from_secs(24 * 3600);

/// A certificate and its key, PEM.
struct Shown {
    chain: String,
    key: String,
}

fn new_authority(name: &str) -> (CaMaterial, Arc<Authority>) {
    let material = Authority::self_signed(name, SELF_SIGNED_ROOT_TTL, OffsetDateTime::now_utc()).unwrap();
    let authority = Arc::new(Authority::from_material(&material).unwrap());
    (material, authority)
}

/// As the authority signs for identities.
fn issued(by: &Authority, identity: &str, ttl: Duration, now: OffsetDateTime) -> Shown {
    let key = KeyPair::generate().unwrap();
    let issued = by.issue(&key, &Subject::Spiffe(identity), ttl, now).unwrap();
    Shown { chain: issued.leaf + &issued.intermediates.concat(), key: key.serialize_pem() }
}

fn issuer(material: &CaMaterial) -> Issuer<'static, KeyPair> {
    Issuer::from_ca_cert_pem(&material.certificate, KeyPair::from_pem(&material.key).unwrap()).unwrap()
}

/// As it never signs.
fn forged(material: &CaMaterial, names: Vec<SanType>, is_ca: IsCa) -> Shown {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names = names;
    params.is_ca = is_ca;
    Shown { chain: params.signed_by(&key, &issuer(material)).unwrap().pem(), key: key.serialize_pem() }
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

/// A list of the authority with this certificate on it.
fn list(material: &CaMaterial, revoked: &Shown) -> Arc<str> {
    let now = OffsetDateTime::now_utc();
    let (_, pem) = x509_parser::pem::parse_x509_pem(revoked.chain.as_bytes()).unwrap();
    let serial_number = SerialNumber::from_slice(pem.parse_x509().unwrap().raw_serial());
    let params = CertificateRevocationListParams {
        this_update: now,
        next_update: now + DAY,
        crl_number: SerialNumber::from(1u64),
        issuing_distribution_point: None,
        revoked_certs: vec![RevokedCertParams {
            serial_number,
            revocation_time: now,
            reason_code: None,
            invalidity_date: None,
        }],
        key_identifier_method: KeyIdMethod::Sha256,
    };
    params.signed_by(&issuer(material)).unwrap().pem().unwrap().into()
}

/// One client's TLS settings, with the sessions that it remembers.
fn connector(roots: &str, shown: &Shown) -> TlsConnector {
    let mut trusted = rustls::RootCertStore::empty();
    trusted.add_parsable_certificates(CertificateDer::pem_slice_iter(roots.as_bytes()).map(Result::unwrap));
    let chain = CertificateDer::pem_slice_iter(shown.chain.as_bytes()).collect::<Result<Vec<_>, _>>().unwrap();
    let key = PrivateKeyDer::from_pem_slice(shown.key.as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let mut config = config.with_root_certificates(trusted).with_client_auth_cert(chain, key).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    TlsConnector::from(Arc::new(config))
}

impl World {
    fn issue(&self, identity: &str) -> Shown {
        issued(&self.authority.load(), identity, DAY, OffsetDateTime::now_utc())
    }

    /// What the server's first bytes of HTTP/2 tell: it is through the handshake. Otherwise the alert.
    async fn shake_hands(&self, client: &TlsConnector) -> Result<(), AlertDescription> {
        let exchange = async {
            let stream = TcpStream::connect(self.grpc).await?;
            let mut stream = client.connect(SERVER_NAME.try_into().unwrap(), stream).await?;
            stream.read_exact(&mut [0; 9]).await.map(drop)
        };
        let error = match timeout(PATIENCE, exchange).await.expect("in time") {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        match error.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>()) {
            Some(rustls::Error::AlertReceived(alert)) => Err(*alert),
            _ => panic!("{error:?}"),
        }
    }

    /// A connection with a certificate, by who trusts `roots`.
    async fn channel_showing(&self, roots: &str, shown: &Shown) -> Channel {
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(roots))
            .identity(tonic::transport::Identity::from_pem(&shown.chain, &shown.key))
            .domain_name(SERVER_NAME);
        let endpoint = Endpoint::from_shared(format!("https://{}", self.grpc)).unwrap().tls_config(tls).unwrap();
        endpoint.connect().await.expect("the handshake asks for no more than a good certificate")
    }

    async fn showing(&self, shown: &Shown) -> Channel {
        self.channel_showing(&self.roots, shown).await
    }
}

async fn sign(
    channel: &Channel,
    request: impl tonic::IntoRequest<IstioCertificateRequest>,
) -> Result<IstioCertificateResponse, Status> {
    let mut client = IstioCertificateServiceClient::new(channel.clone());
    client.create_certificate(request).await.map(tonic::Response::into_inner)
}

async fn discover(channel: &Channel) -> Result<Stream, Status> {
    let (send, requests) = mpsc::channel(16);
    let mut client = AggregatedDiscoveryServiceClient::new(channel.clone());
    let responses = client.delta_aggregated_resources(ReceiverStream::new(requests)).await?.into_inner();
    Ok(Stream { send, responses })
}

/// That this connection's certificate says nobody's name.
async fn assert_unauthenticated(channel: &Channel, what: &str) {
    assert_eq!(sign(channel, certificate_request(None)).await.unwrap_err().code(), Code::Unauthenticated, "{what}");
    assert_eq!(discover(channel).await.err().unwrap().code(), Code::Unauthenticated, "{what}");
}

#[tokio::test]
async fn a_machine_renews_its_certificate_by_itself_and_hears_of_the_mesh() {
    let world = World::ready().await;
    world.pods.enter_machine("shop", "billing");
    let first = world.issue(BILLING);
    let channel = world.showing(&first).await;
    let renewed = sign(&channel, certificate_request(None)).await.unwrap();
    assert_eq!(identity_of(&renewed), BILLING);
    assert_eq!(renewed.cert_chain.last(), Some(&world.roots));

    let mut stream = discover(&channel).await.unwrap();
    assert_eq!(names(&stream.ask(request(ADDRESS_TYPE)).await), ["cart", "db"]);
    assert_eq!(names(&stream.ask(request(AUTHORIZATION_TYPE)).await), [""; 0]);
    assert_eq!(names(&stream.ask(request(POD_ENROLMENT_TYPE)).await), [""; 0]);
}

#[tokio::test]
async fn a_certificate_is_no_node_no_waypoint_no_replica_and_nobody_else() {
    let world = World::ready().await;
    world.pods.arrive("istio-system", "istiod-2", "istiod", "node-b");
    for identity in
        [CART, "spiffe://cluster.local/ns/istio-system/sa/ztunnel", "spiffe://cluster.local/ns/istio-system/sa/istiod"]
    {
        let channel = world.showing(&world.issue(identity)).await;
        for wanted in [CART, "spiffe://cluster.local/ns/shop/sa/db", identity] {
            let refused = sign(&channel, certificate_request(Some(wanted))).await.unwrap_err();
            assert_eq!(refused.code(), Code::Unauthenticated, "{identity} {wanted}");
        }
        let mut stream = discover(&channel).await.unwrap();
        assert_eq!(names(&stream.ask(request(POD_ENROLMENT_TYPE)).await), [""; 0], "{identity}");

        let mut enrolment = EnrolmentServiceClient::new(channel.clone());
        let pods = vec![PodState { uid: "shop/cart".into(), ..PodState::default() }];
        let refused = enrolment.report(EnrolmentReport { pods }).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{identity}");
        let asked = ResolveRequest { namespace: "shop".into(), name: "cart".into(), uid: "shop/cart".into() };
        assert_eq!(enrolment.resolve(asked).await.unwrap_err().code(), Code::PermissionDenied, "{identity}");

        let mut replica = ReplicaServiceClient::new(channel.clone());
        let refused = replica.acknowledged(AcknowledgedRequest::default()).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{identity}");
        let refused = replica.parted(PartedRequest::default()).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{identity}");
    }
    assert!(lock(&world.heard.reports).is_empty());
}

#[tokio::test]
async fn a_certificate_that_is_not_good_ends_the_handshake_with_an_alert() {
    let world = World::ready().await;
    let shake_hands = async |shown: &Shown| world.shake_hands(&connector(&world.roots, shown)).await;
    assert_eq!(shake_hands(&world.issue(CART)).await, Ok(()));

    let authority = world.authority.load();
    // The root is two minutes older than now.
    let ended = issued(&authority, CART, Duration::from_secs(1), OffsetDateTime::now_utc() - Duration::from_secs(60));
    assert_eq!(shake_hands(&ended).await, Err(AlertDescription::CertificateExpired));
    let (stranger, theirs) = new_authority("elsewhere");
    let of_stranger = issued(&theirs, CART, DAY, OffsetDateTime::now_utc());
    assert_eq!(shake_hands(&of_stranger).await, Err(AlertDescription::UnknownCA));
    let own_root = Shown { chain: stranger.certificate.clone(), key: stranger.key.clone() };
    assert!(shake_hands(&own_root).await.is_err());
    let authority_itself = IsCa::Ca(BasicConstraints::Unconstrained);
    assert!(shake_hands(&forged(&world.material, vec![uri(CART)], authority_itself)).await.is_err());
    // Whoever shows none is asked for a token, as ever.
    world.sign("shop/cart", certificate_request(None)).await.unwrap();
}

#[tokio::test]
async fn a_revoked_certificate_ends_the_handshake_and_renews_nothing_over_a_connection_from_before() {
    let world = World::ready().await;
    world.pods.enter_machine("shop", "cart");
    let (revoked, other) = (world.issue(CART), world.issue(CART));
    let client = connector(&world.roots, &revoked);
    world.shake_hands(&client).await.unwrap();
    let before = world.showing(&revoked).await;
    sign(&before, certificate_request(None)).await.unwrap();

    world.authority.replace(world.authority.load(), Some(list(&world.material, &revoked)));
    // The same client, which would resume its session if it could.
    assert_eq!(world.shake_hands(&client).await, Err(AlertDescription::CertificateRevoked));
    assert_unauthenticated(&before, "revoked").await;
    sign(&world.showing(&other).await, certificate_request(None)).await.unwrap();

    world.authority.replace(world.authority.load(), None);
    world.shake_hands(&client).await.unwrap();
}

#[tokio::test]
async fn a_good_certificate_without_one_identity_of_ours_is_nobodys() {
    let world = World::ready().await;
    let dns = SanType::DnsName(SERVER_NAME.try_into().unwrap());
    let leaf = |names| forged(&world.material, names, IsCa::NoCa);
    for (what, shown) in [
        ("another trust domain", world.issue("spiffe://other/ns/shop/sa/cart")),
        ("two names", leaf(vec![uri(CART), uri(BILLING)])),
        ("a server", leaf(vec![dns])),
        ("no names", leaf(vec![])),
    ] {
        let channel = world.showing(&shown).await;
        assert_unauthenticated(&channel, what).await;
        let by_token = sign(&channel, authorized("shop/db", certificate_request(None))).await.unwrap();
        assert_eq!(identity_of(&by_token), "spiffe://cluster.local/ns/shop/sa/db", "{what}");
    }
}

#[tokio::test]
async fn a_token_decides_where_there_is_one() {
    let world = World::ready().await;
    world.pods.enter_machine("shop", "cart");
    let channel = world.showing(&world.issue(CART)).await;
    let by_token = sign(&channel, authorized("shop/db", certificate_request(None))).await.unwrap();
    assert_eq!(identity_of(&by_token), "spiffe://cluster.local/ns/shop/sa/db");
    let node = authorized("istio-system/zt-b", certificate_request(Some("spiffe://cluster.local/ns/shop/sa/db")));
    sign(&channel, node).await.unwrap();
    for token in ["nonsense", "", "shop/ghost"] {
        let refused = sign(&channel, authorized(token, certificate_request(None))).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated, "{token:?}");
    }
    let mut other_scheme = Request::new(certificate_request(None));
    other_scheme.metadata_mut().insert("authorization", "Basic eDp5".parse().unwrap());
    assert_eq!(sign(&channel, other_scheme).await.unwrap_err().code(), Code::Unauthenticated);
    assert_eq!(identity_of(&sign(&channel, certificate_request(None)).await.unwrap()), CART, "without a token");
}

#[tokio::test]
async fn a_change_of_root_needs_no_restart() {
    let world = World::ready().await;
    world.pods.enter_machine("shop", "cart");
    let old = world.issue(CART);
    let over_old = world.showing(&old).await;
    let (_, next) = new_authority("cluster.local");
    let new = issued(&next, CART, DAY, OffsetDateTime::now_utc());
    let both = format!("{}{}", world.roots, next.root_bundle_pem());
    let [by_old, by_new] = [&old, &new].map(|shown| connector(&both, shown));
    assert!(world.shake_hands(&by_new).await.is_err());

    // Both roots are handed out, and then the other one signs.
    for signing in [&world.authority.load(), &next] {
        world.authority.replace(Arc::new(signing.handing_out(&both)), None);
        for (shown, client) in [(&old, &by_old), (&new, &by_new)] {
            world.shake_hands(client).await.unwrap();
            let channel = world.channel_showing(&both, shown).await;
            assert_eq!(identity_of(&sign(&channel, certificate_request(None)).await.unwrap()), CART);
        }
    }

    world.authority.replace(next, None);
    world.shake_hands(&by_new).await.unwrap();
    assert!(world.shake_hands(&by_old).await.is_err());
    assert_unauthenticated(&over_old, "its root is not trusted any more").await;
}

#[tokio::test]
async fn an_identity_of_no_machine_is_not_renewed() {
    let world = World::ready().await;
    world.pods.enter_machine("shop", "billing");
    let [cart, billing] = [CART, BILLING].map(|identity| world.issue(identity));
    let (cart, billing) = (world.showing(&cart).await, world.showing(&billing).await);
    sign(&billing, certificate_request(None)).await.unwrap();
    world.pods.remove_machine("shop", "billing");
    // A pod of that account does not count: it has a token.
    for channel in [&cart, &billing] {
        let refused = sign(channel, certificate_request(None)).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated);
    }
    world.pods.enter_machine("shop", "cart");
    sign(&cart, certificate_request(None)).await.unwrap();
}

#[tokio::test]
async fn a_stream_ends_with_the_certificate_it_was_opened_with() {
    let world = World::ready().await;
    let short = issued(&world.authority.load(), CART, Duration::from_secs(3), OffsetDateTime::now_utc());
    let channel = world.showing(&short).await;
    let mut stream = discover(&channel).await.unwrap();
    let status = stream.end().await.unwrap();
    assert_eq!((status.code(), status.message()), (Code::Unauthenticated, "the certificate has expired"));
}

#[tokio::test]
async fn ports_other_than_15012_ask_for_no_certificate() {
    let world = World::ready().await;
    let (stranger, _) = new_authority("elsewhere");
    let unwelcome = connector(&world.roots, &Shown { chain: stranger.certificate, key: stranger.key });
    let stream = TcpStream::connect(world.webhook).await.unwrap();
    let mut stream = unwelcome.connect(SERVER_NAME.try_into().unwrap(), stream).await.unwrap();
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    timeout(PATIENCE, stream.read_exact(&mut [0; 9])).await.unwrap().expect("nobody has looked at it");
}

#[test]
fn refused_certificates_are_told_once_in_a_while_with_their_number() {
    let mut refused = Untold { told: None, count: 0 };
    let start = Instant::now();
    let said: Vec<_> = (0..6u32).map(|tick| refused.tell(start + tick * TOLD_EVERY / 2)).collect();
    assert_eq!(said, [Some(1), None, Some(2), None, Some(2), None]);
}
