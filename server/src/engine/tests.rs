//! Clusters of whole engines in one process: real consensus and stores, ports on loopback, the log in memory.

mod pipeline;

use std::sync::Arc;
use std::time::Duration;

use d_engine_proto::v1::{self, Consistency, Outcome, compact_request::Target};
use d_engine_proto::{ErrorCode, LeaseId, NodeId, Revision};
use futures_util::{StreamExt, stream};
use tokio::sync::oneshot;

use super::*;
use crate::config::RaftNodeConfig;
use crate::consensus::{ConsensusConfig, SnapshotPolicy};
use crate::services::{bind, serve};
use crate::state_machine::StoreTime;
use crate::storage::MemoryStorageEngine;

const PATIENCE: Duration = Duration::from_secs(60);
/// Time to live of what shall not end during a test.
const LONG_MS: u64 = 3_600_000;

struct Node {
    engine: Engine,
    kv: Arc<KvStateMachine>,
    _serving: oneshot::Sender<()>,
    _directory: tempfile::TempDir,
}

struct Cluster(Vec<Node>);

fn config() -> EngineConfig {
    EngineConfig {
        read_policy: ReadPolicy { default: Consistency::Linearizable, allow_client_override: true },
        watches_enabled: true,
        leases_enabled: true,
        history_retention: None,
        check_interval: None,
        data_directories: Vec::new(),
    }
}

impl Cluster {
    async fn start(nodes: usize) -> Self {
        Self::start_with(nodes, &config()).await
    }

    async fn start_with(nodes: usize, config: &EngineConfig) -> Self {
        let mut listeners = Vec::new();
        for _ in 0..nodes {
            listeners.push(bind("127.0.0.1:0").await.unwrap());
        }
        let address = |listener: &tokio::net::TcpListener| listener.local_addr().unwrap().to_string();
        let members: Vec<_> = listeners
            .iter()
            .zip(1..)
            .map(|(listener, id)| v1::InitialMember { id, address: address(listener), learner: false, joining: false })
            .collect();
        let mut started = Vec::new();
        for (listener, id) in listeners.into_iter().zip(1..) {
            let directory = tempfile::tempdir().unwrap();
            let kv = Arc::new(KvStateMachine::open(&directory.path().join("state")).unwrap());
            // A calm cluster: whoever else wants the processor must not depose its leader.
            let mut node_config = RaftNodeConfig::default();
            node_config.raft.read_consistency.lease_duration = Duration::from_secs(1);
            let consensus_config = ConsensusConfig {
                node_id: NodeId(id),
                initial_cluster: members.clone(),
                client_address: address(&listener),
                application_address: String::new(),
                timings: node_config.raft.timings(),
                persistence: node_config.raft.persistence.promise(),
                pending_bytes_max: node_config.raft.backpressure.max_pending_bytes,
                snapshot_directory: directory.path().join("snapshots"),
                snapshot_policy: SnapshotPolicy::OFF,
            };
            let metrics = Arc::new(Metrics::new());
            let storage = Arc::new(MemoryStorageEngine::default());
            let (consensus, peers) =
                Consensus::start(consensus_config, storage, kv.clone(), metrics.clone(), None).await.unwrap();
            let engine = Engine::new(consensus, kv.clone(), config.clone(), metrics.clone());
            let (serving, stopped) = oneshot::channel::<()>();
            let shutdown = async {
                let _ = stopped.await;
            };
            tokio::spawn(serve(listener, engine.clone(), peers, &node_config, None, metrics, shutdown));
            started.push(Node { engine, kv, _serving: serving, _directory: directory });
        }
        Self(started)
    }

    /// The leader, once it serves, and the others, once they know it.
    async fn roles(&self) -> (&Node, Vec<&Node>) {
        let leading = async {
            loop {
                let leads = |node: &&Node| node.engine.is_leader() && node.engine.consensus().store_time().is_some();
                match self.0.iter().find(leads) {
                    Some(leader) => return leader,
                    None => tokio::task::yield_now().await,
                }
            }
        };
        let leader = within(leading).await;
        let id = leader.engine.consensus().node_id();
        let followers: Vec<_> = self.0.iter().filter(|node| node.engine.consensus().node_id() != id).collect();
        for follower in &followers {
            let mut known = follower.engine.consensus().leader_changes();
            within(known.wait_for(Option::is_some)).await.unwrap();
        }
        (leader, followers)
    }
}

impl Node {
    fn now(&self) -> StoreTime {
        self.engine.consensus().store_time().unwrap()
    }

    async fn put(&self, key: &'static str) -> v1::PutResponse {
        self.engine.put(put(key), soon()).await.unwrap()
    }

    async fn grant(&self, ttl_ms: u64) -> LeaseId {
        let request = v1::LeaseGrantRequest { ttl_ms, ..Default::default() };
        LeaseId(self.engine.grant_lease(request, soon()).await.unwrap().lease)
    }

    /// Puts more keys than one entry may end, so that memory holds keys that are due for a while. Returns when the last
    /// one is due.
    async fn put_what_ends_together(&self) -> StoreTime {
        const TXNS: u32 = 40;
        const KEYS_PER_TXN: u32 = 100;
        let txn = |number: u32| {
            let put = |key: u32| {
                let key = format!("{number}/{key}").into();
                let put = v1::PutRequest { key, value: "v".into(), ttl_ms: 1000, ..Default::default() };
                v1::TxnOperation { operation: Some(v1::txn_operation::Operation::Put(put)) }
            };
            let then = (0..KEYS_PER_TXN).map(put).collect();
            self.engine.txn(v1::TxnRequest { then, ..Default::default() }, soon())
        };
        let written = futures_util::future::join_all((0..TXNS).map(txn)).await;
        written
            .into_iter()
            .flat_map(|answer| answer.unwrap().results)
            .filter_map(|result| match result.result {
                Some(v1::txn_result::Result::Put(put)) => Some(LeaseId(put.lease)),
                _ => None,
            })
            // What has ended already was due before.
            .filter_map(|lease| self.kv.current().lease(lease).map(|lease| lease.deadline))
            .max()
            .unwrap_or_default()
    }

    async fn get(&self, key: &'static str, consistency: Consistency) -> Option<v1::KeyValue> {
        let read = v1::ReadOptions { consistency: consistency.into(), ..Default::default() };
        self.engine.get(v1::GetRequest { key: key.into(), read: Some(read) }, soon()).await.unwrap().kv
    }

    async fn count(&self, consistency: Consistency) -> u64 {
        let read = v1::ReadOptions { consistency: consistency.into(), ..Default::default() };
        let range = Some(v1::KeyRange::default());
        let request = v1::RangeRequest { range, read: Some(read), count_only: true, ..Default::default() };
        self.engine.range(request, soon()).await.unwrap().count.unwrap()
    }
}

fn put(key: &'static str) -> v1::PutRequest {
    v1::PutRequest { key: key.into(), value: "v".into(), ..Default::default() }
}

fn soon() -> Deadline {
    Deadline::now() + PATIENCE
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("in time")
}

fn code<T>(result: Result<T, EngineError>) -> Option<ErrorCode> {
    ErrorCode::from_number(result.err()?.detail().code)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_with_a_time_to_live_ends_though_nobody_asks() {
    let cluster = Cluster::start(3).await;
    let (leader, followers) = cluster.roles().await;
    let written = leader.engine.put(v1::PutRequest { ttl_ms: 150, ..put("k") }, soon()).await.unwrap();
    assert_ne!(written.lease, 0);
    for node in followers.into_iter().chain([leader]) {
        within(node.kv.revisions().wait_for(|revision| *revision >= Revision(2))).await.unwrap();
        assert_eq!(node.get("k", Consistency::Eventual).await, None);
        assert_eq!(node.kv.current().lease_count(), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_due_is_never_read_by_a_read_that_promises_the_present() {
    let cluster = Cluster::start(3).await;
    let (leader, followers) = cluster.roles().await;
    let last_deadline = leader.put_what_ends_together().await;
    let watch_it_end = |node: &'static str, reader: Engine, consistency: Consistency| {
        let leader = leader.engine.clone();
        async move {
            loop {
                let before = leader.consensus().store_time().unwrap();
                let read = v1::ReadOptions { consistency: consistency.into(), ..Default::default() };
                let range = Some(v1::KeyRange::default());
                let request = v1::RangeRequest { range, read: Some(read), count_only: true, ..Default::default() };
                let count = reader.range(request, soon()).await.unwrap().count.unwrap();
                assert!(count == 0 || before < last_deadline, "{node} shows {count} keys that were due");
                if count == 0 {
                    return;
                }
            }
        }
    };
    let all = async {
        tokio::join!(
            watch_it_end("the leader", leader.engine.clone(), Consistency::Linearizable),
            watch_it_end("the leader's lease", leader.engine.clone(), Consistency::Lease),
            watch_it_end("a follower", followers[0].engine.clone(), Consistency::Linearizable),
        )
    };
    within(all).await;
    // A write is no sooner: what it meets is what a read would have shown.
    assert_eq!(leader.count(Consistency::Eventual).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_is_kept_alive_lasts_and_ends_when_that_stops() {
    let cluster = Cluster::start(1).await;
    let (leader, _) = cluster.roles().await;
    let lease = leader.grant(2000).await;
    leader.engine.put(v1::PutRequest { lease: lease.get(), ..put("k") }, soon()).await.unwrap();
    let first_deadline = leader.kv.current().lease(lease).unwrap().deadline;
    let requests = stream::repeat(v1::LeaseRenewRequest { lease: lease.get() });
    let mut answers = Box::pin(leader.engine.keep_leases(requests));
    while leader.now() <= first_deadline {
        let answer = within(answers.next()).await.unwrap().unwrap();
        assert_eq!((answer.lease, answer.ttl_ms), (lease.get(), 2000));
    }
    assert!(leader.get("k", Consistency::Linearizable).await.is_some());
    drop(answers);
    within(leader.kv.revisions().wait_for(|revision| *revision >= Revision(2))).await.unwrap();
    assert_eq!(leader.get("k", Consistency::Linearizable).await, None);
    let request = v1::LeaseRenewRequest { lease: lease.get() };
    assert_eq!(code(leader.engine.renew_lease(request, soon()).await), Some(ErrorCode::LeaseNotFound));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_keep_alives_are_answered_in_their_order() {
    let cluster = Cluster::start(1).await;
    let (leader, _) = cluster.roles().await;
    let lease = leader.grant(LONG_MS).await.get();
    let missing = lease + 1;
    let asked: Vec<u64> = (0..5000).map(|number| if number % 3 == 0 { missing } else { lease }).collect();
    let requests = stream::iter(asked.clone()).map(|lease| v1::LeaseRenewRequest { lease });
    let answers: Vec<_> = within(leader.engine.keep_leases(requests).collect()).await;
    let answered: Vec<_> =
        answers.into_iter().map(Result::unwrap).map(|answer| (answer.lease, answer.ttl_ms)).collect();
    let expected: Vec<_> = asked.into_iter().map(|id| (id, if id == lease { LONG_MS } else { 0 })).collect();
    assert_eq!(answered, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn time_to_live_and_list_show_what_was_granted() {
    let cluster = Cluster::start(3).await;
    let (leader, followers) = cluster.roles().await;
    let first = leader.grant(LONG_MS).await;
    let second = leader.grant(2 * LONG_MS).await;
    for key in ["b", "a"] {
        leader.engine.put(v1::PutRequest { lease: first.get(), ..put(key) }, soon()).await.unwrap();
    }
    leader.engine.put(v1::PutRequest { ttl_ms: LONG_MS, ..put("own") }, soon()).await.unwrap();
    for node in [leader, followers[0]] {
        let request = v1::LeaseTimeToLiveRequest { lease: first.get(), keys: true, read: None };
        let shown = node.engine.lease_time_to_live(request, soon()).await.unwrap();
        assert_eq!((shown.ttl_ms, shown.key_count), (LONG_MS, 2));
        assert_eq!(shown.keys, ["a", "b"]);
        assert!(shown.remaining_ms > 0 && shown.remaining_ms <= LONG_MS, "{}", shown.remaining_ms);
        let request = v1::LeaseListRequest { limit: 1, ..Default::default() };
        let page = node.engine.leases(request, soon()).await.unwrap();
        assert_eq!(page.leases.iter().map(|lease| lease.lease).collect::<Vec<_>>(), [first.get()]);
        assert!(page.more);
        let request = v1::LeaseListRequest { after: first.get(), ..Default::default() };
        let rest = node.engine.leases(request, soon()).await.unwrap();
        assert_eq!(rest.leases.iter().map(|lease| lease.lease).collect::<Vec<_>>(), [second.get()]);
        assert!(!rest.more, "leases of keys with a time to live are left out");
    }
    let past = v1::ReadOptions { revision: 1, ..Default::default() };
    let request = v1::LeaseListRequest { read: Some(past), ..Default::default() };
    assert_eq!(code(leader.engine.leases(request, soon()).await), Some(ErrorCode::InvalidArgument));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_refuses_what_only_a_leader_does_and_names_it() {
    let cluster = Cluster::start(3).await;
    let (leader, followers) = cluster.roles().await;
    let follower = &followers[0].engine;
    let grant = v1::LeaseGrantRequest { ttl_ms: LONG_MS, ..Default::default() };
    assert_eq!(code(follower.grant_lease(grant, soon()).await), Some(ErrorCode::NotLeader));
    let renew = v1::LeaseRenewRequest { lease: 1 };
    assert_eq!(code(follower.renew_lease(renew, soon()).await), Some(ErrorCode::NotLeader));
    let register = v1::SessionRegisterRequest::default();
    assert_eq!(code(follower.register_session(register, soon()).await), Some(ErrorCode::NotLeader));
    for target in [Target::Revision(1), Target::OlderThanMs(1)] {
        let compact = v1::CompactRequest { target: Some(target) };
        assert_eq!(code(follower.compact(compact, soon()).await), Some(ErrorCode::NotLeader));
    }
    let answers: Vec<_> = within(follower.keep_leases(stream::repeat(renew)).collect()).await;
    assert_eq!(answers.len(), 1, "the error ends the stream");
    let refused = answers.into_iter().next().unwrap().unwrap_err().detail();
    assert_eq!(ErrorCode::from_number(refused.code), Some(ErrorCode::NotLeader));
    assert_eq!(refused.leader.unwrap().node_id, leader.engine.consensus().node_id().get());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_change_ends_keep_alives_and_the_successor_ends_leases() {
    let cluster = Cluster::start(3).await;
    let (old, _) = cluster.roles().await;
    let kept = old.grant(LONG_MS).await;
    old.engine.put(v1::PutRequest { ttl_ms: 500, ..put("k") }, soon()).await.unwrap();
    let requests = stream::iter([v1::LeaseRenewRequest { lease: kept.get() }]).chain(stream::pending());
    let mut answers = Box::pin(old.engine.keep_leases(requests));
    assert_eq!(within(answers.next()).await.unwrap().unwrap().ttl_ms, LONG_MS);

    old.engine.consensus().transfer_leadership(None).await.unwrap();
    assert_eq!(code(within(answers.next()).await.unwrap()), Some(ErrorCode::NotLeader));
    assert!(within(answers.next()).await.is_none());

    let (new, _) = cluster.roles().await;
    assert_ne!(new.engine.consensus().node_id(), old.engine.consensus().node_id());
    within(new.kv.revisions().wait_for(|revision| *revision >= Revision(2))).await.unwrap();
    assert_eq!(new.get("k", Consistency::Linearizable).await, None);
    assert!(new.kv.current().lease(kept).is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_under_a_session_is_applied_once() {
    let cluster = Cluster::start(1).await;
    let (leader, _) = cluster.roles().await;
    let registered = leader.engine.register_session(v1::SessionRegisterRequest::default(), soon()).await.unwrap();
    assert_eq!(registered.ttl_ms, d_engine_proto::defaults::SESSION_TTL_MS);
    let call = |sequence, acknowledged_through| {
        Some(v1::SessionCall { session: registered.session, sequence, acknowledged_through })
    };
    let first = v1::PutRequest { session: call(1, 0), ..put("k") };
    let answer = leader.engine.put(first.clone(), soon()).await.unwrap();
    assert_eq!(leader.engine.put(first.clone(), soon()).await.unwrap().header, answer.header);
    assert_eq!(leader.get("k", Consistency::Linearizable).await.unwrap().version, 1);

    let other = v1::PutRequest { value: "other".into(), ..first.clone() };
    assert_eq!(code(leader.engine.put(other, soon()).await), Some(ErrorCode::InvalidArgument));
    let second = v1::PutRequest { session: call(2, 1), ..put("k") };
    leader.engine.put(second, soon()).await.unwrap();
    let refused = leader.engine.put(first, soon()).await.unwrap_err().detail();
    assert_eq!(ErrorCode::from_number(refused.code), Some(ErrorCode::AlreadyAcknowledged));
    assert_eq!(refused.outcome(), Outcome::Unknown);

    let session = registered.session;
    leader.engine.close_session(v1::SessionCloseRequest { session }, soon()).await.unwrap();
    let late = v1::PutRequest { session: call(3, 0), ..put("k") };
    let refused = leader.engine.put(late, soon()).await.unwrap_err().detail();
    assert_eq!(ErrorCode::from_number(refused.code), Some(ErrorCode::SessionExpired));
    assert_eq!(refused.outcome(), Outcome::NotApplied);
    let renew = v1::SessionRenewRequest { session };
    assert_eq!(code(leader.engine.renew_session(renew, soon()).await), Some(ErrorCode::SessionExpired));
    assert_eq!(leader.get("k", Consistency::Linearizable).await.unwrap().version, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_older_than_an_age_is_compacted_and_the_rest_stays() {
    let cluster = Cluster::start(1).await;
    let (leader, _) = cluster.roles().await;
    for key in ["a", "b", "c"] {
        leader.put(key).await;
    }
    let compact = |target| leader.engine.compact(v1::CompactRequest { target }, soon());
    assert_eq!(code(compact(None).await), Some(ErrorCode::InvalidArgument));
    let kept = compact(Some(Target::OlderThanMs(LONG_MS))).await.unwrap();
    assert_eq!(kept.compacted_revision, leader.kv.current().compacted().get(), "nothing is that old");
    within(async { while compact(Some(Target::OlderThanMs(1))).await.unwrap().compacted_revision < 3 {} }).await;

    let read = v1::ReadOptions { revision: 2, ..Default::default() };
    let get = v1::GetRequest { key: "a".into(), read: Some(read) };
    let refused = leader.engine.get(get, soon()).await.unwrap_err().detail();
    assert_eq!((ErrorCode::from_number(refused.code), refused.revision), (Some(ErrorCode::Compacted), 3));
    assert!(leader.get("a", Consistency::Linearizable).await.is_some());
    let future = compact(Some(Target::Revision(9))).await.unwrap_err().detail();
    assert_eq!((ErrorCode::from_number(future.code), future.revision), (Some(ErrorCode::FutureRevision), 3));
}

#[tokio::test(flavor = "multi_thread")]
async fn history_is_compacted_by_itself_on_every_node() {
    let config = EngineConfig { history_retention: Some(Duration::from_secs(1)), ..config() };
    let cluster = Cluster::start_with(3, &config).await;
    let (leader, _) = cluster.roles().await;
    for key in ["a", "b", "c"] {
        leader.put(key).await;
    }
    for node in &cluster.0 {
        within(async {
            while node.kv.current().compacted() < Revision(3) {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_leases_makes_none_and_says_why() {
    let config = EngineConfig { leases_enabled: false, ..config() };
    let cluster = Cluster::start_with(1, &config).await;
    let (leader, _) = cluster.roles().await;
    let leased = v1::PutRequest { ttl_ms: LONG_MS, ..put("k") };
    let operation = |operation| v1::TxnOperation { operation: Some(operation) };
    let inner = v1::TxnRequest {
        otherwise: vec![operation(v1::txn_operation::Operation::Put(leased.clone()))],
        ..Default::default()
    };
    let outer =
        v1::TxnRequest { then: vec![operation(v1::txn_operation::Operation::Txn(inner))], ..Default::default() };
    let grant = v1::LeaseGrantRequest { ttl_ms: LONG_MS, ..Default::default() };
    let refused = leader.engine.grant_lease(grant, soon()).await.unwrap_err();
    assert!(refused.to_string().contains("raft.state_machine.lease.enabled"), "{refused}");
    assert_eq!(ErrorCode::from_number(refused.detail().code), Some(ErrorCode::FailedPrecondition));
    assert_eq!(code(leader.engine.put(leased, soon()).await), Some(ErrorCode::FailedPrecondition));
    assert_eq!(code(leader.engine.txn(outer, soon()).await), Some(ErrorCode::FailedPrecondition));
    leader.put("k").await;
}
