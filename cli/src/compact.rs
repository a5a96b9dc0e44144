//! `d-engine compact`: forgets history.

use std::time::Duration;

use clap::{ArgGroup, Args};
use d_engine_client::Revision;
use serde_json::json;

use crate::args::{ClientArgs, Layout, duration};
use crate::failure::Failure;
use crate::output::{self, HeaderJson};

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("target").required(true).args(["revision", "older_than"]))]
pub(crate) struct CompactArgs {
    /// The oldest revision to keep
    revision: Option<u64>,
    /// Forget what was replaced longer ago than this; nodes remember when only for as long as they run
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    older_than: Option<Duration>,
}

pub(crate) async fn run(compact: CompactArgs, args: &ClientArgs) -> Result<(), Failure> {
    let client = args.client()?;
    let answer = match compact.older_than {
        Some(age) => client.compact_older_than(age).await?,
        None => client.compact(Revision(compact.revision.unwrap_or_default())).await?,
    };
    let oldest = answer.compacted_revision;
    match args.output {
        Layout::Json => output::json(&json!({
            "header": HeaderJson::from(answer.header),
            "compacted_revision": oldest.get(),
        })),
        Layout::Table => output::line(&format!("the history begins at revision {oldest}")),
    }
}
