//! RequestRedirect: the answer is a Location, nothing goes upstream.

use http::StatusCode;
use http::uri::Authority;
use mesh_proto::waypoint as wire;
use percent_encoding::{CONTROLS, utf8_percent_encode};

use super::{FilterError, PathModifier, authority};

#[derive(Debug)]
pub struct Redirect {
    scheme: Option<String>,
    hostname: Option<Authority>,
    path: Option<PathModifier>,
    port: Option<u16>,
    pub status: StatusCode,
}

/// What the Location's missing parts default to.
#[derive(Debug, Clone, Copy)]
pub struct RedirectContext<'a> {
    pub scheme: &'a str,
    /// Host of the request, without port.
    pub host: &'a str,
    /// The service port the client dialled: a mesh has no listener port of its own.
    pub port: u16,
    pub path: &'a str,
    pub query: Option<&'a str>,
    pub prefix: Option<&'a str>,
}

impl Redirect {
    pub(super) fn compile(r: &wire::Redirect) -> Result<Self, FilterError> {
        let scheme = match r.scheme.as_str() {
            "" => None,
            s @ ("http" | "https") => Some(s.to_owned()),
            s => return Err(FilterError::Invalid { what: "scheme", value: s.to_owned() }),
        };
        let status = match r.status {
            0 => StatusCode::FOUND,
            301 | 302 | 303 | 307 | 308 => {
                StatusCode::from_u16(u16::try_from(r.status).expect("below 400")).expect("a redirect status")
            }
            s => return Err(FilterError::Invalid { what: "status code", value: s.to_string() }),
        };
        let port = match r.port {
            0 => None,
            p => Some(u16::try_from(p).map_err(|_| FilterError::Invalid { what: "port", value: p.to_string() })?),
        };
        let path = r.path.as_ref().map(PathModifier::compile).transpose()?;
        Ok(Self { scheme, hostname: authority(&r.hostname)?, path, port, status })
    }

    /// The Location header: explicit port, else the scheme's well-known port if a scheme was given, else the service
    /// port; `:80` for http and `:443` for https are left out.
    pub fn location(&self, request: &RedirectContext<'_>) -> String {
        let scheme = self.scheme.as_deref().unwrap_or(request.scheme);
        let host = self.hostname.as_ref().map_or(request.host, Authority::as_str);
        let well_known = if scheme == "https" { 443 } else { 80 };
        let port = self.port.unwrap_or(if self.scheme.is_some() { well_known } else { request.port });
        let path = match &self.path {
            Some(m) => m.apply(request.path, request.prefix),
            None => request.path.to_owned(),
        };
        let mut location = format!("{scheme}://{host}");
        if port != well_known {
            location.push_str(&format!(":{port}"));
        }
        location.push_str(&path);
        if let Some(query) = request.query {
            location.push('?');
            location.push_str(query);
        }
        // Clients may write UTF-8 as it is; a header must not (RFC 3986, 2.1).
        utf8_percent_encode(&location, CONTROLS).to_string()
    }
}
