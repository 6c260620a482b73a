//! The mesh that the tests of commands ask about, and their golden answers: `testdata/cli/shop`. `UPDATE_GOLDEN=1` rewrites
//! them; review the diff.

use std::path::Path;

use serde_json::{Value, json};

use super::facts::Facts;
use crate::translate::fixture;

pub(super) fn shop() -> Facts {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/cli/shop/in.yaml");
    Facts::of(fixture::world(&std::fs::read_to_string(path).expect("in.yaml")), false)
}

pub(super) fn golden(name: &str, actual: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/cli/shop").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, actual).expect("it can be written");
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(actual == expected, "{} differs; UPDATE_GOLDEN=1 rewrites it\n{actual}", path.display());
}

/// What an API server answers that refuses.
pub(super) fn failure(code: u16, message: &str) -> (u16, Value) {
    let reason = match code {
        403 => "Forbidden",
        404 => "NotFound",
        409 => "Conflict",
        _ => "",
    };
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": message, "reason": reason,
    });
    (code, status)
}
