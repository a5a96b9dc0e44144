//! Who belongs to the cluster, on real processes: grown and shrunk by the command line under load, members that move, that
//! lose their disk, that see only some of the others, and clusters of two.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failed step ends the test")]

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use d_engine_client::{Client, Member, MemberRole, NodeId};
use d_engine_tests::cluster::{Cluster, Shape};
use d_engine_tests::network::{self, End, PrivateNetwork};
use d_engine_tests::process::d_engine;
use d_engine_tests::{http, wait};
use tokio::sync::watch;
use tokio::task::JoinHandle;

fn client(cluster: &Cluster, nodes: usize) -> Client {
    let endpoints = &cluster.addresses()[..nodes];
    Client::builder().endpoints(endpoints).call_timeout(wait::PATIENCE).build().unwrap()
}

/// Pairs of calls that must succeed once what was done to the cluster is over.
const PAIRS_AFTER: u64 = 100;

/// Puts and reads all the time; no call may fail.
struct Load {
    stop: watch::Sender<bool>,
    pairs: Arc<AtomicU64>,
    callers: Vec<JoinHandle<Duration>>,
}

impl Load {
    fn start(client: &Client) -> Self {
        let (stop, stopped) = watch::channel(false);
        let pairs = Arc::new(AtomicU64::new(0));
        let caller = |number: usize| {
            let (client, stopped, pairs) = (client.clone(), stopped.clone(), Arc::clone(&pairs));
            let key = format!("load/{number}");
            tokio::spawn(async move {
                let (mut done, mut longest) = (0_u64, Duration::ZERO);
                while !*stopped.borrow() {
                    let started = Instant::now();
                    let value = done.to_string();
                    client.put(&key, &value).await.unwrap_or_else(|error| panic!("put {done} of {key}: {error}"));
                    let read = client.get(&key).await.unwrap_or_else(|error| panic!("get {done} of {key}: {error}"));
                    assert_eq!(read.into_value().as_deref(), Some(value.as_bytes()), "{key}");
                    longest = longest.max(started.elapsed());
                    done += 1;
                    pairs.fetch_add(1, Ordering::Relaxed);
                    tokio::task::yield_now().await;
                }
                longest
            })
        };
        let callers = (0..8).map(caller).collect();
        Self { stop, pairs, callers }
    }

    /// Ends it once more calls have succeeded.
    async fn finish(self, what: &str) {
        let enough = self.pairs.load(Ordering::Relaxed) + PAIRS_AFTER;
        wait::until("calls to go on", wait::PATIENCE, || async {
            (self.pairs.load(Ordering::Relaxed) >= enough).then_some(())
        })
        .await;
        self.stop.send_replace(true);
        let mut longest = Duration::ZERO;
        for caller in self.callers {
            longest = longest.max(caller.await.unwrap());
        }
        let calls = 2 * self.pairs.load(Ordering::Relaxed);
        println!("{what}: {calls} calls, none failed, the slowest pair took {longest:?}");
    }
}

/// Runs `d-engine member ...` and answers its output.
async fn member(cluster: &Cluster, arguments: &[&str]) -> Result<String, String> {
    let mut command = Command::new(d_engine());
    let endpoints = cluster.addresses().join(",");
    command.args(["--endpoints", &endpoints, "--timeout", "20s", "member"]).args(arguments);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

async fn voters(client: &Client) -> Vec<u32> {
    let members = client.members().await.unwrap().members;
    members.iter().filter(|member| member.role == MemberRole::Voter).map(|member| member.id.get()).collect()
}

async fn until_voters(client: &Client, wanted: &[u32]) {
    wait::until("these voters", wait::PATIENCE, || async { (voters(client).await == wanted).then_some(()) }).await;
}

/// Cluster of five of which the first `founders` found it; the others are to join.
async fn prepared(founders: u32) -> Cluster {
    let mut cluster = Cluster::prepare(Shape { nodes: 5, ..Shape::default() }).await;
    let members: Vec<_> = cluster.nodes().iter().map(|node| (node.id, node.address)).collect();
    for id in 1..=5 {
        let known = members.iter().filter(|(other, _)| *other <= founders || *other == id);
        cluster.node(id).write_config(&known.copied().collect::<Vec<_>>(), "");
    }
    for id in 1..=founders {
        cluster.node_mut(id).start();
    }
    for id in 1..=founders {
        cluster.node_mut(id).ready().await;
    }
    cluster
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_node_becomes_five_and_three_under_load_without_a_failed_call() {
    let mut cluster = prepared(1).await;
    let client = client(&cluster, 1);
    let load = Load::start(&client);
    // Two ask to join, two are added by hand.
    for id in 2..=5 {
        if id < 4 {
            cluster.node(id).joins();
        }
        cluster.node_mut(id).start();
        if id >= 4 {
            let address = cluster.node(id).address.to_string();
            let added = wait::until("the node to be added", wait::PATIENCE, || async {
                member(&cluster, &["add", &address]).await.ok()
            })
            .await;
            assert!(added.contains(&address), "{added}");
        }
        cluster.node_mut(id).ready().await;
        until_voters(&client, &(1..=id).collect::<Vec<_>>()).await;
    }
    let said = member(&cluster, &["transfer", "4"]).await.unwrap();
    assert!(said.contains("node 4 leads"), "{said}");
    // The leader goes: it hands over first.
    for left in [4, 3] {
        let leader = cluster.reign().await.leader;
        let said = member(&cluster, &["remove", &leader.to_string()]).await.unwrap();
        assert!(said.contains("removed"), "{said}");
        let (well, output) = cluster.node_mut(leader).exit().await;
        assert!(!well && output.contains("was removed from the cluster"), "{output}");
        assert_eq!(voters(&client).await.len(), left);
    }
    let refused = member(&cluster, &["remove", "77"]).await.unwrap_err();
    assert!(refused.contains("no member"), "{refused}");
    load.finish("one to five to three").await;
}

/// Waits until every node that runs shows so many voters and learners, and none but the leader how far the others are
/// behind.
async fn until_metrics_tell(cluster: &Cluster, voters: usize, learners: usize) {
    let counts = [
        format!("d_engine_members{{role=\"voter\"}} {voters}"),
        format!("d_engine_members{{role=\"learner\"}} {learners}"),
    ];
    let lag = |id: u32| format!("d_engine_member_lag_entries{{member=\"{id}\"}}");
    for node in cluster.nodes().iter().filter(|node| node.runs()) {
        wait::until(&format!("node {} to show {counts:?}", node.id), wait::PATIENCE, || async {
            let (_, text) = http::get(node.http_address, "/metrics").await.ok()?;
            let shows = |wanted: &str| text.lines().any(|line| line == wanted);
            let lags = cluster.nodes().iter().filter(|other| text.contains(&lag(other.id))).count();
            let followed = if shows("d_engine_raft_is_leader 1") { voters + learners - 1 } else { 0 };
            (counts.iter().all(|count| shows(count)) && lags == followed).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_of_every_node_tell_who_belongs_to_the_cluster_and_the_leaders_what_was_changed() {
    let mut cluster = prepared(3).await;
    until_metrics_tell(&cluster, 3, 0).await;
    cluster.node_mut(4).start();
    let address = cluster.node(4).address.to_string();
    wait::until("the node to be added", wait::PATIENCE, || async {
        member(&cluster, &["add", &address, "--learner"]).await.ok()
    })
    .await;
    cluster.node_mut(4).ready().await;
    until_metrics_tell(&cluster, 3, 1).await;
    wait::until("the learner to catch up", wait::PATIENCE, || async { member(&cluster, &["promote", "4"]).await.ok() })
        .await;
    until_metrics_tell(&cluster, 4, 0).await;
    member(&cluster, &["demote", "4"]).await.unwrap();
    until_metrics_tell(&cluster, 3, 1).await;
    member(&cluster, &["remove", "4"]).await.unwrap();
    cluster.node_mut(4).exit().await;
    until_metrics_tell(&cluster, 3, 0).await;
    member(&cluster, &["remove", "77"]).await.unwrap_err();
    let mut counted = String::new();
    for node in cluster.nodes().iter().filter(|node| node.runs()) {
        counted.push_str(&http::get(node.http_address, "/metrics").await.unwrap().1);
    }
    // Whichever node led at the time.
    for (change, outcome) in
        [("add", "done"), ("promote", "done"), ("demote", "done"), ("remove", "done"), ("remove", "refused")]
    {
        let series = format!("d_engine_membership_changes_total{{change=\"{change}\",outcome=\"{outcome}\"}}");
        assert!(counted.contains(&series), "{series}: {counted}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_move_are_followed_by_clients_and_peers() {
    let mut cluster = Cluster::start(3).await;
    let before = cluster.addresses();
    let client = client(&cluster, 3);
    let load = Load::start(&client);
    for id in 1..=3 {
        cluster.node_mut(id).stop().await;
        cluster.node_mut(id).move_by(20);
        cluster.node_mut(id).start();
        cluster.node_mut(id).ready().await;
        let address = cluster.node(id).address.to_string();
        wait::until("the membership to say where it is", wait::PATIENCE, || async {
            let members = client.members().await.ok()?.members;
            let here = |member: &Member| member.id.get() == id && member.client_address == address;
            members.iter().any(|member| here(member) && member.peer_address == address).then_some(())
        })
        .await;
    }
    assert!(cluster.addresses().iter().all(|address| !before.contains(address)), "all have moved");
    client.put("after", "x").await.unwrap();
    load.finish("three nodes moved").await;
    // All at once: they find each other by what each of them is told.
    let members: Vec<_> = (1..=3)
        .map(|id| {
            cluster.node_mut(id).kill();
            cluster.node_mut(id).move_by(20);
            (id, cluster.node(id).address)
        })
        .collect();
    for id in 1..=3 {
        cluster.node(id).write_config(&members, "");
    }
    cluster.start_all().await;
    let moved = self::client(&cluster, 3);
    assert_eq!(moved.get("after").await.unwrap().into_value().as_deref(), Some(&b"x"[..]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_voter_that_lost_its_disk_never_votes_until_it_is_removed_and_added_again() {
    let mut cluster = Cluster::start(3).await;
    let client = client(&cluster, 3);
    client.put("key", "kept").await.unwrap();
    cluster.node_mut(2).kill();
    cluster.node_mut(3).kill();
    cluster.node(3).lose_data();
    // If it led until now, its lease goes on for a moment.
    wait::until("node 1 to lead no more", wait::PATIENCE, || async {
        cluster.leader_now(&[]).await.is_none().then_some(())
    })
    .await;
    // With its vote node 1 would lead: the one that is down may know more than it.
    cluster.node_mut(3).start();
    let (well, output) = cluster.node_mut(3).exit().await;
    assert!(!well && output.contains("by another data directory"), "{output}");
    assert_eq!(cluster.leader_now(&[]).await, None, "a voter without its data has voted");
    cluster.node_mut(2).start();
    cluster.leader(&[]).await;
    assert_eq!(client.get("key").await.unwrap().into_value().as_deref(), Some(&b"kept"[..]));
    let refused = member(&cluster, &["remove", "1"]).await.unwrap_err();
    assert!(refused.contains("would take no writes"), "{refused}");
    member(&cluster, &["remove", "3"]).await.unwrap();
    cluster.node_mut(3).start();
    let address = cluster.node(3).address.to_string();
    wait::until("the node to be added", wait::PATIENCE, || async { client.add_member(&address).await.ok() }).await;
    until_voters(&client, &[1, 2, 3]).await;
    cluster.node_mut(3).ready().await;
    client.transfer_leadership().to(NodeId(3)).await.unwrap();
    assert_eq!(client.get("key").await.unwrap().into_value().as_deref(), Some(&b"kept"[..]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_go_on_after_either_was_away() {
    let mut cluster = Cluster::start(2).await;
    let client = client(&cluster, 2);
    for round in 0..2 {
        let leader = cluster.leader(&[]).await;
        let away = if round == 0 { leader } else { 3 - leader };
        let load = Load::start(&client);
        cluster.node_mut(away).stop().await;
        cluster.node_mut(away).start();
        wait::until("the cluster to serve", wait::PATIENCE, || async { client.put("key", "x").await.ok() }).await;
        load.finish("two nodes, one restarted").await;
        cluster.start_all().await;
    }
}

#[test]
fn nodes_that_see_only_some_of_the_others_elect_and_make_progress() {
    let test = "nodes_that_see_only_some_of_the_others_elect_and_make_progress";
    network::inside(test, || async {
        let network = Some(PrivateNetwork::lay(3));
        let mut cluster = Cluster::prepare(Shape { network, ..Shape::default() }).await;
        cluster.start_all().await;
        let client = client(&cluster, 3);
        let leader = cluster.reign().await.leader;
        let other = leader % 3 + 1;
        let third = other % 3 + 1;
        // B sees both, whoever leads: the leader and a follower are cut off from each other, then the followers.
        for pair in [[leader, other], [other, third], [third, leader]] {
            cluster.network().unwrap().sever(End::Node(pair[0]), End::Node(pair[1]));
            for number in 0..20 {
                client.put("key", format!("{pair:?} {number}")).await.unwrap();
            }
            let read = client.get("key").await.unwrap().into_value();
            assert_eq!(read.as_deref(), Some(format!("{pair:?} 19").as_bytes()));
            cluster.network().unwrap().heal();
            cluster.reign().await;
        }
    });
}

#[test]
fn two_nodes_that_do_not_see_each_other_take_no_write_and_go_on_when_they_do() {
    let test = "two_nodes_that_do_not_see_each_other_take_no_write_and_go_on_when_they_do";
    network::inside(test, || async {
        let network = Some(PrivateNetwork::lay(2));
        let mut cluster = Cluster::prepare(Shape { nodes: 2, network, ..Shape::default() }).await;
        cluster.start_all().await;
        let client = client(&cluster, 2);
        client.put("key", "before").await.unwrap();
        cluster.network().unwrap().sever(End::Node(1), End::Node(2));
        let hasty =
            Client::builder().endpoints(cluster.addresses()).call_timeout(Duration::from_secs(2)).build().unwrap();
        assert!(hasty.put("key", "alone").await.is_err(), "half of two is no majority");
        cluster.network().unwrap().heal();
        client.put("key", "healed").await.unwrap();
        cluster.reign().await;
    });
}
