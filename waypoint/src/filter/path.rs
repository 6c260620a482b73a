//! ReplaceFullPath and ReplacePrefixMatch, shared by redirect and rewrite.

use http::uri::PathAndQuery;
use mesh_proto::waypoint::{self as wire, path_modifier};

use super::FilterError;

#[derive(Debug, PartialEq, Eq)]
pub enum PathModifier {
    Full(String),
    /// Without a trailing slash; empty means the prefix is cut off.
    Prefix(String),
}

impl PathModifier {
    pub(super) fn compile(m: &wire::PathModifier) -> Result<Self, FilterError> {
        // A fragment would end what is parsed without an error.
        let is_path = |p: &str| p.starts_with('/') && !p.contains('#') && p.parse::<PathAndQuery>().is_ok();
        match &m.kind {
            Some(path_modifier::Kind::ReplaceFull(p)) if is_path(p) => Ok(Self::Full(p.clone())),
            Some(path_modifier::Kind::ReplacePrefixMatch(p)) if p.is_empty() || is_path(p) => {
                Ok(Self::Prefix(p.trim_end_matches('/').to_owned()))
            }
            Some(path_modifier::Kind::ReplaceFull(p) | path_modifier::Kind::ReplacePrefixMatch(p)) => {
                Err(FilterError::Invalid { what: "path", value: p.clone() })
            }
            None => Err(FilterError::Unknown),
        }
    }

    /// The new path. `matched` is the prefix the rule matched by; without one the whole path counts as unmatched rest.
    /// Never yields `//` at the seam nor an empty path.
    pub fn apply(&self, path: &str, matched: Option<&str>) -> String {
        match self {
            Self::Full(new) => new.clone(),
            Self::Prefix(new) => {
                let matched = matched.unwrap_or("").trim_end_matches('/');
                let rest = path.strip_prefix(matched).unwrap_or(path);
                let rest = if new.is_empty() || rest.is_empty() || rest.starts_with('/') {
                    rest.to_owned()
                } else {
                    format!("/{rest}")
                };
                let joined = format!("{new}{rest}");
                if joined.starts_with('/') { joined } else { format!("/{joined}") }
            }
        }
    }
}
