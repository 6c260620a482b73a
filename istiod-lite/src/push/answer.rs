//! Responses, as they are written to the wire: piece by piece, as the transport has room. One that holds the whole mesh is
//! tens of megabytes, and a hundred clients may be sent it at once; it never exists as a whole.

use std::borrow::Cow;
use std::sync::Arc;

use bytes::{BufMut as _, Bytes, BytesMut};
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint};

use crate::resources::{self, Resource, Version};

/// What is written at once, in bytes; more only where one resource is.
const PIECE: usize = 64 * 1024;

/// A `DeltaDiscoveryResponse`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub type_url: Cow<'static, str>,
    pub nonce: String,
    /// Goes as `system_version_info`.
    pub generation: u64,
    pub updated: Vec<Arc<Resource>>,
    pub removed: Vec<Arc<str>>,
    /// Clients that know resources by other names hear of those.
    pub with_aliases: bool,
}

/// Field numbers of `DeltaDiscoveryResponse`.
mod response {
    pub const VERSION: u32 = 1;
    pub const RESOURCES: u32 = 2;
    pub const TYPE_URL: u32 = 4;
    pub const NONCE: u32 = 5;
    pub const REMOVED: u32 = 6;
}

/// Field numbers of its `Resource`.
mod resource {
    pub const VERSION: u32 = 1;
    pub const RESOURCE: u32 = 2;
    pub const NAME: u32 = 3;
    pub const ALIASES: u32 = 4;
}

/// Field numbers of `google.protobuf.Any`.
mod any {
    pub const TYPE_URL: u32 = 1;
    pub const VALUE: u32 = 2;
}

impl Answer {
    /// The resources, with what there is of them for the type asked for.
    fn resources(&self) -> impl Iterator<Item = Encoded<'_>> {
        self.updated.iter().filter_map(|resource| self.encoded(resource))
    }

    fn encoded<'a>(&'a self, resource: &'a Resource) -> Option<Encoded<'a>> {
        let value = resource.message_as(&self.type_url)?;
        Some(Encoded { type_url: &self.type_url, value, resource, with_aliases: self.with_aliases })
    }

    fn length(&self) -> usize {
        let resources: usize = self.resources().map(|resource| field_length(resource.length())).sum();
        let removed: usize = self.removed.iter().map(|name| field_length(name.len())).sum();
        field_length(self.generation.to_string().len())
            + resources
            + field_length(self.type_url.len())
            + field_length(self.nonce.len())
            + removed
    }
}

/// One resource of an answer.
struct Encoded<'a> {
    type_url: &'a str,
    value: resources::Encoded<'a>,
    resource: &'a Resource,
    with_aliases: bool,
}

impl Encoded<'_> {
    fn aliases(&self) -> impl Iterator<Item = &str> {
        self.resource.aliases().filter(|_| self.with_aliases)
    }

    fn any_length(&self) -> usize {
        field_length(self.type_url.len()) + field_length(self.value.len())
    }

    fn length(&self) -> usize {
        let aliases: usize = self.aliases().map(|alias| field_length(alias.len())).sum();
        field_length(Version::LENGTH)
            + field_length(self.any_length())
            + field_length(self.resource.name.len())
            + aliases
    }

    fn write(&self, out: &mut BytesMut) {
        begin(out, response::RESOURCES, self.length());
        put(out, resource::VERSION, self.resource.version.to_string().as_bytes());
        begin(out, resource::RESOURCE, self.any_length());
        put(out, any::TYPE_URL, self.type_url.as_bytes());
        begin(out, any::VALUE, self.value.len());
        self.value.put(out);
        put(out, resource::NAME, self.resource.name.as_bytes());
        for alias in self.aliases() {
            put(out, resource::ALIASES, alias.as_bytes());
        }
    }
}

/// Of a field whose number is below 16.
fn field_length(content: usize) -> usize {
    1 + encoded_len_varint(content as u64) + content
}

fn begin(out: &mut BytesMut, field: u32, length: usize) {
    encode_key(field, WireType::LengthDelimited, out);
    encode_varint(length as u64, out);
}

fn put(out: &mut BytesMut, field: u32, content: &[u8]) {
    begin(out, field, content.len());
    out.put_slice(content);
}

/// An answer on its way, as a gRPC message: behind a byte that says "not compressed" and its length.
#[derive(Debug)]
pub struct Writer {
    answer: Answer,
    /// Its length, until that is written.
    length: Option<u32>,
    /// Resources that are written.
    resources: usize,
    /// Names of those that are no more, likewise.
    removed: usize,
    done: bool,
}

impl Writer {
    /// None: it is longer than a gRPC message may be.
    pub fn new(answer: Answer) -> Option<Self> {
        let length = u32::try_from(answer.length()).ok()?;
        Some(Self { answer, length: Some(length), resources: 0, removed: 0, done: false })
    }

    pub fn answer(&self) -> &Answer {
        &self.answer
    }

    /// All is written.
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// The next piece; none when all is written.
    pub fn piece(&mut self) -> Option<Bytes> {
        if self.done {
            return None;
        }
        let expected = self.length.map_or(PIECE, |length| (length as usize + 5).min(PIECE));
        let mut out = BytesMut::with_capacity(expected);
        if let Some(length) = self.length.take() {
            out.put_u8(0);
            out.put_u32(length);
            put(&mut out, response::VERSION, self.answer.generation.to_string().as_bytes());
        }
        for resource in &self.answer.updated[self.resources..] {
            if out.len() >= PIECE {
                return Some(out.freeze());
            }
            self.resources += 1;
            if let Some(encoded) = self.answer.encoded(resource) {
                encoded.write(&mut out);
            }
        }
        if self.removed == 0 {
            put(&mut out, response::TYPE_URL, self.answer.type_url.as_bytes());
            put(&mut out, response::NONCE, self.answer.nonce.as_bytes());
        }
        for name in &self.answer.removed[self.removed..] {
            if out.len() >= PIECE && self.removed > 0 {
                return Some(out.freeze());
            }
            self.removed += 1;
            put(&mut out, response::REMOVED, name.as_bytes());
        }
        self.done = true;
        Some(out.freeze())
    }
}

#[cfg(test)]
mod tests {
    use mesh_proto::ads::DeltaDiscoveryResponse;
    use mesh_proto::workload::ADDRESS_TYPE;
    use prost::Message as _;

    use super::super::session::fixtures::workload;
    use super::*;

    #[test]
    fn pieces_are_one_message_and_none_is_large() {
        let updated: Vec<_> = (0..5000).map(|at| Arc::new(workload(&format!("uid-{at}"), "node", &["ns/a"]))).collect();
        let gone: Vec<Arc<str>> = (0..20_000).map(|at| Arc::from(format!("gone-{at}"))).collect();
        for with_aliases in [false, true] {
            let answer = Answer {
                type_url: ADDRESS_TYPE.into(),
                nonce: "7".into(),
                generation: 300,
                updated: updated.clone(),
                removed: gone.clone(),
                with_aliases,
            };
            let mut writer = Writer::new(answer).unwrap();
            let mut message = Vec::new();
            while let Some(piece) = writer.piece() {
                assert!(piece.len() <= PIECE + 1024, "{}", piece.len());
                message.extend_from_slice(&piece);
            }
            assert!(message.len() > 4 * PIECE);
            let (head, body) = message.split_at(5);
            assert_eq!(head[0], 0);
            assert_eq!(head[1..], u32::try_from(body.len()).unwrap().to_be_bytes());
            let read = DeltaDiscoveryResponse::decode(body).unwrap();
            assert_eq!((&*read.system_version_info, &*read.type_url, &*read.nonce), ("300", ADDRESS_TYPE, "7"));
            assert!(read.removed_resources.iter().map(String::as_str).eq(gone.iter().map(|name| &**name)));
            assert_eq!(read.resources.len(), updated.len());
            for (read, sent) in read.resources.iter().zip(&updated) {
                assert_eq!((&*read.name, &*read.version), (&*sent.name, &*sent.version.to_string()));
                let any = read.resource.as_ref().unwrap();
                assert_eq!((any.type_url.as_str(), &*any.value), (ADDRESS_TYPE, &*sent.body()));
                let aliases: Vec<&str> = if with_aliases { sent.aliases().collect() } else { vec![] };
                assert_eq!(read.aliases, aliases);
            }
            // The same as a library writes.
            assert_eq!(read.encode_to_vec(), body);
        }
    }
}
