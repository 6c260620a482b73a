//! Runs the fuzz targets of `tests/fuzz`: every parser of ours that reads what others send.
//!
//! libFuzzer does the work. What `cargo fuzz` would add is a line of compiler flags, which stand here, and a sanitizer for
//! memory, which crates without unsafe code have no use for; without that the compiler is the one everything is built with.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};

use crate::Workspace;
use crate::step::Steps;

/// As `cargo fuzz` has them: which branches were taken is noted, and what was compared with what.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares";

/// The target that needs the control plane's dependencies, half of all there are.
const CONTROL_PLANE: &str = "api";

/// Machines that run CI have two cores.
const AT_ONCE: usize = 2;
/// More than this in one process is a finding.
const MEMORY_MB: u32 = 2048;
/// So is an input that takes longer, in seconds.
const ONE_INPUT: u32 = 20;

/// Runs the targets of these names, or all, for so many seconds each.
///
/// # Errors
/// With every finding, and how to see it again.
pub fn run(workspace: &Workspace, seconds: u64, names: &[String]) -> Result<()> {
    let home = workspace.root.join("tests/fuzz");
    let all = targets(&home.join("fuzz_targets"))?;
    if let Some(unknown) = names.iter().find(|name| !all.contains(name)) {
        bail!("there is no fuzz target {unknown:?}, but {}", all.join(", "));
    }
    let wanted: &[String] = if names.is_empty() { &all } else { names };
    let work = workspace.target.join("fuzz");
    let programs = build(workspace, &home, &work, wanted)?;

    let (left, findings) = (Mutex::new(wanted.iter()), Mutex::new(Vec::new()));
    // A function, or the lock would be held while its target runs.
    let next = || lock(&left).next();
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(name) = next() {
                    if let Err(finding) = one(&programs.join(name), &work, name, seconds) {
                        lock(&findings).push(format!("{finding:#}"));
                    }
                }
            });
        }
    });
    let findings = findings.into_inner().unwrap_or_else(PoisonError::into_inner);
    ensure!(findings.is_empty(), "{}", findings.join("\n\n"));
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn targets(directory: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let path = entry?.path();
        if path.extension() == Some(OsStr::new("rs")) {
            names.extend(path.file_stem().and_then(OsStr::to_str).map(str::to_owned));
        }
    }
    names.sort();
    Ok(names)
}

/// Builds them and says where they are.
fn build(workspace: &Workspace, home: &Path, work: &Path, names: &[String]) -> Result<PathBuf> {
    same_versions(workspace, home)?;
    let host = host()?;
    let mut cargo = workspace.cargo(&["build", "--release", "--target", &host]);
    // With a target of its own name what runs while building is not instrumented.
    cargo.arg("--manifest-path").arg(home.join("Cargo.toml")).env("CARGO_TARGET_DIR", work);
    cargo.env_remove("CARGO_ENCODED_RUSTFLAGS").env("RUSTFLAGS", FLAGS);
    for name in names {
        cargo.args(["--bin", name]);
    }
    if names.iter().any(|name| name == CONTROL_PLANE) {
        cargo.args(["--features", "istiod-lite"]);
    }
    Steps::new().run("building the fuzz targets", &mut cargo)?;
    Ok(work.join(host).join("release"))
}

/// Every crate is of the version that is shipped: the targets have no lock file of their own to forget.
fn same_versions(workspace: &Workspace, home: &Path) -> Result<()> {
    let (ours, theirs) = (workspace.root.join("Cargo.lock"), home.join("Cargo.lock"));
    let changed = |file: &Path| file.metadata().and_then(|file| file.modified());
    if changed(&theirs).ok() < changed(&ours).ok() {
        fs::copy(&ours, &theirs).with_context(|| theirs.display().to_string())?;
    }
    Ok(())
}

fn host() -> Result<String> {
    let output = Command::new("rustc").arg("-vV").output().context("cannot run rustc")?;
    let said = String::from_utf8_lossy(&output.stdout);
    let host = said.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc does not say what it is for")?.to_owned())
}

/// What is found interesting is kept from run to run; seeds are made anew.
fn one(program: &Path, work: &Path, name: &str, seconds: u64) -> Result<()> {
    let [corpus, seeds, findings] = ["corpus", "seeds", "findings"].map(|kind| work.join(kind).join(name));
    let _ = fs::remove_dir_all(&seeds);
    for directory in [&corpus, &seeds, &findings] {
        fs::create_dir_all(directory)?;
    }
    let steps = Steps::in_lines();
    let what = format!("seeds of {name}");
    steps.run(&what, Command::new(program).env("FUZZ_SEEDS", &seeds))?;

    let before = files(&findings)?;
    let mut command = Command::new("nice");
    command.arg(program).args([&corpus, &seeds]).arg(format!("-artifact_prefix={}/", findings.display()));
    command.arg(format!("-max_total_time={seconds}")).arg(format!("-rss_limit_mb={MEMORY_MB}"));
    command.arg(format!("-timeout={ONE_INPUT}")).arg("-print_final_stats=1").env("RUST_BACKTRACE", "1");
    let Err(finding) = steps.run(&format!("fuzzing {name}"), &mut command) else { return Ok(()) };
    let again = files(&findings)?.into_iter().filter(|file| !before.contains(file));
    let again: Vec<String> = again.map(|file| format!("\nagain: {} {}", program.display(), file.display())).collect();
    bail!("{finding:#}{}", again.concat())
}

fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect()
}
