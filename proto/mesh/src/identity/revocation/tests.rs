use std::os::unix::fs::symlink;

use rcgen::{
    CertificateParams, CertificateRevocationListParams, DnType, Issuer as Signer, KeyIdMethod, KeyPair,
    RevokedCertParams, SerialNumber, date_time_ymd,
};

use super::*;
use crate::drain;

const PATIENCE: Duration = Duration::from_secs(20);

fn list(serials: &[u8]) -> rcgen::CertificateRevocationList {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "authority");
    list_by(&Signer::new(params, KeyPair::generate().unwrap()), serials)
}

fn list_by(signer: &Signer<'static, KeyPair>, serials: &[u8]) -> rcgen::CertificateRevocationList {
    let revoked = serials.iter().map(|serial| RevokedCertParams {
        serial_number: SerialNumber::from_slice(&[*serial]),
        revocation_time: date_time_ymd(2026, 1, 1),
        reason_code: None,
        invalidity_date: None,
    });
    let list = CertificateRevocationListParams {
        this_update: date_time_ymd(2026, 1, 1),
        next_update: date_time_ymd(2036, 1, 1),
        crl_number: SerialNumber::from(1u64),
        issuing_distribution_point: None,
        revoked_certs: revoked.collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    list.signed_by(signer).unwrap()
}

fn pem(serials: &[u8]) -> String {
    list(serials).pem().unwrap()
}

#[test]
fn lists_are_read_in_pem_and_der_one_or_several() {
    let (one, two) = (list(&[1]), list(&[2, 3]));
    let both = one.pem().unwrap() + "\n# a word in between\n" + &two.pem().unwrap();
    let text = [
        (both.into_bytes(), 2, 3),
        (one.pem().unwrap().into_bytes(), 1, 1),
        (one.der().to_vec(), 1, 1),
        ([one.der().as_ref(), two.der().as_ref()].concat(), 2, 3),
        (pem(&[]).into_bytes(), 1, 0),
        (b"".to_vec(), 0, 0),
        (b" \n\n".to_vec(), 0, 0),
    ];
    for (bytes, lists, entries) in text {
        let revocations = Revocations::default();
        assert_eq!(revocations.load(&bytes).unwrap(), Loaded { lists, entries, cut: 0 });
        assert_eq!(revocations.lists().len(), lists);
    }
}

#[test]
fn a_list_counts_for_the_key_that_signed_it_whatever_kind_handshakes_take() {
    let kinds = [
        &rcgen::PKCS_ECDSA_P256_SHA256,
        &rcgen::PKCS_ECDSA_P384_SHA384,
        &rcgen::PKCS_ECDSA_P521_SHA512,
        &rcgen::PKCS_ED25519,
    ];
    for kind in kinds {
        let (key, another) = (KeyPair::generate_for(kind).unwrap(), KeyPair::generate_for(kind).unwrap());
        let issuer = |key: &KeyPair| {
            Arc::new(Issuer { name: [].into(), key: rcgen::PublicKeyData::subject_public_key_info(key).into() })
        };
        let (its, anothers) = (issuer(&key), issuer(&another));
        let der = list_by(&Signer::new(CertificateParams::default(), key), &[1]).der().to_vec();
        let lists = list::parse(&der).unwrap();
        assert!(lists[0].is_signed_by(&its), "{kind:?}");
        assert!(!lists[0].is_signed_by(&anothers), "{kind:?}");
    }
}

#[test]
fn what_is_no_list_is_refused_and_the_lists_from_before_stay() {
    let revocations = Revocations::default();
    revocations.load(pem(&[1]).as_bytes()).unwrap();
    let whole = pem(&[2]);
    let cut = whole.len() / 2;
    let key = KeyPair::generate().unwrap().serialize_pem();
    let der = list(&[2]).der().to_vec();
    for bytes in [
        &b"nonsense"[..],
        b"\x30\x82\xff\xff",
        key.as_bytes(),
        &whole.as_bytes()[..cut],
        (pem(&[1]) + &whole[..cut]).as_bytes(),
        whole.replace("\nMI", "\n!!").as_bytes(),
        &der[..der.len() - 1],
        &[&der[..], b"\x30\x03"].concat(),
    ] {
        let error = revocations.load(bytes).expect_err("no list").to_string();
        assert!(error.contains("list"), "{error}");
        assert_eq!(revocations.lists().len(), 1);
    }
}

#[test]
fn names_of_any_length_are_wrapped_as_der_has_it() {
    assert_eq!(list::sequence(&[]), [0x30, 0]);
    assert_eq!(list::sequence(&[7; 127])[..2], [0x30, 127]);
    assert_eq!(list::sequence(&[7; 128])[..3], [0x30, 0x81, 128]);
    assert_eq!(list::sequence(&[7; 300])[..4], [0x30, 0x82, 1, 44]);
}

/// A directory as a kubelet mounts a ConfigMap: the file is a link through `..data`, which is turned from one version to
/// the next in one step.
struct ConfigMap(tempfile::TempDir);

impl ConfigMap {
    fn new() -> Self {
        let map = Self(tempfile::tempdir().unwrap());
        symlink("..data/ca-crl.pem", map.path()).unwrap();
        map
    }

    fn path(&self) -> std::path::PathBuf {
        self.0.path().join("ca-crl.pem")
    }

    fn publish(&self, version: &str, text: &str) {
        let dir = self.0.path();
        std::fs::create_dir(dir.join(version)).unwrap();
        std::fs::write(dir.join(version).join("ca-crl.pem"), text).unwrap();
        symlink(version, dir.join("..data_tmp")).unwrap();
        std::fs::rename(dir.join("..data_tmp"), dir.join("..data")).unwrap();
    }
}

#[test]
fn a_config_map_is_followed_through_its_links_and_mistakes_change_nothing() {
    let map = ConfigMap::new();
    let revocations = Revocations::default();
    let mut file = RevocationFile::open(&map.path(), revocations.clone()).expect("none yet is no mistake");
    let mut lists = || {
        // The first look sees that it has changed, the second that nobody is writing it.
        file.look();
        file.look();
        revocations.lists().len()
    };
    assert_eq!(lists(), 0);
    map.publish("..1", &pem(&[1]));
    assert_eq!(lists(), 1);
    map.publish("..2", &(pem(&[1]) + &pem(&[2])));
    assert_eq!(lists(), 2);
    map.publish("..3", "nonsense");
    assert_eq!(lists(), 2, "not understood");
    std::fs::remove_file(map.0.path().join("..data")).unwrap();
    assert_eq!(lists(), 2, "gone");
    map.publish("..4", &pem(&[]));
    assert_eq!(lists(), 1, "and right again");
    std::fs::write(map.path(), "").unwrap();
    assert_eq!(lists(), 1, "cut to nothing by whoever is about to write it");
    std::fs::write(map.path(), pem(&[1]) + &pem(&[2])).unwrap();
    assert_eq!(lists(), 2, "written over in place");
    std::fs::remove_file(map.path()).unwrap();
    std::fs::create_dir(map.path()).unwrap();
    assert_eq!(lists(), 2, "cannot be read");
    std::fs::remove_dir(map.path()).unwrap();
    std::fs::write(map.path(), pem(&[1])).unwrap();
    assert_eq!(lists(), 1, "and can again");
}

#[test]
fn a_file_that_is_being_written_is_left_alone_until_it_rests() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("crl.pem");
    std::fs::write(&path, pem(&[1])).unwrap();
    let revocations = Revocations::default();
    let mut file = RevocationFile::open(&path, revocations.clone()).unwrap();
    // Two of three are there: a text in itself, and not what was meant.
    std::fs::write(&path, pem(&[1]) + &pem(&[2])).unwrap();
    file.look();
    std::fs::write(&path, pem(&[1]) + &pem(&[2]) + &pem(&[3])).unwrap();
    file.look();
    assert_eq!(revocations.lists().len(), 1);
    file.look();
    assert_eq!(revocations.lists().len(), 3);
}

#[tokio::test(start_paused = true)]
async fn the_file_is_looked_at_until_the_drain() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("crl.pem");
    let revocations = Revocations::default();
    let file = RevocationFile::open(&path, revocations.clone()).unwrap();
    let (trigger, watcher) = drain::channel();
    let following = tokio::spawn(file.run(watcher));
    let mut loads = revocations.watch();
    std::fs::write(&path, pem(&[1])).unwrap();
    tokio::time::timeout(PATIENCE, loads.changed()).await.expect("taken").unwrap();
    drop(trigger);
    tokio::time::timeout(PATIENCE, following).await.expect("it ends").unwrap();
}

#[test]
fn who_is_revoked_between_the_handshake_and_its_end_is_not_admitted() {
    use rcgen::PublicKeyData;
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "authority");
    let key = KeyPair::generate().unwrap();
    let spki = key.subject_public_key_info();
    let signer = Signer::new(params, key);
    let text = list_by(&signer, &[5]).der().to_vec();
    let name = list::parse(&text).unwrap()[0].issuer().to_vec();
    let issuer = Arc::new(Issuer { name: name.into(), key: spki.into() });
    let path = |serial: u8| Path([Link { issuer: issuer.clone(), serial: [serial].into() }].into());
    let revocations = Revocations::default();
    let early = revocations.admit(path(5), PeerRole::Client).expect("nobody is revoked yet");
    assert_eq!(revocations.load(&text).unwrap().cut, 1);
    assert!(early.is_revoked());
    assert!(revocations.admit(path(5), PeerRole::Client).is_none());
    assert!(revocations.admit(path(6), PeerRole::Client).is_some());
    assert_eq!(revocations.load(&text).unwrap().cut, 0, "who is not admitted is not open");
}

#[test]
fn a_file_that_is_there_and_cannot_be_used_is_a_reason_not_to_start() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("crl.pem");
    assert!(RevocationFile::open(&path, Revocations::default()).is_ok(), "not there");
    std::fs::write(&path, "nonsense").unwrap();
    let error = RevocationFile::open(&path, Revocations::default()).err().expect("refused");
    assert!(matches!(error, RevocationError::Malformed { number: 1, .. }), "{error}");
    assert!(matches!(RevocationFile::open(dir.path(), Revocations::default()), Err(RevocationError::Read(..))));
    std::fs::write(&path, pem(&[1])).unwrap();
    let revocations = Revocations::default();
    RevocationFile::open(&path, revocations.clone()).unwrap();
    assert_eq!(revocations.lists().len(), 1);
}

#[test]
fn what_is_remembered_of_a_connection_is_small_and_goes_with_it() {
    let revocations = Revocations::default();
    let issuer = Arc::new(Issuer { name: [1; 60].into(), key: [2; 91].into() });
    let path = || Path([Link { issuer: issuer.clone(), serial: [3; 16].into() }].into());
    let mut standings = Vec::new();
    for _ in 0..10_000 {
        standings.push(revocations.admit(path(), PeerRole::Client).expect("nobody is revoked"));
        if standings.len() == 10 {
            standings.clear();
        }
    }
    assert!(revocations.open() <= 2 * TIDY_AT, "{}", revocations.open());
    // The shared part, one certificate below the root, and the entry in the list of what is open.
    let bytes = size_of::<Standing>() + 16 + size_of::<Link>() + 16 + size_of::<Weak<Standing>>();
    assert!(bytes <= 160, "{bytes} bytes for each TLS connection");
}
