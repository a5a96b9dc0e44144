//! Keeps one lease alive, and says how sure that is.
//!
//! What a holder may believe hangs on one moment: when the last renewal that was confirmed had been *sent*. The server
//! counts from later, so the lease lives at least for its time to live from then on.
//!
//! ```text
//!   sent      1/3            2/3            1
//!    |---------|--------------|-------------|------> time since the last confirmed renewal was sent
//!    |  Alive  | renews       | Suspect     | Lost, for good
//! ```
//!
//! Timers only renew and wake those who wait. The state is read off a clock that counts suspended time, whenever it is
//! asked for: a process that was stopped for too long sees `Lost` first thing, before any timer runs.

use std::future::IntoFuture;
use std::sync::Arc;
use std::time::Duration;

use d_engine_proto::{DetailedStatus, ErrorCode, LeaseId, v1};
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, Stream, stream};
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic_prost::ProstCodec;
use tracing::Instrument;

use crate::call::Unchosen;
use crate::client::{Client, Shared};
use crate::clock::Moment;
use crate::error::Error;
use crate::lease::LeaseRevokeResponse;
use crate::observe::Notice;
use crate::retry::{Cause, Decision, Failure, Resend, backoff, decide};
use crate::topology::{Address, Route};
use crate::until::Ended;

/// Nobody is given less time than this for an answer.
const PATIENCE_MIN: Duration = Duration::from_millis(25);

/// How sure it is that a lease lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LeaseState {
    /// It lives, and is renewed in time.
    Alive,
    /// It lives, but its renewal is overdue: two thirds of its time to live passed without a confirmed one.
    Suspect,
    /// It may have ended, or has: its time to live passed without a confirmed renewal, the server does not know it, or
    /// nobody renews it any longer. Final.
    Lost,
}

/// What is known of the lease.
#[derive(Debug)]
struct Life {
    ttl: Duration,
    /// When the last confirmed renewal had been sent. Invariant: never goes back.
    confirmed: Moment,
    /// Invariant: once true, always true.
    lost: bool,
}

impl Life {
    /// The state at `now`.
    fn at(&mut self, now: Moment) -> LeaseState {
        let age = now.since(self.confirmed);
        self.lost |= age >= self.ttl;
        match () {
            () if self.lost => LeaseState::Lost,
            () if age >= self.ttl * 2 / 3 => LeaseState::Suspect,
            () => LeaseState::Alive,
        }
    }

    /// Takes note at `now` of the confirmation of a renewal. One that comes too late changes nothing: somebody may have
    /// been told that the lease is lost.
    fn confirm(&mut self, sent: Moment, ttl: Duration, now: Moment) {
        if self.at(now) != LeaseState::Lost && sent > self.confirmed {
            self.confirmed = sent;
            self.ttl = ttl;
        }
    }

    /// Time from `now` until the state changes by itself.
    fn until_change(&mut self, now: Moment) -> Option<Duration> {
        let end = match self.at(now) {
            LeaseState::Alive => self.ttl * 2 / 3,
            LeaseState::Suspect => self.ttl,
            LeaseState::Lost => return None,
        };
        Some(end.saturating_sub(now.since(self.confirmed)))
    }
}

/// A life that others watch.
#[derive(Debug)]
struct Pulse {
    life: Mutex<Life>,
    states: watch::Sender<LeaseState>,
}

impl Pulse {
    fn new(ttl: Duration, confirmed: Moment) -> Self {
        let life = Mutex::new(Life { ttl, confirmed, lost: false });
        let pulse = Self { life, states: watch::Sender::new(LeaseState::Alive) };
        pulse.read(|_, _| ());
        pulse
    }

    /// Reads or changes the life, and tells the watchers what state it has then.
    fn read<T>(&self, act: impl FnOnce(&mut Life, Moment) -> T) -> T {
        let mut life = self.life.lock();
        let now = Moment::now();
        let result = act(&mut life, now);
        let state = life.at(now);
        self.states.send_if_modified(|published| std::mem::replace(published, state) != state);
        result
    }

    fn state(&self) -> LeaseState {
        self.read(|life, now| life.at(now))
    }

    fn lose(&self) {
        self.read(|life, _| life.lost = true);
    }
}

/// Keeps a lease alive until it is dropped.
///
/// It renews at a third of the time to live, through whoever leads. The lease counts as lost once its time to live has
/// passed since the last confirmed renewal was sent; a lost lease is never granted again, since its keys are gone: what
/// it stood for must be claimed anew.
///
/// Dropping it stops the renewals, so that the lease ends by itself; [`revoke`](Self::revoke) ends it at once. It
/// counts as a clone of its client, whose [`close`](Client::close) loses the lease.
#[derive(Debug)]
pub struct LeaseKeeper {
    client: Client,
    lease: LeaseId,
    pulse: Arc<Pulse>,
    renewals: AbortHandle,
}

impl LeaseKeeper {
    /// Keeps a lease that lives for `ttl` from `confirmed` on.
    fn start(client: Client, lease: LeaseId, ttl: Duration, confirmed: Moment) -> Self {
        let pulse = Arc::new(Pulse::new(ttl, confirmed));
        let span = tracing::debug_span!("d_engine_lease", %lease);
        let work = keep(Arc::clone(client.shared()), lease, Arc::clone(&pulse)).instrument(span);
        let renewals = client.shared().tasks.spawn(work).abort_handle();
        Self { client, lease, pulse, renewals }
    }

    /// The lease.
    #[must_use]
    pub fn id(&self) -> LeaseId {
        self.lease
    }

    /// For how long the lease lives after a renewal.
    #[must_use]
    pub fn ttl(&self) -> Duration {
        self.pulse.life.lock().ttl
    }

    /// The state at this moment, by a look at the clock.
    #[must_use]
    pub fn state(&self) -> LeaseState {
        self.pulse.state()
    }

    /// Whether the lease lives at this moment, by a look at the clock: alive or suspect.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.state() != LeaseState::Lost
    }

    /// For how long the lease lives at least, from this moment on, if no further renewal is confirmed.
    #[must_use]
    pub fn remaining(&self) -> Duration {
        self.pulse.read(|life, now| match life.at(now) {
            LeaseState::Lost => Duration::ZERO,
            LeaseState::Alive | LeaseState::Suspect => life.ttl.saturating_sub(now.since(life.confirmed)),
        })
    }

    /// The states as they change, beginning with the current one. A process that was stopped sees the change only once
    /// its timers run again; [`state`](Self::state) is never late.
    #[must_use]
    pub fn states(&self) -> watch::Receiver<LeaseState> {
        self.pulse.states.subscribe()
    }

    /// Ends when the lease is lost. Dropping the future changes nothing.
    pub async fn lost(&self) {
        // It fails only without a sender, and that is here.
        let _ = self.states().wait_for(|state| *state == LeaseState::Lost).await;
    }

    /// Ends the lease and deletes its keys. It counts as lost from this call on, whatever comes of it.
    ///
    /// # Errors
    /// As [`Client::revoke_lease`]: it may be called again, or the lease ends by itself.
    pub async fn revoke(&self) -> Result<LeaseRevokeResponse, Error> {
        self.renewals.abort();
        self.pulse.lose();
        self.client.revoke_lease(self.lease).await
    }
}

impl Drop for LeaseKeeper {
    fn drop(&mut self) {
        self.renewals.abort();
    }
}

/// A lease to be granted and kept alive; await it for its [`LeaseKeeper`].
#[derive(Clone, Debug)]
#[must_use = "a request is sent when awaited"]
pub struct KeepLease {
    client: Client,
    ttl: Duration,
    lease: LeaseId,
    timeout: Duration,
}

impl KeepLease {
    /// The id it shall have, instead of one that was never given.
    pub fn id(mut self, lease: LeaseId) -> Self {
        self.lease = lease;
        self
    }

    /// Budget of the grant, all attempts included.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }
}

impl IntoFuture for KeepLease {
    type Output = Result<LeaseKeeper, Error>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        async move {
            // A grant that was sent twice was applied at its first arrival, so the first sending counts.
            let sent = Moment::now();
            let granted = self.client.grant_lease(self.ttl).id(self.lease).timeout(self.timeout).await?;
            Ok(LeaseKeeper::start(self.client.uncancelled(), granted.lease, granted.ttl, sent))
        }
        .boxed()
    }
}

impl Client {
    /// Opens a lease and keeps it alive for as long as the answer is held.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// use std::time::Duration;
    ///
    /// let keeper = client.keep_lease(Duration::from_secs(10)).await?;
    /// client.put("services/api/node1", "10.0.0.1:8080").lease(keeper.id()).await?;
    /// tokio::select! {
    ///     () = keeper.lost() => println!("out of touch for too long: the registration is gone"),
    ///     () = std::future::ready(()) => println!("the work is done, the registration ends with the keeper"),
    /// }
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// As [`grant_lease`](Self::grant_lease).
    pub fn keep_lease(&self, ttl: Duration) -> KeepLease {
        KeepLease { client: self.clone(), ttl, lease: LeaseId(0), timeout: self.options().call_timeout }
    }
}

/// Renews the lease until it is lost.
async fn keep(shared: Arc<Shared>, lease: LeaseId, pulse: Arc<Pulse>) {
    tokio::select! {
        () = time_passes(&pulse) => {}
        () = renew(&shared, lease, &pulse) => {}
        () = shared.closed.cancelled() => {}
    }
    pulse.lose();
    shared.notice(&Notice::LeaseLost(lease));
}

/// Tells the watchers what time does to the lease; ends when it is lost.
async fn time_passes(pulse: &Pulse) {
    while let Some(rest) = pulse.read(Life::until_change) {
        tokio::time::sleep(rest).await;
    }
}

/// Renews through one leader after the other; ends when the server says that there is no such lease.
async fn renew(shared: &Shared, lease: LeaseId, pulse: &Pulse) {
    let mut failures = 0;
    loop {
        // Time ends the whole, so the choice needs no deadline of its own.
        let far = Instant::now() + Duration::from_secs(60);
        let (redirected, at_least) = match shared.choose(Route::Leader, &[], &far.into()).await {
            Err(Unchosen::Ended(Ended::Closed | Ended::Cancelled)) => return,
            Err(Unchosen::Ended(Ended::Deadline) | Unchosen::Foreign(_)) => (false, Duration::ZERO),
            Ok(address) => {
                let failure = match renew_through(shared, &address, lease, pulse, &mut failures).await {
                    Ok(Gone) => return,
                    Err(failure) => failure,
                };
                tracing::debug!(%address, cause = failure.message(), "a renewal failed");
                let at_least = match decide(&failure, Resend::Idempotent) {
                    Decision::Retry { at_least, .. } => at_least,
                    Decision::GiveUp => Duration::ZERO,
                };
                (shared.note_failure(&address, &failure), at_least)
            }
        };
        if !redirected {
            let pause = at_least.max(backoff(failures, &mut shared.state.lock().rng));
            tokio::time::sleep(pause.min(pulse.read(|life, _| life.ttl) / 8)).await;
        }
        failures += 1;
    }
}

/// The server does not know the lease.
struct Gone;

/// Opens a stream of renewals.
async fn open(
    channel: Channel,
    requests: impl Stream<Item = v1::LeaseRenewRequest> + Send + 'static,
) -> Result<tonic::Streaming<v1::LeaseRenewResponse>, tonic::Status> {
    let mut grpc = Grpc::new(channel);
    grpc.ready().await.map_err(|error| tonic::Status::unavailable(Cause::of(error).message))?;
    let path = PathAndQuery::from_static("/d_engine.v1.Lease/KeepAlive");
    let codec = ProstCodec::<v1::LeaseRenewRequest, v1::LeaseRenewResponse>::default();
    grpc.streaming(tonic::Request::new(requests), path, codec).await.map(tonic::Response::into_inner)
}

/// Renews over one stream to one node, until that fails.
async fn renew_through(
    shared: &Shared,
    address: &Address,
    lease: LeaseId,
    pulse: &Pulse,
    failures: &mut u32,
) -> Result<Gone, Failure> {
    let connection = shared.connections.get(address).await.map_err(Failure::NotSent)?;
    // One renewal is under way at a time.
    let (renewals, mut queue) = mpsc::channel(1);
    let requests = stream::poll_fn(move |context| queue.poll_recv(context));
    let broken = |status: tonic::Status| match DetailedStatus::from_status(&status) {
        Some(detailed) => Failure::Refused(Box::new(detailed)),
        None => {
            shared.connections.discard(address, &connection);
            Failure::Lost(Cause::of_status(status))
        }
    };
    let ended = || Failure::Lost(Cause::text("the server ended the stream of renewals"));

    let mut opening = std::pin::pin!(open(connection.channel.clone(), requests));
    let mut answers = None;
    loop {
        let (ttl, due) = pulse.read(|life, now| (life.ttl, (life.ttl / 3).saturating_sub(now.since(life.confirmed))));
        tokio::time::sleep(due).await;
        let (sent, started) = (Moment::now(), Instant::now());
        renewals.try_send(v1::LeaseRenewRequest { lease: lease.get() }).map_err(|_| ended())?;
        let exchange = async {
            // A server may answer the opening only once it has something to say.
            let answers = match &mut answers {
                Some(answers) => answers,
                None => answers.insert((&mut opening).await?),
            };
            answers.message().await
        };
        // A leader that is slow gets more time, one that is gone costs little.
        let patience = (ttl / 6 * (1 << (*failures).min(2))).max(PATIENCE_MIN);
        let answer = match tokio::time::timeout(patience, exchange).await {
            Ok(Ok(Some(answer))) => answer,
            Ok(Ok(None)) => return Err(ended()),
            Ok(Err(status)) => match broken(status) {
                Failure::Refused(status) if status.code() == Some(ErrorCode::LeaseNotFound) => return Ok(Gone),
                failure => return Err(failure),
            },
            Err(_) => return Err(Failure::Silent { sent: true, after: started.elapsed() }),
        };
        shared.vouch(address, answer.header.as_ref(), started.elapsed())?;
        if answer.ttl_ms == 0 {
            return Ok(Gone);
        }
        *failures = 0;
        pulse.read(|life, now| life.confirm(sent, Duration::from_millis(answer.ttl_ms), now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_millis(900);

    fn life() -> Life {
        Life { ttl: TTL, confirmed: at(0), lost: false }
    }

    fn at(ms: u64) -> Moment {
        Moment::default() + Duration::from_millis(1000 + ms)
    }

    #[test]
    fn a_lease_is_suspect_after_two_thirds_and_lost_after_all_of_its_time() {
        let mut life = life();
        let states = [0, 599, 600, 899, 900].map(|ms| life.at(at(ms)));
        use LeaseState::{Alive, Lost, Suspect};
        assert_eq!(states, [Alive, Alive, Suspect, Suspect, Lost]);
        assert_eq!(life.at(at(0)), Lost, "for good");
    }

    #[test]
    fn a_renewal_counts_from_its_sending() {
        let mut life = life();
        life.confirm(at(300), TTL, at(850));
        assert_eq!(life.at(at(899)), LeaseState::Alive);
        assert_eq!(life.at(at(900)), LeaseState::Suspect);
        life.confirm(at(200), TTL, at(901));
        assert_eq!(life.at(at(1199)), LeaseState::Suspect, "an older one does not take time away");
        assert_eq!(life.at(at(1200)), LeaseState::Lost);
    }

    /// The process is stopped after it sent a renewal, and resumes after the lease may have ended: the confirmation that
    /// waits for it must not bring the lease back, as its holder may have looked already.
    #[test]
    fn a_confirmation_that_comes_after_the_end_does_not_bring_the_lease_back() {
        let mut life = life();
        life.confirm(at(899), TTL, at(900));
        assert_eq!(life.at(at(900)), LeaseState::Lost);
    }

    #[test]
    fn the_next_change_is_foreseen() {
        let mut life = life();
        assert_eq!(life.until_change(at(100)), Some(Duration::from_millis(500)));
        assert_eq!(life.until_change(at(700)), Some(Duration::from_millis(200)));
        assert_eq!(life.until_change(at(900)), None);
    }

    #[tokio::test]
    async fn watchers_see_a_state_that_was_only_asked_for() {
        let pulse = Pulse::new(TTL, Moment::now());
        let states = pulse.states.subscribe();
        assert_eq!((pulse.state(), *states.borrow()), (LeaseState::Alive, LeaseState::Alive));
        pulse.life.lock().confirmed = Moment::default();
        assert_eq!((pulse.state(), *states.borrow()), (LeaseState::Lost, LeaseState::Lost));
    }
}
