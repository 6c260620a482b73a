//! Handshakes under way at port 15008. Whoever can reach a pod can begin one without being anybody, and each holds a
//! descriptor and some memory until it has proved who it is or its time is up. So there are only so many, for a pod and
//! for the node; one too many takes the place of the one that has taken longest. A client that means it needs
//! milliseconds and is not among those.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ebpf_loader::NetnsCookie;
use mesh::telemetry::ResponseFlag;
use mesh::telemetry::access::{self, Direction};
use tokio::sync::Notify;
use tokio::time::Instant;

/// At once for one pod: what a hundred clients' pools may begin together after a restart.
const PER_POD: usize = 512;
/// At once for all pods of the node.
const PER_NODE: usize = 4096;
/// Between two lines in the log: whoever floods us shall not flood the log.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// Those of one node.
#[derive(Default)]
pub struct Handshakes(Mutex<UnderWay>);

#[derive(Default)]
struct UnderWay {
    next: u64,
    /// The numbers grow, so the first is the oldest.
    all: BTreeMap<u64, (NetnsCookie, Arc<Notify>)>,
    of_pod: HashMap<NetnsCookie, BTreeSet<u64>>,
    told: Option<Instant>,
    untold: u64,
}

/// One that is under way, until dropped.
pub struct Handshake {
    of: Arc<Handshakes>,
    id: u64,
    displaced: Arc<Notify>,
}

impl Handshakes {
    fn lock(&self) -> MutexGuard<'_, UnderWay> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more for that pod. Where there are too many the oldest goes.
    #[must_use]
    pub fn begin(self: &Arc<Self>, pod: NetnsCookie) -> Handshake {
        let displaced = Arc::new(Notify::new());
        let mut under_way = self.lock();
        let id = under_way.next;
        under_way.next += 1;
        under_way.all.insert(id, (pod, displaced.clone()));
        let own = under_way.of_pod.entry(pod).or_default();
        own.insert(id);
        let oldest = if own.len() > PER_POD {
            own.first().copied()
        } else if under_way.all.len() > PER_NODE {
            under_way.all.first_key_value().map(|(id, _)| *id)
        } else {
            None
        };
        if let Some(oldest) = oldest {
            under_way.displace(oldest);
        }
        Handshake { of: self.clone(), id, displaced }
    }
}

impl UnderWay {
    fn take(&mut self, id: u64) -> Option<Arc<Notify>> {
        let (pod, displaced) = self.all.remove(&id)?;
        if let Some(own) = self.of_pod.get_mut(&pod) {
            own.remove(&id);
            if own.is_empty() {
                self.of_pod.remove(&pod);
            }
        }
        Some(displaced)
    }

    fn displace(&mut self, id: u64) {
        let Some(displaced) = self.take(id) else { return };
        displaced.notify_one();
        access::count_refused(Direction::Inbound, ResponseFlag::Overload);
        self.untold += 1;
        if self.told.is_none_or(|told| told.elapsed() >= TELL_EVERY) {
            let displaced = std::mem::take(&mut self.untold);
            tracing::warn!(displaced, "more handshakes than there may be at once: the oldest made room");
            self.told = Some(Instant::now());
        }
    }
}

impl Handshake {
    /// Resolves once another one has taken its place.
    pub async fn displaced(&self) {
        self.displaced.notified().await;
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        self.of.lock().take(self.id);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn is_displaced(handshake: &Handshake) -> bool {
        handshake.displaced().now_or_never().is_some()
    }

    #[test]
    fn the_oldest_of_a_pod_makes_room_and_other_pods_keep_theirs() {
        let handshakes = Arc::<Handshakes>::default();
        let [flooded, other] = [NetnsCookie(1), NetnsCookie(2)];
        let bystander = handshakes.begin(other);
        let flood: Vec<_> = (0..PER_POD + 2).map(|_| handshakes.begin(flooded)).collect();
        let gone: Vec<_> = flood.iter().map(is_displaced).collect();
        assert_eq!(gone, [vec![true; 2], vec![false; PER_POD]].concat());
        assert!(!is_displaced(&bystander));
        drop(flood);
        drop(bystander);
        assert!(handshakes.lock().all.is_empty() && handshakes.lock().of_pod.is_empty());
    }

    #[test]
    fn the_oldest_of_the_node_makes_room() {
        let handshakes = Arc::<Handshakes>::default();
        let pods = (PER_NODE / PER_POD) as u64;
        let all: Vec<_> = (0..=PER_NODE as u64).map(|n| handshakes.begin(NetnsCookie(n % pods))).collect();
        let (first, rest) = all.split_first().expect("there are some");
        // One more than its pod may have, which is also one more than the node.
        assert!(is_displaced(first) && !rest.iter().any(is_displaced));
        let stranger = handshakes.begin(NetnsCookie(pods));
        assert!(is_displaced(&rest[0]) && !is_displaced(&stranger));
    }
}
