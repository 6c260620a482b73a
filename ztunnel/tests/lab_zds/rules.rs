//! The redirection that Istio's CNI agent sets up in a pod and on its node, made by hand from its description.

use std::path::Path;

use crate::lab::run;

const PROBE_V4: &str = "169.254.7.127";
const PROBE_V6: &str = "fd16:9254:7127:1337:ffff:ffff:ffff:ffff";

/// Rules and routes of a pod. Rule 1 is [`reroute`].
pub fn install(pod: &Path) {
    let restore = |command: &str, loopback: &str, probe: &str| {
        format!(
            "{command}-restore <<'END'
*raw
:ISTIO_PRERT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_OUTPUT -p udp -m mark --mark 0x539/0xfff -m udp --dport 53 -j CT --zone 1
-A ISTIO_PRERT -p udp -m mark ! --mark 0x539/0xfff -m udp --sport 53 -j CT --zone 1
COMMIT
*mangle
:ISTIO_PRERT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_PRERT -m mark --mark 0x539/0xfff -j CONNMARK --set-xmark 0x111/0xfff
-A ISTIO_OUTPUT -m connmark --mark 0x111/0xfff -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff
COMMIT
*nat
:ISTIO_PRERT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_PRERT -s {probe} -p tcp -m tcp -j ACCEPT
-A ISTIO_PRERT ! -d {loopback} -p tcp -m tcp ! --dport 15008 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15006
-A ISTIO_OUTPUT -d {probe} -p tcp -m tcp -j ACCEPT
-A ISTIO_OUTPUT ! -o lo -p udp -m mark ! --mark 0x539/0xfff -m udp --dport 53 -j REDIRECT --to-ports 15053
-A ISTIO_OUTPUT ! -d {loopback} -p tcp -m tcp --dport 53 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15053
-A ISTIO_OUTPUT -p tcp -m mark --mark 0x111/0xfff -j ACCEPT
-A ISTIO_OUTPUT ! -d {loopback} -o lo -j ACCEPT
-A ISTIO_OUTPUT ! -d {loopback} -p tcp -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001
COMMIT
END"
        )
    };
    let script = format!(
        "{}\n{}\n
         ip rule add fwmark 0x111/0xfff pref 32764 lookup 100
         ip route add local 0.0.0.0/0 dev lo table 100
         ip -6 rule add fwmark 0x111/0xfff pref 32764 lookup 100
         ip -6 route add local ::/0 dev lo table 100",
        restore("iptables", "127.0.0.1/32", &format!("{PROBE_V4}/32")),
        restore("ip6tables", "::1/128", &format!("{PROBE_V6}/128")),
    );
    within(pod, &script);
}

/// Rule 1, for a pod that asks for it: what a machine behind one of the pod's interfaces sends leaves as the pod's.
pub fn reroute(pod: &Path, interface: &str) {
    let rules = |command: &str| {
        format!(
            "{command} -t nat -I ISTIO_PRERT 1 -i {interface} -p tcp -j REDIRECT --to-ports 15001
             {command} -t nat -I ISTIO_PRERT 2 -i {interface} -p tcp -j RETURN"
        )
    };
    within(pod, &format!("{}\n{}", rules("iptables"), rules("ip6tables")));
}

/// Takes them back, as the agent does for a pod that leaves the mesh.
pub fn remove(pod: &Path) {
    within(
        pod,
        "for t in raw mangle nat; do iptables -t $t -F; iptables -t $t -X; ip6tables -t $t -F; ip6tables -t $t -X; done
         ip rule del pref 32764; ip route flush table 100; ip -6 rule del pref 32764; ip -6 route flush table 100",
    );
}

/// Probes of the node's own processes to pods of the sets get the probe address.
pub fn install_on_node(node: &Path) {
    let family = |command: &str, family: &str, set: &str, probe: &str| {
        format!(
            "ipset create {set} hash:ip family {family}
             {command} -t nat -N ISTIO_POSTRT
             {command} -t nat -A POSTROUTING -j ISTIO_POSTRT
             {command} -t nat -A ISTIO_POSTRT -m owner --socket-exists -p tcp -m set --match-set {set} dst -j SNAT --to-source {probe}\n"
        )
    };
    let v4 = family("iptables", "inet", "istio-inpod-probes-v4", PROBE_V4);
    let v6 = family("ip6tables", "inet6", "istio-inpod-probes-v6", PROBE_V6);
    within(node, &(v4 + &v6));
}

/// The pod's addresses join the sets once it is served.
pub fn probed(node: &Path, [v4, v6]: &[String; 2]) {
    within(node, &format!("ipset add istio-inpod-probes-v4 {v4}; ipset add istio-inpod-probes-v6 {v6}"));
}

fn within(netns: &Path, script: &str) {
    run(&format!("nsenter --net={} bash -e <<'SCRIPT'\n{script}\nSCRIPT", netns.display()));
}
