//! An application that embeds the engine, and asks it all the time whether it leads: `tests/src/embedded.rs` reads what
//! it prints. Stands in for `d-engine server --config PATH`.
//!
//! ```text
//! claim BY TERM FIRST LAST         for how long it believed to lead: see `Claim`
//! sees ID in TERM, sees nobody     what the notifier holds, when that changes
//! lease read answered              how its reads end, when that changes: answered, or the code of the error
//! linearizable read Unavailable
//! ```
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed step ends the application")]

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Parser;
use d_engine::prelude::{EmbeddedEngine, LeaderInfo};
use d_engine_tests::embedded::Claim;
use rustix::time::{ClockId, clock_gettime};
use tokio::signal::unix::{SignalKind, signal};

/// Between two looks, so that three of these leave the machine to the cluster.
const PACE: Duration = Duration::from_micros(200);
/// Between two reads.
const READING_PACE: Duration = Duration::from_millis(2);

static ENDED: AtomicBool = AtomicBool::new(false);

#[derive(Parser)]
struct Options {
    /// Always `server`, so that it can stand in for `d-engine`
    command: String,
    /// Configuration file in TOML
    #[arg(long)]
    config: PathBuf,
}

#[tokio::main(worker_threads = 2)]
async fn main() {
    let options = Options::parse();
    assert_eq!(options.command, "server");
    let mut terminate = signal(SignalKind::terminate()).unwrap();
    let engine = EmbeddedEngine::start_with(&options.config).await.expect("the engine starts");
    let asked = engine.clone();
    let watcher = std::thread::spawn(move || watch(&asked));
    let by_lease = tokio::spawn(read(engine.clone(), Claim::LEASE));
    let by_quorum = tokio::spawn(read(engine.clone(), "linearizable"));
    terminate.recv().await;
    engine.stop().await.expect("the engine ends well");
    ENDED.store(true, Ordering::Relaxed);
    watcher.join().unwrap();
    by_lease.await.unwrap();
    by_quorum.await.unwrap();
}

fn now() -> Duration {
    clock_gettime(ClockId::Monotonic).try_into().expect("a time since the start of the machine")
}

/// What was believed until now. Prints each claim when it is over.
struct Belief {
    by: &'static str,
    claim: Option<Claim>,
}

impl Belief {
    fn new(by: &'static str) -> Self {
        Self { by, claim: None }
    }

    /// Takes note of a look, begun and ended at these times, that says that this node leads in `term`, or not.
    fn look(&mut self, before: Duration, term: Option<u64>, after: Duration) {
        match (&mut self.claim, term) {
            (Some(claim), Some(term)) if claim.term == term => claim.last = before,
            (_, term) => {
                let claim = term.map(|term| Claim { by: self.by.to_owned(), term, first: after, last: before });
                if let Some(over) = std::mem::replace(&mut self.claim, claim) {
                    println!("{}", over.line());
                }
            }
        }
    }
}

impl Drop for Belief {
    fn drop(&mut self) {
        self.look(Duration::ZERO, None, Duration::ZERO);
    }
}

fn watch(engine: &EmbeddedEngine) {
    let own = |info: &LeaderInfo| info.leader_id == engine.node_id();
    let notifier = engine.leader_change_notifier();
    let (mut by_clock, mut by_notifier) = (Belief::new(Claim::IS_LEADER), Belief::new(Claim::NOTIFIER));
    let mut seen = None;
    while !ENDED.load(Ordering::Relaxed) {
        // The term first: whoever leads afterwards leads in this one or a later one.
        let term = engine.leader_info().filter(own).map(|info| info.term);
        let before = now();
        let leads = engine.is_leader();
        by_clock.look(before, term.filter(|_| leads), now());

        let before = now();
        let info = *notifier.borrow();
        by_notifier.look(before, info.filter(own).map(|info| info.term), now());
        if info != seen {
            seen = info;
            match info {
                Some(info) => println!("sees {} in {}", info.leader_id, info.term),
                None => println!("sees nobody"),
            }
        }
        std::thread::park_timeout(PACE);
    }
}

/// Reads until the engine has stopped. A read by the lease is a claim.
async fn read(engine: EmbeddedEngine, by: &'static str) {
    let client = engine.client();
    let mut belief = Belief::new(Claim::LEASE);
    let mut pace = tokio::time::interval(READING_PACE);
    pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut told = "";
    while let Ok(store) = client.engine() {
        let term = store.consensus().term();
        let before = now();
        let outcome = match by {
            Claim::LEASE => client.get_lease("key").await,
            _ => client.get_linearizable("key").await,
        };
        let after = now();
        // In a term that changes meanwhile it is nobody's in particular.
        let claimed = outcome.is_ok() && by == Claim::LEASE && store.consensus().term() == term;
        belief.look(before, claimed.then_some(term.get()), after);
        let outcome = outcome.map_or_else(|error| error.code().name(), |_| "answered");
        if outcome != told {
            println!("{by} read {outcome}");
            told = outcome;
        }
        drop(store);
        pace.tick().await;
    }
}
