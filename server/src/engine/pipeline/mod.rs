//! Many operations of one caller at a time: what is in flight, for how long, and that each has exactly one answer.
//!
//! The path of an operation does not cost a task, a timer or a wake-up of its own:
//!
//! ```text
//! begin ─┬─ reads that may be answered now ───────────────────────────────┐   the right is earned once per message
//!        ├─ other reads ──► one round for all that wait ──► ready ────────┼─► answers
//!        ├─ writes ──► one message to the proposer ──► one wake-up per entry ┤
//!        └─ the rest ──► a call of its own ───────────────────────────────┘
//! ```
//!
//! What waits is in a table by its id; whatever names it elsewhere, in a round or in a log entry, is a ticket, and worth
//! nothing once the table has another one. So an operation that was cancelled or came to its deadline leaves at once, and
//! what arrives for it later finds nobody.
//!
//! Nothing here waits or spawns: who owns it polls it.

mod operation;
mod reads;
mod table;

use std::collections::VecDeque;
use std::mem;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use d_engine_proto::v1::answer::Reply;
use d_engine_proto::v1::{self, Outcome};
use d_engine_proto::{ErrorCode, Revision};
use futures_util::future::{AbortHandle, Abortable, BoxFuture};
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use prost::Message;
use prost::encoding::encoded_len_varint;
use tokio::time::Sleep;
use tracing::Instrument;

use super::writes::uncommitted;
use super::{Deadline, Engine, EngineError, TURN, late};
use crate::consensus::{Answer as Applied, Gathering, ProposeError, Ticket};
use crate::limits::{PIPELINE_BATCH_BYTES_MAX, PIPELINE_CALLS_MAX, PIPELINE_DEADLINES_PAUSE};
use operation::{Other, Work};
use reads::Reads;
use table::{Flight, Origin, Stage, Table};

/// Commands are encoded into pieces of memory of this size, unless one is larger.
const BUFFER_BYTES: usize = 8 << 10;

/// A mistake after which nobody can tell which answer belongs to which operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Misuse {
    /// The id that stands for none.
    #[error("an operation has no id: give each one of its own, greater than 0")]
    NoId,
    /// Two of one id.
    #[error("operation {id} is in flight already: give each an id that no other has which is not answered yet")]
    InFlight {
        /// The id.
        id: u64,
    },
    /// Neither a request nor a cancellation, or one of a newer version.
    #[error("operation {id} has no request that this server knows: set one of them, or ask a newer server")]
    NoRequest {
        /// The id.
        id: u64,
    },
}

/// An answer on its way.
pub(crate) struct Answered {
    /// What the caller gets.
    pub(crate) answer: v1::Answer,
    /// Bytes it takes in a message.
    pub(crate) bytes: usize,
    /// Which operation it answers.
    pub(crate) origin: Origin,
}

/// The operations of one caller. Dropping it withdraws what can be withdrawn.
pub(crate) struct Pipeline {
    engine: Engine,
    table: Table,
    reads: Reads,
    /// When the message at hand arrived.
    now: Deadline,
    /// Writes that begin, in the order of their serials.
    writes: VecDeque<(Ticket, Bytes)>,
    /// Empty; commands are encoded into its room.
    buffer: BytesMut,
    /// Writes that wait until what is due has ended.
    settling: Option<Settling>,
    gathering: Gathering,
    applied: Vec<(Ticket, Applied)>,
    /// Operations that wait for a place among the calls.
    waiting: VecDeque<Ticket>,
    calls: FuturesUnordered<Abortable<Call>>,
    timer: Timer,
    answers: VecDeque<Answered>,
    answer_bytes: usize,
}

type Call = BoxFuture<'static, (Ticket, Result<Reply, EngineError>)>;

struct Settling {
    writes: VecDeque<(Ticket, Bytes)>,
    settled: BoxFuture<'static, Result<(), EngineError>>,
}

/// One timer for all deadlines.
struct Timer {
    /// The earliest deadline there can be.
    earliest: Option<Deadline>,
    looked: Deadline,
    /// Set while `earliest` is.
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Pipeline {
    pub(crate) fn new(engine: Engine) -> Self {
        let now = Deadline::now();
        Self {
            reads: Reads::new(&engine),
            engine,
            table: Table::default(),
            now,
            writes: VecDeque::new(),
            buffer: BytesMut::new(),
            settling: None,
            gathering: Gathering::default(),
            applied: Vec::new(),
            waiting: VecDeque::new(),
            calls: FuturesUnordered::new(),
            timer: Timer { earliest: None, looked: now, sleep: None },
            answers: VecDeque::new(),
            answer_bytes: 0,
        }
    }

    /// Whether another operation may begin.
    pub(crate) fn has_room(&self) -> bool {
        self.table.has_room() && !self.is_full()
    }

    /// Whether a whole message of answers waits to be sent.
    pub(crate) fn is_full(&self) -> bool {
        self.answer_bytes >= PIPELINE_BATCH_BYTES_MAX
    }

    /// Whether nothing is in flight and nothing waits to be sent.
    pub(crate) fn is_idle(&self) -> bool {
        self.table.len() == 0 && self.answers.is_empty()
    }

    /// Tells that operations have arrived: what was earned before is not theirs. Returns the time of it.
    pub(crate) fn arrive(&mut self) -> Deadline {
        self.reads.forget_rights();
        self.now = Deadline::now();
        self.now
    }

    /// Begins an operation of `bytes` bytes, to be answered in `timeout`. Its answer is there at once, or comes by
    /// [`poll`](Self::poll).
    ///
    /// # Errors
    /// When the operation cannot be answered; nothing can follow then.
    pub(crate) fn begin(&mut self, operation: v1::Operation, bytes: usize, timeout: Duration) -> Result<(), Misuse> {
        let v1::Operation { id, request, trace, timeout_us: _ } = operation;
        if id == 0 {
            return Err(Misuse::NoId);
        }
        let (method, work) = operation::sort(request.ok_or(Misuse::NoRequest { id })?);
        if matches!(work, Work::Cancel) {
            self.cancel(id);
            return Ok(());
        }
        if self.table.contains(id) {
            return Err(Misuse::InFlight { id });
        }
        let deadline = self.now + timeout;
        let returns_values = matches!(&work, Work::Write(change) if operation::returns_values(change));
        let origin = Origin::new(method, self.now, trace.as_ref());
        let flight = |origin, stage| Flight { serial: 0, deadline, origin, bytes, returns_values, stage };
        match work {
            Work::Write(change) => {
                if self.buffer.capacity() == 0 {
                    self.buffer.reserve(BUFFER_BYTES);
                }
                let (origin, trace) = origin.proposing();
                match self.engine.prepare(change, trace, &mut self.buffer) {
                    Ok(command) => {
                        let ticket = self.table.insert(id, flight(origin, Stage::Write));
                        self.timer.expect(deadline);
                        self.writes.push_back((ticket, command));
                    }
                    Err(error) => self.push(id, origin, Err(error)),
                }
            }
            Work::Read(query) => {
                let outcome = self.reads.begin(&self.engine, query, self.answer_bytes >= PIPELINE_BATCH_BYTES_MAX);
                match outcome {
                    reads::Begun::Answered(result) => self.push(id, origin, result),
                    reads::Begun::Waits(query, wait) => {
                        let ticket = self.table.insert(id, flight(origin, Stage::Read(query.detached())));
                        self.timer.expect(deadline);
                        self.reads.park(ticket, wait);
                    }
                    reads::Begun::Past(query) => {
                        let ticket = self.table.insert(id, flight(origin, Stage::Waits(Other::Past(query.detached()))));
                        self.timer.expect(deadline);
                        self.waiting.push_back(ticket);
                    }
                }
            }
            Work::Other(other) => {
                let ticket = self.table.insert(id, flight(origin, Stage::Waits(other)));
                self.timer.expect(deadline);
                self.waiting.push_back(ticket);
            }
            Work::Cancel => {}
        }
        Ok(())
    }

    /// Ends an operation that has changed nothing and cannot any more; leaves others, and unknown ones, alone.
    fn cancel(&mut self, id: u64) {
        let cancelled = match self.table.get(id) {
            Some(Flight { stage: Stage::Read(_) | Stage::Waits(_), .. }) => true,
            Some(Flight { stage: Stage::Write, serial, .. }) => self.gathering.withdraw(*serial),
            Some(Flight { stage: Stage::Call { handle, withdrawable: true }, .. }) => {
                handle.abort();
                true
            }
            Some(Flight { stage: Stage::Call { .. }, .. }) | None => false,
        };
        if cancelled && let Some(flight) = self.table.remove(id) {
            let detail = v1::ErrorDetail {
                code: ErrorCode::Cancelled.number(),
                outcome: Outcome::NotApplied as i32,
                ..v1::ErrorDetail::default()
            };
            let message = "the operation was cancelled".to_owned();
            let error = v1::OperationError { detail: Some(detail), message };
            self.push_reply(id, flight.origin, Reply::Error(error));
        }
    }

    /// Goes on with everything, and takes answers for as long as there is room for more.
    pub(crate) fn poll(&mut self, context: &mut Context<'_>) {
        loop {
            self.propose();
            self.reads.start_rounds(&self.engine, &self.table);
            self.poll_writes(context);
            self.reads.poll(context);
            while let Some((reads, error)) = self.reads.next_failed() {
                reads.into_iter().for_each(|ticket| self.finish(ticket, Err(error.clone())));
            }
            self.read();
            self.poll_calls(context);
            let looked = self.poll_deadlines(context);
            // What ended may have made way for what is to be polled too.
            if !looked && !self.reads.can_start_round() && (self.writes.is_empty() || self.settling.is_some()) {
                break;
            }
        }
        // Held between polls it would keep a past state in memory.
        self.reads.forget_rights();
    }

    /// Takes answers for one message.
    pub(crate) fn take_answers(&mut self) -> impl Iterator<Item = Answered> + '_ {
        let mut room = PIPELINE_BATCH_BYTES_MAX;
        let mut first = true;
        std::iter::from_fn(move || {
            let next = self.answers.front()?;
            if next.bytes > room && !first {
                return None;
            }
            first = false;
            room = room.saturating_sub(next.bytes);
            self.answer_bytes -= next.bytes;
            self.answers.pop_front()
        })
    }

    /// Hands the writes that have begun to the proposer, once nothing is due.
    fn propose(&mut self) {
        if self.writes.is_empty() || self.settling.is_some() {
            return;
        }
        let mut writes = mem::take(&mut self.writes);
        let now = Deadline::now();
        // Rare: most have seconds.
        if self.timer.earliest.is_some_and(|earliest| earliest <= now) {
            let in_time = |ticket: Ticket| self.table.find(ticket).is_some_and(|flight| flight.deadline > now);
            let (rest, due): (VecDeque<_>, VecDeque<_>) = writes.into_iter().partition(|(ticket, _)| in_time(*ticket));
            writes = rest;
            due.into_iter().for_each(|(ticket, _)| self.finish(ticket, Err(late(TURN))));
        }
        if self.engine.due_now().is_none() {
            self.engine.consensus().propose_all(writes, &self.gathering);
            return;
        }
        let deadlines = writes.iter().filter_map(|(ticket, _)| Some(self.table.get(ticket.id)?.deadline));
        let (engine, latest) = (self.engine.clone(), deadlines.max().unwrap_or(now));
        let settled = Box::pin(async move { engine.settle_now(latest).await });
        self.settling = Some(Settling { writes, settled });
    }

    fn poll_writes(&mut self, context: &mut Context<'_>) {
        if let Some(Settling { settled, .. }) = &mut self.settling
            && let Poll::Ready(settled) = settled.poll_unpin(context)
        {
            let mut writes = self.settling.take().map(|settling| settling.writes).unwrap_or_default();
            match settled {
                Ok(()) => {
                    writes.retain(|(ticket, _)| self.table.holds(*ticket));
                    self.engine.consensus().propose_all(writes, &self.gathering);
                }
                Err(error) => writes.into_iter().for_each(|(ticket, _)| self.finish(ticket, Err(error.clone()))),
            }
        }
        let mut applied = mem::take(&mut self.applied);
        // Explaining may cost more than answering, and the answers of an entry fail alike.
        let mut explained: Option<(ProposeError, EngineError)> = None;
        while self.gathering.poll_take(context, &mut applied).is_ready() {
            for (ticket, answer) in applied.drain(..) {
                let result = match answer {
                    Ok(reply) => self
                        .engine
                        .read_reply(reply)
                        .and_then(|(header, reply)| operation::written(header, reply).ok_or(EngineError::Stopped)),
                    Err(error) => Err(match &explained {
                        Some((same, explained)) if *same == error => explained.clone(),
                        _ => {
                            let explanation = self.engine.explain_propose(error.clone());
                            explained.insert((error, explanation)).1.clone()
                        }
                    }),
                };
                self.finish(ticket, result);
            }
        }
        self.applied = applied;
    }

    /// Answers reads that may be answered, while there is room.
    fn read(&mut self) {
        while !self.is_full()
            && let Some((ticket, settled)) = self.reads.next_ready()
        {
            let Some(Flight { stage: Stage::Read(query), .. }) = self.table.find(ticket) else { continue };
            match self.reads.read(&self.engine, query, settled) {
                reads::Outcome::Answered(result) => self.finish(ticket, result),
                reads::Outcome::Waits(wait) => self.reads.park(ticket, wait),
                reads::Outcome::Past => {
                    if let Some(Flight { stage, .. }) = self.table.find_mut(ticket)
                        && let Stage::Read(query) = mem::take(stage)
                    {
                        *stage = Stage::Waits(Other::Past(query));
                        self.waiting.push_back(ticket);
                    }
                }
            }
        }
    }

    /// Begins calls and takes what they answer, while there is room.
    fn poll_calls(&mut self, context: &mut Context<'_>) {
        loop {
            while self.calls.len() < PIPELINE_CALLS_MAX
                && let Some(ticket) = self.waiting.pop_front()
            {
                self.call(ticket);
            }
            match self.calls.poll_next_unpin(context) {
                // Whoever aborted it has answered.
                Poll::Ready(Some(Err(_))) => {}
                Poll::Ready(Some(Ok((ticket, result)))) => self.finish(ticket, result),
                Poll::Ready(None) | Poll::Pending => return,
            }
        }
    }

    /// Begins the call of an operation, if it is still in flight.
    fn call(&mut self, ticket: Ticket) {
        let Some(Flight { stage, deadline, origin, .. }) = self.table.find_mut(ticket) else { return };
        let (handle, registration) = AbortHandle::new_pair();
        if let Stage::Waits(other) = mem::take(stage) {
            *stage = Stage::Call { handle, withdrawable: other.is_read() };
            let run = other.run(self.engine.clone(), *deadline).instrument(origin.call.clone());
            let call = run.map(move |result| (ticket, result)).boxed();
            self.calls.push(Abortable::new(call, registration));
        }
    }

    /// Answers what has come to its deadline. Returns whether there is more to poll.
    fn poll_deadlines(&mut self, context: &mut Context<'_>) -> bool {
        if self.timer.poll(context).is_pending() {
            return false;
        }
        self.look_at_deadlines(Deadline::now());
        true
    }

    fn look_at_deadlines(&mut self, now: Deadline) {
        let (due, earliest) = self.table.take_due(now);
        self.timer.earliest = earliest;
        self.timer.looked = now;
        for (id, flight) in due {
            let error = match &flight.stage {
                Stage::Read(query) => {
                    let minimum = Revision(query.options().min_revision);
                    let applied = self.engine.inner.kv.current().revision();
                    if minimum > applied { self.engine.behind(minimum) } else { late("the right to read") }
                }
                Stage::Waits(_) => late(TURN),
                Stage::Write if self.gathering.withdraw(flight.serial) => late(TURN),
                Stage::Write | Stage::Call { .. } => uncommitted(),
            };
            self.push(id, flight.origin, Err(error));
        }
        if self.is_idle() {
            // The memory of a burst: the timer goes off once more after the last operation.
            (self.answers, self.applied, self.waiting) = Default::default();
            self.gathering.shrink();
            self.reads.shrink();
        }
    }

    /// Answers an operation that is still in flight.
    fn finish(&mut self, ticket: Ticket, result: Result<Reply, EngineError>) {
        if let Some(flight) = self.table.remove_held(ticket) {
            self.push(ticket.id, flight.origin, result);
        }
    }

    fn push(&mut self, id: u64, origin: Origin, result: Result<Reply, EngineError>) {
        let reply = result.unwrap_or_else(|error| {
            Reply::Error(v1::OperationError { detail: Some(error.detail()), message: error.to_string() })
        });
        self.push_reply(id, origin, reply);
    }

    fn push_reply(&mut self, id: u64, origin: Origin, reply: Reply) {
        let answer = v1::Answer { id, reply: Some(reply) };
        let length = answer.encoded_len();
        let bytes = 1 + encoded_len_varint(length as u64) + length;
        self.answer_bytes += bytes;
        self.answers.push_back(Answered { answer, bytes, origin });
    }
}

impl Timer {
    fn expect(&mut self, deadline: Deadline) {
        self.earliest = Some(self.earliest.map_or(deadline, |earliest| earliest.min(deadline)));
    }

    /// When to look at the deadlines: not before one may have come, and not too often.
    fn next(&self) -> Option<Deadline> {
        Some(self.earliest?.max(self.looked + PIPELINE_DEADLINES_PAUSE))
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let Some(next) = self.next() else { return Poll::Pending };
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(next)));
        if sleep.deadline() != next {
            sleep.as_mut().reset(next);
        }
        sleep.as_mut().poll(context)
    }
}
