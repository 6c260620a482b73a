//! The lab itself: two nodes talk, the wire can be watched, and nothing stays behind.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;

use mesh_tests::raw::{self, Lab};
use mesh_tests::record;

const SERVER: &str = "import socket,sys\n\
s=socket.create_server(('::',80),family=socket.AF_INET6,dualstack_ipv6=True)\n\
while True:\n c,a=s.accept(); c.recv(9); c.sendall(b'clear-text-marker '+a[0].encode()); c.close()\n";
const CLIENT: &str = "import socket,sys\n\
c=socket.create_connection((sys.argv[1],80),5); c.sendall(b'x'); print(c.recv(99).decode())\n";

fn talk(lab: &Lab) -> anyhow::Result<()> {
    let client = lab.node("node-a").add_pod("client")?;
    let server = lab.node("node-b").add_pod("server")?;
    let mut web = server.spawn("web", &["python3", "-c", SERVER], &[])?;
    web.wait_listening(80)?;
    let cgroup = std::fs::read_to_string(format!("/proc/{}/cgroup", web.pid()))?;
    assert!(cgroup.contains(&format!("/node-b/kubepods/burstable/pod{}/container", server.uid)), "{cgroup}");

    for (to, from) in server.net.addresses().iter().zip(client.net.addresses()) {
        let capture = lab.capture()?;
        let output = client.run(&["python3", "-c", CLIENT, &to.to_string()])?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(said.contains(&from.to_string()), "{said} {}", String::from_utf8_lossy(&output.stderr));
        let wire = capture.stop()?;
        assert!(wire.count(b"clear-text-marker") > 0, "{} frames", wire.frames.len());
        assert!(wire.between(&[*to, from]).count() > 0);
    }
    Ok(())
}

#[test]
fn pods_on_two_nodes_talk_and_nothing_stays_behind() -> anyhow::Result<()> {
    if !raw::available() {
        return Ok(());
    }
    let id = format!("raw{}", std::process::id());
    let lab = Lab::up(&id)?;
    let (cgroup, bpffs) = (lab.record.cgroup.clone(), lab.record.bpffs.clone());
    talk(&lab)?;
    drop(lab);
    assert!(!cgroup.exists() && !bpffs.exists());
    assert!(record::all().iter().all(|record| record.id != id));
    let netns = std::fs::read_dir("/run/netns")?.filter_map(Result::ok);
    assert!(netns.into_iter().all(|n| !n.file_name().to_string_lossy().starts_with(&format!("lab-{id}-"))));
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    assert!(!mounts.contains(&bpffs.display().to_string()));
    Ok(())
}

#[test]
fn a_killed_labs_remains_are_reaped() -> anyhow::Result<()> {
    if !raw::available() {
        return Ok(());
    }
    let id = format!("dead{}", std::process::id());
    let mut lab = Lab::up(&id)?;
    let pod = lab.node("node-a").add_pod("sleeper")?;
    let sleeper = pod.spawn("sleeper", &["sleep", "1000"], &[])?;
    // A process that has ended: PID 1 never started at tick 1.
    lab.record.hand_over(record::ProcessId { pid: 1, started: 1 })?;
    let (cgroup, pid) = (lab.record.cgroup.clone(), sleeper.pid());
    std::mem::forget(sleeper);
    std::mem::forget(lab);
    let reaped = record::reap_dead()?;
    assert!(reaped.contains(&id), "{reaped:?}");
    assert!(!cgroup.exists());
    assert!(!Path::new(&format!("/run/netns/lab-{id}-node-a")).exists());
    assert_eq!(mesh_tests::sys::start_time(pid), None);
    Ok(())
}

/// Between being started and being in its cgroup a container is nowhere.
#[test]
fn who_comes_into_a_lab_after_the_kill_is_killed_too() -> anyhow::Result<()> {
    if !raw::available() {
        return Ok(());
    }
    let lab = Lab::up(&format!("late{}", std::process::id()))?;
    let cgroup = lab.record.cgroup.clone();
    record::kill_cgroup(&cgroup)?;
    let mut late = Command::new("sleep").arg("1000").spawn()?;
    std::fs::write(cgroup.join("cgroup.procs"), late.id().to_string())?;
    record::remove_cgroup(&cgroup)?;
    assert!(!cgroup.exists());
    assert_eq!(late.wait()?.signal(), Some(9));
    Ok(())
}

#[test]
fn a_second_lab_of_the_same_name_is_refused() -> anyhow::Result<()> {
    if !raw::available() {
        return Ok(());
    }
    let id = format!("twice{}", std::process::id());
    let _lab = Lab::up(&id)?;
    let error = Lab::up(&id).err().expect("the name is taken").to_string();
    assert!(error.contains("already up"), "{error}");
    Ok(())
}
