//! The checks at the door. A request that passes them can be applied or read without surprise; what fails them is
//! refused before it costs a log entry.
//!
//! Commands are checked again when they are applied, since the log may hold what another version let through. A rule
//! is therefore part of what every replica must agree on: changing one needs care in a cluster of mixed versions.

use std::collections::BTreeSet;

use bytes::Bytes;
use d_engine_proto::limits;
use d_engine_proto::v1::{self, command, txn_operation::Operation};

use super::error::{KeyText, KvError};

/// Checks a command before it is proposed.
///
/// # Errors
/// The first rule broken.
pub fn validate(command: &v1::Command) -> Result<(), KvError> {
    match required(command.command.as_ref(), "command")? {
        command::Command::Put(put) => validate_put(put),
        command::Command::Delete(delete) => validate_key(&delete.key, "key"),
        command::Command::DeleteRange(delete) => validate_range_bounds(delete.range.as_ref()),
        command::Command::CompareAndSwap(swap) => {
            validate_key(&swap.key, "key")?;
            validate_lease(swap.lease)
        }
        command::Command::Txn(txn) => {
            if has_options(txn.read.as_ref()) {
                return Err(KvError::MisplacedReadOptions);
            }
            validate_txn(txn)
        }
        _ => Err(KvError::NoQueries),
    }
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

fn validate_key(key: &[u8], field: &'static str) -> Result<(), KvError> {
    match key.len() as u64 {
        0 => Err(KvError::EmptyKey { field }),
        bytes if bytes > limits::KEY_BYTES_MAX => Err(KvError::KeyTooLong { field, bytes }),
        _ => Ok(()),
    }
}

fn validate_put(put: &v1::PutRequest) -> Result<(), KvError> {
    validate_key(&put.key, "key")?;
    validate_lease(put.lease)
}

fn validate_lease(lease: u64) -> Result<(), KvError> {
    if lease == 0 { Ok(()) } else { Err(KvError::NoLeases { lease }) }
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
            Operation::Put(put) => validate_put(put)?,
            Operation::Get(get) => {
                refuse_options(get.read.as_ref())?;
                validate_get(get)?;
            }
            Operation::Range(range) => {
                refuse_options(range.read.as_ref())?;
                validate_range(range)?;
            }
            Operation::Delete(delete) => validate_key(&delete.key, "key")?,
            Operation::DeleteRange(delete) => validate_range_bounds(delete.range.as_ref())?,
            Operation::Txn(nested) => {
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
