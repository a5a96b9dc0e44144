//! Makes the data directory of a fresh node.
//!
//! ```text
//! data/restoring/state     the backup, or a copy of the survivor's state with its log replayed
//! data/restoring/log       an identity of its own, the log empty behind the restored entry
//! data/log, data/state     renamed to; a node refuses to start while `restoring` is there
//! ```
//! What becomes of the state is [`KvStateMachine::begin_epoch`].

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use d_engine_proto::{Epoch, NodeId, Revision};

use super::{Archive, BackupError, io_error};
use crate::config::LogEngine;
use crate::consensus::{Member, begin_alone, replay};
use crate::node::{LOG_DIRECTORY, STATE_DIRECTORY, open_log};
use crate::state_machine::kv::KvStateMachine;
use crate::storage::versions::{StoreState, VersionStore};
use crate::storage::{Durability, StorageError};

/// Holds what is not whole yet.
const UNFINISHED: &str = "restoring";

/// The node that a backup is restored into.
#[derive(Clone, Debug)]
pub struct NewNode {
    /// Its data directory: empty, or not there yet.
    pub data_directory: PathBuf,
    /// Its number.
    pub node_id: NodeId,
    /// Where peers reach it, host:port.
    pub peer_address: String,
    /// Where clients reach it, host:port.
    pub client_address: String,
    /// Which files its log is kept in: what its configuration says. The other engine refuses them.
    pub log_engine: LogEngine,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restored {
    /// The new cluster.
    pub cluster_id: u64,
    /// The new restore epoch.
    pub epoch: Epoch,
    /// The last revision of the backup.
    pub revision_before: Revision,
    /// The revision that the store begins with; older ones are compacted.
    pub revision: Revision,
    /// Keys in it.
    pub keys: u64,
    /// Leases in it, each with its full time to live ahead.
    pub leases: u64,
}

/// Makes a fresh node of an archive, which is checked to its last byte first.
///
/// # Errors
/// [`BackupError`]; the directory is empty then, as it was.
pub fn restore(archive: &Path, node: &NewNode) -> Result<Restored, BackupError> {
    build(node, |state| {
        fs::create_dir(state).map_err(io_error("create", state))?;
        Archive::open(archive)?.unpack(state)?;
        KvStateMachine::open(state).map_err(BackupError::from)
    })
}

/// Makes a fresh node of what a survivor holds: its state, and its log to the last entry. What it had not received is
/// lost; what it had received and no majority had is kept as if it had been acknowledged.
///
/// The survivor must not run, and its directory stays as it is.
///
/// # Errors
/// [`BackupError`]; the directory of the new node is empty then, as it was.
pub fn recover(survivor: &Path, node: &NewNode) -> Result<Restored, BackupError> {
    let (log, from) = (survivor.join(LOG_DIRECTORY), survivor.join(STATE_DIRECTORY));
    // Opening would make one.
    fs::metadata(&log).map_err(io_error("open", &log))?;
    build(node, |state| {
        let engine = match open_log(LogEngine::RocksDb, &log) {
            Err(StorageError::OtherEngine { .. }) => open_log(LogEngine::Segments, &log)?,
            opened => opened?,
        };
        copy(&from, state)?;
        let kv = KvStateMachine::open(state)?;
        replay(&*engine, &kv).map_err(|source| BackupError::Replay { path: log.clone(), source })?;
        Ok(kv)
    })
}

/// Refuses a data directory whose restore did not come to its end.
///
/// # Errors
/// [`BackupError::Unfinished`].
pub(crate) fn refuse_unfinished(data_directory: &Path) -> Result<(), BackupError> {
    match data_directory.join(UNFINISHED).exists() {
        true => Err(BackupError::Unfinished { path: data_directory.to_owned() }),
        false => Ok(()),
    }
}

fn build(
    node: &NewNode,
    fill: impl FnOnce(&Path) -> Result<KvStateMachine, BackupError>,
) -> Result<Restored, BackupError> {
    let root = &node.data_directory;
    fs::create_dir_all(root).map_err(io_error("create", root))?;
    for entry in fs::read_dir(root).map_err(io_error("list", root))? {
        let found = entry.map_err(io_error("list", root))?.file_name().to_string_lossy().into_owned();
        // A file system's own directory at the top of a volume.
        if found != "lost+found" {
            return Err(BackupError::NotEmpty { path: root.clone(), found });
        }
    }
    let unfinished = root.join(UNFINISHED);
    fs::create_dir(&unfinished).map_err(io_error("create", &unfinished))?;
    let built = fill(&unfinished.join(STATE_DIRECTORY)).and_then(|kv| begin(node, &unfinished, kv));
    if built.is_err() {
        // What was begun is of no use; the error says what counts.
        for begun in [&root.join(LOG_DIRECTORY), &root.join(STATE_DIRECTORY), &unfinished] {
            let _ = fs::remove_dir_all(begun);
        }
    }
    built
}

fn begin(node: &NewNode, unfinished: &Path, kv: KvStateMachine) -> Result<Restored, BackupError> {
    let before = kv.current();
    let StoreState { position, revision: revision_before, .. } = *before.state();
    let member = Member {
        peer_address: node.peer_address.clone(),
        client_address: node.client_address.clone(),
        application_address: String::new(),
        incarnation: fastrand::u64(1..),
        promotable: false,
    };
    let beginning = begin_alone(node.node_id, member, position);
    let state = kv.begin_epoch(beginning.position, beginning.membership)?;
    let after = kv.current();
    let restored = Restored {
        cluster_id: beginning.cluster_id,
        epoch: state.epoch,
        revision_before,
        revision: state.revision,
        keys: after.key_count(),
        leases: after.lease_count(),
    };
    drop(kv);
    let log = unfinished.join(LOG_DIRECTORY);
    open_log(node.log_engine, &log)?.write(&beginning.operations, Durability::Fsync)?;
    let root = &node.data_directory;
    for directory in [LOG_DIRECTORY, STATE_DIRECTORY] {
        fs::rename(unfinished.join(directory), root.join(directory)).map_err(io_error("move into", root))?;
    }
    sync(root)?;
    // From here on the node may start.
    fs::remove_dir(unfinished).map_err(io_error("remove", unfinished))?;
    sync(root)?;
    Ok(restored)
}

/// Copies the state of a survivor by its own means, so that what is not whole is noticed.
fn copy(from: &Path, into: &Path) -> Result<(), BackupError> {
    VersionStore::open_newest(from)?.checkpoint(into)?;
    Ok(())
}

fn sync(directory: &Path) -> Result<(), BackupError> {
    File::open(directory).and_then(|handle| handle.sync_all()).map_err(io_error("make durable", directory))
}
