//! What an expression handles: values that lie in the object, seen through its schema, and those made on the way.
//! Nothing of the object is copied. What the schema does not know is not there.

use std::ops::Deref;
use std::rc::Rc;
use std::sync::LazyLock;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

type Fields = serde_json::Map<String, Value>;

/// One value. The lifetime is that of the object and of the rule, whose literals it borrows.
#[derive(Debug, Clone)]
pub enum Val<'v> {
    Null,
    Bool(bool),
    Int(i64),
    UInt(u64),
    Double(f64),
    Text(Text<'v>),
    Bytes(Rc<[u8]>),
    /// Nanoseconds, as Go counts.
    Duration(i64),
    Timestamp(OffsetDateTime),
    List(List<'v>),
    Map(Map<'v>),
    /// Fields, with the schema that names them.
    Object(&'v Fields, &'v Value),
    Optional(Option<Rc<Val<'v>>>),
    Type(&'static str),
}

#[derive(Debug, Clone)]
pub enum Text<'v> {
    Stored(&'v str),
    Made(Rc<str>),
}

#[derive(Debug, Clone)]
pub enum List<'v> {
    /// Elements, with the schema of the list.
    Stored(&'v [Value], &'v Value),
    Made(Rc<Vec<Val<'v>>>),
}

#[derive(Debug, Clone)]
pub enum Map<'v> {
    /// Entries, with the schema of their values.
    Stored(&'v Fields, &'v Value),
    Made(Rc<Vec<(Val<'v>, Val<'v>)>>),
}

/// What of an object's metadata rules may see.
static METADATA: LazyLock<Value> = LazyLock::new(
    || json!({"type": "object", "properties": {"name": {"type": "string"}, "generateName": {"type": "string"}}}),
);
static TEXT: LazyLock<Value> = LazyLock::new(|| json!({"type": "string"}));

/// Words of the language, which name a field only between underscores.
const RESERVED: [&str; 21] = [
    "as",
    "break",
    "const",
    "continue",
    "else",
    "false",
    "for",
    "function",
    "if",
    "import",
    "in",
    "let",
    "loop",
    "namespace",
    "null",
    "package",
    "return",
    "true",
    "var",
    "void",
    "while",
];

/// A property's name as rules spell it; `None`: they cannot.
fn escape(name: &str) -> Option<String> {
    if RESERVED.contains(&name) {
        return Some(format!("__{name}__"));
    }
    if !name.starts_with(|c: char| c.is_ascii_alphabetic() || "_.-/".contains(c)) {
        return None;
    }
    let mut spelled = String::with_capacity(name.len());
    let mut rest = name;
    while let Some(c) = rest.chars().next() {
        let length = match c {
            '_' if rest.starts_with("__") => {
                spelled.push_str("__underscores__");
                2
            }
            '.' | '-' | '/' => {
                spelled.push_str(match c {
                    '.' => "__dot__",
                    '-' => "__dash__",
                    _ => "__slash__",
                });
                1
            }
            c if c.is_ascii_alphanumeric() || c == '_' => {
                spelled.push(c);
                1
            }
            _ => return None,
        };
        rest = &rest[length..];
    }
    Some(spelled)
}

/// A property as the schema knows it, by the name a rule spells: its own name and its schema.
pub fn property<'v>(schema: &'v Value, spelled: &str) -> Option<(&'v str, &'v Value)> {
    let known = schema["properties"].as_object();
    let found = if RESERVED.contains(&spelled) {
        None
    } else if !spelled.contains("__") {
        known.and_then(|known| known.get_key_value(spelled))
    } else {
        known.and_then(|known| known.iter().find(|(name, _)| escape(name).is_some_and(|escaped| escaped == spelled)))
    };
    let embedded = schema["x-kubernetes-embedded-resource"] == true;
    match found {
        Some((name, known)) => visible(known).then_some((name.as_str(), known)),
        None if embedded && spelled == "apiVersion" => Some(("apiVersion", &TEXT)),
        None if embedded && spelled == "kind" => Some(("kind", &TEXT)),
        None if embedded && spelled == "metadata" => Some(("metadata", &METADATA)),
        None => None,
    }
}

/// What has no type, rules do not see.
fn visible(schema: &Value) -> bool {
    schema["type"].is_string() || schema["x-kubernetes-int-or-string"] == true || schema.get("$ref").is_some()
}

impl<'v> Val<'v> {
    /// A value of the object.
    pub fn of(value: &'v Value, schema: &'v Value) -> Self {
        match value {
            Value::Null => Self::Null,
            Value::Bool(yes) => Self::Bool(*yes),
            Value::Number(number) => {
                let float = number.as_f64().unwrap_or(f64::NAN);
                // 1.0 is an integer to JSON.
                let whole = number.as_i64().or_else(|| (schema["type"] == "integer").then_some(float as i64));
                match whole {
                    Some(whole) if schema["type"] != "number" => Self::Int(whole),
                    _ => Self::Double(float),
                }
            }
            Value::String(text) => Self::of_text(text, schema),
            Value::Array(elements) => Self::List(List::Stored(elements, schema)),
            Value::Object(fields) => match schema.get("additionalProperties") {
                Some(values @ Value::Object(_)) => Self::Map(Map::Stored(fields, values)),
                // Only metadata refers to a definition.
                _ if schema.get("$ref").is_some() => Self::Object(fields, &METADATA),
                _ => Self::Object(fields, schema),
            },
        }
    }

    fn of_text(text: &'v str, schema: &Value) -> Self {
        let typed = match schema["format"].as_str() {
            Some("duration") => parse_duration(text).map(Self::Duration),
            Some("date-time") => OffsetDateTime::parse(text, &Rfc3339).ok().map(Self::Timestamp),
            Some("date") => OffsetDateTime::parse(&format!("{text}T00:00:00Z"), &Rfc3339).ok().map(Self::Timestamp),
            Some("byte") => STANDARD.decode(text).ok().map(|bytes| Self::Bytes(bytes.into())),
            _ => None,
        };
        typed.unwrap_or(Self::Text(Text::Stored(text)))
    }

    pub fn text(text: impl Into<Rc<str>>) -> Self {
        Self::Text(Text::Made(text.into()))
    }

    pub fn list(elements: Vec<Self>) -> Self {
        Self::List(List::Made(Rc::new(elements)))
    }

    pub fn some(value: Self) -> Self {
        Self::Optional(Some(Rc::new(value)))
    }

    pub fn type_name(&self) -> &'static str {
        match self {
            Self::Null => "null_type",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::UInt(_) => "uint",
            Self::Double(_) => "double",
            Self::Text(_) => "string",
            Self::Bytes(_) => "bytes",
            Self::Duration(_) => "google.protobuf.Duration",
            Self::Timestamp(_) => "google.protobuf.Timestamp",
            Self::List(_) => "list",
            Self::Map(_) => "map",
            Self::Object(..) => "object",
            Self::Optional(_) => "optional_type",
            Self::Type(_) => "type",
        }
    }
}

impl Deref for Text<'_> {
    type Target = str;

    fn deref(&self) -> &str {
        match self {
            Self::Stored(text) => text,
            Self::Made(text) => text,
        }
    }
}

impl<'v> List<'v> {
    pub fn len(&self) -> usize {
        match self {
            Self::Stored(elements, _) => elements.len(),
            Self::Made(elements) => elements.len(),
        }
    }

    pub fn get(&self, index: usize) -> Option<Val<'v>> {
        match self {
            Self::Stored(elements, schema) => elements.get(index).map(|element| Val::of(element, &schema["items"])),
            Self::Made(elements) => elements.get(index).cloned(),
        }
    }

    pub fn iter(&self) -> impl DoubleEndedIterator<Item = Val<'v>> + '_ {
        (0..self.len()).filter_map(|index| self.get(index))
    }

    /// What makes two elements the same one: `None` when place does, else the keys (none: the whole element).
    pub fn identity(&self) -> Option<Vec<&'v str>> {
        let Self::Stored(_, schema) = self else { return None };
        let keys = schema["x-kubernetes-list-map-keys"].as_array();
        match schema["x-kubernetes-list-type"].as_str() {
            Some("set") => Some(Vec::new()),
            Some("map") => Some(keys.into_iter().flatten().filter_map(Value::as_str).collect()),
            _ => None,
        }
    }
}

impl<'v> Map<'v> {
    pub fn len(&self) -> usize {
        match self {
            Self::Stored(entries, _) => entries.len(),
            Self::Made(entries) => entries.len(),
        }
    }

    pub fn entries(&self) -> Vec<(Val<'v>, Val<'v>)> {
        match self {
            Self::Stored(entries, schema) => {
                entries.iter().map(|(key, value)| (Val::Text(Text::Stored(key)), Val::of(value, schema))).collect()
            }
            Self::Made(entries) => entries.to_vec(),
        }
    }
}

/// A duration as Go writes it: `1h30m`, `1.5s`, `-2ms`.
pub fn parse_duration(text: &str) -> Option<i64> {
    let (negative, mut rest) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    if rest == "0" {
        return Some(0);
    }
    if rest.is_empty() {
        return None;
    }
    let mut total: i128 = 0;
    while !rest.is_empty() {
        let number = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.').len();
        let (digits, after) = rest.split_at(number);
        let unit = after.len() - after.trim_start_matches(|c: char| !c.is_ascii_digit() && c != '.').len();
        let (unit, after) = after.split_at(unit);
        let nanoseconds: i128 = match unit {
            "ns" => 1,
            "us" | "µs" | "μs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return None,
        };
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        if fraction.contains('.') || whole.len() + fraction.len() == 0 {
            return None;
        }
        let whole: i128 = if whole.is_empty() { 0 } else { whole.parse::<u64>().ok()?.into() };
        total = total.checked_add(whole.checked_mul(nanoseconds)?)?;
        let mut worth = nanoseconds;
        for digit in fraction.bytes() {
            worth /= 10;
            total = total.checked_add(i128::from(digit - b'0') * worth)?;
        }
        rest = after;
    }
    i64::try_from(if negative { -total } else { total }).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn properties_are_spelled_as_kubernetes_spells_them() {
        let spelled = |name| escape(name).unwrap_or_default();
        assert_eq!(spelled("namespace"), "__namespace__");
        assert_eq!(spelled("a.b-c/d"), "a__dot__b__dash__c__slash__d");
        assert_eq!(spelled("a__b"), "a__underscores__b");
        assert_eq!(spelled("_a_"), "_a_");
        assert_eq!(escape("1a"), None);
        assert_eq!(escape("a b"), None);
        let schema = json!({"properties": {"namespace": {"type": "string"}, "x-y": {"type": "string"}, "any": {}}});
        let name = |spelled| property(&schema, spelled).map(|(name, _)| name);
        assert_eq!(name("__namespace__"), Some("namespace"));
        assert_eq!(name("namespace"), None);
        assert_eq!(name("x__dash__y"), Some("x-y"));
        assert_eq!(name("any"), None);
    }

    #[test]
    fn durations_are_read_as_go_reads_them() {
        assert_eq!(parse_duration("1h30m"), Some(5_400_000_000_000));
        assert_eq!(parse_duration("-1.5s"), Some(-1_500_000_000));
        assert_eq!(parse_duration("0"), Some(0));
        assert_eq!(parse_duration(".5ms"), Some(500_000));
        for wrong in ["", "-", "1", "s", "1x", "1..5s", "99999999999h", "1h ", "ü"] {
            assert_eq!(parse_duration(wrong), None, "{wrong}");
        }
    }
}
