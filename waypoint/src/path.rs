//! Path normalisation as Istio's default (`BASE`): policy and upstream see the same, canonical path, so that no spelling
//! of a path slips past a rule.

use std::borrow::Cow;

/// Why a path is refused (400).
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    #[error("the path does not start with a slash")]
    NotAbsolute,
    #[error("the path has a fragment")]
    Fragment,
    #[error("the path has a broken percent escape")]
    Escape,
}

/// Turns `\` into `/`, decodes escaped unreserved characters (RFC 3986 2.3), resolves `.` and `..`. Doubled slashes and
/// escaped slashes stay as they are.
///
/// # Errors
/// Paths that no two parsers would agree on.
pub fn normalise(path: &str) -> Result<Cow<'_, str>, PathError> {
    if !path.starts_with('/') {
        return Err(PathError::NotAbsolute);
    }
    if path.contains('#') {
        return Err(PathError::Fragment);
    }
    if !needs_work(path) {
        return Ok(Cow::Borrowed(path));
    }
    let decoded = decode_unreserved(&path.replace('\\', "/"))?;
    Ok(Cow::Owned(resolve_dots(&decoded)))
}

fn needs_work(path: &str) -> bool {
    path.contains(['\\', '%']) || path.contains("/.")
}

fn decode_unreserved(path: &str) -> Result<String, PathError> {
    let mut out = String::with_capacity(path.len());
    let mut rest = path;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        let escape = rest.get(at..at + 3).ok_or(PathError::Escape)?;
        let byte = u8::from_str_radix(&escape[1..], 16).map_err(|_| PathError::Escape)?;
        if !escape.as_bytes()[1].is_ascii_hexdigit() {
            return Err(PathError::Escape);
        }
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            out.push(char::from(byte));
        } else {
            out.push_str(escape);
        }
        rest = &rest[at + 3..];
    }
    out.push_str(rest);
    Ok(out)
}

fn resolve_dots(path: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    let mut directory = false;
    for segment in path.split('/').skip(1) {
        directory = matches!(segment, "." | "..");
        match segment {
            "." => {}
            ".." => {
                kept.pop();
            }
            other => kept.push(other),
        }
    }
    let mut out = String::with_capacity(path.len());
    for segment in &kept {
        out.push('/');
        out.push_str(segment);
    }
    // `/a/.` and `/a/b/..` name a directory.
    if directory || out.is_empty() {
        out.push('/');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_of_one_path_become_one() {
        for (given, want) in [
            ("/admin", "/admin"),
            ("/%2e%2e/admin", "/admin"),
            ("/a/../admin", "/admin"),
            ("/a/./b/", "/a/b/"),
            ("/a/..", "/"),
            ("/a/.", "/a/"),
            ("/..", "/"),
            ("\\admin", ""),
            ("/x\\admin", "/x/admin"),
            ("/%61dmin", "/admin"),
            ("/a%2Fadmin", "/a%2Fadmin"),
            ("//admin", "//admin"),
            ("/a/.b", "/a/.b"),
            ("/%20x", "/%20x"),
        ] {
            match normalise(given) {
                Ok(path) => assert_eq!(path, want, "{given}"),
                Err(why) => assert!(want.is_empty() && why == PathError::NotAbsolute, "{given}: {why}"),
            }
        }
    }

    #[test]
    fn broken_paths_are_refused() {
        assert_eq!(normalise("/a#b"), Err(PathError::Fragment));
        for bad in ["/%", "/%2", "/%zz", "/%+1", "/%é1"] {
            assert_eq!(normalise(bad), Err(PathError::Escape), "{bad}");
        }
    }
}
