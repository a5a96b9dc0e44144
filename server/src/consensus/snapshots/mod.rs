//! The snapshots of a node: a directory of files each, with a manifest of what they are.
//!
//! ```text
//! snapshots/snapshot-INDEX-ID     whole: MANIFEST and, below state/, what the state machine wrote
//! snapshots/building              until it is renamed, what a crash leaves of it is worth nothing
//! snapshots/receiving             likewise, but a transfer goes on with it
//! ```
//! There is one current snapshot, and one more while it is being replaced. One that is still being sent goes when the
//! transfer ends. It is never older than what the log was purged to, and never newer than the state, except between the
//! arrival of a snapshot and its installation: then the start after a crash [installs](recovery) it.

mod incoming;
mod manifest;
mod outgoing;
mod recovery;
#[cfg(test)]
mod tests;

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

pub(super) use incoming::{Incoming, ReceiveError};
pub(super) use manifest::Manifest;
use manifest::{corrupt, io_error};
pub(super) use outgoing::Outgoing;
pub(super) use recovery::recover;

use crate::clock::Moment;
use crate::state_machine::StateMachine;
use crate::steps;
use crate::storage::{LogPosition, StorageError};

const WHOLE: &str = "snapshot-";
const BUILDING: &str = "building";
const RECEIVING: &str = "receiving";
/// Directory of the state machine's files.
const STATE: &str = "state";

/// A whole snapshot on disk.
#[derive(Debug)]
pub(super) struct Snapshot {
    directory: PathBuf,
    manifest: Manifest,
    /// A file turned out not to be what the manifest says.
    is_damaged: AtomicBool,
    /// When a piece of it was last sent.
    last_sent: Mutex<Option<Moment>>,
}

impl Snapshot {
    fn new(directory: PathBuf, manifest: Manifest) -> Arc<Self> {
        Arc::new(Self { directory, manifest, is_damaged: AtomicBool::new(false), last_sent: Mutex::new(None) })
    }

    pub(super) fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    pub(super) fn position(&self) -> LogPosition {
        self.manifest.position()
    }

    /// What the state machine wrote.
    pub(super) fn state(&self) -> PathBuf {
        self.directory.join(STATE)
    }

    pub(super) fn is_damaged(&self) -> bool {
        self.is_damaged.load(Ordering::Relaxed)
    }

    /// When a piece of it was last sent.
    pub(super) fn last_sent(&self) -> Option<Moment> {
        *self.last_sent.lock()
    }
}

/// The directory of snapshots. Its calls block on the disk, except those that say otherwise.
#[derive(Debug)]
pub(super) struct Snapshots {
    root: PathBuf,
    current: Mutex<Option<Arc<Snapshot>>>,
    /// Replaced, and perhaps still being sent.
    replaced: Mutex<Vec<Arc<Snapshot>>>,
    /// Held by the one who builds.
    building: Mutex<()>,
    incoming: Mutex<Option<Incoming>>,
    /// How many transfers to here began.
    transfers: AtomicU64,
    /// Payload bytes applied since the start.
    applied_bytes: AtomicU64,
}

impl Snapshots {
    /// Opens the directory, creating it if there is none. Of several whole snapshots the newest counts, unless its
    /// manifest is unreadable; everything else is removed, except what a transfer can go on with.
    ///
    /// # Errors
    /// [`StorageError::Io`].
    pub(super) fn open(root: &Path) -> Result<Self, StorageError> {
        fs::create_dir_all(root).map_err(|error| io_error("create", root, &error))?;
        let mut newest: Option<Arc<Snapshot>> = None;
        let entries = fs::read_dir(root).map_err(|error| io_error("list", root, &error))?;
        for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name == RECEIVING {
                continue;
            }
            let whole =
                if name.starts_with(WHOLE) { Manifest::read(&path) } else { Err(corrupt(&path, "left".into())) };
            match whole {
                Ok(manifest) if newest.as_ref().is_none_or(|newest| newest.position() < manifest.position()) => {
                    if let Some(older) = newest.replace(Snapshot::new(path, manifest)) {
                        remove(&older.directory)?;
                    }
                }
                Ok(_) => remove(&path)?,
                Err(error) => {
                    if name.starts_with(WHOLE) {
                        tracing::warn!(%error, "a snapshot that cannot be read is removed");
                    }
                    remove(&path)?;
                }
            }
        }
        Ok(Self {
            root: root.into(),
            current: Mutex::new(newest),
            replaced: Mutex::default(),
            building: Mutex::new(()),
            incoming: Mutex::new(None),
            transfers: AtomicU64::new(0),
            applied_bytes: AtomicU64::new(0),
        })
    }

    /// The current snapshot. Does not block.
    pub(super) fn current(&self) -> Option<Arc<Snapshot>> {
        self.current.lock().clone()
    }

    /// Makes a snapshot of what the state machine has applied the current one, unless the current one is sound and just
    /// that. What a failure leaves behind the next one removes.
    pub(super) fn build(&self, state_machine: &dyn StateMachine) -> Result<Option<Arc<Snapshot>>, StorageError> {
        let _building = self.building.lock();
        let Some(applied) = state_machine.applied().position else { return Ok(None) };
        let current = self.current().filter(|current| current.position() >= applied && !current.is_damaged());
        if current.is_some() {
            return Ok(current);
        }
        let directory = self.root.join(BUILDING);
        remove(&directory)?;
        let state = directory.join(STATE);
        fs::create_dir_all(&state).map_err(|error| io_error("create", &state, &error))?;
        steps::passed("build/begun")?;
        let saved = state_machine.save(&state)?;
        steps::passed("build/saved")?;
        let Some(position) = saved.position else { return Ok(None) };
        let earlier = self.current().filter(|earlier| !earlier.is_damaged());
        let earlier = earlier.as_ref().map(|earlier| (&*earlier.directory, &earlier.manifest));
        let manifest = Manifest::of(&directory, earlier, position, saved.membership.as_ref())?;
        manifest.write(&directory)?;
        steps::passed("build/described")?;
        let snapshot = self.finish(&directory, manifest)?;
        steps::passed("build/renamed")?;
        self.replace(snapshot.clone());
        self.forget_incoming(position)?;
        self.sweep()?;
        steps::passed("build/swept")?;
        Ok(Some(snapshot))
    }

    /// Gives a directory whose files and manifest are durable the name of a whole snapshot.
    fn finish(&self, directory: &Path, manifest: Manifest) -> Result<Arc<Snapshot>, StorageError> {
        let name = format!("{WHOLE}{:020}-{:016x}", manifest.position().index.get(), manifest.id());
        let whole = self.root.join(name);
        let renamed = fs::rename(directory, &whole).and_then(|()| File::open(&self.root)?.sync_all());
        renamed.map_err(|error| io_error("rename", directory, &error))?;
        Ok(Snapshot::new(whole, manifest))
    }

    /// Makes a whole snapshot the current one, unless the current one is newer. Does not block.
    pub(super) fn replace(&self, snapshot: Arc<Snapshot>) {
        let mut current = self.current.lock();
        let is_newer = |current: &Arc<Snapshot>| current.position() > snapshot.position();
        let replaced = if current.as_ref().is_some_and(is_newer) { Some(snapshot) } else { current.replace(snapshot) };
        self.replaced.lock().extend(replaced);
    }

    /// Gives up a whole snapshot that is not the current one. Does not block.
    pub(super) fn give_up(&self, snapshot: Arc<Snapshot>) {
        self.replaced.lock().push(snapshot);
    }

    /// Removes what was replaced and is not being sent any more.
    pub(super) fn sweep(&self) -> Result<(), StorageError> {
        let unused = {
            let mut replaced = self.replaced.lock();
            let (unused, used) = replaced.drain(..).partition(|snapshot| Arc::strong_count(snapshot) == 1);
            *replaced = used;
            unused
        };
        let unused: Vec<Arc<Snapshot>> = unused;
        unused.iter().try_for_each(|snapshot| remove(&snapshot.directory))
    }

    /// An entry with so many payload bytes was applied. Does not block.
    pub(super) fn note_applied(&self, bytes: usize) {
        self.applied_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Payload bytes applied since the start. Does not block.
    pub(super) fn applied_bytes(&self) -> u64 {
        self.applied_bytes.load(Ordering::Relaxed)
    }
}

fn remove(directory: &Path) -> Result<(), StorageError> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(io_error("remove", directory, &error)),
        _ => Ok(()),
    }
}
