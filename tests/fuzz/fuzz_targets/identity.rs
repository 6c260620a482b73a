//! Who a peer says it is: SPIFFE IDs, certificates with their names, and the lists of revoked ones.
#![no_main]

use std::sync::LazyLock;
use std::time::Duration;

use libfuzzer_sys::{Corpus, fuzz_target};
use mesh::clock::Clock;
use mesh::identity::{FileCa, Identity, Revocations, WorkloadCertificate, new_csr};
use mesh_fuzz::{begin, seed, texts};
use rcgen::{
    CertificateParams, CertificateRevocationListParams, Issuer, KeyIdMethod, KeyPair, RevokedCertParams, SanType,
    SerialNumber, date_time_ymd,
};

fuzz_target!(init: begin(seeds), |input: &[u8]| -> Corpus {
    let Some((letter, content)) = input.split_first() else { return Corpus::Reject };
    match (letter, std::str::from_utf8(content)) {
        (b'u', Ok(text)) => spiffe_id(text),
        (b'd', _) => certificate(content),
        (b'p', Ok(text)) => pem(text),
        (b'c', _) => revocations(content),
        _ => return Corpus::Reject,
    }
    Corpus::Keep
});

/// An identity has one spelling: no two texts mean the same peer.
fn spiffe_id(text: &str) {
    let Ok(identity) = text.parse::<Identity>() else { return };
    assert_eq!(identity.to_string(), text);
    let (td, ns, sa) = (identity.trust_domain(), identity.namespace(), identity.service_account());
    assert_eq!(Identity::new(td, ns, sa).as_ref(), Ok(&identity));
    let json = serde_json::to_string(&identity).expect("JSON");
    assert_eq!(serde_json::from_str::<Identity>(&json).ok().as_ref(), Some(&identity));
}

/// A name that is taken from a certificate stands in it as it is.
fn certificate(der: &[u8]) {
    for name in mesh::fuzzing::identities(der).unwrap_or_default() {
        let name = name.to_string();
        assert!(der.windows(name.len()).any(|bytes| bytes == name.as_bytes()), "{name}");
    }
}

/// A chain as the authority sends it, and roots behind an empty line.
fn pem(text: &str) {
    static KEY: LazyLock<String> = LazyLock::new(|| KeyPair::generate().expect("a key").serialize_pem());
    let (chain, roots) = text.split_once("\n\n").unwrap_or((text, ""));
    if let Ok(certificate) = WorkloadCertificate::from_pem(chain, &KEY, roots, &Clock::system()) {
        let _ = certificate.describe();
    }
}

/// What was loaded can be handed to a draining generation and means the same there; what was not changes nothing.
fn revocations(bytes: &[u8]) {
    let (here, there) = (Revocations::default(), Revocations::default());
    let Ok(loaded) = here.load(bytes) else {
        assert!(here.lists().is_empty());
        return;
    };
    assert_eq!(there.load(&here.lists().concat()).ok(), Some(loaded));
    assert_eq!(there.next_update(), here.next_update());
}

fn seeds() -> Vec<Vec<u8>> {
    let ids = ["spiffe://cluster.local/ns/shop/sa/cart", "spiffe://td/ns/a/sa/b/c", "spiffe://TD.x_y/ns/a%2fb/sa/"];
    let mut seeds: Vec<Vec<u8>> = texts(b'u', &ids).collect();

    let ca = FileCa::generate("td", Duration::from_secs(3600), Clock::system()).expect("an authority");
    let identity = Identity::new("td", "shop", "cart").expect("an identity");
    let (chain, _) = ca.sign_pem(&identity).expect("a certificate");
    seeds.push(seed(b'p', chain + "\n" + ca.root_pem()));
    seeds.push(seed(b'p', new_csr(&identity).expect("a request").pem));
    seeds.push(seed(b'd', &ca.sign(&identity).expect("a certificate").chain()[0]));

    let mut params = CertificateParams::new(["a.example".to_owned()]).expect("a name");
    for uri in ids {
        params.subject_alt_names.push(SanType::URI(uri.try_into().expect("ASCII")));
    }
    params.subject_alt_names.push(SanType::IpAddress([10, 0, 0, 1].into()));
    params.subject_alt_names.push(SanType::Rfc822Name("a@b".try_into().expect("ASCII")));
    let key = KeyPair::generate().expect("a key");
    seeds.push(seed(b'd', params.self_signed(&key).expect("a certificate").der()));

    let revoked = |serial: u64| RevokedCertParams {
        serial_number: SerialNumber::from(serial),
        revocation_time: date_time_ymd(2026, 1, 1),
        reason_code: Some(rcgen::RevocationReason::KeyCompromise),
        invalidity_date: Some(date_time_ymd(2025, 1, 1)),
    };
    let list = CertificateRevocationListParams {
        this_update: date_time_ymd(2026, 1, 1),
        next_update: date_time_ymd(2036, 1, 1),
        crl_number: SerialNumber::from(1_u64),
        issuing_distribution_point: None,
        revoked_certs: vec![revoked(1), revoked(1 << 40)],
        key_identifier_method: KeyIdMethod::Sha256,
    };
    let list = list.signed_by(&Issuer::new(params, key)).expect("a list");
    seeds.push(seed(b'c', list.der()));
    seeds.push(seed(b'c', [list.der().as_ref(), list.der().as_ref()].concat()));
    seeds.push(seed(b'c', list.pem().expect("PEM")));
    seeds
}
