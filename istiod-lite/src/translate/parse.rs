//! Values of AuthorizationPolicy fields, and what to do with those that cannot be read. A closed door stays closed: an
//! unreadable value never lets an ALLOW rule match more, nor a DENY rule match less, than what the user may have meant.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use bytes::Bytes;
use ipnet::IpNet;

use super::address_bytes;
use super::mesh_config;
use super::verdict::{EXPLAIN, Fault, MOST_FAULTS, Problem};
use crate::types::Lenient;

/// Of `trustDomains` and `notTrustDomains`, which proxies have no field for.
pub const NO_TRUST_DOMAINS: &str = "is not supported yet (write principals as DOMAIN/*)";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Allow,
    Deny,
}

/// `x` or `notX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Polarity {
    Positive,
    Negative,
}

/// What a rule becomes when part of it cannot be enforced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DropRule;

/// Why a value cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    pub what: &'static str,
    pub mend: String,
}

impl Mistake {
    pub fn new(what: &'static str, mend: impl Into<String>) -> Self {
        Self { what, mend: mend.into() }
    }
}

/// The part of a rule that is being read, by its place in the list.
#[derive(Debug, Clone, Copy)]
pub enum Part {
    From(usize),
    To(usize),
    When(usize),
}

/// Reads the fields of one rule, remembering what was wrong.
#[derive(Debug)]
pub struct Reader {
    pub action: Action,
    /// The rule's place in the list.
    pub rule: usize,
    pub part: Option<Part>,
    /// For the status message.
    pub problems: Vec<Problem>,
    /// A field was left out because of an unreadable value, so an empty match must match everything, not nothing.
    pub widened: bool,
    /// All names of the trust domain, if it has several.
    domains: Arc<[String]>,
}

impl Reader {
    pub fn new(action: Action, rule: usize, domains: &Arc<[String]>) -> Self {
        Self { action, rule, part: None, problems: Vec::new(), widened: false, domains: Arc::clone(domains) }
    }

    /// The path of a field of the part that is being read.
    fn path(&self, field: &str, polarity: Polarity) -> String {
        let rule = self.rule;
        match self.part {
            None => format!("spec.rules[{rule}].{field}"),
            Some(Part::From(index)) => format!("spec.rules[{rule}].from[{index}].source.{field}"),
            Some(Part::To(index)) => format!("spec.rules[{rule}].to[{index}].operation.{field}"),
            Some(Part::When(index)) => match polarity {
                Polarity::Positive => format!("spec.rules[{rule}].when[{index}].values"),
                Polarity::Negative => format!("spec.rules[{rule}].when[{index}].notValues"),
            },
        }
    }

    /// The rule as a whole, where it can be read.
    pub fn whole<'a, T>(&mut self, rule: &'a Lenient<T>) -> Option<&'a T> {
        match rule {
            Lenient::Good(rule) => Some(rule),
            Lenient::Bad(reason) => {
                let text = format!("cannot be read: {reason}; {EXPLAIN}");
                let fault = Fault::new(format!("spec.rules[{}]", self.rule), text);
                self.problems.push(Problem { message: reason.clone(), fault: Some(fault) });
                None
            }
        }
    }

    /// The readable values of a field; empty = the field does not constrain.
    ///
    /// | | ALLOW | DENY |
    /// |---|---|---|
    /// | positive, bad value | skipped (narrower); none left: rule dropped | field dropped (wider) |
    /// | negative, bad value | rule dropped | skipped (wider) |
    pub fn field<T>(
        &mut self,
        field: &str,
        polarity: Polarity,
        raw: &[String],
        parse: impl Fn(&str) -> Result<T, Mistake>,
    ) -> Result<Vec<T>, DropRule> {
        let mut good = Vec::with_capacity(raw.len());
        let before = self.problems.len();
        for value in raw {
            match parse(value) {
                Ok(value) => good.push(value),
                Err(Mistake { what, mend }) => {
                    let fault = || Fault::new(self.path(field, polarity), format!("{value:?}: {what}; {mend}"));
                    let fault = (self.problems.len() < MOST_FAULTS).then(fault);
                    self.problems.push(Problem { message: format!("{field}: {value:?}: {what}"), fault });
                }
            }
        }
        if self.problems.len() == before {
            return Ok(good);
        }
        match (self.action, polarity) {
            (Action::Allow, Polarity::Positive) if !good.is_empty() => Ok(good),
            (Action::Allow, _) => Err(DropRule),
            (Action::Deny, Polarity::Positive) => {
                self.widened = true;
                Ok(Vec::new())
            }
            (Action::Deny, Polarity::Negative) => {
                self.widened |= good.is_empty();
                Ok(good)
            }
        }
    }

    /// As [`Self::field`], of principals: each under every name of its trust domain.
    pub fn principals<T>(
        &mut self,
        field: &str,
        polarity: Polarity,
        raw: &[String],
        parse: impl Fn(&str) -> Result<T, Mistake>,
    ) -> Result<Vec<T>, DropRule> {
        if self.domains.is_empty() {
            return self.field(field, polarity, raw, parse);
        }
        let mut all: Vec<String> = Vec::with_capacity(raw.len());
        for name in raw.iter().flat_map(|written| mesh_config::principals(written, &self.domains)) {
            if !all.contains(&name) {
                all.push(name);
            }
        }
        self.field(field, polarity, &all, parse)
    }

    /// An attribute that is present and cannot be enforced here: the rule goes in ALLOW, the attribute in DENY.
    pub fn unsupported(&mut self, attribute: &str, present: bool, why: &str) -> Result<(), DropRule> {
        if !present {
            return Ok(());
        }
        self.problem(format!("{attribute}: {why}").into())
    }

    /// As [`Self::unsupported`], of the key of a condition that there is not.
    pub fn unknown_key(&mut self, key: &str) -> Result<(), DropRule> {
        let place = match self.part {
            Some(Part::When(index)) => format!("spec.rules[{}].when[{index}].key", self.rule),
            _ => format!("spec.rules[{}].when", self.rule),
        };
        let text = format!("there is no attribute {key:?}; name one of source, destination, request or connection");
        self.problem(Problem { message: format!("when {key:?}: is unknown"), fault: Some(Fault::new(place, text)) })
    }

    fn problem(&mut self, problem: Problem) -> Result<(), DropRule> {
        self.problems.push(problem);
        match self.action {
            Action::Allow => Err(DropRule),
            Action::Deny => Ok(()),
        }
    }
}

/// How a string is compared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Text {
    Exact(String),
    Prefix(String),
    Suffix(String),
    Present,
}

/// `*`, `*x`, `x*`, or exact; a `*` elsewhere is literal.
pub fn text(value: &str) -> Result<Text, Mistake> {
    Ok(match (value, value.strip_prefix('*'), value.strip_suffix('*')) {
        ("", _, _) => return Err(Mistake::new("empty", "take it out, or write \"*\" for any value")),
        ("*", _, _) => Text::Present,
        (_, Some(suffix), _) => Text::Suffix(suffix.to_owned()),
        (_, None, Some(prefix)) => Text::Prefix(prefix.to_owned()),
        _ => Text::Exact(value.to_owned()),
    })
}

/// An address or a prefix: bytes and length in bits.
pub fn ip_block(value: &str) -> Result<(Bytes, u32), Mistake> {
    let net = match value.parse::<IpNet>() {
        Ok(net) => net.trunc(),
        Err(_) => {
            let address =
                value.parse::<IpAddr>().map_err(|_| Mistake::new("neither an address nor a CIDR", meant(value)));
            IpNet::from(address?)
        }
    };
    Ok((address_bytes(net.addr()), u32::from(net.prefix_len())))
}

/// How to write what is not quite a block of IPv4 addresses: `10.0/16`, `10.1.*`, `10.0.0.0/255.0.0.0`.
fn meant(value: &str) -> String {
    const EXAMPLE: &str = "write it as 10.1.2.3 or 10.1.0.0/16";
    let (address, length) = value.split_once('/').map_or((value, None), |(address, length)| (address, Some(length)));
    let octets: Vec<u8> = address.split('.').map_while(|octet| octet.parse().ok()).collect();
    let rest = address.split('.').skip(octets.len()).all(|octet| matches!(octet, "*" | ""));
    if octets.is_empty() || octets.len() > 4 || !rest {
        return EXAMPLE.into();
    }
    let length = match length {
        None => 8 * octets.len(),
        Some(length) => match (length.parse::<u8>(), length.parse::<Ipv4Addr>().map(u32::from)) {
            (Ok(length), _) if length <= 32 => length.into(),
            (_, Ok(mask)) if mask.leading_ones() == mask.count_ones() => mask.count_ones() as usize,
            _ => return EXAMPLE.into(),
        },
    };
    let octet = |index: usize| octets.get(index).copied().unwrap_or_default();
    format!("write it as {}/{length}", Ipv4Addr::new(octet(0), octet(1), octet(2), octet(3)))
}

pub fn port(value: &str) -> Result<u32, Mistake> {
    let port = value.parse::<u16>().map(u32::from);
    port.map_err(|_| Mistake::new("not a port (0 to 65535)", "write the number of one port"))
}

/// `ns/sa`, or `sa` in the policy's namespace.
pub fn service_account(value: &str, policy_namespace: &str) -> Result<(String, String), Mistake> {
    let (namespace, name) = value.split_once('/').unwrap_or((policy_namespace, value));
    if namespace.is_empty() || name.is_empty() || name.contains('/') {
        let mend = "write the account's name, with its namespace and / before it unless that is the policy's own";
        return Err(Mistake::new("neither `name` nor `namespace/name`", mend));
    }
    Ok((namespace.to_owned(), name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(action: Action, polarity: Polarity, raw: &[&str]) -> (Result<usize, DropRule>, bool) {
        let raw: Vec<String> = raw.iter().map(ToString::to_string).collect();
        let mut reader = Reader::new(action, 0, &Arc::default());
        let read = reader.field("ipBlocks", polarity, &raw, ip_block).map(|values| values.len());
        assert!(!reader.problems.is_empty());
        (read, reader.widened)
    }

    #[test]
    fn an_unreadable_value_never_opens_a_door() {
        use Action::{Allow, Deny};
        use Polarity::{Negative, Positive};
        assert_eq!(blocks(Allow, Positive, &["x", "10.0.0.0/8"]), (Ok(1), false));
        assert_eq!(blocks(Allow, Positive, &["x"]), (Err(DropRule), false));
        assert_eq!(blocks(Allow, Negative, &["x", "10.0.0.0/8"]), (Err(DropRule), false));
        assert_eq!(blocks(Deny, Positive, &["x", "10.0.0.0/8"]), (Ok(0), true));
        assert_eq!(blocks(Deny, Negative, &["x", "10.0.0.0/8"]), (Ok(1), false));
        assert_eq!(blocks(Deny, Negative, &["x"]), (Ok(0), true));
    }

    #[test]
    fn wildcards_stand_at_the_ends_only() {
        assert_eq!(text("*"), Ok(Text::Present));
        assert_eq!(text("*b"), Ok(Text::Suffix("b".into())));
        assert_eq!(text("a*"), Ok(Text::Prefix("a".into())));
        assert_eq!(text("a*b"), Ok(Text::Exact("a*b".into())));
    }

    #[test]
    fn what_is_almost_a_block_is_told_how_to_be_one() {
        for (written, meant) in [
            ("10.0.0/8", "10.0.0.0/8"),
            ("10.0/16", "10.0.0.0/16"),
            ("10.1.*", "10.1.0.0/16"),
            ("192.168.", "192.168.0.0/16"),
            ("10.0.0.0/255.0.0.0", "10.0.0.0/8"),
            ("10.0.0.0/33", "10.1.2.3 or 10.1.0.0/16"),
            ("10.0.0.256", "10.1.2.3 or 10.1.0.0/16"),
            ("localhost", "10.1.2.3 or 10.1.0.0/16"),
            ("1.2.3.4.5", "10.1.2.3 or 10.1.0.0/16"),
            ("", "10.1.2.3 or 10.1.0.0/16"),
        ] {
            assert_eq!(ip_block(written).unwrap_err().mend, format!("write it as {meant}"), "{written}");
        }
    }

    #[test]
    fn a_fault_has_the_path_of_its_value() {
        let mut reader = Reader::new(Action::Deny, 2, &Arc::default());
        let mut path = |part, polarity| {
            reader.part = part;
            reader.field("ports", polarity, &["x".into()], port).unwrap();
            reader.problems.pop().unwrap().fault.unwrap().field
        };
        assert_eq!(path(None, Polarity::Positive), "spec.rules[2].ports");
        assert_eq!(path(Some(Part::From(1)), Polarity::Positive), "spec.rules[2].from[1].source.ports");
        assert_eq!(path(Some(Part::To(0)), Polarity::Positive), "spec.rules[2].to[0].operation.ports");
        assert_eq!(path(Some(Part::When(3)), Polarity::Positive), "spec.rules[2].when[3].values");
        assert_eq!(path(Some(Part::When(3)), Polarity::Negative), "spec.rules[2].when[3].notValues");
    }

    #[test]
    fn a_bare_address_is_a_whole_prefix() {
        assert_eq!(ip_block("10.1.2.3").unwrap().1, 32);
        assert_eq!(ip_block("fd00::1").unwrap().1, 128);
        assert_eq!(ip_block("10.1.2.3/8").unwrap(), (Bytes::from_static(&[10, 0, 0, 0]), 8));
        assert!(ip_block("10.0.0.0/33").is_err());
    }
}
