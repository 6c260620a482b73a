//! Talks to the agent for as long as ztunnel lives: connects, takes requests one at a time, answers each, and connects
//! again. Ready while connected, with a complete snapshot and nothing pending; pods are served whether or not.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mesh::drain::DrainWatcher;
use thiserror::Error;
use tokio::sync::watch;
use tokio::time::{Interval, MissedTickBehavior, interval};

use super::pods::{Pods, StartError};
use super::session::{Consequence, LONGEST, Order, Packet, Session, Violation, ack};
use super::socket::{AgentSocket, Received};

/// First pause before connecting again; doubles up to [`LONGEST_PAUSE`] until a snapshot has been taken.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// How often pods that could not be started are tried again.
const RETRY: Duration = Duration::from_secs(5);

/// Why a connection ended.
#[derive(Debug, Error)]
enum Ended {
    #[error("connecting: {0}")]
    Connect(#[source] io::Error),
    #[error("the agent closed the connection")]
    Closed,
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("the agent broke the protocol: {0}")]
    Violation(#[from] Violation),
}

/// The client side of the protocol.
pub struct Agent {
    path: PathBuf,
    pods: Pods,
    ready: watch::Sender<bool>,
    retry: Interval,
    /// Begins when no pod is taken any more; those that are there may still be deleted.
    ending: DrainWatcher,
}

impl Agent {
    /// For the agent that listens at `path`; the receiver says whether we are ready. Must be called inside a runtime.
    #[must_use]
    pub fn new(path: &Path, pods: Pods, ending: DrainWatcher) -> (Self, watch::Receiver<bool>) {
        let (ready, seen) = watch::channel(false);
        let mut retry = interval(RETRY);
        retry.set_missed_tick_behavior(MissedTickBehavior::Delay);
        (Self { path: path.to_owned(), pods, ready, retry, ending }, seen)
    }

    /// Runs until dropped. While ztunnel ends it goes on, as pods may go before it does, but does not connect anew: the
    /// newest connection is the one that gets new pods.
    pub async fn run(mut self) {
        let mut pause = FIRST_PAUSE;
        let mut told = None;
        while !self.ending.is_draining() {
            let mut session = Session::default();
            let ended = self.serve(&mut session).await;
            self.ready.send_replace(false);
            if session.is_synced() {
                pause = FIRST_PAUSE;
                told = None;
            }
            // Told once: an agent that is being replaced may be away for a while.
            let text = ended.to_string();
            if told.as_ref() != Some(&text) {
                tracing::warn!(agent = %self.path.display(), "{text}; pods that are served go on, connecting again");
                told = Some(text);
            }
            if let Ended::Violation(violation) = ended
                && violation.consequence() == Consequence::StopAll
            {
                tracing::error!("which pods exist is not known any more; stopping all until the agent has told anew");
                self.pods.reconcile(&std::collections::BTreeSet::new());
            }
            self.wait(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn wait(&mut self, pause: Duration) {
        let over = tokio::time::sleep(pause);
        tokio::pin!(over);
        loop {
            tokio::select! {
                () = &mut over => return,
                () = self.ending.draining() => return,
                _ = self.retry.tick() => self.pods.retry().await,
            }
        }
    }

    /// One connection.
    async fn serve(&mut self, session: &mut Session) -> Ended {
        let socket = match AgentSocket::connect(&self.path) {
            Ok(socket) => socket,
            Err(error) => return Ended::Connect(error),
        };
        let Err(ended) = self.converse(&socket, session).await;
        if let Ended::Violation(violation) = &ended {
            // The agent may be gone already.
            let _ = socket.send(&ack(&violation.to_string())).await;
        }
        ended
    }

    async fn converse(
        &mut self,
        socket: &AgentSocket,
        session: &mut Session,
    ) -> Result<std::convert::Infallible, Ended> {
        socket.send(&Session::hello()).await?;
        tracing::info!(agent = %self.path.display(), "connected");
        let mut buffer = [0; LONGEST];
        loop {
            let received = tokio::select! {
                received = socket.receive(&mut buffer) => received?,
                _ = self.retry.tick() => {
                    self.pods.retry().await;
                    self.show(session);
                    continue;
                }
            };
            let Received { length, files, lost } = received;
            if length == 0 && files.is_empty() {
                return Err(Ended::Closed);
            }
            let order = session.handle_packet(Packet { bytes: &buffer[..length], files, lost })?;
            let done = self.carry_out(order).await;
            self.show(session);
            socket.send(&ack(&done.err().map(|error| error.to_string()).unwrap_or_default())).await?;
        }
    }

    async fn carry_out(&mut self, order: Order<std::os::fd::OwnedFd>) -> Result<(), StartError> {
        match order {
            Order::Start(..) if self.ending.is_draining() => return Err(StartError::Ending),
            Order::Start(info, netns) => self.pods.start(info, netns).await?,
            Order::Keep(uid) if self.pods.knows(&uid) => {}
            Order::Keep(uid) => {
                tracing::warn!(%uid, "the agent keeps a pod that it has not told us of: it is not served");
            }
            Order::Stop(uid) => self.pods.stop(&uid),
            Order::Reconcile(keep) => {
                tracing::info!(pods = keep.len(), "snapshot complete");
                self.pods.reconcile(&keep);
            }
        }
        Ok(())
    }

    fn show(&self, session: &Session) {
        self.ready.send_replace(session.is_synced() && !self.pods.has_pending());
    }
}
