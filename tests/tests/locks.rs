//! Locks and elections: what a lock guards is written by one holder after the other, whatever a holder believes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed step ends the test")]

use std::path::Path;
use std::time::{Duration, Instant};

use d_engine_client::{Client, FencingToken};
use d_engine_tests::cluster::{Cluster, Shape};
use d_engine_tests::contenders::Contenders;
use d_engine_tests::nemesis::{Schedule, torment};
use d_engine_tests::network::{self, PrivateNetwork};
use d_engine_tests::puppet::Puppet;
use d_engine_tests::resource::{self, Fenced, Resource, Tenure};
use d_engine_tests::seed::seed;
use d_engine_tests::wait;
use fastrand::Rng;

const TTL: Duration = Duration::from_millis(1_500);

fn client(cluster: &Cluster) -> Client {
    Client::builder().endpoints(cluster.addresses()).call_timeout(Duration::from_secs(10)).build().unwrap()
}

/// The token and what follows it, in a line of a puppet that begins with `what`.
async fn told(puppet: &mut Puppet, what: &str) -> (FencingToken, String) {
    let line = puppet.line().await;
    let words: Vec<&str> = line.split(' ').collect();
    assert_eq!(words[0], what, "{line}");
    (words[1].parse().unwrap(), words[2..].join(" "))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_who_believe_to_hold_a_lock_the_resource_obeys_the_later() {
    let cluster = Cluster::start(3).await;
    let mut puppet = Puppet::start(Path::new(env!("CARGO_BIN_EXE_d-engine-puppet")), &cluster.addresses());
    let mut resource = Resource::default();
    for round in 0..3 {
        puppet.order(&format!("lock disk {}", TTL.as_millis()));
        let (first, _) = told(&mut puppet, "locked").await;
        puppet.order("write before");
        let (token, what) = told(&mut puppet, "write").await;
        assert_eq!((token, resource.write(token, what)), (first, Ok(())));

        puppet.pause();
        let guard = client(&cluster).lock("disk").ttl(TTL).timeout(wait::PATIENCE).acquire().await.unwrap();
        assert!(guard.is_held() && guard.token() > first, "round {round}: {} after {first}", guard.token());
        resource.write(guard.token(), "mine").unwrap();

        // The first thing it does once it goes on is to look, and the second to write in spite of what it sees.
        puppet.order("held");
        puppet.order("write after");
        puppet.resume();
        assert_eq!(told(&mut puppet, "held").await, (first, "false".to_owned()), "round {round}");
        let (token, what) = told(&mut puppet, "write").await;
        assert_eq!((token, resource.write(token, what)), (first, Err(Fenced { by: guard.token() })));
        resource.write(guard.token(), "mine again").unwrap();
        guard.release().await.unwrap();
        puppet.order("release");
        puppet.line().await;
    }
    assert_eq!(resource.refused(), 3);
}

/// The clock that all holders of this process share.
fn since(start: Instant) -> Duration {
    start.elapsed()
}

#[test]
fn one_at_a_time_holds_a_lock_while_leaders_and_links_fail() {
    network::inside("one_at_a_time_holds_a_lock_while_leaders_and_links_fail", || async {
        let seed = seed();
        let network = Some(PrivateNetwork::lay(3));
        let mut cluster = Cluster::prepare(Shape { network, ..Shape::default() }).await;
        cluster.start_all().await;
        let mut rng = Rng::with_seed(seed);
        let end = Instant::now() + Duration::from_secs(11);
        let contenders = Contenders::start(&cluster, "disk", end, &mut rng);
        let mut schedule = Schedule::new(seed, 3, cluster.reach());
        torment(&mut cluster, &mut schedule, end, |text| println!("  {text}")).await;
        let tally = contenders.judge().await.unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
        println!("{tally:?}");
        assert!(tally.writers > 2, "seed {seed}: hardly anybody held the lock: {tally:?}");
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_wins_an_election_leads_alone_and_every_observer_sees_it() {
    const CANDIDATES: usize = 4;
    const WINS: usize = 3;
    let mut cluster = Cluster::start(3).await;
    let start = Instant::now();
    let (ended, _) = tokio::sync::watch::channel(0);
    let candidates: Vec<_> = (0..CANDIDATES)
        .map(|number| {
            let (client, ended) = (client(&cluster), ended.clone());
            tokio::spawn(async move {
                let mut tenures = Vec::new();
                while tenures.len() < WINS {
                    let election = client.election("e").ttl(TTL).timeout(wait::PATIENCE);
                    let leadership = election.campaign(format!("candidate {number}")).await.unwrap();
                    let (token, acquired) = (leadership.token(), since(start));
                    let holder = format!("candidate {number}");
                    let mut tenure = Tenure { holder, token, acquired, held: acquired };
                    // Whoever leads by its own account is the leader by everybody's.
                    let shown = election.leader().await;
                    let now = since(start);
                    if leadership.is_leader() {
                        tenure.held = now;
                        if let Ok(shown) = shown {
                            let shown = shown.expect("somebody leads");
                            assert_eq!((shown.token, &shown.value[..]), (token, tenure.holder.as_bytes()));
                        }
                    }
                    let _ = leadership.proclaim(format!("candidate {number} says goodbye")).await;
                    let _ = leadership.resign().await;
                    tenures.push(tenure);
                    ended.send_modify(|ended| *ended += 1);
                }
                tenures
            })
        })
        .collect();
    let observers: Vec<_> = (0..3)
        .map(|_| {
            let client = client(&cluster);
            tokio::spawn(async move {
                let mut observer = client.election("e").observe().await.unwrap();
                let mut seen = Vec::new();
                loop {
                    let leader = observer.next().await.expect("an endless stream").unwrap();
                    let last = leader.as_ref().is_some_and(|leader| leader.value == "the last");
                    seen.extend(leader);
                    if last {
                        return seen;
                    }
                }
            })
        })
        .collect();
    // In the middle of it the leader of the cluster goes.
    let mut rounds = ended.subscribe();
    let many = rounds.wait_for(|ended| *ended >= CANDIDATES);
    tokio::time::timeout(wait::PATIENCE, many).await.expect("candidates lead one after the other").unwrap();
    let leader = cluster.leader(&[]).await;
    cluster.node_mut(leader).kill();
    let mut tenures = Vec::new();
    for candidate in candidates {
        tenures.extend(tokio::time::timeout(wait::PATIENCE, candidate).await.expect("everybody wins in turn").unwrap());
    }
    cluster.start_all().await;
    resource::judge(&tenures).unwrap();

    let client = client(&cluster);
    let last = client.election("e").timeout(wait::PATIENCE).campaign("the last").await.unwrap();
    for observer in observers {
        let seen = tokio::time::timeout(wait::PATIENCE, observer).await.expect("the last leader is seen").unwrap();
        assert_eq!(seen.last().unwrap().token, last.token());
        assert!(seen.is_sorted_by_key(|leader| leader.token), "{seen:?}");
        for leader in &seen[..seen.len() - 1] {
            let tenure = tenures.iter().find(|tenure| tenure.token == leader.token);
            let tenure = tenure.unwrap_or_else(|| panic!("nobody led with {leader:?}"));
            assert!(leader.value.starts_with(tenure.holder.as_bytes()), "{leader:?}");
        }
    }
    last.resign().await.unwrap();
}
