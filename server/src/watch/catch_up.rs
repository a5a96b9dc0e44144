//! What a watch reads that has fallen behind the window of its group: the history on disk, in steps.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use d_engine_proto::Revision;
use tokio::sync::{Semaphore, oneshot};

use super::WatchError;
use super::group::Group;
use super::hub::Shared;
use super::interest::Interest;
use crate::limits;
use crate::state_machine::kv::{KvError, KvStateMachine};
use crate::storage::versions::Change;

/// How long a reader waits for what is not written yet before it lets another take its turn.
const PATIENCE: Duration = Duration::from_secs(1);

/// The watches of one consumer. Few of them read the history at the same time, so that a consumer that takes nothing
/// keeps little in memory, however many watches it has.
#[derive(Clone, Debug)]
pub struct Lane(Arc<Semaphore>);

impl Default for Lane {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(limits::WATCH_READS_PER_LANE_MAX)))
    }
}

/// A part of the history.
pub(super) struct Chunk {
    /// What matches, whole revisions only.
    pub(super) changes: Vec<Change>,
    /// Nothing else matches up to this revision.
    pub(super) through: Revision,
}

/// A part of the history that is being read.
pub(super) type Reading = Pin<Box<dyn Future<Output = Result<Chunk, WatchError>> + Send>>;

/// Reads what follows a revision, on a thread that may block. Dropping the future gives the read up.
pub(super) fn read(hub: &Shared, group: &Arc<Group>, after: Revision, lane: &Lane) -> Reading {
    let lane = Arc::clone(&lane.0);
    let readers = Arc::clone(&hub.readers);
    let (kv, group, bytes) = (Arc::clone(&hub.kv), Arc::clone(group), hub.settings.chunk_bytes);
    Box::pin(async move {
        // Held until the consumer takes the answer, which may be never. The permit of a reader must not be.
        let _lane = lane.acquire_owned().await.map_err(|_| WatchError::Stopping)?;
        let (mut answer, answered) = oneshot::channel();
        tokio::spawn(async move {
            let permit = tokio::select! {
                biased;
                () = answer.closed() => return,
                permit = readers.acquire_owned() => permit,
            };
            tokio::task::spawn_blocking(move || {
                let _permit = permit;
                // Whoever asked may be gone.
                let _ = answer.send(read_blocking(&kv, &group.interest, after, bytes));
            });
        });
        answered.await.unwrap_or(Err(WatchError::Stopping))
    })
}

fn read_blocking(
    kv: &KvStateMachine,
    interest: &Interest,
    after: Revision,
    bytes_max: usize,
) -> Result<Chunk, WatchError> {
    let first = after.next();
    let check = || match kv.current().compacted() {
        minimum if first < minimum => Err(KvError::Compacted { requested: first, minimum }),
        _ => Ok(()),
    };
    check()?;
    let history = kv.history();
    // While an installed state is being shown, the history is for a moment ahead of what can be read.
    let last = history.wait_written(first, PATIENCE)?.min(kv.current().revision());
    if last < first {
        return Ok(Chunk { changes: Vec::new(), through: after });
    }
    let (span, options) = (&interest.span, interest.options);
    let (mut changes, through) =
        history.changes(&span.start, span.end.as_deref(), first, last, options.previous, bytes_max)?;
    // What was compacted while it was read may be missing.
    check()?;
    changes.retain(|change| options.wants(change));
    Ok(Chunk { changes, through })
}
