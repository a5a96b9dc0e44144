//! One of several processes, of which the leader works.
//!
//! ```text
//! follows who leads ──▶ this node ──▶ makes itself known, which gives the token ──▶ works ──┐
//!        ▲                                                                                  │
//!        └──── leads no more, by the notifier or by the lease's clock, or is superseded ◀───┘
//! ```
//!
//! A leader learns that it leads no more no later than its lease ends, and nobody else leads before that: so it stops
//! before another starts. What it cannot stop is a step under way: one that began in time may end late, after a pause of
//! the whole process. That one the ledger refuses, by the token.

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use d_engine::prelude::*;
use d_engine::proto::v1;
use d_engine::server::engine::EngineError;
use d_engine_example_orchestrator::{Entry, Ledger, LedgerError, Token};
use tokio::signal::unix::{SignalKind, signal};

/// Where a leader makes itself known.
const LEADER_KEY: &str = "orchestrator/leader";
/// How long a step of the work takes.
const STEP: Duration = Duration::from_millis(20);

#[derive(Parser)]
struct Options {
    /// Configuration of this node; may leave out `.toml`
    #[arg(long)]
    config_path: PathBuf,
    /// File that the work changes, the same for all nodes
    #[arg(long)]
    ledger: PathBuf,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    tracing_subscriber::fmt().with_env_filter("warn,openraft=error").with_writer(std::io::stderr).init();
    let options = Options::parse();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let engine = EmbeddedEngine::start_with(&options.config_path).await?;
    let ledger = Ledger::at(options.ledger);
    tokio::select! {
        () = lead_and_work(&engine, &ledger) => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    engine.stop().await?;
    Ok(())
}

/// Works in every reign of this node, until the engine ends.
async fn lead_and_work(engine: &EmbeddedEngine, ledger: &Ledger) {
    let mut leader = engine.leader_change_notifier();
    let node = engine.node_id();
    loop {
        let reign = match leader.wait_for(|info| info.is_some_and(|info| info.leader_id == node)).await {
            Ok(reign) => *reign,
            Err(_) => return,
        };
        let mut changes = leader.clone();
        let work = async {
            match announce(engine).await {
                Ok(token) => work(engine, ledger, token).await,
                Err(error) => println!("cannot begin: {error}"),
            }
        };
        tokio::select! {
            () = work => {}
            // Ended or another one's: what is under way is dropped at its next await.
            _ = changes.wait_for(|now| *now != reign) => println!("leads no more"),
        }
        // What is published follows the lease's clock a moment later.
        if let Ok(Err(_)) = tokio::time::timeout(STEP, leader.changed()).await {
            return;
        }
    }
}

/// Makes this leader known. The revision of that write is greater than that of every leader before.
async fn announce(engine: &EmbeddedEngine) -> Result<Token, LocalClientError> {
    let client = engine.client();
    let value = engine.node_id().to_string();
    let request = v1::PutRequest { key: LEADER_KEY.into(), value: value.into(), ..v1::PutRequest::default() };
    let answer = client.engine()?.put(request, client.deadline()).await.map_err(LocalClientError::Engine)?;
    let header = answer.header.ok_or(LocalClientError::Engine(EngineError::Stopped))?;
    println!("leads by token {} {}", header.epoch, header.revision);
    Ok(Token { epoch: header.epoch, revision: header.revision })
}

/// Step by step, until this node leads no more.
async fn work(engine: &EmbeddedEngine, ledger: &Ledger, token: Token) {
    let ledger = Arc::new(ledger.clone());
    let entry = Entry { token, node: engine.node_id() };
    while engine.is_leader() {
        let ledger = Arc::clone(&ledger);
        // A thread of its own: like a call to another system, a step that has begun is not called back.
        let step = tokio::task::spawn_blocking(move || {
            std::thread::park_timeout(STEP);
            match ledger.enter(entry) {
                Err(LedgerError::Superseded { by }) => {
                    println!("refused: superseded by {} {}", by.epoch, by.revision);
                    false
                }
                Err(LedgerError::Io(error)) => {
                    println!("failed: {error}");
                    false
                }
                Ok(()) => true,
            }
        });
        if !step.await.unwrap_or(false) {
            return;
        }
    }
    println!("leads no more");
}
