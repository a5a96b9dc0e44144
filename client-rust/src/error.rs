//! The one error of the client: what happened, what became of the request, and what to do about it.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use d_engine_proto::{ErrorCode, Revision, v1};

use crate::cluster::Leader;

/// What a caller acts on. Mirrors the protocol's error codes and adds what only a client can meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The request is malformed or exceeds a fixed bound of the data model.
    InvalidArgument,
    /// The node asked is not the leader, and the operation is served by the leader only.
    NotLeader,
    /// No node could serve: no leader, no quorum, starting, stopping, or unreachable.
    Unavailable,
    /// A node was asked, and did not answer within the call's budget.
    DeadlineExceeded,
    /// A limit is reached; [`Error::to_string`] names it.
    ResourceExhausted,
    /// The revision asked for is older than the oldest one kept, which is [`Error::revision`].
    Compacted,
    /// The revision asked for has not been issued yet.
    FutureRevision,
    /// No node reached the asked minimum revision in time.
    Behind,
    /// The leader was deposed after it had accepted the write; a successor may still commit it.
    LeadershipLost,
    /// The server's configuration forbids what was asked, such as choosing the consistency of a read.
    FailedPrecondition,
    /// A node answered that belongs to another cluster or another restore epoch than the one first met.
    WrongCluster,
    /// The server does not implement the operation.
    Unsupported,
    /// The node met a fault of its own and stopped serving.
    Internal,
    /// The lease does not exist: it has expired, was revoked, or was never granted.
    LeaseNotFound,
    /// A lease with the id asked for exists already.
    LeaseExists,
    /// The client's session ended before the call was answered. It surfaces only if the call may have been sent before:
    /// otherwise the client goes on under a new session.
    SessionExpired,
    /// The call was answered before, and the answer is no longer kept, or was too large to be. [`Error::outcome`] says
    /// what is known of it.
    AlreadyAcknowledged,
    /// The call was given up on request; see [`Client::cancelled_by`](crate::Client::cancelled_by).
    Cancelled,
    /// The client was closed.
    Closed,
    /// The server sent an error code that this version of the client does not know.
    Unrecognized,
}

impl ErrorKind {
    fn code(self) -> Option<ErrorCode> {
        Some(match self {
            Self::InvalidArgument => ErrorCode::InvalidArgument,
            Self::NotLeader => ErrorCode::NotLeader,
            Self::Unavailable => ErrorCode::Unavailable,
            Self::DeadlineExceeded => ErrorCode::DeadlineExceeded,
            Self::ResourceExhausted => ErrorCode::ResourceExhausted,
            Self::Compacted => ErrorCode::Compacted,
            Self::FutureRevision => ErrorCode::FutureRevision,
            Self::Behind => ErrorCode::Behind,
            Self::LeadershipLost => ErrorCode::LeadershipLost,
            Self::FailedPrecondition => ErrorCode::FailedPrecondition,
            Self::WrongCluster => ErrorCode::WrongCluster,
            Self::Unsupported => ErrorCode::Unsupported,
            Self::Internal => ErrorCode::Internal,
            Self::LeaseNotFound => ErrorCode::LeaseNotFound,
            Self::LeaseExists => ErrorCode::LeaseExists,
            Self::SessionExpired => ErrorCode::SessionExpired,
            Self::AlreadyAcknowledged => ErrorCode::AlreadyAcknowledged,
            Self::Cancelled => ErrorCode::Cancelled,
            Self::Closed | Self::Unrecognized => return None,
        })
    }

    /// Whether what keeps a read from being served may be over with time, so that it is worth to go on trying.
    pub(crate) fn may_pass(self) -> bool {
        match self {
            Self::NotLeader
            | Self::Unavailable
            | Self::DeadlineExceeded
            | Self::ResourceExhausted
            | Self::Compacted
            | Self::Behind
            | Self::LeadershipLost
            | Self::Internal => true,
            Self::InvalidArgument
            | Self::FutureRevision
            | Self::FailedPrecondition
            | Self::WrongCluster
            | Self::Unsupported
            | Self::LeaseNotFound
            | Self::LeaseExists
            | Self::SessionExpired
            | Self::AlreadyAcknowledged
            | Self::Cancelled
            | Self::Closed
            | Self::Unrecognized => false,
        }
    }

    /// The name, the same in every language.
    #[must_use]
    pub fn name(self) -> &'static str {
        match (self, self.code()) {
            (_, Some(code)) => code.name(),
            (Self::Closed, None) => "Closed",
            (_, None) => "Unrecognized",
        }
    }

    /// What the caller can do about it, in one sentence.
    #[must_use]
    pub fn remedy(self) -> &'static str {
        match (self, self.code()) {
            (_, Some(code)) => code.remedy(),
            (Self::Closed, None) => "Build a new client.",
            (_, None) => "Upgrade the client to the version of the server.",
        }
    }
}

impl From<Option<ErrorCode>> for ErrorKind {
    fn from(code: Option<ErrorCode>) -> Self {
        match code {
            Some(ErrorCode::InvalidArgument) => Self::InvalidArgument,
            Some(ErrorCode::NotLeader) => Self::NotLeader,
            Some(ErrorCode::Unavailable) => Self::Unavailable,
            Some(ErrorCode::DeadlineExceeded) => Self::DeadlineExceeded,
            Some(ErrorCode::ResourceExhausted) => Self::ResourceExhausted,
            Some(ErrorCode::Compacted) => Self::Compacted,
            Some(ErrorCode::FutureRevision) => Self::FutureRevision,
            Some(ErrorCode::Behind) => Self::Behind,
            Some(ErrorCode::LeadershipLost) => Self::LeadershipLost,
            Some(ErrorCode::FailedPrecondition) => Self::FailedPrecondition,
            Some(ErrorCode::WrongCluster) => Self::WrongCluster,
            Some(ErrorCode::Unsupported) => Self::Unsupported,
            Some(ErrorCode::Internal) => Self::Internal,
            Some(ErrorCode::LeaseNotFound) => Self::LeaseNotFound,
            Some(ErrorCode::LeaseExists) => Self::LeaseExists,
            Some(ErrorCode::SessionExpired) => Self::SessionExpired,
            Some(ErrorCode::AlreadyAcknowledged) => Self::AlreadyAcknowledged,
            Some(ErrorCode::Cancelled) => Self::Cancelled,
            _ => Self::Unrecognized,
        }
    }
}

/// What became of the request that an error answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Certainly not applied, now or later. A read that failed is always this.
    NotApplied,
    /// Applied; only the answer failed.
    Applied,
    /// Applied, not applied, or yet to be applied.
    Unknown,
}

impl From<v1::Outcome> for Outcome {
    fn from(outcome: v1::Outcome) -> Self {
        match outcome {
            v1::Outcome::NotApplied => Self::NotApplied,
            v1::Outcome::Applied => Self::Applied,
            v1::Outcome::Unknown | v1::Outcome::Unspecified => Self::Unknown,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotApplied => "not applied",
            Self::Applied => "applied",
            Self::Unknown => "unknown",
        })
    }
}

/// Why a call failed.
///
/// Its display text names the cause, the outcome and the remedy; it is for people and may change. Programs act on
/// [`kind`](Self::kind) and [`outcome`](Self::outcome).
#[derive(Clone)]
pub struct Error(Box<Inner>);

#[derive(Clone, Debug)]
struct Inner {
    kind: ErrorKind,
    outcome: Outcome,
    operation: &'static str,
    message: String,
    endpoint: Option<String>,
    leader: Option<Leader>,
    revision: Option<Revision>,
    source: Option<Arc<dyn StdError + Send + Sync>>,
}

impl Error {
    pub(crate) fn new(operation: &'static str, kind: ErrorKind, outcome: Outcome, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            outcome,
            operation,
            message: message.into(),
            endpoint: None,
            leader: None,
            revision: None,
            source: None,
        }))
    }

    pub(crate) fn invalid(operation: &'static str, message: impl Into<String>) -> Self {
        Self::new(operation, ErrorKind::InvalidArgument, Outcome::NotApplied, message)
    }

    pub(crate) fn closed(operation: &'static str) -> Self {
        Self::new(operation, ErrorKind::Closed, Outcome::NotApplied, "the client was closed")
    }

    pub(crate) fn cancelled(operation: &'static str) -> Self {
        Self::new(operation, ErrorKind::Cancelled, Outcome::NotApplied, "the call was cancelled")
    }

    /// The same, of an operation that needed this one for something.
    pub(crate) fn of(mut self, operation: &'static str, need: &str) -> Self {
        self.0.message = format!("{need}: {}", self.0.message);
        self.0.operation = operation;
        self
    }

    /// The same, of a call that was sent before and may have been applied then.
    pub(crate) fn in_doubt(mut self) -> Self {
        if self.0.outcome == Outcome::NotApplied {
            self.0.outcome = Outcome::Unknown;
        }
        self
    }

    pub(crate) fn at(mut self, endpoint: &str) -> Self {
        self.0.endpoint = Some(endpoint.to_owned());
        self
    }

    /// Adds for how long it was tried.
    pub(crate) fn after(mut self, effort: String) -> Self {
        self.0.message = format!("{} (after {effort})", self.0.message);
        self
    }

    pub(crate) fn with_leader(mut self, leader: Option<Leader>) -> Self {
        self.0.leader = leader;
        self
    }

    pub(crate) fn with_revision(mut self, revision: u64) -> Self {
        self.0.revision = (revision != 0).then_some(Revision(revision));
        self
    }

    pub(crate) fn with_source(mut self, source: Option<Arc<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = source;
        self
    }

    /// What a caller acts on.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// What became of the request.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        self.0.outcome
    }

    /// The operation that failed, such as `put`.
    #[must_use]
    pub fn operation(&self) -> &'static str {
        self.0.operation
    }

    /// The cause alone, for people.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The endpoint of the last attempt; `None` if none was made.
    #[must_use]
    pub fn endpoint(&self) -> Option<&str> {
        self.0.endpoint.as_deref()
    }

    /// The leader that the answering node named.
    #[must_use]
    pub fn leader(&self) -> Option<&Leader> {
        self.0.leader.as_ref()
    }

    /// With [`ErrorKind::Compacted`]: the oldest revision left. With [`ErrorKind::Behind`] and
    /// [`ErrorKind::FutureRevision`]: the revision the answering node had applied.
    #[must_use]
    pub fn revision(&self) -> Option<Revision> {
        self.0.revision
    }

    /// What the caller can do about it, in one sentence.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self.0.outcome {
            Outcome::Unknown => "The write may take effect, now or later: read the key before writing again.",
            Outcome::Applied => "The write took effect; do not send it again.",
            Outcome::NotApplied if self.0.kind == ErrorKind::DeadlineExceeded => {
                "Allow more time; if it lasts, check that a majority of the members runs and is reachable."
            }
            Outcome::NotApplied => self.0.kind.remedy(),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { operation, kind, message, outcome, endpoint, .. } = &*self.0;
        write!(f, "{operation} failed ({}): ", kind.name())?;
        if let Some(endpoint) = endpoint {
            write!(f, "{endpoint}: ")?;
        }
        write!(f, "{message}. Outcome: {outcome}. {}", self.remedy())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_a_kind_of_the_same_name() {
        for code in ErrorCode::ALL {
            assert_eq!(ErrorKind::from(Some(*code)).name(), code.name());
        }
        assert_eq!(ErrorKind::from(None), ErrorKind::Unrecognized);
    }

    #[test]
    fn the_text_names_cause_outcome_and_remedy() {
        let error = Error::new("put", ErrorKind::Unavailable, Outcome::NotApplied, "connection refused").at("n1:9081");
        let text = error.to_string();
        assert_eq!(
            text,
            "put failed (Unavailable): n1:9081: connection refused. Outcome: not applied. Retry with backoff; if it \
             lasts, check that a majority of the members runs and is connected."
        );
        let unknown = Error::new("put", ErrorKind::Unavailable, Outcome::Unknown, "connection lost");
        assert!(unknown.to_string().contains("read the key before writing again"));
    }
}
