//! The story that `cargo xtask demo` tells: a mesh comes up around running pods, is used, broken and taken away again.

mod story;
pub mod teller;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::places::Places;
use crate::session::{DEFAULT, Session};
use crate::wait;
use teller::Teller;

/// How long the control plane and the node proxies may take to be ready.
const ROLLOUT: Duration = Duration::from_secs(60);
/// What is shown of each log after a failure: lines, and characters of a line.
const LOG_LINES: usize = 12;
const LOG_WIDTH: usize = 400;
/// Kinds the story uses; the API must know them before anything of theirs is applied.
const CRDS: &str = "manifests/crds";

/// Tells the story, whole or by letters. The exit status says whether all of it holds.
pub fn run(places: &Places, id: &str, keep: bool, only: &[char]) -> Result<ExitCode> {
    let started = Instant::now();
    if let Some(unknown) = only.iter().find(|wanted| !story::LINES.iter().any(|(letter, ..)| letter == *wanted)) {
        let letters: Vec<String> = story::LINES.iter().map(|(letter, ..)| letter.to_string()).collect();
        bail!("the story has no line {unknown}; it has {}", letters.join(" "));
    }
    println!("two nodes, an API server, a mesh and a few pods, on this machine");
    let session = Session::start(id, places)?;
    if let Err(e) = install(&session) {
        print_logs(&session);
        return Err(e);
    }
    println!("    ok    up after {:.1} s", started.elapsed().as_secs_f32());
    let mut teller = Teller::new(session);
    for line in story::LINES.iter().filter(|(letter, ..)| only.is_empty() || only.contains(letter)) {
        teller.tell(*line);
    }
    if !teller.good() {
        print_logs(&teller.session);
    }
    let good = teller.verdict();
    let mut session = teller.session;
    if keep {
        session.keep()?;
        println!("{}", how_to_play(&session));
    } else {
        session.stop()?;
        println!("    ok    everything is taken down");
    }
    println!("{:.1} s", started.elapsed().as_secs_f32());
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Applies CRDs, the install manifest and the pods of the story, with `kubectl`, and waits until all of it is ready.
pub fn install(session: &Session) -> Result<()> {
    install_with(session, "tests/demo/shop.yaml")?;
    wait::until("the pods of namespaces shop and outside", ROLLOUT, || {
        let output = session.kubectl_output(&["get", "pods", "-A", "-o", "jsonpath={range .items[*]}{.metadata.namespace} {.metadata.name} {.status.conditions[?(@.type==\"Ready\")].status}{\"\\n\"}{end}"])?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let (ready, rest): (Vec<&str>, Vec<&str>) = said.lines().partition(|line| line.ends_with(" True"));
        if ready.iter().filter(|line| line.starts_with("shop ")).count() < 4 || !rest.is_empty() {
            bail!("not ready: {}", rest.join(", "));
        }
        Ok(())
    })
}

/// Applies CRDs, the install manifest and a file of pods, and waits until the mesh's own parts are ready.
pub fn install_with(session: &Session, pods: &str) -> Result<()> {
    step(session, &["apply", "-f", CRDS])?;
    step(session, &["wait", "--for=condition=Established", "crd", "--all", "--timeout=20s"])?;
    step(session, &["apply", "-f", "manifests/install.yaml"])?;
    step(session, &["apply", "-f", pods])?;
    for workload in ["deployment/istiod", "daemonset/ztunnel"] {
        let timeout = format!("--timeout={}s", ROLLOUT.as_secs());
        step(session, &["-n", "istio-system", "rollout", "status", workload, &timeout])?;
    }
    Ok(())
}

fn step(session: &Session, arguments: &[&str]) -> Result<()> {
    println!("  $ kubectl {}", arguments.join(" "));
    let output = session.kubectl_output(arguments)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        bail!("kubectl {}: {}", arguments.join(" "), said.trim());
    }
    Ok(())
}

/// Where one looks next after a failure.
fn print_logs(session: &Session) {
    println!("\nlast lines of the logs ({})", session.record.logs().display());
    let Ok(entries) = std::fs::read_dir(session.record.logs()) else { return };
    let mut paths: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    for path in paths {
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        let lines: Vec<&str> = text.lines().collect();
        println!("---- {}", path.file_name().unwrap_or_default().to_string_lossy());
        for line in lines.iter().skip(lines.len().saturating_sub(LOG_LINES)) {
            println!("{}", line.chars().take(LOG_WIDTH).collect::<String>());
        }
    }
}

/// What to type while the lab is up.
pub fn how_to_play(session: &Session) -> String {
    let kubeconfig = session.kubeconfig();
    let kubectl = session.places.current_kubectl().or_else(|_| session.places.kubectl()).context("no kubectl");
    let kubectl = kubectl.map_or_else(|_| "kubectl".into(), |path| path.display().to_string());
    let id = &session.record.id;
    let lab = if id == DEFAULT { "lab".to_owned() } else { format!("lab --id {id}") };
    format!(
        "\nThe lab is up. To play:\n  \
         export KUBECONFIG={}\n  alias kubectl={kubectl}\n  \
         kubectl get pods -A\n  \
         kubectl label namespace shop istio.io/dataplane-mode=ambient\n  \
         cargo xtask {lab} exec client -- curl -s http://server\n  \
         cargo xtask {lab} capture\n  \
         cargo xtask {lab} status\n  \
         cargo xtask {lab} down",
        kubeconfig.display()
    )
}
