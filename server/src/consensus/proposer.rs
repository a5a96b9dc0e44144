//! From single commands to log entries: takes what is waiting, up to a byte cap, and proposes it as one entry.
//!
//! Nothing waits for company: an idle system adds no delay, a busy one fills its batches while earlier ones are in
//! flight. What waits is bounded in bytes; past the bound a proposal is refused at once, and nothing is lost.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use openraft::errors::ClientWriteError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use super::entry::{Batch, COMMAND_OVERHEAD_BYTES};
use super::gathering::{Gathering, Shared, Ticket};
use super::leadership::{LeaderInfo, Leadership, Role};
use super::poison::Poison;
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

/// What the state machine answered, or why it was not asked.
pub type Answer = Result<Bytes, ProposeError>;

/// The queue in front of openraft.
pub(super) struct Proposer {
    queue: mpsc::Sender<Proposal>,
    leadership: Arc<Leadership>,
    pending_bytes: Arc<Semaphore>,
    pending_bytes_max: usize,
}

/// What waits in the queue.
enum Proposal {
    One(One),
    Group(Group),
}

struct One {
    command: Bytes,
    answer: oneshot::Sender<Answer>,
    /// Given back when the proposal is answered.
    _pending_bytes: OwnedSemaphorePermit,
}

/// Commands of one caller, whose answers it gathers; those that are left when it is dropped are answered too.
struct Group {
    commands: VecDeque<(Ticket, Bytes)>,
    answers: Arc<Shared>,
    /// As of [`One`], for all of them.
    pending_bytes: Option<OwnedSemaphorePermit>,
}

impl Proposer {
    /// Starts the batching task; it ends when the proposer is dropped.
    pub(super) fn start(
        raft: Raft,
        leadership: Arc<Leadership>,
        metrics: Arc<Metrics>,
        pending_bytes_max: usize,
        poison: &Poison,
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
        tokio::spawn(poison.guard("the proposer", batcher.run(proposals)));
        Self { queue, leadership, pending_bytes: Arc::new(Semaphore::new(pending_bytes_max)), pending_bytes_max }
    }

    /// Proposes one command; the receiver gets its answer. Dropping the receiver does not withdraw the command.
    pub(super) fn propose(&self, command: Bytes) -> Result<oneshot::Receiver<Answer>, ProposeError> {
        if self.leadership.role() != Role::Leader {
            return Err(ProposeError::NotLeader);
        }
        check_size(&command)?;
        let permit = self.reserve(pending_cost(&command)).ok_or_else(|| self.overloaded())?;
        let (answer, answered) = oneshot::channel();
        let proposal = Proposal::One(One { command, answer, _pending_bytes: permit });
        self.queue.try_send(proposal).map_err(|refused| self.not_queued(&refused)).map(|()| answered)
    }

    /// Proposes many commands as one message, in the order of their serials; all answers, refusals included, go to
    /// `gathering`. What finds no room is refused, and nothing behind it overtakes.
    pub(super) fn propose_all(&self, commands: VecDeque<(Ticket, Bytes)>, gathering: &Gathering) {
        let answers = gathering.shared().clone();
        let mut group = Group { commands, answers, pending_bytes: None };
        if self.leadership.role() != Role::Leader {
            return group.answer_all(&ProposeError::NotLeader);
        }
        if group.commands.iter().any(|(_, command)| check_size(command).is_err()) {
            group.refuse_too_large();
        }
        let rest = self.reserve_for(&mut group);
        if !group.commands.is_empty()
            && let Err(refused) = self.queue.try_send(Proposal::Group(group))
        {
            let error = self.not_queued(&refused);
            if let mpsc::error::TrySendError::Closed(Proposal::Group(group))
            | mpsc::error::TrySendError::Full(Proposal::Group(group)) = refused
            {
                group.answer_all(&error);
            }
        }
        if let Some(rest) = rest {
            rest.answer_all(&self.overloaded());
        }
    }

    /// Reserves what the commands of a group take, and cuts off those there is no room for.
    fn reserve_for(&self, group: &mut Group) -> Option<Group> {
        group.pending_bytes = self.reserve(group.commands.iter().map(|(_, command)| pending_cost(command)).sum());
        if group.pending_bytes.is_some() {
            return None;
        }
        let mut fitting = 0;
        for (_, command) in &group.commands {
            let Some(permit) = self.reserve(pending_cost(command)) else { break };
            match &mut group.pending_bytes {
                Some(reserved) => reserved.merge(permit),
                reserved => *reserved = Some(permit),
            }
            fitting += 1;
        }
        let commands = group.commands.split_off(fitting);
        Some(Group { commands, answers: group.answers.clone(), pending_bytes: None })
    }

    fn reserve(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        self.pending_bytes.clone().try_acquire_many_owned(u32::try_from(bytes).ok()?).ok()
    }

    fn overloaded(&self) -> ProposeError {
        ProposeError::Overloaded { pending_bytes_max: self.pending_bytes_max }
    }

    fn not_queued(&self, refused: &mpsc::error::TrySendError<Proposal>) -> ProposeError {
        match refused {
            // The batcher never saw it.
            mpsc::error::TrySendError::Closed(_) => ProposeError::NotLeader,
            mpsc::error::TrySendError::Full(_) => self.overloaded(),
        }
    }

    /// Bytes of proposals that wait for their answer.
    pub(super) fn pending_bytes(&self) -> usize {
        self.pending_bytes_max.saturating_sub(self.pending_bytes.available_permits())
    }
}

fn pending_cost(command: &Bytes) -> usize {
    command.len() + PROPOSAL_OVERHEAD_BYTES
}

fn check_size(command: &Bytes) -> Result<(), ProposeError> {
    let bytes = command.len();
    if bytes > COMMAND_BYTES_MAX { Err(ProposeError::TooLarge { bytes }) } else { Ok(()) }
}

impl Proposal {
    /// Answers that it certainly is in no log entry.
    fn refuse(self) {
        match self {
            // Nobody may be waiting any more.
            Self::One(one) => drop(one.answer.send(Err(ProposeError::NotLeader))),
            Self::Group(group) => group.refuse(&ProposeError::NotLeader),
        }
    }

    /// Answers with the results of the entry, as many as there are commands; without one, with the error.
    fn answer(self, results: &mut impl Iterator<Item = Answer>) {
        match self {
            // Nobody may be waiting any more.
            Self::One(one) => drop(results.next().map(|result| one.answer.send(result))),
            Self::Group(mut group) => {
                let commands = std::mem::take(&mut group.commands);
                group.answers.answer(commands.into_iter().map(|(ticket, _)| ticket).zip(results));
            }
        }
    }

    fn commands(&self) -> impl Iterator<Item = &Bytes> {
        let (one, group) = match self {
            Self::One(one) => (Some(&one.command), None),
            Self::Group(group) => (None, Some(&group.commands)),
        };
        one.into_iter().chain(group.into_iter().flatten().map(|(_, command)| command))
    }
}

impl Group {
    /// Lets all commands leave the queue, and answers those that are wanted.
    fn refuse(mut self, error: &ProposeError) {
        let mut leaving = self.answers.leaving();
        self.commands.retain(|(ticket, _)| leaving.take(ticket.serial));
        drop(leaving);
        self.answer_all(error);
    }

    fn answer_all(mut self, error: &ProposeError) {
        let commands = std::mem::take(&mut self.commands);
        self.answers.answer(commands.into_iter().map(|(ticket, _)| (ticket, Err(error.clone()))));
    }

    fn refuse_too_large(&mut self) {
        let (fitting, large): (_, VecDeque<_>) =
            std::mem::take(&mut self.commands).into_iter().partition(|(_, command)| check_size(command).is_ok());
        self.commands = fitting;
        let refusal = |(ticket, command)| (ticket, check_size(&command).map(|()| Bytes::new()));
        self.answers.answer(large.into_iter().map(refusal));
    }

    /// Takes the first commands that somebody waits for, as many as fit into `room`. What is left has none that fits.
    fn cut(&mut self, room: &mut Room) -> Self {
        let mut taken = Self {
            commands: VecDeque::with_capacity(self.commands.len().min(room.commands)),
            answers: self.answers.clone(),
            pending_bytes: None,
        };
        let mut leaving = self.answers.leaving();
        if leaving.closed() {
            self.commands.clear();
        }
        let mut cost = 0;
        while let Some((ticket, command)) = self.commands.pop_front() {
            if !room.fits(&command) {
                self.commands.push_front((ticket, command));
                break;
            }
            cost += pending_cost(&command);
            if leaving.take(ticket.serial) {
                room.take(&command);
                taken.commands.push_back((ticket, command));
            }
        }
        drop(leaving);
        taken.pending_bytes = match &mut self.pending_bytes {
            whole if self.commands.is_empty() => whole.take(),
            whole => whole.as_mut().and_then(|whole| whole.split(cost)),
        };
        taken
    }
}

impl Drop for Group {
    /// openraft has stopped, or the batcher has.
    fn drop(&mut self) {
        let left = std::mem::take(&mut self.commands);
        if !left.is_empty() {
            self.answers.answer(left.into_iter().map(|(ticket, _)| (ticket, Err(ProposeError::Stopped))));
        }
    }
}

/// What still fits into an entry.
struct Room {
    commands: usize,
    bytes: usize,
    empty: bool,
}

impl Room {
    fn of_an_entry() -> Self {
        Self { commands: BATCH_COMMANDS_MAX, bytes: BATCH_BYTES_MAX, empty: true }
    }

    /// A single command may have any size.
    fn fits(&self, command: &Bytes) -> bool {
        self.empty || (self.commands > 0 && command.len() + COMMAND_OVERHEAD_BYTES <= self.bytes)
    }

    fn take(&mut self, command: &Bytes) {
        self.empty = false;
        self.commands -= 1;
        self.bytes = self.bytes.saturating_sub(command.len() + COMMAND_OVERHEAD_BYTES);
    }
}

struct Batcher {
    raft: Raft,
    leader: watch::Receiver<Option<LeaderInfo>>,
    leadership: Arc<Leadership>,
    metrics: Arc<Metrics>,
    in_flight: Arc<Semaphore>,
    /// Taken from the queue, but does not fit into the batch at hand, or not as a whole: the first of the next one.
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
            let batch = self.fill(first, &mut proposals);
            if !batch.is_empty() {
                self.submit(batch, slot).await;
            }
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

    /// Gathers what fits into one entry. Nothing, if nobody waits for any of it.
    fn fill(&mut self, first: Proposal, proposals: &mut mpsc::Receiver<Proposal>) -> Vec<Proposal> {
        let mut room = Room::of_an_entry();
        let mut batch = Vec::new();
        let mut next = Some(first);
        while let Some(proposal) = next.take() {
            match proposal {
                // Nobody waits for it any more, and nobody was told that it was applied.
                Proposal::One(one) if one.answer.is_closed() => {}
                Proposal::One(one) if room.fits(&one.command) => {
                    room.take(&one.command);
                    batch.push(Proposal::One(one));
                }
                Proposal::One(one) => self.held_back = Some(Proposal::One(one)),
                Proposal::Group(mut group) => {
                    let taken = group.cut(&mut room);
                    if !taken.commands.is_empty() {
                        batch.push(Proposal::Group(taken));
                    }
                    if !group.commands.is_empty() {
                        self.held_back = Some(Proposal::Group(group));
                    }
                }
            }
            if self.held_back.is_none() && room.commands > 0 {
                next = proposals.try_recv().ok();
            }
        }
        batch
    }

    async fn submit(&self, batch: Vec<Proposal>, slot: OwnedSemaphorePermit) {
        let stamp = self.leadership.stamp();
        let store_time = stamp.map_or_else(StoreTime::default, |stamp| stamp.store_time);
        let commands: Vec<&Bytes> = batch.iter().flat_map(Proposal::commands).collect();
        self.metrics.batch(commands.len());
        let encoded = Batch::encode(store_time, commands.into_iter());
        let answer_all = move |result: WriteResult| {
            drop(slot);
            match result {
                Ok(response) => {
                    // One answer per command: the state machine's contract.
                    let mut answers = response.data.0.into_iter().map(Ok);
                    batch.into_iter().for_each(|proposal| proposal.answer(&mut answers));
                }
                Err(error) => {
                    let mut errors = std::iter::repeat(Err(explain(error)));
                    batch.into_iter().for_each(|proposal| proposal.answer(&mut errors));
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
