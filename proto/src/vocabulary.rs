// Generated from proto/vocabulary.toml by `make generate`; change it there.

use crate::RetryWhere;

/// Why a request failed. A code exists only if a caller would act differently on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorCode {
    /// The request is malformed or exceeds a fixed bound of the data model.
    InvalidArgument,
    /// This node is not the leader, and the operation is served by the leader only.
    NotLeader,
    /// The node cannot serve now: no leader, no quorum, starting, stopping, or unreachable.
    Unavailable,
    /// The deadline of the call passed before its answer was known.
    DeadlineExceeded,
    /// A limit is reached: bytes of pending proposals, waiting reads, or bytes of a request.
    ResourceExhausted,
    /// The revision asked for is older than the oldest one kept.
    Compacted,
    /// The revision asked for has not been issued yet.
    FutureRevision,
    /// The node did not reach the asked minimum revision within the deadline.
    Behind,
    /// The leader was deposed after it had accepted the write; a successor may still commit it.
    LeadershipLost,
    /// The server's configuration or the state of the cluster forbids what was asked, such as overriding the read policy or removing a member that the quorum needs.
    FailedPrecondition,
    /// The answering node belongs to another cluster, to another restore epoch, or is not who it should be.
    WrongCluster,
    /// This server does not implement the operation.
    Unsupported,
    /// The node met a fault of its own, such as a failing disk, and stopped serving.
    Internal,
    /// The lease does not exist: it has expired, was revoked, or was never granted.
    LeaseNotFound,
    /// A lease with the id asked for exists already.
    LeaseExists,
    /// The session does not exist: it was not used for its time to live, or was closed.
    SessionExpired,
    /// The answer of this sequence is not kept: the client acknowledged it, or it was too large.
    AlreadyAcknowledged,
    /// The caller gave the operation up.
    Cancelled,
}

impl ErrorCode {
    /// Every code, by ascending number.
    pub const ALL: &'static [Self] = &[
        Self::InvalidArgument,
        Self::NotLeader,
        Self::Unavailable,
        Self::DeadlineExceeded,
        Self::ResourceExhausted,
        Self::Compacted,
        Self::FutureRevision,
        Self::Behind,
        Self::LeadershipLost,
        Self::FailedPrecondition,
        Self::WrongCluster,
        Self::Unsupported,
        Self::Internal,
        Self::LeaseNotFound,
        Self::LeaseExists,
        Self::SessionExpired,
        Self::AlreadyAcknowledged,
        Self::Cancelled,
    ];

    /// The number on the wire; never reused.
    #[must_use]
    pub const fn number(self) -> i32 {
        match self {
            Self::InvalidArgument => 1,
            Self::NotLeader => 2,
            Self::Unavailable => 3,
            Self::DeadlineExceeded => 4,
            Self::ResourceExhausted => 5,
            Self::Compacted => 6,
            Self::FutureRevision => 7,
            Self::Behind => 8,
            Self::LeadershipLost => 9,
            Self::FailedPrecondition => 10,
            Self::WrongCluster => 11,
            Self::Unsupported => 12,
            Self::Internal => 13,
            Self::LeaseNotFound => 14,
            Self::LeaseExists => 15,
            Self::SessionExpired => 16,
            Self::AlreadyAcknowledged => 17,
            Self::Cancelled => 18,
        }
    }

    /// The name, the same in every language.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::InvalidArgument => "InvalidArgument",
            Self::NotLeader => "NotLeader",
            Self::Unavailable => "Unavailable",
            Self::DeadlineExceeded => "DeadlineExceeded",
            Self::ResourceExhausted => "ResourceExhausted",
            Self::Compacted => "Compacted",
            Self::FutureRevision => "FutureRevision",
            Self::Behind => "Behind",
            Self::LeadershipLost => "LeadershipLost",
            Self::FailedPrecondition => "FailedPrecondition",
            Self::WrongCluster => "WrongCluster",
            Self::Unsupported => "Unsupported",
            Self::Internal => "Internal",
            Self::LeaseNotFound => "LeaseNotFound",
            Self::LeaseExists => "LeaseExists",
            Self::SessionExpired => "SessionExpired",
            Self::AlreadyAcknowledged => "AlreadyAcknowledged",
            Self::Cancelled => "Cancelled",
        }
    }

    /// What happened, in one sentence.
    #[must_use]
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::InvalidArgument => "The request is malformed or exceeds a fixed bound of the data model.",
            Self::NotLeader => "This node is not the leader, and the operation is served by the leader only.",
            Self::Unavailable => "The node cannot serve now: no leader, no quorum, starting, stopping, or unreachable.",
            Self::DeadlineExceeded => "The deadline of the call passed before its answer was known.",
            Self::ResourceExhausted => {
                "A limit is reached: bytes of pending proposals, waiting reads, or bytes of a request."
            }
            Self::Compacted => "The revision asked for is older than the oldest one kept.",
            Self::FutureRevision => "The revision asked for has not been issued yet.",
            Self::Behind => "The node did not reach the asked minimum revision within the deadline.",
            Self::LeadershipLost => {
                "The leader was deposed after it had accepted the write; a successor may still commit it."
            }
            Self::FailedPrecondition => {
                "The server's configuration or the state of the cluster forbids what was asked, such as overriding the read policy or removing a member that the quorum needs."
            }
            Self::WrongCluster => {
                "The answering node belongs to another cluster, to another restore epoch, or is not who it should be."
            }
            Self::Unsupported => "This server does not implement the operation.",
            Self::Internal => "The node met a fault of its own, such as a failing disk, and stopped serving.",
            Self::LeaseNotFound => "The lease does not exist: it has expired, was revoked, or was never granted.",
            Self::LeaseExists => "A lease with the id asked for exists already.",
            Self::SessionExpired => "The session does not exist: it was not used for its time to live, or was closed.",
            Self::AlreadyAcknowledged => {
                "The answer of this sequence is not kept: the client acknowledged it, or it was too large."
            }
            Self::Cancelled => "The caller gave the operation up.",
        }
    }

    /// What the caller can do about it.
    #[must_use]
    pub const fn remedy(self) -> &'static str {
        match self {
            Self::InvalidArgument => "Correct the field the message names.",
            Self::NotLeader => "Send it to the leader the details name; without a name, ask another member.",
            Self::Unavailable => {
                "Retry with backoff; if it lasts, check that a majority of the members runs and is connected."
            }
            Self::DeadlineExceeded => {
                "Read the outcome: after Unknown, read the key before writing again; then allow more time."
            }
            Self::ResourceExhausted => {
                "Back off as long as the details suggest, or stay below the limit the message names."
            }
            Self::Compacted => "Read at the minimum revision the details name, or at the current one.",
            Self::FutureRevision => "Read at a revision that an answer has carried.",
            Self::Behind => "Ask another node, or allow more time.",
            Self::LeadershipLost => "Read the key before writing again.",
            Self::FailedPrecondition => {
                "Do what the message names: drop the option, have the operator allow it, or bring the cluster into the state it asks for."
            }
            Self::WrongCluster => "Check the endpoints; they must all belong to one cluster.",
            Self::Unsupported => "Upgrade the server, or use an operation that its version has.",
            Self::Internal => "Look at the node's log; the other members go on.",
            Self::LeaseNotFound => "Grant a new lease, and attach the keys to it again.",
            Self::LeaseExists => "Choose another id, or let the server choose one.",
            Self::SessionExpired => {
                "If the call was sent before, read before writing again; register a new session for further calls."
            }
            Self::AlreadyAcknowledged => "Read the outcome; do not repeat a call after its answer was acknowledged.",
            Self::Cancelled => "Nothing: it was asked for.",
        }
    }

    /// The gRPC status code that carries it.
    #[must_use]
    pub fn grpc(self) -> tonic::Code {
        match self {
            Self::InvalidArgument => tonic::Code::InvalidArgument,
            Self::NotLeader => tonic::Code::Unavailable,
            Self::Unavailable => tonic::Code::Unavailable,
            Self::DeadlineExceeded => tonic::Code::DeadlineExceeded,
            Self::ResourceExhausted => tonic::Code::ResourceExhausted,
            Self::Compacted => tonic::Code::OutOfRange,
            Self::FutureRevision => tonic::Code::OutOfRange,
            Self::Behind => tonic::Code::Unavailable,
            Self::LeadershipLost => tonic::Code::Aborted,
            Self::FailedPrecondition => tonic::Code::FailedPrecondition,
            Self::WrongCluster => tonic::Code::FailedPrecondition,
            Self::Unsupported => tonic::Code::Unimplemented,
            Self::Internal => tonic::Code::Internal,
            Self::LeaseNotFound => tonic::Code::NotFound,
            Self::LeaseExists => tonic::Code::AlreadyExists,
            Self::SessionExpired => tonic::Code::FailedPrecondition,
            Self::AlreadyAcknowledged => tonic::Code::FailedPrecondition,
            Self::Cancelled => tonic::Code::Cancelled,
        }
    }

    /// Where the same request may be sent again, its outcome permitting.
    #[must_use]
    pub fn retry(self) -> RetryWhere {
        match self {
            Self::InvalidArgument => RetryWhere::Never,
            Self::NotLeader => RetryWhere::Leader,
            Self::Unavailable => RetryWhere::Leader,
            Self::DeadlineExceeded => RetryWhere::Here,
            Self::ResourceExhausted => RetryWhere::Here,
            Self::Compacted => RetryWhere::Never,
            Self::FutureRevision => RetryWhere::Never,
            Self::Behind => RetryWhere::Leader,
            Self::LeadershipLost => RetryWhere::Never,
            Self::FailedPrecondition => RetryWhere::Never,
            Self::WrongCluster => RetryWhere::Never,
            Self::Unsupported => RetryWhere::Never,
            Self::Internal => RetryWhere::Never,
            Self::LeaseNotFound => RetryWhere::Never,
            Self::LeaseExists => RetryWhere::Never,
            Self::SessionExpired => RetryWhere::Never,
            Self::AlreadyAcknowledged => RetryWhere::Never,
            Self::Cancelled => RetryWhere::Never,
        }
    }

    /// The code of a number; `None` for one from a newer version.
    #[must_use]
    pub fn from_number(number: i32) -> Option<Self> {
        Self::ALL.iter().copied().find(|code| code.number() == number)
    }
}

/// Bounds that are part of the protocol.
pub mod limits {
    /// Bytes of the encoded keys and values in one answer; a get-many or a transaction that would answer more is refused.
    pub const ANSWER_BYTES_MAX: u64 = 4128768;
    /// Keys of one get-many request.
    pub const GET_MANY_KEYS_MAX: u64 = 1024;
    /// Bytes of a key; a key has at least one.
    pub const KEY_BYTES_MAX: u64 = 65536;
    /// Leases of one page of a list; a longer list continues on the next page.
    pub const LEASE_PAGE_MAX: u64 = 10000;
    /// Longest time to live of a lease or of a key, in milliseconds: a year.
    pub const LEASE_TTL_MS_MAX: u64 = 31536000000;
    /// Shortest time to live of a lease or of a key, in milliseconds.
    pub const LEASE_TTL_MS_MIN: u64 = 100;
    /// Bytes of the operations, or of the answers, in one message of a pipeline, unless a single one is larger.
    pub const PIPELINE_BATCH_BYTES_MAX: u64 = 1048576;
    /// Bytes of one page of a range; a longer result continues on the next page.
    pub const RANGE_PAGE_BYTES_MAX: u64 = 1048576;
    /// Keys of one page of a range; a longer result continues on the next page.
    pub const RANGE_PAGE_KEYS_MAX: u64 = 10000;
    /// Bytes of an encoded request, its keys and values included.
    pub const REQUEST_BYTES_MAX: u64 = 1572864;
    /// Bytes of an answer that a session keeps for a repetition; of a larger one it only keeps that the call was applied.
    pub const SESSION_ANSWER_BYTES_MAX: u64 = 65536;
    /// Bytes of all answers that a session keeps; beyond it, further calls are refused until some are acknowledged.
    pub const SESSION_ANSWERS_BYTES_MAX: u64 = 4194304;
    /// Longest time to live of a session, in milliseconds: an hour.
    pub const SESSION_TTL_MS_MAX: u64 = 3600000;
    /// Shortest time to live of a session, in milliseconds.
    pub const SESSION_TTL_MS_MIN: u64 = 1000;
    /// Sequences of a session above the acknowledged one that may be used.
    pub const SESSION_WINDOW_CALLS: u64 = 4096;
    /// Sessions of a cluster; beyond it, registering another is refused until one expires or is closed.
    pub const SESSIONS_MAX: u64 = 100000;
    /// Nesting depth of a transaction; one without nesting has depth 1.
    pub const TXN_DEPTH_MAX: u64 = 8;
    /// Operations of a transaction, comparisons and nested ones included.
    pub const TXN_OPERATIONS_MAX: u64 = 128;
}

/// Defaults of options that every language's client has.
pub mod defaults {
    /// Upper bound of the first retry's jittered delay; it doubles with each retry.
    pub const CLIENT_BACKOFF_INITIAL_MS: u64 = 20;
    /// Upper bound of any retry's jittered delay.
    pub const CLIENT_BACKOFF_MAX_MS: u64 = 1000;
    /// Budget of one call, all attempts included.
    pub const CLIENT_CALL_TIMEOUT_MS: u64 = 5000;
    /// Budget of one attempt to connect to an endpoint.
    pub const CLIENT_CONNECT_TIMEOUT_MS: u64 = 1000;
    /// Time to live of a session that asks for none, in milliseconds.
    pub const SESSION_TTL_MS: u64 = 60000;
}
