//! The lab with a cluster: pods follow the API, both kubectls are understood, and whatever is killed, the next command cleans up.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use mesh_tests::places::Places;
use mesh_tests::session::Session;
use mesh_tests::{raw, record, wait};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const SETTLE: Duration = Duration::from_secs(20);

/// Where everything is, or the reason to skip.
fn places() -> Result<Option<Places>> {
    if !raw::available() {
        return Ok(None);
    }
    let places = Places::find()?;
    let built = ["lab", "istiod-lite", "ztunnel", "waypoint"].iter().all(|name| places.binaries.join(name).exists());
    if built && places.kubectl().is_ok() && places.current_kubectl().is_ok() {
        return Ok(Some(places));
    }
    let reason = "binaries or tools are missing: cargo xtask setup, cargo xtask build";
    assert!(std::env::var_os("LAB").is_none_or(|value| value != "required"), "LAB=required, but {reason}");
    eprintln!("SKIPPED: {reason}");
    Ok(None)
}

fn id(name: &str) -> String {
    format!("{name}{}", std::process::id())
}

fn lab(places: &Places, id: &str, arguments: &[&str]) -> Result<std::process::Output> {
    Ok(Command::new(places.binaries.join("lab")).args(["--id", id]).args(arguments).output()?)
}

fn apply(session: &Session, manifest: &str) -> Result<()> {
    let output = session.kubectl_output(&["apply", "-f", manifest])?;
    anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn count(session: &Session, app: &str) -> usize {
    session.pods().iter().filter(|pod| pod.labels.get("app").is_some_and(|label| label == app)).count()
}

fn assert_gone(id: &str, cgroup: &Path) -> Result<()> {
    assert!(!cgroup.exists(), "{} is left", cgroup.display());
    for name in std::fs::read_dir("/run/netns")?.filter_map(|entry| Some(entry.ok()?.file_name())) {
        assert!(!name.to_string_lossy().starts_with(&format!("lab-{id}-")), "{name:?} is left");
    }
    assert!(record::all().iter().all(|record| record.id != id));
    assert!(!std::fs::read_to_string("/proc/self/mountinfo")?.contains(&format!("/run/mesh-lab/{id}/")));
    Ok(())
}

#[test]
fn pods_follow_the_api_and_answer_by_service_name() -> Result<()> {
    let Some(places) = places()? else { return Ok(()) };
    let id = id("play");
    let session = Session::start(&id, &places)?;
    apply(&session, "tests/demo/shop.yaml")?;
    wait::until("an answer by service name", SETTLE, || {
        let output = session.exec("client", &["curl", "-s", "-m", "2", "http://server.shop"])?.output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if !said.contains("hello from server-v") {
            bail!("{said} {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    })?;

    for kubectl in [places.kubectl()?, places.current_kubectl()?] {
        for arguments in [
            &["-n", "shop", "get", "pods", "-o", "wide"][..],
            &["-n", "shop", "rollout", "status", "deployment/server-v1", "--timeout=10s"],
            &["-n", "shop", "wait", "--for=condition=Ready", "pod", "--all", "--timeout=10s"],
            &["apply", "-f", "tests/demo/shop.yaml"],
        ] {
            let mut command = Command::new(&kubectl);
            command.arg("--kubeconfig").arg(session.kubeconfig()).args(arguments);
            let output = command.current_dir(&places.workspace).env("HOME", &session.record.run_dir).output()?;
            assert!(
                output.status.success(),
                "{} {arguments:?}: {}",
                kubectl.display(),
                String::from_utf8_lossy(&output.stderr)
            );
        }
    }

    session.kubectl_output(&["-n", "shop", "scale", "deployment/server-v1", "--replicas=3"])?;
    wait::until_true("four servers", SETTLE, || count(&session, "server") == 4)?;
    let victim = session.pod("client")?;
    kill(Pid::from_raw(i32::try_from(victim.main()?.pid)?), Signal::SIGKILL)?;
    wait::until("the client's container to be restarted", SETTLE, || {
        let again = session.pod("client")?;
        let container = again.main()?;
        if again.uid != victim.uid || container.restarts != 1 {
            bail!("{container:?}");
        }
        Ok(())
    })?;
    session.kubectl_output(&["delete", "namespace", "shop", "--wait=false"])?;
    wait::until_true("the namespace's pods to end", SETTLE, || {
        session.pods().iter().all(|pod| pod.namespace != "shop")
    })?;
    wait::until_true("their network namespaces to go", SETTLE, || !victim.netns.exists())?;

    let output = lab(&places, &id, &["exec", "nobody", "--", "true"])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("no running pod nobody"), "{said}");
    let cgroup = session.record.cgroup.clone();
    session.stop()?;
    assert_gone(&id, &cgroup)
}

#[test]
fn what_a_killed_supervisor_left_the_next_command_removes() -> Result<()> {
    let Some(places) = places()? else { return Ok(()) };
    let id = id("killed");
    let mut session = Session::start(&id, &places)?;
    session.keep()?;
    apply(&session, "tests/demo/shop.yaml")?;
    wait::until_true("a pod", SETTLE, || count(&session, "client") == 1)?;
    let cgroup = session.record.cgroup.clone();
    kill(Pid::from_raw(i32::try_from(session.record.owner.pid)?), Signal::SIGKILL)?;
    wait::until_true("the supervisor to be gone", SETTLE, || !session.record.owner.alive())?;
    assert!(cgroup.exists(), "pods outlive a killed supervisor");
    lab(&places, &id, &["down"])?;
    assert_gone(&id, &cgroup)
}

#[test]
fn a_supervisor_whose_starter_was_killed_takes_everything_down() -> Result<()> {
    let Some(places) = places()? else { return Ok(()) };
    let id = id("orphan");
    // A demo that is killed with SIGKILL while it tells its story.
    let mut demo = Command::new(places.binaries.join("lab"))
        .args(["--id", &id, "demo", "--only", "a"])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()?;
    let record = wait::until("the lab to be up", SETTLE, || record::find(&id).context("no record"))?;
    demo.kill()?;
    demo.wait()?;
    wait::until_true("the supervisor to end", SETTLE, || !record.owner.alive())?;
    lab(&places, &id, &["down"])?;
    assert_gone(&id, &record.cgroup)
}

#[test]
fn the_whole_story_holds() -> Result<()> {
    let Some(places) = places()? else { return Ok(()) };
    let id = id("story");
    let output = lab(&places, &id, &["demo"])?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("11 of 11 lines hold"), "{said}");
    assert!(record::find(&id).is_none());
    Ok(())
}
