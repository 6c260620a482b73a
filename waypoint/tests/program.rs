//! The binary as an operator meets it.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(20);
const REQUIRED: [(&str, &str); 4] =
    [("POD_NAME", "w-0"), ("POD_NAMESPACE", "shop"), ("SERVICE_ACCOUNT", "w"), ("GATEWAY_NAME", "w")];

fn waypoint(args: &[&str], env: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_waypoint"));
    command.args(args).env_clear().envs(env.iter().copied());
    command
}

fn refused(args: &[&str], env: &[(&str, &str)]) -> String {
    let Output { status, stderr, .. } = waypoint(args, env).output().expect("the binary runs");
    assert_eq!(status.code(), Some(2));
    String::from_utf8_lossy(&stderr).into_owned()
}

#[test]
fn unknown_flags_are_all_named() {
    let said = refused(&["proxy", "waypoint", "--frobnicate", "serve"], &REQUIRED);
    assert!(said.contains("--frobnicate") && said.contains("serve") && said.contains("--help"), "{said}");
}

#[test]
fn bad_environment_values_are_all_named() {
    let bad = [("HBONE_PORT", "many"), ("ACCESS_LOG", "xml"), ("SECRET_TTL", "soon")];
    let said = refused(&[], &[&REQUIRED[1..], &bad[..]].concat());
    for part in ["POD_NAME is not set", "HBONE_PORT=\"many\"", "ACCESS_LOG=\"xml\"", "SECRET_TTL=\"soon\""] {
        assert!(said.contains(part), "{part} in {said}");
    }
    assert!(refused(&[], &[&REQUIRED[..], &[("RUST_LOG", "=;")]].concat()).contains("RUST_LOG"));
}

/// Killed when the test is over, however it ends.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Ports nobody listens on right now.
fn free_ports<const N: usize>() -> [u16; N] {
    let listeners = [(); N].map(|()| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port"));
    listeners.map(|l| l.local_addr().expect("address").port())
}

fn ask(port: u16, bytes: &[u8]) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    // Whoever gets garbage may hang up before it has all of it.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

fn until(mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "not in time");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn without_a_control_plane_it_waits_survives_garbage_and_ends_when_told() {
    let [hbone, admin, stats, readiness, nobody] = free_ports();
    let ports = [hbone, admin, stats, readiness].map(|p| p.to_string());
    let plane = format!("http://127.0.0.1:{nobody}");
    let env = [
        &REQUIRED[..],
        &[
            ("HBONE_PORT", ports[0].as_str()),
            ("ADMIN_PORT", ports[1].as_str()),
            ("STATS_PORT", ports[2].as_str()),
            ("READINESS_PORT", ports[3].as_str()),
            ("XDS_ADDRESS", plane.as_str()),
            ("CA_ADDRESS", plane.as_str()),
        ],
    ]
    .concat();
    let mut command = waypoint(&["proxy", "waypoint"], &env);
    let mut running = Running(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the binary runs"));
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    until(|| ask(readiness, get("/healthz/ready").as_bytes()).is_ok_and(|a| a.contains("certificate, xds")));
    for port in [hbone, admin, stats, readiness] {
        for garbage in
            [&[0; 2000][..], &[0xff; 70_000], b"\x16\x03\x01", b"GET\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
        {
            let answer = ask(port, garbage).expect("the port stays open");
            assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4") || port == hbone, "{port}: {answer}");
        }
    }
    let ready = ask(readiness, get("/healthz/ready").as_bytes()).expect("open");
    assert!(ready.starts_with("HTTP/1.1 500"), "{ready}");
    assert!(ask(stats, get("/metrics").as_bytes()).expect("open").contains("istio_build"));
    let quit = b"POST /quitquitquit HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
    assert!(ask(admin, quit).expect("open").starts_with("HTTP/1.1 200"));
    let mut status = None;
    until(|| {
        status = running.0.try_wait().expect("a child");
        status.is_some()
    });
    assert!(status.expect("ended").success());
}
