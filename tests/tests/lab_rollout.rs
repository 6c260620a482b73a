//! `kubectl rollout restart daemonset/ztunnel` with the manifest as it is: an open connection does not notice.

use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use mesh_tests::places::Places;
use mesh_tests::session::Session;
use mesh_tests::{demo, raw, wait};

const SETTLE: Duration = Duration::from_secs(60);
/// A request every fifth of a second on one connection: `N HTTP/1.1 200 OK`, or `LOST`.
const HOLD: &str = "exec 3<>/dev/tcp/server-v1/80; n=0\n\
    while [ $n -lt 900 ]; do n=$((n+1))\n\
    printf 'GET / HTTP/1.1\\r\\nHost: server-v1\\r\\n\\r\\n' >&3 || { echo LOST; exit; }\n\
    read -r -t 5 line <&3 || { echo LOST; exit; }\n\
    echo \"$n $line\"; while read -r -t 0.2 line <&3; do :; done; done";

/// The shell that holds the connection; it ends with this.
struct Held(Child);

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn requests(log: &Path) -> Result<usize> {
    let said = fs::read_to_string(log)?;
    ensure!(!said.contains("LOST"), "the connection is lost after {}", said.lines().count());
    Ok(said.matches("200 OK").count())
}

/// Goes on answering.
fn lives(log: &Path) -> Result<()> {
    let before = requests(log)?;
    wait::until("the connection to answer", SETTLE, || match requests(log) {
        Err(lost) => Ok(Err(lost)),
        Ok(now) if now > before + 1 => Ok(Ok(())),
        Ok(now) => bail!("{now} requests"),
    })?
}

/// Ztunnels that have left their containers, on all nodes.
fn drainers(session: &Session) -> Result<usize> {
    let find = ["-c", "find \"$0\" -path '*ztunnel-draining/*' -name cgroup.procs -exec cat {} +"];
    let output = std::process::Command::new("sh").args(find).arg(&session.record.cgroup).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().count())
}

#[test]
fn an_open_connection_does_not_notice_a_rollout() -> Result<()> {
    if !raw::available() {
        return Ok(());
    }
    let places = Places::find()?;
    let built = ["lab", "istiod-lite", "ztunnel", "waypoint"].iter().all(|name| places.binaries.join(name).exists());
    ensure!(built, "binaries are missing: cargo xtask build");
    let session = Session::start(&format!("roll{}", std::process::id()), &places)?;
    demo::install(&session)?;
    session.kubectl_output(&["label", "namespace", "shop", "istio.io/dataplane-mode=ambient"])?;
    let annotations = "jsonpath={range .items[*]}{.metadata.annotations.ambient\\.istio\\.io/redirection} {end}";
    wait::until("the pods of namespace shop to join", SETTLE, || {
        let output = session.kubectl_output(&["-n", "shop", "get", "pods", "-o", annotations])?;
        let joined = String::from_utf8_lossy(&output.stdout).matches("enabled").count();
        ensure!(joined >= 4, "{joined} have joined");
        Ok(())
    })?;

    let log = session.record.run_dir.join("held.log");
    let mut command = session.exec("client", &["bash", "-c", HOLD])?;
    let mut held = Held(command.stdin(Stdio::null()).stdout(fs::File::create(&log)?).spawn()?);
    wait::until("the connection to be open", SETTLE, || {
        ensure!(requests(&log)? > 0, "no answer yet");
        Ok(())
    })?;

    for arguments in [
        &["-n", "istio-system", "rollout", "restart", "daemonset/ztunnel"][..],
        &["-n", "istio-system", "rollout", "status", "daemonset/ztunnel", "--timeout=90s"],
    ] {
        let output = session.kubectl_output(arguments)?;
        ensure!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    wait::until("the old pods to be gone", SETTLE, || {
        let left = session.pods().iter().filter(|pod| pod.name.starts_with("ztunnel-")).count();
        ensure!(left == 2, "{left} ztunnels");
        Ok(())
    })?;
    wait::until("what is open to be out of the containers", SETTLE, || {
        let drainers = drainers(&session)?;
        ensure!(drainers == 2, "{drainers} drain");
        Ok(())
    })?;
    lives(&log)?;

    held.0.kill()?;
    held.0.wait()?;
    wait::until("the old generation to end with its last connection", SETTLE, || {
        let drainers = drainers(&session)?;
        ensure!(drainers == 0, "{drainers} drain");
        Ok(())
    })?;
    session.stop()
}
