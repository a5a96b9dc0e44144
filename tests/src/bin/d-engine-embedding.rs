//! An application that embeds the engine, and asks it all the time whether it leads: `tests/src/embedded.rs` reads what
//! it prints. Stands in for `d-engine server --config PATH`.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed step ends the application")]

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Parser;
use d_engine::prelude::EmbeddedEngine;
use d_engine_tests::embedded::Claim;
use rustix::time::{ClockId, clock_gettime};
use tokio::signal::unix::{SignalKind, signal};

/// Between two looks, so that three of these leave the machine to the cluster.
const PACE: Duration = Duration::from_micros(200);

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
    terminate.recv().await;
    engine.stop().await.expect("the engine ends well");
    ENDED.store(true, Ordering::Relaxed);
    watcher.join().unwrap();
}

fn now() -> Duration {
    clock_gettime(ClockId::Monotonic).try_into().expect("a time since the start of the machine")
}

/// Prints each claim when it is over.
fn watch(engine: &EmbeddedEngine) {
    let mut claim: Option<Claim> = None;
    while !ENDED.load(Ordering::Relaxed) {
        // The term first: whoever leads afterwards leads in this one or a later one.
        let term = engine.leader_info().filter(|info| info.leader_id == engine.node_id()).map(|info| info.term);
        let before = now();
        let leads = engine.is_leader();
        let after = now();
        match (&mut claim, term.filter(|_| leads)) {
            (Some(claim), Some(term)) if claim.term == term => claim.last = before,
            (_, term) => {
                if let Some(claim) = claim.take() {
                    println!("{}", claim.line());
                }
                claim = term.map(|term| Claim { term, first: after, last: before });
            }
        }
        std::thread::park_timeout(PACE);
    }
    if let Some(claim) = claim {
        println!("{}", claim.line());
    }
}
