use super::*;
use crate::cluster::MemberRole;

fn address(text: &str) -> Address {
    Address::parse(text).unwrap()
}

fn leader(id: u32, term: u64) -> Leader {
    Leader {
        id: NodeId(id),
        term: Term(term),
        client_address: format!("n{id}:9081"),
        application_address: String::new(),
    }
}

fn member(id: u32) -> Member {
    Member {
        id: NodeId(id),
        role: MemberRole::Voter,
        peer_address: format!("n{id}:9081"),
        client_address: format!("n{id}:9081"),
        application_address: String::new(),
        promotable: false,
    }
}

fn header(cluster_id: u64, epoch: u64, node_id: u32) -> v1::ResponseHeader {
    v1::ResponseHeader { cluster_id, epoch, node_id, revision: 1, term: 1 }
}

struct Fixture {
    topology: Topology,
    rng: fastrand::Rng,
    now: Instant,
}

impl Fixture {
    fn three_members() -> Self {
        let mut topology = Topology::new(vec![address("n1:9081")]);
        topology.learn([member(1), member(2), member(3)]);
        Self { topology, rng: fastrand::Rng::with_seed(11), now: Instant::now() }
    }

    fn pick(&mut self, route: Route, tried: &[Address]) -> Pick {
        self.topology.pick(route, tried, self.now, &mut self.rng)
    }
}

#[test]
fn endpoints_are_host_and_port_and_nothing_else() {
    for good in
        ["127.0.0.1:9081", "http://node-1.example:1/", "https://node-1.example:1", "[::1]:9081", " localhost:65535 "]
    {
        assert!(Address::parse(good).is_ok(), "{good}");
    }
    assert_eq!(address("http://n1:9081/").as_str(), "n1:9081");
    for bad in ["", "n1", "n1:", "n1:0", ":9081", "n1:70000", "ftp://n1:9081", "n1:9081/path", "u@n1:9081", "a b:1"] {
        assert!(Address::parse(bad).is_err(), "{bad}");
    }
}

#[test]
fn a_hint_counts_only_when_its_term_is_newer() {
    let mut f = Fixture::three_members();
    assert!(f.topology.hint(leader(2, 5), f.now));
    for stale in [leader(1, 4), leader(1, 5), leader(2, 5), leader(3, 0)] {
        assert!(!f.topology.hint(stale.clone(), f.now), "{stale:?}");
    }
    assert_eq!(f.pick(Route::Leader, &[]), Pick::Node(address("n2:9081")));
    assert!(f.topology.hint(leader(3, 6), f.now));
    assert_eq!(f.pick(Route::Leader, &[]), Pick::Node(address("n3:9081")));
    assert_eq!(f.topology.leader_changes(), 1);
}

#[test]
fn a_leader_that_denies_leading_is_not_asked_again_on_old_hearsay() {
    let mut f = Fixture::three_members();
    f.topology.hint(leader(2, 5), f.now);
    f.topology.denied(&address("n3:9081"), f.now);
    assert!(f.topology.leader().is_some(), "a follower that denies leading changes nothing");
    f.topology.denied(&address("n2:9081"), f.now);
    assert_eq!(f.pick(Route::Leader, &[]), Pick::Wait(None));
    assert!(!f.topology.hint(leader(2, 5), f.now), "a follower still believes in it");
    assert!(!f.topology.hint(leader(1, 4), f.now + DENIAL), "an older term never counts");
    assert!(f.topology.hint(leader(2, 5), f.now + DENIAL), "it may have found its quorum again");
}

#[test]
fn a_failed_address_is_backed_off_and_then_asked_again() {
    let mut f = Fixture::three_members();
    f.topology.hint(leader(2, 5), f.now);
    f.topology.failed(&address("n2:9081"), "refused", f.now, &mut f.rng);
    let Pick::Wait(Some(until)) = f.pick(Route::Leader, &[]) else { panic!("a leader that failed was picked") };
    assert!(until > f.now);
    for _ in 0..20 {
        assert_ne!(f.pick(Route::Any, &[]), Pick::Node(address("n2:9081")));
        assert_ne!(f.pick(Route::PreferLeader, &[]), Pick::Node(address("n2:9081")));
    }
    f.now = until;
    assert_eq!(f.pick(Route::Leader, &[]), Pick::Node(address("n2:9081")));
}

#[test]
fn backoff_grows_with_failures_in_a_row_and_ends_with_an_answer() {
    let mut f = Fixture::three_members();
    let n2 = address("n2:9081");
    for _ in 0..20 {
        f.topology.failed(&n2, "refused", f.now, &mut f.rng);
        let until = f.topology.avoided_until(&n2).unwrap();
        assert!(until - f.now <= Duration::from_millis(1020));
        f.topology.failed(&n2, "refused", f.now, &mut f.rng);
        assert_eq!(f.topology.avoided_until(&n2), Some(until), "a failure while avoided must not prolong it");
        f.now = until;
    }
    assert_eq!(f.topology.nodes[&n2].failures, 20);
    f.topology.answered(&n2, &header(1, 0, 2), Duration::from_millis(1)).unwrap();
    assert_eq!(f.topology.nodes[&n2].failures, 0);
}

#[test]
fn when_everything_failed_the_first_to_recover_is_waited_for() {
    let mut f = Fixture::three_members();
    for id in 1..=3 {
        f.topology.failed(&address(&format!("n{id}:9081")), "refused", f.now, &mut f.rng);
    }
    let Pick::Wait(Some(until)) = f.pick(Route::Any, &[]) else { panic!("nothing was available") };
    f.now = until;
    assert!(matches!(f.pick(Route::Any, &[]), Pick::Node(_)));
}

#[test]
fn eventual_reads_go_to_the_least_loaded_then_nearest_node() {
    let mut f = Fixture::three_members();
    for (id, latency) in [(1, 9), (2, 3), (3, 5)] {
        let from = address(&format!("n{id}:9081"));
        f.topology.answered(&from, &header(1, 0, id), Duration::from_millis(latency)).unwrap();
    }
    assert_eq!(f.pick(Route::Any, &[]), Pick::Node(address("n2:9081")));
    f.topology.begin(&address("n2:9081"));
    assert_eq!(f.pick(Route::Any, &[]), Pick::Node(address("n3:9081")));
    f.topology.end(&address("n2:9081"));
    assert_eq!(f.pick(Route::Any, &[]), Pick::Node(address("n2:9081")));
}

#[test]
fn a_repeated_read_prefers_a_node_not_asked_yet() {
    let mut f = Fixture::three_members();
    f.topology.hint(leader(1, 2), f.now);
    let mut tried = Vec::new();
    for _ in 0..3 {
        let Pick::Node(next) = f.pick(Route::PreferLeader, &tried) else { panic!("a node is available") };
        assert!(!tried.contains(&next), "{next} twice before all were asked");
        tried.push(next);
    }
    assert!(matches!(f.pick(Route::PreferLeader, &tried), Pick::Node(_)), "all were asked: start over");
}

#[test]
fn a_change_of_cluster_or_epoch_is_refused() {
    let mut f = Fixture::three_members();
    let n1 = address("n1:9081");
    assert_eq!(f.topology.answered(&n1, &header(0, 0, 1), Duration::ZERO), Ok(()), "no identity yet");
    assert_eq!(f.topology.answered(&n1, &header(7, 1, 1), Duration::ZERO), Ok(()));
    assert!(f.topology.answered(&n1, &header(8, 1, 1), Duration::ZERO).is_err());
    assert!(f.topology.answered(&n1, &header(7, 2, 1), Duration::ZERO).is_err());
    assert_eq!(f.topology.answered(&n1, &header(7, 1, 2), Duration::ZERO), Ok(()));
}

#[test]
fn a_foreign_leader_takes_its_term_with_it() {
    let mut f = Fixture::three_members();
    assert!(f.topology.hint(leader(2, 1000), f.now));
    f.topology.foreign(&address("n3:9081"));
    assert!(f.topology.leader().is_some(), "it was another node");
    f.topology.foreign(&address("n2:9081"));
    assert_eq!(f.topology.leader(), None);
    assert!(f.topology.hint(leader(1, 5), f.now), "the term of this cluster counts again");
}

#[test]
fn seeds_survive_any_member_list_and_other_addresses_do_not() {
    let mut f = Fixture::three_members();
    f.topology.learn([member(4)]);
    assert_eq!(f.topology.addresses(), [address("n1:9081"), address("n4:9081")]);
    assert!(!f.topology.knows(&address("n2:9081")));
    f.topology.learn([]);
    assert_eq!(f.topology.addresses(), [address("n1:9081"), address("n4:9081")], "an empty list is no news");
}

#[test]
fn a_seed_that_is_the_leader_by_another_name_stands_in_for_an_unreachable_address() {
    let mut f = Fixture::three_members();
    let mut topology = Topology::new(vec![address("gateway:1")]);
    topology.learn([member(1)]);
    f.topology = topology;
    f.topology.answered(&address("gateway:1"), &header(7, 0, 1), Duration::from_millis(1)).unwrap();
    f.topology.hint(leader(1, 3), f.now);
    assert_eq!(f.pick(Route::Leader, &[]), Pick::Node(address("n1:9081")));
    assert_eq!(f.pick(Route::Any, &[]), Pick::Node(address("n1:9081")), "one node, one address");
    f.topology.failed(&address("n1:9081"), "refused", f.now, &mut f.rng);
    assert_eq!(f.pick(Route::Leader, &[]), Pick::Node(address("gateway:1")));
    assert_eq!(f.pick(Route::Any, &[]), Pick::Node(address("gateway:1")));
}

#[test]
fn random_hints_never_move_the_leader_to_an_older_term() {
    let seed = 20_260_101;
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut f = Fixture::three_members();
    let mut newest = 0;
    for step in 0..10_000 {
        let before = f.topology.leader().map_or(0, |leader| leader.term.get());
        match rng.u8(0..10) {
            0 => f.topology.denied(&address(&format!("n{}:9081", rng.u32(1..=3))), f.now),
            1 => f.now += Duration::from_millis(rng.u64(0..200)),
            2 => f.topology.learn((1..=rng.u32(1..=3)).map(member)),
            _ => drop(f.topology.hint(leader(rng.u32(1..=3), (newest + rng.u64(0..4)).saturating_sub(2)), f.now)),
        }
        if let Some(known) = f.topology.leader() {
            assert!(known.term.get() >= newest.max(before), "seed {seed}, step {step}: {known:?}, newest {newest}");
            newest = known.term.get();
        }
    }
    assert!(newest > 100, "seed {seed}: the run went nowhere");
}
