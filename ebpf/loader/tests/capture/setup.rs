//! What the operator is told when something capture stands on is missing.

use std::{fs, os::fd::AsFd, path::Path};

use aya::{
    maps::{HashMap, MapData},
    programs::links::{FdLink, PinnedLink},
};
use ebpf_loader::{Capture, LoadError, Slot};

use crate::support::*;

/// Of the kernel's `bpf.h`.
const NO_PREALLOC: u32 = 1;

#[test]
fn verifier_accepts_every_program() {
    isolated(|lab| {
        let capture = lab.open();
        capture.capture_dns().expect("sock_create");
        let cookie = capture.attach_netns(lab.pod.fd.as_fd()).expect("sk_lookup");
        assert_eq!(capture.attached().expect("a list"), [cookie]);
        let hooks = |directory: &str| {
            let entries = fs::read_dir(lab.layout().join(directory)).expect("the pins").flatten();
            let mut names: Vec<_> = entries.map(|entry| entry.file_name().into_string().expect("text")).collect();
            names.sort();
            names
        };
        assert_eq!(hooks("links"), ["connect4", "connect6", "sendmsg4", "sendmsg6", "sock_create"]);
        assert_eq!(
            hooks("maps"),
            ["ADDRESSES", "COUNTERS", "ENROLLED", "EXCLUDED", "EXCLUDED_PORTS", "FOUND", "HOST", "LISTENERS", "PROBES"]
        );
        assert_eq!(hooks("netns"), [cookie.to_string()]);
        drop(capture);
        // The second one finds all of it.
        lab.open();
        assert_eq!(hooks("links"), ["connect4", "connect6", "sendmsg4", "sendmsg6", "sock_create"]);
    });
}

#[test]
fn attaching_again_replaces_the_program_only_when_it_is_another() {
    isolated(|lab| {
        let program = |pin: &str| {
            let link = PinnedLink::from_pin(lab.layout().join(pin)).expect("a pinned link");
            FdLink::from(link).info().expect("a link").program_id()
        };
        let netns = lab.pod.fd.as_fd();
        let first = lab.open();
        let steer = format!("netns/{}", first.attach_netns(netns).expect("sk_lookup"));
        let (connect_before, steer_before) = (program("links/connect4"), program(&steer));
        drop(first);

        let second = lab.open();
        second.attach_netns(netns).expect("again");
        assert_ne!(program("links/connect4"), connect_before, "the hooks are always replaced");
        assert_eq!(program(&steer), steer_before, "the same program of the same build");
        drop(second);

        // The same instructions, but on maps that nobody fills any more.
        fs::remove_dir_all(lab.layout().join("maps")).expect("the maps are unpinned");
        let third = lab.open();
        let (_, proxy) = lab.enrol(&third, &lab.pod_capture());
        assert_ne!(program(&steer), steer_before);
        let _out = lab.pod.connect(at(SERVICE4, 80)).expect("a captured connection");
        proxy.accept(Slot::Out4);
    });
}

#[test]
fn hooks_of_a_cgroup_that_is_gone_are_attached_anew() {
    isolated(|lab| {
        let inner = lab.cgroup.join("inner");
        fs::create_dir(&inner).expect("a cgroup");
        drop(Capture::open(&lab.bpffs, &inner).expect("capture opens"));
        fs::remove_dir(&inner).expect("nobody is in it");
        let capture = lab.open();
        let (_, proxy) = lab.enrol(&capture, &lab.pod_capture());
        let _out = lab.pod.connect(at(SERVICE4, 80)).expect("a captured connection");
        proxy.accept(Slot::Out4);
    });
}

#[test]
fn wrong_directories_are_named_with_the_cure() {
    isolated(|lab| {
        let plain = tempfile::tempdir().expect("a directory");
        let error = Capture::open(&lab.bpffs, plain.path()).err().expect("no cgroup2");
        assert!(matches!(&error, LoadError::NotCgroup2 { path } if path == plain.path()), "{error}");
        assert!(error.to_string().contains("CGROUP_ROOT"), "{error}");
        let error = Capture::open(plain.path(), &lab.cgroup).err().expect("no bpffs");
        assert!(matches!(&error, LoadError::NotBpffs { path } if path == plain.path()), "{error}");
        assert!(error.to_string().contains("mount -t bpf"), "{error}");
        let missing = Path::new("/nowhere/at/all");
        assert!(matches!(Capture::open(&lab.bpffs, missing), Err(LoadError::NotCgroup2 { .. })));
    });
}

#[test]
fn missing_capabilities_are_named() {
    isolated(|lab| {
        let lab_paths = (lab.bpffs.clone(), lab.cgroup.clone());
        let error = std::thread::spawn(move || {
            drop_capabilities();
            Capture::open(&lab_paths.0, &lab_paths.1).err().expect("no rights")
        })
        .join()
        .expect("no panic");
        let LoadError::MissingCapabilities { missing } = &error else { panic!("{error}") };
        assert_eq!(missing, &["CAP_BPF", "CAP_NET_ADMIN"]);
        assert!(error.to_string().contains("securityContext.capabilities"), "{error}");
    });
}

/// Of this thread only.
fn drop_capabilities() {
    const VERSION_3: u32 = 0x2008_0522;
    let header = [VERSION_3, 0];
    let none = [0_u32; 6];
    // SAFETY: header and data are as long as version 3 says and live through the call.
    let result = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// A map of the right name and the wrong make, as a build that changed it without a new version would leave.
#[test]
fn pins_of_another_build_are_refused() {
    isolated(|lab| {
        lab.open().destroy().expect("a clean start");
        let maps = lab.layout().join("maps");
        fs::create_dir_all(&maps).expect("a directory");
        let (pin, netns) = (maps.join("ENROLLED"), ebpf_loader::abi::MAX_NETNS);
        let refuse = |why: &str| {
            let error = Capture::open(&lab.bpffs, &lab.cgroup).err().unwrap_or_else(|| panic!("{why} was taken"));
            assert!(matches!(&error, LoadError::IncompatiblePins { path } if path.ends_with("ENROLLED")), "{error}");
            fs::remove_file(&pin).expect("the pin can go");
        };
        HashMap::<MapData, u32, u64>::create(netns, NO_PREALLOC).expect("a map").pin(&pin).expect("a pin");
        refuse("other keys and values");
        HashMap::<MapData, u64, u32>::create(netns / 2, NO_PREALLOC).expect("a map").pin(&pin).expect("a pin");
        refuse("fewer entries");
        HashMap::<MapData, u64, u32>::create(netns, 0).expect("a map").pin(&pin).expect("a pin");
        refuse("other flags");
        // The real one: what the refusals are measured by.
        HashMap::<MapData, u64, u32>::create(netns, NO_PREALLOC).expect("a map").pin(&pin).expect("a pin");
        lab.open();
    });
}
