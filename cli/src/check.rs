//! `d-engine check`: whether all members hold the same.

use d_engine_client::{CheckFinding, CheckResponse};
use serde::Serialize;

use crate::args::{ClientArgs, Layout};
use crate::failure::Failure;
use crate::output;

#[derive(Serialize)]
struct CheckJson {
    header: output::HeaderJson,
    index: u64,
    members: Vec<MemberJson>,
}

#[derive(Serialize)]
struct MemberJson {
    id: u32,
    finding: &'static str,
    hash: String,
}

pub(crate) async fn run(args: &ClientArgs) -> Result<(), Failure> {
    let CheckResponse { header, index, members } = args.client()?.check().await?;
    let rows: Vec<_> = members
        .iter()
        .map(|member| MemberJson {
            id: member.id.get(),
            finding: match member.finding {
                CheckFinding::Same => "same",
                CheckFinding::Different => "different",
                _ => "unknown",
            },
            hash: format!("{:016x}", member.hash),
        })
        .collect();
    let different: Vec<_> = members.iter().filter(|member| member.finding == CheckFinding::Different).collect();
    match args.output {
        Layout::Json => output::json(&CheckJson { header: header.into(), index: index.get(), members: rows })?,
        Layout::Table => output::table(
            ["ID", "STATE", "HASH"],
            rows.into_iter().map(|row| [row.id.to_string(), row.finding.to_owned(), row.hash]),
        )?,
    }
    match different.is_empty() {
        true => Ok(()),
        false => Err(Failure::Unhealthy(format!(
            "after log entry {index} the state of {} of the members was not the cluster's. They stop; remove each, empty \
             its data directory and add it again",
            different.len()
        ))),
    }
}
