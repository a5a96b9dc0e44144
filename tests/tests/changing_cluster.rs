//! A cluster that changes under its callers: nodes restart one after the other, all of them go away, a connection goes
//! silent, a name leads elsewhere. Callers wait no longer than their deadline, watches lose and repeat nothing, and
//! nothing is written twice.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed step ends the test")]

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use bytes::Bytes;
use d_engine_client::{Client, Consistency, ErrorKind, KeyRange, Outcome, WatchEvent};
use d_engine_tests::cluster::{Cluster, Shape};
use d_engine_tests::network::{self, End, PrivateNetwork};
use d_engine_tests::once::{self, Fate, Put, Tally};
use d_engine_tests::proxy::Proxy;
use d_engine_tests::seed::seed;
use d_engine_tests::transports::Transport;
use d_engine_tests::truth::{State, Truth, View};
use d_engine_tests::watched::{Amount, Watched};
use d_engine_tests::{wait, watchers};
use fastrand::Rng;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What a busy machine may add to a deadline.
const MARGIN: Duration = Duration::from_secs(2);
const CLIENTS: usize = 3;
const TASKS: usize = 3;
const KEYS: usize = 4;
/// So many that some are at each node.
const WATCHES: usize = 24;

/// Callers that put and read all the time, and a watch of everything they do.
struct Load {
    observer: Client,
    base: (u64, State),
    stop: watch::Sender<bool>,
    callers: Vec<JoinHandle<Calls>>,
    goal: watch::Sender<Option<u64>>,
    watching: JoinHandle<Result<Watched, String>>,
    timeout: Duration,
}

/// What came of the calls of one task.
#[derive(Default)]
struct Calls {
    puts: Vec<Put>,
    reads: usize,
    failures: Vec<String>,
    longest: Duration,
}

/// What came of all.
struct Verdict {
    tally: Tally,
    watched: Amount,
    reads: usize,
    failures: Vec<String>,
}

impl Load {
    async fn start(transport: Transport, endpoints: &[String], timeout: Duration, seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let build = || transport.client().endpoints(endpoints).call_timeout(timeout).build().unwrap();
        let observer = transport.client().endpoints(endpoints).call_timeout(wait::PATIENCE).build().unwrap();
        let base = watchers::content(&observer).await;
        let (goal, goals) = watch::channel(None);
        let view = View { previous: true, ..View::of(KeyRange::all()) };
        let watched = Watched::new("the watch", view, base.0 + 1);
        let watching = tokio::spawn(watchers::by_client(build(), watched, None, goals));
        let (stop, stopped) = watch::channel(false);
        let mut callers = Vec::new();
        for number in 0..CLIENTS {
            let client = build();
            for task in 0..TASKS {
                let name = format!("{number}-{task}");
                callers.push(tokio::spawn(call_until(client.clone(), name, rng.fork(), stopped.clone())));
            }
        }
        Self { observer, base, stop, callers, goal, watching, timeout }
    }

    /// Ends the calls, and judges everything.
    async fn finish(self, seed: u64) -> Verdict {
        self.stop.send_replace(true);
        let mut all = Calls::default();
        for caller in self.callers {
            let calls = caller.await.unwrap();
            all.puts.extend(calls.puts);
            all.reads += calls.reads;
            all.failures.extend(calls.failures);
            all.longest = all.longest.max(calls.longest);
        }
        assert!(all.longest <= self.timeout + MARGIN, "a call took {:?} of {:?}", all.longest, self.timeout);
        // Behind a write that everybody sees, nothing that was under way before can come.
        self.observer.put("barrier", "").await.unwrap();
        let (last, state) = watchers::content(&self.observer).await;
        self.goal.send_replace(Some(last));
        let watched = tokio::time::timeout(wait::PATIENCE, self.watching).await.expect("the watch goes on");
        let watched = watched.unwrap().unwrap();
        let changes = watched.deliveries.iter().flat_map(|delivery| delivery.changes.clone()).collect();
        // Complete and in order, or it is no history; then it is compared with what the store holds.
        let truth = Truth::new(self.base.0, self.base.1, changes).unwrap();
        truth.check_state(last, &KeyRange::all(), &state).unwrap();
        let amount = watched.judge(&truth).unwrap();
        let ours = state.into_iter().filter(|(key, _)| key.starts_with(b"load/"));
        let versions: BTreeMap<Bytes, u64> = ours.map(|(key, held)| (key, held.version)).collect();
        let tally = once::judge(&all.puts, &truth, &versions).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
        println!(
            "{tally}; {} reads, {} failures, longest {:?}; {amount:?}",
            all.reads,
            all.failures.len(),
            all.longest
        );
        Verdict { tally, watched: amount, reads: all.reads, failures: all.failures }
    }
}

/// Whether a call may end so that ran out of time: the kind tells what it was waiting for.
fn is_out_of_time(kind: ErrorKind) -> bool {
    use ErrorKind::{DeadlineExceeded, LeadershipLost, NotLeader, Unavailable};
    matches!(kind, DeadlineExceeded | LeadershipLost | NotLeader | Unavailable)
}

async fn call_until(client: Client, name: String, mut rng: Rng, stopped: watch::Receiver<bool>) -> Calls {
    let mut pace = tokio::time::interval(Duration::from_millis(10));
    pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut calls = Calls::default();
    let policies = [Consistency::Linearizable, Consistency::Lease, Consistency::Eventual];
    while !*stopped.borrow() {
        pace.tick().await;
        let key = format!("load/{}", rng.usize(..KEYS));
        let started = Instant::now();
        let result = if rng.u8(..3) == 0 {
            calls.reads += 1;
            client.get(&key).consistency(policies[rng.usize(..3)]).await.map(drop)
        } else {
            let value = format!("{name}-{}", calls.puts.len());
            let result = client.put(&key, &value).await;
            let fate = match &result {
                Ok(answer) => Fate::Acknowledged(answer.header.revision.get()),
                Err(error) if error.outcome() == Outcome::NotApplied => Fate::NotApplied,
                Err(_) => Fate::Unknown,
            };
            calls.puts.push(Put { key: key.into(), value: value.into(), fate });
            result.map(drop)
        };
        calls.longest = calls.longest.max(started.elapsed());
        if let Err(error) = result {
            assert!(is_out_of_time(error.kind()), "only time may be the reason: {error}");
            calls.failures.push(error.to_string());
        }
    }
    calls
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_fails_no_call_and_loses_no_event() {
    let seed = seed();
    for transport in Transport::ALL {
        let mut cluster = Cluster::start(3).await;
        let load = Load::start(transport, &cluster.addresses(), Duration::from_secs(30), seed).await;
        let mut order = [1, 2, 3];
        Rng::with_seed(seed).shuffle(&mut order);
        for id in order.into_iter().chain([cluster.leader(&[]).await]) {
            let before = load.observer.get("load/0").await.unwrap().kv.map_or(0, |kv| kv.version);
            cluster.node_mut(id).stop().await;
            cluster.start_all().await;
            wait::until("the load to go on", wait::PATIENCE, || async {
                let kv = load.observer.get("load/0").await.ok()?.kv?;
                (kv.version > before + 5).then_some(())
            })
            .await;
        }
        let verdict = load.finish(seed).await;
        assert!(verdict.failures.is_empty(), "seed {seed}: {:#?}", verdict.failures);
        assert!(verdict.tally.acknowledged > 20 && verdict.reads > 20, "too little happened to show anything");
        assert!(verdict.watched.changes > 20);
    }
}

/// All nodes are killed at once and stay away; `ALL_DOWN_SECONDS` says for how long, 3 unless set.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_all_nodes_are_down_calls_end_in_time_and_afterwards_everything_goes_on() {
    const TIMEOUT: Duration = Duration::from_secs(1);
    let seed = seed();
    let down = std::env::var("ALL_DOWN_SECONDS").ok().map_or(3, |seconds| seconds.parse().expect("seconds"));
    for transport in Transport::ALL {
        let mut cluster = Cluster::start(3).await;
        let load = Load::start(transport, &cluster.addresses(), TIMEOUT, seed).await;
        wait::until("the load to begin", wait::PATIENCE, || async {
            let kv = load.observer.get("load/0").await.ok()?.kv?;
            (kv.version > 5).then_some(())
        })
        .await;
        for id in 1..=3 {
            cluster.node_mut(id).kill();
        }
        wait::pass(Duration::from_secs(down)).await;
        // Nobody to send it to: the caller knows for certain.
        let client = transport.client().endpoints(cluster.addresses()).call_timeout(TIMEOUT).build().unwrap();
        let error = client.put("nobody", "").await.expect_err("nobody is there");
        assert_eq!((error.kind(), error.outcome()), (ErrorKind::Unavailable, Outcome::NotApplied), "{error}");
        cluster.start_all().await;
        let written = wait::until("a write of a client that saw it all", wait::PATIENCE, || async {
            client.put("afterwards", "").await.ok()
        })
        .await;
        assert!(written.header.revision.get() > 0);
        let before = load.observer.get("load/0").await.unwrap().kv.unwrap().version;
        wait::until("the load to go on", wait::PATIENCE, || async {
            let kv = load.observer.get("load/0").await.ok()?.kv?;
            (kv.version > before + 5).then_some(())
        })
        .await;
        let verdict = load.finish(seed).await;
        assert!(!verdict.failures.is_empty(), "nobody noticed that all nodes were down");
    }
}

#[test]
fn a_pipeline_that_goes_silent_is_noticed_and_calls_go_elsewhere() {
    let test = "a_pipeline_that_goes_silent_is_noticed_and_calls_go_elsewhere";
    network::inside(test, || silence(Transport::Pipeline));
}

#[test]
fn a_connection_of_unary_calls_that_goes_silent_is_noticed_and_calls_go_elsewhere() {
    let test = "a_connection_of_unary_calls_that_goes_silent_is_noticed_and_calls_go_elsewhere";
    network::inside(test, || silence(Transport::Unary));
}

/// Packets to and from the leader vanish without a word, first for the clients alone, then for everybody.
async fn silence(transport: Transport) {
    const TIMEOUT: Duration = Duration::from_secs(2);
    let seed = seed();
    let network = Some(PrivateNetwork::lay(3));
    let mut cluster = Cluster::prepare(Shape { network, ..Shape::default() }).await;
    cluster.start_all().await;
    let leader = cluster.reign().await.leader;
    let build = |timeout| transport.client().endpoints(cluster.addresses()).call_timeout(timeout).build().unwrap();
    let load = Load::start(transport, &cluster.addresses(), TIMEOUT, seed).await;
    let client = build(TIMEOUT);
    client.put("key", "before").timeout(wait::PATIENCE).await.unwrap();
    let mut watching = Vec::new();
    for _ in 0..WATCHES {
        let client = build(TIMEOUT);
        let events = client.watch("key").await.unwrap();
        watching.push((client, events));
    }
    cluster.network().unwrap().sever(End::Clients, End::Node(leader));
    // It still leads, and no client can know more than that it does not answer.
    let started = Instant::now();
    let error = client.put("key", "silence").await.expect_err("the leader is out of reach");
    assert!(started.elapsed() <= TIMEOUT + MARGIN, "{:?}", started.elapsed());
    assert!(is_out_of_time(error.kind()), "{error}");
    let read = client.get("key").consistency(Consistency::Linearizable).await.unwrap();
    assert_ne!(read.header.node_id.get(), leader, "it cannot have answered");
    // Without its followers it leads no more, and who does is found.
    cluster.network().unwrap().isolate(End::Node(leader), true);
    let patient = build(wait::PATIENCE);
    let written = patient.put("key", "after").await.unwrap();
    assert_ne!(written.header.node_id.get(), leader);
    client.put("key", "again").timeout(wait::PATIENCE).await.unwrap();
    // Whoever watched at the lost node watches elsewhere by now, and has missed nothing.
    let mut resumed = 0;
    for (client, mut events) in watching {
        let mut values = Vec::new();
        while values.last().is_none_or(|value| value != "again") {
            let update = tokio::time::timeout(wait::PATIENCE, events.next()).await.expect("the watch goes on");
            let update = update.unwrap().unwrap();
            values.extend(update.events.into_iter().filter_map(|event| match event {
                WatchEvent::Put { kv, .. } => Some(kv.value),
                WatchEvent::Delete { .. } => None,
            }));
        }
        let silenced = usize::from(values.len() == 3);
        assert_eq!(values[silenced..], ["after", "again"], "{values:?}");
        resumed += client.stats().watch_resumes;
    }
    assert!(resumed > 0, "nobody watched at the lost node, or nobody noticed");
    cluster.network().unwrap().heal();
    let verdict = load.finish(seed).await;
    assert!(verdict.tally.acknowledged > 0);
}

/// A file that stands for `/etc/hosts` in the mounts of this process, which are its own.
struct Hosts(PathBuf);

impl Hosts {
    fn take_over(directory: &Path) -> Self {
        let path = directory.join("hosts");
        std::fs::write(&path, "").unwrap();
        for arguments in [
            vec!["--make-rprivate".to_owned(), "/".to_owned()],
            vec!["--bind".to_owned(), path.display().to_string(), "/etc/hosts".to_owned()],
        ] {
            assert!(Command::new("mount").args(&arguments).status().unwrap().success(), "{arguments:?}");
        }
        assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
        Self(path)
    }

    /// From now on these are all the names there are. Written in place, since the mount is of this very file.
    fn are(&self, names: &[(&str, Vec<Ipv4Addr>)]) {
        let lines = names.iter().flat_map(|(name, addresses)| addresses.iter().map(move |ip| format!("{ip} {name}\n")));
        std::fs::write(&self.0, lines.collect::<String>()).unwrap();
    }
}

/// A name of the cluster with several addresses, most of them dead: the client reaches the cluster by it. Then the nodes
/// move, and only the names follow: new connections go where the names lead by then.
#[test]
fn names_with_several_addresses_lead_to_the_cluster_also_when_they_change() {
    const PORT: u16 = 9090;
    let test = "names_with_several_addresses_lead_to_the_cluster_also_when_they_change";
    network::inside(test, || async {
        let directory = tempfile::tempdir().unwrap();
        let hosts = Hosts::take_over(directory.path());
        for transport in Transport::ALL {
            let mut cluster = Cluster::prepare(Shape::default()).await;
            let names = ["n1.test", "n2.test", "n3.test"];
            // Nodes tell clients their names; what a name means is for the clients to look up.
            for (id, name) in (1..).zip(names) {
                cluster.node(id).advertise(&format!("{name}:{PORT}"));
            }
            let place = |last: u8, id: u32| Ipv4Addr::new(127, 9, last, u8::try_from(id).unwrap());
            let (here, there) = (|id| place(1, id), |id| place(2, id));
            let mut proxies = Vec::new();
            for id in 1..=3 {
                let node = cluster.node(id).address;
                proxies.push(Proxy::start_at(SocketAddr::from((here(id), PORT)), node).await);
            }
            let (refusing, dead) = (place(7, 7), Ipv4Addr::new(10, 255, 255, 1));
            hosts.are(&[
                ("cluster.test", vec![dead, refusing, here(1), here(2), here(3)]),
                (names[0], vec![here(1)]),
                (names[1], vec![refusing, here(2)]),
                (names[2], vec![here(3), refusing]),
            ]);
            cluster.start_all().await;
            let seeds = [format!("cluster.test:{PORT}")];
            let client =
                transport.client().endpoints(seeds.clone()).call_timeout(wait::PATIENCE).connect().await.unwrap();
            client.put("key", "here").await.unwrap();
            let mut events = client.watch("key").await.unwrap();
            let leader = cluster.leader(&[]).await;
            assert!(proxies.iter().all(|proxy| proxy.address().ip() != here(leader) || proxy.connections() > 0));

            // The nodes move: nobody is left where they were.
            let mut moved = Vec::new();
            for id in 1..=3 {
                let node = cluster.node(id).address;
                moved.push(Proxy::start_at(SocketAddr::from((there(id), PORT)), node).await);
            }
            hosts.are(&[
                ("cluster.test", vec![dead, there(1), refusing, there(2), there(3)]),
                (names[0], vec![refusing, there(1)]),
                (names[1], vec![there(2)]),
                (names[2], vec![there(3)]),
            ]);
            for proxy in &proxies {
                proxy.refuse().await;
            }
            drop(proxies);
            client.put("key", "there").await.unwrap();
            assert!(moved[leader as usize - 1].connections() > 0, "nobody asked the leader where it is now");
            let event = tokio::time::timeout(wait::PATIENCE, events.next()).await.expect("the watch goes on");
            let update = event.unwrap().unwrap();
            assert_eq!(update.events.len(), 1, "{update:?}");
            // And who comes anew.
            let newcomer = transport.client().endpoints(seeds).call_timeout(wait::PATIENCE).connect().await.unwrap();
            assert_eq!(newcomer.get("key").await.unwrap().into_value().as_deref(), Some(&b"there"[..]));
        }
    });
}
