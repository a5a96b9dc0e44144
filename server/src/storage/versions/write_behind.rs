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
//!
//! Between batches the writer cleans what compaction gave up: a chunk at a time while nothing waits, and while
//! something does as many changes as the batch before brought, so that the history does not outgrow its cleaning.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use d_engine_proto::{Epoch, Revision};
use parking_lot::{Condvar, Mutex, MutexGuard};
use rocksdb::WriteBatch;
use tokio::sync::watch;

use super::cleaner::{Cleaned, Cleaner};
use super::database::Database;
use super::encoding::{self, EPOCH_KEY, IndexEntry, STATE_KEY};
use super::{Change, RecordKey, RecordValue, StoreState, Submission};
use crate::storage::{LogPosition, StorageError};

/// What a change costs in the queue besides its key and value.
const CHANGE_OVERHEAD_BYTES: usize = 128;
/// What a record costs in the queue, roughly: its size is known only once it is encoded.
const RECORD_BYTES: usize = 256;

/// The thread that writes.
const WRITER: &str = "kv-write";
/// The thread that flushes.
const FLUSHER: &str = "kv-flush";

/// How much may be on its way. Each number trades memory for throughput; none affects what is stored.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Bytes submitted and not yet written; beyond it, submitting waits.
    pub(super) queue_bytes_max: usize,
    /// Bytes of one batch: tens of thousands of small operations, and short enough not to delay the next for long.
    pub(super) batch_bytes_max: usize,
    /// Bytes written between two flushes: what a restart has to apply again. Cleaning that freed as much is flushed
    /// too, so that the disk gets it back.
    pub(super) flush_bytes: usize,
    /// Bytes of a batch that cleans: it takes a few milliseconds.
    pub(super) clean_bytes: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { queue_bytes_max: 64 << 20, batch_bytes_max: 8 << 20, flush_bytes: 32 << 20, clean_bytes: 64 << 10 }
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
    /// Whether cleaning wants a flush.
    settle: bool,
    /// What went wrong first.
    failure: Option<StorageError>,
    stopping: bool,
}

struct Shared {
    database: Arc<Database>,
    bounds: Bounds,
    /// The oldest readable revision as of opening.
    compacted: Revision,
    progress: Mutex<Progress>,
    /// Follows `progress.failure`.
    failed: watch::Sender<Option<StorageError>>,
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
            settle: false,
            failure: None,
            stopping: false,
        };
        let shared = Arc::new(Shared {
            database,
            bounds,
            compacted: state.compacted,
            progress: Mutex::new(progress),
            failed: watch::Sender::new(None),
            writable: Condvar::new(),
            flushable: Condvar::new(),
            progressed: Condvar::new(),
        });
        let mut write_behind = Self { shared, threads: Vec::new() };
        write_behind.spawn(WRITER, Shared::write_all)?;
        write_behind.spawn(FLUSHER, Shared::flush_all)?;
        Ok(write_behind)
    }

    fn spawn(&mut self, name: &'static str, work: fn(&Shared)) -> Result<(), StorageError> {
        let shared = Arc::clone(&self.shared);
        let run = move || {
            let _guard = FailOnPanic { shared: &shared, thread: name };
            work(&shared);
        };
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(run)
            .map_err(|error| self.shared.io_error("start a thread for versions in", error.to_string()))?;
        self.threads.push(thread);
        Ok(())
    }

    /// Queues what one log entry led to. Waits while the queue is full.
    pub(super) fn submit(&self, submission: Submission) -> Result<(), StorageError> {
        let shared = &self.shared;
        let bytes = submission_bytes(&submission);
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

    /// Follows the first failure.
    pub(super) fn failure(&self) -> watch::Receiver<Option<StorageError>> {
        self.shared.failed.subscribe()
    }

    /// The last submission known to be durable.
    pub(super) fn durable(&self) -> Option<LogPosition> {
        self.shared.progress.lock().durable.position
    }

    /// The last revision that is readable.
    pub(super) fn written(&self) -> Revision {
        self.shared.progress.lock().written.revision
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
        let mut cleaner = Cleaner::new(self.compacted, self.bounds.clean_bytes);
        let (mut unflushed_bytes, mut freed_bytes) = (0, 0);
        while let Some(batch) = self.next_batch(cleaner.is_due()) {
            pass(WRITER);
            let mut changes = 0;
            if let Some(batch) = batch {
                changes = batch.changes.iter().map(|changes| changes.len()).sum();
                let encoded = encoder.encode(&batch);
                unflushed_bytes += encoded.size_in_bytes();
                if let Err(error) = self.database.write(encoded) {
                    return self.fail(self.progress.lock(), self.database.failed("write versions in", &error));
                }
                cleaner.allow(batch.state.compacted);
                let mut progress = self.progress.lock();
                progress.written = batch.mark();
                progress.pending_bytes -= batch.bytes;
                if unflushed_bytes >= self.bounds.flush_bytes {
                    unflushed_bytes = 0;
                    progress.flush_to = progress.flush_to.max(batch.submissions);
                }
                if progress.flush_to > progress.durable.submissions {
                    self.flushable.notify_one();
                }
                self.progressed.notify_all();
            }
            match self.clean(&mut cleaner, changes) {
                Ok(cleaned) => {
                    unflushed_bytes += cleaned.written_bytes;
                    freed_bytes += cleaned.freed_bytes;
                }
                Err(error) => return self.fail(self.progress.lock(), error),
            }
            if freed_bytes >= self.bounds.flush_bytes && !cleaner.is_due() {
                freed_bytes = 0;
                self.progress.lock().settle = true;
                self.flushable.notify_one();
            }
        }
    }

    /// Cleans the traces of as many changes, a chunk at least.
    fn clean(&self, cleaner: &mut Cleaner, changes: usize) -> Result<Cleaned, StorageError> {
        let mut total = Cleaned::default();
        while cleaner.is_due() {
            let chunk = cleaner.clean(&self.database)?;
            total.changes += chunk.changes;
            total.written_bytes += chunk.written_bytes;
            total.freed_bytes += chunk.freed_bytes;
            if total.changes >= changes {
                break;
            }
        }
        Ok(total)
    }

    /// What has accumulated, up to a batch; without waiting for it if there is other work. `None` when it is time to
    /// end.
    fn next_batch(&self, has_other_work: bool) -> Option<Option<Batch>> {
        let mut progress = self.progress.lock();
        self.writable.wait_while(&mut progress, |progress| {
            progress.queue.is_empty() && !has_other_work && !progress.stopping && progress.failure.is_none()
        });
        if progress.stopping || progress.failure.is_some() {
            return None;
        }
        let Some(first) = progress.queue.pop_front() else { return Some(None) };
        let mut batch = Batch::after(&progress.written);
        batch.add(first);
        while let Some(next) = progress.queue.front()
            && batch.bytes + next.bytes <= self.bounds.batch_bytes_max
            && let Some(next) = progress.queue.pop_front()
        {
            batch.add(next);
        }
        Some(Some(batch))
    }

    /// The flusher's life.
    fn flush_all(&self) {
        loop {
            let mut progress = self.progress.lock();
            self.flushable.wait_while(&mut progress, |progress| {
                let wanted = progress.flush_to > progress.durable.submissions
                    && progress.written.submissions >= progress.flush_to;
                !wanted && !progress.settle && !progress.stopping && progress.failure.is_none()
            });
            if progress.stopping || progress.failure.is_some() {
                return;
            }
            // What is written now, at least, will be durable once the flush returns.
            let mark = progress.written;
            progress.settle = false;
            let result = MutexGuard::unlocked(&mut progress, || {
                pass(FLUSHER);
                self.database.flush()
            });
            if let Err(error) = result {
                return self.fail(progress, self.database.failed("flush versions in", &error));
            }
            progress.durable = mark;
            self.progressed.notify_all();
        }
    }

    fn fail(&self, mut progress: MutexGuard<'_, Progress>, failure: StorageError) {
        tracing::error!(error = %failure, "the history can no longer be written");
        let failure = progress.failure.get_or_insert(failure);
        self.failed.send_replace(Some(failure.clone()));
        self.writable.notify_all();
        self.flushable.notify_all();
        self.progressed.notify_all();
    }

    fn check(&self, progress: &Progress) -> Result<(), StorageError> {
        progress.failure.clone().map_or(Ok(()), Err)
    }

    fn io_error(&self, action: &'static str, message: String) -> StorageError {
        StorageError::Io { action, path: self.database.path().to_owned(), message }
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
            let failure = self.shared.io_error("write versions in", format!("thread {} panicked", self.thread));
            self.shared.fail(self.shared.progress.lock(), failure);
        }
    }
}

/// Submissions that are written together, and where that leads.
struct Batch {
    /// In the order of revisions and, within one, of keys.
    changes: Vec<Arc<Vec<Change>>>,
    /// The last value of each record.
    records: BTreeMap<RecordKey, Option<Arc<dyn RecordValue>>>,
    state: StoreState,
    /// Submissions of this process up to the last one here.
    submissions: u64,
    /// What the submissions cost the queue.
    bytes: usize,
}

impl Batch {
    /// An empty one, to follow what is written.
    fn after(written: &Mark) -> Self {
        Self {
            changes: Vec::new(),
            records: BTreeMap::new(),
            state: StoreState::default(),
            submissions: written.submissions,
            bytes: 0,
        }
    }

    fn add(&mut self, Queued { submission, bytes }: Queued) {
        self.changes.push(submission.changes);
        self.records.extend(submission.records.into_iter().map(|record| (record.key, record.value)));
        self.state = submission.state;
        self.submissions += 1;
        self.bytes += bytes;
    }

    fn mark(&self) -> Mark {
        Mark { submissions: self.submissions, position: self.state.position, revision: self.state.revision }
    }
}

/// Builds batches in buffers that are used again.
#[derive(Default)]
struct Encoder {
    key: Vec<u8>,
    record: Vec<u8>,
}

impl Encoder {
    /// The state, the index, the records and the versions, these in the order of their keys on disk, which RocksDB
    /// takes fastest.
    fn encode(&mut self, batch: &Batch) -> WriteBatch {
        let mut out = WriteBatch::default();
        out.put(STATE_KEY, encoding::encode_state(&batch.state));
        if batch.state.epoch != Epoch(0) {
            out.put(EPOCH_KEY, encoding::encode_epoch(batch.state.epoch));
        }
        for (key, value) in &batch.records {
            let key = encoding::record_key(*key);
            match value {
                Some(value) => out.put(key, encoding::encode_record(&key, &value.encode())),
                None => out.delete(key),
            }
        }
        let mut changes: Vec<&Change> = batch.changes.iter().flat_map(|changes| changes.iter()).collect();
        for change in &changes {
            IndexEntry::of(change).encode(&mut self.key, &mut self.record);
            out.put(&self.key, &self.record);
        }
        // No two changes share key and revision, so an unstable sort loses nothing.
        changes.sort_unstable_by(|a, b| (&a.key, a.revision).cmp(&(&b.key, b.revision)));
        for change in changes {
            self.key.clear();
            encoding::put_version_key(&mut self.key, &change.key, change.revision);
            encoding::encode_change(&mut self.record, &self.key, change);
            out.put(&self.key, &self.record);
        }
        out
    }
}

#[cfg_attr(not(feature = "fault-points"), expect(unused_variables, reason = "only a test has it panic"))]
fn pass(thread: &'static str) {
    #[cfg(feature = "fault-points")]
    crate::faults::in_task(thread);
}

fn submission_bytes(submission: &Submission) -> usize {
    let changes = submission.changes.iter().map(change_bytes).sum::<usize>();
    CHANGE_OVERHEAD_BYTES + changes + submission.records.len() * RECORD_BYTES
}

fn change_bytes(change: &Change) -> usize {
    CHANGE_OVERHEAD_BYTES + change.key.len() + change.after.as_ref().map_or(0, |put| put.value.len())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use bytes::Bytes;
    use d_engine_proto::{LeaseId, SessionId};

    use super::super::Record;
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
        let bounds =
            Bounds { queue_bytes_max: 4 << 10, batch_bytes_max: 1 << 10, flush_bytes: 16 << 10, clean_bytes: 64 };
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

    /// Counts how often it is encoded.
    struct Counted(AtomicUsize);

    impl RecordValue for Counted {
        fn encode(&self) -> Vec<u8> {
            vec![u8::try_from(self.0.fetch_add(1, Ordering::Relaxed)).unwrap()]
        }
    }

    #[test]
    fn only_the_last_value_of_a_record_is_encoded_and_written() {
        let (lease, session) = (RecordKey::Lease(LeaseId(1)), RecordKey::Session(SessionId(1)));
        let values: Vec<_> = (0..3).map(|_| Arc::new(Counted(AtomicUsize::new(0)))).collect();
        let mut batch = Batch::after(&Mark { submissions: 7, position: None, revision: Revision(0) });
        for value in &values {
            let records = [(lease, Some(Arc::clone(value) as Arc<dyn RecordValue>)), (session, None)];
            let records = records.map(|(key, value)| Record { key, value }).into();
            batch.add(Queued { submission: Submission { records, ..Default::default() }, bytes: 10 });
        }
        assert_eq!((batch.mark().submissions, batch.bytes), (10, 30));
        // The state, the lease and the session.
        assert_eq!(Encoder::default().encode(&batch).len(), 3);
        let encoded: Vec<_> = values.iter().map(|value| value.0.load(Ordering::Relaxed)).collect();
        assert_eq!(encoded, [0, 0, 1]);
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
