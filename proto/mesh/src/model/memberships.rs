//! The services that a workload is an endpoint of: mostly one or two, so a sorted list takes a tenth of what a tree does.

use std::cmp::Ordering;
use std::sync::Arc;

use super::{EndpointPorts, NamespacedHostname};

/// By service, the workload's ports for it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Memberships(Vec<(NamespacedHostname, EndpointPorts)>);

impl Memberships {
    pub fn get(&self, service: &NamespacedHostname) -> Option<&EndpointPorts> {
        self.position(service).ok().map(|at| &self.0[at].1)
    }

    /// Adds one, in place of what was there for the service.
    pub fn insert(&mut self, service: NamespacedHostname, ports: EndpointPorts) {
        match self.position(&service) {
            Ok(at) => self.0[at].1 = ports,
            Err(at) => self.0.insert(at, (service, ports)),
        }
    }

    pub fn keys(&self) -> impl Iterator<Item = &NamespacedHostname> {
        self.0.iter().map(|(service, _)| service)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&NamespacedHostname, &EndpointPorts)> {
        self.0.iter().map(|(service, ports)| (service, ports))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn each_mut(&mut self) -> impl Iterator<Item = &mut (NamespacedHostname, EndpointPorts)> {
        self.0.iter_mut()
    }

    fn position(&self, service: &NamespacedHostname) -> Result<usize, usize> {
        self.0.binary_search_by(|(known, _)| {
            // Whoever looks through the endpoints of a service asks with the very texts that are here.
            let is_same =
                Arc::ptr_eq(&known.hostname, &service.hostname) && Arc::ptr_eq(&known.namespace, &service.namespace);
            if is_same { Ordering::Equal } else { known.cmp(service) }
        })
    }
}

impl FromIterator<(NamespacedHostname, EndpointPorts)> for Memberships {
    /// Of several for one service the last counts.
    fn from_iter<I: IntoIterator<Item = (NamespacedHostname, EndpointPorts)>>(services: I) -> Self {
        let mut all = Self::default();
        services.into_iter().for_each(|(service, ports)| all.insert(service, ports));
        all.0.shrink_to_fit();
        all
    }
}

impl<const N: usize> From<[(NamespacedHostname, EndpointPorts); N]> for Memberships {
    fn from(services: [(NamespacedHostname, EndpointPorts); N]) -> Self {
        services.into_iter().collect()
    }
}

impl std::ops::Index<&NamespacedHostname> for Memberships {
    type Output = EndpointPorts;

    fn index(&self, service: &NamespacedHostname) -> &EndpointPorts {
        self.get(service).expect("the service is one of the workload's")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_are_found_whatever_their_order_and_the_last_word_counts() {
        let key = |name: &str| NamespacedHostname::new("shop", name);
        let ports = |target| {
            let port =
                super::super::EndpointPort { service_port: 80, target_port: target, app_protocol: Default::default() };
            EndpointPorts::from_iter([port])
        };
        let all = Memberships::from([(key("b"), ports(1)), (key("a"), ports(2)), (key("b"), ports(3))]);
        assert_eq!(all.keys().map(|k| k.hostname.to_string()).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!((all.get(&key("b")), all.get(&key("c"))), (Some(&ports(3)), None));
        assert_eq!(all, [(key("a"), ports(2)), (key("b"), ports(3))].into());
    }
}
