//! Transactions: comparisons, and two lists of operations of which one is applied, atomically.

use std::future::IntoFuture;
use std::time::Duration;

use d_engine_proto::v1::{self, compare, txn_operation, txn_result};
use d_engine_proto::{LeaseId, Revision, limits};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use crate::client::Client;
use crate::cluster::Header;
use crate::error::{Error, ErrorKind, Outcome};
use crate::kv::{IntoBytes, KeyRange};
use crate::range::RangeResponse;
use crate::read::{GetResponse, ReadOptions, read_methods};
use crate::write::{DeleteRangeResponse, DeleteResponse, PutResponse, ttl_ms, write};

/// One condition of a transaction.
///
/// A key that does not exist has version, revisions and lease 0, and no value: a comparison of its value is false,
/// except [`value_not_equal`](Self::value_not_equal), which is true.
#[derive(Clone, Debug, PartialEq)]
pub struct Compare(v1::Compare);

/// How a transaction compares what a key has with what is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Relation {
    /// The same.
    Equal,
    /// Anything else.
    NotEqual,
    /// What the key has is smaller; values in byte order.
    Less,
    /// What the key has is greater; values in byte order.
    Greater,
}

impl Compare {
    fn new(key: impl IntoBytes, relation: Relation, target: compare::Target) -> Self {
        let relation = match relation {
            Relation::Equal => compare::Relation::Equal,
            Relation::NotEqual => compare::Relation::NotEqual,
            Relation::Less => compare::Relation::Less,
            Relation::Greater => compare::Relation::Greater,
        };
        Self(v1::Compare { key: key.into_bytes(), relation: relation.into(), target: Some(target) })
    }

    /// Compares the key's value.
    pub fn value(key: impl IntoBytes, relation: Relation, value: impl IntoBytes) -> Self {
        Self::new(key, relation, compare::Target::Value(value.into_bytes()))
    }

    /// Compares the number of changes since the key's creation.
    pub fn version(key: impl IntoBytes, relation: Relation, version: u64) -> Self {
        Self::new(key, relation, compare::Target::Version(version))
    }

    /// Compares the revision that created the key.
    pub fn create_revision(key: impl IntoBytes, relation: Relation, revision: Revision) -> Self {
        Self::new(key, relation, compare::Target::CreateRevision(revision.get()))
    }

    /// Compares the revision that last changed the key.
    pub fn mod_revision(key: impl IntoBytes, relation: Relation, revision: Revision) -> Self {
        Self::new(key, relation, compare::Target::ModRevision(revision.get()))
    }

    /// Compares the key's lease.
    pub fn lease(key: impl IntoBytes, relation: Relation, lease: LeaseId) -> Self {
        Self::new(key, relation, compare::Target::Lease(lease.get()))
    }

    /// The key holds this value.
    pub fn value_equal(key: impl IntoBytes, value: impl IntoBytes) -> Self {
        Self::value(key, Relation::Equal, value)
    }

    /// The key holds another value, or does not exist.
    pub fn value_not_equal(key: impl IntoBytes, value: impl IntoBytes) -> Self {
        Self::value(key, Relation::NotEqual, value)
    }

    /// The key exists.
    pub fn exists(key: impl IntoBytes) -> Self {
        Self::version(key, Relation::Greater, 0)
    }

    /// The key does not exist.
    pub fn missing(key: impl IntoBytes) -> Self {
        Self::version(key, Relation::Equal, 0)
    }
}

/// One operation of a transaction. Later ones see what earlier ones wrote.
#[derive(Clone, Debug, PartialEq)]
pub struct Op(txn_operation::Operation);

impl Op {
    /// Writes a key. Two puts of one key in a branch are refused.
    pub fn put(key: impl IntoBytes, value: impl IntoBytes) -> Self {
        Self(txn_operation::Operation::Put(v1::PutRequest {
            key: key.into_bytes(),
            value: value.into_bytes(),
            ..v1::PutRequest::default()
        }))
    }

    /// Reads a key.
    pub fn get(key: impl IntoBytes) -> Self {
        Self(txn_operation::Operation::Get(v1::GetRequest { key: key.into_bytes(), read: None }))
    }

    /// Reads an interval: its first page.
    #[must_use]
    pub fn range(range: KeyRange) -> Self {
        let range = Some(range.into());
        Self(txn_operation::Operation::Range(v1::RangeRequest { range, ..v1::RangeRequest::default() }))
    }

    /// Deletes a key.
    pub fn delete(key: impl IntoBytes) -> Self {
        let key = key.into_bytes();
        Self(txn_operation::Operation::Delete(v1::DeleteRequest { key, ..Default::default() }))
    }

    /// Deletes an interval.
    #[must_use]
    pub fn delete_range(range: KeyRange) -> Self {
        let range = Some(range.into());
        Self(txn_operation::Operation::DeleteRange(v1::DeleteRangeRequest { range, ..Default::default() }))
    }

    /// Applies another transaction.
    #[must_use]
    pub fn txn(txn: Txn) -> Self {
        Self(txn_operation::Operation::Txn(txn.0))
    }

    /// With a put or a deletion: returns what was there before. Other operations stay as they are.
    #[must_use]
    pub fn return_previous(mut self) -> Self {
        match &mut self.0 {
            txn_operation::Operation::Put(put) => put.return_previous = true,
            txn_operation::Operation::Delete(delete) => delete.return_previous = true,
            txn_operation::Operation::DeleteRange(delete) => delete.return_previous = true,
            _ => {}
        }
        self
    }

    /// With a put: attaches the key to a lease. Other operations stay as they are.
    #[must_use]
    pub fn lease(mut self, lease: LeaseId) -> Self {
        if let txn_operation::Operation::Put(put) = &mut self.0 {
            put.lease = lease.get();
        }
        self
    }

    /// With a put: gives the key a time to live. Other operations stay as they are.
    #[must_use]
    pub fn ttl(mut self, ttl: Duration) -> Self {
        if let txn_operation::Operation::Put(put) = &mut self.0 {
            put.ttl_ms = ttl_ms(ttl);
        }
        self
    }

    /// With a range: returns at most this many keys. Other operations stay as they are.
    #[must_use]
    pub fn limit(mut self, keys: u64) -> Self {
        if let txn_operation::Operation::Range(range) = &mut self.0 {
            range.limit = keys;
        }
        self
    }
}

fn is_read(operation: &txn_operation::Operation) -> bool {
    use txn_operation::Operation;
    match operation {
        Operation::Get(_) | Operation::Range(_) => true,
        Operation::Put(_) | Operation::Delete(_) | Operation::DeleteRange(_) => false,
        Operation::Txn(txn) => is_read_only(txn),
    }
}

fn is_read_only(txn: &v1::TxnRequest) -> bool {
    let operations = txn.then.iter().chain(&txn.otherwise);
    operations.filter_map(|operation| operation.operation.as_ref()).all(is_read)
}

/// A transaction: `when` all comparisons hold, `then` these operations, `otherwise` those.
///
/// ```
/// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
/// # fn main() { run(async |client| {
/// use d_engine_client::{Compare, Op, Txn};
///
/// let claim = Txn::new()
///     .when(Compare::missing("owner"))
///     .then(Op::put("owner", "me"))
///     .otherwise(Op::get("owner"));
/// assert!(client.txn(claim.clone()).await?.succeeded);
/// assert!(!client.txn(claim).await?.succeeded);
/// # Ok(()) }) }
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Txn(v1::TxnRequest);

impl Txn {
    /// A transaction without conditions or operations.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a condition. All must hold.
    #[must_use]
    pub fn when(mut self, compare: Compare) -> Self {
        self.0.compare.push(compare.0);
        self
    }

    /// Adds an operation for the case that the conditions hold.
    #[must_use]
    pub fn then(mut self, operation: Op) -> Self {
        self.0.then.push(v1::TxnOperation { operation: Some(operation.0) });
        self
    }

    /// Adds an operation for the case that a condition does not hold.
    #[must_use]
    pub fn otherwise(mut self, operation: Op) -> Self {
        self.0.otherwise.push(v1::TxnOperation { operation: Some(operation.0) });
        self
    }

    /// Whether it cannot write. Then it is served as a read: with a consistency, and repeated freely.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        is_read_only(&self.0)
    }
}

/// The answer of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TxnResponse {
    /// Who answered, and the revision after the transaction.
    pub header: Header,
    /// Whether the conditions held.
    pub succeeded: bool,
    /// One result for each operation of the branch that was applied. Headers inside are those of the transaction.
    pub results: Vec<TxnResult>,
}

/// The answer of one operation of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TxnResult {
    /// Of a put.
    Put(PutResponse),
    /// Of a get.
    Get(GetResponse),
    /// Of a range.
    Range(RangeResponse),
    /// Of a delete.
    Delete(DeleteResponse),
    /// Of a delete of an interval.
    DeleteRange(DeleteRangeResponse),
    /// Of a nested transaction.
    Txn(TxnResponse),
}

/// A transaction to be sent; await it to do so.
#[derive(Clone, Debug)]
#[must_use = "a request is sent when awaited"]
pub struct TxnCall {
    client: Client,
    txn: Txn,
    read: ReadOptions,
}

impl TxnCall {
    read_methods!();
}

impl IntoFuture for TxnCall {
    type Output = Result<TxnResponse, Error>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        async move {
            let Txn(mut request) = self.txn;
            let sent = request.clone();
            let response = if is_read_only(&request) {
                request.read = self.read.message();
                self.client.call(request, self.read.plan()).await?
            } else {
                write(&self.client, request, self.read.timeout).await?
            };
            let header = response.header.unwrap_or_default().into();
            answer(&sent, response, header).ok_or_else(|| {
                let message = "the server answered other operations than it was asked for";
                Error::new("transaction", ErrorKind::Internal, Outcome::Applied, message)
            })
        }
        .boxed()
    }
}

/// A server cannot read what is nested too deep, nor tell which of the operations beside it that was.
pub(crate) fn check_depth(txn: &v1::TxnRequest) -> Result<(), String> {
    fn is_deeper(txn: &v1::TxnRequest, depth: u64) -> bool {
        let mut operations = txn.then.iter().chain(&txn.otherwise);
        depth == 0
            || operations.any(|operation| match &operation.operation {
                Some(txn_operation::Operation::Txn(nested)) => is_deeper(nested, depth - 1),
                _ => false,
            })
    }
    let max = limits::TXN_DEPTH_MAX;
    match is_deeper(txn, max) {
        true => Err(format!("the transaction is nested more than {max} deep")),
        false => Ok(()),
    }
}

/// Pairs results with the operations they answer; `None` if they do not match.
fn answer(request: &v1::TxnRequest, response: v1::TxnResponse, header: Header) -> Option<TxnResponse> {
    use txn_operation::Operation;
    use txn_result::Result as Answer;
    let branch = if response.succeeded { &request.then } else { &request.otherwise };
    if branch.len() != response.results.len() {
        return None;
    }
    let pairs = branch.iter().zip(response.results);
    let results = pairs.map(|(operation, result)| {
        let mut result = match (operation.operation.as_ref()?, result.result?) {
            (Operation::Put(_), Answer::Put(put)) => TxnResult::Put(put.into()),
            (Operation::Get(_), Answer::Get(get)) => TxnResult::Get(get.into()),
            (Operation::Range(asked), Answer::Range(range)) => {
                let interval = asked.range.clone().unwrap_or_default();
                let interval = KeyRange { start: interval.start, end: interval.end };
                let descending = asked.order() == v1::RangeOrder::Descending;
                TxnResult::Range(RangeResponse::of(range, &interval, descending))
            }
            (Operation::Delete(_), Answer::Delete(delete)) => TxnResult::Delete(delete.into()),
            (Operation::DeleteRange(_), Answer::DeleteRange(delete)) => TxnResult::DeleteRange(delete.into()),
            (Operation::Txn(asked), Answer::Txn(txn)) => TxnResult::Txn(answer(asked, txn, header)?),
            _ => return None,
        };
        match &mut result {
            TxnResult::Put(put) => put.header = header,
            TxnResult::Get(get) => get.header = header,
            TxnResult::Range(range) => range.header = header,
            TxnResult::Delete(delete) => delete.header = header,
            TxnResult::DeleteRange(delete) => delete.header = header,
            TxnResult::Txn(txn) => txn.header = header,
        }
        Some(result)
    });
    Some(TxnResponse { header, succeeded: response.succeeded, results: results.collect::<Option<_>>()? })
}

impl Client {
    /// Applies a transaction. One that cannot write is served as a read; for the others the options of reads have no
    /// effect, except for the timeout.
    ///
    /// Dropping the future leaves the outcome unknown.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// use d_engine_client::{Op, Txn};
    ///
    /// let both = Txn::new().then(Op::put("left", "1")).then(Op::put("right", "1"));
    /// let revision = client.txn(both).await?.header.revision;
    /// let kvs = client.get_many(["left", "right"]).await?.kvs;
    /// assert!(kvs.iter().all(|kv| kv.mod_revision == revision));
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// As [`put`](Self::put); `InvalidArgument` too for two puts of one key in a branch, and for an answer too large: then
    /// nothing was applied.
    pub fn txn(&self, txn: Txn) -> TxnCall {
        TxnCall { client: self.clone(), txn, read: ReadOptions::of(self) }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn a_transaction_that_may_write_anywhere_is_not_a_read() {
        let read = Txn::new().when(Compare::exists("k")).then(Op::get("k")).otherwise(Op::range(KeyRange::all()));
        assert!(read.is_read_only());
        assert!(Txn::new().then(Op::txn(read.clone())).is_read_only());
        for op in [Op::put("k", "v"), Op::delete("k"), Op::delete_range(KeyRange::all())] {
            assert!(!is_read(&op.0));
            assert!(!read.clone().otherwise(op.clone()).is_read_only());
            assert!(!Txn::new().then(Op::txn(Txn::new().otherwise(op))).is_read_only());
        }
    }

    #[test]
    fn a_transaction_nested_deeper_than_a_server_reads_is_refused() {
        let nested = |depth| (1..depth).fold(Txn::new(), |inner, _| Txn::new().otherwise(Op::txn(inner)));
        assert_eq!(check_depth(&nested(limits::TXN_DEPTH_MAX).0), Ok(()));
        assert!(check_depth(&nested(limits::TXN_DEPTH_MAX + 1).0).is_err());
    }

    #[test]
    fn results_are_paired_with_the_branch_that_was_applied() {
        let Txn(request) = Txn::new().then(Op::put("k", "v")).otherwise(Op::range(KeyRange::prefix("k")).limit(1));
        let result = |result| v1::TxnResult { result: Some(result) };
        let page = v1::RangeResponse { more: true, next: Bytes::from_static(b"k2"), ..v1::RangeResponse::default() };
        let results = vec![result(txn_result::Result::Range(page))];
        let response = v1::TxnResponse { header: None, succeeded: false, results };
        let header = Header { revision: Revision(5), ..Header::default() };
        let paired = answer(&request, response.clone(), header).unwrap();
        let TxnResult::Range(range) = &paired.results[0] else { panic!("{paired:?}") };
        assert_eq!(range.header, header);
        assert_eq!(range.rest, Some(KeyRange::between("k2", "l")));
        let mismatched = v1::TxnResponse { succeeded: true, ..response };
        assert_eq!(answer(&request, mismatched, header), None);
    }
}
