//! The kubelet's probes of pods in the mesh: they come through whatever policy says, and nothing else comes with them.

#![forbid(unsafe_code)]

mod support;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use mesh_tests::cluster::probe::Kubelet;
use mesh_tests::cluster::state::Pod;
use mesh_tests::demo::teller::SETTLE;
use mesh_tests::topology::{PARENT_V4, PARENT_V6};
use mesh_tests::wait;

use support::{Case, Stage, said};

const CASES: &[Case] = &[
    ("a pod becomes ready under STRICT and a policy that lets nobody in", becomes_ready),
    ("the kubelet reaches the probed port and no other", probed_port_only),
    ("so it does the ports of every kind of probe and of lifecycle hooks, in both families", every_kind),
    ("what a node forwards under its own address is no probe", node_port),
    ("what a node forwards by a host port is no probe", host_port),
    ("the node's address alone is no probe", node_address),
    ("a node that loses the probes' address gets it back, and meanwhile policy decides", address_lost),
    ("the probes' address goes with the last pod", address_goes),
];

#[test]
fn kubelet_probes_come_through_and_nothing_else() {
    support::run("probes", CASES);
}

/// Ports that are probed, one in each way, and one that is not; nobody may come in by policy. It tells who asked.
const OBJECTS: &str = r#"
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: shop}
spec: {mtls: {mode: STRICT}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: probed-nobody, namespace: shop}
spec:
  selector: {matchLabels: {app: probed}}
  action: ALLOW
  rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/nobody]}}]}]
---
apiVersion: v1
kind: ConfigMap
metadata: {name: probed, namespace: shop}
data:
  nginx.conf: |
    worker_processes 1;
    error_log /dev/stderr;
    events {}
    http {
      log_format asked "$remote_addr asked $server_port as $http_user_agent";
      access_log /dev/stdout asked;
      server {
        listen 8080;
        listen [::]:8080;
        listen 8081;
        listen [::]:8081;
        listen 8082;
        listen [::]:8082;
        listen 8083;
        listen [::]:8083;
        listen 8084;
        listen [::]:8084;
        location / { return 200 "in\n"; }
      }
    }
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: probed, namespace: shop}
spec:
  selector: {matchLabels: {app: probed}}
  template:
    metadata: {labels: {app: probed}}
    spec:
      nodeSelector: {kubernetes.io/hostname: node-a}
      terminationGracePeriodSeconds: 1
      containers:
        - name: nginx
          image: nginx
          ports: [{name: http, containerPort: 8080}, {name: other, containerPort: 8081}]
          readinessProbe: {httpGet: {path: /, port: http}, periodSeconds: 1}
          startupProbe: {tcpSocket: {port: 8083}}
          livenessProbe: {grpc: {port: 8084}}
          lifecycle: {postStart: {exec: {command: ["true"]}}, preStop: {httpGet: {path: /, port: 8082}}}
          volumeMounts: [{name: config, mountPath: /etc/nginx/nginx.conf, subPath: nginx.conf}]
      volumes: [{name: config, configMap: {name: probed}}]
"#;

const PROBED: u16 = 8080;
const OTHER: u16 = 8081;
/// A lifecycle hook's, a startup probe's by TCP, a liveness probe's by gRPC.
const ALSO_PROBED: [u16; 3] = [8082, 8083, 8084];
const HOST_PORT: u16 = 18080;
/// Probes of a pod that is captured, one a second: more than it takes to be called unready.
const PROBES: usize = 5;

fn becomes_ready(stage: &Stage) -> Result<()> {
    let output = feed(&mut stage.teller.session.kubectl(&["apply", "-f", "-"])?, OBJECTS)?;
    ensure!(output.status.success(), "{}", said(&output));
    let pod = wait::until("the probed pod to run", SETTLE, || stage.teller.session.pod("probed"))?;
    // From then on its other port is closed to everybody, so its capture is complete.
    wait::until("the probed pod to be captured", SETTLE, || {
        ensure!(redirection(stage, &pod)? == "enabled", "not enrolled");
        ensure!(ask(stage, &pod, &pod.addresses[0].to_string(), OTHER, &[]).is_err(), "it lets the node in");
        Ok(())
    })?;
    let seen = probes(stage, &pod)?;
    wait::until("probes of the captured pod", SETTLE, || {
        let more = probes(stage, &pod)?;
        ensure!(more >= seen + PROBES, "{more} probes, {seen} of them before it was captured");
        Ok(())
    })?;
    let ready = stage.kubectl(&[
        "-n",
        "shop",
        "get",
        "pod",
        &pod.name,
        "-o",
        "jsonpath={.status.conditions[?(@.type==\"Ready\")].status} {.status.containerStatuses[0].restartCount}",
    ])?;
    ensure!(ready.trim() == "True 0", "ready and restarts: {ready}");
    Ok(())
}

fn probed_port_only(stage: &Stage) -> Result<()> {
    let pod = stage.teller.session.pod("probed")?;
    ensure!(pod.addresses.len() == 2, "both families: {:?}", pod.addresses);
    for address in &pod.addresses {
        let host = if address.is_ipv6() { format!("[{address}]") } else { address.to_string() };
        let body = ask(stage, &pod, &host, PROBED, &[])?;
        ensure!(body == "in\n", "{host}: {body}");
        for port in [OTHER, 15008] {
            ensure!(ask(stage, &pod, &host, port, &[]).is_err(), "{host}:{port} lets the node in");
        }
    }
    let log = stage.log(&pod)?;
    for source in ["169.254.7.127", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"] {
        ensure!(log.contains(&format!("{source} asked {PROBED}")), "no probe from {source}:\n{log}");
    }
    // A pod beside it has no more rights at the probed port than anywhere else.
    let url = format!("http://{}:{PROBED}/", pod.addresses[0]);
    let answer = stage.request("other", &[&url])?;
    ensure!(answer.status == "000", "a neighbour came in: {answer:?}");
    Ok(())
}

fn every_kind(stage: &Stage) -> Result<()> {
    let pod = stage.teller.session.pod("probed")?;
    for address in &pod.addresses {
        let host = host(*address);
        for port in ALSO_PROBED {
            ensure!(ask(stage, &pod, &host, port, &[])? == "in\n", "{host}:{port}");
        }
        let refused = stage.request("client", &[&format!("http://{host}:{}/", ALSO_PROBED[0])])?;
        ensure!(refused.status == "000", "a pod came in at a hook's port: {refused:?}");
    }
    Ok(())
}

fn host(address: IpAddr) -> String {
    if address.is_ipv6() { format!("[{address}]") } else { address.to_string() }
}

/// A node's own address of the same family as another.
fn node_address_like(stage: &Stage, pod: &Pod, like: IpAddr) -> Result<IpAddr> {
    let nodes = stage.kubectl(&["get", "node", &pod.node, "-o", "jsonpath={.status.addresses[*].address}"])?;
    let mut addresses = nodes.split_whitespace().filter_map(|word| word.parse::<IpAddr>().ok());
    addresses.find(|node| node.is_ipv4() == like.is_ipv4()).context("an address of the node")
}

/// A port of the node that leads to the pod's probed one, for those outside and for the node itself.
fn host_port(stage: &Stage) -> Result<()> {
    let pod = stage.teller.session.pod("probed")?;
    let nft = |script: String| -> Result<()> {
        let output = feed(&mut kubelet(stage, &pod, &["nft", "-f", "-"]), &script)?;
        ensure!(output.status.success(), "{script}: {}", said(&output));
        Ok(())
    };
    for address in &pod.addresses {
        let family = if address.is_ipv4() { "ip" } else { "ip6" };
        let node = node_address_like(stage, &pod, *address)?;
        let to = SocketAddr::new(*address, PROBED);
        let rule = format!("{family} daddr {node} tcp dport {HOST_PORT} dnat to {to}");
        nft(format!(
            "table {family} host-port {{\nchain pre {{\ntype nat hook prerouting priority -100\n{rule}\n}}\n\
             chain out {{\ntype nat hook output priority -100\n{rule}\n}}\n}}\n"
        ))?;
        let url = format!("http://{}:{HOST_PORT}/", host(node));
        let outside = stage.teller.session.wire().path();
        let from_outside = Command::new("nsenter")
            .arg(format!("--net={}", outside.display()))
            .args(["curl", "-s", "-S", "-m", "3", "--noproxy", "*", &url])
            .output()?;
        let from_node = ask(stage, &pod, &host(node), HOST_PORT, &[]);
        // The rule leads there: ztunnel has refused it, which it tells.
        let judged = wait::until("ztunnel to have judged it", SETTLE, || {
            let log = stage.log(&stage.teller.session.proxy(&pod.node)?)?;
            let count = log.lines().filter(|line| line.contains(&format!("dst.addr={to}"))).count();
            ensure!(count >= 2, "{count} connections to {to}");
            Ok(())
        });
        nft(format!("delete table {family} host-port\n"))?;
        ensure!(!from_outside.status.success(), "{url} is open to the outside: {}", said(&from_outside));
        ensure!(from_node.is_err(), "{url} is open to the node");
        judged?;
    }
    Ok(())
}

fn address_lost(stage: &Stage) -> Result<()> {
    let pod = stage.teller.session.pod("probed")?;
    let v4 = host(pod.addresses[0]);
    for source in ["169.254.7.127/32", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff/128"] {
        let output = kubelet(stage, &pod, &["ip", "addr", "del", source, "dev", "lo"]).output()?;
        ensure!(output.status.success(), "{}", said(&output));
    }
    // Refused or repaired by now; never let in under another address.
    let meanwhile = ask(stage, &pod, &v4, PROBED, &[]);
    for address in pod.addresses.clone() {
        wait::until("probes to come through again", SETTLE, || ask(stage, &pod, &host(address), PROBED, &[]))?;
    }
    println!("  meanwhile: {meanwhile:?}");
    let log = stage.log(&pod)?;
    let node = node_address_like(stage, &pod, pod.addresses[0])?;
    ensure!(!log.contains(&format!("{node} asked")), "let in under the node's address:\n{log}");
    let ready = || stage.kubectl(&["-n", "shop", "wait", "--for=condition=Ready", "pod", &pod.name, "--timeout=15s"]);
    ready().map(drop)
}

/// A NodePort: what comes from outside and is forwarded with the node's own address as its source.
fn node_port(stage: &Stage) -> Result<()> {
    let pod = stage.teller.session.pod("probed")?;
    let outside = stage.teller.session.wire().path();
    let nft = |script: String| -> Result<()> {
        let output = feed(&mut kubelet(stage, &pod, &["nft", "-f", "-"]), &script)?;
        ensure!(output.status.success(), "{script}: {}", said(&output));
        Ok(())
    };
    for (family, client) in [("ip", PARENT_V4.to_string()), ("ip6", PARENT_V6.to_string())] {
        nft(format!(
            "table {family} node-port {{\nchain out {{\ntype nat hook postrouting priority 100\n\
             {family} saddr {client} masquerade\n}}\n}}\n"
        ))?;
    }
    for address in &pod.addresses {
        let host = if address.is_ipv6() { format!("[{address}]") } else { address.to_string() };
        let url = format!("http://{host}:{PROBED}/");
        let judged = || -> Result<usize> {
            let session = &stage.teller.session;
            let is_proxy = |p: &Pod| p.node == pod.node && p.labels.get("app").is_some_and(|app| app == "ztunnel");
            let proxy = session.pods().into_iter().find(is_proxy).context("no ztunnel beside the pod")?;
            let destination = format!("dst.addr={}", SocketAddr::new(*address, PROBED));
            Ok(stage.log(&proxy)?.lines().filter(|line| line.contains(&destination)).count())
        };
        let before = judged()?;
        let output = Command::new("nsenter")
            .arg(format!("--net={}", outside.display()))
            .args(["curl", "-s", "-S", "-m", "3", "--noproxy", "*", &url])
            .output()?;
        ensure!(!output.status.success(), "{url} is open to the outside: {}", said(&output));
        // Refused by ztunnel and not lost on the way, or this would show nothing.
        wait::until("ztunnel to have judged it", SETTLE, || {
            ensure!(judged()? > before, "{url} from outside: {}", said(&output));
            Ok(())
        })?;
    }
    nft("delete table ip node-port\ndelete table ip6 node-port\n".to_owned())
}

/// A process of the node that speaks under the node's own address.
fn node_address(stage: &Stage) -> Result<()> {
    let pod = stage.teller.session.pod("probed")?;
    let nodes = stage.kubectl(&["get", "node", &pod.node, "-o", "jsonpath={.status.addresses[*].address}"])?;
    for address in &pod.addresses {
        let same = |node: &&str| node.contains(':') == address.is_ipv6() && node.contains(['.', ':']);
        let node = nodes.split_whitespace().find(same).context("an address of the node")?;
        let host = if address.is_ipv6() { format!("[{address}]") } else { address.to_string() };
        let came_in = ask(stage, &pod, &host, PROBED, &["--interface", node]).is_ok();
        ensure!(!came_in, "{node} came in at {host}:{PROBED}:\n{}", stage.log(&pod)?);
    }
    Ok(())
}

fn address_goes(stage: &Stage) -> Result<()> {
    let pod = stage.teller.session.pod("probed")?;
    let addresses = || {
        let shown = kubelet(stage, &pod, &["ip", "-o", "addr", "show", "dev", "lo"]).output()?;
        anyhow::Ok(said(&shown))
    };
    let before = addresses()?;
    ensure!(before.contains("169.254.7.127/32") && before.contains("fd16:9254:7127:1337"), "{before}");
    stage.kubectl(&["label", "namespace", "shop", "istio.io/dataplane-mode-"])?;
    wait::until("the address to go", SETTLE, || {
        let now = addresses()?;
        ensure!(!now.contains("169.254.7.127") && !now.contains("fd16:9254:7127:1337"), "{now}");
        Ok(())
    })
}

/// A request as the kubelet of the pod's node makes it; an error is a connection that did not come about.
fn ask(stage: &Stage, pod: &Pod, host: &str, port: u16, options: &[&str]) -> Result<String> {
    let url = format!("http://{host}:{port}/");
    let mut argv = vec!["curl", "-s", "-S", "-m", "3", "--noproxy", "*"];
    argv.extend(options);
    argv.push(&url);
    let output = kubelet(stage, pod, &argv).output()?;
    ensure!(output.status.success(), "{url}: {}", said(&output));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn kubelet(stage: &Stage, pod: &Pod, argv: &[&str]) -> Command {
    let record = &stage.teller.session.record;
    let netns = PathBuf::from("/run/netns").join(format!("{}{}", record.netns_prefix, pod.node));
    Kubelet { netns: &netns, cgroup: &record.cgroup.join(&pod.node) }.command(argv)
}

fn probes(stage: &Stage, pod: &Pod) -> Result<usize> {
    Ok(stage.log(pod)?.lines().filter(|line| line.contains("kube-probe/")).count())
}

fn redirection(stage: &Stage, pod: &Pod) -> Result<String> {
    let path = "jsonpath={.metadata.annotations.ambient\\.istio\\.io/redirection}";
    stage.kubectl(&["-n", "shop", "get", "pod", &pod.name, "-o", path])
}

/// Runs a command with this on its standard input.
fn feed(command: &mut Command, input: &str) -> Result<std::process::Output> {
    use std::io::Write as _;
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    child.stdin.take().context("standard input was piped")?.write_all(input.as_bytes())?;
    Ok(child.wait_with_output()?)
}
