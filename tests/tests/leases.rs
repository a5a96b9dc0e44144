//! Leases: never ended early, ended within the bound that `docs/architecture.md` gives, never readable once over; and ten
//! thousand that end at once hold nobody up.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed step ends the test")]

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use d_engine_client::{Client, Compare, Error, ErrorKind, KeyRange, LeaseId, Op, Txn};
use d_engine_proto::v1::Consistency;
use d_engine_tests::cluster::{Cluster, Shape};
use d_engine_tests::direct::DirectNode;
use d_engine_tests::lifetime::{Lifetime, Look, due};
use d_engine_tests::nemesis::{Schedule, torment};
use d_engine_tests::network::{self, PrivateNetwork};
use d_engine_tests::seed::seed;
use d_engine_tests::wait;
use fastrand::Rng;
use hdrhistogram::Histogram;
use tokio::task::JoinSet;

const TENANTS: usize = 10;
/// Between two acknowledged writes; whatever is longer counts as time without a leader.
const STEADY: Duration = Duration::from_millis(150);
/// What a busy machine may add to the bound.
const MARGIN: Duration = Duration::from_secs(2);
/// Reads of a key after it was seen to be gone.
const LOOKS_AFTER: usize = 8;

fn client(cluster: &Cluster) -> Client {
    Client::builder().endpoints(cluster.addresses()).call_timeout(Duration::from_secs(10)).build().unwrap()
}

/// What the parts of the test share.
#[derive(Clone)]
struct Scene {
    start: Instant,
    end: Instant,
    nodes: Vec<DirectNode>,
    /// When writes were acknowledged.
    writes: Arc<Mutex<Vec<Duration>>>,
}

impl Scene {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// Looks at the key at a random node, in a random way; `None` if nobody answers.
    async fn look(&self, key: &str, rng: &mut Rng) -> Option<Look> {
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

#[test]
fn keys_live_as_long_as_promised_and_no_longer_while_leaders_and_links_fail() {
    network::inside("keys_live_as_long_as_promised_and_no_longer_while_leaders_and_links_fail", || async {
        let seed = seed();
        let network = Some(PrivateNetwork::lay(3));
        let mut cluster = Cluster::prepare(Shape { network, ..Shape::default() }).await;
        cluster.start_all().await;
        let start = Instant::now();
        let scene = Scene {
            start,
            end: start + Duration::from_secs(12),
            nodes: cluster.nodes().iter().map(|node| node.direct(Duration::from_secs(1))).collect(),
            writes: Arc::default(),
        };
        let mut rng = Rng::with_seed(seed);
        let mut tenants = JoinSet::new();
        for number in 0..TENANTS {
            tenants.spawn(live(scene.clone(), client(&cluster), number, rng.fork()));
        }
        let stop = tokio::sync::watch::Sender::new(false);
        let writers: Vec<_> = (0..2)
            .map(|number| tokio::spawn(beat(scene.clone(), client(&cluster), number, stop.subscribe())))
            .collect();
        torment(&mut cluster, &mut Schedule::new(seed, 3, true), scene.end, |text| println!("  {text}")).await;
        let (mut lifetimes, mut promises) = (Vec::new(), Vec::new());
        while let Some(tenant) = tenants.join_next().await {
            for (lifetime, answered, ttl) in tenant.unwrap() {
                lifetimes.push(lifetime);
                promises.push((answered, ttl));
            }
        }
        stop.send_replace(true);
        for writer in writers {
            writer.await.unwrap();
        }
        let mut writes = std::mem::take(&mut *scene.writes.lock().unwrap());
        writes.sort();
        let (mut ended, mut bounded, mut latest) = (0, 0, Duration::ZERO);
        for (lifetime, (answered, ttl)) in lifetimes.iter_mut().zip(&promises) {
            lifetime.due = answered.and_then(|answered| due(&writes, answered, *ttl, STEADY, MARGIN));
            if let Err(wrong) = lifetime.judge() {
                panic!("seed {seed}: {wrong}\n{lifetime:?}");
            }
            bounded += usize::from(lifetime.due.is_some());
            if let (Some(gone), Some(answered)) = (lifetime.gone(), answered) {
                ended += 1;
                latest = latest.max(gone.saturating_sub(*answered + *ttl));
            }
        }
        let looks: usize = lifetimes.iter().map(|lifetime| lifetime.looks.len()).sum();
        println!(
            "{} keys, {ended} seen to end, {bounded} with a bound, {looks} reads; latest end {latest:?} late",
            lifetimes.len()
        );
        assert!(ended > 10 && bounded > 5, "hardly anything ended");
    });
}

/// Acknowledged writes all the time, which tell when time stood still.
async fn beat(scene: Scene, client: Client, number: usize, stopped: tokio::sync::watch::Receiver<bool>) {
    let mut pace = tokio::time::interval(Duration::from_millis(10));
    pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while !*stopped.borrow() {
        pace.tick().await;
        if client.put(format!("beat/{number}"), "").timeout(Duration::from_secs(1)).await.is_ok() {
            scene.writes.lock().unwrap().push(scene.now());
        }
    }
}

/// Puts keys under leases one after the other, keeps each for a while, and looks on until it is gone, and after.
async fn live(
    scene: Scene,
    client: Client,
    number: usize,
    mut rng: Rng,
) -> Vec<(Lifetime, Option<Duration>, Duration)> {
    let mut lifetimes = Vec::new();
    while scene.now() + Duration::from_secs(3) < scene.end - scene.start {
        let key = format!("tenant/{number}/{}", lifetimes.len());
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
        lifetimes.push((lifetime, (!in_doubt).then_some(answered), ttl));
    }
    lifetimes
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

/// Without a change of leader there is nothing to add to the time to live: no read that begins after it finds the key, on
/// no node.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_read_finds_a_key_whose_time_is_over() {
    const KEYS: usize = 30;
    let seed = seed();
    let mut rng = Rng::with_seed(seed);
    // A calm leader: whoever else wants the processor must not depose it.
    let extra = "[raft.read_consistency]\nlease_duration_ms = 2000\n".to_owned();
    let mut cluster = Cluster::prepare(Shape { extra, ..Shape::default() }).await;
    cluster.start_all().await;
    let start = Instant::now();
    let nodes = cluster.nodes().iter().map(|node| node.direct(Duration::from_secs(5))).collect();
    let scene = Scene { start, end: start, nodes, writes: Arc::default() };
    let reign = cluster.reign().await;
    let mut tasks = JoinSet::new();
    for number in 0..KEYS {
        let (scene, client, mut rng) = (scene.clone(), client(&cluster), rng.fork());
        tasks.spawn(async move {
            let (key, ttl) = (format!("key {number}"), Duration::from_millis(rng.u64(200..2_500)));
            let sent = scene.now();
            client.put_with_ttl(&key, "", ttl).await.unwrap();
            let mut lifetime = Lifetime { key, promised_until: sent + ttl, ..Lifetime::default() };
            lifetime.due = Some(scene.now() + ttl);
            let mut after = 0;
            while after < LOOKS_AFTER {
                let look = scene.look(&lifetime.key, &mut rng).await;
                after += usize::from(look.as_ref().is_some_and(|look| !look.there));
                lifetime.looks.extend(look);
            }
            lifetime
        });
    }
    let mut around = 0;
    while let Some(lifetime) = tasks.join_next().await {
        let lifetime = lifetime.unwrap();
        lifetime.judge().unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
        let near = |look: &&Look| look.begun + Duration::from_millis(50) > lifetime.promised_until;
        around += lifetime.looks.iter().filter(near).count();
    }
    assert_eq!(cluster.reign().await, reign, "the leader changed: nothing was shown");
    println!("{around} reads within 50 ms before the end, or after it");
}

/// All at once, while others put keys.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_leases_that_end_at_once_hold_nobody_up() {
    const LEASES: usize = 10_000;
    const GRANTERS: usize = 200;
    let cluster = Cluster::start(3).await;
    let client =
        Client::builder().endpoints(cluster.addresses()).call_timeout(Duration::from_secs(60)).build().unwrap();
    let count = async || client.range(KeyRange::prefix("mass/")).count_only().await.unwrap().count.unwrap();
    // Granted one after the other, they end together. A slow machine needs more time to grant them all before that.
    let mut end = Instant::now();
    for seconds in [6, 20, 60] {
        let start = Instant::now();
        end = start + Duration::from_secs(seconds);
        let mut granting = JoinSet::new();
        for granter in 0..GRANTERS {
            let client = client.clone();
            granting.spawn(async move {
                for number in 0..LEASES / GRANTERS {
                    let ttl = end.saturating_duration_since(Instant::now()).max(Duration::from_millis(100));
                    client.put_with_ttl(format!("mass/{granter}/{number}"), "", ttl).await.unwrap();
                }
            });
        }
        while let Some(granter) = granting.join_next().await {
            granter.unwrap();
        }
        println!("{LEASES} leases granted within {:?}", start.elapsed());
        let found = count().await;
        if Instant::now() < end {
            assert_eq!(found, LEASES as u64, "some ended early");
            break;
        }
    }
    assert!(Instant::now() < end, "this machine grants too slowly");

    let (mut before, mut during) = (Histogram::<u64>::new(3).unwrap(), Histogram::<u64>::new(3).unwrap());
    let mut pace = tokio::time::interval(Duration::from_millis(2));
    let after = end + Duration::from_secs(2);
    while Instant::now() < after {
        pace.tick().await;
        let sent = Instant::now();
        client.put("meanwhile", "").await.unwrap();
        let latencies = if sent < end { &mut before } else { &mut during };
        latencies.record(u64::try_from(sent.elapsed().as_micros()).unwrap()).unwrap();
    }
    let now = Instant::now();
    assert_eq!(count().await, 0, "what is due is read");
    let quantiles = |histogram: &Histogram<u64>| {
        [0.5, 0.99, 1.0].map(|quantile| Duration::from_micros(histogram.value_at_quantile(quantile)))
    };
    println!("the last count took {:?}", now.elapsed());
    println!(
        "puts before: {} {:?}; while they end: {} {:?}",
        before.len(),
        quantiles(&before),
        during.len(),
        quantiles(&during)
    );
    assert!(during.len() > 10 && quantiles(&during)[2] < Duration::from_secs(5), "puts stood still");
}
