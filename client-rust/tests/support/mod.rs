//! A node that answers as a test tells it, over real gRPC on a loopback port.

#![allow(dead_code, clippy::unwrap_used, clippy::panic, clippy::expect_used)]

pub(crate) mod leases;
pub(crate) mod pipeline;
pub(crate) mod store;

use std::sync::Arc;
use std::time::Duration;

use d_engine_client::{Client, ClientBuilder};
use d_engine_proto::v1::cluster_server::{Cluster, ClusterServer};
use d_engine_proto::v1::kv_server::{Kv, KvServer};
use d_engine_proto::v1::lease_server::{Lease, LeaseServer};
use d_engine_proto::v1::pipeline_server::PipelineServer;
use d_engine_proto::v1::session_server::{Session, SessionServer};
use d_engine_proto::v1::{answer, operation};
use d_engine_proto::{DetailedStatus, ErrorCode, v1};
use parking_lot::Mutex;
use pipeline::{Manner, Operate, PipelineOf, operate_by_calls};
use store::Store;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// How a node answers calls for keys, and renewals of leases.
#[derive(Clone, Debug)]
pub(crate) enum Behaviour {
    /// Serves them.
    Serve,
    /// Refuses them with this error.
    Refuse(DetailedStatus),
    /// Takes them and never answers.
    Silent,
    /// Applies them, then breaks the answer with a status that no d-engine server writes.
    Garble,
    /// Applies them, then answers with this error.
    ApplyAndRefuse(DetailedStatus),
    /// Applies them, then never answers.
    ApplyAndHang,
}

/// The state of a fake node; a test changes it while it runs.
#[derive(Debug)]
pub(crate) struct Script {
    pub(crate) behaviour: Behaviour,
    pub(crate) header: v1::ResponseHeader,
    pub(crate) members: Vec<v1::Member>,
    pub(crate) leader: Option<v1::LeaderHint>,
    /// The state it shares with the nodes of its cluster.
    pub(crate) store: Arc<Mutex<Store>>,
    /// Refuses to register sessions with this error. Otherwise it registers them whatever its behaviour, except that a
    /// node that does not lead refuses.
    pub(crate) no_sessions: Option<DetailedStatus>,
    pub(crate) manner: Manner,
    /// What it has applied of the store, as far as reads show it.
    pub(crate) applied_max: u64,
    /// Requests received, by method.
    pub(crate) puts: u32,
    pub(crate) gets: u32,
    pub(crate) renewals: u32,
    /// Messages of pipelines, and the operations and cancellations in them.
    pub(crate) messages: u32,
    pub(crate) operations: u32,
    pub(crate) cancels: u32,
    /// The `grpc-timeout` of the last request.
    pub(crate) timeout: Option<String>,
    /// The `traceparent` of the last put.
    pub(crate) traceparent: Option<String>,
}

/// A fake node. Dropping it is like killing its process: its connections break at once.
pub(crate) struct FakeNode {
    pub(crate) address: String,
    pub(crate) script: Arc<Mutex<Script>>,
    /// Of its own, so that all it runs ends with it.
    runtime: Option<Runtime>,
}

#[derive(Clone)]
struct Service(Arc<Mutex<Script>>);

pub(crate) const CLUSTER: u64 = 0xc1;

impl FakeNode {
    pub(crate) fn start(id: u32) -> Self {
        Self::start_at(id, "127.0.0.1:0")
    }

    pub(crate) fn start_at(id: u32, address: &str) -> Self {
        let listener = std::net::TcpListener::bind(address).unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let header = v1::ResponseHeader { cluster_id: CLUSTER, epoch: 1, revision: 1, node_id: id, term: 1 };
        let script = Arc::new(Mutex::new(Script {
            behaviour: Behaviour::Serve,
            header,
            members: Vec::new(),
            leader: None,
            store: Arc::new(Mutex::new(Store { revision: 1, session_ttl_ms: 60_000, ..Store::default() })),
            no_sessions: None,
            manner: Manner::Serve,
            applied_max: u64::MAX,
            puts: 0,
            gets: 0,
            renewals: 0,
            messages: 0,
            operations: 0,
            cancels: 0,
            timeout: None,
            traceparent: None,
        }));
        let service = Service(Arc::clone(&script));
        let server = tonic::transport::Server::builder()
            .add_service(KvServer::new(service.clone()))
            .add_service(LeaseServer::new(service.clone()))
            .add_service(SessionServer::new(service.clone()))
            .add_service(PipelineServer::new(PipelineOf(service.clone())))
            .add_service(ClusterServer::new(service));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.spawn(async move {
            let incoming = TcpListenerStream::new(TcpListener::from_std(listener).unwrap());
            server.serve_with_incoming(incoming).await.unwrap();
        });
        Self { address, script, runtime: Some(runtime) }
    }

    pub(crate) fn id(&self) -> u32 {
        self.script.lock().header.node_id
    }

    pub(crate) fn behave(&self, behaviour: Behaviour) {
        self.script.lock().behaviour = behaviour;
    }

    pub(crate) fn hint(&self, term: u64) -> v1::LeaderHint {
        v1::LeaderHint {
            node_id: self.id(),
            client_address: self.address.clone(),
            application_address: String::new(),
            term,
        }
    }

    pub(crate) fn puts(&self) -> u32 {
        self.script.lock().puts
    }

    pub(crate) fn gets(&self) -> u32 {
        self.script.lock().gets
    }

    pub(crate) fn renewals(&self) -> u32 {
        self.script.lock().renewals
    }

    /// The state it shares with the nodes of its cluster.
    pub(crate) fn store(&self) -> Arc<Mutex<Store>> {
        Arc::clone(&self.script.lock().store)
    }
}

impl Drop for FakeNode {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Starts `count` nodes that know each other, and the first as leader of term 1.
pub(crate) fn cluster(count: u32) -> Vec<FakeNode> {
    let nodes: Vec<_> = (1..=count).map(FakeNode::start).collect();
    let store = nodes[0].store();
    for node in &nodes[1..] {
        node.script.lock().store = Arc::clone(&store);
    }
    introduce(&nodes);
    elect(&nodes, 0, 1);
    nodes
}

/// Tells every node of all members.
pub(crate) fn introduce(nodes: &[FakeNode]) {
    let member = |node: &FakeNode| v1::Member {
        id: node.id(),
        role: v1::MemberRole::Voter.into(),
        peer_address: node.address.clone(),
        client_address: node.address.clone(),
        application_address: String::new(),
        promotable: false,
    };
    let members: Vec<_> = nodes.iter().map(member).collect();
    for node in nodes {
        node.script.lock().members = members.clone();
    }
}

/// Tells every node that the one at `leader` leads `term`; the others refuse writes and name it.
pub(crate) fn elect(nodes: &[FakeNode], leader: usize, term: u64) {
    let hint = nodes[leader].hint(term);
    for (index, node) in nodes.iter().enumerate() {
        let behaviour =
            if index == leader { Behaviour::Serve } else { Behaviour::Refuse(not_leader(Some(hint.clone()))) };
        let mut script = node.script.lock();
        script.behaviour = behaviour;
        script.leader = Some(hint.clone());
        script.header.term = term;
    }
}

pub(crate) fn refusal(code: ErrorCode, outcome: v1::Outcome, retry_safe: bool) -> DetailedStatus {
    let detail =
        v1::ErrorDetail { code: code.number(), outcome: outcome.into(), retry_safe, ..v1::ErrorDetail::default() };
    DetailedStatus { message: code.meaning().to_owned(), detail }
}

pub(crate) fn not_leader(leader: Option<v1::LeaderHint>) -> DetailedStatus {
    let mut status = refusal(ErrorCode::NotLeader, v1::Outcome::NotApplied, true);
    status.detail.leader = leader;
    status
}

/// A client that starts from these nodes.
pub(crate) fn client(seeds: &[&FakeNode], timeout: Duration) -> Client {
    builder(seeds, timeout).build().unwrap()
}

pub(crate) fn builder(seeds: &[&FakeNode], timeout: Duration) -> ClientBuilder {
    let endpoints = seeds.iter().map(|node| node.address.clone());
    Client::builder().endpoints(endpoints).call_timeout(timeout).pipelined(pipelined())
}

/// Whether the tests of this binary go over the pipeline: `tests/unary.rs` has them all once more, over unary calls.
pub(crate) fn pipelined() -> bool {
    !module_path!().starts_with("unary::")
}

/// A generous bound on everything a test waits for.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until `condition` holds.
pub(crate) async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, waiting).await.is_ok(), "never came true: {what}");
}

impl Service {
    /// Answers as the behaviour says; `answer` serves the call.
    async fn behave<T>(
        &self,
        answer: impl FnOnce(&mut Store, v1::ResponseHeader) -> Result<T, DetailedStatus>,
    ) -> Result<Response<T>, Status> {
        let behaviour = self.0.lock().behaviour.clone();
        let answer = || {
            let (store, mut header) = {
                let script = self.0.lock();
                (Arc::clone(&script.store), script.header)
            };
            let mut store = store.lock();
            header.revision = store.revision;
            answer(&mut store, header)
        };
        match behaviour {
            Behaviour::Serve => answer().map(Response::new).map_err(Status::from),
            Behaviour::Refuse(status) => Err(status.into()),
            Behaviour::Silent => std::future::pending().await,
            Behaviour::Garble => {
                let _ = answer();
                Err(Status::unavailable("the proxy lost its upstream"))
            }
            Behaviour::ApplyAndRefuse(status) => {
                let _ = answer();
                Err(status.into())
            }
            Behaviour::ApplyAndHang => {
                let _ = answer();
                std::future::pending().await
            }
        }
    }

    /// Answers what every leader serves, whatever its behaviour.
    fn lead<T>(
        &self,
        answer: impl FnOnce(&mut Store, v1::ResponseHeader) -> Result<T, DetailedStatus>,
    ) -> Result<Response<T>, Status> {
        let script = self.0.lock();
        match &script.behaviour {
            Behaviour::Refuse(status) if status.code() == Some(ErrorCode::NotLeader) => Err(status.clone().into()),
            _ => {
                let mut store = script.store.lock();
                let header = v1::ResponseHeader { revision: store.revision, ..script.header };
                answer(&mut store, header).map(Response::new).map_err(Status::from)
            }
        }
    }
}

impl Operate for Service {
    async fn operate(
        &self,
        operation: operation::Request,
        timeout: Duration,
        trace: Option<v1::TraceContext>,
    ) -> Result<answer::Reply, Status> {
        operate_by_calls!(operation, self, timeout, trace;
            Put: Kv::put, Get: Kv::get, GetMany: Kv::get_many, Range: Kv::range, Delete: Kv::delete,
            DeleteRange: Kv::delete_range, CompareAndSwap: Kv::compare_and_swap, Txn: Kv::txn,
            LeaseGrant: Lease::grant, LeaseRevoke: Lease::revoke, LeaseRenew: Lease::renew,
            LeaseTimeToLive: Lease::time_to_live, LeaseList: Lease::list,
            SessionRegister: Session::register, SessionRenew: Session::renew, SessionClose: Session::close,
            Members: Cluster::members, Status: Cluster::status,
        )
    }

    fn manner(&self) -> Manner {
        self.0.lock().manner
    }

    fn received(&self, batch: &v1::OperationBatch) {
        let cancel = |operation: &&v1::Operation| matches!(operation.request, Some(operation::Request::Cancel(_)));
        let cancels = u32::try_from(batch.operations.iter().filter(cancel).count()).unwrap();
        let mut script = self.0.lock();
        script.messages += 1;
        script.cancels += cancels;
        script.operations += u32::try_from(batch.operations.len()).unwrap() - cancels;
    }
}

fn timeout_of<T>(request: &Request<T>) -> Option<String> {
    request.metadata().get("grpc-timeout").map(|value| value.to_str().unwrap().to_owned())
}

#[tonic::async_trait]
impl Kv for Service {
    async fn put(&self, request: Request<v1::PutRequest>) -> Result<Response<v1::PutResponse>, Status> {
        {
            let mut script = self.0.lock();
            script.puts += 1;
            script.timeout = timeout_of(&request);
            let traceparent = request.metadata().get(d_engine_proto::TRACEPARENT);
            script.traceparent = traceparent.map(|value| value.to_str().unwrap().to_owned());
        }
        self.behave(|store, header| {
            let mut response = store.mutate(request.into_inner(), |put| &mut put.session, Store::put)?;
            response.header = Some(v1::ResponseHeader { revision: store.revision, ..header });
            Ok(response)
        })
        .await
    }

    async fn get(&self, request: Request<v1::GetRequest>) -> Result<Response<v1::GetResponse>, Status> {
        {
            let mut script = self.0.lock();
            script.gets += 1;
            script.timeout = timeout_of(&request);
        }
        let applied_max = self.0.lock().applied_max;
        self.behave(|store, mut header| {
            let request = request.into_inner();
            header.revision = header.revision.min(applied_max);
            if request.read.is_some_and(|read| read.min_revision > header.revision) {
                return Err(refusal(ErrorCode::Behind, v1::Outcome::NotApplied, true));
            }
            let kv = store.keys.get(&request.key).filter(|kv| kv.mod_revision <= header.revision).cloned();
            Ok(v1::GetResponse { header: Some(header), kv })
        })
        .await
    }

    async fn range(&self, request: Request<v1::RangeRequest>) -> Result<Response<v1::RangeResponse>, Status> {
        // Pages of two keys at most.
        self.behave(|store, mut header| {
            let request = request.into_inner();
            let kvs = store.inside(&request.range.unwrap());
            let next = kvs.get(2).map(|kv| kv.key.clone());
            if let Some(read) = request.read.filter(|read| read.revision != 0) {
                header.revision = read.revision;
            }
            Ok(v1::RangeResponse {
                header: Some(header),
                kvs: kvs.iter().take(2).cloned().collect(),
                count: next.is_none().then_some(kvs.len() as u64),
                more: next.is_some(),
                next: next.unwrap_or_default(),
            })
        })
        .await
    }

    async fn get_many(&self, request: Request<v1::GetManyRequest>) -> Result<Response<v1::GetManyResponse>, Status> {
        self.behave(|store, header| {
            let keys = request.into_inner().keys;
            let kvs = keys.iter().filter_map(|key| store.keys.get(key)).cloned().collect();
            Ok(v1::GetManyResponse { header: Some(header), kvs })
        })
        .await
    }

    async fn delete(&self, _: Request<v1::DeleteRequest>) -> Result<Response<v1::DeleteResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn delete_range(
        &self,
        request: Request<v1::DeleteRangeRequest>,
    ) -> Result<Response<v1::DeleteRangeResponse>, Status> {
        self.behave(|store, header| {
            let delete = |store: &mut Store, request: v1::DeleteRangeRequest| {
                let previous = store.inside(&request.range.unwrap());
                for kv in &previous {
                    store.keys.remove(&kv.key);
                }
                Ok(v1::DeleteRangeResponse { header: None, deleted: previous.len() as u64, previous })
            };
            let mut response = store.mutate(request.into_inner(), |request| &mut request.session, delete)?;
            response.header = Some(header);
            Ok(response)
        })
        .await
    }

    async fn compare_and_swap(
        &self,
        _: Request<v1::CompareAndSwapRequest>,
    ) -> Result<Response<v1::CompareAndSwapResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn txn(&self, _: Request<v1::TxnRequest>) -> Result<Response<v1::TxnResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

#[tonic::async_trait]
impl Cluster for Service {
    async fn members(&self, _: Request<v1::MembersRequest>) -> Result<Response<v1::MembersResponse>, Status> {
        let script = self.0.lock();
        Ok(Response::new(v1::MembersResponse {
            header: Some(script.header),
            members: script.members.clone(),
            leader: script.leader.clone(),
        }))
    }

    async fn status(&self, _: Request<v1::StatusRequest>) -> Result<Response<v1::StatusResponse>, Status> {
        let script = self.0.lock();
        Ok(Response::new(v1::StatusResponse { header: Some(script.header), ..v1::StatusResponse::default() }))
    }

    async fn change_member(
        &self,
        _: Request<v1::ChangeMemberRequest>,
    ) -> Result<Response<v1::ChangeMemberResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn transfer_leadership(
        &self,
        _: Request<v1::TransferLeadershipRequest>,
    ) -> Result<Response<v1::TransferLeadershipResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}
