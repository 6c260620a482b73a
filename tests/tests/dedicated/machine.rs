//! A machine outside the cluster, set up as `manifests/samples/vm.md` says: object and settings are read from there.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Output};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use mesh_tests::container::{self, Bind, Launch, Root};
use mesh_tests::demo::teller::SETTLE;
use mesh_tests::topology::{Netns, PARENT_V4, WIRE};
use mesh_tests::{record, sys, wait};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{Stage, said};

/// Beside the nodes, on the network between them.
const ADDRESS: &str = "172.30.0.50";
/// The one that the document has.
const DOCUMENTED: &str = "192.0.2.10";
const APP_PORT: u16 = 8080;
const SSH: u16 = 22;
const TOKEN_REQUEST: &str = r#"{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"audiences": ["istio-ca"], "expirationSeconds": 86400}}"#;
const SERVER: &str = r#"use IO::Socket::INET;
my $listener = IO::Socket::INET->new(LocalPort => $ARGV[0], Listen => 64, ReuseAddr => 1) or die;
while (my $client = $listener->accept) {
    while (defined(my $line = <$client>)) { last unless $line =~ /\S/ }
    print $client "HTTP/1.0 200 OK\r\n\r\nhello from the machine to ", $client->peerhost, "\n";
}"#;

/// The machine and what runs on it; cgroup, pins and namespace are below those of the lab.
struct Machine<'a> {
    stage: &'a Stage,
    netns: Netns,
    cgroup: PathBuf,
    pins: PathBuf,
    root: Root,
    /// What ztunnel's service has as its environment.
    env: BTreeMap<String, String>,
    /// The application is the first.
    services: Vec<Child>,
}

impl<'a> Machine<'a> {
    fn new(stage: &'a Stage) -> Result<Self> {
        let session = &stage.teller.session;
        let (record, places) = (&session.record, &session.places);
        let document = fs::read_to_string(places.file("manifests/samples/vm.md"))?.replace(DOCUMENTED, ADDRESS);
        let block = |holds: &str| {
            let mut blocks = document.split("```").skip(1).step_by(2);
            blocks.find(|block| block.contains(holds)).with_context(|| format!("vm.md has no block with {holds:?}"))
        };
        let object = block("<<EOF")?.split("<<EOF\n").nth(1).and_then(|rest| rest.split("\nEOF").next());
        session.apply("apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: billing, namespace: shop}\n")?;
        session.apply(object.context("an object in it")?)?;
        let env = block("PROXY_MODE=dedicated")?.lines().filter_map(|line| line.split_once('='));
        let env = env.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();

        let directory = record.run_dir.join("machine");
        let etc = directory.join("etc-ztunnel");
        let run = directory.join("run");
        fs::create_dir_all(&etc)?;
        fs::create_dir_all(&run)?;
        let (request, account) = (directory.join("request"), "/api/v1/namespaces/shop/serviceaccounts/billing/token");
        fs::write(&request, TOKEN_REQUEST)?;
        let reply = stage.kubectl(&["create", "--raw", account, "-f", request.to_str().context("in UTF-8")?])?;
        let reply: serde_json::Value = serde_json::from_str(&reply)?;
        fs::write(etc.join("istio-token"), reply["status"]["token"].as_str().context("no token")?)?;
        let certificate =
            ["-n", "shop", "get", "configmap", "istio-ca-root-cert", "-o", "jsonpath={.data.root-cert\\.pem}"];
        fs::write(etc.join("root-cert.pem"), stage.kubectl(&certificate)?)?;
        let istiod = session.pod("istio-system/istiod")?.addresses[0];
        fs::write(directory.join("hosts"), format!("127.0.0.1 localhost\n{istiod} istiod.istio-system.svc\n"))?;
        fs::write(directory.join("resolv.conf"), format!("nameserver {PARENT_V4}\n"))?;

        let netns = Netns::create(format!("{}machine", record.netns_prefix))?;
        let parent = session.wire().name;
        let link = format!(
            "link add machine type veth peer name eth0 netns {}\nlink set machine master {WIRE} up\n",
            netns.name
        );
        sys::ip_batch(Some(&parent), &link)?;
        let own = format!("addr add {ADDRESS}/24 dev eth0\nlink set eth0 up\nroute add default via {PARENT_V4}\n");
        sys::ip_batch(Some(&netns.name), &own)?;

        let (cgroup, pins) = (record.cgroup.join("machine"), record.bpffs.join("machine"));
        fs::create_dir_all(&cgroup)?;
        fs::create_dir_all(&pins)?;
        let root = Root {
            scratch: directory.join("root"),
            binds: vec![
                Bind::new(directory.join("hosts"), "/etc/hosts"),
                Bind::new(directory.join("resolv.conf"), "/etc/resolv.conf"),
                Bind::new(&etc, "/etc/ztunnel"),
                Bind::new(&run, "/run"),
                Bind::new(&cgroup, "/sys/fs/cgroup"),
                Bind::new(&pins, "/sys/fs/bpf"),
            ],
            programs: vec![("ztunnel".to_owned(), places.binaries.join("ztunnel"))],
            directories: Vec::new(),
            hostname: "vm-1".to_owned(),
            read_only: false,
            writable_sysctls: true,
        };
        let mut machine = Self { stage, netns, cgroup, pins, root, env, services: Vec::new() };
        for (name, port) in [("app", APP_PORT), ("sshd", SSH)] {
            machine.services.push(machine.start(name, &["perl", "-e", SERVER, &port.to_string()])?);
        }
        Ok(machine)
    }

    /// A service of the machine. What services share of the file system is bound into the root of each.
    fn start(&self, name: &str, argv: &[&str]) -> Result<Child> {
        let launch = Launch {
            env: self.env.clone(),
            netns: Some(self.netns.path()),
            root: Some(Root { scratch: self.root.scratch.with_file_name(format!("root-{name}")), ..self.root.clone() }),
            log: Some(self.stage.teller.session.record.logs().join(format!("machine.{name}.log"))),
            ..Launch::new(argv, self.cgroup.join(name))
        };
        Ok(launch.command()?.spawn()?)
    }

    /// A command on the machine, by a process of its own.
    fn run(&self, argv: &[&str]) -> Result<Output> {
        let app = self.services.first().context("it runs")?.id();
        let argv: Vec<String> = argv.iter().map(|word| (*word).to_owned()).collect();
        Ok(container::exec_command(app, &self.cgroup.join("shell"), &self.env, &argv).output()?)
    }

    fn curl(&self, arguments: &[&str]) -> Result<String> {
        let argv = [&["curl", "-sS", "-m", "5"], arguments].concat();
        let output = self.run(&argv)?;
        ensure!(output.status.success(), "curl {}: {}", arguments.join(" "), said(&output));
        Ok(said(&output))
    }

    /// The owner, from outside.
    fn ssh(&self) -> Result<()> {
        let to = SocketAddr::new(ADDRESS.parse()?, SSH);
        self.stage.teller.session.wire().enter(move || {
            TcpStream::connect_timeout(&to, Duration::from_secs(5)).map(drop).context("the owner's way in")
        })
    }
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        // The rest is below what the lab takes down.
        let ended = record::kill_cgroup(&self.cgroup).and_then(|()| self.netns.delete());
        for service in &mut self.services {
            let _ = service.wait();
        }
        if let Err(e) = ended {
            eprintln!("the machine stays until the lab ends: {e:#}");
        }
    }
}

/// Under STRICT: in as the document says, at work, and out again.
pub fn as_documented(stage: &Stage) -> Result<()> {
    let session = &stage.teller.session;
    stage.kubectl(&["apply", "-f", "tests/demo/strict.yaml"])?;
    let machine = Machine::new(stage)?;
    let (app, outside) = (format!("http://{ADDRESS}:{APP_PORT}/"), "http://server-v1.shop.svc.cluster.local/");
    fs::create_dir_all(machine.cgroup.join("shell"))?;
    wait::until("the machine to run", SETTLE, || machine.ssh())?;
    wait::until("its application to run", SETTLE, || machine.curl(&[&app]))?;

    let mut ztunnel = machine.start("ztunnel", &["ztunnel"])?;
    let log = session.record.logs().join("machine.ztunnel.log");
    wait::until("the machine's ztunnel to be ready", SETTLE, || {
        let asked = machine.curl(&["-f", "http://localhost:15021/healthz/ready"]);
        asked.with_context(|| fs::read_to_string(&log).unwrap_or_default())
    })?;
    let dump = machine.curl(&["--unix-socket", "/var/run/ztunnel/admin.sock", "http://localhost/config_dump"])?;
    ensure!(dump.contains("sa/billing"), "no certificate of its own: {dump}");
    ensure!(machine.curl(&["http://localhost:15020/metrics"])?.contains("istio_"), "no metrics");

    let client = session.pod("client")?;
    let wire = session.capture()?;
    let answer = wait::until("the machine to answer the client", SETTLE, || {
        let answer = stage.request("client", &[&app])?;
        ensure!(answer.good(), "{answer:?}");
        Ok(answer.body)
    })?;
    let seen: Vec<IpAddr> = client.addresses;
    ensure!(seen.iter().any(|ip| answer.contains(&format!("from the machine to {ip}"))), "{answer}");
    let answer = wait::until("the machine to be answered", SETTLE, || machine.curl(&["-f", outside]))?;
    ensure!(answer.contains(&format!("to {ADDRESS}")), "{answer}");
    let wire = wire.stop()?;
    ensure!(wire.segments().next().is_some() && wire.count(b"hello from") == 0, "readable on the wire");
    let record = wait::until("the server's record", SETTLE, || {
        let log = stage.log(&session.proxy("node-b")?)?;
        let is_it = |line: &&str| line.contains("direction=\"inbound\"") && line.contains("shop/sa/billing");
        log.lines().find(is_it).map(str::to_owned).context("no line yet")
    })?;
    println!("  {record}");
    stage.comes_to("stranger", &[&app], "000")?;
    machine.ssh()?;

    // Stopped it is closed, but for its owner; released it is as before.
    kill(Pid::from_raw(i32::try_from(ztunnel.id())?), Signal::SIGTERM)?;
    let ended = wait::until("the machine's ztunnel to end", SETTLE * 2, || ztunnel.try_wait()?.context("it runs"))?;
    ensure!(ended.success(), "{ended}: {}", fs::read_to_string(&log)?);
    ensure!(machine.curl(&["-f", outside]).is_err(), "stopped is not released");
    machine.ssh()?;
    let released = machine.run(&["ztunnel", "release"])?;
    ensure!(released.status.success() && said(&released).contains("released"), "{}", said(&released));
    let rules = said(&machine.run(&["ip", "rule"])?);
    ensure!(!rules.contains("15000"), "{rules}");
    ensure!(fs::read_dir(&machine.pins)?.next().is_none(), "something is pinned still");
    stage.kubectl(&["-n", "shop", "delete", "workloadentry", "vm-1"])?;
    stage.kubectl(&["-n", "shop", "delete", "serviceaccount", "billing"])?;
    // It is a stranger from now on, in both directions.
    stage.comes_to("client", &[&app], "200")?;
    ensure!(machine.curl(&["-f", outside]).is_err(), "STRICT lets it in");
    Ok(())
}
