//! The services of a real node of one, over a real port: what a client sees of errors, limits and bad input.

mod pipeline;
mod watch;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes};
use d_engine_proto::v1::cluster_client::ClusterClient;
use d_engine_proto::v1::kv_client::KvClient;
use d_engine_proto::v1::lease_client::LeaseClient;
use d_engine_proto::v1::maintenance_client::MaintenanceClient;
use d_engine_proto::v1::session_client::SessionClient;
use d_engine_proto::v1::{self, Outcome};
use d_engine_proto::{DetailedStatus, ErrorCode, NodeId, limits};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};

use super::*;
use crate::config::RaftNodeConfig;
use crate::consensus::{Consensus, ConsensusConfig, SnapshotPolicy};
use crate::engine::{EngineConfig, ReadPolicy};
use crate::limits::{CLIENT_MESSAGE_BYTES_MAX, REQUEST_BYTES_MAX};
use crate::metrics::{Figures, Metrics};
use crate::state_machine::kv::KvStateMachine;
use crate::storage::MemoryStorageEngine;

const PATIENCE: Duration = Duration::from_secs(60);

struct Node {
    address: SocketAddr,
    engine: Engine,
    metrics: Arc<Metrics>,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<Result<(), ServeError>>,
    _directory: tempfile::TempDir,
}

impl Node {
    async fn start() -> Self {
        Self::start_with(&RaftNodeConfig::default()).await
    }

    async fn start_with(config: &RaftNodeConfig) -> Self {
        let listener = bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let kv = Arc::new(KvStateMachine::open(&directory.path().join("state")).unwrap());
        let metrics = Arc::new(Metrics::new());
        let consensus_config = ConsensusConfig {
            node_id: NodeId(1),
            initial_cluster: vec![v1::InitialMember { id: 1, address: address.to_string(), learner: false }],
            client_address: address.to_string(),
            application_address: String::new(),
            timings: config.raft.timings(),
            pending_bytes_max: config.raft.backpressure.max_pending_bytes,
            snapshot_directory: directory.path().join("snapshots"),
            snapshot_policy: SnapshotPolicy::OFF,
        };
        let storage = Arc::new(MemoryStorageEngine::default());
        let (consensus, peers) =
            Consensus::start(consensus_config, storage, kv.clone(), metrics.clone(), None).await.unwrap();
        let engine_config = EngineConfig {
            read_policy: ReadPolicy { default: v1::Consistency::Linearizable, allow_client_override: true },
            watches_enabled: config.raft.watch.enabled,
            leases_enabled: config.raft.state_machine.lease_enabled,
            history_retention: None,
            data_directories: vec![directory.path().to_owned()],
        };
        let engine = Engine::new(consensus, kv, engine_config, metrics.clone());
        let (stop, stopped) = oneshot::channel();
        let shutdown = async {
            let _ = stopped.await;
        };
        let serving = tokio::spawn(serve(listener, engine.clone(), peers, config, None, metrics.clone(), shutdown));
        let mut leader = engine.consensus().leader_changes();
        within(leader.wait_for(Option::is_some)).await.unwrap();
        Self { address, engine, metrics, stop, serving, _directory: directory }
    }

    async fn channel(&self) -> Channel {
        Endpoint::from_shared(format!("http://{}", self.address)).unwrap().connect().await.unwrap()
    }

    async fn kv(&self) -> KvClient<Channel> {
        KvClient::new(self.channel().await)
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("in time")
}

fn put(key: &'static str, value: impl Into<Bytes>) -> v1::PutRequest {
    v1::PutRequest { key: key.into(), value: value.into(), ..v1::PutRequest::default() }
}

#[track_caller]
fn details(status: &Status) -> DetailedStatus {
    DetailedStatus::from_status(status).unwrap_or_else(|| panic!("no details in {status:?}"))
}

/// Sends bytes as they are.
#[derive(Clone, Copy)]
struct RawCodec;

impl Codec for RawCodec {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;
    fn encoder(&mut self) -> Self {
        *self
    }
    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for RawCodec {
    type Item = Bytes;
    type Error = Status;
    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}

impl Decoder for RawCodec {
    type Item = Bytes;
    type Error = Status;
    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}

async fn raw_call(node: &Node, path: &'static str, bytes: &'static [u8]) -> Status {
    let mut client = tonic::client::Grpc::new(node.channel().await);
    client.ready().await.unwrap();
    let request = Request::new(Bytes::from_static(bytes));
    client.unary(request, path.parse().unwrap(), RawCodec).await.unwrap_err()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_put_is_got_deleted_and_counted() {
    let node = Node::start().await;
    let mut kv = node.kv().await;
    let written = kv.put(put("k", "v")).await.unwrap().into_inner().header.unwrap();
    assert_eq!((written.revision, written.node_id), (1, 1));
    let get = v1::GetRequest { key: "k".into(), ..v1::GetRequest::default() };
    assert_eq!(kv.get(get.clone()).await.unwrap().into_inner().kv.unwrap().value, "v");
    let delete = v1::DeleteRequest { key: "k".into(), ..v1::DeleteRequest::default() };
    assert!(kv.delete(delete).await.unwrap().into_inner().deleted);
    assert_eq!(kv.get(get).await.unwrap().into_inner().kv, None);

    let mut cluster = ClusterClient::new(node.channel().await);
    let members = cluster.members(v1::MembersRequest {}).await.unwrap().into_inner();
    assert_eq!(members.members[0].client_address, node.address.to_string());
    let status = cluster.status(v1::StatusRequest {}).await.unwrap().into_inner();
    assert!(status.ready, "{}", status.problem);

    let text = node.metrics.encode(&Figures::default()).unwrap();
    assert!(text.contains("d_engine_requests_total{method=\"Kv/Get\",code=\"Ok\"} 2"), "{text}");
    assert!(text.contains("d_engine_request_duration_seconds_count{method=\"Kv/Put\"} 1"), "{text}");
    assert!(text.contains("d_engine_connections 2"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_carries_code_and_outcome() {
    let node = Node::start().await;
    let refused = node.kv().await.put(put("", "v")).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert_eq!(details(&refused).code(), Some(ErrorCode::InvalidArgument));
    assert_eq!(details(&refused).outcome(), Outcome::NotApplied);
    let text = node.metrics.encode(&Figures::default()).unwrap();
    assert!(text.contains("{method=\"Kv/Put\",code=\"InvalidArgument\"} 1"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_too_large_is_refused_by_the_name_of_the_limit_however_large_it_is() {
    let node = Node::start().await;
    let mut kv = node.kv().await;
    let command = v1::Command::from(v1::command::Command::Put(put("k", vec![0; REQUEST_BYTES_MAX])));
    let most = 2 * REQUEST_BYTES_MAX - command.encoded_len();
    kv.put(put("k", vec![0; most])).await.unwrap();
    for bytes in [most + 1, CLIENT_MESSAGE_BYTES_MAX + 1, 16 << 20] {
        let refused = kv.put(put("k", vec![0; bytes])).await.unwrap_err();
        let error = details(&refused);
        assert_eq!(error.code(), Some(ErrorCode::ResourceExhausted), "{bytes}");
        assert_eq!(error.outcome(), Outcome::NotApplied, "{bytes}");
        assert!(error.message.contains(&REQUEST_BYTES_MAX.to_string()), "{}", error.message);
        assert!(error.message.contains("request_bytes_max"), "{}", error.message);
    }
}

/// The stub has the limits that every language's stubs have unless told otherwise.
#[tokio::test(flavor = "multi_thread")]
async fn a_generated_stub_accepts_the_largest_answer_and_is_told_which_limit_a_larger_one_exceeds() {
    let node = Node::start().await;
    let mut kv = node.kv().await;
    let max = usize::try_from(limits::ANSWER_BYTES_MAX).unwrap();
    for key in ["a", "b", "c"] {
        kv.put(put(key, vec![0; max / 3 - 64])).await.unwrap();
    }
    let request = v1::GetManyRequest { keys: ["a", "b", "c"].map(Bytes::from).to_vec(), read: None };
    let answer = kv.get_many(request.clone()).await.unwrap().into_inner();
    let missing = max - v1::GetManyResponse { header: None, ..answer }.encoded_len();
    kv.put(put("c", vec![0; max / 3 - 64 + missing])).await.unwrap();
    let answer = kv.get_many(request.clone()).await.unwrap().into_inner();
    assert_eq!(v1::GetManyResponse { header: None, ..answer }.encoded_len(), max);

    kv.put(put("c", vec![0; max / 3 - 64 + missing + 1])).await.unwrap();
    let refused = details(&kv.get_many(request).await.unwrap_err());
    assert_eq!((refused.code(), refused.outcome()), (Some(ErrorCode::InvalidArgument), Outcome::NotApplied));
    assert!(refused.message.contains("answer_bytes_max"), "{}", refused.message);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_method_and_a_malformed_message_are_refused_with_details() {
    let node = Node::start().await;
    let unknown = raw_call(&node, "/d_engine.v1.Kv/Nothing", b"").await;
    assert_eq!(unknown.code(), Code::Unimplemented);
    assert_eq!(details(&unknown).code(), Some(ErrorCode::Unsupported));
    let malformed = raw_call(&node, "/d_engine.v1.Kv/Put", b"\xff\xff\xff\xff").await;
    assert_eq!(details(&malformed).code(), Some(ErrorCode::InvalidArgument));
    assert_eq!(details(&malformed).outcome(), Outcome::NotApplied);
    let text = node.metrics.encode(&Figures::default()).unwrap();
    assert!(text.contains("{method=\"unknown\",code=\"Unsupported\"} 1"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_is_answered_with_details_before_the_client_gives_up() {
    let node = Node::start().await;
    let read = v1::ReadOptions { min_revision: 1_000_000, ..v1::ReadOptions::default() };
    let mut request = Request::new(v1::GetRequest { key: "k".into(), read: Some(read) });
    request.set_timeout(Duration::from_millis(400));
    let refused = within(node.kv().await.get(request)).await.unwrap_err();
    assert_eq!(details(&refused).code(), Some(ErrorCode::Behind));

    let mut request = Request::new(put("k", "v"));
    request.metadata_mut().insert("grpc-timeout", "soon".parse().unwrap());
    let refused = node.kv().await.put(request).await.unwrap_err();
    assert_eq!(details(&refused).code(), Some(ErrorCode::InvalidArgument));
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_are_kept_over_a_stream_that_answers_in_order() {
    let node = Node::start().await;
    let mut leases = LeaseClient::new(node.channel().await);
    let grant = v1::LeaseGrantRequest { ttl_ms: 60_000, ..Default::default() };
    let granted = leases.grant(grant).await.unwrap().into_inner();
    let missing = granted.lease + 1;
    let asked = [granted.lease, missing, granted.lease];
    let requests = tokio_stream::iter(asked.map(|lease| v1::LeaseRenewRequest { lease }));
    let mut answers = leases.keep_alive(requests).await.unwrap().into_inner();
    for lease in asked {
        let answer = within(answers.message()).await.unwrap().unwrap();
        assert_eq!((answer.lease, answer.ttl_ms > 0), (lease, lease != missing));
        assert!(answer.header.is_some());
    }
    assert_eq!(within(answers.message()).await.unwrap(), None, "the stream ends with its requests");

    let refused = leases.renew(v1::LeaseRenewRequest { lease: missing }).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    assert_eq!(details(&refused).code(), Some(ErrorCode::LeaseNotFound));
    let listed = leases.list(v1::LeaseListRequest::default()).await.unwrap().into_inner();
    assert_eq!(listed.leases.len(), 1);
    let revoke = v1::LeaseRevokeRequest { lease: granted.lease, session: None };
    assert_eq!(leases.revoke(revoke).await.unwrap().into_inner().deleted, 0);
    let shown = leases.time_to_live(v1::LeaseTimeToLiveRequest { lease: granted.lease, ..Default::default() }).await;
    assert_eq!(details(&shown.unwrap_err()).code(), Some(ErrorCode::LeaseNotFound));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repetition_under_a_session_gets_the_first_answer() {
    let node = Node::start().await;
    let mut sessions = SessionClient::new(node.channel().await);
    let registered = sessions.register(v1::SessionRegisterRequest { ttl_ms: 5000 }).await.unwrap().into_inner();
    let session = registered.session;
    assert_eq!(sessions.renew(v1::SessionRenewRequest { session }).await.unwrap().into_inner().ttl_ms, 5000);
    let call = Some(v1::SessionCall { session, sequence: 1, acknowledged_through: 0 });
    let request = v1::PutRequest { session: call, return_previous: true, ..put("k", "v") };
    let first = node.kv().await.put(request.clone()).await.unwrap().into_inner();
    node.kv().await.put(put("k", "w")).await.unwrap();
    assert_eq!(node.kv().await.put(request.clone()).await.unwrap().into_inner(), first);
    sessions.close(v1::SessionCloseRequest { session }).await.unwrap();
    let refused = node.kv().await.put(request).await.unwrap_err();
    assert_eq!(details(&refused).code(), Some(ErrorCode::SessionExpired));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compacted_revision_is_refused_by_the_name_of_the_oldest_one() {
    let node = Node::start().await;
    for value in ["1", "2", "3"] {
        node.kv().await.put(put("k", value)).await.unwrap();
    }
    let mut maintenance = MaintenanceClient::new(node.channel().await);
    let target = Some(v1::compact_request::Target::Revision(3));
    let compacted = maintenance.compact(v1::CompactRequest { target }).await.unwrap().into_inner();
    assert_eq!(compacted.compacted_revision, 3);
    let read = v1::ReadOptions { revision: 2, ..v1::ReadOptions::default() };
    let refused = node.kv().await.get(v1::GetRequest { key: "k".into(), read: Some(read) }).await.unwrap_err();
    assert_eq!(details(&refused).code(), Some(ErrorCode::Compacted));
    assert_eq!(details(&refused).detail.revision, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_reflection_answer() {
    let node = Node::start().await;
    let mut health = HealthClient::new(node.channel().await);
    for service in ["", "d_engine.v1.Kv", "d_engine.v1.Lease", "d_engine.v1.Session", "d_engine.v1.Cluster"] {
        let request = HealthCheckRequest { service: service.to_owned() };
        let mut statuses = health.watch(request).await.unwrap().into_inner();
        let serving = async { while statuses.message().await.unwrap().unwrap().status() != ServingStatus::Serving {} };
        within(serving).await;
    }
    let refused = health.check(HealthCheckRequest { service: "nobody".to_owned() }).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);

    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    use tonic_reflection::pb::v1::{ServerReflectionRequest, server_reflection_client::ServerReflectionClient};
    let ask = MessageRequest::ListServices(String::new());
    let request = ServerReflectionRequest { host: String::new(), message_request: Some(ask) };
    let mut client = ServerReflectionClient::new(node.channel().await);
    let mut answers = client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
    let answer = within(answers.message()).await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::ListServicesResponse(list) = answer else { panic!("{answer:?}") };
    let names: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
    assert!(names.contains(&"d_engine.v1.Kv") && names.contains(&"grpc.health.v1.Health"), "{names:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_no_http2_harm_nobody() {
    let node = Node::start().await;
    let mut kv = node.kv().await;
    let preface: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let oversized_frame = [preface, &[0xff; 64]].concat();
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let noise: Vec<u8> = (0..4096).map(|_| random.u8(..)).collect();
    for garbage in [b"GET / HTTP/1.1\r\n\r\n".as_slice(), &oversized_frame, &noise, &[preface, &noise].concat()] {
        let mut stream = TcpStream::connect(node.address).await.unwrap();
        // The server may close before it has read everything.
        let _ = stream.write_all(garbage).await;
        let _ = stream.shutdown().await;
        let _ = within(stream.read_to_end(&mut Vec::new())).await;
        kv.put(put("k", "v")).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_beyond_the_limit_is_closed_at_once_and_leaves_the_others_alone() {
    let mut config = RaftNodeConfig::default();
    config.network.connections_max = 3;
    let node = Node::start_with(&config).await;
    let mut kv = node.kv().await;
    kv.put(put("k", "v")).await.unwrap();
    let mut idle = Vec::new();
    let refused = async {
        loop {
            let mut stream = TcpStream::connect(node.address).await.unwrap();
            let mut byte = [0];
            // A connection that is let in is silent until it has spoken.
            stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00").await.unwrap();
            match stream.read(&mut byte).await {
                Ok(1) => idle.push(stream),
                _ => break,
            }
        }
    };
    within(refused).await;
    assert_eq!(idle.len(), 2);
    kv.put(put("k", "v")).await.unwrap();
    let text = node.metrics.encode(&Figures::default()).unwrap();
    assert!(text.contains("d_engine_connections_refused_total 1"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_that_never_end_and_silent_connections_do_not_hold_up_the_end() {
    let node = Node::start().await;
    let mut health = HealthClient::new(node.channel().await);
    let _stream = health.watch(HealthCheckRequest::default()).await.unwrap();
    let _silent = TcpStream::connect(node.address).await.unwrap();
    node.kv().await.put(put("k", "v")).await.unwrap();
    node.engine.consensus().stop().await;
    node.stop.send(()).unwrap();
    within(node.serving).await.unwrap().unwrap();
    bind(&node.address.to_string()).await.unwrap();
}

#[tokio::test]
async fn a_port_in_use_and_an_address_of_another_machine_are_refused_with_a_remedy() {
    let taken = bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let error = bind(&address).await.unwrap_err();
    assert!(matches!(error, ServeError::AddressInUse { .. }));
    assert!(error.to_string().contains(&address), "{error}");
    let error = bind("192.0.2.1:9081").await.unwrap_err();
    assert!(error.to_string().contains("192.0.2.1:9081") && error.to_string().contains("choose"), "{error}");
}
