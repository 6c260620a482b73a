//! `ztunnel release`: what a dedicated ztunnel leaves in the kernel on purpose, taken away on purpose.
//!
//! It fails closed, so its end leaves capture in place. Whoever takes a machine out of the mesh stops the service and
//! then runs this, in the same environment and network namespace. New connections go direct from then on.

use anyhow::{Context, bail};
use ebpf_loader::Capture;
use nix::sys::stat::stat;

use crate::admin;
use crate::config::Config;
use crate::node::netns::Netns;
use crate::node::routing;
use crate::node::sysctl::Sysctls;

/// Removes the pins, the rules and the routes. Says what it did on standard output; nothing to do is no error.
///
/// # Errors
/// When a ztunnel is still running, the pins are another namespace's, or the kernel says no.
pub fn run(config: &Config) -> anyhow::Result<()> {
    let Some(settings) = config.mode.dedicated() else {
        bail!(
            "only a ztunnel of dedicated mode (PROXY_MODE=dedicated) is released by hand; pods leave the mesh when \
               their labels say so"
        );
    };
    if config.mode.is_capture_off() {
        bail!("with CAPTURE=off nothing is captured: run this in the environment of the ztunnel that captured");
    }
    if admin::is_answered(&settings.admin_socket) {
        bail!("a ztunnel is running (it answers at {}): stop it first", settings.admin_socket.display());
    }
    refuse_foreign_pins(config)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(take_away(config))?;
    println!("released: nothing of this network namespace is captured any more");
    Ok(())
}

/// Ends all capture of our namespace: pins, rules, routes.
///
/// # Errors
/// When the kernel says no.
pub async fn take_away(config: &Config) -> anyhow::Result<()> {
    let own = Netns::own().context("opening this network namespace")?;
    let sysctls = Sysctls::open(&own, &config.proc_root)?;
    let now = sysctls.found()?;
    let found = if config.bpffs_dir.exists() {
        // What the first ztunnel found is kept beside the pins.
        let capture = Capture::open(&config.bpffs_dir, &config.cgroup_root)?;
        capture.remember(ebpf_loader::cookie_of(own.file())?, now)?
    } else {
        now
    };
    // The DNS rule before the pins: sockets that are marked already would have their queries sent to nobody.
    routing::release_dns(&own).await?;
    ebpf_loader::remove_pins(&config.bpffs_dir)?;
    routing::remove(&own, &sysctls, found).await?;
    Ok(())
}

/// Fails when something pinned in our directory captures another namespace than this: two ztunnels with one directory
/// would take each other's capture away.
///
/// # Errors
/// That, or pins that cannot be read.
pub fn refuse_foreign_pins(config: &Config) -> anyhow::Result<()> {
    let own = stat("/proc/self/ns/net").context("reading /proc/self/ns/net")?.st_ino;
    let attached = ebpf_loader::attached_netns(&config.bpffs_dir)?;
    if let Some(other) = attached.iter().find(|inode| **inode != own) {
        bail!(
            "{} holds the capture of another network namespace ({other}): each ztunnel needs a BPFFS_DIR of its own",
            config.bpffs_dir.display()
        );
    }
    Ok(())
}
