//! The opening side of one connection: handshakes, CONNECT, and the task that drives it.

use std::{
    future::{Future, poll_fn},
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::SystemTime,
};

use bytes::Bytes;
use h2::{
    Reason,
    client::{Connection, SendRequest},
};
use http::{Method, Request, StatusCode};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::Notify,
};

use super::{
    Authority, ConnectHeaders, H2Settings, HboneStream, Meanwhile, PoolSettings, RESET_STREAMS, RESETS, SEND_BUFFER,
    StreamName, TunnelError,
    keepalive::{self, Heard, Pulse},
    sending::Sending,
};
use crate::{
    identity::{Identity, WorkloadCertificate},
    tls::{self, TlsStream, VerifiedPeer},
};

const MAX_HEADER_LIST: u32 = 16 * 1024;
/// Streams a peer is taken to allow until its SETTINGS say otherwise.
const ASSUMED_STREAMS: usize = 100;

/// An open tunnel.
pub struct Tunnel {
    pub stream: HboneStream,
    /// Who answered.
    pub peer: VerifiedPeer,
    /// Of the answer; its baggage describes the destination.
    pub response: ConnectHeaders,
}

/// A handle on a connection that another task drives.
#[derive(Clone)]
pub(super) struct Opener {
    send: SendRequest<Bytes>,
    pub(super) peer: VerifiedPeer,
    /// When the certificate ends that we showed.
    pub(super) valid_until: SystemTime,
    pub(super) usage: Arc<Usage>,
    pulse: Arc<Pulse>,
}

/// Streams in use on one connection.
#[derive(Default)]
pub(super) struct Usage {
    streams: AtomicU32,
    /// A stream ended.
    pub(super) released: Notify,
}

/// Counts as one stream until dropped.
pub(super) struct StreamPermit(Arc<Usage>);

impl Usage {
    pub(super) fn streams(&self) -> u32 {
        self.streams.load(Ordering::Relaxed)
    }
}

impl Drop for StreamPermit {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
        self.0.released.notify_one();
    }
}

/// Why a CONNECT brought no tunnel.
pub(super) enum OpenError {
    /// The peer has not seen it, or says that it has not acted on it: another connection may be tried.
    Unprocessed(h2::Error),
    /// Nothing is heard of the peer. It may have acted on the CONNECT before, so that is not sent again.
    Silent,
    Final(TunnelError),
}

impl Opener {
    /// A stream's place on the connection, if there is one: at most `limit`, and at most what the peer allows.
    pub(super) fn reserve(&self, limit: u32) -> Option<StreamPermit> {
        let limit = limit.min(u32::try_from(self.send.current_max_send_streams()).unwrap_or(u32::MAX));
        if self.usage.streams() >= limit {
            return None;
        }
        self.usage.streams.fetch_add(1, Ordering::Relaxed);
        Some(StreamPermit(self.usage.clone()))
    }

    /// Opens one tunnel in the place reserved for it.
    pub(super) async fn open(
        &self,
        request: Request<()>,
        permit: StreamPermit,
        meanwhile: &mut Meanwhile<'_>,
        settings: &PoolSettings,
    ) -> Result<Tunnel, OpenError> {
        let mut send = self.send.clone().ready().await.map_err(OpenError::Unprocessed)?;
        let (mut response, body) = send.send_request(request, false).map_err(OpenError::Unprocessed)?;
        let mut body = Sending::new(body);
        // From here on the handle must not keep a connection alive that the pool has let go.
        drop(send);
        let stream = StreamName { session: self.peer.session(), stream: response.stream_id().as_u32() };
        meanwhile.asked(stream, &mut body);
        let answered = tokio::time::timeout(settings.response_timeout, async {
            let response = poll_fn(|cx| {
                let answer = Pin::new(&mut response).poll(cx);
                if answer.is_pending() {
                    meanwhile.poll(cx, &mut body);
                }
                answer
            });
            tokio::select! {
                biased;
                response = response => Some(response),
                () = self.silence(settings) => None,
            }
        });
        let response = match answered.await {
            Err(_) => return Err(OpenError::Final(TunnelError::ResponseTimeout)),
            Ok(None) => return Err(OpenError::Silent),
            Ok(Some(response)) => response,
        };
        let response = response.map_err(|error| {
            if sent_away(&error) {
                OpenError::Unprocessed(error)
            } else {
                OpenError::Final(TunnelError::from_h2(error, TunnelError::Stream))
            }
        })?;
        let (parts, recv) = response.into_parts();
        if parts.status != StatusCode::OK {
            return Err(OpenError::Final(TunnelError::Status(parts.status)));
        }
        let stream = HboneStream::opened(body, recv, settings.h2.release(), permit);
        Ok(Tunnel { stream, peer: self.peer.clone(), response: ConnectHeaders::parse(&parts.headers) })
    }

    /// Returns once nothing has been heard of the peer for too long. An answer may take its time, as another connection
    /// is made for it; a PONG may not.
    async fn silence(&self, settings: &PoolSettings) {
        loop {
            tokio::time::sleep(settings.answer_patience).await;
            if self.pulse.is_silent(settings.pong_patience).await {
                return;
            }
        }
    }
}

/// Whether the peer says that it has not acted on a request and another connection shall be tried.
pub(super) fn sent_away(error: &h2::Error) -> bool {
    match error.reason() {
        Some(Reason::REFUSED_STREAM) => true,
        Some(Reason::NO_ERROR) => error.is_go_away(),
        _ => false,
    }
}

/// The CONNECT for one tunnel.
pub(super) fn request(authority: &Authority, headers: &ConnectHeaders) -> Result<Request<()>, TunnelError> {
    let uri =
        http::uri::Authority::try_from(authority.to_string()).map_err(|_| TunnelError::Authority(authority.clone()))?;
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = uri.into();
    headers.write(request.headers_mut());
    Ok(request)
}

/// TLS and HTTP/2 over `stream`. The connection must be driven for anything to happen.
pub(super) async fn handshake<S>(
    stream: S,
    cert: &WorkloadCertificate,
    expected: &[Identity],
    addr: SocketAddr,
    settings: &H2Settings,
) -> Result<(Opener, Connection<Heard<TlsStream<S>>, Bytes>), TunnelError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (stream, peer) = tls::connect(cert, expected, stream, addr).await.map_err(TunnelError::Tls)?;
    let pulse = Arc::<Pulse>::default();
    let stream = Heard::new(stream, pulse.clone());
    let mut builder = h2::client::Builder::new();
    builder
        .initial_window_size(settings.stream_window)
        .initial_connection_window_size(settings.connection_window)
        .max_frame_size(settings.frame_size)
        .data_frame_budget(settings.frame_budget())
        .max_header_list_size(MAX_HEADER_LIST)
        .max_concurrent_reset_streams(RESET_STREAMS)
        .max_local_error_reset_streams(Some(RESETS))
        .initial_max_send_streams(ASSUMED_STREAMS)
        .max_send_buffer_size(SEND_BUFFER)
        .enable_push(false);
    let (send, connection) =
        builder.handshake(stream).await.map_err(|error| TunnelError::from_h2(error, TunnelError::H2))?;
    Ok((Opener { send, peer, valid_until: cert.not_after(), usage: Arc::default(), pulse }, connection))
}

/// Drives the opener's connection until it ends or its peer is gone.
pub(super) fn drive<S>(
    opener: &Opener,
    mut connection: Connection<S, Bytes>,
    settings: H2Settings,
) -> impl Future<Output = ()> + use<S>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let ping_pong = connection.ping_pong();
    // Not the opener itself, which would keep the connection open.
    let pulse = opener.pulse.clone();
    async move {
        // Both live as long as the loop would: whichever ends first ends the connection.
        tokio::select! {
            biased;
            ended = connection => if let Err(error) = ended {
                tracing::debug!(%error, "hbone connection ended");
            },
            () = keepalive::peer_gone(ping_pong, settings, Some(pulse)) => {
                tracing::debug!("hbone peer answers no PING");
            }
        }
    }
}

/// A tunnel on a connection of its own, over any stream: the inner layer of double HBONE.
pub async fn connect_once<S>(
    stream: S,
    cert: &WorkloadCertificate,
    expected: &[Identity],
    addr: SocketAddr,
    settings: &PoolSettings,
    authority: &Authority,
    headers: &ConnectHeaders,
) -> Result<Tunnel, TunnelError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let request = request(authority, headers)?;
    let (opener, connection) = handshake(stream, cert, expected, addr, &settings.h2).await?;
    // Not joined: it ends by itself when the only stream has ended, because the opener is gone by then, and keepalive
    // ends it when the peer is.
    tokio::spawn(drive(&opener, connection, settings.h2.clone()));
    let permit = opener.reserve(1).ok_or(TunnelError::Unstable)?;
    opener.open(request, permit, &mut Meanwhile::Wait, settings).await.map_err(|error| match error {
        OpenError::Unprocessed(error) => TunnelError::from_h2(error, TunnelError::Stream),
        OpenError::Silent => TunnelError::PeerGone,
        OpenError::Final(error) => error,
    })
}
