//! Handshakes under way at port 15008. Whoever can reach a pod can begin one without being anybody, and each holds a
//! descriptor and some memory until it has proved who it is or its time is up. So there are only so many, for a pod and
//! for the node. One too many takes a place of the address that has most of them, and there of the one that has taken
//! longest: who floods us displaces itself, however slow the others are.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
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
    total: usize,
    of_pod: HashMap<NetnsCookie, OfPod>,
    displaced: HashMap<u64, Arc<Notify>>,
    told: Option<Instant>,
    untold: u64,
}

/// Those with one pod.
#[derive(Default)]
struct OfPod {
    total: usize,
    /// The numbers grow, so the first is the oldest.
    of_source: HashMap<IpAddr, BTreeSet<u64>>,
}

/// Where one is counted.
#[derive(Clone, Copy)]
struct Seat {
    pod: NetnsCookie,
    source: IpAddr,
    id: u64,
}

/// Of a crowd: first by how many there are, then by who began first.
type Size = (usize, Reverse<u64>);

/// One that is under way, until dropped.
pub struct Handshake {
    of: Arc<Handshakes>,
    seat: Seat,
    displaced: Arc<Notify>,
}

impl Handshakes {
    fn lock(&self) -> MutexGuard<'_, UnderWay> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more of that client for that pod. Where there are too many one goes.
    #[must_use]
    pub fn begin(self: &Arc<Self>, pod: NetnsCookie, source: IpAddr) -> Handshake {
        let displaced = Arc::new(Notify::new());
        let mut under_way = self.lock();
        let seat = Seat { pod, source, id: under_way.next };
        under_way.next += 1;
        under_way.total += 1;
        under_way.displaced.insert(seat.id, displaced.clone());
        let own = under_way.of_pod.entry(pod).or_default();
        own.total += 1;
        own.of_source.entry(source).or_default().insert(seat.id);
        let victim = if own.total > PER_POD {
            own.crowded().map(|(_, (source, id))| Seat { pod, source, id })
        } else if under_way.total > PER_NODE {
            let crowds = under_way.of_pod.iter().filter_map(|(pod, own)| Some((*pod, own.crowded()?)));
            crowds.max_by_key(|(_, (size, _))| *size).map(|(pod, (_, (source, id)))| Seat { pod, source, id })
        } else {
            None
        };
        if let Some(victim) = victim {
            under_way.displace(victim);
        }
        Handshake { of: self.clone(), seat, displaced }
    }
}

impl OfPod {
    /// The oldest of the source that has most, and how many those are; of several such the one that begins first.
    fn crowded(&self) -> Option<(Size, (IpAddr, u64))> {
        let of = |(source, ids): (&IpAddr, &BTreeSet<u64>)| {
            let oldest = *ids.first()?;
            Some(((ids.len(), Reverse(oldest)), (*source, oldest)))
        };
        self.of_source.iter().filter_map(of).max_by_key(|(size, _)| *size)
    }
}

impl UnderWay {
    fn take(&mut self, seat: Seat) -> Option<Arc<Notify>> {
        let displaced = self.displaced.remove(&seat.id)?;
        self.total -= 1;
        if let Some(own) = self.of_pod.get_mut(&seat.pod) {
            own.total -= 1;
            if let Some(ids) = own.of_source.get_mut(&seat.source) {
                ids.remove(&seat.id);
                if ids.is_empty() {
                    own.of_source.remove(&seat.source);
                }
            }
            if own.total == 0 {
                self.of_pod.remove(&seat.pod);
            }
        }
        Some(displaced)
    }

    fn displace(&mut self, seat: Seat) {
        let Some(displaced) = self.take(seat) else { return };
        displaced.notify_one();
        access::count_refused(Direction::Inbound, ResponseFlag::Overload);
        self.untold += 1;
        if self.told.is_none_or(|told| told.elapsed() >= TELL_EVERY) {
            let displaced = std::mem::take(&mut self.untold);
            let most = seat.source;
            tracing::warn!(displaced, %most, "more handshakes than there may be at once: the oldest made room");
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
        self.of.lock().take(self.seat);
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use futures_util::FutureExt;

    use super::*;

    fn is_displaced(handshake: &Handshake) -> bool {
        handshake.displaced().now_or_never().is_some()
    }

    const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
    const FOE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2));

    #[test]
    fn who_has_most_at_a_pod_makes_room_and_the_others_keep_theirs() {
        let handshakes = Arc::<Handshakes>::default();
        let [flooded, other] = [NetnsCookie(1), NetnsCookie(2)];
        let bystanders = [handshakes.begin(other, FOE), handshakes.begin(flooded, CLIENT)];
        let flood: Vec<_> = (0..=PER_POD).map(|_| handshakes.begin(flooded, FOE)).collect();
        let gone: Vec<_> = flood.iter().map(is_displaced).collect();
        assert_eq!(gone, [vec![true; 2], vec![false; PER_POD - 1]].concat());
        assert!(!bystanders.iter().any(is_displaced));
        drop(flood);
        drop(bystanders);
        let left = handshakes.lock();
        assert!(left.total == 0 && left.of_pod.is_empty() && left.displaced.is_empty());
    }

    #[test]
    fn of_as_many_sources_as_handshakes_the_oldest_makes_room() {
        let handshakes = Arc::<Handshakes>::default();
        let source = |n| IpAddr::from(Ipv4Addr::from_bits(0x0a00_0000 + n));
        let all: Vec<_> = (0..=PER_POD as u32).map(|n| handshakes.begin(NetnsCookie(1), source(n))).collect();
        let (first, rest) = all.split_first().expect("there are some");
        assert!(is_displaced(first) && !rest.iter().any(is_displaced));
    }

    #[test]
    fn who_has_most_on_the_node_makes_room() {
        let handshakes = Arc::<Handshakes>::default();
        let pods = (PER_NODE / PER_POD) as u64;
        let bystander = handshakes.begin(NetnsCookie(pods), CLIENT);
        let all: Vec<_> = (1..PER_NODE as u64).map(|n| handshakes.begin(NetnsCookie(n % pods), FOE)).collect();
        let stranger = handshakes.begin(NetnsCookie(pods + 1), CLIENT);
        // Its pod has as many as the others but one, and begins first.
        assert!(is_displaced(&all[0]) && !all[1..].iter().any(is_displaced));
        assert!(!is_displaced(&bystander) && !is_displaced(&stranger));
    }
}
