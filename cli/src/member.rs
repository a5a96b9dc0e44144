//! `d-engine member`: who belongs to the cluster, and who leads it.

use clap::{Args, Subcommand};
use d_engine_client::{ChangeMember, Client, Leader, Member, MemberRole, NodeId};
use serde::Serialize;

use crate::args::{ClientArgs, Layout};
use crate::failure::Failure;
use crate::output;

#[derive(Debug, Subcommand)]
pub(crate) enum MemberCommand {
    /// Lists the members; * marks the leader
    List,
    /// Adds a node that runs and waits to be added; it becomes a voter once it has caught up
    Add {
        /// Where its peers reach it
        #[arg(value_name = "HOST:PORT")]
        peer_address: String,
        /// Keep it a learner: it receives everything and has no vote
        #[arg(long)]
        learner: bool,
    },
    /// Makes a learner that has caught up a voter
    Promote(ChangeArgs),
    /// Makes a voter a learner; one that leads hands over first
    Demote(ChangeArgs),
    /// Removes a member, dead or alive; one that leads hands over first
    Remove(ChangeArgs),
    /// Has the leader hand over to another voter
    Transfer {
        /// The voter that is to lead [default: the one that is the most up to date]
        #[arg(value_parser = clap::value_parser!(u32).range(1..))]
        id: Option<u32>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct ChangeArgs {
    /// The member
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    id: u32,
    /// Do it although fewer voters than a majority answer afterwards. RISK: the cluster then takes no writes until
    /// enough of them are back, and this change may wait for that too. If they never come back, restore a backup
    #[arg(long)]
    force: bool,
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
    promotable: bool,
    peer_address: String,
    client_address: String,
    application_address: String,
}

pub(crate) async fn run(command: MemberCommand, args: &ClientArgs) -> Result<(), Failure> {
    let client = args.client()?;
    let change = |of: fn(&Client, NodeId) -> ChangeMember, change: &ChangeArgs| {
        let request = of(&client, NodeId(change.id));
        if change.force { request.force() } else { request }
    };
    let (request, done) = match &command {
        MemberCommand::List => {
            let members = client.members().await?;
            return print(members.header.into(), members.leader.as_ref(), &members.members, args);
        }
        MemberCommand::Transfer { id } => return transfer(&client, *id, args).await,
        MemberCommand::Add { peer_address, learner: false } => (client.add_member(peer_address), "added"),
        MemberCommand::Add { peer_address, learner: true } => (client.add_learner(peer_address), "added as a learner"),
        MemberCommand::Promote(args) => (change(Client::promote_member, args), "promoted"),
        MemberCommand::Demote(args) => (change(Client::demote_member, args), "demoted"),
        MemberCommand::Remove(args) => (change(Client::remove_member, args), "removed"),
    };
    let changed = request.await?;
    if args.output == Layout::Table {
        output::line(&format!("{done}; the members are now"))?;
    }
    let leader = client.members().await?.leader;
    print(changed.header.into(), leader.as_ref(), &changed.members, args)
}

async fn transfer(client: &Client, to: Option<u32>, args: &ClientArgs) -> Result<(), Failure> {
    let request = client.transfer_leadership();
    let answer = match to {
        Some(id) => request.to(NodeId(id)).await?,
        None => request.await?,
    };
    match (args.output, answer.leader) {
        (Layout::Json, leader) => output::json(&serde_json::json!({
            "header": output::HeaderJson::from(answer.header),
            "leader": leader.as_ref().map(LeaderJson::from),
        })),
        (Layout::Table, Some(leader)) => output::line(&format!("node {} leads, in term {}", leader.id, leader.term)),
        (Layout::Table, None) => output::line("leadership was handed over"),
    }
}

impl From<&Leader> for LeaderJson {
    fn from(leader: &Leader) -> Self {
        Self { id: leader.id.get(), term: leader.term.get(), client_address: leader.client_address.clone() }
    }
}

fn print(
    header: output::HeaderJson,
    leader: Option<&Leader>,
    members: &[Member],
    args: &ClientArgs,
) -> Result<(), Failure> {
    match args.output {
        Layout::Json => output::json(&MembersJson {
            header,
            leader: leader.map(LeaderJson::from),
            members: members
                .iter()
                .map(|member| MemberJson {
                    id: member.id.get(),
                    role: role(member),
                    promotable: member.promotable,
                    peer_address: member.peer_address.clone(),
                    client_address: member.client_address.clone(),
                    application_address: member.application_address.clone(),
                })
                .collect(),
        }),
        Layout::Table => output::table(
            ["", "ID", "ROLE", "CLIENT ADDRESS", "PEER ADDRESS", "APPLICATION ADDRESS"],
            members.iter().map(|member| {
                let leads = leader.is_some_and(|leader| leader.id == member.id);
                let catches_up = if member.promotable { ", catching up" } else { "" };
                [
                    if leads { "*" } else { "" }.to_owned(),
                    member.id.to_string(),
                    format!("{}{catches_up}", role(member)),
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
