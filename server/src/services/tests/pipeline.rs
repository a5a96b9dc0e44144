//! The pipeline as a client sees it, over a real port and with a generated stub.

use std::collections::{BTreeMap, BTreeSet};

use d_engine_proto::v1::answer::Reply;
use d_engine_proto::v1::operation::Request as Asked;
use d_engine_proto::v1::pipeline_client::PipelineClient;
use d_engine_proto::v1::{self, Consistency};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::*;
use crate::limits::PIPELINE_OPERATIONS_MAX;

/// One stream of operations.
struct Exchange {
    operations: mpsc::Sender<v1::OperationBatch>,
    answers: Streaming<v1::AnswerBatch>,
    taken: Vec<v1::Answer>,
}

impl Exchange {
    async fn open(node: &Node) -> Self {
        Self::over(node.channel().await).await
    }

    async fn over(channel: Channel) -> Self {
        let (operations, received) = mpsc::channel(16);
        let mut client = PipelineClient::new(channel);
        let answers = within(client.exchange(ReceiverStream::new(received))).await.unwrap().into_inner();
        Self { operations, answers, taken: Vec::new() }
    }

    async fn send(&self, operations: Vec<v1::Operation>) {
        within(self.operations.send(v1::OperationBatch { operations })).await.unwrap();
    }

    /// The next answer.
    async fn next(&mut self) -> (u64, Reply) {
        while self.taken.is_empty() {
            let batch = within(self.answers.message()).await.unwrap().expect("an answer");
            self.taken = batch.answers;
            self.taken.reverse();
        }
        let answer = self.taken.pop().unwrap();
        (answer.id, answer.reply.expect("a reply"))
    }

    /// Asks one thing and waits for its answer.
    async fn ask(&mut self, request: Asked) -> Reply {
        self.send(vec![operation(1, request)]).await;
        let (id, reply) = self.next().await;
        assert_eq!(id, 1);
        reply
    }
}

fn operation(id: u64, request: Asked) -> v1::Operation {
    v1::Operation { id, request: Some(request), ..Default::default() }
}

fn cancel(id: u64) -> v1::Operation {
    operation(id, Asked::Cancel(v1::CancelOperation {}))
}

fn get(key: impl Into<Bytes>, consistency: Consistency) -> v1::GetRequest {
    let read = v1::ReadOptions { consistency: consistency.into(), ..Default::default() };
    v1::GetRequest { key: key.into(), read: Some(read) }
}

/// A read that waits for a revision that never comes.
fn waiting() -> Asked {
    let read = v1::ReadOptions { min_revision: 1_000_000, consistency: Consistency::Eventual.into(), revision: 0 };
    Asked::Get(v1::GetRequest { key: "k".into(), read: Some(read) })
}

#[track_caller]
fn error_of(reply: &Reply) -> (ErrorCode, Outcome, &str) {
    let Reply::Error(error) = reply else { panic!("{reply:?}") };
    let detail = error.detail.as_ref().unwrap();
    (ErrorCode::from_number(detail.code).unwrap(), detail.outcome(), &error.message)
}

/// What the unary method that does the same answers.
async fn unary(channel: &Channel, request: Asked) -> Reply {
    let mut kv = KvClient::new(channel.clone());
    let mut leases = LeaseClient::new(channel.clone());
    let mut sessions = SessionClient::new(channel.clone());
    let mut cluster = ClusterClient::new(channel.clone());
    let mut maintenance = MaintenanceClient::new(channel.clone());
    // Without a last arm: a request that is added is added here.
    let answer = match request {
        Asked::Cancel(_) => panic!("there is nothing to cancel"),
        Asked::Put(request) => kv.put(request).await.map(|answer| Reply::Put(answer.into_inner())),
        Asked::Get(request) => kv.get(request).await.map(|answer| Reply::Get(answer.into_inner())),
        Asked::GetMany(request) => kv.get_many(request).await.map(|answer| Reply::GetMany(answer.into_inner())),
        Asked::Range(request) => kv.range(request).await.map(|answer| Reply::Range(answer.into_inner())),
        Asked::Delete(request) => kv.delete(request).await.map(|answer| Reply::Delete(answer.into_inner())),
        Asked::DeleteRange(request) => {
            kv.delete_range(request).await.map(|answer| Reply::DeleteRange(answer.into_inner()))
        }
        Asked::CompareAndSwap(request) => {
            kv.compare_and_swap(request).await.map(|answer| Reply::CompareAndSwap(answer.into_inner()))
        }
        Asked::Txn(request) => kv.txn(request).await.map(|answer| Reply::Txn(answer.into_inner())),
        Asked::LeaseGrant(request) => leases.grant(request).await.map(|answer| Reply::LeaseGrant(answer.into_inner())),
        Asked::LeaseRevoke(request) => {
            leases.revoke(request).await.map(|answer| Reply::LeaseRevoke(answer.into_inner()))
        }
        Asked::LeaseRenew(request) => leases.renew(request).await.map(|answer| Reply::LeaseRenew(answer.into_inner())),
        Asked::LeaseTimeToLive(request) => {
            leases.time_to_live(request).await.map(|answer| Reply::LeaseTimeToLive(answer.into_inner()))
        }
        Asked::LeaseList(request) => leases.list(request).await.map(|answer| Reply::LeaseList(answer.into_inner())),
        Asked::SessionRegister(request) => {
            sessions.register(request).await.map(|answer| Reply::SessionRegister(answer.into_inner()))
        }
        Asked::SessionRenew(request) => {
            sessions.renew(request).await.map(|answer| Reply::SessionRenew(answer.into_inner()))
        }
        Asked::SessionClose(request) => {
            sessions.close(request).await.map(|answer| Reply::SessionClose(answer.into_inner()))
        }
        Asked::Compact(request) => maintenance.compact(request).await.map(|answer| Reply::Compact(answer.into_inner())),
        Asked::Members(request) => cluster.members(request).await.map(|answer| Reply::Members(answer.into_inner())),
        Asked::ChangeMember(request) => {
            cluster.change_member(request).await.map(|answer| Reply::ChangeMember(answer.into_inner()))
        }
        Asked::TransferLeadership(request) => {
            cluster.transfer_leadership(request).await.map(|answer| Reply::TransferLeadership(answer.into_inner()))
        }
        Asked::Status(request) => cluster.status(request).await.map(|answer| Reply::Status(answer.into_inner())),
    };
    answer.unwrap_or_else(|status| {
        let error = details(&status);
        Reply::Error(v1::OperationError { detail: Some(error.detail), message: error.message })
    })
}

/// Without what differs between two nodes or two moments.
fn comparable(mut reply: Reply) -> Reply {
    let header = match &mut reply {
        Reply::Error(_) => return reply,
        Reply::Put(answer) => &mut answer.header,
        Reply::Get(answer) => &mut answer.header,
        Reply::GetMany(answer) => &mut answer.header,
        Reply::Range(answer) => &mut answer.header,
        Reply::Delete(answer) => &mut answer.header,
        Reply::DeleteRange(answer) => &mut answer.header,
        Reply::CompareAndSwap(answer) => &mut answer.header,
        Reply::Txn(answer) => &mut answer.header,
        Reply::LeaseGrant(answer) => &mut answer.header,
        Reply::LeaseRevoke(answer) => &mut answer.header,
        Reply::LeaseRenew(answer) => &mut answer.header,
        Reply::LeaseTimeToLive(answer) => {
            assert!(answer.remaining_ms > 0);
            answer.remaining_ms = 0;
            &mut answer.header
        }
        Reply::LeaseList(answer) => {
            answer.leases.iter_mut().for_each(|lease| lease.remaining_ms = 0);
            &mut answer.header
        }
        Reply::SessionRegister(answer) => &mut answer.header,
        Reply::SessionRenew(answer) => &mut answer.header,
        Reply::SessionClose(answer) => &mut answer.header,
        Reply::Compact(answer) => &mut answer.header,
        Reply::Members(answer) => {
            answer.leader = None;
            for member in &mut answer.members {
                (member.peer_address, member.client_address) = Default::default();
            }
            &mut answer.header
        }
        Reply::ChangeMember(answer) => &mut answer.header,
        Reply::TransferLeadership(answer) => {
            answer.leader = None;
            &mut answer.header
        }
        Reply::Status(answer) => {
            (answer.leader, answer.disk_bytes, answer.uptime_ms) = Default::default();
            (answer.last_log_index, answer.committed_index, answer.applied_index) = Default::default();
            &mut answer.header
        }
    };
    let header = header.as_mut().expect("a header");
    assert_ne!(header.cluster_id, 0);
    header.cluster_id = 0;
    reply
}

/// Every kind of request, some of them well and some of them badly made, in an order in which all of them do something.
fn requests() -> Vec<Asked> {
    let range = Some(v1::KeyRange { start: "a".into(), end: "z".into() });
    let past = Some(v1::ReadOptions { revision: 1, ..Default::default() });
    let behind = Some(v1::ReadOptions { revision: 1_000, ..Default::default() });
    let lease = Some(v1::ReadOptions { consistency: Consistency::Lease.into(), ..Default::default() });
    let txn = |operation| v1::TxnOperation { operation: Some(operation) };
    let in_txn =
        |key: &'static str| txn(v1::txn_operation::Operation::Get(v1::GetRequest { key: key.into(), read: None }));
    let put_in_txn = txn(v1::txn_operation::Operation::Put(put("t", "1")));
    let session = |sequence| Some(v1::SessionCall { session: 1, sequence, acknowledged_through: 0 });
    vec![
        Asked::Put(put("k", "1")),
        Asked::Put(v1::PutRequest { return_previous: true, ..put("k", "2") }),
        Asked::Put(put("", "")),
        Asked::Put(v1::PutRequest { lease: 77, ..put("k", "") }),
        Asked::Get(get("k", Consistency::Unspecified)),
        Asked::Get(get("k", Consistency::Linearizable)),
        Asked::Get(get("k", Consistency::Lease)),
        Asked::Get(get("k", Consistency::Eventual)),
        Asked::Get(get("none", Consistency::Eventual)),
        Asked::Get(get("", Consistency::Eventual)),
        Asked::Get(v1::GetRequest { key: "k".into(), read: past }),
        Asked::Get(v1::GetRequest { key: "k".into(), read: behind }),
        Asked::GetMany(v1::GetManyRequest { keys: vec!["k".into(), "none".into()], read: None }),
        Asked::GetMany(v1::GetManyRequest { keys: vec!["k".into()], read: past }),
        Asked::GetMany(v1::GetManyRequest { keys: vec!["".into()], read: None }),
        Asked::Range(v1::RangeRequest { range: range.clone(), ..Default::default() }),
        Asked::Range(v1::RangeRequest { range: range.clone(), read: past, ..Default::default() }),
        Asked::Range(v1::RangeRequest::default()),
        Asked::CompareAndSwap(v1::CompareAndSwapRequest {
            key: "k".into(),
            expected: Some("2".into()),
            value: "3".into(),
            ..Default::default()
        }),
        Asked::CompareAndSwap(v1::CompareAndSwapRequest { key: "k".into(), ..Default::default() }),
        Asked::Txn(v1::TxnRequest { then: vec![put_in_txn.clone(), in_txn("t")], ..Default::default() }),
        Asked::Txn(v1::TxnRequest { then: vec![in_txn("t"), in_txn("k")], read: lease, ..Default::default() }),
        Asked::Txn(v1::TxnRequest { then: vec![in_txn("k")], read: past, ..Default::default() }),
        Asked::Txn(v1::TxnRequest { then: vec![put_in_txn], read: past, ..Default::default() }),
        Asked::Delete(v1::DeleteRequest { key: "t".into(), return_previous: true, session: None }),
        Asked::Delete(v1::DeleteRequest { key: "t".into(), ..Default::default() }),
        Asked::DeleteRange(v1::DeleteRangeRequest { range, return_previous: true, session: None }),
        Asked::DeleteRange(v1::DeleteRangeRequest::default()),
        Asked::LeaseGrant(v1::LeaseGrantRequest { ttl_ms: 600_000, ..Default::default() }),
        Asked::LeaseGrant(v1::LeaseGrantRequest { ttl_ms: 600_000, lease: 1, ..Default::default() }),
        Asked::LeaseGrant(v1::LeaseGrantRequest { ttl_ms: 1, ..Default::default() }),
        Asked::Put(v1::PutRequest { lease: 1, ..put("l", "") }),
        Asked::Put(v1::PutRequest { ttl_ms: 600_000, ..put("m", "") }),
        Asked::LeaseRenew(v1::LeaseRenewRequest { lease: 1 }),
        Asked::LeaseRenew(v1::LeaseRenewRequest { lease: 77 }),
        Asked::LeaseTimeToLive(v1::LeaseTimeToLiveRequest { lease: 1, keys: true, read: None }),
        Asked::LeaseTimeToLive(v1::LeaseTimeToLiveRequest { lease: 77, ..Default::default() }),
        Asked::LeaseList(v1::LeaseListRequest { read: lease, ..Default::default() }),
        Asked::LeaseList(v1::LeaseListRequest { read: past, ..Default::default() }),
        Asked::LeaseRevoke(v1::LeaseRevokeRequest { lease: 1, session: None }),
        Asked::LeaseRevoke(v1::LeaseRevokeRequest { lease: 1, session: None }),
        Asked::SessionRegister(v1::SessionRegisterRequest::default()),
        Asked::SessionRegister(v1::SessionRegisterRequest { ttl_ms: 1 }),
        Asked::SessionRenew(v1::SessionRenewRequest { session: 1 }),
        Asked::SessionRenew(v1::SessionRenewRequest { session: 77 }),
        Asked::Put(v1::PutRequest { session: session(1), ..put("s", "1") }),
        Asked::Put(v1::PutRequest { session: session(1), ..put("s", "1") }),
        Asked::Put(v1::PutRequest { session: session(1), ..put("s", "other") }),
        Asked::SessionClose(v1::SessionCloseRequest { session: 1 }),
        Asked::Compact(v1::CompactRequest { target: Some(v1::compact_request::Target::Revision(3)) }),
        Asked::Compact(v1::CompactRequest { target: Some(v1::compact_request::Target::OlderThanMs(600_000)) }),
        Asked::Compact(v1::CompactRequest { target: Some(v1::compact_request::Target::Revision(1)) }),
        Asked::Compact(v1::CompactRequest::default()),
        Asked::Get(v1::GetRequest { key: "k".into(), read: past }),
        Asked::Members(v1::MembersRequest {}),
        Asked::Status(v1::StatusRequest {}),
        Asked::ChangeMember(v1::ChangeMemberRequest::default()),
        Asked::ChangeMember(v1::ChangeMemberRequest {
            change: Some(v1::change_member_request::Change::Remove(v1::RemoveMember { id: 1 })),
            force: true,
        }),
        Asked::TransferLeadership(v1::TransferLeadershipRequest { to: 7 }),
        Asked::TransferLeadership(v1::TransferLeadershipRequest { to: 1 }),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn every_operation_is_answered_as_the_unary_method_answers_it() {
    let (one, other) = (Node::start().await, Node::start().await);
    let channel = one.channel().await;
    let mut exchange = Exchange::open(&other).await;
    let mut fields = BTreeSet::new();
    for request in requests() {
        let encoded = v1::Operation { request: Some(request.clone()), ..Default::default() }.encode_to_vec();
        fields.insert(i32::try_from(prost::encoding::decode_key(&mut encoded.as_slice()).unwrap().0).unwrap());
        let expected = comparable(unary(&channel, request.clone()).await);
        let found = comparable(exchange.ask(request.clone()).await);
        assert_eq!(found, expected, "{request:?}");
    }

    let files = prost_types::FileDescriptorSet::decode(d_engine_proto::FILE_DESCRIPTOR_SET).unwrap();
    let mut messages = files.file.iter().flat_map(|file| &file.message_type);
    let operation = messages.find(|message| message.name() == "Operation").unwrap();
    let requests = operation.field.iter().filter(|field| field.oneof_index.is_some() && field.name() != "cancel");
    assert_eq!(fields, requests.map(|field| field.number()).collect(), "every request there is");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_operations_at_once_are_each_answered_once() {
    const EACH: u64 = 3000;
    let node = Node::start().await;
    let mut exchange = Exchange::open(&node).await;
    let key = |id: u64| format!("k{:04}", id % 100);
    let policies = [Consistency::Linearizable, Consistency::Lease, Consistency::Eventual];
    let mut sent = 0;
    let mut open = BTreeMap::new();
    while sent < 4 * EACH || !open.is_empty() {
        if sent < 4 * EACH {
            let request = |id: u64| match id % 4 {
                0 => Asked::Put(v1::PutRequest { key: key(id).into(), value: "v".into(), ..Default::default() }),
                policy => Asked::Get(get(key(id), policies[usize::try_from(policy).unwrap() - 1])),
            };
            let ids = sent + 1..=sent + 500;
            exchange.send(ids.clone().map(|id| operation(id, request(id))).collect()).await;
            open.extend(ids.map(|id| (id, ())));
            sent += 500;
        }
        while open.len() > 2000 || (sent == 4 * EACH && !open.is_empty()) {
            let (id, reply) = exchange.next().await;
            assert!(matches!((id % 4, &reply), (0, Reply::Put(_)) | (1.., Reply::Get(_))), "{id}: {reply:?}");
            assert!(open.remove(&id).is_some(), "{id} is answered once");
        }
    }
    let text = node.metrics.encode(&Figures::default()).unwrap();
    assert!(text.contains(&format!("{{method=\"Kv/Put\",code=\"Ok\"}} {EACH}")), "{text}");
    assert!(text.contains(&format!("{{method=\"Kv/Get\",code=\"Ok\"}} {}", 3 * EACH)), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_is_answered_and_says_what_became_of_the_operation() {
    let node = Node::start().await;
    let mut exchange = Exchange::open(&node).await;
    let short = v1::Operation { timeout_us: 50_000, ..operation(1, waiting()) };
    let long = v1::Operation { timeout_us: 60_000_000, ..operation(2, waiting()) };
    exchange.send(vec![long, short]).await;
    let (id, reply) = exchange.next().await;
    assert_eq!((id, error_of(&reply).0, error_of(&reply).1), (1, ErrorCode::Behind, Outcome::NotApplied));
    let gone = v1::Operation { timeout_us: 1, ..operation(3, Asked::Put(put("k", "v"))) };
    exchange.send(vec![gone]).await;
    let (id, reply) = exchange.next().await;
    assert_eq!((id, error_of(&reply).0, error_of(&reply).1), (3, ErrorCode::DeadlineExceeded, Outcome::NotApplied));
    exchange.send(vec![cancel(2)]).await;
    let (id, reply) = exchange.next().await;
    assert_eq!((id, error_of(&reply).0, error_of(&reply).1), (2, ErrorCode::Cancelled, Outcome::NotApplied));
    // Ids of operations that were answered are free, and cancelling what is unknown means nothing.
    exchange.send(vec![cancel(2), operation(2, Asked::Get(get("k", Consistency::Linearizable)))]).await;
    assert!(matches!(exchange.next().await, (2, Reply::Get(v1::GetResponse { kv: None, .. }))));
}

/// The status that ends a stream, and the answers before it.
async fn ended(exchange: &mut Exchange) -> (DetailedStatus, Vec<u64>) {
    let mut answered = Vec::new();
    loop {
        match within(exchange.answers.message()).await {
            Ok(Some(batch)) => answered.extend(batch.answers.iter().map(|answer| answer.id)),
            Ok(None) => panic!("the stream ended well"),
            Err(status) => return (details(&status), answered),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mistake_ends_the_stream_and_names_the_remedy_after_what_was_answered() {
    let node = Node::start().await;
    let read = || Asked::Get(get("k", Consistency::Eventual));
    for (mistake, said) in [
        (vec![operation(0, read())], "greater than 0"),
        (vec![operation(7, waiting()), operation(7, read())], "operation 7 is in flight already"),
        (vec![operation(7, waiting()), operation(7, Asked::Put(put("k", "v")))], "operation 7 is in flight already"),
        (vec![v1::Operation { id: 7, ..Default::default() }], "has no request"),
    ] {
        let mut exchange = Exchange::open(&node).await;
        exchange.send([vec![operation(5, read())], mistake].concat()).await;
        let (error, answered) = ended(&mut exchange).await;
        assert_eq!((error.code(), error.outcome()), (Some(ErrorCode::InvalidArgument), Outcome::Unknown));
        assert!(error.message.contains(said), "{}", error.message);
        assert_eq!(answered, [5]);
    }
    let mut exchange = Exchange::open(&node).await;
    exchange.send(vec![operation(1, Asked::Put(put("k", vec![0; CLIENT_MESSAGE_BYTES_MAX])))]).await;
    let (error, _) = ended(&mut exchange).await;
    assert_eq!((error.code(), error.outcome()), (Some(ErrorCode::ResourceExhausted), Outcome::Unknown));
    assert!(error.message.contains("pipeline_batch_bytes_max"), "{}", error.message);
    // One that the server can read is refused alone.
    let mut exchange = Exchange::open(&node).await;
    let reply = exchange.ask(Asked::Put(put("k", vec![0; REQUEST_BYTES_MAX + 1]))).await;
    assert_eq!((error_of(&reply).0, error_of(&reply).1), (ErrorCode::ResourceExhausted, Outcome::NotApplied));
    assert!(matches!(exchange.ask(read()).await, Reply::Get(_)));
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_no_operations_end_the_stream_and_harm_nobody() {
    let node = Node::start().await;
    // Cut short, longer than the message, a wrong wire type inside, and a field of a newer version before a mistake.
    for bytes in
        [b"\x0a\x05\x08".as_slice(), b"\x0a\xff\xff\xff\xff\x0f\x00", b"\x0a\x02\x0d\x01", b"\x7a\x01x\x0a\x02\x08\x07"]
    {
        let mut client = tonic::client::Grpc::new(node.channel().await);
        client.ready().await.unwrap();
        let path = "/d_engine.v1.Pipeline/Exchange".parse().unwrap();
        let request = Request::new(tokio_stream::once(Bytes::copy_from_slice(bytes)));
        let mut answers = client.streaming(request, path, RawCodec).await.unwrap().into_inner();
        let refused = details(&within(answers.message()).await.unwrap_err());
        assert_eq!((refused.code(), refused.outcome()), (Some(ErrorCode::InvalidArgument), Outcome::Unknown));
    }
    node.kv().await.put(put("k", "v")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_never_reads_is_not_read_from_and_others_are_served() {
    const READS: u64 = 500;
    let node = Node::start().await;
    node.kv().await.put(put("large", vec![0; 1 << 20])).await.unwrap();
    let mut exchange = Exchange::open(&node).await;
    let read = |id| operation(id, Asked::Get(get("large", Consistency::Eventual)));
    exchange.send((1..=READS).map(read).collect()).await;
    let mut other = Exchange::open(&node).await;
    let answered = || {
        let text = node.metrics.encode(&Figures::default()).unwrap();
        let line =
            text.lines().find_map(|line| line.strip_prefix("d_engine_requests_total{method=\"Kv/Get\",code=\"Ok\"} "));
        line.map_or(0, |count| count.parse::<u64>().unwrap())
    };
    while answered() == 0 {
        assert!(matches!(other.ask(Asked::Put(put("k", "v"))).await, Reply::Put(_)));
    }
    for _ in 0..200 {
        assert!(matches!(other.ask(Asked::Put(put("k", "v"))).await, Reply::Put(_)));
    }
    assert!(answered() < 100, "{} answers of a mebibyte wait for somebody", answered());
    let mut ids: Vec<u64> = Vec::new();
    for _ in 0..READS {
        let (id, reply) = exchange.next().await;
        assert!(matches!(&reply, Reply::Get(get) if get.kv.as_ref().unwrap().value.len() == 1 << 20));
        ids.push(id);
    }
    ids.sort_unstable();
    assert_eq!(ids, (1..=READS).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn more_operations_than_may_be_in_flight_are_all_answered() {
    let node = Node::start().await;
    let mut exchange = Exchange::open(&node).await;
    let count = 2 * u64::try_from(PIPELINE_OPERATIONS_MAX).unwrap() + 1000;
    let (sent, mut left) = (1..=count, (1..=count).collect::<BTreeSet<_>>());
    let operations: Vec<_> = sent.map(|id| v1::Operation { timeout_us: 100_000, ..operation(id, waiting()) }).collect();
    let sender = exchange.operations.clone();
    tokio::spawn(async move {
        for operations in operations.chunks(5000) {
            sender.send(v1::OperationBatch { operations: operations.to_vec() }).await.unwrap();
        }
    });
    while !left.is_empty() {
        let (id, reply) = exchange.next().await;
        assert_eq!(error_of(&reply).0, ErrorCode::Behind);
        assert!(left.remove(&id), "{id} was answered twice");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_drains_answers_what_it_has_and_ends_with_its_client() {
    let node = Node::start().await;
    let mut exchange = Exchange::open(&node).await;
    exchange.ask(Asked::Put(put("k", "v"))).await;
    exchange.send(vec![operation(1, waiting())]).await;
    // It has arrived once what came after it is answered.
    exchange.send(vec![operation(2, Asked::Get(get("k", Consistency::Eventual)))]).await;
    assert!(matches!(exchange.next().await, (2, Reply::Get(_))));
    node.engine.consensus().stop().await;
    node.stop.send(()).unwrap();
    let told = within(exchange.answers.message()).await.unwrap().unwrap();
    assert_eq!((told.draining, told.answers), (true, Vec::new()));
    // What comes late is not refused for that, but has lost its leader.
    exchange
        .send(vec![operation(3, Asked::Put(put("k", "w"))), operation(4, Asked::Get(get("k", Consistency::Eventual)))])
        .await;
    let mut late = BTreeMap::from([exchange.next().await, exchange.next().await]);
    assert_eq!(error_of(&late[&3]).1, Outcome::NotApplied);
    assert!(matches!(late.remove(&4), Some(Reply::Get(_))));
    exchange.send(vec![cancel(1)]).await;
    let Exchange { operations, mut answers, .. } = exchange;
    drop(operations);
    let last = within(answers.message()).await.unwrap().unwrap();
    assert_eq!((last.draining, last.answers.len(), last.answers[0].id), (false, 1, 1));
    assert_eq!(within(answers.message()).await.unwrap(), None, "the stream ends well");
    within(node.serving).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_happens_each_operation_has_one_answer_and_the_answer_is_true() {
    const OPERATIONS: u64 = 20_000;
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let node = Node::start().await;
    node.kv().await.put(put("large", vec![0; 300_000])).await.unwrap();
    let mut exchange = Exchange::open(&node).await;
    let mut left: BTreeSet<u64> = (1..=OPERATIONS).collect();
    let mut batches = Vec::new();
    let mut id = 0;
    while id < OPERATIONS {
        let mut operations = Vec::new();
        for _ in 0..random.u64(1..300).min(OPERATIONS - id) {
            id += 1;
            let consistency = [Consistency::Linearizable, Consistency::Lease, Consistency::Eventual][random.usize(..3)];
            let key: Bytes = format!("w{id}").into();
            let value = vec![b'v'; random.usize(..2000)].into();
            let request = match random.u32(..100) {
                0..45 => Asked::Put(v1::PutRequest { key, value, ..Default::default() }),
                45..50 => Asked::CompareAndSwap(v1::CompareAndSwapRequest { key, value, ..Default::default() }),
                50..53 => Asked::Get(get("large", consistency)),
                53..55 => waiting(),
                55..57 => Asked::Get(v1::GetRequest {
                    key: "large".into(),
                    read: Some(v1::ReadOptions { revision: 1, ..Default::default() }),
                }),
                _ => Asked::Get(get(format!("w{}", random.u64(1..=id)), consistency)),
            };
            let timeout_us = match random.u32(..4) {
                0 => random.u64(1..20_000),
                _ => 2_000_000,
            };
            operations.push(v1::Operation { timeout_us, ..operation(id, request) });
            if random.u32(..10) == 0 {
                operations.push(cancel(random.u64(id.saturating_sub(200).max(1)..=id)));
            }
        }
        batches.push(operations);
    }
    let written: BTreeSet<u64> = batches
        .iter()
        .flatten()
        .filter(|operation| matches!(operation.request, Some(Asked::Put(_) | Asked::CompareAndSwap(_))))
        .map(|operation| operation.id)
        .collect();
    let sender = exchange.operations.clone();
    let sending = tokio::spawn(async move {
        for operations in batches {
            sender.send(v1::OperationBatch { operations }).await.unwrap();
        }
    });
    let mut outcomes = BTreeMap::new();
    while !left.is_empty() {
        if random.u32(..500) == 0 {
            // A reader that is slow.
            node.kv().await.put(put("k", "v")).await.unwrap();
        }
        let (id, reply) = exchange.next().await;
        assert!(left.remove(&id), "{id} was answered twice");
        let outcome = match &reply {
            Reply::Put(_) => Outcome::Applied,
            Reply::CompareAndSwap(swap) if swap.succeeded => Outcome::Applied,
            Reply::Error(_) => error_of(&reply).1,
            _ => Outcome::NotApplied,
        };
        outcomes.insert(id, outcome);
    }
    sending.await.unwrap();
    let count = |wanted| outcomes.values().filter(|outcome| **outcome == wanted).count();
    println!("{} applied, {} unknown", count(Outcome::Applied), count(Outcome::Unknown));
    let mut kv = node.kv().await;
    for (id, outcome) in outcomes.into_iter().filter(|(id, _)| written.contains(id)) {
        let found = kv.get(get(format!("w{id}"), Consistency::Lease)).await.unwrap().into_inner().kv.is_some();
        match outcome {
            Outcome::Applied => assert!(found, "{id} was applied"),
            Outcome::NotApplied => assert!(!found, "{id} was not applied"),
            _ => {}
        }
    }
    // Nothing is left behind: the stream is good for more.
    assert!(matches!(exchange.ask(Asked::Put(put("k", "v"))).await, Reply::Put(_)));
}
