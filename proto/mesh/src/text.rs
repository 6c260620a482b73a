//! Cheap shared strings. Names of workloads and services are read by every connection and change rarely, so they are
//! shared rather than copied.

use std::collections::HashSet;
use std::sync::Arc;

/// An immutable string whose clone is one reference count.
pub type Text = Arc<str>;

/// `Some` unless the string is empty: protobuf and label sources spell "absent" as "".
pub fn non_empty(value: &str) -> Option<Text> {
    if value.is_empty() { None } else { Some(Text::from(value)) }
}

/// Makes equal texts one text. A mesh names the same namespaces, services and nodes a thousand times over.
#[derive(Debug, Default)]
pub struct Texts(HashSet<Text>);

impl Texts {
    /// The one that is equal to `text`, which becomes that one if it is the first.
    pub fn share(&mut self, text: &mut Text) {
        match self.0.get(text) {
            Some(known) => *text = known.clone(),
            None => drop(self.0.insert(text.clone())),
        }
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
}
