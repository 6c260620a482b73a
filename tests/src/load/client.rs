//! The end that opens connections: a closed loop at a steady rate, long-lived connections that each say something once a second,
//! and transfers that are compared byte for byte with what comes back.
//!
//! Half of the long-lived connections stay from beginning to end, the others are replaced in turn, so that at any moment some are
//! older and some younger than whatever is done to the mesh. Replaced or not, one that ends by itself is lost.

use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant as Moment, sleep, sleep_until, timeout};

use super::{Failure, OPEN, Phase, SECRET, Tally, now_ms};

/// How many connections of the closed loop may be under way at once.
const WORKERS: u32 = 32;
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Between two transfers of one worker.
const BREATH: Duration = Duration::from_millis(500);
/// Before a long-lived connection that could not be opened, or was lost, is tried again.
const AGAIN: Duration = Duration::from_millis(200);
/// How long all long-lived connections may take to open.
const OPENING: Duration = Duration::from_secs(60);
/// Failures that are told one by one.
const TOLD: usize = 20_000;
/// Said on standard output once all long-lived connections are there.
pub const READY: &str = "all open";

/// Where connections go, and what may be read of them on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    pub name: String,
    pub to: SocketAddr,
    pub visible: Visible,
}

/// Whether a flow's payload may be seen on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Visible {
    Never,
    May,
}

impl Flow {
    fn marker(&self) -> &'static str {
        if self.visible == Visible::May { OPEN } else { SECRET }
    }
}

impl FromStr for Flow {
    type Err = anyhow::Error;

    /// `NAME=ADDRESS:PORT`; `NAME+=…` where the payload may be seen.
    fn from_str(text: &str) -> Result<Self> {
        let (name, to) = text.split_once('=').context("NAME=ADDRESS:PORT is expected")?;
        let (name, visible) = match name.strip_suffix('+') {
            Some(name) => (name, Visible::May),
            None => (name, Visible::Never),
        };
        Ok(Self { name: name.to_owned(), to: to.parse().with_context(|| format!("{to} is no address"))?, visible })
    }
}

impl std::fmt::Display for Flow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sign = if self.visible == Visible::May { "+" } else { "" };
        write!(f, "{}{sign}={}", self.name, self.to)
    }
}

/// Arguments of one client.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Where to; connections are spread evenly
    #[arg(long = "flow", value_name = "NAME[+]=ADDRESS:PORT", required = true)]
    pub flows: Vec<Flow>,
    /// New connections per second
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(0..=5000))]
    pub rate: u32,
    /// Long-lived connections
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    pub long: u32,
    /// Seconds that every second long-lived connection lives
    #[arg(long, default_value_t = 15)]
    pub life: u64,
    /// Transfers under way
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=100))]
    pub bulk: u32,
    /// KiB that each of them sends and gets back
    #[arg(long, default_value_t = 1024)]
    pub bulk_kib: usize,
    /// Longest that one step may take before it counts as failed, in seconds
    #[arg(long, default_value_t = 10)]
    pub patience: u64,
    /// New connections may be refused, which is counted apart
    #[arg(long)]
    pub refusable: bool,
    /// The end, where SIGTERM does not come before
    #[arg(long, default_value_t = 300)]
    pub secs: u64,
}

/// How much is asked of the mesh.
#[derive(Clone, Copy, Debug)]
pub struct Amount {
    /// New connections per second of all clients.
    pub rate: u32,
    /// Long-lived connections of all clients.
    pub long: u32,
    /// Transfers under way, of each client, and KiB of each.
    pub bulk: u32,
    pub bulk_kib: usize,
    /// Longest that one step may take.
    pub patience: Duration,
    /// Clients that nobody ends end by themselves.
    pub at_most: Duration,
}

impl Amount {
    /// New connections and long-lived ones, as most want it.
    pub fn of(rate: u32, long: u32) -> Self {
        let patience = Duration::from_secs(10);
        Self { rate, long, bulk: 0, bulk_kib: 1024, patience, at_most: Duration::from_secs(300) }
    }

    /// The arguments of a client that takes these shares in percent of new and of long-lived connections.
    pub fn arguments(&self, flows: &[Flow], new: u32, long: u32) -> Vec<String> {
        let mut words: Vec<String> = flows.iter().flat_map(|flow| ["--flow".to_owned(), flow.to_string()]).collect();
        let options = [
            ("--rate", u64::from(self.rate * new / 100)),
            ("--long", u64::from(self.long * long / 100)),
            ("--bulk", u64::from(self.bulk)),
            ("--bulk-kib", self.bulk_kib as u64),
            ("--patience", self.patience.as_secs()),
            ("--secs", self.at_most.as_secs()),
        ];
        words.extend(options.iter().flat_map(|(name, value)| [(*name).to_owned(), value.to_string()]));
        words
    }
}

/// Runs until SIGTERM and prints the tally as one line of JSON.
///
/// # Errors
/// When it cannot start; connections that fail are counted, not returned.
pub fn run(options: &Options) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let tally = runtime.block_on(drive(options))?;
    println!("{}", serde_json::to_string(&tally)?);
    Ok(())
}

/// What all connections share.
#[derive(Clone)]
struct Shared {
    tally: Arc<Mutex<Tally>>,
    patience: Duration,
    stop: watch::Receiver<bool>,
    /// How many of the long-lived connections have been open once.
    open: watch::Sender<u32>,
}

impl Shared {
    fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn stopped(&self) {
        // An error means that the end has come as well.
        let _ = self.stop.clone().wait_for(|stop| *stop).await;
    }

    fn is_stopped(&self) -> bool {
        *self.stop.borrow()
    }
}

async fn drive(options: &Options) -> Result<Tally> {
    let mut terminate = signal(SignalKind::terminate())?;
    let (stopping, stop) = watch::channel(false);
    let patience = Duration::from_secs(options.patience);
    let shared = Shared { tally: Arc::default(), patience, stop, open: watch::Sender::new(0) };
    let mut tasks = JoinSet::new();
    for n in 0..options.long {
        tasks.spawn(keep(shared.clone(), flow(options, n), n, options.clone()));
    }
    let mut opened = shared.open.subscribe();
    tokio::select! {
        all = opened.wait_for(|open| *open >= options.long) => { all?; }
        () = sleep(OPENING.max(patience * 2)) => bail!("only {} of {} long-lived connections came up: {:?}",
            *shared.open.borrow(), options.long, Tally::by_kind(&shared.tally().losses)),
        _ = terminate.recv() => bail!("ended before all connections were open"),
    }
    println!("{READY}");
    let started = Instant::now();
    for n in 0..WORKERS.min(options.rate) {
        tasks.spawn(renew(shared.clone(), n, options.clone()));
    }
    for n in 0..options.bulk {
        tasks.spawn(transfers(shared.clone(), n, options.clone()));
    }
    tokio::select! {
        _ = terminate.recv() => {}
        () = sleep(Duration::from_secs(options.secs)) => {}
    }
    stopping.send_replace(true);
    let seconds = started.elapsed().as_secs_f64();
    while let Some(ended) = tasks.join_next().await {
        ended.context("a task of the load panicked")?;
    }
    let mut tally = std::mem::take(&mut *shared.tally());
    tally.seconds = seconds;
    Ok(tally)
}

fn flow(options: &Options, n: u32) -> Flow {
    options.flows[n as usize % options.flows.len()].clone()
}

/// One worker of the closed loop: the next connection is begun when it is due and the last one has ended.
async fn renew(shared: Shared, worker: u32, options: Options) {
    let workers = WORKERS.min(options.rate);
    let pause = Duration::from_secs(1) * workers / options.rate;
    let mut due = Moment::now() + pause * worker / workers;
    let mut count = worker;
    loop {
        tokio::select! {
            biased;
            () = shared.stopped() => return,
            () = sleep_until(due) => {}
        }
        due = (due + pause).max(Moment::now());
        let flow = flow(&options, count);
        count += workers + 1;
        let (begun, began) = (now_ms(), Instant::now());
        shared.tally().opened += 1;
        let outcome = once(&flow, count, shared.patience).await;
        let mut tally = shared.tally();
        tally.slowest_ms = tally.slowest_ms.max(u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX));
        match outcome {
            Ok(()) => {
                tally.ok += 1;
                *tally.flows.entry(flow.name).or_default() += 1;
            }
            Err(trouble) if options.refusable && is_refusal(&trouble) => tally.refused += 1,
            Err(trouble) => {
                tally.failed += 1;
                tell(&mut tally.failures, &flow, begun, trouble);
            }
        }
    }
}

/// What a proxy does that may not connect: not silence, and not other bytes.
fn is_refusal((_, error): &Trouble) -> bool {
    ["ECONNRESET", "ECONNREFUSED", "EPIPE", "EOF"].contains(&error.as_str())
}

/// One after the other, each a connection of its own.
async fn transfers(shared: Shared, worker: u32, options: Options) {
    let mut count = worker;
    while !shared.is_stopped() {
        let flow = flow(&options, count);
        count += options.bulk.max(1);
        let begun = now_ms();
        shared.tally().opened += 1;
        let outcome = transfer(&flow, options.bulk_kib << 10, u64::from(count), shared.patience).await;
        count_transfer(&mut shared.tally(), &flow, begun, outcome);
        tokio::select! {
            () = sleep(BREATH) => {}
            () = shared.stopped() => {}
        }
    }
}

fn count_transfer(tally: &mut Tally, flow: &Flow, begun: u64, outcome: Result<(), Trouble>) {
    match outcome {
        Ok(()) => {
            tally.ok += 1;
            *tally.flows.entry(format!("{}-bulk", flow.name)).or_default() += 1;
        }
        Err(trouble) => {
            tally.failed += 1;
            tell(&mut tally.failures, flow, begun, trouble);
        }
    }
}

/// Sends and receives at the same time; what comes back must be what was sent, to the last byte and no further.
async fn transfer(flow: &Flow, length: usize, seed: u64, patience: Duration) -> Result<(), Trouble> {
    let said = content(flow, length, seed);
    let mut stream = open(flow, patience).await?;
    let (mut from, mut to) = stream.split();
    let send = async {
        for part in said.chunks(64 << 10) {
            step(Phase::Send, patience, to.write_all(part)).await?;
        }
        step(Phase::Send, patience, to.shutdown()).await
    };
    let receive = async {
        let (mut heard, mut buffer) = (0, vec![0; 64 << 10]);
        loop {
            let read = step(Phase::Receive, patience, from.read(&mut buffer)).await?;
            if read == 0 {
                let whole = heard == said.len();
                return if whole { Ok(()) } else { Err((Phase::Receive, "EOF".to_owned())) };
            }
            if said.get(heard..heard + read) != Some(&buffer[..read]) {
                return Err((Phase::Receive, "changed".to_owned()));
            }
            heard += read;
        }
    };
    tokio::try_join!(send, receive).map(drop)
}

/// Bytes that do not repeat, so that a piece that is lost or comes twice shows; the marker of the flow comes first.
fn content(flow: &Flow, length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2) + 1;
    let mut bytes = Vec::with_capacity(length + 8);
    bytes.extend_from_slice(flow.marker().as_bytes());
    while bytes.len() < length {
        // Xorshift: any will do.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// A phase and what went wrong in it.
type Trouble = (Phase, String);

fn tell(list: &mut Vec<Failure>, flow: &Flow, begun_ms: u64, (phase, error): Trouble) {
    if list.len() < TOLD {
        list.push(Failure { begun_ms, failed_ms: now_ms(), flow: flow.name.clone(), phase, error });
    }
}

/// Connect, say something, hear it back, close, see the other side close.
async fn once(flow: &Flow, count: u32, patience: Duration) -> Result<(), Trouble> {
    let mut stream = open(flow, patience).await?;
    exchange(&mut stream, flow, count, patience).await?;
    close(&mut stream, patience).await
}

async fn open(flow: &Flow, patience: Duration) -> Result<TcpStream, Trouble> {
    let stream = step(Phase::Connect, patience, TcpStream::connect(flow.to)).await?;
    // Without it the load is slower, not wrong.
    let _ = stream.set_nodelay(true);
    Ok(stream)
}

async fn exchange(stream: &mut TcpStream, flow: &Flow, count: u32, patience: Duration) -> Result<(), Trouble> {
    let said = format!("{} {count:010} 0123456789abcdef", flow.marker());
    step(Phase::Send, patience, stream.write_all(said.as_bytes())).await?;
    let mut heard = vec![0; said.len()];
    step(Phase::Receive, patience, stream.read_exact(&mut heard)).await?;
    if heard == said.as_bytes() { Ok(()) } else { Err((Phase::Receive, "changed".to_owned())) }
}

async fn close(stream: &mut TcpStream, patience: Duration) -> Result<(), Trouble> {
    step(Phase::Close, patience, stream.shutdown()).await?;
    match step(Phase::Close, patience, stream.read(&mut [0; 16])).await? {
        0 => Ok(()),
        _ => Err((Phase::Close, "changed".to_owned())),
    }
}

async fn step<T>(
    phase: Phase,
    patience: Duration,
    work: impl Future<Output = std::io::Result<T>>,
) -> Result<T, Trouble> {
    match timeout(patience, work).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err((phase, named(&error))),
        Err(_) => Err((phase, "timeout".to_owned())),
    }
}

fn named(error: &std::io::Error) -> String {
    match error.raw_os_error() {
        Some(number) => format!("{:?}", nix::errno::Errno::from_raw(number)),
        None if error.kind() == std::io::ErrorKind::UnexpectedEof => "EOF".to_owned(),
        None => format!("{:?}", error.kind()),
    }
}

/// One place for a long-lived connection: opens one, keeps it, replaces it when it is lost or has lived its life.
async fn keep(shared: Shared, flow: Flow, n: u32, options: Options) {
    // Spread over the first second, and their ends over a lifetime.
    sleep(Duration::from_millis(u64::from(n) * 1000 / u64::from(options.long.max(1)))).await;
    let flows = u32::try_from(options.flows.len()).unwrap_or(1);
    let stays = (n / flows).is_multiple_of(2);
    let life = Duration::from_secs(options.life.max(1));
    let mut first_life = Some(life.mul_f64(f64::from(n % 97 + 1) / 97.0));
    let mut counted = false;
    while !shared.is_stopped() {
        let begun = now_ms();
        let mut stream = match open(&flow, shared.patience).await {
            Ok(stream) => stream,
            Err(trouble) => {
                never_open(&shared, &flow, begun, trouble);
                sleep(AGAIN).await;
                continue;
            }
        };
        shared.tally().long_opened += 1;
        let end = (!stays).then(|| Moment::now() + first_life.take().unwrap_or(life));
        match beat(&shared, &mut stream, &flow, end, &mut counted).await {
            Ok(Ended::ByPlan) => match close(&mut stream, shared.patience).await {
                Ok(()) => shared.tally().long_ended += 1,
                Err(trouble) => lose(&shared, &flow, trouble),
            },
            Ok(Ended::AtTheEnd) => shared.tally().long_alive += 1,
            Err(trouble) => {
                lose(&shared, &flow, trouble);
                sleep(AGAIN).await;
            }
        }
    }
}

/// A new connection like any other.
fn never_open(shared: &Shared, flow: &Flow, begun_ms: u64, trouble: Trouble) {
    let mut tally = shared.tally();
    tally.opened += 1;
    tally.failed += 1;
    tell(&mut tally.failures, flow, begun_ms, trouble);
}

fn lose(shared: &Shared, flow: &Flow, trouble: Trouble) {
    let mut tally = shared.tally();
    tally.long_lost += 1;
    tell(&mut tally.losses, flow, now_ms(), trouble);
}

enum Ended {
    ByPlan,
    AtTheEnd,
}

/// One heartbeat a second until its planned end or the end of the load, and one more then.
async fn beat(
    shared: &Shared,
    stream: &mut TcpStream,
    flow: &Flow,
    end: Option<Moment>,
    counted: &mut bool,
) -> Result<Ended, Trouble> {
    let mut due = Moment::now();
    let mut count = 0;
    loop {
        let stopped = shared.is_stopped();
        exchange(stream, flow, count, shared.patience).await?;
        count += 1;
        shared.tally().heartbeats += 1;
        if !std::mem::replace(counted, true) {
            shared.open.send_modify(|open| *open += 1);
        }
        if stopped {
            return Ok(Ended::AtTheEnd);
        }
        if end.is_some_and(|end| end <= Moment::now()) {
            return Ok(Ended::ByPlan);
        }
        due = (due + HEARTBEAT).max(Moment::now());
        tokio::select! {
            () = sleep_until(due) => {}
            () = shared.stopped() => {}
            // The other side has nothing to say by itself: this is its end, known at once and not at the next heartbeat.
            () = ended(stream) => {}
        }
    }
}

async fn ended(stream: &TcpStream) {
    // Whatever it is, the next exchange meets it.
    let _ = stream.peek(&mut [0]).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn server(deeds: fn(u32) -> bool) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("loopback has ports");
        let address = listener.local_addr().expect("it is bound");
        // Ends with the test's runtime.
        tokio::spawn(async move {
            let mut count = 0;
            while let Ok((mut stream, _)) = listener.accept().await {
                count += 1;
                let honest = deeds(count);
                tokio::spawn(async move {
                    let mut buffer = [0; 256];
                    while let Ok(length @ 1..) = stream.read(&mut buffer).await {
                        if !honest || stream.write_all(&buffer[..length]).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        address
    }

    fn options(to: SocketAddr, rate: u32, long: u32) -> Options {
        let flow = Flow { name: "f".into(), to, visible: Visible::Never };
        let (bulk, bulk_kib, patience, refusable) = (0, 64, 10, false);
        Options { flows: vec![flow], rate, long, life: 1, bulk, bulk_kib, patience, refusable, secs: 1 }
    }

    #[tokio::test]
    async fn every_connection_is_counted_once() {
        let tally = drive(&options(server(|_| true).await, 100, 10)).await.unwrap();
        assert!(tally.adds_up(), "{tally:?}");
        assert!(tally.failed == 0 && tally.long_lost == 0 && tally.opened > 20, "{tally:?}");
        // Five stay to the end; each of the others may have had its last end just before.
        assert!((5..=10).contains(&tally.long_alive), "{tally:?}");
        assert_eq!(tally.flows["f"], tally.ok);
    }

    #[tokio::test]
    async fn connections_that_the_server_drops_are_failures_with_a_phase() {
        // The first two are the long-lived ones; of the others every second is dropped.
        let tally = drive(&options(server(|n| n <= 2 || n % 2 == 0).await, 50, 2)).await.unwrap();
        assert!(tally.adds_up() && tally.failed > 5 && tally.ok > 5, "{tally:?}");
        assert!(tally.failures.iter().all(|failure| failure.phase == Phase::Receive && failure.error == "EOF"));
    }

    #[tokio::test]
    async fn what_may_be_refused_is_counted_apart() {
        let refusable = Options { refusable: true, ..options(server(|n| n % 2 == 0).await, 50, 0) };
        let tally = drive(&refusable).await.unwrap();
        assert!(tally.adds_up() && tally.refused > 5 && tally.ok > 5 && tally.failed == 0, "{tally:?}");
    }

    #[tokio::test]
    async fn a_transfer_is_compared_to_the_last_byte() {
        let flow = Flow { name: "f".into(), to: server(|n| n != 2).await, visible: Visible::Never };
        let patience = Duration::from_secs(10);
        assert_eq!(transfer(&flow, 300_000, 7, patience).await, Ok(()));
        // The second one is dropped.
        assert!(transfer(&flow, 300_000, 7, patience).await.is_err());
        let (one, other) = (content(&flow, 100, 1), content(&flow, 100, 2));
        assert!(one.len() == 100 && one.starts_with(SECRET.as_bytes()) && one != other);
    }

    #[test]
    fn a_flow_is_written_as_it_is_read() {
        for text in ["a=10.0.0.1:80", "b+=[fd00::1]:7003"] {
            assert_eq!(text.parse::<Flow>().unwrap().to_string(), text);
        }
        assert!("a".parse::<Flow>().is_err() && "a=b".parse::<Flow>().is_err());
    }
}
