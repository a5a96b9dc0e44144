//! A key-value service over HTTP, in as many processes as the cluster has members: each embeds the engine, so there is
//! nothing else to deploy. What it answers is in README.md.

mod health;
mod kv;

use std::error::Error;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use d_engine::prelude::*;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

#[derive(Parser)]
struct Options {
    /// Port for keys and values
    #[arg(long)]
    port: u16,
    /// Port for the probes of a load balancer
    #[arg(long)]
    health_port: u16,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// Configuration of this node; may leave out `.toml`
    #[arg(long)]
    config_path: PathBuf,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    tracing_subscriber::fmt().with_env_filter("info,openraft=error").with_writer(std::io::stderr).init();
    let options = Options::parse();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    // Probed from the beginning: a load balancer sees a node that is not ready, instead of none.
    let health = TcpListener::bind((options.host.as_str(), options.health_port)).await?;
    let keys = TcpListener::bind((options.host.as_str(), options.port)).await?;
    let engine = EmbeddedEngine::start_with(&options.config_path).await?;

    let (stop, stopped) = watch::channel(());
    let until_stopped = |mut stopped: watch::Receiver<()>| async move {
        // A sender that is gone asks for the same.
        let _ = stopped.changed().await;
    };
    let health = axum::serve(health, health::router(engine.clone()));
    let health = tokio::spawn(health.with_graceful_shutdown(until_stopped(stopped.clone())).into_future());
    let ready = async {
        while engine.wait_ready(Duration::from_secs(10)).await.is_err() && !engine.is_stopped().await {
            eprintln!("waiting for a majority of the nodes");
        }
    };
    tokio::select! {
        () = ready => {
            let keys = axum::serve(keys, kv::router(engine.clone()).await?);
            let keys = keys.with_graceful_shutdown(until_stopped(stopped));
            let serving = tokio::spawn(keys.into_future());
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            // The engine first: it hands leadership over, and whoever still asks is told where to go.
            engine.stop().await?;
            drop(stop);
            serving.await??;
        }
        _ = terminate.recv() => engine.stop().await?,
        _ = interrupt.recv() => engine.stop().await?,
    }
    health.abort();
    Ok(())
}
