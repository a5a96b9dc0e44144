//! An agent of the control plane: one member of the cluster, and one PostgreSQL server unless it is a witness.
//!
//! ```text
//!   agent 1 ── engine ─┬─ engine ── agent 2        agent 3: an engine only, the third vote
//!      │               └─ engine ──────┼─────────────┘
//!   PostgreSQL ── streams, commits ▶ PostgreSQL
//!    primary          wait           standby
//! ```

mod agent;
mod pair;
mod postgres;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use d_engine::prelude::*;
use tokio::signal::unix::{SignalKind, signal};

use agent::Agent;
use pair::Pair;
use postgres::Postgres;

/// Anything that makes a step fail. The next turn tries again.
type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Keeps a PostgreSQL pair with one primary
#[derive(Debug, Parser)]
struct Cli {
    /// Configuration of this agent's member of the cluster
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Directory for this agent's PostgreSQL
    #[arg(long, value_name = "DIRECTORY")]
    postgres: PathBuf,
}

/// PostgreSQL is started by this function's future, and thereby by the main thread: the kernel kills it when that ends.
#[tokio::main]
async fn main() -> ExitCode {
    tracing_subscriber::fmt().with_env_filter("warn,openraft=error").with_writer(std::io::stderr).init();
    match run(Cli::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("control-plane: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: Cli) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let asked_to_end = async {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminate.recv() => {}
        }
    };
    let config = RaftNodeConfig::new()?.with_override_config(&cli.config)?.validate()?;
    let engine = EmbeddedEngine::start_with(&cli.config).await?;

    let members = config.cluster.initial_cluster.iter().map(|member| member.address.clone());
    let client = Client::builder().endpoints(members).call_timeout(Duration::from_secs(2)).build()?;
    let pair = Pair::new(engine.client(), client);
    if config.cluster.application_address.is_empty() {
        println!("agent {} is a witness", engine.node_id());
        asked_to_end.await;
    } else {
        let postgres = Postgres::new(engine.node_id(), &config.cluster.application_address, &cli.postgres)?;
        Agent::new(engine.node_id(), pair, postgres).run(asked_to_end).await;
    }
    engine.stop().await?;
    Ok(())
}
