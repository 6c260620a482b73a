//! The names and addresses that Kubernetes has given to Services and pods. What users write into ServiceEntries and
//! WorkloadEntries takes none of them: whoever can write in one namespace must not get the traffic of another.

use std::net::IpAddr;

use super::lookups::Lookups;
use super::world::{World, in_namespace};
use crate::types::Key;

#[derive(Debug, Clone, Copy)]
pub struct Owned<'a> {
    pub world: &'a World,
    pub lookups: &'a Lookups,
}

impl Owned<'_> {
    /// Whose address it is, unless somebody of `namespace` may write it into a ServiceEntry.
    pub fn address(&self, ip: IpAddr, namespace: &str) -> Option<String> {
        let pod = || self.lookups.pod_at(ip).filter(|key| *key.namespace != *namespace).map(|key| said("pod", key));
        self.cluster_ip(ip).or_else(pod)
    }

    /// The Service whose address it is.
    pub fn cluster_ip(&self, ip: IpAddr) -> Option<String> {
        self.lookups.service_at(ip).map(|key| said("Service", key))
    }

    /// Which Services of namespaces other than `namespace` have `host` (lower case) as a name or below theirs, in any
    /// form that a search list completes, or are covered by it.
    pub fn host(&self, host: &str, namespace: &str) -> Option<String> {
        let (wildcard, name) = host.strip_prefix("*.").map_or((false, host), |rest| (true, rest));
        let (services, domain) = (&self.world.services, &*self.world.mesh.cluster_domain);
        let suffix = format!("svc.{domain}");
        let covers_all = name == "svc" || suffix == name || suffix.ends_with(&format!(".{name}"));
        if wildcard && covers_all {
            // They are sorted by namespace.
            let ends = [services.get_min(), services.get_max()];
            let other = ends.into_iter().flatten().any(|(of, _)| *of.namespace != *namespace);
            return other.then(|| "Services of other namespaces".into());
        }
        let before = |end: &str| name.strip_suffix(end)?.strip_suffix('.');
        let complete = before(&suffix).or_else(|| before("svc")).or_else(|| before(domain));
        let mut labels = complete.unwrap_or(name).rsplit('.');
        let of = labels.next().filter(|of| *of != namespace)?;
        in_namespace(services, of).next()?;
        match labels.next() {
            None => wildcard.then(|| format!("Services of namespace {of}")),
            // Without `svc` it may as well be a name of the world outside that ends like a namespace.
            Some(_) if complete.is_none() && (wildcard || labels.next().is_some()) => None,
            Some(name) => {
                let key = Key::new(of, name);
                services.contains_key(&key).then(|| said("Service", &key))
            }
        }
    }
}

fn said(kind: &str, key: &Key) -> String {
    format!("{kind} {} of namespace {}", key.name, key.namespace)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::translate::fixture;

    const ENTRY: &str = "kind: WorkloadEntry\nmetadata: {name: any, namespace: aaa}\nspec: {address: 192.0.2.1}\n---\n";

    fn service(name: &str, namespace: &str, spec: &str) -> String {
        format!("kind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {{{spec}}}\n---\n")
    }

    #[test]
    fn every_form_of_a_services_name_is_its_own() {
        let world = fixture::world(&(ENTRY.to_owned() + &service("web", "shop", "") + &service("db", "aaa", "")));
        let lookups = Lookups::of(&world);
        let owned = Owned { world: &world, lookups: &lookups };
        for host in [
            "web.shop",
            "web.shop.svc",
            "web.shop.svc.cluster.local",
            "web.shop.cluster.local",
            "web-0.web.shop.svc",
            "web-0.web.shop.svc.cluster.local",
            "*.web.shop.svc.cluster.local",
            "*.web.shop.svc",
        ] {
            assert_eq!(owned.host(host, "aaa").as_deref(), Some("Service web of namespace shop"), "{host}");
            assert_eq!(owned.host(host, "shop"), None, "{host}: of its own namespace");
        }
        for host in ["*.shop", "*.shop.svc", "*.shop.svc.cluster.local", "*.shop.cluster.local"] {
            assert_eq!(owned.host(host, "aaa").as_deref(), Some("Services of namespace shop"), "{host}");
            assert_eq!(owned.host(host, "shop"), None, "{host}");
        }
        for host in ["*.svc", "*.svc.cluster.local", "*.cluster.local", "*.local"] {
            assert_eq!(owned.host(host, "aaa").as_deref(), Some("Services of other namespaces"), "{host}");
        }
        for host in [
            "shop",
            "web",
            "api.shop",
            "api.shop.svc.cluster.local",
            "www.web.shop",
            "*.web.shop",
            "web.other.svc.cluster.local",
            "db.aaa.svc.cluster.local",
            "*.aaa.svc.cluster.local",
            "svc.cluster.local",
            "*.example.com",
            "www.example.com",
            "notlocal",
            "*.ocal",
        ] {
            assert_eq!(owned.host(host, "aaa"), None, "{host}");
        }
    }

    #[test]
    fn addresses_of_services_are_nobodys_and_those_of_pods_their_namespaces() {
        let pod = |name: &str, spec: &str, ip: &str| {
            format!(
                "kind: Pod\nmetadata: {{name: {name}, namespace: shop, uid: {name}}}\n\
                 spec: {{containers: []{spec}}}\nstatus: {{phase: Running, podIP: {ip}}}\n---\n"
            )
        };
        let yaml = ENTRY.to_owned()
            + &service("web", "shop", "clusterIP: 10.96.0.1, clusterIPs: [10.96.0.1, \"fd00::1\"]")
            + &service("headless", "shop", "clusterIP: None")
            + &pod("web-1", "", "10.0.0.1")
            + &pod("host", ", hostNetwork: true", "192.0.2.1");
        let world = fixture::world(&yaml);
        let lookups = Lookups::of(&world);
        let owned = Owned { world: &world, lookups: &lookups };
        let of = |ip: &str, namespace| owned.address(ip.parse().unwrap(), namespace).unwrap_or_default();
        for namespace in ["aaa", "shop"] {
            assert_eq!(of("10.96.0.1", namespace), "Service web of namespace shop");
            assert_eq!(of("fd00::1", namespace), "Service web of namespace shop");
            assert_eq!(of("192.0.2.1", namespace), "", "a node's");
            assert_eq!(of("10.96.0.2", namespace), "");
        }
        assert_eq!(of("10.0.0.1", "aaa"), "pod web-1 of namespace shop");
        assert_eq!(of("10.0.0.1", "shop"), "");
    }
}
