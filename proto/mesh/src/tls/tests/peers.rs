//! Whose certificate is taken for whom, from either side.

use rcgen::{ExtendedKeyUsagePurpose, SanType};

use super::authority::*;
use super::*;

const CLIENT: &str = "spiffe://td/ns/shop/sa/client";
const SERVER: &str = "spiffe://td/ns/shop/sa/server";

/// `Ok`: the identity the peer is taken for. `Err`: a word of the refusal.
type Verdict = Result<&'static str, &'static str>;

fn read(verdict: Result<VerifiedPeer, TlsError>) -> Result<String, String> {
    verdict.map(|peer| peer.identity().to_string()).map_err(|error| {
        assert_eq!(error.flag(), ResponseFlag::TlsFailure, "{error}");
        format!("{error:?}")
    })
}

fn check(what: &str, found: Result<String, String>, expected: Verdict) {
    match (&found, expected) {
        (Ok(identity), Ok(expected)) => assert_eq!(identity, expected, "{what}"),
        (Err(error), Err(expected)) => assert!(error.contains(expected), "{what}: {error}"),
        _ => panic!("{what}: {found:?}, not {expected:?}"),
    }
}

#[tokio::test]
async fn the_names_of_a_certificate_say_who_a_peer_is() {
    let table: &[(&str, &[&str], Verdict, Verdict)] = &[
        // (what, URI names, as a client of SERVER, as a server that is to be SERVER or `other`'s)
        ("one of our trust domain", &[CLIENT], Ok(CLIENT), Err("IdentityMismatch")),
        ("the expected one", &[SERVER], Ok(SERVER), Ok(SERVER)),
        (
            "another trust domain",
            &["spiffe://other/ns/shop/sa/client"],
            Err("WrongTrustDomain"),
            Err("IdentityMismatch"),
        ),
        ("a trust domain that begins like ours", &["spiffe://td2/ns/a/sa/b"], Err("WrongTrustDomain"), Err("Mismatch")),
        ("a trust domain in other letters", &["spiffe://TD/ns/a/sa/b"], Err("WrongTrustDomain"), Err("Mismatch")),
        (
            "an expected one of another trust domain",
            &["spiffe://other/ns/x/sa/y"],
            Err("WrongTrustDomain"),
            Ok("spiffe://other/ns/x/sa/y"),
        ),
        ("several: the first of our trust domain", &[CLIENT, SERVER], Ok(CLIENT), Ok(SERVER)),
        (
            "a foreign one before ours counts for nothing",
            &["spiffe://other/ns/prod/sa/admin", SERVER],
            Ok(SERVER),
            Ok(SERVER),
        ),
        (
            "what is no identity is skipped",
            &["https://example.com/x", "spiffe://td/ns/shop", SERVER],
            Ok(SERVER),
            Ok(SERVER),
        ),
        (
            "nothing but what is none",
            &["https://example.com/x", "spiffe://td/workload/a"],
            Err("NoIdentity"),
            Err("NoIdentity"),
        ),
        ("no name at all", &[], Err("NoIdentity"), Err("NoIdentity")),
    ];
    let authority = Authority::root("root");
    let own = authority.identity(&server_id()).trusting(&authority.root);
    let expected = [server_id(), id("spiffe://other/ns/x/sa/y")];
    for (what, names, as_client, as_server) in table {
        let shown = authority.issue(&Leaf::of(names)).shown(|_| {});
        check(what, read(judge_client(&own, shown.clone()).await), *as_client);
        check(what, read(judge_server(&own, &expected, shown).await), *as_server);
    }
}

#[tokio::test]
async fn only_uri_names_count() {
    let authority = Authority::root("root");
    let own = authority.identity(&server_id()).trusting(&authority.root);
    let mut leaf = Leaf::of(&[]);
    leaf.names =
        vec![SanType::DnsName("server.shop.svc".try_into().unwrap()), SanType::Rfc822Name(SERVER.try_into().unwrap())];
    let named = authority.issue(&leaf).shown(|_| {});
    check("DNS and mail", read(judge_client(&own, named).await), Err("NoIdentity"));
    leaf.names.push(uri(SERVER));
    let both = authority.issue(&leaf).shown(|_| {});
    check("and a URI", read(judge_client(&own, both).await), Ok(SERVER));
}

#[tokio::test]
async fn usages_and_times_are_kept_to() {
    use ExtendedKeyUsagePurpose::{ClientAuth, CodeSigning, ServerAuth};
    let authority = Authority::root("root");
    let own = authority.identity(&server_id()).trusting(&authority.root);
    let now = SystemTime::now();
    let always = Leaf::of(&[]).valid;
    let both = || vec![ServerAuth, ClientAuth];
    let table = [
        ("both usages", both(), always, Ok(SERVER), Ok(SERVER)),
        // As in X.509: without the extension a key is not limited.
        ("no extension for usages", vec![], always, Ok(SERVER), Ok(SERVER)),
        ("clients only", vec![ClientAuth], always, Ok(SERVER), Err("BadCertificate")),
        ("servers only", vec![ServerAuth], always, Err("BadCertificate"), Ok(SERVER)),
        ("neither", vec![CodeSigning], always, Err("BadCertificate"), Err("BadCertificate")),
        ("expired", both(), (now - HOUR * 2, now - HOUR), Err("Expired"), Err("Expired")),
        ("not valid yet", both(), (now + HOUR, now + HOUR * 2), Err("NotYetValid"), Err("NotYetValid")),
    ];
    for (what, usages, valid, as_client, as_server) in table {
        let shown = authority.issue(&Leaf { usages, valid, ..Leaf::of(&[SERVER]) }).shown(|_| {});
        check(what, read(judge_client(&own, shown.clone()).await), as_client);
        check(what, read(judge_server(&own, &[server_id()], shown).await), as_server);
    }
}

#[tokio::test]
async fn a_chain_begins_with_its_leaf_and_leads_to_a_root_of_ours() {
    let root = Authority::root("root");
    let (upper, other) = (root.below("upper"), Authority::root("root"));
    let lower = upper.below("lower");
    let own = root.identity(&server_id()).trusting(&root.root);
    let peer = lower.identity(&server_id());
    type Order = fn(&mut Vec<rustls::pki_types::CertificateDer<'static>>);
    let table: &[(&str, Order, Verdict)] = &[
        ("as it should be", |_| {}, Ok(SERVER)),
        ("issuers in another order, which TLS 1.3 lets pass", |chain| chain.swap(1, 2), Ok(SERVER)),
        ("an issuer first", |chain| chain.swap(0, 1), Err("BadCertificate")),
        ("the last first", |chain| chain.reverse(), Err("BadCertificate")),
        ("one missing below the root", |chain| drop(chain.pop()), Err("UntrustedRoot")),
        ("one missing above the leaf", |chain| drop(chain.remove(1)), Err("UntrustedRoot")),
        ("nothing but the leaf", |chain| chain.truncate(1), Err("UntrustedRoot")),
    ];
    for (what, order, verdict) in table {
        check(what, read(judge_client(&own, peer.shown(*order)).await), *verdict);
        check(what, read(judge_server(&own, &[server_id()], peer.shown(*order)).await), *verdict);
    }
    // Of the same name, with another key.
    let stranger = other.identity(&server_id()).shown(|_| {});
    check("a root of the same name", read(judge_client(&own, stranger.clone()).await), Err("UntrustedRoot"));
    check("a root of the same name", read(judge_server(&own, &[server_id()], stranger).await), Err("UntrustedRoot"));
}
