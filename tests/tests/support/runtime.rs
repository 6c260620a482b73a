//! A lab node as container runtimes know nodes: Debian's containerd, runc and CNI plugins, and cnitool, with `/run`,
//! `/etc`, `/opt` and `/var/lib` of the node in place of the machine's.
//!
//! Everything runs below the node's cgroup and in mount namespaces of its own, so it ends with the lab.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::container::Launch;
use mesh_tests::session::Session;
use mesh_tests::{record, sys, wait};
use serde_json::json;

/// The image of the test's own program, which also stands for the pause container.
pub const IMAGE: &str = "lab.test/first-act:1";

/// One node.
pub struct NodeView {
    name: String,
    netns: String,
    cgroup: PathBuf,
    /// Stands for the node's root directory.
    pub root: PathBuf,
    run_dir: PathBuf,
    binaries: PathBuf,
    tools: PathBuf,
}

impl NodeView {
    pub fn of(session: &Session, name: &str) -> Result<Self> {
        let record = &session.record;
        let node = Self {
            name: name.to_owned(),
            netns: format!("{}{name}", record.netns_prefix),
            cgroup: record.cgroup.join(name),
            root: record.run_dir.join("nodes").join(name),
            run_dir: record.run_dir.clone(),
            binaries: session.places.binaries.clone(),
            tools: session.places.tools(),
        };
        for directory in
            ["etc/cni/net.d", "opt/cni/bin", "run/containerd", "run/netns", "var/lib/containerd", "var/run/ztunnel"]
        {
            fs::create_dir_all(node.root.join(directory))?;
        }
        for tool in ["containerd/usr/bin/containerd", "containerd/usr/bin/runc", "cnitool"] {
            let path = node.tools.join(tool);
            ensure!(path.exists(), "{} is missing: run `cargo xtask setup`", path.display());
        }
        let plugins = node.tools.join("containerd/usr/lib/cni");
        for plugin in ["bridge", "host-local", "loopback", "ptp"] {
            let target = node.root.join("opt/cni/bin").join(plugin);
            if !target.exists() {
                fs::copy(plugins.join(plugin), target)?;
            }
        }
        Ok(node)
    }

    /// The directory a runtime reads its network configuration from.
    pub fn conf_dir(&self) -> PathBuf {
        self.root.join("etc/cni/net.d")
    }

    /// A command on the node. Its cgroup is one of the node's own, or of a pod's where one is named.
    pub fn command(&self, script: &str, pod_uid: Option<&str>) -> Result<Command> {
        let cgroup = match pod_uid {
            Some(uid) => mesh_tests::raw::pod_cgroup(&self.cgroup, uid).join("main"),
            None => self.cgroup.join("runtime/node"),
        };
        let root = sys::quote(&self.root.display().to_string());
        // What is mounted first is still needed for what comes after.
        let view = format!(
            "umount -R /sys/fs/cgroup; mount -t cgroup2 cgroup2 /sys/fs/cgroup\n\
             mount -t tmpfs root /mnt; mkdir /mnt/node /mnt/lab; mount --bind {root} /mnt/node; mount --rbind /run/netns /mnt/lab\n\
             mount --bind /mnt/node/var/lib /var/lib; mount -t tmpfs etc /etc; echo 127.0.0.1 localhost > /etc/hosts; : > /etc/resolv.conf; mkdir /etc/cni; mount --bind /mnt/node/etc/cni /etc/cni\n\
             mount -t tmpfs opt /opt; mkdir /opt/cni; mount --bind /mnt/node/opt/cni /opt/cni\n\
             mount -t tmpfs run /run; mkdir /run/containerd /run/netns /run/ztunnel /run/lab-netns\n\
             mount --bind /mnt/node/run/containerd /run/containerd; mount --bind /mnt/node/var/run/ztunnel /run/ztunnel\n\
             mount --rbind /mnt/lab /run/lab-netns; ip link set lo up\n{script}"
        );
        let mut launch = Launch::new(&["bash", "-ec", &view], cgroup);
        launch.netns = Some(Path::new("/run/netns").join(&self.netns));
        launch.env.insert(
            "PATH".into(),
            format!("{}:{}:{}", self.tools.join("containerd/usr/bin").display(), self.tools.display(), sys::PATH),
        );
        launch.log = None;
        let mut command = launch.command()?;
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        Ok(command)
    }

    /// Runs a script on the node to its end.
    pub fn run(&self, script: &str) -> Result<Output> {
        Ok(self.command(script, None)?.output()?)
    }

    /// `cnitool VERB NETWORK NETNS` for a pod; `label` names its network namespace in the lab.
    pub fn cnitool(&self, verb: &str, network: &str, label: &str, pod: &PodObject) -> Result<Output> {
        let arguments = pod.cni_arguments();
        self.run(&format!(
            "export CNI_PATH=/opt/cni/bin NETCONFPATH=/etc/cni/net.d CNI_ARGS={}\nexec cnitool {verb} {network} /run/lab-netns/{label}",
            sys::quote(&arguments)
        ))
    }

    /// Calls the plugin itself, for what cnitool does not know.
    pub fn plugin(&self, verb: &str, conf: &serde_json::Value) -> Result<Output> {
        let conf = sys::quote(&conf.to_string());
        self.run(&format!("printf %s {conf} | CNI_COMMAND={verb} CNI_PATH=/opt/cni/bin /opt/cni/bin/ztunnel-cni"))
    }

    /// Starts containerd and waits until it serves; it ends with the lab.
    pub fn start_containerd(&self) -> Result<Containerd> {
        let config = self.root.join("containerd.toml");
        fs::write(&config, CONTAINERD)?;
        let image = self.root.join("image.tar");
        write_image(&self.binaries.join("first_act"), &self.root.join("image"), &image)?;
        let log = self.run_dir.join("logs").join(format!("containerd-{}.log", self.name));
        let mut command = self.command("exec containerd --config /mnt/node/containerd.toml", None)?;
        let output = mesh_tests::container::append(&log)?;
        command.stdout(output.try_clone()?).stderr(output);
        let child = command.spawn()?;
        let containerd = Containerd { child, socket: self.root.join("run/containerd/containerd.sock") };
        wait::until_true("containerd to listen", Duration::from_secs(30), || containerd.socket.exists())?;
        wait::until("containerd to take the image", Duration::from_secs(30), || {
            let script = "exec ctr --address /run/containerd/containerd.sock --namespace k8s.io images import /mnt/node/image.tar";
            let output = self.run(script)?;
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Ok(())
        })?;
        Ok(containerd)
    }

    /// Kills whatever the runtime has left running.
    pub fn end_runtime(&self) -> Result<()> {
        record::kill_cgroup(&self.cgroup.join("runtime"))
    }
}

/// A running containerd.
pub struct Containerd {
    child: std::process::Child,
    pub socket: PathBuf,
}

impl Containerd {
    /// Network namespaces that it has made and not taken away: they are in its own `/run`.
    pub fn sandboxes(&self) -> Result<Vec<String>> {
        let directory = format!("/proc/{}/root/run/netns", self.child.id());
        let entries = fs::read_dir(&directory).with_context(|| directory.clone())?;
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // Ended already is what was wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A pod as the API has it.
pub struct PodObject {
    pub namespace: String,
    pub name: String,
    pub uid: String,
}

impl PodObject {
    /// As runtimes pass it to plugins.
    fn cni_arguments(&self) -> String {
        format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID=none;K8S_POD_UID={}",
            self.namespace, self.name, self.uid
        )
    }
}

/// No cgroups: those of hybrid machines are half in version 1, where the lab leaves nothing. Containers stay in
/// containerd's, which is below the node's.
const CONTAINERD: &str = r#"
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.aufs", "io.containerd.internal.v1.opt", "io.containerd.tracing.processor.v1.otlp"]
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "lab.test/first-act:1"
  disable_tcp_service = true
  disable_cgroup = true
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
"#;

/// An archive that `ctr images import` reads: a program and the libraries it needs, nothing else.
fn write_image(program: &Path, work: &Path, archive: &Path) -> Result<()> {
    let root = work.join("root");
    fs::create_dir_all(&root)?;
    fs::copy(program, root.join("first_act")).with_context(|| format!("no {}", program.display()))?;
    let listed = sys::check(sys::command("ldd").arg(program))?;
    for library in String::from_utf8(listed.stdout)?.split_whitespace().filter(|word| word.starts_with('/')) {
        let target = root.join(library.trim_start_matches('/'));
        fs::create_dir_all(target.parent().context("a library has a directory")?)?;
        fs::copy(library, target)?;
    }
    let tar = |to: &Path, from: &Path, names: &[&str]| {
        sys::check(sys::command("tar").arg("-cf").arg(to).arg("-C").arg(from).args(names)).map(drop)
    };
    tar(&work.join("layer.tar"), &root, &["."])?;
    let digest = sys::check(sys::command("sha256sum").arg(work.join("layer.tar")))?;
    let digest = String::from_utf8(digest.stdout)?;
    let digest = digest.split_whitespace().next().context("sha256sum said nothing")?;
    let config = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }, "os": "linux",
        "config": {"Entrypoint": ["/first_act"]},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
    });
    fs::write(work.join("config.json"), config.to_string())?;
    let manifest = json!([{"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]);
    fs::write(work.join("manifest.json"), manifest.to_string())?;
    tar(archive, work, &["manifest.json", "config.json", "layer.tar"])
}
