//! A program that runs alone at first, and in three processes later: the one that leads counts, and each says who belongs
//! to the cluster whenever that changes. It is the same program in all of them; only their configurations differ.

use std::error::Error;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use d_engine::prelude::*;
use d_engine::proto::v1::{MemberRole, MembersResponse};
use tokio::signal::unix::{SignalKind, signal};

/// What is counted in.
const COUNTER: &str = "counter";
/// Between two steps.
const PACE: Duration = Duration::from_millis(20);

#[derive(Parser)]
struct Options {
    /// Configuration of this node; may leave out `.toml`
    #[arg(long)]
    config_path: PathBuf,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    tracing_subscriber::fmt()
        .with_env_filter("info,openraft=error")
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
    let options = Options::parse();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let engine = EmbeddedEngine::start_with(&options.config_path).await?;
    tokio::select! {
        () = work(&engine) => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    // If it has ended by itself, this says why.
    engine.stop().await?;
    Ok(())
}

/// Counts while this node leads, and tells of every change, until the engine ends.
async fn work(engine: &EmbeddedEngine) {
    let client = engine.client();
    let mut pace = tokio::time::interval(PACE);
    let mut told = String::new();
    while let Ok(store) = client.engine() {
        let members = describe(&store.members());
        if members != told {
            println!("{members}");
            told = members;
        }
        if engine.is_leader()
            && let Err(error) = count(&client).await
        {
            // Whoever leads next goes on with what is there.
            println!("not counted: {error}");
        }
        pace.tick().await;
    }
}

fn describe(members: &MembersResponse) -> String {
    let with = |role| {
        let ids = members.members.iter().filter(|member| member.role() == role).map(|member| format!(" {}", member.id));
        ids.collect::<String>()
    };
    let (voters, learners) = (with(MemberRole::Voter), with(MemberRole::Learner));
    if voters.is_empty() {
        return "no member yet".to_owned();
    }
    let learners = if learners.is_empty() { String::new() } else { format!(", learners{learners}") };
    let leader = members.leader.as_ref().map_or_else(|| "nobody".to_owned(), |leader| leader.node_id.to_string());
    format!("voters{voters}{learners}, {leader} leads")
}

/// One more than before. A swap that was lost on its way cannot take effect later, since the counter has moved on.
async fn count(client: &EmbeddedClient) -> Result<(), LocalClientError> {
    let before = client.get_lease(COUNTER).await?;
    let number: u64 = before.as_deref().and_then(|text| str::from_utf8(text).ok()?.parse().ok()).unwrap_or(0);
    client.compare_and_swap(COUNTER, before, (number + 1).to_string()).await?;
    Ok(())
}
