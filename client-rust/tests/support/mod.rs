//! A node that answers as a test tells it, over real gRPC on a loopback port.

#![allow(dead_code, clippy::unwrap_used, clippy::panic, clippy::expect_used)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use d_engine_client::Client;
use d_engine_proto::v1::cluster_server::{Cluster, ClusterServer};
use d_engine_proto::v1::kv_server::{Kv, KvServer};
use d_engine_proto::{DetailedStatus, ErrorCode, v1};
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// How a node answers puts and gets.
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
}

/// The state of a fake node; a test changes it while it runs.
#[derive(Debug)]
pub(crate) struct Script {
    pub(crate) behaviour: Behaviour,
    pub(crate) header: v1::ResponseHeader,
    pub(crate) members: Vec<v1::Member>,
    pub(crate) leader: Option<v1::LeaderHint>,
    pub(crate) store: BTreeMap<Bytes, Bytes>,
    /// Requests received, by method.
    pub(crate) puts: u32,
    pub(crate) gets: u32,
    /// The `grpc-timeout` of the last request.
    pub(crate) timeout: Option<String>,
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
            store: BTreeMap::new(),
            puts: 0,
            gets: 0,
            timeout: None,
        }));
        let service = Service(Arc::clone(&script));
        let server = tonic::transport::Server::builder()
            .add_service(KvServer::new(service.clone()))
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
    let endpoints = seeds.iter().map(|node| node.address.clone());
    Client::builder().endpoints(endpoints).call_timeout(timeout).build().unwrap()
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
    async fn behave<T>(&self, answer: impl FnOnce(&mut Script) -> T) -> Result<Response<T>, Status> {
        let behaviour = self.0.lock().behaviour.clone();
        match behaviour {
            Behaviour::Serve => Ok(Response::new(answer(&mut self.0.lock()))),
            Behaviour::Refuse(status) => Err(status.into()),
            Behaviour::Silent => std::future::pending().await,
            Behaviour::Garble => {
                answer(&mut self.0.lock());
                Err(Status::unavailable("the proxy lost its upstream"))
            }
        }
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
        }
        self.behave(|script| {
            script.header.revision += 1;
            let put = request.into_inner();
            script.store.insert(put.key, put.value);
            v1::PutResponse { header: Some(script.header), ..Default::default() }
        })
        .await
    }

    async fn get(&self, request: Request<v1::GetRequest>) -> Result<Response<v1::GetResponse>, Status> {
        {
            let mut script = self.0.lock();
            script.gets += 1;
            script.timeout = timeout_of(&request);
        }
        self.behave(|script| {
            let key = request.into_inner().key;
            let kv = script.store.get(&key).map(|value| v1::KeyValue {
                key: key.clone(),
                value: value.clone(),
                create_revision: 1,
                mod_revision: 1,
                version: 1,
                lease: 0,
            });
            v1::GetResponse { header: Some(script.header), kv }
        })
        .await
    }

    async fn range(&self, request: Request<v1::RangeRequest>) -> Result<Response<v1::RangeResponse>, Status> {
        // Pages of two keys at most.
        self.behave(|script| {
            let request = request.into_inner();
            let range = request.range.unwrap();
            let inside = |key: &Bytes| *key >= range.start && (range.end.is_empty() || *key < range.end);
            let kv = |(key, value): (&Bytes, &Bytes)| v1::KeyValue {
                key: key.clone(),
                value: value.clone(),
                ..v1::KeyValue::default()
            };
            let kvs: Vec<_> = script.store.iter().filter(|(key, _)| inside(key)).map(kv).collect();
            let count = kvs.len() as u64;
            let page: Vec<_> = kvs.iter().take(2).cloned().collect();
            let next = kvs.get(2).map(|kv| kv.key.clone());
            let mut header = script.header;
            if let Some(read) = request.read.filter(|read| read.revision != 0) {
                header.revision = read.revision;
            }
            v1::RangeResponse {
                header: Some(header),
                kvs: page,
                count: next.is_none().then_some(count),
                more: next.is_some(),
                next: next.unwrap_or_default(),
            }
        })
        .await
    }

    async fn get_many(&self, _: Request<v1::GetManyRequest>) -> Result<Response<v1::GetManyResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn delete(&self, _: Request<v1::DeleteRequest>) -> Result<Response<v1::DeleteResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn delete_range(
        &self,
        _: Request<v1::DeleteRangeRequest>,
    ) -> Result<Response<v1::DeleteRangeResponse>, Status> {
        Err(Status::unimplemented(""))
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
}
