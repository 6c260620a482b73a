//! gRPC's framing of the discovery stream, without buffers that grow: what a library keeps for a stream is as large as the largest
//! message that ever went through it, and of these there are tens of megabytes for each of many clients.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use futures_util::future::BoxFuture;
use http::HeaderMap;
use http_body::Frame;
use http_body_util::BodyExt as _;
use mesh_proto::ads::DeltaDiscoveryRequest;
use mesh_proto::workload::{ADDRESS_TYPE, WORKLOAD_TYPE};
use prost::Message as _;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use tonic::Status;
use tonic::body::Body;

use super::answer::Writer;
use super::callers::{Reserved, Share, Turn};
use super::session::MAX_NAMES;
use super::view::TYPES;

/// Of a message: whether it is compressed, and its length.
const HEAD: usize = 5;
/// Requests carry the versions of all a returning client holds: about 100 bytes for each of 100,000 resources and more.
pub(super) const MAX_REQUEST: usize = 64 * 1024 * 1024;
/// Those that are longer wait for room before they are read.
const SMALL_REQUEST: usize = 64 * 1024;
/// From when a longer one has room until it must be there, so that nobody keeps the room for nothing.
const ARRIVAL: Duration = Duration::from_secs(30);
/// A name takes a few bytes of a request and a hundred of memory, so they are counted before it is decoded. Of what a returning
/// client holds, which is what there was to hold.
const MAX_HELD: usize = 1_000_000;
/// What a client says about itself, which nobody reads.
const MAX_NODE: usize = 256 * 1024;
/// The types of which there is most.
const LONG: [&str; 2] = [ADDRESS_TYPE, WORKLOAD_TYPE];
/// Of a type's URL: one that is not known is answered with its name.
const MAX_TYPE: usize = 2048;
/// Nonce, error, and whatever else there may be.
const MAX_OTHERS: usize = 1024;
/// A buffer that is larger is given back once it is empty.
const KEPT: usize = 16 * 1024;

/// The client's half.
pub struct Requests {
    body: Body,
    buffer: BytesMut,
    share: Share,
    /// Kept while `next` is given up, as is the place in the line.
    waiting: Option<BoxFuture<'static, Reserved>>,
    /// Room for the request that is being read, and until when.
    reserved: Option<(Reserved, Instant)>,
    /// Kept as `waiting` is. The request is there.
    in_line: Option<InLine>,
    /// By position in [`TYPES`]: whether there was a request of it.
    begun: [bool; TYPES.len()],
}

impl Requests {
    pub fn new(body: Body, share: Share) -> Self {
        Self {
            body,
            buffer: BytesMut::new(),
            share,
            waiting: None,
            reserved: None,
            in_line: None,
            begun: [false; TYPES.len()],
        }
    }

    /// Ends when a request should have come that now is coming; also while nobody asks for the next one.
    pub fn due(&self) -> impl Future<Output = ()> + use<> {
        let end = self.coming();
        async move {
            match end {
                Some(end) => tokio::time::sleep_until(end).await,
                None => std::future::pending().await,
            }
        }
    }

    /// # Errors
    /// A request has taken too long to come.
    pub fn check_arrival(&self) -> Result<(), Status> {
        match self.coming() {
            Some(end) if end <= Instant::now() => Err(late()),
            _ => Ok(()),
        }
    }

    /// Until when the request must be there that has room and is not.
    fn coming(&self) -> Option<Instant> {
        self.reserved.as_ref().filter(|_| self.in_line.is_none()).map(|(_, end)| *end)
    }

    /// It waits for room or for its turn, which are nobody else's once they have come, or has room: `next` is not to be put off.
    pub fn is_under_way(&self) -> bool {
        self.waiting.is_some() || self.reserved.is_some() || self.in_line.is_some()
    }

    /// The next request; none when there will be none any more, however that came. May be given up and called again.
    ///
    /// # Errors
    /// What the client is told that does not speak the protocol.
    pub async fn next(&mut self) -> Result<Option<Asked>, Status> {
        loop {
            if let Some(InLine { length, of, turn }) = &mut self.in_line {
                let (length, of, turn) = (*length, *of, turn.await);
                self.in_line = None;
                return Ok(Some(Asked::AtLength(self.long_request(length, of, turn))));
            }
            if let Some(message) = whole(&self.buffer)? {
                let measured = measure(message)?;
                let of = TYPES.iter().position(|is| is.as_bytes() == measured.type_url);
                let is_first = of.is_some_and(|at| !std::mem::replace(&mut self.begun[at], true));
                let length = message.len();
                let takes_long = of.is_some_and(|at| LONG.contains(&TYPES[at]) && (is_first || measured.has_star));
                if length > SMALL_REQUEST || takes_long {
                    self.in_line = Some(InLine { length, of: of.map(|at| TYPES[at]), turn: self.share.turn() });
                    continue;
                }
            }
            if let Some(request) = take(&mut self.buffer)? {
                return Ok(Some(Asked::Shortly(request)));
            }
            if let Some(length) = announced(&self.buffer).filter(|length| *length > SMALL_REQUEST)
                && self.reserved.is_none()
            {
                let share = &self.share;
                let room = self.waiting.get_or_insert_with(|| share.reserve(length)).await;
                self.waiting = None;
                self.reserved = Some((room, Instant::now() + ARRIVAL));
            }
            let frame = match &self.reserved {
                None => self.body.frame().await,
                Some((_, end)) => match timeout_at(*end, self.body.frame()).await {
                    Ok(frame) => frame,
                    Err(_) => {
                        self.reserved = None;
                        return Err(late());
                    }
                },
            };
            let Some(Ok(frame)) = frame else { return Ok(None) };
            if let Ok(data) = frame.into_data() {
                self.buffer.extend_from_slice(&data);
            }
        }
    }

    /// Takes the request out that is there.
    fn long_request(&mut self, length: usize, of: Option<&'static str>, turn: Turn) -> LongRequest {
        self.buffer.advance(HEAD);
        let message = self.buffer.split_to(length);
        // Of its own, or it would keep the memory of the other.
        self.buffer = BytesMut::from(&self.buffer[..]);
        let room = self.reserved.take().map(|(room, _)| room);
        LongRequest { message, of, _held: (room, turn, self.share.clone()) }
    }
}

/// A request that is there and takes long waits for its caller's turn.
struct InLine {
    length: usize,
    of: Option<&'static str>,
    turn: BoxFuture<'static, Turn>,
}

/// A request of a client.
#[derive(Debug)]
pub enum Asked {
    Shortly(DeltaDiscoveryRequest),
    /// One that takes long to handle: most of those that are long say what a client holds, and the first of such a type as there is
    /// most of is answered with all there is.
    AtLength(LongRequest),
}

/// It has its room and its turn until it is dropped.
#[derive(Debug)]
pub struct LongRequest {
    message: BytesMut,
    of: Option<&'static str>,
    _held: (Option<Reserved>, Turn, Share),
}

impl LongRequest {
    /// The type, if it is one that is served.
    pub fn type_url(&self) -> Option<&'static str> {
        self.of
    }

    /// # Errors
    /// What the client is told that does not speak the protocol.
    pub fn read(&self) -> Result<DeltaDiscoveryRequest, Status> {
        decode(&self.message)
    }
}

fn decode(message: &[u8]) -> Result<DeltaDiscoveryRequest, Status> {
    DeltaDiscoveryRequest::decode(message).map_err(|error| Status::internal(format!("an unreadable request: {error}")))
}

fn late() -> Status {
    Status::resource_exhausted(format!("a request that is not here within {} s", ARRIVAL.as_secs()))
}

/// The length of the request that begins here.
fn announced(buffer: &[u8]) -> Option<usize> {
    let (head, _) = buffer.split_at_checked(HEAD)?;
    Some((&head[1..]).get_u32() as usize)
}

/// Field numbers of `DeltaDiscoveryRequest`.
mod request {
    pub const NODE: u32 = 1;
    pub const TYPE_URL: u32 = 2;
    pub const SUBSCRIBE: u32 = 3;
    pub const UNSUBSCRIBE: u32 = 4;
    pub const HELD: u32 = 5;
}

/// What is seen of a request without decoding it.
struct Measured<'a> {
    type_url: &'a [u8],
    /// It asks for everything.
    has_star: bool,
}

/// # Errors
/// It holds more than a client may say.
fn measure(mut message: &[u8]) -> Result<Measured<'_>, Status> {
    let unreadable = |error: prost::DecodeError| Status::internal(format!("an unreadable request: {error}"));
    let (mut names, mut held, mut node, mut others) = (0, 0, 0, 0);
    let mut measured = Measured { type_url: &[], has_star: false };
    while !message.is_empty() {
        let (field, wire_type) = decode_key(&mut message).map_err(unreadable)?;
        let before = message.len();
        let mut content = &[][..];
        match wire_type {
            WireType::LengthDelimited => {
                let length = decode_varint(&mut message).map_err(unreadable)?;
                let parts = usize::try_from(length).ok().and_then(|length| message.split_at_checked(length));
                (content, message) =
                    parts.ok_or_else(|| Status::internal("an unreadable request: it ends within a field"))?;
            }
            other => skip_field(other, field, &mut message, DecodeContext::default()).map_err(unreadable)?,
        }
        match field {
            request::TYPE_URL => measured.type_url = content,
            request::NODE => node += before - message.len(),
            request::SUBSCRIBE | request::UNSUBSCRIBE => {
                names += 1;
                measured.has_star |= content == b"*";
            }
            request::HELD => held += 1,
            _ => others += 1,
        }
        if measured.type_url.len() > MAX_TYPE || others > MAX_OTHERS {
            let most = format!("a longer type than {MAX_TYPE} bytes, or more other fields than {MAX_OTHERS}");
            return Err(Status::resource_exhausted(most));
        }
        if names > MAX_NAMES || held > MAX_HELD {
            let most =
                format!("more names than a request may hold: {MAX_NAMES}, and {MAX_HELD} of what the client has");
            return Err(Status::resource_exhausted(most));
        }
        if node > MAX_NODE {
            return Err(Status::resource_exhausted(format!("node: longer than {MAX_NODE} bytes")));
        }
    }
    Ok(measured)
}

/// The message that begins here, once all of it is there.
fn whole(buffer: &[u8]) -> Result<Option<&[u8]>, Status> {
    let Some((head, rest)) = buffer.split_at_checked(HEAD) else { return Ok(None) };
    if head[0] != 0 {
        return Err(Status::unimplemented("compressed messages are not read"));
    }
    let length = (&head[1..]).get_u32() as usize;
    if length > MAX_REQUEST {
        return Err(Status::out_of_range(format!("a request of {length} bytes; at most {MAX_REQUEST} are read")));
    }
    Ok(rest.get(..length))
}

fn take(buffer: &mut BytesMut) -> Result<Option<DeltaDiscoveryRequest>, Status> {
    let Some(message) = whole(buffer)? else { return Ok(None) };
    measure(message)?;
    let length = message.len();
    let request = decode(message)?;
    buffer.advance(HEAD + length);
    if buffer.is_empty() && HEAD + length > KEPT {
        *buffer = BytesMut::new();
    }
    Ok(Some(request))
}

/// Ours: answers as they come, and how it ends.
pub struct Answers {
    queue: mpsc::Receiver<Result<Writer, Status>>,
    writing: Option<Writer>,
    /// A piece of the answer was just taken. The next comes after everybody else's turn: what follows for a client that has
    /// everything is not to wait for megabytes of each of those that have nothing.
    pausing: bool,
    ended: bool,
}

impl Answers {
    pub fn new(queue: mpsc::Receiver<Result<Writer, Status>>) -> Self {
        Self { queue, writing: None, pausing: false, ended: false }
    }

    fn trailers(&mut self, status: &Status) -> Frame<Bytes> {
        self.ended = true;
        let mut trailers = HeaderMap::new();
        // A text that is no header value is left out, and then the code says it all.
        if status.add_header(&mut trailers).is_err() {
            trailers = HeaderMap::new();
            trailers.insert(Status::GRPC_STATUS, (status.code() as i32).into());
        }
        Frame::trailers(trailers)
    }
}

impl http_body::Body for Answers {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        loop {
            if self.ended {
                return Poll::Ready(None);
            }
            if std::mem::take(&mut self.pausing) {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            if let Some(piece) = self.writing.as_mut().and_then(Writer::piece) {
                self.pausing = self.writing.as_ref().is_some_and(|writer| !writer.is_done());
                return Poll::Ready(Some(Ok(Frame::data(piece))));
            }
            self.writing = None;
            let status = match ready!(self.queue.poll_recv(cx)) {
                Some(Ok(answer)) => {
                    self.writing = Some(answer);
                    continue;
                }
                Some(Err(status)) => status,
                None => Status::ok(""),
            };
            return Poll::Ready(Some(Ok(self.trailers(&status))));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::FutureExt as _;

    use super::super::answer::Answer;
    use super::super::session::fixtures::workload;
    use super::*;

    fn framed(request: &DeltaDiscoveryRequest) -> Vec<u8> {
        let body = request.encode_to_vec();
        [&[0], &u32::try_from(body.len()).unwrap().to_be_bytes()[..], &body].concat()
    }

    fn of(type_url: &str, held: usize) -> DeltaDiscoveryRequest {
        let initial_resource_versions = (0..held).map(|at| (format!("name-{at}"), "0123456789abcdef".into())).collect();
        DeltaDiscoveryRequest {
            type_url: type_url.into(),
            initial_resource_versions,
            ..DeltaDiscoveryRequest::default()
        }
    }

    #[test]
    fn requests_are_read_however_they_are_cut_and_leave_no_large_buffer() {
        let (one, large) = (of("one", 0), of("large", 10_000));
        let mut buffer = BytesMut::new();
        let mut read = Vec::new();
        for piece in [framed(&one), framed(&large), framed(&one)].concat().chunks(1000) {
            buffer.extend_from_slice(piece);
            while let Some(request) = take(&mut buffer).unwrap() {
                read.push(request);
            }
        }
        assert_eq!(read, [one.clone(), large.clone(), one]);
        assert!(buffer.is_empty());

        buffer.extend_from_slice(&framed(&large));
        assert!(take(&mut buffer).unwrap().is_some());
        assert!(buffer.capacity() <= KEPT, "{}", buffer.capacity());
    }

    #[test]
    fn what_would_grow_in_memory_is_refused_before_it_is_decoded() {
        let code =
            |request: &DeltaDiscoveryRequest| take(&mut BytesMut::from(&framed(request)[..])).map_err(|it| it.code());
        let exhausted = Err(tonic::Code::ResourceExhausted);
        let mut names = DeltaDiscoveryRequest {
            resource_names_subscribe: vec![String::new(); MAX_NAMES / 2],
            resource_names_unsubscribe: vec![String::new(); MAX_NAMES / 2],
            ..of("names", 1)
        };
        assert_eq!(code(&names), Ok(Some(names.clone())));
        names.resource_names_subscribe.push(String::new());
        assert_eq!(code(&names), exhausted);
        let id = "x".repeat(MAX_NODE);
        let node = Some(mesh_proto::ads::Node { id, ..Default::default() });
        assert_eq!(code(&DeltaDiscoveryRequest { node, ..of("node", 0) }), exhausted);
        assert_eq!(code(&of(&"x".repeat(MAX_TYPE + 1), 0)), exhausted);
        let others = [[0x48, 0]; MAX_OTHERS + 1].concat();
        let length = u32::try_from(others.len()).unwrap().to_be_bytes();
        let message = [&[0], &length[..], &others].concat();
        assert_eq!(take(&mut BytesMut::from(&message[..])).map_err(|it| it.code()), exhausted);
        // Two bytes for each of a client's, which would be 64 in memory.
        let held = [[0x2a, 0]; MAX_HELD + 1].concat();
        let length = u32::try_from(held.len()).unwrap().to_be_bytes();
        let message = [&[0], &length[..], &held].concat();
        assert_eq!(take(&mut BytesMut::from(&message[..])).map_err(|it| it.code()), exhausted);
    }

    #[tokio::test]
    async fn others_have_their_turn_between_the_pieces_of_a_long_answer() {
        let updated = (0..5000).map(|at| Arc::new(workload(&format!("uid-{at}"), "node", &["ns/a"]))).collect();
        let answer = Answer {
            type_url: ADDRESS_TYPE.into(),
            nonce: "1".into(),
            generation: 1,
            updated,
            removed: Vec::new(),
            with_aliases: false,
        };
        let (send, queue) = mpsc::channel(1);
        send.send(Ok(Writer::new(answer).unwrap())).await.unwrap();
        drop(send);
        let turns = Arc::new(AtomicUsize::new(0));
        let others = Arc::clone(&turns);
        tokio::spawn(async move {
            loop {
                others.fetch_add(1, Ordering::Relaxed);
                tokio::task::yield_now().await;
            }
        });
        let (mut answers, mut pieces) = (Answers::new(queue), 0);
        while let Some(frame) = answers.frame().await {
            pieces += usize::from(frame.unwrap().is_data());
        }
        assert!(pieces > 4, "{pieces}");
        let turns = turns.load(Ordering::Relaxed);
        assert!(turns >= pieces - 1, "{turns} for {pieces}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_large_request_that_does_not_come_gives_its_room_back() {
        use http_body_util::StreamBody;

        let callers = super::super::callers::Callers::default();
        let client = || callers.enter("shop", "cart", Some("uid")).unwrap();
        let length = u32::try_from(MAX_REQUEST).unwrap().to_be_bytes();
        let head = Bytes::from([&[0], &length[..]].concat());
        let (send, frames) = mpsc::channel::<Result<Frame<Bytes>, Status>>(4);
        send.send(Ok(Frame::data(head))).await.unwrap();
        let slow = Body::new(StreamBody::new(tokio_stream::wrappers::ReceiverStream::new(frames)));
        let slow_entry = client();
        let mut slow = Requests::new(slow, slow_entry.share());
        let large = of("large", 10_000);
        // In two pieces, as what comes whole needs no room to wait in.
        let mut rest = Bytes::from(framed(&large));
        let pieces = [rest.split_to(HEAD), rest].map(|piece| Ok::<_, Status>(Frame::data(piece)));
        let whole = Body::new(StreamBody::new(tokio_stream::iter(pieces)));
        let entry = client();
        let mut whole = Requests::new(whole, entry.share());
        let started = Instant::now();
        let (slow, whole) = tokio::join!(slow.next(), async {
            // Given up and called again, as the stream's driver does.
            assert!(tokio::time::timeout(Duration::from_secs(1), whole.next()).await.is_err(), "there is no room");
            (whole.next().await, Instant::now())
        });
        assert_eq!(slow.unwrap_err().code(), tonic::Code::ResourceExhausted);
        let Some(Asked::AtLength(read)) = whole.0.unwrap() else { panic!("it is large") };
        assert_eq!(read.read().unwrap(), large);
        assert!(whole.1 >= started + ARRIVAL, "while the slow one had its time");
    }

    #[tokio::test]
    async fn what_takes_long_is_told_apart_and_a_caller_has_one_at_a_time() {
        let entry = super::super::callers::Callers::default().enter("shop", "cart", Some("uid")).unwrap();
        let everything =
            DeltaDiscoveryRequest { resource_names_subscribe: vec!["*".to_owned()], ..of(ADDRESS_TYPE, 0) };
        let sent = [of(ADDRESS_TYPE, 0), of(ADDRESS_TYPE, 0), of("unknown", 0), of(ADDRESS_TYPE, 10_000), everything];
        let body = Bytes::from(sent.iter().flat_map(framed).collect::<Vec<u8>>());
        let mut requests = Requests::new(Body::new(http_body_util::Full::new(body)), entry.share());
        let mut held = Vec::new();
        for (sent, takes_long) in sent.iter().zip([true, false, false, true, true]) {
            if takes_long && !held.is_empty() {
                assert!(requests.next().now_or_never().is_none());
                assert!(requests.is_under_way());
                held.clear();
            }
            match requests.next().await.unwrap().unwrap() {
                Asked::Shortly(request) => assert_eq!((&request, false), (sent, takes_long)),
                Asked::AtLength(request) => {
                    assert_eq!((&request.read().unwrap(), true), (sent, takes_long));
                    held.push(request);
                }
            }
        }
        assert!(!requests.is_under_way());
    }

    #[test]
    fn what_is_no_request_is_told_so() {
        for (bytes, code) in [
            (&[1, 0, 0, 0, 0][..], tonic::Code::Unimplemented),
            (&[0, 0xff, 0, 0, 0][..], tonic::Code::OutOfRange),
            (&[0, 0, 0, 0, 1, 0xff][..], tonic::Code::Internal),
        ] {
            assert_eq!(take(&mut BytesMut::from(bytes)).unwrap_err().code(), code);
        }
        assert_eq!(take(&mut BytesMut::from(&[0, 0, 0, 0, 2, 0][..])).unwrap(), None);
    }
}
