//! A fake store of versions with leases, and fake nodes that serve it over real gRPC and break off as a test tells them.
//!
//! It keeps every version, so that a test can compare what a client saw with what happened. Time plays no part: leases
//! end when a test ends them.

#![allow(dead_code, clippy::unwrap_used, clippy::panic, clippy::expect_used)]

use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use d_engine_client::Client;
use d_engine_proto::v1::cluster_server::{Cluster, ClusterServer};
use d_engine_proto::v1::kv_server::{Kv, KvServer};
use d_engine_proto::v1::lease_server::{Lease, LeaseServer};
use d_engine_proto::v1::pipeline_server::PipelineServer;
use d_engine_proto::v1::watch_request::Action;
use d_engine_proto::v1::watch_response::Kind;
use d_engine_proto::v1::watch_server::{Watch, WatchServer};
use d_engine_proto::v1::{answer, operation};
use d_engine_proto::{DetailedStatus, ErrorCode, v1};
use parking_lot::Mutex;
use pipeline::{Operate, PipelineOf, operate_by_calls};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

#[path = "pipeline.rs"]
mod pipeline;

pub(crate) const CLUSTER: u64 = 0xc1;
/// A generous bound on everything a test waits for.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

type Map = BTreeMap<Bytes, v1::KeyValue>;

/// What happens to one key.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    Put(Bytes, Bytes, u64),
    Delete(Bytes),
}

pub(crate) fn put(key: &str, value: &str) -> Change {
    Change::Put(Bytes::copy_from_slice(key.as_bytes()), Bytes::copy_from_slice(value.as_bytes()), 0)
}

pub(crate) fn delete(key: &str) -> Change {
    Change::Delete(Bytes::copy_from_slice(key.as_bytes()))
}

struct History {
    /// The keys at each revision, from 0 on.
    maps: Vec<Map>,
    /// The events of each revision, from 0 on.
    events: Vec<Vec<v1::WatchEvent>>,
    /// The oldest revision that can be read.
    compacted: u64,
    leases: BTreeMap<u64, u64>,
    last_lease: u64,
}

/// The store that all nodes of a fake cluster show.
#[derive(Clone)]
pub(crate) struct FakeStore {
    history: Arc<Mutex<History>>,
    revisions: Arc<watch::Sender<u64>>,
}

impl FakeStore {
    pub(crate) fn new() -> Self {
        let history = History {
            maps: vec![Map::new()],
            events: vec![Vec::new()],
            compacted: 0,
            leases: BTreeMap::new(),
            last_lease: 0,
        };
        Self { history: Arc::new(Mutex::new(history)), revisions: Arc::new(watch::Sender::new(0)) }
    }

    pub(crate) fn revision(&self) -> u64 {
        *self.revisions.borrow()
    }

    /// Makes changes as one revision, if they change anything.
    pub(crate) fn apply(&self, changes: &[Change]) -> u64 {
        let mut history = self.history.lock();
        let revision = history.maps.len() as u64;
        let mut map = history.maps.last().unwrap().clone();
        let mut events = Vec::new();
        for change in changes {
            let (Change::Put(key, ..) | Change::Delete(key)) = change;
            let previous = map.get(key).cloned();
            let (kind, kv) = match change {
                Change::Put(key, value, lease) => {
                    let kv = v1::KeyValue {
                        key: key.clone(),
                        value: value.clone(),
                        create_revision: previous.as_ref().map_or(revision, |kv| kv.create_revision),
                        mod_revision: revision,
                        version: previous.as_ref().map_or(1, |kv| kv.version + 1),
                        lease: *lease,
                    };
                    map.insert(key.clone(), kv.clone());
                    (v1::watch_event::Kind::Put, kv)
                }
                Change::Delete(key) => {
                    if map.remove(key).is_none() {
                        continue;
                    }
                    let kv = v1::KeyValue { key: key.clone(), mod_revision: revision, ..v1::KeyValue::default() };
                    (v1::watch_event::Kind::Delete, kv)
                }
            };
            events.push(v1::WatchEvent { kind: kind.into(), kv: Some(kv), previous });
        }
        if events.is_empty() {
            return revision - 1;
        }
        history.maps.push(map);
        history.events.push(events);
        drop(history);
        self.revisions.send_replace(revision);
        revision
    }

    pub(crate) fn compact(&self, revision: u64) {
        self.history.lock().compacted = revision;
        // Wakes the watches that are behind.
        self.revisions.send_modify(|_| ());
    }

    /// The keys of an interval at a revision.
    pub(crate) fn list(&self, range: &v1::KeyRange, revision: u64) -> Vec<v1::KeyValue> {
        let history = self.history.lock();
        history.maps[usize::try_from(revision).unwrap()].values().filter(|kv| inside(range, &kv.key)).cloned().collect()
    }

    /// What a watch has to deliver of a revision.
    pub(crate) fn events(&self, create: &v1::WatchCreate, revision: u64) -> Vec<v1::WatchEvent> {
        let range = create.range.clone().unwrap();
        let events = self.history.lock().events[usize::try_from(revision).unwrap()].clone();
        let wanted = events.into_iter().filter_map(|mut event| {
            let left_out = match event.kind() {
                v1::watch_event::Kind::Put => create.no_puts,
                _ => create.no_deletes,
            };
            if left_out || !inside(&range, &event.kv.as_ref().unwrap().key) {
                return None;
            }
            if !create.previous {
                event.previous = None;
            }
            Some(event)
        });
        wanted.collect()
    }

    fn grant(&self, ttl_ms: u64) -> u64 {
        let mut history = self.history.lock();
        history.last_lease += 1;
        let lease = history.last_lease;
        history.leases.insert(lease, ttl_ms);
        lease
    }

    fn ttl(&self, lease: u64) -> Option<u64> {
        self.history.lock().leases.get(&lease).copied()
    }

    pub(crate) fn leases(&self) -> Vec<u64> {
        self.history.lock().leases.keys().copied().collect()
    }

    /// Ends a lease and deletes its keys; `None` if there is none.
    pub(crate) fn end_lease(&self, lease: u64) -> Option<u64> {
        let keys = {
            let mut history = self.history.lock();
            history.leases.remove(&lease)?;
            let attached = history.maps.last().unwrap().values().filter(|kv| kv.lease == lease);
            attached.map(|kv| Change::Delete(kv.key.clone())).collect::<Vec<_>>()
        };
        self.apply(&keys);
        Some(keys.len() as u64)
    }
}

fn inside(range: &v1::KeyRange, key: &Bytes) -> bool {
    *key >= range.start && (range.end.is_empty() || *key < range.end)
}

/// How a stream of watches ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// Without a word.
    End,
    /// With a status that no d-engine server writes.
    Garble,
    /// With a refusal of the stream.
    Refuse,
    /// Each watch is ended with this code.
    EndWatches(ErrorCode),
}

/// When and how a stream of watches breaks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Break {
    /// After so many answers.
    pub(crate) after: usize,
    pub(crate) how: How,
}

/// What somebody else does meanwhile.
pub(crate) type Interference = Box<dyn FnOnce(&FakeStore) + Send>;

/// How a node behaves; a test changes it while it runs.
pub(crate) struct Script {
    pub(crate) header: v1::ResponseHeader,
    pub(crate) members: Vec<v1::Member>,
    pub(crate) leader: Option<v1::LeaderHint>,
    /// For the next streams of watches, one each.
    pub(crate) breaks: VecDeque<Break>,
    /// Events of one answer at most. A revision with more is cut.
    pub(crate) events_max: usize,
    /// Revisions before the one asked for that are sent once more.
    pub(crate) repeats: u64,
    /// Bookmarks follow revisions without events.
    pub(crate) bookmarks: bool,
    /// The node has applied nothing beyond.
    pub(crate) applied_max: u64,
    /// Keys of a page.
    pub(crate) page_keys: usize,
    /// Done once, right after the last page of a list was read: what happens between list and watch.
    pub(crate) after_list: Option<Interference>,
    /// Renewals are not answered.
    pub(crate) deaf: bool,
    /// Watches are taken and not answered.
    pub(crate) mute: bool,
    // What was seen.
    pub(crate) streams: usize,
    pub(crate) open_streams: usize,
    pub(crate) creates: Vec<v1::WatchCreate>,
    pub(crate) cancels: usize,
    pub(crate) lists: usize,
    /// The lowest revision that each list asked for.
    pub(crate) min_revisions: Vec<u64>,
    /// Events sent, repetitions included.
    pub(crate) sent: usize,
}

/// A fake node. Dropping it is like killing its process.
pub(crate) struct StoreNode {
    pub(crate) address: String,
    pub(crate) script: Arc<Mutex<Script>>,
    runtime: Option<Runtime>,
}

impl Drop for StoreNode {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[derive(Clone)]
struct Service {
    store: FakeStore,
    script: Arc<Mutex<Script>>,
}

impl StoreNode {
    pub(crate) fn start(id: u32, store: &FakeStore) -> Self {
        Self::start_at(id, store, "127.0.0.1:0")
    }

    pub(crate) fn start_at(id: u32, store: &FakeStore, address: &str) -> Self {
        let listener = bind(address);
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let script = Arc::new(Mutex::new(Script {
            header: v1::ResponseHeader { cluster_id: CLUSTER, epoch: 1, revision: 0, node_id: id, term: 1 },
            members: Vec::new(),
            leader: None,
            breaks: VecDeque::new(),
            events_max: usize::MAX,
            repeats: 0,
            bookmarks: false,
            applied_max: u64::MAX,
            page_keys: 2,
            after_list: None,
            deaf: false,
            mute: false,
            streams: 0,
            open_streams: 0,
            creates: Vec::new(),
            cancels: 0,
            lists: 0,
            min_revisions: Vec::new(),
            sent: 0,
        }));
        let service = Service { store: store.clone(), script: Arc::clone(&script) };
        let server = tonic::transport::Server::builder()
            .add_service(KvServer::new(service.clone()))
            .add_service(WatchServer::new(service.clone()))
            .add_service(LeaseServer::new(service.clone()))
            .add_service(PipelineServer::new(PipelineOf(service.clone())))
            .add_service(ClusterServer::new(service));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.spawn(async move {
            let incoming = TcpListenerStream::new(TcpListener::from_std(listener).unwrap());
            server.serve_with_incoming(incoming).await.unwrap();
        });
        Self { address, script, runtime: Some(runtime) }
    }

    pub(crate) fn set(&self, change: impl FnOnce(&mut Script)) {
        change(&mut self.script.lock());
    }

    pub(crate) fn seen<T>(&self, look: impl FnOnce(&Script) -> T) -> T {
        look(&self.script.lock())
    }
}

/// Of a node that was just dropped, the address is free a moment later.
fn bind(address: &str) -> std::net::TcpListener {
    let begun = std::time::Instant::now();
    loop {
        match std::net::TcpListener::bind(address) {
            Ok(listener) => return listener,
            Err(error) => assert!(begun.elapsed() < PATIENCE, "{address}: {error}"),
        }
        std::thread::yield_now();
    }
}

/// Starts nodes that show one store; the first leads.
pub(crate) fn nodes(count: u32, store: &FakeStore) -> Vec<StoreNode> {
    let nodes: Vec<_> = (1..=count).map(|id| StoreNode::start(id, store)).collect();
    introduce(&nodes);
    nodes
}

/// Tells every node of all.
pub(crate) fn introduce(nodes: &[StoreNode]) {
    let members: Vec<_> = nodes
        .iter()
        .map(|node| v1::Member {
            id: node.seen(|script| script.header.node_id),
            role: v1::MemberRole::Voter.into(),
            peer_address: node.address.clone(),
            client_address: node.address.clone(),
            application_address: String::new(),
            promotable: false,
        })
        .collect();
    for node in nodes {
        node.set(|script| {
            script.members = members.clone();
            script.leader = Some(v1::LeaderHint {
                node_id: members[0].id,
                client_address: members[0].client_address.clone(),
                application_address: String::new(),
                term: 1,
            });
        });
    }
}

pub(crate) fn client(nodes: &[StoreNode]) -> Client {
    let endpoints = nodes.iter().map(|node| node.address.clone());
    Client::builder().endpoints(endpoints).call_timeout(PATIENCE).pipelined(pipelined()).build().unwrap()
}

/// Whether the tests of this binary go over the pipeline: `tests/unary.rs` has them all once more, over unary calls.
fn pipelined() -> bool {
    !module_path!().starts_with("unary::")
}

/// Waits until `condition` holds.
pub(crate) async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, waiting).await.is_ok(), "never came true: {what}");
}

/// What must not take forever.
pub(crate) async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, work).await {
        Ok(result) => result,
        Err(_) => panic!("never came to an end: {what}"),
    }
}

fn refusal(code: ErrorCode, revision: u64) -> DetailedStatus {
    let outcome = v1::Outcome::NotApplied.into();
    let detail = v1::ErrorDetail { code: code.number(), outcome, revision, ..v1::ErrorDetail::default() };
    DetailedStatus { message: code.meaning().to_owned(), detail }
}

impl Service {
    fn applied(&self) -> u64 {
        self.store.revision().min(self.script.lock().applied_max)
    }

    fn header(&self, revision: u64) -> Option<v1::ResponseHeader> {
        Some(v1::ResponseHeader { revision, ..self.script.lock().header })
    }

    fn page(&self, request: &v1::RangeRequest) -> Result<v1::RangeResponse, Status> {
        let read = request.read.unwrap_or_default();
        let applied = self.applied();
        if read.revision == 0 {
            self.script.lock().min_revisions.push(read.min_revision);
        }
        if read.min_revision > applied {
            return Err(refusal(ErrorCode::Behind, applied).into());
        }
        let compacted = self.store.history.lock().compacted;
        if read.revision != 0 && read.revision < compacted {
            return Err(refusal(ErrorCode::Compacted, compacted).into());
        }
        let revision = if read.revision == 0 { applied } else { read.revision };
        let mut kvs = self.store.list(request.range.as_ref().unwrap(), revision);
        let next = kvs.get(self.script.lock().page_keys).map(|kv| kv.key.clone());
        kvs.truncate(self.script.lock().page_keys);
        if next.is_none() {
            self.script.lock().lists += 1;
            let after_list = self.script.lock().after_list.take();
            if let Some(interfere) = after_list {
                interfere(&self.store);
            }
        }
        Ok(v1::RangeResponse {
            header: self.header(revision),
            kvs,
            count: None,
            more: next.is_some(),
            next: next.unwrap_or_default(),
        })
    }

    /// One stream of watches.
    async fn serve(
        self,
        mut requests: Streaming<v1::WatchRequest>,
        answers: mpsc::Sender<Result<v1::WatchResponse, Status>>,
    ) {
        let breaks = {
            let mut script = self.script.lock();
            script.streams += 1;
            script.open_streams += 1;
            script.breaks.pop_front()
        };
        let mut stream = WatchesOfStream { service: &self, answers, sent: 0, breaks, watches: BTreeMap::new() };
        let mut revisions = self.store.revisions.subscribe();
        loop {
            revisions.borrow_and_update();
            if !stream.pump().await {
                break;
            }
            tokio::select! {
                request = requests.message() => match request {
                    Ok(Some(request)) => if !stream.take(request).await { break },
                    _ => break,
                },
                _ = revisions.changed() => {}
                () = stream.answers.closed() => break,
            }
        }
        self.script.lock().open_streams -= 1;
    }
}

struct WatchesOfStream<'a> {
    service: &'a Service,
    answers: mpsc::Sender<Result<v1::WatchResponse, Status>>,
    sent: usize,
    breaks: Option<Break>,
    /// With the next revision to send.
    watches: BTreeMap<u64, (v1::WatchCreate, u64)>,
}

impl WatchesOfStream<'_> {
    async fn take(&mut self, request: v1::WatchRequest) -> bool {
        let id = request.watch_id;
        match request.action.unwrap() {
            Action::Create(create) => {
                let mute = {
                    let mut script = self.service.script.lock();
                    script.creates.push(create.clone());
                    script.mute
                };
                if mute {
                    return true;
                }
                let from = if create.from_revision == 0 { self.service.applied() + 1 } else { create.from_revision };
                let header = self.service.header(self.service.applied());
                let repeats = self.service.script.lock().repeats;
                let compacted = self.service.store.history.lock().compacted;
                if from < compacted {
                    return self.send(id, ended(&refusal(ErrorCode::Compacted, compacted))).await;
                }
                self.watches.insert(id, (create, from.saturating_sub(repeats).max(1)));
                self.send(id, Kind::Created(v1::WatchCreated { header, from_revision: from })).await
            }
            Action::Cancel(_) => {
                self.service.script.lock().cancels += 1;
                match self.watches.remove(&id) {
                    Some(_) => self.send(id, ended(&refusal(ErrorCode::Cancelled, 0))).await,
                    None => true,
                }
            }
        }
    }

    /// Sends what is due; false once the stream is over.
    async fn pump(&mut self) -> bool {
        let applied = self.service.applied();
        for id in self.watches.keys().copied().collect::<Vec<_>>() {
            loop {
                let (create, next) = self.watches[&id].clone();
                let compacted = self.service.store.history.lock().compacted;
                if next < compacted {
                    self.watches.remove(&id);
                    if !self.send(id, ended(&refusal(ErrorCode::Compacted, compacted))).await {
                        return false;
                    }
                    break;
                }
                if next > applied {
                    break;
                }
                let events = self.service.store.events(&create, next);
                let (events_max, bookmarks) = {
                    let script = self.service.script.lock();
                    (script.events_max, script.bookmarks)
                };
                if events.is_empty() && bookmarks {
                    let bookmark = v1::WatchBookmark { revision: next };
                    if !self.send(id, Kind::Bookmark(bookmark)).await {
                        return false;
                    }
                }
                let mut parts = events.chunks(events_max.min(events.len()).max(1)).peekable();
                while let Some(part) = parts.next() {
                    self.service.script.lock().sent += part.len();
                    let events = v1::WatchEvents { events: part.to_vec(), incomplete: parts.peek().is_some() };
                    if !self.send(id, Kind::Events(events)).await {
                        return false;
                    }
                }
                self.watches.get_mut(&id).unwrap().1 = next + 1;
            }
        }
        true
    }

    async fn send(&mut self, watch_id: u64, kind: Kind) -> bool {
        if let Some(Break { after, how }) = self.breaks
            && self.sent >= after
        {
            let last = match how {
                How::End => return false,
                How::Garble => Err(Status::unavailable("the proxy lost its upstream")),
                How::Refuse => Err(refusal(ErrorCode::Unavailable, 0).into()),
                How::EndWatches(code) => {
                    for id in self.watches.keys().copied().chain([watch_id]).collect::<Vec<_>>() {
                        let response =
                            v1::WatchResponse { watch_id: id, also: Vec::new(), kind: Some(ended(&refusal(code, 0))) };
                        let _ = self.answers.send(Ok(response)).await;
                    }
                    self.watches.clear();
                    self.breaks = None;
                    return how_goes_on(code);
                }
            };
            let _ = self.answers.send(last).await;
            return false;
        }
        self.sent += 1;
        self.answers.send(Ok(v1::WatchResponse { watch_id, also: Vec::new(), kind: Some(kind) })).await.is_ok()
    }
}

/// A node that stops ends its streams, too.
fn how_goes_on(code: ErrorCode) -> bool {
    code != ErrorCode::Unavailable
}

fn ended(status: &DetailedStatus) -> Kind {
    Kind::Ended(v1::WatchEnded { error: Some(status.detail.clone()), message: status.message.clone() })
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Watch for Service {
    type WatchStream = ReceiverStream<Result<v1::WatchResponse, Status>>;

    async fn watch(
        &self,
        request: Request<Streaming<v1::WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let (sender, receiver) = mpsc::channel(4);
        tokio::spawn(self.clone().serve(request.into_inner(), sender));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

#[tonic::async_trait]
impl Kv for Service {
    async fn put(&self, request: Request<v1::PutRequest>) -> Result<Response<v1::PutResponse>, Status> {
        let put = request.into_inner();
        if put.lease != 0 && self.store.ttl(put.lease).is_none() {
            return Err(refusal(ErrorCode::LeaseNotFound, 0).into());
        }
        let revision = self.store.apply(&[Change::Put(put.key, put.value, put.lease)]);
        Ok(Response::new(v1::PutResponse { header: self.header(revision), previous: None, lease: put.lease }))
    }

    async fn get(&self, _: Request<v1::GetRequest>) -> Result<Response<v1::GetResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn range(&self, request: Request<v1::RangeRequest>) -> Result<Response<v1::RangeResponse>, Status> {
        self.page(request.get_ref()).map(Response::new)
    }

    async fn get_many(&self, _: Request<v1::GetManyRequest>) -> Result<Response<v1::GetManyResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn delete(&self, request: Request<v1::DeleteRequest>) -> Result<Response<v1::DeleteResponse>, Status> {
        let before = self.store.revision();
        let revision = self.store.apply(&[Change::Delete(request.into_inner().key)]);
        let deleted = revision != before;
        Ok(Response::new(v1::DeleteResponse { header: self.header(revision), deleted, previous: None }))
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

    /// Knows what a proclamation needs: comparisons of the create revision, then puts.
    async fn txn(&self, request: Request<v1::TxnRequest>) -> Result<Response<v1::TxnResponse>, Status> {
        let txn = request.into_inner();
        let current = self.store.revision();
        let all = self.store.list(&v1::KeyRange::default(), current);
        let succeeded = txn.compare.iter().all(|compare| {
            let created = all.iter().find(|kv| kv.key == compare.key).map_or(0, |kv| kv.create_revision);
            compare.target == Some(v1::compare::Target::CreateRevision(created))
        });
        let puts = txn.then.into_iter().map(|operation| match operation.operation {
            Some(v1::txn_operation::Operation::Put(put)) => Change::Put(put.key, put.value, put.lease),
            other => panic!("{other:?}"),
        });
        let (revision, results) = if succeeded {
            let puts: Vec<_> = puts.collect();
            let result = || v1::txn_result::Result::Put(v1::PutResponse::default());
            let results = puts.iter().map(|_| v1::TxnResult { result: Some(result()) }).collect();
            (self.store.apply(&puts), results)
        } else {
            (current, Vec::new())
        };
        Ok(Response::new(v1::TxnResponse { header: self.header(revision), succeeded, results }))
    }
}

#[tonic::async_trait]
impl Lease for Service {
    async fn grant(&self, request: Request<v1::LeaseGrantRequest>) -> Result<Response<v1::LeaseGrantResponse>, Status> {
        let ttl_ms = request.into_inner().ttl_ms;
        let lease = self.store.grant(ttl_ms);
        Ok(Response::new(v1::LeaseGrantResponse { header: self.header(self.store.revision()), lease, ttl_ms }))
    }

    async fn revoke(
        &self,
        request: Request<v1::LeaseRevokeRequest>,
    ) -> Result<Response<v1::LeaseRevokeResponse>, Status> {
        match self.store.end_lease(request.into_inner().lease) {
            Some(deleted) => {
                let header = self.header(self.store.revision());
                Ok(Response::new(v1::LeaseRevokeResponse { header, deleted }))
            }
            None => Err(refusal(ErrorCode::LeaseNotFound, 0).into()),
        }
    }

    async fn renew(&self, _: Request<v1::LeaseRenewRequest>) -> Result<Response<v1::LeaseRenewResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    type KeepAliveStream = Answers<v1::LeaseRenewResponse>;

    async fn keep_alive(
        &self,
        request: Request<Streaming<v1::LeaseRenewRequest>>,
    ) -> Result<Response<Self::KeepAliveStream>, Status> {
        let service = self.clone();
        let answers = request.into_inner().filter_map(move |request| {
            let lease = request.ok()?.lease;
            if service.script.lock().deaf {
                return None;
            }
            let ttl_ms = service.store.ttl(lease).unwrap_or_default();
            let header = service.header(service.store.revision());
            Some(Ok(v1::LeaseRenewResponse { header, lease, ttl_ms }))
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn time_to_live(
        &self,
        _: Request<v1::LeaseTimeToLiveRequest>,
    ) -> Result<Response<v1::LeaseTimeToLiveResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn list(&self, _: Request<v1::LeaseListRequest>) -> Result<Response<v1::LeaseListResponse>, Status> {
        Err(Status::unimplemented(""))
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
            Put: Kv::put, Range: Kv::range, Delete: Kv::delete, Txn: Kv::txn,
            LeaseGrant: Lease::grant, LeaseRevoke: Lease::revoke, Members: Cluster::members,
        )
    }
}

#[tonic::async_trait]
impl Cluster for Service {
    async fn members(&self, _: Request<v1::MembersRequest>) -> Result<Response<v1::MembersResponse>, Status> {
        let header = self.header(self.applied());
        let script = self.script.lock();
        let (members, leader) = (script.members.clone(), script.leader.clone());
        Ok(Response::new(v1::MembersResponse { header, members, leader }))
    }

    async fn status(&self, _: Request<v1::StatusRequest>) -> Result<Response<v1::StatusResponse>, Status> {
        Err(Status::unimplemented(""))
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
