//! Members of the cluster, as the replicated membership records them.

use std::collections::BTreeMap;
use std::fmt;

use d_engine_proto::NodeId;

/// What the membership records of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Member {
    /// Where its peers reach it, host:port.
    pub peer_address: String,
    /// Where clients reach it, host:port.
    pub client_address: String,
    /// Free address of the application that embeds it; may be empty.
    pub application_address: String,
    /// The data directory it joined with. Another incarnation under the same id is another node and gets no say.
    pub incarnation: u64,
    /// A learner that the leader makes a voter once it has caught up; without meaning for a voter.
    pub promotable: bool,
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.peer_address.fmt(f)
    }
}

/// The members as of one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Membership {
    /// Every member, with whether it votes.
    pub members: BTreeMap<NodeId, (Member, bool)>,
}

impl Membership {
    /// The member with this id.
    #[must_use]
    pub fn get(&self, id: NodeId) -> Option<&Member> {
        self.members.get(&id).map(|(member, _)| member)
    }

    /// Ids of the members that vote.
    pub fn voters(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.members.iter().filter(|(_, (_, voter))| *voter).map(|(id, _)| *id)
    }
}
