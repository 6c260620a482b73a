//! Who calls: tokens, signing requests, and what they ask to be.

use std::time::Duration;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::DeleteParams;
use mesh_proto::ca::IstioCertificateRequest;
use mesh_proto::enrolment::enrolment_service_client::EnrolmentServiceClient;
use mesh_proto::enrolment::{EnrolmentReport, POD_ENROLMENT_TYPE};
use mesh_proto::workload::ADDRESS_TYPE;
use rcgen::string::Ia5String;
use rcgen::{CertificateParams, DnType, IsCa, KeyPair, SanType};
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio::time::Instant;
use tonic::Code;
use x509_parser::pem::parse_x509_pem;
use x509_parser::prelude::GeneralName;

use super::world::{Mesh, ack, authorized, subscribe};

const FAILURES: &str = "citadel_server_authentication_failure_count";
/// After which a stream whose pod is gone has ended, whatever changes meanwhile; as ARCHITECTURE says, and time to say so.
const STANDING: Duration = Duration::from_secs(10 + 5);

pub fn request(csr: impl Into<String>, impersonated: Option<&str>) -> IstioCertificateRequest {
    let kind = |text: &str| prost_types::Value { kind: Some(prost_types::value::Kind::StringValue(text.to_owned())) };
    let metadata = impersonated
        .map(|identity| prost_types::Struct { fields: [("ImpersonatedIdentity".to_owned(), kind(identity))].into() });
    IstioCertificateRequest { csr: csr.into(), validity_duration: 3600, metadata }
}

pub fn csr() -> String {
    csr_with(CertificateParams::default())
}

fn csr_with(params: CertificateParams) -> String {
    params.serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap()
}

/// The URIs of the first certificate, and how many other names it has.
pub fn names_of(chain: &[String]) -> (Vec<String>, usize) {
    let (_, pem) = parse_x509_pem(chain[0].as_bytes()).unwrap();
    let certificate = pem.parse_x509().unwrap();
    assert!(!certificate.is_ca());
    let names = &certificate.subject_alternative_name().unwrap().unwrap().value.general_names;
    let uri = |name: &GeneralName<'_>| match name {
        GeneralName::URI(uri) => Some((*uri).to_owned()),
        _ => None,
    };
    let uris: Vec<String> = names.iter().filter_map(uri).collect();
    let others = names.len() - uris.len() + certificate.subject().iter_common_name().count();
    (uris, others)
}

/// With other claims, signed by `key`, or with the signature that it had.
fn changed(token: &str, key: Option<&EcdsaKeyPair>, change: impl FnOnce(&mut Value)) -> String {
    let parts: Vec<&str> = token.split('.').collect();
    let mut claims: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(parts[1]).unwrap()).unwrap();
    change(&mut claims);
    let signed = format!("{}.{}", parts[0], URL_SAFE_NO_PAD.encode(claims.to_string()));
    let signature = match key {
        Some(key) => {
            let signature = key.sign(&SystemRandom::new(), signed.as_bytes()).unwrap();
            URL_SAFE_NO_PAD.encode(signature.as_ref())
        }
        None => parts[2].to_owned(),
    };
    format!("{signed}.{signature}")
}

pub async fn bad_tokens(mesh: &Mesh) {
    let pod = mesh.pod("shop", "app", "app", Some("n-a"), json!({"app": "app"})).await;
    let good = mesh.token("shop", "app", &pod).await;
    let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &mesh.signing_key()).unwrap();
    let past = OffsetDateTime::now_utc().unix_timestamp() - 1;
    let other_key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
    // The same claims signed again are as good: what is refused below is refused for what was changed.
    let again = changed(&good, Some(&key), |_| {});
    super::standalone_support::eventually_async("the pod is known", async || {
        mesh.discover(&again, subscribe(ADDRESS_TYPE)).await.ok().map(drop)
    })
    .await;
    let bad = [
        ("no token at all", String::new()),
        ("garbage", "garbage".to_owned()),
        ("dots", "..".to_owned()),
        ("the longest", "x".repeat(16 * 1024)),
        ("another audience", mesh.token_for("vault", "shop", "app", Some(&pod)).await),
        ("the API's audience", mesh.token_for("https://kubernetes.default.svc", "shop", "app", Some(&pod)).await),
        ("expired", changed(&good, Some(&key), |claims| claims["exp"] = past.into())),
        ("of tomorrow", changed(&good, Some(&key), |claims| claims["nbf"] = (past + 86_400).into())),
        ("another's account", changed(&good, None, |claims| claims["sub"] = "system:serviceaccount:shop:other".into())),
        ("another key", changed(&good, Some(&other_key), |_| {})),
        ("without a signature", good.rsplit_once('.').unwrap().0.to_owned() + "."),
    ];
    for (what, token) in &bad {
        let before = mesh.metric(FAILURES);
        let refused = mesh.discover(token, subscribe(ADDRESS_TYPE)).await.err().expect(what);
        assert_eq!((refused.code(), refused.message()), (Code::Unauthenticated, "authentication failure"), "{what}");
        let refused = mesh.sign(token, request(csr(), None)).await.expect_err(what);
        assert_eq!((refused.code(), refused.message()), (Code::Unauthenticated, "authentication failure"), "{what}");
        assert_eq!(mesh.metric(FAILURES), before + 2, "{what}: counted");
    }
    mesh.logged(&["caller refused", "no bearer token"]).await;
    mesh.logged(&["caller refused", "the token is not accepted"]).await;
    // HTTP/2 itself: before anybody looks for a token.
    // HTTP says so, not gRPC, which looks at a stream's status when it reads.
    let refused = match mesh.discover(&"x".repeat(64 * 1024), subscribe(ADDRESS_TYPE)).await {
        Ok(mut stream) => stream.answers.message().await.is_err(),
        Err(_) => true,
    };
    assert!(refused, "longer than any token");
}

pub async fn bad_signing_requests(mesh: &Mesh) {
    let pods: Api<Pod> = Api::namespaced(mesh.client.clone(), "shop");
    let token = mesh.token("shop", "app", &pods.get("app").await.unwrap()).await;
    let pem = |label: &str, body: &[u8]| {
        format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", STANDARD.encode(body))
    };
    let good = csr();
    let mut forged = STANDARD.decode(good.lines().filter(|line| !line.starts_with('-')).collect::<String>()).unwrap();
    let last = forged.len() - 40;
    forged[last] ^= 1;
    let unreadable = [
        ("nothing", String::new()),
        ("no PEM", "garbage".to_owned()),
        ("no end", good[..good.len() / 2].to_owned()),
        ("NULs", "\0".repeat(60 * 1024)),
        ("dashes", "-----BEGIN ".repeat(5000)),
        ("another label", good.replace("CERTIFICATE REQUEST", "CERTIFICATE")),
        ("no DER", pem("CERTIFICATE REQUEST", &[0x30; 40 * 1024])),
        ("nested without end", pem("CERTIFICATE REQUEST", &[[0x30, 0x80]; 20 * 1024].concat())),
        ("of a length that nothing has", pem("CERTIFICATE REQUEST", &[0x30, 0x84, 0xff, 0xff, 0xff, 0xff])),
        ("forged", pem("CERTIFICATE REQUEST", &forged)),
    ];
    for (what, csr) in unreadable {
        let before = mesh.metric("citadel_server_csr_parsing_err_count");
        let refused = mesh.sign(&token, request(csr, None)).await.expect_err(what);
        assert_eq!(refused.code(), Code::InvalidArgument, "{what}: {refused:?}");
        assert!(refused.message().contains("certificate signing request"), "{what}: {refused:?}");
        assert_eq!(mesh.metric("citadel_server_csr_parsing_err_count"), before + 1, "{what}: counted");
    }
    mesh.logged(&["certificate signing request refused", "spiffe://cluster.local/ns/shop/sa/app"]).await;
    let too_long = IstioCertificateRequest { validity_duration: i64::MAX, ..request(csr(), None) };
    let refused = mesh.sign(&token, too_long).await.expect_err("a million years");
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
    assert!(refused.message().contains("exceeds the maximum"), "{refused:?}");

    // What asks for more than it may gets what it may.
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "istiod.istio-system.svc");
    let name = |n: usize| SanType::DnsName(Ia5String::try_from(format!("host-{n}.example.com")).unwrap());
    params.subject_alt_names = (0..1000).map(name).collect();
    params
        .subject_alt_names
        .push(SanType::URI(Ia5String::try_from("spiffe://cluster.local/ns/istio-system/sa/ztunnel").unwrap()));
    let signed = mesh.sign(&token, request(csr_with(params), None)).await.unwrap();
    assert_eq!(names_of(&signed.cert_chain), (vec!["spiffe://cluster.local/ns/shop/sa/app".to_owned()], 0));

    let mut params = CertificateParams::default();
    params.subject_alt_names = (0..10_000).map(name).collect();
    for (what, csr) in
        [("10,000 names", csr_with(params)), ("1 MiB", "x".repeat(1 << 20)), ("32 MiB", "x".repeat(32 << 20))]
    {
        let refused = mesh.sign(&token, request(csr, None)).await.expect_err(what);
        assert_eq!(refused.code(), Code::OutOfRange, "{what}: {refused:?}");
    }
}

pub async fn identities_of_others(mesh: &Mesh) {
    let pods: Api<Pod> = Api::namespaced(mesh.client.clone(), "shop");
    let app = mesh.token("shop", "app", &pods.get("app").await.unwrap()).await;
    mesh.pod("shop", "other", "other", Some("n-b"), json!({"app": "other"})).await;
    let ztunnel = mesh.pod("istio-system", "zt-a", "ztunnel", Some("n-a"), json!({})).await;
    let ztunnel = mesh.token("istio-system", "ztunnel", &ztunnel).await;
    let unplaced = mesh.pod("istio-system", "zt-nowhere", "ztunnel", None, json!({})).await;
    let unplaced = mesh.token("istio-system", "ztunnel", &unplaced).await;
    let unbound = mesh.token_for("istio-ca", "istio-system", "ztunnel", None).await;
    let identity = |account: &str| format!("spiffe://cluster.local/ns/shop/sa/{account}");
    let known = async |token: &str| mesh.discover(token, subscribe(ADDRESS_TYPE)).await.ok().map(drop);
    for token in [&ztunnel, &unplaced, &unbound] {
        super::standalone_support::eventually_async("the pod is known", async || known(token).await).await;
    }
    let allowed = mesh.sign(&ztunnel, request(csr(), Some(&identity("app")))).await.unwrap();
    assert_eq!(names_of(&allowed.cert_chain).0, [identity("app")]);

    let long = format!("spiffe://cluster.local/ns/shop/sa/{}", "x".repeat(50 * 1024));
    let elsewhere = "no pod with that identity runs on the caller's node";
    let nobody = "the caller is no trusted node account with a running pod";
    for (token, wanted, why) in [
        (&ztunnel, &*identity("other"), elsewhere),
        (&ztunnel, &identity("nobody"), elsewhere),
        (&ztunnel, "spiffe://cluster.local/ns/istio-system/sa/istiod", elsewhere),
        (&ztunnel, "spiffe://other.domain/ns/shop/sa/app", "another trust domain"),
        (&ztunnel, "istiod.istio-system.svc", "is not a SPIFFE identity"),
        (&ztunnel, &long, elsewhere),
        (&app, &identity("other"), nobody),
        (&app, "spiffe://cluster.local/ns/istio-system/sa/ztunnel", nobody),
        (&unplaced, &identity("app"), nobody),
        (&unbound, &identity("app"), nobody),
    ] {
        let before = mesh.metric(FAILURES);
        let refused = mesh.sign(token, request(csr(), Some(wanted))).await.expect_err(wanted);
        assert_eq!(refused.code(), Code::Unauthenticated, "{wanted}: {refused:?}");
        assert!(refused.message().contains("impersonation"), "{wanted}: {refused:?}");
        assert_eq!(mesh.metric(FAILURES), before + 1, "{wanted}: counted");
        mesh.logged(&["certificate refused", why]).await;
    }
    // Whoever acts for no node is told of no node's pods, and believed for none.
    for token in [&app, &unplaced, &unbound] {
        let first = mesh.discover(token, subscribe(POD_ENROLMENT_TYPE)).await.unwrap().next().await.unwrap();
        assert!(first.resources.is_empty());
        let mut client = EnrolmentServiceClient::new(mesh.connect().await);
        let refused = client.report(authorized(token, EnrolmentReport { pods: Vec::new() })).await.unwrap_err();
        assert_eq!(
            (refused.code(), refused.message()),
            (Code::PermissionDenied, "only a node proxy reports enrolments")
        );
    }
}

pub async fn pod_that_is_gone(mesh: &Mesh) {
    let pod = mesh.pod("shop", "doomed", "app", Some("n-a"), json!({})).await;
    let token = mesh.token("shop", "app", &pod).await;
    super::standalone_support::eventually_async("the pod is known", async || {
        mesh.sign(&token, request(csr(), None)).await.ok()
    })
    .await;
    let mut stream = mesh.discover(&token, subscribe(ADDRESS_TYPE)).await.unwrap();
    let first = stream.next().await.unwrap();
    stream.send.send(ack(&first)).await.unwrap();

    let pods: Api<Pod> = Api::namespaced(mesh.client.clone(), "shop");
    pods.delete("doomed", &DeleteParams::default().grace_period(0)).await.unwrap();
    let deleted = Instant::now();
    let ended = stream.end().await;
    assert_eq!((ended.code(), ended.message()), (Code::Unauthenticated, "authentication failure"));
    assert!(deleted.elapsed() < STANDING, "after {:?}", deleted.elapsed());
    mesh.logged(&["the pod of a token is gone", "doomed"]).await;
    // The verdict on the token is still remembered, which is not enough.
    let refused = mesh.discover(&token, subscribe(ADDRESS_TYPE)).await.err().unwrap();
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert_eq!(mesh.sign(&token, request(csr(), None)).await.unwrap_err().code(), Code::Unauthenticated);

    // Nor is another pod of the same name the one that the token is for.
    mesh.pod("shop", "doomed", "app", Some("n-a"), json!({})).await;
    assert_eq!(mesh.sign(&token, request(csr(), None)).await.unwrap_err().code(), Code::Unauthenticated);
}
