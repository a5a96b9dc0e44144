//! Changes of who belongs to the cluster and who leads it, on request.

use d_engine_proto::{NodeId, v1, v1::change_member_request::Change};

use super::{Deadline, Engine, EngineError, refusal};
use crate::consensus::{ChangeError, MemberChange, TransferError};

impl Engine {
    /// Adds, promotes, demotes or removes a member. A change that is under way goes on after the deadline.
    ///
    /// # Errors
    /// `NotLeader` on another node, and on the leader that is to be removed or demoted itself, once it has handed over;
    /// `FailedPrecondition` with what is missing; `LeadershipLost` and `DeadlineExceeded` if it may still take effect.
    pub async fn change_member(
        &self,
        request: v1::ChangeMemberRequest,
        deadline: Deadline,
    ) -> Result<v1::ChangeMemberResponse, EngineError> {
        let change = match request.change {
            Some(Change::Add(v1::AddMember { peer_address, stays_learner })) if !peer_address.is_empty() => {
                MemberChange::Add { peer_address, promotable: !stays_learner }
            }
            Some(Change::Promote(v1::PromoteMember { id })) if id != 0 => MemberChange::Promote(NodeId(id)),
            Some(Change::Demote(v1::DemoteMember { id })) if id != 0 => MemberChange::Demote(NodeId(id)),
            Some(Change::Remove(v1::RemoveMember { id })) if id != 0 => MemberChange::Remove(NodeId(id)),
            _ => return Err(EngineError::NoMemberNamed),
        };
        let changed = self.inner.consensus.change_members(change, request.force);
        match tokio::time::timeout_at(deadline, changed).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(self.explain_change(error)),
            Err(_) => {
                let waiting_for = "the change of the membership to be committed";
                return Err(EngineError::DeadlineExceeded { waiting_for, outcome: v1::Outcome::Unknown });
            }
        }
        let v1::MembersResponse { header, members, .. } = self.members();
        Ok(v1::ChangeMemberResponse { header, members })
    }

    /// Hands leadership to another voter.
    ///
    /// # Errors
    /// `NotLeader` on another node, `FailedPrecondition` if the node asked for cannot lead, `Unavailable` if nobody else
    /// can.
    pub async fn transfer_leadership(
        &self,
        request: v1::TransferLeadershipRequest,
        deadline: Deadline,
    ) -> Result<v1::TransferLeadershipResponse, EngineError> {
        let to = Some(NodeId(request.to)).filter(|to| to.get() != 0);
        let transferred = self.inner.consensus.transfer_leadership(to);
        let info = match tokio::time::timeout_at(deadline, transferred).await {
            Ok(transferred) => transferred.map_err(|error| self.explain_transfer(&error))?,
            Err(_) => {
                let waiting_for = "the successor to lead";
                return Err(EngineError::DeadlineExceeded { waiting_for, outcome: v1::Outcome::Unknown });
            }
        };
        let header = self.header(self.inner.kv.current().revision());
        Ok(v1::TransferLeadershipResponse { header, leader: refusal::hint_of(&self.inner.consensus, info) })
    }

    fn explain_change(&self, error: ChangeError) -> EngineError {
        match error {
            ChangeError::NotLeader => self.not_leading(),
            ChangeError::HandOver(error) => self.explain_transfer(&error),
            ChangeError::InProgress | ChangeError::Unreachable { .. } => self.unavailable(error.to_string()),
            ChangeError::Overloaded => EngineError::Overloaded { reason: error.to_string() },
            ChangeError::Interrupted { .. } => EngineError::MemberChangeInterrupted(error),
            ChangeError::Unfit { .. }
            | ChangeError::IdTaken { .. }
            | ChangeError::NoMember { .. }
            | ChangeError::NotCaughtUp { .. }
            | ChangeError::QuorumAtRisk { .. }
            | ChangeError::LastVoter { .. } => EngineError::MembersForbid { reason: error.to_string() },
        }
    }

    fn explain_transfer(&self, error: &TransferError) -> EngineError {
        match error {
            TransferError::NotLeader => self.not_leading(),
            TransferError::NoVoter { .. } | TransferError::NotReady { .. } | TransferError::Nobody => {
                EngineError::MembersForbid { reason: error.to_string() }
            }
            TransferError::NotTaken { .. } | TransferError::Stopped => self.unavailable(error.to_string()),
        }
    }
}
