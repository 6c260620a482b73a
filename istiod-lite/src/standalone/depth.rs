//! How deep an object may be nested.

use serde_json::Value;

/// Levels of lists and objects. What is taken must be read again: by us when we start, and by clients; serde_json gives up
/// at 128. Lists, events and the owners of fields put some levels on top.
pub const DEEPEST: usize = 100;

/// Is `value` nested deeper than `levels`?
pub fn exceeds(value: &Value, levels: usize) -> bool {
    let deeper = |child: &Value| exceeds(child, levels - 1);
    match value {
        Value::Array(list) => levels == 0 || list.iter().any(deeper),
        Value::Object(fields) => levels == 0 || fields.values().any(deeper),
        _ => false,
    }
}
