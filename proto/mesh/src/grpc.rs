//! The way to the control plane: one gRPC channel with TLS, a token read for every request, and the headers Istio's
//! control planes expect. It connects when first used and again whenever needed, reading the root certificate anew each
//! time, so a mount that is late or rotated costs a retry and no restart.

use std::{fmt, io, path::PathBuf, str::FromStr, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{Stream, StreamExt, future::BoxFuture};
use http::{HeaderMap, HeaderValue, Uri};
use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use rustls::{
    RootCertStore,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tonic::{
    Code, Request, Status,
    body::Body,
    codec::EncodeBody,
    metadata::{Ascii, MetadataKey, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};
use tower::{Service, ServiceExt};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const KEEPALIVE: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Which roots the control plane's certificate must chain to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RootCa {
    /// A PEM file, read at each connect.
    Path(PathBuf),
    /// What the operating system trusts.
    System,
    Pem(String),
}

/// What authenticates us to the control plane.
#[derive(Clone, PartialEq, Eq)]
pub enum TokenSource {
    /// A file, read for each request: projected tokens rotate.
    Path(PathBuf),
    Literal(String),
    None,
}

/// How to reach the control plane.
#[derive(Clone, Debug)]
pub struct GrpcConfig {
    /// `host:port` or `https://host:port`; `http://host:port` is without TLS.
    pub address: String,
    pub root_ca: RootCa,
    pub token: TokenSource,
    /// Sent with every request.
    pub headers: Vec<(String, String)>,
    /// Tells the control plane which cluster the token is from.
    pub cluster_id: String,
    /// Another name the server's certificate may bear.
    pub alt_hostname: Option<String>,
    pub dialer: Dialer,
}

/// How TCP connections to the control plane are made.
#[derive(Clone, Default)]
pub struct Dialer(Option<Arc<DialFn>>);

type DialFn = dyn Fn(String, u16) -> BoxFuture<'static, io::Result<TcpStream>> + Send + Sync;

impl Dialer {
    /// For where the ordinary way will not do: `dial` gets the host, a name or an address, and the port.
    pub fn new<F>(dial: impl Fn(String, u16) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = io::Result<TcpStream>> + Send + 'static,
    {
        Self(Some(Arc::new(move |host, port| Box::pin(dial(host, port)))))
    }

    async fn dial(&self, host: &str, port: u16) -> io::Result<TcpStream> {
        match &self.0 {
            Some(dial) => dial(host.to_owned(), port).await,
            None => TcpStream::connect((host, port)).await,
        }
    }
}

impl fmt::Debug for Dialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Dialer(special)" } else { "Dialer(ordinary)" })
    }
}

/// A setting that no channel can be made from.
#[derive(Debug, thiserror::Error)]
pub enum GrpcError {
    #[error("control plane address {0:?} is not host:port")]
    Address(String),
    #[error("header {0:?} for the control plane: not a valid name or value")]
    Header(String),
}

/// Give it to any tonic client.
pub type AuthChannel = InterceptedService<Channel, Authenticate>;

impl RootCa {
    /// As Istio spells it: `SYSTEM`, a PEM text, or a path.
    pub fn from_setting(text: &str) -> Self {
        match text {
            "SYSTEM" => Self::System,
            pem if pem.trim_start().starts_with("-----BEGIN") => Self::Pem(pem.to_owned()),
            path => Self::Path(path.into()),
        }
    }

    fn load(&self) -> Result<RootCertStore, ConnectError> {
        let mut roots = RootCertStore::empty();
        let fail = |reason: String| ConnectError(format!("root certificates ({self}): {reason}"));
        let pem = match self {
            Self::Path(path) => std::fs::read(path).map_err(|e| fail(e.to_string()))?,
            Self::Pem(pem) => pem.clone().into_bytes(),
            Self::System => {
                roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
                Vec::new()
            }
        };
        for certificate in CertificateDer::pem_slice_iter(&pem) {
            let certificate = certificate.map_err(|e| fail(e.to_string()))?;
            roots.add(certificate).map_err(|e| fail(e.to_string()))?;
        }
        if roots.is_empty() {
            return Err(fail("there is none".into()));
        }
        Ok(roots)
    }
}

impl fmt::Display for RootCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::System => f.write_str("SYSTEM"),
            Self::Pem(_) => f.write_str("inline PEM"),
        }
    }
}

impl TokenSource {
    /// As Istio spells it: empty for none, a path, or the token itself.
    pub fn from_setting(text: &str) -> Self {
        match text {
            "" => Self::None,
            path if path.starts_with(['.', '/']) => Self::Path(path.into()),
            token => Self::Literal(token.to_owned()),
        }
    }
}

impl fmt::Debug for TokenSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => f.debug_tuple("Path").field(path).finish(),
            Self::Literal(_) => f.write_str("Literal(..)"),
            Self::None => f.write_str("None"),
        }
    }
}

/// Adds the token and headers to each request.
#[derive(Clone)]
pub struct Authenticate {
    token: TokenSource,
    headers: Arc<[(MetadataKey<Ascii>, MetadataValue<Ascii>)]>,
}

impl Interceptor for Authenticate {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let token = match &self.token {
            TokenSource::None => None,
            TokenSource::Literal(token) => Some(token.clone()),
            // A small file on a memory file system; reading it here beats a token that has expired.
            TokenSource::Path(path) => Some(
                std::fs::read_to_string(path)
                    .map_err(|e| Status::unauthenticated(format!("token {}: {e}", path.display())))?,
            ),
        };
        if let Some(token) = token {
            let mut value = MetadataValue::from_str(&format!("Bearer {}", token.trim()))
                .map_err(|_| Status::unauthenticated("the token is not printable text"))?;
            value.set_sensitive(true);
            request.metadata_mut().insert("authorization", value);
        }
        for (name, value) in self.headers.iter() {
            request.metadata_mut().insert(name.clone(), value.clone());
        }
        Ok(request)
    }
}

/// A channel that connects at its first use. Must be called inside the runtime that will use it.
pub fn channel(config: GrpcConfig) -> Result<AuthChannel, GrpcError> {
    let target = Target::parse(&config)?;
    let mut headers = vec![("clusterid".to_owned(), config.cluster_id)];
    headers.extend(config.headers);
    let headers = headers
        .into_iter()
        .map(|(name, value)| {
            let parsed = (MetadataKey::from_str(&name.to_ascii_lowercase()), MetadataValue::from_str(&value));
            if let (Ok(name), Ok(value)) = parsed { Ok((name, value)) } else { Err(GrpcError::Header(name)) }
        })
        .collect::<Result<_, _>>()?;

    // tonic is told `http` because TLS is made by our connector; the origin is what the server sees.
    let address = || GrpcError::Address(config.address.clone());
    let endpoint = Endpoint::from_shared(format!("http://{}", target.authority)).map_err(|_| address())?;
    let scheme = if target.tls.is_some() { "https" } else { "http" };
    let origin: Uri = format!("{scheme}://{}", target.authority).parse().map_err(|_| address())?;
    let endpoint = endpoint
        .origin(origin)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    let target = Arc::new(target);
    let channel = endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
        let target = target.clone();
        async move { target.connect().await.map(TokioIo::new) }
    }));
    Ok(InterceptedService::new(channel, Authenticate { token: config.token, headers }))
}

/// A call whose answers are read as they arrive. tonic's own hands out whole messages, and keeps the buffer that the
/// largest of them needed for as long as the stream lasts.
///
/// # Errors
/// The status, when there is no connection or the server refuses.
pub async fn call<M: prost::Message + 'static>(
    mut channel: AuthChannel,
    path: &'static str,
    requests: impl Stream<Item = M> + Send + 'static,
) -> Result<Answers, Status> {
    let failed = |error: tonic::transport::Error| Status::from_error(error.into());
    channel.ready().await.map_err(failed)?;
    let encoder = tonic_prost::ProstEncoder::<M>::default();
    let body = EncodeBody::new_client(encoder, requests.map(Ok), None, None);
    let mut request = http::Request::new(Body::new(body));
    *request.method_mut() = http::Method::POST;
    *request.version_mut() = http::Version::HTTP_2;
    *request.uri_mut() = Uri::from_static(path);
    let headers = request.headers_mut();
    headers.insert(http::header::TE, HeaderValue::from_static("trailers"));
    headers.insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    let response = channel.call(request).await.map_err(failed)?;
    let (head, body) = response.into_parts();
    // A server that has nothing to answer says so in place of the headers.
    let end = match said(head.headers) {
        Some(status) if status.code() != Code::Ok => return Err(status),
        Some(_) => Some(Ok(())),
        None if head.status == http::StatusCode::OK => None,
        None => Some(Err(status_of(head.status))),
    };
    Ok(Answers { body: Body::new(body), end })
}

/// The answers to a call, encoded, in pieces that know nothing of messages.
pub struct Answers {
    body: Body,
    /// How the call ends, where that was said at its beginning.
    end: Option<Result<(), Status>>,
}

impl Answers {
    /// The next piece; `None` at the end of a call that ended well. May be dropped and called again.
    ///
    /// # Errors
    /// The status the call ended with.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Status> {
        if let Some(Err(status)) = &self.end {
            return Err(status.clone());
        }
        loop {
            let unsaid = || Status::unknown("the stream ended without a status");
            let Some(frame) = self.body.frame().await else {
                return if self.end.is_some() { Ok(None) } else { Err(unsaid()) };
            };
            match frame?.into_data() {
                Ok(bytes) => return Ok(Some(bytes)),
                Err(frame) => {
                    let Ok(trailers) = frame.into_trailers() else { continue };
                    return match said(trailers) {
                        Some(status) if status.code() == Code::Ok => Ok(None),
                        Some(status) => Err(status),
                        None => Err(unsaid()),
                    };
                }
            }
        }
    }
}

/// The status among headers or trailers.
fn said(mut headers: HeaderMap) -> Option<Status> {
    // tonic panics where it cannot be decoded, and nobody here looks at it.
    headers.remove("grpc-status-details-bin");
    Status::from_header_map(&headers)
}

/// What an HTTP status means where there is no other: <https://github.com/grpc/grpc/blob/master/doc/http-grpc-status-mapping.md>.
fn status_of(http: http::StatusCode) -> Status {
    let code = match http.as_u16() {
        400 => Code::Internal,
        401 => Code::Unauthenticated,
        403 => Code::PermissionDenied,
        404 => Code::Unimplemented,
        429 | 502 | 503 | 504 => Code::Unavailable,
        _ => Code::Unknown,
    };
    Status::new(code, format!("HTTP status {http} and no gRPC"))
}

/// A status with the causes that tonic keeps below it.
pub fn explain(status: &Status) -> String {
    let mut text = format!("{:?}: {}", status.code(), status.message());
    let mut source = std::error::Error::source(status);
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// Why there is no connection to the control plane.
#[derive(Debug, thiserror::Error)]
#[error("control plane: {0}")]
struct ConnectError(String);

/// Where to connect and how to know that it is the right one.
struct Target {
    /// `host:port`.
    authority: String,
    host: String,
    port: u16,
    tls: Option<TlsTarget>,
    dialer: Dialer,
}

struct TlsTarget {
    root_ca: RootCa,
    name: ServerName<'static>,
    alternative: Option<ServerName<'static>>,
}

trait Transport: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Transport for S {}

impl Target {
    fn parse(config: &GrpcConfig) -> Result<Self, GrpcError> {
        let malformed = || GrpcError::Address(config.address.clone());
        let (authority, encrypted) = match config.address.split_once("://") {
            Some(("http", rest)) => (rest, false),
            Some(("https", rest)) => (rest, true),
            Some(_) => return Err(malformed()),
            None => (config.address.as_str(), true),
        };
        let authority: http::uri::Authority = authority.trim_end_matches('/').parse().map_err(|_| malformed())?;
        let host = authority.host().trim_matches(['[', ']']).to_owned();
        let port = authority.port_u16().ok_or_else(malformed)?;
        let name = |text: &str| ServerName::try_from(text.to_owned()).map_err(|_| malformed());
        let tls = match encrypted {
            false => None,
            true => Some(TlsTarget {
                root_ca: config.root_ca.clone(),
                name: name(&host)?,
                alternative: config.alt_hostname.as_deref().map(name).transpose()?,
            }),
        };
        Ok(Self { authority: authority.to_string(), host, port, tls, dialer: config.dialer.clone() })
    }

    /// One TCP (and TLS) connection, within the connect timeout.
    async fn connect(&self) -> Result<Box<dyn Transport>, ConnectError> {
        tokio::time::timeout(CONNECT_TIMEOUT, self.dial())
            .await
            .map_err(|_| ConnectError(format!("{}: connect timed out", self.authority)))?
    }

    async fn dial(&self) -> Result<Box<dyn Transport>, ConnectError> {
        let fail = |e: std::io::Error| ConnectError(format!("{}: {e}", self.authority));
        let config = self.tls.as_ref().map(TlsTarget::config).transpose()?;
        let stream = self.dialer.dial(&self.host, self.port).await.map_err(fail)?;
        crate::net::tune(&stream).map_err(fail)?;
        match (config, &self.tls) {
            (Some(config), Some(tls)) => {
                let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
                Ok(Box::new(connector.connect(tls.name.clone(), stream).await.map_err(fail)?))
            }
            _ => Ok(Box::new(stream)),
        }
    }
}

impl TlsTarget {
    fn config(&self) -> Result<rustls::ClientConfig, ConnectError> {
        let fail = |e: &dyn fmt::Display| ConnectError(format!("TLS settings: {e}"));
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let inner = WebPkiServerVerifier::builder_with_provider(Arc::new(self.root_ca.load()?), provider.clone())
            .build()
            .map_err(|e| fail(&e))?;
        let verifier = EitherName { inner, alternative: self.alternative.clone() };
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| fail(&e))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }
}

/// The usual verification, except that a second name is as good as the first.
#[derive(Debug)]
struct EitherName {
    inner: Arc<WebPkiServerVerifier>,
    alternative: Option<ServerName<'static>>,
}

impl ServerCertVerifier for EitherName {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verify = |name: &ServerName<'_>| self.inner.verify_server_cert(end_entity, intermediates, name, ocsp, now);
        let first = verify(name);
        match (&first, &self.alternative) {
            (Err(_), Some(alternative)) => verify(alternative).or(first),
            _ => first,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(address: &str) -> GrpcConfig {
        GrpcConfig {
            address: address.into(),
            root_ca: RootCa::Path("/nonexistent/root.pem".into()),
            token: TokenSource::None,
            headers: Vec::new(),
            cluster_id: "Kubernetes".into(),
            alt_hostname: None,
            dialer: Dialer::default(),
        }
    }

    #[test]
    fn addresses_are_read_with_and_without_scheme() {
        for (address, encrypted) in
            [("istiod.istio-system.svc:15012", true), ("https://10.0.0.1:15012", true), ("http://[::1]:15010", false)]
        {
            let target = Target::parse(&config(address)).unwrap();
            assert_eq!(target.tls.is_some(), encrypted, "{address}");
        }
        assert_eq!(Target::parse(&config("http://[::1]:15010")).unwrap().host, "::1");
        for address in ["", "istiod", "ftp://a:1", "a b:1"] {
            assert!(Target::parse(&config(address)).is_err(), "{address}");
        }
    }

    #[tokio::test]
    async fn a_missing_root_file_is_an_error_of_the_attempt_only() {
        let channel = channel(config("localhost:1")).expect("the file may come later");
        let mut client = mesh_proto::ca::istio_certificate_service_client::IstioCertificateServiceClient::new(channel);
        let status = client.create_certificate(mesh_proto::ca::IstioCertificateRequest::default()).await.unwrap_err();
        assert!(explain(&status).contains("/nonexistent/root.pem"), "{}", explain(&status));
    }

    #[test]
    fn the_token_is_read_for_every_request() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut auth = Authenticate { token: TokenSource::Path(file.path().into()), headers: Arc::from(Vec::new()) };
        let mut sent = || {
            let request = auth.call(Request::new(()))?;
            Ok::<_, Status>(request.metadata().get("authorization").unwrap().to_str().unwrap().to_owned())
        };
        std::fs::write(file.path(), "one\n").unwrap();
        assert_eq!(sent().unwrap(), "Bearer one");
        std::fs::write(file.path(), "two").unwrap();
        assert_eq!(sent().unwrap(), "Bearer two");
        drop(file);
        assert_eq!(sent().unwrap_err().code(), tonic::Code::Unauthenticated);
    }
    /// What a call ends with when a server answers each request with `answer`: data frames, then trailers where there are any.
    async fn answered(
        answer: http::Response<(&'static [&'static [u8]], Option<HeaderMap>)>,
    ) -> (Vec<u8>, Result<(), Status>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let mut config = config(&address);
        config.token = TokenSource::Literal("secret".into());
        let (head, (pieces, trailers)) = answer.into_parts();
        // Ends with the test's runtime.
        tokio::spawn(async move {
            let (socket, _) = listener.accept().await.unwrap();
            let mut connection = h2::server::handshake(socket).await.unwrap();
            let (request, mut respond) = connection.accept().await.unwrap().unwrap();
            assert_eq!(request.uri().path(), "/a.B/C");
            assert_eq!(request.headers()["authorization"], "Bearer secret");
            assert_eq!(
                (&request.headers()["te"], &request.headers()["clusterid"]),
                (&"trailers".parse().unwrap(), &"Kubernetes".parse().unwrap())
            );
            let over = pieces.is_empty() && trailers.is_none();
            let mut send = respond.send_response(http::Response::from_parts(head, ()), over).unwrap();
            for piece in pieces {
                send.send_data(Bytes::from_static(piece), false).unwrap();
            }
            match trailers {
                Some(trailers) => send.send_trailers(trailers).unwrap(),
                None if !over => send.send_data(Bytes::new(), true).unwrap(),
                None => {}
            }
            while connection.accept().await.is_some() {}
        });
        let requests = futures_util::stream::pending::<mesh_proto::ads::DeltaDiscoveryRequest>();
        let mut answers = match call(channel(config).unwrap(), "/a.B/C", requests).await {
            Ok(answers) => answers,
            Err(status) => return (Vec::new(), Err(status)),
        };
        let mut data = Vec::new();
        loop {
            match answers.next().await {
                Ok(Some(bytes)) => data.extend(bytes),
                Ok(None) => return (data, Ok(())),
                Err(status) => return (data, Err(status)),
            }
        }
    }

    fn status(code: &str) -> HeaderMap {
        let status = ("grpc-status".parse().unwrap(), code.parse().unwrap());
        let undecodable = ("grpc-status-details-bin".parse().unwrap(), "!".parse().unwrap());
        [status, undecodable].into_iter().collect()
    }

    fn response<B>(http: u16, headers: HeaderMap, body: B) -> http::Response<B> {
        let mut response = http::Response::builder().status(http).body(body).unwrap();
        *response.headers_mut() = headers;
        response
    }

    #[tokio::test]
    async fn a_call_ends_as_its_server_said() {
        let said: &'static [&'static [u8]] = &[b"one", b"two"];
        let code = |ended: Result<(), Status>| ended.map_err(|status| status.code());
        let none = HeaderMap::new;

        let (data, ended) = answered(response(200, none(), (said, Some(status("0"))))).await;
        assert_eq!((&*data, code(ended)), (&b"onetwo"[..], Ok(())));
        let (data, ended) = answered(response(200, none(), (said, Some(status("14"))))).await;
        assert_eq!((&*data, code(ended)), (&b"onetwo"[..], Err(Code::Unavailable)));
        let (data, ended) = answered(response(200, none(), (said, None))).await;
        assert_eq!((&*data, code(ended)), (&b"onetwo"[..], Err(Code::Unknown)), "it does not say how");

        // Nothing but a status, in place of headers.
        let (_, ended) = answered(response(200, status("0"), (&[], None))).await;
        assert_eq!(code(ended), Ok(()));
        let (_, ended) = answered(response(200, status("7"), (&[], None))).await;
        assert_eq!(code(ended), Err(Code::PermissionDenied));
        // From somebody who knows nothing of gRPC.
        for (http, expected) in
            [(403, Code::PermissionDenied), (404, Code::Unimplemented), (502, Code::Unavailable), (418, Code::Unknown)]
        {
            let (data, ended) = answered(response(http, none(), (said, None))).await;
            assert_eq!((&*data, code(ended)), (&b""[..], Err(expected)));
        }
    }
}
