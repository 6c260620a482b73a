//! Worlds from YAML, as users write it, for tests and for fuzzing.

pub use super::documents::add;
#[cfg(test)]
use super::world::World;

/// Every document of `yaml`; panics on what it does not know, naming it.
#[cfg(test)]
pub(crate) fn world(yaml: &str) -> World {
    let mut world = World::default();
    for document in yaml.split("\n---\n").filter(|document| !document.trim().is_empty()) {
        let object: serde_json::Value =
            serde_saphyr::from_str(document).unwrap_or_else(|error| panic!("{error}\n{document}"));
        let known = add(&mut world, object).unwrap_or_else(|error| panic!("{error}\n{document}"));
        assert!(known, "no table for\n{document}");
    }
    world
}
