//! Takes what the state machine changes, once, and gives it to those whom it concerns.
//!
//! One task follows the store. For each log entry it finds the groups that a changed key concerns, adds one shared
//! delivery to the window of each, and wakes who waits. It never waits for anybody: the windows of all groups together
//! are bounded in bytes, and the oldest delivery of any goes first.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::task::Waker;
use std::time::Duration;

use d_engine_proto::{Revision, v1};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};
use tokio::time::MissedTickBehavior;

use super::WatchError;
use super::catch_up::Lane;
use super::delivery::Delivery;
use super::group::{Group, WatchNumber};
use super::index::Index;
use super::interest::Interest;
use super::stream::Watch;
use crate::consensus::Poison;
use crate::limits;
use crate::metrics::Metrics;
use crate::state_machine::kv::{KvError, KvStateMachine};
use crate::storage::versions::Change;

/// Bytes of changes that are taken from the store in one step, between which others get their turn.
const STEP_BYTES: usize = 128 << 10;

/// Bounds of a hub.
#[derive(Clone, Debug)]
pub struct HubSettings {
    /// Watches at the same time.
    pub watches_max: usize,
    /// Bytes that the windows of all groups keep.
    pub window_bytes_max: usize,
    /// Bytes that a watch which fell behind reads in one step.
    pub chunk_bytes: usize,
    /// How often an idle watch is told how far the store has come.
    pub bookmark_period: Duration,
}

impl Default for HubSettings {
    fn default() -> Self {
        Self {
            watches_max: limits::WATCHES_MAX,
            window_bytes_max: limits::WATCH_WINDOW_BYTES_MAX,
            chunk_bytes: limits::WATCH_CHUNK_BYTES,
            bookmark_period: limits::WATCH_BOOKMARK_PERIOD,
        }
    }
}

/// All watches of a node. Clones share it; it ends when the last one and the last watch are gone.
#[derive(Clone)]
pub struct Hub {
    shared: Arc<Shared>,
}

/// What watches and the dispatching task share.
pub(super) struct Shared {
    pub(super) kv: Arc<KvStateMachine>,
    pub(super) settings: HubSettings,
    pub(super) metrics: Arc<Metrics>,
    /// Those who read the history on disk at the same time.
    pub(super) readers: Arc<Semaphore>,
    live: Mutex<Live>,
    /// Follows `live.dispatched`: once seen here, the windows hold everything up to it.
    dispatched: AtomicU64,
    /// Counts the moments at which idle watches are told how far they are.
    bookmarks: AtomicU64,
    /// Whether a watch waits that has not been told how far it is.
    untold: AtomicBool,
    stopping: watch::Sender<bool>,
}

struct Live {
    index: Index,
    /// Everything up to here is in the windows of the groups it concerns, or was.
    dispatched: Revision,
    watches: usize,
    next_number: WatchNumber,
    /// Whose window got a delivery, and its bytes: oldest first, one for each delivery in a window.
    deliveries: VecDeque<(Weak<Group>, usize)>,
    /// Of `deliveries`.
    bytes: usize,
}

impl Hub {
    /// Begins to follow the store. Runs a task on the current runtime.
    #[must_use]
    pub fn start(kv: Arc<KvStateMachine>, settings: HubSettings, metrics: Arc<Metrics>, poison: &Poison) -> Self {
        let revisions = kv.revisions();
        let dispatched = *revisions.borrow();
        let live = Live {
            index: Index::default(),
            dispatched,
            watches: 0,
            next_number: 0,
            deliveries: VecDeque::new(),
            bytes: 0,
        };
        let period = settings.bookmark_period;
        let shared = Arc::new(Shared {
            kv,
            settings,
            metrics,
            readers: Arc::new(Semaphore::new(limits::WATCH_READERS_MAX)),
            live: Mutex::new(live),
            dispatched: AtomicU64::new(dispatched.get()),
            bookmarks: AtomicU64::new(0),
            untold: AtomicBool::new(false),
            stopping: watch::channel(false).0,
        });
        let dispatching = dispatch_all(StopAtEnd(Arc::downgrade(&shared)), revisions, period);
        tokio::spawn(poison.guard("the delivery of watches", dispatching));
        Self { shared }
    }

    /// Begins a watch. Watches that have one consumer share a lane.
    ///
    /// # Errors
    /// [`WatchError`], when the request makes no sense, begins in what is compacted, or is one too many.
    pub fn watch(&self, create: &v1::WatchCreate, lane: &Lane) -> Result<Watch, WatchError> {
        let interest = Interest::of(create)?;
        if self.shared.is_stopping() {
            return Err(WatchError::Stopping);
        }
        let store = self.shared.kv.current();
        let applied = store.revision();
        let from = if create.from_revision == 0 { applied.next() } else { Revision(create.from_revision) };
        if from < store.compacted() {
            return Err(KvError::Compacted { requested: from, minimum: store.compacted() }.into());
        }
        drop(store);
        let (group, number) = self.shared.join(interest)?;
        self.shared.metrics.watch_opened();
        Ok(Watch::new(Arc::clone(&self.shared), group, number, applied, from, lane.clone()))
    }

    /// Ends all watches with [`WatchError::Stopping`], and refuses new ones.
    pub fn stop(&self) {
        self.shared.stop();
    }

    /// Watches there are, and bytes that the windows of their groups keep.
    #[cfg(test)]
    pub(super) fn size(&self) -> (usize, usize) {
        let live = self.shared.live.lock();
        (live.watches, live.bytes)
    }

    /// Waits for [`stop`](Self::stop).
    pub fn stopped(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut stopping = self.shared.stopping.subscribe();
        async move {
            // A hub that is gone has stopped.
            let _ = stopping.wait_for(|stopping| *stopping).await;
        }
    }
}

impl Shared {
    fn join(&self, interest: Interest) -> Result<(Arc<Group>, WatchNumber), WatchError> {
        let mut live = self.live.lock();
        if live.watches >= self.settings.watches_max {
            return Err(WatchError::TooMany { max: self.settings.watches_max, limit: "watches_max" });
        }
        let group = match live.index.find(&interest) {
            Some(group) => Arc::clone(group),
            None => {
                let group = Arc::new(Group::new(interest, live.dispatched));
                live.index.insert(Arc::clone(&group));
                group
            }
        };
        group.join();
        live.watches += 1;
        live.next_number += 1;
        Ok((group, live.next_number))
    }

    pub(super) fn leave(&self, group: &Arc<Group>, watch: WatchNumber) {
        let mut live = self.live.lock();
        live.watches -= 1;
        if group.leave(watch) {
            live.index.remove(group);
        }
    }

    /// Everything up to here was put into the windows of the groups it concerns.
    pub(super) fn dispatched(&self) -> Revision {
        Revision(self.dispatched.load(Ordering::Acquire))
    }

    pub(super) fn bookmarks(&self) -> u64 {
        self.bookmarks.load(Ordering::Acquire)
    }

    /// A watch waits that is further than it has been told: the next moment for bookmarks must come.
    pub(super) fn wants_bookmark(&self) {
        self.untold.store(true, Ordering::Release);
    }

    pub(super) fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    /// Takes the next changes from the store. Returns whether there were any.
    fn dispatch(&self) -> bool {
        let mut woken = Vec::new();
        let mut live = self.live.lock();
        let any = match self.kv.changes_after_within(live.dispatched, STEP_BYTES) {
            Some(entries) => {
                for changes in &entries {
                    live.spread(changes, self.settings.window_bytes_max, &mut woken);
                }
                !entries.is_empty()
            }
            // The store went further than its memory reaches, or began anew: everybody has to catch up.
            None => {
                let revision = *self.kv.revisions().borrow();
                live.start_over(revision, &mut woken);
                true
            }
        };
        self.dispatched.store(live.dispatched.get(), Ordering::Release);
        drop(live);
        wake(woken);
        any
    }

    /// Lets idle watches look how far they are.
    fn bookmark(&self) {
        self.bookmarks.fetch_add(1, Ordering::Release);
        self.wake_all();
    }

    fn stop(&self) {
        self.stopping.send_replace(true);
        self.wake_all();
    }

    fn wake_all(&self) {
        let mut woken = Vec::new();
        self.live.lock().index.groups().for_each(|group| group.take_waiting(&mut woken));
        wake(woken);
    }
}

impl Live {
    /// Gives the changes of one log entry to the groups they concern.
    fn spread(&mut self, changes: &[Change], bytes_max: usize, woken: &mut Vec<Waker>) {
        let mut slots = Vec::new();
        // Which change concerns which slot, in the order of slots and then of changes.
        let mut hits = Vec::new();
        for (position, change) in changes.iter().enumerate() {
            if change.revision > self.dispatched {
                self.index.slots_with(&change.key, &mut slots);
                hits.extend(slots.drain(..).map(|slot| (slot, position)));
            }
        }
        hits.sort_unstable();
        for hits in hits.chunk_by(|a, b| a.0 == b.0) {
            for group in self.index.groups_of(hits[0].0) {
                let options = group.interest.options;
                let hit = hits.iter().map(|(_, position)| &changes[*position]);
                let wanted = hit.filter(|change| options.wants(change)).cloned().collect();
                if let Some(delivery) = Delivery::new(wanted, options) {
                    self.bytes += delivery.bytes();
                    self.deliveries.push_back((Arc::downgrade(group), delivery.bytes()));
                    group.push(Arc::new(delivery), woken);
                }
            }
        }
        while self.bytes > bytes_max
            && let Some((group, bytes)) = self.deliveries.pop_front()
        {
            self.bytes -= bytes;
            if let Some(group) = group.upgrade() {
                group.shorten();
            }
        }
        if let Some(last) = changes.last() {
            self.dispatched = self.dispatched.max(last.revision);
        }
    }

    fn start_over(&mut self, revision: Revision, woken: &mut Vec<Waker>) {
        self.deliveries.clear();
        self.bytes = 0;
        self.dispatched = revision;
        self.index.groups().for_each(|group| group.start_over(revision, woken));
    }
}

/// Only once no lock is held: who is woken may look at once.
fn wake(woken: Vec<Waker>) {
    woken.into_iter().for_each(Waker::wake);
}

/// The hub as its task sees it: the task keeps it alive only while it works, and never leaves watches waiting behind.
struct StopAtEnd(Weak<Shared>);

impl Drop for StopAtEnd {
    fn drop(&mut self) {
        if let Some(shared) = self.0.upgrade() {
            shared.stop();
        }
    }
}

async fn dispatch_all(hub: StopAtEnd, mut revisions: watch::Receiver<Revision>, bookmark_period: Duration) {
    let mut bookmarks = tokio::time::interval(bookmark_period);
    bookmarks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut bookmarked = Revision(0);
    loop {
        tokio::select! {
            changed = revisions.changed() => {
                if changed.is_err() {
                    return;
                }
                while hub.0.upgrade().is_some_and(|hub| hub.dispatch()) {
                    tokio::task::yield_now().await;
                }
            }
            _ = bookmarks.tick() => {
                let Some(hub) = hub.0.upgrade() else { return };
                let dispatched = hub.dispatched();
                if hub.untold.swap(false, Ordering::AcqRel) || dispatched != bookmarked {
                    hub.bookmark();
                    bookmarked = dispatched;
                }
            }
        }
    }
}
