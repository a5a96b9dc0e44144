//! The client against nodes that redirect, lie, fall silent, break off or belong to somebody else.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use d_engine_client::{Client, Consistency, ErrorKind, KeyRange, NodeId, Outcome};
use d_engine_proto::{ErrorCode, v1};
use futures_util::future::join_all;
use support::{
    Behaviour, FakeNode, PATIENCE, builder, client, cluster, elect, eventually, introduce, not_leader, refusal,
};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

#[tokio::test]
async fn one_seed_is_enough_to_find_leader_and_members() {
    let nodes = cluster(3);
    elect(&nodes, 1, 4);
    let client = client(&[&nodes[2]], PATIENCE);
    let answer = client.put("k", "v").await.unwrap();
    assert_eq!(answer.header.node_id, NodeId(2));
    assert_eq!(client.leader().unwrap().id, NodeId(2));
    let members = client.members().await.unwrap();
    assert_eq!(members.members.iter().map(|member| member.id.get()).collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(client.get("k").await.unwrap().into_value().unwrap(), "v");
    assert_eq!(nodes[0].puts() + nodes[2].puts(), 0, "a write goes to the leader only");
}

#[tokio::test]
async fn a_write_follows_a_redirect_to_a_newer_leader() {
    let nodes = cluster(3);
    let client = client(&[&nodes[0]], PATIENCE);
    client.put("k", "1").await.unwrap();
    elect(&nodes, 2, 2);
    let answer = client.put("k", "2").await.unwrap();
    assert_eq!(answer.header.node_id, NodeId(3));
    assert_eq!((nodes[0].puts(), nodes[2].puts()), (2, 1));
    let stats = client.stats();
    assert_eq!((stats.calls, stats.failures, stats.leader_changes), (2, 0, 1));
    assert_eq!((stats.retries, stats.redirects), (1, 1));
}

#[tokio::test]
async fn a_stale_hint_does_not_lead_back_to_a_deposed_leader() {
    let nodes = cluster(3);
    elect(&nodes, 1, 7);
    let client = client(&[&nodes[1]], PATIENCE);
    client.put("k", "1").await.unwrap();
    // The leader steps down, and everybody still believes in the leader of an older term.
    let stale = nodes[0].hint(3);
    for node in &nodes {
        node.behave(Behaviour::Refuse(not_leader(Some(stale.clone()))));
        node.script.lock().leader = Some(stale.clone());
    }
    let pending = tokio::spawn({
        let client = client.clone();
        async move { client.put("k", "2").await }
    });
    eventually("members are asked again", || client.stats().refreshes > 3).await;
    assert_eq!(nodes[0].puts(), 0, "the hint to the leader of term 3 was followed");
    elect(&nodes, 2, 8);
    assert_eq!(pending.await.unwrap().unwrap().header.node_id, NodeId(3));
    assert_eq!(nodes[0].puts(), 0);
}

#[tokio::test]
async fn a_write_survives_the_death_of_the_leader_it_was_not_sent_to() {
    let mut nodes = cluster(3);
    let client = client(&[&nodes[1], &nodes[0]], PATIENCE);
    client.put("k", "1").await.unwrap();
    kill(nodes.remove(0), &client).await;
    let pending = tokio::spawn({
        let client = client.clone();
        async move { client.put("k", "2").await }
    });
    eventually("the dead leader was noticed", || client.stats().refreshes > 2).await;
    elect(&nodes, 1, 2);
    assert_eq!(pending.await.unwrap().unwrap().header.node_id, NodeId(3));
}

/// A cluster of one grows behind the back of its clients, and then its first node is lost.
#[tokio::test]
async fn a_client_that_knows_one_node_soon_learns_of_those_that_join_it() {
    let mut nodes = cluster(1);
    let client = client(&[&nodes[0]], PATIENCE);
    client.put("k", "1").await.unwrap();
    nodes.push(FakeNode::start(2));
    introduce(&nodes);
    let read_from_the_other = async {
        while nodes[1].gets() == 0 {
            client.get("k").consistency(Consistency::Eventual).await.unwrap();
        }
    };
    tokio::time::timeout(PATIENCE, read_from_the_other).await.expect("the other one is known by now");
    kill(nodes.remove(0), &client).await;
    elect(&nodes, 0, 2);
    assert_eq!(client.put("k", "2").await.unwrap().header.node_id, NodeId(2));
}

#[tokio::test]
async fn a_leader_that_comes_back_at_its_address_is_found_again() {
    let mut nodes = cluster(1);
    let client = client(&[&nodes[0]], PATIENCE);
    client.put("k", "1").await.unwrap();
    let address = nodes[0].address.clone();
    kill(nodes.remove(0), &client).await;
    let pending = tokio::spawn({
        let client = client.clone();
        async move { client.put("k", "2").await }
    });
    eventually("the dead node was noticed", || client.stats().refreshes > 3).await;
    let nodes = [FakeNode::start_at(1, &address)];
    introduce(&nodes);
    elect(&nodes, 0, 2);
    assert_eq!(pending.await.unwrap().unwrap().header.node_id, NodeId(1));
}

/// By the member list alone: in the same term nobody names the leader anew.
#[tokio::test]
async fn a_leader_that_moves_to_another_address_is_found_there() {
    for term in [1, 2] {
        let mut nodes = cluster(3);
        let client = client(&[&nodes[1]], PATIENCE);
        client.put("k", "1").await.unwrap();
        let (store, before) = (nodes[0].store(), nodes[0].address.clone());
        kill(nodes.remove(0), &client).await;
        let moved = FakeNode::start(1);
        moved.script.lock().store = store;
        nodes.insert(0, moved);
        introduce(&nodes);
        elect(&nodes, 0, term);
        assert_ne!(nodes[0].address, before);
        assert_eq!(client.put("k", "2").await.unwrap().header.node_id, NodeId(1), "term {term}");
        assert_eq!(nodes[0].puts(), 1);
    }
}

#[tokio::test]
async fn without_a_session_a_silent_leader_leaves_a_write_unknown_at_its_deadline_and_is_asked_once() {
    let nodes = cluster(3);
    nodes[0].behave(Behaviour::Silent);
    let client = builder(&[&nodes[0]], PATIENCE).sessions(false).build().unwrap();
    let write = client.put("k", "v").timeout(Duration::from_millis(700));
    let error = tokio::time::timeout(PATIENCE, write.into_future()).await.unwrap().unwrap_err();
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::DeadlineExceeded, Outcome::Unknown), "{error}");
    assert_eq!(nodes.iter().map(FakeNode::puts).sum::<u32>(), 1);
    assert_eq!(client.stats().unknown_outcomes, 1);
}

#[tokio::test]
async fn a_read_moves_on_from_a_silent_leader() {
    let nodes = cluster(3);
    nodes[0].behave(Behaviour::Silent);
    for node in &nodes[1..] {
        node.behave(Behaviour::Serve);
    }
    let client = client(&[&nodes[0]], Duration::from_secs(4));
    leader_known(&client).await;
    let answer = client.get("k").consistency(Consistency::Linearizable).await.unwrap();
    assert_ne!(answer.header.node_id, NodeId(1));
    assert_eq!(nodes[0].gets(), 1);
    assert_eq!(client.stats().retries, 1);
}

#[tokio::test]
async fn a_port_that_accepts_and_never_answers_costs_no_more_than_the_deadline() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = Client::builder()
        .endpoints([listener.local_addr().unwrap().to_string()])
        .call_timeout(Duration::from_millis(300))
        .build()
        .unwrap();
    let both = async { (client.put("k", "v").await.unwrap_err(), client.get("k").await.unwrap_err()) };
    let (write, read) = tokio::time::timeout(PATIENCE, both).await.unwrap();
    assert_eq!(write.kind(), ErrorKind::Unavailable, "no leader became known: {write}");
    assert_eq!(write.outcome(), Outcome::NotApplied, "so nothing was sent: {write}");
    assert_eq!((read.kind(), read.outcome()), (ErrorKind::DeadlineExceeded, Outcome::NotApplied), "{read}");
}

/// A way to a node whose connections can be made to swallow everything, in both directions, without a word.
struct Muffler {
    address: String,
    connections: Arc<AtomicUsize>,
    muffled: watch::Sender<usize>,
}

impl Muffler {
    async fn before(node: &FakeNode) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (connections, muffled) = (Arc::new(AtomicUsize::new(0)), watch::Sender::new(0));
        let (target, accepted, muffle) = (node.address.clone(), Arc::clone(&connections), muffled.subscribe());
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let number = accepted.fetch_add(1, Ordering::Relaxed);
                let Ok(mut server) = TcpStream::connect(&target).await else { continue };
                let mut muffle = muffle.clone();
                tokio::spawn(async move {
                    let muffled = async { muffle.wait_for(|below| number < *below).await.is_ok() };
                    let is_muffled = tokio::select! {
                        _ = copy_bidirectional(&mut client, &mut server) => false,
                        is_muffled = muffled => is_muffled,
                    };
                    if is_muffled {
                        std::future::pending::<()>().await;
                    }
                });
            }
        });
        Self { address, connections, muffled }
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// Muffles what there is; later connections are well.
    fn muffle(&self) {
        self.muffled.send_replace(self.connections());
    }
}

/// A node behind a muffler, and a client that has its session with it.
async fn muffled_node(timeout: Duration) -> (Vec<FakeNode>, Muffler, Client) {
    let mut nodes = vec![FakeNode::start(1)];
    let muffler = Muffler::before(&nodes[0]).await;
    nodes[0].address.clone_from(&muffler.address);
    introduce(&nodes);
    elect(&nodes, 0, 1);
    let client = client(&[&nodes[0]], timeout);
    client.put("warm", "").await.unwrap();
    assert_eq!(muffler.connections(), 1);
    (nodes, muffler, client)
}

#[tokio::test]
async fn a_connection_on_which_nothing_is_heard_is_replaced_by_one_for_all_calls() {
    // Shorter than what the keep-alive takes to notice.
    let (nodes, muffler, client) = muffled_node(Duration::from_secs(4)).await;
    muffler.muffle();
    let answers = join_all((0..100).map(|number| client.put(format!("k{number}"), "v").into_future())).await;
    assert!(answers.iter().all(Result::is_ok), "{answers:?}");
    assert_eq!(muffler.connections(), 2, "one in its place, for all");
    let store = nodes[0].store();
    assert!((0..100).all(|number| store.lock().version(&format!("k{number}")) == 1));
}

#[tokio::test]
async fn a_node_that_is_slow_to_answer_keeps_its_connection() {
    let (nodes, muffler, client) = muffled_node(Duration::from_secs(8)).await;
    nodes[0].behave(Behaviour::Silent);
    let slow = tokio::spawn(client.put("k", "v").into_future());
    eventually("the put is repeated", || client.stats().retries > 0).await;
    nodes[0].behave(Behaviour::Serve);
    slow.await.unwrap().unwrap();
    assert_eq!(muffler.connections(), 1, "the client asked for news over it, and was answered");
}

#[tokio::test]
async fn nobody_listening_is_not_applied_and_says_why() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    drop(listener);
    let client = Client::builder().endpoints([&address]).call_timeout(Duration::from_millis(300)).build().unwrap();
    let error = client.put("k", "v").await.unwrap_err();
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::Unavailable, Outcome::NotApplied));
    assert!(error.to_string().contains("refused"), "{error}");
    assert!(error.to_string().contains(&address), "{error}");
}

#[tokio::test]
async fn a_connection_lost_after_sending_leaves_a_write_unknown() {
    let mut nodes = cluster(1);
    let client = client(&[&nodes[0]], Duration::from_secs(2));
    client.put("k", "1").await.unwrap();
    nodes[0].behave(Behaviour::Silent);
    let pending = tokio::spawn({
        let client = client.clone();
        async move { client.put("k", "2").await }
    });
    eventually("the write has arrived", || nodes[0].puts() == 2).await;
    drop(nodes.remove(0));
    let error = tokio::time::timeout(PATIENCE, pending).await.unwrap().unwrap().unwrap_err();
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::Unavailable, Outcome::Unknown), "{error}");
}

#[tokio::test]
async fn without_a_session_a_status_without_details_is_unknown_to_a_write_and_repeated_by_a_read() {
    let nodes = cluster(2);
    nodes[0].behave(Behaviour::Garble);
    nodes[1].behave(Behaviour::Serve);
    let client = builder(&[&nodes[0]], PATIENCE).sessions(false).build().unwrap();
    let error = client.put("k", "v").await.unwrap_err();
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::Unavailable, Outcome::Unknown), "{error}");
    assert_eq!((nodes[0].puts(), nodes[1].puts()), (1, 0));
    let answer = client.get("k").consistency(Consistency::Linearizable).await.unwrap();
    assert_eq!(answer.header.node_id, NodeId(2));
}

#[tokio::test]
async fn an_error_of_the_server_keeps_its_code_and_outcome() {
    let nodes = cluster(1);
    let client = builder(&[&nodes[0]], PATIENCE).sessions(false).build().unwrap();
    for (code, outcome, kind, expected) in [
        (ErrorCode::LeadershipLost, v1::Outcome::Unknown, ErrorKind::LeadershipLost, Outcome::Unknown),
        (ErrorCode::InvalidArgument, v1::Outcome::NotApplied, ErrorKind::InvalidArgument, Outcome::NotApplied),
        (ErrorCode::Internal, v1::Outcome::Applied, ErrorKind::Internal, Outcome::Applied),
    ] {
        elect(&nodes, 0, 1);
        nodes[0].behave(Behaviour::Refuse(refusal(code, outcome, false)));
        leader_known(&client).await;
        let before = nodes[0].puts();
        let error = client.put("k", "v").await.unwrap_err();
        assert_eq!((error.kind(), error.outcome()), (kind, expected), "{error}");
        assert_eq!(nodes[0].puts(), before + 1);
    }
    let error = client.delete("k").await.unwrap_err();
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::Unsupported, Outcome::NotApplied), "{error}");
}

#[tokio::test]
async fn a_refusal_that_lasts_until_the_deadline_keeps_its_reason() {
    let nodes = cluster(2);
    let mut behind = refusal(ErrorCode::Behind, v1::Outcome::NotApplied, true);
    behind.detail.revision = 7;
    for node in &nodes {
        node.behave(Behaviour::Refuse(behind.clone()));
    }
    let client = client(&[&nodes[0]], Duration::from_millis(500));
    leader_known(&client).await;
    let error = client.get("k").consistency(Consistency::Eventual).await.unwrap_err();
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::Behind, Outcome::NotApplied), "{error}");
    assert_eq!(error.revision().map(|revision| revision.get()), Some(7));
    assert!(nodes.iter().all(|node| node.gets() > 0), "both were asked");
}

#[tokio::test]
async fn a_refusal_that_may_pass_is_repeated_until_it_does() {
    let nodes = cluster(1);
    let client = client(&[&nodes[0]], PATIENCE);
    let mut busy = refusal(ErrorCode::ResourceExhausted, v1::Outcome::NotApplied, true);
    busy.detail.backoff_ms = 1;
    nodes[0].behave(Behaviour::Refuse(busy));
    let pending = tokio::spawn({
        let client = client.clone();
        async move { client.put("k", "v").await }
    });
    eventually("it was repeated", || nodes[0].puts() > 2).await;
    nodes[0].behave(Behaviour::Serve);
    pending.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_change_of_cluster_or_epoch_is_refused() {
    let nodes = cluster(1);
    let client = client(&[&nodes[0]], PATIENCE);
    client.put("k", "v").await.unwrap();
    nodes[0].script.lock().header.cluster_id += 1;
    let error = client.put("k", "v").await.unwrap_err();
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::WrongCluster, Outcome::Unknown), "{error}");
    let error = client.get("k").await.unwrap_err();
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::WrongCluster, Outcome::NotApplied), "{error}");
    {
        let mut script = nodes[0].script.lock();
        script.header.cluster_id -= 1;
        script.header.epoch += 1;
    }
    assert_eq!(client.get("k").await.unwrap_err().kind(), ErrorKind::WrongCluster, "another epoch");
    nodes[0].script.lock().header.epoch -= 1;
    // A round of questions that met the stranger may still be under way.
    let found_again = async { while client.get("k").await.is_err() {} };
    tokio::time::timeout(PATIENCE, found_again).await.unwrap();
}

#[tokio::test]
async fn eventual_reads_go_around_a_node_that_is_down() {
    let mut nodes = cluster(3);
    for node in &nodes {
        node.behave(Behaviour::Serve);
    }
    let client = client(&[&nodes[0]], PATIENCE);
    leader_known(&client).await;
    drop(nodes.remove(2));
    for _ in 0..50 {
        let answer = client.get("k").consistency(Consistency::Eventual).await.unwrap();
        assert_ne!(answer.header.node_id, NodeId(3));
    }
    assert_eq!(client.stats().failures, 0);
}

#[tokio::test]
async fn the_remaining_time_travels_with_each_attempt() {
    let nodes = cluster(1);
    let client = client(&[&nodes[0]], Duration::from_secs(20));
    client.put("k", "v").await.unwrap();
    let timeout = nodes[0].script.lock().timeout.clone().unwrap();
    let micros = match timeout.split_at(timeout.len() - 1) {
        (number, "n") => number.parse::<u64>().unwrap() / 1000,
        (number, "u") => number.parse::<u64>().unwrap(),
        (number, "m") => number.parse::<u64>().unwrap() * 1000,
        other => panic!("{other:?}"),
    };
    assert!((1..=20_000_000).contains(&micros), "{timeout}");
}

#[tokio::test]
async fn all_pages_of_a_range_come_at_one_revision() {
    let nodes = cluster(1);
    let client = client(&[&nodes[0]], PATIENCE);
    for key in ["a", "k1", "k2", "k3", "k4", "k5", "z"] {
        client.put(key, key).await.unwrap();
    }
    let mut pages = client.range(KeyRange::prefix("k")).pages();
    let (mut keys, mut revisions) = (Vec::new(), Vec::new());
    while let Some(page) = pages.next().await.unwrap() {
        client.put("meanwhile", "another write").await.unwrap();
        revisions.push(page.header.revision);
        keys.extend(page.kvs.into_iter().map(|kv| String::from_utf8(kv.key.to_vec()).unwrap()));
    }
    assert_eq!(keys, ["k1", "k2", "k3", "k4", "k5"]);
    revisions.dedup();
    assert_eq!(revisions.len(), 1);
    assert_eq!(client.range(KeyRange::all()).all().await.unwrap().len(), 8);
}

#[tokio::test]
async fn close_ends_calls_in_flight_and_later_ones() {
    let nodes = cluster(1);
    let client = client(&[&nodes[0]], PATIENCE);
    client.put("k", "v").await.unwrap();
    nodes[0].behave(Behaviour::Silent);
    let pending = tokio::spawn({
        let client = client.clone();
        async move { client.put("k", "v").await }
    });
    eventually("the write has arrived", || nodes[0].puts() == 2).await;
    client.close();
    client.close();
    let error = pending.await.unwrap().unwrap_err();
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::Closed, Outcome::Unknown));
    let error = client.put("k", "v").await.unwrap_err();
    assert_eq!((error.kind(), error.outcome()), (ErrorKind::Closed, Outcome::NotApplied));
}

#[tokio::test]
async fn background_work_ends_with_the_last_clone() {
    let nodes = cluster(1);
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let client = client(&[&nodes[0]], PATIENCE);
    client.put("k", "v").await.unwrap();
    let clone = client.clone();
    drop(client);
    clone.put("k", "v").await.unwrap();
    assert!(tasks() > 0);
    drop(clone);
    eventually("all tasks of the client end", || tasks() == 0).await;
}

#[tokio::test]
async fn status_asks_the_named_node_once() {
    let nodes = cluster(2);
    let client = client(&[&nodes[0]], Duration::from_secs(2));
    assert_eq!(client.status(&nodes[1].address).await.unwrap().header.node_id, NodeId(2));
    assert_eq!(client.status("nowhere").await.unwrap_err().kind(), ErrorKind::InvalidArgument);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    drop(listener);
    assert_eq!(client.status(&address).await.unwrap_err().kind(), ErrorKind::Unavailable);
}

#[test]
fn a_client_that_cannot_work_is_not_built() {
    let build = |endpoints: &[&str]| Client::builder().endpoints(endpoints.iter().copied()).build().unwrap_err();
    assert!(build(&["127.0.0.1:9081"]).to_string().contains("runtime"));
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let _inside = runtime.enter();
    for endpoints in [&[][..], &["nonsense"], &["https://n1:9081"]] {
        assert_eq!(build(endpoints).kind(), ErrorKind::InvalidArgument, "{endpoints:?}");
    }
}

/// Kills a node, and waits until the client's connection has noticed: a write sent just before is rightly unknown.
async fn kill(node: FakeNode, client: &Client) {
    let address = node.address.clone();
    drop(node);
    let noticed = async {
        while TcpStream::connect(&address).await.is_ok() {}
        while client.status(&address).await.is_ok() {}
    };
    tokio::time::timeout(PATIENCE, noticed).await.unwrap();
}

async fn leader_known(client: &Client) {
    eventually("a leader is known", || client.leader().is_some()).await;
}
