//! Keeps enrolled pods captured: sees what was changed behind our back, and puts it back.
//!
//! ```text
//!   rules, routes, links, addresses    the kernel says so, in a netlink socket of each namespace ─┐
//!   sysctls; sk_lookup, listeners      nobody says so: looked at, for all pods, once each LOOK  ──┴─► doubt ─► repair
//!                                      (the latter at every third)
//! ```
//! One small task for each pod and no thread. What is idle costs a few system calls per pod and LOOK, without a change
//! of namespace. The first repair comes at once, since until then captured connections have lost their way; after that
//! a pod gets one each PACE at most, so that somebody who fights with us costs little. Our own changes come back as
//! news; the look that follows finds nothing to repair, which ends it.

use std::collections::{BTreeSet, HashSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use ebpf_loader::{Capture, LoadError, NetnsCookie, Slot};
use mesh::drain::DrainWatcher;
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{AsyncSocket, SocketAddr, TokioSocket};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::backend::Backend;
use super::netns::Netns;
use super::pod::LocalPod;
use super::release;
use super::routing::{self, Dns, Part};
use super::sysctl::Sysctls;
use super::tenure::Tenure;
use super::{EnrolError, Registry};

/// How often what the kernel does not tell is looked at: with many pods, most of what an idle ztunnel spends.
const LOOK: Duration = Duration::from_secs(3);
/// Every so many looks what lies outside the pod is looked at as well: it takes several times the system calls.
const WHOLE: u32 = 3;
/// The same where another ztunnel has claimed the node, and might have ended.
const LOOK_FOR_SUCCESSOR: Duration = Duration::from_millis(800);
/// Shortest time between two repairs of one pod, and while somebody fights with us.
const PACE: Duration = Duration::from_millis(100);
const PACE_IN_FIGHT: Duration = Duration::from_millis(500);
/// What could not be repaired is tried again after this.
const RETRY: Duration = Duration::from_secs(1);
/// Without any news a pod is looked at all the same.
const DISTRUST: Duration = Duration::from_secs(300);
/// So many repairs of a pod within [`CALM`] of each other are a fight, which is told once.
const FIGHT: u32 = 10;
const CALM: Duration = Duration::from_secs(10);
/// So many looks in a row that find a captured pod without listeners mean that the successor has ended.
const DESERTED: u32 = 2;
/// Messages that are thrown away in one go; who makes more of them waits.
const HANDFUL: usize = 256;

/// Bits of `RTMGRP_*`: links, addresses and routes of both families, and their rules.
const GROUPS: u32 = 1 | 0x10 | 0x100 | 0x40 | 0x400 | 0x80 | (1 << (19 - 1));

/// What is needed to put a pod's capture back, kept with the pod.
#[derive(Debug, Default)]
pub struct Kept {
    /// One listener of each slot, for a slot that was emptied. Closed with the drain.
    listeners: Mutex<Vec<(Slot, OwnedFd)>>,
    sysctls: OnceLock<Sysctls>,
    /// Held while rules and routes are changed, so that nobody repairs half of a change of ours.
    routing: tokio::sync::Mutex<()>,
    doubt: Notify,
}

impl Kept {
    /// Remembers a listener that is in the kernel's map.
    pub fn add_listener(&self, slot: Slot, listener: OwnedFd) {
        self.listeners().push((slot, listener));
    }

    /// Nobody will accept any more: a listener that stays open would let connections wait for ever.
    pub fn close_listeners(&self) {
        self.listeners().clear();
    }

    fn slots(&self) -> impl Iterator<Item = Slot> + use<> {
        self.listeners().iter().map(|(slot, _)| *slot).collect::<Vec<_>>().into_iter()
    }

    fn listeners(&self) -> std::sync::MutexGuard<'_, Vec<(Slot, OwnedFd)>> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The task that keeps one pod; ends when dropped.
#[derive(Debug)]
pub struct Keeping(JoinHandle<()>);

impl Drop for Keeping {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Puts things in place and back.
pub struct Keeper {
    capture: Arc<Capture>,
    proc_root: PathBuf,
    tenure: Arc<Tenure>,
}

impl Keeper {
    #[must_use]
    pub const fn new(capture: Arc<Capture>, proc_root: PathBuf, tenure: Arc<Tenure>) -> Self {
        Self { capture, proc_root, tenure }
    }

    /// Makes the pod's marked packets go to lo, for the first time or after its addresses or options have changed.
    ///
    /// # Errors
    /// The step that was refused.
    pub async fn route(&self, pod: &LocalPod) -> Result<BTreeSet<Part>, EnrolError> {
        let _alone = pod.kept.routing.lock().await;
        let sysctls = self.sysctls(pod)?;
        let dns = if pod.dns.is_captured() { Dns::Captured } else { Dns::Direct };
        Ok(routing::ensure(&pod.netns, sysctls, &pod.addresses(), dns).await?)
    }

    /// Takes back what [`Self::route`] did; sysctls become what they were before the first ztunnel came.
    ///
    /// # Errors
    /// The step that was refused.
    pub async fn unroute(&self, pod: &LocalPod) -> Result<(), EnrolError> {
        let _alone = pod.kept.routing.lock().await;
        release::take_back(&self.capture, &pod.netns, pod.cookie, self.sysctls(pod)?).await
    }

    /// [`Self::unroute`] for a namespace that a predecessor routed.
    ///
    /// # Errors
    /// The step that was refused.
    pub async fn unroute_namespace(&self, netns: &Netns, cookie: NetnsCookie) -> Result<(), EnrolError> {
        release::take_back(&self.capture, netns, cookie, &Sysctls::open(netns, &self.proc_root)?).await
    }

    fn sysctls<'a>(&self, pod: &'a LocalPod) -> Result<&'a Sysctls, EnrolError> {
        if let Some(sysctls) = pod.kept.sysctls.get() {
            return Ok(sysctls);
        }
        let sysctls = Sysctls::open(&pod.netns, &self.proc_root)?;
        self.capture.remember(pod.cookie, sysctls.found()?)?;
        Ok(pod.kept.sysctls.get_or_init(|| sysctls))
    }

    /// Begins to keep a pod that is enrolled. Ends with what is returned.
    pub fn keep(self: &Arc<Self>, pod: &Arc<LocalPod>) -> Keeping {
        let (this, pod) = (self.clone(), pod.clone());
        // Ended by the drop of `Keeping`.
        Keeping(tokio::spawn(async move { this.run(&pod).await }))
    }

    async fn run(&self, pod: &LocalPod) {
        let (name, namespace) = (&pod.name, &pod.namespace);
        let news = match News::open(&pod.netns) {
            Ok(news) => Some(news),
            Err(error) => {
                tracing::warn!(pod = %name, %namespace, %error, "changes of a pod's routing will not be seen");
                None
            }
        };
        let mut fight = Fight::default();
        let mut failing = false;
        // What happened before we listened.
        pod.kept.doubt.notify_one();
        loop {
            tokio::select! {
                () = News::next(news.as_ref()) => {}
                () = pod.kept.doubt.notified() => {}
                () = tokio::time::sleep(if failing { RETRY } else { DISTRUST }) => {}
            }
            // Whatever comes from now on is seen by the next turn.
            if let Some(news) = &news {
                news.drain();
            }
            // Two that repair would fight with each other; [`Keeper::look`] sees when there is only one again.
            if self.tenure.is_lost() {
                tokio::time::sleep(PACE_IN_FIGHT).await;
                continue;
            }
            match self.repair(pod).await {
                Ok(parts) if parts.is_empty() => failing = false,
                Ok(parts) => {
                    failing = false;
                    for part in &parts {
                        metrics::counter!("ztunnel_capture_repairs_total", "what" => part.as_str()).increment(1);
                    }
                    let parts: Vec<_> = parts.iter().map(|part| part.as_str()).collect();
                    match fight.repaired(Instant::now()) {
                        Told::Repair => tracing::info!(pod = %name, %namespace, ?parts, "repaired a pod's capture"),
                        Told::Fight => {
                            tracing::warn!(pod = %name, %namespace, ?parts, "something undoes the pod's capture again and again");
                        }
                        Told::Nothing => {}
                    }
                }
                Err(error) => {
                    if !std::mem::replace(&mut failing, true) {
                        tracing::warn!(pod = %name, %namespace, %error, "repairing a pod's capture");
                    }
                }
            }
            tokio::time::sleep(if fight.is_on() { PACE_IN_FIGHT } else { PACE }).await;
        }
    }

    async fn repair(&self, pod: &LocalPod) -> Result<BTreeSet<Part>, EnrolError> {
        let mut parts = self.route(pod).await?;
        if !self.capture.is_attached(pod.cookie)? {
            self.capture.attach_netns(pod.netns.file())?;
            parts.insert(Part::Steering);
        }
        let listening = self.capture.listening()?;
        for (slot, listener) in pod.kept.listeners().iter() {
            if !listening.contains(&(pod.cookie, *slot)) {
                self.capture.set_listener(pod.cookie, *slot, listener.as_fd())?;
                parts.insert(Part::Listener);
            }
        }
        Ok(parts)
    }

    /// Looks at what the kernel does not tell, of all pods of `registry` that are kept, until the drain begins. Where a
    /// successor has ended that had claimed the node, the node is claimed back: nobody else serves it.
    pub async fn look(self: Arc<Self>, registry: Arc<Registry>, drain: DrainWatcher) {
        let (mut deserted, mut looks) = (0, 0_u32);
        loop {
            let pause = if self.tenure.is_lost() { LOOK_FOR_SUCCESSOR } else { LOOK };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = drain.draining() => return,
            }
            let looked = if self.tenure.is_lost() {
                self.is_deserted(&registry).map(|is| {
                    deserted = if is { deserted + 1 } else { 0 };
                    if deserted >= DESERTED {
                        deserted = 0;
                        self.claim_back(&registry);
                    }
                })
            } else {
                looks = looks.wrapping_add(1);
                self.doubt(&registry, looks.is_multiple_of(WHOLE))
            };
            if let Err(error) = looked {
                tracing::warn!(%error, "reading the capture state");
            }
        }
    }

    /// Is there a pod that is captured and has no listener at all? A successor has put its own in before it claims.
    fn is_deserted(&self, registry: &Registry) -> Result<bool, LoadError> {
        let served: HashSet<_> = self.capture.listening()?.into_iter().map(|(cookie, _)| cookie).collect();
        for pod in kept(registry).into_iter().filter(|pod| !served.contains(&pod.cookie)) {
            if self.capture.is_attached(pod.cookie)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn claim_back(&self, registry: &Registry) {
        if let Err(error) = self.tenure.claim() {
            tracing::error!(%error, "the successor has ended, and the node cannot be claimed back");
            return;
        }
        tracing::warn!("the successor has ended; serving the node again");
        metrics::counter!("ztunnel_takeovers_undone_total").increment(1);
        for pod in kept(registry) {
            pod.kept.doubt.notify_one();
        }
    }

    fn doubt(&self, registry: &Registry, whole: bool) -> Result<(), LoadError> {
        let pods = kept(registry);
        let listening = if whole && !pods.is_empty() { Some(self.capture.listening()?) } else { None };
        for pod in pods {
            let is_set = pod.kept.sysctls.get().is_none_or(Sysctls::are_set);
            let is_steered = match &listening {
                Some(listening) => {
                    let mut slots = pod.kept.slots();
                    slots.all(|slot| listening.contains(&(pod.cookie, slot))) && self.capture.is_attached(pod.cookie)?
                }
                None => true,
            };
            if !(is_set && is_steered) {
                // Nobody waits for it once the pod is leaving.
                pod.kept.doubt.notify_one();
            }
        }
        Ok(())
    }
}

/// The pods that are ours to keep.
fn kept(registry: &Registry) -> Vec<Arc<LocalPod>> {
    let is_kept = |pod: &Arc<LocalPod>| pod.backend == Backend::Ebpf && !pod.superseded.load(Ordering::Relaxed);
    registry.pods().into_iter().filter(is_kept).collect()
}

/// Tells a fight from an accident.
#[derive(Default)]
struct Fight {
    repairs: u32,
    last: Option<Instant>,
}

/// What the log is told of a repair.
#[derive(Debug, PartialEq, Eq)]
enum Told {
    Repair,
    Fight,
    Nothing,
}

impl Fight {
    /// There was a repair at this moment.
    fn repaired(&mut self, now: Instant) -> Told {
        if self.last.is_none_or(|last| now - last > CALM) {
            self.repairs = 0;
        }
        self.last = Some(now);
        self.repairs = self.repairs.saturating_add(1);
        match self.repairs {
            ..FIGHT => Told::Repair,
            FIGHT => Told::Fight,
            _ => Told::Nothing,
        }
    }

    const fn is_on(&self) -> bool {
        self.repairs >= FIGHT
    }
}

/// What the kernel tells of the rules, routes, links and addresses of one namespace.
struct News(TokioSocket);

impl News {
    fn open(netns: &Netns) -> io::Result<Self> {
        let socket = netns.enter(|| {
            let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
            socket.socket_mut().bind(&SocketAddr::new(0, GROUPS))?;
            Ok(socket)
        })?;
        Ok(Self(socket))
    }

    /// Returns when there is some. Without a socket there never is.
    async fn next(news: Option<&Self>) {
        let Some(news) = news else { return std::future::pending().await };
        // What the message says does not matter, nor that the kernel had more to tell than fits (ENOBUFS).
        let _ = std::future::poll_fn(|context| news.0.poll_recv(context, &mut &mut [0_u8; 16][..])).await;
    }

    /// Throws away what has come: a look at everything follows. Too much of it is no error either.
    fn drain(&self) {
        for _ in 0..HANDFUL {
            match self.0.socket_ref().recv(&mut &mut [0_u8; 16][..], 0) {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(_) => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fight_is_told_once_and_again_after_a_calm() {
        let mut fight = Fight::default();
        let start = Instant::now();
        let mut fights = |at: u64, repairs: u32| -> usize {
            let moments = (0..repairs).map(|n| start + Duration::from_secs(at) + PACE * n);
            moments.filter(|now| fight.repaired(*now) == Told::Fight).count()
        };
        assert_eq!(fights(0, FIGHT - 1), 0, "accidents");
        assert_eq!(fights(2, 50), 1, "a fight");
        assert_eq!(fights(60, FIGHT - 1), 0, "a calm in between");
        assert_eq!(fights(62, 1), 1);
    }
}
