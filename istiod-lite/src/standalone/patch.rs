//! The three client-computed patches: JSON patch (RFC 6902), JSON merge patch (RFC 7396) and Kubernetes' strategic
//! merge patch (`crate::strategic`). Pure functions of document, patch and schema.

use json_patch::PatchOperation as Operation;
use serde_json::Value;

use super::depth::{DEEPEST, exceeds};
use super::error::{ApiError, ApiResult};
use crate::strategic;

/// Operations of one JSON patch, as Kubernetes has it.
const MOST_OPERATIONS: usize = 10_000;
/// Bytes that the copies of one JSON patch may come to: a few of them, each of all there is, would otherwise fill the memory.
const MOST_COPIED: usize = 3 << 20;

/// Applies a JSON patch. When it fails the document is of no use any more.
///
/// # Errors
/// 400 when it is not a patch, 413 when it would do too much, 422 when an operation (or its `test`) does not hold.
pub fn json_patch(document: &mut Value, patch: Value) -> ApiResult<()> {
    let patch: json_patch::Patch =
        serde_json::from_value(patch).map_err(|e| ApiError::bad_request(format!("invalid JSON patch: {e}")))?;
    if patch.0.len() > MOST_OPERATIONS {
        return Err(ApiError::too_much(&format!("the patch has more than {MOST_OPERATIONS} operations")));
    }
    let mut copied = 0;
    for (number, operation) in patch.0.iter().enumerate() {
        let put = match operation {
            Operation::Add(add) => Some(&add.value),
            Operation::Replace(replace) => Some(&replace.value),
            Operation::Copy(copy) => document.pointer(copy.from.as_str()),
            Operation::Move(of) => document.pointer(of.from.as_str()),
            Operation::Remove(_) | Operation::Test(_) => None,
        };
        let level = operation.path().as_str().matches('/').count();
        if put.is_some_and(|value| level > DEEPEST || exceeds(value, DEEPEST - level)) {
            return Err(ApiError::bad_request(format!("the patch nests deeper than {DEEPEST} levels")));
        }
        if let (Operation::Copy(_), Some(value)) = (operation, put) {
            copied += value.to_string().len();
            if copied > MOST_COPIED {
                return Err(ApiError::too_much(&format!("the patch copies more than {MOST_COPIED} bytes")));
            }
        }
        apply(document, number, operation)?;
    }
    Ok(())
}

fn apply(document: &mut Value, number: usize, operation: &Operation) -> ApiResult<()> {
    json_patch::patch_unsafe(document, std::slice::from_ref(operation)).map_err(|mut e| {
        e.operation = number;
        let name = document["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let cause = super::error::Cause {
            reason: "FieldValueInvalid",
            field: "patch".into(),
            message: format!("the server rejected our request due to an error in our request: {e}"),
        };
        ApiError::invalid("", document["kind"].as_str().unwrap_or_default(), &name, &[cause])
    })
}

/// Applies a JSON merge patch.
pub fn merge(document: &mut Value, patch: &Value) {
    json_patch::merge(document, patch);
}

/// Applies a strategic merge patch to a document of the given schema.
///
/// # Errors
/// 400 on a directive that is unknown or has the wrong shape.
pub fn strategic(document: &mut Value, patch: &Value, node: &Value) -> ApiResult<()> {
    strategic::merge(document, patch, node).map_err(|bad| ApiError::bad_request(bad.to_string()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_patch_that_copies_what_it_has_copied_comes_to_an_end() {
        let double = vec![json!({"op": "copy", "from": "/a", "path": "/a/-"}); 40];
        let error = json_patch(&mut json!({"a": ["x"]}), double.into()).unwrap_err();
        assert_eq!(error.code, 413, "{error}");
        let operations = vec![json!({"op": "add", "path": "/a", "value": 1}); 10_001];
        assert_eq!(json_patch(&mut json!({}), operations.into()).unwrap_err().code, 413);
    }

    #[test]
    fn no_patch_nests_deeper_than_can_be_read_again() {
        let nested = |levels: usize| (0..levels).fold(json!(1), |inside, _| json!([inside]));
        let add = |path: &str, value: Value| json!({"op": "add", "path": path, "value": value});
        let mut document = json!({});
        json_patch(&mut document, json!([add("/a", nested(99))])).unwrap();
        assert_eq!(serde_json::from_str::<Value>(&document.to_string()).unwrap(), document);
        for patch in [
            json!([add("/a", nested(100))]),
            json!([add("/a", nested(99)), add(&format!("/a{}", "/0".repeat(99)), nested(2))]),
            json!([add("/a", nested(99)), add("/b", json!({})), {"op": "copy", "from": "/a", "path": "/b/c"}]),
            json!([add("/a", nested(99)), add("/b", json!({})), {"op": "move", "from": "/a", "path": "/b/c"}]),
        ] {
            assert_eq!(json_patch(&mut json!({}), patch.clone()).unwrap_err().code, 400, "{patch}");
        }
    }
}
