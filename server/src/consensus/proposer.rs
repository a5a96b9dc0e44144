//! From single commands to log entries: takes what is waiting, up to a byte cap, and proposes it as one entry.
//!
//! Nothing waits for company: an idle system adds no delay, a busy one fills its batches while earlier ones are in
//! flight. What waits is bounded in bytes; past the bound a proposal is refused at once, and nothing is lost.

use std::sync::Arc;

use bytes::Bytes;
use openraft::errors::ClientWriteError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use super::entry::{Batch, COMMAND_OVERHEAD_BYTES};
use super::leadership::{LeaderInfo, Leadership, Role};
use super::raft_types::{Callback, Raft, WriteResult};
use crate::limits::{BATCH_BYTES_MAX, BATCH_COMMANDS_MAX, COMMAND_BYTES_MAX, ENTRIES_IN_FLIGHT_MAX};
use crate::metrics::Metrics;
use crate::state_machine::StoreTime;

/// What a pending proposal takes of the bound besides its command, so that tiny ones are bounded too.
const PROPOSAL_OVERHEAD_BYTES: usize = 256;

/// Why a proposal has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// Certainly not applied: this node does not lead, or has no quorum.
    #[error("this node is not the leader")]
    NotLeader,
    /// Certainly not applied: too much is pending.
    #[error("{pending_bytes_max} bytes of proposals are pending already")]
    Overloaded {
        /// The bound that is reached.
        pending_bytes_max: usize,
    },
    /// Certainly not applied: one log entry could not carry it to the peers.
    #[error("the command has {bytes} bytes, the limit is {COMMAND_BYTES_MAX}")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// Not known: a successor may or may not commit it.
    #[error("leadership was lost after the proposal was accepted")]
    LeadershipLost,
    /// Not known: the node stopped.
    #[error("the node stopped after it had taken the proposal")]
    Stopped,
}

pub(super) type Answer = Result<Bytes, ProposeError>;

/// The queue in front of openraft.
pub(super) struct Proposer {
    queue: mpsc::Sender<Proposal>,
    leadership: Arc<Leadership>,
    pending_bytes: Arc<Semaphore>,
    pending_bytes_max: usize,
}

struct Proposal {
    command: Bytes,
    answer: oneshot::Sender<Answer>,
    /// Given back when the proposal is answered.
    _pending_bytes: OwnedSemaphorePermit,
}

impl Proposer {
    /// Starts the batching task; it ends when the proposer is dropped.
    pub(super) fn start(
        raft: Raft,
        leadership: Arc<Leadership>,
        metrics: Arc<Metrics>,
        pending_bytes_max: usize,
    ) -> Self {
        let (queue, proposals) = mpsc::channel(pending_bytes_max.div_ceil(PROPOSAL_OVERHEAD_BYTES));
        let batcher = Batcher {
            raft,
            leader: leadership.subscribe(),
            leadership: leadership.clone(),
            metrics,
            in_flight: Arc::new(Semaphore::new(ENTRIES_IN_FLIGHT_MAX)),
            held_back: None,
        };
        tokio::spawn(batcher.run(proposals));
        Self { queue, leadership, pending_bytes: Arc::new(Semaphore::new(pending_bytes_max)), pending_bytes_max }
    }

    /// Proposes one command; the receiver gets its answer. Dropping the receiver does not withdraw the command.
    pub(super) fn propose(&self, command: Bytes) -> Result<oneshot::Receiver<Answer>, ProposeError> {
        if self.leadership.role() != Role::Leader {
            return Err(ProposeError::NotLeader);
        }
        if command.len() > COMMAND_BYTES_MAX {
            return Err(ProposeError::TooLarge { bytes: command.len() });
        }
        let overloaded = ProposeError::Overloaded { pending_bytes_max: self.pending_bytes_max };
        let bytes = u32::try_from(command.len() + PROPOSAL_OVERHEAD_BYTES).map_err(|_| overloaded.clone())?;
        let permit = self.pending_bytes.clone().try_acquire_many_owned(bytes).map_err(|_| overloaded.clone())?;
        let (answer, answered) = oneshot::channel();
        let proposal = Proposal { command, answer, _pending_bytes: permit };
        match self.queue.try_send(proposal) {
            Ok(()) => Ok(answered),
            // The batcher never saw it.
            Err(mpsc::error::TrySendError::Closed(_)) => Err(ProposeError::NotLeader),
            Err(mpsc::error::TrySendError::Full(_)) => Err(overloaded),
        }
    }

    /// Bytes of proposals that wait for their answer.
    pub(super) fn pending_bytes(&self) -> usize {
        self.pending_bytes_max.saturating_sub(self.pending_bytes.available_permits())
    }
}

impl Proposal {
    fn refuse(self) {
        // Nobody may be waiting any more.
        let _ = self.answer.send(Err(ProposeError::NotLeader));
    }
}

struct Batcher {
    raft: Raft,
    leader: watch::Receiver<Option<LeaderInfo>>,
    leadership: Arc<Leadership>,
    metrics: Arc<Metrics>,
    in_flight: Arc<Semaphore>,
    /// Taken from the queue but too large for the batch at hand: the first of the next one.
    held_back: Option<Proposal>,
}

impl Batcher {
    async fn run(mut self, mut proposals: mpsc::Receiver<Proposal>) {
        loop {
            // First the slot, then the batch: what arrives while every slot is taken joins it.
            let Some(slot) = self.slot(&mut proposals).await else { return };
            let first = match self.held_back.take() {
                Some(proposal) => proposal,
                None => match proposals.recv().await {
                    Some(proposal) => proposal,
                    None => return,
                },
            };
            if first.answer.is_closed() {
                continue;
            }
            let batch = self.fill(first, &mut proposals);
            self.metrics.batch(batch.len());
            self.submit(batch, slot).await;
        }
    }

    /// Waits for a place in the pipeline. A leader that is cut off has its pipeline full of entries that no quorum
    /// answers; what would wait behind them is certainly not applied, and told so.
    async fn slot(&mut self, proposals: &mut mpsc::Receiver<Proposal>) -> Option<OwnedSemaphorePermit> {
        let slot = self.in_flight.clone().acquire_owned();
        tokio::pin!(slot);
        loop {
            let leaderless = self.leader.borrow_and_update().is_none();
            if leaderless && let Some(proposal) = self.held_back.take() {
                proposal.refuse();
            }
            tokio::select! {
                biased;
                slot = &mut slot => return slot.ok(),
                proposal = proposals.recv(), if leaderless => proposal?.refuse(),
                changed = self.leader.changed() => changed.ok()?,
            }
        }
    }

    fn fill(&mut self, first: Proposal, proposals: &mut mpsc::Receiver<Proposal>) -> Vec<Proposal> {
        let mut bytes = first.command.len() + COMMAND_OVERHEAD_BYTES;
        let mut batch = vec![first];
        while batch.len() < BATCH_COMMANDS_MAX {
            let Ok(proposal) = proposals.try_recv() else { break };
            // Nobody waits for it any more, and nobody was told that it was applied.
            if proposal.answer.is_closed() {
                continue;
            }
            let size = proposal.command.len() + COMMAND_OVERHEAD_BYTES;
            if bytes + size > BATCH_BYTES_MAX {
                self.held_back = Some(proposal);
                break;
            }
            bytes += size;
            batch.push(proposal);
        }
        batch
    }

    async fn submit(&self, batch: Vec<Proposal>, slot: OwnedSemaphorePermit) {
        let stamp = self.leadership.stamp();
        let store_time = stamp.map_or_else(StoreTime::default, |stamp| stamp.store_time);
        let encoded = Batch::encode(store_time, batch.iter().map(|proposal| &proposal.command));
        let answer_all = move |result: WriteResult| {
            drop(slot);
            match result {
                Ok(response) => {
                    // One answer per command: the state machine's contract.
                    for (proposal, answer) in batch.into_iter().zip(response.data.0) {
                        // Nobody may be waiting any more.
                        let _ = proposal.answer.send(Ok(answer));
                    }
                }
                Err(error) => {
                    let error = explain(error);
                    for proposal in batch {
                        let _ = proposal.answer.send(Err(error.clone()));
                    }
                }
            }
        };
        let write = self.raft.write(encoded).responder(Callback(Box::new(answer_all)));
        let write = match stamp {
            Some(stamp) => write.with_leader(stamp.term),
            None => write,
        };
        // On failure openraft has stopped and drops the callback, and with it every answer: `Stopped`.
        if let Err(error) = write.await {
            tracing::warn!(%error, "a batch was proposed to a stopped node");
        }
    }
}

fn explain(error: ClientWriteError<super::raft_types::Types>) -> ProposeError {
    match error {
        // Refused before it was appended.
        ClientWriteError::ForwardToLeader(_) => ProposeError::NotLeader,
        // It was appended, and other logs may hold it: a truncation here proves nothing about them.
        ClientWriteError::LogEntryDiscarded(_) => ProposeError::LeadershipLost,
        // Only membership changes and preconditions, neither of which is proposed here.
        ClientWriteError::ChangeMembershipError(_) | ClientWriteError::PreconditionFailed(_) => {
            ProposeError::LeadershipLost
        }
    }
}
