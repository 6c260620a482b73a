use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::pem::parse_x509_pem;

use super::*;

const NOW: OffsetDateTime = time::macros::datetime!(2030-01-01 0:00 UTC);
const SPIFFE: &str = "spiffe://cluster.local/ns/shop/sa/cart";

fn authority() -> Authority {
    Authority::from_material(&Authority::self_signed("cluster.local", SELF_SIGNED_ROOT_TTL, NOW).unwrap()).unwrap()
}

fn csr() -> String {
    let key = KeyPair::generate().unwrap();
    CertificateParams::new(["ignored.example".to_owned()]).unwrap().serialize_request(&key).unwrap().pem().unwrap()
}

fn sign(validity: i64) -> Result<Issued, SignError> {
    authority().sign(&csr(), SPIFFE, validity, LeafLifetime::default(), NOW)
}

/// An intermediate below a root, with the root.
fn intermediate() -> (CaMaterial, String) {
    intermediate_below(&Authority::self_signed("corp", SELF_SIGNED_ROOT_TTL, NOW).unwrap())
}

fn intermediate_below(root: &CaMaterial) -> (CaMaterial, String) {
    let issuer = Issuer::from_ca_cert_pem(&root.certificate, KeyPair::from_pem(&root.key).unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "intermediate");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.not_before = NOW - CLOCK_SKEW;
    params.not_after = NOW + Duration::from_secs(3600);
    let certificate = params.signed_by(&key, &issuer).unwrap().pem();
    let material =
        CaMaterial { certificate, key: key.serialize_pem(), chain: String::new(), roots: root.certificate.clone() };
    (material, root.certificate.clone())
}

#[test]
fn a_leaf_has_the_properties_peers_check() {
    let issued = sign(3600).unwrap();
    let (_, pem) = parse_x509_pem(issued.leaf.as_bytes()).unwrap();
    let leaf = pem.parse_x509().unwrap();
    assert_eq!(leaf.subject().iter().count(), 0, "the subject is empty");
    assert_eq!(leaf.validity().not_before.to_datetime(), NOW - CLOCK_SKEW);
    assert_eq!(leaf.validity().not_after.to_datetime(), NOW + Duration::from_secs(3600));
    assert!(!leaf.is_ca());
    assert!((15..=16).contains(&leaf.raw_serial().len()));
    let usage = leaf.key_usage().unwrap().unwrap().value;
    assert!(usage.digital_signature() && usage.key_encipherment() && !usage.key_cert_sign());
    let extended = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(extended.server_auth && extended.client_auth);
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(names.critical);
    assert_eq!(names.value.general_names, [GeneralName::URI(SPIFFE)], "nothing of the CSR but its key");
    assert!(leaf.extensions().iter().any(|e| matches!(e.parsed_extension(), ParsedExtension::BasicConstraints(_))));
}

#[test]
fn serial_numbers_differ() {
    let serial_of = |issued: Issued| {
        let (_, pem) = parse_x509_pem(issued.leaf.as_bytes()).unwrap();
        pem.parse_x509().unwrap().raw_serial().to_vec()
    };
    assert_ne!(serial_of(sign(60).unwrap()), serial_of(sign(60).unwrap()));
}

#[test]
fn the_validity_asked_for_is_bounded() {
    let lifetime = LeafLifetime::default();
    for none in [0, -1, i64::MIN] {
        assert_eq!(sign(none).unwrap().not_after, NOW + lifetime.default);
    }
    let max = i64::try_from(lifetime.max.as_secs()).unwrap();
    assert_eq!(sign(max).unwrap().not_after, NOW + lifetime.max);
    assert!(matches!(sign(max + 1), Err(SignError::LifetimeTooLong { .. })));
    assert!(matches!(sign(i64::MAX), Err(SignError::LifetimeTooLong { .. })));
}

#[test]
fn a_csr_not_signed_by_its_own_key_is_refused() {
    let mut der = CertificateSigningRequestDer::from_pem_slice(csr().as_bytes()).unwrap().to_vec();
    // The last byte belongs to the signature.
    *der.last_mut().unwrap() ^= 1;
    let pem = to_pem(&CertificateDer::from(der)).replace("CERTIFICATE", "CERTIFICATE REQUEST");
    let refused = authority().sign(&pem, SPIFFE, 60, LeafLifetime::default(), NOW);
    assert!(matches!(refused, Err(SignError::BadSignature)), "{refused:?}");
}

#[test]
fn what_is_no_csr_is_refused() {
    let truncated = csr().lines().take(3).collect::<Vec<_>>().join("\n");
    for text in ["", "garbage", &truncated, &sign(60).unwrap().leaf] {
        let refused = authority().sign(text, SPIFFE, 60, LeafLifetime::default(), NOW);
        assert!(matches!(refused, Err(SignError::Unparsable(_))), "{refused:?}");
    }
}

#[test]
fn no_leaf_outlives_its_signer() {
    let (material, root) = intermediate();
    let authority = Authority::from_material(&material).unwrap();
    let issued = authority.sign(&csr(), SPIFFE, 86_400, LeafLifetime::default(), NOW).unwrap();
    assert_eq!(issued.not_after, NOW + Duration::from_secs(3600));
    let late = authority.sign(&csr(), SPIFFE, 60, LeafLifetime::default(), NOW + Duration::from_secs(3600));
    assert!(matches!(late, Err(SignError::CaExpired)));

    let chain = issued.into_cert_chain();
    assert_eq!(chain.len(), 3, "leaf, intermediate, roots");
    assert_eq!(chain[1].trim().replace('\r', ""), material.certificate.trim().replace('\r', ""));
    assert_eq!(chain[2].trim().replace('\r', ""), root.trim().replace('\r', ""));
}

#[test]
fn no_leaf_outlives_the_last_root_above_it() {
    let half = Duration::from_secs(1800);
    let (material, _) = intermediate_below(&Authority::self_signed("corp", half, NOW).unwrap());
    let end = |material: &CaMaterial| Authority::from_material(material).unwrap().not_after();
    assert_eq!(end(&material), NOW + half, "there are clients that look at it");
    let unrelated = Authority::self_signed("other", SELF_SIGNED_ROOT_TTL, NOW).unwrap();
    let roots = material.roots.clone() + &unrelated.certificate;
    assert_eq!(end(&CaMaterial { roots, ..material }), NOW + half);

    let root = Authority::self_signed("corp", half, NOW).unwrap();
    let renewed = Authority::renewed(&root, SELF_SIGNED_ROOT_TTL, NOW).unwrap();
    let (material, _) = intermediate_below(&root);
    let roots = root.certificate.clone() + &renewed.certificate;
    assert_eq!(end(&CaMaterial { roots, ..material }), NOW + 2 * half);
}

#[test]
fn a_self_signed_authority_answers_leaf_and_root() {
    let authority = authority();
    let issued = authority.sign(&csr(), SPIFFE, 60, LeafLifetime::default(), NOW).unwrap();
    let chain = issued.into_cert_chain();
    assert_eq!(chain.len(), 2);
    assert_eq!(chain[1], authority.root_bundle_pem());
}

#[test]
fn material_that_cannot_work_is_refused() {
    let good = Authority::self_signed("cluster.local", SELF_SIGNED_ROOT_TTL, NOW).unwrap();
    let other = Authority::self_signed("cluster.local", SELF_SIGNED_ROOT_TTL, NOW).unwrap();
    let refuse = |material: CaMaterial| Authority::from_material(&material).err().expect("refused");

    assert!(matches!(refuse(CaMaterial { key: other.key.clone(), ..good.clone() }), MaterialError::KeyMismatch));
    assert!(matches!(
        refuse(CaMaterial { roots: other.certificate.clone(), ..good.clone() }),
        MaterialError::Unanchored
    ));
    assert!(matches!(refuse(CaMaterial { key: String::new(), ..good.clone() }), MaterialError::Unreadable { .. }));
    assert!(matches!(refuse(CaMaterial { certificate: String::new(), ..good }), MaterialError::Unreadable { .. }));

    let key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new(["a".to_owned()]).unwrap().self_signed(&key).unwrap().pem();
    let leaf = CaMaterial { certificate: leaf, key: key.serialize_pem(), chain: String::new(), roots: String::new() };
    assert!(matches!(refuse(leaf), MaterialError::NotACa));
}

#[test]
fn material_whose_certificates_nobody_accepts_is_refused() {
    // No authority may stand below this one.
    let (material, root) = intermediate();
    let (below, _) = intermediate_below(&material);
    let below = CaMaterial { chain: material.certificate.clone(), roots: root, ..below };
    let refused = Authority::from_material(&below).err().expect("refused");
    assert!(matches!(&refused, MaterialError::Unacceptable(_)), "{refused}");
    assert!(refused.to_string().starts_with("proxies would not accept what it signs: "), "{refused}");
}

#[test]
fn a_chain_file_that_repeats_signer_and_root_is_sent_without_the_root() {
    let (mut material, root) = intermediate();
    material.chain = format!("{}{}", material.certificate, root);
    let authority = Authority::from_material(&material).unwrap();
    assert_eq!(authority.intermediates.len(), 1);
}

/// RSA 1024 with SHA-1.
const WEAK: &str = "\
-----BEGIN CERTIFICATE REQUEST-----
MIIBPzCBqQIBADAAMIGfMA0GCSqGSIb3DQEBAQUAA4GNADCBiQKBgQDIXwxGU2Lc
9XCcOseGhT68e7rgudr5oefgurgW378lRIEvEQuvA/xWzAlA2mMrCdHfgBRCrXXM
9vB7GaySpkWzhmOdqviW8v8R7OgSaDt4/b4Z6SIdZhnbqwD2mDJp3Iz1jeElCApj
zOTn5O9s7P2tCVy7sH7bZrnfzo/PSp/D2QIDAQABoAAwDQYJKoZIhvcNAQEFBQAD
gYEAl1VntxNoncKZxF16xbg+KCq+ZbOK+rLe1FC+L66u6Elxdkb1SzN/roCL6i47
7gxO9RcmsgG7h//xY1Ib1O5fcQL0zQkEYL0qTPMYEqwSdi4j7MBWYQFz0vrkZmDd
ULvTFa3oWz3KS/8mCJt8aOc+s8I0Mx6azDQJtZ9ZQlD3a6M=
-----END CERTIFICATE REQUEST-----
";

/// RSA 2048 with SHA-256, as some clients ask for.
const RSA: &str = "\
-----BEGIN CERTIFICATE REQUEST-----
MIICRTCCAS0CAQAwADCCASIwDQYJKoZIhvcNAQEBBQADggEPADCCAQoCggEBAL+8
kyvq6gpLxjajbtq3c54KK4e25D5X6Mbzo0t48ZlADIAEZXL14m5H27teJRprkC4D
yzLNWvjO0amRRlTsX50J/vP2GptorTur/+/iImhu44hqOL36A+ETAOu74Js35e0n
O5fM7teeI/W1VkQ9Cp12J4HSrmI0m639wpE1ymYLIjeNgk+ibhaiel6F92w0+HRh
OhsIXMTgU7lbXZeUawvixtJrkUWvvupyobdmLU6WtAM+kz7fWz3m2P1pFnbxzo/j
1AymSeDF2mJajM0v7axY2kb9laPaiK/Tvizl68DPlyMWKk1zqlZOYw04g/kcX90x
HiQlUszalroGrogxDaUCAwEAAaAAMA0GCSqGSIb3DQEBCwUAA4IBAQC22XHrjhHt
1iEybTbfXIfP5qHdmzPbyI3sS9Axwt+tkxHeQBqykVdU+rIBbJ5FquaZ+qxKXADs
cdVOpBzuDCrpz1XryIPnzkKy9+iAB7CtH5Q1398ZiBbvcRt8pbjBrN3eMmt7u0fp
Fi+iKicfjP9+BtAYopSxOVb/aZ4iwsJp86W6fRF7wIVO3GcuyWorSywH4sujnjgw
Y2BBKzYqtNrwDkvFhYUQ60jqprzaOzNf50r/UzT8SjrPrWbSMepbNmxfvyCwDAXl
ZuBaNiTlmPWH/AY4NitRJLQG0ttAvo7doR8ho05fip42qadDryyLyvy+th/OZ31L
Uz0LwQRJuCKC
-----END CERTIFICATE REQUEST-----
";

#[test]
fn rsa_keys_are_signed_unless_they_are_weak() {
    let sign = |csr: &str| authority().sign(csr, SPIFFE, 60, LeafLifetime::default(), NOW);
    sign(RSA).unwrap();
    assert!(matches!(sign(WEAK), Err(SignError::UnsupportedKey)));
}

/// A root as Istio makes them: its name is a PrintableString, and the identifier of its key is not the one we would give.
fn istios_root() -> CaMaterial {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let name = DnValue::PrintableString("cluster.local".try_into().unwrap());
    params.distinguished_name.push(DnType::OrganizationName, name);
    params.key_identifier_method = KeyIdMethod::PreSpecified(vec![7; 20]);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    (params.not_before, params.not_after) = (NOW, NOW + Duration::from_secs(3600));
    let certificate = params.self_signed(&key).unwrap().pem();
    CaMaterial { roots: certificate.clone(), certificate, key: key.serialize_pem(), chain: String::new() }
}

#[test]
fn a_renewed_root_signs_what_the_old_one_did() {
    for old in [istios_root(), Authority::self_signed("cluster.local", SELF_SIGNED_ROOT_TTL, NOW).unwrap()] {
        let later = NOW + Duration::from_secs(3000);
        let new = Authority::renewed(&old, SELF_SIGNED_ROOT_TTL, later).unwrap();
        assert_eq!((new.key == old.key, new.certificate == old.certificate), (true, false));
        assert_eq!(new.roots.is_empty(), old.roots.is_empty());
        let parts = |material: &CaMaterial| {
            let (_, pem) = parse_x509_pem(material.certificate.as_bytes()).unwrap();
            let parsed = pem.parse_x509().unwrap();
            let identifier = parsed.extensions().iter().find_map(|extension| match extension.parsed_extension() {
                ParsedExtension::SubjectKeyIdentifier(identifier) => Some(identifier.0.to_vec()),
                _ => None,
            });
            (parsed.subject().as_raw().to_vec(), parsed.public_key().raw.to_vec(), identifier)
        };
        assert_eq!(parts(&new), parts(&old));
        let (from, end) = Authority::from_material(&new).unwrap().validity();
        assert_eq!((from, end), (later - CLOCK_SKEW, later + SELF_SIGNED_ROOT_TTL));
    }
}

#[test]
fn what_is_no_root_of_its_own_is_not_renewed() {
    let (intermediate, _) = intermediate();
    let pinned = CaMaterial { roots: String::new(), ..intermediate.clone() };
    for material in [intermediate, pinned] {
        let refused = Authority::renewed(&material, SELF_SIGNED_ROOT_TTL, NOW).err();
        assert!(matches!(refused, Some(RenewError::NotARoot)), "{refused:?}");
    }
}

#[test]
fn trust_follows_what_is_sent_along() {
    let (material, root) = intermediate();
    let below = Authority::from_material(&material).unwrap();
    assert!(below.is_trusted_below([&*root]));
    assert!(!below.is_trusted_below([]));
    assert!(!below.is_trusted_below([&*istios_root().certificate]));
    // Its own root: it is not sent along, so the root above helps nobody.
    let pinned = Authority::from_material(&CaMaterial { roots: String::new(), ..material.clone() }).unwrap();
    assert!(pinned.is_trusted_below([&*material.certificate]));
    assert!(!pinned.is_trusted_below([&*root]));
}
