//! Snapshots between nodes in one process, with a state machine of files.

use super::*;

impl Cluster {
    async fn settled(&self, commands: usize) {
        within(async {
            while self.nodes.iter().any(|node| node.list.commands().len() < commands) {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
}

async fn propose(node: &Node, commands: std::ops::Range<u32>) {
    for number in commands {
        within(node.consensus.propose(Bytes::from(number.to_string()))).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_is_of_what_is_applied_and_is_found_again_while_nothing_changes() {
    let cluster = Cluster::start(1).await;
    let leader = cluster.leader().await;
    propose(leader, 0..5).await;
    let applied = leader.list.applied().position.unwrap().index;
    assert_eq!(within(leader.consensus.trigger_snapshot()).await.unwrap(), applied);
    assert_eq!(within(leader.consensus.trigger_snapshot()).await.unwrap(), applied);
    propose(leader, 5..6).await;
    assert!(within(leader.consensus.trigger_snapshot()).await.unwrap() > applied);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_is_kept_as_far_as_the_state_machine_is_not_durable_whatever_the_snapshot_holds() {
    let cluster = Cluster::start(1).await;
    let leader = cluster.leader().await;
    let purged = || cluster.engines[0].state().unwrap().purged;
    let purged_to = async |position| {
        within(async {
            while purged() < position {
                tokio::task::yield_now().await;
            }
        })
        .await;
        assert_eq!(purged(), position);
    };
    propose(leader, 0..10).await;
    // Its disk refuses from here on.
    let durable = leader.list.applied().position;
    *leader.list.1.lock() = durable;
    propose(leader, 10..20).await;
    assert!(Some(within(leader.consensus.trigger_snapshot()).await.unwrap()) > durable.map(|durable| durable.index));
    purged_to(durable).await;
    // And now no more.
    *leader.list.1.lock() = None;
    propose(leader, 20..30).await;
    within(leader.consensus.trigger_snapshot()).await.unwrap();
    purged_to(leader.list.applied().position).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_whose_entries_were_purged_gets_the_snapshot_and_goes_on_with_the_log() {
    let mut listeners = Vec::new();
    for _ in 0..3 {
        listeners.push(tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap());
    }
    let addresses: Vec<_> = listeners.iter().map(|listener| listener.local_addr().unwrap()).collect();
    let member = |(address, id): (&std::net::SocketAddr, u32)| v1::InitialMember {
        id,
        address: address.to_string(),
        learner: false,
        joining: false,
    };
    let members: Vec<_> = addresses.iter().zip(1..).map(member).collect();
    let engines: Vec<_> = (0..3).map(|_| Arc::new(MemoryStorageEngine::default())).collect();
    let mut cluster = Cluster { nodes: Vec::new(), engines: engines.clone() };
    for (listener, id) in listeners.into_iter().zip(1..) {
        cluster.nodes.push(Node::start(id, &members, engines[id as usize - 1].clone(), listener).await);
    }
    propose(cluster.leader().await, 0..10).await;
    cluster.settled(10).await;

    let leader = cluster.leader().await.consensus.node_id();
    let away = cluster.nodes.iter().position(|node| node.consensus.node_id() != leader).unwrap();
    cluster.nodes.remove(away).stop().await;
    propose(cluster.leader().await, 10..20).await;
    for node in &cluster.nodes {
        within(node.consensus.trigger_snapshot()).await.unwrap();
    }
    let purged = || engines.iter().filter(|engine| engine.state().unwrap().purged.is_some()).count();
    within(async {
        while purged() < 2 {
            tokio::task::yield_now().await;
        }
    })
    .await;

    let listener = tokio::net::TcpListener::bind(addresses[away]).await.unwrap();
    // Its list is gone, its log is not: it catches up with what it has, and then with what it gets.
    let id = u32::try_from(away + 1).unwrap();
    cluster.nodes.push(Node::start(id, &members, engines[away].clone(), listener).await);
    propose(cluster.leader().await, 20..30).await;
    cluster.settled(30).await;
    let expected: Vec<_> = (0..30).map(|number: u32| Bytes::from(number.to_string())).collect();
    assert_eq!(cluster.nodes[2].list.commands(), expected);
    assert_eq!(cluster.nodes[2].consensus.membership(), cluster.nodes[0].consensus.membership());
    assert!(engines[away].state().unwrap().purged.is_some(), "it was the snapshot that brought it there");
}
