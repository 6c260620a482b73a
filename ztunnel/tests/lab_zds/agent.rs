//! Istio's CNI agent, made by hand from the protocol's description: it listens, tells each ztunnel that connects which
//! pods there are, and hands over network namespaces. What it is strict about it records as a violation.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mesh_proto::zds::workload_request::Payload;
use mesh_proto::zds::workload_response::Payload as Answer;
use mesh_proto::zds::{
    AddWorkload, DelWorkload, KeepWorkload, SnapshotSent, WorkloadInfo, WorkloadRequest, WorkloadResponse,
};
use prost::Message;
use rustix::net::{RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use socket2::{Domain, SockAddr, Socket, Type};

/// For each message, either way.
const DEADLINE: Duration = Duration::from_secs(5);
/// How often a quiet connection is looked at, and for how long: it must stay quiet.
const IDLE_CHECK: Duration = Duration::from_secs(5);
const IDLE_READ: Duration = Duration::from_millis(10);
/// Five connections a second at most.
const ACCEPT_EVERY: Duration = Duration::from_millis(200);
/// How soon a thread sees that it shall end.
const LOOK: Duration = Duration::from_millis(50);

/// What ztunnel opens with.
pub const HELLO: [u8; 2] = [0x08, 0x01];

/// One accepted connection.
pub struct Wire(Socket);

impl Wire {
    pub fn send(&self, bytes: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(files)), "there is room");
        }
        self.0.set_write_timeout(Some(DEADLINE))?;
        rustix::net::sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Empty at the end.
    pub fn receive(&self, within: Duration) -> io::Result<Vec<u8>> {
        self.0.set_read_timeout(Some(within))?;
        let mut buffer = [0; 1024];
        let mut control = RecvAncillaryBuffer::default();
        let got = rustix::net::recvmsg(&self.0, &mut [IoSliceMut::new(&mut buffer)], &mut control, RecvFlags::empty())?;
        assert!(!got.flags.contains(rustix::net::ReturnFlags::TRUNC), "ztunnel sends no more than 1024 bytes");
        Ok(buffer[..got.bytes].to_vec())
    }

    /// The next answer; its error text, empty when all is well.
    pub fn ack(&self) -> io::Result<String> {
        let bytes = self.receive(DEADLINE)?;
        if bytes.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let answer = WorkloadResponse::decode(&bytes[..]).map_err(io::Error::other)?;
        let Some(Answer::Ack(ack)) = answer.payload else { return Err(io::Error::other("no Ack")) };
        Ok(ack.error)
    }
}

/// The agent's socket.
pub struct Listener(Socket);

impl Listener {
    /// Takes a stale socket file away first.
    pub fn bind(path: &Path) -> Self {
        let _ = std::fs::remove_file(path);
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None).expect("a socket");
        socket.bind(&SockAddr::unix(path).expect("a short path")).expect("bound");
        socket.listen(16).expect("listening");
        Self(socket)
    }

    pub fn accept(&self, within: Duration) -> io::Result<Wire> {
        // Of a listener it is the time that accept may take.
        self.0.set_read_timeout(Some(within))?;
        Ok(Wire(self.0.accept()?.0))
    }
}

/// A pod as the agent knows it.
#[derive(Clone)]
pub struct Pod {
    pub uid: String,
    pub name: String,
    pub namespace: String,
    pub service_account: String,
    /// `None`: told of by a predecessor, its namespace not found again.
    pub netns: Option<PathBuf>,
}

impl Pod {
    pub fn add(&self) -> Vec<u8> {
        encode(Payload::Add(AddWorkload {
            uid: self.uid.clone(),
            workload_info: Some(WorkloadInfo {
                name: self.name.clone(),
                namespace: self.namespace.clone(),
                service_account: self.service_account.clone(),
            }),
        }))
    }
}

pub fn encode(payload: Payload) -> Vec<u8> {
    WorkloadRequest { payload: Some(payload) }.encode_to_vec()
}

pub fn keep(uid: &str) -> Vec<u8> {
    encode(Payload::Keep(KeepWorkload { uid: uid.to_owned() }))
}

pub fn del(uid: &str) -> Vec<u8> {
    encode(Payload::Del(DelWorkload { uid: uid.to_owned() }))
}

pub fn snapshot_sent() -> Vec<u8> {
    encode(Payload::SnapshotSent(SnapshotSent {}))
}

struct Command {
    bytes: Vec<u8>,
    netns: Option<PathBuf>,
    done: Sender<Result<(), String>>,
}

#[derive(Default)]
struct Shared {
    pods: Mutex<BTreeMap<String, Pod>>,
    /// The newest is the last.
    connections: Mutex<Vec<(usize, Sender<Command>)>>,
    violations: Mutex<Vec<String>>,
    snapshots: AtomicUsize,
    stop: AtomicBool,
}

/// The whole agent.
pub struct Agent {
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

impl Agent {
    pub fn start(path: &Path, pods: Vec<Pod>) -> Self {
        let listener = Listener::bind(path);
        let shared = Arc::new(Shared::default());
        *shared.pods.lock().unwrap() = pods.into_iter().map(|pod| (pod.uid.clone(), pod)).collect();
        let accepting = {
            let shared = shared.clone();
            std::thread::spawn(move || accept(&listener, &shared))
        };
        Self { shared, accepting: Some(accepting) }
    }

    /// How many snapshots were sent and acknowledged.
    pub fn snapshots(&self) -> usize {
        self.shared.snapshots.load(Ordering::SeqCst)
    }

    /// Tells the newest ztunnel of a pod.
    pub fn add(&self, pod: &Pod) -> Result<(), String> {
        self.shared.pods.lock().unwrap().insert(pod.uid.clone(), pod.clone());
        let newest = self.shared.connections.lock().unwrap().last().map(|(_, commands)| commands.clone());
        ask(&newest.ok_or("no connection")?, pod.add(), pod.netns.clone())
    }

    /// Tells all of them that it is gone.
    pub fn del(&self, uid: &str) -> Vec<Result<(), String>> {
        self.shared.pods.lock().unwrap().remove(uid);
        let all: Vec<_> = self.shared.connections.lock().unwrap().iter().map(|(_, c)| c.clone()).collect();
        all.iter().map(|commands| ask(commands, del(uid), None)).collect()
    }

    /// Ends it; what it saw that should not be.
    pub fn stop(mut self) -> Vec<String> {
        self.end();
        std::mem::take(&mut self.shared.violations.lock().unwrap())
    }

    fn end(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(accepting) = self.accepting.take() {
            accepting.join().expect("the agent does not panic");
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.end();
    }
}

fn ask(commands: &Sender<Command>, bytes: Vec<u8>, netns: Option<PathBuf>) -> Result<(), String> {
    let (done, answer) = channel();
    let gone = |_| "the connection is gone".to_owned();
    commands.send(Command { bytes, netns, done }).map_err(|_| "the connection is gone".to_owned())?;
    answer.recv().map_err(gone)?
}

fn accept(listener: &Listener, shared: &Arc<Shared>) {
    let mut threads = Vec::new();
    let mut last: Option<Instant> = None;
    while !shared.stop.load(Ordering::SeqCst) {
        if last.is_some_and(|at| at.elapsed() < ACCEPT_EVERY) {
            std::thread::sleep(LOOK);
            continue;
        }
        let Ok(wire) = listener.accept(LOOK) else { continue };
        last = Some(Instant::now());
        let id = threads.len();
        let (commands, orders) = channel();
        shared.connections.lock().unwrap().push((id, commands));
        let shared = shared.clone();
        threads.push(std::thread::spawn(move || {
            if let Err(error) = converse(&wire, &orders, &shared) {
                shared.violations.lock().unwrap().push(error);
            }
            shared.connections.lock().unwrap().retain(|(other, _)| *other != id);
        }));
    }
    for thread in threads {
        thread.join().expect("a connection's thread does not panic");
    }
}

/// One connection: `Err` is what ztunnel must not have done. That it goes away is no offence.
fn converse(wire: &Wire, orders: &Receiver<Command>, shared: &Shared) -> Result<(), String> {
    match wire.receive(DEADLINE) {
        Ok(hello) if hello.is_empty() => return Ok(()),
        Ok(hello) if hello == HELLO => {}
        other => return Err(format!("instead of the hello: {other:?}")),
    }
    let pods: Vec<Pod> = shared.pods.lock().unwrap().values().cloned().collect();
    for pod in pods {
        let (bytes, file) = match &pod.netns {
            Some(netns) => (pod.add(), Some(File::open(netns).map_err(|e| e.to_string())?)),
            None => (keep(&pod.uid), None),
        };
        let files: Vec<_> = file.iter().map(AsFd::as_fd).collect();
        let Some(_) = exchange(wire, &bytes, &files)? else { return Ok(()) };
    }
    let Some(done) = exchange(wire, &snapshot_sent(), &[])? else { return Ok(()) };
    if !done.is_empty() {
        return Err(format!("the snapshot was answered with {done:?}"));
    }
    shared.snapshots.fetch_add(1, Ordering::SeqCst);
    let mut quiet = Instant::now();
    while !shared.stop.load(Ordering::SeqCst) {
        match orders.recv_timeout(LOOK) {
            Ok(Command { bytes, netns, done }) => {
                let file = netns.map(File::open).transpose().map_err(|e| e.to_string())?;
                let files: Vec<_> = file.iter().map(AsFd::as_fd).collect();
                let answer = exchange(wire, &bytes, &files)?;
                let told = match &answer {
                    Some(text) if text.is_empty() => Ok(()),
                    Some(text) => Err(text.clone()),
                    None => Err("the connection is gone".into()),
                };
                let _ = done.send(told);
                if answer.is_none() {
                    return Ok(());
                }
                quiet = Instant::now();
            }
            Err(RecvTimeoutError::Timeout) if quiet.elapsed() >= IDLE_CHECK => {
                match wire.receive(IDLE_READ) {
                    Ok(bytes) if bytes.is_empty() => return Ok(()),
                    Ok(bytes) => return Err(format!("{bytes:?} out of turn")),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(_) => return Ok(()),
                }
                quiet = Instant::now();
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
    }
    Ok(())
}

/// One request and its answer; `None` when ztunnel is gone.
fn exchange(wire: &Wire, bytes: &[u8], files: &[BorrowedFd<'_>]) -> Result<Option<String>, String> {
    if wire.send(bytes, files).is_err() {
        return Ok(None);
    }
    match wire.ack() {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(format!("no answer within {DEADLINE:?}")),
        Err(error) if error.kind() == io::ErrorKind::Other => Err(error.to_string()),
        Err(_) => Ok(None),
    }
}
