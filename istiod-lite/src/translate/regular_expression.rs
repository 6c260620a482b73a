//! Whether a waypoint takes a regular expression. What a pattern is worth does not depend on anything else, and compiling
//! one takes up to some milliseconds; an object may hold thousands, and all routes are translated when any changes. So it is
//! remembered, by a hash, of as many as a large mesh has.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex};

use regex::RegexBuilder;
use sha2::{Digest as _, Sha256};

use crate::resources::lock;

/// Compiled size in bytes; the waypoint's limit.
const SIZE_LIMIT: usize = 1 << 20;
const REMEMBERED: usize = 100_000;

/// Those of one route. Each may cost as much as the largest that fits.
pub const MOST_OF_ROUTE: usize = 256;

/// Why it does not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unfit {
    /// And what is wrong with it.
    NotOne(String),
    TooLarge,
}

/// Whether they fit, by SHA-256: nobody writes a pattern that stands in the place of another's.
static KNOWN: LazyLock<Mutex<HashMap<[u8; 32], bool>>> = LazyLock::new(Mutex::default);

/// # Errors
/// Why a waypoint refuses it.
pub fn check(pattern: &str) -> Result<(), Unfit> {
    let place: [u8; 32] = Sha256::digest(pattern.as_bytes()).into();
    match lock(&KNOWN).get(&place) {
        Some(true) => return Ok(()),
        Some(false) => return Err(Unfit::TooLarge),
        None => {}
    }
    let outcome = compile(pattern);
    // What is wrong with one that is none is found at once.
    if !matches!(outcome, Err(Unfit::NotOne(_))) {
        let mut known = lock(&KNOWN);
        if known.len() >= REMEMBERED {
            known.clear();
        }
        known.insert(place, outcome.is_ok());
    }
    outcome
}

/// As the waypoint does it: by itself, as one that closes a group would match anywhere, and then anchored.
fn compile(pattern: &str) -> Result<(), Unfit> {
    let build = |pattern: &str| match RegexBuilder::new(pattern).size_limit(SIZE_LIMIT).build() {
        Ok(_) => Ok(()),
        Err(regex::Error::CompiledTooBig(_)) => Err(Unfit::TooLarge),
        Err(error) => Err(Unfit::NotOne(error.to_string())),
    };
    build(pattern)?;
    build(&format!("^(?:{pattern})$"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_waypoint_refuses_is_told_apart_and_looked_at_once() {
        assert_eq!(check("/v[0-9]+/.*"), Ok(()));
        assert!(matches!(check("a)(b"), Err(Unfit::NotOne(_))));
        for _ in 0..2 {
            assert_eq!(check(r"(\w{100}){100}"), Err(Unfit::TooLarge));
        }
        let start = std::time::Instant::now();
        for _ in 0..1000 {
            assert_eq!(check(r"\w{20}"), Ok(()));
        }
        assert!(start.elapsed() < std::time::Duration::from_secs(5), "{:?}", start.elapsed());
    }
}
