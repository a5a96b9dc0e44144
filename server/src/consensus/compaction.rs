//! Keeps the log short: has snapshots built when enough was applied since the last one, and the log purged behind them.
//!
//! openraft never asks for a snapshot by itself here. It would take a failure to build one, such as a full disk, for the
//! end of the node; so one is built first, beside everything else, and shown to openraft when it stands.
//!
//! The log is purged up to the snapshot at most, less what is kept for members that are a little behind, and never
//! beyond what the state machine has made durable: a restart replays the rest.

use std::sync::Arc;
use std::time::Instant;

use d_engine_proto::LogIndex;
use openraft::async_runtime::watch::WatchReceiver;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::MissedTickBehavior;

use super::leadership::Applied;
use super::raft_types::{Raft, to_position};
use super::snapshots::{Snapshot, Snapshots};
use crate::clock::Moment;
use crate::limits::{
    RETAINED_LOG_BYTES_MAX, SNAPSHOT_CHECK_PERIOD, SNAPSHOT_OVERDUE_FACTOR, SNAPSHOT_RETRY_PAUSE,
    SNAPSHOT_TRANSFER_PAUSE_MAX,
};
use crate::metrics::Metrics;
use crate::state_machine::StateMachine;
use crate::storage::StorageError;

/// When a node makes a snapshot by itself, and what it keeps of the log behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotPolicy {
    /// Whether it does at all. Without, the log grows for ever.
    pub enabled: bool,
    /// Entries applied since the last one.
    pub log_entries_max: u64,
    /// Bytes applied since the last one, or since the start.
    pub log_bytes_max: u64,
    /// Entries kept for members that are behind; fewer if they are large.
    pub retained_log_entries: u64,
}

#[cfg(test)]
impl SnapshotPolicy {
    /// Only when asked for.
    pub(crate) const OFF: Self = Self { enabled: false, log_entries_max: 1, log_bytes_max: 1, retained_log_entries: 0 };
}

/// Why there is no snapshot.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The disk refused. The node goes on without.
    #[error(transparent)]
    Storage(#[from] Arc<StorageError>),
    /// There is nothing to make one of.
    #[error("nothing is applied yet: write something first")]
    Empty,
    /// The node is stopping.
    #[error("the node is stopping")]
    Stopped,
}

/// A wish for a snapshot; the answer is its position.
pub(super) type Order = oneshot::Sender<Result<LogIndex, SnapshotError>>;

/// The task; it ends with openraft.
pub(super) struct Compaction {
    pub(super) raft: Raft,
    pub(super) snapshots: Arc<Snapshots>,
    pub(super) state_machine: Arc<dyn StateMachine>,
    pub(super) applied: watch::Receiver<Applied>,
    pub(super) policy: SnapshotPolicy,
    pub(super) metrics: Arc<Metrics>,
}

/// Where the last snapshot stood.
#[derive(Clone, Copy, Default)]
struct Mark {
    index: u64,
    bytes: u64,
}

impl Compaction {
    pub(super) async fn run(self, mut orders: mpsc::Receiver<Order>) {
        let mut ticks = tokio::time::interval(SNAPSHOT_CHECK_PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last = Mark::default();
        let mut not_before = Moment::now();
        loop {
            let order = tokio::select! {
                order = orders.recv() => match order {
                    Some(order) => Some(order),
                    None => return,
                },
                _ = ticks.tick() => None,
            };
            if let Some(current) = self.snapshots.current() {
                // One that was installed counts too.
                last.index = last.index.max(current.position().index.get());
            }
            if order.is_none() && !(self.policy.enabled && Moment::now() >= not_before && self.is_due(last)) {
                continue;
            }
            let bytes = self.snapshots.applied_bytes();
            let built = self.build().await;
            match &built {
                Ok(snapshot) => {
                    let index = snapshot.position().index.get();
                    if self.show(snapshot).await.is_none() {
                        return;
                    }
                    self.purge(snapshot, last, bytes).await;
                    last = Mark { index, bytes };
                }
                Err(error) => {
                    not_before = Moment::now() + SNAPSHOT_RETRY_PAUSE;
                    tracing::warn!(%error, "no snapshot could be built; the log is not purged");
                }
            }
            if let Some(order) = order {
                // Whoever asked may be gone.
                let _ = order.send(built.map(|snapshot| snapshot.position().index));
            }
        }
    }

    fn is_due(&self, last: Mark) -> bool {
        let applied = self.applied.borrow().position.map_or(0, |position| position.index.get());
        let (entries, bytes) = (applied.saturating_sub(last.index), self.snapshots.applied_bytes() - last.bytes);
        let current = self.snapshots.current();
        if current.as_ref().is_some_and(|current| current.is_damaged()) {
            return true;
        }
        // A transfer that breaks goes on with the same snapshot or begins anew.
        let is_being_sent = current.as_ref().is_some_and(|current| {
            current.last_sent().is_some_and(|sent| Moment::now().since(sent) < SNAPSHOT_TRANSFER_PAUSE_MAX)
        });
        let factor = if is_being_sent { SNAPSHOT_OVERDUE_FACTOR } else { 1 };
        let reached = |value: u64, max: u64| value >= max.saturating_mul(factor);
        entries > 0 && (reached(entries, self.policy.log_entries_max) || reached(bytes, self.policy.log_bytes_max))
    }

    async fn build(&self) -> Result<Arc<Snapshot>, SnapshotError> {
        let started = Instant::now();
        let (snapshots, state_machine) = (self.snapshots.clone(), self.state_machine.clone());
        let build = tokio::task::spawn_blocking(move || snapshots.build(&*state_machine));
        let built = build.await.map_err(|_| SnapshotError::Stopped)?;
        match built {
            Ok(Some(snapshot)) => {
                let elapsed = started.elapsed();
                self.metrics.snapshot_built(elapsed);
                let (index, bytes) = (snapshot.position().index.get(), snapshot.manifest().bytes());
                tracing::info!(index, bytes, ?elapsed, "built a snapshot");
                Ok(snapshot)
            }
            Ok(None) => Err(SnapshotError::Empty),
            Err(error) => {
                self.metrics.snapshot_failed();
                Err(Arc::new(error).into())
            }
        }
    }

    /// Has openraft take the current snapshot over. `None`: it has ended.
    async fn show(&self, snapshot: &Snapshot) -> Option<()> {
        self.raft.trigger().snapshot().await.ok()?;
        let mut metrics = self.raft.metrics();
        loop {
            let shown = metrics.borrow_watched().snapshot.as_ref().map(to_position);
            if shown >= Some(snapshot.position()) {
                return Some(());
            }
            metrics.changed().await.ok()?;
        }
    }

    async fn purge(&self, snapshot: &Snapshot, last: Mark, bytes: u64) {
        let index = snapshot.position().index.get();
        let (entries, bytes) = (index.saturating_sub(last.index), bytes - last.bytes);
        let affordable = RETAINED_LOG_BYTES_MAX.saturating_mul(entries).checked_div(bytes).unwrap_or(u64::MAX);
        let kept = self.policy.retained_log_entries.min(affordable);
        let Some(durable) = self.durable_at(index).await else { return };
        let upto = index.saturating_sub(kept).min(durable);
        if upto > 0
            && let Err(error) = self.raft.trigger().purge_log(upto).await
        {
            tracing::debug!(%error, "the log is not purged");
        }
    }

    /// How far the state machine is durable; it is asked to be up to `index`.
    async fn durable_at(&self, index: u64) -> Option<u64> {
        let durable = |state_machine: &dyn StateMachine| state_machine.durable().map(|position| position.index.get());
        if durable(&*self.state_machine) < Some(index) {
            let state_machine = self.state_machine.clone();
            if let Ok(Err(error)) = tokio::task::spawn_blocking(move || state_machine.flush()).await {
                tracing::error!(%error, "the state machine cannot be made durable; the log is not purged");
            }
        }
        durable(&*self.state_machine)
    }
}
