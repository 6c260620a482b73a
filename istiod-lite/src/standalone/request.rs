//! A request as the API understands it: verb, group, version, resource, namespace, name, and the answer's form.

use http::Method;

use super::error::{ApiError, ApiResult};
use super::rbac::Attributes;

/// Decoded query parameters, in order.
#[derive(Debug, Clone, Default)]
pub struct Query(Vec<(String, String)>);

impl Query {
    pub fn parse(text: &str) -> Self {
        let decode = |part: &str| decode(&part.replace('+', " "));
        let pairs = text.split('&').filter(|p| !p.is_empty());
        Self(pairs.map(|p| p.split_once('=').unwrap_or((p, ""))).map(|(k, v)| (decode(k), decode(v))).collect())
    }

    /// First value of a parameter; empty counts as absent.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(k, _)| k == name).map(|(_, v)| v.as_str()).filter(|v| !v.is_empty())
    }

    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> + 'a {
        self.0.iter().filter(move |(k, _)| k == name).map(|(_, v)| v.as_str())
    }

    pub fn is_true(&self, name: &str) -> bool {
        self.get(name).is_some_and(|v| matches!(v, "true" | "1"))
    }

    /// # Errors
    /// 400 when present and no number.
    pub fn number(&self, name: &str) -> ApiResult<Option<u64>> {
        let parse = |v: &str| v.parse().map_err(|_| ApiError::bad_request(format!("invalid value for {name}: {v:?}")));
        self.get(name).map(parse).transpose()
    }
}

/// Percent-decodes one path segment or query part; malformed escapes stay as they are.
pub fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let escaped = (first == b'%')
            .then(|| tail.get(..2).and_then(|hex| std::str::from_utf8(hex).ok()))
            .flatten()
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match escaped {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A request for a resource (or a subresource of one).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Target {
    pub group: String,
    pub version: String,
    pub resource: String,
    pub namespace: String,
    pub name: String,
    pub subresource: String,
}

impl Target {
    /// `None` when the path is not below `/api/<version>/` or `/apis/<group>/<version>/`.
    pub fn parse(path: &str) -> Option<Self> {
        let mut segments = path.split('/').filter(|s| !s.is_empty()).map(decode);
        let group = match segments.next()?.as_str() {
            "api" => String::new(),
            "apis" => segments.next()?,
            _ => return None,
        };
        let version = segments.next()?;
        let mut rest: Vec<String> = segments.collect();
        let mut namespace = String::new();
        if rest.first().is_some_and(|s| s == "namespaces") {
            // namespaces, namespaces/NAME, namespaces/NAME/{status,finalize} are the Namespace itself.
            let own = matches!(rest.get(2).map(String::as_str), Some("status" | "finalize")) && rest.len() == 3;
            if rest.len() > 2 && !own {
                namespace = rest.remove(1);
                rest.remove(0);
            }
        }
        let mut rest = rest.into_iter();
        let target = Self {
            group,
            version,
            resource: rest.next()?,
            namespace,
            name: rest.next().unwrap_or_default(),
            subresource: rest.next().unwrap_or_default(),
        };
        rest.next().is_none().then_some(target)
    }

    /// The question to ask of RBAC. A list or watch narrowed to one name counts as naming it.
    pub fn attributes(&self, method: &Method, query: &Query, field_name: Option<&str>) -> Attributes {
        let verb = match (method.as_str(), self.name.is_empty()) {
            ("GET" | "HEAD", _) if query.is_true("watch") => "watch",
            ("GET" | "HEAD", true) => "list",
            ("GET" | "HEAD", false) => "get",
            ("POST", _) => "create",
            ("PUT", _) => "update",
            ("PATCH", _) => "patch",
            ("DELETE", true) => "deletecollection",
            ("DELETE", false) => "delete",
            _ => "",
        };
        // Namespaces and what is in them are both asked for in the namespace.
        let own = self.group.is_empty() && self.resource == "namespaces" && !self.name.is_empty();
        Attributes {
            verb: verb.into(),
            resource: self.resource.clone(),
            subresource: self.subresource.clone(),
            group: self.group.clone(),
            namespace: if own { self.name.clone() } else { self.namespace.clone() },
            name: if self.name.is_empty() { field_name.unwrap_or_default().into() } else { self.name.clone() },
            path: String::new(),
        }
    }
}

/// In which form a client wants objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Object,
    Table,
    /// Only metadata.
    Partial,
}

impl Form {
    /// The first form of an Accept header that is served.
    ///
    /// # Errors
    /// 406 when none is.
    pub fn negotiate(accept: &str) -> ApiResult<Self> {
        if accept.trim().is_empty() {
            return Ok(Self::Object);
        }
        for offer in accept.split(',') {
            let mut parts = offer.split(';').map(str::trim);
            let media = parts.next().unwrap_or_default();
            if !matches!(media, "application/json" | "*/*" | "application/*") {
                continue;
            }
            let shape = parts.find_map(|p| p.strip_prefix("as="));
            let version_one = offer.contains("v=v1") && !offer.contains("v=v1beta1");
            match shape {
                None => return Ok(Self::Object),
                Some("Table") if version_one => return Ok(Self::Table),
                Some("PartialObjectMetadata" | "PartialObjectMetadataList") if version_one => return Ok(Self::Partial),
                Some(_) => {}
            }
        }
        Err(ApiError::not_acceptable())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_understood() {
        let target = |p: &str| {
            let t = Target::parse(p)?;
            Some(format!("{}|{}|{}|{}|{}|{}", t.group, t.version, t.namespace, t.resource, t.name, t.subresource))
        };
        for (path, expected) in [
            ("/api/v1/pods", "|v1||pods||"),
            ("/api/v1/namespaces", "|v1||namespaces||"),
            ("/api/v1/namespaces/a", "|v1||namespaces|a|"),
            ("/api/v1/namespaces/a/finalize", "|v1||namespaces|a|finalize"),
            ("/api/v1/namespaces/a/pods/p/status", "|v1|a|pods|p|status"),
            ("/apis/apps/v1/namespaces/a/deployments/d", "apps|v1|a|deployments|d|"),
            (
                "/apis/rbac.authorization.k8s.io/v1/clusterroles/system%3Ax",
                "rbac.authorization.k8s.io|v1||clusterroles|system:x|",
            ),
        ] {
            assert_eq!(target(path).as_deref(), Some(expected), "{path}");
        }
        for path in ["/healthz", "/api", "/apis/apps", "/api/v1", "/api/v1/namespaces/a/pods/p/x/y"] {
            assert_eq!(target(path), None, "{path}");
        }
    }

    #[test]
    fn forms_are_negotiated_in_order() {
        let kubectl = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json";
        assert_eq!(Form::negotiate(kubectl).unwrap(), Form::Table);
        assert_eq!(Form::negotiate("application/vnd.kubernetes.protobuf, application/json").unwrap(), Form::Object);
        assert!(Form::negotiate("application/vnd.kubernetes.protobuf").is_err());
    }

    #[test]
    fn queries_are_decoded() {
        let query = Query::parse("labelSelector=a%3Db%2Cc&watch=true&x=1+2&limit=x");
        assert_eq!(query.get("labelSelector"), Some("a=b,c"));
        assert_eq!(query.get("x"), Some("1 2"));
        assert!(query.is_true("watch") && query.number("limit").is_err());
    }
}
