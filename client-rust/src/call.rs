//! One call: attempts within one deadline, each to the node that the topology picks.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use d_engine_proto::{DetailedStatus, ErrorCode, TRACEPARENT, limits, v1};
use futures_util::FutureExt;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic_prost::ProstCodec;
use tracing::Instrument;

use crate::client::{Client, Shared, State};
use crate::clock::Moment;
use crate::cluster::Leader;
use crate::connection::{Connection, Heard};
use crate::error::{Error, ErrorKind, Outcome};
use crate::gate::{Gate, GatedChannel};
use crate::namespace::Leave as _;
use crate::observe::Observed;
use crate::options::bounded;
use crate::pipeline::{self, Barred, Link, Submission, Waiting, Word};
use crate::retry::{Cause, Decision, Failure, Resend, backoff, decide};
use crate::session::Ticket;
use crate::topology::{Address, Pick, Route};
use crate::until::{Ended, Until};
use crate::wire::Unary;

/// Bytes of an answer; what is larger is refused instead of filling the memory. As much as generated stubs of every
/// language accept, with a margin for what an answer has besides keys and values.
pub(crate) const REPLY_BYTES_MAX: usize = 4 << 20;
const _: () = assert!(limits::ANSWER_BYTES_MAX + (64 << 10) <= REPLY_BYTES_MAX as u64);
/// An attempt that takes longer makes the client ask whether somebody else leads by now. A node is not backed off for
/// having less time than this.
pub(crate) const SUSPECT_AFTER: Duration = Duration::from_millis(300);
/// An attempt that can be repeated gets this part of the call's timeout, so that others get a chance if its node is
/// silent.
const ATTEMPTS: u32 = 4;
/// How long a cancelled call waits for what its node says became of it.
const CANCEL_PATIENCE: Duration = Duration::from_millis(100);

/// How a call is to be served.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) route: Route,
    pub(crate) resend: Resend,
    pub(crate) timeout: Duration,
}

/// Why no node could be chosen.
pub(crate) enum Unchosen {
    Ended(Ended),
    /// Whoever answers belongs to another cluster.
    Foreign(String),
}

impl Client {
    /// Makes a call, as often as it takes and the deadline allows.
    pub(crate) async fn call<R: Unary>(&self, mut request: R, plan: Plan) -> Result<R::Reply, Error> {
        request.check().map_err(|message| Error::invalid(R::OPERATION, message))?;
        request.enter(self.space()).map_err(|error| Error::invalid(R::OPERATION, error.to_string()))?;
        let shared = self.shared();
        let mut result = shared.call(request, plan, self.cancel()).await;
        match &mut result {
            Ok(reply) => reply.leave(self.space()),
            Err(error) => {
                shared.counters.failures.add();
                if error.outcome() == Outcome::Unknown {
                    shared.counters.unknown_outcomes.add();
                }
            }
        }
        result
    }

    /// Makes a call to one node, once. Only for calls that change nothing.
    pub(crate) async fn call_node<R: Unary>(
        &self,
        address: &str,
        request: R,
        timeout: Duration,
    ) -> Result<R::Reply, Error> {
        let address = Address::parse(address).map_err(|message| Error::invalid(R::OPERATION, message))?;
        let shared = self.shared();
        shared.counters.calls.add();
        let until = Until::new(Instant::now() + bounded(timeout), self.cancel());
        let mut observed = shared.observe::<R>(false);
        let span = observed.span();
        let result = shared.call_once(&mut observed, address, request, &until).instrument(span).await;
        observed.ends(&result);
        if result.is_err() {
            shared.counters.failures.add();
        }
        result
    }
}

impl Shared {
    /// Makes a call of the application, under observation.
    async fn call<R: Unary>(
        self: &Arc<Self>,
        request: R,
        plan: Plan,
        cancel: Option<&CancellationToken>,
    ) -> Result<R::Reply, Error> {
        self.counters.calls.add();
        let mut observed = self.observe::<R>(false);
        let span = observed.span();
        let result = self.admit(request, plan, cancel, &mut observed).instrument(span).await;
        observed.ends(&result);
        result
    }

    /// Makes a call that the client needs for itself, under observation. Returns when the attempt that was answered was
    /// sent, too.
    pub(crate) async fn own_call<R: Unary>(
        self: &Arc<Self>,
        request: R,
        plan: Plan,
        until: &Until<'_>,
    ) -> Result<(R::Reply, Moment), Error> {
        let mut observed = self.observe::<R>(true);
        let span = observed.span();
        let result = self.attempts(request, plan, until, &mut false, &mut observed).instrument(span).await;
        observed.ends(&result);
        result
    }

    /// Makes a call once there is a place for it.
    async fn admit<R: Unary>(
        self: &Arc<Self>,
        mut request: R,
        plan: Plan,
        cancel: Option<&CancellationToken>,
        observed: &mut Observed<'_>,
    ) -> Result<R::Reply, Error> {
        if self.options.monotonic_reads
            && let Some(Some(read)) = request.read_options()
            && (read.min_revision, read.revision) == (0, 0)
        {
            read.min_revision = self.seen.load(Ordering::Relaxed);
        }
        let bytes = request.encoded_len();
        if bytes as u64 > limits::REQUEST_BYTES_MAX {
            return Err(too_large(R::OPERATION, bytes));
        }
        let until = Until::new(Instant::now() + bounded(plan.timeout), cancel);
        let _place = self.place(R::OPERATION, bytes, &until).await?;
        let mut doubt = false;
        match self.attempts(request, plan, &until, &mut doubt, observed).await {
            Ok((reply, _)) => {
                self.saw(R::header(&reply).map_or(0, |header| header.revision));
                Ok(reply)
            }
            Err(error) if doubt => Err(error.in_doubt()),
            Err(error) => Err(error),
        }
    }

    /// Makes attempts until one succeeds or must be the last. Returns when that one was sent, too. `doubt` becomes true
    /// when an attempt may have been applied, or may yet be, and stays so unless a later one tells.
    async fn attempts<R: Unary>(
        self: &Arc<Self>,
        mut request: R,
        plan: Plan,
        until: &Until<'_>,
        doubt: &mut bool,
        observed: &mut Observed<'_>,
    ) -> Result<(R::Reply, Moment), Error> {
        let timeout = bounded(plan.timeout);
        let deadline = until.deadline;
        let mut under_session =
            plan.resend == Resend::IfNotApplied && self.options.sessions && request.session().is_some();
        let mut ticket: Option<Ticket> = None;
        let mut tried = Vec::new();
        let mut retries = 0;
        let mut last: Option<(Address, Failure)> = None;
        loop {
            if under_session && ticket.is_none() {
                ticket = self.ticket(R::OPERATION, until).await?;
                under_session = ticket.is_some();
                if let Some(session) = request.session() {
                    *session = ticket.as_ref().map(Ticket::call);
                }
            }
            let resend = if ticket.is_some() { Resend::Repeatable } else { plan.resend };
            let (target, another) = match self.choose_target(plan.route, &tried, until).await {
                Ok(chosen) => chosen,
                Err(Unchosen::Ended(ended)) => {
                    return Err(ended
                        .error(R::OPERATION, || self.spent(R::OPERATION, timeout, retries, last, plan.route, resend)));
                }
                Err(Unchosen::Foreign(message)) => {
                    return Err(Error::new(R::OPERATION, ErrorKind::WrongCluster, Outcome::NotApplied, message));
                }
            };
            let address = target.address.clone();
            // Without a retry left to be made, it is the last attempt and has all the time that is left.
            let attempt_until = match resend {
                Resend::Idempotent | Resend::Repeatable if another => until.sooner(Instant::now() + timeout / ATTEMPTS),
                _ => *until,
            };
            let sent = Moment::now();
            let attempt = observed.attempt(&address);
            let made = self.attempt(target, &request, &attempt_until, attempt.trace()).instrument(attempt.span()).await;
            attempt.ends(&made, resend);
            let failure = match made {
                Ok(reply) => {
                    if let Some(ticket) = &ticket {
                        ticket.confirm(sent);
                    }
                    return Ok((reply, sent));
                }
                Err(failure) => failure,
            };
            let redirected = self.note_failure(&address, &failure);
            *doubt |= failure.outcome(resend) == Outcome::Unknown;
            let mut decision = decide(&failure, resend);
            if let Some(used) = &ticket {
                match failure.code() {
                    Some(ErrorCode::SessionExpired) => {
                        self.sessions.expired(used);
                        if !*doubt {
                            ticket = None;
                            decision = Decision::Retry { elsewhere: false, at_least: Duration::ZERO };
                        }
                    }
                    // A new number acknowledges what has ended since: that may be the very room that was missing.
                    Some(ErrorCode::ResourceExhausted) if !*doubt => ticket = None,
                    // Only the store says these, and says them to every copy of the call.
                    Some(ErrorCode::LeaseNotFound | ErrorCode::LeaseExists) => *doubt = false,
                    _ => {}
                }
            }
            let Decision::Retry { elsewhere, at_least } = decision else {
                return Err(failure.into_error(R::OPERATION, resend, address.as_str()));
            };
            if until.is_cancelled() {
                let message = format!("the call was cancelled; at last: {}", failure.message());
                let outcome = failure.outcome(resend);
                return Err(Error::new(R::OPERATION, ErrorKind::Cancelled, outcome, message).at(address.as_str()));
            }
            let pause = {
                let mut state = self.state.lock();
                if !state.budget.withdraw(Instant::now(), self.counters.calls.get()) {
                    self.counters.budget_exhausted.add();
                    return Err(failure.into_error(R::OPERATION, resend, address.as_str()));
                }
                if redirected { Duration::ZERO } else { at_least.max(backoff(retries, &mut state.rng)) }
            };
            tracing::debug!(%address, cause = failure.message(), ?pause, "retrying");
            self.counters.retries.add();
            if *doubt {
                self.counters.repeats.add();
            }
            retries += 1;
            if elsewhere && !tried.contains(&address) {
                tried.push(address.clone());
            }
            last = Some((address, failure));
            if Instant::now() + pause >= deadline {
                return Err(self.spent(R::OPERATION, timeout, retries, last, plan.route, resend));
            }
            if !pause.is_zero()
                && let Err(ended @ (Ended::Closed | Ended::Cancelled)) =
                    self.wait(until, tokio::time::sleep(pause)).await
            {
                return Err(ended.error(R::OPERATION, || Error::closed(R::OPERATION)));
            }
        }
    }

    /// Waits until there is a node to ask.
    pub(crate) async fn choose(&self, route: Route, tried: &[Address], until: &Until<'_>) -> Result<Address, Unchosen> {
        self.choose_then(route, tried, until, |_, _, _| ()).await.map(|(address, ())| address)
    }

    /// Waits until there is a node to ask, and counts an attempt there as begun. Tells beside whether another one could
    /// follow.
    async fn choose_target(
        &self,
        route: Route,
        tried: &[Address],
        until: &Until<'_>,
    ) -> Result<(Target<'_>, bool), Unchosen> {
        let begin = |state: &mut State, address: &Address, now| {
            state.topology.begin(address);
            state.budget.affords_one(now, self.counters.calls.get())
        };
        let (address, another) = self.choose_then(route, tried, until, begin).await?;
        Ok((Target { shared: self, address, over: false }, another))
    }

    /// Chooses, and does `then` under the same lock.
    async fn choose_then<T>(
        &self,
        route: Route,
        tried: &[Address],
        until: &Until<'_>,
        then: impl Fn(&mut State, &Address, Instant) -> T,
    ) -> Result<(Address, T), Unchosen> {
        let mut asked_for_news = false;
        loop {
            // Created before looking, so that no change after the look is missed.
            let changed = self.changed.notified();
            let now = Instant::now();
            if now >= until.deadline {
                return Err(Unchosen::Ended(Ended::Deadline));
            }
            let look_again = {
                let state = &mut *self.state.lock();
                match state.topology.pick(route, tried, now, &mut state.rng) {
                    Pick::Node(address) => {
                        let result = then(state, &address, now);
                        return Ok((address, result));
                    }
                    Pick::Wait(look_again) => {
                        if let Some(foreign) = state.topology.estranged() {
                            return Err(Unchosen::Foreign(foreign.to_owned()));
                        }
                        look_again.map_or(until.deadline, |again| again.min(until.deadline))
                    }
                }
            };
            if !asked_for_news {
                asked_for_news = true;
                self.refresh.notify_one();
            }
            match self.wait(&until.sooner(look_again), changed).await {
                Ok(()) | Err(Ended::Deadline) => {}
                Err(ended) => return Err(Unchosen::Ended(ended)),
            }
        }
    }

    /// Makes the one attempt of a call that has no other. A node that is asked once needs no pipeline.
    async fn call_once<R: Unary>(
        &self,
        observed: &mut Observed<'_>,
        address: Address,
        request: R,
        until: &Until<'_>,
    ) -> Result<R::Reply, Error> {
        let _place = self.place(R::OPERATION, request.encoded_len(), until).await?;
        let attempt = observed.attempt(&address);
        let target = Target::begin(self, &address);
        let made = self.attempt_unary(target, request, until, attempt.trace()).instrument(attempt.span()).await;
        attempt.ends(&made, Resend::Idempotent);
        made.map_err(|failure| failure.into_error(R::OPERATION, Resend::Idempotent, address.as_str()))
    }

    /// Sends a request to one node, once, as a part of the span `trace`, by the pipeline of the connection if both sides
    /// have one. The rare way is boxed, so that the usual call is small.
    pub(crate) async fn attempt<R: Unary>(
        self: &Arc<Self>,
        target: Target<'_>,
        request: &R,
        until: &Until<'_>,
        trace: Option<v1::TraceContext>,
    ) -> Result<R::Reply, Failure> {
        if !self.options.pipelined {
            return self.attempt_unary(target, request.clone(), until, trace).boxed().await;
        }
        let started = Instant::now();
        let mut waiting = match self.submit(&target.address, request, until, started, trace.clone()).await? {
            Some(waiting) => waiting,
            None => return self.attempt_unary(target, request.clone(), until, trace).boxed().await,
        };
        let word = tokio::select! {
            biased;
            word = waiting.word() => word,
            () = until.cancelled() => {
                if waiting.withdraw() {
                    return Err(Failure::Cancelled { sent: false });
                }
                waiting.cancel();
                match tokio::time::timeout(CANCEL_PATIENCE, waiting.word()).await {
                    Ok(word) => word,
                    Err(_) => return Err(Failure::Cancelled { sent: true }),
                }
            }
        };
        match word {
            Word::Answer(reply) => {
                let reply = R::reply(reply).ok_or_else(pipeline::unreadable)?;
                target.answered(R::header(&reply), started.elapsed()).map(|()| reply)
            }
            Word::Failed(failure) => {
                self.judge(&target.address, &waiting.connection, waiting.heard, &failure).await;
                Err(failure)
            }
            Word::Unary => self.attempt_unary(target, request.clone(), until, trace).boxed().await,
        }
    }

    /// Puts a request into the pipeline of a connection; `None` if the node has none.
    async fn submit<R: Unary>(
        self: &Arc<Self>,
        address: &Address,
        request: &R,
        until: &Until<'_>,
        started: Instant,
        trace: Option<v1::TraceContext>,
    ) -> Result<Option<Waiting>, Failure> {
        let bytes = request.encoded_len();
        // A link that has ended meanwhile has a successor with the next connection. Another end says more of the node.
        for _ in 0..2 {
            let connection = self.connection(address, until, started).await?;
            let operation = request.clone().into_operation();
            let submission = Submission::new(operation, bytes, trace.clone());
            match Link::submit(self, address, connection, submission, until.deadline) {
                Ok(waiting) => return Ok(Some(waiting)),
                Err(Barred::Unary) => return Ok(None),
                Err(Barred::Over) => {}
            }
        }
        Err(Failure::NotSent(Cause::text("the node takes no operations")))
    }

    /// The connection to a node, made if there is none.
    async fn connection(
        &self,
        address: &Address,
        until: &Until<'_>,
        started: Instant,
    ) -> Result<Arc<Connection>, Failure> {
        if let Some(connection) = self.connections.ready(address) {
            return Ok(connection);
        }
        match self.wait(until, self.connections.get(address)).await {
            Ok(connected) => connected.map_err(Failure::NotSent),
            Err(ended) => Err(ended.failure(false, started.elapsed())),
        }
    }

    /// Sends a request to one node, once, by a call of its own.
    pub(crate) async fn attempt_unary<R: Unary>(
        &self,
        target: Target<'_>,
        request: R,
        until: &Until<'_>,
        trace: Option<v1::TraceContext>,
    ) -> Result<R::Reply, Failure> {
        let started = Instant::now();
        let connection = self.connection(&target.address, until, started).await?;
        let heard = connection.heard();
        let gate = Arc::new(Gate::default());
        let channel = GatedChannel { channel: connection.channel.clone(), gate: Arc::clone(&gate) };
        let exchange = exchange(channel, request, until.deadline, trace);
        let answer = tokio::select! {
            answer = exchange => answer,
            () = self.suspect_until(until.deadline) => {
                let after = until.deadline.saturating_duration_since(started);
                let failure = Failure::Silent { sent: !gate.close(), after };
                self.judge(&target.address, &connection, heard, &failure).await;
                return Err(failure);
            }
            () = self.closed.cancelled() => return Err(Failure::Closed { sent: !gate.close() }),
            () = until.cancelled() => return Err(Failure::Cancelled { sent: !gate.close() }),
        };
        match answer {
            Ok(reply) => target.answered(R::header(&reply), started.elapsed()).map(|()| reply),
            Err(status) => {
                let failure = classify(status, &gate, started.elapsed());
                if matches!(failure, Failure::NotSent(_) | Failure::Lost(_)) {
                    self.connections.discard(&target.address, &connection);
                }
                // The transport's own timer may have been faster.
                self.judge(&target.address, &connection, heard, &failure).await;
                Err(failure)
            }
        }
    }

    /// Gives a connection up on which nothing was heard since an attempt began, which is when `heard` is from, and ended
    /// silent.
    async fn judge(&self, address: &Address, connection: &Connection, heard: Heard, failure: &Failure) {
        let Failure::Silent { after, .. } = failure else { return };
        if *after < SUSPECT_AFTER {
            return;
        }
        // After a pause of this whole process, what has come meanwhile is read first.
        tokio::task::yield_now().await;
        if connection.heard() == heard {
            tracing::debug!(%address, ?after, "a silent connection is given up");
            self.connections.discard(address, connection);
        }
    }

    /// Takes note of an answer, and checks that it comes from this cluster.
    pub(crate) fn vouch(
        &self,
        address: &Address,
        header: Option<&v1::ResponseHeader>,
        latency: Duration,
    ) -> Result<(), Failure> {
        let header = header.copied().unwrap_or_default();
        let answered = self.state.lock().topology.answered(address, &header, latency);
        answered.map_err(|foreign| Failure::Foreign(foreign.0))
    }

    /// Ends at the deadline. Until then it asks for news of the cluster as long as an answer is overdue.
    async fn suspect_until(&self, deadline: Instant) {
        loop {
            let suspect_at = Instant::now() + SUSPECT_AFTER;
            if suspect_at >= deadline {
                return tokio::time::sleep_until(deadline).await;
            }
            tokio::time::sleep_until(suspect_at).await;
            self.refresh.notify_one();
        }
    }

    /// Takes note of what a failed attempt says of its node. True if it told of another leader.
    pub(crate) fn note_failure(&self, address: &Address, failure: &Failure) -> bool {
        let news = self.note(address, failure);
        if news {
            self.notice_leader();
        }
        news
    }

    fn note(&self, address: &Address, failure: &Failure) -> bool {
        let now = Instant::now();
        let state = &mut *self.state.lock();
        match failure {
            // That says more about the caller's deadline than about the node.
            Failure::Silent { after, .. } if *after < SUSPECT_AFTER => false,
            Failure::NotSent(_) | Failure::Lost(_) | Failure::Silent { .. } | Failure::Foreign(_) => {
                state.topology.failed(address, failure.message(), now, &mut state.rng);
                if matches!(failure, Failure::Foreign(_)) {
                    state.topology.foreign(address);
                }
                self.refresh.notify_one();
                false
            }
            Failure::Closed { .. } | Failure::Cancelled { .. } => false,
            Failure::Refused(status) => self.note_refusal(address, status, state, now),
        }
    }

    /// The error of a call whose budget is spent between two attempts. What went wrong at last is the better reason:
    /// that time is up says nothing of what to do.
    fn spent(
        &self,
        operation: &'static str,
        timeout: Duration,
        retries: u32,
        last: Option<(Address, Failure)>,
        route: Route,
        resend: Resend,
    ) -> Error {
        match last {
            Some((address, failure)) => {
                let error = failure.into_error(operation, resend, address.as_str());
                error.after(format!("{timeout:?} and {retries} retries"))
            }
            None => self.unserved(operation, route, timeout),
        }
    }

    /// The error of a call for which no node was found in time.
    pub(crate) fn unserved(&self, operation: &'static str, route: Route, timeout: Duration) -> Error {
        let what = match route {
            Route::Leader => "no leader became known",
            Route::PreferLeader | Route::Any => "no node could be asked",
        };
        let problems = self.state.lock().topology.problems();
        let why = if problems.is_empty() { String::new() } else { format!(": {}", problems.join("; ")) };
        let message = format!("{what} within {timeout:?}{why}");
        Error::new(operation, ErrorKind::Unavailable, Outcome::NotApplied, message)
    }

    fn note_refusal(&self, address: &Address, status: &DetailedStatus, state: &mut State, now: Instant) -> bool {
        match status.code() {
            Some(ErrorCode::NotLeader) => {
                self.counters.redirects.add();
                state.topology.denied(address, now);
            }
            Some(ErrorCode::Unavailable | ErrorCode::Internal | ErrorCode::LeadershipLost) => {
                state.topology.denied(address, now);
                state.topology.failed(address, &status.message, now, &mut state.rng);
            }
            _ => return false,
        }
        let news = status.detail.leader.clone().is_some_and(|hint| state.topology.hint(Leader::from(hint), now));
        if news {
            self.changed.notify_waiters();
        } else {
            self.refresh.notify_one();
        }
        news
    }
}

/// Sends the request and waits for the answer.
async fn exchange<R: Unary>(
    channel: GatedChannel,
    request: R,
    deadline: Instant,
    trace: Option<v1::TraceContext>,
) -> Result<R::Reply, tonic::Status> {
    let mut grpc = Grpc::new(channel).max_decoding_message_size(REPLY_BYTES_MAX);
    grpc.ready().await.map_err(|error| tonic::Status::unavailable(Cause::of(error).message))?;
    let mut request = tonic::Request::new(request);
    request.set_timeout(deadline.saturating_duration_since(Instant::now()));
    if let Some(header) = trace.and_then(|trace| trace.to_traceparent()?.parse().ok()) {
        request.metadata_mut().insert(TRACEPARENT, header);
    }
    let codec = ProstCodec::<R, R::Reply>::default();
    let reply = grpc.unary(request, PathAndQuery::from_static(R::PATH), codec).await?;
    Ok(reply.into_inner())
}

/// What a status says for certain.
fn classify(status: tonic::Status, gate: &Gate, after: Duration) -> Failure {
    if let Some(detailed) = DetailedStatus::from_status(&status) {
        return Failure::Refused(Box::new(detailed));
    }
    let sent = !gate.close();
    if status.code() == tonic::Code::DeadlineExceeded || is_timeout(&status) {
        return Failure::Silent { sent, after };
    }
    if !sent {
        return Failure::NotSent(Cause::of_status(status));
    }
    broken(status)
}

/// What the end of a stream says for certain.
pub(crate) fn stream_failure(status: tonic::Status) -> Failure {
    match DetailedStatus::from_status(&status) {
        Some(detailed) => Failure::Refused(Box::new(detailed)),
        None => broken(status),
    }
}

/// What a status says that no d-engine server wrote, of a request that was sent.
fn broken(status: tonic::Status) -> Failure {
    match status.code() {
        // Nobody executes a method he does not have.
        tonic::Code::Unimplemented => {
            let detail = v1::ErrorDetail {
                code: ErrorCode::Unsupported.number(),
                outcome: v1::Outcome::NotApplied as i32,
                ..v1::ErrorDetail::default()
            };
            Failure::Refused(Box::new(DetailedStatus { message: status.message().to_owned(), detail }))
        }
        _ => Failure::Lost(Cause::of_status(status)),
    }
}

/// Whether the transport's own timer, set to the attempt's deadline too, ended the attempt.
fn is_timeout(status: &tonic::Status) -> bool {
    let mut next = std::error::Error::source(status);
    while let Some(source) = next {
        if source.is::<tonic::TimeoutExpired>() {
            return true;
        }
        next = source.source();
    }
    // The timer of a server's transport comes as text only.
    status.code() == tonic::Code::Cancelled && status.message() == "Timeout expired"
}

/// The node of one attempt, which counts as in flight until this is dropped.
pub(crate) struct Target<'a> {
    shared: &'a Shared,
    address: Address,
    over: bool,
}

impl<'a> Target<'a> {
    pub(crate) fn begin(shared: &'a Shared, address: &Address) -> Self {
        shared.state.lock().topology.begin(address);
        Self { shared, address: address.clone(), over: false }
    }

    /// Takes note of the answer, as [`Shared::vouch`] does, and of the end of the attempt.
    fn answered(mut self, header: Option<&v1::ResponseHeader>, latency: Duration) -> Result<(), Failure> {
        self.over = true;
        let header = header.copied().unwrap_or_default();
        let mut state = self.shared.state.lock();
        state.topology.end(&self.address);
        state.topology.answered(&self.address, &header, latency).map_err(|foreign| Failure::Foreign(foreign.0))
    }
}

impl Drop for Target<'_> {
    fn drop(&mut self) {
        if !self.over {
            self.shared.state.lock().topology.end(&self.address);
        }
    }
}

/// The error of a request that every server refuses. One that nobody reads would end the stream of all.
fn too_large(operation: &'static str, bytes: usize) -> Error {
    let max = limits::REQUEST_BYTES_MAX;
    let message = format!("the request has {bytes} bytes, the limit is {max} (request_bytes_max)");
    Error::new(operation, ErrorKind::ResourceExhausted, Outcome::NotApplied, message)
}
