//! The matching rules: groups are ORed, clauses of a group ANDed, matches of a clause ORed, fields of a match ANDed and
//! the values of a field ORed. The empty cases are where the semantics live; each has a test by name.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::Connection;
use crate::identity::Identity;

/// Matches when all clauses do; none = always.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Group(pub Vec<Clause>);

/// Matches when any match does; none = always.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Clause(pub Vec<Match>);

/// Conditions on a connection. An empty field does not constrain; a match with nothing but empty fields never matches.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Match {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub namespaces: Vec<StringMatch>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_namespaces: Vec<StringMatch>,
    /// Against the SPIFFE ID without its scheme.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub principals: Vec<StringMatch>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_principals: Vec<StringMatch>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub service_accounts: Vec<ServiceAccountMatch>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_service_accounts: Vec<ServiceAccountMatch>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub source_ips: Vec<Cidr>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_source_ips: Vec<Cidr>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub destination_ips: Vec<Cidr>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_destination_ips: Vec<Cidr>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub destination_ports: Vec<u16>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_destination_ports: Vec<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StringMatch {
    Exact(String),
    Prefix(String),
    Suffix(String),
    /// Any text but the empty one. Written `Presence: []`.
    Presence([(); 0]),
}

impl StringMatch {
    fn matches(&self, text: &str) -> bool {
        match self {
            Self::Exact(exact) => text == exact,
            Self::Prefix(prefix) => text.starts_with(prefix.as_str()),
            Self::Suffix(suffix) => text.ends_with(suffix.as_str()),
            Self::Presence(_) => !text.is_empty(),
        }
    }
}

/// A service account, whatever its trust domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServiceAccountMatch {
    pub namespace: String,
    pub service_account: String,
}

/// An address range; a lone address reads as the range that holds only it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct Cidr(pub IpNet);

impl TryFrom<String> for Cidr {
    type Error = ipnet::AddrParseError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse::<IpNet>().or_else(|error| text.parse::<IpAddr>().map(IpNet::from).map_err(|_| error)).map(Cidr)
    }
}

/// The connection in the form the rules compare with, made once per decision.
pub(super) struct Subject<'a> {
    peer: Source<'a>,
    original: Option<Source<'a>>,
    destination_ip: IpAddr,
    destination_port: u16,
}

/// One of whom a connection comes from.
struct Source<'a> {
    /// SPIFFE ID without the scheme; empty without an identity.
    principal: String,
    namespace: &'a str,
    service_account: Option<&'a str>,
    ip: IpAddr,
}

impl<'a> Subject<'a> {
    pub(super) fn new(conn: &'a Connection) -> Self {
        Self {
            peer: Source::new(conn.source.as_ref(), conn.source_ip),
            original: conn.original.as_ref().map(|o| Source::new(Some(&o.identity), o.address.ip())),
            destination_ip: conn.destination.ip().to_canonical(),
            destination_port: conn.destination.port(),
        }
    }

    fn sources(&self) -> impl Iterator<Item = &Source<'a>> {
        std::iter::once(&self.peer).chain(&self.original)
    }
}

impl<'a> Source<'a> {
    fn new(identity: Option<&'a Identity>, ip: IpAddr) -> Self {
        let spiffe = identity.map(ToString::to_string).unwrap_or_default();
        Self {
            principal: spiffe.strip_prefix("spiffe://").unwrap_or(&spiffe).to_owned(),
            namespace: identity.map_or("", |identity| identity.namespace()),
            service_account: identity.map(|identity| &**identity.service_account()),
            ip: ip.to_canonical(),
        }
    }

    /// Without an identity a pattern holds for nobody, so that `not_principals` holds for everybody unidentified.
    fn principal_is(&self, pattern: &StringMatch) -> bool {
        !self.principal.is_empty() && pattern.matches(&self.principal)
    }

    fn service_account_is(&self, wanted: &ServiceAccountMatch) -> bool {
        self.service_account == Some(&wanted.service_account) && self.namespace == wanted.namespace
    }
}

pub(super) fn any_matches(groups: &[Group], subject: &Subject<'_>) -> bool {
    first_match(groups, subject).is_some()
}

/// A group matches as a whole by one of the sources: half of it by the waypoint's identity and half by the client's
/// address would be nobody's.
pub(super) fn first_match(groups: &[Group], subject: &Subject<'_>) -> Option<usize> {
    let matches = |group: &Group, source| group.0.iter().all(|clause| clause.matches(source, subject));
    groups.iter().position(|group| subject.sources().any(|source| matches(group, source)))
}

impl Clause {
    fn matches(&self, source: &Source<'_>, subject: &Subject<'_>) -> bool {
        self.0.is_empty() || self.0.iter().any(|m| m.matches(source, subject))
    }
}

/// A positive list constrains only when it has entries.
fn any_of<T>(list: &[T], holds: impl Fn(&T) -> bool) -> bool {
    list.is_empty() || list.iter().any(holds)
}

fn none_of<T>(list: &[T], holds: impl Fn(&T) -> bool) -> bool {
    !list.iter().any(holds)
}

impl Match {
    /// What is demanded must hold for `source`, what is excluded for none of the subject's.
    fn matches(&self, source: &Source<'_>, subject: &Subject<'_>) -> bool {
        let destination = |cidr: &Cidr| cidr.0.contains(&subject.destination_ip);
        let port = |port: &u16| *port == subject.destination_port;
        !self.is_empty()
            && any_of(&self.destination_ports, port)
            && none_of(&self.not_destination_ports, port)
            && any_of(&self.namespaces, |m| m.matches(source.namespace))
            && any_of(&self.service_accounts, |m| source.service_account_is(m))
            && any_of(&self.principals, |m| source.principal_is(m))
            && any_of(&self.source_ips, |m| m.0.contains(&source.ip))
            && subject.sources().all(|source| !self.excludes(source))
            && any_of(&self.destination_ips, destination)
            && none_of(&self.not_destination_ips, destination)
    }

    fn excludes(&self, source: &Source<'_>) -> bool {
        self.not_namespaces.iter().any(|m| m.matches(source.namespace))
            || self.not_service_accounts.iter().any(|m| source.service_account_is(m))
            || self.not_principals.iter().any(|m| source.principal_is(m))
            || self.not_source_ips.iter().any(|m| m.0.contains(&source.ip))
    }

    /// Listing every field by name, so that a new one cannot be forgotten here.
    fn is_empty(&self) -> bool {
        let Self {
            namespaces,
            not_namespaces,
            principals,
            not_principals,
            service_accounts,
            not_service_accounts,
            source_ips,
            not_source_ips,
            destination_ips,
            not_destination_ips,
            destination_ports,
            not_destination_ports,
        } = self;
        [namespaces, not_namespaces, principals, not_principals].into_iter().all(Vec::is_empty)
            && [service_accounts, not_service_accounts].into_iter().all(Vec::is_empty)
            && [source_ips, not_source_ips, destination_ips, not_destination_ips].into_iter().all(Vec::is_empty)
            && [destination_ports, not_destination_ports].into_iter().all(Vec::is_empty)
    }
}
