//! Hands leadership to another voter.
//!
//! The read lease is gone before the successor is asked, and stays gone for the rest of the term, also when the transfer
//! comes to nothing: nobody can tell whether the successor's campaign is still under way. openraft takes no writes for
//! the rest of that term either, so that a leader whose transfer failed has to go on trying: see `steward`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use d_engine_proto::NodeId;
use openraft::async_runtime::watch::WatchReceiver;

use super::handle::Timings;
use super::leadership::{LeaderInfo, Leadership};
use super::raft_types::Raft;
use super::steward::lag;
use crate::clock::Moment;
use crate::limits::LEARNER_LAG_ENTRIES_MAX;
use crate::metrics::Metrics;

/// Why leadership was not handed over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// This node does not lead.
    #[error("this node does not lead")]
    NotLeader,
    /// The successor asked for has no vote.
    #[error("node {id} is no voter, so it cannot lead: name one, or leave the choice to the leader")]
    NoVoter {
        /// The node.
        id: NodeId,
    },
    /// No other voter answers and is up to date.
    #[error("no other voter answers and has caught up, so nobody can take over: start the members that are down")]
    Nobody,
    /// The successor asked for does not answer, or lags.
    #[error("node {id} cannot take over now: it {}", lag(*behind))]
    NotReady {
        /// The node.
        id: NodeId,
        /// Log entries it lacks; `None`: it does not answer.
        behind: Option<u64>,
    },
    /// The successor did not come to lead in time; the leader goes on trying.
    #[error("node {to} did not take over within {}ms; the leader goes on looking for a successor", patience.as_millis())]
    NotTaken {
        /// The successor.
        to: NodeId,
        /// How long it was waited for.
        patience: Duration,
    },
    /// The node is stopping.
    #[error("the node is stopping")]
    Stopped,
}

/// What a leader knows about its voters.
struct Voters {
    term: u64,
    /// Of the membership that will hold, in the middle of a change.
    ids: BTreeSet<u32>,
    /// The others that answer, by how far their logs are behind.
    ready: Vec<(u64, u32)>,
}

impl Voters {
    fn choose(&self, me: u32, to: Option<u32>) -> Result<u32, TransferError> {
        let Some(to) = to else { return self.ready.iter().min().map(|(_, id)| *id).ok_or(TransferError::Nobody) };
        if !self.ids.contains(&to) {
            return Err(TransferError::NoVoter { id: NodeId(to) });
        }
        let behind = self.ready.iter().find(|(_, id)| *id == to).map(|(behind, _)| *behind);
        if to == me || behind.is_some_and(|behind| behind <= LEARNER_LAG_ENTRIES_MAX) {
            return Ok(to);
        }
        Err(TransferError::NotReady { id: NodeId(to), behind })
    }
}

/// Everything a transfer needs.
#[derive(Clone)]
pub(super) struct Transfer {
    pub(super) raft: Raft,
    pub(super) leadership: Arc<Leadership>,
    pub(super) timings: Timings,
    pub(super) metrics: Arc<Metrics>,
}

impl Transfer {
    /// Hands over to `to`, or to the most up-to-date voter, and waits until it is known to reign. The time is bounded.
    pub(super) async fn run(&self, to: Option<u32>) -> Result<LeaderInfo, TransferError> {
        let result = self.hand_over(to).await;
        match &result {
            // Nothing was to be handed over.
            Err(TransferError::NotLeader) => {}
            Ok(info) if info.leader_id == *self.raft.node_id() => {}
            handed_over => self.metrics.leadership_transfer(handed_over.is_ok()),
        }
        result
    }

    async fn hand_over(&self, to: Option<u32>) -> Result<LeaderInfo, TransferError> {
        let me = *self.raft.node_id();
        // One that was just elected has heard of nobody yet.
        let until = Moment::now() + self.timings.silence();
        let (term, successor) = loop {
            let voters = self.voters().ok_or(TransferError::NotLeader)?;
            match voters.choose(me, to) {
                Ok(successor) if successor == me => return Ok(LeaderInfo { leader_id: me, term: voters.term }),
                Ok(successor) => break (voters.term, successor),
                Err(TransferError::NoVoter { id }) => return Err(TransferError::NoVoter { id }),
                Err(error) if Moment::now() >= until || voters.ids.len() < 2 => return Err(error),
                Err(_) => tokio::time::sleep(self.timings.heartbeat).await,
            }
        };
        tracing::info!(successor, "handing over leadership");
        let _no_lease_meanwhile = self.leadership.renounce(term);
        let mut leaders = self.leadership.subscribe();
        self.raft.trigger().transfer_leader(successor).await.map_err(|_| TransferError::Stopped)?;
        let patience = self.patience();
        let taken = leaders.wait_for(|info| info.is_some_and(|info| info.term > term));
        match tokio::time::timeout(patience, taken).await {
            Ok(Ok(info)) => (*info).ok_or(TransferError::Stopped),
            Ok(Err(_)) => Err(TransferError::Stopped),
            Err(_) => Err(TransferError::NotTaken { to: NodeId(successor), patience }),
        }
    }

    /// How long a successor may take: a campaign, and the first entry of its reign.
    fn patience(&self) -> Duration {
        4 * self.timings.election_max
    }

    /// `None` unless this node leads.
    fn voters(&self) -> Option<Voters> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let (replication, heard) = (metrics.replication.as_ref()?, metrics.heartbeat.as_ref()?);
        let ids = metrics.membership_config.membership().get_joint_config().last().cloned().unwrap_or_default();
        let now = Moment::now();
        let last = metrics.last_log_index.unwrap_or(0);
        let answers = |id: &u32| {
            let heard = heard.get(id).copied().flatten();
            heard.is_some_and(|heard| now.since(heard.into_inner().0) < self.timings.silence())
        };
        let behind = |id: &u32| {
            let matched = replication.get(id).and_then(|matched| matched.as_ref().map(|matched| matched.index()));
            last.saturating_sub(matched.unwrap_or(0))
        };
        let others = ids.iter().filter(|id| **id != metrics.id);
        let ready = others.filter(|id| answers(id)).map(|id| (behind(id), *id)).collect();
        Some(Voters { term: metrics.current_term, ids, ready })
    }
}
