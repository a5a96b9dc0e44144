//! What a start makes of a snapshot that arrived before a crash.
//!
//! It is installed in an order in which every crash leaves something that this repeats:
//!
//! ```text
//! the snapshot is whole      log and state are older: both are brought to it
//! the log is purged to it    the state is older: it is brought to it
//! the state is switched      nothing is left to do
//! ```

use d_engine_proto::LogIndex;

use super::Snapshots;
use super::manifest::corrupt;
use crate::state_machine::StateMachine;
use crate::storage::{Durability, LogPosition, StorageEngine, StorageError, StorageOperation, StorageState};

/// Brings log and state to the current snapshot if the state is older. One that is damaged is given up if the log
/// still has what the state needs. Blocks.
///
/// # Errors
/// [`StorageError::Corrupt`] when the node cannot recover from what it has; else that of log or state machine.
pub(in crate::consensus) fn recover(
    snapshots: &Snapshots,
    engine: &dyn StorageEngine,
    state_machine: &dyn StateMachine,
) -> Result<(), StorageError> {
    let applied = state_machine.applied().position;
    let state = engine.state()?;
    let Some(snapshot) = snapshots.current() else {
        return match state.purged {
            Some(purged) if applied.is_none_or(|applied| applied.index < purged.index) => {
                Err(lacking(snapshots, purged))
            }
            _ => Ok(()),
        };
    };
    if applied >= Some(snapshot.position()) {
        return Ok(());
    }
    if let Err(error) = snapshot.manifest.verify(&snapshot.directory) {
        if state.purged.is_some_and(|purged| applied.is_none_or(|applied| applied.index < purged.index)) {
            return Err(error);
        }
        tracing::warn!(%error, "a damaged snapshot is given up; the log has what follows");
        if let Some(snapshot) = snapshots.current.lock().take() {
            snapshots.give_up(snapshot);
        }
        drop(snapshot);
        return snapshots.sweep();
    }
    let position = snapshot.position();
    tracing::info!(index = position.index.get(), "installing the snapshot that had arrived");
    engine.write(&to_snapshot(engine, &state, position)?, Durability::Fsync)?;
    state_machine.restore(&snapshot.state())
}

/// What brings a log to begin after `position`. A tail is kept only if it follows that very entry.
fn to_snapshot(
    engine: &dyn StorageEngine,
    state: &StorageState,
    position: LogPosition,
) -> Result<Vec<StorageOperation>, StorageError> {
    let purge = StorageOperation::PurgeTo(position);
    if state.purged.is_some_and(|purged| purged.index >= position.index) {
        return Ok(Vec::new());
    }
    let next = LogIndex(position.index.get() + 1);
    let held = engine.read(position.index, next, 0)?.first().map(|record| record.position);
    Ok(if held == Some(position) { vec![purge] } else { vec![StorageOperation::TruncateAfter(None), purge] })
}

fn lacking(snapshots: &Snapshots, purged: LogPosition) -> StorageError {
    corrupt(&snapshots.root, format!("it is missing, and the log begins after entry {}", purged.index))
}
