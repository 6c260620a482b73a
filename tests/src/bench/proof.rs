//! Before anything is timed: bytes come back unchanged, and only a contestant without a mesh shows them on the wire.

use anyhow::{Context, Result, ensure};

use super::arena::{Arena, Mesh, Target};
use super::load;
use crate::capture::{Capture, Wire};

/// How much has to come back unchanged.
const BULK: u32 = 64 << 20;
/// Little enough that a capture holds it all.
const SHORT: u32 = 8 << 10;
const HBONE_PORT: u16 = 15008;
const TLS13: u16 = 0x0304;

/// Proves one contestant; returns a sentence for the reader.
///
/// # Errors
/// When bytes are lost or changed, when ours can be read on the wire, or when the capture does not even see plain traffic.
pub fn prove(arena: &mut Arena) -> Result<String> {
    let (wire, local) = captured(arena)?;
    let marker = load::marker();
    let (across, within) = (wire.count(&marker), local.count(&marker));
    let sentence = match arena.mesh {
        Mesh::Plain => {
            ensure!(
                across > 0 && within > 0,
                "the marker of plain traffic is not seen on the wire: the proof proves nothing"
            );
            "readable on the wire, as it should be without a mesh"
        }
        Mesh::Relay { tls: false } => "readable on the wire, as it only copies",
        Mesh::Relay { tls: true } => {
            ensure!(across == 0 && within == 0, "the marker is on the wire ({across} and {within} frames)");
            "not one byte readable, without identities"
        }
        Mesh::Ours(_) => {
            ensure!(across == 0 && within == 0, "the marker is on the wire ({across} and {within} frames)");
            let versions = wire.tls_versions(HBONE_PORT);
            let pods = [arena.client_address(), arena.address(Target::OtherNode)];
            let not_hbone = wire.between(&pods).filter(|s| s.source.1 != HBONE_PORT && s.destination.1 != HBONE_PORT);
            let elsewhere = not_hbone.count();
            ensure!(elsewhere == 0, "{elsewhere} segments between the pods are not on port {HBONE_PORT}");
            let only13 = !versions.is_empty() && versions.iter().all(|version| *version == TLS13);
            ensure!(only13, "TLS versions on the wire: {versions:x?}");
            "not one byte readable, only TLS 1.3 on port 15008"
        }
        // A peer may be anything; its figures are read with this beside them.
        Mesh::Peer(_) if across == 0 => "not readable on the wire",
        Mesh::Peer(_) => "READABLE on the wire",
    };
    for target in [Target::OtherNode, Target::SameNode] {
        arena.load("verify", target, 1, BULK, 1.0).with_context(|| format!("64 MiB there and back, {target:?}"))?;
    }
    Ok(format!("64 MiB came back unchanged from either node; {sentence}"))
}

/// A short exchange with either server: what crossed between the nodes, and what crossed the first node's bridge.
fn captured(arena: &mut Arena) -> Result<(Wire, Wire)> {
    let wire = arena.lab.capture()?;
    arena.load("verify", Target::OtherNode, 1, SHORT, 1.0)?;
    let wire = wire.stop()?;
    let local = Capture::start(&arena.lab.node("node-a").net.netns)?;
    arena.load("verify", Target::SameNode, 1, SHORT, 1.0)?;
    Ok((wire, local.stop()?))
}
