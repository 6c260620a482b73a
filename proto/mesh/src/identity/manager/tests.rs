use std::{
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use super::*;
use crate::{drain, identity::FileCa};

const TTL: Duration = Duration::from_secs(24 * 3600);

/// An authority that counts, can be down, and takes a moment to answer.
struct Authority {
    ca: FileCa,
    asked: AtomicUsize,
    /// Being answered now, and the most there ever were.
    busy: AtomicUsize,
    most: AtomicUsize,
    /// When each request came, by the runtime's time.
    times: Mutex<Vec<Instant>>,
    down: AtomicBool,
}

impl CertificateSource for Authority {
    fn fetch<'a>(&'a self, id: &'a Identity) -> BoxFuture<'a, Result<Arc<WorkloadCertificate>, IdentityError>> {
        Box::pin(async move {
            self.asked.fetch_add(1, Ordering::Relaxed);
            self.times.lock().unwrap().push(Instant::now());
            self.most.fetch_max(self.busy.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(100)).await;
            self.busy.fetch_sub(1, Ordering::Relaxed);
            if self.down.load(Ordering::Relaxed) {
                return Err(IdentityError::Unreachable { identity: id.clone(), reason: "down".into() });
            }
            self.ca.sign(id).map(Arc::new)
        })
    }
}

struct World {
    authority: Arc<Authority>,
    manager: CertificateManager,
    /// Seconds that the wall clock is away from where the runtime's time would have it.
    offset: Arc<AtomicI64>,
    _trigger: drain::DrainTrigger,
}

fn world() -> World {
    world_of(TTL)
}

fn world_of(ttl: Duration) -> World {
    let (steady, offset) = (Clock::from_runtime(SystemTime::now()), Arc::new(AtomicI64::new(0)));
    let clock = Clock::with({
        let offset = offset.clone();
        move || {
            let seconds = offset.load(Ordering::Relaxed);
            let distance = Duration::from_secs(seconds.unsigned_abs());
            if seconds < 0 { steady.now() - distance } else { steady.now() + distance }
        }
    });
    let ca = FileCa::generate("td", ttl, clock.clone()).unwrap();
    let authority = Arc::new(Authority {
        ca,
        asked: AtomicUsize::new(0),
        busy: AtomicUsize::new(0),
        most: AtomicUsize::new(0),
        times: Mutex::default(),
        down: AtomicBool::new(false),
    });
    let (manager, rotation) = CertificateManager::new(authority.clone(), clock);
    let (trigger, watcher) = drain::channel();
    // Ends when the trigger is dropped at the end of the test.
    tokio::spawn(rotation.run(watcher));
    World { authority, manager, offset, _trigger: trigger }
}

impl World {
    fn asked(&self) -> usize {
        self.authority.asked.load(Ordering::Relaxed)
    }

    fn set_down(&self, down: bool) {
        self.authority.down.store(down, Ordering::Relaxed);
    }
}

fn identity(name: &str) -> Identity {
    Identity::new("td", "ns", name).unwrap()
}

#[tokio::test(start_paused = true)]
async fn one_fetch_serves_all_who_wait() {
    let world = world();
    let id = identity("a");
    let (a, b, c) = tokio::join!(world.manager.get(&id), world.manager.get(&id), world.manager.get(&id));
    let serial = a.unwrap().serial().to_owned();
    assert_eq!(b.unwrap().serial(), serial);
    assert_eq!(c.unwrap().serial(), serial);
    assert_eq!(world.manager.get(&id).await.unwrap().serial(), serial);
    assert_eq!(world.asked(), 1);
}

#[tokio::test(start_paused = true)]
async fn renews_at_half_life_and_not_before() {
    let world = world();
    let id = identity("a");
    let first = world.manager.get(&id).await.unwrap();
    tokio::time::sleep(TTL / 2 - Duration::from_secs(300)).await;
    assert_eq!(world.asked(), 1);
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(world.asked(), 2);
    assert_ne!(world.manager.get_cached(&id).unwrap().serial(), first.serial());
}

/// Authorities date certificates back by two minutes: by its dates a certificate of one minute is past its half-life at once.
#[tokio::test(start_paused = true)]
async fn a_certificate_of_a_minute_is_renewed_every_half_minute() {
    let world = world_of(Duration::from_secs(60));
    world.manager.get(&identity("a")).await.unwrap();
    tokio::time::sleep(Duration::from_secs(25)).await;
    assert_eq!(world.asked(), 1);
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(world.asked(), 2);
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert!((11..=13).contains(&world.asked()), "{} in five minutes", world.asked());
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_jumps_has_what_is_not_valid_any_more_or_not_yet_replaced_at_once() {
    let world = world_of(Duration::from_secs(3600));
    let id = identity("a");
    let first = world.manager.get(&id).await.unwrap();
    world.offset.store(7200, Ordering::Relaxed);
    assert!(world.manager.get_cached(&id).is_none(), "it has expired");
    let second = world.manager.get(&id).await.expect("nobody waits for a timer");
    assert_ne!(second.serial(), first.serial());

    world.offset.store(0, Ordering::Relaxed);
    tokio::time::sleep(MAX_SLEEP + MIN_PAUSE).await;
    let third = world.manager.get_cached(&id).expect("there is one");
    assert_ne!(third.serial(), second.serial(), "peers would not take a certificate of the future");
    assert_eq!(world.asked(), 3);
    tokio::time::sleep(MAX_SLEEP * 20).await;
    assert_eq!(world.asked(), 3, "once is enough");

    world.offset.store(-30, Ordering::Relaxed);
    tokio::time::sleep(MAX_SLEEP * 2).await;
    assert_eq!(world.asked(), 3, "what authorities allow for needs nothing");
}

#[tokio::test(start_paused = true)]
async fn a_valid_certificate_outlives_an_authority_that_is_down() {
    let world = world();
    let id = identity("a");
    let first = world.manager.get(&id).await.unwrap();
    world.set_down(true);
    tokio::time::sleep(TTL / 2 + Duration::from_secs(3600)).await;
    let asked = world.asked();
    assert!((20..60).contains(&asked), "an hour of retries capped at 150 s, but {asked} attempts");
    assert_eq!(world.manager.get(&id).await.unwrap().serial(), first.serial());
    assert_eq!(world.asked(), asked, "a caller with a valid certificate asks for nothing");

    tokio::time::sleep(TTL / 2).await;
    assert!(world.manager.get_cached(&id).is_none(), "an expired certificate is none");
    let error = world.manager.get(&id).await.unwrap_err();
    assert!(matches!(error, IdentityError::Unreachable { .. }), "{error}");
    assert!(world.manager.snapshot()[0].state.starts_with("Unavailable: "));

    world.set_down(false);
    tokio::time::sleep(MIN_PAUSE * 2).await;
    world.manager.get(&id).await.expect("an impatient caller does not wait for the backoff");
}

#[tokio::test(start_paused = true)]
async fn failures_are_told_at_once_and_the_authority_is_not_hammered() {
    let world = world();
    world.set_down(true);
    let id = identity("a");
    for _ in 0..100 {
        assert!(world.manager.get(&id).await.is_err());
    }
    assert_eq!(world.asked(), 1);
}

#[tokio::test(start_paused = true)]
async fn forgotten_identities_are_not_renewed() {
    let world = world();
    let id = identity("a");
    world.manager.prefetch(id.clone());
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(world.manager.get_cached(&id).is_some());
    assert_eq!(world.manager.snapshot()[0].state, "Available");
    world.manager.forget_account("ns", "a");
    tokio::time::sleep(TTL * 2).await;
    assert_eq!(world.asked(), 1);
    assert!(world.manager.snapshot().is_empty());
}

#[tokio::test(start_paused = true)]
async fn many_identities_come_eight_at_a_time_and_the_one_needed_now_first() {
    let world = world();
    for i in 0..64 {
        world.manager.prefetch(identity(&format!("w{i}")));
    }
    let start = Instant::now();
    world.manager.get(&identity("urgent")).await.unwrap();
    assert!(start.elapsed() <= Duration::from_millis(210), "took {:?}", start.elapsed());
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(world.manager.snapshot().iter().filter(|s| s.state == "Available").count(), 65);
    assert_eq!(world.authority.most.load(Ordering::Relaxed), CONCURRENT);
}

#[tokio::test(start_paused = true)]
async fn what_waits_to_be_renewed_gives_way_to_a_connection() {
    let world = world();
    for i in 0..64 {
        world.manager.prefetch(identity(&format!("w{i}")));
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    // The half-life of all has come, and eight of them are being renewed.
    tokio::time::sleep(TTL / 2 - Duration::from_secs(200)).await;
    while world.authority.busy.load(Ordering::Relaxed) < CONCURRENT {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let start = Instant::now();
    world.manager.get(&identity("new")).await.unwrap();
    assert!(start.elapsed() <= Duration::from_millis(210), "took {:?}", start.elapsed());
    assert!(world.asked() <= 64 + 3 * CONCURRENT, "before the rest was renewed: {}", world.asked());
}

#[tokio::test(start_paused = true)]
async fn pauses_between_attempts_double_up_to_the_cap_and_end_with_the_certificate() {
    let world = world();
    let id = identity("a");
    let certificate = world.manager.get(&id).await.unwrap();
    world.set_down(true);
    let end = certificate.not_after().duration_since(world.authority.ca.now()).unwrap();
    let end = Instant::now() + end;
    tokio::time::sleep_until(end + Duration::from_secs(1)).await;
    let times = world.authority.times.lock().unwrap().clone();
    let gaps: Vec<f64> = times[1..].windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64() - 0.1).collect();
    assert!((0.39..1.21).contains(&gaps[0]), "{gaps:?}");
    for pair in gaps.windows(2).take(6) {
        let ratio = pair[1] / pair[0];
        assert!((2.0 * 0.8 / 1.2 - 0.02..2.0 * 1.2 / 0.8 + 0.02).contains(&ratio), "{gaps:?}");
    }
    assert!(gaps.iter().all(|gap| *gap <= MAX_PAUSE + 0.02), "{gaps:?}");
    assert!(gaps.iter().rev().skip(1).take(20).all(|gap| *gap >= MAX_PAUSE * 0.8 - 0.02), "{gaps:?}");
    let last = times.iter().find(|at| **at + Duration::from_millis(150) >= end);
    assert!(last.is_some_and(|at| *at <= end + Duration::from_millis(10)), "one attempt as the certificate ends");
}

#[tokio::test(start_paused = true)]
async fn a_service_account_is_forgotten_in_every_trust_domain_and_others_are_kept() {
    let world = world();
    let ids =
        ["spiffe://td/ns/ns/sa/a", "spiffe://other/ns/ns/sa/a", "spiffe://td/ns/ns/sa/b", "spiffe://td/ns/x/sa/a"];
    let ids = ids.map(|id| id.parse::<Identity>().unwrap());
    for id in &ids {
        world.manager.get(id).await.unwrap();
    }
    world.manager.forget_account("ns", "a");
    let kept: Vec<_> = ids.iter().filter(|id| world.manager.get_cached(id).is_some()).collect();
    assert_eq!(kept, [&ids[2], &ids[3]]);
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_a_forgotten_identity_is_told() {
    let world = world();
    let id = identity("a");
    let forget = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        world.manager.forget_account("ns", "a");
    };
    let (got, ()) = tokio::join!(world.manager.get(&id), forget);
    assert!(matches!(got, Err(IdentityError::Forgotten(_))), "{got:?}");
    assert!(world.manager.snapshot().is_empty(), "what was under way is not kept");
    tokio::time::sleep(TTL).await;
    assert_eq!(world.asked(), 1);
}

#[tokio::test(start_paused = true)]
async fn waiting_ends_when_rotation_does() {
    let clock = Clock::from_runtime(SystemTime::now());
    let ca = FileCa::generate("td", TTL, clock.clone()).unwrap();
    let (manager, rotation) = CertificateManager::new(Arc::new(ca), clock);
    let id = identity("a");
    let (got, ()) = tokio::join!(manager.get(&id), async { drop(rotation) });
    assert!(matches!(got, Err(IdentityError::Stopped(_))));
    assert!(matches!(manager.get(&id).await, Err(IdentityError::Stopped(_))));
}

#[test]
fn pauses_double_and_are_capped() {
    for failures in 0..40 {
        let pause = pause(0.5, failures).as_secs_f64();
        assert!(pause <= MAX_PAUSE && pause >= (0.4 * 2f64.powi(failures.min(16) as i32)).min(MAX_PAUSE * 0.8));
    }
}
