//! Reads of a pipeline: the right to answer is earned once for all that may share it, and what has to wait for it waits
//! together.

use std::collections::VecDeque;
use std::mem;
use std::sync::Arc;
use std::task::{Context, Poll};

use d_engine_proto::Revision;
use d_engine_proto::v1::answer::Reply;
use d_engine_proto::v1::{self, Consistency};
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio_stream::wrappers::WatchStream;

use super::operation::Query;
use super::table::Table;
use crate::consensus::{Role, Ticket};
use crate::engine::expiry::is_due;
use crate::engine::{Deadline, Engine, EngineError};
use crate::limits::{PIPELINE_OPERATIONS_MAX, PIPELINE_ROUNDS_MAX};
use crate::state_machine::StoreTime;
use crate::state_machine::kv::Store;

/// The store time by which a read may show nothing that was due, if its policy promises that.
type Settled = Option<StoreTime>;

/// What a read waits for.
#[derive(Clone, Copy)]
pub(super) enum Wait {
    /// Room for its answer.
    Room(Settled),
    /// The right to read, by a quorum, or by the lease once something is applied.
    Right(Consistency),
    /// A revision that is not applied yet.
    Revision(Settled),
    /// The end of what is due at this time.
    Settled(StoreTime),
}

/// What became of a read that was tried.
#[expect(clippy::large_enum_variant, reason = "it is moved once; a box would be an allocation for every read")]
pub(super) enum Outcome {
    Answered(Result<Reply, EngineError>),
    Waits(Wait),
    /// It reads the history.
    Past,
}

/// What became of a read that has begun.
pub(super) enum Begun {
    Answered(Result<Reply, EngineError>),
    Waits(Query, Wait),
    Past(Query),
}

/// The reads that wait, by their tickets; and what those that need not wait share.
pub(super) struct Reads {
    /// As of the message at hand; dropped soon, since it keeps what it shows in memory.
    store: Option<(Arc<Store>, Option<v1::ResponseHeader>)>,
    /// As of the message at hand: what the lease gives, if anything, or why this node has none.
    lease: Option<Result<Settled, EngineError>>,
    ready: VecDeque<(Ticket, Settled)>,
    /// For the next round. Whether one of them needs a quorum.
    round: Vec<Ticket>,
    linearizable: bool,
    /// For the next round too, which waits until nothing is due at this time.
    due: Vec<Ticket>,
    due_at: StoreTime,
    rounds: FuturesUnordered<BoxFuture<'static, Round>>,
    /// Those that came to nothing.
    failed: VecDeque<(Vec<Ticket>, EngineError)>,
    behind: Vec<(Ticket, Settled)>,
    revisions: WatchStream<Revision>,
}

struct Round {
    reads: Vec<Ticket>,
    right: Result<Settled, EngineError>,
}

impl Reads {
    pub(super) fn new(engine: &Engine) -> Self {
        Self {
            store: None,
            lease: None,
            ready: VecDeque::new(),
            round: Vec::new(),
            linearizable: false,
            due: Vec::new(),
            due_at: StoreTime::default(),
            rounds: FuturesUnordered::new(),
            failed: VecDeque::new(),
            behind: Vec::new(),
            revisions: WatchStream::from_changes(engine.inner.kv.revisions()),
        }
    }

    /// What is earned now stands for reads that have arrived, not for those to come.
    pub(super) fn forget_rights(&mut self) {
        (self.store, self.lease) = (None, None);
    }

    /// Answers a read that may be answered now, unless there is no room for more answers.
    pub(super) fn begin(&mut self, engine: &Engine, query: Query, full: bool) -> Begun {
        let settled = match query.check().and_then(|()| engine.policy(query.options().consistency())) {
            Ok(Consistency::Eventual) => None,
            Ok(Consistency::Lease) => match self.lease.get_or_insert_with(|| lease(engine)) {
                Ok(Some(now)) => Some(*now),
                Ok(None) => return Begun::Waits(query, Wait::Right(Consistency::Lease)),
                Err(error) => return Begun::Answered(Err(error.clone())),
            },
            Ok(policy) => return Begun::Waits(query, Wait::Right(policy)),
            Err(error) => return Begun::Answered(Err(error)),
        };
        if full {
            return Begun::Waits(query, Wait::Room(settled));
        }
        match self.read(engine, &query, settled) {
            Outcome::Answered(result) => Begun::Answered(result),
            Outcome::Waits(wait) => Begun::Waits(query, wait),
            Outcome::Past => Begun::Past(query),
        }
    }

    /// Answers a read that has its right from memory, if that has what it asks for.
    pub(super) fn read(&mut self, engine: &Engine, query: &Query, settled: Settled) -> Outcome {
        let options = query.options();
        if self.store.as_ref().is_none_or(|(store, _)| store.revision() < Revision(options.min_revision)) {
            let store = engine.inner.kv.current();
            let header = engine.header(store.revision());
            self.store = Some((store, header));
        }
        let Some((store, header)) = &self.store else { return Outcome::Past };
        if store.revision() < Revision(options.min_revision) {
            return Outcome::Waits(Wait::Revision(settled));
        }
        if options.revision != 0 && Revision(options.revision) != store.revision() {
            return Outcome::Past;
        }
        match settled {
            // Looked up in the very store that is read: a later one may hold what has become due.
            Some(now) if is_due(store.due(), now) => Outcome::Waits(Wait::Settled(now)),
            _ => Outcome::Answered(query.answer(store, *header).map_err(EngineError::from)),
        }
    }

    /// Lets an operation of the table wait.
    pub(super) fn park(&mut self, ticket: Ticket, wait: Wait) {
        match wait {
            Wait::Room(settled) => self.ready.push_back((ticket, settled)),
            Wait::Right(policy) => {
                self.linearizable |= policy != Consistency::Lease;
                self.round.push(ticket);
            }
            Wait::Revision(settled) => self.behind.push((ticket, settled)),
            Wait::Settled(now) => {
                self.due_at = self.due_at.max(now);
                self.due.push(ticket);
            }
        }
    }

    /// The next read that has its right.
    pub(super) fn next_ready(&mut self) -> Option<(Ticket, Settled)> {
        self.ready.pop_front()
    }

    /// The next reads that came to nothing.
    pub(super) fn next_failed(&mut self) -> Option<(Vec<Ticket>, EngineError)> {
        self.failed.pop_front()
    }

    /// Whether something waits for a round that can begin.
    pub(super) fn can_start_round(&self) -> bool {
        let waits = !self.round.is_empty() || !self.due.is_empty();
        waits && self.rounds.len() < PIPELINE_ROUNDS_MAX
    }

    /// Begins a round for all that wait for one, unless enough are under way.
    pub(super) fn start_rounds(&mut self, engine: &Engine, table: &Table) {
        self.forget_gone(table);
        if !self.can_start_round() {
            return;
        }
        // Of the deadlines the latest: each operation's own is seen to where it is kept.
        let latest = |reads: &[Ticket]| {
            let deadlines = reads.iter().filter_map(|ticket| Some(table.find(*ticket)?.deadline));
            deadlines.max().unwrap_or_else(Deadline::now)
        };
        if !self.round.is_empty() {
            let reads = mem::take(&mut self.round);
            let needs_quorum = mem::take(&mut self.linearizable);
            let policy = if needs_quorum { Consistency::Linearizable } else { Consistency::Lease };
            let (engine, deadline) = (engine.clone(), latest(&reads));
            self.rounds.push(Box::pin(async move {
                let right = engine.earn(policy, deadline).await;
                Round { reads, right }
            }));
        }
        if !self.due.is_empty() {
            let (reads, now) = (mem::take(&mut self.due), mem::take(&mut self.due_at));
            let (engine, deadline) = (engine.clone(), latest(&reads));
            self.rounds.push(Box::pin(async move {
                let right = engine.settle(now, deadline).await.map(|()| Some(now));
                Round { reads, right }
            }));
        }
    }

    /// Finds out who waits no more.
    pub(super) fn poll(&mut self, context: &mut Context<'_>) {
        while let Poll::Ready(Some(Round { reads, right })) = self.rounds.poll_next_unpin(context) {
            match right {
                Ok(settled) => self.ready.extend(reads.into_iter().map(|ticket| (ticket, settled))),
                Err(error) => self.failed.push_back((reads, error)),
            }
        }
        // A change that happened since they were tried has not been seen here.
        while !self.behind.is_empty()
            && let Poll::Ready(Some(_)) = self.revisions.poll_next_unpin(context)
        {
            self.ready.extend(self.behind.drain(..));
        }
    }

    /// Gives memory back that nothing is in; whoever is in it waits for nobody any more.
    pub(super) fn shrink(&mut self) {
        (self.ready, self.round, self.due, self.behind) = Default::default();
    }

    /// Operations that were answered otherwise leave their tickets behind; here they are bounded.
    fn forget_gone(&mut self, table: &Table) {
        const MANY: usize = 2 * PIPELINE_OPERATIONS_MAX;
        for tickets in [&mut self.round, &mut self.due] {
            if tickets.len() > MANY {
                tickets.retain(|ticket| table.holds(*ticket));
            }
        }
        if self.behind.len() > MANY {
            self.behind.retain(|(ticket, _)| table.holds(*ticket));
        }
        if self.ready.len() > MANY {
            self.ready.retain(|(ticket, _)| table.holds(*ticket));
        }
    }
}

fn lease(engine: &Engine) -> Result<Settled, EngineError> {
    match engine.consensus().read_by_lease() {
        None if engine.consensus().role() != Role::Leader => Err(engine.not_leader()),
        settled => Ok(settled),
    }
}
