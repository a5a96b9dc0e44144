//! Feeds committed entries to the state machine and hands its answers to the callers.
//!
//! An entry is applied here only once it is durable in the local log: a quorum may commit it sooner, but a state
//! machine that is ahead of its own log after a crash could not be replayed. Under `MemFirst` durable means written to the
//! operating system: a killed process finds it there again. After a power cut the state machine may be ahead, which
//! `handle` deals with at start.

use std::io;
use std::sync::Arc;

use futures_util::{Stream, TryStreamExt};
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::{OptionalSend, RaftSnapshotBuilder};
use tokio::sync::watch;

use super::entry;
use super::leadership::Applied;
use super::raft_types::{Answers, LogId, Payload, RaftMembership, StoredMembership, Types, from_position, to_position};
use crate::state_machine::{CommittedEntry, StateMachine, StoreTime};
use crate::storage::LogPosition;

/// openraft's view of a [`StateMachine`].
pub(super) struct Applier {
    state_machine: Arc<dyn StateMachine>,
    durable: watch::Receiver<Option<LogPosition>>,
    applied: watch::Sender<Applied>,
}

impl Applier {
    /// `durable` is the log's; `applied` is told of every entry applied.
    pub(super) fn new(
        state_machine: Arc<dyn StateMachine>,
        durable: watch::Receiver<Option<LogPosition>>,
        applied: watch::Sender<Applied>,
    ) -> Self {
        Self { state_machine, durable, applied }
    }

    fn apply_entry(&self, position: LogPosition, payload: &Payload) -> io::Result<(StoreTime, Answers)> {
        let before = self.applied.borrow().store_time;
        let (store_time, content) = entry::content(payload, before).map_err(io::Error::other)?;
        let answers = self.state_machine.apply(&CommittedEntry { position, content }).map_err(io::Error::other)?;
        Ok((store_time, Answers(answers)))
    }
}

impl RaftStateMachine<Types> for Applier {
    // Snapshots are built, sent and installed by a later part; until then the log is never purged.
    type SnapshotData = ();
    type SnapshotBuilder = NoSnapshots;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        let applied = self.state_machine.applied();
        let membership = match applied.membership {
            Some((position, bytes)) => StoredMembership::new(
                Some(from_position(position)),
                entry::decode_membership(&bytes).map_err(io::Error::other)?,
            ),
            None => StoredMembership::new(None, RaftMembership::default()),
        };
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

    async fn try_create_snapshot_builder(&mut self, force: bool) -> Option<NoSnapshots> {
        match force {
            // At the start over a purged log: a restored node. It runs, but can bring no other up to its state yet.
            true => Some(self.get_snapshot_builder().await),
            false => None,
        }
    }

    async fn get_snapshot_builder(&mut self) -> NoSnapshots {
        NoSnapshots { applied: self.applied_state().await.ok() }
    }

    async fn install_snapshot(
        &mut self,
        _meta: &openraft::alias::SnapshotMetaOf<Types>,
        _snapshot: (),
    ) -> Result<(), io::Error> {
        Err(no_snapshots())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<openraft::alias::SnapshotOf<Types, ()>>, io::Error> {
        Ok(None)
    }
}

/// Stands where a snapshot builder will.
pub(super) struct NoSnapshots {
    applied: Option<(Option<LogId>, StoredMembership)>,
}

impl RaftSnapshotBuilder<Types> for NoSnapshots {
    type SnapshotData = ();

    async fn build_snapshot(&mut self) -> Result<openraft::alias::SnapshotOf<Types, ()>, io::Error> {
        let (last_log_id, last_membership) = self.applied.take().ok_or_else(no_snapshots)?;
        let meta = openraft::alias::SnapshotMetaOf::<Types> { last_log_id, last_membership };
        Ok(openraft::alias::SnapshotOf::<Types, ()> { meta, snapshot: () })
    }
}

fn no_snapshots() -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, "this version builds and installs no snapshots")
}
