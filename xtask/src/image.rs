//! Container images without a container engine: the binary and the shared libraries it needs, in an archive `docker load` and
//! `podman load` read.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::Workspace;
use crate::step::Steps;

const BINARIES: [&str; 3] = ["ztunnel", "istiod-lite", "waypoint"];

/// Writes `target/image/<name>.tar` for each binary.
pub fn write_all(workspace: &Workspace) -> Result<()> {
    let directory = workspace.target.join("image");
    for name in BINARIES {
        let archive = write(workspace, &directory, name).with_context(|| format!("image {name}"))?;
        println!("{}", archive.display());
    }
    Ok(())
}

fn write(workspace: &Workspace, directory: &Path, name: &str) -> Result<PathBuf> {
    let work = directory.join(format!("{name}.work"));
    let _ = fs::remove_dir_all(&work);
    let root = work.join("root");
    let program = workspace.target.join("release").join(name);
    let inside = root.join("usr/local/bin").join(name);
    fs::create_dir_all(root.join("usr/local/bin"))?;
    fs::create_dir_all(root.join("tmp"))?;
    fs::copy(&program, &inside).with_context(|| format!("no {}", program.display()))?;
    Steps::new().run("stripping", Command::new("strip").arg(&inside))?;
    for library in libraries(&program)? {
        let target = root.join(library.strip_prefix("/").unwrap_or(&library));
        fs::create_dir_all(target.parent().context("a library has a directory")?)?;
        fs::copy(&library, target)?;
    }
    let layer = work.join("layer.tar");
    tar(&layer, &root, &["."])?;
    let digest = sha256(&layer)?;
    let config = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": {"Entrypoint": [format!("/usr/local/bin/{name}")], "Env": ["PATH=/usr/local/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
        "history": [{"created_by": "cargo xtask image"}]
    });
    fs::write(work.join("config.json"), serde_json::to_vec(&config)?)?;
    let manifest = json!([{"Config": "config.json", "RepoTags": [format!("{name}:latest")], "Layers": ["layer.tar"]}]);
    fs::write(work.join("manifest.json"), serde_json::to_vec(&manifest)?)?;
    let archive = directory.join(format!("{name}.tar"));
    tar(&archive, &work, &["manifest.json", "config.json", "layer.tar"])?;
    fs::remove_dir_all(&work)?;
    Ok(archive)
}

/// Same input, same bytes: owner, order and times are fixed.
fn tar(archive: &Path, directory: &Path, names: &[&str]) -> Result<()> {
    let mut command = Command::new("tar");
    command.args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--mtime=@0", "-cf"]);
    command.arg(archive).arg("-C").arg(directory).args(names);
    Steps::new().run("packing", &mut command)
}

fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("cannot run ldd")?;
    ensure!(output.status.success(), "ldd {}: {}", program.display(), output.status);
    let text = String::from_utf8(output.stdout)?;
    Ok(text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect())
}

fn sha256(file: &Path) -> Result<String> {
    let output = Command::new("sha256sum").arg(file).output().context("cannot run sha256sum")?;
    let text = String::from_utf8(output.stdout)?;
    Ok(text.split_whitespace().next().context("sha256sum said nothing")?.to_owned())
}
