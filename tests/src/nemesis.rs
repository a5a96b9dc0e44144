//! The adversary: does one bad thing after the other to a cluster, chosen by a seed, and undoes each.
//!
//! The seed decides which faults come, how long each lasts and the pause after it. Which node happens to lead at that
//! moment is up to the cluster, so the same seed gives the same schedule, not the same run.

use std::fmt;
use std::time::{Duration, Instant};

use d_engine_client::{Client, Member, MemberRole, NodeId};
use fastrand::Rng;

use crate::cluster::Cluster;
use crate::disk::Disk;
use crate::network::End;
use crate::timeline::Event;
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
    /// No byte is left on the disk; later there is space again, and the node is started anew.
    FillDisk(Target),
    /// Every write to the disk waits for those of a neighbour.
    SlowDisk(Target),
    /// The wall clock jumps by up to a day, to either side, and stays there.
    StepClock(Target),
    /// Leadership is handed over.
    Transfer(Target),
    /// Loses its vote, and later gets it back. The node that leads is killed in the middle of it.
    Demote(Target),
    /// Removed for good; comes back with its id and an empty disk, is added and promoted.
    Replace(Target),
}

/// What an adversary can lay hands on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// Links between nodes.
    pub network: bool,
    /// The disks of nodes.
    pub disks: bool,
    /// Their wall clocks.
    pub wall_clocks: bool,
}

impl Fault {
    /// What can be done within `reach`; more often what matters more.
    fn kinds(reach: Reach) -> Vec<fn(Target) -> Self> {
        let mut kinds: Vec<fn(Target) -> Self> = vec![
            Self::Kill,
            Self::Kill,
            Self::Pause,
            Self::Pause,
            Self::Stop,
            Self::Transfer,
            Self::Demote,
            Self::Replace,
        ];
        if reach.network {
            let links: [fn(Target) -> Self; 4] =
                [Self::IsolateFromPeers, Self::IsolateFromAll, Self::DeafPeer, Self::SeverPair];
            kinds.extend(links);
        }
        if reach.disks {
            let disks: [fn(Target) -> Self; 2] = [Self::FillDisk, Self::SlowDisk];
            kinds.extend(disks);
        }
        if reach.wall_clocks {
            kinds.push(Self::StepClock);
        }
        kinds
    }

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
            Self::FillDisk(_) => "full disk",
            Self::SlowDisk(_) => "slow disk",
            Self::StepClock(_) => "clock step",
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
            | Self::FillDisk(target)
            | Self::SlowDisk(target)
            | Self::StepClock(target)
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
    kinds: Vec<fn(Target) -> Fault>,
    opening: Vec<Fault>,
}

impl Schedule {
    /// The schedule of `seed` for a cluster of `nodes`, of what is within `reach`.
    ///
    /// It opens with one of each kind that matters most, so that a short run has seen them too.
    #[must_use]
    pub fn new(seed: u64, nodes: u32, reach: Reach) -> Self {
        let mut rng = Rng::with_seed(seed);
        let mut opening = vec![
            Fault::Kill(Target::Leader),
            Fault::Pause(Target::Leader),
            Fault::KillAll,
            Fault::Demote(Target::Leader),
            Fault::Replace(Target::Leader),
        ];
        if reach.network {
            opening.push(Fault::IsolateFromPeers(Target::Leader));
        }
        rng.shuffle(&mut opening);
        Self { rng, nodes, kinds: Fault::kinds(reach), opening }
    }
}

impl Iterator for Schedule {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        let pause = Duration::from_millis(self.rng.u64(300..2_000));
        let lasting = Duration::from_millis(self.rng.u64(200..3_500));
        let target = if self.rng.u8(0..3) < 2 { Target::Leader } else { Target::Node(self.rng.u32(1..=self.nodes)) };
        let fault = match self.opening.pop() {
            Some(fault) => fault,
            None if self.rng.u8(0..12) == 0 => Fault::KillAll,
            None => self.rng.choice(&self.kinds).expect("there are kinds")(target),
        };
        Some(Step { pause, fault, lasting })
    }
}

/// Follows a schedule until `end`, leaves the cluster whole and ready, and says what was done; times count from the
/// call.
///
/// # Panics
/// When a node ends by itself, or the cluster does not recover.
pub async fn torment(
    cluster: &mut Cluster,
    schedule: &mut Schedule,
    end: Instant,
    mut say: impl FnMut(&str),
) -> Vec<Event> {
    let began = Instant::now();
    let mut done = Vec::new();
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
        let at = began.elapsed();
        inflict(cluster, step.fault, victim, lasting).await;
        done.push(Event { at, lasting: began.elapsed() - at, name: step.fault.name() });
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
        Fault::FillDisk(_) => {
            disk(cluster, victim).fill();
            wait::pass(lasting).await;
            // It has ended by itself, or is about to: what it could not write is not forgiven.
            cluster.bury();
            if cluster.node(victim).runs() {
                cluster.node_mut(victim).kill();
            }
            disk(cluster, victim).free();
            cluster.node_mut(victim).start();
        }
        Fault::SlowDisk(_) => {
            disk(cluster, victim).slow_down();
            wait::pass(lasting).await;
            disk(cluster, victim).speed_up();
        }
        Fault::StepClock(_) => {
            let seconds = i64::try_from(lasting.as_millis()).unwrap_or(0) * 25;
            let offset = if seconds % 2 == 0 { seconds } else { -seconds };
            cluster.wall_clock(victim).expect("only scheduled with wall clocks").step(offset);
            wait::pass(lasting).await;
        }
    }
}

fn disk(cluster: &mut Cluster, id: u32) -> &mut Disk {
    cluster.disk_mut(id).expect("only scheduled with disks")
}

/// A client for what operators do.
fn operator(cluster: &Cluster) -> Client {
    Client::builder().endpoints(cluster.addresses()).call_timeout(OPERATOR_TIMEOUT).build().expect("valid endpoints")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const EVERYTHING: Reach = Reach { network: true, disks: true, wall_clocks: true };

    fn names(seed: u64, reach: Reach, steps: usize) -> Vec<&'static str> {
        Schedule::new(seed, 3, reach).take(steps).map(|step| step.fault.name()).collect()
    }

    #[test]
    fn a_seed_gives_the_same_schedule_again() {
        let steps = |seed| Schedule::new(seed, 3, EVERYTHING).take(100).collect::<Vec<_>>();
        assert_eq!(steps(7), steps(7));
        assert_ne!(steps(7), steps(8));
    }

    #[test]
    fn a_long_schedule_has_every_fault() {
        let names: BTreeSet<_> = names(7, EVERYTHING, 500).into_iter().collect();
        assert_eq!(names.len(), 14, "{names:?}");
    }

    #[test]
    fn what_is_out_of_reach_is_left_alone() {
        let names: BTreeSet<_> = names(7, Reach::default(), 500).into_iter().collect();
        assert_eq!(names, BTreeSet::from(["demote", "kill", "kill all", "pause", "replace", "stop", "transfer"]));
    }

    #[test]
    fn a_short_schedule_has_the_faults_that_matter_most() {
        for seed in 0..20 {
            let names = names(seed, EVERYTHING, 6);
            for name in ["kill", "pause", "kill all", "isolate from peers", "demote", "replace"] {
                assert!(names.contains(&name), "seed {seed}: {names:?}");
            }
        }
    }
}
