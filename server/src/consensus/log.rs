//! The Raft log between openraft and a [`StorageEngine`]: recent entries in memory, group commit to the disk.
//!
//! Appended entries are readable at once. One writer thread takes everything that waits, writes it with one fsync
//! (none under `MemFirst`, unless a vote, an identity or a membership is among it: see [`flusher`](super::flusher))
//! and reports all of it; while it does, the next group gathers. Steps reach the disk in the order openraft asked for
//! them. Votes and truncations are waited for; a purge is not, since one that a crash undoes costs nothing.
//!
//! Why a truncation is waited for: what is durable and what is committed are compared by position, and positions of a
//! tail that waits to be dropped lie about both.
//! ```text
//! on disk (1,5); queued (3,6) .. (3,39), which no quorum has
//! the leader of term 4: truncate after (1,5), append (2,6) .. (2,20), committed up to (2,10)
//! without the wait: (3,24) reaches the disk, is "not below (2,10)", and the crash comes now:
//! (3,6) .. (3,10) are applied at restart as if they were committed
//! ```

use std::collections::VecDeque;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::sync::Arc;
use std::time::Instant;

use d_engine_proto::LogIndex;
use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use openraft::storage::{IOFlushed, RaftLogStorage};
use openraft::{LogState, OptionalSend, RaftLogReader};
use parking_lot::{Mutex, RwLock};
use tokio::sync::{mpsc, oneshot, watch};

use super::entry;
use super::flusher::{Flusher, Persistence};
use super::leadership::Applied;
use super::poison::{Poison, ThreadGuard};
use super::raft_types::{Entry, LogId, Payload, RaftVote, Types, from_position, from_vote, to_position, to_vote};
use crate::metrics::Metrics;
use crate::storage::{
    Durability, Identity, LogPosition, LogRecord, StorageEngine, StorageError, StorageOperation, StorageState,
};

/// Entries kept in memory for followers and the state machine; older ones are read from the disk.
const WINDOW_BYTES_MAX: usize = 16 << 20;
/// What an entry takes in memory besides its payload.
const ENTRY_OVERHEAD_BYTES: usize = 128;
/// Payload bytes of one read: what one message to a peer carries.
const READ_BYTES_MAX: usize = 1 << 20;
/// Payload bytes of one group commit.
const GROUP_BYTES_MAX: usize = 8 << 20;
/// Jobs that may wait for the writer; openraft waits when it is full.
const JOBS_MAX: usize = 1024;

/// Takes the first disk error.
pub(super) type FaultSender = Arc<watch::Sender<Option<Arc<StorageError>>>>;

/// The log as openraft sees it. Clones share everything.
#[derive(Clone)]
pub(super) struct Log {
    shared: Arc<Shared>,
}

struct Shared {
    engine: Arc<dyn StorageEngine>,
    window: RwLock<Window>,
    vote: Mutex<Option<RaftVote>>,
    /// Written along with the next group; losing it costs a restart some waiting, nothing else.
    committed: Mutex<Option<LogPosition>>,
    jobs: mpsc::Sender<Job>,
    durable: watch::Receiver<Option<LogPosition>>,
    /// What the state machine has applied is never truncated.
    applied: watch::Receiver<Applied>,
    fault: FaultSender,
}

/// The newest end of the log, in memory.
#[derive(Default)]
struct Window {
    /// Consecutive; together with the disk they are the whole log.
    entries: VecDeque<(Entry, usize)>,
    /// Payload bytes of `entries`.
    bytes: usize,
    last: Option<LogPosition>,
    purged: Option<LogPosition>,
}

enum Job {
    Append { records: Vec<LogRecord>, has_membership: bool, callback: IOFlushed<Types> },
    Truncate { last: Option<LogPosition>, done: oneshot::Sender<Result<(), Arc<StorageError>>> },
    Purge(LogPosition),
    Save { operation: StorageOperation, done: oneshot::Sender<Result<(), Arc<StorageError>>> },
    Stop,
}

impl Log {
    /// Starts the writer over an opened engine, whose state is `state`. It runs until [`stop`](Self::stop).
    pub(super) fn start(
        engine: Arc<dyn StorageEngine>,
        state: &StorageState,
        persistence: Persistence,
        applied: watch::Receiver<Applied>,
        metrics: Arc<Metrics>,
        poison: &Poison,
    ) -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel(JOBS_MAX);
        let (durable_sender, durable) = watch::channel(state.last.or(state.purged));
        let fault = FaultSender::default();
        let flusher = match persistence {
            Persistence::DiskFirst => None,
            Persistence::MemFirst { entries, interval } => {
                let guard = poison.guard_thread("the sync of the log");
                Some(Flusher::start(engine.clone(), fault.clone(), entries, interval, guard)?)
            }
        };
        let shared = Arc::new(Shared {
            engine: engine.clone(),
            window: RwLock::new(Window { last: state.last, purged: state.purged, ..Window::default() }),
            vote: Mutex::new(state.vote.map(from_vote)),
            committed: Mutex::new(None),
            jobs,
            durable,
            applied,
            fault: fault.clone(),
        });
        let writer = Writer { engine, flusher, durable: durable_sender, fault, metrics };
        let weak = Arc::downgrade(&shared);
        let guard = poison.guard_thread("the writer of the log");
        let take_committed = move || weak.upgrade().and_then(|shared| shared.committed.lock().take());
        std::thread::Builder::new()
            .name("d-engine-log".into())
            .spawn(move || writer.run(queue, take_committed, &guard))?;
        Ok(Self { shared })
    }

    /// Ends the writer after everything already asked for. Later writes fail.
    pub(super) async fn stop(&self) {
        // It fails only when the writer is gone already.
        let _ = self.shared.jobs.send(Job::Stop).await;
        self.shared.jobs.closed().await;
    }

    /// The last entry that is as safe as an acknowledgement promises: on the disk, or under `MemFirst` in the operating
    /// system. An entry of the log is durable once this is not below it.
    pub(super) fn durable(&self) -> watch::Receiver<Option<LogPosition>> {
        self.shared.durable.clone()
    }

    /// The first disk error; after it nothing is acknowledged any more.
    pub(super) fn fault(&self) -> watch::Receiver<Option<Arc<StorageError>>> {
        self.shared.fault.subscribe()
    }

    /// Drops every entry up to `upto` from the disk; done on return. Only while nobody reads them: a snapshot is being
    /// installed.
    pub(super) async fn purge_durably(&self, upto: LogPosition) -> io::Result<()> {
        self.save(StorageOperation::PurgeTo(upto)).await
    }

    /// Makes the identity durable.
    pub(super) async fn save_identity(&self, identity: Identity) -> io::Result<()> {
        self.save(StorageOperation::SaveIdentity(identity)).await
    }

    async fn save(&self, operation: StorageOperation) -> io::Result<()> {
        self.submit_and_wait(|done| Job::Save { operation, done }).await
    }

    async fn submit_and_wait(
        &self,
        job: impl FnOnce(oneshot::Sender<Result<(), Arc<StorageError>>>) -> Job,
    ) -> io::Result<()> {
        let (done, written) = oneshot::channel();
        self.submit(job(done)).await?;
        match written.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(io::Error::other(error)),
            Err(_) => Err(writer_is_gone()),
        }
    }

    /// An entry applied here was committed. A leader that lacks it was elected by nodes that lost it, to a power cut
    /// under `MemFirst` or to a lost disk; to follow it would leave this node with a state that nobody else has.
    fn refuse_to_drop_applied(&self, last: Option<LogPosition>) -> io::Result<()> {
        let last = last.map_or(LogIndex(0), |last| last.index);
        let Some(applied) = self.shared.applied.borrow().position.filter(|applied| applied.index > last) else {
            return Ok(());
        };
        let error = Arc::new(StorageError::Corrupt {
            what: format!("log entry {}", applied.index),
            path: "the data directory".into(),
            message: format!(
                "it was committed and applied here, and the leader's log goes on from entry {last} without it: other \
                 members lost committed writes"
            ),
        });
        self.shared.fault.send_if_modified(|fault| {
            fault.get_or_insert_with(|| error.clone());
            true
        });
        Err(io::Error::other(error))
    }

    async fn submit(&self, job: Job) -> io::Result<()> {
        self.shared.jobs.send(job).await.map_err(|_| writer_is_gone())
    }

    /// Entries of `[start, end)`, at most [`READ_BYTES_MAX`] payload bytes but at least one entry if there is one.
    async fn read_some(&self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        let end = {
            let window = self.shared.window.read();
            let end = end.min(window.last.map_or(0, |last| last.index.get() + 1));
            match window.first_index() {
                Some(first) if start >= first => return Ok(window.read(start, end)),
                Some(first) => end.min(first),
                None => end,
            }
        };
        if start >= end {
            return Ok(Vec::new());
        }
        let engine = self.shared.engine.clone();
        let read = move || engine.read(LogIndex(start), LogIndex(end), READ_BYTES_MAX);
        let records = tokio::task::spawn_blocking(read).await.map_err(io::Error::other)?.map_err(io::Error::other)?;
        records.into_iter().map(|record| entry::decode(record).map_err(io::Error::other)).collect()
    }
}

impl Log {
    /// The entries of `[start, end)`, page by page; the last page is empty if the log ends before `end`.
    fn pages(self, start: u64, end: u64) -> impl Stream<Item = io::Result<Vec<Entry>>> + Send {
        stream::try_unfold(Some(start), move |next| {
            let log = self.clone();
            async move {
                let Some(next) = next.filter(|next| *next < end) else { return Ok(None) };
                let page = log.read_some(next, end).await?;
                let after = page.last().map(|entry| entry.log_id.index() + 1);
                Ok(Some((page, after)))
            }
        })
    }
}

impl Window {
    fn first_index(&self) -> Option<u64> {
        self.entries.front().map(|(entry, _)| entry.log_id.index())
    }

    fn read(&self, start: u64, end: u64) -> Vec<Entry> {
        let Some(first) = self.first_index() else { return Vec::new() };
        let skip = usize::try_from(start.saturating_sub(first)).unwrap_or(usize::MAX);
        let count = usize::try_from(end.saturating_sub(start)).unwrap_or(usize::MAX);
        let mut bytes = 0;
        let mut entries = Vec::new();
        for (entry, size) in self.entries.iter().skip(skip).take(count) {
            if bytes + size > READ_BYTES_MAX && !entries.is_empty() {
                break;
            }
            bytes += size;
            entries.push(entry.clone());
        }
        entries
    }

    fn push(&mut self, entry: Entry, bytes: usize) {
        self.last = Some(to_position(&entry.log_id));
        self.bytes += bytes;
        self.entries.push_back((entry, bytes));
    }

    /// Forgets the oldest entries that are on the disk, down to the byte limit.
    fn trim(&mut self, durable: Option<LogPosition>) {
        while self.bytes > WINDOW_BYTES_MAX {
            match self.entries.front() {
                Some((entry, _)) if Some(to_position(&entry.log_id)) <= durable => self.pop_front(),
                _ => break,
            }
        }
    }

    fn pop_front(&mut self) {
        if let Some((_, bytes)) = self.entries.pop_front() {
            self.bytes -= bytes;
        }
    }

    fn truncate_after(&mut self, last: Option<LogPosition>) {
        let keep_until = last.map_or(0, |last| last.index.get() + 1);
        while self.entries.back().is_some_and(|(entry, _)| entry.log_id.index() >= keep_until) {
            if let Some((_, bytes)) = self.entries.pop_back() {
                self.bytes -= bytes;
            }
        }
        self.last = last;
    }
}

impl RaftLogReader<Types> for Log {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + std::fmt::Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        let (start, end) = half_open(&range);
        self.clone().pages(start, end).try_concat().await
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        self.read_some(start, end).await
    }

    /// Page by page, so that a long replay never stands in memory as a whole.
    async fn entries_stream<RB>(&mut self, range: RB) -> impl Stream<Item = Result<Entry, io::Error>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + std::fmt::Debug + OptionalSend,
    {
        let (start, end) = half_open(&range);
        // openraft takes what such a range lacks at its end for applied.
        Box::pin(
            self.clone()
                .pages(start, end)
                .map(move |page| match page {
                    Ok(page) if page.is_empty() => Err(io::Error::other(format!("the log lacks entries before {end}"))),
                    page => page,
                })
                .map_ok(|page| stream::iter(page.into_iter().map(Ok)))
                .try_flatten(),
        )
    }

    async fn read_vote(&mut self) -> Result<Option<RaftVote>, io::Error> {
        Ok(*self.shared.vote.lock())
    }
}

impl RaftLogStorage<Types> for Log {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<Types>, io::Error> {
        let window = self.shared.window.read();
        let purged = window.purged.map(from_position);
        Ok(LogState { last_purged_log_id: purged, last_log_id: window.last.map(from_position).or(purged) })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &RaftVote) -> Result<(), io::Error> {
        *self.shared.vote.lock() = Some(*vote);
        self.save(StorageOperation::SaveVote(to_vote(vote))).await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        *self.shared.committed.lock() = committed.as_ref().map(to_position);
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(self.shared.engine.state().map_err(io::Error::other)?.committed.map(from_position))
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Types>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut records = Vec::new();
        let mut has_membership = false;
        {
            let mut window = self.shared.window.write();
            for entry in entries {
                let record = entry::encode(&entry);
                has_membership |= matches!(entry.payload, Payload::Membership(_));
                window.push(entry, record.payload.len() + ENTRY_OVERHEAD_BYTES);
                records.push(record);
            }
            window.trim(*self.shared.durable.borrow());
        }
        self.submit(Job::Append { records, has_membership, callback }).await
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        let last = last.as_ref().map(to_position);
        self.refuse_to_drop_applied(last)?;
        self.shared.window.write().truncate_after(last);
        self.submit_and_wait(|done| Job::Truncate { last, done }).await
    }

    async fn purge(&mut self, upto: LogId) -> Result<(), io::Error> {
        let upto = to_position(&upto);
        {
            let mut window = self.shared.window.write();
            while window.first_index().is_some_and(|first| first <= upto.index.get()) {
                window.pop_front();
            }
            window.purged = Some(upto);
            window.last = window.last.filter(|last| last.index > upto.index);
        }
        self.submit(Job::Purge(upto)).await
    }
}

fn half_open(range: &impl RangeBounds<u64>) -> (u64, u64) {
    let start = match range.start_bound() {
        Bound::Included(start) => *start,
        Bound::Excluded(start) => start.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(end) => end.saturating_add(1),
        Bound::Excluded(end) => *end,
        Bound::Unbounded => u64::MAX,
    };
    (start, end)
}

fn writer_is_gone() -> io::Error {
    io::Error::other("the log's writer has stopped")
}

/// The one thread that writes.
struct Writer {
    engine: Arc<dyn StorageEngine>,
    /// Under `MemFirst`.
    flusher: Option<Flusher>,
    durable: watch::Sender<Option<LogPosition>>,
    fault: FaultSender,
    metrics: Arc<Metrics>,
}

impl Writer {
    fn run(
        self,
        mut queue: mpsc::Receiver<Job>,
        take_committed: impl Fn() -> Option<LogPosition>,
        guard: &ThreadGuard,
    ) {
        let mut stopping = false;
        let mut committed = None;
        while !stopping {
            let Some(first) = queue.blocking_recv() else { break };
            guard.pass();
            let mut group = Group::default();
            let mut next = Some(first);
            while let Some(job) = next {
                stopping |= group.add(job);
                next = if stopping || group.bytes >= GROUP_BYTES_MAX { None } else { queue.try_recv().ok() };
            }
            committed = take_committed().or(committed);
            // Never ahead of the log that this group leaves behind.
            let last = group.last.unwrap_or(*self.durable.borrow());
            if let Some(position) = committed.take_if(|position| Some(*position) <= last) {
                group.operations.push(StorageOperation::SaveCommitted(position));
            }
            self.commit(group);
        }
        if let Some(flusher) = self.flusher {
            flusher.stop();
        }
    }

    fn commit(&self, group: Group) {
        let started = Instant::now();
        let fault = self.fault.borrow().clone();
        let durability = match &self.flusher {
            Some(_) if !group.needs_disk => Durability::OperatingSystem,
            _ => Durability::Fsync,
        };
        let result = match fault {
            Some(error) => Err(error),
            None => self.engine.write(&group.operations, durability).map_err(Arc::new),
        };
        self.metrics.log_write(started.elapsed());
        match result {
            Ok(()) => {
                if let (Some(flusher), Durability::OperatingSystem) = (&self.flusher, durability) {
                    flusher.written(group.entries);
                }
                if let Some(last) = group.last {
                    self.durable.send_replace(last);
                }
                for callback in group.callbacks {
                    callback.io_completed(Ok(()));
                }
                for done in group.saves {
                    // The asker may have gone; the save stands.
                    let _ = done.send(Ok(()));
                }
            }
            Err(error) => {
                tracing::error!(%error, "the log cannot be written; the node stops acknowledging");
                for callback in group.callbacks {
                    callback.io_completed(Err(io::Error::other(error.clone())));
                }
                for done in group.saves {
                    let _ = done.send(Err(error.clone()));
                }
                self.fault.send_replace(Some(error));
            }
        }
    }
}

/// What one write makes durable.
#[derive(Default)]
struct Group {
    /// Whether it holds what must be on the disk under every policy: a node that forgets its vote elects two leaders of
    /// one term, and one that forgets who the other members are takes itself for the sole voter.
    needs_disk: bool,
    /// Appended.
    entries: u64,
    operations: Vec<StorageOperation>,
    callbacks: Vec<IOFlushed<Types>>,
    saves: Vec<oneshot::Sender<Result<(), Arc<StorageError>>>>,
    bytes: usize,
    /// The log's last entry after the group, if the group changes it.
    last: Option<Option<LogPosition>>,
}

impl Group {
    /// Whether the job asks to stop.
    fn add(&mut self, job: Job) -> bool {
        match job {
            Job::Append { records, has_membership, callback } => {
                self.needs_disk |= has_membership;
                self.entries += records.len() as u64;
                self.last = records.last().map(|record| Some(record.position)).or(self.last);
                self.bytes += records.iter().map(|record| record.payload.len()).sum::<usize>();
                self.operations.extend(records.into_iter().map(StorageOperation::Append));
                self.callbacks.push(callback);
            }
            Job::Truncate { last, done } => {
                self.last = Some(last);
                self.operations.push(StorageOperation::TruncateAfter(last.map(|last| last.index)));
                self.saves.push(done);
            }
            Job::Purge(upto) => self.operations.push(StorageOperation::PurgeTo(upto)),
            Job::Save { operation, done } => {
                self.needs_disk = true;
                self.operations.push(operation);
                self.saves.push(done);
            }
            Job::Stop => return true,
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use openraft::AsyncRuntime;
    use openraft::async_runtime::oneshot::Oneshot;

    use super::super::raft_types::Payload;
    use super::super::runtime::Runtime;
    use super::*;
    use crate::state_machine::StoreTime;
    use crate::storage::MemoryStorageEngine;

    type Signals = <Runtime as AsyncRuntime>::Oneshot;

    fn start(engine: &Arc<MemoryStorageEngine>) -> Log {
        start_as(engine.clone(), Persistence::DiskFirst, nothing_applied())
    }

    fn start_as(engine: Arc<dyn StorageEngine>, persistence: Persistence, applied: watch::Receiver<Applied>) -> Log {
        let state = engine.state().unwrap();
        Log::start(engine, &state, persistence, applied, Arc::default(), &Poison::default()).unwrap()
    }

    fn nothing_applied() -> watch::Receiver<Applied> {
        watch::channel(Applied { position: None, store_time: StoreTime::default() }).1
    }

    fn blank(term: u64, index: u64) -> Entry {
        Entry { log_id: LogId::new_term_index(term, index), payload: Payload::Blank }
    }

    async fn append(log: &mut Log, entries: Vec<Entry>) -> io::Result<()> {
        let (sender, flushed) = Signals::channel();
        log.append(entries, IOFlushed::signal(sender)).await?;
        flushed.await.unwrap()
    }

    fn indexes(entries: &[Entry]) -> Vec<(u64, u64)> {
        entries.iter().map(|entry| (**entry.log_id.committed_leader_id(), entry.log_id.index())).collect()
    }

    #[tokio::test]
    async fn entries_are_readable_in_memory_and_after_a_restart() {
        let engine = Arc::new(MemoryStorageEngine::default());
        let mut log = start(&engine);
        append(&mut log, (0..10).map(|index| blank(1, index)).collect()).await.unwrap();
        let expected: Vec<_> = (3..7).map(|index| (1, index)).collect();
        assert_eq!(indexes(&log.try_get_log_entries(3..7).await.unwrap()), expected);
        log.stop().await;

        let mut log = start(&engine);
        assert_eq!(indexes(&log.try_get_log_entries(3..7).await.unwrap()), expected);
        assert_eq!(log.get_log_state().await.unwrap().last_log_id, Some(LogId::new_term_index(1, 9)));
    }

    #[tokio::test]
    async fn a_read_across_the_disk_and_the_window_has_no_hole() {
        let engine = Arc::new(MemoryStorageEngine::default());
        let mut log = start(&engine);
        append(&mut log, (0..5).map(|index| blank(1, index)).collect()).await.unwrap();
        log.stop().await;
        let mut log = start(&engine);
        append(&mut log, (5..9).map(|index| blank(2, index)).collect()).await.unwrap();
        let all = indexes(&log.try_get_log_entries(0..100).await.unwrap());
        assert_eq!(all, (0..9).map(|index| (if index < 5 { 1 } else { 2 }, index)).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn a_truncation_is_seen_at_once_and_what_follows_replaces_it() {
        let engine = Arc::new(MemoryStorageEngine::default());
        let mut log = start(&engine);
        append(&mut log, (0..10).map(|index| blank(1, index)).collect()).await.unwrap();
        log.truncate_after(Some(LogId::new_term_index(1, 3))).await.unwrap();
        assert_eq!(indexes(&log.try_get_log_entries(2..10).await.unwrap()), [(1, 2), (1, 3)]);
        append(&mut log, vec![blank(2, 4)]).await.unwrap();
        assert_eq!(*log.durable().borrow(), Some(LogPosition { term: 2.into(), index: 4.into() }));
        log.stop().await;
        assert_eq!(indexes(&start(&engine).try_get_log_entries(2..10).await.unwrap()), [(1, 2), (1, 3), (2, 4)]);
    }

    #[tokio::test]
    async fn the_committed_position_never_runs_ahead_of_the_log() {
        let engine = Arc::new(MemoryStorageEngine::default());
        let mut log = start(&engine);
        log.save_committed(Some(LogId::new_term_index(2, 7))).await.unwrap();
        append(&mut log, vec![blank(1, 0), blank(1, 1)]).await.unwrap();
        assert_eq!(log.read_committed().await.unwrap(), None);
        append(&mut log, (2..8).map(|index| blank(2, index)).collect()).await.unwrap();
        log.stop().await;
        assert_eq!(start(&engine).read_committed().await.unwrap(), Some(LogId::new_term_index(2, 7)));
    }

    #[tokio::test]
    async fn after_a_disk_error_nothing_is_acknowledged() {
        let engine = Arc::new(MemoryStorageEngine::default());
        let mut log = start(&engine);
        append(&mut log, vec![blank(1, 0)]).await.unwrap();
        // A hole: the engine refuses it as a broken disk would.
        append(&mut log, vec![blank(1, 5)]).await.unwrap_err();
        append(&mut log, vec![blank(1, 6)]).await.unwrap_err();
        log.save_vote(&RaftVote::new(3, 1)).await.unwrap_err();
        assert!(log.fault().borrow().is_some());
    }

    /// An engine that writes only what it is allowed to.
    struct Gated(MemoryStorageEngine, Mutex<std::sync::mpsc::Receiver<()>>);

    impl StorageEngine for Gated {
        fn state(&self) -> Result<StorageState, StorageError> {
            self.0.state()
        }
        fn read(&self, start: LogIndex, end: LogIndex, bytes_max: usize) -> Result<Vec<LogRecord>, StorageError> {
            self.0.read(start, end, bytes_max)
        }
        fn write(&self, operations: &[StorageOperation], durability: Durability) -> Result<(), StorageError> {
            self.1.lock().recv().unwrap();
            self.0.write(operations, durability)
        }
        fn sync(&self) -> Result<(), StorageError> {
            self.0.sync()
        }
    }

    #[tokio::test]
    async fn what_replaces_a_tail_waits_until_the_tail_is_gone_from_the_disk() {
        let (allow, allowed) = std::sync::mpsc::sync_channel(8);
        let engine = Arc::new(Gated(MemoryStorageEngine::default(), Mutex::new(allowed)));
        let mut log = start_as(engine.clone(), Persistence::DiskFirst, nothing_applied());
        allow.send(()).unwrap();
        append(&mut log, (0..6).map(|index| blank(1, index)).collect()).await.unwrap();
        log.append((6..40).map(|index| blank(3, index)).collect::<Vec<_>>(), IOFlushed::noop()).await.unwrap();
        let mut truncating = Box::pin(log.truncate_after(Some(LogId::new_term_index(1, 5))));
        assert!(futures_util::poll!(&mut truncating).is_pending(), "the tail is still to be written");
        allow.send(()).unwrap();
        allow.send(()).unwrap();
        truncating.await.unwrap();
        assert_eq!(*log.durable().borrow(), Some(LogPosition { term: 1.into(), index: 5.into() }));
        assert_eq!(engine.state().unwrap().last, Some(LogPosition { term: 1.into(), index: 5.into() }));
    }

    /// Takes down how sure each write had to be, and each sync.
    #[derive(Default)]
    struct Recorded(MemoryStorageEngine, Mutex<Vec<Option<Durability>>>);

    impl StorageEngine for Recorded {
        fn state(&self) -> Result<StorageState, StorageError> {
            self.0.state()
        }
        fn read(&self, start: LogIndex, end: LogIndex, bytes_max: usize) -> Result<Vec<LogRecord>, StorageError> {
            self.0.read(start, end, bytes_max)
        }
        fn write(&self, operations: &[StorageOperation], durability: Durability) -> Result<(), StorageError> {
            self.1.lock().push(Some(durability));
            self.0.write(operations, durability)
        }
        fn sync(&self) -> Result<(), StorageError> {
            self.1.lock().push(None);
            self.0.sync()
        }
    }

    fn membership(index: u64) -> Entry {
        let membership = openraft::Membership::new_with_defaults(vec![[1].into()], []);
        Entry { log_id: LogId::new_term_index(1, index), payload: Payload::Membership(membership) }
    }

    #[tokio::test]
    async fn mem_first_syncs_by_the_policy_and_what_must_never_be_lost_at_once() {
        const FSYNC: Option<Durability> = Some(Durability::Fsync);
        const WRITTEN: Option<Durability> = Some(Durability::OperatingSystem);
        const SYNCED: Option<Durability> = None;
        let engine = Arc::new(Recorded::default());
        let persistence = Persistence::MemFirst { entries: 3, interval: Duration::from_secs(3600) };
        let mut log = start_as(engine.clone(), persistence, nothing_applied());
        log.save_vote(&RaftVote::new(1, 1)).await.unwrap();
        append(&mut log, vec![membership(0)]).await.unwrap();
        append(&mut log, vec![blank(1, 1)]).await.unwrap();
        append(&mut log, vec![blank(1, 2)]).await.unwrap();
        assert_eq!(*log.durable().borrow(), Some(LogPosition { term: 1.into(), index: 2.into() }));
        assert_eq!(*engine.1.lock(), [FSYNC, FSYNC, WRITTEN, WRITTEN]);
        append(&mut log, vec![blank(1, 3)]).await.unwrap();
        has_synced(&engine).await;
        append(&mut log, vec![membership(4)]).await.unwrap();
        append(&mut log, vec![blank(1, 5)]).await.unwrap();
        log.stop().await;
        // The last write is of nothing but the stop.
        assert_eq!(engine.1.lock()[4..], [WRITTEN, SYNCED, FSYNC, WRITTEN, WRITTEN, SYNCED]);
    }

    async fn has_synced(engine: &Recorded) {
        let start = Instant::now();
        while !engine.1.lock().contains(&None) {
            assert!(start.elapsed() < Duration::from_secs(60), "never synced");
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn mem_first_syncs_after_the_interval() {
        let engine = Arc::new(Recorded::default());
        let persistence = Persistence::MemFirst { entries: u64::MAX, interval: Duration::from_millis(1) };
        let mut log = start_as(engine.clone(), persistence, nothing_applied());
        append(&mut log, vec![blank(1, 0)]).await.unwrap();
        has_synced(&engine).await;
    }

    #[tokio::test]
    async fn what_was_applied_is_never_truncated() {
        let engine = Arc::new(MemoryStorageEngine::default());
        let (applying, applied) = watch::channel(Applied { position: None, store_time: StoreTime::default() });
        let mut log = start_as(engine.clone(), Persistence::DiskFirst, applied);
        append(&mut log, (0..6).map(|index| blank(1, index)).collect()).await.unwrap();
        applying.send_modify(|applied| applied.position = Some(LogPosition { term: 1.into(), index: 3.into() }));
        log.truncate_after(Some(LogId::new_term_index(1, 3))).await.unwrap();
        assert!(log.fault().borrow().is_none());
        log.truncate_after(Some(LogId::new_term_index(1, 2))).await.unwrap_err();
        assert!(log.fault().borrow().as_ref().is_some_and(|error| error.to_string().contains("log entry 3")));
        assert_eq!(engine.state().unwrap().last, Some(LogPosition { term: 1.into(), index: 3.into() }));
    }
}
