//! What a node's ztunnel hears on the node: CNI agent and plugin, its other generations, runtimes' files, the kernel.
#![no_main]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use libfuzzer_sys::{Corpus, fuzz_target};
use mesh::identity::Identity;
use mesh_fuzz::{begin, has_fraction, seed, take, texts};
use mesh_proto::zds::{
    AddWorkload, DelWorkload, KeepWorkload, SnapshotSent, WorkloadInfo, WorkloadRequest, workload_request::Payload,
};
use prost::Message;
use serde_json::{Value, json};
use ztunnel::cni::conflist::{self, Edit};
use ztunnel::handover::counters::Told;
use ztunnel::handover::wire::{FromDrainer, ToDrainer};
use ztunnel::revocation::Pieces;
use ztunnel::zds::session::{self, Consequence, LONGEST, Lost, Order, Packet, Session};
use ztunnel_cni::wire::{self, Answer, Request};

fuzz_target!(init: begin(seeds), |input: &[u8]| -> Corpus {
    let Some((letter, content)) = input.split_first() else { return Corpus::Reject };
    match (letter, std::str::from_utf8(content)) {
        (b'z', _) => agent(content),
        (b'e', Ok(text)) => assert!(session::ack(text).len() <= LONGEST),
        (b'c', _) => plugin_packet(content),
        (b'p', Ok(text)) => plugin_call(text),
        (b'l', Ok(text)) => configuration(text),
        (b'd', Ok(text)) => generations(text),
        (b'm', Ok(text)) => counters(text),
        (b'b', Ok(text)) => pieces(text),
        (b'g', Ok(text)) => cgroup(text),
        (b'k', _) => drop(ztunnel::fuzzing::marks(content)),
        (b'v', Ok(text)) => proxy_header(text),
        _ => return Corpus::Reject,
    }
    Corpus::Keep
});

/// Packets of one connection, each behind its length, its number of files and what was lost; against the plain rules.
fn agent(mut input: &[u8]) {
    let (mut session, mut named, mut live) = (Session::default(), BTreeSet::new(), false);
    while !input.is_empty() {
        let (files, lost, length) = (take(&mut input) % 3, take(&mut input), usize::from(take(&mut input)));
        let (bytes, rest) = input.split_at(length.min(input.len()));
        input = rest;
        let lost = match lost % 16 {
            1 => Some(Lost::Bytes),
            2 => Some(Lost::Files),
            _ => None,
        };
        let outcome = session.handle_packet(Packet { bytes, files: vec![(); files.into()], lost });
        match outcome {
            Ok(Order::Start(pod, ())) => {
                assert!(files == 1 && lost.is_none());
                assert!(
                    ![&pod.uid, &pod.name, &pod.namespace, &pod.service_account].iter().any(|text| text.is_empty())
                );
                named.insert(pod.uid);
            }
            Ok(Order::Keep(uid)) => {
                assert!(!live && files == 0);
                named.insert(uid);
            }
            Ok(Order::Stop(uid)) => drop(named.remove(&uid)),
            Ok(Order::Reconcile(all)) => {
                assert!(!std::mem::replace(&mut live, true));
                assert_eq!(all, named, "what was told is what is kept");
            }
            Err(violation) => {
                assert!(live || violation.consequence() == Consequence::Reconnect);
                return;
            }
        }
        assert_eq!(session.is_synced(), live);
    }
}

fn plugin_packet(bytes: &[u8]) {
    if let Ok(request) = wire::decode::<Request>(bytes)
        && let Ok(encoded) = wire::encode(&request)
    {
        assert_eq!(wire::decode::<Request>(&encoded).expect("what we write"), request);
    }
    if let Ok(answer) = wire::decode::<Answer>(bytes)
        && let Ok(encoded) = wire::encode(&answer)
    {
        assert_eq!(wire::decode::<Answer>(&encoded).expect("what we write"), answer);
    }
}

/// `CNI_ARGS` in the first line, the configuration after it.
fn plugin_call(text: &str) {
    let (arguments, input) = text.split_once('\n').unwrap_or((text, ""));
    let variable = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let environment = BTreeMap::from([variable("CNI_ARGS", arguments), variable("CNI_COMMAND", "VERSION")]);
    assert!(ztunnel_cni::plugin::call(&environment, input.as_bytes()).succeeded);
    if let Some((Some(pod), _)) = ztunnel_cni::plugin::understood(&environment, input.as_bytes()) {
        assert!(![&pod.uid, &pod.namespace, &pod.name].iter().any(|text| text.is_empty() || text.contains(';')));
    }
}

/// What goes into another's configuration comes out without a trace, and goes in once.
fn configuration(text: &str) {
    let entry = json!({"type": ztunnel_cni::plugin::NAME, "socket": "/s"});
    let Ok(before) = serde_json::from_str::<Value>(text) else { return };
    if has_fraction(&before) || before["type"] == ztunnel_cni::plugin::NAME {
        return;
    }
    match conflist::add(text, &entry, true) {
        Ok(Edit::Rewrite(with)) => {
            assert!(matches!(conflist::add(&with, &entry, true), Ok(Edit::Nothing)), "{with}");
            let without = conflist::remove(&with).expect("it is there");
            let ours = |text: &str| conflist::remove(text).and_then(|text| serde_json::from_str(&text).ok());
            assert_eq!(serde_json::from_str::<Value>(&without).ok(), ours(text).or(Some(before)));
        }
        Ok(Edit::Replace { list }) => {
            assert!(conflist::is_made_of(&list, text), "{list}");
            assert!(matches!(conflist::add(&list, &entry, true), Ok(Edit::Nothing)), "{list}");
        }
        Ok(Edit::Nothing) | Err(_) => {}
    }
}

fn generations(line: &str) {
    if let Ok(word) = serde_json::from_str::<FromDrainer>(line) {
        let again = serde_json::to_string(&word).expect("JSON");
        assert_eq!(serde_json::from_str::<FromDrainer>(&again).ok(), Some(word));
    }
    if let Ok(word) = serde_json::from_str::<ToDrainer>(line) {
        let again = serde_json::to_string(&word).expect("JSON");
        assert_eq!(serde_json::from_str::<ToDrainer>(&again).ok(), Some(word));
    }
}

/// What was told is told once, if the registry has each series once, as ours does.
fn counters(registry: &str) {
    let mut series = BTreeSet::new();
    if !registry.lines().filter_map(|line| line.rsplit_once(' ')).all(|(name, _)| series.insert(name)) {
        return;
    }
    let mut told = Told::default();
    let grown = told.growth(registry);
    told.note(grown);
    let _ = ztunnel::handover::counters::bytes(registry);
    assert!(Told::all(registry).growth(registry).is_empty());
}

fn pieces(text: &str) {
    let mut pieces = Pieces::default();
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        let _ = pieces.take(line, lines.peek().is_none());
    }
}

/// Our own path in the first line, then what a pod may call its own cgroups: it stays who it is.
fn cgroup(text: &str) {
    let (own, below) = text.split_once('\n').unwrap_or((text, ""));
    let _ = ztunnel::fuzzing::prefix(below, Path::new("/sys/fs/cgroup"));
    let _ = ztunnel::fuzzing::pod(below, own, below);
    let below = below.replace('\n', "");
    const UID: &str = "d1a56d9d-8f52-4b9c-a3c5-5ae5fd3a8a7b";
    for pod in [
        format!("/kubepods/burstable/pod{UID}"),
        format!("/kubepods.slice/kubepods-pod{}.slice", UID.replace('-', "_")),
        format!("/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{}.slice", UID.replace('-', "_")),
    ] {
        assert_eq!(ztunnel::fuzzing::pod(&format!("0::{pod}/{below}\n"), "", "").as_deref(), Some(UID), "{pod}");
        // Two hierarchies: one cannot speak against the other.
        let both = format!("4:cpu,cpuacct:{pod}/{below}\n0::{pod}\n");
        assert_eq!(ztunnel::fuzzing::pod(&both, "", "").as_deref(), Some(UID), "{pod}");
    }
}

/// `source destination identity`; a reader of the PROXY protocol finds them again.
fn proxy_header(text: &str) {
    let mut words = text.split_whitespace();
    let addresses = (words.next().map(str::parse::<SocketAddr>), words.next().map(str::parse::<SocketAddr>));
    let (Some(Ok(source)), Some(Ok(destination))) = addresses else { return };
    let Some(Ok(identity)) = words.next().map(str::parse::<Identity>) else { return };
    let header = ztunnel::fuzzing::proxy_header(source, destination, &identity);
    let (start, rest) = header.split_at(16);
    assert_eq!(usize::from(u16::from_be_bytes([start[14], start[15]])), rest.len());
    let ip = |bytes: &[u8]| match <[u8; 4]>::try_from(bytes) {
        Ok(v4) => IpAddr::from(v4),
        Err(_) => IpAddr::from(<[u8; 16]>::try_from(bytes).expect("an address")).to_canonical(),
    };
    let width = if start[13] == 0x11 { 4 } else { 16 };
    assert_eq!(ip(&rest[..width]), source.ip().to_canonical());
    assert_eq!(ip(&rest[width..2 * width]), destination.ip().to_canonical());
    let rest = &rest[2 * width..];
    assert_eq!(rest[..4], [source.port().to_be_bytes(), destination.port().to_be_bytes()].concat());
    let name = identity.to_string();
    assert!(rest.len() == 4 || rest[7..] == *name.as_bytes());
}

fn seeds() -> Vec<Vec<u8>> {
    let zds = |requests: Vec<(u8, Payload)>| {
        let packets = requests.into_iter().map(|(files, payload)| {
            let bytes = WorkloadRequest { payload: Some(payload) }.encode_to_vec();
            [&[files, 0, u8::try_from(bytes.len()).expect("it is short")], &bytes[..]].concat()
        });
        seed(b'z', packets.collect::<Vec<_>>().concat())
    };
    let info = WorkloadInfo { name: "p".into(), namespace: "ns".into(), service_account: "sa".into() };
    let add = |uid: &str| Payload::Add(AddWorkload { uid: uid.into(), workload_info: Some(info.clone()) });
    let keep = |uid: &str| Payload::Keep(KeepWorkload { uid: uid.into() });
    let del = |uid: &str| Payload::Del(DelWorkload { uid: uid.into() });
    let sent = || Payload::SnapshotSent(SnapshotSent {});
    let mut seeds = vec![
        zds(vec![(1, add("a")), (0, keep("b")), (0, del("a")), (0, sent()), (1, add("c")), (0, del("b"))]),
        zds(vec![(0, sent()), (0, sent())]),
        zds(vec![(0, sent()), (0, keep("a"))]),
        seed(b'k', [&[84, 0, 0, 0, 20, 0][..], &[0; 82], &[8, 0, 15, 0, 0x3a, 5, 0, 0]].concat()),
    ];
    for (letter, contents) in [
        (b'e', &["what went wrong", "ä"] as &[&str]),
        (
            b'c',
            &[
                r#"{"version":1,"verb":"add","attachment":{"container":"c","interface":"eth0"},"pod":{"uid":"u","namespace":"n","name":"p"},"addresses":["10.0.0.1"]}"#,
                r#"{"version":1,"verb":"gc","valid":[{"container":"c","interface":"eth0"}]}"#,
                r#"{"version":1,"answer":"later","reason":"x"}"#,
            ],
        ),
        (
            b'p',
            &[
                "K8S_POD_NAMESPACE=n;K8S_POD_NAME=p;K8S_POD_UID=u\n{\"cniVersion\":\"1.0.0\",\"prevResult\":{\"interfaces\":[{\"name\":\"eth0\",\"sandbox\":\"/n\"}],\"ips\":[{\"address\":\"10.0.0.1/24\",\"interface\":0}]}}",
            ],
        ),
        (
            b'l',
            &[
                r#"{"cniVersion":"0.4.0","name":"lab","type":"bridge"}"#,
                r#"{"name":"k","cniVersion":"0.3.1","plugins":[{"type":"calico"},{"type":"ztunnel-cni"}]}"#,
            ],
        ),
        (
            b'd',
            &[
                r#"{"type":"hello","generation":"g","version":"v","since":1,"deadline":2}"#,
                r#"{"type":"connections","pod":"p","workload":"w","inbound":[{"id":1,"identity":null,"source":"10.0.0.1","destination":"10.0.0.2:80"}]}"#,
                r#"{"type":"state","connections":3,"counters":[{"name":"n","labels":[["a","b"]],"by":1}],"log":["x"]}"#,
                r#"{"type":"cut","pod":"p","ids":[1]}"#,
                r#"{"type":"revocations","piece":"AA==","last":true}"#,
            ],
        ),
        (b'm', &["istio_tcp_sent_bytes_total{a=\"x y\",b=\"q\\\"\\\\\\n,{}\"} 5\nistio_tcp_received_bytes_total 3\n"]),
        (b'b', &["AAEC\nAwQ=", "A"]),
        (
            b'g',
            &[
                "0::/kubelet/kubepods/burstable/podx/c\n30 29 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw",
                "\n../kubepods/besteffort/pod0/c",
                "\n:0::/kubepods/podother",
            ],
        ),
        (b'v', &["10.0.0.1:1 10.96.0.9:80 spiffe://td/ns/ns/sa/a", "10.0.0.1:1 [fd00::2]:2 spiffe://td/ns/ns/sa/a"]),
    ] {
        seeds.extend(texts(letter, contents));
    }
    seeds
}
