//! The names and addresses that Kubernetes has given to Services and pods. What users write into ServiceEntries and
//! WorkloadEntries takes none of them: whoever can write in one namespace must not get the traffic of another.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use super::service;
use super::workload::running_addresses;
use super::world::World;
use crate::types::Key;

#[derive(Debug, Default)]
pub struct Owned<'a> {
    domain: &'a str,
    /// The names of Services by namespace.
    services: HashMap<&'a str, BTreeSet<&'a str>>,
    cluster_ips: HashMap<IpAddr, &'a Key>,
    /// Pods of the host's network have none of their own.
    pods: HashMap<IpAddr, &'a Key>,
}

impl<'a> Owned<'a> {
    pub fn new(world: &'a World) -> Self {
        let mut this = Self { domain: &world.mesh.cluster_domain, ..Self::default() };
        // Nobody would ask.
        if world.service_entries.is_empty() && world.workload_entries.is_empty() {
            return this;
        }
        for (key, object) in world.services.iter() {
            this.services.entry(&key.namespace).or_default().insert(&key.name);
            this.cluster_ips.extend(service::vips(object).into_iter().map(|ip| (ip, key)));
        }
        for (key, pod) in world.pods.iter() {
            if pod.spec.as_ref().and_then(|spec| spec.host_network) != Some(true) {
                this.pods.extend(running_addresses(pod).into_iter().flatten().map(|ip| (ip, key)));
            }
        }
        this
    }

    /// Whose address it is, unless somebody of `namespace` may write it into a ServiceEntry.
    pub fn address(&self, ip: IpAddr, namespace: &str) -> Option<String> {
        let pod = || self.pods.get(&ip).filter(|key| *key.namespace != *namespace).map(|key| said("pod", key));
        self.cluster_ip(ip).or_else(pod)
    }

    /// The Service whose address it is.
    pub fn cluster_ip(&self, ip: IpAddr) -> Option<String> {
        self.cluster_ips.get(&ip).map(|key| said("Service", key))
    }

    /// Which Services of namespaces other than `namespace` have `host` (lower case) as a name or below theirs, in any
    /// form that a search list completes, or are covered by it.
    pub fn host(&self, host: &str, namespace: &str) -> Option<String> {
        let (wildcard, name) = host.strip_prefix("*.").map_or((false, host), |rest| (true, rest));
        let suffix = format!("svc.{}", self.domain);
        let covers_all = name == "svc" || suffix == name || suffix.ends_with(&format!(".{name}"));
        if wildcard && covers_all {
            let other = self.services.keys().any(|of| *of != namespace);
            return other.then(|| "Services of other namespaces".into());
        }
        let before = |end: &str| name.strip_suffix(end)?.strip_suffix('.');
        let complete = before(&suffix).or_else(|| before("svc")).or_else(|| before(self.domain));
        let mut labels = complete.unwrap_or(name).rsplit('.');
        let of = labels.next().filter(|of| *of != namespace)?;
        let names = self.services.get(of)?;
        match labels.next() {
            None => wildcard.then(|| format!("Services of namespace {of}")),
            // Without `svc` it may as well be a name of the world outside that ends like a namespace.
            Some(_) if complete.is_none() && (wildcard || labels.next().is_some()) => None,
            Some(name) => names.get(name).map(|name| said("Service", &Key::new(of, *name))),
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
        let owned = Owned::new(&world);
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
        let owned = Owned::new(&world);
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
