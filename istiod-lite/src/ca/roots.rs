//! Which roots the mesh trusts and who signs: the pure part of a change of root. No clock, no API, no file.
//!
//! ```text
//!  offered ──handed out──► spreading ──all who have not seen it have run out──► known to all ──► signs
//!                                                                                                   │ another signs
//!                        forgotten ◄──all that was signed below it has run out── still needed ◄─────┘
//! ```
//! A root is handed out before anything is signed below it, and for as long as something that was signed below it may
//! be shown. Proxies take their roots from the answer that brings their certificate, so how long that is follows from
//! the certificates that are about: whoever has not seen a root holds one that was issued before.
//!
//! Invariant: of any two valid certificates, each is accepted under the roots that came with the other.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::authority::{Authority, end_of};

/// A root ConfigMap is with every pod after this long: a kubelet looks once a minute, and its cache is as old again.
const MOUNTED: Duration = Duration::from_secs(180);
/// Clocks differ by less.
pub(super) const MARGIN: Duration = Duration::from_secs(120);

/// The roots that are handed out, oldest first, and how far each has come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Roots(Vec<Root>);

/// Times are in seconds since 1970. They only ever grow, so that of what several say the later is true.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Root {
    /// PEM, written by us, so that equal certificates are equal texts.
    certificate: String,
    /// From when on everybody has it. `None`: it is handed out from now on.
    known: Option<i64>,
    /// The last of the certificates below it ends by then. `None`: there are none of this mesh; it is trusted because an
    /// operator says so, and is forgotten when he no longer does.
    until: Option<i64>,
    /// It is another replica that the operator has said so to, and that says when no longer.
    #[serde(skip)]
    foreign: bool,
}

impl Roots {
    /// Dates what has been handed out by now, and notes what `signing` has signed. To be called with the end of the last
    /// certificate issued: before [`Self::decide`], and again with who signed until then once its outcome is in force, as
    /// certificates were issued meanwhile.
    pub fn settle(&mut self, signing: &Authority, last_end: OffsetDateTime, now: OffsetDateTime) {
        let over = over(last_end, now);
        for root in &mut self.0 {
            root.known.get_or_insert((over + MARGIN).unix_timestamp());
            if root.is_above(signing) {
                root.until = root.until.max(Some(over.unix_timestamp()));
            }
        }
    }

    /// Who signs from now on: `newest`, what the operator wants, once its roots are known to all, or when `signing` cannot
    /// any more; until then `signing`. Afterwards [`Self::bundle`] is what either of them needs.
    pub fn decide<'a>(
        &mut self,
        signing: &'a Arc<Authority>,
        newest: &'a Arc<Authority>,
        now: OffsetDateTime,
    ) -> &'a Arc<Authority> {
        // Of a mesh that has no history everybody has seen what there is.
        let known = self.0.is_empty().then(|| now.unix_timestamp());
        for certificate in newest.own_roots() {
            match self.0.iter_mut().find(|root| root.certificate == *certificate) {
                Some(root) => root.foreign = false,
                None => self.0.push(Root { certificate: certificate.clone(), known, until: None, foreign: false }),
            }
        }
        // Before the very end: a leaf must not end while its holder asks for the next.
        let is_spent = |authority: &Authority| authority.not_after() <= now + MARGIN;
        let next = if is_spent(newest) && newest.not_after() < signing.not_after() {
            signing
        } else if is_spent(signing) || self.is_known(newest, now) {
            newest
        } else {
            signing
        };
        self.0.retain(|root| {
            let is_wanted = [next, newest].iter().any(|by| by.own_roots().contains(&root.certificate));
            let is_wanted_elsewhere = root.foreign && root.until.is_none();
            // Who signs until now may be doing so at this moment.
            let is_needed = root.is_needed(now) || root.is_above(signing);
            is_wanted || !root.has_run_out(now) && (is_wanted_elsewhere || is_needed)
        });
        next
    }

    /// What is handed out, PEM: in the order that all replicas have.
    pub fn bundle(&self) -> String {
        let mut roots: Vec<_> = self.0.iter().collect();
        roots.sort_by_key(|root| (root.known.unwrap_or(i64::MAX), &root.certificate));
        roots.into_iter().map(|root| root.certificate.as_str()).collect()
    }

    /// Whether `certificate`, in our PEM, is among them.
    pub fn contains(&self, certificate: &str) -> bool {
        self.find(certificate).is_some()
    }

    /// Whether one of `before` is not among them.
    pub fn lack_one_of(&self, before: &Self) -> bool {
        before.0.iter().any(|root| !self.contains(&root.certificate))
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Nothing has been handed out yet.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether everybody accepts what `authority` signs.
    pub fn is_known(&self, authority: &Authority, now: OffsetDateTime) -> bool {
        let now = now.unix_timestamp();
        let known = self.0.iter().filter(|root| root.known.is_some_and(|known| known <= now));
        authority.is_trusted_below(known.map(|root| &*root.certificate))
    }

    /// From when on everybody accepts what `authority` signs below its own roots.
    pub fn known_from(&self, authority: &Authority) -> Option<OffsetDateTime> {
        let above = self.0.iter().filter(|root| root.is_above(authority));
        let known = above.filter_map(|root| root.known).min()?;
        OffsetDateTime::from_unix_timestamp(known).ok()
    }

    /// Drops what nothing stands below any more: who wrote this down may have stopped handing it out since.
    pub fn forget(&mut self, now: OffsetDateTime) {
        self.0.retain(|root| root.until.is_none() || root.is_needed(now));
    }

    /// Takes over what another replica wrote down: the later of two dates, so that nothing happens before it may, and what
    /// it hands out, which we have not until now.
    pub fn merge(&mut self, written: Self, last_end: OffsetDateTime, now: OffsetDateTime) {
        self.0.retain(|root| !root.foreign || root.until.is_some() || written.contains(&root.certificate));
        let known = Some((over(last_end, now) + MARGIN).unix_timestamp());
        for theirs in written.0 {
            if let Some(ours) = self.0.iter_mut().find(|root| root.certificate == theirs.certificate) {
                ours.known = ours.known.max(theirs.known);
                ours.until = ours.until.max(theirs.until);
            } else if !theirs.has_run_out(now) && (theirs.until.is_none() || theirs.is_needed(now)) {
                self.0.push(Root { known: known.max(theirs.known), foreign: true, ..theirs });
            }
        }
    }

    /// Whether all of it stands in `written`, with these dates or later ones.
    pub fn is_covered_by(&self, written: &Self) -> bool {
        self.0.iter().all(|root| {
            let written = written.find(&root.certificate);
            written.is_some_and(|written| written.known >= root.known && written.until >= root.until)
        })
    }

    /// The same, with so much more time for what `signing` signs.
    #[must_use]
    pub fn ahead(&self, signing: &Authority, time: Duration) -> Self {
        let mut roots = self.clone();
        for root in roots.0.iter_mut().filter(|root| root.is_above(signing)) {
            root.until = root.until.map(|until| until + time.as_secs().cast_signed());
        }
        roots
    }

    /// Brings dates forward to `latest`: a clock that has gone back was ahead when it gave later ones.
    pub fn limit(&mut self, latest: OffsetDateTime) {
        let latest = latest.unix_timestamp();
        for date in self.0.iter_mut().flat_map(|root| [&mut root.known, &mut root.until]) {
            *date = date.map(|date| date.min(latest));
        }
    }

    fn find(&self, certificate: &str) -> Option<&Root> {
        self.0.iter().find(|root| root.certificate == certificate)
    }
}

impl Root {
    /// Whether what `authority` signs stands below it.
    fn is_above(&self, authority: &Authority) -> bool {
        authority.own_roots().contains(&self.certificate) && authority.is_trusted_below([&*self.certificate])
    }

    fn has_run_out(&self, now: OffsetDateTime) -> bool {
        end_of(&self.certificate).is_none_or(|end| end <= now)
    }

    /// Whether a certificate below it may still be shown.
    fn is_needed(&self, now: OffsetDateTime) -> bool {
        !self.has_run_out(now) && self.until.is_some_and(|until| (now - MARGIN).unix_timestamp() < until)
    }
}

/// When the last certificate has ended that is issued by now, and what is mounted is everywhere.
fn over(last_end: OffsetDateTime, now: OffsetDateTime) -> OffsetDateTime {
    last_end.max(now + MOUNTED)
}

#[cfg(test)]
mod tests;
