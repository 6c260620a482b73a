//! What the fuzz targets share.
//!
//! An input is a letter, which names one of a target's parsers, and what that parser reads. So small parsers live
//! together and a finding's first byte tells whose it is.

use std::path::Path;
use std::sync::Once;

use mesh::telemetry::{LogFormat, init_logging};
use serde_json::Value;

/// Where this names a directory, a target writes its seeds there and ends. They are made by code, as most of what is read
/// here is binary.
const SEEDS: &str = "FUZZ_SEEDS";

/// Before the first input.
///
/// # Panics
/// Where seeds cannot be written.
pub fn begin(seeds: impl FnOnce() -> Vec<Vec<u8>>) {
    if let Some(directory) = std::env::var_os(SEEDS) {
        for (number, seed) in seeds().into_iter().enumerate() {
            std::fs::write(Path::new(&directory).join(format!("seed-{number:03}")), seed).expect("seeds are written");
        }
        std::process::exit(0);
    }
    // What goes into a log line is formatted then, as it would be where somebody reads it.
    static LOG: Once = Once::new();
    LOG.call_once(|| init_logging("debug,h2=off", LogFormat::Plain).expect("a filter").keep());
}

/// A seed: whose, and what.
#[must_use]
pub fn seed(letter: u8, content: impl AsRef<[u8]>) -> Vec<u8> {
    [&[letter], content.as_ref()].concat()
}

/// Seeds of one parser.
pub fn texts<'a>(letter: u8, contents: &'a [&'a str]) -> impl Iterator<Item = Vec<u8>> + 'a {
    contents.iter().map(move |content| seed(letter, content))
}

/// Reads a small number, which an input that has ended has none of.
pub fn take(input: &mut &[u8]) -> u8 {
    match input.split_first() {
        Some((first, rest)) => {
            *input = rest;
            *first
        }
        None => 0,
    }
}

/// Is there a number with a fraction in it? `serde_json` reads these a little differently from how it has written them.
#[must_use]
pub fn has_fraction(value: &Value) -> bool {
    match value {
        Value::Number(number) => number.is_f64(),
        Value::Array(list) => list.iter().any(has_fraction),
        Value::Object(fields) => fields.values().any(has_fraction),
        _ => false,
    }
}
