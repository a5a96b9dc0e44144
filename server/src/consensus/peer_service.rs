//! What the peers may ask of this node, and the gate in front of it.
//!
//! The gate keeps two promises that openraft cannot keep alone:
//!
//! A node acts only on what is meant for its incarnation. A disk that was lost comes back under the old id with a new
//! incarnation; letting it vote or acknowledge would forget what the old one promised.
//!
//! A restarted voter keeps the lease it acknowledged before. openraft holds that in memory only, so that:
//! ```text
//! leader A                 voter B                          candidate C
//! heartbeat ──────────────► acknowledges: no other vote
//! lease runs until t        killed, restarted
//!                           forgot the promise  ◄────────── vote for me
//!                           grants              ──────────► leads, acknowledges a write
//! reads under its lease: stale
//! ```
//! Hence for one maximum election timeout after boot it grants nothing and does not campaign, except where no promise
//! can stand in the way: see [`Quarantine`].

use std::future::ready;
use std::pin::Pin;
use std::sync::Arc;

use d_engine_proto::v1;
use d_engine_proto::v1::peer_server::{Peer, PeerServer};
use d_engine_proto::{DetailedStatus, ErrorCode, LogIndex};
use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use openraft::async_runtime::watch::WatchReceiver;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, StreamAppendError, TransferLeaderRequest, VoteRequest, VoteResponse,
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::{Request, Response, Status, Streaming};

use super::applier;
use super::fingerprint::{Fingerprints, StateHash};
use super::formation::Formation;
use super::leadership::{Applied, Leadership};
use super::log::Log;
use super::network::{
    LocalIdentity, append_from_wire, append_result_to_wire, log_id_in, vote_from_wire, vote_in, vote_out,
    vote_response_to_wire,
};
use super::raft_types::{Raft, RaftVote, Types};
use super::read_index::ReadIndex;
use super::runtime::RaftInstant;
use super::snapshots::{Manifest, ReceiveError, Snapshots};
use super::steward::{Introduction, Stewardship};
use crate::clock::Moment;
use crate::limits::{CHECK_PATIENCE, PEER_MESSAGE_BYTES_MAX, SNAPSHOT_CHUNKS_IN_FLIGHT_MAX};
use crate::metrics::Metrics;
use crate::storage::Identity;
use crate::tls::Tls;

/// The time after boot in which this node must not help to elect anyone.
#[derive(Clone, Copy, Debug)]
pub(super) struct Quarantine {
    until: Option<Moment>,
}

impl Quarantine {
    /// No promise can be outstanding: a node that never acknowledged a leader, or the only voter there is.
    pub(super) const NONE: Self = Self { until: None };

    pub(super) fn until(moment: Moment) -> Self {
        Self { until: Some(moment) }
    }

    pub(super) fn is_over(self) -> bool {
        self.until.is_none_or(|until| Moment::now() >= until)
    }

    /// Returns once it is over.
    pub(super) async fn over(self) {
        if let Some(until) = self.until {
            tokio::time::sleep(until.since(Moment::now())).await;
        }
    }

    /// Whether `request` must be denied although openraft might grant it. `promised` is the vote on record: its
    /// leader may ask for a transfer, since it gave up the lease this node must protect.
    fn denies(self, request: &VoteRequest<Types>, promised: &RaftVote) -> bool {
        let over = self.is_over();
        let transferred = request.leadership_transfer
            && promised.is_committed()
            && request.vote.leader_id().term == promised.leader_id().term + 1;
        !over && !transferred
    }
}

/// The peer service of one node.
pub(super) struct PeerService {
    pub(super) raft: Raft,
    pub(super) log: Log,
    pub(super) local: Arc<LocalIdentity>,
    pub(super) leadership: Arc<Leadership>,
    pub(super) read_index: Arc<ReadIndex>,
    pub(super) formation: Arc<Formation>,
    pub(super) quarantine: Quarantine,
    pub(super) stewardship: Stewardship,
    pub(super) fingerprints: Arc<Fingerprints>,
    pub(super) snapshots: Arc<Snapshots>,
    pub(super) applied: watch::Receiver<Applied>,
    pub(super) metrics: Arc<Metrics>,
}

/// What the peers talk to, ready to be added to a gRPC server.
pub type Server = InterceptedService<PeerServer<Gate>, MembersOnly>;

pub(super) fn server(service: Arc<PeerService>, tls: Option<Arc<Tls>>) -> Server {
    let server = PeerServer::new(Gate(service))
        .max_decoding_message_size(PEER_MESSAGE_BYTES_MAX)
        .max_encoding_message_size(PEER_MESSAGE_BYTES_MAX);
    InterceptedService::new(server, MembersOnly(tls))
}

/// Before every call: with TLS, the caller's certificate has to be a member's.
#[derive(Clone)]
pub struct MembersOnly(Option<Arc<Tls>>);

impl Interceptor for MembersOnly {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let Some(tls) = &self.0 else { return Ok(request) };
        match tls.admit_member(request.extensions().get()) {
            Ok(()) => Ok(request),
            Err(message) => {
                let code = ErrorCode::FailedPrecondition.number();
                let outcome = v1::Outcome::NotApplied as i32;
                let detail = v1::ErrorDetail { code, outcome, ..v1::ErrorDetail::default() };
                Err(DetailedStatus { message, detail }.into())
            }
        }
    }
}

/// Implements the generated trait; a type of its own so that streams can keep the service alive.
pub struct Gate(Arc<PeerService>);

impl PeerService {
    /// Refuses what is not meant for this node. A message from the cluster's leader makes a fresh node a member.
    async fn admit(&self, route: Option<&v1::Route>) -> Result<(), Status> {
        let route = route.ok_or_else(|| Status::invalid_argument("the message lacks its route"))?;
        let local = &self.local;
        if route.to != local.node_id || route.to_incarnation != local.incarnation {
            return Err(Status::failed_precondition(format!(
                "meant for node {} with incarnation {:016x}, but this is node {} with incarnation {:016x}: a data \
                 directory was lost or swapped; remove the member and add it again",
                route.to, route.to_incarnation, local.node_id, local.incarnation
            )));
        }
        match local.cluster_id() {
            Some(cluster_id) if cluster_id == route.cluster_id => Ok(()),
            Some(cluster_id) => Err(Status::failed_precondition(format!(
                "node {} belongs to cluster {:016x}, this node to {cluster_id:016x}",
                route.from, route.cluster_id
            ))),
            None if route.cluster_id == 0 => Err(Status::failed_precondition("the sender belongs to no cluster")),
            None => self.join(route.cluster_id).await,
        }
    }

    /// The sender knows this very incarnation as a member: its cluster is ours from now on.
    async fn join(&self, cluster_id: u64) -> Result<(), Status> {
        let identity = Identity {
            node_id: self.local.node_id.into(),
            incarnation: self.local.incarnation,
            cluster_id: Some(cluster_id),
        };
        self.log.save_identity(identity).await.map_err(|error| Status::internal(error.to_string()))?;
        self.local.join(cluster_id);
        tracing::info!(cluster = format_args!("{cluster_id:016x}"), "joined the cluster");
        Ok(())
    }

    async fn append(self: Arc<Self>, mut requests: Streaming<v1::AppendRequest>) -> Result<AppendResponses, Status> {
        let first = requests.message().await?.ok_or_else(|| Status::invalid_argument("the stream is empty"))?;
        self.admit(first.route.as_ref()).await?;
        let first = append_from_wire(first)?;
        // A malformed request ends the stream; the peer notices the missing answer and starts anew.
        let rest = requests.scan((), |(), request| {
            let request = request.and_then(append_from_wire);
            ready(request.inspect_err(|error| tracing::debug!(%error, "an append stream broke")).ok())
        });
        let requests: Pin<Box<dyn Stream<Item = AppendEntriesRequest<Types>> + Send>> =
            Box::pin(stream::iter([first]).chain(rest));
        let raft = self.raft.clone();
        Ok(Box::pin(raft.stream_append(requests).map(move |result| match result {
            Ok(result) => {
                if !matches!(result, Err(StreamAppendError::HigherVote(_))) {
                    self.leadership.leader_was_heard();
                }
                Ok(append_result_to_wire(&result))
            }
            Err(fatal) => Err(stopped(fatal)),
        })))
    }

    /// openraft answers an append, one without entries too, once all that it accepted before is on the disk. A leader would
    /// lose its lease, and a read its confirmation, whenever disks are slow. What a heartbeat is about is known as soon as
    /// openraft has looked at it: from then on this node grants no other vote for its time.
    async fn heartbeat(&self, request: v1::AppendRequest) -> Result<v1::AppendResponse, Status> {
        self.admit(request.route.as_ref()).await?;
        let request = append_from_wire(request)?;
        if !request.entries.is_empty() {
            return Err(Status::invalid_argument("a heartbeat carries no entries"));
        }
        let (leader, previous) = (request.vote, request.prev_log_id);
        let arrived = RaftInstant(Moment::now());
        let acknowledged = self
            .raft
            .with_raft_state(move |state| *state.vote_ref() == leader && state.vote_last_modified() >= Some(arrived));
        let result = tokio::select! {
            // In this order: openraft is asked for what the heartbeat has left behind.
            biased;
            handled = self.raft.append_entries(request) => match handled.map_err(stopped)? {
                AppendEntriesResponse::HigherVote(vote) => Err(StreamAppendError::HigherVote(vote)),
                AppendEntriesResponse::Conflict => previous.map_or(Ok(None), |id| Err(StreamAppendError::Conflict(id))),
                AppendEntriesResponse::Success | AppendEntriesResponse::PartialSuccess(_) => Ok(None),
            },
            Ok(true) = acknowledged => Ok(None),
        };
        if !matches!(result, Err(StreamAppendError::HigherVote(_))) {
            self.leadership.leader_was_heard();
        }
        Ok(append_result_to_wire(&result))
    }

    /// Receives a snapshot and installs it. Ends early when the leader goes away; what is there by then stays.
    async fn receive(
        &self,
        mut requests: Streaming<v1::SnapshotRequest>,
        answers: &mpsc::Sender<Result<v1::SnapshotResponse, Status>>,
    ) -> Result<RaftVote, Status> {
        use v1::snapshot_request::Part;
        use v1::snapshot_response::{Result as Answer, Written};

        let gone = |_| Status::cancelled("the leader is gone");
        let answer = |result| Ok(v1::SnapshotResponse { result: Some(result) });
        let Some(Part::Begin(begin)) = requests.message().await?.and_then(|request| request.part) else {
            return Err(Status::invalid_argument("a transfer begins with a manifest"));
        };
        self.admit(begin.route.as_ref()).await?;
        let vote = vote_in(begin.vote)?;
        let promised = self.raft.metrics().borrow_watched().vote;
        if begin.manifest_crc32c != crc32c::crc32c(&begin.manifest) {
            return Err(Status::data_loss("the manifest was damaged on its way"));
        }
        let manifest = Manifest::decode(&begin.manifest).map_err(Status::invalid_argument)?;
        if promised > vote || self.applied.borrow().position >= Some(manifest.position()) {
            return Ok(promised);
        }
        let snapshots = self.snapshots.clone();
        let (transfer, resume) = blocking(move || snapshots.begin(manifest)).await?;
        let index = self.applied.borrow().position.map_or(0, |position| position.index.get());
        tracing::info!(applied = index, file = resume.file, offset = resume.offset, "receiving a snapshot");
        answers.send(answer(Answer::Resume(resume))).await.map_err(gone)?;
        while !self.snapshots.is_received(transfer) {
            let Some(Part::Chunk(chunk)) = requests.message().await?.and_then(|request| request.part) else {
                return Err(Status::aborted("the transfer ended early"));
            };
            let (snapshots, bytes) = (self.snapshots.clone(), chunk.data.len());
            blocking(move || snapshots.take(transfer, &chunk)).await?;
            self.metrics.snapshot_received(bytes);
            answers.send(answer(Answer::Written(Written {}))).await.map_err(gone)?;
        }
        let snapshots = self.snapshots.clone();
        let snapshot = blocking(move || snapshots.received(transfer)).await?;
        let shown = applier::shown(snapshot.clone()).map_err(|error| Status::data_loss(error.to_string()))?;
        let response = self.raft.install_full_snapshot(vote, shown).await.map_err(stopped)?;
        let snapshots = self.snapshots.clone();
        // openraft may have had no use for it.
        blocking(move || {
            if snapshots.current().is_none_or(|current| !Arc::ptr_eq(&current, &snapshot)) {
                snapshots.give_up(snapshot);
            }
            Ok(snapshots.sweep()?)
        })
        .await?;
        Ok(response.vote)
    }

    async fn cast(&self, request: v1::VoteRequest, only_asking: bool) -> Result<v1::VoteResponse, Status> {
        self.admit(request.route.as_ref()).await?;
        let request = vote_from_wire(&request)?;
        let promised = {
            let metrics = self.raft.metrics();
            let metrics = metrics.borrow_watched();
            metrics.vote
        };
        if self.quarantine.denies(&request, &promised) {
            tracing::info!(candidate = request.vote.leader_id().voted_for, "no vote so soon after a restart");
            return Ok(vote_response_to_wire(&VoteResponse::new(promised, None, false)));
        }
        let response = if only_asking { self.raft.pre_vote(request).await } else { self.raft.vote(request).await };
        response.map(|response| vote_response_to_wire(&response)).map_err(stopped)
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ReceiveError> + Send + 'static,
) -> Result<T, Status> {
    let done = tokio::task::spawn_blocking(work).await.map_err(|error| Status::internal(error.to_string()))?;
    done.map_err(|error| match &error {
        ReceiveError::Refused(_) => Status::data_loss(error.to_string()),
        ReceiveError::Superseded => Status::aborted(error.to_string()),
        ReceiveError::NoSpace { .. } | ReceiveError::Storage(_) => Status::resource_exhausted(error.to_string()),
    })
}

fn stopped(error: impl std::fmt::Display) -> Status {
    Status::unavailable(error.to_string())
}

type SnapshotResponses = ReceiverStream<Result<v1::SnapshotResponse, Status>>;
type AppendResponses = Pin<Box<dyn Stream<Item = Result<v1::AppendResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Peer for Gate {
    type AppendStream = AppendResponses;
    type SnapshotStream = SnapshotResponses;

    async fn hello(&self, request: Request<v1::HelloRequest>) -> Result<Response<v1::HelloResponse>, Status> {
        let request = request.into_inner();
        let route = request.route.ok_or_else(|| Status::invalid_argument("the message lacks its route"))?;
        if let Some(introduction) = Introduction::of(request) {
            self.0.stewardship.introduce(introduction);
        }
        Ok(Response::new(self.0.formation.answer_hello(&self.0.raft, &route)))
    }

    async fn append(
        &self,
        request: Request<Streaming<v1::AppendRequest>>,
    ) -> Result<Response<AppendResponses>, Status> {
        let service = self.0.clone();
        // Answered before the first message: a leader opens the stream when it has nothing to send yet.
        let responses = stream::once(async move { service.append(request.into_inner()).await }).try_flatten();
        Ok(Response::new(Box::pin(responses)))
    }

    async fn heartbeat(&self, request: Request<v1::AppendRequest>) -> Result<Response<v1::AppendResponse>, Status> {
        self.0.heartbeat(request.into_inner()).await.map(Response::new)
    }

    async fn vote(&self, request: Request<v1::VoteRequest>) -> Result<Response<v1::VoteResponse>, Status> {
        self.0.cast(request.into_inner(), false).await.map(Response::new)
    }

    async fn pre_vote(&self, request: Request<v1::VoteRequest>) -> Result<Response<v1::VoteResponse>, Status> {
        self.0.cast(request.into_inner(), true).await.map(Response::new)
    }

    async fn transfer_leader(
        &self,
        request: Request<v1::TransferLeaderRequest>,
    ) -> Result<Response<v1::TransferLeaderResponse>, Status> {
        let request = request.into_inner();
        self.0.admit(request.route.as_ref()).await?;
        let from = vote_in(request.from_leader)?;
        let transfer = TransferLeaderRequest::new(from, request.to, request.last_log.map(log_id_in));
        match self.0.raft.handle_transfer_leader(transfer).await {
            Ok(Ok(())) => Ok(Response::new(v1::TransferLeaderResponse {})),
            Ok(Err(refused)) => Err(Status::failed_precondition(refused.to_string())),
            Err(fatal) => Err(stopped(fatal)),
        }
    }

    async fn read_index(
        &self,
        request: Request<v1::ReadIndexRequest>,
    ) -> Result<Response<v1::ReadIndexResponse>, Status> {
        self.0.admit(request.into_inner().route.as_ref()).await?;
        let confirmed = self.0.read_index.as_leader().await.map_err(stopped)?;
        let store_time_ns = u64::try_from(confirmed.store_time.0.as_nanos()).unwrap_or(u64::MAX);
        Ok(Response::new(v1::ReadIndexResponse { index: confirmed.index.get(), store_time_ns }))
    }

    async fn state_hash(
        &self,
        request: Request<v1::StateHashRequest>,
    ) -> Result<Response<v1::StateHashResponse>, Status> {
        let request = request.into_inner();
        self.0.admit(request.route.as_ref()).await?;
        let hash = self.0.fingerprints.after(LogIndex(request.index), CHECK_PATIENCE).await;
        let (hash, kind) = hash.map_or((None, 0), |hash| (Some(hash.hash), hash.kind));
        Ok(Response::new(v1::StateHashResponse { hash, kind }))
    }

    async fn diverged(&self, request: Request<v1::DivergedRequest>) -> Result<Response<v1::DivergedResponse>, Status> {
        let v1::DivergedRequest { route, index, hash, kind } = request.into_inner();
        self.0.admit(route.as_ref()).await?;
        // Which it finds out for itself.
        self.0.fingerprints.accuse(StateHash { index: LogIndex(index), kind, hash });
        Ok(Response::new(v1::DivergedResponse {}))
    }

    async fn snapshot(
        &self,
        request: Request<Streaming<v1::SnapshotRequest>>,
    ) -> Result<Response<SnapshotResponses>, Status> {
        let service = self.0.clone();
        let (answers, responses) = mpsc::channel(SNAPSHOT_CHUNKS_IN_FLIGHT_MAX);
        // A task of its own: once everything is there, it is installed whether or not the leader waits for it.
        tokio::spawn(async move {
            let received = service.receive(request.into_inner(), &answers).await;
            if let Err(error) = &received {
                tracing::debug!(%error, "a snapshot was not received whole");
            }
            let done = |vote| v1::snapshot_response::Result::Done(vote_out(&vote));
            // The leader may be gone.
            let _ = answers.send(received.map(|vote| v1::SnapshotResponse { result: Some(done(vote)) })).await;
        });
        Ok(Response::new(ReceiverStream::new(responses)))
    }
}
