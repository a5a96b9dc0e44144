//! How a cluster comes into being, and how a node notices that it must not take part.
//!
//! A fresh cluster is formed once, by the initial voter with the lowest id, after *every* initial member has said
//! hello: all fresh, all with the same list. Their incarnations go into the first membership. Since the one node that
//! may form it asks everybody first, a node whose peers already form a cluster never bootstraps another.
//!
//! A node that restarts says hello too: whoever answers tells whether the cluster knows this very data directory. So does
//! a node that is configured to join, until the leader adds it; and a member that does not hear of a leader, which may
//! have been removed, or has to be found again because it or others have moved (`steward`).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use d_engine_proto::{PEER_PROTOCOL_VERSION, v1};
use futures_util::future::join_all;
use openraft::async_runtime::watch::WatchReceiver;

use super::handle::Timings;
use super::leadership::{Leadership, Role};
use super::log::Log;
use super::member::Member;
use super::network::{LocalIdentity, Peers, log_id_in, log_id_out};
use super::raft_types::{LogId, Raft};
use super::steward::is_at;
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
    /// The cluster goes on without this node.
    #[error(
        "node {node_id} was removed from the cluster {cluster_id:016x}: it takes no part any more; to bring it back, empty \
         its data directory, start it and add it again"
    )]
    Removed {
        /// This node.
        node_id: u32,
        /// The cluster.
        cluster_id: u64,
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
    pub(super) timings: Timings,
}

type Hellos = BTreeMap<u32, v1::HelloResponse>;

/// What this node's own membership says, committed or not.
#[derive(Default)]
struct Standing {
    members: BTreeMap<u32, Member>,
    position: Option<LogId>,
    /// Whether it names this very directory.
    is_member: bool,
}

impl Formation {
    pub(super) fn answer_hello(&self, raft: &Raft, route: &v1::Route) -> v1::HelloResponse {
        let metrics = raft.metrics();
        let metrics = metrics.borrow_watched();
        let (effective, committed) = (&metrics.membership_config, &metrics.committed_membership_config);
        let of_sender = |member: &Member| member.incarnation == route.from_incarnation;
        let leader = metrics.current_leader.and_then(|id| Some((id, effective.membership().get_node(&id)?)));
        v1::HelloResponse {
            protocol_version: PEER_PROTOCOL_VERSION,
            node_id: self.local.node_id,
            incarnation: self.local.incarnation,
            cluster_id: self.local.cluster_id().unwrap_or(0),
            initial_cluster: self.initial_cluster.clone(),
            client_address: self.client_address.clone(),
            application_address: self.application_address.clone(),
            known_incarnation: effective.membership().get_node(&route.from).map_or(0, |member| member.incarnation),
            membership: committed.log_id().as_ref().map(log_id_out),
            is_member: committed.membership().get_node(&route.from).is_some_and(of_sender),
            was_added: effective
                .membership()
                .get_node(&self.local.node_id)
                .is_some_and(|member| member.incarnation == self.local.incarnation),
            leader_id: leader.map_or(0, |(id, _)| id),
            leader_address: leader.map_or_else(String::new, |(_, member)| member.peer_address.clone()),
        }
    }

    /// Where this node is reached; `None` if the list it was started with does not say.
    pub(super) fn addresses(&self) -> Option<v1::Addresses> {
        let own = self.initial_cluster.iter().find(|member| member.id == self.local.node_id)?;
        Some(v1::Addresses {
            peer: own.address.clone(),
            client: self.client_address.clone(),
            application: self.application_address.clone(),
        })
    }

    /// Introduces this node to the one that is thought to be `to`; 0: whoever is there.
    pub(super) async fn hello(&self, peers: &Peers, to: u32, address: &str) -> Result<v1::HelloResponse, String> {
        peers.hello(to, address, self.initial_cluster.clone(), self.addresses()).await
    }

    /// Forms the cluster, or waits until it is formed and has this node. A member says hello until every other one has
    /// confirmed it and the membership says where it is reached, and again whenever the leader falls silent: it may have
    /// been removed, or the others may have moved.
    pub(super) async fn run(
        &self,
        raft: Raft,
        log: Log,
        peers: Peers,
        leadership: Arc<Leadership>,
    ) -> Result<(), MembershipRefused> {
        let mut hellos = Hellos::new();
        let mut rounds = 0;
        let mut period = HELLO_PERIOD;
        let mut confirmed = false;
        loop {
            let Some(standing) = self.standing(&raft).await else { return Ok(()) };
            let missing = self.ask(&peers, &standing, &mut hellos, confirmed).await?;
            let alone = hellos.values().all(|hello| hello.cluster_id == 0);
            if standing.is_member {
                if missing.is_empty() && self.is_recorded(&standing) {
                    confirmed = true;
                    hellos.clear();
                    if !self.until_in_doubt(&raft, &leadership).await {
                        return Ok(());
                    }
                    period = HELLO_PERIOD;
                } else {
                    if missing.is_empty() {
                        // Whoever leads was told, but may lead no more before it has recorded it: say it again.
                        hellos.clear();
                    }
                    period = (2 * period).min(HELLO_PERIOD_MAX);
                }
            } else if missing.is_empty() && alone && self.is_founder() {
                self.found(&raft, &log, &hellos).await;
            } else if rounds % ROUNDS_PER_REPORT == ROUNDS_PER_REPORT - 1 {
                if alone {
                    tracing::info!(?missing, "waiting for every initial member before the cluster is formed");
                } else {
                    tracing::info!(
                        "waiting for the cluster's leader to contact this node: unless it is configured to join, add \
                         it with `d-engine member add`"
                    );
                }
            }
            rounds += 1;
            tokio::time::sleep(period).await;
        }
    }

    /// Asked of the core itself: right after the start the published metrics are still empty. `None`: it has stopped.
    async fn standing(&self, raft: &Raft) -> Option<Standing> {
        let membership = raft.with_raft_state(|state| state.membership_state.effective().clone()).await.ok()?;
        let members: BTreeMap<u32, Member> = membership.nodes().map(|(id, member)| (*id, member.clone())).collect();
        let own = members.get(&self.local.node_id);
        let is_member = own.is_some_and(|member| member.incarnation == self.local.incarnation);
        Some(Standing { members, position: *membership.log_id(), is_member })
    }

    fn is_recorded(&self, standing: &Standing) -> bool {
        let own = standing.members.get(&self.local.node_id);
        own.zip(self.addresses()).is_none_or(|(member, addresses)| is_at(member, &addresses))
    }

    /// Waits until the leader is silent. Returns false once the node has stopped.
    async fn until_in_doubt(&self, raft: &Raft, leadership: &Leadership) -> bool {
        let patience = self.timings.silence();
        loop {
            tokio::time::sleep(patience).await;
            if raft.metrics().borrow_watched().running_state.is_err() {
                return false;
            }
            if leadership.role() != Role::Leader && leadership.silence() > patience {
                return true;
            }
        }
    }

    /// Says hello to those who have not answered; a fresh node asks everybody anew, since the others change.
    /// Returns who did not answer.
    async fn ask(
        &self,
        peers: &Peers,
        standing: &Standing,
        hellos: &mut Hellos,
        confirmed: bool,
    ) -> Result<Vec<u32>, MembershipRefused> {
        let mut addresses: BTreeMap<u32, Vec<String>> = BTreeMap::new();
        if standing.is_member {
            for (id, member) in &standing.members {
                addresses.entry(*id).or_default().push(peers.address_of(*id, member));
            }
        } else {
            // The leader may be none of those that this node was told of.
            let leaders = hellos.values().filter(|hello| hello.leader_id != 0);
            for leader in leaders {
                addresses.entry(leader.leader_id).or_default().push(leader.leader_address.clone());
            }
            hellos.clear();
        }
        for initial in &self.initial_cluster {
            // A founding member that was removed is not waited for, nor one that joins later.
            let awaited =
                if standing.is_member { standing.members.contains_key(&initial.id) } else { !initial.joining };
            let known = addresses.entry(initial.id).or_default();
            if awaited && !known.contains(&initial.address) {
                known.push(initial.address.clone());
            }
        }
        addresses.remove(&self.local.node_id);
        addresses.retain(|id, addresses| !addresses.is_empty() && !hellos.contains_key(id));
        let calls = addresses.iter().flat_map(|(id, addresses)| addresses.iter().map(move |address| (*id, address)));
        let calls = calls.map(async |(id, address)| (id, address, self.hello(peers, id, address).await));
        for (id, address, answer) in join_all(calls).await {
            let hello = match answer {
                Ok(hello) => hello,
                Err(error) => {
                    tracing::debug!(peer = id, address, error, "no hello");
                    continue;
                }
            };
            match self.check(id, address, &hello, standing) {
                Ok(()) => {}
                // Later, an address may have become somebody else's.
                Err(
                    refused @ (MembershipRefused::OtherNode { .. }
                    | MembershipRefused::OtherCluster { .. }
                    | MembershipRefused::OtherProtocol { .. }),
                ) if confirmed || !self.is_configured(id, address) => {
                    tracing::debug!(%refused, "not the member that was expected");
                    continue;
                }
                Err(refused) => return Err(refused),
            }
            let member = standing.members.get(&id);
            if standing.is_member && member.is_none_or(|member| member.incarnation != hello.incarnation) {
                continue;
            }
            if standing.is_member && member.is_some_and(|member| peers.address_of(id, member) != *address) {
                peers.found(id, hello.incarnation, address);
            }
            // A member that does not know of the cluster yet confirms nothing.
            if !standing.is_member || hello.cluster_id != 0 {
                hellos.entry(id).or_insert(hello);
            }
        }
        Ok(addresses.into_keys().filter(|id| !hellos.contains_key(id)).collect())
    }

    fn is_configured(&self, id: u32, address: &str) -> bool {
        self.initial_cluster.iter().any(|member| member.id == id && member.address == *address)
    }

    fn check(
        &self,
        id: u32,
        address: &str,
        hello: &v1::HelloResponse,
        standing: &Standing,
    ) -> Result<(), MembershipRefused> {
        let address = || address.to_owned();
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
        // What is committed after what names this node, and does not name it, removes it.
        if standing.is_member && !hello.is_member && hello.membership.map(log_id_in) > standing.position {
            return Err(MembershipRefused::Removed { node_id: self.local.node_id, cluster_id: hello.cluster_id });
        }
        if hello.known_incarnation != 0 && hello.known_incarnation != self.local.incarnation {
            return Err(MembershipRefused::LostDirectory {
                node_id: self.local.node_id,
                cluster_id: hello.cluster_id,
                known: hello.known_incarnation,
                ours: self.local.incarnation,
            });
        }
        // Once formed, the membership counts, and the lists may have grown apart from it. Who joins later is told of
        // those who are there, no more.
        let both_are_fresh = self.local.cluster_id().is_none() && hello.cluster_id == 0;
        let joins = |list: &[v1::InitialMember], id| list.iter().any(|member| member.id == id && member.joining);
        let one_joins = joins(&self.initial_cluster, self.local.node_id) || joins(&hello.initial_cluster, id);
        if both_are_fresh && !one_joins && hello.initial_cluster != self.initial_cluster {
            return Err(MembershipRefused::DifferingLists {
                peer: id,
                address: address(),
                ours: describe(&self.initial_cluster),
                theirs: describe(&hello.initial_cluster),
            });
        }
        Ok(())
    }

    fn is_founder(&self) -> bool {
        let voters = self.initial_cluster.iter().filter(|member| !member.learner && !member.joining);
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
        let voters = self.initial_cluster.iter().filter(|member| !member.learner && !member.joining);
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
            promotable: false,
        }
    }
}

fn describe(members: &[v1::InitialMember]) -> String {
    let describe_one = |member: &v1::InitialMember| {
        let learner = if member.learner { " (learner)" } else { "" };
        let joining = if member.joining { " (joining)" } else { "" };
        format!("{}={}{learner}{joining}", member.id, member.address)
    };
    members.iter().map(describe_one).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a newer version adds to its hello, this one ignores; what it says of its version, it does not.
    #[test]
    fn an_older_or_newer_peer_is_refused_by_its_version() {
        let member = |id| v1::InitialMember { id, address: format!("n{id}:9081"), learner: false, joining: false };
        let formation = Formation {
            local: Arc::new(LocalIdentity::new(1, 11, None)),
            initial_cluster: vec![member(1), member(2)],
            client_address: String::new(),
            application_address: String::new(),
            timings: crate::consensus::tests::TIMINGS,
        };
        let hello = |protocol_version| v1::HelloResponse {
            protocol_version,
            node_id: 2,
            incarnation: 22,
            initial_cluster: formation.initial_cluster.clone(),
            ..Default::default()
        };
        let check = |hello: &v1::HelloResponse| formation.check(2, "n2:9081", hello, &Standing::default());
        check(&hello(PEER_PROTOCOL_VERSION)).unwrap();
        for theirs in [PEER_PROTOCOL_VERSION - 1, PEER_PROTOCOL_VERSION + 1] {
            let refused = check(&hello(theirs)).unwrap_err();
            assert_eq!(refused, MembershipRefused::OtherProtocol { peer: 2, address: "n2:9081".into(), theirs });
            let message = refused.to_string();
            let versions = format!("speaks peer protocol {theirs}, this node {PEER_PROTOCOL_VERSION}");
            assert!(message.contains(&versions) && message.contains("upgrade the older"), "{message}");
        }
    }
}
