//! When each change was written, and after how long each proxy has heard of it. Written by one and heard by thousands of tasks, so it
//! is made of counters without a lock; what is asked of it comes after.

use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

/// What became of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    Came,
    Gone,
}

/// One of the stretches of time that are looked at by themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Period(usize);

pub struct Ledger {
    began: Instant,
    /// By serial number of the pod.
    pods: Box<[[Told; 2]]>,
    periods: Box<[Histogram]>,
    current: AtomicUsize,
}

/// One change.
#[derive(Default)]
struct Told {
    /// Microseconds since the beginning, and one; 0 while there was no such change.
    written: AtomicU64,
    period: AtomicUsize,
    /// By how many proxies.
    heard: AtomicU32,
    /// Microseconds that the last of them had to wait.
    slowest: AtomicU64,
}

/// What happened in a period. Times are in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Summary {
    /// Pods that were replaced by others: a pod that went and one that came, each.
    pub changes: usize,
    /// Changes times proxies.
    pub deliveries: u64,
    pub p50: f64,
    pub p99: f64,
    /// Until the last of the proxies had heard, over changes.
    pub converge_p99: f64,
}

impl Ledger {
    /// For serial numbers below `serials` and as many periods.
    pub fn new(serials: usize, periods: usize) -> Self {
        Self {
            began: Instant::now(),
            pods: (0..serials).map(|_| <[Told; 2]>::default()).collect(),
            periods: (0..periods + 1).map(|_| Histogram::default()).collect(),
            current: AtomicUsize::new(0),
        }
    }

    /// What is written from here on is of another period.
    pub fn begin(&self) -> Period {
        let next = (self.current.load(Ordering::Relaxed) + 1).min(self.periods.len() - 1);
        self.current.store(next, Ordering::Relaxed);
        Period(next)
    }

    /// A change is told to the control plane now.
    pub fn write(&self, serial: u32, news: News) {
        let Some(told) = self.told(serial, news) else { return };
        told.period.store(self.current.load(Ordering::Relaxed), Ordering::Relaxed);
        // After the period, which whoever sees this reads.
        told.written.store(self.now() + 1, Ordering::Release);
    }

    /// A proxy hears of it now. What was never written was there from the beginning, and is no news.
    pub fn hear(&self, serial: u32, news: News) {
        let Some(told) = self.told(serial, news) else { return };
        let Some(written) = told.written.load(Ordering::Acquire).checked_sub(1) else { return };
        let waited = self.now().saturating_sub(written);
        if let Some(period) = self.periods.get(told.period.load(Ordering::Relaxed)) {
            period.add(waited);
        }
        told.slowest.fetch_max(waited, Ordering::Relaxed);
        told.heard.fetch_add(1, Ordering::Release);
    }

    /// How many changes of a period fewer than so many proxies have heard of.
    pub fn unheard(&self, period: Period, proxies: u32) -> usize {
        self.of(period).filter(|told| told.heard.load(Ordering::Acquire) < proxies).count()
    }

    pub fn summary(&self, period: Period) -> Summary {
        let mut slowest: Vec<u64> = self.of(period).map(|told| told.slowest.load(Ordering::Relaxed)).collect();
        slowest.sort_unstable();
        let last = (slowest.len() * 99).div_ceil(100).max(1) - 1;
        let milliseconds = |micros: u64| micros as f64 / 1000.0;
        let waited = &self.periods[period.0];
        Summary {
            changes: slowest.len().div_ceil(2),
            deliveries: waited.count(),
            p50: milliseconds(waited.quantile(0.5)),
            p99: milliseconds(waited.quantile(0.99)),
            converge_p99: milliseconds(slowest.get(last).copied().unwrap_or_default()),
        }
    }

    fn of(&self, period: Period) -> impl Iterator<Item = &Told> {
        self.pods.iter().flatten().filter(move |told| {
            told.written.load(Ordering::Acquire) > 0 && told.period.load(Ordering::Relaxed) == period.0
        })
    }

    fn told(&self, serial: u32, news: News) -> Option<&Told> {
        let [came, gone] = self.pods.get(serial as usize)?;
        Some(match news {
            News::Came => came,
            News::Gone => gone,
        })
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX - 1)
    }
}

/// Buckets to each doubling: what is read is within a hundredth of what was written.
const FINE: u64 = 64;
/// Doublings above [`FINE`]: to a day and more.
const OCTAVES: usize = 32;

/// How often which value was counted.
struct Histogram(Box<[AtomicU64]>);

impl Default for Histogram {
    fn default() -> Self {
        Self((0..(OCTAVES + 1) * FINE as usize).map(|_| AtomicU64::new(0)).collect())
    }
}

impl Histogram {
    fn add(&self, value: u64) {
        let at = bucket(value).min(self.0.len() - 1);
        self.0[at].fetch_add(1, Ordering::Relaxed);
    }

    fn count(&self) -> u64 {
        self.0.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }

    /// The value that this part of all is not above; 0 of nothing.
    fn quantile(&self, part: f64) -> u64 {
        let rank = (self.count() as f64 * part).ceil() as u64;
        let mut below = 0;
        for (at, count) in self.0.iter().enumerate() {
            below += count.load(Ordering::Relaxed);
            if below >= rank && below > 0 {
                return middle(at);
            }
        }
        0
    }
}

fn bucket(value: u64) -> usize {
    let doublings = value.checked_ilog2().unwrap_or(0).saturating_sub(FINE.ilog2());
    usize::try_from(u64::from(doublings) * FINE + (value >> doublings)).unwrap_or(usize::MAX)
}

fn middle(bucket: usize) -> u64 {
    let doublings = (bucket as u64 / FINE).saturating_sub(1);
    let lowest = (bucket as u64 - doublings * FINE) << doublings;
    lowest + ((1 << doublings) >> 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_read_as_it_was_counted_but_for_a_hundredth() {
        for value in (0..200).chain([1_000, 12_345, 999_999, 123_456_789, 40_000_000_000]) {
            let read = middle(bucket(value));
            assert!(read.abs_diff(value) * 100 <= value, "{value} is read as {read}");
        }
        let histogram = Histogram::default();
        assert_eq!(histogram.quantile(0.5), 0, "of nothing");
        (1..=100).for_each(|value| histogram.add(value));
        assert_eq!([0.5, 0.99, 1.0].map(|part| histogram.quantile(part)), [50, 99, 100]);
        histogram.add(u64::MAX);
        assert_eq!(histogram.count(), 101, "what is too large is counted as large");
    }

    #[test]
    fn a_change_is_over_when_every_proxy_has_heard_of_it() {
        let ledger = Ledger::new(10, 2);
        ledger.hear(3, News::Came);
        let period = ledger.begin();
        ledger.write(3, News::Came);
        ledger.write(2, News::Gone);
        assert_eq!(ledger.unheard(period, 1), 2, "what was heard before it was written is no news");
        ledger.hear(3, News::Came);
        ledger.hear(3, News::Gone);
        ledger.hear(2, News::Gone);
        ledger.hear(99, News::Gone);
        assert_eq!((ledger.unheard(period, 1), ledger.unheard(period, 2)), (0, 2));
        let summary = ledger.summary(period);
        assert_eq!((summary.changes, summary.deliveries), (1, 2));
        assert!(summary.converge_p99 < 10_000.0, "{summary:?}");
        let next = ledger.begin();
        assert_eq!((ledger.summary(next), ledger.unheard(next, 5)), (Summary::default(), 0));
    }

    #[test]
    fn what_is_heard_late_counts_where_it_was_written() {
        let ledger = Ledger::new(10, 2);
        let first = ledger.begin();
        ledger.write(1, News::Came);
        let second = ledger.begin();
        ledger.hear(1, News::Came);
        assert_eq!((ledger.summary(first).deliveries, ledger.summary(second).deliveries), (1, 0));
    }
}
