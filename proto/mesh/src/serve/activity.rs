//! Does this thread carry bytes just now? A thread that serves connections can tell by it whether its sleeps end in traffic.

use std::cell::Cell;

thread_local! {
    static MOVES: Cell<u64> = const { Cell::new(0) };
}

/// How often a copy on this thread has moved bytes; it wraps around.
#[must_use]
pub fn moves() -> u64 {
    MOVES.get()
}

pub(super) fn note() {
    MOVES.set(MOVES.get().wrapping_add(1));
}
