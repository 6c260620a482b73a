//! Pods whose network namespace is handed over by whoever made it (a CNI plugin, an agent) instead of being looked for.
//!
//! An order comes with what to enrol: nobody is captured because a namespace was handed over, but because the control
//! plane, or the agent that stands in for it, wants the pod in the mesh. Whoever orders is trusted to say the truth about
//! the namespace (root on this node); that it is one, and not the node's own, is checked here all the same.

use std::io;
use std::os::fd::OwnedFd;

use ebpf_loader::{LoadError, NetnsCookie};
use nix::sys::stat::fstat;
use nix::sys::statfs::{FsType, fstatfs};
use thiserror::Error;
use tokio::sync::{mpsc, oneshot};

use super::enrolment::Enrolment;
use super::find::Finder;
use super::netns::Netns;

/// Orders that wait for the manager; who gives one more waits with it.
const QUEUE: usize = 64;
/// `NSFS_MAGIC` of linux/magic.h.
const NSFS: FsType = FsType(0x6e73_6673);

/// A pod with its namespace, verified.
#[derive(Debug)]
pub struct HandedOver {
    /// Its addresses, where it has any, are those in the namespace, whatever the control plane says.
    pub enrolment: Enrolment,
    pub netns: Netns,
    pub cookie: NetnsCookie,
}

impl HandedOver {
    /// Takes an open file that is said to be the network namespace of the pod.
    ///
    /// # Errors
    /// When it is no network namespace, or the node's or ztunnel's own.
    pub fn new(enrolment: Enrolment, file: OwnedFd, finder: &Finder) -> Result<Self, BadNetns> {
        let kind = fstatfs(&file).map_err(io::Error::from)?.filesystem_type();
        if kind != NSFS {
            return Err(BadNetns::NotNsfs);
        }
        let inode = fstat(&file).map_err(io::Error::from)?.st_ino;
        if finder.refuses(inode) {
            return Err(BadNetns::Host);
        }
        let netns = Netns::new(file, inode)?;
        // Only a network namespace can be entered as one.
        netns.enter(|| Ok(())).map_err(BadNetns::Enter)?;
        let cookie = ebpf_loader::cookie_of(netns.file())?;
        Ok(Self { enrolment, netns, cookie })
    }
}

/// Why a file is not taken for a pod's network namespace.
#[derive(Debug, Error)]
pub enum BadNetns {
    #[error("the file handed over is no namespace")]
    NotNsfs,
    #[error("the namespace handed over is the node's own: pods of the host's network are not captured")]
    Host,
    #[error("the file handed over cannot be entered as a network namespace: {0}")]
    Enter(#[source] io::Error),
    #[error("looking at the namespace handed over: {0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Cookie(#[from] LoadError),
}

/// What the manager is told.
#[derive(Debug)]
pub enum Order {
    /// Enrol this pod, in this namespace. It stays until [`Order::Remove`], or until the control plane has named it and
    /// then no longer does. Without a reader of the reply everything is undone.
    Add { pod: Box<HandedOver>, reply: oneshot::Sender<Result<(), String>> },
    /// The namespace is about to go. With a cookie only that one: a pod may have got another meanwhile.
    Remove { uid: String, cookie: Option<NetnsCookie>, reply: oneshot::Sender<()> },
}

/// Why an order was not carried out.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum OrderError {
    #[error("{0}")]
    Refused(String),
    #[error("ztunnel is ending")]
    Ending,
}

/// The way to the manager. Dropping a call before it has ended undoes it.
#[derive(Debug, Clone)]
pub struct Orders(mpsc::Sender<Order>);

/// A way to the manager, and its other end.
#[must_use]
pub fn channel() -> (Orders, mpsc::Receiver<Order>) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    (Orders(sender), receiver)
}

impl Orders {
    /// Has a pod enrolled; returns once its connections are captured. Before the control plane's first answers are in
    /// the order waits.
    ///
    /// # Errors
    /// Why the pod is not enrolled; nothing of it is left then.
    pub async fn add(&self, pod: HandedOver) -> Result<(), OrderError> {
        let (reply, answer) = oneshot::channel();
        self.0.send(Order::Add { pod: Box::new(pod), reply }).await.map_err(|_| OrderError::Ending)?;
        answer.await.map_err(|_| OrderError::Ending)?.map_err(OrderError::Refused)
    }

    /// Ends what was ordered for a pod; one that is not known is no error.
    ///
    /// # Errors
    /// When ztunnel ends.
    pub async fn remove(&self, uid: String, cookie: Option<NetnsCookie>) -> Result<(), OrderError> {
        let (reply, answer) = oneshot::channel();
        self.0.send(Order::Remove { uid, cookie, reply }).await.map_err(|_| OrderError::Ending)?;
        answer.await.map_err(|_| OrderError::Ending)
    }
}
