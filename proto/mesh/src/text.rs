//! Cheap shared strings. Names of workloads and services are read by every connection and change rarely, so they are
//! shared rather than copied.

use std::collections::HashSet;
use std::sync::Arc;

/// For tables of names, of which a mesh has a hundred thousand: by a profile the standard library's hasher took 0.2 s of CPU
/// for them. Whoever names things in the cluster cannot see the seed.
pub(crate) use foldhash::quality::RandomState as NameHasher;

/// An immutable string whose clone is one reference count.
pub type Text = Arc<str>;

/// `Some` unless the string is empty: protobuf and label sources spell "absent" as "".
pub fn non_empty(value: &str) -> Option<Text> {
    if value.is_empty() { None } else { Some(Text::from(value)) }
}

/// Makes equal texts one text. A mesh names the same namespaces, services and nodes a thousand times over.
#[derive(Debug, Default)]
pub struct Texts(HashSet<Text, NameHasher>);

impl Texts {
    /// The one that is equal to `text`, which becomes that one if it is the first.
    pub fn share(&mut self, text: &mut Text) {
        match self.0.get(text) {
            Some(known) => *text = known.clone(),
            None => drop(self.0.insert(text.clone())),
        }
    }

    /// The one that is equal to `text`.
    pub fn get(&mut self, text: &str) -> Text {
        match self.0.get(text) {
            Some(known) => known.clone(),
            None => {
                let text = Text::from(text);
                self.0.insert(text.clone());
                text
            }
        }
    }

    /// Lets go of those that nobody else has.
    pub fn sweep(&mut self) {
        self.0.retain(|text| Text::strong_count(text) > 1);
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_texts_become_one() {
        let mut texts = Texts::default();
        let [mut first, mut second, mut other] = ["a", "a", "b"].map(Text::from);
        for text in [&mut first, &mut second, &mut other] {
            texts.share(text);
        }
        assert!(Arc::ptr_eq(&first, &second));
        assert_eq!((&*second, &*other), ("a", "b"));
    }

    #[test]
    fn texts_are_kept_as_long_as_somebody_has_them() {
        let mut texts = Texts::default();
        let (kept, _) = (texts.get("kept"), texts.get("gone"));
        texts.sweep();
        assert_eq!((texts.len(), texts.is_empty()), (1, false));
        assert!(Arc::ptr_eq(&kept, &texts.get("kept")));
    }
}
