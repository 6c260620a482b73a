//! The client end of every test: one thread that drives a number of connections for a bounded time and says what it saw.
//!
//! Any error of a connection is an error of the run: a contestant that loses connections has no figures. HTTP is a keep-alive HTTP/1.1
//! of our own, one request at a time on a connection, as [`super::serve`] explains.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use super::serve::{CHUNK, ECHO, HEAD_END, HTTP, ONCE, SINK, SOURCE};

/// Carried but not measured, at the beginning: connections open, windows and buffers grow.
pub const WARM_UP: Duration = Duration::from_millis(300);
/// One operation may take this long before the run counts as stuck.
const STUCK: Duration = Duration::from_secs(20);
/// Said on standard output by `hold` once all connections are open.
pub const OPEN: &str = "open";

/// What a connection does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// Send as fast as it goes
    Push,
    /// Receive as fast as it goes
    Pull,
    /// Send `size` bytes, wait for them to come back, again
    Ping,
    /// Connect, send `size` bytes, read the answer to its end, close, again
    Connect,
    /// One HTTP request after the other
    Http,
    /// Open, exchange `size` bytes, stay idle
    Hold,
    /// Send `size` bytes of a pattern, compare what comes back
    Verify,
}

/// Arguments of one load process.
#[derive(Args, Clone, Debug)]
pub struct Options {
    pub kind: Kind,
    #[arg(long)]
    pub to: IpAddr,
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub connections: u32,
    /// Bytes
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=(64 << 20)))]
    pub size: u32,
    /// Seconds measured after the warm-up; for `hold`: seconds to stay
    #[arg(long, default_value_t = 1.0)]
    pub secs: f64,
}

/// What one load process saw; one line of JSON on its standard output.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// Length of the measured window in seconds.
    pub seconds: f64,
    /// Within the window.
    pub operations: u64,
    pub bytes: u64,
    /// From the first to the last, warm-up included: what the proxies' CPU is divided by.
    pub total_operations: u64,
    pub total_bytes: u64,
    /// Time of one operation in microseconds; 0 for bulk.
    pub p50_us: f64,
    pub p99_us: f64,
}

/// Runs the load and prints the outcome.
///
/// # Errors
/// The first error of any connection.
pub fn run(options: &Options) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(drive(options))?;
    println!("{}", serde_json::to_string(&outcome)?);
    Ok(())
}

async fn drive(options: &Options) -> Result<Outcome> {
    let size = options.size as usize;
    match options.kind {
        Kind::Hold => {
            hold(options).await?;
            return Ok(Outcome::default());
        }
        Kind::Verify => {
            let to = SocketAddr::new(options.to, ECHO);
            tokio::time::timeout(STUCK * 3, verify(to, size)).await.context("it does not end")??;
            return Ok(Outcome { total_bytes: size as u64, ..Outcome::default() });
        }
        _ => {}
    }
    let window = Window::starting(Duration::from_secs_f64(options.secs));
    let mut workers = JoinSet::new();
    for _ in 0..options.connections {
        let (kind, to) = (options.kind, options.to);
        workers.spawn(async move {
            let work = async {
                match kind {
                    Kind::Push => push(SocketAddr::new(to, SINK), window).await,
                    Kind::Pull => pull(SocketAddr::new(to, SOURCE), window).await,
                    Kind::Ping => ping(SocketAddr::new(to, ECHO), size, window).await,
                    Kind::Connect => connect(SocketAddr::new(to, ONCE), size, window).await,
                    Kind::Http => http(SocketAddr::new(to, HTTP), window).await,
                    Kind::Hold | Kind::Verify => bail!("has no window"),
                }
            };
            tokio::time::timeout_at((window.end + STUCK).into(), work).await.context("a connection is stuck")?
        });
    }
    let mut all = Tally::default();
    while let Some(tally) = workers.join_next().await {
        all.merge(tally??);
    }
    Ok(all.outcome(window))
}

/// When what is carried counts.
#[derive(Clone, Copy)]
struct Window {
    begin: Instant,
    end: Instant,
}

impl Window {
    fn starting(length: Duration) -> Self {
        let begin = Instant::now() + WARM_UP;
        Self { begin, end: begin + length }
    }
}

/// What one connection carried.
#[derive(Default)]
struct Tally {
    operations: u64,
    bytes: u64,
    total_operations: u64,
    total_bytes: u64,
    /// Nanoseconds of each operation in the window.
    latencies: Vec<u32>,
}

impl Tally {
    /// Counts bulk that ended now. False once the window is over.
    fn carried(&mut self, bytes: usize, window: Window) -> bool {
        let now = Instant::now();
        self.total_bytes += bytes as u64;
        if now >= window.begin && now < window.end {
            self.bytes += bytes as u64;
        }
        now < window.end
    }

    /// Counts an operation that ended now. False once the window is over.
    fn done(&mut self, began: Instant, window: Window) -> bool {
        let now = Instant::now();
        self.total_operations += 1;
        if now >= window.begin && now < window.end {
            self.operations += 1;
            let took = now.saturating_duration_since(began).as_nanos();
            self.latencies.push(u32::try_from(took).unwrap_or(u32::MAX));
        }
        now < window.end
    }

    fn merge(&mut self, other: Self) {
        self.operations += other.operations;
        self.bytes += other.bytes;
        self.total_operations += other.total_operations;
        self.total_bytes += other.total_bytes;
        self.latencies.extend(other.latencies);
    }

    fn outcome(mut self, window: Window) -> Outcome {
        self.latencies.sort_unstable();
        let at = |percent: usize| {
            let index = self.latencies.len() * percent / 100;
            self.latencies.get(index).map_or(0.0, |&ns| f64::from(ns) / 1000.0)
        };
        Outcome {
            seconds: (window.end - window.begin).as_secs_f64(),
            operations: self.operations,
            bytes: self.bytes,
            total_operations: self.total_operations,
            total_bytes: self.total_bytes,
            p50_us: at(50),
            p99_us: at(99),
        }
    }
}

async fn open(to: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(to).await.with_context(|| format!("connecting to {to}"))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn push(to: SocketAddr, window: Window) -> Result<Tally> {
    let mut stream = open(to).await?;
    let buffer = vec![0xa5; CHUNK];
    let mut tally = Tally::default();
    loop {
        let length = stream.write(&buffer).await.context("sending")?;
        if !tally.carried(length, window) {
            break;
        }
    }
    stream.shutdown().await?;
    let arrived = stream.read_u64().await.context("reading how much arrived")?;
    ensure!(arrived == tally.total_bytes, "{} bytes were sent, {arrived} arrived", tally.total_bytes);
    Ok(tally)
}

async fn pull(to: SocketAddr, window: Window) -> Result<Tally> {
    let mut stream = open(to).await?;
    let mut buffer = vec![0; CHUNK];
    let mut tally = Tally::default();
    loop {
        let length = stream.read(&mut buffer).await.context("receiving")?;
        ensure!(length > 0, "the stream ended early");
        if !tally.carried(length, window) {
            return Ok(tally);
        }
    }
}

async fn ping(to: SocketAddr, size: usize, window: Window) -> Result<Tally> {
    let mut stream = open(to).await?;
    let mut buffer = vec![0x33; size];
    let mut tally = Tally::default();
    loop {
        let began = Instant::now();
        stream.write_all(&buffer).await?;
        stream.read_exact(&mut buffer).await?;
        if !tally.done(began, window) {
            return Ok(tally);
        }
    }
}

async fn connect(to: SocketAddr, size: usize, window: Window) -> Result<Tally> {
    let buffer = vec![0x44; size];
    let mut answer = Vec::with_capacity(size);
    let mut tally = Tally::default();
    loop {
        let began = Instant::now();
        let mut stream = open(to).await?;
        stream.write_all(&buffer).await?;
        answer.clear();
        stream.read_to_end(&mut answer).await?;
        drop(stream);
        ensure!(answer.len() == size, "{size} bytes were sent, {} came back", answer.len());
        if !tally.done(began, window) {
            return Ok(tally);
        }
    }
}

const REQUEST: &[u8] = b"GET /item HTTP/1.1\r\nHost: server\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n";

async fn http(to: SocketAddr, window: Window) -> Result<Tally> {
    let mut stream = open(to).await?;
    let mut buffer = [0; 4 << 10];
    let mut tally = Tally::default();
    loop {
        let began = Instant::now();
        stream.write_all(REQUEST).await?;
        let mut filled = 0;
        while response_length(&buffer[..filled])?.is_none_or(|length| filled < length) {
            let length = stream.read(&mut buffer[filled..]).await?;
            ensure!(length > 0, "the server closed within a response");
            filled += length;
        }
        if !tally.done(began, window) {
            return Ok(tally);
        }
    }
}

/// Length of a whole response from what has arrived of it; `None` until its head is complete.
fn response_length(bytes: &[u8]) -> Result<Option<usize>> {
    let Some(head) = bytes.windows(HEAD_END.len()).position(|four| four == HEAD_END) else { return Ok(None) };
    let text = std::str::from_utf8(&bytes[..head]).context("a response head is not text")?;
    ensure!(text.starts_with("HTTP/1.1 200 "), "the server said {:?}", text.lines().next());
    let value = text.lines().find_map(|line| line.strip_prefix("Content-Length: ")).context("no Content-Length")?;
    Ok(Some(head + HEAD_END.len() + value.parse::<usize>()?))
}

async fn hold(options: &Options) -> Result<()> {
    let mut streams = Vec::new();
    let mut buffer = vec![0x55; options.size as usize];
    for _ in 0..options.connections {
        let mut stream = open(SocketAddr::new(options.to, ECHO)).await?;
        stream.write_all(&buffer).await?;
        stream.read_exact(&mut buffer).await?;
        streams.push(stream);
    }
    println!("{OPEN}");
    tokio::time::sleep(Duration::from_secs_f64(options.secs)).await;
    Ok(())
}

/// Different at every offset for 64 KiB and more, so that lost, doubled and swapped pieces show.
fn pattern(offset: usize) -> u8 {
    (offset ^ (offset >> 8) ^ (offset >> 16)) as u8
}

/// A piece of what `verify` sends that nothing else looks like.
pub fn marker() -> Vec<u8> {
    (0x400..0x440).map(pattern).collect()
}

async fn verify(to: SocketAddr, size: usize) -> Result<()> {
    let (mut reader, mut writer) = open(to).await?.into_split();
    let send = async {
        let mut offset = 0;
        while offset < size {
            let end = (offset + CHUNK).min(size);
            let piece: Vec<u8> = (offset..end).map(pattern).collect();
            writer.write_all(&piece).await?;
            offset = end;
        }
        writer.shutdown().await.context("closing the sending half")
    };
    let receive = async {
        let mut buffer = vec![0; CHUNK];
        let mut offset = 0;
        loop {
            let length = reader.read(&mut buffer).await?;
            if length == 0 {
                break;
            }
            let wrong = buffer[..length].iter().enumerate().find(|(at, byte)| pattern(offset + at) != **byte);
            if let Some((at, _)) = wrong {
                bail!("byte {} came back changed", offset + at);
            }
            offset += length;
        }
        ensure!(offset == size, "{size} bytes were sent, {offset} came back");
        Ok(())
    };
    tokio::try_join!(send, receive).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_response_is_complete_when_its_body_is() {
        assert_eq!(response_length(b"HTTP/1.1 200 OK\r\nContent-Len").unwrap(), None);
        let head = b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n";
        assert_eq!(response_length(head).unwrap(), Some(head.len() + 7));
        assert!(response_length(b"HTTP/1.1 503 No\r\nContent-Length: 7\r\n\r\n").is_err());
    }

    #[test]
    fn percentiles_come_from_the_window_only() {
        let now = Instant::now();
        let window = Window { begin: now, end: now + Duration::from_secs(60) };
        let mut tally = Tally::default();
        assert!(tally.done(now, window));
        assert!(!tally.done(now, Window { begin: now, end: now }));
        tally.latencies = (1..=100).map(|us| us * 1000).collect();
        let outcome = tally.outcome(window);
        assert_eq!((outcome.operations, outcome.total_operations), (1, 2));
        assert!((outcome.p50_us - 51.0).abs() < 1e-9 && (outcome.p99_us - 100.0).abs() < 1e-9, "{outcome:?}");
    }

    /// A server that says back what it reads after `spoil` has had it, at most once per byte.
    async fn echo_with(spoil: fn(usize, &mut Vec<u8>)) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("loopback has ports");
        let address = listener.local_addr().expect("it is bound");
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("a client comes");
            let mut offset = 0;
            let mut buffer = vec![0; CHUNK];
            // Ends with the client, or with the test.
            while let Ok(length @ 1..) = stream.read(&mut buffer).await {
                let mut piece = buffer[..length].to_vec();
                spoil(offset, &mut piece);
                offset += length;
                if stream.write_all(&piece).await.is_err() {
                    return;
                }
            }
        });
        address
    }

    #[tokio::test]
    async fn verify_notices_a_changed_byte_and_a_lost_end() {
        const SIZE: usize = 1 << 20;
        let honest = echo_with(|_, _| {}).await;
        verify(honest, SIZE).await.unwrap();
        let flips = echo_with(|offset, piece| {
            if let Some(byte) = 500_000usize.checked_sub(offset).and_then(|at| piece.get_mut(at)) {
                *byte ^= 1;
            }
        });
        assert!(verify(flips.await, SIZE).await.unwrap_err().to_string().contains("byte 500000 "));
        let cuts = echo_with(|offset, piece| piece.truncate((SIZE - 1).saturating_sub(offset)));
        assert!(verify(cuts.await, SIZE).await.unwrap_err().to_string().contains("1048575 came back"));
    }
}
