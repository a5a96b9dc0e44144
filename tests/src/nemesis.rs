//! The adversary: does one bad thing after the other to a cluster, chosen by a seed, and undoes each.
//!
//! The seed decides which faults come, how long each lasts and the pause after it. Which node happens to lead at that
//! moment is up to the cluster, so the same seed gives the same schedule, not the same run.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use d_engine_client::{Client, Member, MemberRole, NodeId};
use fastrand::Rng;

use crate::cluster::Cluster;
use crate::network::End;
use crate::wait;

/// Budget of a call that changes the membership.
const OPERATOR_TIMEOUT: Duration = Duration::from_secs(5);

/// Whom a fault hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The leader of the moment; any node if there is none.
    Leader,
    /// The n-th node, leader or not.
    Node(u32),
}

/// A bad thing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL, later a restart.
    Kill(Target),
    /// SIGKILL for every node at once, later a restart of all.
    KillAll,
    /// SIGTERM, later a restart.
    Stop(Target),
    /// SIGSTOP, later SIGCONT.
    Pause(Target),
    /// No link to any other node; clients still reach it.
    IsolateFromPeers(Target),
    /// No link to anybody.
    IsolateFromAll(Target),
    /// What the node sends to one of its peers is lost; the other direction stays.
    DeafPeer(Target),
    /// No link between two nodes; both reach the third.
    SeverPair(Target),
    /// Leadership is handed over.
    Transfer(Target),
    /// Loses its vote, and later gets it back. The node that leads is killed in the middle of it.
    Demote(Target),
    /// Removed for good; comes back with its id and an empty disk, is added and promoted.
    Replace(Target),
}

impl Fault {
    const WITHOUT_NETWORK: [fn(Target) -> Self; 8] =
        [Self::Kill, Self::Kill, Self::Pause, Self::Pause, Self::Stop, Self::Transfer, Self::Demote, Self::Replace];
    const WITH_NETWORK: [fn(Target) -> Self; 12] = [
        Self::Kill,
        Self::Kill,
        Self::Pause,
        Self::Pause,
        Self::Stop,
        Self::IsolateFromPeers,
        Self::IsolateFromAll,
        Self::DeafPeer,
        Self::SeverPair,
        Self::Transfer,
        Self::Demote,
        Self::Replace,
    ];

    /// The name without the target, to count by.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kill(_) => "kill",
            Self::KillAll => "kill all",
            Self::Stop(_) => "stop",
            Self::Pause(_) => "pause",
            Self::IsolateFromPeers(_) => "isolate from peers",
            Self::IsolateFromAll(_) => "isolate from all",
            Self::DeafPeer(_) => "one-way cut",
            Self::SeverPair(_) => "cut pair",
            Self::Transfer(_) => "transfer",
            Self::Demote(_) => "demote",
            Self::Replace(_) => "replace",
        }
    }

    fn target(self) -> Target {
        match self {
            Self::KillAll => Target::Leader,
            Self::Kill(target)
            | Self::Stop(target)
            | Self::Pause(target)
            | Self::IsolateFromPeers(target)
            | Self::IsolateFromAll(target)
            | Self::DeafPeer(target)
            | Self::SeverPair(target)
            | Self::Transfer(target)
            | Self::Demote(target)
            | Self::Replace(target) => target,
        }
    }
}

/// One step of a schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Quiet time before.
    pub pause: Duration,
    /// What is done.
    pub fault: Fault,
    /// How long it lasts.
    pub lasting: Duration,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?} for {:?}", self.fault.name(), self.fault.target(), self.lasting)
    }
}

/// The endless schedule of a seed.
#[derive(Clone, Debug)]
pub struct Schedule {
    rng: Rng,
    nodes: u32,
    network: bool,
    opening: Vec<Fault>,
}

impl Schedule {
    /// The schedule of `seed` for a cluster of `nodes`, with link faults if there is a `network`.
    ///
    /// It opens with one of each kind that matters most, so that a short run has seen them too.
    #[must_use]
    pub fn new(seed: u64, nodes: u32, network: bool) -> Self {
        let mut rng = Rng::with_seed(seed);
        let mut opening = vec![
            Fault::Kill(Target::Leader),
            Fault::Pause(Target::Leader),
            Fault::KillAll,
            Fault::Demote(Target::Leader),
            Fault::Replace(Target::Leader),
        ];
        if network {
            opening.push(Fault::IsolateFromPeers(Target::Leader));
        }
        rng.shuffle(&mut opening);
        Self { rng, nodes, network, opening }
    }
}

impl Iterator for Schedule {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        let pause = Duration::from_millis(self.rng.u64(300..2_000));
        let lasting = Duration::from_millis(self.rng.u64(200..3_500));
        let target = if self.rng.u8(0..3) < 2 { Target::Leader } else { Target::Node(self.rng.u32(1..=self.nodes)) };
        let kinds: &[fn(Target) -> Fault] = if self.network { &Fault::WITH_NETWORK } else { &Fault::WITHOUT_NETWORK };
        let fault = match self.opening.pop() {
            Some(fault) => fault,
            None if self.rng.u8(0..12) == 0 => Fault::KillAll,
            None => self.rng.choice(kinds).expect("there are kinds")(target),
        };
        Some(Step { pause, fault, lasting })
    }
}

/// Follows a schedule until `end`, leaves the cluster whole and ready, and says how often each fault was done.
///
/// # Panics
/// When a node ends by itself, or the cluster does not recover.
pub async fn torment(
    cluster: &mut Cluster,
    schedule: &mut Schedule,
    end: Instant,
    mut say: impl FnMut(&str),
) -> BTreeMap<&'static str, usize> {
    let mut done = BTreeMap::new();
    for step in schedule {
        if Instant::now() + step.pause >= end {
            break;
        }
        wait::pass(step.pause).await;
        let victim = match step.fault.target() {
            Target::Node(id) => id,
            Target::Leader => cluster.leader_now(&[]).await.unwrap_or(1),
        };
        say(&format!("{step}, hits node {victim}"));
        let lasting = step.lasting.min(end.saturating_duration_since(Instant::now()));
        inflict(cluster, step.fault, victim, lasting).await;
        *done.entry(step.fault.name()).or_default() += 1;
        cluster.check_alive();
    }
    cluster.start_all().await;
    done
}

async fn inflict(cluster: &mut Cluster, fault: Fault, victim: u32, lasting: Duration) {
    let other = victim % cluster.nodes().len() as u32 + 1;
    match fault {
        Fault::Kill(_) => {
            cluster.node_mut(victim).kill();
            wait::pass(lasting).await;
            cluster.node_mut(victim).start();
        }
        Fault::KillAll => {
            let ids: Vec<u32> = cluster.nodes().iter().map(|node| node.id).collect();
            for id in &ids {
                cluster.node_mut(*id).kill();
            }
            // All at once and without a pause: this is about what the disks and the fresh processes know.
            for id in &ids {
                cluster.node_mut(*id).start();
            }
        }
        Fault::Stop(_) => {
            cluster.node_mut(victim).stop().await;
            wait::pass(lasting).await;
            cluster.node_mut(victim).start();
        }
        Fault::Pause(_) => {
            cluster.node_mut(victim).process().pause();
            wait::pass(lasting).await;
            cluster.node_mut(victim).process().resume();
        }
        Fault::Transfer(_) => {
            // There may be no leader at the moment.
            let _ = operator(cluster).transfer_leadership().timeout(lasting).await;
        }
        Fault::Demote(_) => {
            let client = operator(cluster);
            let demoting = tokio::spawn(client.demote_member(NodeId(victim)).timeout(lasting).into_future());
            wait::pass(lasting / 8).await;
            let leader = cluster.leader_now(&[]).await.unwrap_or(other);
            cluster.node_mut(leader).kill();
            cluster.node_mut(leader).start();
            // It may be interrupted at any point.
            let _ = demoting.await;
            wait::until("the voter to be one again", wait::PATIENCE, || async {
                client.promote_member(NodeId(victim)).await.ok()
            })
            .await;
        }
        Fault::Replace(_) => {
            let client = operator(cluster);
            wait::until("the member to be removed", wait::PATIENCE, || async {
                let _ = client.remove_member(NodeId(victim)).await;
                client.members().await.ok()?.members.iter().all(|member| member.id.get() != victim).then_some(())
            })
            .await;
            let node = cluster.node_mut(victim);
            let (well, output) = node.exit().await;
            assert!(
                !well && output.contains("was removed from the cluster"),
                "it stopped for another reason:\n{output}"
            );
            wait::pass(lasting).await;
            node.lose_data();
            node.start();
            let address = node.address.to_string();
            wait::until("the member to vote again", wait::PATIENCE, || async {
                let members = client.add_member(&address).await.ok()?.members;
                let is_voter = |member: &Member| member.id.get() == victim && member.role == MemberRole::Voter;
                members.iter().any(is_voter).then_some(())
            })
            .await;
        }
        Fault::IsolateFromPeers(_) | Fault::IsolateFromAll(_) | Fault::DeafPeer(_) | Fault::SeverPair(_) => {
            let network = cluster.network().expect("link faults are only scheduled with a network");
            let (one, two) = (End::Node(victim), End::Node(other));
            match fault {
                Fault::IsolateFromPeers(_) => network.isolate(one, false),
                Fault::IsolateFromAll(_) => network.isolate(one, true),
                Fault::DeafPeer(_) => network.cut(one, two),
                _ => network.sever(one, two),
            }
            wait::pass(lasting).await;
            network.heal();
        }
    }
}

/// A client for what operators do.
fn operator(cluster: &Cluster) -> Client {
    Client::builder().endpoints(cluster.addresses()).call_timeout(OPERATOR_TIMEOUT).build().expect("valid endpoints")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds(seed: u64, network: bool, steps: usize) -> Vec<Step> {
        Schedule::new(seed, 3, network).take(steps).collect()
    }

    #[test]
    fn a_seed_gives_the_same_schedule_again() {
        assert_eq!(kinds(7, true, 100), kinds(7, true, 100));
        assert_ne!(kinds(7, true, 100), kinds(8, true, 100));
    }

    #[test]
    fn a_long_schedule_has_every_fault() {
        let names: std::collections::BTreeSet<_> = kinds(7, true, 500).iter().map(|step| step.fault.name()).collect();
        assert_eq!(names.len(), 11, "{names:?}");
    }

    #[test]
    fn without_a_network_no_link_is_cut() {
        let cuts = ["isolate from peers", "isolate from all", "one-way cut", "cut pair"];
        assert!(kinds(7, false, 500).iter().all(|step| !cuts.contains(&step.fault.name())));
    }

    #[test]
    fn a_short_schedule_has_the_faults_that_matter_most() {
        for seed in 0..20 {
            let names: Vec<_> = kinds(seed, true, 6).iter().map(|step| step.fault.name()).collect();
            for name in ["kill", "pause", "kill all", "isolate from peers", "demote", "replace"] {
                assert!(names.contains(&name), "seed {seed}: {names:?}");
            }
        }
    }
}
