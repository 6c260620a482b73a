//! How the story is told: every command is shown with what came back, every claim is checked and said to hold or not.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::session::Session;
use crate::wait;

/// Lines of a command's output that are shown.
const SHOWN: usize = 8;
/// How long configuration may take to arrive where no claim says less.
pub const SETTLE: Duration = Duration::from_secs(15);

/// A line of the story: letter, title, and what it does.
pub type Line = (char, &'static str, fn(&mut Teller) -> Result<()>);

/// Runs commands and keeps the score.
pub struct Teller {
    pub session: Session,
    verdicts: Vec<(char, &'static str, bool, Duration)>,
    claims_failed: usize,
}

/// What a request brought back.
#[derive(Clone, Debug)]
pub struct Answer {
    /// curl's exit status: 0 is an HTTP response of whatever status.
    pub exit: i32,
    /// `000` without a response.
    pub status: String,
    pub body: String,
    pub took: Duration,
}

impl Answer {
    /// A 200.
    pub fn good(&self) -> bool {
        self.exit == 0 && self.status == "200"
    }
}

impl Teller {
    pub fn new(session: Session) -> Self {
        Self { session, verdicts: Vec::new(), claims_failed: 0 }
    }

    /// Tells one line; a line fails with its first broken command or any claim that does not hold, and the story goes on.
    pub fn tell(&mut self, (letter, title, act): Line) {
        println!("\n({letter}) {title}");
        self.claims_failed = 0;
        let started = Instant::now();
        if let Err(e) = act(self) {
            println!("    FAIL  {e:#}");
            self.claims_failed += 1;
        }
        self.verdicts.push((letter, title, self.claims_failed == 0, started.elapsed()));
    }

    /// Whether every line told so far holds.
    pub fn good(&self) -> bool {
        self.verdicts.iter().all(|(_, _, good, _)| *good)
    }

    /// Prints the verdict; whether every line held.
    pub fn verdict(&self) -> bool {
        println!("\nverdict");
        for (letter, title, good, took) in &self.verdicts {
            println!("    {:4}  ({letter}) {title}  [{:.1} s]", if *good { "ok" } else { "FAIL" }, took.as_secs_f32());
        }
        let good = self.verdicts.iter().filter(|(_, _, good, _)| *good).count();
        println!("    {good} of {} lines hold", self.verdicts.len());
        self.good()
    }

    /// A claim and the evidence for or against it.
    pub fn claim(&mut self, holds: bool, what: &str) {
        println!("    {}  {what}", if holds { "ok  " } else { "FAIL" });
        self.claims_failed += usize::from(!holds);
    }

    fn show(shown: &str, said: &str) {
        println!("  $ {shown}");
        let lines: Vec<&str> = said.lines().collect();
        lines.iter().take(SHOWN).for_each(|line| println!("      {line}"));
        if lines.len() > SHOWN {
            println!("      ... {} more lines", lines.len() - SHOWN);
        }
    }

    /// Shows and runs `kubectl`; a refusal ends the line.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        let output = self.session.kubectl_output(arguments)?;
        let said = text(&output);
        Self::show(&format!("kubectl {}", arguments.join(" ")), &said);
        if !output.status.success() {
            bail!("kubectl: {}", output.status);
        }
        Ok(said)
    }

    /// Runs `kubectl` without showing it.
    pub fn ask(&self, arguments: &[&str]) -> Result<String> {
        let output = self.session.kubectl_output(arguments)?;
        if !output.status.success() {
            bail!("kubectl {}: {}", arguments.join(" "), text(&output));
        }
        Ok(text(&output))
    }

    /// One request from a pod, shown.
    pub fn curl(&self, pod: &str, arguments: &[&str]) -> Result<Answer> {
        let answer = self.request(pod, arguments)?;
        let said =
            format!("{}[status {} curl {} {} ms]", answer.body, answer.status, answer.exit, answer.took.as_millis());
        Self::show(&format!("lab exec {pod} -- curl -s {}", arguments.join(" ")), &said);
        Ok(answer)
    }

    /// One request from a pod, not shown. Five seconds is longer than any of them should take.
    pub fn request(&self, pod: &str, arguments: &[&str]) -> Result<Answer> {
        let mut argv = vec!["curl", "-s", "-m", "5", "-w", "\n%{http_code}"];
        argv.extend(arguments);
        let started = Instant::now();
        let output = self.session.exec(pod, &argv)?.output()?;
        let took = started.elapsed();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let (body, status) = said.rsplit_once('\n').context("curl said nothing")?;
        let exit = output.status.code().context("curl was killed")?;
        Ok(Answer { exit, status: status.to_owned(), body: body.to_owned(), took })
    }

    /// Asks again until the answer is as wanted, then shows that one; says how long it took.
    pub fn curl_until(
        &self,
        pod: &str,
        arguments: &[&str],
        deadline: Duration,
        wanted: impl Fn(&Answer) -> bool,
    ) -> Result<(Answer, Duration)> {
        let started = Instant::now();
        let answer = wait::until(&format!("curl {} from {pod}", arguments.join(" ")), deadline, || {
            let answer = self.request(pod, arguments)?;
            if !wanted(&answer) {
                bail!("last answer: {answer:?}");
            }
            Ok(answer)
        })?;
        let took = started.elapsed();
        let said = format!("{}[status {} curl {}]", answer.body, answer.status, answer.exit);
        Self::show(&format!("lab exec {pod} -- curl -s {}", arguments.join(" ")), &said);
        Ok((answer, took))
    }

    /// Opens a connection that stays open: a download that the server spreads over more than a minute.
    pub fn open_long_lived(&self, pod: &str, url: &str) -> Result<LongLived> {
        let file = self.session.record.run_dir.join(format!("download-{}", uuid::Uuid::new_v4().simple()));
        let mut command: Command = self.session.exec(pod, &["curl", "-sSN", "-m", "300", url])?;
        let output = File::create(&file)?;
        let child = command.stdin(std::process::Stdio::null()).stdout(output.try_clone()?).stderr(output).spawn()?;
        println!("  $ lab exec {pod} -- curl -sN {url} &");
        let mut connection = LongLived { child, file };
        connection.wait_more(1, Duration::from_secs(10))?;
        Ok(connection)
    }

    /// Waits until `kubectl` says what is wanted; shows it then.
    pub fn kubectl_until(
        &self,
        arguments: &[&str],
        deadline: Duration,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<String> {
        let said = wait::until(&format!("kubectl {}", arguments.join(" ")), deadline, || {
            let said = self.ask(arguments)?;
            if !wanted(&said) {
                bail!("it says: {}", said.trim());
            }
            Ok(said)
        })?;
        Self::show(&format!("kubectl {}", arguments.join(" ")), &said);
        Ok(said)
    }

    /// PIDs of the containers of a namespace: the same list later means nothing was restarted.
    pub fn processes(&self, namespace: &str) -> Vec<(String, u32)> {
        let pods = self.session.pods().into_iter().filter(|pod| pod.namespace == namespace);
        pods.flat_map(|pod| pod.containers.into_iter().map(move |c| (format!("{}/{}", pod.name, c.name), c.pid)))
            .collect()
    }
}

/// A connection that is meant to outlive something.
pub struct LongLived {
    child: Child,
    file: PathBuf,
}

impl LongLived {
    /// Bytes received so far.
    pub fn received(&self) -> u64 {
        std::fs::metadata(&self.file).map_or(0, |metadata| metadata.len())
    }

    /// Waits for so many more bytes; the end of the connection is an error.
    pub fn wait_more(&mut self, more: u64, deadline: Duration) -> Result<()> {
        let wanted = self.received() + more;
        wait::until("the open connection to bring more", deadline, || {
            if let Some(status) = self.child.try_wait()? {
                let said = std::fs::read_to_string(&self.file).unwrap_or_default();
                return Ok(Err(anyhow::anyhow!(
                    "it ended ({status}) after {}",
                    said.lines().last().unwrap_or("nothing")
                )));
            }
            if self.received() < wanted {
                bail!("{} bytes of {wanted}", self.received());
            }
            Ok(Ok(()))
        })?
    }
}

impl LongLived {
    /// Waits for it to end, in whatever way.
    pub fn ends(&mut self, deadline: Duration) -> Result<()> {
        wait::until("the open connection to end", deadline, || self.child.try_wait()?.map(drop).context("it is open"))
    }
}

impl Drop for LongLived {
    fn drop(&mut self) {
        // An error means it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn text(output: &Output) -> String {
    let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
    said.push_str(&String::from_utf8_lossy(&output.stderr));
    said
}
