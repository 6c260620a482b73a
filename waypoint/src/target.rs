//! What a CONNECT is for: the service or pod this waypoint serves behind the authority, or a refusal. Pure.
//!
//! A waypoint forwards only to what is bound to it. Anything else would make it an open relay with its own identity.

use std::net::SocketAddr;
use std::sync::Arc;

use mesh::hbone::Authority;
use mesh::model::{AppProtocol, GatewayAddress, GatewayDestination, NamespacedHostname, Service, Workload};
use mesh::store::Snapshot;

/// What lies behind a CONNECT authority.
#[derive(Debug, Clone)]
pub enum Destination {
    Service {
        service: Arc<Service>,
        address: SocketAddr,
        protocol: AppProtocol,
    },
    /// Addressed by its own IP, through a workload waypoint: no routes apply, only policies of the waypoint itself.
    Pod {
        workload: Arc<Workload>,
        address: SocketAddr,
    },
}

impl Destination {
    /// `<namespace>/<hostname>` of the service, for routes and policies.
    pub fn service_key(&self) -> Option<NamespacedHostname> {
        match self {
            Self::Service { service, .. } => Some(service.key()),
            Self::Pod { .. } => None,
        }
    }

    /// The address and port the client dialled.
    pub fn address(&self) -> SocketAddr {
        match self {
            Self::Service { address, .. } | Self::Pod { address, .. } => *address,
        }
    }

    pub fn protocol(&self) -> AppProtocol {
        match self {
            Self::Service { protocol, .. } => *protocol,
            Self::Pod { .. } => AppProtocol::Unknown,
        }
    }
}

/// Why a CONNECT is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("{0} is neither a service nor a workload known here")]
    Unknown(String),
    #[error("{service} is not bound to this waypoint")]
    NotBound { service: String },
    #[error("service {service} has no port {port}")]
    NoSuchPort { service: String, port: u16 },
}

/// The waypoint's own place: which bindings name it.
#[derive(Debug, Clone)]
pub struct Me {
    pub service: NamespacedHostname,
    pub network: Arc<str>,
}

impl Me {
    fn is(&self, world: &Snapshot, gateway: &GatewayAddress) -> bool {
        match &gateway.destination {
            GatewayDestination::Hostname(host) => *host == self.service,
            GatewayDestination::Address(a) => {
                world.services_by_vip(&a.network, a.address).any(|s| s.key() == self.service)
            }
        }
    }

    /// Whether traffic to `service` is sent through this waypoint.
    pub fn serves(&self, world: &Snapshot, service: &Service) -> bool {
        service
            .waypoint
            .iter()
            .chain(service.weighted_waypoints.iter().map(|w| &w.destination))
            .any(|g| self.is(world, g))
    }
}

/// Resolves a CONNECT authority. The service is chosen by address, with the client's namespace breaking ties.
///
/// # Errors
/// The refusal, whose text goes to the log; the client only sees a status.
pub fn resolve(
    world: &Snapshot,
    me: &Me,
    authority: &Authority,
    client_namespace: &str,
) -> Result<Destination, Refusal> {
    let (service, address) = match authority {
        Authority::Ip(address) => {
            (world.best_service_by_vip(&me.network, address.ip(), client_namespace), Some(*address))
        }
        Authority::Host { host, .. } => (world.service_by_hostname(host, client_namespace), None),
    };
    if let Some(service) = service {
        if !me.serves(world, service) {
            return Err(Refusal::NotBound { service: service.key().to_string() });
        }
        return at_port(service, authority.port(), address);
    }
    let Authority::Ip(address) = authority else { return Err(Refusal::Unknown(authority.to_string())) };
    let workload =
        world.workload_by_ip(&me.network, address.ip()).ok_or_else(|| Refusal::Unknown(authority.to_string()))?;
    if !workload.waypoint.as_ref().is_some_and(|g| me.is(world, g)) {
        return Err(Refusal::NotBound { service: workload.uid.to_string() });
    }
    Ok(Destination::Pod { workload: workload.clone(), address: *address })
}

/// As [`resolve`] for a service, without asking whether it is bound here. For services that were bound a moment ago.
pub fn unbound(world: &Snapshot, me: &Me, authority: &Authority, client_namespace: &str) -> Option<Destination> {
    match authority {
        Authority::Ip(address) => {
            let service = world.best_service_by_vip(&me.network, address.ip(), client_namespace)?;
            at_port(service, address.port(), Some(*address)).ok()
        }
        Authority::Host { host, port } => at_port(world.service_by_hostname(host, client_namespace)?, *port, None).ok(),
    }
}

fn at_port(service: &Arc<Service>, port: u16, address: Option<SocketAddr>) -> Result<Destination, Refusal> {
    let Some(of_service) = service.ports.get(&port) else {
        return Err(Refusal::NoSuchPort { service: service.key().to_string(), port });
    };
    // A hostname authority has no address of its own; policies on `destination.ip` see the first VIP.
    let vip = || service.vips.first().map_or(SocketAddr::from(([0, 0, 0, 0], port)), |v| (v.address, port).into());
    Ok(Destination::Service {
        service: service.clone(),
        address: address.unwrap_or_else(vip),
        protocol: of_service.app_protocol,
    })
}

#[cfg(test)]
mod tests {
    use mesh::model::{ServicePort, Template, WeightedWaypoint};
    use mesh::store::{Store, Update};

    use super::*;

    fn me() -> Me {
        Me { service: NamespacedHostname::new("shop", "waypoint.shop.svc.cluster.local"), network: "".into() }
    }

    fn gateway() -> GatewayAddress {
        GatewayAddress { destination: GatewayDestination::Hostname(me().service), hbone_mtls_port: 15008 }
    }

    fn service(name: &str, vip: &str) -> Service {
        Service {
            name: name.into(),
            namespace: "shop".into(),
            hostname: format!("{name}.shop.svc.cluster.local").into(),
            vips: vec![format!("/{vip}").parse().expect("vip")],
            ports: [(80, ServicePort { target_port: 8080, app_protocol: AppProtocol::Http11 })].into(),
            ..Default::default()
        }
    }

    fn ask(authority: &str) -> Result<Destination, Refusal> {
        let bound = Service { waypoint: Some(gateway()), ..service("server", "10.96.0.1") };
        let canary = WeightedWaypoint { destination: gateway(), weight: 5 };
        let canary = Service { weighted_waypoints: vec![canary], ..service("canary", "10.96.0.2") };
        let pod = Workload {
            uid: "c//Pod/shop/p".into(),
            addresses: vec!["10.0.0.9".parse().expect("ip")],
            template: Arc::new(Template { waypoint: Some(gateway()), ..Default::default() }),
            ..Default::default()
        };
        let stranger = Workload {
            uid: "c//Pod/shop/s".into(),
            addresses: vec!["10.0.0.8".parse().expect("ip")],
            ..Default::default()
        };
        let store = Store::new();
        store.apply(
            Update::new()
                .service(bound)
                .service(canary)
                .service(service("unbound", "10.96.0.3"))
                .workload(pod)
                .workload(stranger),
        );
        resolve(&store.snapshot(), &me(), &authority.parse().expect("authority"), "shop")
    }

    #[test]
    fn only_what_is_bound_here_is_served() {
        assert!(matches!(ask("10.96.0.1:80"), Ok(Destination::Service { protocol: AppProtocol::Http11, .. })));
        assert!(matches!(ask("10.96.0.2:80"), Ok(Destination::Service { .. })));
        assert!(matches!(ask("server.shop.svc.cluster.local:80"), Ok(Destination::Service { .. })));
        assert!(matches!(ask("10.0.0.9:8080"), Ok(Destination::Pod { .. })));
        for authority in ["10.96.0.3:80", "10.0.0.8:8080"] {
            assert!(matches!(ask(authority), Err(Refusal::NotBound { .. })), "{authority}");
        }
        for authority in ["127.0.0.1:15000", "192.0.2.1:80", "nobody.example:80"] {
            assert!(matches!(ask(authority), Err(Refusal::Unknown(_))), "{authority}");
        }
        assert!(matches!(ask("10.96.0.1:81"), Err(Refusal::NoSuchPort { port: 81, .. })));
    }
}
