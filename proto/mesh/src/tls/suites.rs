//! The two AES suites of TLS 1.3, with AES-GCM from whichever of two libraries is the faster on this CPU.
//!
//! All cryptography is aws-lc's but for one thing: on x86-64 CPUs that have the vector forms of AES and carry-less
//! multiplication in 256 bits and no AVX-512, its AES-GCM goes a block at a time, while ring's uses them and is about twice
//! as fast. There a record is sealed and opened by ring; keys, hashes and signatures stay where they are.

use std::sync::LazyLock;

use ring::aead;
use rustls::{
    ConnectionTrafficSecrets, ContentType, Error, ProtocolVersion, SupportedCipherSuite, Tls13CipherSuite,
    crypto::{
        CipherSuiteCommon, aws_lc_rs,
        cipher::{
            AeadKey, InboundOpaqueMessage, InboundPlainMessage, Iv, MessageDecrypter, MessageEncrypter, Nonce,
            OutboundOpaqueMessage, OutboundPlainMessage, PrefixedPayload, Tls13AeadAlgorithm,
            UnsupportedOperationError, make_tls13_aad,
        },
    },
};

/// The suites, in no order.
pub(super) struct Suites {
    pub(super) aes128: SupportedCipherSuite,
    pub(super) aes256: SupportedCipherSuite,
}

/// The fastest this CPU has.
pub(super) fn suites() -> Suites {
    if is_better_with_ring() {
        return Suites {
            aes128: SupportedCipherSuite::Tls13(&RING_AES_128),
            aes256: SupportedCipherSuite::Tls13(&RING_AES_256),
        };
    }
    Suites {
        aes128: aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
        aes256: aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
    }
}

#[cfg(target_arch = "x86_64")]
fn is_better_with_ring() -> bool {
    use std::arch::is_x86_feature_detected as has;
    has!("avx2") && has!("vaes") && has!("vpclmulqdq") && !has!("avx512f")
}

#[cfg(not(target_arch = "x86_64"))]
fn is_better_with_ring() -> bool {
    false
}

static AES_128_GCM: AesGcm = AesGcm(&aead::AES_128_GCM);
static AES_256_GCM: AesGcm = AesGcm(&aead::AES_256_GCM);
static RING_AES_128: LazyLock<Tls13CipherSuite> =
    LazyLock::new(|| by_ring(aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256, &AES_128_GCM));
static RING_AES_256: LazyLock<Tls13CipherSuite> =
    LazyLock::new(|| by_ring(aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384, &AES_256_GCM));

fn by_ring(suite: SupportedCipherSuite, aead_alg: &'static AesGcm) -> Tls13CipherSuite {
    let SupportedCipherSuite::Tls13(suite) = suite else { unreachable!("a suite of TLS 1.3 by its name") };
    let CipherSuiteCommon { suite: name, hash_provider, confidentiality_limit } = suite.common;
    Tls13CipherSuite {
        common: CipherSuiteCommon { suite: name, hash_provider, confidentiality_limit },
        hkdf_provider: suite.hkdf_provider,
        aead_alg,
        quic: None,
    }
}

/// AES-GCM by ring as a record layer's AEAD.
struct AesGcm(&'static aead::Algorithm);

/// One direction's key.
struct Direction {
    key: aead::LessSafeKey,
    iv: Iv,
}

impl AesGcm {
    fn direction(&self, key: &AeadKey, iv: Iv) -> Direction {
        let key = aead::UnboundKey::new(self.0, key.as_ref()).expect("rustls makes keys as long as asked for");
        Direction { key: aead::LessSafeKey::new(key), iv }
    }
}

impl Direction {
    fn nonce(&self, seq: u64) -> aead::Nonce {
        aead::Nonce::assume_unique_for_key(Nonce::new(&self.iv, seq).0)
    }

    fn tag_len(&self) -> usize {
        self.key.algorithm().tag_len()
    }
}

impl Tls13AeadAlgorithm for AesGcm {
    fn encrypter(&self, key: AeadKey, iv: Iv) -> Box<dyn MessageEncrypter> {
        Box::new(self.direction(&key, iv))
    }

    fn decrypter(&self, key: AeadKey, iv: Iv) -> Box<dyn MessageDecrypter> {
        Box::new(self.direction(&key, iv))
    }

    fn key_len(&self) -> usize {
        self.0.key_len()
    }

    /// For kernel TLS, which is not used.
    fn extract_keys(&self, _: AeadKey, _: Iv) -> Result<ConnectionTrafficSecrets, UnsupportedOperationError> {
        Err(UnsupportedOperationError)
    }
}

/// RFC 8446, section 5.2: the content's type follows the content, and the tag both.
impl MessageEncrypter for Direction {
    fn encrypt(&mut self, message: OutboundPlainMessage<'_>, seq: u64) -> Result<OutboundOpaqueMessage, Error> {
        let len = self.encrypted_payload_len(message.payload.len());
        let mut record = PrefixedPayload::with_capacity(len);
        record.extend_from_chunks(&message.payload);
        record.extend_from_slice(&[u8::from(message.typ)]);
        let aad = aead::Aad::from(make_tls13_aad(len));
        let tag = self.key.seal_in_place_separate_tag(self.nonce(seq), aad, record.as_mut());
        record.extend_from_slice(tag.map_err(|_| Error::EncryptError)?.as_ref());
        // What a record of TLS 1.3 says of itself on the outside.
        Ok(OutboundOpaqueMessage::new(ContentType::ApplicationData, ProtocolVersion::TLSv1_2, record))
    }

    fn encrypted_payload_len(&self, payload_len: usize) -> usize {
        payload_len + 1 + self.tag_len()
    }
}

impl MessageDecrypter for Direction {
    fn decrypt<'a>(
        &mut self,
        mut message: InboundOpaqueMessage<'a>,
        seq: u64,
    ) -> Result<InboundPlainMessage<'a>, Error> {
        if message.payload.len() < self.tag_len() {
            return Err(Error::DecryptError);
        }
        let aad = aead::Aad::from(make_tls13_aad(message.payload.len()));
        let opened = self.key.open_in_place(self.nonce(seq), aad, &mut message.payload);
        let len = opened.map_err(|_| Error::DecryptError)?.len();
        message.payload.truncate(len);
        message.into_tls13_unpadded_message()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        sync::Arc,
    };

    use rcgen::{CertifiedKey, generate_simple_self_signed};
    use rustls::{
        CipherSuite, ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig, ServerConnection,
        crypto::CryptoProvider, pki_types::PrivateKeyDer,
    };

    use super::*;

    /// Ring's and aws-lc's, of the same name.
    const PAIRS: [(&LazyLock<Tls13CipherSuite>, SupportedCipherSuite); 2] = [
        (&RING_AES_128, aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256),
        (&RING_AES_256, aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384),
    ];

    fn provider(suite: SupportedCipherSuite) -> Arc<CryptoProvider> {
        Arc::new(CryptoProvider { cipher_suites: vec![suite], ..aws_lc_rs::default_provider() })
    }

    /// A session between the two suites, established.
    fn session(client: SupportedCipherSuite, server: SupportedCipherSuite) -> [Connection; 2] {
        let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let key = PrivateKeyDer::try_from(signing_key.serialize_der()).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(cert.der().clone()).unwrap();
        let client = ClientConfig::builder_with_provider(provider(client))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let server = ServerConfig::builder_with_provider(provider(server))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], key)
            .unwrap();
        let client = ClientConnection::new(Arc::new(client), "localhost".try_into().unwrap()).unwrap();
        let mut ends = [client.into(), ServerConnection::new(Arc::new(server)).unwrap().into()];
        while ends.iter().any(|end: &Connection| end.is_handshaking()) {
            for from in [0, 1] {
                carry(&mut ends, from, |_| {}).unwrap();
            }
        }
        ends
    }

    /// Brings what one end has written to the other and says what that read; `change` sees it on its way.
    fn carry(ends: &mut [Connection; 2], from: usize, change: impl Fn(&mut [u8])) -> Result<Vec<u8>, Error> {
        let mut wire = Vec::new();
        while ends[from].wants_write() {
            ends[from].write_tls(&mut wire).unwrap();
        }
        change(&mut wire);
        let mut wire = &wire[..];
        let mut said = Vec::new();
        while !wire.is_empty() {
            ends[1 - from].read_tls(&mut wire).unwrap();
            let came = ends[1 - from].process_new_packets()?.plaintext_bytes_to_read();
            let before = said.len();
            said.resize(before + came, 0);
            ends[1 - from].reader().read_exact(&mut said[before..]).unwrap();
        }
        Ok(said)
    }

    #[test]
    fn each_library_reads_what_the_other_wrote_also_after_a_change_of_keys() {
        for (ring, aws) in PAIRS {
            let ring = SupportedCipherSuite::Tls13(ring);
            for (client, server) in [(ring, aws), (aws, ring), (ring, ring)] {
                let mut ends = session(client, server);
                assert_eq!(ends[0].negotiated_cipher_suite().unwrap().suite(), aws.suite());
                for round in 0..3 {
                    // Of all lengths around a record's, and none.
                    for len in [0, 1, 2, 100, 16_383, 16_384, 16_385, 40_000] {
                        let bytes: Vec<u8> = (0..len).map(|n| (n * 7 + round) as u8).collect();
                        for from in [0, 1] {
                            ends[from].writer().write_all(&bytes).unwrap();
                            let said = carry(&mut ends, from, |_| {}).unwrap();
                            assert!(said == bytes, "{len} bytes from {from}");
                        }
                    }
                    ends[round % 2].refresh_traffic_keys().unwrap();
                }
            }
        }
    }

    #[test]
    fn one_changed_bit_anywhere_in_a_record_ends_the_session() {
        for (ring, aws) in PAIRS {
            let ring = SupportedCipherSuite::Tls13(ring);
            // The record's stated length is not among them: with another one it is another record.
            for at in [5, 6, 50, 5 + 100, 5 + 101, 5 + 116] {
                let mut ends = session(aws, ring);
                ends[0].writer().write_all(&[1; 100]).unwrap();
                let refused = carry(&mut ends, 0, |wire| wire[at] ^= 0x10);
                assert_eq!(refused, Err(Error::DecryptError), "{at}");
            }
            // One without room for a tag.
            let mut ends = session(aws, ring);
            ends[0].writer().write_all(&[1; 100]).unwrap();
            let mut short = vec![23, 3, 3, 0, 10];
            short.extend([0; 10]);
            ends[1].read_tls(&mut &short[..]).unwrap();
            assert_eq!(ends[1].process_new_packets().err(), Some(Error::DecryptError));
        }
    }

    #[test]
    fn both_suites_are_there_whatever_the_cpu() {
        let Suites { aes128, aes256 } = suites();
        assert_eq!(aes128.suite(), CipherSuite::TLS13_AES_128_GCM_SHA256);
        assert_eq!(aes256.suite(), CipherSuite::TLS13_AES_256_GCM_SHA384);
    }
}
