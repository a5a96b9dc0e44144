//! The way to the peers: one gRPC connection for data and one for everything that must never wait behind data.
//!
//! Every message carries a [`v1::Route`]: who speaks and which incarnation is meant, see `peer_service`.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use d_engine_proto::v1::peer_client::PeerClient;
use d_engine_proto::{LogIndex, v1};
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use futures_util::{Stream, StreamExt, stream};
use openraft::OptionalSend;
use openraft::errors::{RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{
    Backoff, NetBackoff, NetSnapshot, NetStreamAppend, NetTransferLeader, NetVote, RPCOption, RaftNetworkFactory,
};
use openraft::raft::{
    AppendEntriesRequest, SnapshotResponse, StreamAppendError, StreamAppendResult, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use super::appends::Appends;
use super::entry;
use super::fingerprint::StateHash;
use super::member::Member;
use super::raft_types::{LogId, RaftSnapshot, RaftVote, Types, from_vote, to_position, to_vote};
use super::read_index::Confirmation;
use super::snapshots::{Outgoing, Snapshot};
use crate::limits::{
    APPENDS_IN_FLIGHT_MAX, CONNECTION_WINDOW_BYTES, PEER_MESSAGE_BYTES_MAX, SNAPSHOT_CHUNKS_IN_FLIGHT_MAX,
};
use crate::metrics::Metrics;
use crate::state_machine::StoreTime;
use crate::storage::{LogPosition, LogRecord, Vote};
use crate::tls::{PeerConnector, Tls};

/// Who this node is, as its peers see it.
pub(super) struct LocalIdentity {
    pub(super) node_id: u32,
    pub(super) incarnation: u64,
    /// 0 until the node belongs to a cluster.
    cluster_id: AtomicU64,
}

impl LocalIdentity {
    pub(super) fn new(node_id: u32, incarnation: u64, cluster_id: Option<u64>) -> Self {
        Self { node_id, incarnation, cluster_id: AtomicU64::new(cluster_id.unwrap_or(0)) }
    }

    /// `None` until the node belongs to a cluster.
    pub(super) fn cluster_id(&self) -> Option<u64> {
        Some(self.cluster_id.load(Ordering::Acquire)).filter(|id| *id != 0)
    }

    /// To be called once the id is durable.
    pub(super) fn join(&self, cluster_id: u64) {
        self.cluster_id.store(cluster_id, Ordering::Release);
    }
}

/// The largest commit position that this node has told any peer, as an index.
///
/// A peer may apply an entry, and show it to a reader, before this node has applied it. A read from this node's memory
/// that begins afterwards must show it too, so that every lease read waits for what was told before it began:
/// ```text
/// leader: commits X, tells B ──────────────────────── lease read: without the wait, before X ── applies X
/// B:                   applies X, a linearizable read here shows it ──╯ ends before that begins
/// ```
#[derive(Debug, Default)]
pub(super) struct ToldCommit(AtomicU64);

impl ToldCommit {
    /// To be called before the message leaves.
    pub(super) fn tell(&self, committed: Option<&LogId>) {
        if let Some(committed) = committed {
            self.0.fetch_max(committed.index(), Ordering::AcqRel);
        }
    }

    pub(super) fn index(&self) -> LogIndex {
        LogIndex(self.0.load(Ordering::Acquire))
    }
}

/// Stalls that the answer to a piece of a snapshot may take: an fsync of a large file is in it.
const SNAPSHOT_WRITE_STALLS: u32 = 10;

/// Connections to a peer, so that a heartbeat or a vote never waits behind data, nor either behind a snapshot.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Lane {
    Data,
    Control,
    Snapshot,
}

/// Where a member was found last. Whoever answers there is still checked by its incarnation.
struct Place {
    incarnation: u64,
    address: String,
}

/// Connections to the peers. Clones share them.
#[derive(Clone)]
pub(super) struct Peers {
    local: Arc<LocalIdentity>,
    channels: Arc<Mutex<HashMap<(String, Lane), Channel>>>,
    places: Arc<Mutex<HashMap<u32, Place>>>,
    told_commit: Arc<ToldCommit>,
    tls: Option<Arc<Tls>>,
    metrics: Arc<Metrics>,
    /// A stream on which nothing moves for this long, though something should, is broken.
    stall: Duration,
}

impl Peers {
    pub(super) fn new(
        local: Arc<LocalIdentity>,
        stall: Duration,
        tls: Option<Arc<Tls>>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            local,
            channels: Arc::default(),
            places: Arc::default(),
            told_commit: Arc::default(),
            tls,
            metrics,
            stall,
        }
    }

    /// The commit position that the peers were told.
    pub(super) fn told_commit(&self) -> &Arc<ToldCommit> {
        &self.told_commit
    }

    /// A member is reached at `address` from now on, whatever the membership recorded before: the last news counts.
    pub(super) fn found(&self, id: u32, incarnation: u64, address: &str) {
        let place = Place { incarnation, address: address.to_owned() };
        let left = self.places.lock().insert(id, place).filter(|left| left.address != address);
        if let Some(left) = left {
            tracing::debug!(peer = id, from = left.address, to = address, "a peer moved");
            self.channels.lock().retain(|(used, _), _| *used != left.address);
        }
    }

    /// Forgets where others are than these.
    pub(super) fn keep_only(&self, members: &BTreeMap<u32, Member>) {
        let mut places = self.places.lock();
        places.retain(|id, _| members.contains_key(id));
        let used: Vec<String> = places.values().map(|place| place.address.clone()).collect();
        drop(places);
        self.channels.lock().retain(|(address, _), _| used.contains(address));
    }

    /// Where a member is: openraft goes on with the address that was recorded when it first connected.
    pub(super) fn address_of(&self, id: u32, member: &Member) -> String {
        let places = self.places.lock();
        let place = places.get(&id).filter(|place| place.incarnation == member.incarnation);
        place.map_or(&member.peer_address, |place| &place.address).clone()
    }

    fn client(&self, address: &str, lane: Lane) -> Result<PeerClient<Channel>, Status> {
        let mut channels = self.channels.lock();
        let channel = match channels.get(&(address.to_owned(), lane)) {
            Some(channel) => channel.clone(),
            None => {
                let scheme = if self.tls.is_some() { "https" } else { "http" };
                let endpoint = Endpoint::from_shared(format!("{scheme}://{address}"))
                    .map_err(|error| Status::invalid_argument(format!("peer address {address}: {error}")))?
                    .connect_timeout(self.stall)
                    .tcp_nodelay(true)
                    .http2_keep_alive_interval(self.stall)
                    .keep_alive_timeout(self.stall)
                    .keep_alive_while_idle(true)
                    .initial_stream_window_size(CONNECTION_WINDOW_BYTES)
                    .initial_connection_window_size(CONNECTION_WINDOW_BYTES);
                let channel = match &self.tls {
                    Some(tls) => endpoint.connect_with_connector_lazy(PeerConnector::new(Arc::clone(tls))),
                    None => endpoint.connect_lazy(),
                };
                channels.insert((address.to_owned(), lane), channel.clone());
                channel
            }
        };
        Ok(PeerClient::new(channel)
            .max_decoding_message_size(PEER_MESSAGE_BYTES_MAX)
            .max_encoding_message_size(PEER_MESSAGE_BYTES_MAX))
    }

    /// Lets a connection go; the next call makes another.
    fn disconnect(&self, address: &str, lane: Lane) {
        self.channels.lock().remove(&(address.to_owned(), lane));
    }

    fn route(&self, to: u32, to_incarnation: u64) -> v1::Route {
        v1::Route {
            cluster_id: self.local.cluster_id().unwrap_or(0),
            from: self.local.node_id,
            from_incarnation: self.local.incarnation,
            to,
            to_incarnation,
        }
    }

    /// Introduces this node to the one that is thought to be `to`; 0: whoever is there.
    pub(super) async fn hello(
        &self,
        to: u32,
        address: &str,
        initial_cluster: Vec<v1::InitialMember>,
        addresses: Option<v1::Addresses>,
    ) -> Result<v1::HelloResponse, String> {
        let request = v1::HelloRequest {
            protocol_version: d_engine_proto::PEER_PROTOCOL_VERSION,
            route: Some(self.route(to, 0)),
            initial_cluster,
            addresses,
        };
        let answer = async {
            let mut client = self.client(address, Lane::Control)?;
            within(self.stall, client.hello(request)).await
        };
        answer.await.map(tonic::Response::into_inner).map_err(|status: Status| status.message().to_owned())
    }

    /// Asks the leader what a linearizable read has to wait for.
    pub(super) async fn read_index(&self, to: u32, member: &Member) -> Result<Confirmation, Status> {
        let request = v1::ReadIndexRequest { route: Some(self.route(to, member.incarnation)) };
        let mut client = self.client(&self.address_of(to, member), Lane::Control)?;
        let response = within(self.stall, client.read_index(request)).await?.into_inner();
        let store_time = StoreTime(Duration::from_nanos(response.store_time_ns));
        Ok(Confirmation { index: LogIndex(response.index), store_time })
    }
}

impl Peers {
    /// Asks a member for the hash of its state after an entry.
    pub(super) async fn state_hash(
        &self,
        to: u32,
        member: &Member,
        index: LogIndex,
        patience: Duration,
    ) -> Result<Option<StateHash>, Status> {
        let request = v1::StateHashRequest { route: Some(self.route(to, member.incarnation)), index: index.get() };
        let mut client = self.client(&member.peer_address, Lane::Control)?;
        let v1::StateHashResponse { hash, kind } = within(patience, client.state_hash(request)).await?.into_inner();
        Ok(hash.map(|hash| StateHash { index, kind, hash }))
    }

    /// Tells a member that its state is not the cluster's.
    pub(super) async fn diverged(&self, to: u32, member: &Member, right: StateHash) -> Result<(), Status> {
        let StateHash { index, kind, hash } = right;
        let route = Some(self.route(to, member.incarnation));
        let request = v1::DivergedRequest { route, index: index.get(), hash, kind };
        let mut client = self.client(&member.peer_address, Lane::Control)?;
        within(self.stall, client.diverged(request)).await.map(drop)
    }
}

async fn within<T>(limit: Duration, call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    match tokio::time::timeout(limit, call).await {
        Ok(result) => result,
        Err(_) => Err(Status::deadline_exceeded(format!("the peer did not answer within {limit:?}"))),
    }
}

impl RaftNetworkFactory<Types> for Peers {
    type Network = Connection;

    async fn new_client(&mut self, target: u32, node: &Member) -> Connection {
        Connection { peers: self.clone(), target, member: node.clone(), lane: Lane::Data, snapshot_failure: None }
    }

    async fn new_heartbeat_client(&mut self, target: u32, node: &Member) -> Connection {
        Connection { peers: self.clone(), target, member: node.clone(), lane: Lane::Control, snapshot_failure: None }
    }
}

/// The way to one peer.
pub(super) struct Connection {
    peers: Peers,
    target: u32,
    member: Member,
    lane: Lane,
    /// What was last said of a snapshot that did not arrive.
    snapshot_failure: Option<String>,
}

impl Connection {
    fn client(&self, lane: Lane) -> Result<PeerClient<Channel>, RPCError<Types>> {
        self.peers.client(&self.peers.address_of(self.target, &self.member), lane).map_err(unreachable)
    }

    fn route(&self) -> v1::Route {
        self.peers.route(self.target, self.member.incarnation)
    }
}

pub(super) fn unreachable(status: Status) -> RPCError<Types> {
    // openraft backs off from an unreachable peer, and every failure here is worth that.
    RPCError::Unreachable(Unreachable::from_string(format!("{:?}: {}", status.code(), status.message())))
}

impl NetBackoff<Types> for Connection {
    fn backoff(&self) -> Option<Backoff> {
        None
    }
}

impl NetStreamAppend<Types> for Connection {
    fn stream_append<'s, S>(
        &'s mut self,
        mut input: S,
        option: RPCOption,
    ) -> BoxFuture<'s, Result<BoxStream<'s, Result<StreamAppendResult<Types>, RPCError<Types>>>, RPCError<Types>>>
    where
        S: Stream<Item = AppendEntriesRequest<Types>> + OptionalSend + Unpin + 'static,
    {
        let stall = self.peers.stall.max(option.hard_ttl());
        if self.lane == Lane::Control {
            let this = &*self;
            let answers = input.then(move |request| this.heartbeat(request, stall)).boxed();
            return Box::pin(async { Ok(answers) });
        }
        Box::pin(async move {
            // openraft backs off inside the stream of requests. A transport polls that only once it is connected, so
            // without waiting for the first request here an unreachable peer would be tried without a pause.
            let Some(first) = input.next().await else { return Ok(stream::empty().boxed()) };
            let (requests, outgoing) = mpsc::channel(APPENDS_IN_FLIGHT_MAX);
            let mut client = self.client(self.lane)?;
            let call = client.append(ReceiverStream::new(outgoing));
            let responses = within(stall, call).await.map_err(unreachable)?.into_inner();
            let told = self.peers.told_commit.clone();
            Ok(Appends::new(first, input, Some(self.route()), told, requests, responses, stall).boxed())
        })
    }
}

impl Connection {
    async fn heartbeat(
        &self,
        request: AppendEntriesRequest<Types>,
        patience: Duration,
    ) -> Result<StreamAppendResult<Types>, RPCError<Types>> {
        let mut client = self.client(Lane::Control)?;
        self.peers.told_commit.tell(request.leader_commit.as_ref());
        let call = client.heartbeat(append_to_wire(Some(self.route()), request));
        append_result_from_wire(within(patience, call).await.map_err(unreachable)?.into_inner())
    }
}

impl NetVote<Types> for Connection {
    async fn vote(
        &mut self,
        rpc: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        let mut client = self.client(Lane::Control)?;
        let call = client.vote(vote_to_wire(self.route(), &rpc));
        vote_response_from_wire(within(option.soft_ttl(), call).await.map_err(unreachable)?.into_inner())
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        let mut client = self.client(Lane::Control)?;
        let call = client.pre_vote(vote_to_wire(self.route(), &rpc));
        vote_response_from_wire(within(option.soft_ttl(), call).await.map_err(unreachable)?.into_inner())
    }
}

impl NetTransferLeader<Types> for Connection {
    async fn transfer_leader(
        &mut self,
        req: TransferLeaderRequest<Types>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<Types>, RPCError<Types>> {
        let request = v1::TransferLeaderRequest {
            route: Some(self.route()),
            from_leader: Some(vote_out(req.from_leader())),
            to: *req.to_node_id(),
            last_log: req.last_log_id().map(log_id_out),
        };
        let mut client = self.client(Lane::Control)?;
        within(option.soft_ttl(), client.transfer_leader(request)).await.map_err(unreachable)?;
        Ok(Ok(()))
    }
}

impl NetSnapshot<Types> for Connection {
    type SnapshotData = Arc<Snapshot>;

    async fn full_snapshot(
        &mut self,
        vote: RaftVote,
        snapshot: RaftSnapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        let index = snapshot.snapshot.position().index.get();
        let sent = tokio::select! {
            closed = cancel => return Err(closed.into()),
            sent = self.send_snapshot(vote, snapshot.snapshot) => sent,
        };
        // Idle, it would be probed for ever.
        self.peers.disconnect(&self.member.peer_address, Lane::Snapshot);
        match sent {
            Ok(vote) => {
                self.snapshot_failure = None;
                tracing::info!(to = self.target, index, "the snapshot arrived");
                Ok(SnapshotResponse::new(vote))
            }
            Err(status) => {
                let reason = status.message().to_owned();
                // It is tried again several times a second.
                if self.snapshot_failure.as_ref() != Some(&reason) {
                    tracing::warn!(
                        to = self.target,
                        index,
                        reason,
                        "sending a snapshot broke off; it goes on from there"
                    );
                    self.snapshot_failure = Some(reason);
                }
                Err(StreamingError::Unreachable(Unreachable::from_string(status.message())))
            }
        }
    }
}

impl Connection {
    /// Sends what the receiver does not have yet, few pieces ahead of what it has written: the disks and the network
    /// between the two have other things to do. Answers the receiver's vote once it has installed the snapshot.
    async fn send_snapshot(&self, vote: RaftVote, snapshot: Arc<Snapshot>) -> Result<RaftVote, Status> {
        use v1::snapshot_request::Part;
        use v1::snapshot_response::Result as Answer;

        let stall = self.peers.stall;
        let manifest = snapshot.manifest().encode();
        let begin = v1::SnapshotBegin {
            route: Some(self.route()),
            vote: Some(vote_out(&vote)),
            manifest_crc32c: crc32c::crc32c(&manifest),
            manifest: manifest.into(),
        };
        let (requests, outgoing) = mpsc::channel(1 + SNAPSHOT_CHUNKS_IN_FLIGHT_MAX);
        let gone = |_| Status::unavailable("the peer ended the transfer");
        requests.send(v1::SnapshotRequest { part: Some(Part::Begin(begin)) }).await.map_err(gone)?;
        let mut client = self.peers.client(&self.member.peer_address, Lane::Snapshot)?;
        let call = client.snapshot(ReceiverStream::new(outgoing));
        let mut answers = within(stall, call).await?.into_inner();
        // The receiver may have to read what it has.
        let resume = match answers.message().await?.and_then(|answer| answer.result) {
            Some(Answer::Resume(resume)) => resume,
            Some(Answer::Done(vote)) => return vote_in(Some(vote)),
            _ => return Err(Status::internal("the peer did not say where to begin")),
        };
        tracing::info!(to = self.target, file = resume.file, offset = resume.offset, "sending a snapshot");
        let mut pieces = Some(Outgoing::new(snapshot, resume));
        let mut in_flight = 0;
        loop {
            while in_flight < SNAPSHOT_CHUNKS_IN_FLIGHT_MAX
                && let Some(mut outgoing) = pieces.take()
            {
                let read = tokio::task::spawn_blocking(move || (outgoing.next(), outgoing));
                let (piece, outgoing) = read.await.map_err(|error| Status::internal(error.to_string()))?;
                let Some(piece) = piece.map_err(|error| Status::data_loss(error.to_string()))? else { break };
                self.peers.metrics.snapshot_sent(piece.data.len());
                requests.send(v1::SnapshotRequest { part: Some(Part::Chunk(piece)) }).await.map_err(gone)?;
                in_flight += 1;
                pieces = Some(outgoing);
            }
            let answer = if in_flight > 0 {
                within(SNAPSHOT_WRITE_STALLS * stall, answers.message()).await?
            } else {
                // It installs; whether it is there at all is for the connection's probes to find out.
                answers.message().await?
            };
            match answer.and_then(|answer| answer.result) {
                Some(Answer::Written(_)) => in_flight -= 1,
                Some(Answer::Done(vote)) => return vote_in(Some(vote)),
                _ => return Err(Status::unavailable("the peer ended the transfer")),
            }
        }
    }
}

// --- messages, both ways; `peer_service` uses them too

pub(super) fn log_id_out(id: &LogId) -> v1::LogId {
    v1::LogId { term: to_position(id).term.get(), index: id.index() }
}

pub(super) fn log_id_in(id: v1::LogId) -> LogId {
    LogId::new_term_index(id.term, id.index)
}

pub(super) fn vote_out(vote: &RaftVote) -> v1::Vote {
    let vote = to_vote(vote);
    v1::Vote { term: vote.term.get(), node_id: vote.node_id.get(), committed: vote.committed }
}

pub(super) fn vote_in(vote: Option<v1::Vote>) -> Result<RaftVote, Status> {
    let vote = vote.ok_or_else(|| Status::invalid_argument("the message lacks its vote"))?;
    Ok(from_vote(Vote { term: vote.term.into(), node_id: vote.node_id.into(), committed: vote.committed }))
}

pub(super) fn append_to_wire(route: Option<v1::Route>, request: AppendEntriesRequest<Types>) -> v1::AppendRequest {
    let entries = request
        .entries
        .iter()
        .map(|entry| {
            let record = entry::encode(entry);
            v1::LogEntry { id: Some(log_id_out(&entry.log_id)), payload: record.payload }
        })
        .collect();
    v1::AppendRequest {
        route,
        vote: Some(vote_out(&request.vote)),
        previous: request.prev_log_id.as_ref().map(log_id_out),
        entries,
        committed: request.leader_commit.as_ref().map(log_id_out),
    }
}

pub(super) fn append_from_wire(request: v1::AppendRequest) -> Result<AppendEntriesRequest<Types>, Status> {
    let entries = request
        .entries
        .into_iter()
        .map(|wire| {
            let id = wire.id.ok_or_else(|| Status::invalid_argument("an entry lacks its id"))?;
            let position = LogPosition { term: id.term.into(), index: id.index.into() };
            entry::decode(LogRecord { position, payload: wire.payload })
                .map_err(|error| Status::invalid_argument(format!("entry {}: {error}", id.index)))
        })
        .collect::<Result<_, _>>()?;
    Ok(AppendEntriesRequest {
        vote: vote_in(request.vote)?,
        prev_log_id: request.previous.map(log_id_in),
        entries,
        leader_commit: request.committed.map(log_id_in),
    })
}

pub(super) fn append_result_to_wire(result: &StreamAppendResult<Types>) -> v1::AppendResponse {
    use v1::append_response::{Matched, Result as Wire};
    let result = match result {
        Ok(last) => Wire::Matched(Matched { last: last.as_ref().map(log_id_out) }),
        Err(StreamAppendError::Conflict(id)) => Wire::Conflict(log_id_out(id)),
        Err(StreamAppendError::HigherVote(vote)) => Wire::HigherVote(vote_out(vote)),
    };
    v1::AppendResponse { result: Some(result) }
}

pub(super) fn append_result_from_wire(
    response: v1::AppendResponse,
) -> Result<StreamAppendResult<Types>, RPCError<Types>> {
    use v1::append_response::Result as Wire;
    Ok(match response.result {
        Some(Wire::Matched(matched)) => Ok(matched.last.map(log_id_in)),
        Some(Wire::Conflict(id)) => Err(StreamAppendError::Conflict(log_id_in(id))),
        Some(Wire::HigherVote(vote)) => Err(StreamAppendError::HigherVote(vote_in(Some(vote)).map_err(unreachable)?)),
        None => return Err(unreachable(Status::invalid_argument("an append response lacks its result"))),
    })
}

fn vote_to_wire(route: v1::Route, request: &VoteRequest<Types>) -> v1::VoteRequest {
    v1::VoteRequest {
        route: Some(route),
        vote: Some(vote_out(&request.vote)),
        last_log: request.last_log_id.as_ref().map(log_id_out),
        leadership_transfer: request.leadership_transfer,
    }
}

pub(super) fn vote_from_wire(request: &v1::VoteRequest) -> Result<VoteRequest<Types>, Status> {
    let mut vote = VoteRequest::new(vote_in(request.vote)?, request.last_log.map(log_id_in));
    vote.leadership_transfer = request.leadership_transfer;
    Ok(vote)
}

pub(super) fn vote_response_to_wire(response: &VoteResponse<Types>) -> v1::VoteResponse {
    v1::VoteResponse {
        vote: Some(vote_out(&response.vote)),
        granted: response.vote_granted,
        last_log: response.last_log_id.as_ref().map(log_id_out),
    }
}

fn vote_response_from_wire(response: v1::VoteResponse) -> Result<VoteResponse<Types>, RPCError<Types>> {
    let vote = vote_in(response.vote).map_err(unreachable)?;
    Ok(VoteResponse::new(vote, response.last_log.map(log_id_in), response.granted))
}
