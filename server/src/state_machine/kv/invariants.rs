//! What must hold of the store between any two entries. Going on without it could let replicas diverge.

use bytes::Bytes;
use d_engine_proto::{LeaseId, Revision, limits};

use super::store::Store;
use crate::state_machine::StoreTime;
use crate::storage::versions::{KeyVersion, RecordKey};

/// An invariant that does not hold.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Violation {
    /// `compacted <= revision`.
    #[error("the compacted revision is ahead of the current one")]
    CompactedAhead,
    /// A rule about each key.
    #[error("key \"{}\" breaks the rule: {rule}", key.escape_ascii())]
    Key { key: Bytes, rule: &'static str },
    /// A rule about each lease and session, or bytes that are none.
    #[error("{key:?} breaks the rule: {message}")]
    Record { key: RecordKey, message: String },
    /// Every deadline and attachment belongs to a lease that exists.
    #[error("a lease is missing to which a key or a deadline belongs")]
    LeaseMissing,
    /// Every deadline belongs to a session that exists, and no more than the bound do.
    #[error("a session is missing to which a deadline belongs, or there are too many")]
    SessionMissing,
}

impl Store {
    /// Checks what must hold between any two entries.
    ///
    /// # Errors
    /// The first thing that does not hold.
    pub(super) fn validate(&self) -> Result<(), Violation> {
        if self.compacted() > self.revision() {
            return Err(Violation::CompactedAhead);
        }
        let mut previous: Option<&KeyVersion> = None;
        let mut leased = 0;
        for version in self.keys.iter() {
            let violation = |rule| Err(Violation::Key { key: version.key.clone(), rule });
            let ordered = version.create_revision <= version.mod_revision && version.mod_revision <= self.revision();
            if version.create_revision == Revision(0) || !ordered {
                return violation("0 < create revision <= mod revision <= the store's revision");
            }
            // A revision changes a key at most once.
            if version.version == 0 || version.version - 1 > version.mod_revision.get() - version.create_revision.get()
            {
                return violation("1 <= version <= mod revision - create revision + 1");
            }
            if version.key.is_empty() || version.key.len() as u64 > limits::KEY_BYTES_MAX {
                return violation("a key's length is within its bounds");
            }
            if previous.is_some_and(|previous| previous.key >= version.key) {
                return violation("keys ascend");
            }
            if version.lease != LeaseId(0) {
                if !self.leases.contains(version.lease) || !self.leases.knows(version.lease, &version.key) {
                    return violation("a leased key is known to its lease");
                }
                leased += 1;
            }
            previous = Some(version);
        }
        if self.leases.attached_count() != leased {
            return Err(Violation::LeaseMissing);
        }
        let now = StoreTime(self.state.store_time);
        self.leases.validate(now, self.state.last_lease)?;
        self.sessions.validate(now, self.state.last_session)
    }
}
