//! Who belongs to the cluster and who leads it, changed on request.

use d_engine_proto::v1::change_member_request::Change;
use d_engine_proto::{NodeId, v1};

use crate::client::Client;
use crate::cluster::{Header, Leader, Member};
use crate::write::write_request;

write_request! {
    /// A change of who belongs to the cluster; await it to send it.
    ChangeMember(ChangeMemberRequest) -> ChangeMemberResponse {
        /// Does it although fewer voters than a quorum answer afterwards. The cluster then takes no writes until enough
        /// of them are back, and the change itself may wait for that.
        pub fn force(mut self) -> Self {
            self.request.force = true;
            self
        }
    }
}

write_request! {
    /// A transfer of leadership; await it to send it.
    TransferLeadership(TransferLeadershipRequest) -> TransferLeadershipResponse {
        /// Names the voter that is to lead. Otherwise it is the one that is the most up to date.
        pub fn to(mut self, id: NodeId) -> Self {
            self.request.to = id.get();
            self
        }
    }
}

/// What a change of who belongs to the cluster made of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangeMemberResponse {
    /// Who answered.
    pub header: Header,
    /// The members after the change, by ascending id.
    pub members: Vec<Member>,
}

impl From<v1::ChangeMemberResponse> for ChangeMemberResponse {
    fn from(response: v1::ChangeMemberResponse) -> Self {
        let mut members: Vec<_> = response.members.into_iter().map(Member::from).collect();
        members.sort_by_key(|member| member.id);
        Self { header: response.header.unwrap_or_default().into(), members }
    }
}

/// Who leads after a transfer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransferLeadershipResponse {
    /// Who answered: the leader of before.
    pub header: Header,
    /// The leader of now; `None` if it is no member any more.
    pub leader: Option<Leader>,
}

impl From<v1::TransferLeadershipResponse> for TransferLeadershipResponse {
    fn from(response: v1::TransferLeadershipResponse) -> Self {
        Self { header: response.header.unwrap_or_default().into(), leader: response.leader.map(Leader::from) }
    }
}

impl Client {
    fn change_member(&self, change: Change) -> ChangeMember {
        ChangeMember::of(self, v1::ChangeMemberRequest { change: Some(change), force: false })
    }

    /// Adds the node that runs at `peer_address` (`host:port`) and waits to be added: as a learner, which the leader makes
    /// a voter once it has caught up. Its id and its other addresses are what it says. Adding a member again changes
    /// nothing.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// use std::time::Duration;
    ///
    /// let nobody = client.add_member("127.0.0.1:1").timeout(Duration::from_millis(300)).await;
    /// assert!(nobody.is_err(), "no node runs there");
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// `FailedPrecondition` if the node belongs to another cluster, or its id to a member with other data;
    /// `Unavailable` or `DeadlineExceeded` while it cannot be reached; `LeadershipLost` if the leader was deposed
    /// meanwhile: look at [`members`](Self::members) then.
    pub fn add_member(&self, peer_address: &str) -> ChangeMember {
        let peer_address = peer_address.to_owned();
        self.change_member(Change::Add(v1::AddMember { peer_address, stays_learner: false }))
    }

    /// Adds a node as [`add_member`](Self::add_member) does, as a learner that stays one: it receives everything, serves
    /// eventual reads and watches, and counts towards no quorum.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// use std::time::Duration;
    ///
    /// let nobody = client.add_learner("127.0.0.1:1").timeout(Duration::from_millis(300)).await;
    /// assert!(nobody.is_err(), "no node runs there");
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// As [`add_member`](Self::add_member).
    pub fn add_learner(&self, peer_address: &str) -> ChangeMember {
        let peer_address = peer_address.to_owned();
        self.change_member(Change::Add(v1::AddMember { peer_address, stays_learner: true }))
    }

    /// Makes a learner that has caught up a voter.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// use d_engine_client::{ErrorKind, NodeId};
    ///
    /// let refused = client.promote_member(NodeId(77)).await.unwrap_err();
    /// assert_eq!(refused.kind(), ErrorKind::FailedPrecondition, "there is no such member");
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// `FailedPrecondition` if it is no member or lags, or too few voters would answer; else as
    /// [`add_member`](Self::add_member).
    pub fn promote_member(&self, id: NodeId) -> ChangeMember {
        self.change_member(Change::Promote(v1::PromoteMember { id: id.get() }))
    }

    /// Makes a voter a learner that stays one. If it leads, it hands over leadership first.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// use d_engine_client::{ErrorKind, NodeId};
    ///
    /// let refused = client.demote_member(NodeId(77)).await.unwrap_err();
    /// assert_eq!(refused.kind(), ErrorKind::FailedPrecondition, "there is no such member");
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// `FailedPrecondition` if it is no member or the only voter, or too few voters would answer; else as
    /// [`add_member`](Self::add_member).
    pub fn demote_member(&self, id: NodeId) -> ChangeMember {
        self.change_member(Change::Demote(v1::DemoteMember { id: id.get() }))
    }

    /// Removes a member, dead or alive. If it leads, it hands over leadership first. One that runs notices and stops.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// use d_engine_client::{ErrorKind, NodeId};
    ///
    /// let refused = client.remove_member(NodeId(77)).await.unwrap_err();
    /// assert_eq!(refused.kind(), ErrorKind::FailedPrecondition, "there is no such member");
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// As [`demote_member`](Self::demote_member).
    pub fn remove_member(&self, id: NodeId) -> ChangeMember {
        self.change_member(Change::Remove(v1::RemoveMember { id: id.get() }))
    }

    /// Has the leader hand over to another voter, and returns once that leads. Calls meanwhile wait a moment.
    ///
    /// ```
    /// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/example.rs"));
    /// # fn main() { run(async |client| {
    /// use d_engine_client::{ErrorKind, NodeId};
    ///
    /// let refused = client.transfer_leadership().to(NodeId(77)).await.unwrap_err();
    /// assert_eq!(refused.kind(), ErrorKind::FailedPrecondition, "there is no such member");
    /// # Ok(()) }) }
    /// ```
    ///
    /// # Errors
    /// `FailedPrecondition` if the node asked for cannot lead, or nobody else can; `Unavailable` if the successor did not
    /// take over in time: the leader goes on looking for one.
    pub fn transfer_leadership(&self) -> TransferLeadership {
        TransferLeadership::of(self, v1::TransferLeadershipRequest { to: 0 })
    }
}
