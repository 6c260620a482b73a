//! Headers of a CONNECT and its answer. A peer can put anything here: what does not parse counts as absent, and nothing
//! here may be believed before the peer's identity says so.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::{identity::Identity, text::Text};

const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
const FORWARDED: HeaderName = http::header::FORWARDED;
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const NETWORK: HeaderName = HeaderName::from_static("x-forwarded-network");
const SOURCE: HeaderName = HeaderName::from_static("x-istio-source");
/// Ours. Others pass over it: on HBONE they know no header but those above.
const ORIGINAL_PEER: HeaderName = HeaderName::from_static("x-mesh-original-peer");

/// Longest value taken from a peer: names of Kubernetes objects are at most this long.
const MAX_VALUE: usize = 253;

/// What a CONNECT says about itself.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct ConnectHeaders {
    /// Describes the source in a request, the destination in a response.
    pub baggage: Option<Baggage>,
    /// The client as the sender sees it. Port 0, which is not written: several connections of the client share this.
    pub forwarded_for: Option<SocketAddr>,
    /// The identity that the client has proved to the sender, a waypoint: its SPIFFE ID.
    pub original_peer: Option<Identity>,
    /// The service that was dialled.
    pub forwarded_host: Option<Text>,
    pub traceparent: Option<TraceParent>,
    /// The sender's network, in the inner CONNECT between networks.
    pub network: Option<Text>,
    /// `x-istio-source`: which kind of proxy has handled the connection before.
    pub source_kind: Option<Text>,
}

impl ConnectHeaders {
    pub fn parse(map: &HeaderMap) -> Self {
        let text = |name| map.get(name).and_then(|value| value.to_str().ok());
        let mut headers = Self {
            baggage: text(BAGGAGE).map(Baggage::parse).filter(|baggage| *baggage != Baggage::default()),
            traceparent: text(TRACEPARENT).and_then(|value| value.parse().ok()),
            network: text(NETWORK).and_then(bounded),
            source_kind: text(SOURCE).and_then(bounded),
            original_peer: text(ORIGINAL_PEER).and_then(|value| value.parse().ok()),
            ..Self::default()
        };
        // Only the first element of the list counts: it is the one our own sender writes.
        let forwarded = text(FORWARDED).and_then(|value| value.split(',').next()).unwrap_or_default();
        for (name, value) in forwarded.split(';').filter_map(|pair| pair.split_once('=')) {
            let value = value.trim().trim_matches('"');
            match name.trim() {
                name if name.eq_ignore_ascii_case("for") => {
                    headers.forwarded_for = node(value).map(crate::net::canonical);
                }
                name if name.eq_ignore_ascii_case("host") => headers.forwarded_host = bounded(value),
                _ => {}
            }
        }
        headers
    }

    /// Sets these headers, replacing whatever stood there under their names.
    pub fn write(&self, map: &mut HeaderMap) {
        let mut set = |name: HeaderName, value: Option<String>| {
            map.remove(&name);
            if let Some(Ok(value)) = value.map(HeaderValue::try_from) {
                map.insert(name, value);
            }
        };
        set(BAGGAGE, self.baggage.as_ref().map(ToString::to_string).filter(|text| !text.is_empty()));
        let forwarded: Vec<_> = [
            self.forwarded_for.map(|addr| format!("for=\"{}\"", Node(addr))),
            self.forwarded_host.as_ref().map(|host| format!("host={host}")),
        ]
        .into_iter()
        .flatten()
        .collect();
        set(FORWARDED, (!forwarded.is_empty()).then(|| forwarded.join(";")));
        set(TRACEPARENT, self.traceparent.map(|trace| trace.to_string()));
        set(NETWORK, self.network.as_ref().map(ToString::to_string));
        set(SOURCE, self.source_kind.as_ref().map(ToString::to_string));
        set(ORIGINAL_PEER, self.original_peer.as_ref().map(ToString::to_string));
    }
}

/// An address of `forwarded` (RFC 7239, section 6), with or without a port.
struct Node(SocketAddr);

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0.port(), self.0.ip()) {
            (0, IpAddr::V4(ip)) => ip.fmt(f),
            (0, IpAddr::V6(ip)) => write!(f, "[{ip}]"),
            _ => self.0.fmt(f),
        }
    }
}

fn node(text: &str) -> Option<SocketAddr> {
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    text.parse().or_else(|_| bare.parse().map(|ip| SocketAddr::new(ip, 0))).ok()
}

fn bounded(value: &str) -> Option<Text> {
    let fits = (1..=MAX_VALUE).contains(&value.len()) && value.bytes().all(|b| b.is_ascii_graphic());
    fits.then(|| value.into())
}

/// What one workload tells about itself in a `baggage` header.
#[derive(Clone, Default, PartialEq, Eq, Hash, Debug)]
pub struct Baggage {
    pub cluster: Option<Text>,
    pub namespace: Option<Text>,
    /// In lower case: `deployment`, `cronjob`, `pod` or `job`. Written only together with `workload`.
    pub workload_type: Option<Text>,
    pub workload: Option<Text>,
    /// Canonical name.
    pub service: Option<Text>,
    /// Canonical revision.
    pub revision: Option<Text>,
    pub region: Option<Text>,
    pub zone: Option<Text>,
}

const WORKLOAD_TYPES: [&str; 4] = ["deployment", "cronjob", "pod", "job"];

impl Baggage {
    /// Takes what it knows and skips the rest.
    pub fn parse(text: &str) -> Self {
        let mut baggage = Self::default();
        for (name, value) in text.split(',').filter_map(|member| member.split_once('=')) {
            // A member may carry properties after its value.
            let value = bounded(value.split(';').next().unwrap_or_default().trim());
            match name.trim() {
                "k8s.cluster.name" => baggage.cluster = value,
                "k8s.namespace.name" => baggage.namespace = value,
                "service.name" => baggage.service = value,
                "service.version" => baggage.revision = value,
                "cloud.region" => baggage.region = value,
                "cloud.availability_zone" => baggage.zone = value,
                name => {
                    let kind = name.strip_prefix("k8s.").and_then(|name| name.strip_suffix(".name"));
                    if let Some(kind) = kind.filter(|kind| WORKLOAD_TYPES.contains(kind))
                        && value.is_some()
                    {
                        baggage.workload_type = Some(kind.into());
                        baggage.workload = value;
                    }
                }
            }
        }
        baggage
    }
}

impl fmt::Display for Baggage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let workload_key = self.workload_type.as_ref().map(|kind| format!("k8s.{kind}.name"));
        let members = [
            ("k8s.cluster.name", &self.cluster),
            ("k8s.namespace.name", &self.namespace),
            (workload_key.as_deref().unwrap_or_default(), &self.workload),
            ("service.name", &self.service),
            ("service.version", &self.revision),
            ("cloud.region", &self.region),
            ("cloud.availability_zone", &self.zone),
        ];
        let mut separator = "";
        for (name, value) in members {
            // A value that would break the list is left out like an empty one.
            let Some(value) = value.as_deref().filter(|value| bounded(value).is_some()) else { continue };
            if name.is_empty() || value.contains([',', ';']) {
                continue;
            }
            write!(f, "{separator}{name}={value}")?;
            separator = ",";
        }
        Ok(())
    }
}

/// W3C trace context of one connection.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct TraceParent {
    trace: u128,
    span: u64,
    flags: u8,
}

impl TraceParent {
    /// A new trace, not sampled.
    pub fn random() -> Self {
        Self { trace: rand::random(), span: rand::random(), flags: 0 }
    }
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace, self.span, self.flags)
    }
}

/// A text that is no trace context.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("not a trace context")]
pub struct TraceParentParseError;

impl FromStr for TraceParent {
    type Err = TraceParentParseError;

    fn from_str(text: &str) -> Result<Self, TraceParentParseError> {
        let parts: Vec<&str> = text.split('-').collect();
        let well_formed = text.len() == 55 && text.bytes().all(|b| b == b'-' || b.is_ascii_hexdigit());
        match parts.as_slice() {
            [version, trace, span, flags]
                if well_formed && (version.len(), trace.len(), span.len(), flags.len()) == (2, 32, 16, 2) =>
            {
                Ok(Self {
                    trace: u128::from_str_radix(trace, 16).map_err(|_| TraceParentParseError)?,
                    span: u64::from_str_radix(span, 16).map_err(|_| TraceParentParseError)?,
                    flags: u8::from_str_radix(flags, 16).map_err(|_| TraceParentParseError)?,
                })
            }
            _ => Err(TraceParentParseError),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn baggage_keeps_order_and_omits_what_is_empty() {
        let text = "k8s.cluster.name=c,k8s.namespace.name=n,k8s.deployment.name=w,service.name=s,service.version=v1,\
                    cloud.region=r,cloud.availability_zone=z";
        assert_eq!(Baggage::parse(text).to_string(), text);
        let partial = Baggage { workload: Some("w".into()), revision: Some("v".into()), ..Baggage::default() };
        assert_eq!(partial.to_string(), "service.version=v");
        let breaking = Baggage { service: Some("a,k8s.namespace.name=root".into()), ..Baggage::default() };
        assert_eq!(breaking.to_string(), "");
    }

    #[test]
    fn headers_survive_the_wire() {
        let headers = ConnectHeaders {
            baggage: Some(Baggage { cluster: Some("c".into()), ..Baggage::default() }),
            forwarded_for: Some("[fd00::1]:80".parse().unwrap()),
            forwarded_host: Some("api.shop.svc.cluster.local".into()),
            traceparent: Some(TraceParent::random()),
            network: Some("west".into()),
            source_kind: Some("waypoint".into()),
            original_peer: Some("spiffe://cluster.local/ns/shop/sa/cart".parse().unwrap()),
        };
        let mut map = HeaderMap::new();
        map.insert(BAGGAGE, HeaderValue::from_static("from=somebody-else"));
        headers.write(&mut map);
        assert_eq!(ConnectHeaders::parse(&map), headers);
        assert_eq!(map["forwarded"], "for=\"[fd00::1]:80\";host=api.shop.svc.cluster.local");
    }

    #[test]
    fn an_address_may_come_without_a_port() {
        for (address, text) in [("10.0.0.1:0", "for=\"10.0.0.1\""), ("[fd00::1]:0", "for=\"[fd00::1]\"")] {
            let headers = ConnectHeaders { forwarded_for: Some(address.parse().unwrap()), ..Default::default() };
            let mut map = HeaderMap::new();
            headers.write(&mut map);
            assert_eq!(map["forwarded"], text);
            assert_eq!(ConnectHeaders::parse(&map), headers);
        }
    }

    #[test]
    fn nonsense_counts_as_absent() {
        let long = "x".repeat(10_000);
        for value in ["", "=", ",,,", ";;;", "for=", "for=\"", "k8s..name=x", "k8s.name=", "\u{7f}", &long] {
            let mut map = HeaderMap::new();
            for name in [BAGGAGE, FORWARDED, TRACEPARENT, ORIGINAL_PEER] {
                if let Ok(value) = HeaderValue::from_str(value) {
                    map.insert(name, value);
                }
            }
            assert_eq!(ConnectHeaders::parse(&map), ConnectHeaders::default(), "{value}");
        }
        let mut map = HeaderMap::new();
        map.insert(BAGGAGE, HeaderValue::from_bytes(b"service.name=\xff").unwrap());
        assert_eq!(ConnectHeaders::parse(&map), ConnectHeaders::default());
    }
}
