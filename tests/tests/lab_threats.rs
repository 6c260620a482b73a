//! The threat model, line by line: who can do what, and what they cannot although they try.

#![forbid(unsafe_code)]

mod support;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mesh_tests::cluster::state::Pod;
use mesh_tests::container::Launch;
use mesh_tests::demo::teller::SETTLE;
use mesh_tests::topology::PARENT_V4;
use mesh_tests::{record, sys, wait};

use support::{Case, Stage, said};

const CASES: &[Case] = &[
    ("pod with NET_RAW, forging the bypass mark: has no identity and is refused by STRICT peers", forged_mark),
    ("pod, unprivileged: cannot set a mark", mark_without_rights),
    (
        "pod with NET_ADMIN, claiming a neighbour's address: gets neither identity nor traffic of the neighbour",
        claims_address,
    ),
    ("pod, unprivileged: a cgroup with another pod's UID below its own makes it nobody else", foreign_cgroup),
    ("pod with NET_ADMIN, borrowing the probes' address: is no kubelet", borrowed_probe_source),
    ("pod with NET_ADMIN, flushing its rules: is captured again at once, and that is counted", flushes_rules),
    ("pod with NET_ADMIN, answering DNS in the server's name: no name of the mesh leads elsewhere", lies_about_names),
    ("process in a captured namespace: dialling ztunnel's listeners makes it dial nobody", own_listeners),
    ("pod, unprivileged: reaches metrics and readiness of a node's ztunnel, never its admin", admin),
];

#[test]
fn the_threat_model_holds_line_by_line() {
    support::run("threats", CASES);
}

/// A server on the node of the servers, with rights over its own network.
const THIEF: &str = r#"
apiVersion: v1
kind: ServiceAccount
metadata: {name: thief, namespace: shop}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: thief, namespace: shop}
spec:
  selector: {matchLabels: {app: thief}}
  template:
    metadata: {labels: {app: thief}}
    spec:
      serviceAccountName: thief
      nodeSelector: {kubernetes.io/hostname: node-b}
      terminationGracePeriodSeconds: 1
      containers:
        - name: nginx
          image: nginx
          securityContext: {capabilities: {add: [NET_ADMIN]}}
          volumeMounts: [{name: config, mountPath: /etc/nginx/nginx.conf, subPath: nginx.conf}]
      volumes: [{name: config, configMap: {name: server}}]
"#;

const BYPASS: &str = "0x539";
const APP_PORT: u16 = 8080;
const CONNECT: &str = include_str!("threats/connect.pl");
const LIAR: &str = include_str!("threats/liar.pl");
const THIEF_IDENTITY: &str = "spiffe://cluster.local/ns/shop/sa/thief";
const CLIENT_IDENTITY: &str = "spiffe://cluster.local/ns/shop/sa/client";

/// The thief, enrolled as itself.
fn thief(stage: &Stage) -> Result<Pod> {
    stage.teller.session.apply(THIEF)?;
    let pod = wait::until("the thief to run", SETTLE, || stage.teller.session.pod("shop/thief"))?;
    wait::until("the thief to be enrolled", SETTLE, || {
        ensure!(stage.teller.session.redirection(&pod)? == "enabled", "not yet");
        Ok(())
    })?;
    Ok(pod)
}

/// [`CONNECT`] in a pod, with a container's rights and `more`.
fn dial(stage: &Stage, pod: &str, more: &[&str], to: SocketAddr, mark: &str, from: &str) -> Result<Output> {
    let (ip, port) = (to.ip().to_string(), to.port().to_string());
    let argv = ["perl", "-e", CONNECT, &ip, &port, mark, from];
    Ok(stage.teller.session.exec_as(pod, more, &argv)?.output()?)
}

/// Lines of a node's ztunnel that name all these words.
fn lines(stage: &Stage, node: &str, words: &[&str]) -> Result<Vec<String>> {
    let log = stage.log(&stage.teller.session.proxy(node)?)?;
    let has_all = |line: &&str| words.iter().all(|word| line.contains(word));
    Ok(log.lines().filter(has_all).map(str::to_owned).collect())
}

/// Runs `attack` and then `undo`, whatever came of it.
fn undone(attack: impl FnOnce() -> Result<()>, undo: impl FnOnce() -> Result<()>) -> Result<()> {
    let (attacked, undone) = (attack(), undo());
    attacked.and(undone)
}

fn forged_mark(stage: &Stage) -> Result<()> {
    let session = &stage.teller.session;
    let (client, server) = (session.pod("client")?, session.pod("server-v1")?);
    for address in &server.addresses {
        let to = SocketAddr::new(*address, APP_PORT);
        let own = client.addresses.iter().find(|ip| ip.is_ipv4() == address.is_ipv4()).context("an address")?;
        let source = format!("src.addr={}", SocketAddr::new(*own, 0).to_string().trim_end_matches('0'));
        let inbound = || lines(stage, "node-b", &["direction=\"inbound\"", &source]);
        let forge = || dial(stage, "client", &[], to, BYPASS, "");
        // Nobody demands an identity: it gets in, as nobody. So the forgery works, and what follows shows something.
        let seen = inbound()?.len();
        let output = forge()?;
        ensure!(said(&output).contains("hello from server-v1"), "{to}: {}", said(&output));
        let record = wait::until("its record", SETTLE, || inbound()?.get(seen).cloned().context("no line yet"))?;
        ensure!(!record.contains("src.identity="), "plain text with an identity: {record}");
        for (manifest, what) in
            [("strict", "a STRICT peer"), ("allow-client", "a policy that lets the client's identity in")]
        {
            let file = format!("tests/demo/{manifest}.yaml");
            stage.kubectl(&["apply", "-f", &file])?;
            let refused = wait::until(&format!("{what} to refuse {to}"), SETTLE, || {
                let output = forge()?;
                ensure!(!said(&output).contains("hello"), "{}", said(&output));
                Ok(output)
            });
            let as_itself = stage.comes_to("client", &["http://server-v1/"], "200");
            stage.kubectl(&["delete", "-f", &file])?;
            as_itself.and(refused).with_context(|| what.to_owned())?;
        }
        stage.comes_to("stranger", &["http://server-v1.shop/"], "200")?;
    }
    Ok(())
}

fn mark_without_rights(stage: &Stage) -> Result<()> {
    let server = stage.teller.session.pod("server-v1")?;
    let to = SocketAddr::new(server.addresses[0], APP_PORT).to_string();
    let (ip, port) = to.rsplit_once(':').context("an address")?;
    let command = ["setpriv", "--bounding-set", "-net_raw", "--", "perl", "-e", CONNECT, ip, port, BYPASS, ""];
    let output = stage.teller.session.exec_as("client", &[], &command)?.output()?;
    ensure!(said(&output).contains("mark: Operation not permitted"), "{}", said(&output));
    Ok(())
}

fn claims_address(stage: &Stage) -> Result<()> {
    let session = &stage.teller.session;
    let (thief, victim) = (thief(stage)?, session.pod("server-v1")?);
    let mac =
        std::str::from_utf8(&session.exec("shop/thief", &["cat", "/sys/class/net/eth0/address"])?.output()?.stdout)?
            .trim()
            .to_owned();
    for address in &victim.addresses {
        let (family, length, nodad) = if address.is_ipv4() { ("-4", 32, "") } else { ("-6", 128, "nodad") };
        let claimed = format!("{address}/{length}");
        let configure = |verb: &str, how: &str| -> Result<()> {
            let script = format!("ip {family} addr {verb} {claimed} dev eth0 {how}");
            let output = session.exec_as("shop/thief", &["net_admin"], &["sh", "-ec", &script])?.output()?;
            ensure!(output.status.success(), "{script}: {}", said(&output));
            Ok(())
        };
        // As if the node had believed the thief's answer; which of two answers it hears first is chance.
        let neighbour = |arguments: &[&str]| -> Result<()> {
            let ip = address.to_string();
            let argv: Vec<&str> = ["ip", family, "neigh"].into_iter().chain(arguments.iter().copied()).collect();
            let argv: Vec<&str> = argv.into_iter().map(|word| if word == "IP" { &*ip } else { word }).collect();
            sys::check(&mut session.on_node("node-b", &argv)).map(drop)
        };
        let attack = || -> Result<()> {
            configure("add", nodad)?;
            neighbour(&["replace", "IP", "lladdr", &mac, "dev", "cbr0", "nud", "permanent"])?;
            let url = format!("http://{}/", SocketAddr::new(*address, APP_PORT));
            let hbone = format!("dst.addr={}", SocketAddr::new(*address, 15008));
            let told = || lines(stage, "node-a", &[&hbone, "not who was expected", THIEF_IDENTITY]);
            let before = told()?.len();
            for _ in 0..3 {
                let answer = stage.request("client", &[&url])?;
                ensure!(answer.status == "000" && answer.body.is_empty(), "{url}: {answer:?}");
            }
            let line = wait::until("the client's ztunnel to see through it", SETTLE, || {
                told()?.get(before).cloned().context("no line yet")
            })?;
            println!("  {address}: {line}");
            // What the thief sends in the victim's name is the thief's.
            let other = session.pod("server-v2")?;
            let to = other.addresses.iter().find(|ip| ip.is_ipv4() == address.is_ipv4()).context("an address")?;
            let seen = || lines(stage, "node-b", &["direction=\"inbound\"", &other.name, THIEF_IDENTITY]);
            let before = seen()?.len();
            let output = dial(stage, "shop/thief", &[], SocketAddr::new(*to, APP_PORT), "", &address.to_string())?;
            ensure!(said(&output).contains("hello from server-v2"), "{}", said(&output));
            let record = wait::until("its record", SETTLE, || seen()?.get(before).cloned().context("no line yet"))?;
            ensure!(!record.contains(&format!("src.addr={address}")), "under the victim's address: {record}");
            Ok(())
        };
        undone(attack, || {
            configure("del", "")?;
            neighbour(&["del", "IP", "dev", "cbr0"])?;
            stage.comes_to("client", &[&format!("http://{}/", SocketAddr::new(*address, APP_PORT))], "200")
        })?;
        ensure!(
            stage.teller.session.redirection(&thief)? == "enabled"
                && stage.teller.session.redirection(&victim)? == "enabled",
            "left the mesh"
        );
    }
    Ok(())
}

/// A process with a network namespace of its own in a cgroup that looks like another pod's, below one's own.
struct Decoy {
    child: Child,
    below: PathBuf,
}

impl Decoy {
    fn start(own: &Pod, victim: &Pod) -> Result<Self> {
        let below = own.main()?.cgroup.join("kubepods");
        let cgroup = below.join("burstable").join(format!("pod{}", victim.uid)).join("c");
        let addresses: String = victim.addresses.iter().map(|ip| format!("ip addr add {ip} dev lo; ")).collect();
        let script = format!("ip link set lo up; {addresses} exec sleep 600");
        let child = Launch::new(&["unshare", "--net", "sh", "-ec", &script], cgroup).command()?.spawn()?;
        Ok(Self { child, below })
    }

    fn has_started(&self) -> Result<()> {
        let own = std::fs::read_link("/proc/self/ns/net")?;
        let there = std::fs::read_link(format!("/proc/{}/ns/net", self.child.id()))?;
        ensure!(own != there, "still in our namespace");
        let program = std::fs::read_to_string(format!("/proc/{}/comm", self.child.id()))?;
        ensure!(program.trim() == "sleep", "it is {program}");
        Ok(())
    }
}

impl Drop for Decoy {
    fn drop(&mut self) {
        // An error means it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Err(e) = record::kill_cgroup(&self.below).and_then(|()| record::remove_cgroup(&self.below)) {
            eprintln!("{}: {e:#}", self.below.display());
        }
    }
}

fn foreign_cgroup(stage: &Stage) -> Result<()> {
    let session = &stage.teller.session;
    let (own, victim) = (thief(stage)?, session.pod("server-v1")?);
    let decoy = Decoy::start(&own, &victim)?;
    wait::until("the decoy", SETTLE, || decoy.has_started())?;
    // A ztunnel that looks for all its pods anew finds the decoy beside the victim.
    let before = session.proxy("node-b")?;
    stage.kubectl(&["-n", "istio-system", "delete", "pod", &before.name, "--wait=false"])?;
    let enrolled = wait::until("a new ztunnel to have enrolled the victim", SETTLE, || {
        let pods = session.pods().into_iter().filter(|pod| pod.node == "node-b" && pod.uid != before.uid);
        let new = pods.into_iter().find(|pod| pod.labels.get("app").is_some_and(|app| app == "ztunnel"));
        let log = stage.log(&new.context("no new ztunnel yet")?)?;
        let of_victim = |line: &&str| line.contains("nrolled") && line.contains(&victim.name);
        log.lines().find(of_victim).map(str::to_owned).context("not enrolled yet")
    })?;
    ensure!(!enrolled.contains("not enrolled"), "{enrolled}");
    let pid =
        enrolled.split("pid=").nth(1).and_then(|rest| rest.split_whitespace().next()).context("no PID is told")?;
    let netns = std::fs::metadata(format!("/proc/{pid}/ns/net"))?;
    let (netns, expected) = (std::os::unix::fs::MetadataExt::ino(&netns), std::fs::metadata(&victim.netns)?);
    ensure!(netns == std::os::unix::fs::MetadataExt::ino(&expected), "another namespace was taken: {enrolled}");
    wait::until("the old ztunnel to end", SETTLE * 3, || {
        ensure!(session.pods().iter().all(|pod| pod.uid != before.uid), "it still runs");
        Ok(())
    })?;
    ensure!(stage.teller.session.redirection(&victim)? == "enabled", "the victim has left the mesh");
    stage.comes_to("client", &["http://server-v1/"], "200")
}

fn borrowed_probe_source(stage: &Stage) -> Result<()> {
    let session = &stage.teller.session;
    thief(stage)?;
    let victim = session.pod("server-v1")?;
    stage.kubectl(&["apply", "-f", "tests/demo/strict.yaml"])?;
    stage.comes_to("stranger", &["http://server-v1.shop/"], "000")?;
    let attack = || -> Result<()> {
        for (source, family) in [("169.254.7.127", "-4"), ("fd16:9254:7127:1337:ffff:ffff:ffff:ffff", "-6")] {
            let address = victim.addresses.iter().find(|ip| ip.is_ipv4() == (family == "-4")).context("an address")?;
            let script = format!("ip {family} addr add {source} dev lo");
            let output = session.exec_as("shop/thief", &["net_admin"], &["sh", "-ec", &script])?.output()?;
            ensure!(output.status.success(), "{script}: {}", said(&output));
            // Past its own ztunnel, which would carry it as what it is. The answers go to the node, which knows of none.
            for port in [APP_PORT, 15008] {
                let to = SocketAddr::new(*address, port);
                let output = dial(stage, "shop/thief", &["net_admin"], to, BYPASS, source)?;
                ensure!(!said(&output).contains("connected"), "{source} reaches {to}: {}", said(&output));
            }
        }
        Ok(())
    };
    undone(attack, || {
        let script = "ip -4 addr del 169.254.7.127 dev lo || true; ip -6 addr del fd16:9254:7127:1337:ffff:ffff:ffff:ffff dev lo || true";
        session.exec_as("shop/thief", &["net_admin"], &["sh", "-c", script])?.output()?;
        stage.kubectl(&["delete", "-f", "tests/demo/strict.yaml"])?;
        stage.comes_to("stranger", &["http://server-v1.shop/"], "200")
    })
}

/// Within a second, as users are promised; a crowded machine may add to it before the test says that nothing was repaired.
fn flushes_rules(stage: &Stage) -> Result<()> {
    const COUNTER: &str = "ztunnel_capture_repairs_total{what=\"rule\"}";
    let session = &stage.teller.session;
    let thief = thief(stage)?;
    let run = |script: &str| -> Result<String> {
        let output = session.exec_as("shop/thief", &["net_admin"], &["sh", "-ec", script])?.output()?;
        ensure!(output.status.success(), "{script}: {}", said(&output));
        Ok(said(&output))
    };
    for family in ["-4", "-6"] {
        let before = counter(stage, &thief.node, COUNTER)?;
        run(&format!("ip {family} rule flush"))?;
        let flushed = Instant::now();
        wait::until("the rules to be back", Duration::from_secs(5), || {
            let rules = run(&format!("ip {family} rule"))?;
            ensure!(rules.matches("lookup 15000").count() == 2 && rules.contains("lookup main"), "{rules}");
            Ok(())
        })?;
        println!("  {family}: back after {} ms", flushed.elapsed().as_millis());
        wait::until("the repair to be counted", SETTLE, || {
            let now = counter(stage, &thief.node, COUNTER)?;
            ensure!(now > before, "{before}, then {now}");
            Ok(())
        })?;
    }
    // Captured and not just connected: STRICT lets in nothing else.
    stage.kubectl(&["apply", "-f", "tests/demo/strict.yaml"])?;
    let strict = stage.comes_to("stranger", &["http://server-v1.shop/"], "000");
    let captured = stage.comes_to("shop/thief", &["http://server-v1/"], "200");
    stage.kubectl(&["delete", "-f", "tests/demo/strict.yaml"])?;
    strict.and(captured)?;
    stage.comes_to("stranger", &["http://server-v1.shop/"], "200")
}

/// A DNS server that says of every name that it is at this address.
struct Liar(Child);

impl Liar {
    fn start(stage: &Stage, claimed: IpAddr, says: IpAddr) -> Result<Self> {
        let argv = ["perl", "-e", LIAR, &claimed.to_string(), &says.to_string()];
        let mut child = stage.teller.session.exec_as("shop/thief", &[], &argv)?.stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("it is piped")?).read_line(&mut line)?;
        let liar = Self(child);
        ensure!(line == "bound\n", "the liar does not start: {line:?}");
        Ok(liar)
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        // An error means it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The neighbour on the thief's own node is worse off than any: it takes the thief for its way out. It asks ztunnel all the
/// same, which knows the names of the mesh by itself.
fn lies_about_names(stage: &Stage) -> Result<()> {
    let session = &stage.teller.session;
    let (thief, neighbour) = (thief(stage)?, session.pod("server-v2")?);
    ensure!(thief.node == neighbour.node, "{} and {}", thief.node, neighbour.node);
    let server = IpAddr::from(PARENT_V4);
    let own = *thief.addresses.iter().find(|ip| ip.is_ipv4()).context("an address")?;
    let vip = stage.kubectl(&["-n", "shop", "get", "service", "server-v1", "-o", "jsonpath={.spec.clusterIP}"])?;
    let run = |mut command: Command| -> Result<String> {
        let output = command.output()?;
        ensure!(output.status.success(), "{}", said(&output));
        Ok(said(&output).trim().to_owned())
    };
    let thiefs = |script: &str| run(session.exec_as("shop/thief", &["net_admin"], &["sh", "-ec", script])?);
    let neighbours = |script: &str| run(session.exec("shop/server-v2", &["sh", "-ec", script])?);
    let mac = thiefs("cat /sys/class/net/eth0/address")?;
    let gateway = neighbours("ip -4 route show default")?;
    let gateway = gateway.split_whitespace().nth(2).context("no way out")?.to_owned();
    let resolved = |pod: &str, name: &str| -> Result<String> {
        let output = session.exec(pod, &["timeout", "8", "getent", "ahostsv4", name])?.output()?;
        let said = said(&output);
        Ok(said.split_whitespace().next().unwrap_or("nothing").to_owned())
    };
    let attack = || -> Result<()> {
        thiefs(&format!("ip addr add {server}/32 dev eth0"))?;
        let _liar = Liar::start(stage, server, own)?;
        // As if it had believed the thief's answer.
        neighbours(&format!("ip neigh replace {gateway} lladdr {mac} dev eth0 nud permanent"))?;
        // The lie is told and heard, where a name is nobody's in the mesh.
        for pod in ["shop/thief", "shop/server-v2"] {
            let got = resolved(pod, "outside.example")?;
            ensure!(got == own.to_string(), "{pod} was not lied to, but told {got}");
        }
        for name in ["server-v1", "server-v1.shop", "server-v1.shop.svc.cluster.local"] {
            for pod in ["shop/server-v2", "shop/client"] {
                let got = resolved(pod, name)?;
                ensure!(got == vip, "{pod} was told that {name} is {got}, not {vip}");
            }
        }
        // Nor does the lie stay with anybody: it was told a moment ago, on this node's ztunnel.
        let got = resolved("shop/client", "outside.example")?;
        ensure!(got == "nothing", "the client was told {got}");
        stage.traffic_flows()
    };
    undone(attack, || {
        thiefs(&format!("ip addr del {server}/32 dev eth0 || true"))?;
        neighbours(&format!("ip neigh del {gateway} dev eth0 || true"))?;
        let got = resolved("shop/server-v2", "outside.example")?;
        ensure!(got == "nothing", "the neighbour still hears {got}");
        stage.comes_to("shop/server-v2", &["http://server-v1/"], "200")
    })
}

/// What listens on loopback in the pod's namespace: the application has nothing there, so all of it is ztunnel's.
fn listeners(pod: &Pod) -> Result<BTreeSet<SocketAddr>> {
    sys::in_netns(&pod.netns, || {
        let mut found = BTreeSet::new();
        for (table, loopback) in [("tcp", "0100007F"), ("tcp6", "00000000000000000000000001000000")] {
            let text = std::fs::read_to_string(format!("/proc/thread-self/net/{table}"))?;
            for line in text.lines().skip(1) {
                let mut fields = line.split_whitespace().skip(1);
                let (local, state) = (fields.next().context("no address")?, fields.nth(1).context("no state")?);
                let (address, port) = local.split_once(':').context("no port")?;
                if state == "0A" && address == loopback {
                    let ip: IpAddr = if table == "tcp" { "127.0.0.1".parse()? } else { "::1".parse()? };
                    found.insert(SocketAddr::new(ip, u16::from_str_radix(port, 16)?));
                }
            }
        }
        Ok(found)
    })
}

/// A counter of a node's ztunnel, all its labels together.
fn counter(stage: &Stage, node: &str, name: &str) -> Result<f64> {
    let proxy = stage.teller.session.proxy(node)?;
    let argv = ["curl", "-sS", "-m", "3", "http://127.0.0.1:15020/metrics"];
    let text = said(&stage.teller.session.exec(&proxy.name, &argv)?.output()?);
    let values = text
        .lines()
        .filter(|line| line.starts_with(name))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
    Ok(values.sum())
}

fn own_listeners(stage: &Stage) -> Result<()> {
    const COUNTER: &str = "ztunnel_self_connections_total";
    let session = &stage.teller.session;
    let (client, server) = (session.pod("client")?, session.pod("server-v1")?);
    let listeners = listeners(&client)?;
    ensure!(listeners.len() >= 6, "three roles in two families: {listeners:?}");
    let before = counter(stage, "node-a", COUNTER)?;
    for listener in &listeners {
        let output = dial(stage, "client", &[], *listener, "", "")?;
        ensure!(output.stdout.is_empty(), "{listener} answered {}", said(&output));
        ensure!(!said(&output).contains("time is over"), "{listener} keeps the connection open: {}", said(&output));
    }
    let after = counter(stage, "node-a", COUNTER)?;
    #[allow(clippy::cast_precision_loss, reason = "a pod has a few dozen listeners")]
    let expected = listeners.len() as f64;
    ensure!((after - before - expected).abs() < 0.5, "{before} before, {after} after dialling {expected}");
    // The HBONE port: its own, by address and by loopback, and a neighbour's.
    for address in
        client.addresses.iter().copied().chain(["127.0.0.1".parse()?, "::1".parse()?]).chain(server.addresses.clone())
    {
        let to = SocketAddr::new(address, 15008);
        let output = dial(stage, "client", &[], to, "", "")?;
        ensure!(output.stdout.is_empty(), "{to} answered {}", said(&output));
        ensure!(!said(&output).contains("time is over"), "{to} keeps the connection open: {}", said(&output));
    }
    stage.traffic_flows()
}

fn admin(stage: &Stage) -> Result<()> {
    let session = &stage.teller.session;
    let proxy = session.proxy("node-a")?;
    let nodes = stage.kubectl(&["get", "node", "node-a", "-o", "jsonpath={.status.addresses[*].address}"])?;
    let node: Vec<IpAddr> = nodes.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    ensure!(node.len() == 2, "{nodes}");
    let own = ["127.0.0.1".parse()?, "::1".parse()?];
    for address in proxy.addresses.iter().copied().chain(node).chain(own) {
        for path in ["config_dump", "logging", "quitquitquit"] {
            let url = format!("http://{}/{path}", SocketAddr::new(address, 15000));
            let answer = stage.request("client", &["-X", "POST", &url])?;
            ensure!(answer.status == "000", "{url}: {answer:?}");
        }
    }
    for address in &proxy.addresses {
        for (port, path, status) in
            [(15020, "metrics", "200"), (15021, "healthz/ready", "200"), (15020, "config_dump", "404")]
        {
            let url = format!("http://{}/{path}", SocketAddr::new(*address, port));
            let answer = stage.request("client", &[&url])?;
            ensure!(answer.status == status, "{url}: {answer:?}");
            ensure!(!answer.body.contains("BEGIN"), "{url} shows a key or certificate");
        }
    }
    // It is there, for whoever is inside the pod: what was refused above was refused and not missing.
    let output =
        session.exec(&proxy.name, &["curl", "-sS", "-m", "3", "http://127.0.0.1:15000/config_dump"])?.output()?;
    let dump = said(&output);
    ensure!(dump.contains(CLIENT_IDENTITY) && !dump.contains("PRIVATE"), "the admin port inside the pod");
    Ok(())
}
