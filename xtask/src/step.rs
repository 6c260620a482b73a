//! Long steps, shown as they happen: what runs, for how long, and the last line it said. Without a terminal the same, a line at a time.

use std::io::{BufRead, BufReader, IsTerminal, Read};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

/// Lines of a failed step that are worth reading.
const SHOWN_ON_FAILURE: usize = 200;

/// How often a log without a terminal hears of a step that goes on: silent jobs are taken for dead.
const SIGN_OF_LIFE: Duration = Duration::from_secs(20);

/// Shows steps one after the other.
pub struct Steps {
    terminal: bool,
}

impl Steps {
    pub fn new() -> Self {
        Self { terminal: std::io::stderr().is_terminal() }
    }

    /// Without a terminal, for steps that run side by side.
    pub fn in_lines() -> Self {
        Self { terminal: false }
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
        let said = Mutex::new(Vec::new());
        let stdout = child.stdout.take().context("standard output was piped")?;
        let stderr = child.stderr.take().context("standard error was piped")?;
        let (end, ended) = mpsc::channel::<()>();
        std::thread::scope(|scope| {
            if bar.is_none() {
                scope.spawn(|| tell(what, started, &said, ended));
            }
            let out = scope.spawn(|| follow(stdout, &said, bar.as_ref()));
            follow(stderr, &said, bar.as_ref());
            // What went wrong while following is no reason to forget the command.
            let _ = out.join();
            drop(end);
        });
        let status = child.wait()?;
        if let Some(bar) = bar {
            bar.finish_and_clear();
        }
        let seconds = started.elapsed().as_secs();
        if !status.success() {
            let said = said.into_inner().unwrap_or_else(PoisonError::into_inner);
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

/// Reads a stream to its end. Whatever it says: a stream nobody reads would stop who writes it.
fn follow(output: impl Read, said: &Mutex<Vec<String>>, bar: Option<&ProgressBar>) {
    for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        if let Some(bar) = bar {
            bar.set_message(line.trim().to_owned());
        }
        said.lock().unwrap_or_else(PoisonError::into_inner).push(line);
    }
}

/// Says now and then how far the step is, until the other end of `ended` is dropped.
fn tell(what: &str, started: Instant, said: &Mutex<Vec<String>>, ended: mpsc::Receiver<()>) {
    while ended.recv_timeout(SIGN_OF_LIFE) == Err(RecvTimeoutError::Timeout) {
        let said = said.lock().unwrap_or_else(PoisonError::into_inner);
        let last = said.last().map_or("", |line| line.trim());
        eprintln!("{what}: {} s, {last}", started.elapsed().as_secs());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_step_says_what_the_command_said_in_any_encoding() {
        let steps = Steps { terminal: false };
        let mut command = Command::new("sh");
        command.args(["-c", r"printf 'first \377\n'; echo second >&2; exit 3"]);
        let error = steps.run("trying", &mut command).unwrap_err().to_string();
        assert!(error.starts_with("trying: "), "{error}");
        assert!(error.contains("first \u{fffd}") && error.contains("second"), "{error}");
    }

    #[test]
    fn a_command_that_is_not_there_is_named() {
        let error = Steps { terminal: false }.run("trying", &mut Command::new("/nonexistent/program")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/program"), "{error}");
    }
}
