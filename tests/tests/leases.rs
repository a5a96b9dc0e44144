//! Leases: never ended early, ended within the bound that `docs/architecture.md` gives, never readable once over; and ten
//! thousand that end at once hold nobody up.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed step ends the test")]

use std::time::{Duration, Instant};

use d_engine_client::{Client, KeyRange};
use d_engine_tests::cluster::{Cluster, Shape};
use d_engine_tests::lifetime::{Lifetime, Look};
use d_engine_tests::nemesis::{Schedule, torment};
use d_engine_tests::network::{self, PrivateNetwork};
use d_engine_tests::seed::seed;
use d_engine_tests::tenants::{LOOKS_AFTER, Scene, Tenants};
use fastrand::Rng;
use hdrhistogram::Histogram;
use tokio::task::JoinSet;

fn client(cluster: &Cluster) -> Client {
    Client::builder().endpoints(cluster.addresses()).call_timeout(Duration::from_secs(10)).build().unwrap()
}

#[test]
fn keys_live_as_long_as_promised_and_no_longer_while_leaders_and_links_fail() {
    network::inside("keys_live_as_long_as_promised_and_no_longer_while_leaders_and_links_fail", || async {
        let seed = seed();
        let network = Some(PrivateNetwork::lay(3));
        let mut cluster = Cluster::prepare(Shape { network, ..Shape::default() }).await;
        cluster.start_all().await;
        let mut rng = Rng::with_seed(seed);
        let end = Instant::now() + Duration::from_secs(12);
        let tenants = Tenants::start(&cluster, "lives", end, &mut rng);
        let mut schedule = Schedule::new(seed, 3, cluster.reach());
        torment(&mut cluster, &mut schedule, end, |text| println!("  {text}")).await;
        let tally = tenants.judge().await.unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
        println!("{tally:?}");
        assert!(tally.ended > 10 && tally.bounded > 5, "hardly anything ended: {tally:?}");
    });
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
    let scene = Scene::new(&cluster, start, Duration::from_secs(5));
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
