//! One process becomes three under calls of which none fails, and then any one of them may be killed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed step ends the test")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use d_engine_client::{Client, Consistency, KeyRange};
use d_engine_tests::process::{Process, bound_to_this_thread};
use d_engine_tests::transcript;
use d_engine_tests::wait::{self, PATIENCE};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinHandle;

const EXAMPLE: &str = env!("CARGO_MANIFEST_DIR");
/// Shorter than what a client that has found enough nodes takes until it asks for more of them: half a minute.
const SOON: Duration = Duration::from_secs(20);
const PREFIX: &str = "load/";
const CALLERS: usize = 4;
/// Between two pairs of calls of one caller, so that the programs get their share of the machine.
const PACE: Duration = Duration::from_millis(5);

/// The programs by the example's own configurations, at a loopback address of this test's own.
struct Programs {
    host: Ipv4Addr,
    directory: TempDir,
    processes: BTreeMap<u16, Process>,
    starts: u32,
}

impl Programs {
    fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("d-engine-expansion-").tempdir().unwrap();
        // All of 127.0.0.0/8 is this machine; nobody else listens at this test's address.
        static NEXT: AtomicU8 = AtomicU8::new(200);
        let [.., high, low] = std::process::id().to_be_bytes();
        let host = Ipv4Addr::new(127, NEXT.fetch_add(1, Ordering::Relaxed), high, low.max(1));
        Self { host, directory, processes: BTreeMap::new(), starts: 0 }
    }

    fn start(&mut self, id: u16) {
        let config = std::fs::read_to_string(format!("{EXAMPLE}/config/n{id}.toml")).unwrap();
        self.run(id, &config);
    }

    fn run(&mut self, id: u16, config: &str) {
        // Long, so that nobody loses the lead because the machine is busy.
        let config = config.replace("127.0.0.1", &self.host.to_string())
            + "\n[raft.read_consistency]\nlease_duration_ms = 1000\n";
        let path = self.directory.path().join(format!("n{id}"));
        std::fs::write(path.with_extension("toml"), config).unwrap();
        let mut command = bound_to_this_thread(Path::new(env!("CARGO_BIN_EXE_d-engine-example-single-node-expansion")));
        command.current_dir(&self.directory).arg("--config-path").arg(path);
        self.starts += 1;
        let log = self.directory.path().join(format!("log{id}-{}", self.starts));
        self.processes.insert(id, Process::start(command, &log));
    }

    fn kill(&mut self, id: u16) {
        self.processes.remove(&id).expect("it runs").kill();
    }

    async fn stop(&mut self) {
        for mut program in std::mem::take(&mut self.processes).into_values() {
            assert!(program.stop(PATIENCE).await.success(), "{}", program.output());
        }
    }

    /// Waits until every program that runs says that these vote, and who leads.
    async fn vote(&mut self, voters: &str) {
        for (id, process) in &mut self.processes {
            let what = format!("{id} to say that {voters} vote");
            wait::until(&what, PATIENCE, || {
                assert!(process.ended().is_none(), "program {id} ended:\n{}", process.output());
                let output = process.output();
                let told = output.lines().rfind(|line| line.starts_with("voters"));
                let said = told.is_some_and(|line| {
                    line.strip_prefix(&format!("voters {voters}, ")).is_some_and(|rest| {
                        rest.strip_suffix(" leads").is_some_and(|leader| leader.parse::<u16>().is_ok())
                    })
                });
                async move { said.then_some(()) }
            })
            .await;
        }
    }

    /// Knows one of them, and learns of the others.
    fn client(&self, id: u16) -> Client {
        let endpoint = format!("{}:{}", self.host, 9680 + id);
        Client::builder().endpoints([endpoint]).call_timeout(PATIENCE).build().unwrap()
    }
}

/// Puts and reads all the time, each key once; no call may fail.
struct Load {
    stop: watch::Sender<bool>,
    done: Vec<watch::Receiver<u64>>,
    callers: Vec<JoinHandle<Duration>>,
}

impl Load {
    fn start(client: &Client, name: &str) -> Self {
        let stop = watch::Sender::new(false);
        let (mut done, mut callers) = (Vec::new(), Vec::new());
        for caller in 0..CALLERS {
            let (progress, following) = watch::channel(0);
            let keys = format!("{PREFIX}{name}/{caller}/");
            callers.push(tokio::spawn(call(client.clone(), keys, stop.subscribe(), progress)));
            done.push(following);
        }
        Self { stop, done, callers }
    }

    /// Waits until every caller has written and read so many keys more.
    async fn go_on(&mut self, pairs: u64) {
        for done in &mut self.done {
            let enough = *done.borrow() + pairs;
            let waited = tokio::time::timeout(PATIENCE, done.wait_for(|done| *done >= enough)).await;
            waited.expect("calls go on").expect("no call failed");
        }
    }

    /// How many keys were written.
    async fn finish(self, what: &str) -> u64 {
        self.stop.send_replace(true);
        let mut longest = Duration::ZERO;
        for caller in self.callers {
            longest = longest.max(caller.await.unwrap());
        }
        let written = self.done.iter().map(|done| *done.borrow()).sum();
        println!("{what}: {} calls, none failed, the slowest pair took {longest:?}", 2 * written);
        written
    }
}

async fn call(client: Client, keys: String, stopped: watch::Receiver<bool>, done: watch::Sender<u64>) -> Duration {
    let mut pace = tokio::time::interval(PACE);
    let mut longest = Duration::ZERO;
    for number in 0.. {
        pace.tick().await;
        if *stopped.borrow() {
            break;
        }
        let (started, key) = (Instant::now(), format!("{keys}{number}"));
        client.put(&key, number.to_string()).await.unwrap_or_else(|error| panic!("put of {key}: {error}"));
        let read = client.get(&key).consistency(Consistency::Linearizable).await;
        let read = read.unwrap_or_else(|error| panic!("get of {key}: {error}")).into_value();
        assert_eq!(read.as_deref(), Some(number.to_string().as_bytes()), "{key}");
        longest = longest.max(started.elapsed());
        done.send_replace(number + 1);
    }
    longest
}

/// Every key of the load there is.
async fn found(client: &Client) -> BTreeSet<Vec<u8>> {
    let mut pages = client.range(KeyRange::prefix(PREFIX)).consistency(Consistency::Linearizable).pages();
    let mut keys = BTreeSet::new();
    while let Some(page) = pages.next().await.unwrap() {
        keys.extend(page.kvs.into_iter().map(|kv| kv.key.to_vec()));
    }
    keys
}

async fn counter(client: &Client) -> u64 {
    let value = client.get("counter").consistency(Consistency::Linearizable).await.unwrap().into_value();
    value.map_or(0, |text| str::from_utf8(&text).unwrap().parse().unwrap())
}

/// The counter of the programs themselves goes on from where it was.
async fn counts_on_from(client: &Client, before: u64) {
    wait::until("the programs to count", PATIENCE, || async {
        let now = counter(client).await;
        assert!(now >= before, "the counter went back from {before} to {now}");
        (now > before + 10).then_some(())
    })
    .await;
}

#[test]
fn the_readme_shows_what_happens() {
    let directory = tempfile::tempdir().unwrap();
    for part in ["Makefile", "config"] {
        let copied = Command::new("cp").arg("-r").arg(Path::new(EXAMPLE).join(part)).arg(directory.path()).status();
        assert!(copied.unwrap().success());
    }
    let session = transcript::session(&std::fs::read_to_string(format!("{EXAMPLE}/README.md")).unwrap());
    assert!(session.len() > 3, "the README shows a session");
    let differences = transcript::run(&session, directory.path());
    assert!(differences.is_empty(), "the README shows what is not so:\n{}", differences.join("\n"));
    assert!(!directory.path().join("data").exists(), "`make clean` left something");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_becomes_three_without_a_failed_call_and_then_any_one_may_be_killed() {
    let mut programs = Programs::new();
    programs.start(1);
    programs.vote("1").await;
    let first = programs.processes[&1].id();
    let client = programs.client(1);
    let mut load = Load::start(&client, "growing");
    load.go_on(5).await;
    for (id, voters) in [(2, "1 2"), (3, "1 2 3")] {
        programs.start(id);
        programs.vote(voters).await;
        load.go_on(5).await;
    }
    let mut written = load.finish("one to three").await;
    let node1 = programs.processes.get_mut(&1).unwrap();
    assert!(node1.ended().is_none() && node1.id() == first, "the first process was never restarted");
    // Each was a learner first, and only then a voter: so says whoever led.
    let story: String = programs.processes.values().map(Process::output).collect();
    for step in [
        "adding a learner node=2",
        "promoting a learner node=2",
        "adding a learner node=3",
        "promoting a learner node=3",
    ] {
        assert!(story.contains(step), "no {step:?} in\n{story}");
    }
    assert_eq!(found(&client).await.len() as u64, written);

    // A client that knows one node only soon learns who else there is: before that one is lost.
    wait::until("the client to read from another one", SOON, || async {
        let read = client.get("counter").consistency(Consistency::Eventual).await.ok()?;
        (read.header.node_id.get() != 1).then_some(())
    })
    .await;

    // Whoever is killed: nothing is lost, and calls go on. Node 1 comes back by its configuration of old.
    let counted = counter(&client).await;
    for victim in 1..=3 {
        let mut load = Load::start(&client, &format!("without-{victim}"));
        load.go_on(5).await;
        programs.kill(victim);
        load.go_on(5).await;
        written += load.finish(&format!("node {victim} killed")).await;
        // Asked of one that was not killed, by a client that knows nothing yet.
        let other = programs.client(victim % 3 + 1);
        assert_eq!(found(&other).await.len() as u64, written, "acknowledged writes were lost with node {victim}");
        counts_on_from(&other, counted).await;
        programs.start(victim);
        programs.vote("1 2 3").await;
    }
    programs.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_had_no_port_can_be_joined_once_it_was_restarted_with_one() {
    let mut programs = Programs::new();
    programs.run(1, "[cluster]\ndb_root_dir = \"data/n1\"\n");
    programs.vote("1").await;
    programs.stop().await;
    programs.start(1);
    programs.vote("1").await;
    programs.start(2);
    programs.vote("1 2").await;
    counts_on_from(&programs.client(2), 1).await;
    programs.stop().await;
}
