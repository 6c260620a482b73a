//! A packet capture on the wire between the nodes, and what a test asks of it.
//!
//! A packet socket needs no start-up time and no flushing: what was on the wire before [`Capture::stop`] is in the result.

use std::io::{Read, Write};
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow};
use socket2::{Domain, Protocol, Socket, Type};

use crate::topology::Netns;

const ETH_P_ALL: u16 = 3;
const MAX_FRAME: usize = 66_000;

/// A running capture of every device in one namespace. In the parent namespace that is all traffic between nodes, once for each
/// bridge port it crosses.
pub struct Capture {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Vec<Frame>>>,
}

/// One captured Ethernet frame.
pub struct Frame {
    pub at: SystemTime,
    pub bytes: Vec<u8>,
}

/// A TCP segment inside a frame.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    pub source: (IpAddr, u16),
    pub destination: (IpAddr, u16),
    pub payload: &'a [u8],
}

/// What was seen.
pub struct Wire {
    pub frames: Vec<Frame>,
}

impl Capture {
    /// Starts capturing in a namespace.
    pub fn start(netns: &Netns) -> Result<Self> {
        Self::keeping(netns, |_| true)
    }

    /// As [`Capture::start`], for long times: keeps the frames that `wanted` says yes to.
    pub fn keeping(netns: &Netns, wanted: impl FnMut(&[u8]) -> bool + Send + 'static) -> Result<Self> {
        let socket = netns.enter(|| {
            let protocol = Protocol::from(i32::from(ETH_P_ALL.to_be()));
            let socket = Socket::new(Domain::PACKET, Type::RAW, Some(protocol))
                .context("cannot open a packet socket: CAP_NET_RAW is needed")?;
            socket.set_recv_buffer_size(64 << 20)?;
            socket.set_read_timeout(Some(Duration::from_millis(20)))?;
            Ok(socket)
        })?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = stop.clone();
        let thread = std::thread::spawn(move || collect(&socket, &stopping, wanted));
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Ends the capture once what is queued has been read.
    pub fn stop(mut self) -> Result<Wire> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().expect("only stop takes the thread, and it takes self");
        let frames = thread.join().map_err(|_| anyhow!("the capture thread panicked"))?;
        Ok(Wire { frames })
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn collect(mut socket: &Socket, stopping: &AtomicBool, mut wanted: impl FnMut(&[u8]) -> bool) -> Vec<Frame> {
    let mut frames = Vec::new();
    let mut buffer = vec![0; MAX_FRAME];
    loop {
        // Read before the receive: a frame queued before `stop` is then never missed.
        let last = stopping.load(Ordering::Relaxed);
        match socket.read(&mut buffer) {
            Ok(length) => {
                if !wanted(&buffer[..length]) {
                    continue;
                }
                frames.push(Frame { at: SystemTime::now(), bytes: buffer[..length].to_vec() });
            }
            Err(_) if last => return frames,
            Err(_) => {}
        }
    }
}

impl Frame {
    /// The TCP segment in this frame, if there is one (no fragments, no extension headers: the lab makes none).
    pub fn tcp(&self) -> Option<Segment<'_>> {
        let ethertype = u16::from_be_bytes(self.bytes.get(12..14)?.try_into().ok()?);
        let ip = self.bytes.get(14..)?;
        let (source, destination, tcp): (IpAddr, IpAddr, &[u8]) = match ethertype {
            0x0800 if ip.get(9) == Some(&6) => {
                let header = usize::from(ip[0] & 0x0f) * 4;
                let total = usize::from(u16::from_be_bytes(ip.get(2..4)?.try_into().ok()?));
                let source: [u8; 4] = ip.get(12..16)?.try_into().ok()?;
                let destination: [u8; 4] = ip.get(16..20)?.try_into().ok()?;
                (source.into(), destination.into(), ip.get(header..total)?)
            }
            0x86dd if ip.get(6) == Some(&6) => {
                let length = usize::from(u16::from_be_bytes(ip.get(4..6)?.try_into().ok()?));
                let source: [u8; 16] = ip.get(8..24)?.try_into().ok()?;
                let destination: [u8; 16] = ip.get(24..40)?.try_into().ok()?;
                (source.into(), destination.into(), ip.get(40..40 + length)?)
            }
            _ => return None,
        };
        let port = |at: usize| Some(u16::from_be_bytes(tcp.get(at..at + 2)?.try_into().ok()?));
        let header = usize::from(tcp.get(12)? >> 4) * 4;
        Some(Segment { source: (source, port(0)?), destination: (destination, port(2)?), payload: tcp.get(header..)? })
    }
}

impl Segment<'_> {
    /// Whether either end has this address.
    pub fn touches(&self, address: IpAddr) -> bool {
        self.source.0 == address || self.destination.0 == address
    }
}

impl Wire {
    /// All TCP segments, in order.
    pub fn segments(&self) -> impl Iterator<Item = Segment<'_>> {
        self.frames.iter().filter_map(Frame::tcp)
    }

    /// Segments with both ends among `addresses`.
    pub fn between<'a>(&'a self, addresses: &'a [IpAddr]) -> impl Iterator<Item = Segment<'a>> {
        self.segments()
            .filter(|segment| addresses.contains(&segment.source.0) && addresses.contains(&segment.destination.0))
    }

    /// How many frames carry `needle` in clear, in whatever protocol.
    pub fn count(&self, needle: &[u8]) -> usize {
        self.frames.iter().filter(|frame| contains(&frame.bytes, needle)).count()
    }

    /// TLS versions that servers chose on `port`, from each ServerHello seen; 0x0304 is TLS 1.3.
    pub fn tls_versions(&self, port: u16) -> Vec<u16> {
        self.segments()
            .filter(|segment| segment.source.1 == port)
            .filter_map(|segment| server_hello_version(segment.payload))
            .collect()
    }

    /// Writes a pcap file that tcpdump and Wireshark read.
    pub fn write_pcap(&self, path: &Path) -> Result<()> {
        let mut file = std::io::BufWriter::new(std::fs::File::create(path)?);
        let header: [u32; 6] = [0xa1b2_c3d4, 0x0004_0002, 0, 0, 0x0004_0000, 1];
        header.iter().try_for_each(|word| file.write_all(&word.to_le_bytes()))?;
        for frame in &self.frames {
            let at = frame.at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            let length = u32::try_from(frame.bytes.len()).context("frame too long")?;
            let seconds = u32::try_from(at.as_secs()).unwrap_or(u32::MAX);
            for word in [seconds, at.subsec_micros(), length, length] {
                file.write_all(&word.to_le_bytes())?;
            }
            file.write_all(&frame.bytes)?;
        }
        Ok(file.flush()?)
    }
}

/// Whether `needle` occurs in `haystack`.
pub fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

/// The version a segment that begins with a ServerHello record settles on (RFC 8446, 4.1.3 and 4.2.1).
fn server_hello_version(payload: &[u8]) -> Option<u16> {
    let be16 = |at: usize| Some(u16::from_be_bytes(payload.get(at..at + 2)?.try_into().ok()?));
    // Record header 5, handshake header 4: type 2 is ServerHello.
    if payload.first() != Some(&0x16) || payload.get(5) != Some(&2) {
        return None;
    }
    let legacy = be16(9)?;
    let session = usize::from(*payload.get(43)?);
    let mut at = 44 + session + 3;
    let end = at + 2 + usize::from(be16(at)?);
    at += 2;
    while at + 4 <= end {
        let (kind, length) = (be16(at)?, usize::from(be16(at + 2)?));
        if kind == 43 {
            return be16(at + 4);
        }
        at += 4 + length;
    }
    Some(legacy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_version_a_server_chose() {
        let mut hello = vec![0x16, 3, 3, 0, 0, 2, 0, 0, 0, 3, 3];
        hello.extend([7; 32]);
        hello.extend([0, 0x13, 0x01, 0, 0, 6, 0, 43, 0, 2, 3, 4]);
        assert_eq!(server_hello_version(&hello), Some(0x0304));
        hello.truncate(47);
        hello.extend([0, 0]);
        assert_eq!(server_hello_version(&hello), Some(0x0303));
        assert_eq!(server_hello_version(b"GET / HTTP/1.1"), None);
    }
}
