//! Rules and routes inside a pod's namespace that turn marked TCP towards lo, set and removed over rtnetlink.
//!
//! Everything is idempotent: `ensure` is also the repair when something in the pod has flushed the rules. The rules
//! stay behind the `local` table, so the pod's own addresses and 127/8 are never touched.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use ebpf_loader::abi::{DNS_PORT, MARK_CAPTURE, MARK_MASK, ROUTE_TABLE, RULE_PREF_DNS, RULE_PREF_TCP};
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::IpProtocol;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage, AddressScope, CacheInfo};
use rtnetlink::packet_route::route::{RouteMessage, RouteScope, RouteType};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange};
use rtnetlink::{AddressMessageBuilder, Handle, RouteMessageBuilder};
use thiserror::Error;

use super::netns::{Family, Netns};

/// Lets the application's answers on the last leg carry the mark of the request, so that they come back over lo: the
/// first those of accepted sockets (it serves IPv6 as well), the others the resets of ports nobody listens on.
const SYSCTLS_V4: [&str; 2] = ["ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect"];
const SYSCTLS_V6: [&str; 1] = ["ipv6/fwmark_reflect"];

/// The kernel said no.
#[derive(Debug, Error)]
pub enum RoutingError {
    #[error("opening netlink in another namespace: {0}")]
    Open(#[source] io::Error),
    #[error("setting sysctl net/{name} in the pod's namespace (is /proc/sys writable?): {source}")]
    Sysctl { name: &'static str, source: io::Error },
    #[error("{what}: {source}")]
    Netlink { what: &'static str, source: rtnetlink::Error },
    #[error("the pod has no address yet")]
    NoAddress,
}

/// Whether the pod's DNS goes to lo as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dns {
    Captured,
    Direct,
}

/// Makes marked TCP of the pod go to lo. `addresses` are the pod's; the first of a family becomes the source address.
///
/// # Errors
/// The step that was refused.
pub async fn ensure(netns: &Netns, proc_root: &Path, addresses: &[IpAddr], dns: Dns) -> Result<(), RoutingError> {
    if addresses.is_empty() {
        return Err(RoutingError::NoAddress);
    }
    set_sysctls(netns, proc_root, addresses, "1")?;
    let link = Link::open(netns)?;
    for source in sources(addresses) {
        link.ensure_route(source).await?;
        let family = Family::of(source);
        link.ensure_rule(tcp_rule(family)).await?;
        match dns {
            Dns::Captured => link.ensure_rule(dns_rule(family)).await?,
            Dns::Direct => link.remove_rule(dns_rule(family)).await?,
        }
    }
    Ok(())
}

/// Lets the pod's DNS go where it is sent, also that of sockets which are marked already and live on. To be done before
/// the steering stops: in between, the packets would arrive at lo for nobody.
///
/// # Errors
/// The step that was refused.
pub async fn release_dns(netns: &Netns, addresses: &[IpAddr]) -> Result<(), RoutingError> {
    let link = Link::open(netns)?;
    for source in sources(addresses) {
        link.remove_rule(dns_rule(Family::of(source))).await?;
    }
    Ok(())
}

/// Takes back what [`ensure`] did, in the opposite order. What is gone already is no error.
///
/// # Errors
/// The step that was refused.
pub async fn remove(netns: &Netns, proc_root: &Path, addresses: &[IpAddr]) -> Result<(), RoutingError> {
    let link = Link::open(netns)?;
    for source in sources(addresses) {
        link.remove_rule(dns_rule(Family::of(source))).await?;
        link.remove_rule(tcp_rule(Family::of(source))).await?;
        link.remove_route(source).await?;
    }
    set_sysctls(netns, proc_root, addresses, "0")
}

fn set_sysctls(netns: &Netns, proc_root: &Path, addresses: &[IpAddr], value: &str) -> Result<(), RoutingError> {
    let v6 = if addresses.iter().any(IpAddr::is_ipv6) { &SYSCTLS_V6[..] } else { &[] };
    SYSCTLS_V4.iter().chain(v6).try_for_each(|name| {
        netns.set_sysctl(proc_root, name, value).map_err(|source| RoutingError::Sysctl { name, source })
    })
}

/// The first address of each family: `local` routes take source = destination unless told otherwise.
fn sources(addresses: &[IpAddr]) -> impl Iterator<Item = IpAddr> + '_ {
    let v4 = addresses.iter().find(|a| a.is_ipv4());
    let v6 = addresses.iter().find(|a| a.is_ipv6());
    v4.into_iter().chain(v6).copied()
}

/// A netlink socket that was made inside a namespace, with the task that serves it.
pub(super) struct Link {
    handle: Handle,
    task: tokio::task::JoinHandle<()>,
    lo: u32,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Link {
    pub(super) fn open(netns: &Netns) -> Result<Self, RoutingError> {
        let ((connection, handle, _), lo) = netns
            .enter(|| Ok((rtnetlink::new_connection()?, nix::net::if_::if_nametoindex("lo")?)))
            .map_err(RoutingError::Open)?;
        // Ended by the drop of `Link`.
        let task = tokio::spawn(connection);
        Ok(Self { handle, task, lo })
    }

    fn route(&self, source: IpAddr) -> RouteMessage {
        match source {
            IpAddr::V4(ip) => RouteMessageBuilder::<Ipv4Addr>::new()
                .table_id(ROUTE_TABLE)
                .kind(RouteType::Local)
                .scope(RouteScope::Host)
                .output_interface(self.lo)
                .pref_source(ip)
                .build(),
            IpAddr::V6(ip) => RouteMessageBuilder::<Ipv6Addr>::new()
                .table_id(ROUTE_TABLE)
                .kind(RouteType::Local)
                .scope(RouteScope::Universe)
                .output_interface(self.lo)
                .pref_source(ip)
                .build(),
        }
    }

    async fn ensure_route(&self, source: IpAddr) -> Result<(), RoutingError> {
        let request = self.handle.route().add(self.route(source)).replace();
        tolerate(request.execute().await, libc::EEXIST).map_err(|source| RoutingError::Netlink {
            what: "adding the route of captured connections (does the namespace hold the pod's address?)",
            source,
        })
    }

    async fn remove_route(&self, source: IpAddr) -> Result<(), RoutingError> {
        tolerate(self.handle.route().del(self.route(source)).execute().await, libc::ESRCH)
            .map_err(|source| RoutingError::Netlink { what: "removing the route of captured connections", source })
    }

    async fn ensure_rule(&self, rule: RuleMessage) -> Result<(), RoutingError> {
        let mut request = self.handle.rule().add();
        *request.message_mut() = rule;
        tolerate(request.execute().await, libc::EEXIST)
            .map_err(|source| RoutingError::Netlink { what: "adding the rule of captured connections", source })
    }

    /// Adds an address of the kubelet's probes to lo, unless it is there.
    pub(super) async fn add_probe_source(&self, address: IpAddr) -> Result<(), RoutingError> {
        let mut request = self.handle.address().add(self.lo, address, prefix_length(address));
        unselectable(request.message_mut(), address);
        tolerate(request.execute().await, libc::EEXIST)
            .map_err(|source| RoutingError::Netlink { what: "adding the address of probes to lo", source })
    }

    pub(super) async fn remove_probe_source(&self, address: IpAddr) -> Result<(), RoutingError> {
        let length = prefix_length(address);
        let message = match address {
            IpAddr::V4(ip) => AddressMessageBuilder::<Ipv4Addr>::new().index(self.lo).address(ip, length).build(),
            IpAddr::V6(ip) => AddressMessageBuilder::<Ipv6Addr>::new().index(self.lo).address(ip, length).build(),
        };
        tolerate(self.handle.address().del(message).execute().await, libc::EADDRNOTAVAIL)
            .map_err(|source| RoutingError::Netlink { what: "removing the address of probes from lo", source })
    }

    async fn remove_rule(&self, rule: RuleMessage) -> Result<(), RoutingError> {
        tolerate(self.handle.rule().del(rule).execute().await, libc::ENOENT)
            .map_err(|source| RoutingError::Netlink { what: "removing the rule of captured connections", source })
    }
}

const fn prefix_length(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

/// No connection of the node shall take this address by itself: IPv4 looks at the scope, IPv6 passes over what is
/// deprecated.
fn unselectable(message: &mut AddressMessage, address: IpAddr) {
    match address {
        IpAddr::V4(_) => message.header.scope = AddressScope::Host,
        IpAddr::V6(_) => {
            let mut lifetime = CacheInfo::default();
            (lifetime.ifa_preferred, lifetime.ifa_valid) = (0, u32::MAX);
            message.attributes.push(AddressAttribute::CacheInfo(lifetime));
        }
    }
}

fn tcp_rule(family: Family) -> RuleMessage {
    rule(family, RULE_PREF_TCP, vec![RuleAttribute::IpProtocol(IpProtocol::Tcp)])
}

/// Every UDP socket of the pod is marked, so the port decides.
fn dns_rule(family: Family) -> RuleMessage {
    let port = RulePortRange { start: DNS_PORT, end: DNS_PORT };
    rule(
        family,
        RULE_PREF_DNS,
        vec![RuleAttribute::IpProtocol(IpProtocol::Udp), RuleAttribute::DestinationPortRange(port)],
    )
}

fn rule(family: Family, preference: u32, what: Vec<RuleAttribute>) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    };
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![
        RuleAttribute::Priority(preference),
        RuleAttribute::FwMark(MARK_CAPTURE & MARK_MASK),
        RuleAttribute::FwMask(MARK_MASK),
        RuleAttribute::Table(ROUTE_TABLE),
    ];
    message.attributes.extend(what);
    message
}

fn tolerate(result: Result<(), rtnetlink::Error>, errno: i32) -> Result<(), rtnetlink::Error> {
    match result {
        Err(rtnetlink::Error::NetlinkError(e)) if e.code.is_some_and(|c| c.get() == -errno) => Ok(()),
        other => other,
    }
}
