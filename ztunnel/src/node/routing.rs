//! Rules and routes inside a pod's namespace that turn marked TCP towards lo, set and removed over rtnetlink.
//!
//! Everything is idempotent: `ensure` is also the repair when something in the pod has flushed the rules, and says what
//! it had to put back. The rules stay behind the `local` table, so the pod's own addresses and 127/8 are never touched.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ebpf_loader::abi::{DNS_PORT, MARK_CAPTURE, MARK_MASK, ROUTE_TABLE, RULE_PREF_DNS, RULE_PREF_TCP};
use futures_util::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::IpProtocol;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage, AddressScope, CacheInfo};
use rtnetlink::packet_route::link::LinkFlags;
use rtnetlink::packet_route::route::{RouteAttribute, RouteHeader, RouteMessage, RouteScope, RouteType};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange};
use rtnetlink::{AddressMessageBuilder, Handle, IpVersion, LinkUnspec, RouteMessageBuilder};
use thiserror::Error;

use super::netns::{Family, Netns};
use super::sysctl::Sysctls;

/// Where a new namespace has its rule for the main table.
const RULE_PREF_MAIN: u32 = 32_766;

/// A part of what keeps a pod captured, as it is named in the metric of repairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    Link,
    Route,
    Rule,
    Sysctl,
    Steering,
    Listener,
}

impl Part {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Link => "link",
            Self::Route => "route",
            Self::Rule => "rule",
            Self::Sysctl => "sysctl",
            Self::Steering => "steering",
            Self::Listener => "listener",
        }
    }
}

/// The kernel said no.
#[derive(Debug, Error)]
pub enum RoutingError {
    #[error("opening netlink in another namespace: {0}")]
    Open(#[source] io::Error),
    #[error("sysctl net/{name} of the pod's namespace (is /proc/sys writable?): {source}")]
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

/// Makes marked TCP of the pod go to lo, and says what of that was not so. `addresses` are the pod's; the first of a
/// family becomes the source address.
///
/// # Errors
/// The step that was refused.
pub async fn ensure(
    netns: &Netns,
    sysctls: &Sysctls,
    addresses: &[IpAddr],
    dns: Dns,
) -> Result<BTreeSet<Part>, RoutingError> {
    if addresses.is_empty() {
        return Err(RoutingError::NoAddress);
    }
    let mut changed = BTreeSet::new();
    let mut note = |part, is_changed: bool| {
        if is_changed {
            changed.insert(part);
        }
    };
    let link = Link::open(netns)?;
    // Rules first: while one is missing, what was captured leaves in clear text.
    for source in sources(addresses) {
        let family = Family::of(source);
        let mut missing = link.ensure_rule(tcp_rule(family)).await?;
        match dns {
            Dns::Captured => missing |= link.ensure_rule(dns_rule(family)).await?,
            Dns::Direct => missing |= link.remove_rule(dns_rule(family)).await?,
        }
        note(Part::Rule, missing);
        if missing {
            link.ensure_main(family).await?;
        }
    }
    note(Part::Link, link.ensure_up().await?);
    for source in sources(addresses) {
        note(Part::Route, link.ensure_route(source).await?);
    }
    note(Part::Sysctl, sysctls.set()?);
    Ok(changed)
}

/// Lets the pod's DNS go where it is sent, also that of sockets which are marked already and live on. To be done before
/// the steering stops: in between, the packets would arrive at lo for nobody.
///
/// # Errors
/// The step that was refused.
pub async fn release_dns(netns: &Netns) -> Result<(), RoutingError> {
    let link = Link::open(netns)?;
    for family in [Family::V4, Family::V6] {
        link.remove_rule(dns_rule(family)).await?;
    }
    Ok(())
}

/// Takes back what [`ensure`] did, in the opposite order; `found` are the sysctls that were set before. What is gone
/// already is no error, and neither is a family that the pod has lost.
///
/// # Errors
/// The step that was refused.
pub async fn remove(netns: &Netns, sysctls: &Sysctls, found: u32) -> Result<(), RoutingError> {
    let link = Link::open(netns)?;
    for family in [Family::V4, Family::V6] {
        link.remove_rule(dns_rule(family)).await?;
        link.remove_rule(tcp_rule(family)).await?;
        for route in link.routes(family).await? {
            link.remove_route(route).await?;
        }
    }
    sysctls.restore(found)
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
        // Strict, so that a dump is of one table and not of all.
        let open = || Ok((rtnetlink::new_connection_with_strict_check()?, nix::net::if_::if_nametoindex("lo")?));
        let ((connection, handle, _), lo) = netns.enter(open).map_err(RoutingError::Open)?;
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

    /// Our table has this one route and no other, or it is made so: true.
    async fn ensure_route(&self, source: IpAddr) -> Result<bool, RoutingError> {
        let (mut present, mut changed) = (false, false);
        for route in self.routes(Family::of(source)).await? {
            if self.is_ours(&route, source) {
                present = true;
            } else {
                self.remove_route(route).await?;
                changed = true;
            }
        }
        if !present {
            let request = self.handle.route().add(self.route(source));
            tolerate(request.execute().await, libc::EEXIST).map_err(|source| RoutingError::Netlink {
                what: "adding the route of captured connections (does the namespace hold the pod's address?)",
                source,
            })?;
        }
        Ok(changed || !present)
    }

    fn is_ours(&self, route: &RouteMessage, source: IpAddr) -> bool {
        let source = match source {
            IpAddr::V4(ip) => RouteAttribute::PrefSource(ip.into()),
            IpAddr::V6(ip) => RouteAttribute::PrefSource(ip.into()),
        };
        route.header.kind == RouteType::Local
            && route.header.destination_prefix_length == 0
            && route.attributes.contains(&RouteAttribute::Oif(self.lo))
            && route.attributes.contains(&source)
    }

    /// What is in our table.
    async fn routes(&self, family: Family) -> Result<Vec<RouteMessage>, RoutingError> {
        let mut filter = RouteMessage::default();
        filter.header.address_family = address_family(family);
        filter.attributes.push(RouteAttribute::Table(ROUTE_TABLE));
        let routes: Result<Vec<_>, _> = self.handle.route().get(filter).execute().try_collect().await;
        match routes {
            // There is no such table, or no such family.
            Err(_) if is_error(&routes, &NO_FAMILY) || is_error(&routes, &[libc::ENOENT]) => Ok(Vec::new()),
            routes => routes.map_err(|source| RoutingError::Netlink { what: "reading the routing table", source }),
        }
    }

    async fn remove_route(&self, route: RouteMessage) -> Result<(), RoutingError> {
        tolerate(self.handle.route().del(route).execute().await, libc::ESRCH)
            .map_err(|source| RoutingError::Netlink { what: "removing the route of captured connections", source })
            .map(drop)
    }

    /// True when it was not there.
    async fn ensure_rule(&self, rule: RuleMessage) -> Result<bool, RoutingError> {
        let mut request = self.handle.rule().add();
        *request.message_mut() = rule;
        tolerate(request.execute().await, libc::EEXIST)
            .map_err(|source| RoutingError::Netlink { what: "adding the rule of captured connections", source })
    }

    /// Where a flush has taken every rule but ours, nothing has a way out any more, ztunnel's own connections included.
    async fn ensure_main(&self, family: Family) -> Result<(), RoutingError> {
        let version = match family {
            Family::V4 => IpVersion::V4,
            Family::V6 => IpVersion::V6,
        };
        let failed = |source| RoutingError::Netlink { what: "reading the routing rules", source };
        let rules: Vec<RuleMessage> = self.handle.rule().get(version).execute().try_collect().await.map_err(failed)?;
        let is_foreign = |rule: &RuleMessage| {
            let preference = rule.attributes.iter().find_map(|attribute| match attribute {
                RuleAttribute::Priority(preference) => Some(*preference),
                _ => None,
            });
            !matches!(preference, None | Some(0 | RULE_PREF_TCP | RULE_PREF_DNS))
        };
        if rules.iter().any(is_foreign) {
            return Ok(());
        }
        let mut main = RuleMessage::default();
        main.header.family = address_family(family);
        main.header.action = RuleAction::ToTable;
        main.header.table = RouteHeader::RT_TABLE_MAIN;
        main.attributes.push(RuleAttribute::Priority(RULE_PREF_MAIN));
        self.ensure_rule(main).await.map(drop)
    }

    /// True when lo was down.
    async fn ensure_up(&self) -> Result<bool, RoutingError> {
        let failed = |source| RoutingError::Netlink { what: "setting lo up", source };
        let found: Vec<_> =
            self.handle.link().get().match_index(self.lo).execute().try_collect().await.map_err(failed)?;
        if found.iter().any(|lo| lo.header.flags.contains(LinkFlags::Up)) {
            return Ok(false);
        }
        let up = LinkUnspec::new_with_index(self.lo).up().build();
        self.handle.link().set(up).execute().await.map_err(failed)?;
        Ok(true)
    }

    /// Adds an address of the kubelet's probes to lo, unless it is there.
    pub(super) async fn add_probe_source(&self, address: IpAddr) -> Result<(), RoutingError> {
        let mut request = self.handle.address().add(self.lo, address, prefix_length(address));
        unselectable(request.message_mut(), address);
        tolerate(request.execute().await, libc::EEXIST)
            .map_err(|source| RoutingError::Netlink { what: "adding the address of probes to lo", source })
            .map(drop)
    }

    pub(super) async fn remove_probe_source(&self, address: IpAddr) -> Result<(), RoutingError> {
        let length = prefix_length(address);
        let message = match address {
            IpAddr::V4(ip) => AddressMessageBuilder::<Ipv4Addr>::new().index(self.lo).address(ip, length).build(),
            IpAddr::V6(ip) => AddressMessageBuilder::<Ipv6Addr>::new().index(self.lo).address(ip, length).build(),
        };
        let removed = self.handle.address().del(message).execute().await;
        if is_error(&removed, &NO_FAMILY) {
            return Ok(());
        }
        tolerate(removed, libc::EADDRNOTAVAIL)
            .map_err(|source| RoutingError::Netlink { what: "removing the address of probes from lo", source })
            .map(drop)
    }

    /// True when it was there. Without its family there is no rule.
    async fn remove_rule(&self, rule: RuleMessage) -> Result<bool, RoutingError> {
        let removed = self.handle.rule().del(rule).execute().await;
        if is_error(&removed, &NO_FAMILY) {
            return Ok(false);
        }
        tolerate(removed, libc::ENOENT)
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
    message.header.family = address_family(family);
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

const fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

/// What a kernel says that has no IPv6.
const NO_FAMILY: [i32; 2] = [libc::EOPNOTSUPP, libc::EAFNOSUPPORT];

/// Did the kernel answer with one of these?
fn is_error<T>(result: &Result<T, rtnetlink::Error>, errnos: &[i32]) -> bool {
    match result {
        Err(rtnetlink::Error::NetlinkError(e)) => e.code.is_some_and(|code| errnos.contains(&-code.get())),
        _ => false,
    }
}

/// True when the request changed something, false when that was so already.
fn tolerate(result: Result<(), rtnetlink::Error>, errno: i32) -> Result<bool, rtnetlink::Error> {
    if is_error(&result, &[errno]) { Ok(false) } else { result.map(|()| true) }
}
