//! The client's session: what lets a write be sent until it is answered, and be applied once.
//!
//! The servers remember what they answered to each number of a session, so the same bytes under the same number are
//! answered again, not applied again. A session is registered by the first write that needs one. It ends when it is not
//! used for its time to live; then the next write registers another, and calls under the old one end as they may.
//!
//! What must hold:
//! - A number stands for one call and its bytes, for good. It is in flight until that call has ended: answered, failed,
//!   out of time, or dropped.
//! - A call acknowledges everything below the lowest number in flight. From its arrival on, no late copy of an
//!   acknowledged call is applied.
//! - A session is relied on for its time to live from the *sending* of the last call that was answered: the servers
//!   count from later.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use d_engine_proto::{SessionId, limits, v1};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::call::Plan;
use crate::client::Shared;
use crate::clock::Moment;
use crate::error::{Error, ErrorKind, Outcome};
use crate::observe::Notice;
use crate::retry::Resend;
use crate::topology::Route;
use crate::until::Until;

/// How long servers that know no sessions are not asked for one again.
const UNSUPPORTED_FOR: Duration = Duration::from_secs(60);

/// The sessions of a client: one that new calls use, and perhaps older ones that live on in the calls under them.
#[derive(Default)]
pub(crate) struct Sessions {
    current: Mutex<Current>,
    /// Held by whoever registers a session; the others wait for it.
    registering: tokio::sync::Mutex<()>,
}

#[derive(Clone, Default)]
enum Current {
    #[default]
    None,
    Session(Arc<Session>),
    /// The servers know none, and are asked again from then on.
    Unsupported(Instant),
}

/// One session.
#[derive(Debug)]
pub(crate) struct Session {
    id: SessionId,
    ttl: Duration,
    flight: Mutex<Flight>,
    /// A number can be used again.
    room: Notify,
}

/// The numbers of a session.
#[derive(Debug)]
struct Flight {
    /// The next number to use. Invariant: greater than all in flight.
    next: u64,
    in_flight: BTreeSet<u64>,
    /// When the last call that was answered had been sent.
    confirmed: Moment,
    /// No further number is given out.
    retired: bool,
}

impl Flight {
    fn new(confirmed: Moment) -> Self {
        Self { next: 1, in_flight: BTreeSet::new(), confirmed, retired: false }
    }

    /// Everything up to it has ended.
    fn acknowledged_through(&self) -> u64 {
        self.in_flight.first().copied().unwrap_or(self.next) - 1
    }

    /// Takes the next number, and what is acknowledged now; `None` if the window is full.
    fn begin(&mut self) -> Option<(u64, u64)> {
        let sequence = self.next;
        if sequence - self.acknowledged_through() > limits::SESSION_WINDOW_CALLS {
            return None;
        }
        self.next += 1;
        self.in_flight.insert(sequence);
        Some((sequence, self.acknowledged_through()))
    }

    /// Takes note that the call with this number has ended. Returns by how much the window moved on.
    fn end(&mut self, sequence: u64) -> u64 {
        let before = self.acknowledged_through();
        self.in_flight.remove(&sequence);
        self.acknowledged_through() - before
    }
}

/// What a session says to a call that wants a number.
enum Entry {
    Ticket(Ticket),
    /// Too many calls are in flight.
    Full,
    /// It ended, or may have.
    Over,
}

impl Session {
    fn new(id: SessionId, ttl: Duration, confirmed: Moment) -> Self {
        Self { id, ttl, flight: Mutex::new(Flight::new(confirmed)), room: Notify::new() }
    }

    fn enter(self: &Arc<Self>, now: Moment) -> Entry {
        let mut flight = self.flight.lock();
        if flight.retired || now.since(flight.confirmed) >= self.ttl {
            return Entry::Over;
        }
        let Some((sequence, acknowledged_through)) = flight.begin() else { return Entry::Full };
        let call = v1::SessionCall { session: self.id.get(), sequence, acknowledged_through };
        Entry::Ticket(Ticket { session: Arc::clone(self), call })
    }

    fn confirm(&self, sent: Moment) {
        let mut flight = self.flight.lock();
        flight.confirmed = flight.confirmed.max(sent);
    }
}

/// A call's number under a session. In flight until dropped.
#[derive(Debug)]
pub(crate) struct Ticket {
    session: Arc<Session>,
    call: v1::SessionCall,
}

impl Ticket {
    /// What the request carries, on every attempt.
    pub(crate) fn call(&self) -> v1::SessionCall {
        self.call
    }

    /// Takes note that an attempt sent at `sent` was answered.
    pub(crate) fn confirm(&self, sent: Moment) {
        self.session.confirm(sent);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let freed = self.session.flight.lock().end(self.call.sequence);
        for _ in 0..freed {
            self.session.room.notify_one();
        }
    }
}

impl Sessions {
    /// The session to use, `None` inside if the servers know none, `None` if one has to be registered.
    fn look(&self) -> Option<Option<Arc<Session>>> {
        let current = self.current.lock();
        match &*current {
            Current::Session(session) => Some(Some(Arc::clone(session))),
            Current::Unsupported(until) if Instant::now() < *until => Some(None),
            Current::Unsupported(_) | Current::None => None,
        }
    }

    /// Lets no further call begin under `session`.
    fn retire(&self, session: &Arc<Session>) {
        {
            let mut current = self.current.lock();
            if matches!(&*current, Current::Session(used) if Arc::ptr_eq(used, session)) {
                *current = Current::None;
            }
        }
        session.flight.lock().retired = true;
        session.room.notify_waiters();
    }

    /// The server said that the session of this ticket has ended.
    pub(crate) fn expired(&self, ticket: &Ticket) {
        self.retire(&ticket.session);
    }
}

impl Shared {
    /// A number under a session, for a call that was not sent yet; `None` if the servers know no sessions.
    pub(crate) async fn ticket(
        self: &Arc<Self>,
        operation: &'static str,
        until: &Until<'_>,
    ) -> Result<Option<Ticket>, Error> {
        loop {
            let Some(session) = self.session(operation, until).await? else { return Ok(None) };
            // Created before looking, so that no room made after the look is missed.
            let room = session.room.notified();
            match session.enter(Moment::now()) {
                Entry::Ticket(ticket) => return Ok(Some(ticket)),
                Entry::Over => self.sessions.retire(&session),
                Entry::Full => {
                    let late = || {
                        let window = limits::SESSION_WINDOW_CALLS;
                        let message =
                            format!("session_window_calls: {window} calls are in flight, and none ended in time");
                        Error::new(operation, ErrorKind::ResourceExhausted, Outcome::NotApplied, message)
                    };
                    self.wait(until, room).await.map_err(|ended| ended.error(operation, late))?;
                }
            }
        }
    }

    /// The session to use, registered if there is none. Calls that come meanwhile wait for the one that registers it.
    async fn session(
        self: &Arc<Self>,
        operation: &'static str,
        until: &Until<'_>,
    ) -> Result<Option<Arc<Session>>, Error> {
        if let Some(found) = self.sessions.look() {
            return Ok(found);
        }
        let begun = Instant::now();
        let late = || self.unserved(operation, Route::Leader, begun.elapsed());
        let registering = self.wait(until, self.sessions.registering.lock()).await;
        let _registering = registering.map_err(|ended| ended.error(operation, late))?;
        match self.sessions.look() {
            Some(found) => Ok(found),
            None => self.register(operation, until).await,
        }
    }

    /// Ends the session on the servers, if there is one; otherwise it ends there by itself. To be called when no call
    /// is in flight under it.
    pub(crate) async fn close_session(self: &Arc<Self>, deadline: Instant) {
        let Some(Some(session)) = self.sessions.look() else { return };
        self.sessions.retire(&session);
        let request = v1::SessionCloseRequest { session: session.id.get() };
        let timeout = deadline.saturating_duration_since(Instant::now());
        let plan = Plan { route: Route::Leader, resend: Resend::Idempotent, timeout };
        if let Err(error) = self.own_call(request, plan, &deadline.into()).await {
            tracing::debug!(session = %session.id, %error, "a session was left to end by itself");
        }
    }

    /// Registers a session. Boxed, as it is a call itself.
    fn register<'a>(
        self: &'a Arc<Self>,
        operation: &'static str,
        until: &'a Until<'_>,
    ) -> BoxFuture<'a, Result<Option<Arc<Session>>, Error>> {
        async move {
            // A session registered twice costs nothing but itself, and the caller's request was not sent.
            let timeout = until.deadline.saturating_duration_since(Instant::now());
            let plan = Plan { route: Route::Leader, resend: Resend::Idempotent, timeout };
            match self.own_call(v1::SessionRegisterRequest::default(), plan, until).await {
                Ok((reply, sent)) => {
                    let ttl = Duration::from_millis(reply.ttl_ms);
                    let session = Arc::new(Session::new(SessionId(reply.session), ttl, sent));
                    *self.sessions.current.lock() = Current::Session(Arc::clone(&session));
                    self.counters.sessions.add();
                    self.notice(&Notice::Session(session.id));
                    self.tasks.spawn_until_closed(renew(Arc::clone(self), Arc::clone(&session)));
                    Ok(Some(session))
                }
                Err(error) if error.kind() == ErrorKind::Unsupported => {
                    *self.sessions.current.lock() = Current::Unsupported(Instant::now() + UNSUPPORTED_FOR);
                    Ok(None)
                }
                Err(error) => Err(error.of(operation, "no session could be registered")),
            }
        }
        .boxed()
    }
}

/// Renews a session while calls are in flight under it and none is answered. Ends with the session.
async fn renew(shared: Arc<Shared>, session: Arc<Session>) {
    let pause = session.ttl / 3;
    loop {
        tokio::time::sleep(pause).await;
        {
            let flight = session.flight.lock();
            let age = Moment::now().since(flight.confirmed);
            match flight.in_flight.is_empty() {
                true if flight.retired || age >= session.ttl => return,
                true => continue,
                false if age < pause => continue,
                false => {}
            }
        }
        let request = v1::SessionRenewRequest { session: session.id.get() };
        let plan = Plan { route: Route::Leader, resend: Resend::Idempotent, timeout: pause };
        match shared.own_call(request, plan, &(Instant::now() + pause).into()).await {
            Ok((_, sent)) => session.confirm(sent),
            Err(error) if error.kind() == ErrorKind::SessionExpired => shared.sessions.retire(&session),
            Err(error) => tracing::debug!(session = %session.id, %error, "a session was not renewed"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(ttl_ms: u64) -> Arc<Session> {
        Arc::new(Session::new(SessionId(7), Duration::from_millis(ttl_ms), Moment::default()))
    }

    #[track_caller]
    fn ticket(session: &Arc<Session>) -> Ticket {
        match session.enter(Moment::default()) {
            Entry::Ticket(ticket) => ticket,
            Entry::Full => panic!("the window is full"),
            Entry::Over => panic!("the session is over"),
        }
    }

    #[test]
    fn a_call_acknowledges_what_lies_below_the_lowest_in_flight() {
        let session = session(1000);
        let first = ticket(&session);
        assert_eq!(first.call(), v1::SessionCall { session: 7, sequence: 1, acknowledged_through: 0 });
        let second = ticket(&session);
        let third = ticket(&session);
        drop(second);
        assert_eq!(ticket(&session).call().acknowledged_through, 0, "the first is still in flight");
        drop(first);
        assert_eq!(ticket(&session).call(), v1::SessionCall { session: 7, sequence: 5, acknowledged_through: 2 });
        drop(third);
        assert_eq!(ticket(&session).call(), v1::SessionCall { session: 7, sequence: 6, acknowledged_through: 5 });
    }

    #[test]
    fn random_calls_keep_to_the_rules_of_a_session() {
        let seed = 11;
        let mut rng = fastrand::Rng::with_seed(seed);
        let session = session(1000);
        let mut tickets: Vec<Ticket> = Vec::new();
        let (mut acknowledged, mut full) = (0, false);
        for _ in 0..60_000 {
            if rng.usize(0..9) < 5 {
                match session.enter(Moment::default()) {
                    Entry::Ticket(ticket) => {
                        let call = ticket.call();
                        let lowest = tickets.iter().map(|ticket| ticket.call.sequence).min().unwrap_or(call.sequence);
                        assert_eq!(call.acknowledged_through, lowest - 1, "seed {seed}");
                        assert!(call.acknowledged_through >= acknowledged, "seed {seed}: it went back");
                        assert!(call.sequence <= call.acknowledged_through + limits::SESSION_WINDOW_CALLS);
                        acknowledged = call.acknowledged_through;
                        tickets.push(ticket);
                    }
                    Entry::Full => full = true,
                    Entry::Over => panic!("seed {seed}: nothing ended it"),
                }
            } else if !tickets.is_empty() {
                // The oldest are the slowest, so that the window fills.
                let index = rng.usize(tickets.len() / 2..tickets.len());
                tickets.swap_remove(index);
            }
        }
        assert!(full, "seed {seed}: the window was never full");
    }

    #[test]
    fn a_session_is_relied_on_for_its_time_from_the_last_sending_that_was_answered() {
        let session = session(100);
        let at = |ms| Moment::default() + Duration::from_millis(ms);
        let ticket = ticket(&session);
        assert!(matches!(session.enter(at(99)), Entry::Ticket(_)));
        assert!(matches!(session.enter(at(100)), Entry::Over));
        ticket.confirm(at(60));
        ticket.confirm(at(20));
        assert!(matches!(session.enter(at(159)), Entry::Ticket(_)));
        assert!(matches!(session.enter(at(160)), Entry::Over));
    }
}
