//! DNS messages: reading what a pod sends, whatever it is, and writing answers no longer than the pod can take.

use std::net::IpAddr;

use hickory_proto::op::{Edns, Header, Message, MessageType, Metadata, OpCode, Query as Question, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};

use super::answer::{Found, Kind};

/// How long clients may keep an answer: what is known here may change at any time.
const TTL_SECONDS: u32 = 30;
/// What fits into any path's datagram, and what we tell clients that ask by EDNS.
const EDNS_PAYLOAD: u16 = 1232;
/// What a client takes over UDP that does not say.
const PLAIN_UDP: usize = 512;
const HEADER: usize = 12;

/// How a query came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    Udp,
    Tcp,
}

impl Transport {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
        }
    }
}

/// One question that can be answered or passed on.
#[derive(Debug, Clone)]
pub struct Query {
    metadata: Metadata,
    question: Question,
    edns: Option<Edns>,
    transport: Transport,
    /// The rest of the message is none that we read; it is left to the server it was meant for.
    opaque: bool,
}

/// What a message from a pod is.
#[derive(Debug)]
pub enum Asked {
    Query(Box<Query>),
    /// To be answered with this.
    Refused(Vec<u8>),
    /// Nothing that can be answered. Answering answers would let two sockets keep each other busy for ever.
    Nothing,
}

/// Reads what a pod sent.
#[must_use]
pub fn read(bytes: &[u8], transport: Transport) -> Asked {
    let mut decoder = BinDecoder::new(bytes);
    let Ok(header) = Header::read(&mut decoder) else { return Asked::Nothing };
    let metadata = header.metadata;
    if metadata.message_type == MessageType::Response {
        return Asked::Nothing;
    }
    let refuse = |code| encode(&respond(metadata, code)).map_or(Asked::Nothing, Asked::Refused);
    if metadata.op_code != OpCode::Query {
        return refuse(ResponseCode::NotImp);
    }
    if header.counts.queries != 1 {
        return refuse(ResponseCode::FormErr);
    }
    let Ok(question) = Question::read(&mut decoder) else { return refuse(ResponseCode::FormErr) };
    let (edns, opaque) = match Message::from_vec(bytes) {
        Ok(message) => {
            let opaque = message.edns.as_ref().is_some_and(|e| e.version() != 0);
            (message.edns, opaque)
        }
        Err(_) => (None, true),
    };
    Asked::Query(Box::new(Query { metadata, question, edns, transport, opaque }))
}

fn respond(query: Metadata, code: ResponseCode) -> Message {
    let mut message = Message::new(query.id, MessageType::Response, query.op_code);
    message.metadata = Metadata::response_from_request(&query);
    message.metadata.recursion_available = true;
    message.metadata.response_code = code;
    message
}

fn encode(message: &Message) -> Option<Vec<u8>> {
    message.to_vec().ok()
}

impl Query {
    /// The name and type to look up in the mesh; `None` for what is always passed on.
    #[must_use]
    pub fn wanted(&self) -> Option<(String, Kind)> {
        let kind = match self.question.query_type() {
            RecordType::A => Kind::A,
            RecordType::AAAA => Kind::Aaaa,
            _ => return None,
        };
        if self.opaque || self.question.query_class() != DNSClass::IN {
            return None;
        }
        let mut name = self.question.name().to_lowercase().to_ascii();
        name.truncate(name.trim_end_matches('.').len());
        Some((name, kind))
    }

    /// For logs.
    #[must_use]
    pub fn name(&self) -> String {
        self.question.name().to_ascii()
    }

    #[must_use]
    pub const fn transport(&self) -> Transport {
        self.transport
    }

    /// A transfer of a zone, which is answered with any number of messages.
    #[must_use]
    pub fn is_transfer(&self) -> bool {
        matches!(self.question.query_type(), RecordType::AXFR | RecordType::IXFR)
    }

    /// The type as a metric label: clients can ask for any of 65536, so the unusual ones are one.
    #[must_use]
    pub fn type_label(&self) -> &'static str {
        match self.question.query_type() {
            RecordType::A => "A",
            RecordType::AAAA => "AAAA",
            RecordType::ANY => "ANY",
            RecordType::CNAME => "CNAME",
            RecordType::HTTPS => "HTTPS",
            RecordType::MX => "MX",
            RecordType::NS => "NS",
            RecordType::PTR => "PTR",
            RecordType::SOA => "SOA",
            RecordType::SRV => "SRV",
            RecordType::SVCB => "SVCB",
            RecordType::TXT => "TXT",
            _ => "OTHER",
        }
    }

    /// The answer of the mesh, no longer than the client takes; what does not fit is left out, with TC set.
    #[must_use]
    pub fn answer(&self, found: Found) -> Option<Vec<u8>> {
        let mut message = self.response(ResponseCode::NoError);
        message.metadata.authoritative = true;
        let mut owner = self.question.name().clone();
        if let Some(canonical) = found.canonical {
            let canonical = Name::from_ascii(format!("{canonical}.")).ok()?;
            message.add_answer(Record::from_rdata(owner, TTL_SECONDS, RData::CNAME(CNAME(canonical.clone()))));
            owner = canonical;
        }
        for address in found.addresses {
            let data = match address {
                IpAddr::V4(v4) => RData::A(A(v4)),
                IpAddr::V6(v6) => RData::AAAA(AAAA(v6)),
            };
            message.add_answer(Record::from_rdata(owner.clone(), TTL_SECONDS, data));
        }
        self.fit(message)
    }

    /// An answer without records.
    #[must_use]
    pub fn fail(&self) -> Option<Vec<u8>> {
        encode(&self.response(ResponseCode::ServFail))
    }

    fn response(&self, code: ResponseCode) -> Message {
        let mut message = respond(self.metadata, code);
        message.add_query(self.question.clone());
        if self.edns.is_some() {
            let mut edns = Edns::new();
            edns.set_max_payload(EDNS_PAYLOAD).set_version(0);
            message.set_edns(edns);
        }
        message
    }

    /// Longest answer the client takes.
    fn limit(&self) -> usize {
        match (self.transport, &self.edns) {
            (Transport::Tcp, _) => usize::from(u16::MAX),
            (Transport::Udp, None) => PLAIN_UDP,
            (Transport::Udp, Some(edns)) => usize::from(edns.max_payload()).max(PLAIN_UDP),
        }
    }

    fn fit(&self, mut message: Message) -> Option<Vec<u8>> {
        let limit = self.limit();
        // Above what one message can hold the encoder gives up; an address record takes 16 bytes at least.
        message.answers.truncate(usize::from(u16::MAX) / 16);
        loop {
            let count = message.answers.len();
            let bytes = encode(&message);
            match bytes {
                Some(bytes) if bytes.len() <= limit => return Some(bytes),
                _ if count == 0 => return None,
                Some(bytes) => {
                    // Records of one answer are of one length, so the first guess is close.
                    let fitting = count * limit / bytes.len();
                    message.answers.truncate(fitting.min(count - 1));
                }
                None => message.answers.truncate(count / 2),
            }
            message.metadata.truncation = true;
        }
    }

    /// The query as another client's: `original` with another id.
    #[must_use]
    pub fn with_id(original: &[u8], id: u16) -> Vec<u8> {
        let mut bytes = original.to_vec();
        if let Some(field) = bytes.first_chunk_mut::<2>() {
            *field = id.to_be_bytes();
        }
        bytes
    }

    /// Is `bytes` what a server answers to this query, asked under `id`? Servers that refuse to read a query may leave
    /// the question out.
    #[must_use]
    pub fn is_answered_by(&self, bytes: &[u8], id: u16) -> bool {
        let mut decoder = BinDecoder::new(bytes);
        let Ok(header) = Header::read(&mut decoder) else { return false };
        if bytes.len() < HEADER || header.metadata.id != id || header.metadata.message_type != MessageType::Response {
            return false;
        }
        match header.counts.queries {
            0 => header.metadata.response_code != ResponseCode::NoError,
            1 => Question::read(&mut decoder).is_ok_and(|q| {
                q.name() == self.question.name()
                    && q.query_type() == self.question.query_type()
                    && q.query_class() == self.question.query_class()
            }),
            _ => false,
        }
    }

    /// The id the client waits for.
    #[must_use]
    pub const fn id(&self) -> u16 {
        self.metadata.id
    }
}

#[cfg(test)]
mod tests;
