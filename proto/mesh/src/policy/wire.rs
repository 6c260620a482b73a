//! From the wire's Authorization to [`Policy`]. Strict: a policy with one part we cannot read is refused as a whole,
//! because leaving that part out would widen an ALLOW or narrow a DENY.

use ipnet::IpNet;
use mesh_proto::security as wire;

use super::*;
use crate::model::{ModelError, ip_from_bytes};

/// Why a policy was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    #[error("{0} is empty")]
    Empty(&'static str),
    #[error("{field}: {value} is not a known value")]
    UnknownEnum { field: &'static str, value: i32 },
    #[error("{0}: a string match without a kind this version knows")]
    StringMatch(&'static str),
    #[error(transparent)]
    Address(#[from] ModelError),
    #[error("{field}: prefix length {length} exceeds the address")]
    PrefixLength { field: &'static str, length: u32 },
    #[error("{field}: {value} is not a port")]
    Port { field: &'static str, value: u32 },
}

impl TryFrom<wire::Authorization> for Policy {
    type Error = PolicyError;

    fn try_from(policy: wire::Authorization) -> Result<Self, PolicyError> {
        if policy.name.is_empty() {
            return Err(PolicyError::Empty("name"));
        }
        let action = match wire::Action::try_from(policy.action) {
            Ok(wire::Action::Allow) => Action::Allow,
            Ok(wire::Action::Deny) => Action::Deny,
            Err(_) => return Err(PolicyError::UnknownEnum { field: "action", value: policy.action }),
        };
        let scope = scope(policy.scope)?;
        let groups = policy.groups.into_iter().map(group).collect::<Result<_, _>>()?;
        let key = NamespacedName::new(policy.namespace, policy.name);
        Ok(Policy { key, scope, body: Body::Rules { action, groups, dry_run: policy.dry_run } })
    }
}

pub(super) fn scope(value: i32) -> Result<Scope, PolicyError> {
    match wire::Scope::try_from(value) {
        Ok(wire::Scope::Global) => Ok(Scope::Global),
        Ok(wire::Scope::Namespace) => Ok(Scope::Namespace),
        Ok(wire::Scope::WorkloadSelector) => Ok(Scope::WorkloadSelector),
        Err(_) => Err(PolicyError::UnknownEnum { field: "scope", value }),
    }
}

impl Policy {
    /// What stands in the store for a policy that [`TryFrom`] refused with `error`: nothing for a dry-run policy, else a
    /// closed door. Where even its scope is unreadable it governs its namespace and whoever lists it.
    pub fn refused(policy: &wire::Authorization, key: NamespacedName, error: &PolicyError) -> Option<Self> {
        let scope = scope(policy.scope).unwrap_or_default();
        (!policy.dry_run).then(|| Self::unreadable(key, scope, error.to_string()))
    }
}

fn group(group: wire::Group) -> Result<Group, PolicyError> {
    group.rules.into_iter().map(clause).collect::<Result<_, _>>().map(Group)
}

fn clause(clause: wire::Clause) -> Result<Clause, PolicyError> {
    clause.matches.into_iter().map(match_).collect::<Result<_, _>>().map(Clause)
}

fn match_(m: wire::Match) -> Result<Match, PolicyError> {
    Ok(Match {
        namespaces: strings("namespaces", m.namespaces)?,
        not_namespaces: strings("not_namespaces", m.not_namespaces)?,
        principals: strings("principals", m.principals)?,
        not_principals: strings("not_principals", m.not_principals)?,
        service_accounts: accounts(m.service_accounts),
        not_service_accounts: accounts(m.not_service_accounts),
        source_ips: cidrs("source_ips", m.source_ips)?,
        not_source_ips: cidrs("not_source_ips", m.not_source_ips)?,
        destination_ips: cidrs("destination_ips", m.destination_ips)?,
        not_destination_ips: cidrs("not_destination_ips", m.not_destination_ips)?,
        destination_ports: ports("destination_ports", m.destination_ports)?,
        not_destination_ports: ports("not_destination_ports", m.not_destination_ports)?,
    })
}

fn strings(field: &'static str, list: Vec<wire::StringMatch>) -> Result<Vec<StringMatch>, PolicyError> {
    use wire::string_match::MatchType;
    list.into_iter()
        .map(|m| match m.match_type {
            Some(MatchType::Exact(text)) => Ok(StringMatch::Exact(text)),
            Some(MatchType::Prefix(text)) => Ok(StringMatch::Prefix(text)),
            Some(MatchType::Suffix(text)) => Ok(StringMatch::Suffix(text)),
            Some(MatchType::Presence(())) => Ok(StringMatch::Presence([])),
            None => Err(PolicyError::StringMatch(field)),
        })
        .collect()
}

fn accounts(list: Vec<wire::ServiceAccountMatch>) -> Vec<ServiceAccountMatch> {
    list.into_iter()
        .map(|m| ServiceAccountMatch { namespace: m.namespace, service_account: m.service_account })
        .collect()
}

fn cidrs(field: &'static str, list: Vec<wire::Address>) -> Result<Vec<Cidr>, PolicyError> {
    list.into_iter()
        .map(|range| {
            let error = PolicyError::PrefixLength { field, length: range.length };
            let address = ip_from_bytes(field, &range.address)?;
            // An IPv4-mapped range counts its prefix from the front of the 128 bits.
            let mapped = if address.is_ipv4() && range.address.len() == 16 { 96 } else { 0 };
            let length = range.length.checked_sub(mapped).and_then(|length| u8::try_from(length).ok());
            length.and_then(|length| IpNet::new(address, length).ok()).map(Cidr).ok_or(error)
        })
        .collect()
}

fn ports(field: &'static str, list: Vec<u32>) -> Result<Vec<u16>, PolicyError> {
    list.into_iter().map(|value| u16::try_from(value).map_err(|_| PolicyError::Port { field, value })).collect()
}
