//! A container of the lab: its own root, user and rights, and no trace of them on the host.

use std::path::PathBuf;

use mesh_tests::container::{Bind, Launch, Root, Security};
use mesh_tests::raw::{self, Lab};

fn launch(lab: &Lab, argv: &[&str]) -> anyhow::Result<Launch> {
    let pod = lab.node("node-a").add_pod("pod")?;
    let config = lab.scratch("config")?;
    std::fs::write(config.join("greeting"), "hello\n")?;
    let mut launch = Launch::new(argv, pod.cgroup.clone());
    launch.netns = Some(pod.net.netns.path());
    launch.security =
        Security { uid: 1337, gid: 1338, capabilities: Some(vec!["net_admin".into()]), no_new_privileges: true };
    launch.root = Some(Root {
        scratch: lab.scratch("root")?,
        binds: vec![
            Bind::new(&config, "/etc/app"),
            Bind { read_only: true, ..Bind::new(config.join("greeting"), "/var/run/secrets/greeting") },
        ],
        programs: vec![("program".into(), PathBuf::from("/bin/cat"))],
        directories: vec!["/var/lib/app".into()],
        hostname: "pod-of-a-test".into(),
        read_only: true,
        writable_sysctls: false,
    });
    launch.env.insert("NAME".into(), "value with 'quotes'".into());
    Ok(launch)
}

#[test]
fn a_container_sees_its_own_root_and_has_only_its_rights() -> anyhow::Result<()> {
    if !raw::available() {
        return Ok(());
    }
    let lab = Lab::up(&format!("root{}", std::process::id()))?;
    let script = "id -u; id -g; hostname 2>/dev/null || cat /proc/sys/kernel/hostname; echo \"$NAME\"; program /etc/app/greeting\n\
                  cat /var/run/secrets/greeting; ls -d /var/lib/app; touch /root/x 2>/dev/null || echo read-only\n\
                  (echo y > /var/run/secrets/greeting) 2>/dev/null || echo still-hello\n\
                  grep -E 'CapBnd|NoNewPrivs' /proc/self/status; ls /sys/class/net";
    let mut command = launch(&lab, &["sh", "-c", script])?.command()?;
    let output = command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines: Vec<&str> = said.lines().collect();
    let expected = [
        "1337",
        "1338",
        "pod-of-a-test",
        "value with 'quotes'",
        "hello",
        "hello",
        "/var/lib/app",
        "read-only",
        "still-hello",
        "NoNewPrivs:\t1",
        "CapBnd:\t0000000000001000",
        "eth0",
        "lo",
    ];
    for line in expected {
        assert!(lines.contains(&line), "no {line:?} in:\n{said}\n{}", String::from_utf8_lossy(&output.stderr));
    }
    assert!(!PathBuf::from("/usr/local/bin/program").exists() && !PathBuf::from("/var/lib/app").exists());
    assert_ne!(std::fs::read_to_string("/proc/sys/kernel/hostname")?.trim(), "pod-of-a-test");
    Ok(())
}
