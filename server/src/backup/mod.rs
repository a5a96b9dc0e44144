//! Backups: the state of a store in one file, and what is made of it when a cluster is lost.
//!
//! [`save`] writes an *archive*: a copy of the state machine's directory as of one log entry, with checksums. [`restore`]
//! makes the data directory of ONE fresh node of it, which is a cluster of its own: another cluster id, the next restore
//! epoch, itself as the only voter, the log empty behind the restored entry. [`recover`] does the same with the data
//! directory of a survivor. Others join the new cluster as they join any.
//!
//! Nothing here talks to anybody: bytes in, bytes out, directories.

mod archive;
mod restore;
mod save;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};

pub use archive::{Archive, FORMAT_VERSION};
pub(crate) use restore::refuse_unfinished;
pub use restore::{NewNode, Restored, recover, restore};
pub use save::{Backup, Origin};

use crate::consensus::ReplayError;
use crate::storage::StorageError;

/// Why a backup cannot be made or used. Each names the place and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The operating system refused.
    #[error("{action} {}: {source}; check the disk and its free space, then try again", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// The refusal.
        source: io::Error,
    },
    /// Something else than an archive.
    #[error("{} is not a d-engine snapshot: name a file that `d-engine snapshot save` has written", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// It was written by a version to come.
    #[error(
        "{} has snapshot format {found}, this version reads up to {FORMAT_VERSION}: use the d-engine that wrote it, or a \
         newer one",
        path.display()
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// The end is missing.
    #[error("{} is cut short after {bytes} bytes: copy it again, or use another snapshot", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// What could be read.
        bytes: u64,
    },
    /// What it holds is not what was written.
    #[error("{} is damaged: {what}; copy it again, or use another snapshot", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How it shows.
        what: String,
    },
    /// Something is there already.
    #[error("{} is not empty (it holds {found}): choose an empty directory", path.display())]
    NotEmpty {
        /// The directory.
        path: PathBuf,
        /// One of the names in it.
        found: String,
    },
    /// A restore was interrupted.
    #[error("the restore of {} was interrupted: empty the directory and restore again", path.display())]
    Unfinished {
        /// The directory.
        path: PathBuf,
    },
    /// The data itself cannot be used.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The survivor's log cannot be replayed.
    #[error("the log in {}: {source}; restore a snapshot instead", path.display())]
    Replay {
        /// The log's directory.
        path: PathBuf,
        /// Why.
        source: ReplayError,
    },
}

/// For `map_err`.
fn io_error<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> BackupError + 'a {
    move |source| BackupError::Io { action, path: path.to_owned(), source }
}
