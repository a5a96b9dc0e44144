//! What all parts of the demo add to, and what is made of it in the end.

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use d_engine_client::Revision;

/// Budget of every call.
pub(crate) const CALL_TIMEOUT: Duration = Duration::from_secs(3);
/// How far past its deadline a call may end: a busy machine wakes tasks late. Far less than a call that hangs would take.
const DEADLINE_MARGIN: Duration = Duration::from_secs(3);

/// A leader taken away.
#[derive(Debug)]
struct Loss {
    what: &'static str,
    at: Instant,
    /// When the first write that was sent after that was acknowledged.
    recovered: Option<Instant>,
}

/// What all tasks add to.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) next: AtomicU64,
    pub(crate) acknowledged: AtomicU64,
    pub(crate) reads: AtomicU64,
    pub(crate) unknown: AtomicU64,
    pub(crate) not_applied: AtomicU64,
    pub(crate) highest_revision: AtomicU64,
    pub(crate) slowest_nanos: AtomicU64,
    pub(crate) writing_done: AtomicBool,
    /// Keys that the demo itself wrote more than once.
    pub(crate) repeated: Mutex<HashSet<String>>,
    losses: Mutex<Vec<Loss>>,
    violations: Mutex<Vec<String>>,
}

impl Tally {
    /// Notes a promise that was broken.
    pub(crate) fn violation(&self, text: String) {
        self.violations.lock().unwrap().push(text);
    }

    pub(crate) fn violations(&self) -> Vec<String> {
        self.violations.lock().unwrap().clone()
    }

    /// Notes how long a call took.
    pub(crate) fn took(&self, what: &str, began: Instant) {
        let elapsed = began.elapsed();
        self.slowest_nanos.fetch_max(elapsed.as_nanos() as u64, Ordering::Relaxed);
        if elapsed > CALL_TIMEOUT + DEADLINE_MARGIN {
            self.violation(format!("a {what} took {elapsed:?}, its deadline was {CALL_TIMEOUT:?}"));
        }
    }

    pub(crate) fn acknowledged(&self, began: Instant, revision: Revision) {
        self.acknowledged.fetch_add(1, Ordering::Relaxed);
        self.highest_revision.fetch_max(revision.get(), Ordering::Relaxed);
        for loss in self.losses.lock().unwrap().iter_mut().filter(|loss| began > loss.at) {
            loss.recovered.get_or_insert_with(Instant::now);
        }
    }

    /// Notes that the leader was taken away just now.
    pub(crate) fn lost_leader(&self, what: &'static str) {
        self.losses.lock().unwrap().push(Loss { what, at: Instant::now(), recovered: None });
    }

    /// How long it took until writes were acknowledged again after each loss.
    pub(crate) fn fail_overs(&self) -> Vec<(&'static str, Option<Duration>)> {
        let losses = self.losses.lock().unwrap();
        losses.iter().map(|loss| (loss.what, loss.recovered.map(|recovered| recovered - loss.at))).collect()
    }
}
