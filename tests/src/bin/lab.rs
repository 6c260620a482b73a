//! `lab`: brings a mesh up on this machine, plays with it, tells its story. Usually run by `cargo xtask`.
#![forbid(unsafe_code)]

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use mesh_tests::cluster::{Options, Supervisor};
use mesh_tests::demo;
use mesh_tests::places::Places;
use mesh_tests::raw::NODES;
use mesh_tests::record;
use mesh_tests::session::{self, DEFAULT, KEEP, Session};
use mesh_tests::topology::WIRE;
use tokio::signal::unix::{SignalKind, signal};

/// What `capture` shows unless told otherwise: payload, and not the talk with the API server and the control plane.
const PODS_TALK: [&str; 2] = ["-A", "tcp and not port 6443 and not port 15012"];

/// A mesh in a box.
#[derive(Parser)]
#[command(bin_name = "cargo xtask lab")]
struct Arguments {
    /// Name of the lab: several may stand side by side.
    #[arg(long, default_value = DEFAULT)]
    id: String,
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Bring up two nodes, the API server, the mesh and a few pods, and leave them up.
    Up {
        /// Only the nodes and the API server: no control plane, no pods.
        #[arg(long)]
        bare: bool,
    },
    /// Take everything down.
    Down,
    /// Say what is up.
    Status,
    /// Run a command in a pod, found by name, beginning of the name or label `app`.
    Exec {
        pod: String,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Show what pods say to each other across nodes, until Ctrl-C (tcpdump; own options and filter may follow `--`).
    Capture {
        #[arg(last = true)]
        options: Vec<String>,
    },
    /// Walk the whole story, line by line.
    Demo {
        /// Leave the lab up afterwards.
        #[arg(long)]
        keep: bool,
        /// Only the lines with these letters, such as a,b,c; most stand on what the ones before them left behind.
        #[arg(long, value_delimiter = ',')]
        only: Vec<char>,
    },
    /// The process that answers for a lab; started by `up` and `demo`.
    #[command(hide = true)]
    Supervise,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments.id, arguments.command) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("lab: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whoever read what was printed may have seen enough.
fn printed(outcome: std::io::Result<()>) -> Result<()> {
    outcome.or_else(|e| if e.kind() == ErrorKind::BrokenPipe { Ok(()) } else { Err(e.into()) })
}

fn run(id: &str, task: Task) -> Result<ExitCode> {
    let places = Places::find()?;
    match task {
        Task::Up { bare } => up(&places, id, bare)?,
        Task::Down => down(&places, id)?,
        Task::Status => status(&places, id)?,
        Task::Exec { pod, command } => {
            let words: Vec<&str> = command.iter().map(String::as_str).collect();
            // Only returns where it fails.
            return Err(Session::attach(id, &places)?.exec(&pod, &words)?.exec().into());
        }
        Task::Capture { options } => {
            let wire = Session::attach(id, &places)?.wire();
            let mut tcpdump = Command::new("ip");
            tcpdump.args(["netns", "exec", &wire.name, "tcpdump", "-nn", "-l", "-i", WIRE]);
            if options.is_empty() {
                tcpdump.args(PODS_TALK);
            } else {
                tcpdump.args(options);
            }
            return Err(tcpdump.exec()).context("cannot run tcpdump: `cargo xtask setup`");
        }
        Task::Demo { keep, only } => return demo::run(&places, id, keep, &only),
        Task::Supervise => supervise(&places, id.to_owned())?,
    }
    Ok(ExitCode::SUCCESS)
}

fn up(places: &Places, id: &str, bare: bool) -> Result<()> {
    let mut session = Session::start(id, places)?;
    if !bare {
        demo::install(&session)?;
    }
    session.keep()?;
    printed(writeln!(std::io::stdout(), "{}", demo::how_to_play(&session)))
}

fn down(places: &Places, id: &str) -> Result<()> {
    record::reap_dead()?;
    match Session::attach(id, places) {
        Ok(session) => session.stop(),
        Err(_) => printed(writeln!(std::io::stdout(), "no lab is up")),
    }
}

fn status(places: &Places, id: &str) -> Result<()> {
    let reaped = record::reap_dead()?;
    let session = Session::attach(id, places)?;
    printed(print_status(&reaped, &session))
}

fn print_status(reaped: &[String], session: &Session) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    for reaped in reaped {
        writeln!(out, "cleaned up after lab {reaped}, which was killed")?;
    }
    writeln!(out, "supervisor {}  run directory {}", session.record.owner.pid, session.record.run_dir.display())?;
    for pod in session.pods() {
        let addresses: Vec<String> = pod.addresses.iter().map(ToString::to_string).collect();
        writeln!(out, "{:14} {:36} {:8} {}", pod.namespace, pod.name, pod.node, addresses.join(" "))?;
        for container in &pod.containers {
            writeln!(out, "{:14}   {} pid {} restarts {}", "", container.name, container.pid, container.restarts)?;
        }
    }
    Ok(())
}

/// Runs the lab until a signal, or until whoever started it is gone.
fn supervise(places: &Places, id: String) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let options = Options { id: id.clone(), nodes: NODES.map(str::to_owned).to_vec(), images: places.images(&id) };
        let abandoned = abandoned();
        let end = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
                () = abandoned => {}
            }
        };
        let mut end = std::pin::pin!(end);
        let supervisor = tokio::select! {
            supervisor = Supervisor::start(&options) => supervisor?,
            // Half made; the record names all of it.
            () = &mut end => return record::take_down_own(&id),
        };
        std::fs::write(session::ready_file(supervisor.record()), "")?;
        supervisor.run(options.images.clone(), end).await
    })?;
    // Nobody may be left who would. What went wrong stays to be read.
    let _ = std::fs::remove_file(record::log_file(&id));
    Ok(())
}

/// Resolves when standard input ends without the word that we are to live on.
async fn abandoned() {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    // Blocks in `read` for the life of the process; nobody waits for it.
    std::thread::spawn(move || {
        let mut said = Vec::new();
        // An error counts as silence.
        let _ = std::io::stdin().read_to_end(&mut said);
        if said != KEEP {
            let _ = sender.send(());
        }
    });
    if receiver.await.is_err() {
        std::future::pending::<()>().await;
    }
}
