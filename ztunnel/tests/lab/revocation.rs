//! Two ztunnels with revocation lists: whose certificate is taken back loses what it has open and gets nothing new, on
//! whichever side the list is known.

use std::fs;
use std::path::PathBuf;
use std::time::SystemTime;

use rcgen::{CertificateRevocationListParams, Issuer, KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber};

use crate::support::*;

const PODS: [Pod; 3] = [('a', "a1"), ('a', "a2"), ('b', "b1")];

impl Lab {
    fn list_path(&self, node: char) -> PathBuf {
        self.dir.path().join(format!("{node}-crl.pem"))
    }

    /// What `node`'s ztunnel shows of its certificates.
    fn serial(&self, node: char, pod: &str) -> Vec<u8> {
        let answer = self.http(node, 15000, "/config_dump");
        let (_, body) = answer.split_once("\r\n\r\n").expect("a body");
        let dump: serde_json::Value = serde_json::from_str(body).expect("JSON");
        let identity = format!("spiffe://cluster.local/ns/shop/sa/{pod}");
        let certificates = dump["certificates"].as_array().expect("certificates");
        let found = certificates.iter().find(|c| c["identity"] == identity.as_str()).expect("the pod's certificate");
        bytes(found["certChain"][0]["serialNumber"].as_str().expect("its serial"))
    }

    /// A list of the lab's authority, put in its place in one step.
    fn revoke(&self, node: char, serials: &[Vec<u8>]) {
        let read = |name: &str| fs::read_to_string(self.dir.path().join(name)).expect("the authority is there");
        let key = KeyPair::from_pem(&read("ca-key.pem")).expect("its key");
        let issuer = Issuer::from_ca_cert_pem(&read("ca-cert.pem"), key).expect("its certificate");
        let now = SystemTime::now();
        let revoked = serials.iter().map(|serial| RevokedCertParams {
            serial_number: SerialNumber::from_slice(serial),
            revocation_time: now.into(),
            reason_code: None,
            invalidity_date: None,
        });
        let list = CertificateRevocationListParams {
            this_update: now.into(),
            next_update: (now + PATIENCE * 100).into(),
            crl_number: SerialNumber::from(1u64),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let next = self.dir.path().join("next-crl.pem");
        fs::write(&next, list.signed_by(&issuer).expect("signed").pem().expect("PEM")).expect("written");
        fs::rename(next, self.list_path(node)).expect("renamed");
    }

    fn has_line(&self, node: char, parts: &[&str]) -> bool {
        self.log(node).lines().any(|line| parts.iter().all(|part| line.contains(part)))
    }
}

/// A decimal number, big-endian.
fn bytes(decimal: &str) -> Vec<u8> {
    let mut bytes: Vec<u8> = Vec::new();
    for digit in decimal.bytes() {
        let mut carry = u32::from(digit - b'0');
        for byte in bytes.iter_mut().rev() {
            carry += u32::from(*byte) * 10;
            *byte = carry.to_le_bytes()[0];
            carry >>= 8;
        }
        if carry > 0 {
            bytes.insert(0, carry.to_le_bytes()[0]);
        }
    }
    bytes
}

#[test]
fn a_revoked_peer_is_cut_and_refused_on_the_side_that_knows() {
    if !possible(&[]) {
        return;
    }
    let mut lab = Lab::up(&PODS);
    let mesh = Mesh::default();
    serve_in(&lab.netns("b1"));
    let [b1, _] = lab.addresses("b1");
    for node in ['a', 'b'] {
        lab.configure(node, &mesh);
        // None of the lists is there yet.
        lab.env =
            vec![("CRL_PATH", lab.list_path(node).display().to_string()), ("AUTHZ_POLICY_INFO_LOGGING", "true".into())];
        lab.start_ztunnel(node);
    }
    let answer = |pod: &str| format!("{} {MARKER}", lab.addresses(pod)[0]);
    let mut held = ["a1", "a2"].map(|pod| (pod, lab.hold(pod, &b1)));
    for (pod, connection) in &mut held {
        assert_eq!(connection.ask(), answer(pod));
    }
    assert!(
        lab.has_line('b', &["policy decision", "allowed", "sa/a1", "INFO"])
            || lab.has_line('b', &["policy decision", "allowed", "sa/a1", "info"])
    );

    // Known to the destination.
    lab.revoke('b', &[lab.serial('a', "a1")]);
    let [(_, a1), (_, a2)] = &mut held;
    eventually("the open connection of a1 is cut", || a1.ask().is_empty());
    assert_eq!(a2.ask(), answer("a2"), "that of another identity goes on");
    eventually("the cut is recorded", || {
        lab.has_line('b', &["connection complete", "sa/a1", "inbound", "revoked", "response_flags=\"CERT_REVOKED\""])
    });
    let failed = ["istio_tcp_connections_failed_total", "response_flags=\"CERT_REVOKED\"", "sa/a1", "destination"];
    assert_eq!(lab.metric('b', &failed), Some(1.0));
    assert!(lab.call("a1", &b1, APP_PORT).is_err(), "a new one is refused");
    eventually("the refusal is recorded", || {
        lab.has_line('b', &["connection failed", "inbound", "response_flags=\"CERT_REVOKED\""])
    });
    let rejected = |node, reporter| lab.metric(node, &["istio_crl_policy_rejections_total", reporter]);
    assert!(rejected('b', "destination") >= Some(2.0), "one cut, one refused at least");
    assert_eq!(lab.call("a2", &b1, APP_PORT), Ok(answer("a2")));

    // Known to the source.
    lab.revoke('a', &[lab.serial('b', "b1")]);
    eventually("the open connection of a2 is cut", || a2.ask().is_empty());
    eventually("the cut is recorded", || {
        lab.has_line('a', &["connection complete", "sa/a2", "outbound", "response_flags=\"CERT_REVOKED\""])
    });
    let before = lab.log('a').matches("CERT_REVOKED").count();
    assert!(lab.call("a2", &b1, APP_PORT).is_err(), "a new one is not made");
    eventually("that is recorded", || lab.log('a').matches("CERT_REVOKED").count() > before);
    assert!(rejected('a', "source") >= Some(2.0), "one cut, one refused at least");

    // A list that cannot be read changes nothing; one that names nobody does.
    fs::write(lab.list_path('b'), "nonsense").expect("written");
    eventually("the mistake is told", || lab.has_line('b', &["revocation lists from before stay"]));
    lab.revoke('a', &[]);
    eventually("b1 is taken back in", || lab.call("a2", &b1, APP_PORT).is_ok());
    assert!(lab.call("a1", &b1, APP_PORT).is_err(), "a1 is still revoked");
    lab.revoke('b', &[]);
    eventually("a1 is, too", || lab.call("a1", &b1, APP_PORT) == Ok(answer("a1")));
    for node in ['a', 'b'] {
        assert!(!lab.log(node).contains("panicked"), "{}", lab.log(node));
    }
}
