//! The manager's second way in: orders of those who hand namespaces over.

use std::net::IpAddr;

use ebpf_loader::NetnsCookie;
use tokio::sync::oneshot;

use super::{Entry, Manager, State};
use crate::node::EnrolError;
use crate::node::netns::Netns;
use crate::node::orders::{HandedOver, Order};
use crate::node::pod::LocalPod;

/// A namespace that was handed over, kept to enrol the pod again where that becomes necessary.
pub(super) struct Handed {
    pub(super) netns: Netns,
    cookie: NetnsCookie,
    pub(super) addresses: Vec<IpAddr>,
    /// Until the order has been carried out.
    reply: Option<oneshot::Sender<Result<(), String>>>,
}

impl Manager {
    /// Takes an order and those that wait behind it. What is to be enrolled is enrolled by the loop, together.
    pub(super) async fn obey(&mut self, order: Order) {
        let mut next = Some(order);
        while let Some(order) = next {
            match order {
                // Who gave up waiting has told the runtime that there is no network.
                Order::Add { reply, .. } if reply.is_closed() => {}
                Order::Add { pod, reply } => self.add(*pod, reply).await,
                Order::Remove { uid, cookie, reply } => {
                    self.remove(&uid, cookie).await;
                    // Nobody needs to be there to hear it.
                    let _ = reply.send(());
                }
            }
            next = self.deps.orders.try_recv().ok();
        }
    }

    async fn add(&mut self, pod: HandedOver, reply: oneshot::Sender<Result<(), String>>) {
        let HandedOver { enrolment, netns, cookie } = pod;
        let uid = enrolment.uid.clone();
        let owner = self.entries.iter().find(|(other, entry)| **other != uid && entry.cookie() == Some(cookie));
        if let Some((other, _)) = owner {
            // As above.
            let _ = reply.send(Err(EnrolError::Taken(other.clone()).to_string()));
            return;
        }
        let handed = Handed { netns, cookie, addresses: enrolment.addresses.clone(), reply: Some(reply) };
        let Some(entry) = self.entries.get_mut(&uid) else {
            let state = State::Waiting(EnrolError::NoProcess);
            self.entries.insert(uid, Entry { wanted: enrolment, state, named: false, handed: Some(handed) });
            return;
        };
        entry.handed = Some(handed);
        // The control plane's word about a pod is newer than what the order was made of.
        let wanted = if entry.named { entry.wanted.clone() } else { enrolment };
        let moved = matches!(&entry.state, State::Up(up) if up.pod.cookie != cookie);
        let old = moved.then(|| std::mem::replace(&mut entry.state, State::Waiting(EnrolError::NoProcess)));
        self.want(&uid, wanted).await;
        if let Some(State::Up(up)) = old {
            tracing::info!(pod = %up.pod.name, namespace = %up.pod.namespace, "the pod has got a new namespace");
            self.leave(up).await;
        }
    }

    async fn remove(&mut self, uid: &str, cookie: Option<NetnsCookie>) {
        let Some(entry) = self.entries.get_mut(uid) else { return };
        if cookie.is_some_and(|cookie| entry.cookie() != Some(cookie)) {
            return;
        }
        entry.handed = None;
        let old = std::mem::replace(&mut entry.state, State::Waiting(EnrolError::NoProcess));
        if !entry.named {
            self.entries.remove(uid);
        }
        if let State::Up(up) = old {
            self.leave(up).await;
        }
    }

    /// Tells those who ordered what became of it. An order that failed, or for which nobody waits any more, leaves
    /// nothing behind.
    pub(super) async fn answer(&mut self) {
        let mut undone = Vec::new();
        for (uid, entry) in &mut self.entries {
            let Some(reply) = entry.handed.as_mut().and_then(|handed| handed.reply.take()) else { continue };
            let done = match &entry.state {
                State::Up(_) => reply.send(Ok(())).is_ok(),
                State::Waiting(error) => {
                    // As above.
                    let _ = reply.send(Err(error.to_string()));
                    false
                }
            };
            if !done {
                undone.push(uid.clone());
            }
        }
        for uid in undone {
            self.remove(&uid, None).await;
        }
    }

    /// Takes back an enrolment that failed half way, so that nothing in the namespace points to us.
    pub(super) async fn undo(&self, pod: &LocalPod) {
        let (name, namespace) = (&pod.name, &pod.namespace);
        if let Err(error) = self.deps.capture.detach(pod.cookie) {
            tracing::warn!(pod = %name, %namespace, %error, "undoing a pod's capture");
        }
        if let Err(error) = self.keeper.unroute(pod).await {
            tracing::debug!(pod = %name, %namespace, %error, "undoing a pod's routing");
        }
    }
}

impl Entry {
    /// The namespace it is in, or is to be enrolled in.
    fn cookie(&self) -> Option<NetnsCookie> {
        match (&self.state, &self.handed) {
            (State::Up(up), _) => Some(up.pod.cookie),
            (State::Waiting(_), handed) => handed.as_ref().map(|handed| handed.cookie),
        }
    }
}
