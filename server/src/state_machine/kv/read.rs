//! Reads and transactions, the same whether they are served from memory or from the history.

use d_engine_proto::v1::compare::Relation;
use d_engine_proto::v1::{self, command_reply::Reply, txn_result};

use super::command::{Compare, Operation, RangeQuery, Target, Txn, Write};
use super::error::KvError;
use super::room::Room;
use crate::storage::versions::KeyVersion;

/// The keys as of one moment.
pub(super) trait Source {
    /// Why reading can fail.
    type Error: From<KvError>;

    fn get(&self, key: &[u8]) -> Result<Option<KeyVersion>, Self::Error>;

    /// One page of an interval, in whose answer it takes room.
    fn range(&self, query: &RangeQuery, room: &mut Room) -> Result<v1::RangeResponse, Self::Error>;

    /// Writes, where that is possible; reads see it from then on. What it returns takes room; without room nothing is
    /// written.
    fn write(&mut self, _write: Write, _room: &mut Room) -> Result<Written, Self::Error> {
        Err(KvError::NotReadOnly.into())
    }
}

/// The answer of a write, by itself or within a transaction.
pub(super) enum Written {
    Put(v1::PutResponse),
    Delete(v1::DeleteResponse),
    DeleteRange(v1::DeleteRangeResponse),
}

impl From<Written> for Reply {
    fn from(written: Written) -> Self {
        match written {
            Written::Put(put) => Self::Put(put),
            Written::Delete(delete) => Self::Delete(delete),
            Written::DeleteRange(delete) => Self::DeleteRange(delete),
        }
    }
}

impl From<Written> for txn_result::Result {
    fn from(written: Written) -> Self {
        match written {
            Written::Put(put) => Self::Put(put),
            Written::Delete(delete) => Self::Delete(delete),
            Written::DeleteRange(delete) => Self::DeleteRange(delete),
        }
    }
}

pub(super) fn get<S: Source>(source: &S, request: &v1::GetRequest) -> Result<v1::GetResponse, S::Error> {
    get_within(source, &request.key, &mut Room::default())
}

fn get_within<S: Source>(source: &S, key: &[u8], room: &mut Room) -> Result<v1::GetResponse, S::Error> {
    let kv = source.get(key)?.map(|version| room.key_value(&version)).transpose()?;
    Ok(v1::GetResponse { header: None, kv })
}

pub(super) fn get_many<S: Source>(source: &S, request: &v1::GetManyRequest) -> Result<v1::GetManyResponse, S::Error> {
    let mut room = Room::default();
    let mut kvs = Vec::with_capacity(request.keys.len());
    for key in &request.keys {
        kvs.extend(get_within(source, key, &mut room)?.kv);
    }
    Ok(v1::GetManyResponse { header: None, kvs })
}

pub(super) fn range<S: Source>(source: &S, request: &v1::RangeRequest) -> Result<v1::RangeResponse, S::Error> {
    source.range(&RangeQuery::new(request)?, &mut Room::default())
}

/// A transaction that cannot write; one that can is refused.
pub(super) fn txn<S: Source>(source: &mut S, request: &v1::TxnRequest) -> Result<v1::TxnResponse, S::Error> {
    run(source, Txn::new(request)?, &mut Room::default())
}

/// Applies the branch that the comparisons choose, operation by operation. On an error the source may have taken some
/// of the writes: the caller takes them back.
pub(super) fn run<S: Source>(source: &mut S, txn: Txn, room: &mut Room) -> Result<v1::TxnResponse, S::Error> {
    let mut succeeded = true;
    for compare in &txn.compare {
        succeeded = succeeded && holds(compare, source.get(&compare.key)?.as_ref());
    }
    let branch = if succeeded { txn.then } else { txn.otherwise };
    let mut results = Vec::with_capacity(branch.len());
    for operation in branch {
        let result = match operation {
            Operation::Get(key) => txn_result::Result::Get(get_within(source, &key, room)?),
            Operation::Range(query) => txn_result::Result::Range(source.range(&query, room)?),
            Operation::Write(write) => source.write(write, room)?.into(),
            Operation::Txn(nested) => txn_result::Result::Txn(run(source, nested, room)?),
        };
        results.push(v1::TxnResult { result: Some(result) });
    }
    Ok(v1::TxnResponse { header: None, succeeded, results })
}

/// Whether a comparison holds. The numbers of a key that does not exist are 0, and it has no value: one that is not
/// there differs from every value and is neither less nor greater.
fn holds(compare: &Compare, held: Option<&KeyVersion>) -> bool {
    let number = |of: fn(&KeyVersion) -> u64| held.map_or(0, of);
    let ordering = match &compare.target {
        Target::Value(value) => match held {
            Some(held) => held.value.cmp(value),
            None => return compare.relation == Relation::NotEqual,
        },
        Target::Version(version) => number(|held| held.version).cmp(version),
        Target::CreateRevision(revision) => number(|held| held.create_revision.get()).cmp(&revision.get()),
        Target::ModRevision(revision) => number(|held| held.mod_revision.get()).cmp(&revision.get()),
        Target::Lease(lease) => number(|held| held.lease.get()).cmp(lease),
    };
    match compare.relation {
        Relation::Equal => ordering.is_eq(),
        Relation::NotEqual => ordering.is_ne(),
        Relation::Less => ordering.is_lt(),
        Relation::Greater => ordering.is_gt(),
    }
}
