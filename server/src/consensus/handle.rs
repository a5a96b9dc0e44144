//! The facade: starts a Raft node and is all that the rest of the server sees of it.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use d_engine_proto::{LogIndex, NodeId, Term, v1};
use openraft::StepDownPolicy;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::Fatal;
use tokio::sync::{mpsc, oneshot, watch};

use super::applier::Applier;
use super::compaction::{Compaction, Order, SnapshotError, SnapshotPolicy};
use super::fingerprint::Fingerprints;
use super::flusher::Persistence;
use super::formation::{Formation, MembershipRefused};
use super::gathering::{Gathering, Ticket};
use super::leadership::{Applied, LeaderInfo, Leadership, Monitor, Role};
use super::log::Log;
use super::member::Membership;
use super::network::{LocalIdentity, Peers, ToldCommit};
use super::peer_service::{self, PeerService, Quarantine};
use super::poison::Poison;
use super::proposer::{ProposeError, Proposer};
use super::raft_types::{Raft, StoredMembership};
use super::read_index::{ReadIndex, ReadIndexError};
use super::snapshots::{self, Snapshots};
use super::steward::{ChangeError, MemberChange, Steward, Stewardship};
use super::transfer::{Transfer, TransferError};
use crate::clock::Moment;
use crate::limits::APPEND_ENTRIES_MAX;
use crate::metrics::{Figures, Metrics};
use crate::state_machine::{StateMachine, StoreTime};
use crate::storage::{Durability, Identity, LogPosition, StorageEngine, StorageError, StorageOperation, StorageState};
use crate::tls::Tls;

/// The times Raft runs by. The configuration has checked how they relate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timings {
    /// How long a quorum's acknowledgement lets the leader answer reads from memory.
    pub lease: Duration,
    /// Shortest time without a leader before a campaign.
    pub election_min: Duration,
    /// Longest such time; also how long a voter grants no vote after it heard a leader.
    pub election_max: Duration,
    /// Pause between two heartbeats.
    pub heartbeat: Duration,
}

impl Timings {
    /// After this time without a word a member counts as dead, until it is heard again.
    pub(super) fn silence(self) -> Duration {
        2 * self.election_max
    }
}

/// What a Raft node needs to know to start.
#[derive(Clone, Debug)]
pub struct ConsensusConfig {
    /// This node.
    pub node_id: NodeId,
    /// The members a fresh cluster is formed of, this node included.
    pub initial_cluster: Vec<v1::InitialMember>,
    /// Where clients reach this node.
    pub client_address: String,
    /// Free address of the embedding application; may be empty.
    pub application_address: String,
    /// The times Raft runs by.
    pub timings: Timings,
    /// What an acknowledgement promises.
    pub persistence: Persistence,
    /// Bytes of proposals that may wait for their answer.
    pub pending_bytes_max: usize,
    /// Where snapshots are, in a directory of their own beside that of the state machine.
    pub snapshot_directory: PathBuf,
    /// When they are made.
    pub snapshot_policy: SnapshotPolicy,
}

/// Why a node does not start, or had to stop.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StartError {
    /// The directory belongs to another node.
    #[error("the data directory belongs to node {found}, the configuration says node {expected}: correct one of them")]
    OtherNodesDirectory {
        /// The configured node.
        expected: NodeId,
        /// The directory's node.
        found: NodeId,
    },
    /// The log was lost, the state machine's data was not.
    #[error(
        "the state machine has applied entry {applied}, but the log ends at {last}: the log directory was lost or \
         replaced; restore it, or remove the member from the cluster, empty the whole data directory and add it again"
    )]
    StateWithoutLog {
        /// The last entry applied.
        applied: LogIndex,
        /// The last entry of the log; 0: none.
        last: LogIndex,
    },
    /// Log and state machine contradict each other.
    #[error(
        "the state machine has applied entry {index} of term {applied}, but the log holds one of term {found} there: \
         they are not of one node, or committed writes were lost; remove the member from the cluster, empty the whole \
         data directory and add it again"
    )]
    StateOfAnotherLog {
        /// The entry.
        index: LogIndex,
        /// Its term, as the state machine knows it.
        applied: Term,
        /// Its term in the log.
        found: Term,
    },
    /// The directory cannot be used, or the disk failed.
    #[error(transparent)]
    Storage(#[from] Arc<StorageError>),
    /// The cluster does not know this node.
    #[error(transparent)]
    Refused(#[from] MembershipRefused),
    /// A task or thread that the node relies on panicked: a bug.
    #[error("{task} panicked: the node must not go on without it; restart it, and report this with its log")]
    Panicked {
        /// Which one.
        task: &'static str,
    },
    /// The state is not what the other members hold.
    #[error(
        "the state of this node was not the cluster's after log entry {index} (hash {ours:016x}, should be \
         {right:016x}): it must not serve; remove the member from the cluster, empty its data directory and add it again"
    )]
    Diverged {
        /// The entry after which the states were compared.
        index: LogIndex,
        /// The hash of this node's state.
        ours: u64,
        /// That of the cluster's.
        right: u64,
    },
    /// As [`Diverged`](Self::Diverged), found in an earlier run.
    #[error("this data directory was put aside: {found}")]
    MarkedDiverged {
        /// What was found then.
        found: String,
    },
    /// It was told to stop: the end of its tasks, and nothing to tell anybody.
    #[error("consensus was stopped")]
    Stopped,
    /// openraft refused, or ended with an error.
    #[error("consensus stopped: {0}")]
    Raft(String),
}

/// Positions of a node in its log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RaftProgress {
    /// Current term.
    pub term: Term,
    /// Last entry in the log; 0: none.
    pub last_log: LogIndex,
    /// Last entry known to be committed.
    pub committed: LogIndex,
    /// Last entry applied.
    pub applied: LogIndex,
    /// Last entry that is gone from the log, its effect being in a snapshot; 0: none.
    pub purged: LogIndex,
}

/// A running Raft node. Clones share it.
#[derive(Clone)]
pub struct Consensus {
    inner: Arc<Inner>,
}

struct Inner {
    raft: Raft,
    log: Log,
    local: Arc<LocalIdentity>,
    leadership: Arc<Leadership>,
    proposer: Proposer,
    read_index: Arc<ReadIndex>,
    told_commit: Arc<ToldCommit>,
    state_machine: Arc<dyn StateMachine>,
    applied: watch::Receiver<Applied>,
    poison: Poison,
    transfer: Transfer,
    stewardship: Stewardship,
    fingerprints: Arc<Fingerprints>,
    peers: Peers,
    /// Wishes for a snapshot.
    orders: mpsc::Sender<Order>,
}

impl Consensus {
    /// Starts a node over an opened storage engine and state machine. Returns it with the service its peers talk to;
    /// it takes part as soon as that is served.
    ///
    /// # Errors
    /// When the directory is another node's, or cannot be read or written.
    pub async fn start(
        config: ConsensusConfig,
        engine: Arc<dyn StorageEngine>,
        state_machine: Arc<dyn StateMachine>,
        metrics: Arc<Metrics>,
        tls: Option<Arc<Tls>>,
    ) -> Result<(Self, peer_service::Server), StartError> {
        let poison = Poison::default();
        let snapshots = recover(&config, &engine, &state_machine).await?;
        let state = engine.state().map_err(Arc::new)?;
        let recovered = state_machine.applied();
        let identity = claim_directory(&*engine, &state, config.node_id)?;
        let local = Arc::new(LocalIdentity::new(config.node_id.get(), identity.incarnation, identity.cluster_id));
        let (applied_sender, applied) =
            watch::channel(Applied { position: recovered.position, store_time: recovered.store_time });
        let log = Log::start(engine, &state, config.persistence, applied.clone(), metrics.clone(), &poison)
            .map_err(|error| StartError::Raft(error.to_string()))?;
        let stall = (2 * config.timings.election_max).max(Duration::from_secs(1));
        let peers = Peers::new(local.clone(), stall, tls.clone(), metrics.clone());

        let applier =
            Applier::new(state_machine.clone(), log.clone(), applied_sender, snapshots.clone(), metrics.clone());
        let raft_config = Arc::new(raft_config(&config.timings)?);
        let raft = Raft::new(config.node_id.get(), raft_config, peers.clone(), log.clone(), applier);
        let raft = poison.clone().guard_openraft(raft).await.map_err(|error| StartError::Raft(error.to_string()))?;

        let quarantine = begin_quarantine(&raft, &identity, &state, &config.timings).await?;
        let leadership = Arc::new(Leadership::new());
        let monitor = Monitor {
            raft: raft.clone(),
            leadership: leadership.clone(),
            applied: applied.clone(),
            timings: config.timings,
            metrics: metrics.clone(),
        };
        let monitoring = tokio::spawn(poison.guard("the watch over leadership", monitor.run()));
        let read_index =
            ReadIndex::start(raft.clone(), peers.clone(), leadership.clone(), config.timings.election_max, &poison);
        let read_index = Arc::new(read_index);
        let mut initial_cluster = config.initial_cluster;
        initial_cluster.sort_by_key(|member| member.id);
        let formation = Arc::new(Formation {
            local: local.clone(),
            initial_cluster,
            client_address: config.client_address,
            application_address: config.application_address,
            timings: config.timings,
        });
        let fingerprints = Arc::new(Fingerprints::default());
        let transfer = Transfer {
            raft: raft.clone(),
            leadership: leadership.clone(),
            timings: config.timings,
            metrics: metrics.clone(),
        };
        let steward = Steward {
            raft: raft.clone(),
            peers: peers.clone(),
            formation: formation.clone(),
            leadership: leadership.clone(),
            transfer: transfer.clone(),
            metrics: metrics.clone(),
        };
        let stewardship = steward.start(quarantine, &poison);
        let service = PeerService {
            raft: raft.clone(),
            log: log.clone(),
            local: local.clone(),
            leadership: leadership.clone(),
            read_index: read_index.clone(),
            formation: formation.clone(),
            quarantine,
            stewardship: stewardship.clone(),
            fingerprints: fingerprints.clone(),
            snapshots: snapshots.clone(),
            applied: applied.clone(),
            metrics: metrics.clone(),
        };
        let (orders, ordered) = mpsc::channel(1);
        let compaction = Compaction {
            raft: raft.clone(),
            snapshots,
            state_machine: state_machine.clone(),
            applied: applied.clone(),
            policy: config.snapshot_policy,
            metrics: metrics.clone(),
        };
        tokio::spawn(poison.guard("the compaction of the log", compaction.run(ordered)));
        let proposer = Proposer::start(raft.clone(), leadership.clone(), metrics, config.pending_bytes_max, &poison);
        let told_commit = peers.told_commit().clone();
        watch_for_failure(&raft, &log, formation, peers.clone(), leadership.clone(), monitoring, &poison);
        let inner = Inner {
            raft,
            log,
            local,
            leadership,
            proposer,
            read_index,
            told_commit,
            state_machine,
            applied,
            poison,
            transfer,
            stewardship,
            fingerprints,
            peers,
            orders,
        };
        Ok((Self { inner: Arc::new(inner) }, peer_service::server(Arc::new(service), tls)))
    }

    /// Proposes a command and waits for the state machine's answer. Dropping the future does not withdraw it.
    ///
    /// # Errors
    /// See [`ProposeError`]; each tells whether the command can still take effect.
    pub async fn propose(&self, command: Bytes) -> Result<Bytes, ProposeError> {
        self.inner.proposer.propose(command)?.await.unwrap_or(Err(ProposeError::Stopped))
    }

    /// Proposes many commands of one caller at once, in the order of their serials. Every command that is not withdrawn
    /// has one answer in `gathering`, a refusal included; the rest is as with [`propose`](Self::propose).
    pub fn propose_all(&self, commands: VecDeque<(Ticket, Bytes)>, gathering: &Gathering) {
        self.inner.proposer.propose_all(commands, gathering);
    }

    /// Bytes of proposals that wait for their answer.
    #[must_use]
    pub fn pending_bytes(&self) -> usize {
        self.inner.proposer.pending_bytes()
    }

    /// Confirms with a quorum who leads, and waits until everything committed by then is applied here. A read of the
    /// state machine's memory after it is linearizable; no clock is involved. Works on any member.
    ///
    /// Returns the leader's store time after the confirmation: the read must show nothing that was due by then.
    ///
    /// # Errors
    /// When no leader can be confirmed.
    pub async fn confirm_read(&self) -> Result<StoreTime, ReadIndexError> {
        let confirmed = self.inner.read_index.anywhere().await?;
        self.wait_applied(confirmed.index).await?;
        Ok(confirmed.store_time)
    }

    /// If this node leads and its lease is valid at this moment: waits until everything that any member may show by
    /// now is applied here, and returns the store time by which nothing that the read shows may have been due. A read
    /// of the state machine's memory after it is linearizable while clock rates stay within the drift bound. Hardly
    /// ever waits, and asks nobody. `None` without a lease.
    ///
    /// # Errors
    /// When the node is stopping.
    pub async fn confirm_read_by_lease(&self) -> Result<Option<StoreTime>, ReadIndexError> {
        // In this order: while the lease is valid nobody but this node tells of commits.
        if !self.is_leader() {
            return Ok(None);
        }
        let now = self.store_time();
        let told = self.inner.told_commit.index();
        if !self.is_applied(told) {
            self.wait_applied(told).await?;
        }
        Ok(now)
    }

    /// As [`confirm_read_by_lease`](Self::confirm_read_by_lease), for who does not wait: `None` also when something is
    /// still to be applied. Takes no lock for long.
    #[must_use]
    pub fn read_by_lease(&self) -> Option<StoreTime> {
        if !self.is_leader() {
            return None;
        }
        let now = self.store_time()?;
        self.is_applied(self.inner.told_commit.index()).then_some(now)
    }

    fn is_applied(&self, index: LogIndex) -> bool {
        self.inner.applied.borrow().position.is_some_and(|position| position.index >= index)
    }

    /// Store time at this moment; `None` unless this node leads and has applied the first entry of its reign. Within a
    /// reign it never goes back, and what is proposed later is stamped no earlier. A leader that was deposed goes on
    /// counting until it notices: only a confirmed read may rely on it. Takes no lock.
    #[must_use]
    pub fn store_time(&self) -> Option<StoreTime> {
        self.inner.leadership.store_time()
    }

    /// Follows whether [`store_time`](Self::store_time) has an answer.
    #[must_use]
    pub fn reigning(&self) -> watch::Receiver<bool> {
        self.inner.leadership.reigning()
    }

    async fn wait_applied(&self, index: LogIndex) -> Result<(), ReadIndexError> {
        let mut applied = self.inner.applied.clone();
        let reached = |applied: &Applied| applied.position.is_some_and(|position| position.index >= index);
        match applied.wait_for(reached).await {
            Ok(_) => Ok(()),
            Err(_) => Err(ReadIndexError::Unconfirmed { reason: "the node is stopping".into() }),
        }
    }

    /// Whether this node leads and its lease is valid at this very moment.
    #[must_use]
    pub fn is_leader(&self) -> bool {
        self.inner.leadership.lease_is_valid()
    }

    /// The leader, once the first entry of its reign is applied here; `None` while none is known or trusted.
    #[must_use]
    pub fn leader(&self) -> Option<LeaderInfo> {
        // What was published last may have ended since.
        self.inner.leadership.info().filter(|info| info.leader_id != self.inner.local.node_id || self.is_leader())
    }

    pub(super) fn fingerprints(&self) -> &Fingerprints {
        &self.inner.fingerprints
    }

    pub(super) fn peers(&self) -> &Peers {
        &self.inner.peers
    }

    /// Follows [`leader`](Self::leader): the latest state is always delivered.
    #[must_use]
    pub fn leader_changes(&self) -> watch::Receiver<Option<LeaderInfo>> {
        self.inner.leadership.subscribe()
    }

    /// What this node is doing.
    #[must_use]
    pub fn role(&self) -> Role {
        self.inner.leadership.role()
    }

    /// This node.
    #[must_use]
    pub fn node_id(&self) -> NodeId {
        self.inner.local.node_id.into()
    }

    /// The cluster; `None` until it is formed or joined.
    #[must_use]
    pub fn cluster_id(&self) -> Option<u64> {
        self.inner.local.cluster_id()
    }

    /// The current term, as far as published.
    #[must_use]
    pub fn term(&self) -> Term {
        self.inner.leadership.term()
    }

    /// The members as this node knows them.
    #[must_use]
    pub fn membership(&self) -> Membership {
        let membership = self.inner.raft.metrics().borrow_watched().membership_config.clone();
        plain_membership(&membership)
    }

    /// Positions in the log.
    #[must_use]
    pub fn progress(&self) -> RaftProgress {
        let metrics = self.inner.raft.metrics();
        let metrics = metrics.borrow_watched();
        let index = |id: &Option<super::raft_types::LogId>| LogIndex(id.as_ref().map_or(0, |id| id.index()));
        RaftProgress {
            term: Term(metrics.current_term),
            last_log: LogIndex(metrics.last_log_index.unwrap_or(0)),
            committed: index(&metrics.local_committed),
            applied: index(&metrics.last_applied),
            purged: index(&metrics.purged),
        }
    }

    /// What a scrape of the metrics asks of Raft; the rest is left at zero.
    #[must_use]
    pub fn figures(&self) -> Figures {
        let (progress, membership) = (self.progress(), self.membership());
        let voters = membership.voters().count();
        let metrics = self.inner.raft.metrics();
        let metrics = metrics.borrow_watched();
        let last = metrics.last_log_index.unwrap_or(0);
        // A leader follows itself too.
        let others = metrics.replication.iter().flatten().filter(|(id, _)| **id != metrics.id);
        let lags = others.map(|(id, matched)| {
            let has = matched.as_ref().map_or(0, |matched| matched.index());
            (NodeId(*id), last.saturating_sub(has))
        });
        Figures {
            voters,
            learners: membership.members.len() - voters,
            lags: lags.collect(),
            committed: progress.committed,
            applied: progress.applied,
            purged: progress.purged,
            pending_bytes: self.pending_bytes(),
            ..Figures::default()
        }
    }

    /// Why the node cannot go on; `None` while it can. The first reason stays.
    #[must_use]
    pub fn failure(&self) -> watch::Receiver<Option<StartError>> {
        self.inner.poison.failure()
    }

    /// Where what cannot be gone on without is guarded, and where any other reason to end is told.
    #[must_use]
    pub fn poison(&self) -> &Poison {
        &self.inner.poison
    }

    /// Makes a snapshot of what is applied here now, or finds it made, and has the log purged behind it. Answers the last
    /// entry in it. Dropping the future does not stop it.
    ///
    /// # Errors
    /// See [`SnapshotError`]; the node goes on without.
    pub async fn trigger_snapshot(&self) -> Result<LogIndex, SnapshotError> {
        let (order, done) = oneshot::channel();
        self.inner.orders.send(order).await.map_err(|_| SnapshotError::Stopped)?;
        done.await.unwrap_or(Err(SnapshotError::Stopped))
    }

    /// Hands leadership to another voter, the most up-to-date one that answers if it is left open, and returns once that
    /// is known to reign. Bounded: four maximum election timeouts.
    ///
    /// The read lease is gone before the successor is asked, and stays gone for the rest of the term, also when the
    /// transfer comes to nothing. A leader whose transfer failed goes on looking for a successor.
    ///
    /// # Errors
    /// See [`TransferError`].
    pub async fn transfer_leadership(&self, to: Option<NodeId>) -> Result<LeaderInfo, TransferError> {
        self.inner.transfer.run(to.map(NodeId::get)).await
    }

    /// Changes who belongs to the cluster, on the leader, and returns once that is committed. Changes wait for their
    /// turn. Dropping the future does not withdraw it.
    ///
    /// To remove or demote the leader, it hands over leadership and answers [`ChangeError::NotLeader`]: its successor
    /// makes the change. `force`: also if fewer voters answer afterwards than a quorum has.
    ///
    /// # Errors
    /// See [`ChangeError`]; only [`ChangeError::Interrupted`] leaves open what became of the change.
    pub async fn change_members(&self, change: MemberChange, force: bool) -> Result<(), ChangeError> {
        self.inner.stewardship.change(change, force).await
    }

    /// Stops: hands leadership over, ends every task, and makes the state machine durable. Idempotent.
    pub async fn stop(&self) {
        // Held to the end: whatever reign this node may still come to, it serves no read under it.
        let _no_lease = self.inner.leadership.renounce(self.inner.leadership.term().get());
        match self.inner.transfer.run(None).await {
            Ok(_) | Err(TransferError::NotLeader) => {}
            Err(error) => tracing::warn!(%error, "stopping without a successor"),
        }
        if let Err(error) = self.inner.raft.shutdown().await {
            tracing::warn!(%error, "consensus ended abnormally");
        }
        self.inner.log.stop().await;
        let state_machine = self.inner.state_machine.clone();
        match tokio::task::spawn_blocking(move || state_machine.flush()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%error, "the state machine cannot be made durable; the log will replay"),
            Err(error) => tracing::error!(%error, "flushing the state machine panicked"),
        }
    }
}

/// Opens the snapshots, and goes on with the installation of one that a crash interrupted.
async fn recover(
    config: &ConsensusConfig,
    engine: &Arc<dyn StorageEngine>,
    state_machine: &Arc<dyn StateMachine>,
) -> Result<Arc<Snapshots>, StartError> {
    let (engine, state_machine) = (engine.clone(), state_machine.clone());
    let (directory, persistence) = (config.snapshot_directory.clone(), config.persistence);
    let recovering = tokio::task::spawn_blocking(move || {
        let state = engine.state().map_err(Arc::new)?;
        let snapshots = Snapshots::open(&directory).map_err(Arc::new)?;
        let applied = state_machine.applied().position;
        check_log_reaches(&*engine, &state, applied, persistence)?;
        if state.identity.is_none()
            && let Some(snapshot) = snapshots.current()
        {
            return Err(StartError::StateWithoutLog { applied: snapshot.position().index, last: LogIndex(0) });
        }
        snapshots::recover(&snapshots, &*engine, &*state_machine).map_err(Arc::new)?;
        Ok(Arc::new(snapshots))
    });
    recovering.await.map_err(|error| StartError::Raft(error.to_string()))?
}

/// Checks that state machine and log belong together.
///
/// A state machine that is ahead of its log could not be replayed. Under `DiskFirst` that is a lost log directory. Under
/// `MemFirst` a power cut leaves it too, when the state machine's last batch reached the disk and the end of the log
/// did not: what it applied was committed, so openraft lets the log begin anew behind it, as after a snapshot.
fn check_log_reaches(
    engine: &dyn StorageEngine,
    state: &StorageState,
    applied: Option<LogPosition>,
    persistence: Persistence,
) -> Result<(), StartError> {
    let Some(applied) = applied else { return Ok(()) };
    let end = state.last.max(state.purged);
    if end.is_none_or(|end| end.index < applied.index) {
        let last = end.map_or(LogIndex(0), |end| end.index);
        // A log that was ever used holds a vote: that is on the disk under every policy.
        if state.vote.is_none() || persistence == Persistence::DiskFirst {
            return Err(StartError::StateWithoutLog { applied: applied.index, last });
        }
        tracing::warn!(
            applied = applied.index.get(),
            log = last.get(),
            "the end of the log was lost, as by a power cut under MemFirst; what was applied is kept"
        );
    }
    let next = LogIndex(applied.index.get().saturating_add(1));
    let entry = engine.read(applied.index, next, 0).map_err(Arc::new)?.pop();
    match entry {
        Some(entry) if entry.position != applied => Err(StartError::StateOfAnotherLog {
            index: applied.index,
            applied: applied.term,
            found: entry.position.term,
        }),
        _ => Ok(()),
    }
}

/// Checks that the directory is this node's; a fresh one is given an incarnation before anything else happens.
fn claim_directory(engine: &dyn StorageEngine, state: &StorageState, node_id: NodeId) -> Result<Identity, StartError> {
    match state.identity {
        Some(identity) if identity.node_id == node_id => Ok(identity),
        Some(identity) => Err(StartError::OtherNodesDirectory { expected: node_id, found: identity.node_id }),
        None => {
            let identity = Identity { node_id, incarnation: fastrand::u64(1..), cluster_id: None };
            engine.write(&[StorageOperation::SaveIdentity(identity)], Durability::Fsync).map_err(Arc::new)?;
            Ok(identity)
        }
    }
}

fn raft_config(timings: &Timings) -> Result<openraft::Config, StartError> {
    let milliseconds = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let config = openraft::Config {
        cluster_name: "d-engine".into(),
        heartbeat_interval: milliseconds(timings.heartbeat),
        election_timeout_min: milliseconds(timings.election_min),
        election_timeout_max: milliseconds(timings.election_max),
        max_payload_entries: APPEND_ENTRIES_MAX,
        // `compaction` sees to both.
        snapshot_policy: openraft::SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: u64::MAX,
        // The removed leader's step-down is ours to drive, together with its read lease.
        removed_leader_step_down: StepDownPolicy::Never,
        quorum_loss_probe_interval: Some(3 * milliseconds(timings.election_max)),
        enable_pre_vote: Some(true),
        // Until `steward` knows whether it may.
        enable_elect: false,
        // A restarted leader may hand out a (term, index) that its followers already hold.
        enable_leader_restore: Some(false),
        backoff: "10ms 20ms 40ms ...200ms".into(),
        ..openraft::Config::default()
    };
    config.validate().map_err(|error| StartError::Raft(error.to_string()))
}

/// See `peer_service`. Whether this node may campaign at all, and from when on, is decided by `steward`.
async fn begin_quarantine(
    raft: &Raft,
    identity: &Identity,
    state: &StorageState,
    timings: &Timings,
) -> Result<Quarantine, StartError> {
    let never_promised = state.vote.is_none() && state.last.is_none() && state.purged.is_none();
    let incarnation = identity.incarnation;
    let sole_voter = raft
        .with_raft_state(move |state| {
            let membership = state.membership_state.effective();
            let voters: Vec<u32> = membership.voter_ids().collect();
            // A voter of the same id whose directory was lost is another one.
            matches!(voters[..], [only] if membership.get_node(&only).is_some_and(|m| m.incarnation == incarnation))
        })
        .await
        .map_err(|error| StartError::Raft(error.to_string()))?;
    // The only voter keeps no promise to anybody, unless its last one was to a leader that has removed itself since.
    let promised_nobody = state.vote.is_none_or(|vote| vote.node_id.get() == *raft.node_id());
    if never_promised || (sole_voter && promised_nobody) {
        return Ok(Quarantine::NONE);
    }
    // The margin covers the clocks' drift and the ticks by which timers are late.
    Ok(Quarantine::until(Moment::now() + timings.election_max + timings.heartbeat))
}

/// Gathers whatever makes going on impossible into one place.
fn watch_for_failure(
    raft: &Raft,
    log: &Log,
    formation: Arc<Formation>,
    peers: Peers,
    leadership: Arc<Leadership>,
    monitoring: tokio::task::JoinHandle<()>,
    poison: &Poison,
) {
    let mut fault = log.fault();
    let forming = {
        let (raft, log) = (raft.clone(), log.clone());
        async move {
            match formation.run(raft, log, peers, leadership).await {
                Err(refused) => StartError::Refused(refused),
                Ok(()) => std::future::pending().await,
            }
        }
    };
    let log_fault = log.fault();
    let raft = raft.clone();
    let failed = poison.clone();
    tokio::spawn(poison.guard("the watch over failures", async move {
        let broken_disk = async {
            match fault.wait_for(Option::is_some).await.ok().and_then(|fault| fault.clone()) {
                Some(error) => StartError::Storage(error),
                None => std::future::pending().await,
            }
        };
        let ended = async {
            let _ = monitoring.await;
            // openraft ends because of a disk error too, and tells of it less well than the log does.
            if let Some(error) = log_fault.borrow().clone() {
                return StartError::Storage(error);
            }
            match raft.metrics().borrow_watched().running_state.clone() {
                Err(Fatal::Stopped) => StartError::Stopped,
                Err(error) => StartError::Raft(error.to_string()),
                Ok(()) => StartError::Raft("its monitor ended".to_owned()),
            }
        };
        let reason = tokio::select! {
            reason = forming => reason,
            reason = broken_disk => reason,
            reason = ended => reason,
        };
        failed.fail(reason);
    }));
}

fn plain_membership(stored: &StoredMembership) -> Membership {
    let voters: std::collections::BTreeSet<u32> = stored.voter_ids().collect();
    let members = stored.nodes().map(|(id, member)| (NodeId(*id), (member.clone(), voters.contains(id)))).collect();
    Membership { members }
}
