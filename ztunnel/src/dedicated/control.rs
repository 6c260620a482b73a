//! The way to the control plane from inside a captured namespace.
//!
//! Every socket here carries the bypass mark, those of [`stub`] too: what waits for the control plane to be captured could
//! never reach it, least of all after a crash, when everything else is refused.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use mesh::grpc::Dialer;
use tokio::net::{TcpSocket, TcpStream};

use crate::dns::resolv;
use crate::names::stub;
use crate::node::netns::{Family, Netns};

/// How long one address may take to answer a SYN; there may be others, and the whole connect has five seconds.
const CONNECT: Duration = Duration::from_secs(2);
/// As the C library: what has fewer dots is looked for in the search domains first.
const NDOTS: usize = 1;
const HOSTS: &str = "/etc/hosts";
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Where the servers stand that a local stub asks. The stub itself is captured like everybody else.
const BEHIND_STUB: &str = "/run/systemd/resolve/resolv.conf";

/// Connections that are never captured.
#[must_use]
pub fn dialer() -> Dialer {
    Dialer::new(|host, port| async move { dial(&host, port).await })
}

async fn dial(host: &str, port: u16) -> io::Result<TcpStream> {
    let addresses = match host.parse::<IpAddr>() {
        Ok(ip) => vec![ip],
        Err(_) => resolve(host).await?,
    };
    let mut last = None;
    for ip in &addresses {
        let connected = tokio::time::timeout(CONNECT, connect(SocketAddr::new(*ip, port))).await;
        match connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| io::Error::other(format!("{host} has no address"))))
}

async fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let socket = Netns::own()?.outgoing(any(to.ip()))?;
    TcpSocket::from_std_stream(socket.into()).connect(to).await
}

const fn any(like: IpAddr) -> IpAddr {
    match Family::of(like) {
        Family::V4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        Family::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    }
}

/// The addresses of `host`, from the hosts file or the servers of `resolv.conf`. Files are read each time: they are
/// small, and somebody may be mending them.
async fn resolve(host: &str) -> io::Result<Vec<IpAddr>> {
    let known = in_hosts(&fs::read_to_string(HOSTS).unwrap_or_default(), host);
    if !known.is_empty() {
        return Ok(known);
    }
    let settings = Settings::read(Path::new(RESOLV_CONF), Path::new(BEHIND_STUB))?;
    let mut last = None;
    for name in settings.candidates(host) {
        match stub::look_up(&settings.servers, &name, true).await {
            Ok(found) if !found.addresses.is_empty() => return Ok(found.addresses),
            Ok(_) => {}
            Err(error) => last = Some(io::Error::other(format!("{name}: {error}"))),
        }
    }
    Err(last.unwrap_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no address for {host}"))))
}

fn in_hosts(text: &str, host: &str) -> Vec<IpAddr> {
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default());
    lines
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let ip = words.next()?.parse().ok()?;
            words.any(|name| name.eq_ignore_ascii_case(host.trim_end_matches('.'))).then_some(ip)
        })
        .collect()
}

/// `resolv.conf`, as far as it matters here.
#[derive(Debug, Default, PartialEq, Eq)]
struct Settings {
    servers: Vec<SocketAddr>,
    search: Vec<String>,
    ndots: usize,
}

impl Settings {
    fn read(path: &Path, behind_stub: &Path) -> io::Result<Self> {
        let mut settings = Self::parse(&fs::read_to_string(path)?);
        if settings.servers.iter().all(|server| server.ip().is_loopback())
            && let Ok(text) = fs::read_to_string(behind_stub)
        {
            settings.servers = resolv::servers(&text);
        }
        Ok(settings)
    }

    fn parse(text: &str) -> Self {
        let mut settings = Self { servers: resolv::servers(text), ndots: NDOTS, ..Self::default() };
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("search" | "domain") => settings.search = words.map(str::to_owned).collect(),
                Some("options") => {
                    let ndots = words.filter_map(|o| o.strip_prefix("ndots:")?.parse().ok()).next_back();
                    settings.ndots = ndots.unwrap_or(settings.ndots);
                }
                _ => {}
            }
        }
        settings
    }

    /// The names to ask for, in order.
    fn candidates(&self, host: &str) -> Vec<String> {
        if host.ends_with('.') {
            return vec![host.to_owned()];
        }
        let mut names: Vec<String> = self.search.iter().map(|domain| format!("{host}.{domain}")).collect();
        let at = if host.matches('.').count() >= self.ndots { 0 } else { names.len() };
        names.insert(at, host.to_owned());
        names
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn the_hosts_file_is_read_as_everybody_reads_it() {
        let text = "127.0.0.1 localhost\n192.0.2.1 istiod.istio-system.svc istiod # the mesh\n\
                    2001:db8::1\tISTIOD.istio-system.svc\n# 192.0.2.9 istiod.istio-system.svc\nnonsense istiod\n";
        assert_eq!(in_hosts(text, "istiod.istio-system.svc"), [ip("192.0.2.1"), ip("2001:db8::1")]);
        assert_eq!(in_hosts(text, "istiod"), [ip("192.0.2.1")]);
        assert!(in_hosts(text, "mesh").is_empty());
    }

    #[test]
    fn search_domains_apply_as_in_the_c_library() {
        let text = "nameserver 10.96.0.10\nnameserver fd00::10\nnameserver what\n\
                    search shop.svc.cluster.local svc.cluster.local\noptions edns0 ndots:5\n";
        let settings = Settings::parse(text);
        assert_eq!(settings.servers, ["10.96.0.10:53", "[fd00::10]:53"].map(|server| server.parse().unwrap()));
        let names = settings.candidates("istiod.istio-system.svc");
        assert_eq!(names[0], "istiod.istio-system.svc.shop.svc.cluster.local");
        assert_eq!(names[2], "istiod.istio-system.svc");
        assert_eq!(settings.candidates("a.b."), ["a.b."]);
        assert_eq!(Settings::parse("search x.example").candidates("istiod.y")[0], "istiod.y");
    }

    #[test]
    fn the_servers_behind_a_local_stub_are_asked_because_the_stub_is_captured() {
        let dir = tempfile::tempdir().unwrap();
        let (stub, behind) = (dir.path().join("stub"), dir.path().join("behind"));
        fs::write(&stub, "nameserver 127.0.0.53\nsearch x.example\n").unwrap();
        fs::write(&behind, "nameserver 192.0.2.53\n").unwrap();
        let settings = Settings::read(&stub, &behind).unwrap();
        assert_eq!(
            (settings.servers, settings.search),
            (vec!["192.0.2.53:53".parse().unwrap()], vec!["x.example".to_owned()])
        );
        fs::remove_file(&behind).unwrap();
        assert_eq!(Settings::read(&stub, &behind).unwrap().servers, ["127.0.0.53:53".parse().unwrap()]);
    }
}
