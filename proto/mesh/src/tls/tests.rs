use std::time::{Duration, SystemTime};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::{clock::Clock, identity::FileCa};

const HOUR: Duration = Duration::from_secs(3600);

fn ca(trust_domain: &str) -> FileCa {
    FileCa::generate(trust_domain, HOUR, Clock::system()).unwrap()
}

fn id(text: &str) -> Identity {
    text.parse().unwrap()
}

fn client_id() -> Identity {
    id("spiffe://td/ns/shop/sa/client")
}

fn server_id() -> Identity {
    id("spiffe://td/ns/shop/sa/server")
}

fn addr() -> SocketAddr {
    "192.0.2.1:15008".parse().unwrap()
}

/// What each side makes of the other. The client reads one byte, because it hears of a refusal only then.
async fn meet(
    client: &WorkloadCertificate,
    expected: &[Identity],
    server: &WorkloadCertificate,
) -> (Result<VerifiedPeer, TlsError>, Result<VerifiedPeer, TlsError>) {
    let (near, far) = tokio::io::duplex(1 << 16);
    let connecting = async {
        let (mut stream, peer) = connect(client, expected, near, addr()).await?;
        stream.read_u8().await.map_err(TlsError::from_io)?;
        Ok(peer)
    };
    let accepting = async {
        let (mut stream, peer) = accept(server, far, addr()).await?;
        stream.write_u8(1).await.map_err(TlsError::Io)?;
        stream.flush().await.map_err(TlsError::Io)?;
        Ok(peer)
    };
    tokio::join!(connecting, accepting)
}

#[tokio::test]
async fn both_sides_learn_who_the_other_is() {
    let ca = ca("td");
    let (client, server) = (ca.sign(&client_id()).unwrap(), ca.sign(&server_id()).unwrap());
    let (at_client, at_server) = meet(&client, &[id("spiffe://td/ns/x/sa/y"), server_id()], &server).await;
    assert_eq!(at_client.unwrap().identity(), &server_id());
    let peer = at_server.unwrap();
    assert_eq!((peer.identity(), peer.addr()), (&client_id(), addr()));
}

#[tokio::test]
async fn key_exchange_is_post_quantum_and_only_aes_is_offered() {
    let ca = ca("td");
    let (client, server) = (ca.sign(&client_id()).unwrap(), ca.sign(&server_id()).unwrap());
    let (near, far) = tokio::io::duplex(1 << 16);
    let expected = [server_id()];
    let (client, _server) = tokio::join!(connect(&client, &expected, near, addr()), accept(&server, far, addr()));
    let (stream, _) = client.unwrap();
    let session = stream.get_ref().1;
    assert_eq!(session.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    assert_eq!(session.negotiated_key_exchange_group().unwrap().name(), rustls::NamedGroup::X25519MLKEM768);
    assert_eq!(session.negotiated_cipher_suite().unwrap().suite(), rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
}

#[tokio::test]
async fn a_client_of_another_root_is_refused() {
    let (ours, theirs) = (ca("td"), ca("td"));
    let server = ours.sign(&server_id()).unwrap();
    // It knows our root, so that it accepts us; we must not accept it.
    let stranger = with_roots_of(&theirs, &client_id(), &ours);
    let (at_client, at_server) = meet(&stranger, &[server_id()], &server).await;
    assert!(matches!(at_server, Err(TlsError::UntrustedRoot)), "{at_server:?}");
    assert!(matches!(at_client, Err(TlsError::Rejected(_))), "{at_client:?}");
}

#[tokio::test]
async fn a_server_of_another_root_is_refused() {
    let (ours, theirs) = (ca("td"), ca("td"));
    let client = ours.sign(&client_id()).unwrap();
    let stranger = with_roots_of(&theirs, &server_id(), &ours);
    let (at_client, at_server) = meet(&client, &[server_id()], &stranger).await;
    assert!(matches!(at_client, Err(TlsError::UntrustedRoot)), "{at_client:?}");
    assert!(matches!(at_server, Err(TlsError::Rejected(_))), "{at_server:?}");
}

#[tokio::test]
async fn a_client_of_another_trust_domain_is_refused_although_the_root_is_ours() {
    let ca = ca("td");
    let server = ca.sign(&server_id()).unwrap();
    let foreign = ca.sign(&id("spiffe://other/ns/shop/sa/client")).unwrap();
    let (_, at_server) = meet(&foreign, &[server_id()], &server).await;
    match at_server {
        Err(TlsError::WrongTrustDomain { expected, got }) => {
            assert_eq!((expected.as_str(), got), ("td", vec![id("spiffe://other/ns/shop/sa/client")]));
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_server_with_another_identity_is_refused_by_name() {
    let ca = ca("td");
    let (client, server) = (ca.sign(&client_id()).unwrap(), ca.sign(&server_id()).unwrap());
    let wanted = id("spiffe://td/ns/shop/sa/other");
    let (at_client, _) = meet(&client, std::slice::from_ref(&wanted), &server).await;
    let error = at_client.unwrap_err();
    assert!(error.to_string().contains(&wanted.to_string()) && error.to_string().contains("sa/server"), "{error}");
    assert!(matches!(error, TlsError::IdentityMismatch { .. }), "{error}");
    assert_eq!(error.flag(), ResponseFlag::TlsFailure);
}

#[tokio::test]
async fn with_no_identity_expected_none_will_do() {
    let ca = ca("td");
    let (client, server) = (ca.sign(&client_id()).unwrap(), ca.sign(&server_id()).unwrap());
    let (at_client, _) = meet(&client, &[], &server).await;
    assert!(matches!(at_client, Err(TlsError::IdentityMismatch { .. })), "{at_client:?}");
}

#[tokio::test]
async fn expired_and_future_certificates_are_refused_by_the_injected_clock() {
    let now = SystemTime::now();
    let ca = ca("td");
    let server = ca.sign(&server_id()).unwrap();
    let old = ca.sign_valid(&client_id(), now - HOUR * 2, now - HOUR).unwrap();
    let (_, at_server) = meet(&old, &[server_id()], &server).await;
    assert!(matches!(at_server, Err(TlsError::Expired)), "{at_server:?}");

    let early = ca.sign_valid(&server_id(), now + HOUR, now + HOUR * 2).unwrap();
    let client = ca.sign(&client_id()).unwrap();
    let (at_client, _) = meet(&client, &[server_id()], &early).await;
    assert!(matches!(at_client, Err(TlsError::NotYetValid)), "{at_client:?}");

    // The same certificates, seen two hours later.
    let later = FileCa::generate("td", HOUR, Clock::with(move || now + HOUR * 2)).unwrap();
    let server = later.sign(&server_id()).unwrap();
    let short = later.sign_valid(&client_id(), now, now + HOUR).unwrap();
    let (_, at_server) = meet(&short, &[server_id()], &server).await;
    assert!(matches!(at_server, Err(TlsError::Expired)), "{at_server:?}");
}

#[tokio::test]
async fn clients_without_certificate_or_alpn_are_refused() {
    let ca = ca("td");
    let (client, server) = (ca.sign(&client_id()).unwrap(), ca.sign(&server_id()).unwrap());
    let mut anonymous = (*client.client_config(&[server_id()])).clone();
    anonymous.client_auth_cert_resolver = Arc::new(NoCertificate);
    let mut silent = (*client.client_config(&[server_id()])).clone();
    silent.alpn_protocols.clear();
    let mut http1 = (*client.client_config(&[server_id()])).clone();
    http1.alpn_protocols = vec![b"http/1.1".to_vec()];
    for (config, wanted) in [(anonymous, "no certificate"), (silent, "does not speak h2"), (http1, "does not speak h2")]
    {
        let (near, far) = tokio::io::duplex(1 << 16);
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let name = ServerName::IpAddress(addr().ip().into());
        let (_, at_server) = tokio::join!(connector.connect(name, near), accept(&server, far, addr()));
        let error = at_server.err().expect("the server refuses").to_string();
        assert!(error.contains(wanted), "{error}");
    }
}

#[derive(Debug)]
struct NoCertificate;

impl rustls::client::ResolvesClientCert for NoCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

#[tokio::test]
async fn garbage_is_no_handshake() {
    let ca = ca("td");
    let server = ca.sign(&server_id()).unwrap();
    let garbage: [&[u8]; 5] = [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff", &[0; 100], &[0x16; 70_000], b""];
    for bytes in garbage {
        let (mut near, far) = tokio::io::duplex(1 << 20);
        near.write_all(bytes).await.unwrap();
        near.shutdown().await.unwrap();
        let error = accept(&server, far, addr()).await.err().expect("garbage is refused");
        assert!(matches!(error, TlsError::Protocol(_) | TlsError::Io(_)), "{error:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_client_is_let_go() {
    let server = ca("td").sign(&server_id()).unwrap();
    let (_near, far) = tokio::io::duplex(64);
    assert!(matches!(accept(&server, far, addr()).await, Err(TlsError::Timeout)));
}

/// A certificate of one authority that trusts another's root.
fn with_roots_of(issuer: &FileCa, identity: &Identity, trusted: &FileCa) -> WorkloadCertificate {
    let (chain, key) = issuer.sign_pem(identity).unwrap();
    WorkloadCertificate::from_pem(&chain, &key, trusted.root_pem(), &Clock::system()).unwrap()
}

mod authority;
mod key_exchange;
mod peers;
mod revocation;
mod rotation;
