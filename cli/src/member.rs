//! `d-engine member`: who belongs to the cluster.

use clap::Subcommand;
use d_engine_client::{Member, MemberRole};
use serde::Serialize;

use crate::args::{ClientArgs, Layout};
use crate::failure::Failure;
use crate::output;

#[derive(Debug, Subcommand)]
pub(crate) enum MemberCommand {
    /// Lists the members; * marks the leader
    List,
}

#[derive(Serialize)]
struct MembersJson {
    header: output::HeaderJson,
    leader: Option<LeaderJson>,
    members: Vec<MemberJson>,
}

#[derive(Serialize)]
struct LeaderJson {
    id: u32,
    term: u64,
    client_address: String,
}

#[derive(Serialize)]
struct MemberJson {
    id: u32,
    role: &'static str,
    peer_address: String,
    client_address: String,
    application_address: String,
}

pub(crate) async fn run(command: MemberCommand, args: &ClientArgs) -> Result<(), Failure> {
    match command {
        MemberCommand::List => list(args).await,
    }
}

async fn list(args: &ClientArgs) -> Result<(), Failure> {
    let members = args.client()?.members().await?;
    let leader = members.leader.as_ref();
    match args.output {
        Layout::Json => output::json(&MembersJson {
            header: members.header.into(),
            leader: leader.map(|leader| LeaderJson {
                id: leader.id.get(),
                term: leader.term.get(),
                client_address: leader.client_address.clone(),
            }),
            members: members
                .members
                .iter()
                .map(|member| MemberJson {
                    id: member.id.get(),
                    role: role(member),
                    peer_address: member.peer_address.clone(),
                    client_address: member.client_address.clone(),
                    application_address: member.application_address.clone(),
                })
                .collect(),
        }),
        Layout::Table => output::table(
            ["", "ID", "ROLE", "CLIENT ADDRESS", "PEER ADDRESS", "APPLICATION ADDRESS"],
            members.members.iter().map(|member| {
                let leads = leader.is_some_and(|leader| leader.id == member.id);
                [
                    if leads { "*" } else { "" }.to_owned(),
                    member.id.to_string(),
                    role(member).to_owned(),
                    member.client_address.clone(),
                    member.peer_address.clone(),
                    member.application_address.clone(),
                ]
            }),
        ),
    }
}

pub(crate) fn role(member: &Member) -> &'static str {
    match member.role {
        MemberRole::Voter => "voter",
        MemberRole::Learner => "learner",
        _ => "unknown",
    }
}
