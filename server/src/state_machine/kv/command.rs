//! Commands and queries as the store understands them, converted by hand from what the wire and the log carry. A value
//! of these types passed every rule that concerns it alone.

use bytes::Bytes;
use d_engine_proto::v1::{self, compare, txn_operation};
use d_engine_proto::{LeaseId, Revision, SessionId, defaults};
use prost::Message;

use super::error::KvError;
use super::rules::{self, required};
use crate::storage::versions::ScanOrder;

/// A command as the log carries it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Proposal {
    /// `None`: the command is applied as often as it comes.
    pub(super) call: Option<Call>,
    pub(super) command: Command,
    /// Without effect; handed out to whoever records the trace.
    pub(super) trace: Option<v1::TraceContext>,
}

/// What makes a command exactly-once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Call {
    pub(super) session: SessionId,
    pub(super) sequence: u64,
    pub(super) acknowledged_through: u64,
    pub(super) payload_hash: u64,
}

/// A change to the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Command {
    Write(Write),
    CompareAndSwap(CompareAndSwap),
    Txn(Txn),
    /// `chosen`: the id it shall have, else the store gives one.
    GrantLease {
        ttl_ms: u64,
        chosen: Option<LeaseId>,
    },
    RevokeLease(LeaseId),
    RenewLeases(Vec<LeaseId>),
    RegisterSession {
        ttl_ms: u64,
    },
    RenewSession(SessionId),
    CloseSession(SessionId),
    /// Forgets the history before the revision.
    Compact(Revision),
    Tick,
    /// Without effect; the state after it is compared between members.
    StateCheck,
}

/// A write without a condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Write {
    Put { key: Bytes, value: Bytes, attachment: Attachment, return_previous: bool },
    Delete { key: Bytes, return_previous: bool },
    DeleteRange { interval: Interval, return_previous: bool },
}

/// The lease that a put attaches its key to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attachment {
    None,
    Lease(LeaseId),
    /// One made by the put, which ends with the key's next put or deletion.
    OwnLease {
        ttl_ms: u64,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CompareAndSwap {
    pub(super) key: Bytes,
    /// `None`: the key must not exist.
    pub(super) expected: Option<Bytes>,
    pub(super) value: Bytes,
    pub(super) attachment: Attachment,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Txn {
    pub(super) compare: Vec<Compare>,
    pub(super) then: Vec<Operation>,
    pub(super) otherwise: Vec<Operation>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Get(Bytes),
    Range(RangeQuery),
    Write(Write),
    Txn(Txn),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Compare {
    pub(super) key: Bytes,
    pub(super) relation: compare::Relation,
    pub(super) target: Target,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    Value(Bytes),
    Version(u64),
    CreateRevision(Revision),
    ModRevision(Revision),
    Lease(u64),
}

/// The keys from `start` (inclusive) to `end` (exclusive; `None`: to the last).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Interval {
    pub(super) start: Bytes,
    pub(super) end: Option<Bytes>,
}

/// What to return of an interval.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RangeQuery {
    pub(super) interval: Interval,
    /// `None`: as many keys as fit in a page.
    pub(super) limit: Option<u64>,
    pub(super) order: ScanOrder,
    pub(super) part: RangePart,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RangePart {
    KeysAndValues,
    Keys,
    Count,
}

impl Proposal {
    /// Reads a command from the log.
    pub(super) fn decode(bytes: &Bytes) -> Result<Self, KvError> {
        let command =
            v1::Command::decode(bytes.clone()).map_err(|error| KvError::Undecodable { message: error.to_string() })?;
        Self::try_from(command)
    }
}

impl TryFrom<v1::Command> for Proposal {
    type Error = KvError;

    fn try_from(proposed: v1::Command) -> Result<Self, KvError> {
        rules::validate(&proposed)?;
        let v1::Command { command, session, payload_hash, trace } = proposed;
        let call = session.map(|v1::SessionCall { session, sequence, acknowledged_through }| Call {
            session: SessionId(session),
            sequence,
            acknowledged_through,
            payload_hash,
        });
        Ok(Self { call, command: required(command, "command")?.try_into()?, trace })
    }
}

impl TryFrom<v1::command::Command> for Command {
    type Error = KvError;

    fn try_from(command: v1::command::Command) -> Result<Self, KvError> {
        use v1::command::Command as Wire;
        Ok(match command {
            Wire::Put(put) => Self::Write(Write::from(put)),
            Wire::Delete(delete) => Self::Write(Write::from(delete)),
            Wire::DeleteRange(delete) => Self::Write(Write::try_from(delete)?),
            Wire::CompareAndSwap(v1::CompareAndSwapRequest { key, expected, value, lease, .. }) => {
                Self::CompareAndSwap(CompareAndSwap { key, expected, value, attachment: Attachment::new(lease, 0) })
            }
            Wire::Txn(txn) => Self::Txn(Txn::convert(txn)?),
            Wire::LeaseGrant(v1::LeaseGrantRequest { ttl_ms, lease, .. }) => {
                Self::GrantLease { ttl_ms, chosen: Some(LeaseId(lease)).filter(|lease| *lease != LeaseId(0)) }
            }
            Wire::LeaseRevoke(revoke) => Self::RevokeLease(LeaseId(revoke.lease)),
            Wire::LeaseRenewals(renewals) => Self::RenewLeases(renewals.leases.into_iter().map(LeaseId).collect()),
            Wire::SessionRegister(v1::SessionRegisterRequest { ttl_ms: 0 }) => {
                Self::RegisterSession { ttl_ms: defaults::SESSION_TTL_MS }
            }
            Wire::SessionRegister(v1::SessionRegisterRequest { ttl_ms }) => Self::RegisterSession { ttl_ms },
            Wire::SessionRenew(renew) => Self::RenewSession(SessionId(renew.session)),
            Wire::SessionClose(close) => Self::CloseSession(SessionId(close.session)),
            Wire::Compact(compact) => match required(compact.target, "target")? {
                v1::compact_request::Target::Revision(revision) => Self::Compact(Revision(revision)),
                v1::compact_request::Target::OlderThanMs(_) => return Err(KvError::CompactByAge),
            },
            Wire::Tick(v1::Tick {}) => Self::Tick,
            Wire::StateCheck(v1::StateCheck {}) => Self::StateCheck,
        })
    }
}

impl Attachment {
    /// At most one of the two is set.
    fn new(lease: u64, ttl_ms: u64) -> Self {
        match (lease, ttl_ms) {
            (0, 0) => Self::None,
            (0, ttl_ms) => Self::OwnLease { ttl_ms },
            (lease, _) => Self::Lease(LeaseId(lease)),
        }
    }
}

impl From<v1::PutRequest> for Write {
    fn from(put: v1::PutRequest) -> Self {
        let v1::PutRequest { key, value, lease, ttl_ms, return_previous, .. } = put;
        Self::Put { key, value, attachment: Attachment::new(lease, ttl_ms), return_previous }
    }
}

impl From<v1::DeleteRequest> for Write {
    fn from(delete: v1::DeleteRequest) -> Self {
        Self::Delete { key: delete.key, return_previous: delete.return_previous }
    }
}

impl TryFrom<v1::DeleteRangeRequest> for Write {
    type Error = KvError;

    fn try_from(delete: v1::DeleteRangeRequest) -> Result<Self, KvError> {
        let interval = Interval::from(required(delete.range, "range")?);
        Ok(Self::DeleteRange { interval, return_previous: delete.return_previous })
    }
}

impl From<v1::KeyRange> for Interval {
    fn from(range: v1::KeyRange) -> Self {
        Self { start: range.start, end: Some(range.end).filter(|end| !end.is_empty()) }
    }
}

impl RangeQuery {
    /// Checks and converts a request; its read options are the caller's business.
    pub(super) fn new(request: &v1::RangeRequest) -> Result<Self, KvError> {
        rules::validate_range(request)?;
        Self::convert(request.clone())
    }

    fn convert(request: v1::RangeRequest) -> Result<Self, KvError> {
        let order = match request.order() {
            v1::RangeOrder::Ascending => ScanOrder::Ascending,
            v1::RangeOrder::Descending => ScanOrder::Descending,
        };
        let part = match (request.keys_only, request.count_only) {
            (_, true) => RangePart::Count,
            (true, false) => RangePart::Keys,
            (false, false) => RangePart::KeysAndValues,
        };
        let limit = Some(request.limit).filter(|limit| *limit > 0);
        Ok(Self { interval: required(request.range, "range")?.into(), limit, order, part })
    }
}

impl Txn {
    /// Checks and converts a request; its read options are the caller's business.
    pub(super) fn new(request: &v1::TxnRequest) -> Result<Self, KvError> {
        rules::validate_txn(request)?;
        Self::convert(request.clone())
    }

    fn convert(request: v1::TxnRequest) -> Result<Self, KvError> {
        Ok(Self {
            compare: request.compare.into_iter().map(Compare::convert).collect::<Result<_, _>>()?,
            then: request.then.into_iter().map(Operation::convert).collect::<Result<_, _>>()?,
            otherwise: request.otherwise.into_iter().map(Operation::convert).collect::<Result<_, _>>()?,
        })
    }

    /// Whether applying it can fail after it has changed something: its answer may grow too large, or a lease may not
    /// exist. The usual ones either write or return what is there.
    pub(super) fn may_fail_halfway(&self) -> bool {
        [&self.then, &self.otherwise]
            .into_iter()
            .any(|branch| branch.iter().any(Operation::writes) && branch.iter().any(Operation::may_fail))
    }

    fn operations(&self) -> impl Iterator<Item = &Operation> {
        self.then.iter().chain(&self.otherwise)
    }
}

impl Operation {
    fn writes(&self) -> bool {
        match self {
            Self::Get(_) | Self::Range(_) => false,
            Self::Write(_) => true,
            Self::Txn(nested) => nested.operations().any(Self::writes),
        }
    }

    /// Whether it returns keys or attaches one to a lease.
    fn may_fail(&self) -> bool {
        match self {
            Self::Get(_) | Self::Range(_) => true,
            Self::Write(Write::Put { attachment: Attachment::Lease(_), .. }) => true,
            Self::Write(
                Write::Put { return_previous, .. }
                | Write::Delete { return_previous, .. }
                | Write::DeleteRange { return_previous, .. },
            ) => *return_previous,
            Self::Txn(nested) => nested.operations().any(Self::may_fail),
        }
    }

    fn convert(operation: v1::TxnOperation) -> Result<Self, KvError> {
        use txn_operation::Operation as Wire;
        Ok(match required(operation.operation, "operation")? {
            Wire::Put(put) => Self::Write(Write::from(put)),
            Wire::Get(get) => Self::Get(get.key),
            Wire::Range(range) => Self::Range(RangeQuery::convert(range)?),
            Wire::Delete(delete) => Self::Write(Write::from(delete)),
            Wire::DeleteRange(delete) => Self::Write(Write::try_from(delete)?),
            Wire::Txn(nested) => Self::Txn(Txn::convert(nested)?),
        })
    }
}

impl Compare {
    fn convert(compare: v1::Compare) -> Result<Self, KvError> {
        use compare::Target as Wire;
        let relation = compare.relation();
        let target = match required(compare.target, "target of a comparison")? {
            Wire::Value(value) => Target::Value(value),
            Wire::Version(version) => Target::Version(version),
            Wire::CreateRevision(revision) => Target::CreateRevision(Revision(revision)),
            Wire::ModRevision(revision) => Target::ModRevision(Revision(revision)),
            Wire::Lease(lease) => Target::Lease(lease),
        };
        Ok(Self { key: compare.key, relation, target })
    }
}
