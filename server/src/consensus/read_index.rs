//! Linearizable reads: the index a read has to see applied before memory answers it (Raft dissertation, section 6.4),
//! and the store time by which nothing it shows may have been due.
//!
//! One confirmation by a quorum serves every read that arrived before it began. Reads that arrive while one is under
//! way wait for the next, since the running one may have begun before a write they must see.

use std::sync::Arc;
use std::time::Duration;

use d_engine_proto::LogIndex;
use futures_util::future::BoxFuture;
use openraft::ReadPolicy;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{LinearizableReadError, RaftError};
use tokio::sync::{mpsc, oneshot};

use super::leadership::Leadership;
use super::network::Peers;
use super::poison::Poison;
use super::raft_types::Raft;
use crate::limits::READS_WAITING_MAX;
use crate::state_machine::StoreTime;

/// Why a read could not be confirmed. It is always safe to ask again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadIndexError {
    /// No leader is known here, or the one that was asked does not lead.
    #[error("no leader is known")]
    NoLeader,
    /// No quorum answered, or the leader could not be asked.
    #[error("leadership could not be confirmed: {reason}")]
    Unconfirmed {
        /// What went wrong.
        reason: String,
    },
    /// Too many reads wait for a confirmation.
    #[error("{waiting_max} reads are waiting for a confirmation already")]
    Overloaded {
        /// The bound that is reached.
        waiting_max: usize,
    },
}

/// What a quorum has confirmed to the leader of the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Confirmation {
    /// Everything up to here is to be applied before memory answers.
    pub(super) index: LogIndex,
    /// The leader's store time after the confirmation, thus after every read that shares it had arrived.
    pub(super) store_time: StoreTime,
}

type Confirmed = Result<Confirmation, ReadIndexError>;

/// Rounds of confirmations, by this node as the leader and by asking the leader.
pub(super) struct ReadIndex {
    as_leader: Rounds,
    anywhere: Rounds,
}

impl ReadIndex {
    /// `patience`: how long a leader that was just elected may take to apply its first entry.
    pub(super) fn start(
        raft: Raft,
        peers: Peers,
        leadership: Arc<Leadership>,
        patience: Duration,
        poison: &Poison,
    ) -> Self {
        let local = Local { raft, leadership, patience };
        let as_leader = {
            let local = local.clone();
            Rounds::start(poison, move || Box::pin(local.clone().confirm()))
        };
        let anywhere = Rounds::start(poison, move || Box::pin(local.clone().confirm_anywhere(peers.clone())));
        Self { as_leader, anywhere }
    }

    /// Confirms that this node leads.
    pub(super) async fn as_leader(&self) -> Confirmed {
        self.as_leader.join().await
    }

    /// Asks whoever leads, this node included.
    pub(super) async fn anywhere(&self) -> Confirmed {
        self.anywhere.join().await
    }
}

/// This node, asked whether it leads.
#[derive(Clone)]
struct Local {
    raft: Raft,
    leadership: Arc<Leadership>,
    patience: Duration,
}

impl Local {
    async fn confirm(self) -> Confirmed {
        let index = match self.raft.get_read_linearizer(ReadPolicy::ReadIndex).await {
            Ok(linearizer) => LogIndex(linearizer.read_log_id().index()),
            Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(_))) => {
                return Err(ReadIndexError::NoLeader);
            }
            Err(error) => return Err(ReadIndexError::Unconfirmed { reason: error.to_string() }),
        };
        // Deposed since: a successor counts its own time.
        let store_time = self.leadership.store_time_within(self.patience).await.ok_or(ReadIndexError::NoLeader)?;
        Ok(Confirmation { index, store_time })
    }

    async fn confirm_anywhere(self, peers: Peers) -> Confirmed {
        let leader = {
            let metrics = self.raft.metrics();
            let metrics = metrics.borrow_watched();
            metrics.current_leader.and_then(|id| {
                let member = metrics.membership_config.membership().get_node(&id)?;
                Some((id, member.clone()))
            })
        };
        match leader {
            Some((id, _)) if id == *self.raft.node_id() => self.confirm().await,
            Some((id, member)) => peers
                .read_index(id, &member)
                .await
                .map_err(|status| ReadIndexError::Unconfirmed { reason: format!("leader {id}: {}", status.message()) }),
            None => Err(ReadIndexError::NoLeader),
        }
    }
}

/// Shares each run of `confirm` among all that joined before it began.
struct Rounds {
    waiting: mpsc::Sender<oneshot::Sender<Confirmed>>,
}

impl Rounds {
    fn start(poison: &Poison, confirm: impl Fn() -> BoxFuture<'static, Confirmed> + Send + Sync + 'static) -> Self {
        let (waiting, mut arrivals) = mpsc::channel::<oneshot::Sender<Confirmed>>(READS_WAITING_MAX);
        tokio::spawn(poison.guard("the confirmation of reads", async move {
            let mut round = Vec::new();
            while arrivals.recv_many(&mut round, READS_WAITING_MAX).await > 0 {
                let confirmed = confirm().await;
                for waiter in round.drain(..) {
                    // It may have given up.
                    let _ = waiter.send(confirmed.clone());
                }
            }
        }));
        Self { waiting }
    }

    async fn join(&self) -> Confirmed {
        let (waiter, confirmed) = oneshot::channel();
        match self.waiting.try_send(waiter) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => {
                return Err(ReadIndexError::Overloaded { waiting_max: READS_WAITING_MAX });
            }
            Err(mpsc::error::TrySendError::Closed(_)) => return Err(stopped()),
        }
        confirmed.await.unwrap_or_else(|_| Err(stopped()))
    }
}

fn stopped() -> ReadIndexError {
    ReadIndexError::Unconfirmed { reason: "the node is stopping".into() }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[tokio::test]
    async fn a_read_never_joins_a_round_that_began_before_it() {
        let begun = Arc::new(AtomicU64::new(0));
        let gate = Arc::new(tokio::sync::Semaphore::new(0));
        let rounds = {
            let (begun, gate) = (begun.clone(), gate.clone());
            Rounds::start(&Poison::default(), move || {
                let round = begun.fetch_add(1, Ordering::SeqCst) + 1;
                let gate = gate.clone();
                Box::pin(async move {
                    gate.acquire().await.unwrap().forget();
                    Ok(Confirmation { index: LogIndex(round), store_time: StoreTime::default() })
                })
            })
        };
        let rounds = Arc::new(rounds);
        let join = |rounds: &Arc<Rounds>| {
            let rounds = rounds.clone();
            tokio::spawn(async move { rounds.join().await.unwrap().index })
        };
        let first = join(&rounds);
        tokio::time::timeout(Duration::from_secs(30), async {
            while begun.load(Ordering::SeqCst) == 0 {
                tokio::task::yield_now().await;
            }
        })
        .await
        .unwrap();
        let late = [join(&rounds), join(&rounds)];
        gate.add_permits(2);
        assert_eq!(first.await.unwrap(), LogIndex(1));
        for read in late {
            assert_eq!(read.await.unwrap(), LogIndex(2), "late reads share the second round");
        }
    }
}
