//! The checks at the door. A request that passes them can be applied or read without surprise; what fails them is
//! refused before it costs a log entry.
//!
//! Commands are checked again when they are applied, since the log may hold what another version let through. A rule
//! is therefore part of what every replica must agree on: changing one needs care in a cluster of mixed versions.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use bytes::Bytes;
use d_engine_proto::v1::{self, command::Command, compact_request, txn_operation::Operation};
use d_engine_proto::{LeaseId, limits};

use super::error::{KeyText, KvError};

const LEASE_TTL_MS: RangeInclusive<u64> = limits::LEASE_TTL_MS_MIN..=limits::LEASE_TTL_MS_MAX;
const SESSION_TTL_MS: RangeInclusive<u64> = limits::SESSION_TTL_MS_MIN..=limits::SESSION_TTL_MS_MAX;

/// The greatest lease id that may be chosen. The store gives ids above all that were ever used: this leaves it enough.
pub(super) const CHOSEN_LEASE_MAX: u64 = u64::MAX / 2;

/// Checks a command before it is proposed. Its session, if it has one, stands beside it and not in the request.
///
/// # Errors
/// The first rule broken.
pub fn validate(command: &v1::Command) -> Result<(), KvError> {
    let session = command.session.as_ref();
    match required(command.command.as_ref(), "command")? {
        Command::Put(put) => {
            validate_session(session, put.session)?;
            validate_put(put)
        }
        Command::Delete(delete) => {
            validate_session(session, delete.session)?;
            validate_key(&delete.key, "key")
        }
        Command::DeleteRange(delete) => {
            validate_session(session, delete.session)?;
            validate_range_bounds(delete.range.as_ref())
        }
        Command::CompareAndSwap(swap) => {
            validate_session(session, swap.session)?;
            validate_key(&swap.key, "key")
        }
        Command::Txn(txn) => {
            validate_session(session, txn.session)?;
            if has_options(txn.read.as_ref()) {
                return Err(KvError::MisplacedReadOptions);
            }
            validate_txn(txn)
        }
        Command::LeaseGrant(grant) => {
            validate_session(session, grant.session)?;
            validate_lease_grant(grant)
        }
        Command::LeaseRevoke(revoke) => {
            validate_session(session, revoke.session)?;
            validate_id(revoke.lease, "lease")
        }
        Command::LeaseRenewals(_) | Command::Tick(_) | Command::StateCheck(_) => refuse_session(session),
        Command::SessionRegister(register) => {
            refuse_session(session)?;
            if register.ttl_ms == 0 { Ok(()) } else { validate_ttl(register.ttl_ms, SESSION_TTL_MS) }
        }
        Command::SessionRenew(renew) => {
            refuse_session(session)?;
            validate_id(renew.session, "session")
        }
        Command::SessionClose(close) => {
            refuse_session(session)?;
            validate_id(close.session, "session")
        }
        Command::Compact(compact) => {
            refuse_session(session)?;
            match required(compact.target.as_ref(), "target")? {
                compact_request::Target::Revision(_) => Ok(()),
                compact_request::Target::OlderThanMs(_) => Err(KvError::CompactByAge),
            }
        }
    }
}

/// Checks the renewal of one lease.
///
/// # Errors
/// The first rule broken.
pub fn validate_lease_renew(renew: &v1::LeaseRenewRequest) -> Result<(), KvError> {
    validate_id(renew.lease, "lease")
}

/// Checks a read of one lease.
///
/// # Errors
/// The first rule broken.
pub fn validate_lease_time_to_live(request: &v1::LeaseTimeToLiveRequest) -> Result<(), KvError> {
    validate_id(request.lease, "lease")?;
    validate_lease_read(request.read.as_ref())
}

/// Checks a listing of leases.
///
/// # Errors
/// The first rule broken.
pub fn validate_lease_list(request: &v1::LeaseListRequest) -> Result<(), KvError> {
    validate_lease_read(request.read.as_ref())
}

/// Checks a compaction, which may name an age: the log takes revisions only.
///
/// # Errors
/// The first rule broken.
pub fn validate_compact(request: &v1::CompactRequest) -> Result<(), KvError> {
    required(request.target.as_ref(), "target").map(drop)
}

/// Checks a read of one key.
///
/// # Errors
/// The first rule broken.
pub fn validate_get(get: &v1::GetRequest) -> Result<(), KvError> {
    validate_key(&get.key, "key")?;
    validate_read(get.read.as_ref())
}

/// Checks a read of several keys.
///
/// # Errors
/// The first rule broken.
pub fn validate_get_many(get: &v1::GetManyRequest) -> Result<(), KvError> {
    let keys = get.keys.len() as u64;
    if keys > limits::GET_MANY_KEYS_MAX {
        return Err(KvError::TooManyKeys { keys });
    }
    get.keys.iter().try_for_each(|key| validate_key(key, "key"))?;
    validate_read(get.read.as_ref())
}

/// Checks a read of an interval.
///
/// # Errors
/// The first rule broken.
pub fn validate_range(range: &v1::RangeRequest) -> Result<(), KvError> {
    validate_range_bounds(range.range.as_ref())?;
    validate_enum::<v1::RangeOrder>(range.order, "order")?;
    if range.keys_only && range.count_only {
        return Err(KvError::KeysOrCount);
    }
    validate_read(range.read.as_ref())
}

/// Checks a transaction, whether it writes or not.
///
/// # Errors
/// The first rule broken.
pub fn validate_txn(txn: &v1::TxnRequest) -> Result<(), KvError> {
    let operations = count_operations(txn, 1)?;
    if operations > limits::TXN_OPERATIONS_MAX {
        return Err(KvError::TooManyOperations { operations });
    }
    if has_options(txn.read.as_ref()) && !is_read_only(txn) {
        return Err(KvError::MisplacedReadOptions);
    }
    validate_read(txn.read.as_ref())?;
    validate_branches(txn)?;
    keys_put(txn).map(drop)
}

/// Whether a transaction cannot write, whichever branches are taken: it is served as a read and proposes nothing.
#[must_use]
pub fn is_read_only(txn: &v1::TxnRequest) -> bool {
    txn.then.iter().chain(&txn.otherwise).all(|operation| match &operation.operation {
        Some(Operation::Get(_) | Operation::Range(_)) | None => true,
        Some(Operation::Put(_) | Operation::Delete(_) | Operation::DeleteRange(_)) => false,
        Some(Operation::Txn(nested)) => is_read_only(nested),
    })
}

/// Unwraps a message that proto3 cannot mark as required.
pub(super) fn required<T>(message: Option<T>, field: &'static str) -> Result<T, KvError> {
    message.ok_or(KvError::Missing { field })
}

/// Checks a key.
///
/// # Errors
/// An empty key, or one that is too long.
pub(crate) fn validate_key(key: &[u8], field: &'static str) -> Result<(), KvError> {
    match key.len() as u64 {
        0 => Err(KvError::EmptyKey { field }),
        bytes if bytes > limits::KEY_BYTES_MAX => Err(KvError::KeyTooLong { field, bytes }),
        _ => Ok(()),
    }
}

fn validate_put(put: &v1::PutRequest) -> Result<(), KvError> {
    validate_key(&put.key, "key")?;
    if put.lease != 0 && put.ttl_ms != 0 {
        return Err(KvError::LeaseAndTtl);
    }
    if put.ttl_ms == 0 { Ok(()) } else { validate_ttl(put.ttl_ms, LEASE_TTL_MS) }
}

fn validate_lease_grant(grant: &v1::LeaseGrantRequest) -> Result<(), KvError> {
    if grant.lease > CHOSEN_LEASE_MAX {
        return Err(KvError::LeaseIdTooLarge { lease: LeaseId(grant.lease) });
    }
    validate_ttl(grant.ttl_ms, LEASE_TTL_MS)
}

fn validate_ttl(ttl_ms: u64, bounds: RangeInclusive<u64>) -> Result<(), KvError> {
    if bounds.contains(&ttl_ms) {
        return Ok(());
    }
    Err(KvError::TtlOutOfBounds { ttl_ms, min_ms: *bounds.start(), max_ms: *bounds.end() })
}

/// Neither leases nor sessions have the id 0.
fn validate_id(id: u64, field: &'static str) -> Result<(), KvError> {
    if id == 0 { Err(KvError::Missing { field }) } else { Ok(()) }
}

/// The session of a command that may have one. Left in the request it would have no effect.
fn validate_session(session: Option<&v1::SessionCall>, in_request: Option<v1::SessionCall>) -> Result<(), KvError> {
    refuse_session(in_request.as_ref())?;
    let Some(call) = session else { return Ok(()) };
    validate_id(call.session, "session")?;
    validate_id(call.sequence, "sequence")
}

fn refuse_session(session: Option<&v1::SessionCall>) -> Result<(), KvError> {
    if session.is_some() { Err(KvError::MisplacedSession) } else { Ok(()) }
}

/// The history does not tell which leases there were.
fn validate_lease_read(read: Option<&v1::ReadOptions>) -> Result<(), KvError> {
    if read.is_some_and(|read| read.revision != 0) {
        return Err(KvError::PastLeases);
    }
    validate_read(read)
}

/// An interval must be named, even that of all keys: a forgotten field must not delete the store. Its ends may be
/// longer than a key.
fn validate_range_bounds(range: Option<&v1::KeyRange>) -> Result<(), KvError> {
    let v1::KeyRange { start, end } = required(range, "range")?;
    if !end.is_empty() && end <= start {
        return Err(KvError::RangeReversed { start: KeyText::new(start), end: KeyText::new(end) });
    }
    Ok(())
}

fn validate_read(read: Option<&v1::ReadOptions>) -> Result<(), KvError> {
    read.map_or(Ok(()), |read| validate_enum::<v1::Consistency>(read.consistency, "consistency"))
}

fn validate_enum<E: TryFrom<i32>>(number: i32, field: &'static str) -> Result<(), KvError> {
    E::try_from(number).map(drop).map_err(|_| KvError::UnknownValue { field, number })
}

/// Options that say nothing count as unset.
fn has_options(read: Option<&v1::ReadOptions>) -> bool {
    read.is_some_and(|read| *read != v1::ReadOptions::default())
}

/// Comparisons and operations, nested ones included. Comes first: nothing else may recurse into a request before its
/// depth is known.
fn count_operations(txn: &v1::TxnRequest, depth: u64) -> Result<u64, KvError> {
    if depth > limits::TXN_DEPTH_MAX {
        return Err(KvError::NestedTooDeep);
    }
    let mut operations = (txn.compare.len() + txn.then.len() + txn.otherwise.len()) as u64;
    for operation in txn.then.iter().chain(&txn.otherwise) {
        if let Some(Operation::Txn(nested)) = &operation.operation {
            operations += count_operations(nested, depth + 1)?;
        }
    }
    Ok(operations)
}

fn validate_branches(txn: &v1::TxnRequest) -> Result<(), KvError> {
    txn.compare.iter().try_for_each(validate_compare)?;
    for operation in txn.then.iter().chain(&txn.otherwise) {
        match required(operation.operation.as_ref(), "operation")? {
            Operation::Put(put) => {
                refuse_session(put.session.as_ref())?;
                validate_put(put)?;
            }
            Operation::Get(get) => {
                refuse_options(get.read.as_ref())?;
                validate_get(get)?;
            }
            Operation::Range(range) => {
                refuse_options(range.read.as_ref())?;
                validate_range(range)?;
            }
            Operation::Delete(delete) => {
                refuse_session(delete.session.as_ref())?;
                validate_key(&delete.key, "key")?;
            }
            Operation::DeleteRange(delete) => {
                refuse_session(delete.session.as_ref())?;
                validate_range_bounds(delete.range.as_ref())?;
            }
            Operation::Txn(nested) => {
                refuse_session(nested.session.as_ref())?;
                refuse_options(nested.read.as_ref())?;
                validate_branches(nested)?;
            }
        }
    }
    Ok(())
}

fn validate_compare(compare: &v1::Compare) -> Result<(), KvError> {
    validate_key(&compare.key, "key of a comparison")?;
    validate_enum::<v1::compare::Relation>(compare.relation, "relation")?;
    required(compare.target.as_ref(), "target of a comparison").map(drop)
}

fn refuse_options(read: Option<&v1::ReadOptions>) -> Result<(), KvError> {
    if has_options(read) { Err(KvError::MisplacedReadOptions) } else { Ok(()) }
}

/// The keys a transaction may put. Two branches of one transaction may put the same key, since only one of them is
/// applied; any other two puts of a key could both take effect.
fn keys_put(txn: &v1::TxnRequest) -> Result<BTreeSet<&Bytes>, KvError> {
    let mut keys = keys_put_by(&txn.then)?;
    keys.append(&mut keys_put_by(&txn.otherwise)?);
    Ok(keys)
}

fn keys_put_by(branch: &[v1::TxnOperation]) -> Result<BTreeSet<&Bytes>, KvError> {
    let mut keys = BTreeSet::new();
    for operation in branch {
        let more = match &operation.operation {
            Some(Operation::Put(put)) => BTreeSet::from([&put.key]),
            Some(Operation::Txn(nested)) => keys_put(nested)?,
            _ => continue,
        };
        for key in more {
            if !keys.insert(key) {
                return Err(KvError::TwoPuts { key: KeyText::new(key) });
            }
        }
    }
    Ok(keys)
}
