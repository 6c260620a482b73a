//! Authorities that sign whatever a test wants, and peers that show it.

use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, RevokedCertParams, SanType, SerialNumber,
};
use rustls::{
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    sign::CertifiedKey,
};

use super::*;
use crate::identity::HandshakeRules;

const HOUR: Duration = Duration::from_secs(3600);

/// A root, or an authority below one.
pub(super) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    name: String,
    pub(super) serial: [u8; 16],
    /// Its own certificate and those above, without the root; empty for a root.
    chain: String,
    pub(super) root: String,
}

/// A certificate to be: the names, usages and times of a good one, changed by a test.
pub(super) struct Leaf {
    pub(super) names: Vec<SanType>,
    pub(super) usages: Vec<ExtendedKeyUsagePurpose>,
    pub(super) valid: (SystemTime, SystemTime),
}

/// A certificate and its key.
pub(super) struct Issued {
    pub(super) chain: String,
    pub(super) key: String,
    pub(super) serial: [u8; 16],
}

pub(super) fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

impl Leaf {
    pub(super) fn of(names: &[&str]) -> Self {
        let now = SystemTime::now();
        Self {
            names: names.iter().map(|name| uri(name)).collect(),
            usages: vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
            valid: (now - HOUR, now + HOUR),
        }
    }
}

impl Authority {
    fn params(name: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
    }

    pub(super) fn root(name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let params = Self::params(name);
        let root = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), name: name.into(), serial: [0; 16], chain: String::new(), root }
    }

    /// An authority that this one has signed.
    pub(super) fn below(&self, name: &str) -> Self {
        let (key, serial) = (KeyPair::generate().unwrap(), serial());
        let mut params = Self::params(name);
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        let own = params.signed_by(&key, &self.issuer).unwrap().pem();
        let (chain, root) = (own + &self.chain, self.root.clone());
        Self { issuer: Issuer::new(params, key), name: name.into(), serial, chain, root }
    }

    /// The same authority, signed by another one as well. What it issues is sent with both ways up.
    pub(super) fn cross(mut self, by: &Self) -> Self {
        let params = Self::params(&self.name);
        self.chain += &(params.signed_by(self.issuer.key(), &by.issuer).unwrap().pem() + &by.chain);
        self
    }

    pub(super) fn issue(&self, leaf: &Leaf) -> Issued {
        let (key, serial) = (KeyPair::generate().unwrap(), serial());
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        params.subject_alt_names = leaf.names.clone();
        params.extended_key_usages = leaf.usages.clone();
        (params.not_before, params.not_after) = (leaf.valid.0.into(), leaf.valid.1.into());
        let own = params.signed_by(&key, &self.issuer).unwrap().pem();
        Issued { chain: own + &self.chain, key: key.serialize_pem(), serial }
    }

    pub(super) fn identity(&self, identity: &Identity) -> Issued {
        self.issue(&Leaf::of(&[&identity.to_string()]))
    }

    /// A list of this authority, in PEM, that is due at `next_update`.
    pub(super) fn list(&self, serials: &[[u8; 16]], next_update: SystemTime) -> String {
        let revoked = serials.iter().map(|serial| RevokedCertParams {
            serial_number: SerialNumber::from_slice(serial),
            revocation_time: (SystemTime::now() - HOUR * 3).into(),
            reason_code: None,
            invalidity_date: None,
        });
        let list = CertificateRevocationListParams {
            this_update: (next_update - HOUR * 24).into(),
            next_update: next_update.into(),
            crl_number: SerialNumber::from(1u64),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.issuer).unwrap().pem().unwrap()
    }

    pub(super) fn revoke(&self, serials: &[[u8; 16]]) -> String {
        self.list(serials, SystemTime::now() + HOUR)
    }
}

/// Positive as DER has it, and without a leading zero, so that it reads the same everywhere.
fn serial() -> [u8; 16] {
    let mut serial: [u8; 16] = rand::random();
    serial[0] = serial[0] & 0x7f | 0x40;
    serial
}

impl Issued {
    /// For one of our own that trusts `roots`.
    pub(super) fn trusting(&self, roots: &str) -> WorkloadCertificate {
        WorkloadCertificate::from_pem(&self.chain, &self.key, roots, &Clock::system()).unwrap()
    }

    pub(super) fn with(&self, roots: &str, rules: HandshakeRules) -> WorkloadCertificate {
        self.trusting(roots).with_rules(rules)
    }

    /// For a peer that shows it as it is, in the order that `order` makes of the chain.
    pub(super) fn shown(&self, order: fn(&mut Vec<CertificateDer<'static>>)) -> Arc<CertifiedKey> {
        let mut chain: Vec<_> =
            CertificateDer::pem_slice_iter(self.chain.as_bytes()).collect::<Result<_, _>>().unwrap();
        order(&mut chain);
        let key = PrivateKeyDer::from_pem_slice(self.key.as_bytes()).unwrap();
        Arc::new(CertifiedKey::new(chain, rustls::crypto::aws_lc_rs::sign::any_supported_type(&key).unwrap()))
    }
}

/// What a server with `own` makes of a client that shows `shown`.
pub(super) async fn judge_client(
    own: &WorkloadCertificate,
    shown: Arc<CertifiedKey>,
) -> Result<VerifiedPeer, TlsError> {
    let mut config = (*own.client_config(std::slice::from_ref(own.identity()))).clone();
    config.client_auth_cert_resolver = Arc::new(SingleCertAndKey::from(shown));
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let (near, far) = tokio::io::duplex(1 << 16);
    let name = ServerName::IpAddress(addr().ip().into());
    let (_, verdict) = tokio::join!(connector.connect(name, near), accept(own, far, addr()));
    verdict.map(|(_, peer)| peer)
}

/// What a client with `own` makes of a server that shows `shown`.
pub(super) async fn judge_server(
    own: &WorkloadCertificate,
    expected: &[Identity],
    shown: Arc<CertifiedKey>,
) -> Result<VerifiedPeer, TlsError> {
    let mut config = (*own.server_config()).clone();
    config.cert_resolver = Arc::new(SingleCertAndKey::from(shown));
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let (near, far) = tokio::io::duplex(1 << 16);
    let (verdict, _) = tokio::join!(connect(own, expected, near, addr()), acceptor.accept(far));
    verdict.map(|(_, peer)| peer)
}
