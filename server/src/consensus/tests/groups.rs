//! Many proposals of one caller at once. The runtime has one thread, so that nothing leaves the queue before the test
//! waits for something.

use std::collections::VecDeque;

use super::*;

fn group(commands: &[(u64, &'static [u8])]) -> VecDeque<(Ticket, Bytes)> {
    commands
        .iter()
        .map(|(serial, command)| (Ticket { id: 100 + serial, serial: *serial }, Bytes::from_static(command)))
        .collect()
}

/// The next answers, by the serials of their proposals.
async fn answers(gathering: &Gathering, count: usize) -> Vec<(u64, Answer)> {
    let mut all = Vec::new();
    while all.len() < count {
        within(std::future::poll_fn(|context| gathering.poll_take(context, &mut all))).await;
    }
    all.into_iter()
        .map(|(ticket, answer)| {
            assert_eq!(ticket.id, 100 + ticket.serial);
            (ticket.serial, answer)
        })
        .collect()
}

#[tokio::test]
async fn a_group_is_applied_in_its_order_and_each_command_has_its_own_answer() {
    let cluster = Cluster::start(1).await;
    let leader = cluster.leader().await;
    let gathering = Gathering::default();
    leader.consensus.propose_all(group(&[(1, b"a"), (2, b"b")]), &gathering);
    leader.consensus.propose_all(group(&[(3, b"c")]), &gathering);
    let expected = [(1, Ok("1".into())), (2, Ok("2".into())), (3, Ok("3".into()))];
    assert_eq!(answers(&gathering, 3).await, expected);
    assert_eq!(leader.list.commands(), ["a", "b", "c"]);
    assert_eq!(leader.consensus.pending_bytes(), 0);
}

#[tokio::test]
async fn what_was_withdrawn_in_time_is_never_applied_and_what_is_late_is_not_withdrawn() {
    let cluster = Cluster::start(1).await;
    let leader = cluster.leader().await;
    let gathering = Gathering::default();
    leader.consensus.propose_all(group(&[(1, b"a"), (2, b"b"), (3, b"c")]), &gathering);
    assert!(gathering.withdraw(2));
    assert_eq!(answers(&gathering, 2).await, [(1, Ok("1".into())), (3, Ok("2".into()))]);
    assert_eq!(leader.list.commands(), ["a", "c"]);
    for serial in 1..=3 {
        assert!(!gathering.withdraw(serial), "{serial} has left the queue");
    }
}

#[tokio::test]
async fn nothing_is_proposed_for_a_caller_that_is_gone() {
    let cluster = Cluster::start(1).await;
    let leader = cluster.leader().await;
    let gathering = Gathering::default();
    leader.consensus.propose_all(group(&[(1, b"a"), (2, b"b")]), &gathering);
    drop(gathering);
    leader.consensus.propose(Bytes::from_static(b"c")).await.unwrap();
    assert_eq!(leader.list.commands(), ["c"]);
    assert_eq!(leader.consensus.pending_bytes(), 0);
}

#[tokio::test]
async fn what_finds_no_room_or_is_too_large_is_refused_and_the_rest_of_the_group_is_applied() {
    static LARGE: [u8; 500 << 10] = [0; 500 << 10];
    static TOO_LARGE: [u8; crate::limits::COMMAND_BYTES_MAX + 1] = [0; crate::limits::COMMAND_BYTES_MAX + 1];
    let cluster = Cluster::start(1).await;
    let leader = cluster.leader().await;
    let gathering = Gathering::default();
    let commands = group(&[(1, &TOO_LARGE), (2, &LARGE), (3, b"small"), (4, &LARGE), (5, &LARGE), (6, b"small")]);
    leader.consensus.propose_all(commands, &gathering);
    let mut answers = answers(&gathering, 6).await;
    answers.sort_by_key(|(serial, _)| *serial);
    let overloaded = Err(ProposeError::Overloaded { pending_bytes_max: 1 << 20 });
    let expected = [
        (1, Err(ProposeError::TooLarge { bytes: TOO_LARGE.len() })),
        (2, Ok("1".into())),
        (3, Ok("2".into())),
        (4, Ok("3".into())),
        (5, overloaded.clone()),
        (6, overloaded),
    ];
    assert_eq!(answers, expected);
    assert_eq!(leader.consensus.pending_bytes(), 0);
}

#[tokio::test]
async fn a_group_is_refused_by_a_node_that_does_not_lead() {
    let cluster = Cluster::start(3).await;
    let leader = cluster.leader().await.consensus.node_id();
    for node in cluster.nodes.iter().filter(|node| node.consensus.node_id() != leader) {
        let gathering = Gathering::default();
        node.consensus.propose_all(group(&[(1, b"a"), (2, b"b")]), &gathering);
        let refused = Err(ProposeError::NotLeader);
        assert_eq!(answers(&gathering, 2).await, [(1, refused.clone()), (2, refused)]);
    }
}

#[tokio::test]
async fn a_group_that_a_node_took_before_it_stopped_is_answered() {
    let cluster = Cluster::start(1).await;
    let leader = cluster.leader().await;
    let gathering = Gathering::default();
    leader.consensus.stop().await;
    leader.consensus.propose_all(group(&[(1, b"a"), (2, b"b")]), &gathering);
    for (serial, answer) in answers(&gathering, 2).await {
        assert!(answer.is_err(), "{serial}: {answer:?}");
    }
}
