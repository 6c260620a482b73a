//! Resources by a key that several may share; mostly there is one of them.

use std::borrow::Borrow;
use std::slice;
use std::sync::Arc;

use imbl::OrdMap;

/// The few resources that share a key, in an order that does not depend on arrival.
#[derive(Debug)]
enum Bucket<T> {
    One(Arc<T>),
    /// Two words are enough for both; a slice would take a third.
    More(Arc<Vec<Arc<T>>>),
}

impl<T> Bucket<T> {
    fn items(&self) -> &[Arc<T>] {
        match self {
            Self::One(item) => slice::from_ref(item),
            Self::More(items) => items,
        }
    }

    /// `None` when there is nothing.
    fn of(mut items: Vec<Arc<T>>) -> Option<Self> {
        match items.len() {
            0 => None,
            1 => items.pop().map(Self::One),
            _ => Some(Self::More(Arc::new(items))),
        }
    }
}

impl<T> Clone for Bucket<T> {
    fn clone(&self) -> Self {
        match self {
            Self::One(item) => Self::One(item.clone()),
            Self::More(items) => Self::More(items.clone()),
        }
    }
}

impl<T: PartialEq> PartialEq for Bucket<T> {
    fn eq(&self, other: &Self) -> bool {
        self.items() == other.items()
    }
}

/// A persistent map to buckets.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Buckets<K: Ord, T: PartialEq>(OrdMap<K, Bucket<T>>);

impl<K: Ord, T: PartialEq> Default for Buckets<K, T> {
    fn default() -> Self {
        Self(OrdMap::default())
    }
}

impl<K: Ord + Clone, T: PartialEq> Buckets<K, T> {
    /// All with this key.
    pub(super) fn all<Q: Ord + ?Sized>(&self, key: &Q) -> &[Arc<T>]
    where
        K: Borrow<Q>,
    {
        self.0.get(key).map(Bucket::items).unwrap_or_default()
    }

    /// Puts `item` into its bucket, sorted by `order`; false when it is there already (one resource may name a key twice).
    pub(super) fn put<O: Ord>(&mut self, key: K, item: Arc<T>, order: impl Fn(&T) -> O) -> bool {
        let Some(bucket) = self.0.get_mut(&key) else {
            self.0.insert(key, Bucket::One(item));
            return true;
        };
        let known = bucket.items();
        let Err(position) = known.binary_search_by_key(&order(&item), |known| order(known)) else { return false };
        let (before, after) = known.split_at(position);
        let items = before.iter().cloned().chain([item]).chain(after.iter().cloned()).collect();
        *bucket = Bucket::More(Arc::new(items));
        true
    }

    /// Takes what `is_it` names out of its bucket; false when it was not there.
    pub(super) fn take(&mut self, key: &K, is_it: impl Fn(&T) -> bool) -> bool {
        let Some(bucket) = self.0.get_mut(key) else { return false };
        let known = bucket.items();
        let rest: Vec<_> = known.iter().filter(|item| !is_it(item)).cloned().collect();
        let found = rest.len() < known.len();
        match Bucket::of(rest) {
            Some(rest) => *bucket = rest,
            None => drop(self.0.remove(key)),
        }
        found
    }
}
