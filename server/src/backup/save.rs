//! Makes an archive of a store that goes on being written to.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use d_engine_proto::{NodeId, v1};

use super::{BackupError, archive, io_error};
use crate::engine::VERSION;
use crate::state_machine::StoreTime;
use crate::state_machine::kv::KvStateMachine;

/// Where a backup comes from.
#[derive(Clone, Copy, Debug)]
pub struct Origin {
    /// The cluster.
    pub cluster_id: u64,
    /// The node.
    pub node_id: NodeId,
    /// Wall clock, in milliseconds since 1970: for people, never for the engine.
    pub unix_ms: u64,
}

/// A copy of the state as of one log entry, made of links, until it is dropped.
pub struct Backup {
    directory: PathBuf,
    manifest: v1::ArchiveManifest,
}

impl Backup {
    /// Copies the state of `kv` into the new directory `into`, on the same file system. Takes the time of a flush,
    /// while which the store goes on.
    ///
    /// # Errors
    /// [`BackupError`].
    pub fn begin(kv: &KvStateMachine, into: &Path, origin: Origin) -> Result<Self, BackupError> {
        // Of the moment: the copy may be a few entries further.
        let counted = kv.current();
        let mut backup = Self { directory: into.to_owned(), manifest: v1::ArchiveManifest::default() };
        let state = kv.history().checkpoint(into)?;
        let files = files(into).map_err(io_error("list", into))?;
        backup.manifest = v1::ArchiveManifest {
            cluster_id: origin.cluster_id,
            epoch: state.epoch.get(),
            revision: state.revision.get(),
            compacted_revision: state.compacted.get(),
            term: state.position.map_or(0, |position| position.term.get()),
            index: state.position.map_or(0, |position| position.index.get()),
            store_time_ns: StoreTime(state.store_time).as_nanos(),
            keys: counted.key_count(),
            leases: counted.lease_count(),
            sessions: counted.session_count(),
            node_id: origin.node_id.get(),
            version: VERSION.to_owned(),
            created_unix_ms: origin.unix_ms,
            files,
        };
        Ok(backup)
    }

    /// Bytes of the archive.
    #[must_use]
    pub fn archive_bytes(&self) -> u64 {
        archive::length(&self.manifest)
    }

    /// Writes the archive. Ends early with the first error of `out`.
    ///
    /// # Errors
    /// [`BackupError::Io`].
    pub fn write(&self, out: &mut impl Write) -> Result<(), BackupError> {
        archive::write(&self.manifest, &self.directory, out).map_err(|(path, source)| BackupError::Io {
            action: "save",
            path,
            source,
        })
    }
}

impl Drop for Backup {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.directory) {
            tracing::warn!(directory = %self.directory.display(), %error, "the copy for a backup stays until the next one");
        }
    }
}

/// The files of a checkpoint, which has no directories; without what RocksDB writes for people.
fn files(directory: &Path) -> io::Result<Vec<v1::ArchiveFile>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name != "LOG" && !name.starts_with("LOG.") && name != "LOCK" {
            files.push(v1::ArchiveFile { name, bytes: entry.metadata()?.len() });
        }
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(files)
}
