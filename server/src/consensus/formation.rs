//! How a cluster comes into being, and how a node notices that it must not take part.
//!
//! A fresh cluster is formed once, by the initial voter with the lowest id, after *every* initial member has said
//! hello: all fresh, all with the same list. Their incarnations go into the first membership. Since the one node that
//! may form it asks everybody first, a node whose peers already form a cluster never bootstraps another.
//!
//! A node that restarts says hello too: whoever answers tells whether the cluster knows this very data directory.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use d_engine_proto::{PEER_PROTOCOL_VERSION, v1};
use futures_util::future::join_all;
use openraft::async_runtime::watch::WatchReceiver;

use super::log::Log;
use super::member::Member;
use super::network::{LocalIdentity, Peers};
use super::raft_types::Raft;
use crate::storage::Identity;

/// Pause between two rounds of hellos of a node that waits to be a member.
const HELLO_PERIOD: Duration = Duration::from_millis(100);
/// Longest pause between two rounds of a member that only wants to be sure of itself.
const HELLO_PERIOD_MAX: Duration = Duration::from_secs(5);
/// How many rounds pass between two lines in the log about who is missing.
const ROUNDS_PER_REPORT: u32 = 50;

/// Why this node must not run as a member.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MembershipRefused {
    /// The directory is not the one the cluster knows.
    #[error(
        "the cluster {cluster_id:016x} knows node {node_id} by another data directory (incarnation {known:016x}, this \
         one has {ours:016x}): a member that lost its data must not vote under its old id; restore the directory, or \
         remove the member from the cluster and add it again"
    )]
    LostDirectory {
        /// This node.
        node_id: u32,
        /// The cluster.
        cluster_id: u64,
        /// The incarnation in the membership.
        known: u64,
        /// The incarnation in the directory.
        ours: u64,
    },
    /// A peer belongs to another cluster.
    #[error(
        "the data directory belongs to cluster {ours:016x}, but {address} (node {peer}) belongs to {theirs:016x}: \
         correct cluster.initial_cluster, or start with the directory of that cluster"
    )]
    OtherCluster {
        /// The peer.
        peer: u32,
        /// Its address.
        address: String,
        /// Its cluster.
        theirs: u64,
        /// The directory's cluster.
        ours: u64,
    },
    /// The address of one node is answered by another.
    #[error("cluster.initial_cluster says node {expected} is at {address}, but node {found} answers there: correct it")]
    OtherNode {
        /// The address.
        address: String,
        /// The node configured for it.
        expected: u32,
        /// The node that answers.
        found: u32,
    },
    /// The lists differ.
    #[error(
        "cluster.initial_cluster differs between the nodes: here [{ours}], at node {peer} ({address}) [{theirs}]; \
         give every node the same list"
    )]
    DifferingLists {
        /// The peer.
        peer: u32,
        /// Its address.
        address: String,
        /// The list here.
        ours: String,
        /// The list there.
        theirs: String,
    },
    /// The peer speaks another version of the peer protocol.
    #[error(
        "node {peer} ({address}) speaks peer protocol {theirs}, this node {PEER_PROTOCOL_VERSION}: upgrade the older"
    )]
    OtherProtocol {
        /// The peer.
        peer: u32,
        /// Its address.
        address: String,
        /// Its version.
        theirs: u32,
    },
}

/// What this node says of itself, and the list it was started with.
pub(super) struct Formation {
    pub(super) local: Arc<LocalIdentity>,
    /// Sorted by id, this node included.
    pub(super) initial_cluster: Vec<v1::InitialMember>,
    pub(super) client_address: String,
    pub(super) application_address: String,
}

type Hellos = BTreeMap<u32, v1::HelloResponse>;

impl Formation {
    pub(super) fn answer_hello(&self, raft: &Raft, route: &v1::Route) -> v1::HelloResponse {
        let known_incarnation = {
            let metrics = raft.metrics();
            let metrics = metrics.borrow_watched();
            metrics.membership_config.membership().get_node(&route.from).map_or(0, |member| member.incarnation)
        };
        v1::HelloResponse {
            protocol_version: PEER_PROTOCOL_VERSION,
            node_id: self.local.node_id,
            incarnation: self.local.incarnation,
            cluster_id: self.local.cluster_id().unwrap_or(0),
            initial_cluster: self.initial_cluster.clone(),
            client_address: self.client_address.clone(),
            application_address: self.application_address.clone(),
            known_incarnation,
        }
    }

    /// Forms the cluster, or waits until it is formed; then returns. A restarted node returns once every peer has
    /// confirmed it.
    pub(super) async fn run(&self, raft: Raft, log: Log, peers: Peers) -> Result<(), MembershipRefused> {
        let mut hellos = Hellos::new();
        let mut rounds = 0;
        let mut period = HELLO_PERIOD;
        let id = self.local.node_id;
        loop {
            // Asked of the core itself: right after the start the published metrics are still empty.
            let Ok(is_member) =
                raft.with_raft_state(move |state| state.membership_state.effective().get_node(&id).is_some()).await
            else {
                return Ok(());
            };
            let missing = self.ask(&peers, &mut hellos, is_member).await;
            for (id, hello) in &hellos {
                self.check(*id, hello)?;
            }
            let alone = hellos.values().all(|hello| hello.cluster_id == 0);
            if is_member {
                let learners_wait = self.add_learners(&raft, &hellos).await;
                if missing.is_empty() && !learners_wait {
                    return Ok(());
                }
                // What a learner said while it was fresh may have changed.
                hellos.retain(|_, hello| hello.cluster_id != 0);
                period = (2 * period).min(HELLO_PERIOD_MAX);
            } else if missing.is_empty() && alone && self.is_founder() {
                self.found(&raft, &log, &hellos).await;
            } else if rounds % ROUNDS_PER_REPORT == ROUNDS_PER_REPORT - 1 {
                if alone {
                    tracing::info!(?missing, "waiting for every initial member before the cluster is formed");
                } else {
                    tracing::info!("waiting for the cluster's leader to contact this member");
                }
            }
            rounds += 1;
            tokio::time::sleep(period).await;
        }
    }

    /// Says hello to those who have not answered; a fresh node asks everybody anew, since the others change.
    /// Returns who did not answer.
    async fn ask(&self, peers: &Peers, hellos: &mut Hellos, is_member: bool) -> Vec<u32> {
        if !is_member {
            hellos.clear();
        }
        let others = self.initial_cluster.iter().filter(|member| member.id != self.local.node_id);
        let missing: Vec<_> = others.filter(|member| !hellos.contains_key(&member.id)).collect();
        let calls = missing.iter().map(|member| peers.hello(member.id, &member.address, self.initial_cluster.clone()));
        let mut unanswered = Vec::new();
        for (member, answer) in missing.iter().zip(join_all(calls).await) {
            match answer {
                Ok(hello) => {
                    hellos.insert(member.id, hello);
                }
                Err(error) => {
                    tracing::debug!(peer = member.id, error = error.message(), "no hello");
                    unanswered.push(member.id);
                }
            }
        }
        unanswered
    }

    fn check(&self, id: u32, hello: &v1::HelloResponse) -> Result<(), MembershipRefused> {
        let address = || self.address_of(id);
        if hello.protocol_version != PEER_PROTOCOL_VERSION {
            let theirs = hello.protocol_version;
            return Err(MembershipRefused::OtherProtocol { peer: id, address: address(), theirs });
        }
        if hello.node_id != id {
            return Err(MembershipRefused::OtherNode { address: address(), expected: id, found: hello.node_id });
        }
        let other_cluster = |ours: &u64| hello.cluster_id != 0 && hello.cluster_id != *ours;
        if let Some(ours) = self.local.cluster_id().filter(other_cluster) {
            let theirs = hello.cluster_id;
            return Err(MembershipRefused::OtherCluster { peer: id, address: address(), theirs, ours });
        }
        if hello.known_incarnation != 0 && hello.known_incarnation != self.local.incarnation {
            return Err(MembershipRefused::LostDirectory {
                node_id: self.local.node_id,
                cluster_id: hello.cluster_id,
                known: hello.known_incarnation,
                ours: self.local.incarnation,
            });
        }
        // Once formed, the membership counts, and the lists may have grown apart from it.
        let both_are_fresh = self.local.cluster_id().is_none() && hello.cluster_id == 0;
        if both_are_fresh && hello.initial_cluster != self.initial_cluster {
            return Err(MembershipRefused::DifferingLists {
                peer: id,
                address: address(),
                ours: describe(&self.initial_cluster),
                theirs: describe(&hello.initial_cluster),
            });
        }
        Ok(())
    }

    fn address_of(&self, id: u32) -> String {
        let member = self.initial_cluster.iter().find(|member| member.id == id);
        member.map(|member| member.address.clone()).unwrap_or_default()
    }

    fn is_founder(&self) -> bool {
        let voters = self.initial_cluster.iter().filter(|member| !member.learner);
        voters.map(|member| member.id).min() == Some(self.local.node_id)
    }

    /// Writes the first membership. A crash in between repeats it with the same cluster id.
    async fn found(&self, raft: &Raft, log: &Log, hellos: &Hellos) {
        let cluster_id = self.local.cluster_id().unwrap_or_else(|| fastrand::u64(1..));
        let identity = Identity {
            node_id: self.local.node_id.into(),
            incarnation: self.local.incarnation,
            cluster_id: Some(cluster_id),
        };
        if let Err(error) = log.save_identity(identity).await {
            tracing::error!(%error, "the identity cannot be saved");
            return;
        }
        self.local.join(cluster_id);
        let voters = self.initial_cluster.iter().filter(|member| !member.learner);
        let voters: BTreeMap<u32, Member> =
            voters.map(|member| (member.id, self.member_of(member, hellos.get(&member.id)))).collect();
        if let Err(error) = raft.initialize(voters).await {
            tracing::error!(%error, "the cluster cannot be formed");
            return;
        }
        tracing::info!(cluster = format_args!("{cluster_id:016x}"), "formed the cluster");
    }

    /// What the membership records of an initial member; without a hello it is this node.
    fn member_of(&self, initial: &v1::InitialMember, hello: Option<&v1::HelloResponse>) -> Member {
        Member {
            peer_address: initial.address.clone(),
            client_address: hello.map_or(&self.client_address, |hello| &hello.client_address).clone(),
            application_address: hello.map_or(&self.application_address, |h| &h.application_address).clone(),
            incarnation: hello.map_or(self.local.incarnation, |hello| hello.incarnation),
        }
    }

    /// As the leader, adds initial learners that are fresh. Returns whether one waits to be added, by whomever.
    async fn add_learners(&self, raft: &Raft, hellos: &Hellos) -> bool {
        let (leads, members) = {
            let metrics = raft.metrics();
            let metrics = metrics.borrow_watched();
            let members: BTreeSet<u32> = metrics.membership_config.nodes().map(|(id, _)| *id).collect();
            (metrics.current_leader == Some(metrics.id), members)
        };
        let learners = self.initial_cluster.iter().filter(|member| member.learner && !members.contains(&member.id));
        let mut waiting = false;
        for learner in learners {
            let Some(hello) = hellos.get(&learner.id).filter(|hello| hello.cluster_id == 0) else { continue };
            waiting = true;
            if leads && let Err(error) = raft.add_learner(learner.id, self.member_of(learner, Some(hello)), false).await
            {
                tracing::debug!(learner = learner.id, %error, "the learner cannot be added yet");
            }
        }
        waiting
    }
}

fn describe(members: &[v1::InitialMember]) -> String {
    let describe_one = |member: &v1::InitialMember| {
        format!("{}={}{}", member.id, member.address, if member.learner { " (learner)" } else { "" })
    };
    members.iter().map(describe_one).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a newer version adds to its hello, this one ignores; what it says of its version, it does not.
    #[test]
    fn an_older_or_newer_peer_is_refused_by_its_version() {
        let member = |id| v1::InitialMember { id, address: format!("n{id}:9081"), learner: false };
        let formation = Formation {
            local: Arc::new(LocalIdentity::new(1, 11, None)),
            initial_cluster: vec![member(1), member(2)],
            client_address: String::new(),
            application_address: String::new(),
        };
        let hello = |protocol_version| v1::HelloResponse {
            protocol_version,
            node_id: 2,
            incarnation: 22,
            initial_cluster: formation.initial_cluster.clone(),
            ..Default::default()
        };
        formation.check(2, &hello(PEER_PROTOCOL_VERSION)).unwrap();
        for theirs in [PEER_PROTOCOL_VERSION - 1, PEER_PROTOCOL_VERSION + 1] {
            let refused = formation.check(2, &hello(theirs)).unwrap_err();
            assert_eq!(refused, MembershipRefused::OtherProtocol { peer: 2, address: "n2:9081".into(), theirs });
            let message = refused.to_string();
            let versions = format!("speaks peer protocol {theirs}, this node {PEER_PROTOCOL_VERSION}");
            assert!(message.contains(&versions) && message.contains("upgrade the older"), "{message}");
        }
    }
}
