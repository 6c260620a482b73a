//! A peer in the mesh, and who talks to it in clear, by the count of the node's own packet filter: it misses no packet,
//! however busy the machine is. A capture beside it looks for requests that can be read.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use mesh_tests::capture::{Capture, contains};
use mesh_tests::sys;
use mesh_tests::topology::Netns;

use crate::support::Stage;

const TABLE: &str = "first_acts";
/// What the applications say first of all.
const REQUEST: &[u8] = b"GET /first-act";

/// The servers of the shop.
pub struct Peer {
    service: IpAddr,
    endpoints: BTreeSet<IpAddr>,
}

impl Peer {
    pub fn of(stage: &Stage) -> Result<Self> {
        let service = stage.kubectl(&["-n", "shop", "get", "service", "server", "-o", "jsonpath={.spec.clusterIP}"])?;
        let pods = stage.teller.session.pods();
        let servers = pods.iter().filter(|pod| pod.labels.get("app").is_some_and(|app| app == "server"));
        // The pods that are to talk to it have no other addresses.
        let endpoints: BTreeSet<IpAddr> =
            servers.flat_map(|pod| pod.addresses.clone()).filter(IpAddr::is_ipv4).collect();
        ensure!(!endpoints.is_empty(), "no server");
        Ok(Self { service: service.trim().parse()?, endpoints })
    }

    /// What applications may dial: the service, and each of its pods.
    pub fn targets(&self) -> Vec<String> {
        let pods = self.endpoints.iter().map(|pod| format!("{pod}:8080"));
        std::iter::once(format!("{}:80", self.service)).chain(pods).collect()
    }

    /// Watches what arrives at a node for the peer from now on: before any address of it is changed, and from each pod
    /// once, wherever it goes.
    pub fn watch(&self, node: &Netns) -> Result<Watch> {
        let peers: Vec<String> = self.endpoints.iter().chain([&self.service]).map(IpAddr::to_string).collect();
        let to_peer = format!("ip daddr {{ {} }} tcp flags & (syn|ack) == syn", peers.join(", "));
        let set = "type ipv4_addr; size 65535; flags dynamic";
        let rules = format!(
            "table ip {TABLE} {{\n  set clear {{ {set}; }}\n  set tunnels {{ {set}; }}\n  chain arrives {{\n\
             \x20   type filter hook prerouting priority -300\n\
             \x20   {to_peer} tcp dport != 15008 update @clear {{ ip saddr counter }}\n\
             \x20   {to_peer} tcp dport 15008 update @tunnels {{ ip saddr counter }}\n  }}\n}}\n"
        );
        nft(node, &["-f", "-"], &rules)?;
        let capture = Capture::keeping(node, |frame| contains(frame, REQUEST))?;
        Ok(Watch { node: node.clone(), capture: Some(capture) })
    }
}

/// A watch over one node.
pub struct Watch {
    node: Netns,
    capture: Option<Capture>,
}

impl Watch {
    /// Not one SYN went to the peer in clear but from the controls, and from each of those one did, so that it would have
    /// been seen; each of the others opened a tunnel.
    pub fn judge(mut self, inside: &BTreeSet<IpAddr>, controls: &BTreeSet<IpAddr>) -> Result<()> {
        let wire = self.capture.take().context("only this takes the capture, and it takes self")?.stop()?;
        let (clear, tunnels) = (self.counted("clear")?, self.counted("tunnels")?);
        let count = |of: &BTreeMap<IpAddr, u64>, whose: &dyn Fn(&IpAddr) -> bool| {
            of.iter().filter(|(ip, _)| whose(ip)).map(|(_, packets)| packets).sum::<u64>()
        };
        println!(
            "  {} pods of the mesh: {} SYNs in clear, {} for tunnels; {} pods outside: {} in clear",
            inside.len(),
            count(&clear, &|ip| !controls.contains(ip)),
            count(&tunnels, &|_| true),
            controls.len(),
            count(&clear, &|ip| controls.contains(ip)),
        );
        let (clear, tunnels): (BTreeSet<_>, BTreeSet<_>) = (clear.into_keys().collect(), tunnels.into_keys().collect());
        ensure!(clear == *controls, "SYNs in clear from {clear:?}, to be expected from {controls:?} alone");
        ensure!(tunnels == *inside, "tunnels from {tunnels:?}, to be expected from {inside:?}");
        let read: BTreeSet<IpAddr> = wire.segments().map(|segment| segment.source.0).collect();
        ensure!(read.is_subset(controls), "requests can be read of {read:?}");
        ensure!(controls.is_empty() || !read.is_empty(), "no request was read, not even of who sends it in clear");
        Ok(())
    }

    /// Packets by source.
    fn counted(&self, set: &str) -> Result<BTreeMap<IpAddr, u64>> {
        let said: serde_json::Value =
            serde_json::from_str(&nft(&self.node, &["-j", "list", "set", "ip", TABLE, set], "")?)?;
        let objects = said["nftables"].as_array().context("nft lists no objects")?;
        let set = objects.iter().find_map(|object| object.get("set")).context("nft shows no set")?;
        let elements = set["elem"].as_array().map(Vec::as_slice).unwrap_or_default();
        let element = |element: &serde_json::Value| {
            let element = &element["elem"];
            Some((element["val"].as_str()?.parse().ok()?, element["counter"]["packets"].as_u64()?))
        };
        elements.iter().map(|of| element(of).with_context(|| format!("nft shows {of}"))).collect()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Gone with the namespace at the latest.
        let _ = nft(&self.node, &["delete", "table", "ip", TABLE], "");
    }
}

fn nft(node: &Netns, arguments: &[&str], input: &str) -> Result<String> {
    let mut command = sys::command("ip");
    command.args(["netns", "exec", &node.name, "nft"]).args(arguments);
    let output = sys::feed(&mut command, input)?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
