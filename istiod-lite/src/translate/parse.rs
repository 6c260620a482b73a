//! Values of AuthorizationPolicy fields, and what to do with those that cannot be read. A closed door stays closed: an
//! unreadable value never lets an ALLOW rule match more, nor a DENY rule match less, than what the user may have meant.

use bytes::Bytes;
use ipnet::IpNet;

use super::address_bytes;

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

/// Reads the fields of one rule, remembering what was wrong.
#[derive(Debug)]
pub struct Reader {
    pub action: Action,
    /// For the status message.
    pub problems: Vec<String>,
    /// A field was left out because of an unreadable value, so an empty match must match everything, not nothing.
    pub widened: bool,
}

impl Reader {
    pub fn new(action: Action) -> Self {
        Self { action, problems: Vec::new(), widened: false }
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
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Result<Vec<T>, DropRule> {
        let mut good = Vec::with_capacity(raw.len());
        let before = self.problems.len();
        for value in raw {
            match parse(value) {
                Ok(value) => good.push(value),
                Err(reason) => self.problems.push(format!("{field}: {value:?}: {reason}")),
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

    /// An attribute that is present and cannot be enforced here: the rule goes in ALLOW, the attribute in DENY.
    pub fn unsupported(&mut self, attribute: &str, present: bool, why: &str) -> Result<(), DropRule> {
        if !present {
            return Ok(());
        }
        self.problems.push(format!("{attribute}: {why}"));
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
pub fn text(value: &str) -> Result<Text, String> {
    Ok(match (value, value.strip_prefix('*'), value.strip_suffix('*')) {
        ("", _, _) => return Err("empty".into()),
        ("*", _, _) => Text::Present,
        (_, Some(suffix), _) => Text::Suffix(suffix.to_owned()),
        (_, None, Some(prefix)) => Text::Prefix(prefix.to_owned()),
        _ => Text::Exact(value.to_owned()),
    })
}

/// An address or a prefix: bytes and length in bits.
pub fn ip_block(value: &str) -> Result<(Bytes, u32), String> {
    let net = match value.parse::<IpNet>() {
        Ok(net) => net.trunc(),
        Err(_) => IpNet::from(value.parse::<std::net::IpAddr>().map_err(|_| "neither an address nor a CIDR")?),
    };
    Ok((address_bytes(net.addr()), u32::from(net.prefix_len())))
}

pub fn port(value: &str) -> Result<u32, String> {
    value.parse::<u16>().map(u32::from).map_err(|_| "not a port (0 to 65535)".into())
}

/// `ns/sa`, or `sa` in the policy's namespace.
pub fn service_account(value: &str, policy_namespace: &str) -> Result<(String, String), String> {
    let (namespace, name) = value.split_once('/').unwrap_or((policy_namespace, value));
    if namespace.is_empty() || name.is_empty() || name.contains('/') {
        return Err("neither `name` nor `namespace/name`".into());
    }
    Ok((namespace.to_owned(), name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(action: Action, polarity: Polarity, raw: &[&str]) -> (Result<usize, DropRule>, bool) {
        let raw: Vec<String> = raw.iter().map(ToString::to_string).collect();
        let mut reader = Reader::new(action);
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
    fn a_bare_address_is_a_whole_prefix() {
        assert_eq!(ip_block("10.1.2.3").unwrap().1, 32);
        assert_eq!(ip_block("fd00::1").unwrap().1, 128);
        assert_eq!(ip_block("10.1.2.3/8").unwrap(), (Bytes::from_static(&[10, 0, 0, 0]), 8));
        assert!(ip_block("10.0.0.0/33").is_err());
    }
}
