//! Counters of one client.

use std::sync::atomic::{AtomicU64, Ordering};

/// What a client did since it was built.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Calls begun.
    pub calls: u64,
    /// Calls that have not ended yet, those that the client makes for its session included.
    pub in_flight: u64,
    /// Calls that ended by being dropped, those for the session included.
    pub abandoned: u64,
    /// Attempts of all calls, those for the session included.
    pub attempts: u64,
    /// Calls that ended with an error.
    pub failures: u64,
    /// Failed calls among them whose outcome is unknown.
    pub unknown_outcomes: u64,
    /// Attempts beyond the first of their call.
    pub retries: u64,
    /// Retries among them of writes that may have been applied before: those are applied once, thanks to the session or
    /// to their nature.
    pub repeats: u64,
    /// Sessions registered.
    pub sessions: u64,
    /// Answers that sent a call from a node that does not lead to another one.
    pub redirects: u64,
    /// Retries not made because the retry budget was used up.
    pub budget_exhausted: u64,
    /// Leaders of a newer term that took the place of one known before.
    pub leader_changes: u64,
    /// Rounds in which the members were asked for.
    pub refreshes: u64,
    /// Times that a watch went on on a new stream: its old one broke, its node refused it, or its reader was slow.
    pub watch_resumes: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) calls: Counter,
    /// Calls that observers were told of, and those among them that ended.
    pub(crate) observed: Counter,
    pub(crate) observed_ended: Counter,
    pub(crate) abandoned: Counter,
    pub(crate) attempts: Counter,
    pub(crate) failures: Counter,
    pub(crate) unknown_outcomes: Counter,
    pub(crate) retries: Counter,
    pub(crate) repeats: Counter,
    pub(crate) sessions: Counter,
    pub(crate) redirects: Counter,
    pub(crate) budget_exhausted: Counter,
    pub(crate) refreshes: Counter,
    pub(crate) watch_resumes: Counter,
}

#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// Adds one, and returns how much it was before.
    pub(crate) fn next(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Counters {
    pub(crate) fn snapshot(&self, leader_changes: u64) -> Stats {
        Stats {
            calls: self.calls.get(),
            // In this order, so that no call seems to have ended that did not begin.
            in_flight: {
                let ended = self.observed_ended.get();
                self.observed.get().saturating_sub(ended)
            },
            abandoned: self.abandoned.get(),
            attempts: self.attempts.get(),
            failures: self.failures.get(),
            unknown_outcomes: self.unknown_outcomes.get(),
            retries: self.retries.get(),
            repeats: self.repeats.get(),
            sessions: self.sessions.get(),
            redirects: self.redirects.get(),
            budget_exhausted: self.budget_exhausted.get(),
            leader_changes,
            refreshes: self.refreshes.get(),
            watch_resumes: self.watch_resumes.get(),
        }
    }
}
