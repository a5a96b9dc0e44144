//! The private network of the fault tests does what it says: a fault that is not done would make any test pass.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed step ends the test")]

use d_engine_tests::network::{self, End, PrivateNetwork};

/// Whether a packet from one node reaches the other and comes back: nobody listens there, so that a refusal comes back.
fn reaches(from: u32, to: End) -> bool {
    let attempt = format!(": </dev/tcp/{}/9", to.address());
    let output =
        PrivateNetwork::command(from).args(["timeout", "1", "bash", "-c", &attempt]).output().expect("bash runs");
    String::from_utf8_lossy(&output.stderr).contains("refused")
}

#[test]
fn a_cut_link_loses_everything_and_a_healed_one_nothing() {
    network::inside("a_cut_link_loses_everything_and_a_healed_one_nothing", || async {
        let network = PrivateNetwork::lay(3);
        let (one, two, three) = (End::Node(1), End::Node(2), End::Node(3));
        let all = || [reaches(1, two), reaches(1, three), reaches(2, three), reaches(1, End::Clients)];
        assert_eq!(all(), [true; 4]);

        network.sever(one, two);
        assert_eq!(all(), [false, true, true, true]);
        network.heal();
        network.isolate(one, false);
        assert_eq!(all(), [false, false, true, true]);
        network.heal();
        network.isolate(one, true);
        assert_eq!(all(), [false, false, true, false]);
        network.heal();
        network.cut(two, one);
        assert_eq!(all(), [false, true, true, true], "the answer does not come back");
        network.heal();
        assert_eq!(all(), [true; 4]);
    });
}
