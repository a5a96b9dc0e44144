//! Keys that live under leases while something is done to the cluster, each watched from its first put until it is gone
//! and after; judged by [`crate::lifetime`].

use std::time::{Duration, Instant};

use d_engine_client::{Client, Compare, Error, ErrorKind, LeaseId, Op, Txn};
use d_engine_proto::v1::Consistency;
use fastrand::Rng;
use tokio::task::JoinSet;

use crate::cluster::Cluster;
use crate::direct::DirectNode;
use crate::lifetime::{Lifetime, Look, due};
use crate::wait;

const TENANTS: usize = 10;
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// For a look at one node.
const LOOK_TIMEOUT: Duration = Duration::from_secs(1);
/// Between two acknowledged writes; whatever is longer counts as time without a leader.
const STEADY: Duration = Duration::from_millis(150);
/// What a busy machine may add to the bound.
const MARGIN: Duration = Duration::from_secs(2);
/// Reads of a key after it was seen to be gone.
pub const LOOKS_AFTER: usize = 8;
/// The longest life of a key: none is begun later than this before the end.
const LAST_LIFE: Duration = Duration::from_secs(3);

/// What those who look at keys share.
#[derive(Clone, Debug)]
pub struct Scene {
    start: Instant,
    nodes: Vec<DirectNode>,
}

impl Scene {
    /// Looks at the nodes of the cluster; times count from `start`.
    #[must_use]
    pub fn new(cluster: &Cluster, start: Instant, timeout: Duration) -> Self {
        Self { start, nodes: cluster.nodes().iter().map(|node| node.direct(timeout)).collect() }
    }

    /// The time, as looks carry it.
    #[must_use]
    pub fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// Looks at the key at a random node, in a random way; `None` if nobody answers.
    pub async fn look(&self, key: &str, rng: &mut Rng) -> Option<Look> {
        let kind = if rng.bool() { Consistency::Linearizable } else { Consistency::Lease };
        let node = rng.usize(..self.nodes.len());
        let begun = self.now();
        let answer = self.nodes[node].get(key, kind, 0).await.ok()?;
        Some(Look {
            begun,
            ended: self.now(),
            there: answer.kv.is_some(),
            how: format!("{kind:?} at node {}", node + 1),
        })
    }
}

/// A life, when its last promise was answered (if no later one is in doubt), and its time to live.
type Life = (Lifetime, Option<Duration>, Duration);

/// Tenants at work.
#[derive(Debug)]
pub struct Tenants {
    lives: JoinSet<Vec<Life>>,
    beats: JoinSet<Vec<Duration>>,
    stop: tokio::sync::watch::Sender<bool>,
}

/// What they saw, when all of it was right.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Keys that lived.
    pub keys: usize,
    /// Those that were seen to end.
    pub ended: usize,
    /// Those of which the test could tell when they had to be gone.
    pub bounded: usize,
    /// Reads.
    pub looks: usize,
    /// The longest time between the end of a promise and the end of its key.
    pub latest: Duration,
}

impl Tenants {
    /// Puts keys below `prefix` under leases until `end`.
    #[must_use]
    pub fn start(cluster: &Cluster, prefix: &str, end: Instant, rng: &mut Rng) -> Self {
        let client = || Client::builder().endpoints(cluster.addresses()).call_timeout(CALL_TIMEOUT).build();
        let client = || client().expect("the addresses are well formed");
        let start = Instant::now();
        let scene = Scene::new(cluster, start, LOOK_TIMEOUT);
        let mut lives = JoinSet::new();
        for number in 0..TENANTS {
            let prefix = format!("{prefix}/tenant/{number}");
            lives.spawn(live(scene.clone(), client(), prefix, end.saturating_duration_since(start), rng.fork()));
        }
        let stop = tokio::sync::watch::Sender::new(false);
        let mut beats = JoinSet::new();
        for number in 0..2 {
            beats.spawn(beat(scene.clone(), client(), format!("{prefix}/beat/{number}"), stop.subscribe()));
        }
        Self { lives, beats, stop }
    }

    /// Waits until every key has ended, and judges every read.
    ///
    /// # Errors
    /// The first promise that was broken.
    ///
    /// # Panics
    /// When one of them panicked.
    pub async fn judge(mut self) -> Result<Tally, String> {
        let mut lives: Vec<Life> = Vec::new();
        while let Some(tenant) = self.lives.join_next().await {
            lives.extend(tenant.expect("a tenant lives on"));
        }
        self.stop.send_replace(true);
        let mut writes: Vec<Duration> = Vec::new();
        while let Some(beat) = self.beats.join_next().await {
            writes.extend(beat.expect("a beat goes on"));
        }
        writes.sort_unstable();
        let mut tally = Tally { keys: lives.len(), ..Tally::default() };
        for (lifetime, answered, ttl) in &mut lives {
            lifetime.due = answered.and_then(|answered| due(&writes, answered, *ttl, STEADY, MARGIN));
            lifetime.judge().map_err(|wrong| format!("{wrong}\n{lifetime:?}"))?;
            tally.bounded += usize::from(lifetime.due.is_some());
            tally.looks += lifetime.looks.len();
            if let (Some(gone), Some(answered)) = (lifetime.gone(), answered) {
                tally.ended += 1;
                tally.latest = tally.latest.max(gone.saturating_sub(*answered + *ttl));
            }
        }
        Ok(tally)
    }
}

/// Acknowledged writes all the time, which tell when time stood still.
async fn beat(scene: Scene, client: Client, key: String, stopped: tokio::sync::watch::Receiver<bool>) -> Vec<Duration> {
    let mut writes = Vec::new();
    let mut pace = tokio::time::interval(Duration::from_millis(10));
    pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while !*stopped.borrow() {
        pace.tick().await;
        if client.put(&key, "").timeout(LOOK_TIMEOUT).await.is_ok() {
            writes.push(scene.now());
        }
    }
    writes
}

/// Puts keys under leases one after the other, keeps each for a while, and looks on until it is gone, and after.
async fn live(scene: Scene, client: Client, prefix: String, end: Duration, mut rng: Rng) -> Vec<Life> {
    let mut lives = Vec::new();
    while scene.now() + LAST_LIFE < end {
        let key = format!("{prefix}/{}", lives.len());
        let ttl = Duration::from_millis(rng.u64(400..2_000));
        let own = rng.u8(0..3) == 0;
        let renewals = rng.usize(0..6);
        let sent = scene.now();
        // Either a lease and a key on it, or a key with a lease of its own, which another put prolongs.
        let lease = if own {
            let Ok(_) = client.put_with_ttl(&key, "first", ttl).await else { continue };
            None
        } else {
            let Ok(granted) = client.grant_lease(ttl).await else { continue };
            let Ok(_) = client.put(&key, "first").lease(granted.lease).await else { continue };
            Some(granted.lease)
        };
        let mut lifetime = Lifetime { key: key.clone(), promised_until: sent + ttl, ..Lifetime::default() };
        let mut answered = scene.now();
        // A promise that was not answered may hold nevertheless, or come true late: then no bound is certain.
        let mut in_doubt = false;
        for _ in 0..renewals {
            let until = scene.now() + ttl / 3;
            while scene.now() < until {
                lifetime.looks.extend(scene.look(&key, &mut rng).await);
            }
            let sent = scene.now();
            match renew(&client, &key, lease, ttl).await {
                Ok(true) => {
                    lifetime.promised_until = sent + ttl;
                    answered = scene.now();
                }
                Ok(false) => break,
                Err(_) => {
                    in_doubt = true;
                    break;
                }
            }
        }
        let mut after = 0;
        let give_up = scene.now() + wait::PATIENCE;
        while after < LOOKS_AFTER && scene.now() < give_up {
            if let Some(look) = scene.look(&key, &mut rng).await {
                after += usize::from(!look.there);
                lifetime.looks.push(look);
            }
        }
        assert!(after >= LOOKS_AFTER, "{key} did not end within {:?} of {ttl:?}", wait::PATIENCE);
        lives.push((lifetime, (!in_doubt).then_some(answered), ttl));
    }
    lives
}

/// Prolongs a key's life; false if it has ended.
async fn renew(client: &Client, key: &str, lease: Option<LeaseId>, ttl: Duration) -> Result<bool, Error> {
    let Some(lease) = lease else {
        // Only if it is there: a put would make it anew.
        let put = Op::put(key, "again").ttl(ttl);
        return Ok(client.txn(Txn::new().when(Compare::exists(key)).then(put)).await?.succeeded);
    };
    match client.renew_lease(lease).await {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::LeaseNotFound => Ok(false),
        Err(error) => Err(error),
    }
}
