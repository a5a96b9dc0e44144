//! Carries changes to the disk behind the state machine's back.
//!
//! ```text
//! submit ──▶ queue (bounded in bytes) ──▶ writer: one sorted batch ──▶ memtable ──▶ flusher ──▶ disk
//!                                                                      written                  durable
//! ```
//!
//! The writer takes whatever has accumulated and writes it as one batch together with the state that the last
//! submission in it stands for. The flusher makes memtables durable while the writer goes on. After the first failure
//! nothing more is written and every call answers with it: writing on could leave a hole.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use d_engine_proto::Revision;
use parking_lot::{Condvar, Mutex, MutexGuard};
use rocksdb::WriteBatch;

use super::database::Database;
use super::encoding::{self, STATE_KEY};
use super::{Change, StoreState, Submission};
use crate::storage::{LogPosition, StorageError};

/// What a change costs in the queue besides its key and value.
const CHANGE_OVERHEAD_BYTES: usize = 128;

/// How much may be on its way. Each number trades memory for throughput; none affects what is stored.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Bytes submitted and not yet written; beyond it, submitting waits.
    pub(super) queue_bytes_max: usize,
    /// Bytes of one batch: tens of thousands of small operations, and short enough not to delay the next for long.
    pub(super) batch_bytes_max: usize,
    /// Bytes written between two flushes: what a restart has to apply again.
    pub(super) flush_bytes: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { queue_bytes_max: 64 << 20, batch_bytes_max: 8 << 20, flush_bytes: 32 << 20 }
    }
}

/// A submission and what it costs the queue.
struct Queued {
    submission: Submission,
    bytes: usize,
}

/// How far submissions have come on one leg of their way.
#[derive(Clone, Copy, Debug)]
struct Mark {
    submissions: u64,
    position: Option<LogPosition>,
    revision: Revision,
}

/// What went wrong first.
#[derive(Clone, Debug)]
struct Failure {
    action: &'static str,
    message: String,
}

struct Progress {
    queue: VecDeque<Queued>,
    /// Bytes submitted and not yet written.
    pending_bytes: usize,
    submitted: u64,
    /// In RocksDB, readable. Never behind `durable`, never ahead of `submitted`.
    written: Mark,
    /// On the disk.
    durable: Mark,
    /// The flusher works until `durable` reaches this many submissions.
    flush_to: u64,
    failure: Option<Failure>,
    stopping: bool,
}

struct Shared {
    database: Arc<Database>,
    bounds: Bounds,
    progress: Mutex<Progress>,
    /// The writer waits for submissions.
    writable: Condvar,
    /// The flusher waits for written batches that somebody wants durable.
    flushable: Condvar,
    /// Callers wait for room, for `written` and for `durable`.
    progressed: Condvar,
}

/// The two threads and what they share with callers. Dropping it abandons what is not written, like a crash would.
pub(super) struct WriteBehind {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl WriteBehind {
    /// Starts behind `state`, which is durable.
    pub(super) fn start(database: Arc<Database>, state: &StoreState, bounds: Bounds) -> Result<Self, StorageError> {
        let start = Mark { submissions: 0, position: state.position, revision: state.revision };
        let progress = Progress {
            queue: VecDeque::new(),
            pending_bytes: 0,
            submitted: 0,
            written: start,
            durable: start,
            flush_to: 0,
            failure: None,
            stopping: false,
        };
        let shared = Arc::new(Shared {
            database,
            bounds,
            progress: Mutex::new(progress),
            writable: Condvar::new(),
            flushable: Condvar::new(),
            progressed: Condvar::new(),
        });
        let mut write_behind = Self { shared, threads: Vec::new() };
        write_behind.spawn("kv-write", Shared::write_all)?;
        write_behind.spawn("kv-flush", Shared::flush_all)?;
        Ok(write_behind)
    }

    fn spawn(&mut self, name: &'static str, work: fn(&Shared)) -> Result<(), StorageError> {
        let shared = Arc::clone(&self.shared);
        let run = move || {
            let _guard = FailOnPanic { shared: &shared, thread: name };
            work(&shared);
        };
        let thread = thread::Builder::new().name(name.to_owned()).spawn(run).map_err(|error| {
            let failure = Failure { action: "start a thread for versions in", message: error.to_string() };
            self.shared.error(&failure)
        })?;
        self.threads.push(thread);
        Ok(())
    }

    /// Queues what one log entry led to. Waits while the queue is full.
    pub(super) fn submit(&self, submission: Submission) -> Result<(), StorageError> {
        let shared = &self.shared;
        let bytes = CHANGE_OVERHEAD_BYTES + submission.changes.iter().map(change_bytes).sum::<usize>();
        let mut progress = shared.progress.lock();
        // What is larger than the whole queue goes through it alone.
        let full = |progress: &mut Progress| {
            progress.failure.is_none()
                && progress.pending_bytes > 0
                && progress.pending_bytes + bytes > shared.bounds.queue_bytes_max
        };
        shared.progressed.wait_while(&mut progress, full);
        shared.check(&progress)?;
        progress.queue.push_back(Queued { submission, bytes });
        progress.pending_bytes += bytes;
        progress.submitted += 1;
        shared.writable.notify_one();
        Ok(())
    }

    /// The last submission known to be durable.
    pub(super) fn durable(&self) -> Option<LogPosition> {
        self.shared.progress.lock().durable.position
    }

    /// Waits until `revision` is readable; answers the revision that is, smaller if time ran out.
    pub(super) fn wait_written(&self, revision: Revision, timeout: Duration) -> Result<Revision, StorageError> {
        let shared = &self.shared;
        let mut progress = shared.progress.lock();
        let behind = |progress: &mut Progress| progress.failure.is_none() && progress.written.revision < revision;
        shared.progressed.wait_while_for(&mut progress, behind, timeout);
        let written = progress.written.revision;
        if written < revision { shared.check(&progress).map(|()| written) } else { Ok(written) }
    }

    /// Waits until everything submitted before the call is durable.
    pub(super) fn flush(&self) -> Result<(), StorageError> {
        let shared = &self.shared;
        let mut progress = shared.progress.lock();
        let target = progress.submitted;
        progress.flush_to = progress.flush_to.max(target);
        shared.flushable.notify_one();
        let behind = |progress: &mut Progress| progress.failure.is_none() && progress.durable.submissions < target;
        shared.progressed.wait_while(&mut progress, behind);
        shared.check(&progress)
    }
}

impl Drop for WriteBehind {
    fn drop(&mut self) {
        self.shared.progress.lock().stopping = true;
        self.shared.writable.notify_all();
        self.shared.flushable.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so through the failure.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// The writer's life.
    fn write_all(&self) {
        let mut encoder = Encoder::default();
        let mut unflushed_bytes = 0;
        while let Some((changes, state, mark, bytes)) = self.next_batch() {
            let batch = encoder.encode(&changes, &state);
            unflushed_bytes += batch.size_in_bytes();
            let result = self.database.write(batch);
            let mut progress = self.progress.lock();
            if let Err(error) = result {
                return self.fail(progress, Failure { action: "write versions in", message: error.to_string() });
            }
            progress.written = mark;
            progress.pending_bytes -= bytes;
            if unflushed_bytes >= self.bounds.flush_bytes {
                unflushed_bytes = 0;
                progress.flush_to = progress.flush_to.max(mark.submissions);
            }
            if progress.flush_to > progress.durable.submissions {
                self.flushable.notify_one();
            }
            self.progressed.notify_all();
        }
    }

    /// What has accumulated, up to a batch; `None` when it is time to end.
    fn next_batch(&self) -> Option<(Vec<Arc<Vec<Change>>>, StoreState, Mark, usize)> {
        let mut progress = self.progress.lock();
        self.writable.wait_while(&mut progress, |progress| {
            progress.queue.is_empty() && !progress.stopping && progress.failure.is_none()
        });
        if progress.stopping || progress.failure.is_some() {
            return None;
        }
        let Queued { submission, mut bytes } = progress.queue.pop_front()?;
        let mut changes = vec![submission.changes];
        let mut state = submission.state;
        let mut submissions = progress.written.submissions + 1;
        while let Some(next) = progress.queue.front()
            && bytes + next.bytes <= self.bounds.batch_bytes_max
            && let Some(next) = progress.queue.pop_front()
        {
            changes.push(next.submission.changes);
            state = next.submission.state;
            bytes += next.bytes;
            submissions += 1;
        }
        let mark = Mark { submissions, position: state.position, revision: state.revision };
        Some((changes, state, mark, bytes))
    }

    /// The flusher's life.
    fn flush_all(&self) {
        loop {
            let mut progress = self.progress.lock();
            self.flushable.wait_while(&mut progress, |progress| {
                let wanted = progress.flush_to > progress.durable.submissions
                    && progress.written.submissions >= progress.flush_to;
                !wanted && !progress.stopping && progress.failure.is_none()
            });
            if progress.stopping || progress.failure.is_some() {
                return;
            }
            // What is written now, at least, will be durable once the flush returns.
            let mark = progress.written;
            let result = MutexGuard::unlocked(&mut progress, || self.database.flush());
            if let Err(error) = result {
                return self.fail(progress, Failure { action: "flush versions in", message: error.to_string() });
            }
            progress.durable = mark;
            self.progressed.notify_all();
        }
    }

    fn fail(&self, mut progress: MutexGuard<'_, Progress>, failure: Failure) {
        tracing::error!(error = %self.error(&failure), "the history can no longer be written");
        progress.failure.get_or_insert(failure);
        self.writable.notify_all();
        self.flushable.notify_all();
        self.progressed.notify_all();
    }

    fn check(&self, progress: &Progress) -> Result<(), StorageError> {
        progress.failure.as_ref().map_or(Ok(()), |failure| Err(self.error(failure)))
    }

    fn error(&self, failure: &Failure) -> StorageError {
        StorageError::Io {
            action: failure.action,
            path: self.database.path().to_owned(),
            message: failure.message.clone(),
        }
    }
}

/// Turns the panic of a background thread into a failure that callers see, so that none waits for it forever.
struct FailOnPanic<'a> {
    shared: &'a Shared,
    thread: &'static str,
}

impl Drop for FailOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let failure = Failure { action: "write versions in", message: format!("thread {} panicked", self.thread) };
            self.shared.fail(self.shared.progress.lock(), failure);
        }
    }
}

/// Builds batches in buffers that are used again.
#[derive(Default)]
struct Encoder {
    key: Vec<u8>,
    record: Vec<u8>,
}

impl Encoder {
    /// The changes in the order of their keys on disk, which RocksDB takes fastest, and the state they lead to.
    fn encode(&mut self, changes: &[Arc<Vec<Change>>], state: &StoreState) -> WriteBatch {
        let mut changes: Vec<&Change> = changes.iter().flat_map(|changes| changes.iter()).collect();
        // No two changes share key and revision, so an unstable sort loses nothing.
        changes.sort_unstable_by(|a, b| (&a.key, a.revision).cmp(&(&b.key, b.revision)));
        let mut batch = WriteBatch::default();
        batch.put(STATE_KEY, encoding::encode_state(state));
        for change in changes {
            self.key.clear();
            encoding::put_version_key(&mut self.key, &change.key, change.revision);
            encoding::encode_change(&mut self.record, &self.key, change);
            batch.put(&self.key, &self.record);
        }
        batch
    }
}

fn change_bytes(change: &Change) -> usize {
    CHANGE_OVERHEAD_BYTES + change.key.len() + change.after.as_ref().map_or(0, |put| put.value.len())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn delete(bytes: usize, revision: u64) -> Submission {
        let key = Bytes::from(vec![b'k'; bytes]);
        let change = Change { key, revision: Revision(revision), after: None, before: None };
        Submission { changes: Arc::new(vec![change]), records: Vec::new(), state: state(revision) }
    }

    fn state(revision: u64) -> StoreState {
        StoreState { revision: Revision(revision), ..Default::default() }
    }

    #[test]
    fn no_more_is_pending_than_the_queue_may_hold_and_what_is_larger_passes_alone() {
        let directory = tempfile::tempdir().unwrap();
        let (database, start) = Database::open(directory.path()).unwrap();
        let bounds = Bounds { queue_bytes_max: 4 << 10, batch_bytes_max: 1 << 10, flush_bytes: 16 << 10 };
        let write_behind = WriteBehind::start(Arc::new(database), &start, bounds).unwrap();
        for revision in 1..=500 {
            let bytes = if revision % 50 == 0 { 10 << 10 } else { 500 };
            write_behind.submit(delete(bytes, revision)).unwrap();
            let pending = write_behind.shared.progress.lock().pending_bytes;
            let alone = bytes + 2 * CHANGE_OVERHEAD_BYTES;
            assert!(pending <= bounds.queue_bytes_max || pending == alone, "{pending} at {revision}");
        }
        write_behind.flush().unwrap();
        assert_eq!(write_behind.shared.progress.lock().pending_bytes, 0);
        assert_eq!(write_behind.shared.progress.lock().durable.revision, Revision(500));
    }

    #[test]
    fn the_panic_of_a_thread_is_a_failure_that_callers_see() {
        let directory = tempfile::tempdir().unwrap();
        let (database, start) = Database::open(directory.path()).unwrap();
        let mut write_behind = WriteBehind::start(Arc::new(database), &start, Bounds::default()).unwrap();
        write_behind.spawn("kv-panic", |_| panic!("as this test wants it")).unwrap();
        let refused = write_behind.wait_written(Revision(1), Duration::from_secs(60));
        assert!(matches!(refused, Err(StorageError::Io { .. })), "{refused:?}");
    }
}
