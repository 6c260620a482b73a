//! A wire that loses frames and takes its time: what goes from one node to the other passes through this process and no longer over
//! the bridge between them.
//!
//! ```text
//!   node-a eth0 ══ node-a (parent) ──► packet socket ─ lost? ─ wait ─► node-b (parent) ══ eth0 node-b
//!                                  ◄──                              ──
//! ```
//! Whole Ethernet frames, ARP and neighbour discovery among them. What is lost is a matter of a seed and of the order of the frames;
//! but of one flow never three in a row, so that what must not fail does not fail now and then by bad luck.
//! The nodes cut their packets to size and sum them up themselves, as the wire is no longer the memory of one kernel.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recvfrom, sendto, setsockopt, socket, sockopt,
};

use crate::places::Places;
use crate::raw::{Lab, NODES};
use crate::sys;
use crate::topology::WIRE;

/// The longest frame: nothing is put together here that a wire would not carry.
const FRAME: usize = 2048;
/// Frames that may wait to be taken off the socket.
const BUFFER: usize = 8 << 20;
/// Frames of one flow that may be lost one after the other.
const IN_A_ROW: u8 = 2;
/// The kernel's name for what this machine itself has sent.
const PACKET_OUTGOING: u8 = 4;

/// What is wrong with the wire.
#[derive(Clone, Copy, Debug)]
pub struct Faults {
    /// Of a hundred frames, in each direction.
    pub lost_percent: u64,
    /// In each direction.
    pub delay: Duration,
    pub seed: u64,
}

/// The wire while it is bad; dropping it puts the bridge back.
pub struct Lossy {
    parent: String,
    stop: Arc<AtomicBool>,
    carried: Arc<AtomicU64>,
    lost: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Lossy {
    /// Takes the place of the bridge between the nodes of a lab.
    ///
    /// # Errors
    /// When a tool is missing, or the kernel does not let us.
    pub fn between(lab: &Lab, places: &Places, faults: Faults) -> Result<Self> {
        let ethtool = places.tools().join("ethtool/sbin/ethtool");
        ensure!(ethtool.exists(), "{} is missing: run `cargo xtask test`", ethtool.display());
        lab.nodes().iter().try_for_each(|node| sum_up(&node.net.netns.name, &ethtool))?;
        let parent = lab.parent.netns.clone();
        let (stop, carried, lost) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default(), Arc::default());
        let (socket, ends) = parent.enter(|| Ok((open()?, ends()?)))?;
        let [a, b] = NODES;
        sys::ip_batch(Some(&parent.name), &format!("link set {a} nomaster\nlink set {b} nomaster\n"))?;
        let wire = Wire {
            socket,
            ends,
            faults,
            random: faults.seed | 1,
            unlucky: HashMap::new(),
            carried: carried.clone(),
            lost: Arc::clone(&lost),
        };
        let mut lossy = Self { parent: parent.name, stop: stop.clone(), carried, lost, thread: None };
        lossy.thread = Some(std::thread::Builder::new().name("wire".to_owned()).spawn(move || wire.carry(&stop))?);
        Ok(lossy)
    }

    /// Frames that were carried, and frames that were lost.
    pub fn counts(&self) -> (u64, u64) {
        (self.carried.load(Ordering::Relaxed), self.lost.load(Ordering::Relaxed))
    }

    /// Puts the bridge back; an error of the wire is told.
    ///
    /// # Errors
    /// What broke the wire itself.
    pub fn stop(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        self.stop.store(true, Ordering::Relaxed);
        let outcome = thread.join().map_err(|_| anyhow!("the wire panicked"))?;
        let [a, b] = NODES;
        sys::ip_batch(Some(&self.parent), &format!("link set {a} master {WIRE}\nlink set {b} master {WIRE}\n"))?;
        outcome
    }
}

impl Drop for Lossy {
    fn drop(&mut self) {
        // The lab may be gone already.
        let _ = self.end();
    }
}

/// Has a node leave nothing of its packets to the device.
fn sum_up(netns: &str, ethtool: &Path) -> Result<()> {
    let mut command = sys::command("ip");
    sys::check(command.args(["netns", "exec", netns]).arg(ethtool).args(["-K", "eth0", "tx", "off"])).map(drop)
}

/// A socket that sees every frame of the namespace.
fn open() -> Result<OwnedFd> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll)
        .context("cannot open a packet socket: CAP_NET_RAW is needed")?;
    setsockopt(&socket, sockopt::RcvBufForce, &BUFFER)?;
    Ok(socket)
}

/// Where the two nodes' links end in the parent namespace.
fn ends() -> Result<[LinkAddr; 2]> {
    let all: Vec<_> = getifaddrs()?.collect();
    let end = |name: &str| {
        let mut links = all.iter().filter(|interface| interface.interface_name == name);
        let link = links.find_map(|interface| interface.address.as_ref()?.as_link_addr().copied());
        link.with_context(|| format!("no link {name}"))
    };
    Ok([end(NODES[0])?, end(NODES[1])?])
}

struct Wire {
    socket: OwnedFd,
    ends: [LinkAddr; 2],
    faults: Faults,
    random: u64,
    /// How many frames of a flow were lost last, one after the other.
    unlucky: HashMap<Vec<u8>, u8>,
    carried: Arc<AtomicU64>,
    lost: Arc<AtomicU64>,
}

impl Wire {
    /// Until told to stop.
    fn carry(mut self, stop: &AtomicBool) -> Result<()> {
        // All wait equally long, so the first that came is the first to go.
        let mut waiting: VecDeque<(Instant, LinkAddr, Vec<u8>)> = VecDeque::new();
        while !stop.load(Ordering::Relaxed) {
            let idle = Duration::from_millis(20);
            let pause =
                waiting.front().map_or(idle, |(due, ..)| due.saturating_duration_since(Instant::now()).min(idle));
            // Up to a millisecond late, which is not what this wire is about.
            let timeout = PollTimeout::try_from(pause + Duration::from_micros(999))?;
            match poll(&mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error).context("waiting for frames"),
            }
            while let Some((to, frame)) = self.take()? {
                if self.loses(&frame) {
                    self.lost.fetch_add(1, Ordering::Relaxed);
                } else {
                    waiting.push_back((Instant::now() + self.faults.delay, to, frame));
                }
            }
            while waiting.front().is_some_and(|(due, ..)| *due <= Instant::now()) {
                if let Some((_, to, frame)) = waiting.pop_front() {
                    self.give(&to, &frame)?;
                }
            }
        }
        Ok(())
    }

    /// The next frame that came from a node, and the end at which it leaves.
    fn take(&self) -> Result<Option<(LinkAddr, Vec<u8>)>> {
        let mut buffer = vec![0; FRAME];
        loop {
            let (length, from) = match recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut buffer) {
                Ok((length, Some(from))) => (length, from),
                Ok((_, None)) | Err(Errno::EINTR | Errno::ENETDOWN) => continue,
                Err(Errno::EAGAIN) => return Ok(None),
                Err(error) => return Err(error).context("taking a frame"),
            };
            let [a, b] = &self.ends;
            let to = match from.ifindex() {
                _ if from.pkttype() == PACKET_OUTGOING => continue,
                index if index == a.ifindex() => *b,
                index if index == b.ifindex() => *a,
                _ => continue,
            };
            buffer.truncate(length);
            return Ok(Some((to, buffer)));
        }
    }

    fn give(&self, to: &LinkAddr, frame: &[u8]) -> Result<()> {
        match sendto(self.socket.as_raw_fd(), frame, to, MsgFlags::empty()) {
            Ok(_) => {
                self.carried.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
            // A wire has no better answer either.
            Err(Errno::EAGAIN | Errno::ENOBUFS | Errno::ENETDOWN) => {
                self.lost.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
            Err(error) => Err(error).with_context(|| format!("giving a frame of {} bytes", frame.len())),
        }
    }

    fn loses(&mut self, frame: &[u8]) -> bool {
        // Xorshift: any will do.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let lost = self.unlucky.entry(flow_of(frame).to_vec()).or_default();
        let loses = (self.random >> 16) % 100 < self.faults.lost_percent && *lost < IN_A_ROW;
        *lost = if loses { *lost + 1 } else { 0 };
        loses
    }
}

/// What tells one flow from another: addresses and ports of IPv4 and IPv6 without options, the kind of anything else.
fn flow_of(frame: &[u8]) -> &[u8] {
    let part = match frame.get(12..14) {
        Some([0x08, 0x00]) => frame.get(26..38),
        Some([0x86, 0xdd]) => frame.get(22..58),
        kind => kind,
    };
    part.unwrap_or(frame)
}
