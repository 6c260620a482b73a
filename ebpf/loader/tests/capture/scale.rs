//! A full node: what enrolling and un-enrolling many pods costs and leaves.

use std::{fs, os::fd::AsFd, time::Instant};

use ebpf_loader::Phase;

use crate::support::*;

/// As many pods as a large node has.
const PODS: usize = 250;
/// Each; the maps' bookkeeping is a few hundred bytes.
const KIB_PER_POD: usize = 16;

#[test]
fn a_node_full_of_pods_costs_little_and_leaves_nothing() {
    isolated(|lab| {
        let capture = lab.open();
        let pods: Vec<_> = (0..PODS).map(|_| Netns::new().expect("a netns")).collect();
        let (memory, descriptors) = (resident_kib(), descriptors());
        let begun = Instant::now();
        let cookies: Vec<_> = pods
            .iter()
            .map(|pod| {
                let cookie = capture.attach_netns(pod.fd.as_fd()).expect("sk_lookup attaches");
                capture.enrol(cookie, &lab.pod_capture(), Phase::Captured).expect("the pod is enrolled");
                cookie
            })
            .collect();
        let took = begun.elapsed();
        let grown = resident_kib().saturating_sub(memory);
        println!("{PODS} pods: {took:?}, {grown} KiB more");
        assert_eq!(capture.attached().expect("a list").len(), PODS);
        assert!(grown < PODS * KIB_PER_POD, "{PODS} pods took {grown} KiB");
        assert_eq!(self::descriptors(), descriptors, "capture keeps no descriptor per pod");

        for cookie in cookies {
            capture.leave(cookie).expect("the pod leaves");
            capture.detach(cookie).expect("the pod is out");
        }
        assert_eq!(capture.attached().expect("a list"), []);
        let pins = fs::read_dir(lab.layout().join("netns")).expect("the pins").count();
        assert_eq!((pins, self::descriptors()), (0, descriptors));
    });
}

#[test]
fn opening_keeps_little_memory() {
    isolated(|lab| {
        let before = resident_kib();
        let _capture = lab.open();
        let grown = resident_kib().saturating_sub(before);
        assert!(grown < 4096, "capture holds {grown} KiB");
    });
}

fn resident_kib() -> usize {
    let status = fs::read_to_string("/proc/self/status").expect("the status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a size");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").expect("the descriptors").count()
}
