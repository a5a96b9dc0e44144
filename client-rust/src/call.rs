//! One call: attempts within one deadline, each to the node that the topology picks.

use std::sync::Arc;
use std::time::Duration;

use d_engine_proto::{DetailedStatus, ErrorCode, TRACEPARENT, limits, v1};
use tokio::time::Instant;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic_prost::ProstCodec;
use tracing::Instrument;

use crate::client::{Client, Shared};
use crate::clock::Moment;
use crate::cluster::Leader;
use crate::error::{Error, ErrorKind, Outcome};
use crate::gate::{Gate, GatedChannel};
use crate::namespace::Leave as _;
use crate::observe::Observed;
use crate::options::bounded;
use crate::retry::{Cause, Decision, Failure, Resend, backoff, decide};
use crate::session::Ticket;
use crate::topology::{Address, Pick, Route};
use crate::wire::Unary;

/// Bytes of an answer; what is larger is refused instead of filling the memory. As much as generated stubs of every
/// language accept, with a margin for what an answer has besides keys and values.
pub(crate) const REPLY_BYTES_MAX: usize = 4 << 20;
const _: () = assert!(limits::ANSWER_BYTES_MAX + (64 << 10) <= REPLY_BYTES_MAX as u64);
/// An attempt that takes longer makes the client ask whether somebody else leads by now. A node is not backed off for
/// having less time than this.
const SUSPECT_AFTER: Duration = Duration::from_millis(300);
/// An attempt that can be repeated gets this part of the call's timeout, so that others get a chance if its node is
/// silent.
const ATTEMPTS: u32 = 4;

/// How a call is to be served.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) route: Route,
    pub(crate) resend: Resend,
    pub(crate) timeout: Duration,
}

/// Why no node could be chosen.
pub(crate) enum Unchosen {
    Deadline,
    Closed,
    /// Whoever answers belongs to another cluster.
    Foreign(String),
}

impl Client {
    /// Makes a call, as often as it takes and the deadline allows.
    pub(crate) async fn call<R: Unary>(&self, mut request: R, plan: Plan) -> Result<R::Reply, Error> {
        request.enter(self.space()).map_err(|error| Error::invalid(R::OPERATION, error.to_string()))?;
        let shared = self.shared();
        shared.counters.calls.add();
        shared.state.lock().budget.deposit();
        match shared.call(request, plan, false).await {
            Ok((mut reply, _)) => {
                reply.leave(self.space());
                Ok(reply)
            }
            Err(error) => {
                shared.counters.failures.add();
                if error.outcome() == Outcome::Unknown {
                    shared.counters.unknown_outcomes.add();
                }
                Err(error)
            }
        }
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
        let mut observed = shared.observe::<R>(false);
        let span = observed.span();
        let deadline = Instant::now() + bounded(timeout);
        let made = shared.observed_attempt(&mut observed, &address, request, Resend::Idempotent, deadline);
        let result = made.instrument(span).await.map_err(|failure| {
            shared.counters.failures.add();
            failure.into_error(R::OPERATION, Resend::Idempotent, address.as_str())
        });
        observed.ends(&result);
        result
    }
}

impl Shared {
    /// Makes a call, under observation; `internal` if the client needs it for itself. Returns when the attempt that was
    /// answered was sent, too.
    pub(crate) async fn call<R: Unary>(
        self: &Arc<Self>,
        request: R,
        plan: Plan,
        internal: bool,
    ) -> Result<(R::Reply, Moment), Error> {
        let mut observed = self.observe::<R>(internal);
        let (span, mut doubt) = (observed.span(), false);
        let result = self.attempts(request, plan, &mut doubt, &mut observed).instrument(span).await;
        let result = result.map_err(|error| if doubt { error.in_doubt() } else { error });
        observed.ends(&result);
        result
    }

    /// Makes attempts until one succeeds or must be the last. Returns when that one was sent, too. `doubt` becomes true
    /// when an attempt may have been applied, or may yet be, and stays so unless a later one tells.
    async fn attempts<R: Unary>(
        self: &Arc<Self>,
        mut request: R,
        plan: Plan,
        doubt: &mut bool,
        observed: &mut Observed<'_>,
    ) -> Result<(R::Reply, Moment), Error> {
        let timeout = bounded(plan.timeout);
        let deadline = Instant::now() + timeout;
        let mut under_session =
            plan.resend == Resend::IfNotApplied && self.options.sessions && request.session().is_some();
        let mut ticket: Option<Ticket> = None;
        let mut tried = Vec::new();
        let mut retries = 0;
        let mut last: Option<(Address, Failure)> = None;
        loop {
            if under_session && ticket.is_none() {
                ticket = self.ticket(R::OPERATION, deadline).await?;
                under_session = ticket.is_some();
                if let Some(session) = request.session() {
                    *session = ticket.as_ref().map(Ticket::call);
                }
            }
            let resend = if ticket.is_some() { Resend::Repeatable } else { plan.resend };
            let address = match self.choose(plan.route, &tried, deadline).await {
                Ok(address) => address,
                Err(Unchosen::Closed) => return Err(Error::closed(R::OPERATION)),
                Err(Unchosen::Deadline) => {
                    return Err(self.spent(R::OPERATION, timeout, retries, last, plan.route, resend));
                }
                Err(Unchosen::Foreign(message)) => {
                    return Err(Error::new(R::OPERATION, ErrorKind::WrongCluster, Outcome::NotApplied, message));
                }
            };
            let attempt_deadline = match resend {
                Resend::IfNotApplied => deadline,
                Resend::Idempotent | Resend::Repeatable => self.share(timeout, deadline),
            };
            let sent = Moment::now();
            let made = self.observed_attempt(observed, &address, request.clone(), resend, attempt_deadline);
            let failure = match made.await {
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
            let pause = {
                let mut state = self.state.lock();
                if !state.budget.withdraw(Instant::now()) {
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
            if !pause.is_zero() {
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = self.closed.cancelled() => return Err(Error::closed(R::OPERATION)),
                }
            }
        }
    }

    /// Until when an attempt may last after which another one is possible. Without a retry left to be made, it is the
    /// last one and has all the time that is left.
    fn share(&self, timeout: Duration, deadline: Instant) -> Instant {
        let now = Instant::now();
        let another = self.state.lock().budget.affords_one(now);
        if another { deadline.min(now + timeout / ATTEMPTS) } else { deadline }
    }

    /// Waits until there is a node to ask.
    pub(crate) async fn choose(&self, route: Route, tried: &[Address], deadline: Instant) -> Result<Address, Unchosen> {
        let mut asked_for_news = false;
        loop {
            // Created before looking, so that no change after the look is missed.
            let changed = self.changed.notified();
            let now = Instant::now();
            if self.closed.is_cancelled() {
                return Err(Unchosen::Closed);
            }
            if now >= deadline {
                return Err(Unchosen::Deadline);
            }
            let until = {
                let state = &mut *self.state.lock();
                match state.topology.pick(route, tried, now, &mut state.rng) {
                    Pick::Node(address) => return Ok(address),
                    Pick::Wait(until) => {
                        if let Some(foreign) = state.topology.estranged() {
                            return Err(Unchosen::Foreign(foreign.to_owned()));
                        }
                        until.map_or(deadline, |until| until.min(deadline))
                    }
                }
            };
            if !asked_for_news {
                asked_for_news = true;
                self.refresh.notify_one();
            }
            tokio::select! {
                () = changed => {}
                () = tokio::time::sleep_until(until) => {}
                () = self.closed.cancelled() => return Err(Unchosen::Closed),
            }
        }
    }

    async fn observed_attempt<R: Unary>(
        &self,
        observed: &mut Observed<'_>,
        address: &Address,
        request: R,
        resend: Resend,
        deadline: Instant,
    ) -> Result<R::Reply, Failure> {
        let attempt = observed.attempt(address);
        let made = self.attempt(address, request, deadline, attempt.trace()).instrument(attempt.span()).await;
        attempt.ends(&made, resend);
        made
    }

    /// Sends a request to one node, once, as a part of the span `trace`.
    pub(crate) async fn attempt<R: Unary>(
        &self,
        address: &Address,
        request: R,
        deadline: Instant,
        trace: Option<v1::TraceContext>,
    ) -> Result<R::Reply, Failure> {
        let started = Instant::now();
        let _in_flight = InFlight::begin(self, address);
        let connection = tokio::select! {
            connected = self.connections.get(address) => connected.map_err(Failure::NotSent)?,
            () = tokio::time::sleep_until(deadline) => {
                return Err(Failure::Silent { sent: false, after: started.elapsed() });
            }
            () = self.closed.cancelled() => return Err(Failure::Closed { sent: false }),
        };

        let gate = Arc::new(Gate::default());
        let channel = GatedChannel { channel: connection.channel.clone(), gate: Arc::clone(&gate) };
        let exchange = exchange(channel, request, deadline, trace);
        let answer = tokio::select! {
            answer = exchange => answer,
            () = self.suspect_until(deadline) => {
                return Err(Failure::Silent { sent: !gate.close(), after: started.elapsed() });
            }
            () = self.closed.cancelled() => return Err(Failure::Closed { sent: !gate.close() }),
        };
        match answer {
            Ok(reply) => self.vouch(address, R::header(&reply), started.elapsed()).map(|()| reply),
            Err(status) => {
                let failure = classify(status, &gate, started.elapsed());
                if matches!(failure, Failure::NotSent(_) | Failure::Lost(_)) {
                    self.connections.discard(address, &connection);
                }
                Err(failure)
            }
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
            Failure::Closed { .. } => false,
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

    fn note_refusal(
        &self,
        address: &Address,
        status: &DetailedStatus,
        state: &mut crate::client::State,
        now: Instant,
    ) -> bool {
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

/// Counts an attempt as in flight until it ends, also by being dropped.
struct InFlight<'a> {
    shared: &'a Shared,
    address: &'a Address,
}

impl<'a> InFlight<'a> {
    fn begin(shared: &'a Shared, address: &'a Address) -> Self {
        shared.state.lock().topology.begin(address);
        Self { shared, address }
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.shared.state.lock().topology.end(self.address);
    }
}
