//! The chained CNI plugin, and what it shares with the ztunnel it asks: the protocol between them and the file in which
//! ztunnel remembers namespaces.
//!
//! A crate of its own, because the program is copied to nodes whose libraries we do not know and so is linked statically,
//! and because a container runtime runs it for every pod: no runtime, no logging, a few system calls.

#![forbid(unsafe_code)]

pub mod namespaces;
pub mod plugin;
pub mod wire;

use std::collections::BTreeMap;
use std::io::{self, Read as _};
use std::process::ExitCode;

/// Where ztunnel listens for plugins.
pub const DEFAULT_SOCKET: &str = "/var/run/ztunnel/cni.sock";
/// What ztunnel remembers of Kubernetes namespaces; must outlive a reboot to be of use.
pub const DEFAULT_STATE: &str = "/var/lib/ztunnel/namespaces.json";

/// Configurations are some kilobytes.
const MAX_INPUT: u64 = 16 << 20;

/// Serves the one call this process was started for: `CNI_*` and standard input to standard output.
#[must_use]
pub fn main() -> ExitCode {
    let environment: BTreeMap<String, String> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(name, _)| name.starts_with("CNI_"))
        .collect();
    let mut input = Vec::new();
    if let Err(error) = io::stdin().take(MAX_INPUT).read_to_end(&mut input) {
        eprintln!("{}: reading standard input: {error}", plugin::NAME);
    }
    let outcome = plugin::call(&environment, &input);
    if let Some(output) = outcome.output {
        println!("{output}");
    }
    if outcome.succeeded { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
