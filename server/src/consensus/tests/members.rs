//! Changes of the membership: growing and shrinking, what is refused, who finds whom, and who may not campaign.

use d_engine_proto::v1::peer_client::PeerClient;

use super::*;

/// A node that is to join the cluster of `founder`, or that was in it before.
struct Guest {
    id: u32,
    engine: Arc<MemoryStorageEngine>,
}

impl Guest {
    fn new(id: u32) -> Self {
        Self { id, engine: Arc::default() }
    }

    /// Runs it where a port is free; it knows of `others`, and asks to join if it is told to.
    async fn start(&self, others: &[v1::InitialMember], joining: bool) -> Node {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let own = v1::InitialMember { id: self.id, address, learner: false, joining };
        let others = others.iter().filter(|other| other.id != self.id).cloned();
        let members: Vec<_> = others.chain([own]).collect();
        Node::start(self.id, &members, self.engine.clone(), listener).await
    }
}

/// One node that leads, and what others need to know to find it.
async fn founder() -> (Cluster, Vec<v1::InitialMember>) {
    let cluster = Cluster::start(1).await;
    let leader = cluster.leader().await;
    let address = leader.consensus.membership().get(NodeId(1)).unwrap().peer_address.clone();
    (cluster, vec![v1::InitialMember { id: 1, address, learner: false, joining: false }])
}

fn peer_address(node: &Node) -> String {
    node.address.clone()
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !holds() {
        assert!(tokio::time::Instant::now() < deadline, "{what}");
        tokio::task::yield_now().await;
    }
}

fn voters(node: &Node) -> Vec<u32> {
    node.consensus.membership().voters().map(NodeId::get).collect()
}

/// Asks whoever leads, until a node that leads has made the change.
async fn change(cluster: &Cluster, change: MemberChange) -> Result<(), ChangeError> {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let leader = cluster.leader().await;
        match leader.consensus.change_members(change.clone(), false).await {
            Err(ChangeError::NotLeader | ChangeError::InProgress | ChangeError::NotCaughtUp { .. })
                if tokio::time::Instant::now() < deadline => {}
            made => return made,
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_node_becomes_three_and_five_and_one_again_without_losing_a_write() {
    let (mut cluster, initial) = founder().await;
    let mut kept = Vec::new();
    for id in 2..=5 {
        let command = Bytes::from(format!("before {id}"));
        within(cluster.leader().await.consensus.propose(command.clone())).await.unwrap();
        kept.push(command);
        // Some ask, the others are added by hand; all are promoted.
        let joining = id % 2 == 0;
        let guest = Guest::new(id).start(&initial, joining).await;
        if !joining {
            let add = MemberChange::Add { peer_address: peer_address(&guest), promotable: true };
            change(&cluster, add.clone()).await.unwrap();
            change(&cluster, add).await.unwrap();
        }
        until("the guest votes", || voters(&guest).contains(&id)).await;
        cluster.nodes.push(guest);
    }
    assert_eq!(voters(cluster.leader().await), [1, 2, 3, 4, 5]);
    // The leader goes every time: it has to hand over first.
    for left in (1..=4).rev() {
        let leader = cluster.leader().await.consensus.node_id();
        change(&cluster, MemberChange::Remove(leader)).await.unwrap();
        let index = cluster.nodes.iter().position(|node| node.consensus.node_id() == leader).unwrap();
        let removed = cluster.nodes.swap_remove(index);
        let failure = within(removed.consensus.failure().wait_for(Option::is_some)).await.unwrap().clone().unwrap();
        assert!(matches!(failure, StartError::Refused(MembershipRefused::Removed { .. })), "{failure}");
        assert_eq!(voters(cluster.leader().await).len(), left);
        let command = Bytes::from(format!("with {left}"));
        within(cluster.leader().await.consensus.propose(command.clone())).await.unwrap();
        kept.push(command);
    }
    assert_eq!(cluster.leader().await.list.commands(), kept);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_would_harm_the_cluster_is_refused_and_says_why() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.leader().await.consensus.clone();
    let refused = leader.change_members(MemberChange::Remove(NodeId(7)), false).await.unwrap_err();
    assert_eq!(refused, ChangeError::NoMember { id: NodeId(7) });
    let nowhere = MemberChange::Add { peer_address: "127.0.0.1:1".into(), promotable: true };
    let refused = within(leader.change_members(nowhere, false)).await.unwrap_err();
    assert!(matches!(refused, ChangeError::Unreachable { .. }), "{refused}");
    let follower = cluster.nodes.iter().find(|node| node.consensus.node_id() != leader.node_id()).unwrap();
    let refused = follower.consensus.change_members(MemberChange::Remove(leader.node_id()), false).await.unwrap_err();
    assert_eq!(refused, ChangeError::NotLeader);
    let refused = follower.consensus.transfer_leadership(None).await.unwrap_err();
    assert_eq!(refused, TransferError::NotLeader);
    let refused = leader.transfer_leadership(Some(NodeId(7))).await.unwrap_err();
    assert_eq!(refused, TransferError::NoVoter { id: NodeId(7) });

    let (stranger, _) = founder().await;
    let foreign = MemberChange::Add { peer_address: peer_address(&stranger.nodes[0]), promotable: true };
    let refused = within(leader.change_members(foreign, false)).await.unwrap_err();
    assert_eq!(refused, ChangeError::IdTaken { id: NodeId(1) });

    // With one of three dead, the two that are left need each other.
    let dead = cluster.nodes.iter().position(|node| node.consensus.node_id() != leader.node_id()).unwrap();
    let dead = cluster.nodes.swap_remove(dead);
    let dead_id = dead.consensus.node_id();
    dead.stop().await;
    let live = cluster.nodes.iter().map(|node| node.consensus.node_id()).find(|id| *id != leader.node_id()).unwrap();
    let needed = ChangeError::QuorumAtRisk { voters: 2, live: 1, needed: 2 };
    // Nobody counts as silent before two election timeouts have passed.
    let _ = tokio::time::timeout(3 * TIMINGS.election_max, std::future::pending::<()>()).await;
    let refused = leader.transfer_leadership(Some(dead_id)).await.unwrap_err();
    assert_eq!(refused, TransferError::NotReady { id: dead_id, behind: None });
    let refused = within(leader.change_members(MemberChange::Remove(live), false)).await.unwrap_err();
    assert_eq!(refused, needed);
    let refused = within(leader.change_members(MemberChange::Demote(live), false)).await.unwrap_err();
    assert_eq!(refused, needed);
    assert_eq!(voters(cluster.leader().await).len(), 3, "nothing was changed");
    // The dead one may go, which makes the cluster safer.
    change(&cluster, MemberChange::Remove(dead_id)).await.unwrap();
    change(&cluster, MemberChange::Remove(live)).await.unwrap();
    let only = cluster.leader().await.consensus.node_id();
    let refused = change(&cluster, MemberChange::Remove(only)).await.unwrap_err();
    assert_eq!(refused, ChangeError::LastVoter { id: only });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_demoted_voter_stays_a_learner_and_can_be_promoted_again() {
    let cluster = Cluster::start(3).await;
    let leader = cluster.leader().await.consensus.node_id();
    change(&cluster, MemberChange::Demote(leader)).await.unwrap();
    let successor = cluster.leader().await;
    assert_ne!(successor.consensus.node_id(), leader);
    assert!(!voters(successor).contains(&leader.get()));
    assert!(successor.consensus.membership().get(leader).is_some_and(|member| !member.promotable));
    within(successor.consensus.propose(Bytes::from_static(b"x"))).await.unwrap();
    let learner = cluster.nodes.iter().find(|node| node.consensus.node_id() == leader).unwrap();
    until("the learner follows", || learner.list.commands() == ["x"]).await;
    change(&cluster, MemberChange::Promote(leader)).await.unwrap();
    assert_eq!(voters(cluster.leader().await), [1, 2, 3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_moved_is_found_and_the_membership_says_where_it_is() {
    let (mut cluster, initial) = founder().await;
    let guest = Guest::new(2);
    let node = guest.start(&initial, true).await;
    until("the guest votes", || voters(&node).contains(&2)).await;
    let before = peer_address(&node);
    node.stop().await;
    // Alone the other one is no quorum: it is the leader that has to be found, or has to find.
    let node = guest.start(&initial, true).await;
    let after = peer_address(&node);
    assert_ne!(before, after);
    cluster.nodes.push(node);
    for node in &cluster.nodes {
        let recorded = || node.consensus.membership().get(NodeId(2)).is_some_and(|member| member.peer_address == after);
        until("the membership says where it is", recorded).await;
    }
    within(cluster.leader().await.consensus.propose(Bytes::from_static(b"x"))).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn both_members_of_a_cluster_find_each_other_after_both_have_moved() {
    let (mut cluster, initial) = founder().await;
    let second = Guest::new(2);
    let node = second.start(&initial, true).await;
    until("the guest votes", || voters(&node).contains(&2)).await;
    node.stop().await;
    let first = Guest { id: 1, engine: cluster.engines[0].clone() };
    cluster.nodes.remove(0).stop().await;
    let one = first.start(&[], false).await;
    let known = v1::InitialMember { id: 1, address: peer_address(&one), learner: false, joining: false };
    let two = second.start(&[known], false).await;
    let places = [peer_address(&one), peer_address(&two)];
    cluster.nodes = vec![one, two];
    within(cluster.leader().await.consensus.propose(Bytes::from_static(b"x"))).await.unwrap();
    let node = &cluster.nodes[0];
    let recorded = || {
        let membership = node.consensus.membership();
        places
            .iter()
            .zip([1, 2])
            .all(|(place, id)| membership.get(NodeId(id)).is_some_and(|m| m.peer_address == *place))
    };
    until("the membership says where they are", recorded).await;
}

/// The log says that node 1 is the only voter, but means the directory that was lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_replays_the_log_of_a_lost_directory_does_not_campaign() {
    let (mut cluster, initial) = founder().await;
    within(cluster.nodes[0].consensus.propose(Bytes::from_static(b"x"))).await.unwrap();
    cluster.nodes.remove(0).stop().await;
    let engine = cluster.engines.remove(0);
    let identity = engine.state().unwrap().identity.unwrap();
    let stranger = crate::storage::Identity { incarnation: identity.incarnation.wrapping_add(1), ..identity };
    let write = |identity| {
        let operation = crate::storage::StorageOperation::SaveIdentity(identity);
        engine.write(&[operation], crate::storage::Durability::Fsync).unwrap();
    };
    write(stranger);
    let guest = Guest { id: 1, engine: engine.clone() };
    let node = guest.start(&initial, false).await;
    let term = node.consensus.progress().term;
    let mut leaders = node.consensus.leader_changes();
    let led = tokio::time::timeout(8 * TIMINGS.election_max, leaders.wait_for(Option::is_some)).await.is_ok();
    assert!(!led, "it elected itself");
    assert_eq!(node.consensus.progress().term, term, "it does not even try");
    node.stop().await;
    // The same log, in the directory it belongs to.
    write(identity);
    let node = guest.start(&initial, false).await;
    within(node.consensus.leader_changes().wait_for(Option::is_some)).await.unwrap();
}

/// Nobody is there to tell it that it lost its disk. All that keeps it from voting is what the messages say.
#[tokio::test(flavor = "multi_thread")]
async fn a_voter_that_lost_its_disk_neither_votes_nor_acknowledges_as_its_former_self() {
    let mut cluster = Cluster::start(3).await;
    within(cluster.leader().await.consensus.propose(Bytes::from_static(b"x"))).await.unwrap();
    let initial: Vec<_> = cluster
        .nodes
        .iter()
        .map(|node| {
            let (id, address) = (node.consensus.node_id().get(), peer_address(node));
            v1::InitialMember { id, address, learner: false, joining: false }
        })
        .collect();
    for node in cluster.nodes.drain(..) {
        node.stop().await;
    }
    let identity = |id: usize| cluster.engines[id - 1].state().unwrap().identity.unwrap();
    let (candidate, lost) = (identity(1), identity(3));
    let guest = Guest::new(3);
    let wiped = guest.start(&initial, false).await;
    let present = guest.engine.state().unwrap().identity.unwrap().incarnation;

    let mut peer = PeerClient::connect(format!("http://{}", wiped.address)).await.unwrap();
    let vote = Some(v1::Vote { term: 99, node_id: 1, committed: false });
    let request = |to_incarnation| {
        let route = Some(v1::Route {
            cluster_id: candidate.cluster_id.unwrap(),
            from: 1,
            from_incarnation: candidate.incarnation,
            to: 3,
            to_incarnation,
        });
        let last_log = Some(v1::LogId { term: 98, index: 1_000 });
        v1::VoteRequest { route, vote, last_log, leadership_transfer: false }
    };
    let former = request(lost.incarnation);
    for refused in [peer.pre_vote(former).await, peer.vote(former).await] {
        let refused = refused.unwrap_err();
        assert!(refused.message().contains("a data directory was lost"), "{refused}");
    }
    let leader = Some(v1::Vote { term: 99, node_id: 1, committed: true });
    let append = v1::AppendRequest { route: former.route, vote: leader, ..v1::AppendRequest::default() };
    let mut answers = peer.append(tokio_stream::iter([append])).await.unwrap().into_inner();
    let refused = answers.message().await.unwrap_err();
    assert!(refused.message().contains("a data directory was lost"), "{refused}");
    assert_eq!(wiped.consensus.progress().term, Term(0), "it has heard of no term");
    // It is this that makes the difference.
    assert!(peer.vote(request(present)).await.unwrap().into_inner().granted);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_serves_again_with_another_directory_once_the_member_was_removed() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.leader().await.consensus.node_id();
    let initial: Vec<_> = cluster
        .nodes
        .iter()
        .map(|node| {
            let (id, address) = (node.consensus.node_id().get(), peer_address(node));
            v1::InitialMember { id, address, learner: false, joining: false }
        })
        .collect();
    let index = cluster.nodes.iter().position(|node| node.consensus.node_id() != leader).unwrap();
    let lost = cluster.nodes.swap_remove(index);
    let id = lost.consensus.node_id();
    lost.stop().await;
    let guest = Guest::new(id.get());
    let wiped = guest.start(&initial, true).await;
    let failure = within(wiped.consensus.failure().wait_for(Option::is_some)).await.unwrap().clone().unwrap();
    assert!(matches!(failure, StartError::Refused(MembershipRefused::LostDirectory { .. })), "{failure}");
    let again = MemberChange::Add { peer_address: peer_address(&wiped), promotable: true };
    let refused = within(cluster.leader().await.consensus.change_members(again, false)).await.unwrap_err();
    assert_eq!(refused, ChangeError::IdTaken { id });
    wiped.stop().await;
    change(&cluster, MemberChange::Remove(id)).await.unwrap();
    let node = guest.start(&initial, true).await;
    until("it votes again", || voters(&node).contains(&id.get())).await;
    let leader = cluster.leader().await;
    let transferred = within(leader.consensus.transfer_leadership(Some(id))).await.unwrap();
    assert_eq!(transferred.leader_id, id.get());
    within(node.consensus.propose(Bytes::from_static(b"x"))).await.unwrap();
}
