//! Which key exchanges are agreed on, with peers that have all, or only an old one.

use rustls::{NamedGroup, crypto::aws_lc_rs};

use super::authority::Authority;
use super::*;
use crate::identity::{HandshakeRules, KeyExchange};

fn rules(key_exchange: KeyExchange) -> HandshakeRules {
    HandshakeRules { key_exchange, revocations: None }
}

/// A peer that knows nothing but P-256.
fn p256() -> Arc<rustls::crypto::CryptoProvider> {
    let kx_groups = vec![aws_lc_rs::kx_group::SECP256R1];
    Arc::new(rustls::crypto::CryptoProvider { kx_groups, ..aws_lc_rs::default_provider() })
}

#[tokio::test]
async fn the_post_quantum_hybrid_is_what_two_of_us_agree_on_by_either_rule() {
    use KeyExchange::{PostQuantumOnly, PostQuantumPreferred};
    let authority = Authority::root("root");
    let cert = |id: &Identity, rule| authority.identity(id).with(&authority.root, rules(rule));
    for (near_rule, far_rule) in [
        (PostQuantumPreferred, PostQuantumPreferred),
        (PostQuantumOnly, PostQuantumPreferred),
        (PostQuantumOnly, PostQuantumOnly),
    ] {
        let (client, server) = (cert(&client_id(), near_rule), cert(&server_id(), far_rule));
        let (near, far) = tokio::io::duplex(1 << 16);
        let expected = [server_id()];
        let (connected, _accepted) =
            tokio::join!(connect(&client, &expected, near, addr()), accept(&server, far, addr()));
        let (stream, _) = connected.unwrap();
        let group = stream.get_ref().1.negotiated_key_exchange_group().unwrap().name();
        assert_eq!(group, NamedGroup::X25519MLKEM768, "{near_rule:?} with {far_rule:?}");
    }
}

#[tokio::test]
async fn a_client_that_has_only_p_256_is_served_unless_post_quantum_is_demanded() {
    let authority = Authority::root("root");
    let own = authority.identity(&server_id());
    let old = authority.identity(&client_id()).trusting(&authority.root);
    for rule in [KeyExchange::PostQuantumPreferred, KeyExchange::PostQuantumOnly] {
        let server = own.with(&authority.root, rules(rule));
        let trust = Trust { roots: old.root_store.clone(), revocations: None };
        let mut config = rustls::ClientConfig::builder_with_provider(p256())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(TrustedServer::new(vec![server_id()], trust)))
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(old.key.clone())));
        config.alpn_protocols = vec![ALPN.to_vec()];
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let (near, far) = tokio::io::duplex(1 << 16);
        let name = ServerName::IpAddress(addr().ip().into());
        let (client, served) = tokio::join!(connector.connect(name, near), accept(&server, far, addr()));
        match rule {
            KeyExchange::PostQuantumPreferred => {
                let group = client.unwrap().get_ref().1.negotiated_key_exchange_group().unwrap().name();
                assert_eq!((group, served.unwrap().1.identity()), (NamedGroup::secp256r1, &client_id()));
            }
            KeyExchange::PostQuantumOnly => {
                let error = served.err().expect("refused");
                assert!(matches!(error, TlsError::NoKeyExchange), "{error:?}");
                assert_eq!(error.flag(), ResponseFlag::TlsFailure);
                assert!(client.is_err());
            }
        }
    }
}

#[tokio::test]
async fn a_server_that_has_only_p_256_is_used_unless_post_quantum_is_demanded() {
    let authority = Authority::root("root");
    let own = authority.identity(&client_id());
    let old = authority.identity(&server_id()).trusting(&authority.root);
    for rule in [KeyExchange::PostQuantumPreferred, KeyExchange::PostQuantumOnly] {
        let client = own.with(&authority.root, rules(rule));
        let trust = Trust { roots: old.root_store.clone(), revocations: None };
        let mut config = rustls::ServerConfig::builder_with_provider(p256())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(Arc::new(TrustedClient::new("td".into(), trust)))
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(old.key.clone())));
        config.alpn_protocols = vec![ALPN.to_vec()];
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let (near, far) = tokio::io::duplex(1 << 16);
        let expected = [server_id()];
        let (connected, served) = tokio::join!(connect(&client, &expected, near, addr()), acceptor.accept(far));
        match rule {
            KeyExchange::PostQuantumPreferred => {
                let group = connected.unwrap().0.get_ref().1.negotiated_key_exchange_group().unwrap().name();
                assert_eq!(group, NamedGroup::secp256r1);
            }
            KeyExchange::PostQuantumOnly => {
                let error = connected.err().expect("refused");
                assert!(matches!(error, TlsError::Rejected(_)), "the server says so: {error:?}");
                assert_eq!(error.flag(), ResponseFlag::TlsFailure);
                assert!(served.is_err());
            }
        }
    }
}
