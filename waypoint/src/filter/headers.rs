//! RequestHeaderModifier and ResponseHeaderModifier.

use http::header::HOST;
use http::{HeaderMap, HeaderName, HeaderValue};
use mesh_proto::waypoint as wire;

use super::FilterError;

#[derive(Debug)]
pub struct HeaderModifier {
    set: Vec<(HeaderName, HeaderValue)>,
    add: Vec<(HeaderName, HeaderValue)>,
    remove: Vec<HeaderName>,
}

impl HeaderModifier {
    pub(super) fn compile(m: &wire::HeaderModifier) -> Result<Self, FilterError> {
        Ok(Self {
            set: pairs(&m.set)?,
            add: pairs(&m.add)?,
            remove: m.remove.iter().map(|n| name(n)).collect::<Result<_, _>>()?,
        })
    }

    /// `set` replaces all values; `add` appends to them, joined by a comma so that an application which reads only the
    /// first field line sees both (conformance expects `old,new`); `remove` drops the header.
    pub fn apply(&self, headers: &mut HeaderMap) {
        for (name, value) in &self.set {
            headers.insert(name.clone(), value.clone());
        }
        for (name, value) in &self.add {
            let joined = headers.get(name).map(|old| [old.as_bytes(), b",", value.as_bytes()].concat());
            let joined = joined.and_then(|bytes| HeaderValue::from_bytes(&bytes).ok());
            headers.insert(name.clone(), joined.unwrap_or_else(|| value.clone()));
        }
        for name in &self.remove {
            headers.remove(name);
        }
    }
}

/// The first entry of a name wins (Gateway API).
fn pairs(list: &[wire::Header]) -> Result<Vec<(HeaderName, HeaderValue)>, FilterError> {
    let mut pairs: Vec<(HeaderName, HeaderValue)> = Vec::with_capacity(list.len());
    for header in list {
        let name = name(&header.name)?;
        let value = HeaderValue::from_str(&header.value)
            .map_err(|_| FilterError::Invalid { what: "header value", value: header.value.clone() })?;
        if pairs.iter().all(|(n, _)| *n != name) {
            pairs.push((name, value));
        }
    }
    Ok(pairs)
}

/// Host and pseudo headers are not for this filter to change: URLRewrite does that.
fn name(text: &str) -> Result<HeaderName, FilterError> {
    HeaderName::from_bytes(text.as_bytes())
        .ok()
        .filter(|n| n != HOST)
        .ok_or_else(|| FilterError::Invalid { what: "header name", value: text.to_owned() })
}
