//! What a port scanner, a confused client or a fuzzer sends, and which ports there are to send it to.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use mesh_tests::sys;

/// A server must have had enough of any one piece of garbage within this time. The longest wait of ours is that for a TLS handshake.
const ENOUGH: Duration = Duration::from_secs(15);
/// Connections that say nothing, on each port.
const SILENT: usize = 16;

/// A port under fire.
#[derive(Clone, Debug)]
pub struct Target {
    pub owner: String,
    /// Namespace the garbage comes from.
    pub from: PathBuf,
    pub to: SocketAddr,
}

/// Listening TCP sockets of a namespace; unspecified addresses as they are.
pub fn listening(netns: &Path) -> Result<Vec<SocketAddr>> {
    sys::in_netns(netns, || {
        let mut found = Vec::new();
        for (file, v6) in [("tcp", false), ("tcp6", true)] {
            let table = std::fs::read_to_string(format!("/proc/thread-self/net/{file}"))?;
            for line in table.lines().skip(1) {
                let fields: Vec<&str> = line.split_whitespace().collect();
                if fields.get(3) == Some(&"0A") {
                    found.push(address(fields[1], v6).with_context(|| format!("cannot read {line:?}"))?);
                }
            }
        }
        found.sort();
        found.dedup();
        Ok(found)
    })
}

/// `0100007F:3A98`: words in the machine's byte order, the port as a number.
fn address(text: &str, v6: bool) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let words: Vec<[u8; 4]> = (0..ip.len() / 8)
        .map(|i| u32::from_str_radix(&ip[i * 8..i * 8 + 8], 16).map(u32::to_ne_bytes))
        .collect::<Result<_, _>>()
        .ok()?;
    let bytes: Vec<u8> = words.concat();
    let ip: IpAddr = match v6 {
        true => Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into(),
        false => Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into(),
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

/// Every kind of garbage by name.
fn kinds() -> Vec<(&'static str, Vec<u8>, Shut)> {
    let mut huge = b"GET / HTTP/1.1\r\nHost: x\r\nX-Huge: ".to_vec();
    huge.resize(4 * 1024 * 1024, b'a');
    let mut frames = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    frames.extend(noise(16 * 1024));
    vec![
        ("random bytes", noise(64 * 1024), Shut::Leave),
        ("zeros", vec![0; 64 * 1024], Shut::Write),
        ("a huge header", huge, Shut::Leave),
        ("plain HTTP", b"GET /nothing-here HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".to_vec(), Shut::Leave),
        ("a broken request line", b"\x01\x02 / HTTP/9.9\r\n\r\n".to_vec(), Shut::Leave),
        ("HTTP/2 frames at random", frames, Shut::Leave),
        ("half a TLS hello", [&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3][..], &noise(20)].concat(), Shut::Write),
    ]
}

/// Whether we say that this was all, or leave it open that more may come.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shut {
    Write,
    Leave,
}

/// Bytes without a pattern, the same each time.
fn noise(count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..count).map(|_| next()).collect()
}

/// Throws every kind of garbage at a target; the server has to end each connection. Returns connections that are left open in
/// silence, for as long as the caller keeps them.
pub fn throw(target: &Target) -> Result<Vec<TcpStream>> {
    let to = target.to;
    let owner = target.owner.clone();
    let thrown = sys::in_netns(&target.from, move || {
        let mut silent = Vec::new();
        for _ in 0..SILENT {
            silent.push(TcpStream::connect_timeout(&to, Duration::from_secs(3))?);
        }
        for (name, bytes, shut) in kinds() {
            ended(to, &bytes, shut).with_context(|| name.to_owned())?;
        }
        Ok(silent)
    });
    thrown.with_context(|| format!("{owner} at {to}"))
}

fn ended(to: SocketAddr, bytes: &[u8], shut: Shut) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(3))?;
    stream.set_write_timeout(Some(Duration::from_secs(5)))?;
    stream.set_read_timeout(Some(ENOUGH))?;
    // A server that hangs up while we talk has had enough, which is what is asked for.
    let written = stream.write_all(bytes);
    if shut == Shut::Write && written.is_ok() {
        // An error means that it has hung up.
        let _ = stream.shutdown(Shutdown::Write);
    }
    let mut answer = [0; 4096];
    loop {
        match stream.read(&mut answer) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
                bail!("the connection is still open after {ENOUGH:?}")
            }
            Err(_) => return Ok(()),
        }
    }
}
