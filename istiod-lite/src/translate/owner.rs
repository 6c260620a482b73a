//! Which revision's a Gateway is: that of its label `istio.io/rev`, else of its namespace's, else the default. What it says
//! may be a tag, which stands for a revision. Every control plane comes to the same, so that one acts and the others let it.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Namespace;

use super::world::{World, differing, in_namespace};
use crate::revision::{LABEL, Revision, TAG};
use crate::types::{Key, Meta, Service, label};

/// Whose Gateways are whose in a world.
pub struct Owners<'a> {
    world: &'a World,
    default: Revision,
    /// By tag, the revision.
    tags: BTreeMap<&'a str, &'a str>,
}

impl<'a> Owners<'a> {
    pub fn of(world: &'a World) -> Self {
        // The oldest of a tag counts: it comes last.
        let mut found: Vec<_> = tag_services(world).collect();
        found.sort_by_key(|(key, service)| Reverse((service.created, *key)));
        let tags = found.into_iter().filter_map(|(_, service)| tagged(service)).collect();
        Self { world, default: Revision::default(), tags }
    }

    /// The revision of an object, which no control plane need be of.
    pub fn revision<'b>(&'b self, meta: &'b dyn Meta) -> &'b str {
        let said = label(meta, LABEL).or_else(|| self.world.namespace_label(meta.namespace_name(), LABEL));
        let said = said.filter(|said| !said.is_empty()).unwrap_or(self.default.as_str());
        self.tags.get(said).copied().unwrap_or(said)
    }

    /// Whether this control plane deploys a Gateway and says what became of it.
    pub fn is_ours(&self, meta: &dyn Meta) -> bool {
        self.revision(meta) == self.world.mesh.revision.as_str()
    }

    /// Whether there is a control plane of this revision, as far as its Service tells.
    pub fn is_installed(&self, revision: &str) -> bool {
        let service = revision.parse::<Revision>().map(|revision| revision.named("istiod"));
        let root = &*self.world.mesh.root_namespace;
        service.is_ok_and(|service| self.world.services.contains_key(&Key::new(root, service)))
    }
}

/// Whether other objects than Gateways say otherwise whose something is, or who is there.
pub fn differ(old: &World, new: &World) -> bool {
    let namespace_label = |namespace: Option<&Namespace>| Some(label(&namespace?.metadata, LABEL)?.to_owned());
    let matters = |key: &Key, service: &Service| key.name.starts_with("istiod") || tagged(service).is_some();
    differing(&old.namespaces, &new.namespaces).any(|(_, was, is)| namespace_label(was) != namespace_label(is))
        || differing(&old.services, &new.services)
            .filter(|(key, ..)| *key.namespace == *new.mesh.root_namespace)
            .any(|(key, was, is)| was.into_iter().chain(is).any(|service| matters(key, service)))
}

/// The Services by which there are tags.
pub fn tag_services(world: &World) -> impl Iterator<Item = (&Key, &Service)> {
    in_namespace(&world.services, &world.mesh.root_namespace).filter(|(_, service)| tagged(service).is_some())
}

/// Tag and revision.
fn tagged(service: &Service) -> Option<(&str, &str)> {
    let said = |key: &str| label(service, key).filter(|said| !said.is_empty());
    Some((said(TAG)?, said(LABEL)?))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::translate::fixture;
    use crate::translate::world::MeshSettings;

    fn tag(name: &str, tag: &str, revision: &str, created: &str) -> String {
        format!(
            "kind: Service\nmetadata: {{name: {name}, namespace: istio-system, creationTimestamp: {created}, \
             labels: {{istio.io/tag: {tag}, istio.io/rev: {revision}}}}}\n---\n"
        )
    }

    /// The revision of a Gateway with this label in a namespace with that one.
    fn revision(services: &str, own: &str, namespace: &str) -> String {
        let labels =
            |said: &str| if said == "-" { String::new() } else { format!(", labels: {{istio.io/rev: '{said}'}}") };
        let world = fixture::world(&format!(
            "{services}kind: Namespace\nmetadata: {{name: shop{}}}\n---\nkind: Gateway\nmetadata: {{name: w, namespace: shop{}}}\nspec: {{gatewayClassName: istio-waypoint}}",
            labels(namespace),
            labels(own),
        ));
        let (_, gateway) = world.gateways.iter().next().expect("one");
        Owners::of(&world).revision(&gateway.meta).to_owned()
    }

    #[test]
    fn the_nearest_label_counts_and_none_is_the_default() {
        for (own, namespace, expected) in [
            ("-", "-", "default"),
            ("", "canary", "default"),
            ("canary", "-", "canary"),
            ("-", "canary", "canary"),
            ("default", "canary", "default"),
            ("Not.One", "-", "Not.One"),
        ] {
            assert_eq!(revision("", own, namespace), expected, "{own} in {namespace}");
        }
    }

    #[test]
    fn a_tag_stands_for_a_revision_and_the_oldest_of_it_counts() {
        let old = tag("z", "prod", "blue", "2026-01-01T00:00:00Z");
        let new = tag("a", "prod", "green", "2026-01-02T00:00:00Z");
        for services in [old.clone() + &new, new + &old] {
            assert_eq!(revision(&services, "prod", "-"), "blue");
            assert_eq!(revision(&services, "-", "prod"), "blue");
            assert_eq!(revision(&services, "green", "-"), "green");
        }
        let default = tag("t", "default", "green", "2026-01-01T00:00:00Z");
        assert_eq!(revision(&default, "-", "-"), "green", "also what has no label");
        let elsewhere = default.replace("istio-system", "shop");
        assert_eq!(revision(&elsewhere, "-", "-"), "default", "whoever may write there decides nothing");
    }

    #[test]
    fn exactly_one_revision_has_each_gateway() {
        let mut world = fixture::world(&format!(
            "{}kind: Gateway\nmetadata: {{name: w, namespace: shop}}\nspec: {{gatewayClassName: istio-waypoint}}",
            tag("t", "default", "green", "2026-01-01T00:00:00Z")
        ));
        let gateway = world.gateways.values().next().expect("one").clone();
        for (revision, has) in [("default", false), ("green", true), ("blue", false)] {
            let revision = revision.parse().expect("a revision");
            world.mesh = Arc::new(MeshSettings { revision, ..MeshSettings::default() });
            assert_eq!(Owners::of(&world).is_ours(&gateway.meta), has);
        }
    }
}
