//! What peers in other networks say of themselves, as far as it may become labels.
//!
//! Nobody here can check it, each word of it makes time series that stay for the life of the process, and a peer may say
//! something else each time. So only so many different tellings are taken; who comes later is `unknown`.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use mesh::hbone::Baggage;

/// Different ones.
const MOST: usize = 1000;

/// The tellings that were taken.
#[derive(Default)]
pub struct Hearsay(Mutex<HashSet<Baggage>>);

impl Hearsay {
    /// `said`, unless too much else has been said already; that is counted.
    #[must_use]
    pub fn admit(&self, said: Baggage) -> Option<Baggage> {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.contains(&said) {
            return Some(said);
        }
        if taken.len() >= MOST {
            metrics::counter!("ztunnel_baggage_dropped_total").increment(1);
            return None;
        }
        taken.insert(said.clone());
        Some(said)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tellings_are_bounded_and_those_that_were_taken_stay() {
        let hearsay = Hearsay::default();
        let said = |n: usize| Baggage { workload: Some(format!("w{n}").into()), ..Baggage::default() };
        for n in 0..MOST {
            assert_eq!(hearsay.admit(said(n)), Some(said(n)));
        }
        assert_eq!(hearsay.admit(said(MOST)), None);
        assert_eq!(hearsay.admit(said(7)), Some(said(7)));
    }
}
