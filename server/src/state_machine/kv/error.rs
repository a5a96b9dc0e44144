//! Why the store refuses a command or a read.

use std::fmt;

use d_engine_proto::{ErrorCode, Revision, limits, v1};

use crate::storage::StorageError;

/// A refusal; nothing changed. Each names what is wrong and what would be right.
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
    /// A lease that the key should be attached to.
    #[error("lease {lease} cannot be attached: this version has no leases")]
    NoLeases {
        /// The lease asked for.
        lease: u64,
    },
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
            | Self::Undecodable { .. } => ErrorCode::InvalidArgument,
            Self::NoLeases { .. } | Self::NoQueries => ErrorCode::Unsupported,
            Self::Compacted { .. } => ErrorCode::Compacted,
            Self::FutureRevision { .. } => ErrorCode::FutureRevision,
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
        Self { code: refusal.code().number().unsigned_abs(), message: refusal.to_string(), ..Self::default() }
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
