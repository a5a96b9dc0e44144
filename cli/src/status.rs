//! `d-engine status`: every member at one glance, those that do not answer included.

use std::time::Duration;

use d_engine_client::{Client, Error, LogIndex, NodeRole, NodeStatus};
use futures_util::future::join_all;
use serde::Serialize;

use crate::args::{ClientArgs, Layout};
use crate::failure::Failure;
use crate::output;

/// A node that is silent should not hold up the table of the others for long.
const TIMEOUT: Duration = Duration::from_secs(2);

/// A node, and what it said.
struct Row {
    /// `None` for an endpoint of which nobody knows whose it is.
    id: Option<u32>,
    address: String,
    status: Result<NodeStatus, Error>,
}

#[derive(Serialize)]
struct NodeJson {
    id: Option<u32>,
    address: String,
    reachable: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    state: Option<StateJson>,
}

#[derive(Serialize)]
struct StateJson {
    role: &'static str,
    ready: bool,
    problem: String,
    alarm: String,
    header: output::HeaderJson,
    leader_id: Option<u32>,
    last_log_index: u64,
    committed_index: u64,
    applied_index: u64,
    keys: u64,
    disk_bytes: u64,
    version: String,
    uptime_ms: u64,
}

pub(crate) async fn run(args: &ClientArgs) -> Result<(), Failure> {
    let builder = args.builder()?.call_timeout(args.timeout.unwrap_or(TIMEOUT));
    let client = builder.build()?;
    let rows = ask_everybody(&client, args).await;
    match args.output {
        Layout::Json => output::json(&rows.iter().map(NodeJson::from).collect::<Vec<_>>())?,
        Layout::Table => print_table(&rows)?,
    }
    for (row, status) in rows.iter().filter_map(|row| Some((row, row.status.as_ref().ok()?))) {
        if args.output == Layout::Table && !status.alarm.is_empty() {
            output::line(&format!("alarm of {}: {}", row.address, status.alarm))?;
        }
    }
    let led = rows.iter().flat_map(|row| &row.status).any(|status| status.role == NodeRole::Leader && status.ready);
    match led {
        true => Ok(()),
        false => Err(Failure::Unhealthy(
            "no leader answered. The cluster takes no writes until a majority of the voters runs and is connected; \
             start the members that are down"
                .to_owned(),
        )),
    }
}

/// Asks all members at the same time; without a member list, the endpoints.
async fn ask_everybody(client: &Client, args: &ClientArgs) -> Vec<Row> {
    let nodes: Vec<(Option<u32>, String)> = match client.members().await {
        Ok(members) if !members.members.is_empty() => {
            members.members.into_iter().map(|member| (Some(member.id.get()), member.client_address)).collect()
        }
        _ => args.endpoints.iter().map(|endpoint| (None, endpoint.clone())).collect(),
    };
    join_all(nodes.into_iter().map(|(id, address)| async move {
        let status = client.status(&address).await;
        let id = id.or(status.as_ref().ok().map(|status| status.header.node_id.get()));
        Row { id, address, status }
    }))
    .await
}

fn print_table(rows: &[Row]) -> Result<(), Failure> {
    let names =
        ["", "ID", "ADDRESS", "ROLE", "STATE", "TERM", "REVISION", "APPLIED", "LOG", "KEYS", "DISK", "UP", "VERSION"];
    output::table(
        names,
        rows.iter().map(|row| {
            let id = row.id.map_or_else(|| "?".to_owned(), |id| id.to_string());
            match &row.status {
                Ok(status) => [
                    if status.role == NodeRole::Leader { "*" } else { "" }.to_owned(),
                    id,
                    row.address.clone(),
                    role(status).to_owned(),
                    if status.ready { "ready".to_owned() } else { format!("not ready: {}", status.problem) },
                    status.header.term.to_string(),
                    status.header.revision.to_string(),
                    applied(status),
                    status.last_log_index.to_string(),
                    status.keys.to_string(),
                    size(status.disk_bytes),
                    uptime(status.uptime),
                    status.version.clone(),
                ],
                Err(error) => {
                    let mut cells = [const { String::new() }; 13];
                    cells[1] = id;
                    cells[2] = row.address.clone();
                    cells[3] = "-".to_owned();
                    cells[4] = format!("unreachable: {}", error.message());
                    cells
                }
            }
        }),
    )
}

/// The applied index, with how far it lags behind what is committed.
fn applied(status: &NodeStatus) -> String {
    let LogIndex(lag) = LogIndex(status.committed_index.get().saturating_sub(status.applied_index.get()));
    if lag == 0 { status.applied_index.to_string() } else { format!("{} (-{lag})", status.applied_index) }
}

fn role(status: &NodeStatus) -> &'static str {
    match status.role {
        NodeRole::Leader => "leader",
        NodeRole::Follower => "follower",
        NodeRole::Candidate => "candidate",
        NodeRole::Learner => "learner",
        _ => "unknown",
    }
}

pub(crate) fn size(bytes: u64) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    match units.iter().find(|(shift, _)| bytes >> shift != 0) {
        Some((shift, unit)) => {
            let tenths = (u128::from(bytes) * 10) >> shift;
            format!("{}.{} {unit}", tenths / 10, tenths % 10)
        }
        None => format!("{bytes} B"),
    }
}

pub(crate) fn uptime(time: Duration) -> String {
    let seconds = time.as_secs();
    match (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60) {
        (0, 0, 0, seconds) => format!("{seconds}s"),
        (0, 0, minutes, seconds) => format!("{minutes}m{seconds:02}s"),
        (0, hours, minutes, _) => format!("{hours}h{minutes:02}m"),
        (days, hours, _, _) => format!("{days}d{hours:02}h"),
    }
}

impl From<&Row> for NodeJson {
    fn from(row: &Row) -> Self {
        Self {
            id: row.id,
            address: row.address.clone(),
            reachable: row.status.is_ok(),
            error: row.status.as_ref().err().map(ToString::to_string),
            state: row.status.as_ref().ok().map(|status| StateJson {
                role: role(status),
                ready: status.ready,
                problem: status.problem.clone(),
                alarm: status.alarm.clone(),
                header: status.header.into(),
                leader_id: status.leader.as_ref().map(|leader| leader.id.get()),
                last_log_index: status.last_log_index.get(),
                committed_index: status.committed_index.get(),
                applied_index: status.applied_index.get(),
                keys: status.keys,
                disk_bytes: status.disk_bytes,
                version: status.version.clone(),
                uptime_ms: u64::try_from(status.uptime.as_millis()).unwrap_or(u64::MAX),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_short() {
        assert_eq!(
            [0, 1023, 1024, 1536, 5 << 20, u64::MAX].map(size),
            ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "5.0 MiB", "17179869183.9 GiB"]
        );
        let times = [59, 61, 3600, 90_000].map(|seconds| uptime(Duration::from_secs(seconds)));
        assert_eq!(times, ["59s", "1m01s", "1h00m", "1d01h"]);
    }
}
