//! The end that opens connections: a closed loop at a steady rate, and long-lived connections that each say something once a second.
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

/// Longest that one step may take before it counts as failed.
const PATIENCE: Duration = Duration::from_secs(10);
/// How many connections of the closed loop may be under way at once.
const WORKERS: u32 = 32;
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Before a long-lived connection that could not be opened, or was lost, is tried again.
const AGAIN: Duration = Duration::from_millis(200);
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
    /// The end, where SIGTERM does not come before
    #[arg(long, default_value_t = 300)]
    pub secs: u64,
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
    let shared = Shared { tally: Arc::default(), stop, open: watch::Sender::new(0) };
    let mut tasks = JoinSet::new();
    for n in 0..options.long {
        tasks.spawn(keep(shared.clone(), flow(options, n), n, options.clone()));
    }
    let mut opened = shared.open.subscribe();
    tokio::select! {
        all = opened.wait_for(|open| *open >= options.long) => { all?; }
        () = sleep(Duration::from_secs(60)) => bail!("only {} of {} long-lived connections came up: {:?}",
            *shared.open.borrow(), options.long, Tally::by_kind(&shared.tally().losses)),
        _ = terminate.recv() => bail!("ended before all connections were open"),
    }
    println!("{READY}");
    let started = Instant::now();
    for n in 0..WORKERS.min(options.rate) {
        tasks.spawn(renew(shared.clone(), n, options.clone()));
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
        let outcome = once(&flow, count).await;
        let mut tally = shared.tally();
        tally.slowest_ms = tally.slowest_ms.max(u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX));
        match outcome {
            Ok(()) => {
                tally.ok += 1;
                *tally.flows.entry(flow.name).or_default() += 1;
            }
            Err(trouble) => {
                tally.failed += 1;
                tell(&mut tally.failures, &flow, begun, trouble);
            }
        }
    }
}

/// A phase and what went wrong in it.
type Trouble = (Phase, String);

fn tell(list: &mut Vec<Failure>, flow: &Flow, begun_ms: u64, (phase, error): Trouble) {
    if list.len() < TOLD {
        list.push(Failure { begun_ms, failed_ms: now_ms(), flow: flow.name.clone(), phase, error });
    }
}

/// Connect, say something, hear it back, close, see the other side close.
async fn once(flow: &Flow, count: u32) -> Result<(), Trouble> {
    let mut stream = open(flow).await?;
    exchange(&mut stream, flow, count).await?;
    close(&mut stream).await
}

async fn open(flow: &Flow) -> Result<TcpStream, Trouble> {
    let stream = step(Phase::Connect, TcpStream::connect(flow.to)).await?;
    // Without it the load is slower, not wrong.
    let _ = stream.set_nodelay(true);
    Ok(stream)
}

async fn exchange(stream: &mut TcpStream, flow: &Flow, count: u32) -> Result<(), Trouble> {
    let marker = if flow.visible == Visible::May { OPEN } else { SECRET };
    let said = format!("{marker} {count:010} 0123456789abcdef");
    step(Phase::Send, stream.write_all(said.as_bytes())).await?;
    let mut heard = vec![0; said.len()];
    step(Phase::Receive, stream.read_exact(&mut heard)).await?;
    if heard == said.as_bytes() { Ok(()) } else { Err((Phase::Receive, "changed".to_owned())) }
}

async fn close(stream: &mut TcpStream) -> Result<(), Trouble> {
    step(Phase::Close, stream.shutdown()).await?;
    match step(Phase::Close, stream.read(&mut [0; 16])).await? {
        0 => Ok(()),
        _ => Err((Phase::Close, "changed".to_owned())),
    }
}

async fn step<T>(phase: Phase, work: impl Future<Output = std::io::Result<T>>) -> Result<T, Trouble> {
    match timeout(PATIENCE, work).await {
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
        let mut stream = match open(&flow).await {
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
            Ok(Ended::ByPlan) => match close(&mut stream).await {
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
        exchange(stream, flow, count).await?;
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
        Options { flows: vec![flow], rate, long, life: 1, secs: 1 }
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

    #[test]
    fn a_flow_is_written_as_it_is_read() {
        for text in ["a=10.0.0.1:80", "b+=[fd00::1]:7003"] {
            assert_eq!(text.parse::<Flow>().unwrap().to_string(), text);
        }
        assert!("a".parse::<Flow>().is_err() && "a=b".parse::<Flow>().is_err());
    }
}
