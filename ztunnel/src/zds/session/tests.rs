use mesh_proto::zds::{AddWorkload, DelWorkload, KeepWorkload, SnapshotSent, WorkloadInfo};

use super::*;

/// Bytes as the fact sheet's field numbers give them, written by hand: a schema that drifts would not notice itself.
const HELLO: &str = "08 01";
const ADD: &str = "0a 16 0a 03 75 2d 31 12 0f 0a 03 77 65 62 12 04 73 68 6f 70 1a 02 73 61";
const KEEP: &str = "2a 05 0a 03 75 2d 31";
const DEL: &str = "12 05 12 03 75 2d 31";
const SNAPSHOT_SENT: &str = "1a 00";
const ACK: &str = "0a 00";
const ACK_NO: &str = "0a 04 0a 02 6e 6f";

fn bytes(hex: &str) -> Vec<u8> {
    hex.split(' ').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect()
}

fn packet(bytes: &[u8], files: Vec<u32>) -> Packet<'_, u32> {
    Packet { bytes, files, lost: None }
}

fn take(session: &mut Session, hex: &str, files: Vec<u32>) -> Result<Order<u32>, Violation> {
    session.handle_packet(packet(&bytes(hex), files))
}

fn web() -> PodInfo {
    PodInfo { uid: "u-1".into(), name: "web".into(), namespace: "shop".into(), service_account: "sa".into() }
}

fn set(uids: &[&str]) -> BTreeSet<String> {
    uids.iter().map(|uid| (*uid).to_owned()).collect()
}

#[test]
fn every_message_is_byte_for_byte_what_the_agent_speaks() {
    assert_eq!(Session::hello(), bytes(HELLO));
    assert_eq!(ack(""), bytes(ACK));
    assert_eq!(ack("no"), bytes(ACK_NO));
    let info = WorkloadInfo { name: "web".into(), namespace: "shop".into(), service_account: "sa".into() };
    for (payload, hex) in [
        (Payload::Add(AddWorkload { uid: "u-1".into(), workload_info: Some(info) }), ADD),
        (Payload::Keep(KeepWorkload { uid: "u-1".into() }), KEEP),
        (Payload::Del(DelWorkload { uid: "u-1".into() }), DEL),
        (Payload::SnapshotSent(SnapshotSent {}), SNAPSHOT_SENT),
    ] {
        assert_eq!(WorkloadRequest { payload: Some(payload) }.encode_to_vec(), bytes(hex));
    }
}

#[test]
fn a_snapshot_names_what_is_there_and_then_pods_come_and_go() {
    let mut session = Session::default();
    assert_eq!(take(&mut session, ADD, vec![7]).unwrap(), Order::Start(web(), 7));
    assert_eq!(take(&mut session, "2a 05 0a 03 75 2d 32", vec![]).unwrap(), Order::Keep("u-2".into()));
    assert!(!session.is_synced());
    assert_eq!(take(&mut session, SNAPSHOT_SENT, vec![]).unwrap(), Order::Reconcile(set(&["u-1", "u-2"])));
    assert!(session.is_synced());
    assert_eq!(take(&mut session, DEL, vec![]).unwrap(), Order::Stop("u-1".into()));
    assert_eq!(take(&mut session, ADD, vec![8]).unwrap(), Order::Start(web(), 8));
}

#[test]
fn a_pod_deleted_while_the_snapshot_is_sent_is_not_in_it() {
    let mut session = Session::default();
    take(&mut session, ADD, vec![7]).unwrap();
    assert_eq!(take(&mut session, DEL, vec![]).unwrap(), Order::Stop("u-1".into()));
    assert_eq!(take(&mut session, SNAPSHOT_SENT, vec![]).unwrap(), Order::Reconcile(set(&[])));
}

#[test]
fn keep_after_the_snapshot_and_a_second_snapshot_stop_everything() {
    let live = || {
        let mut session = Session::default();
        take(&mut session, SNAPSHOT_SENT, vec![]).unwrap();
        session
    };
    for (hex, expected) in [(KEEP, "Keep after the snapshot"), (SNAPSHOT_SENT, "a second snapshot")] {
        let violation = take(&mut live(), hex, vec![]).unwrap_err();
        assert_eq!((violation.to_string().as_str(), violation.consequence()), (expected, Consequence::StopAll));
    }
}

#[test]
fn descriptors_come_with_an_added_pod_alone_and_one_at_a_time() {
    for (hex, files, text) in [
        (ADD, vec![], "Add came with 0 file descriptors instead of 1"),
        (ADD, vec![7, 8], "Add came with 2 file descriptors instead of 1"),
        (KEEP, vec![7], "Keep came with 1 file descriptors instead of 0"),
        (DEL, vec![7], "Del came with 1 file descriptors instead of 0"),
        (SNAPSHOT_SENT, vec![7], "SnapshotSent came with 1 file descriptors instead of 0"),
    ] {
        let mut session = Session::default();
        let violation = take(&mut session, hex, files).unwrap_err();
        assert_eq!((violation.to_string().as_str(), violation.consequence()), (text, Consequence::Reconnect));
        assert!(!session.is_synced(), "a refused message changes nothing");
    }
}

#[test]
fn what_is_cut_off_garbled_unknown_or_incomplete_is_refused() {
    let refuse = |packet: Packet<'_, u32>| Session::default().handle_packet(packet).unwrap_err();
    let add = bytes(ADD);
    assert!(matches!(refuse(Packet { bytes: &add, files: vec![7], lost: Some(Lost::Bytes) }), Violation::TooLong));
    assert!(matches!(refuse(Packet { bytes: &add, files: vec![7], lost: Some(Lost::Files) }), Violation::FilesLost));
    assert!(matches!(refuse(packet(&[0xff; 9], vec![])), Violation::Undecodable(_)));
    assert!(matches!(refuse(packet(&[], vec![])), Violation::Unknown));
    // Field 4 is not taken; a later agent may know it.
    assert!(matches!(refuse(packet(&bytes("22 00"), vec![])), Violation::Unknown));
    // The uid in field 1, where every other message has it.
    assert!(matches!(refuse(packet(&bytes("12 05 0a 03 75 2d 31"), vec![])), Violation::NoUid("Del")));
    assert!(matches!(refuse(packet(&bytes("0a 05 0a 03 75 2d 31"), vec![7])), Violation::Incomplete("workload_info")));
    let nameless = "0a 11 0a 03 75 2d 31 12 0a 12 04 73 68 6f 70 1a 02 73 61";
    assert!(matches!(refuse(packet(&bytes(nameless), vec![7])), Violation::Incomplete("name")));
}

#[test]
fn an_answer_fits_into_a_packet_whatever_went_wrong() {
    for text in ["x".repeat(5000), "ü".repeat(2000)] {
        let answer = ack(&text);
        assert!(answer.len() <= LONGEST, "{}", answer.len());
        assert!(WorkloadResponse::decode(&answer[..]).is_ok());
    }
}
