//! Registers an instance of a service, and takes it out again.
//!
//! With a time to live the registration hangs on a lease that this program keeps alive: it goes with the program,
//! whether that ends well or not.

use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use d_engine_client::{Client, ErrorKind, LeaseKeeper};
use tokio::signal::unix::{SignalKind, signal};

/// Registers instances of services
#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Nodes to start from; one that answers is enough
    #[arg(long, global = true, value_delimiter = ',', value_name = "HOST:PORT,...")]
    #[arg(default_value = "127.0.0.1:9081,127.0.0.1:9082,127.0.0.1:9083")]
    endpoints: Vec<String>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Registers an instance
    Register {
        #[command(flatten)]
        instance: Instance,
        /// Where it is reached
        #[arg(long, value_name = "HOST:PORT")]
        endpoint: String,
        /// Keep it registered while this program runs, and for so long after its last sign of life, such as 10s
        #[arg(long, value_name = "SECONDS", value_parser = seconds)]
        ttl: Option<Duration>,
    },
    /// Takes an instance out
    Unregister {
        #[command(flatten)]
        instance: Instance,
    },
}

#[derive(Debug, Args)]
struct Instance {
    /// Name of the service
    #[arg(long)]
    name: String,
    /// Name of the instance
    #[arg(long)]
    instance: String,
}

impl Instance {
    fn key(&self) -> String {
        format!("services/{}/{}", self.name, self.instance)
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number = text.strip_suffix('s').and_then(|number| number.parse().ok()).filter(|number| *number > 0);
    number.map(Duration::from_secs).ok_or_else(|| "a number of seconds is expected, such as 10s".to_owned())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(Cli::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("admin: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: Cli) -> Result<(), Box<dyn Error>> {
    let client = Client::builder().endpoints(&cli.endpoints).build()?;
    match cli.command {
        Command::Register { instance, endpoint, ttl: None } => {
            client.put(instance.key(), &endpoint).await?;
            println!("registered {} = {endpoint}", instance.key());
        }
        Command::Register { instance, endpoint, ttl: Some(ttl) } => {
            stay_registered(&client, &instance.key(), &endpoint, ttl).await?;
            println!("unregistered {}", instance.key());
        }
        Command::Unregister { instance } => {
            let deleted = client.delete(instance.key()).await?.deleted;
            println!("{} {}", if deleted { "unregistered" } else { "was not registered:" }, instance.key());
        }
    }
    Ok(())
}

/// Keeps the key until it is asked to end, and takes it out then.
async fn stay_registered(client: &Client, key: &str, endpoint: &str, ttl: Duration) -> Result<(), Box<dyn Error>> {
    let mut asked = std::pin::pin!(asked_to_end());
    loop {
        let lease = tokio::select! {
            lease = register(client, key, endpoint, ttl) => lease?,
            asked = &mut asked => return asked,
        };
        println!("registered {key} = {endpoint}, for as long as this program runs");
        tokio::select! {
            // Registered anew: what is lost is lost for good.
            () = lease.lost() => eprintln!("admin: out of touch for {ttl:?}, the registration is gone"),
            asked = &mut asked => {
                // Ends this registration, and no other one that may have taken its place.
                lease.revoke().await?;
                return asked;
            }
        }
    }
}

/// Registers, however long it takes to reach the cluster. What is wrong with the request itself no waiting mends.
async fn register(
    client: &Client,
    key: &str,
    endpoint: &str,
    ttl: Duration,
) -> Result<LeaseKeeper, d_engine_client::Error> {
    loop {
        let attempt = async {
            let lease = client.keep_lease(ttl).await?;
            client.put(key, endpoint).lease(lease.id()).await?;
            Ok::<_, d_engine_client::Error>(lease)
        };
        match attempt.await {
            Ok(lease) => return Ok(lease),
            Err(error) if error.kind() == ErrorKind::InvalidArgument => return Err(error),
            Err(error) => eprintln!("admin: not registered yet: {error}"),
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// Ends with Ctrl-C or SIGTERM.
async fn asked_to_end() -> Result<(), Box<dyn Error>> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted?,
        _ = terminate.recv() => {}
    }
    Ok(())
}
