//! Requests at the edge of what is allowed, as any gRPC stub can send them: what is just inside is served, what is just
//! outside is refused with the exact code, and nothing in the store has changed.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a failed step ends the test"
)]

use std::time::Duration;

use bytes::Bytes;
use d_engine_proto::v1::{
    Command, Compare, CompareAndSwapRequest, Consistency, DeleteRangeRequest, DeleteRequest, GetManyRequest,
    GetRequest, KeyRange, KeyValue, Outcome, PutRequest, RangeRequest, ReadOptions, TxnOperation, TxnRequest, command,
    compare, kv_client::KvClient, txn_operation::Operation,
};
use d_engine_proto::{DetailedStatus, ErrorCode, RetryWhere, limits};
use d_engine_tests::cluster::{Cluster, Shape};
use d_engine_tests::wait;
use prost::Message;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use ErrorCode::{Behind, FutureRevision, InvalidArgument, LeaseNotFound, NotLeader, ResourceExhausted};

const KEY_MAX: usize = limits::KEY_BYTES_MAX as usize;
const REQUEST_MAX: usize = limits::REQUEST_BYTES_MAX as usize;
const OPERATIONS_MAX: usize = limits::TXN_OPERATIONS_MAX as usize;
const DEPTH_MAX: usize = limits::TXN_DEPTH_MAX as usize;
const KEYS_MAX: usize = limits::GET_MANY_KEYS_MAX as usize;

/// The deadline that the servers give to a call without one: what waits in vain has its answer by then.
const DEFAULT_DEADLINE: Duration = Duration::from_millis(300);

#[derive(Clone, Debug)]
enum Ask {
    Put(PutRequest),
    Get(GetRequest),
    GetMany(GetManyRequest),
    Range(RangeRequest),
    Delete(DeleteRequest),
    DeleteRange(DeleteRangeRequest),
    Swap(CompareAndSwapRequest),
    Txn(TxnRequest),
}

impl Ask {
    /// Sends it, with a deadline of the client's unless it is to have the server's.
    async fn send(self, mut kv: KvClient<Channel>, deadline: Option<Duration>) -> Result<(), Status> {
        fn timed<T>(message: T, deadline: Option<Duration>) -> Request<T> {
            let mut request = Request::new(message);
            if let Some(deadline) = deadline {
                request.set_timeout(deadline);
            }
            request
        }
        match self {
            Self::Put(request) => kv.put(timed(request, deadline)).await.map(drop),
            Self::Get(request) => kv.get(timed(request, deadline)).await.map(drop),
            Self::GetMany(request) => kv.get_many(timed(request, deadline)).await.map(drop),
            Self::Range(request) => kv.range(timed(request, deadline)).await.map(drop),
            Self::Delete(request) => kv.delete(timed(request, deadline)).await.map(drop),
            Self::DeleteRange(request) => kv.delete_range(timed(request, deadline)).await.map(drop),
            Self::Swap(request) => kv.compare_and_swap(timed(request, deadline)).await.map(drop),
            Self::Txn(request) => kv.txn(timed(request, deadline)).await.map(drop),
        }
    }
}

fn put(key: impl Into<Bytes>, value: impl Into<Bytes>) -> PutRequest {
    PutRequest { key: key.into(), value: value.into(), ..PutRequest::default() }
}

/// A put of which the encoded command has exactly `bytes`: that is what the limit of a request counts.
fn put_of(bytes: usize) -> PutRequest {
    let size = |value: usize| Command::from(command::Command::Put(put("large", vec![b'v'; value]))).encoded_len();
    let value = 2 * bytes - size(bytes);
    assert_eq!(size(value), bytes);
    put("large", vec![b'v'; value])
}

fn get(key: impl Into<Bytes>, read: ReadOptions) -> GetRequest {
    GetRequest { key: key.into(), read: Some(read) }
}

fn interval(start: &'static str, end: &'static str) -> Option<KeyRange> {
    Some(KeyRange { start: start.into(), end: end.into() })
}

fn range(start: &'static str, end: &'static str) -> RangeRequest {
    RangeRequest { range: interval(start, end), ..RangeRequest::default() }
}

fn then(operations: impl IntoIterator<Item = Operation>) -> TxnRequest {
    let then = operations.into_iter().map(|operation| TxnOperation { operation: Some(operation) }).collect();
    TxnRequest { then, ..TxnRequest::default() }
}

/// A transaction of so many puts, each of another key.
fn puts(count: usize) -> TxnRequest {
    then((0..count).map(|number| Operation::Put(put(format!("txn-{number}"), "v"))))
}

/// A put inside so many transactions.
fn nested(depth: usize) -> TxnRequest {
    let innermost = then([Operation::Put(put("nested", "v"))]);
    (1..depth).fold(innermost, |inner, _| then([Operation::Txn(inner)]))
}

fn compare(key: impl Into<Bytes>, target: Option<compare::Target>) -> TxnRequest {
    let compare = vec![Compare { key: key.into(), target, ..Compare::default() }];
    TxnRequest { compare, ..then([Operation::Put(put("compared", "v"))]) }
}

/// What is just inside every bound.
fn allowed() -> Vec<(&'static str, Ask)> {
    vec![
        ("a key of one byte", Ask::Put(put("k", "v"))),
        ("a key of all bytes", Ask::Put(put((0..=u8::MAX).collect::<Vec<_>>(), "v"))),
        ("the longest key", Ask::Put(put(vec![b'k'; KEY_MAX], "v"))),
        ("the longest key to read", Ask::Get(get(vec![b'k'; KEY_MAX], ReadOptions::default()))),
        ("an empty value", Ask::Put(put("empty", ""))),
        ("the largest request", Ask::Put(put_of(REQUEST_MAX))),
        ("the largest transaction", Ask::Txn(puts(OPERATIONS_MAX))),
        ("the deepest transaction", Ask::Txn(nested(DEPTH_MAX))),
        ("an empty transaction", Ask::Txn(TxnRequest::default())),
        (
            "as many keys as one read may have",
            Ask::GetMany(GetManyRequest { keys: vec!["k".into(); KEYS_MAX], read: None }),
        ),
        ("no keys", Ask::GetMany(GetManyRequest::default())),
        ("the whole store", Ask::Range(RangeRequest { count_only: true, ..range("", "") })),
        ("an interval of one key", Ask::Range(range("k", "k\0"))),
        (
            "nothing to delete",
            Ask::Delete(DeleteRequest { key: "nobody".into(), return_previous: true, session: None }),
        ),
    ]
}

/// What is just outside, with the code of the refusal. `revision` is the store's.
fn forbidden(revision: u64) -> Vec<(&'static str, Ask, ErrorCode)> {
    let long = || vec![b'k'; KEY_MAX + 1];
    let read = ReadOptions::default();
    let future = ReadOptions { revision: revision + 1, ..read };
    let swap = CompareAndSwapRequest { key: "k".into(), ..CompareAndSwapRequest::default() };
    let twice = [Operation::Put(put("k", "1")), Operation::Put(put("k", "2"))];
    let nested_twice = [Operation::Put(put("k", "1")), Operation::Txn(then([Operation::Put(put("k", "2"))]))];
    vec![
        ("an empty key to put", Ask::Put(put("", "v")), InvalidArgument),
        ("an empty key to get", Ask::Get(get("", read)), InvalidArgument),
        (
            "an empty key among others",
            Ask::GetMany(GetManyRequest { keys: vec!["k".into(), "".into()], read: None }),
            InvalidArgument,
        ),
        ("an empty key to delete", Ask::Delete(DeleteRequest::default()), InvalidArgument),
        ("an empty key to swap", Ask::Swap(CompareAndSwapRequest { key: "".into(), ..swap.clone() }), InvalidArgument),
        ("an empty key to compare", Ask::Txn(compare("", Some(compare::Target::Version(0)))), InvalidArgument),
        ("an empty key in a transaction", Ask::Txn(then([Operation::Put(put("", "v"))])), InvalidArgument),
        ("a key too long to put", Ask::Put(put(long(), "v")), InvalidArgument),
        ("a key too long to get", Ask::Get(get(long(), read)), InvalidArgument),
        (
            "a key too long to delete",
            Ask::Delete(DeleteRequest { key: long().into(), ..DeleteRequest::default() }),
            InvalidArgument,
        ),
        (
            "a key too long to swap",
            Ask::Swap(CompareAndSwapRequest { key: long().into(), ..swap.clone() }),
            InvalidArgument,
        ),
        ("a key too long in a transaction", Ask::Txn(nested_put(put(long(), "v"))), InvalidArgument),
        ("a request one byte too large", Ask::Put(put_of(REQUEST_MAX + 1)), ResourceExhausted),
        ("a request far too large", Ask::Put(put("large", vec![b'v'; 3 * REQUEST_MAX])), ResourceExhausted),
        (
            "a transaction too large",
            Ask::Txn(then([Operation::Put(put("large", vec![b'v'; REQUEST_MAX]))])),
            ResourceExhausted,
        ),
        ("one operation too many", Ask::Txn(puts(OPERATIONS_MAX + 1)), InvalidArgument),
        ("one operation too many, nested", Ask::Txn(then([Operation::Txn(puts(OPERATIONS_MAX))])), InvalidArgument),
        ("one level too deep", Ask::Txn(nested(DEPTH_MAX + 1)), InvalidArgument),
        ("far too deep", Ask::Txn(nested(40)), InvalidArgument),
        ("deeper than a decoder goes", Ask::Txn(nested(500)), InvalidArgument),
        (
            "one key too many",
            Ask::GetMany(GetManyRequest { keys: vec!["k".into(); KEYS_MAX + 1], read: None }),
            InvalidArgument,
        ),
        ("two puts of one key", Ask::Txn(then(twice)), InvalidArgument),
        ("two puts of one key, one nested", Ask::Txn(then(nested_twice)), InvalidArgument),
        (
            "an operation that is none",
            Ask::Txn(TxnRequest { then: vec![TxnOperation::default()], ..puts(1) }),
            InvalidArgument,
        ),
        ("a comparison with nothing", Ask::Txn(compare("k", None)), InvalidArgument),
        ("read options on a write", Ask::Txn(TxnRequest { read: Some(future), ..puts(1) }), InvalidArgument),
        ("a range that ends before its start", Ask::Range(range("b", "a")), InvalidArgument),
        ("a range that ends at its start", Ask::Range(range("b", "b")), InvalidArgument),
        ("no range", Ask::Range(RangeRequest::default()), InvalidArgument),
        (
            "keys and count",
            Ask::Range(RangeRequest { keys_only: true, count_only: true, ..range("", "") }),
            InvalidArgument,
        ),
        ("an unknown order", Ask::Range(RangeRequest { order: 7, ..range("", "") }), InvalidArgument),
        (
            "a deletion that ends before its start",
            Ask::DeleteRange(DeleteRangeRequest { range: interval("b", "a"), ..DeleteRangeRequest::default() }),
            InvalidArgument,
        ),
        ("a deletion of no range", Ask::DeleteRange(DeleteRangeRequest::default()), InvalidArgument),
        ("an unknown consistency", Ask::Get(get("k", ReadOptions { consistency: 99, ..read })), InvalidArgument),
        ("a future revision of a key", Ask::Get(get("k", future)), FutureRevision),
        (
            "a future revision of a range",
            Ask::Range(RangeRequest { read: Some(future), ..range("", "") }),
            FutureRevision,
        ),
        (
            "a future revision of a transaction",
            Ask::Txn(TxnRequest { read: Some(future), ..then([Operation::Range(range("", ""))]) }),
            FutureRevision,
        ),
        (
            "the last revision there could be",
            Ask::Get(get("k", ReadOptions { revision: u64::MAX, ..read })),
            FutureRevision,
        ),
        ("a minimum revision out of reach", Ask::Get(get("k", ReadOptions { min_revision: u64::MAX, ..read })), Behind),
        ("a put with an unknown lease", Ask::Put(PutRequest { lease: 7, ..put("k", "v") }), LeaseNotFound),
        (
            "a swap with an unknown lease",
            Ask::Swap(CompareAndSwapRequest { lease: 7, key: "fresh".into(), ..swap }),
            LeaseNotFound,
        ),
        (
            "an unknown lease in a transaction",
            Ask::Txn(nested_put(PutRequest { lease: 7, ..put("k", "v") })),
            LeaseNotFound,
        ),
    ]
}

fn nested_put(request: PutRequest) -> TxnRequest {
    then([Operation::Put(put("beside", "v")), Operation::Txn(then([Operation::Put(request)]))])
}

async fn kv_of(cluster: &Cluster, id: u32) -> KvClient<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{}", cluster.node(id).address)).unwrap();
    KvClient::new(endpoint.connect().await.unwrap()).max_decoding_message_size(usize::MAX)
}

/// Revision and content of the store, read linearizably, a page at a time.
async fn store(kv: &mut KvClient<Channel>) -> (u64, Vec<KeyValue>) {
    let mut request = range("", "");
    let mut content = Vec::new();
    loop {
        let mut page = Request::new(request.clone());
        page.set_timeout(wait::PATIENCE);
        let page = kv.range(page).await.unwrap().into_inner();
        content.extend(page.kvs);
        let revision = page.header.unwrap().revision;
        if !page.more {
            return (revision, content);
        }
        request.range.as_mut().unwrap().start = page.next;
        request.read = Some(ReadOptions { revision, ..ReadOptions::default() });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_bound_is_exact_and_a_refused_request_changes_nothing() {
    let extra = format!(
        "[raft.read_consistency]\nlease_duration_ms = 1000\n[network]\ncall_timeout_ms = {}\n",
        DEFAULT_DEADLINE.as_millis()
    );
    let mut cluster = Cluster::prepare(Shape { extra, ..Shape::default() }).await;
    cluster.start_all().await;
    let reign = cluster.reign().await;
    let mut kv = kv_of(&cluster, reign.leader).await;
    for (name, ask) in allowed() {
        let served = ask.send(kv.clone(), Some(wait::PATIENCE)).await;
        assert!(served.is_ok(), "{name}: {served:?}");
    }

    let before = store(&mut kv).await;
    for (name, ask, code) in forbidden(before.0) {
        // The server's own deadline, where it is waited for: a client's would race with the answer.
        let deadline = Some(wait::PATIENCE).filter(|_| code != Behind);
        let detail = refusal(name, ask.send(kv.clone(), deadline).await, code);
        let revision = if [Behind, FutureRevision].contains(&code) { before.0 } else { 0 };
        assert_eq!(detail.detail.revision, revision, "{name}");
        assert_eq!(store(&mut kv).await, before, "{name} changed the store");
    }

    // What only the leader serves, asked of a follower.
    let follower = reign.leader % 3 + 1;
    let lease = ReadOptions { consistency: Consistency::Lease as i32, ..ReadOptions::default() };
    for ask in [Ask::Put(put("k", "v")), Ask::Txn(puts(1)), Ask::Get(get("k", lease))] {
        let served = ask.clone().send(kv_of(&cluster, follower).await, Some(wait::PATIENCE)).await;
        let leader = refusal("a follower", served, NotLeader).detail.leader.expect("the leader is known");
        assert_eq!((leader.node_id, leader.term), (reign.leader, reign.term), "{ask:?}");
        assert_eq!(leader.client_address, cluster.node(reign.leader).address.to_string());
    }

    for node in cluster.nodes() {
        assert_eq!(store(&mut kv_of(&cluster, node.id).await).await, before, "node {}", node.id);
    }
    assert_eq!(cluster.reign().await, reign);
    cluster.check_alive();
}

/// The details of a refusal with this code, of which nothing was applied.
fn refusal(name: &str, served: Result<(), Status>, code: ErrorCode) -> DetailedStatus {
    let status = served.expect_err(name);
    let detail = DetailedStatus::from_status(&status).unwrap_or_else(|| panic!("{name}: no details in {status:?}"));
    assert_eq!(detail.code(), Some(code), "{name}: {status}");
    assert_eq!(status.code(), code.grpc(), "{name}: {status}");
    assert_eq!(detail.outcome(), Outcome::NotApplied, "{name}: {status}");
    assert_eq!(detail.detail.retry_safe, code.retry() != RetryWhere::Never, "{name}: {status}");
    assert!(!status.message().is_empty(), "{name}");
    detail
}
