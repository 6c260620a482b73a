//! The accepting side: one authenticated connection, any number of CONNECTs.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use h2::{Reason, RecvStream, server::SendResponse};
use http::{Method, Request, Response, StatusCode};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    task::JoinSet,
};

use super::{
    Authority, Baggage, ConnectHeaders, H2Settings, HboneStream, RESET_STREAMS, RESETS, SEND_BUFFER, StreamName,
    TunnelError,
    allowance::{Allowance, Rationed},
    keepalive,
    outbox::Outbox,
    sending::Sending,
};
use crate::{
    drain::DrainWatcher,
    telemetry::{ResponseFlag, access},
    tls::VerifiedPeer,
};

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// To say goodbye to a peer that may not be listening.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(1);
const MAX_HEADER_LIST: u32 = 64 * 1024;

/// How a connection ended when it did not end well.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("http/2 handshake: {0}")]
    Handshake(#[source] h2::Error),
    #[error("http/2 handshake took too long")]
    HandshakeTimeout,
    #[error("http/2: {0}")]
    Connection(#[source] h2::Error),
    /// The peer did not wait to hear it.
    #[error("http/2: given up by us: {0}")]
    GivenUp(Reason),
    #[error("http/2: flood: more frames that move nothing than any use has")]
    Flood,
    #[error("the peer answers no PING")]
    PeerGone,
    #[error("the peer's certificate has been revoked")]
    Revoked,
    #[error("cut at the drain deadline")]
    Cut,
}

impl ServeError {
    pub fn flag(&self) -> ResponseFlag {
        match self {
            Self::Handshake(_) | Self::HandshakeTimeout => ResponseFlag::H2HandshakeFailure,
            Self::Connection(error) if error.is_library() => error.reason().map_or(ResponseFlag::Reset, blame),
            Self::Connection(_) => ResponseFlag::Reset,
            Self::GivenUp(reason) => blame(*reason),
            Self::Flood => ResponseFlag::Overload,
            Self::PeerGone => ResponseFlag::Timeout,
            Self::Revoked => ResponseFlag::CertRevoked,
            Self::Cut => ResponseFlag::Drained,
        }
    }
}

/// A peer that breaks the rules of HTTP/2, or overdoes them, is told apart from a broken path.
fn blame(ours: Reason) -> ResponseFlag {
    match ours {
        Reason::ENHANCE_YOUR_CALM => ResponseFlag::Overload,
        _ => ResponseFlag::BadRequest,
    }
}

/// What the streams of a connection share.
#[derive(Clone)]
struct Terms {
    /// As [`H2Settings::release`] has it.
    release: usize,
    allowance: Arc<Allowance>,
    outbox: Arc<Outbox>,
}

/// A well-formed CONNECT that waits for an answer. Dropping it resets the stream.
pub struct ConnectRequest {
    pub authority: Authority,
    pub headers: ConnectHeaders,
    pub peer: VerifiedPeer,
    respond: SendResponse<Bytes>,
    body: RecvStream,
    terms: Terms,
}

impl ConnectRequest {
    /// Answers 200; `baggage` describes the destination.
    pub fn accept(mut self, baggage: Option<&Baggage>) -> Result<HboneStream, TunnelError> {
        let mut response = Response::new(());
        let headers = ConnectHeaders { baggage: baggage.cloned(), ..ConnectHeaders::default() };
        headers.write(response.headers_mut());
        let send = self.respond.send_response(response, false).map_err(TunnelError::Stream)?;
        self.terms.allowance.answered();
        Ok(HboneStream::accepted(Sending::new(send), self.body, self.terms.release, self.terms.outbox))
    }

    /// The stream it came on.
    pub fn stream(&self) -> StreamName {
        StreamName { session: self.peer.session(), stream: self.respond.stream_id().as_u32() }
    }

    /// Resolves once the client has given the request up: what is done for it is done for nobody.
    pub async fn given_up(&mut self) {
        // An error is the end of the connection.
        let _ = poll_fn(|cx| self.respond.poll_reset(cx)).await;
    }

    /// Says that nothing was done, so that the peer tries again on another connection.
    pub fn send_away(mut self) {
        self.respond.send_reset(Reason::REFUSED_STREAM);
        self.terms.allowance.answered();
    }

    /// Answers `status` and nothing else.
    pub fn reject(mut self, status: StatusCode) {
        if refuse(&mut self.respond, status).is_ok() {
            self.terms.allowance.answered();
        }
    }
}

/// Fails only when the peer has given the stream up, and then nobody wants the answer.
fn refuse(respond: &mut SendResponse<Bytes>, status: StatusCode) -> Result<(), h2::Error> {
    let mut response = Response::new(());
    *response.status_mut() = status;
    respond.send_response(response, true).map(drop)
}

/// Serves one connection to its end: hands each CONNECT to `handler`, whose futures run as tasks that end no later than
/// this does. On drain the peer is told to open no more streams, and those it has may finish until the cut.
pub async fn serve<S, H, F>(
    stream: S,
    peer: VerifiedPeer,
    settings: H2Settings,
    drain: DrainWatcher,
    handler: H,
) -> Result<(), ServeError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
    H: Fn(ConnectRequest) -> F + Send,
    F: Future<Output = ()> + Send + 'static,
{
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(settings.stream_window)
        .initial_connection_window_size(settings.connection_window)
        .max_frame_size(settings.frame_size)
        .data_frame_budget(settings.frame_budget())
        .max_header_list_size(MAX_HEADER_LIST)
        .max_concurrent_streams(settings.max_streams)
        .max_concurrent_reset_streams(RESET_STREAMS)
        .max_pending_accept_reset_streams(settings.max_streams as usize)
        .max_local_error_reset_streams(Some(RESETS))
        .max_send_buffer_size(SEND_BUFFER);
    let terms = Terms { release: settings.release(), allowance: Arc::default(), outbox: Arc::default() };
    let stream = Rationed::new(stream, terms.allowance.clone(), terms.outbox.clone());
    let handshake = Box::pin(tokio::time::timeout(HANDSHAKE_TIMEOUT, builder.handshake(stream)));
    let mut connection = handshake.await.map_err(|_| ServeError::HandshakeTimeout)?.map_err(ServeError::Handshake)?;

    let mut handlers = JoinSet::new();
    let mut peer_gone = pin!(keepalive::peer_gone(connection.ping_pong(), settings, None));
    let mut draining = pin!(drain.draining());
    let mut cut = pin!(drain.cut());
    let mut exhausted = pin!(terms.allowance.exhausted());
    let mut told = false;
    let outcome = loop {
        // Nothing is lost by a branch not taken: all of them outlive the round, and `accept` is cancel safe. The
        // connection goes first because it is what nearly every wake-up is for.
        tokio::select! {
            biased;
            accepted = connection.accept() => match accepted {
                Some(Ok((request, respond))) => {
                    if let Some(request) = admit(request, respond, &peer, &terms) {
                        handlers.spawn(handler(request));
                    }
                }
                Some(Err(_)) if peer.is_revoked() => break Err(ServeError::Revoked),
                Some(Err(error)) => break closed(error, &terms.allowance),
                None => break Ok(()),
            },
            // Reaps what has finished.
            Some(_) = handlers.join_next() => {}
            () = &mut draining, if !told => {
                told = true;
                connection.graceful_shutdown();
            }
            () = &mut cut, if told => break Err(ServeError::Cut),
            () = &mut peer_gone => break Err(ServeError::PeerGone),
            () = &mut exhausted => break Err(ServeError::Flood),
        }
    };
    match outcome {
        // The handlers' streams are over; they may have a last word to write elsewhere. That it is over h2 tells them by
        // itself when a read fails, but not when a write does: then only its end.
        Ok(()) | Err(ServeError::Connection(_) | ServeError::GivenUp(_) | ServeError::Revoked) => {
            drop(connection);
            tokio::select! {
                () = async { while handlers.join_next().await.is_some() {} } => {}
                () = &mut cut => {}
            }
        }
        // Nobody is there to say goodbye to. Streams break with the connection, and their handlers may say so.
        Err(ServeError::PeerGone) => {
            drop(connection);
            let last_words = async { while handlers.join_next().await.is_some() {} };
            if tokio::time::timeout(GOODBYE_TIMEOUT, last_words).await.is_err() {
                handlers.shutdown().await;
            }
        }
        Err(ref error) => {
            handlers.shutdown().await;
            let flood = matches!(error, ServeError::Flood);
            connection.abrupt_shutdown(if flood { Reason::ENHANCE_YOUR_CALM } else { Reason::NO_ERROR });
            let goodbye = async { while let Some(Ok(_)) = connection.accept().await {} };
            let _ = tokio::time::timeout(GOODBYE_TIMEOUT, goodbye).await;
        }
    }
    outcome
}

/// A peer that hangs up without a GOAWAY has ended the connection, not broken it, unless we had given it up already.
fn closed(error: h2::Error, allowance: &Allowance) -> Result<(), ServeError> {
    let hung_up = error.get_io().is_some_and(|io| crate::net::is_hang_up(io.kind()));
    match allowance.gave_up() {
        Some(reason) if hung_up => Err(ServeError::GivenUp(reason)),
        _ if hung_up || error.reason() == Some(Reason::NO_ERROR) => Ok(()),
        _ => Err(ServeError::Connection(error)),
    }
}

/// Answers what is no CONNECT to an authority.
fn admit(
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    peer: &VerifiedPeer,
    terms: &Terms,
) -> Option<ConnectRequest> {
    let (parts, body) = request.into_parts();
    let authority = (parts.method == Method::CONNECT && !is_extended(&parts.extensions))
        .then(|| parts.uri.authority())
        .flatten()
        .and_then(|authority| authority.as_str().parse().ok());
    let Some(authority) = authority else {
        // Not all of it: the peer chooses the length.
        let error = format!("not a CONNECT to host:port: {:.20} {:.200}", parts.method.as_str(), parts.uri.to_string());
        access::refused_request(peer.addr(), peer.identity(), ResponseFlag::BadRequest, &error);
        let _ = refuse(&mut respond, StatusCode::BAD_REQUEST);
        return None;
    };
    let headers = ConnectHeaders::parse(&parts.headers);
    Some(ConnectRequest { authority, headers, peer: peer.clone(), respond, body, terms: terms.clone() })
}

/// Whether the CONNECT is for another protocol (RFC 8441).
fn is_extended(extensions: &http::Extensions) -> bool {
    extensions.get::<h2::ext::Protocol>().is_some()
}
