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
    let plugin = cni_plugin(workspace)?;
    for name in BINARIES {
        let program = workspace.target.join("release").join(name);
        let beside: &[&Path] = if name == "ztunnel" { &[&plugin] } else { &[] };
        let archive = write(&program, beside, &directory, name).with_context(|| format!("image {name}"))?;
        println!("{}", archive.display());
    }
    Ok(())
}

/// The one program that leaves its image: ztunnel copies it to the node, whose libraries may be older than ours, or none.
fn cni_plugin(workspace: &Workspace) -> Result<PathBuf> {
    let about = Command::new("rustc").arg("-vV").output().context("cannot run rustc")?;
    let about = String::from_utf8(about.stdout)?;
    let host = about.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc does not name its host")?;
    let mut command =
        workspace.cargo(&["build", "--locked", "--release", "--package", "ztunnel-cni", "--target", host]);
    command.env("RUSTFLAGS", "-C target-feature=+crt-static");
    Steps::new().run("building the CNI plugin", &mut command)?;
    Ok(workspace.target.join(host).join("release/ztunnel-cni"))
}

fn write(program: &Path, beside: &[&Path], directory: &Path, name: &str) -> Result<PathBuf> {
    let work = directory.join(format!("{name}.work"));
    let _ = fs::remove_dir_all(&work);
    let root = work.join("root");
    let inside = root.join("usr/local/bin").join(name);
    fs::create_dir_all(root.join("usr/local/bin"))?;
    fs::create_dir_all(root.join("tmp"))?;
    fs::copy(program, &inside).with_context(|| format!("no {}", program.display()))?;
    Steps::new().run("stripping", Command::new("strip").arg(&inside))?;
    for other in beside {
        let copy = root.join("usr/local/bin").join(other.file_name().context("a program has a name")?);
        fs::copy(other, &copy).with_context(|| format!("no {}", other.display()))?;
        Steps::new().run("stripping", Command::new("strip").arg(&copy))?;
    }
    for library in libraries(program)? {
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
    // An image without it would be made all the same, and not start.
    ensure!(!text.contains("not found"), "{} needs a library that is not here:\n{text}", program.display());
    Ok(text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect())
}

fn sha256(file: &Path) -> Result<String> {
    let output = Command::new("sha256sum").arg(file).output().context("cannot run sha256sum")?;
    ensure!(output.status.success(), "sha256sum {}: {}", file.display(), output.status);
    let text = String::from_utf8(output.stdout)?;
    Ok(text.split_whitespace().next().context("sha256sum said nothing")?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> String {
        let output = Command::new("sh").args(["-ec", script]).output().unwrap();
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// What a container engine does with an archive: follow the manifest, compare the layer's digest, unpack, run.
    #[test]
    fn an_image_unpacks_into_a_root_that_runs() {
        let directory = std::env::temp_dir().join(format!("xtask-image-{}", std::process::id()));
        let archive = write(Path::new("/bin/echo"), &[], &directory, "echo").unwrap();
        let again = fs::read(&archive).unwrap();
        assert_eq!(
            fs::read(write(Path::new("/bin/echo"), &[], &directory, "echo").unwrap()).unwrap(),
            again,
            "same bytes"
        );
        let d = directory.display();
        sh(&format!("mkdir {d}/load {d}/root; tar -xf {} -C {d}/load", archive.display()));
        let json = |file: &str| -> serde_json::Value {
            serde_json::from_slice(&fs::read(directory.join("load").join(file)).unwrap()).unwrap()
        };
        let manifest = json("manifest.json");
        assert_eq!(manifest[0]["RepoTags"][0], "echo:latest");
        let config = json(manifest[0]["Config"].as_str().unwrap());
        let layer = directory.join("load").join(manifest[0]["Layers"][0].as_str().unwrap());
        assert_eq!(config["rootfs"]["diff_ids"][0], format!("sha256:{}", sha256(&layer).unwrap()));
        sh(&format!("tar -xf {} -C {d}/root", layer.display()));
        let entry = config["config"]["Entrypoint"][0].as_str().unwrap();
        assert!(directory.join("root").join(entry.trim_start_matches('/')).exists());
        // Only root can take it for the root of everything.
        if nix::unistd::geteuid().is_root() {
            assert_eq!(sh(&format!("chroot {d}/root {entry} it runs")), "it runs\n");
        }
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn a_program_that_was_not_built_is_named() {
        let directory = std::env::temp_dir().join(format!("xtask-no-image-{}", std::process::id()));
        let error = write(Path::new("/nonexistent/program"), &[], &directory, "program").unwrap_err();
        assert!(format!("{error:#}").contains("/nonexistent/program"), "{error:#}");
        fs::remove_dir_all(&directory).unwrap();
    }
}
