//! Weighted choice by a low-discrepancy sequence.
//!
//! Drawing at random leaves a 90/10 split several points off over a few hundred requests, which is what a canary's
//! owner looks at. The golden-ratio sequence spreads any number of consecutive picks evenly over the unit interval, so
//! every share is met to within a request or two at all times, without a lock and without coordination.

use std::sync::atomic::{AtomicU64, Ordering};

/// 2^64 divided by the golden ratio: the additive recurrence with the lowest discrepancy.
const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

/// Items with weights, picked in proportion.
#[derive(Debug)]
pub struct Split<T> {
    /// Items of weight above 0 with the running sum of weights up to and including theirs.
    items: Vec<(u64, T)>,
    total: u64,
    position: AtomicU64,
}

impl<T> Split<T> {
    pub fn new(items: impl IntoIterator<Item = (u32, T)>) -> Self {
        let mut total = 0;
        let items = items
            .into_iter()
            .filter(|(weight, _)| *weight > 0)
            .map(|(weight, item)| {
                total += u64::from(weight);
                (total, item)
            })
            .collect();
        Self { items, total, position: AtomicU64::new(0) }
    }

    /// The next item, or `None` when all weights are 0.
    pub fn pick(&self) -> Option<&T> {
        if let [(_, only)] = self.items.as_slice() {
            return Some(only);
        }
        let n = self.position.fetch_add(1, Ordering::Relaxed);
        let point = scale(n.wrapping_mul(STEP), self.total);
        self.items.iter().find(|(upto, _)| point < *upto).map(|(_, item)| item)
    }

    pub fn items(&self) -> impl Iterator<Item = &T> {
        self.items.iter().map(|(_, item)| item)
    }
}

/// Maps a 64-bit fraction of 1 to `0..total`.
fn scale(fraction: u64, total: u64) -> u64 {
    let wide = u128::from(fraction) * u128::from(total);
    u64::try_from(wide >> 64).expect("a fraction of a u64 fits a u64")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(weights: &[u32], picks: usize) -> Vec<usize> {
        let split = Split::new(weights.iter().copied().enumerate().map(|(i, w)| (w, i)));
        let mut seen = vec![0; weights.len()];
        for _ in 0..picks {
            seen[*split.pick().expect("some weight")] += 1;
        }
        seen
    }

    #[test]
    fn every_prefix_of_the_sequence_keeps_the_split() {
        let split = Split::new([(90, 0), (10, 1)]);
        let mut canary = 0.0;
        for n in 1..=2000 {
            canary += if *split.pick().expect("weights") == 1 { 1.0 } else { 0.0 };
            let want = f64::from(n) * 0.1;
            assert!((canary - want).abs() <= 2.0_f64.max(want * 0.05), "after {n}: {canary} for {want}");
        }
    }

    #[test]
    fn five_hundred_requests_are_within_one_point() {
        let seen = shares(&[90, 10], 500);
        assert!((445..=455).contains(&seen[0]), "{seen:?}");
        let seen = shares(&[70, 30, 0], 500);
        assert!((345..=355).contains(&seen[0]) && seen[2] == 0, "{seen:?}");
    }

    #[test]
    fn zero_weights_are_never_picked() {
        assert!(Split::<u8>::new([(0, 1)]).pick().is_none());
        assert!(Split::<u8>::new([]).pick().is_none());
        assert_eq!(shares(&[0, 1, 0], 10), [0, 10, 0]);
    }
}
