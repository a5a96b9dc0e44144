//! Shows who is registered, and every registration and loss from then on.
//!
//! Reading first and watching then must leave no gap between the two. A cache does that: it reads the keys at one
//! revision, watches from the next one on, and goes on through lost nodes and connections.

use std::error::Error;
use std::io::Write;
use std::process::ExitCode;

use clap::{ArgGroup, Parser};
use d_engine_client::{Client, KeyRange};

/// Shows who is registered, and every change of it
#[derive(Debug, Parser)]
#[command(group = ArgGroup::new("keys").required(true).args(["key", "prefix"]))]
struct Cli {
    /// Watch one instance, such as services/api-gateway/node1
    #[arg(long)]
    key: Option<String>,
    /// Watch all below, such as services/
    #[arg(long)]
    prefix: Option<String>,
    /// Nodes to start from; one that answers is enough
    #[arg(long, value_delimiter = ',', value_name = "HOST:PORT,...")]
    #[arg(default_value = "127.0.0.1:9081,127.0.0.1:9082,127.0.0.1:9083")]
    endpoints: Vec<String>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(Cli::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("watcher: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: Cli) -> Result<(), Box<dyn Error>> {
    let range = match (cli.key, cli.prefix) {
        // The first key after this one is the same with a zero byte behind it.
        (Some(key), _) => KeyRange::between(&key, format!("{key}\0")),
        (None, prefix) => KeyRange::prefix(prefix.unwrap_or_default()),
    };
    let cache = Client::builder().endpoints(&cli.endpoints).build()?.cache(range).await?;
    let (registered, mut changes) = cache.view_and_changes();
    for kv in registered.iter() {
        print(&kv.key, Some(&kv.value))?;
    }
    while let Some(change) = changes.next().await {
        print(&change.key, change.after.as_ref().map(|kv| &kv.value[..]))?;
    }
    // The changes end with the cache only.
    Err(cache.error().map_or_else(|| "the watch ended".into(), Into::into))
}

fn print(key: &[u8], value: Option<&[u8]>) -> std::io::Result<()> {
    let key = String::from_utf8_lossy(key);
    match value {
        Some(value) => writeln!(std::io::stdout(), "[PUT] {key} = {}", String::from_utf8_lossy(value)),
        None => writeln!(std::io::stdout(), "[DELETE] {key}"),
    }
}
