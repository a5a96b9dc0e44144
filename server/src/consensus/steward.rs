//! Changes of the membership: those that are asked for, and those a leader makes by itself.
//!
//! One task per node. It makes one change at a time, and only while its node leads; a change that is under way goes on
//! when whoever asked for it gives up. By itself it
//!
//! - finishes a change that an earlier leader left half done (joint consensus), and leaves office if it has no vote,
//! - records where members are reached that have moved, and adds fresh nodes that ask for it,
//! - makes learners voters that are to become voters and have caught up.
//!
//! Removing a voter takes three entries: into joint consensus and out of it, which leave it a learner that nobody
//! promotes, then without it. A leader that dies in between leaves a learner behind, and asking again removes it.
//!
//! An id may be used again with another data directory, since a node only campaigns while its membership names its
//! own incarnation. Without this:
//! ```text
//! members {3} ── {1,2,3} ── {1,2} ── {1,2,3'}      3' has lost the disk of 3, and replays this log from the beginning
//!            ╰─ 3' is cut off here: "I am the only voter", leads and acknowledges, beside the leader of {1,2}
//! ```

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use d_engine_proto::{NodeId, v1};
use openraft::ChangeMembers;
use openraft::ServerState;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ChangeMembershipError, ClientWriteError, RaftError};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::formation::Formation;
use super::leadership::Leadership;
use super::member::Member;
use super::network::Peers;
use super::peer_service::Quarantine;
use super::poison::Poison;
use super::raft_types::{LogId, Raft, RaftVote};
use super::transfer::{Transfer, TransferError};
use crate::clock::Moment;
use crate::limits::{LEARNER_LAG_ENTRIES_MAX, MEMBER_CHANGES_WAITING_MAX};
use crate::metrics::{ChangeOutcome, Metrics};

/// How often a leader looks for something to do by itself, and how long it waits after it failed.
const ROUND: Duration = Duration::from_millis(200);

/// A change of who belongs to the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemberChange {
    /// Adds a node that belongs to no other cluster as a learner. Its id and its other addresses are what it says.
    Add {
        /// Where it is reached, host:port.
        peer_address: String,
        /// Whether it becomes a voter once it has caught up.
        promotable: bool,
    },
    /// Makes a learner that has caught up a voter.
    Promote(NodeId),
    /// Makes a voter a learner that stays one.
    Demote(NodeId),
    /// Removes a member, dead or alive.
    Remove(NodeId),
}

impl MemberChange {
    fn name(&self) -> &'static str {
        match self {
            Self::Add { .. } => "add",
            Self::Promote(_) => "promote",
            Self::Demote(_) => "demote",
            Self::Remove(_) => "remove",
        }
    }
}

/// Why the membership was not changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// This node does not lead, or handed over leadership because it was to be removed or demoted itself.
    #[error("this node does not lead")]
    NotLeader,
    /// The node to add cannot be asked who it is.
    #[error("no node answers at {address} ({reason}): start it first, and check the address and the network")]
    Unreachable {
        /// Its address.
        address: String,
        /// What went wrong.
        reason: String,
    },
    /// The node to add is not one that can be.
    #[error("the node at {address} cannot be added: {reason}")]
    Unfit {
        /// Its address.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The id belongs to another data directory.
    #[error(
        "node {id} is a member with another data directory: if that is lost, remove member {id} first, then add the node"
    )]
    IdTaken {
        /// The id.
        id: NodeId,
    },
    /// There is no such member.
    #[error("node {id} is no member of this cluster: see the list of members")]
    NoMember {
        /// The id.
        id: NodeId,
    },
    /// A learner that lags, or that does not answer.
    #[error("node {id} has not caught up: it {}; wait until it has", lag(*behind))]
    NotCaughtUp {
        /// The learner.
        id: NodeId,
        /// Log entries it lacks; `None`: it does not answer.
        behind: Option<u64>,
    },
    /// Too few voters would answer afterwards.
    #[error(
        "of the {voters} voters that would be left, {live} answer and {needed} are needed: the cluster would take no \
         writes; start the members that are down, or force the change and accept that"
    )]
    QuorumAtRisk {
        /// Voters after the change.
        voters: usize,
        /// How many of them answer.
        live: usize,
        /// A majority of them.
        needed: usize,
    },
    /// No voter would be left.
    #[error("node {id} is the only voter: add and promote another one first")]
    LastVoter {
        /// The voter.
        id: NodeId,
    },
    /// The change would have concerned the leader, which found no successor.
    #[error("the leader has to hand over leadership first: {0}")]
    HandOver(TransferError),
    /// An earlier change is not committed yet.
    #[error("an earlier change of the membership is not committed yet: ask again, or start the members that are down")]
    InProgress,
    /// Too many changes wait for their turn.
    #[error("{MEMBER_CHANGES_WAITING_MAX} changes of the membership wait already")]
    Overloaded,
    /// Leadership was lost, or the node stops, with the change under way.
    #[error("the change was interrupted ({reason}): look at the list of members before asking again")]
    Interrupted {
        /// By what.
        reason: String,
    },
}

pub(super) fn lag(behind: Option<u64>) -> String {
    behind.map_or_else(|| "does not answer".to_owned(), |behind| format!("is {behind} log entries behind"))
}

/// What a node says of itself in a hello.
#[derive(Debug)]
pub(super) struct Introduction {
    id: u32,
    incarnation: u64,
    addresses: v1::Addresses,
    /// To add it, and whether it is to become a voter; `None`: it does not ask.
    joins: Option<bool>,
}

impl Introduction {
    /// `None` if the hello says nothing that could be of use.
    pub(super) fn of(request: v1::HelloRequest) -> Option<Self> {
        let (route, addresses) = (request.route?, request.addresses?);
        let own = request.initial_cluster.into_iter().find(|member| member.id == route.from)?;
        let joins = (own.joining || own.learner).then_some(own.joining);
        Some(Self { id: route.from, incarnation: route.from_incarnation, addresses, joins })
    }
}

type Asked = (MemberChange, bool, oneshot::Sender<Result<(), ChangeError>>);

/// The way to a node's steward. Clones share it.
#[derive(Clone)]
pub(super) struct Stewardship {
    changes: mpsc::Sender<Asked>,
    introductions: mpsc::Sender<Introduction>,
}

impl Stewardship {
    /// Makes a change; it goes on when the result is dropped.
    pub(super) async fn change(&self, change: MemberChange, force: bool) -> Result<(), ChangeError> {
        let (answer, answered) = oneshot::channel();
        self.changes.try_send((change, force, answer)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => ChangeError::Overloaded,
            mpsc::error::TrySendError::Closed(_) => ChangeError::NotLeader,
        })?;
        answered.await.unwrap_or_else(|_| Err(ChangeError::Interrupted { reason: "the node is stopping".into() }))
    }

    /// A node said hello. What there is no room for it says again.
    pub(super) fn introduce(&self, introduction: Introduction) {
        let _ = self.introductions.try_send(introduction);
    }
}

/// What a steward works with.
#[derive(Clone)]
pub(super) struct Steward {
    pub(super) raft: Raft,
    pub(super) peers: Peers,
    pub(super) formation: Arc<Formation>,
    pub(super) leadership: Arc<Leadership>,
    pub(super) transfer: Transfer,
    pub(super) metrics: Arc<Metrics>,
}

/// The cluster as its leader sees it.
struct View {
    vote: RaftVote,
    position: Option<LogId>,
    members: BTreeMap<u32, Member>,
    /// Of the last voter set.
    voters: BTreeSet<u32>,
    joint: bool,
    committed: bool,
    /// Members that answer, with how many log entries they lack.
    live: BTreeMap<u32, u64>,
}

impl View {
    fn check_quorum(&self, voters: &BTreeSet<u32>, force: bool) -> Result<(), ChangeError> {
        let live = voters.iter().filter(|id| self.live.contains_key(id)).count();
        let needed = voters.len() / 2 + 1;
        if live >= needed || force {
            return Ok(());
        }
        Err(ChangeError::QuorumAtRisk { voters: voters.len(), live, needed })
    }

    fn caught_up(&self, id: u32) -> Result<(), ChangeError> {
        let behind = self.live.get(&id).copied();
        match behind {
            Some(behind) if behind <= LEARNER_LAG_ENTRIES_MAX => Ok(()),
            _ => Err(ChangeError::NotCaughtUp { id: NodeId(id), behind }),
        }
    }
}

/// What a leader does by itself.
enum Duty {
    LeaveOffice,
    FindSuccessor,
    Flatten,
    Record(u32, Member),
    Add(Member, u32),
    Promote(u32),
}

impl Steward {
    pub(super) fn start(self, quarantine: Quarantine, poison: &Poison) -> Stewardship {
        let (changes, asked) = mpsc::channel(MEMBER_CHANGES_WAITING_MAX);
        let (introductions, introduced) = mpsc::channel(MEMBER_CHANGES_WAITING_MAX);
        tokio::spawn(poison.guard("the watch over the membership", self.clone().follow_membership(quarantine)));
        tokio::spawn(poison.guard("the steward of the membership", self.run(asked, introduced)));
        Stewardship { changes, introductions }
    }

    /// Keeps to what the membership says: where members are reached, and whether this node may campaign.
    async fn follow_membership(self, quarantine: Quarantine) {
        let mut metrics = self.raft.server_metrics();
        let mut known = BTreeMap::new();
        let local = &self.formation.local;
        loop {
            let members: BTreeMap<u32, Member> = {
                let metrics = metrics.borrow_watched();
                metrics.membership_config.nodes().map(|(id, member)| (*id, member.clone())).collect()
            };
            let is_seated = members.get(&local.node_id).is_some_and(|member| member.incarnation == local.incarnation);
            for (id, member) in &members {
                if known.get(id) != Some(member) {
                    self.peers.found(*id, member.incarnation, &member.peer_address);
                }
            }
            if members != known {
                self.peers.keep_only(&members);
                known = members;
            }
            let over = quarantine.is_over();
            // Taken back if the entry that named it is, which comes from a leader that was heard just now.
            self.raft.runtime_config().elect(is_seated && over);
            tokio::select! {
                changed = WatchReceiver::changed(&mut metrics) => if changed.is_err() {
                    return;
                },
                () = quarantine.over(), if !over => {}
            }
        }
    }

    async fn run(self, mut asked: mpsc::Receiver<Asked>, mut introduced: mpsc::Receiver<Introduction>) {
        let mut ended = self.raft.server_metrics();
        let mut round = tokio::time::interval(ROUND);
        round.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut arrivals: VecDeque<Introduction> = VecDeque::new();
        let mut under_way: Option<tokio::task::JoinHandle<bool>> = None;
        let mut rest_until = Instant::now();
        loop {
            let idle = under_way.is_none();
            let finished = async {
                match &mut under_way {
                    Some(task) => task.await.unwrap_or(false),
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                well = finished => {
                    under_way = None;
                    if !well {
                        rest_until = Instant::now() + 5 * ROUND;
                    }
                }
                Some((change, force, answer)) = asked.recv(), if idle => {
                    let steward = self.clone();
                    under_way = Some(tokio::spawn(async move {
                        let changed = steward.make_patiently(&change, force).await;
                        steward.count(change.name(), &changed);
                        // Whoever asked may have given up.
                        let _ = answer.send(changed);
                        true
                    }));
                }
                Some(introduction) = introduced.recv() => {
                    if let Some(arrival) = self.heed(introduction).await
                        && arrivals.len() < MEMBER_CHANGES_WAITING_MAX
                    {
                        arrivals.push_back(arrival);
                    }
                }
                _ = round.tick() => {
                    if ended.borrow_watched().state == ServerState::Shutdown {
                        return;
                    }
                }
                changed = WatchReceiver::changed(&mut ended) => if changed.is_err() {
                    return;
                },
            }
            if under_way.is_none() && Instant::now() >= rest_until {
                let Some(view) = self.view().await else {
                    arrivals.clear();
                    continue;
                };
                if let Some(duty) = self.duty(&view, &mut arrivals) {
                    let steward = self.clone();
                    under_way = Some(tokio::spawn(async move { steward.fulfil(duty, view).await }));
                }
            }
        }
    }

    /// Takes note of where a member is, at once: a leader may need that to reach a quorum. Returns what is to go into the
    /// membership.
    async fn heed(&self, news: Introduction) -> Option<Introduction> {
        let recorded = self.raft.metrics().borrow_watched().membership_config.membership().get_node(&news.id).cloned();
        let known = recorded.as_ref().filter(|member| member.incarnation == news.incarnation);
        let leads = self.raft.metrics().borrow_watched().state == ServerState::Leader;
        let moved = known.is_some_and(|member| !is_at(member, &news.addresses));
        let arrives = recorded.is_none() && leads && news.joins.is_some();
        if !moved && !arrives {
            return None;
        }
        // Only what answers there under that name is believed.
        let hello = self.formation.hello(&self.peers, news.id, &news.addresses.peer).await.ok()?;
        if hello.node_id != news.id || hello.incarnation != news.incarnation {
            return None;
        }
        if moved {
            self.peers.found(news.id, news.incarnation, &news.addresses.peer);
        } else if hello.was_added {
            // It was removed, and runs on for a moment: it is not let in again by itself.
            return None;
        } else if let Err(unfit) = self.check_fitness(&news.addresses.peer, &hello) {
            tracing::warn!(node = news.id, %unfit, "a node that asks to join is turned away");
            return None;
        }
        leads.then_some(news)
    }

    /// `None` unless this node leads.
    async fn view(&self) -> Option<View> {
        let (vote, effective, committed) = self
            .raft
            .with_raft_state(|state| {
                let membership = &state.membership_state;
                let committed = membership.committed().log_id() == membership.effective().log_id();
                (state.vote_ref().to_owned(), membership.effective().clone(), committed)
            })
            .await
            .ok()?;
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let (replication, heard) = (metrics.replication.as_ref()?, metrics.heartbeat.as_ref()?);
        let now = Moment::now();
        let patience = self.transfer.timings.silence();
        let last = metrics.last_log_index.unwrap_or(0);
        let members: BTreeMap<u32, Member> = effective.nodes().map(|(id, member)| (*id, member.clone())).collect();
        let live = members.keys().filter_map(|id| {
            if *id == metrics.id {
                return Some((*id, 0));
            }
            let heard = heard.get(id).copied().flatten()?;
            let matched = replication.get(id).and_then(|matched| matched.as_ref().map(|id| id.index()));
            (now.since(heard.into_inner().0) < patience).then(|| (*id, last.saturating_sub(matched.unwrap_or(0))))
        });
        let live = live.collect();
        let configs = effective.membership().get_joint_config();
        Some(View {
            vote,
            position: *effective.log_id(),
            voters: configs.last().cloned().unwrap_or_default(),
            joint: configs.len() > 1,
            committed,
            members,
            live,
        })
    }

    /// The most urgent thing to do.
    fn duty(&self, view: &View, arrivals: &mut VecDeque<Introduction>) -> Option<Duty> {
        let me = self.formation.local.node_id;
        if self.leadership.has_renounced(view.vote.leader_id().term) {
            return Some(Duty::FindSuccessor);
        }
        if !view.committed {
            return None;
        }
        if !view.voters.contains(&me) {
            return Some(Duty::LeaveOffice);
        }
        if view.joint {
            return Some(Duty::Flatten);
        }
        if let (Some(member), Some(addresses)) = (view.members.get(&me), self.formation.addresses())
            && !is_at(member, &addresses)
        {
            return Some(Duty::Record(me, moved(member, addresses)));
        }
        while let Some(Introduction { id, incarnation, addresses, joins }) = arrivals.pop_front() {
            match (view.members.get(&id), joins) {
                (Some(member), _) if member.incarnation == incarnation && !is_at(member, &addresses) => {
                    return Some(Duty::Record(id, moved(member, addresses)));
                }
                (None, Some(promotable)) => {
                    let member = Member { incarnation, promotable, ..Member::default() };
                    return Some(Duty::Add(moved(&member, addresses), id));
                }
                _ => {}
            }
        }
        let learners = view.members.iter().filter(|(id, member)| member.promotable && !view.voters.contains(id));
        let mut ready = learners.filter(|(id, _)| view.caught_up(**id).is_ok());
        ready.next().map(|(id, _)| Duty::Promote(*id))
    }

    /// Whether it succeeded.
    async fn fulfil(&self, duty: Duty, view: View) -> bool {
        let (name, done) = match duty {
            Duty::FindSuccessor => return self.transfer.run(None).await.is_ok(),
            Duty::LeaveOffice => {
                tracing::info!("this node leads without a vote: handing over");
                if self.transfer.run(None).await.is_err() && !view.joint {
                    let _ = self.raft.trigger().refresh_server_state(Some(view.vote), view.position).await;
                }
                return true;
            }
            Duty::Flatten => {
                tracing::info!("finishing the change of the membership that an earlier leader began");
                ("finish", self.commit(ChangeMembers::AddVoterIds(BTreeSet::new())).await)
            }
            Duty::Record(id, member) => {
                tracing::info!(node = id, peer = member.peer_address, client = member.client_address, "a member moved");
                ("move", self.commit(ChangeMembers::SetNodes(BTreeMap::from([(id, member)]))).await)
            }
            Duty::Add(member, id) => ("add", self.add(id, member).await),
            Duty::Promote(id) => ("promote", self.promote(&view, id, false).await),
        };
        self.count(name, &done);
        done.inspect_err(|error| tracing::warn!(%error, "the membership could not be kept up")).is_ok()
    }

    fn count(&self, name: &'static str, made: &Result<(), ChangeError>) {
        let outcome = match made {
            Ok(()) => ChangeOutcome::Done,
            // It is another node's to make, and counts there.
            Err(ChangeError::NotLeader) => return,
            Err(ChangeError::Interrupted { .. }) => ChangeOutcome::Interrupted,
            Err(_) => ChangeOutcome::Refused,
        };
        self.metrics.membership_change(name, outcome);
    }

    /// As [`make`](Self::make), but gives members the time to be heard: a leader that was just elected knows of none.
    async fn make_patiently(&self, change: &MemberChange, force: bool) -> Result<(), ChangeError> {
        let timings = self.transfer.timings;
        let until = Moment::now() + timings.silence();
        loop {
            match self.make(change.clone(), force).await {
                Err(ChangeError::QuorumAtRisk { .. } | ChangeError::NotCaughtUp { behind: None, .. })
                    if Moment::now() < until => {}
                made => return made,
            }
            tokio::time::sleep(timings.heartbeat).await;
        }
    }

    /// Makes a change that was asked for.
    async fn make(&self, change: MemberChange, force: bool) -> Result<(), ChangeError> {
        let view = self.view().await.ok_or(ChangeError::NotLeader)?;
        match change {
            MemberChange::Add { peer_address, promotable } => {
                let hello = self
                    .formation
                    .hello(&self.peers, 0, &peer_address)
                    .await
                    .map_err(|reason| ChangeError::Unreachable { address: peer_address.clone(), reason })?;
                let id = hello.node_id;
                let addresses = v1::Addresses {
                    peer: peer_address,
                    client: hello.client_address.clone(),
                    application: hello.application_address.clone(),
                };
                match view.members.get(&id) {
                    Some(member) if member.incarnation == hello.incarnation => return Ok(()),
                    Some(_) => return Err(ChangeError::IdTaken { id: NodeId(id) }),
                    None => self.check_fitness(&addresses.peer, &hello)?,
                }
                let member = Member { incarnation: hello.incarnation, promotable, ..Member::default() };
                self.add(id, moved(&member, addresses)).await
            }
            MemberChange::Promote(NodeId(id)) => self.promote(&view, id, force).await,
            MemberChange::Demote(NodeId(id)) => self.demote(&view, id, force).await,
            MemberChange::Remove(NodeId(id)) => {
                self.demote(&view, id, force).await?;
                tracing::info!(node = id, "removing a member");
                self.commit(ChangeMembers::RemoveNodes(BTreeSet::from([id]))).await
            }
        }
    }

    /// A node that is no member may be added if its data is none, or this cluster's: a leader may have been lost before
    /// it had committed that it adds it.
    fn check_fitness(&self, address: &str, hello: &v1::HelloResponse) -> Result<(), ChangeError> {
        let reason = match self.formation.local.cluster_id() {
            _ if hello.protocol_version != d_engine_proto::PEER_PROTOCOL_VERSION => {
                format!("it speaks peer protocol {}, upgrade the older node", hello.protocol_version)
            }
            Some(ours) if hello.cluster_id == 0 || hello.cluster_id == ours => return Ok(()),
            _ => format!("its data belongs to cluster {:016x}, empty its data directory first", hello.cluster_id),
        };
        Err(ChangeError::Unfit { address: address.to_owned(), reason })
    }

    async fn add(&self, id: u32, member: Member) -> Result<(), ChangeError> {
        tracing::info!(node = id, address = member.peer_address, promotable = member.promotable, "adding a learner");
        self.commit(ChangeMembers::AddNodes(BTreeMap::from([(id, member)]))).await
    }

    async fn promote(&self, view: &View, id: u32, force: bool) -> Result<(), ChangeError> {
        if !view.members.contains_key(&id) {
            return Err(ChangeError::NoMember { id: NodeId(id) });
        }
        if view.voters.contains(&id) {
            return Ok(());
        }
        view.caught_up(id)?;
        let voters = view.voters.iter().copied().chain([id]).collect();
        view.check_quorum(&voters, force)?;
        tracing::info!(node = id, "promoting a learner");
        self.commit(ChangeMembers::AddVoterIds(BTreeSet::from([id]))).await
    }

    /// Leaves a learner that nobody promotes. Hands over leadership first if it is this node's.
    async fn demote(&self, view: &View, id: u32, force: bool) -> Result<(), ChangeError> {
        let member = view.members.get(&id).ok_or(ChangeError::NoMember { id: NodeId(id) })?;
        let learner = Member { promotable: false, ..member.clone() };
        if !view.voters.contains(&id) {
            return match member.promotable {
                true => self.commit(ChangeMembers::SetNodes(BTreeMap::from([(id, learner)]))).await,
                false => Ok(()),
            };
        }
        let voters: BTreeSet<u32> = view.voters.iter().copied().filter(|voter| *voter != id).collect();
        if voters.is_empty() {
            return Err(ChangeError::LastVoter { id: NodeId(id) });
        }
        view.check_quorum(&voters, force)?;
        if id == self.formation.local.node_id {
            self.transfer.run(None).await.map_err(ChangeError::HandOver)?;
            return Err(ChangeError::NotLeader);
        }
        tracing::info!(node = id, "taking the vote of a member");
        self.commit(ChangeMembers::Batch(vec![
            ChangeMembers::SetNodes(BTreeMap::from([(id, learner)])),
            ChangeMembers::RemoveVoters(BTreeSet::from([id])),
        ]))
        .await
    }

    /// Returns once the change is committed, and known to whoever asks this node for its membership.
    async fn commit(&self, change: ChangeMembers<u32, Member>) -> Result<(), ChangeError> {
        let interrupted = |reason: String| ChangeError::Interrupted { reason };
        let position = match self.raft.change_membership(change, true).await {
            Ok(response) => response.log_id,
            Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(ChangeMembershipError::InProgress(_)))) => {
                return Err(ChangeError::InProgress);
            }
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))) => {
                return Err(interrupted("leadership was lost".to_owned()));
            }
            Err(error) => return Err(interrupted(error.to_string())),
        };
        let mut metrics = self.raft.metrics();
        loop {
            if *metrics.borrow_watched().committed_membership_config.log_id() >= Some(position) {
                return Ok(());
            }
            if WatchReceiver::changed(&mut metrics).await.is_err() {
                return Err(interrupted("the node is stopping".to_owned()));
            }
        }
    }
}

/// Whether this is what the membership records.
pub(super) fn is_at(member: &Member, addresses: &v1::Addresses) -> bool {
    member.peer_address == addresses.peer
        && member.client_address == addresses.client
        && member.application_address == addresses.application
}

fn moved(member: &Member, addresses: v1::Addresses) -> Member {
    Member {
        peer_address: addresses.peer,
        client_address: addresses.client,
        application_address: addresses.application,
        ..member.clone()
    }
}
