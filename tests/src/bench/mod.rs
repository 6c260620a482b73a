//! Side-by-side measurements: the same pods and the same load without a mesh, with ours, and with a peer's.
//!
//! Each contestant has a lab of its own with the same topology; they take turns test by test and round by round, so that whatever
//! else the machine does hits all alike. What is compared are ratios from one run, never figures of two. Results go to a JSON file
//! and a table; nothing here fails because something was slow.
//!
//! - [`serve`] and [`load`] are the two ends of the traffic: processes of this very binary, inside pods
//! - [`arena`] brings a contestant up
//! - [`usage`] reads CPU, context switches and memory from the kernel
//! - [`proof`] shows once per run that a contestant carries bytes, unchanged and unreadable
//! - [`l4`] is the suite: which tests, which budgets, in which order
//! - [`workloads`] is its part about meshes of many workloads, without traffic
//! - [`scale`] is another: the control plane under a fleet of node proxies that only listen
//! - [`capture`] is the third: the way into a proxy, without one; its two ends are in [`sink`]
//! - [`relay`] makes contestants that only copy, with TLS and without: what two user-space hops cost whatever they do
//! - [`report`] makes medians, JSON and the table

pub mod arena;
pub mod capture;
pub mod interrupt;
pub mod l4;
pub mod load;
pub mod proof;
pub mod relay;
pub mod report;
pub mod scale;
pub mod serve;
pub mod sink;
pub mod usage;
pub mod workloads;

use std::path::PathBuf;

use clap::Args;

/// What every suite is told.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// How often each test is run for each contestant
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: u32,
    /// Seconds that are measured in each run, after a short warm-up
    #[arg(long, default_value_t = 3.0, value_parser = seconds)]
    pub secs: f64,
    /// Another mesh to run beside ours; may be given several times
    #[arg(long, value_name = "NAME=COMMAND", value_parser = peer, long_help = PEER_HELP)]
    pub peer: Vec<(String, String)>,
    /// Run two relays beside ours that copy and do nothing else, and two that speak TLS with each other: what any pair of proxies
    /// costs here
    #[arg(long)]
    pub relay: bool,
    /// Only these tests
    #[arg(long, value_delimiter = ',', value_name = "TEST,...")]
    pub only: Vec<String>,
    /// Where the JSON goes [default: target/bench/SUITE.json]
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Cores that clients, servers and proxies share
    #[arg(long, value_delimiter = ',', value_name = "N,...", default_values_t = [0, 1])]
    pub cpus: Vec<usize>,
}

const PEER_HELP: &str = "\
Another mesh to run beside ours; may be given several times. A peer named `ztunnel` is what the budgets are taken against.

COMMAND is run by `sh -c` once on each of two nodes: as root, in the node's network namespace, in the cgroup CGROUP_ROOT/system
(all that runs there counts as proxy). It has to capture the pods of its node with its own means, make READY_FILE once it does, and
keep running; at the end it is killed with all its children. Its environment:
  NODE_NAME, NODE_IP   node-a or node-b, and its address
  PODS                 JSON file: [{name, uid, node, netns, ipv4, ipv6, cgroup}], `netns` being a file to enter
  LOCAL_XDS_PATH       workloads of the mesh, as Istio's ztunnel reads them from a file
  LOCAL_CA_DIR         ca-cert.pem and ca-key.pem, the same on both nodes
  CGROUP_ROOT, BPFFS_DIR   cgroup2 directory above all of the node's processes; a private directory on a bpffs
  READY_FILE           to be created when pods are captured";

fn seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.2..=120.0).contains(&seconds) { Ok(seconds) } else { Err("between 0.2 and 120".to_owned()) }
}

fn peer(text: &str) -> Result<(String, String), String> {
    let (name, command) = text.split_once('=').ok_or("NAME=COMMAND is expected")?;
    let plain = name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    match name {
        "plain" | "ours" | "relay" | "tlsrelay" => Err(format!("{name} is taken")),
        _ if name.is_empty() || name.len() > 12 || !plain => {
            Err("NAME: up to twelve lower case letters and digits".into())
        }
        _ if command.trim().is_empty() => Err("COMMAND is empty".to_owned()),
        _ => Ok((name.to_owned(), command.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::peer;

    #[test]
    fn a_peer_needs_a_name_of_its_own_and_a_command() {
        assert_eq!(peer("envoy=run --it=now"), Ok(("envoy".to_owned(), "run --it=now".to_owned())));
        for wrong in ["envoy", "envoy=", "=run", "plain=run", "ours=run", "Two Words=run", "averyveryverylongname=run"]
        {
            assert!(peer(wrong).is_err(), "{wrong}");
        }
    }
}
