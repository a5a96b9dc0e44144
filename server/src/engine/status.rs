//! What a node tells of itself.

use d_engine_proto::v1;

use super::{Engine, refusal};
use crate::consensus::Role;
use crate::metrics::Figures;
use crate::storage::disk_bytes;

/// The version of this software.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

impl Engine {
    /// The members and the leader, as this node knows them.
    #[must_use]
    pub fn members(&self) -> v1::MembersResponse {
        let membership = self.inner.consensus.membership();
        let members = membership
            .members
            .iter()
            .map(|(id, (member, votes))| v1::Member {
                id: id.get(),
                role: if *votes { v1::MemberRole::Voter } else { v1::MemberRole::Learner } as i32,
                peer_address: member.peer_address.clone(),
                client_address: member.client_address.clone(),
                application_address: member.application_address.clone(),
                promotable: member.promotable && !*votes,
            })
            .collect();
        let revision = self.inner.kv.current().revision();
        v1::MembersResponse { header: self.header(revision), members, leader: self.leader_hint() }
    }

    /// How this node is doing. Reads the size of the data directories: not for a hot path.
    #[must_use]
    pub fn status(&self) -> v1::StatusResponse {
        let consensus = &self.inner.consensus;
        let progress = consensus.progress();
        let store = self.inner.kv.current();
        let problem = self.problem();
        v1::StatusResponse {
            header: self.header(store.revision()),
            role: match consensus.role() {
                Role::Learner => v1::NodeRole::Learner,
                Role::Follower => v1::NodeRole::Follower,
                Role::Candidate => v1::NodeRole::Candidate,
                Role::Leader => v1::NodeRole::Leader,
            } as i32,
            leader: self.leader_hint(),
            last_log_index: progress.last_log.get(),
            committed_index: progress.committed.get(),
            applied_index: progress.applied.get(),
            keys: store.key_count(),
            disk_bytes: self.inner.config.data_directories.iter().map(|directory| disk_bytes(directory)).sum(),
            version: VERSION.to_owned(),
            ready: problem.is_none(),
            problem: problem.unwrap_or_default(),
            alarm: self.inner.checks.alarm(),
            uptime_ms: u64::try_from(self.inner.started.elapsed().as_millis()).unwrap_or(u64::MAX),
        }
    }

    /// Why this node does not serve; `None` if it does.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        refusal::problem(&self.inner.consensus)
    }

    /// What a scrape of the metrics asks for.
    #[must_use]
    pub fn figures(&self) -> Figures {
        let store = self.inner.kv.current();
        Figures {
            revision: store.revision(),
            compacted: store.compacted(),
            keys: store.key_count(),
            leases: store.lease_count(),
            sessions: store.session_count(),
            expired: self.inner.kv.expired(),
            ..self.inner.consensus.figures()
        }
    }
}
