//! Labels and annotations.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};

/// Labels or annotations, sorted by name. An object has few of them and there are very many objects: a tree would have a node
/// with room for eleven for each.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Labels(Box<[(Box<str>, Box<str>)]>);

impl Labels {
    pub fn get(&self, name: &str) -> Option<&str> {
        let at = self.0.binary_search_by(|(is, _)| (**is).cmp(name)).ok()?;
        Some(&self.0[at].1)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (&**name, &**value))
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether all of these are among `labels`.
    pub fn are_among(&self, labels: &Self) -> bool {
        self.iter().all(|(name, value)| labels.get(name) == Some(value))
    }
}

impl From<BTreeMap<String, String>> for Labels {
    fn from(labels: BTreeMap<String, String>) -> Self {
        Self(labels.into_iter().map(|(name, value)| (name.into(), value.into())).collect())
    }
}

impl<'de> Deserialize<'de> for Labels {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        BTreeMap::deserialize(deserializer).map(Self::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_found_by_name_and_among_others() {
        let read = |json: &str| serde_json::from_str::<Labels>(json).unwrap();
        let all = read(r#"{"b": "2", "a": "1", "c": "", "aa": "3"}"#);
        assert_eq!(all.iter().collect::<Vec<_>>(), [("a", "1"), ("aa", "3"), ("b", "2"), ("c", "")]);
        assert_eq!(
            ["a", "aa", "b", "c", "d", ""].map(|name| all.get(name)),
            [Some("1"), Some("3"), Some("2"), Some(""), None, None]
        );
        for (wanted, are) in [
            ("{}", true),
            (r#"{"a": "1"}"#, true),
            (r#"{"a": "1", "c": ""}"#, true),
            (r#"{"a": "1", "b": "1"}"#, false),
            (r#"{"d": ""}"#, false),
        ] {
            assert_eq!(read(wanted).are_among(&all), are, "{wanted}");
        }
        assert!(serde_json::from_str::<Labels>(r#"{"a": 1}"#).is_err());
    }
}
