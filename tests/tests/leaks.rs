//! After very many operations, half of them given up at random moments, nothing is left: no task of the client, no
//! descriptor of either side, no memory of either side beyond what the first ones took.
//!
//! `OPERATIONS` says how many; a tenth of a million unless set.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed step ends the test")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use d_engine_client::{Client, Consistency, ErrorKind, KeyRange};
use d_engine_tests::cluster::Cluster;
use d_engine_tests::seed::seed;
use d_engine_tests::transports::Transport;
use d_engine_tests::wait;
use fastrand::Rng;
use tokio::runtime::Handle;

/// Long enough to be revoked before it ends, unless it is given up.
const LEASE: Duration = Duration::from_secs(10);
const OPERATIONS: u64 = 100_000;
/// Callers at a time.
const CALLERS: usize = 64;
/// Of all operations, how many are the first ones, which fill caches, pools and windows.
const WARM_UP: u64 = 5;
/// What the client may have grown by after that, however many there were: allocators keep some.
const CLIENT_GROWTH_MAX: u64 = 32 << 20;
/// What the server may have: the changes and the deliveries it keeps in memory fill up, 32 MiB each, and its databases
/// have buffers that do.
const SERVER_GROWTH_MAX: u64 = 160 << 20;

/// What one process holds.
#[derive(Clone, Copy, Debug)]
struct Holding {
    resident_bytes: u64,
    /// Sockets and the like; the files of a database come and go.
    descriptors: usize,
}

impl Holding {
    fn of(process: u32) -> Self {
        let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let kilobytes: u64 = resident.trim().trim_end_matches(" kB").parse().unwrap();
        let open = std::fs::read_dir(format!("/proc/{process}/fd")).unwrap().filter_map(Result::ok);
        let links = open.filter_map(|entry| std::fs::read_link(entry.path()).ok());
        let descriptors = links.filter(|link| !link.starts_with("/")).count();
        Self { resident_bytes: kilobytes << 10, descriptors }
    }
}

/// How operations ended.
#[derive(Default)]
struct Ends {
    done: AtomicU64,
    given_up: AtomicU64,
}

/// A mix of everything, some of it given up.
async fn work(client: &Client, operations: u64, seed: u64, ends: &Arc<Ends>) {
    let mut rng = Rng::with_seed(seed);
    let mut callers = Vec::new();
    for _ in 0..CALLERS {
        let (client, mut rng, ends) = (client.clone(), rng.fork(), Arc::clone(ends));
        callers.push(tokio::spawn(async move {
            for _ in 0..operations / CALLERS as u64 {
                // Before it is sent, under way, or at its answer. Counted in turns, as timers are too coarse.
                let turns = if rng.bool() { rng.u32(0..40) } else { u32::MAX };
                let operation = one(&client, &mut rng);
                let ended = tokio::select! {
                    biased;
                    result = operation => Some(result),
                    () = pass(turns) => None,
                };
                match ended {
                    Some(Err(error)) if error.kind() == ErrorKind::LeaseNotFound => {}
                    Some(result) => {
                        result.unwrap();
                        ends.done.fetch_add(1, Ordering::Relaxed);
                    }
                    None => drop(ends.given_up.fetch_add(1, Ordering::Relaxed)),
                }
            }
        }));
    }
    for caller in callers {
        caller.await.unwrap();
    }
}

/// Lets so many turns of the others pass; with all there can be, for ever.
async fn pass(turns: u32) {
    if turns == u32::MAX {
        std::future::pending::<()>().await;
    }
    for _ in 0..turns {
        tokio::task::yield_now().await;
    }
}

async fn one(client: &Client, rng: &mut Rng) -> Result<(), d_engine_client::Error> {
    let key = format!("key {}", rng.u32(..1000));
    match rng.u32(..1000) {
        0..500 => client.put(&key, "value").await.map(drop),
        500..700 => client.get(&key).consistency(Consistency::Linearizable).await.map(drop),
        700..900 => client.get(&key).consistency(Consistency::Eventual).await.map(drop),
        900..970 => client.delete(&key).await.map(drop),
        970..990 => {
            let mut watch = client.watch_range(KeyRange::prefix(&key)).await?;
            client.put(&key, "seen").await?;
            if let Some(update) = watch.next().await {
                update?;
            }
            Ok(())
        }
        _ => {
            let lease = client.grant_lease(LEASE).await?.lease;
            client.put(&key, "leased").lease(lease).await?;
            client.revoke_lease(lease).await.map(drop)
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_left_of_very_many_operations() {
    let seed = seed();
    let operations = std::env::var("OPERATIONS").ok().map_or(OPERATIONS, |text| text.parse().expect("a number"));
    for transport in Transport::ALL {
        let mut cluster = Cluster::start(1).await;
        let server = cluster.node_mut(1).process().id();
        let (own, tasks) = (std::process::id(), || Handle::current().metrics().num_alive_tasks());
        let tasks_before = tasks();
        let descriptors_before = Holding::of(own).descriptors;
        let client =
            transport.client().endpoints(cluster.addresses()).call_timeout(wait::PATIENCE).connect().await.unwrap();
        let ends = Arc::new(Ends::default());
        work(&client, operations / WARM_UP, seed, &ends).await;
        settled(&client).await;
        let (warm_tasks, warm) = (tasks(), [Holding::of(own), Holding::of(server)]);
        work(&client, operations - operations / WARM_UP, seed + 1, &ends).await;
        settled(&client).await;
        let (done, given_up) = (ends.done.load(Ordering::Relaxed), ends.given_up.load(Ordering::Relaxed));
        println!("{transport:?}: {done} operations ended, {given_up} were given up, {warm_tasks} tasks when warm");
        assert!(given_up > operations / 10 && done > operations / 10, "one kind is missing");

        wait::until("the tasks of what was given up to end", wait::PATIENCE, || async {
            (tasks() <= warm_tasks).then_some(())
        })
        .await;
        let bounds = [("client", own, CLIENT_GROWTH_MAX), ("server", server, SERVER_GROWTH_MAX)];
        for ((name, process, growth_max), warm) in bounds.into_iter().zip(warm) {
            wait::until("descriptors to be closed", wait::PATIENCE, || async {
                (Holding::of(process).descriptors <= warm.descriptors + 8).then_some(())
            })
            .await;
            let now = Holding::of(process);
            println!("  {name}: {warm:?} when warm, {now:?} at the end");
            let growth = now.resident_bytes.saturating_sub(warm.resident_bytes);
            assert!(growth <= growth_max, "the {name} grew by {growth} bytes, seed {seed}");
        }

        // And with the client goes everything.
        drop(client);
        wait::until("the client's tasks to end", wait::PATIENCE, || async { (tasks() <= tasks_before).then_some(()) })
            .await;
        wait::until("the client's connections to close", wait::PATIENCE, || async {
            (Holding::of(own).descriptors <= descriptors_before).then_some(())
        })
        .await;
    }
}

/// Waits until what was given up has ended at the server, too: leases run out, watches are cancelled.
async fn settled(client: &Client) {
    wait::until("leases to run out", wait::PATIENCE, || async {
        client.leases().all().await.ok()?.is_empty().then_some(())
    })
    .await;
}
