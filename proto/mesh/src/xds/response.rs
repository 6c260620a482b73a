//! Takes the responses of a delta stream apart as they arrive, without I/O: bytes in, resources out.
//!
//! A mesh of a hundred thousand workloads comes as one message of tens of megabytes. Nobody needs to hold it: each
//! resource is whole long before the message is, and what a stream holds back is one of them at most.

use bytes::{Buf, BytesMut};

use crate::fields::{self, Field, Malformed, Value};

/// As long as a message may be.
const MAX_MESSAGE: usize = 200 * 1024 * 1024;
/// The compression flag and the length before each message.
const HEAD: usize = 5;
/// Field numbers of `envoy.service.discovery.v3.DeltaDiscoveryResponse`, of `Resource` in it, and of `google.protobuf.Any`.
mod number {
    pub const RESOURCES: u32 = 2;
    pub const TYPE_URL: u32 = 4;
    pub const NONCE: u32 = 5;
    pub const REMOVED: u32 = 6;

    pub const VERSION: u32 = 1;
    pub const CONTENT: u32 = 2;
    pub const NAME: u32 = 3;
    pub const ALIASES: u32 = 4;

    pub const ANY_TYPE_URL: u32 = 1;
    pub const ANY_VALUE: u32 = 2;
}

/// Why a stream makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResponseError {
    #[error("a response is {0}")]
    Malformed(&'static str),
    #[error("a response is compressed, which was not offered")]
    Compressed,
    #[error("a response is too large: {0} bytes")]
    TooLarge(usize),
}

/// What was sent would be lost if it was passed over.
const WRONG_TYPE: ResponseError = ResponseError::Malformed("with a field of another type than it has");

impl From<Malformed> for ResponseError {
    fn from(_: Malformed) -> Self {
        Self::Malformed("not a protobuf message")
    }
}

/// One resource of the response that is arriving.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resource<'a> {
    pub name: &'a str,
    pub version: &'a str,
    pub aliases: Vec<&'a str>,
    /// Its type and the encoded message.
    pub content: Option<(&'a str, &'a [u8])>,
}

/// What a response says beside its resources.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rest {
    pub type_url: String,
    pub nonce: String,
    pub removed: Vec<String>,
    /// Length of the whole message.
    pub bytes: usize,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Part<'a> {
    Resource(Resource<'a>),
    /// The response is complete.
    End(Rest),
}

/// What of a stream has arrived and was not taken out yet.
#[derive(Debug, Default)]
pub struct Responses {
    buffer: BytesMut,
    /// Of the buffer, what the part given out last stood on.
    used: usize,
    /// Of the message that is arriving, what has not been taken out; `None` between two.
    left: Option<usize>,
    rest: Rest,
}

impl Responses {
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.advance(std::mem::take(&mut self.used));
        self.buffer.extend_from_slice(bytes);
    }

    /// Whether the stream may end here.
    pub fn is_between(&self) -> bool {
        self.left.is_none() && self.buffer.len() == self.used
    }

    /// What comes next; `None` when it has not arrived yet.
    ///
    /// # Errors
    /// From then on nothing makes sense any more.
    pub fn pop(&mut self) -> Result<Option<Part<'_>>, ResponseError> {
        self.buffer.advance(std::mem::take(&mut self.used));
        loop {
            let Some(left) = self.left else {
                if !self.head()? {
                    return Ok(None);
                }
                continue;
            };
            if left == 0 {
                self.left = None;
                return Ok(Some(Part::End(std::mem::take(&mut self.rest))));
            }
            let there = &self.buffer[..left.min(self.buffer.len())];
            let length = match fields::first(there)? {
                Some(Field { tag: number::RESOURCES, encoded, .. }) => {
                    let length = encoded.len();
                    (self.used, self.left) = (length, Some(left - length));
                    // Once more, as the borrow checker does not see that the buffer stays as it is.
                    let Some(Field { value: Value::Bytes(resource), .. }) = fields::first(&self.buffer[..length])?
                    else {
                        return Err(WRONG_TYPE);
                    };
                    return read(resource).map(|resource| Some(Part::Resource(resource)));
                }
                Some(field) => {
                    note(&mut self.rest, &field)?;
                    field.encoded.len()
                }
                None if there.len() == left => return Err(ResponseError::Malformed("cut short")),
                None => return Ok(None),
            };
            self.buffer.advance(length);
            self.left = Some(left - length);
        }
    }

    /// Reads what stands before a message; false when it is not there yet.
    fn head(&mut self) -> Result<bool, ResponseError> {
        if self.buffer.len() < HEAD {
            return Ok(false);
        }
        if self.buffer.get_u8() != 0 {
            return Err(ResponseError::Compressed);
        }
        let length = self.buffer.get_u32() as usize;
        if length > MAX_MESSAGE {
            return Err(ResponseError::TooLarge(length));
        }
        self.rest.bytes = length;
        self.left = Some(length);
        Ok(true)
    }
}

fn note(rest: &mut Rest, field: &Field<'_>) -> Result<(), ResponseError> {
    match (field.tag, field.value) {
        (number::TYPE_URL, Value::Bytes(bytes)) => rest.type_url = text(bytes)?.to_owned(),
        (number::NONCE, Value::Bytes(bytes)) => rest.nonce = text(bytes)?.to_owned(),
        (number::REMOVED, Value::Bytes(bytes)) => rest.removed.push(text(bytes)?.to_owned()),
        (number::TYPE_URL | number::NONCE | number::REMOVED, _) => return Err(WRONG_TYPE),
        // The version of the whole system says nothing about any resource; and what may be added one day.
        _ => {}
    }
    Ok(())
}

fn text(bytes: &[u8]) -> Result<&str, ResponseError> {
    std::str::from_utf8(bytes).map_err(|_| ResponseError::Malformed("not UTF-8 where text belongs"))
}

/// `envoy.service.discovery.v3.Resource`.
fn read(message: &[u8]) -> Result<Resource<'_>, ResponseError> {
    let mut resource = Resource::default();
    for field in fields::all(message) {
        let Field { tag, value, .. } = field?;
        match (tag, value) {
            (number::VERSION, Value::Bytes(bytes)) => resource.version = text(bytes)?,
            (number::CONTENT, Value::Bytes(bytes)) => {
                // A message that comes twice is one, of both.
                resource.content = Some(any(bytes, resource.content.unwrap_or_default())?);
            }
            (number::NAME, Value::Bytes(bytes)) => resource.name = text(bytes)?,
            (number::ALIASES, Value::Bytes(bytes)) => resource.aliases.push(text(bytes)?),
            (number::VERSION | number::CONTENT | number::NAME | number::ALIASES, _) => return Err(WRONG_TYPE),
            _ => {}
        }
    }
    Ok(resource)
}

/// `google.protobuf.Any`, after what is known of it.
fn any<'a>(message: &'a [u8], known: (&'a str, &'a [u8])) -> Result<(&'a str, &'a [u8]), ResponseError> {
    let (mut type_url, mut content) = known;
    for field in fields::all(message) {
        let Field { tag, value, .. } = field?;
        match (tag, value) {
            (number::ANY_TYPE_URL, Value::Bytes(bytes)) => type_url = text(bytes)?,
            (number::ANY_VALUE, Value::Bytes(bytes)) => content = bytes,
            (number::ANY_TYPE_URL | number::ANY_VALUE, _) => return Err(WRONG_TYPE),
            _ => {}
        }
    }
    Ok((type_url, content))
}

#[cfg(test)]
pub(super) mod tests {
    use mesh_proto::ads::{self, DeltaDiscoveryResponse};
    use prost::Message;
    use prost_types::Any;

    use super::*;

    pub fn framed(response: &DeltaDiscoveryResponse) -> Vec<u8> {
        let message = response.encode_to_vec();
        let length = u32::try_from(message.len()).unwrap().to_be_bytes();
        [&[0], &length[..], &message].concat()
    }

    fn response() -> DeltaDiscoveryResponse {
        let any = Any { type_url: "t".to_owned(), value: vec![7; 300] };
        let with = ads::Resource {
            name: "a".to_owned(),
            version: "1".to_owned(),
            aliases: vec!["x".to_owned(), "y".to_owned()],
            resource: Some(any),
        };
        DeltaDiscoveryResponse {
            type_url: "t".to_owned(),
            nonce: "n".to_owned(),
            resources: vec![with, ads::Resource { name: "b".to_owned(), ..Default::default() }],
            removed_resources: vec!["c".to_owned(), "d".to_owned()],
            system_version_info: "v".to_owned(),
        }
    }

    /// All parts, told apart, as they come out when the stream arrives in pieces of `size`.
    fn told(stream: &[u8], size: usize) -> Vec<String> {
        let (mut responses, mut told) = (Responses::default(), Vec::new());
        for piece in stream.chunks(size) {
            responses.push(piece);
            while let Some(part) = responses.pop().expect("it makes sense") {
                told.push(format!("{part:?}"));
            }
        }
        assert!(responses.is_between());
        told
    }

    #[test]
    fn parts_come_out_whatever_the_pieces_they_arrive_in() {
        let stream = [framed(&response()), framed(&DeltaDiscoveryResponse::default()), framed(&response())].concat();
        let whole = told(&stream, stream.len());
        assert_eq!(whole.len(), 3 + 1 + 3);
        let first = Resource { name: "a", version: "1", aliases: vec!["x", "y"], content: Some(("t", &[7; 300])) };
        assert_eq!(whole[0], format!("{:?}", Part::Resource(first)));
        let second = Resource { name: "b", ..Resource::default() };
        assert_eq!(whole[1], format!("{:?}", Part::Resource(second)));
        let removed = vec!["c".to_owned(), "d".to_owned()];
        let bytes = response().encoded_len();
        let rest = Rest { type_url: "t".to_owned(), nonce: "n".to_owned(), removed, bytes };
        assert_eq!(whole[2], format!("{:?}", Part::End(rest)));
        assert_eq!(whole[3], format!("{:?}", Part::End(Rest::default())));
        assert_eq!(whole[4..], whole[..3]);
        for size in [1, 2, 3, 7, 100, 301] {
            assert_eq!(told(&stream, size), whole, "in pieces of {size}");
        }
    }

    #[test]
    fn a_resource_is_there_before_its_message_is() {
        let mut responses = Responses::default();
        let stream = framed(&response());
        responses.push(&stream[..stream.len() - 10]);
        assert!(matches!(responses.pop(), Ok(Some(Part::Resource(Resource { name: "a", .. })))));
        assert!(matches!(responses.pop(), Ok(Some(Part::Resource(Resource { name: "b", .. })))));
        assert_eq!(responses.pop(), Ok(None));
        assert!(!responses.is_between());
        assert!(responses.buffer.len() < 20, "what was taken out is gone: {}", responses.buffer.len());
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let refused = |stream: &[u8]| {
            let mut responses = Responses::default();
            responses.push(stream);
            loop {
                match responses.pop() {
                    Ok(Some(_)) => {}
                    Ok(None) => panic!("{stream:?} is waited for"),
                    Err(error) => return error,
                }
            }
        };
        assert_eq!(refused(&[1, 0, 0, 0, 0]), ResponseError::Compressed);
        assert_eq!(refused(&[0, 0xff, 0, 0, 0]), ResponseError::TooLarge(0xff00_0000));
        assert_eq!(refused(&[0, 0, 0, 0, 2, 0x12, 5]), ResponseError::Malformed("cut short"));
        assert_eq!(refused(&[0, 0, 0, 0, 2, 0x13, 0]), ResponseError::Malformed("not a protobuf message"));
        for number in [0x10, 0x20, 0x28, 0x30] {
            assert_eq!(refused(&[0, 0, 0, 0, 2, number, 1]), WRONG_TYPE, "{number} is a number");
        }
        for number in [0x08, 0x10, 0x18, 0x20] {
            assert_eq!(refused(&[0, 0, 0, 0, 4, 0x12, 2, number, 1]), WRONG_TYPE, "{number} of a resource is a number");
        }
        assert_eq!(refused(&[0, 0, 0, 0, 6, 0x12, 4, 0x12, 2, 0x08, 1]), WRONG_TYPE);
        assert_eq!(refused(&[0, 0, 0, 0, 3, 0x22, 1, 0xff]), ResponseError::Malformed("not UTF-8 where text belongs"));
        assert_eq!(refused(&[0, 0, 0, 0, 4, 0x12, 2, 0x1a, 9]), ResponseError::Malformed("not a protobuf message"));
    }
}
