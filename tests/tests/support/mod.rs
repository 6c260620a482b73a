//! One lab for all cases of a test program: brought up once, with the pods of the demo joined to the mesh, and taken down at the
//! end whatever the cases did.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Output;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::cluster::state::{self, Pod};
use mesh_tests::demo;
use mesh_tests::demo::teller::{Answer, SETTLE, Teller};
use mesh_tests::places::Places;
use mesh_tests::session::Session;
use mesh_tests::{raw, wait};

/// A behaviour, in a sentence, and what shows it. Cases run in order and leave things as they found them.
pub type Case = (&'static str, fn(&Stage) -> Result<()>);

/// The lab while cases run.
pub struct Stage {
    pub teller: Teller,
}

/// Runs every case, says which of them hold, and takes the lab down before it judges. Skips where there can be no lab. With
/// `LAB_CASE` in the environment, only those whose sentence contains it.
pub fn run(id: &str, cases: &[Case]) {
    if !raw::available() {
        return;
    }
    let wanted = std::env::var("LAB_CASE").unwrap_or_default();
    let cases: Vec<&Case> = cases.iter().filter(|(name, _)| name.contains(&wanted)).collect();
    assert!(!cases.is_empty(), "LAB_CASE={wanted}: there is no such case");
    let stage = Stage::up(id).expect("the lab comes up");
    let mut failed = Vec::new();
    for (name, case) in &cases {
        let started = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| case(&stage).err().map(|e| format!("{e:#}"))));
        let verdict = outcome.unwrap_or_else(|_| Some("panicked".into()));
        let took = started.elapsed().as_secs_f32();
        match verdict {
            None => println!("case {name} ... ok [{took:.1} s]"),
            Some(reason) => {
                println!("case {name} ... FAILED [{took:.1} s]: {reason}");
                failed.push(format!("{name}: {reason}"));
                // What a case that failed has left behind must not fail the next ones.
                let kinds = "authorizationpolicies,peerauthentications,httproutes,serviceentries,workloadentries";
                if let Err(e) = stage.kubectl(&["-n", "shop", "delete", kinds, "--all"]) {
                    println!("cannot tidy up: {e:#}");
                }
            }
        }
    }
    stage.teller.session.stop().expect("the lab comes down");
    assert!(failed.is_empty(), "{} of {} cases failed:\n{}", failed.len(), cases.len(), failed.join("\n"));
}

impl Stage {
    fn up(id: &str) -> Result<Self> {
        let places = Places::find()?;
        for program in ["lab", "istiod-lite", "ztunnel", "waypoint"] {
            let path = places.binaries.join(program);
            ensure!(path.exists(), "{} is missing: run `cargo xtask build`", path.display());
        }
        let session = Session::start(id, &places)?;
        demo::install(&session)?;
        let stage = Self { teller: Teller::new(session) };
        stage.kubectl(&["label", "namespace", "shop", "istio.io/dataplane-mode=ambient"])?;
        wait::until("the pods of namespace shop to join", SETTLE, || {
            let said = stage.kubectl(&[
                "-n",
                "shop",
                "get",
                "pods",
                "-o",
                "jsonpath={range .items[*]}{.metadata.annotations.ambient\\.istio\\.io/redirection}{\"\\n\"}{end}",
            ])?;
            let joined = said.lines().filter(|line| *line == "enabled").count();
            ensure!(joined >= 4, "{joined} pods have joined");
            Ok(())
        })?;
        stage.traffic_flows()?;
        Ok(stage)
    }

    /// Runs `kubectl` (1.20); a refusal is an error.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.teller.ask(arguments)
    }

    /// A request from a pod's application.
    pub fn request(&self, pod: &str, arguments: &[&str]) -> Result<Answer> {
        self.teller.request(pod, arguments)
    }

    /// The ordinary thing still works.
    pub fn traffic_flows(&self) -> Result<()> {
        self.comes_to("client", &["http://server-v1/"], "200")
    }

    /// Waits until requests are answered with this status, `000` being a connection that was refused or reset.
    pub fn comes_to(&self, pod: &str, arguments: &[&str], status: &str) -> Result<()> {
        wait::until(&format!("curl {} from {pod} to be answered {status}", arguments.join(" ")), SETTLE, || {
            let answer = self.request(pod, arguments)?;
            if answer.status != status {
                bail!("last answer: {answer:?}");
            }
            Ok(())
        })
    }

    /// What a pod's first container has logged.
    pub fn log(&self, pod: &Pod) -> Result<String> {
        let path = state::Pod::log(&self.teller.session.record.run_dir, &pod.namespace, &pod.name, &pod.main()?.name);
        std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    }
}

/// Everything a command printed.
pub fn said(output: &Output) -> String {
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    text
}
