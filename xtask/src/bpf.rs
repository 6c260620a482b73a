//! Builds the kernel programs into `<root>/target/bpf/ebpf-programs.o`, which the loader embeds.
//!
//! No released stable toolchain carries `core` for BPF. Two that do are looked for: a rustup nightly with `rust-src`,
//! which builds `core` itself, and Debian's `rustc-web`, which comes with it prebuilt. To link, `bpf-linker` or just
//! `llc`: for BPF targets rustc's objects are LLVM bitcode that is already linked and optimised.

use std::{
    env, fmt, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::SystemTime,
};

use anyhow::{Context, Result, bail, ensure};

use crate::step::Steps;

const TARGET: &str = "bpfel-unknown-none";
const OBJECT: &str = "ebpf-programs.o";
/// `core` for BPF, prebuilt, next to the compiler that made it.
const DEBIAN_RUSTLIB: &str = "/usr/lib/rustlib/bpfel-unknown-none/lib";
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_CARGO: &str = "/usr/bin/cargo";
const DEBIAN_PACKAGES: [&str; 4] = ["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf", "llvm-22"];
/// 5.1 and later run it; without it LLVM knows neither 32-bit registers nor half the jumps.
const CPU: &str = "v3";
/// Variables that `cargo xtask`, rustup or the caller's shell may have set for host code.
const INHERITED: [&str; 9] = [
    "RUSTC",
    "RUSTFLAGS",
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_BUILD_RUSTFLAGS",
    "RUSTUP_TOOLCHAIN",
    "RUSTC_WRAPPER",
    "RUSTC_WORKSPACE_WRAPPER",
    "CARGO_TARGET_DIR",
    "CARGO_BUILD_TARGET",
];

/// The outcome of [`build`].
#[derive(Debug, Clone)]
pub struct Built {
    pub object: PathBuf,
    /// What made it; `None` when the object was newer than its sources and nothing ran.
    pub with: Option<Toolchain>,
}

impl fmt::Display for Built {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.with {
            Some(with) => write!(f, "{} (built by {with})", self.object.display()),
            None => write!(f, "{} (up to date)", self.object.display()),
        }
    }
}

#[derive(Debug, Clone)]
pub struct Toolchain {
    compiler: Compiler,
    linker: Linker,
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let compiler = match self.compiler {
            Compiler::Nightly => "rustup nightly with rust-src",
            Compiler::Debian => "Debian's rustc-web",
        };
        match &self.linker {
            Linker::BpfLinker(path) => write!(f, "{compiler} and {}", path.display()),
            Linker::Llc(path) => write!(f, "{compiler} and {}", path.display()),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compiler {
    Nightly,
    Debian,
}

#[derive(Debug, Clone)]
enum Linker {
    BpfLinker(PathBuf),
    Llc(PathBuf),
}

/// Builds the programs unless the object is newer than every source.
///
/// The object always lands below `root`, whatever `CARGO_TARGET_DIR` says, because the loader's build script looks there.
pub fn build(root: &Path) -> Result<Built> {
    let object = root.join("target/bpf").join(OBJECT);
    if is_current(root, &object)? {
        return Ok(Built { object, with: None });
    }
    let toolchain = find_toolchain().context(
        "no toolchain for BPF: `cargo xtask setup` installs Debian's; elsewhere `rustup toolchain install nightly \
         --component rust-src` and `cargo binstall bpf-linker`",
    )?;
    compile(root, &toolchain, &object)?;
    Ok(Built { object, with: Some(toolchain) })
}

/// Installs Debian's compiler and LLVM when no toolchain for BPF is there. Needs root and apt.
pub fn ensure_toolchain() -> Result<()> {
    if find_toolchain().is_ok() {
        return Ok(());
    }
    ensure!(
        on_path("apt-get").is_some(),
        "no toolchain for BPF and no apt-get to install one: `rustup toolchain install nightly --component rust-src` \
         and `cargo binstall bpf-linker`"
    );
    ensure!(
        nix::unistd::geteuid().is_root(),
        "no toolchain for BPF; as root: apt-get install --no-install-recommends {}",
        DEBIAN_PACKAGES.join(" ")
    );
    apt("reading package lists", &["update"])?;
    let install = ["install", "--yes", "--no-install-recommends"];
    apt("installing a compiler for BPF", &[install.as_slice(), DEBIAN_PACKAGES.as_slice()].concat())?;
    find_toolchain().map(drop)
}

fn apt(what: &str, arguments: &[&str]) -> Result<()> {
    // Somebody else may be installing just now.
    let mut command = Command::new("apt-get");
    command.args(["-o", "DPkg::Lock::Timeout=300"]).args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
    Steps::new().run(what, &mut command)
}

fn find_toolchain() -> Result<Toolchain> {
    if nightly_has_source() {
        let found = find_linker(Compiler::Nightly).map(|linker| Toolchain { compiler: Compiler::Nightly, linker });
        // A nightly whose LLVM nobody here can link for is no reason to do without.
        if found.is_ok() || !debian_has_core() {
            return found;
        }
    }
    ensure!(debian_has_core(), "neither a rustup nightly with rust-src nor Debian's rustc-web is installed");
    Ok(Toolchain { compiler: Compiler::Debian, linker: find_linker(Compiler::Debian)? })
}

fn nightly_has_source() -> bool {
    let mut command = Command::new("rustup");
    command.args(["run", "nightly", "rustc", "--print", "sysroot"]);
    clean(&mut command);
    let Ok(output) = command.stderr(Stdio::null()).output() else { return false };
    let sysroot = String::from_utf8_lossy(&output.stdout);
    output.status.success() && Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core").is_dir()
}

fn debian_has_core() -> bool {
    let has_core = fs::read_dir(DEBIAN_RUSTLIB).is_ok_and(|entries| {
        entries.flatten().any(|entry| {
            let name = entry.file_name();
            name.to_string_lossy().starts_with("libcore-")
        })
    });
    has_core && Path::new(DEBIAN_RUSTC).exists() && Path::new(DEBIAN_CARGO).exists()
}

/// `llc` where there is one new enough: it needs nothing at run time, whereas `bpf-linker` may have been installed
/// against an LLVM that is not.
fn find_linker(compiler: Compiler) -> Result<Linker> {
    if let Some(llc) = find_llc(compiler) {
        return Ok(Linker::Llc(llc));
    }
    match on_path("bpf-linker") {
        Some(path) => Ok(Linker::BpfLinker(path)),
        None => bail!("neither an llc as new as the compiler's LLVM (Debian: llvm-22) nor bpf-linker is installed"),
    }
}

/// An `llc` that can read the compiler's bitcode: not older than its LLVM.
fn find_llc(compiler: Compiler) -> Option<PathBuf> {
    let needed = llvm_of(compiler)?;
    (needed..needed + 3)
        .flat_map(|major| {
            [PathBuf::from(format!("/usr/lib/llvm-{major}/bin/llc")), format!("/usr/bin/llc-{major}").into()]
        })
        .find(|path| path.exists())
}

/// The major version of the compiler's LLVM.
fn llvm_of(compiler: Compiler) -> Option<u32> {
    let mut command = match compiler {
        Compiler::Debian => Command::new(DEBIAN_RUSTC),
        Compiler::Nightly => {
            let mut command = Command::new("rustup");
            command.args(["run", "nightly", "rustc"]);
            command
        }
    };
    clean(&mut command);
    let output = command.arg("-vV").stderr(Stdio::null()).output().ok()?;
    let version = String::from_utf8(output.stdout).ok()?;
    version.lines().find_map(|line| line.strip_prefix("LLVM version: "))?.split('.').next()?.parse().ok()
}

fn compile(root: &Path, toolchain: &Toolchain, object: &Path) -> Result<()> {
    let programs = root.join("ebpf/programs");
    let mut command = match toolchain.compiler {
        Compiler::Nightly => {
            let mut command = Command::new("rustup");
            command.args(["run", "nightly", "cargo", "build", "-Z", "build-std=core"]);
            command
        }
        Compiler::Debian => {
            let mut command = Command::new(DEBIAN_CARGO);
            command.arg("build");
            command
        }
    };
    clean(&mut command);
    if toolchain.compiler == Compiler::Debian {
        // aya-ebpf uses unstable inline assembly for BPF; Debian's compiler is a stable release.
        command.env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "1");
    }
    let flags = match &toolchain.linker {
        Linker::BpfLinker(path) => format!("-C linker={} -C link-arg=--cpu={CPU}", path.display()),
        // The linked executable is not wanted, only the bitcode that would go into it. Maps must therefore be the
        // legacy kind: the other needs type information that only bpf-linker can mend.
        Linker::Llc(_) => "--emit=obj -C linker=/bin/true".to_owned(),
    };
    // For BPF only: the flags would break the build scripts and macros, which run on the host.
    command.env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_RUSTFLAGS", flags);
    if let Linker::Llc(_) = toolchain.linker {
        // `cargo xtask` puts the host toolchain's libraries there, another LLVM among them. bpf-linker may live on it.
        command.env_remove("LD_LIBRARY_PATH");
    }
    command.args(["--release", "--locked", "--target", TARGET]).current_dir(&programs);
    Steps::new().run("building the kernel programs", &mut command)?;

    let release = programs.join("target").join(TARGET).join("release");
    let directory = object.parent().context("the object has a directory")?;
    fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))?;
    // Written aside and renamed: a build that is reading the old one never sees half of the new one.
    let fresh = object.with_extension(format!("o.{}", std::process::id()));
    match &toolchain.linker {
        Linker::BpfLinker(_) => {
            fs::copy(release.join("ebpf-programs"), &fresh).context("copying the linked programs")?;
        }
        Linker::Llc(llc) => {
            let mut command = Command::new(llc);
            command.args(["-march=bpfel", &format!("-mcpu={CPU}"), "-filetype=obj"]);
            command.arg(newest_bitcode(&release.join("deps"))?).arg("-o").arg(&fresh);
            Steps::new().run("translating the kernel programs", &mut command)?;
        }
    }
    fs::rename(&fresh, object).with_context(|| format!("writing {}", object.display()))
}

/// Cargo names the file after a hash that changes with the flags, so older ones may lie beside it.
fn newest_bitcode(deps: &Path) -> Result<PathBuf> {
    let mut newest: Option<(SystemTime, PathBuf)> = None;
    for entry in fs::read_dir(deps).with_context(|| format!("listing {}", deps.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("ebpf_programs-") && name.ends_with(".o") {
            let modified = path.metadata()?.modified()?;
            if newest.as_ref().is_none_or(|(time, _)| *time < modified) {
                newest = Some((modified, path));
            }
        }
    }
    let (_, path) = newest.with_context(|| format!("no bitcode of the programs in {}", deps.display()))?;
    Ok(path)
}

/// Is the object newer than everything it is made from?
fn is_current(root: &Path, object: &Path) -> Result<bool> {
    let Ok(built) = object.metadata().and_then(|meta| meta.modified()) else { return Ok(false) };
    let sources = ["ebpf/programs/src", "ebpf/programs/Cargo.toml", "ebpf/programs/Cargo.lock", "ebpf/abi/src"];
    for source in sources {
        if newest(&root.join(source))? > built {
            return Ok(false);
        }
    }
    Ok(true)
}

fn newest(path: &Path) -> Result<SystemTime> {
    let meta = path.metadata().with_context(|| format!("reading {}", path.display()))?;
    let mut time = meta.modified()?;
    if meta.is_dir() {
        for entry in fs::read_dir(path)? {
            time = time.max(newest(&entry?.path())?);
        }
    }
    Ok(time)
}

fn clean(command: &mut Command) {
    for variable in INHERITED {
        command.env_remove(variable);
    }
}

fn on_path(program: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?).map(|directory| directory.join(program)).find(|path| path.is_file())
}
