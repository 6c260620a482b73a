//! From the wire resource to matchers. What cannot be read closes the door (see [`HttpPolicy::unreadable`]).

use std::net::IpAddr;
use std::sync::Arc;

use http::HeaderName;
use ipnet::IpNet;
use mesh_proto::waypoint::{self as wire, string_match::MatchType};

use super::{Action, Condition, ConditionValues, Field, HttpPolicy, Key, Operation, PathMatch, Rule, Source, Text};
use crate::policy::template::PathTemplate;

/// Why a policy resource is refused; until it is mended everything in its reach is denied.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    #[error("action {0} is not known")]
    Action(i32),
    #[error("{what} {value:?} is not valid")]
    Invalid { what: &'static str, value: String },
    #[error("string match without a kind")]
    EmptyMatch,
    #[error("condition key {0:?} is not supported")]
    Key(String),
}

impl HttpPolicy {
    /// # Errors
    /// The first thing that cannot be enforced.
    pub fn compile(p: &wire::HttpPolicy) -> Result<Self, PolicyError> {
        let action = match wire::Action::try_from(p.action).map_err(|_| PolicyError::Action(p.action))? {
            wire::Action::Allow => Action::Allow,
            wire::Action::Deny => Action::Deny,
            wire::Action::Audit => Action::Audit,
        };
        Ok(Self {
            name: full_name(p),
            action,
            dry_run: p.dry_run,
            services: services(p),
            rules: p.rules.iter().map(rule).collect::<Result<_, _>>()?,
            unreadable: None,
        })
    }

    /// A stand-in for a policy that could not be compiled: it refuses everything in its reach.
    pub fn unreadable(p: &wire::HttpPolicy, reason: &PolicyError) -> Self {
        Self {
            name: full_name(p),
            action: Action::Unreadable,
            dry_run: false,
            services: services(p),
            rules: Vec::new(),
            unreadable: Some(reason.to_string().into()),
        }
    }
}

fn full_name(p: &wire::HttpPolicy) -> Arc<str> {
    format!("{}/{}", p.namespace, p.name).into()
}

fn services(p: &wire::HttpPolicy) -> Vec<Arc<str>> {
    p.services.iter().map(|s| s.as_str().into()).collect()
}

fn rule(r: &wire::HttpRule) -> Result<Rule, PolicyError> {
    Ok(Rule {
        from: r.from.iter().map(source).collect::<Result<_, _>>()?,
        to: r.to.iter().map(operation).collect::<Result<_, _>>()?,
        when: r.when.iter().map(condition).collect::<Result<_, _>>()?,
    })
}

fn source(s: &wire::Source) -> Result<Source, PolicyError> {
    Ok(Source {
        principals: field(&s.principals, &s.not_principals, text)?,
        namespaces: field(&s.namespaces, &s.not_namespaces, text)?,
        service_accounts: field(&s.service_accounts, &s.not_service_accounts, |v| {
            v.split_once('/')
                .map(|(ns, sa)| (ns.into(), sa.into()))
                .ok_or_else(|| PolicyError::Invalid { what: "service account", value: v.clone() })
        })?,
        ips: field(&s.ip_blocks, &s.not_ip_blocks, ip_block)?,
    })
}

fn operation(o: &wire::Operation) -> Result<Operation, PolicyError> {
    let host = |m: &wire::StringMatch| text(m).map(lower);
    let port = |p: &u32| u16::try_from(*p).map_err(|_| PolicyError::Invalid { what: "port", value: p.to_string() });
    Ok(Operation {
        hosts: field(&o.hosts, &o.not_hosts, host)?,
        ports: field(&o.ports, &o.not_ports, port)?,
        methods: field(&o.methods, &o.not_methods, text)?,
        paths: field(&o.paths, &o.not_paths, path)?,
    })
}

fn condition(c: &wire::Condition) -> Result<Condition, PolicyError> {
    let key = key(&c.key)?;
    let values = match key {
        Key::SourceIp | Key::DestinationIp => ConditionValues::Ip(field(&c.values, &c.not_values, ip_text)?),
        _ => ConditionValues::Text(field(&c.values, &c.not_values, text)?),
    };
    Ok(Condition { key, values })
}

fn key(text: &str) -> Result<Key, PolicyError> {
    if let Some(name) = text.strip_prefix("request.headers[").and_then(|rest| rest.strip_suffix(']')) {
        return HeaderName::from_bytes(name.as_bytes())
            .map(Key::Header)
            .map_err(|_| PolicyError::Invalid { what: "header name", value: name.to_owned() });
    }
    Ok(match text {
        "source.ip" => Key::SourceIp,
        "source.namespace" => Key::SourceNamespace,
        "source.principal" => Key::SourcePrincipal,
        "source.serviceAccount" => Key::SourceServiceAccount,
        "source.trustDomain" => Key::SourceTrustDomain,
        "destination.ip" => Key::DestinationIp,
        "destination.port" => Key::DestinationPort,
        other => return Err(PolicyError::Key(other.to_owned())),
    })
}

fn field<W, T>(any: &[W], none: &[W], parse: impl Fn(&W) -> Result<T, PolicyError>) -> Result<Field<T>, PolicyError> {
    Ok(Field {
        any: any.iter().map(&parse).collect::<Result<_, _>>()?,
        none: none.iter().map(&parse).collect::<Result<_, _>>()?,
    })
}

fn text(m: &wire::StringMatch) -> Result<Text, PolicyError> {
    match m.match_type.as_ref().ok_or(PolicyError::EmptyMatch)? {
        MatchType::Exact(t) => Ok(Text::Exact(t.as_str().into())),
        MatchType::Prefix(t) => Ok(Text::Prefix(t.as_str().into())),
        MatchType::Suffix(t) => Ok(Text::Suffix(t.as_str().into())),
        MatchType::Presence(()) => Ok(Text::Present),
        MatchType::Template(t) => Err(PolicyError::Invalid { what: "template outside of paths", value: t.clone() }),
    }
}

fn lower(text: Text) -> Text {
    match text {
        Text::Exact(t) => Text::Exact(t.to_ascii_lowercase().into()),
        Text::Prefix(t) => Text::Prefix(t.to_ascii_lowercase().into()),
        Text::Suffix(t) => Text::Suffix(t.to_ascii_lowercase().into()),
        Text::Present => Text::Present,
    }
}

fn path(m: &wire::StringMatch) -> Result<PathMatch, PolicyError> {
    if let Some(MatchType::Template(t)) = &m.match_type {
        return PathTemplate::parse(t)
            .map(PathMatch::Template)
            .ok_or_else(|| PolicyError::Invalid { what: "path template", value: t.clone() });
    }
    text(m).map(PathMatch::Text)
}

fn ip_block(b: &wire::IpBlock) -> Result<IpNet, PolicyError> {
    let bad = || PolicyError::Invalid { what: "IP block", value: format!("{:?}/{}", b.address, b.length) };
    let address = match b.address.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(&b.address[..]).map_err(|_| bad())?),
        16 => IpAddr::from(<[u8; 16]>::try_from(&b.address[..]).map_err(|_| bad())?),
        _ => return Err(bad()),
    };
    IpNet::new(address, u8::try_from(b.length).map_err(|_| bad())?).map_err(|_| bad())
}

fn ip_text(m: &wire::StringMatch) -> Result<IpNet, PolicyError> {
    let bad = |value: String| PolicyError::Invalid { what: "IP block", value };
    match &m.match_type {
        Some(MatchType::Exact(t)) => {
            t.parse::<IpNet>().or_else(|_| t.parse::<IpAddr>().map(IpNet::from)).map_err(|_| bad(t.clone()))
        }
        other => Err(bad(format!("{other:?}"))),
    }
}
