//! Cheap shared strings. Names of workloads and services are read by every connection and change rarely, so they are
//! shared rather than copied.

use std::sync::Arc;

/// An immutable string whose clone is one reference count.
pub type Text = Arc<str>;

/// `Some` unless the string is empty: protobuf and label sources spell "absent" as "".
pub fn non_empty(value: &str) -> Option<Text> {
    if value.is_empty() { None } else { Some(Text::from(value)) }
}
