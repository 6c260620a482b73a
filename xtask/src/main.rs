//! The one entry to everything a developer or CI does here: `cargo xtask` lists it.
//!
//! This crate stays thin: it sets the machine up and calls cargo. What plays with the mesh is the `lab` binary of `tests/`, which the
//! commands `demo`, `lab` and `bench` become once it is built.
#![forbid(unsafe_code)]

mod bpf;
mod fuzz;
mod image;
mod layers;
mod panics;
mod setup;
mod step;

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, ensure};
use clap::{CommandFactory, Parser, Subcommand};

use step::Steps;

/// Seconds that CI gives each fuzz target: what was learnt before is not there, so it finds what is easy to find.
const FUZZED_IN_CI: u64 = 120;

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    about = "Builds, tests and shows the mesh",
    disable_help_subcommand = true
)]
struct Arguments {
    #[command(subcommand)]
    task: Option<Task>,
}

#[derive(Subcommand)]
enum Task {
    /// Install what a fresh Debian 12 lacks; quick when nothing is missing
    Setup,
    /// Build the kernel programs and all binaries
    Build {
        /// Optimised, as for benchmarks and images
        #[arg(long)]
        release: bool,
    },
    /// Build the kernel programs only
    Bpf,
    /// Bring up a mesh on this machine and walk its story, line by line
    Demo {
        /// Options of the story: --keep, --only a,b,c
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// All tests: unit, golden, in process, program, lab
    Test {
        /// Passed to cargo test
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// What CI runs: lint, all tests, and each fuzz target for two minutes
    Ci,
    /// Formatting, clippy, layers
    Lint,
    /// Check that crates and modules depend one way only
    Layers,
    /// up | down | status | exec POD -- COMMAND | capture
    Lab {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Measure: l4 (against plain TCP and peers), capture (against loopback and iptables), scale (the control plane under a fleet), pods (many idle ones); or test at length: soak (nothing is lost), endure (nothing grows)
    Bench {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Feed what nobody would send to every parser of what others send, or to the targets named
    Fuzz {
        /// For each target; two run at a time
        #[arg(long, default_value_t = 60)]
        secs: u64,
        names: Vec<String>,
    },
    /// Write container images of the three binaries as OCI archives, which docker, podman, ctr and kind load
    Image,
}

fn main() -> ExitCode {
    let Some(task) = Arguments::parse().task else {
        // A closed pipe is no reason to fail.
        let _ = Arguments::command().print_help();
        return ExitCode::SUCCESS;
    };
    match run(task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("xtask: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    let workspace = Workspace::find()?;
    match task {
        Task::Setup => setup::run_for_tests(&workspace),
        Task::Build { release } => build(&workspace, if release { &["--release"] } else { &[] }),
        Task::Bpf => build_bpf(&workspace),
        Task::Demo { options } => lab(&workspace, "demo", &options),
        Task::Lab { options } => lab(&workspace, "", &options),
        Task::Bench { options } => bench(&workspace, &options),
        Task::Test { options } => test(&workspace, &options),
        Task::Lint => lint(&workspace),
        Task::Layers => layers::check(&workspace),
        Task::Ci => ci(&workspace),
        Task::Fuzz { secs, names } => {
            setup::run_for_fuzzing()?;
            fuzz::run(&workspace, secs, &names)
        }
        Task::Image => {
            build(&workspace, &["--release"])?;
            image::write_all(&workspace)
        }
    }
}

/// The directories everything happens in.
pub struct Workspace {
    pub root: PathBuf,
    /// Cargo's target directory, wherever the user put it.
    pub target: PathBuf,
}

impl Workspace {
    fn find() -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask is not in a workspace")?;
        let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
        Ok(Self { root: root.to_owned(), target: std::path::absolute(target)? })
    }

    /// `cargo`, at the root.
    pub fn cargo(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.args(arguments).current_dir(&self.root);
        command
    }
}

fn build_bpf(workspace: &Workspace) -> Result<()> {
    let built = bpf::build(&workspace.root)?;
    eprintln!("kernel programs: {built}");
    Ok(())
}

/// Builds the binaries, and what else is `more`.
fn build(workspace: &Workspace, more: &[&str]) -> Result<()> {
    // The loader embeds the object: it has to be there first.
    build_bpf(workspace)?;
    let mut cargo = workspace.cargo(&["build", "--locked", "--workspace", "--bins"]);
    cargo.args(more);
    Steps::new().run("building the binaries", &mut cargo)
}

/// Sets up, builds, and becomes the `lab` binary.
fn lab(workspace: &Workspace, task: &str, options: &[String]) -> Result<()> {
    let program = workspace.target.join("debug/lab");
    let task = Some(task).filter(|task| !task.is_empty());
    let words: Vec<&str> = task.into_iter().chain(options.iter().map(String::as_str)).collect();
    let command = if words.first() == Some(&"--id") { words.get(2) } else { words.first() };
    let begins = matches!(command, Some(&"up" | &"demo")) && !words.contains(&"--help");
    // Taking down, looking, talking and being told how need nothing new, and must work at once.
    if begins || !program.exists() {
        // Said before the long build, not after it.
        ensure!(
            !begins || nix::unistd::geteuid().is_root(),
            "the lab makes network namespaces, cgroups and mounts: run it as root"
        );
        setup::run(workspace)?;
        build(workspace, &[])?;
    }
    become_program(Command::new(program).args(words))
}

/// Sets up, builds what is measured and what measures it, and becomes the `bench` binary.
fn bench(workspace: &Workspace, options: &[String]) -> Result<()> {
    // Said before the long build, not after it.
    const SUITES: [&str; 6] = ["l4", "capture", "scale", "pods", "soak", "endure"];
    ensure!(
        options.first().is_some_and(|suite| SUITES.contains(&suite.as_str())),
        "which suite? {}",
        SUITES.join(", ")
    );
    setup::run(workspace)?;
    build_bpf(workspace)?;
    // Of the workspace whatever the suite: with other packages crates have other features, and all is built once more.
    let mut cargo = workspace.cargo(&["build", "--locked", "--release", "--workspace"]);
    cargo.args(["--bin", "ztunnel", "--bin", "bench"]);
    if options.first().is_some_and(|suite| ["scale", "pods", "soak", "endure"].contains(&suite.as_str())) {
        cargo.args(["--bin", "istiod-lite", "--bin", "lab"]);
    }
    Steps::new().run("building what is measured", &mut cargo)?;
    become_program(Command::new(workspace.target.join("release/bench")).args(options))
}

/// Replaces this process: signals and the exit status are then the program's own.
fn become_program(command: &mut Command) -> Result<()> {
    Err(command.exec()).with_context(|| format!("cannot run {command:?}"))
}

fn lint(workspace: &Workspace) -> Result<()> {
    let steps = Steps::new();
    steps.run("formatting", &mut workspace.cargo(&["fmt", "--all", "--check"]))?;
    let fuzz = ["fmt", "--manifest-path", "tests/fuzz/Cargo.toml", "--check"];
    steps.run("formatting of the fuzz targets", &mut workspace.cargo(&fuzz))?;
    let clippy = ["clippy", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"];
    steps.run("clippy", &mut workspace.cargo(&clippy))?;
    layers::check(workspace)
}

fn test(workspace: &Workspace, options: &[String]) -> Result<()> {
    setup::run_for_tests(workspace)?;
    // Together: tests want more of some crates than the binaries do, and these would be built once more.
    build(workspace, &["--tests"])?;
    let mut cargo = workspace.cargo(&["test", "--locked", "--workspace"]);
    cargo.args(options).env("LAB", "required").stdout(Stdio::piped());
    let mut cargo = cargo.spawn().context("cannot run cargo")?;
    let said = cargo.stdout.take().context("standard output was piped")?;
    let panics = panics::pass_on(said, std::io::stdout())?;
    let status = cargo.wait()?;
    ensure!(status.success(), "tests: {status}\n{}", panics.join("\n"));
    Ok(())
}

fn ci(workspace: &Workspace) -> Result<()> {
    setup::run(workspace)?;
    lint(workspace)?;
    test(workspace, &[])?;
    setup::run_for_fuzzing()?;
    fuzz::run(workspace, FUZZED_IN_CI, &[])
}
