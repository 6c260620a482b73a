//! Revoked peers: refused at the handshake, cut when a list comes to name them.

use super::authority::Authority;
use super::*;
use crate::identity::{HandshakeRules, KeyExchange, Revocations};

fn rules(revocations: &Revocations) -> HandshakeRules {
    HandshakeRules { key_exchange: KeyExchange::default(), revocations: Some(revocations.clone()) }
}

/// A server that knows the revoked, and a client; either may be below an authority of its own.
struct World {
    root: Authority,
    middle: Authority,
    /// Of the server, and of the client where that is asked.
    revocations: Revocations,
}

fn world() -> World {
    let root = Authority::root("mesh");
    let middle = root.below("middle");
    World { root, middle, revocations: Revocations::default() }
}

#[tokio::test]
async fn the_revoked_are_refused_in_both_roles_and_the_others_are_not() {
    let world = world();
    let (good, bad) = (world.middle.identity(&client_id()), world.middle.identity(&client_id()));
    let (good_server, bad_server) = (world.middle.identity(&server_id()), world.middle.identity(&server_id()));
    let root = &world.root.root;
    let knowing = |issued: &super::authority::Issued| issued.with(root, rules(&world.revocations));
    world.revocations.load(world.middle.revoke(&[bad.serial, bad_server.serial]).as_bytes()).unwrap();

    let (at_client, at_server) = meet(&bad.trusting(root), &[server_id()], &knowing(&good_server)).await;
    let error = at_server.unwrap_err();
    assert!(matches!(error, TlsError::Revoked) && error.flag() == ResponseFlag::CertRevoked, "{error:?}");
    assert!(matches!(&at_client, Err(TlsError::Rejected(alert)) if alert.contains("Revoked")), "{at_client:?}");

    let (at_client, _) = meet(&knowing(&good), &[server_id()], &bad_server.trusting(root)).await;
    assert!(matches!(at_client, Err(TlsError::Revoked)), "{at_client:?}");

    let (at_client, at_server) = meet(&knowing(&good), &[server_id()], &knowing(&good_server)).await;
    assert!(at_client.is_ok() && at_server.is_ok(), "{at_client:?} {at_server:?}");
}

#[tokio::test]
async fn whose_list_counts_for_whom() {
    let world = world();
    let (other_root, twin) = (Authority::root("other"), Authority::root("mesh"));
    let server = world.root.identity(&server_id()).with(&world.root.root, rules(&world.revocations));
    let client = world.middle.identity(&client_id());
    let shown = || client.shown(|_| {});
    let now = SystemTime::now();
    let table = [
        ("no list", String::new(), true),
        ("an empty list of the issuer", world.middle.revoke(&[]), true),
        ("a list of the issuer", world.middle.revoke(&[client.serial]), false),
        ("the issuer itself revoked, by the root", world.root.revoke(&[world.middle.serial]), false),
        ("the serial on a list of the root, which did not issue it", world.root.revoke(&[client.serial]), true),
        ("on a list of somebody else's", other_root.revoke(&[client.serial, world.middle.serial]), true),
        ("on a list of a namesake of the root with another key", twin.revoke(&[world.middle.serial]), true),
        (
            "a namesake's list before the true one",
            twin.revoke(&[world.middle.serial]) + &world.root.revoke(&[world.middle.serial]),
            false,
        ),
        (
            "the second of two lists of one issuer",
            world.middle.revoke(&[]) + &world.middle.revoke(&[client.serial]),
            false,
        ),
        ("an expired list of the issuer", world.middle.list(&[client.serial], now - HOUR), false),
        ("an expired list without it", world.middle.list(&[[7; 16]], now - HOUR), true),
        ("a list of the future", world.middle.list(&[client.serial], now + HOUR * 48), false),
    ];
    for (what, lists, accepted) in table {
        world.revocations.load(lists.as_bytes()).unwrap();
        let verdict = super::authority::judge_client(&server, shown()).await;
        match (accepted, &verdict) {
            (true, Ok(_)) | (false, Err(TlsError::Revoked)) => {}
            _ => panic!("{what}: {verdict:?}"),
        }
    }
}

#[tokio::test]
async fn a_path_around_a_revoked_issuer_is_taken() {
    let world = world();
    let (one, two) = (world.root.below("one"), world.root.below("two"));
    let server = world.root.identity(&server_id()).with(&world.root.root, rules(&world.revocations));
    let client = one.below("lower").cross(&two).identity(&client_id());
    for (what, revoked, accepted) in [
        ("the first way", vec![one.serial], true),
        ("the second way", vec![two.serial], true),
        ("both ways", vec![one.serial, two.serial], false),
    ] {
        world.revocations.load(world.root.revoke(&revoked).as_bytes()).unwrap();
        let verdict = super::authority::judge_client(&server, client.shown(|_| {})).await;
        match (accepted, &verdict) {
            (true, Ok(_)) | (false, Err(TlsError::Revoked)) => {}
            _ => panic!("{what}: {verdict:?}"),
        }
    }
}

#[tokio::test]
async fn an_open_connection_breaks_when_a_list_comes_to_name_its_peer() {
    let world = world();
    let (good, bad) = (world.middle.identity(&client_id()), world.middle.identity(&client_id()));
    let server = world.root.identity(&server_id()).with(&world.root.root, rules(&world.revocations));
    let open = async |client: &super::authority::Issued| {
        let client = client.trusting(&world.root.root);
        let (near, far) = tokio::io::duplex(1 << 16);
        let expected = [server_id()];
        let (near, far) = tokio::join!(connect(&client, &expected, near, addr()), accept(&server, far, addr()));
        let (far, peer) = far.unwrap();
        (near.unwrap().0, far, peer)
    };
    let (mut near, mut far, peer) = open(&bad).await;
    let (mut other, mut other_far, other_peer) = open(&good).await;
    near.write_all(b"x").await.unwrap();
    near.flush().await.unwrap();
    assert_eq!(far.read_u8().await.unwrap(), b'x');
    assert!(!peer.is_revoked());

    // It waits for the next byte when the news comes.
    let waiting = tokio::spawn(async move { far.read_u8().await });
    tokio::task::yield_now().await;
    let loaded = world.revocations.load(world.middle.revoke(&[bad.serial]).as_bytes()).unwrap();
    assert_eq!((loaded.lists, loaded.entries, loaded.cut), (1, 1, 1));
    let error = tokio::time::timeout(HANDSHAKE_TIMEOUT, waiting).await.expect("it is woken").unwrap().unwrap_err();
    assert!(matches!(TlsError::from_io(error), TlsError::Revoked));
    assert!(peer.is_revoked() && !other_peer.is_revoked());
    assert!(near.read_u8().await.is_err(), "the peer sees the end");
    other.write_all(b"y").await.unwrap();
    other.flush().await.unwrap();
    assert_eq!(other_far.read_u8().await.unwrap(), b'y', "somebody else's goes on");

    // A list that no longer names it brings nothing back, and the same list cuts nobody twice.
    assert_eq!(world.revocations.load(world.middle.revoke(&[bad.serial]).as_bytes()).unwrap().cut, 0);
    world.revocations.load(b"").unwrap();
    assert!(peer.is_revoked());
}

#[tokio::test]
async fn a_connection_that_waits_to_write_breaks_as_well() {
    let world = world();
    let client = world.middle.identity(&client_id());
    let server = world.root.identity(&server_id()).with(&world.root.root, rules(&world.revocations));
    let near_cert = client.trusting(&world.root.root);
    let (near, far) = tokio::io::duplex(1 << 14);
    let expected = [server_id()];
    let (near, far) = tokio::join!(connect(&near_cert, &expected, near, addr()), accept(&server, far, addr()));
    let (_near, (mut far, _)) = (near.unwrap(), far.unwrap());
    // Nobody reads at the other end, so this ends only when it is cut.
    let writing = tokio::spawn(async move {
        loop {
            far.write_all(&[0; 1 << 16]).await?;
        }
        #[allow(unreachable_code, reason = "tells the type of the error")]
        Ok::<(), io::Error>(())
    });
    tokio::task::yield_now().await;
    world.revocations.load(world.middle.revoke(&[client.serial]).as_bytes()).unwrap();
    let error = tokio::time::timeout(HANDSHAKE_TIMEOUT, writing).await.expect("it is woken").unwrap().unwrap_err();
    assert!(matches!(TlsError::from_io(error), TlsError::Revoked));
}

#[tokio::test]
async fn rejections_are_counted_by_who_reports() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let handle = recorder.handle();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let world = world();
    let (client, server) = (world.middle.identity(&client_id()), world.middle.identity(&server_id()));
    let knowing = |issued: &super::authority::Issued| issued.with(&world.root.root, rules(&world.revocations));
    let plain = |issued: &super::authority::Issued| issued.trusting(&world.root.root);
    // One is open and is cut, one is refused: by the destination. One is refused by the source.
    let (near, far) = tokio::io::duplex(1 << 16);
    let (near_cert, far_cert, expected) = (plain(&client), knowing(&server), [server_id()]);
    let (near, far) = tokio::join!(connect(&near_cert, &expected, near, addr()), accept(&far_cert, far, addr()));
    let _open = (near.unwrap(), far.unwrap());
    world.revocations.load(world.middle.revoke(&[client.serial, server.serial]).as_bytes()).unwrap();
    let _ = meet(&plain(&client), &[server_id()], &knowing(&server)).await;
    let _ = meet(&knowing(&client), &[server_id()], &plain(&server)).await;
    let text = handle.render();
    for expected in [
        r#"istio_crl_policy_rejections_total{reporter="destination"} 2"#,
        r#"istio_crl_policy_rejections_total{reporter="source"} 1"#,
        "mesh_crl_lists 1",
        "mesh_crl_entries 2",
    ] {
        assert!(text.contains(expected), "{text}");
    }
}
