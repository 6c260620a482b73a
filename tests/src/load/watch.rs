//! What crosses the nodes while a load runs: whether a secret can be read, and whether pods of the mesh talk past it.
//!
//! The nodes' own packet filter counts, so that no packet is missed however busy the machine is; a capture beside it searches the
//! bytes of whatever it can take in.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};

use super::{OPEN, SECRET};
use crate::capture::{Capture, contains};
use crate::sys;
use crate::topology::Netns;

const TABLE: &str = "soak_watch";

/// A watch over some namespaces that forward the pods' packets.
pub struct Watch {
    nodes: Vec<Netns>,
    captures: Vec<Capture>,
    searched: Arc<AtomicU64>,
}

/// What was seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Attempts of a pod of the mesh to connect to another one on a port that is not HBONE's.
    pub around: u64,
    /// Frames in which a secret can be read.
    pub secrets: usize,
    /// Frames in which what may be read was read: the watcher sees.
    pub public: usize,
    /// Frames that were searched.
    pub searched: u64,
}

impl Watch {
    /// Watches from now on; `mesh` are the addresses of pods that talk through the mesh alone.
    pub fn start(nodes: &[&Netns], mesh: &[IpAddr]) -> Result<Self> {
        let set = |v4: bool| {
            let own = mesh.iter().filter(|address| address.is_ipv4() == v4);
            own.map(IpAddr::to_string).collect::<Vec<_>>().join(", ")
        };
        let (v4, v6) = (set(true), set(false));
        let rules = format!(
            "table inet {TABLE} {{\n  counter around {{ }}\n  chain forward {{\n    type filter hook forward priority -200\n\
             \x20   tcp dport != 15008 tcp flags & (syn|ack) == syn ip saddr {{ {v4} }} ip daddr {{ {v4} }} counter name around\n\
             \x20   tcp dport != 15008 tcp flags & (syn|ack) == syn ip6 saddr {{ {v6} }} ip6 daddr {{ {v6} }} counter name around\n  }}\n}}\n"
        );
        let mut watch = Self { nodes: Vec::new(), captures: Vec::new(), searched: Arc::default() };
        for node in nodes {
            nft(node, &["-f", "-"], &rules)?;
            let searched = watch.searched.clone();
            let mut public_kept = false;
            watch.captures.push(Capture::keeping(node, move |frame| {
                searched.fetch_add(1, Ordering::Relaxed);
                if contains(frame, SECRET.as_bytes()) {
                    return true;
                }
                // One is enough to know.
                !public_kept && contains(frame, OPEN.as_bytes()) && !std::mem::replace(&mut public_kept, true)
            })?);
            watch.nodes.push((*node).clone());
        }
        Ok(watch)
    }

    /// Ends it and says what was seen.
    pub fn stop(mut self) -> Result<Seen> {
        let mut seen = Seen::default();
        for capture in std::mem::take(&mut self.captures) {
            let wire = capture.stop()?;
            seen.secrets += wire.count(SECRET.as_bytes());
            seen.public += wire.count(OPEN.as_bytes());
        }
        seen.searched = self.searched.load(Ordering::Relaxed);
        for node in &self.nodes {
            let said = nft(node, &["-j", "list", "counter", "inet", TABLE, "around"], "")?;
            let said: serde_json::Value = serde_json::from_str(&said)?;
            let objects = said["nftables"].as_array().context("nft lists no objects")?;
            let packets = objects.iter().find_map(|object| object["counter"]["packets"].as_u64());
            seen.around += packets.context("nft shows no counter")?;
        }
        Ok(seen)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        for node in &self.nodes {
            // Gone with the namespace at the latest.
            let _ = nft(node, &["delete", "table", "inet", TABLE], "");
        }
    }
}

fn nft(node: &Netns, arguments: &[&str], input: &str) -> Result<String> {
    let mut command = sys::command("ip");
    command.args(["netns", "exec", &node.name, "nft"]).args(arguments);
    let output = sys::feed(&mut command, input)?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
