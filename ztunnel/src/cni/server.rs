//! ztunnel's end of the socket: who may ask, what the control plane says about a pod, the order to the manager.
//!
//! Every ADD has an end within [`ADD`], and whoever hangs up before it has given up: what was begun is undone. During an
//! upgrade the newest ztunnel has the path, by a rename; an older one serves those who had reached it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ebpf_loader::NetnsCookie;
use futures_util::stream::{self, StreamExt as _};
use mesh::drain::DrainWatcher;
use mesh::grpc::AuthChannel;
use mesh::serve::Readiness;
use mesh_proto::enrolment::enrolment_service_client::EnrolmentServiceClient;
use mesh_proto::enrolment::resolve_response::Verdict;
use mesh_proto::enrolment::{OutsideMesh, ResolveRequest};
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};
use ztunnel_cni::namespaces::Namespaces;
use ztunnel_cni::wire::{self, Answer, Attachment, PodName, Request};

use crate::node::Registry;
use crate::node::enrolment::{Desired, Enrolment};
use crate::node::find::Finder;
use crate::node::orders::{HandedOver, OrderError, Orders};

/// The whole of an ADD, less than what the plugin waits.
const ADD: Duration = Duration::from_secs(5);
/// The part of it that the control plane gets.
const RESOLVE: Duration = Duration::from_secs(2);
/// A request is one packet, which a plugin sends at once.
const REQUEST: Duration = Duration::from_secs(2);
/// Requests served at a time; more wait in the socket's queue.
const AT_ONCE: usize = 64;
/// How long a pod may be enrolled on the control plane's word alone before it is asked again: its enrolment should have
/// been pushed long before.
const UNNAMED: Duration = Duration::from_secs(30);

/// The socket, under its name.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
    inode: u64,
}

impl Listener {
    /// Takes the path over from whoever has it; those who are connecting just then reach one of the two.
    ///
    /// # Errors
    /// When the directory cannot be made or written, or the path is too long for a socket.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let directory = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(directory)?;
        let fresh = path.with_extension(format!("{}.new", std::process::id()));
        let _ = fs::remove_file(&fresh);
        let socket = wire::listen(&fresh)?;
        // Checked by who asks as well; this keeps others from filling the queue.
        fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600))?;
        let inode = fs::metadata(&fresh)?.ino();
        fs::rename(&fresh, path)?;
        Ok(Self { socket: UnixListener::from_std(socket)?, path: path.to_owned(), inode })
    }

    async fn accept(&self) -> io::Result<UnixStream> {
        self.socket.accept().await.map(|(connection, _)| connection)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // A successor's stays. Without the file plugins know at once that nobody is here.
        if fs::metadata(&self.path).is_ok_and(|m| m.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// What the server needs from the rest.
pub struct Deps {
    pub orders: Orders,
    pub desired: watch::Receiver<Desired>,
    pub registry: Arc<Registry>,
    pub finder: Finder,
    /// `None` where a file says which pods there are: it says it all.
    pub control_plane: Option<AuthChannel>,
    pub namespaces: Namespaces,
    pub readiness: Readiness,
}

/// A pod that was added here.
#[derive(Debug, Clone)]
struct Added {
    pod: PodName,
    /// By which the control plane knows it: another one than the runtime's for static pods.
    uid: String,
    cookie: NetnsCookie,
    since: Instant,
}

struct Server {
    deps: Deps,
    added: Mutex<BTreeMap<Attachment, Added>>,
}

/// Serves until the drain begins, and then those who are connected.
pub async fn run(listener: Listener, deps: Deps, drain: DrainWatcher) {
    let mut desired = deps.desired.clone();
    let server = Arc::new(Server { deps, added: Mutex::default() });
    let mut calls = JoinSet::new();
    // One at a time, beside the calls: it may have to wait for the control plane. Given up when we end.
    let mut upkeeping = JoinSet::new();
    let mut upkeep = tokio::time::interval(UNNAMED / 3);
    upkeep.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        // Every branch is a wake-up or leaves what it waits for where it is.
        tokio::select! {
            accepted = listener.accept(), if calls.len() < AT_ONCE => match accepted {
                Ok(connection) => {
                    calls.spawn(serve(server.clone(), connection));
                }
                Err(error) => {
                    tracing::warn!(%error, "accepting a CNI plugin");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(_) = calls.join_next() => {}
            Ok(()) = desired.changed() => server.learn(&desired.borrow_and_update()),
            _ = upkeep.tick(), if upkeeping.is_empty() => {
                let server = server.clone();
                upkeeping.spawn(async move { server.look_after().await });
            }
            Some(_) = upkeeping.join_next() => {}
            () = drain.draining() => break,
        }
    }
    // Who is in the queue has been taken for served by the kernel.
    while let Ok(Ok(connection)) = tokio::time::timeout(Duration::ZERO, listener.accept()).await {
        calls.spawn(serve(server.clone(), connection));
    }
    drop(listener);
    calls.join_all().await;
}

/// One plugin's connection: a request, an answer.
async fn serve(server: Arc<Server>, connection: UnixStream) {
    match tokio::time::timeout(REQUEST, receive(&connection)).await {
        Ok(Ok((request, file))) => {
            let (answer, added) = tokio::select! {
                answered = server.answer(request, file) => answered,
                // The plugin was killed; nothing else is sent. Dropping an order undoes it.
                () = hung_up(&connection) => return,
            };
            let sent = async {
                let packet = wire::encode(&answer)?;
                connection.async_io(Interest::WRITABLE, || wire::send(connection.as_fd(), &packet, None)).await
            };
            if let (Err(error), Some(added)) = (sent.await, added) {
                tracing::warn!(pod = %added.pod.name, namespace = %added.pod.namespace, %error, "the plugin is gone");
                server.remove(&added).await;
            }
        }
        Ok(Err(error)) => tracing::warn!(%error, "a CNI plugin's request"),
        Err(_) => tracing::debug!("a CNI plugin that says nothing"),
    }
}

async fn receive(connection: &UnixStream) -> io::Result<(Request, Option<OwnedFd>)> {
    let peer = connection.peer_cred()?;
    if peer.uid() != 0 {
        let text = format!("from user {}: only root may hand over namespaces", peer.uid());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    let (bytes, file) = connection.async_io(Interest::READABLE, || wire::receive(connection.as_fd())).await?;
    Ok((wire::decode(&bytes)?, file))
}

async fn hung_up(connection: &UnixStream) {
    // A second packet is against the protocol and ends the connection like an end of file.
    let _ = connection.async_io(Interest::READABLE, || wire::receive(connection.as_fd())).await;
}

/// What the control plane says of a pod.
enum Word {
    Enrol(Box<Enrolment>),
    Outside,
    /// Nothing, and why.
    Silence(String),
}

impl Server {
    fn added(&self) -> MutexGuard<'_, BTreeMap<Attachment, Added>> {
        self.added.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The answer, and what is to be undone when it does not arrive.
    async fn answer(&self, request: Request, file: Option<OwnedFd>) -> (Answer, Option<Added>) {
        match request {
            Request::Add { attachment, pod, addresses } => {
                let Some(file) = file else { return (refused("the request came without a namespace"), None) };
                self.add(attachment, pod, addresses, file).await
            }
            Request::Del { attachment } => (self.del(&attachment, file).await, None),
            Request::Check { pod } => (self.check(&pod, file), None),
            Request::Status => (self.status(), None),
            Request::Gc { valid } => (self.collect(&valid.into_iter().collect()).await, None),
        }
    }

    async fn add(
        &self,
        attachment: Attachment,
        pod: PodName,
        addresses: Vec<IpAddr>,
        file: OwnedFd,
    ) -> (Answer, Option<Added>) {
        let end = Instant::now() + ADD;
        let (name, namespace) = (&pod.name, &pod.namespace);
        let mut enrolment = match self.word(&pod).await {
            Word::Enrol(enrolment) => *enrolment,
            Word::Outside => return (Answer::Outside, None),
            Word::Silence(reason) if self.deps.namespaces.is_outside(namespace) => {
                tracing::warn!(pod = %name, %namespace, reason, "not in the mesh, as its namespace was not when last heard of");
                return (Answer::Outside, None);
            }
            Word::Silence(reason) => return (Answer::Later { reason }, None),
        };
        enrolment.addresses = addresses;
        let uid = enrolment.uid.clone();
        let handed_over = match HandedOver::new(enrolment, file, &self.deps.finder) {
            Ok(handed_over) => handed_over,
            Err(error) => return (refused(&error.to_string()), None),
        };
        let cookie = handed_over.cookie;
        match tokio::time::timeout_at(end, self.deps.orders.add(handed_over)).await {
            Ok(Ok(())) => {
                let added = Added { pod, uid, cookie, since: Instant::now() };
                self.added().insert(attachment, added.clone());
                (Answer::Enrolled, Some(added))
            }
            Ok(Err(OrderError::Refused(reason))) => (Answer::Later { reason }, None),
            Ok(Err(ending @ OrderError::Ending)) => (Answer::Later { reason: ending.to_string() }, None),
            Err(_) => {
                let reason = format!("not enrolled within {} s: is the control plane connected?", ADD.as_secs());
                (Answer::Later { reason }, None)
            }
        }
    }

    /// Pushed already, or asked for.
    async fn word(&self, pod: &PodName) -> Word {
        {
            let desired = self.deps.desired.borrow();
            if let Some(enrolment) = desired.pods.get(&pod.uid) {
                return Word::Enrol(Box::new(enrolment.clone()));
            }
            if self.deps.control_plane.is_none() && desired.complete {
                return Word::Outside;
            }
        }
        self.ask(pod).await
    }

    async fn ask(&self, pod: &PodName) -> Word {
        let Some(channel) = self.deps.control_plane.clone() else {
            return Word::Silence("nothing has said yet which pods there are".to_owned());
        };
        let PodName { uid, namespace, name } = pod.clone();
        let request = ResolveRequest { uid, namespace, name };
        let mut client = EnrolmentServiceClient::new(channel);
        let verdict = match tokio::time::timeout(RESOLVE, client.resolve(request)).await {
            Ok(Ok(response)) => response.into_inner().verdict,
            Ok(Err(status)) => return Word::Silence(format!("the control plane: {status}")),
            Err(_) => {
                return Word::Silence(format!("the control plane has not answered within {} s", RESOLVE.as_secs()));
            }
        };
        match verdict {
            Some(Verdict::Enrolment(enrolment)) => match Enrolment::try_from(enrolment) {
                Ok(enrolment) if *enrolment.namespace == *pod.namespace && *enrolment.name == *pod.name => {
                    self.deps.namespaces.note_inside([pod.namespace.as_str()].into_iter());
                    Word::Enrol(Box::new(enrolment))
                }
                Ok(other) => Word::Silence(format!("the control plane named pod {}/{}", other.namespace, other.name)),
                Err(error) => Word::Silence(format!("the control plane's enrolment: {error}")),
            },
            Some(Verdict::Outside(OutsideMesh { namespace_outside })) => {
                if namespace_outside {
                    self.deps.namespaces.note_outside(&pod.namespace);
                } else {
                    self.deps.namespaces.note_inside([pod.namespace.as_str()].into_iter());
                }
                Word::Outside
            }
            Some(Verdict::Unknown(_)) => {
                Word::Silence("the control plane does not know the pod on this node".to_owned())
            }
            None => Word::Silence("the control plane's answer is of a kind not known here".to_owned()),
        }
    }

    async fn del(&self, attachment: &Attachment, file: Option<OwnedFd>) -> Answer {
        let added = self.added().remove(attachment);
        if let Some(added) = added {
            self.remove(&added).await;
        } else if let Some(cookie) = file.and_then(|file| ebpf_loader::cookie_of(file.as_fd()).ok()) {
            // Added by a predecessor, or enrolled while it ran.
            let pods = self.deps.registry.pods();
            if let Some(pod) = pods.iter().find(|pod| pod.cookie == cookie) {
                self.end(pod.uid.clone(), cookie).await;
            }
        }
        Answer::Done
    }

    async fn remove(&self, added: &Added) {
        self.end(added.uid.clone(), added.cookie).await;
    }

    async fn end(&self, uid: String, cookie: NetnsCookie) {
        // ztunnel ends: its successor finds no process of the pod, and nothing to take over.
        let _ = self.deps.orders.remove(uid, Some(cookie)).await;
    }

    fn check(&self, pod: &PodName, file: Option<OwnedFd>) -> Answer {
        let Some(cookie) = file.and_then(|file| ebpf_loader::cookie_of(file.as_fd()).ok()) else {
            return refused("the request came without a network namespace");
        };
        if self.deps.registry.pods().iter().any(|pod| pod.cookie == cookie && !pod.drain.is_draining()) {
            return Answer::Enrolled;
        }
        let desired = self.deps.desired.borrow();
        match (desired.pods.contains_key(&pod.uid), desired.complete) {
            (true, _) => refused("it has not been enrolled, see the pod's status and ztunnel's log"),
            (false, true) => Answer::Outside,
            (false, false) => Answer::Later { reason: "nothing has said yet which pods there are".to_owned() },
        }
    }

    fn status(&self) -> Answer {
        if self.deps.readiness.is_ready() {
            Answer::Done
        } else {
            Answer::Later { reason: "ztunnel is starting or ending, or waits for the control plane".to_owned() }
        }
    }

    async fn collect(&self, valid: &BTreeSet<Attachment>) -> Answer {
        let gone: Vec<Added> = {
            let mut added = self.added();
            let gone: Vec<Attachment> = added.keys().filter(|a| !valid.contains(a)).cloned().collect();
            gone.iter().filter_map(|attachment| added.remove(attachment)).collect()
        };
        for added in gone {
            tracing::info!(pod = %added.pod.name, namespace = %added.pod.namespace, "the runtime no longer has it");
            self.remove(&added).await;
        }
        Answer::Done
    }

    /// What is pushed tells of namespaces too.
    fn learn(&self, desired: &Desired) {
        self.deps.namespaces.note_inside(desired.pods.values().map(|pod| &*pod.namespace));
    }

    /// Pods that were enrolled on an answer and then never named: asked for again, as the answer may have been overtaken.
    async fn look_after(&self) {
        let cookies: BTreeSet<NetnsCookie> = self.deps.registry.pods().iter().map(|pod| pod.cookie).collect();
        self.added().retain(|_, added| cookies.contains(&added.cookie));
        let unnamed: Vec<Added> = {
            let desired = self.deps.desired.borrow();
            let added = self.added();
            let unnamed = added.values().filter(|a| a.since.elapsed() > UNNAMED && !desired.pods.contains_key(&a.uid));
            unnamed.cloned().collect()
        };
        let looked = stream::iter(unnamed).for_each_concurrent(AT_ONCE, |added| async move {
            // It may have been named while the question was on its way.
            if matches!(self.ask(&added.pod).await, Word::Outside)
                && !self.deps.desired.borrow().pods.contains_key(&added.uid)
            {
                tracing::info!(pod = %added.pod.name, namespace = %added.pod.namespace, "not in the mesh any more");
                self.remove(&added).await;
            }
        });
        looked.await;
    }
}

fn refused(reason: &str) -> Answer {
    Answer::Refused { reason: reason.to_owned() }
}

#[cfg(test)]
mod tests;
