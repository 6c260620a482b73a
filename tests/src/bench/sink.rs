//! Both ends of the suite `capture`: a sink that takes connections itself, and a client that times what it does.
//!
//! The sink stands where a proxy would, with nothing behind it, so that what is measured is the way there. It serves one connection
//! after the other. For ours it is the kernel's own programs, maps and rules as a ztunnel sets them up.

use std::convert::Infallible;
use std::fs::File;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use ebpf_loader::abi::MARK_LEG;
use ebpf_loader::{Capture, Phase, PodCapture, Slot};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::RcvBufForce;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

/// Where the sink listens when it is dialled itself, or redirected to.
pub const PORT: u16 = 15001;
/// An address that nobody has, beyond the pod's default route: what captured connections dial.
pub const FOREIGN: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
/// The port that is dialled there.
pub const FOREIGN_PORT: u16 = 80;
/// Said on standard output when connections can come.
pub const READY: &str = "ready";

/// First byte of a connection: what the sink is to do with the rest. Without one it is closed.
const ECHO: u8 = b'e';
const SWALLOW: u8 = b's';
const RESET: u8 = b'r';
const READ_AHEAD: usize = 256 << 10;
/// What each end of a connection may hold, for all contestants alike. Left to itself the kernel finds the receiver's size from how
/// its first round trips went, and then keeps to it: a connection is faster or slower by half for chance alone.
const WINDOW: usize = 1 << 20;
/// How long a side of a connection that is timed tries again before it sleeps.
const AWAKE: Duration = Duration::from_millis(5);
/// Between two connections that are timed: the sink's core is still taking the last one down when its reset arrives, and in
/// that it would stand in the next one's way.
const APART: Duration = Duration::from_micros(50);
/// Carried but not measured, at the beginning.
const WARM_UP: Duration = Duration::from_millis(100);
/// Most operations that are timed one by one.
const SAMPLES: usize = 200_000;

/// How connections get to the sink.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Way {
    /// They are made to it
    Direct,
    /// Mark, rule and `sk_lookup`, by our programs
    Ours,
}

/// Arguments of the sink.
#[derive(Args, Clone, Debug)]
pub struct SinkOptions {
    pub way: Way,
    #[arg(long)]
    pub cpu: usize,
    /// The pod's address
    #[arg(long)]
    pub pod: Option<Ipv4Addr>,
    #[arg(long)]
    pub bpffs: Option<PathBuf>,
    #[arg(long)]
    pub cgroup: Option<PathBuf>,
}

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Deed {
    /// `connect`; the sink closes with a reset
    Connect,
    /// 64 bytes there and back
    Ping,
    /// Writes of `size` bytes
    Push,
}

/// Arguments of the client.
#[derive(Args, Clone, Debug)]
pub struct DialOptions {
    pub deed: Deed,
    #[arg(long)]
    pub to: SocketAddr,
    #[arg(long)]
    pub cpu: usize,
    #[arg(long, default_value_t = 64)]
    pub size: usize,
    #[arg(long, default_value_t = 1.0)]
    pub secs: f64,
}

/// What the client saw; one line of JSON on its standard output.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Timed {
    pub operations: u64,
    pub p10_us: f64,
    pub p50_us: f64,
    pub gbit_per_s: f64,
}

fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("no core {cpu}"))
}

/// Takes connections until killed.
///
/// # Errors
/// What is missing for the way that is asked for.
pub fn sink(options: &SinkOptions) -> Result<Infallible> {
    pin(options.cpu)?;
    // What captures has to live as long as connections are taken.
    let (listener, _capture) = match options.way {
        Way::Direct => (listen(Ipv4Addr::UNSPECIFIED, PORT, Way::Direct)?, None),
        Way::Ours => {
            let (listener, capture) = captured(options)?;
            (listener, Some(capture))
        }
    };
    println!("{READY}");
    let mut buffer = vec![0; READ_AHEAD];
    listener.set_nonblocking(true)?;
    loop {
        let (stream, _) = awake(&listener, || listener.accept())?;
        // A connection that is reset is one that has been timed.
        let _ = serve(stream, &mut buffer);
    }
}

/// A listener that gets what the pod around this process dials, as a ztunnel would set it up.
fn captured(options: &SinkOptions) -> Result<(TcpListener, Capture)> {
    let pod = options.pod.context("--pod is needed")?;
    let (bpffs, cgroup) =
        (options.bpffs.as_ref().context("--bpffs is needed")?, options.cgroup.as_ref().context("--cgroup is needed")?);
    let listener = listen(Ipv4Addr::LOCALHOST, 0, Way::Ours)?;
    let capture = Capture::open(bpffs, cgroup)?;
    let netns = File::open("/proc/self/ns/net")?;
    let cookie = capture.attach_netns(netns.as_fd())?;
    capture.set_listener(cookie, Slot::Out4, listener.as_fd())?;
    let wanted = PodCapture { addresses: vec![IpAddr::V4(pod)], ..PodCapture::default() };
    capture.enrol(cookie, &wanted, Phase::Captured)?;
    Ok((listener, capture))
}

/// A listener like every other contestant's, whose connections have the fixed [`WINDOW`].
fn listen(address: Ipv4Addr, port: u16, way: Way) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    if way == Way::Ours {
        // As a ztunnel's own (`ztunnel/src/node/netns.rs`).
        socket.set_ip_transparent_v4(true)?;
        socket.bind_device(Some(b"lo"))?;
        socket.set_mark(MARK_LEG)?;
    }
    socket.set_reuse_address(true)?;
    setsockopt(&socket, RcvBufForce, &WINDOW).map_err(io::Error::from)?;
    socket.bind(&SocketAddr::from((address, port)).into())?;
    socket.listen(4096)?;
    Ok(socket.into())
}

/// Tries again what would block, and sleeps only when nothing comes for a while: to wake the other side's core takes longer than what
/// is measured, and is no part of it. The socket does not block.
fn awake<T>(socket: &impl AsFd, mut attempt: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        let until = Instant::now() + AWAKE;
        while Instant::now() < until {
            match attempt() {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                result => return result,
            }
        }
        poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE)?;
    }
}

fn receive(mut stream: &TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    awake(stream, || stream.read(buffer))
}

fn serve(mut stream: TcpStream, buffer: &mut [u8]) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    let mut first = [0];
    if receive(&stream, &mut first)? == 0 {
        return Ok(());
    }
    match first[0] {
        ECHO => stream.set_nodelay(true)?,
        RESET => return SockRef::from(&stream).set_linger(Some(Duration::ZERO)),
        _ => stream.set_nonblocking(false)?,
    }
    loop {
        let length = if first[0] == ECHO { receive(&stream, buffer)? } else { stream.read(buffer)? };
        if length == 0 {
            return Ok(());
        }
        if first[0] == ECHO {
            stream.write_all(&buffer[..length])?;
        }
    }
}

/// Times one deed and prints what came of it.
///
/// # Errors
/// The first error of any connection.
pub fn dial(options: &DialOptions) -> Result<()> {
    pin(options.cpu)?;
    let timed = match options.deed {
        Deed::Connect => repeat(options, || {
            let over = Instant::now();
            while over.elapsed() < APART {
                std::hint::spin_loop();
            }
            let began = Instant::now();
            let mut stream = TcpStream::connect(options.to)?;
            let took = began.elapsed();
            // The sink has to be done with it before the next one comes, or its queue is what is measured; and it must
            // end in a reset, or soon the search for a port that is not in TIME_WAIT is.
            stream.write_all(&[RESET])?;
            stream.set_nonblocking(true)?;
            match receive(&stream, &mut [0]) {
                Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(took),
                Err(error) => Err(error),
                Ok(_) => Err(io::Error::other("the sink does not reset")),
            }
        })?,
        Deed::Ping => {
            let mut stream = open(options.to, ECHO)?;
            stream.set_nonblocking(true)?;
            let mut message = vec![0x42; options.size];
            repeat(options, || {
                let began = Instant::now();
                stream.write_all(&message)?;
                let mut filled = 0;
                while filled < message.len() {
                    match receive(&stream, &mut message[filled..])? {
                        0 => return Err(ErrorKind::UnexpectedEof.into()),
                        length => filled += length,
                    }
                }
                Ok(began.elapsed())
            })?
        }
        Deed::Push => push(options)?,
    };
    println!("{}", serde_json::to_string(&timed)?);
    Ok(())
}

fn open(to: SocketAddr, deed: u8) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(to).with_context(|| format!("connecting to {to}"))?;
    stream.set_nodelay(true)?;
    // Without the right to more the kernel's limit holds, for all alike.
    SockRef::from(&stream).set_send_buffer_size(WINDOW)?;
    stream.write_all(&[deed])?;
    Ok(stream)
}

fn repeat(options: &DialOptions, mut once: impl FnMut() -> io::Result<Duration>) -> Result<Timed> {
    let begin = Instant::now() + WARM_UP;
    let end = begin + Duration::from_secs_f64(options.secs);
    let mut nanos = Vec::with_capacity(SAMPLES);
    while nanos.len() < SAMPLES {
        let took = once().with_context(|| format!("{:?} {}", options.deed, options.to))?;
        let now = Instant::now();
        if now >= end {
            break;
        }
        if now >= begin {
            nanos.push(u64::try_from(took.as_nanos())?);
        }
    }
    if nanos.is_empty() {
        bail!("nothing was measured in {} s", options.secs);
    }
    nanos.sort_unstable();
    let at = |percent: usize| nanos[nanos.len() * percent / 100] as f64 / 1000.0;
    Ok(Timed { operations: nanos.len() as u64, p10_us: at(10), p50_us: at(50), gbit_per_s: 0.0 })
}

fn push(options: &DialOptions) -> Result<Timed> {
    let mut stream = open(options.to, SWALLOW)?;
    let message = vec![0x5a; options.size];
    let begin = Instant::now() + WARM_UP;
    while Instant::now() < begin {
        stream.write_all(&message)?;
    }
    let (begin, length) = (Instant::now(), Duration::from_secs_f64(options.secs));
    let mut operations = 0u64;
    let mut took = Duration::ZERO;
    while took < length {
        // Asking for the time costs as much as a small write is long.
        for _ in 0..64 {
            stream.write_all(&message)?;
        }
        operations += 64;
        took = begin.elapsed();
    }
    let bits = operations as f64 * options.size as f64 * 8.0;
    Ok(Timed { operations, gbit_per_s: bits / 1e9 / took.as_secs_f64(), ..Timed::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sink_echoes_swallows_and_survives_a_reset() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has ports");
        let to = listener.local_addr().expect("it is bound");
        let server = std::thread::spawn(move || {
            let mut buffer = vec![0; READ_AHEAD];
            listener.incoming().take(3).for_each(|stream| {
                // The first is reset.
                let _ = serve(stream.expect("a connection"), &mut buffer);
            });
        });
        let reset = TcpStream::connect(to).expect("it listens");
        SockRef::from(&reset).set_linger(Some(Duration::ZERO)).expect("a socket option");
        drop(reset);
        let options = |deed| DialOptions { deed, to, cpu: 0, size: 64, secs: 0.05 };
        let mut stream = open(to, ECHO).expect("it still listens");
        let pinged = repeat(&options(Deed::Ping), || {
            stream.write_all(b"x")?;
            stream.read_exact(&mut [0])?;
            Ok(Duration::from_micros(7))
        });
        drop(stream);
        assert!((pinged.expect("answers").p50_us - 7.0).abs() < 1e-9);
        let pushed = push(&options(Deed::Push)).expect("bytes go");
        assert!(pushed.gbit_per_s > 0.0 && pushed.operations >= 64);
        server.join().expect("the sink does not panic");
    }
}
