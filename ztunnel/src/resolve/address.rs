//! The last fact of a route: at which of a workload's addresses it is called, and whom to expect there.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mesh::hbone::Authority;
use mesh::identity::Identity;
use mesh::model::{IpFamilies, Service, TunnelProtocol, Workload};
use rand::Rng;

use super::balance::weighted_pick;
use super::{HBONE_PORT, NoRoute, Route, Tunnel, Via};

/// A route that lacks the address of its next hop.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Plan {
    /// Who is to be called.
    pub(super) workload: Arc<Workload>,
    /// The service it was chosen of, which may allow one family of addresses only.
    pub(super) of: Option<Arc<Service>>,
    /// The service the application dialled.
    pub(super) service: Option<Arc<Service>>,
    pub(super) port: u16,
    pub(super) hop: Hop,
}

/// What is said to the one who is called.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Hop {
    /// It is the destination: HBONE where it speaks that, with its own address as the authority, else plain TCP.
    Destination,
    /// It passes the connection on.
    Proxy { tunnel: Tunnel, via: Via },
}

impl Plan {
    /// The route, at the address of the workload that fits what was dialled.
    pub(super) fn like(self, dialled: IpAddr) -> Result<Route, NoRoute> {
        let families = self.of.as_ref().map_or(IpFamilies::Automatic, |s| s.ip_families);
        match select_address(&self.workload.addresses, families, dialled) {
            Some(ip) => self.at(ip),
            None if self.workload.addresses.is_empty() && !self.workload.hostname.is_empty() => {
                Err(NoRoute::ByName(Box::new(ByName { plan: self, dialled })))
            }
            None => Err(NoRoute::NoAddress { workload: self.workload.uid.clone() }),
        }
    }

    fn at(self, ip: IpAddr) -> Result<Route, NoRoute> {
        let target = SocketAddr::new(ip, self.port);
        let (next_hop, tunnel, via) = match self.hop {
            Hop::Proxy { tunnel, via } => (target, Some(tunnel), via),
            Hop::Destination => match self.workload.protocol {
                TunnelProtocol::None => (target, None, Via::Direct),
                TunnelProtocol::Hbone => {
                    let expected = expected_identities(&self.workload, self.of.as_deref())?;
                    let tunnel = Tunnel { authority: Authority::Ip(target), expected, inner: None };
                    (SocketAddr::new(ip, HBONE_PORT), Some(tunnel), Via::Direct)
                }
            },
        };
        Ok(Route { next_hop, tunnel, destination: Some(self.workload), service: self.service, via })
    }
}

/// A route that lacks one fact: the addresses behind a host name.
#[derive(Debug, Clone, PartialEq)]
pub struct ByName {
    plan: Plan,
    dialled: IpAddr,
}

impl ByName {
    #[must_use]
    pub fn hostname(&self) -> &Arc<str> {
        &self.plan.workload.hostname
    }

    /// The UID of the workload that has no addresses.
    #[must_use]
    pub fn workload(&self) -> &Arc<str> {
        &self.plan.workload.uid
    }

    /// The route, once it is known what the name stands for: any address that the service allows and the source can
    /// use, preferably of the family that was dialled.
    ///
    /// # Errors
    /// There is no such address, or nobody could say.
    pub fn resolved<R: Rng>(
        self,
        source: &Workload,
        found: Result<&[IpAddr], String>,
        rng: &mut R,
    ) -> Result<Route, NoRoute> {
        let failed = |reason| {
            let (workload, hostname) = (self.workload().clone(), self.hostname().clone());
            NoRoute::NameFailed { workload, hostname, reason }
        };
        let families = self.plan.of.as_ref().map_or(IpFamilies::Automatic, |s| s.ip_families);
        let usable =
            |ip: &&IpAddr| allows(families, **ip) && source.addresses.iter().any(|own| own.is_ipv4() == ip.is_ipv4());
        let usable: Vec<&IpAddr> = found.map_err(failed)?.iter().filter(usable).collect();
        let dialled = |ip: &&&IpAddr| ip.is_ipv4() == self.dialled.is_ipv4();
        let preferred: Vec<&IpAddr> = match usable.iter().any(|ip| dialled(&ip)) {
            true => usable.iter().filter(dialled).copied().collect(),
            false => usable,
        };
        match weighted_pick(&preferred, |_| 1, rng) {
            Some(ip) => self.plan.at(**ip),
            None => Err(failed("it has no address of a family that can be used".into())),
        }
    }
}

/// The requested address if it is the workload's, else one the service's address families allow, preferably of the
/// family that was dialled.
fn select_address(addresses: &[IpAddr], families: IpFamilies, dialled: IpAddr) -> Option<IpAddr> {
    if addresses.contains(&dialled) {
        return Some(dialled);
    }
    let mut allowed = addresses.iter().filter(|ip| allows(families, **ip));
    allowed.clone().find(|ip| ip.is_ipv4() == dialled.is_ipv4()).or_else(|| allowed.next()).copied()
}

const fn allows(families: IpFamilies, ip: IpAddr) -> bool {
    match families {
        IpFamilies::Automatic | IpFamilies::Dual => true,
        IpFamilies::Ipv4 => ip.is_ipv4(),
        IpFamilies::Ipv6 => ip.is_ipv6(),
    }
}

/// The workload's own identity, and what its service names beside.
pub(super) fn expected_identities(workload: &Workload, service: Option<&Service>) -> Result<Vec<Identity>, NoRoute> {
    let own = workload
        .identity()
        .map_err(|error| NoRoute::BadIdentity { workload: workload.uid.clone(), reason: error.to_string() })?;
    Ok(std::iter::once(own).chain(service.into_iter().flat_map(named_identities)).collect())
}

/// The SPIFFE IDs among the names of a service.
pub(super) fn named_identities(service: &Service) -> impl Iterator<Item = Identity> + '_ {
    service.subject_alt_names.iter().filter_map(|san| san.parse().ok())
}
