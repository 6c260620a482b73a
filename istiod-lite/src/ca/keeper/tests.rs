use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use kube::api::ObjectMeta;
use mesh::identity::Revocations;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, IsCa, Issuer, KeyIdMethod, KeyPair,
    KeyUsagePurpose, SerialNumber,
};
use serde_json::{Value, json};

use super::*;
use crate::ca::authority::{CaMaterial, Issued};
use crate::ca::source::{PLUGGED_IN, SELF_SIGNED, SELF_SIGNED_TYPE};
use crate::resources::lock;
use crate::testing::{FakeApi, accepts};

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// A namespace's Secrets behind the Kubernetes API.
#[derive(Clone, Default)]
struct Secrets(Arc<Mutex<BTreeMap<String, Value>>>);

impl Secrets {
    fn put(&self, name: &str, keys: &[(&str, &str)]) {
        let data = keys.iter().map(|(key, text)| (key.to_string(), ByteString(text.as_bytes().to_vec()))).collect();
        let metadata = ObjectMeta { name: Some(name.into()), ..ObjectMeta::default() };
        let secret = Secret { metadata, data: Some(data), ..Secret::default() };
        self.store(name, serde_json::to_value(secret).unwrap());
    }

    fn store(&self, name: &str, mut secret: Value) -> Value {
        let mut secrets = lock(&self.0);
        let version = |secret: &Value| secret["metadata"]["resourceVersion"].as_str().and_then(|v| v.parse().ok());
        let next = secrets.get(name).and_then(version).unwrap_or(0u64) + 1;
        secret["metadata"]["resourceVersion"] = next.to_string().into();
        secrets.insert(name.into(), secret.clone());
        secret
    }

    fn plug_in(&self, material: &CaMaterial) {
        self.put(PLUGGED_IN, &[("ca-cert.pem", &material.certificate), ("ca-key.pem", &material.key)]);
    }

    fn plug_in_with_lists(&self, material: &CaMaterial, lists: &str) {
        let keys = [("ca-cert.pem", &*material.certificate), ("ca-key.pem", &material.key), ("ca-crl.pem", lists)];
        self.put(PLUGGED_IN, &keys);
    }

    fn delete(&self, name: &str) {
        lock(&self.0).remove(name);
    }

    fn text(&self, name: &str, key: &str) -> String {
        let secret: Secret = serde_json::from_value(lock(&self.0)[name].clone()).unwrap();
        String::from_utf8(secret.data.unwrap()[key].0.clone()).unwrap()
    }

    /// `rival` makes the root while we do.
    fn client(&self, rival: Option<CaMaterial>) -> kube::Client {
        self.flaky_client(rival, Arc::default())
    }

    /// Nothing is written while `refuses`.
    fn flaky_client(&self, rival: Option<CaMaterial>, refuses: Arc<AtomicBool>) -> kube::Client {
        let secrets = self.clone();
        FakeApi::answering(move |method, path, body| {
            let name = path.strip_prefix("/api/v1/namespaces/istio-system/secrets").expect("only Secrets are read");
            let name = name.trim_start_matches('/');
            let status = |code: u16, reason: &str| {
                (code, json!({"kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": ""}))
            };
            if method == "GET" {
                let found = lock(&secrets.0).get(name).cloned();
                return found.map_or_else(|| status(404, "NotFound"), |secret| (200, secret));
            }
            if refuses.load(Ordering::SeqCst) {
                return status(500, "InternalError");
            }
            let secret: Value = serde_json::from_slice(body).unwrap();
            let new = secret["metadata"]["name"].as_str().unwrap();
            if let Some(rival) = rival.as_ref().filter(|_| new == SELF_SIGNED) {
                secrets.put(SELF_SIGNED, &[("ca-cert.pem", &rival.certificate), ("ca-key.pem", &rival.key)]);
                return status(409, "AlreadyExists");
            }
            let held = lock(&secrets.0).get(new).map(|held| held["metadata"]["resourceVersion"].clone());
            match (method, held) {
                ("PUT", Some(held)) if held != secret["metadata"]["resourceVersion"] => status(409, "Conflict"),
                ("PUT", None) => status(404, "NotFound"),
                ("POST", Some(_)) => status(409, "AlreadyExists"),
                _ => (201, secrets.store(new, secret.clone())),
            }
        })
    }
}

/// A control plane that starts, and the clock it goes by: the runtime's, which stands still unless somebody sleeps.
struct Stage {
    secrets: Secrets,
    clock: Clock,
    settings: Settings,
    lifetime: LeafLifetime,
}

impl Stage {
    fn new() -> Self {
        let directory = "/nonexistent/cacerts".into();
        let settings = Settings { directory, root_check_jitter: false, ..Settings::default() };
        let (secrets, clock) = (Secrets::default(), Clock::from_runtime(SystemTime::now()));
        Self { secrets, clock, settings, lifetime: LeafLifetime::default() }
    }

    async fn open(&self) -> Result<Keeper, SourceError> {
        self.open_as(self.secrets.client(None)).await
    }

    async fn open_as(&self, client: kube::Client) -> Result<Keeper, SourceError> {
        let (settings, clock) = (self.settings.clone(), self.clock.clone());
        Keeper::open(&client, "istio-system", "cluster.local", settings, self.lifetime, clock).await
    }

    fn made(&self) -> CaMaterial {
        self.made_for(SELF_SIGNED_ROOT_TTL)
    }

    fn made_for(&self, ttl: Duration) -> CaMaterial {
        Authority::self_signed("cluster.local", ttl, self.clock.now().into()).unwrap()
    }
}

fn roots_of(materials: &[&CaMaterial]) -> String {
    let roots = materials.iter().map(|material| Authority::from_material(material).unwrap().root_bundle_pem());
    roots.collect()
}

impl Keeper {
    fn roots(&self) -> String {
        self.current.distributed().0
    }

    fn lists(&self) -> Option<String> {
        self.current.distributed().1.map(|lists| lists.to_string())
    }

    fn signs(&self, material: &CaMaterial) -> bool {
        self.current.load().own_roots().concat() == roots_of(&[material])
    }

    /// Signs a certificate that is asked for with this validity.
    fn issue(&self, validity: Duration) -> Issued {
        let csr = CertificateParams::default().serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap();
        let seconds = validity.as_secs().try_into().unwrap();
        let now = self.clock.now().into();
        self.current.sign(&csr, "spiffe://cluster.local/ns/a/sa/b", seconds, self.lifetime, now).unwrap()
    }

    /// Lets the time pass, and looks twice: dates are set by the look after the one that changes something.
    async fn after(&mut self, time: Duration) {
        tokio::time::sleep(time).await;
        self.look().await;
        self.look().await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_root_survives_a_restart() {
    let stage = Stage::new();
    let first = stage.open().await.unwrap();
    assert_eq!(lock(&stage.secrets.0)[SELF_SIGNED]["type"], SELF_SIGNED_TYPE);
    let second = stage.open().await.unwrap();
    assert_eq!(first.roots(), second.roots());
}

#[tokio::test(start_paused = true)]
async fn who_loses_the_race_to_create_the_root_takes_the_winners() {
    let stage = Stage::new();
    let rival = stage.made();
    let keeper = stage.open_as(stage.secrets.client(Some(rival.clone()))).await.unwrap();
    assert_eq!(keeper.roots(), roots_of(&[&rival]));
}

#[tokio::test(start_paused = true)]
async fn a_plugged_in_ca_is_preferred_in_either_layout() {
    let stage = Stage::new();
    let (old, new) = (stage.made(), stage.made());
    let layouts: [[(&str, &str); 4]; 2] = [
        [
            ("ca-cert.pem", &new.certificate),
            ("ca-key.pem", &new.key),
            ("cert-chain.pem", &new.certificate),
            ("root-cert.pem", &new.certificate),
        ],
        [("tls.crt", &new.certificate), ("tls.key", &new.key), ("ca.crt", &new.certificate), ("unrelated", "")],
    ];
    for layout in layouts {
        let stage = Stage::new();
        stage.secrets.put(SELF_SIGNED, &[("ca-cert.pem", &old.certificate), ("ca-key.pem", &old.key)]);
        stage.secrets.put(PLUGGED_IN, &layout);
        assert_eq!(stage.open().await.unwrap().roots(), roots_of(&[&new]));
    }
}

#[tokio::test(start_paused = true)]
async fn at_the_start_an_unusable_secret_is_an_error_and_not_replaced() {
    let stage = Stage::new();
    stage.secrets.put(PLUGGED_IN, &[("ca-cert.pem", "nonsense"), ("ca-key.pem", "nonsense")]);
    let error = stage.open().await.err().expect("refused").to_string();
    assert!(error.contains("Secret istio-system/cacerts is not a usable CA"), "{error}");
    assert!(!lock(&stage.secrets.0).contains_key(SELF_SIGNED));

    let stage = Stage::new();
    stage.secrets.put(SELF_SIGNED, &[("something", "else")]);
    assert!(matches!(stage.open().await, Err(SourceError::Unusable { .. })));
}

#[tokio::test(start_paused = true)]
async fn a_ca_that_is_plugged_in_takes_over_without_a_restart() {
    let stage = Stage::new();
    let (old, new) = (stage.made(), stage.made());
    stage.secrets.plug_in(&old);
    let mut keeper = stage.open().await.unwrap();
    keeper.after(LOOK).await;
    let mut changes = keeper.current().changes();
    stage.secrets.plug_in(&new);
    keeper.after(LOOK).await;
    assert!(keeper.signs(&old) && keeper.roots() == roots_of(&[&old, &new]), "handed out at once");
    assert!(changes.has_changed().unwrap());
    changes.mark_unchanged();
    keeper.after(DAY).await;
    assert!(!changes.has_changed().unwrap(), "a look that finds nothing new changes nothing");
    keeper.after(Duration::from_secs(600)).await;
    assert!(keeper.signs(&new) && keeper.roots() == roots_of(&[&old, &new]), "the certificates of a day ago are over");
    keeper.after(Duration::from_secs(600)).await;
    assert!(keeper.signs(&new) && keeper.roots() == roots_of(&[&new]), "nothing was signed by the old one since");
}

#[tokio::test(start_paused = true)]
async fn what_is_broken_or_gone_leaves_the_authority_that_was_there() {
    let stage = Stage::new();
    let (good, other) = (stage.made(), stage.made());
    stage.secrets.plug_in(&good);
    let mut keeper = stage.open().await.unwrap();
    let ended = Authority::self_signed("a", DAY, OffsetDateTime::from(stage.clock.now()) - 2 * DAY).unwrap();
    let mixed = CaMaterial { key: other.key.clone(), ..good.clone() };
    for broken in [&ended, &mixed, &CaMaterial { key: "nonsense".into(), ..good.clone() }] {
        stage.secrets.plug_in(broken);
        keeper.after(LOOK).await;
        assert!(keeper.signs(&good) && keeper.roots() == roots_of(&[&good]));
        assert!(keeper.told.is_some());
    }
    stage.secrets.delete(PLUGGED_IN);
    keeper.after(LOOK).await;
    assert!(keeper.signs(&good));
    assert!(!lock(&stage.secrets.0).contains_key(SELF_SIGNED), "no other root is made in its place");
    stage.secrets.plug_in(&good);
    keeper.after(LOOK).await;
    assert_eq!(keeper.told, None, "mended");
}

#[tokio::test(start_paused = true)]
async fn an_api_that_is_away_changes_nothing() {
    let stage = Stage::new();
    stage.secrets.plug_in(&stage.made());
    let (up, secrets) = (Arc::new(Mutex::new(true)), stage.secrets.clone());
    let client = FakeApi::answering({
        let up = Arc::clone(&up);
        move |method, path, _| {
            let name = path.rsplit('/').next().unwrap_or_default();
            let found = lock(&secrets.0).get(name).cloned();
            let failure = |code: u16| {
                let reason = if code == 404 { "NotFound" } else { "InternalError" };
                (code, json!({"kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": ""}))
            };
            match (*lock(&up), method, found) {
                (true, "GET", Some(secret)) => (200, secret),
                (true, ..) => failure(404),
                (false, ..) => failure(500),
            }
        }
    });
    let mut keeper = stage.open_as(client).await.unwrap();
    let roots = keeper.roots();
    *lock(&up) = false;
    keeper.after(DAY).await;
    assert_eq!(keeper.roots(), roots);
    assert!(keeper.told.is_some() && keeper.unsaved);
}

#[tokio::test(start_paused = true)]
async fn a_root_of_ours_is_renewed_with_the_same_key_near_its_end() {
    let mut stage = Stage::new();
    stage.settings.root_ttl = 100 * DAY;
    let mut keeper = stage.open().await.unwrap();
    let (certificate, key) =
        (stage.secrets.text(SELF_SIGNED, "ca-cert.pem"), stage.secrets.text(SELF_SIGNED, "ca-key.pem"));
    let first = keeper.roots();
    keeper.after(79 * DAY).await;
    assert_eq!(keeper.roots(), first);
    keeper.after(2 * DAY).await;
    assert_ne!(stage.secrets.text(SELF_SIGNED, "ca-cert.pem"), certificate);
    assert_eq!(stage.secrets.text(SELF_SIGNED, "ca-key.pem"), key);
    assert!(keeper.roots().starts_with(&first) && keeper.roots().len() > first.len(), "both are handed out");
    let (_, end) = keeper.current.load().validity();
    assert!(end > OffsetDateTime::from(stage.clock.now()) + 99 * DAY, "the new one signs");
    let second = keeper.roots();
    keeper.after(DAY).await;
    assert!(second.ends_with(&keeper.roots()) && keeper.roots() != second, "the old one is over");
    let third = keeper.roots();
    keeper.after(DAY).await;
    assert_eq!(keeper.roots(), third, "renewed once");
}

#[tokio::test(start_paused = true)]
async fn of_two_replicas_one_renews_and_the_other_takes_what_it_made() {
    let mut stage = Stage::new();
    stage.settings.root_ttl = 100 * DAY;
    let (mut one, mut other) = (stage.open().await.unwrap(), stage.open().await.unwrap());
    tokio::time::sleep(81 * DAY).await;
    for _ in 0..3 {
        one.look().await;
        other.look().await;
    }
    assert_eq!(one.roots(), other.roots());
    let renewed = stage.secrets.text(SELF_SIGNED, "ca-cert.pem");
    let held = |keeper: &Keeper| keeper.newest.found.material.certificate.clone();
    assert_eq!((held(&one), held(&other)), (renewed.clone(), renewed));
}

#[tokio::test(start_paused = true)]
async fn a_root_of_ours_that_has_ended_is_renewed_at_the_start_unless_an_operator_forbids_it() {
    let mut stage = Stage::new();
    let ended =
        Authority::self_signed("cluster.local", DAY, OffsetDateTime::from(stage.clock.now()) - 2 * DAY).unwrap();
    stage.secrets.put(SELF_SIGNED, &[("ca-cert.pem", &ended.certificate), ("ca-key.pem", &ended.key)]);
    stage.settings.root_check = Duration::ZERO;
    assert!(stage.open().await.is_err());
    stage.settings.root_check = Duration::from_secs(3600);
    assert!(stage.open().await.unwrap().current.load().not_after() > stage.clock.now());
}

#[tokio::test(start_paused = true)]
async fn a_restart_forgets_no_root() {
    let stage = Stage::new();
    let (old, new) = (stage.made(), stage.made());
    stage.secrets.plug_in(&old);
    let mut keeper = stage.open().await.unwrap();
    keeper.after(LOOK).await;
    // While it is away.
    stage.secrets.plug_in(&new);
    let mut keeper = stage.open().await.unwrap();
    assert!(keeper.signs(&new), "the old key is gone");
    assert_eq!(keeper.roots(), roots_of(&[&old, &new]));
    keeper.after(12 * 2 * Duration::from_secs(3600)).await;
    assert_eq!(keeper.roots(), roots_of(&[&old, &new]));
    let ledger = stage.secrets.text(LEDGER, LEDGER_KEY);
    assert!(!ledger.contains("PRIVATE"), "{ledger}");
    let mut keeper = stage.open().await.unwrap();
    keeper.after(2 * Duration::from_secs(3600)).await;
    assert_eq!(keeper.roots(), roots_of(&[&new]));
}

#[tokio::test(start_paused = true)]
async fn a_ca_plugged_in_while_we_are_away_waits_as_well_where_the_key_before_was_ours() {
    let stage = Stage::new();
    let mut keeper = stage.open().await.unwrap();
    keeper.after(LOOK).await;
    let first = keeper.roots();
    let new = stage.made();
    stage.secrets.plug_in(&new);
    let mut keeper = stage.open().await.unwrap();
    assert!(!keeper.signs(&new));
    assert_eq!(keeper.roots(), first + &roots_of(&[&new]));
    keeper.after(LOOK).await;
    keeper.after(2 * DAY).await;
    assert!(keeper.signs(&new));
}

#[tokio::test(start_paused = true)]
async fn a_ca_that_is_mounted_while_we_are_away_waits_where_the_key_before_was_in_a_secret() {
    let mut stage = Stage::new();
    let (old, new) = (stage.made(), stage.made());
    stage.secrets.plug_in(&old);
    stage.secrets.put(SELF_SIGNED, &[("something", "else")]);
    stage.open().await.unwrap().look().await;
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("ca-cert.pem"), &new.certificate).unwrap();
    std::fs::write(directory.path().join("ca-key.pem"), &new.key).unwrap();
    stage.settings.directory = directory.path().to_owned();
    let keeper = stage.open().await.unwrap();
    assert!(keeper.signs(&old) && keeper.roots() == roots_of(&[&old, &new]));
}

#[tokio::test(start_paused = true)]
async fn what_is_not_used_may_be_broken() {
    let stage = Stage::new();
    stage.secrets.plug_in(&stage.made());
    stage.secrets.put(SELF_SIGNED, &[("something", "else")]);
    stage.open().await.unwrap().look().await;
    let new = stage.made();
    stage.secrets.plug_in(&new);
    assert!(stage.open().await.unwrap().signs(&new));
}

#[tokio::test(start_paused = true)]
async fn a_root_whose_key_is_in_the_wrong_hands_can_be_replaced_at_once() {
    let mut stage = Stage::new();
    stage.settings.staged = false;
    let (old, new) = (stage.made(), stage.made());
    stage.secrets.plug_in(&old);
    let mut keeper = stage.open().await.unwrap();
    keeper.look().await;
    stage.secrets.plug_in(&new);
    keeper.look().await;
    assert!(keeper.signs(&new) && keeper.roots() == roots_of(&[&new]));
    let written = stage.secrets.text(LEDGER, LEDGER_KEY);
    keeper.after(DAY).await;
    assert_eq!(stage.secrets.text(LEDGER, LEDGER_KEY), written, "nothing new, nothing to write down");
    stage.settings.staged = true;
    assert_eq!(stage.open().await.unwrap().roots(), roots_of(&[&new]), "and nobody remembers the old one");
}

#[tokio::test(start_paused = true)]
async fn a_mounted_directory_comes_first_and_is_read_when_it_rests() {
    let directory = tempfile::tempdir().unwrap();
    let mut stage = Stage::new();
    stage.settings.directory = directory.path().to_owned();
    let (secret, first, second) = (stage.made(), stage.made(), stage.made());
    stage.secrets.plug_in(&secret);
    assert!(stage.open().await.unwrap().signs(&secret), "an empty directory is none");
    let write = |material: &CaMaterial| {
        std::fs::write(directory.path().join("ca-cert.pem"), &material.certificate).unwrap();
        std::fs::write(directory.path().join("ca-key.pem"), &material.key).unwrap();
    };
    write(&first);
    let mut keeper = stage.open().await.unwrap();
    assert!(keeper.signs(&first));
    write(&second);
    keeper.look().await;
    assert_eq!(keeper.roots(), roots_of(&[&first]), "it may be in the middle of being written");
    keeper.look().await;
    assert_eq!(keeper.roots(), roots_of(&[&first, &second]));

    // As a kubelet mounts a Secret.
    let version = directory.path().join("..2030");
    std::fs::create_dir(&version).unwrap();
    std::fs::write(version.join("tls.crt"), &first.certificate).unwrap();
    std::fs::write(version.join("tls.key"), &first.key).unwrap();
    std::os::unix::fs::symlink("..2030", directory.path().join("..data")).unwrap();
    keeper.look().await;
    keeper.look().await;
    assert_eq!(keeper.roots(), roots_of(&[&first]));
}

fn list(by: &CaMaterial) -> String {
    let issuer = Issuer::from_ca_cert_pem(&by.certificate, KeyPair::from_pem(&by.key).unwrap()).unwrap();
    let list = CertificateRevocationListParams {
        this_update: rcgen::date_time_ymd(2026, 1, 1),
        next_update: rcgen::date_time_ymd(2036, 1, 1),
        crl_number: SerialNumber::from(1u64),
        issuing_distribution_point: None,
        revoked_certs: Vec::new(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    list.signed_by(&issuer).unwrap().pem().unwrap()
}

#[tokio::test(start_paused = true)]
async fn revocation_lists_come_and_go_with_their_key() {
    let stage = Stage::new();
    let authority = stage.made();
    let lists = list(&authority);
    stage.secrets.plug_in(&authority);
    let mut keeper = stage.open().await.unwrap();
    assert_eq!(keeper.lists(), None);
    stage.secrets.plug_in_with_lists(&authority, &lists);
    keeper.look().await;
    assert_eq!(keeper.lists().as_ref(), Some(&lists));
    let half = &lists[..lists.len() / 2];
    for broken in ["nonsense", half, &authority.certificate] {
        stage.secrets.plug_in_with_lists(&authority, broken);
        keeper.look().await;
        assert_eq!(keeper.lists().as_ref(), Some(&lists));
        assert!(keeper.told.is_some());
    }
    stage.secrets.plug_in(&authority);
    keeper.look().await;
    assert_eq!(keeper.lists(), None);
}

#[tokio::test(start_paused = true)]
async fn revocation_lists_of_an_earlier_root_are_distributed_while_it_is_trusted() {
    let stage = Stage::new();
    let (old, new) = (stage.made(), stage.made());
    let (old_lists, new_lists) = (list(&old), list(&new));
    stage.secrets.plug_in_with_lists(&old, &old_lists);
    let mut keeper = stage.open().await.unwrap();
    keeper.after(LOOK).await;
    stage.secrets.plug_in_with_lists(&new, &new_lists);
    keeper.after(LOOK).await;
    assert_eq!(keeper.lists(), Some(new_lists.clone() + &old_lists));
    keeper.after(2 * DAY).await;
    assert_eq!(keeper.lists(), Some(new_lists.clone() + &old_lists), "certificates of the old one are about");
    keeper.after(2 * DAY).await;
    assert_eq!(keeper.lists(), Some(new_lists));
}

/// An intermediate below `root`, from the clock's now on.
fn below(root: &CaMaterial, stage: &Stage) -> CaMaterial {
    let issuer = Issuer::from_ca_cert_pem(&root.certificate, KeyPair::from_pem(&root.key).unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let now = OffsetDateTime::from(stage.clock.now());
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    (params.not_before, params.not_after) = (now, now + 30 * DAY);
    let certificate = params.signed_by(&key, &issuer).unwrap().pem();
    CaMaterial { certificate, key: key.serialize_pem(), chain: String::new(), roots: root.certificate.clone() }
}

impl Secrets {
    fn plug_in_below(&self, material: &CaMaterial) {
        let keys = [
            ("ca-cert.pem", &*material.certificate),
            ("ca-key.pem", &material.key),
            ("root-cert.pem", &material.roots),
        ];
        self.put(PLUGGED_IN, &keys);
    }
}

#[tokio::test(start_paused = true)]
async fn a_certificate_that_has_just_begun_waits_for_clocks_that_are_behind() {
    let stage = Stage::new();
    let root = stage.made();
    stage.secrets.plug_in_below(&below(&root, &stage));
    let mut keeper = stage.open().await.unwrap();
    keeper.after(HOUR).await;
    let before = keeper.current.load();
    stage.secrets.plug_in_below(&below(&root, &stage));
    keeper.after(MARGIN - LOOK).await;
    assert!(keeper.current.load().signs_as(&before) && keeper.told.is_none(), "who is two minutes behind refuses it");
    keeper.after(LOOK).await;
    assert!(!keeper.current.load().signs_as(&before));
}

#[tokio::test(start_paused = true)]
async fn a_replica_without_clients_waits_for_the_certificates_of_the_other() {
    let stage = Stage::new();
    let (old, new) = (stage.made(), stage.made());
    stage.secrets.plug_in(&old);
    let (mut idle, mut busy) = (stage.open().await.unwrap(), stage.open().await.unwrap());
    idle.after(LOOK).await;
    busy.after(LOOK).await;
    busy.after(20 * HOUR).await;
    busy.issue(DAY);
    busy.look().await;
    idle.look().await;
    stage.secrets.plug_in(&new);
    idle.after(LOOK).await;
    idle.after(20 * HOUR).await;
    assert!(idle.signs(&old), "that of the other is about for four hours");
    idle.after(6 * HOUR).await;
    assert!(idle.signs(&new));
}

#[tokio::test(start_paused = true)]
async fn replicas_hand_out_the_same_however_late_one_sees_the_change() {
    let mut stage = Stage::new();
    let directory = tempfile::tempdir().unwrap();
    let (old, new) = (stage.made(), stage.made());
    stage.secrets.plug_in(&old);
    let mut one = stage.open().await.unwrap();
    one.look().await;
    // The other has the new one mounted; where the first runs it is not mounted yet.
    stage.settings.directory = directory.path().to_owned();
    let mut other = stage.open().await.unwrap();
    std::fs::write(directory.path().join("ca-cert.pem"), &new.certificate).unwrap();
    std::fs::write(directory.path().join("ca-key.pem"), &new.key).unwrap();
    other.after(LOOK).await;
    let written = || lock(&stage.secrets.0)[LEDGER]["metadata"]["resourceVersion"].clone();
    one.after(LOOK).await;
    assert_eq!((one.roots(), other.roots()), (roots_of(&[&old, &new]), roots_of(&[&old, &new])));
    let before = written();
    for _ in 0..5 {
        one.after(LOOK).await;
        other.after(LOOK).await;
    }
    assert_eq!(written(), before, "they agree, and nobody writes");
    // Taken back.
    std::fs::remove_file(directory.path().join("ca-key.pem")).unwrap();
    other.after(LOOK).await;
    one.after(LOOK).await;
    assert_eq!((one.roots(), other.roots()), (roots_of(&[&old]), roots_of(&[&old])));
}

#[tokio::test(start_paused = true)]
async fn what_is_written_down_is_written_again_when_somebody_deletes_or_spoils_it() {
    let stage = Stage::new();
    let mut keeper = stage.open().await.unwrap();
    keeper.look().await;
    let written = stage.secrets.text(LEDGER, LEDGER_KEY);
    stage.secrets.delete(LEDGER);
    keeper.look().await;
    assert_eq!(stage.secrets.text(LEDGER, LEDGER_KEY).len(), written.len());
    stage.secrets.put(LEDGER, &[(LEDGER_KEY, "nonsense")]);
    keeper.look().await;
    assert_eq!(stage.secrets.text(LEDGER, LEDGER_KEY).len(), written.len());
}

#[tokio::test(start_paused = true)]
async fn without_a_readable_past_certificates_may_be_about_for_their_usual_life() {
    let stage = Stage::new();
    let (old, new) = (stage.made(), stage.made());
    stage.secrets.plug_in(&old);
    stage.secrets.put(LEDGER, &[(LEDGER_KEY, "nonsense")]);
    let mut keeper = stage.open().await.unwrap();
    stage.secrets.plug_in(&new);
    keeper.look().await;
    keeper.after(DAY).await;
    assert!(keeper.signs(&old));
    keeper.after(HOUR).await;
    assert!(keeper.signs(&new));
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_was_ahead_does_not_make_everybody_wait_for_it() {
    let mut stage = Stage::new();
    let (ahead, runtime) = (Arc::new(Mutex::new(Duration::ZERO)), stage.clock.clone());
    stage.clock = Clock::with({
        let ahead = Arc::clone(&ahead);
        move || runtime.now() + *lock(&ahead)
    });
    let (old, new, third) = (stage.made(), stage.made(), stage.made());
    for restarts in [false, true] {
        stage.secrets.plug_in(&old);
        let mut keeper = stage.open().await.unwrap();
        keeper.after(LOOK).await;
        *lock(&ahead) = 400 * DAY;
        keeper.issue(DAY);
        stage.secrets.plug_in(&new);
        keeper.after(LOOK).await;
        *lock(&ahead) = Duration::ZERO;
        if restarts {
            keeper = stage.open().await.unwrap();
        }
        stage.secrets.plug_in(&third);
        keeper.after(LOOK).await;
        keeper.after(LeafLifetime::default().max + 2 * HOUR).await;
        assert!(keeper.signs(&third));
        stage.secrets.delete(LEDGER);
    }
}

#[tokio::test(start_paused = true)]
async fn a_renewal_that_does_not_work_is_told_once() {
    let mut stage = Stage::new();
    let root = stage.made();
    // Somebody has put an intermediate where our own root should be.
    let other = below(&root, &stage);
    stage.settings.root_check = HOUR;
    let keys = [("ca-cert.pem", &*other.certificate), ("ca-key.pem", &other.key), ("root-cert.pem", &other.roots)];
    stage.secrets.put(SELF_SIGNED, &keys);
    let mut keeper = stage.open().await.unwrap();
    keeper.after(30 * DAY).await;
    let told = keeper.renewal_told.clone();
    assert!(told.as_ref().is_some_and(|text| text.contains("not its own root")), "{told:?}");
    assert_eq!(keeper.told, None);
    keeper.look().await;
    assert_eq!(keeper.renewal_told, told);
}

/// A list as before RFC 3280: version 1.
const OLD_LIST: &str = "\
-----BEGIN X509 CRL-----
MIGQMDgwCgYIKoZIzj0EAwIwDDEKMAgGA1UECgwBYRcNMjYxMTI3MDkyMDQ2WhcN
MzYxMTI0MDkyMDQ2WjAKBggqhkjOPQQDAgNIADBFAiEA9n/Sfv4WNYPsrvGyNUXD
tlofElXYpA7fw64QbZ11OXwCIHoUqVOmulaeeZ9svp6f4KjrDv79mmAu7zgwvw36
rP8N
-----END X509 CRL-----
";

#[tokio::test(start_paused = true)]
async fn lists_that_proxies_would_refuse_are_not_distributed() {
    let stage = Stage::new();
    let authority = stage.made();
    stage.secrets.plug_in(&authority);
    let mut keeper = stage.open().await.unwrap();
    for lists in [&*"-".repeat(LONGEST_LISTS + 1), OLD_LIST] {
        stage.secrets.plug_in_with_lists(&authority, lists);
        keeper.look().await;
        assert_eq!(keeper.lists(), None);
        let told = keeper.told.take();
        assert!(told.as_ref().is_some_and(|text| text.contains("ca-crl.pem: ")), "{told:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn lists_are_whole_however_their_files_end() {
    let stage = Stage::new();
    let (old, new) = (stage.made(), stage.made());
    stage.secrets.plug_in_with_lists(&old, list(&old).trim_end());
    let mut keeper = stage.open().await.unwrap();
    keeper.look().await;
    stage.secrets.plug_in_with_lists(&new, list(&new).trim_end());
    keeper.look().await;
    assert_eq!(Revocations::check(keeper.lists().unwrap().as_bytes()).unwrap(), 2);
}

#[tokio::test(start_paused = true)]
async fn the_newest_secret_has_the_last_word_on_the_lists_of_roots_that_it_names() {
    let stage = Stage::new();
    let (old, new) = (stage.made(), stage.made());
    let (first, second) = (list(&old), list(&old));
    assert_ne!(first, second);
    stage.secrets.plug_in_with_lists(&old, &first);
    let mut keeper = stage.open().await.unwrap();
    keeper.look().await;
    // As people do who take over a root by hand: both are trusted, the old one signs.
    let both = old.certificate.clone() + &new.certificate;
    let keys = [
        ("ca-cert.pem", &*old.certificate),
        ("ca-key.pem", &old.key),
        ("root-cert.pem", &both),
        ("ca-crl.pem", &second),
    ];
    stage.secrets.put(PLUGGED_IN, &keys);
    keeper.look().await;
    assert_eq!(keeper.lists(), Some(second.clone()));
    for _ in 0..3 {
        stage.secrets.plug_in(&new);
        keeper.look().await;
        assert_eq!(keeper.lists(), Some(second.clone()));
        stage.secrets.put(PLUGGED_IN, &keys);
        keeper.look().await;
        assert_eq!(keeper.lists(), Some(second.clone()), "once, however often somebody changes his mind");
    }
}

#[tokio::test(start_paused = true)]
async fn a_restart_forgets_no_list() {
    let stage = Stage::new();
    let (old, new) = (stage.made(), stage.made());
    let lists = list(&old);
    stage.secrets.plug_in_with_lists(&old, &lists);
    let mut keeper = stage.open().await.unwrap();
    keeper.look().await;
    stage.secrets.plug_in(&new);
    keeper.look().await;
    assert_eq!(keeper.lists().as_ref(), Some(&lists));
    let mut keeper = stage.open().await.unwrap();
    assert_eq!(keeper.lists().as_ref(), Some(&lists), "certificates of the old root are about");
    keeper.look().await;
    keeper.after(2 * DAY).await;
    assert_eq!(keeper.lists(), None);
    assert!(!stage.secrets.text(LEDGER, LEDGER_KEY).contains("X509 CRL"));
}

/// Killed at any moment, with an API that sometimes takes nothing: as long as the old key is there nobody is refused.
#[tokio::test(start_paused = true)]
async fn a_kill_at_any_moment_of_a_change_cuts_nobody() {
    for seed in 0..4 {
        let mut random = StdRng::seed_from_u64(seed);
        let mut stage = Stage::new();
        stage.lifetime = LeafLifetime { default: HOUR, max: 2 * HOUR };
        let refuses = Arc::new(AtomicBool::new(false));
        let open = async || stage.open_as(stage.secrets.flaky_client(None, Arc::clone(&refuses))).await.unwrap();
        let mut keeper = open().await;
        keeper.look().await;
        let own = keeper.roots();
        let plugged = stage.made();
        let mut issued: Vec<Issued> = Vec::new();
        for step in 0..100 {
            tokio::time::sleep(Duration::from_secs(random.random_range(1..600))).await;
            if step == 5 {
                stage.secrets.plug_in(&plugged);
            }
            refuses.store(random.random_ratio(1, 3), Ordering::SeqCst);
            keeper.look().await;
            // No later than what was written down; it is a look at most that a kill loses.
            let lost = keeper.issue(HOUR - Duration::from_secs(600));
            if random.random_ratio(1, 4) {
                keeper = open().await;
            }
            issued.extend([lost, keeper.issue(HOUR)]);
            refuses.store(false, Ordering::SeqCst);
            keeper.look().await;
            if random.random_ratio(1, 4) {
                keeper = open().await;
            }
            let now = OffsetDateTime::from(stage.clock.now());
            issued.retain(|issued| now < issued.not_after);
            // Those that are older have met before.
            let newest = issued.last().expect("it was issued just now");
            for other in &issued {
                for (roots, one) in [(&newest.roots, other), (&other.roots, newest), (&keeper.roots(), other)] {
                    let outcome = accepts(roots, one, now);
                    assert!(outcome.is_ok(), "seed {seed}, step {step}: {outcome:?}");
                }
            }
        }
        keeper.after(4 * HOUR).await;
        assert!(keeper.signs(&plugged) && keeper.roots() == roots_of(&[&plugged]) && keeper.roots() != own);
    }
}
