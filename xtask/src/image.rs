//! Container images without a container engine: the binary and the shared libraries it needs, in an archive that is an OCI image
//! layout with the `manifest.json` beside it that older engines look for: `docker load`, `podman load`, `ctr images import` and
//! `kind load image-archive` take it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::Workspace;
use crate::step::Steps;

/// Besides the program: by whom it is run where nothing else is said. ztunnel enters other network namespaces, the others need
/// nothing but their ports.
const IMAGES: [(&str, Option<&str>); 3] =
    [("ztunnel", None), ("istiod-lite", Some("1337:1337")), ("waypoint", Some("1337:1337"))];
/// Of an archive. A node has to fetch it before it has a mesh.
const LARGEST: u64 = 40 * 1000 * 1000;

const OCI: &str = "application/vnd.oci.image";

/// What becomes an image.
struct Image<'a> {
    name: &'a str,
    program: &'a Path,
    /// Other programs, which stand beside it.
    beside: &'a [&'a Path],
    /// User and group; root if none.
    user: Option<&'a str>,
}

/// Writes `target/image/<name>.tar` for each binary.
pub fn write_all(workspace: &Workspace) -> Result<()> {
    let directory = workspace.target.join("image");
    let plugin = cni_plugin(workspace)?;
    for (name, user) in IMAGES {
        let program = &workspace.target.join("release").join(name);
        let beside: &[&Path] = if name == "ztunnel" { &[&plugin] } else { &[] };
        let archive =
            Image { name, program, beside, user }.write(&directory).with_context(|| format!("image {name}"))?;
        let size = fs::metadata(&archive)?.len();
        println!("{} ({:.1} MB)", archive.display(), size as f64 / 1e6);
        ensure!(size < LARGEST, "{} has {size} bytes; {LARGEST} are the most", archive.display());
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

impl Image<'_> {
    /// Writes `<directory>/<name>.tar`.
    fn write(&self, directory: &Path) -> Result<PathBuf> {
        let work = directory.join(format!("{}.work", self.name));
        let _ = fs::remove_dir_all(&work);
        let root = work.join("root");
        self.fill(&root)?;
        let layout = Layout { blobs: work.join("layout/blobs/sha256") };
        fs::create_dir_all(&layout.blobs)?;

        let layer = work.join("layer.tar");
        tar(&layer, &root, &["."])?;
        let content = sha256(&layer)?;
        // Without name and time, so that the same comes to the same.
        Steps::new().run("compressing", Command::new("gzip").args(["--no-name", "--best"]).arg(&layer))?;
        let layer = layout.put(&format!("{OCI}.layer.v1.tar+gzip"), fs::read(work.join("layer.tar.gz"))?)?;
        let mut run = json!({
            "Entrypoint": [format!("/usr/local/bin/{}", self.name)], "Env": ["PATH=/usr/local/bin"]
        });
        if let Some(user) = self.user {
            run["User"] = user.into();
        }
        let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let config = json!({
            "architecture": architecture, "os": "linux", "config": run,
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{content}")]},
            "history": [{"created_by": "cargo xtask image"}],
        });
        let config = layout.put(&format!("{OCI}.config.v1+json"), serde_json::to_vec(&config)?)?;
        let media_type = format!("{OCI}.manifest.v1+json");
        let manifest = json!({"schemaVersion": 2, "mediaType": media_type, "config": config, "layers": [layer]});
        let mut manifest = layout.put(&media_type, serde_json::to_vec(&manifest)?)?;
        manifest["platform"] = json!({"architecture": architecture, "os": "linux"});
        manifest["annotations"] = json!({
            "io.containerd.image.name": format!("docker.io/library/{}:latest", self.name),
            "org.opencontainers.image.ref.name": "latest",
        });
        let index = json!({"schemaVersion": 2, "mediaType": format!("{OCI}.index.v1+json"), "manifests": [manifest]});
        let older = json!([{
            "Config": place(&config), "RepoTags": [format!("{}:latest", self.name)], "Layers": [place(&layer)],
        }]);
        let files =
            [("oci-layout", json!({"imageLayoutVersion": "1.0.0"})), ("index.json", index), ("manifest.json", older)];
        for (file, content) in &files {
            fs::write(work.join("layout").join(file), serde_json::to_vec(content)?)?;
        }
        let archive = directory.join(format!("{}.tar", self.name));
        tar(&archive, &work.join("layout"), &["oci-layout", "index.json", "manifest.json", "blobs"])?;
        fs::remove_dir_all(&work)?;
        Ok(archive)
    }

    /// All there is in the container.
    fn fill(&self, root: &Path) -> Result<()> {
        let binaries = root.join("usr/local/bin");
        fs::create_dir_all(&binaries)?;
        fs::create_dir_all(root.join("tmp"))?;
        let own = [(self.program, self.name.as_ref())];
        let others = self.beside.iter().filter_map(|other| Some((*other, other.file_name()?)));
        for (program, name) in own.into_iter().chain(others) {
            let copy = binaries.join(name);
            fs::copy(program, &copy).with_context(|| format!("no {}", program.display()))?;
            Steps::new().run("stripping", Command::new("strip").arg(&copy))?;
        }
        for library in libraries(self.program)? {
            let target = root.join(library.strip_prefix("/").unwrap_or(&library));
            fs::create_dir_all(target.parent().context("a library has a directory")?)?;
            fs::copy(&library, target)?;
        }
        Ok(())
    }
}

/// An OCI image layout that is being written.
struct Layout {
    blobs: PathBuf,
}

impl Layout {
    /// Stores content; returns its descriptor.
    fn put(&self, media_type: &str, content: Vec<u8>) -> Result<Value> {
        let file = self.blobs.join("new");
        fs::write(&file, &content)?;
        let digest = sha256(&file)?;
        fs::rename(&file, self.blobs.join(&digest))?;
        Ok(json!({"mediaType": media_type, "digest": format!("sha256:{digest}"), "size": content.len()}))
    }
}

/// Where in the archive a descriptor's content is.
fn place(descriptor: &Value) -> String {
    format!("blobs/{}", descriptor["digest"].as_str().unwrap_or_default().replace(':', "/"))
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
    use std::process::Stdio;
    use std::time::{Duration, Instant};

    use super::*;

    fn sh(script: &str) -> String {
        let output = Command::new("sh").args(["-ec", script]).output().unwrap();
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn echo() -> Image<'static> {
        Image { name: "echo", program: Path::new("/bin/echo"), beside: &[], user: Some("7:8") }
    }

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            Self(std::env::temp_dir().join(format!("xtask-{name}-{}", std::process::id())))
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    /// What a container engine does with an archive: follow the manifest, compare the layer's digest, unpack, run.
    #[test]
    fn an_image_unpacks_into_a_root_that_runs() {
        let scratch = Scratch::new("image");
        let directory = &scratch.0;
        let archive = echo().write(directory).unwrap();
        let again = fs::read(&archive).unwrap();
        assert!(fs::read(echo().write(directory).unwrap()).unwrap() == again, "same bytes");
        let d = directory.display();
        sh(&format!("mkdir {d}/load {d}/root; tar -xf {} -C {d}/load", archive.display()));
        let load = directory.join("load");
        let json = |file: &str| -> Value { serde_json::from_slice(&fs::read(load.join(file)).unwrap()).unwrap() };
        assert_eq!(json("oci-layout"), json!({"imageLayoutVersion": "1.0.0"}));
        let described = json("index.json")["manifests"][0].clone();
        assert_eq!(described["annotations"]["io.containerd.image.name"], "docker.io/library/echo:latest");
        let manifest = json(&place(&described));
        for descriptor in [&described, &manifest["config"], &manifest["layers"][0]] {
            let file = load.join(place(descriptor));
            assert_eq!(descriptor["digest"], format!("sha256:{}", sha256(&file).unwrap()));
            assert_eq!(descriptor["size"], fs::metadata(file).unwrap().len());
        }
        // Older engines come to the same.
        let older = &json("manifest.json")[0];
        assert_eq!(older["RepoTags"], json!(["echo:latest"]));
        assert_eq!(older["Config"], place(&manifest["config"]));
        assert_eq!(older["Layers"], json!([place(&manifest["layers"][0])]));
        let config = json(&place(&manifest["config"]));
        assert_eq!(config["config"]["User"], "7:8");
        let layer = load.join(place(&manifest["layers"][0]));
        sh(&format!("gzip -cd {} > {d}/layer.tar; tar -xf {d}/layer.tar -C {d}/root", layer.display()));
        let content = sha256(&directory.join("layer.tar")).unwrap();
        assert_eq!(config["rootfs"]["diff_ids"], json!([format!("sha256:{content}")]));
        let entry = config["config"]["Entrypoint"][0].as_str().unwrap();
        assert!(directory.join("root").join(entry.trim_start_matches('/')).exists());
        // Only root can take it for the root of everything.
        if nix::unistd::geteuid().is_root() {
            assert_eq!(sh(&format!("chroot {d}/root {entry} it runs")), "it runs\n");
        }
    }

    /// Debian's containerd, as `ctr -n k8s.io images import` and `kind load image-archive` use it.
    #[test]
    fn containerd_takes_it() {
        let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools/containerd/usr/bin");
        let tools = match std::env::var_os("CARGO_TARGET_DIR") {
            Some(target) => Path::new(&target).join("tools/containerd/usr/bin"),
            None => tools,
        };
        if !tools.join("containerd").exists() || !nix::unistd::geteuid().is_root() {
            assert_ne!(std::env::var("LAB").as_deref(), Ok("required"), "no containerd: run `cargo xtask setup`");
            return;
        }
        let scratch = Scratch::new("containerd");
        let directory = &scratch.0;
        let archive = echo().write(directory).unwrap();
        let d = directory.display();
        let disabled = "disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.internal.v1.opt\"]";
        fs::write(directory.join("config.toml"), format!("version = 2\n{disabled}\n")).unwrap();
        let mut daemon = Command::new(tools.join("containerd"));
        daemon.args(["--config", &format!("{d}/config.toml"), "--address", &format!("{d}/socket")]);
        daemon.args(["--root", &format!("{d}/content"), "--state", &format!("{d}/state")]);
        let mut daemon = daemon.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let ctr = |rest: &[&str]| {
            let mut command = Command::new(tools.join("ctr"));
            command.args(["--address", &format!("{d}/socket"), "--namespace", "k8s.io"]).args(rest);
            command.output().unwrap()
        };
        let deadline = Instant::now() + Duration::from_secs(30);
        while !ctr(&["version"]).status.success() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(50));
        }
        let imported = ctr(&["images", "import", "--snapshotter", "native", &archive.display().to_string()]);
        let listed = ctr(&["images", "list", "--quiet"]);
        daemon.kill().unwrap();
        daemon.wait().unwrap();
        assert!(imported.status.success(), "{}", String::from_utf8_lossy(&imported.stderr));
        assert_eq!(String::from_utf8_lossy(&listed.stdout), "docker.io/library/echo:latest\n");
    }

    #[test]
    fn a_program_that_was_not_built_is_named() {
        let scratch = Scratch::new("no-image");
        let missing = Image { program: Path::new("/nonexistent/program"), name: "program", ..echo() };
        let error = missing.write(&scratch.0).unwrap_err();
        assert!(format!("{error:#}").contains("/nonexistent/program"), "{error:#}");
    }
}
