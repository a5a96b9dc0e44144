//! Disks that stand still for a while.

use parking_lot::{Condvar, MutexGuard};

use super::*;
use crate::storage::StorageState;

/// Storage in memory whose writes stand still while they are told to.
#[derive(Default)]
struct Stalling {
    memory: MemoryStorageEngine,
    gate: Mutex<Gate>,
    moved: Condvar,
}

#[derive(Default)]
struct Gate {
    is_closed: bool,
    /// A write waits.
    is_stuck: bool,
}

impl Stalling {
    fn change(&self, change: impl FnOnce(&mut MutexGuard<'_, Gate>)) {
        change(&mut self.gate.lock());
        self.moved.notify_all();
    }
}

impl StorageEngine for Stalling {
    fn state(&self) -> Result<StorageState, StorageError> {
        self.memory.state()
    }

    fn read(&self, start: LogIndex, end: LogIndex, bytes_max: usize) -> Result<Vec<LogRecord>, StorageError> {
        self.memory.read(start, end, bytes_max)
    }

    fn sync(&self) -> Result<(), StorageError> {
        self.memory.sync()
    }

    fn write(&self, operations: &[StorageOperation], durability: Durability) -> Result<(), StorageError> {
        let mut gate = self.gate.lock();
        while gate.is_closed {
            gate.is_stuck = true;
            self.moved.wait(&mut gate);
        }
        gate.is_stuck = false;
        drop(gate);
        self.memory.write(operations, durability)
    }
}

/// Long ones: while the disks stand still nobody can be elected, so a busy machine must not cost the leader its office.
const PATIENT: Timings = Timings {
    lease: Duration::from_secs(4),
    election_min: Duration::from_secs(4),
    election_max: Duration::from_secs(6),
    heartbeat: Duration::from_secs(1),
};

/// Opens the gates also when the test fails: the nodes' writers are to end.
struct Opened<'a>(&'a [Arc<Stalling>]);

impl Drop for Opened<'_> {
    fn drop(&mut self) {
        for disk in self.0 {
            disk.change(|gate| gate.is_closed = false);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_goes_on_leading_and_confirms_reads_while_the_disks_of_all_others_stand_still() {
    let mut listeners = Vec::new();
    for _ in 0..3 {
        listeners.push(tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap());
    }
    let member = |(listener, id): (&tokio::net::TcpListener, u32)| {
        let address = listener.local_addr().unwrap().to_string();
        v1::InitialMember { id, address, learner: false, joining: false }
    };
    let members: Vec<_> = listeners.iter().zip(1..).map(member).collect();
    let disks: Vec<Arc<Stalling>> = members.iter().map(|_| Arc::default()).collect();
    let mut nodes = Vec::new();
    for ((listener, id), disk) in listeners.into_iter().zip(1..).zip(&disks) {
        nodes.push(Node::start_with(PATIENT, id, &members, disk.clone(), listener).await);
    }
    let cluster = Cluster { nodes, engines: vec![] };
    let leader = cluster.leader().await;
    within(leader.consensus.propose(Bytes::from_static(b"before"))).await.unwrap();
    let reign = leader.consensus.leader().unwrap();
    let others: Vec<_> = disks.iter().zip(1..).filter(|(_, id)| *id != reign.leader_id).map(|(disk, _)| disk).collect();

    let opened = Opened(&disks);
    for disk in &others {
        disk.change(|gate| gate.is_closed = true);
    }
    let consensus = leader.consensus.clone();
    let write = tokio::spawn(async move { consensus.propose(Bytes::from_static(b"stuck")).await });
    within(async {
        while !others.iter().all(|disk| disk.gate.lock().is_stuck) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    // Each takes a round of heartbeats that began after it.
    for _ in 0..20 {
        within(leader.consensus.confirm_read()).await.unwrap();
        assert_eq!(leader.consensus.leader(), Some(reign));
    }
    assert_eq!(leader.list.commands(), ["before"], "what no quorum has on its disk is not committed");
    drop(opened);
    within(write).await.unwrap().unwrap();
    assert_eq!(leader.consensus.leader(), Some(reign));
}
