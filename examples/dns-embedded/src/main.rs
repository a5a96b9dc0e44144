//! An authoritative DNS server. Its zone lives in the engine of this process, replicated to the other servers; an answer
//! asks nobody but this process's memory.

mod zone;

use std::error::Error;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use d_engine::prelude::*;
use hickory_server::Server;
use hickory_server::proto::rr::Name;
use hickory_server::zone_handler::Catalog;
use tokio::net::{TcpListener, UdpSocket};
use tokio::signal::unix::{SignalKind, signal};

use zone::Zone;

const LEADER_PATIENCE: Duration = Duration::from_secs(5);
const TCP_TIMEOUT: Duration = Duration::from_secs(5);
/// Answers that may wait for a slow reader, on one connection.
const TCP_ANSWERS_MAX: usize = 64;

/// Serves a DNS zone out of d-engine
#[derive(Debug, Parser)]
struct Cli {
    /// Configuration of the engine
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// The zone
    #[arg(long, default_value = "example.test.")]
    zone: Name,
    /// Where to answer, over UDP and TCP
    #[arg(long, value_name = "IP:PORT")]
    listen: SocketAddr,
}

#[tokio::main]
async fn main() -> ExitCode {
    tracing_subscriber::fmt().with_env_filter("warn,openraft=error").with_writer(std::io::stderr).init();
    match run(Cli::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dns-embedded: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: Cli) -> Result<(), Box<dyn Error>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let engine = EmbeddedEngine::start_with(&cli.config).await?;
    let client = engine.client();
    let zone = Zone::new(cli.zone.clone());

    // Nothing is answered before the zone is known: an empty one would deny every name. A node that finds no leader has
    // what it had when it was stopped, which is better than silence.
    if let Err(error) = engine.wait_ready(LEADER_PATIENCE).await {
        eprintln!("dns-embedded: {error}; meanwhile the zone is what it was");
    }
    let changes = zone.load(&client).await?;
    let mut catalog = Catalog::new();
    catalog.upsert(cli.zone.clone().into(), vec![zone.answers()]);
    let mut server = Server::new(catalog);
    server.register_socket(UdpSocket::bind(cli.listen).await?);
    server.register_listener(TcpListener::bind(cli.listen).await?, TCP_TIMEOUT, TCP_ANSWERS_MAX);
    println!("serves {} at {}", cli.zone, cli.listen);

    tokio::select! {
        ended = zone.follow(&client, changes) => ended?,
        ended = server.block_until_done() => ended?,
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
    server.shutdown_gracefully().await?;
    engine.stop().await?;
    Ok(())
}
