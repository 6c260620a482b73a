//! What is known of names, and what is being asked. Bounded; time is passed in.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::watch;
use tokio::time::Instant;

use super::Outcome;

/// Names at most: far above what the ServiceEntries of a mesh name.
const CAPACITY: usize = 4096;

type Pending = watch::Receiver<Option<Outcome>>;

#[derive(Debug, Default)]
pub struct Cache {
    names: HashMap<Arc<str>, Slot>,
}

#[derive(Debug)]
enum Slot {
    /// Asked; the outcome goes to everybody who waits.
    Asked(watch::Sender<Option<Outcome>>),
    Known(Outcome, Instant),
}

/// What a look into the cache comes to.
#[derive(Debug)]
pub enum Known {
    Outcome(Outcome),
    /// Somebody asks already.
    Pending(Pending),
    /// The caller is to ask, and to [`Cache::put`] what comes of it, always.
    Nothing(Pending),
}

impl Cache {
    pub fn get(&mut self, name: &Arc<str>, now: Instant) -> Known {
        match self.names.get(name) {
            Some(Slot::Known(outcome, until)) if *until > now => return Known::Outcome(outcome.clone()),
            Some(Slot::Asked(outcome)) => return Known::Pending(outcome.subscribe()),
            Some(Slot::Known(..)) | None => {}
        }
        self.make_room(now);
        let (outcome, pending) = watch::channel(None);
        self.names.insert(name.clone(), Slot::Asked(outcome));
        Known::Nothing(pending)
    }

    pub fn put(&mut self, name: &Arc<str>, outcome: Outcome, until: Instant) {
        let before = self.names.insert(name.clone(), Slot::Known(outcome.clone(), until));
        if let Some(Slot::Asked(waiting)) = before {
            waiting.send_replace(Some(outcome));
        }
    }

    /// What has expired goes, else what expires first. What is being asked stays: it ends soon, and is known then.
    fn make_room(&mut self, now: Instant) {
        if self.names.len() < CAPACITY {
            return;
        }
        self.names.retain(|_, slot| !matches!(slot, Slot::Known(_, until) if *until <= now));
        if self.names.len() < CAPACITY {
            return;
        }
        let first = self.names.iter().filter_map(|(name, slot)| match slot {
            Slot::Known(_, until) => Some((*until, name.clone())),
            Slot::Asked(_) => None,
        });
        if let Some((_, name)) = first.min() {
            self.names.remove(&name);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::NameError;
    use super::*;

    fn outcome(ip: &str) -> Outcome {
        Ok(Arc::from([ip.parse().unwrap()]))
    }

    #[test]
    fn a_name_is_asked_for_once_and_again_when_its_time_is_over() {
        let (mut cache, name, now) = (Cache::default(), Arc::from("a.test"), Instant::now());
        let Known::Nothing(first) = cache.get(&name, now) else { panic!("unknown") };
        let Known::Pending(second) = cache.get(&name, now) else { panic!("asked already") };
        assert!(first.borrow().is_none());
        cache.put(&name, outcome("192.0.2.1"), now + Duration::from_secs(5));
        assert_eq!(*first.borrow(), Some(outcome("192.0.2.1")));
        assert_eq!(*second.borrow(), Some(outcome("192.0.2.1")));
        let later = now + Duration::from_secs(4);
        assert!(matches!(cache.get(&name, later), Known::Outcome(known) if known == outcome("192.0.2.1")));
        assert!(matches!(cache.get(&name, now + Duration::from_secs(5)), Known::Nothing(_)));
    }

    #[test]
    fn failures_are_kept_like_answers() {
        let (mut cache, name, now) = (Cache::default(), Arc::from("a.test"), Instant::now());
        assert!(matches!(cache.get(&name, now), Known::Nothing(_)));
        cache.put(&name, Err(NameError::NoSuchName), now + Duration::from_secs(1));
        assert!(matches!(cache.get(&name, now), Known::Outcome(Err(NameError::NoSuchName))));
    }

    #[test]
    fn there_is_an_end_to_what_is_kept() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        let name = |n: usize| -> Arc<str> { format!("{n}.test").into() };
        for n in 0..2 * CAPACITY {
            assert!(matches!(cache.get(&name(n), now), Known::Nothing(_)));
            let seconds = u64::try_from(n).unwrap() + 1;
            cache.put(&name(n), outcome("192.0.2.1"), now + Duration::from_secs(seconds));
        }
        assert_eq!(cache.names.len(), CAPACITY);
        assert!(matches!(cache.get(&name(2 * CAPACITY - 1), now), Known::Outcome(_)), "the last to expire stays");
        assert!(matches!(cache.get(&name(0), now), Known::Nothing(_)), "the first to expire went");
    }
}
