//! Keeps the authority current: looks at where its key comes from, renews a root of its own, and puts in force what
//! [`Roots`] decides. One task; whoever signs never waits for it.
//!
//! What is broken, and what has gone, leaves the authority that was there: it is told once, and counted.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use mesh::clock::Clock;
use rand::Rng as _;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::time::Instant;

use super::authority::{Authority, LeafLifetime, SELF_SIGNED_ROOT_TTL, end_of};
use super::current::CurrentAuthority;
use super::roots::{MARGIN, Roots};
use super::source::{Found, LONGEST_LISTS, Origin, SourceError, Sources};

/// How often Secrets and directory are looked at.
pub(super) const LOOK: Duration = Duration::from_secs(5);
/// Which roots are handed out and since when, so that a restart forgets none of it. No keys.
pub(super) const LEDGER: &str = "istio-ca-roots";
const LEDGER_TYPE: &str = "istio.io/ca-roots";
const LEDGER_KEY: &str = "roots.json";
/// The end of the last certificate moves with each that is issued; what is written down is ahead of it by this much.
const AHEAD: Duration = Duration::from_secs(3600);
/// Of two replicas that write at once one tries again.
const ATTEMPTS: usize = 3;

/// What an operator chooses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Where a CA may be mounted (`ROOT_CA_DIR`).
    pub directory: PathBuf,
    /// Validity of a root made here (`CITADEL_SELF_SIGNED_CA_CERT_TTL`).
    pub root_ttl: Duration,
    /// How often its age is looked at; zero: it is never renewed.
    pub root_check: Duration,
    /// In the last so many hundredths of its life it is renewed.
    pub root_grace_percent: u32,
    /// Whether the first of these looks is at a random moment of the interval, rather than at the start.
    pub root_check_jitter: bool,
    /// Whether a new root is handed out for a while before it signs. Otherwise it replaces the old one at once, which cuts
    /// who has not heard of it: for when the old key is in the wrong hands.
    pub staged: bool,
}

impl Default for Settings {
    /// Istio's, where Istio has one.
    fn default() -> Self {
        Self {
            directory: PathBuf::from("./etc/cacerts"),
            root_ttl: SELF_SIGNED_ROOT_TTL,
            root_check: Duration::from_secs(3600),
            root_grace_percent: 20,
            root_check_jitter: true,
            staged: true,
        }
    }
}

/// Material, and the authority it makes.
struct Candidate {
    found: Found,
    authority: Arc<Authority>,
}

/// The revocation lists that came with a key, and the roots that came with it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Lists {
    roots: Vec<String>,
    text: String,
}

#[derive(Default, Serialize, Deserialize)]
struct Ledger {
    /// When this was written, by the clock of who did, in seconds since 1970.
    written: i64,
    /// When the last certificate that was issued ends, in seconds since 1970. Not less than it is.
    last_end: i64,
    roots: Roots,
    lists: Vec<Lists>,
}

/// Keeps one [`CurrentAuthority`] current.
pub struct Keeper {
    sources: Sources,
    settings: Settings,
    lifetime: LeafLifetime,
    clock: Clock,
    current: Arc<CurrentAuthority>,
    roots: Roots,
    /// What the operator wants, and who signs meanwhile.
    newest: Candidate,
    signing: Arc<Authority>,
    /// Of other authorities whose certificates are about.
    earlier_lists: Vec<Lists>,
    /// At the last look.
    seen: Option<Found>,
    last_look: OffsetDateTime,
    /// The last mistake that has been told, of what was looked for and of renewals.
    told: Option<String>,
    renewal_told: Option<String>,
    next_root_check: Instant,
    ledger: Ledger,
    /// As it was read or written last.
    ledger_secret: Option<Secret>,
    /// Less is true than is written there.
    is_outdated: bool,
    /// It has been told that nothing can be written down.
    unsaved: bool,
}

impl Keeper {
    /// The authority of this mesh; its root is made if there is none.
    ///
    /// # Errors
    /// The API refuses, or a CA is there but unusable. An unusable one is never passed over: falling back to another root
    /// would cut the mesh in two.
    pub async fn open(
        client: &kube::Client,
        namespace: &str,
        trust_domain: &str,
        settings: Settings,
        lifetime: LeafLifetime,
        clock: Clock,
    ) -> Result<Self, SourceError> {
        let sources = Sources::new(client, namespace, &settings.directory);
        let now = OffsetDateTime::from(clock.now());
        let found = match sources.plugged_in().await? {
            Some(found) => found,
            None => match sources.self_signed().await? {
                Some(found) => found,
                None => sources.make(trust_domain, settings.root_ttl, now).await?,
            },
        };
        let mut newest = accept(&sources, found)?;
        let is_ours = newest.found.origin == Origin::SelfSigned;
        if is_ours && !settings.root_check.is_zero() && now >= newest.authority.not_after() {
            newest = accept(&sources, sources.renew(&newest.found, settings.root_ttl, now).await?)?;
        }
        check_end(&sources, &newest, now)?;

        let ledger_secret = sources.read(LEDGER).await?;
        let ledger = ledger_secret.as_ref().and_then(read_ledger);
        // Whoever asked for more before the first ledger was written is forgotten.
        let before = (now + lifetime.default).unix_timestamp();
        let last_end = ledger.as_ref().map_or(before, |ledger| ledger.last_end);
        let ledger = ledger.unwrap_or_default();
        let mut roots = ledger.roots.clone();
        roots.forget(now);
        let is_outdated = roots.lack_one_of(&ledger.roots);
        let mut signing = Arc::clone(&newest.authority);
        if settings.staged && !roots.is_empty() && !roots.is_known(&signing, now) {
            // The key that signed until the restart may still be there.
            let others = sources.passed_over(newest.found.origin).await?;
            let mut others = others.into_iter().filter_map(|found| accept(&sources, found).ok());
            match others.find(|other| roots.is_known(&other.authority, now)) {
                Some(former) => signing = former.authority,
                None => tracing::warn!(
                    "the root of this authority is new to the mesh, and the key that signed before is gone: \
                     until they renew, proxies may refuse each other"
                ),
            }
        }
        let current = CurrentAuthority::new(Arc::clone(&signing));
        current.note_end(last_end);
        let wait = if settings.root_check_jitter { rand::rng().random_range(0.0..1.0) } else { 0.0 };
        let mut keeper = Self {
            next_root_check: Instant::now() + settings.root_check.mul_f64(wait),
            sources,
            settings,
            lifetime,
            clock,
            current,
            roots,
            newest,
            signing,
            earlier_lists: ledger.lists.clone(),
            seen: None,
            last_look: now.max(OffsetDateTime::from_unix_timestamp(ledger.written).unwrap_or(now)),
            told: None,
            renewal_told: None,
            ledger,
            ledger_secret,
            is_outdated,
            unsaved: false,
        };
        keeper.look_at_clock(now);
        keeper.put_in_force(now);
        keeper.show(now, true);
        Ok(keeper)
    }

    pub fn current(&self) -> Arc<CurrentAuthority> {
        Arc::clone(&self.current)
    }

    /// Never ends.
    pub async fn run(mut self) {
        loop {
            self.look().await;
            tokio::time::sleep(LOOK).await;
        }
    }

    /// One look at everything that may have changed.
    pub(super) async fn look(&mut self) {
        let now = OffsetDateTime::from(self.clock.now());
        self.look_at_clock(now);
        let reread = self.reread(now).await;
        match self.find(now).await {
            Ok(Some(candidate)) => self.take(candidate),
            Ok(None) => {}
            Err(error) => tell(&mut self.told, &error),
        }
        if let Err(error) = self.renew_root(now).await {
            tell(&mut self.renewal_told, &error);
        }
        // The API may have taken its time.
        let now = OffsetDateTime::from(self.clock.now());
        self.roots.settle(&self.signing, self.last_end(now), now);
        self.put_in_force(now);
        let outcome = match reread {
            Ok(()) => self.remember(now).await,
            Err(error) => Err(error),
        };
        match outcome {
            Ok(()) => self.unsaved = false,
            Err(error) if !self.unsaved => {
                self.unsaved = true;
                tracing::warn!("{}; a restart would not know which roots are about", full(&error));
            }
            Err(_) => {}
        }
    }

    /// A clock that was ahead has given dates that nobody wants to wait for.
    fn look_at_clock(&mut self, now: OffsetDateTime) {
        let before = std::mem::replace(&mut self.last_look, now);
        if before <= now + MARGIN {
            return;
        }
        tracing::warn!(%before, %now, "the clock has gone back");
        let latest = now + self.lifetime.max + AHEAD;
        self.current.limit_end(latest.unix_timestamp());
        self.roots.limit(latest);
        self.is_outdated = true;
    }

    /// What is there, if it is not what was there before.
    async fn find(&mut self, now: OffsetDateTime) -> Result<Option<Candidate>, SourceError> {
        let origin = self.newest.found.origin;
        // Deleted by mistake, or about to be put back: neither is a reason to change the mesh's root.
        let gone = || SourceError::Unusable { place: self.sources.place(origin), reason: "it has gone".into() };
        let found = match self.sources.plugged_in().await? {
            Some(found) => found,
            None if origin == Origin::SelfSigned => self.sources.self_signed().await?.ok_or_else(gone)?,
            None => return Err(gone()),
        };
        // Files may be in the middle of being written.
        let rests = found.origin != Origin::Directory || self.seen.as_ref() == Some(&found);
        self.seen = Some(found.clone());
        if found == self.newest.found {
            self.told = None;
            return Ok(None);
        }
        if !rests {
            return Ok(None);
        }
        let candidate = accept(&self.sources, found)?;
        check_end(&self.sources, &candidate, now)?;
        let begun = check_start(&self.sources, &candidate, now)?;
        // To who is behind it has not begun.
        Ok(Some(candidate).filter(|_| begun + MARGIN <= now || self.newest.authority.not_after() <= now))
    }

    fn take(&mut self, candidate: Candidate) {
        count("taken");
        self.told = None;
        let (origin, expires) = (candidate.found.origin, candidate.authority.not_after());
        tracing::info!(source = %origin, %expires, "certificate authority taken");
        let before = std::mem::replace(&mut self.newest, candidate);
        self.earlier_lists = merged(std::mem::take(&mut self.earlier_lists), before.lists());
    }

    /// Renews a root that was made here when the end of its life is near.
    async fn renew_root(&mut self, now: OffsetDateTime) -> Result<(), SourceError> {
        let Settings { root_check, root_grace_percent, root_ttl, .. } = self.settings;
        if self.newest.found.origin != Origin::SelfSigned || root_check.is_zero() {
            return Ok(());
        }
        let (start, end) = self.newest.authority.validity();
        if now < end && Instant::now() < self.next_root_check {
            return Ok(());
        }
        self.next_root_check = Instant::now() + root_check;
        let grace = (end - start) * f64::from(root_grace_percent) / 100.0;
        if now < end - grace {
            return Ok(());
        }
        let renewed = self.sources.renew(&self.newest.found, root_ttl, now).await?;
        self.renewal_told = None;
        if renewed != self.newest.found {
            let candidate = accept(&self.sources, renewed)?;
            check_end(&self.sources, &candidate, now)?;
            self.take(candidate);
        }
        Ok(())
    }

    fn put_in_force(&mut self, now: OffsetDateTime) {
        let (handed_out, former) = (self.roots.clone(), Arc::clone(&self.signing));
        // Without a past everybody knows what there is, and there is nothing else.
        let since = if self.settings.staged { now } else { OffsetDateTime::UNIX_EPOCH };
        if !self.settings.staged {
            self.roots = Roots::default();
            self.signing = Arc::clone(&self.newest.authority);
        }
        self.signing = Arc::clone(self.roots.decide(&self.signing, &self.newest.authority, since));
        let bundle = self.roots.bundle();
        // Of the roots that it names the newest Secret has said all there is to say.
        let named = self.newest.authority.own_roots();
        let is_earlier = |root: &String| self.roots.contains(root) && !named.contains(root);
        self.earlier_lists.retain(|lists| lists.roots.iter().any(is_earlier));
        let lists = self.revocations();
        let is_new = !self.current.load().signs_as(&self.signing)
            || self.current.distributed() != (bundle.clone(), lists.clone());
        if is_new {
            self.current.replace(Arc::new(self.signing.handing_out(&bundle)), lists);
        }
        // Who was asked before that has noted what it signed.
        let last_end = self.last_end(now);
        self.roots.settle(&former, last_end, now);
        self.roots.settle(&self.signing, last_end, now);
        self.is_outdated |= self.roots.lack_one_of(&handed_out);
        self.show(now, is_new);
    }

    /// The lists to distribute, as many as a ConfigMap holds; those of the newest key are the first.
    fn revocations(&self) -> Option<Arc<str>> {
        let mut text = String::new();
        for lists in self.newest.lists().iter().chain(&self.earlier_lists) {
            if text.len() + lists.text.len() <= LONGEST_LISTS {
                text += &lists.text;
            }
        }
        Some(text).filter(|text| !text.is_empty()).map(Arc::from)
    }

    fn last_end(&self, now: OffsetDateTime) -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp(self.current.last_end()).unwrap_or(now)
    }

    /// What is in force, for operators.
    fn show(&self, now: OffsetDateTime, is_new: bool) {
        let root_ends = self.signing.own_roots().iter().filter_map(|root| end_of(root)).min();
        let root_ends = root_ends.unwrap_or(now).unix_timestamp();
        let expires = self.signing.not_after();
        metrics::gauge!("citadel_server_root_cert_expiry_timestamp").set(root_ends as f64);
        metrics::gauge!("citadel_server_cert_chain_expiry_timestamp").set(expires.unix_timestamp() as f64);
        metrics::gauge!("mesh_ca_roots").set(self.roots.len() as f64);
        let waits = !self.signing.signs_as(&self.newest.authority);
        metrics::gauge!("mesh_ca_waiting").set(f64::from(u8::from(waits)));
        if !is_new {
            return;
        }
        tracing::info!(roots = self.roots.len(), %expires, waits, "certificate authority in force");
        let given = self.current.distributed().1.map_or(0, |lists| lists.len());
        if self.newest.lists().iter().chain(&self.earlier_lists).map(|lists| lists.text.len()).sum::<usize>() > given {
            tracing::error!(
                "revocation lists of an earlier root are not distributed: a ConfigMap has no room for them"
            );
        }
        if let Some(from) = self.roots.known_from(&self.newest.authority).filter(|_| waits) {
            tracing::info!(%from, "the new authority's roots are handed out; it signs once every proxy has them");
        }
    }

    /// Takes over what another replica has written down since.
    async fn reread(&mut self, now: OffsetDateTime) -> Result<(), SourceError> {
        let secret = self.sources.read(LEDGER).await?;
        let version =
            |secret: &Option<Secret>| secret.as_ref().and_then(|secret| secret.metadata.resource_version.clone());
        if version(&secret) == version(&self.ledger_secret) {
            return Ok(());
        }
        self.ledger = secret.as_ref().and_then(read_ledger).unwrap_or_default();
        self.ledger_secret = secret;
        self.current.note_end(self.ledger.last_end);
        self.roots.merge(self.ledger.roots.clone(), self.last_end(now), now);
        self.earlier_lists = merged(std::mem::take(&mut self.earlier_lists), self.ledger.lists.clone());
        Ok(())
    }

    /// Writes down what a restart must know. The next look tries again.
    async fn remember(&mut self, now: OffsetDateTime) -> Result<(), SourceError> {
        for _ in 0..ATTEMPTS {
            if self.is_remembered() {
                break;
            }
            let last_end = self.current.last_end();
            let is_past = last_end > self.ledger.last_end;
            let ledger = Ledger {
                written: now.unix_timestamp(),
                last_end: if is_past { last_end + AHEAD.as_secs().cast_signed() } else { last_end },
                roots: self.roots.ahead(&self.signing, AHEAD),
                lists: self.all_lists(),
            };
            let json = serde_json::to_vec(&ledger).expect("it has text keys only");
            let mut secret = self.ledger_secret.clone().unwrap_or_else(|| self.sources.secret(LEDGER, LEDGER_TYPE));
            secret.data.get_or_insert_default().insert(LEDGER_KEY.to_owned(), ByteString(json));
            match self.sources.write(LEDGER, &secret).await? {
                Some(written) => {
                    (self.ledger, self.ledger_secret) = (ledger, Some(written));
                    self.is_outdated = false;
                }
                // Another replica has, or it is gone.
                None => self.reread(now).await?,
            }
        }
        Ok(())
    }

    fn is_remembered(&self) -> bool {
        let (ours, written) = (self.all_lists(), &self.ledger.lists);
        self.ledger_secret.is_some()
            && !self.is_outdated
            && self.current.last_end() <= self.ledger.last_end
            && self.roots.is_covered_by(&self.ledger.roots)
            && ours.len() == written.len()
            && ours.iter().all(|lists| written.contains(lists))
    }

    /// The lists to write down, if there is room for all of them.
    fn all_lists(&self) -> Vec<Lists> {
        let mut lists = self.newest.lists();
        lists.extend_from_slice(&self.earlier_lists);
        let length: usize = lists.iter().map(|lists| lists.text.len()).sum();
        if length > LONGEST_LISTS { Vec::new() } else { lists }
    }
}

impl Candidate {
    fn lists(&self) -> Vec<Lists> {
        let text = self.found.revocations.clone();
        text.map(|text| Lists { roots: self.authority.own_roots().to_vec(), text }).into_iter().collect()
    }
}

/// `lists`, and `newer` in the place of those that came with the same roots.
fn merged(mut lists: Vec<Lists>, newer: Vec<Lists>) -> Vec<Lists> {
    lists.retain(|lists| newer.iter().all(|newer| newer.roots != lists.roots));
    lists.extend(newer);
    lists
}

/// Says it unless it was the last that was said.
fn tell(told: &mut Option<String>, error: &SourceError) {
    let text = full(error);
    if told.as_ref() == Some(&text) {
        return;
    }
    match error {
        SourceError::Api { .. } => tracing::warn!("{text}; the certificate authority from before stays"),
        SourceError::Unusable { .. } => {
            count("refused");
            tracing::error!("{text}; the certificate authority from before stays");
        }
    }
    *told = Some(text);
}

fn full(error: &SourceError) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

fn accept(sources: &Sources, found: Found) -> Result<Candidate, SourceError> {
    let authority = Authority::from_material(&found.material)
        .map_err(|error| SourceError::Unusable { place: sources.place(found.origin), reason: error.to_string() })?;
    Ok(Candidate { found, authority: Arc::new(authority) })
}

fn check_end(sources: &Sources, candidate: &Candidate, now: OffsetDateTime) -> Result<(), SourceError> {
    let end = candidate.authority.not_after();
    if now < end {
        return Ok(());
    }
    let reason = format!("its certificates ended at {end}");
    Err(SourceError::Unusable { place: sources.place(candidate.found.origin), reason })
}

/// When it has begun. Not asked at the start, where the clock may be what is wrong and there is no other authority to stay
/// with.
fn check_start(sources: &Sources, candidate: &Candidate, now: OffsetDateTime) -> Result<OffsetDateTime, SourceError> {
    let (start, _) = candidate.authority.validity();
    if start <= now {
        return Ok(start);
    }
    let reason = format!("its certificates are not valid before {start}");
    Err(SourceError::Unusable { place: sources.place(candidate.found.origin), reason })
}

/// What was written down last; something else than that counts as nothing.
fn read_ledger(secret: &Secret) -> Option<Ledger> {
    let json = secret.data.as_ref().and_then(|data| data.get(LEDGER_KEY)).map(|bytes| bytes.0.as_slice());
    let ledger = serde_json::from_slice(json.unwrap_or_default());
    ledger
        .inspect_err(|error| {
            tracing::error!(%error, "Secret {LEDGER} cannot be read; which roots were about is not known");
        })
        .ok()
}

fn count(outcome: &'static str) {
    metrics::counter!("mesh_ca_loads_total", "outcome" => outcome).increment(1);
}

#[cfg(test)]
mod tests;
