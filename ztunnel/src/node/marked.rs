//! Are there connections in a namespace that need capture's rules to find their way?
//!
//! The kernel knows, whoever made them: this process, one that drains, one of a former stay in the mesh. It is asked by
//! sock_diag(7), which tells a socket's mark to those with NET_ADMIN.

use std::io;

use ebpf_loader::abi::{MARK_CAPTURE, MARK_MASK};
use rtnetlink::sys::protocols::NETLINK_SOCK_DIAG;
use rtnetlink::sys::{Socket, SocketAddr};

use super::netns::Netns;

/// `SOCK_DIAG_BY_FAMILY` of `linux/sock_diag.h`; the rest is of `linux/netlink.h` and `linux/inet_diag.h`.
const BY_FAMILY: u16 = 20;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// `NLM_F_REQUEST | NLM_F_DUMP`.
const DUMP: u16 = 0x301;
const INET_DIAG_MARK: u16 = 15;
/// Lengths of `nlmsghdr`, `inet_diag_req_v2` and `inet_diag_msg`.
const HEADER: usize = 16;
const REQUEST: usize = 56;
const MESSAGE: usize = 72;
/// One bit for each state of TCP; those that still have something to say are neither LISTEN nor CLOSE nor TIME_WAIT.
const OPEN_STATES: u32 = !(1 << 10 | 1 << 7 | 1 << 6);
/// The kernel fills at most this much at a time.
const PIECE: usize = 32 << 10;

/// Is a TCP socket open in the namespace that has the mark of a captured connection or of its last leg?
///
/// # Errors
/// Those of entering the namespace and of asking the kernel, which may have no sock_diag.
pub fn any_open(netns: &Netns) -> io::Result<bool> {
    netns.enter(|| {
        let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
        socket.bind_auto()?;
        Ok(any_of(&socket, libc::AF_INET)? || any_of(&socket, libc::AF_INET6)?)
    })
}

fn any_of(socket: &Socket, family: libc::c_int) -> io::Result<bool> {
    socket.send_to(&request(family), &SocketAddr::new(0, 0), 0)?;
    let (mut found, mut buffer) = (false, Vec::with_capacity(PIECE));
    // To the end even when one was found: the next question must not read the rest of this answer.
    loop {
        buffer.clear();
        socket.recv(&mut buffer, 0)?;
        for message in messages(&buffer) {
            match message.kind {
                NLMSG_DONE => return Ok(found),
                NLMSG_ERROR => return Err(error(message.body)),
                _ => found |= mark(message.body).is_some_and(|mark| mark & MARK_MASK == MARK_CAPTURE & MARK_MASK),
            }
        }
    }
}

fn request(family: libc::c_int) -> Vec<u8> {
    let length = u32::try_from(HEADER + REQUEST).unwrap_or_default();
    let mut bytes = Vec::with_capacity(HEADER + REQUEST);
    bytes.extend(length.to_ne_bytes());
    bytes.extend(BY_FAMILY.to_ne_bytes());
    bytes.extend(DUMP.to_ne_bytes());
    // Sequence number and port: there is one question at a time, and the kernel knows who asks.
    bytes.extend([0; 8]);
    bytes.extend([u8::try_from(family).unwrap_or_default(), u8::try_from(libc::IPPROTO_TCP).unwrap_or_default(), 0, 0]);
    bytes.extend(OPEN_STATES.to_ne_bytes());
    bytes.resize(HEADER + REQUEST, 0);
    bytes
}

pub(crate) struct Message<'a> {
    pub(crate) kind: u16,
    pub(crate) body: &'a [u8],
}

pub(crate) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32::from_ne_bytes(*bytes.first_chunk()?)).ok()?;
        let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
        let body = bytes.get(HEADER..length)?;
        bytes = bytes.get(aligned(length)..).unwrap_or_default();
        Some(Message { kind, body })
    })
}

/// Of an `inet_diag_msg` with its attributes.
pub(crate) fn mark(body: &[u8]) -> Option<u32> {
    let mut attributes = body.get(MESSAGE..)?;
    while let Some(length) = attributes.first_chunk().map(|length| usize::from(u16::from_ne_bytes(*length))) {
        let kind = u16::from_ne_bytes(*attributes.get(2..)?.first_chunk()?);
        let value = attributes.get(4..length)?;
        if kind == INET_DIAG_MARK {
            return Some(u32::from_ne_bytes(*value.first_chunk()?));
        }
        attributes = attributes.get(aligned(length)..).unwrap_or_default();
    }
    None
}

fn error(body: &[u8]) -> io::Error {
    let code = body.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
    io::Error::from_raw_os_error(code.wrapping_neg())
}

/// Messages and attributes begin at multiples of four.
const fn aligned(length: usize) -> usize {
    (length + 3) & !3
}

#[cfg(test)]
mod tests {
    use super::*;

    fn socket(attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut body = vec![0; MESSAGE];
        for (kind, value) in attributes {
            let length = u16::try_from(4 + value.len()).unwrap();
            body.extend(length.to_ne_bytes());
            body.extend(kind.to_ne_bytes());
            body.extend(*value);
            body.resize(aligned(body.len()), 0);
        }
        let mut bytes = u32::try_from(HEADER + body.len()).unwrap().to_ne_bytes().to_vec();
        bytes.extend(BY_FAMILY.to_ne_bytes());
        bytes.resize(HEADER, 0);
        bytes.extend(body);
        bytes
    }

    #[test]
    fn the_mark_is_found_behind_other_attributes_and_is_none_where_there_is_none() {
        let bytes =
            [socket(&[(1, b"abc"), (INET_DIAG_MARK, &MARK_CAPTURE.to_ne_bytes())]), socket(&[(1, b"a")])].concat();
        let marks: Vec<_> = messages(&bytes).map(|message| mark(message.body)).collect();
        assert_eq!(marks, [Some(MARK_CAPTURE), None]);
    }

    #[test]
    fn what_is_cut_short_ends_the_reading() {
        let whole = socket(&[(INET_DIAG_MARK, &[1, 0, 0, 0])]);
        for length in 0..whole.len() {
            assert_eq!(messages(&whole[..length]).count(), 0, "{length}");
        }
        assert_eq!(mark(&[0; MESSAGE + 3]), None);
        assert_eq!(mark(&[]), None);
    }
}
