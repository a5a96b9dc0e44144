//! `d-engine lease`: leases by hand.

use std::time::Duration;

use clap::Subcommand;
use d_engine_client::{ErrorKind, LeaseId};
use serde_json::json;
use tokio::time::Instant;

use crate::args::{ClientArgs, Layout, duration};
use crate::failure::Failure;
use crate::output::{self, HeaderJson, KeyJson};

#[derive(Debug, Subcommand)]
pub(crate) enum LeaseCommand {
    /// Opens a lease; `kv put --lease` attaches keys to it, which go when it ends
    Grant {
        /// How long it lives if it is not kept alive, such as 30s or 10m
        #[arg(value_name = "TTL", value_parser = duration)]
        ttl: Duration,
        /// The id it shall have, instead of one that was never given
        #[arg(long, value_parser = lease_id)]
        id: Option<LeaseId>,
    },
    /// Ends a lease and deletes its keys
    Revoke {
        /// The lease
        #[arg(value_parser = lease_id)]
        id: LeaseId,
    },
    /// Prolongs a lease again and again, until Ctrl-C; exits with 1 if it has ended
    KeepAlive {
        /// The lease
        #[arg(value_parser = lease_id)]
        id: LeaseId,
        /// Prolong it once
        #[arg(long)]
        once: bool,
    },
    /// Shows how long a lease has left
    Ttl {
        /// The lease
        #[arg(value_parser = lease_id)]
        id: LeaseId,
        /// List its keys, too
        #[arg(long)]
        keys: bool,
    },
    /// Lists the leases that were granted; those of `kv put --ttl` are left out
    List,
}

/// Reads the number of a lease.
pub(crate) fn lease_id(text: &str) -> Result<LeaseId, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("a number above 0 is expected, as `lease grant` prints it".to_owned()),
        Ok(number) => Ok(LeaseId(number)),
    }
}

pub(crate) async fn run(command: LeaseCommand, args: &ClientArgs) -> Result<(), Failure> {
    match command {
        LeaseCommand::Grant { ttl, id } => grant(ttl, id, args).await,
        LeaseCommand::Revoke { id } => revoke(id, args).await,
        LeaseCommand::KeepAlive { id, once } => keep_alive(id, once, args).await,
        LeaseCommand::Ttl { id, keys } => time_to_live(id, keys, args).await,
        LeaseCommand::List => list(args).await,
    }
}

async fn grant(ttl: Duration, id: Option<LeaseId>, args: &ClientArgs) -> Result<(), Failure> {
    let mut request = args.client()?.grant_lease(ttl);
    if let Some(id) = id {
        request = request.id(id);
    }
    let answer = request.await?;
    match args.output {
        Layout::Json => output::json(&json!({
            "header": HeaderJson::from(answer.header),
            "lease": answer.lease.get(),
            "ttl_ms": milliseconds(answer.ttl),
        })),
        Layout::Table => output::line(&format!("lease {} granted for {:?}", answer.lease, answer.ttl)),
    }
}

async fn revoke(id: LeaseId, args: &ClientArgs) -> Result<(), Failure> {
    let answer = args.client()?.revoke_lease(id).await?;
    match args.output {
        Layout::Json => output::json(&json!({
            "header": HeaderJson::from(answer.header),
            "deleted": answer.deleted,
        })),
        Layout::Table => {
            let keys = if answer.deleted == 1 { "key" } else { "keys" };
            let revision = answer.header.revision;
            output::line(&format!("lease {id} revoked, {} {keys} deleted, revision {revision}", answer.deleted))
        }
    }
}

async fn keep_alive(id: LeaseId, once: bool, args: &ClientArgs) -> Result<(), Failure> {
    let client = args.client()?;
    let (mut renewed, mut ttl) = (Instant::now(), Duration::ZERO);
    loop {
        let sent = Instant::now();
        match client.renew_lease(id).await {
            Ok(answer) => {
                (renewed, ttl) = (sent, answer.ttl);
                match args.output {
                    Layout::Json => output::json_line(&json!({ "lease": id.get(), "ttl_ms": milliseconds(ttl) }))?,
                    Layout::Table => output::line(&format!("lease {id} lives for {ttl:?}"))?,
                }
            }
            Err(error) if error.kind() == ErrorKind::LeaseNotFound || renewed.elapsed() >= ttl => {
                return Err(error.into());
            }
            // While the lease may live it is worth another attempt.
            Err(error) => eprintln!("d-engine: {error}"),
        }
        if once {
            return Ok(());
        }
        tokio::time::sleep_until(sent + ttl / 3).await;
    }
}

async fn time_to_live(id: LeaseId, keys: bool, args: &ClientArgs) -> Result<(), Failure> {
    let request = args.client()?.lease_time_to_live(id).min_revision(args.min_revision());
    let answer = if keys { request.keys() } else { request }.await?;
    match args.output {
        Layout::Json => output::json(&json!({
            "header": HeaderJson::from(answer.header),
            "lease": id.get(),
            "ttl_ms": milliseconds(answer.ttl),
            "remaining_ms": milliseconds(answer.remaining),
            "key_count": answer.key_count,
            "keys": keys.then(|| answer.keys.iter().map(|key| KeyJson::of(key)).collect::<Vec<_>>()),
        })),
        Layout::Table => {
            table([[
                id.to_string(),
                format!("{:?}", answer.ttl),
                left(answer.remaining),
                answer.key_count.to_string(),
            ]])?;
            answer.keys.iter().try_for_each(|key| output::line(&args.encoding.encode(key)))
        }
    }
}

async fn list(args: &ClientArgs) -> Result<(), Failure> {
    let leases = args.client()?.leases().min_revision(args.min_revision()).all().await?;
    match args.output {
        Layout::Json => {
            let lease = |lease: &d_engine_client::LeaseSummary| {
                json!({
                    "lease": lease.lease.get(),
                    "ttl_ms": milliseconds(lease.ttl),
                    "remaining_ms": milliseconds(lease.remaining),
                    "key_count": lease.key_count,
                })
            };
            output::json(&leases.iter().map(lease).collect::<Vec<_>>())
        }
        Layout::Table => table(leases.iter().map(|lease| {
            [lease.lease.to_string(), format!("{:?}", lease.ttl), left(lease.remaining), lease.key_count.to_string()]
        })),
    }
}

fn table(rows: impl IntoIterator<Item = [String; 4]>) -> Result<(), Failure> {
    output::table(["LEASE", "TTL", "LEFT", "KEYS"], rows)
}

/// To a tenth of a second: more digits tell nothing by the time they are read.
fn left(remaining: Duration) -> String {
    format!("{remaining:.1?}")
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
