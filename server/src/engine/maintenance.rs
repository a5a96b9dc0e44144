//! Maintenance: compaction on request.

use std::time::Duration;

use d_engine_proto::v1::{self, command::Command as Change, command_reply::Reply, compact_request::Target};

use super::{Deadline, Engine, EngineError};

impl Engine {
    /// Forgets the history before a revision, or before what was current some time ago. With an age that nobody
    /// remembers a revision of, nothing is forgotten.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn compact(
        &self,
        request: v1::CompactRequest,
        deadline: Deadline,
    ) -> Result<v1::CompactResponse, EngineError> {
        let revision = match request.target.ok_or(EngineError::NoTarget)? {
            Target::Revision(revision) => revision,
            Target::OlderThanMs(age) => {
                let now = self.inner.consensus.store_time().ok_or_else(|| self.not_leading())?;
                let kept = self.inner.history.revision_before(now, Duration::from_millis(age));
                let compacted = self.inner.kv.current().compacted();
                match kept.filter(|kept| *kept > compacted) {
                    Some(kept) => kept.get(),
                    None => {
                        let header = self.header(self.inner.kv.current().revision());
                        return Ok(v1::CompactResponse { header, compacted_revision: compacted.get() });
                    }
                }
            }
        };
        let request = v1::CompactRequest { target: Some(Target::Revision(revision)) };
        let (header, reply) = self.propose(Change::Compact(request), deadline).await?;
        match reply {
            Reply::Compact(response) => Ok(v1::CompactResponse { header, ..response }),
            _ => Err(EngineError::Stopped),
        }
    }
}
