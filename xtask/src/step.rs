//! Long steps, shown as they happen: what runs, for how long, and the last line it said. Without a terminal: one line per step.

use std::io::{BufRead, BufReader, IsTerminal, Read};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

/// Lines of a failed step that are worth reading.
const SHOWN_ON_FAILURE: usize = 200;

/// Shows steps one after the other.
pub struct Steps {
    terminal: bool,
}

impl Steps {
    pub fn new() -> Self {
        Self { terminal: std::io::stderr().is_terminal() }
    }

    /// Runs a command to its end.
    ///
    /// # Errors
    /// With everything the command said when it does not succeed.
    pub fn run(&self, what: &str, command: &mut Command) -> Result<()> {
        let bar = self.begin(what);
        let started = Instant::now();
        let shown = format!("{command:?}");
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {shown}"))?;
        let said = Arc::new(Mutex::new(Vec::new()));
        let stdout = child.stdout.take().context("standard output was piped")?;
        let stderr = child.stderr.take().context("standard error was piped")?;
        std::thread::scope(|scope| {
            scope.spawn(|| follow(stdout, &said, bar.as_ref()));
            scope.spawn(|| follow(stderr, &said, bar.as_ref()));
        });
        let status = child.wait()?;
        if let Some(bar) = bar {
            bar.finish_and_clear();
        }
        let seconds = started.elapsed().as_secs();
        if !status.success() {
            let said = said.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let tail: Vec<&str> =
                said.iter().skip(said.len().saturating_sub(SHOWN_ON_FAILURE)).map(String::as_str).collect();
            bail!("{what}: {shown}: {status}\n{}", tail.join("\n"));
        }
        // Without a terminal the beginning has been announced already; short steps need no second line.
        if self.terminal && seconds > 0 || seconds > 10 {
            eprintln!("{what}: done in {seconds} s");
        }
        Ok(())
    }

    fn begin(&self, what: &str) -> Option<ProgressBar> {
        if !self.terminal {
            eprintln!("{what} ...");
            return None;
        }
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix} [{elapsed}] {wide_msg}") {
            bar.set_style(style);
        }
        bar.set_prefix(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(120));
        Some(bar)
    }
}

fn follow(output: impl Read, said: &Mutex<Vec<String>>, bar: Option<&ProgressBar>) {
    for line in BufReader::new(output).lines().map_while(Result::ok) {
        if let Some(bar) = bar {
            bar.set_message(line.trim().to_owned());
        }
        said.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(line);
    }
}
