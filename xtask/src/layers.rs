//! Dependencies point one way: between crates, and between the modules of `mesh`.
//!
//! Crates are read from `cargo metadata`, so a dependency under another name is found too; modules are read from the order in which
//! `mesh`'s `lib.rs` declares them and the paths its files mention.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::Workspace;

/// What each crate of the workspace may depend on.
const ALLOWED: &[(&str, &[&str])] = &[
    ("mesh-proto", &[]),
    ("ebpf-abi", &[]),
    ("mesh-memory", &[]),
    ("ebpf-loader", &["ebpf-abi", "mesh-memory"]),
    ("mesh", &["mesh-proto"]),
    ("ztunnel-cni", &[]),
    ("ztunnel", &["mesh", "mesh-memory", "mesh-proto", "ebpf-loader", "ebpf-abi", "ztunnel-cni"]),
    ("waypoint", &["mesh", "mesh-proto"]),
    ("istiod-lite", &["mesh", "mesh-memory", "mesh-proto"]),
    ("mesh-tests", &["mesh", "mesh-proto", "ebpf-loader", "ztunnel", "waypoint", "istiod-lite"]),
    ("xtask", &[]),
];
/// Crates of others, and the only ones of ours that may know them.
const RESERVED: &[(&str, &[&str])] = &[
    ("kube", &["istiod-lite", "mesh-tests"]),
    ("k8s-openapi", &["istiod-lite", "mesh-tests"]),
    ("aya", &["ebpf-loader", "ebpf-abi"]),
];

/// Fails with every slip there is.
pub fn check(workspace: &Workspace) -> Result<()> {
    let output = workspace.cargo(&["metadata", "--format-version", "1", "--no-deps", "--locked"]).output()?;
    if !output.status.success() {
        bail!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let mut slips = crates(&metadata);
    slips.extend(modules(&workspace.root.join("proto/mesh/src"))?);
    if slips.is_empty() {
        eprintln!("layers: every dependency points down");
        return Ok(());
    }
    bail!("layers:\n  {}", slips.join("\n  "))
}

/// Dependencies for tests are free: a test may look at anything.
fn crates(metadata: &Value) -> Vec<String> {
    let packages = metadata["packages"].as_array().map(Vec::as_slice).unwrap_or_default();
    let ours: BTreeSet<&str> = packages.iter().filter_map(|package| package["name"].as_str()).collect();
    let mut slips = Vec::new();
    for package in packages {
        let name = package["name"].as_str().unwrap_or_default();
        let Some((_, allowed)) = ALLOWED.iter().find(|(known, _)| *known == name) else {
            slips.push(format!("{name} has no place in the layers: give it one in xtask/src/layers.rs"));
            continue;
        };
        let dependencies = package["dependencies"].as_array().map(Vec::as_slice).unwrap_or_default();
        for dependency in dependencies.iter().filter(|dependency| dependency["kind"] != "dev") {
            let on = dependency["name"].as_str().unwrap_or_default();
            if ours.contains(on) && !allowed.contains(&on) {
                slips.push(format!("{name} depends on {on}"));
            }
            if let Some((_, users)) = RESERVED.iter().find(|(reserved, _)| *reserved == on)
                && !users.contains(&name)
            {
                slips.push(format!("{name} depends on {on}, which only {} may know", users.join(", ")));
            }
        }
    }
    slips
}

/// A module uses only those declared above it in `lib.rs`.
fn modules(source: &Path) -> Result<Vec<String>> {
    let lib = fs::read_to_string(source.join("lib.rs")).context("mesh has no lib.rs")?;
    let order: BTreeMap<String, usize> = declared(&lib).into_iter().zip(0..).collect();
    let mut slips = Vec::new();
    for (module, rank) in &order {
        for file in files_of(source, module)? {
            let text = fs::read_to_string(&file)?;
            for used in mentioned(&text) {
                if order.get(&used).is_some_and(|other| other > rank) {
                    slips.push(format!("mesh: {} uses {used}, which is declared below {module}", file.display()));
                }
            }
        }
    }
    Ok(slips)
}

/// Names of the modules a file declares, in order.
fn declared(text: &str) -> Vec<String> {
    text.lines()
        .filter_map(|line| line.trim().trim_start_matches("pub ").strip_prefix("mod ")?.strip_suffix(';'))
        .map(str::to_owned)
        .collect()
}

/// First parts of all paths that begin at the crate, `use crate::{a, b}` included. Test code is read as well: it sits in the same layer.
fn mentioned(text: &str) -> BTreeSet<String> {
    let code: String = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let mut names = BTreeSet::new();
    for after in code.split("crate::").skip(1) {
        match after.strip_prefix('{') {
            Some(group) => names.extend(members(group).iter().map(|member| first(member))),
            None => {
                names.insert(first(after));
            }
        }
    }
    names
}

/// The parts of `a::{b, c}, d}` up to the brace that closes the group.
fn members(group: &str) -> Vec<String> {
    let mut members = vec![String::new()];
    let mut depth = 0;
    for c in group.chars() {
        match c {
            '}' if depth == 0 => break,
            ',' if depth == 0 => {
                members.push(String::new());
                continue;
            }
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        members.last_mut().expect("it begins with one").push(c);
    }
    members
}

/// The identifier a path begins with.
fn first(path: &str) -> String {
    path.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

fn files_of(source: &Path, module: &str) -> Result<Vec<std::path::PathBuf>> {
    let mut files = Vec::new();
    let single = source.join(format!("{module}.rs"));
    if single.exists() {
        files.push(single);
    }
    let mut directories = vec![source.join(module)];
    while let Some(directory) = directories.pop() {
        let Ok(entries) = fs::read_dir(&directory) else { continue };
        for entry in entries {
            let path = entry?.path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_every_way_to_name_a_module() {
        let text = "use crate::hbone::Pool;\nuse crate::{net, tls::{self, Peer}, xds};\nlet x = crate::policy::f();\n// crate::serve";
        let names: Vec<String> = mentioned(text).into_iter().collect();
        assert_eq!(names, ["hbone", "net", "policy", "tls", "xds"]);
    }

    #[test]
    fn reports_a_crate_that_reaches_up() {
        let metadata = serde_json::json!({"packages": [
            {"name": "mesh", "dependencies": [{"name": "ztunnel", "kind": null}, {"name": "kube", "kind": null}]},
            {"name": "ztunnel", "dependencies": [{"name": "waypoint", "kind": "dev"}]}
        ]});
        let slips = crates(&metadata);
        assert_eq!(slips.len(), 2, "{slips:?}");
        assert!(slips[0].contains("mesh depends on ztunnel"));
    }

    #[test]
    fn reports_a_module_that_uses_one_below_it() {
        assert_eq!(declared("pub mod a;\nmod b;\nmod c {}\n"), ["a", "b"]);
    }
}
