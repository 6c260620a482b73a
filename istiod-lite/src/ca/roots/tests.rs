use std::sync::LazyLock;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};

use super::*;
use crate::ca::authority::{CaMaterial, Issued, LeafLifetime};
use crate::ca::{CurrentAuthority, SELF_SIGNED_ROOT_TTL};
use crate::testing::accepts;

const START: OffsetDateTime = time::macros::datetime!(2030-01-01 0:00 UTC);
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

static CSR: LazyLock<String> = LazyLock::new(|| {
    let key = KeyPair::generate().unwrap();
    CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap()
});

fn authority(material: &CaMaterial) -> Arc<Authority> {
    Arc::new(Authority::from_material(material).unwrap())
}

fn root(ttl: Duration) -> CaMaterial {
    Authority::self_signed("cluster.local", ttl, START).unwrap()
}

fn some_root() -> CaMaterial {
    root(SELF_SIGNED_ROOT_TTL)
}

/// An intermediate below `root`.
fn below(root: &CaMaterial) -> CaMaterial {
    let issuer = Issuer::from_ca_cert_pem(&root.certificate, KeyPair::from_pem(&root.key).unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "intermediate");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    (params.not_before, params.not_after) = (START - MARGIN, START + SELF_SIGNED_ROOT_TTL);
    let certificate = params.signed_by(&key, &issuer).unwrap().pem();
    CaMaterial { certificate, key: key.serialize_pem(), chain: String::new(), roots: root.certificate.clone() }
}

/// A mesh whose operator changes its mind, by the hour.
struct Mesh {
    now: OffsetDateTime,
    roots: Roots,
    signing: Arc<Authority>,
    newest: Arc<Authority>,
    current: Arc<CurrentAuthority>,
    holders: Vec<Holder>,
}

/// A proxy: its certificate, and the roots that came with it.
struct Holder {
    issued: Issued,
    renew: OffsetDateTime,
}

impl Mesh {
    fn of(first: &CaMaterial) -> Self {
        let first = authority(first);
        let current = CurrentAuthority::new(Arc::clone(&first));
        let (newest, roots, holders) = (Arc::clone(&first), Roots::default(), Vec::new());
        let mut mesh = Self { now: START, roots, signing: first, newest, current, holders };
        mesh.look();
        mesh
    }

    fn plug_in(&mut self, material: &CaMaterial) {
        self.newest = authority(material);
        self.look();
    }

    fn last_end(&self) -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp(self.current.last_end()).unwrap()
    }

    /// In the order the keeper does it.
    fn look(&mut self) {
        self.roots.settle(&self.signing, self.last_end(), self.now);
        let next = Arc::clone(self.roots.decide(&self.signing, &self.newest, self.now));
        self.current.replace(Arc::new(next.handing_out(&self.roots.bundle())), None);
        let before = std::mem::replace(&mut self.signing, next);
        self.roots.settle(&before, self.last_end(), self.now);
        self.roots.settle(&self.signing, self.last_end(), self.now);
    }

    fn issue(&self, validity: Duration) -> Issued {
        let seconds = i64::try_from(validity.as_secs()).unwrap();
        let uri = "spiffe://cluster.local/ns/shop/sa/cart";
        self.current.sign(&CSR, uri, seconds, LeafLifetime::default(), self.now).unwrap()
    }

    /// Has a proxy join that renews when `part` of its certificate's life is over.
    fn hold(&self, validity: Duration, part: f64) -> Holder {
        let issued = self.issue(validity);
        let renew = self.now + (issued.not_after - self.now) * part;
        Holder { issued, renew }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.look();
    }

    fn signs(&self, material: &CaMaterial) -> bool {
        self.signing.own_roots() == authority(material).own_roots()
    }

    fn hands_out(&self, materials: &[&CaMaterial]) -> bool {
        let roots = materials.iter().map(|material| authority(material).own_roots().concat());
        self.current.load().root_bundle_pem() == roots.collect::<String>()
    }
}

#[test]
fn a_new_root_is_handed_out_before_it_signs_and_the_old_one_while_it_matters() {
    let (old, new) = (some_root(), some_root());
    let mut mesh = Mesh::of(&old);
    assert!(mesh.hands_out(&[&old]));
    mesh.issue(DAY);
    mesh.pass(HOUR);
    mesh.plug_in(&new);
    assert!(mesh.signs(&old) && mesh.hands_out(&[&old, &new]), "at once");
    // The certificate of an hour ago ends in 23 hours.
    mesh.pass(22 * HOUR);
    mesh.issue(DAY);
    assert!(mesh.signs(&old) && mesh.hands_out(&[&old, &new]));
    mesh.pass(HOUR + MARGIN);
    assert!(mesh.signs(&new) && mesh.hands_out(&[&old, &new]), "whoever had not seen the new root has run out");
    mesh.pass(22 * HOUR);
    assert!(mesh.hands_out(&[&old, &new]), "the last one of the old root lives");
    mesh.pass(2 * HOUR);
    assert!(mesh.signs(&new) && mesh.hands_out(&[&new]));
}

#[test]
fn a_root_that_was_taken_back_leaves_no_trace() {
    let (old, new) = (some_root(), some_root());
    let mut mesh = Mesh::of(&old);
    mesh.issue(DAY);
    mesh.plug_in(&new);
    mesh.pass(HOUR);
    mesh.plug_in(&old);
    assert!(mesh.signs(&old) && mesh.hands_out(&[&old]));
}

#[test]
fn what_everybody_accepts_already_signs_at_once() {
    let old = some_root();
    let renewed = Authority::renewed(&old, SELF_SIGNED_ROOT_TTL, START + HOUR).unwrap();
    let mut mesh = Mesh::of(&old);
    let holder = mesh.hold(DAY, 0.5);
    mesh.pass(HOUR);
    mesh.plug_in(&renewed);
    assert!(mesh.signs(&renewed) && mesh.hands_out(&[&old, &renewed]), "the same key");
    accepts(&holder.issued.roots, &mesh.issue(DAY), mesh.now).unwrap();

    let mut mesh = Mesh::of(&below(&old));
    let holder = mesh.hold(DAY, 0.5);
    mesh.pass(HOUR);
    let other = below(&old);
    mesh.plug_in(&other);
    assert!(mesh.signing.signs_as(&mesh.newest), "another intermediate below the same root");
    accepts(&holder.issued.roots, &mesh.issue(DAY), mesh.now).unwrap();
}

#[test]
fn an_intermediate_as_its_own_root_waits_although_a_known_root_has_signed_it() {
    let root = some_root();
    let pinned = CaMaterial { roots: String::new(), ..below(&root) };
    let mut mesh = Mesh::of(&root);
    let holder = mesh.hold(DAY, 0.5);
    mesh.pass(HOUR);
    mesh.plug_in(&pinned);
    assert!(mesh.signs(&root), "nobody would be sent the certificate between");
    accepts(&holder.issued.roots, &mesh.issue(DAY), mesh.now).unwrap();
}

#[test]
fn who_can_sign_no_more_is_replaced_before_the_time() {
    let (old, new) = (root(2 * DAY), some_root());
    let mut mesh = Mesh::of(&old);
    mesh.pass(DAY + 12 * HOUR);
    mesh.issue(DAY);
    mesh.plug_in(&new);
    assert!(mesh.signs(&old));
    mesh.pass(12 * HOUR);
    assert!(mesh.signs(&new) && mesh.hands_out(&[&new]), "the old one has run out");
}

#[test]
fn roots_below_which_nothing_is_signed_are_trusted_while_the_operator_names_them() {
    let (own, friend) = (some_root(), some_root());
    let both = CaMaterial { roots: format!("{}{}", own.certificate, friend.certificate), ..own.clone() };
    let mut mesh = Mesh::of(&own);
    mesh.plug_in(&both);
    assert!(mesh.hands_out(&[&own, &friend]));
    mesh.plug_in(&own);
    assert!(mesh.hands_out(&[&own]));
}

#[test]
fn what_has_ended_while_it_waited_does_not_take_over() {
    let (old, new) = (some_root(), root(2 * DAY));
    let mut mesh = Mesh::of(&old);
    mesh.issue(3 * DAY);
    mesh.plug_in(&new);
    for _ in 0..4 {
        mesh.pass(DAY);
        assert!(mesh.signs(&old), "{}", mesh.now);
    }
    mesh.issue(DAY);
}

#[test]
fn of_two_that_write_down_what_they_know_the_later_date_counts() {
    let (old, new) = (some_root(), some_root());
    let mut mesh = Mesh::of(&old);
    mesh.plug_in(&new);
    mesh.pass(HOUR);
    let early = mesh.roots.clone();
    let read: Roots = serde_json::from_str(&serde_json::to_string(&early).unwrap()).unwrap();
    assert_eq!(read, early);

    let mut late = Mesh::of(&old);
    late.pass(HOUR);
    late.plug_in(&new);
    late.pass(HOUR);
    let (mut one, mut other) = (early.clone(), late.roots.clone());
    one.merge(late.roots.clone(), START, START);
    other.merge(early.clone(), START, START);
    assert_eq!(one, late.roots);
    assert_eq!(other, late.roots);
    assert!(early.is_covered_by(&late.roots) && !late.roots.is_covered_by(&early));
}

#[test]
fn what_another_replica_hands_out_is_handed_out_here_for_as_long() {
    let (old, new) = (some_root(), some_root());
    let (mut one, mut other) = (Mesh::of(&old), Mesh::of(&old));
    one.plug_in(&new);
    other.issue(2 * DAY);
    other.roots.merge(one.roots.clone(), other.last_end(), other.now);
    other.look();
    assert!(other.signs(&old) && other.hands_out(&[&old, &new]), "it has not seen the operator's change yet");
    other.newest = authority(&new);
    for (passed, signs) in [(DAY, &old), (DAY, &old), (HOUR, &new)] {
        other.pass(passed);
        assert!(other.signs(signs), "what it issued without the new root is about for two days");
    }

    let mut other = Mesh::of(&old);
    other.roots.merge(one.roots.clone(), other.last_end(), other.now);
    other.look();
    one.plug_in(&old);
    other.roots.merge(one.roots.clone(), other.last_end(), other.now);
    other.look();
    assert!(other.hands_out(&[&old]), "taken back");
}

/// Two replicas that see an operator's change up to two minutes apart, and what the other has written down.
#[test]
fn nobody_is_refused_whichever_replica_has_signed() {
    let (a, b) = (some_root(), some_root());
    let choices = [&a, &b, &below(&a), &below(&b)];
    let minute = Duration::from_secs(60);
    let mut switches = 0;
    for seed in 0..3 {
        let mut random = StdRng::seed_from_u64(seed);
        let mut replicas = [Mesh::of(&a), Mesh::of(&a)];
        let mut ledger = replicas[0].roots.clone();
        let mut wanted = authority(&a);
        let mut holders: Vec<Holder> = Vec::new();
        for step in 0..700 {
            if random.random_ratio(1, 120) {
                wanted = authority(choices[random.random_range(0..choices.len())]);
            }
            for replica in &mut replicas {
                replica.now = START + minute * step;
                if random.random_ratio(1, 2) || step % 2 == 0 {
                    replica.newest = Arc::clone(&wanted);
                }
                replica.roots.merge(ledger.clone(), replica.last_end(), replica.now);
                let before = (Arc::clone(&replica.signing), replica.roots.clone());
                replica.look();
                switches += usize::from(!before.0.signs_as(&replica.signing));
                if !replica.roots.is_covered_by(&ledger) || replica.roots.lack_one_of(&before.1) {
                    ledger = serde_json::from_str(&serde_json::to_string(&replica.roots).unwrap()).unwrap();
                }
            }
            let now = replicas[0].now;
            holders.retain(|holder| now < holder.renew);
            while holders.len() < 4 {
                // One has all the clients for most of the time.
                let replica = &replicas[usize::from(random.random_ratio(1, 8))];
                holders.push(replica.hold(minute * random.random_range(5..120), 0.9));
            }
            for one in &holders {
                let distributed = replicas.iter().map(|replica| replica.current.load().root_bundle_pem());
                for roots in holders.iter().map(|other| other.issued.roots.clone()).chain(distributed) {
                    let outcome = accepts(&roots, &one.issued, now);
                    assert!(outcome.is_ok(), "seed {seed}, {now}: {outcome:?}");
                }
            }
        }
        let [one, other] = &mut replicas;
        (one.now, other.now) = (one.now + DAY, other.now + DAY);
        (one.newest, other.newest) = (Arc::clone(&wanted), wanted);
        for _ in 0..3 {
            one.roots.merge(other.roots.clone(), one.last_end(), one.now);
            one.look();
            other.roots.merge(one.roots.clone(), other.last_end(), other.now);
            other.look();
        }
        assert_eq!(one.current.load().root_bundle_pem(), other.current.load().root_bundle_pem(), "seed {seed}");
    }
    assert!(switches > 8, "{switches} changes of who signs");
}

/// Whatever an operator plugs in, and whenever: each valid certificate is accepted under the roots of each other one, and
/// under those that are distributed at the moment.
#[test]
fn nobody_is_ever_refused_through_a_change_of_roots() {
    let (a, b, c) = (some_root(), some_root(), root(6 * DAY));
    let renewed = Authority::renewed(&a, SELF_SIGNED_ROOT_TTL, START).unwrap();
    let with_both = |material: CaMaterial| CaMaterial { roots: a.certificate.clone() + &b.certificate, ..material };
    let pinned = CaMaterial { roots: String::new(), ..below(&a) };
    let choices = [&a, &renewed, &b, &c, &below(&a), &below(&b), &with_both(a.clone()), &with_both(below(&b)), &pinned];
    let mut switches = 0;
    for seed in 0..5 {
        let mut random = StdRng::seed_from_u64(seed);
        let mut mesh = Mesh::of(choices[random.random_range(0..choices.len())]);
        let hold = |mesh: &Mesh, random: &mut StdRng| {
            mesh.hold(HOUR * random.random_range(1..30), [0.5, 0.5, 1.0][random.random_range(0..3)])
        };
        mesh.holders = (0..3).map(|_| hold(&mesh, &mut random)).collect();
        for _ in 0..120 {
            mesh.now += HOUR * random.random_range(1..4);
            if random.random_ratio(1, 16) {
                let choice = authority(choices[random.random_range(0..choices.len())]);
                // What is about to end is not plugged in: nobody can help those who do.
                if mesh.now + 4 * DAY <= choice.not_after() {
                    mesh.newest = choice;
                }
            }
            // As through a restart, or another replica's hands.
            mesh.roots = serde_json::from_str(&serde_json::to_string(&mesh.roots).unwrap()).unwrap();
            let before = Arc::clone(&mesh.signing);
            mesh.look();
            switches += usize::from(!before.signs_as(&mesh.signing));
            if mesh.now >= mesh.signing.not_after() {
                break;
            }
            for at in 0..mesh.holders.len() {
                if mesh.holders[at].renew <= mesh.now {
                    mesh.holders[at] = hold(&mesh, &mut random);
                }
            }
            let distributed = mesh.current.load().root_bundle_pem();
            for one in &mesh.holders {
                let bundles = mesh.holders.iter().map(|other| &other.issued.roots).chain([&distributed]);
                for roots in bundles {
                    let outcome = accepts(roots, &one.issued, mesh.now);
                    assert!(outcome.is_ok(), "seed {seed}, {}: {outcome:?}", mesh.now);
                }
            }
        }
    }
    assert!(switches > 8, "{switches} changes of who signs");
}
