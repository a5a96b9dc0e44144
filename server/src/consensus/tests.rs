//! Clusters of real nodes in one process: real openraft, real gRPC on loopback; storage in memory, and a state machine
//! that is a list. Whatever needs processes that die is tested on the real binary.

mod disks;
mod groups;
mod members;
mod snapshots;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use d_engine_proto::{LogIndex, NodeId, Term, v1};
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio_stream::wrappers::TcpListenerStream;

use super::*;
use crate::clock::Moment;
use crate::metrics::Metrics;
use crate::state_machine::{AppliedState, CommittedEntry, EntryContent, StateMachine, StoreTime};
use crate::storage::{
    Durability, LogPosition, LogRecord, MemoryStorageEngine, StorageEngine, StorageError, StorageOperation, Vote,
};

const PATIENCE: Duration = Duration::from_secs(60);
pub(super) const TIMINGS: Timings = Timings {
    lease: Duration::from_millis(250),
    election_min: Duration::from_millis(250),
    election_max: Duration::from_millis(375),
    heartbeat: Duration::from_millis(50),
};

/// Remembers every command; answers with how many there are. It is durable up to an entry, if it is told so.
#[derive(Default)]
struct List(Mutex<(AppliedState, Vec<Bytes>)>, Mutex<Option<LogPosition>>);

impl List {
    fn commands(&self) -> Vec<Bytes> {
        self.0.lock().1.clone()
    }
}

impl StateMachine for List {
    fn applied(&self) -> AppliedState {
        self.0.lock().0.clone()
    }

    fn durable(&self) -> Option<LogPosition> {
        self.1.lock().or(self.applied().position)
    }

    fn apply(&self, entry: &CommittedEntry) -> Result<Vec<Bytes>, StorageError> {
        let (applied, list) = &mut *self.0.lock();
        applied.position = Some(entry.position);
        match &entry.content {
            EntryContent::Blank => Ok(vec![]),
            EntryContent::Membership(bytes) => {
                applied.membership = Some((entry.position, bytes.clone()));
                Ok(vec![])
            }
            EntryContent::Commands { store_time, commands } => {
                assert!(*store_time >= applied.store_time, "store time went back");
                applied.store_time = *store_time;
                let answer = |command: &Bytes| {
                    list.push(command.clone());
                    Bytes::from(list.len().to_string())
                };
                Ok(commands.iter().map(answer).collect())
            }
        }
    }

    fn query(&self, _query: Bytes) -> Result<Bytes, StorageError> {
        Ok(Bytes::new())
    }

    fn flush(&self) -> Result<(), StorageError> {
        Ok(())
    }

    /// A file for each command, and what they stand for.
    fn save(&self, directory: &Path) -> Result<AppliedState, StorageError> {
        let (applied, list) = self.0.lock().clone();
        for (number, command) in list.iter().enumerate() {
            fs::write(directory.join(format!("{number:06}")), command).unwrap();
        }
        let position = applied.position.unwrap();
        let (membership, bytes) = applied.membership.clone().unwrap();
        let numbers = [position, membership].map(|at| (at.term.get(), at.index.get()));
        let text = format!("{numbers:?} {}", applied.store_time.as_nanos());
        fs::write(directory.join("position"), text.replace(['[', ']', '(', ')', ','], "")).unwrap();
        fs::write(directory.join("membership"), bytes).unwrap();
        Ok(applied)
    }

    fn restore(&self, directory: &Path) -> Result<(), StorageError> {
        let text = fs::read_to_string(directory.join("position")).unwrap();
        let numbers: Vec<u64> = text.split(' ').map(|number| number.parse().unwrap()).collect();
        let at = |term: u64, index: u64| LogPosition { term: term.into(), index: index.into() };
        let membership = fs::read(directory.join("membership")).unwrap().into();
        let applied = AppliedState {
            position: Some(at(numbers[0], numbers[1])),
            store_time: StoreTime::from_nanos(numbers[4]),
            membership: Some((at(numbers[2], numbers[3]), membership)),
        };
        let commands = (0..).map_while(|number: u32| fs::read(directory.join(format!("{number:06}"))).ok());
        *self.0.lock() = (applied, commands.map(Bytes::from).collect());
        Ok(())
    }
}

struct Node {
    consensus: Consensus,
    address: String,
    list: Arc<List>,
    serving: oneshot::Sender<()>,
    _snapshots: tempfile::TempDir,
}

impl Node {
    async fn start(
        id: u32,
        members: &[v1::InitialMember],
        engine: Arc<dyn StorageEngine>,
        listener: tokio::net::TcpListener,
    ) -> Self {
        Self::start_with(TIMINGS, id, members, engine, listener).await
    }

    async fn start_with(
        timings: Timings,
        id: u32,
        members: &[v1::InitialMember],
        engine: Arc<dyn StorageEngine>,
        listener: tokio::net::TcpListener,
    ) -> Self {
        let list = Arc::new(List::default());
        let address = listener.local_addr().unwrap().to_string();
        let directory = tempfile::tempdir().unwrap();
        let config = ConsensusConfig {
            node_id: NodeId(id),
            initial_cluster: members.to_vec(),
            client_address: format!("client-{id}"),
            application_address: String::new(),
            timings,
            persistence: Persistence::DiskFirst,
            pending_bytes_max: 1 << 20,
            snapshot_directory: directory.path().to_owned(),
            snapshot_policy: SnapshotPolicy::OFF,
        };
        let (consensus, peers) =
            Consensus::start(config, engine, list.clone(), Arc::new(Metrics::default()), None).await.unwrap();
        let (serving, stopped) = oneshot::channel::<()>();
        let serve = tonic::transport::Server::builder().add_service(peers).serve_with_incoming_shutdown(
            TcpListenerStream::new(listener),
            async {
                let _ = stopped.await;
            },
        );
        tokio::spawn(serve);
        Self { consensus, address, list, serving, _snapshots: directory }
    }

    async fn stop(self) {
        self.consensus.stop().await;
        let _ = self.serving.send(());
    }
}

struct Cluster {
    nodes: Vec<Node>,
    /// Of the nodes as they were started, by ascending id.
    engines: Vec<Arc<MemoryStorageEngine>>,
}

impl Cluster {
    async fn start(voters: usize) -> Self {
        Self::start_with_learners(voters, 0).await
    }

    /// Ids ascending, voters first.
    async fn start_with_learners(voters: usize, learners: usize) -> Self {
        let mut listeners = Vec::new();
        for _ in 0..voters + learners {
            listeners.push(tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap());
        }
        let members: Vec<_> = listeners
            .iter()
            .zip(1..)
            .map(|(listener, id)| v1::InitialMember {
                id,
                address: listener.local_addr().unwrap().to_string(),
                learner: id as usize > voters,
                joining: false,
            })
            .collect();
        let mut nodes = Vec::new();
        let engines: Vec<Arc<MemoryStorageEngine>> = members.iter().map(|_| Arc::default()).collect();
        for ((listener, id), engine) in listeners.into_iter().zip(1..).zip(&engines) {
            nodes.push(Node::start(id, &members, engine.clone(), listener).await);
        }
        Self { nodes, engines }
    }

    async fn leader(&self) -> &Node {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            if let Some(leader) = self.nodes.iter().find(|node| node.consensus.is_leader()) {
                return leader;
            }
            assert!(tokio::time::Instant::now() < deadline, "no leader");
            tokio::task::yield_now().await;
        }
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("in time")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_single_node_leads_and_answers() {
    let cluster = Cluster::start(1).await;
    let leader = cluster.leader().await;
    assert_eq!(leader.consensus.propose(Bytes::from_static(b"a")).await.unwrap(), "1");
    within(leader.consensus.confirm_read()).await.unwrap();
    assert_eq!(leader.list.commands(), ["a"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_agree_and_a_follower_reads_what_was_acknowledged() {
    let cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    let commands: Vec<Bytes> = (0..1000).map(|number: u32| Bytes::from(number.to_string())).collect();
    let answers = futures_util::future::join_all(commands.iter().map(|c| leader.consensus.propose(c.clone())));
    let mut counts: Vec<usize> = within(answers)
        .await
        .into_iter()
        .map(|answer| String::from_utf8(answer.unwrap().to_vec()).unwrap().parse().unwrap())
        .collect();
    counts.sort_unstable();
    assert_eq!(counts, (1..=1000).collect::<Vec<_>>(), "each command is applied once and answered with its own answer");
    for node in &cluster.nodes {
        within(node.consensus.leader_changes().wait_for(Option::is_some)).await.unwrap();
        within(node.consensus.confirm_read()).await.unwrap();
        assert_eq!(node.list.commands(), leader.list.commands());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_on_a_follower_is_refused_and_every_node_names_the_leader() {
    let cluster = Cluster::start(3).await;
    let leader = cluster.leader().await.consensus.leader().unwrap();
    for node in &cluster.nodes {
        let mut changes = node.consensus.leader_changes();
        let known = *within(changes.wait_for(Option::is_some)).await.unwrap();
        assert_eq!(known, Some(leader));
        if node.consensus.node_id() != NodeId(leader.leader_id) {
            let refused = within(node.consensus.propose(Bytes::from_static(b"x"))).await.unwrap_err();
            assert_eq!(refused, ProposeError::NotLeader);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_ends_the_lease_for_good_and_the_successor_has_every_write() {
    let cluster = Cluster::start(3).await;
    let old = cluster.leader().await;
    within(old.consensus.propose(Bytes::from_static(b"before"))).await.unwrap();
    let reign = old.consensus.leader().unwrap();
    let lease_seen = {
        let consensus = old.consensus.clone();
        tokio::spawn(async move {
            consensus.transfer_leadership(None).await.unwrap();
            consensus.is_leader()
        })
    };
    assert!(!within(lease_seen).await.unwrap(), "a lease survived its transfer");
    let new = cluster.leader().await;
    assert_ne!(new.consensus.node_id(), old.consensus.node_id());
    assert!(new.consensus.leader().unwrap().term > reign.term);
    assert_eq!(new.list.commands(), ["before"]);
    within(new.consensus.propose(Bytes::from_static(b"after"))).await.unwrap();
    within(old.consensus.leader_changes().wait_for(Option::is_some)).await.unwrap();
    within(old.consensus.confirm_read()).await.unwrap();
    assert_eq!(old.list.commands(), ["before", "after"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn store_time_is_the_leaders_and_no_batch_is_stamped_before_what_a_read_saw() {
    let cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    for node in &cluster.nodes {
        if node.consensus.node_id() != leader.consensus.node_id() {
            assert_eq!(node.consensus.store_time(), None);
            within(node.consensus.leader_changes().wait_for(Option::is_some)).await.unwrap();
        }
        let mut last = leader.consensus.store_time().unwrap();
        for _ in 0..20 {
            let confirmed = within(node.consensus.confirm_read()).await.unwrap();
            assert!(confirmed >= last, "{confirmed:?} is before {last:?}");
            within(leader.consensus.propose(Bytes::from_static(b"x"))).await.unwrap();
            last = leader.list.applied().store_time;
            assert!(last >= confirmed, "stamped {last:?}, a read saw {confirmed:?}");
        }
    }
    let by_lease = within(leader.consensus.confirm_read_by_lease()).await.unwrap();
    assert!(by_lease.unwrap() >= leader.list.applied().store_time);
}

#[tokio::test(flavor = "multi_thread")]
async fn store_time_goes_on_under_the_next_leader_from_what_was_applied() {
    let cluster = Cluster::start(3).await;
    let old = cluster.leader().await;
    within(old.consensus.propose(Bytes::from_static(b"before"))).await.unwrap();
    let before = old.list.applied().store_time;
    old.consensus.transfer_leadership(None).await.unwrap();
    let new = cluster.leader().await;
    assert_ne!(new.consensus.node_id(), old.consensus.node_id());
    within(old.consensus.reigning().wait_for(|reigning| !reigning)).await.unwrap();
    assert_eq!(old.consensus.store_time(), None);
    let now = new.consensus.store_time().unwrap();
    assert!(now >= before, "{now:?} is before {before:?}");
    within(new.consensus.propose(Bytes::from_static(b"after"))).await.unwrap();
    assert!(new.list.applied().store_time >= now);
}

#[tokio::test(flavor = "multi_thread")]
async fn store_time_stands_still_while_nobody_leads() {
    let engine = Arc::new(MemoryStorageEngine::default());
    let mut listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let members = [v1::InitialMember {
        id: 1,
        address: listener.local_addr().unwrap().to_string(),
        learner: false,
        joining: false,
    }];
    let mut last = None;
    for _ in 0..3 {
        let started = Moment::now();
        let node = Node::start(1, &members, engine.clone(), listener).await;
        within(node.consensus.reigning().wait_for(|reigning| *reigning)).await.unwrap();
        let now = node.consensus.store_time().unwrap();
        if let Some(StoreTime(last)) = last {
            // All that may have passed since the last entry is this run.
            assert!(now.0 >= last && now.0 - last <= Moment::now().since(started), "{last:?} became {now:?}");
        }
        within(node.consensus.propose(Bytes::from_static(b"x"))).await.unwrap();
        last = Some(node.list.applied().store_time);
        node.stop().await;
        listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_without_a_quorum_stops_believing_in_itself() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.leader().await.consensus.node_id();
    let index = cluster.nodes.iter().position(|node| node.consensus.node_id() == leader).unwrap();
    let leader = cluster.nodes.swap_remove(index);
    let mut changes = leader.consensus.leader_changes();
    for follower in cluster.nodes.drain(..) {
        follower.stop().await;
    }
    within(changes.wait_for(Option::is_none)).await.unwrap();
    assert!(!leader.consensus.is_leader());
    let refused = within(leader.consensus.confirm_read()).await.unwrap_err();
    assert!(!matches!(refused, ReadIndexError::Overloaded { .. }), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_graceful_stop_hands_leadership_over_without_losing_a_write() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.leader().await.consensus.node_id();
    let index = cluster.nodes.iter().position(|node| node.consensus.node_id() == leader).unwrap();
    let leader = cluster.nodes.swap_remove(index);
    within(leader.consensus.propose(Bytes::from_static(b"kept"))).await.unwrap();
    within(leader.stop()).await;
    let new = cluster.leader().await;
    assert_eq!(new.list.commands(), ["kept"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_node_replays_its_log_and_keeps_its_identity() {
    let engine = Arc::new(MemoryStorageEngine::default());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let members = [v1::InitialMember { id: 1, address: address.to_string(), learner: false, joining: false }];
    let node = Node::start(1, &members, engine.clone(), listener).await;
    within(node.consensus.leader_changes().wait_for(Option::is_some)).await.unwrap();
    within(node.consensus.propose(Bytes::from_static(b"kept"))).await.unwrap();
    let (cluster, term) = (node.consensus.cluster_id(), node.consensus.leader().unwrap().term);
    node.stop().await;

    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let node = Node::start(1, &members, engine, listener).await;
    within(node.consensus.leader_changes().wait_for(Option::is_some)).await.unwrap();
    assert_eq!(node.consensus.cluster_id(), cluster);
    assert!(node.consensus.leader().unwrap().term > term, "every reign has a term of its own");
    assert_eq!(node.list.commands(), ["kept"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_nodes_directory_is_refused() {
    let engine = Arc::new(MemoryStorageEngine::default());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let members = [v1::InitialMember {
        id: 1,
        address: listener.local_addr().unwrap().to_string(),
        learner: false,
        joining: false,
    }];
    Node::start(1, &members, engine.clone(), listener).await.stop().await;
    let directory = tempfile::tempdir().unwrap();
    let config = ConsensusConfig {
        node_id: NodeId(2),
        initial_cluster: vec![],
        client_address: String::new(),
        application_address: String::new(),
        timings: TIMINGS,
        persistence: Persistence::DiskFirst,
        pending_bytes_max: 1 << 20,
        snapshot_directory: directory.path().to_owned(),
        snapshot_policy: SnapshotPolicy::OFF,
    };
    let engine: Arc<dyn StorageEngine> = engine;
    let refused = Consensus::start(config, engine, Arc::<List>::default(), Arc::default(), None).await.err().unwrap();
    assert!(matches!(refused, StartError::OtherNodesDirectory { expected: NodeId(2), found: NodeId(1) }), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn proposals_past_the_bound_are_refused_at_once() {
    let cluster = Cluster::start(1).await;
    let leader = cluster.leader().await;
    let refused = leader.consensus.propose(Bytes::from(vec![0; 1 << 20])).await.unwrap_err();
    assert_eq!(refused, ProposeError::Overloaded { pending_bytes_max: 1 << 20 });
    let refused = leader.consensus.propose(Bytes::from(vec![0; 2 << 20])).await.unwrap_err();
    assert_eq!(refused, ProposeError::TooLarge { bytes: 2 << 20 });
    leader.consensus.propose(Bytes::from(vec![0; 600 << 10])).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_initial_learner_becomes_a_member_and_follows() {
    let cluster = Cluster::start_with_learners(3, 1).await;
    let leader = cluster.leader().await;
    within(leader.consensus.propose(Bytes::from_static(b"kept"))).await.unwrap();
    let learner = &cluster.nodes[3];
    let follows = || {
        let membership = learner.consensus.membership();
        membership.get(NodeId(4)).is_some() && learner.list.commands() == ["kept"]
    };
    within(async {
        while !follows() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let voters: Vec<_> = learner.consensus.membership().voters().collect();
    assert_eq!(voters, [NodeId(1), NodeId(2), NodeId(3)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_without_its_log_is_refused() {
    // The log's directory was replaced: whatever the policy, it holds not even a vote.
    for persistence in [Persistence::DiskFirst, Persistence::MemFirst { entries: 1, interval: Duration::ZERO }] {
        let refused = start_ahead(&[], persistence).await.unwrap_err();
        assert!(matches!(refused, StartError::StateWithoutLog { .. }), "{refused}");
    }
    // Its end is missing, and nothing acknowledged may be.
    let refused = start_ahead(&used_log(&[(3, 15), (3, 16)]), Persistence::DiskFirst).await.unwrap_err();
    assert!(matches!(refused, StartError::StateWithoutLog { last: LogIndex(16), .. }), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_of_another_log_is_refused() {
    for persistence in [Persistence::DiskFirst, Persistence::MemFirst { entries: 1, interval: Duration::ZERO }] {
        let refused = start_ahead(&used_log(&[(2, 16), (2, 17), (4, 18)]), persistence).await.unwrap_err();
        assert!(matches!(refused, StartError::StateOfAnotherLog { applied: Term(3), found: Term(2), .. }), "{refused}");
    }
}

/// Starts a node whose state machine has applied entry 17 of term 3, over a log that holds what is given.
async fn start_ahead(log: &[StorageOperation], persistence: Persistence) -> Result<(), StartError> {
    let list = Arc::new(List::default());
    list.0.lock().0.position = Some(LogPosition { term: 3.into(), index: 17.into() });
    let directory = tempfile::tempdir().unwrap();
    let config = ConsensusConfig {
        node_id: NodeId(1),
        initial_cluster: vec![],
        client_address: String::new(),
        application_address: String::new(),
        timings: TIMINGS,
        persistence,
        pending_bytes_max: 1 << 20,
        snapshot_directory: directory.path().to_owned(),
        snapshot_policy: SnapshotPolicy::OFF,
    };
    let engine: Arc<dyn StorageEngine> = Arc::new(MemoryStorageEngine::default());
    engine.write(log, Durability::Fsync).unwrap();
    Consensus::start(config, engine, list, Arc::default(), None).await.map(|_| ())
}

fn used_log(entries: &[(u64, u64)]) -> Vec<StorageOperation> {
    let vote = Vote { term: Term(4), node_id: NodeId(2), committed: true };
    let append = |(term, index): &(u64, u64)| {
        let position = LogPosition { term: Term(*term), index: LogIndex(*index) };
        StorageOperation::Append(LogRecord { position, payload: Bytes::from_static(&[0]) })
    };
    [StorageOperation::SaveVote(vote)].into_iter().chain(entries.iter().map(append)).collect()
}
