//! Brings to the disk what `MemFirst` acknowledged before it was there: the thread that syncs the log by the flush
//! policy, beside the writer, which goes on meanwhile.
//!
//! It never decides what is acknowledged; it only ends the time in which a power cut could take it. Votes, identity and
//! membership do not wait for it: the writer syncs them itself.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::log::FaultSender;
use super::poison::ThreadGuard;
use crate::storage::StorageEngine;

/// What an acknowledgement promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Persistence {
    /// On the disks of a majority: survives power loss of every node.
    DiskFirst,
    /// In the operating systems of a majority: survives the kill of every process. Each node syncs its log once so much
    /// is waiting for it, and while one sync runs, the next is waited for.
    MemFirst {
        /// After this many entries; 1: at once.
        entries: u64,
        /// This long after the oldest of them, at the latest.
        interval: Duration,
    },
}

/// The thread, and what it is told. Dropping it leaves the thread to itself; [`stop`](Self::stop) ends it.
pub(super) struct Flusher {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

struct Shared {
    waiting: Mutex<Waiting>,
    changed: Condvar,
    entries: u64,
    interval: Duration,
}

/// What is written and not yet asked to be synced.
#[derive(Default)]
struct Waiting {
    entries: u64,
    /// When the oldest of it was written.
    since: Option<Instant>,
    stopping: bool,
}

impl Flusher {
    /// Starts the thread. The first sync that fails goes to `fault`, after which nothing is acknowledged any more.
    pub(super) fn start(
        engine: Arc<dyn StorageEngine>,
        fault: FaultSender,
        entries: u64,
        interval: Duration,
        guard: ThreadGuard,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared { waiting: Mutex::default(), changed: Condvar::new(), entries, interval });
        let own = shared.clone();
        let run = move || {
            while own.wait_until_due() {
                guard.pass();
                if let Err(error) = engine.sync() {
                    tracing::error!(%error, "the log cannot be synced; the node stops acknowledging");
                    fault.send_if_modified(|fault| {
                        fault.get_or_insert_with(|| Arc::new(error));
                        true
                    });
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("d-engine-sync".into()).spawn(run)?;
        Ok(Self { shared, thread })
    }

    /// So many entries more were written.
    pub(super) fn written(&self, entries: u64) {
        let mut waiting = self.shared.waiting.lock();
        waiting.entries = waiting.entries.saturating_add(entries);
        let is_oldest = waiting.since.is_none();
        waiting.since.get_or_insert_with(Instant::now);
        if is_oldest || waiting.entries >= self.shared.entries {
            self.shared.changed.notify_one();
        }
    }

    /// Syncs what is waiting and ends the thread.
    pub(super) fn stop(self) {
        self.shared.waiting.lock().stopping = true;
        self.shared.changed.notify_one();
        // It ends by itself; a panic of it was reported when it happened.
        let _ = self.thread.join();
    }
}

impl Shared {
    /// Waits until something is to be synced, and takes it; `false` once nothing is and the thread is to end.
    fn wait_until_due(&self) -> bool {
        let mut waiting = self.waiting.lock();
        loop {
            let due = waiting.since.map(|since| since + self.interval);
            let is_due = waiting.stopping || waiting.entries >= self.entries;
            match due {
                Some(due) if is_due || due <= Instant::now() => break,
                Some(due) => drop(self.changed.wait_until(&mut waiting, due)),
                None if waiting.stopping => return false,
                None => self.changed.wait(&mut waiting),
            }
        }
        *waiting = Waiting { stopping: waiting.stopping, ..Waiting::default() };
        true
    }
}
