//! Golden answers about the mesh of `testdata/cli/shop`.

use super::*;
use crate::cli::testing::{golden, shop};

fn asked(from: &str, to: &str) -> Explanation {
    explain(&shop(), "shop", from, to).unwrap_or_else(|error| panic!("{from} to {to}: {error}"))
}

#[test]
fn a_connection_is_told_hop_by_hop() {
    golden("explain-waypoint.txt", &asked("client-1", "server:80").text(Paint::PLAIN));
    golden("explain-direct.txt", &asked("client-1", "plain.shop.svc:90").text(Paint::PLAIN));
    golden("explain-stranger.txt", &asked("stranger.v1.outside", "10.96.0.2:90").text(Paint::PLAIN));
}

#[test]
fn who_may_not_connect_is_told_by_which_policy() {
    let told = |from: &str, to: &str| {
        let explained = asked(from, to);
        (explained.refused, explained.because)
    };
    assert!(!told("client-1", "server:80").0);
    assert!(!told("client-1", "server-1:7070").0);
    // Straight to what only the waypoint may reach.
    let (refused, because) = told("client-1", "server-1:8080");
    assert!(refused && because.contains("only from its waypoint"), "{because}");
    // Without an identity.
    let (refused, because) = told("stranger.v1.outside", "10.0.0.2:7070");
    assert!(refused && because.contains("PeerAuthentication shop/server"), "{because}");
    let (refused, because) = told("stranger.v1.outside", "plain.shop.svc.cluster.local:90");
    assert!(refused && because.contains("AuthorizationPolicy shop/no-strangers"), "{because}");
    assert!(!told("client-1", "example.org:443").0, "not of the mesh");
    assert!(!told("client-1", "192.0.2.1:443").0, "not of the mesh");
}

#[test]
fn questions_without_an_answer_say_what_is_missing() {
    let error = |from: &str, to: &str| explain(&shop(), "shop", from, to).map(drop).expect_err("no answer").to_string();
    assert!(error("nobody", "server:80").contains("there is no Pod shop/nobody"));
    assert!(error("server-2", "server:80").contains("has no address yet"));
    assert!(error("client-1", "server").contains("HOST:PORT"));
    assert!(error("client-1", "server:81").contains("has no port 81; it has 80"));
    assert!(error("client-1", "nobody:80").contains("there is no Service or pod shop/nobody"));
}
