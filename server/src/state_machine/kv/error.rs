//! Why the store refuses a command or a read.

use std::fmt;

use d_engine_proto::{ErrorCode, LeaseId, Revision, SessionId, limits, v1};

use super::rules::CHOSEN_LEASE_MAX;
use crate::storage::StorageError;

/// A refusal; nothing changed now. Each names what is wrong and what would be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KvError {
    /// A key without bytes.
    #[error("{field} is empty: a key has 1 to {} bytes", limits::KEY_BYTES_MAX)]
    EmptyKey {
        /// The field of the request.
        field: &'static str,
    },
    /// A key with too many bytes.
    #[error("{field} has {bytes} bytes: a key has 1 to {} bytes", limits::KEY_BYTES_MAX)]
    KeyTooLong {
        /// The field of the request.
        field: &'static str,
        /// Its length.
        bytes: u64,
    },
    /// A field without which the request means nothing.
    #[error("{field} is missing")]
    Missing {
        /// The field of the request.
        field: &'static str,
    },
    /// A number that no enum of the protocol has.
    #[error("{field} has the unknown value {number}")]
    UnknownValue {
        /// The field of the request.
        field: &'static str,
        /// The number.
        number: i32,
    },
    /// An interval that ends before it starts, or is empty.
    #[error("range ends at {end}, which is not after its start {start}")]
    RangeReversed {
        /// First key.
        start: KeyText,
        /// First key no longer part of it.
        end: KeyText,
    },
    /// Two options of a range that exclude each other.
    #[error("keys_only and count_only exclude each other")]
    KeysOrCount,
    /// Too many keys in one get-many.
    #[error("{keys} keys: one request reads at most {}", limits::GET_MANY_KEYS_MAX)]
    TooManyKeys {
        /// Keys asked for.
        keys: u64,
    },
    /// Too many operations in one transaction.
    #[error(
        "the transaction has {operations} operations, its comparisons and nested ones included: at most {} are allowed",
        limits::TXN_OPERATIONS_MAX
    )]
    TooManyOperations {
        /// Operations counted.
        operations: u64,
    },
    /// A transaction nested too deep.
    #[error("the transaction is nested more than {} deep", limits::TXN_DEPTH_MAX)]
    NestedTooDeep,
    /// Two puts of one key that could both take effect.
    #[error("the transaction puts {key} twice")]
    TwoPuts {
        /// The key.
        key: KeyText,
    },
    /// Read options where the transaction decides how to read.
    #[error("read options are only allowed on the outermost request of a transaction that cannot write")]
    MisplacedReadOptions,
    /// A transaction that writes, given to be read.
    #[error("the transaction writes and cannot be served as a read")]
    NotReadOnly,
    /// A session where it would have no effect.
    #[error(
        "session is only allowed on a single write, the outermost request of a transaction, a grant or a revocation"
    )]
    MisplacedSession,
    /// Two ways to attach a key to a lease.
    #[error("lease and ttl_ms exclude each other")]
    LeaseAndTtl,
    /// A time to live out of bounds.
    #[error("ttl_ms is {ttl_ms}: a time to live has {min_ms} to {max_ms} milliseconds")]
    TtlOutOfBounds {
        /// The time to live asked for.
        ttl_ms: u64,
        /// The shortest possible.
        min_ms: u64,
        /// The longest possible.
        max_ms: u64,
    },
    /// A lease id too large to be chosen.
    #[error("lease is {lease}: an id to choose is at most {CHOSEN_LEASE_MAX}")]
    LeaseIdTooLarge {
        /// The id asked for.
        lease: LeaseId,
    },
    /// A lease that is not there, or that one put made for its own key.
    #[error("lease {lease} does not exist")]
    LeaseNotFound {
        /// The lease asked for.
        lease: LeaseId,
    },
    /// An id that is taken.
    #[error("lease {lease} exists already")]
    LeaseExists {
        /// The id asked for.
        lease: LeaseId,
    },
    /// A past revision of leases.
    #[error("leases can only be read as of now: revision must be unset")]
    PastLeases,
    /// A session that is not there.
    #[error("session {session} does not exist: it expired or was closed")]
    SessionExpired {
        /// The session asked for.
        session: SessionId,
    },
    /// A session too many.
    #[error("{} sessions exist, as many as there may be (sessions_max)", limits::SESSIONS_MAX)]
    TooManySessions,
    /// A sequence that stands for another command.
    #[error("sequence {sequence} was used for another command")]
    SequenceReused {
        /// The sequence of the call.
        sequence: u64,
    },
    /// A sequence whose answer, if there ever was one, is forgotten.
    #[error("sequence {sequence} is acknowledged: the session's answers are forgotten through {acknowledged_through}")]
    AlreadyAcknowledged {
        /// The sequence of the call.
        sequence: u64,
        /// The greatest sequence acknowledged.
        acknowledged_through: u64,
    },
    /// A call that was applied, with an answer too large to be kept.
    #[error(
        "sequence {sequence} was applied, but its answer had more than {} bytes and was not kept \
         (session_answer_bytes_max)",
        limits::SESSION_ANSWER_BYTES_MAX
    )]
    AnswerNotKept {
        /// The sequence of the call.
        sequence: u64,
    },
    /// A sequence too far ahead.
    #[error(
        "sequence {sequence} is more than {} above the acknowledged {acknowledged_through} (session_window_calls): \
         acknowledge answers first",
        limits::SESSION_WINDOW_CALLS
    )]
    BeyondWindow {
        /// The sequence of the call.
        sequence: u64,
        /// The greatest sequence acknowledged.
        acknowledged_through: u64,
    },
    /// A session that keeps too many answers to take another call.
    #[error(
        "the session keeps answers of almost {} bytes (session_answers_bytes_max): acknowledge some first",
        limits::SESSION_ANSWERS_BYTES_MAX
    )]
    TooManyAnswers,
    /// A compaction in the log that does not name a revision.
    #[error("older_than_ms must be resolved to a revision before it is proposed")]
    CompactByAge,
    /// Keys and values that would not fit in an answer.
    #[error(
        "the answer would have more than {} bytes (answer_bytes_max): ask for fewer keys or previous values, or for a \
         smaller transaction",
        limits::ANSWER_BYTES_MAX
    )]
    AnswerTooLarge,
    /// A revision that is gone.
    #[error("revision {requested} is compacted: the oldest one left is {minimum}")]
    Compacted {
        /// The revision asked for.
        requested: Revision,
        /// The oldest one that can be read.
        minimum: Revision,
    },
    /// A revision that is yet to come.
    #[error("revision {requested} has not been issued: the current one is {current}")]
    FutureRevision {
        /// The revision asked for.
        requested: Revision,
        /// The newest one that can be read.
        current: Revision,
    },
    /// Bytes in the log that are no command.
    #[error("the command cannot be decoded: {message}")]
    Undecodable {
        /// What the decoder met.
        message: String,
    },
    /// A query through the interface of custom state machines.
    #[error("the key-value store takes no opaque queries")]
    NoQueries,
}

impl KvError {
    /// The code that callers act on.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            // The bounds are fixed and nothing passes with time, so none of this is an exhaustion.
            Self::EmptyKey { .. }
            | Self::KeyTooLong { .. }
            | Self::Missing { .. }
            | Self::UnknownValue { .. }
            | Self::RangeReversed { .. }
            | Self::KeysOrCount
            | Self::TooManyKeys { .. }
            | Self::TooManyOperations { .. }
            | Self::NestedTooDeep
            | Self::TwoPuts { .. }
            | Self::MisplacedReadOptions
            | Self::NotReadOnly
            | Self::AnswerTooLarge
            | Self::MisplacedSession
            | Self::LeaseAndTtl
            | Self::TtlOutOfBounds { .. }
            | Self::LeaseIdTooLarge { .. }
            | Self::PastLeases
            | Self::SequenceReused { .. }
            | Self::CompactByAge
            | Self::Undecodable { .. } => ErrorCode::InvalidArgument,
            Self::NoQueries => ErrorCode::Unsupported,
            Self::LeaseNotFound { .. } => ErrorCode::LeaseNotFound,
            Self::LeaseExists { .. } => ErrorCode::LeaseExists,
            Self::SessionExpired { .. } => ErrorCode::SessionExpired,
            Self::AlreadyAcknowledged { .. } | Self::AnswerNotKept { .. } => ErrorCode::AlreadyAcknowledged,
            Self::TooManySessions | Self::BeyondWindow { .. } | Self::TooManyAnswers => ErrorCode::ResourceExhausted,
            Self::Compacted { .. } => ErrorCode::Compacted,
            Self::FutureRevision { .. } => ErrorCode::FutureRevision,
        }
    }

    /// What became of the command.
    #[must_use]
    pub fn outcome(&self) -> v1::Outcome {
        match self {
            Self::AlreadyAcknowledged { .. } => v1::Outcome::Unknown,
            Self::AnswerNotKept { .. } => v1::Outcome::Applied,
            _ => v1::Outcome::NotApplied,
        }
    }

    /// The revision that the details of the error carry, if they do.
    #[must_use]
    pub fn revision(&self) -> Option<Revision> {
        match self {
            Self::Compacted { minimum, .. } => Some(*minimum),
            Self::FutureRevision { current, .. } => Some(*current),
            _ => None,
        }
    }
}

impl From<KvError> for v1::CommandError {
    fn from(refusal: KvError) -> Self {
        let outcome = match refusal.outcome() {
            v1::Outcome::NotApplied => v1::Outcome::Unspecified,
            outcome => outcome,
        };
        let code = refusal.code().number().unsigned_abs();
        Self { code, message: refusal.to_string(), outcome: outcome.into() }
    }
}

/// Why a read of the history has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The request makes no sense.
    #[error(transparent)]
    Refused(#[from] KvError),
    /// The history cannot be read.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The revision is applied, but did not reach the history in time.
    #[error("revision {requested} did not become readable in time: the history is written up to {written}")]
    NotWritten {
        /// The revision asked for.
        requested: Revision,
        /// The last one the history has.
        written: Revision,
    },
}

impl ReadError {
    /// The code that callers act on.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Refused(refused) => refused.code(),
            Self::Storage(_) => ErrorCode::Internal,
            Self::NotWritten { .. } => ErrorCode::DeadlineExceeded,
        }
    }
}

/// A key as messages show it: escaped, and cut if it is long.
#[derive(Clone, PartialEq, Eq)]
pub struct KeyText(String);

impl KeyText {
    /// Bytes shown at most.
    const BYTES_MAX: usize = 64;

    pub(super) fn new(key: &[u8]) -> Self {
        match key.get(..Self::BYTES_MAX) {
            Some(head) if head.len() < key.len() => {
                Self(format!("\"{}...\" ({} bytes)", head.escape_ascii(), key.len()))
            }
            _ => Self(format!("\"{}\"", key.escape_ascii())),
        }
    }
}

impl fmt::Display for KeyText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for KeyText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
