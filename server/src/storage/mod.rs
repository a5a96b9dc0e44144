//! What survives a crash: the Raft log with its vote and identity ([`StorageEngine`]), and the versions of the
//! key-value store ([`versions`]).
//!
//! The only module that names RocksDB. It knows positions and bytes; what an entry means is known to `consensus`,
//! what a key means to `state_machine`.
//!
//! A [`StorageEngine`] is a synchronous, crash-atomic record store and nothing else. Grouping writes, keeping recent
//! entries in memory and telling openraft about completions is done once, for every engine, in `consensus`.

mod directory;
mod log_state;
mod memory;
mod record;
mod rocksdb_engine;
mod segment_engine;
pub mod suite;
mod tails;
pub mod versions;

use std::path::PathBuf;

use bytes::Bytes;
use d_engine_proto::{LogIndex, NodeId, Term};

pub use directory::disk_bytes;
pub use memory::MemoryStorageEngine;
pub use rocksdb_engine::RocksDBStorageEngine;
pub use segment_engine::SegmentStorageEngine;

/// Where an entry stands in the log. Ordered as Raft compares logs: by term first, then by index. A term has at most
/// one leader, so it also tells who wrote the entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LogPosition {
    /// Term of the leader that wrote the entry.
    pub term: Term,
    /// Index of the entry.
    pub index: LogIndex,
}

/// One entry of the log. The payload is opaque here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogRecord {
    /// Where it stands.
    pub position: LogPosition,
    /// Its content, as `consensus` encodes it.
    pub payload: Bytes,
}

/// Raft's durable promise (Raft paper, figure 2: `currentTerm` and `votedFor`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vote {
    /// The term voted in.
    pub term: Term,
    /// The candidate or leader voted for.
    pub node_id: NodeId,
    /// Whether a quorum granted it: the vote of a leader.
    pub committed: bool,
}

/// Whose data directory this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The node's number, from its configuration.
    pub node_id: NodeId,
    /// Drawn at random when the directory was created; a directory that is lost and made anew has another one.
    pub incarnation: u64,
    /// The cluster it belongs to; `None` until one is formed or joined.
    pub cluster_id: Option<u64>,
}

/// One step of a write. Steps take effect in order, all of them or none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StorageOperation {
    /// Appends an entry. Its index follows the last one's; the first ever, or after a purge of everything, may
    /// have any index greater than the purged one.
    Append(LogRecord),
    /// Drops every entry after this index; `None` drops all.
    TruncateAfter(Option<LogIndex>),
    /// Drops every entry up to and including this one and remembers it as purged.
    PurgeTo(LogPosition),
    /// Replaces the vote.
    SaveVote(Vote),
    /// Replaces the position known to be committed.
    SaveCommitted(LogPosition),
    /// Replaces the identity.
    SaveIdentity(Identity),
}

/// How sure a write is when [`StorageEngine::write`] returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// On the disk: survives power loss.
    Fsync,
    /// In the operating system: survives the kill of the process.
    OperatingSystem,
}

/// What a storage engine holds besides the entries themselves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StorageState {
    /// `None` in a directory just created.
    pub identity: Option<Identity>,
    /// `None` before the first vote.
    pub vote: Option<Vote>,
    /// The position last saved as committed.
    pub committed: Option<LogPosition>,
    /// The last purged entry.
    pub purged: Option<LogPosition>,
    /// The last entry; `None` if the log holds none, whatever was purged.
    pub last: Option<LogPosition>,
}

/// The durable half of a Raft node: log, vote and identity. Every implementation passes the [`suite`].
///
/// Calls are synchronous and may block on the disk. Writes come from one thread at a time; reads from any.
pub trait StorageEngine: Send + Sync + 'static {
    /// Everything but the entries.
    ///
    /// # Errors
    /// [`StorageError::Corrupt`] or [`StorageError::Io`].
    fn state(&self) -> Result<StorageState, StorageError>;

    /// The entries from `start` (inclusive) to `end` (exclusive) that the log holds, in order, without holes.
    /// Stops early once `bytes_max` payload bytes are read, but returns at least one entry if there is one.
    ///
    /// # Errors
    /// [`StorageError::Corrupt`] when an entry fails its checksum or one is missing in between.
    fn read(&self, start: LogIndex, end: LogIndex, bytes_max: usize) -> Result<Vec<LogRecord>, StorageError>;

    /// Applies the operations atomically, in order; on return they are as durable as asked.
    ///
    /// After an error the content on disk is undefined until reopened, and every later write fails too, so the node
    /// stops acknowledging.
    ///
    /// # Errors
    /// [`StorageError::Io`], a full disk included; [`StorageError::Refused`].
    fn write(&self, operations: &[StorageOperation], durability: Durability) -> Result<(), StorageError>;

    /// Makes durable what was written before the call, as if it had been written with [`Durability::Fsync`]. Another
    /// thread may write meanwhile; it hardly waits.
    ///
    /// After an error every later write fails too.
    ///
    /// # Errors
    /// [`StorageError::Io`], also when an earlier write failed.
    fn sync(&self) -> Result<(), StorageError>;
}

/// Why stored data cannot be used. Every variant names the place and the remedy.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StorageError {
    /// The operating system or RocksDB refused.
    #[error("{action} {}: {message}; check the disk's health and free space, then restart the node", path.display())]
    Io {
        /// What was attempted, such as "write log in".
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// The refusal, in its own words.
        message: String,
    },
    /// A checksum or an invariant does not hold.
    #[error(
        "corrupt {what} in {}: {message}; the node must not serve from it: move the directory away, remove the \
         member from the cluster and add it again", path.display()
    )]
    Corrupt {
        /// The damaged thing, such as "log entry 17".
        what: String,
        /// Where.
        path: PathBuf,
        /// How it shows.
        message: String,
    },
    /// Written by a version this one does not know.
    #[error(
        "{} has format {found}, this version reads up to {supported}: start the newer version again",
        path.display()
    )]
    NewerFormat {
        /// The directory.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The newest format known here.
        supported: u32,
    },
    /// Written by a version too old for this one.
    #[error(
        "{} has format {found}, this version reads from {supported} on: move the directory away, remove the member \
         from the cluster and add it again",
        path.display()
    )]
    OlderFormat {
        /// The directory.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The oldest format that can be read here.
        supported: u32,
    },
    /// Not a directory of d-engine's.
    #[error("{} is not a d-engine data directory ({message}): choose an empty directory", path.display())]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// What gives it away.
        message: String,
    },
    /// The log of another storage engine.
    #[error(
        "{} was written by the storage engine {found}, not by {expected}: set raft.persistence.engine = \"{found}\", or \
         choose an empty directory", path.display()
    )]
    OtherEngine {
        /// The directory.
        path: PathBuf,
        /// Whose it is, as the configuration names it.
        found: &'static str,
        /// Who was to open it.
        expected: &'static str,
    },
    /// The log cannot be what the write asks for: it would have a hole. Nothing of the write took effect.
    #[error(
        "refused to write to the log in {}: {message}; a defect of the program, not of the disk: restart the node and \
         report it", path.display()
    )]
    Refused {
        /// Where.
        path: PathBuf,
        /// What does not fit.
        message: String,
    },
    /// Another process has it open.
    #[error("{} is in use by another process: stop it, or choose another directory", path.display())]
    Locked {
        /// The directory.
        path: PathBuf,
    },
}
