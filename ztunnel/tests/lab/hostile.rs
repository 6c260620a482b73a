//! Clients that mean no good at port 15008, with a certificate of the mesh and without (`peers/hostile.py` has what they
//! send). Each is cut or costs no more than it may, leaves a trace, and takes nothing from a client that means well.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::support::*;

const PODS: [Pod; 3] = [('a', "a1"), ('b', "b1"), ('g', "foe")];
/// Says something without end to whoever connects.
const TALKER_PORT: u16 = 8081;
/// Takes no connection: who calls it hears nothing.
const DEAF_PORT: u16 = 8082;

/// How long the client that means well may wait for an answer. Two cores that also run the attack answer in far less.
const ATTENTION: Duration = Duration::from_secs(10);
/// What an attack that is cut may cost at its peak: a read, a header list, and what malloc keeps of them.
const CHEAP: u64 = 64 << 20;
/// An attack by one client, and what is to become of it.
struct Attack {
    name: &'static str,
    /// Of those that it may see; a reset can overtake the GOAWAY.
    ends: &'static [&'static str],
    /// What the log says of it.
    trace: &'static str,
}

const CALM: &[&str] = &["goaway 11", "reset", "closed"];
const OVERLOAD: &str = "response_flags=\"OVERLOAD\"";
const CANCELLED: &str = "response_flags=\"CANCELLED\"";
const BAD_REQUEST: &str = "response_flags=\"BAD_REQUEST\"";

const CUT: [Attack; 22] = [
    Attack { name: "rapid_reset", ends: CALM, trace: OVERLOAD },
    Attack { name: "slow_reset", ends: CALM, trace: OVERLOAD },
    Attack { name: "continuation_flood", ends: CALM, trace: OVERLOAD },
    Attack { name: "settings_flood", ends: CALM, trace: OVERLOAD },
    Attack { name: "ping_flood", ends: CALM, trace: OVERLOAD },
    Attack { name: "pong_flood", ends: CALM, trace: OVERLOAD },
    Attack { name: "priority_flood", ends: CALM, trace: OVERLOAD },
    Attack { name: "unknown_flood", ends: CALM, trace: OVERLOAD },
    Attack { name: "window_update_flood", ends: CALM, trace: OVERLOAD },
    Attack { name: "tiny_windows", ends: CALM, trace: OVERLOAD },
    Attack { name: "empty_data_flood", ends: CALM, trace: OVERLOAD },
    Attack { name: "get_flood", ends: CALM, trace: OVERLOAD },
    Attack { name: "too_many_streams", ends: CALM, trace: OVERLOAD },
    Attack { name: "header_bomb", ends: CALM, trace: OVERLOAD },
    Attack { name: "header_list", ends: CALM, trace: OVERLOAD },
    Attack { name: "settings_unacknowledged", ends: CALM, trace: OVERLOAD },
    Attack { name: "window_overflow", ends: &["goaway 3", "reset", "closed"], trace: BAD_REQUEST },
    Attack { name: "oversized_frame", ends: &["goaway 6", "reset", "closed"], trace: BAD_REQUEST },
    Attack { name: "garbage", ends: &["goaway 6", "goaway 1", "reset", "closed"], trace: BAD_REQUEST },
    Attack { name: "no_preface", ends: &["closed", "reset"], trace: "response_flags=\"H2_HANDSHAKE_FAILURE\"" },
    Attack { name: "plaintext", ends: &["closed", "reset"], trace: "response_flags=\"TLS_FAILURE\"" },
    Attack { name: "plaintext_http2", ends: &["closed", "reset"], trace: "response_flags=\"TLS_FAILURE\"" },
];

impl Lab {
    fn hostile() -> Self {
        let mut lab = Self::up(&PODS);
        lab.certify("foe");
        for node in ['a', 'b'] {
            lab.configure(node, &Mesh::default());
        }
        serve_in(&lab.netns("b1"));
        talk_in(&lab.netns("b1"));
        lab.start_ztunnel('a');
        lab.start_ztunnel('b');
        lab
    }

    /// Begins an attack by `foe` on b1, with tunnels to its `port`.
    fn attack(&self, name: &str, port: u16) -> Running {
        let [b1, _] = self.addresses("b1");
        let script = format!(
            "exec {} {} {name} {b1}:15008 {b1}:{port} {}",
            tool("peers/bin/python").display(),
            peer_script("hostile.py").display(),
            self.dir.path().display()
        );
        let mut command = self.in_pod("foe", &script);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the shell runs");
        let (stdin, said) = (child.stdin.take(), BufReader::new(child.stdout.take().expect("piped")));
        Running { child, stdin, said }
    }

    /// Where b's ztunnel keeps what the kernel knows of it.
    fn process(&self) -> String {
        let (_, child) = self.ztunnels.iter().find(|(node, _)| *node == 'b').expect("it runs");
        format!("/proc/{}", child.id())
    }

    /// What b's ztunnel has in memory from now on counts for [`Self::cost`].
    fn before(&self) -> Before {
        fs::write(format!("{}/clear_refs", self.process()), "5").expect("the kernel forgets its peak");
        Before { written: self.memory("RssAnon:"), code: self.memory("RssFile:") }
    }

    /// Bytes it wrote to at most beyond what it had. The kernel's peak has its code in it, which comes and goes.
    fn cost(&self, before: &Before) -> u64 {
        let code = self.memory("RssFile:").max(before.code);
        self.memory("VmHWM:").saturating_sub(code + before.written)
    }

    fn memory(&self, what: &str) -> u64 {
        let status = fs::read_to_string(format!("{}/status", self.process())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix(what)).expect("a line of it");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
    }

    fn open_files(&self) -> usize {
        fs::read_dir(format!("{}/fd", self.process())).expect("it runs").count()
    }

    /// Lines of b's log after its first `known` bytes that have all of `parts`.
    fn lines_after(&self, known: usize, parts: &[&str]) -> usize {
        let log = self.log('b');
        log[known..].lines().filter(|line| parts.iter().all(|part| line.contains(part))).count()
    }
}

/// Bytes that a ztunnel had in memory.
struct Before {
    written: u64,
    code: u64,
}

/// An attack under way.
struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    said: BufReader<ChildStdout>,
}

impl Running {
    fn await_ready(&mut self) {
        let mut line = String::new();
        self.said.read_line(&mut line).expect("readable");
        assert_eq!(line.trim(), "ready");
    }

    /// Ends it, unless it has ended, and tells what became of it.
    fn end(mut self) -> serde_json::Value {
        drop(self.stdin.take());
        let mut said = String::new();
        self.said.read_to_string(&mut said).expect("readable");
        let _ = self.child.wait();
        serde_json::from_str(said.lines().last().unwrap_or_default()).unwrap_or_else(|e| panic!("{e}: {said:?}"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn talk_in(netns: &Path) {
    let listener = inside(netns, || TcpListener::bind(("::", TALKER_PORT)).expect("bound"));
    // Ends with the process.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || while stream.write_all(&[b'x'; 16 * 1024]).is_ok() {});
        }
    });
}

/// A listener whose queue is full: what calls it now waits until it gives up.
fn deaf_in(netns: &Path) -> (socket2::Socket, Vec<socket2::Socket>) {
    inside(netns, || {
        let here = std::net::SocketAddr::from(([0, 0, 0, 0], DEAF_PORT));
        let new = || socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
        let listener = new();
        listener.bind(&here.into()).expect("bound");
        listener.listen(0).expect("listens");
        let callers = (0..4).map(|_| {
            let caller = new();
            caller.set_nonblocking(true).expect("set");
            let loopback = std::net::SocketAddr::from(([127, 0, 0, 1], DEAF_PORT));
            let _ = caller.connect(&loopback.into());
            caller
        });
        let callers = callers.collect();
        (listener, callers)
    })
}

/// A client that means well: one connection that stays and one after the other that is new, through the same ztunnel to the
/// same pod, until the test is done. Keeps the longest it had to wait.
struct Innocent<'a> {
    lab: &'a Lab,
    done: AtomicBool,
    longest: Mutex<Duration>,
}

impl<'a> Innocent<'a> {
    /// Runs `work` beside it and fails where it was let down.
    fn beside<T>(lab: &'a Lab, work: impl FnOnce() -> T) -> T {
        let innocent = Self { lab, done: AtomicBool::new(false), longest: Mutex::default() };
        /// Also when the work panics.
        struct Done<'a>(&'a AtomicBool);
        impl Drop for Done<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let done = std::thread::scope(|scope| {
            scope.spawn(|| innocent.live());
            let _done = Done(&innocent.done);
            work()
        });
        let longest = *innocent.longest.lock().expect("no panic holds it");
        eprintln!("the client that means well waited {longest:?} at most");
        assert!(longest > Duration::ZERO && longest < ATTENTION, "it waited {longest:?}");
        done
    }

    fn live(&self) {
        let [b1, _] = self.lab.addresses("b1");
        let answer = format!("{} {MARKER}", self.lab.addresses("a1")[0]);
        let mut held = self.lab.hold("a1", &b1);
        while !self.done.load(Ordering::Relaxed) {
            self.timed(|| assert_eq!(held.ask(), answer, "on a connection that was open"));
            self.timed(|| assert_eq!(self.lab.call("a1", &b1, APP_PORT).as_ref(), Ok(&answer), "on a new one"));
        }
    }

    fn timed(&self, what: impl FnOnce()) {
        let started = Instant::now();
        what();
        let mut longest = self.longest.lock().expect("no panic holds it");
        *longest = started.elapsed().max(*longest);
    }
}

#[test]
fn who_breaks_or_overdoes_http2_is_cut_and_told_of_while_others_are_served() {
    if !possible(&[tool("peers/bin/python").to_str().expect("a path of letters")]) {
        return;
    }
    let lab = Lab::hostile();
    let _deaf = deaf_in(&lab.netns("b1"));
    let [foe, _] = lab.addresses("foe");
    let source = format!("src.addr={foe}:");
    Innocent::beside(&lab, || {
        // What the first connection costs is not the attack's.
        lab.attack("stream_window_overflow", APP_PORT).end();
        let files = lab.open_files();
        for Attack { name, ends, trace } in CUT {
            let (known, before) = (lab.log('b').len(), lab.before());
            let port = match name {
                "slow_reset" => DEAF_PORT,
                "tiny_windows" => TALKER_PORT,
                _ => APP_PORT,
            };
            let started = Instant::now();
            let outcome = lab.attack(name, port).end();
            let cost = lab.cost(&before);
            eprintln!("{name}: {outcome} in {:?}, {} MiB", started.elapsed(), cost >> 20);
            assert!(ends.contains(&outcome["end"].as_str().expect("a word")), "{name} ended as {outcome}");
            eventually(&format!("{name} is told of"), || lab.lines_after(known, &[&source, trace]) > 0);
            if name == "slow_reset" {
                eventually("what they asked for is given up", || lab.lines_after(known, &[&source, CANCELLED]) > 0);
            }
            assert!(cost < CHEAP, "{name} cost {cost} bytes");
            assert_eq!(lab.lines_after(known, &["\th2::"]), 0, "{name} wrote into the log");
        }
        // What was opened for them is closed.
        eventually("nothing is left of them", || lab.open_files() <= files + 8);
    });
    let broken = |flag: &str| lab.metric('b', &["mesh_hbone_connections_broken_total", "destination", flag]);
    assert!(broken(OVERLOAD) >= Some(15.0) && broken(BAD_REQUEST) >= Some(3.0));
    assert!(!lab.log('b').contains("panicked"), "{}", lab.log('b'));
}

#[test]
fn who_goes_too_far_in_one_stream_loses_that_stream() {
    if !possible(&[tool("peers/bin/python").to_str().expect("a path of letters")]) {
        return;
    }
    let lab = Lab::hostile();
    let outcome = lab.attack("stream_window_overflow", APP_PORT).end();
    assert_eq!(outcome["end"], "open", "{outcome}");
    assert_eq!(outcome["resets"]["3"], 1, "FLOW_CONTROL_ERROR: {outcome}");
}

#[test]
fn who_is_slow_or_silent_is_cut_in_time_and_costs_little_until_then() {
    if !possible(&[tool("peers/bin/python").to_str().expect("a path of letters")]) {
        return;
    }
    let lab = Lab::hostile();
    let [foe, _] = lab.addresses("foe");
    let source = format!("src.addr={foe}:");
    Innocent::beside(&lab, || {
        let timed_out = |connection| lab.lines_after(0, &[&source, connection, "response_flags=\"TIMEOUT\""]);

        // Thousands that never begin, or never finish, a handshake: the oldest make room for the others.
        let before = lab.before();
        let mut half_open = lab.attack("half_open", APP_PORT);
        let mut dripping = lab.attack("dripping", APP_PORT);
        half_open.await_ready();
        dripping.await_ready();
        let mut silent = lab.attack("silent_after_tls", APP_PORT);
        silent.await_ready();
        let [half_open, dripping, silent] = [half_open, dripping, silent].map(Running::end);
        let cost = lab.cost(&before);
        eprintln!("half open: {half_open}, dripping: {dripping}, silent: {silent}, {} MiB", cost >> 20);
        for outcome in [&half_open, &dripping, &silent] {
            assert_eq!(outcome["end"], "closed", "{outcome}");
            // The deadline is 10 s.
            assert!(outcome["after"].as_f64().expect("seconds") < 30.0, "{outcome}");
        }
        assert_eq!(half_open["sent"], 2000, "{half_open}");
        assert!(cost < CHEAP, "they cost {cost} bytes");
        let displaced = lab.metric('b', &["mesh_connections_refused_total", OVERLOAD]).unwrap_or_default();
        assert!(displaced >= 1500.0, "{displaced} made room");
        let told = lab.lines_after(0, &["the oldest made room"]);
        assert!((1..100).contains(&told), "{told} lines tell of it");
        eventually("those that stayed are told of", || timed_out("connection failed") >= 500);
        eventually("so is the silent one", || {
            lab.lines_after(0, &[&source, "HBONE connection failed", "H2_HANDSHAKE_FAILURE"]) > 0
        });
        assert_eq!(
            lab.lines_after(0, &["inbound", "src.identity=\"spiffe://cluster.local/ns/shop/sa/a1\"", "error="]),
            0
        );

        // A header block without an end, and a client that takes all it can get and reads nothing.
        let before = lab.before();
        let mut endless = lab.attack("endless_headers", APP_PORT);
        endless.await_ready();
        let mut deaf = lab.attack("full_windows", TALKER_PORT);
        deaf.await_ready();
        within(Duration::from_secs(90), "both are cut", || timed_out("HBONE connection failed") >= 2);
        let cost = lab.cost(&before);
        let [endless, deaf] = [endless, deaf].map(Running::end);
        eprintln!("endless: {endless}, deaf: {deaf}, {} MiB", cost >> 20);
        assert_ne!(endless["end"], "open", "{endless}");
        assert!(cost < CHEAP, "they cost {cost} bytes");
    });
}

#[test]
fn who_takes_nothing_or_a_byte_at_a_time_costs_little_and_may_stay() {
    if !possible(&[tool("peers/bin/python").to_str().expect("a path of letters")]) {
        return;
    }
    let lab = Lab::hostile();
    Innocent::beside(&lab, || {
        for name in ["zero_window", "byte_by_byte"] {
            let before = lab.before();
            let mut running = lab.attack(name, TALKER_PORT);
            running.await_ready();
            let open = || lab.metric('b', &["istio_tcp_sockets_open", "destination"]).unwrap_or_default();
            eventually("its streams are open", || open() >= 200.0);
            std::thread::sleep(Duration::from_secs(3));
            let cost = lab.cost(&before);
            let outcome = running.end();
            eprintln!("{name}: {outcome}, {} MiB", cost >> 20);
            // As an application may that is slow to read.
            assert_eq!(outcome["end"], "open", "{outcome}");
            assert!(cost < CHEAP, "{name} cost {cost} bytes");
            eventually("they are closed with it", || open() < 100.0);
        }
    });
}
