//! A hand-made HBONE client: any certificate or none, any request, no checks of its own.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use base64::Engine as _;
use http::Request;
use mesh_tests::sys;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    SanType,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use time::OffsetDateTime;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;

use crate::support::Stage;

/// One exchange takes at most this long.
const PATIENCE: Duration = Duration::from_secs(8);

/// Signs what it is told to.
pub struct Authority(Issuer<'static, KeyPair>);

/// What a client shows.
pub struct Credentials {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

/// When a certificate is good.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Validity {
    Now,
    Over,
}

impl Authority {
    /// From a certificate and its key in PEM.
    pub fn from_pem(certificate: &str, key: &str) -> Result<Self> {
        Ok(Self(Issuer::from_ca_cert_pem(certificate, KeyPair::from_pem(key)?)?))
    }

    /// That of the lab's mesh.
    pub fn of_the_mesh(stage: &Stage) -> Result<Self> {
        let part = |name: &str| -> Result<String> {
            let path = format!("jsonpath={{.data.{}}}", name.replace('.', "\\."));
            let text = stage.kubectl(&["-n", "istio-system", "get", "secret", "istio-ca-secret", "-o", &path])?;
            Ok(String::from_utf8(base64::engine::general_purpose::STANDARD.decode(text.trim())?)?)
        };
        Self::from_pem(&part("ca-cert.pem")?, &part("ca-key.pem")?)
    }

    /// One that nobody trusts, under this name.
    pub fn stranger(name: &str) -> Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, name);
        Ok(Self(Issuer::new(params, KeyPair::generate()?)))
    }

    /// A leaf with this URI as its only name.
    pub fn leaf(&self, uri: &str, validity: Validity) -> Result<Credentials> {
        let (params, key) = (leaf(uri, validity)?, KeyPair::generate()?);
        let certificate = params.signed_by(&key, &self.0)?;
        Ok(credentials(certificate.der().clone(), &key))
    }
}

/// A leaf that vouches for itself.
pub fn self_signed(uri: &str) -> Result<Credentials> {
    let (params, key) = (leaf(uri, Validity::Now)?, KeyPair::generate()?);
    Ok(credentials(params.self_signed(&key)?.der().clone(), &key))
}

fn leaf(uri: &str, validity: Validity) -> Result<CertificateParams> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(uri.try_into()?)];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
    let (now, hour) = (OffsetDateTime::now_utc(), time::Duration::HOUR);
    (params.not_before, params.not_after) = match validity {
        Validity::Now => (now - hour, now + hour),
        Validity::Over => (now - 2 * hour, now - hour),
    };
    Ok(params)
}

fn credentials(leaf: CertificateDer<'static>, key: &KeyPair) -> Credentials {
    Credentials { chain: vec![leaf], key: PrivatePkcs8KeyDer::from(key.serialize_der()).into() }
}

/// How an exchange ended.
#[derive(Debug)]
pub struct Ending {
    /// Our end of the connection, by which the other side's log names it.
    pub local: SocketAddr,
    /// Status of the answer, or why there is none.
    pub answer: Result<u16, String>,
}

/// Sends one request from the namespace `from` to port 15008 of `to`.
pub fn ask(from: &Path, to: IpAddr, shown: Option<&Credentials>, request: Request<()>) -> Result<Ending> {
    let config = client(shown)?;
    let to = SocketAddr::new(to, 15008);
    sys::in_netns(from, move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let exchange = tokio::time::timeout(PATIENCE, exchange(to, config, request));
            exchange.await.with_context(|| format!("{to} let us wait for {PATIENCE:?}"))?
        })
    })
}

async fn exchange(to: SocketAddr, config: rustls::ClientConfig, request: Request<()>) -> Result<Ending> {
    let stream = TcpStream::connect(to).await.with_context(|| format!("cannot connect to {to}"))?;
    let local = stream.local_addr()?;
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let refused = |reason: String| Ok(Ending { local, answer: Err(reason) });
    let mut tls = match connector.connect(ServerName::IpAddress(to.ip().into()), stream).await {
        Ok(tls) => tls,
        Err(e) => return refused(e.to_string()),
    };
    // The server speaks first: its SETTINGS, or the alert that it does not like our certificate.
    let mut first = [0; 9];
    if let Err(e) = tls.read_exact(&mut first).await {
        return refused(e.to_string());
    }
    let (mut sender, connection) = h2::client::handshake(Replayed { first: first.to_vec(), tls }).await?;
    let driver = tokio::spawn(connection);
    let answer = match sender.send_request(request, false) {
        Ok((response, _body)) => response.await.map(|response| response.status().as_u16()).map_err(|e| e.to_string()),
        Err(e) => Err(e.to_string()),
    };
    driver.abort();
    Ok(Ending { local, answer })
}

fn client(shown: Option<&Credentials>) -> Result<rustls::ClientConfig> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Gullible));
    let mut config = match shown {
        Some(shown) => builder.with_client_auth_cert(shown.chain.clone(), shown.key.clone_key())?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.enable_sni = false;
    Ok(config)
}

/// Believes any server: here the server is under test, not we.
#[derive(Debug)]
struct Gullible;

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

/// A stream some of whose bytes have been read already.
struct Replayed<S> {
    first: Vec<u8>,
    tls: S,
}

impl<S: tokio::io::AsyncRead + Unpin> tokio::io::AsyncRead for Replayed<S> {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buffer: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        if self.first.is_empty() {
            return std::pin::Pin::new(&mut self.tls).poll_read(cx, buffer);
        }
        let count = self.first.len().min(buffer.remaining());
        buffer.put_slice(&self.first[..count]);
        self.first.drain(..count);
        std::task::Poll::Ready(Ok(()))
    }
}

impl<S: tokio::io::AsyncWrite + Unpin> tokio::io::AsyncWrite for Replayed<S> {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        data: &[u8],
    ) -> std::task::Poll<std::io::Result<usize>> {
        std::pin::Pin::new(&mut self.tls).poll_write(cx, data)
    }

    fn poll_flush(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.tls).poll_flush(cx)
    }

    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.tls).poll_shutdown(cx)
    }
}
