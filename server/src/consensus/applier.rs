//! Feeds committed entries to the state machine and hands its answers to the callers.
//!
//! An entry is applied here only once it is durable in the local log: a quorum may commit it sooner, but a state
//! machine that is ahead of its own log after a crash could not be replayed.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use futures_util::{Stream, TryStreamExt};
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::{OptionalSend, RaftSnapshotBuilder};
use tokio::sync::watch;

use super::entry;
use super::leadership::Applied;
use super::log::Log;
use super::raft_types::{
    Answers, LogId, Payload, RaftMembership, RaftSnapshot, SnapshotMeta, StoredMembership, Types, from_position,
    to_position,
};
use super::snapshots::{Snapshot, Snapshots};
use crate::metrics::Metrics;
use crate::state_machine::{CommittedEntry, EntryContent, StateMachine, StoreTime};
use crate::steps;
use crate::storage::LogPosition;

/// openraft's view of a [`StateMachine`].
pub(super) struct Applier {
    state_machine: Arc<dyn StateMachine>,
    log: Log,
    durable: watch::Receiver<Option<LogPosition>>,
    applied: watch::Sender<Applied>,
    snapshots: Arc<Snapshots>,
    metrics: Arc<Metrics>,
}

impl Applier {
    /// `applied` is told of every entry applied, and of every snapshot installed.
    pub(super) fn new(
        state_machine: Arc<dyn StateMachine>,
        log: Log,
        applied: watch::Sender<Applied>,
        snapshots: Arc<Snapshots>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let durable = log.durable();
        Self { state_machine, log, durable, applied, snapshots, metrics }
    }

    fn builder(&self) -> Builder {
        Builder { snapshots: self.snapshots.clone(), state_machine: self.state_machine.clone() }
    }

    fn apply_entry(&self, position: LogPosition, payload: &Payload) -> io::Result<(StoreTime, Answers)> {
        let mut store_time = self.applied.borrow().store_time;
        let content = match payload {
            Payload::Blank => EntryContent::Blank,
            Payload::Normal(batch) => {
                self.snapshots.note_applied(batch.bytes());
                let (proposed, commands) = batch.decode().map_err(io::Error::other)?;
                // A batch proposed before its leader knew the store time of its predecessor's last one; the log's
                // order makes this the same on every node.
                store_time = store_time.max(proposed);
                EntryContent::Commands { store_time, commands }
            }
            Payload::Membership(membership) => EntryContent::Membership(entry::encode_membership(membership)),
        };
        let answers = self.state_machine.apply(&CommittedEntry { position, content }).map_err(io::Error::other)?;
        Ok((store_time, Answers(answers)))
    }
}

impl RaftStateMachine<Types> for Applier {
    type SnapshotData = Arc<Snapshot>;
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        let applied = self.state_machine.applied();
        let membership = applied.membership.as_ref().map(|(position, bytes)| (*position, &bytes[..]));
        let membership = stored_membership(membership)?;
        Ok((applied.position.map(from_position), membership))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<Types>, io::Error>> + Unpin + OptionalSend,
    {
        while let Some((entry, responder)) = entries.try_next().await? {
            let position = to_position(&entry.log_id);
            self.durable.wait_for(|durable| *durable >= Some(position)).await.map_err(io::Error::other)?;
            let (store_time, answers) = self.apply_entry(position, &entry.payload)?;
            // Readers that wait for this entry are told before the writer is answered, so that whoever learned of a
            // write through its answer finds it applied.
            self.applied.send_replace(Applied { position: Some(position), store_time });
            if let Some(responder) = responder {
                responder.send(answers);
            }
        }
        Ok(())
    }

    async fn try_create_snapshot_builder(&mut self, force: bool) -> Option<Builder> {
        (force || self.snapshots.current().is_some()).then(|| self.builder())
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        self.builder()
    }

    async fn install_snapshot(&mut self, _meta: &SnapshotMeta, snapshot: Arc<Snapshot>) -> Result<(), io::Error> {
        let started = Instant::now();
        let position = snapshot.position();
        // Before the state is switched, so that the log never ends before the state: see `snapshots::recovery`.
        self.log.purge_durably(position).await?;
        steps::passed("install/purged").map_err(io::Error::other)?;
        let (state_machine, state) = (self.state_machine.clone(), snapshot.state());
        let restored = tokio::task::spawn_blocking(move || state_machine.restore(&state)).await;
        restored.map_err(io::Error::other)?.map_err(io::Error::other)?;
        steps::passed("install/restored").map_err(io::Error::other)?;
        let elapsed = started.elapsed();
        self.metrics.snapshot_installed(elapsed);
        tracing::info!(index = position.index.get(), ?elapsed, "installed a snapshot");
        self.snapshots.replace(snapshot);
        let store_time = self.state_machine.applied().store_time;
        self.applied.send_replace(Applied { position: Some(position), store_time });
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<RaftSnapshot>, io::Error> {
        self.snapshots.current().map(shown).transpose()
    }
}

/// Shows openraft the current snapshot. It builds none, see `compaction`, except at a start that finds a purged log and
/// no snapshot.
pub(super) struct Builder {
    snapshots: Arc<Snapshots>,
    state_machine: Arc<dyn StateMachine>,
}

impl RaftSnapshotBuilder<Types> for Builder {
    type SnapshotData = Arc<Snapshot>;

    async fn build_snapshot(&mut self) -> Result<RaftSnapshot, io::Error> {
        if let Some(current) = self.snapshots.current() {
            return shown(current);
        }
        let (snapshots, state_machine) = (self.snapshots.clone(), self.state_machine.clone());
        let build = tokio::task::spawn_blocking(move || snapshots.build(&*state_machine));
        let built = build.await.map_err(io::Error::other)?.map_err(io::Error::other)?;
        shown(built.ok_or_else(|| io::Error::other("there is nothing to make a snapshot of"))?)
    }
}

/// The snapshot as openraft sees it.
pub(super) fn shown(snapshot: Arc<Snapshot>) -> io::Result<RaftSnapshot> {
    let manifest = snapshot.manifest();
    let last_membership = stored_membership(manifest.membership())?;
    let meta = SnapshotMeta { last_log_id: Some(from_position(manifest.position())), last_membership };
    Ok(RaftSnapshot { meta, snapshot })
}

fn stored_membership(membership: Option<(LogPosition, &[u8])>) -> io::Result<StoredMembership> {
    Ok(match membership {
        Some((position, bytes)) => StoredMembership::new(
            Some(from_position(position)),
            entry::decode_membership(bytes).map_err(io::Error::other)?,
        ),
        None => StoredMembership::new(None, RaftMembership::default()),
    })
}
