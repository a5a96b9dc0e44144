//! The stream that carries the operations of one connection, many to a message.
//!
//! ```text
//!   callers --> queue --(one message takes what waits)--> stream --> node
//!   callers <-- slot of each, by its id <---------------- answers <--+
//! ```
//!
//! An operation in the queue was certainly not sent: taking it out ends it. One that was taken into a message counts as
//! sent, whatever became of the message. Each has one slot, which gets one word: the answer, the deadline, or the end of
//! the link, whichever comes first; what comes later finds no slot. However a link ends, also by the end of its runtime,
//! it leaves no slot without a word.
//!
//! It has no bound of its own: what callers have in flight is bounded for the client as a whole (`room`), and operations
//! that nobody waits for any more are taken out. It knows nothing of sessions, retries, or which node to ask.

use std::collections::{BTreeMap, HashMap};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use d_engine_proto::v1::{answer, operation};
use d_engine_proto::{DetailedStatus, ErrorCode, limits, v1};
use futures_util::Stream;
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic_prost::ProstCodec;

use crate::call::{REPLY_BYTES_MAX, SUSPECT_AFTER, stream_failure};
use crate::client::Shared;
use crate::connection::{Connection, Heard};
use crate::retry::{Cause, Failure};
use crate::topology::Address;

const METHOD: &str = "/d_engine.v1.Pipeline/Exchange";
/// What an operation takes in a message besides its request: id, remaining time, trace context, tags and lengths.
const OPERATION_BYTES: usize = 160;
/// Deadlines that pass are looked for no more often.
const SWEEP_GAP: Duration = Duration::from_millis(1);

/// What a caller is told.
#[derive(Debug)]
pub(crate) enum Word {
    Answer(answer::Reply),
    Failed(Failure),
    /// The node has no pipeline, so nothing was executed: it takes unary calls.
    Unary,
}

/// Why an operation cannot be put into a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Barred {
    /// The link takes no more: the next connection has another.
    Over,
    /// The node has no pipeline.
    Unary,
}

/// The stream of one connection. Opened by its first operation.
#[derive(Debug, Default)]
pub(crate) struct Link {
    state: Mutex<LinkState>,
    /// Wakes whoever watches the deadlines: one comes earlier than all before, or nothing is left to be done.
    time: Notify,
}

#[derive(Debug, Default)]
struct LinkState {
    phase: Phase,
    last_id: u64,
    /// Not sent, and not sent as long as they are here. By id, so in the order they came.
    queue: BTreeMap<u64, Queued>,
    /// Taken into a message and not answered.
    flight: HashMap<u64, Pending>,
    /// Operations to be cancelled on the node. At most one for each that was in flight.
    cancels: Vec<u64>,
    /// Who sends, if it waits for something to send.
    sender: Option<Waker>,
    /// The sender has let the others go first.
    yielded: bool,
    /// When to look at the deadlines again. Invariant: not after the earliest of `queue` and `flight`.
    sweep_at: Option<Instant>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    /// Not opened yet.
    #[default]
    Idle,
    Open,
    /// Takes no more; what it has is sent and answered.
    Draining,
    Ended,
    /// The node has no pipeline.
    Unary,
}

/// What a caller wants done.
#[derive(Debug)]
pub(crate) struct Submission {
    pub(crate) request: operation::Request,
    /// What it takes in a message.
    pub(crate) bytes: usize,
    /// The span it belongs to.
    pub(crate) trace: Option<v1::TraceContext>,
}

impl Submission {
    /// `bytes`: of the encoded request.
    pub(crate) fn new(request: operation::Request, bytes: usize, trace: Option<v1::TraceContext>) -> Self {
        Self { request, bytes: bytes + OPERATION_BYTES, trace }
    }
}

#[derive(Debug)]
struct Queued {
    submission: Submission,
    pending: Pending,
}

#[derive(Debug)]
struct Pending {
    slot: oneshot::Sender<Word>,
    begun: Instant,
    deadline: Instant,
    cancelled: bool,
}

impl Link {
    /// Puts an operation into the queue of `connection`'s link.
    pub(crate) fn submit(
        shared: &Arc<Shared>,
        address: &Address,
        connection: Arc<Connection>,
        submission: Submission,
        deadline: Instant,
    ) -> Result<Waiting, Barred> {
        let link = &connection.link;
        let heard = connection.heard();
        let (slot, word) = oneshot::channel();
        let pending = Pending { slot, begun: Instant::now(), deadline, cancelled: false };
        let (id, first, sender) = {
            let mut state = link.state.lock();
            let first = match state.phase {
                Phase::Idle => true,
                Phase::Open => false,
                Phase::Draining | Phase::Ended => return Err(Barred::Over),
                Phase::Unary => return Err(Barred::Unary),
            };
            state.phase = Phase::Open;
            state.last_id += 1;
            let id = state.last_id;
            let look_at = deadline.min(pending.begun + SUSPECT_AFTER);
            state.queue.insert(id, Queued { submission, pending });
            if state.sweep_at.is_none_or(|at| look_at < at) {
                state.sweep_at = Some(look_at);
                link.time.notify_one();
            }
            (id, first, state.sender.take())
        };
        if first {
            let carrier =
                Carrier { shared: Arc::clone(shared), address: address.clone(), connection: Arc::clone(&connection) };
            shared.tasks.spawn(carrier.run());
        }
        if let Some(sender) = sender {
            sender.wake();
        }
        Ok(Waiting { connection, heard, id, word, over: false })
    }

    /// Lets the link end once it has sent and answered what it has.
    pub(crate) fn drain(&self) {
        let sender = {
            let mut state = self.state.lock();
            match state.phase {
                Phase::Idle => state.phase = Phase::Ended,
                Phase::Open => state.phase = Phase::Draining,
                Phase::Draining | Phase::Ended | Phase::Unary => {}
            }
            state.sender.take()
        };
        self.time.notify_one();
        if let Some(sender) = sender {
            sender.wake();
        }
    }

    /// Ends the link: tells `queued` to what was not sent, and `sent` to the rest.
    fn end(&self, phase: Phase, queued: impl Fn() -> Word, sent: impl Fn() -> Word) {
        let (queue, flight, sender) = {
            let mut state = self.state.lock();
            if matches!(state.phase, Phase::Ended | Phase::Unary) {
                return;
            }
            state.phase = phase;
            state.cancels = Vec::new();
            (std::mem::take(&mut state.queue), std::mem::take(&mut state.flight), state.sender.take())
        };
        for operation in queue.into_values() {
            operation.pending.tell(queued());
        }
        for pending in flight.into_values() {
            pending.tell(sent());
        }
        if let Some(sender) = sender {
            sender.wake();
        }
    }

    fn is_over(&self) -> bool {
        matches!(self.state.lock().phase, Phase::Ended | Phase::Unary)
    }

    fn fail(&self, queued: &Failure, sent: &Failure) {
        self.end(Phase::Ended, || Word::Failed(queued.clone()), || Word::Failed(sent.clone()));
    }

    fn deliver(&self, answers: Vec<v1::Answer>) {
        let mut words = Vec::with_capacity(answers.len());
        {
            let mut state = self.state.lock();
            for v1::Answer { id, reply } in answers {
                // Answers to what was given up meanwhile, or was never sent, find nobody.
                let Some(pending) = state.flight.remove(&id) else { continue };
                words.push((pending, Word::of(reply)));
            }
            self.look_whether_drained(&state);
        }
        // Whoever is woken finds the lock free.
        for (pending, word) in words {
            pending.tell(word);
        }
    }

    /// Takes an operation out that was not sent. False if it was.
    fn withdraw(&self, id: u64) -> bool {
        let withdrawn = {
            let mut state = self.state.lock();
            let withdrawn = state.queue.remove(&id);
            self.look_whether_drained(&state);
            withdrawn
        };
        withdrawn.is_some()
    }

    /// Asks the node to cancel an operation in flight; `forget`: its answer is of no interest.
    fn cancel(&self, id: u64, forget: bool) {
        let sender = {
            let mut state = self.state.lock();
            let Some(pending) = state.flight.get_mut(&id) else { return };
            if !std::mem::replace(&mut pending.cancelled, true) {
                state.cancels.push(id);
            }
            if forget {
                state.flight.remove(&id);
                self.look_whether_drained(&state);
            }
            state.sender.take()
        };
        if let Some(sender) = sender {
            sender.wake();
        }
    }

    fn look_whether_drained(&self, state: &LinkState) {
        if state.is_drained() {
            self.time.notify_one();
        }
    }

    /// Ends what is out of time, and asks for news of the cluster while an answer is overdue. Ends when the link is
    /// drained.
    async fn keep_time(&self, shared: &Shared) {
        loop {
            let sweep_at = {
                let state = self.state.lock();
                if state.is_drained() {
                    return;
                }
                state.sweep_at
            };
            match sweep_at {
                None => self.time.notified().await,
                Some(at) => tokio::select! {
                    () = tokio::time::sleep_until(at) => {
                        self.sweep(shared);
                        tokio::time::sleep(SWEEP_GAP).await;
                    }
                    () = self.time.notified() => {}
                },
            }
        }
    }

    fn sweep(&self, shared: &Shared) {
        let now = Instant::now();
        let (late, overdue) = self.state.lock().sweep(now);
        for (pending, sent) in late {
            // What it had: that this process came late to look says nothing of the node.
            let after = pending.deadline.saturating_duration_since(pending.begun);
            pending.tell(Word::Failed(Failure::Silent { sent, after }));
        }
        if overdue {
            shared.refresh.notify_one();
        }
    }
}

impl LinkState {
    fn is_drained(&self) -> bool {
        self.phase == Phase::Draining && self.queue.is_empty() && self.flight.is_empty()
    }

    /// Takes out what is out of time, each with whether it was sent. True beside if an answer is overdue.
    fn sweep(&mut self, now: Instant) -> (Vec<(Pending, bool)>, bool) {
        let is_late = |pending: &Pending| pending.deadline <= now;
        let queued: Vec<_> =
            self.queue.iter().filter(|(_, queued)| is_late(&queued.pending)).map(|(id, _)| *id).collect();
        let sent: Vec<_> = self.flight.iter().filter(|(_, pending)| is_late(pending)).map(|(id, _)| *id).collect();
        let queued = queued.into_iter().filter_map(|id| Some((self.queue.remove(&id)?.pending, false)));
        let mut late: Vec<_> = queued.collect();
        late.extend(sent.into_iter().filter_map(|id| Some((self.flight.remove(&id)?, true))));

        let left = || self.queue.values().map(|queued| &queued.pending).chain(self.flight.values());
        let oldest = left().map(|pending| pending.begun).chain(late.iter().map(|(pending, _)| pending.begun)).min();
        let overdue = oldest.is_some_and(|begun| now.saturating_duration_since(begun) >= SUSPECT_AFTER);
        let suspect_at = if overdue { Some(now) } else { oldest }.map(|from| from + SUSPECT_AFTER);
        self.sweep_at = left().map(|pending| pending.deadline).chain(suspect_at).min();
        (late, overdue)
    }

    /// The next message, if anything waits.
    fn take(&mut self, now: Instant) -> Option<v1::OperationBatch> {
        if self.queue.is_empty() && self.cancels.is_empty() {
            return None;
        }
        let mut operations = Vec::with_capacity(self.cancels.len() + self.queue.len());
        let mut bytes = 0;
        for id in self.cancels.drain(..) {
            let request = Some(operation::Request::Cancel(v1::CancelOperation {}));
            operations.push(v1::Operation { id, request, ..v1::Operation::default() });
            bytes += OPERATION_BYTES;
        }
        while let Some(first) = self.queue.first_entry() {
            if bytes > 0 && (bytes + first.get().submission.bytes) as u64 > limits::PIPELINE_BATCH_BYTES_MAX {
                break;
            }
            let (id, Queued { submission, pending }) = first.remove_entry();
            bytes += submission.bytes;
            let rest = pending.deadline.saturating_duration_since(now);
            // 0 would be the server's default.
            let timeout_us = u64::try_from(rest.as_micros()).unwrap_or(u64::MAX).max(1);
            let Submission { request, trace, .. } = submission;
            operations.push(v1::Operation { id, timeout_us, trace, request: Some(request) });
            self.flight.insert(id, pending);
        }
        Some(v1::OperationBatch { operations })
    }
}

impl Pending {
    fn tell(self, word: Word) {
        // Whoever went away needs no word.
        let _ = self.slot.send(word);
    }
}

impl Word {
    fn of(reply: Option<answer::Reply>) -> Self {
        match reply {
            Some(answer::Reply::Error(v1::OperationError { detail, message })) => {
                let detail = detail.unwrap_or_default();
                Self::Failed(Failure::Refused(Box::new(DetailedStatus { message, detail })))
            }
            Some(reply) => Self::Answer(reply),
            None => Self::Failed(unreadable()),
        }
    }
}

/// The failure of an operation whose answer is none that it can have.
pub(crate) fn unreadable() -> Failure {
    Failure::Lost(Cause::text("an answer that this client cannot read"))
}

/// An operation in a link. Dropping it gives the operation up: one that was not sent is not, another is cancelled on
/// the node, as advice.
#[derive(Debug)]
pub(crate) struct Waiting {
    pub(crate) connection: Arc<Connection>,
    /// What had been heard on the connection before.
    pub(crate) heard: Heard,
    id: u64,
    word: oneshot::Receiver<Word>,
    over: bool,
}

impl Waiting {
    /// What became of it; no later than its deadline, or a few milliseconds after. Dropping the future loses nothing.
    pub(crate) async fn word(&mut self) -> Word {
        let word = (&mut self.word).await;
        self.over = true;
        // A link ends no slot without a word.
        word.unwrap_or_else(|_| Word::Failed(Failure::Lost(Cause::text("the stream of operations is gone"))))
    }

    /// Takes the operation back. True if nothing of it was sent, nor ever will be.
    pub(crate) fn withdraw(&mut self) -> bool {
        let withdrawn = self.connection.link.withdraw(self.id);
        self.over |= withdrawn;
        withdrawn
    }

    /// Asks the node to cancel the operation, which has its word all the same.
    pub(crate) fn cancel(&self) {
        self.connection.link.cancel(self.id, false);
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let link = &self.connection.link;
        if !self.over && !link.withdraw(self.id) {
            link.cancel(self.id, true);
        }
    }
}

/// What the request side of the stream reads from.
struct Outgoing(Arc<Link>);

impl Stream for Outgoing {
    type Item = v1::OperationBatch;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut state = self.0.state.lock();
        if matches!(state.phase, Phase::Ended | Phase::Unary) {
            return Poll::Ready(None);
        }
        if state.queue.is_empty() && state.cancels.is_empty() {
            if state.phase == Phase::Draining {
                return Poll::Ready(None);
            }
            state.sender = Some(cx.waker().clone());
            return Poll::Pending;
        }
        if !std::mem::replace(&mut state.yielded, true) {
            // The first operation woke this task, which may have come before callers that are about to put in theirs.
            // They go first, and one message takes them all. Nobody who is not ready to run is waited for.
            drop(state);
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        state.yielded = false;
        Poll::Ready(state.take(Instant::now()))
    }
}

/// The task of a link, from its start on. However it ends, it leaves nobody waiting.
struct Carrier {
    shared: Arc<Shared>,
    address: Address,
    connection: Arc<Connection>,
}

/// Why a stream ended.
enum End {
    /// What was taken into messages may have been applied.
    Lost(Cause),
    /// The node refused the stream.
    Refused(Failure),
    NotSent(Cause),
    Unary,
}

impl Carrier {
    async fn run(self) {
        let Self { shared, address, connection } = &self;
        let link = &connection.link;
        let end = tokio::select! {
            biased;
            () = shared.closed.cancelled() => {
                return link.fail(&Failure::Closed { sent: false }, &Failure::Closed { sent: true });
            }
            end = self.converse() => end,
            () = link.keep_time(shared) => End::Lost(Cause::text("the stream was drained")),
        };
        match end {
            End::Unary => {
                tracing::debug!(%address, "the node has no pipeline: unary calls take its place");
                link.end(Phase::Unary, || Word::Unary, || Word::Unary);
            }
            End::NotSent(cause) => self.fail(cause.clone(), &Failure::Lost(cause)),
            End::Lost(cause) => self.fail(cause.clone(), &Failure::Lost(cause)),
            End::Refused(failure) => self.fail(Cause::text(failure.message()), &failure),
        }
    }

    /// Ends the link. The next operation has another connection, and finds it before it could find this link.
    fn fail(&self, queued: Cause, sent: &Failure) {
        tracing::debug!(address = %self.address, cause = sent.message(), "a stream of operations ended");
        self.shared.connections.discard(&self.address, &self.connection);
        self.connection.link.fail(&Failure::NotSent(queued), sent);
    }

    async fn converse(&self) -> End {
        let link = &self.connection.link;
        let mut grpc = Grpc::new(self.connection.channel.clone()).max_decoding_message_size(REPLY_BYTES_MAX);
        if let Err(error) = grpc.ready().await {
            return End::NotSent(Cause::of(error));
        }
        let operations = tonic::Request::new(Outgoing(Arc::clone(link)));
        let codec = ProstCodec::<v1::OperationBatch, v1::AnswerBatch>::default();
        let mut answers = match grpc.streaming(operations, PathAndQuery::from_static(METHOD), codec).await {
            Ok(answers) => answers.into_inner(),
            Err(status) => {
                return match stream_failure(status) {
                    Failure::Lost(cause) => End::Lost(cause),
                    failure if failure.code() == Some(ErrorCode::Unsupported) => End::Unary,
                    failure => End::Refused(failure),
                };
            }
        };
        loop {
            match answers.message().await {
                Ok(Some(v1::AnswerBatch { answers, draining })) => {
                    if draining {
                        self.shared.connections.discard(&self.address, &self.connection);
                        link.drain();
                    }
                    link.deliver(answers);
                }
                Ok(None) => return End::Lost(Cause::text("the node ended the stream of operations")),
                // Whatever it says of the stream, an operation may have been applied.
                Err(status) => return End::Lost(Cause::of_status(status)),
            }
        }
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        if !self.connection.link.is_over() {
            let cause = Cause::text("the client's runtime ended");
            self.fail(cause.clone(), &Failure::Lost(cause));
        }
    }
}

#[cfg(test)]
#[path = "pipeline_tests.rs"]
mod tests;
