//! The watches of one interest: they read the same deliveries, each at its own pace.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::task::Waker;

use d_engine_proto::Revision;
use parking_lot::Mutex;

use super::delivery::Delivery;
use super::interest::Interest;

/// Names a watch among all of a hub.
pub(super) type WatchNumber = u64;

/// The watches with one interest.
pub(super) struct Group {
    pub(super) interest: Interest,
    window: Mutex<Window>,
}

struct Window {
    /// Everything after this revision that was dispatched and matches is in `deliveries`.
    after: Revision,
    /// In the order of revisions.
    deliveries: VecDeque<Arc<Delivery>>,
    /// Who has read everything there is.
    waiting: HashMap<WatchNumber, Waker>,
    members: usize,
}

/// What a watch finds at its cursor.
pub(super) enum Next {
    /// What comes next; its beginning may lie before the cursor.
    Delivery(Arc<Delivery>),
    /// It came too late: the window begins later.
    Behind,
    /// Nothing yet.
    Nothing,
}

impl Group {
    /// A group without members, which holds what is dispatched from now on.
    pub(super) fn new(interest: Interest, dispatched: Revision) -> Self {
        let (deliveries, waiting) = (VecDeque::new(), HashMap::new());
        Self { interest, window: Mutex::new(Window { after: dispatched, deliveries, waiting, members: 0 }) }
    }

    pub(super) fn join(&self) {
        self.window.lock().members += 1;
    }

    /// Returns whether nobody is left.
    pub(super) fn leave(&self, watch: WatchNumber) -> bool {
        let mut window = self.window.lock();
        window.waiting.remove(&watch);
        window.members -= 1;
        window.members == 0
    }

    /// Adds the latest delivery; who waits is to be woken.
    pub(super) fn push(&self, delivery: Arc<Delivery>, woken: &mut Vec<Waker>) {
        let mut window = self.window.lock();
        window.deliveries.push_back(delivery);
        woken.extend(window.waiting.drain().map(|(_, waker)| waker));
    }

    /// Forgets the oldest delivery.
    pub(super) fn shorten(&self) {
        let mut window = self.window.lock();
        if let Some(oldest) = window.deliveries.pop_front() {
            window.after = window.after.max(oldest.last_revision());
        }
    }

    /// Forgets everything up to a revision, of which not all was dispatched.
    pub(super) fn start_over(&self, revision: Revision, woken: &mut Vec<Waker>) {
        let mut window = self.window.lock();
        window.deliveries.clear();
        window.after = revision;
        woken.extend(window.waiting.drain().map(|(_, waker)| waker));
    }

    /// Who waits, to be woken.
    pub(super) fn take_waiting(&self, woken: &mut Vec<Waker>) {
        woken.extend(self.window.lock().waiting.drain().map(|(_, waker)| waker));
    }

    /// What follows a cursor. With nothing, `idle` decides whether to wait: it runs while nobody can be woken.
    pub(super) fn next(&self, cursor: Revision, watch: WatchNumber, idle: impl FnOnce() -> Option<Waker>) -> Next {
        let mut window = self.window.lock();
        if cursor < window.after {
            return Next::Behind;
        }
        let next = window.deliveries.partition_point(|delivery| delivery.last_revision() <= cursor);
        if let Some(delivery) = window.deliveries.get(next) {
            return Next::Delivery(Arc::clone(delivery));
        }
        if let Some(waker) = idle() {
            window.waiting.insert(watch, waker);
        }
        Next::Nothing
    }
}
